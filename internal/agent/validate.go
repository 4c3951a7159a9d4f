package agent

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"time"

	"github.com/resultity/node/internal/control"
	"github.com/resultity/node/internal/deploy"
	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/journal"
	"github.com/resultity/node/internal/quadlet"
	"github.com/resultity/node/internal/snapshot"
)

// This file is about the golden requests of what serves: when they are repeated,
// and what is remembered of them. Nothing of that outlives the agent; a start
// validates anew.

// Why a validation was made, in the words of [control.Validation].
const (
	byInstallation = "installation"
	bySchedule     = "schedule"
	byOrder        = "order"
	byDoubt        = "doubt" // the engine has failed job after job, or its files are said to be damaged
)

var causes = []string{byInstallation, bySchedule, byOrder, byDoubt}

// validated is what is known of a network's validations. Guarded by board.mu.
type validated struct {
	last      *control.Validation
	next      time.Time // on schedule; zero while nothing serves
	allowance allowance
	count     map[string]struct{ good, bad uint64 } // by cause, since the agent's start

	print   digest.Digest      // fingerprint of the last validation during which the engine did nothing else
	printOf *deploy.Deployment // that it was of
}

// validated notes how a validation of d, or of what did not become one, has ended.
// A zero print is of one beside which the engine had other work.
func (m *membership) validated(cause string, d *deploy.Deployment, print digest.Digest, err error) {
	now := time.Now()
	m.board.set(func(b *board) {
		v := &b.validated
		v.last = &control.Validation{At: now.UTC().Truncate(time.Second), Cause: cause, Passed: err == nil}
		if v.count == nil {
			v.count = map[string]struct{ good, bad uint64 }{}
		}
		n := v.count[cause]
		if err != nil {
			v.last.Error = err.Error()
			n.bad++
		} else {
			n.good++
			v.next = now.Add(jittered(d.Snapshot().Config().Validation.Every()))
			if !print.IsZero() {
				v.print, v.printOf = print, d
			}
		}
		v.count[cause] = n
	})
	poke(m.recheck)
	poke(m.beat)
}

// validationCounts returns how many validations have ended well, and otherwise, by
// cause.
func (b *board) validationCounts() map[string]struct{ good, bad uint64 } {
	b.mu.Lock()
	defer b.mu.Unlock()
	return maps.Clone(b.validated.count)
}

// validation is what status shows of the last validation; nil before the first.
func (b *board) validation() *control.Validation {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.validated.last == nil {
		return nil
	}
	v := *b.validated.last
	if b.active != nil && !b.validated.next.IsZero() {
		v.Next = new(b.validated.next.UTC().Truncate(time.Second))
	}
	return &v
}

// validations repeats the golden requests of what serves, at the interval of the
// network's configuration, so that nodes do not do it at one time. Any other
// validation begins the interval anew.
func (m *membership) validations(ctx context.Context) error {
	for {
		var dep *deploy.Deployment
		var next time.Time
		m.board.set(func(b *board) { dep, next = b.active, b.validated.next })
		wait := time.Hour // somebody pokes when there is something to validate
		if dep != nil && !next.IsZero() {
			wait = max(time.Until(next), m.mustRest())
		}
		if wait <= 0 {
			m.board.set(func(b *board) {
				b.validated.next = time.Now().Add(jittered(dep.Snapshot().Config().Validation.Every()))
			})
			if !m.worker.Status().Draining { // nobody is to be harmed by what it would find
				m.onSchedule(ctx, dep)
			}
			continue
		}
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil
		case <-m.recheck:
		case <-timer.C:
		}
		timer.Stop()
	}
}

