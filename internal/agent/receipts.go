package agent

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/resultity/node/internal/control"
	"github.com/resultity/node/internal/failpoint"
	"github.com/resultity/node/internal/journal"
	"github.com/resultity/node/internal/receiptlog"
	"github.com/resultity/node/internal/session"
	"github.com/resultity/node/internal/signer"
	"github.com/resultity/node/internal/snapshot"
	"github.com/resultity/node/internal/state"
	"github.com/resultity/node/internal/wire"
)

// This file brings the receipt log to the network: the leaves that it lacks, and
// the head that heartbeats carry, which is at the end of them. Package wire
// says what both sides owe one another ("Receipt log").
//
// One head is on its way at a time. So nothing piles up at a network whose disk is
// slow or full, and its word tells how far it is.

// headEvery is the least time between two words of the network that are heard, since
// comparing logs hashes as many leaves as there are; and between two heads, where the
// heartbeats that carry them are not further apart: a head costs the signer's disk a
// write, and the network's.
const headEvery = time.Second

// headRetry is after how long what has failed here is tried again.
const headRetry = 10 * time.Second

// receipts is what a session and the loop share.
type receipts struct {
	look chan struct{} // capacity 1: look whether the network has the whole log

	mu      sync.Mutex // guards what follows, and the sending of leaves and heads; never held over disk or signer
	session uint64     // rises when one begins, and when it ends
	said    *wire.LeavesAck
	head    *receiptlog.SignedHead // what the heartbeats of the session carry
}

// begin forgets what was said in the session before.
func (r *receipts) begin() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.session++
	r.said, r.head = nil, nil
}

// heard takes the network's word. A later one counts for those before it, but for the
// era, which only the first one of a session names.
func (r *receipts) heard(a *wire.LeavesAck) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if a.Reset == nil && r.said != nil {
		with := *a
		with.Reset = r.said.Reset
		a = &with
	}
	r.said = a
	poke(r.look)
}

// beatWith sends a heartbeat with the head at which the network is, or will be.
func (r *receipts) beatWith(h *wire.Heartbeat, send func(wire.Message) error) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	h.Head = r.head
	return send(h)
}

// telling is how far the loop is in one session.
type telling struct {
	session uint64
	known   bool                   // what the network has
	has     uint64                 // leaves, the network, or will have
	waits   bool                   // for the network's word about head
	head    *receiptlog.SignedHead // at has; nil before the first
	era     uint64                 // of the log, by the network's word
	refused bool                   // what the network has, or has lost, is not ours: nothing more in this session
	behind  uint64                 // size that the key has refused
	last    time.Time              // when head was made
	heard   time.Time              // when the network was
	signed  *receiptlog.Log        // that of the key's last head, if it is known; over all sessions
	asked   uint64                 // size of the log when the key was last asked for a head; over all sessions
}

// deliver is the worker's way to the network.
func (m *membership) deliver(msg wire.Message) error {
	if r, ok := msg.(*wire.Result); ok && r.Receipt != nil {
		poke(m.receipts.look) // the log has grown
	}
	return m.session.Send(msg)
}

// showReceipts tells the network of the log whenever that has grown.
func (m *membership) showReceipts(ctx context.Context) error {
	var t telling
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-m.receipts.look:
		}
		again, err := m.showMore(&t)
		if err != nil && !errors.Is(err, session.ErrNotConnected) {
			m.log.Warn("the network is not told of the receipt log; it is tried again", "error", err)
			again = headRetry
		}
		if again == 0 {
			continue
		}
		timer := time.NewTimer(again)
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil
		case <-timer.C:
			poke(m.receipts.look)
		}
	}
}

