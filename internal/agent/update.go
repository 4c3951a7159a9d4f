package agent

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/resultity/node/internal/deploy"
	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/generation"
	"github.com/resultity/node/internal/hardware"
	"github.com/resultity/node/internal/image"
	"github.com/resultity/node/internal/journal"
	"github.com/resultity/node/internal/model"
	"github.com/resultity/node/internal/model/format"
	"github.com/resultity/node/internal/model/signature"
	"github.com/resultity/node/internal/podman"
	"github.com/resultity/node/internal/quadlet"
	"github.com/resultity/node/internal/sandbox"
	"github.com/resultity/node/internal/snapshot"
	"github.com/resultity/node/internal/systemd"
	"github.com/resultity/node/internal/work"
)

// refreshEvery is how often the network is asked for a newer configuration when
// it announces none. The announcement is a hint; this is what freshness rests on.
const refreshEvery = 5 * time.Minute

// retries is how long to wait after a failure; it stays at the last one. A
// success begins again at the front.
var retries = []time.Duration{time.Second, 2 * time.Second, 5 * time.Second, 15 * time.Second, time.Minute, 5 * time.Minute}

// rarely is the same for a generation that this machine has failed, while
// another one serves: each try is a stop and two starts.
var rarely = []time.Duration{time.Minute, 5 * time.Minute, 15 * time.Minute, time.Hour}

// jittered spreads d, so that nodes do not come back as a herd.
func jittered(d time.Duration) time.Duration { return d/2 + rand.N(d) }

// backoff says when something is done again.
type backoff struct {
	try int // failures in a row
	at  time.Time
}

// failed plans the next try.
func (b *backoff) failed() { b.failedOn(retries) }

func (b *backoff) failedOn(schedule []time.Duration) {
	b.at = time.Now().Add(jittered(schedule[min(b.try, len(schedule)-1)]))
	b.try++
}

// due reports whether the time has come.
func (b *backoff) due() bool { return !time.Now().Before(b.at) }

// updater is the update loop's own state.
type updater struct {
	*Agent
	deployer deployer // nil until Podman has answered
	active   *deploy.Deployment
	engine   engine        // of active
	good     digest.Digest // configuration that was active last
	judged   digest.Digest // the one under which what runs was found to be trusted still
	standing map[*membership]*standing
	opened   map[int]*snapshot.Snapshot
	plans    map[digest.Digest]*staged // of what is current and what should be, by configuration
	want     digest.Digest             // what should be, as of the last look
	led      *membership               // by whose configuration the loop went last
	began    time.Time
	review   time.Time                // when another network may have the say; zero for never
	staging  map[*membership]*staging // under way until the result is here; one of each network
	opening  sync.Mutex               // guards first; held while the deployer is opened
	first    deployer                 // what deployer will be, for the stagings
	results  chan *result
	joining  map[*membership]*joining // under way until the result is here; one of each network
	joined   chan *joining
	wg       sync.WaitGroup // staging and joining
	tried    string         // start of the unit at the last attempt to use it
	down     bool           // what is current did not come up, or could not be staged, at the last attempt

	admitted time.Time // when a runtime was given jobs last
	doubts   int       // times in a row that the engine was suspect
	drifts   int       // times in a row that its sandbox has changed
	storms   int       // times in a row that the unit has used up its starts
	storm    string    // its last start then
	looked   bool      // at the unit
	renew    bool      // the operator wants a restart

	build backoff // bringing a runtime up while none is

	untidy bool    // there may be images and models that nothing needs
	tidy   backoff // removing them
	tight  bool    // there was no room: only what runs and what should run is kept
}

// staged is a plan whose generation is on disk.
type staged struct {
	number  int // 0 while it is to share a runtime, and has none of its own
	content generation.Content
	plan    *deploy.Plan
	phases  []generation.Phase
	stale   bool // it failed: whether all it needs is still here is looked at again
}

// updates compares what should be with what is, and moves one step at a time.
//
// It is the sole owner of the deployment. What may take hours, staging, has a
// goroutine beside it, so that a runtime that ended never waits for a download. So has
// the validation of a network that is to share the runtime: how long its golden
// requests take holds up nobody else.
// A failed deployment itself changes the unit, so that such a change alone is no
// reason to try again before the time.
func (a *Agent) updates(ctx context.Context) error {
	u := &updater{
		Agent: a, standing: map[*membership]*standing{}, opened: map[int]*snapshot.Snapshot{},
		plans: map[digest.Digest]*staged{}, staging: map[*membership]*staging{}, results: make(chan *result),
		joining: map[*membership]*joining{}, joined: make(chan *joining),
	}
	defer u.setActive(nil, stopped)
	defer u.wg.Wait()
	for _, w := range a.gens.Warnings() {
		a.log.Error("generations", journal.GenerationBroken.Attr(), "error", w)
	}
	u.begin()
	for {
		u.reconcile(ctx)
		a.tellAll()
		if ctx.Err() != nil {
			return nil
		}
		timer := time.NewTimer(u.sleep())
		select {
		case <-ctx.Done():
		case <-a.look:
		case r := <-u.results:
			u.collect(ctx, r)
		case j := <-u.joined:
			u.collectPart(ctx, j)
		case t := <-a.tasks:
			t.done <- t.do(ctx, u)
		case <-timer.C:
		}
		timer.Stop()
	}
}