// onSchedule validates a deployment once, beside its jobs.
func (m *membership) onSchedule(ctx context.Context, dep *deploy.Deployment) {
	switch err := m.on.recheck(ctx, m, dep); {
	case ctx.Err() != nil:
	case err == nil:
		m.log.Info("validated on schedule", journal.Validated.Attr(), "version", dep.Snapshot().Version())
	case errors.Is(err, errReplaced), errors.Is(err, errCrowded), errors.Is(err, errUndecided):
		m.log.Info("not validated on schedule", journal.NotValidated.Attr(), "code", reasonCode(err), "reason", err)
	default: // the update loop has said why
	}
}

// Why a validation is none.
var (
	// errCrowded says that the engine had no slot free for a validation. It works, by
	// that, and has given its jobs answers.
	errCrowded = errors.New("the engine's slots were all taken, for as long as a job may last")

	// errUndecided says that answers were wrong beside other requests, and could not be
	// asked for without. Engines compute requests in batches, and a sum in a batch may
	// have other last bits: that condemns nothing.
	errUndecided = errors.New("answers were not the expected ones while the engine had other requests too, and it was never idle to ask it for them alone")

	errTooSoon = errors.New("a network has a tenth of the node's time for validations, and this one has had its part")
)

// quietPatience is how long the engine is waited for to have nothing to do.
const quietPatience = time.Minute

// allowance is what a network may still use of the node's time for validations: one
// part in [snapshot.ValidationShare], and a little at once. Its golden requests hold
// slots of an engine that may serve others, and a doubt stops all jobs for a while.
// The zero value is a full one.
type allowance struct {
	used time.Duration // of what is given, as of at
	at   time.Time
}

// atOnce is what a network may use in one go that has not used anything for long.
const atOnce = time.Minute

// spend takes from the allowance.
func (a *allowance) spend(d time.Duration, now time.Time) {
	a.used, a.at = a.usedAt(now)+d, now
}

func (a *allowance) usedAt(now time.Time) time.Duration {
	return max(0, a.used-now.Sub(a.at)/snapshot.ValidationShare)
}

// wait is how long nothing more may be used; 0 for something may.
func (a *allowance) wait(now time.Time) time.Duration {
	return max(0, a.usedAt(now)-atOnce) * snapshot.ValidationShare
}

// use begins what counts as time that the network has used for validations, until
// the function that it returns is called.
func (m *membership) use() (end func()) {
	began := time.Now()
	return func() {
		m.board.set(func(b *board) { b.validated.allowance.spend(time.Since(began), time.Now()) })
	}
}

// mustRest is how long the network has nothing more validated beside the jobs of
// others; 0 for not at all.
func (m *membership) mustRest() (d time.Duration) {
	m.board.set(func(b *board) { d = b.validated.allowance.wait(time.Now()) })
	return d
}

// recheck implements machine. The golden requests are put to the engine beside
// jobs, in a slot as a job has. Answers that are wrong then are asked for once more
// while it does nothing else: only those are the engine's fault, and not that of
// the company which the requests had in a batch.
func (a *Agent) recheck(ctx context.Context, m *membership, dep *deploy.Deployment) error {
	d, err := a.deployerOf(ctx, m, dep)
	if err != nil {
		return err
	}
	print, err := a.beside(ctx, m, d, dep, dep.Snapshot().Config().Limits.Deadline.Duration())
	switch {
	case err == nil:
		m.validated(bySchedule, dep, print, nil)
		return nil
	case stepOf(err) != deploy.StepValidate:
		return err
	}
	if err := a.stillCurrent(ctx, dep, err); err != nil {
		return err
	}
	m.log.Warn("a golden answer is wrong, beside jobs; it is asked for again alone", journal.ValidationDoubted.Attr(), "error", err)
	return a.validateAgain(ctx, m, dep, nil, bySchedule)
}

// deployerOf returns the update loop's deployer, if a network's deployment still serves.
func (a *Agent) deployerOf(ctx context.Context, m *membership, dep *deploy.Deployment) (d deployer, err error) {
	err = a.inUpdates(ctx, func(u *updater, _ context.Context) error {
		if !m.board.servesAs(dep) {
			return errReplaced
		}
		d = u.deployer
		return nil
	})
	return d, err
}

