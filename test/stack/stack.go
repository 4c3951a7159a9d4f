// Package stack brings up the whole system for the demo, the end-to-end tests
// and the benchmarks: the network service with a registry and a model source,
// and nodes.
//
// It does so on test hosts, where what a package would install is installed in
// the way a package would; or, with one node, in the account of an ordinary
// user, on that user's own service manager and rootless Podman. Nothing in
// either is simulated: real systemd, Podman, registry, signatures and engine.
package stack

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/resultity/node/internal/evm"
	"github.com/resultity/node/internal/snapshot"
	"github.com/resultity/node/packaging/images"
	"github.com/resultity/node/packaging/images/llamacpp"
	"github.com/resultity/node/test/chat"
	"github.com/resultity/node/test/host"
	"github.com/resultity/node/test/model"
	"github.com/resultity/node/test/oci"
)

// Names and ports of the network host's services.
const (
	NetworkHost = "net"
	repository  = "resultity/llamacpp"

	// Account is the system account of a packaged node.
	Account = "resultity"

	// NetworkUnit is the network service's unit.
	NetworkUnit = "resultity-network.service"

	// Runtime is the unit of a node's engine.
	Runtime = "resultity-runtime.service"
)

// Options say what a stack consists of.
type Options struct {
	Host  host.Options
	Nodes []host.Config                           // those with a name; releases may differ
	Step  func(name string, f func() error) error // runs and reports one step; nil runs it

	// Local asks for one node in the account of whoever runs this, without
	// test hosts. Host and Nodes are not used then.
	Local bool
	// KeyInAgent has the agents hold their keys themselves, as without root.
	KeyInAgent bool
	// Prebuilt is a directory that [Prepare] has made; empty builds.
	Prebuilt string
}

// Stack is a running system. Its methods may be called concurrently.
type Stack struct {
	chat.Client // of the network

	Lab   *host.Lab  // nil where there are no test hosts
	Net   *host.Host // the network's host; nil where there are no test hosts
	Nodes []*Node
	CA    []byte // PEM
	Image snapshot.ImageRef
	Key   *oci.Key
	Reg   *oci.Registry

	ca    *authority
	local *local // nil on test hosts
	net   site   // where the network is
	root  string // installed tree

	keyInAgent bool
	probe      string // program

	mu     sync.Mutex // guards config, held while it is published
	config *snapshot.Config
}

// Repository returns the top of the source tree.
func Repository() (string, error) {
	out, err := exec.Command("go", "env", "GOMOD").Output()
	if err != nil {
		return "", err
	}
	return filepath.Dir(strings.TrimSpace(string(out))), nil
}

// Artifacts are the directories with what a stack is made of.
type Artifacts struct {
	Root  string // what a package installs
	Net   string // what the package of the network service installs
	Bin   string // the programs, those of the tests among them
	Image string // OCI layout of the runtime image; empty if it is not built yet
}

// Build makes the programs.
func Build(ctx context.Context) (Artifacts, error) {
	top, err := Repository()
	if err != nil {
		return Artifacts{}, err
	}
	a := Artifacts{Root: filepath.Join(top, "build/root"), Net: filepath.Join(top, "build/network"), Bin: filepath.Join(top, "build/bin")}
	// Test programs of several packages run at once and build into one place.
	// What is the same already is left alone, so that whoever copies it meanwhile
	// finds it.
	if err := os.MkdirAll(filepath.Join(top, "build"), 0o755); err != nil {
		return Artifacts{}, err
	}
	lock, err := os.OpenFile(filepath.Join(top, "build/.lock"), os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return Artifacts{}, err
	}
	defer lock.Close() // which gives the lock back
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		return Artifacts{}, fmt.Errorf("lock %s: %w", lock.Name(), err)
	}
	if err := run(ctx, top, "make", "--no-print-directory", "build", "install", "DESTDIR="+a.Root); err != nil {
		return Artifacts{}, err
	}
	if err := run(ctx, top, "make", "--no-print-directory", "install-network", "DESTDIR="+a.Net); err != nil {
		return Artifacts{}, err
	}
	for _, name := range []string{"fileserver", "registry", "probe"} {
		if err := BuildProgram(ctx, filepath.Join(a.Bin, name), "./test/"+name); err != nil {
			return Artifacts{}, err
		}
	}
	return a, nil
}

