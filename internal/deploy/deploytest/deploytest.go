// Package deploytest is a machine for tests of deployments: images, models,
// service manager, Podman and engine, all in memory.
//
// The rule it keeps: it objects. A call that breaks the contract of the real
// thing fails the test at once. And whatever the real thing can do wrong it does
// on order, also after the effect, as when an answer is lost.
package deploytest

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/resultity/node/internal/bridge/contract"
	"github.com/resultity/node/internal/deploy"
	"github.com/resultity/node/internal/determinism"
	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/hardware"
	"github.com/resultity/node/internal/image"
	"github.com/resultity/node/internal/podman"
	"github.com/resultity/node/internal/publish"
	"github.com/resultity/node/internal/quadlet"
	"github.com/resultity/node/internal/sandbox"
	"github.com/resultity/node/internal/snapshot"
	"github.com/resultity/node/internal/systemd"
)

// Calls that can be counted and made to fail.
const (
	EnsureImage  = "image.Ensure"
	TrustImage   = "image.Trusted"
	VerifyImage  = "image.Verify"
	RetainImages = "image.Retain"
	EnsureModel  = "model.Ensure"
	RetainModels = "model.Retain"
	WarmModel    = "model.Warm"
	Install      = "units.Install"
	State        = "units.State"
	Start        = "units.Start"
	Stop         = "units.Stop"
	ResetFailed  = "units.ResetFailed"
	Info         = "podman.Info"
	Container    = "podman.Container"
	FindImage    = "podman.Image"
	Devices      = "devices"
	Look         = "look"
	Record       = "engine.Sandbox"
	Golden       = "engine.Golden"
)

// ImageOf is EnsureImage for one image alone, to be made to fail.
func ImageOf(ref snapshot.ImageRef) string { return EnsureImage + " " + ref.String() }

// Fault is how a call fails.
type Fault struct {
	Err   error
	Late  bool                 // after the effect
	Times int                  // how often; 0 is always
	Block bool                 // until the context ends
	Until <-chan struct{}      // or until this is closed, where it is set; it does not fail then
	When  func(m *Locked) bool // nil is always
	Also  func(m *Locked)      // what else happens then
}

// Machine is the machine. Its methods are safe for concurrent use.
type Machine struct {
	t    testing.TB
	dir  string
	good []string // a podman command line that is sealed

	settings map[string][]string // what systemd has for the service beside it

	mu          sync.Mutex
	faults      map[string]*Fault
	calls       []string
	images      map[snapshot.ImageRef]bool
	index       bool // images are indexes
	models      map[digest.Digest]bool
	text        []byte // of the unit's file, as it was read last
	state       systemd.State
	starts      int
	spent       bool // the start limit is used up
	record      contract.Sandbox
	outside     sandbox.Outside
	podmanMajor int
	controllers []string
	ceiling     int64
	computer    determinism.Hardware
	unnamed     error // why there is none
	accent      string
	drift       func(*podman.ContainerState) // how the container differs from the unit; nil for not at all
	judged      string                       // invocation whose record was read
	watch       map[chan struct{}]bool
}

// Locked is the machine while it holds still.
type Locked struct{ *Machine }

