package network

import (
	"io"
	"log/slog"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/resultity/node/test/pipes"
)

// Strangers who send slowly, do not read, or stay without asking lose the connection
// in time. The clock is the bubble's.
func TestPatience(t *testing.T) {
	get := "GET /small HTTP/1.1\r\nHost: a\r\n\r\n"
	for name, c := range map[string]struct {
		says  string
		reads bool
		ends  time.Duration
		want  string // in the answer
	}{
		"says nothing":          {"", true, 10 * time.Second, ""},
		"half a head":           {get[:20], true, 10 * time.Second, ""},
		"half a body":           {"POST /read HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n{", true, smallTimeout, ""},
		"asks no more":          {get, true, 2 * time.Minute, "200 OK"},
		"does not read":         {get, false, smallTimeout, ""},
		"a head without an end": {get[:len(get)-2] + "X: " + strings.Repeat("x", 64<<10), true, 500 * time.Millisecond, "431"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := &service{log: slog.New(slog.DiscardHandler)}
				srv := s.server(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					inTime(w)
					if _, err := io.ReadAll(r.Body); err != nil {
						return
					}
					_, _ = io.WriteString(w, "ok")
				}))
				l, served := pipes.Listen(), make(chan error, 1)
				go func() { served <- srv.Serve(l) }()
				took, answer := l.Lasts(t, c.says, c.reads)
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
