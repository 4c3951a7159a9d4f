package agent

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/resultity/node/internal/config"
	"github.com/resultity/node/internal/deploy"
	"github.com/resultity/node/internal/determinism"
	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/durable"
	"github.com/resultity/node/internal/generation"
	"github.com/resultity/node/internal/hardware"
	"github.com/resultity/node/internal/identity"
	"github.com/resultity/node/internal/image"
	"github.com/resultity/node/internal/journal"
	"github.com/resultity/node/internal/model"
	"github.com/resultity/node/internal/model/fetch"
	"github.com/resultity/node/internal/model/share"
	"github.com/resultity/node/internal/podman"
	"github.com/resultity/node/internal/quadlet"
	"github.com/resultity/node/internal/runtime"
	"github.com/resultity/node/internal/sandbox"
	"github.com/resultity/node/internal/signer"
	"github.com/resultity/node/internal/snapshot"
	"github.com/resultity/node/internal/systemd"
	"github.com/resultity/node/internal/work"
)

// Exit codes. The unit does not restart after ExitConfig, since no restart
// mends a file.
const (
	ExitOK     = 0
	ExitFailed = 1
	ExitUsage  = 64
	ExitConfig = 78
)

// DefaultConfig is where a packaged agent's configuration is.
const DefaultConfig = "/etc/resultity/agent.toml"

// finalError is a failure that only the operator can mend.
type finalError struct {
	event *journal.Event
	err   error
}

func (e *finalError) Error() string { return e.err.Error() }
func (e *finalError) Unwrap() error { return e.err }

// inDir sorts what can go wrong with a directory of ours. Whether a disk is still
// full, or read-only after an error, a moment later is worth a look; who may write
// there is not.
func inDir(key string, err error) error {
	switch {
	case errors.Is(err, syscall.EROFS):
		return fmt.Errorf("%s: %w; look at its disk (findmnt, dmesg); if the unit's sandbox is the reason, name the directory in ReadWritePaths= of a drop-in", key, err)
	case errors.Is(err, fs.ErrPermission), errors.Is(err, syscall.ENOTDIR):
		return &finalError{journal.ConfigInvalid, fmt.Errorf("%s: %w; it has to be a directory that the agent's user may write", key, err)}
	case err != nil:
		return fmt.Errorf("%s: %w", key, err)
	}
	return nil
}

// Main reads the command line, puts the agent together and runs it until ctx
// ends. It returns the exit code. What goes wrong is one record in the log.
func Main(ctx context.Context, args []string, stdout io.Writer, stderr *os.File, env func(string) string, version string) int {
	flags := flag.NewFlagSet("resultity-agent", flag.ContinueOnError)
	flags.SetOutput(stderr)
	flags.Usage = func() {
		fmt.Fprint(stderr, "usage: resultity-agent [--config FILE] run|check|scrub|version\n\n"+
			"  run      run the node; systemd does this (resultity-agent.service)\n"+
			"  check    read the configuration, say what is wrong with it, and end\n"+
			"  scrub    read the models on disk again and tell the agent what is damaged;\n"+
			"           systemd does this (resultity-scrub.timer)\n"+
			"  version  print the version\n\n"+
			"exit status: 0 done; 1 failed, systemd tries again; 64 wrong command line;\n"+
			"78 wrong configuration or key, which no restart mends\n\n")
		flags.PrintDefaults()
	}
	file := flags.String("config", defaultConfig(env), "configuration `file`; drop-ins are in FILE.d")
	if err := flags.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return ExitOK
		}
		return ExitUsage
	}
	log := journal.New(stderr, slog.LevelInfo)
	verb := flags.Arg(0)
	if flags.NArg() != 1 || !slices.Contains([]string{"run", "check", "scrub", "version"}, verb) {
		flags.Usage() // flags come first: one that follows the verb would be ignored
		return ExitUsage
	}
	if verb == "version" {
		fmt.Fprintln(stdout, version)
		return ExitOK
	}
	if verb == "check" {
		env = withRuntimeDir(env)
	}
	cfg, err := config.Load(*file, env)
	if err != nil {
		log.Error("configuration", journal.ConfigInvalid.Attr(), "error", err)
		return ExitConfig
	}
	if verb == "check" {
		fmt.Fprintf(stdout, "%s: ok\n", *file)
		return ExitOK
	}
	log = journal.New(stderr, cfg.Log.SlogLevel())
	if verb == "scrub" {
		return scrub(ctx, cfg, log)
	}
	a, err := New(ctx, cfg, env, log, version)
	if err == nil {
		a.configFile = *file
		err = a.Run(ctx)
	}
	code := exitCode(ctx, err, a.log) // while the spool is open: the network has to read it, too
	if err := a.Close(); err != nil {
		code = max(code, exitCode(ctx, err, log))
	}
	return code
}

