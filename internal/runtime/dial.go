package runtime

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// ErrForeign says that the socket does not lead to the runtime's container, so
// that nothing was sent. The text says where it leads.
var ErrForeign = errors.New("the engine's socket does not lead to the runtime's container")

// A Guard looks at the process that listens on the socket, by its id and its
// user's, before anything is sent to it.
type Guard func(pid int, uid uint32) error

// Container is the guard for the container that a service of the user's manager
// runs: the process must be in the container's control group, by the /proc at
// proc, and be neither root nor this user, whose ids no process in there has.
// From a sandbox of its own the agent sees no other user's real id; a control
// group can be changed by this user and root alone.
func Container(proc, service string) Guard {
	return func(pid int, uid uint32) error {
		if uid == 0 || int(uid) == os.Getuid() {
			return fmt.Errorf("process %d of user %d, whom the container does not have", pid, uid)
		}
		group, err := cgroup(filepath.Join(proc, strconv.Itoa(pid), "cgroup"))
		if err != nil {
			return fmt.Errorf("process %d, which cannot be looked at: %w", pid, err)
		}
		dirs := strings.Split(group, "/")
		i := slices.Index(dirs, service)
		if i < 0 || i+1 == len(dirs) || !strings.HasPrefix(dirs[i+1], payload) {
			return fmt.Errorf("process %d in %s, which is not the container of %s", pid, group, service)
		}
		return nil
	}
}

// payload begins the name of the control group that Podman makes for a container
// below its service's, beside that of its own monitor.
const payload = "libpod-payload-"

// cgroup reads a process's place in the unified hierarchy.
func cgroup(name string) (string, error) {
	f, err := os.Open(name)
	if err != nil {
		return "", err
	}
	defer f.Close() // read only: nothing to lose
	raw, err := io.ReadAll(io.LimitReader(f, maxHeader))
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(raw)) {
		if group, ok := strings.CutPrefix(line, "0::"); ok {
			return strings.TrimSuffix(group, "\n"), nil
		}
	}
	return "", fmt.Errorf("%s: no unified hierarchy", name)
}

// dial connects to the socket that is at path itself, and not to what a link in
// its place leads to: the directory is shared with the container. The check and
// the connection are of one file, whatever happens to its name in between.
func dial(ctx context.Context, path string, guard Guard) (net.Conn, error) {
	fail := func(err error) error {
		return &net.OpError{Op: "dial", Net: "unix", Addr: &net.UnixAddr{Name: path, Net: "unix"}, Err: err}
	}
	fd, err := unix.Open(path, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fail(os.NewSyscallError("open", err))
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, fail(os.NewSyscallError("fstat", err))
	}
	if st.Mode&unix.S_IFMT != unix.S_IFSOCK {
		return nil, fmt.Errorf("%w: %s is no socket (mode %#o)", ErrForeign, path, st.Mode)
	}
	conn, err := new(net.Dialer).DialContext(ctx, "unix", fmt.Sprintf("/proc/self/fd/%d", fd))
	if err != nil {
		if op, ok := errors.AsType[*net.OpError](err); ok {
			err = op.Err
		}
		return nil, fail(err)
	}
	peer, err := peerOf(conn.(*net.UnixConn))
	if err == nil {
		if err = guard(int(peer.Pid), peer.Uid); err != nil {
			err = fmt.Errorf("%w but to %w", ErrForeign, err)
		}
	}
	if err != nil {
		conn.Close()
		return nil, err
	}
	return conn, nil
}

// peerOf returns who called listen(2) on the other side.
func peerOf(c *net.UnixConn) (*unix.Ucred, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return nil, err
	}
	var peer *unix.Ucred
	var sockErr error
	if err := raw.Control(func(fd uintptr) { peer, sockErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); err != nil {
		return nil, err
	}
	return peer, os.NewSyscallError("getsockopt", sockErr)
}
