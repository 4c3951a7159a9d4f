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
	"math"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"time"

	sd "github.com/coreos/go-systemd/v22/dbus"
	"github.com/godbus/dbus/v5"

	"github.com/resultity/node/internal/durable"
	"github.com/resultity/node/internal/failpoint"
)

// Conn talks to the service manager of one account. It connects again by
// itself after the bus was restarted. Safe for concurrent use.
type Conn struct {
	mu   sync.Mutex // guards link, also while it is made
	link *link
}

// link is one connection to the bus.
type link struct {
	*sd.Conn
	lost chan struct{} // closed when the bus has hung up
}

// Dial connects to the service manager of the calling user. The connection
// lasts until [Conn.Close], also beyond ctx.
func Dial(ctx context.Context) (*Conn, error) {
	c := new(Conn)
	if _, err := c.conn(ctx); err != nil {
		return nil, err
	}
	return c, nil
}

// Close ends the connection. Running calls fail.
func (c *Conn) Close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.link != nil {
		c.link.Close()
	}
}

// conn returns a connection that was alive a moment ago.
func (c *Conn) conn(ctx context.Context) (*link, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.link != nil {
		if c.link.Connected() {
			return c.link, nil
		}
		c.link.Close()
	}
	lost := make(chan struct{})
	var once sync.Once
	conn, err := sd.NewConnection(func() (*dbus.Conn, error) {
		// A stop of the agent ends ctx long before its last call.
		bus, err := dialBus(context.WithoutCancel(ctx))
		if err == nil {
			context.AfterFunc(bus.Context(), func() { once.Do(func() { close(lost) }) })
		}
		return bus, err
	})
	if err != nil {
		return nil, err
	}
	c.link = &link{conn, lost}
	return c.link, nil
}

// busPatience is how long the bus may take to let us in; tests are less patient.
var busPatience = 10 * time.Second

var errSilent = errors.New("the bus does not answer")

// dialBus opens a connection to the account's bus that lasts as long as ctx.
// It never starts a bus: a sandboxed agent starts no programs.
func dialBus(ctx context.Context) (*dbus.Conn, error) {
	ctx, hangUp := context.WithCancel(ctx)
	impatient := time.AfterFunc(busPatience, hangUp)
	bus, err := dbus.SessionBusPrivateNoAutoStartup(dbus.WithContext(ctx))
	if err == nil {
		// The numeric user id; names need a database that may not be there.
		if err = bus.Auth([]dbus.Auth{dbus.AuthExternal(fmt.Sprint(os.Getuid()))}); err == nil {
			err = bus.Hello()
		}
		if !impatient.Stop() {
			err = fmt.Errorf("%w within %v", errSilent, busPatience)
		}
		context.AfterFunc(bus.Context(), hangUp) // or ctx would be remembered as long as its parent lasts
		if err != nil {
			_ = bus.Close() // the error before says more
		}
	}
	if err != nil {
		impatient.Stop()
		hangUp()
	}
	if err != nil {
		return nil, fmt.Errorf("no service manager for uid %d: %w; the account needs lingering (loginctl enable-linger), dbus-user-session, and XDG_RUNTIME_DIR in the environment", os.Getuid(), err)
	}
	return bus, nil
}

// Version returns the manager's version, such as "257.8-1".
func (c *Conn) Version(ctx context.Context) (string, error) {
	l, err := c.conn(ctx)
	if err != nil {
		return "", err
	}
	v, err := l.GetManagerProperty("Version") // as D-Bus prints it, in quotes
	if err != nil {
		return "", fmt.Errorf("ask for the version: %w", err)
	}
	return strings.Trim(v, `"`), nil
}

// State is what the manager says of a unit.
type State struct {
	Load         string        // loaded, not-found, bad-setting, …
	Active       string        // active, inactive, activating, deactivating, failed, reloading
	Sub          string        // finer, by type of unit: running, auto-restart, …
	Result       string        // why the service ended last: success, exit-code, watchdog, …
	StatusText   string        // the service's own words
	ExitStatus   int           // of the main process
	NRestarts    int           // by the manager, since the unit was started by somebody
	StartLimit   int           // so many starts, and no more,
	StartWindow  time.Duration // within this time
	MainPID      int           // 0 for none
	InvocationID string        // one start of the unit; "" before the first
	Since        time.Time     // when it became active; zero before that
	Stale        bool          // its files have changed since the manager read them
	Command      []string      // that starts it, with all drop-ins

	// Settings are those of the service's other directives that are set and
	// decide what else is run for it, with what in its environment, as whom and
	// with which files: by their names as properties, in words.
	Settings map[string][]string
}

