package mirror

import (
	"context"
	"errors"
	"fmt"

	"github.com/resultity/node/internal/evm"
	"github.com/resultity/node/internal/network/store"
	"github.com/resultity/node/internal/receiptlog"
)

// tileBits says how many levels of the tree a tile has: 256 hashes are its lowest.
const (
	tileBits = 8
	tileSize = 1 << tileBits
	hashSize = len(evm.Hash{})
)

// errNotHere says that a node of the tree is of leaves that are not kept, or not
// any more.
var errNotHere = errors.New("not kept")

// begin makes the record of a log of which only what follows from is kept.
func begin(from uint64, before []evm.Hash) *store.ReceiptLog {
	r := &store.ReceiptLog{Edge: before, From: from, Before: before}
	for n := from; n > 0; n >>= tileBits {
		// What is not known is zero, which no hash is.
		r.Open = append(r.Open, make([]byte, int(n%tileSize)*hashSize))
	}
	return r
}

// grow returns r with leaves behind it, without a head, and the tiles that are full
// with them.
func grow(r *store.ReceiptLog, leaves []evm.Hash) (*store.ReceiptLog, []store.Tile, error) {
	size := r.From
	if r.Head != nil {
		size = r.Head.Size
	}
	log, err := receiptlog.Resume(size, r.Edge)
	if err != nil {
		return nil, nil, err
	}
	next := *r
	next.Open = make([][]byte, len(r.Open))
	for i, tile := range r.Open {
		next.Open[i] = append([]byte(nil), tile...)
	}
	var full []store.Tile
	for _, leaf := range leaves {
		log.Append(leaf, func(id receiptlog.NodeID, h evm.Hash) {
			if id.Level%tileBits != 0 {
				return
			}
			level := int(id.Level / tileBits)
			if level == len(next.Open) {
				next.Open = append(next.Open, nil)
			}
			next.Open[level] = append(next.Open[level], h[:]...)
			if len(next.Open[level]) == tileSize*hashSize {
				full = append(full, store.Tile{Level: level, Index: id.Index >> tileBits, Hashes: next.Open[level]})
				next.Open[level] = nil
			}
		})
	}
	next.Edge = log.Hashes()
	return &next, full, nil
}

// check finds out whether a record is what was stored: its head is signed, and
// everything else leads to the head's root.
func check(r *store.ReceiptLog) error {
	if r.Head == nil {
		return nil
	}
	return errors.Join(r.Head.Verify(), follows(r))
}

// follows is check without the signature.
func follows(r *store.ReceiptLog) error {
	log, err := receiptlog.Resume(r.Head.Size, r.Edge)
	if err != nil {
		return err
	}
	if log.Root() != r.Head.Root {
		return errors.New("the edge does not lead to the head's root")
	}
	full := func(context.Context, evm.Address, int, uint64) ([]byte, error) { return nil, errNotHere }
	v, err := newView(context.Background(), r, full)
	if err != nil {
		return err
	}
	for i, id := range receiptlog.EdgeNodes(r.Head.Size) {
		h, err := v.node(id)
		if err != nil || h != r.Edge[i] {
			return errors.Join(fmt.Errorf("node %d of level %d does not follow from what is below it", id.Index, id.Level), err)
		}
	}
	return nil
}

// view finds the nodes of a log's tree. For one proof, and one goroutine.
type view struct {
	ctx    context.Context
	log    *store.ReceiptLog
	tile   func(ctx context.Context, node evm.Address, level int, index uint64) ([]byte, error)
	tiles  map[receiptlog.NodeID][]byte // those that were read, by level and index of tiles
	before map[receiptlog.NodeID]evm.Hash
}

func newView(ctx context.Context, r *store.ReceiptLog, tile func(context.Context, evm.Address, int, uint64) ([]byte, error)) (*view, error) {
	if _, err := receiptlog.Resume(r.From, r.Before); err != nil || r.From > r.Size() {
		return nil, fmt.Errorf("%w: what came before leaf %d: %w", store.ErrDamaged, r.From, errors.Join(err, errors.New("it is not the beginning of the log")))
	}
	v := &view{ctx: ctx, log: r, tile: tile, tiles: map[receiptlog.NodeID][]byte{}, before: map[receiptlog.NodeID]evm.Hash{}}
	for i, id := range receiptlog.EdgeNodes(r.From) {
		v.before[id] = r.Before[i]
	}
	return v, nil
}

// node returns a node that is final at the size of the log, or fails with
// errNotHere.
func (v *view) node(id receiptlog.NodeID) (evm.Hash, error) {
	if h, ok := v.before[id]; ok {
		return h, nil
	}
	begin, end := id.Leaves()
	if end <= v.log.From {
		return evm.Hash{}, errNotHere
	}
	// Of a node that has leaves before the first one that is here, and others, only
	// the children may be known.
	if whole := begin >= v.log.From; id.Level%tileBits == 0 {
		h, err := v.entry(int(id.Level/tileBits), id.Index)
		if err != nil || h != (evm.Hash{}) || whole || id.Level == 0 {
			return h, err
		}
	}
	l, r := id.Children()
	left, err := v.node(l)
	if err != nil {
		return evm.Hash{}, err
	}
	right, err := v.node(r)
	if err != nil {
		return evm.Hash{}, err
	}
	return receiptlog.Parent(left, right), nil
}

// entry returns a hash of a tile.
func (v *view) entry(level int, index uint64) (evm.Hash, error) {
	id := receiptlog.NodeID{Level: uint(level), Index: index >> tileBits}
	at := int(index%tileSize) * hashSize
	tile, ok := v.tiles[id]
	if !ok {
		switch open := v.log.Size() >> (tileBits * uint(level+1)); {
		case id.Index == open && level < len(v.log.Open):
			tile = v.log.Open[level]
		case id.Index >= open:
		default:
			var err error
			if tile, err = v.tile(v.ctx, v.log.Head.Node, level, id.Index); err != nil {
				if errors.Is(err, store.ErrNotFound) {
					err = fmt.Errorf("%w: %w", errNotHere, err)
				}
				return evm.Hash{}, err
			}
			if len(tile) != tileSize*hashSize {
				return evm.Hash{}, fmt.Errorf("tile %d of level %d: %w: it has %d bytes", id.Index, level, store.ErrDamaged, len(tile))
			}
		}
		v.tiles[id] = tile
	}
	if at+hashSize > len(tile) {
		return evm.Hash{}, fmt.Errorf("tile %d of level %d: %w: it has no entry %d", id.Index, level, store.ErrDamaged, index%tileSize)
	}
	return evm.Hash(tile[at : at+hashSize]), nil
}

// root returns the root that the log had at a size.
func (v *view) root(size uint64) (evm.Hash, error) {
	var edge []evm.Hash
	for _, id := range receiptlog.EdgeNodes(size) {
		h, err := v.node(id)
		if err != nil {
			return h, err
		}
		edge = append(edge, h)
	}
	log, err := receiptlog.Resume(size, edge)
	if err != nil {
		return evm.Hash{}, err
	}
	return log.Root(), nil
}
