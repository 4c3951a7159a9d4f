package model

import (
	"context"
	"errors"
	"fmt"
	"io"
	"path"
	"runtime"

	"golang.org/x/sys/unix"

	"github.com/resultity/node/internal/snapshot"
)

// Warm reads the files of m, in their order, so that a start soon after finds
// them in memory. It reads at most most bytes, with the lowest priority where
// the system lets it, and returns how many it has read. Nothing depends on it.
func (s *Store) Warm(ctx context.Context, m *snapshot.Model, most int64) (read int64, err error) {
	defer s.use(m)()
	// The priority is the thread's; the thread ends with this goroutine.
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread()
		const whoProcess, idle = 1, 3 << 13
		_, _, _ = unix.Syscall(unix.SYS_IOPRIO_SET, whoProcess, 0, idle) // or at our own priority
		buf := make([]byte, 1<<20)
		for i := range m.Files {
			var n int64
			n, err = s.warm(ctx, m.Files[i].SHA256.Hex(), buf, most-read)
			if read += n; err != nil || read >= most {
				return
			}
		}
	}()
	<-done
	if err != nil {
		err = fmt.Errorf("model %s %s: read ahead: %w", m.Name, m.Version, err)
	}
	return read, err
}

func (s *Store) warm(ctx context.Context, blob string, buf []byte, most int64) (read int64, err error) {
	f, err := s.root.Open(path.Join(blobs, blob))
	if err != nil {
		return 0, err
	}
	defer f.Close() // read only: nothing to lose
	for read < most && err == nil {
		if err = ctx.Err(); err != nil {
			break
		}
		var n int
		n, err = f.Read(buf[:min(int64(len(buf)), most-read)])
		read += int64(n)
	}
	if errors.Is(err, io.EOF) {
		err = nil
	}
	return read, err
}
