package blocks

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/minio/highwayhash"
)

func fits(subject, message []byte) bool {
	return len(subject) == 6 && bytes.HasPrefix(subject, []byte("job.")) && (len(message) == 0 || message[0] == '{')
}

// stream makes one block with messages; the tests of package store have JetStream make them.
func stream(t testing.TB, n int) (*Stream, []byte) {
	t.Helper()
	dir := t.TempDir()
	s := &Stream{Name: "S", Dir: dir, Meta: filepath.Join(dir, "meta"), Rescued: filepath.Join(dir, "rescued"), Fits: fits}
	budget := int64(1)
	h := newHasher("S", 1, &budget)
	var b []byte
	for i := range n {
		r := &record{seq: uint64(i + 1), time: int64(i), subject: fmt.Appendf(nil, "job.%02d", i), message: fmt.Appendf(nil, `{"n":%d}`, i)}
		if i%2 == 1 {
			r.header = []byte("NATS/1.0\r\nA: b\r\n\r\n")
		}
		b = append(b, h.encode(r)...)
	}
	if err := os.Mkdir(s.msgs(), 0o700); err != nil {
		t.Fatal(err)
	}
	write(t, s, b)
	return s, b
}

func write(t testing.TB, s *Stream, b []byte) {
	t.Helper()
	if err := os.WriteFile(s.file(1), b, 0o600); err != nil {
		t.Fatal(err)
	}
}

