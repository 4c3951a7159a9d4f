package openai

import (
	"bytes"
	"fmt"
	"math"
	"slices"
	"strconv"
	"unicode/utf8"

	"github.com/resultity/node/internal/wire"
)

// This file compares two answers to one request. The rules are:
//
//   - What the engine has computed counts: texts, finish reasons, token counts.
//     What rightly differs from one answering to the next does not: id, time, how a
//     stream was cut into events, whether it was a stream.
//   - A body is what a client or another node hands over. One that is not an answer
//     is compared with nothing; of one that is, all that has text is read, or none.
//   - A verdict holds no text. See [Excerpts] for whoever may read it.

// Verdict is what came of a comparison.
type Verdict string

// The verdicts.
const (
	Same          Verdict = "same"
	Different     Verdict = "different"
	NotComparable Verdict = "not_comparable"
)

// Comparison says whether two answers are the same. It holds nothing of their
// texts.
type Comparison struct {
	Verdict    Verdict     `json:"verdict"`
	Cause      Cause       `json:"cause,omitempty"`      // why they cannot be compared
	Reason     string      `json:"reason,omitempty"`     // the same for people
	Difference *Difference `json:"difference,omitempty"` // the first one
}

// Cause is why answers cannot be compared. It is one of a few words, so that it may
// stand where text may not.
type Cause string

// The causes.
const (
	NoAnswer   Cause = "no_answer"  // one of them is not a whole answer
	OtherModel Cause = "model"      // by name, or its files are others
	OtherImage Cause = "image"      // of the engine
	OtherClass Cause = "class"      // hardware, or settings of the engine
	NoClass    Cause = "no_class"   // it is not known what one was computed on
	OverLimits Cause = "limits"     // the request is over the limits of now
	OtherAPI   Cause = "api"        // or another model than the request asks for
	NoSeed     Cause = "seed"       // nobody knows with which one its tokens were drawn
	Tokens     Cause = "tokens"     // the limit on them may have been another one
	Unanswered Cause = "unanswered" // nobody has given a second answer
)

// Incomparable is the outcome of a comparison that cannot be made.
func Incomparable(cause Cause, format string, args ...any) Comparison {
	return Comparison{Verdict: NotComparable, Cause: cause, Reason: fmt.Sprintf(format, args...)}
}

// Part is a part of an answer.
type Part string

// The parts, in the order in which they are compared.
const (
	PartChoices          Part = "choices"
	PartReasoning        Part = "reasoning"
	PartText             Part = "text"
	PartFinish           Part = "finish_reason"
	PartPromptTokens     Part = "prompt_tokens"
	PartCompletionTokens Part = "completion_tokens"
)

// Difference is where two answers part.
type Difference struct {
	Part   Part `json:"part"`
	Choice int  `json:"choice"` // of text, reasoning and finish reason
	Offset int  `json:"offset"` // of text and reasoning: how many characters before are the same
	// Was and Is are the values that differ, of text and reasoning how many
	// characters there are in all.
	Was string `json:"was"`
	Is  string `json:"is"`
}

// String says it in words, without text of the answers.
func (d *Difference) String() string {
	switch d.Part {
	case PartText, PartReasoning:
		return fmt.Sprintf("choice %d: the %s differs behind character %d (it had %s characters, now %s)", d.Choice, d.Part, d.Offset, d.Was, d.Is)
	case PartFinish:
		return fmt.Sprintf("choice %d: the finish reason was %s and is %s", d.Choice, d.Was, d.Is)
	}
	return fmt.Sprintf("%s: it was %s and is %s", d.Part, d.Was, d.Is)
}

// Answer is what counts of a response body. It keeps the bytes it was made of.
type Answer struct {
	Kind  wire.Kind
	Model string
	Usage *Usage // nil where the body does not say, as of most streams

	choices []choice // by index, without gaps
}

type choice struct {
	text, thoughts []byte
	finish         string
}

