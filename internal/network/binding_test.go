package network_test

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/resultity/node/internal/binding"
	"github.com/resultity/node/internal/evm"
	"github.com/resultity/node/internal/network"
	"github.com/resultity/node/internal/network/nodetest"
	"github.com/resultity/node/internal/wire"
)

func newKey(t testing.TB) *evm.Key {
	t.Helper()
	k, err := evm.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// binder is a node that talks about its binding.
type binder struct {
	*nodetest.Node
	t testing.TB
}

// ask sends a request and returns the status with the network's words.
func (b *binder) ask(req wire.BindRequest) (int, wire.BindReply, string) {
	b.t.Helper()
	status, reply, text, err := b.Bind(b.t.Context(), req, b.Key)
	if err != nil {
		b.t.Fatal(err)
	}
	return status, reply, text
}

// good is ask for what has to succeed.
func (b *binder) good(req wire.BindRequest) wire.BindReply {
	b.t.Helper()
	status, reply, text := b.ask(req)
	if status != http.StatusOK {
		b.t.Fatalf("%s: %d %s", req.Step, status, text)
	}
	return reply
}

// refused is ask for what has to be refused with a word.
func (b *binder) refused(what string, req wire.BindRequest, status int, says string) {
	b.t.Helper()
	got, reply, text := b.ask(req)
	b.t.Logf("%s: expected: %d %s; got: %d %s", what, status, says, got, text)
	if got != status || !strings.Contains(text, says) {
		b.t.Errorf("%s: %d %q %+v, want %d and %q", what, got, text, reply.Bound, status, says)
	}
}

func (b *binder) nonce() evm.Hash {
	b.t.Helper()
	return b.good(wire.BindRequest{Step: wire.BindBegin}).Nonce
}

// wallet makes the request that an owner and the node agree to.
func (b *binder) wallet(owner *evm.Key, action binding.Action, nonce evm.Hash, change func(*binding.Statement)) wire.BindRequest {
	b.t.Helper()
	now := time.Now()
	st := binding.Statement{
		Network: b.Config.Network.Name, Node: b.Key.Address(), Owner: owner.Address(), Action: action, Nonce: nonce,
		IssuedAt: now.UnixMilli(), ExpiresAt: now.Add(10 * time.Minute).UnixMilli(),
	}
	if change != nil {
		change(&st)
	}
	sig, err := owner.Sign(st.Hash(b.Config.Network.ChainID))
	if err != nil {
		b.t.Fatal(err)
	}
	return wire.BindRequest{Step: wire.BindWallet, Nonce: nonce, Statement: &binding.Signed{Statement: st, Signature: sig}}
}

func openNetwork(c *network.Config) { c.Registration = "open" }

// unbound makes a node that is registered without a token.
func (n *testNetwork) unbound() *binder {
	n.t.Helper()
	v := nodetest.New(n.t, n.url, n.raw)
	v.Enrol(n.t, "")
	return &binder{v, n.t}
}

func startOpen(t testing.TB, tweak func(*network.Config)) *testNetwork {
	t.Helper()
	n := setUp(t, nil)
	n.tweak = func(c *network.Config) {
		openNetwork(c)
		if tweak != nil {
			tweak(c)
		}
	}
	n.serve()
	return n
}

// A node without an account is known, told so, and gets no jobs; bound it gets
// them, unbound it does not, and all of that outlives a restart.
func TestBindByWallet(t *testing.T) {
	n := startOpen(t, nil)
	v, owner := n.unbound(), newKey(t)
	s := v.Connect(t)
	if b := nodetest.Expect[*wire.Bound](s); *b != (wire.Bound{}) {
		t.Fatalf("bound to %+v", b)
	}
	s.Send(v.Heartbeat())
	if st := nodetest.Expect[*wire.Status](s); st.Routable || !strings.Contains(st.Reason, "resultityctl bind") {
		t.Fatalf("%+v", st)
	}
	req := v.wallet(owner, binding.Bind, v.nonce(), nil)
	reply := v.good(req)
	if reply.Bound.Account != owner.Address().Hex() || reply.Bound.Method != wire.MethodWallet || time.Since(time.UnixMilli(reply.Bound.Since)) > time.Minute {
		t.Fatalf("%+v", reply)
	}
	if b := nodetest.Expect[*wire.Bound](s); *b != reply.Bound {
		t.Errorf("told %+v, want %+v", b, reply.Bound)
	}
	s.Send(v.Heartbeat())
	for !nodetest.Expect[*wire.Status](s).Routable {
	}
	if again := v.good(req); again.Bound != reply.Bound { // its first answer was lost
		t.Errorf("again: %+v", again)
	}
	n.stop()
	n.serve()
	v.URL = n.url
	s = v.Ready(t)
	if again := v.good(req); again.Bound != reply.Bound {
		t.Errorf("after a restart: %+v", again)
	}
	_, reg, err := v.Register(t.Context(), v.Registration(""), v.Key)
	if err != nil || reg.Account != reply.Bound.Account || reg.Method != wire.MethodWallet || reg.Since != reply.Bound.Since {
		t.Errorf("%+v %v", reg, err)
	}
	if got := v.good(wire.BindRequest{Step: wire.BindUnbind, Nonce: v.nonce()}); got.Bound.Account != "" {
		t.Errorf("%+v", got)
	}
	if st := nodetest.Expect[*wire.Status](s); st.Routable || !strings.Contains(st.Reason, "no account") {
		t.Errorf("%+v", st)
	}
	v.refused("the old signature", req, http.StatusBadRequest, "nonce")
	other := newKey(t)
	if got := v.good(v.wallet(other, binding.Bind, v.nonce(), nil)); got.Bound.Account != other.Address().Hex() {
		t.Errorf("%+v", got)
	}
}

func TestBindingRefusals(t *testing.T) {
	n := startOpen(t, nil)
	v, owner, stranger := n.unbound(), newKey(t), newKey(t)
	nonce := v.nonce()
	forged := v.wallet(owner, binding.Bind, nonce, nil)
	forged.Statement.Statement.Owner = stranger.Address()
	other := n.unbound()
	others := other.wallet(owner, binding.Bind, other.nonce(), nil)
	chain, err := owner.Sign(forged.Statement.Statement.Hash(1))
	if err != nil {
		t.Fatal(err)
	}
	foreign := v.wallet(owner, binding.Bind, nonce, nil)
	foreign.Statement.Signature = chain
	elsewhere := v.wallet(owner, binding.Bind, nonce, func(s *binding.Statement) { s.Nonce = evm.Hash{1} })
	for _, c := range []struct {
		name   string
		req    wire.BindRequest
		status int
		says   string
	}{
		{"wrong wallet", forged, 403, "is that of"},
		{"other chain", foreign, 403, "is that of"},
		{"other network", v.wallet(owner, binding.Bind, nonce, func(s *binding.Statement) { s.Network = "mainnet" }), 403, "mainnet"},
		{"another node's", wire.BindRequest{Step: wire.BindWallet, Nonce: nonce, Statement: others.Statement}, 403, "about node"},
		{"another node's nonce", v.wallet(owner, binding.Bind, others.Nonce, nil), 400, "nonce"},
		{"another nonce in the statement", elsewhere, 403, "nonce"},
		{"expired", v.wallet(owner, binding.Bind, nonce, func(s *binding.Statement) { s.ExpiresAt = s.IssuedAt - 1 }), 403, "expired"},
		{"no nonce", v.wallet(owner, binding.Bind, evm.Hash{}, nil), 400, "nonce"},
		{"no statement", wire.BindRequest{Step: wire.BindWallet, Nonce: nonce}, 400, "statement"},
		{"unknown action", v.wallet(owner, "sell", nonce, nil), 400, "action"},
		{"unknown step", wire.BindRequest{Step: "x", Nonce: nonce}, 400, "step"},
		{"unbinding what is not bound", wire.BindRequest{Step: wire.BindUnbind, Nonce: nonce}, 409, "no account"},
		{"unknown token", wire.BindRequest{Step: wire.BindToken, Nonce: nonce, Token: "rt-x"}, 403, "token"},
		{"no mail server", wire.BindRequest{Step: wire.BindEmail, Nonce: nonce, Email: "a@b"}, 403, "no mail"},
		{"code of nobody", wire.BindRequest{Step: wire.BindCode, Code: "12345678"}, 403, "no code"},
		{"oversized address", wire.BindRequest{Step: wire.BindEmail, Nonce: nonce, Email: strings.Repeat("a", 300)}, 400, "too long"},
		{"oversized token", wire.BindRequest{Step: wire.BindToken, Nonce: nonce, Token: strings.Repeat("a", 300)}, 400, "too long"},
		{"clock", wire.BindRequest{Step: wire.BindBegin, Time: 1}, 400, "timedatectl"},
		{"request for another network", wire.BindRequest{Step: wire.BindBegin, Network: "mainnet"}, 409, "mainnet"},
		{"request of another node", wire.BindRequest{Step: wire.BindBegin, Node: other.Key.Address()}, 401, "signed by"},
	} {
		v.refused(c.name, c.req, c.status, c.says)
	}
	unknown := &binder{nodetest.New(t, n.url, n.raw), t}
	unknown.refused("not registered", wire.BindRequest{Step: wire.BindBegin}, 403, "not registered")

	// None of that used the nonce up.
	v.good(v.wallet(owner, binding.Bind, nonce, nil))
	v.refused("bound to another", v.wallet(stranger, binding.Bind, v.nonce(), nil), 409, "resultityctl unbind")
	v.refused("bound already", v.wallet(owner, binding.Bind, v.nonce(), nil), 409, "already")
	v.refused("unbind by a stranger", v.wallet(stranger, binding.Unbind, v.nonce(), nil), 403, "is not the account")
	replaced := v.nonce()
	v.nonce()
	v.refused("a nonce that another one has replaced", wire.BindRequest{Step: wire.BindUnbind, Nonce: replaced}, 400, "nonce")
	v.good(v.wallet(owner, binding.Unbind, v.nonce(), nil))

	// A registration cannot be shown as a request, nor anything else.
	body, err := wire.SealRegistration(v.Key, &wire.BindRequest{Network: "testnet", Node: v.Key.Address(), Time: time.Now().UnixMilli(), Step: wire.BindBegin})
	if err != nil {
		t.Fatal(err)
	}
	for name, raw := range map[string]string{"registration": string(body), "empty": "", "garbage": strings.Repeat("x", 200), "huge": strings.Repeat("x", 1<<20)} {
		r := n.do(t.Context(), "POST", wire.BindPath, raw)
		t.Logf("%s: expected: 400 or 401; got: %d %s", name, r.status, strings.TrimSpace(string(r.body)))
		if r.err != nil || r.status < 400 || r.status > 401 {
			t.Errorf("%s: %d %v", name, r.status, r.err)
		}
	}
	for range 100 {
		if status, _, _ := v.ask(wire.BindRequest{Step: wire.BindBegin}); status == http.StatusTooManyRequests {
			t.Logf("100 requests of a node: expected: %d; got: %d", http.StatusTooManyRequests, status)
			return
		}
	}
	t.Error("nothing bounds the requests of a node")
}

// One account has many nodes; what its operator undoes, the same token does not
// bring back; the history says who did what.
func TestBindByToken(t *testing.T) {
	n := startOpen(t, nil)
	admin := n.admin()
	token, err := admin.CreateToken(t.Context(), 2, "fleet", time.Now().Add(time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	var fleet []*binder
	for range 3 {
		v := n.unbound()
		req := wire.BindRequest{Step: wire.BindToken, Token: token, Nonce: v.nonce()}
		if fleet = append(fleet, v); len(fleet) == 3 {
			v.refused("a use too many", req, 403, "used up")
			continue
		}
		if got := v.good(req); got.Bound.Account != "fleet" || got.Bound.Method != wire.MethodToken {
			t.Fatalf("%+v", got)
		}
		if again := v.good(req); again.Bound.Account != "fleet" {
			t.Errorf("again: %+v", again)
		}
	}
	list, err := admin.Accounts(t.Context())
	i := slices.IndexFunc(list, func(a network.Account) bool { return a.ID == "fleet" })
	if err != nil || i < 0 || len(list[i].Nodes) != 2 {
		t.Fatalf("%+v %v", list, err)
	}
	v := fleet[0]
	s := v.Ready(t)
	if err := admin.Unbind(t.Context(), v.Key.Address()); err != nil {
		t.Fatal(err)
	}
	if b := nodetest.Expect[*wire.Bound](s); b.Account != "" {
		t.Errorf("told %+v", b)
	}
	v.refused("the same token again", wire.BindRequest{Step: wire.BindToken, Token: token, Nonce: v.nonce()}, 403, "token")
	if err := admin.Unbind(t.Context(), v.Key.Address()); err == nil {
		t.Error("unbound twice")
	}
	info, err := admin.Node(t.Context(), v.Key.Address())
	if err != nil || info.Account != "" || len(info.History) != 2 || info.History[1].By != "operator" || info.History[1].Account != "fleet" {
		t.Errorf("%+v %v", info, err)
	}
	if nodes, err := admin.Nodes(t.Context()); err != nil || len(nodes) != 3 {
		t.Errorf("%d nodes, %v", len(nodes), err)
	}
}

// mailServer takes mail and shows it.
type mailServer struct {
	addr  string
	got   chan string
	codes []string // that were in messages
	mu    sync.Mutex
	hold  string // the answer to RCPT, if not empty
}

func startMail(t testing.TB) *mailServer {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	m := &mailServer{addr: l.Addr().String(), got: make(chan string, 100)}
	var wg sync.WaitGroup
	t.Cleanup(func() { l.Close(); wg.Wait() })
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() { m.serve(c) })
		}
	})
	return m
}

