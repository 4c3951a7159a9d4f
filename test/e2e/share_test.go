package e2e

import (
	"context"
	"fmt"
	"regexp"
	"strconv"
	"testing"
	"time"

	"github.com/resultity/node/test/model"
	"github.com/resultity/node/test/stack"
)

var given = regexp.MustCompile(`(?m)^resultity_models_given_bytes_total (\S+)$`)

// TestModelFromANeighbour: a node whose model is gone gets it from another node while
// the model's source is down.
func TestModelFromANeighbour(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	gives, takes := s.Nodes[0], s.Nodes[1]
	on := func(n *stack.Node, script string) string {
		t.Helper()
		out, err := n.Output(ctx, "sh", "-ec", script)
		if err != nil {
			t.Fatalf("%s: %s: %v\n%s", n.Name(), script, err, out)
		}
		return string(out)
	}
	well := func(n *stack.Node) {
		t.Helper()
		if err := n.WaitRoutable(ctx); err != nil {
			t.Fatalf("%v\n%s", err, n.Journal(context.WithoutCancel(ctx), 60))
		}
	}
	// The lab's own addresses are of no private network.
	const drop = "/etc/resultity/agent.toml.d/70-neighbours.toml"
	for i, n := range []*stack.Node{gives, takes} {
		well(n)
		address := fmt.Sprintf("10.77.0.%d/24", i+1)
		device := "dev=$(ip -o -4 address show scope global | awk '{print $2; exit}'); "
		on(n, device+"ip address add "+address+" dev $dev")
		defer func() {
			on(n, device+"ip address del "+address+" dev $dev; rm -f "+drop)
			if err := n.UserCtl(ctx, "restart", "resultity-agent.service"); err != nil {
				t.Error(err)
			}
			well(n)
		}()
	}
	for n, text := range map[*stack.Node]string{
		gives: "serve = \"10.77.0.1:8079\"\n", takes: "neighbours = [\"http://10.77.0.1:8079/models\"]\n",
	} {
		if err := n.WriteFile(drop, []byte("[models]\n"+text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := gives.UserCtl(ctx, "restart", "resultity-agent.service"); err != nil {
		t.Fatal(err)
	}
	well(gives)
	if out, err := s.Net.Output(ctx, "systemctl", "stop", "models.service"); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	defer func() {
		if out, err := s.Net.Output(ctx, "systemctl", "start", "models.service"); err != nil {
			t.Errorf("%v: %s", err, out)
		}
	}()
	if err := takes.UserCtl(ctx, "stop", "resultity-agent.service", stack.Runtime); err != nil {
		t.Fatal(err)
	}
	on(takes, "rm -r '"+takes.State+"'/agent/models/blobs/* '"+takes.State+"'/agent/models/trees/*")
	began := time.Now()
	if err := takes.UserCtl(ctx, "start", "resultity-agent.service"); err != nil {
		t.Fatal(err)
	}
	well(takes)
	out, err := gives.Ctl(ctx, "metrics")
	m := given.FindSubmatch(out)
	if err != nil || m == nil {
		t.Fatalf("%v: %s", err, out)
	}
	if n, err := strconv.ParseFloat(string(m[1]), 64); err != nil || int(n) < len(model.GGUF()) {
		t.Errorf("%v of %d bytes were given, %v", n, len(model.GGUF()), err)
	}
	t.Logf("the model came from the neighbour, and the node has jobs after %v", time.Since(began).Round(time.Millisecond))
}
