package network_test

import (
	"bytes"
	"context"
	"encoding/json"
	"strings"
	"testing"
	"time"

	"github.com/gorilla/websocket"

	"github.com/resultity/node/internal/evm"
	"github.com/resultity/node/internal/network"
	"github.com/resultity/node/internal/network/cli"
	"github.com/resultity/node/internal/network/nodetest"
	"github.com/resultity/node/internal/network/orders"
	"github.com/resultity/node/internal/wire"
)

// run runs the program's command line and returns its exit status and what it
// printed.
func (n *testNetwork) run(args ...string) (int, string) {
	n.t.Helper()
	ctx, cancel := context.WithTimeout(n.t.Context(), nodetest.Patience)
	defer cancel()
	var out bytes.Buffer
	code := cli.Main(ctx, append(args, "--dir", n.dir), &out, &out, "test")
	return code, out.String()
}

func (n *testNetwork) orders(args ...string) (list []network.OrderState) {
	n.t.Helper()
	code, out := n.run(append([]string{"orders", "--json"}, args...)...)
	if err := json.Unmarshal([]byte(out), &list); code != 0 || err != nil {
		n.t.Fatalf("%d %v: %s", code, err, out)
	}
	return list
}

// take waits for an order and checks that it is one.
func take(s *nodetest.Session) *wire.Directive {
	o := nodetest.Expect[*wire.Order](s)
	d, who, err := o.Open()
	if err != nil || who != s.Node.Config.Network.MessageKeys[0] || d.Node != s.Node.Key.Address() || d.Network != "testnet" {
		s.Fatalf("%+v by %s, %v", d, who, err)
	}
	return d
}

func TestOrders(t *testing.T) {
	n := start(t, nil)
	v := n.node()
	address := v.Key.Address().Hex()
	other := n.node().Ready(t)

	// It is given to a node that is away when that comes, over a restart of the
	// network, until it is answered.
	if code, out := n.run("order", address, "drain", "--reason", "maintenance"); code != 0 {
		t.Fatalf("%d: %s", code, out)
	}
	if code, out := n.run("order", address, "resume"); code != 0 {
		t.Fatalf("%d: %s", code, out)
	}
	s := v.Connect(t)
	first := take(s)
	if second := take(s); first.Kind != wire.OrderDrain || first.Reason != "maintenance" || second.Kind != wire.OrderResume || second.Issued <= first.Issued {
		t.Fatalf("%+v before %+v", first, second)
	}
	s.Drop()
	n.stop()
	n.serve()
	v.URL, other.Node.URL = n.url, n.url
	s = v.Connect(t)
	if again := take(s); again.ID != first.ID {
		t.Fatalf("%+v, want %+v", again, first)
	}
	second := take(s)
	for range 2 { // the second time as if the acknowledgement was lost
		s.Send(&wire.OrderDone{ID: first.ID, Outcome: wire.OutcomeOK})
		if a := nodetest.Expect[*wire.OrderAck](s); a.ID != first.ID {
			t.Fatalf("%+v", a)
		}
	}
	// An answer of somebody else changes nothing.
	o := other.Node.Connect(t)
	o.Send(&wire.OrderDone{ID: second.ID, Outcome: wire.OutcomeOK})
	nodetest.Expect[*wire.OrderAck](o)
	list := n.orders("--node", address)
	if len(list) != 2 || list[0].State != "ok" || list[1].State != "pending" || list[0].Answered.IsZero() {
		t.Fatalf("%+v", list)
	}
	// What is kept proves who ordered what.
	if d, who, err := list[0].Order.Open(); err != nil || who != n.key || d.ID != first.ID || d.Reason != "maintenance" {
		t.Errorf("%+v by %s, %v", d, who, err)
	}
	s.Drop()
	s = v.Connect(t)
	if again := take(s); again.ID != second.ID {
		t.Errorf("%+v; the first one is answered", again)
	}
}

