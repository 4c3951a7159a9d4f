// Command probe is run inside a runtime container and tries what nothing in
// there may do. It prints one line an attempt and ends with 1 if any of them
// worked.
//
//	probe ADDRESS:PORT
//
// The address is one that a process outside of the container reaches. What
// podman exec starts is in the container alone; what the engine is confined to
// beside that is tried by the same program, started again the way the bridge
// starts engines. Podman lets a container make user namespaces, so what their
// root can do is tried, too.
package main

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/resultity/node/internal/bridge/sandbox"
)

// The second argument of the probe that was started again.
const (
	asRoot   = "as-root"   // as the root of a user namespace of its own
	asEngine = "as-engine" // as confined as an engine is
)

func main() {
	if len(os.Args) < 2 {
		fmt.Fprintln(os.Stderr, "usage: probe ADDRESS:PORT")
		os.Exit(64)
	}
	p := probe{outside: os.Args[1]}
	switch {
	case slices.Contains(os.Args, asRoot):
		p.asRoot()
	case slices.Contains(os.Args, asEngine):
		p.asEngine()
	default:
		p.inContainer()
		p.again(asRoot, &syscall.SysProcAttr{
			Cloneflags:  syscall.CLONE_NEWUSER | syscall.CLONE_NEWNS,
			UidMappings: []syscall.SysProcIDMap{{HostID: os.Getuid(), Size: 1}},
			GidMappings: []syscall.SysProcIDMap{{HostID: os.Getgid(), Size: 1}},
		})
		// As the agent orders it; see internal/quadlet.
		order := sandbox.Order{Writable: []string{"/tmp", "/dev/shm"}, SocketDir: socketDir}
		landlock, err := sandbox.Confine(order, func() { p.again(asEngine, nil) })
		if err == nil && landlock == 0 {
			err = fmt.Errorf("the kernel has no Landlock")
		}
		if err != nil {
			fmt.Println("WORKED   start a program less confined than the engine:", err)
			p.bad++
		}
	}
	if p.bad > 0 {
		fmt.Printf("%d attempts worked\n", p.bad)
		os.Exit(1)
	}
}

const socketDir = "/run/resultity"

type probe struct {
	outside string
	bad     int
}

func (p *probe) try(what string, f func() error) {
	if err := f(); err != nil {
		fmt.Printf("refused  %s: %v\n", what, err)
		return
	}
	p.bad++
	fmt.Printf("WORKED   %s\n", what)
}

// again starts the probe anew.
func (p *probe) again(how string, attr *syscall.SysProcAttr) {
	proc, err := os.StartProcess("/proc/self/exe", []string{"probe", p.outside, how}, &os.ProcAttr{
		Files: []*os.File{nil, os.Stdout, os.Stderr}, Sys: attr,
	})
	if err != nil {
		fmt.Printf("refused  start a process %s: %v\n", how, err)
		return
	}
	if st, err := proc.Wait(); err != nil || !st.Success() {
		fmt.Printf("WORKED   %s: %v, %v\n", how, st, err)
		p.bad++
	}
}

