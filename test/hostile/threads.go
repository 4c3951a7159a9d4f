package hostile

import (
	"runtime"
	"runtime/debug"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"
)

// threads takes threads until there are enough of them, or Go's runtime ends the
// process for want of one. Some it leaves to its parent, which would end for want of
// one, too.
func threads() {
	var r unix.Rlimit
	if unix.Prlimit(0, unix.RLIMIT_NPROC, nil, &r) == nil && r.Max < mostThreads {
		r.Cur = r.Max - 100
		_ = unix.Prlimit(0, unix.RLIMIT_NPROC, &r, nil) // the end says it
	}
	debug.SetMaxThreads(2 * mostThreads)
	var up sync.WaitGroup
	for range mostThreads {
		up.Add(1)
		go func() {
			runtime.LockOSThread()
			up.Done()
			unix.Syscall(unix.SYS_PPOLL, 0, 0, 0) // for ever
		}()
	}
	up.Wait()
}

func ptr[T any](v *T) uintptr { return uintptr(unsafe.Pointer(v)) }