// settings are the properties that [State.Settings] knows.
var settings = []string{
	"ExecCondition", "ExecStartPre", "ExecStartPost", "ExecReload", "ExecReloadPost", "ExecStop", "ExecStopPost",
	"Environment", "EnvironmentFiles", "PassEnvironment", "UnsetEnvironment",
	"User", "Group", "SupplementaryGroups", "DynamicUser", "PAMName", "SetLoginEnvironment", "PrivateUsers",
	"RootDirectory", "RootImage", "RootMStack", "RootDirectoryStartOnly", "BindPaths", "BindReadOnlyPaths", "TemporaryFileSystem", "MountImages",
	"ExtensionImages", "ExtensionDirectories", "JoinsNamespaceOf", "NetworkNamespacePath", "IPCNamespacePath", "UserNamespacePath",
	"OpenFile", "LoadCredential", "LoadCredentialEncrypted", "SetCredential", "SetCredentialEncrypted", "ImportCredential", "FileDescriptorStoreMax",
	"NotifyAccess", "Type",
}

// State asks about a unit. A unit that does not exist has Load "not-found".
func (c *Conn) State(ctx context.Context, unit string) (State, error) {
	l, err := c.conn(ctx)
	if err != nil {
		return State{}, err
	}
	// All interfaces of the unit at once: the generic one and the service's.
	p, err := l.GetAllPropertiesContext(ctx, unit)
	if err != nil {
		return State{}, fmt.Errorf("ask about %s: %w", unit, err)
	}
	return stateOf(p), nil
}

func stateOf(p map[string]any) State {
	s := State{
		Load:       get[string](p, "LoadState"),
		Active:     get[string](p, "ActiveState"),
		Sub:        get[string](p, "SubState"),
		Result:     get[string](p, "Result"),
		StatusText: get[string](p, "StatusText"),
		ExitStatus: int(get[int32](p, "ExecMainStatus")),
		NRestarts:  int(get[uint32](p, "NRestarts")),
		MainPID:    int(get[uint32](p, "MainPID")),
		StartLimit: int(get[uint32](p, "StartLimitBurst")),
		Stale:      get[bool](p, "NeedDaemonReload"),
	}
	if id := get[[]byte](p, "InvocationID"); len(id) > 0 {
		s.InvocationID = fmt.Sprintf("%x", id)
	}
	if us := get[uint64](p, "ActiveEnterTimestamp"); us > 0 {
		s.Since = time.UnixMicro(int64(us))
	}
	if us := get[uint64](p, "StartLimitIntervalUSec"); us <= math.MaxInt64/1000 { // more is for ever
		s.StartWindow = time.Duration(us) * time.Microsecond
	}
	// ExecStart is a list of (path, argv, …); a service has one.
	if e := get[[][]any](p, "ExecStart"); len(e) == 1 && len(e[0]) > 1 {
		// With another program than its first argument says, it is none of ours.
		if argv, _ := e[0][1].([]string); len(argv) > 0 && e[0][0] == argv[0] {
			s.Command = argv
		}
	}
	for _, name := range settings {
		if v := inWords(name, p[name]); len(v) > 0 {
			if s.Settings == nil {
				s.Settings = make(map[string][]string)
			}
			s.Settings[name] = v
		}
	}
	return s
}

// inWords prints a property; one that is not set prints as nothing.
func inWords(name string, v any) (words []string) {
	r := reflect.ValueOf(v)
	if !r.IsValid() || r.IsZero() || r.Kind() == reflect.Slice && r.Len() == 0 {
		return nil
	}
	switch v := v.(type) {
	case []string:
		return v
	case [][]any:
		for _, e := range v {
			words = append(words, oneInWords(name, e))
		}
		return words
	}
	return []string{fmt.Sprint(v)}
}

