package openai

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/resultity/node/internal/wire"
)

var limits = Limits{RequestBytes: 1 << 17, Tokens: 1000, Messages: 8}

const hi = `"messages":[{"role":"user","content":"hi"}]`

// engine returns what the engine is asked when a client sends body.
func engine(t *testing.T, kind wire.Kind, body string) string {
	t.Helper()
	r, err := Parse(kind, []byte(body), limits)
	if err != nil {
		t.Errorf("%s: %v", body, err)
		return ""
	}
	return string(r.ForEngine("engine-name", 7, 100))
}

const end = `"stream":true,"stream_options":{"include_usage":true}}`

func TestForEngine(t *testing.T) {
	for _, tt := range []struct{ name, body, want string }{
		{"least", `{"model":"m",` + hi + `}`,
			`{"model":"engine-name",` + hi + `,"seed":7,"max_tokens":100,` + end},
		{"everything", ` { "top_p" : 0.10 , "model":"m", "messages" : [ {"content":"a\u00e9\n","role":"developer","name":"x"}, {"role":"assistant","content":[{"type":"text","text":"b"}]} ],
			"temperature":1e0, "stop":["a","b"], "presence_penalty":-2, "frequency_penalty":2.0, "logit_bias":{"12":-100},
			"response_format":{"type":"json_schema","json_schema":{"name":"n","strict":true,"schema":{"type":"object","maxProperties":3}}},
			"n":1, "seed":0, "max_completion_tokens":5, "user":"u", "metadata":{"k":"v"}, "store":false, "logprobs":false, "service_tier":"auto",
			"safety_identifier":"s", "prompt_cache_key":"p", "stream":true, "stream_options":{"include_usage":false} } `,
			`{"model":"engine-name","messages":[{"role":"system","content":"a\u00e9\n","name":"x"},{"role":"assistant","content":[{"type":"text","text":"b"}]}]` +
				`,"top_p":0.10,"temperature":1e0,"stop":["a","b"],"presence_penalty":-2,"frequency_penalty":2.0,"logit_bias":{"12":-100}` +
				`,"response_format":{"type":"json_schema","json_schema":{"name":"n","strict":true,"schema":{"type":"object","maxProperties":3}}}` +
				`,"seed":0,"max_tokens":5,` + end},
		{"nulls", `{"model":"m",` + hi + `,"temperature":null,"tools":null,"stop":null,"seed":null,"max_tokens":null,"max_completion_tokens":3,"stream":null,"stream_options":null,"response_format":null,"n":null}`,
			`{"model":"engine-name",` + hi + `,"seed":7,"max_tokens":3,` + end},
		{"nothing asked for", `{"model":"m",` + hi + `,"stop":[],"logit_bias":{},"response_format":{"type":"text"},"stream":false}`,
			`{"model":"engine-name",` + hi + `,"seed":7,"max_tokens":100,` + end},
		{"our own answer comes back", `{"model":"m","messages":[{"role":"user","content":"hi"},{"role":"assistant","content":"yes","refusal":null,"tool_calls":[],"annotations":[],"reasoning_content":"hm"},{"role":"user","content":"ok"}]}`,
			`{"model":"engine-name","messages":[{"role":"user","content":"hi"},{"role":"assistant","content":"yes"},{"role":"user","content":"ok"}],"seed":7,"max_tokens":100,` + end},
		{"asks for more than is left", `{"model":"m",` + hi + `,"max_tokens":1000}`,
			`{"model":"engine-name",` + hi + `,"seed":7,"max_tokens":100,` + end},
		{"negative seed", `{"model":"m",` + hi + `,"seed":-1}`,
			`{"model":"engine-name",` + hi + `,"seed":0,"max_tokens":100,` + end},
		{"the seed that means random", `{"model":"m",` + hi + `,"seed":4294967295}`,
			`{"model":"engine-name",` + hi + `,"seed":0,"max_tokens":100,` + end},
		{"largest seed", `{"model":"m",` + hi + `,"seed":9223372036854775807}`,
			`{"model":"engine-name",` + hi + `,"seed":2147483647,"max_tokens":100,` + end},
	} {
		if got := engine(t, wire.KindChat, tt.body); got != tt.want {
			t.Errorf("%s:\ngot  %s\nwant %s", tt.name, got, tt.want)
		}
	}
	for _, tt := range []struct{ body, want string }{
		{`{"model":"m","prompt":"a <|im_end|> b"}`, `{"model":"engine-name","prompt":"a <|im_end|> b","seed":7,"max_tokens":16,` + end},
		{`{"model":"m","prompt":["x"],"max_tokens":50,"best_of":1,"echo":false,"suffix":"","logprobs":null}`, `{"model":"engine-name","prompt":"x","seed":7,"max_tokens":50,` + end},
	} {
		if got := engine(t, wire.KindCompletion, tt.body); got != tt.want {
			t.Errorf("got  %s\nwant %s", got, tt.want)
		}
	}
	r, err := Parse(wire.KindChat, []byte(`{"model":"m",`+hi+`}`), limits)
	if err != nil {
		t.Fatal(err)
	}
	if got := string(r.ForEngine("m", 1<<32-1, 1)); !strings.Contains(got, `"seed":0,"max_tokens":1,`) {
		t.Errorf("the network's seed was passed on as random: %s", got)
	}
}

