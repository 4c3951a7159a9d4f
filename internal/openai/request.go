package openai

import (
	"bytes"
	"errors"
	"fmt"
	"math"
	"net/http"
	"regexp"
	"slices"
	"strconv"

	"github.com/resultity/node/internal/wire"
)

// Limits bound a request. What is over them is refused.
type Limits struct {
	RequestBytes int64
	Tokens       int // completion tokens that may be asked for
	Messages     int // of a chat
}

// Request is a checked request. It keeps the bytes it was made of, which must
// not change any more. It is immutable and safe to share.
type Request struct {
	Kind         wire.Kind
	Model        string
	Stream       bool
	IncludeUsage bool   // a last event of the stream has the usage
	MaxTokens    int    // completion tokens; 0 when not given
	Seeded       bool   // Seed is the client's
	Seed         uint32 // never the largest

	messages []message
	prompt   []byte   // JSON string
	forward  []member // what the engine gets as it was written
}

type message struct {
	role    string
	content []byte // JSON string or array of text parts
	name    []byte // JSON string or nil
}

type member struct {
	name  string
	value []byte
}

// Bounds beside those of the network.
const (
	maxName     = 256 // bytes of a model's name and other labels
	maxStops    = 4
	maxStop     = 1024 // bytes of a stop sequence
	maxBiases   = 1024
	maxMetadata = 16
	maxSchema   = 64 << 10 // bytes of a JSON schema
)

// defaultCompletion is the API's own default for max_tokens of a completion;
// a chat has none.
const defaultCompletion = 16

// Parse checks a request body. The error is always an [*Error].
func Parse(kind wire.Kind, body []byte, lim Limits) (*Request, error) {
	r, e := parse(kind, body, lim)
	if e != nil {
		return nil, e
	}
	return r, nil
}

func parse(kind wire.Kind, body []byte, lim Limits) (*Request, *Error) {
	if int64(len(body)) > lim.RequestBytes {
		return nil, &Error{
			Status: http.StatusRequestEntityTooLarge, Type: TypeInvalidRequest, Code: "request_too_large",
			Message: fmt.Sprintf("The request has %d bytes; this network takes at most %d.", len(body), lim.RequestBytes),
		}
	}
	if err := check(body); err != nil {
		return nil, invalid("invalid_json", "", "We could not parse the JSON body of your request: %v.", err)
	}
	if body = trim(body); body[0] != '{' {
		return nil, invalid("invalid_json", "", "We could not parse the JSON body of your request: expected an object, but got %s instead.", typeName(body))
	}
	known, ok := parameters[kind]
	if !ok {
		return nil, &Error{Status: http.StatusNotFound, Type: TypeInvalidRequest, Code: "unknown_url", Message: "Unknown API."}
	}
	p := parser{r: &Request{Kind: kind}, lim: lim}
	for name, value := range members(body) {
		read := known[string(name)]
		if read == nil {
			return nil, unknown(label(name))
		}
		if isNull(value) {
			continue
		}
		if err := read(&p, string(name), value); err != nil {
			return nil, err
		}
	}
	return p.finish()
}

// ControlToken returns the first thing in text that engines take for a control
// token, or nil: <|name|> of ChatML, Llama and their kin, the same with the wide
// bars of DeepSeek, and the brackets of Gemma and Mistral. The tags <s> and </s>
// of the oldest models are HTML too and are let through.
func ControlToken(text []byte) []byte {
	for i, c := range text {
		if c != '<' && c != '[' {
			continue
		}
		if n := controlToken(text[i:]); n > 0 {
			return text[i : i+n]
		}
	}
	return nil
}

var controlTokens = []string{
	"<start_of_turn>", "<end_of_turn>",
	"[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]",
}

