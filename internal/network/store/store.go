// Package store owns all that the network service must not forget: jobs that
// are not finished, results, nodes and their bindings, enrolment tokens, API
// keys, accounts, mail to be sent, published configurations, copies of nodes'
// receipt logs, and replays, in an embedded NATS JetStream.
//
// The rule it keeps: a call that returns without an error is on disk. JetStream
// is told to sync every write before it acknowledges one, and nothing here is
// answered from memory that was not written first. There are no lasting
// consumers: jobs are read once at start-up and afterwards written and deleted
// only, so the cost does not depend on the number of nodes.
//
// # Full and broken disks
//
// Three lines, the first of which is enough as long as the disk fills slowly. With
// less free than Room.Jobs no new job and no logs are taken, so that there is room
// for the results of the jobs that there are. With less than Room.Writes nothing is
// written. Both are asked before each write, and end by themselves.
//
// The third is for whatever else a disk may do. After one failed write JetStream
// refuses every further one to that stream, for good: what it has in memory may not
// be what is on disk. So its server is ended and another one begins on the same
// files, which takes a fraction of a second and reads what is really there; in this
// process, since a new one could tell clients nothing meanwhile. That is tried
// when there is room, and otherwise again and again. What was written can be read until
// the first try, and again once one has succeeded. A job whose writing failed may be there all the same: it is deleted
// by its name (see sweep), or it would be given out after the next start.
//
// # Damaged records
//
// JetStream says of a record that it cannot read that there is none; or it stops, tries for
// ever to remove it, or cuts its file off there, with all good records behind. So the
// files are read before JetStream is let at them (see package blocks): when the store
// opens, and when something speaks against a stream. What does so is a word in
// JetStream's log, a record that it remembers and does not find (see absent and end), or a
// stream with fewer records than subjects. Then the server is ended, the files are
// mended, and another one begins, as after a write that failed.
//
// A record that is lost is [ErrDamaged], not [ErrNotFound], until there is another one in its
// place or the operator says so, see [Store.Lost]. What a loss means is in kinds.go, kind by
// kind. Of a registration and of an account nothing takes the place by itself: a
// node's count of hellos and its account would begin anew, and so would an address's.
//
// While it runs JetStream may cut off the last file of a stream without a word. Of the
// streams that have a second copy nothing is lost by that; of jobs, results, tiles,
// sandboxes, logs and requests what was behind the damage in that file is, and it is said.
package store

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// Errors that callers tell apart.
var (
	ErrNotFound = errors.New("not found")
	ErrExists   = errors.New("exists already")
	ErrFull     = errors.New("no room left in the store for unfinished jobs; they are deleted when they end")
	ErrLocked   = errors.New("another process has the store open: the service, or a command for it; see systemctl status resultity-network")
)

// maxMessage bounds one stored value in bytes: a result of 16 MiB and its
// receipt, or a request of 16 MiB in base64, with room to spare. JetStream's
// file store takes a record of 32 MiB at most.
const maxMessage = 30 << 20

// opTimeout bounds one operation of the store. It is far above what a healthy
// disk needs; beyond it the caller is better told.
var opTimeout = 10 * time.Second // tests are less patient

// Store is an open store. All methods are safe for concurrent use.
type Store struct {
	dir  string
	log  *slog.Logger
	lock *os.File

	// now is the server that runs; a new one takes its place after a write error.
	now atomic.Pointer[db]

	clients clients
	pending pending
	room    room
	lost    *lost
	copying sync.Mutex // held while copies of records are made

	space   int64      // of the file system, in bytes
	streams sync.Mutex // held while a stream's configuration is changed
}

// db is one run of the embedded server.
type db struct {
	server *server.Server
	conn   *nats.Conn
	js     jetstream.JetStream

	jobs, results, logs, tiles           jetstream.Stream
	requests, replays                    jetstream.Stream
	sandboxes                            jetstream.Stream
	nodes, tokens, keys, published       jetstream.KeyValue
	accounts, mails, orders, receiptlogs jetstream.KeyValue

	// failed ends when JetStream can no longer write; its cause is why. fail ends it.
	failed context.Context
	fail   context.CancelCauseFunc
}