// Only returns what an answer of one choice says: its text, what the model says
// before that, and why it ended. ok is false where there are several choices.
func (a *Answer) Only() (text, reasoning, finish string, ok bool) {
	if len(a.choices) != 1 {
		return "", "", "", false
	}
	c := &a.choices[0]
	return string(c.text), string(c.thoughts), c.finish, true
}

// maxChoices bounds the choices of an answer. Ours have one.
const maxChoices = 16

// AnswerError says that a body is no whole answer of the two APIs. It holds nothing
// of the body.
type AnswerError struct{ Detail string }

func (e *AnswerError) Error() string { return "not an answer: " + e.Detail }

func noAnswer(format string, args ...any) error {
	return &AnswerError{fmt.Sprintf(format, args...)}
}

// ReadAnswer reads a response body, an object or a whole event stream. Errors are
// [*AnswerError].
func ReadAnswer(body []byte) (*Answer, error) {
	a := new(Answer)
	body = trim(body)
	if len(body) > 0 && body[0] == '{' {
		if err := a.object(body, false); err != nil {
			return nil, err
		}
		return a.whole()
	}
	done := false
	for line := range bytes.Lines(body) {
		line = bytes.TrimRight(line, "\r\n")
		if len(line) == 0 || line[0] == ':' {
			continue
		}
		data, ok := bytes.CutPrefix(line, []byte("data:"))
		switch data = trim(data); {
		case !ok:
			return nil, noAnswer("neither a JSON object nor an event stream")
		case done:
			return nil, noAnswer("the stream goes on behind [DONE]")
		case string(data) == "[DONE]":
			done = true
		default:
			if err := a.object(data, true); err != nil {
				return nil, err
			}
		}
	}
	if !done {
		return nil, noAnswer("the stream has no [DONE]")
	}
	return a.whole()
}

// objects are the types of a body, or of an event of one.
var objects = map[bool]map[string]wire.Kind{
	false: {`"chat.completion"`: wire.KindChat, `"text_completion"`: wire.KindCompletion},
	true:  {`"chat.completion.chunk"`: wire.KindChat, `"text_completion"`: wire.KindCompletion},
}

// object takes a body, or an event of a stream.
func (a *Answer) object(b []byte, event bool) error {
	if check(b) != nil { // which names what is wrong, in words of the body
		return noAnswer("it is no JSON that can be read in one way only")
	}
	if b[0] != '{' {
		return noAnswer("it holds %s in place of an object", typeName(b))
	}
	var object, model, choices, usage []byte
	for name, v := range members(b) {
		switch string(name) {
		case "object":
			object = v
		case "model":
			model = v
		case "choices":
			choices = v
		case "usage":
			usage = v
		case "error":
			if !isNull(v) {
				return noAnswer("it reports an error")
			}
		}
	}
	kind, ok := objects[event][string(object)]
	switch {
	case !ok:
		return noAnswer("its object is of no known type")
	case model == nil || model[0] != '"' || len(model) > maxName+2:
		return noAnswer("it names no model")
	case a.Kind != "" && (a.Kind != kind || a.Model != string(plain(model))):
		return noAnswer("its events are of several kinds or models")
	case choices == nil || choices[0] != '[':
		return noAnswer("it has no choices")
	}
	a.Kind, a.Model = kind, string(plain(model))
	seen := 0
	for v := range elements(choices) {
		if seen++; seen > maxChoices {
			return noAnswer("it has more than %d choices", maxChoices)
		}
		if err := a.choice(v, event); err != nil {
			return err
		}
	}
	if usage == nil || isNull(usage) {
		return nil
	}
	return a.count(usage)
}

