package blocks

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
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
	chunks, _ := s.parse(b, newHasher("S", 1, &budget), true, true)
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
			left, clean := s.parse(got, newHasher("S", 1, &budget), false, true)
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
	chunks, _ := s.parse(b, newHasher("S", 1, &budget), false, true)
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

func FuzzMend(f *testing.F) {
	_, b := stream(f, 3)
	f.Add(b)
	f.Add(b[:len(b)-5])
	f.Add(bytes.Repeat([]byte{0}, 100))
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
		if _, ok := whole(b, "S"); ok {
			t.Log("a whole file")
		}
	})
}
