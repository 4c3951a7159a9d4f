package spool

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/resultity/node/internal/journal"
	"github.com/resultity/node/internal/wire"
)

func open(t *testing.T, dir string) *Spool {
	t.Helper()
	s, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return s
}

// until waits for what the writer does beside.
func until(t *testing.T, s *Spool, what string, ok func(Stats) bool) {
	t.Helper()
	for end := time.Now().Add(2 * time.Minute); !ok(s.Stats()); {
		if time.Now().After(end) {
			t.Fatalf("waited in vain for %s: %+v", what, s.Stats())
		}
		time.Sleep(time.Millisecond) // between two looks
	}
}

func reopen(t *testing.T, s *Spool) *Spool {
	t.Helper()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	return open(t, s.dir)
}

func next(t *testing.T, s *Spool, limit int) (*Batch, []wire.LogRecord) {
	t.Helper()
	b, err := s.Next(limit)
	if err != nil {
		t.Fatal(err)
	}
	if b == nil {
		return nil, nil
	}
	records, err := (&wire.LogBatch{Spool: b.Spool, After: b.After, Last: b.Last, Count: b.Count}).Unpack(b.Data)
	if err != nil {
		t.Fatal(err)
	}
	return b, records
}

func TestOnlyWhatMayLeave(t *testing.T) {
	s := open(t, t.TempDir())
	log := slog.New(s.Handler(slog.LevelDebug)).With("network", "testnet", "path", "/secret")
	const secret = "secret words"
	log.Info("job done", journal.JobDone.Attr(), "job", "ab", "model", "tiny", "prompt", secret, "took", 3*time.Second, slog.Group("engine", "error", secret))
	log.Warn("job failed", journal.JobFailed.Attr(), "job", "ab", "code", "engine_failed", "error", errors.New(secret), "reason", secret)
	log.WithGroup("g").Error("deep", "error", secret)
	log.Error("not fetched", "error", errors.New(strings.Repeat("x", 400)+"\n\x1b[2J"), "model", "")
	log.Debug("hidden")
	s = reopen(t, s)
	_, got := next(t, s, 64<<10)
	if len(got) != 4 {
		t.Fatalf("%d records", len(got))
	}
	for i, want := range []string{"no prompt", "no words of an engine", "no fields of a group", "a bounded error"} {
		t.Logf("%s: expected: %s; got: %.150v", got[i].Message, want, got[i].Fields)
	}
	if r := got[0]; r.Event != "job-done" || r.Level != "INFO" || r.Message != "job done" || fmt.Sprint(r.Fields) != "map[job:ab model:tiny network:testnet took:3s]" {
		t.Errorf("%+v", r)
	}
	if r := got[1]; fmt.Sprint(r.Fields) != "map[code:engine_failed job:ab network:testnet]" {
		t.Errorf("%+v: a record about a job has no words of an engine", r)
	}
	if r := got[3]; len(r.Fields["error"]) != 300 || r.Fields["path"] != "" {
		t.Errorf("%+v", r)
	}
	files, err := filepath.Glob(filepath.Join(s.dir, "*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		if raw, err := os.ReadFile(f); err != nil || bytes.Contains(raw, []byte("secret")) {
			t.Errorf("%s holds text, %v", f, err)
		}
	}
}

// Recent has the newest records, whether or not the network has them.
func TestRecent(t *testing.T) {
	s := open(t, t.TempDir())
	if b, err := s.Recent(1000); err != nil || len(b) != 0 {
		t.Errorf("Recent of nothing = %q, %v", b, err)
	}
	log := slog.New(s.Handler(slog.LevelInfo))
	for i := range 7000 { // more than one segment
		log.Info("x", "count", i, "reason", strings.Repeat("r", 300))
		if i%500 == 0 {
			until(t, s, "room in line", func(st Stats) bool { return st.Last == st.Written })
		}
	}
	s = reopen(t, s)
	if len(s.segments) < 2 {
		t.Fatal("one segment")
	}
	for _, limit := range []int{10, 5000, segmentSize + segmentSize/2} {
		b, err := s.Recent(limit)
		if err != nil || len(b) > limit || limit > 1000 && len(b) < limit-1000 {
			t.Errorf("Recent(%d) has %d bytes, %v", limit, len(b), err)
		}
		want := uint64(7000)
		for _, line := range slices.Backward(bytes.Split(bytes.TrimSpace(b), []byte("\n"))) {
			var r wire.LogRecord
			if len(line) == 0 {
				continue
			}
			if err := json.Unmarshal(line, &r); err != nil || r.Position != want || r.Fields["count"] != fmt.Sprint(want-1) {
				t.Fatalf("%.80s, %v; want position %d", line, err, want)
			}
			want--
		}
	}
}

