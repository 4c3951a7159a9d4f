package network_test

import (
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/resultity/node/internal/evm"
	"github.com/resultity/node/internal/network"
	"github.com/resultity/node/internal/network/nodetest"
	"github.com/resultity/node/internal/network/store"
	"github.com/resultity/node/internal/receipt"
	"github.com/resultity/node/internal/receiptlog"
	"github.com/resultity/node/internal/wire"
)

// logged is a session of a node that keeps a log of its receipts.
type logged struct {
	*nodetest.Session
	t    *testing.T
	n    *testNetwork
	log  *receiptlog.Log
	sent uint64
	wait []evm.Hash // leaves that are not sent
	era  uint64
}

// begin opens a session, and goes on from what the network has.
func (l *logged) begin(node *nodetest.Node) {
	l.t.Helper()
	l.Session = node.Connect(l.t)
	a := nodetest.Expect[*wire.LeavesAck](l.Session)
	if a.Size != l.sent || a.Size > 0 && (a.Head == nil || a.Head.Verify() != nil) {
		l.t.Fatalf("told %+v, want %d receipts", a, l.sent)
	}
	l.Send(l.Node.Heartbeat())
}

// job has a client's request answered and returns the receipt as the client gets it.
func (l *logged) job() (id string, signed *receipt.Signed) {
	l.t.Helper()
	ask := l.n.ask(chat)
	j := l.Take()
	res := l.Node.Result(l.t, j, nodetest.Body(j, "secret answer"), nil)
	l.Send(res)
	nodetest.Expect[*wire.Ack](l.Session)
	if r := l.n.answer(ask); r.status != http.StatusOK {
		l.t.Fatalf("answer %d: %s", r.status, r.body)
	}
	l.wait = append(l.wait, receiptlog.Leaf(res.Receipt.Hash()))
	return j.ID.String(), res.Receipt
}

// head makes a heartbeat with the head of the log.
func (l *logged) head() *wire.Heartbeat {
	l.t.Helper()
	h := receiptlog.Head{Node: l.Node.Key.Address(), Network: "testnet", Era: l.era, Size: l.log.Size(), Root: l.log.Root(), Time: 1}
	signed, err := h.Sign(l.Node.Config.Network.ChainID, l.Node.Key)
	if err != nil {
		l.t.Fatal(err)
	}
	b := l.Node.Heartbeat()
	b.Head = signed
	return b
}

// show sends what the log has gained, and waits until the network has it.
func (l *logged) show() {
	l.t.Helper()
	l.Send(&wire.Leaves{From: l.sent, Leaves: l.wait})
	for _, leaf := range l.wait {
		l.log.Append(leaf, nil)
	}
	l.sent, l.wait = l.log.Size(), nil
	l.Send(l.head())
	if a := nodetest.Expect[*wire.LeavesAck](l.Session); a.Size != l.sent {
		l.t.Fatalf("told %+v, want %d receipts", a, l.sent)
	}
}

func (n *testNetwork) proof(id string) reply { return n.get("/v1/receipts/" + id + "/proof") }

// proven checks a proof as a client does.
func (n *testNetwork) proven(id string, signed *receipt.Signed) *receiptlog.Inclusion {
	n.t.Helper()
	r := n.proof(id)
	if r.status != http.StatusOK {
		n.t.Fatalf("proof: %d %s", r.status, r.body)
	}
	i, err := receiptlog.ParseInclusion(r.body)
	if err != nil {
		n.t.Fatal(err)
	}
	stated := signed.Receipt()
	if err := i.Check(stated.Node, signed.ChainID(), signed.Hash()); err != nil {
		n.t.Fatal(err)
	}
	return i
}

// list returns a node as the operator's command shows it.
func (n *testNetwork) list(node evm.Address) (info network.NodeInfo) {
	n.t.Helper()
	code, out := n.run("nodes", "show", node.Hex(), "--json")
	if code != 0 {
		n.t.Fatalf("nodes show: %d %s", code, out)
	}
	if err := json.Unmarshal([]byte(out), &info); err != nil {
		n.t.Fatal(err)
	}
	return info
}

func newLogged(t *testing.T, n *testNetwork) *logged {
	t.Helper()
	l := &logged{t: t, n: n, log: receiptlog.New()}
	l.begin(n.node())
	return l
}

