// Package work owns the life of a job on the node: admission, execution, the
// receipt, and delivery until the network has acknowledged the result.
//
// The rules it keeps: a job is written down before it is accepted, and its
// result before it is sent. A job runs under the terms it was accepted under.
// What was accepted ends in exactly one result, over restarts too.
//
// An engine that fails job after job gets no more of them until it is made active
// anew: see [Config.Suspect].
//
// A job that arrives again is answered from what is known of it, whatever else
// the node is doing: accepted again while it runs, its result sent again when it
// is done. A panic while a job runs is a bug and ends the agent: the next start
// finds the job as it was accepted.
package work

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/evm"
	"github.com/resultity/node/internal/failpoint"
	"github.com/resultity/node/internal/journal"
	"github.com/resultity/node/internal/openai"
	"github.com/resultity/node/internal/receipt"
	"github.com/resultity/node/internal/runtime"
	"github.com/resultity/node/internal/snapshot"
	"github.com/resultity/node/internal/state"
	"github.com/resultity/node/internal/wire"
)

type (
	// engine answers one request; see [runtime.Client.Run] for its errors.
	engine interface {
		Run(ctx context.Context, j runtime.Job, emit func([]byte) error) (runtime.Result, error)
	}

	// store is what must not be forgotten; see [state.Store].
	store interface {
		Accept(j *wire.Job) (state.Known, error)
		Finish(r *wire.Result) error
		Lookup(id receipt.JobID) (state.Known, error)
		Unfinished() ([]*wire.Job, error)
		Outbox(after uint64, f func(seq uint64, r *wire.Result) error) ([]state.Unread, error)
		Result(id receipt.JobID) (*wire.Result, bool, error)
		Ack(ids []receipt.JobID) error
		Expire(ttl time.Duration) (dropped int, err error)
		Counts() state.Counts
	}
	key interface { // signs receipts; see package signer
		Address() evm.Address
		Receipt(chainID uint64, r receipt.Receipt) (receipt.Signed, error)
	}
)

// Active is a deployment that may be given jobs: the terms of those accepted
// while it is active.
type Active struct {
	Snapshot *snapshot.Snapshot
	Image    digest.Digest        // manifest of the runtime's image
	Model    digest.Digest        // manifest of the model's files
	Class    digest.Digest        // determinism class of the deployment; zero for none
	Sandbox  func() digest.Digest // record of the runtime's sandbox, as it is now
	Engine   engine

	failures int // of the engine, in a row. Guarded by Worker.mu
}

// suspectAfter is how many jobs in a row an engine may fail before it gets no
// more. One that answers garbage does so quickly, and would draw in one job after
// the other.
const suspectAfter = 3

func (a *Active) suspect() bool { return a.failures >= suspectAfter }

func (a *Active) slots() int { return a.Snapshot.Config().Runtime.Settings.Slots }

// Config is what a worker works with.
type Config struct {
	Store store
	Key   key
	// Send hands a message to the session. Without one it fails at once; a
	// result is then sent when there is one again. A result may wait for room,
	// but not for long; nothing else waits.
	Send func(wire.Message) error
	// Suspect is told once that an engine has failed too many jobs in a row, and
	// why the last one. It must not wait. The worker takes no jobs for it until
	// it is made active anew. May be nil.
	Suspect func(a *Active, why string)
	// Keep is given each job with its answer, once that is safe and sent. It may
	// take as long as a write. May be nil.
	Keep func(j *wire.Job, r *wire.Result)
	// Slots are the engine's, where other workers use it, too; nil for a worker
	// that has it to itself. Crowded is told when another one has taken a slot or
	// given one back. It must not wait. May be nil.
	Slots   *Slots
	Crowded func()
	Log     *slog.Logger
	Now     func() time.Time
}

