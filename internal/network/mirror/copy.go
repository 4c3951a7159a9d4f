package mirror

import (
	"context"
	"errors"
	"fmt"
	"time"

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
	r := &store.ReceiptLog{LogSummary: store.LogSummary{From: from}, Edge: before, Before: before}
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
	if r.Head.Era != r.Era() {
		return fmt.Errorf("the head is of era %d, the log of %d", r.Head.Era, r.Era())
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
	full := func(context.Context, evm.Address, uint64, int, uint64) ([]byte, time.Time, error) {
		return nil, time.Time{}, errNotHere
	}
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

// readTile reads a full tile, see [store.Store.Tile].
type readTile func(ctx context.Context, node evm.Address, era uint64, level int, index uint64) ([]byte, time.Time, error)

// damagedTile says which full tile is not what was put.
type damagedTile struct {
	id  receiptlog.NodeID // its level and index among tiles
	at  time.Time         // when it was put, as far as that is known
	err error
}

func (d *damagedTile) Error() string {
	return fmt.Sprintf("tile %d of level %d: %v", d.id.Index, d.id.Level, d.err)
}

func (d *damagedTile) Unwrap() []error { return []error{store.ErrDamaged, d.err} }

type tile struct {
	err    error
	hashes []byte
	at     time.Time // when it was put; of one that is not full, when it was put last
}

// view finds the nodes of a log's tree. For one proof, and one goroutine.
type view struct {
	ctx    context.Context
	log    *store.ReceiptLog
	read   readTile
	tiles  map[receiptlog.NodeID]tile // those that were read, by level and index of tiles
	before map[receiptlog.NodeID]evm.Hash
}

func newView(ctx context.Context, r *store.ReceiptLog, read readTile) (*view, error) {
	if _, err := receiptlog.Resume(r.From, r.Before); err != nil || r.From > r.Size() {
		return nil, fmt.Errorf("%w: what came before leaf %d: %w", store.ErrDamaged, r.From, errors.Join(err, errors.New("it is not the beginning of the log")))
	}
	v := &view{ctx: ctx, log: r, read: read, tiles: map[receiptlog.NodeID]tile{}, before: map[receiptlog.NodeID]evm.Hash{}}
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
	t, err := v.tile(level, index>>tileBits)
	if err != nil {
		return evm.Hash{}, err
	}
	at := int(index%tileSize) * hashSize
	if at+hashSize > len(t.hashes) {
		return evm.Hash{}, fmt.Errorf("tile %d of level %d: %w: it has no entry %d", index>>tileBits, level, store.ErrDamaged, index%tileSize)
	}
	return evm.Hash(t.hashes[at : at+hashSize]), nil
}

func (v *view) tile(level int, index uint64) (t tile, err error) {
	id := receiptlog.NodeID{Level: uint(level), Index: index}
	if t, ok := v.tiles[id]; ok {
		return t, t.err
	}
	if open := v.log.Size() >> (tileBits * uint(level+1)); index >= open { // it is not full
		if index == open && level < len(v.log.Open) {
			t = tile{nil, v.log.Open[level], time.UnixMilli(v.log.Stored)}
		}
	} else {
		t.hashes, t.at, err = v.read(v.ctx, v.log.Head.Node, v.log.Era(), level, index)
		switch {
		case errors.Is(err, store.ErrNotFound):
			return t, fmt.Errorf("%w: %w", errNotHere, err)
		case errors.Is(err, store.ErrDamaged):
			t.err = &damagedTile{id, t.at, err}
		case err != nil:
			return t, err
		default:
			t.err = v.whole(id, t)
		}
	}
	v.tiles[id] = t
	return t, t.err
}

// A log has receipts in the order in which they were made, so that the leaf of one is
// not far from the tile that was put when its result came. What is in none of these
// is not in the log.
const (
	// behind is in how many of the tiles before that it is looked for. Leaves come
	// before their results where many wait, over sessions and for any time, and a node
	// lets 10000 wait.
	behind = 64
	// far is in how many from that on: a node keeps half as many leaves.
	far = 512
)

// find looks for a leaf whose receipt came at a time. It fails with errNotHere, or
// with [store.ErrDamaged] where the leaf may have been what was damaged.
func (v *view) find(leaf evm.Hash, at time.Time) (index uint64, err error) {
	has := func(n uint64) (ok bool, err error) {
		t, err := v.tile(0, n)
		if err != nil {
			return false, err
		}
		for i := 0; i+hashSize <= len(t.hashes); i += hashSize {
			if evm.Hash(t.hashes[i:i+hashSize]) == leaf {
				index = n<<tileBits + uint64(i/hashSize)
				return true, nil
			}
		}
		return false, nil
	}
	last := v.log.Size() >> tileBits // the one that is not full: most are asked for soon
	if ok, err := has(last); ok || err != nil {
		return index, err
	}
	// Tiles are put in their order, and the oldest go first.
	first := v.log.From >> tileBits
	low, high := first, last
	for low < high {
		mid := low + (high-low)/2
		t, err := v.tile(0, mid)
		if err != nil && !errors.Is(err, errNotHere) && !errors.Is(err, store.ErrDamaged) {
			return 0, err
		}
		if errors.Is(err, errNotHere) || t.at.Before(at) {
			low = mid + 1
		} else {
			high = mid
		}
	}
	missing := errNotHere
	for away := range uint64(far) { // the nearest first
		var near []uint64
		if n := low + away; n < last {
			near = append(near, n)
		}
		if away < behind && low > first+away {
			near = append(near, low-1-away)
		}
		for _, n := range near {
			switch ok, err := has(n); {
			case ok:
				return index, nil
			case errors.Is(err, store.ErrDamaged):
				missing = err
			case err != nil && !errors.Is(err, errNotHere):
				return 0, err
			}
		}
	}
	return 0, missing
}

// whole fails with [store.ErrDamaged] if a full tile is not what the tile above it was
// made of, and so on up to the signed head: each is checked before it is used, so that
// it is known which one is damaged.
func (v *view) whole(id receiptlog.NodeID, t tile) error {
	if len(t.hashes) != tileSize*hashSize {
		return &damagedTile{id, t.at, fmt.Errorf("it has %d bytes", len(t.hashes))}
	}
	if id.Index<<(tileBits*(id.Level+1)) < v.log.From {
		return nil // some of it is not known
	}
	root, err := v.entry(int(id.Level)+1, id.Index)
	if errors.Is(err, errNotHere) {
		return nil // what needs it finds out
	}
	if err != nil {
		return err
	}
	if rootOf(t.hashes) != root {
		return &damagedTile{id, t.at, errors.New("its hashes are not those of the tree")}
	}
	return nil
}

// rootOf is the root of a full tile.
func rootOf(hashes []byte) evm.Hash {
	level := make([]evm.Hash, 0, tileSize)
	for i := 0; i < len(hashes); i += hashSize {
		level = append(level, evm.Hash(hashes[i:i+hashSize]))
	}
	for ; len(level) > 1; level = level[:len(level)/2] {
		for i := range len(level) / 2 {
			level[i] = receiptlog.Parent(level[2*i], level[2*i+1])
		}
	}
	return level[0]
}

// below makes a tile of the ones below it.
func (v *view) below(id receiptlog.NodeID) (t tile, err error) {
	for i := range uint64(tileSize) {
		hashes, at, err := v.read(v.ctx, v.log.Head.Node, v.log.Era(), int(id.Level)-1, id.Index<<tileBits+i)
		if err != nil {
			return t, err
		}
		if len(hashes) != tileSize*hashSize {
			return t, store.ErrDamaged
		}
		root := rootOf(hashes)
		t.hashes, t.at = append(t.hashes, root[:]...), at
	}
	return t, v.whole(id, t)
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
