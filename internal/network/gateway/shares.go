package gateway

import "sync"

// shares bounds how much of one thing clients hold, all and each: the bytes of requests
// that are still arriving, where many slow clients could exhaust the memory, and proofs that are
// being made. Safe for concurrent use.
type shares struct {
	max, share int64 // of all, and of one client

	mu   sync.Mutex // guards what follows
	held int64
	of   map[string]int64 // by client
}

func newShares(max, share int64) *shares {
	return &shares{max: max, share: share, of: map[string]int64{}}
}

// begin takes room for n of a client and reports whether there was any.
// One request may be larger than the bounds when it is alone. The room is given
// back by end, with the same arguments.
func (u *shares) begin(client string, n int64) bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	its := u.of[client]
	if u.held > 0 && u.held+n > u.max || its > 0 && its+n > u.share {
		return false
	}
	u.held += n
	u.of[client] = its + n
	return true
}

func (u *shares) end(client string, n int64) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.held -= n
	if u.of[client] -= n; u.of[client] == 0 {
		delete(u.of, client)
	}
}
