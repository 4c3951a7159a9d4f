package agent

import (
	"context"
	"errors"
	"maps"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/resultity/node/internal/config"
	"github.com/resultity/node/internal/deploy/deploytest"
	"github.com/resultity/node/internal/gate"
	"github.com/resultity/node/internal/journal"
	"github.com/resultity/node/internal/openai"
	"github.com/resultity/node/internal/snapshot"
	"github.com/resultity/node/internal/tuf"
	"github.com/resultity/node/internal/wire"
	"github.com/resultity/node/test/oci"
)

// duo is a node in two networks, of which a has the higher priority.
type duo struct {
	*fixture
	a, b   *party
	na, nb *deploytest.Network
	dir    string
}

var mainnet, testnet = config.Network{Name: "mainnet", URL: "https://m.example", Priority: 2}, config.Network{Name: "testnet", URL: "https://t.example", Priority: 1}

// publish has a network publish a configuration; the node hears of it.
func (w *duo) publish(p *party, changes map[string]any) *snapshot.Snapshot {
	n, all := w.na, map[string]any{"network.name": p.membership.net.Name, "network.chain_id": 1}
	if p == w.b {
		n, all["network.chain_id"] = w.nb, 31337
	}
	for k, v := range changes {
		all[k] = v
	}
	s := n.Publish(all)
	p.tuf.serve(s, nil)
	poke(p.update)
	return s
}

// opened is what a session does when it begins.
func (p *party) opened() {
	select {
	case <-p.link.up:
	default:
		close(p.link.up)
	}
	p.Opened()
}

// is checks what a network is told that the runtime is, and what it serves.
func (w *duo) is(p *party, phase string, s *snapshot.Snapshot) {
	w.t.Helper()
	h := p.heartbeat()
	if h.Runtime.State != phase || (h.Slots > 0) != (phase == active) || s != nil && h.Config != s.Digest() {
		w.t.Errorf("%s is told %q with %d slots on %s, want %q\n%s", p.membership.net.Name, h.Runtime.State, h.Slots, h.Config.Short(), phase, w.book)
	}
}

// inTwo runs a test with a node in two networks, both connected. change is for
// the second one's first configuration.
func inTwo(t *testing.T, change map[string]any, test func(t *testing.T, w *duo, sa, sb *snapshot.Snapshot)) {
	t.Helper()
	w := &duo{na: deploytest.NewNetwork(t), nb: deploytest.NewNetwork(t), dir: t.TempDir()}
	m := deploytest.New(t)
	synctest.Test(t, func(t *testing.T) {
		w.fixture = buildIn(t, w.dir, m, mainnet, testnet)
		w.a, w.b = w.parties[0], w.parties[1]
		sa, sb := w.publish(w.a, nil), w.publish(w.b, change)
		stop := w.run()
		defer func() { stop() }()
		w.a.opened()
		w.b.opened()
		pass(5 * time.Second)
		w.a.drop()
		w.b.drop()
		test(t, w, sa, sb)
	})
}

// drop forgets what was sent.
func (p *party) drop() {
	for len(p.link.sent) > 0 {
		<-p.link.sent
	}
}

// result waits for a result, and drops what came before.
func (p *party) result(t *testing.T) *wire.Result {
	t.Helper()
	synctest.Wait()
	for len(p.link.sent) > 0 {
		if r, ok := (<-p.link.sent).(*wire.Result); ok {
			return r
		}
	}
	t.Fatal("no result")
	return nil
}

