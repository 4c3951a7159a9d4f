package host

import (
	"errors"
	"fmt"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// everyNamespace is what a thread may have changed and has to change back.
const everyNamespace = unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWUTS |
	unix.CLONE_NEWIPC | unix.CLONE_NEWNET

// thread runs f on an operating system thread that nothing else uses and that
// ends with f, so f may move it into other namespaces. What f starts there
// with os/exec begins its life in them; f must not leave work to goroutines,
// which run on other threads. The file mode mask is 022, whatever that of the
// process is: files made for hosts get the modes that they are made with.
func thread(f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		if unix.Gettid() == unix.Getpid() {
			// The main thread cannot end, and /proc/self shows its
			// namespaces as those of the whole process. While this
			// goroutine holds it, f runs on another.
			done <- thread(f)
			runtime.UnlockOSThread()
			return
		}
		// Root, working directory and mask become the thread's own. The
		// kernel asks for that before it changes the mount namespace.
		if err := unix.Unshare(unix.CLONE_FS); err != nil {
			done <- fmt.Errorf("unshare fs attributes: %w", err)
			return
		}
		unix.Umask(0o022)
		err := f()
		// A thread ends some time after its goroutine, and until then it
		// keeps namespaces and their mounts alive.
		done <- errors.Join(err, leave())
	}()
	return <-done
}

// leave brings the calling thread back into the namespaces of its process.
func leave() error {
	self, err := unix.PidfdOpen(os.Getpid(), 0)
	if err != nil {
		return fmt.Errorf("open own process: %w", err)
	}
	defer unix.Close(self)
	if err := unix.Setns(self, everyNamespace); err != nil {
		return fmt.Errorf("return to own namespaces: %w", err)
	}
	return nil
}

// enter moves the calling thread, which [thread] must have made, into
// namespaces of the process behind pidfd.
func enter(pidfd, which int) error {
	if err := unix.Setns(pidfd, which); err != nil {
		return fmt.Errorf("enter the host's namespaces: %w", err)
	}
	return nil
}
