package sealtest

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"unsafe"
)

// yard builds the container from inside its namespaces. The first error stays
// and makes the rest do nothing.
type yard struct {
	plan
	root string
	err  error
}

// The first thread is the one that others see in /proc.
func init() {
	if len(os.Args) == 3 && os.Args[1] == builder {
		runtime.LockOSThread()
	}
}

// build makes the container and becomes what it runs; it returns only errors.
func build(text string) error {
	var y yard
	if err := json.Unmarshal([]byte(text), &y.plan); err != nil {
		return err
	}
	if y.Dir == "" {
		return errors.New("no directory")
	}
	// Capabilities, no_new_privs and the filter belong to threads, and exec
	// takes over those of the thread that calls it; see init.
	y.root = filepath.Join(y.Dir, "root")
	y.closeOnExec()
	y.network()
	y.abstractSocket()
	outside := y.open("/")
	if y.has(NoNamespaces) {
		y.do("no namespaces", os.WriteFile("/proc/sys/user/max_user_namespaces", []byte("0"), 0))
	}
	y.mounts()
	y.enter()
	y.privileges()
	if y.has(OutsideWorkDir) {
		y.do("chdir", syscall.Fchdir(outside))
	}
	if y.has(InheritedFile) {
		if outside == 9 { // which dup3 refuses
			outside, _ = syscall.Dup(outside) // it fails below
		}
		y.do("dup", syscall.Dup3(outside, 9, 0))
	}
	// The race detector waits a second at each exit by default.
	env := append(y.Env, "GORACE=atexit_sleep_ms=0")
	if y.has(ProxyVariable) {
		env = append(env, "https_proxy=http://name:secret@proxy:3128")
	}
	if y.err != nil {
		return y.err
	}
	path := Binary
	if y.Program != "" {
		path = program
	}
	argv := append([]string{path}, y.Args...)
	if y.has(SecondProcess) {
		pid, err := syscall.ForkExec(path, argv, &syscall.ProcAttr{Env: env, Files: []uintptr{0, 1, 2}})
		if err != nil {
			return err
		}
		var ws syscall.WaitStatus
		if _, err := syscall.Wait4(pid, &ws, 0, nil); err != nil {
			return err
		}
		os.Exit(ws.ExitStatus())
	}
	return syscall.Exec(path, argv, env)
}

// closeOnExec keeps what the caller of the tests left open from the container.
func (y *yard) closeOnExec() {
	entries, err := os.ReadDir("/proc/self/fd")
	y.do("descriptors", err)
	for _, d := range entries {
		if fd, err := strconv.Atoi(d.Name()); err == nil && fd > 2 {
			syscall.CloseOnExec(fd)
		}
	}
}

func (y *yard) has(f Flaw) bool { return slices.Contains(y.Flaws, f) }

func (y *yard) do(what string, err error) {
	if y.err == nil && err != nil {
		y.err = fmt.Errorf("%s: %w", what, err)
	}
}

func (y *yard) open(path string) int {
	fd, err := syscall.Open(path, syscall.O_RDONLY|syscall.O_DIRECTORY|syscall.O_CLOEXEC, 0)
	y.do("open "+path, err)
	return fd
}

// at is a path of the container before it is the root.
func (y *yard) at(p string) string { return filepath.Join(y.root, p) }

func (y *yard) dir(p string) {
	if y.err == nil {
		y.do("mkdir", os.MkdirAll(y.at(p), 0o755))
	}
}

const (
	nosuid = syscall.MS_NOSUID
	nodev  = syscall.MS_NODEV
	noexec = syscall.MS_NOEXEC
	rdonly = syscall.MS_RDONLY
)

// mount mounts a new file system.
func (y *yard) mount(kind, at string, flags uintptr, data string) {
	if y.err != nil {
		return
	}
	y.dir(at)
	y.do("mount "+at, syscall.Mount(kind, y.at(at), kind, flags, data))
}