// withRuntimeDir adds what sudo leaves out: root checks a file that the account's
// service manager will start the agent with, which has a runtime directory.
func withRuntimeDir(env func(string) string) func(string) string {
	return func(name string) string {
		if v := env(name); v != "" || name != "XDG_RUNTIME_DIR" {
			return v
		}
		return filepath.Join("/run/user", strconv.Itoa(os.Getuid()))
	}
}

// exitCode logs why the agent ended, if not because it was told to.
func exitCode(ctx context.Context, err error, log *slog.Logger) int {
	final, isFinal := errors.AsType[*finalError](err)
	switch {
	case err == nil, ctx.Err() != nil && errors.Is(err, ctx.Err()): // told to stop while it started
		return ExitOK
	case isFinal:
		log.Error("cannot run", final.event.Attr(), "error", err)
		return ExitConfig
	}
	log.Error("stopped", journal.AgentFailed.Attr(), "error", err)
	return ExitFailed
}

// defaultConfig prefers an ordinary user's own file.
func defaultConfig(env func(string) string) string {
	own := filepath.Join(env("HOME"), ".config/resultity/agent.toml")
	if dir := env("XDG_CONFIG_HOME"); dir != "" {
		own = filepath.Join(dir, "resultity/agent.toml")
	}
	if _, err := os.Stat(own); err == nil {
		return own
	}
	return DefaultConfig
}

// New puts an agent together. It opens the identity and the stores, and reaches
// the user manager; Podman and the network are reached when they are needed. The
// agent has to be closed, also with an error.
func New(ctx context.Context, cfg *config.Config, env func(string) string, log *slog.Logger, version string) (*Agent, error) {
	a := empty(cfg, log, version)
	for key, dir := range map[string]string{"paths.state": cfg.Paths.State, "paths.runtime": cfg.Paths.Runtime} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return a, inDir(key, err)
		}
	}
	if err := a.lock(); err != nil {
		return a, err
	}
	a.forgetKept()
	if err := a.each((*membership).openStore); err != nil {
		return a, err
	}
	if err := a.openIdentity(env); err != nil {
		return a, err
	}
	sources, ca, err := sourcesClient(cfg.Networks)
	if err != nil {
		return a, &finalError{journal.ConfigInvalid, err}
	}
	a.sources = sources
	if err := a.each((*membership).open); err != nil {
		return a, err
	}
	if a.gens, err = generation.Open(filepath.Join(cfg.Paths.State, "generations"), time.Now); err != nil {
		return a, inDir("paths.state", err)
	}
	models, err := model.Open(filepath.Join(cfg.Paths.State, "models"), fetch.New(a.sources.Transport, cfg.Models.Neighbours, a.log), a.log)
	if err != nil {
		return a, err
	}
	a.closers = append(a.closers, models.Close)
	a.verify = func(ctx context.Context, s *snapshot.Snapshot) error {
		for i := range s.Config().Models {
			m := &s.Config().Models[i]
			if m.Archived && !models.Have(m) {
				continue // nobody has promised that it is here
			}
			if err := models.Verify(ctx, m); err != nil {
				return err
			}
		}
		return a.verifyImage(ctx, s)
	}
	a.verifyImage = func(ctx context.Context, s *snapshot.Snapshot) error {
		if i := a.images.Load(); i != nil {
			return i.Verify(ctx, s.Config().Runtime.Image)
		}
		return nil
	}
	a.distrust = models.Distrust
	if cfg.Models.Serve != "" {
		a.share = share.New(a.lists, models.Open, cfg.Models.Rate(), a.log)
	}
	units, err := systemd.Dial(ctx)
	if err != nil {
		return a, err
	}
	a.closers = append(a.closers, func() error { units.Close(); return nil })
	a.units = units
	a.profile = hardware.Profile(cfg.Paths.State)
	if a.profile.Systemd, err = units.Version(ctx); err != nil {
		a.log.Debug("version of the service manager not known", "error", err) // a profile is never a reason to fail
	}
	a.openDeployer = func(ctx context.Context) (deployer, error) { return a.newDeployer(ctx, models, units, ca) }
	a.openEngine = func(socket string) engine { return openEngine(socket) }
	a.recallDrain()
	a.machine = a.lookAround
	a.probes = a.openProbes()
	a.unitFiles = units.Files
	return a, nil
}

// empty returns an agent without a world around it.
func empty(cfg *config.Config, log *slog.Logger, version string) *Agent {
	r := newRecords(log.Handler())
	a := &Agent{
		cfg: cfg, version: version, log: slog.New(r), memory: hardware.Available, slots: work.NewSlots(),
		look: make(chan struct{}, 1), tasks: make(chan task), scrubbed: make(chan digest.Digest, maxScrubbed), scrubDone: make(chan struct{}, 1),
	}
	a.shared = shared{state: cfg.Paths.State, version: version, log: a.log, keeps: cfg.Log, keepN: cfg.Replay.Keep, spools: r.to, slots: a.slots}
	return a
}

