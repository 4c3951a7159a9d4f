package crash

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/resultity/node/internal/chunk"
	"github.com/resultity/node/internal/control"
	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/snapshot"
	"github.com/resultity/node/test/bench/instant"
	"github.com/resultity/node/test/chat"
	"github.com/resultity/node/test/host"
	"github.com/resultity/node/test/model"
	"github.com/resultity/node/test/stack"
)

const (
	agentProgram   = "/usr/libexec/resultity/agent-with-fail-points"
	networkProgram = "/usr/bin/network-with-fail-points"
	networkDir     = "/var/lib/resultity-network"

	tags   = "remote,containers_image_openpgp,exclude_graphdriver_btrfs,failpoint"
	tokens = 8 // of each answer
)

// ask is what clients ask for.
var ask = chat.Request{Prompt: "x", Tokens: tokens, Want: instant.Text(tokens)}

// world is a network with one node, both with fail points, and clients that ask
// without pause.
type world struct {
	*stack.Stack
	node   *stack.Node
	engine []byte // program
	plain  string // the agent's program as it is shipped
	tagged string // and with fail points
	load   *chat.Crowd
	tally  chat.Tally // of load, as far as it was taken

	address string        // the node's id; learnt when key is
	key     []byte        // the node's keystore file; nil until there is one
	images  int           // engines pushed so far
	image   digest.Digest // that was published last
	logged  time.Time     // since when receipts are in the node's log: it was taken away before

	reached func() bool // the point at which to die
	other   bool        // it was a command that died, not a service
	begun   bool        // a command was, and is to be repeated
}

// up brings a world up; what is left of it goes with the test.
func up(t *testing.T) *world {
	t.Helper()
	ctx := t.Context()
	dir := t.TempDir()
	w := &world{tagged: filepath.Join(dir, "agent")}
	engine, service := filepath.Join(dir, "engine"), filepath.Join(dir, "network")
	for out, pkg := range map[string]string{w.tagged: "./cmd/resultity-agent", service: "./cmd/resultity-network"} {
		build(t, out, pkg)
	}
	must(t, stack.BuildProgram(ctx, engine, "./test/bench/engine"))
	var err error
	w.engine, err = os.ReadFile(engine)
	must(t, err)
	w.Stack, err = stack.Up(ctx, stack.Options{Host: host.Options{Progress: os.Stderr}, KeyInAgent: true})
	must(t, err)
	t.Cleanup(func() { must(t, w.Close()) })
	top, err := stack.Repository()
	must(t, err)
	w.plain = filepath.Join(top, "build/bin/resultity-agent")

	w.startNetwork(t, service)
	must(t, w.publish(ctx, func(c *snapshot.Config) {
		c.Runtime.Settings.Slots = 4
		c.Limits.Deadline = 60
		c.Validation.Golden = []snapshot.Golden{{Name: "words", Prompt: "words", Answers: []string{instant.Text(tokens)}, Tokens: tokens, Timeout: 20}}
	}))
	must(t, w.AddNode(ctx, host.Config{Name: "node", Release: host.Trixie}))
	w.node = w.Nodes[0]
	must(t, w.node.CopyTo(w.tagged, agentProgram))
	must(t, w.node.WriteFile("/etc/resultity/agent.toml.d/replay.toml", []byte("[replay]\nkeep = 2\n"), 0o644))
	must(t, w.node.WriteFile("/etc/systemd/user/resultity-agent.service.d/crash.conf", []byte("[Service]\nExecStart=\nExecStart="+agentProgram+" run\n"+
		"Environment=RESULTITY_FAILPOINT=%S/resultity/agent/failpoint RESULTITY_CLOCK_OFFSET_FILE=%S/resultity/agent/clock-offset\n"+
		"RestartSec=20ms\nRestartSteps=0\nRestartMaxDelaySec=infinity\n"), 0o644))
	must(t, w.token(ctx))
	must(t, w.node.UserCtl(ctx, "daemon-reload"))
	must(t, w.node.UserCtl(ctx, "restart", w.node.Agent))
	if err := w.node.WaitRoutable(ctx); err != nil {
		t.Fatalf("%v\n%s", err, w.node.Journal(ctx, 100))
	}
	w.load = w.Crowd(ctx, 2, 20*time.Millisecond, ask)
	t.Cleanup(w.load.Stop)
	must(t, w.recovered(ctx))
	return w
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// build makes a program with fail points.
func build(t *testing.T, out, pkg string) {
	t.Helper()
	top, err := stack.Repository()
	must(t, err)
	cmd := exec.CommandContext(t.Context(), "go", "build", "-trimpath", "-tags", tags, "-o", out, pkg)
	cmd.Dir = top
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if text, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build %s: %v\n%s", pkg, err, text)
	}
}

// smtpd is a mail server's configuration, which takes what the network sends.
const smtpd = `pki net cert "/etc/resultity-network/tls.crt"
pki net key "/etc/resultity-network/tls.key"
listen on 0.0.0.0 port 25 tls-require pki net
action "local" maildir
match from any for domain "net" action "local"
`

