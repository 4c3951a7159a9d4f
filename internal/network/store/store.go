// Package store owns all that the network service must not forget: jobs that
// are not finished, results, nodes and their bindings, enrolment tokens, API
// keys, accounts, mail to be sent and published configurations, in an embedded
// NATS JetStream.
//
// The rule it keeps: a call that returns without an error is on disk. JetStream
// is told to sync every write before it acknowledges one, and nothing here is
// answered from memory that was not written first. There are no lasting
// consumers: jobs are read once at start-up and afterwards written and deleted
// only, so the cost does not depend on the number of nodes.
package store

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
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
	ErrLocked   = errors.New("another process has the store open; if that is the running service, use its admin socket")
)

// maxMessage bounds one stored value in bytes: a result of 16 MiB and its
// receipt, or a request of 16 MiB in base64, with room to spare. JetStream's
// file store takes a record of 32 MiB at most.
const maxMessage = 30 << 20

// opTimeout bounds one operation of the store. It is far above what a healthy
// disk needs; beyond it the caller is better told.
const opTimeout = 10 * time.Second

// Store is an open store. All methods are safe for concurrent use.
type Store struct {
	lock   *os.File
	server *server.Server
	conn   *nats.Conn
	js     jetstream.JetStream

	jobs, results, logs            jetstream.Stream
	nodes, tokens, keys, published jetstream.KeyValue
	accounts, mails, orders        jetstream.KeyValue

	clients clients
	pending pending

	// failed ends when JetStream can no longer write; its cause is why. fail ends it.
	failed context.Context
	fail   context.CancelCauseFunc

	space   int64      // of the file system, in bytes
	streams sync.Mutex // held while a stream's configuration is changed
}

// Limits bound what is stored, in bytes.
type Limits struct {
	Jobs    int64 // records of jobs; beyond it no new one is taken: [ErrFull]
	Results int64 // results; beyond it the oldest go, however young
}

// DefaultLimits are those of a new store.
var DefaultLimits = Limits{Jobs: 1 << 30, Results: 8 << 30}

// within returns the limits, but no more than an eighth of a file system for
// jobs and half of it for results.
func (l Limits) within(space int64) Limits {
	return Limits{Jobs: min(l.Jobs, space/8), Results: min(l.Results, space/2)}
}

// Open opens the store in dir, making it when it is not there. One process at
// a time may have it open: [ErrLocked].
func Open(ctx context.Context, dir string, log *slog.Logger) (_ *Store, err error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	s := &Store{pending: pending{open: map[uint64]int{}, done: map[uint64]int{}, writing: map[*uint64]struct{}{}}}
	s.failed, s.fail = context.WithCancelCause(context.Background())
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
	s.server, err = server.NewServer(&server.Options{
		ServerName:             "resultity-network",
		DontListen:             true, // reached through InProcessConn only
		JetStream:              true,
		StoreDir:               dir,
		SyncAlways:             true,
		JetStreamMaxStore:      s.space,             // each stream has a bound of its own
		MaxPayload:             maxMessage + 64<<10, // a value and its headers
		NoSigs:                 true,
		NoLog:                  true,
		DisableJetStreamBanner: true,
	})
	if err != nil {
		return nil, fmt.Errorf("store: %w", err)
	}
	s.server.SetLoggerV2(natsLog{log, s.fail}, false, false, false)
	s.server.Start()
	if !s.server.ReadyForConnections(30 * time.Second) {
		return nil, fmt.Errorf("store in %s did not become ready within 30 s; see the log lines before this one", dir)
	}
	s.conn, err = nats.Connect("", nats.InProcessServer(s.server), nats.Name("resultity-network"), nats.NoReconnect(),
		nats.ErrorHandler(func(_ *nats.Conn, _ *nats.Subscription, err error) { log.Error("store connection", "error", err) }))
	if err != nil {
		return nil, fmt.Errorf("store: %w", err)
	}
	if s.js, err = jetstream.New(s.conn, jetstream.WithDefaultTimeout(opTimeout)); err != nil {
		return nil, err
	}
	if err := s.open(ctx); err != nil {
		return nil, fmt.Errorf("store in %s: %w", dir, err)
	}
	return s, nil
}

