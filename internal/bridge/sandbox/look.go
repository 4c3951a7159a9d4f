package sandbox

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// maxEntries bounds the files that are looked at in mounted directories. A
// model of a thousand shards is far below.
const maxEntries = 1 << 16

// eye collects facts and the reasons why some are missing.
type eye struct {
	facts
	entries int  // looked at so far
	running bool // the engine is
}

func look(o Order, running bool) facts {
	e := &eye{running: running, facts: facts{
		PID:        os.Getpid(),
		Writes:     make(map[string]string),
		ReadOnly:   make(map[string]bool),
		Writable:   make(map[int][]string),
		Namespaces: make(map[string]string),
	}}
	e.descriptors() // first, while all that is open was handed over
	e.process()
	e.processes()
	e.network()
	e.confined(o)
	e.try("/")
	for _, p := range o.ReadOnly {
		e.try(p)
	}
	e.shields()
	e.mounts(o)
	e.devices()
	e.surroundings()
	return e.facts
}

// problem notes what could not be found out. Errors of the kernel's files hold
// no content of the container's.
func (e *eye) problem(err error) {
	if err != nil {
		e.Problems = append(e.Problems, err.Error())
	}
}

func (e *eye) read(path string) string {
	b, err := os.ReadFile(path)
	e.problem(err)
	return string(b)
}

// descriptors finds those that exec handed over. What this program opened
// itself has close-on-exec set, and nothing that has it can come over exec.
func (e *eye) descriptors() {
	entries, err := os.ReadDir("/proc/self/fd")
	e.problem(err)
	for _, d := range entries {
		fd, err := strconv.Atoi(d.Name())
		if err != nil || fd <= 2 {
			continue
		}
		flags, _, errno := syscall.Syscall(syscall.SYS_FCNTL, uintptr(fd), syscall.F_GETFD, 0)
		if errno == 0 && flags&syscall.FD_CLOEXEC == 0 {
			target, _ := os.Readlink("/proc/self/fd/" + d.Name())
			e.Inherited = append(e.Inherited, fmt.Sprintf("%d (%s)", fd, target))
		}
	}
}

func (e *eye) process() {
	var err error
	e.Status, err = parseStatus(e.read("/proc/self/status"))
	e.problem(err)
	e.UIDMap, err = parseIDMap(e.read("/proc/self/uid_map"))
	e.problem(err)
	e.GIDMap, err = parseIDMap(e.read("/proc/self/gid_map"))
	e.problem(err)
	e.Cgroup = parseCgroup(e.read("/proc/self/cgroup"))
}

// Patience with processes: one that joins a container is confined last.
const (
	joinTries = 5
	joinPause = 100 * time.Millisecond
)

// processes looks at all that there are in the container.
func (e *eye) processes() {
	for try := 1; ; try++ {
		bad, err := e.unconfined()
		if err != nil || len(bad) == 0 || try == joinTries {
			e.problem(err)
			e.Processes = bad
			return
		}
		time.Sleep(joinPause)
	}
}

// unconfined lists the processes that are not as this one must be.
func (e *eye) unconfined() (bad []string, err error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	for _, d := range entries {
		if pid, err := strconv.Atoi(d.Name()); err != nil || pid == e.PID { // which has checks of its own
			continue
		}
		b, err := os.ReadFile("/proc/" + d.Name() + "/status")
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ESRCH) {
			continue // it has ended
		}
		if err != nil {
			return nil, err
		}
		s, err := parseStatus(string(b))
		if err != nil {
			return nil, err
		}
		if why := s.unconfined(e.Status); why != "" {
			bad = append(bad, "process "+d.Name()+": "+why)
		}
	}
	return bad, nil
}

func (e *eye) network() {
	links, err := net.Interfaces()
	e.problem(err)
	for _, l := range links {
		addrs, err := l.Addrs()
		e.problem(err)
		k := link{Name: l.Name, Up: l.Flags&net.FlagUp != 0, Loopback: l.Flags&net.FlagLoopback != 0}
		for _, a := range addrs {
			k.Addresses = append(k.Addresses, a.String())
		}
		e.Interfaces = append(e.Interfaces, k)
	}
	e.Routes = parseRoutes(e.read("/proc/self/net/route"))
	if b, err := os.ReadFile("/proc/self/net/ipv6_route"); err == nil {
		e.Routes = append(e.Routes, parseRoutes6(string(b))...)
	} else if !errors.Is(err, fs.ErrNotExist) { // a kernel without IPv6 has none
		e.problem(err)
	}
	if !e.running { // the engine's own are no way out of the namespace
		e.Sockets = append(e.Sockets, parseUnix(e.read("/proc/self/net/unix"))...)
	}
	// Connecting a datagram socket asks for the route and sends nothing. The
	// addresses are the ones kept for documentation.
	for _, to := range []string{"192.0.2.1:9", "[2001:db8::1]:9"} {
		if c, err := net.Dial("udp", to); err == nil {
			c.Close()
			e.Reachable = append(e.Reachable, to)
		}
	}
}