// A receipt is proven to be in its node's log once the node has shown it there, and
// after restarts of both.
func TestReceiptProof(t *testing.T) {
	n := start(t, nil)
	l := newLogged(t, n)
	id, signed := l.job()
	r := n.proof(id)
	if r.status != http.StatusNotFound || r.code() != "receipt_not_proven" || r.header.Get("Retry-After") != "1" {
		t.Errorf("before the head: %d %s, retry after %q", r.status, r.body, r.header.Get("Retry-After"))
	}
	for _, bad := range []string{"x", receipt.NewJobID().String()} {
		if r := n.proof(bad); r.status != http.StatusNotFound || r.code() != "receipt_not_found" || r.header.Get("Retry-After") != "" {
			t.Errorf("of no job: %d %s", r.status, r.body)
		}
	}
	if r := n.do(t.Context(), http.MethodGet, "/v1/receipts/"+id+"/proof", "", "Authorization", "Bearer x"); r.status != http.StatusUnauthorized {
		t.Errorf("without a key: %d", r.status)
	}
	if got := n.metric(`resultity_receipts_unlogged{state="waiting"}`); got != 1 {
		t.Errorf("%v receipts wait for the log", got)
	}
	l.show()
	if i := n.proven(id, signed); i.Index != 0 || i.Head.Size != 1 {
		t.Errorf("receipt %d of %d", i.Index, i.Head.Size)
	}
	if got := n.metric(`resultity_receipts_unlogged{state="waiting"}`); got != 0 {
		t.Errorf("%v receipts wait for the log", got)
	}
	second, signed2 := l.job()
	l.show()
	n.stop()
	n.serve()
	l.Node.URL = n.url
	l.begin(l.Node)
	if i := n.proven(second, signed2); i.Index != 1 || i.Head.Size != 2 {
		t.Errorf("after a restart: receipt %d of %d", i.Index, i.Head.Size)
	}
	l.job()
	l.show()
	l.job() // is not shown
	if i := n.proven(id, signed); i.Head.Size != 3 {
		t.Errorf("under a head of %d", i.Head.Size)
	}
	info := n.list(l.Node.Key.Address())
	if info.Log == nil || info.Log.Size() != 3 || info.Log.Waiting != 1 || info.Log.Overdue != 0 || info.Log.Conflict != nil {
		t.Errorf("listed as %+v", info.Log)
	}
	if code, out := n.run("nodes", "list"); code != 0 || !strings.Contains(out, "RECEIPT LOG") {
		t.Errorf("nodes list: %d %s", code, out)
	}
}

// A node that signs two logs gets no jobs any more, and is told why. Both heads are
// kept.
func TestContradictingLog(t *testing.T) {
	n := start(t, nil)
	l := newLogged(t, n)
	l.job()
	l.show()
	l.log = receiptlog.New()
	l.log.Append(evm.Hash{1}, nil)
	l.Send(l.head())
	until(l, func(s *wire.Status) bool {
		if !strings.Contains(s.Reason, "does not go on") {
			return false
		}
		t.Logf("expected: no jobs, for it does not go on from what was shown; got: routable %t, %s", s.Routable, s.Reason)
		return true
	})
	for range 2 {
		l.begin(l.Node)
		until(l, func(s *wire.Status) bool { return !s.Routable && strings.Contains(s.Reason, "does not go on") })
		c := n.list(l.Node.Key.Address()).Log.Conflict
		if c == nil || c.First.Verify() != nil || c.Second.Verify() != nil || c.First.Root == c.Second.Root || c.First.Size != c.Second.Size {
			t.Fatalf("kept is %+v", c)
		}
		n.stop()
		n.serve()
		l.Node.URL = n.url
	}
	if _, out := n.run("nodes", "list"); !strings.Contains(out, "contradicts itself") {
		t.Error(out)
	}
	if _, out := n.run("nodes", "show", l.Node.Key.Address().Hex()); !strings.Contains(out, "contradicts itself") {
		t.Error(out)
	}
}

