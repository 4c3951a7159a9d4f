package agent

import (
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/resultity/node/internal/deploy/deploytest"
	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/evm"
	"github.com/resultity/node/internal/gate"
	"github.com/resultity/node/internal/journal"
	"github.com/resultity/node/internal/order"
	"github.com/resultity/node/internal/wire"
)

// networkKey is the message key of the configurations that tests publish.
var networkKey = func() *evm.Key {
	k, err := evm.ParseKey(strings.Repeat("0", 63) + "1")
	if err != nil {
		panic(err)
	}
	return k
}()

func (f *fixture) order(key *evm.Key, kind wire.OrderKind) *wire.Order {
	f.t.Helper()
	now := time.Now()
	o, err := wire.SealOrder(key, &wire.Directive{
		ID: wire.NewOrderID(), Network: "testnet", Node: nodeKey.Address(), Kind: kind, Reason: "for the test",
		Until: now.Add(time.Hour).UnixMilli(), Issued: now.UnixMilli(), Expires: now.Add(time.Hour).UnixMilli(),
	})
	if err != nil {
		f.t.Fatal(err)
	}
	return o
}

// obey gives an order and returns what is answered once nothing moves any more.
func (f *fixture) obey(o *wire.Order) *wire.OrderDone {
	f.t.Helper()
	f.Message(o)
	synctest.Wait()
	for {
		select {
		case m := <-f.link.sent:
			if d, ok := m.(*wire.OrderDone); ok && d.ID == o.ID {
				if err := d.Check(); err != nil {
					f.t.Error(err)
				}
				return d
			}
		default:
			return nil
		}
	}
}

func (f *fixture) mustObey(kind wire.OrderKind) {
	f.t.Helper()
	if d := f.obey(f.order(networkKey, kind)); d == nil || d.Outcome != wire.OutcomeOK {
		f.t.Fatalf("%s: %+v\n%s", kind, d, f.book)
	}
}

// failedFor checks that the journal says in one word why an order has failed.
func (f *fixture) failedFor(code string) {
	f.t.Helper()
	if !strings.Contains(f.book.String(), "event=order-failed") || !strings.Contains(f.book.String(), " code="+code+" ") {
		f.t.Errorf("no order has failed for %s:\n%s", code, f.book)
	}
}

// serving is a bubble with an agent that serves.
func serving(t *testing.T, test func(t *testing.T, f *fixture)) {
	t.Helper()
	bubble(t, func(t *testing.T, f *fixture, n *deploytest.Network) {
		s := n.Publish(nil)
		f.tuf.serve(s, nil)
		close(f.link.up)
		defer f.run()()
		pass(time.Second)
		f.serves(s)
		test(t, f)
	})
}

func TestOrdersDrain(t *testing.T) {
	serving(t, func(t *testing.T, f *fixture) {
		draining := func() bool { return f.worker.Status().Draining }
		f.mustObey(wire.OrderDrain)
		g := f.gate("accepting")
		if !draining() || g.State == gate.Open || !strings.Contains(g.Detail, "by the network (for the test)") {
			t.Fatalf("%+v", g)
		}
		if f.Resume(); !draining() {
			t.Error("the operator took back the network's drain")
		}
		f.Drain()
		if g := f.gate("accepting"); !strings.Contains(g.Detail, "by the operator since") || !strings.Contains(g.Detail, "and by the network") {
			t.Errorf("%+v", g)
		}
		f.mustObey(wire.OrderResume)
		if g := f.gate("accepting"); !draining() || strings.Contains(g.Detail, "network") || g.Remedy != "resultityctl resume" {
			t.Errorf("%+v", g)
		}
		if f.Resume(); draining() {
			t.Error("nobody drains, and no jobs are taken")
		}
		if f.book.count(journal.OrderDrain) != 1 || f.book.count(journal.OrderResume) != 1 || f.book.count(journal.OrderDone) != 2 {
			t.Errorf("not journalled:\n%s", f.book)
		}
		if o := f.Status().Networks[0].Orders; len(o) != 2 || o[0].Kind != "drain" || o[0].Outcome != wire.OutcomeOK || o[0].Told {
			t.Errorf("status %+v", o)
		}
	})
}

