package agent

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/resultity/node/internal/control"
	"github.com/resultity/node/internal/deploy"
	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/evm"
	"github.com/resultity/node/internal/failpoint"
	"github.com/resultity/node/internal/journal"
	"github.com/resultity/node/internal/model"
	"github.com/resultity/node/internal/order"
	"github.com/resultity/node/internal/quadlet"
	"github.com/resultity/node/internal/wire"
	"github.com/resultity/node/internal/work"
)

const (
	maxInbox = 128 // messages about orders that wait for the disk
	maxLong  = 4   // orders at once that take time
	shown    = 10  // orders in status
)

// validating is a phase of the runtime: it runs and is being looked at.
const validating = "validating"

// task is something that only the update loop may do.
type task struct {
	do   func(context.Context, *updater) error
	done chan error // capacity 1
}

// openBook opens the memory of the network's orders.
func (a *Agent) openBook(path string) (err error) {
	a.orderBook, err = order.Open(path, a.cfg.Network.Name, a.key.Address(), failpoint.Now)
	if errors.Is(err, order.ErrCorrupt) {
		return &finalError{journal.StoreRefused, err}
	}
	return err
}

// post hands a message to the loop of orders. One that finds no room is as good
// as lost on the way: the network sends it again in the next session.
func (a *Agent) post(m wire.Message) {
	select {
	case a.inbox <- m:
	default:
		a.log.Warn("more orders than can be written down", journal.OrderRefused.Attr(), "type", m.Type())
	}
}

