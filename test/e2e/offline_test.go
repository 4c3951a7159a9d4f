package e2e

import (
	"context"
	"encoding/json"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/resultity/node/internal/control"
	"github.com/resultity/node/internal/journal"
	"github.com/resultity/node/test/chat"
	"github.com/resultity/node/test/model"
	"github.com/resultity/node/test/stack"
)

// The network goes away while jobs run. The node keeps its runtime, finishes
// them, keeps the results over a restart of the agent, and delivers them once
// the network is back.
func TestNetworkGoesAway(t *testing.T) {
	n, other := s.Nodes[0], s.Nodes[1]
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	ok := func(out []byte, err error) []byte {
		t.Helper()
		if err != nil {
			t.Fatalf("%v\n%s\n%s", err, out, n.Journal(context.WithoutCancel(ctx), 60))
		}
		return out
	}
	wait := func(what string, f func(*control.Status) bool) {
		t.Helper()
		ok(nil, n.WaitStatus(ctx, what, f))
	}
	jobs := func() (ids []string) {
		t.Helper()
		var list []control.Job
		ok(nil, json.Unmarshal(ok(n.Ctl(ctx, "jobs", "--json")), &list))
		for _, j := range list {
			if j.State != "unacknowledged" || j.Code != "" {
				t.Errorf("%+v", j)
			}
			ids = append(ids, j.ID)
		}
		return ids
	}
	ok(other.Ctl(ctx, "drain")) // whose jobs they are must be clear
	defer func() {
		if out, err := other.Ctl(context.WithoutCancel(ctx), "resume"); err != nil {
			t.Errorf("%v: %s", err, out)
		}
	}()
	ok(nil, other.WaitStatus(ctx, "a drain", func(st *control.Status) bool { return st.Draining && !st.GetsJobs() }))
	wait("jobs", (*control.Status).GetsJobs)
	before, err := n.Property(ctx, stack.Runtime, "InvocationID")
	ok(nil, err)

	// Two jobs are with an engine that holds its breath when the network goes.
	ok(n.Output(ctx, "pkill", "-STOP", "-x", "llama-server"))
	gone, hangUp := context.WithCancel(ctx)
	defer hangUp()
	for range 2 {
		go func() {
			_, _ = s.Ask(gone, chat.Request{Prompt: model.Prompts()[0].User, Tokens: 64}) // nobody hears the answer
		}()
	}
	wait("two jobs", func(st *control.Status) bool { return st.Busy == 2 })
	ok(s.Net.Output(ctx, "systemctl", "kill", "--signal=KILL", "resultity-network.service"))
	ok(s.Net.Output(ctx, "systemctl", "stop", "resultity-network.service"))
	back := false
	defer func() {
		if !back {
			_, _ = s.Net.Output(context.WithoutCancel(ctx), "systemctl", "start", "resultity-network.service") // for the tests after this one
		}
	}()
	ok(n.Output(ctx, "pkill", "-CONT", "-x", "llama-server"))
	wait("two results", func(st *control.Status) bool { return st.Outbox == 2 && st.Busy == 0 })
	kept := jobs()
	ok(nil, n.UserCtl(ctx, "restart", "resultity-agent.service"))
	wait("the runtime, without a network", func(st *control.Status) bool {
		return st.Runtime.State == "active" && st.Outbox == 2
	})
	if now := jobs(); len(kept) != 2 || !slices.Equal(now, kept) {
		t.Errorf("kept %q, before the restart %q", now, kept)
	}
	if after, err := n.Property(ctx, stack.Runtime, "InvocationID"); err != nil || after != before {
		t.Errorf("another start of the runtime: %s, was %s, %v", after, before, err)
	}

	ok(s.Net.Output(ctx, "systemctl", "start", "resultity-network.service"))
	back = true
	wait("the acknowledgements", func(st *control.Status) bool { return st.Outbox == 0 })
	for _, id := range kept {
		if _, _, err := s.Receipt(ctx, id); err != nil {
			t.Error(err)
		}
		out := ok(n.Output(ctx, "journalctl", "-q", "--no-pager", "-o", "cat", "RESULTITY_JOB="+id, "MESSAGE_ID="+journal.JobDone.ID))
		if n := strings.Count(string(out), "\n"); n != 1 {
			t.Errorf("job %s was done %d times:\n%s", id, n, out)
		}
	}
	wait("jobs again", (*control.Status).GetsJobs)
}
