package sandbox

import (
	"runtime"
)

// Confine runs f on a thread of its own that can make only unix, internet and
// netlink sockets and no namespaces, and do nothing else that an engine has no
// use for; see filter.go. What f starts with fork and exec is confined in the
// same way and cannot undo it; the rest of this process is not.
//
// A network namespace does not hold all kinds of sockets: those of AF_VSOCK
// reach the hypervisor from any of them, and Podman's system call filter lets
// them pass before 5.5. It lets user namespaces pass in all versions, and with
// one, much of the kernel that needs capabilities else.
//
// The error is that of the confinement; f ran exactly if it is nil.
func Confine(f func()) error {
	done := make(chan error)
	go func() {
		// Never unlocked: the thread ends with the goroutine, so that nothing
		// else ever runs on it.
		runtime.LockOSThread()
		err := filterCalls()
		if err == nil {
			f()
		}
		done <- err
	}()
	return <-done
}
