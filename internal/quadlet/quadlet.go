// Package quadlet owns the text of the sealed runtime's unit: how a checked
// configuration becomes a Quadlet file, and the rules that every such file
// keeps. It is pure.
//
// The rule it keeps: unit text is code. Nothing from outside gets into it but
// numbers and names of known form, [Check] converts the finished text with
// Podman's own generator, and whatever the resulting podman command line holds
// that is not on the list of what a sealed runtime needs is refused. [Render]
// and Check know nothing of each other: a mistake in the one is caught by the
// other.
package quadlet

import (
	"errors"
	"fmt"
	"path"
	"regexp"
	"strings"
	"text/template"
	"time"

	"github.com/resultity/node/internal/bridge/contract"
	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/snapshot"
	templates "github.com/resultity/node/quadlet"
)

// Names of the one runtime of an account.
const (
	ContainerName = "resultity-runtime"
	FileName      = "resultity-runtime.container"
	ServiceName   = "resultity-runtime.service"
)

// SocketName is the engine's socket in the directory that is shared with the
// container.
const SocketName = "engine.sock"

// BridgeFile is where the bridge's binary is in the container.
const BridgeFile = "/resultity-bridge"

// What else the image has for us to mount over.
const (
	modelsDir = "/models"
	socketDir = "/run/resultity"
)

// containerUser is a user that no image gives rights to.
const containerUser = "1000:1000"

// pidsLimit bounds processes and threads.
const pidsLimit = 4096

// PodmanVersion is the version of the Podman that will read the unit.
type PodmanVersion struct{ Major, Minor int }

// Oldest is the first Podman that knows all keys of the unit and looks for
// units in the runtime directory. A Podman that does not know a key drops the
// whole file without a word.
var Oldest = PodmanVersion{5, 3}

// Supported returns an error for a Podman that the unit, or the lock on images,
// was not made for.
func (v PodmanVersion) Supported() error {
	switch {
	case v.Major < Oldest.Major || v.Major == Oldest.Major && v.Minor < Oldest.Minor:
		return fmt.Errorf("this machine has Podman %v, want %v or later: upgrade Podman", v, Oldest)
	case v.Major > newest:
		// It looks for its signature policy in another place, so that the
		// agent's would be ignored without a word.
		return fmt.Errorf("this machine has Podman %v, whose image policy this agent cannot set: upgrade the agent, or use Podman %d", v, newest)
	}
	return nil
}

// newest is the major version that has been tried.
const newest = 5

func (v PodmanVersion) String() string { return fmt.Sprintf("%d.%d", v.Major, v.Minor) }

// Params is all that the unit depends on.
type Params struct {
	Config        *snapshot.Config
	ModelDir      string // host directory with the files of the runtime's model
	SocketDir     string // host directory for the engine's socket
	BridgePath    string // host path of the bridge's binary
	PodmanVersion PodmanVersion

	// DeviceNodes are the nodes and sockets that the CDI specifications of
	// Config.Runtime.Devices bring in. The bridge refuses any other.
	DeviceNodes []string

	// DelegatedPids says that the account may use the pids controller. Without
	// it crun starts no container that has a limit.
	DelegatedPids bool

	// MemoryMax is the most memory that the runtime may use, in bytes; 0 for no
	// ceiling, as where the account may not use the memory controller: systemd
	// would drop one without a word.
	MemoryMax int64
}

// Unit is a rendered Quadlet file. The same parameters give the same text, and
// what the text does not depend on (other models, limits of the network that
// only the agent keeps) does not change it, so that a runtime is not restarted
// for nothing.
type Unit struct {
	Name    string // of the file
	Service string // that Podman's generator makes of it
	Text    []byte
	Digest  digest.Digest // of Text

	// Patience is how long a stop of what ran before, and then the start, may
	// take at most.
	Patience time.Duration
}

// Render makes the unit. It fails if a path or a name has a form that it would
// have to quote, or if Podman is too old.
func Render(p Params) (Unit, error) {
	f, err := p.fields()
	if err != nil {
		return Unit{}, fmt.Errorf("render %s: %w", FileName, err)
	}
	var b strings.Builder
	if err := runtimeTemplate.Execute(&b, f); err != nil {
		return Unit{}, fmt.Errorf("render %s: %w", FileName, err)
	}
	text := []byte(b.String())
	return Unit{Name: FileName, Service: ServiceName, Text: text, Digest: digest.Of(text),
		Patience: time.Duration(f.TimeoutStop+f.TimeoutStart) * time.Second}, nil
}

var runtimeTemplate = template.Must(template.New(FileName).Option("missingkey=error").Parse(templates.Runtime))

// fields are what the template may use. Each is a number, a word or a path.
type fields struct {
	Model, Engine, ContainerName word
	Image                        snapshot.ImageRef
	ModelDir, SocketDir          hostPath
	BridgePath                   hostPath
	TmpBytes, ShmBytes           int64
	ExecTmp                      bool
	PidsLimit                    int
	Devices, Env                 []word
	Exec                         words
	StopTimeout, TimeoutStop     int64 // seconds
	TimeoutStart, Watchdog       int64 // seconds
	MemoryMax                    int64 // bytes, 0 for none
}

