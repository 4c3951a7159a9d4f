package session

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"reflect"
	"runtime"
	"runtime/pprof"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/gorilla/websocket"

	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/evm"
	"github.com/resultity/node/internal/receipt"
	"github.com/resultity/node/internal/signer"
	"github.com/resultity/node/internal/wire"
)

// TestMain fails when a test leaves a goroutine behind.
func TestMain(m *testing.M) {
	code := m.Run()
	if code == 0 {
		code = leaks()
	}
	os.Exit(code)
}

func leaks() int {
	var b bytes.Buffer
	for range 6000 { // what is ending may take a moment, on a busy machine a minute
		b.Reset()
		_ = pprof.Lookup("goroutine").WriteTo(&b, 2)
		if !strings.Contains(b.String(), "internal/session.") || strings.Count(b.String(), "internal/session.") == strings.Count(b.String(), "internal/session.leaks")+strings.Count(b.String(), "internal/session.TestMain") {
			return 0
		}
		time.Sleep(10 * time.Millisecond)
	}
	fmt.Fprintf(os.Stderr, "goroutines left:\n%s\n", b.Bytes())
	return 1
}

const wait = 2 * time.Minute // for what must come, also on a busy machine

var (
	nodeKey    = newKey()
	networkKey = newKey()
	otherKey   = newKey()
)

func newKey() *evm.Key {
	k, err := evm.NewKey()
	if err != nil {
		panic(err)
	}
	return k
}

// network is a server that does to each connection what a test says.
type network struct {
	*httptest.Server
	script func(*peer)
	reply  func(w http.ResponseWriter, r *http.Request) bool // in place of 101; true when it did
	header http.Header                                       // of 101, added
	peers  sync.WaitGroup
}

// peer is the network's side of one connection.
type peer struct {
	t      testing.TB
	r      *http.Request
	conn   *websocket.Conn
	agreed *wire.Session
	sealer *wire.Sealer
	opener *wire.Opener
}

func newNetwork(t testing.TB, script func(*peer)) *network {
	n := &network{script: script, header: http.Header{}}
	n.Server = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if n.reply != nil && n.reply(w, r) {
			return
		}
		n.serve(t, w, r)
	}))
	n.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, 0)
	n.StartTLS()
	t.Cleanup(func() {
		n.Close()
		n.peers.Wait()
	})
	return n
}

func (n *network) serve(t testing.TB, w http.ResponseWriter, r *http.Request) {
	n.peers.Add(1)
	defer n.peers.Done()
	own := wire.NewSecret()
	theirs, err := wire.ParsePublicKey(r.Header.Get(wire.HeaderKey))
	if err != nil || r.URL.Path != "/base"+wire.SessionPath || r.Header.Get(wire.HeaderNetwork) != "testnet" || r.Header.Get(wire.HeaderNode) != nodeKey.Address().Hex() {
		t.Errorf("request %s with %v (%v)", r.URL, r.Header, err)
	}
	h := n.header.Clone()
	if h.Get(wire.HeaderKey) == "" {
		h.Set(wire.HeaderKey, own.Public().String())
	}
	up := websocket.Upgrader{}
	if h.Get("Sec-Websocket-Protocol") == "" {
		up.Subprotocols = []string{wire.Subprotocol}
	}
	conn, err := up.Upgrade(w, r, h)
	if err != nil {
		t.Errorf("upgrade: %v", err)
		return
	}
	defer conn.Close()
	_ = conn.SetReadDeadline(time.Now().Add(wait))
	agreed, err := own.Agree("testnet", nodeKey.Address(), theirs, own.Public())
	if err != nil {
		t.Errorf("agree: %v", err)
		return
	}
	n.script(&peer{
		t: t, r: r, conn: conn, agreed: agreed,
		sealer: wire.NewSealer(networkKey, agreed, wire.ToNode, time.Now),
		opener: wire.NewOpener(func(a evm.Address) bool { return a == nodeKey.Address() }, agreed, wire.ToNetwork, time.Minute),
	})
}

// next returns the node's next message, nil at the end of the connection.
func (p *peer) next() wire.Message {
	_, frame, err := p.conn.ReadMessage()
	if err != nil {
		return nil
	}
	m, err := p.opener.Open(frame, time.Now())
	if err != nil {
		p.t.Errorf("a frame of the node: %v", err)
		return nil
	}
	return m
}

func (p *peer) seal(m wire.Message) []byte {
	f, err := p.sealer.Seal(nil, m)
	if err != nil {
		p.t.Error(err)
	}
	return f
}

func (p *peer) send(m wire.Message) { p.write(p.seal(m)) }

func (p *peer) write(frame []byte) { _ = p.conn.WriteMessage(websocket.BinaryMessage, frame) }

// welcome takes hello and answers it.
func (p *peer) welcome() {
	if _, ok := p.next().(*wire.Hello); !ok {
		p.t.Error("the first frame is not hello")
	}
	p.send(&wire.Welcome{Session: "s", Server: "1"})
}

// end reads to the end and returns the code of the close frame, or 0.
func (p *peer) end() int {
	for {
		_, _, err := p.conn.ReadMessage()
		var c *websocket.CloseError
		switch {
		case errors.As(err, &c):
			return c.Code
		case err != nil:
			return 0
		}
	}
}

// recorder is a handler that puts what it is told into channels.
type recorder struct {
	opened   chan struct{}
	messages chan wire.Message
	closed   chan error
}

func newRecorder() *recorder {
	return &recorder{make(chan struct{}, 100), make(chan wire.Message, 100), make(chan error, 100)}
}

func (r *recorder) Opened()                { r.opened <- struct{}{} }
func (r *recorder) Message(m wire.Message) { r.messages <- m }
func (r *recorder) Closed(err error)       { r.closed <- err }

func get[T any](t testing.TB, c <-chan T) T {
	t.Helper()
	select {
	case v := <-c:
		return v
	case <-time.After(wait):
		t.Fatalf("no %T came", *new(T))
		panic("unreachable")
	}
}

