package model

import (
	"context"
	"sync"
)

// keyed is a set of locks by name whose waiting ends with a context. The zero
// value is ready.
type keyed struct {
	mu   sync.Mutex // guards held and the counts in it
	held map[string]*keyedLock
}

type keyedLock struct {
	token chan struct{} // full while somebody has the lock
	users int           // holder and waiters
}

// lock waits for the lock of name and returns what releases it.
func (k *keyed) lock(ctx context.Context, name string) (unlock func(), err error) {
	k.mu.Lock()
	l := k.held[name]
	if l == nil {
		if k.held == nil {
			k.held = map[string]*keyedLock{}
		}
		l = &keyedLock{token: make(chan struct{}, 1)}
		k.held[name] = l
	}
	l.users++
	k.mu.Unlock()

	leave := func() {
		k.mu.Lock()
		defer k.mu.Unlock()
		if l.users--; l.users == 0 {
			delete(k.held, name)
		}
	}
	select {
	case l.token <- struct{}{}:
		return func() { <-l.token; leave() }, nil
	case <-ctx.Done():
		leave()
		return nil, ctx.Err()
	}
}
