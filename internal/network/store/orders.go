package store

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"slices"

	"github.com/resultity/node/internal/failpoint"
	"github.com/resultity/node/internal/wire"
)

// Order is an order to a node and what became of it. The signed order stays with
// it, as evidence.
type Order struct {
	Order     *wire.Order    `json:"order"`
	Directive wire.Directive `json:"directive"`
	Outcome   wire.Outcome   `json:"outcome"` // "" until the node has answered
	Message   string         `json:"message"`
	Answered  int64          `json:"answered"` // Unix milliseconds
}

func orderKey(d *wire.Directive) string { return nodeKey(d.Node) + "." + d.ID.String() }

// PutOrder writes an order, or what has become of it, down.
func (s *Store) PutOrder(ctx context.Context, o *Order) error {
	b, err := json.Marshal(o)
	if err != nil {
		return err
	}
	db, ctx, end, err := s.write(ctx, needed, len(b))
	if err != nil {
		return fmt.Errorf("write order %s down: %w", o.Directive.ID, err)
	}
	defer end()
	failpoint.Here("store.order.begin")
	if err := s.put(ctx, db, db.orders, orderKey(&o.Directive), b); err != nil {
		return fmt.Errorf("write order %s down: %w", o.Directive.ID, db.failure(err))
	}
	failpoint.Here("store.order.stored")
	return nil
}

// Orders returns every order that is kept, in the order of their issue.
func (s *Store) Orders(ctx context.Context) ([]*Order, error) {
	db := s.now.Load()
	m, err := all[Order](ctx, s, db, db.orders)
	if err != nil {
		return nil, err
	}
	list := make([]*Order, 0, len(m))
	for _, o := range m {
		list = append(list, &o)
	}
	slices.SortFunc(list, func(a, b *Order) int {
		return cmp.Or(cmp.Compare(a.Directive.Issued, b.Directive.Issued), slices.Compare(a.Directive.ID[:], b.Directive.ID[:]))
	})
	return list, nil
}
