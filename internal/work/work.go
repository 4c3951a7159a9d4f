// Package work owns the life of a job on the node: admission, execution, the
// receipt, and delivery until the network has acknowledged the result.
//
// The rules it keeps: a job is written down before it is accepted, and its
// result before it is sent; a job runs under the terms it was accepted under;
// what was accepted ends in exactly one result, over restarts too.
package work

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/evm"
	"github.com/resultity/node/internal/journal"
	"github.com/resultity/node/internal/openai"
	"github.com/resultity/node/internal/receipt"
	"github.com/resultity/node/internal/runtime"
	"github.com/resultity/node/internal/snapshot"
	"github.com/resultity/node/internal/state"
	"github.com/resultity/node/internal/wire"
)

type (
	engine interface {
		Run(ctx context.Context, j runtime.Job, emit func([]byte) error) (runtime.Result, error)
	}
	store interface {
		Accept(j *wire.Job) (state.Known, error)
		Finish(r *wire.Result) error
		Unfinished() ([]*wire.Job, error)
		Outbox(after uint64, f func(seq uint64, r *wire.Result) error) error
		Result(id receipt.JobID) (*wire.Result, bool, error)
		Ack(ids []receipt.JobID) error
		Expire(ttl time.Duration) (dropped int, err error)
		Counts() state.Counts
	}
)

// Active is a deployment that may be given jobs: the terms of those accepted
// while it is active.
type Active struct {
	Snapshot *snapshot.Snapshot
	Image    digest.Digest
	Model    digest.Digest
	Engine   engine
}

// Config is what a worker works with.
type Config struct {
	Store store
	Key   *evm.Key
	// Send hands a message to the session. Without one it fails at once; a
	// result is then sent when there is one again. It may wait for room, but
	// not for long.
	Send func(wire.Message) error
	Log  *slog.Logger
	Now  func() time.Time
}

// Worker runs jobs. Its methods are safe for concurrent use and do not wait for
// engine, disk or network, but for Run, Idle and Drain.
type Worker struct {
	cfg Config

	mu       sync.Mutex // guards all below; never held over disk, engine or network
	base     context.Context
	active   *Active
	paused   bool // by the operator
	stopping bool
	running  map[receipt.JobID]*run
	waiting  []*wire.Job   // accepted before this start; run when their terms are active again
	changed  chan struct{} // closed and replaced when running changes
	tasks    sync.WaitGroup
}

// run is a job that has a slot.
type run struct {
	cancel   context.CancelCauseFunc
	accepted bool // written down and announced
}

// New makes a worker. It takes jobs once [Worker.Run] runs and a deployment is
// active.
func New(cfg Config) *Worker {
	return &Worker{cfg: cfg, running: map[receipt.JobID]*run{}, changed: make(chan struct{})}
}

// errStopping ends jobs that are to be run again at the next start.
var errStopping = errors.New("the agent stops")

// errCancelled ends jobs that the network does not want any more.
var errCancelled = errors.New("cancelled by the network")

// housekeeping is how often results past their time are dropped.
const housekeeping = time.Minute

// Run works until ctx ends. Jobs that run then are cut short and stay accepted:
// the next start runs them again. It returns when nothing runs any more.
func (w *Worker) Run(ctx context.Context) error {
	jobs, err := w.cfg.Store.Unfinished()
	if err != nil {
		return fmt.Errorf("jobs of the last start: %w", err)
	}
	base, stop := context.WithCancelCause(context.WithoutCancel(ctx))
	w.mu.Lock()
	w.base, w.waiting = base, jobs
	w.startWaitingLocked()
	w.mu.Unlock()
	w.Connected() // for a session that was quicker

	tick := time.NewTicker(housekeeping)
	defer tick.Stop()
	for {
		w.endOverdue()
		select {
		case <-ctx.Done():
			w.mu.Lock()
			w.stopping, w.base = true, nil
			w.mu.Unlock()
			stop(errStopping)
			w.tasks.Wait()
			return nil
		case <-w.nextOverdue():
		case <-tick.C:
			w.expire()
		}
	}
}

