package agent

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/resultity/node/internal/deploy"
	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/generation"
	"github.com/resultity/node/internal/journal"
	"github.com/resultity/node/internal/snapshot"
)

// This file says which network decides what the one runtime is.
//
// The networks have an order, the operator's. The first of them that can use the
// machine leads: its newest configuration is what should run. One is passed over
// while it has nothing for the machine to do, whose jobs would only be missed
// elsewhere: it has drained the node or has it bound to no account, it has been
// out of reach for awayPatience, it has no configuration yet, what that needs has been
// on its way here for fetchPatience, or it does not come up here. A network takes jobs only from nodes on
// its newest configuration, so that its last good one is gone back to at once,
// but does not hold the machine where another network could use it. Where none
// can, it does.
//
// What leads is brought up by the ordinary steps: it is staged beside what runs.
// A network that was passed over leads again once it has been back for
// backPatience, so that one that comes and goes does not take the machine with it
// each time. After a start what was current goes on until then, too.

const (
	awayPatience  = 10 * time.Minute // without a session, until the machine works for the next network
	fetchPatience = 10 * time.Minute // for what its newest configuration needs to be fetched, however that goes
	backPatience  = 15 * time.Second // with one, until it works for this one again
	firstPatience = 30 * time.Second // for the first answer of networks of higher priority, on a machine that has run nothing yet
)

// standing is what the update loop knows of a network.
type standing struct {
	newest digest.Digest // its configuration, as of the last look
	fetch  backoff       // staging
	waits  time.Time     // for what it needs, which is being fetched: since; zero for not
	again  backoff       // a generation of it that this machine has failed, or its part in the runtime, while another one serves

	fit   bool      // it can use the machine, as far as that is not a matter of its configuration
	since time.Time // it has been back since; zero for not
	why   string    // it is passed over; "" where it is not
	ahead bool      // it leads, or would if what it needs could be had
	open  string    // why its part in another one's runtime could not be validated yet; "" where that is not so
}

// begin takes up the networks. What a network has left behind that the node takes
// no part in any more is forgotten.
func (u *updater) begin() {
	v := u.gens.View()
	for i := range v.Generations {
		if g := &v.Generations[i]; u.named(g.Network) == nil {
			u.log.Info("forgetting a generation of a network that the node has left", "generation", g.Number, "network", g.Network)
			u.logged(u.gens.Forget(g.Number))
		}
	}
	v = u.gens.View()
	above := v.Get(v.Current) != nil
	for _, m := range u.members {
		if above && m.net.Name == v.Get(v.Current).Network {
			above = false
		}
		u.standing[m] = &standing{fit: !above}
	}
	u.began = time.Now()
}

// named returns the membership of a network, or nil.
func (a *Agent) named(network string) *membership {
	for _, m := range a.members {
		if m.net.Name == network {
			return m
		}
	}
	return nil
}

// memberOf returns the membership that a snapshot is of. There is one for each
// snapshot that was opened.
func (a *Agent) memberOf(s *snapshot.Snapshot) *membership { return a.named(s.Config().Network.Name) }

func (u *updater) of(s *snapshot.Snapshot) *standing { return u.standing[u.memberOf(s)] }

// owner returns the membership whose configuration the active deployment is of,
// or nil.
func (u *updater) owner() *membership {
	if u.active == nil {
		return nil
	}
	return u.memberOf(u.active.Snapshot())
}

var errLeft = errors.New("it is of a network that this node takes no part in")

// openProof verifies the snapshot of a network that a generation has kept.
func (a *Agent) openProof(network string, proof []byte) (*snapshot.Snapshot, error) {
	m := a.named(network)
	if m == nil {
		return nil, errLeft
	}
	s, err := m.snaps.Open(proof)
	if err == nil {
		err = m.ours(s)
	}
	return s, err
}