// New makes a machine with nothing on it.
func New(t testing.TB) *Machine {
	t.Helper()
	raw, err := os.ReadFile("../quadlet/testdata/llamacpp.run")
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("", "deploytest") // names of tests have characters that units must not have
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	m := &Machine{
		t: t, dir: dir, faults: map[string]*Fault{}, images: map[snapshot.ImageRef]bool{}, models: map[digest.Digest]bool{},
		computer:    determinism.Hardware{Arch: "amd64", CPU: "a CPU", Features: []string{"avx2"}},
		podmanMajor: 5, controllers: []string{"pids"},
		state: systemd.State{Load: "not-found", Active: "inactive"}, watch: map[chan struct{}]bool{},
		record:  contract.Sandbox{Version: contract.Version, OK: true, UID: 1000, GID: 1000, Checks: []contract.Check{{Name: "user", OK: true}}, Namespaces: map[string]string{}, Landlock: 7, Hidden: true},
		outside: sandbox.Outside{UIDs: []int{100999, 100999, 100999, 100999}, NoNewPrivs: true, Seccomp: 2, Interfaces: []string{"lo"}, Own: map[string]string{}},
	}
	for i, ns := range []string{"cgroup", "ipc", "mnt", "net", "pid", "user", "uts"} {
		m.record.Namespaces[ns], m.outside.Own[ns] = fmt.Sprintf("%s:[%d]", ns, 200+i), fmt.Sprintf("%s:[%d]", ns, 100+i)
	}
	for _, point := range []string{"/models", "/resultity-bridge", "/run/resultity", "/tmp", "/dev/shm", "/", "/proc", "/etc/hosts"} {
		m.record.Mounts = append(m.record.Mounts, contract.Mount{Point: point, Type: "ext4", ReadOnly: !slices.Contains([]string{"/run/resultity", "/tmp", "/dev/shm", "/proc"}, point)})
	}
	m.good = commandLine(string(raw))
	m.settings = map[string][]string{
		"Type": {"notify"}, "NotifyAccess": {"all"}, "Environment": {"PODMAN_SYSTEMD_UNIT=" + quadlet.ServiceName},
		"ExecStop": {"/usr/bin/podman rm -v -f -i resultity-runtime"}, "ExecStopPost": {"-/usr/bin/podman rm -v -f -i resultity-runtime"},
	}
	return m
}

// commandLine reads the golden file of a command line: an argument a line, an
// option and its value on one.
func commandLine(s string) []string {
	var argv []string
	for line := range strings.Lines(strings.TrimSpace(s)) {
		argv = append(argv, strings.Fields(line)...)
	}
	return argv
}

// Deployer returns a deployer of this machine.
func (m *Machine) Deployer() *deploy.Deployer {
	return &deploy.Deployer{
		Images: (*images)(m), Models: (*models)(m), Units: m.Units(), Containers: (*containers)(m),
		Engine: func(socket string) deploy.Engine {
			if want := filepath.Join(m.SocketDir(), quadlet.SocketName); socket != want {
				m.t.Errorf("socket %s, want %s", socket, want)
			}
			return (*engine)(m)
		},
		Devices: func([]string) ([]string, error) { return nil, m.fail(context.Background(), Devices, nil) },
		Computer: func(hardware.Computes) (determinism.Hardware, error) {
			m.mu.Lock()
			defer m.mu.Unlock()
			return m.computer, m.unnamed
		},
		Newest:    func(string) *snapshot.Snapshot { return nil },
		Allowed:   []string{"nvidia.com/gpu=*"},
		OfDevices: func([]string) (int64, bool) { return 0, false },
		Ceiling:   func(int) (int64, error) { return m.ceiling, nil },
		Mounts:    func([]string) ([]string, error) { return nil, nil },
		Env: func(names []string) ([]string, error) {
			return slices.Repeat([]string{DeviceEnv}, min(len(names), 1)), nil
		},
		Look:    m.look,
		UnitDir: "/run/user/990/containers/systemd", SocketDir: m.SocketDir(), Bridge: "/usr/libexec/resultity/resultity-bridge",
		Log: slog.New(slog.DiscardHandler), Progress: func(*snapshot.Model, int64, int64) {}, Reached: func(*snapshot.Snapshot, deploy.Step) {},
	}
}

// Compute makes the machine one that computes on h, or that cannot say what on.
func (l *Locked) Compute(h determinism.Hardware, unnamed error) { l.computer, l.unnamed = h, unnamed }

// Speak has the engine answer a little otherwise, and rightly all the same.
func (l *Locked) Speak(accent string) { l.accent = accent }

// SocketDir is where the engine's socket would be.
func (m *Machine) SocketDir() string { return filepath.Join(m.dir, "run", "engine") }

// Fail makes a call fail from now on; nil ends that.
func (m *Machine) Fail(call string, f *Fault) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.faults[call] = f
}

