// Package agent owns the loops of a node and what passes between them.
//
// Two types share them out. [Agent] is the machine: the node's key, the sole
// owner of the deployment and of the generations on disk (the update loop), the
// watch over the runtime's unit, the control socket and the service manager's
// watchdog. A membership is the node's part in one network: its configuration
// (follow), its session, the worker that runs its jobs, heartbeats, orders, the
// binding, uploads of the log. What a membership may ask of the machine is the
// interface machine; what the machine reads of a membership is its board, where
// its loops write what they know, and its door, where jobs are let to the
// runtime.
//
// A node may be in several networks. Which of them decides what the one runtime
// is, when another has a part in it, and when it waits, is the update loop's
// matter: see lead.go. One network's orders and failures are about its own part.
//
// The rule it keeps: start-up runs the same steps as every later change.
package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/resultity/node/internal/config"
	"github.com/resultity/node/internal/control"
	"github.com/resultity/node/internal/deploy"
	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/evm"
	"github.com/resultity/node/internal/gate"
	"github.com/resultity/node/internal/generation"
	"github.com/resultity/node/internal/hardware"
	"github.com/resultity/node/internal/image"
	"github.com/resultity/node/internal/journal"
	"github.com/resultity/node/internal/model/share"
	"github.com/resultity/node/internal/podman"
	"github.com/resultity/node/internal/runtime"
	"github.com/resultity/node/internal/sandbox/record"
	"github.com/resultity/node/internal/signer"
	"github.com/resultity/node/internal/snapshot"
	"github.com/resultity/node/internal/systemd"
	"github.com/resultity/node/internal/wire"
	"github.com/resultity/node/internal/work"
)

