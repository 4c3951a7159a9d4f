package network_test

import (
	"bytes"
	"encoding/json"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/gorilla/websocket"

	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/network/nodetest"
	"github.com/resultity/node/internal/receipt"
	"github.com/resultity/node/internal/sandbox/record"
	"github.com/resultity/node/internal/wire"
)

const unrecorded = "resultity_sandboxes_unrecorded_total"

// deliver has a job's answer signed under a record, or under the node's own.
func deliver(t *testing.T, n *testNetwork, s *nodetest.Session, named ...digest.Digest) receipt.Receipt {
	t.Helper()
	ask := n.ask(chat)
	j := s.Take()
	res := s.Node.Result(t, j, nodetest.Body(j, "secret answer"), func(r *receipt.Receipt) {
		for _, d := range named {
			r.Measured.SandboxDigest = d
		}
	})
	s.Send(res)
	nodetest.Expect[*wire.Ack](s)
	if r := n.answer(ask); r.status != http.StatusOK {
		t.Fatalf("%d %s", r.status, r.body)
	}
	return res.Receipt.Receipt()
}

// The record that a receipt names is served to clients, in all spellings of its
// digest, after a restart too.
func TestSandboxIsServed(t *testing.T) {
	n := start(t, nil)
	v := n.node()
	named := deliver(t, n, v.Ready(t)).Measured.SandboxDigest
	if named != v.Sandbox.Digest() {
		t.Fatalf("the receipt names %s", named)
	}
	served := func(spelt string) {
		t.Helper()
		r := n.get("/v1/sandbox/" + spelt)
		if r.status != http.StatusOK || !strings.HasPrefix(r.header.Get("Content-Type"), "application/json") {
			t.Fatalf("%s: %d %s", spelt, r.status, r.body)
		}
		got, err := record.Open(r.body)
		if err != nil || got.Digest() != named || got.Record().Node != v.Key.Address() {
			t.Errorf("%s: %s: %v", spelt, r.body, err)
		}
	}
	path := "/v1/sandbox/" + named.Hex()
	n.until("the record is stored", func() bool { return n.get(path).status == http.StatusOK })
	for _, spelt := range []string{named.Hex(), "0x" + named.Hex(), named.String()} {
		served(spelt)
	}
	for _, bad := range []string{"x", named.Hex()[1:], digest.Of([]byte("of nothing")).Hex(), v.Key.Address().Hex(), "*", ">"} {
		if r := n.get("/v1/sandbox/" + bad); r.status != http.StatusNotFound || r.code() != "sandbox_not_found" {
			t.Errorf("%q: %d %s", bad, r.status, r.body)
		}
	}
	if r := n.do(t.Context(), http.MethodGet, path, "", "Authorization", "Bearer x"); r.status != http.StatusUnauthorized {
		t.Errorf("without a key: %d", r.status)
	}
	if c := n.metric(unrecorded); c != 0 {
		t.Errorf("%v records are missing", c)
	}
	n.stop()
	n.serve()
	served(named.Hex())
}

// A record is acknowledged whenever it comes, and stored once.
func TestSandboxComesAgain(t *testing.T) {
	n := start(t, nil)
	v := n.node()
	next := v.Record(t, func(r *record.Record) { r.Start = strings.Repeat("0b", 16) })
	for range 2 {
		s := v.Connect(t)
		for range 2 {
			s.Send(&wire.Sandbox{Sandbox: next})
			if a := nodetest.Expect[*wire.SandboxAck](s); a.Digest != next.Digest() {
				t.Fatalf("acknowledged %s, want %s", a.Digest, next.Digest())
			}
		}
		if r := n.get("/v1/sandbox/" + next.Digest().Hex()); r.status != http.StatusOK {
			t.Fatalf("acknowledged, and not there: %d %s", r.status, r.body)
		}
		s.Drop()
	}
}

