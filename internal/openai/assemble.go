package openai

import (
	"bytes"
	"fmt"
	"math"
	"strconv"

	"github.com/resultity/node/internal/receipt"
	"github.com/resultity/node/internal/wire"
)

// Usage is what a job has cost, in tokens.
type Usage struct {
	PromptTokens     uint64
	CompletionTokens uint64
}

// Reason names the promise of the API that an engine's output breaks.
type Reason string

// The reasons.
const (
	ReasonNoStream    Reason = "not_a_stream"        // no event stream, or one that breaks its form
	ReasonJSON        Reason = "not_json"            // an event is not JSON, or not UTF-8
	ReasonObject      Reason = "wrong_object"        // an event of another API
	ReasonChoices     Reason = "wrong_choices"       // no choice, several, or one that was not asked for
	ReasonDelta       Reason = "wrong_delta"         // a choice without its text, or with what is no text
	ReasonFinish      Reason = "wrong_finish_reason" // one that the API does not have
	ReasonUnfinished  Reason = "no_finish_reason"    // ended without one
	ReasonAfterFinish Reason = "text_after_finish"   // went on after it
	ReasonUsage       Reason = "wrong_usage"         // tokens that do not add up, or too early
	ReasonNoUsage     Reason = "no_usage"            // ended without it
	ReasonAfterDone   Reason = "data_after_done"     // went on after [DONE]
	ReasonNotDone     Reason = "no_done"             // ended without [DONE]
	ReasonTooLarge    Reason = "response_too_large"  // over the network's limit
)

// OutputError says that an engine's output is not what its API promises. It
// holds nothing of the output.
type OutputError struct {
	Reason Reason
	Detail string // for people
}

func (e *OutputError) Error() string {
	return fmt.Sprintf("engine output: %s: %s", e.Reason, e.Detail)
}

// ReportedError says that an engine has sent an error in place of output, which its
// API lets it do.
type ReportedError struct {
	Code string // a number, or ""; the engine's words may quote the prompt
}

func (e *ReportedError) Error() string {
	if e.Code == "" {
		return "the engine reports an error without a code"
	}
	return "the engine reports an error " + e.Code
}

func output(r Reason, format string, args ...any) error {
	return &OutputError{Reason: r, Detail: fmt.Sprintf(format, args...)}
}

// Assembler writes the response to one request from the events of the engine's
// stream. It checks each event and copies only text, finish reason and token
// counts; the rest is the job's. Not safe for concurrent use.
//
// A stream is, in this order: for a chat one event with the role, an event for
// each engine event that has text, one with the finish reason, one with the
// usage if it was asked for, and [DONE].
type Assembler struct {
	chat         bool
	stream       bool
	includeUsage bool
	maxBytes     int64
	head         []byte // of every event, up to the choices

	body     []byte // what is written of the response
	thoughts []byte // of a plain answer, escaped
	scratch  []byte
	begun    bool
	pieces   int    // texts that are not empty
	finish   string // finish reason, "" before
	usage    *Usage
	done     bool
	err      error // the first; it stays
}

// NewAssembler begins the response to a job: a plain object or a stream, of at
// most maxBytes.
func NewAssembler(kind wire.Kind, id receipt.JobID, model string, created int64, stream, includeUsage bool, maxBytes int64) *Assembler {
	a := &Assembler{chat: kind == wire.KindChat, stream: stream, includeUsage: stream && includeUsage, maxBytes: maxBytes}
	prefix, object := "cmpl-", "text_completion"
	switch {
	case a.chat && stream:
		prefix, object = "chatcmpl-", "chat.completion.chunk"
	case a.chat:
		prefix, object = "chatcmpl-", "chat.completion"
	}
	h := make([]byte, 0, 160+len(model))
	if stream {
		h = append(h, "data: "...)
	}
	h = append(append(append(h, `{"id":"`...), prefix...), id.String()...)
	h = append(append(append(h, `","object":"`...), object...), `","created":`...)
	h = append(strconv.AppendInt(h, created, 10), `,"model":`...)
	a.head = append(quote(h, model), `,"choices":[`...)
	if !stream {
		a.body = append(make([]byte, 0, 1024), a.head...)
		if a.chat {
			a.body = append(a.body, `{"index":0,"message":{"role":"assistant","content":"`...)
		} else {
			a.body = append(a.body, `{"text":"`...)
		}
	}
	return a
}

// Event takes the data of one event of the engine's stream, [DONE] included.
// It returns what the event adds to our own stream: nil when it adds nothing,
// and always for a plain response. The bytes stay valid and must not be changed.
// Any error is an [*OutputError] or a [*ReportedError], and all further calls
// return it too.
func (a *Assembler) Event(data []byte) ([]byte, error) {
	if a.err != nil {
		return nil, a.err
	}
	start := len(a.body)
	if a.err = a.event(data); a.err == nil && int64(len(a.body)+len(a.thoughts)) > a.maxBytes {
		a.err = a.tooLarge()
	}
	if a.err != nil {
		return nil, a.err
	}
	if !a.stream || len(a.body) == start {
		return nil, nil
	}
	return a.body[start:len(a.body):len(a.body)], nil
}