// Two networks whose configurations give the very same runtime share it: each has
// its own limits, receipts and store, and none hears of the other's jobs.
func TestTwoNetworksShareTheRuntime(t *testing.T) {
	inTwo(t, map[string]any{"limits.tokens": 50}, func(t *testing.T, w *duo, sa, sb *snapshot.Snapshot) {
		w.is(w.a, active, sa)
		w.is(w.b, active, sb)
		if _, starts := w.machine.Now(); starts != 1 || w.book.count(journal.RuntimeShared) != 1 {
			t.Fatalf("%d starts\n%s", starts, w.book)
		}
		ja, jb := job(sa), job(sb)
		w.a.Message(ja)
		w.b.Message(jb)
		synctest.Wait()
		<-w.engine.asked
		<-w.engine.asked
		if h := w.a.heartbeat(); h.Slots != 4 || h.Busy != 2 {
			t.Errorf("%d of %d slots are busy, want 2 of 4: one of them with the other's job", h.Busy, h.Slots)
		}
		w.engine.answer <- struct{}{}
		w.engine.answer <- struct{}{}
		for p, want := range map[*party]struct {
			job   *wire.Job
			s     *snapshot.Snapshot
			chain uint64
		}{w.a: {ja, sa, 1}, w.b: {jb, sb, 31337}} {
			r := p.result(t)
			if r.Code != "" || r.Job != want.job.ID || r.Receipt.ChainID() != want.chain || r.Receipt.Receipt().Measured.ConfigDigest != want.s.Digest() || r.Receipt.Receipt().Node != nodeKey.Address() {
				t.Errorf("%+v", r)
			}
		}
		// A job of the one is none of the other's, wherever it is offered.
		w.b.Message(job(sa))
		synctest.Wait()
		if r := last[*wire.Refuse](w.b); r == nil || r.Code != wire.CodeConfig {
			t.Errorf("%+v", r)
		}
		for _, c := range []struct {
			p     *party
			other *wire.Job
		}{{w.a, jb}, {w.b, ja}} {
			if known, err := c.p.store.Lookup(c.other.ID); err != nil || known != 0 {
				t.Errorf("%s knows a job of the other network: %v, %v", c.p.membership.net.Name, known, err)
			}
			if e := c.p.worker.Ended(); e.Done != 1 {
				t.Errorf("%s counts %+v", c.p.membership.net.Name, e)
			}
		}
		if s := w.Status(); s.Done != 2 || s.Slots != 4 || len(s.Networks) != 2 || s.Networks[0].Name != "mainnet" || s.Networks[1].Done != 1 {
			t.Errorf("%+v", s)
		}
	})
}

// last returns the newest message of a type.
func last[M wire.Message](p *party) (m M) {
	for {
		select {
		case x := <-p.link.sent:
			if y, ok := x.(M); ok {
				m = y
			}
		default:
			return m
		}
	}
}

// A network that asks for another runtime waits, and is told so; when the one
// before it in priority is left, it runs.
func TestStandby(t *testing.T) {
	other := map[string]any{"runtime.image": deploytest.Image(2)}
	inTwo(t, other, func(t *testing.T, w *duo, sa, sb *snapshot.Snapshot) {
		w.is(w.a, active, sa)
		w.is(w.b, standby, sb)
		if _, starts := w.machine.Now(); starts != 1 {
			t.Errorf("%d starts", starts)
		}
		var g gate.Gate
		for _, x := range w.Status().Gates {
			if x.Network == "testnet" && x.Name == gate.Runtime {
				g = x
			}
		}
		if g.State != gate.Closed || !strings.Contains(g.Detail, "serves mainnet") || !strings.Contains(g.Remedy, "network.testnet.priority") {
			t.Errorf("%+v", g)
		}
		w.b.Message(job(sb))
		synctest.Wait()
		if r := last[*wire.Refuse](w.b); r == nil || r.Code != wire.CodeNotReady {
			t.Errorf("%+v", r)
		}
		// Shared, and no more: what runs for the first goes on all the while.
		j := job(sa)
		w.a.Message(j)
		synctest.Wait()
		<-w.engine.asked
		sb = w.publish(w.b, map[string]any{"runtime.image": sa.Config().Runtime.Image.String()})
		pass(5 * time.Second)
		w.is(w.b, active, sb)
		sb = w.publish(w.b, other)
		pass(5 * time.Second)
		w.is(w.b, standby, sb)
		w.is(w.a, active, sa)
		w.engine.answer <- struct{}{}
		if r := w.a.result(t); r.Code != "" {
			t.Errorf("%+v", r)
		}
		if _, starts := w.machine.Now(); starts != 1 {
			t.Errorf("%d starts", starts)
		}
	})
}

