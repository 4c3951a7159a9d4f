package blocks

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// jet is a JetStream with one stream, in a directory that outlives it.
type jet struct {
	*Stream
	dir  string
	cfg  jetstream.StreamConfig
	srv  *server.Server
	conn *nats.Conn
	js   jetstream.JetStream
	str  jetstream.Stream
}

func newJet(t testing.TB, cfg jetstream.StreamConfig) *jet {
	t.Helper()
	dir := t.TempDir()
	cfg.Name, cfg.Subjects = "S", []string{"job.*"}
	j := &jet{dir: dir, cfg: cfg, Stream: &Stream{
		Name: "S", Dir: filepath.Join(dir, "jetstream", "$G", "streams", "S"),
		Meta: filepath.Join(dir, "meta"), Rescued: filepath.Join(dir, "rescued"), Fits: fits,
	}}
	t.Cleanup(j.stop)
	j.start(t)
	return j
}

func (j *jet) start(t testing.TB) {
	t.Helper()
	var err error
	j.srv, err = server.NewServer(&server.Options{DontListen: true, JetStream: true, StoreDir: j.dir, SyncAlways: true, NoSigs: true, NoLog: true})
	if err != nil {
		t.Fatal(err)
	}
	j.srv.Start()
	if !j.srv.ReadyForConnections(30 * time.Second) {
		t.Fatal("JetStream is not ready")
	}
	if j.conn, err = nats.Connect("", nats.InProcessServer(j.srv)); err != nil {
		t.Fatal(err)
	}
	if j.js, err = jetstream.New(j.conn, jetstream.WithDefaultTimeout(30*time.Second)); err != nil {
		t.Fatal(err)
	}
	if j.str, err = j.js.CreateOrUpdateStream(t.Context(), j.cfg); err != nil {
		t.Fatal(err)
	}
}

func (j *jet) stop() {
	if j.srv == nil {
		return
	}
	j.conn.Close()
	j.srv.Shutdown()
	j.srv.WaitForShutdown()
	j.srv = nil
}

// kill ends JetStream as a power cut does: what it writes at its end is not there.
func (j *jet) kill(t testing.TB) {
	t.Helper()
	j.stop()
	if err := os.Remove(filepath.Join(j.msgs(), indexName)); err != nil {
		t.Fatal(err)
	}
}

func (j *jet) put(t testing.TB, subject, message string) uint64 {
	t.Helper()
	ack, err := j.js.Publish(t.Context(), subject, []byte(message))
	if err != nil {
		t.Fatal(err)
	}
	return ack.Sequence
}

// has returns the messages that JetStream has, by subject.
func (j *jet) has(t testing.TB) map[string]string {
	t.Helper()
	info, err := j.str.Info(t.Context(), jetstream.WithSubjectFilter(">"))
	if err != nil {
		t.Fatal(err)
	}
	all := map[string]string{}
	for subject := range info.State.Subjects {
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		m, err := j.str.GetLastMsgForSubject(ctx, subject)
		cancel()
		if err != nil {
			t.Errorf("%s: %v", subject, err)
			continue
		}
		all[subject] = string(m.Data)
	}
	return all
}