// Limits bound what is stored, in bytes.
type Limits struct {
	Jobs    int64 // records of jobs; beyond it no new one is taken: [ErrFull]
	Results int64 // results; beyond it the oldest go, however young
	// Requests is for requests of jobs that are finished; beyond it the oldest go.
	// With 0 none are kept, and those that are there go.
	Requests int64
	Free     int64 // what must be free on the disk; with less no new job is taken: [ErrNoRoom]
}

// DefaultLimits are those of a new store.
var DefaultLimits = Limits{Jobs: 1 << 30, Results: 8 << 30, Free: 256 << 20}

// within returns the limits, but no more than an eighth of a file system for
// jobs, another one for requests, half of it for results, and a tenth of it free.
func (l Limits) within(space int64) Limits {
	return Limits{Jobs: min(l.Jobs, space/8), Results: min(l.Results, space/2), Requests: min(l.Requests, space/8), Free: min(l.Free, space/10)}
}

// Open opens the store in dir, making it when it is not there. One process at
// a time may have it open: [ErrLocked].
func Open(ctx context.Context, dir string, log *slog.Logger) (_ *Store, err error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	s := &Store{
		dir: dir, log: log,
		pending: pending{open: map[uint64]int{}, done: map[uint64]int{}, writing: map[*uint64]struct{}{}},
	}
	defer func() {
		if err != nil {
			s.Close()
		}
	}()
	if s.lock, err = acquire(filepath.Join(dir, "lock")); err != nil {
		return nil, err
	}
	if s.space, err = spaceOf(dir); err != nil {
		return nil, err
	}
	s.room.dir, s.room.free, s.room.keep = dir, freeIn, DefaultLimits.within(s.space).Free
	if s.lost, err = openLost(filepath.Join(dir, "damaged")); err != nil {
		return nil, err
	}
	if err := s.mendAll(); err != nil {
		return nil, err
	}
	d, err := s.start(ctx)
	if err != nil {
		return nil, err
	}
	s.now.Store(d)
	return s, s.loadClients(ctx)
}

// start runs a server over the store's files.
func (s *Store) start(ctx context.Context) (_ *db, err error) {
	d := new(db)
	d.failed, d.fail = context.WithCancelCause(context.Background())
	defer func() {
		if err != nil {
			d.close()
		}
	}()
	d.server, err = server.NewServer(&server.Options{
		ServerName:             "resultity-network",
		DontListen:             true, // reached through InProcessConn only
		JetStream:              true,
		StoreDir:               s.dir,
		SyncAlways:             true,
		JetStreamMaxStore:      1 << 50,             // each stream has a bound of its own, and the disk may have become smaller
		MaxPayload:             maxMessage + 64<<10, // a value and its headers
		NoSigs:                 true,
		NoLog:                  true,
		DisableJetStreamBanner: true,
	})
	if err != nil {
		return nil, fmt.Errorf("store: %w", err)
	}
	d.server.SetLoggerV2(natsLog{s, d}, false, false, false)
	d.server.Start()
	if !d.server.ReadyForConnections(30 * time.Second) {
		return nil, fmt.Errorf("store in %s did not become ready within 30 s; see the log lines before this one", s.dir)
	}
	d.conn, err = nats.Connect("", nats.InProcessServer(d.server), nats.Name("resultity-network"), nats.NoReconnect(),
		nats.ErrorHandler(func(_ *nats.Conn, _ *nats.Subscription, err error) { s.log.Error("store connection", "error", err) }))
	if err != nil {
		return nil, fmt.Errorf("store: %w", err)
	}
	if d.js, err = jetstream.New(d.conn, jetstream.WithDefaultTimeout(opTimeout)); err != nil {
		return nil, err
	}
	if err := d.open(ctx, s.space); err != nil {
		return nil, fmt.Errorf("store in %s: %w", s.dir, err)
	}
	return d, nil
}

