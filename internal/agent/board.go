package agent

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/resultity/node/internal/control"
	"github.com/resultity/node/internal/deploy"
	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/gate"
	"github.com/resultity/node/internal/image"
	"github.com/resultity/node/internal/journal"
	"github.com/resultity/node/internal/model"
	"github.com/resultity/node/internal/podman"
	"github.com/resultity/node/internal/preflight"
	"github.com/resultity/node/internal/session"
	"github.com/resultity/node/internal/snapshot"
	"github.com/resultity/node/internal/tuf"
	"github.com/resultity/node/internal/wire"
)

// Phases of the runtime, in the words of [wire.RuntimeState].
const (
	stopped  = "stopped"
	starting = "starting"
	active   = "active"
	failed   = "failed"
	standby  = wire.RuntimeStandby
)

// board is what the loops tell each other and the operator. Each value is
// written by one loop and read by all.
type board struct {
	network string // its name; never changes

	mu sync.Mutex // guards everything below; held only to copy values

	// Written by the loop that follows the network, and at the start.
	snap       *snapshot.Snapshot // newest verified
	snapErr    error              // why it could not be refreshed
	asked      bool               // the network has been asked, and has answered or not
	refreshed  time.Time          // when the network last confirmed it
	expired    digest.Digest      // configuration of which it was said that it has expired
	bound      wire.Bound         // whose node it is; also the session's to write
	registered bool
	regErr     error

	// Written by the update loop.
	step     deploy.Step   // where snap is on its way; "" when its deployment is active
	failed   *deploy.Error // why it stands there, or nil
	active   *deploy.Deployment
	phase    string // of the runtime
	holder   string // on standby: the network that the runtime serves
	waits    string // and why not this one
	restarts int
	pinned   int                     // generation that the operator has gone back to; 0 for none
	models   map[digest.Digest]int64 // verified bytes, by model of snap

	validated validated // also by the loop of validations

	// Written by the session.
	connected bool
	looked    time.Time // at the sandbox, and found it as it should be; zero for never
	away      time.Time // while it is not connected: since
	sessErr   error
	word      *wire.Status // the network's own word
}

func (b *board) set(f func(*board)) {
	b.mu.Lock()
	defer b.mu.Unlock()
	f(b)
}

// learn makes s the newest snapshot. What is known about the way of another one
// is forgotten.
func (b *board) learn(s *snapshot.Snapshot) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.snap == nil || b.snap.Digest() != s.Digest() {
		b.step, b.failed = deploy.Steps[0], nil
		if b.active != nil && b.active.Snapshot().Digest() == s.Digest() {
			b.step = ""
		}
		models := map[digest.Digest]int64{}
		for i := range s.Config().Models {
			d := s.Config().Models[i].Digest()
			models[d] = b.models[d]
		}
		b.models = models
	}
	b.snap = s
}

// damage says that a model is no longer what was verified.
func (b *board) damage(model digest.Digest) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if _, listed := b.models[model]; listed {
		b.models[model] = 0
	}
}

// advance says that a snapshot has come to a step. Until a repeated try is past
// the step that failed before, the failure is what the operator has to see.
func (b *board) advance(s *snapshot.Snapshot, step deploy.Step) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.snap == nil || b.snap.Digest() != s.Digest() {
		return
	}
	if b.failed != nil && slices.Index(deploy.Steps, step) <= slices.Index(deploy.Steps, b.failed.Step) {
		return
	}
	b.step, b.failed = step, nil
	if b.active == nil && b.phase == failed {
		b.phase = stopped
	}
}

// retry forgets why a snapshot is not up.
func (b *board) retry(s *snapshot.Snapshot) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.failed != nil && b.snap != nil && b.snap.Digest() == s.Digest() {
		b.step, b.failed = deploy.Steps[0], nil
	}
}

// fail says why a snapshot is not up. It reports whether that is news.
func (b *board) fail(s *snapshot.Snapshot, e *deploy.Error) (news bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.snap == nil || b.snap.Digest() != s.Digest() {
		return true
	}
	news = b.failed == nil || b.failed.Error() != e.Error()
	if b.active == nil {
		b.phase = failed
	}
	if !b.served(s) {
		b.step, b.failed = e.Step, e
	}
	return news
}

// setActive says what runs, nil for nothing.
func (b *board) setActive(d *deploy.Deployment, phase string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	lost := b.active != nil && d == nil && b.served(b.snap)
	b.active, b.phase = d, phase
	if phase != standby {
		b.holder, b.waits = "", ""
	}
	switch {
	case d != nil && b.served(b.snap):
		b.step, b.failed = "", nil
	case lost:
		b.step = deploy.StepStart
	}
}

