package state

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

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
func several(t testing.TB, closed bool) (*memory, *model) {
	t.Helper()
	d := newMemory(3)
	m := newModel(t, 4)
	s, err := modelLoad(d, Bounds{})
	if err != nil {
		t.Fatal(err)
	}
	for range 120 {
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
	if len(s.segments) < 3 {
		t.Fatalf("%d segments", len(s.segments))
	}
	return d, m
}

// Whatever bit of the log is wrong, Open says so or the bit does not matter: no
// panic, and never a record that is not the one written.
func TestDamage(t *testing.T) {
	d, m := several(t, true)
	good := d.files()
	want, err := modelLoad(image(good), Bounds{})
	if err != nil {
		t.Fatal(err)
	}
	m.check(want, false)
	names := slices.DeleteFunc(slices.Sorted(func(yield func(string) bool) {
		for name := range good {
			if !yield(name) {
				return
			}
		}
	}), func(name string) bool { return !strings.HasSuffix(name, ".log") })
	opened, refused := 0, 0
	for i, name := range names {
		g := want.segments[i]
		head, err := g.head.encode()
		if err != nil {
			t.Fatal(err)
		}
		for at := 0; at < len(good[name]); at += 1 + rand.IntN(40) {
			used := at < len(head) || at >= headRoom && int64(at) < g.end
			if !used && rand.IntN(10) != 0 {
				continue // nothing is there
			}
			b := good[name]
			bit := byte(1) << rand.IntN(8)
			b[at] ^= bit
			d := image(good)
			s, err := modelLoad(d, Bounds{})
			switch {
			case err == nil:
				opened++
				m.check(s, false)
				if used && !(i == len(names)-1 && int64(at) >= g.end-frameHead-recordHead-frameAlign) && !padding(g, good[name], at) {
					t.Errorf("%s: bit of byte %d flipped, and nobody noticed", name, at)
				}
			case errors.Is(err, ErrCorrupt):
				refused++
				if !strings.Contains(err.Error(), ".log") && !strings.Contains(err.Error(), "segment") {
					t.Errorf("%s: byte %d: %v does not say where", name, at, err)
				}
				for other, f := range d.names {
					if !bytes.Equal(f.now, good[other]) {
						t.Fatalf("byte %d: %s was changed", at, other)
					}
				}
			default:
				t.Errorf("%s: byte %d: %v, want ErrCorrupt", name, at, err)
			}
			b[at] ^= bit
		}
	}
	t.Logf("flipped bits: expected: all found where something is; got: %d found, %d where nothing is", refused, opened)
	if refused < 1000 {
		t.Errorf("only %d flips were found", refused)
	}
	for i, name := range names {
		rest := map[string][]byte{}
		for n, b := range good {
			if n != name {
				rest[n] = b
			}
		}
		s, err := modelLoad(image(rest), Bounds{})
		t.Logf("%s is missing: expected: %s; got: %v", name, map[bool]string{true: ErrCorrupt.Error(), false: "<nil>, as after a crash that left none"}[i < len(names)-1], err)
		if i < len(names)-1 && !errors.Is(err, ErrCorrupt) {
			t.Errorf("%s is missing: %v, want ErrCorrupt (%v)", name, err, s)
		}
	}
	for _, n := range []int{0, 100, headRoom, headRoom + 1} {
		cut := image(good)
		f := cut.names[names[0]]
		f.now = f.now[:n]
		_, err := modelLoad(cut, Bounds{})
		t.Logf("cut to %d bytes: expected: %v; got: %v", n, ErrCorrupt, err)
		if !errors.Is(err, ErrCorrupt) {
			t.Errorf("cut to %d: %v, want ErrCorrupt", n, err)
		}
	}
}

// padding reports whether a byte fills a frame up.
func padding(g *segment, b []byte, at int) bool {
	for pos := headRoom; int64(pos) < g.end; {
		payload, _, ok := readFrame(b[pos:], g.Salt)
		if !ok { // the flipped one
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

// A last frame that was not written to its end is as if it had not been begun.
func TestTornFrame(t *testing.T) {
	d, m := several(t, false)
	full := d.files()
	s, err := modelLoad(image(full), Bounds{})
	if err != nil {
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
			if got := s.Counts().Accepted; got != accepted-1 {
				t.Fatalf("torn at %d: %d jobs, want %d", at, got, accepted-1)
			}
			if at%16 != 0 {
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
	if got, err := scan(f.now, &g.head, func(kind, int64, []byte) error { return nil }); err != nil || got.end != g.end {
		t.Errorf("the log ends at %d, %v; want %d", got.end, err, g.end)
	}
	forged := sealFrame(append(make([]byte, frameHead), byte(kindClosed), 0, 0, 0, 0), g.Salt+1, s.nextFrame)
	copy(f.now[g.end:], forged)
	if got, err := scan(f.now, &g.head, func(kind, int64, []byte) error { return nil }); err != nil || got.end != g.end {
		t.Errorf("with another salt the log ends at %d, %v; want %d", got.end, err, g.end)
	}
}

func FuzzOpen(f *testing.F) {
	d, _ := several(f, true)
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
		h, err := decodeHead(b)
		if err == nil {
			_, _ = scan(b, &h, func(kind, int64, []byte) error { return nil })
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