// showMore does what there is to do. It returns after how long there is more, 0 for
// when something happens.
func (m *membership) showMore(t *telling) (again time.Duration, err error) {
	r := &m.receipts
	r.mu.Lock()
	now, said := r.session, r.said
	r.mu.Unlock()
	if t.session != now {
		*t = telling{session: now, last: t.last, signed: t.signed, asked: t.asked}
	}
	snap := m.board.snapshot()
	if snap == nil {
		return 0, nil
	}
	chain := snap.Config().Network.ChainID
	if err := m.signInTime(t, chain); err != nil {
		return 0, err
	}
	if t.refused {
		return 0, nil
	}
	if said != nil {
		if wait := headEvery - time.Since(t.heard); t.known && wait > 0 {
			return wait, nil
		}
		t.heard = time.Now()
		if err := m.hear(t, said, snap); err != nil {
			return 0, err
		}
		if said.Again != nil && !t.refused {
			if err := m.showAgain(t, *said.Again); err != nil {
				return 0, err
			}
		}
		r.mu.Lock()
		if r.said == said {
			r.said = nil
		}
		r.mu.Unlock()
	}
	if t.refused || !t.known {
		return 0, nil
	}
	if t.head != nil && t.head.Size == t.has {
		if err := m.send(t, nil); err != nil {
			return 0, err
		}
	}
	if t.waits {
		return 0, nil
	}
	is := m.store.ReceiptLog()
	switch {
	case is.Size == 0, is.Size < t.has, is.Size == t.behind:
		return 0, nil
	case t.head != nil && t.head.Size == t.has && is.Size == t.has:
		return 0, nil // it has everything
	}
	if wait := max(headEvery, snap.Config().Network.Heartbeat.Duration()) - time.Since(t.last); wait > 0 {
		return wait, nil
	}
	var leaves []wire.Message
	first := &wire.Leaves{From: t.has}
	if t.has < is.First {
		log := m.store.LogAt(is.First)
		if log == nil {
			return headEvery, nil // the log has moved on meanwhile
		}
		first.From, first.Edge = is.First, log.Hashes()
	}
	for at, next := first.From, first; at < is.Size; {
		next.Leaves = m.store.Leaves(at, int(min(wire.MaxLeaves, is.Size-at)))
		if next.Leaves == nil {
			return headEvery, nil // likewise
		}
		leaves = append(leaves, next)
		at += uint64(len(next.Leaves))
		next = &wire.Leaves{From: at}
	}
	t.last = time.Now()
	head, err := m.signHead(t, chain, t.era, is)
	if errors.Is(err, signer.ErrBehind) || errors.Is(err, signer.ErrGrowth) {
		if t.behind == 0 { // once in a session
			m.log.Warn("no head of the receipt log", journal.ReceiptLogBehind.Attr(), "count", is.Size, "error", err)
		}
		t.behind = is.Size
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("sign the head of the receipt log: %w", err)
	}
	failpoint.Here("agent.head.signed")
	t.head = head
	return 0, m.send(t, leaves)
}

// unsent is how many receipts may come before the key is asked for a head of them that
// nobody is sent. From the leaves that the store keeps, the log could soon not be shown
// to have grown from the key's last head, and the key would sign none any more.
func unsent() uint64 { return uint64(state.DefaultBounds.Leaves) / 4 }

// signInTime has the key sign a head in time where the network takes none for long.
func (m *membership) signInTime(t *telling, chain uint64) error {
	is := m.store.ReceiptLog()
	if t.asked = min(t.asked, is.Size); is.Size < t.asked+unsent() {
		return nil
	}
	last, known, err := m.key.LastHead(m.net.Name)
	if err != nil {
		return err
	}
	t.asked = max(t.asked, last.Size)
	if is.Size < t.asked+unsent() {
		return nil
	}
	t.asked = is.Size
	if !known {
		return nil // the first one grows from nothing
	}
	if _, err = m.signHead(t, chain, last.Era, is); errors.Is(err, signer.ErrBehind) || errors.Is(err, signer.ErrGrowth) {
		return nil // said when the network is to have a head
	}
	return err
}