// What needs somebody to act is tried again at once; and nothing is late because the
// machine is busy, unless a test says so.
func init() {
	usual = patience{dial: wait, welcome: wait, write: wait, leave: wait, act: time.Millisecond}
}

func config(n *network) Config {
	return Config{
		URL: "wss" + strings.TrimPrefix(n.URL, "https") + "/base", Network: "testnet", Node: nodeKey.Address(), Key: signer.NewLocal(nodeKey, nil),
		Trusted: func(a evm.Address) bool { return a == networkKey.Address() }, Agent: "v1",
		TLS: n.Client().Transport.(*http.Transport).TLSClientConfig,
		Log: slog.New(slog.DiscardHandler), Now: time.Now,
		Config: func() digest.Digest { return digest.Of([]byte("c")) }, ClockWindow: func() time.Duration { return time.Minute },
		Dead: wait, Delays: []time.Duration{time.Millisecond},
	}
}

// run runs a session and returns what ends it. The test fails if it does not
// end then.
func run(t testing.TB, s *Session) (stop func()) {
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	once := sync.OnceFunc(func() {
		cancel()
		select {
		case err := <-done:
			if err != nil {
				t.Errorf("Run = %v, want nil", err)
			}
		case <-time.After(wait):
			t.Error("Run does not return")
		}
	})
	t.Cleanup(once)
	return once
}

func TestSession(t *testing.T) {
	job := &wire.Job{ID: receipt.NewJobID(), Model: "m", Request: []byte("q"), Config: digest.Of([]byte("c"))}
	seen := make(chan wire.Message, 100)
	code := make(chan int, 1)
	n := newNetwork(t, func(p *peer) {
		seen <- p.next()
		p.send(&wire.Welcome{})
		p.send(job)
		for {
			m := p.next()
			seen <- m
			if _, bye := m.(*wire.Bye); bye {
				code <- p.end()
				return
			}
		}
	})
	h := newRecorder()
	s := New(config(n), h)
	if err := s.Send(&wire.Heartbeat{}); !errors.Is(err, ErrNotConnected) {
		t.Fatalf("Send before Run = %v, want ErrNotConnected", err)
	}
	stop := run(t, s)
	if got := get(t, seen); !reflect.DeepEqual(got, &wire.Hello{Agent: "v1", Config: digest.Of([]byte("c")), Count: 1}) {
		t.Fatalf("first message %+v", got)
	}
	get(t, h.opened)
	if got := get(t, h.messages); !reflect.DeepEqual(got, job) {
		t.Fatalf("got %+v, want %+v", got, job)
	}
	for _, m := range []wire.Message{&wire.Accept{Job: job.ID}, &wire.Chunk{Job: job.ID, Data: []byte("a")}} {
		if err := s.Send(m); err != nil {
			t.Fatal(err)
		}
		if got := get(t, seen); !reflect.DeepEqual(got, m) {
			t.Fatalf("got %+v, want %+v", got, m)
		}
	}
	if st := s.Stats(); !st.Connected || st.Opened != 1 {
		t.Errorf("Stats = %+v", st)
	}
	// What is queued at the end is said, then goodbye.
	last := &wire.Result{Job: job.ID, Response: make([]byte, 1<<20)}
	if err := s.Send(last); err != nil {
		t.Fatal(err)
	}
	stop()
	if got := get(t, seen); !reflect.DeepEqual(got, last) {
		t.Errorf("got %T, want the result", got)
	}
	if got, ok := get(t, seen).(*wire.Bye); !ok {
		t.Errorf("got %T, want bye", got)
	}
	if got := get(t, code); got != websocket.CloseNormalClosure {
		t.Errorf("closed with %d, want %d", got, websocket.CloseNormalClosure)
	}
	if err := s.Send(last); !errors.Is(err, ErrNotConnected) {
		t.Errorf("Send after Run = %v, want ErrNotConnected", err)
	}
	if len(h.closed) != 0 {
		t.Errorf("Closed was called at an orderly end: %v", <-h.closed)
	}
}

// Whatever the network does to the handshake, the attempt fails with an error
// that says what, and there is another one.
func TestHandshakeIsRefused(t *testing.T) {
	status := func(code int, text string) func(http.ResponseWriter, *http.Request) bool {
		return func(w http.ResponseWriter, _ *http.Request) bool {
			http.Error(w, text, code)
			return true
		}
	}
	for _, c := range []struct {
		name   string
		reply  func(http.ResponseWriter, *http.Request) bool
		header http.Header
		want   error
		text   string
	}{
		{name: "not registered", reply: status(403, "who are you?"), want: ErrNotRegistered, text: "who are you?"},
		{name: "another network", reply: status(409, "mainnet"), want: ErrWrongNetwork, text: "409"},
		{name: "no such path", reply: status(404, ""), want: ErrProtocol, text: "404"},
		{name: "not a WebSocket", reply: status(200, ""), want: ErrProtocol, text: "200"},
		{name: "in trouble", reply: status(503, "later"), text: "later"},
		{name: "a long story", reply: status(500, strings.Repeat("x", 1<<20)), text: "500"},
		{name: "redirected", reply: func(w http.ResponseWriter, r *http.Request) bool {
			http.Redirect(w, r, "/elsewhere", http.StatusTemporaryRedirect)
			return true
		}, text: "307"},
		{name: "another subprotocol", header: http.Header{"Sec-Websocket-Protocol": {"resultity.v2"}}, want: ErrProtocol, text: "resultity.v2"},
		{name: "no subprotocol", header: http.Header{"Sec-Websocket-Protocol": {" "}}, want: ErrProtocol, text: "subprotocol"},
		{name: "compression", header: http.Header{"Sec-Websocket-Extensions": {"permessage-deflate; server_no_context_takeover; client_no_context_takeover"}}, want: ErrProtocol, text: "permessage-deflate"},
		{name: "no key", header: http.Header{wire.HeaderKey: {" "}}, want: ErrProtocol, text: wire.HeaderKey},
		{name: "a short key", header: http.Header{wire.HeaderKey: {"00"}}, want: ErrProtocol, text: wire.HeaderKey},
		{name: "a key of low order", header: http.Header{wire.HeaderKey: {wire.PublicKey{}.String()}}, want: ErrProtocol, text: wire.HeaderKey},
	} {
		t.Run(c.name, func(t *testing.T) {
			n := newNetwork(t, func(p *peer) { p.end() })
			n.reply = c.reply
			if c.header != nil {
				// Upgrade refuses to be told an extension, so all is written by hand.
				n.reply = func(w http.ResponseWriter, r *http.Request) bool {
					handUpgrade(t, w, r, c.header)
					return true
				}
			}
			h := newRecorder()
			run(t, New(config(n), h))
			for try := range 2 {
				err := get(t, h.closed)
				if try == 0 {
					t.Logf("expected: %v, and in its text %q; got: %v", c.want, c.text, err)
				}
				if c.want != nil && !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.text) || len(err.Error()) > 2000 {
					t.Errorf("Closed(%v), want %v and %q", err, c.want, c.text)
				}
				if c.want == nil && hopeless(err) {
					t.Errorf("Closed(%v), which says that waiting does not help", err)
				}
			}
			if len(h.opened) != 0 {
				t.Error("opened")
			}
		})
	}
}

