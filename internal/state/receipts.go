package state

import (
	"encoding/binary"
	"fmt"
	"slices"

	"github.com/resultity/node/internal/evm"
	"github.com/resultity/node/internal/failpoint"
	"github.com/resultity/node/internal/receiptlog"
	"github.com/resultity/node/internal/wire"
)

// The receipt log is in the log of the store: the leaf of a receipt is a record
// in the frame of its result, so that neither is durable without the other.
// Of leaves the last Bounds.Leaves are kept. A run is what of them lies in one
// segment; each begins with the compact range before it, so that the oldest run
// which is there is enough to go on from.

// tree is the receipt log as it is in memory. Guarded by Store.mu.
type tree struct {
	log    *receiptlog.Log // of all receipts
	base   *receiptlog.Log // of those before the first that is kept
	leaves []evm.Hash      // kept, from base.Size() on
	runs   []*run          // where they lie, without a gap; the last one may be empty
	acked  uint64          // how many the network has
}

// run is leaves that lie in one segment.
type run struct {
	first uint64
	n     int
	seg   uint64
	edge  []evm.Hash // compact range before what was first in it
}

func (r *run) end() uint64 { return r.first + uint64(r.n) }

func newTree() tree { return tree{log: receiptlog.New(), base: receiptlog.New()} }

// last returns the run that the next leaf may belong to, or nil.
func (t *tree) last() *run {
	if len(t.runs) == 0 {
		return nil
	}
	return t.runs[len(t.runs)-1]
}

// leafWeight is what a leaf counts for its segment, in bytes; a run counts one
// more.
const leafWeight = recordHead + leavesHead + hashSize

// weighLeaves counts leaves for their segment. The caller holds mu.
func (s *Store) weighLeaves(seg uint64, n int) {
	if first := s.segments[0].Number; seg >= first {
		s.segments[seg-first].live += int64(n * leafWeight)
	}
}

// addLeaf appends a leaf that is written in a segment. The caller holds mu.
func (s *Store) addLeaf(leaf evm.Hash, seg uint64) {
	t := &s.tree
	if r := t.last(); r == nil || r.seg != seg {
		s.addRun(seg)
	}
	t.last().n++
	s.weighLeaves(seg, 1)
	t.log.Append(leaf, nil)
	t.leaves = append(t.leaves, leaf)
	for len(t.leaves) > s.bounds.Leaves {
		s.dropLeaf()
	}
}

// addRun begins a run at the end. The caller holds mu.
func (s *Store) addRun(seg uint64) {
	t := &s.tree
	if r := t.last(); r != nil && r.n == 0 {
		s.weighLeaves(r.seg, -1)
		t.runs = t.runs[:len(t.runs)-1]
	}
	t.runs = append(t.runs, &run{first: t.log.Size(), seg: seg, edge: t.log.Hashes()})
	s.weighLeaves(seg, 1)
}

// dropLeaf gives up the oldest leaf. The caller holds mu.
func (s *Store) dropLeaf() {
	t := &s.tree
	t.base.Append(t.leaves[0], nil)
	t.leaves = t.leaves[1:]
	r := t.runs[0]
	r.first++
	r.n--
	s.weighLeaves(r.seg, -1)
	if r.n == 0 && len(t.runs) > 1 {
		s.weighLeaves(r.seg, -1)
		t.runs = t.runs[1:]
	}
}

// adopt has the log go on from another one, which ends in a segment. The caller
// holds mu.
func (s *Store) adopt(l *receiptlog.Log, seg uint64) {
	for _, r := range s.tree.runs {
		s.weighLeaves(r.seg, -r.n-1)
	}
	s.tree = tree{log: l.Clone(), base: l.Clone(), acked: l.Size()}
	s.addRun(seg)
}

// A record of leaves is
//
//	index      8 bytes, of the first
//	hashes     1 byte: how many, or noEdge where the leaves belong to the run before them in the segment
//	edge       as many hashes, the compact range before index
//	leaves     the rest
const (
	leavesHead = 8 + 1
	noEdge     = 0xff
	hashSize   = len(evm.Hash{})
)

type leaves struct {
	first  uint64
	begins bool // a run
	edge   []evm.Hash
	leaves []evm.Hash
}

func (l *leaves) encode() []byte {
	b := binary.BigEndian.AppendUint64(nil, l.first)
	if l.begins {
		b = append(b, byte(len(l.edge)))
	} else {
		b = append(b, noEdge)
	}
	for _, h := range slices.Concat(l.edge, l.leaves) {
		b = append(b, h[:]...)
	}
	return b
}