func mend(t testing.TB, s *Stream) Report {
	t.Helper()
	r, err := s.Mend(1<<30, func(Damage) error { return nil })
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func has(t testing.TB, s *Stream, want []byte) bool {
	t.Helper()
	got, err := os.ReadFile(s.file(1))
	if err != nil {
		t.Fatal(err)
	}
	return bytes.Equal(got, want)
}

// Any byte of a block may be any other one: the block is what it was afterwards.
func TestEveryByte(t *testing.T) {
	s, b := stream(t, 4)
	for i := range b {
		for _, x := range []byte{0x01, 0x80, 0xff, 0x5a} {
			c := bytes.Clone(b)
			c[i] ^= x
			write(t, s, c)
			r := mend(t, s)
			if !has(t, s, b) || len(r.Damage) != 1 || r.Damage[0].Kind != Mended {
				t.Fatalf("byte %d changed by %#x: %+v", i, x, r.Damage)
			}
		}
	}
}

// What cannot be mended costs its own record only, wherever it is, and whatever became of
// its length.
func TestEveryRecord(t *testing.T) {
	s, b := stream(t, 5)
	budget := int64(1 << 30)
	chunks := s.parse(b, newHasher("S", 1, &budget), true, 0, true)
	for i, c := range chunks {
		for _, place := range [][2]int{{0, 2}, {4, 12}, {30, 34}, {c.to - c.from - 4, c.to - c.from}, {0, c.to - c.from}} {
			d := bytes.Clone(b)
			for j := place[0]; j < place[1]; j++ {
				d[c.from+j] ^= 0x77
			}
			write(t, s, d)
			var found []Damage
			r, err := s.Mend(1<<24, func(d Damage) error { found = append(found, d); return nil })
			if err != nil {
				t.Fatal(err)
			}
			got, err := os.ReadFile(s.file(1))
			if err != nil {
				t.Fatal(err)
			}
			left := s.parse(got, newHasher("S", 1, &budget), false, 0, false)
			clean := allWhole(left)
			live := 0
			for _, c := range left {
				if c.r.live() {
					live++
				}
			}
			lost := 0
			for _, d := range r.Damage {
				if d.Kind == Lost || d.Kind == Cut {
					lost++
				}
			}
			if !clean || live+lost != len(chunks) || lost == 1 && !bytes.Equal(found[0].Bytes, d[c.from:c.to]) {
				t.Errorf("record %d, bytes %v: %d are left, %d lost: %+v", i, place, live, lost, r.Damage)
			}
			if last := left[len(left)-1].r.number(); last != 5 && lost == 1 && r.Damage[0].Kind == Lost {
				t.Errorf("record %d, bytes %v: the highest number is %d", i, place, last)
			}
		}
	}
}

// Mending that is cut off begins anew, with all that there is to be found.
func TestInterrupted(t *testing.T) {
	s, b := stream(t, 6)
	c := bytes.Clone(b)
	for _, i := range []int{40, 41, len(b) / 2, len(b)/2 + 1, len(b) - 30, len(b) - 31} {
		c[i] ^= 0x3c
	}
	stop := errors.New("killed")
	for n := range 4 {
		write(t, s, c)
		seen := 0
		_, err := s.Mend(1<<24, func(Damage) error {
			if seen++; seen > n {
				return stop
			}
			return nil
		})
		if err == nil {
			break
		}
		if !errors.Is(err, stop) || !has(t, s, c) {
			t.Fatalf("something was changed before all of it was known: %v", err)
		}
	}
	// A leftover of a write that was cut off does no harm, nor does an index that is gone.
	if err := os.WriteFile(s.file(1)+".tmp123", []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	write(t, s, c)
	first := mend(t, s)
	if second := mend(t, s); len(first.Damage) == 0 || len(second.Damage) != 0 {
		t.Errorf("first %+v, then %+v", first.Damage, second.Damage)
	}
	if list, err := filepath.Glob(filepath.Join(s.msgs(), "*.tmp*")); err != nil || len(list) != 0 {
		t.Errorf("%v %v", list, err)
	}
}

// A message that holds what looks like a record does not bring one into being.
func TestRecordInARecord(t *testing.T) {
	s, _ := stream(t, 0)
	budget := int64(1 << 30)
	h := newHasher("S", 1, &budget)
	inner := h.encode(&record{seq: 7, subject: []byte("job.99"), message: []byte(`{"forged":1}`)})
	var b []byte
	for i, m := range [][]byte{[]byte("{}"), append([]byte("{"), inner...), []byte("{}")} {
		b = append(b, h.encode(&record{seq: uint64(i + 1), subject: fmt.Appendf(nil, "job.%02d", i), message: m})...)
	}
	c := bytes.Clone(b)
	second := least + 6 + 2
	c[second] ^= 0x55 // the length, and more
	c[second+13] ^= 0x55
	c[second+14] ^= 0x55
	write(t, s, c)
	r := mend(t, s)
	got, err := os.ReadFile(s.file(1))
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(got), "forged") || len(r.Damage) != 1 || r.Damage[0].Kind != Lost {
		t.Errorf("%+v", r.Damage)
	}
}

// A block that JetStream has cut off is put back, with what came behind.
func TestRescued(t *testing.T) {
	s, b := stream(t, 4)
	budget := int64(1 << 30)
	chunks := s.parse(b, newHasher("S", 1, &budget), false, 0, true)
	c := bytes.Clone(b)
	c[chunks[1].from] ^= 0x10
	write(t, s, c)
	if err := s.Rescue(1); err != nil {
		t.Fatal(err)
	}
	h := newHasher("S", 1, &budget)
	later := h.encode(&record{seq: 2, subject: []byte("job.77"), message: []byte(`{"later":1}`)})
	write(t, s, append(bytes.Clone(b[:chunks[1].from]), later...))
	mend(t, s)
	got, err := os.ReadFile(s.file(1))
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.HasPrefix(got, b) || !bytes.Contains(got[len(b):], []byte("later")) {
		t.Errorf("%q", got)
	}
}

// failing is a disk that does not give one of its sectors.
type failing struct {
	*bytes.Reader
	bad int64
}

func (f failing) ReadAt(b []byte, at int64) (int, error) {
	if at < f.bad+sector && f.bad < at+int64(len(b)) {
		return 0, &fs.PathError{Op: "read", Path: "1.blk", Err: syscall.EIO}
	}
	return f.Reader.ReadAt(b, at)
}

// A sector that cannot be read costs itself only.
func TestUnreadable(t *testing.T) {
	b := bytes.Repeat([]byte("0123456789"), 2000)
	got, unread, err := readParts(failing{bytes.NewReader(b), 2 * sector}, int64(len(b)))
	if err != nil || !unread {
		t.Fatal(unread, err)
	}
	clear(b[2*sector : 3*sector])
	if !bytes.Equal(got, b) {
		t.Error("something else is gone")
	}
}

// What is no file in the place of a block is refused, by name, and holds nothing up.
func TestNoFile(t *testing.T) {
	for _, make := range []func(name string) error{
		func(name string) error { return syscall.Mkfifo(name, 0o600) },
		func(name string) error { return os.Mkdir(name, 0o700) },
		func(name string) error { return os.Symlink("/dev/zero", name) },
		func(name string) error { return errors.Join(os.WriteFile(name, nil, 0o600), os.Truncate(name, 1<<40)) },
	} {
		s, _ := stream(t, 2)
		if err := make(s.file(2)); err != nil {
			t.Fatal(err)
		}
		if _, err := s.Mend(1<<20, func(Damage) error { return nil }); err == nil || !strings.Contains(err.Error(), s.file(2)) {
			t.Errorf("%v", err)
		}
	}
}

func FuzzMend(f *testing.F) {
	_, b := stream(f, 3)
	f.Add(b)
	f.Add(b[:len(b)-5])
	f.Add(bytes.Repeat([]byte{0}, 100))
	h := newHasher("S", 1, nil)
	f.Add(append(h.encode(&record{seq: 9 | tombstoneBit, time: 5}), b...))
	f.Add(append(h.encode(&record{seq: 9 | erasedBit, message: []byte("random")}), b[1:]...))
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) > 1<<14 {
			return
		}
		s, _ := stream(t, 0)
		write(t, s, b)
		if _, err := s.Mend(1<<20, func(Damage) error { return nil }); err != nil {
			t.Fatal(err)
		}
		if r := mend(t, s); len(r.Damage) != 0 {
			t.Errorf("there is damage after mending: %+v", r.Damage)
		}
	})
}