// oneInWords prints an element of a list: a command as it would stand in a unit.
func oneInWords(name string, e []any) string {
	if strings.HasPrefix(name, "Exec") && len(e) > 2 {
		path, _ := e[0].(string)
		argv, _ := e[1].([]string)
		line := strings.Join(argv, " ")
		if len(argv) == 0 || argv[0] != path {
			line = "@" + path + " " + line
		}
		if ignore, _ := e[2].(bool); ignore {
			line = "-" + line
		}
		return line
	}
	return strings.TrimSuffix(fmt.Sprintln(e...), "\n")
}

// get returns a property, or zero where the manager does not have it.
func get[T any](p map[string]any, name string) T {
	v, _ := p[name].(T)
	return v
}

// holds reports whether a file is there and holds text, of which it reads no more.
func holds(file string, text []byte) (bool, error) {
	raw, err := durable.ReadOwn(file, int64(len(text)))
	switch {
	case err == nil:
		return bytes.Equal(raw, text), nil
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, durable.ErrLarge), errors.Is(err, durable.ErrNotFile):
		return false, nil
	}
	return false, err
}

// Install makes the Quadlet file name in dir hold text and has the manager read
// it. It reports whether that changed anything; then the service is down.
//
// A running service is stopped before its file changes. So a service that runs
// always runs what its file says, also if the agent dies in between. The
// service must be loaded afterwards: Podman's generator drops a whole file,
// without a word, for one key that it does not know.
func (c *Conn) Install(ctx context.Context, dir, name string, text []byte) (changed bool, err error) {
	file := filepath.Join(dir, name)
	service := serviceOf(name)
	same, err := holds(file, text)
	if err != nil {
		return false, err
	}
	s, err := c.State(ctx, service)
	if err != nil {
		return false, err
	}
	// Of a service that is down the manager may know an older file and not that
	// it does: it forgets such a service, takes it up again from what the generator
	// has made before, and compares with the time that the file has by then.
	down := s.Active == "inactive" || s.Active == "failed"
	if same && s.Load == "loaded" && !s.Stale && !down {
		return false, nil
	}
	if s.Load == "loaded" {
		if err := c.Stop(ctx, service); err != nil {
			return false, err
		}
	}
	if !same {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return true, err
		}
		failpoint.Here("systemd.install.begin")
		if err := durable.WriteFile(file, text, 0o644); err != nil {
			return true, err
		}
	}
	failpoint.Here("systemd.install.written")
	if err := c.reload(ctx); err != nil {
		return true, err
	}
	failpoint.Here("systemd.install.loaded")
	if s, err = c.State(ctx, service); err != nil {
		return true, err
	}
	if s.Load != "loaded" {
		return true, fmt.Errorf("%w: %s is %s after a reload with %s; /usr/libexec/podman/quadlet -user -dryrun says why", ErrNotTaken, service, s.Load, file)
	}
	return true, nil
}

// ErrNotTaken says that no service came of a unit.
var ErrNotTaken = errors.New("the unit was not taken by Podman's generator")

// serviceOf names the service that Podman's generator makes of a Quadlet file.
func serviceOf(name string) string { return strings.TrimSuffix(name, ".container") + ".service" }

