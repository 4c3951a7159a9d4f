package snapshot

import (
	"errors"
	"fmt"
	"regexp"
	"regexp/syntax"
	"slices"
	"strings"
	"time"
	"unicode"
)

// Validation says by what a runtime is known to compute what it should: it gives
// the answers that are expected to golden requests before it becomes active, on a
// schedule, and when the network orders it.
type Validation struct {
	Interval Seconds  `json:"interval_s,omitempty"` // of the schedule; 0 is [DefaultInterval]; see [ValidationShare]
	Golden   []Golden `json:"golden"`
}

// A validation holds a slot of the engine, which other networks may share, and one
// after a doubt or an order the whole of it. So all golden requests of a network
// together have at most a tenth of the interval, which is what they may have of a
// node's time, and a node waits no longer than an hour for what it has just installed.
const (
	ValidationShare = 10 // of the time, one part
	maxValidation   = Seconds(3600)
)

// DefaultInterval is how often a runtime that serves is validated where its
// configuration does not say.
const DefaultInterval = 6 * time.Hour

// Every returns the interval of the schedule.
func (v *Validation) Every() time.Duration {
	if v.Interval == 0 {
		return DefaultInterval
	}
	return v.Interval.Duration()
}

// Golden is a request whose answer is known, at temperature 0. Either Answers or
// Pattern says what is right.
//
// One engine on one kind of machine gives one answer, to the letter. Other GPUs,
// drivers and kernels add the same numbers in another order, so that after some
// tokens two nearly equal ones change places and the text goes on otherwise, rightly
// too. So for a network of several kinds of machine:
//
//   - of a short answer all that occur are listed in Answers;
//   - of a long one, Share is how much from its beginning must be the same: that is
//     where a wrong model, prompt template or tokenizer shows;
//   - where the words may differ and the matter not, Pattern has the matter.
//
// None of them lets an empty answer or garbage pass; [Parse] refuses one that would.
type Golden struct {
	Name   string     `json:"name"`
	Kind   GoldenKind `json:"kind,omitempty"`   // "" is chat
	System string     `json:"system,omitempty"` // of a chat: the system message before the prompt
	Prompt string     `json:"prompt"`           // the user's message, or the text to be completed

	Answers   []string `json:"answers,omitempty"`    // one of these, to the letter
	Share     int      `json:"share,omitempty"`      // percent of one of Answers that the answer begins with, in bytes, rounded up; 0 is all of it, and no more
	Pattern   string   `json:"pattern,omitempty"`    // RE2, of the whole answer
	MinTokens int      `json:"min_tokens,omitempty"` // completion tokens at least, beside Share or Pattern

	Tokens  int     `json:"tokens"` // completion tokens at most
	Timeout Seconds `json:"timeout_s"`
}

// GoldenKind is the API of a golden request.
type GoldenKind string

// The kinds.
const (
	GoldenChat       GoldenKind = "chat"       // POST /v1/chat/completions
	GoldenCompletion GoldenKind = "completion" // POST /v1/completions
)

// Bounds of golden requests, in bytes where nothing else is said.
const (
	maxGolden   = 64
	maxPrompt   = 4096
	maxAnswer   = 4096
	maxAnswers  = 16
	maxPattern  = 512
	maxProgram  = 1000 // instructions of a pattern
	maxPrograms = 4000 // of all: each is tried on all the garbage whenever a snapshot is opened
	minShare    = 10   // percent
	minShared   = 16   // of an answer that must be the same
	minDistinct = 4    // characters in it
)

// Expect reports whether an answer of so many tokens is right; the error says in
// which way it is not, without quoting it.
func (g *Golden) Expect(text string, tokens uint64) error {
	if tokens < uint64(g.MinTokens) {
		return fmt.Errorf("it has %d tokens, want %d at least", tokens, g.MinTokens)
	}
	if g.Pattern != "" {
		p, err := g.compile()
		if err != nil {
			return err
		}
		if !p.MatchString(text) {
			return errors.New("it does not match the pattern")
		}
		return nil
	}
	best, of := -1, ""
	for _, a := range g.Answers {
		if g.Share == 0 && text == a {
			return nil
		}
		n := common(text, a)
		if g.Share != 0 && n >= share(a, g.Share) {
			return nil
		}
		if n > best {
			best, of = n, a
		}
	}
	if g.Share != 0 {
		return fmt.Errorf("it is the expected one for its first %d bytes, want %d of %d at least", best, share(of, g.Share), len(of))
	}
	return fmt.Errorf("it is the expected one, of %d bytes, for its first %d", len(of), best)
}