// lock says that this agent runs here, until it is closed.
func (a *Agent) lock() error {
	name := filepath.Join(a.cfg.Paths.State, "lock")
	f, err := os.OpenFile(name, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return inDir("paths.state", err)
	}
	a.closers = append(a.closers, f.Close)
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return fmt.Errorf("another agent runs here: lock %s: %w", name, err)
	}
	return nil
}

// refused is a network that could not be joined.
type refused struct {
	network string
	err     error
}

// each does one step towards a membership in each network. One whose file or store
// only the operator can mend is left out, and said to be, while the others go on.
func (a *Agent) each(step func(*membership) error) error {
	if a.members == nil {
		for _, net := range a.cfg.Networks {
			a.members = append(a.members, newMembership(net, a, a.shared))
		}
	}
	var left []*membership
	for _, m := range a.members {
		err := step(m)
		if err == nil {
			left = append(left, m)
			continue
		}
		final, isFinal := errors.AsType[*finalError](err)
		if !isFinal || len(a.members) == 1 {
			return err
		}
		m.log.Error("this network cannot be joined; the others go on", final.event.Attr(), "error", err)
		a.refused = append(a.refused, refused{m.net.Name, err})
		a.closers = append(a.closers, m.close) // its log is kept until the end
	}
	if len(left) == 0 {
		return a.refused[0].err
	}
	a.members = left
	return nil
}

// openIdentity finds who holds the node's key.
func (a *Agent) openIdentity(env func(string) string) error {
	dir := filepath.Join(a.cfg.Paths.State, "identity")
	path := a.cfg.Identity.Signer
	if path == "" {
		var err error
		if path, err = a.findSigner(dir); err != nil {
			return err
		}
	}
	if path == config.NoSigner {
		return a.openKey(dir, env)
	}
	c, err := signer.Dial(path)
	if err != nil {
		return fmt.Errorf("%s has no key, and %s: %w; restore the one or look at the other", dir, path, err)
	}
	a.key = c
	a.closers = append(a.closers, c.Close)
	a.log.Info("the key is held by resultity-signer", "node", c.Address())
	return nil
}

// findSigner prefers a key that is here: it has to be moved, not forgotten. A
// node that is known to its network and has no key here has one in the signer,
// also while that is away; a second key would make it another node.
func (a *Agent) findSigner(dir string) (string, error) {
	if identity.Exists(dir) {
		return config.NoSigner, nil
	}
	known := false
	for _, m := range a.members {
		reg, err := m.store.Registration()
		if err != nil {
			return "", err
		}
		known = known || reg != nil
	}
	_, installed := os.Stat(signerUnit)
	if known && installed == nil || syscall.Access(signer.SocketPath, accessWrite) == nil {
		return signer.SocketPath, nil
	}
	return config.NoSigner, nil
}

// signerUnit is there where resultity-signer is installed, whether it runs or not.
const signerUnit = "/usr/lib/systemd/system/resultity-signer.socket"

const accessWrite = 2 // W_OK of unistd.h

// openKey opens the key that this process holds, or makes it.
func (a *Agent) openKey(dir string, env func(string) string) error {
	key, created, err := identity.Open(identity.Options{
		Dir: dir, Passphrase: a.cfg.Identity.Passphrase, Credentials: env("CREDENTIALS_DIRECTORY"),
	})
	if errors.Is(err, identity.ErrRefused) {
		return &finalError{journal.IdentityRefused, err}
	}
	if err != nil {
		return inDir("paths.state", err)
	}
	c, err := signer.OpenCounters(filepath.Join(dir, "counters"), key.Address())
	if errors.Is(err, signer.ErrCounters) {
		return &finalError{journal.IdentityRefused, err}
	}
	if err != nil {
		return inDir("paths.state", err)
	}
	a.key, a.held = signer.NewLocal(key, c), key
	a.closers = append(a.closers, a.key.Close)
	if created {
		a.log.Info("identity created", journal.IdentityCreated.Attr(), "node", key.Address())
	}
	return nil
}

// networkClient makes the HTTP client for a network. Its ca stands in place of the
// system's authorities. The protocol is TLS 1.3.
func networkClient(n *config.Network) (*http.Client, error) {
	if n.CA == "" {
		return client(tls.VersionTLS13, nil), nil
	}
	own := x509.NewCertPool()
	if _, err := addCA(own, n); err != nil {
		return nil, err
	}
	return client(tls.VersionTLS13, own), nil
}

