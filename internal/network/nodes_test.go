package network_test

import (
	"bytes"
	"encoding/json"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/gorilla/websocket"

	"github.com/resultity/node/internal/determinism"
	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/evm"
	"github.com/resultity/node/internal/network"
	"github.com/resultity/node/internal/network/classes"
	"github.com/resultity/node/internal/network/nodetest"
	"github.com/resultity/node/internal/receipt"
	"github.com/resultity/node/internal/wire"
)

// The operator sees the class that a node says its runtime is in, while it is
// connected.
func TestClassIsListed(t *testing.T) {
	n := start(t, nil)
	v := n.node()
	s := v.Connect(t)
	b := v.Heartbeat()
	b.Class = &wire.Class{Digest: digest.Of([]byte("class")), Hardware: determinism.Hardware{Arch: "amd64", GPUs: []string{"NVIDIA L4"}, Driver: "nvidia 550.54.14"}}
	s.Send(b)
	nodetest.Expect[*wire.Status](s)
	admin := n.admin()
	one, err := admin.Node(t.Context(), v.Key.Address())
	if err != nil || !one.Connected || one.Class == nil || one.Class.Digest != b.Class.Digest || one.Class.Hardware.String() != b.Class.Hardware.String() {
		t.Errorf("%+v, %v", one, err)
	}
	s.Drop()
	n.until("the node is gone", func() bool {
		all, err := admin.Nodes(t.Context())
		return err == nil && len(all) == 1 && !all[0].Connected && all[0].Class == nil
	})
}

// Of three nodes of a class, the one that gives other golden answers is pointed
// out, and gets jobs all the same.
func TestOddNodeIsPointedOut(t *testing.T) {
	n := setUp(t, nil)
	said := make(chan string, 16)
	n.logs.on = func(line []byte) {
		if bytes.Contains(line, []byte("other golden answers than most")) {
			said <- string(line)
		}
	}
	n.serve()
	admin := n.admin()
	say := func(s *nodetest.Session, answers string) {
		b := s.Node.Heartbeat()
		b.Class = &wire.Class{Digest: digest.Of([]byte("class")), Hardware: determinism.Hardware{Arch: "amd64", GPUs: []string{"NVIDIA L4"}, Driver: "nvidia 550.54.14"}, Fingerprint: digest.Of([]byte(answers))}
		s.Send(b)
	}
	var sessions []*nodetest.Session
	for _, answers := range []string{"wrong", "right", "right"} {
		s := n.node().Ready(t)
		say(s, answers)
		sessions = append(sessions, s)
	}
	verdicts := func() (list []classes.Verdict) {
		for _, s := range sessions {
			i, err := admin.Node(t.Context(), s.Node.Key.Address())
			if err != nil {
				t.Fatal(err)
			}
			list = append(list, i.Answers)
		}
		return list
	}
	n.until("the odd one is pointed out", func() bool {
		return slices.Equal(verdicts(), []classes.Verdict{classes.Odd, classes.Same, classes.Same})
	})
	n.until("it is in the metrics", func() bool {
		return n.metric(`resultity_nodes{state="odd"}`) == 1 && n.metric(`resultity_nodes{state="routable"}`) == 3
	})
	if line := <-said; !strings.Contains(strings.ToLower(line), strings.ToLower(sessions[0].Node.Key.Address().Hex())) || len(said) != 0 {
		t.Errorf("the log says %s, and %d times more", line, len(said))
	}
	say(sessions[0], "right")
	n.until("nobody is", func() bool { return !slices.Contains(verdicts(), classes.Odd) })
}

