package agent

import (
	"context"
	"errors"
	"io/fs"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/resultity/node/internal/deploy"
	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/image"
	"github.com/resultity/node/internal/journal"
	"github.com/resultity/node/internal/podman"
	"github.com/resultity/node/internal/quadlet"
	"github.com/resultity/node/internal/runtime"
	"github.com/resultity/node/internal/sandbox"
	"github.com/resultity/node/internal/session"
	"github.com/resultity/node/internal/snapshot"
	"github.com/resultity/node/internal/systemd"
	"github.com/resultity/node/internal/tuf"
	"github.com/resultity/node/internal/wire"
	"github.com/resultity/node/internal/work"
)

// refreshEvery is how often the network is asked for a newer configuration when
// it announces none. The announcement is a hint; this is what freshness rests on.
const refreshEvery = 5 * time.Minute

// retries is how long the update loop waits after a failure; it stays at the
// last one. A success begins again at the front.
var retries = []time.Duration{time.Second, 2 * time.Second, 5 * time.Second, 15 * time.Second, time.Minute, 5 * time.Minute}

// jittered spreads d, so that nodes do not come back as a herd.
func jittered(d time.Duration) time.Duration { return d/2 + rand.N(d) }

// updater is the update loop's own state.
type updater struct {
	*Agent
	deployer *deploy.Deployer // nil until Podman has answered
	active   *deploy.Deployment
	lastGood *deploy.Plan
	dead     digest.Digest // a configuration that did not come up; not tried again while another serves
	try      int           // failures in a row
}

// updates compares what should be with what is, and moves one step at a time.
func (a *Agent) updates(ctx context.Context) error {
	u := &updater{Agent: a}
	if s, err := a.snaps.Last(); err == nil {
		u.learn(s, nil)
	} else if !errors.Is(err, fs.ErrNotExist) {
		a.log.Error("the kept configuration cannot be used; a new one is fetched", journal.SnapshotRefused.Attr(), "error", err)
	}
	refresh := true
	for {
		wait := refreshEvery
		if err := u.once(ctx, refresh); err != nil && ctx.Err() == nil {
			wait = retries[min(u.try, len(retries)-1)]
			u.try++
		} else {
			u.try = 0
		}
		poke(a.beat)
		timer := time.NewTimer(jittered(wait))
		refresh = true
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil
		case <-a.update:
		case <-a.look:
			refresh = false // a runtime that ended must not wait for a network that does not answer
		case <-timer.C:
		}
		timer.Stop()
	}
}

// once does all that can be done now. An error means that it should be tried
// again soon.
func (u *updater) once(ctx context.Context, refresh bool) error {
	var err error
	if refresh {
		err = u.refresh(ctx)
	}
	snap := u.board.snapshot()
	if snap == nil {
		return err
	}
	return errors.Join(err, u.register(ctx, snap), u.reconcile(ctx, snap))
}

func (u *updater) refresh(ctx context.Context) error {
	s, err := u.snaps.Refresh(ctx)
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err == nil && s.Config().Network.Name != u.cfg.Network.Name {
		err = &wrongNetwork{s.Config().Network.Name, u.cfg.Network.Name}
	}
	if err != nil {
		var before error
		u.board.set(func(b *board) { before, b.snapErr = b.snapErr, err })
		event := journal.SnapshotRefused
		if errors.Is(err, tuf.ErrUnreachable) {
			event = journal.SnapshotStale
		}
		if before == nil || before.Error() != err.Error() { // say it once, not at every try
			u.log.Warn("configuration not refreshed", event.Attr(), "error", err)
		}
		return err
	}
	u.learn(s, u.board.snapshot())
	u.board.set(func(b *board) { b.snapErr, b.refreshed = nil, time.Now() })
	return nil
}

type wrongNetwork struct{ got, want string }

func (e *wrongNetwork) Error() string {
	return "the configuration is for network " + e.got + ", agent.toml says network.name = " + e.want
}

