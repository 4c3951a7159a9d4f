package agent

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/resultity/node/internal/control"
	"github.com/resultity/node/internal/deploy"
	"github.com/resultity/node/internal/deploy/deploytest"
	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/gate"
	"github.com/resultity/node/internal/image"
	"github.com/resultity/node/internal/model"
	"github.com/resultity/node/internal/model/fetch"
	"github.com/resultity/node/internal/podman"
	"github.com/resultity/node/internal/sandbox"
	"github.com/resultity/node/internal/session"
	"github.com/resultity/node/internal/snapshot"
	"github.com/resultity/node/internal/tuf"
	"github.com/resultity/node/internal/wire"
)

var gateNames = []string{"registration", "configuration", "machine", "image", "model", "runtime", "sandbox", "validation", "session", "accepting", "routable"}

func TestGates(t *testing.T) {
	m, n := deploytest.New(t), deploytest.NewNetwork(t)
	s, next := n.Publish(nil), n.Publish(map[string]any{"runtime.image": deploytest.Image(2)})
	d := m.Deployer()
	p, err := d.Stage(t.Context(), s)
	if err != nil {
		t.Fatal(err)
	}
	dep, err := d.Apply(t.Context(), p, func(string) {})
	if err != nil {
		t.Fatal(err)
	}
	now := time.Unix(1_000_000, 0)

	well := func() *board {
		return &board{network: "testnet", snap: s, registered: true, bound: wire.Bound{Account: "acme"}, active: dep, phase: active, connected: true, word: &wire.Status{Routable: true}}
	}
	for _, c := range []struct {
		name   string
		edit   func(*board)
		drain  bool
		closed string // the first closed gate
		detail string // in it
		remedy string // in it
	}{
		{name: "all is well", edit: func(*board) {}},
		{name: "stale", edit: func(b *board) { b.snapErr, b.refreshed = tuf.ErrUnreachable, now.Add(-90*time.Second) }},
		{name: "nothing yet", edit: func(b *board) { b.forget(nil) }, closed: "configuration", detail: "not fetched"},
		{name: "unreachable", edit: func(b *board) { b.forget(tuf.ErrUnreachable) }, closed: "configuration", detail: "reached", remedy: "network.testnet.url"},
		{name: "expired", edit: func(b *board) { b.forget(fmt.Errorf("%w %w", snapshot.ErrUntrusted, tuf.ErrExpired)) }, closed: "configuration", remedy: "timedatectl"},
		{name: "rolled back", edit: func(b *board) { b.forget(fmt.Errorf("%w %w", snapshot.ErrUntrusted, tuf.ErrRollback)) }, closed: "configuration", remedy: "older files"},
		{name: "unknown schema", edit: func(b *board) { b.forget(snapshot.ErrInvalid) }, closed: "configuration", remedy: "upgrade"},
		{name: "other network", edit: func(b *board) { b.forget(errOtherNetwork) }, closed: "configuration", remedy: "[network.testnet]"},
		{name: "full disk", edit: func(b *board) { b.forget(errBroken) }, closed: "configuration", remedy: "this machine"},
		{name: "not registered", edit: func(b *board) { b.registered = false }, closed: "registration"},
		{name: "token", edit: func(b *board) { b.registered, b.regErr = false, session.ErrToken }, closed: "registration", remedy: "network.testnet.enrolment_token"},
		{name: "token file", edit: func(b *board) { b.registered, b.regErr = false, errToken }, closed: "registration", remedy: "network.testnet.enrolment_token"},
		{name: "registration times out", edit: func(b *board) { b.registered, b.regErr = false, errBroken }, closed: "registration", remedy: "network.testnet.url"},

		{name: "image in progress", edit: func(b *board) { b.active, b.step = nil, deploy.StepImage }, closed: "image", detail: "in progress"},
		{name: "model in progress", edit: func(b *board) { b.active, b.step = nil, deploy.StepModel }, closed: "model", detail: "in progress", remedy: "resultityctl models"},
		{name: "unit in progress", edit: func(b *board) { b.active, b.step = nil, deploy.StepUnit }, closed: "runtime"},
		{name: "start in progress", edit: func(b *board) { b.active, b.step = nil, deploy.StepStart }, closed: "runtime"},
		{name: "validation in progress", edit: func(b *board) { b.active, b.step = nil, deploy.StepValidate }, closed: "validation"},
		{name: "next in progress", edit: func(b *board) { b.learn(next) }, closed: "machine", detail: "version 2"},

		{name: "not connected", edit: func(b *board) { b.connected = false }, closed: "session"},
		{name: "no way", edit: func(b *board) { b.connected, b.sessErr = false, errBroken }, closed: "session", detail: "broken", remedy: "network.testnet.url"},
		{name: "unknown node", edit: func(b *board) { b.connected, b.sessErr = false, session.ErrNotRegistered }, closed: "session", remedy: "operator"},
		{name: "wrong name", edit: func(b *board) { b.connected, b.sessErr = false, session.ErrWrongNetwork }, closed: "session", remedy: "[network.testnet]"},
		{name: "clock", edit: func(b *board) { b.connected, b.sessErr = false, wire.ErrClock }, closed: "session", remedy: "timedatectl"},
		{name: "draining", edit: func(*board) {}, drain: true, closed: "accepting", remedy: "resume"},
		{name: "no word", edit: func(b *board) { b.word = nil }, closed: "routable"},
		{name: "a word", edit: func(b *board) { b.word = &wire.Status{Reason: "too slow"} }, closed: "routable", detail: "too slow", remedy: "operator"},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := well()
			c.edit(b)
			check(t, b.gates(drains(c.drain), now), c.closed, c.detail, c.remedy)
		})
	}

	// A deployment that failed, with and without an older one that runs.
	for _, c := range []struct {
		step   deploy.Step
		err    error
		closed string
		remedy string
	}{
		{deploy.StepMachine, &deploy.MemoryError{}, "machine", "runtime.memory_max"},
		{deploy.StepMachine, podman.ErrUnavailable, "machine", "resultity-podman"},
		{deploy.StepMachine, deploy.ErrDevice, "machine", "lacks"},
		{deploy.StepImage, podman.ErrUnavailable, "image", "resultity-podman"},
		{deploy.StepImage, image.ErrUnsigned, "image", "does not run until the network's operator has signed it"},
		{deploy.StepImage, image.ErrUnsigned, "image", "looks again"},
		{deploy.StepImage, image.ErrPlatform, "image", "is not tried again"},
		{deploy.StepImage, image.ErrPull, "image", "registry"},
		{deploy.StepModel, &model.NoSpaceError{}, "model", "free some space"},
		{deploy.StepModel, digest.ErrMismatch, "model", "sources"},
		{deploy.StepModel, fetch.ErrStalled, "model", "resumes"},
		{deploy.StepUnit, errBroken, "runtime", "lacks"},
		{deploy.StepStart, errBroken, "runtime", "journalctl"},
		{deploy.StepSandbox, sandbox.ErrNotSealed, "sandbox", "drop-in"},
		{deploy.StepValidate, errBroken, "validation", "compute"},
	} {
		for _, older := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s fails, older %v: %.20v", c.step, older, c.err), func(t *testing.T) {
				b := well()
				if !older {
					b.setActive(nil, stopped)
				}
				b.learn(next)
				b.word = &wire.Status{Reason: "it is on another configuration"}
				if !b.fail(next, &deploy.Error{Step: c.step, Err: c.err}) || b.fail(next, &deploy.Error{Step: c.step, Err: c.err}) {
					t.Error("news twice, or not once")
				}
				gs := b.gates(nil, now)
				check(t, gs, c.closed, c.err.Error(), c.remedy)
				at := slices.Index(gateNames, c.closed)
				if got := strings.Contains(gs[at].Detail, "version 1 goes on running"); got != older {
					t.Errorf("%q: does it say what runs?", gs[at].Detail)
				}
				if got := strings.Contains(gs[1].Detail, "version 1 runs"); got != older {
					t.Errorf("%q: does it say what runs?", gs[1].Detail)
				}
				// A new try shows the failure until it is past that step.
				b.advance(next, deploy.StepMachine)
				if g := b.gates(nil, now)[at]; g.State != gate.Closed || !strings.Contains(g.Detail, c.err.Error()) {
					t.Errorf("at the next try: %+v", g)
				}
			})
		}
	}
}

