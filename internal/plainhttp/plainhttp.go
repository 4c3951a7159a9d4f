// Package plainhttp is a client for an HTTP/1.1 server on the same machine: the
// engine's port, and the socket that leads to it.
//
// The way to the engine is short, and the transport of net/http spends more time
// on it than all else does: with two goroutines for each connection, a request
// goes from one to the other six times. Here whoever asks writes the request and
// reads the answer. The formats are read and written by net/http.
//
// The rule it keeps: a connection is used again only after an answer that has come
// to its end, and while nothing has followed it, so that no answer is ever taken
// for that of another request.
//
// Errors of closing a connection are left out: nothing that was asked depends on one.
package plainhttp

import (
	"bufio"
	"context"
	"errors"
	"io"
	"math"
	"net"
	"net/http"
	"sync"
	"syscall"
	"time"
)

// Transport sends requests to one server, whatever host they name. It is safe for
// concurrent use once its fields are set.
//
// A request is sent again, on a new connection, when one that was kept has ended
// without a byte of an answer: it is for servers whose requests change nothing.
// Its body must be one that [http.NewRequest] knows how to repeat.
type Transport struct {
	Dial      func(context.Context) (net.Conn, error)
	Idle      time.Duration // how long a connection is kept for the next request
	MaxIdle   int           // connections that are kept
	MaxHeader int64         // bytes of the head of an answer

	mu    sync.Mutex
	idle  []*conn     // the one that was used last is the last
	timer *time.Timer // ends those whose time is up; runs while there are any
}

var _ http.RoundTripper = (*Transport)(nil)

// Exchange is a request on its way. [Exchange.Response] is to be called once.
type Exchange struct {
	t    *Transport
	req  *http.Request
	c    *conn       // nil once the exchange has ended
	stop func() bool // see [context.AfterFunc]
	sent error       // of writing; there may be an answer all the same
}

// RoundTrip implements [http.RoundTripper].
func (t *Transport) RoundTrip(req *http.Request) (*http.Response, error) {
	x, err := t.Send(req)
	if err != nil {
		return nil, err
	}
	return x.Response()
}

// Send writes the request, and returns before there is an answer. When the
// request's context ends, the connection is closed.
func (t *Transport) Send(req *http.Request) (*Exchange, error) {
	if err := req.Context().Err(); err != nil {
		return nil, err
	}
	x := &Exchange{t: t, req: req}
	c := t.take()
	if c == nil {
		var err error
		if c, err = t.dial(req.Context()); err != nil {
			return nil, err
		}
	}
	x.write(c)
	return x, nil
}

func (x *Exchange) write(c *conn) {
	x.c = c
	x.stop = context.AfterFunc(x.req.Context(), func() { _ = c.Close() })
	if x.sent = x.req.Write(c.w); x.sent == nil {
		x.sent = c.w.Flush()
	}
}

// Response waits for the head of the answer. Its body must be read to its end, or
// closed, which ends the connection if it is not at its end.
func (x *Exchange) Response() (*http.Response, error) {
	resp, err := x.c.response(x.req)
	if ctx := x.req.Context(); err != nil && x.c.kept && !x.c.answering && ctx.Err() == nil {
		x.Close()
		var c *conn
		if c, err = x.t.dial(ctx); err != nil {
			return nil, err
		}
		if x.req, err = again(x.req); err != nil {
			_ = c.Close() // the error says more
			return nil, err
		}
		x.write(c)
		resp, err = x.c.response(x.req)
	}
	if err != nil {
		x.Close()
		if x.sent != nil {
			err = x.sent
		}
		return nil, err
	}
	keep := resp.StatusCode >= 200 && !resp.Close && x.sent == nil
	if resp.Body == http.NoBody {
		x.end(keep)
		return resp, nil
	}
	resp.Body = &body{r: resp.Body, x: x, keep: keep}
	return resp, nil
}

// Close ends the connection of an exchange whose answer nobody waits for. Once the
// answer has come to its end it does nothing: the connection may be another's.
func (x *Exchange) Close() { x.end(false) }

func (x *Exchange) end(keep bool) {
	c := x.c
	if c == nil {
		return
	}
	x.c = nil
	if x.stop() && keep && c.r.Buffered() == 0 {
		x.t.put(c)
		return
	}
	_ = c.Close()
}

