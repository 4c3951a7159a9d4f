// Package agent owns the loops of a node and what passes between them.
//
// One errgroup holds them all: follow (the network's configuration), update
// (configuration to active deployment; the sole owner of the deployment and of
// the generations on disk), the session with the network, the worker that
// runs jobs, heartbeats, orders, the binding, uploads of the log, the control
// socket and the service manager's watchdog.
//
// The rule it keeps: start-up runs the same steps as every later change.
package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/resultity/node/internal/config"
	"github.com/resultity/node/internal/control"
	"github.com/resultity/node/internal/deploy"
	"github.com/resultity/node/internal/evm"
	"github.com/resultity/node/internal/gate"
	"github.com/resultity/node/internal/generation"
	"github.com/resultity/node/internal/hardware"
	"github.com/resultity/node/internal/image"
	"github.com/resultity/node/internal/journal"
	"github.com/resultity/node/internal/order"
	"github.com/resultity/node/internal/podman"
	"github.com/resultity/node/internal/runtime"
	"github.com/resultity/node/internal/session"
	"github.com/resultity/node/internal/signer"
	"github.com/resultity/node/internal/snapshot"
	"github.com/resultity/node/internal/spool"
	"github.com/resultity/node/internal/state"
	"github.com/resultity/node/internal/systemd"
	"github.com/resultity/node/internal/tuf"
	"github.com/resultity/node/internal/wire"
	"github.com/resultity/node/internal/work"
)

// The outside world, as far as the loops need it.
type (
	snapshots interface {
		// Refresh asks the network, Last the disk.
		Refresh(ctx context.Context) (*snapshot.Snapshot, error)
		Last() (*snapshot.Snapshot, error)
		Trust() (*tuf.Trust, error)
		// Proof and Open are what a generation keeps of a snapshot.
		Proof(s *snapshot.Snapshot) ([]byte, error)
		Open(proof []byte) (*snapshot.Snapshot, error)
	}
	deployer interface {
		Stage(ctx context.Context, s *snapshot.Snapshot) (*deploy.Plan, error)
		Warm(ctx context.Context, p *deploy.Plan, most int64) (read int64, err error)
		Apply(ctx context.Context, p *deploy.Plan, begin func(phase string)) (*deploy.Deployment, error)
		Clean(ctx context.Context, keep ...*snapshot.Snapshot) error
		Validate(ctx context.Context, d *deploy.Deployment) error
	}
	units interface {
		State(ctx context.Context, unit string) (systemd.State, error)
		Watch(ctx context.Context, unit string, f func()) error
		Stop(ctx context.Context, unit string) error
	}
	link interface {
		Run(ctx context.Context) error
		Send(m wire.Message) error
	}
	engine interface {
		Run(ctx context.Context, j runtime.Job, emit func([]byte) error) (runtime.Result, error)
		Close()
	}
)

// Agent is a node that has been put together by [New] and not started.
type Agent struct {
	cfg     *config.Config
	version string
	log     *slog.Logger

	key     signer.Signer
	held    *evm.Key // the key where it is in this process, else nil
	store   *state.Store
	snaps   snapshots
	gens    *generation.Store // changed by the update loop alone
	units   units
	session link
	worker  *work.Worker
	drained atomic.Pointer[time.Time] // by the operator, since when; nil for not
	drain   sync.Mutex                // held over a drain or a resume, so that all that they change is of one of them
	http    *http.Client              // for the network
	sources *http.Client              // for models and images
	profile wire.Hardware             // read once; its disk space at each heartbeat
	podman  atomic.Pointer[podman.Version]
	closers []func() error

	memory       func() int64 // bytes that may be taken
	openDeployer func(context.Context) (deployer, error)
	openEngine   func(socket string) engine
	enrol        func(context.Context, session.Registration) (*wire.Registered, error)
	bind         func(context.Context, session.Binding) (*wire.BindReply, error)
	machine      func(context.Context) []gate.Gate // looks at the machine; nil for none
	ahead        func() *time.Duration             // this clock before the network's

	spool     *spool.Spool      // of the log, for the network; nil when it is not uploaded
	upload    chan struct{}     // capacity 1: look whether there is something to upload
	uploadNow chan chan<- error // upload, and say when it is done
	logAcks   chan *wire.LogsAck
	dropped   atomic.Uint64                                         // log records that the network never got, since the start
	orderBook *order.Book                                           // of the network's orders
	verify    func(ctx context.Context, s *snapshot.Snapshot) error // hashes the models' files again
	inbox     chan wire.Message                                     // orders, and what the network says of their answers
	retell    chan struct{}                                         // capacity 1: tell the network every outcome that it has not acknowledged
	tasks     chan task                                             // for the update loop
	leaving   atomic.Bool                                           // the network has ordered a shutdown
	holding   sync.Mutex                                            // held while the worker is told of that, or of a drain
	halt      chan struct{}                                         // capacity maxLong: that has been done, and the agent ends

	probes     probes
	images     atomic.Pointer[image.Images]                             // nil until Podman has answered
	unitFiles  func(ctx context.Context, unit string) ([]string, error) // as the service manager has them
	configFile string                                                   // for the support archive
	doctoring  sync.Mutex                                               // held while doctor runs

	board      board
	seen       sightings
	door       door
	update     chan struct{} // capacity 1: ask the network for a newer configuration, then look
	look       chan struct{} // capacity 1: look again at what should be and what is
	beat       chan struct{} // capacity 1: tell the network how things are
	keep       chan struct{} // capacity 1: write down whose node this is
	registered chan struct{} // closed once the network knows the node
}

