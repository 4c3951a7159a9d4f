package dispatch

import (
	"container/heap"
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/evm"
	"github.com/resultity/node/internal/network/metrics"
	"github.com/resultity/node/internal/network/store"
	"github.com/resultity/node/internal/receipt"
	"github.com/resultity/node/internal/wire"
)

// jobStore is what dispatch writes down.
type jobStore interface {
	PutJob(context.Context, *store.Job) error
	DeleteJob(ctx context.Context, seq uint64) error
	JobDone(seq uint64)
	KeepRequest(context.Context, *store.Job) error // of a job whose result is stored; does nothing where none are kept
	PutResult(ctx context.Context, r *receipt.Signed, said digest.Digest, response []byte) error
	Result(context.Context, receipt.JobID) (*store.Result, error)
	Accepting() error // why no job can be written down, or nil; does not wait
}

// Options bound the dispatcher. The zero value of a field stands for its default.
type Options struct {
	MaxQueued  int           // jobs that wait for a node; default 1024
	MaxBytes   int64         // request bytes of all unfinished jobs; default 256 MiB
	Share      int           // how much of both one client may hold, in percent; default 50
	NoNodeWait time.Duration // how long a new job waits where no node is routable; default 5 s
	Grace      time.Duration // how long a node may be away before its jobs go elsewhere; default 2 s
	Accept     time.Duration // how long a node may take to accept, beside the time its bytes take; default 3 s
	Attempts   int           // how often a job is given out, to busy nodes not counted; default 5
}

func (o *Options) fill() {
	def := func(v *time.Duration, d time.Duration) {
		if *v == 0 {
			*v = d
		}
	}
	if o.MaxQueued == 0 {
		o.MaxQueued = 1024
	}
	if o.MaxBytes == 0 {
		o.MaxBytes = 256 << 20
	}
	if o.Share == 0 {
		o.Share = 50
	}
	if o.Attempts == 0 {
		o.Attempts = 5
	}
	def(&o.NoNodeWait, 5*time.Second)
	def(&o.Grace, 2*time.Second)
	def(&o.Accept, 3*time.Second)
}

const (
	// slowLink is the slowest link, in bytes a second, over which a job still
	// reaches a node in time.
	slowLink = 1 << 20
	// stallShare of a job's whole time may pass without progress.
	stallShare = 3
	// refusalPause keeps jobs from a node that has refused one for a reason of
	// its own, busyPause from one that had no slot after all. A heartbeat ends
	// both.
	refusalPause = time.Second
	busyPause    = 50 * time.Millisecond
	// adoptions bounds how often a node that was away may go on with a job.
	adoptions = 3
	// atOnce nodes are told of a new configuration at once, then one each turnTime.
	atOnce   = 50
	turnTime = 10 * time.Millisecond
	// remembered is how many finished jobs are known, to tell a duplicate
	// result from one that nobody waits for.
	remembered = 1 << 16
)

// retries is how long a job waits before a node gets it that had it before; to
// another node it goes at once.
var retries = []time.Duration{100 * time.Millisecond, 300 * time.Millisecond, time.Second, 2 * time.Second}

// penalties is how long a node that broke the protocol gets no jobs.
var penalties = []time.Duration{10 * time.Second, 30 * time.Second, time.Minute, 5 * time.Minute}

// forgiven is how long after its last violation a node starts afresh.
const forgiven = 30 * time.Minute

// storeRetries is how long a result that could not be stored waits in memory
// before the next try. A try costs little while the store knows that it cannot write.
var storeRetries = []time.Duration{time.Second, 2 * time.Second}

// restoredPause is how long a job of a former run is kept for the node that had
// it, which comes back with the result or is at it still. Its client may have
// that node's answer already: a result of another node would count instead.
const restoredPause = 30 * time.Second

