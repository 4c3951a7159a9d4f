package bridge

import (
	"bufio"
	"context"
	"errors"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/resultity/node/internal/bridge/contract"
	"github.com/resultity/node/internal/plainhttp"
	"github.com/resultity/node/test/pipes"
)

// to has a client of the bridge's reach an engine in the same bubble, until the test
// ends.
func to(t *testing.T, way *plainhttp.Transport, engine http.HandlerFunc) {
	t.Helper()
	l, served := pipes.Listen(), make(chan error, 1)
	srv := &http.Server{Handler: engine, ErrorLog: log.New(io.Discard, "", 0)}
	go func() { served <- srv.Serve(l) }()
	way.Dial = func(context.Context) (net.Conn, error) { return l.Dial(), nil }
	t.Cleanup(func() { // in the bubble
		way.CloseIdleConnections()
		_ = srv.Close()
		<-served
	})
}

// gate is a forwarder for callers and an engine in one bubble.
func gate(t *testing.T, engine http.HandlerFunc) *pipes.Listener {
	t.Helper()
	o := contract.Defaults()
	o.MaxInFlight, o.MaxBody = 4, 1<<10
	v := newVigil(o.Stall, o.CanaryEvery)
	f := newForwarder(o, v, func() contract.Sandbox { return contract.Sandbox{} }, v.fill)
	to(t, f.engine, engine)
	srv := newServer(f, log.New(io.Discard, "", 0))
	l, served := pipes.Listen(), make(chan error, 1)
	go func() { served <- srv.Serve(l) }()
	t.Cleanup(func() {
		_ = srv.Close()
		<-served
		f.serving.Wait()
	})
	return l
}

// waits is an engine that answers nothing.
func waits(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }

// Callers that send slowly, take slowly or stay without asking lose the connection in
// time, and with it their place; an engine that does not answer what needs no model is
// not waited for. The clock is the bubble's.
func TestPatience(t *testing.T) {
	get := "GET /health HTTP/1.1\r\nHost: a\r\n\r\n"
	last := "GET /metrics HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
	post := "POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\n{}"
	says := func(w http.ResponseWriter, _ *http.Request) {
		for {
			if _, err := w.Write(make([]byte, pieceSize)); err != nil {
				return
			}
		}
	}
	fine := func(http.ResponseWriter, *http.Request) {}
	for name, c := range map[string]struct {
		engine http.HandlerFunc
		says   string
		reads  bool
		ends   time.Duration
		want   string // in the answer
	}{
		"says nothing":          {fine, "", true, headerPatience, ""},
		"half a head":           {fine, get[:20], true, headerPatience, ""},
		"half a body":           {fine, post[:len(post)-1], true, bodyPatience, "408"},
		"asks no more":          {fine, get, true, idlePatience, "200 OK"},
		"a head without an end": {fine, get[:len(get)-2] + "X: " + strings.Repeat("x", 2*maxHeader), true, 500 * time.Millisecond, "431"},
		"takes nothing":         {says, post, false, readerPatience, ""},
		"an engine that waits":  {waits, last, true, asidePatience, "502"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				took, answer := gate(t, c.engine).Lasts(t, c.says, c.reads)
				t.Logf("expected: the end after %v; got: after %v", c.ends, took)
				if took > c.ends+time.Second || took < c.ends || !strings.Contains(answer, c.want) {
					t.Errorf("it ended after %v with %q, want %v and %q", took, answer, c.ends, c.want)
				}
			})
		})
	}
}

