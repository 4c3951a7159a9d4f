package orders

import (
	"context"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/resultity/node/internal/evm"
	"github.com/resultity/node/internal/network/store"
	"github.com/resultity/node/internal/wire"
)

// paper keeps orders as they were written down.
type paper struct{ list []store.Order }

func (p *paper) PutOrder(_ context.Context, o *store.Order) error {
	p.list = slices.DeleteFunc(p.list, func(old store.Order) bool { return old.Directive.ID == o.Directive.ID })
	p.list = append(p.list, *o)
	return nil
}

func (p *paper) Orders(context.Context) (list []*store.Order, err error) {
	for _, o := range p.list {
		list = append(list, &o)
	}
	return list, nil
}

// A node has as many orders to answer as it may have, and the operator is told what to
// do about the next one; another node has its own. What was answered or has expired
// makes room, over a restart too.
func TestPendingOrdersAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		key, err := evm.NewKey()
		if err != nil {
			t.Fatal(err)
		}
		written := &paper{}
		sent := 0
		open := func() *Desk {
			d, err := Open(t.Context(), written, key, "testnet", func(evm.Address, wire.Message) { sent++ })
			if err != nil {
				t.Fatal(err)
			}
			return d
		}
		node, other := evm.Address{1}, evm.Address{2}
		d := open()
		issue := func(to evm.Address) (wire.OrderID, error) {
			return d.Issue(t.Context(), to, What{Kind: wire.OrderDrain, Life: time.Minute})
		}
		var first wire.OrderID
		for i := range maxPending {
			id, err := issue(node)
			if err != nil {
				t.Fatalf("order %d: %v", i, err)
			}
			if i == 0 {
				first = id
			}
		}
		full := func(when string) {
			t.Helper()
			_, err := issue(node)
			t.Logf("order %d %s: expected: refused, and what to do; got: %v", maxPending+1, when, err)
			if err == nil || !strings.Contains(err.Error(), "wait for it") || len(written.list) > maxPending+2 {
				t.Errorf("%s: %v, %d are written down", when, err, len(written.list))
			}
		}
		full("of a node that answers none")
		if _, err := issue(other); err != nil {
			t.Errorf("another node: %v", err)
		}
		d = open()
		full("after a restart")
		sent = 0
		d.Connected(node)
		if sent != maxPending {
			t.Errorf("%d orders are sent to it", sent)
		}
		if expected, err := d.Done(t.Context(), node, &wire.OrderDone{ID: first, Outcome: wire.OutcomeOK}); !expected || err != nil {
			t.Error(expected, err)
		}
		if _, err := issue(node); err != nil {
			t.Errorf("once one is answered: %v", err)
		}
		full("though one was answered")
		time.Sleep(time.Minute + time.Second)
		if _, err := issue(node); err != nil {
			t.Errorf("once all have expired: %v", err)
		}
		if n := len(d.pending[node]); n != 1 {
			t.Errorf("%d are kept in memory", n)
		}
	})
}