// sleep is how long nothing is to be done if nothing happens.
func (u *updater) sleep() time.Duration {
	d := time.Hour
	waits := []*backoff{&u.build, &u.tidy, {at: u.review}}
	for _, st := range u.standing {
		waits = append(waits, &st.fetch, &st.again)
	}
	for _, b := range waits {
		if !b.due() {
			d = min(d, time.Until(b.at))
		}
	}
	return d
}

// reconcile brings up the runtime that should be, or keeps the one that is.
func (u *updater) reconcile(ctx context.Context) {
	v := u.gens.View()
	cur := u.current(&v)
	want := u.wanted(&v, cur)
	if want == nil {
		return // nothing is known yet
	}
	u.want = want.Digest()
	since := u.alarms()
	unit, err := u.units.State(ctx, quadlet.ServiceName)
	if err != nil {
		if ctx.Err() == nil {
			u.report(want, &deploy.Error{Step: deploy.StepUnit, Err: err})
			u.build.failed()
		}
		return
	}
	for _, m := range u.members {
		m.board.set(func(b *board) { b.restarts = unit.NRestarts })
	}
	lost := u.active != nil && !u.active.Current(unit)
	if lost {
		u.log.Warn("runtime lost", lossOf(unit).Attr(), "unit", unit.Active, "result", unit.Result, "status", unit.StatusText)
		u.setActive(nil, starting)
	}
	u.storming(unit, cur, want)
	if u.withdraw(ctx, unit, cur) {
		poke(u.look)
		return
	}
	switch owner := u.owner(); {
	case u.renew:
		u.renew = false
		if u.replace(ctx, "the operator asks for it") == nil {
			poke(u.look)
		}
		return
	case owner == nil:
	case owner.door.doubted() != "":
		u.suspected(ctx, owner.door.doubted())
		poke(u.look)
		return
	default:
		u.reopen(since)
		u.clean(ctx)
	}

	// What was healthy last serves until what should be is ready. If it does not
	// come up, each gets its turn.
	serve := want
	if u.active == nil && cur != nil && cur.Digest() != want.Digest() && (!u.down || u.plans[want.Digest()] == nil) {
		serve = cur
	}
	u.endStagings(want, serve)
	if u.active != nil && u.active.Snapshot().Digest() == serve.Digest() {
		u.settled(&v)
		u.share(ctx, &v)
		return
	}
	missing := want
	if serve != want && u.plans[serve.Digest()] == nil && !u.down {
		missing = serve
	}
	if q := u.plans[missing.Digest()]; q == nil || q.stale {
		u.stage(ctx, &v, missing)
	}
	if u.active == nil {
		u.prepareAhead(ctx, &v)
	}
	p := u.plans[serve.Digest()]
	switch {
	case p == nil && u.active != nil:
		u.share(ctx, &v) // what is missing comes on u.results, and nobody else waits for it
	case p == nil:
	case u.active == nil && settling(unit) && u.good == serve.Digest() && deploy.Loaded(unit) == nil:
		// systemd is at it; the watcher tells when it is done
	case u.active != nil && !u.of(serve).again.due(): // it has failed here before
	case u.active != nil || u.build.due() || unit.Active == "active" && unit.InvocationID != u.tried:
		u.tried = unit.InvocationID
		u.bringUp(ctx, p)
		poke(u.look)
	}
}

// settling reports whether systemd is between two states of the unit by itself.
func settling(s systemd.State) bool {
	return s.Active == "activating" || s.Active == "deactivating" || s.Active == "reloading"
}

// open verifies the snapshot of a generation, or forgets a generation that is
// not what it was. nil says that it cannot be used now.
func (u *updater) open(n int) *snapshot.Snapshot {
	if s := u.opened[n]; s != nil {
		return s
	}
	v := u.gens.View()
	g := v.Get(n)
	if g == nil {
		return nil
	}
	proof, _, err := u.gens.Load(n)
	damaged := errors.Is(err, generation.ErrDamaged)
	var s *snapshot.Snapshot
	if err == nil {
		s, err = u.openProof(g.Network, proof)
		damaged = errors.Is(err, snapshot.ErrUntrusted)
	}
	if err == nil && s.Digest() != g.Config {
		err, damaged = fmt.Errorf("%w: its configuration is %s, not %s", generation.ErrDamaged, s.Digest(), g.Config), true
	}
	if err != nil {
		u.log.Error("a generation cannot be used", journal.GenerationBroken.Attr(), "generation", n, "error", err)
		if damaged {
			u.logged(u.gens.Forget(n))
		}
		return nil
	}
	u.opened[n] = s
	return s
}

