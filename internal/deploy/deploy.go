// Package deploy owns the order of steps from a verified snapshot to a runtime
// that may be given jobs: stage, apply, and how both fail.
//
// The rules it keeps: staging touches nothing that runs; every step may be
// repeated at any time and does nothing where nothing is to do, so that
// start-up, a change and a repair are the same code; a runtime that is not
// sealed or answers wrongly is stopped, never used.
package deploy

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/resultity/node/internal/bridge/contract"
	"github.com/resultity/node/internal/determinism"
	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/hardware"
	"github.com/resultity/node/internal/image"
	"github.com/resultity/node/internal/journal"
	"github.com/resultity/node/internal/model"
	"github.com/resultity/node/internal/podman"
	"github.com/resultity/node/internal/quadlet"
	"github.com/resultity/node/internal/sandbox"
	"github.com/resultity/node/internal/sandbox/record"
	"github.com/resultity/node/internal/snapshot"
	"github.com/resultity/node/internal/systemd"
)

// Step is a part of the way that can fail.
type Step string

// The steps, in order.
const (
	StepMachine  Step = "machine" // may it run this, and has it what that takes?
	StepImage    Step = "image"
	StepModel    Step = "model"
	StepUnit     Step = "unit"
	StepStart    Step = "start"
	StepSandbox  Step = "sandbox"
	StepValidate Step = "validation"
)

// Steps lists the steps in order.
var Steps = []Step{StepMachine, StepImage, StepModel, StepUnit, StepStart, StepSandbox, StepValidate}

// Error says which step failed.
type Error struct {
	Step  Step
	Model digest.Digest // that StepModel is about
	Err   error
}

func (e *Error) Error() string { return fmt.Sprintf("%s: %v", e.Step, e.Err) }

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Err }

// Machine reports whether the failure is this machine's and may pass, not the
// configuration's: what could not be fetched, a full disk, memory that others
// have taken, a Podman or a service manager that does not answer. A signature that
// is missing or does not count passes, too: signatures are not in the configuration,
// and whether one counts is for the network's newest word to say.
func (e *Error) Machine() bool {
	var job *systemd.JobError
	switch {
	case errors.Is(e, model.ErrRefused), errors.Is(e, image.ErrKeys), errors.Is(e, image.ErrPlatform):
		return false
	case e.Step == StepMachine, e.Step == StepImage, e.Step == StepModel, errors.Is(e, ErrUnrecorded),
		errors.Is(e, syscall.ENOSPC), errors.Is(e, syscall.EDQUOT), errors.Is(e, syscall.EROFS), errors.Is(e, syscall.EIO),
		errors.Is(e, podman.ErrUnavailable), errors.Is(e, systemd.ErrLost):
		return true
	case errors.As(e, &job):
		return job.State.Result == "oom-kill" || job.State.Result == "resources"
	case e.Step == StepUnit:
		return !errors.Is(e, quadlet.ErrUnsealed) && !errors.Is(e, systemd.ErrNotTaken)
	}
	return false
}

// fails wraps err for a step; nil stays nil.
func fails(s Step, err error) error {
	if err == nil {
		return nil
	}
	return &Error{Step: s, Err: err}
}

type (
	images interface {
		Ensure(ctx context.Context, ref snapshot.ImageRef, own, now *snapshot.ImageTrust) error
		Trusted(ctx context.Context, ref snapshot.ImageRef, own, now *snapshot.ImageTrust) error
		Verify(ctx context.Context, ref snapshot.ImageRef) error
		Manifest(ref snapshot.ImageRef) digest.Digest
		Retain(ctx context.Context, keep ...snapshot.ImageRef) error
	}
	models interface {
		Ensure(ctx context.Context, m *snapshot.Model, progress func(done, total int64)) (dir string, err error)
		Retain(keep []*snapshot.Model) error
		Warm(ctx context.Context, m *snapshot.Model, most int64) (read int64, err error)
		Have(m *snapshot.Model) bool
	}
	units interface {
		Install(ctx context.Context, dir, name string, text []byte) (changed bool, err error)
		Start(ctx context.Context, unit string) error
		Stop(ctx context.Context, unit string) error
		ResetFailed(ctx context.Context, unit string) error
		State(ctx context.Context, unit string) (systemd.State, error)
	}
	containers interface {
		Container(ctx context.Context, name string) (podman.ContainerState, error)
		Info(ctx context.Context) (podman.Info, error)
		Image(ctx context.Context, ref snapshot.ImageRef) (id string, size int64, err error)
		ImageEnv(ctx context.Context, ref snapshot.ImageRef) ([]string, error)
	}
	// Engine is the runtime as validation needs it.
	Engine interface {
		Sandbox(ctx context.Context) ([]byte, error)
		Golden(ctx context.Context, g snapshot.Golden, model string) (determinism.Answer, error)
		Close()
	}
)