func (a *Answer) choice(v []byte, event bool) error {
	if v[0] != '{' {
		return noAnswer("a choice is %s", typeName(v))
	}
	in := "message"
	if event {
		in = "delta"
	}
	var index, text, thought, finish []byte
	for name, v := range members(v) {
		switch string(name) {
		case "index":
			index = v
		case "text":
			if a.Kind == wire.KindCompletion {
				text = v
			}
		case in:
			if a.Kind != wire.KindChat {
				continue
			}
			if v[0] != '{' {
				return noAnswer("a choice's %s is %s", in, typeName(v))
			}
			var err error
			if text, thought, err = readDelta(v); err != nil {
				return noAnswer("a choice has what is no text")
			}
		case "finish_reason":
			finish = v
		}
	}
	i, err := strconv.Atoi(string(index))
	if err != nil || i < 0 || i >= maxChoices {
		return noAnswer("a choice has no index below %d", maxChoices)
	}
	for len(a.choices) <= i {
		a.choices = append(a.choices, choice{})
	}
	c := &a.choices[i]
	for _, p := range []struct {
		to *[]byte
		v  []byte
	}{{&c.text, text}, {&c.thoughts, thought}} {
		switch {
		case p.v == nil || isNull(p.v):
		case p.v[0] != '"':
			return noAnswer("the text of a choice is %s", typeName(p.v))
		case c.finish != "" && len(p.v) > 2:
			return noAnswer("a choice goes on behind its finish reason")
		default:
			*p.to = unescape(*p.to, p.v)
		}
	}
	switch f := string(finish); f {
	case "", "null":
	case `"stop"`, `"length"`, `"content_filter"`:
		if c.finish != "" {
			return noAnswer("a choice ends twice")
		}
		c.finish = f[1 : len(f)-1]
	default:
		return noAnswer("a finish reason is none of stop, length and content_filter")
	}
	return nil
}

func (a *Answer) count(v []byte) error {
	if v[0] != '{' || a.Usage != nil {
		return noAnswer("its usage is no object, or comes twice")
	}
	u := new(Usage)
	have := 0
	for name, v := range members(v) {
		to := &u.PromptTokens
		switch string(name) {
		case "prompt_tokens":
		case "completion_tokens":
			to = &u.CompletionTokens
		default:
			continue
		}
		n, err := strconv.ParseUint(string(v), 10, 64)
		if err != nil || n > math.MaxInt32 {
			return noAnswer("its usage has no number of tokens")
		}
		*to = n
		have++
	}
	if have != 2 {
		return noAnswer("its usage has no number of tokens")
	}
	a.Usage = u
	return nil
}

// whole refuses an answer without an end.
func (a *Answer) whole() (*Answer, error) {
	if len(a.choices) == 0 {
		return nil, noAnswer("it has no choices")
	}
	if slices.ContainsFunc(a.choices, func(c choice) bool { return c.finish == "" }) {
		return nil, noAnswer("a choice has no finish reason")
	}
	return a, nil
}

// Sampled reports whether the engine draws the tokens of the answer at random, so
// that only its seed makes it the same again. A temperature of 0 alone prevents
// that; without one an engine has a default of its own.
func (r *Request) Sampled() bool {
	for _, m := range r.forward {
		if m.name == "temperature" {
			f, err := float(m.value)
			return err != nil || f != 0
		}
	}
	return true
}

// Conditions are those under which a request is asked again.
type Conditions struct {
	Seed   bool // the seed that the engine was given is known, also where the request has none
	Limits bool // the limits are those of then
	Tokens int  // completion tokens that may be asked for now
}