// controlToken returns the length of the control token that text begins with.
func controlToken(text []byte) int {
	for _, t := range controlTokens {
		if bytes.HasPrefix(text, []byte(t)) {
			return len(t)
		}
	}
	for _, bar := range []string{"|", "｜"} {
		inner, ok := bytes.CutPrefix(text, []byte("<"+bar))
		if !ok {
			continue
		}
		n := bytes.Index(inner[:min(len(inner), 80)], []byte(bar+">"))
		if n > 0 && !bytes.ContainsAny(inner[:n], " \t\r\n<>|") {
			return len(text) - len(inner) + n + len(bar) + 1
		}
	}
	return 0
}

// ForEngine returns the request that the engine gets in place of the client's:
// always a stream with usage, under the name that the engine has for the model,
// with the seed given here if the client gave none, and for at most maxTokens.
// Equal requests give equal bytes.
func (r *Request) ForEngine(model string, seed uint32, maxTokens int) []byte {
	size := 256 + len(model) + len(r.prompt)
	for _, m := range r.messages {
		size += len(m.content) + len(m.name) + 48
	}
	for _, m := range r.forward {
		size += len(m.name) + len(m.value) + 4
	}
	b := quote(append(make([]byte, 0, size), `{"model":`...), model)
	if r.Kind == wire.KindChat {
		b = append(b, `,"messages":[`...)
		for i, m := range r.messages {
			if i > 0 {
				b = append(b, ',')
			}
			b = quote(append(b, `{"role":`...), m.role)
			b = append(append(b, `,"content":`...), m.content...)
			if m.name != nil {
				b = append(append(b, `,"name":`...), m.name...)
			}
			b = append(b, '}')
		}
		b = append(b, ']')
	} else {
		b = append(append(b, `,"prompt":`...), r.prompt...)
	}
	for _, m := range r.forward {
		b = quote(append(b, ','), m.name)
		b = append(append(b, ':'), m.value...)
	}
	if r.Seeded {
		seed = r.Seed
	}
	b = strconv.AppendUint(append(b, `,"seed":`...), uint64(foldSeed(uint64(seed))), 10)
	b = strconv.AppendInt(append(b, `,"max_tokens":`...), int64(r.Bound(maxTokens)), 10)
	return append(b, `,"stream":true,"stream_options":{"include_usage":true}}`...)
}

// Bound returns how many completion tokens the answer may have where at most
// maxTokens are allowed.
func (r *Request) Bound(maxTokens int) int {
	switch {
	case r.MaxTokens > 0:
		return min(r.MaxTokens, maxTokens)
	case r.Kind == wire.KindCompletion:
		return min(defaultCompletion, maxTokens)
	}
	return maxTokens
}

// foldSeed avoids 2³²-1, which llama.cpp takes as "choose one yourself".
func foldSeed(s uint64) uint32 { return uint32(s % math.MaxUint32) }

// parser fills a request.
type parser struct {
	r         *Request
	lim       Limits
	maxName   string // the parameter that gave MaxTokens
	streamOpt bool
	text      []byte // scratch
}

// A reader takes the value of one parameter, which is not null.
type reader func(p *parser, name string, value []byte) *Error

var parameters = func() map[wire.Kind]map[string]reader {
	common := map[string]reader{
		"model":             readModel,
		"stream":            readStream,
		"stream_options":    readStreamOptions,
		"max_tokens":        readMaxTokens,
		"temperature":       number(0, 2),
		"top_p":             number(0, 1),
		"presence_penalty":  number(-2, 2),
		"frequency_penalty": number(-2, 2),
		"stop":              readStop,
		"seed":              readSeed,
		"logit_bias":        readLogitBias,
		"user":              dropText,
		"n":                 only("1"),
	}
	chat := map[string]reader{
		"messages":              readMessages,
		"max_completion_tokens": readMaxTokens,
		"response_format":       readResponseFormat,
		"metadata":              dropMetadata,
		"safety_identifier":     dropText,
		"prompt_cache_key":      dropText,
		"store":                 only("false"),
		"logprobs":              only("false"),
		"top_logprobs":          only("0"),
		"tool_choice":           only(`"none"`),
		"modalities":            only(`["text"]`),
		"service_tier":          only(`"auto"`, `"default"`),
	}
	for _, name := range []string{
		"audio", "function_call", "functions", "moderation", "parallel_tool_calls", "prediction",
		"prompt_cache_retention", "reasoning_effort", "tools", "verbosity", "web_search_options",
	} {
		chat[name] = refuse
	}
	completion := map[string]reader{
		"prompt":   readPrompt,
		"best_of":  only("1"),
		"echo":     only("false"),
		"suffix":   only(`""`),
		"logprobs": refuse,
	}
	for name, read := range common {
		chat[name], completion[name] = read, read
	}
	return map[wire.Kind]map[string]reader{wire.KindChat: chat, wire.KindCompletion: completion}
}()