// Positions go on over restarts, and move on acknowledgement only.
func TestAck(t *testing.T) {
	s := open(t, t.TempDir())
	log := slog.New(s.Handler(slog.LevelInfo))
	for i := range 100 {
		log.Info("x", "count", i)
	}
	s = reopen(t, s)
	b, first := next(t, s, 4<<10)
	if b.After != 0 || first[0].Position != 1 || len(first) == 100 {
		t.Fatalf("%+v", b)
	}
	again, _ := next(t, s, 4<<10)
	if !bytes.Equal(again.Data, b.Data) {
		t.Error("another batch without an acknowledgement")
	}
	for _, bad := range []struct {
		spool string
		at    uint64
	}{{strings.Repeat("0", 32), b.Last}, {b.Spool, 101}, {b.Spool, 1 << 60}} {
		if err := s.Ack(bad.spool, bad.at); err != nil || s.Stats().Position != 0 {
			t.Errorf("%+v moved the position to %d, %v", bad, s.Stats().Position, err)
		}
	}
	if err := s.Ack(b.Spool, b.Last); err != nil {
		t.Fatal(err)
	}
	s = reopen(t, s)
	n := len(first)
	slog.New(s.Handler(slog.LevelInfo)).Info("y")
	s = reopen(t, s)
	for {
		b, records := next(t, s, 4<<10)
		if b == nil {
			break
		}
		for _, r := range records {
			if n++; r.Position != uint64(n) {
				t.Fatalf("record %d after %d", r.Position, n-1)
			}
		}
		if err := s.Ack(b.Spool, b.Last); err != nil {
			t.Fatal(err)
		}
	}
	if n != 101 {
		t.Errorf("%d records", n)
	}
}

// The oldest make room, and are counted.
func TestRingIsBounded(t *testing.T) {
	s := open(t, t.TempDir())
	log := slog.New(s.Handler(slog.LevelInfo))
	text := strings.Repeat("x", 290)
	const n = 40_000
	for i := range n {
		log.Info("x", "reason", text, "count", i)
		if i%500 == 0 {
			until(t, s, "room", func(Stats) bool { return len(s.waiting) == 0 })
		}
	}
	s = reopen(t, s)
	size := int64(0)
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		st, err := e.Info()
		if err != nil {
			t.Fatal(err)
		}
		size += st.Size()
	}
	if size > segments*segmentSize+maxMark || size < 4<<20 {
		t.Errorf("%d bytes on disk", size)
	}
	sum, dropped := uint64(0), uint64(0)
	for {
		b, records := next(t, s, 256<<10)
		if b == nil {
			break
		}
		sum += uint64(len(records))
		dropped += b.Last - b.After - b.Count
		if err := s.Ack(b.Spool, b.Last); err != nil {
			t.Fatal(err)
		}
	}
	if sum+dropped != s.Stats().Last || dropped == 0 || s.Stats().Position != s.Stats().Last {
		t.Errorf("%d records and %d dropped, of %d", sum, dropped, s.Stats().Last)
	}
}

// A record that the network would refuse for its length leaves a gap, and one that is
// as long as it may be arrives.
func TestLongRecords(t *testing.T) {
	s := open(t, t.TempDir())
	long := func(n int) *wire.LogRecord { // its JSON and its line's end have n bytes
		r := &wire.LogRecord{Position: 1, Level: "INFO", Fields: map[string]string{}}
		for name, most := range map[string]int{"image": 400, "error": 300, "reason": 300, "account": 128, "model": 110, "version": 64, "step": 16} {
			r.Fields[name] = strings.Repeat("<", most) // six bytes each in JSON
		}
		raw, err := json.Marshal(r)
		if err != nil {
			t.Fatal(err)
		}
		r.Message = strings.Repeat("x", n-1-len(raw))
		if err := r.Check(); err != nil {
			t.Fatal(err)
		}
		return r
	}
	s.put(long(maxLine - 9))
	s.put(long(maxLine - 9 + 1))
	s.put(&wire.LogRecord{Level: "INFO", Message: "after"})
	s = reopen(t, s)
	b, records := next(t, s, 64<<10)
	if len(records) != 2 || records[0].Position != 1 || records[1].Position != 3 || records[1].Message != "after" || b.Last-b.After-b.Count != 1 {
		t.Errorf("%+v, %d records", b, len(records))
	}
	if err := s.Stats().Err; err != nil {
		t.Errorf("nothing can be written: %v", err)
	}
}