// Deployer brings snapshots to life. Stage, of several snapshots at once, and Validate
// may be called beside the others; those are called by one goroutine.
type Deployer struct {
	Images     images
	Models     models
	Units      units
	Containers containers
	Engine     func(socket string) Engine
	Devices    func(names []string) (nodes []string, err error)      // device nodes of CDI names
	Mounts     func(names []string) (places []string, err error)     // what else of the host they bring into a container
	Env        func(names []string) (env []string, err error)        // and which variables
	Computer   func(hardware.Computes) (determinism.Hardware, error) // what of the machine an engine computes on
	Look       func(pid int) (*sandbox.Outside, error)               // the kernel's view of a process
	Newest     func(network string) *snapshot.Snapshot               // a network's newest word, whatever is brought to life; nil for none
	Allowed    []string                                              // CDI devices that the operator lets a snapshot order; vendor/class=* is all of a kind
	Memory     int64                                                 // ceiling for the runtime in bytes; 0 for none
	OfDevices  func(names []string) (bytes int64, known bool)        // memory of CDI devices, together
	Ceiling    func(pid int) (int64, error)                          // the one that a process is under; 0 for none
	UnitDir    string                                                // where Quadlet looks
	SocketDir  string                                                // shared with the container; its parent is the agent's alone
	Bridge     string                                                // the bridge's binary
	Log        *slog.Logger
	Reached    func(s *snapshot.Snapshot, step Step) // Stage has come to a step; models are Progress's
	Progress   func(m *snapshot.Model, done, total int64)

	unlimited atomic.Bool // it was said that there is no ceiling
}

// Plan is a snapshot whose image and models are here and verified, and whose
// unit has passed the sealing rules. Only [Deployer.Stage] makes one.
type Plan struct {
	snapshot *snapshot.Snapshot
	unit     quadlet.Unit
}

// Snapshot returns what the plan is for.
func (p *Plan) Snapshot() *snapshot.Snapshot { return p.snapshot }

// Unit returns the text of the runtime's unit. The caller must not change it.
func (p *Plan) Unit() []byte { return p.unit.Text }

// Deployment is a runtime that is up, sealed and validated. Only
// [Deployer.Apply] and [Deployer.Share] make one.
type Deployment struct {
	snapshot   *snapshot.Snapshot
	unit       digest.Digest // of its text
	invocation string
	socket     string
	class      digest.Digest // of the machine that it runs on, too; zero for none
	hardware   determinism.Hardware
	print      digest.Digest // fingerprint of its answers
	seal       *seal         // as it was at first
}

// Snapshot returns the configuration that the runtime serves.
func (d *Deployment) Snapshot() *snapshot.Snapshot { return d.snapshot }

// Image returns the digest of the runtime's image.
func (d *Deployment) Image() digest.Digest { return d.snapshot.Config().Runtime.Image.Digest() }

// Model returns the digest of the served model.
func (d *Deployment) Model() digest.Digest { return d.snapshot.Model().Digest() }

// Class returns the digest of the determinism class that the runtime is in (see
// package determinism), and what of the machine is in it; a zero digest for none,
// where something of it could not be named.
func (d *Deployment) Class() (digest.Digest, determinism.Hardware) { return d.class, d.hardware }

// Fingerprint returns that of the golden answers with which the deployment was
// validated first.
func (d *Deployment) Fingerprint() digest.Digest { return d.print }

// Socket returns where the engine answers.
func (d *Deployment) Socket() string { return d.socket }

// Start names the start of the unit: systemd's invocation id.
func (d *Deployment) Start() string { return d.invocation }

// Views returns the sandbox as it was found before anything was asked of the
// runtime. The caller must not change what they refer to.
func (d *Deployment) Views() record.Views { return d.seal.views }

// Current reports whether state is still the start of the unit that was
// validated: not down, and not a restart that nobody has looked at.
func (d *Deployment) Current(state systemd.State) bool {
	return state.Active == "active" && state.InvocationID == d.invocation && d.invocation != ""
}

