package state

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/resultity/node/internal/evm"
	"github.com/resultity/node/internal/failpoint"
	"github.com/resultity/node/internal/receipt"
	"github.com/resultity/node/internal/receiptlog"
	"github.com/resultity/node/internal/wire"
)

// change is one caller's part of a commit. A commit costs one sync whatever it
// holds, so callers that arrive during one share the next.
type change struct {
	// do writes records to the batch, or returns an error and has written
	// nothing. It runs with Store.mu held, again after a [*noRoom].
	do   func(*batch) error
	err  error
	turn chan bool // true: write the next commit; false: err is the outcome
}

// noRoom is what [batch.room] wants before a record can be written.
type noRoom struct {
	bytes   int64 // of the record
	reserve int64 // that must be left for others; below 0 for who may use it
}

func (w *noRoom) Error() string { return fmt.Sprintf("no room for a record of %d bytes", w.bytes) }

// The room that is kept free, so that an accepted job can be ended and a result
// acknowledged whatever the disk says.
const (
	// failureSize is the most that the text of a failed result takes.
	failureSize = 2 << 10
	// failureRoom and ackRoom are those of records with frames of their own.
	failureRoom = failureSize + resultPrefix + recordHead + frameHead + frameAlign
	ackRoom     = itemSize + recordHead + frameHead + frameAlign
	// ackGroup ids are one record, which is smaller than a failure's.
	ackGroup = 48
	// edge may be left at the end of a segment, by such a record that did not fit.
	edge = failureRoom
)

func reserve(accepted, results int) int64 {
	return int64(accepted)*(failureRoom+ackRoom) + int64(results)*ackRoom
}

// available is what is there for the records that room is kept for: free bytes
// in the current segment, and spares but one, which is for [Store.clean].
func (s *Store) available(free int64, spares int) int64 {
	return max(0, free-edge) + int64(max(0, spares-1))*(s.segmentSize-headRoom-edge)
}

// batch is a commit as it comes to be.
type batch struct {
	s     *Store
	frame []byte
	at    int64  // of the frame in the current segment
	free  int64  // in it
	seg   uint64 // number of the current segment
	then  []func()
	acks  int // of Store.acks that are in it

	// What those before in the same batch will have changed.
	jobs       map[receipt.JobID]entry
	accepted   int
	results    int
	bytes      int64
	registered *wire.Registered
	finished   uint64          // last number of finishing
	adopted    *receiptlog.Log // the receipt log before leaves, where that is another one
	leaves     []evm.Hash      // what the receipt log gains
	closed     bool
}

func (s *Store) newBatch() *batch {
	cur := s.current()
	return &batch{s: s, frame: append(s.frame[:0], make([]byte, frameHead)...), at: cur.end, free: cur.size - cur.end, seg: cur.Number, registered: s.registered, finished: s.lastResult}
}

// lookup is what will be known of a job.
func (b *batch) lookup(id receipt.JobID) entry {
	if e, ok := b.jobs[id]; ok {
		return e
	}
	return b.s.jobs[id]
}

// set says what will be known of a job.
func (b *batch) set(id receipt.JobID, e entry) {
	if b.jobs == nil {
		b.jobs = map[receipt.JobID]entry{}
	}
	b.jobs[id] = e
	b.then = append(b.then, func() {
		b.s.weigh(b.s.jobs[id], -1)
		b.s.jobs[id] = e
		b.s.weigh(e, +1)
	})
}

// frameSize is the bytes of a frame with so many of records.
func frameSize(records int64) int64 { return aligned(frameHead + records) }

// room looks whether a record of n bytes fits in, with reserve bytes left for
// those that room is kept for; see [noRoom].
func (b *batch) room(n int, reserve int64) error {
	left := b.free - frameSize(int64(len(b.frame)-frameHead+recordHead+n))
	if left < 0 || reserve >= 0 && b.s.available(left, len(b.s.spares)) < reserve {
		return &noRoom{int64(n), reserve}
	}
	return nil
}

// put appends a record that has room, and returns where its last part begins.
func (b *batch) put(k kind, parts ...[]byte) (at uint32) {
	n := 0
	for _, p := range parts {
		n += len(p)
	}
	b.frame = append(b.frame, byte(k))
	b.frame = binary.BigEndian.AppendUint32(b.frame, uint32(n))
	for _, p := range parts {
		at = uint32(b.at) + uint32(len(b.frame))
		b.frame = append(b.frame, p...)
	}
	return at
}

