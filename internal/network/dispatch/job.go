package dispatch

import (
	"bytes"
	"container/list"
	"context"
	"errors"
	"io"
	"time"

	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/evm"
	"github.com/resultity/node/internal/network/store"
	"github.com/resultity/node/internal/receipt"
	"github.com/resultity/node/internal/wire"
)

// Outcome is how a job ended. It is a metric's label.
type Outcome string

// The outcomes.
const (
	OK        Outcome = "ok"
	QueueFull Outcome = "queue_full" // not taken
	NoNode    Outcome = "no_node"    // no node to give it to
	Refused   Outcome = "refused"    // two nodes say that it cannot be done, or the only one
	Failed    Outcome = "failed"     // every attempt failed
	Deadline  Outcome = "deadline"   // not finished in time
	Diverged  Outcome = "diverged"   // the stream could not be continued by another node
	Cancelled Outcome = "cancelled"  // the client has gone
	Withdrawn Outcome = "withdrawn"  // the model is no longer served
	Closing   Outcome = "closing"    // the service stops
	Storage   Outcome = "storage"    // it could not be written down
)

// Failure is why a job has no result. Message is for the client, and never a
// node's text.
type Failure struct {
	Outcome Outcome
	Code    wire.Code // of the node that had it last, or ""
	Message string
}

func (f *Failure) Error() string { return f.Message }

// Reason is why a job was taken from a node. It is a metric's label.
type Reason string

// The reasons.
const (
	SessionLost  Reason = "session_lost"
	Silent       Reason = "no_heartbeat"
	NotAccepted  Reason = "not_accepted"
	Stalled      Reason = "stalled"
	NodeRefused  Reason = "refused"
	NodeFailed   Reason = "failed"
	Violation    Reason = "violation"
	Contradicted Reason = "diverged"
)

// endMark ends a stream; see the package comment on why it is held back.
const endMark = "data: [DONE]\n\n"

// job is an unfinished job. Fields below the line are guarded by Dispatcher.mu.
type job struct {
	spec     *store.Job
	hash     digest.Digest // of the request
	start    time.Time
	deadline time.Time
	stall    time.Duration
	only     *node         // that gets it, for a replay; nil for any
	done     chan struct{} // closed when finished
	more     chan struct{} // has an element when a stream may have grown
	lost     chan struct{} // closed when the job could not be written down

	// ———
	attached  bool // a client waits
	taken     bool // a node has said that it has it, or may have it though it says otherwise
	attempts  int
	notBefore time.Time     // for a node that had it
	lane      *lane         // of its client
	place     *list.Element // in the lane, or nil when it does not wait
	tried     map[evm.Address]struct{}
	against   map[evm.Address]wire.Code // nodes that say that no node can do it, and why
	runners   []*runner
	under     map[digest.Digest]*Terms // configurations it was given out under
	body      []byte                   // of a stream: bytes sent to the client, or ready to be; only grows
	timer     timer

	record  record        // whether the job is in the store
	result  *wire.Result  // the first valid one, the one that counts; or nil
	said    digest.Digest // of the node that has sent it, as in [store.Result]
	stored  bool          // it is
	waiting []*Member     // sessions that sent a result and wait for its acknowledgement

	finished bool // the client is answered, with what follows
	took     time.Duration
	response []byte
	failure  *Failure
	ended    bool // no longer among Dispatcher.jobs
}

// record is how far a job is on its way into the store.
type record int

const (
	writing record = iota
	written
	unwritten // it could not be
)

// runner is a node's part in a job. Guarded by Dispatcher.mu.
type runner struct {
	job      *job
	node     *node
	terms    *Terms
	said     digest.Digest // determinism class that the node named when it got the job, [receipt.Unknown] for none
	sent     time.Time
	progress time.Time // of the last sign of it: the first acceptance, or a chunk that goes further
	accepted bool
	adopted  int   // how often it went on after a new session
	end      int64 // where the furthest of its chunks ended
	pos      int64 // bytes of the response that came in order and equal what was sent
	lost     bool  // given up; the job waits or is elsewhere
}

func newJob(rec *store.Job, hash digest.Digest, under *Terms, start time.Time) *job {
	deadline := time.UnixMilli(rec.Deadline)
	j := &job{
		spec: rec, hash: hash, start: start, deadline: deadline,
		stall: deadline.Sub(time.Unix(rec.Created, 0)) / stallShare,
		done:  make(chan struct{}), more: make(chan struct{}, 1), lost: make(chan struct{}),
		tried: map[evm.Address]struct{}{}, against: map[evm.Address]wire.Code{}, under: map[digest.Digest]*Terms{},
	}
	if under != nil {
		j.under[under.Digest] = under
	}
	return j
}

