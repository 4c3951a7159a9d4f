package faults

import (
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net/http"
	"sync"
	"time"

	"github.com/resultity/node/internal/receipt"
	"github.com/resultity/node/test/bench/instant"
	"github.com/resultity/node/test/model"
	"github.com/resultity/node/test/stack"
)

const (
	clients = 3
	pace    = 40 * time.Millisecond // between one client's requests
	limit   = 90 * time.Second      // for one answer

	nextSession = 20 * time.Second // of a node, at most
)

// Load is clients that ask without pause, plain and streamed by turns, and
// compare every answer.
type Load struct {
	s    *stack.Stack
	stop context.CancelFunc
	wg   sync.WaitGroup

	asking sync.RWMutex // read-locked by each client that waits for an answer

	mu      sync.Mutex // guards what follows
	tally   Tally
	answers map[string][sha256.Size]byte // bodies that were not checked yet, by receipt
	twice   int                          // receipts that came for a second answer
	all     map[string]struct{}          // receipts of all answers
	changed chan struct{}                // closed and replaced with every answer
	last    map[string]time.Time         // when the request was sent that a node answered last
}

// Tally counts requests.
type Tally struct {
	Sent     int
	Answered int   // whole, and right
	Refused  int   // with an error of the API, or not taken at all
	Broken   int   // ended in the middle
	Wrong    int   // not the answer that there is
	First    error // about the first that was not answered
}

// Add counts another tally's requests, too.
func (t *Tally) Add(o *Tally) {
	t.Sent += o.Sent
	t.Answered += o.Answered
	t.Refused += o.Refused
	t.Broken += o.Broken
	t.Wrong += o.Wrong
	t.First = cmp.Or(t.First, o.First)
}

func (t *Tally) String() string {
	s := fmt.Sprintf("%d sent, %d answered, %d refused, %d broken off, %d wrong", t.Sent, t.Answered, t.Refused, t.Broken, t.Wrong)
	if t.First != nil {
		s += fmt.Sprintf("; the first: %v", t.First)
	}
	return s
}

func newLoad(s *stack.Stack) *Load {
	ctx, stop := context.WithCancel(context.Background())
	l := &Load{s: s, stop: stop, answers: map[string][sha256.Size]byte{}, all: map[string]struct{}{}, changed: make(chan struct{}), last: map[string]time.Time{}}
	for i := range clients {
		l.wg.Go(func() { l.client(ctx, i) })
	}
	return l
}

// Stop ends the clients.
func (l *Load) Stop() {
	l.stop()
	l.wg.Wait()
}

// Quiet keeps the clients from asking once they have their answers, until
// resume is called.
func (l *Load) Quiet() (resume func()) {
	l.asking.Lock()
	return l.asking.Unlock
}

// Take returns what was counted since the last call.
func (l *Load) Take() Tally {
	l.mu.Lock()
	defer l.mu.Unlock()
	t := l.tally
	l.tally = Tally{}
	return t
}

// Answers returns how many answers there have been, and forgets them once they
// have been checked: each has a receipt, which is for its very bytes.
func (l *Load) Answers(ctx context.Context) (int, error) {
	l.mu.Lock()
	all := l.answers
	l.answers = map[string][sha256.Size]byte{}
	l.mu.Unlock()
	for id, sum := range all {
		res, raw, err := l.s.Do(ctx, http.MethodGet, "/v1/receipts/"+id, nil)
		// After the death of the service a node sends it in its next session.
		for end := time.Now().Add(nextSession); err == nil && res.StatusCode == http.StatusNotFound && time.Now().Before(end); {
			if err = pause(ctx, 100*time.Millisecond); err == nil {
				res, raw, err = l.s.Do(ctx, http.MethodGet, "/v1/receipts/"+id, nil)
			}
		}
		if err != nil {
			return 0, err
		}
		if res.StatusCode != http.StatusOK {
			return 0, fmt.Errorf("receipt %s of an answer: %s: %s", id, res.Status, raw)
		}
		signed, err := receipt.Verify(raw)
		if err != nil {
			return 0, fmt.Errorf("receipt %s: %w", id, err)
		}
		if got := signed.Receipt().Measured.ResponseHash; got.Hex() != fmt.Sprintf("%x", sum) {
			return 0, fmt.Errorf("receipt %s is for another answer than the one that came", id)
		}
	}
	return len(all), nil
}

