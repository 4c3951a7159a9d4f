package session

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/gorilla/websocket"

	"github.com/resultity/node/internal/evm"
	"github.com/resultity/node/internal/failpoint"
	"github.com/resultity/node/internal/receipt"
	"github.com/resultity/node/internal/wire"
)

// Bounds on what waits to be sent.
const (
	maxControl = 4096     // messages that are neither chunk nor result
	maxChunks  = 1 << 20  // bytes that may wait when a chunk is queued
	maxBulk    = 8 << 20  // bytes that may wait when a result is queued, unless it is alone
	maxJoined  = 64 << 10 // bytes of a chunk made of several: other jobs' chunks find their way between them
)

var errSlow = errors.New("the network does not take what is sent to it")

// keepBuffer is the largest buffer for frames that a link keeps, in bytes.
const keepBuffer = 128 << 10

// link is one connection: its queue and its end. The reader is the goroutine
// that made it.
type link struct {
	conn *websocket.Conn
	raw  *liveConn     // below conn
	done chan struct{} // closed when ended

	mu      sync.Mutex // guards what follows; held for list operations
	changed *sync.Cond // any of it changed
	control []wire.Message
	low     []wire.Message                // at most one batch of logs, which all else overtakes
	bulk    []wire.Message                // chunks, results and bye, in order
	bytes   int                           // of bulk, and of what is being written of it
	tails   map[receipt.JobID]*wire.Chunk // the last chunk of each job in bulk; ours to change
	opened  bool                          // the peer is known: there may be more than hello
	key     evm.Address                   // of the peer, once it is known
	leaving bool                          // nothing more may be queued
	ended   bool
	cause   error // of the end; the first one that is known
}

func newLink(conn *websocket.Conn, raw *liveConn) *link {
	l := &link{conn: conn, raw: raw, done: make(chan struct{}), tails: map[receipt.JobID]*wire.Chunk{}}
	l.changed = sync.NewCond(&l.mu)
	return l
}

func (l *link) send(m wire.Message) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	size := weight(m)
	switch m.(type) {
	case *wire.Chunk:
		if l.bytes+size > maxChunks && l.bytes > 0 {
			return ErrFull
		}
	case *wire.Logs:
		if len(l.low) > 0 {
			return ErrFull
		}
	case *wire.Result:
		for !l.leaving && !l.ended && l.bytes > 0 && l.bytes+size > maxBulk {
			l.changed.Wait()
		}
	default:
		if len(l.control) >= maxControl {
			l.endLocked(errSlow)
		}
	}
	if l.leaving || l.ended {
		return ErrNotConnected
	}
	switch c, ok := m.(*wire.Chunk); {
	case ok && l.join(c):
		return nil // the writer knows of the one that it is a part of
	case ok:
		own := *c
		own.Data = slices.Clip(own.Data) // the sender's, until something is joined to it
		l.tails[c.Job] = &own
		m = &own
		fallthrough
	case size > 0:
		l.bulk = append(l.bulk, m)
		l.bytes += size
	case m.Type() == (*wire.Logs)(nil).Type():
		l.low = append(l.low, m)
	default:
		l.control = append(l.control, m)
	}
	l.changed.Broadcast()
	return nil
}

// join makes a chunk a part of the one before it, if that still waits: while
// the writer is busy, one large frame grows and not a queue of small ones.
func (l *link) join(c *wire.Chunk) bool {
	tail := l.tails[c.Job]
	if tail == nil || tail.Offset+int64(len(tail.Data)) != c.Offset || len(tail.Data)+len(c.Data) > maxJoined {
		return false
	}
	tail.Data = append(tail.Data, c.Data...)
	l.bytes += len(c.Data)
	return true
}

// weight is what a message of the bulk counts in bytes, and 0 for all others.
func weight(m wire.Message) int {
	switch m := m.(type) {
	case *wire.Chunk:
		return 256 + len(m.Data)
	case *wire.Result:
		return 4096 + len(m.Message) + len(m.Response)
	case *wire.Bye:
		return 1 // it is the last word
	}
	return 0
}

// next waits for something to be written. It returns nil when the link has
// ended, or is leaving and everything has been said.
func (l *link) next() wire.Message {
	l.mu.Lock()
	defer l.mu.Unlock()
	for !l.ended {
		// Small messages overtake: they are what keeps a node's jobs coming,
		// and none of them needs to follow a chunk or a result.
		for _, q := range []*[]wire.Message{&l.control, &l.bulk, &l.low} {
			if len(*q) > 0 {
				m := (*q)[0]
				(*q)[0] = nil
				*q = (*q)[1:]
				if c, ok := m.(*wire.Chunk); ok && l.tails[c.Job] == c {
					delete(l.tails, c.Job)
				}
				return m
			}
		}
		if l.leaving {
			return nil
		}
		l.changed.Wait()
	}
	return nil
}

