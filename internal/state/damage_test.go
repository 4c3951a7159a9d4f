package state

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"reflect"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/resultity/node/internal/wire"
)

// image is a disk made of these files, all synced.
func image(files map[string][]byte) *memory {
	d := newMemory(1)
	for name, b := range files {
		d.names[name] = &memoryFile{d: d, now: bytes.Clone(b), safe: bytes.Clone(b), dirty: map[int]bool{}}
	}
	d.synced = d.names
	return d
}

func (d *memory) files() map[string][]byte {
	m := map[string][]byte{}
	for name, f := range d.names {
		m[name] = bytes.Clone(f.now)
	}
	return m
}

// several is a store of several segments that has been closed, or not.
func several(t testing.TB, closed bool, seed uint64) (*memory, *model) {
	t.Helper()
	d := newMemory(3)
	m := newModel(t, seed)
	s, err := modelLoad(d, Bounds{})
	if err != nil {
		t.Fatal(err)
	}
	for len(s.segments) < 4 {
		if err := m.step(s); err != nil {
			t.Fatal(err)
		}
	}
	if closed {
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	} else {
		accept(t, s, newJob(700), New) // the last frame
	}
	abandon(s)
	if len(s.segments) < 2 {
		t.Fatalf("%d segments", len(s.segments))
	}
	return d, m
}

// logs are the names of segments, the oldest first.
func logs(files map[string][]byte) []string {
	return slices.DeleteFunc(slices.Sorted(maps.Keys(files)), func(name string) bool { return !strings.HasSuffix(name, ".log") })
}

// Whatever one byte of the log is wrong, Open puts it right, on the disk, too, and nothing
// is lost.
func TestOneByte(t *testing.T) {
	d, m := several(t, true, 4)
	good := d.files()
	want, err := modelLoad(image(good), Bounds{})
	if err != nil {
		t.Fatal(err)
	}
	m.check(want, false)
	abandon(want)
	mended, idle := 0, 0
	seed := rand.Uint64()
	r := rand.New(rand.NewPCG(seed, 11))
	t.Logf("seed %d", seed)
	for i, name := range logs(good) {
		g := want.segments[i]
		head, err := g.head.encode()
		if err != nil {
			t.Fatal(err)
		}
		used := len(bytes.TrimRight(head[:headCopy], "\x00"))
		for at := 0; at < len(good[name]); at += 1 + r.IntN(240) {
			inHead := at < headRoom && at%headCopy < used
			lies := inHead || at >= headRoom && int64(at) < g.end
			if !lies && r.IntN(10) != 0 {
				continue // nothing is there
			}
			b := good[name]
			was := b[at]
			b[at] ^= byte(1 + r.IntN(255))
			d := image(good)
			s, err := modelLoad(d, Bounds{})
			if err != nil {
				t.Fatalf("%s: byte %d: %v", name, at, err)
			}
			m.check(s, false)
			switch found := s.Salvage(); {
			case found == nil:
				idle++
				if inHead || lies && !padding(g, good[name], at) {
					t.Errorf("%s: byte %d changed, and nobody noticed", name, at)
				}
			case found.Mended != 1 || len(found.Lost)+len(found.Aside) > 0 || found.Leaves > 0 || !found.Blind.IsZero() || found.Full != nil:
				t.Fatalf("%s: byte %d: %+v, want it mended", name, at, found)
			default:
				mended++
				if d.names[name].now[at] != was {
					t.Fatalf("%s: byte %d is not right on the disk", name, at)
				}
			}
			abandon(s)
			b[at] = was
		}
	}
	t.Logf("changed bytes: %d mended, %d where nothing is", mended, idle)
	if mended < 300 {
		t.Errorf("only %d changes were found", mended)
	}
}

