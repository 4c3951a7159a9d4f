package bridge

import (
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"strings"
	"testing"

	"github.com/resultity/node/internal/bridge/contract"
)

// Only an answer with a choice in it shows that the model works.
func TestCanaryWantsAChoice(t *testing.T) {
	var answer http.HandlerFunc
	var asked string
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	engine := &http.Server{ErrorLog: log.New(io.Discard, "", 0), Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		asked = r.Method + " " + r.RequestURI + " " + string(body)
		answer(w, r)
	})}
	go engine.Serve(l)
	defer engine.Close()
	o := contract.Defaults()
	o.Engine, o.Model = l.Addr().(*net.TCPAddr).AddrPort(), "org/tiny"
	c := newClient(o)
	defer c.close()

	say := func(status int, text string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(status)
			io.WriteString(w, text)
		}
	}
	const good = `{"choices":[{"text":"b"}]}`
	for name, tt := range map[string]struct {
		answer http.HandlerFunc
		want   string // in the error; "" for none
	}{
		"good":       {say(200, good), ""},
		"no choice":  {say(200, `{"choices":[]}`), "without a choice"},
		"no choices": {say(200, `{"error":{"message":"SECRET"}}`), "without a choice"},
		"null":       {say(200, `null`), "without a choice"},
		"not JSON":   {say(200, `SECRET`), "something else"},
		"empty":      {say(200, ``), "something else"},
		"an error":   {say(500, good), "answered 500"},
		"loading":    {say(503, good), "answered 503"},
		"created":    {say(201, good), "answered 201"},
		"moved":      {func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, "/health", http.StatusFound) }, "answered 302"},
		"too much":   {say(200, good+strings.Repeat(" ", maxReply)), "more than 1048576 bytes"},
		"cut": {func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", "1000")
			io.WriteString(w, good)
		}, "EOF"},
		"without an end": {func(w http.ResponseWriter, r *http.Request) {
			for r.Context().Err() == nil {
				if _, err := io.WriteString(w, strings.Repeat("SECRET", 10000)); err != nil {
					return
				}
			}
		}, "more than 1048576 bytes"},
	} {
		answer = tt.answer
		err := c.complete(t.Context())
		if tt.want == "" && err != nil || tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)) {
			t.Errorf("%s: %v, want %q", name, err, tt.want)
		}
		if err != nil && strings.Contains(err.Error(), "SECRET") {
			t.Errorf("%s: the error tells the answer: %v", name, err)
		}
		if want := `POST /v1/completions {"model":"org/tiny","prompt":"a","max_tokens":1,"temperature":0}`; asked != want {
			t.Errorf("asked %s, want %s", asked, want)
		}
	}
	for status, want := range map[int]bool{200: true, 204: false, 404: false, 503: false} {
		answer = say(status, "")
		if err := c.healthy(t.Context()); (err == nil) != want {
			t.Errorf("health %d: %v", status, err)
		}
		if asked != fmt.Sprintf("GET %s ", o.Health) {
			t.Errorf("asked %s", asked)
		}
	}
}
