package e2e

import (
	"context"
	"encoding/json"
	"path"
	"strings"
	"testing"
	"time"

	"github.com/resultity/node/internal/receipt"
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

	p := model.Prompts()[0]
	request := ok(json.Marshal(map[string]any{
		"model": model.Name, "temperature": 0, "max_tokens": 60, "messages": []map[string]string{{"role": "user", "content": p.User}},
	}))
	var signed receipt.Signed
	var response, raw []byte
	for try := 0; ; try++ { // until the one that keeps jobs gets it
		res, body, err := s.Do(ctx, "POST", "/v1/chat/completions", json.RawMessage(request))
		if err != nil || res.StatusCode != 200 {
			t.Fatalf("%v %v: %s", res, err, body)
		}
		response = body
		if res, raw, err = s.Do(ctx, "GET", "/v1/receipts/"+res.Header.Get("Resultity-Receipt"), nil); err != nil || res.StatusCode != 200 {
			t.Fatalf("%v %v: %s", res, err, raw)
		}
		if signed, err = receipt.Verify(raw); err != nil {
			t.Fatal(err)
		}
		st, err := keeper.Status(ctx)
		ok(nil, err)
		if strings.EqualFold(st.Node, signed.Receipt().Node.Hex()) {
			break
		}
		if try == 20 {
			t.Fatal("it gets no job")
		}
	}
	r := signed.Receipt()
	same := func(out []byte, err error) {
		t.Helper()
		if ok(out, err); !strings.HasPrefix(string(out), "SAME") {
			t.Errorf("%s", out)
		}
	}
	same(keeper.Ctl(ctx, "replay", r.Job.String()))
	for _, n := range s.Nodes {
		for name, text := range map[string][]byte{"request": request, "response": response, "receipt": raw} {
			ok(nil, n.WriteFile("/root/replay/"+name, text, 0o600))
		}
		same(n.Ctl(ctx, "replay", "--request", "/root/replay/request", "--response", "/root/replay/response", "--receipt", "/root/replay/receipt"))
	}

	// The network asks the other node, whose hardware and settings are the same. The
	// command may act as the account of its directory, which has to read the file.
	ok(nil, s.Net.WriteFile("/root/replay/request", request, 0o600))
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