func (m *mailServer) answer(text string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.hold = text
}

func (m *mailServer) serve(c net.Conn) {
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(nodetest.Patience))
	r := bufio.NewReader(c)
	fmt.Fprint(c, "220 test\r\n")
	for {
		line, err := r.ReadString('\n')
		if err != nil {
			return
		}
		m.mu.Lock()
		hold := m.hold
		m.mu.Unlock()
		switch verb := strings.ToUpper(line[:min(4, len(line))]); {
		case verb == "RCPT" && hold != "":
			fmt.Fprint(c, hold+"\r\n")
		case verb == "DATA":
			fmt.Fprint(c, "354 go on\r\n")
			var b strings.Builder
			for line != ".\r\n" {
				if line, err = r.ReadString('\n'); err != nil {
					return
				}
				b.WriteString(line)
			}
			fmt.Fprint(c, "250 ok\r\n")
			m.got <- b.String()
		case verb == "QUIT":
			return
		default:
			fmt.Fprint(c, "250 ok\r\n")
		}
	}
}

var digits = regexp.MustCompile(`(?m)^([0-9]{8})\r$`)

// code waits for a message and returns the code in it. A message may come once more
// after a restart, with the same code.
func (m *mailServer) code(t testing.TB) string {
	t.Helper()
	for {
		select {
		case text := <-m.got:
			c := digits.FindStringSubmatch(text)
			if c == nil {
				t.Fatalf("no code in\n%s", text)
			}
			if !slices.Contains(m.codes, c[1]) {
				m.codes = append(m.codes, c[1])
				return c[1]
			}
		case <-time.After(nodetest.Patience):
			t.Fatal("no mail")
		}
	}
}