// confined tries, confined as the engine will be, to make a socket of each
// other kind, the system calls that are refused, and a file beside the socket.
func (e *eye) confined(o Order) {
	var err error
	e.Landlock, err = Confine(o, func() {
		e.Calls = passing()
		e.Engine = name(tryWrite(o.SocketDir))
		for family := range lastFamily + 1 {
			if knownFamily(uint32(family)) {
				continue
			}
			for _, kind := range []int{syscall.SOCK_STREAM, syscall.SOCK_DGRAM, syscall.SOCK_RAW, syscall.SOCK_SEQPACKET} {
				if fd, err := syscall.Socket(family, kind, 0); err == nil {
					syscall.Close(fd)
					e.Families = append(e.Families, strconv.Itoa(family))
					break
				}
			}
		}
		// One that the kernel is sure to have stands for the other protocols.
		if fd, err := syscall.Socket(syscall.AF_NETLINK, syscall.SOCK_RAW, syscall.NETLINK_KOBJECT_UEVENT); err == nil {
			syscall.Close(fd)
			e.Families = append(e.Families, "netlink beside routes")
		}
	})
	e.problem(err)
}

func knownFamily(number uint32) bool {
	return slices.ContainsFunc(families, func(f family) bool { return f.number == number })
}

// lastFamily is above the highest AF_ number of today's kernels.
const lastFamily = 63

// try finds out whether something could be written at path.
func (e *eye) try(path string) {
	var st syscall.Statfs_t
	if err := syscall.Statfs(path, &st); err != nil {
		e.Writes[path] = name(err)
		return
	}
	e.ReadOnly[path] = st.Flags&stReadOnly != 0
	e.Writes[path] = name(tryWrite(path))
}

// tryWrite tries to make a file in a directory, which is removed again, or to
// open the file itself, which is not changed.
func tryWrite(path string) error {
	target, flags := path, os.O_WRONLY
	if info, err := os.Stat(path); err == nil && info.IsDir() {
		target, flags = filepath.Join(path, ".resultity-bridge-try"), os.O_WRONLY|os.O_CREATE|os.O_EXCL
	}
	f, err := os.OpenFile(target, flags, 0o600)
	if err == nil {
		f.Close()
		if target != path {
			os.Remove(target)
		}
	}
	return err
}

// stReadOnly is ST_RDONLY of statfs(2): the mount or its file system is.
const stReadOnly = 1

// name is an error's symbol where the judge knows it, else its text.
func name(err error) string {
	switch {
	case err == nil:
		return "possible"
	case errors.Is(err, syscall.EROFS):
		return "EROFS"
	case errors.Is(err, syscall.EACCES):
		return "EACCES"
	case errors.Is(err, fs.ErrNotExist):
		return "missing"
	}
	return err.Error()
}

// Magic numbers of statfs(2).
const (
	procMagic  = 0x9fa0
	sysfsMagic = 0x62656572
)

// shields looks at the kernel's interfaces through statfs, which tells about
// the mount that a path really leads to, whatever is mounted over what.
func (e *eye) shields() {
	for _, p := range slices.Concat(masked, readOnly) {
		var st syscall.Statfs_t
		switch err := syscall.Statfs(p, &st); {
		case errors.Is(err, fs.ErrNotExist):
		case err != nil:
			e.problem(fmt.Errorf("%s: %w", p, err))
		default:
			e.Shields = append(e.Shields, shield{
				Path:     p,
				Masked:   st.Type != procMagic && st.Type != sysfsMagic && slices.Contains(masked, p),
				ReadOnly: st.Flags&stReadOnly != 0,
			})
		}
	}
}

func (e *eye) mounts(o Order) {
	var err error
	e.Mounts, err = parseMounts(e.read("/proc/self/mountinfo"))
	e.problem(err)
	var points []string
	for _, m := range e.Mounts {
		points = append(points, m.Point)
	}
	for _, m := range e.Mounts {
		if m.Point == "/" || kernel[m.Type] || e.running && o.allows(m.Point) {
			continue // the root has its own check, kernel interfaces too; what the engine makes is its own
		}
		e.walk(m, points, o.allows(m.Point))
	}
}