// poke makes a loop run once more; further pokes before it does are the same.
func poke(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// Run runs the node until ctx ends, then drains: no new jobs, running ones are
// finished or given up when the service manager's patience ends.
func (a *Agent) Run(ctx context.Context) error {
	listener, err := control.Listen(a.cfg.Paths.Runtime)
	if err != nil {
		return err
	}
	// Everything but the control socket and the session outlives ctx by the
	// time it takes to finish the jobs that run.
	work, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	a.recall()
	g, work := errgroup.WithContext(work)
	g.Go(func() error { return control.Serve(work, listener, a) })
	g.Go(func() error { return a.worker.Run(work) })
	g.Go(func() error { return a.follow(work) })
	g.Go(func() error { return a.updates(work) })
	g.Go(func() error { return a.watchRuntime(work) })
	g.Go(func() error { return a.heartbeats(work) })
	g.Go(func() error { return a.bindings(work) })
	g.Go(func() error { return a.orders(work) })
	g.Go(func() error { return a.uploads(work) })
	g.Go(func() error { return systemd.Watchdog(work, a.responsive) })
	g.Go(func() error {
		select {
		case <-a.registered:
			return a.session.Run(work)
		case <-work.Done():
			return nil
		}
	})
	if err := systemd.Ready("running"); err != nil {
		a.log.Warn("service manager not told", "error", err)
	}
	a.log.Info("agent ready", journal.AgentReady.Attr(), "version", a.version, "node", a.key.Address())
	g.Go(func() error {
		select {
		case <-ctx.Done():
			a.drainForStop(work)
			stop()
		case <-a.halt:
			a.drainForStop(work)
			stop()
		case <-work.Done():
		}
		return nil
	})
	return g.Wait()
}

// stopPatience is how long a stop waits for running jobs. The unit's
// TimeoutStopSec= is longer.
const stopPatience = 60 * time.Second

func (a *Agent) drainForStop(ctx context.Context) {
	a.log.Info("stopping", journal.AgentStopping.Attr())
	if err := systemd.Stopping("finishing jobs"); err != nil {
		a.log.Warn("service manager not told", "error", err)
	}
	a.worker.Pause()
	poke(a.beat) // so that the network gives its jobs to others from now on
	ctx, cancel := context.WithTimeout(ctx, stopPatience)
	defer cancel()
	if err := a.worker.Drain(ctx); err != nil {
		a.log.Warn("jobs were cut short; they are kept and run again at the next start, or elsewhere", "error", err)
	}
	// Best effort: the network notices a closed connection anyway.
	_ = a.session.Send(&wire.Bye{Reason: "agent stops"})
}

// responsive is what the watchdog's messages depend on: the board can be read
// and the worker answers.
func (a *Agent) responsive() bool {
	a.board.set(func(*board) {})
	a.worker.Status()
	return true
}

// heartbeats tells the network how things are, at its interval and when poked.
func (a *Agent) heartbeats(ctx context.Context) error {
	for {
		interval := 10 * time.Second
		if s := a.board.snapshot(); s != nil {
			interval = s.Config().Network.Heartbeat.Duration()
		}
		timer := time.NewTimer(interval)
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil
		case <-a.beat:
			timer.Stop()
		case <-timer.C:
		}
		if err := a.session.Send(a.heartbeat()); err != nil && !errors.Is(err, session.ErrNotConnected) {
			a.log.Debug("heartbeat not sent", "error", err)
		}
		a.watchGates() // after the heartbeat: it may take a moment
	}
}

func (a *Agent) heartbeat() *wire.Heartbeat {
	w := a.worker.Status()
	h := &wire.Heartbeat{
		Config: a.board.config(), Runtime: a.board.runtimeState(), Hardware: a.profile,
		Slots: w.Slots, Busy: w.Busy, Outbox: w.Outbox, Draining: w.Draining, Models: []wire.ModelState{},
	}
	for _, m := range a.board.modelStates() {
		h.Models = append(h.Models, m.ModelState)
	}
	h.Failed = a.failedConfig()
	h.Hardware.Disk = hardware.Free(a.cfg.Paths.State)
	if v := a.podman.Load(); v != nil { // it is asked when it is needed first
		h.Hardware.Podman = v.String()
	}
	return h
}