// Dispatcher gives jobs to nodes. All methods are safe for concurrent use and
// none waits for a node or for the disk, but for Restore and Close.
type Dispatcher struct {
	store   jobStore
	metrics *metrics.Metrics
	log     *slog.Logger
	opt     Options
	wg      sync.WaitGroup // durable writes under way
	closing chan struct{}  // closed by Close

	// mu guards everything below and in every job and node. It is held for
	// look-ups and list operations, and to compare one chunk; never for I/O.
	mu       sync.Mutex
	closed   bool
	terms    *Terms
	jobs     map[receipt.JobID]*job // without a durable end
	queue    queue
	bytes    int64 // of the requests of jobs, and of their results that are not stored yet
	nodes    map[evm.Address]*node
	free     nodeHeap // routable nodes with a free slot
	routable int
	noneAt   time.Time // when the last routable node went
	order    uint64    // of dispatches
	recent   recent
}

// New makes a dispatcher that works under terms.
func New(s jobStore, t *Terms, m *metrics.Metrics, log *slog.Logger, opt Options) *Dispatcher {
	opt.fill()
	return &Dispatcher{
		store: s, metrics: m, log: log, opt: opt, terms: t,
		closing: make(chan struct{}), jobs: map[receipt.JobID]*job{}, queue: queue{lanes: map[string]*lane{}}, nodes: map[evm.Address]*node{}, noneAt: time.Now(),
		recent: recent{set: map[receipt.JobID]struct{}{}},
	}
}

// Terms returns the active configuration.
func (d *Dispatcher) Terms() *Terms {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.terms
}

// Configure makes t the active configuration and tells the nodes. Jobs that run
// go on under the one they were given out under; jobs that wait for a model
// that is no longer served end.
func (d *Dispatcher) Configure(t *Terms) {
	d.mu.Lock()
	defer d.mu.Unlock()
	changed := d.terms.Digest != t.Digest
	newer := d.terms.Version != t.Version
	d.terms = t
	var withdrawn []*job
	if changed {
		for j := range d.queue.all() {
			if j.spec.Model != t.Config.Runtime.Model {
				withdrawn = append(withdrawn, j)
			}
		}
	}
	for _, j := range withdrawn { // before a node of the new configuration could get one
		d.queue.remove(j)
	}
	told := 0
	for _, n := range d.nodes {
		if n.member != nil && newer {
			d.tell(n.member, t, told)
			told++
		}
		d.refresh(n)
	}
	for _, j := range withdrawn {
		d.fail(j, &Failure{Outcome: Withdrawn, Message: "the model is no longer served"})
	}
	d.pump()
}

// tell has the node of a member look for a new configuration, when it is its turn:
// all fetch it then, and a thousand should not at once.
func (d *Dispatcher) tell(m *Member, t *Terms, turn int) {
	news := &wire.Update{Version: t.Version}
	if turn < atOnce {
		m.peer.Send(news)
		return
	}
	time.AfterFunc(time.Duration(turn-atOnce+1)*turnTime, func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		if !d.closed && !m.gone && d.terms.Version == t.Version { // else there are newer news
			m.peer.Send(news)
		}
	})
}

// Work is what a client asks for. Body has been checked against the active
// configuration.
type Work struct {
	Kind   wire.Kind
	Model  string
	Stream bool
	Body   []byte // the HTTP body, which must not change any more
	Client string // name of the API key
}

// Submit queues a job and begins to write it down. The error is a [*Failure].
func (d *Dispatcher) Submit(w Work) (*Ticket, error) {
	now := time.Now()
	rec := &store.Job{Client: w.Client, Job: wire.Job{
		ID: receipt.NewJobID(), Model: w.Model, Kind: w.Kind, Stream: w.Stream, Request: w.Body, Seed: rand.Uint32(), Created: now.Unix(),
	}}
	hash := digest.Of(w.Body)

	d.mu.Lock()
	defer d.mu.Unlock()
	if f := d.refuse(w.Client, int64(len(w.Body)), now); f != nil {
		d.metrics.Jobs.WithLabelValues(string(f.Outcome)).Inc()
		return nil, f
	}
	rec.Config = d.terms.Digest
	rec.Deadline = now.Add(d.terms.Config.Limits.Deadline.Duration()).UnixMilli()
	j := newJob(rec, hash, d.terms, now)
	j.attached = true
	d.add(j)
	d.wg.Go(func() { d.write(j) })
	d.queue.push(j, false)
	d.pump()
	d.arm(j)
	return &Ticket{d: d, j: j}, nil
}

