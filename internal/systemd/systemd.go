// Package systemd owns the conversation with the account's service manager: the
// unit of the runtime over D-Bus, and what the agent says about itself
// (sd_notify). It is the only user of the manager's D-Bus interface.
//
// The rule it keeps: a call that changes a unit returns when systemd has done
// it, with the unit's own words when it failed. Nothing polls.
package systemd

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	sd "github.com/coreos/go-systemd/v22/dbus"

	"github.com/resultity/node/internal/durable"
)

// Conn is a connection to the account's service manager. Safe for concurrent
// use.
type Conn struct{ c *sd.Conn }

// Dial connects to the service manager of the calling user.
func Dial(ctx context.Context) (*Conn, error) {
	c, err := sd.NewUserConnectionContext(ctx)
	if err != nil {
		return nil, fmt.Errorf("no service manager for uid %d: %w; the account needs lingering (loginctl enable-linger), dbus-user-session, and XDG_RUNTIME_DIR in the environment", os.Getuid(), err)
	}
	return &Conn{c}, nil
}

// Close ends the connection. Running calls fail.
func (c *Conn) Close() { c.c.Close() }

// State is what the manager says of a unit.
type State struct {
	Load         string // loaded, not-found, bad-setting, …
	Active       string // active, inactive, activating, deactivating, failed, reloading
	Sub          string
	Result       string // why the service ended last: success, exit-code, watchdog, …
	StatusText   string // the service's own words
	ExitStatus   int    // of the main process
	NRestarts    int    // by the manager, since the unit was started by somebody
	MainPID      int
	InvocationID string    // one start of the unit; "" before the first
	Since        time.Time // when it became active; zero before that
}

// State asks about a unit. A unit that does not exist has Load "not-found".
func (c *Conn) State(ctx context.Context, unit string) (State, error) {
	// All interfaces of the unit at once: the generic one and the service's.
	p, err := c.c.GetAllPropertiesContext(ctx, unit)
	if err != nil {
		return State{}, fmt.Errorf("ask about %s: %w", unit, err)
	}
	return stateOf(p), nil
}

func stateOf(p map[string]any) State {
	str := func(k string) string { s, _ := p[k].(string); return s }
	s := State{
		Load: str("LoadState"), Active: str("ActiveState"), Sub: str("SubState"), Result: str("Result"), StatusText: str("StatusText"),
	}
	if n, ok := p["ExecMainStatus"].(int32); ok {
		s.ExitStatus = int(n)
	}
	if n, ok := p["NRestarts"].(uint32); ok {
		s.NRestarts = int(n)
	}
	if n, ok := p["MainPID"].(uint32); ok {
		s.MainPID = int(n)
	}
	if id, ok := p["InvocationID"].([]byte); ok && len(id) > 0 {
		s.InvocationID = fmt.Sprintf("%x", id)
	}
	if us, ok := p["ActiveEnterTimestamp"].(uint64); ok && us > 0 {
		s.Since = time.UnixMicro(int64(us))
	}
	return s
}

// Install makes name in dir hold text and has the manager read it. It reports
// whether anything changed. name is a Quadlet file: the service that Podman's
// generator makes of it must be loaded afterwards, since the generator drops a
// whole file, silently, for one key it does not know.
func (c *Conn) Install(ctx context.Context, dir, name string, text []byte) (changed bool, err error) {
	file := filepath.Join(dir, name)
	service := strings.TrimSuffix(name, ".container") + ".service"
	old, err := os.ReadFile(file)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return false, err
	}
	changed = err != nil || !bytes.Equal(old, text)
	if changed {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return false, err
		}
		if err := durable.WriteFile(file, text, 0o644); err != nil {
			return false, err
		}
	}
	s, err := c.State(ctx, service)
	if err != nil {
		return changed, err
	}
	if !changed && s.Load == "loaded" {
		return false, nil
	}
	if err := c.c.ReloadContext(ctx); err != nil {
		return changed, fmt.Errorf("daemon-reload: %w", err)
	}
	if s, err = c.State(ctx, service); err != nil {
		return changed, err
	}
	if s.Load != "loaded" {
		return changed, fmt.Errorf("%s is %s after a reload: Podman's generator did not take %s; see what it says: /usr/libexec/podman/quadlet -user -dryrun", service, s.Load, file)
	}
	return changed, nil
}