// The node leaves the network of the higher priority: the other one runs, and
// nothing is left of the first but its directory.
func TestLeaveANetwork(t *testing.T) {
	dir, m, na, nb := t.TempDir(), deploytest.New(t), deploytest.NewNetwork(t), deploytest.NewNetwork(t)
	synctest.Test(t, func(t *testing.T) {
		w := &duo{na: na, nb: nb}
		w.fixture = buildIn(t, dir, m, mainnet, testnet)
		w.a, w.b = w.parties[0], w.parties[1]
		sa, sb := w.publish(w.a, nil), w.publish(w.b, map[string]any{"runtime.image": deploytest.Image(2)})
		stop := w.run()
		pass(5 * time.Second)
		w.is(w.a, active, sa)
		stop()

		w.fixture = buildIn(t, dir, m, testnet)
		w.b = w.parties[0]
		w.b.tuf.serve(sb, nil)
		stop = w.run()
		pass(5 * time.Second)
		w.is(w.b, active, sb)
		for _, g := range w.Generations().Generations {
			if g.Network != "testnet" {
				t.Errorf("a generation of %s is left", g.Network)
			}
		}
		stop()

		// It comes back, and has to show that it is there before it takes over.
		w.fixture = buildIn(t, dir, m, mainnet, testnet)
		w.a, w.b = w.parties[0], w.parties[1]
		w.a.tuf.serve(sa, nil)
		w.b.tuf.serve(sb, nil)
		defer w.run()()
		pass(5 * time.Second)
		w.is(w.b, active, sb)
		w.a.opened()
		pass(backPatience + 5*time.Second)
		w.is(w.a, active, sa)
		w.is(w.b, standby, sb)
	})
}

// Who cannot use the machine is passed over, and leads again when that is over.
func TestPassedOver(t *testing.T) {
	other := map[string]any{"runtime.image": deploytest.Image(2)}
	order := func(kind wire.OrderKind) func(*duo) {
		return func(w *duo) { w.orderOf(w.a, kind) }
	}
	for name, c := range map[string]struct {
		begin func(w *duo)
		after time.Duration
		end   func(w *duo)
		why   string
	}{
		"out of reach": {func(w *duo) { w.a.Closed(errBroken) }, awayPatience, func(w *duo) { w.a.Opened() }, "out of reach for 10m"},
		"drained":      {order(wire.OrderDrain), 0, order(wire.OrderResume), "has drained"},
		"unbound":      {func(w *duo) { w.a.Message(&wire.Bound{}) }, 0, func(w *duo) { w.a.Message(&wire.Bound{Account: "acme"}) }, "no account"},
		"dead": {func(w *duo) {
			w.machine.Fail(deploytest.Golden, &deploytest.Fault{Err: errBroken, Times: 1})
			w.publish(w.a, map[string]any{"limits.tokens": 60, "runtime.image": deploytest.Image(3)})
		}, 0, func(w *duo) { w.publish(w.a, map[string]any{"runtime.image": deploytest.Image(1)}) }, "serves testnet meanwhile"},
		"cannot be staged": {func(w *duo) {
			w.machine.Fail(deploytest.EnsureImage, &deploytest.Fault{Err: errBroken, Times: 1})
			w.publish(w.a, map[string]any{"runtime.image": deploytest.Image(3)})
		}, 0, func(w *duo) { pass(time.Minute) }, ""},
	} {
		t.Run(name, func(t *testing.T) {
			inTwo(t, other, func(t *testing.T, w *duo, sa, sb *snapshot.Snapshot) {
				c.begin(w)
				pass(time.Second)
				if c.after > 0 {
					pass(c.after - 10*time.Second)
					w.a.drop()
					w.b.drop()
					w.is(w.a, active, sa)
				}
				pass(15 * time.Second)
				if c.why != "" {
					w.is(w.b, active, sb)
					w.is(w.a, standby, nil)
					if g := gate.FirstClosed(w.a.board.gates(nil, time.Now())[2:]); g == nil || !strings.Contains(g.Detail, c.why) {
						t.Errorf("%+v does not say %q", g, c.why)
					}
				}
				c.end(w)
				w.a.drop()
				w.b.drop()
				pass(backPatience + 10*time.Second)
				w.is(w.a, active, w.a.board.snapshot())
				w.is(w.b, standby, sb)
			})
		})
	}
}

// stall has a network publish a configuration whose image is on its way until end is
// called.
func (w *duo) stall(p *party, image int, changes map[string]any) (s *snapshot.Snapshot, end func()) {
	until := make(chan struct{})
	all := map[string]any{"runtime.image": deploytest.Image(image)}
	maps.Copy(all, changes)
	ref, err := snapshot.ParseImageRef(deploytest.Image(image))
	if err != nil {
		w.t.Fatal(err)
	}
	w.machine.Fail(deploytest.ImageOf(ref), &deploytest.Fault{Block: true, Until: until})
	return w.publish(p, all), func() { close(until) }
}