// refuse says why a client's job of so many bytes is not taken, or returns nil.
func (d *Dispatcher) refuse(client string, size int64, now time.Time) *Failure {
	share := d.opt.Share
	switch l := d.queue.lanes[client]; {
	case d.closed:
		return &Failure{Outcome: Closing, Message: "the service is stopping"}
	case d.store.Accepting() != nil: // the store has said why
		return notWritten
	case d.routable == 0 && now.Sub(d.noneAt) >= d.opt.NoNodeWait:
		return &Failure{Outcome: NoNode, Message: "no node is ready to serve the model"}
	case d.queue.places >= d.opt.MaxQueued || d.bytes+size > d.opt.MaxBytes:
		return &Failure{Outcome: QueueFull, Message: "Too many requests are waiting. Please try again later."}
	case l != nil && (l.places >= max(1, d.opt.MaxQueued*share/100) || l.bytes+size > d.opt.MaxBytes/100*int64(share)):
		return &Failure{Outcome: QueueFull, Message: "Too many requests of this API key are waiting. Please try again later."}
	}
	return nil
}

// add makes a job known.
func (d *Dispatcher) add(j *job) {
	d.jobs[j.spec.ID] = j
	d.queue.open(j)
	d.bytes += int64(len(j.spec.Request))
}

// write writes a job down while nodes are at it already. A job that cannot be
// written ends, unless its result is stored: then nothing needs the record.
func (d *Dispatcher) write(j *job) {
	start := time.Now()
	err := d.store.PutJob(context.Background(), j.spec)
	d.metrics.StoreSeconds.WithLabelValues("job").Observe(time.Since(start).Seconds())
	d.mu.Lock()
	defer d.mu.Unlock()
	switch {
	case err == nil && j.ended:
		d.forget(j) // it ended before it was written
	case err == nil:
		j.record = written
		d.answer(j)
	default:
		j.record = unwritten
		close(j.lost)
		d.log.Error("job could not be written down", "job", j.spec.ID, "error", err)
		if j.result == nil {
			d.fail(j, notWritten)
		}
	}
}

// notWritten ends a job of which neither the record nor a result could be stored.
var notWritten = &Failure{Outcome: Storage, Code: wire.CodeStorage, Message: "the network could not write the request down"}

// Restore queues jobs that a former run of the service left behind. Nobody
// waits for them any more, but their results count. lookup finds the terms of
// a configuration that was published once.
func (d *Dispatcher) Restore(ctx context.Context, jobs []*store.Job, lookup func(context.Context, digest.Digest) (*Terms, error)) error {
	for _, rec := range jobs {
		_, err := d.store.Result(ctx, rec.ID)
		if !errors.Is(err, store.ErrNotFound) && !errors.Is(err, store.ErrDamaged) {
			if err != nil {
				return err
			}
			d.store.JobDone(rec.Seq) // stored, and then the service ended
			d.keepRequest(ctx, rec)
			continue
		}
		under, err := lookup(ctx, rec.Config)
		if err != nil && !errors.Is(err, store.ErrNotFound) && !errors.Is(err, store.ErrDamaged) {
			return err
		}
		d.mu.Lock()
		now := time.Now()
		j := newJob(rec, digest.Of(rec.Request), under, now)
		j.record = written
		j.notBefore = now.Add(min(restoredPause, j.deadline.Sub(now)/2))
		d.add(j)
		switch {
		case !time.Now().Before(j.deadline):
			d.fail(j, &Failure{Outcome: Deadline, Message: "the deadline passed while the service was down"})
		case rec.Model != d.terms.Config.Runtime.Model:
			d.fail(j, &Failure{Outcome: Withdrawn, Message: "the model is no longer served"})
		default:
			d.queue.push(j, false)
			d.arm(j)
		}
		d.mu.Unlock()
	}
	return nil
}

