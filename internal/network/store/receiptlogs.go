package store

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/resultity/node/internal/evm"
	"github.com/resultity/node/internal/failpoint"
	"github.com/resultity/node/internal/receiptlog"
)

// How much is kept of the receipt logs of nodes. Tiles go when the receipts that
// they prove have gone (see SetResultTTL), and before that, the oldest first, when
// there are too many: of one node, so that a node which makes receipts up pushes out
// its own, or of all. What was proven by a tile that has gone cannot be proven any
// more.
const (
	maxTilesOf = 16384 // at each level: of one node some four million receipts
	maxTiles   = 4 << 30
	tileGrace  = 25 * time.Hour // for a leaf that comes before its result: no job may take longer
)

// LogSummary says how far a node's receipt log is known.
type LogSummary struct {
	// Head is the newest one to which every leaf is here; nil for none.
	Head *receiptlog.SignedHead `json:"head"`
	// From is the first leaf that is here: what came before cannot be proven.
	From uint64 `json:"from"`
	// Lost is the newest head of a copy that was lost. What is here now has not been
	// shown to go on from it.
	Lost *receiptlog.SignedHead `json:"lost,omitempty"`
	// Conflict has the heads that cannot be of one log.
	Conflict *Conflict `json:"conflict,omitempty"`
	// LeftOut counts receipts that the network has and that the log went on without.
	LeftOut uint64 `json:"left_out"`
	Stored  int64  `json:"stored"` // Unix milliseconds
}

// Size is how many leaves the log has.
func (l *LogSummary) Size() uint64 {
	if l.Head == nil {
		return 0
	}
	return l.Head.Size
}

// ReceiptLog is what is kept of a node's receipt log beside its full tiles.
type ReceiptLog struct {
	LogSummary
	// Edge is the log at Head, and Before the one at From, see
	// [receiptlog.Log.Hashes].
	Edge   []evm.Hash `json:"edge"`
	Before []evm.Hash `json:"before"`
	// Open has the tile of each level that is not full, as [Tile.Hashes].
	Open [][]byte `json:"open"`
}

// Conflict is a head of a node, and a second one of a log that does not begin with
// the first's, or is another one of the same size.
type Conflict struct {
	First  receiptlog.SignedHead `json:"first"`
	Second receiptlog.SignedHead `json:"second"`
	Found  int64                 `json:"found"` // Unix milliseconds
}

// Tile is 256 hashes of one level of a log's tree: level L has the roots of
// subtrees of 256 to the power of L leaves. One that is full never changes.
type Tile struct {
	Level  int
	Index  uint64
	Hashes []byte // 32 bytes each
}

func tileSubject(node evm.Address, level int, index uint64) string {
	return "tiles." + nodeKey(node) + "." + strconv.Itoa(level) + "." + strconv.FormatUint(index, 10)
}

// PutReceiptLog stores a node's log, and the tiles that have become full since. The
// tiles are there before anything says so.
func (s *Store) PutReceiptLog(ctx context.Context, node evm.Address, l *ReceiptLog, full []Tile) error {
	b, err := json.Marshal(l)
	if err != nil {
		return err
	}
	size := len(b)
	for _, t := range full {
		size += len(t.Hashes)
	}
	db, ctx, end, err := s.write(ctx, more, size)
	if err != nil {
		return fmt.Errorf("store receipt log of %s: %w", node, err)
	}
	defer end()
	failpoint.Here("store.receiptlog.begin")
	for _, t := range full {
		subject := tileSubject(node, t.Level, t.Index)
		if _, err := s.last(ctx, db, db.tiles, subject); err != nil && !errors.Is(err, ErrNotFound) && s.lost.of(subject) == nil {
			return fmt.Errorf("tile %d of level %d of the receipt log of %s: %w", t.Index, t.Level, node, db.failure(err))
		}
		if _, err := db.js.Publish(ctx, subject, t.Hashes); err != nil {
			return fmt.Errorf("store tile %d of level %d of the receipt log of %s: %w", t.Index, t.Level, node, db.failure(err))
		}
		if err := s.lost.replaced(subject); err != nil {
			return err
		}
		if t.Index < maxTilesOf {
			continue
		}
		if err := db.tiles.Purge(ctx, jetstream.WithPurgeSubject(tileSubject(node, t.Level, t.Index-maxTilesOf))); err != nil {
			return fmt.Errorf("drop a tile of the receipt log of %s: %w", node, db.failure(err))
		}
	}
	failpoint.Here("store.receiptlog.tiled")
	if err := s.put(ctx, db, db.receiptlogs, nodeKey(node), b); err != nil {
		return fmt.Errorf("store receipt log of %s: %w", node, db.failure(err))
	}
	failpoint.Here("store.receiptlog.stored")
	return nil
}

// ReceiptLog returns what is kept of a node's log, [ErrNotFound] or [ErrDamaged].
func (s *Store) ReceiptLog(ctx context.Context, node evm.Address) (*ReceiptLog, error) {
	db := s.now.Load()
	e, err := s.entry(ctx, db, db.receiptlogs, nodeKey(node))
	if err != nil {
		return nil, fmt.Errorf("receipt log of %s: %w", node, err)
	}
	l := new(ReceiptLog)
	if err := json.Unmarshal(e.Value(), l); err != nil {
		return nil, fmt.Errorf("receipt log of %s: %w: %w", node, ErrDamaged, err)
	}
	return l, nil
}

// ReceiptLogs returns how far each log is known, by node.
func (s *Store) ReceiptLogs(ctx context.Context) (map[evm.Address]LogSummary, error) {
	db := s.now.Load()
	m, err := all[LogSummary](ctx, s, db, db.receiptlogs)
	if err != nil {
		return nil, err
	}
	logs := make(map[evm.Address]LogSummary, len(m))
	for key, l := range m {
		a, err := evm.ParseAddress("0x" + key)
		if err != nil {
			return nil, fmt.Errorf("receipt log under the name %.80q", key)
		}
		logs[a] = l
	}
	return logs, nil
}

// Tile returns the hashes of a full tile and when it was put, or [ErrNotFound].
func (s *Store) Tile(ctx context.Context, node evm.Address, level int, index uint64) (hashes []byte, at time.Time, err error) {
	db := s.now.Load()
	m, err := s.last(ctx, db, db.tiles, tileSubject(node, level, index))
	if err != nil {
		return nil, at, fmt.Errorf("tile %d of level %d of the receipt log of %s: %w", index, level, node, err)
	}
	return m.Data, m.Time, nil
}