func handUpgrade(t testing.TB, w http.ResponseWriter, r *http.Request, h http.Header) {
	conn, _, err := w.(http.Hijacker).Hijack()
	if err != nil {
		t.Error(err)
		return
	}
	defer conn.Close()
	all := http.Header{
		"Upgrade": {"websocket"}, "Connection": {"Upgrade"}, "Sec-Websocket-Accept": {acceptKey(r)},
		"Sec-Websocket-Protocol": {wire.Subprotocol}, wire.HeaderKey: {wire.NewSecret().Public().String()},
	}
	for k, v := range h {
		all[k] = v
	}
	var b bytes.Buffer
	b.WriteString("HTTP/1.1 101 Switching Protocols\r\n")
	_ = all.Write(&b)
	b.WriteString("\r\n")
	_, _ = conn.Write(b.Bytes())
	_, _ = io.Copy(io.Discard, conn)
}

// Whatever is wrong with a frame ends the session: the network is told, it is
// counted, and nothing of it arrives.
func TestFramesAreRefused(t *testing.T) {
	status := &wire.Status{Routable: true}
	// second is the frame after welcome, by another sealer.
	second := func(p *peer, of *wire.Session, d wire.Direction, now func() time.Time) []byte {
		s := wire.NewSealer(networkKey, of, d, now)
		var f []byte
		for _, m := range []wire.Message{&wire.Welcome{}, status} {
			var err error
			if f, err = s.Seal(nil, m); err != nil {
				p.t.Error(err)
			}
		}
		return f
	}
	signed := func(p *peer, k *evm.Key) []byte {
		f, err := wire.NewSealer(k, p.agreed, wire.ToNode, time.Now).Seal(nil, status)
		if err != nil {
			p.t.Error(err)
		}
		return f
	}
	// another is a session with the same node, in which both have met.
	another := func(p *peer) *wire.Session {
		a, b := wire.NewSecret(), wire.NewSecret()
		s, err := a.Agree("testnet", nodeKey.Address(), a.Public(), b.Public())
		if err != nil {
			p.t.Error(err)
		}
		f, err := wire.NewSealer(nodeKey, s, wire.ToNetwork, time.Now).Seal(nil, &wire.Hello{})
		if err != nil {
			p.t.Error(err)
		}
		if _, err := wire.NewOpener(func(evm.Address) bool { return true }, s, wire.ToNetwork, time.Minute).Open(f, time.Now()); err != nil {
			p.t.Error(err)
		}
		return s
	}
	for _, c := range []struct {
		name string
		do   func(*peer) // after welcome
		want error
		kind string
		code int
	}{
		{"signed, not tagged", func(p *peer) { p.write(signed(p, networkKey)) }, wire.ErrTag, "tag", 1008},
		{"signed by another", func(p *peer) { p.write(signed(p, otherKey)) }, wire.ErrTag, "tag", 1008},
		{"another session", func(p *peer) { p.write(second(p, another(p), wire.ToNode, time.Now)) }, wire.ErrTag, "tag", 1008},
		{"sent back", func(p *peer) { p.write(second(p, p.agreed, wire.ToNetwork, time.Now)) }, wire.ErrTag, "tag", 1008},
		{"a flipped bit", func(p *peer) { f := p.seal(status); f[len(f)-9] ^= 1; p.write(f) }, wire.ErrTag, "tag", 1008},
		{"replayed", func(p *peer) { f := p.seal(&wire.Update{}); p.write(f); p.write(f) }, wire.ErrSequence, "sequence", 1008},
		{"a gap", func(p *peer) { p.seal(status); p.send(status) }, wire.ErrSequence, "sequence", 1008},
		{"slow clock", func(p *peer) {
			p.write(second(p, p.agreed, wire.ToNode, func() time.Time { return time.Now().Add(-2 * time.Minute) }))
		}, wire.ErrClock, "clock", 1008},
		{"fast clock", func(p *peer) {
			p.write(second(p, p.agreed, wire.ToNode, func() time.Time { return time.Now().Add(2 * time.Minute) }))
		}, wire.ErrClock, "clock", 1008},
		{"a text message", func(p *peer) { _ = p.conn.WriteMessage(websocket.TextMessage, p.seal(status)) }, errNotBinary, "malformed", 1008},
		{"empty", func(p *peer) { p.write(nil) }, wire.ErrTag, "tag", 1008},
		{"short", func(p *peer) { p.write(make([]byte, 32)) }, wire.ErrTag, "tag", 1008},
		{"too large", func(p *peer) { p.write(make([]byte, wire.MaxFrame+1)) }, websocket.ErrReadLimit, "too_large", 1009},
		{"a second welcome", func(p *peer) { p.send(&wire.Welcome{}) }, errOrder, "order", 1008},
	} {
		t.Run(c.name, func(t *testing.T) {
			codes := make(chan int, 100)
			n := newNetwork(t, func(p *peer) {
				p.welcome()
				c.do(p)
				codes <- p.end()
			})
			h := newRecorder()
			s := New(config(n), h)
			run(t, s)
			for try := range 2 { // and it comes back
				get(t, h.opened)
				err := get(t, h.closed)
				if try == 0 {
					t.Logf("expected: %v; got: %v", c.want, err)
				}
				if !errors.Is(err, c.want) {
					t.Errorf("Closed(%v), want %v", err, c.want)
				}
				if word, byNode := Refusal(err); word != c.kind || !byNode {
					t.Errorf("Refusal(%v) = %s, %v, want %s by the node", err, word, byNode, c.kind)
				}
				if got := get(t, codes); got != c.code {
					t.Errorf("the network was told %d, want %d", got, c.code)
				}
			}
			if got := s.Stats().FrameErrors; got[c.kind] < 2 || len(got) != 1 {
				t.Errorf("FrameErrors = %v, want some %s", got, c.kind)
			}
			for len(h.messages) > 0 {
				if m := <-h.messages; m.Type() == status.Type() {
					t.Error("the message has arrived")
				}
			}
		})
	}
}