// Do changes the machine.
func (m *Machine) Do(f func(m *Locked)) {
	m.mu.Lock()
	defer m.mu.Unlock()
	f(&Locked{m})
}

// Calls returns the calls since it was asked last.
func (m *Machine) Calls() []string {
	m.mu.Lock()
	defer m.mu.Unlock()
	c := m.calls
	m.calls = nil
	return c
}

// Count returns how often call is in calls.
func Count(calls []string, call string) (n int) {
	for _, c := range calls {
		if c == call {
			n++
		}
	}
	return n
}

// Now returns the unit's state and the number of its starts.
func (m *Machine) Now() (systemd.State, int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.state, m.starts
}

// Has reports what is stored.
func (m *Machine) Has(s *snapshot.Snapshot) (image, model bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.images[s.Config().Runtime.Image], m.models[s.Model().Digest()]
}

// Crash ends the runtime. It stays failed, or is started again as systemd does.
func (l *Locked) Crash(again bool) {
	l.state.Active, l.state.Sub, l.state.Result = "failed", "failed", "exit-code"
	l.spent = true
	if again {
		l.spent = false
		l.up()
		l.state.NRestarts++
	}
	l.changed()
}

// End ends the runtime with a result of systemd's and an exit status. It is not
// started again.
func (l *Locked) End(result string, status int, text string) {
	l.starts++
	l.state.InvocationID = fmt.Sprintf("%032x", l.starts)
	l.state.Active, l.state.Sub, l.state.Result, l.state.ExitStatus, l.state.StatusText = "failed", "failed", result, status, text
	l.state.StartLimit, l.state.StartWindow = 10, 10*time.Minute
	l.changed()
}

// Storm ends the runtime until systemd starts it no more. What systemd says is
// the result of the last end.
func (l *Locked) Storm(status int, text string) {
	l.state.NRestarts, l.spent = 10, true
	l.End("exit-code", status, text)
}

// Reboot loses what does not outlive the machine's power: units and what runs.
func (l *Locked) Reboot() {
	l.text, l.spent, l.state = nil, false, systemd.State{Load: "not-found", Active: "inactive"}
}

// Activate puts the unit into a state by systemd's own doing.
func (l *Locked) Activate(active string) { l.state.Active = active; l.changed() }

// Come lets a unit that systemd is starting by itself come up.
func (l *Locked) Come() { l.up(); l.changed() }

// Runs reports whether the unit's file is that of s, by its image.
func (l *Locked) Runs(s *snapshot.Snapshot) bool {
	return bytes.Contains(l.text, []byte("Image="+s.Config().Runtime.Image.String()))
}

// Models returns how many models are stored.
func (l *Locked) Models() int { return len(l.models) }

// Outside changes what the kernel says of the container.
func (l *Locked) Outside(f func(*sandbox.Outside)) { f(&l.outside) }

// Record changes what the bridge says.
func (l *Locked) Record(f func(*contract.Sandbox)) { f(&l.record) }

// PodmanMajor sets the major version of Podman.
func (l *Locked) PodmanMajor(n int) { l.podmanMajor = n }

// Memory lets the account set ceilings, of which the runtime has this one.
func (l *Locked) Memory(ceiling int64) {
	l.controllers, l.ceiling = []string{"memory", "pids"}, ceiling
}

// Drift lets the container differ from what the unit orders.
func (l *Locked) Drift(f func(*podman.ContainerState)) { l.drift = f }

// Index makes every image an index, of which the container has what [Part] says.
func (l *Locked) Index() {
	l.index = true
	l.drift = func(c *podman.ContainerState) { c.ImageDigest = Part(c.ImageDigest) }
}

// Part names the image that an index comes to.
func Part(index digest.Digest) digest.Digest { return digest.Of([]byte(index.String())) }

// Set gives the service another directive.
func (l *Locked) Set(name string, values ...string) { l.settings[name] = values }

// DropIn gives podman run another argument.
func (l *Locked) DropIn(arg string) {
	l.good = slices.Insert(slices.Clone(l.good), 2, arg)
	if l.state.Command != nil {
		l.state.Command = l.good
	}
}

