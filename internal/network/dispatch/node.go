package dispatch

import (
	"bytes"
	"container/heap"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/resultity/node/internal/evm"
	"github.com/resultity/node/internal/journal"
	"github.com/resultity/node/internal/network/store"
	"github.com/resultity/node/internal/receipt"
	"github.com/resultity/node/internal/wire"
)

// Peer is a node's session. Its methods are called with the dispatcher's mutex
// held: they must not block and must not call back.
type Peer interface {
	// Send queues a message; a session that cannot keep up ends itself.
	Send(wire.Message)
}

// node is a node that is connected, has jobs, or is being punished. Guarded by
// Dispatcher.mu.
type node struct {
	addr    evm.Address
	member  *Member // nil while it is away
	since   time.Time
	left    time.Time // when it went away
	beat    *wire.Heartbeat
	beatAt  time.Time
	running map[receipt.JobID]*runner
	slots   int // jobs it may run at once
	foreign int // jobs it runs that are none of ours, as of the last heartbeat
	order   uint64
	blocked time.Time // it refused a job for a reason of its own

	strikes  int
	struckAt time.Time
	penalty  time.Time // no jobs before
	pointed  time.Time // when it was pointed out last that its receipts name another class than its heartbeats

	account  string // that it belongs to; "" for none, or while that is not known
	unbound  bool   // belongs to no account
	out      string // why it gets no jobs whatever it does, or ""
	routable bool
	told     *wire.Status // what the node was told last
	index    int          // in Dispatcher.free, or -1
	timer    timer
}

// Member is a node's session as dispatch knows it. After a later Join of the
// same node, or Leave, its methods do nothing.
type Member struct {
	d    *Dispatcher
	node *node
	peer Peer
	gone bool // guarded by Dispatcher.mu
}

// Join begins a node's session. What the node was at when its last session
// ended is sent again: it answers where it stands.
func (d *Dispatcher) Join(addr evm.Address, peer Peer) *Member {
	d.mu.Lock()
	defer d.mu.Unlock()
	now := time.Now()
	n := d.nodes[addr]
	if n == nil {
		n = &node{addr: addr, running: map[receipt.JobID]*runner{}, index: -1}
		d.nodes[addr] = n
	}
	if n.member != nil {
		n.member.gone = true
	}
	m := &Member{d: d, node: n, peer: peer}
	n.member, n.since, n.beat, n.told, n.foreign, n.blocked = m, now, nil, nil, 0, time.Time{}
	n.account, n.unbound, n.out = "", false, ""
	for _, r := range n.running {
		j := r.job
		if j.result != nil || r.adopted >= adoptions || r.lost && j.place == nil {
			continue // it is elsewhere by now
		}
		r.adopted++
		r.accepted, r.sent, r.progress = false, now, now
		d.revive(r)
		d.send(r)
		d.arm(j)
	}
	d.refresh(n)
	return m
}

// SetAccount says which account a node in session belongs to, "" for none; of one that
// joins it is not known until then. A node that belongs to nobody gets no jobs; it goes
// on with those it has.
func (d *Dispatcher) SetAccount(addr evm.Address, account string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	n := d.nodes[addr]
	if n == nil {
		return
	}
	n.account = account
	if n.unbound == (account == "") {
		return
	}
	n.unbound = account == ""
	d.refresh(n)
	d.pump()
}

// SetOut says why a node in session gets no jobs, whatever it does, or "" for no such
// reason; it goes on with those that it has. One that joins does.
func (d *Dispatcher) SetOut(addr evm.Address, why string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	n := d.nodes[addr]
	if n == nil || n.out == why {
		return
	}
	n.out = why
	d.refresh(n)
	d.pump()
}

// Leave ends a session. violation says that the node broke the protocol: its
// jobs go elsewhere at once and it gets none for a while.
func (m *Member) Leave(violation bool) {
	d, n := m.d, m.node
	d.mu.Lock()
	defer d.mu.Unlock()
	if m.gone {
		return
	}
	m.gone = true
	n.member, n.left = nil, time.Now()
	if violation {
		n.strike(n.left)
	}
	d.refresh(n)
	for _, r := range n.all() {
		if violation {
			d.lose(r, Violation)
		}
		d.arm(r.job)
	}
	d.tidy(n)
}

