package nodes

import (
	"bytes"
	"container/list"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"sync"
	"time"

	"github.com/gorilla/websocket"
	"golang.org/x/time/rate"

	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/evm"
	"github.com/resultity/node/internal/failpoint"
	"github.com/resultity/node/internal/journal"
	"github.com/resultity/node/internal/network/dispatch"
	"github.com/resultity/node/internal/network/mirror"
	"github.com/resultity/node/internal/network/store"
	"github.com/resultity/node/internal/receipt"
	"github.com/resultity/node/internal/receiptlog"
	"github.com/resultity/node/internal/sandbox/record"
	"github.com/resultity/node/internal/wire"
)

const (
	// maxQueue and maxQueueBytes bound what waits to be sent to one node.
	maxQueue      = 1024
	maxQueueBytes = 64 << 20
	// writeTimeout is for a message or a fragment of a large one, bytes.
	writeTimeout = 10 * time.Second
	fragment     = 64 << 10
	// keepBuffer is the largest read buffer that a session keeps, in bytes.
	keepBuffer = 24 << 10
	// ackDelay is how long an acknowledgement may wait for others: a frame costs
	// both sides the same for one and for many, and a node that forgets a result a
	// little later misses nothing.
	ackDelay = 20 * time.Millisecond
	// smallFrame is what a frame may have, in bytes, without a place, mediumFrame what
	// it may have without one among the large ones, and largeTime how long one may take
	// that has a place.
	smallFrame  = 20 << 10
	mediumFrame = 256 << 10
	largeTime   = 3 * time.Minute
	// lastWords is how long the last frames of a session may take, in all.
	lastWords = time.Second
)

// session is one WebSocket of a node. Its reader is the goroutine of run, its
// writer the one of write; the writer also closes the connection.
type session struct {
	m       *Manager
	conn    *websocket.Conn // set before run
	node    evm.Address
	log     *slog.Logger
	agreed  *wire.Session
	counted uint64 // the node's hellos, by the registry
	source  netip.Prefix
	place   *list.Element // in the manager's waiting room, and guarded by its mu; nil after hello

	opener *wire.Opener // the reader's
	// stray slows down a node that sends what nobody asked for: the reader waits,
	// and then so does the node.
	stray *rate.Limiter   // the reader's
	met   bool            // hello has been taken; the reader's
	copy  *mirror.Session // of the node's receipt log, after hello; the reader's
	owed  int             // receipts whose leaves have not come; the reader's
	among *places         // where the session has a place, or nil; the reader's
	stay  *stay           // that place
	due   time.Time       // when the frame that has it must be here

	writing chan struct{}              // has an element while a batch of logs, or a record, is being written
	known   map[digest.Digest]struct{} // records of the sandbox; the reader's

	stop chan struct{} // closed when the session is to end
	work chan struct{} // has an element when the queue may have grown

	// mu guards what follows, for the length of an append.
	mu     sync.Mutex
	queue  []wire.Message
	acks   []receipt.JobID // that wait for others
	bytes  int             // of the requests that are not yet written
	ended  bool
	last   time.Time // when the last write must have ended, once ended
	runs   bool
	code   int    // of the close frame
	why    string // metric's label
	reason string // for people
}

func newSession(m *Manager, node evm.Address, counted uint64, agreed *wire.Session, from string) *session {
	window := m.dispatch.Terms().Config.Network.ClockWindow.Duration()
	return &session{
		m: m, node: node, counted: counted, agreed: agreed, source: Source(from), log: m.log.With("node", node, "from", from),
		opener:  wire.NewOpener(func(a evm.Address) bool { return a == node }, agreed, wire.ToNetwork, window),
		stray:   newStray(),
		writing: make(chan struct{}, 1),
		known:   map[digest.Digest]struct{}{},
		stop:    make(chan struct{}), work: make(chan struct{}, 1),
	}
}

// Send queues a message. It never blocks: see the package comment. Others may
// overtake an acknowledgement.
func (s *session) Send(msg wire.Message) {
	a, ok := msg.(*wire.Ack)
	if !ok {
		s.enqueue(msg)
		return
	}
	s.mu.Lock()
	first := len(s.acks) == 0
	s.acks = append(s.acks, a.Jobs...)
	s.mu.Unlock()
	if first {
		time.AfterFunc(ackDelay, s.sendAcks)
	}
}

