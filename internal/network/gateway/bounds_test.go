package gateway

import (
	"errors"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/resultity/node/test/pipes"
)

// A client that is slow has the time that a slow link needs, and no more: to send its
// request, and to take what is answered. The clock is the bubble's.
func TestSlowClientsAreBounded(t *testing.T) {
	const limit = 10 * slowLink // bytes of a request
	post := "POST / HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n"
	for name, c := range map[string]struct {
		says  string
		reads bool
		ends  time.Duration
		want  string
	}{
		"half a body":       {post + "{", true, bodyTimeout + limit/slowLink*time.Second, "did not arrive in full, or not in time"},
		"reads no refusal":  {post + strings.Repeat(" ", 100), false, writeTimeout, ""},
		"a body in no time": {strings.Replace(post, "\r\n\r\n", "\r\nConnection: close\r\n\r\n", 1) + strings.Repeat(" ", 100), true, 0, "Internal error"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				g := new(Gateway)
				srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					_, err := readBody(w, r, limit)
					if err == nil {
						err = errors.New("nobody works here")
					}
					g.fail(w, err)
				})}
				l, served := pipes.Listen(), make(chan error, 1)
				go func() { served <- srv.Serve(l) }()
				took, answer := l.Lasts(t, c.says, c.reads)
				t.Logf("expected: the end after %v; got: after %v", c.ends, took)
				if took < c.ends || took > c.ends+time.Second || !strings.Contains(answer, c.want) {
					t.Errorf("it ended after %v with %q, want %v and %q", took, answer, c.ends, c.want)
				}
				_ = srv.Close() // only fails for the listener
				<-served
			})
		})
	}
}