// bind mounts what is at from, outside, and makes the mount read-only if ro.
func (y *yard) bind(from, at string, ro bool) {
	if y.err != nil {
		return
	}
	info, err := os.Stat(from)
	if err != nil {
		y.do("bind", err)
		return
	}
	if info.IsDir() {
		y.dir(at)
	} else if _, err := os.Lstat(y.at(at)); errors.Is(err, os.ErrNotExist) {
		y.dir(filepath.Dir(at))
		y.do("bind", os.WriteFile(y.at(at), nil, 0o644))
	}
	y.do("bind "+at, syscall.Mount(from, y.at(at), "", syscall.MS_BIND|syscall.MS_REC, ""))
	if ro {
		y.remount(at, rdonly)
	}
}

// remount adds flags to a mount. Those that it has already must stay: in a user
// namespace they are locked.
func (y *yard) remount(at string, flags uintptr) {
	if y.err != nil {
		return
	}
	var st syscall.Statfs_t
	y.do("statfs "+at, syscall.Statfs(y.at(at), &st))
	had := uintptr(st.Flags) & (nosuid | nodev | noexec | rdonly | syscall.MS_NOATIME | syscall.MS_NODIRATIME | syscall.MS_RELATIME)
	y.do("remount "+at, syscall.Mount("", y.at(at), "", syscall.MS_REMOUNT|syscall.MS_BIND|had|flags, ""))
}

func (y *yard) mounts() {
	y.do("private", syscall.Mount("", "/", "", syscall.MS_REC|syscall.MS_PRIVATE, ""))
	y.do("mount root", syscall.Mount("tmpfs", y.root, "tmpfs", 0, "mode=755"))

	y.bind(filepath.Join(y.Dir, "binary"), Binary, true)
	if y.Program != "" {
		y.bind(y.Program, program, true)
	}
	for _, lib := range y.libraries() {
		y.bind(lib, lib, true)
	}

	y.mount("proc", "/proc", nosuid|nodev|noexec, "")
	for _, p := range []string{"/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"} {
		if p == "/proc/sys" && y.has(WritableProcSys) {
			continue
		}
		if _, err := os.Stat(y.at(p)); err == nil {
			y.bind(y.at(p), p, true)
		}
	}
	for _, p := range []string{"/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/sched_debug", "/proc/scsi", "/proc/timer_list"} {
		info, err := os.Stat(y.at(p))
		switch {
		case err != nil || p == "/proc/keys" && y.has(Unmasked):
		case info.IsDir():
			y.mount("tmpfs", p, rdonly, "size=0k")
		default:
			y.bind("/dev/null", p, true)
		}
	}
	sys := uintptr(rdonly)
	if y.has(WritableSys) {
		sys = 0
	}
	y.mount("sysfs", "/sys", sys|nosuid|nodev|noexec, "")
	if _, err := os.Stat(y.at("/sys/firmware")); err == nil {
		y.mount("tmpfs", "/sys/firmware", rdonly, "size=0k")
	}

	y.mount("tmpfs", "/dev", nosuid, "mode=755,size=64k")
	for _, n := range []string{"null", "zero", "full", "random", "urandom", "tty"} {
		if n == "zero" && y.has(FakeDevice) {
			y.bind("/dev/fuse", "/dev/zero", false)
			continue
		}
		y.bind("/dev/"+n, "/dev/"+n, false)
	}
	if y.has(ExtraDevice) {
		y.bind("/dev/fuse", "/dev/fuse", false)
	}
	if y.has(MountedDevice) {
		y.bind("/dev/fuse", "/extra", false)
	}
	y.mount("devpts", "/dev/pts", nosuid|noexec, "newinstance,ptmxmode=0666,mode=620")
	y.mount("mqueue", "/dev/mqueue", nosuid|nodev|noexec, "")
	y.mount("tmpfs", "/dev/shm", nosuid|nodev|noexec, "mode=1777,size=64000k")
	for _, l := range [][2]string{{"/proc/self/fd", "fd"}, {"/proc/self/fd/0", "stdin"}, {"/proc/self/fd/1", "stdout"}, {"/proc/self/fd/2", "stderr"}, {"pts/ptmx", "ptmx"}} {
		y.do("link", os.Symlink(l[0], y.at("/dev/"+l[1])))
	}
	y.mount("tmpfs", "/tmp", nosuid|nodev, "mode=1777")
	y.mount("tmpfs", "/run", nosuid|nodev, "mode=755")
	y.bind(filepath.Join(y.Dir, "run"), "/run/resultity", false)
	y.bind(filepath.Join(y.Dir, "notify"), "/run/notify", true)
	y.models()
	y.extras()
}