// Worker runs jobs. Its methods are safe for concurrent use and do not wait for
// engine, disk or network, but for Run, Idle, Drain and Replay.
type Worker struct {
	cfg   Config
	fatal chan error // capacity 1: why Run must end

	mu        sync.Mutex      // guards what follows; never held over disk, engine or network
	base      context.Context // of everything that Run owns; nil while it does not run
	active    *Active
	paused    bool // by the operator
	held      bool // by the network
	stopping  bool
	jobs      map[receipt.JobID]*job // whose result is not stored yet
	busy      int                    // of them have a slot
	delivered int                    // tasks of jobs that have not ended; at least len(jobs)
	early     bool                   // Connected was called before Run
	heard     bool                   // something came from the network since the last housekeeping
	changed   chan struct{}          // closed and replaced when active, busy or delivered change
	tally     tally
	replays   map[*replay]struct{}   // that are under way
	unread    map[receipt.JobID]bool // results that cannot be read, and the operator knows
	tasks     sync.WaitGroup
}

// job is a job from admission until its result is stored.
type job struct {
	*wire.Job
	cancel context.CancelCauseFunc
	stream *stream // its chunks, if it has any

	durable bool // written down: may be announced. Guarded by Worker.mu
}

// New makes a worker. It takes jobs once [Worker.Run] runs and a deployment is
// active.
func New(cfg Config) *Worker {
	if cfg.Slots == nil {
		cfg.Slots = NewSlots()
	}
	return &Worker{cfg: cfg, fatal: make(chan error, 1), jobs: map[receipt.JobID]*job{}, replays: map[*replay]struct{}{}, unread: map[receipt.JobID]bool{}, changed: make(chan struct{})}
}

// Why a job's context ended.
var (
	errStopping  = errors.New("the agent stops")
	errCancelled = errors.New("cancelled by the network")
	errDeadline  = errors.New("the deadline has passed")
)

// housekeeping is how often results past their time are dropped.
const housekeeping = time.Minute

// Run works until ctx ends, and returns nil when nothing runs any more. Jobs
// that run then are cut short and stay accepted: the next start runs them again.
//
// It fails when a result cannot be stored although there is room: then what the
// node has promised is kept only by starting anew from what the disk holds.
func (w *Worker) Run(ctx context.Context) error {
	jobs, err := w.cfg.Store.Unfinished()
	if err != nil {
		return fmt.Errorf("jobs of the last start: %w", err)
	}
	base, stop := context.WithCancelCause(context.WithoutCancel(ctx))
	w.mu.Lock()
	w.base = base
	for _, j := range jobs {
		k := &job{Job: j, durable: true}
		w.goLocked(k, func(ctx context.Context) { w.resume(ctx, k) })
	}
	early := w.early
	w.mu.Unlock()
	if early {
		w.Connected()
	}

	tick := time.NewTicker(housekeeping)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			w.expire()
			continue
		case err = <-w.fatal:
		case <-ctx.Done():
		}
		w.mu.Lock()
		w.base, w.stopping = nil, true
		w.endReplaysLocked()
		w.mu.Unlock()
		stop(errStopping)
		w.tasks.Wait()
		return err
	}
}

// goLocked runs a job's task. Its context ends at the deadline, and with one of
// the causes above.
func (w *Worker) goLocked(k *job, task func(context.Context)) {
	ctx, cancel := context.WithCancelCause(w.base)
	k.cancel = cancel
	w.jobs[k.ID] = k
	w.delivered++
	w.tasks.Go(func() {
		defer cancel(nil)
		ctx, stop := context.WithTimeoutCause(ctx, time.UnixMilli(k.Deadline).Sub(w.cfg.Now()), errDeadline)
		defer stop()
		task(ctx)
		w.mu.Lock()
		defer w.mu.Unlock()
		w.delivered--
		w.changedLocked()
	})
}

func (w *Worker) changedLocked() {
	close(w.changed)
	w.changed = make(chan struct{})
}

// expire drops results past their time. It does so only while something is
// heard from the network, which shows that the clock is right: what is heard
// has passed the session's check of the time.
func (w *Worker) expire() {
	w.mu.Lock()
	a, heard := w.active, w.heard
	w.heard = false
	w.mu.Unlock()
	if a == nil || !heard {
		return
	}
	dropped, err := w.cfg.Store.Expire(a.Snapshot.Config().Limits.ResultTTL.Duration())
	if err != nil {
		w.cfg.Log.Error("old results not dropped", journal.StorageFailed.Attr(), "error", err)
	}
	if dropped > 0 {
		w.cfg.Log.Warn("results dropped that the network has never acknowledged", "results", dropped)
	}
}

