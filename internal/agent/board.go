package agent

import (
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/resultity/node/internal/control"
	"github.com/resultity/node/internal/deploy"
	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/session"
	"github.com/resultity/node/internal/snapshot"
	"github.com/resultity/node/internal/tuf"
	"github.com/resultity/node/internal/wire"
)

// board is what the loops tell each other and the operator. Each value is
// written by one loop and read by all.
type board struct {
	mu sync.Mutex // guards everything below; held only to copy values

	// Written by the update loop.
	snap       *snapshot.Snapshot // newest verified
	snapErr    error              // why it could not be refreshed
	refreshed  time.Time          // when the network last confirmed it
	account    string             // "" until registered
	registered bool
	regErr     error
	failed     *deploy.Error // why the deployment is not up
	active     *deploy.Deployment
	phase      string // of the runtime, in the words of wire.RuntimeState
	restarts   int
	models     map[digest.Digest]int64 // verified bytes, by model

	// Written by the session.
	connected bool
	sessErr   error
	word      *wire.Status // the network's own word
}

func (b *board) set(f func(*board)) {
	b.mu.Lock()
	defer b.mu.Unlock()
	f(b)
}

// snapshot returns the newest verified snapshot, or nil.
func (b *board) snapshot() *snapshot.Snapshot {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.snap
}

// served returns the digest of the configuration whose deployment is active, or
// else of the newest: what is served counts, not what is being prepared.
func (b *board) served() digest.Digest {
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
		done, state := b.models[m.Digest()], "pending"
		switch {
		case b.active != nil && b.active.Model() == m.Digest():
			done, state = m.Size(), "active"
		case done == m.Size():
			state = "inactive"
		case b.failed != nil && b.failed.Step == deploy.StepModel:
			state = "failed"
		}
		ms = append(ms, control.Model{
			ModelState: wire.ModelState{Name: m.Name, Version: m.Version, Digest: m.Digest(), State: state},
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

// gates walks from identity to jobs.
func (b *board) gates(node string, draining bool, now time.Time) []control.Gate {
	b.mu.Lock()
	defer b.mu.Unlock()
	gs := []control.Gate{{Name: "identity", Open: true, Detail: "node " + node}}
	add := func(name string, open bool, detail, remedy string) {
		if open {
			remedy = ""
		}
		gs = append(gs, control.Gate{Name: name, Open: open, Detail: detail, Remedy: remedy})
	}
	b.configurationGate(add, now)
	switch {
	case b.registered:
		add("registration", true, "known to the network as a node of "+b.account, "")
	case b.regErr != nil:
		add("registration", false, b.regErr.Error(), "put a valid token into the file that network.enrolment_token names, then restart the agent")
	default:
		add("registration", false, "not registered yet", "it follows the first configuration")
	}
	b.runtimeGates(add)
	switch {
	case b.connected:
		add("session", true, "connected to the network", "")
	case errors.Is(b.sessErr, session.ErrNotRegistered):
		add("session", false, b.sessErr.Error(), "the network does not know this node; ask its operator")
	case b.sessErr != nil:
		add("session", false, b.sessErr.Error(), "check that this machine reaches network.url; the agent keeps trying")
	default:
		add("session", false, "not connected yet", "it follows the registration")
	}
	add("accepting", !draining, map[bool]string{true: "draining: takes no new jobs", false: "takes jobs"}[draining], "resultityctl resume")
	switch {
	case b.connected && b.word != nil && b.word.Routable:
		add("routable", true, "the network sends jobs to this node", "")
	case b.connected && b.word != nil:
		add("routable", false, "the network says: "+b.word.Reason, "open the gates above; if all are open, ask the network's operator")
	default:
		add("routable", false, "the network has not said", "it follows the session")
	}
	return gs
}

type adder = func(name string, open bool, detail, remedy string)

func (b *board) configurationGate(add adder, now time.Time) {
	switch {
	case b.snap == nil && b.snapErr == nil:
		add("configuration", false, "not fetched yet", "wait a moment")
	case b.snap == nil && errors.Is(b.snapErr, tuf.ErrUnreachable):
		add("configuration", false, b.snapErr.Error(), "check that this machine reaches network.url, and network.ca for a private network")
	case b.snap == nil:
		add("configuration", false, b.snapErr.Error(), "check network.root and this machine's clock, then ask the network's operator")
	case b.snapErr != nil:
		// Going on with the last verified one is right, so the gate is open; but
		// it says so.
		add("configuration", true, fmt.Sprintf("version %d, last confirmed %s ago: %v", b.snap.Version(), age(now, b.refreshed), b.snapErr), "")
	default:
		add("configuration", true, fmt.Sprintf("version %d, verified", b.snap.Version()), "")
	}
}

func age(now, then time.Time) string {
	if then.IsZero() {
		return "before this start"
	}
	return now.Sub(then).Round(time.Second).String()
}

// runtimeGates are image, model, runtime and validation: those before the
// failed step are open, those after it closed.
func (b *board) runtimeGates(add adder) {
	steps := []struct {
		name, good, remedy string
		steps              []deploy.Step
	}{
		{"image", "signature verified twice, stored", "the network's operator has to sign the image; journalctl -x has the reason", []deploy.Step{deploy.StepImage}},
		{"model", "complete and verified", "see resultityctl models; the agent keeps trying and resumes what arrived", []deploy.Step{deploy.StepModel}},
		{"runtime", "runs in its sandbox", "journalctl _SYSTEMD_USER_UNIT=resultity-runtime.service has the engine's own words", []deploy.Step{deploy.StepUnit, deploy.StepStart, deploy.StepSandbox}},
		{"validation", "gave the expected answers", "the model or the engine does not compute what the network expects; ask its operator", []deploy.Step{deploy.StepValidate}},
	}
	blocked := false
	for _, s := range steps {
		bad := false
		if b.failed != nil && b.active == nil {
			for _, step := range s.steps {
				bad = bad || b.failed.Step == step
			}
		}
		switch {
		case b.active != nil:
			add(s.name, true, s.good, "")
		case bad:
			add(s.name, false, b.failed.Error(), s.remedy)
			blocked = true
		case b.failed != nil && !blocked:
			add(s.name, true, s.good, "")
		default:
			add(s.name, false, "in progress ("+b.phase+")", "wait a moment")
			blocked = true
		}
	}
}