// Close ends every waiting client with [Closing], leaves the jobs in the store
// for the next start, and waits for writes under way. Results that cannot be
// stored stay with their nodes.
func (d *Dispatcher) Close() {
	d.mu.Lock()
	if !d.closed {
		d.closed = true
		close(d.closing)
	}
	for _, n := range d.nodes {
		n.timer.stop()
	}
	for _, j := range d.jobs {
		j.timer.stop()
		if j.result == nil && !j.finished {
			j.end(nil, &Failure{Outcome: Closing, Message: "the service is stopping"})
			if j.only == nil {
				d.metrics.Jobs.WithLabelValues(string(Closing)).Inc()
			}
		}
	}
	d.mu.Unlock()
	d.wg.Wait()
}

// State counts what there is.
func (d *Dispatcher) State() metrics.State {
	d.mu.Lock()
	defer d.mu.Unlock()
	s := metrics.State{
		Routable: d.routable, Queued: d.queue.len, Running: len(d.jobs) - d.queue.len,
		ConfigVersion: d.terms.Version, ConfigExpires: d.terms.Expires,
	}
	for _, n := range d.nodes {
		if n.member != nil {
			s.Connected++
		}
	}
	return s
}

// pump gives waiting jobs to free nodes.
func (d *Dispatcher) pump() {
	if d.closed || d.free.Len() == 0 {
		return
	}
	now := time.Now()
	d.queue.match(func(j *job) (taken, more bool) {
		n := d.pick(j, now)
		if n != nil {
			d.queue.remove(j)
			d.assign(j, n, now)
		}
		return n != nil, d.free.Len() > 0
	})
}

// pick returns the least busy free node for a job: one that has not had it
// while there are such, be they free or not, else, after a pause, one that no
// longer has it.
func (d *Dispatcher) pick(j *job, now time.Time) *node {
	if j.only != nil {
		if now.Before(j.notBefore) || j.only.index < 0 || j.only.running[j.spec.ID] != nil {
			return nil
		}
		return j.only
	}
	if len(j.tried) == 0 {
		if now.Before(j.notBefore) {
			return nil
		}
		return d.free[0]
	}
	var aside []*node
	defer func() {
		for _, n := range aside {
			heap.Push(&d.free, n)
		}
	}()
	var second *node
	for d.free.Len() > 0 {
		n := d.free[0]
		if _, had := j.tried[n.addr]; !had {
			return n
		}
		if second == nil && n.running[j.spec.ID] == nil {
			second = n
		}
		aside = append(aside, heap.Pop(&d.free).(*node))
	}
	if d.others(j) > 0 || now.Before(j.notBefore) {
		return nil // wait for one of them, or a little
	}
	return second
}

// others counts the routable nodes that have not had a job and could.
func (d *Dispatcher) others(j *job) int {
	if j.only != nil {
		return 0
	}
	others := d.routable
	for a := range j.tried {
		if n := d.nodes[a]; n != nil && n.routable {
			others--
		}
	}
	return others
}

// assign gives a job to a node.
func (d *Dispatcher) assign(j *job, n *node, now time.Time) {
	j.attempts++
	j.tried[n.addr] = struct{}{}
	j.under[d.terms.Digest] = d.terms
	r := &runner{job: j, node: n, terms: d.terms, said: n.class(), sent: now, progress: now}
	j.runners = append(j.runners, r)
	n.running[j.spec.ID] = r
	d.order++
	n.order = d.order
	d.send(r)
	d.refresh(n)
	d.arm(j)
}

// send hands the job frame of a runner to its node's session.
func (d *Dispatcher) send(r *runner) {
	m := r.job.spec.Job
	m.Config = r.terms.Digest
	d.metrics.Dispatches.Inc()
	r.node.member.peer.Send(&m)
}