// What a restart must not forget: the drain, and what the network has not heard.
func TestOrdersSurviveARestart(t *testing.T) {
	n, dir, m := deploytest.NewNetwork(t), t.TempDir(), deploytest.New(t)
	synctest.Test(t, func(t *testing.T) {
		f := build(t, dir, m)
		s := n.Publish(nil)
		f.tuf.serve(s, nil)
		close(f.link.up)
		stop := f.run()
		pass(time.Second)
		o := f.order(networkKey, wire.OrderDrain)
		if d := f.obey(o); d == nil || d.Outcome != wire.OutcomeOK {
			t.Fatalf("%+v", d)
		}
		stop()

		f = build(t, dir, m)
		f.tuf.serve(s, nil)
		close(f.link.up)
		defer f.run()()
		pass(time.Second)
		if !f.worker.Status().Draining {
			t.Error("the network's drain was forgotten")
		}
		f.Opened()
		synctest.Wait()
		if d := last[*wire.OrderDone](f.party); d == nil || d.ID != o.ID {
			t.Errorf("the outcome was not told again: %+v", d)
		}
		if d := f.obey(o); d == nil || d.Outcome != wire.OutcomeOK || f.book.count(journal.OrderDrain) != 0 {
			t.Errorf("replayed: %+v\n%s", d, f.book)
		}
		f.Message(&wire.OrderAck{ID: o.ID})
		synctest.Wait()
		f.Opened()
		synctest.Wait()
		if d := last[*wire.OrderDone](f.party); d != nil {
			t.Errorf("told after the acknowledgement: %+v", d)
		}
	})
}

func TestOrdersRefused(t *testing.T) {
	serving(t, func(t *testing.T, f *fixture) {
		for what, o := range map[string]*wire.Order{"of another key": f.order(newKey(), wire.OrderDrain), "of no known kind": f.order(networkKey, "dance"), "unsigned": {ID: wire.NewOrderID()}} {
			d := f.obey(o)
			if d == nil || d.Outcome != wire.OutcomeRefused || d.Message == "" {
				t.Fatalf("%s: %+v", what, d)
			}
			t.Logf("%s: expected: %s; got: %s: %s", what, wire.OutcomeRefused, d.Outcome, d.Message)
		}
		if f.worker.Status().Draining || f.book.count(journal.OrderRefused) != 3 || len(f.Status().Networks[0].Orders) != 0 {
			t.Errorf("a refused order had an effect\n%s", f.book)
		}
		for range 500 { // nobody reads them while the loop is at the disk
			f.Message(f.order(newKey(), wire.OrderDrain))
		}
		synctest.Wait()
		for len(f.link.sent) > 0 {
			<-f.link.sent
		}
		for _, code := range []string{"signer", "kind", "flood"} {
			if !strings.Contains(f.book.String(), "event=order-refused order=") || !strings.Contains(f.book.String(), " code="+code+" ") {
				t.Errorf("the journal does not say %s", code)
			}
		}
		for _, code := range append(order.Codes, "flood") {
			if !strings.Contains(journal.OrderRefused.Text, " "+code+" (") {
				t.Errorf("the catalog does not explain %s", code)
			}
		}
		f.mustObey(wire.OrderDrain)
	})
}

func TestOrderRestart(t *testing.T) {
	serving(t, func(t *testing.T, f *fixture) {
		_, before := f.machine.Now()
		j := job(f.board.snapshot())
		f.Message(j)
		synctest.Wait()
		<-f.engine.asked
		o := f.order(networkKey, wire.OrderRestart)
		if d := f.obey(o); d != nil {
			t.Fatalf("%+v while a job runs", d)
		}
		if _, now := f.machine.Now(); now != before {
			t.Fatal("the runtime was restarted under a job")
		}
		f.engine.answer <- struct{}{}
		synctest.Wait()
		d := last[*wire.OrderDone](f.party)
		if _, now := f.machine.Now(); d == nil || d.Outcome != wire.OutcomeOK || now != before+1 {
			t.Fatalf("%+v, %d starts after %d\n%s", d, now, before, f.book)
		}
		f.serves(f.board.snapshot())

		f.machine.Fail(deploytest.Golden, &deploytest.Fault{Err: errBroken})
		if d := f.obey(f.order(networkKey, wire.OrderRestart)); d == nil || d.Outcome != wire.OutcomeFailed || !strings.Contains(d.Message, "broken") {
			t.Errorf("%+v", d)
		}
		f.failedFor("validation")
		f.serves(nil)

		// They are bounded, so that nobody can keep the node from working by them.
		f.machine.Fail(deploytest.Golden, nil)
		f.mustObey(wire.OrderRestart)
		f.serves(f.board.snapshot())
		_, before = f.machine.Now()
		d = f.obey(f.order(networkKey, wire.OrderRestart))
		if _, now := f.machine.Now(); d == nil || d.Outcome != wire.OutcomeRefused || !strings.Contains(d.Message, "3 restarts within") || now != before {
			t.Errorf("%+v, %d starts", d, now-before)
		}
		if f.book.count(journal.OrderRefused) != 1 || !strings.Contains(f.book.String(), " code=restarts ") {
			t.Errorf("not journalled:\n%s", f.book)
		}
		f.serves(f.board.snapshot())
		pass(time.Hour)
		f.party.drop()
		f.mustObey(wire.OrderRestart)
	})
}

