package state

import (
	"cmp"
	"encoding/json"
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
	"github.com/resultity/node/internal/failpoint"
	"github.com/resultity/node/internal/receipt"
	"github.com/resultity/node/internal/wire"
)

// lockWait is how long another agent may still be on its way out.
const lockWait = time.Second

// Open opens the store in the directory path, and makes it if there is none;
// what is above it must exist. The whole log is read and checked. It fails with
// [ErrLocked], [ErrCorrupt] or [ErrFormat], and leaves everything as it was.
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
func load(d disk, b Bounds, now func() time.Time, segmentSize int64) (_ *Store, err error) {
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
	s := &Store{disk: d, bounds: b, now: now, segmentSize: segmentSize, jobs: map[receipt.JobID]entry{}, nextFrame: 1, tree: newTree(), leafOf: receiptLeaf}
	defer func() {
		if err != nil {
			s.closeFiles()
		}
	}()
	names, err := d.list()
	if err != nil {
		return nil, err
	}
	numbers, stale, spares := sort(names)
	if len(numbers) == 0 {
		err = s.begin(spares)
	} else {
		err = s.replay(numbers)
	}
	if err != nil {
		return nil, err
	}
	// Everything is as it should be. From here on files change.
	if err := s.takeSpares(spares); err != nil {
		return nil, err
	}
	for _, n := range stale {
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
	return s, nil
}

// sort finds the segments among the names of files: the last that are without a
// gap. What is before a gap was given back.
func sort(names []string) (numbers, stale []uint64, spares []int) {
	for _, name := range names {
		if hex, ok := strings.CutSuffix(name, ".log"); ok {
			if n, err := strconv.ParseUint(hex, 16, 64); err == nil && segmentName(n) == name && n > 0 {
				numbers = append(numbers, n)
			}
		} else if n, ok := strings.CutSuffix(name, ".spare"); ok {
			if i, err := strconv.Atoi(n); err == nil && spareName(i) == name {
				spares = append(spares, i)
			}
		}
	}
	slices.Sort(numbers)
	slices.Sort(spares)
	for i := len(numbers) - 1; i > 0; i-- {
		if numbers[i-1]+1 != numbers[i] {
			return numbers[i:], numbers[:i], spares
		}
	}
	return numbers, nil, spares
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
	g := &segment{head: head{Number: 1, Salt: newSalt(), Frame: 1, Oldest: 1}, f: f, size: s.segmentSize, end: headRoom}
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

// replay reads the segments.
func (s *Store) replay(numbers []uint64) error {
	var oldest uint64
	var results, settled []item
	var tree treeReader
	apply := func(g *segment) func(k kind, at int64, body []byte) error {
		return func(k kind, at int64, body []byte) error {
			text := func(prefix int) entry {
				return entry{seg: g.Number, at: uint32(at) + uint32(prefix), size: uint32(len(body) - prefix)}
			}
			switch k {
			case kindJob:
				e := text(jobPrefix)
				e.state = Running
				s.jobs[receipt.JobID(body)] = e
			case kindResult:
				e := text(resultPrefix)
				e.state, e.num, e.receipt = Done, fromNumber(body[idSize:]), body[resultPrefix-1] == 1
				s.jobs[receipt.JobID(body)] = e
				s.lastResult = max(s.lastResult, e.num)
				results = append(results, item{receipt.JobID(body), e.num, textTime(body[resultPrefix:])})
			case kindSettled:
				for ; len(body) > 0; body = body[itemSize:] {
					i := readItem(body)
					s.jobs[i.id] = entry{state: Settled, num: i.num, seg: g.Number}
					s.lastSettled = max(s.lastSettled, i.num)
					settled = append(settled, i)
				}
			case kindDropped:
				for ; len(body) > 0; body = body[idSize:] {
					delete(s.jobs, receipt.JobID(body))
				}
			case kindLeaves, kindAdopted:
				return tree.read(k, body, g.Number)
			case kindAcked:
				tree.acked = fromNumber(body)
			case kindForget:
				s.forgotten = max(s.forgotten, fromNumber(body))
			case kindOldest:
				oldest = max(oldest, fromNumber(body))
			case kindRegistered:
				r := new(wire.Registered)
				if err := json.Unmarshal(body, r); err != nil {
					return err
				}
				s.registered = r
			}
			return nil
		}
	}
	var b []byte // for one after the other
	for i, n := range numbers {
		g, err := s.openSegment(n, &b)
		if err != nil {
			return fmt.Errorf("%s: %w", segmentName(n), err)
		}
		s.segments = append(s.segments, g)
		switch {
		case g.Number != n:
			return fmt.Errorf("%w: %s says that it is segment %x", ErrCorrupt, segmentName(n), g.Number)
		case i > 0 && g.Frame != s.nextFrame:
			p := s.segments[i-1]
			return fmt.Errorf("%w: %s is damaged at byte %d", ErrCorrupt, segmentName(p.Number), p.end)
		}
		s.lastResult, s.lastSettled = max(s.lastResult, g.Results), max(s.lastSettled, g.Settled)
		s.forgotten, oldest = max(s.forgotten, g.Forgotten), max(oldest, g.Oldest)
		s.registered, tree.acked = g.Registered, g.Acked
		got, err := scan(b, &g.head, apply(g))
		if err != nil {
			return fmt.Errorf("%s: %w", segmentName(n), err)
		}
		g.end, s.nextFrame, s.lastFrame = got.end, got.next, got.last
		if i < len(numbers)-1 {
			continue
		}
		if at, found := laterFrame(b[g.end:], g.Salt, s.nextFrame); found {
			return fmt.Errorf("%w: %s is damaged at byte %d, before a whole record at %d", ErrCorrupt, segmentName(n), g.end, g.end+int64(at))
		}
	}
	first := s.segments[0].Number
	if first > oldest {
		return fmt.Errorf("%w: %s is missing", ErrCorrupt, segmentName(oldest))
	}
	if err := s.buildTree(&tree, oldest); err != nil {
		return err
	}
	return s.index(results, settled, oldest)
}

// openSegment reads a segment and its head into b.
func (s *Store) openSegment(n uint64, b *[]byte) (*segment, error) {
	f, err := s.disk.open(segmentName(n))
	if err != nil {
		return nil, err
	}
	if *b, err = readAll(f, *b); err == nil {
		g := &segment{f: f, size: int64(len(*b))}
		if g.head, err = decodeHead(*b); err == nil {
			return g, nil
		}
	}
	_ = f.Close() // the error before says more
	return nil, err
}

// index makes lists and counts of what was read. Nothing that counts is in a
// segment before oldest; those are given back.
func (s *Store) index(results, settled []item, oldest uint64) error {
	keep := func(list []item, state Known) queue {
		list = slices.DeleteFunc(list, func(i item) bool { e := s.jobs[i.id]; return e.state != state || e.num != i.num })
		slices.SortFunc(list, func(a, b item) int { return cmp.Compare(a.num, b.num) })
		list = slices.CompactFunc(list, func(a, b item) bool { return a.num == b.num })
		return queue{items: slices.Clone(list)} // of its own size
	}
	for id, e := range s.jobs {
		switch {
		case e.seg < oldest && e.state != Settled:
			return fmt.Errorf("%w: job %s is in %s, which was given back", ErrCorrupt, id, segmentName(e.seg))
		case e.seg < oldest, e.state == Settled && e.num <= s.forgotten:
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
	s.outbox, s.settled = keep(results, Done), keep(settled, Settled)
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