// asEngine tries what only the bridge's own confinement of the engine refuses.
func (p *probe) asEngine() {
	try := func(what string, f func() error) { p.try("as the engine, "+what, f) }
	for _, ns := range []struct {
		name string
		flag int
	}{
		{"user", unix.CLONE_NEWUSER}, {"mount", unix.CLONE_NEWNS}, {"network", unix.CLONE_NEWNET}, {"process", unix.CLONE_NEWPID},
		{"IPC", unix.CLONE_NEWIPC}, {"name", unix.CLONE_NEWUTS}, {"cgroup", unix.CLONE_NEWCGROUP}, {"time", unix.CLONE_NEWTIME},
	} {
		try("make a "+ns.name+" namespace", func() error { return refused(unix.SYS_UNSHARE, unix.EPERM, uintptr(ns.flag)) })
	}
	try("start a process as root of a user namespace", func() error {
		_, err := os.StartProcess("/proc/self/exe", []string{"probe"}, &os.ProcAttr{Sys: &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWUSER}})
		return err
	})
	for _, c := range []struct {
		what string
		nr   uintptr
		want unix.Errno
	}{
		{"clone with arguments that no filter sees", unix.SYS_CLONE3, unix.ENOSYS},
		{"enter a namespace", unix.SYS_SETNS, unix.EPERM},
		{"mount", unix.SYS_MOUNT, unix.EPERM}, {"unmount", unix.SYS_UMOUNT2, unix.EPERM}, {"change the root", unix.SYS_PIVOT_ROOT, unix.EPERM},
		{"copy a mount", unix.SYS_OPEN_TREE, unix.EPERM}, {"move a mount", unix.SYS_MOVE_MOUNT, unix.EPERM},
		{"open a file system", unix.SYS_FSOPEN, unix.EPERM}, {"change a mount", unix.SYS_MOUNT_SETATTR, unix.EPERM},
		{"open a file by its handle", unix.SYS_OPEN_BY_HANDLE_AT, unix.EPERM},
		{"trace a process", unix.SYS_PTRACE, unix.EPERM}, {"read another's memory", unix.SYS_PROCESS_VM_READV, unix.EPERM},
		{"write another's memory", unix.SYS_PROCESS_VM_WRITEV, unix.EPERM}, {"compare processes", unix.SYS_KCMP, unix.EPERM},
		{"add a key", unix.SYS_ADD_KEY, unix.EPERM}, {"ask for a key", unix.SYS_REQUEST_KEY, unix.EPERM}, {"use the keyring", unix.SYS_KEYCTL, unix.EPERM},
		{"load a program into the kernel", unix.SYS_BPF, unix.EPERM}, {"count performance events", unix.SYS_PERF_EVENT_OPEN, unix.EPERM},
		{"handle page faults", unix.SYS_USERFAULTFD, unix.EPERM}, {"make rings", unix.SYS_IO_URING_SETUP, unix.ENOSYS},
		{"enter rings", unix.SYS_IO_URING_ENTER, unix.ENOSYS},
	} {
		try(c.what, func() error { return refused(c.nr, c.want, ^uintptr(0)) })
	}
	try("talk to the hypervisor", func() error { return socket(unix.AF_VSOCK, unix.SOCK_STREAM, 0) })
	try("take a descriptor of the bridge", func() error {
		fd, err := unix.PidfdOpen(1, 0)
		if err != nil {
			return err
		}
		_, err = unix.PidfdGetfd(fd, 1, 0)
		return err
	})
	try("fill the socket's directory", func() error {
		return os.WriteFile(filepath.Join(socketDir, "probe-was-here"), []byte("x"), 0o600)
	})
	try("replace the socket", func() error { return os.Remove(filepath.Join(socketDir, "engine.sock")) })
	try("put a link beside the socket", func() error { return os.Symlink("/", filepath.Join(socketDir, "probe-was-here")) })
	try("signal the bridge", func() error { return syscall.Kill(1, 0) })
	// What it needs it has.
	for _, dir := range []string{"/tmp", "/dev/shm"} {
		try("find "+dir+" closed to it", func() error {
			name := filepath.Join(dir, "probe-was-here")
			if os.Mkdir(name, 0o700) == nil && os.WriteFile(name+"/a", []byte("x"), 0o600) == nil && os.Rename(name+"/a", name+"-too") == nil && os.RemoveAll(name) == nil && os.Remove(name+"-too") == nil {
				return fmt.Errorf("it is open")
			}
			return nil
		})
	}
	// That all this is so for the engine that runs.
	try("find an engine that is confined less", lessConfined)
}

// refused is the kernel's answer to a call with senseless arguments. Where it is
// another than the filter's, the call went through.
func refused(nr uintptr, want unix.Errno, first uintptr) error {
	const none = ^uintptr(0)
	_, _, errno := unix.RawSyscall6(nr, first, none, none, none, none, none)
	if errno == want {
		return errno
	}
	fmt.Printf("         (%v, want %v)\n", errno, want)
	return nil
}

// lessConfined fails if every other process has as many filters as this one,
// but for the bridge, which made the last.
func lessConfined() error {
	own, err := filters("self")
	if err != nil {
		return nil
	}
	all, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return nil
	}
	others := 0
	for _, dir := range all {
		pid := filepath.Base(dir)
		exe, err := os.ReadFile(filepath.Join(dir, "comm"))
		if err != nil || pid == "1" || strings.HasPrefix(string(exe), "probe") || strings.HasPrefix(string(exe), "exe") {
			continue
		}
		if n, err := filters(pid); err != nil || n != own {
			fmt.Printf("         (%s has %q filters, this process %q)\n", strings.TrimSpace(string(exe)), n, own)
			return nil
		}
		others++
	}
	if others == 0 {
		fmt.Println("         (no engine)")
		return nil
	}
	return fmt.Errorf("%d processes with %s filters", others, own)
}