// Who refused what is said in a word, also where it was the network.
func TestRefusalOfTheNetwork(t *testing.T) {
	for code, want := range map[int]string{
		websocket.ClosePolicyViolation: "blamed", websocket.CloseMessageTooBig: "blamed", wire.CloseCloned: "cloned",
		websocket.CloseGoingAway: "", websocket.CloseTryAgainLater: "", websocket.CloseNormalClosure: "",
	} {
		n := newNetwork(t, func(p *peer) {
			p.welcome()
			_ = p.conn.WriteControl(websocket.CloseMessage, websocket.FormatCloseMessage(code, "why"), time.Now().Add(wait))
			p.end()
		})
		h := newRecorder()
		stop := run(t, New(config(n), h))
		err := get(t, h.closed)
		if word, byNode := Refusal(err); word != want || byNode || !strings.Contains(err.Error(), "why") {
			t.Errorf("closed with %d: Refusal(%v) = %q, %v, want %q by the network", code, err, word, byNode, want)
		}
		stop()
	}
	t.Log("expected: blamed, cloned and lost told apart; got: so")
	for err, want := range map[error]string{
		refused(&http.Response{StatusCode: 403, Body: http.NoBody}): "not_registered",
		refused(&http.Response{StatusCode: 409, Body: http.NoBody}): "wrong_network",
		refused(&http.Response{StatusCode: 404, Body: http.NoBody}): "protocol",
		refused(&http.Response{StatusCode: 400, Body: http.NoBody}): "refused",
		refused(&http.Response{StatusCode: 503, Body: http.NoBody}): "",
		wire.ErrRevoked: "", // that is what keys are replaced for
		ErrSilent:       "",
	} {
		if word, byNode := Refusal(err); word != want || byNode {
			t.Errorf("Refusal(%v) = %q, %v, want %q", err, word, byNode, want)
		}
	}
}

func TestFirstFrameIsWelcome(t *testing.T) {
	codes := make(chan int, 100)
	n := newNetwork(t, func(p *peer) {
		p.next()
		p.send(&wire.Status{})
		codes <- p.end()
	})
	h := newRecorder()
	run(t, New(config(n), h))
	if err := get(t, h.closed); !errors.Is(err, errOrder) {
		t.Errorf("Closed(%v), want errOrder", err)
	}
	if got := get(t, codes); got != 1008 {
		t.Errorf("the network was told %d, want 1008", got)
	}
	if len(h.opened) != 0 || len(h.messages) != 0 {
		t.Error("a session was opened without welcome")
	}
}

// All that may be left zero has a default that works.
func TestDefaults(t *testing.T) {
	n := newNetwork(t, func(p *peer) {
		p.welcome()
		p.end()
	})
	cfg := config(n)
	cfg.Config, cfg.ClockWindow, cfg.Delays = nil, nil, nil
	h := newRecorder()
	run(t, New(cfg, h))
	get(t, h.opened)
}

func TestNoWelcome(t *testing.T) {
	n := newNetwork(t, func(p *peer) { p.end() })
	h := newRecorder()
	s := New(config(n), h)
	s.patience.welcome = 20 * time.Millisecond
	run(t, s)
	err := get(t, h.closed)
	t.Logf("expected: %v; got: %v", errNoWelcome, err)
	if !errors.Is(err, errNoWelcome) {
		t.Errorf("Closed(%v), want errNoWelcome", err)
	}
}

// A network that is cut off says nothing more, not even that it is gone.
func TestSilence(t *testing.T) {
	release := make(chan struct{})
	n := newNetwork(t, func(p *peer) {
		p.welcome()
		<-release // reads nothing, so it answers no ping
	})
	defer close(release)
	cfg := config(n)
	cfg.Ping, cfg.Dead = 10*time.Millisecond, 100*time.Millisecond
	h := newRecorder()
	run(t, New(cfg, h))
	get(t, h.opened)
	err := get(t, h.closed)
	t.Logf("expected: %v; got: %v", ErrSilent, err)
	if !errors.Is(err, ErrSilent) {
		t.Errorf("Closed(%v), want ErrSilent", err)
	}
}

// A session that is only quiet lives: pings are answered.
func TestQuietIsNotSilent(t *testing.T) {
	t.Parallel() // it waits more than it works
	pings := make(chan struct{}, 1000)
	n := newNetwork(t, func(p *peer) {
		ping := p.conn.PingHandler()
		p.conn.SetPingHandler(func(s string) error { pings <- struct{}{}; return ping(s) })
		p.welcome()
		p.next()
	})
	cfg := config(n)
	cfg.Ping, cfg.Dead = 20*time.Millisecond, 2*time.Second
	h := newRecorder()
	run(t, New(cfg, h))
	for range 200 { // twice as long as it may be silent
		get(t, pings)
	}
	if len(h.closed) != 0 {
		t.Errorf("Closed(%v)", <-h.closed)
	}
}

