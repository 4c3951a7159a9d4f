package e2e

import (
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/resultity/node/internal/control"
	"github.com/resultity/node/internal/journal"
	"github.com/resultity/node/internal/network"
	"github.com/resultity/node/internal/network/classes"
	"github.com/resultity/node/internal/snapshot"
	"github.com/resultity/node/test/bench/instant"
	"github.com/resultity/node/test/stack"
)

// Nodes of one class are validated on schedule and give the same answers. One whose
// engine goes wrong without a job is taken out of service by that, and heals.
func TestScheduledValidation(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	file := filepath.Join(t.TempDir(), "engine")
	if err := stack.BuildProgram(ctx, file, "./test/faults/engine"); err != nil {
		t.Fatal(err)
	}
	program, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	ref, err := s.PushEngine(ctx, s.Reg, "faulty", program)
	if err != nil {
		t.Fatal(err)
	}
	var before snapshot.Config
	if err := s.Publish(ctx, func(c *snapshot.Config) {
		before = *c
		c.Runtime.Image = ref
		c.Validation = snapshot.Validation{Interval: 30, Golden: []snapshot.Golden{{Name: "words", Prompt: "words", Answers: []string{instant.Text(8)}, Tokens: 8, Timeout: 3}}}
	}); err != nil {
		t.Fatal(err)
	}
	defer func() {
		ctx := context.WithoutCancel(ctx)
		if err := s.Publish(ctx, func(c *snapshot.Config) { c.Runtime.Image, c.Validation = before.Runtime.Image, before.Validation }); err != nil {
			t.Error(err)
		}
		if err := s.WaitRoutable(ctx); err != nil {
			t.Error(err)
		}
	}()
	wait := func(n *stack.Node, what string, ok func(*control.Status, *control.Validation) bool) {
		t.Helper()
		if err := n.WaitStatus(ctx, what, func(st *control.Status) bool {
			return len(st.Networks) == 1 && st.Networks[0].Validation != nil && ok(st, st.Networks[0].Validation)
		}); err != nil {
			t.Fatalf("%s: %v\n%s", n.Name(), err, n.Journal(context.WithoutCancel(ctx), 60))
		}
	}
	for _, n := range s.Nodes {
		wait(n, "a validation on schedule", func(st *control.Status, v *control.Validation) bool {
			return v.Cause == "schedule" && v.Passed && v.Next != nil && st.Networks[0].Class != nil && !st.Networks[0].Class.Fingerprint.IsZero()
		})
	}
	out, err := s.Network(ctx, "nodes", "list", "--json")
	var list []network.NodeInfo
	if err == nil {
		err = json.Unmarshal(out, &list)
	}
	if err != nil || len(list) < 2 || slices.ContainsFunc(list, func(n network.NodeInfo) bool { return n.Connected && n.Answers != classes.Same }) {
		t.Errorf("%v\n%s", err, out)
	}

	n := s.Nodes[0]
	if out, err := n.Output(ctx, "pkill", "-IO", "-x", "llama-server"); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	wait(n, "the end of its service", func(st *control.Status, v *control.Validation) bool { return !v.Passed || v.Cause == "installation" })
	if out, err := n.Output(ctx, "journalctl", "-q", "--no-pager", "-o", "cat", "MESSAGE_ID="+journal.ValidationFailed.ID); err != nil || !strings.Contains(string(out), "validation") {
		t.Errorf("the journal has %q, %v", out, err)
	}
	prints(ctx, t, n, "metrics", `resultity_validations_total{cause="schedule",network="demo",result="failed"} 1`)
	wait(n, "its return", func(st *control.Status, v *control.Validation) bool {
		return v.Passed && st.Runtime.State == "active"
	})
}