func (m *mailServer) use(c *network.Config) {
	openNetwork(c)
	c.SMTP, c.SMTPSecurity, c.SMTPFrom = m.addr, "none", "Network <codes@example.org>"
}

func (b *binder) email(address string) wire.BindRequest {
	b.t.Helper()
	return wire.BindRequest{Step: wire.BindEmail, Email: address, Nonce: b.nonce()}
}

func TestBindByEmail(t *testing.T) {
	m := startMail(t)
	n := startOpen(t, m.use)
	const address = "ann.secret@example.org"
	v := n.unbound()
	before := time.Now()
	reply := v.good(v.email(address))
	if life := time.UnixMilli(reply.Expires).Sub(before); reply.Bound.Account != "" || life < 9*time.Minute || life > 11*time.Minute {
		t.Fatalf("%+v", reply)
	}
	code := m.code(t)
	wrong := wire.BindRequest{Step: wire.BindCode, Code: "00000000"}
	if code == wrong.Code {
		wrong.Code = "11111111"
	}
	v.refused("wrong", wrong, 403, "4 tries")
	n.stop() // tries outlive a restart, and so does the code
	n.serve()
	v.URL = n.url
	v.refused("wrong again", wrong, 403, "3 tries")
	got := v.good(wire.BindRequest{Step: wire.BindCode, Code: " " + code + "\n"})
	if got.Bound.Method != wire.MethodEmail || !strings.HasPrefix(got.Bound.Account, "email-") || strings.Contains(got.Bound.Account, "ann") {
		t.Fatalf("%+v", got)
	}
	if again := v.good(wire.BindRequest{Step: wire.BindCode, Code: code}); again.Bound != got.Bound {
		t.Errorf("again: %+v", again)
	}
	v.refused("bound already", v.email(address), 409, "resultityctl unbind")
	v.good(wire.BindRequest{Step: wire.BindUnbind, Nonce: v.nonce()})
	v.refused("a used code", wire.BindRequest{Step: wire.BindCode, Code: code}, 403, "was used")

	// The same owner's second node comes to the same account, however it is spelt.
	w := n.unbound()
	w.good(w.email("Ann.Secret@Example.ORG"))
	second := m.code(t)
	v.refused("another node's code", wire.BindRequest{Step: wire.BindCode, Code: second}, 403, "no code")
	if same := w.good(wire.BindRequest{Step: wire.BindCode, Code: second}); same.Bound.Account != got.Bound.Account {
		t.Errorf("%+v, want account %s", same, got.Bound.Account)
	}
	v.good(v.email(address))
	third := m.code(t)
	for range 5 {
		v.refused("a guess", wrong, 403, "wrong code")
	}
	v.refused("the right one, too late", wire.BindRequest{Step: wire.BindCode, Code: third}, 403, "too often")
	n.stop()
	if strings.Contains(strings.ToLower(n.logs.w.String()), "ann.secret") || strings.Contains(n.logs.w.String(), code) {
		t.Error("an address or a code is in the log")
	}
}

