package durable

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"syscall"
)

// What is wrong with what was to be read.
var (
	ErrLarge   = errors.New("too large")
	ErrNotFile = errors.New("not a regular file")
)

// ReadAll reads r to its end. If there are more than most bytes it returns the first
// of them, and an error that wraps [ErrLarge].
func ReadAll(r io.Reader, most int64) ([]byte, error) {
	raw, err := io.ReadAll(io.LimitReader(r, most+1))
	if err == nil && int64(len(raw)) > most {
		return raw[:most], fmt.Errorf("%w: more than %d bytes", ErrLarge, most)
	}
	return raw, err
}

// ReadFile reads a file of at most so many bytes that an operator or the system
// names: it may be a link, or a pipe. Errors name it; see [ReadAll].
func ReadFile(name string, most int64) ([]byte, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	return readAll(f, name, most)
}

// ReadOwn reads a file that a program of ours has written. No link is followed, and
// what is no regular file is [ErrNotFile]: nothing in its place leads the reader
// elsewhere or holds it up.
func ReadOwn(name string, most int64) ([]byte, error) {
	f, err := os.OpenFile(name, os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	if errors.Is(err, syscall.ELOOP) || errors.Is(err, syscall.ENXIO) { // a link, a socket
		err = &fs.PathError{Op: "open", Path: name, Err: ErrNotFile}
	}
	if err != nil {
		return nil, err
	}
	if st, err := f.Stat(); err != nil || !st.Mode().IsRegular() {
		_ = f.Close() // read only: nothing to lose
		if err == nil {
			err = &fs.PathError{Op: "read", Path: name, Err: ErrNotFile}
		}
		return nil, err
	}
	return readAll(f, name, most)
}

// ErrShared says that others may read or write what is a secret.
var ErrShared = errors.New("others may use it; if nobody has, chmod 600 it, else replace what it holds")

// ReadSecret reads a file of at most so many bytes that nobody but its owner may read or
// write. An operator names it, and it may be a link; what counts is the file that is
// opened, so that it cannot be exchanged between a look and the reading.
func ReadSecret(name string, most int64) ([]byte, error) {
	f, err := os.OpenFile(name, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	st, err := f.Stat()
	switch {
	case err != nil:
	case !st.Mode().IsRegular():
		err = &fs.PathError{Op: "read", Path: name, Err: ErrNotFile}
	case st.Mode().Perm()&0o077 != 0:
		err = &fs.PathError{Op: "read", Path: name, Err: fmt.Errorf("it must be a file of mode 0600, and has %04o: %w", st.Mode().Perm(), ErrShared)}
	}
	if err != nil {
		_ = f.Close() // read only: nothing to lose
		return nil, err
	}
	return readAll(f, name, most)
}

func readAll(f *os.File, name string, most int64) ([]byte, error) {
	defer f.Close() // read only: nothing to lose
	raw, err := ReadAll(f, most)
	if errors.Is(err, ErrLarge) {
		err = &fs.PathError{Op: "read", Path: name, Err: err}
	}
	return raw, err
}
