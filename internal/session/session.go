// Package session owns the node's one connection to its network: the
// registration over HTTPS and the WebSocket, as package wire specifies them.
//
// The rule it keeps: nothing that arrives has an effect before its frame has
// been checked, and whatever is wrong with a frame ends the connection. The
// read loop never waits for anything that is sent. A connection that is
// silently cut is noticed by the silence, within [Config.Dead].
//
// What may be sent is of four classes. Small messages always find room; a peer
// that lets too many of them pile up is cut off. A result waits for room. A
// chunk is refused when there is none: the result that follows holds its bytes. A batch
// of logs goes out when nothing else waits, and there is one at a time.
package session

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net/http"
	"sync"
	"time"

	"github.com/gorilla/websocket"

	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/evm"
	"github.com/resultity/node/internal/wire"
)

// Errors that a caller acts on.
var (
	// ErrNotConnected says that a message was not sent, since there is no
	// session, or since it ended.
	ErrNotConnected = errors.New("not connected to the network")

	// ErrFull says that a chunk was not sent, since too much waits already.
	ErrFull = errors.New("too much waits to be sent")

	// ErrNotRegistered says that the network does not know this node.
	ErrNotRegistered = errors.New("the network does not know this node; register it, or ask the network's operator")

	// ErrWrongNetwork says that the address is that of another network.
	ErrWrongNetwork = errors.New("the address belongs to a network of another name; check the name and the url of its table in agent.toml")

	// ErrCloned says that the network has seen a later hello of this key.
	ErrCloned = errors.New("cloned key: another machine has used this node's key, or this one was set back to an older state")

	// ErrBlamed says that the network has ended the session for a frame of ours.
	ErrBlamed = errors.New("the network does not take what this node sends")

	// ErrSilent says that nothing was heard of the network for too long.
	ErrSilent = errors.New("the network has gone silent")

	// ErrProtocol says that the network does not keep to the protocol.
	ErrProtocol = errors.New("the network does not speak " + wire.Subprotocol)
)

// What a session, a registration and a binding need of whoever holds the node's
// key; package signer has the methods' meaning.
type (
	helloSigner interface {
		Hello(wire.Terms, wire.Hello, time.Time) ([]byte, error)
	}
	registrationSigner interface {
		Registration(*wire.Registration) ([]byte, error)
	}
	bindingSigner interface {
		Binding(*wire.BindRequest) ([]byte, error)
	}
)

// Handler is told what happens. Its methods are called one at a time, from the
// read loop: while one runs, nothing is read.
type Handler interface {
	// Opened follows the handshake; from here on Send works.
	Opened()
	// Message takes each message but the first.
	Message(wire.Message)
	// Closed follows Opened, or an attempt that failed, unless Run is ending.
	// There is another attempt in any case.
	Closed(err error)
}

// Config says how to connect. Fields from Config.Config on may be left zero.
type Config struct {
	URL     string // wss://host[:port][/path], without the protocol's own path
	Network string
	Node    evm.Address
	Key     helloSigner            // the node's
	Trusted func(evm.Address) bool // may this key sign for the network? Asked again for each frame and each ping, so that a session ends with its key
	Agent   string                 // version
	TLS     *tls.Config
	Log     *slog.Logger
	Now     func() time.Time

	Config      func() digest.Digest // of the verified snapshot, said in hello
	ClockWindow func() time.Duration // how far clocks may differ; 0 stands for 30 s
	Ping        time.Duration        // interval of WebSocket pings; 5 s
	Dead        time.Duration        // silence that ends a session; three pings
	Delays      []time.Duration      // between attempts; the last one goes on
}

// patience says how long things may take.
type patience struct {
	dial    time.Duration // to the 101 reply
	welcome time.Duration // from hello to welcome
	write   time.Duration // for a write to move on, if Config.Dead is not longer
	leave   time.Duration // to say what is queued, and goodbye
	act     time.Duration // between attempts that cannot succeed unless somebody acts
}

var usual = patience{dial: 15 * time.Second, welcome: 10 * time.Second, write: 10 * time.Second, leave: 2 * time.Second, act: time.Minute}

// healthy is how long a session lasts that makes the delays begin anew.
const healthy = 10 * time.Second

// defaultDelays begin within the time that a network keeps a node's jobs for it,
// and end where a large network still has room for all of its nodes at once.
var defaultDelays = []time.Duration{
	500 * time.Millisecond, time.Second, 2 * time.Second, 4 * time.Second, 8 * time.Second, 15 * time.Second,
}

// Session holds the connection while Run runs. Safe for concurrent use.
type Session struct {
	cfg      Config
	h        Handler
	patience patience

	mu      sync.Mutex // guards what follows; never held while anything blocks
	current *link      // after the handshake, else nil
	stats   Stats
	ahead   *time.Duration // nil before the first frame
}

