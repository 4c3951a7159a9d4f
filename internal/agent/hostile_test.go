package agent

import (
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/resultity/node/internal/deploy/deploytest"
	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/evm"
	"github.com/resultity/node/internal/receipt"
	"github.com/resultity/node/internal/receiptlog"
	"github.com/resultity/node/internal/snapshot"
	"github.com/resultity/node/internal/wire"
)

// lie is what a network says that keeps to the protocol's frames, and what the node is to
// answer: messages of which each has the text, in the order of the lies.
type lie struct {
	say    func(f *fixture, s *snapshot.Snapshot) []wire.Message
	answer string
	also   func(t *testing.T, f *fixture)
}

func says(list ...wire.Message) func(*fixture, *snapshot.Snapshot) []wire.Message {
	return func(*fixture, *snapshot.Snapshot) []wire.Message { return list }
}

// badJob is an honest job but for a change.
func badJob(change func(*wire.Job)) func(*fixture, *snapshot.Snapshot) []wire.Message {
	return func(_ *fixture, s *snapshot.Snapshot) []wire.Message {
		j := job(s)
		change(j)
		return []wire.Message{j}
	}
}

func badOrder(key *evm.Key, change func(*wire.Directive)) func(*fixture, *snapshot.Snapshot) []wire.Message {
	return func(f *fixture, _ *snapshot.Snapshot) []wire.Message {
		now := time.Now()
		d := wire.Directive{
			ID: wire.NewOrderID(), Network: "testnet", Node: nodeKey.Address(), Kind: wire.OrderShutdown, Issued: now.UnixMilli(), Expires: now.Add(time.Hour).UnixMilli(),
		}
		change(&d)
		o, err := wire.SealOrder(key, &d)
		if err != nil {
			f.t.Fatal(err)
		}
		return []wire.Message{o}
	}
}

