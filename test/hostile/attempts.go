package hostile

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Where is what an engine cannot know by itself of where it is.
type Where struct {
	TCP      []string // addresses that processes outside of the container reach
	Abstract []string // names of abstract sockets of the host, without the first byte
	Files    []string // files and sockets of the host
	Unit     bool     // the container is the rendered unit's, with its bounds
}

// Row is what came of an attempt.
type Row struct {
	Name string `json:"name"`
	Want string `json:"want"`
	Got  string `json:"got"`
	OK   bool   `json:"ok"`
}

// attempt is something that an engine may not do, or not without a bound.
type attempt struct {
	name string
	want []string // answers that are fine
	do   func(Where) answers
	unit bool // only where the container is the unit's
}

// answers are what was answered, and for what.
type answers map[string][]string

// worked is the answer where nothing refused.
const worked = "WORKED"

func (a answers) add(answer, to string) { a[answer] = append(a[answer], to) }

func one(answer string) answers { return answers{answer: nil} }

// answer names an error as the kernel does.
func answer(err error) string {
	var errno syscall.Errno
	var dns *net.DNSError
	switch {
	case err == nil:
		return worked
	case errors.As(err, &errno) && unix.ErrnoName(errno) != "":
		return unix.ErrnoName(errno)
	case errors.As(err, &dns):
		return "no such host"
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, os.ErrDeadlineExceeded):
		return "silence"
	}
	return err.Error()
}

func each(list []string, f func(string) error) answers {
	a := answers{}
	for _, s := range list {
		a.add(answer(f(s)), s)
	}
	return a
}

func these(tries map[string]error) answers {
	a := answers{}
	for name, err := range tries {
		a.add(answer(err), name)
	}
	return a
}

func single(f func() error) func(Where) answers {
	return func(Where) answers { return one(answer(f())) }
}

// row judges.
func (t *attempt) row(a answers) Row {
	r := Row{Name: t.name, Want: strings.Join(t.want, " or "), OK: true}
	var got []string
	for _, k := range slices.Sorted(maps.Keys(a)) {
		of := a[k]
		fine := slices.Contains(t.want, k)
		r.OK = r.OK && fine
		switch {
		case len(of) > 1 && fine:
			k = fmt.Sprintf("%s (%d times)", k, len(of))
		case !fine && len(of) > 8:
			k = fmt.Sprintf("%s (%s and %d more)", k, strings.Join(of[:8], ", "), len(of)-8)
		case !fine && len(of) > 0:
			k = fmt.Sprintf("%s (%s)", k, strings.Join(of, ", "))
		}
		got = append(got, k)
	}
	r.Got = cmp.Or(strings.Join(got, ", "), "nothing to try")
	return r
}

// attempts are all of them, in their order.
func attempts() []attempt { return slices.Concat(network, processes, kernel, files, bounds) }

// Try makes all attempts, and tells of each. It takes a few seconds.
func Try(w Where, tell func(Row)) {
	for _, t := range attempts() {
		if t.unit && !w.Unit {
			continue
		}
		a := func() (a answers) {
			defer func() {
				if p := recover(); p != nil {
					a = one(fmt.Sprint("panic: ", p))
				}
			}()
			return t.do(w)
		}()
		tell(t.row(a))
	}
}

// Names are those of all attempts, in their order.
func Names() (names []string) {
	for _, t := range attempts() {
		names = append(names, t.name)
	}
	return names
}

var (
	refused  = []string{"EPERM", "EACCES"}
	readOnly = []string{"EROFS", "EACCES"}
	absent   = []string{"ENOENT"}
	noFamily = []string{"EAFNOSUPPORT"}
	noProto  = []string{"EPROTONOSUPPORT"}
	noWay    = []string{"ENETUNREACH", "EHOSTUNREACH", "ECONNREFUSED", "EADDRNOTAVAIL"}
)