// all returns the node's jobs; handling one may change the map.
func (n *node) all() []*runner {
	list := make([]*runner, 0, len(n.running))
	for _, r := range n.running {
		list = append(list, r)
	}
	return list
}

func (n *node) strike(now time.Time) {
	if now.Sub(n.struckAt) > forgiven {
		n.strikes = 0
	}
	n.penalty = now.Add(penalties[min(n.strikes, len(penalties)-1)])
	n.struckAt = now
	n.strikes++
}

// tidy forgets a node about which there is nothing to know.
func (d *Dispatcher) tidy(n *node) {
	if n.member == nil && len(n.running) == 0 && time.Since(n.struckAt) > forgiven {
		n.timer.stop()
		delete(d.nodes, n.addr)
	}
}

// Heartbeat takes a node's report, which is kept until the next one. Its bounds are
// looked at where it enters, see package wire.
func (m *Member) Heartbeat(b *wire.Heartbeat) {
	d, n := m.d, m.node
	d.mu.Lock()
	defer d.mu.Unlock()
	if m.gone {
		return
	}
	n.beat, n.beatAt, n.blocked = b, time.Now(), time.Time{}
	n.foreign = max(0, b.Busy-len(n.running))
	d.refresh(n)
	d.pump()
}

// Accepted takes a node's word that it has written a job down. It reports
// whether the node has that job, as the methods below do: a late word is no
// fault, but nothing that should come often.
func (m *Member) Accepted(id receipt.JobID) (known bool) {
	d := m.d
	d.mu.Lock()
	defer d.mu.Unlock()
	r := m.runner(id)
	if r == nil {
		return false
	}
	r.accept(d)
	return true
}

// runner returns the node's part in a job, or nil.
func (m *Member) runner(id receipt.JobID) *runner {
	if m.gone {
		return nil
	}
	return m.node.running[id]
}

// Refused takes a node's refusal.
func (m *Member) Refused(msg *wire.Refuse) (known bool) {
	d := m.d
	d.mu.Lock()
	defer d.mu.Unlock()
	r := m.runner(msg.Job)
	if r == nil {
		return false
	}
	if r.job.result != nil { // somebody else was first, and that counts
		d.detach(r)
		d.pump()
		return true
	}
	if r.adopted > 0 { // it may have written the job down when that was sent first
		r.job.taken = true
	}
	switch msg.Code {
	case wire.CodeDuplicate: // it has the job, which is all we want
		r.accept(d)
		return true
	case wire.CodeBusy: // our books were behind its own: no fault of the job
		m.node.blocked = time.Now().Add(busyPause)
		r.job.attempts--
	case wire.CodeDraining, wire.CodeNotReady, wire.CodeConfig, wire.CodeUnknownModel, wire.CodeStorage, wire.CodeInternal:
		m.node.blocked = time.Now().Add(refusalPause)
	}
	d.unable(r, NodeRefused, msg.Code)
	return true
}

// unable handles a node's word that it will not deliver. That no node could do
// the job is believed when a second node says the same, or there is no second
// one: the request was checked before, so it is the node that may be at fault.
func (d *Dispatcher) unable(r *runner, reason Reason, code wire.Code) {
	j, why := r.job, &Failure{Outcome: Failed, Code: code, Message: "no node could finish the job"}
	// We asked nobody to stop: a job that is still known was not cancelled, so
	// a node that says so means itself.
	if code.Retryable() || code == wire.CodeCancelled {
		d.drop(r, reason, why)
		return
	}
	agreed := false
	for node, said := range j.against {
		agreed = agreed || said == code && node != r.node.addr
	}
	j.against[r.node.addr] = code
	live := j.live()
	second := live != nil && live != r || j.attempts < d.opt.Attempts && d.others(j) > 0
	if second && !agreed {
		d.drop(r, reason, why)
		return
	}
	d.detach(r)
	d.fail(j, &Failure{Outcome: Refused, Code: code, Message: refusal(code, r.terms)})
}

