package deploy_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/resultity/node/internal/bridge/contract"
	"github.com/resultity/node/internal/deploy"
	. "github.com/resultity/node/internal/deploy/deploytest"
	"github.com/resultity/node/internal/determinism"
	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/hardware"
	"github.com/resultity/node/internal/image"
	"github.com/resultity/node/internal/journal"
	"github.com/resultity/node/internal/model"
	"github.com/resultity/node/internal/podman"
	"github.com/resultity/node/internal/quadlet"
	"github.com/resultity/node/internal/sandbox"
	"github.com/resultity/node/internal/snapshot"
	"github.com/resultity/node/internal/systemd"
	"github.com/resultity/node/test/oci"
)

func phase(string) {}

func step(err error) deploy.Step {
	e, ok := errors.AsType[*deploy.Error](err)
	if !ok {
		return ""
	}
	return e.Step
}

// bring stages and applies s.
func bring(t *testing.T, d *deploy.Deployer, s *snapshot.Snapshot) (*deploy.Deployment, error) {
	t.Helper()
	p, err := d.Stage(t.Context(), s)
	if err != nil {
		return nil, err
	}
	return d.Apply(t.Context(), p, phase)
}

func up(t *testing.T, d *deploy.Deployer, s *snapshot.Snapshot) *deploy.Deployment {
	t.Helper()
	dep, err := bring(t, d, s)
	if err != nil {
		t.Fatal(err)
	}
	return dep
}

// A deployment is of the class of image, model, engine and machine, also where
// another network has a part in it.
func TestClass(t *testing.T) {
	m, n := New(t), NewNetwork(t)
	d := m.Deployer()
	class := func(s *snapshot.Snapshot) digest.Digest {
		t.Helper()
		dep := up(t, d, s)
		c, h := dep.Class()
		if c.IsZero() == (h.Arch != "") {
			t.Errorf("class %s of %+v", c, h)
		}
		return c
	}
	one := n.Publish(nil)
	first := class(one)
	if first.IsZero() || class(one) != first || class(n.Publish(map[string]any{"limits.tokens": 50})) != first {
		t.Error("one machine with one runtime is of several classes")
	}
	if class(n.Publish(map[string]any{"runtime.settings.slots": 1})) == first {
		t.Error("other settings are of the same class")
	}
	var asked hardware.Computes
	compute := d.Computer
	d.Computer = func(c hardware.Computes) (determinism.Hardware, error) { asked = c; return compute(c) }
	for _, c := range []struct {
		settings map[string]any
		want     hardware.Computes
	}{
		{map[string]any{"runtime.settings.threads": 0}, hardware.Computes{CPU: true, Threads: true}},
		{map[string]any{"runtime.settings.threads": 2}, hardware.Computes{CPU: true}},
		{map[string]any{"runtime.settings.threads": 2, "runtime.devices": []string{"nvidia.com/gpu=0"}, "runtime.settings.gpu_layers": 998}, hardware.Computes{CPU: true}},
		{map[string]any{"runtime.settings.threads": 2, "runtime.devices": []string{"nvidia.com/gpu=0"}, "runtime.settings.gpu_layers": 999}, hardware.Computes{}},
	} {
		if class(n.Publish(c.settings)); asked.CPU != c.want.CPU || asked.Threads != c.want.Threads {
			t.Errorf("%v: asked for %+v, want %+v", c.settings, asked, c.want)
		}
	}
	m.Do(func(l *Locked) { l.Compute(determinism.Hardware{Arch: "amd64", CPU: "another"}, nil) })
	if class(one) == first {
		t.Error("another machine is of the same class")
	}
	m.Do(func(l *Locked) { l.Compute(determinism.Hardware{}, hardware.ErrUnknown) })
	var said bytes.Buffer
	d.Log = slog.New(journal.Text(&said, slog.LevelInfo))
	if c := class(one); !c.IsZero() {
		t.Errorf("a machine without a name is of class %s", c)
	}
	if !strings.Contains(said.String(), "event="+journal.ClassUnknown.Name) || !strings.Contains(said.String(), hardware.ErrUnknown.Error()) {
		t.Errorf("the log does not say that there is no class:\n%s", &said)
	}
}

