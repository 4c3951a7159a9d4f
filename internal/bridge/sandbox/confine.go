package sandbox

import (
	"fmt"
	"runtime"
	"syscall"
	"unsafe"
)

// Confine runs f on a thread of its own that can make only unix, internet and
// netlink sockets, and only through the native system calls. What f starts
// with fork and exec is confined in the same way and cannot undo it; the rest
// of this process is not.
//
// A network namespace does not hold all kinds of sockets: those of AF_VSOCK
// reach the hypervisor from any of them, and Podman's system call filter lets
// them pass before 5.5.
//
// The error is that of the confinement; f ran exactly if it is nil.
func Confine(f func()) error {
	done := make(chan error)
	go func() {
		// Never unlocked: the thread ends with the goroutine, so that nothing
		// else ever runs on it.
		runtime.LockOSThread()
		err := filterSockets()
		if err == nil {
			f()
		}
		done <- err
	}()
	return <-done
}

// families are the kinds of sockets that a network namespace holds.
var families = []uint32{syscall.AF_UNIX, syscall.AF_INET, syscall.AF_INET6, syscall.AF_NETLINK}

// Names that the syscall package does not have.
const (
	prSetSeccomp      = 22
	seccompModeFilter = 2
	seccompAllow      = 0x7fff0000
	seccompErrno      = 0x00050000
)

// audit is the kernel's name for an architecture's native system calls.
var audit = map[string]uint32{
	"amd64": 0xc000003e,
	"arm64": 0xc00000b7,
}

// filterSockets installs the filter on the calling thread. It needs no
// privilege where no_new_privs is set.
func filterSockets() error {
	arch, ok := audit[runtime.GOARCH]
	if !ok {
		return fmt.Errorf("system call filter: not written for %s", runtime.GOARCH)
	}
	prog := socketFilter(arch)
	fprog := syscall.SockFprog{Len: uint16(len(prog)), Filter: &prog[0]}
	_, _, errno := syscall.RawSyscall(syscall.SYS_PRCTL, prSetSeccomp, seccompModeFilter, uintptr(unsafe.Pointer(&fprog)))
	runtime.KeepAlive(prog)
	if errno != 0 {
		return fmt.Errorf("system call filter: %w", errno)
	}
	return nil
}

// socketFilter is the filter's program. It reads the kernel's seccomp_data: the
// number at 0, the architecture at 4, the low half of the first argument, on
// both (little-endian) architectures, at 16.
func socketFilter(arch uint32) []syscall.SockFilter {
	const (
		load  = syscall.BPF_LD | syscall.BPF_W | syscall.BPF_ABS
		equal = syscall.BPF_JMP | syscall.BPF_JEQ | syscall.BPF_K
		above = syscall.BPF_JMP | syscall.BPF_JGE | syscall.BPF_K
		ret   = syscall.BPF_RET | syscall.BPF_K

		x32         = 0x40000000 // a second set of numbers on amd64
		ioUringOpen = 425        // its rings make sockets past any filter
	)
	n := uint8(len(families))
	prog := []syscall.SockFilter{
		{Code: load, K: 4},
		{Code: equal, K: arch, Jf: 5}, // to ENOSYS
		{Code: load, K: 0},
		{Code: above, K: x32, Jt: 3},         // to ENOSYS
		{Code: equal, K: ioUringOpen, Jt: 2}, // to ENOSYS
		{Code: equal, K: syscall.SYS_SOCKET, Jt: 2},
		{Code: equal, K: syscall.SYS_SOCKETPAIR, Jt: 1, Jf: 3 + n},
		{Code: ret, K: seccompErrno | uint32(syscall.ENOSYS)},
		{Code: load, K: 16},
	}
	for i, f := range families {
		prog = append(prog, syscall.SockFilter{Code: equal, K: f, Jt: n - uint8(i)}) // to allow
	}
	return append(prog,
		syscall.SockFilter{Code: ret, K: seccompErrno | uint32(syscall.EAFNOSUPPORT)},
		syscall.SockFilter{Code: ret, K: seccompAllow},
	)
}