// sendAcks queues the acknowledgements that wait for others.
func (s *session) sendAcks() {
	if a := s.takeAcks(); len(a.Jobs) > 0 {
		s.enqueue(a)
	}
}

func (s *session) takeAcks() *wire.Ack {
	s.mu.Lock()
	defer s.mu.Unlock()
	a := &wire.Ack{Jobs: s.acks}
	s.acks = nil
	return a
}

func (s *session) enqueue(msg wire.Message) {
	size := weight(msg)
	s.mu.Lock()
	full := len(s.queue) >= maxQueue || s.bytes > 0 && s.bytes+size > maxQueueBytes
	if !s.ended && !full {
		s.queue = append(s.queue, msg)
		s.bytes += size
	}
	s.mu.Unlock()
	if full {
		s.end(websocket.ClosePolicyViolation, "slow", "the node does not keep up with what it is sent")
		s.cut()
		return
	}
	select {
	case s.work <- struct{}{}:
	default:
	}
}

// cut closes the connection under a writer that may be stuck in it. It does
// not wait, as closing TLS would, for a last word to be sent.
func (s *session) cut() {
	c := s.conn.NetConn()
	if t, ok := c.(*tls.Conn); ok {
		c = t.NetConn()
	}
	_ = c.Close() // closed already is as good
}

// weight is what a message holds of memory beside itself, in bytes.
func weight(msg wire.Message) int {
	if j, ok := msg.(*wire.Job); ok {
		return len(j.Request)
	}
	return 0
}

// end asks the session to end. The first call decides what is said about it.
func (s *session) end(code int, why, reason string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ended {
		return
	}
	s.ended, s.code, s.why, s.reason = true, code, why, reason
	s.last = time.Now().Add(lastWords)
	close(s.stop)
	if s.runs { // a write may be under way that may take longer
		time.AfterFunc(lastWords, s.cut)
	}
}

// until is when a write must have ended that may take within: once the session is
// to end nothing takes longer than lastWords, however slow the node reads.
func (s *session) until(within time.Duration) time.Time {
	s.mu.Lock()
	defer s.mu.Unlock()
	at := time.Now().Add(within)
	if s.ended && s.last.Before(at) {
		return s.last
	}
	return at
}

// run holds the session until it ends, and leaves nothing running.
func (s *session) run() {
	defer s.m.remove(s)
	s.mu.Lock()
	s.runs = true
	s.mu.Unlock()
	done := make(chan struct{})
	go func() {
		defer close(done)
		s.write()
	}()
	violation := s.read()
	<-done
	s.writing <- struct{}{} // nothing is being written any more
	s.m.metrics.Sessions.WithLabelValues(s.why).Inc()
	level := slog.LevelInfo
	if violation {
		level = slog.LevelWarn
	}
	s.log.Log(context.Background(), level, "session ended", "why", s.why, "reason", s.reason)
}

// read takes the node's frames until the session ends. It reports whether the
// node broke the protocol.
func (s *session) read() (violation bool) {
	member, err := s.hello()
	if err == nil {
		s.log.Info("session began")
		err = s.frames(member)
	}
	violation = s.blame(err)
	if member != nil {
		member.Leave(violation)
		s.copy.Leave()
	}
	return violation
}

// refusals names the frame errors for metrics. Only for some is the node to
// blame: bytes can be changed, repeated and reordered by whoever stands on the
// way, and a clock that drifts is a fault, not an attack.
var refusals = []struct {
	err   error
	name  string
	fault bool // the node's: it has sealed just this
}{
	{wire.ErrTooLarge, "too_large", false},
	{websocket.ErrReadLimit, "too_large", false},
	{wire.ErrSigner, "signer", false},
	{wire.ErrTag, "tag", false},
	{wire.ErrSequence, "sequence", false},
	{errCloned, "cloned", false},
	{wire.ErrClock, "clock", false},
	{wire.ErrMalformed, "malformed", true},
	{errNotBinary, "malformed", false},
	{errOrder, "order", true},
	{dispatch.ErrInvalid, "invalid", true},
	{wire.ErrLogs, "logs", true},
	{mirror.ErrInvalid, "receiptlog", true},
	{errSandbox, "sandbox", true},
}