// Stage fetches and verifies all that s needs.
func (d *Deployer) Stage(ctx context.Context, s *snapshot.Snapshot) (*Plan, error) {
	c := s.Config()
	d.Reached(s, StepMachine)
	info, err := d.mayRun(ctx, s)
	if err != nil {
		return nil, fails(StepMachine, err)
	}
	d.Reached(s, StepImage)
	if err := d.Images.Ensure(ctx, c.Runtime.Image, &c.ImageTrust, d.trust(s)); err != nil {
		return nil, fails(StepImage, err)
	}
	// What runs was looked at when it was started, and nothing would change for it.
	if !d.runs(ctx, c.Runtime.Image) {
		if err := d.Images.Verify(ctx, c.Runtime.Image); err != nil {
			return nil, fails(StepImage, err)
		}
	}
	d.log(c).Info("image ready", journal.ImageReady.Attr(), "image", c.Runtime.Image)
	var dir string
	for i := range c.Models {
		m := &c.Models[i]
		if m.Archived {
			continue
		}
		where, err := d.Models.Ensure(ctx, m, func(done, total int64) { d.Progress(m, done, total) })
		if err != nil {
			return nil, &Error{Step: StepModel, Model: m.Digest(), Err: err}
		}
		d.log(c).Info("model ready", journal.ModelReady.Attr(), "model", m.Name, "digest", m.Digest())
		if m == s.Model() {
			dir = where
		}
	}
	unit, err := d.render(c, info, dir)
	if err != nil {
		return nil, fails(StepUnit, err)
	}
	if err := quadlet.Check(unit); err != nil {
		return nil, fails(StepUnit, err)
	}
	return &Plan{s, unit}, nil
}

// trust is what the network says now of whose images may run. It holds for
// older configurations, too: else a key that was taken back would be good again
// as soon as a node goes back to one of them.
func (d *Deployer) trust(s *snapshot.Snapshot) *snapshot.ImageTrust {
	if n := d.Newest(s.Config().Network.Name); n != nil {
		s = n
	}
	return &s.Config().ImageTrust
}

// Trusted fails if the network has taken back its trust in s's image.
func (d *Deployer) Trusted(ctx context.Context, s *snapshot.Snapshot) error {
	c := s.Config()
	return fails(StepImage, d.Images.Trusted(ctx, c.Runtime.Image, &c.ImageTrust, d.trust(s)))
}

// runs reports whether the runtime is up and of this image.
func (d *Deployer) runs(ctx context.Context, ref snapshot.ImageRef) bool {
	ctx, cancel := context.WithTimeout(ctx, lookTimeout)
	defer cancel()
	c, err := d.Containers.Container(ctx, quadlet.ContainerName)
	if err != nil || !c.Running {
		return false
	}
	id, _, err := d.Containers.Image(ctx, ref)
	return err == nil && id == c.ImageID
}

// render asks the machine for what the unit depends on.
func (d *Deployer) render(c *snapshot.Config, info podman.Info, modelDir string) (quadlet.Unit, error) {
	nodes, err := d.Devices(c.Runtime.Devices)
	if err != nil {
		return quadlet.Unit{}, err
	}
	return quadlet.Render(quadlet.Params{
		Config: c, ModelDir: modelDir, SocketDir: d.SocketDir, BridgePath: d.Bridge, DeviceNodes: nodes,
		PodmanVersion: podmanVersion(info),
		DelegatedPids: slices.Contains(info.CgroupControllers, "pids"),
		MemoryMax:     d.ceiling(info),
	})
}

const (
	// lookTimeout bounds each look at the runtime. What answers on its socket
	// may be an engine that was taken over, and would rather not be judged.
	lookTimeout = 30 * time.Second

	// stopTimeout bounds the stop of a runtime that must not go on. The unit's
	// own time to stop is shorter for every configuration but an absurd one,
	// and systemd finishes the job without us.
	stopTimeout = 2 * time.Minute
)

// Phases of [Deployer.Apply], in order.
const (
	PhaseStop     = "stop" // the old runtime, if the unit changes; and the new unit is installed
	PhaseStart    = "start"
	PhaseSeal     = "seal" // the check that it is sealed
	PhaseValidate = "validate"
)

// Patience is how long the plan may take from its start to its last right
// answer: what does not become healthy in that time is not going to.
func (p *Plan) Patience() time.Duration {
	c := p.snapshot.Config()
	d := p.unit.Patience + lookTimeout
	for _, g := range c.Validation.Golden {
		d += g.Timeout.Duration()
	}
	return d
}

