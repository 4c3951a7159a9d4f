package store

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
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
	tileGrace  = 25 * time.Hour // for a leaf that comes before its result: limits.deadline_s is a day at most, and later results do not count
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
	// Resets are the times that the network's operator had the log begin anew, with
	// the heads that were set aside; the last one began this log.
	Resets []Reset `json:"resets,omitempty"`
	// LeftOut counts receipts that the network has and that the log went on without.
	LeftOut uint64 `json:"left_out"`
	Stored  int64  `json:"stored"` // Unix milliseconds
}

// MaxResets bounds how many times a log may begin anew: none is forgotten.
const MaxResets = 16

// Reset is the network's word that a log begins anew, and who gave it.
type Reset struct {
	receiptlog.SignedReset
	Operator string `json:"operator"`
}

// Era is the one of the log as it is now, see [receiptlog.Head].
func (l *LogSummary) Era() uint64 {
	if len(l.Resets) == 0 {
		return 0
	}
	return l.Resets[len(l.Resets)-1].Era
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

func tileSubject(node evm.Address, era uint64, level int, index uint64) string {
	return "tiles." + nodeKey(node) + "." + strconv.FormatUint(era, 10) + "." + strconv.Itoa(level) + "." + strconv.FormatUint(index, 10)
}

// endedKey names the log of an era that has ended.
func endedKey(node evm.Address, era uint64) string {
	return nodeKey(node) + "." + strconv.FormatUint(era, 10)
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
		subject := tileSubject(node, l.Era(), t.Level, t.Index)
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
		if err := db.tiles.Purge(ctx, jetstream.WithPurgeSubject(tileSubject(node, l.Era(), t.Level, t.Index-maxTilesOf))); err != nil {
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

// ResetReceiptLog stores a node's log that begins anew, with ended as that of the
// era before it, nil where there is none that is whole. What was there is kept before
// anything says that it is over.
func (s *Store) ResetReceiptLog(ctx context.Context, node evm.Address, ended, anew *ReceiptLog) error {
	before, err := json.Marshal(ended)
	if err != nil {
		return err
	}
	b, err := json.Marshal(anew)
	if err != nil {
		return err
	}
	db, ctx, end, err := s.write(ctx, more, len(before)+len(b))
	if err != nil {
		return fmt.Errorf("reset receipt log of %s: %w", node, err)
	}
	defer end()
	failpoint.Here("store.logreset.begin")
	if ended != nil {
		if err := s.put(ctx, db, db.receiptlogs, endedKey(node, ended.Era()), before); err != nil {
			return fmt.Errorf("keep the receipt log of %s: %w", node, db.failure(err))
		}
	}
	failpoint.Here("store.logreset.kept")
	if err := s.put(ctx, db, db.receiptlogs, nodeKey(node), b); err != nil {
		return fmt.Errorf("reset receipt log of %s: %w", node, db.failure(err))
	}
	failpoint.Here("store.logreset.stored")
	return nil
}

// ReceiptLog returns what is kept of a node's log, [ErrNotFound] or [ErrDamaged].
func (s *Store) ReceiptLog(ctx context.Context, node evm.Address) (*ReceiptLog, error) {
	return s.receiptLog(ctx, node, nodeKey(node))
}

// EndedReceiptLog returns the log of an era that has ended, as [Store.ReceiptLog] does.
func (s *Store) EndedReceiptLog(ctx context.Context, node evm.Address, era uint64) (*ReceiptLog, error) {
	return s.receiptLog(ctx, node, endedKey(node, era))
}

func (s *Store) receiptLog(ctx context.Context, node evm.Address, key string) (*ReceiptLog, error) {
	db := s.now.Load()
	e, err := s.entry(ctx, db, db.receiptlogs, key)
	if err != nil {
		return nil, fmt.Errorf("receipt log of %s: %w", node, err)
	}
	l := new(ReceiptLog)
	if err := json.Unmarshal(e.Value(), l); err != nil {
		return nil, fmt.Errorf("receipt log of %s: %w: %w", node, ErrDamaged, err)
	}
	return l, nil
}

// ReceiptLogs returns how far each log is known, by node. Of those in damaged nothing
// is known, for the [ErrDamaged] that is there.
func (s *Store) ReceiptLogs(ctx context.Context) (logs map[evm.Address]LogSummary, damaged map[evm.Address]error, err error) {
	db := s.now.Load()
	m, bad, err := readable[LogSummary](ctx, s, db, db.receiptlogs)
	if err != nil {
		return nil, nil, err
	}
	for _, r := range s.Lost() {
		key, ok := strings.CutPrefix(r.Subject, subjectOf(db.receiptlogs, ""))
		if _, there := m[key]; ok && !there {
			bad[key] = s.lost.check(r.Subject)
		}
	}
	logs, damaged = make(map[evm.Address]LogSummary, len(m)), map[evm.Address]error{}
	for key, l := range m {
		if a, ok := s.logOf(key); ok {
			logs[a] = l
		}
	}
	for key, err := range bad {
		if a, ok := s.logOf(key); ok && err != nil {
			damaged[a] = err
		}
	}
	return logs, damaged, nil
}

// logOf returns the node whose log is under a key; false for one of an era that has
// ended, and for what nobody has put there.
func (s *Store) logOf(key string) (evm.Address, bool) {
	if strings.Contains(key, ".") {
		return evm.Address{}, false
	}
	a, err := evm.ParseAddress("0x" + key)
	if err != nil {
		s.log.Warn("the store has a receipt log under a name that is no node's", "subject", key)
	}
	return a, err == nil
}

// putHeader says when a tile was put that had to be put again, in Unix milliseconds.
const putHeader = "Resultity-Put"

// MendTile puts a full tile again that was damaged. at is when it was put first.
func (s *Store) MendTile(ctx context.Context, node evm.Address, era uint64, t Tile, at time.Time) error {
	db, ctx, end, err := s.write(ctx, more, len(t.Hashes))
	if err != nil {
		return fmt.Errorf("mend receipt log of %s: %w", node, err)
	}
	defer end()
	subject := tileSubject(node, era, t.Level, t.Index)
	msg := nats.NewMsg(subject)
	msg.Data = t.Hashes
	msg.Header.Set(putHeader, strconv.FormatInt(at.UnixMilli(), 10))
	if _, err := db.js.PublishMsg(ctx, msg); err != nil {
		return fmt.Errorf("mend tile %d of level %d of the receipt log of %s: %w", t.Index, t.Level, node, db.failure(err))
	}
	return s.lost.replaced(subject)
}

// Tile returns the hashes of a full tile and when it was put, or [ErrNotFound].
func (s *Store) Tile(ctx context.Context, node evm.Address, era uint64, level int, index uint64) (hashes []byte, at time.Time, err error) {
	db := s.now.Load()
	m, err := s.last(ctx, db, db.tiles, tileSubject(node, era, level, index))
	if err != nil {
		return nil, at, fmt.Errorf("tile %d of level %d of the receipt log of %s: %w", index, level, node, err)
	}
	at = m.Time
	if ms, err := strconv.ParseInt(m.Header.Get(putHeader), 10, 64); err == nil {
		at = time.UnixMilli(ms)
	}
	return m.Data, at, nil
}