// nextOverdue fires at the nearest deadline of a waiting job.
func (w *Worker) nextOverdue() <-chan time.Time {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.waiting) == 0 {
		return nil
	}
	next := w.waiting[0].Deadline
	for _, j := range w.waiting {
		next = min(next, j.Deadline)
	}
	return time.After(max(time.UnixMilli(next).Sub(w.cfg.Now()), time.Millisecond))
}

// endOverdue fails the waiting jobs whose deadline has passed.
func (w *Worker) endOverdue() {
	w.mu.Lock()
	var over, left []*wire.Job
	for _, j := range w.waiting {
		if w.cfg.Now().UnixMilli() >= j.Deadline {
			over = append(over, j)
		} else {
			left = append(left, j)
		}
	}
	w.waiting = left
	w.mu.Unlock()
	for _, j := range over {
		w.finish(&wire.Result{Job: j.ID, Code: wire.CodeDeadline, Message: "the agent was restarted and the deadline passed"}, j)
	}
}

func (w *Worker) expire() {
	w.mu.Lock()
	a := w.active
	w.mu.Unlock()
	if a == nil {
		return
	}
	dropped, err := w.cfg.Store.Expire(a.Snapshot.Config().Limits.ResultTTL.Duration())
	if err != nil {
		w.cfg.Log.Error("old results not dropped", journal.StorageFailed.Attr(), "error", err)
	}
	if dropped > 0 {
		w.cfg.Log.Warn("results were never acknowledged and are past their time", "dropped", dropped)
	}
}

// SetActive says under which deployment jobs are taken from now on; nil for
// none. Jobs that run keep theirs.
func (w *Worker) SetActive(a *Active) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.active = a
	w.startWaitingLocked()
}

// startWaitingLocked gives jobs of an earlier start another run, under the very
// terms they were accepted under.
func (w *Worker) startWaitingLocked() {
	if w.active == nil || w.base == nil {
		return
	}
	var left []*wire.Job
	for _, j := range w.waiting {
		if j.Config != w.active.Snapshot.Digest() || len(w.running) >= w.active.Snapshot.Config().Runtime.Settings.Slots {
			left = append(left, j)
			continue
		}
		w.startLocked(j, w.active, true)
	}
	w.waiting = left
}

// Status is what heartbeats say of the worker.
type Status struct {
	Slots, Busy, Outbox int
	Draining            bool
}

// Status returns the worker's state.
func (w *Worker) Status() Status {
	w.mu.Lock()
	s := Status{Busy: len(w.running), Draining: w.paused || w.stopping}
	if w.active != nil {
		s.Slots = w.active.Snapshot.Config().Runtime.Settings.Slots
	}
	w.mu.Unlock()
	s.Outbox = w.cfg.Store.Counts().Results
	return s
}

// Pause refuses new jobs until [Worker.Resume].
func (w *Worker) Pause() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.paused = true
}

// Resume takes jobs again.
func (w *Worker) Resume() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.paused = false
}

// Idle waits until no job runs, or fails when ctx ends before.
func (w *Worker) Idle(ctx context.Context) error {
	for {
		w.mu.Lock()
		n, changed := len(w.running), w.changed
		w.mu.Unlock()
		if n == 0 {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return fmt.Errorf("%d jobs still run: %w", n, ctx.Err())
		}
	}
}

// Drain takes no new jobs from now on and waits until none runs. There is no
// way back: it is for the end of the agent.
func (w *Worker) Drain(ctx context.Context) error {
	w.mu.Lock()
	w.stopping = true
	w.mu.Unlock()
	return w.Idle(ctx)
}

