package agent

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/resultity/node/internal/config"
	"github.com/resultity/node/internal/deploy"
	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/evm"
	"github.com/resultity/node/internal/hardware"
	"github.com/resultity/node/internal/identity"
	"github.com/resultity/node/internal/image"
	"github.com/resultity/node/internal/journal"
	"github.com/resultity/node/internal/model"
	"github.com/resultity/node/internal/podman"
	"github.com/resultity/node/internal/runtime"
	"github.com/resultity/node/internal/sandbox"
	"github.com/resultity/node/internal/session"
	"github.com/resultity/node/internal/snapshot"
	"github.com/resultity/node/internal/state"
	"github.com/resultity/node/internal/systemd"
	"github.com/resultity/node/internal/tuf"
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

// configError is a failure that only the operator can mend.
type configError struct {
	event *journal.Event
	err   error
}

func (e *configError) Error() string { return e.err.Error() }
func (e *configError) Unwrap() error { return e.err }

// Main reads the command line, puts the agent together and runs it until ctx
// ends. It returns the exit code.
func Main(ctx context.Context, args []string, stderr *os.File, env func(string) string, version string) int {
	flags := flag.NewFlagSet("resultity-agent", flag.ContinueOnError)
	flags.SetOutput(stderr)
	flags.Usage = func() {
		fmt.Fprint(stderr, "usage: resultity-agent [--config FILE] run|check|version\n\n"+
			"  run      run the node; systemd does this (resultity-agent.service)\n"+
			"  check    read the configuration, say what is wrong with it, and end\n"+
			"  version  print the version\n\n")
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
	switch flags.Arg(0) {
	case "version":
		fmt.Println(version)
		return ExitOK
	case "run", "check":
	default:
		flags.Usage()
		return ExitUsage
	}
	cfg, err := config.Load(*file, env)
	if err != nil {
		log.Error("configuration: "+err.Error(), journal.ConfigInvalid.Attr())
		return ExitConfig
	}
	if flags.Arg(0) == "check" {
		fmt.Printf("%s: ok\n", *file)
		return ExitOK
	}
	log = journal.New(stderr, cfg.Log.SlogLevel()).With("network", cfg.Network.Name)
	a, err := New(ctx, cfg, env, log, version)
	if err == nil {
		err = errors.Join(a.Run(ctx), a.Close())
	}
	var bad *configError
	switch {
	case errors.As(err, &bad):
		log.Error(bad.Error(), bad.event.Attr())
		return ExitConfig
	case err != nil:
		log.Error("stopped: " + err.Error())
		return ExitFailed
	}
	return ExitOK
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

// New puts an agent together. It opens the store and the identity, and reaches
// the user manager; Podman and the network are reached when they are needed.
func New(ctx context.Context, cfg *config.Config, env func(string) string, log *slog.Logger, version string) (_ *Agent, err error) {
	a := &Agent{
		cfg: cfg, version: version, log: log,
		update: make(chan struct{}, 1), look: make(chan struct{}, 1), beat: make(chan struct{}, 1), registered: make(chan struct{}),
	}
	a.board.models = map[digest.Digest]int64{}
	a.board.phase = "stopped"
	defer func() {
		if err != nil {
			err = errors.Join(err, a.Close())
		}
	}()
	for _, dir := range []string{cfg.Paths.State, cfg.Paths.Runtime} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, err
		}
	}
	// The store first: its lock says whether another agent runs here.
	networkDir := filepath.Join(cfg.Paths.State, "networks", cfg.Network.Name)
	if err := os.MkdirAll(networkDir, 0o700); err != nil {
		return nil, err
	}
	if a.store, err = state.Open(filepath.Join(networkDir, "jobs.db"), state.Bounds{Jobs: 10_000, Bytes: 2 << 30, IDs: 100_000}, time.Now); err != nil {
		return nil, err
	}
	if err := a.openIdentity(env); err != nil {
		return nil, err
	}
	var ca []byte
	if a.http, ca, err = client(cfg.Network.CA); err != nil {
		return nil, &configError{journal.ConfigInvalid, err}
	}
	root, err := os.ReadFile(cfg.Network.Root)
	if err != nil {
		return nil, &configError{journal.ConfigInvalid, fmt.Errorf("network.root: %w; get the network's first root.json from its operator", err)}
	}
	if a.snaps, err = tuf.New(tuf.Config{Dir: filepath.Join(networkDir, "tuf"), URL: cfg.Network.URL + "/tuf", Root: root, Client: a.http, Now: time.Now}); err != nil {
		return nil, &configError{journal.ConfigInvalid, fmt.Errorf("network.root: %w", err)}
	}
	if a.models, err = model.Open(filepath.Join(cfg.Paths.State, "models"), a.http, log); err != nil {
		return nil, err
	}
	if a.units, err = systemd.Dial(ctx); err != nil {
		return nil, err
	}
	a.profile = hardware.Profile(cfg.Paths.State)
	a.openDeployer = func(ctx context.Context) (*deploy.Deployer, error) { return a.newDeployer(ctx, ca) }
	a.openJobs()
	return a, nil
}