// close ends the server and waits until its files are closed. It returns false when that
// takes too long.
func (d *db) close() bool {
	d.fail(errors.New("store is closed"))
	if d.conn != nil {
		d.conn.Close()
	}
	if d.server == nil {
		return true
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		d.server.Shutdown()
		d.server.WaitForShutdown()
	}()
	select {
	case <-done:
		return true
	case <-time.After(closeTimeout):
		return false
	}
}

// closeTimeout is for JetStream to end, with all that it still has to write down.
var closeTimeout = 30 * time.Second // a test shortens it

func (d *db) open(ctx context.Context, space int64) (err error) {
	limits := DefaultLimits.within(space)
	for _, str := range []struct {
		to  *jetstream.Stream
		cfg jetstream.StreamConfig
	}{
		{&d.jobs, jetstream.StreamConfig{
			Name: "JOBS", Description: "jobs that are not finished", Subjects: []string{"jobs.*"},
			MaxAge:      25 * time.Hour, // no job may be given longer than a day
			MaxMsgSize:  maxMessage,
			MaxBytes:    limits.Jobs,
			Discard:     jetstream.DiscardNew,
			AllowDirect: true,
		}},
		{&d.results, jetstream.StreamConfig{
			Name: "RESULTS", Description: "results by job id", Subjects: []string{"results.*"},
			MaxMsgSize:        maxMessage,
			MaxBytes:          limits.Results,
			MaxMsgsPerSubject: 1,
			Discard:           jetstream.DiscardOld,
			AllowDirect:       true,
		}},
		{&d.requests, jetstream.StreamConfig{
			Name: "REQUESTS", Description: "finished jobs that may be given out again, by id", Subjects: []string{"requests.*"},
			MaxMsgSize:        maxMessage,
			MaxBytes:          leastRequest,
			MaxMsgsPerSubject: 1,
			Discard:           jetstream.DiscardOld,
			AllowDirect:       true,
		}},
		{&d.replays, jetstream.StreamConfig{
			Name: "REPLAYS", Description: "what came of giving jobs out again, by id", Subjects: []string{"replays.*"},
			MaxAge: replayAge, MaxMsgsPerSubject: replayEach, MaxMsgSize: maxVerdict,
			MaxBytes:    min(maxReplays, space/32),
			Discard:     jetstream.DiscardOld,
			AllowDirect: true,
		}},
		{&d.logs, jetstream.StreamConfig{
			Name: "LOGS", Description: "logs of nodes, by node", Subjects: []string{"logs.*"},
			MaxAge: logAge, MaxMsgsPerSubject: logBatches, MaxMsgSize: 1 << 20,
			MaxBytes:    min(maxLogs, space/8),
			Discard:     jetstream.DiscardOld,
			AllowDirect: true,
		}},
		{&d.tiles, jetstream.StreamConfig{
			Name: "TILES", Description: "full tiles of nodes' receipt logs, by node, era, level and index", Subjects: []string{"tiles.*.*.*.*"},
			MaxMsgsPerSubject: 1, MaxMsgSize: 64 << 10,
			MaxBytes:    min(maxTiles, space/16),
			Discard:     jetstream.DiscardOld,
			AllowDirect: true,
		}},
		{&d.sandboxes, jetstream.StreamConfig{
			Name: "SANDBOXES", Description: "records of nodes' sandboxes, by node and digest", Subjects: []string{"sandboxes.*.*"},
			MaxMsgsPerSubject: 1, MaxMsgSize: 256 << 10,
			MaxBytes:    min(maxSandboxes, space/16),
			Discard:     jetstream.DiscardOld,
			AllowDirect: true,
		}},
	} {
		if *str.to, err = d.stream(ctx, str.cfg); err != nil {
			return err
		}
	}
	for _, b := range []struct {
		kv         *jetstream.KeyValue
		name, what string
		ttl        time.Duration
	}{
		{&d.nodes, "NODES", "registered nodes by address", 0},
		{&d.tokens, "TOKENS", "enrolment tokens by their SHA-256", 0},
		{&d.keys, "APIKEYS", "API keys by their SHA-256", 0},
		{&d.orders, "ORDERS", "orders to nodes by node and id", 30 * 24 * time.Hour},
		{&d.published, "CONFIGS", "published configurations by digest", 0},
		{&d.accounts, "ACCOUNTS", "accounts of e-mail addresses, by their SHA-256", 0},
		{&d.receiptlogs, "RECEIPTLOGS", "heads and edges of nodes' receipt logs by address", 0},
		{&d.mails, "OUTBOX", "messages that no mail server has taken yet", time.Hour},
	} {
		if *b.kv, err = d.bucket(ctx, jetstream.KeyValueConfig{
			Bucket: b.name, Description: b.what, TTL: b.ttl, MaxValueSize: 2 << 20,
		}); err != nil {
			return err
		}
	}
	return nil
}

