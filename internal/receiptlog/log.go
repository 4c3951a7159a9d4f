// Package receiptlog owns the append-only log of a node's receipts: its Merkle
// tree, the heads that the node signs, and the proofs that a receipt is in it.
//
// The rule it keeps: whoever has two heads of a node can be shown that the later
// one has all that the earlier one had, or holds two signatures that contradict
// each other. So a node cannot take back, add or reorder what it has stated.
//
// The tree is that of RFC 9162 (Certificate Transparency), section 2.1, with
// Keccak-256 in the place of SHA-256: contracts have an instruction for it. A leaf
// is 0x00 and the EIP-712 hash of a receipt, an inner node 0x01 and its two
// children. A node has one log for each network.
//
// Who has lost a log cannot go on with it. So the network's operator may have a
// node's log begin anew, in another era, for which there is the network's signed
// word ([Reset]). Each head names its era, and each proof of a later one has the
// word with it: the rule holds within an era, and nobody takes one for another.
//
// How a log gets from its node to its network is in package wire ("Receipt log").
// The contract in packaging/contracts takes heads and proofs, too.
package receiptlog

import (
	"errors"
	"fmt"
	"math/bits"

	"github.com/transparency-dev/merkle/compact"
	"github.com/transparency-dev/merkle/proof"

	"github.com/resultity/node/internal/evm"
)

// ErrProof says that something is not shown by what was given as its proof.
var ErrProof = errors.New("not proven")

// MaxSize bounds a log: at a thousand receipts a second it is full after a
// century.
const MaxSize = 1 << 42

// hasher implements the library's LogHasher.
type hasher struct{}

func (hasher) Size() int { return len(evm.Hash{}) }

func (hasher) EmptyRoot() []byte { h := evm.Keccak(); return h[:] }

func (hasher) HashLeaf(leaf []byte) []byte { h := evm.Keccak([]byte{0}, leaf); return h[:] }

func (hasher) HashChildren(l, r []byte) []byte { h := evm.Keccak([]byte{1}, l, r); return h[:] }

var ranges = &compact.RangeFactory{Hash: hasher{}.HashChildren}

// Leaf returns the leaf of a receipt, given its EIP-712 hash.
func Leaf(receipt evm.Hash) evm.Hash { return evm.Hash(hasher{}.HashLeaf(receipt[:])) }

// Log is what has to be kept of a log to append to it: some 32 bytes for each bit
// of its size. Not safe for concurrent use.
type Log struct{ r *compact.Range }

// New returns an empty log.
func New() *Log { return &Log{ranges.NewEmptyRange(0)} }

// Edge returns how many hashes [Log.Hashes] has for a size.
func Edge(size uint64) int { return bits.OnesCount64(size) }

// Resume returns the log that has a size and these hashes, as [Log.Hashes] gave
// them.
func Resume(size uint64, hashes []evm.Hash) (*Log, error) {
	if size > MaxSize {
		return nil, fmt.Errorf("log of %d receipts, at most %d", size, uint64(MaxSize))
	}
	r, err := ranges.NewRange(0, size, raw(hashes))
	if err != nil {
		return nil, fmt.Errorf("log of %d receipts: %w", size, err)
	}
	return &Log{r}, nil
}

// Clone returns a copy that goes its own way.
func (l *Log) Clone() *Log {
	c, err := ranges.NewRange(0, l.r.End(), append([][]byte(nil), l.r.Hashes()...))
	if err != nil {
		panic(err) // it is the range of a log
	}
	return &Log{c}
}

// Size returns the number of leaves.
func (l *Log) Size() uint64 { return l.r.End() }

// Hashes returns the roots of the full subtrees, left to right: with the size all
// that a log is.
func (l *Log) Hashes() []evm.Hash { return typed(l.r.Hashes()) }

// Root returns the root of the tree.
func (l *Log) Root() evm.Hash {
	root, err := l.r.GetRootHash(nil)
	if err != nil {
		panic(err) // it begins at 0
	}
	if root == nil {
		root = hasher{}.EmptyRoot()
	}
	return evm.Hash(root)
}

// Append adds a leaf and reports each node that is final with it, the leaf too.
func (l *Log) Append(leaf evm.Hash, made func(NodeID, evm.Hash)) {
	visit := func(id compact.NodeID, h []byte) {
		if made != nil {
			made(NodeID{id.Level, id.Index}, evm.Hash(h))
		}
	}
	if err := l.r.Append(leaf[:], visit); err != nil {
		panic(err) // ranges of one factory, end to begin
	}
}

