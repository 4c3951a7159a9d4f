package e2e

import (
	"context"
	"strings"
	"testing"
	"time"

	"github.com/resultity/node/internal/control"
	"github.com/resultity/node/internal/gate"
	"github.com/resultity/node/internal/journal"
	"github.com/resultity/node/test/stack"
)

// An engine that ends again and again uses up its starts. Then it stays down, says
// why, and comes back by the operator's word.
func TestRestartStormEnds(t *testing.T) {
	n := s.Nodes[0]
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	on := func(args ...string) {
		t.Helper()
		if out, err := n.Output(ctx, args...); err != nil {
			t.Fatalf("%q: %v\n%s", args, err, out)
		}
	}
	on("systemd-run", "-q", "--unit=killer", "sh", "-c", "while :; do pkill -KILL -x llama-server; sleep 0.02; done")
	defer func() { _, _ = n.Output(context.WithoutCancel(ctx), "systemctl", "stop", "killer") }() // it is stopped already where the test passes
	var g *gate.Gate
	err := n.WaitStatus(ctx, "the end of the storm", func(st *control.Status) bool {
		g = st.Closed()
		return g != nil && g.Name == gate.Runtime && strings.Contains(g.Detail, "ended 10 times within 10m0s")
	})
	if err != nil {
		t.Fatalf("%v\n%s", err, n.Journal(context.WithoutCancel(ctx), 100))
	}
	on("systemctl", "stop", "killer")
	t.Logf("%s; %s", g.Detail, g.Remedy)
	if !strings.Contains(g.Remedy, "resultityctl restart") {
		t.Errorf("remedy %q", g.Remedy)
	}
	if active, err := n.Property(ctx, stack.Runtime, "ActiveState"); err != nil || active != "failed" {
		t.Errorf("the unit is %s, %v", active, err)
	}
	if out, err := n.Output(ctx, "journalctl", "-q", "--no-pager", "-o", "cat", "MESSAGE_ID="+journal.RuntimeStorm.ID); err != nil || len(out) == 0 {
		t.Errorf("nothing in the journal: %v", err)
	}
	if out, err := n.Ctl(ctx, "restart"); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if err := n.WaitRoutable(ctx); err != nil {
		t.Fatalf("%v\n%s", err, n.Journal(context.WithoutCancel(ctx), 60))
	}
}