// A spool after a crash, or after somebody else's hand.
func TestDamage(t *testing.T) {
	fill := func(t *testing.T) (dir, file string) {
		dir = t.TempDir()
		s := open(t, dir)
		for i := range 10 {
			slog.New(s.Handler(slog.LevelInfo)).Info("x", "count", i)
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		return dir, s.path(1)
	}
	dir, file := fill(t)
	raw, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	lineLen := len(raw) - 1 - bytes.LastIndexByte(raw[:len(raw)-1], '\n')
	for cut := range lineLen + 3 { // every place at which a write can be torn
		if err := os.WriteFile(file, raw[:len(raw)-cut], 0o600); err != nil {
			t.Fatal(err)
		}
		s := open(t, dir)
		want := uint64(10)
		if cut > 0 {
			want = 9
		}
		if cut > lineLen {
			want = 8
		}
		if got := s.Stats().Last; got != want {
			t.Fatalf("%d bytes cut: last is %d, want %d", cut, got, want)
		}
		slog.New(s.Handler(slog.LevelInfo)).Info("after")
		s = reopen(t, s)
		if _, records := next(t, s, 64<<10); uint64(len(records)) != want+1 || records[want].Message != "after" {
			t.Fatalf("%d bytes cut: %d records", cut, len(records))
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
	for name, damage := range map[string]func(dir, file string) error{
		"flipped bit":   func(_, file string) error { raw[3*lineLen+20] ^= 1; return os.WriteFile(file, raw, 0o600) },
		"garbage":       func(_, file string) error { return os.WriteFile(file, bytes.Repeat([]byte("x"), 100_000), 0o600) },
		"empty segment": func(dir, _ string) error { return os.WriteFile(filepath.Join(dir, "0000000000000011.log"), nil, 0o600) },
		"foreign record": func(_, file string) error {
			return os.WriteFile(file, encode([]byte(`{"n":1,"level":"INFO","message":"x","fields":{"prompt":"y"}}`)), 0o600)
		},
		"far away": func(_, file string) error {
			return os.WriteFile(file, encode([]byte(`{"n":18446744073709551615}`)), 0o600)
		},
		"mark": func(dir, _ string) error { return os.WriteFile(filepath.Join(dir, markFile), []byte("{"), 0o600) },
		"huge mark": func(dir, _ string) error {
			return os.WriteFile(filepath.Join(dir, markFile), append([]byte(`{"spool":"`+strings.Repeat("a", 32)+`"}`), bytes.Repeat([]byte(" "), maxMark)...), 0o600)
		},
		"no mark":      func(dir, _ string) error { return os.Remove(filepath.Join(dir, markFile)) },
		"foreign file": func(dir, _ string) error { return os.WriteFile(filepath.Join(dir, "notes.log"), []byte("x"), 0o600) },
	} {
		t.Run(name, func(t *testing.T) {
			dir, file := fill(t)
			if err := damage(dir, file); err != nil {
				t.Fatal(err)
			}
			s := open(t, dir)
			if name == "huge mark" && s.mark.Spool == strings.Repeat("a", 32) {
				t.Error("it is believed")
			}
			slog.New(s.Handler(slog.LevelInfo)).Info("after")
			s = reopen(t, s)
			_, records := next(t, s, 64<<10)
			if len(records) == 0 || records[len(records)-1].Message != "after" {
				t.Fatalf("what is logged afterwards is lost: %+v", records)
			}
			t.Logf("expected: what is logged afterwards is kept; got: %d records, the last %q", len(records), records[len(records)-1].Message)
			for _, r := range records {
				if r.Fields["prompt"] != "" {
					t.Errorf("%+v", r)
				}
			}
		})
	}
}

// Damage takes the record that it is in, and none behind it.
func TestDamageWithin(t *testing.T) {
	for name, c := range map[string]struct {
		damage func(lines [][]byte)
		lost   int
	}{
		"a bit":           {func(lines [][]byte) { lines[3][20] ^= 1 }, 1},
		"of a checksum":   {func(lines [][]byte) { lines[3][0] ^= 1 }, 1},
		"the end of line": {func(lines [][]byte) { lines[3][len(lines[3])-1] ^= 1 }, 2},
		"zeros":           {func(lines [][]byte) { clear(lines[3]); clear(lines[4]) }, 3},
		"a long line":     {func(lines [][]byte) { lines[3] = append(bytes.Repeat([]byte("x"), 3*maxLine), lines[3]...) }, 1},
		"the first":       {func(lines [][]byte) { lines[0][20] ^= 1 }, 1},
		"another's place": {func(lines [][]byte) { lines[3] = lines[2] }, 1},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			s := open(t, dir)
			for i := range 10 {
				slog.New(s.Handler(slog.LevelInfo)).Info("x", "count", i)
			}
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			raw, err := os.ReadFile(s.path(1))
			if err != nil {
				t.Fatal(err)
			}
			var lines [][]byte
			for line := range bytes.Lines(raw) {
				lines = append(lines, bytes.Clone(line))
			}
			c.damage(lines)
			if err := os.WriteFile(s.path(1), bytes.Join(lines, nil), 0o600); err != nil {
				t.Fatal(err)
			}
			s = open(t, dir)
			if last := s.Stats().Last; last != 10 {
				t.Errorf("the last is %d", last)
			}
			if _, records := next(t, s, 64<<10); len(records) != 10-c.lost {
				t.Errorf("%d records are there, want %d", len(records), 10-c.lost)
			}
		})
	}
}

// A disk that takes nothing holds up nobody, and costs only what it did not take.
func TestFullDisk(t *testing.T) {
	s := open(t, t.TempDir())
	log := slog.New(s.Handler(slog.LevelInfo))
	log.Info("before")
	until(t, s, "the first record", func(st Stats) bool { return st.Last == 1 })
	s.mu.Lock()
	_ = s.file.Close()
	full, err := os.OpenFile("/dev/full", os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	s.file = full
	s.mu.Unlock()
	log.Info("lost")
	until(t, s, "the error", func(st Stats) bool { return errors.Is(st.Err, syscall.ENOSPC) })
	log.Info("after")
	s = reopen(t, s)
	b, records := next(t, s, 64<<10)
	if len(records) != 2 || records[1].Message != "after" || b.Last-b.After-b.Count != 1 {
		t.Errorf("%+v %+v", b, records)
	}
}

// Who logs does not wait, even when the disk stands still.
func TestStuckDisk(t *testing.T) {
	s := open(t, t.TempDir())
	log := slog.New(s.Handler(slog.LevelInfo))
	s.mu.Lock()
	for i := range 3 * maxWaiting {
		log.Info("x", "count", i)
	}
	s.mu.Unlock()
	s = reopen(t, s)
	// What is in line, what the writer held, and what was logged when it took that.
	if _, records := next(t, s, wire.MaxLogBatch); len(records) < maxWaiting || len(records) > maxWaiting+1 {
		t.Errorf("%d records are kept, want %d", len(records), maxWaiting)
	}
}

// Whatever is in the newest segment: what was whole at its beginning is kept and
// leaves as it stood there, and the next record is read after it.
func FuzzOpen(f *testing.F) {
	const whole = `{"n":7,"time":1,"level":"INFO","message":"job done"}`
	line := func(s string) []byte { return encode([]byte(s)) }
	f.Add(line(whole))
	f.Add(append(line(whole), "torn"...))
	f.Add(append(line(whole), line(`{"n":7}`)...))
	f.Add(append(line(whole), line(`{"n":9007199254740991}`)...))
	f.Add([]byte("00000000 "))
	f.Fuzz(func(t *testing.T, tail []byte) {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, markFile), []byte(`{"spool":"`+strings.Repeat("ab", 16)+`","position":6}`), 0o600); err != nil {
			t.Fatal(err)
		}
		name := filepath.Join(dir, fmt.Sprintf("%016d.log", 7))
		if err := os.WriteFile(name, append(line(whole), tail...), 0o600); err != nil {
			t.Fatal(err)
		}
		s := open(t, dir)
		slog.New(s.Handler(slog.LevelInfo)).Info("after it")
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		raw, err := os.ReadFile(name)
		if err != nil || !bytes.HasPrefix(raw, line(whole)) {
			t.Fatalf("%q, %v", raw, err)
		}
		lines := slices.Collect(bytes.Lines(raw))
		if len(lines) < 2 || !bytes.Contains(lines[len(lines)-1], []byte("after it")) {
			t.Fatalf("the next record is not in %q", raw)
		}
		for _, l := range lines[len(lines)-2:] { // behind the last whole record nothing was left
			if _, ok := decode(l); !ok {
				t.Fatalf("%q was left in %q", l, raw)
			}
		}
	})
}