// refusal is what a client is told for a code that ends its job.
func refusal(code wire.Code, t *Terms) string {
	switch code {
	case wire.CodeBadRequest:
		return "The model's engine refuses this request."
	case wire.CodeContext:
		return fmt.Sprintf("This model's maximum context length is %d tokens. The prompt, with the tokens that the request asks for, is longer. Please shorten one of them.", t.Config.Runtime.Settings.Context)
	case wire.CodeLimit:
		return "The request is over a limit of the nodes."
	}
	return "The request could not be finished in time."
}

// Chunk takes a part of a streamed response. The error ends the session.
func (m *Member) Chunk(c *wire.Chunk) (known bool, err error) {
	d := m.d
	d.mu.Lock()
	defer d.mu.Unlock()
	r := m.runner(c.Job)
	if r == nil || r.job.result != nil {
		return false, nil // late: cancelled, or somebody else was first
	}
	j := r.job
	limit := r.terms.Config.Limits.ResponseBytes
	switch {
	case !j.spec.Stream:
		return true, fmt.Errorf("%w: a chunk of a job that is no stream", ErrInvalid)
	case c.Offset < 0 || c.Offset > limit || c.Offset+int64(len(c.Data)) > limit:
		return true, fmt.Errorf("%w: the stream is longer than %d bytes", ErrInvalid, limit)
	}
	r.accept(d)
	if end := c.Offset + int64(len(c.Data)); end > r.end {
		r.end, r.progress = end, time.Now()
		d.revive(r)
	}
	if !j.attached {
		return true, nil
	}
	first := len(j.body) == 0
	if !r.take(c.Offset, c.Data) {
		d.diverge(j, r)
		return true, nil
	}
	if first && len(j.body) > 0 && j.only == nil {
		d.metrics.FirstByte.Observe(time.Since(j.start).Seconds())
	}
	return true, nil
}

// diverge handles a node whose bytes contradict the client's stream: it is out
// of the race. When nobody else is in it, the stream ends.
func (d *Dispatcher) diverge(j *job, r *runner) {
	if live := j.live(); live != nil && live != r {
		return
	}
	d.metrics.Reassignments.WithLabelValues(string(Contradicted)).Inc()
	d.fail(j, &Failure{Outcome: Diverged, Message: "the stream was interrupted and another node could not continue it; please try again"})
}

// Result takes a result. It is acknowledged once it is durable or not needed.
// The error ends the session.
func (m *Member) Result(res *wire.Result) (known bool, err error) {
	d := m.d
	d.mu.Lock()
	j := d.jobs[res.Job]
	switch {
	case m.gone || d.closed: // the node sends it again in its next session
		d.mu.Unlock()
		return true, nil
	case j == nil:
		verdict := "unneeded"
		if d.recent.has(res.Job) {
			verdict = "duplicate"
		}
		m.ack(verdict, res.Job)
		m.node.foreign = max(0, m.node.foreign-1)
		d.refresh(m.node)
		d.pump()
		d.mu.Unlock()
		return false, nil
	case res.Code != "":
		m.ack("failed", res.Job)
		if r := m.runner(res.Job); r != nil && j.result == nil {
			j.taken = true
			d.unable(r, NodeFailed, res.Code)
		}
		d.mu.Unlock()
		return true, nil
	}
	j.taken = true // also where the result does not hold
	c := claim{job: &j.spec.Job, hash: j.hash, node: m.node.addr, now: time.Now()}
	if res.Receipt != nil {
		named := res.Receipt.Receipt().Measured.ConfigDigest
		if c.terms = j.under[named]; c.terms == nil && d.terms.Digest == named {
			c.terms = d.terms
		}
	}
	d.mu.Unlock()
	if err := c.check(res); err != nil {
		d.metrics.Results.WithLabelValues("invalid").Inc()
		d.mu.Lock()
		defer d.mu.Unlock()
		if r := m.runner(res.Job); r != nil {
			d.drop(r, Violation, &Failure{Outcome: Failed, Code: wire.CodeInternal, Message: "no node could finish the job"})
		}
		return true, err
	}
	return m.valid(j, res), nil
}