func (p *parser) finish() (*Request, *Error) {
	r := p.r
	switch {
	case r.Model == "":
		return nil, missing("model")
	case r.Kind == wire.KindChat && r.messages == nil:
		return nil, missing("messages")
	case r.Kind == wire.KindCompletion && r.prompt == nil:
		return nil, missing("prompt")
	case p.streamOpt && !r.Stream:
		return nil, wrongValue("stream_options", "it is allowed only when 'stream' is true")
	}
	return r, nil
}

func refuse(_ *parser, name string, _ []byte) *Error { return unsupported(name) }

// only takes the values that ask for what we do anyway.
func only(values ...string) reader {
	return func(_ *parser, name string, value []byte) *Error {
		if !slices.Contains(values, string(value)) {
			return invalid("unsupported_value", name, "Unsupported value: '%s' can only be %s here.", name, values[0])
		}
		return nil
	}
}

func (p *parser) pass(name string, value []byte) {
	p.r.forward = append(p.r.forward, member{name, value})
}

func number(lo, hi float64) reader {
	return func(p *parser, name string, value []byte) *Error {
		if typeName(value) != "a number" {
			return wrongType(name, "a number", value)
		}
		if f, err := float(value); err != nil || f < lo || f > hi {
			return wrongValue(name, "expected a number from %v to %v", lo, hi)
		}
		p.pass(name, value)
		return nil
	}
}

var errNumber = errors.New("not a number of ordinary length")

func float(v []byte) (float64, error) {
	if len(v) > 40 {
		return 0, errNumber
	}
	return strconv.ParseFloat(string(v), 64)
}

func readModel(p *parser, name string, value []byte) *Error {
	s, err := shortText(name, value)
	if err != nil {
		return err
	}
	if s == "" {
		return wrongValue(name, "it is empty")
	}
	p.r.Model = s
	return nil
}

func shortText(name string, value []byte) (string, *Error) {
	if value[0] != '"' {
		return "", wrongType(name, "a string", value)
	}
	s := plain(value)
	if len(s) > maxName {
		return "", wrongValue(name, "expected at most %d bytes", maxName)
	}
	return string(s), nil
}

func boolean(name string, value []byte) (bool, *Error) {
	if value[0] != 't' && value[0] != 'f' {
		return false, wrongType(name, "a boolean", value)
	}
	return value[0] == 't', nil
}

func readStream(p *parser, name string, value []byte) (err *Error) {
	p.r.Stream, err = boolean(name, value)
	return err
}

func readStreamOptions(p *parser, name string, value []byte) *Error {
	if value[0] != '{' {
		return wrongType(name, "an object", value)
	}
	p.streamOpt = true
	for option, v := range members(value) {
		full := name + "." + label(option)
		if isNull(v) {
			continue
		}
		on, err := boolean(full, v)
		if err != nil {
			return err
		}
		switch string(option) {
		case "include_usage":
			p.r.IncludeUsage = on
		case "include_obfuscation":
			if on {
				return unsupported(full)
			}
		default:
			return unknown(full)
		}
	}
	return nil
}