// standBy says who has the runtime, and why not this network. It reports whether
// that is news.
func (b *board) standBy(holder, why string) (news bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	news = b.holder != holder || b.waits != why
	b.holder, b.waits = holder, why
	return news
}

// phaseNow returns the phase of the runtime.
func (b *board) phaseNow() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.phase
}

// hasAsked reports whether the network has been asked since the start.
func (b *board) hasAsked() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.asked
}

// serves reports whether the active deployment is that of s.
func (b *board) serves(s *snapshot.Snapshot) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.served(s)
}

// servesAs reports whether the active deployment is this one, and not another
// of the same snapshot.
func (b *board) servesAs(d *deploy.Deployment) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.active == d
}

// served reports whether the active deployment is that of s. The caller holds
// the lock.
func (b *board) served(s *snapshot.Snapshot) bool {
	return b.active != nil && s != nil && b.active.Snapshot().Digest() == s.Digest()
}

// snapshot returns the newest verified snapshot, or nil.
func (b *board) snapshot() *snapshot.Snapshot {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.snap
}

// config returns the digest of the configuration whose deployment is active, or
// else of the newest: what is served counts, not what is being prepared.
func (b *board) config() digest.Digest {
	b.mu.Lock()
	defer b.mu.Unlock()
	switch {
	case b.active != nil:
		return b.active.Snapshot().Digest()
	case b.snap != nil:
		return b.snap.Digest()
	}
	return digest.Digest{}
}

// modelStates lists the models of the snapshot.
func (b *board) modelStates() []control.Model {
	b.mu.Lock()
	defer b.mu.Unlock()
	ms := []control.Model{}
	if b.snap == nil {
		return ms
	}
	for i := range b.snap.Config().Models {
		m := &b.snap.Config().Models[i]
		done := b.models[m.Digest()]
		f := model.Facts{
			Archived: m.Archived, Complete: done == m.Size(), Served: b.active != nil && b.active.Model() == m.Digest(),
			Failed: b.failed != nil && b.failed.Model == m.Digest(),
		}
		if f.Served {
			done = m.Size()
		}
		ms = append(ms, control.Model{
			Network:    b.network,
			ModelState: wire.ModelState{Name: m.Name, Version: m.Version, Digest: m.Digest(), State: string(f.State())},
			Bytes:      m.Size(), Done: done,
		})
	}
	return ms
}

// runtimeState is the runtime as heartbeats and status show it.
func (b *board) runtimeState() wire.RuntimeState {
	b.mu.Lock()
	defer b.mu.Unlock()
	r := wire.RuntimeState{State: b.phase, Restarts: b.restarts}
	if s := b.snap; s != nil {
		r.Engine = string(s.Config().Runtime.Engine)
	}
	if b.active != nil {
		r.Engine, r.Image = string(b.active.Snapshot().Config().Runtime.Engine), b.active.Image()
	}
	return r
}

// class is the determinism class of the runtime, as heartbeats and status show it;
// nil for none.
func (b *board) class() *wire.Class {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.active == nil {
		return nil
	}
	d, h := b.active.Class()
	if d.IsZero() {
		return nil
	}
	c := &wire.Class{Digest: d, Hardware: h}
	if b.validated.printOf == b.active {
		c.Fingerprint = b.validated.print
	}
	return c
}

// gates walks from the registration to jobs. Every closed gate says what opens it.
func (b *board) gates(drains []control.Drain, now time.Time) []gate.Gate {
	b.mu.Lock()
	defer b.mu.Unlock()
	gs := []gate.Gate{b.registrationGate(), b.configurationGate(now)}
	gs = append(gs, b.runtimeGates()...)
	gs = append(gs, b.sessionGate())
	gs = append(gs, acceptingGate(drains), b.routableGate())
	for i := range gs { // the texts know no network
		gs[i].Network = b.network
		gs[i].Detail, gs[i].Remedy = b.named(gs[i].Detail), b.named(gs[i].Remedy)
	}
	return gs
}

// named puts the network's name into keys of agent.toml.
func (b *board) named(s string) string {
	return strings.ReplaceAll(s, "network.NAME", "network."+b.network)
}