// lead returns the membership whose newest configuration should run, or nil when
// none is known yet.
func (u *updater) lead(v *generation.View, cur *snapshot.Snapshot) *membership {
	u.review = time.Time{}
	now := time.Now()
	var lead, last *membership
	for _, m := range u.members {
		st := u.standing[m]
		if len(u.members) > 1 {
			st.why = u.passOver(v, m, now)
		}
		switch usable := m.board.snapshot() != nil && !m.leaving.Load(); {
		case !usable:
		case lead == nil && st.why == "":
			lead = m
		case last == nil:
			last = m
		}
		// Who has never run anything does not begin with what it would leave in a
		// moment.
		if lead == nil && cur == nil && u.active == nil && !m.leaving.Load() && !m.board.hasAsked() && now.Before(u.began.Add(firstPatience)) && len(u.members) > 1 {
			u.lookAt(u.began.Add(firstPatience))
			return nil
		}
	}
	switch owner := u.owner(); {
	case lead != nil:
	case owner != nil && !owner.leaving.Load() && owner.board.snapshot() != nil:
		lead = owner
	default:
		lead = last
	}
	if lead != nil {
		u.standing[lead].ahead = true
		if u.led != lead && len(u.members) > 1 {
			lead.log.Info("this network decides what the machine runs", journal.NetworkLeads.Attr())
		}
		u.led = lead
	}
	return lead
}

// lookAt has the loop look again no later than at a time.
func (u *updater) lookAt(at time.Time) {
	if u.review.IsZero() || at.Before(u.review) {
		u.review = at
	}
}

// passOver says why a network cannot use the machine now, "" when it can.
func (u *updater) passOver(v *generation.View, m *membership, now time.Time) string {
	st, s := u.standing[m], m.board.snapshot()
	if why := u.unfit(m, st, now); why != "" {
		return why
	}
	if s == nil {
		return "it has no configuration yet"
	}
	switch g := v.Find(s.Digest()); {
	case g == nil:
	case g.State == generation.Dead:
		return "its newest configuration does not run here"
	case g.State == generation.Failed && !(g.Machine && st.again.due()):
		return "its newest configuration did not come up here; it is tried again"
	}
	if st.fetch.try > 0 && u.plans[s.Digest()] == nil {
		st.ahead = true
		return "what its newest configuration needs cannot be had; it is tried again"
	}
	if st.waits.IsZero() {
		return ""
	}
	if until := st.waits.Add(fetchPatience); now.Before(until) {
		u.lookAt(until)
		return ""
	}
	st.ahead = true
	return "what its newest configuration needs is still being fetched"
}

// unfit says why the machine would get no jobs from a network whatever it ran, ""
// when it would, or could in a moment.
func (u *updater) unfit(m *membership, st *standing, now time.Time) string {
	why, connected, until := m.unfit(now)
	if !until.IsZero() {
		u.lookAt(until)
	}
	switch {
	case why != "":
		st.fit, st.since = false, time.Time{}
	case st.fit:
	case !connected:
		st.since, why = time.Time{}, "it is not connected"
	default:
		if st.since.IsZero() {
			st.since = now
		}
		if back := st.since.Add(backPatience); now.Before(back) {
			u.lookAt(back)
			why = "it has just come back"
		} else {
			st.fit = true
		}
	}
	return why
}

// unfit says why a network has no jobs for the node, "" when it may have some,
// and where it is out of reach, when that becomes a reason.
func (m *membership) unfit(now time.Time) (why string, connected bool, until time.Time) {
	m.board.mu.Lock()
	defer m.board.mu.Unlock()
	b := &m.board
	switch {
	case m.leaving.Load():
		return "it has ended this node's part in it", b.connected, until
	case m.orderBook.Drain() != nil:
		return "it has drained this node", b.connected, until
	case b.registered && b.bound.Account == "":
		return "this node is bound to no account of it", b.connected, until
	case b.connected:
		return "", true, until
	}
	if until = b.away.Add(awayPatience); now.Before(until) {
		return "", false, until
	}
	return fmt.Sprintf("it has been out of reach for %v", now.Sub(b.away).Round(time.Minute)), false, time.Time{}
}

// mayShare reports whether a snapshot is staged to have a part in what runs.
func (u *updater) mayShare(s *snapshot.Snapshot) bool {
	return u.active != nil && u.memberOf(s) != u.owner() && deploy.Shareable(u.active.Snapshot(), s)
}

// share has the networks that do not lead take part in what runs, where their
// own configuration gives the very same runtime, and tells the others that they
// wait. What leads is active. Each has been staged by itself, with its own image
// keys, and validates by its own requests.
func (u *updater) share(ctx context.Context, v *generation.View) {
	for _, m := range u.members {
		s := m.board.snapshot()
		if j := u.joining[m]; j != nil && (s == nil || m.leaving.Load() || s.Digest() != j.plan.plan.Snapshot().Digest()) {
			j.end() // and gives the slot back: it is of what should not be any more
		}
		switch st := u.standing[m]; {
		case s == nil || m.leaving.Load() || ctx.Err() != nil:
		case m == u.owner():
		case st.ahead && !deploy.Shareable(u.active.Snapshot(), s):
			u.wait(m)
			u.prepareToo(ctx, v, s) // it was passed over since it could not be staged
		case !deploy.Shareable(u.active.Snapshot(), s):
			u.wait(m)
		case m.door.doubted() != "":
			u.expel(m, s)
		case m.board.serves(s):
		case !st.again.due(): // status says what failed
		default:
			u.join(ctx, v, m, s)
		}
	}
}

