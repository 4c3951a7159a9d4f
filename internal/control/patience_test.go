package control

import (
	"context"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/resultity/node/test/pipes"
)

// Whoever asks slowly, does not read, or stays without asking loses the connection in
// time. The clock is the bubble's.
func TestPatience(t *testing.T) {
	status := "GET /v1/status HTTP/1.1\r\nHost: a\r\n\r\n"
	for name, c := range map[string]struct {
		says  string
		reads bool
		ends  time.Duration
		want  string // in the answer
	}{
		"says nothing":          {"", true, 10 * time.Second, ""},
		"half a head":           {status[:20], true, 10 * time.Second, ""},
		"half a body":           {"POST " + bindPath + " HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n{", true, 10 * time.Second, "400 Bad Request"},
		"half a body of replay": {"POST " + replayPath + " HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n{", true, replayArrives, ""},
		"asks no more":          {status, true, time.Minute, "200 OK"},
		"does not read":         {status, false, 10 * time.Second, ""},
		"a head without an end": {status[:len(status)-2] + "X: " + strings.Repeat("x", 64<<10), true, 500 * time.Millisecond, http.StatusText(http.StatusRequestHeaderFieldsTooLarge)},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				l, served := pipes.Listen(), make(chan error, 1)
				ctx, cancel := context.WithCancel(t.Context())
				go func() { served <- Serve(ctx, l, &node{}) }()
				took, answer := l.Lasts(t, c.says, c.reads)
				t.Logf("expected: the end after %v; got: after %v", c.ends, took)
				if took > c.ends+time.Second || took < c.ends || !strings.Contains(answer, c.want) {
					t.Errorf("it ended after %v with %q, want %v and %q", took, answer, c.ends, c.want)
				}
				cancel()
				if err := <-served; err != nil {
					t.Error(err)
				}
			})
		})
	}
}
