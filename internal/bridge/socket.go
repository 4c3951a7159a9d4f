package bridge

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"sync"
	"syscall"
)

// clearDir empties the directory of the socket. The directory outlives the
// container and the engine can write there: what an earlier run left would be
// something kept between runs, and a pipe, or a directory in the socket's place,
// could keep the bridge from ever starting again.
func clearDir(dir string) error {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return fmt.Errorf("socket: %w", err)
	}
	defer root.Close()
	for {
		// From the start each time: removing moves the rest about.
		names, err := someNames(root)
		if err != nil {
			return fmt.Errorf("socket: empty %s: %w", dir, err)
		}
		if len(names) == 0 {
			return nil
		}
		for _, name := range names {
			// A directory that its owner may not enter cannot be emptied either.
			if info, err := root.Lstat(name); err == nil && info.IsDir() {
				_ = root.Chmod(name, 0o700) // RemoveAll says what stays
			}
			if err := root.RemoveAll(name); err != nil {
				return fmt.Errorf("socket: an earlier run left what cannot be removed: %w; stop the runtime and empty its socket directory", err)
			}
		}
	}
}

// someNames lists some of what is in root, and nothing when it is empty.
func someNames(root *os.Root) ([]string, error) {
	f, err := root.Open(".")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	names, err := f.Readdirnames(256)
	if errors.Is(err, io.EOF) {
		err = nil
	}
	return names, err
}

// listener is the socket. It accepts a bounded number of connections, and
// closing it unlinks it.
type listener struct {
	*net.UnixListener
	path   string
	refuse int // user id
	bound  fs.FileInfo
	places chan struct{}
	closed chan struct{}
	once   sync.Once
}

// listen binds the socket and opens it to everybody who reaches its directory:
// on the host that is the agent alone, whose user id does not exist in here. The
// connections of one user are closed at once, so that an engine that sees the
// socket can neither ask itself by it nor take the agent's places.
func listen(path string, connections, refuse int) (*listener, error) {
	u, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("socket: %w", err)
	}
	l := &listener{UnixListener: u, path: path, refuse: refuse, places: make(chan struct{}, connections), closed: make(chan struct{})}
	if err = os.Chmod(path, 0o666); err == nil {
		l.bound, err = os.Lstat(path)
	}
	if err != nil {
		u.Close()
		return nil, fmt.Errorf("socket: %w", err)
	}
	return l, nil
}

// inPlace reports whether the path still leads to this socket, for everybody. The
// engine runs as the same user and, where it sees the socket, could have put another
// there, or closed this one to the agent.
func (l *listener) inPlace() bool {
	info, err := os.Lstat(l.path)
	return err == nil && os.SameFile(info, l.bound) && info.Mode() == l.bound.Mode()
}

// Accept waits until one of the connections before has ended if there are too
// many; the kernel keeps the others waiting.
func (l *listener) Accept() (net.Conn, error) {
	select {
	case <-l.closed:
		return nil, net.ErrClosed
	case l.places <- struct{}{}:
	}
	for {
		c, err := l.AcceptUnix()
		if err != nil {
			<-l.places
			return nil, err
		}
		if user, err := userOf(c); err == nil && user != l.refuse {
			return &conn{Conn: c, leave: sync.OnceFunc(func() { <-l.places })}, nil
		}
		_ = c.Close() // nothing was said
	}
}

// userOf is the user who has connected.
func userOf(c *net.UnixConn) (int, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return 0, err
	}
	var peer *syscall.Ucred
	var failed error
	if err := raw.Control(func(fd uintptr) {
		peer, failed = syscall.GetsockoptUcred(int(fd), syscall.SOL_SOCKET, syscall.SO_PEERCRED)
	}); err != nil {
		return 0, err
	}
	if failed != nil {
		return 0, failed
	}
	return int(peer.Uid), nil
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
