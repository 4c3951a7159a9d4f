package openai

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/resultity/node/internal/receipt"
	"github.com/resultity/node/internal/wire"
)

var update = flag.Bool("update", false, "rewrite the golden files")

var job = receipt.JobID{0xde, 0xad, 15: 1}

// payloads returns the data of each event of a captured stream.
func payloads(t testing.TB, file string) [][]byte {
	t.Helper()
	raw, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var out [][]byte
	for line := range bytes.Lines(raw) {
		if data, ok := bytes.CutPrefix(line, []byte("data: ")); ok {
			out = append(out, bytes.TrimSpace(data))
		}
	}
	return out
}

func kindOf(file string) wire.Kind {
	if strings.Contains(file, "completion") {
		return wire.KindCompletion
	}
	return wire.KindChat
}

// assemble feeds all events and fails unless what they add up to is what
// Finish returns.
func assemble(t testing.TB, a *Assembler, events [][]byte, stream bool) ([]byte, Usage) {
	t.Helper()
	var sent []byte
	for i, e := range events {
		out, err := a.Event(e)
		if err != nil {
			t.Fatalf("event %d: %v", i, err)
		}
		sent = append(sent, out...)
	}
	body, usage, err := a.Finish()
	if err != nil {
		t.Fatal(err)
	}
	if stream && !bytes.Equal(sent, body) {
		t.Errorf("the events add up to\n%s\nbut the body is\n%s", sent, body)
	}
	if !stream && sent != nil {
		t.Errorf("a plain response sent %q early", sent)
	}
	return body, usage
}