// A large message takes longer than a silence may, but bytes move all the time.
func TestLargeMessagesOverASlowLink(t *testing.T) {
	t.Parallel() // it waits more than it works
	large := &wire.Result{Job: receipt.NewJobID(), Response: bytes.Repeat([]byte("a"), 1<<20)}
	got := make(chan wire.Message, 1)
	n := newNetwork(t, func(p *peer) {
		// What waits on this side to be read is not to count as sent.
		if err := p.conn.NetConn().(*tls.Conn).NetConn().(*net.TCPConn).SetReadBuffer(64 << 10); err != nil {
			p.t.Error(err)
		}
		// And nothing is heard of this side before it has read it all.
		p.conn.SetPingHandler(func(string) error { return nil })
		p.welcome()
		_, r, err := p.conn.NextReader()
		if err != nil {
			p.t.Error(err)
			return
		}
		var frame bytes.Buffer
		for err == nil {
			time.Sleep(120 * time.Millisecond) // this is the slow link
			_, err = io.CopyN(&frame, r, 32<<10)
		}
		m, err := p.opener.Open(frame.Bytes(), time.Now())
		if err != nil {
			p.t.Error(err)
		}
		got <- m
		p.end()
	})
	cfg := config(n)
	cfg.Ping, cfg.Dead = 50*time.Millisecond, 2*time.Second
	h := newRecorder()
	s := New(cfg, h)
	s.patience.write = 2 * time.Second
	run(t, s)
	get(t, h.opened)
	if err := s.Send(large); err != nil {
		t.Fatal(err)
	}
	select {
	case m := <-got:
		if !reflect.DeepEqual(m, large) {
			t.Error("the message has changed")
		}
	case err := <-h.closed:
		t.Fatalf("Closed(%v) while bytes were moving", err)
	case <-time.After(wait):
		t.Fatal("nothing arrives")
	}
}

// A network that does not read: chunks are refused, results wait and are told
// when the session ends, and other messages end it.
func TestBackPressure(t *testing.T) {
	release := make(chan struct{})
	n := newNetwork(t, func(p *peer) {
		p.welcome()
		<-release
	})
	defer close(release)
	h := newRecorder()
	s := New(config(n), h)
	run(t, s)
	get(t, h.opened)
	id := receipt.NewJobID()
	for sent := 0; ; sent += 64 << 10 {
		err := s.Send(&wire.Chunk{Job: id, Data: make([]byte, 64<<10)})
		if errors.Is(err, ErrFull) {
			break
		}
		if err != nil || sent > 64<<20 {
			t.Fatalf("Send of a chunk = %v after %d bytes, want ErrFull", err, sent)
		}
	}
	if s.Stats().Dropped != 1 {
		t.Errorf("Stats = %+v, want one dropped", s.Stats())
	}
	// Results find room beyond that of chunks, but not without end.
	results := make(chan error, 1)
	go func() {
		for range 100 {
			if err := s.Send(&wire.Result{Job: id, Response: make([]byte, 1<<20)}); err != nil {
				results <- err
				return
			}
		}
		results <- nil
	}()
	for range maxControl + 1000 {
		if err := s.Send(&wire.Accept{Job: id}); err != nil {
			if !errors.Is(err, ErrNotConnected) {
				t.Errorf("Send = %v, want ErrNotConnected", err)
			}
			break
		}
	}
	if err := get(t, results); !errors.Is(err, ErrNotConnected) {
		t.Errorf("Send of a result = %v when the session ended, want ErrNotConnected", err)
	}
	if err := get(t, h.closed); !errors.Is(err, errSlow) {
		t.Errorf("Closed(%v), want errSlow", err)
	}
}

func TestSmallMessagesOvertakeAndByeIsLast(t *testing.T) {
	l := newLink(nil, nil)
	id := receipt.NewJobID()
	sent := []wire.Message{&wire.Chunk{Job: id}, &wire.Result{Job: id}, &wire.Accept{Job: id}, &wire.Bye{}, &wire.Heartbeat{}}
	for _, m := range sent {
		if err := l.send(m); err != nil {
			t.Fatal(err)
		}
	}
	for i, want := range []int{2, 4, 0, 1, 3} {
		if got := l.next(); got.Type() != sent[want].Type() {
			t.Fatalf("message %d is %T, want %T", i, got, sent[want])
		}
	}
}

// While the writer is busy, chunks of one job that belong together become one.
// None is held back for that, and the sender's bytes stay what they are.
func TestWaitingChunksAreJoined(t *testing.T) {
	l := newLink(nil, nil)
	a, b := receipt.NewJobID(), receipt.NewJobID()
	send := func(job receipt.JobID, offset int64, data []byte) {
		t.Helper()
		if err := l.send(&wire.Chunk{Job: job, Offset: offset, Data: data}); err != nil {
			t.Fatal(err)
		}
	}
	expect := func(job receipt.JobID, offset int64, data string) {
		t.Helper()
		m := l.next()
		if c, ok := m.(*wire.Chunk); !ok || c.Job != job || c.Offset != offset || string(c.Data) != data {
			t.Fatalf("got %+v, want %d bytes at %d of %s", m, len(data), offset, job)
		}
		l.bytes -= weight(m)
	}
	body := []byte("0123456789")
	send(a, 0, body[:2])
	expect(a, 0, "01") // nothing waits for company
	send(a, 2, body[2:4])
	send(b, 0, body[:1])
	send(a, 4, body[4:5])
	send(a, 5, []byte("abc"))
	send(b, 1, body[1:2])
	send(a, 9, body[9:]) // a gap
	send(a, 0, body[:1]) // and once more from the beginning
	send(a, 1, body[1:2])
	expect(a, 2, "234abc")
	expect(b, 0, "01")
	expect(a, 9, "9")
	expect(a, 0, "01")
	if string(body) != "0123456789" {
		t.Errorf("the sender's bytes are now %q", body)
	}
	// A chunk that has been taken does not grow any more, and none without end.
	large := make([]byte, maxJoined-1)
	send(a, 2, large)
	send(a, 2+int64(len(large)), body[:2])
	expect(a, 2, string(large))
	expect(a, 2+int64(len(large)), "01")
	if l.bytes != 0 || len(l.tails) != 0 {
		t.Errorf("%d bytes and %d jobs wait when nothing does", l.bytes, len(l.tails))
	}
}

