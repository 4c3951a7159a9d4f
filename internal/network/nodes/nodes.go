// Package nodes owns the network's side of a node's connection: registration,
// its binding to an account, and the WebSocket session.
//
// The rule it keeps: nothing that a node says has an effect before its frame
// has been checked, and no node can hold up another. Each session has a reader
// and a writer of its own; what is sent to it waits in a bounded queue, and a
// session that does not keep up ends. Whatever is wrong with a frame ends its
// session too: after that, nothing the peer says can be placed.
//
// What all may take together is bounded, too: beyond a number of large frames in
// arrival the next ones are not read until there is a place, each within a bound of
// time; and while some wait, who has a place and is slow loses it (see places).
//
// Nor can a stranger: what is done for somebody who has not shown a node's key
// is bounded for each source, and those who wait to show it have a room of their
// own. When it is full, who waited longest goes, since a node says hello at once.
package nodes

import (
	"container/list"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/gorilla/websocket"

	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/evm"
	"github.com/resultity/node/internal/failpoint"
	"github.com/resultity/node/internal/journal"
	"github.com/resultity/node/internal/network/classes"
	"github.com/resultity/node/internal/network/dispatch"
	"github.com/resultity/node/internal/network/metrics"
	"github.com/resultity/node/internal/network/mirror"
	"github.com/resultity/node/internal/network/store"
	"github.com/resultity/node/internal/sandbox/record"
	"github.com/resultity/node/internal/wire"
)

// registry is who may connect.
type registry interface {
	Node(context.Context, evm.Address) (store.Node, error)
	PutLogs(context.Context, *wire.LogBatch, *wire.Logs) (position uint64, err error)
	PutSandbox(context.Context, *record.Signed) error
	Sandbox(context.Context, digest.Digest) (*record.Signed, error)
	Register(ctx context.Context, n store.Node, token string, now time.Time) (store.Node, error)
	RegisterUnbound(ctx context.Context, n store.Node, now time.Time) (store.Node, error)
	UpdateNode(context.Context, evm.Address, func(*store.Node) error) (store.Node, error)
	TokenAccount(ctx context.Context, token string, node evm.Address, now time.Time) (account, name string, err error)
	EmailAccount(ctx context.Context, email string, now time.Time) (store.EmailAccount, error)
}

// desk is who orders nodes to do something.
type desk interface {
	Connected(evm.Address)
	Done(context.Context, evm.Address, *wire.OrderDone) (expected bool, err error)
}

// Bounds of what somebody may take before the network knows who they are.
const (
	maxHello     = 16 << 10         // bytes of the first frame
	helloTimeout = 10 * time.Second // from the upgrade to the first frame
)

// Options bound the sessions. The zero value of a field stands for its default.
type Options struct {
	MaxArriving int           // bytes of frames above 20 KiB in arrival; default 768 MiB. More of them wait
	MaxSessions int           // nodes at once, after hello; default 16384
	MaxWaiting  int           // connections before hello; default 1024, of which one source may have a sixteenth
	Ping        time.Duration // interval of WebSocket pings; default 15 s. Three of them without a sign of life end a session
	Open        bool          // nodes may register without an enrolment token
	Outbox      Outbox        // sends codes; nil for a network that sends no mail
}

// Manager holds the sessions. Its handlers may be used from the moment it is
// made; sessions end when Run's context does.
type Manager struct {
	registry registry
	dispatch *dispatch.Dispatcher
	orders   desk
	mirror   *mirror.Mirror
	key      *evm.Key // signs what goes to the nodes
	version  string
	metrics  *metrics.Metrics
	log      *slog.Logger
	opt      Options

	upgrader websocket.Upgrader
	limits   limits
	medium   *places // of the frames that arrive or are handled
	large    *places // likewise
	codes    Codes
	counts   *counts
	classes  *classes.Book

	// joining is held for reading from the look at a node's binding until dispatch
	// knows it, and for writing while dispatch is told of a change: so none is missed.
	joining sync.RWMutex

	wg sync.WaitGroup // sessions

	// mu guards what follows, for the length of a map operation.
	mu       sync.Mutex
	closing  bool
	sessions map[*session]struct{}
	current  map[evm.Address]*session // after hello
	waiting  *list.List               // of *session, before hello; oldest first
	waitsOf  map[netip.Prefix]int     // by source
}