// lose takes a job from a node, which may still deliver it.
func (d *Dispatcher) lose(r *runner, reason Reason) {
	if r.lost {
		return
	}
	r.lost = true
	d.metrics.Reassignments.WithLabelValues(string(reason)).Inc()
	d.log.Info("job goes to another node", "job", r.job.spec.ID, "node", r.node.addr, "reason", reason)
	// A job that only takes long may not push others back: it gets a second node
	// when there is one to spare.
	d.requeue(r.job, reason != Stalled, &Failure{Outcome: Failed, Code: wire.CodeInternal, Message: "no node finished the job"})
}

// drop is lose for a node that will not deliver: it said so.
func (d *Dispatcher) drop(r *runner, reason Reason, why *Failure) {
	if !r.lost {
		d.metrics.Reassignments.WithLabelValues(string(reason)).Inc()
		d.log.Info("job goes to another node", "job", r.job.spec.ID, "node", r.node.addr, "reason", reason, "code", why.Code)
	}
	d.detach(r)
	d.requeue(r.job, true, why)
	d.pump()
}

// detach ends a node's part in a job.
func (d *Dispatcher) detach(r *runner) {
	delete(r.node.running, r.job.spec.ID)
	if i := slices.Index(r.job.runners, r); i >= 0 {
		r.job.runners = slices.Delete(r.job.runners, i, i+1)
	}
	d.refresh(r.node)
}

// requeue queues a job unless a node is at it still. why is what the client is
// told when this was the last attempt.
func (d *Dispatcher) requeue(j *job, ahead bool, why *Failure) {
	if j.settled() || j.place != nil || j.live() != nil {
		return
	}
	if j.attempts >= d.opt.Attempts {
		if len(j.runners) == 0 {
			d.fail(j, why)
		}
		return // whoever has it may still deliver, until the deadline
	}
	j.notBefore = time.Now().Add(retries[min(max(j.attempts-1, 0), len(retries)-1)])
	d.queue.push(j, ahead)
	d.pump()
	d.arm(j)
}

// revive takes a node that was given up for a job back: it has shown life
// before any other node got the job.
func (d *Dispatcher) revive(r *runner) {
	if r.lost && r.job.place != nil && r.node.member != nil {
		r.lost = false
		d.queue.remove(r.job)
		d.arm(r.job)
	}
}

// fail ends a job without a result. One that is unfinished when the service
// stops is for the next run.
func (d *Dispatcher) fail(j *job, f *Failure) {
	if j.ended || d.closed {
		return
	}
	if f.Outcome != Cancelled {
		d.log.Info("job failed", "job", j.spec.ID, "outcome", f.Outcome, "code", f.Code, "attempts", j.attempts)
	}
	j.end(nil, f)
	d.finish(j, f.Outcome)
	for _, w := range j.waiting {
		w.ack("unneeded", j.spec.ID)
	}
}

// answer gives the client its result once that survives a crash: the node keeps
// the result until it is acknowledged, and with the job's record it counts
// whenever it comes; or it is stored itself.
func (d *Dispatcher) answer(j *job) {
	if j.result != nil && !j.finished && (j.record == written || j.stored) {
		j.end(j.result.Response, nil)
	}
}

// finish forgets a job whose end is durable, or needs not be, and tells whoever
// works on it.
func (d *Dispatcher) finish(j *job, outcome Outcome) {
	j.ended = true
	j.timer.stop()
	d.queue.close(j)
	delete(d.jobs, j.spec.ID)
	d.bytes -= int64(len(j.spec.Request))
	if j.result != nil {
		d.bytes -= int64(len(j.result.Response))
	}
	if outcome == OK {
		d.recent.add(j.spec.ID)
	}
	for _, r := range j.runners {
		delete(r.node.running, j.spec.ID)
		if r.node.member != nil {
			r.node.member.peer.Send(&wire.Cancel{Job: j.spec.ID, Reason: string(outcome)})
		}
		d.refresh(r.node)
	}
	j.runners = nil
	if j.only == nil { // nobody's job
		d.metrics.Jobs.WithLabelValues(string(outcome)).Inc()
		d.metrics.JobSeconds.WithLabelValues(string(outcome)).Observe(j.took.Seconds())
	}
	if j.record == written {
		d.forget(j)
	}
	d.pump()
}

