package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"strings"
	"time"

	"github.com/resultity/node/internal/deploy"
	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/image"
	"github.com/resultity/node/internal/journal"
	"github.com/resultity/node/internal/podman"
	"github.com/resultity/node/internal/quadlet"
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

// retries is how long to wait after a failure; it stays at the last one. A
// success begins again at the front.
var retries = []time.Duration{time.Second, 2 * time.Second, 5 * time.Second, 15 * time.Second, time.Minute, 5 * time.Minute}

// jittered spreads d, so that nodes do not come back as a herd.
func jittered(d time.Duration) time.Duration { return d/2 + rand.N(d) }

// backoff says when something is done again.
type backoff struct {
	try int // failures in a row
	at  time.Time
}

// failed plans the next try.
func (b *backoff) failed() {
	b.at = time.Now().Add(jittered(retries[min(b.try, len(retries)-1)]))
	b.try++
}

// due reports whether the time has come.
func (b *backoff) due() bool { return !time.Now().Before(b.at) }

// updater is the update loop's own state.
type updater struct {
	*Agent
	deployer deployer // nil until Podman has answered
	active   *deploy.Deployment
	engine   engine // of active
	lastGood *deploy.Plan
	dead     digest.Digest // a configuration that did not come up; not tried again while another serves
	tried    string        // start of the unit at the last attempt to use it
	network  backoff       // asking the network
	build    backoff       // bringing the runtime up, after a failure
}

// updates compares what should be with what is, and moves one step at a time.
//
// Two things wake it: what the network says, at least every refreshEvery, and
// what systemd says of the runtime. They have clocks of their own: a runtime
// that ended must not wait for a network that does not answer, and one that
// comes and goes must not keep the network from being asked. A failed
// deployment itself changes the unit, so that such a change alone is no reason
// to try again before the time.
func (a *Agent) updates(ctx context.Context) error {
	u := &updater{Agent: a}
	defer u.setActive(nil, stopped)
	u.recall()
	for ask := true; ; {
		if ask || u.network.due() {
			u.askNetwork(ctx)
		}
		if snap := u.board.snapshot(); snap != nil {
			u.reconcile(ctx, snap)
		}
		poke(a.beat)
		if ctx.Err() != nil {
			return nil
		}
		next := u.network.at
		if !u.build.at.IsZero() && u.build.at.Before(next) {
			next = u.build.at
		}
		timer := time.NewTimer(time.Until(next))
		ask = false
		select {
		case <-ctx.Done():
		case <-a.update:
			ask = true
		case <-a.look:
		case t := <-a.tasks:
			t.done <- t.do(ctx, u)
		case <-timer.C:
		}
		timer.Stop()
	}
}

// recall takes up the configuration that was verified last, so that a node goes
// on without its network.
func (u *updater) recall() {
	s, err := u.snaps.Last()
	if err == nil {
		err = u.ours(s)
	}
	switch {
	case err == nil:
		u.learn(s)
	case !errors.Is(err, fs.ErrNotExist):
		u.log.Error("the kept configuration cannot be used; a new one is fetched", journal.SnapshotRefused.Attr(), "error", err)
	}
}

// ours refuses the configuration of another network. Its signatures may be
// right: who changed the URL, or has one root for two networks, finds out here.
func (u *updater) ours(s *snapshot.Snapshot) error {
	if got, want := s.Config().Network.Name, u.cfg.Network.Name; got != want {
		return fmt.Errorf("%w: it is for %s, and agent.toml has network.name = %q", errOtherNetwork, got, want)
	}
	return nil
}

var errOtherNetwork = errors.New("the configuration is another network's")

// askNetwork does what needs the network's answer.
func (u *updater) askNetwork(ctx context.Context) {
	err := u.refresh(ctx)
	if snap := u.board.snapshot(); snap != nil && !u.isRegistered() {
		err = errors.Join(err, u.register(ctx, snap))
	}
	if err != nil {
		u.network.failed()
		return
	}
	u.network = backoff{at: time.Now().Add(jittered(refreshEvery))}
}