// filters is how many system call filters a process has.
func filters(pid string) (string, error) {
	status, err := os.ReadFile("/proc/" + pid + "/status")
	_, rest, ok := strings.Cut(string(status), "\nSeccomp_filters:")
	if err == nil && !ok {
		err = fmt.Errorf("no such line")
	}
	n, _, _ := strings.Cut(rest, "\n")
	return strings.TrimSpace(n), err
}

// asRoot tries what a user namespace could help with. Mounting over things is
// not among it: that changes what this process sees, and nothing else.
func (p *probe) asRoot() {
	const how = "as root of a user namespace, "
	for _, dir := range []string{"/", "/models", "/resultity-bridge"} {
		p.try(how+"make "+dir+" writable", func() error {
			return syscall.Mount("", dir, "", syscall.MS_REMOUNT|syscall.MS_BIND, "")
		})
	}
	p.try(how+"mount a proc that shows all", func() error { return syscall.Mount("proc", "/tmp", "proc", 0, "") })
	p.try(how+"make a device", func() error { return syscall.Mknod("/tmp/sda", syscall.S_IFBLK|0o600, 8<<8) })
	p.try(how+"open a raw socket", func() error { return socket(syscall.AF_INET, syscall.SOCK_RAW, syscall.IPPROTO_ICMP) })
	p.try(how+"change the clock", func() error { return syscall.Settimeofday(&syscall.Timeval{Sec: 1}) })
	p.try(how+"connect by TCP to "+p.outside, func() error {
		c, err := net.DialTimeout("tcp", p.outside, 5*time.Second)
		if err != nil {
			return err
		}
		return c.Close()
	})
}

// inContainer tries what any process of the container could.
func (p *probe) inContainer() {
	outside, try := p.outside, p.try
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	dial := func(network, addr string) func() error {
		return func() error {
			c, err := new(net.Dialer).DialContext(ctx, network, addr)
			if err != nil {
				return err
			}
			defer c.Close()
			_, err = c.Write([]byte("x")) // connecting says nothing on a datagram socket
			return err
		}
	}
	try("connect by TCP to "+outside, dial("tcp", outside))
	try("send by UDP to "+outside, dial("udp", outside))
	try("look up a name", func() error { _, err := new(net.Resolver).LookupHost(ctx, "example.com"); return err })
	try("open a packet socket", func() error { return socket(syscall.AF_PACKET, syscall.SOCK_RAW, 0) })
	try("open a raw socket", func() error { return socket(syscall.AF_INET, syscall.SOCK_RAW, syscall.IPPROTO_ICMP) })
	try("see another interface than lo", func() error {
		ifs, err := net.Interfaces()
		if err != nil {
			return err
		}
		if len(ifs) == 1 && ifs[0].Name == "lo" {
			return fmt.Errorf("only lo")
		}
		return nil
	})
	for _, dir := range []string{"/", "/etc", "/usr/bin", "/models", "/sys", "/sys/fs/cgroup", "/var"} {
		try("write in "+dir, func() error {
			f, err := os.OpenFile(filepath.Join(dir, "probe-was-here"), os.O_CREATE|os.O_WRONLY, 0o600)
			if err != nil {
				return err
			}
			return f.Close()
		})
	}
	try("change a kernel setting", func() error { return os.WriteFile("/proc/sys/kernel/hostname", []byte("x"), 0o644) })
	try("replace the bridge", func() error { return os.WriteFile("/resultity-bridge", []byte("x"), 0o755) })
	try("read the host's shadow file", func() error { _, err := os.ReadFile("/proc/1/root/etc/shadow"); return err })
	try("mount a file system", func() error { return syscall.Mount("none", "/tmp", "tmpfs", 0, "") })
	try("start a program from the models", func() error {
		f, err := os.Open("/models")
		if err != nil {
			return err
		}
		defer f.Close()
		var st syscall.Statfs_t
		if err := syscall.Fstatfs(int(f.Fd()), &st); err != nil {
			return err
		}
		if st.Flags&8 != 0 { // ST_NOEXEC
			return fmt.Errorf("mounted noexec")
		}
		return nil
	})
	try("trace the bridge", func() error { return syscall.PtraceAttach(1) })
	try("become root", func() error { return syscall.Setuid(0) })
	try("make a device", func() error { return syscall.Mknod("/tmp/sda", syscall.S_IFBLK|0o600, 8<<8) })
	try("change the clock", func() error { return syscall.Settimeofday(&syscall.Timeval{Sec: 1}) })
}

func socket(family, kind, protocol int) error {
	fd, err := syscall.Socket(family, kind, protocol)
	if err != nil {
		return err
	}
	return syscall.Close(fd)
}