// forget makes a board of a first start, which has met err.
func (b *board) forget(err error) {
	b.snap, b.snapErr, b.registered, b.active, b.phase, b.connected, b.word = nil, err, false, nil, stopped, false, nil
}

func check(t *testing.T, gs []gate.Gate, closed, detail, remedy string) {
	t.Helper()
	first := ""
	for i, g := range gs {
		if i >= len(gateNames) || g.Name != gateNames[i] {
			t.Fatalf("gate %d is %s", i, g.Name)
		}
		if g.Detail == "" || (g.State == gate.Closed) != (g.Remedy != "") {
			t.Errorf("%+v: want a detail, and a remedy when it is closed", g)
		}
		if g.State == gate.Closed && first == "" {
			first = g.Name
			if !strings.Contains(g.Detail, detail) || !strings.Contains(g.Remedy, remedy) {
				t.Errorf("%+v: want %q with the remedy %q", g, detail, remedy)
			}
		}
	}
	if first != closed {
		t.Errorf("%q is closed, want %q", first, closed)
	}
}

func TestStaleSaysSinceWhen(t *testing.T) {
	b := board{snap: deploytest.NewNetwork(t).Publish(nil), snapErr: tuf.ErrUnreachable}
	now := time.Unix(1_000_000, 0)
	for at, want := range map[time.Time]string{{}: "before this start", now.Add(-90 * time.Second): "1m30s ago"} {
		b.refreshed = at
		if g := b.configurationGate(now); g.State != gate.Open || !strings.Contains(g.Detail, want) {
			t.Errorf("%+v, want %q", g, want)
		}
	}
}

