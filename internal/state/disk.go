package state

import (
	"errors"
	"io"
	"os"
	"path/filepath"
	"syscall"

	"github.com/resultity/node/internal/durable"
)

// disk is the directory of a store, and file one file in it. Tests stop and
// fail them anywhere.
type (
	disk interface {
		list() ([]string, error)
		create(name string) (file, error) // fails where there is one
		open(name string) (file, error)
		rename(from, to string) error
		remove(name string) error
		sync() error // names; see [file.sync] for what they name
	}
	file interface {
		io.ReaderAt
		io.WriterAt
		io.Closer
		size() (int64, error)
		sync() error // content and length
	}
)

type directory string

func (d directory) list() ([]string, error) {
	entries, err := os.ReadDir(string(d))
	names := make([]string, len(entries))
	for i, e := range entries {
		names[i] = e.Name()
	}
	return names, err
}

func (d directory) create(name string) (file, error) {
	f, err := os.OpenFile(filepath.Join(string(d), name), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, err
	}
	return osFile{f}, nil
}

// open makes the file ours alone: requests and responses are nobody else's.
func (d directory) open(name string) (file, error) {
	f, err := os.OpenFile(filepath.Join(string(d), name), os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	if err := f.Chmod(0o600); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return osFile{f}, nil
}

func (d directory) rename(from, to string) error {
	return os.Rename(filepath.Join(string(d), from), filepath.Join(string(d), to))
}

func (d directory) remove(name string) error { return os.Remove(filepath.Join(string(d), name)) }

func (d directory) sync() error { return durable.SyncDir(string(d)) }

type osFile struct{ *os.File }

func (f osFile) size() (int64, error) {
	info, err := f.Stat()
	if err != nil {
		return 0, err
	}
	return info.Size(), nil
}

func (f osFile) sync() error {
	for {
		if err := syscall.Fdatasync(int(f.Fd())); err != syscall.EINTR {
			return os.NewSyscallError("fdatasync", err)
		}
	}
}

// full reports whether an error says that the disk, or this user's share of it,
// has no room, and nothing worse.
func full(err error) bool {
	return !errors.Is(err, errSync) && !errors.Is(err, ErrBroken) &&
		(errors.Is(err, ErrFull) || errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) || errors.Is(err, syscall.EFBIG))
}
