package store

import (
	"bytes"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/resultity/node/internal/evm"
	"github.com/resultity/node/internal/receiptlog"
)

func TestReceiptLogs(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	ctx := t.Context()
	key, err := evm.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	node := key.Address()
	if _, err := s.EndedReceiptLog(ctx, node, 0); !errors.Is(err, ErrNotFound) {
		t.Errorf("an era that has not ended: %v", err)
	}
	if _, err := s.ReceiptLog(ctx, node); !errors.Is(err, ErrNotFound) {
		t.Fatalf("of a node without a log: %v", err)
	}
	if _, _, err := s.Tile(ctx, node, 0, 0, 0); !errors.Is(err, ErrNotFound) {
		t.Fatalf("of a node without tiles: %v", err)
	}
	head, err := (&receiptlog.Head{Node: node, Network: "testnet", Size: 256 * (maxTilesOf + 1), Root: evm.Hash{1}, Time: 1}).Sign(1, key)
	if err != nil {
		t.Fatal(err)
	}
	l := &ReceiptLog{LogSummary: LogSummary{Head: head, Stored: 4}, Edge: []evm.Hash{{2}}, Open: [][]byte{nil, bytes.Repeat([]byte{3}, 64)}}
	tile := func(level int, index uint64) Tile {
		return Tile{level, index, bytes.Repeat([]byte{byte(level), byte(index)}, 4096)}
	}
	if err := s.PutReceiptLog(ctx, node, l, []Tile{tile(0, 0), tile(0, 1), tile(1, 0)}); err != nil {
		t.Fatal(err)
	}
	for range 2 { // what is put again is the same
		if err := s.PutReceiptLog(ctx, node, l, []Tile{tile(0, maxTilesOf)}); err != nil {
			t.Fatal(err)
		}
	}
	s = reopen(t, s, dir)
	got, err := s.ReceiptLog(ctx, node)
	if err != nil || *got.Head != *head || got.Size() != head.Size || len(got.Open) != 2 || !bytes.Equal(got.Open[1], l.Open[1]) || got.Edge[0] != l.Edge[0] {
		t.Fatalf("after a restart: %+v, %v", got, err)
	}
	all, _, err := s.ReceiptLogs(ctx)
	if err != nil || len(all) != 1 || *all[node].Head != *head {
		t.Fatalf("all: %v, %v", all, err)
	}
	for _, want := range []Tile{tile(0, 1), tile(1, 0), tile(0, maxTilesOf)} {
		if got, at, err := s.Tile(ctx, node, 0, want.Level, want.Index); err != nil || !bytes.Equal(got, want.Hashes) || time.Since(at).Abs() > time.Minute {
			t.Errorf("tile %d of level %d: %d bytes, %v", want.Index, want.Level, len(got), err)
		}
	}
	if _, _, err := s.Tile(ctx, node, 0, 0, 0); !errors.Is(err, ErrNotFound) {
		t.Errorf("a tile beyond the bound of the node is kept: %v", err)
	}
	if _, _, err := s.Tile(ctx, evm.Address{1}, 0, 0, 1); !errors.Is(err, ErrNotFound) {
		t.Errorf("another node has the tile: %v", err)
	}

	anew := &ReceiptLog{LogSummary: LogSummary{Resets: []Reset{{Operator: "ann"}}}}
	anew.Resets[0].Era = 7
	if err := s.ResetReceiptLog(ctx, node, l, anew); err != nil {
		t.Fatal(err)
	}
	if err := s.PutReceiptLog(ctx, node, anew, []Tile{tile(9, 1)}); err != nil {
		t.Fatal(err)
	}
	if err := s.MendTile(ctx, node, 7, Tile{9, 1, []byte("mended")}, time.UnixMilli(5)); err != nil {
		t.Fatal(err)
	}
	if got, at, err := s.Tile(ctx, node, 7, 9, 1); err != nil || string(got) != "mended" || at.UnixMilli() != 5 {
		t.Errorf("a tile that was mended: %q of %v, %v", got, at, err)
	}
	if got, err := s.EndedReceiptLog(ctx, node, 0); err != nil || *got.Head != *head {
		t.Errorf("the log before: %+v, %v", got, err)
	}
	all, _, err = s.ReceiptLogs(ctx)
	if is := all[node]; err != nil || len(all) != 1 || is.Era() != 7 || is.Head != nil || is.Resets[0].Operator != "ann" {
		t.Errorf("all: %v, %v", all, err)
	}
	if _, _, err := s.Tile(ctx, node, 0, 9, 1); !errors.Is(err, ErrNotFound) {
		t.Errorf("a tile of another era: %v", err)
	}
	if got, _, err := s.Tile(ctx, node, 7, 9, 1); err != nil || string(got) != "mended" {
		t.Errorf("a tile of the new era: %v", err)
	}

	if err := s.SetResultTTL(ctx, time.Hour); err != nil {
		t.Fatal(err)
	}
	if got := s.now.Load().tiles.CachedInfo().Config.MaxAge; got != time.Hour+tileGrace {
		t.Errorf("tiles are kept for %v, results for an hour", got)
	}

	if _, err := s.now.Load().receiptlogs.Put(ctx, nodeKey(node), []byte(`{"head":`)); err != nil {
		t.Fatal(err)
	}
	if _, err := s.ReceiptLog(ctx, node); !errors.Is(err, ErrDamaged) {
		t.Errorf("a record that cannot be read: %v", err)
	}
	// It hides no other one.
	other := evm.Address{9}
	if err := s.PutReceiptLog(ctx, other, &ReceiptLog{}, nil); err != nil {
		t.Fatal(err)
	}
	if _, err := s.now.Load().receiptlogs.Put(ctx, "words", []byte(`{}`)); err != nil {
		t.Fatal(err)
	}
	all, damaged, err := s.ReceiptLogs(ctx)
	if _, ok := all[other]; err != nil || !ok || len(all) != 1 || len(damaged) != 1 || !errors.Is(damaged[node], ErrDamaged) || !strings.Contains(damaged[node].Error(), nodeKey(node)) {
		t.Errorf("beside a record that cannot be read: %v, %v, %v", all, damaged, err)
	}
	if err := s.PutReceiptLog(ctx, node, anew, nil); err != nil {
		t.Fatal(err)
	}
	if all, damaged, err := s.ReceiptLogs(ctx); err != nil || len(all) != 2 || len(damaged) != 0 {
		t.Errorf("when it was written again: %v, %v, %v", all, damaged, err)
	}
	// Nor does one that the disk has lost, which is named, too.
	third := evm.Address{8}
	if err := s.lost.add(&Lost{ID: "x", Subject: subjectOf(s.now.Load().receiptlogs, nodeKey(third)), Found: time.Now()}, nil, nil); err != nil {
		t.Fatal(err)
	}
	if all, damaged, err := s.ReceiptLogs(ctx); err != nil || len(all) != 2 || len(damaged) != 1 || !errors.Is(damaged[third], ErrDamaged) || !strings.Contains(damaged[third].Error(), "kept as x") {
		t.Errorf("beside one that is lost: %v, %v, %v", all, damaged, err)
	}
	s.room.mu.Lock()
	s.room.keep = 1 << 62
	s.room.mu.Unlock()
	if err := s.PutReceiptLog(ctx, node, l, nil); !errors.Is(err, ErrNoRoom) {
		t.Errorf("with a full disk: %v", err)
	}
}
