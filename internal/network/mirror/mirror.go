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
// Leaves mean nothing before a head that has them: the end of the session forgets
// them, and so does a while without one. Where there are too many they are not taken:
// the node is heard again when its head has come and some time has passed, and is told
// what is stored. Each session begins from that, too. So a network that is slow, or whose
// disk is full, loses nothing and ends no session: the node still has it.
//
// A head that does not go on from the last one is kept with it, for good: the node
// is out (see [Mirror.Join]), until the network's operator has its log begin anew: what
// was there is kept, proofs are still made of it, and the heads that were set aside stay
// with the network's signed word (see [Mirror.Reset]). One whose leaves begin behind the end of the copy, since
// the copy was lost or is too old, begins another copy. It must go on from the head
// that was lost, too, as far as what the node still has reaches back; the rest is a
// gap, which stays visible.
//
// Each tile is checked against the one above it when it is read. One that is damaged is made
// again of those below it; its leaves the node is asked for, with the next word that it gets. What
// neither has cannot be proven any more, which is said once.
//
// # Receipts that are in no log
//
// A log without what it should have proves nothing, so each receipt that comes with
// a result is looked for in it. One that is not there after two heartbeats is
// overdue; one that the log has gone on without for longer is left out. Neither
// stops the node, both are counted and shown.
//
// There is no index of leaves: a proof is asked for with the time at which the
// result came, and the leaf is in one of the few tiles that were put then.
package mirror

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/resultity/node/internal/evm"
	"github.com/resultity/node/internal/journal"
	"github.com/resultity/node/internal/network/metrics"
	"github.com/resultity/node/internal/network/store"
	"github.com/resultity/node/internal/receipt"
	"github.com/resultity/node/internal/receiptlog"
	"github.com/resultity/node/internal/wire"
)

// Bounds of what is in memory.
const (
	// maxUnsigned is how many leaves of a node may wait for a head, or for the disk,
	// and maxAllUnsigned how many of all.
	maxUnsigned    = 2 * wire.MaxPending
	maxAllUnsigned = 4 << 20
	// few is how many a node may have even then: nodes that send many and no head keep
	// nobody else from showing what comes of jobs.
	few = 256
	// maxExpected is how many receipts of a node are looked for in its log.
	maxExpected = 4096
)

// headEvery is the least time between two heads of a node that are stored, or
// compared: of those that come faster the last one counts.
const headEvery = time.Second

const (
	// unheaded is how long leaves may wait for their head.
	unheaded = time.Minute
	// deafFor is how long a node waits, and up to as much again, whose leaves were not
	// taken.
	deafFor = 5 * time.Second
)

// atOnce is how many copies may use the disk at once: jobs and their results come
// first, and a node waits for the word about its last head before it sends the next.
const atOnce = 4

// patience is after how many heartbeats a receipt must be in the log, and surrender
// after how many it is not waited for any more if the log has grown meanwhile.
const (
	patience  = 2
	surrender = 12
)

var (
	// ErrInvalid says that a node's word is wrong in itself.
	ErrInvalid = errors.New("invalid receipt log")
	// ErrCrowded says that a node has sent more leaves than it may before a head. A later
	// session may send them again.
	ErrCrowded = errors.New("no room for the leaves of the receipt log now")
	// ErrPending says that a receipt is not in what there is of its node's log.
	ErrPending = errors.New("the node has not shown it in its log")
)

// records is where copies are kept.
type records interface {
	ReceiptLog(context.Context, evm.Address) (*store.ReceiptLog, error)
	PutReceiptLog(context.Context, evm.Address, *store.ReceiptLog, []store.Tile) error
	ResetReceiptLog(ctx context.Context, node evm.Address, ended, anew *store.ReceiptLog) error
	EndedReceiptLog(ctx context.Context, node evm.Address, era uint64) (*store.ReceiptLog, error)
	Tile(ctx context.Context, node evm.Address, era uint64, level int, index uint64) ([]byte, time.Time, error)
	MendTile(ctx context.Context, node evm.Address, era uint64, t store.Tile, at time.Time) error
}

// Terms is what the network's configuration says about logs.
type Terms struct {
	Network   string
	ChainID   uint64
	Heartbeat time.Duration
	Clock     time.Duration // by how much a node's clock may be off
}