var networkLies = map[wire.Type]map[string]lie{
	"welcome": {"once more": {say: says(&wire.Welcome{Session: strings.Repeat("x", 1<<20)})}},
	"status": {"a reason that is a tome": {
		say: says(&wire.Status{Reason: strings.Repeat("\x1b[2J\n", 1<<18)}),
		also: func(t *testing.T, f *fixture) {
			if g := f.gate("routable"); len(g.Detail) > 2*wire.MaxText || strings.ContainsAny(g.Detail, "\x1b\n") {
				t.Errorf("status shows %d bytes: %.200q", len(g.Detail), g.Detail)
			}
		},
	}},
	"bound": {"to a tome": {
		say: says(&wire.Bound{Account: strings.Repeat("\x1b[2J\n", 1<<18), Method: "nonsense", Since: -1 << 62}, &wire.Bound{Account: "acme"}),
	}},
	"job": {
		"another configuration's":  {say: badJob(func(j *wire.Job) { j.Config = digest.Of([]byte("x")) }), answer: "config_mismatch"},
		"another model's":          {say: badJob(func(j *wire.Job) { j.Model = strings.Repeat("x", 1<<20) }), answer: "unknown_model"},
		"of no kind":               {say: badJob(func(j *wire.Job) { j.Kind = "nonsense" }), answer: "bad_request"},
		"no request":               {say: badJob(func(j *wire.Job) { j.Request = nil }), answer: "bad_request"},
		"a request that is none":   {say: badJob(func(j *wire.Job) { j.Request = []byte("\xff{[") }), answer: "bad_request"},
		"a deep request":           {say: badJob(func(j *wire.Job) { j.Request = []byte(strings.Repeat("[", 1<<16)) }), answer: "bad_request"},
		"a request that is a tome": {say: badJob(func(j *wire.Job) { j.Request = make([]byte, 17<<20) }), answer: "limit"},
		"late":                     {say: badJob(func(j *wire.Job) { j.Deadline = 0 }), answer: "deadline"},
		"of all time":              {say: badJob(func(j *wire.Job) { j.Deadline = 1 << 50 }), answer: "limit"},
		"that streams and does not": {say: badJob(func(j *wire.Job) { j.Stream = true }),
			answer: "bad_request"},
	},
	"cancel": {"of a job that nobody has": {say: func(*fixture, *snapshot.Snapshot) (list []wire.Message) {
		for range 1000 {
			list = append(list, &wire.Cancel{Job: receipt.NewJobID(), Reason: strings.Repeat("\n", 1000)})
		}
		return list
	}}},
	"ack": {
		"of jobs that nobody has": {say: says(&wire.Ack{Jobs: []receipt.JobID{receipt.NewJobID()}})},
		"without a name":          {say: says(&wire.Ack{Jobs: make([]receipt.JobID, 1<<16)}), answer: "malformed"},
	},
	"update": {"without end": {
		say: says(&wire.Update{Version: -1 << 62}),
		also: func(t *testing.T, f *fixture) {
			before := len(f.tuf.calls())
			for range 5000 {
				f.Message(&wire.Update{Version: 1 << 62})
				pass(time.Millisecond)
			}
			if n := len(f.tuf.calls()) - before; n < 15 || n > 25 {
				t.Errorf("the network was asked for its configuration %d times in 5 s", n)
			}
		},
	}},
	"order": {
		"signed by another":   {say: badOrder(newKey(), func(*wire.Directive) {}), answer: "refused"},
		"of another network":  {say: badOrder(networkKey, func(d *wire.Directive) { d.Network = "mainnet" }), answer: "refused"},
		"for another node":    {say: badOrder(networkKey, func(d *wire.Directive) { d.Node[0]++ }), answer: "refused"},
		"that has expired":    {say: badOrder(networkKey, func(d *wire.Directive) { d.Issued -= 7200_000; d.Expires -= 7200_000 }), answer: "refused"},
		"that lives for ever": {say: badOrder(networkKey, func(d *wire.Directive) { d.Expires += wire.MaxOrderLife * 2000 }), answer: "refused"},
		"a reason that is a tome": {say: badOrder(networkKey, func(d *wire.Directive) { d.Reason = strings.Repeat("x", wire.MaxOrderReason+1) }),
			answer: "refused"},
		"of no kind": {say: badOrder(networkKey, func(d *wire.Directive) { d.Kind = "nonsense" }), answer: "refused"},
		"of nothing": {say: says(&wire.Order{ID: wire.NewOrderID()}), answer: "refused"},
		"of another id": {say: func(f *fixture, _ *snapshot.Snapshot) []wire.Message {
			o := f.order(networkKey, wire.OrderShutdown)
			o.ID = wire.NewOrderID()
			return []wire.Message{o}
		}, answer: "refused"},
	},
	"orderack": {"of no order": {say: says(&wire.OrderAck{ID: wire.NewOrderID()})}},
	"logsack":  {"of what was never sent": {say: says(&wire.LogsAck{Spool: strings.Repeat("x", 1<<20), Position: 1 << 63})}},
	"leavesack": {
		"more than there can be": {say: says(&wire.LeavesAck{Size: 1 << 63}), answer: "malformed"},
		"leaves without a head":  {say: says(&wire.LeavesAck{Size: 1, Edge: []evm.Hash{{1}}}), answer: "malformed"},
		"a head by another":      {say: func(f *fixture, _ *snapshot.Snapshot) []wire.Message { return []wire.Message{leavesAck(f, newKey())} }},
		"an edge of another head": {say: func(f *fixture, _ *snapshot.Snapshot) []wire.Message {
			a := leavesAck(f, nodeKey)
			a.Edge = []evm.Hash{{2}}
			return []wire.Message{a}
		}},
	},
	"sandboxack": {"of a record that nobody has": {
		say: says(&wire.SandboxAck{Digest: digest.Of([]byte("x"))}, &wire.SandboxAck{}),
		also: func(t *testing.T, f *fixture) {
			if len(f.records.Pending()) != 1 {
				t.Error("the record that is in force is forgotten")
			}
		},
	}},
}

// leavesAck says that the network has a log of one receipt, signed by key.
func leavesAck(f *fixture, key *evm.Key) *wire.LeavesAck {
	l := receiptlog.New()
	l.Append(evm.Hash{1}, nil)
	h := receiptlog.Head{Node: key.Address(), Network: "testnet", Size: 1, Root: l.Root(), Time: uint64(time.Now().UnixMilli())}
	signed, err := h.Sign(31337, key)
	if err != nil {
		f.t.Fatal(err)
	}
	return &wire.LeavesAck{Size: 1, Head: signed, Edge: l.Hashes()}
}

