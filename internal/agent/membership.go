package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/resultity/node/internal/config"
	"github.com/resultity/node/internal/control"
	"github.com/resultity/node/internal/deploy"
	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/journal"
	"github.com/resultity/node/internal/order"
	"github.com/resultity/node/internal/sandbox/book"
	"github.com/resultity/node/internal/session"
	"github.com/resultity/node/internal/signer"
	"github.com/resultity/node/internal/snapshot"
	"github.com/resultity/node/internal/spool"
	"github.com/resultity/node/internal/state"
	"github.com/resultity/node/internal/tuf"
	"github.com/resultity/node/internal/wire"
	"github.com/resultity/node/internal/work"
)

// The outside world of one network, as far as its loops need it.
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
	link interface {
		Run(ctx context.Context) error
		Send(m wire.Message) error
	}
)

// machine is what a membership needs of the machine that it is on.
type machine interface {
	// changed says that what should run may be something else now.
	changed()
	// suspect says that the engine fails this network's jobs.
	suspect(m *membership, active *work.Active, why string)
	// hardware is the machine as it is now.
	hardware() wire.Hardware
	// failed returns why the machine is not on a configuration, or nil.
	failed(config digest.Digest) *wire.Failed
	// drainedSince returns since when the operator has drained the machine, or
	// nil.
	drainedSince() *time.Time
	// signer signs for the node.
	signer() signer.Signer

	// What the network orders; each returns when it is done.
	restart(ctx context.Context, m *membership) error
	revalidate(ctx context.Context, m *membership, dep *deploy.Deployment) error
	// recheck validates on schedule what serves.
	recheck(ctx context.Context, m *membership, dep *deploy.Deployment) error
	release(ctx context.Context, m *membership) error
	// ending is told of a membership that ends because its network wants it to.
	ending(m *membership)
}

// membership is the node's part in one network: its configuration, its jobs, its
// session, its orders, its log. It shares the machine with others, and nothing
// else.
type membership struct {
	net     config.Network
	dir     string // of the membership; nothing in it is shared with another one
	on      machine
	version string // of the agent
	log     *slog.Logger
	keeps   config.Log // what is kept of it for the network
	keepN   int        // how many jobs are kept for the operator

	key     signer.Signer
	store   *state.Store
	kept    *state.Kept // the last jobs, for the operator
	unkept  atomic.Bool // it was said that a job could not be kept
	snaps   snapshots
	session link
	worker  *work.Worker
	slots   *work.Slots  // of the machine's engine
	crowded atomic.Bool  // a heartbeat is due, since others have taken slots or given some back
	http    *http.Client // for the network
	closers []func() error

	enrol func(context.Context, session.Registration) (*wire.Registered, error)
	bind  func(context.Context, session.Binding) (*wire.BindReply, error)
	ahead func() *time.Duration // this clock before the network's

	spools    *spools           // where its handler goes
	spool     *spool.Spool      // of the log, for the network; nil when it is not uploaded
	upload    chan struct{}     // capacity 1: look whether there is something to upload
	uploadNow chan chan<- error // upload, and say when it is done
	logAcks   chan *wire.LogsAck
	dropped   atomic.Uint64 // log records that the network never got, since the start

	receipts receipts // of the receipt log

	records    *book.Book // of the runtime's sandbox
	recordAcks chan digest.Digest

	orderBook *order.Book       // of the network's orders
	inbox     chan wire.Message // orders, and what the network says of their answers
	retell    chan struct{}     // capacity 1: tell the network every outcome that it has not acknowledged
	leaving   atomic.Bool       // the network has ordered a shutdown
	holding   sync.Mutex        // held while the worker is told of that, or of a drain
	halt      chan struct{}     // capacity maxLong: that has been done, and the membership ends

	board      board
	door       door
	update     chan struct{} // capacity 1: ask the network for a newer configuration, then look
	recheck    chan struct{} // capacity 1: the time of the next validation may be another one
	beat       chan struct{} // capacity 1: tell the network how things are
	keep       chan struct{} // capacity 1: write down whose node this is
	registered chan struct{} // closed once the network knows the node
}

// shared is what all memberships of a machine are given.
type shared struct {
	state   string // directory
	version string
	log     *slog.Logger
	keeps   config.Log
	keepN   int
	spools  *spools
	slots   *work.Slots
}

// newMembership returns a membership without a world around it.
func newMembership(net config.Network, on machine, shared shared) *membership {
	return &membership{
		net: net, dir: filepath.Join(shared.state, "networks", net.Name), on: on, slots: shared.slots, spools: shared.spools, log: shared.log.With("network", net.Name), keeps: shared.keeps, keepN: shared.keepN, kept: new(state.Kept), version: shared.version,
		update: make(chan struct{}, 1), beat: make(chan struct{}, 1), recheck: make(chan struct{}, 1), registered: make(chan struct{}), keep: make(chan struct{}, 1),
		upload: make(chan struct{}, 1), uploadNow: make(chan chan<- error), logAcks: make(chan *wire.LogsAck, 4), recordAcks: make(chan digest.Digest, book.Most), receipts: receipts{look: make(chan struct{}, 1)},
		inbox: make(chan wire.Message, maxInbox), retell: make(chan struct{}, 1), halt: make(chan struct{}, maxLong),
		board: board{network: net.Name, away: time.Now(), phase: stopped, models: map[digest.Digest]int64{}},
	}
}

