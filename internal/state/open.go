package state

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/resultity/node/internal/durable"
	"github.com/resultity/node/internal/evm"
	"github.com/resultity/node/internal/failpoint"
	"github.com/resultity/node/internal/receipt"
	"github.com/resultity/node/internal/wire"
)

// lockWait is how long another agent may still be on its way out.
const lockWait = time.Second

// Open opens the store in the directory path, and makes it if there is none;
// what is above it must exist. The whole log is read and checked, and mended where it is
// damaged: see [Store.Salvage]. It fails with [ErrLocked], [ErrCorrupt] or [ErrFormat], and
// leaves everything as it was then.
func Open(path string, b Bounds, now func() time.Time) (*Store, error) {
	s, err := openAt(path, b, now)
	if err != nil {
		return nil, fmt.Errorf("job store %s: %w", path, err)
	}
	return s, nil
}

func openAt(path string, b Bounds, now func() time.Time) (*Store, error) {
	switch err := os.Mkdir(path, 0o700); {
	case err == nil:
		failpoint.Here("state.dir.made")
		if err := durable.SyncDir(filepath.Dir(path)); err != nil {
			return nil, err
		}
	case !errors.Is(err, fs.ErrExist):
		return nil, err
	}
	if err := os.Chmod(path, 0o700); err != nil { // requests and responses are nobody else's
		return nil, err
	}
	l, err := lock(filepath.Join(path, "lock"))
	if errors.Is(err, syscall.ENOTDIR) {
		return nil, fmt.Errorf("%w: it is no directory", ErrCorrupt)
	}
	if err != nil {
		return nil, err
	}
	s, err := load(directory(path), b, now, segmentSize)
	if err != nil {
		return nil, errors.Join(err, l.Close())
	}
	s.path, s.lock = path, l
	return s, nil
}

// lock makes sure that nobody else has the store open.
func lock(name string) (_ *os.File, err error) {
	f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	if err := f.Chmod(0o600); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	for end := time.Now().Add(lockWait); ; time.Sleep(20 * time.Millisecond) {
		switch err = syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); {
		case err == nil:
			return f, nil
		case err != syscall.EWOULDBLOCK && err != syscall.EINTR:
			err = fmt.Errorf("lock: %w", err)
		case time.Now().After(end):
			err = ErrLocked
		default:
			continue
		}
		_ = f.Close() // the error before says more
		return nil, err
	}
}

// load reads a log, or begins one.
func load(d disk, b Bounds, now func() time.Time, segmentSize int64) (*Store, error) {
	return loadWith(d, b, now, segmentSize, receiptLeaf)
}

func loadWith(d disk, b Bounds, now func() time.Time, segmentSize int64, leafOf func(*wire.Result) (evm.Hash, bool)) (_ *Store, err error) {
	if b.Jobs == 0 {
		b.Jobs = DefaultBounds.Jobs
	}
	if b.Bytes == 0 {
		b.Bytes = DefaultBounds.Bytes
	}
	if b.IDs == 0 {
		b.IDs = DefaultBounds.IDs
	}
	if b.Leaves == 0 {
		b.Leaves = DefaultBounds.Leaves
	}
	s := &Store{disk: d, bounds: b, now: now, segmentSize: segmentSize, jobs: map[receipt.JobID]entry{}, nextFrame: 1, tree: newTree(), leafOf: leafOf}
	defer func() {
		if err != nil {
			s.closeFiles()
		}
	}()
	names, err := d.list()
	if err != nil {
		return nil, err
	}
	numbers, spares, aside, pending := sort(names)
	r, err := s.replay(numbers, pending)
	if err != nil {
		return nil, err
	}
	// From here on files change.
	if err := s.setAside(r, aside); err != nil {
		return nil, err
	}
	if len(s.segments) == 0 {
		if err := s.begin(spares); err != nil {
			return nil, err
		}
	}
	if err := s.takeSpares(spares); err != nil {
		return nil, err
	}
	for _, n := range r.stale {
		_ = d.remove(segmentName(n)) // it is passed over as long as it is there
	}
	if len(numbers) > 0 {
		if err := s.syncLast(); err != nil {
			return nil, err
		}
	}
	// A full disk is no reason not to start: results can still be delivered.
	if err := s.ensure(&noRoom{reserve: s.reserved()}); err != nil && !errors.Is(err, ErrFull) {
		return nil, err
	}
	if err := s.repair(r); err != nil {
		return nil, err
	}
	return s, nil
}