func readMaxTokens(p *parser, name string, value []byte) *Error {
	if p.maxName != "" {
		return wrongValue(name, "it cannot be given together with '%s'", p.maxName)
	}
	p.maxName = name
	n, err := strconv.ParseInt(string(value), 10, 64)
	switch {
	case err != nil && !errors.Is(err, strconv.ErrRange):
		return wrongType(name, "an integer", value)
	case n < 1:
		return invalid("integer_below_min_value", name, "Invalid '%s': expected a value of at least 1.", name)
	case n > int64(p.lim.Tokens):
		return invalid("integer_above_max_value", name, "%s is too large: this network gives at most %d completion tokens.", name, p.lim.Tokens)
	}
	p.r.MaxTokens = int(n)
	return nil
}

func readSeed(p *parser, name string, value []byte) *Error {
	n, err := strconv.ParseInt(string(value), 10, 64)
	if err != nil {
		return wrongType(name, "an integer of 64 bits", value)
	}
	p.r.Seeded, p.r.Seed = true, foldSeed(uint64(n))
	return nil
}

func readStop(p *parser, name string, value []byte) *Error {
	switch value[0] {
	case '"':
		if err := checkStop(name, value); err != nil {
			return err
		}
	case '[':
		n := 0
		for v := range elements(value) {
			if v[0] != '"' {
				return wrongType(name, "an array of strings", v)
			}
			if err := checkStop(name, v); err != nil {
				return err
			}
			if n++; n > maxStops {
				return invalid("array_above_max_length", name, "Invalid '%s': expected at most %d sequences.", name, maxStops)
			}
		}
		if n == 0 {
			return nil // the same as none
		}
	default:
		return wrongType(name, "a string or an array of strings", value)
	}
	p.pass(name, value)
	return nil
}

func checkStop(name string, value []byte) *Error {
	if n := len(plain(value)); n < 1 || n > maxStop {
		return wrongValue(name, "expected a sequence of 1 to %d bytes", maxStop)
	}
	return nil
}

func readLogitBias(p *parser, name string, value []byte) *Error {
	if value[0] != '{' {
		return wrongType(name, "an object", value)
	}
	n := 0
	for token, v := range members(value) {
		if _, err := strconv.ParseUint(string(token), 10, 31); err != nil {
			return wrongValue(name, "its names must be token ids")
		}
		if f, err := float(v); err != nil || f < -100 || f > 100 {
			return wrongValue(name, "its values must be numbers from -100 to 100")
		}
		if n++; n > maxBiases {
			return wrongValue(name, "expected at most %d tokens", maxBiases)
		}
	}
	if n > 0 {
		p.pass(name, value)
	}
	return nil
}

func dropText(_ *parser, name string, value []byte) *Error {
	_, err := shortText(name, value)
	return err
}

func dropMetadata(_ *parser, name string, value []byte) *Error {
	if value[0] != '{' {
		return wrongType(name, "an object", value)
	}
	n := 0
	for _, v := range members(value) {
		if v[0] != '"' {
			return wrongType(name, "an object of strings", v)
		}
		if n++; n > maxMetadata {
			return wrongValue(name, "expected at most %d entries", maxMetadata)
		}
	}
	return nil
}

func readPrompt(p *parser, name string, value []byte) *Error {
	if value[0] == '[' {
		var only []byte
		for v := range elements(value) {
			if only != nil || v[0] != '"' {
				return invalid("unsupported_value", name, "Unsupported value: '%s' must be one string; lists of prompts and token arrays are not supported by this network.", name)
			}
			only = v
		}
		if only == nil {
			return wrongValue(name, "it is empty")
		}
		value = only
	}
	if value[0] != '"' {
		return wrongType(name, "a string", value)
	}
	p.r.prompt = value
	return nil
}