// padding reports whether a byte fills a frame up.
func padding(g *segment, b []byte, at int) bool {
	for pos := headRoom; int64(pos) < g.end; {
		payload, _, ok := readFrame(b[pos:], g.Salt)
		if !ok { // the changed one
			return false
		}
		end := pos + frameHead + len(payload)
		if at < aligned(end) {
			return at >= end
		}
		pos = aligned(end)
	}
	return false
}

// settle has what is in the files be what is on the disk.
func (d *memory) settle() {
	for _, f := range d.names {
		f.safe = bytes.Clone(f.now)
	}
}

// damages are what a disk does to a segment beyond one byte.
var damages = map[string]func(d *memory, name string, b []byte, r *rand.Rand){
	"two bytes": func(_ *memory, _ string, b []byte, r *rand.Rand) {
		at := headRoom + r.IntN(len(b)-headRoom-200)
		b[at] ^= byte(1 + r.IntN(255))
		b[at+20+r.IntN(100)] ^= byte(1 + r.IntN(255))
	},
	"a sector of zeros": func(_ *memory, _ string, b []byte, r *rand.Rand) {
		at := r.IntN(len(b)/sector) * sector
		clear(b[at : at+sector])
	},
	"a page of noise": func(_ *memory, _ string, b []byte, r *rand.Rand) {
		at := r.IntN(len(b)/page) * page
		for i := range page {
			b[at+i] = byte(r.Uint32())
		}
	},
	"an unreadable page": func(d *memory, name string, b []byte, r *rand.Rand) {
		d.names[name].unread = map[int64]bool{int64(r.IntN(len(b)/page)) * page: true}
	},
	"both heads": func(_ *memory, _ string, b []byte, _ *rand.Rand) { b[0]++; b[headCopy]++ },
	"cut short": func(d *memory, name string, b []byte, r *rand.Rand) {
		d.names[name].now = b[:r.IntN(len(b))]
	},
	"missing": func(d *memory, name string, _ []byte, _ *rand.Rand) { delete(d.names, name) },
}

// Whatever a disk does to the log: the store opens, what it says of a job is what was
// written or that it is settled, so that there is no second answer, and the next start has
// nothing to find.
func TestDamage(t *testing.T) {
	for what, do := range damages {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			lost, kept := 0, 0
			for seed := range uint64(16) {
				r := rand.New(rand.NewPCG(seed, 9))
				dd, m := several(t, seed%2 == 0, seed)
				good := dd.files()
				d := image(good)
				names := logs(good)
				if what != "two bytes" && what != "both heads" {
					names = names[:len(names)-1] // what reaches to the end of the log looks like a crash
				}
				name := names[r.IntN(len(names))]
				do(d, name, d.names[name].now, r)
				d.settle()
				s, err := modelLoad(d, Bounds{})
				if err != nil {
					t.Fatalf("seed %d, %s: %v", seed, name, err)
				}
				l, k := m.damaged(s)
				lost, kept = lost+l, kept+k
				for range 30 { // and it works
					j := newJob(r.IntN(2000))
					j.Created += 3600
					accept(t, s, j, New)
					finish(t, s, failure(j))
				}
				n := s.Counts()
				size := s.ReceiptLog()
				if err := s.Close(); err != nil {
					t.Fatal(err)
				}
				if s, err = modelLoad(d.after(true), Bounds{}); err != nil {
					t.Fatalf("seed %d: the next start: %v", seed, err)
				}
				if found := s.Salvage(); found != nil {
					t.Fatalf("seed %d: the next start finds %+v", seed, found)
				}
				if got := s.Counts(); got != n {
					t.Fatalf("seed %d: %+v at the next start, and %+v before", seed, got, n)
				}
				if got := s.ReceiptLog(); got.Size != size.Size || got.Root != size.Root {
					t.Fatalf("seed %d: log %+v at the next start, and %+v before", seed, got, size)
				}
				m.damaged(s)
				abandon(s)
			}
			t.Logf("expected: the rest is kept, and nothing answered twice; got: %d jobs and results lost, %d kept", lost, kept)
			if kept == 0 {
				t.Error("nothing was kept")
			}
		})
	}
}