const (
	bridge = 1 // its process id, in the container

	socketDir    = "/run/resultity"
	socket       = socketDir + "/engine.sock"
	notifyDir    = "/run/notify"
	notifySocket = notifyDir + "/notify.sock"
)

// Ways out over sockets.
var network = []attempt{
	{name: "sockets of all other families", want: noFamily, do: func(Where) answers {
		a := answers{}
		for family := range 256 {
			switch family {
			case unix.AF_UNIX, unix.AF_INET, unix.AF_INET6, unix.AF_NETLINK:
				continue
			}
			for _, kind := range []int{unix.SOCK_STREAM, unix.SOCK_DGRAM, unix.SOCK_RAW, unix.SOCK_RDM, unix.SOCK_SEQPACKET, unix.SOCK_DCCP, unix.SOCK_PACKET} {
				a.add(answer(open(family, kind, 0)), fmt.Sprint("family ", family))
			}
			_, err := unix.Socketpair(family, unix.SOCK_STREAM, 0)
			a.add(answer(err), fmt.Sprint("pair of family ", family))
		}
		return a
	}},
	{name: "internet sockets of other protocols than TCP and UDP", want: noProto, do: func(Where) answers {
		a := answers{}
		for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
			for protocol := 1; protocol < 300; protocol++ {
				if protocol == unix.IPPROTO_TCP || protocol == unix.IPPROTO_UDP {
					continue
				}
				for _, kind := range []int{unix.SOCK_STREAM, unix.SOCK_DGRAM, unix.SOCK_RAW, unix.SOCK_SEQPACKET} {
					a.add(answer(open(family, kind, protocol)), fmt.Sprint("protocol ", protocol))
				}
			}
		}
		return a
	}},
	{name: "raw internet sockets, and packets by their old name", want: append(noProto, refused...), do: func(Where) answers {
		a := answers{}
		a.add(answer(open(unix.AF_INET, unix.SOCK_RAW, unix.IPPROTO_UDP)), "raw")
		a.add(answer(open(unix.AF_INET, unix.SOCK_PACKET, 0)), "packet")
		a.add(answer(open(unix.AF_INET, unix.SOCK_PACKET, 0x0300)), "all packets")
		return a
	}},
	{name: "netlink but for routes", want: noProto, do: func(Where) answers {
		a := answers{}
		for protocol := 1; protocol < 40; protocol++ {
			a.add(answer(open(unix.AF_NETLINK, unix.SOCK_RAW, protocol)), fmt.Sprint("protocol ", protocol))
		}
		return a
	}},
	{name: "a new interface by netlink", want: refused, do: single(newLink)},
	{name: "servers outside by TCP", want: noWay, do: func(w Where) answers {
		return each(w.TCP, func(to string) error { return dial("tcp", to, "x") })
	}},
	{name: "servers outside by UDP", want: noWay, do: func(w Where) answers {
		return each(w.TCP, func(to string) error { return dial("udp", to, "x") })
	}},
	{name: "the world by TCP and UDP", want: noWay, do: func(Where) answers {
		a := answers{}
		for _, to := range []string{"192.0.2.1:443", "[2001:db8::1]:443", "169.254.169.254:80", "224.0.0.251:5353", "255.255.255.255:67"} {
			a.add(answer(dial("tcp", to, "x")), "tcp "+to)
			if !strings.HasPrefix(to, "255") { // may not be sent to without asking
				a.add(answer(dial("udp", to, "x")), "udp "+to)
			}
		}
		return a
	}},
	{name: "a name looked up", want: []string{"no such host"}, do: single(func() error {
		ctx, cancel := context.WithTimeout(context.Background(), 3*time.Second)
		defer cancel()
		_, err := (&net.Resolver{PreferGo: true}).LookupHost(ctx, "example.com")
		return err
	})},
	{name: "abstract sockets of the host", want: []string{"ECONNREFUSED"}, do: func(w Where) answers {
		return each(w.Abstract, func(name string) error { return dial("unix", "@"+name, "x") })
	}},
	{name: "abstract sockets of anybody", want: []string{"none"}, do: func(Where) answers {
		raw, err := os.ReadFile("/proc/self/net/unix")
		if err != nil {
			return one(answer(err))
		}
		a := answers{}
		for line := range strings.Lines(string(raw)) {
			if f := strings.Fields(line); len(f) == 8 && strings.HasPrefix(f[7], "@") {
				a.add(worked, f[7])
			}
		}
		if len(a) == 0 {
			return one("none")
		}
		return a
	}},
	{name: "systemd's notify socket: that a hung engine is alive", want: absent, do: single(func() error { return dial("unixgram", notifySocket, "WATCHDOG=1") })},
	{name: "systemd's notify socket: nothing, which ends its relay", want: absent, do: single(func() error { return dial("unixgram", notifySocket, "") })},
	{name: "the agent's socket from inside", want: append(absent, "EOF", "EPIPE", "ECONNRESET"), do: single(func() error { return dial("unix", socket, "GET /health HTTP/1.1\r\nHost: x\r\n\r\n") })},
}