// What one network's configuration needs may be on its way for ever. Until then the
// others have what they need, and after a while the machine.
func TestStalledDownload(t *testing.T) {
	t.Run("the other one gets the machine", func(t *testing.T) {
		inTwo(t, map[string]any{"runtime.image": deploytest.Image(2)}, func(t *testing.T, w *duo, sa, sb *snapshot.Snapshot) {
			_, end := w.stall(w.a, 3, nil)
			pass(fetchPatience / 2)
			newest, end2 := w.stall(w.a, 4, nil) // another one is waited for no longer
			pass(fetchPatience/2 - 10*time.Second)
			w.is(w.a, active, sa)
			w.is(w.b, standby, sb)
			pass(20 * time.Second)
			w.is(w.b, active, sb)
			w.is(w.a, standby, newest)
			// It is gone on with meanwhile, whatever the other one does.
			sb = w.publish(w.b, map[string]any{"runtime.image": deploytest.Image(5)})
			pass(10 * time.Second)
			w.is(w.b, active, sb)
			end()
			end2()
			pass(10 * time.Second)
			w.is(w.a, active, newest)
			w.is(w.b, standby, sb)
			if n := strings.Count(strings.Join(w.machine.Calls(), "\n"), "/llamacpp@"); n != 2 {
				t.Errorf("what is stalled was begun %d times, want twice: once for each configuration", n)
			}
		})
	})
	t.Run("who shares the runtime is not held up", func(t *testing.T) {
		inTwo(t, nil, func(t *testing.T, w *duo, sa, _ *snapshot.Snapshot) {
			newest, end := w.stall(w.a, 3, nil)
			pass(5 * time.Second)
			sb := w.publish(w.b, map[string]any{"limits.tokens": 60})
			pass(5 * time.Second)
			w.is(w.a, active, sa)
			w.is(w.b, active, sb)
			end()
			pass(10 * time.Second)
			w.is(w.a, active, newest)
			w.is(w.b, standby, sb)
		})
	})
}

// passOver has the second network get the machine, since the first one is away.
func (w *duo) passOver(sb *snapshot.Snapshot) {
	w.t.Helper()
	w.a.Closed(errBroken)
	pass(awayPatience + 10*time.Second)
	w.is(w.b, active, sb)
	w.a.Opened()
}

// The operator goes back to a network whose newest configuration is on its way: what
// he asked for is staged, whatever else that network would have.
func TestRollbackBesideADownload(t *testing.T) {
	inTwo(t, map[string]any{"runtime.image": deploytest.Image(2)}, func(t *testing.T, w *duo, sa, sb *snapshot.Snapshot) {
		w.passOver(sb)
		newest, end := w.stall(w.a, 3, nil)
		pass(backPatience + 5*time.Second)
		if err := w.Rollback(t.Context(), 1); err != nil {
			t.Fatal(err)
		}
		pass(5 * time.Second)
		w.a.drop()
		w.is(w.a, active, sa)
		end()
		if err := w.Forward(t.Context()); err != nil {
			t.Fatal(err)
		}
		pass(time.Minute)
		w.a.drop()
		w.is(w.a, active, newest)
	})
}

// What would lead is not fetched while the operator has gone back: nobody wants it.
func TestPinnedFetchesNothing(t *testing.T) {
	inTwo(t, map[string]any{"runtime.image": deploytest.Image(2)}, func(t *testing.T, w *duo, _, sb *snapshot.Snapshot) {
		w.passOver(sb)
		newest, end := w.stall(w.a, 3, nil)
		pass(fetchPatience + time.Minute)
		next := w.publish(w.b, map[string]any{"runtime.image": deploytest.Image(5)})
		pass(5 * time.Second)
		w.is(w.b, active, next)
		if err := w.Rollback(t.Context(), 2); err != nil {
			t.Fatal(err)
		}
		pass(5 * time.Second)
		w.b.drop()
		w.is(w.b, active, sb)
		before := w.book.count(journal.GenerationStaged)
		end()
		pass(time.Minute)
		if n := w.book.count(journal.GenerationStaged); n != before {
			t.Errorf("%d more are staged\n%s", n-before, w.book)
		}
		if err := w.Forward(t.Context()); err != nil {
			t.Fatal(err)
		}
		pass(time.Minute)
		w.a.drop()
		w.is(w.a, active, newest)
	})
}

