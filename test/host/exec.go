package host

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// A Cmd is a command to run on a host.
type Cmd struct {
	// User to run it as, by name; empty is root. It gets a login's
	// environment, also if the account cannot log in.
	User string

	// Args are the command and its arguments. No shell looks at them.
	Args []string

	// Env is added to the environment, which has nothing of this process.
	Env []string

	// Dir is where it starts; empty is the user's home.
	Dir string

	Stdin  io.Reader
	Stdout io.Writer
	Stderr io.Writer // nil puts the end of what it printed into the error
}

// Exec runs the command and waits for it. An exit status other than 0 is an
// error that wraps an [exec.ExitError]; a command that is not there exits
// with 127, as in a shell. When ctx ends, the command and its process group are
// killed. What it leaves running dies with the host.
func (h *Host) Exec(ctx context.Context, c Cmd) error {
	if len(c.Args) == 0 {
		return errors.New("no command")
	}
	pidfd, err := h.open()
	if err != nil {
		return err
	}
	defer unix.Close(pidfd)
	cg, err := (cgroupOf(h.dir) + "/exec").create()
	if err != nil {
		return err
	}
	defer cg.Close()
	var stderr tail
	if c.Stderr == nil {
		c.Stderr = &stderr
	}
	var cmd *exec.Cmd
	err = thread(func() error {
		if err := enterHost(pidfd, everyNamespace); err != nil {
			return err
		}
		u, err := lookUp(c.User)
		if err != nil {
			return err
		}
		if err := dropBeyond(); err != nil {
			return err
		}
		// clone(2) puts the command into the host's cgroup, so that no
		// child of it is ever elsewhere. Where a cgroup namespace is a
		// boundary it can do so only before it enters that of the host, so
		// the host's nsenter does that.
		cmd = exec.CommandContext(ctx, "/usr/bin/nsenter", "--cgroup=/proc/1/ns/cgroup", "--",
			"/usr/bin/setpriv", "--reuid="+u.uid, "--regid="+u.gid, "--init-groups", "--")
		cmd.Args = append(cmd.Args, c.Args...)
		cmd.Env = append(u.environ(), c.Env...)
		cmd.Dir = c.Dir
		if cmd.Dir == "" {
			cmd.Dir = u.homeOrRoot()
		}
		cmd.Stdin, cmd.Stdout, cmd.Stderr = c.Stdin, c.Stdout, c.Stderr
		cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, UseCgroupFD: true, CgroupFD: int(cg.Fd())}
		cmd.Cancel = func() error { return unix.Kill(-cmd.Process.Pid, unix.SIGKILL) }
		cmd.WaitDelay = 5 * time.Second
		return cmd.Start()
	})
	if err == nil {
		err = cmd.Wait()
	}
	if err != nil {
		return fmt.Errorf("%s: %s: %w%s", h.name, c.Args[0], err, stderr.suffix())
	}
	return nil
}

// Output runs a command as root and returns what it printed, also with an error.
func (h *Host) Output(ctx context.Context, args ...string) ([]byte, error) {
	return h.OutputAs(ctx, "", args...)
}

// OutputAs is Output as the user.
func (h *Host) OutputAs(ctx context.Context, user string, args ...string) ([]byte, error) {
	var out bytes.Buffer
	err := h.Exec(ctx, Cmd{User: user, Args: args, Stdout: &out})
	return out.Bytes(), err
}

// enterHost moves the thread into the host and makes sure that it is there,
// since what follows changes files.
func enterHost(pidfd, which int) error {
	if err := enter(pidfd, which); err != nil {
		return err
	}
	if _, err := os.Lstat("/run/host/notify"); err != nil {
		return fmt.Errorf("not in a host: %w", err)
	}
	return nil
}

// A user is an account of the host.
type user struct{ name, uid, gid, home, shell string }

// lookUp finds an account by name; the calling thread is in the host.
func lookUp(name string) (user, error) {
	if name == "" {
		name = "root"
	}
	passwd, err := os.ReadFile("/etc/passwd")
	if err != nil {
		return user{}, err
	}
	for line := range strings.Lines(string(passwd)) {
		f := strings.Split(strings.TrimSuffix(line, "\n"), ":")
		if len(f) == 7 && f[0] == name {
			return user{name: name, uid: f[2], gid: f[3], home: f[5], shell: f[6]}, nil
		}
	}
	return user{}, fmt.Errorf("no account %q", name)
}

// environ is what a login would set; the calling thread is in the host.
func (u user) environ() []string {
	env := []string{
		"HOME=" + u.home, "USER=" + u.name, "LOGNAME=" + u.name, "SHELL=" + u.shell,
		"LANG=C.UTF-8",
		"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
	}
	run := "/run/user/" + u.uid
	if _, err := os.Stat(run); err == nil { // the user's manager runs
		env = append(env, "XDG_RUNTIME_DIR="+run, "DBUS_SESSION_BUS_ADDRESS=unix:path="+run+"/bus")
	}
	return env
}

func (u user) homeOrRoot() string {
	if fi, err := os.Stat(u.home); err == nil && fi.IsDir() {
		return u.home
	}
	return "/"
}