func TestRequestFields(t *testing.T) {
	r, err := Parse(wire.KindChat, []byte(`{"model":"org/m:1",`+hi+`,"stream":true,"stream_options":{"include_usage":true,"include_obfuscation":false},"max_tokens":9,"seed":4}`), limits)
	if err != nil {
		t.Fatal(err)
	}
	if r.Kind != wire.KindChat || r.Model != "org/m:1" || !r.Stream || !r.IncludeUsage || r.MaxTokens != 9 || !r.Seeded || r.Seed != 4 {
		t.Errorf("%+v", r)
	}
	if r.Bound(5) != 5 || r.Bound(50) != 9 {
		t.Errorf("bounds %d and %d", r.Bound(5), r.Bound(50))
	}
}

func TestParseRefuses(t *testing.T) {
	with := func(s string) string { return `{"model":"m",` + hi + `,` + s + `}` }
	msg := func(s string) string { return `{"model":"m","messages":[` + s + `]}` }
	schema := func(s string) string {
		return with(`"response_format":{"type":"json_schema","json_schema":{"name":"n","schema":` + s + `}}`)
	}
	pattern := func(n int) string { return `{"pattern":"` + strings.Repeat("a", n-2) + `"}` } // with its quotes
	sized := func(n int) string {
		empty := `{"name":"n","schema":{"a":""}}`
		return schema(`{"a":"` + strings.Repeat("a", n-len(empty)) + `"}`)
	}
	for _, body := range []string{
		strings.Replace(with(`"n":1`), `"m"`, `"`+strings.Repeat("m", maxName)+`"`, 1),
		with(`"stop":[` + entries(maxStops, `"%d"`) + `]`),
		with(`"stop":"` + strings.Repeat("x", maxStop) + `"`),
		with(`"logit_bias":{` + entries(maxBiases, `"%d":1`) + `}`),
		with(`"metadata":{` + entries(maxMetadata, `"%d":"x"`) + `}`),
		schema(fmt.Sprintf(`{"items":[{"maxLength":%d}]}`, maxRepeat)),
		schema(pattern(maxName)),
		sized(maxSchema),
	} {
		if _, err := Parse(wire.KindChat, []byte(body), limits); err != nil {
			t.Errorf("%.100s: at the bound: %v", body, err)
		}
	}
	for _, tt := range []struct{ code, param, body string }{
		{"invalid_json", "", ``},
		{"invalid_json", "", `{"model":"m"`},
		{"invalid_json", "", `[]`},
		{"invalid_json", "", `null`},
		{"invalid_json", "", with(`"user":"` + "\xff" + `"`)},
		{"invalid_json", "", with(`"temperature":1,"temperature":2`)},
		{"invalid_json", "", with(`"model":"other"`)},
		{"invalid_json", "", with(`"x":` + strings.Repeat("[", 100) + strings.Repeat("]", 100))},
		{"invalid_json", "", msg(`{"role":"user","content":"\ud800"}`)},
		{"unknown_parameter", "foo", with(`"foo":1`)},
		{"unknown_parameter", "Model", with(`"Model":"n"`)},
		{"unknown_parameter", "top_k", with(`"top_k":1`)},
		{"unknown_parameter", "grammar", with(`"grammar":null`)},
		{"unknown_parameter", "prompt", with(`"prompt":"x"`)},
		{"unknown_parameter", "a?b?" + strings.Repeat("c", 36), with(`"a\nb'` + strings.Repeat("c", 99) + `":1`)},
		{"missing_required_parameter", "model", `{` + hi + `}`},
		{"missing_required_parameter", "model", `{"model":null,` + hi + `}`},
		{"invalid_type", "model", `{"model":1,` + hi + `}`},
		{"invalid_value", "model", `{"model":"",` + hi + `}`},
		{"invalid_value", "model", `{"model":"` + strings.Repeat("m", maxName+1) + `",` + hi + `}`},
		{"invalid_type", "stream", with(`"stream":1`)},
		{"invalid_type", "stream_options", with(`"stream":true,"stream_options":[]`)},
		{"invalid_value", "stream_options", with(`"stream_options":{}`)},
		{"invalid_type", "stream_options.include_usage", with(`"stream":true,"stream_options":{"include_usage":1}`)},
		{"unsupported_parameter", "stream_options.include_obfuscation", with(`"stream":true,"stream_options":{"include_obfuscation":true}`)},
		{"unknown_parameter", "stream_options.x", with(`"stream":true,"stream_options":{"x":true}`)},
		{"invalid_type", "temperature", with(`"temperature":"hot"`)},
		{"invalid_value", "temperature", with(`"temperature":2.01`)},
		{"invalid_value", "temperature", with(`"temperature":-0.1`)},
		{"invalid_value", "temperature", with(`"temperature":1e999`)},
		{"invalid_value", "temperature", with(`"temperature":0.` + strings.Repeat("0", 99))},
		{"invalid_value", "top_p", with(`"top_p":1.5`)},
		{"invalid_value", "presence_penalty", with(`"presence_penalty":3`)},
		{"invalid_value", "frequency_penalty", with(`"frequency_penalty":-3`)},
		{"integer_below_min_value", "max_tokens", with(`"max_tokens":0`)},
		{"integer_below_min_value", "max_tokens", with(`"max_tokens":-5`)},
		{"integer_above_max_value", "max_tokens", with(`"max_tokens":1001`)},
		{"integer_above_max_value", "max_tokens", with(`"max_tokens":99999999999999999999`)},
		{"integer_above_max_value", "max_completion_tokens", with(`"max_completion_tokens":1001`)},
		{"invalid_type", "max_tokens", with(`"max_tokens":1.5`)},
		{"invalid_type", "max_tokens", with(`"max_tokens":"x"`)},
		{"invalid_value", "max_tokens", with(`"max_completion_tokens":5,"max_tokens":5`)},
		{"invalid_type", "seed", with(`"seed":1.5`)},
		{"invalid_type", "seed", with(`"seed":9223372036854775808`)},
		{"invalid_type", "stop", with(`"stop":1`)},
		{"invalid_type", "stop", with(`"stop":[1]`)},
		{"invalid_value", "stop", with(`"stop":""`)},
		{"invalid_value", "stop", with(`"stop":["` + strings.Repeat("x", maxStop+1) + `"]`)},
		{"array_above_max_length", "stop", with(`"stop":[` + entries(maxStops+1, `"%d"`) + `]`)},
		{"invalid_type", "logit_bias", with(`"logit_bias":[]`)},
		{"invalid_value", "logit_bias", with(`"logit_bias":{"x":1}`)},
		{"invalid_value", "logit_bias", with(`"logit_bias":{"-1":1}`)},
		{"invalid_value", "logit_bias", with(`"logit_bias":{"1":101}`)},
		{"invalid_value", "logit_bias", with(`"logit_bias":{"1":"1"}`)},
		{"invalid_value", "logit_bias", with(`"logit_bias":{` + entries(maxBiases+1, `"%d":1`) + `}`)},
		{"invalid_type", "user", with(`"user":1`)},
		{"invalid_value", "user", with(`"user":"` + strings.Repeat("u", maxName+1) + `"`)},
		{"invalid_type", "metadata", with(`"metadata":[]`)},
		{"invalid_type", "metadata", with(`"metadata":{"a":1}`)},
		{"invalid_value", "metadata", with(`"metadata":{` + entries(maxMetadata+1, `"%d":"x"`) + `}`)},
		{"unsupported_value", "n", with(`"n":2`)},
		{"unsupported_value", "store", with(`"store":true`)},
		{"unsupported_value", "logprobs", with(`"logprobs":true`)},
		{"unsupported_value", "top_logprobs", with(`"top_logprobs":1`)},
		{"unsupported_value", "tool_choice", with(`"tool_choice":"auto"`)},
		{"unsupported_value", "modalities", with(`"modalities":["text","audio"]`)},
		{"unsupported_value", "service_tier", with(`"service_tier":"priority"`)},
		{"unsupported_parameter", "tools", with(`"tools":[]`)},
		{"unsupported_parameter", "functions", with(`"functions":[]`)},
		{"unsupported_parameter", "audio", with(`"audio":{}`)},
		{"unsupported_parameter", "reasoning_effort", with(`"reasoning_effort":"low"`)},
		{"invalid_type", "response_format", with(`"response_format":"json"`)},
		{"missing_required_parameter", "response_format.type", with(`"response_format":{}`)},
		{"unsupported_value", "response_format.type", with(`"response_format":{"type":"grammar"}`)},
		{"unknown_parameter", "response_format.schema", with(`"response_format":{"type":"json_object","schema":{}}`)},
		{"unknown_parameter", "response_format.json_schema", with(`"response_format":{"type":"text","json_schema":{}}`)},
		{"unknown_parameter", "response_format.json_schema", with(`"response_format":{"type":"json_object","json_schema":{}}`)},
		{"missing_required_parameter", "response_format.json_schema", with(`"response_format":{"type":"json_schema"}`)},
		{"invalid_type", "response_format.json_schema", with(`"response_format":{"type":"json_schema","json_schema":1}`)},
		{"missing_required_parameter", "response_format.json_schema.name", with(`"response_format":{"type":"json_schema","json_schema":{"schema":{}}}`)},
		{"missing_required_parameter", "response_format.json_schema.schema", with(`"response_format":{"type":"json_schema","json_schema":{"name":"n"}}`)},
		{"invalid_value", "response_format.json_schema.name", with(`"response_format":{"type":"json_schema","json_schema":{"name":"a b","schema":{}}}`)},
		{"unknown_parameter", "response_format.json_schema.x", with(`"response_format":{"type":"json_schema","json_schema":{"name":"n","schema":{},"x":1}}`)},
		{"invalid_type", "response_format.json_schema.strict", with(`"response_format":{"type":"json_schema","json_schema":{"name":"n","schema":{},"strict":1}}`)},
		{"invalid_type", "response_format.json_schema.description", with(`"response_format":{"type":"json_schema","json_schema":{"name":"n","schema":{},"description":1}}`)},
		{"invalid_type", "response_format.json_schema.schema", schema(`true`)},
		{"invalid_value", "response_format.json_schema.schema", schema(fmt.Sprintf(`{"items":[{"maxLength":%d}]}`, maxRepeat+1))},
		{"invalid_value", "response_format.json_schema.schema", schema(`{"properties":{"a":{"minItems":1e9}}}`)},
		{"invalid_value", "response_format.json_schema.schema", schema(`{"pattern":"a{1000}"}`)},
		{"invalid_value", "response_format.json_schema.schema", schema(pattern(maxName + 1))},
		{"invalid_value", "response_format.json_schema.schema", schema(`{"$ref":"https://example.com/x"}`)},
		{"invalid_value", "response_format.json_schema", sized(maxSchema + 1)},
		{"missing_required_parameter", "messages", `{"model":"m"}`},
		{"missing_required_parameter", "messages", `{"model":"m","messages":null}`},
		{"invalid_type", "messages", `{"model":"m","messages":"hi"}`},
		{"empty_array", "messages", msg(``)},
		{"array_above_max_length", "messages", msg(strings.Repeat(`{"role":"user","content":"a"},`, 8) + `{"role":"user","content":"a"}`)},
		{"invalid_type", "messages[0]", msg(`"hi"`)},
		{"missing_required_parameter", "messages[0].role", msg(`{"content":"a"}`)},
		{"missing_required_parameter", "messages[1].content", msg(`{"role":"user","content":"a"},{"role":"user"}`)},
		{"invalid_type", "messages[0].role", msg(`{"role":null,"content":"a"}`)},
		{"invalid_value", "messages[0].role", msg(`{"role":"root","content":"a"}`)},
		{"unsupported_value", "messages[0].role", msg(`{"role":"tool","content":"a"}`)},
		{"invalid_type", "messages[0].content", msg(`{"role":"assistant","content":null}`)},
		{"invalid_type", "messages[0].content", msg(`{"role":"user","content":1}`)},
		{"invalid_value", "messages[0].content", msg(`{"role":"user","content":[]}`)},
		{"invalid_type", "messages[0].content[0]", msg(`{"role":"user","content":["a"]}`)},
		{"missing_required_parameter", "messages[0].content[0].type", msg(`{"role":"user","content":[{"text":"a"}]}`)},
		{"missing_required_parameter", "messages[0].content[0].text", msg(`{"role":"user","content":[{"type":"text"}]}`)},
		{"invalid_type", "messages[0].content[0].text", msg(`{"role":"user","content":[{"type":"text","text":1}]}`)},
		{"unsupported_value", "messages[0].content[1].type", msg(`{"role":"user","content":[{"type":"text","text":"a"},{"type":"image_url","image_url":{"url":"http://x"}}]}`)},
		{"unknown_parameter", "messages[0].content[0].x", msg(`{"role":"user","content":[{"type":"text","text":"a","x":1}]}`)},
		{"invalid_type", "messages[0].name", msg(`{"role":"user","content":"a","name":1}`)},
		{"invalid_value", "messages[0].name", msg(`{"role":"user","content":"a","name":"a b"}`)},
		{"unsupported_parameter", "messages[0].tool_calls", msg(`{"role":"assistant","content":"a","tool_calls":[{}]}`)},
		{"invalid_type", "messages[0].reasoning_content", msg(`{"role":"assistant","content":"a","reasoning_content":1}`)},
		{"unknown_parameter", "messages[0].prefix", msg(`{"role":"assistant","content":"a","prefix":true}`)},
		{"control_token", "messages[0].content", msg(`{"role":"user","content":"a<|im_end|>b"}`)},
		{"control_token", "messages[0].content", msg(`{"role":"user","content":"a\u003c|im_start|\u003eb"}`)},
		{"control_token", "messages[0].content", msg(`{"role":"user","content":[{"type":"text","text":"<|im_"},{"type":"text","text":"end|>"}]}`)},
	} {
		refused(t, wire.KindChat, tt.body, http.StatusBadRequest, tt.code, tt.param)
	}
	for _, tt := range []struct{ code, param, body string }{
		{"missing_required_parameter", "prompt", `{"model":"m"}`},
		{"invalid_type", "prompt", `{"model":"m","prompt":1}`},
		{"invalid_value", "prompt", `{"model":"m","prompt":[]}`},
		{"unsupported_value", "prompt", `{"model":"m","prompt":["a","b"]}`},
		{"unsupported_value", "prompt", `{"model":"m","prompt":[1,2]}`},
		{"unsupported_value", "prompt", `{"model":"m","prompt":[[1]]}`},
		{"unsupported_value", "best_of", `{"model":"m","prompt":"a","best_of":2}`},
		{"unsupported_value", "echo", `{"model":"m","prompt":"a","echo":true}`},
		{"unsupported_value", "suffix", `{"model":"m","prompt":"a","suffix":"b"}`},
		{"unsupported_parameter", "logprobs", `{"model":"m","prompt":"a","logprobs":0}`},
		{"unknown_parameter", "messages", `{"model":"m","prompt":"a",` + hi + `}`},
		{"unknown_parameter", "max_completion_tokens", `{"model":"m","prompt":"a","max_completion_tokens":1}`},
	} {
		refused(t, wire.KindCompletion, tt.body, http.StatusBadRequest, tt.code, tt.param)
	}
	refused(t, wire.KindChat, with(`"user":"`+strings.Repeat("u", 1<<17)+`"`), http.StatusRequestEntityTooLarge, "request_too_large", "")
	refused(t, "embedding", with(`"n":1`), http.StatusNotFound, "unknown_url", "")
}