// A stream arrives whole and in order, whatever was joined on the way.
func TestJoinedChunksArrive(t *testing.T) {
	id := receipt.NewJobID()
	const count, size = 3000, 100
	got := make(chan []byte, 1)
	n := newNetwork(t, func(p *peer) {
		p.welcome()
		var all []byte
		for len(all) < count*size {
			c, ok := p.next().(*wire.Chunk)
			if !ok || c.Job != id || c.Offset != int64(len(all)) {
				p.t.Errorf("chunk %+v after %d bytes", c, len(all))
				break
			}
			all = append(all, c.Data...)
		}
		got <- all
		p.end()
	})
	h := newRecorder()
	s := New(config(n), h)
	run(t, s)
	get(t, h.opened)
	var want []byte
	for i := range count {
		data := bytes.Repeat([]byte{byte(i)}, size)
		for {
			err := s.Send(&wire.Chunk{Job: id, Offset: int64(len(want)), Data: data})
			if err == nil {
				break
			}
			if !errors.Is(err, ErrFull) {
				t.Fatal(err)
			}
			runtime.Gosched()
		}
		want = append(want, data...)
	}
	if !bytes.Equal(get(t, got), want) {
		t.Error("the stream has changed")
	}
}

// A session does not outlive the trust in the key that signed its welcome,
// whether the network goes on talking or not.
func TestKeyIsRevoked(t *testing.T) {
	for _, talks := range []bool{true, false} {
		t.Run(fmt.Sprintf("talks=%v", talks), func(t *testing.T) {
			var revoked atomic.Bool
			codes := make(chan int, 100)
			talk := make(chan struct{}, 1)
			n := newNetwork(t, func(p *peer) {
				p.welcome()
				if talks {
					<-talk
					p.send(&wire.Update{})
				}
				codes <- p.end()
			})
			cfg := config(n)
			cfg.Trusted = func(a evm.Address) bool { return a == networkKey.Address() && !revoked.Load() }
			cfg.Ping = time.Hour
			if !talks {
				cfg.Ping = 10 * time.Millisecond
			}
			cfg.Dead = wait
			cfg.Delays = []time.Duration{time.Hour}
			h := newRecorder()
			s := New(cfg, h)
			run(t, s)
			get(t, h.opened)
			revoked.Store(true)
			talk <- struct{}{}
			err := get(t, h.closed)
			if !errors.Is(err, wire.ErrRevoked) || hopeless(err) || !strings.Contains(err.Error(), networkKey.Address().Hex()) {
				t.Errorf("Closed(%v), want ErrRevoked with the key, and another attempt soon", err)
			}
			if got := get(t, codes); got != 1008 {
				t.Errorf("the network was told %d, want 1008", got)
			}
			if s.Stats().FrameErrors["revoked"] == 0 || len(h.messages) != 0 {
				t.Errorf("Stats = %+v, %d messages", s.Stats(), len(h.messages))
			}
		})
	}
}

// A peer that answers our close frame at once does not seem to have ended the
// session itself.
func TestRefusalIsTheReason(t *testing.T) {
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		conn, err := new(websocket.Upgrader).Upgrade(w, r, nil)
		if err != nil {
			t.Error(err)
			return
		}
		defer conn.Close()
		_, _, _ = conn.ReadMessage() // answers the close frame
	}))
	defer server.Close()
	raw := new(answered)
	d := websocket.Dialer{NetDial: func(network, addr string) (_ net.Conn, err error) {
		raw.Conn, err = net.Dial(network, addr)
		return raw, err
	}}
	conn, _, err := d.Dial("ws"+strings.TrimPrefix(server.URL, "http"), nil)
	if err != nil {
		t.Fatal(err)
	}
	conn.SetCloseHandler(func(int, string) error { return nil })
	l := newLink(conn, &liveConn{Conn: raw})
	var read error
	raw.after = func() { // our close frame has been written: the reader is faster than the rest of refuse
		raw.after = nil
		_, _, err := conn.NextReader()
		read = l.why(err)
	}
	if err := New(Config{}, nil).refuse(l, wire.ErrRevoked); !errors.Is(err, wire.ErrRevoked) || !errors.Is(read, wire.ErrRevoked) {
		t.Errorf("refuse says %v, the reader %v, want ErrRevoked of both", err, read)
	}
}

// answered calls after when something has been written.
type answered struct {
	net.Conn
	after func()
}

func (c *answered) Write(b []byte) (int, error) {
	n, err := c.Conn.Write(b)
	if c.after != nil {
		c.after()
	}
	return n, err
}

// Before the network has shown who it is, it hears hello and nothing else.
func TestStopBeforeWelcome(t *testing.T) {
	seen, codes := make(chan wire.Message, 1), make(chan int, 1)
	n := newNetwork(t, func(p *peer) {
		seen <- p.next()
		_, _, err := p.conn.ReadMessage()
		var c *websocket.CloseError
		if !errors.As(err, &c) {
			c = &websocket.CloseError{}
		}
		codes <- c.Code
	})
	stop := run(t, New(config(n), newRecorder()))
	if _, ok := get(t, seen).(*wire.Hello); !ok {
		t.Error("no hello")
	}
	stop()
	if got := get(t, codes); got != websocket.CloseNormalClosure {
		t.Errorf("closed with %d, want %d", got, websocket.CloseNormalClosure)
	}
}

