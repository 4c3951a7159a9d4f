package store

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/evm"
	"github.com/resultity/node/internal/receipt"
	"github.com/resultity/node/internal/wire"
)

func TestMain(m *testing.M) {
	before := runtime.NumGoroutine()
	code := m.Run()
	if f := flag.Lookup("test.fuzz"); f.Value.String() != "" {
		os.Exit(code) // package testing leaves one of its own
	}
	for end := time.Now().Add(time.Minute); code == 0 && runtime.NumGoroutine() > before; runtime.Gosched() {
		if time.Now().After(end) {
			buf := make([]byte, 1<<20)
			_, _ = os.Stderr.Write(buf[:runtime.Stack(buf, true)])
			_, _ = os.Stderr.WriteString("goroutines were left behind\n")
			code = 1
		}
	}
	os.Exit(code)
}

func open(t testing.TB, dir string) *Store {
	t.Helper()
	s, err := Open(t.Context(), dir, slog.New(slog.NewTextHandler(t.Output(), nil)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return s
}

func reopen(t testing.TB, s *Store, dir string) *Store {
	t.Helper()
	s.Close()
	return open(t, dir)
}

func noBad(t testing.TB) func(uint64, error) {
	return func(seq uint64, err error) { t.Errorf("job %d: %v", seq, err) }
}

func put(t testing.TB, s *Store, request []byte) *Job {
	t.Helper()
	j := &Job{Client: "alice", Job: wire.Job{ID: receipt.NewJobID(), Model: "m", Kind: wire.KindChat, Request: request, Config: digest.Of([]byte("c"))}}
	if err := s.PutJob(t.Context(), j); err != nil {
		t.Fatal(err)
	}
	return j
}

// ids lists what is in the store, without the side effects of Jobs.
func ids(t testing.TB, s *Store) (list []receipt.JobID) {
	t.Helper()
	for seq := uint64(1); ; seq++ {
		m, err := s.now.Load().jobs.GetMsg(t.Context(), seq, jetstream.WithGetMsgSubject("jobs.*"))
		if errors.Is(err, jetstream.ErrMsgNotFound) {
			return list
		}
		if err != nil {
			t.Fatal(err)
		}
		seq = m.Sequence
		id, err := receipt.ParseJobID(m.Subject[len("jobs."):])
		if err != nil {
			t.Fatal(err)
		}
		list = append(list, id)
	}
}

func TestJobs(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	var jobs []*Job
	for i := range 5 {
		jobs = append(jobs, put(t, s, fmt.Appendf(nil, "request %d", i)))
	}
	if err := s.PutJob(t.Context(), &Job{Job: jobs[0].Job}); err == nil {
		t.Error("the same id twice")
	}
	s = reopen(t, s, dir)
	got, err := s.Jobs(t.Context(), noBad(t))
	if err != nil || len(got) != 5 {
		t.Fatalf("%d jobs, %v", len(got), err)
	}
	for i, j := range got {
		want, _ := json.Marshal(jobs[i])
		have, _ := json.Marshal(j)
		if !bytes.Equal(want, have) || j.Seq != jobs[i].Seq {
			t.Errorf("job %d: %s, want %s", i, have, want)
		}
	}
	// Deleted at once, in any order, twice.
	for _, i := range []int{3, 0, 3} {
		if err := s.DeleteJob(t.Context(), jobs[i].Seq); err != nil {
			t.Errorf("delete %d: %v", i, err)
		}
	}
	s = reopen(t, s, dir)
	if got := ids(t, s); !slices.Equal(got, []receipt.JobID{jobs[1].ID, jobs[2].ID, jobs[4].ID}) {
		t.Errorf("left are %v", got)
	}
}

// Finished jobs are swept; one that is not keeps its place, whatever is
// finished around it.
func TestSweep(t *testing.T) {
	s := open(t, t.TempDir())
	var jobs []*Job
	for range 6 {
		jobs = append(jobs, put(t, s, []byte("x")))
	}
	for _, i := range []int{0, 1, 3, 5} {
		s.JobDone(jobs[i].Seq)
	}
	if err := s.sweep(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := ids(t, s); !slices.Equal(got, []receipt.JobID{jobs[2].ID, jobs[3].ID, jobs[4].ID, jobs[5].ID}) {
		t.Fatalf("left are %v", got)
	}
	s.JobDone(jobs[2].Seq)
	s.JobDone(jobs[4].Seq)
	// Nothing is left to do for Run but this.
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := s.Run(ctx, slog.New(slog.DiscardHandler), nil); err != nil {
		t.Fatal(err)
	}
	if got := ids(t, s); got != nil {
		t.Fatalf("left are %v", got)
	}
	if n := len(s.pending.open) + len(s.pending.done) + len(s.pending.writing); n != 0 {
		t.Errorf("%d numbers are remembered", n)
	}
}

// A job that is stored, but whose writer does not know yet, is not swept away
// by a later one that is finished already.
func TestSweepSparesWhatIsBeingWritten(t *testing.T) {
	p := pending{open: map[uint64]int{}, done: map[uint64]int{}, writing: map[*uint64]struct{}{}}
	p.begin()(7, 1)
	slow := p.begin() // will get 8
	p.begin()(9, 5)
	for _, seq := range []uint64{7, 9} {
		delete(p.open, seq)
		p.done[seq] = int(seq)
	}
	if below, above, size := p.settled(); !slices.Equal(below, []uint64{7}) || !slices.Equal(above, []uint64{9}) || size != 9 {
		t.Fatalf("below %v, above %v of %d bytes", below, above, size)
	}
	slow(8, 1)
	if below, _, _ := p.settled(); !slices.Equal(below, []uint64{7}) {
		t.Fatalf("below %v", below)
	}
	p.forget(8)
	if below, _, _ := p.settled(); len(below) != 2 {
		t.Fatalf("below %v", below)
	}
	failed := p.begin()
	failed(0, 0)
	if len(p.writing) != 0 {
		t.Fatal("a failed write is remembered")
	}
}

func signed(t testing.TB, id receipt.JobID) *receipt.Signed {
	t.Helper()
	k, err := evm.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	d := digest.Of([]byte("x"))
	r := receipt.Receipt{Job: id, Node: k.Address(), Measured: receipt.Measured{ConfigDigest: d, ImageDigest: d, ModelDigest: d, SandboxDigest: d, RequestHash: d, ResponseHash: d}, Claimed: receipt.Claimed{ClassDigest: d}}
	s, err := r.Sign(1, k)
	if err != nil {
		t.Fatal(err)
	}
	return &s
}

// The first result of a job stays, whoever is how fast.
func TestResults(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	id := receipt.NewJobID()
	if _, err := s.Result(t.Context(), id); !errors.Is(err, ErrNotFound) {
		t.Fatalf("got %v", err)
	}
	var wg sync.WaitGroup
	errs := make([]error, 8)
	for i := range errs {
		r := signed(t, id)
		wg.Go(func() { errs[i] = s.PutResult(t.Context(), r, digest.Digest{}, []byte{byte(i)}) })
	}
	wg.Wait()
	winner := -1
	for i, err := range errs {
		switch {
		case err == nil && winner < 0:
			winner = i
		case !errors.Is(err, ErrExists):
			t.Errorf("%d: %v", i, err)
		}
	}
	if winner < 0 {
		t.Fatal("nobody won")
	}
	s = reopen(t, s, dir)
	got, err := s.Result(t.Context(), id)
	if err != nil || !bytes.Equal(got.Response, []byte{byte(winner)}) || got.Receipt.Receipt().Job != id {
		t.Fatalf("%+v, %v", got, err)
	}
}

// The largest response and request that a configuration may allow fit.
func TestLargest(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	big := bytes.Repeat([]byte("x"), 16<<20)
	j := put(t, s, big)
	if err := s.PutResult(t.Context(), signed(t, j.ID), digest.Digest{}, big); err != nil {
		t.Fatal(err)
	}
	s = reopen(t, s, dir)
	if got, err := s.Result(t.Context(), j.ID); err != nil || !bytes.Equal(got.Response, big) {
		t.Fatalf("result: %v", err)
	}
	jobs, err := s.Jobs(t.Context(), noBad(t))
	if err != nil || len(jobs) != 1 || !bytes.Equal(jobs[0].Request, big) {
		t.Fatalf("job: %v", err)
	}
}

// Jobs beyond their limit are refused until others have gone, which finished ones
// do before they take all the room.
func TestJobLimit(t *testing.T) {
	s := open(t, t.TempDir())
	if _, err := s.SetLimits(t.Context(), Limits{Jobs: 64 << 10, Results: 1 << 20}); err != nil {
		t.Fatal(err)
	}
	first := put(t, s, bytes.Repeat([]byte("x"), 12<<10))
	second := put(t, s, bytes.Repeat([]byte("x"), 24<<10))
	j := *second
	j.ID = receipt.NewJobID()
	if err := s.PutJob(t.Context(), &j); !errors.Is(err, ErrFull) {
		t.Fatalf("got %v, want ErrFull", err)
	}
	s.JobDone(second.Seq) // and the first one is not
	if err := s.sweep(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := s.PutJob(t.Context(), &j); err != nil {
		t.Fatal(err)
	}
	if got := ids(t, s); !slices.Equal(got, []receipt.JobID{first.ID, j.ID}) {
		t.Fatalf("left are %v", got)
	}
}

// Results beyond their limit push out the oldest, which is said.
func TestResultLimit(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	if err := s.SetResultTTL(t.Context(), time.Hour); err != nil {
		t.Fatal(err)
	}
	want := Limits{Jobs: 1 << 20, Results: 100 << 10}
	if got, err := s.SetLimits(t.Context(), want); err != nil || got != want {
		t.Fatalf("%+v %v", got, err)
	}
	s = reopen(t, s, dir) // which keeps the limits
	var seen oldest
	look := func(want uint64) {
		t.Helper()
		if n, err := s.discarded(t.Context(), &seen); err != nil || n != want {
			t.Fatalf("discarded %d, want %d: %v", n, want, err)
		}
	}
	look(0)
	list := make([]receipt.JobID, 5)
	for i := range list {
		list[i] = receipt.NewJobID()
		if err := s.PutResult(t.Context(), signed(t, list[i]), digest.Digest{}, make([]byte, 30<<10)); err != nil {
			t.Fatal(err)
		}
		if i == 2 {
			look(0)
		}
	}
	look(2)
	look(0)
	for i, id := range list {
		if _, err := s.Result(t.Context(), id); (err == nil) != (i >= 2) {
			t.Errorf("result %d: %v", i, err)
		}
	}
	// What is older than it may become goes without a word.
	seen.at = time.Now().Add(-2 * time.Hour)
	if err := s.PutResult(t.Context(), signed(t, receipt.NewJobID()), digest.Digest{}, make([]byte, 30<<10)); err != nil {
		t.Fatal(err)
	}
	look(0)
}

// Nothing may take more room than there is, whatever is asked for.
func TestLimitsOfTheFileSystem(t *testing.T) {
	s := open(t, t.TempDir())
	got, err := s.SetLimits(t.Context(), Limits{Jobs: 1 << 60, Results: 1 << 60})
	if err != nil || got != (Limits{Jobs: s.space / 8, Results: s.space / 2}) {
		t.Fatalf("%+v of %d: %v", got, s.space, err)
	}
	if n := s.now.Load().logs.CachedInfo().Config.MaxBytes; n < 1 || n > s.space/8 {
		t.Errorf("logs may take %d bytes of %d", n, s.space)
	}
}

func TestResultTTL(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	for _, ttl := range []time.Duration{time.Hour, 2 * time.Hour, 2 * time.Hour} {
		if err := s.SetResultTTL(t.Context(), ttl); err != nil {
			t.Fatal(err)
		}
	}
	s = reopen(t, s, dir)
	if got := s.now.Load().results.CachedInfo().Config.MaxAge; got != 2*time.Hour {
		t.Errorf("results are kept for %v", got)
	}
}

func TestDecodeResult(t *testing.T) {
	r := signed(t, receipt.NewJobID())
	good, err := encodeResult(r, receipt.Unknown, []byte("response"))
	if err != nil {
		t.Fatal(err)
	}
	for i := range good[:len(good)-len("response")] {
		if _, err := decodeResult(good[:i]); err == nil {
			t.Errorf("cut after %d bytes: no error", i)
		}
	}
	if r, err := decodeResult(good); err != nil || r.Said != receipt.Unknown || string(r.Response) != "response" {
		t.Errorf("%+v, %v", r, err)
	}
	bad := bytes.Clone(good)
	bad[0] = 0xff
	if _, err := decodeResult(bad); err == nil {
		t.Error("absurd length: no error")
	}
}

func TestOneProcess(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	if _, err := Open(t.Context(), dir, slog.New(slog.DiscardHandler)); !errors.Is(err, ErrLocked) {
		t.Fatalf("got %v", err)
	}
	if err := s.Accepting(); err != nil {
		t.Error(err)
	}
	s.Close()
	open(t, dir)
}

func node(n byte) Node { return Node{Address: evm.Address{n}, Agent: "test"} }

func TestTokens(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	now := time.Now()
	token, err := s.CreateToken(t.Context(), Token{Uses: 2, Account: "acme", Expires: now.Add(time.Hour).UnixMilli()})
	if err != nil {
		t.Fatal(err)
	}
	first, err := s.Register(t.Context(), node(1), token, now)
	if err != nil || first.Account != "acme" || first.Registered != now.UnixMilli() {
		t.Fatalf("%+v %v", first, err)
	}
	s = reopen(t, s, dir)
	again, err := s.Register(t.Context(), node(1), "", now.Add(time.Hour))
	if err != nil || !reflect.DeepEqual(again, first) {
		t.Fatalf("%+v %v", again, err)
	}
	if _, err := s.Register(t.Context(), node(2), token, now.Add(2*time.Hour)); !errors.Is(err, ErrToken) {
		t.Errorf("expired: %v", err)
	}
	if _, err := s.Register(t.Context(), node(2), "rt-unknown", now); !errors.Is(err, ErrToken) {
		t.Errorf("unknown: %v", err)
	}
	// A crash after the use was taken and before the node was made.
	if _, err := s.use(t.Context(), token, evm.Address{2}, now); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Register(t.Context(), node(3), token, now); !errors.Is(err, ErrToken) {
		t.Errorf("used up: %v", err)
	}
	if _, err := s.Register(t.Context(), node(2), token, now); err != nil {
		t.Errorf("the node that has its use: %v", err)
	}
	nodes, err := s.Nodes(t.Context())
	if err != nil || len(nodes) != 2 || nodes[0].Address != (evm.Address{1}) || nodes[1].Address != (evm.Address{2}) {
		t.Errorf("%+v %v", nodes, err)
	}
}

func TestConfigs(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	raw := []byte(`{"schema":1}`)
	first, err := s.PutConfig(t.Context(), raw)
	if err != nil {
		t.Fatal(err)
	}
	s = reopen(t, s, dir)
	again, err := s.PutConfig(t.Context(), raw)
	if err != nil || !again.Equal(first) {
		t.Errorf("first put at %v, then %v; %v", first, again, err)
	}
	if got, err := s.Config(t.Context(), digest.Of(raw)); err != nil || !bytes.Equal(got, raw) {
		t.Errorf("%s %v", got, err)
	}
	if _, err := s.Config(t.Context(), digest.Of([]byte("x"))); !errors.Is(err, ErrNotFound) {
		t.Errorf("got %v", err)
	}
}

func TestAPIKeys(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	var keys []string
	for _, name := range []string{"alice", "alice", "bob"} {
		k, err := s.CreateAPIKey(t.Context(), name, time.Now())
		if err != nil {
			t.Fatal(err)
		}
		keys = append(keys, k)
	}
	check := func(want ...string) {
		t.Helper()
		for i, name := range want {
			if c, ok := s.Client(keys[i]); c.Name != name || ok != (name != "") {
				t.Errorf("key %d is %q's, want %q", i, c.Name, name)
			}
		}
	}
	check("alice", "alice", "bob")
	if n, err := s.RevokeAPIKeys(t.Context(), "alice"); n != 2 || err != nil {
		t.Errorf("revoked %d, %v", n, err)
	}
	check("", "", "bob")
	s = reopen(t, s, dir)
	check("", "", "bob")
	if _, ok := s.Client(""); ok {
		t.Error("the empty key is somebody's")
	}
}

func TestNames(t *testing.T) {
	s := open(t, t.TempDir())
	expires := time.Now().Add(time.Hour).UnixMilli()
	for _, name := range []string{"a", "Acme-2.eu_x", "ann@example.org", "team:1", "0x12"} {
		_, err := s.CreateAPIKey(t.Context(), name, time.Now())
		_, other := s.CreateToken(t.Context(), Token{Uses: 1, Account: name, Expires: expires})
		if err != nil || other != nil {
			t.Errorf("%q: %v %v", name, err, other)
		}
	}
	for _, name := range []string{"", ".", "..", "../x", "a/b", "a b", "-x", "é", "a\n", "a\x00", "a%2f", strings.Repeat("x", 129)} {
		_, err := s.CreateAPIKey(t.Context(), name, time.Now())
		_, other := s.CreateToken(t.Context(), Token{Uses: 1, Account: name, Expires: expires})
		if err == nil || other == nil {
			t.Errorf("%q is taken: %v %v", name, err, other)
		}
	}
}

// A disk that takes its time with a revocation holds up no request.
func TestRevocationHoldsNobodyUp(t *testing.T) {
	s := open(t, t.TempDir())
	var keys [2]string
	for i, name := range []string{"alice", "bob"} {
		var err error
		if keys[i], err = s.CreateAPIKey(t.Context(), name, time.Now()); err != nil {
			t.Fatal(err)
		}
	}
	d := s.now.Load()
	slow := &slowKeys{KeyValue: d.keys, asked: make(chan struct{}), answer: make(chan struct{})}
	d.keys = slow
	done := make(chan error)
	go func() { _, err := s.RevokeAPIKeys(t.Context(), "alice"); done <- err }()
	<-slow.asked
	if _, ok := s.Client(keys[1]); !ok {
		t.Error("another's key is not known meanwhile")
	}
	close(slow.answer)
	if err := <-done; err != nil {
		t.Error(err)
	}
	if _, ok := s.Client(keys[0]); ok {
		t.Error("the key is still known")
	}
}

// slowKeys deletes when it is told to.
type slowKeys struct {
	jetstream.KeyValue
	asked, answer chan struct{}
}

func (k *slowKeys) Delete(ctx context.Context, key string, opts ...jetstream.KVDeleteOpt) error {
	close(k.asked)
	<-k.answer
	return k.KeyValue.Delete(ctx, key, opts...)
}

// A record that is not a job does not stop the service from starting.
func TestUnreadableJob(t *testing.T) {
	s := open(t, t.TempDir())
	put(t, s, []byte("x"))
	if _, err := s.now.Load().js.Publish(t.Context(), "jobs.broken", []byte("{")); err != nil {
		t.Fatal(err)
	}
	put(t, s, []byte("y"))
	bad := 0
	jobs, err := s.Jobs(t.Context(), func(uint64, error) { bad++ })
	if err != nil || len(jobs) != 2 || bad != 1 {
		t.Errorf("%d jobs, %d bad, %v", len(jobs), bad, err)
	}
}

func TestLockFileMode(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "store")
	open(t, dir)
	if st, err := os.Stat(dir); err != nil || st.Mode().Perm() != 0o700 {
		t.Errorf("%v %v", st.Mode(), err)
	}
}

// fullDisk has the next file of a stream be a disk without room, and returns how to
// make room again.
func fullDisk(t testing.TB, dir, stream, file string) (room func()) {
	t.Helper()
	next := filepath.Join(dir, "jetstream", "$G", "streams", stream, "msgs", file)
	if err := os.Symlink("/dev/full", next); err != nil {
		t.Fatal(err)
	}
	return func() {
		if err := os.Remove(next); err != nil {
			t.Fatal(err)
		}
	}
}

// A full disk: JetStream gives up the stream without an answer. The store says
// so at once, and goes on by itself when there is room, with all that was
// acknowledged and nothing else.
func TestDiskFull(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	put(t, s, []byte("first"))
	room := fullDisk(t, dir, "JOBS", "2.blk")
	big := bytes.Repeat([]byte("x"), 3<<20)
	written := 1
	for {
		j := &Job{Job: wire.Job{ID: receipt.NewJobID(), Model: "m", Request: big}}
		err := s.PutJob(t.Context(), j)
		if err == nil {
			if written++; written > 10 {
				t.Fatal("the disk is not full")
			}
			continue
		}
		if !errors.Is(err, ErrFailed) || errors.Is(err, context.DeadlineExceeded) {
			t.Fatal(err)
		}
		break
	}
	if got, err := s.Jobs(t.Context(), noBad(t)); err != nil || len(got) != written {
		t.Errorf("while nothing can be written %d jobs can be read, of %d: %v", len(got), written, err)
	}
	var low atomic.Bool // as it is when a disk is full
	low.Store(true)
	free := s.room.free
	s.room.free = func(dir string) (int64, error) {
		if low.Load() {
			return 0, nil
		}
		return free(dir)
	}
	s.guard(t.Context())
	if st := s.State(); !errors.Is(st.Err, ErrNoRoom) || st.Free != 0 || st.Reopened != 0 {
		t.Errorf("without room: %+v", st)
	}
	room()
	low.Store(false)
	s.guard(t.Context())
	if st := s.State(); st.Err != nil || st.Free == 0 || st.Reopened != 1 {
		t.Fatalf("with room: %+v", st)
	}
	if got := ids(t, s); len(got) != written {
		t.Errorf("%d of %d jobs are left", len(got), written)
	}
	put(t, s, []byte("again"))
	if err := s.sweep(t.Context()); err != nil {
		t.Error(err)
	}
	if got := ids(t, s); len(got) != written+1 {
		t.Errorf("%d jobs, want %d", len(got), written+1)
	}
}

// A disk that takes no writes although it has room, such as a broken one, is tried
// again, ever less often.
func TestBrokenDisk(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	first := s.now.Load()
	for range len(reopenDelays) {
		s.now.Load().fail(ErrFailed)
		s.guard(t.Context())
		if s.room.retries < len(reopenDelays) {
			s.room.reopened = time.Now().Add(-calm / 2)
		}
	}
	if st := s.State(); st.Err != nil || st.Reopened != len(reopenDelays) || s.now.Load() == first {
		t.Fatalf("%+v", st)
	}
	last := s.now.Load()
	last.fail(ErrFailed)
	s.guard(t.Context())
	if st := s.State(); !errors.Is(st.Err, ErrFailed) || s.now.Load() != last {
		t.Errorf("opened anew without a pause: %+v", st)
	}
	s.room.reopened = time.Now().Add(-reopenDelays[len(reopenDelays)-1])
	s.guard(t.Context())
	if st := s.State(); st.Err != nil || s.now.Load() == last {
		t.Errorf("not opened anew: %+v", st)
	}
}

// With little room only what is needed is written, with less nothing.
func TestLittleRoom(t *testing.T) {
	s := open(t, t.TempDir())
	var free int64
	s.room.free = func(string) (int64, error) { return free, nil }
	jobs, writes := s.room.limit()
	j := func() error {
		return s.PutJob(t.Context(), &Job{Job: wire.Job{ID: receipt.NewJobID(), Request: []byte("x")}})
	}
	order := func() error {
		return s.PutOrder(t.Context(), &Order{Directive: wire.Directive{ID: wire.OrderID{1}}})
	}
	for _, tc := range []struct {
		free       int64
		job, order error
		state      error
	}{
		{jobs + 4096, nil, nil, nil},
		{jobs - 1, ErrNoRoom, nil, ErrNoRoom},
		{jobs + 4096, nil, nil, ErrNoRoom}, // not to and fro
		{jobs + jobs/4, nil, nil, nil},
		{writes + 4096, ErrNoRoom, nil, ErrNoRoom},
		{writes - 1, ErrNoRoom, ErrNoRoom, ErrNoRoom},
		{2 * jobs, nil, nil, nil},
	} {
		free = tc.free
		s.guard(t.Context())
		if err := j(); !errors.Is(err, tc.job) {
			t.Errorf("%d free: job: %v", free, err)
		}
		if err := order(); !errors.Is(err, tc.order) {
			t.Errorf("%d free: order: %v", free, err)
		}
		if err := s.Accepting(); !errors.Is(err, tc.state) {
			t.Errorf("%d free: state: %v", free, err)
		}
	}
	if st := s.State(); st.Reopened != 0 {
		t.Errorf("opened anew %d times", st.Reopened)
	}
	full := errors.New("no answer")
	s.room.free = func(string) (int64, error) { return 0, full }
	if err := order(); !errors.Is(err, full) {
		t.Errorf("nothing known of the disk: %v", err)
	}
}

// The store opens on a disk without room, and says what there is.
func TestOpenOnFullDisk(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	j := put(t, s, []byte("x"))
	s.Close()
	for _, name := range []string{"JOBS", "RESULTS", "LOGS", "KV_NODES", "KV_ORDERS"} {
		meta := filepath.Join(dir, "jetstream", "$G", "streams", name, "meta.inf")
		before, err := os.Stat(meta)
		if err != nil {
			t.Fatal(err)
		}
		defer func() {
			if after, err := os.Stat(meta); err != nil || after.ModTime() != before.ModTime() {
				t.Errorf("%s was written: %v", name, err)
			}
		}()
	}
	s = open(t, dir)
	if got := ids(t, s); !slices.Equal(got, []receipt.JobID{j.ID}) {
		t.Errorf("%v", got)
	}
}

// A job of which nobody knows whether it was written is deleted, whether its
// deletion is cut in two or not.
func TestJobInDoubt(t *testing.T) {
	for _, cut := range []bool{false, true} {
		dir := t.TempDir()
		s := open(t, dir)
		other, j := put(t, s, []byte("other")), put(t, s, []byte("x"))
		s.pending.forget(j.Seq)
		s.pending.doubt(j.ID) // it was written, and its acknowledgement did not come
		if cut {
			if _, err := s.now.Load().js.Publish(t.Context(), "jobs."+j.ID.String(), nil); err != nil {
				t.Fatal(err)
			}
			s = reopen(t, s, dir)
			if got, err := s.Jobs(t.Context(), noBad(t)); err != nil || len(got) != 1 || got[0].ID != other.ID {
				t.Fatalf("%d jobs: %v", len(got), err)
			}
		}
		for range 2 {
			if err := s.sweep(t.Context()); err != nil {
				t.Fatal(err)
			}
			if got := ids(t, s); !slices.Equal(got, []receipt.JobID{other.ID}) {
				t.Errorf("cut %v: left are %v", cut, got)
			}
		}
	}
}

// A job in doubt needs room to be deleted, and does not keep finished ones from
// making it.
func TestJobInDoubtWithoutRoom(t *testing.T) {
	s := open(t, t.TempDir())
	if _, err := s.SetLimits(t.Context(), Limits{Jobs: 64 << 10, Results: 1 << 20}); err != nil {
		t.Fatal(err)
	}
	j := put(t, s, bytes.Repeat([]byte("x"), 40<<10))
	if _, err := s.SetLimits(t.Context(), Limits{Jobs: 32 << 10, Results: 1 << 20}); err != nil {
		t.Fatal(err)
	}
	s.pending.doubt(receipt.NewJobID())
	if err := s.sweep(t.Context()); err == nil {
		t.Fatal("there was room")
	}
	s.JobDone(j.Seq)
	if err := s.sweep(t.Context()); err != nil {
		t.Error(err)
	}
	if got := ids(t, s); got != nil || len(s.pending.void) != 0 {
		t.Errorf("left are %v, in doubt %v", got, s.pending.void)
	}
}

// What waits for the acknowledgement of a job is in doubt, what was refused is not.
func TestDoubt(t *testing.T) {
	s := open(t, t.TempDir())
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	j := &Job{Job: wire.Job{ID: receipt.NewJobID()}}
	if err := s.PutJob(ctx, j); err == nil || !slices.Equal(s.pending.void, []receipt.JobID{j.ID}) {
		t.Errorf("%v, in doubt are %v", err, s.pending.void)
	}
	j = put(t, s, []byte("x"))
	if err := s.PutJob(t.Context(), &Job{Job: j.Job}); err == nil || len(s.pending.void) != 1 {
		t.Errorf("%v, in doubt are %v", err, s.pending.void)
	}
}

// A store that was moved to a smaller disk has smaller bounds.
func TestSmallerDisk(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	s.space = 8 << 20
	if _, err := s.SetLimits(t.Context(), DefaultLimits); err != nil {
		t.Fatal(err)
	}
	s.now.Load().close()
	d, err := s.start(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	s.now.Store(d)
	s.space = 1 << 20
	if got, err := s.SetLimits(t.Context(), DefaultLimits); err != nil || got.Results != 1<<19 {
		t.Errorf("%+v %v", got, err)
	}
	put(t, s, []byte("x"))
}
