// Package stack brings up the whole system on test hosts, for the demo, the
// end-to-end tests and the benchmarks: a host with the network service, a
// registry and a model source, and hosts with nodes.
//
// Nothing in it is simulated: real Debian, systemd, Podman, registry,
// signatures and engine. What a package would install is installed in the way a
// package would.
package stack

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/resultity/node/internal/control"
	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/evm"
	"github.com/resultity/node/internal/snapshot"
	"github.com/resultity/node/packaging/images"
	"github.com/resultity/node/packaging/images/llamacpp"
	"github.com/resultity/node/test/host"
	"github.com/resultity/node/test/model"
	"github.com/resultity/node/test/oci"
)

// Names and ports of the network host's services.
const (
	NetworkHost  = "net"
	networkPort  = "8443"
	registryPort = "5000"
	modelPort    = "9443"
	repository   = "resultity/llamacpp"

	// Account is the system account of a packaged node.
	Account = "resultity"

	// Runtime is the unit of a node's engine.
	Runtime = "resultity-runtime.service"
)

// Options say what a stack consists of.
type Options struct {
	Host  host.Options
	Nodes []host.Config                           // those with a name; releases may differ
	Step  func(name string, f func() error) error // runs and reports one step; nil runs it
}

// Stack is a running system. Its methods may be called concurrently.
type Stack struct {
	Lab    *host.Lab
	Net    *host.Host
	Nodes  []*Node
	API    string // https://address:port
	APIKey string
	CA     []byte // PEM
	HTTP   *http.Client
	Image  snapshot.ImageRef
	Key    *oci.Key
	Reg    *oci.Registry

	ca   *authority
	root string // installed tree

	mu     sync.Mutex // guards config, held while it is published
	config *snapshot.Config
}

// Node is a host with an agent.
type Node struct {
	*host.Host
}

// Repository returns the top of the source tree.
func Repository() (string, error) {
	out, err := exec.Command("go", "env", "GOMOD").Output()
	if err != nil {
		return "", err
	}
	return filepath.Dir(strings.TrimSpace(string(out))), nil
}

// Build makes the programs and returns the directories with what a package
// installs and with the programs.
func Build(ctx context.Context) (root, bin string, err error) {
	top, err := Repository()
	if err != nil {
		return "", "", err
	}
	root, bin = filepath.Join(top, "build/root"), filepath.Join(top, "build/bin")
	if err := run(ctx, top, "make", "--no-print-directory", "install", "DESTDIR="+root); err != nil {
		return "", "", err
	}
	return root, bin, BuildProgram(ctx, filepath.Join(bin, "fileserver"), "./test/fileserver")
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
	s := &Stack{}
	defer func() {
		if err != nil && s.Lab != nil {
			err = errors.Join(err, s.Lab.Close())
		}
	}()
	var bin string
	if err := step("build the programs", func() (err error) { s.root, bin, err = Build(ctx); return err }); err != nil {
		return nil, err
	}
	var img images.Image
	if err := step("build the runtime image", func() (err error) { img, err = images.Build(ctx, llamacpp.Recipe(), images.Options{}); return err }); err != nil {
		return nil, err
	}
	if err := step("build the hosts' file systems", func() error {
		want := []host.Image{{Role: host.Network}}
		for _, n := range o.Nodes {
			want = append(want, host.Image{Release: n.Release, Role: n.Role})
		}
		return host.Prepare(ctx, o.Host.Progress, want...)
	}); err != nil {
		return nil, err
	}
	o.Host.Reachable = true
	if err := step("boot "+NetworkHost, func() (err error) {
		if s.Lab, err = host.Create(ctx, o.Host); err != nil {
			return err
		}
		s.Net, err = s.Lab.Up(ctx, host.Config{Name: NetworkHost, Role: host.Network})
		return err
	}); err != nil {
		return nil, err
	}
	if err := step("start registry and model source", func() error { return s.startSources(ctx, bin, img) }); err != nil {
		return nil, err
	}
	if err := step("start the network", func() error { return s.startNetwork(ctx, bin) }); err != nil {
		return nil, err
	}
	for _, c := range o.Nodes {
		if err := step(fmt.Sprintf("boot %s and install the node", c.Name), func() error { return s.AddNode(ctx, c) }); err != nil {
			return nil, err
		}
	}
	return s, nil
}