func TestOrderRevalidate(t *testing.T) {
	serving(t, func(t *testing.T, f *fixture) {
		s := f.board.snapshot()
		f.machine.Calls()
		f.mustObey(wire.OrderRevalidate)
		f.serves(s)
		if c := f.machine.Calls(); deploytest.Count(c, deploytest.Golden) == 0 || deploytest.Count(c, deploytest.Stop) != 0 {
			t.Errorf("calls %v", c)
		}
		// A wrong answer takes the node out of service.
		f.machine.Fail(deploytest.Golden, &deploytest.Fault{Err: errBroken})
		if d := f.obey(f.order(networkKey, wire.OrderRevalidate)); d == nil || d.Outcome != wire.OutcomeFailed {
			t.Errorf("%+v", d)
		}
		f.serves(nil)
		if h := last[*wire.Heartbeat](f.party); f.board.runtimeState().State != failed || h != nil && h.Runtime.State == active {
			t.Errorf("state %s", f.board.runtimeState().State)
		}
		if g := f.gate("validation"); g.State == gate.Open || !strings.Contains(g.Detail, "broken") {
			t.Errorf("%+v", g)
		}
		if d := f.obey(f.order(networkKey, wire.OrderRevalidate)); d == nil || d.Outcome != wire.OutcomeFailed {
			t.Errorf("with nothing active: %+v", d)
		}
		f.failedFor("no_runtime")
		f.machine.Fail(deploytest.Golden, nil)
		pass(10 * time.Minute)
		f.serves(s)
		// So does a damaged file; then the runtime is started anew from a new copy.
		_, starts := f.machine.Now()
		f.damaged = digest.ErrMismatch
		if d := f.obey(f.order(networkKey, wire.OrderRevalidate)); d == nil || d.Outcome != wire.OutcomeFailed || f.book.count(journal.ModelRefused) != 1 {
			t.Errorf("%+v\n%s", d, f.book)
		}
		f.damaged = nil
		pass(10 * time.Minute)
		f.serves(s)
		_, now := f.machine.Now()
		if now <= starts {
			t.Error("the runtime still holds what was damaged")
		}
		// A disk that does not answer is told, and no more.
		f.damaged = syscall.EIO
		if d := f.obey(f.order(networkKey, wire.OrderRevalidate)); d == nil || d.Outcome != wire.OutcomeFailed || !strings.Contains(d.Message, syscall.EIO.Error()) {
			t.Errorf("%+v", d)
		}
		f.failedFor("storage")
		f.serves(s)
		if _, again := f.machine.Now(); again != now {
			t.Error("the runtime was started again")
		}
	})
}

func TestOrderPenalty(t *testing.T) {
	serving(t, func(t *testing.T, f *fixture) {
		f.mustObey(wire.OrderPenalty)
		p := f.Status().Networks[0].Penalty
		if p == nil || p.Reason != "for the test" || f.book.count(journal.OrderPenalty) != 1 || f.worker.Status().Draining {
			t.Fatalf("%+v", p)
		}
		pass(time.Hour)
		if f.Status().Networks[0].Penalty != nil {
			t.Error("the penalty does not end")
		}
	})
}

func TestOrderShutdown(t *testing.T) {
	serving(t, func(t *testing.T, f *fixture) {
		j := job(f.board.snapshot())
		f.Message(j)
		synctest.Wait()
		<-f.engine.asked
		o := f.order(networkKey, wire.OrderShutdown)
		if d := f.obey(o); d != nil || !f.worker.Status().Draining || len(f.halt) != 0 {
			t.Fatalf("%+v while a job runs", d)
		}
		f.mustObey(wire.OrderResume) // takes nothing back
		f.engine.answer <- struct{}{}
		synctest.Wait()
		if d := last[*wire.OrderDone](f.party); d == nil || d.Outcome != wire.OutcomeOK || len(f.halt) != 1 || !f.worker.Status().Draining {
			t.Fatalf("%+v, %d", d, len(f.halt))
		}
		pass(time.Hour)
		if u, _ := f.machine.Now(); u.Active == "active" {
			t.Error("the runtime was brought up again")
		}
	})
}

// The agent ends by itself and well after a shutdown, so that systemd leaves it
// at that.
func TestShutdownEndsTheAgent(t *testing.T) {
	n, m := deploytest.NewNetwork(t), deploytest.New(t)
	f := build(t, t.TempDir(), m)
	f.cfg.Paths.Runtime = filepath.Join(t.TempDir(), "run")
	if err := os.MkdirAll(f.cfg.Paths.Runtime, 0o700); err != nil {
		t.Fatal(err)
	}
	f.tuf.serve(n.Publish(nil), nil)
	done := make(chan error, 1)
	go func() { done <- f.Run(t.Context()) }()
	await(t, f, func(h *wire.Heartbeat) bool { return h.Runtime.State == active })
	f.Message(f.order(networkKey, wire.OrderShutdown))
	await(t, f, func(d *wire.OrderDone) bool { return d.Outcome == wire.OutcomeOK })
	await(t, f, func(*wire.Bye) bool { return true })
	select {
	case err := <-done:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(patience):
		t.Fatal("it does not end")
	}
	if err := f.Close(); err != nil {
		t.Error(err)
	}
}