// Job takes or refuses a job. The answer goes out by Send.
func (w *Worker) Job(j *wire.Job) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.base == nil {
		w.refuse(j, &refusal{wire.CodeNotReady, "the agent is starting or stopping"})
		return
	}
	if r := w.running[j.ID]; r != nil {
		if r.accepted {
			w.send(&wire.Accept{Job: j.ID}) // asked again: the first answer was lost
		}
		return
	}
	// What is known already is answered whatever the state of the node.
	a := w.active
	verdict := w.admitLocked(j)
	base := w.base
	if verdict == nil {
		w.startLocked(j, a, false)
		return
	}
	w.tasks.Go(func() { w.refuseUnlessKnown(base, j, verdict) })
}

// refusal says why a job is not taken.
type refusal struct {
	code    wire.Code
	message string
}

// admitLocked checks a job against everything but the disk.
func (w *Worker) admitLocked(j *wire.Job) *refusal {
	if w.stopping || w.paused {
		return &refusal{wire.CodeDraining, "takes no new jobs"}
	}
	if w.active == nil {
		return &refusal{wire.CodeNotReady, "no active deployment"}
	}
	if r := Admit(w.active.Snapshot, j, w.cfg.Now()); r != nil {
		return r
	}
	if slots := w.active.Snapshot.Config().Runtime.Settings.Slots; len(w.running) >= slots {
		return &refusal{wire.CodeBusy, fmt.Sprintf("all %d slots are busy", slots)}
	}
	return nil
}

// Admit checks a job against the terms of a snapshot alone. It returns nil for
// a job that may be taken.
func Admit(s *snapshot.Snapshot, j *wire.Job, now time.Time) *refusal {
	c := s.Config()
	left := time.UnixMilli(j.Deadline).Sub(now)
	switch {
	case j.Config != s.Digest():
		return &refusal{wire.CodeConfig, fmt.Sprintf("job is for configuration %s, this node has %s", j.Config, s.Digest())}
	case j.Model != c.Runtime.Model:
		return &refusal{wire.CodeUnknownModel, fmt.Sprintf("this node serves %q", c.Runtime.Model)}
	case j.Kind != wire.KindChat && j.Kind != wire.KindCompletion:
		return &refusal{wire.CodeBadRequest, "unknown kind of job"}
	case int64(len(j.Request)) > c.Limits.RequestBytes:
		return &refusal{wire.CodeLimit, fmt.Sprintf("request of %d bytes, at most %d", len(j.Request), c.Limits.RequestBytes)}
	case left <= 0:
		return &refusal{wire.CodeDeadline, "the deadline has passed"}
	// The network's clock may be ahead by the window, so that much more is fine.
	case left > c.Limits.Deadline.Duration()+c.Network.ClockWindow.Duration():
		return &refusal{wire.CodeDeadline, fmt.Sprintf("the deadline is %v away, at most %v", left.Round(time.Second), c.Limits.Deadline.Duration())}
	}
	req, err := openai.Parse(j.Kind, j.Request, limits(c))
	var bad *openai.Error
	if errors.As(err, &bad) {
		code := wire.CodeBadRequest
		if bad.Status == 413 {
			code = wire.CodeLimit
		}
		return &refusal{code, bad.Message}
	}
	if req.Stream != j.Stream {
		return &refusal{wire.CodeBadRequest, "job and request disagree about streaming"}
	}
	return nil
}

func limits(c *snapshot.Config) openai.Limits {
	return openai.Limits{RequestBytes: c.Limits.RequestBytes, Tokens: c.Limits.Tokens, Messages: c.Limits.Messages}
}

func (w *Worker) refuse(j *wire.Job, r *refusal) {
	w.cfg.Log.Warn("job refused", journal.JobRefused.Attr(), "job", j.ID, "code", r.code)
	w.send(&wire.Refuse{Job: j.ID, Code: r.code, Message: r.message})
}

// refuseUnlessKnown refuses a job, unless its result is here: then that is sent
// again, since the network must have lost sight of it.
func (w *Worker) refuseUnlessKnown(ctx context.Context, j *wire.Job, r *refusal) {
	if res, ok, err := w.cfg.Store.Result(j.ID); err == nil && ok && ctx.Err() == nil {
		w.send(&wire.Accept{Job: j.ID})
		w.send(res)
		return
	}
	w.refuse(j, r)
}