func TestFromNothing(t *testing.T) {
	m, s := New(t), NewNetwork(t).Publish(nil)
	d := m.Deployer()
	var progress []int64
	d.Progress = func(model *snapshot.Model, done, total int64) {
		if model != s.Model() || total != model.Size() {
			t.Errorf("progress of %s: %d of %d", model.Name, done, total)
		}
		progress = append(progress, done)
	}
	dep := up(t, d, s)
	want := []string{Info, EnsureImage, Container, VerifyImage, EnsureModel, Devices, TrustImage, Install, State, ResetFailed, Start, State, Devices, Container, FindImage, Look, Record, Golden, Golden, Golden, State}
	if got := m.Calls(); !slices.Equal(got, want) {
		t.Errorf("calls %q\nwant  %q", got, want)
	}
	if !slices.Equal(progress, []int64{0, s.Model().Size()}) {
		t.Errorf("progress %v", progress)
	}
	state, _ := m.Now()
	if dep.Snapshot() != s || dep.Image() != s.Config().Runtime.Image.Digest() || dep.Model() != s.Model().Digest() ||
		dep.Socket() != filepath.Join(m.SocketDir(), quadlet.SocketName) || !dep.Current(state) {
		t.Errorf("%+v in state %+v", dep, state)
	}
}

// Stage prepares and touches nothing that runs.
func TestStageTouchesNothing(t *testing.T) {
	m, n := New(t), NewNetwork(t)
	d := m.Deployer()
	up(t, d, n.Publish(nil))
	m.Calls()
	if _, err := d.Stage(t.Context(), n.Publish(map[string]any{"runtime.image": Image(2)})); err != nil {
		t.Fatal(err)
	}
	for _, c := range m.Calls() {
		if slices.Contains([]string{Install, Start, Stop, ResetFailed, RetainImages, RetainModels}, c) {
			t.Errorf("Stage calls %s", c)
		}
	}
}

func TestApplyAgainDoesNothing(t *testing.T) {
	m, n := New(t), NewNetwork(t)
	d := m.Deployer()
	first := up(t, d, n.Publish(nil))
	// What the unit does not depend on restarts nothing, but is validated.
	for _, s := range []*snapshot.Snapshot{first.Snapshot(), n.Publish(map[string]any{"limits.messages": 5})} {
		m.Calls()
		dep := up(t, d, s)
		state, starts := m.Now()
		calls := m.Calls()
		if starts != 1 || slices.Contains(calls, Start) || slices.Contains(calls, Stop) || !dep.Current(state) || Count(calls, Golden) != len(s.Config().Validation.Golden) {
			t.Errorf("%d starts, calls %q, state %+v", starts, calls, state)
		}
	}
}

func TestChangeRestarts(t *testing.T) {
	m, n := New(t), NewNetwork(t)
	d := m.Deployer()
	first := up(t, d, n.Publish(nil))
	second := up(t, d, n.Publish(map[string]any{"runtime.image": Image(2)}))
	state, starts := m.Now()
	if starts != 2 || first.Current(state) || !second.Current(state) {
		t.Errorf("%d starts, state %+v", starts, state)
	}
}

// A start that is under way is waited for, not begun anew.
func TestApplyJoinsAStart(t *testing.T) {
	m, s := New(t), NewNetwork(t).Publish(nil)
	d := m.Deployer()
	up(t, d, s)
	m.Do(func(m *Locked) { m.Activate("activating") })
	m.Calls()
	up(t, d, s)
	if calls := m.Calls(); slices.Contains(calls, Stop) || Count(calls, Start) != 1 {
		t.Errorf("calls %q", calls)
	}
}

