package nodes

import (
	"context"
	"strings"
	"testing"
	"time"

	"github.com/resultity/node/internal/evm"
	"github.com/resultity/node/internal/network/store"
	"github.com/resultity/node/internal/wire"
)

// oneNode is a registry of one node.
type oneNode struct {
	registry
	node store.Node
}

func (r *oneNode) Node(context.Context, evm.Address) (store.Node, error) { return r.node, nil }

func (r *oneNode) UpdateNode(_ context.Context, _ evm.Address, change func(*store.Node) error) (store.Node, error) {
	n := r.node
	if err := change(&n); err != nil {
		return store.Node{}, err
	}
	r.node = n
	return n, nil
}

func (r *oneNode) EmailAccount(context.Context, string, time.Time) (store.EmailAccount, error) {
	return store.EmailAccount{ID: "email-x"}, nil
}

// outbox counts messages.
type outbox int

func (o *outbox) Put(context.Context, store.Mail) error { *o++; return nil }

// Codes can be asked for by any number of nodes, but only those that were sent
// can be guessed.
func TestCodeThatWasNotSent(t *testing.T) {
	for _, enough := range []bool{false, true} {
		sent := new(outbox)
		s, _ := rig(t, Options{Outbox: sent})
		s.m.remove(s)
		_ = s.conn.Close()
		r := &oneNode{node: store.Node{Address: evm.Address{1}}}
		s.m.registry = r
		if enough {
			s.m.limits.codesTo = newLimiters[string](0, 0)
		}
		step := func(req wire.BindRequest) error {
			req.Nonce = r.node.Challenge
			_, _, err := s.m.step(t.Context(), &req, r.node, time.Now(), Source("192.0.2.1:1"))
			return err
		}
		for _, req := range []wire.BindRequest{{Step: wire.BindBegin}, {Step: wire.BindEmail, Email: "ann@example.org"}} {
			if err := step(req); err != nil {
				t.Fatal(err)
			}
		}
		err := step(wire.BindRequest{Step: wire.BindCode, Code: s.m.codes.Of(r.node.Code.Seed, r.node.Address)})
		switch {
		case !enough && (err != nil || r.node.Account != "email-x" || *sent != 1):
			t.Errorf("a code that was sent: %v, bound to %q", err, r.node.Account)
		case enough && (err == nil || !strings.Contains(err.Error(), "wrong code; 4 tries") || r.node.Account != "" || *sent != 0):
			t.Errorf("a code that was not sent: %v, bound to %q", err, r.node.Account)
		}
	}
}

// Two changes of a binding may be told in the other order: the last one counts.
func TestLastChangeIsTold(t *testing.T) {
	s, _ := rig(t, Options{})
	s.m.registry = &oneNode{node: store.Node{Address: s.node}} // it was unbound after
	s.m.current[s.node] = s
	s.m.Changed(store.Node{Address: s.node, Binding: store.Binding{Account: "email-x"}})
	if b, ok := s.queue[0].(*wire.Bound); !ok || b.Account != "" {
		t.Errorf("the node is told %+v", s.queue[0])
	}
	s.m.remove(s)
	_ = s.conn.Close()
}