// What one network cannot have says nothing about whose turn it is among what should
// run and what ran.
func TestAnothersFailureEndsNoDownload(t *testing.T) {
	k, err := oci.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	pem, err := k.PublicPEM()
	if err != nil {
		t.Fatal(err)
	}
	inTwo(t, map[string]any{"runtime.image": deploytest.Image(2)}, func(t *testing.T, w *duo, _, sb *snapshot.Snapshot) {
		w.passOver(sb)
		first, endA := w.stall(w.a, 3, nil)
		pass(fetchPatience + time.Minute) // it is gone on with beside what runs
		_, endB := w.stall(w.b, 5, map[string]any{"image_trust.keys": []string{string(pem)}, "image_trust.revoked": sb.Config().ImageTrust.Keys})
		pass(10 * time.Second)
		w.b.drop()
		w.is(w.b, stopped, nil) // what ran must not, and what should run is on its way
		w.machine.Fail(deploytest.EnsureModel, &deploytest.Fault{Err: errBroken, Times: 1})
		endA()
		pass(time.Minute)
		if n := strings.Count(strings.Join(w.machine.Calls(), "\n"), deploytest.Image(5)); n != 1 {
			t.Errorf("what should run was begun %d times, want once\n%s", n, w.book)
		}
		// It is tried again, as long as nothing runs, too.
		w.a.drop()
		w.is(w.a, active, first)
		endB()
	})
}

// orderOf has a network give an order, and returns the answer.
func (w *duo) orderOf(p *party, kind wire.OrderKind) *wire.OrderDone {
	w.t.Helper()
	now := time.Now()
	o, err := wire.SealOrder(networkKey, &wire.Directive{
		ID: wire.NewOrderID(), Network: p.membership.net.Name, Node: nodeKey.Address(), Kind: kind, Reason: "for the test",
		Until: now.Add(time.Hour).UnixMilli(), Issued: now.UnixMilli(), Expires: now.Add(time.Hour).UnixMilli(),
	})
	if err != nil {
		w.t.Fatal(err)
	}
	p.Message(o)
	synctest.Wait()
	return last[*wire.OrderDone](p)
}

// An order is about its network's own part: it takes the machine from no other.
func TestOrdersOfOneNetwork(t *testing.T) {
	inTwo(t, nil, func(t *testing.T, w *duo, sa, sb *snapshot.Snapshot) {
		_, before := w.machine.Now()
		d := w.orderOf(w.b, wire.OrderRestart)
		if d == nil || d.Outcome != wire.OutcomeFailed || !strings.Contains(d.Message, "another network") {
			t.Fatalf("%+v", d)
		}
		t.Logf("a restart of another network's runtime: expected: %s; got: %s, %s", wire.OutcomeFailed, d.Outcome, d.Message)
		w.machine.Calls()
		if d := w.orderOf(w.b, wire.OrderRevalidate); d == nil || d.Outcome != wire.OutcomeOK || deploytest.Count(w.machine.Calls(), deploytest.Golden) == 0 {
			t.Errorf("%+v", d)
		}
		w.is(w.a, active, sa)
		w.is(w.b, active, sb)
		w.orderOf(w.b, wire.OrderDrain)
		t.Logf("a drain: expected: of the network that ordered it; got: of it %t, of the other %t", w.b.worker.Status().Draining, w.a.worker.Status().Draining)
		if !w.b.worker.Status().Draining || w.a.worker.Status().Draining {
			t.Error("one network drains another")
		}
		w.orderOf(w.b, wire.OrderResume)
		if _, now := w.machine.Now(); now != before {
			t.Errorf("%d starts", now-before)
		}
		if d := w.orderOf(w.a, wire.OrderRestart); d == nil || d.Outcome != wire.OutcomeOK {
			t.Errorf("%+v", d)
		}
		pass(5 * time.Second)
		if _, now := w.machine.Now(); now != before+1 {
			t.Errorf("%d starts", now-before)
		}
		w.is(w.b, active, sb)

		// The one that leads ends its part: the other goes on, with the same runtime.
		if d := w.orderOf(w.a, wire.OrderShutdown); d == nil || d.Outcome != wire.OutcomeOK || len(w.a.halt) != 1 {
			t.Errorf("%+v", d)
		}
		pass(5 * time.Second)
		w.is(w.b, active, sb)
		if _, now := w.machine.Now(); now != before+1 || w.a.heartbeat().Slots != 0 {
			t.Errorf("%d starts, %d slots for the one that has left\n%s", now-before, w.a.heartbeat().Slots, w.book)
		}
		w.b.Message(job(sb))
		synctest.Wait()
		<-w.engine.asked
		w.engine.answer <- struct{}{}
		if r := w.b.result(t); r.Code != "" {
			t.Errorf("%+v", r)
		}
	})
}