// New makes a manager.
func New(r registry, d *dispatch.Dispatcher, o desk, logs *mirror.Mirror, key *evm.Key, version string, m *metrics.Metrics, log *slog.Logger, opt Options) *Manager {
	if opt.MaxSessions == 0 {
		opt.MaxSessions = 16384
	}
	if opt.MaxWaiting == 0 {
		opt.MaxWaiting = 1024
	}
	if opt.MaxArriving == 0 {
		opt.MaxArriving = 768 << 20
	}
	if opt.Ping == 0 {
		opt.Ping = 15 * time.Second
	}
	return &Manager{
		registry: r, dispatch: d, orders: o, mirror: logs, key: key, version: version, metrics: m, log: log, opt: opt,
		upgrader: websocket.Upgrader{
			HandshakeTimeout: 10 * time.Second,
			Subprotocols:     []string{wire.Subprotocol},
			ReadBufferSize:   1 << 10,
			WriteBufferSize:  4 << 10,
			WriteBufferPool:  &sync.Pool{}, // an idle session holds no write buffer
			// Nodes are no browsers; a page that makes one connect is up to no good.
			CheckOrigin: func(r *http.Request) bool { return r.Header.Get("Origin") == "" },
		},
		limits: newLimits(), medium: newPlaces(opt.MaxArriving / 3 / mediumFrame), large: newPlaces(opt.MaxArriving * 2 / 3 / wire.MaxFrame), codes: NewCodes(key), counts: newCounts(), classes: classes.New(),
		sessions: map[*session]struct{}{}, current: map[evm.Address]*session{},
		waiting: list.New(), waitsOf: map[netip.Prefix]int{},
	}
}

// Run waits until ctx ends, then ends every session and waits for them.
func (m *Manager) Run(ctx context.Context) error {
	m.counts.keep(ctx, m.registry, m.log)
	m.mu.Lock()
	m.closing = true
	for s := range m.sessions {
		s.end(websocket.CloseGoingAway, "going_away", "the network service restarts")
	}
	m.mu.Unlock()
	m.wg.Wait()
	return nil
}

// Classes says which nodes answer otherwise than the others of their class.
func (m *Manager) Classes() *classes.Book { return m.classes }

// compare takes note of a node's fingerprint and points out who is the odd one. That
// is for people to look at: nobody is stopped by it.
func (m *Manager) compare(node evm.Address, beat *wire.Heartbeat) {
	for _, odd := range m.classes.Take(node, beat, time.Now()) {
		m.log.Warn("a node gives other golden answers than most of its determinism class", journal.NodeAnswersOdd.Attr(), "node", odd, "config", beat.Config, "class", beat.Class.Digest)
	}
}

// ServeRegister answers POST /node/v1/register.
func (m *Manager) ServeRegister(w http.ResponseWriter, r *http.Request) {
	reply, status, err := m.registerNode(w, r)
	m.metrics.Registrations.WithLabelValues(http.StatusText(status)).Inc()
	if err != nil {
		m.log.Warn("registration refused", journal.NodeRegistrationRefused.Attr(), "status", status, "from", r.RemoteAddr, "error", err)
		if status == http.StatusInternalServerError {
			err = errors.New("the network could not write it down; try again later")
		}
		if status == http.StatusTooManyRequests || status == http.StatusInternalServerError {
			w.Header().Set("Retry-After", "5")
		}
		http.Error(w, err.Error(), status)
		return
	}
	w.Header().Set("Content-Type", "application/octet-stream")
	failpoint.Here("nodes.register.answered")
	_, _ = w.Write(reply) // a node that has gone asks again
}

// body reads the small body of a request of a stranger, not too often.
func (m *Manager) body(w http.ResponseWriter, r *http.Request) ([]byte, error) {
	if !m.limits.asksOf.allow(Source(r.RemoteAddr)) || !m.limits.asks.Allow() { // who is over their own bound takes nothing of the others'
		return nil, refuse(http.StatusTooManyRequests, "too many requests; try again later")
	}
	raw, err := io.ReadAll(http.MaxBytesReader(w, r.Body, wire.MaxRegistration))
	if err != nil {
		return nil, refuse(http.StatusBadRequest, "read the request: %v", err)
	}
	return raw, nil
}