func TestFailedUnitGetsItsStartsBack(t *testing.T) {
	m, s := New(t), NewNetwork(t).Publish(nil)
	d := m.Deployer()
	dep := up(t, d, s)
	m.Do(func(m *Locked) { m.Crash(false) })
	if state, _ := m.Now(); dep.Current(state) {
		t.Error("a failed unit is current")
	}
	m.Calls()
	up(t, d, s)
	calls := m.Calls()
	if i := slices.Index(calls, ResetFailed); i < 0 || slices.Index(calls, Start) < i {
		t.Errorf("calls %q", calls)
	}
}

var errBroken = errors.New("broken")

// Every call can fail, before its effect or after it. Then the step is named,
// what was not judged to be sound is not left running, and the next try, once
// the cause is gone, brings the deployment up.
func TestEveryStepFails(t *testing.T) {
	s := NewNetwork(t).Publish(nil)
	for _, c := range []struct {
		call  string
		step  deploy.Step
		stops bool
	}{
		{EnsureImage, deploy.StepImage, false},
		{VerifyImage, deploy.StepImage, false},
		{TrustImage, deploy.StepImage, false},
		{EnsureModel, deploy.StepModel, false},
		{Info, deploy.StepMachine, false},
		{Devices, deploy.StepUnit, false},
		{Install, deploy.StepUnit, false},
		{State, deploy.StepStart, false},
		{Start, deploy.StepStart, false},
		{Container, deploy.StepSandbox, true},
		{FindImage, deploy.StepSandbox, true},
		{Look, deploy.StepSandbox, true},
		{Record, deploy.StepSandbox, true},
		{Golden, deploy.StepValidate, true},
	} {
		for name, late := range map[string]bool{"before": false, "after": true} {
			t.Run(c.call+" "+name, func(t *testing.T) {
				m := New(t)
				d := m.Deployer()
				// Stage looks at the container, too, and takes an error for none.
				m.Fail(c.call, &Fault{Err: errBroken, Late: late, Times: 1, When: func(m *Locked) bool { return c.call != Container || m.Runs(s) }})
				dep, err := bring(t, d, s)
				if dep != nil || step(err) != c.step || !errors.Is(err, errBroken) {
					t.Fatalf("got %v, step %q, %v; want step %q", dep, step(err), err, c.step)
				}
				if e, _ := errors.AsType[*deploy.Error](err); c.step == deploy.StepModel && e.Model != s.Model().Digest() {
					t.Errorf("the error is about model %v", e.Model)
				}
				calls := m.Calls()
				if got := slices.Contains(calls, Stop); got != c.stops {
					t.Errorf("stopped: %v, want %v (%q)", got, c.stops, calls)
				}
				if state, _ := m.Now(); c.stops && state.Active != "inactive" {
					t.Errorf("it is left %s", state.Active)
				}
				dep = up(t, d, s)
				if state, _ := m.Now(); !dep.Current(state) {
					t.Errorf("state %+v after the second try", state)
				}
			})
		}
	}
}

// The unit may be down again as soon as its start was reported.
func TestUpForAMoment(t *testing.T) {
	m, s := New(t), NewNetwork(t).Publish(nil)
	started := false
	m.Fail(Start, &Fault{Late: true, Also: func(*Locked) { started = true }})
	m.Fail(State, &Fault{When: func(*Locked) bool { return started }, Also: func(m *Locked) { m.Crash(false) }, Late: true})
	if dep, err := bring(t, m.Deployer(), s); dep != nil || step(err) != deploy.StepStart {
		t.Errorf("got %v, %v", dep, err)
	}
}

// A runtime that systemd starts again in the middle of its validation has not
// been validated: the answers are of two starts.
func TestRestartedWhileValidated(t *testing.T) {
	m, s := New(t), NewNetwork(t).Publish(nil)
	d := m.Deployer()
	crash := func() { // with the last of the answers
		asked := 0
		m.Fail(Golden, &Fault{When: func(*Locked) bool { asked++; return asked == len(s.Config().Validation.Golden) }, Also: func(l *Locked) { l.Crash(true) }})
	}
	crash()
	if dep, err := bring(t, d, s); dep != nil || step(err) != deploy.StepStart {
		t.Errorf("%+v, %v", dep, err)
	}
	dep := up(t, d, s)
	crash()
	if print, err := d.Validate(t.Context(), dep); step(err) != deploy.StepStart || !print.IsZero() {
		t.Errorf("validated again: %v", err)
	}
}