// Warm has the system read the runtime's model ahead of its start, no more than
// most bytes of it.
func (d *Deployer) Warm(ctx context.Context, p *Plan, most int64) (read int64, err error) {
	return d.Models.Warm(ctx, p.snapshot.Model(), most)
}

// Apply makes the plan what runs, and validates it. It calls begin at the start
// of each phase.
func (d *Deployer) Apply(ctx context.Context, p *Plan, begin func(phase string)) (*Deployment, error) {
	dep, err := d.apply(ctx, p, begin)
	if !mustStop(ctx, err) {
		return dep, err
	}
	// It is not left behind, also when the agent is about to end.
	sctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopTimeout)
	defer cancel()
	if stopErr := d.Units.Stop(sctx, p.unit.Service); stopErr != nil {
		err = errors.Join(err, fmt.Errorf("and stopping it failed: %w", stopErr))
	}
	return nil, err
}

// mustStop tells a runtime that is not sealed or answers wrongly from one whose
// check was interrupted, which the next start of the agent repeats.
func mustStop(ctx context.Context, err error) bool {
	e, ok := errors.AsType[*Error](err)
	switch {
	case !ok || e.Step != StepSandbox && e.Step != StepValidate:
		return false
	case errors.Is(err, sandbox.ErrNotSealed):
		return true
	}
	return ctx.Err() == nil
}

func (d *Deployer) apply(ctx context.Context, p *Plan, begin func(phase string)) (*Deployment, error) {
	begin(PhaseStop)
	if err := d.Trusted(ctx, p.snapshot); err != nil {
		return nil, err
	}
	if err := d.makeSocketDir(); err != nil {
		return nil, fails(StepUnit, err)
	}
	if _, err := d.Units.Install(ctx, d.UnitDir, p.unit.Name, p.unit.Text); err != nil {
		return nil, fails(StepUnit, err)
	}
	state, err := d.Units.State(ctx, p.unit.Service)
	if err != nil {
		return nil, fails(StepStart, err)
	}
	if err := Loaded(state); err != nil {
		return nil, fails(StepSandbox, err)
	}
	begin(PhaseStart)
	if state.Active != "active" { // Install has stopped what it changed
		if state, err = d.start(ctx, p, state); err != nil {
			if errors.Is(err, sandbox.ErrNotSealed) {
				return nil, fails(StepSandbox, err)
			}
			return nil, fails(StepStart, err)
		}
	}
	dep := &Deployment{snapshot: p.snapshot, unit: p.unit.Digest, invocation: state.InvocationID, socket: filepath.Join(d.SocketDir, quadlet.SocketName)}
	d.classify(dep)
	engine := d.Engine(dep.socket)
	defer engine.Close()
	begin(PhaseSeal)
	if dep.seal, err = d.checkSealed(ctx, p, engine); err != nil {
		return nil, fails(StepSandbox, err)
	}
	begin(PhaseValidate)
	if dep.print, err = d.validate(ctx, engine, dep); err != nil {
		return nil, err
	}
	return dep, nil
}

// Loaded checks what systemd would start. What the unit's file says has been
// checked; what systemd has made of it may hold an administrator's drop-in.
func Loaded(state systemd.State) error {
	if err := errors.Join(quadlet.CheckCommand(state.Command), quadlet.CheckSettings(state.Settings)); err != nil {
		return fmt.Errorf("%w: %w; see systemctl --user cat %s", sandbox.ErrNotSealed, err, quadlet.ServiceName)
	}
	return nil
}

// validate asks the golden requests, all of the very start that dep is of, and
// returns the fingerprint of the answers.
func (d *Deployer) validate(ctx context.Context, engine Engine, dep *Deployment) (digest.Digest, error) {
	c := dep.snapshot.Config()
	var answers []determinism.Answer
	for _, g := range c.Validation.Golden {
		a, err := engine.Golden(ctx, g, c.Runtime.Model)
		if err != nil {
			return digest.Digest{}, fails(StepValidate, err)
		}
		answers = append(answers, a)
	}
	state, err := d.Units.State(ctx, quadlet.ServiceName)
	if err == nil && !dep.Current(state) {
		err = fmt.Errorf("%s ended while it was looked at, and is %s (%s)", quadlet.ServiceName, state.Active, state.Result)
	}
	if err != nil {
		return digest.Digest{}, fails(StepStart, err)
	}
	print, err := determinism.Fingerprint(answers)
	return print, fails(StepValidate, err)
}