// sourcesClient makes the HTTP client for sources of models and images. What they
// serve is checked by hash or signature, so that the authorities of all networks
// stand beside the system's: a private network may well take its models from a
// public host. What hosts of models speak is theirs.
func sourcesClient(networks []config.Network) (_ *http.Client, ca []byte, err error) {
	var all *x509.CertPool
	for i := range networks {
		if networks[i].CA == "" {
			continue
		}
		if all == nil {
			if all, err = x509.SystemCertPool(); err != nil {
				return nil, nil, fmt.Errorf("the system's certificates: %w", err)
			}
		}
		raw, err := addCA(all, &networks[i])
		if err != nil && len(networks) == 1 {
			return nil, nil, err
		}
		ca = append(append(ca, raw...), '\n') // a network whose file is wrong is not joined, and says so
	}
	return client(tls.VersionTLS12, all), ca, nil
}

// maxNamed bounds a file of authorities, and a network's first root, in bytes.
const maxNamed = 1 << 20

func addCA(pool *x509.CertPool, n *config.Network) (raw []byte, err error) {
	if raw, err = durable.ReadFile(n.CA, maxNamed); err != nil {
		return nil, fmt.Errorf("network.%s.ca: %w", n.Name, err)
	}
	if !pool.AppendCertsFromPEM(raw) {
		return nil, fmt.Errorf("network.%s.ca: %s has no PEM certificate", n.Name, n.CA)
	}
	return raw, nil
}

func client(oldest uint16, roots *x509.CertPool) *http.Client {
	return &http.Client{Transport: &http.Transport{
		Proxy: http.ProxyFromEnvironment, TLSClientConfig: &tls.Config{MinVersion: oldest, RootCAs: roots}, TLSHandshakeTimeout: 15 * time.Second,
		ResponseHeaderTimeout: 30 * time.Second, IdleConnTimeout: time.Minute, MaxIdleConnsPerHost: 4, ForceAttemptHTTP2: true,
	}}
}

// openEngine makes a client of the engine that talks to the runtime's container
// and to nobody else.
func openEngine(socket string) *runtime.Client {
	return runtime.New(socket, runtime.Container("/proc", quadlet.ServiceName))
}

// policyDir is where Podman reads what it may let in.
func (a *Agent) policyDir() string {
	return filepath.Join(a.cfg.Paths.State, "podman/.config/containers")
}

// newDeployer starts Podman's API service, which takes a moment that the start
// of the agent does not wait for.
func (a *Agent) newDeployer(ctx context.Context, models *model.Store, units *systemd.Conn, ca []byte) (*deploy.Deployer, error) {
	p, err := podman.Dial(ctx, a.cfg.Paths.Podman)
	if err != nil {
		return nil, err
	}
	if v, err := p.Version(ctx); err != nil {
		a.log.Debug("version of Podman not known", "error", err)
	} else {
		a.podman.Store(&v)
	}
	// HOME of the API service is below the state directory; see
	// resultity-podman.service.
	images, err := image.New(a.sources.Transport, p, a.policyDir(), ca, a.log)
	if err != nil {
		return nil, err
	}
	a.images.Store(images)
	return &deploy.Deployer{
		Images: images, Models: models, Units: units, Containers: p,
		Devices:   func(names []string) ([]string, error) { return hardware.DeviceNodes(hardware.SpecDirs, names) },
		Mounts:    func(names []string) ([]string, error) { return hardware.DeviceMounts(hardware.SpecDirs, names) },
		Env:       func(names []string) ([]string, error) { return hardware.DeviceEnv(hardware.SpecDirs, names) },
		Computer:  func(c hardware.Computes) (determinism.Hardware, error) { return hardware.Class("/", c) },
		Look:      func(pid int) (*sandbox.Outside, error) { return sandbox.Look("/proc", pid) },
		Engine:    func(socket string) deploy.Engine { return openEngine(socket) },
		Newest:    func(network string) *snapshot.Snapshot { return a.named(network).board.snapshot() },
		Allowed:   a.cfg.Runtime.Devices,
		Memory:    a.cfg.Runtime.Memory(hardware.Memory()),
		Ceiling:   func(pid int) (int64, error) { return sandbox.Ceiling("/proc", "/sys/fs/cgroup", pid) },
		UnitDir:   a.cfg.Paths.Units,
		SocketDir: filepath.Join(a.cfg.Paths.Runtime, "engine"),
		Bridge:    a.cfg.Paths.Bridge, Log: a.log,
		Progress: a.progress, Reached: a.reached,
		OfDevices: func(names []string) (int64, bool) {
			if n := a.cfg.Runtime.OfDevices(); n > 0 {
				return n, true
			}
			return hardware.DeviceMemory("/sys", hardware.SpecDirs, names)
		},
	}, nil
}