// walk looks for what this user could write below a mount that should not be
// written, and for sockets and pipes, which a read-only mount does not keep
// anybody from talking to. It leaves other mounts below to their own turn.
func (e *eye) walk(m mount, points []string, allowed bool) {
	search := !allowed && !m.ReadOnly
	err := filepath.WalkDir(m.Point, func(p string, d fs.DirEntry, err error) error {
		if e.entries++; e.entries > maxEntries {
			return fmt.Errorf("%s: more than %d files in mounted directories", m.Point, maxEntries)
		}
		switch {
		case err != nil && d != nil && d.IsDir() && errors.Is(err, fs.ErrPermission):
			// Not readable, but files below could still be opened by name.
			if search && syscall.Access(p, accessExec) == nil {
				e.Writable[m.ID] = append(e.Writable[m.ID], p+" (cannot be listed)")
			}
			return fs.SkipDir
		case errors.Is(err, fs.ErrNotExist):
			return nil // gone while looking, or hidden by a later mount
		case err != nil && d == nil && errors.Is(err, fs.ErrPermission):
			return nil // the mount point itself is out of this user's reach
		case err != nil:
			return err
		case p != m.Point && slices.Contains(points, p):
			if d.IsDir() {
				return fs.SkipDir
			}
			return nil
		}
		switch t := d.Type(); {
		case t.IsDir():
			if search && syscall.Access(p, accessWrite|accessExec) == nil {
				e.Writable[m.ID] = append(e.Writable[m.ID], p)
			}
		case t.IsRegular():
			if search && syscall.Access(p, accessWrite) == nil {
				e.Writable[m.ID] = append(e.Writable[m.ID], p)
			}
		case t&(fs.ModeSocket|fs.ModeNamedPipe) != 0:
			e.Sockets = append(e.Sockets, p)
		case t&fs.ModeDevice != 0:
			e.device(p)
		}
		return nil
	})
	e.problem(err)
}

// Modes of access(2).
const (
	accessExec  = 1
	accessWrite = 2
)

// devices looks at the nodes in the file systems that walk leaves out.
func (e *eye) devices() {
	for _, m := range e.Mounts {
		if m.Type != "devpts" {
			continue
		}
		entries, err := os.ReadDir(m.Point)
		e.problem(err)
		for _, d := range entries {
			if d.Type()&fs.ModeDevice != 0 {
				e.device(filepath.Join(m.Point, d.Name()))
			}
		}
	}
}

func (e *eye) device(path string) {
	var st syscall.Stat_t
	if err := syscall.Lstat(path, &st); err != nil {
		e.problem(fmt.Errorf("%s: %w", path, err))
		return
	}
	// The kernel's encoding of device numbers in 64 bits.
	rdev := uint64(st.Rdev)
	d := device{
		Path:  path,
		Major: uint32(rdev>>8&0xfff | rdev>>32&^0xfff),
		Minor: uint32(rdev&0xff | rdev>>12&^0xff),
	}
	if !e.running || !terminal(d) {
		e.Devices = append(e.Devices, d)
	}
}

// terminal reports whether a node is one half of a pair that a program has
// opened.
func terminal(d device) bool {
	return d.Major >= 136 && d.Major <= 143 && filepath.Dir(d.Path) == "/dev/pts"
}

func (e *eye) surroundings() {
	var buf [4096]byte
	if n, err := syscall.Getcwd(buf[:]); err != nil {
		e.problem(fmt.Errorf("working directory: %w", err))
	} else {
		e.WorkDir = string(buf[:n-1])
	}
	for _, v := range os.Environ() {
		key, _, _ := strings.Cut(v, "=")
		if strings.HasSuffix(strings.ToLower(key), "_proxy") && key != "" {
			e.Proxies = append(e.Proxies, key)
		}
	}
	for _, ns := range []string{"cgroup", "ipc", "mnt", "net", "pid", "user", "uts"} {
		target, err := os.Readlink("/proc/self/ns/" + ns)
		e.problem(err)
		e.Namespaces[ns] = target
	}
	// Without a security module that labels processes this cannot be read.
	if b, err := os.ReadFile("/proc/self/attr/current"); err == nil {
		e.Label = strings.TrimRight(string(b), "\x00\n")
	}
}