// valid takes a checked result: the first one counts. It reports whether the
// session had not sent it before.
func (m *Member) valid(j *job, res *wire.Result) (news bool) {
	d := m.d
	d.mu.Lock()
	defer d.mu.Unlock()
	r := m.runner(res.Job)
	switch {
	case d.closed: // the node sends it again in its next session
		return true
	case j.ended:
		m.ack("duplicate", res.Job)
		return true
	case j.result != nil: // acknowledged once the one that counts is stored
		j.waiting = slices.DeleteFunc(j.waiting, func(w *Member) bool { return w.gone })
		if m.gone || slices.Contains(j.waiting, m) {
			return false
		}
		j.waiting = append(j.waiting, m)
		if r != nil {
			d.detach(r)
			d.pump()
		}
		return true
	case j.attached && j.spec.Stream && !bytes.HasPrefix(res.Response, j.body):
		m.ack("diverged", res.Job)
		d.diverge(j, r)
		if r != nil && !j.ended {
			d.detach(r)
			d.pump()
		}
		return true
	}
	j.result = res
	if r != nil {
		j.said = r.said
	}
	d.checkClass(m.node, j)
	j.waiting = []*Member{m}
	j.timer.stop()
	d.queue.remove(j)
	d.bytes += int64(len(res.Response))
	d.wg.Go(func() {
		if d.storeResult(j) && j.only == nil {
			d.keepRequest(context.Background(), j.spec)
		}
	})
	d.answer(j)
	if r != nil {
		d.detach(r)
		d.pump()
	}
	return true
}

// checkClass points out a node that signs for another determinism class than it had
// named when it got the job. That may be a heartbeat that was late, once; a node that
// does it again and again wants its answers to be compared with nobody's.
func (d *Dispatcher) checkClass(n *node, j *job) {
	signed := j.result.Receipt.Receipt().Claimed.ClassDigest
	if j.said.IsZero() || j.said == signed {
		return
	}
	d.metrics.OtherClass.Inc()
	if now := time.Now(); now.Sub(n.pointed) >= pointAgain {
		n.pointed = now
		d.log.Warn("a node has signed for another determinism class than it had named before", journal.NodeClassContradicted.Attr(), "node", n.addr, "job", j.spec.ID, "said", j.said, "signed", signed)
	}
}

// pointAgain is how long a node that was pointed out is not again.
const pointAgain = 10 * time.Minute

// storeResult makes the result that counts durable, then acknowledges it. Until
// then it is kept in memory, and by the node. It reports whether it is durable.
func (d *Dispatcher) storeResult(j *job) (durable bool) {
	res := j.result
	for try := 0; ; try++ {
		start := time.Now()
		err := d.store.PutResult(context.Background(), res.Receipt, j.said, res.Response)
		d.metrics.StoreSeconds.WithLabelValues("result").Observe(time.Since(start).Seconds())
		if err == nil || errors.Is(err, store.ErrExists) { // an earlier try that was not heard of
			break
		}
		if !d.keep(j, try, err) {
			return false
		}
		select {
		case <-time.After(storeRetries[min(try, len(storeRetries)-1)]):
		case <-j.lost: // a client waits for the outcome of the next try
		case <-d.closing:
			return false // the node sends it again after the next start
		}
	}
	rc := res.Receipt.Receipt()
	d.mu.Lock()
	defer d.mu.Unlock()
	j.stored = true
	d.answer(j)
	d.log.Debug("job done", "job", res.Job, "node", rc.Node, "client", j.spec.Client, "prompt_tokens", rc.Claimed.PromptTokens,
		"completion_tokens", rc.Claimed.CompletionTokens, "took", j.took, "attempts", j.attempts)
	d.finish(j, OK)
	for _, w := range j.waiting {
		verdict := "duplicate"
		if w == j.waiting[0] {
			verdict = "counted"
		}
		w.ack(verdict, res.Job)
	}
	return true
}