// logged says that the store could not be written, which nothing here waits for.
func (u *updater) logged(err error) {
	if err != nil {
		u.log.Error("generations", journal.StorageFailed.Attr(), "error", err)
	}
}

// current returns what is current on disk, verified, or the next best; nil for
// none.
func (u *updater) current(v *generation.View) *snapshot.Snapshot {
	for v.Current != 0 {
		s := u.open(v.Current)
		if s != nil {
			return s
		}
		before := v.Current
		if *v = u.gens.View(); v.Current == before {
			return nil // it may be had later
		}
	}
	return nil
}

// wanted returns the configuration that should be.
func (u *updater) wanted(v *generation.View, cur *snapshot.Snapshot) *snapshot.Snapshot {
	if cur != nil {
		if m := u.memberOf(cur); m.board.snapshot() == nil {
			m.board.learn(cur) // it stands in for what the network has
		}
	}
	for _, m := range u.members {
		u.refreshed(m, cur)
	}
	for _, st := range u.standing {
		st.ahead, st.why = false, "" // until [updater.lead] is asked, which it is not while the operator has gone back
	}
	u.unpin(v, cur)
	pinned := 0
	if !v.Aside.IsZero() {
		if pinned = v.Order; pinned == 0 {
			pinned = v.Current
		}
	}
	for _, m := range u.members {
		m.board.set(func(b *board) {
			if b.pinned = 0; m.net.Name == v.AsideOf {
				b.pinned = pinned
			}
		})
	}
	if v.Order != 0 {
		if s := u.open(v.Order); s != nil {
			return s
		}
		*v = u.gens.View()
	}
	if !v.Aside.IsZero() && cur != nil {
		return cur
	}
	lead := u.lead(v, cur)
	if lead == nil {
		return cur
	}
	newest, st := lead.board.snapshot(), u.standing[lead]
	g := v.Find(newest.Digest())
	switch {
	case cur == nil || cur.Digest() == newest.Digest(), g == nil:
		return newest
	case g.State == generation.Dead:
		return cur
	case g.State != generation.Failed:
		return newest
	}
	// Whose fault it is, the current one shows. Where it is this machine's, the
	// failed one is tried again, sooner if nothing else serves.
	if u.active == nil && u.down || u.active != nil && g.Machine && st.again.due() {
		return newest
	}
	return cur
}

// refreshed takes note of a network's newest configuration: another one, another
// chance.
func (u *updater) refreshed(m *membership, cur *snapshot.Snapshot) {
	newest, st := m.board.snapshot(), u.standing[m]
	if newest == nil || newest.Digest() == st.newest {
		return
	}
	was := st.newest
	st.newest, st.fetch, st.again = newest.Digest(), backoff{}, backoff{}
	if cur == nil || was != cur.Digest() {
		delete(u.plans, was)
	}
	v := u.gens.View()
	if g := v.Find(st.newest); g != nil && g.State == generation.Dead {
		m.board.fail(newest, failure(g))
	}
}

// unpin ends what the operator's going back began, once the network has another
// configuration than the one that was put aside.
func (u *updater) unpin(v *generation.View, cur *snapshot.Snapshot) {
	if v.Aside.IsZero() {
		return
	}
	if m := u.named(v.AsideOf); m != nil {
		// Where the cache is lost, what is current stands in for what the network has.
		newest := m.board.snapshot()
		if newest == nil || newest.Digest() == v.Aside || cur != nil && cur.Digest() == newest.Digest() {
			return
		}
		m.log.Info("the network has another configuration than the one put aside", journal.GenerationUnpin.Attr(), "version", newest.Version())
	}
	u.logged(u.gens.Forward(digest.Digest{}))
	*v = u.gens.View()
}

// failure is why a generation is not in use, as it was when that was written.
func failure(g *generation.Generation) *deploy.Error {
	return &deploy.Error{Step: deploy.Step(g.Step), Err: errors.New(g.Reason)}
}

// settled does what is left to do when what should be is.
func (u *updater) settled(v *generation.View) {
	// The disk was full when it came up.
	if g := v.Get(v.Current); g != nil && g.State == generation.Trial && g.Config == u.active.Snapshot().Digest() {
		u.passed(v.Current, g.Phases)
	}
}

// endStagings ends what nobody wants any more: neither these, nor a network that is
// to share the runtime, or to lead once it has been staged.
func (u *updater) endStagings(wanted ...*snapshot.Snapshot) {
	for m, st := range u.staging {
		newest := st.snap.Digest() == u.standing[m].newest
		switch {
		case slices.ContainsFunc(wanted, func(s *snapshot.Snapshot) bool { return s.Digest() == st.snap.Digest() }):
		case newest && (u.standing[m].ahead || u.mayShare(st.snap)):
		default:
			st.end()
		}
	}
}