// Close takes everything down.
func (s *Stack) Close() error {
	if s.Reg != nil {
		s.Reg.Close()
	}
	if s.HTTP != nil {
		s.HTTP.CloseIdleConnections()
	}
	return s.Lab.Close()
}

// startSources starts the registry and the model source, and fills both.
func (s *Stack) startSources(ctx context.Context, bin string, img images.Image) (err error) {
	if s.ca, err = newAuthority(); err != nil {
		return err
	}
	s.CA = s.ca.pem()
	cert, key, err := s.ca.issue([]string{NetworkHost}, []net.IP{s.Net.Addr().AsSlice()})
	if err != nil {
		return err
	}
	for _, f := range []struct {
		name string
		data []byte
		mode os.FileMode
	}{
		{"/etc/resultity-network/ca.pem", s.CA, 0o644},
		{"/etc/resultity-network/tls.crt", cert, 0o644},
		{"/etc/resultity-network/tls.key", key, 0o600},
		{"/srv/models/" + model.FileName, model.GGUF(), 0o644},
		{"/etc/resultity-network/registry.yml", []byte("version: 0.1\nstorage:\n  filesystem:\n    rootdirectory: /var/lib/registry\nhttp:\n  addr: :" + registryPort +
			"\n  tls:\n    certificate: /etc/resultity-network/tls.crt\n    key: /etc/resultity-network/tls.key\n"), 0o644},
	} {
		if err := s.Net.WriteFile(f.name, f.data, f.mode); err != nil {
			return err
		}
	}
	if err := s.Net.CopyTo(filepath.Join(bin, "fileserver"), "/usr/local/bin/fileserver"); err != nil {
		return err
	}
	if err := s.service(ctx, s.Net, "registry", "/usr/bin/docker-registry", "serve", "/etc/resultity-network/registry.yml"); err != nil {
		return err
	}
	if err := s.service(ctx, s.Net, "models", "/usr/local/bin/fileserver", "-listen", ":"+modelPort, "-dir", "/srv/models",
		"-cert", "/etc/resultity-network/tls.crt", "-key", "/etc/resultity-network/tls.key"); err != nil {
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
			return new(net.Dialer).DialContext(ctx, network, net.JoinHostPort(s.Net.Addr().String(), port))
		},
	}}
	if err := s.waitFor(ctx, "https://"+NetworkHost+":"+registryPort+"/v2/"); err != nil {
		return err
	}
	if s.Key, err = oci.NewKey(); err != nil {
		return err
	}
	s.Reg = oci.NewRegistry(net.JoinHostPort(s.Net.Addr().String(), registryPort), s.ca.pool())
	ref, err := s.Reg.PushLayout(ctx, repository, img.Layout)
	if err != nil {
		return err
	}
	if s.Image, err = snapshot.ParseImageRef(s.Net.Addr().String() + ":" + registryPort + "/" + repository + "@" + ref.DigestStr()); err != nil {
		return err
	}
	return s.Reg.Sign(ctx, ref, s.Key)
}

// service runs a program as a system service of the host.
func (s *Stack) service(ctx context.Context, h *host.Host, name string, args ...string) error {
	unit := "[Unit]\nDescription=" + name + "\n[Service]\nRestart=on-failure\nExecStart=" + strings.Join(args, " ") + "\n[Install]\nWantedBy=multi-user.target\n"
	if err := h.WriteFile("/etc/systemd/system/"+name+".service", []byte(unit), 0o644); err != nil {
		return err
	}
	if _, err := h.Output(ctx, "systemctl", "daemon-reload"); err != nil {
		return err
	}
	_, err := h.Output(ctx, "systemctl", "enable", "--now", name+".service")
	return err
}

// waitFor asks url until it answers at all.
func (s *Stack) waitFor(ctx context.Context, url string) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
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