// A network that keeps to the protocol's frames and lies in the messages, in each type of
// them: what it says is refused with a reason, or does no harm. The
// node serves all the same, keeps the result that was not acknowledged, and does the next
// job.
func TestHostileNetwork(t *testing.T) {
	for _, m := range wire.Messages(wire.ToNode) {
		if len(networkLies[m.Type()]) == 0 {
			t.Errorf("nobody lies in a %s", m.Type())
		}
	}
	for typ, all := range networkLies {
		for name, l := range all {
			t.Run(string(typ)+"/"+name, func(t *testing.T) {
				bubble(t, func(t *testing.T, f *fixture, n *deploytest.Network) {
					s := n.Publish(nil)
					f.tuf.serve(s, nil)
					close(f.link.up)
					defer f.run()()
					pass(time.Second)
					f.serves(s)
					f.Opened()
					f.Message(&wire.LeavesAck{})
					f.earn(t, s)
					synctest.Wait()
					for len(f.link.sent) > 0 {
						<-f.link.sent
					}

					hear := f.hearing(t)
					got := ""
					for _, m := range l.say(f, s) {
						if err := hear(m); errors.Is(err, wire.ErrMalformed) {
							got += "malformed"
							hear = f.hearing(t) // in the next session
						} else if err != nil {
							t.Fatal(err)
						}
					}
					pass(time.Second)
					for len(f.link.sent) > 0 {
						switch m := (<-f.link.sent).(type) {
						case *wire.Refuse:
							got += string(m.Code)
							if m.Message == "" || len(m.Message) > 1000 {
								t.Errorf("a refusal with %d bytes of why", len(m.Message))
							}
						case *wire.OrderDone:
							got += string(m.Outcome)
							if err := m.Check(); err != nil || m.Message == "" {
								t.Errorf("%+v: %v", m, err)
							}
						case *wire.Accept, *wire.Result, *wire.Bye:
							got += string(m.Type())
						}
					}
					t.Logf("expected: answer %q, and the node serves; got: %q", l.answer, got)
					if got != l.answer {
						t.Errorf("answered %q, want %q\n%s", got, l.answer, f.book)
					}
					if l.also != nil {
						l.also(t, f)
					}

					f.serves(s)
					if st := f.worker.Status(); st.Draining || st.Outbox != 1 || st.Busy != 0 {
						t.Errorf("%+v\n%s", st, f.book)
					}
					good := job(s)
					if err := hear(good); err != nil {
						t.Fatal(err)
					}
					synctest.Wait()
					f.engine.answer <- struct{}{}
					<-f.engine.asked
					synctest.Wait()
					if r := last[*wire.Result](f.party); r == nil || r.Job != good.ID || r.Receipt == nil {
						t.Errorf("the next job: %+v\n%s", r, f.book)
					}
				})
			})
		}
	}
}

// hearing returns what brings a message to the node as its session does: sealed by the
// network, opened and bounded by the node.
func (f *fixture) hearing(t *testing.T) func(wire.Message) error {
	ours, theirs := wire.NewSecret(), wire.NewSecret()
	agree := func(s *wire.Secret) *wire.Session {
		agreed, err := s.Agree("testnet", nodeKey.Address(), ours.Public(), theirs.Public())
		if err != nil {
			t.Fatal(err)
		}
		return agreed
	}
	node, network := agree(ours), agree(theirs)
	sealer := wire.NewSealer(networkKey, network, wire.ToNode, time.Now)
	opener := wire.NewOpener(func(a evm.Address) bool { return a == networkKey.Address() }, node, wire.ToNode, time.Minute)
	hello, err := wire.NewSealer(nodeKey, node, wire.ToNetwork, time.Now).Seal(nil, &wire.Hello{})
	if err == nil {
		_, err = wire.NewOpener(func(evm.Address) bool { return true }, network, wire.ToNetwork, time.Minute).Open(hello, time.Now())
	}
	if err != nil {
		t.Fatal(err)
	}
	pass := func(m wire.Message) (wire.Message, error) {
		frame, err := sealer.Seal(nil, m)
		if err != nil {
			t.Fatal(err)
		}
		return opener.Open(frame, time.Now())
	}
	if _, err := pass(&wire.Welcome{}); err != nil {
		t.Fatal(err)
	}
	return func(m wire.Message) error {
		m, err := pass(m)
		if err == nil {
			f.Message(m)
		}
		return err
	}
}