// Prepare puts all that a stack is made of into dir, and the demo, for machines
// on which nothing can be built; see [Options].
func Prepare(ctx context.Context, dir string) error {
	from, err := Build(ctx)
	if err != nil {
		return err
	}
	img, err := images.Build(ctx, llamacpp.Recipe(), images.Options{})
	if err != nil {
		return err
	}
	from.Image = img.Layout
	to := prebuilt(dir)
	return errors.Join(copyTree(ctx, from.Root, to.Root), copyTree(ctx, from.Net, to.Net), copyTree(ctx, from.Bin, to.Bin), copyTree(ctx, from.Image, to.Image),
		BuildProgram(ctx, filepath.Join(to.Bin, "demo"), "./test/demo"))
}

func prebuilt(dir string) Artifacts {
	return Artifacts{Root: filepath.Join(dir, "root"), Net: filepath.Join(dir, "network"), Bin: filepath.Join(dir, "bin"), Image: filepath.Join(dir, "image")}
}

// copyTree copies a file or directory over what is there, with its modes.
func copyTree(ctx context.Context, src, dst string) error {
	if err := os.MkdirAll(filepath.Dir(dst), 0o755); err != nil {
		return err
	}
	return run(ctx, "/", "cp", "-pRT", "--", src, dst)
}

// goFlags are those of the Makefile, so that all builds share one cache.
const goFlags = "GOFLAGS=-tags=remote,containers_image_openpgp,exclude_graphdriver_btrfs -trimpath"

func run(ctx context.Context, dir, name string, args ...string) error {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), goFlags, "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s %s: %w\n%s", name, strings.Join(args, " "), err, bytes.TrimSpace(out))
	}
	return nil
}

// Up brings up everything and returns when the nodes have been started; wait
// for them with [Stack.WaitRoutable]. On an error nothing is left.
func Up(ctx context.Context, o Options) (_ *Stack, err error) {
	step := o.Step
	if step == nil {
		step = func(_ string, f func() error) error { return f() }
	}
	s := &Stack{keyInAgent: o.KeyInAgent}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.Close())
		}
	}()
	if o.Local {
		// First, so that nobody waits for a build that is of no use.
		if err := step("look at this account", func() (err error) { s.local, err = openLocal(ctx); return err }); err != nil {
			return nil, err
		}
	}
	var a Artifacts
	if o.Prebuilt != "" {
		a = prebuilt(o.Prebuilt)
	} else {
		if err := step("build the programs", func() (err error) { a, err = Build(ctx); return err }); err != nil {
			return nil, err
		}
		if err := step("build the runtime image", func() error {
			img, err := images.Build(ctx, llamacpp.Recipe(), images.Options{})
			a.Image = img.Layout
			return err
		}); err != nil {
			return nil, err
		}
	}
	s.root, s.probe = a.Root, filepath.Join(a.Bin, "probe")
	if o.Local {
		s.net = s.local.site()
	} else if err := s.boot(ctx, o, step); err != nil {
		return nil, err
	}
	if err := step("start registry and model source", func() error { return s.startSources(ctx, a) }); err != nil {
		return nil, err
	}
	if err := step("start the network", func() error { return s.startNetwork(ctx, a) }); err != nil {
		return nil, err
	}
	if o.Local {
		if err := step("install the node", func() error { return s.installLocal(ctx) }); err != nil {
			return nil, err
		}
	}
	for _, c := range o.Nodes {
		if err := step(fmt.Sprintf("boot %s and install the node", c.Name), func() error { return s.AddNode(ctx, c) }); err != nil {
			return nil, err
		}
	}
	return s, nil
}

