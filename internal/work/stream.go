package work

import (
	"sync"

	"github.com/resultity/node/internal/receipt"
	"github.com/resultity/node/internal/wire"
)

// maxChunk bounds the bytes of one chunk, so that other jobs' chunks find their
// way between them.
const maxChunk = 64 << 10

// stream passes a response body on while it grows. What finds no room, or no
// session, waits for what comes next and goes out together with it; what comes
// last may not go out at all, since the result has everything.
type stream struct {
	job  receipt.JobID
	send func(wire.Message) error // does not wait for a chunk

	mu   sync.Mutex // guards what follows
	body []byte     // only grows: chunks point into it
	sent int
}

// write takes the next bytes. It does not keep b.
func (s *stream) write(b []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.body = append(s.body, b...)
	s.flush()
}

// again sends everything from the beginning, for a network that may have missed
// some of it.
func (s *stream) again() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.sent = 0
	s.flush()
}

func (s *stream) flush() {
	for s.sent < len(s.body) {
		n := min(maxChunk, len(s.body)-s.sent)
		if s.send(&wire.Chunk{Job: s.job, Offset: int64(s.sent), Data: s.body[s.sent : s.sent+n : s.sent+n]}) != nil {
			return
		}
		s.sent += n
	}
}

// sofar returns what has been taken.
func (s *stream) sofar() []byte {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.body
}