// Wherever it is killed while it puts a log right, or meets a full disk, the next start does
// the rest, and nothing more is lost than without that.
func TestSalvageAnywhere(t *testing.T) {
	for _, what := range []string{"two bytes", "a sector of zeros", "an unreadable page", "both heads", "missing"} {
		for _, fault := range []error{errStopped, errNoSpace} {
			t.Run(fmt.Sprint(what, ", ", fault), func(t *testing.T) {
				t.Parallel()
				for seed := range uint64(2) {
					dd, m := several(t, true, seed)
					good := dd.files()
					begin := func() (*memory, *rand.Rand) {
						r := rand.New(rand.NewPCG(seed, 10))
						d := image(good)
						names := logs(good)
						if what != "both heads" {
							names = names[:len(names)-1]
						}
						name := names[r.IntN(len(names))]
						if seed == 0 {
							name = names[len(names)-1]
						}
						damages[what](d, name, d.names[name].now, r)
						d.settle()
						return d, r
					}
					d, _ := begin()
					s, err := modelLoad(d, Bounds{})
					if err != nil {
						t.Fatal(err)
					}
					abandon(s)
					_, best := m.damaged(s)
					for n := 1; ; n++ {
						d, _ := begin()
						reached := false
						d.fail = func(i int, op string) error {
							if i < n || fault == errNoSpace && (i > n+2 || op == "sync" || op == "sync names") {
								return nil
							}
							reached = true
							return fault
						}
						s, err := modelLoad(d, Bounds{})
						if !reached {
							abandon(s)
							break
						}
						if err == nil {
							abandon(s)
							if _, kept := m.damaged(s); kept < best {
								t.Fatalf("seed %d, %v at %d: %d kept, %d without that", seed, fault, n, kept, best)
							}
						} else if !errors.Is(err, fault) {
							t.Fatalf("seed %d, %v at %d: %v", seed, fault, n, err)
						}
						for range 2 {
							d = d.after(fault == errStopped)
							if s, err = modelLoad(d, Bounds{}); err != nil {
								t.Fatalf("seed %d, after %v at %d: %v", seed, fault, n, err)
							}
							if _, kept := m.damaged(s); kept < best {
								t.Fatalf("seed %d, after %v at %d: %d kept, %d without that", seed, fault, n, kept, best)
							}
							abandon(s)
						}
						if found := s.Salvage(); found != nil {
							t.Fatalf("seed %d, after %v at %d: the last start finds %+v", seed, fault, n, found)
						}
					}
				}
			})
		}
	}
}

// A store of which no segment can be read begins anew, and answers nothing of before.
func TestNothingLeft(t *testing.T) {
	for n := 0; ; n++ {
		d := newMemory(uint64(n))
		s, err := modelLoad(d, Bounds{})
		if err != nil {
			t.Fatal(err)
		}
		j := newJob(10)
		accept(t, s, j, New)
		abandon(s)
		d = image(d.files())
		clear(d.names[segmentName(1)].now)
		d.settle()
		reached := false
		d.fail = func(i int, _ string) error {
			if reached = reached || n > 0 && i >= n; reached {
				return errStopped
			}
			return nil
		}
		if s, err = modelLoad(d, Bounds{}); err == nil {
			abandon(s)
		}
		if n > 0 && !reached {
			break
		}
		d = d.after(true)
		for range 2 {
			if s, err = modelLoad(d, Bounds{}); err != nil {
				t.Fatal(err)
			}
			accept(t, s, j, Forgotten)
			abandon(s)
			d = d.after(true)
		}
		if s.Salvage() != nil {
			t.Fatalf("stopped at %d: the last start finds %+v", n, s.Salvage())
		}
	}
}