func TestRegistration(t *testing.T) {
	n := start(t, nil)
	token := n.file("enrolment-token")
	other, err := evm.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct {
		change func(*nodetest.Node, *wire.Registration) *evm.Key
		status int
	}{
		"good":          {nil, http.StatusOK},
		"wrong signer":  {func(_ *nodetest.Node, _ *wire.Registration) *evm.Key { return other }, http.StatusUnauthorized},
		"other network": {func(v *nodetest.Node, r *wire.Registration) *evm.Key { r.Network = "x"; return v.Key }, http.StatusConflict},
		"old":           {func(v *nodetest.Node, r *wire.Registration) *evm.Key { r.Time -= 600_000; return v.Key }, http.StatusBadRequest},
		"early":         {func(v *nodetest.Node, r *wire.Registration) *evm.Key { r.Time += 600_000; return v.Key }, http.StatusBadRequest},
		"unknown token": {func(v *nodetest.Node, r *wire.Registration) *evm.Key { r.Token += "x"; return v.Key }, http.StatusForbidden},
		"no token":      {func(v *nodetest.Node, r *wire.Registration) *evm.Key { r.Token = ""; return v.Key }, http.StatusForbidden},
		"long token": {func(v *nodetest.Node, r *wire.Registration) *evm.Key {
			r.Token = string(make([]byte, 300))
			return v.Key
		}, http.StatusBadRequest},
		"the other node": {func(v *nodetest.Node, r *wire.Registration) *evm.Key { r.Node = other.Address(); return v.Key }, http.StatusUnauthorized},
	} {
		t.Run(name, func(t *testing.T) {
			v := nodetest.New(t, n.url, n.raw)
			reg, key := v.Registration(token), v.Key
			if tc.change != nil {
				key = tc.change(v, &reg)
			}
			status, reply, err := v.Register(t.Context(), reg, key)
			t.Logf("expected: status %d; got: %d", tc.status, status)
			if err != nil || status != tc.status {
				t.Fatalf("status %d, want %d; %v", status, tc.status, err)
			}
			if status == http.StatusOK && (reply.Node != v.Key.Address() || reply.Network != "testnet" || reply.Account != "operator") {
				t.Fatalf("reply %+v", reply)
			}
		})
	}
	v := nodetest.New(t, n.url, n.raw)
	for name, body := range map[string][]byte{"empty": nil, "short": make([]byte, 65), "garbage": bytes.Repeat([]byte("x"), 200), "huge": make([]byte, 1<<20)} {
		if status, err := v.RegisterRaw(t.Context(), body); err != nil || status < 400 || status > 401 {
			t.Errorf("%s: status %d, %v", name, status, err)
		}
	}
}

func TestRegistrationIsIdempotent(t *testing.T) {
	n := start(t, nil)
	v := n.node()
	_, first, err := v.Register(t.Context(), v.Registration("whatever"), v.Key)
	if err != nil {
		t.Fatal(err)
	}
	n.stop()
	n.serve()
	v.URL = n.url
	status, again, err := v.Register(t.Context(), v.Registration(""), v.Key)
	if err != nil || status != http.StatusOK || again != first {
		t.Fatalf("status %d, %+v, want %+v; %v", status, again, first, err)
	}
}