// common returns how many bytes a and b have in common from their beginning.
func common(a, b string) int {
	n := min(len(a), len(b))
	for i := range n {
		if a[i] != b[i] {
			return i
		}
	}
	return n
}

// share returns percent of the bytes of s, rounded up.
func share(s string, percent int) int { return (len(s)*percent + 99) / 100 }

// program returns how many instructions the pattern stands for, which is what it
// costs to match it for each byte of an answer: a short pattern can repeat much. They
// are counted before any of them is made.
func (g *Golden) program() (int, error) {
	if err := between(len(g.Pattern), "bytes of pattern", 0, maxPattern); err != nil || g.Pattern == "" {
		return 0, err
	}
	p, err := syntax.Parse(g.Pattern, syntax.Perl) // by itself: no bracket of it may close ours in compile
	if err != nil {
		return 0, fmt.Errorf("pattern: %w", err)
	}
	n := instructions(p)
	if n > maxProgram {
		return 0, fmt.Errorf("pattern: it stands for %d instructions of RE2, at most %d: repeat less in it", n, maxProgram)
	}
	return n, nil
}

// compile returns the pattern for the whole of an answer.
func (g *Golden) compile() (*regexp.Regexp, error) {
	if _, err := g.program(); err != nil {
		return nil, err
	}
	p, err := regexp.Compile(`\A(?:` + g.Pattern + `)\z`)
	if err != nil {
		return nil, fmt.Errorf("pattern: %w", err)
	}
	return p, nil
}

// instructions returns how many instructions an expression is compiled to, within a
// few, or more. The parser lets through no repetition that could make it overflow.
func instructions(re *syntax.Regexp) int {
	n := 0
	for _, sub := range re.Sub {
		n += instructions(sub)
	}
	switch re.Op {
	case syntax.OpLiteral:
		n = len(re.Rune)
	case syntax.OpCapture, syntax.OpStar:
		n += 2
	case syntax.OpAlternate:
		n += len(re.Sub)
	case syntax.OpRepeat:
		if re.Max < 0 { // x{2,} is xx+
			return max(re.Min, 1)*n + 2
		}
		return re.Max*n + re.Max - re.Min + 1 // x{1,3} is x(x(x)?)?
	default:
		n++
	}
	return max(n, 1)
}

// garbage is what broken engines answer: nothing, one character or word for ever,
// and all sorts of characters.
var garbage = func() []string {
	var all strings.Builder
	list := []string{"", "\n", "\t", "the", "and", "of", "a b c", "<unk>", "<s>", "</s>", "[PAD]", "\ufffd", "\ufffdé世", "lorem ipsum dolor sit amet"}
	for c := rune(' '); c <= '~'; c++ {
		all.WriteRune(c)
		list = append(list, string(c))
	}
	forward := all.String()
	back := []rune(forward)
	slices.Reverse(back)
	list = append(list, forward, string(back), "abc ABC 123", "0123456789", "abcdefghijklmnopqrstuvwxyz")
	for _, s := range list {
		list = append(list, s+s, strings.Repeat(s, 16), strings.Repeat(s+" ", 16), strings.Repeat(s+"\n", 16))
	}
	return list
}()