// boot makes the lab and the network's host.
func (s *Stack) boot(ctx context.Context, o Options, step func(string, func() error) error) error {
	if err := step("build the hosts' file systems", func() error {
		want := []host.Image{{Role: host.Network}}
		for _, n := range o.Nodes {
			want = append(want, host.Image{Release: n.Release, Role: n.Role})
		}
		return host.Prepare(ctx, o.Host.Progress, want...)
	}); err != nil {
		return err
	}
	o.Host.Reachable = true
	return step("boot "+NetworkHost, func() (err error) {
		if s.Lab, err = host.Create(ctx, o.Host); err != nil {
			return err
		}
		if s.Net, err = s.Lab.Up(ctx, host.Config{Name: NetworkHost, Role: host.Network}); err == nil {
			s.net = hostSite(s.Net)
		}
		return err
	})
}

// Close takes everything down.
func (s *Stack) Close() error {
	if s.Reg != nil {
		s.Reg.Close()
	}
	if s.HTTP != nil {
		s.HTTP.CloseIdleConnections()
	}
	switch {
	case s.local != nil:
		return s.local.close()
	case s.Lab != nil:
		return s.Lab.Close()
	}
	return nil
}

// startSources starts the registry and the model source, and fills both.
func (s *Stack) startSources(ctx context.Context, a Artifacts) (err error) {
	if s.ca, err = newAuthority(); err != nil {
		return err
	}
	s.CA = s.ca.pem()
	n := &s.net
	cert, key, err := s.ca.issue([]string{NetworkHost}, []net.IP{n.Addr().AsSlice()})
	if err != nil {
		return err
	}
	etc := n.path("/etc/resultity-network")
	certFile, keyFile := etc+"/tls.crt", etc+"/tls.key"
	for _, f := range []struct {
		name string
		data []byte
		mode os.FileMode
	}{
		{etc + "/ca.pem", s.CA, 0o644},
		{certFile, cert, 0o644},
		{keyFile, key, 0o600},
		{etc + "/registry.yml", fmt.Appendf(nil, "version: 0.1\nstorage:\n  filesystem:\n    rootdirectory: %s\nhttp:\n  addr: %s\n  tls:\n    certificate: %s\n    key: %s\n",
			n.path("/var/lib/registry"), n.listen(n.registryPort), certFile, keyFile), 0o644},
	} {
		if err := n.WriteFile(f.name, f.data, f.mode); err != nil {
			return err
		}
	}
	if err := s.ServeModel(model.FileName, model.GGUF()); err != nil {
		return err
	}
	// Debian's is installed on the network's host; few others have one.
	serve := []string{"/usr/bin/docker-registry", "serve", etc + "/registry.yml"}
	if _, err := n.Output(ctx, "test", "-x", serve[0]); err != nil {
		serve = []string{n.path("/usr/bin/registry"), "-listen", n.listen(n.registryPort), "-dir", n.path("/var/lib/registry"), "-cert", certFile, "-key", keyFile}
		if err := n.CopyTo(filepath.Join(a.Bin, "registry"), serve[0]); err != nil {
			return err
		}
	}
	if err := n.service(ctx, "registry", serve...); err != nil {
		return err
	}
	fileserver := n.path("/usr/bin/fileserver")
	if err := n.CopyTo(filepath.Join(a.Bin, "fileserver"), fileserver); err != nil {
		return err
	}
	if err := n.service(ctx, "models", fileserver, "-listen", n.listen(n.modelPort), "-dir", n.path(modelDir), "-cert", certFile, "-key", keyFile); err != nil {
		return err
	}
	s.HTTP = &http.Client{Transport: &http.Transport{
		TLSClientConfig: &tls.Config{RootCAs: s.ca.pool(), ServerName: NetworkHost}, MaxIdleConnsPerHost: 32,
		// Names of the lab's hosts mean nothing on this machine.
		DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
			_, port, err := net.SplitHostPort(addr)
			if err != nil {
				return nil, err
			}
			return new(net.Dialer).DialContext(ctx, network, net.JoinHostPort(n.Addr().String(), port))
		},
	}}
	if err := s.waitFor(ctx, "https://"+NetworkHost+":"+n.registryPort+"/v2/"); err != nil {
		return err
	}
	if s.Key, err = oci.NewKey(); err != nil {
		return err
	}
	registry := net.JoinHostPort(n.Addr().String(), n.registryPort)
	s.Reg = oci.NewRegistry(registry, s.ca.pool())
	ref, err := s.Reg.PushLayout(ctx, repository, a.Image)
	if err != nil {
		return err
	}
	if s.Image, err = snapshot.ParseImageRef(registry + "/" + repository + "@" + ref.DigestStr()); err != nil {
		return err
	}
	return s.Reg.Sign(ctx, ref, s.Key)
}

