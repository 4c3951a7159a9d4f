package blocks

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"syscall"

	"github.com/resultity/node/internal/durable"
)

const (
	// largest bounds a block in bytes. JetStream makes them of 8 MiB, or of one message.
	largest = 256 << 20
	// sector is what a disk fails to read at once, or a multiple of it.
	sector = 4 << 10
)

// readBlock reads a block. What the disk does not give is zero, and unread says that
// there is such a part.
func readBlock(name string) (b []byte, unread bool, err error) {
	f, err := os.OpenFile(name, os.O_RDONLY|syscall.O_NONBLOCK, 0) // a pipe in its place does not hold it up
	if err != nil {
		return nil, false, err
	}
	defer f.Close() // read only: nothing to lose
	st, err := f.Stat()
	if err != nil {
		return nil, false, err
	}
	if !st.Mode().IsRegular() {
		return nil, false, &fs.PathError{Op: "read", Path: name, Err: durable.ErrNotFile}
	}
	if st.Size() > largest {
		return nil, false, &fs.PathError{Op: "read", Path: name, Err: fmt.Errorf("%w: more than %d bytes", durable.ErrLarge, largest)}
	}
	return readParts(f, st.Size())
}

// readParts reads n bytes, all at once or, if the disk fails, sector by sector.
func readParts(f io.ReaderAt, n int64) (b []byte, unread bool, err error) {
	b = make([]byte, n)
	got, err := f.ReadAt(b, 0)
	if err == nil || errors.Is(err, io.EOF) { // it has become shorter meanwhile
		return b[:got], false, nil
	}
	if !unreadable(err) {
		return nil, false, err
	}
	for at := 0; at < len(b); at += sector {
		part := b[at:min(at+sector, len(b))]
		switch _, err := f.ReadAt(part, int64(at)); {
		case unreadable(err):
			clear(part)
			unread = true
		case err != nil:
			return nil, false, err
		}
	}
	return b, unread, nil
}

// unreadable says that a disk does not give what is on it.
func unreadable(err error) bool {
	return errors.Is(err, syscall.EIO) || errors.Is(err, syscall.ENODATA)
}
