package plainhttp

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// server does to each connection what a test says, and counts them.
type server struct {
	path  string
	conns atomic.Int32
}

// peer is the server's side of a connection.
type peer struct {
	net.Conn
	r *bufio.Reader
	n int32 // number of the connection, from 1
	t *testing.T
}

// request reads the next request and returns its body, and false at the end of
// the connection.
func (p *peer) request() (body string, ok bool) {
	req, err := http.ReadRequest(p.r)
	if err != nil {
		return "", false
	}
	b, err := io.ReadAll(req.Body)
	return string(b), err == nil
}

func (p *peer) say(text string) { _, _ = io.WriteString(p, text) }

// ended waits until the client has closed the connection.
func (p *peer) ended() {
	_ = p.SetReadDeadline(time.Now().Add(2 * time.Minute))
	if _, err := p.r.ReadByte(); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		p.t.Errorf("the connection has not ended: %v", err)
	}
}

func serve(t *testing.T, script func(*peer)) (*server, *Transport) {
	t.Helper()
	s := &server{path: filepath.Join(t.TempDir(), "s")}
	l, err := net.Listen("unix", s.path)
	if err != nil {
		t.Fatal(err)
	}
	var done sync.WaitGroup
	done.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			done.Go(func() {
				defer c.Close()
				script(&peer{c, bufio.NewReader(c), s.conns.Add(1), t})
			})
		}
	})
	client := &Transport{
		Dial:    func(ctx context.Context) (net.Conn, error) { return new(net.Dialer).DialContext(ctx, "unix", s.path) },
		MaxIdle: 2, Idle: time.Minute, MaxHeader: 4 << 10,
	}
	t.Cleanup(func() {
		client.CloseIdleConnections()
		_ = l.Close()
		done.Wait()
	})
	return s, client
}

func request(t *testing.T, body string) *http.Request {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "http://engine/x", strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	return req
}

// ask returns the whole answer.
func ask(t *testing.T, c *Transport, body string) (string, error) {
	t.Helper()
	resp, err := c.RoundTrip(request(t, body))
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	return string(b), err
}

func answer(body string) string {
	return fmt.Sprintf("HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s", len(body), body)
}

func chunked(pieces ...string) string {
	s := "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
	for _, p := range pieces {
		s += fmt.Sprintf("%x\r\n%s\r\n", len(p), p)
	}
	return s + "0\r\n\r\n"
}

// Every form of a whole answer, and whether the connection serves the next one.
func TestConnections(t *testing.T) {
	for name, c := range map[string]struct {
		answer, body string
		again        bool
	}{
		"of a length":          {answer("one"), "one", true},
		"empty":                {answer(""), "", true},
		"without a body":       {"HTTP/1.1 204 No Content\r\n\r\n", "", true},
		"in chunks":            {chunked("one", "two"), "onetwo", true},
		"until the end":        {"HTTP/1.1 200 OK\r\n\r\none", "one", false},
		"that is the last one": {"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 3\r\n\r\none", "one", false},
		"of an old server":     {"HTTP/1.0 200 OK\r\nContent-Length: 3\r\n\r\none", "one", false},
		"with more behind it":  {answer("one") + answer("forged"), "one", false},
		"and more in chunks":   {chunked("one") + chunked("forged"), "one", false},
		"not final":            {"HTTP/1.1 103 Early Hints\r\n\r\n" + answer("forged"), "", false},
	} {
		t.Run(name, func(t *testing.T) {
			const asks = 5
			s, client := serve(t, func(p *peer) {
				for {
					if _, ok := p.request(); !ok {
						return
					}
					if p.say(c.answer); !c.again {
						if strings.Contains(name, "until") {
							return
						}
						p.ended()
						return
					}
				}
			})
			for range asks {
				if got, err := ask(t, client, "hello"); err != nil || got != c.body {
					t.Fatalf("%q, %v; want %q", got, err, c.body)
				}
			}
			want := int32(asks)
			if c.again {
				want = 1
			}
			if n := s.conns.Load(); n != want {
				t.Errorf("%d connections for %d answers, want %d", n, asks, want)
			}
		})
	}
}