// acceptingGate names everybody who has drained the node.
func acceptingGate(drains []control.Drain) gate.Gate {
	if len(drains) == 0 {
		return gate.Gate{Name: gate.Accepting, State: gate.Open, Detail: "takes jobs"}
	}
	var who, remedies []string
	for _, d := range drains {
		text, remedy := "by its own end", "wait for the end, or for the restart"
		switch d.By {
		case byOperator:
			text, remedy = "by the operator", "resultityctl resume"
			if !d.Since.IsZero() {
				text += " since " + d.Since.UTC().Format("2006-01-02 15:04 MST")
			}
		case byNetwork:
			text, remedy = "by the network", "only the network takes its drain back; "+remedyOperator
		}
		if d.Reason != "" {
			text += " (" + d.Reason + ")"
		}
		who, remedies = append(who, text), append(remedies, remedy)
	}
	return gate.Gate{Name: gate.Accepting, Detail: "drained " + strings.Join(who, " and ") + ": takes no new jobs", Remedy: strings.Join(remedies, "; ")}
}

// Who can drain a node, in the words of [control.Drain].
const (
	byOperator = "operator"
	byNetwork  = "network"
	byAgent    = "agent" // it ends
)

// A cause is a kind of error and what mends it.
type cause struct {
	is     error
	remedy string
}

// remedyOf returns the remedy of the first cause that err is, or the last one.
func remedyOf(err error, causes []cause, otherwise string) string {
	for _, c := range causes {
		if errors.Is(err, c.is) {
			return c.remedy
		}
	}
	return otherwise
}

const (
	remedyReach    = "check that this machine reaches network.NAME.url, and network.NAME.ca for a private network; the agent keeps trying"
	remedyClock    = "set this machine's clock: timedatectl set-ntp true"
	remedyToken    = "put a valid token into the file that network.NAME.enrolment_token names; ask the network's operator for one"
	remedyNames    = "the name of the table [network.NAME] in agent.toml and its url belong to different networks; correct one of them"
	remedyUpgrade  = "upgrade the agent; if it is the newest, ask the network's operator"
	remedyBind     = "bind it to yours: resultityctl bind --wallet 0x…, --email name@domain or --token FILE"
	remedyOperator = "ask the network's operator"
	remedyCloned   = "find out which machine uses this node's key; stop all but one, and there, if this one was restored from a backup or moved on purpose: resultityctl identity takeover. If nobody of yours did this, the key is stolen: become a new node"
	remedyStandby  = "nothing, if that is what you want: it gets jobs when the other network does not need the machine, or asks for the same runtime; else give network.NAME.priority the higher number in agent.toml, or remove the other network's table, and restart the agent"
	remedyWait     = "wait; the gates above come first"
)

var snapshotCauses = []cause{
	{tuf.ErrUnreachable, remedyReach},
	{tuf.ErrExpired, remedyClock + "; if it is right, the network has not renewed its configuration: " + remedyOperator},
	{errOtherNetwork, remedyNames},
	{snapshot.ErrFiles, "the network's operator has to publish the model in another format, or without that file"},
	{snapshot.ErrInvalid, remedyUpgrade},
	{tuf.ErrRollback, "tell the network's operator: it serves older files than before"},
	{tuf.ErrMixed, "look for a cache or proxy between this machine and network.NAME.url, then " + remedyOperator},
	{tuf.ErrRoot, remedyOperator + ": its change of root keys is not valid"},
	{tuf.ErrMalformed, "check that network.NAME.url is reached and no proxy or portal answers in its place, then " + remedyOperator},
	{snapshot.ErrUntrusted, "check that network.NAME.root is this network's, then " + remedyOperator},
}

func (b *board) configurationGate(now time.Time) gate.Gate {
	g := gate.Gate{Name: gate.Configuration}
	switch {
	case b.snap == nil && b.snapErr == nil:
		g.Detail, g.Remedy = "not fetched yet", "wait a moment"
		return g
	case b.snap == nil:
		g.Detail = b.snapErr.Error()
		g.Remedy = remedyOf(b.snapErr, snapshotCauses, "the detail names the cause, on this machine; the agent keeps trying")
		return g
	}
	g.State = gate.Open
	g.Detail = fmt.Sprintf("version %d, verified", b.snap.Version())
	if b.snapErr != nil {
		// Going on with the last verified one is right, so the gate is open where
		// the network is away; but it says so.
		g.Detail = fmt.Sprintf("version %d, last confirmed %s: %v", b.snap.Version(), age(now, b.refreshed), b.snapErr)
		if e := b.snap.Expires(); !now.Before(e) {
			g.Detail += fmt.Sprintf("; it expired on %s, and the node goes on with it", e.UTC().Format(time.DateOnly))
		}
		// What is refused is another matter than what cannot be had: somebody has
		// to look, and jobs that still come are no reason to be silent.
		if r := remedyOf(b.snapErr, snapshotCauses, ""); r != "" && !errors.Is(b.snapErr, tuf.ErrUnreachable) {
			g.State, g.Remedy = gate.Closed, r
		}
	}
	if b.pinned != 0 {
		g.State = gate.Closed
		g.Detail += fmt.Sprintf("; put aside by the operator, who went back to generation %d", b.pinned)
		g.Remedy = "resultityctl generations forward, or wait for the network's next configuration"
	}
	if b.active != nil && !b.served(b.snap) {
		g.Detail += fmt.Sprintf("; version %d runs", b.active.Snapshot().Version())
	}
	return g
}