var (
	errNotBinary = errors.New("not a binary message")
	errOrder     = errors.New("not the time for this message")
	errBye       = errors.New("bye")
	errOver      = errors.New("the session is over")
	errCloned    = errors.New("cloned key")
	errSandbox   = errors.New("a record of another sandbox")
)

// blame ends the session for err and reports whether that is the node's fault,
// for which it gets a penalty.
func (s *session) blame(err error) bool {
	for _, r := range refusals {
		if !errors.Is(err, r.err) {
			continue
		}
		s.m.metrics.FramesRefused.WithLabelValues(r.name).Inc()
		event := journal.NodeFrameRefused
		if r.err == errCloned {
			event = journal.NodeCloned
		}
		s.log.Warn("frame refused", event.Attr(), "reason", r.name, "error", err)
		code := websocket.ClosePolicyViolation
		switch r.name {
		case "too_large":
			code = websocket.CloseMessageTooBig
		case "cloned":
			code = wire.CloseCloned
		}
		s.end(code, "violation", err.Error())
		return r.fault
	}
	var timeout net.Error
	switch {
	case errors.Is(err, mirror.ErrCrowded):
		s.end(websocket.CloseTryAgainLater, "crowded", err.Error())
	case errors.Is(err, errBye):
		s.end(websocket.CloseNormalClosure, "bye", "the node said goodbye")
	case errors.As(err, &timeout) && timeout.Timeout():
		s.end(websocket.CloseGoingAway, "timeout", "no sign of life")
	default:
		s.end(websocket.CloseGoingAway, "lost", fmt.Sprint(err))
	}
	return false
}

// hello takes the first frame, which shows that the peer holds the node's key.
func (s *session) hello() (*dispatch.Member, error) {
	s.conn.SetReadLimit(maxHello)
	_ = s.conn.SetReadDeadline(time.Now().Add(helloTimeout)) // only fails on a closed connection, which the read tells
	msg, err := s.next(new(bytes.Buffer))
	if err != nil {
		return nil, err
	}
	h, ok := msg.(*wire.Hello)
	if !ok {
		return nil, fmt.Errorf("%w: %s before hello", errOrder, msg.Type())
	}
	s.log = s.log.With("agent", fmt.Sprintf("%.64q", h.Agent))
	if err := s.m.counts.take(s.node, h.Count, s.counted); err != nil {
		return nil, err
	}
	s.met = true
	s.conn.SetReadLimit(wire.MaxFrame)
	s.conn.SetPongHandler(func(string) error { return s.alive() })
	pong := s.conn.PingHandler()
	s.conn.SetPingHandler(func(data string) error { return errors.Join(s.alive(), pong(data)) })
	if err := s.alive(); err != nil {
		return nil, err
	}
	if err := s.m.replace(s); err != nil {
		return nil, err
	}
	s.Send(&wire.Welcome{Session: s.agreed.ID().String(), Server: s.m.version})
	if t := s.m.dispatch.Terms(); h.Config != t.Digest { // it may have been away when this was told
		s.Send(&wire.Update{Version: t.Version})
	}
	s.m.orders.Connected(s.node)
	return s.join()
}

// join gives the node to dispatch, with its binding as it is now.
func (s *session) join() (*dispatch.Member, error) {
	s.m.joining.RLock()
	defer s.m.joining.RUnlock()
	ctx, cancel := context.WithTimeout(context.Background(), helloTimeout)
	defer cancel()
	n, err := s.m.registry.Node(ctx, s.node)
	if err != nil {
		return nil, err
	}
	var out string
	told, over := func(a *wire.LeavesAck) { s.Send(a) }, func(why string) { s.end(websocket.CloseTryAgainLater, "log_lost", why) }
	if s.copy, out, err = s.m.mirror.Join(ctx, s.node, told, over); err != nil {
		return nil, err
	}
	s.Send(bound(n.Binding))
	m := s.m.dispatch.Join(s.node, s)
	// Before its first heartbeat, so before its first job.
	s.m.dispatch.SetAccount(s.node, n.Account)
	s.m.dispatch.SetOut(s.node, out)
	return m, nil
}