// The answer says nothing about an address, and nobody can be flooded.
func TestEmailLimits(t *testing.T) {
	m := startMail(t)
	n := startOpen(t, m.use)
	for name, address := range map[string]string{
		"two lines": "a@b.org\r\nBcc: c@d.org", "header": "a@b.org\nX: y", "name": "Ann <a@b.org>", "list": "a@b.org, c@d.org", "none": "",
		"quoted": `"a b"@c.org`, "nul": "a\x00@b.org", "literal": "a@[127.0.0.1]", "long": strings.Repeat("a", 65) + "@b.org", "option": "a@-b.org",
	} {
		v := n.unbound()
		v.refused(name, v.email(address), 400, "address")
	}
	v := n.unbound()
	for range 5 {
		v.good(v.email("ann@example.org"))
		m.code(t)
	}
	v.refused("too many for the node", v.email("bob@example.org"), 429, "too many")
	// The address has had enough; the answer is what it always is.
	w := n.unbound()
	a, b := w.good(w.email("ANN@example.org")), w.good(w.email("carl@example.org"))
	if a.Bound != b.Bound || a.Nonce != b.Nonce || b.Expires-a.Expires > 60_000 {
		t.Errorf("%+v and %+v", a, b)
	}
	m.code(t) // carl's, and no other
	select {
	case text := <-m.got:
		t.Errorf("mail to an address that had enough:\n%s", text)
	default:
	}
	for range 20 {
		x := n.unbound()
		if status, _, _ := x.ask(x.email("x@example.org")); status == http.StatusTooManyRequests {
			return
		}
	}
	t.Error("nothing bounds the codes that one source asks for")
}