// The same answers have the same fingerprint, whoever asks and how often.
func TestFingerprint(t *testing.T) {
	m, n := New(t), NewNetwork(t)
	d := m.Deployer()
	s := n.Publish(nil)
	dep := up(t, d, s)
	again, err := d.Validate(t.Context(), dep)
	if err != nil || again != dep.Fingerprint() || again.IsZero() || up(t, d, s).Fingerprint() != again {
		t.Errorf("%s, then %s, %v", dep.Fingerprint(), again, err)
	}
	m.Do(func(l *Locked) { l.Speak("!") })
	if other, err := d.Validate(t.Context(), dep); err != nil || other == again || other.IsZero() {
		t.Errorf("other answers have the fingerprint %s, %v", other, err)
	}
}

func TestUnsealedIsStopped(t *testing.T) {
	s := NewNetwork(t).Publish(nil)
	for name, break_ := range map[string]func(*Locked){
		"root":          func(m *Locked) { m.Outside(func(o *sandbox.Outside) { o.UIDs[0] = 0 }) },
		"the agent":     func(m *Locked) { m.Outside(func(o *sandbox.Outside) { o.UIDs[2] = os.Getuid() }) },
		"capabilities":  func(m *Locked) { m.Outside(func(o *sandbox.Outside) { o.Caps = []string{"CapEff"} }) },
		"network":       func(m *Locked) { m.Outside(func(o *sandbox.Outside) { o.Interfaces = []string{"lo", "eth0"} }) },
		"seccomp":       func(m *Locked) { m.Outside(func(o *sandbox.Outside) { o.Seccomp = 0 }) },
		"inside":        func(m *Locked) { m.Record(func(s *contract.Sandbox) { s.Checks[0].OK = false }) },
		"version":       func(m *Locked) { m.Record(func(s *contract.Sandbox) { s.Version++ }) },
		"another image": func(m *Locked) { m.Drift(func(c *podman.ContainerState) { c.ImageDigest = digest.Of([]byte("x")) }) },
		"namespace":     func(m *Locked) { m.Outside(func(o *sandbox.Outside) { o.Own["net"] = "net:[203]" }) },
		"a mount":       func(m *Locked) { m.Record(func(s *contract.Sandbox) { s.Mounts[0].Point = "/host" }) },
		"a drop-in":     func(m *Locked) { m.DropIn("--privileged") },
		"a directive":   func(m *Locked) { m.Set("ExecStartPre", "/bin/sh") },
	} {
		t.Run(name, func(t *testing.T) {
			m := New(t)
			d := m.Deployer()
			// Also when it runs already, and was fine.
			if name != "a drop-in" && name != "a directive" {
				up(t, d, s)
			}
			m.Do(break_)
			m.Calls()
			dep, err := bring(t, d, s)
			if dep != nil || step(err) != deploy.StepSandbox || !errors.Is(err, sandbox.ErrNotSealed) {
				t.Fatalf("got %v, %v", dep, err)
			}
			if state, _ := m.Now(); state.Active != "inactive" {
				t.Errorf("it is left %s", state.Active)
			}
			if calls := m.Calls(); slices.Contains(calls, Golden) {
				t.Error("it was used")
			}
		})
	}
}

// A drop-in that came while the runtime was up is found too.
func TestDropInLater(t *testing.T) {
	m, s := New(t), NewNetwork(t).Publish(nil)
	d := m.Deployer()
	up(t, d, s)
	m.Do(func(m *Locked) { m.DropIn("--privileged") })
	if _, err := bring(t, d, s); !errors.Is(err, sandbox.ErrNotSealed) {
		t.Error(err)
	}
	if state, starts := m.Now(); state.Active != "inactive" || starts != 1 {
		t.Errorf("%s after %d starts", state.Active, starts)
	}
}