// Answers that are wrong only beside another network's jobs condemn nothing: the
// network keeps its part, or gets it once the engine has a moment for it.
func TestWrongBesideTheOthersJobs(t *testing.T) {
	inTwo(t, nil, func(t *testing.T, w *duo, _, sb *snapshot.Snapshot) {
		sa := w.publish(w.a, map[string]any{"limits.deadline_s": 7200})
		pass(5 * time.Second)
		var company atomic.Bool
		w.machine.Fail(deploytest.Golden, &deploytest.Fault{Err: errBroken, When: func(*deploytest.Locked) bool { return company.Load() }})
		ask := func() {
			j := job(sa)
			j.Deadline = time.Now().Add(2 * time.Hour).UnixMilli()
			w.a.Message(j)
			synctest.Wait()
			<-w.engine.asked
			company.Store(true)
		}
		answer := func() {
			company.Store(false)
			w.engine.answer <- struct{}{}
			if r := w.a.result(t); r.Code != "" {
				t.Errorf("%+v", r)
			}
		}
		bad := func() (n uint64) {
			for _, c := range w.b.board.validationCounts() {
				n += c.bad
			}
			return n
		}
		ask()
		w.orderOf(w.b, wire.OrderRevalidate)
		pass(quietPatience + slotPatience + time.Second)
		if d := last[*wire.OrderDone](w.b); d == nil || d.Outcome != wire.OutcomeFailed || !strings.Contains(d.Message, "never idle") {
			t.Errorf("%+v", d)
		}
		w.is(w.b, active, sb)
		answer()
		if d := w.orderOf(w.b, wire.OrderRevalidate); d == nil || d.Outcome != wire.OutcomeOK {
			t.Errorf("%+v", d)
		}
		// On schedule, too.
		ask()
		w.b.board.set(func(b *board) { b.validated.next = time.Now() })
		poke(w.b.recheck)
		pass(quietPatience + time.Second)
		w.is(w.b, active, sb)
		if w.book.count(journal.ValidationDoubted) != 1 || w.book.count(journal.NotValidated) != 1 || strings.Count(w.book.String(), " code=undecided ") != 2 || bad() != 0 {
			t.Errorf("%+v\n%s", w.b.board.validationCounts(), w.book)
		}
		// A new configuration waits, and says for what.
		sb = w.publish(w.b, map[string]any{"limits.tokens": 50})
		pass(time.Minute)
		w.is(w.b, standby, nil)
		var g gate.Gate
		for _, x := range w.Status().Gates {
			if x.Network == "testnet" && x.Name == gate.Runtime {
				g = x
			}
		}
		if !strings.Contains(g.Detail, "never idle") || bad() != 0 || w.b.heartbeat().Failed != nil {
			t.Errorf("%+v\n%s", g, w.book)
		}
		answer()
		pass(10 * time.Minute)
		w.b.drop()
		w.is(w.b, active, sb)
		w.is(w.a, active, sa)

		// What is wrong alone is wrong.
		w.machine.Fail(deploytest.Golden, &deploytest.Fault{Err: errBroken, Times: 2})
		if d := w.orderOf(w.b, wire.OrderRevalidate); d == nil || d.Outcome != wire.OutcomeFailed || !strings.Contains(d.Message, errBroken.Error()) {
			t.Errorf("%+v", d)
		}
		pass(time.Second)
		w.is(w.b, failed, nil)
		w.is(w.a, active, sa)
		if _, starts := w.machine.Now(); starts != 1 || bad() == 0 {
			t.Errorf("%d starts", starts)
		}
	})
}