// Ways into other processes.
var processes = []attempt{
	{name: "processes of others", want: []string{"none"}, do: func(Where) answers {
		dirs, err := filepath.Glob("/proc/[0-9]*")
		if err != nil {
			return one(answer(err))
		}
		a, own := answers{}, ownedBy("self")
		for _, d := range dirs {
			if pid := filepath.Base(d); pid != "1" && ownedBy(pid) != own {
				a.add("seen", pid)
			}
		}
		if len(a) == 0 {
			return one("none")
		}
		return a
	}},
	{name: "the bridge's files, memory and descriptors", want: refused, do: func(Where) answers {
		return each([]string{"root/", "root/etc/shadow", "cwd/", "mem", "environ", "maps", "fd/0", "fd/1", "io", "stack", "syscall", "pagemap", "ns/net", "ns/user", "exe"}, func(name string) error {
			f, err := os.Open("/proc/1/" + name)
			if err == nil {
				_, err = f.Readdirnames(1)
				if errors.Is(err, syscall.ENOTDIR) {
					_, err = f.Read(make([]byte, 1))
				}
				f.Close()
			}
			return err
		})
	}},
	{name: "the bridge's memory written", want: readOnly, do: single(func() error { return touch("/proc/1/mem") })},
	{name: "the bridge's score for the out-of-memory killer", want: readOnly, do: single(func() error { return os.WriteFile("/proc/1/oom_score_adj", []byte("1000"), 0) })},
	{name: "trace the bridge", want: refused, do: func(Where) answers {
		a := answers{}
		for name, request := range map[string]int{"attach": unix.PTRACE_ATTACH, "seize": unix.PTRACE_SEIZE, "traceme": unix.PTRACE_TRACEME} {
			a.add(answer(call(unix.SYS_PTRACE, uintptr(request), bridge, 0, 0)), name)
		}
		return a
	}},
	{name: "read and write the bridge's memory", want: refused, do: func(Where) answers {
		b := make([]byte, 8)
		here, there := []unix.Iovec{{Base: &b[0], Len: 8}}, []unix.RemoteIovec{{Base: 0x400000, Len: 8}}
		_, read := unix.ProcessVMReadv(bridge, here, there, 0)
		_, write := unix.ProcessVMWritev(bridge, here, there, 0)
		return these(map[string]error{"read": read, "write": write})
	}},
	{name: "take the bridge's descriptors, compare with it", want: refused, do: func(Where) answers {
		a := answers{}
		fd, err := unix.PidfdOpen(bridge, 0)
		if err == nil {
			_, err = unix.PidfdGetfd(fd, 1, 0)
		}
		a.add(answer(err), "pidfd_getfd")
		a.add(answer(call(unix.SYS_KCMP, uintptr(os.Getpid()), bridge, 0, 0, 0)), "kcmp")
		return a
	}},
	{name: "signal the bridge", want: refused, do: func(Where) answers {
		a := answers{}
		for _, s := range []syscall.Signal{0, syscall.SIGTERM, syscall.SIGSTOP, syscall.SIGKILL, syscall.SIGQUIT} {
			a.add(answer(syscall.Kill(bridge, s)), "kill "+strconv.Itoa(int(s)))
			a.add(answer(unix.Tgkill(bridge, bridge, s)), "tgkill "+strconv.Itoa(int(s)))
		}
		if fd, err := unix.PidfdOpen(bridge, 0); err == nil {
			a.add(answer(unix.PidfdSendSignal(fd, unix.SIGTERM, nil, 0)), "pidfd")
		}
		return a
	}},
	{name: "the bridge's limits", want: refused, do: func(Where) answers {
		a := answers{}
		for _, resource := range []int{unix.RLIMIT_NOFILE, unix.RLIMIT_CPU, unix.RLIMIT_AS, unix.RLIMIT_FSIZE} {
			a.add(answer(unix.Prlimit(bridge, resource, nil, new(unix.Rlimit))), strconv.Itoa(resource))
		}
		return a
	}},
	{name: "new namespaces, each kind", want: refused, do: func(Where) answers {
		a := answers{}
		for name, flag := range namespaces {
			a.add(answer(call(unix.SYS_UNSHARE, uintptr(flag))), "unshare "+name)
			if flag == unix.CLONE_NEWTIME {
				continue // clone has the signal's number there
			}
			p, err := os.StartProcess("/proc/self/exe", []string{"engine", child, "nothing"}, &os.ProcAttr{Sys: &syscall.SysProcAttr{Cloneflags: uintptr(flag)}})
			if err == nil {
				p.Wait()
			}
			a.add(answer(err), "clone "+name)
		}
		return a
	}},
	{name: "clone3, whose flags no filter sees", want: []string{"ENOSYS"}, do: single(func() error {
		args := struct{ flags, pidfd, childTID, parentTID, exitSignal, stack, stackSize, tls, setTID, setTIDSize, cgroup uint64 }{flags: unix.CLONE_NEWUSER, exitSignal: uint64(unix.SIGCHLD)}
		return call(unix.SYS_CLONE3, uintptr(unsafe.Pointer(&args)), 1) // a size that no kernel takes
	})},
	{name: "the bridge's namespaces entered", want: refused, do: func(Where) answers {
		a := answers{}
		for name := range namespaces {
			fd, err := unix.Open("/proc/1/ns/"+name, unix.O_RDONLY|unix.O_CLOEXEC, 0)
			a.add(answer(err), name)
			if err == nil {
				unix.Close(fd)
			}
			// Its own, which it can open.
			fd, err = unix.Open("/proc/self/ns/"+name, unix.O_RDONLY|unix.O_CLOEXEC, 0)
			if err == nil {
				err = unix.Setns(fd, 0)
				unix.Close(fd)
			}
			a.add(answer(err), "own "+name)
		}
		return a
	}},
	{name: "become another user, with other groups", want: []string{"EPERM", "EINVAL"}, do: func(Where) answers {
		gid := uint32(0)
		return these(map[string]error{
			"setuid":    call(unix.SYS_SETUID, 0),
			"setgid":    call(unix.SYS_SETGID, 0),
			"setresuid": call(unix.SYS_SETRESUID, 0, 0, 0),
			"setreuid":  call(unix.SYS_SETREUID, 65534, 65534),
			"setgroups": call(unix.SYS_SETGROUPS, 1, uintptr(unsafe.Pointer(&gid))),
		})
	}},
	{name: "capabilities", want: []string{"EPERM"}, do: single(func() error {
		header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		data := [2]unix.CapUserData{{Effective: ^uint32(0), Permitted: ^uint32(0), Inheritable: ^uint32(0)}}
		return unix.Capset(&header, &data[0])
	})},
}
