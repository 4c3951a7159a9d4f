package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/resultity/node/internal/control"
	"github.com/resultity/node/internal/snapshot"
	"github.com/resultity/node/internal/wire"
	"github.com/resultity/node/test/model"
	"github.com/resultity/node/test/stack"
)

// generations waits until ok holds for the generations of a node that serves.
func generations(ctx context.Context, t *testing.T, n *stack.Node, what string, ok func(*control.Generations) bool) *control.Generations {
	t.Helper()
	var gs control.Generations
	if err := n.WaitStatus(ctx, what, func(st *control.Status) bool {
		out, err := n.Ctl(ctx, "generations", "list", "--json")
		if err != nil || json.Unmarshal(out, &gs) != nil {
			return false
		}
		return st.Runtime.State == "active" && ok(&gs)
	}); err != nil {
		out, _ := n.Ctl(ctx, "generations")
		t.Fatalf("%v\n%s\n%s", err, out, n.Journal(ctx, 60))
	}
	return &gs
}

// reported waits for what the network says of a node.
func reported(ctx context.Context, t *testing.T, n *stack.Node, ok func(routable bool, reason string, failed *wire.Failed) bool) {
	t.Helper()
	st, err := n.Status(ctx)
	if err != nil {
		t.Fatal(err)
	}
	var last []byte
	for {
		_, body, err := s.Do(ctx, "GET", "/v1/nodes", nil)
		var list struct {
			Data []struct {
				ID        string          `json:"id"`
				Routable  bool            `json:"routable"`
				Reason    string          `json:"reason"`
				Heartbeat *wire.Heartbeat `json:"heartbeat"`
			} `json:"data"`
		}
		if err == nil && json.Unmarshal(body, &list) == nil {
			for _, d := range list.Data {
				if d.ID == st.Node && d.Heartbeat != nil && ok(d.Routable, d.Reason, d.Heartbeat.Failed) {
					return
				}
			}
		}
		last = body
		select {
		case <-ctx.Done():
			t.Fatalf("%s: the network says %s", n.Name(), last)
		case <-time.After(100 * time.Millisecond): // the API answers, it does not notify
		}
	}
}

func prints(ctx context.Context, t *testing.T, n *stack.Node, args string, want ...string) {
	t.Helper()
	out, err := n.Ctl(ctx, strings.Fields(args)...)
	if err != nil {
		t.Errorf("%s: %v: %s", args, err, out)
	}
	for _, w := range want {
		if !strings.Contains(string(out), w) {
			t.Errorf("%s does not print %q:\n%s", args, w, out)
		}
	}
}

// A configuration that does not give the right answers is left for the one
// before by itself, over a reboot too, and reported; a good one is taken up; and
// the operator goes back and on.
func TestGenerations(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	n := s.Nodes[0]
	first := generations(ctx, t, n, "a generation", func(gs *control.Generations) bool { return gs.Current != 0 }).Current
	right := model.Prompts()[0].Answer

	if err := s.Publish(ctx, func(c *snapshot.Config) {
		c.Validation.Golden[0].Answers = []string{"no such answer"}
		c.Runtime.Settings.Slots = 1
	}); err != nil {
		t.Fatal(err)
	}
	gone := func(gs *control.Generations) bool {
		bad := gs.Get(first + 1)
		return gs.Current == first && bad != nil && bad.State == "dead" && bad.Step == "validation"
	}
	for _, m := range s.Nodes {
		generations(ctx, t, m, "the way back", func(gs *control.Generations) bool {
			return len(gs.Generations) > 0 && gs.Generations[len(gs.Generations)-1].State == "dead"
		})
	}
	generations(ctx, t, n, "the way back", gone)
	reported(ctx, t, n, func(routable bool, reason string, f *wire.Failed) bool {
		return !routable && f != nil && f.Final && f.Step == "validation" && strings.Contains(reason, f.Reason)
	})
	prints(ctx, t, n, "generations", "* ", "healthy", "dead", "validation: ")
	prints(ctx, t, n, fmt.Sprintf("generations show %d", first+1), "failed at", "the configuration's", "phase", "[Container]")
	prints(ctx, t, n, fmt.Sprintf("generations diff %d %d", first, first+1), "validation.golden[0].answers[0]", "runtime.settings.slots", "-Exec=", "+Exec=")
	prints(ctx, t, n, "metrics", fmt.Sprintf("resultity_generation_current %d\n", first), `state="dead"`)

	if err := n.Reboot(ctx); err != nil {
		t.Fatal(err)
	}
	gs := generations(ctx, t, n, "the same after a reboot", gone)
	if len(gs.Generations) > 0 && gs.Generations[len(gs.Generations)-1].Number != first+1 {
		t.Errorf("the dead one was tried again: %+v", gs)
	}
	reported(ctx, t, n, func(_ bool, _ string, f *wire.Failed) bool { return f != nil && f.Final })

	if err := s.Publish(ctx, func(c *snapshot.Config) {
		c.Validation.Golden[0].Answers = []string{right}
		c.Runtime.Settings.Slots = 2
		c.Limits.Tokens++
	}); err != nil {
		t.Fatal(err)
	}
	good := generations(ctx, t, n, "the good one", func(gs *control.Generations) bool { return gs.Current > first+1 && gs.Previous == first }).Current
	if err := s.WaitRoutable(ctx); err != nil {
		t.Fatal(err)
	}
	reported(ctx, t, n, func(routable bool, _ string, f *wire.Failed) bool { return routable && f == nil })

	prints(ctx, t, n, "generations rollback", fmt.Sprintf("generation %d", first), "config_mismatch")
	generations(ctx, t, n, "what the operator wants", func(gs *control.Generations) bool { return gs.Current == first && gs.Previous == good })
	reported(ctx, t, n, func(routable bool, _ string, _ *wire.Failed) bool { return !routable })
	prints(ctx, t, n, "generations forward")
	generations(ctx, t, n, "the network's again", func(gs *control.Generations) bool { return gs.Current == good })
	if err := s.WaitRoutable(ctx); err != nil {
		t.Fatal(err)
	}
	if out := n.Journal(ctx, 2000); !strings.Contains(out, "generation did not become healthy") || strings.Contains(out, "no such answer") {
		t.Errorf("the journal does not tell it, or tells too much:\n%s", out)
	}
}
