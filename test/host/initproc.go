package host

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// initName is the first argument of a process that becomes PID 1 of a host.
const initName = "resultity-host-init"

// The files that such a process is born with, after the standard three.
const (
	initPlanFD = 3 + iota
	initErrorFD
)

// A program that uses this package runs itself once more to become PID 1 of a
// host: the program that clone(2) started in the new namespaces builds the
// host's view of the file system and then turns into systemd.
func init() {
	if os.Args[0] != initName {
		return
	}
	unix.CloseOnExec(initPlanFD)
	unix.CloseOnExec(initErrorFD) // closes without a word when systemd runs
	err := becomeInit(os.NewFile(initPlanFD, "plan"))
	fmt.Fprint(os.NewFile(initErrorFD, "errors"), err)
	os.Exit(1)
}

// A plan tells the process that becomes PID 1 what to build.
type plan struct {
	Hostname string
	Lower    string // the root file system shared with other hosts
	Dir      string // the directory of the host, see hostRecord
	BootID   string // as in /proc/sys/kernel/random/boot_id
}

// plainDirs lie beside the overlay and not in it: overlayfs cannot have its
// upper layer on another overlayfs, and rootless Podman keeps its storage,
// which is an overlay, in a home below one of these.
var plainDirs = []string{"var", "home", "root"}

// beyondNamespaces are the capabilities that would reach the machine itself:
// its clock, its modules, its memory and I/O ports.
var beyondNamespaces = []uintptr{unix.CAP_SYS_TIME, unix.CAP_SYS_MODULE, unix.CAP_SYS_RAWIO}

// dropBeyond takes those capabilities from whatever the calling thread starts.
func dropBeyond() error {
	for _, c := range beyondNamespaces {
		if err := unix.Prctl(unix.PR_CAPBSET_DROP, c, 0, 0, 0); err != nil {
			return fmt.Errorf("drop capability %d: %w", c, err)
		}
	}
	return nil
}

// becomeInit returns only with an error. It runs on the main thread, before
// main, in new mount, pid, uts, ipc and network namespaces.
func becomeInit(planPipe io.Reader) error {
	unix.Umask(0o022)
	// The starter writes the plan when it has connected our network. A
	// starter that died leaves an empty plan.
	var p plan
	if err := json.NewDecoder(planPipe).Decode(&p); err != nil {
		return fmt.Errorf("read plan: %w", err)
	}
	// Only now: the namespace's root is the cgroup that we are in.
	if err := unix.Unshare(unix.CLONE_NEWCGROUP); err != nil {
		return fmt.Errorf("new cgroup namespace: %w", err)
	}
	if err := unix.Sethostname([]byte(p.Hostname)); err != nil {
		return fmt.Errorf("set host name: %w", err)
	}
	if err := p.mountAll(); err != nil {
		return err
	}
	if err := dropBeyond(); err != nil {
		return err
	}
	env := []string{
		"container=resultity",
		"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin",
		"LANG=C.UTF-8",
		"NOTIFY_SOCKET=/run/host/notify",
	}
	if err := unix.Exec("/sbin/init", []string{"/sbin/init"}, env); err != nil {
		return fmt.Errorf("start systemd: %w", err)
	}
	return nil
}

