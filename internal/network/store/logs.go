package store

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/resultity/node/internal/evm"
	"github.com/resultity/node/internal/failpoint"
	"github.com/resultity/node/internal/wire"
)

// How much of each node's log is kept. A node that sends more pushes out its own.
// What all have together is bounded too, by an eighth of the file system at most,
// so that logs never take the room of results: the oldest go first.
const (
	logAge     = 30 * 24 * time.Hour
	logBatches = 64 // of at most wire.MaxLogBatch
	maxLogs    = 4 << 30
)

// Logs is a batch of a node's log, as it came.
type Logs struct {
	Logs     *wire.Logs `json:"logs"`
	Received time.Time  `json:"received"`
}

func logSubject(a evm.Address) string { return "logs." + nodeKey(a) }

// PutLogs stores a batch that follows what is stored of its spool, and returns
// the position up to which there is everything then. One that begins before that
// is not stored. So a record is stored once, however often it is sent.
func (s *Store) PutLogs(ctx context.Context, b *wire.LogBatch, l *wire.Logs) (position uint64, err error) {
	db, ctx, end, err := s.write(ctx, more, len(l.Body)+len(l.Data))
	if err != nil {
		return 0, fmt.Errorf("store logs of %s: %w", b.Node, err)
	}
	defer end()
	subject, seq := logSubject(b.Node), uint64(0)
	last, err := s.last(ctx, db, db.logs, subject)
	switch {
	case errors.Is(err, ErrNotFound):
	case errors.Is(err, ErrDamaged) && s.lost.of(subject) != nil: // it has been said
	case err != nil:
		return 0, fmt.Errorf("read the last logs of %s: %w", b.Node, db.failure(err))
	default:
		_, old, err := decodeLogs(last.Data)
		if err != nil {
			return 0, err
		}
		if old.Spool == b.Spool && b.After < old.Last {
			return old.Last, nil
		}
		seq = last.Sequence
	}
	raw, err := json.Marshal(Logs{l, time.Now().UTC()})
	if err != nil {
		return 0, err
	}
	failpoint.Here("store.logs.begin")
	// Another session of the node may be at the same.
	if _, err := db.js.Publish(ctx, subject, raw, jetstream.WithExpectLastSequencePerSubject(seq)); err != nil {
		return 0, fmt.Errorf("store logs of %s: %w", b.Node, db.failure(err))
	}
	failpoint.Here("store.logs.stored")
	if err := s.lost.replaced(subject); err != nil {
		return 0, err
	}
	return b.Last, nil
}

func decodeLogs(raw []byte) (*Logs, *wire.LogBatch, error) {
	var l Logs
	if err := json.Unmarshal(raw, &l); err != nil || l.Logs == nil {
		return nil, nil, fmt.Errorf("stored logs: %w", errors.Join(err, errors.New("cannot be read")))
	}
	b, _, err := l.Logs.Open()
	return &l, b, err
}

// ReadLogs passes the stored batches to f, in the order of their arrival; those of
// one node, or of all for nil, and not those that arrived before since.
func (s *Store) ReadLogs(ctx context.Context, node *evm.Address, since time.Time, f func(*Logs, *wire.LogBatch) error) error {
	subject := "logs.*"
	if node != nil {
		subject = logSubject(*node)
	}
	db := s.now.Load()
	stream := db.logs
	for seq := uint64(1); ; seq++ {
		m, err := stream.GetMsg(ctx, seq, jetstream.WithGetMsgSubject(subject)) // the first from seq on
		if errors.Is(err, jetstream.ErrMsgNotFound) {
			return s.end(ctx, db, stream, subject, seq)
		}
		if err != nil {
			return fmt.Errorf("read logs: %w", err)
		}
		seq = m.Sequence
		if m.Time.Before(since) {
			continue
		}
		l, b, err := decodeLogs(m.Data)
		if err == nil {
			err = f(l, b)
		}
		if err != nil {
			return err
		}
	}
}