// Remove takes back what Install put there. The service must be stopped.
func (c *Conn) Remove(ctx context.Context, dir, name string) error {
	if err := os.Remove(filepath.Join(dir, name)); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		return err
	}
	return c.c.ReloadContext(ctx)
}

// Restart stops the unit if it runs, starts it, and returns when it is up.
func (c *Conn) Restart(ctx context.Context, unit string) error {
	return c.job(ctx, "start", unit, c.c.RestartUnitContext)
}

// Stop returns when the unit is down.
func (c *Conn) Stop(ctx context.Context, unit string) error {
	return c.job(ctx, "stop", unit, c.c.StopUnitContext)
}

// JobError says how the manager's job for a unit ended, and what the unit said.
type JobError struct {
	Verb, Unit string
	Outcome    string // failed, timeout, canceled, dependency, skipped
	State      State
}

func (e *JobError) Error() string {
	s := fmt.Sprintf("%s %s: %s", e.Verb, e.Unit, e.Outcome)
	if e.State.Result != "" && e.State.Result != "success" {
		s += fmt.Sprintf(", result %s, exit status %d", e.State.Result, e.State.ExitStatus)
	}
	if e.State.StatusText != "" {
		s += ", it said: " + e.State.StatusText
	}
	return s
}

type jobFunc = func(ctx context.Context, name, mode string, ch chan<- string) (int, error)

func (c *Conn) job(ctx context.Context, verb, unit string, f jobFunc) error {
	done := make(chan string, 1)
	if _, err := f(ctx, unit, "replace", done); err != nil {
		return fmt.Errorf("%s %s: %w", verb, unit, err)
	}
	select {
	case outcome := <-done:
		if outcome == "done" {
			return nil
		}
		s, err := c.State(ctx, unit)
		return errors.Join(&JobError{verb, unit, outcome, s}, err)
	case <-ctx.Done():
		return fmt.Errorf("%s %s: %w", verb, unit, ctx.Err())
	}
}

// ResetFailed clears the unit's failed state and its start counter.
func (c *Conn) ResetFailed(ctx context.Context, unit string) error {
	if err := c.c.ResetFailedUnitContext(ctx, unit); err != nil {
		return fmt.Errorf("reset-failed %s: %w", unit, err)
	}
	return nil
}

// Watch calls f at each change of the unit that the manager announces, until
// ctx ends (nil) or the connection is lost (an error). The call says only that
// something changed: f asks for the state, since changes may be merged. It
// returns with no call under way.
func (c *Conn) Watch(ctx context.Context, unit string, f func()) error {
	w, err := sd.NewUserConnectionContext(ctx)
	if err != nil {
		return err
	}
	defer w.Close()
	updates, errs := make(chan *sd.PropertiesUpdate, 64), make(chan error, 1)
	w.SetPropertiesSubscriber(updates, errs)
	if err := w.Subscribe(); err != nil {
		return fmt.Errorf("subscribe to unit changes: %w", err)
	}
	f() // what changed before the subscription
	// The library does not tell when the connection is lost; a call does.
	alive := time.NewTicker(30 * time.Second)
	defer alive.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case u := <-updates:
			if u.UnitName == unit {
				f()
			}
		case <-errs:
			f() // the buffer was full and something was missed
		case <-alive.C:
			if _, err := w.SystemStateContext(ctx); err != nil && ctx.Err() == nil {
				return fmt.Errorf("the service manager does not answer: %w", err)
			}
		}
	}
}