// Who closes an exchange that has ended leaves its connection to the next one.
func TestCloseAfterTheEnd(t *testing.T) {
	s, client := serve(t, func(p *peer) {
		for {
			body, ok := p.request()
			if !ok {
				return
			}
			p.say(answer(body))
		}
	})
	for _, body := range []string{"one", ""} { // with a body to read to its end, and without
		x, err := client.Send(request(t, body))
		if err != nil {
			t.Fatal(err)
		}
		resp, err := x.Response()
		if err != nil {
			t.Fatal(err)
		}
		if b, err := io.ReadAll(resp.Body); err != nil || string(b) != body {
			t.Fatalf("%q, %v", b, err)
		}
		next, err := client.Send(request(t, "next"))
		if err != nil {
			t.Fatal(err)
		}
		x.Close()
		if resp, err = next.Response(); err != nil {
			t.Fatal(err)
		}
		if b, err := io.ReadAll(resp.Body); err != nil || string(b) != "next" {
			t.Errorf("%q, %v", b, err)
		}
	}
	if n := s.conns.Load(); n != 1 {
		t.Errorf("%d connections", n)
	}
}

// What comes between two answers belongs to none.
func TestWhatComesUnasked(t *testing.T) {
	said := make(chan struct{})
	_, client := serve(t, func(p *peer) {
		p.request()
		p.say(answer(fmt.Sprint("the answer of ", p.n)))
		if p.n == 1 {
			<-said
			p.say(answer("forged"))
			said <- struct{}{}
		}
		p.ended()
	})
	if got, err := ask(t, client, "a"); err != nil || got != "the answer of 1" {
		t.Fatal(got, err)
	}
	said <- struct{}{}
	<-said
	if got, err := ask(t, client, "b"); err != nil || got != "the answer of 2" {
		t.Fatal(got, err)
	}
}

// A kept connection may end at any moment, with a request on its way too. The
// request is sent again, whole, and once.
func TestKeptConnectionEnds(t *testing.T) {
	const body = "a body of some length"
	for name, first := range map[string]func(p *peer){
		"before the request": func(p *peer) {},
		"with the request":   func(p *peer) { p.request() },
	} {
		t.Run(name, func(t *testing.T) {
			s, client := serve(t, func(p *peer) {
				got, _ := p.request()
				if got != body {
					t.Errorf("the server got %q", got)
				}
				p.say(answer(fmt.Sprint(p.n)))
				if p.n == 1 {
					first(p)
					return
				}
				p.ended()
			})
			for _, want := range []string{"1", "2"} {
				if got, err := ask(t, client, body); err != nil || got != want {
					t.Fatal(got, err)
				}
			}
			if n := s.conns.Load(); n != 2 {
				t.Errorf("%d connections", n)
			}
		})
	}
}

// An answer that has begun is this request's, and a new connection that ends is
// the server's word.
func TestNotSentAgain(t *testing.T) {
	for _, said := range []string{"", "HTTP/1.1 20", "HTTP/1.1 200 OK\r\nContent-Le"} {
		s, client := serve(t, func(p *peer) {
			p.request()
			if said != "" { // else a kept one would be replaced
				p.say(answer("fine"))
				p.request()
			}
			p.say(said)
		})
		if said != "" {
			if _, err := ask(t, client, "x"); err != nil {
				t.Fatal(err)
			}
		}
		if got, err := ask(t, client, "x"); err == nil {
			t.Errorf("after %q: %q", said, got)
		}
		if n := s.conns.Load(); n != 1 {
			t.Errorf("after %q: %d connections", said, n)
		}
	}
}

func TestCutShort(t *testing.T) {
	for _, said := range []string{"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\none", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\none\r\n"} {
		_, client := serve(t, func(p *peer) { p.request(); p.say(said) })
		if got, err := ask(t, client, "x"); got != "one" || !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("%q, %v", got, err)
		}
	}
}

func TestLargeHead(t *testing.T) {
	_, client := serve(t, func(p *peer) {
		for {
			body, ok := p.request()
			if !ok {
				return
			}
			p.say("HTTP/1.1 200 OK\r\nContent-Length: 10000\r\nX: " + body + "\r\n\r\n" + strings.Repeat("b", 10000))
		}
	})
	if got, err := ask(t, client, strings.Repeat("a", 3<<10)); err != nil || len(got) != 10000 {
		t.Fatal(len(got), err)
	}
	if _, err := ask(t, client, strings.Repeat("a", 4<<10)); !errors.Is(err, errHead) {
		t.Errorf("got %v", err)
	}
}

