// Package instant is an inference engine that has no model: it answers at once,
// with words that are known beforehand. It stands in for llama-server where the
// time of everything but the engine is to be measured, and says so in each of
// its answers.
//
// It speaks as much of llama-server's API as a node uses. The rule it keeps:
// an answer is a function of the request's max_tokens alone, but for a chat
// whose last message is "pace DURATION": that one gets a token each DURATION,
// and each token is the time at which it was written.
package instant

import (
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"strconv"
	"strings"
	"time"
)

// Token returns the i-th token of an answer.
func Token(i int) string { return strconv.Itoa(i) + " " }

// Text returns an answer of n tokens.
func Text(n int) string {
	var b strings.Builder
	for i := range n {
		b.WriteString(Token(i))
	}
	return b.String()
}

// Pace returns the message that asks for a token each d.
func Pace(d time.Duration) string { return "pace " + d.String() }

// Stamp reads a token of a paced answer.
func Stamp(token string) (time.Time, error) {
	ns, err := strconv.ParseInt(strings.TrimSpace(token), 10, 64)
	return time.Unix(0, ns), err
}

// Address reads where to listen from the command line of a llama-server.
func Address(args []string) string {
	option := map[string]string{}
	for i, a := range args {
		if i+1 < len(args) {
			option[a] = args[i+1]
		}
	}
	return net.JoinHostPort(option["--host"], option["--port"])
}

// maxBody and maxTokens bound what a caller may ask for.
const (
	maxBody   = 1 << 20
	maxTokens = 100_000
)

type request struct {
	Stream    bool
	MaxTokens int `json:"max_tokens"`
	Messages  []struct{ Content string }
}

// Handler answers the engine's API.
func Handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /health", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, `{"status":"ok"}`) })
	mux.HandleFunc("POST /v1/chat/completions", func(w http.ResponseWriter, r *http.Request) { answer(w, r, true) })
	mux.HandleFunc("POST /v1/completions", func(w http.ResponseWriter, r *http.Request) { answer(w, r, false) })
	return mux
}

func answer(w http.ResponseWriter, r *http.Request, chat bool) {
	var q request
	if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxBody)).Decode(&q); err != nil || q.MaxTokens < 1 || q.MaxTokens > maxTokens {
		http.Error(w, `{"error":{"type":"invalid_request_error"}}`, http.StatusBadRequest)
		return
	}
	if q.Stream {
		stream(w, r, &q, chat)
		return
	}
	choice := fmt.Sprintf(`"text":%q`, Text(q.MaxTokens))
	object := "text_completion"
	if chat {
		choice = fmt.Sprintf(`"message":{"role":"assistant","content":%q}`, Text(q.MaxTokens))
		object = "chat.completion"
	}
	w.Header().Set("Content-Type", "application/json")
	fmt.Fprintf(w, `{"object":%q,"model":"instant engine","choices":[{"index":0,%s,"finish_reason":"length"}],%s}`, object, choice, usage(q.MaxTokens))
}

func usage(n int) string {
	return fmt.Sprintf(`"usage":{"prompt_tokens":1,"completion_tokens":%d,"total_tokens":%d}`, n, n+1)
}

func stream(w http.ResponseWriter, r *http.Request, q *request, chat bool) {
	w.Header().Set("Content-Type", "text/event-stream")
	out := http.NewResponseController(w)
	object, form := "text_completion", `"text":%q`
	if chat {
		object, form = "chat.completion.chunk", `"delta":{"content":%q}`
	}
	var pace time.Duration
	if n := len(q.Messages); n > 0 {
		if s, ok := strings.CutPrefix(q.Messages[n-1].Content, "pace "); ok {
			pace, _ = time.ParseDuration(s) // no duration: no pace
		}
	}
	var tick <-chan time.Time
	if pace > 0 {
		t := time.NewTicker(pace)
		defer t.Stop()
		tick = t.C
	}
	head := fmt.Sprintf(`data: {"object":%q,"model":"instant engine","choices":[`, object)
	for i := range q.MaxTokens {
		token := Token(i)
		if tick != nil {
			select {
			case <-tick:
			case <-r.Context().Done():
				return
			}
			token = strconv.FormatInt(time.Now().UnixNano(), 10) + " "
		}
		fmt.Fprintf(w, head+`{"index":0,`+form+`,"finish_reason":null}]}`+"\n\n", token)
		if out.Flush() != nil {
			return
		}
	}
	fmt.Fprintf(w, head+`{"index":0,`+form+`,"finish_reason":"length"}]}`+"\n\n", "")
	fmt.Fprintf(w, head+`],%s}`+"\n\ndata: [DONE]\n\n", usage(q.MaxTokens))
}
