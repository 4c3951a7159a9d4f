package chain

import (
	"errors"
	"strings"
	"testing"
)

// A file has as many bytes, and as many values in each other, as it may have, and
// not one more.
func TestFormIsBounded(t *testing.T) {
	nested := func(depth int) []byte { // signed is the second
		return []byte(`{"signed":` + strings.Repeat("[", depth-1) + strings.Repeat("]", depth-1) + `,"signatures":[]}`)
	}
	long := func(n int) []byte {
		const empty = `{"signed":{},"signatures":[]}`
		return []byte(empty + strings.Repeat(" ", n-len(empty)))
	}
	for _, c := range []struct {
		name  string
		bound int
		of    func(int) []byte
		most  int // bytes
		want  error
	}{
		{"values in each other", maxDepth, nested, MaxRoot, ErrMalformed},
		{"bytes of a root", MaxRoot, long, MaxRoot, ErrTooLarge},
		{"bytes of a timestamp", MaxTimestamp, long, MaxTimestamp, ErrTooLarge},
		{"bytes of a snapshot", MaxSnapshot, long, MaxSnapshot, ErrTooLarge},
		{"bytes of targets", MaxTargets, long, MaxTargets, ErrTooLarge},
	} {
		if err := form(c.of(c.bound), c.most); err != nil {
			t.Errorf("%d %s: %v", c.bound, c.name, err)
		}
		err := form(c.of(c.bound+1), c.most)
		t.Logf("%d %s: expected: %v; got: %v", c.bound+1, c.name, c.want, err)
		if !errors.Is(err, c.want) {
			t.Errorf("%d %s: %v, want %v", c.bound+1, c.name, err, c.want)
		}
	}
}