// beside puts the golden requests to the engine in a slot that is waited for, whatever
// else it does. The fingerprint is zero if it did something else.
func (a *Agent) beside(ctx context.Context, m *membership, d deployer, dep *deploy.Deployment, patience time.Duration) (digest.Digest, error) {
	hctx, cancel := context.WithTimeout(ctx, patience)
	release, err := a.slots.Hold(hctx, dep.Snapshot().Config().Runtime.Settings.Slots)
	cancel()
	switch {
	case ctx.Err() != nil:
		if err == nil {
			release()
		}
		return digest.Digest{}, ctx.Err()
	case err != nil:
		return digest.Digest{}, errCrowded
	}
	defer release()
	defer m.use()()
	if !m.board.servesAs(dep) {
		return digest.Digest{}, errReplaced // while the slot was waited for
	}
	alone := a.slots.Alone(1)
	print, err := d.Validate(ctx, dep)
	if !alone() {
		print = digest.Digest{}
	}
	return print, err
}

// stillCurrent says why a wrong answer is not held against a deployment: its engine has
// ended, and what becomes of that is the update loop's.
func (a *Agent) stillCurrent(ctx context.Context, dep *deploy.Deployment, wrong error) error {
	unit, err := a.units.State(ctx, quadlet.ServiceName)
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case err != nil:
		return fmt.Errorf("%w; and %w", wrong, err)
	case !dep.Current(unit):
		return errReplaced
	}
	return nil
}

// validateAgain validates a deployment that serves, while its engine does nothing
// else at all; damage says that its files are not what they were. The network that
// leads has all jobs wait for that. Another one waits until there are none: it cannot
// stop the other's, and what it cannot learn so condemns nothing.
func (a *Agent) validateAgain(ctx context.Context, m *membership, dep *deploy.Deployment, damage error, cause string) error {
	leads, err := false, error(nil)
	err = a.inUpdates(ctx, func(u *updater, ctx context.Context) error {
		owner := u.owner()
		switch leads = owner == nil || m == owner; {
		case leads:
			return u.judge(ctx, dep, damage, cause)
		case !m.board.servesAs(dep):
			return errReplaced
		case damage != nil: // it is the machine's own finding, and the files are everybody's
			return u.judge(ctx, u.active, damage, cause)
		}
		return nil
	})
	if leads || damage != nil || err != nil {
		return err
	}
	d, err := a.deployerOf(ctx, m, dep)
	if err != nil {
		return err
	}
	hctx, cancel := context.WithTimeout(ctx, quietPatience)
	release, err := a.slots.HoldAll(hctx, dep.Snapshot().Config().Runtime.Settings.Slots)
	cancel()
	var print digest.Digest
	switch {
	case ctx.Err() != nil:
		if err == nil {
			release()
		}
		return ctx.Err()
	case err == nil:
		end := m.use()
		print, err = d.Validate(ctx, dep)
		end()
		release()
	case cause == byOrder: // beside others it may be right, too
		if print, err = a.beside(ctx, m, d, dep, slotPatience); stepOf(err) == deploy.StepValidate {
			err = fmt.Errorf("%w: %w", errUndecided, err)
		}
	default:
		err = errUndecided
	}
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case err == nil:
		m.validated(cause, dep, print, nil)
		return nil
	case errors.Is(err, errUndecided), stepOf(err) != deploy.StepValidate:
		return err
	}
	if err := a.stillCurrent(ctx, dep, err); err != nil {
		return err
	}
	return a.inUpdates(ctx, func(u *updater, ctx context.Context) error {
		if !m.board.servesAs(dep) {
			return errReplaced
		}
		m.validated(cause, nil, digest.Digest{}, err)
		u.dismiss(m, dep.Snapshot(), err)
		return err
	})
}