// staging is a staging under way.
type staging struct {
	snap   *snapshot.Snapshot
	cancel context.CancelFunc
	over   bool // it is not wanted any more
}

// end has a staging end; its result comes all the same.
func (st *staging) end() {
	st.over = true
	st.cancel()
}

// result is what comes of one.
type result struct {
	*staging
	deployer deployer
	proof    []byte
	plan     *deploy.Plan
	phases   []generation.Phase
	err      error
}

// stage begins to prepare everything for snap while the old deployment serves. A
// staging of something else of the same network ends first. Other networks' go on:
// nobody's sources hold up anybody else's.
func (u *updater) stage(ctx context.Context, v *generation.View, snap *snapshot.Snapshot) {
	m := u.memberOf(snap)
	if under := u.staging[m]; under != nil {
		if under.snap.Digest() != snap.Digest() {
			under.end()
		}
		return
	}
	if !u.standing[m].fetch.due() {
		return
	}
	if u.standing[m].waits.IsZero() {
		u.standing[m].waits = time.Now()
	}
	sctx, cancel := context.WithCancel(ctx)
	st := &staging{snap: snap, cancel: cancel}
	u.staging[m] = st
	r := &result{staging: st}
	if g := v.Find(snap.Digest()); g != nil {
		if proof, _, err := u.gens.Load(g.Number); err == nil {
			r.proof = proof
		}
	}
	var serving *snapshot.Model
	if u.active != nil {
		serving = u.active.Snapshot().Model()
	}
	u.wg.Go(func() {
		defer cancel()
		r.err = u.prepare(sctx, r, serving)
		select {
		case u.results <- r:
		case <-ctx.Done():
		}
	})
}

// prepare runs beside the update loop, and changes nothing but r.
func (u *updater) prepare(ctx context.Context, r *result, serving *snapshot.Model) (err error) {
	ctx = forNetwork(ctx, r.snap.Config().Network.Name)
	clock := newPhases()
	defer func() { r.phases = clock.end() }()
	clock.begin(phaseStage)
	if r.proof == nil {
		if r.proof, err = u.memberOf(r.snap).snaps.Proof(r.snap); err != nil {
			return &deploy.Error{Step: deploy.StepUnit, Err: err}
		}
	}
	if r.deployer, err = u.theDeployer(ctx); err != nil {
		return &deploy.Error{Step: deploy.StepImage, Err: err}
	}
	if r.plan, err = r.deployer.Stage(ctx, r.snap); err != nil {
		return err
	}
	// What the model that serves has in memory is not taken from it.
	if serving == nil || serving.Digest() == r.snap.Model().Digest() {
		return nil
	}
	if most := u.memory() - serving.Size(); most > 0 {
		clock.begin(phaseWarm)
		read, err := r.deployer.Warm(ctx, r.plan, most)
		if err != nil && ctx.Err() == nil { // the start reads it anyway
			u.log.Warn("the next model is not in memory", "error", err)
		}
		u.log.Info("the next model was read ahead", "model", r.snap.Config().Runtime.Model, "bytes", read)
	}
	return nil
}

// theDeployer opens the one deployer, which needs Podman.
func (u *updater) theDeployer(ctx context.Context) (deployer, error) {
	u.opening.Lock()
	defer u.opening.Unlock()
	if u.first == nil {
		d, err := u.openDeployer(ctx)
		if err != nil {
			return nil, err
		}
		u.first = d
	}
	return u.first, nil
}

// reached is told by the deployer how far it is.
func (a *Agent) reached(s *snapshot.Snapshot, step deploy.Step) {
	a.memberOf(s).board.advance(s, step)
}

// progress is told by the deployer how much of a model is here.
func (a *Agent) progress(model *snapshot.Model, done, _ int64) {
	for _, m := range a.members {
		m.board.set(func(b *board) {
			if _, listed := b.models[model.Digest()]; listed {
				b.models[model.Digest()] = done
			}
		})
		if s := m.board.snapshot(); s != nil && lists(s, model) {
			m.board.advance(s, deploy.StepModel)
		}
	}
}

func lists(s *snapshot.Snapshot, m *snapshot.Model) bool {
	for i := range s.Config().Models {
		if &s.Config().Models[i] == m {
			return true
		}
	}
	return false
}

