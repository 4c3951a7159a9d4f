// Package hostile is an engine that has been taken over. It answers as the instant
// engine does, so that a node takes it for a good one; and what it is asked in the
// right words, it tries against the container that it is in, or does to whoever
// asks it.
//
// The rule it keeps: it does not harm the machine where nothing stops it. What it
// takes it gives back, and it takes less than a machine can do without.
package hostile

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"os/signal"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/resultity/node/test/bench/instant"
)

// Main runs the engine with the command line of a llama-server. It does misdeeds
// when it is asked to from a SIGUSR1 on, until a SIGUSR2.
func Main(args []string) {
	if Again(args) {
		return
	}
	log.SetFlags(0)
	log.Print("this is an engine for tests of hostility: no model, known words")
	e := &engine{good: instant.Handler()}
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGUSR1, syscall.SIGUSR2)
	go func() {
		for s := range signals {
			e.armed.Store(s == syscall.SIGUSR1)
			log.Print("armed: ", s == syscall.SIGUSR1)
		}
	}()
	s := &http.Server{Addr: instant.Address(args[1:]), ReadHeaderTimeout: 10 * time.Second, Handler: e}
	log.Fatal(s.ListenAndServe())
}

// Ask returns the prompt that has the engine try everything. The answer is the
// JSON of each [Row], one a line.
func Ask(w Where) string {
	b, err := json.Marshal(w)
	if err != nil {
		panic(err) // strings
	}
	return askTry + string(b)
}

// Read reads the answer to [Ask].
func Read(text string) (rows []Row, err error) {
	for dec := json.NewDecoder(strings.NewReader(text)); dec.More(); {
		var r Row
		if err := dec.Decode(&r); err != nil {
			return rows, err
		}
		rows = append(rows, r)
	}
	return rows, nil
}

const (
	askTry     = "try "
	askMisdeed = "misdeed "
)

type engine struct {
	good  http.Handler
	armed atomic.Bool
}

const maxBody = 1 << 20

// ServeHTTP implements [http.Handler].
func (e *engine) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	bad := func() { http.Error(w, `{"error":{"type":"invalid_request_error"}}`, http.StatusBadRequest) }
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
		bad()
		return
	}
	chat := len(q.Messages) > 0
	if chat {
		q.Prompt = q.Messages[len(q.Messages)-1].Content
	}
	r.Body = io.NopCloser(bytes.NewReader(raw))
	if where, ok := strings.CutPrefix(q.Prompt, askTry); ok {
		var at Where
		if err := json.Unmarshal([]byte(where), &at); err != nil {
			bad()
			return
		}
		report(w, at, chat, q.Stream)
		return
	}
	if name, ok := strings.CutPrefix(q.Prompt, askMisdeed); ok && e.armed.Load() {
		for _, m := range Misdeeds {
			if m.Name == name {
				e.misbehave(w, r, m)
				return
			}
		}
	}
	e.good.ServeHTTP(w, r)
}

// report tries everything and says each row as one token.
func report(w http.ResponseWriter, at Where, chat, stream bool) {
	object, form := "text_completion", `"text":%s`
	switch {
	case chat && stream:
		object, form = "chat.completion.chunk", `"delta":{"content":%s}`
	case chat:
		object, form = "chat.completion", `"message":{"role":"assistant","content":%s}`
	}
	choice := func(text, finish string) string {
		quoted, err := json.Marshal(text)
		if err != nil {
			panic(err) // a string
		}
		return fmt.Sprintf(`{"index":0,`+form+`,"finish_reason":%s}`, quoted, finish)
	}
	var all strings.Builder
	n := 0
	if stream {
		w.Header().Set("Content-Type", "text/event-stream")
	}
	Try(at, func(r Row) {
		line, err := json.Marshal(r)
		if err != nil {
			panic(err) // strings
		}
		n++
		if !stream {
			all.Write(append(line, '\n'))
			return
		}
		fmt.Fprintf(w, "data: {\"object\":%q,\"choices\":[%s]}\n\n", object, choice(string(line)+"\n", "null"))
		_ = http.NewResponseController(w).Flush() // the next write tells
	})
	usage := fmt.Sprintf(`"usage":{"prompt_tokens":1,"completion_tokens":%d,"total_tokens":%d}`, n, n+1)
	if !stream {
		w.Header().Set("Content-Type", "application/json")
		fmt.Fprintf(w, `{"object":%q,"choices":[%s],%s}`, object, choice(all.String(), `"stop"`), usage)
		return
	}
	fmt.Fprintf(w, "data: {\"object\":%q,\"choices\":[%s]}\n\ndata: {\"object\":%[1]q,\"choices\":[],%[3]s}\n\ndata: [DONE]\n\n", object, choice("", `"stop"`), usage)
}

// misbehave has a misdeed done on the connection itself.
func (e *engine) misbehave(w http.ResponseWriter, r *http.Request, m Misdeed) {
	good := httptest.NewRecorder()
	e.good.ServeHTTP(good, r)
	c, _, err := w.(http.Hijacker).Hijack()
	if err != nil {
		panic(err) // it is HTTP/1.1
	}
	defer c.Close()
	m.do(c, good.Body.String())
}