func (u *updater) refresh(ctx context.Context) error {
	s, err := u.snaps.Refresh(ctx)
	if err == nil {
		err = u.ours(s)
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err != nil {
		var before error
		u.board.set(func(b *board) { before, b.snapErr = b.snapErr, err })
		event := journal.SnapshotRefused
		if errors.Is(err, tuf.ErrUnreachable) {
			event = journal.SnapshotStale
		}
		if !sameError(before, err) { // say it once, not at every try
			u.log.Warn("configuration not refreshed", event.Attr(), "error", err)
		}
		return err
	}
	u.learn(s)
	u.board.set(func(b *board) { b.snapErr, b.refreshed = nil, time.Now() })
	return nil
}

func sameError(a, b error) bool { return a != nil && b != nil && a.Error() == b.Error() }

// learn makes s what should be.
func (u *updater) learn(s *snapshot.Snapshot) {
	before := u.board.snapshot()
	if before == nil || before.Digest() != s.Digest() {
		u.log.Info("configuration verified", journal.SnapshotVerified.Attr(), "version", s.Version(), "digest", s.Digest())
		u.build = backoff{} // another configuration, another chance
		poke(u.upload)
	}
	u.board.learn(s)
}

func (a *Agent) isRegistered() bool {
	select {
	case <-a.registered:
		return true
	default:
		return false
	}
}

// register makes the node known, once in its life.
func (u *updater) register(ctx context.Context, snap *snapshot.Snapshot) error {
	reg, err := u.store.Registration()
	if err == nil && reg == nil {
		reg, err = u.registerNow(ctx, snap)
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err != nil {
		var before error
		u.board.set(func(b *board) { before, b.regErr = b.regErr, err })
		if !sameError(before, err) {
			u.log.Warn("not registered", journal.RegisterRefused.Attr(), "error", err)
		}
		return err
	}
	u.board.set(func(b *board) {
		b.registered, b.regErr = true, nil
		b.bound = wire.Bound{Account: reg.Account, Method: reg.Method, Since: reg.Since}
	})
	close(u.registered)
	return nil
}

// registerTimeout bounds the talk of a registration.
const registerTimeout = time.Minute

func (u *updater) registerNow(ctx context.Context, snap *snapshot.Snapshot) (*wire.Registered, error) {
	token, err := readToken(u.cfg.Network.EnrolmentToken)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, registerTimeout)
	defer cancel()
	reg, err := u.enrol(ctx, session.Registration{
		URL: u.cfg.Network.URL, Client: u.http, Key: u.key, Trusted: trusted(snap),
		Body: wire.Registration{Network: u.cfg.Network.Name, Node: u.key.Address(), Token: token, Agent: u.version},
	})
	if err != nil {
		return nil, err
	}
	if err := u.store.SetRegistration(reg); err != nil {
		return nil, fmt.Errorf("keep the registration: %w", err)
	}
	u.log.Info("registered", journal.Registered.Attr(), "network", reg.Network, "account", reg.Account, "node", u.key.Address())
	return reg, nil
}

// errToken says that there is a file for the token and no token in it.
var errToken = errors.New("network.enrolment_token")

const maxToken = 4 << 10 // bytes

// readToken reads the file with the enrolment token; "" for none.
func readToken(name string) (string, error) {
	if name == "" {
		return "", nil
	}
	f, err := os.Open(name)
	if err != nil {
		return "", fmt.Errorf("%w: %w", errToken, err)
	}
	defer f.Close() // read only: nothing to lose
	raw, err := io.ReadAll(io.LimitReader(f, maxToken+1))
	token := strings.TrimSpace(string(raw))
	switch {
	case err != nil:
		return "", fmt.Errorf("%w: %w", errToken, err)
	case token == "" || len(raw) > maxToken:
		return "", fmt.Errorf("%w: %s holds no token", errToken, name)
	}
	return token, nil
}

// reconcile brings up the runtime that snap asks for, or keeps the one that is.
func (u *updater) reconcile(ctx context.Context, snap *snapshot.Snapshot) {
	unit, err := u.units.State(ctx, quadlet.ServiceName)
	if err != nil {
		if ctx.Err() == nil {
			u.report(snap, &deploy.Error{Step: deploy.StepUnit, Err: err})
			u.build.failed()
		}
		return
	}
	u.board.set(func(b *board) { b.restarts = unit.NRestarts })
	lost := u.active != nil && !u.active.Current(unit)
	if lost {
		event := journal.RuntimeLost
		if unit.Result == "oom-kill" {
			event = journal.MemoryExceeded
		}
		u.log.Warn("runtime lost", event.Attr(), "unit", unit.Active, "result", unit.Result, "status", unit.StatusText)
		u.setActive(nil, starting)
	}
	dead := u.dead == snap.Digest()
	switch {
	case u.active != nil && (dead || u.active.Snapshot().Digest() == snap.Digest()):
		return
	case u.active == nil && settling(unit) && u.lastGood != nil && (dead || u.lastGood.Snapshot().Digest() == snap.Digest()):
		return // systemd is at it; the watcher tells when it is done
	case u.build.due() || unit.Active == "active" && unit.InvocationID != u.tried:
		u.tried = unit.InvocationID
		err = u.bringUp(ctx, snap)
	case lost: // what is newer waits for its time; what served until now does not
		if err = u.fallBack(ctx); err == nil {
			return
		}
	default:
		return
	}
	if err == nil {
		u.build = backoff{}
	} else if ctx.Err() == nil {
		u.build.failed()
	}
}

// settling reports whether systemd is between two states of the unit by itself.
func settling(s systemd.State) bool {
	return s.Active == "activating" || s.Active == "deactivating" || s.Active == "reloading"
}

// bringUp deploys snap, or goes back to what was up before. An error means that
// there is something left to be tried.
func (u *updater) bringUp(ctx context.Context, snap *snapshot.Snapshot) error {
	if u.dead == snap.Digest() {
		return u.fallBack(ctx)
	}
	plan, err := u.stage(ctx, snap)
	staged := err == nil
	if staged {
		err = u.apply(ctx, plan)
	}
	if err == nil {
		u.dead = digest.Digest{}
		return nil
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	u.report(snap, err)
	if u.active != nil || u.lastGood == nil || u.lastGood.Snapshot().Digest() == snap.Digest() {
		return err
	}
	if !staged { // it may be had later
		return errors.Join(err, u.fallBack(ctx))
	}
	u.dead = snap.Digest()
	return u.fallBack(ctx)
}

// fallBack brings the last good deployment up again. When that fails too, the
// machine may be at fault and not the configuration, which then gets another
// chance.
func (u *updater) fallBack(ctx context.Context) error {
	u.log.Warn("going back to the last good deployment", "version", u.lastGood.Snapshot().Version())
	err := u.apply(ctx, u.lastGood)
	if err != nil && ctx.Err() == nil {
		u.dead = digest.Digest{}
		u.log.Error("the last good deployment does not come up either", eventOf(err).Attr(), "error", err)
	}
	return err
}

// stage prepares everything while the old deployment serves.
func (u *updater) stage(ctx context.Context, snap *snapshot.Snapshot) (*deploy.Plan, error) {
	u.board.advance(snap, deploy.StepImage)
	if u.deployer == nil {
		d, err := u.openDeployer(ctx)
		if err != nil {
			return nil, &deploy.Error{Step: deploy.StepImage, Err: err}
		}
		u.deployer = d
	}
	return u.deployer.Stage(ctx, snap)
}

// progress is told by the deployer how much of a model is here.
func (a *Agent) progress(m *snapshot.Model, done, _ int64) {
	a.board.set(func(b *board) { b.models[m.Digest()] = done })
	a.board.advance(a.board.snapshot(), deploy.StepModel)
}

// apply switches: no new jobs, running ones end, then the new one comes up.
func (u *updater) apply(ctx context.Context, plan *deploy.Plan) error {
	if err := u.idle(ctx); err != nil {
		return err
	}
	u.setActive(nil, starting)
	snap := plan.Snapshot()
	u.board.advance(snap, deploy.StepUnit)
	dep, err := u.deployer.Apply(ctx, plan)
	if err != nil {
		u.setActive(nil, failed)
		return err
	}
	u.lastGood = plan
	u.setActive(dep, active)
	u.log.Info("runtime active", journal.RuntimeActive.Attr(), "model", snap.Config().Runtime.Model, "image", snap.Config().Runtime.Image, "version", snap.Version())
	if err := u.deployer.Clean(ctx, snap, u.board.snapshot()); err != nil {
		u.log.Warn("unlisted images or models not removed", "error", err)
	}
	return nil
}

// idle gives out no more jobs and waits until those that run have ended, or are
// past any deadline. It fails only with ctx.
func (u *updater) idle(ctx context.Context) error {
	if u.active == nil {
		return nil
	}
	u.worker.SetActive(nil)
	poke(u.beat)
	ictx, cancel := context.WithTimeout(ctx, u.active.Snapshot().Config().Limits.Deadline.Duration())
	defer cancel()
	_ = u.worker.Idle(ictx) // past their deadline they end without our waiting
	return ctx.Err()
}

// setActive publishes what runs; nil for nothing that may be given jobs.
func (u *updater) setActive(d *deploy.Deployment, phase string) {
	old := u.engine
	u.active, u.engine = d, nil
	u.board.setActive(d, phase)
	if d == nil {
		u.worker.SetActive(nil)
	} else {
		u.engine = u.openEngine(d.Socket())
		u.worker.SetActive(&work.Active{Snapshot: d.Snapshot(), Image: d.Image(), Model: d.Model(), Engine: u.engine})
	}
	if old != nil {
		old.Close() // connections that no job uses
	}
	poke(u.beat)
}

// report makes a failure known: to the operator at once, to status until it is
// mended.
func (u *updater) report(snap *snapshot.Snapshot, err error) {
	e, ok := errors.AsType[*deploy.Error](err)
	if !ok { // the deployer promises the other
		e = &deploy.Error{Step: deploy.StepUnit, Err: err}
	}
	if u.board.fail(snap, e) { // say it once, not at every try
		u.log.Error("deployment failed", eventOf(err).Attr(), "version", snap.Version(), "step", e.Step, "error", err)
	}
}

// eventOf says in the catalog's terms why a deployment failed.
func eventOf(err error) *journal.Event {
	e, ok := errors.AsType[*deploy.Error](err)
	switch {
	case !ok:
		return journal.RuntimeFailed
	case e.Step == deploy.StepImage && imageRefused(err):
		return journal.ImageRefused
	case e.Step == deploy.StepImage:
		return journal.ImageFailed
	case e.Step == deploy.StepModel && errors.Is(err, digest.ErrMismatch):
		return journal.ModelRefused
	case e.Step == deploy.StepModel:
		return journal.ModelFailed
	case errors.Is(err, sandbox.ErrNotSealed), errors.Is(err, quadlet.ErrUnsealed):
		return journal.SandboxRefused
	case errors.Is(err, deploy.ErrDevice):
		return journal.DeviceRefused
	case e.Step == deploy.StepValidate:
		return journal.ValidationFailed
	}
	return journal.RuntimeFailed
}

// imageRefused tells an image that must not run from one that could not be had.
func imageRefused(err error) bool {
	for _, reason := range []error{image.ErrUnsigned, image.ErrWrongKey, image.ErrOtherDigest, image.ErrIdentity, image.ErrKeys, podman.ErrRefused, podman.ErrOtherImage} {
		if errors.Is(err, reason) {
			return true
		}
	}
	return false
}

// watchHealthy is how long a watch has lasted when its end is news again.
const watchHealthy = time.Minute

// watchRuntime pokes the update loop whenever systemd says that the runtime's
// unit has changed.
func (a *Agent) watchRuntime(ctx context.Context) error {
	for try := 0; ; try++ {
		begin := time.Now()
		err := a.units.Watch(ctx, quadlet.ServiceName, func() { poke(a.look) })
		if ctx.Err() != nil {
			return nil
		}
		if time.Since(begin) > watchHealthy {
			try = 0
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
