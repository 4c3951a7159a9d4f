package state

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/evm"
	"github.com/resultity/node/internal/receipt"
	"github.com/resultity/node/internal/wire"
)

var at = time.UnixMilli(1_800_000_000_000)

func now() time.Time { return at }

func open(t testing.TB, path string) *Store { return openBounded(t, path, Bounds{}, now) }

func openBounded(t testing.TB, path string, b Bounds, now func() time.Time) *Store {
	t.Helper()
	s, err := Open(path, b, now)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() }) // again, for most tests
	return s
}

func newPath(t testing.TB) string { return filepath.Join(t.TempDir(), "jobs") }

func newJob(n int) *wire.Job {
	return &wire.Job{
		ID: receipt.NewJobID(), Model: "tiny-chat", Kind: wire.KindChat, Request: bytes.Repeat([]byte("q"), n),
		Seed: 7, Created: at.Unix(), Deadline: at.Add(time.Minute).UnixMilli(), Config: digest.Of([]byte("c")),
	}
}

func failure(j *wire.Job) *wire.Result {
	return &wire.Result{Job: j.ID, Code: wire.CodeEngine, Message: "it ended"}
}

var key = func() *evm.Key {
	k, err := evm.NewKey()
	if err != nil {
		panic(err)
	}
	return k
}()