func (m *Machine) up() {
	m.starts++
	m.state.Active, m.state.Sub, m.state.Result = "active", "running", "success"
	m.state.InvocationID = fmt.Sprintf("%032x", m.starts)
	m.state.MainPID = 1000 + m.starts
}

func (m *Machine) changed() {
	for c := range m.watch {
		select {
		case c <- struct{}{}:
		default:
		}
	}
}

// fail notes the call, and does what was ordered for it. The effect takes place
// under the lock.
func (m *Machine) fail(ctx context.Context, call string, effect func() error) error {
	m.mu.Lock()
	m.calls = append(m.calls, call)
	f := m.faults[call]
	if f != nil && f.When != nil && !f.When(&Locked{m}) {
		f = nil
	}
	if f != nil && f.Block {
		m.mu.Unlock()
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-f.Until:
		}
		m.mu.Lock()
		f = nil
	}
	defer m.mu.Unlock()
	if err := ctx.Err(); err != nil {
		return err
	}
	if f != nil && f.Times > 0 {
		if f.Times--; f.Times == 0 {
			m.faults[call] = nil
		}
	}
	if f != nil && f.Also != nil {
		f.Also(&Locked{m})
	}
	if f != nil && !f.Late {
		return f.Err
	}
	if effect != nil {
		if err := effect(); err != nil {
			return err
		}
	}
	if f != nil {
		return f.Err
	}
	return nil
}

// ordered reports whether a call is to fail.
func (m *Machine) ordered(call string) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.faults[call] != nil
}

type images Machine

func (i *images) Ensure(ctx context.Context, ref snapshot.ImageRef, own, now *snapshot.ImageTrust) error {
	m := (*Machine)(i)
	if len(own.Keys) == 0 || len(now.Keys) == 0 {
		m.t.Error("an image is asked for without keys")
	}
	call := EnsureImage
	if m.ordered(ImageOf(ref)) {
		call = ImageOf(ref)
	}
	return m.fail(ctx, call, func() error { m.images[ref] = true; return nil })
}

func (i *images) Trusted(ctx context.Context, _ snapshot.ImageRef, own, now *snapshot.ImageTrust) error {
	return (*Machine)(i).fail(ctx, TrustImage, func() error {
		if still, _ := own.Under(now); len(still.Keys) == 0 {
			return image.ErrRevoked
		}
		return nil
	})
}

func (i *images) Manifest(ref snapshot.ImageRef) digest.Digest {
	if m := (*Machine)(i); m.index {
		return Part(ref.Digest())
	}
	return ref.Digest()
}

func (i *images) Verify(ctx context.Context, ref snapshot.ImageRef) error {
	m := (*Machine)(i)
	return m.fail(ctx, VerifyImage, func() error {
		if !m.images[ref] {
			m.t.Errorf("image %s is looked at and not there", ref)
		}
		return nil
	})
}

func (i *images) Retain(ctx context.Context, keep ...snapshot.ImageRef) error {
	m := (*Machine)(i)
	return m.fail(ctx, RetainImages, func() error {
		for ref := range m.images {
			if !slices.Contains(keep, ref) {
				if m.state.Active == "active" && bytes.Contains(m.text, []byte(ref.String())) {
					m.t.Errorf("image %s is removed and runs", ref)
				}
				delete(m.images, ref)
			}
		}
		return nil
	})
}

type models Machine

func (s *models) Ensure(ctx context.Context, model *snapshot.Model, progress func(done, total int64)) (string, error) {
	m := (*Machine)(s)
	progress(0, model.Size())
	err := m.fail(ctx, EnsureModel, func() error { m.models[model.Digest()] = true; return nil })
	if err != nil {
		return "", err
	}
	progress(model.Size(), model.Size())
	return "/var/lib/resultity/models/trees/" + model.Digest().Hex(), nil
}