// settled reports whether nothing that nodes do changes the job's end any more.
func (j *job) settled() bool { return j.ended || j.result != nil }

// live returns the runner that is at the job and not given up, or nil. There is
// one at most.
func (j *job) live() *runner {
	for _, r := range j.runners {
		if !r.lost {
			return r
		}
	}
	return nil
}

// end answers the client, once.
func (j *job) end(response []byte, f *Failure) {
	if j.finished {
		return
	}
	j.finished, j.response, j.failure, j.took = true, response, f, time.Since(j.start)
	if f == nil && j.spec.Stream {
		j.body = response // what was sent is its beginning
	}
	close(j.done)
	j.grown()
}

func (j *job) grown() {
	select {
	case j.more <- struct{}{}:
	default:
	}
}

// visible is how many bytes of a stream the client may have.
func (j *job) visible() int {
	if j.finished {
		return len(j.body)
	}
	tail := bytes.TrimRight(j.body, "\n")
	if mark := endMark[:len(endMark)-2]; bytes.HasSuffix(tail, []byte(mark)) {
		return len(tail) - len(mark)
	}
	return len(j.body)
}

// due is when a runner is given up if nothing happens, and why.
func (r *runner) due(d *Dispatcher) (time.Time, Reason) {
	switch {
	case r.node.member == nil:
		return r.node.left.Add(d.opt.Grace), SessionLost
	case !r.accepted:
		return r.sent.Add(d.opt.Accept + time.Duration(len(r.job.spec.Request))*time.Second/slowLink), NotAccepted
	}
	return r.progress.Add(r.job.stall), Stalled
}

// accept notes that a node has a job. Only its first word is progress: it could
// repeat itself for ever.
func (r *runner) accept(d *Dispatcher) {
	r.job.taken = true
	if r.accepted {
		return
	}
	r.accepted, r.progress = true, time.Now()
	d.revive(r)
	d.arm(r.job)
}

// take compares a chunk with what was sent and takes what is new. It reports
// whether the node's bytes still fit.
func (r *runner) take(offset int64, data []byte) bool {
	j := r.job
	// Bytes behind a gap can wait for the result, which is whole.
	if offset > r.pos || offset+int64(len(data)) <= r.pos {
		return true
	}
	data = data[r.pos-offset:]
	same := min(int64(len(data)), int64(len(j.body))-r.pos)
	if !bytes.Equal(data[:same], j.body[r.pos:r.pos+same]) {
		return false
	}
	r.pos += int64(len(data))
	if len(data) > int(same) {
		j.body = append(j.body, data[same:]...)
		j.grown()
	}
	return true
}

// Ticket is a client's hold on a job.
type Ticket struct {
	d *Dispatcher
	j *job
}

// ID names the job.
func (t *Ticket) ID() receipt.JobID { return t.j.spec.ID }

// Created is the creation time that the response carries, in Unix seconds.
func (t *Ticket) Created() int64 { return t.j.spec.Created }

// Wait returns the whole response once its result cannot be lost any more, or a
// [*Failure].
// It returns ctx's error when ctx ends; the job goes on.
func (t *Ticket) Wait(ctx context.Context) ([]byte, error) {
	select {
	case <-t.j.done:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	if t.j.failure != nil { // set before done was closed, and never again
		return nil, t.j.failure
	}
	return t.j.response, nil
}

// Next returns the bytes of a stream from offset on as soon as there are any,
// with [io.EOF] when they are the last ones, or a [*Failure]. The bytes must not
// be changed. One goroutine at a time.
func (t *Ticket) Next(ctx context.Context, offset int) ([]byte, error) {
	for {
		t.d.mu.Lock()
		data, finished, failure := t.j.body[offset:max(offset, t.j.visible())], t.j.finished, t.j.failure
		t.d.mu.Unlock()
		switch {
		case finished && failure == nil:
			return data, io.EOF
		case len(data) > 0:
			return data, nil
		case failure != nil:
			return nil, failure
		}
		select {
		case <-t.j.more:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// Cancel gives the job up: the client has gone. A job that has its result, or
// has ended, is not touched.
func (t *Ticket) Cancel() {
	d := t.d
	d.mu.Lock()
	defer d.mu.Unlock()
	if t.j.result == nil {
		d.fail(t.j, &Failure{Outcome: Cancelled, Code: wire.CodeCancelled, Message: "the client has gone"})
	}
}

// AsFailure returns the failure in err, if it is one.
func AsFailure(err error) (*Failure, bool) {
	var f *Failure
	ok := errors.As(err, &f)
	return f, ok
}
