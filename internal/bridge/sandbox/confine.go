package sandbox

import "runtime"

// Confine runs f on a thread of its own that can make only unix, TCP, UDP and
// route sockets and no namespaces, and do nothing else that an engine has no
// use for; see filter.go. Where the kernel has Landlock, it can change files
// only below o.Writable. What f starts with fork and exec is confined in the
// same way and cannot undo it; the rest of this process is not.
//
// A network namespace does not hold all kinds of sockets: those of AF_VSOCK
// reach the hypervisor from any of them, and Podman's system call filter lets
// them pass before 5.5. It lets user namespaces pass in all versions, and with
// one, much of the kernel that needs capabilities else. And the socket's
// directory is on the account's own file system, without a limit to what can be
// put there.
//
// The version of Landlock is 0 without it. The error is that of the
// confinement; f ran exactly if it is nil.
func Confine(o Order, f func()) (landlock int, err error) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		// Never unlocked: the thread ends with the goroutine, so that nothing
		// else ever runs on it.
		runtime.LockOSThread()
		if landlock, err = restrictWrites(o); err != nil {
			return
		}
		if err = filterCalls(); err == nil {
			f()
		}
	}()
	<-done
	return landlock, err
}