// Have reports whether the model is here; looking at the disk is no call that fails.
func (s *models) Have(model *snapshot.Model) bool {
	m := (*Machine)(s)
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.models[model.Digest()]
}

func (s *models) Retain(keep []*snapshot.Model) error {
	m := (*Machine)(s)
	return m.fail(context.Background(), RetainModels, func() error {
		for d := range m.models {
			if !slices.ContainsFunc(keep, func(k *snapshot.Model) bool { return k.Digest() == d }) {
				if m.state.Active == "active" && bytes.Contains(m.text, []byte(d.Hex())) {
					m.t.Errorf("model %s is removed and runs", d)
				}
				delete(m.models, d)
			}
		}
		return nil
	})
}

func (s *models) Warm(ctx context.Context, model *snapshot.Model, most int64) (read int64, err error) {
	m := (*Machine)(s)
	err = m.fail(ctx, WarmModel, func() error {
		if !m.models[model.Digest()] {
			m.t.Errorf("model %s is warmed before it is here", model.Digest())
		}
		read = min(model.Size(), most)
		return nil
	})
	return read, err
}

// Units is the service manager.
type Units Machine

// Units returns the machine's service manager.
func (m *Machine) Units() *Units { return (*Units)(m) }

// own checks the name of the one unit that there is.
func (u *Units) own(unit string) {
	if unit != quadlet.ServiceName {
		u.t.Errorf("unit %q", unit)
	}
}

// Install writes the unit's file.
func (u *Units) Install(ctx context.Context, dir, name string, text []byte) (changed bool, err error) {
	m := (*Machine)(u)
	if dir == "" || name != quadlet.FileName || len(text) == 0 {
		m.t.Errorf("install %q in %q", name, dir)
	}
	if st, err := os.Stat(m.SocketDir()); err != nil || st.Mode().Perm() != 0o777 {
		m.t.Errorf("socket directory %v, %v before the unit is there", st, err)
	}
	err = m.fail(ctx, Install, func() error {
		if bytes.Equal(text, m.text) {
			return nil
		}
		changed = true
		m.text = slices.Clone(text)
		m.state.Load = "loaded"
		if m.state.Active == "active" || m.state.Active == "activating" {
			m.state.Active, m.state.Sub = "inactive", "dead"
			m.changed()
		}
		return nil
	})
	return changed, err
}

// State says how the unit is.
func (u *Units) State(ctx context.Context, unit string) (s systemd.State, err error) {
	u.own(unit)
	m := (*Machine)(u)
	err = m.fail(ctx, State, func() error {
		m.state.Command, m.state.Settings = m.good, maps.Clone(m.settings)
		s = m.state
		return nil
	})
	return s, err
}

// Start starts the unit, or waits for a start that is under way.
func (u *Units) Start(ctx context.Context, unit string) error {
	u.own(unit)
	m := (*Machine)(u)
	err := m.fail(ctx, Start, func() error {
		switch {
		case m.text == nil:
			m.t.Error("start of a unit that was not installed")
		case m.spent:
			return errors.New("start request repeated too quickly")
		case m.state.Active == "active":
			return nil
		}
		m.up()
		m.changed()
		return nil
	})
	if err != nil {
		m.mu.Lock()
		defer m.mu.Unlock()
		if m.state.Active != "active" {
			m.state.Active, m.state.Result = "failed", "exit-code"
		}
		m.changed()
	}
	return err
}

// Stop stops the unit.
func (u *Units) Stop(ctx context.Context, unit string) error {
	u.own(unit)
	m := (*Machine)(u)
	return m.fail(ctx, Stop, func() error {
		m.state.Active, m.state.Sub = "inactive", "dead"
		m.changed()
		return nil
	})
}

// ResetFailed gives the unit its starts back.
func (u *Units) ResetFailed(ctx context.Context, unit string) error {
	u.own(unit)
	m := (*Machine)(u)
	return m.fail(ctx, ResetFailed, func() error {
		m.spent, m.state.NRestarts = false, 0
		m.state.Active = "inactive"
		return nil
	})
}