func (m *Manager) registerNode(w http.ResponseWriter, r *http.Request) (reply []byte, status int, err error) {
	ctx := r.Context()
	raw, err := m.body(w, r)
	if no, ok := errors.AsType[*refusal](err); ok {
		return nil, no.status, err
	}
	var reg wire.Registration
	signer, err := wire.OpenRegistration(raw, &reg)
	now, net := time.Now(), m.dispatch.Terms().Config.Network
	switch off := now.Sub(time.UnixMilli(reg.Time)).Abs(); {
	case errors.Is(err, wire.ErrSigner):
		return nil, http.StatusUnauthorized, err
	case err != nil:
		return nil, http.StatusBadRequest, err
	case signer != reg.Node:
		return nil, http.StatusUnauthorized, fmt.Errorf("registration of %s is signed by %s", reg.Node, signer)
	case reg.Network != net.Name:
		return nil, http.StatusConflict, fmt.Errorf("this is network %s, not %.64q", net.Name, reg.Network)
	case off > net.ClockWindow.Duration():
		return nil, http.StatusBadRequest, fmt.Errorf("clocks are %v apart, at most %v; check that the node keeps time (timedatectl)", off.Round(time.Millisecond), net.ClockWindow.Duration())
	case len(reg.Agent) > 128 || len(reg.Token) > 256:
		return nil, http.StatusBadRequest, errors.New("agent or token is too long")
	}
	n := store.Node{Address: reg.Node, Agent: reg.Agent}
	if m.opt.Open && reg.Token == "" {
		if _, known := m.registry.Node(ctx, reg.Node); errors.Is(known, store.ErrNotFound) &&
			!(m.limits.nodesOf.allow(Source(r.RemoteAddr)) && m.limits.nodes.Allow()) {
			return nil, http.StatusTooManyRequests, errors.New("too many new nodes without an enrolment token; try again in an hour")
		}
		n, err = m.registry.RegisterUnbound(ctx, n, now)
	} else {
		n, err = m.registry.Register(ctx, n, reg.Token, now)
	}
	if errors.Is(err, store.ErrToken) {
		return nil, http.StatusForbidden, err
	}
	if err != nil {
		return nil, http.StatusInternalServerError, err
	}
	m.log.Info("node registered", "node", n.Address, "account", n.Account, "agent", n.Agent)
	reply, err = wire.SealRegistration(m.key, &wire.Registered{Network: net.Name, Node: n.Address, Account: n.Account, Method: n.Method, Since: n.Since, Time: n.Registered})
	if err != nil {
		return nil, http.StatusInternalServerError, err
	}
	return reply, http.StatusOK, nil
}

// ServeSession answers GET /node/v1/session.
func (m *Manager) ServeSession(w http.ResponseWriter, r *http.Request) {
	own := wire.NewSecret()
	node, counted, agreed, status, err := m.admit(r, own)
	if err != nil {
		m.log.Warn("session refused", journal.NodeSessionRefused.Attr(), "status", status, "from", r.RemoteAddr, "error", err)
		http.Error(w, err.Error(), status)
		return
	}
	s := newSession(m, node, counted, agreed, r.RemoteAddr)
	if !m.add(s) {
		w.Header().Set("Retry-After", "5")
		http.Error(w, "too many nodes are connected, or the service is stopping", http.StatusServiceUnavailable)
		return
	}
	conn, err := m.upgrader.Upgrade(w, r, http.Header{wire.HeaderKey: {own.Public().String()}})
	if err != nil { // Upgrade has answered
		m.remove(s)
		m.log.Warn("session refused", journal.NodeSessionRefused.Attr(), "node", node, "from", r.RemoteAddr, "error", err)
		return
	}
	if conn.Subprotocol() != wire.Subprotocol {
		_ = conn.Close() // nothing was said on it
		m.remove(s)
		return
	}
	s.conn = conn
	go s.run() // the handler returns, and the HTTP server's buffers with it
}