// do runs f on a thread that sees the host's files, and only those.
func (h *Host) do(f func() error) error {
	pidfd, err := h.open()
	if err != nil {
		return err
	}
	defer unix.Close(pidfd)
	return thread(func() error {
		if err := enterHost(pidfd, unix.CLONE_NEWNS); err != nil {
			return err
		}
		return f()
	})
}

// ReadFile returns the content of a file of the host.
func (h *Host) ReadFile(name string) (data []byte, err error) {
	err = h.do(func() error {
		data, err = os.ReadFile(name)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("%s: %w", h.name, err)
	}
	return data, nil
}

// WriteFile replaces a file of the host, making the directories above it. Both
// belong to root.
func (h *Host) WriteFile(name string, data []byte, mode fs.FileMode) error {
	err := h.do(func() error {
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(name+".new", data, mode); err != nil {
			return err
		}
		if err := os.Chmod(name+".new", mode); err != nil {
			return err
		}
		return os.Rename(name+".new", name)
	})
	if err != nil {
		return fmt.Errorf("%s: %w", h.name, err)
	}
	return nil
}

// setNames replaces /etc/hosts, whether the host runs or not.
func (h *Host) setNames(text []byte) error {
	err := h.WriteFile("/etc/hosts", text, 0o644)
	if !errors.Is(err, ErrDown) {
		return err
	}
	return thread(func() error {
		name := filepath.Join(h.dir, "upper/etc/hosts")
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			return err
		}
		return os.WriteFile(name, text, 0o644)
	})
}

// CopyTo copies a file or a directory of the machine to the name on the host,
// making the directories above it. Modes and symbolic links are kept, all
// belongs to root, and what is there already is replaced file by file.
func (h *Host) CopyTo(src, dst string) error {
	from, err := openTree(src)
	if err != nil {
		return err
	}
	defer from.Close()
	if err := h.do(func() error { return from.copyTo(dst) }); err != nil {
		return fmt.Errorf("copy to %s: %w", h.name, err)
	}
	return nil
}

// CopyFrom is CopyTo in the other direction.
func (h *Host) CopyFrom(src, dst string) error {
	var from *tree
	err := h.do(func() (err error) {
		from, err = openTree(src)
		return err
	})
	if err == nil {
		defer from.Close()
		err = from.copyTo(dst)
	}
	if err != nil {
		return fmt.Errorf("copy from %s: %w", h.name, err)
	}
	return nil
}

// A tree is an open file or directory. It stays what it was when its user
// goes into another mount namespace.
type tree struct {
	file *os.File
	root *os.Root // if file is a directory
}

func openTree(name string) (*tree, error) {
	fi, err := os.Stat(name) // to open another kind of file may block
	if err != nil {
		return nil, err
	}
	if !fi.IsDir() && !fi.Mode().IsRegular() {
		return nil, fmt.Errorf("%s: is neither a file nor a directory", name)
	}
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	t := &tree{file: f}
	if fi.IsDir() {
		if t.root, err = os.OpenRoot(name); err != nil {
			f.Close()
			return nil, err
		}
	}
	return t, nil
}

func (t *tree) Close() error {
	if t.root != nil {
		t.root.Close()
	}
	return t.file.Close()
}

func (t *tree) copyTo(dst string) error {
	if err := os.MkdirAll(filepath.Dir(dst), 0o755); err != nil {
		return err
	}
	if t.root == nil {
		return copyFile(t.file, dst)
	}
	return fs.WalkDir(t.root.FS(), ".", func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		to := filepath.Join(dst, name)
		switch d.Type() {
		case fs.ModeDir:
			fi, err := d.Info()
			if err != nil {
				return err
			}
			if err := os.Mkdir(to, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
				return err
			}
			return os.Chmod(to, fi.Mode())
		case fs.ModeSymlink:
			target, err := t.root.Readlink(name)
			if err != nil {
				return err
			}
			if err := os.Remove(to); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
			return os.Symlink(target, to)
		case 0:
			f, err := t.root.Open(name)
			if err != nil {
				return err
			}
			defer f.Close()
			return copyFile(f, to)
		default:
			return fmt.Errorf("%s: cannot copy a %s", name, d.Type())
		}
	})
}

// copyFile makes dst a copy of from. A program that runs under that name keeps
// running what it was.
func copyFile(from *os.File, dst string) (err error) {
	fi, err := from.Stat()
	if err != nil {
		return err
	}
	to, err := os.CreateTemp(filepath.Dir(dst), ".copy-")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = to.Close()
			_ = os.Remove(to.Name())
		}
	}()
	if _, err := io.Copy(to, from); err != nil {
		return err
	}
	if err := to.Chmod(fi.Mode()); err != nil {
		return err
	}
	if err := to.Close(); err != nil {
		return err
	}
	return os.Rename(to.Name(), dst)
}

// tail keeps the end of what is written to it.
type tail struct{ b []byte }

const tailSize = 4096

func (t *tail) Write(p []byte) (int, error) {
	t.b = append(t.b, p...)
	t.b = t.b[max(0, len(t.b)-tailSize):]
	return len(p), nil
}

func (t *tail) suffix() string {
	if len(t.b) == 0 {
		return ""
	}
	return ": " + strings.TrimSpace(string(t.b))
}