// commit has do's records written, alone or with others', and returns when they
// are on disk or refused.
func (s *Store) commit(do func(*batch) error) error {
	c := &change{do: do, turn: make(chan bool, 1)}
	s.mu.Lock()
	s.queue = append(s.queue, c)
	first := !s.leading
	s.leading = true
	s.mu.Unlock()
	if !first && !<-c.turn {
		return c.err
	}
	s.mu.Lock()
	group := s.queue
	s.queue = nil
	s.mu.Unlock()
	s.write(group)
	for _, other := range group {
		if other != c {
			other.turn <- false
		}
	}
	s.tidy()
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.queue) > 0 {
		s.queue[0].turn <- true
	} else {
		s.leading = false
	}
	return c.err
}

// write commits the changes of the group, in one frame where they fit into one.
func (s *Store) write(group []*change) {
	fail := func(cs []*change, err error) {
		for _, c := range cs {
			if c.err == nil {
				c.err = err
			}
		}
	}
	for {
		var want *noRoom
		var in []*change
		s.mu.Lock()
		if err := s.unusable(); err != nil {
			s.mu.Unlock()
			fail(group, err)
			return
		}
		b := s.newBatch()
		acks := b.putAcks()
		if !errors.As(acks, &want) {
			for len(group) > 0 && !b.closed {
				c := group[0]
				if err := c.do(b); errors.As(err, &want) {
					break
				} else if err != nil {
					c.err = err
				}
				in, group = append(in, c), group[1:]
			}
		}
		s.mu.Unlock()
		if err := s.flush(b); err != nil {
			fail(in, err)
			fail(group, err)
			return
		}
		switch {
		case b.closed:
			fail(group, errClosed)
			return
		case want == nil:
			return
		}
		if err := s.ensure(want); err != nil {
			if acks != nil {
				fail(group, err) // what comes after an acknowledgement cannot go before it
				return
			}
			fail(group[:1], err)
			group = group[1:]
		}
	}
}

// flush makes a batch durable and then true.
func (s *Store) flush(b *batch) error {
	if len(b.frame) == frameHead {
		s.apply(b)
		return nil
	}
	cur := s.current()
	frame := sealFrame(b.frame, cur.Salt, s.nextFrame)
	if cap(frame) <= keepFrame {
		s.frame = frame
	}
	if _, err := cur.f.WriteAt(frame, b.at); err != nil {
		if !full(err) {
			return s.breakDown(err)
		}
		// The next frame goes to the same place. Nothing of this one may stay that
		// could be taken for a whole one.
		if _, err := cur.f.WriteAt(make([]byte, frameHead), b.at); err != nil {
			return s.breakDown(err)
		}
		return fmt.Errorf("%w: %w", ErrFull, err)
	}
	failpoint.Here("state.frame.written")
	if err := cur.f.sync(); err != nil {
		// What of it is on disk cannot be known, nor made sure of by another try:
		// the kernel may have dropped the pages.
		return s.breakDown(err)
	}
	failpoint.Here("state.frame.synced")
	cur.end += int64(len(frame))
	s.nextFrame++
	s.apply(b)
	return nil
}

func (s *Store) apply(b *batch) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, f := range b.then {
		f()
	}
	if b.adopted != nil {
		s.adopt(b.adopted, b.seg)
	}
	for _, leaf := range b.leaves {
		s.addLeaf(leaf, b.seg)
	}
	s.count.Accepted += b.accepted
	s.count.Results += b.results
	s.count.Bytes += b.bytes
	s.registered, s.lastResult = b.registered, b.finished
	s.acks = s.acks[:copy(s.acks, s.acks[b.acks:])]
	s.closed = s.closed || b.closed
}

// keepFrame is the largest room for a frame that is kept for the next one, in bytes.
// Busy nodes fill some hundred kilobytes of one.
const keepFrame = 512 << 10

// breakDown makes err everybody's.
func (s *Store) breakDown(err error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.broken = fmt.Errorf("%w: %w", ErrBroken, err)
	return s.broken
}

// unusable says why nothing can be written.
func (s *Store) unusable() error {
	if s.closed {
		return errClosed
	}
	return s.broken
}

// current is the segment that is written to.
func (s *Store) current() *segment { return s.segments[len(s.segments)-1] }