func (s *Store) open(ctx context.Context) (err error) {
	limits := DefaultLimits.within(s.space)
	if s.jobs, err = s.stream(ctx, jetstream.StreamConfig{
		Name: "JOBS", Description: "jobs that are not finished", Subjects: []string{"jobs.*"},
		MaxAge:      25 * time.Hour, // no job may be given longer than a day
		MaxMsgSize:  maxMessage,
		MaxBytes:    limits.Jobs,
		Discard:     jetstream.DiscardNew,
		AllowDirect: true,
	}); err != nil {
		return err
	}
	if s.results, err = s.stream(ctx, jetstream.StreamConfig{
		Name: "RESULTS", Description: "results by job id", Subjects: []string{"results.*"},
		MaxMsgSize:        maxMessage,
		MaxBytes:          limits.Results,
		MaxMsgsPerSubject: 1,
		Discard:           jetstream.DiscardOld,
		AllowDirect:       true,
	}); err != nil {
		return err
	}
	if s.logs, err = s.js.CreateOrUpdateStream(ctx, jetstream.StreamConfig{
		Name: "LOGS", Description: "logs of nodes, by node", Subjects: []string{"logs.*"},
		MaxAge: logAge, MaxMsgsPerSubject: logBatches, MaxMsgSize: 1 << 20,
		MaxBytes:    min(maxLogs, s.space/8),
		Discard:     jetstream.DiscardOld,
		AllowDirect: true,
	}); err != nil {
		return err
	}
	for _, b := range []struct {
		kv         *jetstream.KeyValue
		name, what string
		ttl        time.Duration
	}{
		{&s.nodes, "NODES", "registered nodes by address", 0},
		{&s.tokens, "TOKENS", "enrolment tokens by their SHA-256", 0},
		{&s.keys, "APIKEYS", "API keys by their SHA-256", 0},
		{&s.orders, "ORDERS", "orders to nodes by node and id", 30 * 24 * time.Hour},
		{&s.published, "CONFIGS", "published configurations by digest", 0},
		{&s.accounts, "ACCOUNTS", "accounts of e-mail addresses, by their SHA-256", 0},
		{&s.mails, "OUTBOX", "messages that no mail server has taken yet", time.Hour},
	} {
		if *b.kv, err = s.js.CreateOrUpdateKeyValue(ctx, jetstream.KeyValueConfig{
			Bucket: b.name, Description: b.what, TTL: b.ttl, MaxValueSize: 2 << 20,
		}); err != nil {
			return err
		}
	}
	return s.loadClients(ctx)
}

// stream makes a stream, or opens it with the age and the size that it was given
// last: those are the snapshot's and the configuration's to decide.
func (s *Store) stream(ctx context.Context, cfg jetstream.StreamConfig) (jetstream.Stream, error) {
	if old, err := s.js.Stream(ctx, cfg.Name); err == nil {
		cfg.MaxAge, cfg.MaxBytes = old.CachedInfo().Config.MaxAge, old.CachedInfo().Config.MaxBytes
	} else if !errors.Is(err, jetstream.ErrStreamNotFound) {
		return nil, err
	}
	return s.js.CreateOrUpdateStream(ctx, cfg)
}

