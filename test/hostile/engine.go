// Package hostile is an engine that has been taken over. It answers as the instant
// engine does, so that a node takes it for a good one; and what it is asked in the
// right words, it tries against the container that it is in, or does to whoever
// asks it.
//
// The rule it keeps: it does not harm the machine where nothing stops it. What it
// takes it gives back, and it takes less than a machine can do without.
package hostile

import (
	"encoding/json"
	"fmt"
	"io"
	"log"
	"net/http"
	"os"
	"os/signal"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/resultity/node/test/bench/instant"
)

// Main runs the engine with the command line of a llama-server. After a SIGUSR1
// it does misdeeds when it is asked to, until a SIGUSR2.
func Main(args []string) {
	if asChild(args, os.Stdout) {
		return
	}
	log.SetFlags(0)
	log.Print("this is an engine for tests of hostility: no model, known words")
	var armed atomic.Bool
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGUSR1, syscall.SIGUSR2)
	go func() {
		for s := range signals {
			armed.Store(s == syscall.SIGUSR1)
		}
	}()
	s := &http.Server{Addr: instant.Address(args[1:]), ReadHeaderTimeout: 10 * time.Second, Handler: &engine{good: instant.Handler(), armed: &armed}}
	log.Fatal(s.ListenAndServe())
}

// Ask returns the prompt that has the engine try everything. The answer is the
// JSON of a list of [Row].
func Ask(w Where) string {
	b, err := json.Marshal(w)
	if err != nil {
		panic(err) // strings
	}
	return askTry + string(b)
}

const askTry = "try "

type engine struct {
	good  http.Handler
	armed *atomic.Bool
}

const maxBody = 1 << 20

// ServeHTTP implements [http.Handler].
func (e *engine) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	raw, err := io.ReadAll(io.LimitReader(r.Body, maxBody))
	var q struct {
		Stream   bool
		Prompt   string
		Messages []struct{ Content string }
	}
	if err == nil && r.Method == http.MethodPost {
		err = json.Unmarshal(raw, &q)
	}
	if err != nil {
		http.Error(w, `{"error":{"type":"invalid_request_error"}}`, http.StatusBadRequest)
		return
	}
	chat := len(q.Messages) > 0
	if chat {
		q.Prompt = q.Messages[len(q.Messages)-1].Content
	}
	if where, ok := strings.CutPrefix(q.Prompt, askTry); ok {
		var at Where
		if err := json.Unmarshal([]byte(where), &at); err != nil {
			http.Error(w, `{"error":{"type":"invalid_request_error"}}`, http.StatusBadRequest)
			return
		}
		text, err := json.Marshal(Try(at))
		if err != nil {
			panic(err) // strings
		}
		say(w, string(text), chat, q.Stream)
		return
	}
	r.Body = io.NopCloser(strings.NewReader(string(raw)))
	e.good.ServeHTTP(w, r)
}

// say answers a text as one token.
func say(w http.ResponseWriter, text string, chat, stream bool) {
	form, object := `"text":%q`, "text_completion"
	switch {
	case chat && stream:
		form, object = `"delta":{"content":%s}`, "chat.completion.chunk"
	case chat:
		form, object = `"message":{"role":"assistant","content":%s}`, "chat.completion"
	default:
		form = `"text":%s`
	}
	quoted, err := json.Marshal(text)
	if err != nil {
		panic(err) // a string
	}
	choice := fmt.Sprintf(`{"index":0,`+form+`,"finish_reason":"stop"}`, quoted)
	const usage = `"usage":{"prompt_tokens":1,"completion_tokens":1,"total_tokens":2}`
	if !stream {
		w.Header().Set("Content-Type", "application/json")
		fmt.Fprintf(w, `{"object":%q,"choices":[%s],%s}`, object, choice, usage)
		return
	}
	w.Header().Set("Content-Type", "text/event-stream")
	fmt.Fprintf(w, "data: {\"object\":%q,\"choices\":[%s]}\n\ndata: {\"object\":%[1]q,\"choices\":[],%[3]s}\n\ndata: [DONE]\n\n", object, choice, usage)
}