// Of many nodes that register at once with a token for two, two do.
func TestTokenRace(t *testing.T) {
	n := start(t, nil)
	admin := n.admin()
	token, err := admin.CreateToken(t.Context(), 2, "fleet", time.Now().Add(time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	status := make([]int, 12)
	for i := range status {
		v := nodetest.New(t, n.url, n.raw)
		wg.Go(func() { status[i], _, _ = v.Register(t.Context(), v.Registration(token), v.Key) })
	}
	wg.Wait()
	count := map[int]int{}
	for _, s := range status {
		count[s]++
	}
	t.Logf("12 at once with a token for 2: expected: 2 times 200, 10 times 403; got: %v", count)
	if count[http.StatusOK] != 2 || count[http.StatusForbidden] != 10 {
		t.Fatalf("statuses %v", count)
	}
	expired, err := admin.CreateToken(t.Context(), 2, "fleet", time.Now().Add(2*time.Second))
	if err != nil {
		t.Fatal(err)
	}
	n.until("the token expires", func() bool {
		v := nodetest.New(t, n.url, n.raw)
		s, _, _ := v.Register(t.Context(), v.Registration(expired), v.Key)
		return s == http.StatusForbidden
	})
}

func TestSessionRefused(t *testing.T) {
	n := start(t, nil)
	v := n.node()
	stranger := nodetest.New(t, n.url, n.raw)
	own := wire.NewSecret()
	for name, tc := range map[string]struct {
		node   *nodetest.Node
		change func(http.Header)
		status int
	}{
		"not registered":     {stranger, func(http.Header) {}, http.StatusForbidden},
		"other network":      {v, func(h http.Header) { h.Set(wire.HeaderNetwork, "mainnet") }, http.StatusConflict},
		"no network":         {v, func(h http.Header) { h.Del(wire.HeaderNetwork) }, http.StatusConflict},
		"bad address":        {v, func(h http.Header) { h.Set(wire.HeaderNode, "0x12") }, http.StatusBadRequest},
		"bad key":            {v, func(h http.Header) { h.Set(wire.HeaderKey, "12") }, http.StatusBadRequest},
		"a key of low order": {v, func(h http.Header) { h.Set(wire.HeaderKey, wire.PublicKey{1}.String()) }, http.StatusBadRequest},
		"a browser":          {v, func(h http.Header) { h.Set("Origin", n.url) }, http.StatusForbidden},
	} {
		h := tc.node.Headers(own)
		tc.change(h)
		_, status, err := tc.node.Dial(t, h, own)
		t.Logf("%s: expected: %d; got: %d, %v", name, tc.status, status, err)
		if err == nil || status != tc.status {
			t.Errorf("%s: status %d, want %d; %v", name, status, tc.status, err)
		}
	}
	d := websocket.Dialer{Subprotocols: []string{"other"}}
	_, res, err := d.Dial("ws"+n.url[4:]+wire.SessionPath, v.Headers(own))
	if res == nil {
		t.Fatal(err)
	}
	t.Logf("other subprotocol: expected: %d; got: %d, %v", http.StatusBadRequest, res.StatusCode, err)
	if err == nil || res.StatusCode != http.StatusBadRequest {
		t.Errorf("other subprotocol: %v", err)
	}
}

// Whatever is wrong with a frame ends the session with the code that the
// protocol names, is counted, and harms nobody else.
func TestFrameViolations(t *testing.T) {
	n := start(t, nil)
	bystander := n.node().Ready(t)
	later := func(s *nodetest.Session, d time.Duration) *wire.Sealer {
		return wire.NewSealer(s.Node.Key, s.Agreed, wire.ToNetwork, func() time.Time { return time.Now().Add(d) })
	}
	seal := func(s *wire.Sealer, m wire.Message) []byte {
		frame, err := s.Seal(nil, m)
		if err != nil {
			t.Fatal(err)
		}
		return frame
	}
	// sealed makes the fourth frame, after hello, sandbox and heartbeat, by the given
	// sealer.
	sealed := func(k *wire.Sealer, m wire.Message) []byte {
		for range 3 {
			seal(k, m)
		}
		return seal(k, m)
	}
	elsewhere := n.node().Ready(t)
	elsewhere.Send(&wire.Bye{}) // it gets none of the jobs
	if code := elsewhere.Closed(); code != websocket.CloseNormalClosure {
		t.Fatalf("closed with %d", code)
	}
	ping := &wire.Accept{Job: receipt.NewJobID()}
	for name, tc := range map[string]struct {
		send   func(*nodetest.Session)
		reason string
		code   int
	}{
		"replay": {func(s *nodetest.Session) {
			frame := sealed(later(s, 0), ping)
			s.SendRaw(frame)
			s.SendRaw(frame)
		}, "sequence", websocket.ClosePolicyViolation},
		"gap": {func(s *nodetest.Session) {
			k := later(s, 0)
			sealed(k, ping)
			s.SendRaw(seal(k, ping))
		}, "sequence", websocket.ClosePolicyViolation},
		"signed, not tagged": {func(s *nodetest.Session) {
			s.SendRaw(seal(later(s, 0), ping))
		}, "tag", websocket.ClosePolicyViolation},
		"wrong direction": {func(s *nodetest.Session) {
			s.SendRaw(sealed(wire.NewSealer(s.Node.Key, s.Agreed, wire.ToNode, time.Now), ping))
		}, "tag", websocket.ClosePolicyViolation},
		"another session's": {func(s *nodetest.Session) {
			s.SendRaw(sealed(wire.NewSealer(elsewhere.Node.Key, elsewhere.Agreed, wire.ToNetwork, time.Now), ping))
		}, "tag", websocket.ClosePolicyViolation},
		"a changed byte": {func(s *nodetest.Session) {
			frame := sealed(later(s, 0), ping)
			frame[len(frame)-10] ^= 1
			s.SendRaw(frame)
		}, "tag", websocket.ClosePolicyViolation},
		"slow clock": {func(s *nodetest.Session) { s.SendRaw(sealed(later(s, -10*time.Minute), ping)) }, "clock", websocket.ClosePolicyViolation},
		"fast clock": {func(s *nodetest.Session) { s.SendRaw(sealed(later(s, 10*time.Minute), ping)) }, "clock", websocket.ClosePolicyViolation},
		"too short":  {func(s *nodetest.Session) { s.SendRaw(make([]byte, 32)) }, "tag", websocket.ClosePolicyViolation},
		"text": {func(s *nodetest.Session) {
			if err := s.Conn.WriteMessage(websocket.TextMessage, sealed(later(s, 0), ping)); err != nil {
				t.Error(err)
			}
		}, "malformed", websocket.ClosePolicyViolation},
		"second hello":   {func(s *nodetest.Session) { s.Send(&wire.Hello{}) }, "order", websocket.ClosePolicyViolation},
		"network's word": {func(s *nodetest.Session) { s.Send(&wire.Ack{}) }, "malformed", websocket.ClosePolicyViolation},
		"oversize": {func(s *nodetest.Session) {
			// The network may close before it has all of it.
			_ = s.Conn.WriteMessage(websocket.BinaryMessage, make([]byte, wire.MaxFrame+1))
		}, "too_large", websocket.CloseMessageTooBig},
		"absurd heartbeat": {func(s *nodetest.Session) { s.Send(&wire.Heartbeat{Slots: -1}) }, "malformed", websocket.ClosePolicyViolation},
		"unsigned receipt": {func(s *nodetest.Session) {
			s.SendRaw(sealed(later(s, 0), falseResult{s.Node.Result(t, &wire.Job{ID: receipt.NewJobID(), Kind: wire.KindChat, Model: nodetest.Model}, []byte("{}"), nil)}))
		}, "malformed", websocket.ClosePolicyViolation},
	} {
		t.Run(name, func(t *testing.T) {
			s := n.node().Ready(t)
			series := `resultity_frames_refused_total{reason="` + tc.reason + `"}`
			before := n.metric(series)
			tc.send(s)
			end := s.Ended()
			if end.Code != tc.code || end.Text == "" && tc.reason != "too_large" { // which the WebSocket library says by itself
				t.Errorf("closed with %v, want %d and a reason", end, tc.code)
			}
			t.Logf("expected: close code %d for %s, the job goes elsewhere; got: %v", tc.code, tc.reason, end)
			n.until("the refusal is counted", func() bool { return n.metric(series) == before+1 })
			ch := n.ask(chat)
			bystander.Finish(bystander.Take(), "fine")
			if r := n.answer(ch); r.status != http.StatusOK {
				t.Fatalf("%d %s", r.status, r.body)
			}
		})
	}
}

// Whoever stands on the way can change and repeat frames. A node does not pay
// for that: it is back as soon as it has connected again.
func TestFaultsOfTheWayAreForgiven(t *testing.T) {
	n := start(t, nil)
	v := n.node()
	for range 3 {
		s := v.Ready(t)
		s.SendRaw(make([]byte, 200))
		if code := s.Closed(); code != websocket.ClosePolicyViolation {
			t.Fatalf("closed with %d", code)
		}
	}
	s := v.Ready(t)
	ch := n.ask(chat)
	s.Finish(s.Take(), "fine")
	if r := n.answer(ch); r.status != http.StatusOK {
		t.Fatalf("%d %s", r.status, r.body)
	}
}

// falseResult is a result around a receipt with a field that was changed after
// signing.
type falseResult struct{ *wire.Result }

func (r falseResult) MarshalJSON() ([]byte, error) {
	data, err := json.Marshal(r.Result)
	return bytes.Replace(data, []byte(`"completionTokens":"3"`), []byte(`"completionTokens":"4"`), 1), err
}

func TestBeforeHello(t *testing.T) {
	n := start(t, nil)
	v := n.node()
	good := v.Ready(t)
	dial := func() *nodetest.Session {
		own := wire.NewSecret()
		s, _, err := v.Dial(t, v.Headers(own), own)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	s := dial()
	s.Send(v.Heartbeat())
	end := s.Ended()
	t.Logf("a heartbeat: expected: closed with %d; got: %v", websocket.ClosePolicyViolation, end)
	if end.Code != websocket.ClosePolicyViolation {
		t.Errorf("heartbeat before hello: closed with %v", end)
	}
	s = dial()
	s.SendRaw(make([]byte, 20<<10))
	end = s.Ended()
	t.Logf("a large hello: expected: closed with %d; got: %v", websocket.CloseMessageTooBig, end)
	if end.Code != websocket.CloseMessageTooBig {
		t.Errorf("large hello: closed with %v", end)
	}
	// Somebody who knows the address and not the key cannot throw the node out.
	s = dial()
	thief, err := evm.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	frame, err := wire.NewSealer(thief, s.Agreed, wire.ToNetwork, time.Now).Seal(nil, &wire.Hello{})
	if err != nil {
		t.Fatal(err)
	}
	s.SendRaw(frame)
	end = s.Ended()
	t.Logf("the hello of another key: expected: closed with %d; got: %v", websocket.ClosePolicyViolation, end)
	if end.Code != websocket.ClosePolicyViolation {
		t.Errorf("hello of another key: closed with %v", end)
	}
	ch := n.ask(chat)
	good.Finish(good.Take(), "fine")
	if r := n.answer(ch); r.status != http.StatusOK {
		t.Fatalf("%d %s", r.status, r.body)
	}
}

// Two machines with one key: whoever says hello with a count that was there
// already is told so, the other one goes on, and the network knows it.
func TestClonedKey(t *testing.T) {
	n := start(t, nil)
	v := n.node()
	hello := func(count uint64) *nodetest.Session {
		own := wire.NewSecret()
		s, status, err := v.Dial(t, v.Headers(own), own)
		if err != nil {
			t.Fatal(status, err)
		}
		s.Send(&wire.Hello{Agent: "a", Config: v.Digest, Count: count})
		return s
	}
	good := hello(1 << 40) // above what the harness has used
	nodetest.Expect[*wire.Welcome](good)
	for _, count := range []uint64{0, 1, 1 << 40} {
		end := hello(count).Ended()
		t.Logf("count %d: expected: closed with %d; got: %v", count, wire.CloseCloned, end)
		if end.Code != wire.CloseCloned {
			t.Errorf("hello %d: closed with %v", count, end)
		}
	}
	if got := n.metric(`resultity_frames_refused_total{reason="cloned"}`); got != 3 {
		t.Errorf("%v refusals counted", got)
	}
	good.Send(v.Heartbeat()) // the session has not ended
	nodetest.Expect[*wire.Status](good)
	a, err := network.OpenAdmin(t.Context(), n.dir, n.log())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { a.Close() }()
	n.until("the network to write it down", func() bool {
		info, err := a.Node(t.Context(), v.Key.Address())
		if err != nil {
			t.Fatal(err)
		}
		return info.Cloned != 0
	})
	// It is known after a restart, too.
	n.stop()
	n.serve()
	v.URL = n.url
	end := hello(1 << 40).Ended()
	t.Logf("after a restart: expected: closed with %d; got: %v", wire.CloseCloned, end)
	if end.Code != wire.CloseCloned {
		t.Errorf("after a restart: closed with %v", end)
	}
	nodetest.Expect[*wire.Welcome](hello(1<<40 + 1))
}

// Connections that never say hello do not keep a node out, whosever
// address they name; the oldest of them go.
func TestStrangersDoNotKeepNodesOut(t *testing.T) {
	n := start(t, nil)
	n.stop()
	n.tweak = func(c *network.Config) { c.MaxSessions = 2 }
	n.serve()
	v := n.node()
	v.URL = n.url
	var first *nodetest.Session
	for range 100 {
		own := wire.NewSecret()
		s, status, err := v.Dial(t, v.Headers(own), own)
		if err != nil {
			t.Fatalf("status %d, %v", status, err)
		}
		if first == nil {
			first = s
		}
	}
	s := v.Ready(t)
	end := first.Ended()
	t.Logf("the first of 100 strangers: expected: closed with %d; got: %v", websocket.CloseTryAgainLater, end)
	if end.Code != websocket.CloseTryAgainLater {
		t.Errorf("the first stranger: closed with %v", end)
	}
	ch := n.ask(chat)
	s.Finish(s.Take(), "fine")
	r := n.answer(ch)
	t.Logf("a client of the node that comes then: expected: 200; got: %d", r.status)
	if r.status != http.StatusOK {
		t.Fatalf("%d %s", r.status, r.body)
	}
}

func TestSecondSessionReplacesTheFirst(t *testing.T) {
	n := start(t, nil)
	v := n.node()
	first := v.Ready(t)
	ch := n.ask(chat)
	j := first.Take()
	second := v.Connect(t)
	if code := first.Closed(); code != websocket.CloseNormalClosure {
		t.Errorf("first session closed with %d", code)
	}
	if again := second.Take(); again.ID != j.ID {
		t.Fatal("another job")
	}
	second.Finish(j, "secret answer")
	if r := n.answer(ch); r.status != http.StatusOK {
		t.Fatalf("%d %s", r.status, r.body)
	}
}

func TestBye(t *testing.T) {
	n := start(t, nil)
	s := n.node().Ready(t)
	s.Send(&wire.Bye{Reason: "upgrade"})
	if code := s.Closed(); code != websocket.CloseNormalClosure {
		t.Errorf("closed with %d", code)
	}
	n.until("the session is counted", func() bool {
		return n.metric(`resultity_sessions_ended_total{reason="bye"}`) == 1
	})
}

// A node that was away when a configuration was published hears of it at once.
func TestUpdateAtHello(t *testing.T) {
	n := start(t, nil)
	v := n.node()
	v.Digest = digest.Digest{}
	s := v.Connect(t)
	if m, err := s.Receive(); err != nil || m.(*wire.Update).Version != 1 {
		t.Fatalf("%T %v", m, err)
	}
}