func age(now, then time.Time) string {
	if then.IsZero() {
		return "before this start"
	}
	return now.Sub(then).Round(time.Second).String() + " ago"
}

var registrationCauses = []cause{
	{errToken, remedyToken},
	{session.ErrToken, remedyToken},
	{session.ErrWrongNetwork, remedyNames},
	{session.ErrProtocol, remedyUpgrade},
	{wire.ErrClock, remedyClock},
	{wire.ErrSigner, remedyOperator},
}

func (b *board) registrationGate() gate.Gate {
	g := gate.Gate{Name: gate.Registration}
	switch {
	case b.registered && b.bound.Account == "":
		g.Detail, g.Remedy = "known to the network, but bound to no account", remedyBind
	case b.registered:
		g.State, g.Detail = gate.Open, "known to the network as a node of "+b.bound.Account
		if b.bound.Since != 0 {
			g.Detail += fmt.Sprintf(", bound by %s on %s", b.bound.Method, time.UnixMilli(b.bound.Since).UTC().Format(time.DateOnly))
		}
	case b.regErr != nil:
		g.Detail, g.Remedy = b.regErr.Error(), remedyOf(b.regErr, registrationCauses, remedyReach)
	case b.snap == nil: // whose signatures the network's answer would be checked by
		g.State, g.Detail = gate.Unknown, "needs the configuration first"
	default:
		g.Detail, g.Remedy = "not registered yet", remedyWait
	}
	return g
}

// A station is a gate of a deployment, and the steps that it stands for.
type station struct {
	name, good string
	steps      []deploy.Step
}

var stations = []station{
	{gate.Machine, "may run it, and has the memory, as far as that is known", []deploy.Step{deploy.StepMachine}},
	{gate.Image, "signature verified twice, stored", []deploy.Step{deploy.StepImage}},
	{gate.Model, "complete and verified", []deploy.Step{deploy.StepModel}},
	{gate.Runtime, "the engine runs", []deploy.Step{deploy.StepUnit, deploy.StepStart}},
	{gate.Sandbox, "sealed, seen from inside and outside", []deploy.Step{deploy.StepSandbox}},
	{gate.Validation, "gave the expected answers", []deploy.Step{deploy.StepValidate}},
}

// runtimeGates are those of the newest configuration, since the network gives
// jobs to nobody who is on another one: what it has passed is open, where it
// stands and what follows is closed.
func (b *board) runtimeGates() []gate.Gate {
	if b.phase == standby && b.failed == nil {
		return b.standbyGates()
	}
	var gs []gate.Gate
	at := len(stations)
	switch {
	case b.pinned != 0 && b.active != nil: // what runs is what the operator wants
	case b.step != "" || b.snap == nil:
		at = max(slices.IndexFunc(stations, func(s station) bool { return slices.Contains(s.steps, b.step) }), 0)
	}
	for i, s := range stations {
		g := gate.Gate{Name: s.name}
		switch {
		case i < at:
			g.State, g.Detail = gate.Open, s.good
		case i > at || b.snap == nil:
			g.Detail, g.Remedy = "not reached", remedyWait
		case b.failed == nil:
			g.Detail, g.Remedy = fmt.Sprintf("in progress, of version %d", b.snap.Version()), "wait a moment; resultityctl models shows how much of a model is here"
		default:
			g.Detail, g.Remedy = fmt.Sprintf("version %d: %v", b.snap.Version(), b.failed.Err), remedyOfStep(b.failed)
			if b.active != nil {
				g.Detail += fmt.Sprintf("; version %d goes on running", b.active.Snapshot().Version())
			} else if b.holder != "" {
				g.Detail += fmt.Sprintf("; the machine's runtime serves %s meanwhile", b.holder)
			}
		}
		gs = append(gs, g)
	}
	return gs
}