// The operator has a log begin anew: the node gets jobs again, old proofs stay and new
// ones say what happened, over a restart too.
func TestLogBeginsAnew(t *testing.T) {
	n := start(t, nil)
	l := newLogged(t, n)
	id, signed := l.job()
	l.show()
	node := l.Node.Key.Address().Hex()
	for what, args := range map[string][]string{
		"without a reason": {node}, "for two lines": {node, "--reason", "a\nb"}, "of nobody": {"x", "--reason", "a"},
	} {
		if code, out := n.run(append([]string{"nodes", "reset-log"}, args...)...); code != 64 {
			t.Errorf("%s: %d %s", what, code, out)
		}
	}
	if code, out := n.run("nodes", "reset-log", node, "--reason", "for fun"); code != 1 || !strings.Contains(out, "nothing is wrong") || !strings.Contains(out, "--force") {
		t.Errorf("a log that is whole: %d %s", code, out)
	}
	l.log = receiptlog.New()
	l.log.Append(evm.Hash{1}, nil)
	l.Send(l.head())
	until(l, func(s *wire.Status) bool { return strings.Contains(s.Reason, "does not go on") })
	n.until("the heads are written down", func() bool { return n.list(l.Node.Key.Address()).Log.Conflict != nil })
	conflict := n.list(l.Node.Key.Address()).Log.Conflict
	code, out := n.run("nodes", "reset-log", node, "--reason", "its disk was replaced")
	if code != 0 || !strings.Contains(out, conflict.First.Signature.String()) || !strings.Contains(out, conflict.Second.Signature.String()) {
		t.Fatalf("reset-log: %d %s", code, out)
	}
	if code := l.Closed(); code != 1013 {
		t.Errorf("the session ended with %d", code)
	}
	if got := n.metric("resultity_receipt_log_resets_total"); got != 1 {
		t.Errorf("%v resets are counted", got)
	}
	l.log, l.sent, l.wait = receiptlog.New(), 0, nil
	again := func() {
		t.Helper()
		l.Session = l.Node.Connect(t)
		a := nodetest.Expect[*wire.LeavesAck](l.Session)
		if a.Size != l.sent || a.Reset == nil {
			t.Fatalf("told %+v", a)
		}
		if by, err := a.Reset.Verify(); err != nil || !slices.Contains(l.Node.Config.Network.MessageKeys, by) || a.Reset.Reason != "its disk was replaced" {
			t.Errorf("the word is %+v by %s, %v", a.Reset, by, err)
		}
		l.era = a.Reset.Era
		l.Send(l.Node.Heartbeat())
	}
	again()
	second, signed2 := l.job()
	l.show()
	n.stop()
	n.serve()
	l.Node.URL = n.url
	again()
	third, signed3 := l.job()
	l.show()
	if i := n.proven(id, signed); i.Head.Era != 0 || i.Reset != nil {
		t.Errorf("the old receipt is proven under %+v", i.Head)
	}
	for id, signed := range map[string]*receipt.Signed{second: signed2, third: signed3} {
		if i := n.proven(id, signed); i.Head.Era != l.era || i.Reset == nil || *i.Reset.Second != conflict.Second {
			t.Errorf("the new receipt is proven under %+v", i)
		}
	}
	if _, out := n.run("nodes", "list"); !strings.Contains(out, "2, reset 1×") {
		t.Error(out)
	}
	if _, out := n.run("nodes", "show", node); !strings.Contains(out, `"its disk was replaced"`) || !strings.Contains(out, conflict.Second.Signature.String()) || strings.Contains(out, "contradicts itself") {
		t.Error(out)
	}
	n.stop()
	if code, out := n.run("nodes", "reset-log", node, "--reason", "a"); code == 0 || !strings.Contains(out, "serve") {
		t.Errorf("without a service: %d %s", code, out)
	}
}

func until(l *logged, ok func(*wire.Status) bool) {
	l.t.Helper()
	for {
		if s := nodetest.Expect[*wire.Status](l.Session); ok(s) {
			return
		}
	}
}