// Opened implements [session.Handler]: a session has been authenticated.
func (a *Agent) Opened() {
	a.board.set(func(b *board) { b.connected, b.sessErr, b.word = true, nil, nil })
	a.log.Info("session opened", journal.SessionOpened.Attr())
	a.worker.Connected()
	poke(a.retell)
	poke(a.upload)
	poke(a.beat)
}

// Closed implements [session.Handler].
func (a *Agent) Closed(err error) {
	var opened bool
	var before error
	a.board.set(func(b *board) {
		opened, before = b.connected, b.sessErr
		b.connected, b.sessErr, b.word = false, err, nil
	})
	event := journal.SessionClosed
	if errors.Is(err, wire.ErrClock) {
		event = journal.ClockWrong
	}
	if opened || !sameError(before, err) { // say it once, not at every try
		a.log.Warn("session closed", event.Attr(), "error", err)
	}
}

// Message implements [session.Handler]. It must not block: what takes time
// happens elsewhere.
func (a *Agent) Message(m wire.Message) {
	switch m := m.(type) {
	case *wire.Job:
		a.worker.Job(m)
	case *wire.Cancel:
		a.worker.Cancel(m)
	case *wire.Ack:
		a.worker.Ack(m)
	case *wire.Update:
		poke(a.update)
	case *wire.LogsAck:
		a.logsStored(m)
	case *wire.Order, *wire.OrderAck:
		a.post(m)
	case *wire.Bound:
		a.setBound(*m)
	case *wire.Status:
		var before *wire.Status
		a.board.set(func(b *board) { before, b.word = b.word, m })
		switch {
		case before != nil && *before == *m:
		case m.Routable:
			a.log.Info("routable", journal.Routable.Attr())
		default:
			a.log.Warn("not routable", journal.NotRoutable.Attr(), "reason", m.Reason)
		}
	}
}

// Status implements [control.Backend].
func (a *Agent) Status() control.Status {
	w := a.worker.Status()
	drains := a.drains(w)
	s := control.Status{
		Version: a.version, Node: a.key.Address().Hex(), Network: a.cfg.Network.Name,
		Gates:   a.gates(),
		Runtime: a.board.runtimeState(), Slots: w.Slots, Busy: w.Busy, Outbox: w.Outbox, Draining: w.Draining, Drains: drains, Orders: a.lastOrders(), Logs: a.logs(),
	}
	if p := a.orderBook.Penalty(); p != nil {
		s.Penalty = &control.Penalty{Reason: p.Reason, Until: time.UnixMilli(p.Until).UTC()}
	}
	ended := a.worker.Ended()
	s.Done, s.Failed = ended.Done, ended.Failed
	if !ended.Last.IsZero() {
		s.LastJob = &ended.Last
	}
	if v := a.gens.View(); v.Get(v.Current) != nil {
		g := describe(v.Get(v.Current))
		s.Current = &g
	}
	if c := a.board.snapshot(); c != nil {
		s.Snapshot = &control.Snapshot{Version: c.Version(), Digest: c.Digest().String(), Expires: c.Expires()}
	}
	return s
}

// Identity implements [control.Backend].
func (a *Agent) Identity() control.Identity {
	id := control.Identity{Node: a.key.Address().Hex(), Network: a.cfg.Network.Name}
	a.board.set(func(b *board) {
		id.Registered, id.Account, id.Method, id.Since = b.registered, b.bound.Account, b.bound.Method, b.bound.Since
	})
	return id
}

// Models implements [control.Backend].
func (a *Agent) Models() []control.Model { return a.board.modelStates() }

// Jobs implements [control.Backend].
func (a *Agent) Jobs(limit int) ([]control.Job, error) {
	jobs := []control.Job{}
	running, err := a.store.Unfinished()
	if err != nil {
		return nil, err
	}
	for _, j := range running[:min(len(running), limit)] {
		jobs = append(jobs, control.Job{ID: j.ID.String(), State: "running", Model: j.Model})
	}
	errFull := errors.New("enough")
	err = a.store.Outbox(0, func(_ uint64, r *wire.Result) error {
		if len(jobs) >= limit {
			return errFull
		}
		jobs = append(jobs, control.Job{ID: r.Job.String(), State: "unacknowledged", Code: r.Code})
		return nil
	})
	if err != nil && !errors.Is(err, errFull) {
		return nil, fmt.Errorf("read the outbox: %w", err)
	}
	return jobs, nil
}
