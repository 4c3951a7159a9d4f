// Package mirror owns the network's copies of its nodes' receipt logs, and the
// proofs that are made of them.
//
// The rule it keeps: a node is told that the network has its log up to a size only
// when the copy is on disk, leads to the head that the node has signed for that
// size, and goes on from every head before. So whoever has a proof under one head
// can be shown that it still holds under each later one, or two signatures of the
// node that contradict each other.
//
// # What happens to a log
//
//	node ──Leaves──▶ unsigned ──head──▶ compared ──▶ stored ──▶ LeavesAck
//	                 in memory,         with the      full tiles, then
//	                 bounded            root here     head, edge, open tiles
//
// Leaves mean nothing before a head that has them: a session's end forgets them.
// What does not follow on what is here is passed over, and so is what is too much;
// the next head, which then is of more than there is, is answered with what there
// is, and the node goes on from there. So a network whose disk is full loses nothing:
// the node still has it.
//
// A head that does not go on from the last one is kept with it, for good: the node
// is out (see [Mirror.Join]). One whose leaves begin behind the end of the copy, since
// the copy was lost or is too old, begins another copy. It must go on from the head
// that was lost, too, as far as what the node still has reaches back; the rest is a
// gap, which stays visible.
//
// # Receipts that are in no log
//
// With each result a node says the place of its receipt in its log. The copy shows
// whether that is so as soon as it is that long. A place that has another receipt is
// left out; one that is not there after two heartbeats is overdue. Neither stops the
// node, both are counted and shown: a log without what it should have proves
// nothing.
package mirror

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/resultity/node/internal/evm"
	"github.com/resultity/node/internal/network/metrics"
	"github.com/resultity/node/internal/network/store"
	"github.com/resultity/node/internal/receipt"
	"github.com/resultity/node/internal/receiptlog"
)

// Bounds of what is in memory.
const (
	// MaxLeaves is how many leaves may come at once.
	MaxLeaves = 1024
	// maxUnsigned is how many leaves of a node may wait for a head, which is more
	// than nodes keep, and maxAllUnsigned how many of all.
	maxUnsigned    = 1 << 17
	maxAllUnsigned = 4 << 20
	// maxExpected is how many receipts of a node are looked for in its log.
	maxExpected = 4096
)

// patience is after how many heartbeats a receipt must be in the log.
const patience = 2

var (
	// ErrInvalid says that a node's word is wrong in itself.
	ErrInvalid = errors.New("invalid receipt log")
	// ErrPending says that a receipt is not in the copy yet.
	ErrPending = errors.New("the node has not shown it in its log yet")
	// ErrLeftOut says that the node's log has another receipt in the place of one.
	ErrLeftOut = errors.New("the node's log has another receipt in its place")
	// ErrGone says that what would prove a receipt is not kept any more.
	ErrGone = errors.New("its part of the node's log is not kept any more")
)

// records is where copies are kept.
type records interface {
	ReceiptLog(context.Context, evm.Address) (*store.ReceiptLog, error)
	PutReceiptLog(context.Context, evm.Address, *store.ReceiptLog, []store.Tile) error
	Tile(ctx context.Context, node evm.Address, level int, index uint64) ([]byte, error)
}

// Terms is what the network's configuration says about logs.
type Terms struct {
	Network   string
	ChainID   uint64
	Heartbeat time.Duration
}

// Mirror has the copies. Safe for concurrent use.
type Mirror struct {
	records records
	terms   func() Terms
	metrics *metrics.Metrics
	log     *slog.Logger
	out     func(evm.Address, string) // tells that a node is out, and why; must not call back

	wg       sync.WaitGroup // work of copies
	unsigned atomic.Int64   // leaves in memory

	mu     sync.Mutex // guards copies, for the length of a map operation
	copies map[evm.Address]*logCopy
}

// New makes a mirror.
func New(r records, terms func() Terms, m *metrics.Metrics, log *slog.Logger, out func(evm.Address, string)) *Mirror {
	return &Mirror{records: r, terms: terms, metrics: m, log: log, out: out, copies: map[evm.Address]*logCopy{}}
}

// Close waits for what is being written. Sessions must have ended.
func (m *Mirror) Close() { m.wg.Wait() }