const modelDir = "/srv/models"

// Certificate issues one for a server that nodes and clients of the stack trust.
func (s *Stack) Certificate(name string, addresses ...net.IP) (tls.Certificate, error) {
	cert, key, err := s.ca.issue([]string{name}, addresses)
	if err != nil {
		return tls.Certificate{}, err
	}
	return tls.X509KeyPair(cert, key)
}

// ServeModel puts a file under a name into the model source.
func (s *Stack) ServeModel(name string, data []byte) error {
	return s.net.WriteFile(filepath.Join(s.net.path(modelDir), name), data, 0o644)
}

// Probe runs test/probe as a process of the node's container, which must not
// reach the address, and returns what it prints. The error says that an attempt
// worked, or that none could be made.
func (s *Stack) Probe(ctx context.Context, n *Node, outside string) ([]byte, error) {
	// Nothing that the container sees of the host can be executed, so the
	// account puts the program into the container's root from outside.
	name := n.prefix + "/usr/local/bin/probe"
	if err := n.CopyTo(s.probe, name); err != nil {
		return nil, err
	}
	out, err := n.Podman(ctx, "unshare", "sh", "-c", `cp "$0" "$(podman mount resultity-runtime)/usr/bin/probe"`, name)
	if err == nil {
		out, err = n.Podman(ctx, "exec", "resultity-runtime", "/usr/bin/probe", outside)
	}
	if err != nil {
		return nil, fmt.Errorf("%w:\n%s", err, out)
	}
	return out, nil
}

// NetworkJournal returns what the network has logged, for failures.
func (s *Stack) NetworkJournal(ctx context.Context) []byte {
	which := "_SYSTEMD_UNIT"
	if s.local != nil {
		which = "_SYSTEMD_USER_UNIT"
	}
	out, err := s.net.Output(ctx, "journalctl", "--no-pager", "-n", "2000", which+"="+s.net.unit+"resultity-network.service")
	if err != nil {
		return []byte(err.Error())
	}
	return out
}

// waitFor asks url until it answers at all.
func (s *Stack) waitFor(ctx context.Context, url string) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	for {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
		if err != nil {
			return err
		}
		res, err := s.HTTP.Do(req)
		if err == nil {
			return res.Body.Close()
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%s does not answer: %w", url, err)
		case <-time.After(50 * time.Millisecond): // a port that is not open yet sends no event
		}
	}
}

const networkDir = "/var/lib/resultity-network"

// Network runs resultity-network where the network is.
func (s *Stack) Network(ctx context.Context, args ...string) ([]byte, error) {
	args = append([]string{s.net.path("/usr/bin/resultity-network")}, args...)
	out, err := s.net.Output(ctx, append(args, "--dir", s.net.path(networkDir))...)
	if err != nil {
		return nil, fmt.Errorf("%w: %s", err, out)
	}
	return out, nil
}