// Ahead is how far this machine's clock was ahead of the network's at the last
// frame, as far as the way of the frame does not blur that; nil before the first.
func (s *Session) Ahead() *time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.ahead
}

// Stats counts since the start.
type Stats struct {
	Connected   bool
	Opened      uint64            // sessions
	Dropped     uint64            // chunks that found no room
	FrameErrors map[string]uint64 // frames that ended a session, by kind
}

// New makes a session that is not connected.
func New(cfg Config, h Handler) *Session {
	if cfg.Config == nil {
		cfg.Config = func() digest.Digest { return digest.Digest{} }
	}
	if cfg.ClockWindow == nil {
		cfg.ClockWindow = func() time.Duration { return 0 }
	}
	if cfg.Ping == 0 {
		cfg.Ping = 5 * time.Second
	}
	if cfg.Dead == 0 {
		cfg.Dead = 3 * cfg.Ping
	}
	if cfg.Delays == nil {
		cfg.Delays = defaultDelays
	}
	return &Session{cfg: cfg, h: h, patience: usual, stats: Stats{FrameErrors: map[string]uint64{}}}
}

// Stats returns the counts.
func (s *Session) Stats() Stats {
	s.mu.Lock()
	defer s.mu.Unlock()
	st := s.stats
	st.Connected = s.current != nil
	st.FrameErrors = maps.Clone(st.FrameErrors)
	return st
}

// Send queues a message, in the order of calls for chunks and results, and for
// all others. It fails with [ErrNotConnected], and for a chunk with [ErrFull].
// For a result it waits until there is room; a session whose peer does not take
// what is sent ends soon, so this does not take long. That a message was queued
// does not mean that it arrives.
func (s *Session) Send(m wire.Message) error {
	s.mu.Lock()
	l := s.current
	s.mu.Unlock()
	if l == nil {
		return ErrNotConnected
	}
	err := l.send(m)
	if errors.Is(err, ErrFull) {
		s.mu.Lock()
		s.stats.Dropped++
		s.mu.Unlock()
	}
	return err
}

// Run connects, and connects again, until ctx ends. Then it says what is queued
// and goodbye, and returns nil. It owns every goroutine it starts; none
// outlives it.
func (s *Session) Run(ctx context.Context) error {
	b := backoff{delays: s.cfg.Delays, act: s.patience.act}
	for {
		lasted, err := s.once(ctx)
		if ctx.Err() != nil {
			return nil
		}
		s.h.Closed(err)
		timer := time.NewTimer(b.next(lasted, err))
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil
		case <-timer.C:
		}
	}
}

// backoff chooses how long to wait before the next attempt.
type backoff struct {
	delays []time.Duration
	act    time.Duration // after a hopeless attempt
	try    int
}

// next follows an attempt that ended with err after a session of lasted, 0 for
// none.
func (b *backoff) next(lasted time.Duration, err error) time.Duration {
	if lasted >= healthy {
		b.try = 0
	}
	d := b.delays[min(b.try, len(b.delays)-1)]
	b.try++
	if hopeless(err) {
		d = b.act
	}
	return d/2 + rand.N(d) // nodes must not come back as a herd
}

// hopeless says that waiting alone mends nothing. It is tried again all the
// same, slowly: somebody may register the node or change the configuration without
// telling this agent. A wrong clock is none of these: time synchronisation sets it
// right, soon after a boot most often, and the node is not to miss that.
func hopeless(err error) bool {
	for _, e := range []error{ErrNotRegistered, ErrWrongNetwork, ErrProtocol, ErrCloned, wire.ErrSigner} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// once holds one session, and returns how long it lasted and why it ended.
func (s *Session) once(ctx context.Context) (lasted time.Duration, err error) {
	l, agreed, err := s.dial(ctx)
	if err != nil {
		return 0, err
	}
	// The order is that of death: whatever ends the link ends the reader, and
	// then nothing is left that could use it.
	var wg sync.WaitGroup
	defer wg.Wait()
	defer func() { l.end(err) }()
	wg.Go(func() {
		if err := l.write(wire.NewNodeSealer(s.cfg.Key.Hello, agreed, s.cfg.Now), s.cfg.Log); err != nil {
			l.end(err)
		}
	})
	wg.Go(func() { l.ping(s.cfg.Ping, func() { s.trust(l) }) })
	defer context.AfterFunc(ctx, func() { l.goodbye(s.patience.leave) })()

	window := cmp.Or(s.cfg.ClockWindow(), 30*time.Second)
	opener := wire.NewOpener(s.cfg.Trusted, agreed, wire.ToNode, window)
	if err := l.send(&wire.Hello{Agent: s.cfg.Agent, Config: s.cfg.Config()}); err != nil {
		return 0, err
	}
	late := time.AfterFunc(s.patience.welcome, func() { l.end(errNoWelcome) })
	defer late.Stop()
	m, err := s.read(l, opener)
	if err != nil {
		return 0, err
	}
	if _, ok := m.(*wire.Welcome); !ok {
		return 0, s.refuse(l, errOrder)
	}
	late.Stop()
	l.conn.SetReadLimit(wire.MaxFrame)
	l.open(opener.Signer())

	start := time.Now()
	s.mu.Lock()
	s.current = l
	s.stats.Opened++
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		s.current = nil
		s.mu.Unlock()
		lasted = time.Since(start)
	}()
	s.h.Opened()
	for {
		m, err := s.read(l, opener)
		if err != nil {
			return 0, err
		}
		if _, again := m.(*wire.Welcome); again {
			return 0, s.refuse(l, errOrder)
		}
		s.h.Message(m)
	}
}

