package host

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// cgroups is the root of the cgroup2 tree. It is mounted for this process
// alone and attached nowhere, so it makes no difference whether the machine
// has it at /sys/fs/cgroup (systemd), below it (hybrid), or not at all.
var cgroups = sync.OnceValues(func() (*os.Root, error) {
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
})

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

// kill sends SIGKILL to all that is in the cgroup and below, in one step, so
// that no fork escapes. No process id is named, so no recycled one can be hit.
func (c cgroup) kill() error {
	root, err := cgroups()
	if err != nil {
		return err
	}
	err = root.WriteFile(path.Join(string(c), "cgroup.kill"), []byte("1"), 0)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("kill cgroup %s: %w", c, err)
	}
	return nil
}

// waitEmpty returns when no living process is left in the cgroup and below.
func (c cgroup) waitEmpty(ctx context.Context) error {
	root, err := cgroups()
	if err != nil {
		return err
	}
	f, err := root.Open(path.Join(string(c), "cgroup.events"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	} else if err != nil {
		return fmt.Errorf("watch cgroup: %w", err)
	}
	defer f.Close()
	buf := make([]byte, 256)
	for {
		n, err := f.ReadAt(buf, 0)
		if n == 0 {
			if errors.Is(err, unix.ENODEV) { // removed meanwhile
				return nil
			}
			return fmt.Errorf("watch cgroup %s: %w", c, err)
		}
		if strings.Contains(string(buf[:n]), "populated 0") {
			return nil
		}
		if err := ctx.Err(); err != nil {
			return fmt.Errorf("cgroup %s still has processes: %w", c, err)
		}
		// The file reports a change as an exceptional condition. The bound
		// is for ctx, which poll does not know.
		fds := []unix.PollFd{{Fd: int32(f.Fd()), Events: unix.POLLPRI}}
		if _, err := unix.Poll(fds, int((100 * time.Millisecond).Milliseconds())); err != nil && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("watch cgroup %s: %w", c, err)
		}
	}
}

// remove removes the empty cgroup with all below it.
func (c cgroup) remove() error {
	root, err := cgroups()
	if err != nil {
		return err
	}
	var dirs []string
	err = fs.WalkDir(root.FS(), string(c), func(p string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
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
		return fmt.Errorf("list cgroup: %w", err)
	}
	for i := range dirs {
		p := dirs[len(dirs)-1-i] // children come after their parents
		if err := root.Remove(p); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("remove cgroup: %w", err)
		}
	}
	return nil
}