func (s *Stack) startNetwork(ctx context.Context, bin string) error {
	if err := s.Net.CopyTo(filepath.Join(bin, "resultity-network"), "/usr/bin/resultity-network"); err != nil {
		return err
	}
	if _, err := s.Net.Output(ctx, "resultity-network", "init", "--dir", networkDir, "--name", "demo", "--chain-id", "31337"); err != nil {
		return err
	}
	// What init leaves to fill in names the network's message key.
	raw, err := s.Net.ReadFile(networkDir + "/config.json")
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
	if err := s.service(ctx, s.Net, "resultity-network", "/usr/bin/resultity-network", "serve", "--dir", networkDir, "--listen", ":"+networkPort,
		"--tls-cert", "/etc/resultity-network/tls.crt", "--tls-key", "/etc/resultity-network/tls.key"); err != nil {
		return err
	}
	s.API = "https://" + net.JoinHostPort(s.Net.Addr().String(), networkPort)
	if err := s.waitFor(ctx, s.API+"/healthz"); err != nil {
		return err
	}
	key, err := s.Net.ReadFile(networkDir + "/api-key")
	s.APIKey = strings.TrimSpace(string(key))
	return err
}

// firstConfig is the configuration of a stack: the tiny model on llama.cpp, and
// spans short enough to watch.
func (s *Stack) firstConfig(keys []evm.Address) (*snapshot.Config, error) {
	pub, err := s.Key.PublicPEM()
	if err != nil {
		return nil, err
	}
	sum, err := digest.ParseHex(model.SHA256)
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
		ImageKeys: []string{string(pub)},
		Models: []snapshot.Model{{
			Name: model.Name, Version: "1", Format: "gguf",
			Files: []snapshot.File{{
				Path: model.FileName, Size: int64(len(model.GGUF())), SHA256: sum,
				Sources: []string{"https://" + s.Net.Addr().String() + ":" + modelPort + "/" + model.FileName},
			}},
		}},
		Runtime: snapshot.Runtime{
			Engine: snapshot.LlamaCpp, Image: s.Image, Model: model.Name,
			Settings: snapshot.Settings{Context: model.ContextTokens, Slots: 2, Threads: 1},
			Devices:  []string{}, TmpBytes: 16 << 20, ShmBytes: 16 << 20,
			StartTimeout: 60, Watchdog: 3, Stall: 3, StopTimeout: 10,
		},
		Validation: []snapshot.Golden{{Name: "first", Prompt: golden.User, Answer: golden.Answer, Tokens: 64, Timeout: 20}},
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
	if err := s.Net.WriteFile(networkDir+"/next.json", raw, 0o600); err != nil {
		return err
	}
	if out, err := s.Net.Output(ctx, "resultity-network", "publish", "--dir", networkDir, "--config", networkDir+"/next.json"); err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	s.config = &next
	return nil
}

// AddNode boots a host and installs and starts a node on it.
func (s *Stack) AddNode(ctx context.Context, c host.Config) error {
	h, err := s.Lab.Up(ctx, c)
	if err != nil {
		return err
	}
	n := &Node{h}
	if err := s.install(ctx, n); err != nil {
		return fmt.Errorf("%s: %w", c.Name, err)
	}
	s.Nodes = append(s.Nodes, n)
	return nil
}

func (s *Stack) install(ctx context.Context, n *Node) error {
	if err := n.CopyTo(s.root+"/.", "/"); err != nil {
		return err
	}
	token, err := s.Net.Output(ctx, "resultity-network", "token", "create", "--dir", networkDir, "--uses", "1", "--account", "demo")
	if err != nil {
		return err
	}
	root, err := s.Net.ReadFile(networkDir + "/repository/metadata/1.root.json")
	if err != nil {
		return err
	}
	toml := fmt.Sprintf("[network]\nname = \"demo\"\nurl = \"https://%s:%s\"\nroot = \"/etc/resultity/root.json\"\nca = \"/etc/resultity/ca.pem\"\nenrolment_token = \"/etc/resultity/enrolment-token\"\n", s.Net.Addr(), networkPort)
	for _, f := range []struct {
		name string
		data []byte
	}{
		{"/etc/resultity/agent.toml", []byte(toml)},
		{"/etc/resultity/root.json", root},
		{"/etc/resultity/ca.pem", s.CA},
		{"/etc/resultity/enrolment-token", token},
		// No cgroup controllers reach the test hosts, and crun refuses to start
		// anything with a limit that it cannot set.
		{"/etc/containers/containers.conf.d/no-controllers.conf", []byte("[containers]\npids_limit = 0\n")},
	} {
		if err := n.WriteFile(f.name, f.data, 0o644); err != nil {
			return err
		}
	}
	if out, err := n.Output(ctx, "/usr/libexec/resultity/postinstall.sh", "configure"); err != nil {
		return fmt.Errorf("postinstall: %w: %s", err, out)
	}
	return n.UserCtl(ctx, "start", "resultity-agent.service")
}