// logCopy is the copy of one node's log, as far as it is in memory.
type logCopy struct {
	m    *Mirror
	node evm.Address
	log  *slog.Logger

	mu      sync.Mutex // guards what follows; held for a read of the store only where the copy is loaded
	loaded  bool
	dropped bool              // it is not among Mirror.copies any more
	session *Session          // nil while the node is away
	stored  *store.ReceiptLog // as it is on disk, without its tiles
	base    *store.ReceiptLog // what leaves follow: stored, or the beginning of another copy
	leaves  []evm.Hash        // behind base
	next    *receiptlog.SignedHead
	older   []*receiptlog.SignedHead // to be compared with the copy
	busy    bool                     // work is under way
	failing bool                     // the last try to store something failed
	accuse  bool                     // stored.Conflict is not on disk yet

	expected map[uint64]expectation // by place
	asked    []uint64               // places of these that the copy has already
	overdue  int                    // of these, as last told
	leftOut  uint64
}

// expectation is a receipt that has to be in the log.
type expectation struct {
	leaf  evm.Hash
	job   receipt.JobID
	since time.Time
}

// sizeOf is how many leaves a record stands for.
func sizeOf(r *store.ReceiptLog) uint64 {
	if r.Head != nil {
		return r.Head.Size
	}
	return r.From
}

// Session is a node's session with its copy. After a later Join of the same node
// its methods do nothing.
type Session struct {
	c    *logCopy
	told func(size uint64, head *receiptlog.SignedHead, edge []evm.Hash)
}

// Join begins a session of a node. told is called with what the copy has, at once
// and whenever it has more; it must neither block nor call back. out is why the node
// is to get no jobs, or "".
func (m *Mirror) Join(ctx context.Context, node evm.Address, told func(size uint64, head *receiptlog.SignedHead, edge []evm.Hash)) (s *Session, out string, err error) {
	c := m.take(node)
	defer c.mu.Unlock()
	if !c.loaded {
		if err := c.load(ctx); err != nil {
			c.drop()
			return nil, "", err
		}
	}
	s = &Session{c, told}
	c.session = s
	c.forget()
	c.failing = false
	now := time.Now()
	for i, e := range c.expected {
		e.since = now
		c.expected[i] = e
	}
	c.tell()
	return s, c.out(), nil
}

// take returns the copy of a node, locked.
func (m *Mirror) take(node evm.Address) *logCopy {
	for {
		m.mu.Lock()
		c := m.copies[node]
		if c == nil {
			c = &logCopy{m: m, node: node, log: m.log.With("node", node), expected: map[uint64]expectation{}}
			m.copies[node] = c
		}
		m.mu.Unlock()
		c.mu.Lock()
		if !c.dropped {
			return c
		}
		c.mu.Unlock() // since then it was dropped
	}
}

// load reads what is on disk. What is damaged there begins anew.
func (c *logCopy) load(ctx context.Context) error {
	r, err := c.m.records.ReceiptLog(ctx, c.node)
	if err == nil {
		if bad := check(r); bad != nil {
			err = fmt.Errorf("%w: %w", store.ErrDamaged, bad)
		}
	}
	switch {
	case errors.Is(err, store.ErrNotFound):
		r = new(store.ReceiptLog)
	case errors.Is(err, store.ErrDamaged):
		c.log.Error("copy of the node's receipt log is damaged and begins anew, with what the node still has", "error", err)
		c.m.metrics.LogsDamaged.Inc()
		lost := new(store.ReceiptLog)
		if r != nil {
			lost.Conflict, lost.Lost, lost.LeftOut = r.Conflict, r.Lost, r.LeftOut
			if r.Head != nil && r.Head.Node == c.node && r.Head.Verify() == nil {
				lost.Lost = r.Head
			}
		}
		r = lost
	case err != nil:
		return err
	}
	c.loaded, c.leftOut = true, r.LeftOut
	c.settleDown(r)
	return nil
}

// settleDown takes r for what is on disk. Its tiles are not kept in memory.
func (c *logCopy) settleDown(r *store.ReceiptLog) {
	slim := *r
	slim.Open = nil
	c.stored, c.base = &slim, &slim
}

// forget drops the leaves that have no head.
func (c *logCopy) forget() {
	keep := 0
	if c.next != nil {
		keep = int(c.next.Size - sizeOf(c.base))
	} else {
		c.base = c.stored
	}
	c.m.unsigned.Add(int64(keep - len(c.leaves)))
	c.leaves = slices.Clone(c.leaves[:keep])
}

