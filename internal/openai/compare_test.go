package openai

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/resultity/node/internal/receipt"
	"github.com/resultity/node/internal/wire"
)

// body writes an answer as a node does.
func body(t testing.TB, kind wire.Kind, id receipt.JobID, created int64, stream, usage bool, finish string, tokens [2]int, pieces ...string) []byte {
	t.Helper()
	a := NewAssembler(kind, id, "tiny", created, stream, usage, 1<<20)
	object, text := "chat.completion.chunk", `"delta":{"content":%s}`
	if kind == wire.KindCompletion {
		object, text = "text_completion", `"text":%s`
	}
	event := func(choices, rest string) {
		if _, err := a.Event(fmt.Appendf(nil, `{"object":%q,"choices":[%s]%s}`, object, choices, rest)); err != nil {
			t.Fatal(err)
		}
	}
	for i, p := range pieces {
		end := "null"
		if i == len(pieces)-1 {
			end = `"` + finish + `"`
		}
		event(`{"index":0,`+fmt.Sprintf(text, quote(nil, p))+`,"finish_reason":`+end+`}`, "")
	}
	event("", fmt.Sprintf(`,"usage":{"prompt_tokens":%d,"completion_tokens":%d,"total_tokens":%d}`, tokens[0], tokens[1], tokens[0]+tokens[1]))
	if _, err := a.Event([]byte("[DONE]")); err != nil {
		t.Fatal(err)
	}
	b, _, err := a.Finish()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func readAnswer(t testing.TB, b []byte) *Answer {
	t.Helper()
	a, err := ReadAnswer(b)
	if err != nil {
		t.Fatalf("%v: %s", err, b)
	}
	return a
}

var otherJob = receipt.JobID{1, 2, 15: 3}

func TestCompareToleratesWhatRightlyDiffers(t *testing.T) {
	for _, kind := range []wire.Kind{wire.KindChat, wire.KindCompletion} {
		was := readAnswer(t, body(t, kind, job, 1, false, false, "stop", [2]int{7, 3}, "Grüße", ", \"Welt\"\n"))
		for _, other := range [][]byte{
			body(t, kind, job, 1, false, false, "stop", [2]int{7, 3}, "Grüße, \"Welt\"\n"),
			body(t, kind, otherJob, 99, false, false, "stop", [2]int{7, 3}, "Grüße", ", \"Welt\"\n"),
			body(t, kind, otherJob, 99, true, true, "stop", [2]int{7, 3}, "G", "rüße,", " \"Welt\"\n"),
			body(t, kind, otherJob, 99, true, false, "stop", [2]int{7, 3}, "Grüße, \"Welt\"\n"),
		} {
			if c := Compare(was, readAnswer(t, other)); c.Verdict != Same || c.Difference != nil {
				t.Errorf("%s: %+v for %s", kind, c, other)
			}
		}
	}
}

func TestCompareFindsTheFirstDifference(t *testing.T) {
	chat := func(finish string, tokens [2]int, pieces ...string) []byte {
		return body(t, wire.KindChat, job, 1, false, false, finish, tokens, pieces...)
	}
	was := readAnswer(t, chat("stop", [2]int{7, 3}, "Grüße, Welt"))
	for _, c := range []struct {
		name string
		is   []byte
		want Difference
	}{
		{"a character", chat("stop", [2]int{7, 3}, "Grüße, Wald"), Difference{PartText, 0, 8, "11", "11"}},
		{"half a character", chat("stop", [2]int{7, 3}, "Gräße, Welt"), Difference{PartText, 0, 2, "11", "11"}},
		{"an end too early", chat("stop", [2]int{7, 3}, "Grüße"), Difference{PartText, 0, 5, "11", "5"}},
		{"more", chat("stop", [2]int{7, 3}, "Grüße, Welt!"), Difference{PartText, 0, 11, "11", "12"}},
		{"nothing", chat("stop", [2]int{7, 0}, ""), Difference{PartText, 0, 0, "11", "0"}},
		{"finish reason", chat("length", [2]int{7, 3}, "Grüße, Welt"), Difference{PartFinish, 0, 0, "stop", "length"}},
		{"prompt tokens", chat("stop", [2]int{8, 3}, "Grüße, Welt"), Difference{PartPromptTokens, 0, 0, "7", "8"}},
		{"completion tokens", chat("stop", [2]int{7, 4}, "Grüße, Welt"), Difference{PartCompletionTokens, 0, 0, "3", "4"}},
		{"stream", body(t, wire.KindChat, otherJob, 2, true, true, "stop", [2]int{7, 3}, "Grüße,", " Wald"), Difference{PartText, 0, 8, "11", "11"}},
		{"another choice", []byte(`{"object":"chat.completion","model":"tiny","choices":[{"index":0,"message":{"content":"Grüße, Welt"},"finish_reason":"stop"},{"index":1,"message":{"content":"x"},"finish_reason":"stop"}]}`), Difference{PartChoices, 0, 0, "1", "2"}},
		{"thoughts", []byte(`{"object":"chat.completion","model":"tiny","choices":[{"index":0,"message":{"content":"Grüße, Welt","reasoning_content":"hm"},"finish_reason":"stop"}]}`), Difference{PartReasoning, 0, 0, "0", "2"}},
	} {
		is := readAnswer(t, c.is)
		got := Compare(was, is)
		if got.Verdict != Different || got.Difference == nil || *got.Difference != c.want {
			t.Errorf("%s: %+v %+v, want %+v", c.name, got, got.Difference, c.want)
		}
		if back := Compare(is, was); back.Verdict != Different || back.Difference.Offset != c.want.Offset || back.Difference.Was != c.want.Is {
			t.Errorf("%s: the other way round %+v", c.name, back.Difference)
		}
		// What is stored and logged has nothing of the texts.
		if text, err := json.Marshal(got); err != nil || strings.Contains(string(text)+got.Difference.String(), "Gr") {
			t.Errorf("%s: text of an answer in %s (%v)", c.name, text, err)
		}
	}
	is := readAnswer(t, chat("stop", [2]int{7, 3}, "Grüße, Wald"))
	if a, b := Excerpts(was, is, Compare(was, is).Difference); a != "Grüße, Welt" || b != "Grüße, Wald" {
		t.Errorf("excerpts %q and %q", a, b)
	}
	long := strings.Repeat("ü", 1000)
	was, is = readAnswer(t, chat("stop", [2]int{7, 3}, long+"a")), readAnswer(t, chat("stop", [2]int{7, 3}, long+"b"))
	if a, b := Excerpts(was, is, Compare(was, is).Difference); len(a) > 2*around || !strings.HasSuffix(a, "üa") || !strings.HasSuffix(b, "üb") {
		t.Errorf("excerpts %q and %q", a, b)
	}
}

func TestCompareRefuses(t *testing.T) {
	chat := readAnswer(t, body(t, wire.KindChat, job, 1, false, false, "stop", [2]int{7, 3}, "x"))
	completion := readAnswer(t, body(t, wire.KindCompletion, job, 1, false, false, "stop", [2]int{7, 3}, "x"))
	other := *chat
	other.Model = "large"
	for _, a := range []*Answer{completion, &other} {
		if c := Compare(chat, a); c.Verdict != NotComparable || c.Reason == "" {
			t.Errorf("%+v", c)
		}
	}
}

func TestReadAnswerRefuses(t *testing.T) {
	const whole = `{"object":"chat.completion","model":"m","choices":[{"index":0,"message":{"content":"a"},"finish_reason":"stop"}]}`
	if _, err := ReadAnswer([]byte(whole)); err != nil {
		t.Fatal(err)
	}
	chunk := strings.ReplaceAll(strings.ReplaceAll(whole, "chat.completion", "chat.completion.chunk"), "message", "delta")
	if _, err := ReadAnswer([]byte("data: " + chunk + "\n\ndata: [DONE]\n\n")); err != nil {
		t.Fatal(err)
	}
	var many []string
	for i := range maxChoices + 1 {
		many = append(many, fmt.Sprintf(`{"index":%d,"message":{"content":""},"finish_reason":"stop"}`, i))
	}
	for _, bad := range []string{
		"", "x", "null", "[]", `"a"`, "{}", "data: [DONE]\n\n", "data: x\n\n",
		`{"error":{"message":"no"}}`,
		whole[:len(whole)-1],
		strings.Replace(whole, "chat.completion", "chat.completion.chunk", 1),
		strings.Replace(whole, `"m"`, `1`, 1),
		strings.Replace(whole, `"m"`, `"`+strings.Repeat("m", maxName+1)+`"`, 1),
		strings.Replace(whole, `"index":0`, `"index":-1`, 1),
		strings.Replace(whole, `"index":0`, `"index":16`, 1),
		strings.Replace(whole, `"index":0`, `"index":1`, 1),
		strings.Replace(whole, `"a"`, `["a"]`, 1),
		strings.Replace(whole, `{"content":"a"}`, `"a"`, 1),
		strings.Replace(whole, `"content":"a"`, `"content":"a","tool_calls":[{}]`, 1),
		strings.Replace(whole, `"stop"`, `"surprise"`, 1),
		strings.Replace(whole, `"stop"`, `null`, 1),
		strings.Replace(whole, `]}`, `],"usage":3}`, 1),
		strings.Replace(whole, `]}`, `],"usage":{"prompt_tokens":-1,"completion_tokens":1}}`, 1),
		strings.Replace(whole, `]}`, `],"usage":{"prompt_tokens":1}}`, 1),
		`{"object":"chat.completion","model":"m","choices":[]}`,
		`{"object":"chat.completion","model":"m","choices":[` + strings.Join(many, ",") + `]}`,
		"data: " + chunk + "\n\n",
		"data: " + chunk + "\n\ndata: [DONE]\n\ndata: " + chunk + "\n\n",
		"data: " + chunk + "\n\ndata: " + chunk + "\n\ndata: [DONE]\n\n",
		"data: " + chunk + "\n\ndata: " + strings.Replace(chunk, `"m"`, `"n"`, 1) + "\n\ndata: [DONE]\n\n",
	} {
		_, err := ReadAnswer([]byte(bad))
		if _, ok := errors.AsType[*AnswerError](err); !ok {
			t.Errorf("%v for %s", err, bad)
		}
	}
}

// What other tests have captured of engines is read as well.
func TestReadAnswerTakesWhatNodesWrite(t *testing.T) {
	files, err := filepath.Glob("testdata/*.want")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		raw, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		var all []*Answer // plain, and streamed in two ways
		for _, part := range strings.Split("\n"+string(raw), "\n# ")[1:] {
			_, text, _ := strings.Cut(part, "\n")
			all = append(all, readAnswer(t, []byte(text)))
		}
		for _, a := range all[1:] {
			if c := Compare(all[0], a); c.Verdict != Same {
				t.Errorf("%s: %+v", f, c)
			}
		}
	}
	if len(files) == 0 {
		t.Error("no golden files")
	}
}