func (s *Stack) startNetwork(ctx context.Context, a Artifacts) error {
	n := &s.net
	program, dir, etc := n.path("/usr/bin/resultity-network"), n.path(networkDir), n.path("/etc/resultity-network")
	if s.local != nil {
		if err := n.CopyTo(filepath.Join(a.Bin, "resultity-network"), program); err != nil {
			return err
		}
	} else if err := s.installNetwork(ctx, a.Net); err != nil {
		return err
	}
	if _, err := s.Network(ctx, "init", "--name", "demo", "--chain-id", "31337"); err != nil {
		return err
	}
	// What init leaves to fill in names the network's message key.
	raw, err := n.ReadFile(dir + "/config.json")
	if err != nil {
		return err
	}
	var skeleton struct {
		Network struct {
			MessageKeys []evm.Address `json:"message_keys"`
		} `json:"network"`
	}
	if err := json.Unmarshal(raw, &skeleton); err != nil {
		return err
	}
	if s.config, err = s.firstConfig(skeleton.Network.MessageKeys); err != nil {
		return err
	}
	if err := s.Publish(ctx, func(*snapshot.Config) {}); err != nil {
		return err
	}
	if s.local != nil {
		if err := n.service(ctx, "resultity-network", program, "serve", "--config", "/dev/null", "--dir", dir, "--listen", n.listen(n.networkPort), "--metrics-listen", n.listen(n.metricsPort),
			"--tls-cert", etc+"/tls.crt", "--tls-key", etc+"/tls.key"); err != nil {
			return err
		}
	} else if err := n.systemctl(ctx, "enable", "--now", NetworkUnit); err != nil {
		return fmt.Errorf("%w\n%s", err, s.NetworkJournal(ctx))
	}
	s.API = "https://" + net.JoinHostPort(n.Addr().String(), n.networkPort)
	if err := s.waitFor(ctx, s.API+"/healthz"); err != nil {
		return err
	}
	key, err := n.ReadFile(dir + "/api-key")
	s.APIKey = strings.TrimSpace(string(key))
	return err
}

// installNetwork does what an operator does with the package of the service.
func (s *Stack) installNetwork(ctx context.Context, tree string) error {
	n := &s.net
	if err := n.CopyTo(tree+"/.", "/"); err != nil {
		return err
	}
	if err := n.WriteFile("/etc/resultity-network/network.toml", fmt.Appendf(nil,
		"listen = %q\nmetrics_listen = %q\ntls_cert = \"/etc/resultity-network/tls.crt\"\ntls_key = \"/etc/resultity-network/tls.key\"\n", n.listen(n.networkPort), n.listen(n.metricsPort)), 0o644); err != nil {
		return err
	}
	const script = `systemd-sysusers resultity-network.conf
systemd-tmpfiles --create resultity-network.conf
chgrp resultity-network /etc/resultity-network/tls.key && chmod 0640 /etc/resultity-network/tls.key
systemctl daemon-reload`
	if out, err := n.Output(ctx, "sh", "-euc", script); err != nil {
		return fmt.Errorf("install the network service: %w: %s", err, out)
	}
	return nil
}

// firstConfig is the configuration of a stack: the tiny model on llama.cpp, and
// spans short enough to watch.
func (s *Stack) firstConfig(keys []evm.Address) (*snapshot.Config, error) {
	pub, err := s.Key.PublicPEM()
	if err != nil {
		return nil, err
	}
	file, err := snapshot.NewFile(model.FileName, bytes.NewReader(model.GGUF()),
		"https://"+net.JoinHostPort(s.net.Addr().String(), s.net.modelPort)+"/"+model.FileName)
	if err != nil {
		return nil, err
	}
	golden := model.Prompts()[0]
	return &snapshot.Config{
		Schema: 1,
		Network: snapshot.Network{
			Name: "demo", ChainID: 31337, MessageKeys: keys, Heartbeat: 1, Window: 4, ClockWindow: 60,
		},
		Limits: snapshot.Limits{
			RequestBytes: 256 << 10, ResponseBytes: 1 << 20, Tokens: 1000, Messages: 64, Deadline: 60, ResultTTL: 24 * 60 * 60,
		},
		Logs:       snapshot.Logs{Interval: 900, BatchBytes: 64 << 10},
		ImageTrust: snapshot.ImageTrust{Keys: []string{string(pub)}},
		Models: []snapshot.Model{{
			Name: model.Name, Version: "1", Format: "gguf",
			Files: []snapshot.File{file},
		}},
		Runtime: snapshot.Runtime{
			Engine: snapshot.LlamaCpp, Image: s.Image, Model: model.Name,
			Settings: snapshot.Settings{Context: model.ContextTokens, Slots: 2, Threads: 1},
			Devices:  []string{}, TmpBytes: 16 << 20, ShmBytes: 16 << 20,
			StartTimeout: 60, Watchdog: 3, Stall: 3, StopTimeout: 10,
		},
		Validation: snapshot.Validation{Golden: []snapshot.Golden{{Name: "first", Prompt: golden.User, Answers: []string{golden.Answer}, Tokens: 64, Timeout: 20}}},
	}, nil
}