func (a *Agent) openIdentity(env func(string) string) error {
	key, created, err := identity.Open(identity.Options{
		Dir: filepath.Join(a.cfg.Paths.State, "identity"), Passphrase: a.cfg.Identity.Passphrase, Credentials: env("CREDENTIALS_DIRECTORY"),
	})
	if errors.Is(err, identity.ErrRefused) {
		return &configError{journal.IdentityRefused, err}
	}
	if err != nil {
		return err
	}
	a.key = key
	if created {
		a.log.Info("identity created", journal.IdentityCreated.Attr(), "node", key.Address())
	}
	return nil
}

// client makes the HTTP client for everything outside: the network, model
// sources and the registry.
func client(caFile string) (*http.Client, []byte, error) {
	t := &tls.Config{MinVersion: tls.VersionTLS12}
	var ca []byte
	if caFile != "" {
		var err error
		if ca, err = os.ReadFile(caFile); err != nil {
			return nil, nil, fmt.Errorf("network.ca: %w", err)
		}
		t.RootCAs = x509.NewCertPool()
		if !t.RootCAs.AppendCertsFromPEM(ca) {
			return nil, nil, fmt.Errorf("network.ca: %s has no PEM certificate", caFile)
		}
	}
	return &http.Client{Transport: &http.Transport{
		Proxy: http.ProxyFromEnvironment, TLSClientConfig: t, TLSHandshakeTimeout: 15 * time.Second,
		ResponseHeaderTimeout: 30 * time.Second, IdleConnTimeout: time.Minute, MaxIdleConnsPerHost: 4, ForceAttemptHTTP2: true,
	}}, ca, nil
}

// newDeployer starts Podman's API service, which takes a moment that the start
// of the agent does not wait for.
func (a *Agent) newDeployer(ctx context.Context, ca []byte) (*deploy.Deployer, error) {
	p, err := podman.Dial(ctx, a.cfg.Paths.Podman)
	if err != nil {
		return nil, err
	}
	// HOME of the API service is below the state directory; see
	// resultity-podman.service.
	images, err := image.New(a.http.Transport, p, filepath.Join(a.cfg.Paths.State, "podman/.config/containers"), ca, a.log)
	if err != nil {
		return nil, err
	}
	return &deploy.Deployer{
		Images: images, Models: a.models, Units: a.units, Containers: p, Devices: hardware.DeviceNodes,
		Look:      func(pid int) (*sandbox.Outside, error) { return sandbox.Look("/proc", pid) },
		Engine:    func(socket string) deploy.Engine { return runtime.New(socket) },
		UnitDir:   a.cfg.Paths.Units,
		SocketDir: filepath.Join(a.cfg.Paths.Runtime, "engine"),
		Bridge:    a.cfg.Paths.Bridge, Log: a.log,
		Progress: func(m *snapshot.Model, done, _ int64) {
			a.board.set(func(b *board) { b.models[m.Digest()] = done })
		},
	}, nil
}

// trusted says which keys may sign for the network, by the newest snapshot.
func trusted(s *snapshot.Snapshot) func(evm.Address) bool {
	return func(a evm.Address) bool {
		for _, k := range s.Config().Network.MessageKeys {
			if k == a {
				return true
			}
		}
		return false
	}
}

func (a *Agent) openJobs() {
	a.session = session.New(session.Config{
		URL: "wss" + strings.TrimPrefix(a.cfg.Network.URL, "https"), Network: a.cfg.Network.Name,
		Node: a.key.Address(), Key: a.key, Agent: a.version, Log: a.log, Now: time.Now,
		TLS: a.http.Transport.(*http.Transport).TLSClientConfig,
		Trusted: func(k evm.Address) bool {
			s := a.board.snapshot()
			return s != nil && trusted(s)(k)
		},
		Config: a.board.served,
		ClockWindow: func() time.Duration {
			s := a.board.snapshot()
			if s == nil {
				return 0 // the session's own default
			}
			return s.Config().Network.ClockWindow.Duration()
		},
	}, a)
	a.worker = work.New(work.Config{Store: a.store, Key: a.key, Send: a.session.Send, Log: a.log, Now: time.Now})
}

// Close gives back what New opened.
func (a *Agent) Close() error {
	var errs []error
	if a.models != nil {
		errs = append(errs, a.models.Close())
	}
	if a.units != nil {
		a.units.Close()
	}
	if a.store != nil {
		errs = append(errs, a.store.Close())
	}
	return errors.Join(errs...)
}