// spoil makes two bytes of the record of a number be others, so that it cannot be
// mended.
func (j *jet) spoil(t testing.TB, seqs ...uint64) {
	t.Helper()
	list, err := j.Blocks()
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, block := range list {
		b, err := os.ReadFile(j.file(block))
		if err != nil {
			t.Fatal(err)
		}
		for i := 0; i < len(b); {
			size := int(binary.LittleEndian.Uint32(b[i:]) &^ headerBit)
			for _, seq := range seqs {
				if binary.LittleEndian.Uint64(b[i+4:]) == seq {
					b[i+size-sumSize-1] ^= 0x5a
					b[i+size-sumSize-2] ^= 0xa5
					n++
				}
			}
			i += size
		}
		if err := os.WriteFile(j.file(block), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if n != len(seqs) {
		t.Fatalf("%d of %d records were there", n, len(seqs))
	}
}

// What stands in the place of a lost record has an age: JetStream takes a block for
// expired by its first record and its last.
func TestExpireAfterMending(t *testing.T) {
	j := newJet(t, jetstream.StreamConfig{MaxAge: time.Hour})
	j.stop()
	h := newHasher("S", 1, nil)
	var b []byte
	for i, age := range []time.Duration{2 * time.Hour, time.Minute, time.Minute} {
		b = append(b, h.encode(&record{seq: uint64(i + 1), time: time.Now().Add(-age).UnixNano(), subject: fmt.Appendf(nil, "job.%02d", i), message: []byte("{}")})...)
	}
	write(t, j.Stream, b)
	j.spoil(t, 3)
	mend(t, j.Stream)
	j.start(t)
	if got := j.has(t); len(got) != 1 || got["job.01"] != "{}" {
		t.Errorf("%v", got)
	}
}

// The number of a lost record is not given again: what says that it was deleted would delete
// the next one that has it.
func TestDeletedAndLost(t *testing.T) {
	j := newJet(t, jetstream.StreamConfig{})
	j.put(t, "job.01", "{}")
	j.put(t, "job.02", "{}")
	if err := j.str.DeleteMsg(t.Context(), 2); err != nil {
		t.Fatal(err)
	}
	j.stop()
	j.spoil(t, 2)
	r := mend(t, j.Stream)
	for _, d := range r.Damage {
		if d.Kind == Lost {
			t.Errorf("a record that was deleted is said to be lost: %+v", d)
		}
	}
	j.start(t)
	if n := j.put(t, "job.03", "{}"); n != 3 {
		t.Errorf("the next one has number %d", n)
	}
	j.kill(t)
	j.start(t)
	if got := j.has(t); len(got) != 2 || got["job.03"] != "{}" {
		t.Errorf("%v", got)
	}
}

// Damage in two places of a block costs two records, whatever is in the others.
func TestTwoLost(t *testing.T) {
	s, _ := stream(t, 0)
	budget := int64(1 << 30)
	h := newHasher("S", 1, &budget)
	var b []byte
	x := uint64(1)
	const n = 900
	for i := range n {
		m := []byte("{")
		for len(m) < 8192 {
			x ^= x << 13
			x ^= x >> 7
			x ^= x << 17
			m = binary.LittleEndian.AppendUint64(m, x)
		}
		b = append(b, h.encode(&record{seq: uint64(i + 1), time: int64(i + 1), subject: fmt.Appendf(nil, "job.%02d", i%100), message: m})...)
	}
	size := len(b) / n
	for _, i := range []int{100, 300, 500, 700} {
		b[i*size+3000] ^= 0x5a
		b[i*size+5000] ^= 0x5a
		b[i*size] ^= 0x33 // its length, too
	}
	write(t, s, b)
	began := time.Now()
	r, err := s.Mend(1<<24, func(Damage) error { return nil })
	if err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(s.file(1))
	if err != nil {
		t.Fatal(err)
	}
	if want := len(b) - 4*size; len(got) < want || len(r.Damage) != 4 {
		t.Errorf("%d of %d bytes are left, damage %+v", len(got), want, r.Damage)
	}
	t.Log(time.Since(began))
}

// A block that is gone is not taken for one that never was.
func TestGoneBlock(t *testing.T) {
	for _, copied := range []bool{false, true} {
		j := newJet(t, jetstream.StreamConfig{MaxMsgsPerSubject: 1})
		j.Single, j.Spare = true, filepath.Join(j.dir, "spare")
		j.put(t, "job.01", `{"a":1}`)
		j.put(t, "job.02", `{"a":2}`)
		if copied {
			if err := j.Copy(); err != nil {
				t.Fatal(err)
			}
		}
		j.put(t, "job.03", `{"a":3}`)
		j.stop()
		if err := os.Remove(j.file(1)); err != nil {
			t.Fatal(err)
		}
		r := mend(t, j.Stream)
		kinds := map[string]Kind{}
		for _, d := range r.Damage {
			kinds[d.Subject] = d.Kind
		}
		want := Lost
		if copied {
			want = Restored
		}
		if len(kinds) != 3 || kinds["job.01"] != want || kinds["job.02"] != want || kinds["job.03"] != Lost {
			t.Errorf("copied %v: %v", copied, kinds)
		}
		j.start(t)
		if got := j.has(t); copied && (got["job.01"] != `{"a":1}` || got["job.02"] != `{"a":2}`) {
			t.Errorf("%v", got)
		}
		if n := j.put(t, "job.04", "{}"); n < 4 {
			t.Errorf("number %d is given again", n)
		}
		j.stop()
		if r := mend(t, j.Stream); len(r.Damage) != 0 {
			t.Errorf("again: %+v", r.Damage)
		}
	}
}

// A sector takes several records with it, of which one only has its name left.
func TestSector(t *testing.T) {
	j := newJet(t, jetstream.StreamConfig{MaxMsgsPerSubject: 1})
	j.Single, j.Spare = true, filepath.Join(j.dir, "spare")
	for i := range 5 {
		j.put(t, fmt.Sprintf("job.%02d", i), fmt.Sprintf(`{"a":%d}`, i))
	}
	j.stop()
	b, err := os.ReadFile(j.file(1))
	if err != nil {
		t.Fatal(err)
	}
	size := len(b) / 5
	clear(b[size+size/2+4 : 4*size-3])
	if err := os.WriteFile(j.file(1), b, 0o600); err != nil {
		t.Fatal(err)
	}
	r := mend(t, j.Stream)
	kinds := map[string]Kind{}
	for _, d := range r.Damage {
		kinds[d.Subject] = d.Kind
	}
	for i := 1; i <= 3; i++ {
		if kind, ok := kinds[fmt.Sprintf("job.%02d", i)]; !ok || kind != Lost {
			t.Errorf("job.%02d is not said to be lost: %v", i, kinds)
		}
	}
	j.start(t)
	if got := j.has(t); len(got) != 2 {
		t.Errorf("%v", got)
	}
}

// The message before one that is lost is not taken for the last one of its subject, and kept
// elsewhere.
func TestOlderThanLost(t *testing.T) {
	j := newJet(t, jetstream.StreamConfig{MaxMsgsPerSubject: 1})
	j.Single, j.Closed = true, true
	for i, m := range []string{"01 old", "02", "03", "01 new", "04"} {
		j.put(t, "job."+m[:2], fmt.Sprintf(`{"m":"%s","i":%d}`, m, i))
	}
	j.stop()
	b, err := os.ReadFile(j.file(1))
	if err != nil {
		t.Fatal(err)
	}
	chunks := j.parse(b, newHasher("S", 1, nil), false, 0, false)
	clear(b[chunks[2].from+4 : chunks[3].to-1])
	if err := os.WriteFile(j.file(1), b, 0o600); err != nil {
		t.Fatal(err)
	}
	older := map[string]string{}
	if _, err := j.Mend(1<<24, func(d Damage) error { older[d.Kind.String()+" "+d.Subject] = string(d.Older); return nil }); err != nil {
		t.Fatal(err)
	}
	if _, ok := older["lost job.03"]; !ok || !strings.Contains(older["lost job.01"], "01 old") {
		t.Errorf("%q", older)
	}
	j.start(t)
	if got := j.has(t); len(got) != 2 || got["job.01"] != "" {
		t.Errorf("%v", got)
	}
}

// What was deleted does not come back from a copy.
func TestCopyOfWhatIsGone(t *testing.T) {
	j := newJet(t, jetstream.StreamConfig{MaxMsgsPerSubject: 1})
	j.Single, j.Spare = true, filepath.Join(j.dir, "spare")
	j.put(t, "job.01", `{"a":1}`)
	if err := j.Copy(); err != nil {
		t.Fatal(err)
	}
	if err := j.str.Purge(t.Context()); err != nil {
		t.Fatal(err)
	}
	j.put(t, "job.02", `{"a":2}`)
	j.stop()
	if r := mend(t, j.Stream); len(r.Damage) != 0 {
		t.Errorf("%+v", r.Damage)
	}
	j.start(t)
	if got := j.has(t); len(got) != 1 {
		t.Errorf("%v", got)
	}
}

// What a stop cut off is no loss; what a stream that was closed lacks at its end is one.
func TestCutOrLost(t *testing.T) {
	j := newJet(t, jetstream.StreamConfig{})
	for i := range 3 {
		j.put(t, fmt.Sprintf("job.%02d", i), `{"a":1}`)
	}
	j.stop()
	b, err := os.ReadFile(j.file(1))
	if err != nil {
		t.Fatal(err)
	}
	index, err := os.ReadFile(filepath.Join(j.msgs(), indexName))
	if err != nil {
		t.Fatal(err)
	}
	for _, known := range []bool{true, false} {
		c := bytes.Clone(b)
		at := len(c) / 3 * 2
		c[at+1] ^= 0x02 // its length is beyond the end
		c[at+30] ^= 0x11
		if err := os.WriteFile(j.file(1), c, 0o600); err != nil {
			t.Fatal(err)
		}
		want := Cut
		if known {
			want = Lost
			if err := os.WriteFile(filepath.Join(j.msgs(), indexName), index, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		r, err := j.Mend(1<<24, func(Damage) error { return nil })
		if err != nil || len(r.Damage) != 1 || r.Damage[0].Kind != want {
			t.Errorf("index %v: %+v %v", known, r.Damage, err)
		}
	}
}

// A stream of which the configuration cannot be mended has its messages all the same.
func TestLostConfiguration(t *testing.T) {
	for _, gone := range []string{"meta.inf", "meta.sum", "both", "zeros"} {
		j := newJet(t, jetstream.StreamConfig{})
		j.put(t, "job.01", "{}")
		j.stop()
		var err error
		switch name := filepath.Join(j.Dir, gone); gone {
		case "both":
			err = errors.Join(os.Remove(filepath.Join(j.Dir, "meta.inf")), os.Remove(filepath.Join(j.Dir, "meta.sum")))
		case "zeros":
			err = errors.Join(os.WriteFile(filepath.Join(j.Dir, "meta.inf"), make([]byte, 400), 0o600), os.WriteFile(filepath.Join(j.Dir, "meta.sum"), make([]byte, 16), 0o600))
		default:
			err = os.Remove(name)
		}
		if err != nil {
			t.Fatal(err)
		}
		done, err := j.MendMeta()
		if done == "" || err != nil {
			t.Errorf("%s: %q %v", gone, done, err)
		}
		j.start(t)
		if got := j.has(t); len(got) != 1 {
			t.Errorf("%s: %v", gone, got)
		}
		j.stop()
		if done, err := j.MendMeta(); done != "" || err != nil {
			t.Errorf("%s, again: %q %v", gone, done, err)
		}
	}
}

// Mending that is cut off behind any write comes to what it would have come to.
func TestCutOffBetweenWrites(t *testing.T) {
	killed := errors.New("killed")
	for n := 0; ; n++ {
		j := newJet(t, jetstream.StreamConfig{MaxMsgsPerSubject: 1, MaxBytes: 120_000})
		j.Single, j.Spare = true, filepath.Join(j.dir, "spare")
		long := `{"a":"` + strings.Repeat("x", 9000) + `"}`
		j.put(t, "job.00", `{"old":1}`)
		j.put(t, "job.50", `{"old":1}`)
		for i := range 9 {
			j.put(t, fmt.Sprintf("job.%02d", i+1), long)
		}
		j.put(t, "job.50", `{"copied":1}`)
		if err := j.Copy(); err != nil {
			t.Fatal(err)
		}
		last := j.put(t, "job.00", `{"new":1}`)
		j.stop()
		list, err := j.Blocks()
		if err != nil || len(list) < 3 {
			t.Fatalf("%v %v", list, err)
		}
		// JetStream has them by no mark, but by what comes behind.
		j.spoil(t, last, last-1, 5)
		told := map[string]bool{}
		writes := 0
		j.kept = func() error {
			if writes++; writes > n {
				return killed
			}
			return nil
		}
		_, err = j.Mend(1<<20, func(d Damage) error { told[d.Kind.String()+" "+d.Subject] = true; return nil })
		if err != nil && !errors.Is(err, killed) {
			t.Fatal(err)
		}
		j.kept = nil
		done := err == nil
		if _, err := j.Mend(1<<20, func(d Damage) error { told[d.Kind.String()+" "+d.Subject] = true; return nil }); err != nil {
			t.Fatal(err)
		}
		j.start(t)
		got := j.has(t)
		if !told["lost job.00"] || got["job.00"] != "" || got["job.50"] != `{"copied":1}` || len(got) != 10 {
			t.Errorf("behind write %d: %v, %d messages, %.20q, %.20q", n, told, len(got), got["job.00"], got["job.50"])
		}
		if m := j.put(t, "job.60", "{}"); m <= last {
			t.Errorf("behind write %d: number %d is given again", n, m)
		}
		j.stop()
		if done {
			break
		}
	}
}

// Whatever JetStream does to a stream, nothing is found where nothing is wrong, and all that was
// there is there.
func TestNothingWrong(t *testing.T) {
	for _, cfg := range []jetstream.StreamConfig{
		{MaxMsgsPerSubject: 1, MaxBytes: 120_000},
		{MaxMsgsPerSubject: 1},
		{MaxBytes: 120_000},
		{MaxAge: 300 * time.Millisecond, MaxBytes: 1 << 20},
	} {
		r := rand.New(rand.NewPCG(1, 2))
		j := newJet(t, cfg)
		if cfg.MaxMsgsPerSubject == 1 {
			j.Single, j.Spare = true, filepath.Join(j.dir, "spare")
		}
		for range 8 {
			for range 60 {
				subject := fmt.Sprintf("job.%02d", r.IntN(40))
				switch r.IntN(24) {
				case 0:
					if err := j.str.Purge(t.Context()); err != nil {
						t.Fatal(err)
					}
				case 1, 2:
					if err := j.str.Purge(t.Context(), jetstream.WithPurgeSubject(subject)); err != nil {
						t.Fatal(err)
					}
				case 3, 4, 5:
					if info, err := j.str.Info(t.Context()); err != nil {
						t.Fatal(err)
					} else if err := j.str.DeleteMsg(t.Context(), info.State.LastSeq-uint64(r.IntN(5))); err != nil && !errors.Is(err, jetstream.ErrMsgDeleteUnsuccessful) {
						t.Fatal(err)
					}
				default:
					j.put(t, subject, `{"a":"`+strings.Repeat("x", r.IntN(4000))+`"}`)
				}
			}
			if j.Single {
				if err := j.Copy(); err != nil {
					t.Fatal(err)
				}
			}
			want := j.has(t)
			j.Closed = false
			switch r.IntN(3) {
			case 0:
				j.Closed = true
				j.stop()
			case 1:
				j.kill(t)
			case 2: // what was written down is older
				index, err := os.ReadFile(filepath.Join(j.msgs(), indexName))
				j.stop()
				if err == nil {
					err = os.WriteFile(filepath.Join(j.msgs(), indexName), index, 0o600)
				}
				if err != nil && !errors.Is(err, fs.ErrNotExist) {
					t.Fatal(err)
				}
			}
			if cfg.MaxAge > 0 {
				want = nil
			}
			if r := mend(t, j.Stream); len(r.Damage) > 0 {
				t.Fatalf("%+v, closed %v: %+v", cfg, j.Closed, r.Damage)
			}
			j.start(t)
			got := j.has(t) // what went for want of room may be back
			for subject, m := range want {
				if got[subject] != m {
					t.Fatalf("%+v: %s is gone", cfg, subject)
				}
			}
		}
	}
}

// How long mending takes that finds nothing, and JetStream to read the same blocks.
func BenchmarkRead(b *testing.B) {
	j := newJet(b, jetstream.StreamConfig{})
	message := "{" + strings.Repeat("x", 16<<10)
	for range 64 << 20 / len(message) {
		j.put(b, "job.01", message)
	}
	j.stop()
	list, err := j.Blocks()
	if err != nil {
		b.Fatal(err)
	}
	j.Closed = true
	size := j.Size()
	b.Run(fmt.Sprintf("mend %d blocks", len(list)), func(b *testing.B) {
		b.SetBytes(size)
		b.ReportAllocs()
		for b.Loop() {
			if r := mend(b, j.Stream); r.Bytes != size || len(r.Damage) > 0 {
				b.Fatalf("%+v", r)
			}
		}
	})
	b.Run("JetStream", func(b *testing.B) {
		b.SetBytes(size)
		b.ReportAllocs()
		for b.Loop() {
			if err := j.unindex(); err != nil {
				b.Fatal(err)
			}
			j.start(b)
			j.stop()
		}
	})
}