// libraries lists what this binary itself has loaded: the race detector's test
// binaries are not static.
func (y *yard) libraries() []string {
	text, err := os.ReadFile("/proc/self/maps")
	y.do("maps", err)
	var libs []string
	for line := range strings.Lines(string(text)) {
		f := strings.Fields(line)
		if len(f) == 6 && strings.Contains(f[5], ".so") && !slices.Contains(libs, f[5]) {
			libs = append(libs, f[5])
		}
	}
	for _, i := range interpreter {
		if _, err := os.Stat(i); err == nil && len(libs) > 0 {
			libs = append(libs, i)
		}
	}
	return libs
}

func (y *yard) models() {
	// On a file system of its own: the one of the test belongs to ids that are
	// not mapped here.
	y.mount("tmpfs", "/models", nosuid|nodev, "mode=755")
	if y.err != nil {
		return
	}
	y.do("model", os.WriteFile(y.at("/models/model.gguf"), []byte("model"), 0o644))
	if y.has(ForeignSocket) {
		fd, err := syscall.Socket(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
		y.do("socket", err)
		y.do("bind socket", syscall.Bind(fd, &syscall.SockaddrUnix{Name: y.at("/models/host.sock")}))
	}
	if y.has(NamedPipe) {
		y.do("mkfifo", syscall.Mkfifo(y.at("/models/pipe"), 0o666))
	}
	switch {
	case y.has(NoModels):
		y.do("umount", syscall.Unmount(y.at("/models"), 0))
		y.do("rmdir", os.Remove(y.at("/models")))
	case y.has(WritableModels):
		y.do("chmod", os.Chmod(y.at("/models"), 0o777))
	default:
		y.remount("/models", rdonly)
	}
}

func (y *yard) extras() {
	switch {
	case y.has(UnreachableMount):
		y.mount("tmpfs", "/extra", nosuid|nodev, "mode=755")
		y.mount("tmpfs", "/extra/closed/open", nosuid|nodev, "mode=777")
		y.do("chmod", os.Chmod(y.at("/extra/closed"), 0o700))
	case y.has(WritableMount):
		y.mount("tmpfs", "/extra", nosuid|nodev, "mode=777")
	case y.has(HiddenWritable):
		y.mount("tmpfs", "/extra", nosuid|nodev, "mode=755")
		y.dir("/extra/a/b")
		y.do("chmod", os.Chmod(y.at("/extra/a/b"), 0o777))
	case y.has(WritableFile):
		file := filepath.Join(y.root, "file")
		y.do("file", os.WriteFile(file, nil, 0o666))
		y.do("chmod", os.Chmod(file, 0o666))
		y.bind(file, "/etc/hosts", false)
	case y.has(UnlistedTmpfs):
		y.mount("tmpfs", "/var/tmp", nosuid|nodev, "mode=1777")
	}
}

// enter makes the container's root the root.
func (y *yard) enter() {
	old := ".old"
	y.dir("/" + old)
	if y.err != nil {
		return
	}
	y.do("pivot_root", syscall.PivotRoot(y.root, y.at(old)))
	y.do("chdir", syscall.Chdir("/"))
	y.do("umount", syscall.Unmount("/"+old, syscall.MNT_DETACH))
	y.do("rmdir", syscall.Rmdir("/"+old))
	y.root = "/"
	if y.has(WritableRoot) {
		y.do("chmod", os.Chmod("/", 0o777))
	} else {
		y.remount("/", rdonly)
	}
}

const (
	prSetNoNewPrivs = 38
	prSetSeccomp    = 22
	prCapAmbient    = 47
	lastCap         = 40
)

func (y *yard) prctl(what string, a ...uintptr) {
	var v [5]uintptr
	copy(v[:], a)
	if _, _, errno := syscall.RawSyscall6(syscall.SYS_PRCTL, v[0], v[1], v[2], v[3], v[4], 0); errno != 0 {
		y.do(what, errno)
	}
}

// caps is the kernel's header and data of capset(2) for 64 capabilities.
type caps struct {
	version, pid uint32
	data         [2]struct{ effective, permitted, inheritable uint32 }
}

func (y *yard) privileges() {
	if y.err != nil {
		return
	}
	if !y.has(NoFilter) {
		allow := []syscall.SockFilter{{Code: syscall.BPF_RET | syscall.BPF_K, K: 0x7fff0000}}
		prog := syscall.SockFprog{Len: 1, Filter: &allow[0]}
		y.prctl("seccomp", prSetSeccomp, 2, uintptr(unsafe.Pointer(&prog)))
	}
	if !y.has(KeptBounding) {
		for c := range uintptr(lastCap + 1) {
			if c == 0 && y.has(KeptAmbient) {
				continue // CAP_CHOWN could not be inherited else
			}
			y.prctl("bounding set", syscall.PR_CAPBSET_DROP, c)
		}
	}
	if y.has(KeptAmbient) {
		y.prctl("keep", syscall.PR_SET_KEEPCAPS, 1)
	}
	if !y.has(RootUser) {
		y.do("setgroups", syscall.Setgroups([]int{User}))
		y.do("setgid", syscall.Setresgid(User, User, User))
		y.do("setuid", syscall.Setresuid(User, User, User))
	}
	c := caps{version: 0x20080522}
	if y.has(KeptAmbient) {
		c.data[0].effective, c.data[0].permitted, c.data[0].inheritable = 1, 1, 1
	}
	if _, _, errno := syscall.RawSyscall(syscall.SYS_CAPSET, uintptr(unsafe.Pointer(&c)), uintptr(unsafe.Pointer(&c.data)), 0); errno != 0 {
		y.do("capset", errno)
	}
	if y.has(KeptAmbient) {
		y.prctl("ambient set", prCapAmbient, 2, 0) // PR_CAP_AMBIENT_RAISE, CAP_CHOWN
	}
	if !y.has(NewPrivileges) {
		y.prctl("no_new_privs", prSetNoNewPrivs, 1)
	}
}

// ifreq is the kernel's request about an interface, with flags or an address.
type ifreq struct {
	name [16]byte
	data [24]byte
}

func request(name string) *ifreq {
	var r ifreq
	copy(r.name[:], name)
	return &r
}

func (r *ifreq) flags(f uint16) *ifreq {
	*(*uint16)(unsafe.Pointer(&r.data)) = f
	return r
}

// inet is a struct sockaddr_in.
func inet(a, b, c, d byte) [16]byte { return [16]byte{syscall.AF_INET, 0, 0, 0, a, b, c, d} }

func (y *yard) ioctl(what string, fd int, call uintptr, arg unsafe.Pointer) {
	if _, _, errno := syscall.Syscall(syscall.SYS_IOCTL, uintptr(fd), call, uintptr(arg)); errno != 0 {
		y.do(what, errno)
	}
}

func (y *yard) network() {
	s, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_DGRAM|syscall.SOCK_CLOEXEC, 0)
	y.do("socket", err)
	if !y.has(NoLoopback) {
		y.ioctl("lo up", s, syscall.SIOCSIFFLAGS, unsafe.Pointer(request("lo").flags(syscall.IFF_UP|syscall.IFF_RUNNING)))
	}
	if !y.has(Interface) && !y.has(DefaultRoute) {
		return
	}
	y.veth("leak0")
	r := request("leak0")
	addr := inet(10, 9, 8, 7)
	copy(r.data[:], addr[:])
	y.ioctl("address", s, syscall.SIOCSIFADDR, unsafe.Pointer(r))
	y.ioctl("leak up", s, syscall.SIOCSIFFLAGS, unsafe.Pointer(request("leak0").flags(syscall.IFF_UP|syscall.IFF_RUNNING)))
	if y.has(DefaultRoute) {
		// struct rtentry: destination, gateway, mask, flags, device.
		var route struct {
			_             uint64
			dst, gw, mask [16]byte
			flags         uint16
			_             [30]byte
			dev           *byte
			_             [24]byte
		}
		route.dst, route.gw, route.mask = inet(0, 0, 0, 0), inet(0, 0, 0, 0), inet(0, 0, 0, 0)
		route.flags = 1 // RTF_UP
		dev := append([]byte("leak0"), 0)
		route.dev = &dev[0]
		y.ioctl("route", s, syscall.SIOCADDRT, unsafe.Pointer(&route))
	}
}