// WaitAnswerOf waits until the node has answered a request that was sent after
// now.
func (l *Load) WaitAnswerOf(ctx context.Context, node string) error {
	now := time.Now()
	for {
		l.mu.Lock()
		at, changed := l.last[node], l.changed
		l.mu.Unlock()
		if at.After(now) {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return fmt.Errorf("no answer by %s: %w", node, ctx.Err())
		}
	}
}

func (l *Load) client(ctx context.Context, number int) {
	tick := time.NewTicker(pace)
	defer tick.Stop()
	for n := number; ; n++ {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		l.asking.RLock()
		begin := time.Now()
		id, node, sum, err := l.ask(ctx, n%2 == 0)
		if ctx.Err() == nil { // else it may have been cut short by that
			l.count(id, node, sum, begin, err)
		}
		l.asking.RUnlock()
	}
}

func (l *Load) count(id, node string, sum [sha256.Size]byte, begin time.Time, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.tally.Sent++
	switch {
	case err == nil:
		l.tally.Answered++
		if _, again := l.all[id]; again {
			l.twice++
		}
		l.all[id] = struct{}{}
		l.answers[id] = sum
		l.last[node] = begin
		close(l.changed)
		l.changed = make(chan struct{})
	case errors.Is(err, errUnproved): // the service may have died behind its answer, but must have it after that
		l.all[id] = struct{}{}
		l.answers[id] = sum
		l.tally.Refused++
	case errors.Is(err, errWrong):
		l.tally.Wrong++
	case errors.Is(err, errBroken):
		l.tally.Broken++
	default:
		l.tally.Refused++
	}
	if err != nil && l.tally.First == nil {
		l.tally.First = err
	}
}

var (
	errWrong  = errors.New("wrong answer")
	errBroken = errors.New("broken off")

	errUnproved = errors.New("no receipt yet")
)

// request is what clients ask.
func request(stream bool) map[string]any {
	return map[string]any{
		"model": model.Name, "stream": stream, "temperature": 0, "max_tokens": tokens,
		"messages": []map[string]string{{"role": "user", "content": "x"}},
	}
}

// ask asks once, and returns the receipt, the node that signed it, and the hash
// of the body.
func (l *Load) ask(ctx context.Context, stream bool) (id, node string, sum [sha256.Size]byte, err error) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	res, err := l.s.Open(ctx, http.MethodPost, "/v1/chat/completions", request(stream))
	if err != nil {
		return "", "", sum, err
	}
	defer res.Body.Close() // read to its end below
	raw, err := io.ReadAll(io.LimitReader(res.Body, 1<<20))
	switch {
	case err != nil:
		return "", "", sum, fmt.Errorf("%w: %w", errBroken, err)
	case res.StatusCode != http.StatusOK:
		return "", "", sum, fmt.Errorf("%s: %.300s", res.Status, raw)
	}
	text, done := instant.Read(raw, stream)
	switch {
	case stream && !done: // ended in order, with an error event or without a word
		return "", "", sum, fmt.Errorf("%w: %.300s", errBroken, tail(raw))
	case text != instant.Text(tokens):
		return "", "", sum, fmt.Errorf("%w: %q", errWrong, text)
	}
	id = res.Header.Get("Resultity-Receipt")
	sum = sha256.Sum256(raw)
	got, raw2, err := l.s.Do(ctx, http.MethodGet, "/v1/receipts/"+id, nil)
	if err != nil {
		return id, "", sum, fmt.Errorf("%w: %w", errUnproved, err)
	}
	if got.StatusCode != http.StatusOK {
		return id, "", sum, fmt.Errorf("%w: %s: %.300s", errUnproved, got.Status, raw2)
	}
	signed, err := receipt.Verify(raw2)
	if err != nil {
		return "", "", sum, fmt.Errorf("%w: receipt: %w", errWrong, err)
	}
	return id, signed.Receipt().Node.Hex(), sum, nil
}

func tail(b []byte) []byte { return b[max(0, len(b)-300):] }