// startNetwork puts a service with fail points, and with a mail server, in the
// place of the one that the stack has started.
func (w *world) startNetwork(t *testing.T, program string) {
	t.Helper()
	must(t, w.Net.CopyTo(program, networkProgram))
	for name, text := range map[string]string{
		"/etc/smtpd.conf":                  smtpd,
		"/etc/systemd/system/mail.service": "[Service]\nExecStart=/usr/sbin/smtpd -d -f /etc/smtpd.conf\n",
		"/etc/resultity-network/network.toml": fmt.Sprintf("listen = \":8443\"\nmetrics_listen = \":9464\"\ntls_cert = \"/etc/resultity-network/tls.crt\"\ntls_key = \"/etc/resultity-network/tls.key\"\n"+
			"keep_requests_bytes = 1048576\nsmtp = %q\nsmtp_from = \"The demo <codes@net>\"\nsmtp_ca = \"/etc/resultity-network/ca.pem\"\n", net.JoinHostPort(w.Net.Addr().String(), "25")),
		"/etc/systemd/system/" + stack.NetworkUnit + ".d/crash.conf": "[Service]\nExecStart=\nExecStart=" + networkProgram +
			" serve\nEnvironment=RESULTITY_FAILPOINT=" + networkPoint + "\nRestartSec=20ms\nRestartSteps=0\n",
	} {
		must(t, w.Net.WriteFile(name, []byte(text), 0o644))
	}
	for _, args := range [][]string{
		{"useradd", "--create-home", "ann"}, {"systemctl", "daemon-reload"}, {"systemctl", "start", "mail.service"}, {"systemctl", "restart", stack.NetworkUnit},
	} {
		if out, err := w.Net.Output(t.Context(), args...); err != nil {
			t.Fatalf("%s: %v: %s", args, err, out)
		}
	}
}

// token puts an enrolment token that has not been used on the node.
func (w *world) token(ctx context.Context) error {
	out, err := w.Network(ctx, "token", "create", "--uses", "1", "--account", "demo")
	if err != nil {
		return err
	}
	return w.node.WriteFile("/etc/resultity/enrolment-token", out, 0o644)
}

// publish publishes a new configuration with a new model and a new image.
func (w *world) publish(ctx context.Context, change func(*snapshot.Config)) error {
	w.images++
	ref, err := w.PushEngine(ctx, w.Reg, fmt.Sprintf("instant%d", w.images), w.engine)
	if err != nil {
		return err
	}
	// With the hashes of its chunks beside it, as of a large file.
	weights, name := model.Random(chunk.Size+1), rand.Text()
	list, _, err := chunk.Read(bytes.NewReader(weights))
	if err != nil {
		return err
	}
	if err := errors.Join(w.ServeModel(name, weights), w.ServeModel(name+".chunks", list.Bytes())); err != nil {
		return err
	}
	w.image = ref.Digest()
	published := w.Publish(ctx, func(c *snapshot.Config) {
		change(c)
		c.Runtime.Image = ref
		old := c.Models[0].Files[0]
		address := strings.TrimSuffix(old.Sources[0], path.Base(old.Sources[0])) + name
		var file snapshot.File
		file, err = snapshot.NewFile(old.Path, bytes.NewReader(weights), address)
		file.Chunks.Hashes, file.Chunks.Sources = nil, []string{address + ".chunks"}
		c.Models[0].Files[0] = file
	})
	return errors.Join(published, err)
}

// Files with the point at which to die.
const networkPoint = "/var/lib/resultity-network/failpoint"

func (w *world) keyFile() string { return w.node.State + "/agent/identity/key.json" }

func (w *world) agentPoint() string { return w.node.State + "/agent/failpoint" }

// recovered waits until the node answers again, and looks at all that has to be
// true then.
func (w *world) recovered(ctx context.Context) error {
	if err := w.node.WaitStatus(ctx, "jobs, and an empty outbox", func(s *control.Status) bool {
		return s.GetsJobs() && s.Outbox == 0 && s.Runtime.Image == w.image
	}); err != nil {
		return err
	}
	if err := w.load.WaitAnswer(ctx, ""); err != nil {
		return err
	}
	key, err := w.node.ReadFile(w.keyFile())
	if err != nil {
		return err
	}
	s, err := w.node.Status(ctx)
	if err != nil {
		return err
	}
	if w.key == nil {
		w.key, w.address = key, ""
	}
	w.address = cmp.Or(w.address, s.Node)
	if !bytes.Equal(key, w.key) || s.Node != w.address {
		return fmt.Errorf("node %s has become %s, or its key another", w.address, s.Node)
	}
	return errors.Join(w.node.CheckModels(ctx), w.fault())
}

// fault returns what must never be with answers, since it was last asked.
func (w *world) fault() error {
	now := w.load.Take()
	w.tally.Add(&now)
	return now.Fault()
}

// wait waits until ok holds, at most for so long.
func (w *world) wait(ctx context.Context, most time.Duration, ok func() bool) {
	for end := time.Now().Add(most); ctx.Err() == nil && time.Now().Before(end) && !ok(); {
		pause(ctx, 50*time.Millisecond)
	}
}

func pause(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}