// stream makes a stream, or opens it with the age and the size that it was given
// last: those are the snapshot's and the configuration's to decide. One that is as
// it should be is not written to, so that the store opens on a full disk too.
func (d *db) stream(ctx context.Context, cfg jetstream.StreamConfig) (jetstream.Stream, error) {
	old, err := d.js.Stream(ctx, cfg.Name)
	if errors.Is(err, jetstream.ErrStreamNotFound) {
		return d.js.CreateStream(ctx, cfg)
	}
	if err != nil {
		return nil, err
	}
	is := old.CachedInfo().Config
	cfg.MaxAge, cfg.MaxBytes = is.MaxAge, is.MaxBytes
	if is.MaxMsgSize == cfg.MaxMsgSize && is.Discard == cfg.Discard && is.AllowDirect == cfg.AllowDirect &&
		max(is.MaxMsgsPerSubject, 0) == cfg.MaxMsgsPerSubject && slices.Equal(is.Subjects, cfg.Subjects) {
		return old, nil
	}
	return d.js.UpdateStream(ctx, cfg)
}

// bucket is stream for a key-value bucket.
func (d *db) bucket(ctx context.Context, cfg jetstream.KeyValueConfig) (jetstream.KeyValue, error) {
	old, err := d.js.KeyValue(ctx, cfg.Bucket)
	if errors.Is(err, jetstream.ErrBucketNotFound) {
		return d.js.CreateKeyValue(ctx, cfg)
	}
	if err != nil {
		return nil, err
	}
	is, err := old.Status(ctx)
	if err != nil {
		return nil, err
	}
	if is.TTL() == cfg.TTL && is.Config().MaxValueSize == cfg.MaxValueSize {
		return old, nil
	}
	return d.js.UpdateKeyValue(ctx, cfg)
}

// change changes the configuration of a stream.
func (s *Store) change(ctx context.Context, which func(*db) jetstream.Stream, what func(*jetstream.StreamConfig)) error {
	s.streams.Lock()
	defer s.streams.Unlock()
	d := s.now.Load()
	str := which(d)
	old := str.CachedInfo().Config
	cfg := old
	what(&cfg)
	if cfg.MaxAge == old.MaxAge && cfg.MaxBytes == old.MaxBytes {
		return nil
	}
	if _, err := d.js.UpdateStream(ctx, cfg); err != nil {
		return fmt.Errorf("set bounds of %s: %w", cfg.Name, err)
	}
	info, err := str.Info(ctx) // which CachedInfo is from then on
	if err == nil && (info.Config.MaxAge != cfg.MaxAge || info.Config.MaxBytes != cfg.MaxBytes) {
		err = errors.New("they did not change")
	}
	if err != nil {
		return fmt.Errorf("set bounds of %s: %w", cfg.Name, err)
	}
	return nil
}