// run takes part in the network until end is closed, or the network orders a
// shutdown. Then it drains: no new jobs, running ones are finished or given up
// when the service manager's patience ends. It ends at once with ctx.
func (m *membership) run(ctx context.Context, end <-chan struct{}) error {
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	m.recall()
	g, ctx := errgroup.WithContext(ctx)
	for _, loop := range []func(context.Context) error{m.worker.Run, m.follow, m.heartbeats, m.bindings, m.orders, m.uploads, m.showReceipts, m.keepRecords, m.validations} {
		g.Go(func() error { return loop(ctx) })
	}
	g.Go(func() error {
		select {
		case <-m.registered:
			return m.session.Run(ctx)
		case <-ctx.Done():
			return nil
		}
	})
	g.Go(func() error {
		select {
		case <-end:
		case <-m.halt:
			m.on.ending(m)
		case <-ctx.Done():
			return nil
		}
		m.finish(ctx)
		stop()
		return nil
	})
	return g.Wait()
}

// stopPatience is how long a stop waits for running jobs. The unit's
// TimeoutStopSec= is longer.
const stopPatience = 60 * time.Second

// finish has the jobs that run end and says goodbye.
func (m *membership) finish(ctx context.Context) {
	m.worker.Pause()
	poke(m.beat) // so that the network gives its jobs to others from now on
	ctx, cancel := context.WithTimeout(ctx, stopPatience)
	defer cancel()
	if err := m.worker.Drain(ctx); err != nil {
		m.log.Warn("jobs were cut short; they are kept and run again at the next start, or elsewhere", "error", err)
	}
	// Best effort: the network notices a closed connection anyway.
	_ = m.session.Send(&wire.Bye{Reason: "agent stops"})
}

// close gives back what was opened for it.
func (m *membership) close() error {
	var errs []error
	for i := len(m.closers) - 1; i >= 0; i-- {
		errs = append(errs, m.closers[i]())
	}
	return errors.Join(errs...)
}

// responsive reports whether the membership's parts answer; it blocks if one of
// them hangs.
func (m *membership) responsive() bool {
	m.board.set(func(*board) {})
	m.worker.Status()
	return true
}

// heartbeats tells the network how things are, at its interval and when poked.
func (m *membership) heartbeats(ctx context.Context) error {
	for {
		interval := 10 * time.Second
		if s := m.board.snapshot(); s != nil {
			interval = s.Config().Network.Heartbeat.Duration()
		}
		timer := time.NewTimer(interval)
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil
		case <-m.beat:
			timer.Stop()
		case <-timer.C:
		}
		if err := m.receipts.beatWith(m.heartbeat(), m.session.Send); err != nil && !errors.Is(err, session.ErrNotConnected) {
			m.log.Debug("heartbeat not sent", "error", err)
		}
		poke(m.receipts.look)
	}
}

func (m *membership) heartbeat() *wire.Heartbeat {
	w := m.worker.Status()
	h := &wire.Heartbeat{
		Config: m.board.config(), Runtime: m.board.runtimeState(), Hardware: m.on.hardware(),
		Slots: w.Slots, Busy: w.Busy + w.Taken, Outbox: w.Outbox, Draining: w.Draining, Models: []wire.ModelState{},
	}
	for _, s := range m.board.modelStates() {
		h.Models = append(h.Models, s.ModelState)
	}
	if s := m.board.snapshot(); s != nil {
		h.Failed = m.on.failed(s.Digest())
	}
	h.Class = m.board.class()
	return h
}

// Opened implements [session.Handler]: a session has been authenticated.
func (m *membership) Opened() {
	m.receipts.begin()
	m.board.set(func(b *board) { b.connected, b.sessErr, b.word = true, nil, nil })
	m.on.changed()
	m.log.Info("session opened", journal.SessionOpened.Attr())
	m.sendRecords(m.records.Records()) // before the results
	m.worker.Connected()
	poke(m.retell)
	poke(m.upload)
	poke(m.beat)
}

// Closed implements [session.Handler].
func (m *membership) Closed(err error) {
	m.receipts.begin()
	var opened bool
	var before error
	m.board.set(func(b *board) {
		opened, before = b.connected, b.sessErr
		b.connected, b.sessErr, b.word = false, err, nil
		if opened {
			b.away = time.Now()
		}
	})
	if opened {
		m.on.changed()
	}
	if opened || !sameError(before, err) { // say it once, not at every try
		event, reason := sessionEvent(err)
		m.log.Warn("session closed", event.Attr(), "reason", reason, "error", err)
	}
}

