package e2e

import (
	"context"
	"path"
	"strings"
	"testing"
	"time"

	"github.com/resultity/node/test/chat"
	"github.com/resultity/node/test/model"
)

// A request that is run again has the same answer: on the node that keeps it, on
// any node from what the client has, and on a second node by the network's word.
func TestReplay(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	keeper := s.Nodes[0]
	ok := func(out []byte, err error) []byte {
		t.Helper()
		if err != nil {
			t.Fatalf("%v\n%s\n%s", err, out, keeper.Journal(context.WithoutCancel(ctx), 40))
		}
		return out
	}
	restart := func() {
		t.Helper()
		ok(nil, keeper.UserCtl(ctx, "restart", keeper.Agent))
		ok(nil, keeper.WaitRoutable(ctx))
	}
	const dropIn = "/etc/resultity/agent.toml.d/60-replay.toml"
	ok(nil, keeper.WriteFile(dropIn, []byte("[replay]\nkeep = 1\n"), 0o644))
	restart()

	var a *chat.Answer
	for try := 0; ; try++ { // until the one that keeps jobs gets it
		var err error
		if a, err = s.Ask(ctx, chat.Request{Prompt: model.Prompts()[0].User, Tokens: 60}); err != nil {
			t.Fatal(err)
		}
		st, err := keeper.Status(ctx)
		ok(nil, err)
		if strings.EqualFold(st.Node, a.Receipt.Receipt().Node.Hex()) {
			break
		}
		if try == 20 {
			t.Fatal("it gets no job")
		}
	}
	r := a.Receipt.Receipt()
	same := func(out []byte, err error) {
		t.Helper()
		if ok(out, err); !strings.HasPrefix(string(out), "SAME") {
			t.Errorf("%s", out)
		}
	}
	same(keeper.Ctl(ctx, "replay", r.Job.String()))
	for _, n := range s.Nodes {
		for name, text := range map[string][]byte{"request": a.Request, "response": a.Body, "receipt": a.RawReceipt} {
			ok(nil, n.WriteFile("/root/replay/"+name, text, 0o600))
		}
		same(n.Ctl(ctx, "replay", "--request", "/root/replay/request", "--response", "/root/replay/response", "--receipt", "/root/replay/receipt"))
	}

	// The network asks the other node, whose hardware and settings are the same. The
	// command may act as the account of its directory, which has to read the file.
	ok(nil, s.Net.WriteFile("/root/replay/request", a.Request, 0o600))
	out := ok(s.Network(ctx, "jobs", "replay", r.Job.String(), "--request", "/root/replay/request"))
	if !strings.HasPrefix(string(out), "SAME") || strings.Count(string(out), " signed, as job ") != 2 {
		t.Errorf("%s", out)
	}

	// What was kept is gone when the operator wants nothing kept any more.
	kept := path.Join(keeper.State, "agent/networks/demo/replay")
	ok(keeper.Output(ctx, "ls", kept))
	ok(keeper.Output(ctx, "rm", "-r", dropIn, "/root/replay"))
	restart()
	if out, err := keeper.Output(ctx, "ls", kept); err == nil {
		t.Errorf("it is there: %s", out)
	}
}