// sort finds segments, spares, what was set aside, and what is about to be, among the names
// of files.
func sort(names []string) (numbers []uint64, spares []int, aside, pending []string) {
	for _, name := range names {
		if n, ok := segmentNumber(name); ok {
			numbers = append(numbers, n)
		} else if n, ok := strings.CutSuffix(name, ".spare"); ok {
			if i, err := strconv.Atoi(n); err == nil && spareName(i) == name {
				spares = append(spares, i)
			}
		} else if _, ok := asideTime(name); ok {
			aside = append(aside, name)
		} else if _, ok := asideTime(strings.TrimSuffix(name, pendingSuffix)); ok {
			pending = append(pending, name)
		}
	}
	slices.Sort(numbers)
	slices.Sort(spares)
	slices.Sort(aside)
	return numbers, spares, aside, pending
}

// begin makes the first segment of a new log.
func (s *Store) begin(spares []int) error {
	if len(spares) > 0 {
		s.lastSpare = spares[len(spares)-1]
	}
	s.lastSpare++
	name := spareName(s.lastSpare)
	f, err := makeFile(s.disk, name, s.segmentSize)
	if err != nil {
		return fmt.Errorf("make %s: %w", name, err)
	}
	g := &segment{head: head{Number: 1, Salt: newSalt(), Frame: 1, Oldest: 1, Blind: s.blind}, f: f, size: s.segmentSize, end: headRoom}
	s.segments = append(s.segments, g)
	return startSegment(s.disk, name, g)
}

// takeSpares opens what waits to become a segment. What is not whole goes.
func (s *Store) takeSpares(spares []int) error {
	for _, n := range spares {
		name := spareName(n)
		s.lastSpare = max(s.lastSpare, n)
		f, err := s.disk.open(name)
		if errors.Is(err, fs.ErrNotExist) {
			continue // begin has used it
		}
		if err != nil {
			return err
		}
		if size, err := f.size(); err != nil || size != s.segmentSize {
			_, _ = f.Close(), s.disk.remove(name)
			continue
		}
		s.spares = append(s.spares, spare{name, f})
	}
	return nil
}

// index makes lists and counts of what was read. Nothing that counts is in a
// segment before the oldest; those are given back.
func (s *Store) index(r *replay) error {
	oldest := r.oldest
	keep := func(list []item, state Known) queue {
		list = slices.DeleteFunc(list, func(i item) bool { e := s.jobs[i.id]; return e.state != state || e.num != i.num })
		slices.SortFunc(list, func(a, b item) int { return cmp.Compare(a.num, b.num) })
		list = slices.CompactFunc(list, func(a, b item) bool { return a.num == b.num })
		return queue{items: slices.Clone(list)} // of its own size
	}
	for id, e := range s.jobs {
		switch {
		case e.seg > 0 && e.seg < oldest, e.state == Settled && e.num <= s.forgotten:
			delete(s.jobs, id) // was forgotten
			continue
		}
		s.weigh(e, +1)
		switch e.state {
		case Running:
			s.count.Accepted++
			s.count.Bytes += int64(e.size)
		case Done:
			s.count.Results++
			s.count.Bytes += int64(e.size)
		case Settled:
			s.count.Settled++
		}
	}
	s.outbox, s.settled = keep(r.results, Done), keep(r.settled, Settled)
	for s.count.Settled > s.bounds.IDs {
		s.forgetFirst()
	}
	if n := int(oldest - s.segments[0].Number); n > 0 {
		return s.retire(n)
	}
	return nil
}

// syncLast makes sure that what was read of the last frame is on the disk: the
// process that wrote it may have been killed, or told by the disk that it could
// not be synced, and it is from here on relied upon. Only what is written again
// is sure to be synced.
func (s *Store) syncLast() error {
	g := s.current()
	if s.lastFrame > 0 {
		b := make([]byte, g.end-s.lastFrame)
		if _, err := g.f.ReadAt(b, s.lastFrame); err != nil {
			return err
		}
		if _, err := g.f.WriteAt(b, s.lastFrame); err != nil {
			return err
		}
	}
	failpoint.Here("state.open.written")
	return g.f.sync()
}