// startLocked gives the job a slot and runs it. known is for jobs that are
// written down already.
func (w *Worker) startLocked(j *wire.Job, a *Active, known bool) {
	ctx, cancel := context.WithCancelCause(w.base)
	r := &run{cancel: cancel, accepted: known}
	w.running[j.ID] = r
	w.tasks.Go(func() {
		defer cancel(nil)
		if known || w.accept(ctx, j, r) {
			w.do(ctx, j, a)
		}
		w.mu.Lock()
		delete(w.running, j.ID)
		w.startWaitingLocked()
		close(w.changed)
		w.changed = make(chan struct{})
		w.mu.Unlock()
	})
}

// accept writes the job down and announces it. It reports whether to run it.
func (w *Worker) accept(ctx context.Context, j *wire.Job, r *run) bool {
	known, err := w.cfg.Store.Accept(j)
	switch {
	case err != nil:
		w.cfg.Log.Error("job not stored", journal.StorageFailed.Attr(), "job", j.ID, "error", err)
		w.refuse(j, &refusal{wire.CodeStorage, "the node cannot store the job"})
		return false
	case known == state.Running:
		// Accepted before this start, and waiting for its terms or a slot.
		w.send(&wire.Accept{Job: j.ID})
		return w.takeWaiting(j.ID)
	case known != state.New:
		w.refuseUnlessKnown(ctx, j, &refusal{wire.CodeDuplicate, "this node has done the job"})
		return false
	}
	w.mu.Lock()
	r.accepted = true
	w.mu.Unlock()
	w.send(&wire.Accept{Job: j.ID})
	return true
}

// takeWaiting removes a job from the waiting ones, and reports whether it was
// there.
func (w *Worker) takeWaiting(id receipt.JobID) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	for i, j := range w.waiting {
		if j.ID == id {
			w.waiting = append(w.waiting[:i:i], w.waiting[i+1:]...)
			return true
		}
	}
	return false
}

// do runs an accepted job to its result.
func (w *Worker) do(ctx context.Context, j *wire.Job, a *Active) {
	ctx, cancel := context.WithDeadlineCause(ctx, time.UnixMilli(j.Deadline), context.DeadlineExceeded)
	defer cancel()
	c := a.Snapshot.Config()
	started := w.cfg.Now()
	res, err := w.run(ctx, j, a)
	if errors.Is(context.Cause(ctx), errStopping) && err != nil {
		return // stays accepted; the next start runs it again
	}
	if err != nil {
		code, message := classify(ctx, err)
		w.cfg.Log.Warn("job failed", journal.JobFailed.Attr(), "job", j.ID, "model", j.Model, "code", code, "error", err)
		w.finish(&wire.Result{Job: j.ID, Code: code, Message: message}, j)
		return
	}
	finished := w.cfg.Now()
	r := receipt.Receipt{
		Job: j.ID, Node: w.cfg.Key.Address(), ConfigDigest: a.Snapshot.Digest(), ImageDigest: a.Image, ModelDigest: a.Model,
		RequestHash: digest.Of(j.Request), ResponseHash: digest.Of(res.Body),
		PromptTokens: uint64(res.Usage.PromptTokens), CompletionTokens: uint64(res.Usage.CompletionTokens),
		StartedAt: uint64(started.UnixMilli()), FinishedAt: uint64(max(finished.UnixMilli(), started.UnixMilli())),
	}
	signed, err := r.Sign(c.Network.ChainID, w.cfg.Key)
	if err != nil {
		w.cfg.Log.Error("receipt not signed", journal.JobFailed.Attr(), "job", j.ID, "code", wire.CodeInternal, "error", err)
		w.finish(&wire.Result{Job: j.ID, Code: wire.CodeInternal, Message: "the receipt could not be signed"}, j)
		return
	}
	w.cfg.Log.Info("job done", journal.JobDone.Attr(), "job", j.ID, "model", j.Model,
		"prompt_tokens", res.Usage.PromptTokens, "completion_tokens", res.Usage.CompletionTokens, "took", finished.Sub(started).Round(time.Microsecond))
	w.finish(&wire.Result{Job: j.ID, Response: res.Body, Receipt: &signed}, j)
}