func jobsOf(d *db) jetstream.Stream      { return d.jobs }
func resultsOf(d *db) jetstream.Stream   { return d.results }
func requestsOf(d *db) jetstream.Stream  { return d.requests }
func tilesOf(d *db) jetstream.Stream     { return d.tiles }
func sandboxesIn(d *db) jetstream.Stream { return d.sandboxes }

// SetLimits sets how much is stored, as far as the file system allows: it
// returns what is in force. Results beyond their limit go at once.
func (s *Store) SetLimits(ctx context.Context, l Limits) (Limits, error) {
	l = l.within(s.space)
	s.room.mu.Lock()
	s.room.keep = l.Free
	s.room.mu.Unlock()
	return l, errors.Join(
		s.change(ctx, jobsOf, func(c *jetstream.StreamConfig) { c.MaxBytes = l.Jobs }),
		s.change(ctx, resultsOf, func(c *jetstream.StreamConfig) { c.MaxBytes = l.Results }),
		s.setRequests(ctx, l.Requests),
	)
}

// SetResultTTL sets how long results are kept, counted from when each was stored,
// and with them their requests, if those are kept, what proves that their receipts
// are in the nodes' logs, and the records of sandboxes that these name.
func (s *Store) SetResultTTL(ctx context.Context, ttl time.Duration) error {
	return errors.Join(
		s.change(ctx, resultsOf, func(c *jetstream.StreamConfig) { c.MaxAge = ttl }),
		s.change(ctx, requestsOf, func(c *jetstream.StreamConfig) { c.MaxAge = ttl }),
		s.change(ctx, tilesOf, func(c *jetstream.StreamConfig) { c.MaxAge = ttl + tileGrace }),
		s.change(ctx, sandboxesIn, func(c *jetstream.StreamConfig) { c.MaxAge = ttl + sandboxGrace }),
	)
}

// Close closes the store and waits until its files are closed. [Store.Run] must
// have returned.
func (s *Store) Close() {
	if d := s.now.Load(); d != nil && !errors.Is(s.Accepting(), errStuck) { // that was waited for already
		well := d.failed.Err() == nil
		if d.close() && well {
			s.closedWell()
		}
	}
	if s.lock != nil {
		_ = s.lock.Close() // gives up the lock; the file itself stays
	}
}

const (
	sweepEvery = time.Second      // between two deletions of finished jobs
	lookEvery  = 10 * time.Second // between two looks at what results went
	guardEvery = 250 * time.Millisecond
)

// Run deletes finished jobs until ctx ends, and then what is left of them. It
// looks after the room on the disk, and opens the files anew after a write error.
// Meanwhile it passes to discarded how many results had to go before their time. It ends
// with an error when JetStream has come to a stand that only another process ends.
func (s *Store) Run(ctx context.Context, log *slog.Logger, discarded func(results uint64)) error {
	tick := time.NewTicker(sweepEvery)
	defer tick.Stop()
	look := time.NewTicker(lookEvery)
	defer look.Stop()
	guard := time.NewTicker(guardEvery)
	defer guard.Stop()
	var seen oldest
	scrubbing, endScrub := context.WithCancel(ctx)
	var scrubber sync.WaitGroup
	scrubber.Go(func() { s.scrub(scrubbing) })
	defer scrubber.Wait()
	defer endScrub()
	s.guard(ctx)
	for {
		select {
		case <-tick.C:
		case <-guard.C:
			s.guard(ctx)
			if err := s.Accepting(); errors.Is(err, errStuck) {
				return fmt.Errorf("%w: the next start mends it", err)
			}
			continue
		case <-look.C:
			s.compare(ctx)
			n, err := s.discarded(ctx, &seen)
			switch {
			case s.Accepting() != nil: // it has been said why
			case err != nil:
				log.Warn("results could not be looked at", "error", err)
			case n > 0:
				log.Warn("results were discarded before their time: they take more room than they may; raise max_results_bytes, or lower limits.result_ttl_s in the published configuration",
					"count", n, "max_bytes", s.now.Load().results.CachedInfo().Config.MaxBytes)
				discarded(n)
			}
			continue
		case <-ctx.Done():
		}
		if err := s.sweep(context.WithoutCancel(ctx)); err != nil && s.Accepting() == nil { // else it has been said why
			log.Error("finished jobs stay in the store for now", "error", err)
		}
		if ctx.Err() != nil {
			return nil
		}
	}
}

