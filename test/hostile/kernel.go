package hostile

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

var namespaces = map[string]int{
	"user": unix.CLONE_NEWUSER, "mnt": unix.CLONE_NEWNS, "net": unix.CLONE_NEWNET, "pid": unix.CLONE_NEWPID,
	"ipc": unix.CLONE_NEWIPC, "uts": unix.CLONE_NEWUTS, "cgroup": unix.CLONE_NEWCGROUP, "time": unix.CLONE_NEWTIME,
}

// call makes a system call, on a thread that is not lost with it.
func call(nr uintptr, args ...uintptr) error {
	var a [6]uintptr
	copy(a[:], args)
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if _, _, errno := unix.RawSyscall6(nr, a[0], a[1], a[2], a[3], a[4], a[5]); errno != 0 {
		return errno
	}
	return nil
}

func open(family, kind, protocol int) error {
	fd, err := unix.Socket(family, kind|unix.SOCK_CLOEXEC, protocol)
	if err == nil {
		unix.Close(fd)
	}
	return err
}

func dial(network, to, say string) error {
	c, err := net.DialTimeout(network, to, 2*time.Second)
	if err != nil {
		return err
	}
	defer c.Close()
	if _, err := c.Write([]byte(say)); err != nil {
		return err
	}
	if network == "unixgram" {
		return nil // is there, which is enough
	}
	// A refusal may come with the answer.
	_ = c.SetDeadline(time.Now().Add(300 * time.Millisecond))
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
		return err
	}
	return nil
}

// newLink asks the kernel for a network interface.
func newLink() error {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_ROUTE)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	attr := func(kind uint16, data []byte) []byte {
		b := binary.NativeEndian.AppendUint16(nil, uint16(4+len(data)))
		b = append(binary.NativeEndian.AppendUint16(b, kind), data...)
		return append(b, make([]byte, (4-len(b)%4)%4)...)
	}
	body := append(make([]byte, unix.SizeofIfInfomsg), attr(unix.IFLA_LINKINFO, attr(unix.IFLA_INFO_KIND, []byte("dummy")))...)
	var msg []byte
	msg = binary.NativeEndian.AppendUint32(msg, uint32(unix.NLMSG_HDRLEN+len(body)))
	msg = binary.NativeEndian.AppendUint16(msg, unix.RTM_NEWLINK)
	msg = binary.NativeEndian.AppendUint16(msg, unix.NLM_F_REQUEST|unix.NLM_F_ACK|unix.NLM_F_CREATE|unix.NLM_F_EXCL)
	msg = append(append(msg, make([]byte, 8)...), body...)
	if err := unix.Sendto(fd, msg, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return err
	}
	reply := make([]byte, 4096)
	n, _, err := unix.Recvfrom(fd, reply, 0)
	if err != nil {
		return err
	}
	if n < unix.NLMSG_HDRLEN+4 || binary.NativeEndian.Uint16(reply[4:]) != unix.NLMSG_ERROR {
		return errors.New("an odd reply")
	}
	if code := int32(binary.NativeEndian.Uint32(reply[unix.NLMSG_HDRLEN:])); code != 0 {
		return syscall.Errno(-code)
	}
	return nil
}

// ownedBy is the user of a process.
func ownedBy(pid string) string {
	status, _ := os.ReadFile("/proc/" + pid + "/status")
	_, rest, _ := bytes.Cut(status, []byte("\nUid:"))
	line, _, _ := bytes.Cut(rest, []byte("\n"))
	return string(line)
}

// touch opens a file to write, and does not.
func touch(name string) error {
	fd, err := unix.Open(name, unix.O_WRONLY|unix.O_NONBLOCK|unix.O_CLOEXEC|unix.O_NOCTTY, 0)
	if err == nil {
		unix.Close(fd)
	}
	return err
}

// senseless are system calls with arguments that no kernel takes. Where one is
// answered otherwise than it should be, it went through.
func senseless(calls map[string]uintptr) func(Where) answers {
	return func(Where) answers {
		const none = ^uintptr(0)
		a := answers{}
		for name, nr := range calls {
			a.add(answer(call(nr, none, none, none, none, none, none)), name)
		}
		return a
	}
}