// TestGolden assembles what real engines have written. The files llamacpp-*
// were taken from llama-server b11669; the others are written after the
// engines' sources.
func TestGolden(t *testing.T) {
	files, _ := filepath.Glob("testdata/*.sse")
	if len(files) < 6 {
		t.Fatalf("only %d captures", len(files))
	}
	for _, file := range files {
		t.Run(filepath.Base(file), func(t *testing.T) {
			events := payloads(t, file)
			var got bytes.Buffer
			var texts []string
			for _, how := range []struct {
				title                string
				stream, includeUsage bool
			}{{"plain", false, false}, {"stream", true, false}, {"stream with usage", true, true}} {
				a := NewAssembler(kindOf(file), job, "tiny-chat", 1767225600, how.stream, how.includeUsage, 1<<20)
				body, usage := assemble(t, a, events, how.stream)
				if usage.CompletionTokens == 0 || usage.PromptTokens == 0 {
					t.Errorf("usage %+v", usage)
				}
				got.WriteString("# " + how.title + "\n")
				got.Write(body)
				got.WriteString("\n")
				texts = append(texts, text(t, body))
			}
			if texts[0] != texts[1] || texts[1] != texts[2] {
				t.Errorf("texts differ: %q", texts)
			}
			golden := strings.TrimSuffix(file, ".sse") + ".want"
			if *update {
				if err := os.WriteFile(golden, got.Bytes(), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got.Bytes(), want) {
				t.Errorf("got\n%s\nwant\n%s", got.Bytes(), want)
			}
		})
	}
}

// text reads a response body as a client would: with another JSON library.
func text(t testing.TB, body []byte) string {
	t.Helper()
	type choice struct {
		Text           string
		Message, Delta struct{ Content string }
	}
	var b strings.Builder
	add := func(data []byte) {
		var v struct {
			ID      string
			Choices []choice
		}
		if err := json.Unmarshal(data, &v); err != nil {
			t.Fatalf("%v in %s", err, data)
		}
		if !strings.HasSuffix(v.ID, "-dead0000000000000000000000000001") {
			t.Errorf("id %q", v.ID)
		}
		for _, c := range v.Choices {
			b.WriteString(c.Text + c.Message.Content + c.Delta.Content)
		}
	}
	if !bytes.HasPrefix(body, []byte("data: ")) {
		add(body)
		return b.String()
	}
	events, ok := strings.CutSuffix(string(body), "data: [DONE]\n\n")
	if !ok {
		t.Errorf("no [DONE] at the end of %s", body)
	}
	for event := range strings.SplitSeq(strings.TrimSuffix(events, "\n\n"), "\n\n") {
		data, ok := strings.CutPrefix(event, "data: ")
		if !ok || strings.Contains(data, "\n") {
			t.Errorf("event %q", event)
		}
		add([]byte(data))
	}
	return b.String()
}

const (
	first  = `{"object":"chat.completion.chunk","choices":[{"index":0,"delta":{"role":"assistant","content":null},"finish_reason":null}]}`
	hello  = `{"object":"chat.completion.chunk","choices":[{"index":0,"delta":{"content":"hello"}}]}`
	finish = `{"object":"chat.completion.chunk","choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}`
	usage  = `{"object":"chat.completion.chunk","choices":[],"usage":{"prompt_tokens":1,"completion_tokens":2,"total_tokens":3}}`
	done   = `[DONE]`
)

func chunk(choices string) string {
	return `{"object":"chat.completion.chunk","choices":` + choices + `}`
}

func used(usage string) string {
	return `{"object":"chat.completion.chunk","choices":[],"usage":` + usage + `}`
}

func TestBadOutput(t *testing.T) {
	for _, tt := range []struct {
		name   string
		want   Reason
		events []string
	}{
		{"nothing", ReasonNotDone, nil},
		{"garbage", ReasonJSON, []string{first, `{"object":`}},
		{"empty event", ReasonJSON, []string{""}},
		{"half a character", ReasonJSON, []string{chunk(`[{"index":0,"delta":{"content":"` + "\xf0\x9f\x9a" + `"}}]`)}},
		{"half a surrogate", ReasonJSON, []string{chunk(`[{"index":0,"delta":{"content":"\ud83d"}}]`)}},
		{"a name twice", ReasonJSON, []string{chunk(`[{"index":0,"delta":{"content":"a","content":"b"}}]`)}},
		{"deep", ReasonJSON, []string{strings.Repeat("[", 1000) + strings.Repeat("]", 1000)}},
		{"a number", ReasonObject, []string{"1"}},
		{"no object type", ReasonObject, []string{`{"choices":[{"index":0,"delta":{"content":"a"}}]}`}},
		{"other object type", ReasonObject, []string{`{"object":"text_completion","choices":[{"index":0,"text":"a"}]}`}},
		{"no choices", ReasonChoices, []string{`{"object":"chat.completion.chunk"}`}},
		{"null choices", ReasonChoices, []string{chunk(`null`)}},
		{"choices are no array", ReasonChoices, []string{chunk(`{}`)}},
		{"empty choices without usage", ReasonChoices, []string{chunk(`[]`)}},
		{"two choices", ReasonChoices, []string{chunk(`[{"index":0,"delta":{"content":"a"}},{"index":0,"delta":{"content":"a"}}]`)}},
		{"second choice", ReasonChoices, []string{first, chunk(`[{"index":1,"delta":{"content":"a"}}]`)}},
		{"no index", ReasonChoices, []string{chunk(`[{"delta":{"content":"a"}}]`)}},
		{"choice is no object", ReasonChoices, []string{chunk(`[0]`)}},
		{"no delta", ReasonDelta, []string{chunk(`[{"index":0}]`)}},
		{"delta is no object", ReasonDelta, []string{chunk(`[{"index":0,"delta":"a"}]`)}},
		{"content is a number", ReasonDelta, []string{chunk(`[{"index":0,"delta":{"content":1}}]`)}},
		{"role is user", ReasonDelta, []string{chunk(`[{"index":0,"delta":{"role":"user","content":"a"}}]`)}},
		{"tool call", ReasonDelta, []string{chunk(`[{"index":0,"delta":{"tool_calls":[{"index":0}]}}]`)}},
		{"refusal", ReasonDelta, []string{chunk(`[{"index":0,"delta":{"refusal":"no"}}]`)}},
		{"thoughts are a number", ReasonDelta, []string{chunk(`[{"index":0,"delta":{"reasoning":1}}]`)}},
		{"unknown finish reason", ReasonFinish, []string{chunk(`[{"index":0,"delta":{},"finish_reason":"tool_calls"}]`)}},
		{"finish reason is a number", ReasonFinish, []string{chunk(`[{"index":0,"delta":{},"finish_reason":1}]`)}},
		{"text after finish", ReasonAfterFinish, []string{first, finish, hello}},
		{"finish twice", ReasonAfterFinish, []string{first, finish, finish}},
		{"no finish", ReasonUnfinished, []string{first, hello, done}},
		{"only done", ReasonUnfinished, []string{done}},
		{"no usage", ReasonNoUsage, []string{first, hello, finish, done}},
		{"early usage", ReasonUsage, []string{first, hello, usage}},
		{"usage twice", ReasonUsage, []string{first, hello, finish, usage, usage}},
		{"usage is no object", ReasonUsage, []string{finish, used(`[1]`)}},
		{"usage that does not add up", ReasonUsage, []string{finish, used(`{"prompt_tokens":1,"completion_tokens":2,"total_tokens":4}`)}},
		{"usage without a count", ReasonUsage, []string{finish, used(`{"prompt_tokens":1,"total_tokens":1}`)}},
		{"negative usage", ReasonUsage, []string{finish, used(`{"prompt_tokens":3,"completion_tokens":-2,"total_tokens":1}`)}},
		{"usage that overflows", ReasonUsage, []string{finish, used(`{"prompt_tokens":18446744073709551615,"completion_tokens":2,"total_tokens":1}`)}},
		{"no done", ReasonNotDone, []string{first, hello, finish, usage}},
		{"data after done", ReasonAfterDone, []string{first, hello, finish, usage, done, hello}},
		{"done twice", ReasonAfterDone, []string{first, hello, finish, usage, done, done}},
		{"too large", ReasonTooLarge, []string{first, chunk(`[{"index":0,"delta":{"content":"` + strings.Repeat("secret ", 1<<10) + `"}}]`)}},
		{"too large by thoughts", ReasonTooLarge, []string{first, chunk(`[{"index":0,"delta":{"reasoning":"` + strings.Repeat("secret ", 1<<10) + `"}}]`)}},
	} {
		for _, stream := range []bool{false, true} {
			a := NewAssembler(wire.KindChat, job, "m", 1, stream, true, 4<<10)
			var err error
			for _, e := range tt.events {
				if err != nil {
					t.Errorf("%s: failed before the last event: %v", tt.name, err)
				}
				_, err = a.Event([]byte(e))
			}
			body, _, final := a.Finish()
			if err != nil && final != err {
				t.Errorf("%s: Event said %v, Finish %v", tt.name, err, final)
			}
			t.Logf("%s, stream %t: expected: %s; got: %v", tt.name, stream, tt.want, final)
			var bad *OutputError
			if !errors.As(final, &bad) || bad.Reason != tt.want || body != nil {
				t.Errorf("%s: got %v, want %s", tt.name, final, tt.want)
			}
			if final != nil && strings.Contains(final.Error(), "secret") {
				t.Errorf("%s: the error quotes the output: %v", tt.name, final)
			}
			if _, again := a.Event([]byte(hello)); final != nil && again != final {
				t.Errorf("%s: the error did not stay, then %v", tt.name, again)
			}
		}
	}
}

// An engine may say that it cannot go on: that is no break of its API.
func TestReportedError(t *testing.T) {
	for event, want := range map[string]string{
		`{"error":{"code":500,"message":"secret words","type":"server_error"}}`: "500",
		`{"error":"secret words"}`:                    "", // vLLM
		`{"error":{"code":"secret"}}`:                 "",
		`{"choices":[],"error":{"message":"secret"}}`: "",
	} {
		a := NewAssembler(wire.KindChat, job, "m", 1, true, true, 4<<10)
		_, err := a.Event([]byte(event))
		reported, ok := errors.AsType[*ReportedError](err)
		if !ok || reported.Code != want || strings.Contains(err.Error(), "secret") {
			t.Errorf("%s: %v", event, err)
		}
		if _, _, final := a.Finish(); final != err {
			t.Errorf("%s: Event said %v, Finish %v", event, err, final)
		}
	}
}

func TestBadCompletion(t *testing.T) {
	for _, tt := range []struct {
		want  Reason
		event string
	}{
		{ReasonObject, hello},
		{ReasonDelta, `{"object":"text_completion","choices":[{"index":0,"finish_reason":null}]}`},
		{ReasonDelta, `{"object":"text_completion","choices":[{"index":0,"text":null}]}`},
	} {
		a := NewAssembler(wire.KindCompletion, job, "m", 1, true, true, 4<<10)
		_, err := a.Event([]byte(tt.event))
		t.Logf("%.60s: expected: %s; got: %v", tt.event, tt.want, err)
		var bad *OutputError
		if !errors.As(err, &bad) || bad.Reason != tt.want {
			t.Errorf("%s: got %v, want %s", tt.event, err, tt.want)
		}
	}
}

// A plain response may be exactly as large as the limit, and no byte larger.
func TestPlainLimit(t *testing.T) {
	run := func(limit int64) ([]byte, error) {
		a := NewAssembler(wire.KindChat, job, "m", 1, false, false, limit)
		for _, e := range []string{first, hello, finish, usage, done} {
			if _, err := a.Event([]byte(e)); err != nil {
				return nil, err
			}
		}
		body, _, err := a.Finish()
		return body, err
	}
	body, err := run(1 << 20)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := run(int64(len(body))); err != nil {
		t.Error(err)
	}
	_, err = run(int64(len(body)) - 1)
	t.Logf("a byte over the limit: expected: %s; got: %v", ReasonTooLarge, err)
	if bad := (*OutputError)(nil); !errors.As(err, &bad) || bad.Reason != ReasonTooLarge {
		t.Error("a byte over the limit was let through")
	}
}

// What was handed out must not change when more is written.
func TestEventBytesStay(t *testing.T) {
	a := NewAssembler(wire.KindChat, job, "m", 1, true, false, 1<<20)
	var outs, copies [][]byte
	for range 1000 {
		out, err := a.Event([]byte(hello))
		if err != nil {
			t.Fatal(err)
		}
		_ = append(out, "scribble"...)
		outs, copies = append(outs, out), append(copies, bytes.Clone(out))
	}
	for i := range outs {
		if !bytes.Equal(outs[i], copies[i]) {
			t.Fatalf("event %d changed", i)
		}
	}
}

func TestAllocationsPerToken(t *testing.T) {
	a := NewAssembler(wire.KindChat, job, "m", 1, true, false, 1<<30)
	event := []byte(`{"choices":[{"finish_reason":null,"index":0,"delta":{"content":"a\u00e9\n"}}],"created":1,"id":"x","model":"m","object":"chat.completion.chunk"}`)
	if n := testing.AllocsPerRun(10_000, func() {
		if _, err := a.Event(event); err != nil {
			t.Fatal(err)
		}
	}); n > 2 { // 1; the race detector has pools forget things at random
		t.Errorf("%v allocations per event", n)
	}
}

func BenchmarkEvent(b *testing.B) {
	events := payloads(b, "testdata/llamacpp-chat.sse")
	b.ReportAllocs()
	n := 0
	for b.Loop() {
		a := NewAssembler(wire.KindChat, job, "tiny-chat", 1, true, true, 1<<20)
		for _, e := range events {
			_, _ = a.Event(e)
		}
		if _, _, err := a.Finish(); err != nil {
			b.Fatal(err)
		}
		n += len(events)
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(n), "ns/event")
}

func FuzzAssembler(f *testing.F) {
	files, _ := filepath.Glob("testdata/*.sse")
	for _, file := range files {
		f.Add(bytes.Join(payloads(f, file), []byte("\n")), kindOf(file) == wire.KindChat)
	}
	f.Add([]byte(strings.Join([]string{first, hello, finish, usage, done}, "\n")), true)
	f.Fuzz(func(t *testing.T, raw []byte, chat bool) {
		kind := wire.KindCompletion
		if chat {
			kind = wire.KindChat
		}
		var bodies [][]byte
		for _, stream := range []bool{false, true} {
			const limit = 1 << 16
			a := NewAssembler(kind, job, "m", 1, stream, true, limit)
			var sent []byte
			for e := range bytes.SplitSeq(raw, []byte("\n")) {
				out, err := a.Event(e)
				if err != nil && out != nil {
					t.Fatal("bytes beside an error")
				}
				sent = append(sent, out...)
			}
			body, _, err := a.Finish()
			if err != nil {
				var bad *OutputError
				var reported *ReportedError
				if !errors.As(err, &bad) && !errors.As(err, &reported) {
					t.Fatalf("error of type %T", err)
				}
				continue
			}
			if len(body) > limit {
				t.Fatalf("%d bytes", len(body))
			}
			if stream && !bytes.Equal(sent, body) {
				t.Fatal("the events are not the body")
			}
			bodies = append(bodies, body)
		}
		if len(bodies) == 2 && text(t, bodies[0]) != text(t, bodies[1]) {
			t.Fatalf("plain and streamed texts differ:\n%s\n%s", bodies[0], bodies[1])
		}
	})
}