// collect takes up what a staging has come to.
func (u *updater) collect(ctx context.Context, r *result) {
	if ctx.Err() != nil {
		return
	}
	delete(u.staging, u.memberOf(r.snap))
	if r.deployer != nil {
		u.deployer = r.deployer
	}
	st := u.of(r.snap)
	if r.over {
		st.fetch = backoff{}
		if st.newest == r.snap.Digest() { // else the next one is waited for as long already
			st.waits = time.Time{}
		}
		return
	}
	u.logged(u.gens.Prune()) // also where none comes up, which would clean
	err := r.err
	p := &staged{plan: r.plan, phases: r.phases, content: contentOf(r)}
	if err == nil && !u.mayShare(r.snap) {
		err = u.number(p)
	}
	if err == nil {
		st.fetch, st.waits, u.tight = backoff{}, time.Time{}, false
		u.plans[r.snap.Digest()] = p
		return
	}
	u.report(r.snap, err)
	st.fetch.failed()
	if m := u.memberOf(r.snap); u.active != nil && m != u.owner() && m.board.runs() {
		u.admit(m, nil, standby) // what it had a part in under another configuration of its own
	}
	v := u.gens.View()
	isCurrent := v.Get(v.Current) != nil && v.Get(v.Current).Config == r.snap.Digest()
	if isCurrent || r.snap.Digest() == u.want { // another network's had no turn
		u.down = isCurrent && u.active == nil
	}
	e, _ := errors.AsType[*deploy.Error](err)
	var space *model.NoSpaceError
	switch {
	case errors.As(err, &space):
		u.makeRoom(&v, st)
	case e != nil && !e.Machine() && !isCurrent && v.Current != 0 && r.proof != nil: // nothing here will mend it
		n, err := u.gens.Add(p.content)
		if err == nil {
			err = u.gens.Condemn(n, string(e.Step), e.Err.Error())
		}
		if u.logged(err); err == nil {
			u.log.Error("generation is dead", journal.GenerationDead.Attr(), "generation", n, "step", e.Step)
		}
	}
}

// number makes a staged plan a generation.
func (u *updater) number(p *staged) error {
	n, err := u.gens.Add(p.content)
	if err != nil {
		return &deploy.Error{Step: deploy.StepUnit, Err: err}
	}
	p.number = n
	if v := u.gens.View(); v.Get(n).State == generation.Staged {
		u.build = backoff{} // it does not wait for the schedule of one that fails
		u.log.Info("generation staged", journal.GenerationStaged.Attr(), "generation", n, "version", p.content.Version, "network", p.content.Network)
	}
	return nil
}

func contentOf(r *result) generation.Content {
	c := r.snap.Config()
	g := generation.Content{Network: c.Network.Name, Config: r.snap.Digest(), Version: r.snap.Version(), Engine: string(c.Runtime.Engine), Image: c.Runtime.Image.String(), Proof: r.proof}
	for i := range c.Models {
		g.Models = append(g.Models, generation.Model{Name: c.Models[i].Name, Version: c.Models[i].Version, Digest: c.Models[i].Digest()})
	}
	if r.plan != nil {
		g.Unit = r.plan.Unit()
	}
	return g
}

// makeRoom gives up the generation before, whose model may be as large as the
// one that there is no room for.
func (u *updater) makeRoom(v *generation.View, st *standing) {
	if u.active != nil && !u.tight && len(u.members) > 1 { // first what networks on standby have here
		u.tight, u.untidy, u.tidy, st.fetch = true, true, backoff{}, backoff{}
		return
	}
	if v.Previous == 0 || v.Previous == v.Order || u.active == nil {
		return
	}
	u.log.Warn("no room for the next model: the generation before is given up", "generation", v.Previous)
	u.logged(u.gens.Forget(v.Previous))
	delete(u.opened, v.Previous)
	u.untidy, u.tidy, st.fetch = true, backoff{}, backoff{} // in this order, at the next look
}