// forget deletes an ended job from the store: one with a stored result when the
// store gets to it, since its result says at any start that it is done, any
// other at once, since nothing else does. A failure is only logged: the job is
// given out once more after the next start.
func (d *Dispatcher) forget(j *job) {
	if j.stored {
		d.store.JobDone(j.spec.Seq)
		return
	}
	d.wg.Go(func() {
		if err := d.store.DeleteJob(context.Background(), j.spec.Seq); err != nil {
			d.log.Error("finished job stays in the store until the next start", "error", err)
		}
	})
}

// arm sets a job's timer to the next moment at which something may be due.
func (d *Dispatcher) arm(j *job) {
	if j.settled() || d.closed {
		return
	}
	at := j.deadline
	earlier := func(t time.Time) {
		if t.Before(at) {
			at = t
		}
	}
	if j.place != nil {
		if j.notBefore.After(time.Now()) {
			earlier(j.notBefore)
		}
		if d.mayGiveUp(j) {
			earlier(d.noneAt.Add(d.opt.NoNodeWait))
		}
		if j.only != nil {
			earlier(time.Now().Add(d.opt.NoNodeWait)) // is it there at all?
		}
	}
	for _, r := range j.runners {
		if !r.lost {
			due, _ := r.due(d)
			earlier(due)
		}
	}
	j.timer.set(time.Until(at), func() { d.wake(j) })
}

// mayGiveUp reports whether no node is there for a job and surely none has it: none
// was given it, or each that was has refused it. A job that a node may have waits for
// its deadline: the node may come back with the result.
func (d *Dispatcher) mayGiveUp(j *job) bool {
	return d.routable == 0 && j.attached && !j.taken && len(j.runners) == 0
}

// wake does what is due for a job.
func (d *Dispatcher) wake(j *job) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if j.settled() || d.closed {
		return
	}
	now := time.Now()
	if !now.Before(j.deadline) {
		d.fail(j, &Failure{Outcome: Deadline, Code: wire.CodeDeadline, Message: "the job was not finished in time"})
		return
	}
	if j.place != nil && d.mayGiveUp(j) && !now.Before(d.noneAt.Add(d.opt.NoNodeWait)) {
		d.fail(j, &Failure{Outcome: NoNode, Message: "no node is ready to serve the model"})
		return
	}
	if j.place != nil && j.only != nil && !j.only.routable {
		d.fail(j, notThere)
		return
	}
	for _, r := range slices.Clone(j.runners) { // lose may change the list
		if due, reason := r.due(d); !r.lost && !now.Before(due) {
			if reason == NotAccepted {
				r.node.blocked = now.Add(refusalPause)
				d.refresh(r.node)
			}
			d.lose(r, reason)
		}
	}
	d.pump()
	d.arm(j)
}

// recent remembers jobs whose result is stored, the oldest forgotten first.
type recent struct {
	set  map[receipt.JobID]struct{}
	ring []receipt.JobID
	next int
}

func (r *recent) add(id receipt.JobID) {
	if len(r.ring) < remembered {
		r.ring = append(r.ring, id)
	} else {
		delete(r.set, r.ring[r.next])
		r.ring[r.next] = id
		r.next = (r.next + 1) % remembered
	}
	r.set[id] = struct{}{}
}

func (r *recent) has(id receipt.JobID) bool { _, ok := r.set[id]; return ok }

// timer is a time.AfterFunc that can be set again. Its owner's mutex guards it.
type timer struct{ t *time.Timer }

func (t *timer) set(in time.Duration, f func()) {
	if t.t == nil {
		t.t = time.AfterFunc(in, f)
		return
	}
	t.t.Reset(in)
}

func (t *timer) stop() {
	if t.t != nil {
		t.t.Stop()
	}
}