func (v *Validation) check(l *Limits) error {
	if err := first(
		between(len(v.Golden), "number of golden requests", 1, maxGolden),
		when(v.Interval != 0, func() error { return between(v.Interval, "interval_s", 10, 7*day) }),
	); err != nil {
		return err
	}
	names, programs, together := map[string]bool{}, 0, Seconds(0)
	for i := range v.Golden {
		g := &v.Golden[i]
		n, err := g.program()
		if programs += n; err == nil && programs > maxPrograms {
			err = fmt.Errorf("pattern: it and those before it stand for %d instructions of RE2, at most %d: repeat less in them", programs, maxPrograms)
		}
		if err != nil {
			return fmt.Errorf("golden[%d]: %w", i, err)
		}
		if names[g.Name] {
			return fmt.Errorf("golden[%d]: a second %q", i, g.Name)
		}
		names[g.Name] = true
		if err := g.check(l); err != nil {
			return fmt.Errorf("golden[%d]: %w", i, err)
		}
		together += g.Timeout
	}
	if most := min(Seconds(v.Every()/time.Second)/ValidationShare, maxValidation); together > most {
		return fmt.Errorf("golden: all together may take %d s (the sum of timeout_s), at most %d: a tenth of interval_s, %d, and %d in any case, since a node does less else meanwhile: have fewer or shorter ones, or repeat them less often",
			together, most, v.Every()/time.Second, maxValidation)
	}
	return nil
}

func when(cond bool, f func() error) error {
	if !cond {
		return nil
	}
	return f()
}

func (g *Golden) check(l *Limits) error {
	if err := first(
		named(g.Name, "name", namePattern),
		between(len(g.Prompt), "bytes of prompt", 1, maxPrompt),
		between(len(g.System), "bytes of system", 0, maxPrompt),
		between(len(g.Answers), "number of answers", 0, maxAnswers),
		between(len(g.Pattern), "bytes of pattern", 0, maxPattern),
		between(g.Tokens, "tokens", 1, l.Tokens),
		between(g.MinTokens, "min_tokens", 0, g.Tokens),
		between(g.Timeout, "timeout_s", 1, 3600),
	); err != nil {
		return err
	}
	switch {
	case g.Kind != "" && g.Kind != GoldenChat && g.Kind != GoldenCompletion:
		return fmt.Errorf("kind %.40q: want %s or %s", g.Kind, GoldenChat, GoldenCompletion)
	case g.Kind == GoldenCompletion && g.System != "":
		return errors.New("system: a completion has no system message")
	case (len(g.Answers) == 0) == (g.Pattern == ""):
		return errors.New("give either answers or a pattern")
	case g.Share != 0 && g.Pattern != "":
		return errors.New("share is about answers, and there is a pattern")
	case g.MinTokens != 0 && g.Pattern == "" && g.Share == 0:
		return errors.New("min_tokens is beside a share or a pattern; answers say it all")
	}
	if len(g.Answers) == 0 {
		g.Answers = nil // as it prints
	}
	for i, a := range g.Answers {
		if err := between(len(a), fmt.Sprintf("bytes of answers[%d]", i), 1, maxAnswer); err != nil {
			return err
		}
		if strings.TrimSpace(a) == "" {
			return fmt.Errorf("answers[%d] is white space", i)
		}
		if slices.Contains(g.Answers[:i], a) {
			return fmt.Errorf("answers[%d] is there already", i)
		}
		if g.Share != 0 {
			if err := g.checkShare(a); err != nil {
				return fmt.Errorf("answers[%d]: %w", i, err)
			}
		}
	}
	if g.Pattern != "" {
		return g.checkPattern()
	}
	return nil
}

// checkShare refuses a share of an answer that says little.
func (g *Golden) checkShare(answer string) error {
	if err := between(g.Share, "share", minShare, 99); err != nil {
		return err
	}
	same := answer[:share(answer, g.Share)]
	distinct := map[rune]bool{}
	for _, r := range same {
		if !unicode.IsSpace(r) {
			distinct[r] = true
		}
	}
	if len(strings.TrimSpace(same)) < minShared || len(distinct) < minDistinct {
		return fmt.Errorf("share: %d percent of it are %d bytes of %d kinds of character, want %d and %d at least, or garbage might pass", g.Share, len(strings.TrimSpace(same)), len(distinct), minShared, minDistinct)
	}
	return nil
}

// checkPattern refuses a pattern that says little.
func (g *Golden) checkPattern() error {
	p, err := g.compile()
	if err != nil {
		return err
	}
	for _, s := range garbage {
		if p.MatchString(s) {
			return fmt.Errorf("pattern: it matches garbage, such as %.60q", s)
		}
	}
	return nil
}