// bringUp makes a staged plan what runs, or goes back to what was healthy.
func (u *updater) bringUp(ctx context.Context, p *staged) {
	snap := p.plan.Snapshot()
	if p.number == 0 {
		if err := u.number(p); err != nil {
			u.report(snap, err)
			u.build.failed()
			return
		}
	}
	v := u.gens.View()
	g := v.Get(p.number)
	if g == nil { // pruned or damaged meanwhile
		delete(u.plans, snap.Digest())
		return
	}
	st := u.of(snap)
	trial := v.Current != p.number || g.State != generation.Healthy
	clock := newPhases()
	clock.done = append(clock.done, p.phases...)
	clock.tell = func(f generation.Phase) {
		u.log.Info("phase", journal.GenerationPhase.Attr(), "phase", f.Name, "took_ms", f.TookMS, "generation", p.number)
	}
	p.phases = nil // of the first time
	if u.active != nil {
		clock.begin(phaseDrain)
		if u.idle(ctx) != nil {
			return
		}
	}
	var err error
	if g.State == generation.Trial && g.Tries >= generation.Trials {
		err = &deploy.Error{Step: deploy.StepStart, Err: fmt.Errorf("it was begun %d times and the agent did not live to see it healthy", g.Tries)}
	} else if trial {
		if err := u.gens.Begin(p.number); err != nil {
			u.report(snap, &deploy.Error{Step: deploy.StepUnit, Err: err})
			st.again.failedOn(rarely)
			u.build.failed()
			return // the next look lets jobs in again
		}
	}
	u.setActive(nil, starting)
	u.memberOf(snap).board.setActive(nil, starting) // also where it was on standby
	u.memberOf(snap).board.advance(snap, deploy.StepUnit)
	var dep *deploy.Deployment
	if err == nil {
		actx, cancel := context.WithTimeoutCause(ctx, p.plan.Patience(), fmt.Errorf("not healthy within %v", p.plan.Patience()))
		dep, err = u.deployer.Apply(actx, p.plan, clock.begin)
		cancel()
	}
	if err == nil {
		err = u.attest(ctx, u.memberOf(snap), dep)
	}
	if err != nil {
		u.failed(ctx, p, trial, err, clock.end())
		return
	}
	clock.begin(phaseAdmit)
	u.down, u.build = false, backoff{}
	u.good = snap.Digest()
	u.admitted = time.Now()
	u.memberOf(snap).validated(byInstallation, dep, dep.Fingerprint(), nil)
	u.setActive(dep, active)
	c := snap.Config()
	u.log.Info("runtime active", journal.RuntimeActive.Attr(), "model", c.Runtime.Model, "image", c.Runtime.Image, "version", snap.Version(), "generation", p.number, "network", c.Network.Name)
	phases := clock.end()
	if trial {
		st.again = backoff{}
	} else {
		phases = g.Phases // of its own switch
	}
	if trial || v.Unjudged() {
		u.passed(p.number, phases)
	}
	u.untidy, u.tidy = true, backoff{}
}

// attest records the sandbox of a runtime that has come up. One that has changed
// since an agent before this one has looked is stopped.
func (u *updater) attest(ctx context.Context, m *membership, dep *deploy.Deployment) error {
	views := dep.Views()
	err := m.attest(dep, &views)
	switch {
	case err == nil:
		m.board.set(func(b *board) { b.looked = time.Now().UTC() })
		return nil
	case errors.Is(err, sandbox.ErrNotSealed):
		err = errors.Join(err, u.units.Stop(ctx, quadlet.ServiceName))
	}
	return &deploy.Error{Step: deploy.StepSandbox, Err: err}
}

// idle gives out no more jobs and waits until those that run have ended, or the
// last of them is past its deadline. It fails only with ctx.
func (u *updater) idle(ctx context.Context) error {
	if u.active == nil {
		return nil
	}
	until := time.Now()
	for _, m := range u.members {
		m.door.shut(m.worker)
		poke(m.beat)
		s := m.door.serves()
		if s == nil {
			s = u.active.Snapshot()
		}
		limit := time.Now().Add(s.Config().Limits.Deadline.Duration())
		if last := m.worker.Deadline(); !last.IsZero() && last.Before(limit) {
			limit = last
		}
		if limit.After(until) {
			until = limit
		}
	}
	ictx, cancel := context.WithDeadline(ctx, until)
	defer cancel()
	for _, m := range u.members {
		if err := m.worker.Idle(ictx); err != nil && ctx.Err() == nil {
			m.log.Warn("jobs are cut short by the switch", "error", err)
		}
	}
	return ctx.Err()
}

// passed makes it last that n is healthy, and that those that failed are dead.
func (u *updater) passed(n int, phases []generation.Phase) {
	dead, err := u.gens.Passed(n, phases)
	if err != nil {
		u.logged(err) // it is tried again at the next look
		return
	}
	u.log.Info("generation healthy", journal.GenerationActive.Attr(), "generation", n)
	for _, d := range dead {
		u.log.Error("generation is dead: its configuration is not tried again", journal.GenerationDead.Attr(), "generation", d)
	}
}

// failed goes back to the healthy generation before, if there is one. A plan
// that is no trial has been healthy, so that this machine is at fault.
func (u *updater) failed(ctx context.Context, p *staged, trial bool, err error, phases []generation.Phase) {
	if ctx.Err() != nil { // who restarts the agent thrice condemns nothing
		if trial {
			u.logged(u.gens.Interrupted(p.number))
		}
		return
	}
	u.setActive(nil, failed)
	snap := p.plan.Snapshot()
	if stepOf(err) == deploy.StepValidate {
		u.memberOf(snap).validated(byInstallation, nil, digest.Digest{}, err)
	}
	u.report(snap, err)
	p.stale = true
	u.down = true
	u.build.failed()
	if !trial {
		u.logged(u.gens.Excuse())
		return
	}
	e, ok := errors.AsType[*deploy.Error](err)
	if !ok {
		e = &deploy.Error{Step: deploy.StepUnit, Err: err}
	}
	machine := e.Machine() || hardware.Free(u.cfg.Paths.State) < lowDisk
	back, err := u.gens.Fail(p.number, string(e.Step), e.Err.Error(), machine, phases)
	if err != nil { // nothing was written: the next start tries it once more
		u.logged(err)
		return
	}
	u.log.Error("generation did not become healthy", journal.GenerationFailed.Attr(), "generation", p.number, "step", e.Step, "machine", machine, "back_to", back, "error", e.Err)
	if machine {
		u.of(snap).again.failedOn(rarely)
	}
	old := u.open(back)
	switch {
	case old == nil:
		return
	case old.Digest() == snap.Digest(): // the unit alone is another, and is rendered for this machine
		u.logged(u.gens.Excuse())
		return
	}
	u.log.Warn("going back to the last good generation", "generation", back, "version", old.Version())
	if q := u.plans[old.Digest()]; q != nil {
		u.bringUp(ctx, q)
		return
	}
	u.down, u.build = false, backoff{} // it is staged first
}