func decodeLeaves(b []byte) (l leaves, ok bool) {
	if len(b) < leavesHead || (len(b)-leavesHead)%hashSize != 0 {
		return l, false
	}
	l.first, l.begins = fromNumber(b), b[8] != noEdge
	n := int(b[8])
	if !l.begins {
		n = 0
	}
	all := make([]evm.Hash, 0, (len(b)-leavesHead)/hashSize)
	for b := b[leavesHead:]; len(b) > 0; b = b[hashSize:] {
		all = append(all, evm.Hash(b[:hashSize]))
	}
	if len(all) < n {
		return l, false
	}
	l.edge, l.leaves = all[:n:n], all[n:]
	switch {
	case l.begins && n != receiptlog.Edge(l.first), !l.begins && len(l.leaves) == 0:
		return l, false
	}
	return l, l.first <= receiptlog.MaxSize && uint64(len(l.leaves)) <= receiptlog.MaxSize-l.first
}

// receiptLeaf returns the leaf of a result's receipt, if it has one.
func receiptLeaf(r *wire.Result) (leaf evm.Hash, ok bool) {
	if r.Receipt == nil {
		return leaf, false
	}
	return receiptlog.Leaf(r.Receipt.Hash()), true
}

// leaf returns the record of the next leaf.
func (b *batch) leaf(leaf evm.Hash) *leaves {
	t := &b.s.tree
	l := &leaves{first: t.log.Size() + uint64(len(b.leaves)), leaves: []evm.Hash{leaf}}
	if b.adopted != nil {
		l.first = b.adopted.Size() + uint64(len(b.leaves))
	} else if r := t.last(); len(b.leaves) == 0 && (r == nil || r.seg != b.seg) {
		l.begins, l.edge = true, t.log.Hashes()
	}
	return l
}

// ReceiptLog says how the receipt log is.
type ReceiptLog struct {
	Size  uint64 // receipts
	Root  evm.Hash
	First uint64 // index of the first whose leaf is kept
	Acked uint64 // how many the network is known to have
}

// ReceiptLog returns the log of all receipts whose results are durable.
func (s *Store) ReceiptLog() ReceiptLog {
	s.mu.Lock()
	t := &s.tree
	l, first, acked := t.log.Clone(), t.base.Size(), t.acked
	s.mu.Unlock()
	return ReceiptLog{l.Size(), l.Root(), first, acked}
}

// Leaves returns at most n leaves from an index on, none where they are not
// kept.
func (s *Store) Leaves(from uint64, n int) []evm.Hash {
	s.mu.Lock()
	defer s.mu.Unlock()
	t := &s.tree
	if from < t.base.Size() || from > t.log.Size() {
		return nil
	}
	rest := t.leaves[from-t.base.Size():]
	return slices.Clone(rest[:min(n, len(rest))])
}

// LogAt returns the receipt log as it was at a size, nil where that is not
// known any more.
func (s *Store) LogAt(size uint64) *receiptlog.Log {
	s.mu.Lock()
	t := &s.tree
	l, n := t.base.Clone(), size-t.base.Size()
	if size < t.base.Size() || size > t.log.Size() {
		s.mu.Unlock()
		return nil
	}
	before := slices.Clone(t.leaves[:n])
	s.mu.Unlock()
	for _, leaf := range before {
		l.Append(leaf, nil)
	}
	return l
}

// AckLeaves notes how many receipts the network has of the log. As [Store.Ack]
// it does not wait for the disk.
func (s *Store) AckLeaves(size uint64) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.unusable(); err != nil {
		return fmt.Errorf("note that the network has %d receipts of the log: %w", size, err)
	}
	if size > s.tree.log.Size() {
		return fmt.Errorf("the network has %d receipts of the log, and the log only %d", size, s.tree.log.Size())
	}
	if size != s.tree.acked {
		s.tree.acked = size
		s.acks = append(s.acks, verdict{kindAcked, item{num: size}})
		s.writeLater()
	}
	return nil
}

// RestoreLog has the receipt log go on from one that is longer or another one:
// what the node has signed before this store began, or was set back. The
// receipts that the network has never acknowledged are appended to it. When it
// returns, that is durable.
func (s *Store) RestoreLog(l *receiptlog.Log) error {
	failpoint.Here("state.restore.begin")
	err := s.commit(func(b *batch) error {
		t := &s.tree
		if b.adopted != nil {
			return fmt.Errorf("the log is restored by somebody else")
		}
		var own []evm.Hash
		if keep := max(t.acked, t.base.Size()); keep < t.log.Size() {
			own = slices.Clone(t.leaves[keep-t.base.Size():])
		}
		own = append(own, b.leaves...)
		r := leaves{first: l.Size(), begins: true, edge: l.Hashes(), leaves: own}
		text := r.encode()
		if err := b.room(len(text), reserve(s.count.Accepted+b.accepted, s.count.Results+b.results)); err != nil {
			return err
		}
		b.put(kindAdopted, text)
		b.adopted, b.leaves = l.Clone(), own
		return nil
	})
	if err != nil {
		return fmt.Errorf("go on from a receipt log of %d receipts: %w", l.Size(), err)
	}
	return nil
}