// Time that a step may take beyond what the one inside it may.
const (
	bridgeSlack  = 10 // seconds for the bridge to end the engine after its grace
	podmanSlack  = 20 // for Podman to remove the container
	startupSlack = 60 // for Podman to start it
)

func (p *Params) fields() (*fields, error) {
	if err := p.PodmanVersion.Supported(); err != nil {
		return nil, err
	}
	if p.Config == nil {
		return nil, errors.New("no configuration")
	}
	r := &p.Config.Runtime
	d, err := drive(p.Config)
	if err != nil {
		return nil, err
	}
	f := &fields{
		Image:        r.Image,
		TmpBytes:     r.TmpBytes,
		ShmBytes:     r.ShmBytes,
		ExecTmp:      d.execTmp,
		StopTimeout:  int64(r.StopTimeout) + bridgeSlack,
		TimeoutStop:  int64(r.StopTimeout) + bridgeSlack + podmanSlack,
		TimeoutStart: int64(r.StartTimeout) + startupSlack,
		Watchdog:     int64(r.Watchdog),
		MemoryMax:    p.MemoryMax,
	}
	if p.DelegatedPids {
		f.PidsLimit = pidsLimit
	}
	var errs []error
	check := func(err error) { errs = append(errs, err) }
	check(f.Model.set("model", r.Model))
	check(f.Engine.set("engine", string(r.Engine)))
	check(f.ContainerName.set("container", ContainerName))
	check(f.ModelDir.set("model directory", p.ModelDir))
	check(f.SocketDir.set("socket directory", p.SocketDir))
	check(f.BridgePath.set("bridge", p.BridgePath))
	if n := len(p.SocketDir) + len("/"+SocketName); n > maxSocketPath {
		check(fmt.Errorf("socket directory %.200q: the path of the socket in it has %d bytes, the kernel takes %d", p.SocketDir, n, maxSocketPath))
	}
	for _, name := range r.Devices {
		var w word
		check(w.set("device", name))
		f.Devices = append(f.Devices, w)
	}
	for _, e := range d.env {
		var w word
		check(w.set("environment", e))
		f.Env = append(f.Env, w)
	}
	args, err := p.bridge(d).Args()
	check(err)
	for _, a := range args {
		var w word
		check(w.set("argument", a))
		f.Exec = append(f.Exec, w)
	}
	return f, errors.Join(errs...)
}

// maxSocketPath is the room for a path in a socket address.
const maxSocketPath = 107

// bridge returns the bridge's command line.
func (p *Params) bridge(d driver) contract.Options {
	r := &p.Config.Runtime
	o := contract.Defaults()
	o.Socket = socketDir + "/" + SocketName
	o.Engine = listen
	o.Model = r.Model
	o.Health = d.health
	o.StartTimeout = r.StartTimeout.Duration()
	o.Watchdog = r.Watchdog.Duration()
	o.Stall = r.Stall.Duration()
	// An engine that hangs while idle is found as fast as one that hangs at
	// work, or nearly so.
	o.CanaryEvery = max(r.Watchdog.Duration(), time.Second)
	o.StopGrace = r.StopTimeout.Duration()
	// The agent's request to the engine is a little larger than the client's.
	o.MaxBody = p.Config.Limits.RequestBytes + 64<<10
	if r.Settings.Slots > 0 { // else the options are refused
		// One beside the slots, for a request that has been given up and is not
		// gone yet when the next one comes.
		o.MaxInFlight = r.Settings.Slots + 1
	}
	o.Writable = []string{"/tmp", "/dev/shm"}
	o.ReadOnly = []string{modelsDir, BridgeFile}
	o.Devices = p.DeviceNodes
	o.Command = d.command
	return o
}

// word is text that means only itself, in a unit and on a command line: no
// white space, quote, backslash, % or $.
type word struct{ s string }

var wordPattern = regexp.MustCompile(`^[A-Za-z0-9/._:=,+@-]{1,1000}$`)

func (w *word) set(what, s string) error {
	if !wordPattern.MatchString(s) {
		return fmt.Errorf("%s %.200q does not match %s", what, s, wordPattern)
	}
	w.s = s
	return nil
}

func (w word) String() string { return w.s }

// words are a command line.
type words []word

func (ws words) String() string {
	var b strings.Builder
	for i, w := range ws {
		if i > 0 {
			b.WriteByte(' ')
		}
		b.WriteString(w.s)
	}
	return b.String()
}

// hostPath is a path on the host that a mount may name.
type hostPath struct{ s string }

var pathPattern = regexp.MustCompile(`^(/[A-Za-z0-9._+@-]+){2,}$`)

func (p *hostPath) set(what, s string) error {
	if !cleanPath(s) {
		return fmt.Errorf("%s %.200q: want a clean absolute path of letters, digits and . _ + @ -, below a directory that is not the root", what, s)
	}
	p.s = s
	return nil
}

func cleanPath(s string) bool {
	return len(s) < 4096 && pathPattern.MatchString(s) && path.Clean(s) == s
}

func (p hostPath) String() string { return p.s }