// A welcome that is not the network's opens nothing.
func TestWelcomeIsRefused(t *testing.T) {
	for name, frame := range map[string]func(*peer) []byte{
		"another signer":      func(p *peer) []byte { return sealed(p, otherKey, p.agreed, wire.ToNode) },
		"our own hello":       func(p *peer) []byte { return sealed(p, nodeKey, p.agreed, wire.ToNetwork) },
		"our key, their word": func(p *peer) []byte { return sealed(p, nodeKey, p.agreed, wire.ToNode) },
		"a tag": func(p *peer) []byte {
			f := p.seal(&wire.Welcome{})
			return append(make([]byte, 32), f[65:]...)
		},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNetwork(t, func(p *peer) {
				p.next()
				p.write(frame(p))
				p.end()
			})
			h := newRecorder()
			s := New(config(n), h)
			run(t, s)
			if err := get(t, h.closed); !errors.Is(err, wire.ErrSigner) {
				t.Errorf("Closed(%v), want ErrSigner", err)
			}
			if len(h.opened) != 0 || s.Stats().FrameErrors["signer"] == 0 {
				t.Errorf("opened %d times, Stats = %+v", len(h.opened), s.Stats())
			}
		})
	}
}

func sealed(p *peer, k *evm.Key, of *wire.Session, d wire.Direction) []byte {
	f, err := wire.NewSealer(k, of, d, time.Now).Seal(nil, &wire.Welcome{})
	if err != nil {
		p.t.Error(err)
	}
	return f
}

// A message that is too large is the sender's fault and nobody else's.
func TestAMessageThatCannotBeSent(t *testing.T) {
	seen := make(chan wire.Message, 10)
	n := newNetwork(t, func(p *peer) {
		p.welcome()
		seen <- p.next()
	})
	h := newRecorder()
	s := New(config(n), h)
	run(t, s)
	get(t, h.opened)
	for _, m := range []wire.Message{&wire.Result{Job: receipt.NewJobID(), Response: make([]byte, wire.MaxFrame)}, &wire.Result{Job: receipt.NewJobID()}} {
		if err := s.Send(m); err != nil {
			t.Fatal(err)
		}
	}
	if r, ok := get(t, seen).(*wire.Result); !ok || len(r.Response) != 0 {
		t.Error("the small one did not arrive next")
	}
}

func TestComesBackWhateverHowItEnded(t *testing.T) {
	round := make(chan int, 1)
	round <- 0
	n := newNetwork(t, func(p *peer) {
		i := <-round
		defer func() { round <- i + 1 }()
		p.welcome()
		switch i % 3 {
		case 0:
			_ = p.conn.WriteControl(websocket.CloseMessage, websocket.FormatCloseMessage(websocket.CloseServiceRestart, "restart"), time.Now().Add(wait))
		case 1: // just gone
		case 2:
			_ = p.conn.NetConn().Close()
		}
	})
	h := newRecorder()
	s := New(config(n), h)
	run(t, s)
	for range 9 {
		get(t, h.opened)
		get(t, h.closed)
	}
	if st := s.Stats(); st.Opened < 9 || len(st.FrameErrors) != 0 {
		t.Errorf("Stats = %+v", st)
	}
}

// The network is usually the first to see that the clocks differ.
func TestTheNetworkSaysThatTheClockIsWrong(t *testing.T) {
	n := newNetwork(t, func(p *peer) {
		p.next()
		text := fmt.Errorf("%w: 1m0s apart", wire.ErrClock).Error()
		_ = p.conn.WriteControl(websocket.CloseMessage, websocket.FormatCloseMessage(1008, text), time.Now().Add(wait))
	})
	h := newRecorder()
	run(t, New(config(n), h))
	if err := get(t, h.closed); !errors.Is(err, wire.ErrClock) || !strings.Contains(err.Error(), "timedatectl") {
		t.Errorf("Closed(%v), want ErrClock with its remedy", err)
	}
}

// A server that takes the connection and then does nothing.
func TestDeadServer(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	accepted := make(chan net.Conn, 100)
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				close(accepted)
				return
			}
			accepted <- c
		}
	}()
	defer func() {
		ln.Close()
		for c := range accepted {
			c.Close()
		}
	}()
	n := newNetwork(t, nil)
	cfg := config(n)
	cfg.URL = "wss://" + ln.Addr().String()
	t.Run("stop while it hangs", func(t *testing.T) {
		s := New(cfg, newRecorder())
		s.patience.dial = time.Hour
		stop := run(t, s)
		c := get(t, accepted)
		defer c.Close()
		stop() // returns well before the patience ends
	})
	t.Run("stop while only HTTP hangs", func(t *testing.T) {
		asked, release := make(chan struct{}, 1), make(chan struct{})
		n := newNetwork(t, nil)
		n.reply = func(http.ResponseWriter, *http.Request) bool {
			asked <- struct{}{}
			<-release
			return true
		}
		defer close(release)
		s := New(config(n), newRecorder())
		s.patience.dial = time.Hour
		stop := run(t, s)
		get(t, asked)
		stop()
	})
	t.Run("patience ends", func(t *testing.T) {
		h := newRecorder()
		s := New(cfg, h)
		s.patience.dial = 20 * time.Millisecond
		run(t, s)
		defer get(t, accepted).Close()
		if err := get(t, h.closed); !errors.Is(err, context.DeadlineExceeded) && !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("Closed(%v), want a time-out", err)
		}
	})
}

// A peer that answers no goodbye does not hold up the end.
func TestStopDoesNotWaitForThePeer(t *testing.T) {
	release := make(chan struct{})
	n := newNetwork(t, func(p *peer) {
		p.welcome()
		<-release
	})
	defer close(release)
	cfg := config(n)
	cfg.Dead = time.Hour
	h := newRecorder()
	s := New(cfg, h)
	s.patience.leave = 50 * time.Millisecond
	stop := run(t, s)
	get(t, h.opened)
	for range 7 {
		if err := s.Send(&wire.Result{Response: make([]byte, 1<<20)}); err != nil {
			t.Fatal(err)
		}
	}
	stop()
}