func TestSampled(t *testing.T) {
	for params, want := range map[string]bool{
		``: true, `,"temperature":null`: true, `,"temperature":1`: true, `,"temperature":0.001`: true, `,"seed":1`: true,
		`,"temperature":0`: false, `,"temperature":0.0`: false, `,"temperature":0e5`: false,
	} {
		r, err := Parse(wire.KindCompletion, []byte(`{"model":"m","prompt":"p"`+params+`}`), Limits{1000, 10, 10})
		if err != nil {
			t.Fatal(err)
		}
		if r.Sampled() != want {
			t.Errorf("%s: sampled %v", params, !want)
		}
	}
}

func TestIncomparable(t *testing.T) {
	const open, seeded, greedy = `,"temperature":1`, `,"temperature":1,"seed":3`, `,"temperature":0`
	for _, c := range []struct {
		name, params, finish string
		tokens               int
		c                    Conditions
		want                 Cause
	}{
		{"greedy", greedy, "stop", 3, Conditions{Tokens: 10}, ""},
		{"sampled", open, "stop", 3, Conditions{Limits: true, Tokens: 10}, NoSeed},
		{"by default", "", "stop", 3, Conditions{Limits: true, Tokens: 10}, NoSeed},
		{"sampled with the client's seed", seeded, "stop", 3, Conditions{Tokens: 10}, ""},
		{"sampled with the network's", open, "stop", 3, Conditions{Seed: true, Tokens: 10}, ""},
		{"longer than it may be", greedy, "stop", 11, Conditions{Tokens: 10}, Tokens},
		{"as long", greedy, "stop", 10, Conditions{Tokens: 10}, ""},
		{"cut short", greedy, "length", 3, Conditions{Tokens: 10}, Tokens},
		{"cut short by the same limit", greedy, "length", 3, Conditions{Limits: true, Tokens: 10}, ""},
		{"cut short by its own limit", greedy + `,"max_tokens":3`, "length", 3, Conditions{Tokens: 10}, ""},
	} {
		r, err := Parse(wire.KindChat, []byte(`{"model":"tiny","messages":[{"role":"user","content":"x"}]`+c.params+`}`), Limits{1000, 20, 10})
		if err != nil {
			t.Fatal(err)
		}
		was := readAnswer(t, body(t, wire.KindChat, job, 1, false, false, c.finish, [2]int{7, c.tokens}, "x"))
		if why := r.Incomparable(was, c.c); (why == nil) != (c.want == "") || why != nil && (why.Verdict != NotComparable || why.Cause != c.want || why.Reason == "") {
			t.Errorf("%s: %+v, want %q", c.name, why, c.want)
		}
		was.Model = "large"
		if why := r.Incomparable(was, c.c); why == nil || why.Cause != OtherAPI {
			t.Errorf("%s: another model is compared", c.name)
		}
	}
}

