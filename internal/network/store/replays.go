package store

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/resultity/node/internal/failpoint"
	"github.com/resultity/node/internal/receipt"
)

// What is kept so that a job can be given out again: the requests of finished jobs,
// if the operator wants that, and what came of it. Nothing else rests on either.

const (
	replayAge    = 30 * 24 * time.Hour
	replayEach   = 16       // of one job
	maxReplays   = 64 << 20 // bytes of all
	maxVerdict   = 64 << 10 // bytes of one
	leastRequest = 1 << 20  // bytes; a stream without a bound is one without end
)

// KeepRequest keeps the job of a result that is stored, where requests are kept, and
// once. The oldest go first.
func (s *Store) KeepRequest(ctx context.Context, j *Job) error {
	s.room.mu.Lock()
	most := s.room.requests
	s.room.mu.Unlock()
	if most == 0 {
		return nil
	}
	b, err := json.Marshal(j)
	if err != nil {
		return err
	}
	if int64(len(b)) > most {
		return nil // all others would go for it, and then it
	}
	db, ctx, end, err := s.write(ctx, more, len(b))
	if err != nil {
		return fmt.Errorf("keep the request of job %s: %w", j.ID, err)
	}
	defer end()
	failpoint.Here("store.request.begin")
	if _, err := db.publish(ctx, "requests."+j.ID.String(), b); err != nil && !errors.Is(err, ErrExists) { // the service may have been killed since
		return fmt.Errorf("keep the request of job %s: %w", j.ID, db.failure(err))
	}
	failpoint.Here("store.request.stored")
	return nil
}

// Request returns a job that was kept, or [ErrNotFound].
func (s *Store) Request(ctx context.Context, id receipt.JobID) (*Job, error) {
	db := s.now.Load()
	m, err := s.last(ctx, db, db.requests, "requests."+id.String())
	j := new(Job)
	if err == nil {
		err = json.Unmarshal(m.Data, j)
	}
	if err != nil {
		return nil, fmt.Errorf("request of job %s: %w", id, err)
	}
	return j, nil
}

// setRequests bounds the requests that are kept, in bytes; with 0 those that are
// there go, too.
func (s *Store) setRequests(ctx context.Context, most int64) error {
	if most > 0 {
		most = max(most, leastRequest)
	}
	s.room.mu.Lock()
	s.room.requests = most
	s.room.mu.Unlock()
	if most > 0 {
		return s.change(ctx, requestsOf, func(c *jetstream.StreamConfig) { c.MaxBytes = most })
	}
	stream := requestsOf(s.now.Load())
	if stream.CachedInfo().State.Msgs == 0 {
		return nil
	}
	db, ctx, end, err := s.write(ctx, needed, 0)
	if err == nil {
		defer end()
		err = db.failure(db.requests.Purge(ctx))
	}
	if err != nil { // a full disk is no reason not to start
		s.log.Error("the requests that were kept could not be deleted; the next start tries again", "error", err)
	}
	return nil
}

// PutReplay stores what came of giving a job out again.
func (s *Store) PutReplay(ctx context.Context, id receipt.JobID, verdict []byte) error {
	db, ctx, end, err := s.write(ctx, needed, len(verdict))
	if err != nil {
		return fmt.Errorf("store the replay of job %s: %w", id, err)
	}
	defer end()
	if _, err := db.js.Publish(ctx, "replays."+id.String(), verdict); err != nil {
		return fmt.Errorf("store the replay of job %s: %w", id, db.failure(err))
	}
	return nil
}

// Replays passes what is stored of replays to f, in the order of their ends.
func (s *Store) Replays(ctx context.Context, f func(verdict []byte) error) error {
	db := s.now.Load()
	stream := db.replays
	for seq := uint64(1); ; seq++ {
		m, err := stream.GetMsg(ctx, seq, jetstream.WithGetMsgSubject("replays.*")) // the first from seq on
		if errors.Is(err, jetstream.ErrMsgNotFound) {
			return s.end(ctx, db, stream, "replays.*", seq)
		}
		if err != nil {
			return fmt.Errorf("read replays: %w", err)
		}
		seq = m.Sequence
		if err := f(m.Data); err != nil {
			return err
		}
	}
}