// Publish changes the configuration and publishes it.
func (s *Stack) Publish(ctx context.Context, change func(*snapshot.Config)) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	raw, err := json.Marshal(s.config)
	if err != nil {
		return err
	}
	var next snapshot.Config
	if err := json.Unmarshal(raw, &next); err != nil {
		return err
	}
	change(&next)
	if raw, err = json.MarshalIndent(&next, "", "  "); err != nil {
		return err
	}
	file := s.net.path(networkDir) + "/next.json"
	if err := s.net.WriteFile(file, raw, 0o600); err != nil {
		return err
	}
	if _, err := s.Network(ctx, "publish", "--config", file); err != nil {
		return err
	}
	s.config = &next
	return nil
}

// WaitRoutable waits until every node gets jobs.
func (s *Stack) WaitRoutable(ctx context.Context) error {
	for _, n := range s.Nodes {
		if err := n.WaitRoutable(ctx); err != nil {
			return err
		}
	}
	return nil
}

var (
	counted    = regexp.MustCompile(`(?m)^resultity_results_total\{verdict="counted"\} (\d+)$`)
	unfinished = regexp.MustCompile(`(?m)^resultity_jobs\{state="\w+"\} (\d+)$`)
)

// Counted returns how many results the network has counted since its service began.
// A result is counted when it is stored, which may be after its answer.
func (s *Stack) Counted(ctx context.Context) (int, error) {
	raw, err := s.metrics(ctx)
	if err != nil {
		return 0, err
	}
	m := counted.FindSubmatch(raw)
	if m == nil {
		return 0, nil // none yet
	}
	return strconv.Atoi(string(m[1]))
}

// Unfinished returns how many jobs the network has that wait or that nodes work on,
// those too whose clients have gone.
func (s *Stack) Unfinished(ctx context.Context) (sum int, err error) {
	raw, err := s.metrics(ctx)
	if err != nil {
		return 0, err
	}
	for _, m := range unfinished.FindAllSubmatch(raw, -1) {
		n, err := strconv.Atoi(string(m[1]))
		if err != nil {
			return 0, err
		}
		sum += n
	}
	return sum, nil
}

func (s *Stack) metrics(ctx context.Context) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+net.JoinHostPort(s.net.Addr().String(), s.net.metricsPort)+"/metrics", nil)
	if err != nil {
		return nil, err
	}
	res, err := s.HTTP.Do(req)
	if err != nil {
		return nil, err
	}
	defer res.Body.Close() // read to its end below
	raw, err := io.ReadAll(io.LimitReader(res.Body, 1<<20))
	if err != nil {
		return nil, err
	}
	if res.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("metrics: %s", res.Status)
	}
	return raw, nil
}

// BuildProgram builds one of the tests' own programs to the file out.
func BuildProgram(ctx context.Context, out, pkg string) error {
	top, err := Repository()
	if err != nil {
		return err
	}
	return run(ctx, top, "go", "build", "-o", out, pkg)
}