// ensure makes the room that w wants, or fails with [ErrFull].
func (s *Store) ensure(w *noRoom) error {
	size := frameSize(recordHead + w.bytes)
	if size > maxSegment-headRoom-4096 {
		return fmt.Errorf("%w: a record of %d bytes", ErrFull, w.bytes)
	}
	large := size > s.segmentSize-headRoom
	cleaned := 0
	for {
		cur := s.current()
		free, spares, next := cur.size-cur.end-size, len(s.spares), false
		if free < 0 {
			next = true
			if free = 0; !large {
				free, spares = s.segmentSize-headRoom-size, spares-1
			}
		}
		var err error
		if spares >= 0 && (w.reserve < 0 || s.available(free, spares) >= w.reserve) {
			if !next {
				return nil
			}
			if err = s.rotate(size); err == nil {
				return nil
			}
		} else if cleaned < 2 && !s.cleaning && s.wasteful() {
			// Before the log gets longer.
			var ok bool
			if ok, err = s.clean(); ok {
				cleaned++
				continue
			}
			if err == nil {
				err = s.addSpare()
			}
		} else {
			err = s.addSpare()
		}
		if err == nil {
			continue
		}
		if !full(err) {
			return err
		}
		// What is settled gives its room back.
		ok := false
		if !s.cleaning && cleaned <= len(s.segments) && s.garbage() >= s.segmentSize {
			var cerr error
			if ok, cerr = s.clean(); cerr != nil && !errors.Is(cerr, ErrFull) {
				return cerr
			}
			cleaned++
		}
		if !ok {
			return fmt.Errorf("%w: the disk of %s has no %d bytes left: %w", ErrFull, s.path, s.segmentSize, err)
		}
	}
}

// addSpare has the disk set aside one more segment.
func (s *Store) addSpare() error {
	s.lastSpare++
	name := spareName(s.lastSpare)
	f, err := makeFile(s.disk, name, s.segmentSize)
	if err != nil {
		return fmt.Errorf("make %s: %w", name, err)
	}
	failpoint.Here("state.spare.made")
	s.setSpares(append(s.spares, spare{name, f}))
	return nil
}

// setSpares changes what [batch.room] looks at.
func (s *Store) setSpares(spares []spare) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.spares = spares
}

// rotate makes the next segment, for a frame of size bytes and more.
func (s *Store) rotate(size int64) (err error) {
	var next spare
	total := s.segmentSize
	if headRoom+size > total {
		total = (headRoom + size + 4095) &^ 4095
		s.lastSpare++
		next.name = spareName(s.lastSpare)
		if next.f, err = makeFile(s.disk, next.name, total); err != nil {
			return fmt.Errorf("make %s: %w", next.name, err)
		}
		defer func() {
			if err != nil {
				_, _ = next.f.Close(), s.disk.remove(next.name) // the error before says more
			}
		}()
	} else {
		if len(s.spares) == 0 {
			return fmt.Errorf("%w: no segment is left", ErrFull)
		}
		next = s.spares[len(s.spares)-1]
	}
	cur := s.current()
	g := &segment{f: next.f, size: total, end: headRoom}
	s.mu.Lock()
	g.head = head{
		Number: cur.Number + 1, Salt: newSalt(), Frame: s.nextFrame, Results: s.lastResult, Settled: s.lastSettled,
		Forgotten: s.forgotten, Oldest: s.segments[0].Number, Acked: s.tree.acked, Blind: s.blind, Registered: s.registered,
	}
	s.mu.Unlock()
	if err := startSegment(s.disk, next.name, g); full(err) {
		return err
	} else if err != nil {
		return s.breakDown(err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.segments = append(s.segments, g)
	if total == s.segmentSize {
		s.spares = s.spares[:len(s.spares)-1]
	}
	return nil
}

// startSegment writes the head of a segment and gives its file the final name:
// under that, the head is always whole.
func startSegment(d disk, name string, g *segment) error {
	b, err := g.head.encode()
	if err != nil {
		return err
	}
	if _, err := g.f.WriteAt(b, 0); err != nil {
		return err
	}
	if err := g.f.sync(); err != nil {
		return fmt.Errorf("%w: %w", errSync, err)
	}
	failpoint.Here("state.segment.synced")
	if err := d.rename(name, segmentName(g.Number)); err != nil {
		return err
	}
	failpoint.Here("state.segment.renamed")
	if err := d.sync(); err != nil {
		return fmt.Errorf("%w: %w", errSync, err)
	}
	return nil
}

// errSync says that it was a sync that failed. Even where it names a full disk,
// one may not try again.
var errSync = errors.New("sync")
