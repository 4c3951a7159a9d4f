package dispatch

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/resultity/node/internal/determinism"
	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/evm"
	"github.com/resultity/node/internal/network/nodetest"
	"github.com/resultity/node/internal/receipt"
	"github.com/resultity/node/internal/wire"
)

// joinClass joins a node of a class.
func (f *fixture) joinClass(name string) *peer {
	f.t.Helper()
	n := nodetest.New(f.t, "", f.raw)
	n.Class = &wire.Class{Digest: digest.Of([]byte(name)), Hardware: determinism.Hardware{Arch: "amd64", CPU: name, Features: []string{}, GPUs: []string{}}}
	return f.join(n)
}

func (f *fixture) replayOf(class string, change func(*Replay)) (*Ticket, Second, error) {
	f.t.Helper()
	r := Replay{Kind: wire.KindChat, Model: nodetest.Model, Request: []byte(`{"model":"tiny"}`), Seed: new(uint32(7)), Class: digest.Of([]byte(class))}
	if change != nil {
		change(&r)
	}
	return f.d.SubmitReplay(r)
}

// A replay goes to the node that it is for and to no other one, waits for a slot
// of it, and is neither written down nor counted.
func TestReplayWaitsForItsNode(t *testing.T) {
	run(t, Options{}, nil, func(t *testing.T, f *fixture) {
		a, b, c := f.joinClass("x"), f.joinClass("x"), f.joinClass("y")
		other := func(r *Replay) { r.First = a.node.Key.Address() }
		ticket, who, err := f.replayOf("x", other)
		if err != nil || who.Node != b.node.Key.Address() {
			t.Fatalf("%+v, %v", who, err)
		}
		j := b.take()
		if j.Seed != 7 || j.Config != f.terms.Digest {
			t.Errorf("%+v", j)
		}
		if jobs, _ := f.store.count(); jobs != 0 {
			t.Error("it was written down")
		}
		b.deliver(j, "words")
		b.acked(j)
		f.answered(ticket, "words")
		// Both slots are taken: it waits, while jobs go elsewhere.
		b.beat(func(h *wire.Heartbeat) { h.Busy = 2 })
		ticket, _, err = f.replayOf("x", other)
		if err != nil {
			t.Fatal(err)
		}
		job := f.submit(false)
		none[*wire.Job](b)
		var took *peer
		for _, p := range []*peer{a, c} {
			if j, ok := next[*wire.Job](p); ok {
				took = p
				p.deliver(j, "words")
			}
		}
		if took == nil {
			t.Fatal("a job waits behind a replay")
		}
		f.answered(job, "words")
		f.waiting(ticket)
		b.beat(nil)
		j = b.take()
		b.deliver(j, "words")
		f.answered(ticket, "words")
		f.empty(3)
		if got := f.metric(`resultity_jobs_total{outcome="ok"}`); got != "1" {
			t.Errorf("%s jobs are counted", got)
		}
		if len(f.store.kept) != 1 {
			t.Errorf("%d requests are kept", len(f.store.kept))
		}
	})
}

// A replay ends with its node, and with whoever asked.
func TestReplayEndsWithItsNode(t *testing.T) {
	run(t, Options{}, nil, func(t *testing.T, f *fixture) {
		a, b := f.joinClass("x"), f.joinClass("x")
		other := func(r *Replay) { r.First = a.node.Key.Address() }
		ticket, _, err := f.replayOf("x", other)
		if err != nil {
			t.Fatal(err)
		}
		b.take()
		b.member.Leave(false)
		f.sleep(8*time.Second, a)
		f.failed(ticket, NoNode)
		none[*wire.Job](a)

		b = f.join(b.node)
		ticket, _, err = f.replayOf("x", other)
		if err != nil {
			t.Fatal(err)
		}
		j := b.take()
		ticket.Cancel()
		f.failed(ticket, Cancelled)
		if c := must[*wire.Cancel](b); c.Job != j.ID {
			t.Errorf("%+v", c)
		}
		// It refuses again and again.
		ticket, _, err = f.replayOf("x", other)
		if err != nil {
			t.Fatal(err)
		}
		for range 20 {
			f.sleep(time.Second, a, b)
			if j, ok := next[*wire.Job](b); ok {
				b.member.Refused(&wire.Refuse{Job: j.ID, Code: wire.CodeNotReady})
			}
		}
		f.failed(ticket, Failed)
		none[*wire.Job](a)
		f.empty(0)
	})
}