// Ways into the kernel.
var kernel = []attempt{
	{name: "what is mounted, changed by system calls", want: []string{"EPERM"}, do: senseless(map[string]uintptr{
		"mount": unix.SYS_MOUNT, "umount2": unix.SYS_UMOUNT2, "pivot_root": unix.SYS_PIVOT_ROOT, "chroot": unix.SYS_CHROOT,
		"open_tree": unix.SYS_OPEN_TREE, "move_mount": unix.SYS_MOVE_MOUNT, "fsopen": unix.SYS_FSOPEN, "fsconfig": unix.SYS_FSCONFIG,
		"fsmount": unix.SYS_FSMOUNT, "fspick": unix.SYS_FSPICK, "mount_setattr": unix.SYS_MOUNT_SETATTR,
		"swapon": unix.SYS_SWAPON, "swapoff": unix.SYS_SWAPOFF, "quotactl": unix.SYS_QUOTACTL, "quotactl_fd": unix.SYS_QUOTACTL_FD,
	})},
	{name: "the root changed to /tmp", want: []string{"EPERM"}, do: single(func() error { return unix.Chroot("/tmp") })},
	{name: "a file system mounted on /tmp", want: refused, do: func(Where) answers {
		return each([]string{"tmpfs", "proc", "sysfs", "cgroup2", "overlay", "mqueue", "debugfs", "bpf"}, func(kind string) error { return unix.Mount("none", "/tmp", kind, 0, "") })
	}},
	{name: "each read-only mount made writable", want: []string{"EPERM"}, do: func(Where) answers {
		a := answers{}
		for _, m := range mounts() {
			a.add(answer(unix.Mount("", m, "", unix.MS_REMOUNT|unix.MS_BIND, "")), m)
			a.add(answer(unix.Unmount(m, unix.MNT_DETACH)), "without "+m)
		}
		return a
	}},
	{name: "files by their handles", want: []string{"EPERM"}, do: senseless(map[string]uintptr{
		"open_by_handle_at": unix.SYS_OPEN_BY_HANDLE_AT, "name_to_handle_at": unix.SYS_NAME_TO_HANDLE_AT,
	})},
	{name: "the kernel's keys", want: []string{"EPERM"}, do: senseless(map[string]uintptr{
		"add_key": unix.SYS_ADD_KEY, "request_key": unix.SYS_REQUEST_KEY, "keyctl": unix.SYS_KEYCTL,
	})},
	{name: "bpf, performance events, page faults, modules, another kernel", want: []string{"EPERM"}, do: senseless(map[string]uintptr{
		"bpf": unix.SYS_BPF, "perf_event_open": unix.SYS_PERF_EVENT_OPEN, "userfaultfd": unix.SYS_USERFAULTFD, "fanotify_init": unix.SYS_FANOTIFY_INIT,
		"init_module": unix.SYS_INIT_MODULE, "finit_module": unix.SYS_FINIT_MODULE, "delete_module": unix.SYS_DELETE_MODULE,
		"kexec_load": unix.SYS_KEXEC_LOAD, "kexec_file_load": unix.SYS_KEXEC_FILE_LOAD, "process_madvise": unix.SYS_PROCESS_MADVISE,
	})},
	{name: "io_uring", want: []string{"ENOSYS"}, do: senseless(map[string]uintptr{
		"setup": unix.SYS_IO_URING_SETUP, "enter": unix.SYS_IO_URING_ENTER, "register": unix.SYS_IO_URING_REGISTER,
	})},
	{name: "the machine: reboot, clock, names, log", want: []string{"EPERM"}, do: senseless(map[string]uintptr{
		"reboot": unix.SYS_REBOOT, "settimeofday": unix.SYS_SETTIMEOFDAY, "clock_settime": unix.SYS_CLOCK_SETTIME, "clock_adjtime": unix.SYS_CLOCK_ADJTIME,
		"adjtimex": unix.SYS_ADJTIMEX, "sethostname": unix.SYS_SETHOSTNAME, "setdomainname": unix.SYS_SETDOMAINNAME,
		"syslog": unix.SYS_SYSLOG, "acct": unix.SYS_ACCT, "vhangup": unix.SYS_VHANGUP,
	})},
	{name: "device nodes made", want: append([]string{"EROFS"}, refused...), do: func(Where) answers {
		a := answers{}
		for _, dir := range []string{"/tmp", "/dev/shm", "/dev"} {
			for kind, mode := range map[string]uint32{"block": unix.S_IFBLK, "char": unix.S_IFCHR} {
				a.add(answer(unix.Mknod(dir+"/hostile-"+kind, mode|0o600, int(unix.Mkdev(8, 0)))), kind+" in "+dir)
			}
		}
		return a
	}},
	{name: "devices opened", want: append(absent, refused...), do: func(Where) answers {
		return each([]string{
			"mem", "kmem", "port", "kmsg", "kvm", "fuse", "net/tun", "vhost-net", "vhost-vsock", "vsock", "userfaultfd", "uinput", "input/event0", "sda", "vda", "nvme0n1",
			"loop-control", "loop0", "mapper/control", "snapshot", "rtc0", "cpu/0/msr", "dri/card0", "nvidia0", "console", "tty0", "ttyS0", "hpet", "autofs", "btrfs-control",
		}, func(name string) error { return touch("/dev/" + name) })
	}},
	{name: "other devices than the standard ones", want: []string{"none"}, do: func(Where) answers {
		a := answers{}
		_ = filepath.WalkDir("/dev", func(p string, d fs.DirEntry, err error) error { // what cannot be read is none
			if err == nil && d.Type()&fs.ModeDevice != 0 && !standard[p] && !strings.HasPrefix(p, "/dev/pts/") {
				a.add("there", p)
			}
			return nil
		})
		if len(a) == 0 {
			return one("none")
		}
		return a
	}},
	{name: "a terminal that input can be put into", want: []string{"ENXIO", "ENOTTY", "EACCES", "EIO", "EPERM"}, do: func(Where) answers {
		a := answers{}
		fd, err := unix.Open("/dev/tty", unix.O_RDWR|unix.O_CLOEXEC, 0)
		if err == nil {
			unix.Close(fd)
		}
		a.add(answer(err), "/dev/tty")
		for fd := range uintptr(3) {
			c := byte('x')
			a.add(answer(call(unix.SYS_IOCTL, fd, unix.TIOCSTI, uintptr(unsafe.Pointer(&c)))), "descriptor "+strconv.Itoa(int(fd)))
		}
		return a
	}},
	{name: "files of the kernel below /sys that can be written", want: []string{"none"}, do: func(Where) answers { return writable("/sys") }},
	{name: "files of the kernel below /proc that can be written", want: []string{"none"}, do: func(Where) answers { return writable("/proc") }},
	{name: "the kernel's secrets", want: append(absent, append([]string{"nothing"}, refused...)...), do: func(Where) answers {
		return each([]string{"kcore", "kmsg", "keys", "key-users", "sched_debug", "timer_list", "vmallocinfo", "slabinfo", "kpageflags", "iomem", "latency_stats", "sysrq-trigger"}, func(name string) error {
			b, err := os.ReadFile("/proc/" + name)
			if err == nil && len(bytes.Trim(b, "0123456789abcdef- :\n")) == 0 {
				return errors.New("nothing")
			}
			if err == nil && (name == "iomem" || name == "key-users") { // addresses are zeros; counts of the own user namespace
				return blank(b)
			}
			return err
		})
	}},
}

