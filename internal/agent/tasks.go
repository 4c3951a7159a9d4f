package agent

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/resultity/node/internal/deploy"
	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/image"
	"github.com/resultity/node/internal/model"
	"github.com/resultity/node/internal/quadlet"
)

// This file is what others have the update loop do.

// validating is a phase of the runtime: it runs and is being looked at.
const validating = "validating"

// task is something that only the update loop may do.
type task struct {
	do   func(context.Context, *updater) error
	done chan error // capacity 1
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
		return u.led.board.why()
	}
	return nil
}

// revalidate implements machine. It reads the model's files and the image again
// while they are served, and then has the golden requests repeated. A disk that
// does not answer is no damage: what was verified when it was started goes on, and
// the network hears why.
func (a *Agent) revalidate(ctx context.Context, m *membership, dep *deploy.Deployment) error {
	if d := m.mustRest(); d > 0 {
		return fmt.Errorf("%w; it can order the next in %v", errTooSoon, d.Round(time.Second)+time.Second)
	}
	end := m.use()
	damage := a.verify(ctx, dep.Snapshot())
	end()
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case damage != nil && !errors.Is(damage, digest.ErrMismatch) && !errors.Is(damage, model.ErrIncomplete) && !errors.Is(damage, image.ErrAltered):
		return fmt.Errorf("%w: %w", errUnread, damage)
	}
	return a.validateAgain(ctx, m, dep, damage, byOrder)
}

var errUnread = errors.New("the files could not be read, and nothing is known to be wrong with them: the node goes on")

var errReplaced = errors.New("the runtime was replaced meanwhile, and validated with that")

// judge takes dep out of service if its files are damaged or its answers wrong.
// The runtime is stopped then, since it may hold what is no longer in the store,
// and brought up again by the ordinary steps, which fetch and validate all anew.
func (u *updater) judge(ctx context.Context, dep *deploy.Deployment, damage error, cause string) error {
	if u.active != dep {
		return errReplaced
	}
	err := damage
	if err != nil {
		e := &deploy.Error{Step: deploy.StepModel, Model: dep.Model(), Err: damage}
		if errors.Is(damage, image.ErrAltered) {
			e.Step, e.Model = deploy.StepImage, digest.Digest{}
		}
		for _, m := range u.members {
			m.board.damage(e.Model)
		}
		err = e
	} else {
		defer u.memberOf(dep.Snapshot()).use()()
		if err := u.idle(ctx); err != nil {
			return err
		}
		u.setActive(nil, validating)
		hctx, cancel := context.WithTimeout(ctx, slotPatience) // jobs that are past their deadlines take no longer to end
		release, busy := u.slots.HoldAll(hctx, dep.Snapshot().Config().Runtime.Settings.Slots)
		cancel()
		var print digest.Digest
		print, err = u.deployer.Validate(ctx, dep)
		if busy == nil {
			release()
		} else {
			print = digest.Digest{}
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if busy != nil && cause != byDoubt && stepOf(err) == deploy.StepValidate && u.stillCurrent(ctx, dep, err) == nil {
			u.setActive(dep, active)
			return fmt.Errorf("%w: %w", errUndecided, err)
		}
		u.memberOf(dep.Snapshot()).validated(cause, dep, print, err)
		if err == nil {
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

// errOthers says that an order is about what is not its network's.
var errOthers = errors.New("the runtime is run for another network of this node's operator; it is not this one's to restart")

// restart implements machine. A network can have its own runtime restarted, not
// the one that it has a part in.
func (a *Agent) restart(ctx context.Context, m *membership) error {
	return a.inUpdates(ctx, func(u *updater, ctx context.Context) error {
		if owner := u.owner(); owner != nil && owner != m {
			return errOthers
		}
		return u.restart(ctx)
	})
}

// release implements machine. Where the node is in no other network, it stops the
// runtime, and the update loop does nothing more, or it would bring the runtime up
// again. Else the network's own jobs end, and the loop goes on without it.
func (a *Agent) release(ctx context.Context, m *membership) error {
	down := make(chan error, 1)
	t := task{func(ctx context.Context, u *updater) error {
		if !a.alone(m) {
			down <- u.forsake(ctx, m)
			return nil
		}
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

// alone reports whether no other network has a part in this machine any more.
func (a *Agent) alone(m *membership) bool {
	for _, o := range a.members {
		if o != m && !o.leaving.Load() {
			return false
		}
	}
	return true
}

// quiet lets no more jobs of one network to the runtime, and waits until those
// that run have ended or are past their deadlines. It fails only with ctx.
func (u *updater) quiet(ctx context.Context, m *membership) error {
	m.door.shut(m.worker)
	poke(m.beat)
	ictx, cancel := context.WithDeadline(ctx, m.worker.Deadline())
	defer cancel()
	if err := m.worker.Idle(ictx); err != nil && ctx.Err() == nil {
		m.log.Warn("jobs are past their deadlines", "error", err)
	}
	return ctx.Err()
}

// forsake ends a network's part in what runs. That goes on as it is until what
// another network wants is ready.
func (u *updater) forsake(ctx context.Context, m *membership) error {
	if err := u.quiet(ctx, m); err != nil {
		return err
	}
	if m != u.owner() {
		u.admit(m, nil, stopped)
	}
	poke(u.look)
	return nil
}