// Golden requests of one network that take their time hold up nothing of the other's,
// and what they find out is of no use when the runtime is another one by then.
func TestSlowValidationHoldsUpNobody(t *testing.T) {
	inTwo(t, nil, func(t *testing.T, w *duo, sa, sb *snapshot.Snapshot) {
		var asked atomic.Int32
		slow := func() {
			asked.Store(0)
			w.machine.Fail(deploytest.Golden, &deploytest.Fault{Block: true, When: func(*deploytest.Locked) bool { return asked.Add(1) == 1 }})
		}
		slow()
		newer := w.publish(w.b, map[string]any{"limits.tokens": 50})
		pass(time.Second)
		if asked.Load() != 1 {
			t.Fatalf("%d golden requests", asked.Load())
		}
		w.is(w.b, active, sb) // on its old one
		w.is(w.a, active, sa)
		sb = newer
		// The network that leads can have its runtime restarted, and another one run.
		_, starts := w.machine.Now()
		if d := w.orderOf(w.a, wire.OrderRestart); d == nil || d.Outcome != wire.OutcomeOK {
			t.Fatalf("%+v\n%s", d, w.book)
		}
		pass(time.Second)
		if _, now := w.machine.Now(); now != starts+1 {
			t.Errorf("%d starts after %d", now, starts)
		}
		w.is(w.a, active, sa)
		w.is(w.b, active, sb) // it was asked anew on what runs now
		if n := w.b.board.validationCounts()[byInstallation]; n.bad != 0 {
			t.Errorf("what was cut short is held against it: %+v", n)
		}
		slow()
		sb = w.publish(w.b, map[string]any{"limits.tokens": 51})
		pass(time.Second)
		sa = w.publish(w.a, map[string]any{"limits.tokens": 52})
		pass(5 * time.Second)
		w.a.drop()
		w.b.drop()
		w.is(w.a, active, sa)
		w.is(w.b, active, sb)
		// A newer configuration of its own takes the place of the one that is slow.
		slow()
		w.publish(w.b, map[string]any{"limits.tokens": 53})
		pass(time.Second)
		sb = w.publish(w.b, map[string]any{"limits.tokens": 54})
		pass(5 * time.Second)
		w.b.drop()
		w.is(w.b, active, sb)
		// So does one that asks for another runtime, and the slot is free at once.
		slow()
		w.publish(w.b, map[string]any{"limits.tokens": 55})
		pass(time.Second)
		w.publish(w.b, map[string]any{"runtime.image": deploytest.Image(5)})
		pass(time.Second)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		release, err := w.slots.HoldAll(ctx, 1)
		if cancel(); err != nil {
			t.Fatalf("a validation that nobody wants goes on: %v", err)
		}
		release()
		w.b.drop()
		w.is(w.b, standby, nil)
		// Nor does it keep the agent from ending.
		slow()
		w.publish(w.b, map[string]any{"limits.tokens": 56, "runtime.image": sa.Config().Runtime.Image.String()})
		pass(5 * time.Second)
		if asked.Load() != 1 {
			t.Errorf("%d golden requests", asked.Load())
		}
	})
}

// A network that uses up its part of the machine's time for validations waits, and the
// other one's jobs go on.
func TestValidationsStarveNobody(t *testing.T) {
	inTwo(t, nil, func(t *testing.T, w *duo, sa, sb *snapshot.Snapshot) {
		w.b.board.set(func(b *board) { b.validated.allowance.spend(10*time.Minute, time.Now()) })
		if d := w.orderOf(w.b, wire.OrderRevalidate); d == nil || d.Outcome != wire.OutcomeFailed || !strings.Contains(d.Message, "a tenth") {
			t.Errorf("%+v", d)
		}
		w.machine.Calls()
		for i := range 6 { // nor does it get more by another configuration each time
			sb = w.publish(w.b, map[string]any{"limits.tokens": 50 + i})
			pass(10 * time.Minute)
			w.a.drop()
			w.b.drop()
		}
		w.is(w.b, standby, nil)
		if n := deploytest.Count(w.machine.Calls(), deploytest.Golden); n != 0 || w.book.count(journal.NotValidated) == 0 || strings.Count(w.book.String(), " code=too_soon ") < 2 {
			t.Errorf("%d golden requests\n%s", n, w.book)
		}
		w.is(w.a, active, sa)
		pass(40 * time.Minute)
		w.a.drop()
		w.b.drop()
		w.is(w.b, active, sb)
	})
}

