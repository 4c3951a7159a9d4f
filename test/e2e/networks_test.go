package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/resultity/node/internal/control"
	"github.com/resultity/node/internal/evm"
	"github.com/resultity/node/internal/gate"
	"github.com/resultity/node/internal/receipt"
	"github.com/resultity/node/internal/snapshot"
	"github.com/resultity/node/internal/wire"
	"github.com/resultity/node/test/chat"
	"github.com/resultity/node/test/model"
)

// side is a network service of the tests.
type side struct {
	chat.Client
	name  string
	chain uint64
}

// secondNetwork begins another network on the network's host: a service of its
// own with its own keys, which publishes what change makes of the first one's
// configuration.
func secondNetwork(t *testing.T) (two side, publish func(change func(*snapshot.Config))) {
	t.Helper()
	const dir = "/var/lib/second-network"
	two = side{name: "second", chain: 4242, Client: chat.Client{API: "https://" + net.JoinHostPort(s.Net.Addr().String(), "8444"), HTTP: s.HTTP}}
	run := func(args ...string) string {
		return on(t, append([]string{"resultity-network"}, append(args, "--dir", dir)...)...)
	}
	run("init", "--name", two.name, "--chain-id", fmt.Sprint(two.chain))
	read := func(name string, into any) {
		t.Helper()
		raw, err := s.Net.ReadFile(name)
		if err == nil {
			err = json.Unmarshal(raw, into)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	var skeleton struct {
		Network struct {
			MessageKeys []evm.Address `json:"message_keys"`
		} `json:"network"`
	}
	read(dir+"/config.json", &skeleton)
	publish = func(change func(*snapshot.Config)) {
		t.Helper()
		var c snapshot.Config
		read("/var/lib/resultity-network/next.json", &c)
		c.Network.Name, c.Network.ChainID, c.Network.MessageKeys = two.name, two.chain, skeleton.Network.MessageKeys
		change(&c)
		raw, err := json.Marshal(&c)
		if err == nil {
			err = s.Net.WriteFile(dir+"/next.json", raw, 0o644)
		}
		if err != nil {
			t.Fatal(err)
		}
		run("publish", "--config", dir+"/next.json")
	}
	publish(func(*snapshot.Config) {})
	token := run("token", "create", "--uses", "1", "--account", "second")
	on(t, "systemd-run", "-q", "--unit=second-network", "resultity-network", "serve", "--config", "/dev/null", "--dir", dir, "--listen", ":8444", "--metrics-listen", "",
		"--tls-cert", "/etc/resultity-network/tls.crt", "--tls-key", "/etc/resultity-network/tls.key")
	t.Cleanup(func() {
		if _, err := s.Net.Output(context.Background(), "systemctl", "stop", "second-network"); err != nil {
			t.Error(err)
		}
	})
	raw, err := s.Net.ReadFile(dir + "/api-key")
	if err != nil {
		t.Fatal(err)
	}
	two.APIKey = strings.TrimSpace(string(raw))
	root, err := s.Net.ReadFile(dir + "/repository/metadata/1.root.json")
	if err != nil {
		t.Fatal(err)
	}
	n := s.Nodes[0]
	for name, data := range map[string]string{
		"second-root.json": string(root), "second-token": token,
		"agent.toml.d/60-second.toml": fmt.Sprintf("[network.second]\nurl = %q\nroot = \"/etc/resultity/second-root.json\"\nca = \"/etc/resultity/ca.pem\"\nenrolment_token = \"/etc/resultity/second-token\"\n", two.API),
	} {
		if err := n.WriteFile("/etc/resultity/"+name, []byte(data), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return two, publish
}

// ask has a network answer one request, and returns its receipt.
func (n side) ask(ctx context.Context, node string) (receipt.Signed, error) {
	p := model.Prompts()[0]
	a, err := n.Ask(ctx, chat.Request{Prompt: p.User, Tokens: 64, Want: p.Answer})
	if err != nil {
		return receipt.Signed{}, fmt.Errorf("%s: %w", n.name, err)
	}
	r := a.Receipt
	if r.ChainID() != n.chain || node != "" && r.Receipt().Node.Hex() != node {
		err = fmt.Errorf("%s: a receipt of chain %d by %s", n.name, r.ChainID(), r.Receipt().Node.Hex())
	}
	return r, err
}

// One node in two networks: they share the runtime while both ask for the same,
// each with its own receipts; one that asks for another waits while the first goes
// on; and it runs when the node leaves the first.
func TestTwoNetworks(t *testing.T) {
	n, other := s.Nodes[0], s.Nodes[1]
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	const file, first = "/etc/resultity/agent.toml", "/etc/resultity/agent.toml.d/50-demo.toml"
	before, err := n.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	node := func(args ...string) {
		t.Helper()
		if out, err := n.Output(ctx, args...); err != nil {
			t.Fatalf("%q: %v\n%s", args, err, out)
		}
	}
	restart := func() {
		t.Helper()
		if err := n.UserCtl(ctx, "restart", n.Agent); err != nil {
			t.Fatal(err)
		}
	}
	state := func(network, want string) {
		t.Helper()
		if err := n.WaitStatus(ctx, network+" to be "+want, func(st *control.Status) bool {
			part := st.Of(network)
			one := *st
			one.Gates = append([]gate.Gate(nil), st.Gates...)
			one.Networks = append([]control.Network(nil), st.Networks...)
			one.Keep(network)
			return part != nil && part.Runtime.State == want && one.GetsJobs() == (want == "active")
		}); err != nil {
			out, _ := n.Ctl(ctx, "status")
			t.Fatalf("%v\n%s\n%s", err, out, n.Journal(context.WithoutCancel(ctx), 80))
		}
	}
	two, publish := secondNetwork(t)
	defer func() { // as it was
		ctx = context.WithoutCancel(t.Context())
		node("rm", "-f", "/etc/resultity/agent.toml.d/60-second.toml", first)
		if err := n.WriteFile(file, before, 0o644); err != nil {
			t.Error(err)
		}
		restart()
		if err := n.WaitRoutable(ctx); err != nil {
			t.Error(err)
		}
	}()
	// A file for each network is all it takes.
	if err := n.WriteFile(first, append(before, "priority = 5\n"...), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := n.WriteFile(file, []byte("[log]\nlevel = \"info\"\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if out, err := other.Ctl(ctx, "drain"); err != nil { // whose jobs they are must be clear
		t.Fatalf("%v: %s", err, out)
	}
	defer func() { _, _ = other.Ctl(context.WithoutCancel(ctx), "resume") }()
	restart()
	demo := side{name: "demo", chain: 31337, Client: s.Client}
	state("demo", "active")
	state("second", "active")
	st, err := n.Status(ctx)
	if err != nil {
		t.Fatal(err)
	}
	start, err := n.Property(ctx, "resultity-runtime.service", "InvocationID")
	if err != nil {
		t.Fatal(err)
	}
	jobs := map[string]string{} // network, by id
	for range 3 {
		for _, side := range []side{demo, two} {
			r, err := side.ask(ctx, st.Node)
			if err != nil {
				t.Fatal(err)
			}
			jobs[r.Receipt().Job.String()] = side.name
		}
	}
	if part := st.Of("second"); len(jobs) != 6 || part.Snapshot.Digest == st.Of("demo").Snapshot.Digest {
		t.Errorf("%d jobs under %s", len(jobs), part.Snapshot.Digest)
	}

	// The second asks for something else: it waits, while the first has no failed job.
	asking, enough := context.WithCancel(ctx)
	failed := make(chan error, 1)
	go func() {
		for asking.Err() == nil {
			if _, err := demo.ask(asking, st.Node); err != nil && asking.Err() == nil {
				failed <- err
				return
			}
		}
		failed <- nil
	}()
	publish(func(c *snapshot.Config) { c.Runtime.Settings.Slots = 1 })
	state("second", wire.RuntimeStandby)
	enough()
	if err := <-failed; err != nil {
		t.Error(err)
	}
	if now, err := n.Property(ctx, "resultity-runtime.service", "InvocationID"); err != nil || now != start {
		t.Errorf("the runtime was started again (%v)", err)
	}
	if out := on(t, "curl", "-sSk", "-H", "Authorization: Bearer "+two.APIKey, "https://localhost:8444/v1/nodes"); !strings.Contains(out, "standby") {
		t.Errorf("the second network does not say it: %s", out)
	}
	if out, _ := n.Output(ctx, "resultityctl", "status", "--network", "second"); !strings.Contains(string(out), "serves demo") {
		t.Errorf("status does not say who has the runtime:\n%s", out)
	}

	// The node leaves the first: the second runs.
	node("rm", first)
	restart()
	state("second", "active")
	r, err := two.ask(ctx, st.Node)
	if err != nil {
		t.Fatal(err)
	}
	jobs[r.Receipt().Job.String()] = two.name
	for id, network := range jobs {
		out, err := n.Output(ctx, "journalctl", "-q", "--no-pager", "-o", "json", "--output-fields=RESULTITY_NETWORK", "RESULTITY_JOB="+id)
		if err != nil || !bytes.Contains(out, []byte(`"RESULTITY_NETWORK":"`+network+`"`)) || strings.Count(string(out), "RESULTITY_NETWORK") != strings.Count(string(out), `"`+network+`"`) {
			t.Errorf("job %s of %s: %v, %s", id, network, err, out)
		}
		if log := on(t, "journalctl", "-q", "--no-pager", "-u", "second-network"); network == "demo" && strings.Contains(log, id) {
			t.Errorf("the second network knows job %s of the first", id)
		}
	}
}