// Pieces returns how many pieces of text there have been. None has less than a
// token, so that an answer without end shows before it has filled its bounds.
func (a *Assembler) Pieces() int { return a.pieces }

// Done reports whether [DONE] has come: nothing may follow.
func (a *Assembler) Done() bool { return a.done }

// Finish ends the response after the engine's stream has ended, and returns
// all of it. It is to be called once.
func (a *Assembler) Finish() ([]byte, Usage, error) {
	switch {
	case a.err != nil:
	case !a.done:
		a.err = output(ReasonNotDone, "the stream ended without [DONE]")
	case !a.stream:
		a.closePlain()
		if int64(len(a.body)) > a.maxBytes {
			a.err = a.tooLarge()
		}
	}
	if a.err != nil {
		return nil, Usage{}, a.err
	}
	return a.body, *a.usage, nil
}

func (a *Assembler) tooLarge() error {
	return output(ReasonTooLarge, "more than %d bytes", a.maxBytes)
}

// event is what one event says.
type event struct {
	object  []byte
	choices []byte // array or nil
	usage   []byte // object or nil
}

func (a *Assembler) event(data []byte) error {
	data = trim(data)
	if a.done {
		return output(ReasonAfterDone, "an event after [DONE]")
	}
	if string(data) == "[DONE]" {
		return a.end()
	}
	if err := check(data); err != nil {
		return output(ReasonJSON, "an event is %v", err)
	}
	if data[0] != '{' {
		return output(ReasonObject, "an event is %s", typeName(data))
	}
	var e event
	for name, v := range members(data) {
		switch {
		case isNull(v):
		case string(name) == "error":
			return &ReportedError{errorCode(v)}
		case string(name) == "object":
			e.object = v
		case string(name) == "choices":
			e.choices = v
		case string(name) == "usage":
			e.usage = v
		}
	}
	want := `"text_completion"`
	if a.chat {
		want = `"chat.completion.chunk"`
	}
	if string(e.object) != want {
		return output(ReasonObject, "an event is not of type %s", want)
	}
	if e.choices == nil || e.choices[0] != '[' {
		return output(ReasonChoices, "an event has no array of choices")
	}
	n := 0
	for c := range elements(e.choices) {
		if n++; n > 1 {
			return output(ReasonChoices, "an event has several choices")
		}
		if err := a.choice(c); err != nil {
			return err
		}
	}
	if e.usage != nil {
		return a.count(e.usage)
	}
	if n == 0 {
		return output(ReasonChoices, "an event has neither a choice nor usage")
	}
	return nil
}

func (a *Assembler) choice(v []byte) error {
	if v[0] != '{' {
		return output(ReasonChoices, "a choice is %s", typeName(v))
	}
	var index, delta, text, finish []byte
	for name, v := range members(v) {
		switch string(name) {
		case "index":
			index = v
		case "delta":
			delta = v
		case "text":
			text = v
		case "finish_reason":
			finish = v
		}
	}
	if string(index) != "0" {
		return output(ReasonChoices, "a choice has not the index 0")
	}
	var thought []byte
	if a.chat {
		if delta == nil || delta[0] != '{' {
			return output(ReasonDelta, "a choice has no delta")
		}
		var err error
		if text, thought, err = readDelta(delta); err != nil {
			return err
		}
	} else if text == nil || text[0] != '"' {
		return output(ReasonDelta, "a choice has no text")
	}
	if a.finish != "" {
		return output(ReasonAfterFinish, "a choice after the finish reason")
	}
	a.begin()
	if thought != nil {
		a.write(thought, true)
	}
	if text != nil {
		a.write(text, false)
	}
	if finish == nil || isNull(finish) {
		return nil
	}
	switch string(finish) {
	case `"stop"`, `"length"`, `"content_filter"`:
	default:
		return output(ReasonFinish, "the finish reason is none of stop, length and content_filter")
	}
	a.finish = string(finish[1 : len(finish)-1])
	if a.stream {
		if a.chat {
			a.chunk(`{"index":0,"delta":{},"logprobs":null,"finish_reason":"`, a.finish, `"}`)
		} else {
			a.chunk(`{"text":"","index":0,"logprobs":null,"finish_reason":"`, a.finish, `"}`)
		}
	}
	return nil
}

// readDelta returns the strings that a delta has, nil where it has none.
func readDelta(v []byte) (text, thought []byte, err error) {
	for name, v := range members(v) {
		if isNull(v) {
			continue
		}
		switch string(name) {
		case "content":
			text = v
		case "reasoning_content", "reasoning": // vLLM uses both names, Ollama the latter
			thought = v
		case "role":
			if string(v) != `"assistant"` {
				return nil, nil, output(ReasonDelta, "the role is not assistant")
			}
			continue
		case "refusal", "tool_calls", "function_call", "audio":
			if s := string(v); s == "[]" || s == `""` {
				continue
			}
			return nil, nil, output(ReasonDelta, "a delta has %s, which nobody asked for", name)
		default:
			continue
		}
		if v[0] != '"' {
			return nil, nil, output(ReasonDelta, "the text of a delta is %s", typeName(v))
		}
	}
	return text, thought, nil
}