// SetActive says under which deployment jobs are taken from now on; nil for
// none. Jobs that run keep theirs.
func (w *Worker) SetActive(a *Active) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.active = a
	w.cfg.Slots.serve(w, a != nil)
	w.endReplaysLocked()
	w.changedLocked()
}

// Status is what heartbeats say of the worker.
type Status struct {
	Slots    int  // jobs it can run at once
	Busy     int  // jobs that run
	Taken    int  // slots that others have, or that are kept for them
	Outbox   int  // results without an acknowledgement
	Draining bool // takes no new jobs, for whatever reason
	Paused   bool // by the operator
}

// Status returns the worker's state.
func (w *Worker) Status() Status {
	w.mu.Lock()
	defer w.mu.Unlock()
	s := Status{Busy: w.busy, Draining: w.paused || w.held || w.stopping, Paused: w.paused, Outbox: w.cfg.Store.Counts().Results}
	if w.active != nil {
		s.Slots = w.active.slots()
		s.Taken = max(0, s.Slots-s.Busy-w.cfg.Slots.free(w, s.Slots, w.cfg.Now()))
	}
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

// Hold refuses new jobs while on is true. It is the network's word, and apart from
// the operator's: jobs are taken when neither refuses.
func (w *Worker) Hold(on bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.held = on
}

// Deadline returns when the last of the jobs that run now must have ended, zero
// when none runs.
func (w *Worker) Deadline() (last time.Time) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, k := range w.jobs {
		if at := time.UnixMilli(k.Job.Deadline); at.After(last) {
			last = at
		}
	}
	return last
}

// Idle waits until no job has a slot, or fails when ctx ends before.
func (w *Worker) Idle(ctx context.Context) error {
	return w.wait(ctx, func() int { return w.busy })
}

// Drain takes no new jobs from now on, and waits until those that run have
// ended and their results are on the way. It fails when ctx ends before. There
// is no way back: it is for the end of the agent.
func (w *Worker) Drain(ctx context.Context) error {
	w.mu.Lock()
	w.stopping = true
	w.endReplaysLocked()
	w.changedLocked() // those that wait for a slot do not get one any more
	w.mu.Unlock()
	return w.wait(ctx, func() int { return w.delivered })
}