var (
	errNoWelcome = errors.New("the network did not answer hello in time")
	errOrder     = errors.New("not the time for this message")
	errNotBinary = errors.New("not a binary message")
)

// kinds name what can be wrong with a frame.
var kinds = []struct {
	err  error
	name string
	code int // of the close frame
}{
	{wire.ErrTooLarge, "too_large", websocket.CloseMessageTooBig},
	{websocket.ErrReadLimit, "too_large", websocket.CloseMessageTooBig},
	{wire.ErrSigner, "signer", websocket.ClosePolicyViolation},
	{wire.ErrTag, "tag", websocket.ClosePolicyViolation},
	{wire.ErrRevoked, "revoked", websocket.ClosePolicyViolation},
	{wire.ErrSequence, "sequence", websocket.ClosePolicyViolation},
	{wire.ErrClock, "clock", websocket.ClosePolicyViolation},
	{wire.ErrMalformed, "malformed", websocket.ClosePolicyViolation},
	{errNotBinary, "malformed", websocket.ClosePolicyViolation},
	{errOrder, "order", websocket.ClosePolicyViolation},
}

// Refusal names in one word what was refused when a session ended, or did not begin:
// by this node, a frame of the network's, or else by the network, this node. An end
// that nobody has refused anything at has no word.
func Refusal(err error) (word string, byNode bool) {
	for _, no := range []struct {
		err  error
		word string
	}{
		{ErrCloned, "cloned"}, {ErrNotRegistered, "not_registered"}, {ErrWrongNetwork, "wrong_network"}, {ErrProtocol, "protocol"}, {ErrBlamed, "blamed"},
	} {
		if errors.Is(err, no.err) {
			return no.word, false
		}
	}
	if s, ok := errors.AsType[*StatusError](err); ok && s.Status < http.StatusInternalServerError {
		return "refused", false
	}
	for _, k := range kinds {
		if errors.Is(err, k.err) && k.err != wire.ErrRevoked { // that is what keys are replaced for
			return k.name, true
		}
	}
	return "", false
}

// read returns the next message that has been checked.
func (s *Session) read(l *link, opener *wire.Opener) (wire.Message, error) {
	typ, r, err := l.conn.NextReader()
	begun := s.cfg.Now()
	var frame []byte
	if err == nil {
		frame, err = io.ReadAll(r) // bounded by the connection's read limit
	}
	if err != nil {
		if errors.Is(err, websocket.ErrReadLimit) {
			return nil, s.refuse(l, err)
		}
		return nil, l.why(err)
	}
	if typ != websocket.BinaryMessage {
		return nil, s.refuse(l, errNotBinary)
	}
	m, err := opener.Open(frame, begun)
	if err == nil || errors.Is(err, wire.ErrClock) {
		s.mu.Lock()
		s.ahead = new(opener.Ahead())
		s.mu.Unlock()
	}
	if err != nil {
		return nil, s.refuse(l, err)
	}
	return m, nil
}

// trust ends a session whose key is not trusted any more, also of a network that
// says nothing. The reader returns why.
func (s *Session) trust(l *link) {
	if signer, opened := l.signer(); opened && !s.cfg.Trusted(signer) {
		_ = s.refuse(l, fmt.Errorf("%w: %s", wire.ErrRevoked, signer))
	}
}

// refuse counts a frame that ends the session and tells the peer.
func (s *Session) refuse(l *link, err error) error {
	l.blame(err)
	for _, k := range kinds {
		if !errors.Is(err, k.err) {
			continue
		}
		s.mu.Lock()
		s.stats.FrameErrors[k.name]++
		s.mu.Unlock()
		text := err.Error()
		l.closeFrame(k.code, text[:min(len(text), 120)]) // what fits into a close frame
		break
	}
	l.end(err)
	return err
}