func TestReplayNeedsANodeOfTheClass(t *testing.T) {
	run(t, Options{}, nil, func(t *testing.T, f *fixture) {
		a, b := f.joinClass("x"), f.joinClass("y")
		plain := f.join(nil) // of no class
		for _, p := range []*peer{b, plain} {
			if _, _, err := f.replayOf("x", func(r *Replay) { r.Node = new(p.node.Key.Address()) }); err == nil {
				t.Error("a node of another class is asked")
			}
		}
		first := func(r *Replay) { r.First = a.node.Key.Address() }
		if _, _, err := f.replayOf("x", first); err == nil {
			t.Error("the first one is asked, though nobody has named it")
		}
		if _, _, err := f.replayOf("z", nil); err == nil {
			t.Error("there is a node of a class that there is not")
		}
		a.beat(func(h *wire.Heartbeat) { h.Draining = true })
		if _, _, err := f.replayOf("x", func(r *Replay) { r.Node = new(a.node.Key.Address()) }); err == nil {
			t.Error("a node that drains is asked")
		}
		synctest.Wait()
		for _, p := range []*peer{a, b, plain} {
			none[*wire.Job](p)
		}
		f.empty(0)
	})
}

// One owner's nodes are asked about one another only where nobody else could be.
func TestReplayPrefersAnotherAccount(t *testing.T) {
	run(t, Options{}, nil, func(t *testing.T, f *fixture) {
		a, b, c := f.joinClass("x"), f.joinClass("x"), f.joinClass("x")
		for p, account := range map[*peer]string{a: "acme", b: "acme", c: "other"} {
			f.d.SetAccount(p.node.Key.Address(), account)
		}
		c.beat(func(h *wire.Heartbeat) { h.Busy = 1 }) // less of it is free than of b
		ask := func(change func(*Replay)) (Second, error) {
			ticket, who, err := f.replayOf("x", func(r *Replay) {
				r.First, r.Account = a.node.Key.Address(), "acme"
				if change != nil {
					change(r)
				}
			})
			if err == nil {
				ticket.Cancel()
			}
			return who, err
		}
		for range 20 { // they are looked at in no order
			if who, err := ask(nil); err != nil || who != (Second{c.node.Key.Address(), "other"}) {
				t.Fatalf("%+v, %v", who, err)
			}
		}
		for range 20 {
			who, err := ask(func(r *Replay) { r.Asked = []evm.Address{c.node.Key.Address()} })
			if err != nil || who != (Second{b.node.Key.Address(), "acme"}) {
				t.Fatalf("%+v, %v", who, err)
			}
		}
		if who, err := ask(func(r *Replay) { r.Asked = []evm.Address{b.node.Key.Address(), c.node.Key.Address()} }); err == nil {
			t.Errorf("%+v was asked again", who)
		}
		c.beat(func(h *wire.Heartbeat) { h.Draining = true })
		if who, err := ask(nil); err != nil || who.Node != b.node.Key.Address() {
			t.Errorf("%+v, %v", who, err)
		}
	})
}

// What a node has named as its class when it got a job is kept with the result, and
// one that signs for another class is pointed out, now and then.
func TestReceiptOfAnotherClass(t *testing.T) {
	run(t, Options{}, nil, func(t *testing.T, f *fixture) {
		a := f.joinClass("x")
		said := digest.Of([]byte("x"))
		finish := func(class digest.Digest) {
			ticket := f.submit(false)
			j := a.take()
			a.beat(func(h *wire.Heartbeat) { h.Class.Digest = class }) // too late to count
			if _, err := a.member.Result(a.node.Result(t, j, nodetest.Body(j, "words"), func(r *receipt.Receipt) { r.Claimed.ClassDigest = class })); err != nil {
				t.Fatal(err)
			}
			f.answered(ticket, "words")
			if r, err := f.store.Result(t.Context(), j.ID); err != nil || r.Said != said {
				t.Errorf("%+v, %v", r, err)
			}
			a.beat(func(h *wire.Heartbeat) { h.Class.Digest = said })
		}
		finish(said)
		if got := f.metric("resultity_receipts_of_another_class_total"); got != "0" {
			t.Errorf("%s honest ones are counted", got)
		}
		finish(digest.Of([]byte("y")))
		finish(receipt.Unknown)
		if got := f.metric("resultity_receipts_of_another_class_total"); got != "2" {
			t.Errorf("%s are counted", got)
		}
	})
}
