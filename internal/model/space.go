package model

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"slices"
	"strings"
	"syscall"

	"github.com/resultity/node/internal/snapshot"
)

// defaultMargin is left free on the file system. Jobs and results are written
// there too, and a node that cannot write them down is out of service.
const defaultMargin = 512 << 20

// NoSpaceError says that the file system cannot take a model. It wraps
// [syscall.ENOSPC].
type NoSpaceError struct {
	Dir  string // of the store
	Need int64  // bytes that still have to be written
	Free int64  // bytes that may be used for them, beside what others are fetching
}

func (e *NoSpaceError) Error() string {
	return fmt.Sprintf("no space in %s: %d bytes still to be written, %d free for them; free at least %d bytes there or move the store to a larger disk",
		e.Dir, e.Need, e.Free, e.Need-e.Free)
}

// Unwrap returns the system's word for it.
func (e *NoSpaceError) Unwrap() error { return syscall.ENOSPC }

// free returns the bytes that the store may still use: what an unprivileged
// user gets, less the margin, and never less than nothing.
func (s *Store) free() (int64, error) {
	var st syscall.Statfs_t
	if err := syscall.Statfs(s.dir, &st); err != nil {
		return 0, fmt.Errorf("free space of %s: %w", s.dir, err)
	}
	unit := st.Frsize
	if unit == 0 {
		unit = st.Bsize
	}
	return max(0, int64(st.Bavail)*unit-s.margin), nil
}

// preflight fails before the first byte if the rest of m does not fit beside the
// rest of what others are fetching. From then on until done is called m is one of
// those.
func (s *Store) preflight(ctx context.Context, m *snapshot.Model) (done func(), err error) {
	s.space.Lock() // of two that would not fit together the first one does
	defer s.space.Unlock()
	seen := map[string]bool{}
	var others int64
	for _, o := range s.coming {
		others += s.missing(o, seen)
	}
	need := s.missing(m, seen)
	enough := func() (bool, int64, error) {
		free, err := s.free()
		free = max(0, free-others)
		return need == 0 || free >= need, free, err
	}
	fits, free, err := enough()
	if err == nil && !fits {
		// Damaged files are kept for whoever wants to look at them, but not at the
		// price of a model.
		if err = s.dropQuarantined(ctx, m); err == nil {
			fits, free, err = enough()
		}
	}
	switch {
	case err != nil:
		return nil, err
	case !fits:
		return nil, &NoSpaceError{s.dir, need, free}
	}
	s.coming = append(s.coming, m)
	return func() {
		s.space.Lock()
		defer s.space.Unlock()
		i := slices.Index(s.coming, m) // any of them: they are the same model
		s.coming = slices.Delete(s.coming, i, i+1)
	}, nil
}

// missing returns how many bytes of m still have to be written, but for those of
// the blobs in seen. It adds m's.
func (s *Store) missing(m *snapshot.Model, seen map[string]bool) (need int64) {
	for _, f := range m.Files {
		name := path.Join(blobs, f.SHA256.Hex())
		if seen[name] {
			continue
		}
		seen[name] = true
		if st, err := s.root.Lstat(name); err == nil && st.Size() == f.Size {
			continue
		}
		need += f.Size
		if st, err := s.root.Lstat(name + unverified); err == nil {
			need -= min(blocks(st), f.Size) // it has holes
		}
	}
	return need
}

// blocks returns how many bytes of the disk a file takes.
func blocks(st fs.FileInfo) int64 { return st.Sys().(*syscall.Stat_t).Blocks * 512 }

// dropQuarantined gives up what was found damaged, and with it the tree of m, which
// has links to it and is not whole.
func (s *Store) dropQuarantined(ctx context.Context, m *snapshot.Model) error {
	tree := path.Join(trees, m.Digest().Hex())
	unlock, err := s.locks.lock(ctx, tree)
	if err != nil {
		return err
	}
	defer unlock()
	if err := s.root.RemoveAll(tree); err != nil {
		return err
	}
	entries, err := fs.ReadDir(s.root.FS(), blobs)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if strings.HasSuffix(e.Name(), quarantined) {
			if err := s.root.Remove(path.Join(blobs, e.Name())); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
		}
	}
	return nil
}
