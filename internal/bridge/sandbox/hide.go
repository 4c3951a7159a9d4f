package sandbox

import (
	"fmt"
	"os"
	"syscall"
	"unsafe"
)

// Capabilities that [Hide] and [Resign] need, in a user namespace of the caller's.
const (
	capSetPcap  = 8
	capSysAdmin = 21
)

// Beside returns what starts a process in a user and a mount namespace of its own,
// as the same user and with the capabilities there that Hide and Resign need. Where
// the kernel, or a security module, has no such namespaces for us, the start fails.
func Beside() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER | syscall.CLONE_NEWNS,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: os.Getuid(), HostID: os.Getuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: os.Getgid(), HostID: os.Getgid(), Size: 1}},
		AmbientCaps: []uintptr{capSetPcap, capSysAdmin},
	}
}

// Hide covers directories with empty ones, for the mount namespace that the caller
// is in and for good: what has no capabilities cannot uncover them.
func Hide(dirs []string) error {
	for _, dir := range dirs {
		const flags = syscall.MS_RDONLY | syscall.MS_NOSUID | syscall.MS_NODEV | syscall.MS_NOEXEC
		if err := syscall.Mount("none", dir, "tmpfs", flags, "mode=0555,size=4k,nr_inodes=1"); err != nil {
			return fmt.Errorf("hide %s: %w", dir, err)
		}
	}
	return nil
}

const prCapBSetDrop = 24

// Resign takes all capabilities from the calling thread, and from what it executes.
func Resign() error {
	for c := uintptr(0); ; c++ {
		_, _, errno := syscall.RawSyscall(syscall.SYS_PRCTL, prCapBSetDrop, c, 0)
		if errno == syscall.EINVAL { // above the last one
			break
		}
		if errno != 0 {
			return fmt.Errorf("drop capability %d: %w", c, errno)
		}
	}
	header := struct {
		version uint32
		pid     int32
	}{version: 0x20080522} // 64 bits
	var none [2]struct{ effective, permitted, inheritable uint32 }
	if _, _, errno := syscall.RawSyscall(syscall.SYS_CAPSET, uintptr(unsafe.Pointer(&header)), uintptr(unsafe.Pointer(&none)), 0); errno != 0 {
		return fmt.Errorf("drop capabilities: %w", errno)
	}
	return nil
}

// What a process of the engine may have open, and how many of them and of their
// threads there may be. The unit cannot say it: Podman does not start a container
// whose limits are above the host's own.
const (
	maxDescriptors = 65536
	maxProcesses   = 4096

	rlimitNproc = 6
)

// limits are what Bound lets through of each resource.
var limits = map[int]uint64{syscall.RLIMIT_NOFILE: maxDescriptors, rlimitNproc: maxProcesses}

// Bound lowers the limits of this process, and of what it executes, where they are
// higher. The kernel counts the processes of a user; nobody else has the engine's id.
func Bound() error {
	for resource, most := range limits {
		var r syscall.Rlimit
		if err := syscall.Getrlimit(resource, &r); err != nil {
			return fmt.Errorf("limit %d: %w", resource, err)
		}
		r.Max = min(r.Max, most)
		r.Cur = min(r.Cur, r.Max)
		if err := syscall.Setrlimit(resource, &r); err != nil {
			return fmt.Errorf("limit %d: %w", resource, err)
		}
	}
	return nil
}