// A disk that gives nothing back is not taken for one that has lost all.
func TestNoDisk(t *testing.T) {
	d, _ := several(t, true, 4)
	for _, f := range d.names {
		f.unread = map[int64]bool{}
		for at := range int64(len(f.now) / page) {
			f.unread[at*page] = true
		}
	}
	before := len(d.names)
	if _, err := modelLoad(d, Bounds{}); !errors.Is(err, syscall.EIO) || len(d.names) != before {
		t.Fatalf("%v, and %d files of %d", err, len(d.names), before)
	}
}

// damaged is check for a store that has lost something.
func (m *model) damaged(s *Store) (lost, kept int) {
	m.t.Helper()
	for _, id := range m.order {
		k := m.jobs[id]
		want := k.may[len(k.may)-1]
		got, err := s.Lookup(id)
		if err != nil {
			m.t.Fatal(err)
		}
		if got == want {
			kept++
		} else {
			lost++
		}
		switch {
		case got == Done:
			r, ok, err := s.Result(id)
			if err != nil || !ok || !reflect.DeepEqual(r, k.result) {
				m.t.Fatalf("result of %s: %v, %v, or another than was given", id, ok, err)
			}
		case got == Running && (want == Done || want == Settled):
			m.t.Fatalf("job %s is accepted, and was %v: it would be answered again", id, want)
		case got == 0 && (want == Done || want == Settled):
			j := *k.Job
			if again, err := s.Accept(&j); err != nil || again != Forgotten {
				m.t.Fatalf("job %s was %v, and is %v (%v) when it comes again", id, want, again, err)
			}
		}
	}
	jobs, err := s.Unfinished()
	if err != nil {
		m.t.Fatal(err)
	}
	for _, j := range jobs {
		if k := m.jobs[j.ID]; k != nil && !bytes.Equal(j.Request, k.Request) {
			m.t.Fatalf("job %s is not the one accepted", j.ID)
		}
	}
	return lost, kept
}

// A last frame that was not written to its end is as if it had not been begun.
func TestTornFrame(t *testing.T) {
	d, m := newMemory(3), newModel(t, 4)
	s, err := modelLoad(d, Bounds{})
	if err != nil {
		t.Fatal(err)
	}
	for range 20 { // one segment is enough, and soon read
		if err := m.step(s); err != nil {
			t.Fatal(err)
		}
	}
	accept(t, s, newJob(700), New) // the last frame
	abandon(s)
	full := d.files()
	if s, err = modelLoad(image(full), Bounds{}); err != nil {
		t.Fatal(err)
	}
	accepted := s.Counts().Accepted
	name, begin, end := segmentName(s.current().Number), s.lastFrame, s.current().end
	if begin == 0 || end-begin < 700 {
		t.Fatalf("last frame from %d to %d", begin, end)
	}
	original := bytes.Clone(full[name])
	for at := begin; at < end-frameAlign; at++ {
		for _, rest := range []byte{0, 0xFF} { // what was there before
			b := full[name]
			copy(b, original)
			for i := at; i < end; i++ {
				b[i] = rest
			}
			d := image(full)
			s, err := modelLoad(d, Bounds{})
			if err != nil {
				t.Fatalf("torn at %d: %v", at, err)
			}
			wrong := 0
			for i := range b {
				if b[i] != original[i] {
					wrong++
				}
			}
			want := accepted - 1
			if wrong <= 1 {
				want++ // it is found again
			}
			if got := s.Counts().Accepted; got != want {
				t.Fatalf("torn at %d: %d jobs, want %d", at, got, want)
			}
			if wrong <= 1 || at%16 != 0 {
				continue
			}
			m.check2(s)
			// What comes next replaces it.
			j := newJob(10)
			accept(t, s, j, New)
			abandon(s)
			if s, err = modelLoad(d.after(true), Bounds{}); err != nil {
				t.Fatalf("torn at %d, and gone on: %v", at, err)
			}
			accept(t, s, j, Running)
		}
	}
}