// evacuateLeaves returns what has to be copied of the receipt log before a
// segment is given back. The caller holds mu.
func (s *Store) evacuateLeaves(g *segment, add func(r *run, text []byte)) {
	t := &s.tree
	for _, r := range t.runs {
		if r.seg != g.Number {
			continue
		}
		at := r.first - t.base.Size()
		l := leaves{first: r.first, begins: true, edge: r.edge, leaves: t.leaves[at : at+uint64(r.n)]}
		if at == 0 { // of the first run some may have been given up
			l.edge = t.base.Hashes()
		}
		add(r, l.encode())
	}
}

// moveLeaves says that a run lies in this batch from now on.
func (b *batch) moveLeaves(r *run) {
	b.then = append(b.then, func() {
		b.s.weighLeaves(r.seg, -r.n-1)
		r.seg = b.seg
		b.s.weighLeaves(r.seg, r.n+1)
	})
}

// treeReader makes the tree of what a start reads. Where leaves are lost, those behind
// them follow those before.
type treeReader struct {
	runs    []*readRun // by index
	acked   uint64
	changed bool   // it is not what the log says: some of the last run was damaged
	cut     uint64 // then, index of the first leaf that was
	shift   uint64 // then, how many leaves are lost
	doubted bool   // then, whether a leaf may be a wrong one
}

type readRun struct {
	run
	leaves []evm.Hash
}

func (r *readRun) append(all ...evm.Hash) {
	r.leaves = append(r.leaves, all...)
	r.n = len(r.leaves)
}

// last returns the run that leaves are appended to; where its beginning is lost, it
// begins with the log.
func (t *treeReader) last(seg uint64) *readRun {
	if len(t.runs) == 0 {
		t.runs = []*readRun{{run: run{seg: seg}}}
	}
	return t.runs[len(t.runs)-1]
}

// damage says that the log is damaged from an index on.
func (t *treeReader) damage(at uint64) {
	if !t.changed {
		t.changed, t.cut = true, at
	}
}

// add appends a leaf that was found in what is damaged.
func (t *treeReader) add(leaf evm.Hash, seg uint64, doubted bool) {
	r := t.last(seg)
	t.damage(r.end())
	t.doubted = t.doubted || doubted
	r.append(leaf)
}

// read takes a record of leaves, or of an adopted log.
func (t *treeReader) read(k kind, body []byte, seg uint64) {
	l, _ := decodeLeaves(body) // it is well made
	next := &readRun{run{l.first, len(l.leaves), seg, l.edge}, l.leaves}
	if k == kindAdopted {
		*t = treeReader{runs: []*readRun{next}, acked: l.first}
		return
	}
	if !l.begins {
		r := t.last(seg)
		is := r.end() + t.shift
		if r.seg != seg || is != l.first {
			t.damage(r.end())
			t.shift += max(is, l.first) - is
		}
		r.append(l.leaves...)
		return
	}
	at, _ := slices.BinarySearchFunc(t.runs, l.first, func(r *readRun, first uint64) int {
		if r.end() < first || r.end() == first && r.n > 0 {
			return -1
		}
		return 1
	})
	switch {
	case at == len(t.runs):
		if len(t.runs) > 0 && (t.shift > 0 || t.runs[at-1].end() != l.first) {
			t.whole() // it can be gone on from here
		}
		t.runs = append(t.runs, next)
	case next.end() <= t.runs[at].first && next.n > 0:
		t.runs = slices.Insert(t.runs, at, next)
	default: // a copy, without what had been given up, or with what is damaged
		behind := slices.DeleteFunc(slices.Clone(t.runs[at+1:]), func(r *readRun) bool { return r.first < next.end() })
		if len(behind) == 0 && next.end() != t.runs[at].end() {
			t.whole()
		}
		t.runs = append(append(t.runs[:at], next), behind...)
	}
}

// whole says that the last run is as it was.
func (t *treeReader) whole() { t.changed, t.shift, t.doubted = false, 0, false }

// build makes the tree of the runs that are in segments from oldest on, and
// whose leaves are there up to the end.
func (s *Store) buildTree(t *treeReader, oldest uint64) {
	runs := slices.DeleteFunc(t.runs, func(r *readRun) bool { return r.seg < oldest })
	for i := len(runs) - 1; i > 0; i-- {
		if runs[i-1].end() != runs[i].first {
			runs = runs[i:] // what is before the gap had been given up, or is lost
			break
		}
	}
	s.tree = newTree()
	for i, r := range runs {
		if i == 0 || !slices.Equal(s.tree.log.Hashes(), r.edge) {
			base, err := receiptlog.Resume(r.first, r.edge)
			if err != nil {
				continue // its edge has the right length: see decodeLeaves
			}
			s.tree = tree{log: base.Clone(), base: base}
		}
		s.addRun(r.seg)
		for _, leaf := range r.leaves {
			s.addLeaf(leaf, r.seg)
		}
	}
	acked := t.acked
	if t.changed && acked > t.cut {
		acked = max(t.cut, acked-min(acked, t.shift))
		if t.doubted {
			acked = t.cut
		}
	}
	s.tree.acked = min(acked, s.tree.log.Size())
}
