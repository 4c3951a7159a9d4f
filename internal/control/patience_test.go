package control

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"path/filepath"
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
		"says nothing":          {"", true, askTime, ""},
		"half a head":           {status[:20], true, askTime, ""},
		"half a body":           {"POST " + bindPath + " HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n{", true, askTime, "400 Bad Request"},
		"half a body of replay": {"POST " + replayPath + " HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n{", true, replayArrives, ""},
		"asks no more":          {status, true, askTime, "200 OK"},
		"does not read":         {status, false, askTime, ""},
		"a head without an end": {status[:len(status)-2] + "X: " + strings.Repeat("x", 8*maxHead), true, 500 * time.Millisecond, http.StatusText(http.StatusRequestHeaderFieldsTooLarge)},
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

// over returns a client whose connections are a listener's of this bubble.
func over(l *pipes.Listener) *Client {
	return &Client{&http.Client{Timeout: waitTime, Transport: &http.Transport{
		DisableKeepAlives: true, DialContext: func(context.Context, string, string) (net.Conn, error) { return l.Dial(), nil },
	}}}
}

// The network has its whole time to answer, and no more.
func TestBindEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l, served := pipes.Listen(), make(chan error, 1)
		ctx, cancel := context.WithCancel(t.Context())
		go func() { served <- Serve(ctx, l, &node{enter: make(chan struct{})}) }()
		begin := time.Now()
		_, err := over(l).Bind(t.Context(), BindRequest{})
		took := time.Since(begin)
		t.Logf("expected: the end after %v; got: %v after %v", bindTimeout, err, took)
		if took != bindTimeout || err == nil || err.Error() != context.DeadlineExceeded.Error() {
			t.Errorf("it ended after %v with %v, want %v and %v", took, err, bindTimeout, context.DeadlineExceeded)
		}
		cancel()
		if err := <-served; err != nil {
			t.Error(err)
		}
	})
}

// Those who hold all connections and say nothing cost no more than these, and lose them
// while others still wait for theirs.
func TestConnections(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l, served := pipes.Listen(), make(chan error, 1)
		ctx, cancel := context.WithCancel(t.Context())
		go func() { served <- Serve(ctx, l, &node{}) }()
		silent := func(n int) {
			for range n {
				go func() { _ = l.Dial() }()
			}
			synctest.Wait()
		}
		begin := time.Now()
		silent(maxConns - 1)
		if err := over(l).Get(t.Context(), "status", new(Status)); err != nil || time.Since(begin) > 0 {
			t.Errorf("on the last connection: %v after %v", err, time.Since(begin))
		}
		silent(2) // one of them is accepted, and not served
		err := over(l).Get(t.Context(), "status", new(Status))
		took := time.Since(begin)
		t.Logf("%d silent connections: expected: an answer after %v; got: %v after %v", maxConns+1, askTime, err, took)
		if err != nil || took != askTime {
			t.Errorf("%v after %v, want an answer after %v", err, took, askTime)
		}
		// It ends also while all are held.
		silent(2 * maxConns)
		cancel()
		if err := <-served; err != nil {
			t.Error(err)
		}
	})
}

// Who waits for longer than the agent may take is told so.
func TestNoAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := pipes.Listen()
		go func() {
			c, err := l.Accept()
			if err == nil {
				_, _ = io.Copy(io.Discard, c)
			}
		}()
		begin := time.Now()
		err := over(l).Get(t.Context(), "status", new(Status))
		if took := time.Since(begin); took != waitTime || err == nil || !strings.Contains(err.Error(), "does not answer") || errors.Is(err, ErrNotRunning) {
			t.Errorf("%v after %v", err, took)
		}
	})
}

// An answer beyond its bound is refused by the client, and not cut.
func TestLargeAnswers(t *testing.T) {
	var size int
	dir := t.TempDir()
	l, err := Listen(dir)
	if err != nil {
		t.Fatal(err)
	}
	s := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		_, _ = w.Write(make([]byte, size)) // the client need not take all of it
	})}
	go func() { _ = s.Serve(l) }()
	defer s.Close()
	c := NewClient(filepath.Join(dir, SocketName))
	for name, x := range map[string]struct {
		most int
		ask  func() error
	}{
		"status": {maxAnswer, func() error { return c.Get(t.Context(), "status", new(Status)) }},
		"report": {maxReport, func() error { _, err := c.Doctor(t.Context()); return err }},
		"bundle": {maxBundle, func() error { _, err := c.Bundle(t.Context()); return err }},
	} {
		for _, size = range []int{x.most, x.most + 1} {
			err := x.ask()
			if large := err != nil && strings.Contains(err.Error(), fmt.Sprintf("too large: more than %d bytes; see", x.most)); large != (size > x.most) {
				t.Errorf("%s of %d bytes: %v", name, size, err)
			}
		}
	}
}

// One archive is made at a time.
func TestOneBundle(t *testing.T) {
	n := &node{enter: make(chan struct{}), leave: make(chan struct{})}
	path, _ := serve(t, n)
	done := make(chan error, 1)
	go func() {
		_, err := NewClient(path).Bundle(t.Context())
		done <- err
	}()
	<-n.enter
	_, err := NewClient(path).Bundle(t.Context())
	t.Logf("expected: %v; got: %v", ErrBusy, err)
	if !errors.Is(err, ErrBusy) {
		t.Error(err)
	}
	close(n.leave)
	if err := <-done; err != nil {
		t.Error(err)
	}
}
