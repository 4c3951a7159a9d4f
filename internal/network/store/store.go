// Package store owns all that the network service must not forget: jobs that
// are not finished, results, nodes, enrolment tokens, API keys and published
// configurations, in an embedded NATS JetStream.
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

	jobs, results                  jetstream.Stream
	nodes, tokens, keys, published jetstream.KeyValue

	clients clients
	pending pending

	// failed ends when JetStream can no longer write; its cause is why. fail ends it.
	failed context.Context
	fail   context.CancelCauseFunc

	ttlMu sync.Mutex // held while the results' age is changed
}

// Open opens the store in dir, making it when it is not there. One process at
// a time may have it open: [ErrLocked].
func Open(ctx context.Context, dir string, log *slog.Logger) (_ *Store, err error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	s := &Store{pending: pending{open: map[uint64]struct{}{}, done: map[uint64]struct{}{}, writing: map[*uint64]struct{}{}}}
	s.failed, s.fail = context.WithCancelCause(context.Background())
	defer func() {
		if err != nil {
			s.Close()
		}
	}()
	if s.lock, err = acquire(filepath.Join(dir, "lock")); err != nil {
		return nil, err
	}
	s.server, err = server.NewServer(&server.Options{
		ServerName:             "resultity-network",
		DontListen:             true, // reached through InProcessConn only
		JetStream:              true,
		StoreDir:               dir,
		SyncAlways:             true,
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
	if s.jobs, err = s.js.CreateOrUpdateStream(ctx, jetstream.StreamConfig{
		Name: "JOBS", Description: "jobs that are not finished", Subjects: []string{"jobs.*"},
		MaxAge:      25 * time.Hour, // no job may be given longer than a day
		MaxMsgSize:  maxMessage,
		Discard:     jetstream.DiscardNew,
		AllowDirect: true,
	}); err != nil {
		return err
	}
	// The age of results is the snapshot's to decide; keep what is there.
	cfg := jetstream.StreamConfig{
		Name: "RESULTS", Description: "results by job id", Subjects: []string{"results.*"},
		MaxMsgSize:        maxMessage,
		MaxMsgsPerSubject: 1, Discard: jetstream.DiscardNew, DiscardNewPerSubject: true, // the first one stays
		AllowDirect: true,
	}
	if old, err := s.js.Stream(ctx, cfg.Name); err == nil {
		cfg.MaxAge = old.CachedInfo().Config.MaxAge
	} else if !errors.Is(err, jetstream.ErrStreamNotFound) {
		return err
	}
	if s.results, err = s.js.CreateOrUpdateStream(ctx, cfg); err != nil {
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
		{&s.published, "CONFIGS", "published configurations by digest", 0},
	} {
		if *b.kv, err = s.js.CreateOrUpdateKeyValue(ctx, jetstream.KeyValueConfig{
			Bucket: b.name, Description: b.what, TTL: b.ttl, MaxValueSize: 2 << 20,
		}); err != nil {
			return err
		}
	}
	return s.loadClients(ctx)
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

// sweepEvery is how often finished jobs are deleted.
const sweepEvery = time.Second

// Run deletes finished jobs until ctx ends, and then what is left of them.
func (s *Store) Run(ctx context.Context, log *slog.Logger) error {
	tick := time.NewTicker(sweepEvery)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
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

// acquire takes the lock file. The kernel drops the lock when the process
// ends, however it ends.
func acquire(name string) (*os.File, error) {
	f, err := os.OpenFile(name, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		_ = f.Close()
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