// keep handles a result that could not be stored. It reports whether it is kept
// for another try: it is not when there is no record of the job either.
func (d *Dispatcher) keep(j *job, try int, err error) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if try == 0 {
		d.log.Error("result could not be stored; it is kept in memory and by its node", "job", j.spec.ID, "error", err)
	}
	if j.record == unwritten {
		d.fail(j, notWritten)
	}
	return !j.ended
}

// Receipt returns the receipt of a response that was given to its client and is
// not in the store yet, or nil.
func (d *Dispatcher) Receipt(id receipt.JobID) *receipt.Signed {
	d.mu.Lock()
	defer d.mu.Unlock()
	if j := d.jobs[id]; j != nil && j.result != nil && j.finished {
		return j.result.Receipt
	}
	return nil
}

// ack lets a node forget a result; the dispatcher's mutex is held.
func (m *Member) ack(verdict string, id receipt.JobID) {
	m.d.metrics.Results.WithLabelValues(verdict).Inc()
	if !m.gone {
		m.peer.Send(&wire.Ack{Jobs: []receipt.JobID{id}})
	}
}

// refresh works out anew whether a node may get jobs, tells the node when that
// changed, and moves it into or out of the heap of free nodes.
func (d *Dispatcher) refresh(n *node) {
	now := time.Now()
	was := n.routable
	why := d.assess(n, now)
	n.routable = why == ""
	if n.routable != was {
		if n.routable {
			d.routable++
		} else if d.routable--; d.routable == 0 {
			d.noneAt = now
			for j := range d.queue.all() {
				d.arm(j)
			}
		}
	}
	// Before the first heartbeat there is nothing to say.
	if n.member != nil && n.beat != nil && (n.told == nil || n.told.Routable != n.routable || n.told.Reason != why) {
		n.told = &wire.Status{Routable: n.routable, Reason: why}
		n.member.peer.Send(n.told)
		d.log.Info("node status", "node", n.addr, "routable", n.routable, "reason", why)
	}
	if n.beat != nil { // what it says, but no more than the configuration gives to its runtime
		n.slots = min(n.beat.Slots, d.terms.Config.Runtime.Settings.Slots)
	}
	free := n.routable && n.used() < n.slots && !now.Before(n.blocked)
	switch {
	case free && n.index < 0:
		heap.Push(&d.free, n)
	case free:
		heap.Fix(&d.free, n.index)
	case n.index >= 0:
		heap.Remove(&d.free, n.index)
	}
	d.armNode(n, now)
}

func (n *node) used() int { return len(n.running) + n.foreign }

// assess says why a node gets no jobs, or "".
func (d *Dispatcher) assess(n *node, now time.Time) string {
	t, b := d.terms, n.beat
	window := t.Config.Network.Window.Duration()
	switch {
	case n.member == nil:
		return "not connected"
	case b == nil:
		return "no heartbeat yet"
	case !now.Before(n.beatAt.Add(window)):
		return fmt.Sprintf("no heartbeat for %v", window)
	case now.Before(n.penalty):
		return "it broke the protocol; it gets jobs again after " + n.penalty.UTC().Format(time.TimeOnly) + " UTC"
	case n.out != "":
		return n.out
	case n.unbound:
		return "it is bound to no account; bind it: resultityctl bind"
	case b.Runtime.State == wire.RuntimeStandby:
		return "on standby: its machine's runtime serves another network of its operator's"
	case b.Config != t.Digest && b.Failed != nil && b.Failed.Config == t.Digest:
		return fmt.Sprintf("it is on configuration %s, since that of the network failed there: %s: %s", orNone(b.Config.String()), b.Failed.Step, b.Failed.Reason)
	case b.Config != t.Digest:
		return fmt.Sprintf("it is on configuration %s, the network on %s", orNone(b.Config.String()), t.Digest)
	case b.Draining:
		return "draining"
	case b.Runtime.State != "active":
		return fmt.Sprintf("its runtime is %.20q, not active", b.Runtime.State)
	case b.Runtime.Image != t.Config.Runtime.Image.Digest():
		return "its runtime has another image than the configuration"
	}
	i := slices.IndexFunc(b.Models, func(m wire.ModelState) bool { return m.Name == t.Config.Runtime.Model && m.Digest == t.Model })
	switch {
	case i < 0:
		return fmt.Sprintf("it does not have model %s", t.Config.Runtime.Model)
	case b.Models[i].State != "active":
		return fmt.Sprintf("its model is %.20q, not active", b.Models[i].State)
	case b.Slots < 1:
		return "it offers no slots"
	}
	return ""
}

