package e2e

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/resultity/node/internal/control"
	"github.com/resultity/node/internal/gate"
	"github.com/resultity/node/internal/network"
	"github.com/resultity/node/internal/wire"
	"github.com/resultity/node/test/chat"
	"github.com/resultity/node/test/stack"
)

// The network orders a real node about, and reads what it has logged.
func TestOrders(t *testing.T) {
	ctx, n := t.Context(), s.Nodes[1]
	st, err := n.Status(ctx)
	if err != nil {
		t.Fatal(err)
	}
	order := func(kind string, more ...string) {
		t.Helper()
		if out, err := s.Network(ctx, append([]string{"order", st.Node, kind, "--wait", "--reason", "e2e"}, more...)...); err != nil {
			t.Fatalf("%s: %v: %s\n%s", kind, err, out, n.Journal(ctx, 40))
		}
	}
	accepting := func(s *control.Status) gate.Gate {
		for _, g := range s.Gates {
			if g.Name == gate.Accepting {
				return g
			}
		}
		return gate.Gate{}
	}

	order("drain")
	if st, err := n.Status(ctx); err != nil || accepting(st).State != gate.Closed || !strings.Contains(accepting(st).Detail, "by the network (e2e)") {
		t.Errorf("after a drain: %+v, %v", st, err)
	}
	// It outlives the agent, and the operator cannot take it back.
	if err := n.UserCtl(ctx, "restart", "resultity-agent.service"); err != nil {
		t.Fatal(err)
	}
	if out, err := n.Ctl(ctx, "resume"); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if st, err := n.Status(ctx); err != nil || accepting(st).State != gate.Closed {
		t.Errorf("after a restart and resultityctl resume: %+v, %v", st, err)
	}
	order("resume")
	if err := n.WaitRoutable(ctx); err != nil {
		t.Fatal(err)
	}

	before, err := n.Property(ctx, stack.Runtime, "InvocationID")
	if err != nil {
		t.Fatal(err)
	}
	order("revalidate")
	order("restart")
	after, err := n.Property(ctx, stack.Runtime, "InvocationID")
	if err != nil || after == before || after == "" {
		t.Errorf("the runtime's start %s became %q, %v", before, after, err)
	}
	if err := n.WaitRoutable(ctx); err != nil {
		t.Fatal(err)
	}
	order("penalty", "--for", "1h")

	// Jobs, whose text must be nowhere in what is uploaded.
	const secret = "Spell the word saxifrage."
	for range 4 { // both nodes get some
		if _, err := s.Ask(ctx, chat.Request{Prompt: secret, Tokens: 20}); err != nil {
			t.Fatal(err)
		}
	}
	order("logs")
	out, err := s.Network(ctx, "logs", "--json", "--node", st.Node)
	if err != nil || strings.Contains(string(out), "saxifrage") {
		t.Fatalf("%v: text of a request was uploaded, or nothing", err)
	}
	events := map[string]int{}
	for l := range strings.Lines(string(out)) {
		var r network.LogLine
		if err := json.Unmarshal([]byte(l), &r); err != nil {
			t.Fatalf("%v: %s", err, l)
		}
		events[r.Event]++
	}
	for _, e := range []string{"agent-ready", "registered", "runtime-active", "order-drain", "order-resume", "order-restart", "order-revalidate", "order-penalty"} {
		if events[e] == 0 {
			t.Errorf("no %s among what was uploaded: %v", e, events)
		}
	}
	if st, err = n.Status(ctx); err != nil || len(st.Networks[0].Orders) < 6 || st.Networks[0].Penalty == nil || st.Networks[0].Penalty.Reason != "e2e" || st.Networks[0].Logs.Uploaded == 0 {
		t.Errorf("status %+v, %v", st, err)
	}
	for _, o := range st.Networks[0].Orders {
		if o.Outcome != wire.OutcomeOK {
			t.Errorf("%+v", o)
		}
	}
	if text, _ := n.Ctl(ctx, "status"); !strings.Contains(string(text), "Penalised by demo until") || !strings.Contains(string(text), "The last orders of demo:") {
		t.Errorf("%s", text)
	}
}