// prepareToo stages what is not staged yet. It ends no staging: one of the same network
// may be of what the operator goes back to.
func (u *updater) prepareToo(ctx context.Context, v *generation.View, s *snapshot.Snapshot) {
	if q := u.plans[s.Digest()]; u.staging[u.memberOf(s)] == nil && (q == nil || q.stale) {
		u.stage(ctx, v, s)
	}
}

// prepareAhead stages what would run if it could be had, while nothing does.
func (u *updater) prepareAhead(ctx context.Context, v *generation.View) {
	for _, m := range u.members {
		if s := m.board.snapshot(); s != nil && m != u.led && u.standing[m].ahead && !m.leaving.Load() {
			u.prepareToo(ctx, v, s)
		}
	}
}

// joining is a validation under way of a network's part in what runs.
type joining struct {
	m      *membership
	plan   *staged
	cancel context.CancelFunc
	over   bool // it is not wanted any more

	// what has come of it
	dep   *deploy.Deployment
	print digest.Digest
	err   error
}

// end has a validation end; its result comes all the same.
func (j *joining) end() {
	j.over = true
	j.cancel()
}

// join begins to let a network's jobs to the runtime that another one has brought up:
// it has the network's own golden requests put to it, beside the update loop.
func (u *updater) join(ctx context.Context, v *generation.View, m *membership, s *snapshot.Snapshot) {
	if u.joining[m] != nil {
		return
	}
	p, lead := u.plans[s.Digest()], u.plans[u.active.Snapshot().Digest()]
	if p == nil || p.stale || lead == nil {
		if !m.board.runs() {
			u.wait(m)
		}
		u.prepareToo(ctx, v, s)
		return
	}
	if string(p.plan.Unit()) != string(lead.plan.Unit()) {
		u.wait(m)
		return
	}
	if d := m.mustRest(); d > 0 {
		u.undecided(m, fmt.Errorf("%w; the next is in %v", errTooSoon, d.Round(time.Second)+time.Second), d)
		return
	}
	if !m.board.runs() {
		u.wait(m)
	}
	jctx, cancel := context.WithCancel(ctx)
	j := &joining{m: m, plan: p, cancel: cancel}
	u.joining[m] = j
	deployer, on := u.deployer, u.active
	u.wg.Go(func() {
		defer cancel()
		j.dep, j.print, j.err = u.validatePart(jctx, m, deployer, on, p.plan)
		select {
		case u.joined <- j:
		case <-ctx.Done():
		}
	})
}

// collectPart takes up what a validation has come to, unless what it was of is not what
// should be any more.
func (u *updater) collectPart(ctx context.Context, j *joining) {
	m, s := j.m, j.plan.plan.Snapshot()
	delete(u.joining, m)
	newest := m.board.snapshot()
	if j.over || m.leaving.Load() || newest == nil || newest.Digest() != s.Digest() || u.plans[s.Digest()] != j.plan || j.plan.stale {
		return
	}
	err := j.err
	if err == nil {
		err = u.attest(ctx, m, j.dep)
	} else if errors.Is(u.stillCurrent(ctx, u.active, err), errReplaced) {
		return // the engine has ended under it, and the next look sees that
	}
	st := u.standing[m]
	switch {
	case ctx.Err() != nil:
		return
	case errors.Is(err, errCrowded), errors.Is(err, errUndecided):
		u.undecided(m, err, 0)
		return
	case err != nil:
		if stepOf(err) == deploy.StepValidate {
			m.validated(byInstallation, nil, digest.Digest{}, err)
		}
		u.dismiss(m, s, err)
		return
	}
	st.again, st.open = backoff{}, ""
	m.validated(byInstallation, j.dep, j.print, nil)
	u.admit(m, j.dep, active)
	m.log.Info("the network takes part in the runtime", journal.RuntimeShared.Attr(), "version", s.Version(), "with", u.owner().net.Name)
}