// sessionEvent says in the catalog's terms why there is no session.
func sessionEvent(err error) (event *journal.Event, reason string) {
	reason, byNode := session.Refusal(err)
	switch {
	case errors.Is(err, wire.ErrClock): // whoever has noticed it
		return journal.ClockWrong, "clock"
	case errors.Is(err, session.ErrCloned):
		return journal.KeyCloned, reason
	case reason == "":
		return journal.SessionClosed, "lost"
	case byNode:
		return journal.FrameRefused, reason
	}
	return journal.SessionRefused, reason
}

// Message implements [session.Handler]. It must not block: what takes time
// happens elsewhere.
func (m *membership) Message(msg wire.Message) {
	switch msg := msg.(type) {
	case *wire.Job:
		m.worker.Job(msg)
	case *wire.Cancel:
		m.worker.Cancel(msg)
	case *wire.Ack:
		m.worker.Ack(msg)
	case *wire.Update:
		poke(m.update)
	case *wire.LogsAck:
		m.logsStored(msg)
	case *wire.LeavesAck:
		m.receipts.heard(msg)
	case *wire.SandboxAck:
		m.recordStored(msg)
	case *wire.Order, *wire.OrderAck:
		m.post(msg)
	case *wire.Bound:
		m.setBound(*msg)
	case *wire.Status:
		var before *wire.Status
		m.board.set(func(b *board) { before, b.word = b.word, msg })
		switch {
		case before != nil && *before == *msg:
		case msg.Routable:
			m.log.Info("routable", journal.Routable.Attr())
		default:
			m.log.Warn("not routable", journal.NotRoutable.Attr(), "reason", msg.Reason)
		}
	}
}

// status is what the operator sees of the membership, but for its gates.
func (m *membership) status() control.Network {
	w := m.worker.Status()
	n := control.Network{
		Name: m.net.Name, Priority: m.net.Priority, Runtime: m.board.runtimeState(),
		Slots: w.Slots, Busy: w.Busy, Taken: w.Taken, Outbox: w.Outbox, Draining: w.Draining, Drains: m.drains(w), Orders: m.lastOrders(), Logs: m.logs(), ReceiptLog: m.receiptLog(), Damage: m.damage(), Sandbox: m.recorded(),
	}
	if p := m.orderBook.Penalty(); p != nil {
		n.Penalty = &control.Penalty{Reason: p.Reason, Until: time.UnixMilli(p.Until).UTC()}
	}
	n.Class, n.Validation = m.board.class(), m.board.validation()
	ended := m.worker.Ended()
	n.Done, n.Failed = ended.Done, ended.Failed
	if !ended.Last.IsZero() {
		n.LastJob = &ended.Last
	}
	if c := m.board.snapshot(); c != nil {
		n.Snapshot = &control.Snapshot{Version: c.Version(), Digest: c.Digest().String(), Expires: c.Expires()}
	}
	return n
}

// crowdedEvery is how soon after one another heartbeats say that other networks
// have taken slots, or given some back.
const crowdedEvery = 100 * time.Millisecond

// others is told that they have. Jobs may come and go quickly.
func (m *membership) others() {
	if m.crowded.CompareAndSwap(false, true) {
		time.AfterFunc(crowdedEvery, func() {
			m.crowded.Store(false)
			poke(m.beat)
		})
	}
}

// jobs lists the jobs that the membership has not forgotten, at most limit.
func (m *membership) jobs(limit int) ([]control.Job, error) {
	jobs := []control.Job{}
	running, err := m.store.Unfinished()
	if err != nil {
		return nil, err
	}
	for _, j := range running[:min(len(running), limit)] {
		jobs = append(jobs, control.Job{ID: j.ID.String(), Network: m.net.Name, State: "running", Model: j.Model})
	}
	errFull := errors.New("enough")
	unread, err := m.store.Outbox(0, func(_ uint64, r *wire.Result) error {
		if len(jobs) >= limit {
			return errFull
		}
		jobs = append(jobs, control.Job{ID: r.Job.String(), Network: m.net.Name, State: "unacknowledged", Code: r.Code})
		return nil
	})
	if err != nil && !errors.Is(err, errFull) {
		return nil, fmt.Errorf("read the outbox: %w", err)
	}
	for _, u := range unread[:min(len(unread), limit-len(jobs))] {
		jobs = append(jobs, control.Job{ID: u.Job.String(), Network: m.net.Name, State: "unreadable"})
	}
	for _, id := range m.kept.IDs() {
		if len(jobs) >= limit {
			break
		}
		jobs = append(jobs, control.Job{ID: id.String(), Network: m.net.Name, State: "kept"})
	}
	return jobs, nil
}