// signHead has the key sign a head of the log as it is. The key asks to be shown that
// the log begins with that of its last head, which a kill may have taken from the agent,
// but not the leaves: they were on disk before.
func (m *membership) signHead(t *telling, chain, era uint64, is state.ReceiptLog) (*receiptlog.SignedHead, error) {
	h := receiptlog.Head{Node: m.key.Address(), Network: m.net.Name, Era: era, Size: is.Size, Root: is.Root, Time: uint64(time.Now().UnixMilli())}
	last, known, err := m.key.LastHead(m.net.Name)
	if err != nil {
		return nil, err
	}
	var g signer.Growth
	if t.head != nil && (!known || signer.LogOf(&t.head.Head).Behind(last)) { // the key's counters were set back
		g.Since, last, known = t.head, signer.LogOf(&t.head.Head), true
	}
	var log *receiptlog.Log
	switch {
	case !known || last.Era != h.Era: // nothing is to be shown
	case last.Size > is.Size:
		return nil, fmt.Errorf("%w: of %d receipts", signer.ErrBehind, last.Size)
	default:
		if log = t.signed; log == nil || log.Size() != last.Size || log.Root() != last.Root {
			log = m.store.LogAt(last.Size)
		}
		if log == nil {
			return nil, fmt.Errorf("%w: of %d receipts, which are not there any more", signer.ErrGrowth, last.Size)
		}
		if g.Path, err = log.Grow(m.store.Leaves(last.Size, int(is.Size-last.Size))); err != nil {
			return nil, err
		}
		if log.Root() != is.Root {
			return nil, fmt.Errorf("%w: of %d receipts", signer.ErrGrowth, last.Size)
		}
	}
	t.signed = nil
	head, err := m.key.Head(chain, h, g)
	if err == nil {
		t.signed, t.asked = log, is.Size
	}
	return head, err
}

// send has the session go on to t.head: with leaves, and with heartbeats that carry it.
func (m *membership) send(t *telling, leaves []wire.Message) error {
	r := &m.receipts
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.session != t.session || r.head != nil && *r.head == *t.head && len(leaves) == 0 {
		return nil
	}
	for _, l := range leaves {
		if err := m.session.Send(l); err != nil {
			return err
		}
	}
	failpoint.Here("agent.leaves.sent")
	t.waits = t.head.Size > t.has
	t.has, r.head = t.head.Size, t.head
	poke(m.beat)
	return nil
}

// showAgain sends leaves that the network has lost, or that they are not here any more.
func (m *membership) showAgain(t *telling, from uint64) error {
	again := &wire.Leaves{From: from, Again: true}
	if leaves := m.store.Leaves(from, wire.LeavesAgain); len(leaves) == wire.LeavesAgain {
		again.Leaves = leaves
	}
	r := &m.receipts
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.session != t.session {
		return nil
	}
	return m.session.Send(again)
}