func (a *Assembler) begin() {
	if a.begun {
		return
	}
	a.begun = true
	if a.stream && a.chat {
		a.chunk(`{"index":0,"delta":{"role":"assistant","content":"","refusal":null},"logprobs":null,"finish_reason":null}`)
	}
}

// write adds the text of a JSON string. Engines differ in what they escape;
// we do not.
func (a *Assembler) write(v []byte, thought bool) {
	text := v[1 : len(v)-1]
	if bytes.IndexByte(text, '\\') >= 0 {
		a.scratch = unescape(a.scratch[:0], v)
		text = a.scratch
	}
	if len(text) > 0 {
		a.pieces++
	}
	switch {
	case len(text) == 0:
	case a.stream:
		a.body = append(a.body, a.head...)
		switch {
		case thought:
			a.body = append(a.body, `{"index":0,"delta":{"reasoning_content":"`...)
		case a.chat:
			a.body = append(a.body, `{"index":0,"delta":{"content":"`...)
		default:
			a.body = append(a.body, `{"text":"`...)
		}
		a.body = escape(a.body, text)
		if a.chat {
			a.body = append(a.body, `"},"logprobs":null,"finish_reason":null}`...)
		} else {
			a.body = append(a.body, `","index":0,"logprobs":null,"finish_reason":null}`...)
		}
		a.endChunk()
	case thought:
		a.thoughts = escape(a.thoughts, text)
	default:
		a.body = escape(a.body, text)
	}
}

// chunk writes an event with one choice, given in pieces.
func (a *Assembler) chunk(choice ...string) {
	a.body = append(a.body, a.head...)
	for _, s := range choice {
		a.body = append(a.body, s...)
	}
	a.endChunk()
}

func (a *Assembler) endChunk() {
	if a.includeUsage {
		a.body = append(a.body, `],"usage":null}`...)
	} else {
		a.body = append(a.body, "]}"...)
	}
	a.body = append(a.body, "\n\n"...)
}

// count takes the usage, which is due once, when the choice has ended.
func (a *Assembler) count(v []byte) error {
	switch {
	case v[0] != '{':
		return output(ReasonUsage, "usage is %s", typeName(v))
	case a.finish == "":
		return output(ReasonUsage, "usage before the finish reason")
	case a.usage != nil:
		return output(ReasonUsage, "usage twice")
	}
	var n [3]uint64
	var have [3]bool
	for name, v := range members(v) {
		i := 0
		switch string(name) {
		case "prompt_tokens":
		case "completion_tokens":
			i = 1
		case "total_tokens":
			i = 2
		default:
			continue
		}
		k, err := strconv.ParseUint(string(v), 10, 64)
		if err != nil || k > math.MaxInt32 {
			return output(ReasonUsage, "%s is not a number of tokens", name)
		}
		n[i], have[i] = k, true
	}
	if have != [3]bool{true, true, true} || n[0]+n[1] != n[2] {
		return output(ReasonUsage, "prompt, completion and total tokens do not add up")
	}
	a.usage = &Usage{PromptTokens: n[0], CompletionTokens: n[1]}
	if a.includeUsage {
		a.body = append(a.body, a.head...)
		a.body = append(a.usage.append(append(a.body, `],"usage":`...)), "}\n\n"...)
	}
	return nil
}

func (u *Usage) append(b []byte) []byte {
	b = strconv.AppendUint(append(b, `{"prompt_tokens":`...), u.PromptTokens, 10)
	b = strconv.AppendUint(append(b, `,"completion_tokens":`...), u.CompletionTokens, 10)
	b = strconv.AppendUint(append(b, `,"total_tokens":`...), u.PromptTokens+u.CompletionTokens, 10)
	return append(b, '}')
}

func (a *Assembler) end() error {
	switch {
	case a.finish == "":
		return output(ReasonUnfinished, "[DONE] without a finish reason")
	case a.usage == nil:
		return output(ReasonNoUsage, "[DONE] without usage")
	}
	a.done = true
	if a.stream {
		a.body = append(a.body, "data: [DONE]\n\n"...)
	}
	return nil
}

// closePlain writes what follows the text.
func (a *Assembler) closePlain() {
	b := a.body
	if a.chat {
		if len(a.thoughts) > 0 {
			b = append(append(b, `","reasoning_content":"`...), a.thoughts...)
		}
		b = append(b, `","refusal":null},"logprobs":null,"finish_reason":"`...)
	} else {
		b = append(b, `","index":0,"logprobs":null,"finish_reason":"`...)
	}
	b = append(append(b, a.finish...), `"}],"usage":`...)
	a.body = append(a.usage.append(b), '}')
}

// errorCode returns the number in an error object, "" where there is none.
func errorCode(v []byte) string {
	if v[0] != '{' {
		return ""
	}
	for name, v := range members(v) {
		if string(name) == "code" && len(v) <= 40 && typeName(v) == "a number" {
			return string(v)
		}
	}
	return ""
}
