package session

import (
	"errors"
	"fmt"
	"net"
	"os"
	"sync/atomic"
	"syscall"
	"time"
)

// liveConn gives every read and every write its own deadline, once it is live:
// what counts is that bytes move, however large the message they belong to.
type liveConn struct {
	net.Conn
	live        bool // set before a second goroutine uses it
	early       int  // bytes that have arrived before
	read, write time.Duration
	moved       atomic.Int64 // when a fragment of a large message went out, Unix nanoseconds
}

const (
	// fragment is the size in bytes in which a large message goes out, so that
	// pings and small messages of the protocol below find their way.
	fragment = 16 << 10

	// unsent is how much the kernel takes before it has sent the rest: more
	// would only stand in the way of the next ping.
	unsent = 64 << 10
)

// maxEarly bounds what the network may say, in bytes, before there is a session: a
// TLS handshake and the head of a reply.
const maxEarly = 256 << 10

var errEarly = fmt.Errorf("%w: its reply is too large", ErrProtocol)

// tune has the kernel tell what no deadline of ours can: that what was sent is
// not even acknowledged.
func (c *liveConn) tune() error {
	t, ok := c.Conn.(*net.TCPConn)
	if !ok {
		return nil
	}
	raw, err := t.SyscallConn()
	if err != nil {
		return err
	}
	var refused error
	err = raw.Control(func(fd uintptr) {
		refused = errors.Join(
			syscall.SetsockoptInt(int(fd), syscall.IPPROTO_TCP, tcpUserTimeout, int(c.read.Milliseconds())),
			syscall.SetsockoptInt(int(fd), syscall.IPPROTO_TCP, tcpNotsentLowat, unsent))
	})
	return errors.Join(err, refused)
}

// From linux/tcp.h.
const (
	tcpUserTimeout  = 18
	tcpNotsentLowat = 25
)

// Read waits for as long as there are signs of life: bytes that arrive, or a
// large message that moves on and holds up the answer to our pings.
func (c *liveConn) Read(b []byte) (int, error) {
	if !c.live { // the library takes a head of any length
		if c.early >= maxEarly {
			return 0, errEarly
		}
		n, err := c.Conn.Read(b[:min(len(b), maxEarly-c.early)])
		c.early += n
		return n, err
	}
	for end := time.Now().Add(c.read); ; {
		if err := c.Conn.SetReadDeadline(end); err != nil {
			return 0, err
		}
		n, err := c.Conn.Read(b)
		if n > 0 || !errors.Is(err, os.ErrDeadlineExceeded) {
			return n, err
		}
		if end = time.Unix(0, c.moved.Load()).Add(c.read); time.Now().After(end) {
			return n, err
		}
	}
}

func (c *liveConn) Write(b []byte) (int, error) {
	if c.live {
		if err := c.Conn.SetWriteDeadline(time.Now().Add(c.write)); err != nil {
			return 0, err
		}
	}
	n, err := c.Conn.Write(b)
	if n >= fragment {
		c.moved.Store(time.Now().UnixNano())
	}
	return n, err
}

// The WebSocket library sets deadlines for whole frames. They are the dialler's
// only until the connection is live.

func (c *liveConn) SetDeadline(t time.Time) error {
	if c.live {
		return nil
	}
	return c.Conn.SetDeadline(t)
}

func (c *liveConn) SetReadDeadline(t time.Time) error {
	if c.live {
		return nil
	}
	return c.Conn.SetReadDeadline(t)
}

func (c *liveConn) SetWriteDeadline(t time.Time) error {
	if c.live {
		return nil
	}
	return c.Conn.SetWriteDeadline(t)
}