// UserCtl runs systemctl in the account's user manager.
func (n *Node) UserCtl(ctx context.Context, args ...string) error {
	out, err := n.OutputAs(ctx, Account, append([]string{"systemctl", "--user"}, args...)...)
	if err != nil {
		return fmt.Errorf("systemctl --user %s: %w: %s", strings.Join(args, " "), err, bytes.TrimSpace(out))
	}
	return nil
}

// Property returns a property of a unit of the account's.
func (n *Node) Property(ctx context.Context, unit, name string) (string, error) {
	out, err := n.OutputAs(ctx, Account, "systemctl", "--user", "show", "-P", name, unit)
	return strings.TrimSpace(string(out)), err
}

// Status asks the node's agent, as root would.
func (n *Node) Status(ctx context.Context) (*control.Status, error) {
	var out bytes.Buffer
	err := n.Exec(ctx, host.Cmd{Args: []string{"resultityctl", "status", "--json"}, Stdout: &out})
	var exit *exec.ExitError
	if err != nil && !(errors.As(err, &exit) && exit.ExitCode() == 2) { // 2: a gate is closed
		return nil, err
	}
	var s control.Status
	return &s, json.Unmarshal(out.Bytes(), &s)
}

// WaitStatus asks the agent until ok holds.
func (n *Node) WaitStatus(ctx context.Context, what string, ok func(*control.Status) bool) error {
	var last *control.Status
	for {
		s, err := n.Status(ctx)
		if err == nil && ok(s) {
			return nil
		}
		if s != nil {
			last = s
		}
		select {
		case <-ctx.Done():
			why := fmt.Sprint(err)
			if last != nil && last.Closed() != nil {
				why = fmt.Sprintf("gate %q is closed: %s", last.Closed().Name, last.Closed().Detail)
			}
			return fmt.Errorf("%s: waited for %s: %s", n.Name(), what, why)
		case <-time.After(100 * time.Millisecond): // the control socket answers, it does not notify
		}
	}
}

// WaitRoutable waits until every gate of the node is open.
func (n *Node) WaitRoutable(ctx context.Context) error {
	return n.WaitStatus(ctx, "jobs", func(s *control.Status) bool { return s.Closed() == nil })
}

// Journal returns what the account's units have logged, for failures.
func (n *Node) Journal(ctx context.Context, lines int) string {
	out, err := n.Output(ctx, "journalctl", "--no-pager", "-o", "short-precise", "-n", fmt.Sprint(lines), "_SYSTEMD_OWNER_UID="+n.uid(ctx))
	if err != nil {
		return err.Error()
	}
	return string(out)
}

func (n *Node) uid(ctx context.Context) string {
	out, err := n.Output(ctx, "id", "-u", Account)
	if err != nil {
		return "0"
	}
	return strings.TrimSpace(string(out))
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

// Do sends an API request and returns the answer with its body read.
func (s *Stack) Do(ctx context.Context, method, path string, body any) (*http.Response, []byte, error) {
	res, err := s.Open(ctx, method, path, body)
	if err != nil {
		return nil, nil, err
	}
	defer res.Body.Close() // read to its end below
	raw, err := io.ReadAll(io.LimitReader(res.Body, 32<<20))
	return res, raw, err
}

// Open sends an API request; the caller reads and closes the body.
func (s *Stack) Open(ctx context.Context, method, path string, body any) (*http.Response, error) {
	var r io.Reader
	if body != nil {
		raw, err := json.Marshal(body)
		if err != nil {
			return nil, err
		}
		r = bytes.NewReader(raw)
	}
	req, err := http.NewRequestWithContext(ctx, method, s.API+path, r)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Authorization", "Bearer "+s.APIKey)
	req.Header.Set("Content-Type", "application/json")
	return s.HTTP.Do(req)
}

// Pool returns the authority that the stack's certificates lead to.
func (s *Stack) Pool() *x509.CertPool { return s.ca.pool() }

// BuildProgram builds one of the tests' own programs to the file out.
func BuildProgram(ctx context.Context, out, pkg string) error {
	top, err := Repository()
	if err != nil {
		return err
	}
	return run(ctx, top, "go", "build", "-o", out, pkg)
}
