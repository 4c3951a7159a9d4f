package session

import (
	"bytes"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/gorilla/websocket"

	"github.com/resultity/node/internal/receipt"
	"github.com/resultity/node/internal/wire"
)

// What waits to be sent is bounded for each class of messages, and each gives way in
// its own manner.
func TestQueuesAreBounded(t *testing.T) {
	chunk := func(n int) error { // the link has n bytes of bulk then
		l := newLink(nil, nil)
		first := &wire.Chunk{Job: receipt.NewJobID(), Data: make([]byte, n/2)}
		second := &wire.Chunk{Job: receipt.NewJobID()}
		second.Data = make([]byte, n-weight(first)-weight(second))
		return errors.Join(l.send(first), l.send(second))
	}
	full := chunk(maxChunks + 1)
	t.Logf("chunks of %d bytes: expected: %v; got: %v", maxChunks+1, ErrFull, full)
	if err := chunk(maxChunks); err != nil || !errors.Is(full, ErrFull) {
		t.Errorf("chunks of %d bytes: %v; with one more %v, want ErrFull", maxChunks, err, full)
	}

	a, b := net.Pipe()
	defer b.Close()
	l := newLink(nil, &liveConn{Conn: a})
	for i := range maxControl {
		if err := l.send(&wire.Accept{}); err != nil {
			t.Fatalf("small message %d: %v", i, err)
		}
	}
	err := l.send(&wire.Accept{})
	t.Logf("%d small messages: expected: %v; got: %v", maxControl+1, errSlow, l.cause)
	if !errors.Is(err, ErrNotConnected) || !errors.Is(l.cause, errSlow) {
		t.Errorf("small message %d: %v, and the link ended for %v", maxControl+1, err, l.cause)
	}

	for over := range 2 {
		synctest.Test(t, func(t *testing.T) {
			l := newLink(nil, nil)
			first, second := &wire.Result{Response: make([]byte, maxBulk/2)}, &wire.Result{}
			second.Response = make([]byte, maxBulk-weight(first)-weight(second)+over)
			if err := l.send(first); err != nil {
				t.Fatal(err)
			}
			sent := make(chan error, 1)
			go func() { sent <- l.send(second) }()
			synctest.Wait()
			if waits := len(sent) == 0; waits != (over > 0) {
				t.Errorf("results of %d bytes: the second waits: %v", maxBulk+over, waits)
			}
			if over > 0 {
				t.Logf("results of %d bytes: expected: the second waits for room; got: it waits: %v", maxBulk+over, len(sent) == 0)
			}
			l.next() // and it is written
			l.mu.Lock()
			l.bytes -= weight(first)
			l.changed.Broadcast()
			l.mu.Unlock()
			if err := <-sent; err != nil {
				t.Errorf("once there is room: %v", err)
			}
		})
	}
	synctest.Test(t, func(t *testing.T) { // in which nothing waits for ever
		if err := newLink(nil, nil).send(&wire.Result{Response: make([]byte, 2*maxBulk)}); err != nil {
			t.Errorf("a large result alone: %v", err)
		}
	})
}

// Until the network has shown who it is, little of it is read.
func TestStrangersAreBounded(t *testing.T) {
	early := &liveConn{Conn: readConn{Reader: bytes.NewReader(make([]byte, maxEarly+1))}}
	n, err := io.Copy(io.Discard, early)
	t.Logf("a reply of %d bytes: expected: %v behind %d; got: %v behind %d", maxEarly+1, errEarly, maxEarly, err, n)
	if n != maxEarly || !errors.Is(err, errEarly) {
		t.Errorf("%d bytes before there is a session, %v; want %d and errEarly", n, err, maxEarly)
	}

	long := func(n int) *http.Response { // no session, for a reason of n bytes
		return &http.Response{StatusCode: http.StatusInternalServerError, Body: io.NopCloser(strings.NewReader(strings.Repeat("x", n)))}
	}
	for n, want := range map[int]int{maxReason: maxReason, maxReason + 1: maxReason} {
		for of, err := range map[string]error{"a session": refused(long(n)), "a registration": registerRefused(500, bytes.Repeat([]byte("x"), n)), "a binding": bindRefused(500, bytes.Repeat([]byte("x"), n))} {
			if s, ok := errors.AsType[*StatusError](err); !ok || len(s.Reason) != want {
				t.Errorf("%s refused for a reason of %d bytes: %v", of, n, err)
			}
		}
	}

	for over := range 2 { // a welcome is as long as it may be, and longer
		ended := make(chan int, 100)
		network := newNetwork(t, func(p *peer) {
			p.next()
			const empty = 65 + len(`{"seq":1,"time":1767225600000,"type":"welcome","data":{"session":"","server":""}}`)
			f := p.seal(&wire.Welcome{Session: strings.Repeat("s", maxWelcome-empty+over)})
			if len(f) != maxWelcome+over {
				p.t.Errorf("it has %d bytes", len(f))
			}
			p.write(f)
			ended <- p.end()
		})
		h := newRecorder()
		stop := run(t, New(config(network), h))
		if over == 0 {
			get(t, h.opened)
		} else {
			err := get(t, h.closed)
			t.Logf("a welcome of %d bytes: expected: %v; got: %v", maxWelcome+over, websocket.ErrReadLimit, err)
			if code := get(t, ended); !errors.Is(err, websocket.ErrReadLimit) || code != websocket.CloseMessageTooBig || len(h.opened) != 0 {
				t.Errorf("a welcome of %d bytes: %v, and the network is told %d", maxWelcome+over, err, code)
			}
		}
		stop()
	}

	for over := range 2 { // so is the reply to a registration
		reply := wire.Registered{Network: "testnet", Node: nodeKey.Address()}
		empty, err := wire.SealRegistration(networkKey, &reply)
		if err != nil {
			t.Fatal(err)
		}
		reply.Account = strings.Repeat("a", maxReply-len(empty)+over)
		raw, err := wire.SealRegistration(networkKey, &reply)
		if err != nil || len(raw) != maxReply+over {
			t.Fatalf("%d bytes, %v", len(raw), err)
		}
		srv := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(raw) }))
		_, err = Register(t.Context(), registration(srv.URL, srv.Client()))
		srv.Close()
		if over > 0 {
			t.Logf("a reply of %d bytes to a registration: expected: %v; got: %v", len(raw), ErrProtocol, err)
		}
		if (err != nil) != (over > 0) || over > 0 && !(errors.Is(err, ErrProtocol) && strings.Contains(err.Error(), "more than")) {
			t.Errorf("a reply of %d bytes: %v", len(raw), err)
		}
	}
}

// readConn is a connection from which something can be read.
type readConn struct {
	net.Conn
	io.Reader
}

func (c readConn) Read(b []byte) (int, error) { return c.Reader.Read(b) }
