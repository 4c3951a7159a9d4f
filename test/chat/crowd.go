package chat

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/resultity/node/internal/digest"
)

// Crowd is clients that ask without pause, plain and streamed by turns, and keep
// what they got.
type Crowd struct {
	client  *Client
	request Request
	stop    chan struct{} // closed by Stop
	stopped sync.Once
	wg      sync.WaitGroup

	asking sync.RWMutex // read-locked by each client that waits for an answer

	mu      sync.Mutex // guards what follows
	tally   Tally
	kept    map[string]kept      // by receipt
	last    map[string]time.Time // when the request was sent that a node answered last; "" is any node
	failed  error                // about the last that was not answered
	changed chan struct{}        // closed and replaced with every answer
}

// kept is what is known of an answer that came.
type kept struct {
	sent     time.Time
	response digest.Digest
}

// Tally counts requests.
type Tally struct {
	Sent     int
	Answered int   // whole, right, and with a receipt
	Late     int   // of those, by when their receipts came
	Refused  int   // with an error of the API, or not taken at all
	Broken   int   // ended in the middle
	Wrong    int   // an answer that must not be
	Twice    int   // answers whose receipt was another answer's
	First    error // about the first that was wrong, or else that was not answered
}

// Add counts another tally's requests, too.
func (t *Tally) Add(o *Tally) {
	if t.First == nil || t.Fault() == nil && o.Fault() != nil {
		t.First = o.First
	}
	t.Sent += o.Sent
	t.Answered += o.Answered
	t.Late += o.Late
	t.Refused += o.Refused
	t.Broken += o.Broken
	t.Wrong += o.Wrong
	t.Twice += o.Twice
}

// Fault is what must never be, whatever was broken.
func (t *Tally) Fault() error {
	if t.Wrong+t.Twice == 0 {
		return nil
	}
	return fmt.Errorf("%d wrong answers, %d twice; the first: %w", t.Wrong, t.Twice, t.First)
}

func (t *Tally) String() string {
	s := fmt.Sprintf("%d sent, %d answered (%d receipts late), %d refused, %d broken off, %d wrong, %d twice", t.Sent, t.Answered, t.Late, t.Refused, t.Broken, t.Wrong, t.Twice)
	if t.First != nil {
		s += fmt.Sprintf("; the first: %v", t.First)
	}
	return s
}

// Crowd has so many clients ask the same, each one pace after it was answered, until
// Stop or ctx ends.
func (c *Client) Crowd(ctx context.Context, clients int, pace time.Duration, r Request) *Crowd {
	crowd := &Crowd{client: c, request: r, stop: make(chan struct{}), kept: map[string]kept{}, last: map[string]time.Time{}, changed: make(chan struct{})}
	for i := range clients {
		crowd.wg.Go(func() { crowd.ask(ctx, i, pace) })
	}
	return crowd
}

// Stop ends the clients when they have their answers.
func (c *Crowd) Stop() {
	c.stopped.Do(func() { close(c.stop) })
	c.wg.Wait()
}

func (c *Crowd) ask(ctx context.Context, number int, pace time.Duration) {
	for n := number; ; n++ {
		select {
		case <-ctx.Done():
			return
		case <-c.stop:
			return
		case <-time.After(pace):
		}
		r := c.request
		r.Stream = n%2 == 0
		c.asking.RLock()
		_, _ = c.Ask(ctx, r) // it is counted
		c.asking.RUnlock()
	}
}

// Ask asks once more, as one of the clients.
func (c *Crowd) Ask(ctx context.Context, r Request) (*Answer, error) {
	sent := time.Now()
	a, err := c.client.Ask(ctx, r)
	if err == nil || ctx.Err() == nil { // else it may have been cut short by that
		c.count(sent, a, err)
	}
	return a, err
}

func (c *Crowd) count(sent time.Time, a *Answer, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	var t Tally
	t.Sent, t.First = 1, err
	switch {
	case err == nil:
		t.Answered = 1
		if a.Late {
			t.Late = 1
		}
		r := a.Receipt.Receipt()
		id := r.Job.String()
		if _, again := c.kept[id]; again {
			t.Twice, t.First = 1, fmt.Errorf("%w: receipt %s was another answer's", ErrWrong, id)
		}
		c.kept[id] = kept{sent, r.Measured.ResponseHash}
		for _, by := range []string{"", strings.ToLower(r.Node.Hex())} {
			if sent.After(c.last[by]) {
				c.last[by] = sent
			}
		}
		close(c.changed)
		c.changed = make(chan struct{})
	case errors.Is(err, ErrWrong):
		t.Wrong = 1
	case errors.Is(err, ErrBroken):
		t.Broken = 1
	default:
		t.Refused = 1
	}
	if err != nil {
		c.failed = err
	}
	c.tally.Add(&t)
}

// Quiet waits until every client has its answer, and keeps them from asking again
// until resume is called.
func (c *Crowd) Quiet() (resume func()) {
	c.asking.Lock()
	return c.asking.Unlock
}

// Take returns what was counted since the last call.
func (c *Crowd) Take() Tally {
	c.mu.Lock()
	defer c.mu.Unlock()
	t := c.tally
	c.tally = Tally{}
	return t
}

// WaitAnswer waits until a request that is sent after now is answered, by the node
// if one is named.
func (c *Crowd) WaitAnswer(ctx context.Context, node string) error {
	now := time.Now()
	for {
		c.mu.Lock()
		at, changed, failed := c.last[strings.ToLower(node)], c.changed, c.failed
		c.mu.Unlock()
		if at.After(now) {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return fmt.Errorf("no answer by %q (%w); the last failure: %v", node, ctx.Err(), failed)
		}
	}
}

// Answers returns the receipts of all answers to requests that were sent since then.
func (c *Crowd) Answers(since time.Time) []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	var ids []string
	for id, k := range c.kept {
		if !k.sent.Before(since) {
			ids = append(ids, id)
		}
	}
	return ids
}

// Recheck asks once more for the receipts of all answers to requests that were sent
// since then. It returns how many there are, and how many of them the network has
// lost or exchanged, and about the first of those.
func (c *Crowd) Recheck(ctx context.Context, since time.Time) (all, lost int, first error) {
	ids := c.Answers(since)
	for end := time.Now().Add(receiptWithin); len(ids) > all; all++ {
		id := ids[all]
		_, signed, _, err := c.client.receipt(ctx, id, end)
		c.mu.Lock()
		k := c.kept[id]
		c.mu.Unlock()
		if err == nil && signed.Receipt().Measured.ResponseHash != k.response {
			err = fmt.Errorf("%w: receipt %s is for another answer than the one that came", ErrWrong, id)
		}
		if ctx.Err() != nil {
			return all, lost, err
		}
		if err != nil {
			lost++
			if first == nil {
				first = err
			}
		}
	}
	return all, lost, first
}
