package work

import (
	"context"
	"slices"
	"sync"
	"time"
)

// Slots are the places of the one engine of a machine, shared out among the
// workers of the networks that it serves. Each takes any free one, but a network
// that has had a job within the last minute finds one for its next: as long as
// there are as many slots as such networks, none is shut out by the others.
// Without any other network in the last minute, one has them all.
//
// Its methods are safe for concurrent use and do not wait, but for Hold, HoldAll and
// Borrow.
type Slots struct {
	mu      sync.Mutex // guards what follows; workers' own are never taken under it
	users   map[*Worker]*user
	held    int           // by Hold and HoldAll
	turns   uint64        // slots that were taken or lent ever
	waiting int           // in Hold
	loans   []*loan       // slots that Borrow has given, beside the taken ones
	lent    int           // of Borrow that have not been given back, recalled ones too
	changed chan struct{} // closed and replaced when a slot is given back
}

// loan is a slot that is used until somebody wants it.
type loan struct{ recall func() }

// user is what is known of a worker.
type user struct {
	serves bool // has a deployment that is active
	busy   int
	last   time.Time // it has taken a slot or given one back
}

// keepFor is how long a slot is kept for a network that has no job now.
const keepFor = time.Minute

// NewSlots returns slots of which none is taken.
func NewSlots() *Slots {
	return &Slots{users: map[*Worker]*user{}, changed: make(chan struct{})}
}

func (s *Slots) user(w *Worker) *user {
	u := s.users[w]
	if u == nil {
		u = &user{}
		s.users[w] = u
	}
	return u
}

// serve notes whether a worker may get jobs at all.
func (s *Slots) serve(w *Worker, on bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.user(w).serves = on
}

// freeLocked returns how many of limit slots a worker can take now.
func (s *Slots) freeLocked(w *Worker, limit int, now time.Time) int {
	taken, lively, kept := s.held, 1, 0
	for o, u := range s.users {
		taken += u.busy
		if o == w || !u.serves || u.busy == 0 && now.Sub(u.last) >= keepFor {
			continue
		}
		lively++
		if u.busy == 0 {
			kept++
		}
	}
	if lively > limit {
		kept = 0 // there is no slot for each
	}
	return max(0, limit-taken-kept-s.waiting)
}

// free returns how many of limit slots a worker can take now.
func (s *Slots) free(w *Worker, limit int, now time.Time) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.freeLocked(w, limit, now)
}

// take takes a slot if one is free for the worker.
func (s *Slots) take(w *Worker, limit int, now time.Time) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.freeLocked(w, limit, now) < 1 {
		return false
	}
	u := s.user(w)
	u.busy++
	u.last = now
	s.turns++
	s.recallLocked(limit)
	return true
}

// give gives a slot back.
func (s *Slots) give(w *Worker, now time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	u := s.user(w)
	u.busy--
	u.last = now
	s.changedLocked()
}

func (s *Slots) changedLocked() {
	close(s.changed)
	s.changed = make(chan struct{})
}

// Hold takes one of limit slots, the next that is given back where none is free,
// and returns what gives it back. It is for what the machine itself asks the
// engine beside jobs. It fails with ctx.
func (s *Slots) Hold(ctx context.Context, limit int) (release func(), err error) {
	s.mu.Lock()
	s.waiting++
	for {
		changed := s.changed
		if s.takenLocked() < limit {
			s.waiting--
			s.held++
			s.turns++
			s.recallLocked(limit)
			s.changedLocked() // Borrow leaves what is given back to who waits here, and there may be more of it
			s.mu.Unlock()
			s.tell()
			return func() { s.release(1) }, nil
		}
		s.mu.Unlock()
		select {
		case <-changed:
		case <-ctx.Done():
			s.mu.Lock()
			s.waiting--
			s.changedLocked() // who waits behind it may have looked at what was given back for it
			s.mu.Unlock()
			s.tell()
			return nil, ctx.Err()
		}
		s.mu.Lock()
	}
}

// HoldAll waits until nobody has any of limit slots, takes them all, and returns what
// gives them back: until then the engine has nothing to do but the caller's. No job
// waits for it or is refused before it has them, so that it may wait for long where
// there is much to do. It fails with ctx.
func (s *Slots) HoldAll(ctx context.Context, limit int) (release func(), err error) {
	s.mu.Lock()
	for held := false; ; s.mu.Lock() {
		changed := s.changed
		if !held && s.takenLocked() == 0 {
			held = true
			s.held += limit
			s.turns++
			s.recallLocked(limit)
		}
		idle := held && s.lent == 0
		s.mu.Unlock()
		if idle {
			s.tell()
			return func() { s.release(limit) }, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			if held {
				s.release(limit)
			}
			return nil, ctx.Err()
		}
	}
}

func (s *Slots) takenLocked() int {
	taken := s.held
	for _, u := range s.users {
		taken += u.busy
	}
	return taken
}

// Borrow waits for one of limit slots that nobody wants, and returns what gives
// it back. Jobs and Hold do not see that it is lent: where they leave none for it,
// recall is called, once, under a lock of Slots' own. Until what uses it has
// ended the engine then has one request more than slots. It fails with ctx.
func (s *Slots) Borrow(ctx context.Context, limit int, recall func()) (giveBack func(), err error) {
	l := &loan{recall}
	for {
		s.mu.Lock()
		changed := s.changed
		free := s.waiting == 0 && s.takenLocked()+len(s.loans) < limit
		if free {
			s.loans = append(s.loans, l)
			s.lent++
			s.turns++
		}
		s.mu.Unlock()
		if free {
			return func() { s.end(l) }, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

func (s *Slots) end(l *loan) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.lent--
	if i := slices.Index(s.loans, l); i >= 0 { // else it was recalled
		s.loans = slices.Delete(s.loans, i, i+1)
	}
	s.changedLocked()
}

// recallLocked recalls the loans that the taken slots leave no room for.
func (s *Slots) recallLocked(limit int) {
	for len(s.loans) > 0 && s.takenLocked()+len(s.loans) > limit {
		l := s.loans[0]
		s.loans = s.loans[1:]
		l.recall()
	}
}

// Alone begins to watch for company. The caller has own slots by Hold; still reports
// whether nobody else has used one, from the call of Alone until then.
func (s *Slots) Alone(own int) (still func() bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	first, turns := s.takenLocked()+s.lent <= own, s.turns
	return func() bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		return first && s.turns == turns
	}
}

func (s *Slots) release(n int) {
	s.mu.Lock()
	s.held -= n
	s.changedLocked()
	s.mu.Unlock()
	s.tell()
}

// tell has those who share the engine look at its slots again.
func (s *Slots) tell() {
	for _, o := range s.others(nil) {
		o.crowded()
	}
}

// others returns the workers that have an active deployment, too.
func (s *Slots) others(w *Worker) []*Worker {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.othersLocked(w)
}

func (s *Slots) othersLocked(w *Worker) (list []*Worker) {
	for o, u := range s.users {
		if o != w && u.serves {
			list = append(list, o)
		}
	}
	return list
}