// Remove stops the service and takes back what [Conn.Install] put there. What
// is gone already is no error.
func (c *Conn) Remove(ctx context.Context, dir, name string) error {
	service := serviceOf(name)
	s, err := c.State(ctx, service)
	if err != nil {
		return err
	}
	if s.Load == "loaded" {
		if err := c.Stop(ctx, service); err != nil {
			return err
		}
	}
	if err := os.Remove(filepath.Join(dir, name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if s.Load == "not-found" {
		return nil
	}
	return c.reload(ctx)
}

func (c *Conn) reload(ctx context.Context) error {
	l, err := c.conn(ctx)
	if err != nil {
		return err
	}
	if err := l.ReloadContext(ctx); err != nil {
		return fmt.Errorf("daemon-reload: %w", err)
	}
	return nil
}

// Start returns when the unit is up.
func (c *Conn) Start(ctx context.Context, unit string) error {
	return c.job(ctx, "start", unit, (*sd.Conn).StartUnitContext)
}

// Restart stops the unit if it runs, starts it, and returns when it is up. A
// unit with Restart= that fails is tried again by the manager, also after
// Restart has returned an error.
func (c *Conn) Restart(ctx context.Context, unit string) error {
	return c.job(ctx, "restart", unit, (*sd.Conn).RestartUnitContext)
}

// Stop returns when the unit is down, and the manager will not start it by
// itself.
func (c *Conn) Stop(ctx context.Context, unit string) error {
	return c.job(ctx, "stop", unit, (*sd.Conn).StopUnitContext)
}

// JobError says how the manager's job for a unit ended, and what the unit said.
type JobError struct {
	Verb, Unit string
	Outcome    string // failed, timeout, canceled, dependency, skipped
	State      State  // right after
}

func (e *JobError) Error() string {
	s := fmt.Sprintf("%s %s: %s", e.Verb, e.Unit, e.Outcome)
	if e.State.Load != "loaded" {
		s += ", unit is " + e.State.Load
	}
	if e.State.Result != "" && e.State.Result != "success" {
		s += fmt.Sprintf(", result %s, exit status %d", e.State.Result, e.State.ExitStatus)
	}
	if e.State.StatusText != "" {
		s += ", it said: " + e.State.StatusText
	}
	return s
}

type jobFunc = func(c *sd.Conn, ctx context.Context, unit, mode string, ch chan<- string) (int, error)

// job asks for a job and waits for its end. When ctx ends first, the job goes
// on.
func (c *Conn) job(ctx context.Context, verb, unit string, f jobFunc) error {
	l, err := c.conn(ctx)
	if err != nil {
		return err
	}
	done := make(chan string, 1)
	if _, err := f(l.Conn, ctx, unit, "replace", done); err != nil {
		return fmt.Errorf("%s %s: %w", verb, unit, err)
	}
	select {
	case outcome := <-done:
		if outcome == "done" {
			return nil
		}
		s, err := c.State(ctx, unit)
		return errors.Join(&JobError{verb, unit, outcome, s}, err)
	case <-l.lost:
		return fmt.Errorf("%s %s: %w before the end of the job", verb, unit, ErrLost)
	case <-ctx.Done():
		return fmt.Errorf("%s %s: %w", verb, unit, context.Cause(ctx))
	}
}

// ErrLost says that the service manager went away in the middle.
var ErrLost = errors.New("the connection to the bus was lost")

// ResetFailed clears the unit's failed state, its start limit, and the count of
// restarts by which RestartSteps= makes them slower. One that the manager has
// not in memory has none of these.
func (c *Conn) ResetFailed(ctx context.Context, unit string) error {
	l, err := c.conn(ctx)
	if err != nil {
		return err
	}
	err = l.ResetFailedUnitContext(ctx, unit)
	if e, ok := errors.AsType[dbus.Error](err); ok && e.Name == "org.freedesktop.systemd1.NoSuchUnit" {
		return nil
	}
	if err != nil {
		return fmt.Errorf("reset-failed %s: %w", unit, err)
	}
	return nil
}

// Watch calls f once, and then after each change of the unit that the manager
// announces, until ctx ends (nil) or the connection is lost (an error). The call
// says only that something changed: f asks for the state, since changes may be
// merged. It returns with no call under way.
func (c *Conn) Watch(ctx context.Context, unit string, f func()) error {
	// A connection of its own, so that a slow f holds up nobody else's replies.
	bus, err := dialBus(ctx)
	if err != nil {
		return err
	}
	defer bus.Close()
	changes := make(chan *dbus.Signal, 64)
	bus.Signal(changes)
	if err := bus.AddMatchSignalContext(ctx,
		dbus.WithMatchObjectPath(dbus.ObjectPath("/org/freedesktop/systemd1/unit/"+sd.PathBusEscape(unit))),
		dbus.WithMatchInterface("org.freedesktop.DBus.Properties"),
		dbus.WithMatchMember("PropertiesChanged"),
	); err != nil {
		return fmt.Errorf("watch %s: %w", unit, err)
	}
	manager := bus.Object("org.freedesktop.systemd1", "/org/freedesktop/systemd1")
	if err := manager.CallWithContext(ctx, "org.freedesktop.systemd1.Manager.Subscribe", 0).Store(); err != nil {
		return fmt.Errorf("watch %s: subscribe: %w", unit, err)
	}
	for {
		f()
		select {
		case <-ctx.Done():
			return nil
		case <-bus.Context().Done():
		case <-changes:
		}
		if ctx.Err() != nil {
			return nil
		}
		if !bus.Connected() {
			return fmt.Errorf("watch %s: %w", unit, ErrLost)
		}
		for len(changes) > 0 { // several properties change at once
			<-changes
		}
	}
}
