package nodes

import (
	"container/list"
	"sync"
	"sync/atomic"
	"time"

	"github.com/gorilla/websocket"
)

// places bounds the frames of one class of size that may arrive or be handled at
// once, over all sessions. A session that finds none waits for its turn. While some
// wait, who has a place has to be quick: hostile nodes, each of them as slow as it
// may be, would have all of them else. Safe for concurrent use.
type places struct {
	grace time.Duration // before a frame is called slow
	rate  float64       // bytes a second that one must have then, on average
	look  time.Duration // of each that waits, at those that have places

	mu      sync.Mutex // guards what follows, for the length of a walk through held
	free    int
	waiting list.List // of *stay, the longest first
	held    map[*stay]struct{}
}

// stay is a session's place.
type stay struct {
	s     *session
	given chan struct{} // closed once it has the place
	begun time.Time     // when it was given
	read  atomic.Int64  // bytes since
	whole atomic.Bool   // the frame is here: how long it takes now is not the node's fault
	told  bool          // to go; guarded by places.mu
}

func newPlaces(n int) *places {
	return &places{grace: 5 * time.Second, rate: 256 << 10, look: time.Second, free: max(1, n), held: map[*stay]struct{}{}}
}

// take waits for a place. The node waits, too: nothing of it is read meanwhile, so
// it is sent pings as signs of life. It fails when the session is to end.
func (p *places) take(s *session) (*stay, error) {
	t := &stay{s: s, given: make(chan struct{})}
	p.mu.Lock()
	at := p.waiting.PushBack(t)
	p.give()
	p.mu.Unlock()
	look := time.NewTicker(p.look)
	defer look.Stop()
	for ping := 1; ; ping++ {
		select {
		case <-t.given:
			return t, nil
		case <-s.stop:
			p.mu.Lock()
			p.waiting.Remove(at) // nothing, if it has been given a place
			p.mu.Unlock()
			p.leave(t)
			return nil, errOver
		case <-look.C:
			p.hurry()
			if ping%4 == 0 {
				_ = s.conn.WriteControl(websocket.PingMessage, nil, s.until(p.look)) // the writer finds out that it is lost
			}
		}
	}
}

// leave gives a place back, if there is one.
func (p *places) leave(t *stay) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if _, ok := p.held[t]; ok {
		delete(p.held, t)
		p.free++
		p.give()
	}
}

// give gives free places to who waits. The caller holds mu.
func (p *places) give() {
	for p.free > 0 && p.waiting.Len() > 0 {
		t := p.waiting.Remove(p.waiting.Front()).(*stay)
		t.begun = time.Now()
		p.held[t] = struct{}{}
		p.free--
		close(t.given)
	}
}

// hurry ends the slowest session that has a place and is too slow, unless as many
// have been told to go as there are that wait.
func (p *places) hurry() {
	p.mu.Lock()
	defer p.mu.Unlock()
	var slowest *stay
	least, going := p.rate, 0
	for t := range p.held {
		since := time.Since(t.begun)
		rate := float64(t.read.Load()) / since.Seconds()
		switch {
		case t.told:
			going++
		case since >= p.grace && rate < least && !t.whole.Load():
			slowest, least = t, rate
		}
	}
	if slowest != nil && going < p.waiting.Len() {
		slowest.told = true
		slowest.s.end(websocket.ClosePolicyViolation, "late", "a large frame arrives slowly, and others wait for its place")
	}
}