// blank is an error if no address that is not zero is in a table of them.
func blank(b []byte) error {
	for line := range bytes.Lines(b) {
		first, _, _ := bytes.Cut(bytes.TrimSpace(line), []byte(" "))
		if bytes.Contains(first, []byte("-")) && len(bytes.Trim(first, "0-")) > 0 {
			return nil
		}
	}
	return errors.New("nothing")
}

// standard are the devices that every container has.
var standard = map[string]bool{
	"/dev/null": true, "/dev/zero": true, "/dev/full": true, "/dev/random": true, "/dev/urandom": true, "/dev/tty": true, "/dev/console": true,
}

// writable lists the kernel's files below a directory that this user could open
// to write, but for those about the process itself.
func writable(top string) answers {
	a := answers{}
	_ = filepath.WalkDir(top, func(p string, d fs.DirEntry, err error) error { // what cannot be read is not there
		base := filepath.Base(p)
		switch {
		case err != nil:
			if d != nil && d.IsDir() {
				return fs.SkipDir
			}
		case d.IsDir() && filepath.Dir(p) == "/proc" && (base[0] >= '0' && base[0] <= '9'):
			return fs.SkipDir // a process; the bridge's has attempts of its own
		case strings.HasPrefix(p, "/proc/pressure/"):
			// Anybody may ask to be woken when the machine is under pressure.
		case d.Type().IsRegular() && unix.Access(p, unix.W_OK) == nil && !masks(p) && touch(p) == nil:
			a.add(worked, p)
		}
		return nil
	})
	if len(a) == 0 {
		return one("none")
	}
	return a
}

// mounts are the places of all mounts.
func mounts() (points []string) {
	raw, _ := os.ReadFile("/proc/self/mountinfo") // none is nothing to try, which is not an answer that is wanted
	for line := range strings.Lines(string(raw)) {
		if f := strings.Fields(line); len(f) > 5 {
			points = append(points, f[4])
		}
	}
	return points
}