// check2 is check for a store that has jobs which the model does not know.
func (m *model) check2(s *Store) {
	m.t.Helper()
	for id, k := range m.jobs {
		if got, err := s.Lookup(id); err != nil || !slices.Contains(k.may, got) {
			m.t.Fatalf("job %s is %v, %v; may be %v", id, got, err, k.may)
		}
	}
}

// What an earlier use of a file has left behind is never taken for records, not
// even where it begins exactly behind the last frame.
func TestFilesAreUsedAgain(t *testing.T) {
	d := newMemory(1)
	s, err := load(d, Bounds{}, now, small)
	if err != nil {
		t.Fatal(err)
	}
	for range 300 { // all of one size
		j := newJob(1000)
		accept(t, s, j, New)
		finish(t, s, failure(j))
		ack(t, s, j.ID)
	}
	abandon(s)
	if n := len(d.names); n > 6 {
		t.Errorf("%d files for nothing", n)
	}
	if s, err = load(d.after(true), Bounds{}, now, small); err != nil {
		t.Fatal(err)
	}
	if c := s.Counts(); c.Accepted != 0 || c.Results > 1 {
		t.Errorf("Counts = %+v, want nothing but perhaps the last result", c)
	}
	// A frame of this very log, copied to behind its end, and one with a number
	// that fits.
	g := s.current()
	f := g.f.(*memoryFile)
	copy(f.now[g.end:], f.now[headRoom:g.end])
	if got := scan(f.now, g.Salt, g.frames(), func(kind, int64, []byte) {}); got.end != g.end {
		t.Errorf("the log ends at %d, want %d", got.end, g.end)
	}
	forged := sealFrame(append(make([]byte, frameHead), byte(kindClosed), 0, 0, 0, 0), g.Salt+1, s.nextFrame)
	copy(f.now[g.end:], forged)
	if got := scan(f.now, g.Salt, g.frames(), func(kind, int64, []byte) {}); got.end != g.end {
		t.Errorf("with another salt the log ends at %d, want %d", got.end, g.end)
	}
}

func FuzzOpen(f *testing.F) {
	d, _ := several(f, true, 4)
	s, err := load(d, Bounds{}, now, small)
	if err != nil {
		f.Fatal(err)
	}
	last := s.current()
	for _, name := range []string{segmentName(last.Number), segmentName(s.segments[0].Number)} {
		f.Add(d.names[name].now, uint16(0), uint16(0), byte(0))
	}
	f.Add([]byte{}, uint16(1), uint16(2), byte(3))
	f.Fuzz(func(t *testing.T, b []byte, at, n uint16, with byte) {
		if len(b) > small {
			b = b[:small]
		}
		b = append(b, make([]byte, small-len(b))...)
		for i := int(at); i < min(int(at)+int(n), len(b)); i++ {
			b[i] = with
		}
		// Records with the right checksums: what is inside them counts here.
		h, err := decodeCopy(b, fromNumber(b))
		if err == nil {
			_ = scan(b, h.Salt, h.frames(), func(kind, int64, []byte) {})
		}
		for _, payload := range [][]byte{b[headRoom:], b} {
			_ = eachRecord(payload, func(kind, int, []byte) error { return nil })
			_, _ = decodeJob(payload)
			_, _ = decodeResult(payload)
		}
		num := max(h.Number, 1)
		s, err := load(image(map[string][]byte{segmentName(num): b}), Bounds{}, now, small)
		if err != nil {
			if !errors.Is(err, ErrCorrupt) && !errors.Is(err, ErrFormat) {
				t.Fatal(err)
			}
			return
		}
		defer abandon(s)
		if _, err := s.Unfinished(); err != nil && !errors.Is(err, ErrCorrupt) {
			t.Fatal(err)
		}
		unread, err := s.Outbox(0, func(uint64, *wire.Result) error { return nil })
		if err != nil {
			t.Fatal(err)
		}
		for _, u := range unread {
			if !errors.Is(u.Err, ErrCorrupt) {
				t.Fatal(u.Err)
			}
		}
	})
}

