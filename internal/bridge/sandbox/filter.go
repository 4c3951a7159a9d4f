package sandbox

import (
	"fmt"
	"runtime"
	"syscall"
	"unsafe"
)

// families are the kinds of sockets that a network namespace holds, and those
// protocols of each that an engine has a use for. A user may have the kernel load
// the modules of others (SCTP, DCCP), and netlink leads to many parts of the kernel
// beside the routes that the C library looks at.
var families = []family{
	{syscall.AF_UNIX, []uint32{0, syscall.AF_UNIX}},
	{syscall.AF_INET, internet}, {syscall.AF_INET6, internet},
	{syscall.AF_NETLINK, []uint32{syscall.NETLINK_ROUTE}},
}

var internet = []uint32{0, syscall.IPPROTO_TCP, syscall.IPPROTO_UDP}

type family struct {
	number    uint32
	protocols []uint32
}

// native is the kernel's name for an architecture's own system calls. The table
// of calls below has a column for each.
var native = map[string]uint32{
	"amd64": 0xc000003e,
	"arm64": 0xc00000b7,
}

// A call is a system call and its numbers.
type call struct {
	name         string
	amd64, arm64 uint32
}

// absent is the number of a call that an architecture does not have.
const absent = ^uint32(0)

// number returns the call's on an architecture.
func (c call) number(goarch string) uint32 {
	if goarch == "arm64" {
		return c.arm64
	}
	return c.amd64
}

// Calls of which some are fine.
var (
	prlimitCall    = call{"prlimit64", 302, 261}
	socketCall     = call{"socket", 41, 198}
	socketpairCall = call{"socketpair", 53, 199}
	cloneCall      = call{"clone", 56, 220}
	unshareCall    = call{"unshare", 272, 97}
)

// unknown are the calls that the engine is told its kernel does not have, for it
// has another way then: clone3 and io_uring keep what they do in memory, where a
// filter cannot look. Threads are made with clone instead.
var unknown = []call{
	{"clone3", 435, 435},
	{"io_uring_setup", 425, 425}, {"io_uring_enter", 426, 426}, {"io_uring_register", 427, 427},
}

// refused are the calls that no engine needs and that have opened, or would
// open, a way out of many containers. Most need a capability: with user
// namespaces refused, the engine could not even get one that counts in there.
//
// Not among them, since engines use them: memory policies and locked memory,
// scheduling, and pidfd_getfd, by which PyTorch shares a GPU's memory between its
// processes. The bridge is protected from that by not being dumpable.
var refused = []call{
	// Namespaces, beside clone and unshare.
	{"setns", 308, 268},
	// What is mounted.
	{"mount", 165, 40}, {"umount2", 166, 39}, {"pivot_root", 155, 41}, {"chroot", 161, 51},
	{"open_tree", 428, 428}, {"move_mount", 429, 429}, {"fsopen", 430, 430}, {"fsconfig", 431, 431},
	{"fsmount", 432, 432}, {"fspick", 433, 433}, {"mount_setattr", 442, 442}, {"open_tree_attr", 467, 467},
	{"swapon", 167, 224}, {"swapoff", 168, 225}, {"quotactl", 179, 60}, {"quotactl_fd", 443, 443},
	// Files and processes by other names than those that a namespace has.
	{"open_by_handle_at", 304, 265}, {"name_to_handle_at", 303, 264}, {"ptrace", 101, 117}, {"kcmp", 312, 272},
	{"process_vm_readv", 310, 270}, {"process_vm_writev", 311, 271}, {"process_madvise", 440, 440},
	// The kernel's keys are not in any namespace.
	{"add_key", 248, 217}, {"request_key", 249, 218}, {"keyctl", 250, 219},
	// Ways into the kernel.
	{"bpf", 321, 280}, {"perf_event_open", 298, 241}, {"userfaultfd", 323, 282}, {"fanotify_init", 300, 262},
	{"init_module", 175, 105}, {"finit_module", 313, 273}, {"delete_module", 176, 106},
	{"kexec_load", 246, 104}, {"kexec_file_load", 320, 294}, {"modify_ldt", 154, absent},
	{"iopl", 172, absent}, {"ioperm", 173, absent},
	// The machine.
	{"reboot", 169, 142}, {"syslog", 103, 116}, {"acct", 163, 89}, {"vhangup", 153, 58},
	{"settimeofday", 164, 170}, {"clock_settime", 227, 112}, {"clock_adjtime", 305, 266}, {"adjtimex", 159, 171},
	{"sethostname", 170, 161}, {"setdomainname", 171, 162},
}

// newNamespaces are the flags of clone and unshare that make a namespace. That
// of time (0x80) is for unshare alone; clone has the signal's number there.
const (
	newNamespaces = syscall.CLONE_NEWNS | 0x02000000 /* cgroup */ | syscall.CLONE_NEWUTS | syscall.CLONE_NEWIPC |
		syscall.CLONE_NEWUSER | syscall.CLONE_NEWPID | syscall.CLONE_NEWNET
	newTime = 0x80
)

// Names that the syscall package does not have.
const (
	prSetSeccomp      = 22
	seccompModeFilter = 2
	seccompAllow      = 0x7fff0000
	seccompErrno      = 0x00050000
	x32               = 0x40000000 // a second set of numbers on amd64
)

