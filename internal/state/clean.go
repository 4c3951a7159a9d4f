package state

import (
	"fmt"

	"github.com/resultity/node/internal/failpoint"
	"github.com/resultity/node/internal/receipt"
)

// Segments are given back in the order in which they were written. So a record
// that undoes another one, which is always the later one, is never gone before
// it. What counts in the oldest segment is copied to the end of the log first.

// sizes of all segments but the current one, and of what counts in them.
func (s *Store) sizes() (size, live int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, g := range s.segments[:len(s.segments)-1] {
		size, live = size+g.size, live+g.live
	}
	return size, live
}

// wasteful reports whether more than half of the log does not count any more.
func (s *Store) wasteful() bool {
	size, live := s.sizes()
	return size > 2*live+2*s.segmentSize
}

func (s *Store) garbage() int64 {
	size, live := s.sizes()
	return size - live
}

// tidy gives back the segments in which nothing counts, except for a few that
// the next records will want.
func (s *Store) tidy() {
	s.mu.Lock()
	do := s.unusable() == nil && len(s.segments) > 2 && s.segments[0].live == 0
	s.mu.Unlock()
	if do {
		_, _ = s.clean() // it is tried again, and said, when the room is needed
	}
}

// clean gives back the oldest segment, and those after it in which nothing
// counts. It reports whether it could.
func (s *Store) clean() (done bool, err error) {
	s.cleaning = true
	defer func() { s.cleaning = false }()
	if len(s.segments) < 2 || s.unrepaired {
		return false, nil
	}
	s.mu.Lock()
	n := 0
	for n < len(s.segments)-1 && s.segments[n].live == 0 {
		n++
	}
	s.mu.Unlock()
	var group []*change
	if n == 0 {
		if group, err = s.evacuate(s.segments[0]); err != nil || group == nil {
			return false, err
		}
		n = 1
	}
	oldest := s.segments[n].Number
	last := &change{do: func(b *batch) error {
		for _, c := range group {
			if c.err != nil {
				return c.err
			}
		}
		if err := b.room(8, -1); err != nil {
			return err
		}
		b.put(kindOldest, number(oldest))
		return nil
	}}
	if s.write(append(group, last)); last.err != nil {
		return false, last.err
	}
	failpoint.Here("state.clean.copied")
	return true, s.retire(n)
}

// evacuate returns the changes that copy what counts in a segment, nil where
// that would take room that is kept for others.
func (s *Store) evacuate(g *segment) ([]*change, error) {
	b, err := readAll(g.f, nil)
	if err != nil {
		return nil, s.breakDown(err)
	}
	var group []*change
	var bytes int64
	add := func(k kind, parts ...[]byte) {
		n := 0
		for _, p := range parts {
			n += len(p)
		}
		bytes += recordHead + int64(n)
		group = append(group, &change{do: func(b *batch) error {
			if id := receipt.JobID(parts[0]); k == kindResult && b.lookup(id).state != Done {
				return nil // acknowledged meanwhile; behind that it would count again
			}
			if err := b.room(n, -1); err != nil {
				return err
			}
			at := b.put(k, parts...)
			switch k {
			case kindJob, kindResult:
				b.move(receipt.JobID(parts[0]), g, at)
			case kindSettled:
				for i := parts[0]; len(i) > 0; i = i[itemSize:] {
					b.move(receipt.JobID(i), g, 0)
				}
			}
			return nil
		}})
	}
	s.mu.Lock()
	got := scan(b[:g.end], g.Salt, g.frames(), func(k kind, at int64, body []byte) {
		counts := func(prefix int, state Known) bool {
			e := s.jobs[receipt.JobID(body)]
			return e.state == state && e.seg == g.Number && (prefix == 0 || int64(e.at) == at+int64(prefix))
		}
		switch {
		case k == kindJob && counts(jobPrefix, Running):
			add(k, body[:jobPrefix], body[jobPrefix:])
		case k == kindResult && counts(resultPrefix, Done):
			add(k, body[:resultPrefix], body[resultPrefix:])
		case k == kindSettled:
			var keep []byte
			for ; len(body) > 0; body = body[itemSize:] {
				i := readItem(body)
				if e := s.jobs[i.id]; e.state == Settled && e.num == i.num && e.seg == g.Number {
					keep = append(keep, body[:itemSize]...)
				}
			}
			if len(keep) > 0 {
				add(k, keep)
			}
		}
	})
	s.evacuateLeaves(g, func(r *run, text []byte) {
		bytes += recordHead + int64(len(text))
		group = append(group, &change{do: func(b *batch) error {
			if err := b.room(len(text), -1); err != nil {
				return err
			}
			b.put(kindLeaves, text)
			b.moveLeaves(r)
			return nil
		}})
	})
	s.mu.Unlock()
	if got.end != g.end {
		return nil, s.breakDown(fmt.Errorf("%w: %s at %d", ErrCorrupt, segmentName(g.Number), got.end))
	}
	cur := s.current()
	free, spares := cur.size-cur.end-frameSize(bytes)-ackRoom, len(s.spares)+1
	if free < 0 {
		free, spares = s.segmentSize-headRoom-frameSize(bytes)-ackRoom, spares-1
	}
	if g.size == s.segmentSize && (spares < 1 || s.available(free, spares) < s.reserved()) {
		return nil, nil
	}
	return group, nil
}

// move says that what is known of a job lies in this batch from now on.
func (b *batch) move(id receipt.JobID, from *segment, at uint32) {
	was := b.lookup(id)
	b.then = append(b.then, func() {
		e := b.s.jobs[id]
		if e != was || e.seg != from.Number {
			return // acknowledged meanwhile
		}
		b.s.weigh(e, -1)
		e.seg, e.at = b.seg, at
		b.s.jobs[id] = e
		b.s.weigh(e, +1)
	})
}

// reserved is the room that must be left now.
func (s *Store) reserved() int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return reserve(s.count.Accepted, s.count.Results)
}

// retire makes spares of the n oldest segments, or removes them.
func (s *Store) retire(n int) error {
	s.mu.Lock()
	old := s.segments[:n:n]
	s.segments = s.segments[n:]
	keep := 3 + int(reserve(s.count.Accepted, s.count.Results)/(s.segmentSize-headRoom-edge))
	s.mu.Unlock()
	s.reading.Lock() // whoever reads in them has done so
	//lint:ignore SA2001 to have waited is all
	s.reading.Unlock()
	for _, g := range old {
		if g.f == nil {
			continue
		}
		name := segmentName(g.Number)
		if g.size == s.segmentSize && len(s.spares) < keep {
			s.lastSpare++
			if to := spareName(s.lastSpare); s.disk.rename(name, to) == nil {
				s.setSpares(append(s.spares, spare{to, g.f}))
				continue
			}
		}
		// One that cannot be removed is passed over by the next start.
		_, _ = g.f.Close(), s.disk.remove(name)
	}
	failpoint.Here("state.retire.renamed")
	// Before a file is written to under another name than it would have again.
	if err := s.disk.sync(); err != nil {
		return s.breakDown(err)
	}
	return nil
}