func orNone(s string) string {
	if s == "" {
		return "none"
	}
	return s
}

// armNode sets a node's timer to the next moment at which its state may change
// by itself.
func (d *Dispatcher) armNode(n *node, now time.Time) {
	var at time.Time
	for _, t := range []time.Time{n.blocked, n.penalty, n.silentAt(d)} {
		if t.After(now) && (at.IsZero() || t.Before(at)) {
			at = t
		}
	}
	if at.IsZero() || n.member == nil || d.closed {
		n.timer.stop()
		return
	}
	n.timer.set(time.Until(at), func() { d.wakeNode(n) })
}

// silentAt is when the last heartbeat gets too old.
func (n *node) silentAt(d *Dispatcher) time.Time {
	if n.beat == nil {
		return n.since.Add(d.terms.Config.Network.Window.Duration())
	}
	return n.beatAt.Add(d.terms.Config.Network.Window.Duration())
}

func (d *Dispatcher) wakeNode(n *node) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed || n.member == nil {
		return
	}
	d.refresh(n)
	if !time.Now().Before(n.silentAt(d)) {
		for _, r := range n.all() {
			d.lose(r, Silent)
		}
	}
	d.pump()
}

// nodeHeap orders free nodes: the least busy first, among equals the one whose
// last job was given longest ago.
type nodeHeap []*node

func (h nodeHeap) Len() int { return len(h) }
func (h nodeHeap) Less(a, b int) bool {
	x, y := h[a], h[b]
	// used/slots, without the division
	if l, r := x.used()*y.slots, y.used()*x.slots; l != r {
		return l < r
	}
	return x.order < y.order
}
func (h nodeHeap) Swap(a, b int) {
	h[a], h[b] = h[b], h[a]
	h[a].index, h[b].index = a, b
}
func (h *nodeHeap) Push(x any) {
	n := x.(*node)
	n.index = len(*h)
	*h = append(*h, n)
}
func (h *nodeHeap) Pop() any {
	old := *h
	n := old[len(old)-1]
	old[len(old)-1] = nil
	*h = old[:len(old)-1]
	n.index = -1
	return n
}

// NodeStatus is what the network knows about a node in session, or lately so.
type NodeStatus struct {
	Address   evm.Address
	Connected bool
	Since     time.Time // of the session
	Heartbeat *wire.Heartbeat
	BeatAt    time.Time
	Running   int
	Routable  bool
	Reason    string // why not
}

// Nodes returns the nodes that there is something to say about. The heartbeats
// must not be changed.
func (d *Dispatcher) Nodes() []NodeStatus {
	d.mu.Lock()
	defer d.mu.Unlock()
	now := time.Now()
	list := make([]NodeStatus, 0, len(d.nodes))
	for _, n := range d.nodes {
		why := d.assess(n, now)
		list = append(list, NodeStatus{
			Address: n.addr, Connected: n.member != nil, Since: n.since, Heartbeat: n.beat, BeatAt: n.beatAt,
			Running: len(n.running), Routable: why == "", Reason: why,
		})
	}
	return list
}
