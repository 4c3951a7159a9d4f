package state

import (
	"errors"
	"fmt"
	"io"
	"syscall"

	bolt "go.etcd.io/bbolt"
)

// change is one caller's part of a commit. A commit costs two fdatasyncs
// whatever it holds, so callers that arrive during one share the next.
type change struct {
	do   func(*bolt.Tx, *totals) error
	done bool // guarded by Store.writing, like err
	err  error
}

// totals are the counts of a store, and what the commit at hand needs to know.
type totals struct {
	accepted, results, settled int
	bytes                      int64

	room    int64 // bytes that the changes so far may add to the file
	changed bool  // something was put
	failed  error // a put that failed: nothing of the commit may stay
}

// put notes that a change has begun to write, and how that went.
func (t *totals) put(errs ...error) error {
	t.changed = true
	for _, err := range errs {
		if err != nil {
			t.failed = err
			return err
		}
	}
	return nil
}

var errNothing = errors.New("nothing to write")

// commit runs do in a transaction, alone or with others', and returns when it
// is on disk or refused. do either writes through [totals.put], or returns an
// error and has written nothing; it may run in a transaction that does not
// come to be, so all that it leaves outside is its results.
func (s *Store) commit(do func(*bolt.Tx, *totals) error) error {
	c := &change{do: do}
	s.mu.Lock()
	s.queue = append(s.queue, c)
	s.mu.Unlock()

	s.writing.Lock()
	defer s.writing.Unlock()
	if c.done {
		return c.err // whoever held the lock before took it along
	}
	s.mu.Lock()
	group, t := s.queue, s.count
	s.queue = nil
	s.mu.Unlock()
	t, err := s.write(group, t)
	for _, c := range group {
		c.done = true
		if c.err == nil {
			c.err = err
		}
	}
	if err == nil {
		s.mu.Lock()
		s.count = t
		s.mu.Unlock()
	}
	return c.err
}

// write makes one transaction of the group. An error is everybody's.
func (s *Store) write(group []*change, t totals) (totals, error) {
	if s.broken != nil {
		return t, s.broken
	}
	var id int
	err := s.db.Update(func(tx *bolt.Tx) error {
		id = tx.ID()
		for _, c := range group {
			if c.err = c.do(tx, &t); t.failed != nil {
				return t.failed
			}
		}
		if !t.changed {
			return errNothing
		}
		return nil
	})
	t.room, t.changed, t.failed = 0, false, nil
	switch {
	case err == nil, errors.Is(err, errNothing):
		return t, nil
	case s.published(id):
		// The new root is there but perhaps not on the disk, and bbolt has
		// gone back to the old one: from here on the two would be mixed.
		s.broken = fmt.Errorf("%w: %w", ErrBroken, err)
		return t, s.broken
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		return t, fmt.Errorf("%w: %w", ErrFull, err)
	}
	return t, err
}

// published reports whether readers see the transaction, although it failed.
func (s *Store) published(id int) bool {
	seen := true // if one cannot even look
	_ = s.db.View(func(tx *bolt.Tx) error {
		seen = tx.ID() >= id
		return nil
	})
	return seen
}

const (
	// failureSize is the most that the record of a failed result takes: six
	// bytes of JSON for each of MaxMessage, and the rest of the header.
	failureSize = 8 << 10

	// growStep keeps the file from being grown by every commit.
	growStep = 1 << 20
)

// treeRoom is more than one change rewrites of branches, small leaves and the
// free list (8 bytes for a page of 4 KiB) in a file of size bytes. The pages it
// replaces are free after the next commit.
func treeRoom(size int64) int64 { return 128<<10 + size/512 }

// makeRoom has the disk set aside what a record of size bytes takes, and beside
// that the failures of so many accepted jobs and the changes that end them. The
// free pages within the file are not counted on: they may be in small pieces.
func (s *Store) makeRoom(tx *bolt.Tx, t *totals, size int64, accepted int) error {
	size += treeRoom(tx.Size() + size)
	want := tx.Size() + t.room + size + int64(accepted)*failureSize + 2*treeRoom(tx.Size())
	if want <= s.allocated {
		t.room += size
		return nil
	}
	want = (want + growStep - 1) / growStep * growStep
	if err := s.allocate(want); err != nil {
		if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) || errors.Is(err, syscall.EFBIG) {
			return fmt.Errorf("%w: the disk of %s has no %d bytes left: %w", ErrFull, s.db.Path(), want-s.allocated, err)
		}
		return fmt.Errorf("allocate %d bytes of %s: %w", want, s.db.Path(), err)
	}
	s.allocated = want
	t.room += size
	return nil
}

// allocate makes the file at least size bytes long, all of them backed by the
// disk. bbolt grows a file by a hole, which a full disk would show only in the
// middle of a commit.
func (s *Store) allocate(size int64) error {
	info, err := s.file.Stat()
	if err != nil {
		return err
	}
	err = s.reserve(s.file.Fd(), size)
	if errors.Is(err, syscall.EOPNOTSUPP) || errors.Is(err, syscall.ENOSYS) {
		err = zeros(s.file, info.Size(), size)
	}
	if err == nil {
		return s.file.Sync() // the length too, before anything relies on it
	}
	// Give back what was got, so that a full disk is not made fuller.
	if now, e := s.file.Stat(); e == nil && now.Size() > info.Size() {
		err = errors.Join(err, s.file.Truncate(info.Size()))
	}
	return err
}

func fallocate(fd uintptr, size int64) error {
	for {
		if err := syscall.Fallocate(int(fd), 0, 0, size); err != syscall.EINTR {
			return err
		}
	}
}

// zeros is fallocate for file systems that have none.
func zeros(w io.WriterAt, from, to int64) error {
	block := make([]byte, 64<<10)
	for from < to {
		n, err := w.WriteAt(block[:min(int64(len(block)), to-from)], from)
		if err != nil {
			return err
		}
		from += int64(n)
	}
	return nil
}