func (w *Worker) wait(ctx context.Context, count func() int) error {
	for {
		w.mu.Lock()
		n, changed := count(), w.changed
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

// Job takes or refuses a job. The answer goes out by Send.
func (w *Worker) Job(j *wire.Job) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.heard = true
	if w.base == nil {
		w.refuse(j, refusal{wire.CodeNotReady, "the agent is starting or stopping"})
		return
	}
	if k := w.jobs[j.ID]; k != nil {
		if k.durable { // else the answer is on its way
			w.send(&wire.Accept{Job: j.ID})
			if k.stream != nil {
				k.stream.again()
			}
		}
		return
	}
	a := w.active
	if r := w.admitLocked(j); r != nil {
		base := w.base
		w.tasks.Go(func() { w.answerKnown(base, j, *r) })
		return
	}
	w.busy++
	defer w.tellOthers()
	k := &job{Job: j}
	if j.Stream {
		k.stream = &stream{job: j.ID, send: w.cfg.Send}
	}
	w.goLocked(k, func(ctx context.Context) { w.take(ctx, k, a) })
}

// take accepts a job that has a slot, or refuses it after all, and runs it.
func (w *Worker) take(ctx context.Context, k *job, a *Active) {
	req, r := parse(a.Snapshot.Config(), k.Job)
	if known, err := w.cfg.Store.Lookup(k.ID); err == nil && known != 0 {
		r = &seen
	}
	if r != nil {
		w.release(k)
		w.answerKnown(ctx, k.Job, *r)
		return
	}
	// The engine begins before the job is written down, which takes as long as a
	// fast engine's answer. Nobody hears of it before.
	began := w.begin(a)
	res, err := w.ask(ctx, k, a, req, func() error {
		if r = w.writeDown(k); r != nil {
			return errors.New("not written down")
		}
		failpoint.Here("work.accept.durable")
		w.mu.Lock()
		k.durable = true
		w.mu.Unlock()
		w.send(&wire.Accept{Job: k.ID})
		return nil
	})
	if r != nil {
		w.release(k)
		w.answerKnown(ctx, k.Job, *r)
		return
	}
	w.conclude(ctx, k, a, began, res, err)
}

// beginning is when and where the engine began with a job.
type beginning struct {
	at      time.Time // by the clock of receipts
	since   time.Time // for how long it took, whatever that clock has been set to since
	sandbox digest.Digest
}

func (w *Worker) begin(a *Active) beginning { return beginning{w.cfg.Now(), time.Now(), a.Sandbox()} }

// writeDown makes the job durable.
func (w *Worker) writeDown(k *job) *refusal {
	known, err := w.cfg.Store.Accept(k.Job)
	switch {
	case errors.Is(err, state.ErrFull):
		w.cfg.Log.Error("no room for a job", journal.StorageFailed.Attr(), "job", k.ID, "error", err)
		return &refusal{wire.CodeStorage, "this node has no room for the job"}
	case err != nil:
		w.cfg.Log.Error("job not stored", journal.StorageFailed.Attr(), "job", k.ID, "error", err)
		if errors.Is(err, state.ErrBroken) {
			w.die(err)
		}
		return &refusal{wire.CodeStorage, "this node cannot store the job"}
	case known == state.Forgotten:
		return &forgotten
	case known != state.New:
		return &seen
	}
	return nil
}

// seen refuses a job that is settled. Not as a duplicate, which would say that
// its result may still come from here; if it may, answerKnown sends it instead.
var seen = refusal{wire.CodeInternal, "this node has signed its receipt for the job already, and signs one only"}

// forgotten refuses a job that may have been answered: the disk has lost what is known of
// those of its time.
var forgotten = refusal{wire.CodeInternal, "this node's disk has lost what it knew of jobs of that time, and it answers none twice"}

// answerKnown sends the result of a job again, if there is one: then the network
// has lost sight of it. Otherwise it refuses the job.
func (w *Worker) answerKnown(ctx context.Context, j *wire.Job, r refusal) {
	switch known, err := w.cfg.Store.Lookup(j.ID); {
	case err != nil:
		w.cfg.Log.Error("job not looked up", journal.StorageFailed.Attr(), "job", j.ID, "error", err)
	case known == state.Done:
		res, ok, err := w.cfg.Store.Result(j.ID)
		if err != nil {
			w.tellUnread(j.ID, err)
		}
		if ok && !errors.Is(context.Cause(ctx), errStopping) {
			w.send(res)
			return
		}
	}
	w.refuse(j, r)
}

// resume runs a job of an earlier start again, under the very terms it was
// accepted under. It ends it if those are not to be had.
func (w *Worker) resume(ctx context.Context, k *job) {
	for {
		w.mu.Lock()
		a, changed := w.active, w.changed
		run := a != nil && !a.suspect() && a.Snapshot.Digest() == k.Config && !w.stopping && w.cfg.Slots.take(w, a.slots(), w.cfg.Now())
		if run {
			w.busy++
		}
		stopping := w.stopping
		w.mu.Unlock()
		switch {
		case stopping:
			w.forget(k) // stays accepted; the next start finds it again
			return
		case run:
			w.rerun(ctx, k, a)
			return
		case a != nil && a.Snapshot.Digest() != k.Config:
			w.fail(ctx, k, wire.CodeConfig, "the node was restarted and is on another configuration", errors.New("restarted into another configuration"))
			return
		}
		select {
		case <-changed:
		case <-ctx.Done():
			code, message := classify(ctx, ctx.Err())
			w.fail(ctx, k, code, message, context.Cause(ctx))
			return
		}
	}
}

func (w *Worker) rerun(ctx context.Context, k *job, a *Active) {
	req, r := parse(a.Snapshot.Config(), k.Job)
	if r != nil { // it was not, when the job was accepted
		w.release(k)
		w.fail(ctx, k, r.code, r.message, errors.New("the request does not pass any more"))
		return
	}
	if k.Stream {
		w.mu.Lock()
		k.stream = &stream{job: k.ID, send: w.cfg.Send}
		w.mu.Unlock()
	}
	began := w.begin(a)
	res, err := w.ask(ctx, k, a, req, nil)
	w.conclude(ctx, k, a, began, res, err)
}

// conclude makes the result of an accepted job of what the engine has said.
func (w *Worker) conclude(ctx context.Context, k *job, a *Active, began beginning, res runtime.Result, err error) {
	c := a.Snapshot.Config()
	// Not the clock's time now: it may have jumped meanwhile, and the network takes no
	// receipt for a time to come.
	started, took := began.at, time.Since(began.since)
	finished := started.Add(took)
	if err == nil {
		err = check(c, k, res, started)
	}
	code, message := wire.Code(""), ""
	if err != nil {
		code, message = classify(ctx, err)
	}
	w.judge(ctx, a, code, message, took)
	w.release(k)
	if err != nil {
		w.fail(ctx, k, code, message, err)
		return
	}
	r := receipt.Receipt{
		Job: k.ID, Node: w.cfg.Key.Address(),
		Measured: receipt.Measured{
			ConfigDigest: a.Snapshot.Digest(), ImageDigest: a.Image, ModelDigest: a.Model, SandboxDigest: began.sandbox,
			RequestHash: digest.Of(k.Request), ResponseHash: digest.Of(res.Body),
		},
		Claimed: receipt.Claimed{
			ClassDigest: cmp.Or(a.Class, receipt.Unknown), PromptTokens: res.Usage.PromptTokens, CompletionTokens: res.Usage.CompletionTokens,
			// The clock may have been set while the engine worked.
			StartedAt: uint64(started.UnixMilli()), FinishedAt: uint64(finished.UnixMilli()),
		},
	}
	signed, err := w.cfg.Key.Receipt(c.Network.ChainID, r)
	if err != nil {
		w.fail(ctx, k, wire.CodeInternal, "the receipt could not be signed", err)
		return
	}
	if w.finish(k, &wire.Result{Job: k.ID, Response: res.Body, Receipt: &signed}) { // the network does not wait for our log
		w.cfg.Log.Info("job done", journal.JobDone.Attr(), "job", k.ID, "model", k.Model,
			"prompt_tokens", res.Usage.PromptTokens, "completion_tokens", res.Usage.CompletionTokens, "took", took.Round(time.Microsecond))
	}
}

// judge counts the engine's failures in a row. A deadline is one where the engine
// had half of the time that any job may have: it can go on without end. What the
// client or the network has caused is none.
func (w *Worker) judge(ctx context.Context, a *Active, code wire.Code, message string, took time.Duration) {
	bad := code == wire.CodeEngine || code == wire.CodeOutput ||
		code == wire.CodeDeadline && took >= a.Snapshot.Config().Limits.Deadline.Duration()/2
	if errors.Is(context.Cause(ctx), errStopping) || code != "" && !bad {
		return
	}
	w.mu.Lock()
	switch {
	case bad:
		a.failures++
	case !a.suspect(): // who is suspect stays so
		a.failures = 0
	}
	tell := bad && a.failures == suspectAfter
	w.mu.Unlock()
	if tell && w.cfg.Suspect != nil {
		w.cfg.Suspect(a, fmt.Sprintf("%d jobs in a row, the last with %s: %s", suspectAfter, code, message))
	}
}

// ask has the engine answer, and passes chunks on as they come. For sent see
// [runtime.Job].
func (w *Worker) ask(ctx context.Context, k *job, a *Active, req *openai.Request, sent func() error) (runtime.Result, error) {
	var emit func([]byte) error
	if k.stream != nil {
		emit = func(b []byte) error {
			k.stream.write(b)
			return nil // a chunk that is not sent is no loss: the result has everything
		}
	}
	limits := &a.Snapshot.Config().Limits
	return a.Engine.Run(ctx, runtime.Job{
		ID: k.ID, Request: req, Model: k.Model, Created: k.Created, Seed: k.Seed,
		Tokens: limits.Tokens, ResponseBytes: limits.ResponseBytes, Sent: sent,
	}, emit)
}

// errUnsound says that an answer is not what this node may sign. The engine's
// client has checked it; this is the last look before the receipt.
var errUnsound = errors.New("the answer does not hold together")

// errBehind says that a receipt would have a time before its job's.
var errBehind = errors.New("this node's clock is behind the job's")

// endMark ends every stream.
var endMark = []byte("data: [DONE]\n\n")

// check looks for what the network would count as a violation of the protocol,
// as far as a node can know it.
func check(c *snapshot.Config, k *job, res runtime.Result, started time.Time) error {
	body, used := res.Body, res.Usage
	switch {
	case len(body) == 0:
		return fmt.Errorf("%w: it is empty", errUnsound)
	case int64(len(body)) > c.Limits.ResponseBytes:
		return fmt.Errorf("%w: %d bytes, at most %d", errUnsound, len(body), c.Limits.ResponseBytes)
	case k.stream != nil && !bytes.HasPrefix(body, k.stream.sofar()):
		return fmt.Errorf("%w: it is not what was streamed", errUnsound)
	case k.Stream && !bytes.HasSuffix(body, endMark):
		return fmt.Errorf("%w: the stream has no end mark", errUnsound)
	case used.PromptTokens > uint64(c.Runtime.Settings.Context):
		return fmt.Errorf("%w: %d prompt tokens, the context has %d", errUnsound, used.PromptTokens, c.Runtime.Settings.Context)
	case used.CompletionTokens > uint64(c.Limits.Tokens):
		return fmt.Errorf("%w: %d completion tokens, at most %d", errUnsound, used.CompletionTokens, c.Limits.Tokens)
	case started.Before(time.Unix(k.Created, 0).Add(-c.Network.ClockWindow.Duration())):
		return errBehind
	}
	return nil
}

// classify says in the protocol's words why a job failed. The text is ours: what
// an engine says of a failure may quote the prompt.
func classify(ctx context.Context, err error) (wire.Code, string) {
	var request *openai.Error
	var output *openai.OutputError
	switch cause := context.Cause(ctx); {
	case errors.Is(cause, errCancelled):
		return wire.CodeCancelled, "cancelled"
	case errors.Is(cause, errDeadline):
		return wire.CodeDeadline, "the deadline passed before there was an answer"
	case errors.As(err, &request) && request.Code == openai.CodeContextLength:
		return wire.CodeContext, "the prompt, with the tokens that are asked for, is longer than the model's context"
	case errors.As(err, &request):
		return wire.CodeBadRequest, "the engine refused the request"
	case errors.As(err, &output):
		return wire.CodeOutput, "the engine's output breaks its API: " + string(output.Reason)
	case errors.Is(err, errUnsound):
		return wire.CodeOutput, errUnsound.Error()
	case errors.Is(err, errBehind):
		return wire.CodeInternal, errBehind.Error()
	}
	return wire.CodeEngine, "the engine failed"
}

// fail ends a job without an answer, unless it was cut short by the agent's
// stop: then it stays accepted.
func (w *Worker) fail(ctx context.Context, k *job, code wire.Code, message string, err error) {
	if errors.Is(context.Cause(ctx), errStopping) {
		w.forget(k)
		return
	}
	w.cfg.Log.Warn("job failed", journal.JobFailed.Attr(), "job", k.ID, "model", k.Model, "code", code, "error", err)
	w.finish(k, &wire.Result{Job: k.ID, Code: code, Message: message})
}

// retries is how long a full disk is waited for; it stays at the last one.
var retries = []time.Duration{time.Second, 5 * time.Second, 30 * time.Second}

// finish makes the result durable, then sends it. It reports whether it was this
// one, and not a failure in its place.
func (w *Worker) finish(k *job, res *wire.Result) (asGiven bool) {
	given := res
	err := w.cfg.Store.Finish(res)
	if errors.Is(err, state.ErrFull) && res.Code == "" {
		w.cfg.Log.Error("no room for a result", journal.StorageFailed.Attr(), "job", k.ID, "error", err)
		res = &wire.Result{Job: k.ID, Code: wire.CodeStorage, Message: "this node has no room for the result"}
		err = w.cfg.Store.Finish(res)
	}
	// Room for a failure is kept from the moment of acceptance on, where the
	// file system can do that.
	for try := 0; errors.Is(err, state.ErrFull); try++ {
		w.cfg.Log.Error("result not stored, trying again", journal.StorageFailed.Attr(), "job", k.ID, "error", err)
		if !w.pause(retries[min(try, len(retries)-1)]) {
			w.forget(k)
			return false
		}
		err = w.cfg.Store.Finish(res)
	}
	w.forget(k)
	if err != nil {
		w.die(fmt.Errorf("job %s is accepted and its result cannot be stored: %w", k.ID, err))
		return false
	}
	w.mu.Lock()
	w.tally.count(w.cfg.Now(), res.Code != "")
	w.mu.Unlock()
	failpoint.Here("work.finish.durable")
	w.send(res)
	if w.cfg.Keep != nil && res.Code == "" {
		w.cfg.Keep(k.Job, res)
	}
	return res == given
}

// die ends Run.
func (w *Worker) die(err error) {
	select {
	case w.fatal <- err:
	default: // it is ending already
	}
}

// pause waits unless the worker stops first. A job's own context may have ended.
func (w *Worker) pause(d time.Duration) bool {
	w.mu.Lock()
	base := w.base
	w.mu.Unlock()
	if base == nil {
		return false
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-base.Done():
		return false
	}
}

// release gives a job's slot back. That comes before the result is sent: the
// network counts the slot as free from then on, and may be quick.
func (w *Worker) release(k *job) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if !k.durable {
		delete(w.jobs, k.ID) // it is refused
	}
	w.busy--
	w.cfg.Slots.give(w, w.cfg.Now())
	w.changedLocked()
	w.tellOthers()
}