func FuzzCompare(f *testing.F) {
	f.Add([]byte(`{"object":"chat.completion","model":"m","choices":[{"index":0,"message":{"content":"a"},"finish_reason":"stop"}]}`), "a", "é")
	f.Add([]byte("data: {\"object\":\"text_completion\",\"model\":\"m\",\"choices\":[{\"index\":0,\"text\":\"a\",\"finish_reason\":\"stop\"}]}\n\ndata: [DONE]\n\n"), "", "b")
	f.Fuzz(func(t *testing.T, raw []byte, x, y string) {
		if a, err := ReadAnswer(raw); err == nil {
			if c := Compare(a, a); c.Verdict != Same {
				t.Fatalf("%+v with itself", c)
			}
		} else if len(err.Error()) > 400 {
			t.Fatalf("an error of %d bytes", len(err.Error()))
		}
		x, y = strings.ToValidUTF8(x, ""), strings.ToValidUTF8(y, "")
		if len(x)+len(y) > 10_000 {
			return
		}
		a := readAnswer(t, body(t, wire.KindChat, job, 1, false, false, "stop", [2]int{1, 1}, x))
		b := readAnswer(t, body(t, wire.KindChat, otherJob, 2, true, true, "stop", [2]int{1, 1}, y))
		c := Compare(a, b)
		if (c.Verdict == Same) != (x == y) {
			t.Fatalf("%+v for %q and %q", c, x, y)
		}
		if x != y {
			rx, ry := []rune(x), []rune(y)
			n := 0
			for n < len(rx) && n < len(ry) && rx[n] == ry[n] {
				n++
			}
			if c.Difference.Offset != n {
				t.Fatalf("%q and %q part at %d, not %d", x, y, n, c.Difference.Offset)
			}
			Excerpts(a, b, c.Difference)
		}
	})
}

func TestOnly(t *testing.T) {
	one, err := ReadAnswer([]byte(`{"object":"chat.completion","model":"m","choices":[{"index":0,"message":{"role":"assistant","content":"words","reasoning_content":"thought"},"finish_reason":"length"}]}`))
	if err != nil {
		t.Fatal(err)
	}
	if text, reasoning, finish, ok := one.Only(); text != "words" || reasoning != "thought" || finish != "length" || !ok {
		t.Errorf("%q, %q, %q, %v", text, reasoning, finish, ok)
	}
	two, err := ReadAnswer([]byte(`{"object":"text_completion","model":"m","choices":[{"index":0,"text":"a","finish_reason":"stop"},{"index":1,"text":"b","finish_reason":"stop"}]}`))
	if err != nil {
		t.Fatal(err)
	}
	if text, _, _, ok := two.Only(); ok || text != "" {
		t.Errorf("%q of two choices", text)
	}
}