// A mail server that is down, or makes strangers wait, delays a code; a restart
// in between does not lose it.
func TestMailIsKept(t *testing.T) {
	m := startMail(t)
	m.answer("451 4.7.1 <dora@example.org>: greylisted, come back later")
	n := startOpen(t, m.use)
	v := n.unbound()
	v.good(v.email("dora@example.org"))
	n.until("the server has refused", func() bool { return n.metric(`resultity_mail_tries_total{outcome="failed"}`) > 0 })
	n.stop()
	m.answer("")
	n.serve()
	v.URL = n.url
	if got := v.good(wire.BindRequest{Step: wire.BindCode, Code: m.code(t)}); got.Bound.Account == "" {
		t.Errorf("%+v", got)
	}
	n.until("it is counted", func() bool { return n.metric(`resultity_mail_tries_total{outcome="sent"}`) == 1 })
	m.answer("550 5.1.1 <nobody@example.org>: user unknown")
	v = n.unbound()
	v.good(v.email("nobody@example.org"))
	n.until("it is given up", func() bool { return n.metric(`resultity_mail_tries_total{outcome="rejected"}`) == 1 })
	n.stop()
	if log := n.logs.w.String(); strings.Contains(log, "dora") || strings.Contains(log, "nobody@") || !strings.Contains(log, "greylisted") {
		t.Errorf("the log tells an address, or not why:\n%s", log)
	}
}

// Nobody fills the registry with nodes that belong to nobody; those that are known
// are answered all the same.
func TestOpenRegistrationIsBounded(t *testing.T) {
	n := startOpen(t, nil)
	first := n.unbound()
	for i := 1; ; i++ {
		v := nodetest.New(t, n.url, n.raw)
		status, _, err := v.Register(t.Context(), v.Registration(""), v.Key)
		if err != nil || i > 1000 {
			t.Fatalf("node %d: %d %v", i, status, err)
		}
		if status == http.StatusTooManyRequests {
			t.Logf("expected: %d after at most 1000 nodes; got: %d after %d", http.StatusTooManyRequests, status, i)
			break
		}
	}
	first.Enrol(t, "")
	n.node() // with a token
}

// Registration with a token is what a network asks for unless it says otherwise.
func TestClosedRegistration(t *testing.T) {
	n := start(t, nil)
	v := nodetest.New(t, n.url, n.raw)
	if status, _, err := v.Register(context.Background(), v.Registration(""), v.Key); err != nil || status != http.StatusForbidden {
		t.Errorf("%d %v", status, err)
	}
}