// tellOthers has those who share the engine look at its slots again. They do so
// beside, as each has a mutex of its own.
func (w *Worker) tellOthers() {
	for _, o := range w.cfg.Slots.others(w) {
		go o.crowded()
	}
}

// crowded is told that somebody else has taken a slot or given one back.
func (w *Worker) crowded() {
	w.mu.Lock()
	w.changedLocked()
	w.mu.Unlock()
	if w.cfg.Crowded != nil {
		w.cfg.Crowded()
	}
}

// forget leaves the job to the store, which knows its state.
func (w *Worker) forget(k *job) {
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.jobs, k.ID)
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
	defer w.mu.Unlock()
	w.heard = true
	if k := w.jobs[c.Job]; k != nil {
		k.cancel(errCancelled)
	}
}

// Ack forgets results that the network has stored. That is at once: it holds up
// no job that comes after it.
func (w *Worker) Ack(a *wire.Ack) {
	w.mu.Lock()
	w.heard = true
	w.mu.Unlock()
	if err := w.cfg.Store.Ack(a.Jobs); err != nil {
		w.cfg.Log.Error("acknowledgement not stored; the results are sent again", journal.StorageFailed.Attr(), "error", err)
	}
}

// Connected sends everything that has not been acknowledged, in order. Call it
// when a session begins.
func (w *Worker) Connected() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.early = w.base == nil
	w.taskLocked(func(ctx context.Context) {
		unread, err := w.cfg.Store.Outbox(0, func(_ uint64, r *wire.Result) error {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			return w.cfg.Send(r)
		})
		if err != nil {
			w.cfg.Log.Debug("outbox not sent to its end; the next session sends it again", "error", err)
		}
		for _, u := range unread {
			w.tellUnread(u.Job, u.Err)
		}
	})
}

// tellUnread says, once, that a result is lost on the disk. What the disk has stays
// there for whoever looks into it.
func (w *Worker) tellUnread(id receipt.JobID, err error) {
	w.mu.Lock()
	told := w.unread[id]
	w.unread[id] = true
	w.mu.Unlock()
	if !told {
		w.cfg.Log.Error("a result cannot be read and is not sent", journal.ResultDamaged.Attr(), "job", id, "error", err)
	}
}

// taskLocked runs f, which the network has asked for, beside the caller.
func (w *Worker) taskLocked(f func(context.Context)) {
	w.heard = true
	if base := w.base; base != nil {
		w.tasks.Go(func() { f(base) })
	}
}