// A record that is no JSON is an unsealed runtime, not a broken agent.
func TestRecordIsNoJSON(t *testing.T) {
	m, s := New(t), NewNetwork(t).Publish(nil)
	d := m.Deployer()
	engine := d.Engine
	d.Engine = func(socket string) deploy.Engine { return garbled{engine(socket)} }
	if _, err := bring(t, d, s); step(err) != deploy.StepSandbox || !errors.Is(err, sandbox.ErrNotSealed) {
		t.Error(err)
	}
}

type garbled struct{ deploy.Engine }

func (garbled) Sandbox(context.Context) ([]byte, error) { return []byte("{"), nil }

// What cannot be stopped is said.
func TestStopFails(t *testing.T) {
	m, s := New(t), NewNetwork(t).Publish(nil)
	errStop := errors.New("no bus")
	m.Fail(Golden, &Fault{Err: errBroken})
	m.Fail(Stop, &Fault{Err: errStop})
	_, err := bring(t, m.Deployer(), s)
	if step(err) != deploy.StepValidate || !errors.Is(err, errBroken) || !errors.Is(err, errStop) {
		t.Error(err)
	}
}

// The end of the agent in the middle of a check leaves the runtime to the next
// one; but not one that is known to be unsealed.
func TestEndOfTheAgent(t *testing.T) {
	s := NewNetwork(t).Publish(nil)
	for _, c := range []struct {
		call   string
		sealed bool
		want   string
	}{
		{Record, true, "active"},
		{Golden, true, "active"},
		{Record, false, "inactive"},
	} {
		m := New(t)
		ctx, cancel := context.WithCancel(t.Context())
		d := m.Deployer()
		p, err := d.Stage(ctx, s)
		if err != nil {
			t.Fatal(err)
		}
		if !c.sealed {
			m.Do(func(m *Locked) { m.Outside(func(o *sandbox.Outside) { o.NoNewPrivs = false }) })
		}
		m.Fail(c.call, &Fault{Late: true, Also: func(*Locked) { cancel() }})
		dep, err := d.Apply(ctx, p, phase)
		if dep != nil || err == nil {
			t.Errorf("%s: got %v, %v", c.call, dep, err)
		}
		if state, _ := m.Now(); state.Active != c.want {
			t.Errorf("%s: it is left %s, want %s", c.call, state.Active, c.want)
		}
	}
}

// An engine that answers on its socket and says nothing does not hold up the
// agent.
func TestSilentRuntime(t *testing.T) {
	n := NewNetwork(t)
	s := n.Publish(nil)
	for call, looks := range map[string]time.Duration{Record: 1, Container: 2, Info: 1} { // it is asked for twice whether it runs
		m := New(t)
		synctest.Test(t, func(t *testing.T) {
			m.Fail(call, &Fault{Block: true})
			begin := time.Now()
			if _, err := bring(t, m.Deployer(), s); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("%s: %v", call, err)
			}
			if took, want := time.Since(begin), looks*deploy.LookTimeout; took < want || took > want+time.Second {
				t.Errorf("%s: took %v, want %v", call, took, want)
			}
		})
	}
}

// One that does not stop is left to systemd after a while.
func TestDoesNotStop(t *testing.T) {
	m, s := New(t), NewNetwork(t).Publish(nil)
	synctest.Test(t, func(t *testing.T) {
		m.Fail(Golden, &Fault{Err: errBroken})
		m.Fail(Stop, &Fault{Block: true})
		begin := time.Now()
		_, err := bring(t, m.Deployer(), s)
		took := time.Since(begin)
		if !errors.Is(err, errBroken) || !errors.Is(err, context.DeadlineExceeded) || took < deploy.StopTimeout || took > deploy.StopTimeout+time.Second {
			t.Errorf("%v after %v, want %v", err, took, deploy.StopTimeout)
		}
	})
}