// lowDisk is so little free space, in bytes, that a start may fail for it.
const lowDisk = 64 << 20

// cleanPatience is how long the update loop waits for Podman to remove images. It may
// be busy with something else of a staging.
const cleanPatience = 30 * time.Second

// clean removes the images and models that no generation needs that is kept,
// where a switch has left some. What is being staged is needed. It tries again what
// could not be removed.
func (u *updater) clean(ctx context.Context) {
	if !u.untidy || !u.tidy.due() {
		return
	}
	u.logged(u.gens.Prune())
	v := u.gens.View()
	keep := []*snapshot.Snapshot{u.active.Snapshot()}
	for _, st := range u.staging {
		keep = append(keep, st.snap)
	}
	for _, m := range u.members {
		if s := m.board.snapshot(); s != nil && (!u.tight || u.standing[m].ahead) {
			keep = append(keep, s)
		}
	}
	for n := range u.opened {
		if v.Get(n) == nil {
			delete(u.opened, n)
		}
	}
	for _, n := range []int{v.Current, v.Previous, v.Order} {
		s := u.open(n)
		v := u.gens.View()
		switch {
		case s != nil:
			keep = append(keep, s)
		case v.Get(n) != nil: // it is kept, and what it needs may be known later
			u.tidy.failedOn(rarely)
			return
		}
	}
	cctx, cancel := context.WithTimeout(ctx, cleanPatience)
	defer cancel()
	if err := u.deployer.Clean(cctx, keep...); err != nil {
		u.log.Warn("unlisted images or models not removed", "error", err)
		u.tidy.failedOn(rarely)
		return
	}
	u.untidy, u.tidy = false, backoff{}
}

// setActive publishes what runs; nil for nothing that may be given jobs. No other
// network has a part in it then.
func (u *updater) setActive(d *deploy.Deployment, phase string) {
	old := u.engine
	for _, j := range u.joining { // they were of what has run
		j.end()
	}
	u.active, u.engine = d, nil
	if d != nil {
		u.engine = u.openEngine(d.Socket())
	}
	owner := u.owner()
	for _, m := range u.members {
		switch {
		case m == owner:
			u.admit(m, d, phase)
		case d != nil || m.board.phaseNow() == standby:
			u.admit(m, nil, standby)
		default:
			u.admit(m, nil, phase)
		}
	}
	if old != nil {
		old.Close() // connections that no job uses
	}
}

// admit lets a network's jobs to a deployment; nil for none.
func (u *updater) admit(m *membership, d *deploy.Deployment, phase string) {
	m.board.setActive(d, phase)
	if d == nil {
		m.door.open(m.worker, nil, nil)
	} else {
		class, _ := d.Class()
		m.door.open(m.worker, d, &work.Active{Snapshot: d.Snapshot(), Image: d.Image(), Model: d.Model(), Class: class, Sandbox: m.inForce, Engine: u.engine})
	}
	poke(m.beat)
	poke(m.recheck)
}

// report makes a failure known: to the operator at once, to status until it is
// mended.
func (u *updater) report(snap *snapshot.Snapshot, err error) {
	e, ok := errors.AsType[*deploy.Error](err)
	if !ok { // the deployer promises the other
		e = &deploy.Error{Step: deploy.StepUnit, Err: err}
	}
	m := u.memberOf(snap)
	if m.board.fail(snap, e) { // say it once, not at every try
		m.log.Error("deployment failed", eventOf(err).Attr(), "version", snap.Version(), "step", e.Step, "error", err)
	}
}

// stepOf returns the step that has failed, "" where none has.
func stepOf(err error) deploy.Step {
	if e, ok := errors.AsType[*deploy.Error](err); ok {
		return e.Step
	}
	return ""
}