// tell says what is stored.
func (c *logCopy) tell() {
	if c.session != nil {
		c.session.told(c.stored.Size(), c.stored.Head, c.stored.Edge)
	}
}

// out says why the node gets no jobs, or "".
func (c *logCopy) out() string {
	if x := c.stored.Conflict; x != nil {
		return fmt.Sprintf("its receipt log of %d receipts does not go on from the one of %d that it has signed before; the network's operator has both heads", x.Second.Size, x.First.Size)
	}
	return ""
}

// Leave ends the session. What has no head is forgotten.
func (s *Session) Leave() {
	c := s.c
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.session != s {
		return
	}
	c.session = nil
	c.forget()
	c.drop()
}

// drop forgets a copy that nobody needs.
func (c *logCopy) drop() {
	if c.session != nil || c.busy || c.next != nil || c.accuse || len(c.expected) > 0 {
		return
	}
	c.m.mu.Lock()
	defer c.m.mu.Unlock()
	delete(c.m.copies, c.node)
	c.dropped = true
}

// Leaves takes leaves that follow from others; edge is the log up to the first of
// them, where the node thinks that the copy does not reach so far. It reports
// whether there was anything new. The error ends the session.
func (s *Session) Leaves(from uint64, leaves, edge []evm.Hash) (news bool, err error) {
	c := s.c
	if len(leaves) == 0 || len(leaves) > MaxLeaves || from > receiptlog.MaxSize {
		return false, fmt.Errorf("%w: %d leaves from %d, want 1 to %d", ErrInvalid, len(leaves), from, MaxLeaves)
	}
	if slices.Contains(leaves, evm.Hash{}) {
		return false, fmt.Errorf("%w: a leaf of zeros", ErrInvalid)
	}
	if edge != nil {
		if _, err := receiptlog.Resume(from, edge); err != nil {
			return false, fmt.Errorf("%w: %w", ErrInvalid, err)
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.session != s || c.stored.Conflict != nil {
		return false, nil
	}
	have := sizeOf(c.base) + uint64(len(c.leaves))
	if from > have && edge != nil && c.next == nil && !c.busy { // see the package comment
		c.m.unsigned.Add(-int64(len(c.leaves)))
		c.leaves, c.base = nil, begin(from, edge)
		c.base.Conflict, c.base.Lost, c.base.LeftOut = c.stored.Conflict, c.stored.Lost, c.leftOut
		if c.stored.Head != nil {
			c.base.Lost = c.stored.Head
		}
		have = from
	}
	if from > have || from+uint64(len(leaves)) <= have {
		return false, nil
	}
	leaves = leaves[have-from:]
	if len(c.leaves)+len(leaves) > maxUnsigned || c.m.unsigned.Load() > maxAllUnsigned {
		return false, nil
	}
	c.m.unsigned.Add(int64(len(leaves)))
	c.leaves = append(c.leaves, leaves...)
	return true, nil
}

// Beat takes the head of a heartbeat, which may be nil. The error ends the session.
func (s *Session) Beat(h *receiptlog.SignedHead) error {
	c := s.c
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.session != s {
		return nil
	}
	c.lookForOverdue()
	if c.accuse {
		c.kick()
	}
	if h == nil || c.stored.Conflict != nil {
		return nil
	}
	for _, known := range []*receiptlog.SignedHead{c.stored.Head, c.next} {
		if known != nil && *known == *h {
			c.kick() // the last try may have failed
			return nil
		}
	}
	t := c.m.terms()
	if h.Node != c.node || h.ChainID != t.ChainID || h.Network != t.Network {
		return fmt.Errorf("%w: a head of node %s in network %.64q on chain %d", ErrInvalid, h.Node, h.Network, h.ChainID)
	}
	if err := h.Verify(); err != nil {
		return fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	base := sizeOf(c.base)
	switch have := base + uint64(len(c.leaves)); {
	case h.Size > have:
		c.count("incomplete")
		c.tell()
	case h.Size < base || h.Size == base && c.base.Head == nil:
		c.count("older")
		if h.Size > 0 && len(c.older) == 0 { // one at a time is enough to catch it
			c.older = append(c.older, h)
		}
		c.kick()
	default:
		root, err := c.root(h.Size)
		if err != nil {
			return err
		}
		if root == h.Root {
			if h.Size > base && (c.next == nil || h.Size > c.next.Size) {
				c.next = h
			}
			c.kick()
			return nil
		}
		first := c.base.Head
		if first == nil {
			first = c.base.Lost
		}
		if first == nil {
			return fmt.Errorf("%w: the first head is not that of the leaves before it", ErrInvalid)
		}
		c.conflict(first, h)
	}
	return nil
}

// root is the root of the log with what is in memory, at a size not below base.
func (c *logCopy) root(size uint64) (evm.Hash, error) {
	base := sizeOf(c.base)
	log, err := receiptlog.Resume(base, c.base.Edge)
	if err != nil {
		return evm.Hash{}, err
	}
	for _, leaf := range c.leaves[:size-base] {
		log.Append(leaf, nil)
	}
	return log.Root(), nil
}

// conflict keeps two heads that cannot be of one log. The node is out from now on.
func (c *logCopy) conflict(first, second *receiptlog.SignedHead) {
	c.count("conflict")
	c.log.Error("receipt log of the node contradicts what it has signed before; it gets no more jobs",
		"first_size", first.Size, "first_root", first.Root, "second_size", second.Size, "second_root", second.Root)
	stored := *c.stored
	stored.Conflict = &store.Conflict{First: *first, Second: *second, Found: time.Now().UnixMilli()}
	c.stored, c.next, c.older, c.accuse = &stored, nil, nil, true
	c.forget()
	c.m.out(c.node, c.out())
	c.kick()
}

func (c *logCopy) count(verdict string) { c.m.metrics.Heads.WithLabelValues(verdict).Inc() }

// kick has what there is to do done, if it is not being done.
func (c *logCopy) kick() {
	if c.busy {
		return
	}
	c.busy = true
	c.m.wg.Go(c.work)
}

// work does what there is to do, until there is nothing or it fails.
func (c *logCopy) work() {
	c.mu.Lock()
	defer c.mu.Unlock()
	defer func() {
		c.busy = false
		c.drop()
	}()
	for {
		var err error
		switch {
		case c.accuse:
			err = c.storeConflict()
		case c.stored.Conflict != nil:
			return
		case c.next != nil:
			err = c.storeHead()
		case len(c.older) > 0:
			err = c.compare()
		case len(c.asked) > 0:
			err = c.look()
		default:
			return
		}
		failed := err != nil
		if failed && !c.failing {
			c.log.Error("receipt log of the node is not stored; its next heartbeat has it tried again", "error", err)
		}
		c.failing = failed
		if failed {
			c.count("failed")
			return
		}
	}
}

// unlocked runs f without the lock: it waits for the disk.
func (c *logCopy) unlocked(f func()) {
	c.mu.Unlock()
	defer c.mu.Lock()
	f()
}

// opTimeout bounds what is done at once: writes bound themselves.
const opTimeout = 30 * time.Second

// storeHead makes the next head durable, and what leads to it.
func (c *logCopy) storeHead() (err error) {
	head, base := c.next, c.base
	leaves := c.leaves[:head.Size-sizeOf(base)]
	first, lostRoot, shown := base.Lost, evm.Hash{}, false
	if first != nil && first.Size >= sizeOf(base) && first.Size <= head.Size {
		if lostRoot, err = c.root(first.Size); err != nil {
			return err
		}
		if lostRoot != first.Root {
			c.conflict(first, head)
			return nil
		}
		shown = true
	}
	var next *store.ReceiptLog
	leftOut := c.leftOut
	c.unlocked(func() {
		ctx, cancel := context.WithTimeout(context.Background(), opTimeout)
		defer cancel()
		r := base
		if base.Head != nil { // its tiles are on disk
			if r, err = c.m.records.ReceiptLog(ctx, c.node); err != nil {
				return
			}
			if r.Head == nil || *r.Head != *base.Head {
				err = fmt.Errorf("%w: it is not what was written last", store.ErrDamaged)
				return
			}
			if bad := follows(r); bad != nil {
				err = fmt.Errorf("%w: %w", store.ErrDamaged, bad)
				return
			}
		}
		var full []store.Tile
		if next, full, err = grow(r, leaves); err != nil {
			return
		}
		next.Head, next.Stored, next.LeftOut = head, time.Now().UnixMilli(), leftOut
		if shown {
			next.Lost = nil
		}
		begun := time.Now()
		err = c.m.records.PutReceiptLog(ctx, c.node, next, full)
		c.m.metrics.StoreSeconds.WithLabelValues("receiptlog").Observe(time.Since(begun).Seconds())
	})
	if errors.Is(err, store.ErrDamaged) || errors.Is(err, store.ErrNotFound) {
		return c.again(err)
	}
	if err != nil {
		return err
	}
	c.count("stored")
	if x := c.stored.Conflict; x != nil { // found meanwhile
		next.Conflict = x
		c.settleDown(next)
		return nil
	}
	c.m.metrics.Leaves.Add(float64(len(leaves)))
	from := sizeOf(base)
	c.settleDown(next)
	c.m.unsigned.Add(-int64(len(leaves)))
	c.leaves = slices.Clone(c.leaves[len(leaves):])
	if c.next == head {
		c.next = nil
	}
	for i := range c.expected {
		switch {
		case i >= head.Size:
		case i >= from:
			c.settle(i, leaves[i-from])
		case !slices.Contains(c.asked, i):
			c.asked = append(c.asked, i)
		}
	}
	c.tell()
	return nil
}

// again begins a copy that was found damaged anew.
func (c *logCopy) again(why error) error {
	c.log.Error("copy of the node's receipt log was changed by somebody else", "error", why)
	c.next, c.older, c.asked = nil, nil, nil
	c.forget()
	ctx, cancel := context.WithTimeout(context.Background(), opTimeout)
	defer cancel()
	lost, conflict := c.stored.Head, c.stored.Conflict
	if err := c.load(ctx); err != nil {
		return err
	}
	if c.stored.Head == nil && c.stored.Lost == nil {
		c.stored.Lost = lost
	}
	if conflict != nil {
		c.stored.Conflict = conflict
	}
	c.tell()
	return nil
}

// storeConflict makes the two heads durable.
func (c *logCopy) storeConflict() (err error) {
	conflict := c.stored.Conflict
	c.unlocked(func() {
		ctx, cancel := context.WithTimeout(context.Background(), opTimeout)
		defer cancel()
		var r *store.ReceiptLog
		r, err = c.m.records.ReceiptLog(ctx, c.node)
		if errors.Is(err, store.ErrNotFound) || errors.Is(err, store.ErrDamaged) {
			r, err = new(store.ReceiptLog), nil
		}
		if err == nil {
			r.Conflict = conflict
			err = c.m.records.PutReceiptLog(ctx, c.node, r, nil)
		}
	})
	if err == nil {
		c.accuse = false
	}
	return err
}

// view reads the copy as it is on disk.
func (m *Mirror) view(ctx context.Context, node evm.Address) (*view, error) {
	r, err := m.records.ReceiptLog(ctx, node)
	if err != nil {
		return nil, err
	}
	return newView(ctx, r, m.records.Tile)
}

// compare finds out whether a head of fewer leaves is one of this log.
func (c *logCopy) compare() (err error) {
	h := c.older[0]
	var newest *receiptlog.SignedHead
	var root evm.Hash
	c.unlocked(func() {
		ctx, cancel := context.WithTimeout(context.Background(), opTimeout)
		defer cancel()
		var v *view
		if v, err = c.m.view(ctx, c.node); err != nil {
			return
		}
		newest = v.log.Head
		root, err = v.root(h.Size)
	})
	if errors.Is(err, errNotHere) || errors.Is(err, store.ErrNotFound) || errors.Is(err, store.ErrDamaged) {
		err, root = nil, h.Root // nothing is known against it
	}
	if err != nil {
		return err
	}
	c.older = nil
	if root != h.Root {
		c.conflict(newest, h)
	}
	return nil
}

// look finds out about a receipt whose place the copy had already.
func (c *logCopy) look() (err error) {
	i := c.asked[0]
	var leaf evm.Hash
	c.unlocked(func() {
		ctx, cancel := context.WithTimeout(context.Background(), opTimeout)
		defer cancel()
		var v *view
		if v, err = c.m.view(ctx, c.node); err == nil {
			leaf, err = v.node(receiptlog.NodeID{Index: i})
		}
	})
	unknown := errors.Is(err, errNotHere) || errors.Is(err, store.ErrNotFound) || errors.Is(err, store.ErrDamaged)
	if err != nil && !unknown {
		return err
	}
	c.asked = c.asked[1:]
	if unknown {
		delete(c.expected, i)
		return nil
	}
	c.settle(i, leaf)
	return nil
}

// Result says that the network has a receipt of the node's, and the place in its log
// that the node gives it.
func (s *Session) Result(index uint64, leaf evm.Hash, job receipt.JobID) {
	c := s.c
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.session != s || c.stored.Conflict != nil {
		return
	}
	if e, ok := c.expected[index]; ok {
		if e.leaf != leaf {
			c.miss(index, job)
		}
		return
	}
	if len(c.expected) >= maxExpected {
		return // it is behind by so many anyway, which shows
	}
	c.expected[index] = expectation{leaf, job, time.Now()}
	if index < c.stored.Size() {
		c.asked = append(c.asked, index)
		c.kick()
	}
}

// settle compares what was expected at a place with what is there.
func (c *logCopy) settle(index uint64, leaf evm.Hash) {
	e, ok := c.expected[index]
	delete(c.expected, index)
	if ok && e.leaf != leaf {
		c.miss(index, e.job)
	}
}

// miss counts a receipt that is not where the node has said.
func (c *logCopy) miss(index uint64, job receipt.JobID) {
	c.leftOut++
	c.m.metrics.LeftOut.Inc()
	c.log.Error("receipt log of the node has another receipt in the place of the job's", "job", job, "index", index)
}

// isOverdue counts the receipts that should have been in the log by now.
func (c *logCopy) isOverdue() (n int) {
	if c.session == nil || c.failing {
		return 0
	}
	before := time.Now().Add(-patience * c.m.terms().Heartbeat)
	for _, e := range c.expected {
		if e.since.Before(before) {
			n++
		}
	}
	return n
}

// lookForOverdue says when that begins and ends.
func (c *logCopy) lookForOverdue() {
	n := c.isOverdue()
	switch {
	case n > 0 && c.overdue == 0:
		c.log.Warn("receipts of the node are not in its log, though heartbeats have come since", "receipts", n, "log", c.stored.Size())
	case n == 0 && c.overdue > 0:
		c.log.Info("receipts of the node are in its log again, as far as they have to be")
	}
	c.overdue = n
}

// State is how the log of a node does.
type State struct {
	Waiting int    // receipts that the network has and that are not in the log
	Overdue int    // of these, those that should have been by now
	LeftOut uint64 // receipts in whose place the log has another
}

// States returns the state of the logs about which there is something in memory.
func (m *Mirror) States() map[evm.Address]State {
	m.mu.Lock()
	list := make([]*logCopy, 0, len(m.copies))
	for _, c := range m.copies {
		list = append(list, c)
	}
	m.mu.Unlock()
	states := make(map[evm.Address]State, len(list))
	for _, c := range list {
		c.mu.Lock()
		states[c.node] = State{len(c.expected), c.isOverdue(), c.leftOut}
		c.mu.Unlock()
	}
	return states
}

// Prove shows that a receipt, given by its leaf, is at a place in the log of its
// node. It fails with [ErrPending], [ErrLeftOut], [ErrGone] or [store.ErrDamaged].
func (m *Mirror) Prove(ctx context.Context, node evm.Address, index uint64, leaf evm.Hash) (*receiptlog.Inclusion, error) {
	v, err := m.view(ctx, node)
	if errors.Is(err, store.ErrNotFound) || err == nil && index >= v.log.Size() {
		return nil, ErrPending
	}
	if err != nil {
		return nil, err
	}
	head := v.log.Head
	has, err := v.node(receiptlog.NodeID{Index: index})
	var p *receiptlog.Proof
	if err == nil {
		p, err = receiptlog.Prove(index, head.Size, v.node)
	}
	if errors.Is(err, errNotHere) {
		return nil, ErrGone
	}
	if err == nil { // whatever it is, it is proven or not here
		if bad := p.Check(has, head.Root); bad != nil {
			err = fmt.Errorf("receipt log of %s: %w: %w", node, store.ErrDamaged, bad)
		}
	}
	if err != nil {
		if errors.Is(err, store.ErrDamaged) {
			m.metrics.LogsDamaged.Inc()
			m.log.Error("copy of a node's receipt log is damaged", "node", node, "index", index, "error", err)
		}
		return nil, err
	}
	if has != leaf {
		return nil, ErrLeftOut
	}
	return &receiptlog.Inclusion{Head: *head, Index: index, Path: p.Path}, nil
}