// change changes the configuration of a stream.
func (s *Store) change(ctx context.Context, str jetstream.Stream, what func(*jetstream.StreamConfig)) error {
	s.streams.Lock()
	defer s.streams.Unlock()
	old := str.CachedInfo().Config
	cfg := old
	what(&cfg)
	if cfg.MaxAge == old.MaxAge && cfg.MaxBytes == old.MaxBytes {
		return nil
	}
	if _, err := s.js.UpdateStream(ctx, cfg); err != nil {
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

// SetLimits sets how much is stored, as far as the file system allows: it
// returns what is in force. Results beyond their limit go at once.
func (s *Store) SetLimits(ctx context.Context, l Limits) (Limits, error) {
	l = l.within(s.space)
	return l, errors.Join(
		s.change(ctx, s.jobs, func(c *jetstream.StreamConfig) { c.MaxBytes = l.Jobs }),
		s.change(ctx, s.results, func(c *jetstream.StreamConfig) { c.MaxBytes = l.Results }),
	)
}

// SetResultTTL sets how long results are kept, counted from when each was stored.
func (s *Store) SetResultTTL(ctx context.Context, ttl time.Duration) error {
	return s.change(ctx, s.results, func(c *jetstream.StreamConfig) { c.MaxAge = ttl })
}

// Close closes the store and waits until its files are closed.
func (s *Store) Close() {
	s.fail(errors.New("store is closed"))
	if s.conn != nil {
		s.conn.Close()
	}
	if s.server != nil {
		s.server.Shutdown()
		s.server.WaitForShutdown()
	}
	if s.lock != nil {
		_ = s.lock.Close() // gives up the lock; the file itself stays
	}
}

const (
	sweepEvery = time.Second      // between two deletions of finished jobs
	lookEvery  = 10 * time.Second // between two looks at what results went
)

// Run deletes finished jobs until ctx ends, and then what is left of them.
// Meanwhile it passes to discarded how many results had to go before their time.
func (s *Store) Run(ctx context.Context, log *slog.Logger, discarded func(results uint64)) error {
	tick := time.NewTicker(sweepEvery)
	defer tick.Stop()
	look := time.NewTicker(lookEvery)
	defer look.Stop()
	var seen oldest
	for {
		select {
		case <-tick.C:
		case <-look.C:
			n, err := s.discarded(ctx, &seen)
			switch {
			case err != nil:
				log.Warn("results could not be looked at", "error", err)
			case n > 0:
				log.Warn("results were discarded before their time: they take more room than they may; raise max_results_bytes, or lower limits.result_ttl_s in the published configuration",
					"count", n, "max_bytes", s.results.CachedInfo().Config.MaxBytes)
				discarded(n)
			}
			continue
		case <-ctx.Done():
		}
		if err := s.sweep(context.WithoutCancel(ctx)); err != nil {
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
	info, err := s.results.Info(ctx)
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

// ErrFailed says that JetStream has stopped writing after an error of the disk.
// It does not begin again by itself, even when there is room again: the process
// has to.
var ErrFailed = errors.New("store has stopped after a write error; make room on its disk")

// Healthy fails when the store can no longer write.
func (s *Store) Healthy() error {
	switch {
	case s.failed.Err() != nil:
		return context.Cause(s.failed)
	case !s.server.JetStreamEnabled() || !s.conn.IsConnected():
		return ErrFailed
	}
	return nil
}

// op bounds one operation, by time and by the store's health.
func (s *Store) op(ctx context.Context) (context.Context, func()) {
	ctx, cancel := context.WithTimeout(ctx, opTimeout)
	stop := context.AfterFunc(s.failed, cancel)
	return ctx, func() { stop(); cancel() }
}

// failure adds why an operation failed, when that is the store's own state.
func (s *Store) failure(err error) error {
	if err != nil && s.failed.Err() != nil {
		return fmt.Errorf("%w: %w", context.Cause(s.failed), err)
	}
	return err
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
	log  *slog.Logger
	fail context.CancelCauseFunc
}

func (l natsLog) put(level slog.Level, format string, v []any) {
	if l.log.Enabled(context.Background(), level) {
		l.log.Log(context.Background(), level, "store: "+strings.TrimSpace(fmt.Sprintf(format, v...)))
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
}
func (l natsLog) Errorf(format string, v ...any) {
	l.put(slog.LevelError, format, v)
	if strings.Contains(strings.ToLower(format), "critical write error") {
		l.fail(fmt.Errorf("%w (%s)", ErrFailed, strings.TrimSpace(fmt.Sprintf(format, v...))))
	}
}
func (l natsLog) Fatalf(format string, v ...any) { l.put(slog.LevelError, format, v) }