// success is a result of n bytes with a real receipt: a store gives out no other.
func success(t testing.TB, j *wire.Job, n int) *wire.Result {
	t.Helper()
	r, err := sign(j, bytes.Repeat([]byte("a"), n))
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func sign(j *wire.Job, body []byte) (*wire.Result, error) {
	signed, err := stated(j, body).Sign(1, key)
	if err != nil {
		return nil, err
	}
	return &wire.Result{Job: j.ID, Response: body, Receipt: &signed}, nil
}

// stated is what a receipt says.
func stated(j *wire.Job, body []byte) *receipt.Receipt {
	return &receipt.Receipt{
		Job: j.ID, Node: key.Address(),
		Measured: receipt.Measured{
			ConfigDigest: j.Config, ImageDigest: j.Config, ModelDigest: j.Config, SandboxDigest: j.Config,
			RequestHash: digest.Of(j.Request), ResponseHash: digest.Of(body),
		},
		Claimed: receipt.Claimed{ClassDigest: j.Config, StartedAt: 1, FinishedAt: 2},
	}
}

func accept(t testing.TB, s *Store, j *wire.Job, want Known) {
	t.Helper()
	before, err := s.Lookup(j.ID)
	if err != nil || before != want && (before != 0 || want != New && want != Forgotten) {
		t.Fatalf("Lookup = %v, %v before Accept, which is to say %v", before, err, want)
	}
	if got, err := s.Accept(j); err != nil || got != want {
		t.Fatalf("Accept = %v, %v; want %v", got, err, want)
	}
}

func finish(t testing.TB, s *Store, r *wire.Result) {
	t.Helper()
	if err := s.Finish(r); err != nil {
		t.Fatal(err)
	}
}

func ack(t testing.TB, s *Store, ids ...receipt.JobID) {
	t.Helper()
	if err := s.Ack(ids); err != nil {
		t.Fatal(err)
	}
}

func counts(t testing.TB, s *Store, accepted, results, settled int) {
	t.Helper()
	c := s.Counts()
	if c.Accepted != accepted || c.Results != results || c.Settled != settled || (accepted+results == 0) != (c.Bytes == 0) {
		t.Fatalf("Counts = %+v, want %d accepted, %d results, %d settled", c, accepted, results, settled)
	}
}

// reopen shows that what is remembered is on the disk and that Open finds it in
// order.
func reopen(t testing.TB, s *Store) *Store {
	t.Helper()
	want := s.Counts()
	path, b, now := s.path, s.bounds, s.now
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = openBounded(t, path, b, now)
	if got := s.Counts(); got != want {
		t.Fatalf("Counts = %+v after opening again, want %+v", got, want)
	}
	return s
}

func TestTheLifeOfAJob(t *testing.T) {
	s := open(t, newPath(t))
	j := newJob(100)
	r := success(t, j, 5000)

	if err := s.Finish(r); !errors.Is(err, ErrUnknown) {
		t.Fatalf("Finish before Accept = %v, want ErrUnknown", err)
	}
	accept(t, s, j, New)
	accept(t, s, j, Running)
	s = reopen(t, s)
	if got, err := s.Unfinished(); err != nil || len(got) != 1 || !reflect.DeepEqual(got[0], j) {
		t.Fatalf("Unfinished = %+v, %v; want %+v", got, err, j)
	}
	counts(t, s, 1, 0, 0)
	ack(t, s, j.ID) // not finished: passed over
	accept(t, s, j, Running)

	finish(t, s, r)
	s = reopen(t, s)
	accept(t, s, j, Done)
	counts(t, s, 0, 1, 0)
	if got, err := s.Unfinished(); err != nil || len(got) != 0 {
		t.Fatalf("Unfinished = %v, %v; want none", got, err)
	}
	if got, ok, err := s.Result(j.ID); err != nil || !ok || !reflect.DeepEqual(got, r) {
		t.Fatalf("Result = %+v, %v, %v; want %+v", got, ok, err, r)
	}

	ack(t, s, j.ID, receipt.NewJobID(), j.ID)
	ack(t, s, j.ID)
	s = reopen(t, s)
	accept(t, s, j, Settled)
	counts(t, s, 0, 0, 1)
	if _, ok, err := s.Result(j.ID); ok || err != nil {
		t.Fatalf("Result after Ack = %v, %v; want none", ok, err)
	}
	if err := s.Finish(r); !errors.Is(err, ErrConflict) {
		t.Fatalf("Finish after Ack = %v, want ErrConflict", err)
	}
}

func TestOneResultForAJob(t *testing.T) {
	later := at
	s := openBounded(t, newPath(t), Bounds{}, func() time.Time { later = later.Add(time.Second); return later })
	j := newJob(10)
	r := success(t, j, 10)
	accept(t, s, j, New)
	finish(t, s, r)
	finish(t, s, r) // the same again, at another time
	other := *r
	other.Response = []byte("another")
	for _, bad := range []*wire.Result{&other, failure(j)} {
		if err := s.Finish(bad); !errors.Is(err, ErrConflict) {
			t.Fatalf("Finish with another result = %v, want ErrConflict", err)
		}
	}
	counts(t, s, 0, 1, 0)
}

// What Finish takes is read back as it was given, whatever a caller makes up;
// and what it refuses leaves the job as it was, to be ended by a failure.
func TestFinishTakesWhatIsReadBack(t *testing.T) {
	rnd := rand.New(rand.NewPCG(1, 2))
	one := func(from ...string) string { return from[rnd.IntN(len(from))] }
	texts := []string{"", "", "", "plain", "\xff\xfe", "a\"b\\c\n\x00<é>", strings.Repeat("long é", 400)}
	s := open(t, newPath(t))
	want, refused := map[receipt.JobID]*wire.Result{}, map[receipt.JobID]bool{}
	for range 400 {
		j := newJob(rnd.IntN(100))
		accept(t, s, j, New)
		r := &wire.Result{Job: j.ID, Code: wire.Code(one(append(texts, string(wire.CodeEngine))...)), Message: one(texts...), Response: []byte(one(texts...))}
		switch rnd.IntN(4) {
		case 0:
			r.Receipt = new(receipt.Signed)
		case 1, 2:
			b := stated(j, r.Response)
			for range rnd.IntN(2) {
				lack := []any{&b.Job, &b.Measured.ConfigDigest, &b.Measured.ImageDigest, &b.Measured.ModelDigest, &b.Measured.SandboxDigest,
					&b.Measured.RequestHash, &b.Measured.ResponseHash, &b.Claimed.ClassDigest, &b.Claimed.FinishedAt, &b.Sequence}
				reflect.ValueOf(lack[rnd.IntN(len(lack))]).Elem().SetZero()
			}
			signed, err := b.Sign(1, key)
			if err == nil {
				r.Receipt = &signed
			}
		}
		err := s.Finish(r)
		if again := s.Finish(r); (err == nil) != (again == nil) {
			t.Fatalf("Finish = %v, then %v", err, again)
		}
		if refused[j.ID] = err != nil; refused[j.ID] {
			accept(t, s, j, Running)
			r = failure(j)
			finish(t, s, r)
		}
		want[j.ID] = r
	}
	s = reopen(t, s)
	_, err := s.Outbox(0, func(_ uint64, got *wire.Result) error {
		r := *want[got.Job]
		delete(want, got.Job)
		if r.Message = r.Message[:min(len(r.Message), MaxMessage)]; len(r.Response) == 0 {
			r.Response = nil
		}
		if !reflect.DeepEqual(got, &r) {
			t.Errorf("read back %.300q, was given %.300q", fmt.Sprintf("%+v", got), fmt.Sprintf("%+v", r))
		}
		return nil
	})
	if err != nil || len(want) > 0 {
		t.Fatalf("Outbox = %v; %d results are missing", err, len(want))
	}
	n := 0
	for _, r := range refused {
		if r {
			n++
		}
	}
	if n < 50 || n > 350 {
		t.Fatalf("%d of %d were refused: it says nothing", n, len(refused))
	}
}

// A job that could not be read back is not accepted: the next start would fail on it.
func TestAcceptTakesWhatIsReadBack(t *testing.T) {
	s := open(t, newPath(t))
	for _, spoil := range []func(*wire.Job){
		func(j *wire.Job) { j.ID = receipt.JobID{} },
		func(j *wire.Job) { j.Model = "a\xff" },
		func(j *wire.Job) { j.Kind = "a\xff" },
	} {
		j := newJob(10)
		spoil(j)
		if _, err := s.Accept(j); err == nil {
			t.Errorf("%+v is accepted", j)
		}
	}
	s = reopen(t, s)
	if got, err := s.Unfinished(); err != nil || len(got) != 0 {
		t.Fatalf("Unfinished = %v, %v; want none", got, err)
	}
}

// The network may try a job again where it failed; where it was answered, a
// second receipt must not come to be.
func TestAFailedJobMayComeAgainAfterItsAck(t *testing.T) {
	s := open(t, newPath(t))
	j := newJob(10)
	accept(t, s, j, New)
	finish(t, s, failure(j))
	accept(t, s, j, Done)
	ack(t, s, j.ID)
	counts(t, s, 0, 0, 0)
	accept(t, s, j, New)
}

func TestOutboxIsInTheOrderOfFinishing(t *testing.T) {
	s := open(t, newPath(t))
	var want []receipt.JobID
	for range 20 {
		j := newJob(10)
		accept(t, s, j, New)
		finish(t, s, failure(j))
		want = append(want, j.ID)
	}
	list := func(after uint64) (ids []receipt.JobID, last uint64) {
		t.Helper()
		if _, err := s.Outbox(after, func(seq uint64, r *wire.Result) error {
			if seq <= last {
				t.Fatalf("number %d after %d", seq, last)
			}
			ids, last = append(ids, r.Job), seq
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		return ids, last
	}
	got, last := list(0)
	if !reflect.DeepEqual(got, want) {
		t.Fatalf("Outbox = %v, want %v", got, want)
	}
	if got, _ := list(last); len(got) != 0 {
		t.Fatalf("Outbox(last) = %v, want none", got)
	}
	// The store may be used while it is listed, and what has gone is not met.
	got = nil
	if _, err := s.Outbox(0, func(_ uint64, r *wire.Result) error {
		got = append(got, r.Job)
		return s.Ack([]receipt.JobID{r.Job, want[slices.Index(want, r.Job)+1]})
	}); err != nil || len(got) != 10 {
		t.Fatalf("listing with Ack inside: %d results, %v; want 10", len(got), err)
	}
	// A number is not used again when the outbox has been empty.
	s = reopen(t, s)
	j := newJob(1)
	accept(t, s, j, New)
	finish(t, s, failure(j))
	if got, _ := list(last); len(got) != 1 {
		t.Fatalf("Outbox(last) = %v, want the new one", got)
	}
	stop := errors.New("stop")
	if _, err := s.Outbox(0, func(uint64, *wire.Result) error { return stop }); !errors.Is(err, stop) {
		t.Fatalf("Outbox = %v, want the error of f", err)
	}
}

func TestUnfinishedByDeadline(t *testing.T) {
	s := open(t, newPath(t))
	for _, d := range []int64{5, 3, 9, 1} {
		j := newJob(1)
		j.Deadline = d
		accept(t, s, j, New)
	}
	got, err := s.Unfinished()
	if err != nil {
		t.Fatal(err)
	}
	for i, want := range []int64{1, 3, 5, 9} {
		if got[i].Deadline != want {
			t.Fatalf("job %d has deadline %d, want %d", i, got[i].Deadline, want)
		}
	}
}

func TestBounds(t *testing.T) {
	t.Run("jobs", func(t *testing.T) {
		s := openBounded(t, newPath(t), Bounds{Jobs: 2}, now)
		a, b, c := newJob(1), newJob(1), newJob(1)
		accept(t, s, a, New)
		accept(t, s, b, New)
		finish(t, s, success(t, a, 1))
		if _, err := s.Accept(c); !errors.Is(err, ErrFull) {
			t.Fatalf("third job: %v, want ErrFull", err)
		}
		ack(t, s, a.ID)
		accept(t, s, c, New)
	})
	t.Run("bytes", func(t *testing.T) {
		s := openBounded(t, newPath(t), Bounds{Bytes: 100 << 10}, now)
		a, b := newJob(40<<10), newJob(40<<10)
		accept(t, s, a, New)
		accept(t, s, b, New)
		if _, err := s.Accept(newJob(20 << 10)); !errors.Is(err, ErrFull) {
			t.Fatalf("a job over the bound: %v, want ErrFull", err)
		}
		if err := s.Finish(success(t, a, 60<<10)); !errors.Is(err, ErrFull) {
			t.Fatalf("a result over the bound: %v, want ErrFull", err)
		}
		accept(t, s, a, Running) // and nothing is lost
		finish(t, s, failure(a))
		finish(t, s, success(t, b, 50<<10))
	})
	t.Run("ids", func(t *testing.T) {
		s := openBounded(t, newPath(t), Bounds{IDs: 3}, now)
		var jobs []*wire.Job
		for range 5 {
			j := newJob(1)
			accept(t, s, j, New)
			finish(t, s, success(t, j, 1))
			ack(t, s, j.ID)
			jobs = append(jobs, j)
		}
		counts(t, s, 0, 0, 3)
		accept(t, s, jobs[4], Settled)
		accept(t, s, jobs[2], Settled)
		accept(t, s, jobs[1], New) // the oldest are forgotten
		reopen(t, s)
	})
	t.Run("message", func(t *testing.T) {
		s := open(t, newPath(t))
		j := newJob(1)
		accept(t, s, j, New)
		r := failure(j)
		r.Message = strings.Repeat("\x01", 100_000) // six bytes each in JSON
		finish(t, s, r)
		if got := s.Counts().Bytes; got > failureSize {
			t.Fatalf("a failure takes %d bytes, more than the %d kept for it", got, failureSize)
		}
	})
}

func TestExpire(t *testing.T) {
	clock := at
	s := openBounded(t, newPath(t), Bounds{}, func() time.Time { return clock })
	expire := func(want int) {
		t.Helper()
		if got, err := s.Expire(time.Hour); err != nil || got != want {
			t.Fatalf("Expire = %d, %v; want %d", got, err, want)
		}
	}
	old, failed, young, running := newJob(1), newJob(1), newJob(1), newJob(1)
	accept(t, s, running, New)
	for _, j := range []*wire.Job{old, failed} {
		accept(t, s, j, New)
	}
	finish(t, s, success(t, old, 1))
	finish(t, s, failure(failed))
	clock = clock.Add(30 * time.Minute)
	accept(t, s, young, New)
	finish(t, s, success(t, young, 1))
	expire(0)
	clock = clock.Add(31 * time.Minute)
	expire(2)
	expire(0)
	counts(t, s, 1, 1, 1)
	accept(t, s, old, Settled) // it may have been delivered
	accept(t, s, failed, New)
	accept(t, s, young, Done)
	s = reopen(t, s)
	clock = clock.Add(61 * time.Minute)
	expire(1)
	counts(t, s, 2, 0, 1) // what is running never expires; young's id has just been settled
	accept(t, s, old, New)
	accept(t, s, young, Settled)
}

func TestRegistration(t *testing.T) {
	s := open(t, newPath(t))
	if r, err := s.Registration(); r != nil || err != nil {
		t.Fatalf("Registration of a new store = %v, %v", r, err)
	}
	want := &wire.Registered{Network: "testnet", Node: key.Address(), Account: "a", Time: 1}
	for range 2 {
		if err := s.SetRegistration(want); err != nil {
			t.Fatal(err)
		}
	}
	s = reopen(t, s)
	if got, err := s.Registration(); err != nil || got == nil || *got != *want {
		t.Fatalf("Registration = %+v, %v; want %+v", got, err, want)
	}
	for _, bad := range []*wire.Registered{
		{Network: "mainnet", Node: want.Node},
		{Network: want.Network, Node: evm.Address{1}},
	} {
		if err := s.SetRegistration(bad); err == nil || !strings.Contains(err.Error(), "state directory") {
			t.Errorf("SetRegistration(%+v) = %v, want a refusal with a remedy", bad, err)
		}
	}
	want.Account = "b"
	if err := s.SetRegistration(want); err != nil {
		t.Fatalf("another account of the same node: %v", err)
	}
}

func TestTheFileIsPrivateAndLocked(t *testing.T) {
	path := newPath(t)
	s := open(t, path)
	mode := func(want os.FileMode) {
		t.Helper()
		for _, name := range []string{"", "lock", segmentName(1)} {
			info, err := os.Stat(filepath.Join(path, name))
			if err != nil {
				t.Fatal(err)
			}
			if got := info.Mode().Perm(); name != "" && got != want || name == "" && got != 0o700 {
				t.Errorf("%q: mode %o, want %o", name, got, want)
			}
		}
	}
	mode(0o600)
	if _, err := Open(path, Bounds{}, now); !errors.Is(err, ErrLocked) {
		t.Fatalf("second Open = %v, want ErrLocked", err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"", "lock", segmentName(1)} {
		if err := os.Chmod(filepath.Join(path, name), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	open(t, path)
	mode(0o600)
}

func TestOpenRefuses(t *testing.T) {
	dir := t.TempDir()
	_, err := Open(filepath.Join(dir, "no", "jobs"), Bounds{}, now)
	t.Logf("no directory: expected: %v; got: %v", os.ErrNotExist, err)
	if !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no directory: %v, want ErrNotExist", err)
	}
	path := newPath(t)
	if err := os.WriteFile(path, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	_, err = Open(path, Bounds{}, now)
	t.Logf("a file: expected: %v; got: %v", ErrCorrupt, err)
	if !errors.Is(err, ErrCorrupt) {
		t.Errorf("a file: %v, want ErrCorrupt", err)
	}
	path = newPath(t)
	open(t, path).Close()
	name := filepath.Join(path, segmentName(1))
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	for _, at := range []int{0, headCopy} {
		at += len(magic)
		binary.BigEndian.PutUint32(b[at:], version+1)
		binary.BigEndian.PutUint32(b[at+4:], crc32.Checksum(b[at-len(magic):at+4], castagnoli))
	}
	if err := os.WriteFile(name, b, 0o600); err != nil {
		t.Fatal(err)
	}
	_, err = Open(path, Bounds{}, now)
	t.Logf("another format: expected: %v; got: %v", ErrFormat, err)
	if !errors.Is(err, ErrFormat) || errors.Is(err, ErrCorrupt) {
		t.Errorf("another format: %v, want ErrFormat", err)
	}
}

// Everybody is answered, once, whatever shares a commit with whatever.
func TestConcurrentUse(t *testing.T) {
	s := open(t, newPath(t))
	shared := newJob(10)
	var news, wg = make(chan receipt.JobID, 1000), sync.WaitGroup{}
	for range 16 {
		wg.Go(func() {
			for i := range 20 {
				j := newJob(10 + i)
				if i == 7 {
					j = shared
				}
				known, err := s.Accept(j)
				if err != nil {
					t.Errorf("Accept: %v", err)
					return
				}
				if known == New {
					news <- j.ID
				}
				if err := s.Finish(&wire.Result{Job: receipt.NewJobID(), Code: wire.CodeEngine}); !errors.Is(err, ErrUnknown) {
					t.Errorf("Finish of an unknown job: %v, want ErrUnknown", err)
				}
				if j == shared {
					continue
				}
				if err := s.Finish(failure(j)); err != nil {
					t.Errorf("Finish: %v", err)
				}
				if i%2 == 0 {
					if err := s.Ack([]receipt.JobID{j.ID}); err != nil {
						t.Errorf("Ack: %v", err)
					}
				}
			}
		})
	}
	wg.Wait()
	close(news)
	n := 0
	for id := range news {
		if id == shared.ID {
			n++
		}
	}
	if n != 1 {
		t.Errorf("the shared job was new %d times, want once", n)
	}
	counts(t, s, 1, 16*9, 0) // of 20: one shared, ten acknowledged
	reopen(t, s)
}

func TestAClosedStoreRefuses(t *testing.T) {
	s := open(t, newPath(t))
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Accept(newJob(1)); err == nil {
		t.Error("Accept on a closed store")
	}
	if _, err := s.Unfinished(); err == nil {
		t.Error("Unfinished on a closed store")
	}
}

func BenchmarkAcceptFinishAck(b *testing.B) {
	for _, writers := range []int{1, 8, 64} {
		b.Run(fmt.Sprintf("writers=%d", writers), func(b *testing.B) {
			s := open(b, newPath(b))
			j := newJob(2048)
			r := success(b, j, 1024)
			b.SetParallelism(writers)
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					j, r := *j, *r
					j.ID = receipt.NewJobID()
					r.Job = j.ID
					if _, err := s.Accept(&j); err != nil {
						b.Fatal(err)
					}
					if err := s.Finish(&r); err != nil {
						b.Fatal(err)
					}
					if err := s.Ack([]receipt.JobID{j.ID}); err != nil {
						b.Fatal(err)
					}
				}
			})
		})
	}
}

// The index is what a store holds in memory, and what a start reads: 10,000
// results of 8 KiB and 100,000 settled ids.
func BenchmarkOpen(b *testing.B) {
	path := newPath(b)
	bounds := Bounds{IDs: 100_000}
	s := openBounded(b, path, bounds, now)
	j, r := newJob(10), &wire.Result{}
	fill := func(n, size int, acked bool) {
		for range n / 100 {
			var wg sync.WaitGroup
			for range 4 {
				wg.Go(func() {
					for range 25 {
						j, r := *j, *r
						j.ID, r.Response = receipt.NewJobID(), make([]byte, size)
						r.Job = j.ID
						if _, err := s.Accept(&j); err != nil {
							b.Error(err)
						}
						if err := s.Finish(&r); err != nil {
							b.Error(err)
						}
						if acked {
							if err := s.Ack([]receipt.JobID{j.ID}); err != nil {
								b.Error(err)
							}
						}
					}
				})
			}
			wg.Wait()
		}
	}
	fill(100_000, 10, true)
	fill(10_000, 8<<10, false)
	if err := s.Close(); err != nil {
		b.Fatal(err)
	}
	var before, after runtime.MemStats
	s.jobs, s.outbox, s.settled = nil, queue{}, queue{} // its cleanup holds it
	runtime.GC()
	runtime.ReadMemStats(&before)
	for b.Loop() {
		var err error
		if s, err = Open(path, bounds, now); err != nil { // without a cleanup, which would hold it
			b.Fatal(err)
		}
		b.StopTimer()
		runtime.GC()
		runtime.ReadMemStats(&after)
		if err := s.Close(); err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
	}
	if c := s.Counts(); c.Results != 10_000 || c.Settled != 100_000 {
		b.Fatalf("Counts = %+v", c)
	}
	b.ReportMetric(float64(after.HeapAlloc-before.HeapAlloc)/110_000, "B/job")
}