// validatePart validates a network's plan on the runtime that is up, in one slot of it,
// and once more in all of them if answers are wrong while others have one, too. The
// fingerprint is zero unless the engine did nothing else. It runs beside the update loop.
func (a *Agent) validatePart(ctx context.Context, m *membership, d deployer, on *deploy.Deployment, p *deploy.Plan) (*deploy.Deployment, digest.Digest, error) {
	slots := p.Snapshot().Config().Runtime.Settings.Slots
	ask := func(hold func(context.Context, int) (func(), error), own int) (dep *deploy.Deployment, alone bool, err error) {
		hctx, cancel := context.WithTimeout(ctx, slotPatience)
		release, err := hold(hctx, slots)
		cancel()
		if err != nil {
			return nil, false, errCrowded
		}
		defer release()
		defer m.use()()
		still := a.slots.Alone(own)
		dep, err = d.Share(ctx, on, p)
		return dep, still(), err
	}
	dep, alone, err := ask(a.slots.Hold, 1)
	if stepOf(err) == deploy.StepValidate && !alone && ctx.Err() == nil {
		m.log.Warn("a golden answer is wrong, beside jobs; it is asked for again alone", journal.ValidationDoubted.Attr(), "error", err)
		if dep, alone, err = ask(a.slots.HoldAll, slots); errors.Is(err, errCrowded) {
			err = errUndecided
		}
	}
	switch {
	case err != nil:
		return nil, digest.Digest{}, err
	case !alone:
		return dep, digest.Digest{}, nil
	}
	return dep, dep.Fingerprint(), nil
}

// undecided has a network wait for its part in the runtime without a verdict on its
// configuration, for so long, or as the schedule of retries has it where that is 0.
func (u *updater) undecided(m *membership, why error, d time.Duration) {
	st := u.standing[m]
	if st.open != why.Error() {
		m.log.Info("the network's part in the runtime is not validated yet", journal.NotValidated.Attr(), "code", reasonCode(why), "reason", why)
	}
	if d > 0 {
		st.again = backoff{at: time.Now().Add(d)}
	} else {
		st.again.failed()
	}
	st.open = why.Error()
	u.wait(m)
}

// dismiss ends a network's part in the runtime, or keeps it from having one, for what
// its own validation has found.
func (u *updater) dismiss(m *membership, s *snapshot.Snapshot, err error) {
	u.endJoining(m)
	st := u.standing[m]
	u.wait(m)
	u.report(s, err)
	st.open = ""
	st.again.failedOn(rarely)
}

// endJoining ends the validation of a network's part that is under way.
func (u *updater) endJoining(m *membership) {
	if j := u.joining[m]; j != nil {
		j.end()
	}
}

// slotPatience is how long a slot of a busy engine is waited for, by the update loop
// also, which does nothing else meanwhile.
const slotPatience = 5 * time.Second

// expel ends a network's part in the runtime whose jobs fail one after the other
// there. The engine is judged by the jobs of the network that leads: another one
// cannot take it from that.
func (u *updater) expel(m *membership, s *snapshot.Snapshot) {
	u.endJoining(m)
	why := m.door.doubted()
	m.log.Warn("the engine is suspect and gets no more jobs of this network", journal.RuntimeSuspect.Attr(), "reason", why)
	u.admit(m, nil, standby)
	u.wait(m)
	u.report(s, &deploy.Error{Step: deploy.StepValidate, Err: fmt.Errorf("%w: %s", errSuspect, why)})
	u.standing[m].again.failedOn(rarely)
}

// wait says that a network is on standby, and why.
func (u *updater) wait(m *membership) {
	owner := u.owner()
	if m.board.runs() || m.board.phaseNow() != standby {
		u.admit(m, nil, standby)
	}
	why := "its own configuration asks for another one"
	switch st := u.standing[m]; {
	case st.why != "":
		why = st.why
	case deploy.Shareable(u.active.Snapshot(), m.board.snapshot()):
		if why = "its own part in it is not validated yet"; st.open != "" {
			why += ": " + st.open
		}
	}
	if m.board.standBy(owner.net.Name, why) {
		m.log.Info("the network is on standby", journal.NetworkWaits.Attr(), "reason", "the runtime serves "+owner.net.Name+": "+why)
	}
}

// alarms is what [door.alarm] says of each network.
func (u *updater) alarms() map[*membership]int {
	since := map[*membership]int{}
	for _, m := range u.members {
		since[m] = m.door.alarm()
	}
	return since
}

// reopen is [door.reopen] for each network.
func (u *updater) reopen(since map[*membership]int) {
	for _, m := range u.members {
		m.door.reopen(m.worker, since[m])
	}
}