func TestCurrent(t *testing.T) {
	m, s := New(t), NewNetwork(t).Publish(nil)
	dep := up(t, m.Deployer(), s)
	state, _ := m.Now()
	for name, edit := range map[string]func(*systemd.State){
		"restarted": func(s *systemd.State) { s.InvocationID = "another" },
		"unknown":   func(s *systemd.State) { s.InvocationID = "" },
		"failed":    func(s *systemd.State) { s.Active = "failed" },
		"starting":  func(s *systemd.State) { s.Active = "activating" },
		"ending":    func(s *systemd.State) { s.Active = "deactivating" },
	} {
		other := state
		edit(&other)
		if dep.Current(other) {
			t.Errorf("%s: still current", name)
		}
	}
	if (&deploy.Deployment{}).Current(systemd.State{Active: "active"}) {
		t.Error("no start is the same as no start")
	}
}

// The modes are what lets the container in and everybody else not, whatever the
// umask and whoever made the directories.
func TestSocketDirectory(t *testing.T) {
	s := NewNetwork(t).Publish(nil)
	for _, umask := range []int{0, 0o022, 0o077} {
		for _, there := range []bool{false, true} {
			m := New(t)
			if there {
				if err := os.MkdirAll(m.SocketDir(), 0o755); err != nil {
					t.Fatal(err)
				}
			}
			old := syscall.Umask(umask)
			_, err := bring(t, m.Deployer(), s)
			syscall.Umask(old)
			if err != nil {
				t.Fatal(err)
			}
			for dir, want := range map[string]os.FileMode{m.SocketDir(): 0o777, filepath.Dir(m.SocketDir()): 0o700} {
				if st, err := os.Stat(dir); err != nil || st.Mode().Perm() != want {
					t.Errorf("umask %03o, there %v: %s is %v, %v; want %v", umask, there, dir, st.Mode(), err, want)
				}
			}
		}
	}
}