// A network whose jobs fail one after the other on a shared engine loses its part
// for a while; the engine is not taken from the other.
func TestSuspectForOneNetwork(t *testing.T) {
	inTwo(t, nil, func(t *testing.T, w *duo, sa, sb *snapshot.Snapshot) {
		_, before := w.machine.Now()
		w.fails(&openai.OutputError{Reason: openai.ReasonJSON})
		for range 3 {
			w.b.Message(job(sb))
			synctest.Wait()
		}
		w.fails(nil)
		pass(time.Second)
		w.is(w.b, failed, sb)
		w.is(w.a, active, sa)
		if _, now := w.machine.Now(); now != before || w.book.count(journal.RuntimeSuspect) != 1 {
			t.Errorf("%d starts\n%s", now-before, w.book)
		}
		pass(5 * time.Minute)
		w.b.drop()
		w.is(w.b, active, sb)
	})
}

// A network that is away, lies, or serves another's configuration disturbs none.
func TestOneNetworkFails(t *testing.T) {
	for name, fail := range map[string]func(w *duo){
		"unreachable": func(w *duo) { w.b.tuf.serve(nil, tuf.ErrUnreachable) },
		"lying":       func(w *duo) { w.b.tuf.serve(nil, snapshot.ErrUntrusted) },
		"another's":   func(w *duo) { w.b.tuf.serve(w.a.board.snapshot(), nil) },
	} {
		t.Run(name, func(t *testing.T) {
			inTwo(t, nil, func(t *testing.T, w *duo, sa, sb *snapshot.Snapshot) {
				fail(w)
				w.b.Message(&wire.Update{})
				w.b.Closed(errBroken)
				for range 6 {
					pass(10 * time.Minute)
					w.a.drop()
					w.b.drop()
				}
				w.is(w.a, active, sa)
				w.is(w.b, active, sb) // it goes on with what it had
				if _, starts := w.machine.Now(); starts != 1 {
					t.Errorf("%d starts", starts)
				}
			})
		})
	}
}

// A machine that has run nothing yet does not wait for a network of higher
// priority that has no answer.
func TestFirstStartWithoutTheFirst(t *testing.T) {
	dir, m, na, nb := t.TempDir(), deploytest.New(t), deploytest.NewNetwork(t), deploytest.NewNetwork(t)
	synctest.Test(t, func(t *testing.T) {
		w := &duo{na: na, nb: nb}
		w.fixture = buildIn(t, dir, m, mainnet, testnet)
		w.a, w.b = w.parties[0], w.parties[1]
		sb := w.publish(w.b, nil)
		w.a.tuf.serve(nil, errors.New("slow"))
		defer w.run()()
		pass(5 * time.Second)
		w.is(w.b, active, sb)
	})
}

// One that does not even refuse is waited for, and not for ever.
func TestFirstStartBesideASilentOne(t *testing.T) {
	dir, m, na, nb := t.TempDir(), deploytest.New(t), deploytest.NewNetwork(t), deploytest.NewNetwork(t)
	synctest.Test(t, func(t *testing.T) {
		w := &duo{na: na, nb: nb}
		w.fixture = buildIn(t, dir, m, mainnet, testnet)
		w.a, w.b = w.parties[0], w.parties[1]
		sb := w.publish(w.b, nil)
		w.a.tuf.hangs = true
		defer w.run()()
		pass(firstPatience - time.Second)
		if state := w.b.heartbeat().Runtime.State; state == active {
			t.Error("the first network was not waited for")
		}
		pass(6 * time.Second)
		w.is(w.b, active, sb)
	})
}

// A network whose part cannot be opened is left out, and said to be.
func TestOneNetworkCannotBeJoined(t *testing.T) {
	i := install(t)
	i.write("agent.toml.d/main.toml", "[network.mainnet]\npriority = 1\nurl = \"https://127.0.0.1:2\"\nroot = \"/nowhere\"\n")
	code, _, said := i.main(t.Context(), "run")
	if code != ExitFailed || !strings.Contains(said, "network.mainnet.root") || !strings.Contains(said, "the others go on") {
		t.Errorf("%d, %s", code, said) // it ends later, since there is no user manager
	}
}
