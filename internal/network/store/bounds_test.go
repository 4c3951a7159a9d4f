package store

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"
)

// Each stream has the bound in bytes that its kind is given, or its share of a small
// disk; and what is written beyond it goes through, and the oldest goes.
func TestStreamsAreBounded(t *testing.T) {
	s := open(t, t.TempDir())
	for name, c := range map[string]struct {
		of      func(*db) jetstream.Stream
		most    int64
		subject string
	}{
		"LOGS":      {func(d *db) jetstream.Stream { return d.logs }, min(maxLogs, s.space/8), "logs.%d"},
		"TILES":     {tilesOf, min(maxTiles, s.space/16), "tiles.a.0.0.%d"},
		"SANDBOXES": {func(d *db) jetstream.Stream { return d.sandboxes }, min(maxSandboxes, s.space/16), "sandboxes.a.%d"},
		"REPLAYS":   {func(d *db) jetstream.Stream { return d.replays }, min(maxReplays, s.space/32), "replays.%d"},
		"RESULTS":   {resultsOf, min(DefaultLimits.Results, s.space/2), "results.%d"},
		"REQUESTS":  {requestsOf, leastRequest, "requests.%d"},
	} {
		cfg := c.of(s.now.Load()).CachedInfo().Config
		if cfg.MaxBytes != c.most || cfg.Discard != jetstream.DiscardOld {
			t.Errorf("%s: at most %d bytes, and then %v; want %d, and the oldest goes", name, cfg.MaxBytes, cfg.Discard, c.most)
		}
		const small, each = 64 << 10, 20 << 10
		if err := s.change(t.Context(), c.of, func(cfg *jetstream.StreamConfig) { cfg.MaxBytes = small }); err != nil {
			t.Fatal(err)
		}
		for i := range 5 {
			if _, err := s.now.Load().js.Publish(t.Context(), fmt.Sprintf(c.subject, i), make([]byte, each)); err != nil {
				t.Fatalf("%s: %v", name, err)
			}
		}
		info, err := c.of(s.now.Load()).Info(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("%s: 5 records of %d bytes: expected: the last 3 in at most %d; got: %d in %d", name, each, small, info.State.Msgs, info.State.Bytes)
		if info.State.Msgs != 3 || info.State.LastSeq != 5 || info.State.Bytes > small {
			t.Errorf("%s: %+v", name, info.State)
		}
	}
}

// One value is as large as it may be. What is larger is refused, and nothing else
// suffers by it.
func TestValuesAreBounded(t *testing.T) {
	s := open(t, t.TempDir())
	d := s.now.Load()
	text := make([]byte, maxMessage+1)
	header := len("NATS/1.0\r\nNats-Expected-Last-Subject-Sequence: 0\r\n\r\n") // which counts
	if _, err := d.publish(t.Context(), "jobs.a", text[:maxMessage-header]); err != nil {
		t.Errorf("the largest value: %v", err)
	}
	_, err := d.publish(t.Context(), "jobs.b", text[:maxMessage-header+1])
	t.Logf("one byte more than %d: expected: refused; got: %v", maxMessage, err)
	if err == nil || !strings.Contains(err.Error(), "size exceeds maximum") {
		t.Errorf("one byte more: %v", err)
	}
	put(t, s, []byte("x"))
	if d.failed.Err() != nil || s.now.Load() != d {
		t.Error("the store has begun again")
	}
}

// A token is good for as many nodes as it may be.
func TestTokenUsesAreBounded(t *testing.T) {
	s := open(t, t.TempDir())
	for uses, good := range map[int]bool{0: false, 1: true, MaxTokenUses: true, MaxTokenUses + 1: false} {
		_, err := s.CreateToken(t.Context(), Token{Uses: uses, Account: "acme", Expires: time.Now().Add(time.Hour).UnixMilli()})
		t.Logf("a token for %d: expected: made: %v; got: %v", uses, good, err)
		if (err == nil) != good || err != nil && !strings.Contains(err.Error(), fmt.Sprint(MaxTokenUses)) {
			t.Errorf("a token for %d: %v", uses, err)
		}
	}
}

// Jobs that are finished may stay behind one that is not until there are too many of
// them, or they have too many bytes.
func TestFinishedJobsAreBounded(t *testing.T) {
	s := open(t, t.TempDir())
	share := int(s.now.Load().jobs.CachedInfo().Config.MaxBytes / maxDoneShare)
	for name, c := range map[string]struct{ count, bytes int }{"jobs": {maxDone, 0}, "bytes": {2, share}} {
		first, done := put(t, s, []byte("not finished")), put(t, s, []byte("finished"))
		s.JobDone(done.Seq)
		s.pending.mu.Lock()
		s.pending.done[done.Seq] = c.bytes
		for i := range c.count - 1 { // jobs that are long deleted
			s.pending.done[1<<40+uint64(i)] = 0
		}
		s.pending.mu.Unlock()
		for over := range 2 {
			if over > 0 {
				s.pending.mu.Lock()
				s.pending.done[1<<41] = min(c.bytes, 1)
				s.pending.mu.Unlock()
			}
			if err := s.sweep(t.Context()); err != nil {
				t.Fatal(err)
			}
			stays := len(ids(t, s)) == 2
			if over > 0 {
				t.Logf("%s: one more than may stay: expected: deleted; got: it stays: %v", name, stays)
			}
			if stays != (over == 0) {
				t.Errorf("%s, %d too many: it stays: %v", name, over, stays)
			}
		}
		s.JobDone(first.Seq)
		if err := s.sweep(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
}

// Of damaged records as many bytes are kept as may be, and then only that they are lost.
func TestEvidenceIsBounded(t *testing.T) {
	l, err := openLost(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	bits := bytes.Repeat([]byte("x"), 100)
	l.bytes = maxEvidence - int64(len(bits)) // as if they were there
	one(t, l, "a", bits, true)
	one(t, l, "b", bits[:1], false)
	if err := l.remove(l.byID["a"]); err != nil {
		t.Fatal(err)
	}
	one(t, l, "c", bits, true)
}

func one(t *testing.T, l *lost, id string, evidence []byte, kept bool) {
	t.Helper()
	if err := l.add(&Lost{ID: id, Subject: "jobs." + id}, evidence, nil); err != nil {
		t.Fatal(err)
	}
	_, err := os.Stat(filepath.Join(l.dir, id+".bin"))
	t.Logf("%s, %d bytes in all: expected: kept: %v; got: %v", id, l.bytes, kept, err)
	if (err == nil) != kept || l.bytes > maxEvidence || l.of("jobs."+id) == nil {
		t.Errorf("%s: %v, %d bytes in all", id, err, l.bytes)
	}
}
