package store

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/evm"
	"github.com/resultity/node/internal/failpoint"
	"github.com/resultity/node/internal/sandbox/record"
)

// How much is kept of the records of sandboxes. A node makes one in an hour; one
// that makes more pushes out its own. What all have together is bounded as logs are.
const (
	sandboxesOf  = 4096 // of each node
	maxSandboxes = 4 << 30
	// sandboxGrace is how much longer than results records are kept: a job may begin
	// when its record is two hours old, and its result may come a day later.
	sandboxGrace = 28 * time.Hour
)

func sandboxSubject(node evm.Address, d digest.Digest) string {
	return "sandboxes." + nodeKey(node) + "." + d.Hex()
}

// PutSandbox stores a record. The same one again changes nothing.
func (s *Store) PutSandbox(ctx context.Context, r *record.Signed) error {
	raw, err := json.Marshal(r)
	if err != nil {
		return err
	}
	node := r.Record().Node
	db, ctx, end, err := s.write(ctx, more, len(raw))
	if err != nil {
		return fmt.Errorf("store the sandbox of %s: %w", node, err)
	}
	defer end()
	subject := sandboxSubject(node, r.Digest())
	switch _, err := s.last(ctx, db, db.sandboxes, subject); {
	case err == nil:
		return nil
	case s.lost.of(subject) != nil: // here it is again
	case !errors.Is(err, ErrNotFound):
		return fmt.Errorf("read the sandbox of %s: %w", node, db.failure(err))
	}
	failpoint.Here("store.sandbox.begin")
	if _, err := db.js.Publish(ctx, subject, raw, jetstream.WithExpectLastSequencePerSubject(0)); err != nil {
		return fmt.Errorf("store the sandbox of %s: %w", node, db.failure(err))
	}
	failpoint.Here("store.sandbox.stored")
	if err := s.lost.replaced(subject); err != nil {
		return err
	}
	return s.bound(ctx, db, "sandboxes."+nodeKey(node)+".*", sandboxesOf)
}

// bound deletes the oldest records of a node that has too many.
func (s *Store) bound(ctx context.Context, db *db, subjects string, most int) error {
	info, err := db.sandboxes.Info(ctx, jetstream.WithSubjectFilter(subjects))
	if err != nil {
		return err
	}
	if len(info.State.Subjects) <= most {
		return nil
	}
	return db.sandboxes.Purge(ctx, jetstream.WithPurgeSubject(subjects), jetstream.WithPurgeKeep(uint64(most)))
}

// Sandbox returns a record or [ErrNotFound].
func (s *Store) Sandbox(ctx context.Context, d digest.Digest) (*record.Signed, error) {
	db := s.now.Load()
	m, err := s.last(ctx, db, db.sandboxes, "sandboxes.*."+d.Hex())
	if err != nil {
		return nil, fmt.Errorf("sandbox %s: %w", d, err)
	}
	return record.Open(m.Data)
}