// Whatever is written over a part of a block: the records beside it stay as they are.
func FuzzDamage(f *testing.F) {
	f.Add(uint16(100), []byte("\x00\x00\x00\x00\x00\x00\x00\x00"), uint16(400), []byte("x"))
	f.Add(uint16(3), bytes.Repeat([]byte{0xff}, 200), uint16(0), []byte(nil))
	_, b := stream(f, 20)
	clean := (&Stream{Name: "S", Fits: fits}).parse(b, newHasher("S", 1, nil), false, 0, false)
	f.Fuzz(func(t *testing.T, at uint16, over []byte, at2 uint16, over2 []byte) {
		s, _ := stream(t, 0)
		c := bytes.Clone(b)
		i, j := int(at)%len(b), int(at2)%len(b)
		n, m := copy(c[i:], over), copy(c[j:], over2)
		write(t, s, c)
		if _, err := s.Mend(1<<20, func(Damage) error { return nil }); err != nil {
			t.Fatal(err)
		}
		got, err := os.ReadFile(s.file(1))
		if err != nil {
			t.Fatal(err)
		}
		// Nobody looks for records within one, whose text may look like them: one that
		// says that it ends where a later one does has those between go with it, and says
		// their numbers.
		within := 0
		for _, r := range clean {
			if r.from < within {
				continue
			}
			says := r.from + int(binary.LittleEndian.Uint32(c[r.from:])&^headerBit)
			if slices.ContainsFunc(clean, func(o chunk) bool { return o.to == says }) {
				within = says
			}
			if (r.to <= i || i+n <= r.from) && (r.to <= j || j+m <= r.from) && !bytes.Contains(got, b[r.from:r.to]) {
				t.Errorf("the record at %d is gone", r.from)
			}
		}
		if r := mend(t, s); len(r.Damage) != 0 {
			t.Errorf("there is damage after mending: %+v", r.Damage)
		}
	})
}

// What is in the place of an index is read within its bounds.
func FuzzIndex(f *testing.F) {
	key := sha256.Sum256([]byte("S"))
	sealed := func(b []byte) []byte {
		return binary.LittleEndian.AppendUint64(bytes.Clone(b), highwayhash.Sum64(b, key[:]))
	}
	f.Add([]byte{indexMagic, indexVersion, 1, 2, 3, 4, 5, 6, 1, 6, 'j', 'o', 'b', '.', '0', '1', 1, 1, 1, 1, 1, 2, 3, 4, 5, 6, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0})
	f.Fuzz(func(t *testing.T, b []byte) {
		if m := readIndex(sealed(b), "S"); m != nil && len(m.Subjects)+len(m.blocks) > len(b) {
			t.Errorf("%d subjects, %d blocks of %d bytes", len(m.Subjects), len(m.blocks), len(b))
		}
	})
}

// A record of the largest size is read, and one byte more is none: what a damaged length
// says is not believed.
func TestRecordIsBounded(t *testing.T) {
	budget := int64(1)
	h := newHasher("S", 1, &budget)
	r := &record{seq: 1, subject: []byte("job.01"), message: bytes.Repeat([]byte("{"), most+1-least-len("job.01"))}
	over := h.encode(r)
	r.message = r.message[1:]
	full := h.encode(r)
	if len(full) != most || len(over) != most+1 {
		t.Fatalf("they have %d and %d bytes", len(full), len(over))
	}
	for b, want := range map[*[]byte]bool{&full: true, &over: false} {
		_, framed := frame(*b)
		_, is := h.read(*b, fits)
		if framed != want || (is == good) != want || cut((*b)[:100]) != want {
			t.Errorf("%d bytes: a frame %v, read %v, the beginning of one %v", len(*b), framed, is, cut((*b)[:100]))
		}
	}
}