// oldest is the oldest result that there was.
type oldest struct {
	seq uint64 // 0 before the first look
	at  time.Time
}

// discarded counts the results that have gone since the last look although the
// oldest of them was younger than results may become.
func (s *Store) discarded(ctx context.Context, seen *oldest) (uint64, error) {
	info, err := s.now.Load().results.Info(ctx)
	if err != nil {
		return 0, err
	}
	was := *seen
	*seen = oldest{info.State.FirstSeq, info.State.FirstTime}
	ttl := info.Config.MaxAge
	if was.seq == 0 || was.at.IsZero() || seen.seq <= was.seq || ttl > 0 && time.Since(was.at) >= ttl {
		return 0, nil
	}
	return seen.seq - was.seq, nil
}

// spaceOf is the size of the file system of a directory, in bytes.
func spaceOf(dir string) (int64, error) {
	var st syscall.Statfs_t
	if err := syscall.Statfs(dir, &st); err != nil {
		return 0, &fs.PathError{Op: "statfs", Path: dir, Err: err}
	}
	return int64(st.Blocks) * st.Bsize, nil
}

// acquire takes the lock file. The kernel drops the lock when the process
// ends, however it ends.
func acquire(name string) (*os.File, error) {
	f, err := os.OpenFile(name, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		_ = f.Close() // nothing was written
		if errors.Is(err, syscall.EWOULDBLOCK) {
			return nil, ErrLocked
		}
		return nil, &fs.PathError{Op: "flock", Path: name, Err: err}
	}
	return f, nil
}

// natsLog passes what the NATS server has to say to our log. Its notices are
// about its own inner life and go to debug.
//
// It is also where a stream says that it has given up: after a failed write
// JetStream does not answer any more, and offers no other sign of it.
type natsLog struct {
	s *Store
	d *db
}

func (l natsLog) put(level slog.Level, format string, v []any) {
	if log := l.s.log; log.Enabled(context.Background(), level) {
		log.Log(context.Background(), level, "store: "+strings.TrimSpace(fmt.Sprintf(format, v...)))
	}
}

func (l natsLog) Noticef(format string, v ...any) { l.put(slog.LevelDebug, format, v) }
func (l natsLog) Debugf(format string, v ...any)  { l.put(slog.LevelDebug, format, v) }
func (l natsLog) Tracef(format string, v ...any)  { l.put(slog.LevelDebug, format, v) }
func (l natsLog) Warnf(format string, v ...any) {
	if strings.HasPrefix(format, "Maximum payloads") { // a choice of ours, see maxMessage
		return
	}
	l.put(slog.LevelWarn, format, v)
	l.watch(format, v)
}
func (l natsLog) Errorf(format string, v ...any) {
	l.put(slog.LevelError, format, v)
	l.watch(format, v)
}
func (l natsLog) Fatalf(format string, v ...any) { l.put(slog.LevelError, format, v) }

func (l natsLog) watch(format string, v []any) {
	said := strings.TrimSpace(fmt.Sprintf(format, v...))
	text := strings.ToLower(said)
	if strings.Contains(text, "critical write error") || strings.Contains(text, "disabling jetstream") || strings.Contains(text, "will be disabled") {
		l.d.fail(fmt.Errorf("%w: %s", ErrFailed, said))
	}
	l.s.heard(l.d, said)
}
