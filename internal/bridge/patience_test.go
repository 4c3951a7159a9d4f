package bridge

import (
	"io"
	"log"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/resultity/node/test/pipes"
)

// Callers that send slowly or stay without asking lose the connection in time, and with
// it their place. The clock is the bubble's.
func TestPatience(t *testing.T) {
	get := "GET /health HTTP/1.1\r\nHost: a\r\n\r\n"
	for name, c := range map[string]struct {
		says string
		ends time.Duration
		want string // in the answer
	}{
		"says nothing":          {"", 10 * time.Second, ""},
		"half a head":           {get[:20], 10 * time.Second, ""},
		"asks no more":          {get, 5 * time.Minute, "200 OK"},
		"a head without an end": {get[:len(get)-2] + "X: " + strings.Repeat("x", 64<<10), 500 * time.Millisecond, "431"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				srv := newServer(nil, log.New(io.Discard, "", 0))
				srv.Handler = http.HandlerFunc(func(http.ResponseWriter, *http.Request) {})
				l, served := pipes.Listen(), make(chan error, 1)
				go func() { served <- srv.Serve(l) }()
				took, answer := l.Lasts(t, c.says, true)
				t.Logf("expected: the end after %v; got: after %v", c.ends, took)
				if took > c.ends+time.Second || took < c.ends || !strings.Contains(answer, c.want) {
					t.Errorf("it ended after %v with %q, want %v and %q", took, answer, c.ends, c.want)
				}
				_ = srv.Close()
				<-served
			})
		})
	}
}