func TestOrderWait(t *testing.T) {
	n := start(t, nil)
	a, b := n.node().Ready(t), n.node().Ready(t)
	type result struct {
		code int
		out  string
	}
	done := make(chan result, 1)
	order := func(args ...string) {
		go func() {
			code, out := n.run(append([]string{"order"}, args...)...)
			done <- result{code, out}
		}()
	}
	order("all", "penalty", "--reason", "late", "--for", "1h", "--wait")
	for _, s := range []*nodetest.Session{a, b} {
		d := take(s)
		if until := time.Until(time.UnixMilli(d.Until)); until < 59*time.Minute || until > time.Hour {
			t.Errorf("until %v", until)
		}
		s.Send(&wire.OrderDone{ID: d.ID, Outcome: wire.OutcomeOK})
	}
	if r := wait(t, done); r.code != 0 || strings.Count(r.out, "ok") != 2 {
		t.Errorf("%d: %s", r.code, r.out)
	}
	order(a.Node.Key.Address().Hex(), "restart", "--wait")
	a.Send(&wire.OrderDone{ID: takeNext(a), Outcome: wire.OutcomeFailed, Message: "it is broken"})
	if r := wait(t, done); r.code != 1 || !strings.Contains(r.out, "it is broken") {
		t.Errorf("%d: %s", r.code, r.out)
	}
	order(a.Node.Key.Address().Hex(), "drain", "--wait", "--expires", "1s")
	takeNext(a)
	if r := wait(t, done); r.code != 1 || !strings.Contains(r.out, "expired") {
		t.Errorf("%d: %s", r.code, r.out)
	}
}

// takeNext skips acknowledgements and returns the next order's id.
func takeNext(s *nodetest.Session) wire.OrderID {
	nodetest.Expect[*wire.OrderAck](s)
	return take(s).ID
}

func TestOrdersAreChecked(t *testing.T) {
	n := start(t, nil)
	v := n.node()
	address := v.Key.Address().Hex()
	stranger, err := evm.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		code int
		want string
		args []string
	}{
		{64, "no order is of kind", []string{address, "dance"}},
		{64, "address", []string{"0x12", "drain"}},
		{64, "accepts 2 arg", []string{address}},
		{64, "reason", []string{address, "penalty", "--for", "1h"}},
		{64, "end", []string{address, "penalty", "--reason", "x"}},
		{64, "no end", []string{address, "drain", "--for", "1h"}},
		{64, "expires", []string{address, "drain", "--expires", "200h"}},
		{64, "reason", []string{address, "drain", "--reason", strings.Repeat("x", 301)}},
		{1, "not registered", []string{stranger.Address().Hex(), "drain"}},
	} {
		if code, out := n.run(append([]string{"order"}, c.args...)...); code != c.code || !strings.Contains(out, c.want) {
			t.Errorf("%v: %d %s, want %d and %q", c.args, code, out, c.code, c.want)
		}
	}
	admin := n.admin()
	who := v.Key.Address()
	what := orders.What{Kind: wire.OrderDrain, Life: time.Hour}
	for range 64 {
		if _, err := admin.IssueOrders(t.Context(), &who, what); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := admin.IssueOrders(t.Context(), &who, what); err == nil || !strings.Contains(err.Error(), "64 orders") {
		t.Errorf("one too many: %v", err)
	}
	s := v.Connect(t)
	d := take(s)
	s.Send(&wire.OrderDone{ID: d.ID, Outcome: "perhaps"})
	for {
		if _, err := s.Receive(); websocket.IsCloseError(err, websocket.ClosePolicyViolation) {
			break
		} else if err != nil {
			t.Fatalf("an outcome that does not exist: %v", err)
		}
	}
	n.stop()
	if code, out := n.run("order", address, "drain"); code != 78 || !strings.Contains(out, "running service") {
		t.Errorf("without a service: %d %s", code, out)
	}
	if list := n.orders(); len(list) != 64 {
		t.Errorf("%d orders without a service", len(list))
	}
}