func TestSocketDirectoryCannotBeMade(t *testing.T) {
	m, s := New(t), NewNetwork(t).Publish(nil)
	if err := os.WriteFile(filepath.Dir(m.SocketDir()), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := bring(t, m.Deployer(), s); step(err) != deploy.StepUnit {
		t.Error(err)
	}
}

// A snapshot that the machine cannot run is refused before anything is touched.
func TestUnitCannotBeRendered(t *testing.T) {
	m, s := New(t), NewNetwork(t).Publish(nil)
	d := m.Deployer()
	d.Bridge = "/opt/a b/bridge"
	if _, err := d.Stage(t.Context(), s); step(err) != deploy.StepUnit {
		t.Error(err)
	}
	if calls := m.Calls(); slices.Contains(calls, Install) {
		t.Errorf("calls %q", calls)
	}
}

func TestClean(t *testing.T) {
	m, n := New(t), NewNetwork(t)
	d := m.Deployer()
	one := n.Publish(nil)
	up(t, d, one)
	two := n.Publish(map[string]any{"runtime.image": Image(2), "models": []any{Model(2)}})
	three := n.Publish(map[string]any{"runtime.image": Image(3), "models": []any{Model(3)}})
	up(t, d, two)
	if _, err := d.Stage(t.Context(), three); err != nil {
		t.Fatal(err)
	}
	if err := d.Clean(t.Context(), two, three); err != nil {
		t.Fatal(err)
	}
	for s, want := range map[*snapshot.Snapshot]bool{one: false, two: true, three: true} {
		if image, model := m.Has(s); image != want || model != want {
			t.Errorf("version %d: image %v, model %v, want %v", s.Version(), image, model, want)
		}
	}
	for _, call := range []string{RetainImages, RetainModels} {
		m.Fail(call, &Fault{Err: errBroken, Times: 1})
		if err := d.Clean(t.Context(), two); !errors.Is(err, errBroken) {
			t.Errorf("%s: %v", call, err)
		}
	}
}

// Whose fault a failure is decides whether the same is tried again.
func TestMachineFaults(t *testing.T) {
	job := func(result string) error {
		return fmt.Errorf("x: %w", &systemd.JobError{Outcome: "failed", State: systemd.State{Result: result}})
	}
	for _, c := range []struct {
		step    deploy.Step
		err     error
		machine bool
	}{
		{deploy.StepImage, errors.New("x"), true},
		{deploy.StepImage, image.ErrUnsigned, true}, // somebody may sign it yet
		{deploy.StepImage, image.ErrRevoked, true},  // and be trusted again
		{deploy.StepImage, image.ErrKeys, false},
		{deploy.StepImage, image.ErrPlatform, false},
		{deploy.StepModel, model.ErrRefused, false},
		{deploy.StepModel, digest.ErrMismatch, true}, // nothing was switched, and sources get mended
		{deploy.StepUnit, errors.New("no such device"), true},
		{deploy.StepUnit, fmt.Errorf("x: %w", quadlet.ErrUnsealed), false},
		{deploy.StepUnit, fmt.Errorf("x: %w", systemd.ErrNotTaken), false},
		{deploy.StepUnit, &os.PathError{Err: syscall.ENOSPC}, true},
		{deploy.StepStart, job("exit-code"), false},
		{deploy.StepStart, job("timeout"), false},
		{deploy.StepStart, job("oom-kill"), true},
		{deploy.StepStart, context.DeadlineExceeded, false},
		{deploy.StepStart, systemd.ErrLost, true},
		{deploy.StepSandbox, sandbox.ErrNotSealed, false},
		{deploy.StepSandbox, podman.ErrUnavailable, true},
		{deploy.StepValidate, errors.New("another answer"), false},
	} {
		if e := (&deploy.Error{Step: c.step, Err: c.err}); e.Machine() != c.machine {
			t.Errorf("%v: machine %v", e, e.Machine())
		}
	}
}

// Of an index, the container has the image of this platform, and no other.
func TestIndex(t *testing.T) {
	m, n := New(t), NewNetwork(t)
	m.Do(func(m *Locked) { m.Index() })
	d := m.Deployer()
	up(t, d, n.Publish(nil))
	m.Do(func(m *Locked) {
		m.Drift(func(c *podman.ContainerState) { c.ImageDigest = Part(Part(c.ImageDigest)) })
	})
	if _, err := bring(t, d, n.Publish(map[string]any{"runtime.tmp_bytes": 1 << 21})); !errors.Is(err, sandbox.ErrNotSealed) {
		t.Errorf("another image of the repository runs: %v", err)
	}
}

// What runs is not read again; what would be started is. And the network's
// newest word counts for both.
func TestImageIsLookedAtBeforeItStarts(t *testing.T) {
	m, n := New(t), NewNetwork(t)
	d := m.Deployer()
	s := n.Publish(nil)
	up(t, d, s)
	m.Calls()
	p, err := d.Stage(t.Context(), s)
	if err != nil {
		t.Fatal(err)
	}
	if calls := m.Calls(); slices.Contains(calls, VerifyImage) {
		t.Errorf("read while it runs: %q", calls)
	}
	m.Do(func(m *Locked) { m.End("success", 0, "") })
	if _, err := d.Stage(t.Context(), s); err != nil {
		t.Fatal(err)
	}
	if calls := m.Calls(); !slices.Contains(calls, VerifyImage) {
		t.Errorf("not read before a start: %q", calls)
	}

	k, err := oci.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	pem, err := k.PublicPEM()
	if err != nil {
		t.Fatal(err)
	}
	newer := n.Publish(map[string]any{"image_trust.keys": []string{string(pem)}})
	d.Newest = func(string) *snapshot.Snapshot { return newer }
	if _, err := d.Apply(t.Context(), p, func(string) {}); step(err) != deploy.StepImage || !errors.Is(err, image.ErrRevoked) {
		t.Errorf("what the newest configuration does not trust is started: %v", err)
	}
	if calls := m.Calls(); slices.Contains(calls, Install) || slices.Contains(calls, Start) {
		t.Errorf("%q", calls)
	}
}
