package model

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/resultity/node/internal/chunk"
	"github.com/resultity/node/internal/digest"
)

// Scrubbed is what a scrub has found.
type Scrubbed struct {
	Files   int
	Bytes   int64
	Damaged []digest.Digest // files that are not what their names say, or cannot be read
}

// Scrub reads every verified file of the store in dir again, and changes nothing. It
// needs neither a [Store] nor a configuration, since the names say what the files are,
// so that it can be a process of its own at the lowest priority. Where the file system
// can, it reads past the page cache: what is looked for is damage of the disk, and the
// cache is left to the engine.
func Scrub(ctx context.Context, dir string) (Scrubbed, error) {
	var s Scrubbed
	entries, err := os.ReadDir(filepath.Join(dir, blobs))
	if err != nil {
		return s, fmt.Errorf("model store: %w", err)
	}
	// What is read past the cache has to go to a whole page.
	buf, err := unix.Mmap(-1, 0, chunk.Size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		return s, err
	}
	defer func() { _ = unix.Munmap(buf) }() // the process ends soon
	for _, e := range entries {
		want, err := digest.ParseHex(e.Name())
		if err != nil {
			continue // a part, or something set aside
		}
		n, err := scrub(ctx, filepath.Join(dir, blobs, e.Name()), want, buf)
		s.Bytes += n
		switch {
		case ctx.Err() != nil:
			return s, ctx.Err()
		case errors.Is(err, os.ErrNotExist): // removed meanwhile
			continue
		case errors.Is(err, digest.ErrMismatch), errors.Is(err, unix.EIO):
			s.Damaged = append(s.Damaged, want)
		case err != nil:
			return s, fmt.Errorf("model store: %w", err)
		}
		s.Files++
	}
	return s, nil
}

func scrub(ctx context.Context, name string, want digest.Digest, buf []byte) (read int64, err error) {
	f, err := os.OpenFile(name, os.O_RDONLY|unix.O_DIRECT|unix.O_NOFOLLOW, 0)
	if errors.Is(err, unix.EINVAL) { // this file system cannot
		f, err = os.OpenFile(name, os.O_RDONLY|unix.O_NOFOLLOW, 0)
	}
	if err != nil {
		return 0, err
	}
	defer f.Close() // read only: nothing can be lost
	if _, err := os.Lstat(name + sealed); err == nil {
		// A sealed file is read by way of the cache: what nobody has mapped comes from the disk.
		_ = unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED)
	}
	h := sha256.New()
	read, err = copyDirect(ctx, h, f, buf, func() error {
		_, err := unix.FcntlInt(f.Fd(), unix.F_SETFL, 0)
		return err
	})
	if err != nil {
		return read, err
	}
	if got := digest.FromSum([sha256.Size]byte(h.Sum(nil))); got != want {
		return read, fmt.Errorf("%w: want %s, got %s", digest.ErrMismatch, want, got)
	}
	return read, nil
}

// copyDirect copies r, which may be read past the page cache, through buf. Some file
// systems take such a file and then refuse to read it, or its end that fills no block:
// from there on it is read as every file is, which is what buffered brings about.
func copyDirect(ctx context.Context, w io.Writer, r io.Reader, buf []byte, buffered func() error) (read int64, err error) {
	for refused := false; ; {
		if err := ctx.Err(); err != nil {
			return read, err
		}
		n, err := r.Read(buf)
		read += int64(n)
		if _, err := w.Write(buf[:n]); err != nil {
			return read, err
		}
		switch {
		case err == io.EOF:
			return read, nil
		case errors.Is(err, unix.EINVAL) && !refused:
			refused = true
			if err := buffered(); err != nil {
				return read, err
			}
		case err != nil:
			return read, err
		}
	}
}