// Mirror has the copies. Safe for concurrent use.
type Mirror struct {
	records records
	terms   func() Terms
	key     *evm.Key // of the network's messages
	metrics *metrics.Metrics
	log     *slog.Logger
	out     func(evm.Address, string) // tells that a node is out, and why; must not call back

	wg       sync.WaitGroup // work of copies
	unsigned atomic.Int64   // leaves in memory
	every    time.Duration  // headEvery; tests have less patience
	turns    chan struct{}  // has an element for each copy that uses the disk

	mu     sync.Mutex // guards copies, for the length of a map operation
	copies map[evm.Address]*logCopy
}

// New makes a mirror. key signs the network's word for a log that begins anew.
func New(r records, terms func() Terms, key *evm.Key, m *metrics.Metrics, log *slog.Logger, out func(evm.Address, string)) *Mirror {
	return &Mirror{records: r, terms: terms, key: key, metrics: m, log: log, out: out, every: headEvery, turns: make(chan struct{}, atOnce), copies: map[evm.Address]*logCopy{}}
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
	older   []*receiptlog.SignedHead   // to be compared with the copy
	busy    bool                       // work is under way
	worked  time.Time                  // when a head was stored last, or compared
	failing bool                       // the last try to store something failed
	accuse  bool                       // stored.Conflict is not on disk yet
	reset   func() error               // has the log begin anew; once
	broken  []*damagedTile             // to be mended
	mended  [][]evm.Hash               // leaves of the first of these, as the node has sent them
	gone    map[receiptlog.NodeID]bool // tiles that nobody can mend

	expected map[evm.Hash]expectation // by leaf
	asked    []evm.Hash               // of these, to be looked for in the copy
	overdue  int                      // of these
	leftOut  uint64
}

// expectation is a receipt that has to be in the log.
type expectation struct {
	job     receipt.JobID
	since   time.Time // when it came, or when the session began
	size    uint64    // of the copy then
	asked   bool      // it has been looked for
	overdue bool      // in vain
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
	told func(*wire.LeavesAck)
	over func(why string)
	size uint64 // that was told last; guarded by the copy's mu, like what follows
	some bool   // leaves have come

	deaf  bool        // leaves are not taken, nor heads of them
	again *time.Timer // ends that
	bare  *time.Timer // ends the patience with leaves that have no head
}

// Join begins a session of a node. told is called with what the copy has, at once
// and whenever it has more; over where the session has to begin again. They must neither
// block nor call back. out is why the node is to get no jobs, or "".
func (m *Mirror) Join(ctx context.Context, node evm.Address, told func(*wire.LeavesAck), over func(why string)) (s *Session, out string, err error) {
	c := m.take(node)
	defer c.mu.Unlock()
	if !c.loaded {
		if err := c.load(ctx); err != nil {
			c.drop()
			return nil, "", err
		}
	}
	s = &Session{c: c, told: told, over: over}
	if c.session != nil {
		c.session.stop()
	}
	c.session = s
	c.forget()
	c.failing = false
	now := time.Now()
	for leaf, e := range c.expected {
		c.expected[leaf] = expectation{job: e.job, since: now, size: c.stored.Size()}
	}
	c.asked, c.overdue, c.gone = nil, 0, nil
	first := c.says()
	if first.Reset, err = c.word(); err != nil {
		c.session = nil
		c.drop()
		return nil, "", err
	}
	told(first)
	return s, c.out(), nil
}