func (s *session) alive() error {
	at := time.Now().Add(3 * s.m.opt.Ping)
	if s.among != nil && s.due.Before(at) {
		at = s.due
	}
	return s.conn.SetReadDeadline(at)
}

// takePlace waits for a place among p, and then gives back the one that it has.
func (s *session) takePlace(p *places) error {
	stay, err := p.take(s)
	if err != nil {
		return err
	}
	s.leavePlace()
	s.among, s.stay, s.due = p, stay, time.Now().Add(largeTime)
	return s.alive()
}

// leavePlace gives back the place that the session has, if any.
func (s *session) leavePlace() {
	if s.among != nil {
		s.among.leave(s.stay)
		s.among, s.stay = nil, nil
	}
}

func (s *session) frames(member *dispatch.Member) error {
	buf := new(bytes.Buffer)
	defer s.leavePlace()
	for {
		msg, err := s.next(buf)
		if err != nil {
			return err
		}
		if err := s.alive(); err != nil {
			return err
		}
		if err := s.handle(member, msg); err != nil {
			return err
		}
		s.leavePlace()
		if buf.Cap() > keepBuffer {
			buf = new(bytes.Buffer)
		}
	}
}

// next reads and checks one frame. Nothing of the message refers to buf.
func (s *session) next(buf *bytes.Buffer) (wire.Message, error) {
	typ, r, err := s.conn.NextReader()
	if err != nil {
		return nil, err
	}
	begun := time.Now()
	if typ != websocket.BinaryMessage {
		return nil, errNotBinary
	}
	buf.Reset()
	if err := s.receive(buf, arriving{s, r}); err != nil {
		return nil, err
	}
	return s.opener.Open(buf.Bytes(), begun)
}

// receive reads a frame. The buffer grows in steps, none of them before there is a
// place for it: left to itself it would become twice as large as the frame.
func (s *session) receive(buf *bytes.Buffer, from io.Reader) error {
	for _, step := range []struct {
		among *places
		upTo  int
	}{{nil, smallFrame}, {s.m.medium, mediumFrame}, {s.m.large, 8 * mediumFrame}, {nil, wire.MaxFrame}} {
		if step.among != nil {
			if err := s.takePlace(step.among); err != nil {
				return err
			}
		}
		if step.upTo > smallFrame {
			buf.Grow(step.upTo - buf.Len() + bytes.MinRead)
		}
		if _, err := io.CopyN(buf, from, int64(step.upTo-buf.Len())); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			return err
		}
	}
	if _, err := buf.ReadFrom(from); err != nil { // its end, or that it is too large
		return err
	}
	if s.among != nil {
		s.stay.whole.Store(true)
	}
	return nil
}

// arriving reads a frame whose bytes are signs of life: a large one may take
// longer than silence may.
type arriving struct {
	s *session
	r io.Reader
}

func (a arriving) Read(p []byte) (int, error) {
	n, err := a.r.Read(p)
	if a.s.among != nil {
		a.s.stay.read.Add(int64(n))
	}
	if n > 0 && a.s.met {
		if err := a.s.alive(); err != nil {
			return n, err
		}
	}
	return n, err
}

func (s *session) handle(member *dispatch.Member, msg wire.Message) error {
	expected, err := true, error(nil)
	switch v := msg.(type) {
	case *wire.Heartbeat:
		expected = false // at the interval and at changes; a flood of them is slowed down
		member.Heartbeat(v)
		if err = s.copy.Beat(v.Head); err == nil {
			s.m.compare(s.node, v)
		}
	case *wire.Accept:
		expected = member.Accepted(v.Job)
	case *wire.Refuse:
		expected = member.Refused(v)
	case *wire.Chunk:
		expected, err = member.Chunk(v)
	case *wire.Result:
		if expected, err = member.Result(v); expected && err == nil && v.Receipt != nil {
			s.owe(v.Receipt)
			s.named(v.Receipt)
		}
		if v.Code != "" { // the job may come again, behind the acknowledgement
			s.sendAcks()
		}
	case *wire.OrderDone:
		expected = s.orderDone(v)
	case *wire.Logs:
		err = s.logs(v)
	case *wire.Leaves:
		expected, err = s.leaves(v)
	case *wire.Sandbox:
		err = s.sandbox(v.Sandbox)
	case *wire.Bye:
		return errBye
	default:
		return fmt.Errorf("%w: a second %s", errOrder, msg.Type())
	}
	if err == nil && !expected {
		s.pause(s.stray, 1)
	}
	return err
}