// Incomparable says why a request that is asked again may rightly have another
// answer than it had, or returns nil.
func (r *Request) Incomparable(was *Answer, c Conditions) *Comparison {
	switch bounded := r.MaxTokens > 0 || r.Kind == wire.KindCompletion; {
	case was.Kind != r.Kind || was.Model != r.Model:
		return new(Incomparable(OtherAPI, "the answer is of another API, or by another model, than the request asks for"))
	case r.Sampled() && !r.Seeded && !c.Seed:
		return new(Incomparable(NoSeed, "its tokens were drawn at random (the temperature is not 0), with a seed that nobody knows any more"))
	case was.Usage != nil && was.Usage.CompletionTokens > uint64(r.Bound(c.Tokens)):
		return new(Incomparable(Tokens, "the answer has %d tokens, and now it may have %d", was.Usage.CompletionTokens, r.Bound(c.Tokens)))
	case !bounded && !c.Limits && slices.ContainsFunc(was.choices, func(c choice) bool { return c.finish == "length" }):
		return new(Incomparable(Tokens, "the answer ended at a limit on tokens, which may have been another one then"))
	}
	return nil
}

// Compare compares two answers to one request.
func Compare(was, is *Answer) Comparison {
	switch {
	case was.Kind != is.Kind:
		return Incomparable(OtherAPI, "one is an answer of %s, the other one of %s", was.Kind, is.Kind)
	case was.Model != is.Model:
		return Incomparable(OtherModel, "they are by different models, %.80q and %.80q", was.Model, is.Model)
	}
	if d := firstDifference(was, is); d != nil {
		return Comparison{Verdict: Different, Difference: d}
	}
	return Comparison{Verdict: Same}
}

func firstDifference(was, is *Answer) *Difference {
	numbers := func(p Part, a, b uint64) *Difference {
		if a == b {
			return nil
		}
		return &Difference{Part: p, Was: strconv.FormatUint(a, 10), Is: strconv.FormatUint(b, 10)}
	}
	if d := numbers(PartChoices, uint64(len(was.choices)), uint64(len(is.choices))); d != nil {
		return d
	}
	for i := range was.choices {
		a, b := &was.choices[i], &is.choices[i]
		for _, p := range []Part{PartReasoning, PartText} {
			if x, y := a.part(p), b.part(p); !bytes.Equal(x, y) {
				return &Difference{
					Part: p, Choice: i, Offset: utf8.RuneCount(x[:parting(x, y)]),
					Was: strconv.Itoa(utf8.RuneCount(x)), Is: strconv.Itoa(utf8.RuneCount(y)),
				}
			}
		}
		if a.finish != b.finish {
			return &Difference{Part: PartFinish, Choice: i, Was: a.finish, Is: b.finish}
		}
	}
	if was.Usage == nil || is.Usage == nil {
		return nil
	}
	if d := numbers(PartPromptTokens, was.Usage.PromptTokens, is.Usage.PromptTokens); d != nil {
		return d
	}
	return numbers(PartCompletionTokens, was.Usage.CompletionTokens, is.Usage.CompletionTokens)
}

func (c *choice) part(p Part) []byte {
	if p == PartReasoning {
		return c.thoughts
	}
	return c.text
}

// parting returns where two different texts part: the byte at which the first
// character begins that is not in both.
func parting(a, b []byte) int {
	n := 0
	for n < len(a) && n < len(b) && a[n] == b[n] {
		n++
	}
	for n > 0 && (n < len(a) && !utf8.RuneStart(a[n]) || n < len(b) && !utf8.RuneStart(b[n])) {
		n--
	}
	return n
}

// around is how many bytes of text an excerpt has at most before and behind the
// place.
const around = 160

// Excerpts returns what both answers say where they part, for the eyes of whoever
// owns them; "" for what is no text.
func Excerpts(was, is *Answer, d *Difference) (a, b string) {
	if d == nil || d.Part != PartText && d.Part != PartReasoning {
		return "", ""
	}
	x, y := was.choices[d.Choice].part(d.Part), is.choices[d.Choice].part(d.Part)
	at := parting(x, y)
	cut := func(s []byte) string {
		from, to := max(0, at-around), min(len(s), at+around)
		for from > 0 && !utf8.RuneStart(s[from]) {
			from--
		}
		for to < len(s) && !utf8.RuneStart(s[to]) {
			to--
		}
		return string(s[from:to])
	}
	return cut(x), cut(y)
}