// entries lists n members of an object.
func entries(n int, form string) string {
	var e []string
	for i := range n {
		e = append(e, fmt.Sprintf(form, i))
	}
	return strings.Join(e, ",")
}

func refused(t *testing.T, kind wire.Kind, body string, status int, code, param string) {
	t.Helper()
	r, err := Parse(kind, []byte(body), limits)
	var e *Error
	if !errors.As(err, &e) || r != nil {
		t.Errorf("%.200s: got %v, want code %s", body, err, code)
		return
	}
	t.Logf("%.60q: expected: %s %s; got: %s %s", body, code, param, e.Code, e.Message)
	if e.Status != status || e.Code != code || e.Param != param || e.Type != TypeInvalidRequest {
		t.Errorf("%.200s:\ngot %d %s %q (%s), want %d %s %q", body, e.Status, e.Code, e.Param, e.Message, status, code, param)
	}
	if len(e.Message) < 10 || len(e.Message) > 300 {
		t.Errorf("message %q", e.Message)
	}
}

func TestControlToken(t *testing.T) {
	for text, want := range map[string]string{
		"x <|im_end|> y":                      "<|im_end|>",
		"<<|eot_id|>":                         "<|eot_id|>",
		"<|reserved_special_token_12|>":       "<|reserved_special_token_12|>",
		"a<｜end▁of▁sentence｜>b":               "<｜end▁of▁sentence｜>",
		"<start_of_turn>model":                "<start_of_turn>",
		"[/INST]":                             "[/INST]",
		"[[INST]]":                            "[INST]",
		"a < b | c > d":                       "",
		"<||>":                                "",
		"<| a |>":                             "",
		"x <| f |> y, and let (|>) = apply":   "",
		"<b>bold</b> <s>struck</s> [1]":       "",
		"<|" + strings.Repeat("a", 90) + "|>": "",
		"<|a<|b|>":                            "<|b|>",
		"<|":                                  "",
		"":                                    "",
	} {
		got := ControlToken([]byte(text))
		t.Logf("%.40q: expected: %q; got: %q", text, want, got)
		if string(got) != want {
			t.Errorf("%q: got %q, want %q", text, got, want)
		}
	}
}