// Watch calls f once and after each change.
func (u *Units) Watch(ctx context.Context, unit string, f func()) error {
	u.own(unit)
	m := (*Machine)(u)
	c := make(chan struct{}, 1)
	m.mu.Lock()
	m.watch[c] = true
	m.mu.Unlock()
	defer func() {
		m.mu.Lock()
		defer m.mu.Unlock()
		delete(m.watch, c)
	}()
	for {
		f()
		select {
		case <-ctx.Done():
			return nil
		case <-c:
		}
	}
}

type containers Machine

func (c *containers) Info(ctx context.Context) (podman.Info, error) {
	return podman.Info{Version: podman.Version{Major: (*Machine)(c).podmanMajor, Minor: 4, Patch: 2}, CgroupControllers: (*Machine)(c).controllers}, (*Machine)(c).fail(ctx, Info, nil)
}

// imageID is what the fake store calls an image.
func imageID(ref snapshot.ImageRef) string { return ref.Digest().Hex() }

func (c *containers) Image(ctx context.Context, ref snapshot.ImageRef) (id string, size int64, err error) {
	m := (*Machine)(c)
	err = m.fail(ctx, FindImage, func() error {
		if !m.images[ref] {
			return podman.ErrNotFound
		}
		id, size = imageID(ref), 1
		return nil
	})
	return id, size, err
}

// DeviceEnv is a variable that devices bring along, in the place of the image's.
const DeviceEnv = "LANG=device"

// imageEnv is what every image asks for.
var imageEnv = []string{"PATH=/opt/bin", "LANG=C", "HOME=/root"}

func (c *containers) ImageEnv(_ context.Context, ref snapshot.ImageRef) ([]string, error) {
	m := (*Machine)(c)
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.images[ref] {
		return nil, podman.ErrNotFound
	}
	return imageEnv, nil
}

func (c *containers) Container(ctx context.Context, name string) (s podman.ContainerState, err error) {
	m := (*Machine)(c)
	if name != quadlet.ContainerName {
		m.t.Errorf("container %q", name)
	}
	err = m.fail(ctx, Container, func() error {
		if m.state.Active != "active" || m.text == nil {
			return podman.ErrNotFound
		}
		o, err := quadlet.Unit{Name: quadlet.FileName, Service: quadlet.ServiceName, Text: m.text}.Order()
		if err != nil {
			return err
		}
		// The words of Podman 5.8.
		s = podman.ContainerState{
			Running: true, PID: m.state.MainPID, ImageID: imageID(o.Image), ImageDigest: o.Image.Digest(), ReadOnly: true, Network: "none",
			User: o.User, Env: slices.Concat([]string{"container=podman", "NOTIFY_SOCKET=/run/notify/notify.sock", "HOSTNAME=0123"}, env(o)), Security: []string{"no-new-privileges"}, Command: o.Command, Tmpfs: map[string][]string{},
			Namespaces: map[string]string{"cgroup": "private", "ipc": "shareable", "pid": "private", "user": "", "uts": "private"},
		}
		for _, o := range o.Mounts {
			s.Mounts = append(s.Mounts, podman.Mount{Type: "bind", Source: o.Source, Destination: o.Place, Writable: !o.ReadOnly, Options: append(slices.Clone(o.Options), "rbind")})
		}
		for place, options := range o.Tmpfs {
			s.Tmpfs[place] = append(slices.Clone(options), "rprivate", "tmpcopyup")
		}
		if m.drift != nil {
			m.drift(&s)
		}
		return nil
	})
	return s, err
}

// env are an image's variables and the ordered ones, each once.
func env(o quadlet.Order) []string {
	env := slices.DeleteFunc(slices.Clone(imageEnv), func(v string) bool {
		name, _, _ := strings.Cut(v, "=")
		return slices.ContainsFunc(o.Env, func(w string) bool { return strings.HasPrefix(w, name+"=") })
	})
	return append(env, o.Env...)
}