func (u *updater) learn(s, before *snapshot.Snapshot) {
	if before == nil || before.Digest() != s.Digest() {
		u.log.Info("configuration verified", journal.SnapshotVerified.Attr(), "version", s.Version(), "digest", s.Digest())
	}
	u.board.set(func(b *board) { b.snap = s })
}

// register makes the node known, once in its life.
func (u *updater) register(ctx context.Context, snap *snapshot.Snapshot) error {
	select {
	case <-u.registered:
		return nil
	default:
	}
	reg, err := u.store.Registration()
	if err != nil {
		return err
	}
	if reg == nil {
		if reg, err = u.registerNow(ctx, snap); err != nil {
			u.board.set(func(b *board) { b.regErr = err })
			u.log.Warn("not registered", journal.RegisterRefused.Attr(), "error", err)
			return err
		}
		u.log.Info("registered", journal.Registered.Attr(), "network", reg.Network, "account", reg.Account, "node", u.key.Address())
	}
	u.board.set(func(b *board) { b.registered, b.account, b.regErr = true, reg.Account, nil })
	close(u.registered)
	return nil
}

func (u *updater) registerNow(ctx context.Context, snap *snapshot.Snapshot) (*wire.Registered, error) {
	var token string
	if f := u.cfg.Network.EnrolmentToken; f != "" {
		raw, err := os.ReadFile(f)
		if err != nil {
			return nil, err
		}
		token = strings.TrimSpace(string(raw))
	}
	reg, err := session.Register(ctx, session.Registration{
		URL: u.cfg.Network.URL, Client: u.http, Key: u.key, Trusted: trusted(snap),
		Body: wire.Registration{Network: u.cfg.Network.Name, Node: u.key.Address(), Token: token, Agent: u.version},
	})
	if err != nil {
		return nil, err
	}
	return reg, u.store.SetRegistration(reg)
}