// orderDone takes a node's answer to an order. One that cannot be written down is
// not acknowledged: the node sends it again in its next session.
func (s *session) orderDone(a *wire.OrderDone) (expected bool) {
	expected, err := s.m.orders.Done(context.Background(), s.node, a)
	switch {
	case err != nil:
		s.log.Error("answer to an order is not written down", "order", a.ID, "error", err)
		return false
	case expected:
		s.log.Info("order answered", "order", a.ID, "outcome", a.Outcome, "reason", a.Message)
	}
	s.Send(&wire.OrderAck{ID: a.ID})
	return expected
}

// logs takes a batch of the node's log. It is checked here, and written beside,
// so that results do not wait for its disk; one at a time.
func (s *session) logs(l *wire.Logs) error {
	b, who, err := l.Open()
	if err != nil {
		return err
	}
	if network := s.m.dispatch.Terms().Config.Network.Name; who != s.node || b.Node != s.node || b.Network != network {
		return fmt.Errorf("%w: logs of node %s of network %.64q, signed by %s", wire.ErrLogs, b.Node, b.Network, who)
	}
	s.pause(s.m.limits.logsOf.of(s.node), 1)
	if _, err := b.Unpack(l.Data); err != nil {
		return err
	}
	s.writing <- struct{}{}
	go func() {
		defer func() { <-s.writing }()
		position, err := s.m.registry.PutLogs(context.Background(), b, l)
		if err != nil { // the node sends it again
			s.log.Error("logs of the node are not stored", "error", err)
			return
		}
		s.Send(&wire.LogsAck{Spool: b.Spool, Position: position})
	}()
	return nil
}

// owe notes a receipt that has been checked: its leaf has to come, too.
func (s *session) owe(r *receipt.Signed) {
	stated := r.Receipt()
	s.copy.Result(receiptlog.Leaf(r.Hash()), stated.Job)
	s.owed = min(s.owed+1, leavesBurst)
}

// leaves takes a part of the node's receipt log.
func (s *session) leaves(l *wire.Leaves) (expected bool, err error) {
	n := len(l.Leaves)
	known := min(n, s.owed)
	s.owed -= known
	if n > known {
		s.pause(s.m.limits.leavesOf.of(s.node), n-known)
	}
	return s.copy.Leaves(l)
}

// sandbox takes a record of the node's sandbox. It counts as known at once, since the
// node may send results right behind it, and is written beside.
func (s *session) sandbox(r *record.Signed) error {
	network := s.m.dispatch.Terms().Config.Network
	is := r.Record()
	at := time.UnixMilli(is.Time)
	switch {
	case is.Node != s.node || is.Network != network.Name:
		return fmt.Errorf("%w: of node %s of network %.64q", errSandbox, is.Node, is.Network)
	case at.After(failpoint.Now().Add(network.ClockWindow.Duration())):
		return fmt.Errorf("%w: its time is %s, ahead of the clock", errSandbox, at.UTC().Format(time.RFC3339))
	}
	s.pause(s.m.limits.recordsOf.of(s.node), 1)
	s.know(r.Digest())
	s.writing <- struct{}{}
	go func() {
		defer func() { <-s.writing }()
		if err := s.m.registry.PutSandbox(context.Background(), r); err != nil { // the node sends it again
			s.log.Error("record of the node's sandbox is not stored", "error", err)
			return
		}
		s.Send(&wire.SandboxAck{Digest: r.Digest()})
	}()
	return nil
}

// maxKnown bounds the records that a session remembers.
const maxKnown = 256

func (s *session) know(d digest.Digest) {
	if len(s.known) >= maxKnown {
		clear(s.known) // they are asked for again
	}
	s.known[d] = struct{}{}
}

