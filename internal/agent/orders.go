package agent

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/resultity/node/internal/control"
	"github.com/resultity/node/internal/deploy"
	"github.com/resultity/node/internal/evm"
	"github.com/resultity/node/internal/failpoint"
	"github.com/resultity/node/internal/journal"
	"github.com/resultity/node/internal/order"
	"github.com/resultity/node/internal/wire"
	"github.com/resultity/node/internal/work"
)

const (
	maxInbox = 128 // messages about orders that wait for the disk
	maxLong  = 4   // orders at once that take time
	shown    = 10  // orders in status
)

// openBook opens the memory of the network's orders.
func (m *membership) openBook(path string) (err error) {
	m.orderBook, err = order.Open(path, m.net.Name, m.key.Address(), failpoint.Now)
	if err != nil {
		return err
	}
	switch m.orderBook.Damage() {
	case order.Mended:
		m.log.Warn("a copy of the memory of orders was damaged and is made anew", journal.StoreMended.Attr(), "count", 1, "dir", m.dir)
	case order.Lost:
		m.log.Error("the memory of the network's orders was lost", journal.OrdersLost.Attr(), "dir", m.dir)
	}
	return nil
}

// post hands a message to the loop of orders. One that finds no room is as good
// as lost on the way: the network sends it again in the next session.
func (m *membership) post(msg wire.Message) {
	select {
	case m.inbox <- msg:
	default:
		m.log.Warn("more orders than can be written down", journal.OrderRefused.Attr(), "code", "flood", "type", msg.Type())
	}
}

// orders carries out what the network orders, in the order of arrival; what
// takes time goes on beside. It returns when ctx has ended and nothing goes on.
func (m *membership) orders(ctx context.Context) error {
	var long sync.WaitGroup
	defer long.Wait()
	slots := make(chan struct{}, maxLong)
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-m.retell:
			for _, d := range m.orderBook.Untold() {
				m.answer(d)
			}
		case msg := <-m.inbox:
			switch msg := msg.(type) {
			case *wire.OrderAck:
				if err := m.orderBook.Told(msg.ID); err != nil {
					m.log.Error("acknowledgement not stored; the outcome is told again", journal.StorageFailed.Attr(), "order", msg.ID, "error", err)
				}
			case *wire.Order:
				e, do := m.begin(msg)
				if do == nil {
					continue
				}
				if !takesTime(e.Kind) {
					m.conclude(e, do(ctx))
					continue
				}
				select {
				case slots <- struct{}{}:
				default:
					m.conclude(e, errOrders)
					continue
				}
				long.Go(func() {
					defer func() { <-slots }()
					err := do(ctx)
					if ctx.Err() != nil {
						return // the next start finds it cut short
					}
					m.conclude(e, err)
					if e.Kind == wire.OrderShutdown && !errors.Is(err, errLeaving) {
						m.halt <- struct{}{}
					}
				})
			}
		}
	}
}

func takesTime(k wire.OrderKind) bool {
	return k == wire.OrderRestart || k == wire.OrderRevalidate || k == wire.OrderShutdown || k == wire.OrderLogs
}

// begin writes an order down and returns what is to be done, or answers it.
func (m *membership) begin(o *wire.Order) (order.Entry, func(context.Context) error) {
	s := m.board.snapshot()
	e, known, err := m.orderBook.Begin(o, func(k evm.Address) bool { return s != nil && trusted(s)(k) })
	var refused *order.Refusal
	switch {
	case errors.As(err, &refused):
		m.log.Warn("order refused", journal.OrderRefused.Attr(), "order", o.ID, "code", refused.Code, "reason", refused.Reason)
		m.answer(&wire.OrderDone{ID: o.ID, Outcome: wire.OutcomeRefused, Message: wire.Cut(refused.Reason, wire.MaxOrderMessage)})
		return e, nil
	case err != nil:
		m.log.Error("order not written down", journal.StorageFailed.Attr(), "order", o.ID, "error", err)
		m.answer(&wire.OrderDone{ID: o.ID, Outcome: wire.OutcomeRefused, Message: "the node cannot write it down"})
		return e, nil
	case known && e.Outcome == order.Begun: // its answer comes
		return e, nil
	case known:
		m.answer(e.Done())
		return e, nil
	}
	k := m.kinds()[e.Kind]
	fields := []any{k.event.Attr(), "order", e.ID, "reason", e.Reason}
	if e.Kind == wire.OrderPenalty {
		fields = append(fields, "until", time.UnixMilli(e.Until).UTC().Format(time.RFC3339))
	}
	m.log.Warn("order of the network: "+string(e.Kind), fields...)
	return e, func(ctx context.Context) error { return k.do(ctx, e) }
}

// kind is what is done for a kind of order.
type kind struct {
	event *journal.Event
	do    func(context.Context, order.Entry) error
}

