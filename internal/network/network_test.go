package network_test

import (
	"bytes"
	"net/http"
	"testing"

	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/network/nodetest"
	"github.com/resultity/node/internal/receipt"
)

func TestPlainChat(t *testing.T) {
	n := start(t, nil)
	node := n.node()
	s := node.Ready(t)
	ch := n.ask(chat)
	j := s.Take()
	if string(j.Request) != chat || j.Stream || j.Model != nodetest.Model || j.Config != node.Digest {
		t.Fatalf("job %+v", j)
	}
	want := nodetest.Body(j, "secret answer")
	s.Finish(j, "secret answer")
	r := n.answer(ch)
	if r.status != http.StatusOK || !bytes.Equal(r.body, want) {
		t.Fatalf("status %d, body %s", r.status, r.body)
	}
	if got := r.header.Get("Resultity-Receipt"); got != j.ID.String() {
		t.Fatalf("receipt %q, want %s", got, j.ID)
	}
	rec := n.get("/v1/receipts/" + j.ID.String())
	signed, err := receipt.Verify(rec.body)
	if err != nil {
		t.Fatal(err)
	}
	if rc := signed.Receipt(); rc.Node != node.Key.Address() || rc.Measured.ResponseHash != digest.Of(r.body) || rc.Measured.RequestHash != digest.Of([]byte(chat)) {
		t.Fatalf("receipt %+v", rc)
	}
	if v := n.metric(`resultity_jobs_total{outcome="ok"}`); v != 1 {
		t.Errorf("jobs ok: %v", v)
	}
}

func TestStreamedChat(t *testing.T) {
	n := start(t, nil)
	s := n.node().Ready(t)
	ch := n.ask(chatStream)
	j := s.Take()
	if !j.Stream {
		t.Fatalf("job %+v", j)
	}
	want := nodetest.Body(j, "one two three")
	sendChunks(s, j, want, 0, len(want), 50)
	s.Send(s.Node.Result(t, j, want, nil))
	r := n.answer(ch)
	if r.status != http.StatusOK || !bytes.Equal(r.body, want) || r.header.Get("Content-Type") != "text/event-stream; charset=utf-8" {
		t.Fatalf("status %d, %v, body %s", r.status, r.header, r.body)
	}
	if got := r.header.Get("Resultity-Receipt"); got != j.ID.String() {
		t.Fatalf("receipt %q", got)
	}
	if rec := n.get("/v1/receipts/" + j.ID.String()); rec.status != http.StatusOK {
		t.Fatalf("receipt: %d %s", rec.status, rec.body)
	}
}
