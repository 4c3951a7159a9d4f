package bridge

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"sync"
)

// clearSocket removes the socket of an earlier run. It removes nothing else.
func clearSocket(path string) error {
	switch info, err := os.Lstat(path); {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return fmt.Errorf("socket: %w", err)
	case info.Mode().Type() != fs.ModeSocket:
		return fmt.Errorf("socket: %s exists and is not a socket; mount an empty directory there", path)
	}
	if err := os.Remove(path); err != nil {
		return fmt.Errorf("socket: %w", err)
	}
	return nil
}

// listener is the socket. It accepts a bounded number of connections, and
// closing it unlinks it.
type listener struct {
	*net.UnixListener
	path   string
	bound  fs.FileInfo
	places chan struct{}
	closed chan struct{}
	once   sync.Once
}

// listen binds the socket and opens it to everybody who reaches its directory:
// on the host that is the agent alone, whose user id does not exist in here.
func listen(path string, connections int) (*listener, error) {
	u, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("socket: %w", err)
	}
	l := &listener{UnixListener: u, path: path, places: make(chan struct{}, connections), closed: make(chan struct{})}
	if err = os.Chmod(path, 0o666); err == nil {
		l.bound, err = os.Lstat(path)
	}
	if err != nil {
		u.Close()
		return nil, fmt.Errorf("socket: %w", err)
	}
	return l, nil
}

// inPlace reports whether the path still leads to this socket. The engine runs
// as the same user and could have put another there.
func (l *listener) inPlace() bool {
	info, err := os.Lstat(l.path)
	return err == nil && os.SameFile(info, l.bound)
}

// Accept waits until one of the connections before has ended if there are too
// many; the kernel keeps the others waiting.
func (l *listener) Accept() (net.Conn, error) {
	select {
	case <-l.closed:
		return nil, net.ErrClosed
	case l.places <- struct{}{}:
	}
	c, err := l.UnixListener.Accept()
	if err != nil {
		<-l.places
		return nil, err
	}
	return &conn{Conn: c, leave: sync.OnceFunc(func() { <-l.places })}, nil
}

func (l *listener) Close() error {
	l.once.Do(func() { close(l.closed) })
	return l.UnixListener.Close()
}

// conn gives its place back when it is closed.
type conn struct {
	net.Conn
	leave func()
}

func (c *conn) Close() error {
	defer c.leave()
	return c.Conn.Close()
}
