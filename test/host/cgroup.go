package host

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// cgroups is the root of the cgroup2 tree as the machine has it: at
// /sys/fs/cgroup under systemd, below it in a hybrid set-up.
var cgroups = sync.OnceValues(func() (*os.Root, error) {
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	for line := range strings.Lines(string(mounts)) {
		// ID PARENT DEVICE ROOT TARGET OPTIONS [TAG]... - TYPE ...
		before, after, _ := strings.Cut(line, " - ")
		f := strings.Fields(before)
		if len(f) >= 5 && f[3] == "/" && strings.HasPrefix(after, "cgroup2 ") {
			return os.OpenRoot(f[4])
		}
	}
	return mountCgroups()
})

// mountCgroups mounts the cgroup2 tree for this process alone, attached
// nowhere. It must not be done where the tree is mounted already: its options
// are the kernel's, for all mounts, and the last one sets them.
func mountCgroups() (*os.Root, error) {
	fsfd, err := unix.Fsopen("cgroup2", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("open cgroup2 (are we root?): %w", err)
	}
	defer unix.Close(fsfd)
	if err := unix.FsconfigCreate(fsfd); err != nil {
		return nil, fmt.Errorf("create cgroup2 mount: %w", err)
	}
	mfd, err := unix.Fsmount(fsfd, unix.FSMOUNT_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("mount cgroup2: %w", err)
	}
	defer unix.Close(mfd)
	return os.OpenRoot(fmt.Sprintf("/proc/self/fd/%d", mfd))
}

// A cgroup is the name of one below the root of the tree.
type cgroup string

// create makes the cgroup and returns it opened, for clone(2) to start a
// process in. It may exist already.
func (c cgroup) create() (*os.File, error) {
	root, err := cgroups()
	if err != nil {
		return nil, err
	}
	if err := root.Mkdir(string(c), 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, fmt.Errorf("make cgroup: %w", err)
	}
	f, err := root.Open(string(c))
	if err != nil {
		return nil, fmt.Errorf("open cgroup: %w", err)
	}
	return f, nil
}

// holds reports whether process pid is in c or below it.
func (c cgroup) holds(pid int) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err != nil {
		return false
	}
	for line := range strings.Lines(string(b)) {
		if in, ok := strings.CutPrefix(strings.TrimSuffix(line, "\n"), "0::/"); ok {
			return in == string(c) || strings.HasPrefix(in, string(c)+"/")
		}
	}
	return false
}

// kill ends all that is in the cgroup and below, and returns when it has ended.
// SIGKILL goes to all in one step, so that no fork escapes, and to no process
// by its id, so that no recycled one is hit.
func (c cgroup) kill(ctx context.Context) error {
	root, err := cgroups()
	if err != nil {
		return err
	}
	members, err := c.members()
	if err != nil {
		return err
	}
	defer members.close()
	err = root.WriteFile(path.Join(string(c), "cgroup.kill"), []byte("1"), 0)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("kill cgroup %s: %w", c, err)
	}
	return errors.Join(members.wait(ctx), c.waitEmpty(ctx))
}

// wait returns when all processes have ended that are in the cgroup and below
// now, with PID 1 of a host and so all of its namespace.
func (c cgroup) wait(ctx context.Context) error {
	members, err := c.members()
	if err != nil {
		return err
	}
	defer members.close()
	return errors.Join(members.wait(ctx), c.waitEmpty(ctx))
}

// waitEmpty returns when the cgroup and those below it can be removed. For a
// moment, a process that is about to end is no member any more but in the way.
func (c cgroup) waitEmpty(ctx context.Context) error {
	root, err := cgroups()
	if err != nil {
		return err
	}
	f, err := root.Open(path.Join(string(c), "cgroup.events"))
	if gone(err) {
		return nil
	} else if err != nil {
		return fmt.Errorf("watch cgroup: %w", err)
	}
	defer f.Close()
	buf := make([]byte, 256)
	for {
		n, err := f.ReadAt(buf, 0)
		if gone(err) || strings.Contains(string(buf[:n]), "populated 0") {
			return nil
		}
		if n == 0 {
			return fmt.Errorf("watch cgroup %s: %w", c, err)
		}
		// A change shows as an exceptional condition of the file.
		if err := poll(ctx, int(f.Fd()), unix.POLLPRI); err != nil {
			return fmt.Errorf("cgroup %s is not empty: %w", c, err)
		}
	}
}

// poll waits for an event of a file that the runtime's poller cannot wait for.
func poll(ctx context.Context, fd int, events int16) error {
	fds := []unix.PollFd{{Fd: int32(fd), Events: events}}
	for {
		n, err := unix.Poll(fds, int((50 * time.Millisecond).Milliseconds())) // poll(2) does not know ctx
		if n > 0 {
			return nil
		}
		if err != nil && !errors.Is(err, unix.EINTR) {
			return err
		}
		if err := ctx.Err(); err != nil {
			return err
		}
	}
}

// members are handles of processes.
type members []int

func (m members) close() {
	for _, fd := range m {
		unix.Close(fd)
	}
}

// wait returns when all have ended. A process leaves its cgroup some time
// before that. PID 1 of a namespace ends when all others in there have, and
// have been waited for by their parents, which may be the machine's init.
func (m members) wait(ctx context.Context) error {
	for _, fd := range m {
		if err := poll(ctx, fd, unix.POLLIN); err != nil {
			return fmt.Errorf("a process of the host has not ended: %w", err)
		}
	}
	return nil
}

// members returns the processes in the cgroup and below. It need not exist.
func (c cgroup) members() (members, error) {
	dirs, err := c.tree()
	if err != nil {
		return nil, err
	}
	root, err := cgroups()
	if err != nil {
		return nil, err
	}
	var m members
	for _, dir := range dirs {
		procs, err := root.ReadFile(path.Join(dir, "cgroup.procs"))
		if gone(err) {
			continue
		} else if err != nil {
			m.close()
			return nil, fmt.Errorf("list processes: %w", err)
		}
		for _, line := range strings.Fields(string(procs)) {
			pid, err := strconv.Atoi(line)
			if err != nil || pid == 0 { // 0 is one of a pid namespace that we do not see
				continue
			}
			fd, err := unix.PidfdOpen(pid, 0)
			if errors.Is(err, unix.ESRCH) {
				continue
			} else if err != nil {
				m.close()
				return nil, fmt.Errorf("open process %d: %w", pid, err)
			}
			if !c.holds(pid) { // ended, and the number is another's now
				unix.Close(fd)
				continue
			}
			m = append(m, fd)
		}
	}
	return m, nil
}

// gone reports whether a file of a cgroup could not be read since the cgroup
// has been removed.
func gone(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV)
}

// tree returns the cgroup and those below it, each after the one above it.
func (c cgroup) tree() (dirs []string, err error) {
	root, err := cgroups()
	if err != nil {
		return nil, err
	}
	err = fs.WalkDir(root.FS(), string(c), func(p string, d fs.DirEntry, err error) error {
		if gone(err) {
			return nil
		} else if err != nil {
			return err
		}
		if d.IsDir() {
			dirs = append(dirs, p)
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("list cgroup: %w", err)
	}
	return dirs, nil
}

// remove removes the cgroup with all below it. What was in it has ended.
func (c cgroup) remove() error {
	dirs, err := c.tree()
	if err != nil {
		return err
	}
	root, err := cgroups()
	if err != nil {
		return err
	}
	for _, p := range slices.Backward(dirs) {
		if err := root.Remove(p); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("remove cgroup: %w", err)
		}
	}
	return nil
}