// write sends what is queued until the link ends, or until it is leaving and
// everything has been said; then it closes the session in order.
func (l *link) write(sealer *wire.Sealer, log *slog.Logger) error {
	var buf []byte
	for {
		m := l.next()
		if m == nil {
			l.closeFrame(websocket.CloseNormalClosure, "")
			return nil
		}
		frame, err := sealer.Seal(buf[:0], m)
		switch {
		case errors.Is(err, wire.ErrTooLarge):
			// Whoever queued it has a bound that is wrong; the others' messages
			// are not to suffer.
			log.Error("message cannot be sent", "type", m.Type(), "error", err)
		case err != nil:
			return fmt.Errorf("seal %s: %w", m.Type(), err)
		default:
			failpoint.Here("session.frame.sealed", m)
			if err := l.conn.WriteMessage(websocket.BinaryMessage, frame); err != nil {
				return l.why(err)
			}
			failpoint.Here("session.frame.written", m)
			if cap(frame) <= keepBuffer {
				buf = frame
			}
		}
		l.mu.Lock()
		l.bytes -= weight(m)
		l.changed.Broadcast()
		l.mu.Unlock()
	}
}

// ping asks for a sign of life until the link ends, and calls check each time. A
// ping that cannot be written is no concern of its own: the silence, or the
// writer, will tell.
func (l *link) ping(every time.Duration, check func()) {
	ticker := time.NewTicker(every)
	defer ticker.Stop()
	for {
		select {
		case <-l.done:
			return
		case <-ticker.C:
			check()
			_ = l.conn.WriteControl(websocket.PingMessage, nil, time.Now().Add(every))
		}
	}
}

// open says that the peer is known: it has signed with this key.
func (l *link) open(key evm.Address) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.opened, l.key = true, key
}

// signer returns the peer's key, and whether it is known.
func (l *link) signer() (evm.Address, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.key, l.opened
}

// goodbye has the link say what is queued, and bye, and then end, all within
// the time given.
func (l *link) goodbye(within time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.leaving || l.ended {
		return
	}
	if l.opened {
		l.bulk = append(l.bulk, &wire.Bye{Reason: "the agent stops"}) // behind everything
	}
	l.low = nil // the next session sends it
	l.leaving = true
	l.changed.Broadcast()
	time.AfterFunc(within, func() { l.end(nil) })
}

// closeFrame tells the peer that nothing more comes. It may be gone already.
func (l *link) closeFrame(code int, text string) {
	_ = l.conn.WriteControl(websocket.CloseMessage, websocket.FormatCloseMessage(code, text), time.Now().Add(time.Second))
}

// blame decides why the link is about to end, unless that is decided. Whoever
// tells the peer before calling end calls it first: the peer's answer would
// seem to be the reason otherwise.
func (l *link) blame(err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.cause == nil && !l.ended {
		l.cause = err
	}
}

// end ends the link. The first call decides why.
func (l *link) end(err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.endLocked(err)
}

func (l *link) endLocked(err error) {
	if l.ended {
		return
	}
	l.ended = true
	if l.cause == nil {
		l.cause = err
	}
	close(l.done)
	l.changed.Broadcast()
	_ = l.raw.Close() // not TLS's Close, which would still want to write
}

// why turns an error of the connection into what is behind it.
func (l *link) why(err error) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.cause != nil {
		return l.cause
	}
	var closed *websocket.CloseError
	var timeout net.Error
	switch {
	case errors.As(err, &closed) && closed.Code == websocket.CloseAbnormalClosure: // the library's word for an end without a close frame
	case errors.As(err, &closed):
		text := fmt.Errorf("the network ended the session: %d %.120q", closed.Code, closed.Text)
		if clock := saysClock(closed.Text); clock != nil {
			return fmt.Errorf("%w: %w", clock, text)
		}
		if closed.Code == wire.CloseCloned {
			return fmt.Errorf("%w: %w", ErrCloned, text)
		}
		if closed.Code == websocket.ClosePolicyViolation || closed.Code == websocket.CloseMessageTooBig {
			return fmt.Errorf("%w: %w", ErrBlamed, text)
		}
		return text
	case errors.Is(err, os.ErrDeadlineExceeded), errors.As(err, &timeout) && timeout.Timeout():
		return fmt.Errorf("%w: %w", ErrSilent, err)
	}
	return fmt.Errorf("the connection ended: %w", err)
}