// Machine gates come before the agent's, one look serves several callers, and a
// gate that stays closed keeps the time at which that was first seen.
func TestSinceWhenAGateIsClosed(t *testing.T) {
	bubble(t, func(t *testing.T, f *fixture, n *deploytest.Network) {
		f.tuf.serve(n.Publish(nil), nil)
		looks, closed := 0, true
		f.surround(func() []gate.Gate {
			looks++
			g := gate.Gate{Name: gate.Linger, Detail: "off", Remedy: "on"}
			if !closed {
				g = gate.Gate{Name: gate.Linger, State: gate.Open, Detail: "on"}
			}
			return []gate.Gate{g}
		})
		defer f.run()()
		pass(untilSettled)
		first := f.Status()
		pass(time.Hour)
		st := f.Status()
		g := st.Closed()
		if g == nil || g.Name != gate.Linger || g.Since == nil || !g.Since.Equal(*first.Closed().Since) || time.Since(*g.Since) < time.Hour {
			t.Fatalf("closed: %+v", g)
		}
		before := looks
		if f.Status(); looks != before {
			t.Error("looked again within two seconds")
		}
		if i := len(st.Gates) - len(gateNames) - 1; st.Gates[0].Name != gate.Linger || st.Gates[i-1].Name != gate.Agent || st.Gates[i].Name != gate.Identity {
			t.Errorf("gates %+v", st.Gates)
		}
		closed = false
		pass(time.Minute)
		if g := f.gate(gate.Linger); g.State != gate.Open || g.Since != nil {
			t.Errorf("opened: %+v", g)
		}
	})
}

// surround replaces the machine around the agent.
func (f *fixture) surround(look func() []gate.Gate) {
	f.Agent.machine = func(context.Context) []gate.Gate { return look() }
}

func drains(operator bool) []control.Drain {
	if !operator {
		return nil
	}
	return []control.Drain{{By: byOperator}}
}
