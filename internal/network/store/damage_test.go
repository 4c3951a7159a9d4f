package store

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/evm"
	"github.com/resultity/node/internal/receipt"
	"github.com/resultity/node/internal/wire"
)

// world is a store with something in each of its streams.
type world struct {
	dir    string
	log    bytes.Buffer
	s      *Store
	secret string
	token  string
	jobs   []receipt.JobID
	raw    []byte // a configuration
}

func newWorld(t *testing.T) *world {
	t.Helper()
	w := &world{dir: t.TempDir(), raw: []byte(`{"schema":1}`)}
	w.open(t)
	ctx, s, now := t.Context(), w.s, time.Now()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	var err error
	w.secret, err = s.CreateAPIKey(ctx, "alice", now)
	must(err)
	revoked, err := s.CreateAPIKey(ctx, "bob", now)
	must(err)
	_ = revoked
	_, err = s.RevokeAPIKeys(ctx, "bob")
	must(err)
	w.token, err = s.CreateToken(ctx, Token{Uses: 5, Account: "acme", Expires: now.Add(time.Hour).UnixMilli()})
	must(err)
	for n := range byte(3) {
		_, err = s.Register(ctx, node(n+1), w.token, now)
		must(err)
		_, err = s.UpdateNode(ctx, evm.Address{n + 1}, func(x *Node) error { x.Hello = uint64(n) + 7; return nil })
		must(err)
		must(s.PutReceiptLog(ctx, evm.Address{n + 1}, &ReceiptLog{LogSummary: LogSummary{From: uint64(n), Stored: 1}}, []Tile{{Level: 0, Index: uint64(n), Hashes: bytes.Repeat([]byte{n}, 256*32)}}))
		must(s.PutOrder(ctx, &Order{Directive: wire.Directive{Node: evm.Address{n + 1}, ID: wire.OrderID{n}}}))
		_, err = s.EmailAccount(ctx, fmt.Sprintf("ann%d@example.org", n), now)
		must(err)
		must(s.PutMail(ctx, Mail{ID: strings.Repeat(string(rune('A'+n)), 26), To: "x@example.org"}))
		j := put(t, s, fmt.Appendf(nil, "request %d", n))
		w.jobs = append(w.jobs, j.ID)
		must(s.PutResult(ctx, signed(t, j.ID), digest.Of([]byte("c")), []byte("response")))
		must(s.PutReplay(ctx, j.ID, []byte(`{"verdict":"same"}`)))
		must(s.PutSandbox(ctx, sandboxOf(t, key(t), int(n))))
	}
	_, err = s.PutConfig(ctx, w.raw)
	must(err)
	return w
}

func (w *world) open(t *testing.T) {
	t.Helper()
	s, err := Open(t.Context(), w.dir, slog.New(slog.NewTextHandler(&w.log, &slog.HandlerOptions{Level: slog.LevelInfo})))
	if err != nil {
		t.Fatalf("%v\n%s", err, w.log.String())
	}
	t.Cleanup(s.Close)
	w.s = s
}

// all reads everything that is in the store, and fails for what is not.
func (w *world) all(t *testing.T) (problems []error) {
	t.Helper()
	ctx, s := t.Context(), w.s
	bad := func(err error) {
		if err != nil {
			problems = append(problems, err)
		}
	}
	if c, ok := s.Client(w.secret); !ok || c.Name != "alice" {
		bad(errors.New("API key is gone"))
	}
	if len(s.clients.byHash) != 1 {
		bad(fmt.Errorf("%d API keys", len(s.clients.byHash)))
	}
	for n := range byte(3) {
		a := evm.Address{n + 1}
		if x, err := s.Node(ctx, a); err != nil || x.Hello != uint64(n)+7 || x.Account != "acme" {
			bad(fmt.Errorf("node %d: %+v %w", n, x, err))
		}
		if x, err := s.ReceiptLog(ctx, a); err != nil || x.From != uint64(n) {
			bad(fmt.Errorf("receipt log %d: %w", n, err))
		}
		if x, _, err := s.Tile(ctx, a, 0, 0, uint64(n)); err != nil || !bytes.Equal(x, bytes.Repeat([]byte{n}, 256*32)) {
			bad(fmt.Errorf("tile %d: %w", n, err))
		}
		if _, err := s.Result(ctx, w.jobs[n]); err != nil {
			bad(err)
		}
		if _, _, err := s.TokenAccount(ctx, w.token, a, time.Now()); err != nil {
			bad(err)
		}
	}
	count := func(what string, n int, err error) {
		if err != nil || n != 3 {
			bad(fmt.Errorf("%d %s: %w", n, what, err))
		}
	}
	accounts, err := s.EmailAccounts(ctx)
	count("accounts", len(accounts), err)
	orders, err := s.Orders(ctx)
	count("orders", len(orders), err)
	mails, err := s.Mails(ctx)
	count("mails", len(mails), err)
	logs, damaged, err := s.ReceiptLogs(ctx)
	for _, err := range damaged {
		bad(err)
	}
	count("receipt logs", len(logs), err)
	jobs, err := s.Jobs(ctx, func(seq uint64, err error) { bad(err) })
	jobs = slices.DeleteFunc(jobs, func(j *Job) bool { return !slices.Contains(w.jobs, j.ID) }) // write makes more
	count("jobs", len(jobs), err)
	replays := 0
	err = s.Replays(ctx, func([]byte) error { replays++; return nil })
	count("replays", min(replays, 3), err) // write makes more
	sandboxes, err := s.now.Load().known(ctx, "SANDBOXES", "sandboxes.>")
	count("sandboxes", int(sandboxes), err)
	if _, err := s.Config(ctx, digest.Of(w.raw)); err != nil {
		bad(err)
	}
	return problems
}

