package network

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"time"

	"github.com/resultity/node/internal/evm"
	"github.com/resultity/node/internal/network/orders"
	"github.com/resultity/node/internal/network/store"
	"github.com/resultity/node/internal/wire"
)

// OrderState is an order and what has become of it.
type OrderState struct {
	ID       wire.OrderID   `json:"id"`
	Node     evm.Address    `json:"node"`
	Kind     wire.OrderKind `json:"kind"`
	Reason   string         `json:"reason,omitempty"`
	Issued   time.Time      `json:"issued"`
	Expires  time.Time      `json:"expires"`
	Until    time.Time      `json:"until,omitzero"` // of a penalty
	State    string         `json:"state"`          // pending, expired, ok, refused or failed
	Message  string         `json:"message,omitempty"`
	Answered time.Time      `json:"answered,omitzero"`
	// Order is the signed order itself: the proof of what was ordered.
	Order *wire.Order `json:"order"`
}

func stateOf(o *store.Order, now time.Time) OrderState {
	at := func(ms int64) (t time.Time) {
		if ms != 0 {
			t = time.UnixMilli(ms).UTC()
		}
		return t
	}
	d := &o.Directive
	s := OrderState{
		ID: d.ID, Node: d.Node, Kind: d.Kind, Reason: d.Reason, Issued: at(d.Issued), Expires: at(d.Expires), Until: at(d.Until),
		State: string(o.Outcome), Message: o.Message, Answered: at(o.Answered), Order: o.Order,
	}
	switch {
	case s.State != "":
	case now.Before(s.Expires):
		s.State = "pending"
	default:
		s.State = "expired"
	}
	return s
}

type (
	orderRequest struct {
		Node *evm.Address `json:"node"` // nil for every registered node
		What orders.What  `json:"what"`
	}
	waitRequest struct {
		IDs []wire.OrderID `json:"ids"`
	}
)

// issue gives an order to one node or to all.
func (s *service) issue(ctx context.Context, q orderRequest) (ids []wire.OrderID, err error) {
	nodes := []evm.Address{}
	if q.Node != nil {
		if _, err := s.store.Node(ctx, *q.Node); err != nil {
			return nil, fmt.Errorf("node %s is not registered: %w", q.Node.Hex(), err)
		}
		nodes = append(nodes, *q.Node)
	} else {
		all, err := s.store.Nodes(ctx)
		if err != nil {
			return nil, err
		}
		for _, n := range all {
			nodes = append(nodes, n.Address)
		}
	}
	var errs []error
	for _, n := range nodes {
		id, err := s.orders.Issue(ctx, n, q.What)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		s.log.Info("order issued", "order", id, "kind", q.What.Kind, "node", n, "reason", q.What.Reason)
		ids = append(ids, id)
	}
	return ids, errors.Join(errs...)
}

func (s *service) adminOrders(handle func(string, func(*http.Request) (adminReply, error))) {
	own := storeAdmin{s.store}
	handle("POST /orders", func(r *http.Request) (reply adminReply, err error) {
		var q orderRequest
		if err = decode(r.Body, &q); err == nil {
			reply.IDs, err = s.issue(r.Context(), q)
		}
		return reply, err
	})
	handle("POST /orders/wait", func(r *http.Request) (reply adminReply, err error) {
		var q waitRequest
		if err = decode(r.Body, &q); err == nil {
			s.orders.Wait(r.Context(), q.IDs)
		}
		return reply, err
	})
	handle("GET /orders", func(r *http.Request) (reply adminReply, err error) {
		reply.Orders, err = own.Orders(r.Context())
		return reply, err
	})
}

// IssueOrders gives an order to a node, or to every registered one for nil, and
// returns the orders' ids, those that were issued also beside an error.
func (c *adminClient) IssueOrders(ctx context.Context, node *evm.Address, w orders.What) ([]wire.OrderID, error) {
	r, err := c.call(ctx, http.MethodPost, "/orders", orderRequest{node, w})
	return r.IDs, err
}

// WaitOrders returns once each order has been answered or has expired.
func (c *adminClient) WaitOrders(ctx context.Context, ids []wire.OrderID) error {
	patient := adminClient{c.http}
	patient.http.Timeout = 0
	_, err := patient.call(ctx, http.MethodPost, "/orders/wait", waitRequest{ids})
	return err
}

// Orders returns all orders that are kept, in the order of their issue.
func (c *adminClient) Orders(ctx context.Context) ([]OrderState, error) {
	r, err := c.call(ctx, http.MethodGet, "/orders", struct{}{})
	return r.Orders, err
}

var errNoService = fmt.Errorf("%w: orders are given by the running service; start it (resultity-network serve)", ErrConfig)

func (a storeAdmin) IssueOrders(context.Context, *evm.Address, orders.What) ([]wire.OrderID, error) {
	return nil, errNoService
}

func (a storeAdmin) WaitOrders(context.Context, []wire.OrderID) error { return errNoService }

func (a storeAdmin) Orders(ctx context.Context) ([]OrderState, error) {
	list, err := a.store.Orders(ctx)
	states := make([]OrderState, 0, len(list))
	for _, o := range list {
		states = append(states, stateOf(o, time.Now()))
	}
	return states, err
}