// abstractSocket leaves a process behind that holds one.
func (y *yard) abstractSocket() {
	if y.err != nil || !y.has(AbstractSocket) {
		return
	}
	fd, err := syscall.Socket(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	y.do("socket", err)
	y.do("bind", syscall.Bind(fd, &syscall.SockaddrUnix{Name: "@sealtest"}))
	_, err = syscall.ForkExec("/proc/self/exe", []string{"test", holder}, &syscall.ProcAttr{Files: []uintptr{uintptr(fd)}})
	y.do("holder", err)
}

// veth makes a pair of interfaces, one of them with the given name.
func (y *yard) veth(name string) {
	attr := func(kind uint16, data []byte) []byte {
		b := binary.NativeEndian.AppendUint16(nil, uint16(4+len(data)))
		b = append(binary.NativeEndian.AppendUint16(b, kind), data...)
		return append(b, make([]byte, -len(b)&3)...)
	}
	const ifname, linkinfo, infoKind = 3, 18, 1
	body := make([]byte, 16) // struct ifinfomsg
	body = append(body, attr(ifname, []byte(name+"\x00"))...)
	body = append(body, attr(linkinfo, attr(infoKind, []byte("veth")))...)
	msg := binary.NativeEndian.AppendUint32(nil, uint32(syscall.NLMSG_HDRLEN+len(body)))
	msg = binary.NativeEndian.AppendUint16(msg, syscall.RTM_NEWLINK)
	msg = binary.NativeEndian.AppendUint16(msg, syscall.NLM_F_REQUEST|syscall.NLM_F_ACK|syscall.NLM_F_CREATE|syscall.NLM_F_EXCL)
	msg = append(append(msg, make([]byte, 8)...), body...)

	s, err := syscall.Socket(syscall.AF_NETLINK, syscall.SOCK_RAW|syscall.SOCK_CLOEXEC, 0)
	y.do("netlink", err)
	y.do("netlink", syscall.Sendto(s, msg, 0, &syscall.SockaddrNetlink{Family: syscall.AF_NETLINK}))
	var answer [4096]byte
	n, err := syscall.Read(s, answer[:])
	y.do("netlink", err)
	if y.err == nil && n >= syscall.NLMSG_HDRLEN+4 {
		if code := int32(binary.NativeEndian.Uint32(answer[syscall.NLMSG_HDRLEN:])); code != 0 {
			y.do("make veth", syscall.Errno(-code))
		}
	}
}