// write writes to all that can be written again.
func (w *world) write(ctx context.Context) error {
	s := w.s
	var errs []error
	for n := range byte(3) {
		_, err := s.UpdateNode(ctx, evm.Address{n + 1}, func(x *Node) error { x.Agent += "."; return nil })
		errs = append(errs, err, s.PutReceiptLog(ctx, evm.Address{n + 1}, &ReceiptLog{LogSummary: LogSummary{From: uint64(n), Stored: 2}}, nil),
			s.PutOrder(ctx, &Order{Directive: wire.Directive{Node: evm.Address{n + 1}, ID: wire.OrderID{n}}, Outcome: "done"}))
	}
	errs = append(errs, s.PutJob(ctx, &Job{Job: wire.Job{ID: receipt.NewJobID()}}), s.PutReplay(ctx, w.jobs[0], []byte(`{}`)))
	return errors.Join(errs...)
}

// blk is the last block of a stream.
func (w *world) blk(t *testing.T, stream string) string {
	t.Helper()
	list, err := filepath.Glob(filepath.Join(streamsIn(w.dir), stream, "msgs", "*.blk"))
	if err != nil || len(list) == 0 {
		t.Fatalf("%s has no blocks: %v", stream, err)
	}
	return list[len(list)-1]
}

// live is where the last message of a stream begins, and how long it is.
func live(t *testing.T, file string) (at, n int) {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i < len(b); {
		l := int(binary.LittleEndian.Uint32(b[i:]) &^ (1 << 31))
		if binary.LittleEndian.Uint64(b[i+4:])>>62 == 0 {
			at, n = i, l
		}
		i += l
	}
	return at, n
}