func readMessages(p *parser, name string, value []byte) *Error {
	if value[0] != '[' {
		return wrongType(name, "an array of objects", value)
	}
	for v := range elements(value) {
		at := name + "[" + strconv.Itoa(len(p.r.messages)) + "]"
		if len(p.r.messages) == p.lim.Messages {
			return invalid("array_above_max_length", name, "Invalid '%s': this network takes at most %d messages.", name, p.lim.Messages)
		}
		if v[0] != '{' {
			return wrongType(at, "an object", v)
		}
		m, err := p.message(at, v)
		if err != nil {
			return err
		}
		p.r.messages = append(p.r.messages, m)
	}
	if len(p.r.messages) == 0 {
		return invalid("empty_array", name, "Invalid '%s': expected at least 1 message.", name)
	}
	return nil
}

// roles are those of a conversation in text, with the name that models know.
var roles = map[string]string{"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}

var namePattern = regexp.MustCompile(`^[A-Za-z0-9_-]{1,64}$`)

func (p *parser) message(at string, value []byte) (message, *Error) {
	var m message
	for name, v := range members(value) {
		full := at + "." + label(name)
		switch string(name) {
		case "role":
			if v[0] != '"' {
				return m, wrongType(full, "a string", v)
			}
			role := string(plain(v))
			if m.role = roles[role]; m.role == "" {
				if role == "tool" || role == "function" {
					return m, invalid("unsupported_value", full, "Unsupported value: '%s': tools are not supported by this network.", full)
				}
				return m, wrongValue(full, "expected one of 'system', 'developer', 'user' and 'assistant'")
			}
		case "content":
			if err := p.content(full, v); err != nil {
				return m, err
			}
			m.content = v
		case "name":
			if isNull(v) {
				continue
			}
			if v[0] != '"' {
				return m, wrongType(full, "a string", v)
			}
			if !namePattern.Match(plain(v)) {
				return m, wrongValue(full, "it does not match %s", namePattern)
			}
			m.name = v
		case "refusal", "annotations", "audio", "function_call", "tool_calls":
			// What our own answers hold comes back in the next request.
			if !isNull(v) && string(v) != "[]" {
				return m, unsupported(full)
			}
		case "reasoning_content":
			// Also from our answers. Models are not shown their old thoughts.
			if !isNull(v) && v[0] != '"' {
				return m, wrongType(full, "a string", v)
			}
		default:
			return m, unknown(full)
		}
	}
	switch {
	case m.role == "":
		return m, missing(at + ".role")
	case m.content == nil:
		return m, missing(at + ".content")
	}
	return m, nil
}

// content checks the text of a message, a string or an array of text parts.
// Parts are searched as one text, since that is what becomes of them.
func (p *parser) content(at string, value []byte) *Error {
	p.text = p.text[:0]
	switch value[0] {
	case '"':
		p.text = unescape(p.text, value)
	case '[':
		n := 0
		for v := range elements(value) {
			if err := p.part(at+"["+strconv.Itoa(n)+"]", v); err != nil {
				return err
			}
			n++
		}
		if n == 0 {
			return wrongValue(at, "it is empty")
		}
	default:
		return wrongType(at, "a string or an array of text parts", value)
	}
	if ControlToken(p.text) != nil {
		return invalid("control_token", at, "Invalid '%s': it holds a control token of language models, such as <|im_end|>. Put a space into it, or use the completions API to write the model's input yourself.", at)
	}
	return nil
}

func (p *parser) part(at string, value []byte) *Error {
	if value[0] != '{' {
		return wrongType(at, "an object", value)
	}
	var typ, text, other []byte
	for name, v := range members(value) {
		switch string(name) {
		case "type":
			typ = v
		case "text":
			text = v
		default:
			other = name
		}
	}
	switch {
	case typ == nil:
		return missing(at + ".type")
	case string(typ) != `"text"`:
		return invalid("unsupported_value", at+".type", "Unsupported value: '%s.type' can only be \"text\" here.", at)
	case other != nil:
		return unknown(at + "." + label(other))
	case text == nil:
		return missing(at + ".text")
	case text[0] != '"':
		return wrongType(at+".text", "a string", text)
	}
	p.text = unescape(p.text, text)
	return nil
}

func readResponseFormat(p *parser, name string, value []byte) *Error {
	if value[0] != '{' {
		return wrongType(name, "an object", value)
	}
	var typ, schema []byte
	for n, v := range members(value) {
		switch string(n) {
		case "type":
			typ = v
		case "json_schema":
			schema = v
		default:
			return unknown(name + "." + label(n))
		}
	}
	switch string(typ) {
	case "":
		return missing(name + ".type")
	case `"text"`:
		if schema != nil {
			return unknown(name + ".json_schema")
		}
		return nil
	case `"json_object"`:
		if schema != nil {
			return unknown(name + ".json_schema")
		}
	case `"json_schema"`:
		if schema == nil {
			return missing(name + ".json_schema")
		}
		if err := checkSchema(name+".json_schema", schema); err != nil {
			return err
		}
	default:
		return invalid("unsupported_value", name+".type", "Unsupported value: '%s.type' can be \"text\", \"json_object\" or \"json_schema\".", name)
	}
	p.pass(name, value)
	return nil
}

func checkSchema(at string, value []byte) *Error {
	if value[0] != '{' {
		return wrongType(at, "an object", value)
	}
	if len(value) > maxSchema {
		return wrongValue(at, "expected at most %d bytes", maxSchema)
	}
	var schema []byte
	named := false
	for n, v := range members(value) {
		full := at + "." + label(n)
		switch string(n) {
		case "name":
			if v[0] != '"' || !namePattern.Match(plain(v)) {
				return wrongValue(full, "expected a string that matches %s", namePattern)
			}
			named = true
		case "description":
			if v[0] != '"' && !isNull(v) {
				return wrongType(full, "a string", v)
			}
		case "strict":
			if !isNull(v) {
				if _, err := boolean(full, v); err != nil {
					return err
				}
			}
		case "schema":
			if v[0] != '{' {
				return wrongType(full, "an object", v)
			}
			schema = v
		default:
			return unknown(full)
		}
	}
	switch {
	case !named:
		return missing(at + ".name")
	case schema == nil:
		return missing(at + ".schema")
	}
	return walkSchema(at+".schema", schema)
}

// Engines compile a schema into a grammar. A short schema can ask for a huge
// one by its numbers, and for a file or an address by its references.
const maxRepeat = 1000

var bigRepeat = regexp.MustCompile(`[0-9]{4}`)

func walkSchema(at string, value []byte) *Error {
	switch value[0] {
	case '[':
		for v := range elements(value) {
			if err := walkSchema(at, v); err != nil {
				return err
			}
		}
	case '{':
		for n, v := range members(value) {
			switch string(n) {
			case "minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties", "minContains", "maxContains":
				if f, err := float(v); typeName(v) == "a number" && (err != nil || f > maxRepeat) {
					return wrongValue(at, "%s may be at most %d", n, maxRepeat)
				}
			case "pattern":
				if v[0] == '"' && (len(v) > maxName || bigRepeat.Match(plain(v))) {
					return wrongValue(at, "a pattern may have %d bytes and no number above 999", maxName)
				}
			case "$ref", "$dynamicRef":
				if v[0] == '"' && !bytes.HasPrefix(plain(v), []byte("#")) {
					return wrongValue(at, "%s must point into the schema itself", n)
				}
			}
			if err := walkSchema(at, v); err != nil {
				return err
			}
		}
	}
	return nil
}

// label makes a name that a client chose fit to be shown in a message.
func label(name []byte) string {
	if len(name) > 40 {
		name = name[:40]
	}
	return string(bytes.Map(func(r rune) rune {
		if r < ' ' || r > '~' || r == '\'' {
			return '?'
		}
		return r
	}, name))
}