// NodeID names a node of the tree: its level, 0 for leaves, and its place there.
type NodeID struct {
	Level uint
	Index uint64
}

// Proof shows that a leaf is in the log as it was at a size.
type Proof struct {
	Index uint64     `json:"index"`
	Size  uint64     `json:"size"`
	Path  []evm.Hash `json:"path"` // from the leaf's sibling up
}

// Prove makes the proof of the leaf at index in a log of size. node returns a
// node of the tree that is final at that size.
func Prove(index, size uint64, node func(NodeID) (evm.Hash, error)) (*Proof, error) {
	if size > MaxSize {
		return nil, fmt.Errorf("%w: log of %d receipts", ErrProof, size)
	}
	nodes, err := proof.Inclusion(index, size)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrProof, err)
	}
	path, err := fill(nodes, node)
	return &Proof{index, size, path}, err
}

// Check fails with [ErrProof] unless p shows that leaf is in the log with root.
func (p *Proof) Check(leaf, root evm.Hash) error {
	err := proof.VerifyInclusion(hasher{}, p.Index, p.Size, leaf[:], raw(p.Path), root[:])
	if other, ok := errors.AsType[proof.RootMismatchError](err); ok {
		err = fmt.Errorf("the path leads to root %s, not to %s", evm.Hash(other.CalculatedRoot), root)
	}
	if err != nil {
		return fmt.Errorf("%w: receipt %d of %d: %w", ErrProof, p.Index, p.Size, err)
	}
	return nil
}

// ProveGrowth makes the proof that the log of size to begins with that of size
// from.
func ProveGrowth(from, to uint64, node func(NodeID) (evm.Hash, error)) ([]evm.Hash, error) {
	if to > MaxSize {
		return nil, fmt.Errorf("%w: log of %d receipts", ErrProof, to)
	}
	nodes, err := proof.Consistency(from, to)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrProof, err)
	}
	return fill(nodes, node)
}

// Grow appends leaves and returns the path with which [CheckGrowth] shows that the
// log begins with what it was before.
func (l *Log) Grow(leaves []evm.Hash) ([]evm.Hash, error) {
	from := l.Size()
	if uint64(len(leaves)) > MaxSize-from {
		return nil, fmt.Errorf("%w: %d receipts behind %d", ErrProof, len(leaves), from)
	}
	want, err := proof.Consistency(from, from+uint64(len(leaves)))
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrProof, err)
	}
	have := make(map[NodeID]evm.Hash, len(want.IDs))
	for _, id := range want.IDs {
		have[NodeID{id.Level, id.Index}] = evm.Hash{}
	}
	keep := func(id NodeID, h evm.Hash) {
		if _, wanted := have[id]; wanted {
			have[id] = h
		}
	}
	edge := l.Hashes()
	for i, id := range EdgeNodes(from) {
		keep(id, edge[i])
	}
	for _, leaf := range leaves {
		l.Append(leaf, keep)
	}
	return fill(want, func(id NodeID) (evm.Hash, error) { return have[id], nil })
}

// CheckGrowth fails with [ErrProof] unless path shows that the log of head new
// begins with that of head old.
func CheckGrowth(old, new Head, path []evm.Hash) error {
	if old.Node != new.Node || old.Network != new.Network || old.Era != new.Era {
		return fmt.Errorf("%w: heads of %s in %.64q, era %d, and of %s in %.64q, era %d", ErrProof, old.Node, old.Network, old.Era, new.Node, new.Network, new.Era)
	}
	if err := proof.VerifyConsistency(hasher{}, old.Size, new.Size, raw(path), old.Root[:], new.Root[:]); err != nil {
		return fmt.Errorf("%w: that %d receipts begin with %d: %w", ErrProof, new.Size, old.Size, err)
	}
	return nil
}

func fill(nodes proof.Nodes, node func(NodeID) (evm.Hash, error)) ([]evm.Hash, error) {
	hashes := make([][]byte, len(nodes.IDs))
	for i, id := range nodes.IDs {
		h, err := node(NodeID{id.Level, id.Index})
		if err != nil {
			return nil, err
		}
		hashes[i] = h[:]
	}
	path, err := nodes.Rehash(hashes, hasher{}.HashChildren)
	return typed(path), err
}

func raw(hashes []evm.Hash) [][]byte {
	b := make([][]byte, len(hashes))
	for i := range hashes {
		b[i] = hashes[i][:]
	}
	return b
}

func typed(hashes [][]byte) []evm.Hash {
	t := make([]evm.Hash, len(hashes))
	for i, h := range hashes {
		t[i] = evm.Hash(h)
	}
	return t
}