// run asks the engine, passing chunks on as they come.
func (w *Worker) run(ctx context.Context, j *wire.Job, a *Active) (runtime.Result, error) {
	c := a.Snapshot.Config()
	req, err := openai.Parse(j.Kind, j.Request, limits(c))
	if err != nil {
		return runtime.Result{}, err
	}
	var emit func([]byte) error
	if j.Stream {
		var offset int64
		emit = func(b []byte) error {
			// A chunk that is not sent is no loss: the result has everything.
			w.send(&wire.Chunk{Job: j.ID, Offset: offset, Data: append([]byte(nil), b...)})
			offset += int64(len(b))
			return nil
		}
	}
	return a.Engine.Run(ctx, runtime.Job{
		ID: j.ID, Request: req, Model: j.Model, Created: j.Created, Seed: j.Seed,
		Tokens: req.Bound(c.Limits.Tokens), ResponseBytes: c.Limits.ResponseBytes,
	}, emit)
}

// classify says in the protocol's words why a job failed, without a word of the
// engine's output.
func classify(ctx context.Context, err error) (wire.Code, string) {
	var request *openai.Error
	var output *openai.OutputError
	switch cause := context.Cause(ctx); {
	case errors.Is(cause, errCancelled):
		return wire.CodeCancelled, "cancelled"
	case errors.Is(cause, context.DeadlineExceeded):
		return wire.CodeDeadline, "the deadline passed while the engine worked"
	case errors.As(err, &request):
		return wire.CodeBadRequest, request.Message
	case errors.As(err, &output):
		return wire.CodeOutput, output.Error()
	}
	return wire.CodeEngine, err.Error()
}

// finish makes the result durable, then sends it.
func (w *Worker) finish(res *wire.Result, j *wire.Job) {
	err := w.cfg.Store.Finish(res)
	if errors.Is(err, state.ErrFull) && res.Code == "" {
		// Room for a failure is kept from the moment of acceptance on.
		res = &wire.Result{Job: j.ID, Code: wire.CodeStorage, Message: "the node cannot store the result"}
		err = w.cfg.Store.Finish(res)
	}
	if err != nil {
		// It stays accepted: the next start runs it again, or another node does
		// when the network's patience ends.
		w.cfg.Log.Error("result not stored", journal.StorageFailed.Attr(), "job", j.ID, "error", err)
		return
	}
	w.send(res)
}

// send hands a message to the session, if there is one.
func (w *Worker) send(m wire.Message) {
	if err := w.cfg.Send(m); err != nil {
		w.cfg.Log.Debug("not sent", "type", m.Type(), "error", err)
	}
}

// Cancel ends a job that the network does not want any more; its result says so.
func (w *Worker) Cancel(c *wire.Cancel) {
	w.mu.Lock()
	r := w.running[c.Job]
	w.mu.Unlock()
	if r != nil {
		r.cancel(errCancelled)
	}
}

// Ack forgets results that the network has stored.
func (w *Worker) Ack(a *wire.Ack) {
	w.task(func() {
		if err := w.cfg.Store.Ack(a.Jobs); err != nil {
			w.cfg.Log.Error("acknowledgement not stored; the results are sent again", journal.StorageFailed.Attr(), "error", err)
		}
	})
}

// Connected sends everything that has not been acknowledged, in order. Call it
// when a session begins.
func (w *Worker) Connected() {
	w.task(func() {
		err := w.cfg.Store.Outbox(0, func(_ uint64, r *wire.Result) error { return w.cfg.Send(r) })
		if err != nil {
			w.cfg.Log.Debug("outbox not sent to its end; the next session sends it again", "error", err)
		}
	})
}

// task runs f beside the caller as long as the worker runs.
func (w *Worker) task(f func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.base != nil {
		w.tasks.Go(f)
	}
}