func TestUntrustedTLS(t *testing.T) {
	n := newNetwork(t, nil)
	cfg := config(n)
	cfg.TLS = nil
	h := newRecorder()
	run(t, New(cfg, h))
	err := get(t, h.closed)
	t.Logf("expected: an error about the certificate; got: %v", err)
	if !strings.Contains(err.Error(), "certificate") {
		t.Errorf("Closed(%v), want an error about the certificate", err)
	}
}

func TestOldTLS(t *testing.T) {
	n := newNetwork(t, nil)
	n.Close()
	n.Server = httptest.NewUnstartedServer(http.NotFoundHandler())
	n.TLS = tls12()
	n.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, 0)
	n.StartTLS()
	defer n.Close()
	h := newRecorder()
	run(t, New(config(n), h))
	err := get(t, h.closed)
	t.Logf("expected: an error about the version of TLS; got: %v", err)
	if !strings.Contains(err.Error(), "protocol version") {
		t.Errorf("Closed(%v), want an error about the version of TLS", err)
	}
}

func TestAddress(t *testing.T) {
	for _, bad := range []string{"", "ws://h", "https://h", "wss://", "wss://u@h", "wss://h?q", "wss://h#f", "wss://h:x", "://"} {
		if got, err := endpoint(bad, "wss", "/p"); err == nil {
			t.Errorf("endpoint(%q) = %q, want an error", bad, got)
		}
	}
	for base, want := range map[string]string{"wss://h": "wss://h/p/q", "wss://h:1/": "wss://h:1/p/q", "wss://h/a/b/": "wss://h/a/b/p/q"} {
		if got, err := endpoint(base, "wss", "/p/q"); err != nil || got != want {
			t.Errorf("endpoint(%q) = %q, %v; want %q", base, got, err, want)
		}
	}
}

func TestBackoff(t *testing.T) {
	delays := []time.Duration{time.Second, 10 * time.Second, time.Minute}
	down := errors.New("connection refused")
	within := func(d, want time.Duration) {
		t.Helper()
		if d < want/2 || d >= want/2+want {
			t.Errorf("waits %v, want about %v", d, want)
		}
	}
	b := backoff{delays: delays}
	for _, want := range []time.Duration{time.Second, 10 * time.Second, time.Minute, time.Minute} {
		within(b.next(0, down), want)
	}
	within(b.next(healthy-1, down), time.Minute) // a session that ends at once is no success
	within(b.next(healthy, down), time.Second)
	within(b.next(0, down), 10*time.Second)
	for _, err := range []error{ErrNotRegistered, ErrWrongNetwork, ErrProtocol, wire.ErrSigner} {
		b := backoff{delays: delays, act: time.Hour}
		within(b.next(0, fmt.Errorf("x: %w", err)), time.Hour)
	}
	// Nodes that lost the same network do not come back together.
	seen := map[time.Duration]bool{}
	for range 100 {
		b := backoff{delays: delays}
		seen[b.next(0, down)] = true
	}
	if len(seen) < 50 {
		t.Errorf("only %d different delays of 100", len(seen))
	}
}

// BenchmarkChunks is the time of a token of 200 B of some streams that go as fast
// as they can, and how many frames it takes, each of which is one write.
func BenchmarkChunks(b *testing.B) {
	for _, streams := range []int{1, 4, 16} {
		b.Run(fmt.Sprintf("streams=%d", streams), func(b *testing.B) {
			last := make(chan int, 1)
			n := newNetwork(b, func(p *peer) {
				p.welcome()
				for frames := 0; ; frames++ {
					switch m := p.next().(type) {
					case *wire.Chunk:
					case *wire.Result:
						last <- frames
					case *wire.Bye, nil:
						return
					default:
						p.t.Errorf("got %T", m)
					}
				}
			})
			h := newRecorder()
			s := New(config(n), h)
			stop := run(b, s)
			defer stop()
			get(b, h.opened)
			jobs := make([]receipt.JobID, streams)
			for i := range jobs {
				jobs[i] = receipt.NewJobID()
			}
			offsets := make([]int64, streams)
			token := make([]byte, 200)
			i := 0
			for b.Loop() {
				k := i % streams
				for errors.Is(s.Send(&wire.Chunk{Job: jobs[k], Offset: offsets[k], Data: token}), ErrFull) {
					runtime.Gosched()
				}
				offsets[k] += int64(len(token))
				i++
			}
			if err := s.Send(&wire.Result{Job: jobs[0]}); err != nil {
				b.Fatal(err)
			}
			b.ReportMetric(float64(get(b, last))/float64(i), "frames/op")
		})
	}
}

// A batch of logs goes out when nothing else waits, there is one at a time, and
// none follows goodbye.
func TestLogsComeLast(t *testing.T) {
	l := newLink(nil, &liveConn{})
	l.opened = true
	for _, m := range []wire.Message{&wire.Logs{}, &wire.Result{}, &wire.Heartbeat{}} {
		if err := l.send(m); err != nil {
			t.Fatal(err)
		}
	}
	if err := l.send(&wire.Logs{}); !errors.Is(err, ErrFull) {
		t.Errorf("a second batch: %v", err)
	}
	for _, want := range []wire.Type{"heartbeat", "result", "logs"} {
		if m := l.next(); m.Type() != want {
			t.Errorf("%s goes out before %s", m.Type(), want)
		}
	}
	if err := l.send(&wire.Logs{}); err != nil {
		t.Fatal(err)
	}
	l.mu.Lock()
	l.low, l.leaving = nil, true // as goodbye does
	l.mu.Unlock()
	if m := l.next(); m != nil {
		t.Errorf("%s after goodbye", m.Type())
	}
}