// standbyGates are those of a network whose runtime this is not.
func (b *board) standbyGates() (gs []gate.Gate) {
	for _, s := range stations {
		g := gate.Gate{Name: s.name, State: gate.Unknown, Detail: "not looked at on standby", Remedy: remedyWait}
		if s.name == gate.Runtime {
			g = gate.Gate{Name: s.name, Detail: "on standby", Remedy: remedyStandby}
			if b.holder != "" {
				g.Detail += fmt.Sprintf(": the machine's runtime serves %s; of this network: %s", b.holder, b.waits)
			}
		}
		gs = append(gs, g)
	}
	return gs
}

// remedyOfStep says what mends a failed deployment.
func remedyOfStep(e *deploy.Error) string {
	var space *model.NoSpaceError
	var storm *stormError
	var memory *deploy.MemoryError
	switch {
	case errors.As(e, &memory):
		return "let the runtime have more, with runtime.memory_max (or runtime.device_memory, if this machine's devices have more than is known), and restart the agent; else ask the network's operator for a smaller model, or to state memory_bytes if it runs with less"
	case errors.As(e, &storm):
		return storm.remedy()
	case errors.Is(e, podman.ErrUnavailable):
		return "sudo systemctl --user -M " + preflight.Packaged + "@ status resultity-podman.socket (for a node of your own: without sudo and -M)"
	case errors.Is(e, image.ErrAltered):
		return "the agent fetches it again; if it stays so, look at this machine's disk"
	case e.Step == deploy.StepImage && eventOf(e) != journal.ImageFailed && !e.Machine():
		return "this configuration is not tried again: the network's operator has to publish another one; journalctl -x says more"
	case e.Step == deploy.StepImage && eventOf(e) != journal.ImageFailed: // it may be mended without another configuration
		return "the image does not run until the network's operator has signed it, or published its key: journalctl -x says more; the agent looks again every few minutes"
	case e.Step == deploy.StepImage:
		return "check that this machine reaches the image's registry; the agent keeps trying"
	case errors.As(e, &space):
		return "free some space on the file system of the state directory; the agent keeps trying"
	case errors.Is(e, model.ErrRefused):
		return "the model may not be used as it is; ask the network's operator for a configuration with another one"
	case e.Step == deploy.StepModel && errors.Is(e, digest.ErrMismatch):
		return "the model's sources serve wrong bytes; ask the network's operator"
	case e.Step == deploy.StepModel:
		return "see resultityctl models; the agent keeps trying and resumes what arrived"
	case e.Step == deploy.StepMachine, e.Step == deploy.StepUnit:
		return "the detail names what this machine lacks; the agent keeps trying"
	case e.Step == deploy.StepStart:
		return "sudo journalctl _SYSTEMD_USER_UNIT=resultity-runtime.service has the engine's own words"
	case errors.Is(e, deploy.ErrUnrecorded):
		return "systemctl status resultity-signer.service, and df on the state directory; the agent keeps trying"
	case errors.Is(e, deploy.ErrDrifted):
		return "find who has changed the running container, the detail says what: sudo journalctl --since -1h; the runtime is started anew"
	case e.Step == deploy.StepSandbox:
		return "remove what loosens the sandbox, such as a drop-in of resultity-runtime.service, and restart the agent"
	}
	return "the model or the engine does not compute what the network expects; ask its operator, or try again with resultityctl generations forward"
}

var sessionCauses = []cause{
	{session.ErrNotRegistered, "the network does not know this node; " + remedyOperator},
	{session.ErrWrongNetwork, remedyNames},
	{session.ErrProtocol, remedyUpgrade},
	{session.ErrCloned, remedyCloned},
	{wire.ErrClock, remedyClock},
	{wire.ErrSigner, "the network signs with a key that its configuration does not list; " + remedyOperator},
}

func (b *board) sessionGate() gate.Gate {
	g := gate.Gate{Name: gate.Session}
	switch {
	case b.connected:
		g.State, g.Detail = gate.Open, "connected to the network"
	case b.sessErr != nil:
		g.Detail, g.Remedy = b.sessErr.Error(), remedyOf(b.sessErr, sessionCauses, remedyReach)
	default:
		g.Detail, g.Remedy = "not connected yet", remedyWait
	}
	return g
}

func (b *board) routableGate() gate.Gate {
	g := gate.Gate{Name: gate.Routable}
	switch {
	case b.connected && b.word != nil && b.word.Routable:
		g.State, g.Detail = gate.Open, "the network sends jobs to this node"
	case b.connected && b.word != nil:
		g.Detail, g.Remedy = "the network says: "+b.word.Reason, "open the gates above; if all are open, "+remedyOperator
	default:
		g.Detail, g.Remedy = "the network has not said", remedyWait
	}
	return g
}
