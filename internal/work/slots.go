package work

import (
	"context"
	"sync"
	"time"
)

// Slots are the places of the one engine of a machine, shared out among the
// workers of the networks that it serves. Each takes any free one, but a network
// that has had a job within the last minute finds one for its next: as long as
// there are as many slots as such networks, none is shut out by the others.
// Without any other network in the last minute, one has them all.
//
// Its methods are safe for concurrent use and do not wait, but for Hold.
type Slots struct {
	mu      sync.Mutex // guards what follows; workers' own are never taken under it
	users   map[*Worker]*user
	held    int           // by Hold
	waiting int           // in Hold
	changed chan struct{} // closed and replaced when a slot is given back
}

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
		taken := s.held
		for _, u := range s.users {
			taken += u.busy
		}
		changed := s.changed
		if taken < limit {
			s.waiting--
			s.held++
			s.mu.Unlock()
			return s.release, nil
		}
		s.mu.Unlock()
		select {
		case <-changed:
		case <-ctx.Done():
			s.mu.Lock()
			s.waiting--
			s.mu.Unlock()
			return nil, ctx.Err()
		}
		s.mu.Lock()
	}
}

func (s *Slots) release() {
	s.mu.Lock()
	s.held--
	s.changedLocked()
	others := s.othersLocked(nil)
	s.mu.Unlock()
	for _, o := range others {
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