func (m *Machine) look(pid int) (o *sandbox.Outside, err error) {
	err = m.fail(context.Background(), Look, func() error {
		if pid > m.state.MainPID {
			m.t.Errorf("look at process %d, the container's is %d", pid, m.state.MainPID)
		}
		if pid < m.state.MainPID || m.state.Active != "active" { // it ended meanwhile
			return fs.ErrNotExist
		}
		out := m.outside
		out.PID = pid
		o = &out
		return nil
	})
	return o, err
}

type engine Machine

func (e *engine) Sandbox(ctx context.Context) (raw []byte, err error) {
	m := (*Machine)(e)
	err = m.fail(ctx, Record, func() error {
		if m.state.Active != "active" {
			return errors.New("connection refused")
		}
		m.judged = m.state.InvocationID
		raw, err = json.Marshal(m.record)
		return err
	})
	return raw, err
}

func (e *engine) Golden(ctx context.Context, g snapshot.Golden, model string) (a determinism.Answer, err error) {
	m := (*Machine)(e)
	err = m.fail(ctx, Golden, func() error {
		switch {
		case m.state.Active != "active":
			return errors.New("connection refused")
		case m.judged != m.state.InvocationID:
			m.t.Error("the engine is used before its sandbox was looked at")
		case g.Prompt == "" || model == "":
			m.t.Errorf("validation %+v of model %q", g, model)
		}
		a = determinism.NewAnswer(g.Name, g.Prompt+m.accent, "", "stop", 3, 4)
		return nil
	})
	return a, err
}

func (e *engine) Close() {}

// Network publishes configurations, signed and verified as for real nodes.
type Network struct {
	t    testing.TB
	dir  string
	base map[string]any
}

// NewNetwork makes a network without a configuration.
func NewNetwork(t testing.TB) *Network {
	t.Helper()
	raw, err := os.ReadFile("../snapshot/testdata/config.json")
	if err != nil {
		t.Fatal(err)
	}
	n := &Network{t: t, dir: t.TempDir()}
	if err := json.Unmarshal(raw, &n.base); err != nil {
		t.Fatal(err)
	}
	// Verified with the clock of whoever asks, be it that of a synctest bubble.
	day := 24 * time.Hour
	if err := publish.Init(n.dir, publish.Options{Lifetimes: publish.Lifetimes{Root: 3000 * day, Targets: 2000 * day, Snapshot: 1000 * day, Timestamp: 500 * day}}); err != nil {
		t.Fatal(err)
	}
	return n
}

// Root returns the network's first root.
func (n *Network) Root() string { return filepath.Join(n.dir, "repository/metadata/1.root.json") }

// Publish makes a new configuration: the last one, with the values at the paths
// changed, such as "limits.tokens".
func (n *Network) Publish(changes map[string]any) *snapshot.Snapshot {
	n.t.Helper()
	for at, v := range changes {
		m := n.base
		keys := strings.Split(at, ".")
		for _, k := range keys[:len(keys)-1] {
			m = m[k].(map[string]any)
		}
		m[keys[len(keys)-1]] = v
	}
	raw, err := json.Marshal(n.base)
	if err != nil {
		n.t.Fatal(err)
	}
	if err := publish.Publish(n.dir, raw); err != nil {
		n.t.Fatal(err)
	}
	s, err := publish.Current(n.dir)
	if err != nil {
		n.t.Fatal(err)
	}
	return s
}

// Image returns an image reference that differs with n.
func Image(n int) string {
	return "registry.example.net/resultity/llamacpp@" + digest.Of([]byte{byte(n)}).String()
}

// Model returns the model of the base configuration with other bytes, by n.
func Model(n int) map[string]any {
	return map[string]any{
		"name": "tiny-chat", "version": fmt.Sprint(n), "format": "gguf",
		"files": []any{map[string]any{
			"path": "tiny-chat.gguf", "size": 1000 + n, "sha256": digest.Of([]byte{byte(n), 1}).String(), "chunks": map[string]any{"root": digest.Of([]byte{byte(n), 2}).String()},
			"sources": []string{"https://models.example.net/tiny-chat.gguf"},
		}},
	}
}