// eventOf says in the catalog's terms why a deployment failed.
func eventOf(err error) *journal.Event {
	e, ok := errors.AsType[*deploy.Error](err)
	var memory *deploy.MemoryError
	switch {
	case !ok:
		return journal.RuntimeFailed
	case e.Step == deploy.StepImage:
		return told(imageRefusals, err, journal.ImageFailed)
	case e.Step == deploy.StepModel:
		return told(modelRefusals, err, journal.ModelFailed)
	case errors.Is(err, deploy.ErrDrifted):
		return journal.SandboxDrifted
	case errors.Is(err, deploy.ErrUnrecorded):
		return journal.SandboxUnrecorded
	case errors.Is(err, sandbox.ErrNotSealed), errors.Is(err, quadlet.ErrUnsealed):
		return journal.SandboxRefused
	case errors.Is(err, deploy.ErrDevice):
		return journal.DeviceRefused
	case errors.As(err, &memory):
		return journal.MemoryRefused
	case e.Step == deploy.StepValidate:
		return journal.ValidationFailed
	}
	return journal.RuntimeFailed
}

// toldAs is a reason for which something is not used, and what the journal says of
// it.
type toldAs struct {
	reason error
	event  *journal.Event
}

// told returns the event of the first refusal that err is, and else the one for
// what may pass.
func told(refusals []toldAs, err error, otherwise *journal.Event) *journal.Event {
	for _, r := range refusals {
		if errors.Is(err, r.reason) {
			return r.event
		}
	}
	return otherwise
}

// modelRefusals are the reasons for which a model is not used.
var modelRefusals = []toldAs{
	{format.ErrCode, journal.ModelCode},
	{format.ErrMagic, journal.ModelFormat},
	{format.ErrHeader, journal.ModelFormat},
	{format.ErrTensors, journal.ModelFormat},
	{format.ErrParts, journal.ModelParts},
	{signature.ErrKey, journal.ModelSigner},
	{signature.ErrMalformed, journal.ModelSignature},
	{signature.ErrStatement, journal.ModelSignature},
	{signature.ErrFiles, journal.ModelSignature},
	{digest.ErrMismatch, journal.ModelRefused},
	{syscall.ENOSPC, journal.ModelSpace},
}

// imageRefusals are the reasons for which an image must not run, the most telling
// first: an error may be several.
var imageRefusals = []toldAs{
	{image.ErrAltered, journal.ImageAltered},
	{image.ErrRevoked, journal.ImageRevoked},
	{image.ErrOtherDigest, journal.ImageDigest},
	{image.ErrIdentity, journal.ImageRepository},
	{image.ErrExpired, journal.ImageExpired},
	{image.ErrUnsigned, journal.ImageUnsigned},
	{image.ErrWrongKey, journal.ImageSigner},
	{image.ErrOtherBytes, journal.ImageBytes},
	{image.ErrManifest, journal.ImageManifest},
	{image.ErrPlatform, journal.ImagePlatform},
	{image.ErrTooLarge, journal.ImageOversize},
	{image.ErrKeys, journal.ImageKeys},
	{podman.ErrRefused, journal.ImageRefused},
	{podman.ErrOtherImage, journal.ImageOther},
	{image.ErrOtherImage, journal.ImageOther},
}

// withdraw stops a runtime whose image the network trusts no more, whoever has
// started it, and says whether it was one. One that is trusted is looked at again
// only with the network's next configuration: what the agent starts later is looked
// at then.
func (u *updater) withdraw(ctx context.Context, unit systemd.State, cur *snapshot.Snapshot) bool {
	runs := cur
	if u.active != nil {
		runs = u.active.Snapshot()
	}
	if u.deployer == nil || runs == nil || u.judged == u.of(runs).newest || unit.Active == "inactive" || unit.Active == "failed" {
		return false
	}
	err := u.deployer.Trusted(ctx, runs)
	if !errors.Is(err, image.ErrRevoked) {
		if err == nil {
			u.judged = u.of(runs).newest
		}
		return false
	}
	u.setActive(nil, failed)
	u.report(runs, err)
	delete(u.plans, runs.Digest())
	if err := u.units.Stop(ctx, quadlet.ServiceName); err != nil {
		u.report(runs, &deploy.Error{Step: deploy.StepUnit, Err: err})
		u.build.failed()
		return true
	}
	u.down = true
	return true
}

// watchHealthy is how long a watch has lasted when its end is news again.
const watchHealthy = time.Minute

// watchRuntime pokes the update loop whenever systemd says that the runtime's
// unit has changed. A start that nobody has looked at gets no jobs from the very
// moment on, whatever the loop is doing.
func (a *Agent) watchRuntime(ctx context.Context) error {
	for try := 0; ; try++ {
		begin := time.Now()
		err := a.units.Watch(ctx, quadlet.ServiceName, func() {
			if unit, err := a.units.State(ctx, quadlet.ServiceName); err == nil {
				for _, m := range a.members {
					m.door.check(m.worker, unit)
				}
			}
			poke(a.look)
		})
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