// mountAll builds the host's mounts and makes them the only ones.
func (p plan) mountAll() error {
	// Nothing that happens below may reach the machine's mounts.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	at := func(name string) string { return filepath.Join(p.Dir, name) }
	root := func(name string) string { return filepath.Join(p.Dir, "merged", name) }
	overlay := fmt.Sprintf("lowerdir=%s,upperdir=%s,workdir=%s", p.Lower, at("upper"), at("work"))
	if err := unix.Mount("overlay", root(""), "overlay", 0, overlay); err != nil {
		return fmt.Errorf("mount overlay (is %s on an overlay or a network file system? set %s to a directory that is not): %w", p.Dir, EnvDir, err)
	}
	for _, d := range plainDirs {
		if err := bind(at(d), root(d), 0); err != nil {
			return err
		}
	}
	const quiet = unix.MS_NOSUID | unix.MS_NOEXEC | unix.MS_NODEV
	for _, m := range []struct {
		target, kind string
		flags        uintptr
		data         string
	}{
		{"proc", "proc", quiet, ""},
		// Read-only: systemd then leaves the machine's devices alone.
		{"sys", "sysfs", quiet | unix.MS_RDONLY, ""},
		{"sys/fs/cgroup", "cgroup2", quiet, ""},
		{"dev", "tmpfs", unix.MS_NOSUID | unix.MS_STRICTATIME, "mode=755,size=4m"},
		{"dev/pts", "devpts", unix.MS_NOSUID | unix.MS_NOEXEC, "newinstance,ptmxmode=0666,mode=620,gid=5"},
		{"dev/shm", "tmpfs", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_STRICTATIME, "mode=1777"},
		{"run", "tmpfs", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_STRICTATIME, "mode=755"},
		// See below; systemd-nspawn has it in the same place.
		{"run/host/proc", "proc", quiet, ""},
	} {
		if err := os.MkdirAll(root(m.target), 0o755); err != nil {
			return err
		}
		if err := unix.Mount(m.kind, root(m.target), m.kind, m.flags, m.data); err != nil {
			return fmt.Errorf("mount %s on /%s: %w", m.kind, m.target, err)
		}
	}
	if err := makeDevices(root("dev")); err != nil {
		return err
	}
	// A boot of the host is none of the kernel's.
	if err := os.WriteFile(root("run/host/boot_id"), []byte(p.BootID), 0o444); err != nil {
		return err
	}
	if err := bind(root("run/host/boot_id"), root("proc/sys/kernel/random/boot_id"), 0); err != nil {
		return err
	}
	// The kernel's settings are the machine's, except those of the network
	// namespace. Covering parts of /proc forbids unprivileged user namespaces
	// to mount their own, which rootless containers must: the kernel wants to
	// see a whole one somewhere, which is why there is a second.
	for _, m := range []struct {
		name  string
		flags uintptr
	}{
		{"proc/sys/net", 0},
		{"proc/sys", unix.MS_RDONLY},
		{"proc/sysrq-trigger", unix.MS_RDONLY},
	} {
		if _, err := os.Stat(root(m.name)); errors.Is(err, fs.ErrNotExist) {
			continue // not every kernel has every one
		}
		if err := bind(root(m.name), root(m.name), m.flags|quiet); err != nil {
			return err
		}
	}
	if err := os.WriteFile(root("run/host/notify"), nil, 0o600); err != nil {
		return err
	}
	if err := bind(at("notify"), root("run/host/notify"), 0); err != nil {
		return err
	}
	if err := os.Chdir(root("")); err != nil {
		return err
	}
	// The old root ends up on top of the new one and is then taken off.
	if err := unix.PivotRoot(".", "."); err != nil {
		return fmt.Errorf("pivot root: %w", err)
	}
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("detach the machine's mounts: %w", err)
	}
	if err := os.Chdir("/"); err != nil {
		return err
	}
	// Podman and systemd expect mounts to propagate, as on any machine.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SHARED, ""); err != nil {
		return fmt.Errorf("make mounts shared: %w", err)
	}
	return nil
}

// bind mounts from on to. The flags take a second call: the kernel ignores
// them in the first.
func bind(from, to string, flags uintptr) error {
	if err := unix.Mount(from, to, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
		return fmt.Errorf("bind %s on %s: %w", from, to, err)
	}
	if flags == 0 {
		return nil
	}
	if err := unix.Mount("", to, "", unix.MS_REMOUNT|unix.MS_BIND|flags, ""); err != nil {
		return fmt.Errorf("set mount flags of %s: %w", to, err)
	}
	return nil
}

// makeDevices fills dev with what a container needs and what Podman needs to
// make its own. There is no console and no kernel log: those are the machine's.
func makeDevices(dev string) error {
	unix.Umask(0)
	defer unix.Umask(0o022)
	if err := os.MkdirAll(filepath.Join(dev, "net"), 0o755); err != nil {
		return err
	}
	for _, d := range []struct {
		name         string
		major, minor uint32
	}{
		{"null", 1, 3}, {"zero", 1, 5}, {"full", 1, 7}, {"random", 1, 8}, {"urandom", 1, 9},
		{"tty", 5, 0}, {"fuse", 10, 229}, {"net/tun", 10, 200},
	} {
		if err := unix.Mknod(filepath.Join(dev, d.name), unix.S_IFCHR|0o666, int(unix.Mkdev(d.major, d.minor))); err != nil {
			return fmt.Errorf("make device %s: %w", d.name, err)
		}
	}
	var errs []error
	for name, target := range map[string]string{
		"ptmx": "pts/ptmx", "fd": "/proc/self/fd", "core": "/proc/kcore",
		"stdin": "/proc/self/fd/0", "stdout": "/proc/self/fd/1", "stderr": "/proc/self/fd/2",
	} {
		errs = append(errs, os.Symlink(target, filepath.Join(dev, name)))
	}
	return errors.Join(errs...)
}
