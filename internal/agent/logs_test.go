package agent

import (
	"bytes"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/resultity/node/internal/deploy/deploytest"
	"github.com/resultity/node/internal/journal"
	"github.com/resultity/node/internal/snapshot"
	"github.com/resultity/node/internal/wire"
)

// uploading is an agent whose loop of uploads runs, with a session and a spool.
// What the network stores is up to the test.
func uploading(t *testing.T, s *snapshot.Snapshot) *fixture {
	t.Helper()
	f := build(t, t.TempDir(), deploytest.New(t))
	f.openSpool(f.cfg.Paths.State)
	if f.spool == nil {
		t.Fatal(f.book)
	}
	f.board.learn(s)
	close(f.link.up)
	done := make(chan error, 1)
	go func() { done <- f.uploads(t.Context()) }()
	t.Cleanup(func() {
		if err := <-done; err != nil { // after t.Context has ended
			t.Error(err)
		}
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	})
	return f
}

// batch waits for the next batch and checks it as the network does.
func (f *fixture) batch() (*wire.LogBatch, []wire.LogRecord) {
	f.t.Helper()
	for {
		select {
		case m := <-f.link.sent:
			l, ok := m.(*wire.Logs)
			if !ok {
				continue
			}
			b, who, err := l.Open()
			if err != nil || who != nodeKey.Address() || b.Node != who || b.Network != "testnet" {
				f.t.Fatalf("%+v by %s, %v", b, who, err)
			}
			records, err := b.Unpack(l.Data)
			if err != nil {
				f.t.Fatal(err)
			}
			return b, records
		case <-time.After(patience):
			f.t.Fatal("no batch comes")
		}
	}
}

func TestUploads(t *testing.T) {
	s := deploytest.NewNetwork(t).Publish(map[string]any{"logs.batch_bytes": 4096})
	f := uploading(t, s)
	const secret = "the words of a prompt"
	for range 300 {
		f.Agent.log.Warn("job failed", journal.JobFailed.Attr(), "job", wire.NewOrderID(), "code", "engine_failed", "error", errors.New(secret))
	}
	for f.spool.Stats().Last < 300 {
		time.Sleep(time.Millisecond) // between two looks: the spool writes beside
	}
	ordered := make(chan error, 1)
	go func() { ordered <- f.uploadLogs(t.Context()) }()
	b, first := f.batch()
	if b.After != 0 || len(first) == 300 {
		t.Fatalf("%+v", b)
	}
	// Nothing moves without an acknowledgement, and none of another spool's. A new
	// session sends it again, and goes on from what is acknowledged, however often.
	f.Message(&wire.LogsAck{Spool: strings.Repeat("0", 32), Position: b.Last})
	n, batches := uint64(0), 0
	f.Opened()
	for n < 300 {
		b, records := f.batch()
		if b.After != n {
			t.Fatalf("a batch after %d, %d is acknowledged", b.After, n)
		}
		for _, r := range records {
			// The last ones are about the upload itself.
			if n++; r.Position != n || n <= 300 && (r.Event != "job-failed" || r.Fields["error"] != "") {
				t.Fatalf("%+v", r)
			}
		}
		batches++
		for range 2 {
			f.Message(&wire.LogsAck{Spool: b.Spool, Position: b.Last})
		}
	}
	if err := <-ordered; err != nil {
		t.Error(err)
	}
	if batches < 3 {
		t.Errorf("%d batches of at most 4 KiB", batches)
	}
	files, err := filepath.Glob(filepath.Join(f.cfg.Paths.State, "spool", "*"))
	if err != nil || len(files) < 2 {
		t.Fatal(files, err)
	}
	for _, name := range files {
		if raw, err := os.ReadFile(name); err != nil || bytes.Contains(raw, []byte(secret)) {
			t.Errorf("%s holds text, %v", name, err)
		}
	}
}

func TestUploadOff(t *testing.T) {
	f := build(t, t.TempDir(), deploytest.New(t))
	defer f.Close()
	f.membership.keeps.Upload = "off"
	f.openSpool(f.cfg.Paths.State)
	f.Agent.log.Error("x", slog.String("code", "y"))
	if _, err := os.Stat(filepath.Join(f.cfg.Paths.State, "spool")); !errors.Is(err, os.ErrNotExist) || f.logs().Upload != "off" {
		t.Errorf("%v, %+v", err, f.logs())
	}
	if err := f.uploadLogs(t.Context()); !errors.Is(err, errUploadOff) {
		t.Error(err)
	}
}