// ErrOtherUnit says that a plan asks for another runtime than the one that is up.
var ErrOtherUnit = errors.New("it asks for another runtime than the one that is up")

// Shareable reports whether the runtime of one configuration could be that of
// another, as far as both say it: nothing has been fetched or rendered for that.
func Shareable(a, b *snapshot.Snapshot) bool {
	x, y := a.Config().Runtime, b.Config().Runtime
	return reflect.DeepEqual(x, y) && a.Model().Digest() == b.Model().Digest()
}

// Share makes a deployment of another network's plan on the runtime that dep is
// of: the unit of both has to be the very same text, with image, model, settings
// and devices, and the plan's own golden requests have to pass. The runtime goes
// on, whatever comes of it.
func (d *Deployer) Share(ctx context.Context, dep *Deployment, p *Plan) (*Deployment, error) {
	if p.unit.Digest != dep.unit {
		return nil, fails(StepUnit, ErrOtherUnit)
	}
	shared := *dep
	shared.snapshot = p.snapshot
	var err error
	if shared.print, err = d.Validate(ctx, &shared); err != nil {
		return nil, err
	}
	return &shared, nil
}

// log returns the log with the name of the network whose configuration it is
// about.
func (d *Deployer) log(c *snapshot.Config) *slog.Logger { return d.Log.With("network", c.Network.Name) }

// Validate repeats the golden requests of a deployment that is up, and returns the
// fingerprint of the answers. The runtime goes on, whatever comes of it.
func (d *Deployer) Validate(ctx context.Context, dep *Deployment) (digest.Digest, error) {
	engine := d.Engine(dep.socket)
	defer engine.Close()
	return d.validate(ctx, engine, dep)
}

// Clean removes images and models that none of the snapshots asks for.
func (d *Deployer) Clean(ctx context.Context, keep ...*snapshot.Snapshot) error {
	var images []snapshot.ImageRef
	var models []*snapshot.Model
	for _, s := range keep {
		images = append(images, s.Config().Runtime.Image)
		for i := range s.Config().Models {
			models = append(models, &s.Config().Models[i])
		}
	}
	return errors.Join(d.Images.Retain(ctx, images...), d.Models.Retain(models))
}

// makeSocketDir makes the directory that is shared with the container: open to
// the container's user, inside a parent that only the agent can enter.
func (d *Deployer) makeSocketDir() error {
	parent := filepath.Dir(d.SocketDir)
	if err := os.MkdirAll(parent, 0o700); err != nil {
		return err
	}
	if err := os.Chmod(parent, 0o700); err != nil {
		return err
	}
	if err := os.MkdirAll(d.SocketDir, 0o777); err != nil {
		return err
	}
	return os.Chmod(d.SocketDir, 0o777) // past the umask
}

func (d *Deployer) start(ctx context.Context, p *Plan, state systemd.State) (systemd.State, error) {
	d.log(p.snapshot.Config()).Info("starting runtime", journal.RuntimeStarting.Attr(), "was", state.Active, "image", p.snapshot.Config().Runtime.Image)
	// The limit on starts is for systemd's own. It would refuse a new
	// configuration, or somebody's word.
	if state.Active == "failed" || state.Active == "inactive" {
		if err := d.Units.ResetFailed(ctx, p.unit.Service); err != nil {
			return state, err
		}
	}
	begin := time.Now()
	// A start that systemd, or an agent before this one, has begun is waited
	// for: a large model takes minutes to load, and a restart would begin anew.
	if err := d.Units.Start(ctx, p.unit.Service); err != nil {
		if job, ok := errors.AsType[*systemd.JobError](err); ok && job.State.Result == "exit-code" && job.State.ExitStatus == contract.ExitSandbox {
			return state, fmt.Errorf("%w: seen from inside: %s", sandbox.ErrNotSealed, cmp.Or(job.State.StatusText, "the journal of "+p.unit.Service+" says how"))
		}
		return state, err
	}
	d.log(p.snapshot.Config()).Info("runtime started", "took", time.Since(begin).Round(time.Millisecond))
	state, err := d.Units.State(ctx, p.unit.Service)
	if err == nil && state.Active != "active" {
		err = fmt.Errorf("%s is %s right after its start (%s)", p.unit.Service, state.Active, state.Result)
	}
	return state, err
}