// orders carries out what the network orders, in the order of arrival; what
// takes time goes on beside. It returns when ctx has ended and nothing goes on.
func (a *Agent) orders(ctx context.Context) error {
	var long sync.WaitGroup
	defer long.Wait()
	slots := make(chan struct{}, maxLong)
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-a.retell:
			for _, d := range a.orderBook.Untold() {
				a.answer(d)
			}
		case m := <-a.inbox:
			switch m := m.(type) {
			case *wire.OrderAck:
				if err := a.orderBook.Told(m.ID); err != nil {
					a.log.Error("acknowledgement not stored; the outcome is told again", journal.StorageFailed.Attr(), "order", m.ID, "error", err)
				}
			case *wire.Order:
				e, do := a.begin(m)
				if do == nil {
					continue
				}
				if !takesTime(e.Kind) {
					a.conclude(e, do(ctx))
					continue
				}
				select {
				case slots <- struct{}{}:
				default:
					a.conclude(e, fmt.Errorf("%d other orders are being carried out", maxLong))
					continue
				}
				long.Go(func() {
					defer func() { <-slots }()
					err := do(ctx)
					if ctx.Err() != nil {
						return // the next start finds it cut short
					}
					a.conclude(e, err)
					if e.Kind == wire.OrderShutdown && !errors.Is(err, errLeaving) {
						a.halt <- struct{}{}
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
func (a *Agent) begin(o *wire.Order) (order.Entry, func(context.Context) error) {
	s := a.board.snapshot()
	e, known, err := a.orderBook.Begin(o, func(k evm.Address) bool { return s != nil && trusted(s)(k) })
	var refused *order.Refusal
	switch {
	case errors.As(err, &refused):
		a.log.Warn("order refused", journal.OrderRefused.Attr(), "order", o.ID, "reason", refused.Reason)
		a.answer(&wire.OrderDone{ID: o.ID, Outcome: wire.OutcomeRefused, Message: wire.Cut(refused.Reason, wire.MaxOrderMessage)})
		return e, nil
	case err != nil:
		a.log.Error("order not written down", journal.StorageFailed.Attr(), "order", o.ID, "error", err)
		a.answer(&wire.OrderDone{ID: o.ID, Outcome: wire.OutcomeRefused, Message: "the node cannot write it down"})
		return e, nil
	case known && e.Outcome == order.Begun: // its answer comes
		return e, nil
	case known:
		a.answer(e.Done())
		return e, nil
	}
	k := a.kinds()[e.Kind]
	fields := []any{k.event.Attr(), "order", e.ID, "reason", e.Reason}
	if e.Kind == wire.OrderPenalty {
		fields = append(fields, "until", time.UnixMilli(e.Until).UTC().Format(time.RFC3339))
	}
	a.log.Warn("order of the network: "+string(e.Kind), fields...)
	return e, func(ctx context.Context) error { return k.do(ctx, e) }
}

// kind is what is done for a kind of order.
type kind struct {
	event *journal.Event
	do    func(context.Context, order.Entry) error
}

func (a *Agent) kinds() map[wire.OrderKind]kind {
	nothing := func(context.Context, order.Entry) error { return nil } // to be remembered is all
	return map[wire.OrderKind]kind{
		wire.OrderDrain:      {journal.OrderDrain, nothing},
		wire.OrderResume:     {journal.OrderResume, nothing},
		wire.OrderPenalty:    {journal.OrderPenalty, nothing},
		wire.OrderRestart:    {journal.OrderRestart, func(ctx context.Context, _ order.Entry) error { return a.inUpdates(ctx, (*updater).restart) }},
		wire.OrderRevalidate: {journal.OrderRevalidate, func(ctx context.Context, _ order.Entry) error { return a.revalidate(ctx) }},
		wire.OrderShutdown:   {journal.OrderShutdown, a.shutDown},
		wire.OrderLogs:       {journal.OrderLogs, func(ctx context.Context, _ order.Entry) error { return a.uploadLogs(ctx) }},
	}
}

// conclude writes down what became of an order, puts it in force and tells the
// network.
func (a *Agent) conclude(e order.Entry, err error) {
	e, failed := a.orderBook.Finish(e.ID, err)
	if failed != nil {
		// It stays begun, and has failed at the next start.
		a.log.Error("outcome of an order not stored", journal.StorageFailed.Attr(), "order", e.ID, "error", failed)
		return
	}
	if err != nil {
		a.log.Error("order failed", journal.OrderFailed.Attr(), "order", e.ID, "kind", e.Kind, "error", err)
	} else {
		a.log.Info("order done", journal.OrderDone.Attr(), "order", e.ID, "kind", e.Kind)
	}
	a.hold()
	poke(a.beat)
	a.answer(e.Done())
}

// hold tells the worker whether the network lets it take jobs. Who shuts down
// takes none, whatever is ordered.
func (a *Agent) hold() {
	a.holding.Lock() // or one who looked earlier could speak last
	defer a.holding.Unlock()
	a.worker.Hold(a.leaving.Load() || a.orderBook.Drain() != nil)
}

// answer tells the network, if there is a session; else the next one does.
func (a *Agent) answer(d *wire.OrderDone) {
	if err := a.session.Send(d); err != nil {
		a.log.Debug("not sent", "type", d.Type(), "error", err)
	}
}

// inUpdates has the update loop do something and waits for it.
func (a *Agent) inUpdates(ctx context.Context, do func(*updater, context.Context) error) error {
	t := task{func(ctx context.Context, u *updater) error { return do(u, ctx) }, make(chan error, 1)}
	select {
	case a.tasks <- t:
	case <-ctx.Done():
		return ctx.Err()
	}
	select {
	case err := <-t.done:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

var errNothing = errors.New("no runtime is active; resultityctl status says why")

// restart has the runtime started anew and validated.
func (u *updater) restart(ctx context.Context) error {
	if err := u.replace(ctx, "the network has ordered it"); err != nil {
		return err
	}
	u.reconcile(ctx)
	if u.active == nil {
		return u.board.why()
	}
	return nil
}

// revalidate hashes the model's files while they are served, and then has the
// golden requests repeated. A disk that does not answer is no damage: what was
// verified when it was started goes on, and the network hears why.
func (a *Agent) revalidate(ctx context.Context) error {
	var dep *deploy.Deployment
	a.board.set(func(b *board) { dep = b.active })
	if dep == nil {
		return errNothing
	}
	damage := a.verify(ctx, dep.Snapshot())
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case damage != nil && !errors.Is(damage, digest.ErrMismatch) && !errors.Is(damage, model.ErrIncomplete):
		return fmt.Errorf("the files could not be read, and nothing is known to be wrong with them: the node goes on: %w", damage)
	}
	return a.inUpdates(ctx, func(u *updater, ctx context.Context) error { return u.judge(ctx, dep, damage) })
}

// judge takes dep out of service if its files are damaged or its answers wrong.
// The runtime is stopped then, since it may hold what is no longer in the store,
// and brought up again by the ordinary steps, which fetch and validate all anew.
func (u *updater) judge(ctx context.Context, dep *deploy.Deployment, damage error) error {
	if u.active != dep {
		return errors.New("the runtime was replaced meanwhile, and validated with that")
	}
	err := damage
	if err != nil {
		err = &deploy.Error{Step: deploy.StepModel, Err: damage}
	} else {
		if err := u.idle(ctx); err != nil {
			return err
		}
		u.setActive(nil, validating)
		if err = u.deployer.Validate(ctx, dep); err == nil {
			u.setActive(dep, active)
			return nil
		}
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return u.discard(ctx, dep, err)
}

// why returns the reason for which nothing is active.
func (b *board) why() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.failed != nil {
		return b.failed
	}
	return errNothing
}

var errLeaving = errors.New("another order to shut down is being carried out")

// shutDown finishes the jobs and stops the runtime; the agent ends when that has
// been told. The update loop does nothing more, or it would bring the runtime up
// again.
func (a *Agent) shutDown(ctx context.Context, _ order.Entry) error {
	if a.leaving.Swap(true) {
		return errLeaving
	}
	a.hold()
	poke(a.beat)
	down := make(chan error, 1)
	t := task{func(ctx context.Context, u *updater) error {
		err := u.idle(ctx)
		if err == nil {
			u.setActive(nil, stopped)
			err = u.units.Stop(ctx, quadlet.ServiceName)
		}
		down <- err
		<-ctx.Done()
		return nil
	}, make(chan error, 1)}
	select {
	case a.tasks <- t:
	case <-ctx.Done():
		return ctx.Err()
	}
	select {
	case err := <-down:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// drains says who has drained the node.
func (a *Agent) drains(w work.Status) []control.Drain {
	ds := []control.Drain{}
	if since := a.drained.Load(); since != nil {
		ds = append(ds, control.Drain{By: byOperator, Since: *since})
	}
	if e := a.orderBook.Drain(); e != nil {
		ds = append(ds, control.Drain{By: byNetwork, Reason: e.Reason, Since: time.UnixMilli(e.Issued).UTC()})
	}
	if len(ds) == 0 && w.Draining {
		ds = append(ds, control.Drain{By: byAgent})
	}
	return ds
}

// lastOrders is what status shows of the network's orders.
func (a *Agent) lastOrders() []control.Order {
	list := []control.Order{}
	for _, e := range a.orderBook.Last(shown) {
		list = append(list, control.Order{
			ID: e.ID.String(), Kind: string(e.Kind), Reason: e.Reason, Issued: time.UnixMilli(e.Issued).UTC(),
			Outcome: e.Outcome, Message: e.Message, Told: e.Told,
		})
	}
	return list
}
