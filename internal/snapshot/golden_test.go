package snapshot

import (
	"regexp/syntax"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"
)

const told = ", in a small village at the foot of a mountain, there lived an old woman who kept the only clock for miles around."

// Each way to say what is right takes that, and nothing that is empty, cut short
// or garbage.
func TestExpect(t *testing.T) {
	one := Golden{Answers: []string{"Paris"}}
	several := Golden{Answers: []string{"Paris", "Paris."}}
	shared := Golden{Answers: []string{told, "The end, as they say, comes quickly to the proud."}, Share: 40, MinTokens: 8}
	pattern := Golden{Pattern: `(?i)(it is |the answer is )?(7|seven)( apples)\.?`, MinTokens: 2}
	for i, c := range []struct {
		g      *Golden
		text   string
		tokens uint64
		right  bool
	}{
		{&one, "Paris", 1, true}, {&one, "Paris", 0, true}, {&one, "paris", 1, false}, {&one, "Paris.", 2, false}, {&one, "Pari", 1, false}, {&one, "", 0, false},
		{&several, "Paris", 1, true}, {&several, "Paris.", 2, true}, {&several, "Paris!", 2, false}, {&several, "", 0, false},
		{&shared, told, 30, true}, {&shared, told, 7, false}, {&shared, told + " Then", 40, true},
		{&shared, told[:46], 10, true}, {&shared, told[:45], 10, false}, {&shared, told[:46] + strings.ToUpper(told[46:]), 30, true},
		{&shared, told[:45] + "X" + told[46:], 30, false}, {&shared, told[1:], 30, false},
		{&shared, "The end, as they say, went", 9, true}, {&shared, "The end, as they sag", 9, false},
		{&shared, "", 8, false}, {&shared, strings.Repeat("!", 100), 100, false},
		{&pattern, "7 apples", 2, true}, {&pattern, "It is seven apples.", 5, true}, {&pattern, "7 apples", 1, false}, {&pattern, "77 apples", 5, false},
		{&pattern, "7 apples\n", 5, false}, {&pattern, "I think 7 apples", 5, false}, {&pattern, "", 5, false},
	} {
		err := c.g.Expect(c.text, c.tokens)
		if (err == nil) != c.right {
			t.Errorf("%d: %.40q of %d tokens: %v", i, c.text, c.tokens, err)
		}
		if err != nil && len(c.text) > 4 && strings.Contains(err.Error(), c.text[:4]) {
			t.Errorf("%d: the error quotes the answer: %v", i, err)
		}
	}
}

// Whatever a tolerance is, garbage fails it.
func TestGarbageFails(t *testing.T) {
	c, err := Parse(golden(t))
	if err != nil {
		t.Fatal(err)
	}
	for i := range c.Validation.Golden {
		g := &c.Validation.Golden[i]
		for _, s := range garbage {
			if g.Expect(s, uint64(g.Tokens)) == nil {
				t.Errorf("%s takes %.60q", g.Name, s)
			}
		}
	}
	n := 0
	for _, s := range garbage {
		n += len(s)
	}
	if n > 200<<10 {
		t.Errorf("garbage has %d bytes, which each pattern is tried on", n)
	}
}

// The worst pattern that is taken costs little, here and on the longest answer.
func TestPatternIsBounded(t *testing.T) {
	g := Golden{Name: "x", Prompt: "x", Pattern: "x" + strings.Repeat("(a|b|c|d|e|f|g)?", 31), Tokens: 1, Timeout: 1}
	begun := time.Now()
	err := g.check(&Limits{Tokens: 10})
	if err == nil {
		err = g.Expect("x"+strings.Repeat("abcdefg", 4<<10), 1)
	}
	if took := time.Since(begun); took > 20*time.Second {
		t.Errorf("it took %v (%v)", took, err)
	}
}

// What a pattern stands for is known before it is made: a few bytes may stand for
// much.
func TestPatternIsCountedFirst(t *testing.T) {
	g := Golden{Name: "x", Prompt: "x", Pattern: strings.Repeat(".{1000}", 73), Tokens: 1, Timeout: 1}
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	err := g.check(&Limits{Tokens: 10})
	runtime.ReadMemStats(&after)
	if err == nil || !strings.Contains(err.Error(), "it stands for 73") {
		t.Errorf("%v", err)
	}
	if n := after.TotalAlloc - before.TotalAlloc; n > 1<<20 {
		t.Errorf("%d bytes were made of it", n)
	}
	for _, s := range []string{"a", "abc", "a?", "a*", "a+", "(a|b)", "(?:a|bc|[d-f])", "a{7}", "a{2,}", "a{0,9}", "(a|b){3,5}", "((a?){10}){10}", `(?i)(\pL?){24}`, "", "^$", "()", "(|a)*"} {
		p, err := syntax.Parse(s, syntax.Perl)
		if err != nil {
			t.Fatal(err)
		}
		prog, err := syntax.Compile(p.Simplify())
		if err != nil {
			t.Fatal(err)
		}
		if got, is := instructions(p), len(prog.Inst)-2; got < is || got > 2*is+2 { // of which two are nobody's
			t.Errorf("%q: %d, it is %d", s, got, is)
		}
	}
}

// What a network may order holds a slot for a tenth of the time, and for an hour in
// one go.
func TestValidationsAreBounded(t *testing.T) {
	for _, c := range []struct {
		interval Seconds
		n        int
		each     Seconds
		ok       bool
	}{
		{10, 1, 1, true}, {10, 1, 2, false}, {10, 64, 3600, false}, {0, 36, 60, true}, {0, 37, 60, false},
		{7 * day, 60, maxValidation / 60, true}, {7 * day, 1, maxValidation, true}, {7 * day, 2, maxValidation/2 + 1, false}, {36_000, 64, 56, true}, {600, 64, 1, false},
	} {
		v := Validation{Interval: c.interval}
		for i := range c.n {
			v.Golden = append(v.Golden, Golden{Name: "n" + strconv.Itoa(i), Prompt: "x", Answers: []string{"y"}, Tokens: 1, Timeout: c.each})
		}
		if err := v.check(&Limits{Tokens: 10}); (err == nil) != c.ok || err != nil && !strings.Contains(err.Error(), "a tenth of interval_s") {
			t.Errorf("%+v: %v", c, err)
		}
	}
}

// All patterns together are bounded, too.
func TestPatternsAreBounded(t *testing.T) {
	var v Validation
	for i := range 5 {
		v.Golden = append(v.Golden, Golden{Name: "n" + strconv.Itoa(i), Prompt: "x", Pattern: "seven (apples|pears){60}", Tokens: 1, Timeout: 1})
	}
	if err := v.check(&Limits{Tokens: 10}); err == nil || !strings.Contains(err.Error(), "golden[4]: pattern: it and those before it stand for") {
		t.Error(err)
	}
	v.Golden = v.Golden[:4]
	if err := v.check(&Limits{Tokens: 10}); err != nil {
		t.Error(err)
	}
}

func TestEvery(t *testing.T) {
	if d := (&Validation{}).Every(); d != DefaultInterval {
		t.Error(d)
	}
	if d := (&Validation{Interval: 10}).Every(); d != 10*time.Second {
		t.Error(d)
	}
}