// admit checks the request for a session and agrees on one. counted is the count
// of the node's last hello, as far as it was written down.
func (m *Manager) admit(r *http.Request, own *wire.Secret) (node evm.Address, counted uint64, agreed *wire.Session, status int, err error) {
	name := m.dispatch.Terms().Config.Network.Name
	if got := r.Header.Get(wire.HeaderNetwork); got != name {
		return node, 0, nil, http.StatusConflict, fmt.Errorf("this is network %s, not %.64q", name, got)
	}
	if node, err = evm.ParseAddress(r.Header.Get(wire.HeaderNode)); err != nil {
		return node, 0, nil, http.StatusBadRequest, fmt.Errorf("header %s: %w", wire.HeaderNode, err)
	}
	theirs, err := wire.ParsePublicKey(r.Header.Get(wire.HeaderKey))
	if err != nil {
		return node, 0, nil, http.StatusBadRequest, fmt.Errorf("header %s: %w", wire.HeaderKey, err)
	}
	if !slices.Contains(websocket.Subprotocols(r), wire.Subprotocol) {
		return node, 0, nil, http.StatusBadRequest, fmt.Errorf("want WebSocket subprotocol %s", wire.Subprotocol)
	}
	known, err := m.registry.Node(r.Context(), node)
	if errors.Is(err, store.ErrNotFound) {
		return node, 0, nil, http.StatusForbidden, fmt.Errorf("node %s is not registered", node)
	}
	if err != nil {
		return node, 0, nil, http.StatusServiceUnavailable, errors.New("the network cannot read its registry; try again later")
	}
	if agreed, err = own.Agree(name, node, theirs, own.Public()); err != nil {
		return node, 0, nil, http.StatusBadRequest, fmt.Errorf("header %s: %w", wire.HeaderKey, err)
	}
	return node, known.Hello, agreed, 0, nil
}

// add has a session wait for its hello; false when there are too many nodes.
// Those who wait do not count against nodes, and make room for one another.
func (m *Manager) add(s *session) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closing || m.full(s.node) {
		return false
	}
	oldest := m.waiting.Front()
	switch {
	case m.waitsOf[s.source] >= max(1, m.opt.MaxWaiting/16):
		for oldest.Value.(*session).source != s.source {
			oldest = oldest.Next()
		}
		fallthrough
	case m.waiting.Len() >= m.opt.MaxWaiting:
		old := oldest.Value.(*session)
		m.leave(old)
		old.end(websocket.CloseTryAgainLater, "crowded", "too many others wait to say hello")
	}
	m.sessions[s] = struct{}{}
	s.place = m.waiting.PushBack(s)
	m.waitsOf[s.source]++
	m.wg.Add(1)
	return true
}

// full reports whether there is no place for a node beside those there are.
func (m *Manager) full(node evm.Address) bool {
	return m.current[node] == nil && len(m.current) >= m.opt.MaxSessions
}

// leave takes a session out of the waiting room; false if it is not there.
func (m *Manager) leave(s *session) bool {
	if s.place == nil {
		return false
	}
	m.waiting.Remove(s.place)
	s.place = nil
	if m.waitsOf[s.source]--; m.waitsOf[s.source] == 0 {
		delete(m.waitsOf, s.source)
	}
	return true
}

func (m *Manager) remove(s *session) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.sessions, s)
	m.leave(s)
	if m.current[s.node] == s {
		delete(m.current, s.node)
	}
	m.wg.Done()
}

var errNoPlace = errors.New("no place for this session")

// Send queues a message to a node, if it is connected.
func (m *Manager) Send(node evm.Address, msg wire.Message) {
	m.mu.Lock()
	s := m.current[node]
	m.mu.Unlock()
	if s != nil {
		s.Send(msg)
	}
}

// replace makes s the session of its node, now that it has shown that it holds
// the node's key, and ends the one before. It fails when s had to go meanwhile,
// or when there are too many nodes.
func (m *Manager) replace(s *session) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.leave(s) {
		return errNoPlace // it has been told
	}
	if m.full(s.node) {
		s.end(websocket.CloseTryAgainLater, "full", "too many nodes are connected")
		return errNoPlace
	}
	if old := m.current[s.node]; old != nil {
		old.end(websocket.CloseNormalClosure, "replaced", "another session of this node has begun")
	}
	m.current[s.node] = s
	return nil
}