// Receipts that name a record which the network does not have count, and so does
// each such record, once in a session. What came in a session before is known.
func TestUnrecordedSandbox(t *testing.T) {
	n := start(t, nil)
	v := n.node()
	known := v.Sandbox.Digest()
	s := v.Connect(t)
	n.until("the record is stored", func() bool { return n.get("/v1/sandbox/"+known.Hex()).status == http.StatusOK })
	s.Send(&wire.Bye{})
	s.Closed()

	v.Sandbox = nil
	s = v.Ready(t)
	missing, coming := digest.Of([]byte("missing")), v.Record(t, nil)
	want := 0.0
	for _, named := range []struct {
		digest digest.Digest
		counts bool
	}{{known, false}, {missing, true}, {missing, false}, {known, false}, {receipt.Unknown, true}, {coming.Digest(), true}} {
		deliver(t, n, s, named.digest)
		if named.counts { // they are looked for one behind the other
			want++
			n.until("it is counted", func() bool { return n.metric(unrecorded) >= want })
		}
		if got := n.metric(unrecorded); got != want {
			t.Fatalf("%v records are missing, want %v", got, want)
		}
	}
	s.Send(&wire.Sandbox{Sandbox: coming})
	nodetest.Expect[*wire.SandboxAck](s)
	deliver(t, n, s, coming.Digest())
	deliver(t, n, s, digest.Of([]byte("another")))
	n.until("it is counted", func() bool { return n.metric(unrecorded) == want+1 })
}

// rawSandbox is a message around a record that no honest node would print.
type rawSandbox struct {
	*wire.Sandbox
	raw []byte
}

func (r rawSandbox) MarshalJSON() ([]byte, error) { return r.raw, nil }

// spelt signs the bytes of a record, whatever they are.
func spelt(t *testing.T, v *nodetest.Node, change func(body []byte) []byte) rawSandbox {
	t.Helper()
	body, err := v.Record(t, nil).Record().Encode()
	if err != nil {
		t.Fatal(err)
	}
	changed := change(bytes.Clone(body))
	if bytes.Equal(changed, body) {
		t.Fatalf("nothing to change in %s", body)
	}
	sig, err := v.Key.Sign(record.Hash(changed))
	if err != nil {
		t.Fatal(err)
	}
	raw, err := json.Marshal(map[string]any{"sandbox": map[string]any{"record": json.RawMessage(changed), "signature": sig}})
	if err != nil {
		t.Fatal(err)
	}
	return rawSandbox{raw: raw}
}

func TestSandboxRefused(t *testing.T) {
	n := start(t, nil)
	bystander := n.node().Ready(t)
	replace := func(old, by string) func(*testing.T, *nodetest.Node) wire.Message {
		return func(t *testing.T, v *nodetest.Node) wire.Message {
			return spelt(t, v, func(b []byte) []byte { return bytes.Replace(b, []byte(old), []byte(by), 1) })
		}
	}
	made := func(change func(*record.Record)) func(*testing.T, *nodetest.Node) wire.Message {
		return func(t *testing.T, v *nodetest.Node) wire.Message {
			return &wire.Sandbox{Sandbox: v.Record(t, change)}
		}
	}
	for name, c := range map[string]struct {
		reason string
		forge  func(*testing.T, *nodetest.Node) wire.Message
	}{
		"another node's": {"sandbox", func(t *testing.T, v *nodetest.Node) wire.Message {
			return &wire.Sandbox{Sandbox: nodetest.New(t, v.URL, n.raw).Record(t, nil)}
		}},
		"another network's": {"sandbox", made(func(r *record.Record) { r.Network = "mainnet" })},
		"of the future":     {"sandbox", made(func(r *record.Record) { r.Time += 10 * time.Minute.Milliseconds() })},
		"nothing":           {"malformed", func(*testing.T, *nodetest.Node) wire.Message { return rawSandbox{raw: []byte("{}")} }},
		"another order":     {"malformed", replace(`"uid":1000,"gid":1000`, `"gid":1000,"uid":1000`)},
		"one more field":    {"malformed", replace(`{"version"`, `{"x":1,"version"`)},
		"too large":         {"malformed", replace(`"label":""`, `"label":"`+strings.Repeat("x", record.MaxSize)+`"`)},
		"not sealed":        {"malformed", replace(`"ok":true`, `"ok":false`)},
		"signed by another": {"malformed", func(t *testing.T, v *nodetest.Node) wire.Message {
			return spelt(t, &nodetest.Node{Key: nodetest.New(t, v.URL, n.raw).Key, Config: v.Config, Digest: v.Digest}, func(b []byte) []byte {
				return bytes.Replace(b, []byte(`"node":"`), []byte(`"node":"0x0000000000000000000000000000000000000001","x":"`), 1)
			})
		}},
	} {
		t.Run(name, func(t *testing.T) {
			s := n.node().Ready(t)
			series := `resultity_frames_refused_total{reason="` + c.reason + `"}`
			before := n.metric(series)
			s.Send(c.forge(t, s.Node))
			if code := s.Closed(); code != websocket.ClosePolicyViolation {
				t.Errorf("closed with %d", code)
			}
			n.until("the refusal is counted", func() bool { return n.metric(series) == before+1 })
			deliver(t, n, bystander)
		})
	}
}