// Whoever gives an answer up ends the connection, by which the server learns it.
func TestGivenUp(t *testing.T) {
	for name, c := range map[string]struct {
		say    string
		giveUp func(t *testing.T, x *Exchange, cancel func())
	}{
		"before the head": {"", func(t *testing.T, x *Exchange, cancel func()) {
			cancel()
			if _, err := x.Response(); err == nil {
				t.Error("there is an answer")
			}
		}},
		"not waited for": {"", func(_ *testing.T, x *Exchange, _ func()) { x.Close() }},
		"within the body": {"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\none", func(t *testing.T, x *Exchange, cancel func()) {
			resp, err := x.Response()
			if err != nil {
				t.Fatal(err)
			}
			cancel()
			if b, err := io.ReadAll(resp.Body); err == nil {
				t.Errorf("%q is whole", b)
			}
		}},
		"closed": {"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\none", func(t *testing.T, x *Exchange, _ func()) {
			resp, err := x.Response()
			if err != nil {
				t.Fatal(err)
			}
			_ = resp.Body.Close()
			if _, err := resp.Body.Read(make([]byte, 1)); !errors.Is(err, http.ErrBodyReadAfterClose) {
				t.Errorf("after Close: %v", err)
			}
		}},
	} {
		t.Run(name, func(t *testing.T) {
			gone := make(chan struct{})
			s, client := serve(t, func(p *peer) {
				p.request()
				p.say(c.say)
				p.ended()
				close(gone)
			})
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			x, err := client.Send(request(t, "x").WithContext(ctx))
			if err != nil {
				t.Fatal(err)
			}
			c.giveUp(t, x, cancel)
			<-gone
			cancel()
			if _, err := client.Send(request(t, "x").WithContext(ctx)); !errors.Is(err, context.Canceled) {
				t.Errorf("a request that nobody waits for: %v", err)
			}
			if n := s.conns.Load(); n != 1 {
				t.Errorf("%d connections", n)
			}
		})
	}
}

// An end of the context that comes after the answer's changes nothing.
func TestContextEndsLater(t *testing.T) {
	s, client := serve(t, func(p *peer) {
		for {
			if _, ok := p.request(); !ok {
				return
			}
			p.say(chunked("one"))
		}
	})
	for range 5 {
		ctx, cancel := context.WithCancel(t.Context())
		resp, err := client.RoundTrip(request(t, "x").WithContext(ctx))
		if err != nil {
			t.Fatal(err)
		}
		if b, err := io.ReadAll(resp.Body); err != nil || string(b) != "one" {
			t.Fatalf("%q, %v", b, err)
		}
		cancel()
		if _, err := resp.Body.Read(make([]byte, 1)); err != io.EOF {
			t.Errorf("after the end: %v", err)
		}
		_ = resp.Body.Close()
	}
	if n := s.conns.Load(); n != 1 {
		t.Errorf("%d connections", n)
	}
}

// A server may answer without reading all of a request.
func TestAnswerBeforeTheEndOfTheRequest(t *testing.T) {
	_, client := serve(t, func(p *peer) {
		_, _ = io.ReadFull(p.r, make([]byte, 1000))
		p.say("HTTP/1.1 413 Too Large\r\nContent-Length: 5\r\n\r\nlarge")
	})
	resp, err := client.RoundTrip(request(t, strings.Repeat("x", 8<<20)))
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if b, err := io.ReadAll(resp.Body); err != nil || string(b) != "large" || resp.StatusCode != http.StatusRequestEntityTooLarge {
		t.Errorf("%d, %q, %v", resp.StatusCode, b, err)
	}
}

func TestIdle(t *testing.T) {
	var open atomic.Int32
	all := make(chan struct{})
	s, client := serve(t, func(p *peer) {
		open.Add(1)
		defer open.Add(-1)
		for {
			if _, ok := p.request(); !ok {
				return
			}
			<-all
			p.say(answer("one"))
		}
	})
	client.Idle = 300 * time.Millisecond
	var asking sync.WaitGroup
	for range 5 {
		asking.Go(func() {
			if _, err := ask(t, client, "x"); err != nil {
				t.Error(err)
			}
		})
	}
	for s.conns.Load() < 5 {
		time.Sleep(time.Millisecond)
	}
	close(all)
	asking.Wait()
	client.mu.Lock()
	kept := len(client.idle)
	client.mu.Unlock()
	if kept > client.MaxIdle {
		t.Errorf("%d connections are kept, at most %d", kept, client.MaxIdle)
	}
	for end := time.Now().Add(2 * time.Minute); open.Load() > 0; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%d connections are kept for ever", open.Load())
		}
	}
	if got, err := ask(t, client, "x"); err != nil || got != "one" {
		t.Error(got, err)
	}
}