// A request whose bytes look like the heads of frames does not keep a start busy.
func TestForgedHeads(t *testing.T) {
	b := make([]byte, 16<<20)
	for at := 0; at < len(b); at += 8 {
		copy(b[at:], number(1<<17)) // a number that may follow, and a length
	}
	start := time.Now()
	if at, found := laterFrame(b, newSalt(), 1); found {
		t.Errorf("a frame at %d", at)
	}
	if took := time.Since(start); took > 10*time.Second {
		t.Errorf("it took %v to look for frames", took)
	}
}

// A clock that was wrong when something was found lost keeps no job out for longer than
// until it is right, and lets none in that was made before.
func TestBlindByAWrongClock(t *testing.T) {
	for what, off := range map[string]time.Duration{"ahead": 10 * 365 * 24 * time.Hour, "behind": -10 * 365 * 24 * time.Hour} {
		d, _ := several(t, true, 4)
		d = image(d.files())
		delete(d.names, logs(d.files())[1])
		d.settle()
		clock := now().Add(off)
		load := func() *Store {
			t.Helper()
			s, err := loadWith(d, Bounds{}, func() time.Time { return clock }, small, modelLeaf)
			if err != nil {
				t.Fatal(err)
			}
			return s
		}
		s := load()
		if s.Salvage() == nil || s.Salvage().Blind.IsZero() {
			t.Fatalf("%s: %+v", what, s.Salvage())
		}
		clock = now()
		old, fresh := newJob(10), newJob(10)
		old.Created, fresh.Created = clock.Unix(), clock.Add(time.Minute).Unix()
		for round := range 3 {
			accept(t, s, old, Forgotten)
			if round == 0 {
				accept(t, s, fresh, New)
			} else {
				accept(t, s, fresh, Running)
			}
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			clock = clock.Add(time.Minute)
			s = load()
		}
		next := newJob(10) // made in the minutes since: no start is another loss
		next.Created = fresh.Created
		accept(t, s, next, New)
		abandon(s)
	}
}

// A name that cannot be changed on a full disk is no reason not to start.
func TestNoRoomForAName(t *testing.T) {
	d, m := several(t, true, 4)
	d = image(d.files())
	names := logs(d.files())
	last := d.names[names[len(names)-1]].now
	last[0]++
	last[headCopy]++
	d.settle()
	d.fail = func(_ int, op string) error {
		if op == "rename" && d.names[names[len(names)-1]] != nil {
			return errNoSpace
		}
		return nil
	}
	s, err := modelLoad(d, Bounds{})
	if err != nil {
		t.Fatal(err)
	}
	m.damaged(s)
	abandon(s)
}

// A page at the end of the log that the disk does not give back is no crash: of what was in
// it nothing is answered twice.
func TestUnreadableEnd(t *testing.T) {
	for _, off := range []int64{0, page} { // with the head of the last frame, or with the rest
		d := newMemory(1)
		s, err := modelLoad(d, Bounds{})
		if err != nil {
			t.Fatal(err)
		}
		first, last := newJob(10), newJob(3*page)
		accept(t, s, first, New)
		at := s.current().end
		accept(t, s, last, New)
		abandon(s)
		d = image(d.files())
		d.names[segmentName(1)].unread = map[int64]bool{at&^(page-1) + off: true}
		d.settle()
		for round := range 2 {
			if s, err = modelLoad(d, Bounds{}); err != nil {
				t.Fatal(err)
			}
			if found := s.Salvage(); (found != nil && !found.Blind.IsZero()) != (round == 0) {
				t.Fatalf("page %d, start %d: %+v", off/page, round, found)
			}
			accept(t, s, last, Forgotten)
			if off > 0 {
				accept(t, s, first, Settled)
			}
			abandon(s)
			d = d.after(true)
		}
	}
}