func flip(t *testing.T, file string, offset int, by byte) {
	t.Helper()
	f, err := os.OpenFile(file, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var b [1]byte
	if _, err := f.ReadAt(b[:], int64(offset)); err != nil {
		t.Fatal(err)
	}
	b[0] ^= by
	if _, err := f.WriteAt(b[:], int64(offset)); err != nil {
		t.Fatal(err)
	}
}

// places are those in a record that JetStream takes differently.
var places = []struct {
	name string
	at   func(n int) int
	by   byte
}{
	{"length", func(int) int { return 0 }, 0x10},
	{"length, far off", func(int) int { return 2 }, 0x81},
	{"header bit", func(int) int { return 3 }, 0x80},
	{"number", func(int) int { return 4 }, 0x01},
	{"number, far off", func(int) int { return 9 }, 0x40},
	{"erased", func(int) int { return 11 }, 0x80},
	{"tombstone", func(int) int { return 11 }, 0x40},
	{"time", func(int) int { return 13 }, 0xff},
	{"length of the subject", func(int) int { return 20 }, 0x03},
	{"length of the subject, far off", func(int) int { return 21 }, 0x20},
	{"subject", func(int) int { return 22 + 9 }, 0x15},
	{"message", func(n int) int { return n - 20 }, 0x08},
	{"checksum", func(n int) int { return n - 3 }, 0xff},
}

// A byte that is flipped on the disk while the service is down, in a record of every
// stream at once, costs nothing.
func TestFlippedAtRest(t *testing.T) {
	for _, killed := range []bool{false, true} {
		w := newWorld(t)
		for _, p := range places {
			w.s.Close()
			if killed { // what JetStream writes at the end is not there
				for _, k := range kinds {
					_ = os.Remove(filepath.Join(streamsIn(w.dir), k.stream, "msgs", "index.db"))
				}
				_ = os.Remove(filepath.Join(w.dir, closedName))
			}
			n := 0
			for _, k := range kinds {
				if k.stream == "REQUESTS" || k.stream == "LOGS" {
					continue
				}
				n++
				file := w.blk(t, k.stream)
				at, size := live(t, file)
				flip(t, file, at+p.at(size), p.by)
			}
			w.log.Reset()
			w.open(t)
			for _, err := range w.all(t) {
				t.Errorf("%s, killed %v: %v", p.name, killed, err)
			}
			if err := w.write(t.Context()); err != nil {
				t.Errorf("%s, killed %v: %v", p.name, killed, err)
			}
			got := w.s.Damaged()
			if got["mended"] != int64(n) || got["lost"] != 0 || t.Failed() {
				t.Fatalf("%s, killed %v: %v of %d damaged records\n%s", p.name, killed, got, n, w.log.String())
			}
		}
	}
}

// unread has a server run that has read nothing of the files yet.
func (w *world) unread(t *testing.T) {
	t.Helper()
	w.s.now.Load().close()
	d, err := w.s.start(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	w.s.now.Store(d)
}

// settle lets the store look after itself until it is well.
func (w *world) settle(t *testing.T) {
	t.Helper()
	for range 5 {
		w.s.guard(t.Context())
		w.s.room.reopened = time.Time{}
	}
	if err := w.s.Accepting(); err != nil {
		t.Fatalf("%v\n%s", err, w.log.String())
	}
}

// A byte that is flipped while the service runs stops it for a moment at most.
func TestFlippedWhileRunning(t *testing.T) {
	for _, p := range places {
		if p.name != "length" && p.name != "number" && p.name != "message" {
			continue
		}
		w := newWorld(t)
		for _, name := range []string{"KV_NODES", "KV_ACCOUNTS", "KV_ORDERS", "JOBS", "RESULTS"} {
			k := kindOf(name)
			w.s.copy()
			w.unread(t)
			file := w.blk(t, k.stream)
			at, size := live(t, file)
			flip(t, file, at+p.at(size), p.by)
			w.log.Reset()
			first := w.all(t)
			wrote := w.write(t.Context())
			w.s.compare(t.Context())
			w.s.scrubOnce(t.Context())
			w.settle(t)
			left := w.all(t)
			if err := w.write(t.Context()); err != nil {
				t.Errorf("%s of %s: %v", p.name, k.stream, err)
			}
			if !k.copied && len(left) <= 1 && len(w.s.Lost()) > 0 {
				t.Logf("%s of %s: JetStream has cut it off: %v", p.name, k.stream, left)
				w = newWorld(t)
				continue
			}
			for _, err := range left {
				t.Errorf("%s of %s: %v", p.name, k.stream, err)
			}
			if t.Failed() {
				t.Fatalf("at first: %v; written: %v; damaged: %v\n%s", errors.Join(first...), wrote, w.s.Damaged(), w.log.String())
			}
		}
	}
}

// A record that cannot be mended is kept as evidence, and said to be lost; what else is in
// its file stays. A node's registration does not begin anew before the operator says so.
func TestLostRecord(t *testing.T) {
	w := newWorld(t)
	w.s.Close()
	for _, stream := range []string{"KV_NODES", "KV_ACCOUNTS", "KV_RECEIPTLOGS", "RESULTS"} {
		file := w.blk(t, stream)
		at, size := live(t, file)
		for i := size - 60; i < size-20; i++ {
			flip(t, file, at+i, 0x5a)
		}
	}
	check := func() {
		t.Helper()
		if n := len(w.s.Lost()); n != 4 {
			t.Fatalf("%d lost records\n%s", n, w.log.String())
		}
		a, ctx := evm.Address{3}, t.Context()
		if _, err := w.s.Node(ctx, a); !errors.Is(err, ErrDamaged) {
			t.Errorf("node: %v", err)
		}
		if _, err := w.s.RegisterUnbound(ctx, Node{Address: a}, time.Now()); !errors.Is(err, ErrDamaged) {
			t.Errorf("it registers anew: %v", err)
		}
		if _, err := w.s.Register(ctx, Node{Address: a}, w.token, time.Now()); !errors.Is(err, ErrDamaged) {
			t.Errorf("it registers anew: %v", err)
		}
		if _, err := w.s.EmailAccount(ctx, "ann2@example.org", time.Now()); !errors.Is(err, ErrDamaged) {
			t.Errorf("another account: %v", err)
		}
		if _, err := w.s.ReceiptLog(ctx, a); !errors.Is(err, ErrDamaged) {
			t.Errorf("receipt log: %v", err)
		}
		if _, err := w.s.Result(ctx, w.jobs[2]); !errors.Is(err, ErrDamaged) {
			t.Errorf("result: %v", err)
		}
		for n := range byte(2) {
			if x, err := w.s.Node(ctx, evm.Address{n + 1}); err != nil || x.Hello != uint64(n)+7 {
				t.Errorf("node %d: %+v %v", n, x, err)
			}
		}
	}
	w.open(t)
	check()
	w.s.Close()
	w.open(t)
	check()
	if err := w.s.PutReceiptLog(t.Context(), evm.Address{3}, &ReceiptLog{}, nil); err != nil {
		t.Error(err)
	}
	if _, err := w.s.ReceiptLog(t.Context(), evm.Address{3}); err != nil {
		t.Error(err)
	}
	for _, l := range w.s.Lost() {
		if raw, err := os.ReadFile(filepath.Join(w.dir, "damaged", l.ID+".bin")); err != nil || len(raw) != l.Size {
			t.Errorf("evidence of %s: %d bytes, %v", l.ID, len(raw), err)
		}
		if l.Waits {
			if n, err := w.s.ForgetLost(l.ID); n != 1 || err != nil {
				t.Error(err)
			}
		}
	}
	if n, err := w.s.Register(t.Context(), Node{Address: evm.Address{3}}, w.token, time.Now()); err != nil || n.Account != "acme" {
		t.Errorf("%+v %v", n, err)
	}
	if _, err := w.s.EmailAccount(t.Context(), "ann2@example.org", time.Now()); err != nil {
		t.Error(err)
	}
}

// What is lost comes back from the second copy, if there was one.
func TestLostRecordWithCopy(t *testing.T) {
	w := newWorld(t)
	w.s.copy()
	w.s.Close()
	for _, stream := range []string{"KV_NODES", "KV_ACCOUNTS", "KV_RECEIPTLOGS", "KV_TOKENS", "KV_APIKEYS", "KV_ORDERS", "KV_CONFIGS"} {
		b, err := os.ReadFile(w.blk(t, stream))
		if err != nil {
			t.Fatal(err)
		}
		for i := range min(len(b), 4096) { // a sector
			b[i] = 0
		}
		if err := os.WriteFile(w.blk(t, stream), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	w.open(t)
	for _, err := range w.all(t) {
		t.Error(err)
	}
	if n := len(w.s.Lost()); n != 0 && t.Failed() {
		t.Errorf("%d lost\n%s", n, w.log.String())
	}
	if err := w.write(t.Context()); err != nil {
		t.Error(err)
	}
}

// A sector takes whole records with it, of which not even the names are left. None of them is
// taken for one that never was.
func TestLostSector(t *testing.T) {
	for _, killed := range []bool{false, true} {
		w := newWorld(t)
		w.s.Close()
		if killed {
			_ = os.Remove(filepath.Join(w.dir, closedName))
		}
		for _, stream := range []string{"KV_NODES", "KV_ACCOUNTS"} {
			b, err := os.ReadFile(w.blk(t, stream))
			if err != nil {
				t.Fatal(err)
			}
			clear(b[:min(len(b), 4096)])
			if err := os.WriteFile(w.blk(t, stream), b, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		for range 2 {
			w.open(t)
			for n := range byte(3) {
				if _, err := w.s.RegisterUnbound(t.Context(), Node{Address: evm.Address{n + 1}}, time.Now()); !errors.Is(err, ErrDamaged) {
					t.Errorf("killed %v: node %d registers anew: %v", killed, n, err)
				}
				if _, err := w.s.EmailAccount(t.Context(), fmt.Sprintf("ann%d@example.org", n), time.Now()); !errors.Is(err, ErrDamaged) {
					t.Errorf("killed %v: account %d: %v", killed, n, err)
				}
			}
			if t.Failed() {
				t.Fatal(w.log.String())
			}
			w.s.Close()
		}
	}
}

// The configuration of a stream, too, is as it was.
func TestFlippedConfiguration(t *testing.T) {
	w := newWorld(t)
	for _, file := range []string{"meta.inf", "meta.sum"} {
		w.s.Close()
		for _, k := range kinds {
			flip(t, filepath.Join(streamsIn(w.dir), k.stream, file), 10, 0x40)
			_ = os.Remove(filepath.Join(w.dir, "copies", k.stream, "meta.inf"))
		}
		w.open(t)
		for _, err := range w.all(t) {
			t.Errorf("%s: %v", file, err)
		}
		if got := w.s.now.Load().results.CachedInfo().Config.MaxMsgsPerSubject; got != 1 {
			t.Errorf("%s: results have %d", file, got)
		}
	}
	w.s.Close()
	for _, k := range kinds { // two bytes, with a copy
		flip(t, filepath.Join(streamsIn(w.dir), k.stream, "meta.inf"), 10, 0x40)
		flip(t, filepath.Join(streamsIn(w.dir), k.stream, "meta.inf"), 20, 0x40)
	}
	w.open(t)
	for _, err := range w.all(t) {
		t.Error(err)
	}
}
