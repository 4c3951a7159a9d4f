package gateway

import "sync"

// uploads bounds the memory for requests that are still arriving: many slow
// clients could exhaust it otherwise. Safe for concurrent use.
type uploads struct {
	max, share int64 // bytes of all, and of one client

	mu    sync.Mutex // guards what follows
	bytes int64
	of    map[string]int64 // by client
}

func newUploads(max int64, percent int) *uploads {
	return &uploads{max: max, share: max / 100 * int64(percent), of: map[string]int64{}}
}

// begin takes room for n bytes of a client and reports whether there was any.
// One request may be larger than the bounds when it is alone. The room is given
// back by end, with the same arguments.
func (u *uploads) begin(client string, n int64) bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	its := u.of[client]
	if u.bytes > 0 && u.bytes+n > u.max || its > 0 && its+n > u.share {
		return false
	}
	u.bytes += n
	u.of[client] = its + n
	return true
}

func (u *uploads) end(client string, n int64) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.bytes -= n
	if u.of[client] -= n; u.of[client] == 0 {
		delete(u.of, client)
	}
}