// filterCalls installs the filter on the calling thread. It needs no privilege
// where no_new_privs is set.
func filterCalls() error {
	prog, err := filter(runtime.GOARCH)
	if err != nil {
		return err
	}
	fprog := syscall.SockFprog{Len: uint16(len(prog)), Filter: &prog[0]}
	_, _, errno := syscall.RawSyscall(syscall.SYS_PRCTL, prSetSeccomp, seccompModeFilter, uintptr(unsafe.Pointer(&fprog)))
	runtime.KeepAlive(prog)
	if errno != 0 {
		return fmt.Errorf("system call filter: %w", errno)
	}
	return nil
}

// program is what the kernel runs at each system call. It reads seccomp_data:
// the number at 0, the architecture at 4, and from 16 on the arguments, of which
// the low half comes first on both (little-endian) architectures.
type program []syscall.SockFilter

// argument is where the low half of the n-th argument is.
func argument(n uint32) uint32 { return 16 + 8*n }

func load(at uint32) syscall.SockFilter {
	return syscall.SockFilter{Code: syscall.BPF_LD | syscall.BPF_W | syscall.BPF_ABS, K: at}
}

func answer(k uint32) syscall.SockFilter {
	return syscall.SockFilter{Code: syscall.BPF_RET | syscall.BPF_K, K: k}
}

func fail(e syscall.Errno) syscall.SockFilter { return answer(seccompErrno | uint32(e)) }

// on adds a test of what was loaded last. Then runs where it holds and must end
// with an answer.
func (p *program) on(test uint16, k uint32, then ...syscall.SockFilter) {
	*p = append(*p, syscall.SockFilter{Code: syscall.BPF_JMP | test | syscall.BPF_K, K: k, Jf: uint8(len(then))})
	*p = append(*p, then...)
}

// filter returns the program for an architecture. Calls that are not the
// architecture's own are unknown.
func filter(goarch string) (program, error) {
	arch, ok := native[goarch]
	if !ok {
		return nil, fmt.Errorf("system call filter: not written for %s", goarch)
	}
	const equal, above, hasAny = syscall.BPF_JEQ, syscall.BPF_JGE, syscall.BPF_JSET
	p := program{
		load(4),
		{Code: syscall.BPF_JMP | equal | syscall.BPF_K, K: arch, Jt: 1},
		fail(syscall.ENOSYS),
		load(0),
	}
	p.on(above, x32, fail(syscall.ENOSYS))
	for _, c := range unknown {
		p.on(equal, c.number(goarch), fail(syscall.ENOSYS))
	}
	for _, c := range refused {
		if n := c.number(goarch); n != absent {
			p.on(equal, n, fail(syscall.EPERM))
		}
	}
	without := func(flags uint32) program {
		then := program{load(argument(0))}
		then.on(hasAny, flags, fail(syscall.EPERM))
		return append(then, answer(seccompAllow))
	}
	p.on(equal, cloneCall.number(goarch), without(newNamespaces)...)
	p.on(equal, unshareCall.number(goarch), without(newNamespaces|newTime)...)
	// A limit of the bridge's would be the engine's to set, as they have one user.
	own := program{load(argument(0))}
	own.on(equal, 0, answer(seccompAllow))
	p.on(equal, prlimitCall.number(goarch), append(own, fail(syscall.EPERM))...)
	then := program{load(argument(0))}
	for _, f := range families {
		protocol := program{load(argument(2))}
		for _, n := range f.protocols {
			protocol.on(equal, n, answer(seccompAllow))
		}
		then.on(equal, f.number, append(protocol, fail(syscall.EPROTONOSUPPORT))...)
	}
	then = append(then, fail(syscall.EAFNOSUPPORT))
	for _, c := range []call{socketCall, socketpairCall} {
		p.on(equal, c.number(goarch), then...)
	}
	return append(p, answer(seccompAllow)), nil
}

// passing tries each call that should not be there and names those that were
// not refused. What it asks for is nothing that any kernel would do, also where
// the call gets through. It must run on a confined thread.
func passing() []string {
	var names []string
	try := func(c call, want syscall.Errno, first uintptr) {
		const none = ^uintptr(0)
		n := c.number(runtime.GOARCH)
		if n == absent {
			return
		}
		if _, _, errno := syscall.RawSyscall6(uintptr(n), first, none, none, none, none, none); errno != want {
			names = append(names, fmt.Sprintf("%s (%v)", c.name, errno))
		}
	}
	for _, c := range refused {
		try(c, syscall.EPERM, ^uintptr(0))
	}
	for _, c := range unknown {
		try(c, syscall.ENOSYS, ^uintptr(0))
	}
	// Together with this flag each of these is refused as senseless, if not
	// before.
	try(cloneCall, syscall.EPERM, syscall.CLONE_NEWUSER|syscall.CLONE_FS)
	try(cloneCall, syscall.EPERM, syscall.CLONE_NEWNS|syscall.CLONE_FS)
	try(unshareCall, syscall.EPERM, 1<<62|syscall.CLONE_NEWUSER)
	try(unshareCall, syscall.EPERM, 1<<62|syscall.CLONE_NEWNS)
	try(prlimitCall, syscall.EPERM, 1)
	return names
}
