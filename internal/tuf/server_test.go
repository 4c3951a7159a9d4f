package tuf

import (
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/resultity/node/internal/snapshot"
)

// counted counts what is written to connections.
type counted struct {
	net.Listener
	written *atomic.Int64
}

func (l counted) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	return countedConn{c, l.written}, err
}

type countedConn struct {
	net.Conn
	written *atomic.Int64
}

func (c countedConn) Write(b []byte) (int, error) {
	n, err := c.Conn.Write(b)
	c.written.Add(int64(n))
	return n, err
}

// What only a real server can do: attacks below the bytes of a file.
func TestAttacksOfAServer(t *testing.T) {
	spaces := strings.Repeat(" ", 64<<10)
	for _, a := range []struct {
		name string
		want error
		most int64 // bytes that the server gets rid of
		do   http.HandlerFunc
	}{
		{"compressed without end", ErrTooLarge, 1 << 20, func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Encoding", "gzip")
			z := gzip.NewWriter(w)
			for r.Context().Err() == nil {
				if _, err := io.WriteString(z, spaces); err != nil {
					return
				}
			}
		}},
		{"a length that is never reached", ErrTooLarge, 64 << 20, func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Length", fmt.Sprint(int64(1)<<50))
			for r.Context().Err() == nil {
				if _, err := io.WriteString(w, spaces); err != nil {
					return
				}
			}
		}},
		{"a body that ends early", ErrUnreachable, 1 << 20, func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", "1000")
			_, _ = io.WriteString(w, "{") // the client sees what comes of it
		}},
		{"headers without end", ErrUnreachable, 64 << 20, func(w http.ResponseWriter, _ *http.Request) {
			c, _, err := w.(http.Hijacker).Hijack()
			if err != nil {
				t.Error(err)
				return
			}
			defer c.Close()
			_, err = io.WriteString(c, "HTTP/1.1 200 OK\r\n")
			for n := 0; err == nil; n++ {
				_, err = fmt.Fprintf(c, "X-%d: %s\r\n", n, spaces[:1000])
			}
		}},
		{"answers that go on and on before the answer", ErrUnreachable, 64 << 20, func(w http.ResponseWriter, r *http.Request) {
			for r.Context().Err() == nil {
				w.Header().Set("Link", spaces[:1000])
				w.WriteHeader(http.StatusEarlyHints)
			}
		}},
		{"no HTTP", ErrUnreachable, 1 << 20, func(w http.ResponseWriter, _ *http.Request) {
			c, _, err := w.(http.Hijacker).Hijack()
			if err != nil {
				t.Error(err)
				return
			}
			_, _ = io.WriteString(c, "220 mail.example ESMTP\r\n") // the client sees what comes of it
			_ = c.Close()
		}},
	} {
		t.Run(a.name, func(t *testing.T) {
			t.Parallel()
			n := newNetwork(t)
			n.publish(t, 2)
			hostile := new(atomic.Bool)
			honest := n.handler()
			var written atomic.Int64
			server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if hostile.Load() && strings.HasSuffix(r.URL.Path, "/timestamp.json") {
					a.do(w, r)
					return
				}
				honest.ServeHTTP(w, r)
			}))
			server.Listener = counted{server.Listener, &written}
			server.StartTLS()
			defer server.Close()
			c, err := New(Config{Dir: t.TempDir(), URL: server.URL + "/tuf", Root: n.root(t), Client: server.Client()})
			if err != nil {
				t.Fatal(err)
			}
			sees(t, c, 2)
			before := stateOf(t, c)
			hostile.Store(true)
			written.Store(0)
			begin := time.Now()
			ctx, cancel := context.WithTimeout(t.Context(), fetchTimeout+10*time.Second)
			defer cancel()
			_, err = c.Refresh(ctx)
			if !errors.Is(err, a.want) || errors.Is(err, snapshot.ErrUntrusted) != (a.want != ErrUnreachable) {
				t.Errorf("%v, want %v", err, a.want)
			}
			t.Logf("expected: %s; got: %v (%d bytes, %v)", Event(a.want).Name, err, written.Load(), time.Since(begin).Round(time.Millisecond))
			server.CloseClientConnections()
			if w := written.Load(); w > a.most {
				t.Errorf("the server could send %d bytes, want at most %d", w, a.most)
			}
			if string(stateOf(t, c)) != string(before) {
				t.Error("what the node remembers has changed")
			}
			remembers(t, c, 2)
			hostile.Store(false)
			n.publish(t, 3)
			sees(t, c, 3)
		})
	}
}