func again(req *http.Request) (*http.Request, error) {
	if req.Body == nil || req.Body == http.NoBody {
		return req, nil
	}
	if req.GetBody == nil {
		return nil, errors.New("plainhttp: the request cannot be sent again")
	}
	content, err := req.GetBody()
	if err != nil {
		return nil, err
	}
	req = req.Clone(req.Context())
	req.Body = content
	return req, nil
}

// body is that of an answer. It ends the exchange.
type body struct {
	r    io.Reader
	x    *Exchange
	keep bool
	err  error // the last word
}

// Read implements [io.Reader].
func (b *body) Read(p []byte) (n int, err error) {
	if b.err != nil {
		return 0, b.err
	}
	if n, err = b.r.Read(p); err != nil {
		b.err = err
		b.x.end(b.keep && err == io.EOF)
	}
	return n, err
}

// Close implements [io.Closer].
func (b *body) Close() error {
	if b.err == nil {
		b.err = http.ErrBodyReadAfterClose
		b.x.Close()
	}
	return nil
}

const bufferSize = 32 << 10 // bytes, one for each direction

// conn is a connection.
type conn struct {
	net.Conn
	raw syscall.RawConn
	r   *bufio.Reader
	w   *bufio.Writer

	maxHead   int64
	head      int64     // bytes that may come before the head is complete
	answering bool      // something of the present answer has come
	kept      bool      // it has served a request before
	since     time.Time // it has been idle
}

func (t *Transport) dial(ctx context.Context) (*conn, error) {
	n, err := t.Dial(ctx)
	if err != nil {
		return nil, err
	}
	c := &conn{Conn: n, maxHead: t.MaxHeader}
	if s, ok := n.(syscall.Conn); ok {
		if c.raw, err = s.SyscallConn(); err != nil {
			_ = n.Close() // the error says more
			return nil, err
		}
	}
	c.r, c.w = bufio.NewReaderSize(c, bufferSize), bufio.NewWriterSize(n, bufferSize)
	return c, nil
}

var errHead = errors.New("plainhttp: the head of the answer is too large")

// Read is for the buffered reader.
func (c *conn) Read(p []byte) (int, error) {
	if c.head <= 0 {
		return 0, errHead
	}
	n, err := c.Conn.Read(p[:min(int64(len(p)), c.head)])
	c.head -= int64(n)
	c.answering = c.answering || n > 0
	return n, err
}

func (c *conn) response(req *http.Request) (*http.Response, error) {
	c.head, c.answering = c.maxHead, false
	resp, err := http.ReadResponse(c.r, req)
	c.head = math.MaxInt64
	if err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	return resp, err
}

// silent reports whether nothing has come since the last answer, not even the end.
func (c *conn) silent() bool {
	if c.raw == nil {
		return true
	}
	var got error
	err := c.raw.Read(func(fd uintptr) bool {
		var b [1]byte
		_, _, got = syscall.Recvfrom(int(fd), b[:], syscall.MSG_PEEK|syscall.MSG_DONTWAIT)
		return true
	})
	return err == nil && got == syscall.EAGAIN
}

// take returns a connection that waits for a request, or nil.
func (t *Transport) take() *conn {
	for {
		t.mu.Lock()
		n := len(t.idle) - 1
		if n < 0 {
			t.mu.Unlock()
			return nil
		}
		c := t.idle[n]
		t.idle[n] = nil
		t.idle = t.idle[:n]
		t.mu.Unlock()
		if c.silent() {
			return c
		}
		_ = c.Close()
	}
}

func (t *Transport) put(c *conn) {
	c.kept, c.since = true, time.Now()
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.idle) >= t.MaxIdle {
		_ = c.Close()
		return
	}
	t.idle = append(t.idle, c)
	if t.timer == nil {
		t.timer = time.AfterFunc(t.Idle, t.expire)
	}
}

func (t *Transport) expire() {
	t.mu.Lock()
	defer t.mu.Unlock()
	old, now := 0, time.Now()
	for old < len(t.idle) && now.Sub(t.idle[old].since) >= t.Idle {
		_ = t.idle[old].Close()
		old++
	}
	t.idle = append(t.idle[:0], t.idle[old:]...)
	t.timer = nil
	if len(t.idle) > 0 {
		t.timer = time.AfterFunc(t.idle[0].since.Add(t.Idle).Sub(now), t.expire)
	}
}

// CloseIdleConnections ends the connections that no request uses.
func (t *Transport) CloseIdleConnections() {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, c := range t.idle {
		_ = c.Close()
	}
	t.idle = nil
	if t.timer != nil {
		t.timer.Stop()
		t.timer = nil
	}
}