func (m *membership) kinds() map[wire.OrderKind]kind {
	nothing := func(context.Context, order.Entry) error { return nil } // to be remembered is all
	return map[wire.OrderKind]kind{
		wire.OrderDrain:      {journal.OrderDrain, nothing},
		wire.OrderResume:     {journal.OrderResume, nothing},
		wire.OrderPenalty:    {journal.OrderPenalty, nothing},
		wire.OrderRestart:    {journal.OrderRestart, func(ctx context.Context, _ order.Entry) error { return m.on.restart(ctx, m) }},
		wire.OrderRevalidate: {journal.OrderRevalidate, func(ctx context.Context, _ order.Entry) error { return m.revalidate(ctx) }},
		wire.OrderShutdown:   {journal.OrderShutdown, m.shutDown},
		wire.OrderLogs:       {journal.OrderLogs, func(ctx context.Context, _ order.Entry) error { return m.uploadLogs(ctx) }},
	}
}

// conclude writes down what became of an order, puts it in force and tells the
// network.
func (m *membership) conclude(e order.Entry, err error) {
	e, failed := m.orderBook.Finish(e.ID, err)
	if failed != nil {
		// It stays begun, and has failed at the next start.
		m.log.Error("outcome of an order not stored", journal.StorageFailed.Attr(), "order", e.ID, "error", failed)
		return
	}
	if err != nil {
		m.log.Error("order failed", journal.OrderFailed.Attr(), "order", e.ID, "kind", e.Kind, "code", reasonCode(err), "error", err)
	} else {
		m.log.Info("order done", journal.OrderDone.Attr(), "order", e.ID, "kind", e.Kind)
	}
	m.hold()
	m.on.changed()
	poke(m.beat)
	m.answer(e.Done())
}

var errOrders = fmt.Errorf("%d other orders are being carried out", maxLong)

// reasonCodes are the reasons for which an order is not carried out, or a validation has
// decided nothing, in the words of the journal's catalog.
var reasonCodes = []struct {
	is   error
	code string
}{
	{errOrders, "busy"},
	{errCrowded, "busy"},
	{errUndecided, "undecided"},
	{errTooSoon, "too_soon"},
	{errReplaced, "replaced"},
	{errUnread, "storage"},
	{errNothing, "no_runtime"},
	{errOthers, "others"},
	{errLeaving, "leaving"},
	{errUploadOff, "logs_off"},
}

// reasonCode names a reason: a word of that list, the step of a deployment that has
// failed, or "failed".
func reasonCode(err error) string {
	for _, r := range reasonCodes {
		if errors.Is(err, r.is) {
			return r.code
		}
	}
	if step := stepOf(err); step != "" {
		return string(step)
	}
	return "failed"
}

// hold tells the worker whether the network lets it take jobs. Who shuts down
// takes none, whatever is ordered.
func (m *membership) hold() {
	m.holding.Lock() // or one who looked earlier could speak last
	defer m.holding.Unlock()
	m.worker.Hold(m.leaving.Load() || m.orderBook.Drain() != nil)
}

// answer tells the network, if there is a session; else the next one does.
func (m *membership) answer(d *wire.OrderDone) {
	if err := m.session.Send(d); err != nil {
		m.log.Debug("not sent", "type", d.Type(), "error", err)
	}
}

var errLeaving = errors.New("another order to shut down is being carried out")

// shutDown finishes the jobs and gives the runtime up; the membership ends when
// that has been told.
func (m *membership) shutDown(ctx context.Context, _ order.Entry) error {
	if m.leaving.Swap(true) {
		return errLeaving
	}
	m.hold()
	poke(m.beat)
	return m.on.release(ctx, m)
}

// revalidate has what runs looked at while it serves.
func (m *membership) revalidate(ctx context.Context) error {
	var dep *deploy.Deployment
	m.board.set(func(b *board) { dep = b.active })
	if dep == nil {
		return errNothing
	}
	return m.on.revalidate(ctx, m, dep)
}

// drains says who has drained the node.
func (m *membership) drains(w work.Status) []control.Drain {
	ds := []control.Drain{}
	if since := m.on.drainedSince(); since != nil {
		ds = append(ds, control.Drain{By: byOperator, Since: *since})
	}
	if e := m.orderBook.Drain(); e != nil {
		ds = append(ds, control.Drain{By: byNetwork, Reason: e.Reason, Since: time.UnixMilli(e.Issued).UTC()})
	}
	if len(ds) == 0 && w.Draining {
		ds = append(ds, control.Drain{By: byAgent})
	}
	return ds
}

// lastOrders is what status shows of the network's orders.
func (m *membership) lastOrders() []control.Order {
	list := []control.Order{}
	for _, e := range m.orderBook.Last(shown) {
		list = append(list, control.Order{
			ID: e.ID.String(), Kind: string(e.Kind), Reason: e.Reason, Issued: time.UnixMilli(e.Issued).UTC(),
			Outcome: e.Outcome, Message: e.Message, Told: e.Told,
		})
	}
	return list
}