// take returns the copy of a node, locked.
func (m *Mirror) take(node evm.Address) *logCopy {
	for {
		m.mu.Lock()
		c := m.copies[node]
		if c == nil {
			c = &logCopy{m: m, node: node, log: m.log.With("node", node), expected: map[evm.Hash]expectation{}}
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
		c.log.Error("copy of the node's receipt log is damaged and begins anew, with what the node still has", journal.ReceiptLogDamaged.Attr(), "error", err)
		c.m.metrics.LogsDamaged.Inc()
		lost := new(store.ReceiptLog)
		if r != nil {
			lost.Conflict, lost.Lost, lost.Resets, lost.LeftOut = r.Conflict, r.Lost, r.Resets, r.LeftOut
			if r.Head != nil && r.Head.Node == c.node && r.Head.Era == r.Era() && r.Head.Verify() == nil {
				lost.Lost = r.Head
			}
		}
		r = lost
	case err != nil:
		return err
	}
	c.loaded, c.leftOut = true, r.LeftOut
	c.broken, c.mended, c.gone = nil, nil, nil // they were of what was there before
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

// says is what the node is told.
func (c *logCopy) says() *wire.LeavesAck {
	c.session.size = c.stored.Size()
	a := &wire.LeavesAck{Size: c.stored.Size(), Head: c.stored.Head, Edge: c.stored.Edge}
	if lost := c.stored.Lost; lost != nil && lost.Size > a.Size {
		a.Lost = lost
	}
	if len(c.broken) > 0 && c.broken[0].id.Level == 0 && len(c.mended) == 0 {
		from := c.broken[0].id.Index << tileBits
		a.Again = &from
	}
	return a
}

// tell says what is stored.
func (c *logCopy) tell() {
	if c.session != nil && !c.session.deaf { // else it is told in a while
		c.session.told(c.says())
	}
}

// word is the network's word for the era of the log, by the key that it has now; nil in
// the first era.
func (c *logCopy) word() (*receiptlog.SignedReset, error) {
	n := len(c.stored.Resets)
	if n == 0 {
		return nil, nil
	}
	last := c.stored.Resets[n-1]
	return last.Sign(last.ChainID, c.m.key)
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
	s.stop()
	c.forget()
	c.drop()
}

// stop stops the timers.
func (s *Session) stop() {
	for _, t := range []*time.Timer{s.again, s.bare} {
		if t != nil {
			t.Stop()
		}
	}
}

// close has the copy take no leaves, until it has been open again.
func (s *Session) close(why string) {
	s.c.count(why)
	s.deaf = true
	s.c.forget()
}

// open has the node told in a while what is stored, whose leaves were not taken.
// Its head has come, so that none of them are on their way.
func (s *Session) open() {
	if s.again != nil {
		return
	}
	s.again = time.AfterFunc(deafFor+rand.N(deafFor), func() {
		s.c.mu.Lock()
		defer s.c.mu.Unlock()
		s.again = nil
		if s.c.session == s {
			s.deaf = false
			s.c.tell()
		}
	})
}

// await ends the patience with leaves that have no head, or begins it.
func (s *Session) await() {
	c := s.c
	covered := uint64(0)
	if c.next != nil {
		covered = c.next.Size - sizeOf(c.base)
	}
	switch {
	case uint64(len(c.leaves)) <= covered:
		if s.bare != nil {
			s.bare.Stop()
			s.bare = nil
		}
	case s.bare == nil:
		s.bare = time.AfterFunc(unheaded, func() {
			c.mu.Lock()
			defer c.mu.Unlock()
			if c.session == s && s.bare != nil {
				s.bare = nil
				s.close("unheaded")
			}
		})
	}
}

// drop forgets a copy that nobody needs.
func (c *logCopy) drop() {
	if c.session != nil || c.busy || c.next != nil || c.accuse || c.reset != nil || len(c.expected) > 0 {
		return
	}
	c.m.mu.Lock()
	defer c.m.mu.Unlock()
	delete(c.m.copies, c.node)
	c.dropped = true
}

// Leaves takes leaves of the node's log. It reports whether there was anything new.
// The error ends the session.
func (s *Session) Leaves(l *wire.Leaves) (news bool, err error) {
	c, from, leaves := s.c, l.From, l.Leaves
	if slices.Contains(leaves, evm.Hash{}) {
		return false, fmt.Errorf("%w: a leaf of zeros", ErrInvalid)
	}
	if _, err := receiptlog.Resume(from, l.Edge); len(l.Edge) > 0 && err != nil {
		return false, fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.session != s || c.stored.Conflict != nil || s.deaf {
		return false, nil
	}
	if len(l.Edge) > 0 {
		if s.some || from <= s.size {
			return false, fmt.Errorf("%w: an edge at %d, behind %d", ErrInvalid, from, s.size)
		}
		if c.next != nil || c.busy { // of the session before
			return false, ErrCrowded
		}
		c.base = begin(from, l.Edge) // see the package comment
		c.base.Lost, c.base.Resets, c.base.LeftOut = c.stored.Lost, c.stored.Resets, c.leftOut
		if c.stored.Head != nil {
			c.base.Lost = c.stored.Head
		}
	}
	if l.Again {
		return s.leavesAgain(l), nil
	}
	s.some = true
	have := sizeOf(c.base) + uint64(len(c.leaves))
	if from > have {
		return false, fmt.Errorf("%w: leaves from %d on, behind %d", ErrInvalid, from, have)
	}
	if from+uint64(len(leaves)) <= have { // the session before has stored more than this one was told at its beginning
		return false, nil
	}
	leaves = leaves[have-from:]
	switch n := len(c.leaves) + len(leaves); {
	case n > maxUnsigned:
		return false, ErrCrowded
	case n > few && c.m.unsigned.Load() > maxAllUnsigned:
		s.close("crowded")
		return false, nil
	}
	c.m.unsigned.Add(int64(len(leaves)))
	c.leaves = append(c.leaves, leaves...)
	s.await()
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
	if h.Node != c.node || h.ChainID != t.ChainID || h.Network != t.Network || h.Era != c.stored.Era() {
		return fmt.Errorf("%w: a head of node %s in network %.64q on chain %d, era %d", ErrInvalid, h.Node, h.Network, h.ChainID, h.Era)
	}
	if err := h.Verify(); err != nil {
		return fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	window := uint64(t.Clock.Milliseconds())
	if now := uint64(time.Now().UnixMilli()); h.Time > now+window {
		return fmt.Errorf("%w: a head of %d milliseconds, at %d", ErrInvalid, h.Time, now)
	}
	if last := c.base.Head; last != nil && h.Size > last.Size && h.Time+2*window < last.Time {
		return fmt.Errorf("%w: a head of %d milliseconds, behind one of %d", ErrInvalid, h.Time, last.Time)
	}
	base := sizeOf(c.base)
	switch have := base + uint64(len(c.leaves)); {
	case h.Size > have && s.deaf:
		s.open()
	case h.Size > have:
		return fmt.Errorf("%w: a head of %d receipts behind leaves of %d", ErrInvalid, h.Size, have)
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
				s.await()
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
	c.log.Error("receipt log of the node contradicts what it has signed before; it gets no more jobs", journal.NodeLogContradicted.Attr(),
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
		case c.reset != nil: // whatever else has failed
			_ = c.reset() // who has asked is told
			c.reset = nil
			continue
		case c.accuse:
			err = c.storeConflict()
		case c.stored.Conflict != nil:
			return
		case (c.next != nil || len(c.older) > 0) && time.Since(c.worked) < c.m.every:
			wait := c.m.every - time.Since(c.worked)
			c.mu.Unlock()
			time.Sleep(wait)
			c.mu.Lock()
			continue
		case c.next != nil:
			c.worked = time.Now()
			err = c.storeHead()
		case len(c.older) > 0:
			c.worked = time.Now()
			err = c.compare()
		case len(c.broken) > 0 && (c.broken[0].id.Level > 0 || len(c.mended) > 0):
			c.mend()
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
			if c.reset == nil {
				return
			}
		}
	}
}

// unlocked runs f without the lock: it waits for the disk.
func (c *logCopy) unlocked(f func()) {
	c.mu.Unlock()
	defer c.mu.Lock()
	c.m.turns <- struct{}{}
	defer func() { <-c.m.turns }()
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
	c.settleDown(next)
	c.m.unsigned.Add(-int64(len(leaves)))
	c.leaves = slices.Clone(c.leaves[len(leaves):])
	if c.next == head {
		c.next = nil
	}
	for _, leaf := range leaves {
		c.settle(leaf)
	}
	c.tell()
	return nil
}

// again begins a copy that was found damaged anew.
func (c *logCopy) again(why error) error {
	c.log.Error("copy of the node's receipt log was changed by somebody else", journal.ReceiptLogDamaged.Attr(), "error", why)
	c.next, c.older, c.asked = nil, nil, nil
	c.forget()
	if c.session != nil { // its next head would be one of leaves that are forgotten
		c.session.over("the network has lost what it had of the receipt log")
		c.session = nil
	}
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
			r, err = &store.ReceiptLog{LogSummary: store.LogSummary{Lost: c.stored.Lost, Resets: c.stored.Resets, LeftOut: c.stored.LeftOut}}, nil
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

// ErrWhole says that there is nothing wrong with a log that is to begin anew.
var ErrWhole = errors.New("nothing is wrong with the receipt log as far as the network knows; where its store was set back (a backup) and the node says receipt-log-behind, --force has it begin anew all the same")

// Reset has the log of a node begin anew, in another era: its next heads go on from
// none. Without force it fails with [ErrWhole] for a log that neither contradicts itself
// nor has lost anything. The node is told in its next session, which begins at once.
func (m *Mirror) Reset(ctx context.Context, node evm.Address, operator, reason string, force bool) (*store.Reset, error) {
	if err := receiptlog.CheckReason(reason); err != nil {
		return nil, err
	}
	c := m.take(node)
	if !c.loaded {
		if err := c.load(ctx); err != nil {
			c.drop()
			c.mu.Unlock()
			return nil, err
		}
	}
	if c.reset != nil {
		c.mu.Unlock()
		return nil, fmt.Errorf("the receipt log of %s is being reset already", node)
	}
	var done *store.Reset
	result := make(chan error, 1)
	c.reset = func() (err error) {
		done, err = c.beginAnew(operator, reason, force)
		result <- err
		return err
	}
	c.kick()
	c.mu.Unlock()
	err := <-result // bounded, as writes are
	return done, err
}

// beginAnew makes another era durable, and ends the session.
func (c *logCopy) beginAnew(operator, reason string, force bool) (*store.Reset, error) {
	is := c.stored
	if is.Conflict == nil && is.Lost == nil && !force {
		return nil, ErrWhole
	}
	if len(is.Resets) >= store.MaxResets {
		return nil, fmt.Errorf("the receipt log of %s has begun anew %d times, and none of them is forgotten: the node needs another key", c.node, len(is.Resets))
	}
	t := c.m.terms()
	r := receiptlog.Reset{Node: c.node, Network: t.Network, Before: is.Era(), Era: max(uint64(time.Now().UnixMilli()), is.Era()+1), First: is.Head, Reason: reason}
	if is.Head == nil {
		r.First = is.Lost
	}
	if x := is.Conflict; x != nil {
		r.First, r.Second = &x.First, &x.Second
	}
	word, err := r.Sign(t.ChainID, c.m.key)
	if err != nil {
		return nil, err
	}
	done := store.Reset{SignedReset: *word, Operator: operator}
	anew := &store.ReceiptLog{LogSummary: store.LogSummary{Resets: append(slices.Clone(is.Resets), done), LeftOut: c.leftOut, Stored: time.Now().UnixMilli()}}
	c.end() // what it says now is of the era that ends
	c.unlocked(func() {
		ctx, cancel := context.WithTimeout(context.Background(), opTimeout)
		defer cancel()
		var ended *store.ReceiptLog
		if ended, err = c.m.records.ReceiptLog(ctx, c.node); err == nil {
			ended.Conflict = is.Conflict // which may not be on disk yet
		} else if errors.Is(err, store.ErrNotFound) || errors.Is(err, store.ErrDamaged) {
			ended, err = nil, nil
		}
		if err == nil {
			err = c.m.records.ResetReceiptLog(ctx, c.node, ended, anew)
		}
	})
	if err != nil {
		return nil, err
	}
	c.m.metrics.LogResets.Inc()
	c.log.Warn("receipt log of the node begins anew, by the network's operator", journal.NodeLogReset.Attr(), "operator", operator, "reason", reason, "era", r.Era, "before", r.Before)
	c.next, c.older, c.asked, c.accuse = nil, nil, nil, false
	c.broken, c.mended, c.gone = nil, nil, nil
	c.settleDown(anew)
	c.forget()
	for leaf, e := range c.expected { // the log has them, or goes on without them
		c.expected[leaf] = expectation{job: e.job, since: time.Now()}
	}
	c.overdue = 0
	c.end()
	c.m.out(c.node, "")
	return &done, nil
}

// end has the session begin again, for the log that began anew.
func (c *logCopy) end() {
	if c.session != nil {
		c.session.over("the receipt log begins anew")
		c.session = nil
	}
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

// look looks for a receipt that should be in the log.
func (c *logCopy) look() (err error) {
	leaf := c.asked[0]
	at := c.expected[leaf].since
	c.unlocked(func() {
		ctx, cancel := context.WithTimeout(context.Background(), opTimeout)
		defer cancel()
		var v *view
		if v, err = c.m.view(ctx, c.node); err == nil {
			_, err = v.find(leaf, at)
		}
	})
	missing := errors.Is(err, errNotHere) || errors.Is(err, store.ErrNotFound)
	if errors.Is(err, store.ErrDamaged) { // for which the node is not to blame
		c.m.metrics.LogsDamaged.Inc()
		c.log.Error("copy of the node's receipt log is damaged", journal.ReceiptLogDamaged.Attr(), "error", err)
		if d, ok := errors.AsType[*damagedTile](err); ok {
			c.broke(d)
		}
	} else if err != nil && !missing {
		return err
	}
	if len(c.asked) > 0 { // else there is another session
		c.asked = c.asked[1:]
	}
	e, ok := c.expected[leaf]
	switch {
	case !ok || !e.asked:
	case !missing:
		c.settle(leaf)
	default:
		e.overdue = true
		c.expected[leaf] = e
		if c.overdue++; c.overdue == 1 {
			c.log.Warn("a receipt of the node is not in its log, though heartbeats have come since", journal.NodeReceiptLeftOut.Attr(), "job", e.job, "log", c.stored.Size())
		}
	}
	return nil
}

// Result says that the network has a receipt of the node's, given by its leaf.
func (s *Session) Result(leaf evm.Hash, job receipt.JobID) {
	c := s.c
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.session != s || c.stored.Conflict != nil || len(c.expected) >= maxExpected {
		return // who is behind by so many is behind visibly
	}
	if _, ok := c.expected[leaf]; !ok {
		c.expected[leaf] = expectation{job: job, since: time.Now(), size: c.stored.Size()}
	}
}

// settle notes that a leaf is in the log.
func (c *logCopy) settle(leaf evm.Hash) {
	e, ok := c.expected[leaf]
	if !ok {
		return
	}
	delete(c.expected, leaf)
	if e.overdue {
		c.overdue--
	}
}

// lookForOverdue has receipts looked for that should be in the log by now, and
// gives those up that it has gone on without.
func (c *logCopy) lookForOverdue() {
	if c.failing {
		return // the node may well have sent them
	}
	beat := c.m.terms().Heartbeat
	for leaf, e := range c.expected {
		switch age := time.Since(e.since); {
		case e.overdue && age > surrender*beat && c.stored.Size() > e.size:
			c.settle(leaf)
			c.leftOut++
			c.m.metrics.LeftOut.Inc()
			c.log.Error("receipt log of the node has gone on without a receipt", journal.NodeReceiptLeftOut.Attr(), "job", e.job, "log", c.stored.Size())
		case !e.asked && age > patience*beat:
			e.asked = true
			c.expected[leaf] = e
			c.asked = append(c.asked, leaf)
		}
	}
	if len(c.asked) > 0 {
		c.kick()
	}
}

// State is how the log of a node does.
type State struct {
	Waiting int    // receipts that the network has and that are not known to be in the log
	Overdue int    // of these, those that should have been by now
	LeftOut uint64 // receipts that the log has gone on without
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
		states[c.node] = State{len(c.expected), c.overdue, c.leftOut}
		c.mu.Unlock()
	}
	return states
}

// Prove shows that a receipt, given by its leaf and when its result came, is in the
// log of its node. It fails with [ErrPending] or [store.ErrDamaged].
func (m *Mirror) Prove(ctx context.Context, node evm.Address, leaf evm.Hash, at time.Time) (*receiptlog.Inclusion, error) {
	i, err := m.prove(ctx, node, leaf, at)
	switch {
	case errors.Is(err, errNotHere), errors.Is(err, store.ErrNotFound):
		return nil, ErrPending
	case errors.Is(err, store.ErrDamaged):
		m.damaged(node, err)
	}
	return i, err
}

// prove looks in the log as it is, and then in those of the eras before.
func (m *Mirror) prove(ctx context.Context, node evm.Address, leaf evm.Hash, at time.Time) (*receiptlog.Inclusion, error) {
	now, err := m.records.ReceiptLog(ctx, node)
	if err != nil {
		return nil, err
	}
	i, err := m.proveIn(ctx, now, leaf, at)
	for _, reset := range slices.Backward(now.Resets) {
		if err == nil {
			break
		}
		r, gone := m.records.EndedReceiptLog(ctx, node, reset.Before)
		if gone != nil {
			continue
		}
		if before, not := m.proveIn(ctx, r, leaf, at); not == nil {
			i, err = before, nil
		}
	}
	return i, err
}

func (m *Mirror) proveIn(ctx context.Context, r *store.ReceiptLog, leaf evm.Hash, at time.Time) (*receiptlog.Inclusion, error) {
	head := r.Head
	if head == nil {
		return nil, errNotHere
	}
	if err := follows(r); err != nil {
		return nil, fmt.Errorf("%w: %w", store.ErrDamaged, err)
	}
	v, err := newView(ctx, r, m.records.Tile)
	if err != nil {
		return nil, err
	}
	index, err := v.find(leaf, at)
	if err != nil {
		return nil, err
	}
	p, err := receiptlog.Prove(index, head.Size, v.node)
	if err != nil {
		return nil, err
	}
	if err := p.Check(leaf, head.Root); err != nil { // of what is in the record
		return nil, fmt.Errorf("%w: %w", store.ErrDamaged, err)
	}
	i := &receiptlog.Inclusion{Head: *head, Index: index, Path: p.Path}
	if n := len(r.Resets); n > 0 {
		i.Reset = &r.Resets[n-1].SignedReset
	}
	return i, nil
}

// damaged notes what was found wrong with a copy, and has it mended where that is a tile.
func (m *Mirror) damaged(node evm.Address, err error) {
	m.metrics.LogsDamaged.Inc()
	m.log.Error("copy of a node's receipt log is damaged", journal.ReceiptLogDamaged.Attr(), "node", node, "error", err)
	d, ok := errors.AsType[*damagedTile](err)
	if !ok {
		return
	}
	c := m.take(node)
	defer c.mu.Unlock()
	c.broke(d)
	c.drop()
}

// maxBroken bounds the tiles of a node that wait to be mended.
const maxBroken = 256

// broke has a tile mended. While the node is away nobody has its leaves.
func (c *logCopy) broke(d *damagedTile) {
	if c.session == nil || c.gone[d.id] || len(c.broken) >= maxBroken || slices.ContainsFunc(c.broken, func(other *damagedTile) bool { return other.id == d.id }) {
		return
	}
	c.broken = append(c.broken, d)
	if len(c.broken) == 1 {
		c.mendNext()
	}
}

// mendNext begins with the first of the damaged tiles.
func (c *logCopy) mendNext() {
	if c.broken[0].id.Level > 0 {
		c.kick()
	} else if c.next == nil && len(c.leaves) == 0 { // else the next word has it
		c.tell()
	}
}

// leavesAgain takes the leaves that the node was asked for, or its word that it has not
// got them. It reports whether it was asked.
func (s *Session) leavesAgain(l *wire.Leaves) bool {
	c := s.c
	if len(c.broken) == 0 || c.broken[0].id != (receiptlog.NodeID{Index: l.From >> tileBits}) || len(c.mended) > 0 {
		return false
	}
	if len(l.Leaves) == 0 {
		c.settleTile(errors.New("the node has not got its leaves any more"))
		return true
	}
	c.mended = [][]evm.Hash{l.Leaves}
	c.kick()
	return true
}

// mend makes a damaged tile again.
func (c *logCopy) mend() {
	d, mended := c.broken[0], c.mended
	c.mended = nil
	era := c.stored.Era()
	var err error
	c.unlocked(func() {
		ctx, cancel := context.WithTimeout(context.Background(), opTimeout)
		defer cancel()
		var v *view
		if v, err = c.m.view(ctx, c.node); err != nil {
			return
		}
		var t tile
		if len(mended) == 0 {
			t, err = v.below(d.id)
		} else {
			for _, leaf := range mended[0] {
				t.hashes = append(t.hashes, leaf[:]...)
			}
			err = v.whole(d.id, t)
		}
		if err != nil {
			return
		}
		at := d.at
		if at.IsZero() { // its own time is not known
			next, _ := v.tile(int(d.id.Level), d.id.Index+1)
			if at = next.at; at.IsZero() {
				at = time.Now()
			}
		}
		err = c.m.records.MendTile(ctx, c.node, era, store.Tile{Level: int(d.id.Level), Index: d.id.Index, Hashes: t.hashes}, at)
	})
	c.settleTile(err)
}

// settleTile says what came of the tile that was to be mended.
func (c *logCopy) settleTile(err error) {
	if len(c.broken) == 0 {
		return // another session has begun, or another log
	}
	d := c.broken[0]
	c.broken, c.mended = c.broken[1:], nil
	if len(c.broken) > 0 {
		c.mendNext()
	}
	if err == nil {
		c.log.Info("a damaged part of the receipt log of the node is mended", "level", d.id.Level, "tile", d.id.Index)
		return
	}
	if c.gone == nil {
		c.gone = map[receiptlog.NodeID]bool{}
	}
	c.gone[d.id] = true
	c.log.Error("a damaged part of the receipt log of the node cannot be mended: what is in it cannot be proven any more", "level", d.id.Level, "tile", d.id.Index, "error", err)
}
