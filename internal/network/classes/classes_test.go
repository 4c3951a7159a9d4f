package classes

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/evm"
	"github.com/resultity/node/internal/wire"
)

func node(i byte) evm.Address { return evm.Address{19: i} }

func of(s string) digest.Digest { return digest.Of([]byte(s)) }

func beat(config, class, print string) *wire.Heartbeat {
	b := &wire.Heartbeat{Config: of(config)}
	if class != "" {
		b.Class = &wire.Class{Digest: of(class)}
		if print != "" {
			b.Class.Fingerprint = of(print)
		}
	}
	return b
}

func TestBook(t *testing.T) {
	b := New()
	now := time.Now()
	verdicts := func(want ...Verdict) {
		t.Helper()
		for i, w := range want {
			if got := b.Verdict(node(byte(i + 1))); got != w {
				t.Errorf("node %d is %q, want %q", i+1, got, w)
			}
		}
		odd, disputed := 0, 0
		for _, w := range want {
			switch w {
			case Odd:
				odd++
			case Disputed:
				disputed++
			}
		}
		if o, d := b.Count(); o != odd || d != disputed {
			t.Errorf("%d odd and %d disputed, want %d and %d", o, d, odd, disputed)
		}
	}
	take := func(i byte, h *wire.Heartbeat, odd ...evm.Address) {
		t.Helper()
		now = now.Add(quiet)
		if got := b.Take(node(i), h, now); !slices.Equal(got, odd) {
			t.Errorf("odd by that: %v, want %v", got, odd)
		}
	}
	verdicts(Unknown)
	take(1, beat("c", "k", "x"))
	verdicts(Unknown)
	take(2, beat("c", "k", "y"))
	verdicts(Disputed, Disputed)
	take(3, beat("c", "k", "y"), node(1)) // it makes the first one a minority
	verdicts(Odd, Same, Same)
	take(3, beat("c", "k", "y")) // nothing new
	take(1, beat("c", "", ""))   // it starts anew, and what it said stands
	verdicts(Odd, Same, Same)
	take(1, beat("c", "k", "y"))
	verdicts(Same, Same, Same)
	take(4, beat("c", "k", "z"), node(4))
	verdicts(Same, Same, Same, Odd)
	take(4, beat("c", "other", "z")) // another class is nobody's business
	verdicts(Same, Same, Same, Unknown)
	take(4, beat("other", "k", "z")) // nor is another configuration
	verdicts(Same, Same, Same, Unknown)
	take(3, beat("c", "k", "")) // of that class it has said something, and that stands until it says more
	verdicts(Same, Same, Same, Unknown)
	take(3, beat("other", "", ""))
	verdicts(Same, Same, Unknown, Unknown)
	take(2, beat("c", "other", ""))
	verdicts(Unknown, Unknown, Unknown, Unknown)
	take(1, beat("other", "", ""))
	take(4, beat("c", "", ""))
	if len(b.of) != 0 || len(b.groups) != 0 {
		t.Errorf("left: %v, %v", b.of, b.groups)
	}
}

func TestNoMajority(t *testing.T) {
	b := New()
	for i, print := range []string{"x", "x", "y", "y"} {
		b.Take(node(byte(i)), beat("c", "k", print), time.Now())
	}
	if odd, disputed := b.Count(); odd != 0 || disputed != 4 {
		t.Errorf("%d odd, %d disputed", odd, disputed)
	}
}

// A node that says something else each time is pointed out now and then.
func TestQuiet(t *testing.T) {
	b, now, said := New(), time.Now(), 0
	for i := range byte(3) {
		b.Take(node(i), beat("c", "k", "x"), now)
	}
	for i := range 1000 {
		now = now.Add(time.Second)
		said += len(b.Take(node(9), beat("c", "k", string(rune('a'+i%7))), now))
	}
	if said != 2 {
		t.Errorf("pointed out %d times within 1000 seconds", said)
	}
}

// A node that has gone is not counted for ever; one that goes on saying the same is.
func TestGone(t *testing.T) {
	b, now := New(), time.Now()
	for i := range byte(3) {
		b.Take(node(i), beat("c", "k", "x"), now)
	}
	b.Take(node(3), beat("c", "k", "y"), now)
	beats := []*wire.Heartbeat{beat("c", "k", "x"), beat("c", "", ""), beat("c", "k", "")}
	for until := now.Add(remember + every); now.Before(until); now = now.Add(time.Minute) {
		if odd, _ := b.Count(); now.Before(until.Add(-2*every)) && odd != 1 {
			t.Fatalf("%d odd, %v before it is forgotten", odd, until.Sub(now))
		}
		for i, h := range beats {
			b.Take(node(byte(i)), h, now)
		}
	}
	if odd, disputed := b.Count(); odd+disputed != 0 || len(b.of) != 3 || len(b.said) != 0 {
		t.Errorf("%d odd, %d disputed; left: %v, %v", odd, disputed, b.of, b.said)
	}
	for i := range byte(3) {
		if v := b.Verdict(node(i)); v != Same {
			t.Errorf("node %d is %q", i, v)
		}
	}
}

// Ten thousand nodes of which each says something else, and one that makes and
// unmakes a majority, cost no more than a look at each.
func BenchmarkCrowd(b *testing.B) {
	book, now := New(), time.Now()
	address := func(i int) evm.Address { return evm.Address{18: byte(i >> 8), 19: byte(i)} }
	for i := range 10_000 {
		print := "x"
		if i >= 5_000 {
			print = fmt.Sprint(i)
		}
		book.Take(address(i), beat("c", "k", print), now)
	}
	for i := 0; b.Loop(); i++ {
		book.Take(address(20_000), beat("c", "k", []string{"x", "z"}[i%2]), now)
		book.Count()
	}
}
