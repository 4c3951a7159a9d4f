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
	last  *control.Validation
	next  time.Time                             // on schedule; zero while nothing serves
	count map[string]struct{ good, bad uint64 } // by cause, since the agent's start

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
			wait = time.Until(next)
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
	case errors.Is(err, errReplaced), errors.Is(err, errCrowded):
		m.log.Info("not validated on schedule", "reason", err)
	default: // the update loop has said why
	}
}

// errCrowded says that the engine had no slot free for a validation. It works, by
// that, and has given its jobs answers.
var errCrowded = errors.New("the engine's slots were all taken, for as long as a job may last")

// recheck implements machine. The golden requests are put to the engine beside
// jobs, in a slot as a job has. Answers that are wrong then are asked for once more
// while it does nothing else: only those are the engine's fault, and not that of
// the company which the requests had in a batch. Of a network that has a part in
// another one's runtime only its own jobs are waited for: it cannot stop the other's.
func (a *Agent) recheck(ctx context.Context, m *membership, dep *deploy.Deployment) error {
	var d deployer
	err := a.inUpdates(ctx, func(u *updater, _ context.Context) error {
		if !m.board.servesAs(dep) {
			return errReplaced
		}
		d = u.deployer
		return nil
	})
	if err != nil {
		return err
	}
	c := dep.Snapshot().Config()
	hctx, cancel := context.WithTimeout(ctx, c.Limits.Deadline.Duration())
	release, err := a.slots.Hold(hctx, c.Runtime.Settings.Slots)
	cancel()
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case err != nil:
		return errCrowded
	}
	alone := a.slots.Alone(1)
	print, err := d.Validate(ctx, dep)
	if !alone() {
		print = digest.Digest{}
	}
	release()
	if err == nil {
		m.validated(bySchedule, dep, print, nil)
		return nil
	}
	unit, unitErr := a.units.State(ctx, quadlet.ServiceName)
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case unitErr != nil:
		return fmt.Errorf("%w; and %w", err, unitErr)
	case !dep.Current(unit):
		return errReplaced // the engine has ended; what becomes of that is the update loop's
	}
	m.log.Warn("a golden answer is wrong, beside jobs; it is asked for again alone", "error", err)
	return a.validateAgain(ctx, m, dep, nil, bySchedule)
}

// validateAgain validates a deployment that serves, without jobs of its network, and
// while its engine does nothing else at all if the network leads; damage says that its
// files are not what they were.
func (a *Agent) validateAgain(ctx context.Context, m *membership, dep *deploy.Deployment, damage error, cause string) error {
	return a.inUpdates(ctx, func(u *updater, ctx context.Context) error {
		switch owner := u.owner(); {
		case owner == nil || m == owner:
			return u.judge(ctx, dep, damage, cause)
		case !m.board.serves(dep.Snapshot()):
			return errReplaced
		case damage != nil: // it is the machine's own finding, and the files are everybody's
			return u.judge(ctx, u.active, damage, cause)
		}
		return u.rejoin(ctx, m, dep, cause)
	})
}