// hear compares what the network has with the log, and brings the log to where it
// was before this machine's disk was replaced or set back.
func (m *membership) hear(t *telling, said *wire.LeavesAck, snap *snapshot.Snapshot) error {
	chain := snap.Config().Network.ChainID
	if err := m.hearReset(t, said, snap); err != nil || t.refused {
		return err
	}
	t.known, t.waits, t.has = true, false, said.Size
	if t.head != nil && said.Size < t.head.Size {
		t.last = time.Time{} // it has dropped some; the head of heartbeats is to be right again soon
	}
	if lost := said.Lost; lost != nil && !m.hasLost(lost, t.era) {
		t.refused = true
		m.log.Error("both this node and the network have lost receipts of the log", journal.ReceiptLogLost.Attr(), "count", lost.Size)
		return nil
	}
	h := said.Head
	if h == nil || t.head != nil && *h == *t.head {
		return m.acked(said.Size)
	}
	t.head = nil
	theirs, err := receiptlog.Resume(said.Size, said.Edge)
	if err == nil {
		err = h.Verify()
	}
	switch {
	case err != nil:
	case h.Node != m.key.Address() || h.Network != m.net.Name || h.Era != t.era:
		err = fmt.Errorf("its head is of node %s in network %s, era %d, and the log of era %d", h.Node, h.Network, h.Era, t.era)
	case theirs.Root() != h.Root:
		err = fmt.Errorf("its head of %d receipts is not that of its leaves", h.Size)
	}
	is := m.store.ReceiptLog()
	same := said.Size < is.First // cannot be known any more
	if err == nil && !same && said.Size <= is.Size {
		root := is.Root
		if said.Size < is.Size {
			if log := m.store.LogAt(said.Size); log != nil {
				root = log.Root()
			}
		}
		same = root == h.Root
	}
	if err == nil && !same && said.Size <= is.Acked {
		// An older state of this machine may have signed it. To go on from that would
		// take back what the network has acknowledged since.
		err = fmt.Errorf("it is another log, and no longer than the %d receipts that the network has acknowledged of this one", is.Acked)
	}
	if err != nil {
		t.refused = true
		m.log.Error("the network's copy of the receipt log is not this node's", journal.ReceiptLogRefused.Attr(), "count", said.Size, "error", err)
		return nil
	}
	if !same {
		if err := m.store.RestoreLog(theirs); err != nil {
			return err
		}
		m.log.Warn("receipt log restored", journal.ReceiptLogRestored.Attr(), "count", said.Size)
	}
	if h.ChainID == chain {
		t.head = h
	}
	return m.acked(said.Size)
}

// hearReset learns at the beginning of a session in which era the log is. The network
// has nothing of an era that has just begun: then nothing is known to be there any more.
func (m *membership) hearReset(t *telling, said *wire.LeavesAck, snap *snapshot.Snapshot) error {
	r := said.Reset
	if r == nil {
		return nil
	}
	by, err := r.Verify()
	switch {
	case err != nil:
	case r.Node != m.key.Address() || r.Network != m.net.Name:
		err = fmt.Errorf("it is for node %s in network %s", r.Node, r.Network)
	case !slices.Contains(snap.Config().Network.MessageKeys, by):
		err = fmt.Errorf("it is by %s, which the configuration does not name", by)
	}
	if err != nil {
		t.refused = true
		m.log.Error("the network's word that the receipt log begins anew is not its own", journal.ReceiptLogRefused.Attr(), "count", said.Size, "error", err)
		return nil
	}
	t.era = r.Era
	if is := m.store.ReceiptLog(); said.Head == nil && said.Lost == nil && is.Acked > 0 {
		m.log.Warn("receipt log begins anew", journal.ReceiptLogReset.Attr(), "count", is.Size, "reason", r.Reason)
		return m.store.AckLeaves(0)
	}
	return nil
}

// hasLost reports whether the log goes on from a head of this key of which the network
// has lost its copy, as far as it can still be known. If it does not, no head can be signed
// that does not contradict that one.
func (m *membership) hasLost(h *receiptlog.SignedHead, era uint64) bool {
	if h.Node != m.key.Address() || h.Network != m.net.Name || h.Era != era || h.Verify() != nil {
		return true // it is not ours, and binds nobody
	}
	is := m.store.ReceiptLog()
	if h.Size < is.First {
		return true
	}
	log := m.store.LogAt(h.Size)
	return log != nil && log.Root() == h.Root
}

// acked notes what the network has.
func (m *membership) acked(size uint64) error {
	if is := m.store.ReceiptLog(); size <= is.Acked || size > is.Size {
		return nil
	}
	return m.store.AckLeaves(size)
}

// receiptLog is what status shows of the log.
func (m *membership) receiptLog() *control.ReceiptLog {
	is := m.store.ReceiptLog()
	if is.Size == 0 {
		return nil
	}
	return &control.ReceiptLog{Size: is.Size, Root: is.Root.Hex(), Acked: is.Acked}
}