// Of what needs no model so much is with the engine at once, and one more is refused.
func TestAsidesAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var busy atomic.Int64
		l := gate(t, func(w http.ResponseWriter, r *http.Request) {
			busy.Add(1)
			waits(w, r)
		})
		ask := func() string {
			c := l.Dial()
			defer c.Close()
			if _, err := io.WriteString(c, "GET /health HTTP/1.1\r\nHost: a\r\n\r\n"); err != nil {
				return err.Error()
			}
			resp, err := http.ReadResponse(bufio.NewReader(c), nil)
			if err != nil {
				return err.Error()
			}
			resp.Body.Close()
			return resp.Status
		}
		var callers sync.WaitGroup
		for range maxAsides {
			callers.Go(func() { ask() })
		}
		synctest.Wait()
		before, began := busy.Load(), time.Now()
		one := ask()
		t.Logf("one more than %d: expected: 503 at once; got: %s after %v", maxAsides, one, time.Since(began))
		if before != maxAsides || busy.Load() != before || !strings.HasPrefix(one, "503") || time.Since(began) > 0 {
			t.Errorf("%d are with the engine, and one more is answered %s after %v", busy.Load(), one, time.Since(began))
		}
		callers.Wait()
		if one := ask(); strings.HasPrefix(one, "503") {
			t.Error("the places were not given back")
		}
	})
}

// An engine that is loading is asked ever less often, but not too rarely to be noticed
// when it is up, and a question that it does not answer is given up.
func TestAwakenAsks(t *testing.T) {
	for name, c := range map[string]struct {
		engine      http.HandlerFunc
		least, most time.Duration // between two questions
	}{
		"loading":        {func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(503) }, pollMost * 9 / 10, pollMost},
		"answers nobody": {waits, (healthPatience + pollMost) * 9 / 10, healthPatience + pollMost},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b := &bridge{o: contract.Defaults(), log: log.New(io.Discard, "", 0)}
				b.o.StartTimeout = time.Minute
				b.client = newClient(b.o)
				var asked atomic.Int64
				to(t, b.client.engine, func(w http.ResponseWriter, r *http.Request) {
					asked.Add(1)
					c.engine(w, r)
				})
				ctx, cancel := context.WithTimeout(t.Context(), b.o.StartTimeout)
				defer cancel()
				err := b.awaken(ctx)
				b.running.Wait()
				if every := b.o.StartTimeout / time.Duration(asked.Load()); err == nil || every < c.least || every > c.most {
					t.Errorf("asked every %v, want %v to %v (%v)", every, c.least, c.most, err)
				}
			})
		})
	}
}

// An engine has its time to end after each signal, and the bridge ends in any case.
func TestEndOfTheEngine(t *testing.T) {
	for heeds, want := range []time.Duration{0, endPatience, 2 * endPatience, 3 * endPatience} { // the first, the second, the third, none
		synctest.Test(t, func(t *testing.T) {
			b := &bridge{log: log.New(io.Discard, "", 0), engine: &engine{signals: make(chan syscall.Signal), exited: make(chan syscall.WaitStatus, 1)}}
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			var got []syscall.Signal
			go func() {
				for {
					select {
					case s := <-b.engine.signals:
						if got = append(got, s); len(got) == heeds+1 {
							b.engine.exited <- 0
						}
					case <-ctx.Done():
						return
					}
				}
			}()
			began := time.Now()
			code := b.endEngine(ctx)
			took := time.Since(began)
			synctest.Wait() // for who notes the signals
			all := []syscall.Signal{syscall.SIGTERM, syscall.SIGTERM, syscall.SIGKILL}
			if code != contract.ExitStopped || took != want || len(got) != min(heeds+1, len(all)) || got[len(got)-1] != all[len(got)-1] {
				t.Errorf("ended with %d after %v and %v, want %v", code, took, got, want)
			}
		})
	}
}

// A listener who does not read is given up: there is more to do than to tell it.
func TestNotifyGivesUp(t *testing.T) {
	defer func(d time.Duration) { notifyPatience = d }(notifyPatience)
	notifyPatience = 100 * time.Millisecond
	path := filepath.Join(t.TempDir(), "n")
	l, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	for n := 0; ; n++ {
		err := notifier{path}.send("WATCHDOG=1")
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return
		}
		if err != nil || n > 1<<20 {
			t.Fatalf("after %d messages: %v", n, err)
		}
	}
}