func TestWriteError(t *testing.T) {
	for _, tt := range []struct {
		err  *Error
		want string
	}{
		{ModelNotFound(`a"b`), `{"error":{"message":"The model \"a\\\"b\" does not exist.","type":"invalid_request_error","param":"model","code":"model_not_found"}}`},
		{&Error{Status: 503, Type: TypeServer, Message: "busy"}, `{"error":{"message":"busy","type":"server_error","param":null,"code":null}}`},
	} {
		w := httptest.NewRecorder()
		WriteError(w, tt.err)
		if got := w.Body.String(); got != tt.want || w.Code != tt.err.Status || w.Header().Get("Content-Type") != "application/json" {
			t.Errorf("got %d %s, want %d %s", w.Code, got, tt.err.Status, tt.want)
		}
	}
}

// A request of the largest size must not cost more than reading it.
func BenchmarkParse(b *testing.B) {
	for _, size := range []int{2 << 10, 1 << 20} {
		b.Run(fmt.Sprint(size), func(b *testing.B) {
			body := []byte(`{"model":"m","messages":[{"role":"user","content":"` + strings.Repeat("all work and no play ", size/21) + `"}],"temperature":0,"stream":true}`)
			b.SetBytes(int64(len(body)))
			b.ReportAllocs()
			for b.Loop() {
				r, err := Parse(wire.KindChat, body, Limits{RequestBytes: 2 << 20, Tokens: 100, Messages: 10})
				if err != nil {
					b.Fatal(err)
				}
				r.ForEngine("m", 1, 10)
			}
		})
	}
}