// named looks whether there is the record that a receipt names. The result counts
// in any case: its client has nothing of a refusal. A record that has come in
// another session is asked for beside.
func (s *session) named(r *receipt.Signed) {
	rc := r.Receipt()
	d := rc.Measured.SandboxDigest
	if _, ok := s.known[d]; ok {
		return
	}
	s.know(d) // it is said once
	s.writing <- struct{}{}
	go func() {
		defer func() { <-s.writing }()
		_, err := s.m.registry.Sandbox(context.Background(), d)
		switch {
		case errors.Is(err, store.ErrNotFound):
			s.m.metrics.Unrecorded.Inc()
			s.log.Warn("receipts name a sandbox that there is no record of", journal.NodeSandboxUnrecorded.Attr(), "digest", d, "job", rc.Job)
		case err != nil:
			s.log.Error("record of the node's sandbox could not be looked for", "error", err)
		}
	}()
}

// pause makes a node wait that sends more than it should: n of what a limit is for.
func (s *session) pause(l *rate.Limiter, n int) {
	d := l.ReserveN(time.Now(), n).Delay()
	if d == 0 {
		return
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-s.stop:
	}
}

// write sends what is queued, and pings, until the session is to end. Then it
// says why and closes the connection, which ends the reader.
func (s *session) write() {
	defer s.conn.Close()
	sealer := wire.NewSealer(s.m.key, s.agreed, wire.ToNode, time.Now)
	ping := time.NewTicker(s.m.opt.Ping)
	defer ping.Stop()
	for {
		select {
		case <-s.stop:
			s.close(sealer)
			return
		case <-ping.C:
			if err := s.conn.WriteControl(websocket.PingMessage, nil, s.until(writeTimeout)); err != nil {
				s.end(websocket.CloseGoingAway, "lost", fmt.Sprint(err))
			}
		case <-s.work:
			if err := s.flush(sealer); err != nil {
				s.end(websocket.CloseGoingAway, "lost", fmt.Sprint(err))
			}
		}
	}
}

// close says the last words of a session. The peer may be gone, and then nothing
// is lost: it sends again what was not acknowledged.
func (s *session) close(sealer *wire.Sealer) {
	if a := s.takeAcks(); len(a.Jobs) > 0 {
		_, _ = s.say(sealer, nil, a, lastWords)
	}
	text := strings.ToValidUTF8(s.reason[:min(len(s.reason), 120)], "") // what fits into a close frame
	_ = s.conn.WriteControl(websocket.CloseMessage, websocket.FormatCloseMessage(s.code, text), s.until(lastWords))
}

// say seals one message in buf and writes it. It returns buf, which may be another.
func (s *session) say(sealer *wire.Sealer, buf []byte, msg wire.Message, within time.Duration) ([]byte, error) {
	if !time.Now().Before(s.until(within)) { // nobody reads it any more, and a large one takes time
		return buf, errOver
	}
	frame, err := sealer.Seal(buf[:0], msg)
	if err != nil {
		return buf, err
	}
	failpoint.Here("nodes.frame.sealed", msg)
	if err := s.writeFrame(frame, within); err != nil {
		return frame, err
	}
	failpoint.Here("nodes.frame.written", msg)
	return frame, nil
}

// writeFrame writes one message, a large one in fragments: each has its own time
// and lets pings pass, so that a slow link is not taken for a dead one.
func (s *session) writeFrame(frame []byte, within time.Duration) error {
	if len(frame) <= fragment {
		if err := s.conn.SetWriteDeadline(s.until(within)); err != nil {
			return err
		}
		return s.conn.WriteMessage(websocket.BinaryMessage, frame)
	}
	w, err := s.conn.NextWriter(websocket.BinaryMessage)
	if err != nil {
		return err
	}
	for len(frame) > 0 {
		n := min(len(frame), fragment)
		if err := s.conn.SetWriteDeadline(s.until(within)); err != nil {
			return err
		}
		if _, err := w.Write(frame[:n]); err != nil {
			return err
		}
		frame = frame[n:]
	}
	return w.Close()
}

// flush sends the queue. An idle session holds no buffer.
func (s *session) flush(sealer *wire.Sealer) error {
	var buf []byte
	for {
		s.mu.Lock()
		queue := s.queue
		s.queue = nil
		s.mu.Unlock()
		if len(queue) == 0 {
			return nil
		}
		for _, msg := range queue {
			var err error
			if buf, err = s.say(sealer, buf, msg, writeTimeout); err != nil {
				return err
			}
			s.mu.Lock()
			s.bytes -= weight(msg)
			s.mu.Unlock()
		}
	}
}