// What no honest node says about its log ends its session.
func TestHostileLog(t *testing.T) {
	n := start(t, nil)
	for what, say := range map[string]func(l *logged){
		"a gap":             func(l *logged) { l.Send(&wire.Leaves{From: 5, Leaves: []evm.Hash{{1}}}) },
		"a head of nothing": func(l *logged) { l.log.Append(evm.Hash{1}, nil); l.Send(l.head()) },
		"too many leaves":   func(l *logged) { l.Send(&wire.Leaves{Leaves: make([]evm.Hash, wire.MaxLeaves+1)}) },
		"a leaf of zeros":   func(l *logged) { l.Send(&wire.Leaves{Leaves: make([]evm.Hash, 1)}) },
		"an edge of a lie":  func(l *logged) { l.Send(&wire.Leaves{From: 3, Leaves: []evm.Hash{{1}}, Edge: []evm.Hash{{2}}}) },
		"another node's head": func(l *logged) {
			other := &logged{Session: &nodetest.Session{Node: n.node()}, t: t, log: receiptlog.New()}
			other.log.Append(evm.Hash{1}, nil)
			l.Send(&wire.Leaves{Leaves: []evm.Hash{{1}}})
			l.Send(other.head())
		},
		"another network's head": func(l *logged) {
			l.Send(&wire.Leaves{Leaves: []evm.Hash{{1}}})
			l.log.Append(evm.Hash{1}, nil)
			b := l.head()
			h := b.Head.Head
			h.Network = "mainnet"
			signed, err := h.Sign(b.Head.ChainID, l.Node.Key)
			if err != nil {
				t.Fatal(err)
			}
			b.Head = signed
			l.Send(b)
		},
	} {
		t.Run(what, func(t *testing.T) {
			l := newLogged(t, n)
			say(l)
			end := l.Ended()
			t.Logf("expected: closed with 1008; got: %v", end)
			if end.Code != 1008 {
				t.Errorf("closed with %v", end)
			}
		})
	}
	if got := n.metric(`resultity_frames_refused_total{reason="receiptlog"}`); got < 5 {
		t.Errorf("%v were counted", got)
	}
}

// An altered leaf in the network's own store is found: before the next session of
// its node, and when a proof is asked for.
func TestAlteredLog(t *testing.T) {
	n := start(t, nil)
	l := newLogged(t, n)
	id, signed := l.job()
	l.show()
	n.stop()
	alter(t, n.dir, l.Node.Key.Address(), func(r *store.ReceiptLog) { r.Open[0][7] ^= 1 })
	n.serve()
	r := n.proof(id)
	t.Logf("expected: 500 log_damaged; got: %d %s", r.status, r.code())
	if r.status != http.StatusInternalServerError || r.code() != "log_damaged" {
		t.Errorf("the proof from an altered log: %d %s", r.status, r.body)
	}
	if got := n.metric("resultity_receipt_log_damaged_total"); got != 1 {
		t.Errorf("%v findings", got)
	}
	l.Node.URL = n.url
	l.sent = 0
	l.begin(l.Node) // which is asked for its log once more
	l.log, l.wait = receiptlog.New(), []evm.Hash{receiptlog.Leaf(signed.Hash())}
	l.show()
	n.proven(id, signed)
}

// Nodes are listed also where what is stored of the log of one of them is lost.
func TestNodesWithALostLog(t *testing.T) {
	n := start(t, nil)
	whole, broken := newLogged(t, n), n.node().Key.Address()
	whole.job()
	whole.show()
	n.stop()
	raw, err := json.Marshal(store.Lost{ID: "x", Found: time.Now(), Subject: "$KV.RECEIPTLOGS." + strings.TrimPrefix(strings.ToLower(broken.Hex()), "0x")})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(n.dir, "store", "damaged", "x.json"), raw, 0o600); err != nil {
		t.Fatal(err)
	}
	code, out := n.run("nodes", "list", "--json")
	var list []network.NodeInfo
	if err := json.Unmarshal([]byte(out), &list); code != 0 || err != nil || len(list) != 2 {
		t.Fatalf("%d, %v: %s", code, err, out)
	}
	for _, i := range list {
		if i.Address == broken && !strings.Contains(i.Log.Damaged, "kept as x") || i.Address != broken && (i.Log.Size() != 1 || i.Log.Damaged != "") {
			t.Errorf("%+v", i.Log)
		}
	}
	if code, out := n.run("nodes", "list"); code != 0 || strings.Count(out, "damaged") != 1 {
		t.Errorf("%d: %s", code, out)
	}
	if code, out := n.run("nodes", "show", broken.Hex()); code != 0 || !strings.Contains(out, "kept as x") {
		t.Errorf("%d: %s", code, out)
	}
}

// alter changes what a stopped network has of a node's log.
func alter(t *testing.T, dir string, node evm.Address, f func(*store.ReceiptLog)) {
	t.Helper()
	s, err := store.Open(t.Context(), filepath.Join(dir, "store"), (&testNetwork{t: t, logs: &logBuffer{t: t}}).log())
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	r, err := s.ReceiptLog(t.Context(), node)
	if err != nil {
		t.Fatal(err)
	}
	f(r)
	if err := s.PutReceiptLog(t.Context(), node, r, nil); err != nil {
		t.Fatal(fmt.Errorf("alter: %w", err))
	}
}