// FuzzParse checks that whatever is let in reaches the engine as an object of
// the parameters that we know, and that this object is a request itself that
// would be passed on unchanged.
func FuzzParse(f *testing.F) {
	f.Add(`{"model":"m",`+hi+`,"temperature":0.5,"stop":["x"],"seed":-4,"stream":true}`, true)
	f.Add(`{"model":"m","messages":[{"role":"developer","content":[{"type":"text","text":"\u00e9\ud83d\ude80"}],"name":"n"}],"response_format":{"type":"json_object"}}`, true)
	f.Add(`{"model":"m","prompt":["a"],"logit_bias":{"1":2},"max_tokens":4}`, false)
	known := map[string]bool{"model": true, "messages": true, "prompt": true, "temperature": true, "top_p": true, "stop": true, "seed": true,
		"presence_penalty": true, "frequency_penalty": true, "logit_bias": true, "response_format": true, "max_tokens": true, "stream": true, "stream_options": true}
	f.Fuzz(func(t *testing.T, body string, chat bool) {
		kind := wire.KindCompletion
		if chat {
			kind = wire.KindChat
		}
		r, err := Parse(kind, []byte(body), limits)
		if err != nil {
			var e *Error
			if !errors.As(err, &e) || e.Status < 400 || !json.Valid(e.Body()) {
				t.Fatalf("error %#v", err)
			}
			return
		}
		out := r.ForEngine("engine", 7, 100)
		var m map[string]json.RawMessage
		if err := json.Unmarshal(out, &m); err != nil {
			t.Fatalf("%v in %s", err, out)
		}
		for name := range m {
			if !known[name] {
				t.Fatalf("%q reaches the engine in %s", name, out)
			}
		}
		if string(m["model"]) != `"engine"` || string(m["stream"]) != "true" {
			t.Fatalf("%s", out)
		}
		again, err := Parse(kind, out, Limits{RequestBytes: 1 << 20, Tokens: 1000, Messages: 8})
		if err != nil {
			t.Fatalf("our own request is refused: %v\n%s", err, out)
		}
		if second := again.ForEngine("engine", 7, 100); string(second) != string(out) {
			t.Fatalf("%s became %s", out, second)
		}
	})
}
