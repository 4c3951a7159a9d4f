// Package orders owns what the network's operator orders its nodes to do.
//
// The rule it keeps: an order is on disk before it leaves, and it is given to its
// node at each session, in the order of issue, until the node has answered or the
// order has expired. An answer is on disk before it is acknowledged.
package orders

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/resultity/node/internal/evm"
	"github.com/resultity/node/internal/network/store"
	"github.com/resultity/node/internal/wire"
)

// maxPending bounds the orders that one node has not answered.
const maxPending = 64

// Desk issues orders. Safe for concurrent use.
type Desk struct {
	store   orderStore
	key     *evm.Key // a message key of the network
	network string
	send    func(evm.Address, wire.Message) // to a node that is connected, else to nobody

	mu      sync.Mutex // guards what follows, also while an order or an answer is written
	last    int64      // time of the last issue: each is later than the one before
	pending map[evm.Address][]*store.Order
	changed chan struct{} // closed and replaced at each answer
}

type orderStore interface {
	PutOrder(ctx context.Context, o *store.Order) error
	Orders(ctx context.Context) ([]*store.Order, error)
}

// Open takes up the orders that are not answered. They are signed anew if the
// message key has changed since.
func Open(ctx context.Context, s orderStore, key *evm.Key, network string, send func(evm.Address, wire.Message)) (*Desk, error) {
	d := &Desk{store: s, key: key, network: network, send: send, pending: map[evm.Address][]*store.Order{}, changed: make(chan struct{})}
	list, err := s.Orders(ctx)
	if err != nil {
		return nil, err
	}
	for _, o := range list {
		d.last = max(d.last, o.Directive.Issued)
		if o.Outcome != "" {
			continue
		}
		if _, who, err := o.Order.Open(); err != nil || who != key.Address() {
			if o.Order, err = wire.SealOrder(key, &o.Directive); err != nil {
				return nil, err
			}
			if err := s.PutOrder(ctx, o); err != nil {
				return nil, err
			}
		}
		d.pending[o.Directive.Node] = append(d.pending[o.Directive.Node], o)
	}
	return d, nil
}

// What is what an operator orders.
type What struct {
	Kind   wire.OrderKind `json:"kind"`
	Reason string         `json:"reason"`
	Life   time.Duration  `json:"life"`  // until it expires, if it is not answered
	Until  time.Time      `json:"until"` // of a penalty
}

// Check refuses what nodes would refuse.
func (w *What) Check(now time.Time) error {
	switch {
	case !slices.Contains(wire.OrderKinds, w.Kind):
		return fmt.Errorf("no order is of kind %.40q; want one of %v", w.Kind, wire.OrderKinds)
	case len(w.Reason) > wire.MaxOrderReason || wire.Printable(w.Reason) != w.Reason:
		return fmt.Errorf("the reason has %d bytes; want one line of at most %d", len(w.Reason), wire.MaxOrderReason)
	case w.Life < time.Second || w.Life > wire.MaxOrderLife*time.Second:
		return fmt.Errorf("an order that expires after %v; want 1 s to %v", w.Life, wire.MaxOrderLife*time.Second)
	case w.Kind == wire.OrderPenalty && w.Reason == "":
		return errors.New("a penalty without a reason helps nobody; give one")
	case w.Kind == wire.OrderPenalty && !w.Until.After(now):
		return errors.New("a penalty needs an end in the future")
	case w.Kind != wire.OrderPenalty && !w.Until.IsZero():
		return fmt.Errorf("an order of kind %s has no end", w.Kind)
	}
	return nil
}

// Issue signs an order to a node, writes it down and sends it if the node is
// connected.
func (d *Desk) Issue(ctx context.Context, node evm.Address, w What) (wire.OrderID, error) {
	now := time.Now()
	if err := w.Check(now); err != nil {
		return wire.OrderID{}, err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if n := len(d.livingLocked(node, now)); n >= maxPending {
		return wire.OrderID{}, fmt.Errorf("node %s has %d orders to answer; wait for it, or until they expire", node.Hex(), n)
	}
	d.last = max(now.UnixMilli(), d.last+1)
	dir := wire.Directive{
		ID: wire.NewOrderID(), Network: d.network, Node: node, Kind: w.Kind, Reason: w.Reason,
		Issued: d.last, Expires: d.last + w.Life.Milliseconds(),
	}
	if !w.Until.IsZero() {
		dir.Until = w.Until.UnixMilli()
	}
	signed, err := wire.SealOrder(d.key, &dir)
	if err != nil {
		return dir.ID, err
	}
	o := &store.Order{Order: signed, Directive: dir}
	if err := d.store.PutOrder(ctx, o); err != nil {
		return dir.ID, err
	}
	d.pending[node] = append(d.pending[node], o)
	d.send(node, signed)
	return dir.ID, nil
}

// livingLocked forgets the orders of a node that have expired, and returns the
// others. The store keeps both.
func (d *Desk) livingLocked(node evm.Address, now time.Time) []*store.Order {
	list := slices.DeleteFunc(d.pending[node], func(o *store.Order) bool { return now.UnixMilli() >= o.Directive.Expires })
	d.pending[node] = list
	if len(list) == 0 {
		delete(d.pending, node)
	}
	return list
}

// Connected sends a node what it has not answered.
func (d *Desk) Connected(node evm.Address) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, o := range d.livingLocked(node, time.Now()) {
		d.send(node, o.Order)
	}
}

// Done takes a node's answer. It reports whether one was waited for.
func (d *Desk) Done(ctx context.Context, node evm.Address, a *wire.OrderDone) (expected bool, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	i := slices.IndexFunc(d.pending[node], func(o *store.Order) bool { return o.Directive.ID == a.ID })
	if i < 0 {
		return false, nil // answered already, or expired and forgotten
	}
	o := *d.pending[node][i]
	o.Outcome, o.Message, o.Answered = a.Outcome, a.Message, time.Now().UnixMilli()
	if err := d.store.PutOrder(ctx, &o); err != nil {
		return true, err
	}
	d.pending[node] = slices.Delete(d.pending[node], i, i+1)
	d.livingLocked(node, time.Now())
	close(d.changed)
	d.changed = make(chan struct{})
	return true, nil
}

// Wait returns once each of the orders has been answered or has expired, or with
// ctx.
func (d *Desk) Wait(ctx context.Context, ids []wire.OrderID) {
	wanted := make(map[wire.OrderID]bool, len(ids)) // of each node of a network there may be one
	for _, id := range ids {
		wanted[id] = true
	}
	for {
		d.mu.Lock()
		changed, next := d.changed, time.Time{}
		for node := range d.pending {
			for _, o := range d.livingLocked(node, time.Now()) {
				if end := time.UnixMilli(o.Directive.Expires); wanted[o.Directive.ID] && (next.IsZero() || end.Before(next)) {
					next = end
				}
			}
		}
		d.mu.Unlock()
		if next.IsZero() {
			return
		}
		expiry := time.NewTimer(time.Until(next))
		select {
		case <-changed:
		case <-expiry.C:
		case <-ctx.Done():
		}
		expiry.Stop()
		if ctx.Err() != nil {
			return
		}
	}
}