// The outside world of the machine, as far as its loops need it.
type (
	deployer interface {
		Stage(ctx context.Context, s *snapshot.Snapshot) (*deploy.Plan, error)
		Warm(ctx context.Context, p *deploy.Plan, most int64) (read int64, err error)
		Apply(ctx context.Context, p *deploy.Plan, begin func(phase string)) (*deploy.Deployment, error)
		Clean(ctx context.Context, keep ...*snapshot.Snapshot) error
		Validate(ctx context.Context, d *deploy.Deployment) (digest.Digest, error)
		Inspect(ctx context.Context, d *deploy.Deployment) (record.Views, error)
		Trusted(ctx context.Context, s *snapshot.Snapshot) error
		Share(ctx context.Context, d *deploy.Deployment, p *deploy.Plan) (*deploy.Deployment, error)
	}
	units interface {
		State(ctx context.Context, unit string) (systemd.State, error)
		Watch(ctx context.Context, unit string, f func()) error
		Stop(ctx context.Context, unit string) error
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
	held    *evm.Key      // the key where it is in this process, else nil
	members []*membership // by priority, the highest first
	refused []refused     // networks that could not be joined
	shared  shared
	slots   *work.Slots       // of the engine
	gens    *generation.Store // changed by the update loop alone
	units   units
	drained atomic.Pointer[time.Time] // by the operator, since when; nil for not
	drain   sync.Mutex                // held over a drain or a resume, so that all that they change is of one of them
	sources *http.Client              // for models and images
	profile wire.Hardware             // read once; its disk space at each heartbeat
	podman  atomic.Pointer[podman.Version]
	closers []func() error

	memory       func() int64 // bytes that may be taken
	openDeployer func(context.Context) (deployer, error)
	openEngine   func(socket string) engine
	machine      func(context.Context) []gate.Gate                        // looks at the machine; nil for none
	distrust     func(ctx context.Context, file digest.Digest) error      // reads a file of a model again, and sets it aside if it is damaged
	scrubbed     chan digest.Digest                                       // files that a scrub has found damaged
	scrubDone    chan struct{}                                            // capacity 1: the models were read again
	verifyImage  func(ctx context.Context, s *snapshot.Snapshot) error    // reads the stored image again, and removes it if it is damaged
	verify       func(ctx context.Context, s *snapshot.Snapshot) error    // reads the models' files and the image again
	probes       probes                                                   //
	images       atomic.Pointer[image.Images]                             // nil until Podman has answered
	unitFiles    func(ctx context.Context, unit string) ([]string, error) // as the service manager has them
	configFile   string                                                   // for the support archive
	doctoring    sync.Mutex                                               // held while doctor runs
	report       atomic.Pointer[control.Report]                           // doctor's last; nil for none
	seen         sightings

	share *share.Server // of files of models; nil for none

	look  chan struct{} // capacity 1: look again at what should be and what is
	tasks chan task     // for the update loop
}

// poke makes a loop run once more; further pokes before it does are the same.
func poke(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// Run runs the node until ctx ends or its network has it shut down, after the
// jobs that run have ended.
func (a *Agent) Run(ctx context.Context) error {
	listener, err := control.Listen(a.cfg.Paths.Runtime)
	if err != nil {
		return err
	}
	// Everything but the sessions' end outlives ctx by the time it takes to finish
	// the jobs that run.
	work, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	g, work := errgroup.WithContext(work)
	for _, loop := range []func(context.Context) error{a.updates, a.watchRuntime, a.watchSandbox, a.watchGates, a.mendDamage, a.watchImage, a.shareModels} {
		g.Go(func() error { return loop(work) })
	}
	g.Go(func() error { return control.Serve(work, listener, a) })
	g.Go(func() error { return systemd.Watchdog(work, a.responsive) })
	g.Go(func() error {
		defer stop()
		return a.takePart(ctx, work)
	})
	if err := systemd.Ready("running"); err != nil {
		a.log.Warn("service manager not told", "error", err)
	}
	a.log.Info("agent ready", journal.AgentReady.Attr(), "version", a.version, "node", a.key.Address())
	defer context.AfterFunc(ctx, a.sayStopping)()
	return g.Wait()
}

// takePart runs the memberships until all have ended: with ctx, or because their
// networks want it. One that fails ends the others, too, since only a new start
// from what the disk holds keeps what it has promised; but those finish their
// jobs before.
func (a *Agent) takePart(ctx, work context.Context) error {
	ending, end := context.WithCancel(ctx)
	defer end()
	errs := make([]error, len(a.members))
	var wg sync.WaitGroup
	for i, m := range a.members {
		wg.Go(func() {
			if errs[i] = m.run(work, ending.Done()); errs[i] != nil {
				m.log.Error("the node's part in this network has failed", journal.AgentFailed.Attr(), "error", errs[i])
				end()
			}
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

// responsive is what the watchdog's messages depend on.
func (a *Agent) responsive() bool {
	for _, m := range a.members {
		m.responsive()
	}
	return true
}

// tellAll has all networks told how things are.
func (a *Agent) tellAll() {
	for _, m := range a.members {
		poke(m.beat)
	}
}

// sayStopping says that the agent ends once its jobs have.
func (a *Agent) sayStopping() {
	a.log.Info("stopping", journal.AgentStopping.Attr())
	if err := systemd.Stopping("finishing jobs"); err != nil {
		a.log.Warn("service manager not told", "error", err)
	}
}

// ending implements machine.
func (a *Agent) ending(m *membership) {
	if a.alone(m) {
		a.sayStopping()
		return
	}
	m.log.Warn("the node's part in this network ends, as it has ordered; the next start of the agent joins it again", journal.MembershipEnded.Attr())
}

// Close gives back what [New] opened.
func (a *Agent) Close() error {
	var errs []error
	for _, m := range slices.Backward(a.members) {
		errs = append(errs, m.close())
	}
	for _, f := range slices.Backward(a.closers) {
		errs = append(errs, f())
	}
	return errors.Join(errs...)
}

// changed implements machine.
func (a *Agent) changed() { poke(a.look) }

// signer implements machine.
func (a *Agent) signer() signer.Signer { return a.key }

// drainedSince implements machine.
func (a *Agent) drainedSince() *time.Time { return a.drained.Load() }

// hardware implements machine.
func (a *Agent) hardware() wire.Hardware {
	h := a.profile
	h.Disk = hardware.Free(a.cfg.Paths.State)
	if v := a.podman.Load(); v != nil { // it is asked when it is needed first
		h.Podman = v.String()
	}
	return h
}

// Status implements [control.Backend].
func (a *Agent) Status() control.Status {
	s := control.Status{Version: a.version, Node: a.key.Address().Hex(), Gates: a.gates(), Networks: []control.Network{}, Draining: true}
	for i, m := range a.members {
		n := m.status()
		s.Networks = append(s.Networks, n)
		s.Busy += n.Busy
		s.Outbox += n.Outbox
		s.Done += n.Done
		s.Failed += n.Failed
		s.Slots = max(s.Slots, n.Slots)
		s.Draining = s.Draining && n.Draining
		if n.LastJob != nil && (s.LastJob == nil || s.LastJob.Before(*n.LastJob)) {
			s.LastJob = n.LastJob
		}
		if i == 0 || s.Runtime.State != active && n.Runtime.State != standby && s.Runtime.State == standby || s.Runtime.State != active && n.Runtime.State == active {
			s.Runtime = n.Runtime // of whoever has it
		}
	}
	if v := a.gens.View(); v.Get(v.Current) != nil {
		g := describe(v.Get(v.Current))
		s.Current = &g
	}
	return s
}

// Identity implements [control.Backend].
func (a *Agent) Identity() []control.Identity {
	ids := []control.Identity{}
	for _, m := range a.members {
		id := control.Identity{Node: a.key.Address().Hex(), Network: m.net.Name}
		m.board.set(func(b *board) {
			id.Registered, id.Account, id.Method, id.Since = b.registered, b.bound.Account, b.bound.Method, b.bound.Since
		})
		ids = append(ids, id)
	}
	return ids
}

// Takeover implements [control.Backend].
func (a *Agent) Takeover() error { return a.key.Takeover() }

// Models implements [control.Backend].
func (a *Agent) Models() []control.Model {
	all := []control.Model{}
	for _, m := range a.members {
		all = append(all, m.board.modelStates()...)
	}
	return all
}

// Jobs implements [control.Backend].
func (a *Agent) Jobs(limit int) ([]control.Job, error) {
	all := []control.Job{}
	for _, m := range a.members {
		jobs, err := m.jobs(limit - len(all))
		if err != nil {
			return nil, fmt.Errorf("network %s: %w", m.net.Name, err)
		}
		all = append(all, jobs...)
	}
	return all, nil
}

// Bind implements [control.Backend].
func (a *Agent) Bind(ctx context.Context, q control.BindRequest) (control.Binding, error) {
	m := a.named(q.Network)
	if q.Network == "" && len(a.members) == 1 {
		m = a.members[0]
	}
	if m == nil {
		var names []string
		for _, m := range a.members {
			names = append(names, m.net.Name)
		}
		return control.Binding{}, fmt.Errorf("%w: say which network, with --network: this node is in %s", control.ErrRefused, strings.Join(names, ", "))
	}
	return m.askBinding(ctx, q)
}
