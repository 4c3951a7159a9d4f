package agent

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/resultity/node/internal/bridge/contract"
	"github.com/resultity/node/internal/deploy"
	"github.com/resultity/node/internal/journal"
	"github.com/resultity/node/internal/quadlet"
	"github.com/resultity/node/internal/snapshot"
	"github.com/resultity/node/internal/systemd"
	"github.com/resultity/node/internal/work"
)

// An engine can be wrong in ways that systemd does not see: a hung one gets no
// watchdog messages and is killed, one that ends is started again, but one that
// answers garbage looks alive. This file is about that, and about what is left
// to do where starting again does not help.

// doubtWindow is how soon an engine that was suspect and has given the expected
// answers counts as suspect once more, and not anew.
const doubtWindow = 10 * time.Minute

// calm is how long a runtime is up when its next storm counts as the first.
const calm = time.Hour

// storms is how long a unit that has used up its starts is left alone.
var storms = []time.Duration{5 * time.Minute, 10 * time.Minute, 20 * time.Minute, 40 * time.Minute, time.Hour}

// errSuspect says that the engine fails the jobs of others than the validation.
var errSuspect = errors.New("its engine fails job after job")

// suspect implements machine. It is the worker's word that an engine fails job after job.
func (a *Agent) suspect(m *membership, active *work.Active, why string) {
	m.door.suspect(m.worker, active, why)
	poke(m.beat)
	poke(a.look)
}

// suspected looks at an engine that fails job after job: it is validated, where
// that is wrong or does not help restarted, and where that does not help either
// left alone for longer each time.
func (u *updater) suspected(ctx context.Context, why string) {
	dep := u.active
	if time.Since(u.admitted) > doubtWindow {
		u.doubts = 0
	}
	u.doubts++
	u.log.Warn("the engine is suspect and gets no more jobs", journal.RuntimeSuspect.Attr(), "reason", why, "times", u.doubts)
	var err error
	if u.doubts == 1 {
		err = u.judge(ctx, dep, nil, byDoubt)
	} else if err = u.idle(ctx); err == nil {
		err = u.discard(ctx, dep, &deploy.Error{Step: deploy.StepValidate, Err: fmt.Errorf("%w: %s", errSuspect, why)})
	}
	switch {
	case err == nil:
		u.admitted = time.Now()
	case ctx.Err() != nil:
	case u.doubts <= 2:
		u.build = backoff{}
	default:
		u.build = backoff{try: u.doubts - 3}
		u.build.failedOn(rarely)
	}
}

// discard stops a deployment that must not go on, and has all that it is made of
// looked at anew before the next start. The error is why, and what went wrong
// with the stop.
func (u *updater) discard(ctx context.Context, dep *deploy.Deployment, why error) error {
	u.setActive(nil, failed)
	u.report(dep.Snapshot(), why)
	u.log.Warn("the runtime is stopped and started anew", journal.RuntimeReplaced.Attr(), "reason", why)
	u.build.failed()
	delete(u.plans, dep.Snapshot().Digest())
	return errors.Join(why, u.units.Stop(ctx, quadlet.ServiceName))
}

// replace stops the runtime, whatever it is doing, and has it brought up again
// at the next look: somebody wants it.
func (u *updater) replace(ctx context.Context, reason string) error {
	if err := u.idle(ctx); err != nil {
		return err
	}
	u.setActive(nil, starting)
	u.log.Info("the runtime is stopped and started anew", journal.RuntimeReplaced.Attr(), "reason", reason)
	if err := u.units.Stop(ctx, quadlet.ServiceName); err != nil {
		return err
	}
	u.build = backoff{}
	for _, st := range u.standing {
		st.fetch, st.again = backoff{}, backoff{}
	}
	u.doubts, u.storms = 0, 0
	return nil
}

// storming notes that the unit has used up its starts, after which systemd does
// nothing more. At the agent's own start that is no reason to wait.
func (u *updater) storming(unit systemd.State, cur, want *snapshot.Snapshot) {
	// Where it has restarted the unit by itself, systemd leaves the result of the
	// last end and says only in its log that there were too many starts.
	spent := unit.Active == "failed" && (unit.Result == "start-limit-hit" || unit.StartLimit > 0 && unit.NRestarts >= unit.StartLimit)
	first := !u.looked
	u.looked = true
	if !spent || unit.InvocationID == u.storm {
		return
	}
	u.storm = unit.InvocationID
	if first {
		return
	}
	if time.Since(u.admitted) > calm {
		u.storms = 0
	}
	u.build = backoff{try: u.storms}
	u.build.failedOn(storms)
	u.storms++
	u.down = true // what is newer gets its turn
	err := &stormError{unit, u.build.at}
	if u.good == want.Digest() || cur == nil {
		u.report(want, &deploy.Error{Step: deploy.StepStart, Err: err})
	}
	u.log.Error("the runtime ends again and again", journal.RuntimeStorm.Attr(), "error", err)
}

// stormError says that a unit ends again and again.
type stormError struct {
	unit systemd.State
	next time.Time // when it is tried again
}

func (e *stormError) Error() string {
	s := fmt.Sprintf("it ended %d times within %v; last exit status %d", e.unit.StartLimit, e.unit.StartWindow, e.unit.ExitStatus)
	if e.unit.StatusText != "" {
		s += ": " + e.unit.StatusText
	}
	return s
}

func (e *stormError) remedy() string {
	return fmt.Sprintf("journalctl _SYSTEMD_USER_UNIT=%s has the engine's own words; it is tried again at %s, or at once with resultityctl restart", quadlet.ServiceName, e.next.UTC().Format("15:04 MST"))
}

// Restart implements [control.Backend].
func (a *Agent) Restart(ctx context.Context) error {
	err := a.steer(ctx, func(u *updater) error { u.renew = true; return nil })
	poke(a.look)
	return err
}

// lossOf says in the catalog's terms why a runtime was lost.
func lossOf(unit systemd.State) *journal.Event {
	switch {
	case unit.Result == "oom-kill":
		return journal.MemoryExceeded
	case unit.Result == "exit-code" && unit.ExitStatus == contract.ExitSandbox:
		return journal.SandboxRefused
	}
	return journal.RuntimeLost
}
