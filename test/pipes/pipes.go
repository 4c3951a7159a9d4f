// Package pipes has a listener for servers in a bubble of testing/synctest, which cannot
// follow a real socket: whoever dials has one end of a net.Pipe. So a server's
// patience can be tried out in no time.
package pipes

import (
	"io"
	"net"
	"sync"
	"testing"
	"time"
)

// Listener is a [net.Listener]. Safe for concurrent use.
type Listener struct {
	conns chan net.Conn
	done  chan struct{}
	once  sync.Once
}

// Listen returns a listener that nobody has dialled.
func Listen() *Listener { return &Listener{conns: make(chan net.Conn), done: make(chan struct{})} }

// Accept waits for who dials.
func (l *Listener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.done:
		return nil, net.ErrClosed
	}
}

// Close ends Accept.
func (l *Listener) Close() error { l.once.Do(func() { close(l.done) }); return nil }

// Addr is of no use.
func (l *Listener) Addr() net.Addr { return &net.UnixAddr{Name: "pipe", Net: "unix"} }

// Dial returns the other end of a connection, nil once the listener is closed.
func (l *Listener) Dial() net.Conn {
	here, there := net.Pipe()
	select {
	case l.conns <- there:
		return here
	case <-l.done:
		return nil
	}
}

// Lasts writes what somebody says on a connection of its own, and measures in a
// bubble how long the server keeps it open after that, reading what is answered if
// the peer reads at all. The answer is what was read.
func (l *Listener) Lasts(t testing.TB, says string, reads bool) (d time.Duration, answer string) {
	t.Helper()
	c := l.Dial()
	if c == nil {
		t.Fatal("the server has ended")
	}
	defer c.Close()
	begin := time.Now()
	if !reads { // a write finds out when the other end is gone
		for _, err := io.WriteString(c, says); err == nil; {
			_, err = io.WriteString(c, "x")
		}
		return time.Since(begin), ""
	}
	wrote := make(chan struct{})
	go func() {
		defer close(wrote)
		_, _ = io.WriteString(c, says) // the server need not take all of it
	}()
	b, err := io.ReadAll(c)
	if err != nil {
		t.Fatal(err)
	}
	<-wrote
	return time.Since(begin), string(b)
}