// reconcile brings up the runtime that snap asks for, or keeps the one that is.
func (u *updater) reconcile(ctx context.Context, snap *snapshot.Snapshot) error {
	unit, err := u.units.State(ctx, quadlet.ServiceName)
	if err != nil {
		return err
	}
	u.board.set(func(b *board) { b.restarts = unit.NRestarts })
	if u.active != nil && !u.active.Current(unit) {
		u.log.Warn("runtime lost", journal.RuntimeLost.Attr(), "unit", unit.Active, "result", unit.Result, "status", unit.StatusText)
		u.setActive(nil, "starting")
	}
	if settling(unit) && (u.lastGood != nil && u.lastGood.Snapshot().Digest() == snap.Digest()) {
		return nil // systemd is at it; the watcher tells when it is done
	}
	if u.active != nil && (u.active.Snapshot().Digest() == snap.Digest() || u.dead == snap.Digest()) {
		return nil
	}
	plan, err := u.stage(ctx, snap)
	if err == nil {
		err = u.apply(ctx, plan)
	}
	if err == nil {
		u.dead = digest.Digest{}
		return nil
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	u.report(err)
	var e *deploy.Error
	if u.active == nil && u.lastGood != nil && u.lastGood.Snapshot().Digest() != snap.Digest() && errors.As(err, &e) {
		u.dead = snap.Digest()
		u.log.Warn("going back to the last good deployment", "version", u.lastGood.Snapshot().Version())
		return u.apply(ctx, u.lastGood)
	}
	return err
}

// settling reports whether systemd is between two states of the unit by itself.
func settling(s systemd.State) bool {
	return s.Active == "activating" || s.Active == "deactivating" || s.Active == "reloading"
}

// stage prepares everything while the old deployment serves.
func (u *updater) stage(ctx context.Context, snap *snapshot.Snapshot) (*deploy.Plan, error) {
	if u.active == nil {
		u.board.set(func(b *board) { b.phase = "preparing" })
	}
	if u.deployer == nil {
		d, err := u.openDeployer(ctx)
		if err != nil {
			return nil, &deploy.Error{Step: deploy.StepImage, Err: err}
		}
		u.deployer = d
	}
	plan, err := u.deployer.Stage(ctx, snap)
	if err == nil {
		u.board.set(func(b *board) {
			for i := range snap.Config().Models {
				m := &snap.Config().Models[i]
				b.models[m.Digest()] = m.Size()
			}
		})
	}
	return plan, err
}

// apply switches: no new jobs, running ones end, then the new one comes up.
func (u *updater) apply(ctx context.Context, plan *deploy.Plan) error {
	if u.active != nil {
		u.worker.SetActive(nil)
		poke(u.beat)
		limit := u.active.Snapshot().Config().Limits.Deadline.Duration()
		ictx, cancel := context.WithTimeout(ctx, limit)
		err := u.worker.Idle(ictx)
		cancel()
		if err != nil && ctx.Err() != nil {
			return ctx.Err()
		}
		u.setActive(nil, "starting")
	}
	u.board.set(func(b *board) { b.phase = "starting" })
	dep, err := u.deployer.Apply(ctx, plan)
	if err != nil {
		u.setActive(nil, "failed")
		return err
	}
	u.lastGood = plan
	u.setActive(dep, "active")
	snap := plan.Snapshot()
	u.log.Info("runtime active", journal.RuntimeActive.Attr(), "model", snap.Config().Runtime.Model, "image", snap.Config().Runtime.Image, "version", snap.Version())
	keep := make([]*snapshot.Model, len(snap.Config().Models))
	for i := range keep {
		keep[i] = &snap.Config().Models[i]
	}
	if err := u.models.Retain(keep); err != nil {
		u.log.Warn("unlisted models not removed", "error", err)
	}
	return nil
}

// setActive publishes what runs; nil for nothing that may be given jobs.
func (u *updater) setActive(d *deploy.Deployment, phase string) {
	u.active = d
	u.board.set(func(b *board) {
		b.active, b.phase = d, phase
		if d != nil {
			b.failed = nil
		}
	})
	if d == nil {
		u.worker.SetActive(nil)
	} else {
		u.worker.SetActive(&work.Active{Snapshot: d.Snapshot(), Image: d.Image(), Model: d.Model(), Engine: runtime.New(d.Socket())})
	}
	poke(u.beat)
}

// report makes a failure known: to the operator at once, to status until it is
// mended.
func (u *updater) report(err error) {
	var e *deploy.Error
	if !errors.As(err, &e) {
		u.log.Error("deployment failed", journal.RuntimeFailed.Attr(), "error", err)
		return
	}
	event := journal.RuntimeFailed
	switch {
	case e.Step == deploy.StepImage && imageRefused(err):
		event = journal.ImageRefused
	case e.Step == deploy.StepModel && errors.Is(err, digest.ErrMismatch):
		event = journal.ModelRefused
	case e.Step == deploy.StepModel:
		event = journal.ModelFailed
	case errors.Is(err, sandbox.ErrNotSealed):
		event = journal.SandboxRefused
	case e.Step == deploy.StepValidate:
		event = journal.ValidationFailed
	}
	u.board.set(func(b *board) {
		b.failed = e
		if b.active == nil {
			b.phase = "failed"
		}
	})
	u.log.Error("deployment failed", event.Attr(), "step", e.Step, "error", e.Err)
}

// imageRefused tells an image that must not run from one that could not be had.
func imageRefused(err error) bool {
	return slices.ContainsFunc([]error{image.ErrUnsigned, image.ErrWrongKey, image.ErrOtherDigest, image.ErrIdentity, podman.ErrRefused},
		func(reason error) bool { return errors.Is(err, reason) })
}

// watchRuntime pokes the update loop whenever systemd says that the runtime's
// unit has changed.
func (a *Agent) watchRuntime(ctx context.Context) error {
	for try := 0; ; try++ {
		err := a.units.Watch(ctx, quadlet.ServiceName, func() { poke(a.look) })
		if ctx.Err() != nil {
			return nil
		}
		a.log.Warn("lost sight of the runtime's unit; looking again", "error", err)
		poke(a.look)
		timer := time.NewTimer(jittered(retries[min(try, len(retries)-1)]))
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil
		case <-timer.C:
		}
	}
}
