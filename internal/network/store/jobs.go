package store

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/resultity/node/internal/failpoint"
	"github.com/resultity/node/internal/receipt"
	"github.com/resultity/node/internal/wire"
)

// Job is a job that is not finished.
type Job struct {
	wire.Job
	Client string `json:"client"` // name of the API key it came with
	// Seq is its place in the store; set by PutJob and Jobs.
	Seq uint64 `json:"-"`
}

// PutJob writes a job down and sets its Seq.
func (s *Store) PutJob(ctx context.Context, j *Job) error {
	b, err := json.Marshal(j)
	if err != nil {
		return err
	}
	ctx, cancel := s.op(ctx)
	defer cancel()
	written := s.pending.begin()
	failpoint.Here("store.job.begin")
	ack, err := s.js.Publish(ctx, "jobs."+j.ID.String(), b, jetstream.WithExpectLastSequencePerSubject(0))
	if err != nil {
		written(0, 0)
		var api *jetstream.APIError
		if errors.As(err, &api) && strings.Contains(api.Description, "maximum bytes exceeded") {
			err = ErrFull
		}
		return fmt.Errorf("write job %s down: %w", j.ID, s.failure(err))
	}
	failpoint.Here("store.job.stored")
	j.Seq = ack.Sequence
	written(j.Seq, len(b))
	return nil
}

// pending knows which jobs in the store are finished. To delete a message
// costs as much as to write it, to delete all below a number costs little more
// than one: so finished jobs are deleted together.
type pending struct {
	mu         sync.Mutex           // guards what follows
	open, done map[uint64]int       // jobs by number, with the size of their record in bytes
	writing    map[*uint64]struct{} // each with a number that the job being written will be above
	highest    uint64
}

// begin notes that a job is about to be written; written says under which
// number it was, or 0, and how large.
func (p *pending) begin() (written func(seq uint64, size int)) {
	p.mu.Lock()
	defer p.mu.Unlock()
	above := p.highest
	p.writing[&above] = struct{}{}
	return func(seq uint64, size int) {
		p.mu.Lock()
		defer p.mu.Unlock()
		delete(p.writing, &above)
		if seq > 0 {
			p.open[seq] = size
			p.highest = max(p.highest, seq)
		}
	}
}

// settled returns the jobs that are done and older than every other one, and
// those that are done and not, with their size in bytes.
func (p *pending) settled() (below, above []uint64, size int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	lowest := uint64(math.MaxUint64) // of the unfinished
	for seq := range p.open {
		lowest = min(lowest, seq)
	}
	for w := range p.writing {
		lowest = min(lowest, *w+1)
	}
	for seq, n := range p.done {
		if seq < lowest {
			below = append(below, seq)
		} else {
			above = append(above, seq)
			size += int64(n)
		}
	}
	return below, above, size
}

func (p *pending) forget(list ...uint64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, seq := range list {
		delete(p.open, seq)
		delete(p.done, seq)
	}
}

// JobDone says that a job has a result. The job is deleted soon.
func (s *Store) JobDone(seq uint64) {
	p := &s.pending
	p.mu.Lock()
	defer p.mu.Unlock()
	p.done[seq] = p.open[seq]
	delete(p.open, seq)
}

// maxDone is how many finished jobs may stay because an older one is not
// finished, and maxDoneShare which part of the room for jobs they may take.
// Beyond it they are deleted one by one.
const (
	maxDone      = 1024
	maxDoneShare = 4
)

// sweep deletes finished jobs.
func (s *Store) sweep(ctx context.Context) error {
	below, above, size := s.pending.settled()
	if len(below) > 0 {
		ctx, cancel := s.op(ctx)
		defer cancel()
		if err := s.jobs.Purge(ctx, jetstream.WithPurgeSequence(slices.Max(below)+1)); err != nil {
			return fmt.Errorf("delete finished jobs: %w", err)
		}
		failpoint.Here("store.jobs.purged")
		s.pending.forget(below...)
	}
	if len(above) > maxDone || size > s.jobs.CachedInfo().Config.MaxBytes/maxDoneShare {
		for _, seq := range above {
			if err := s.DeleteJob(ctx, seq); err != nil {
				return err
			}
		}
	}
	return nil
}

// DeleteJob forgets a job at once. A job that is gone already is no error.
func (s *Store) DeleteJob(ctx context.Context, seq uint64) error {
	ctx, cancel := s.op(ctx)
	defer cancel()
	if err := s.jobs.DeleteMsg(ctx, seq); err != nil {
		if _, gone := s.jobs.GetMsg(ctx, seq); !errors.Is(gone, jetstream.ErrMsgNotFound) {
			return fmt.Errorf("delete job: %w", err)
		}
	}
	failpoint.Here("store.deletion.stored")
	s.pending.forget(seq)
	return nil
}

// Jobs reads every job in the order of their arrival; for start-up. A record
// that cannot be read is passed to bad and left out.
func (s *Store) Jobs(ctx context.Context, bad func(seq uint64, err error)) ([]*Job, error) {
	var jobs []*Job
	for seq := uint64(1); ; seq++ {
		m, err := s.jobs.GetMsg(ctx, seq, jetstream.WithGetMsgSubject("jobs.*")) // the first from seq on
		if errors.Is(err, jetstream.ErrMsgNotFound) {
			return jobs, nil
		}
		if err != nil {
			return nil, fmt.Errorf("read jobs: %w", err)
		}
		seq = m.Sequence
		var j Job
		if err := json.Unmarshal(m.Data, &j); err != nil {
			bad(seq, err)
			continue
		}
		j.Seq = seq
		s.pending.begin()(seq, len(m.Data))
		jobs = append(jobs, &j)
	}
}

// Result is a counted result.
type Result struct {
	Receipt  *receipt.Signed
	Response []byte
	Stored   time.Time
}

// A stored result is the length of the receipt in four bytes, the receipt's
// JSON, then the response's bytes as they are.
func encodeResult(r *receipt.Signed, response []byte) ([]byte, error) {
	b, err := json.Marshal(r)
	if err != nil {
		return nil, err
	}
	out := make([]byte, 4, 4+len(b)+len(response))
	binary.BigEndian.PutUint32(out, uint32(len(b)))
	return append(append(out, b...), response...), nil
}

func decodeResult(b []byte) (*Result, error) {
	if len(b) < 4 {
		return nil, errors.New("stored result is cut short")
	}
	n := uint64(binary.BigEndian.Uint32(b))
	if n > uint64(len(b)-4) {
		return nil, errors.New("stored result is cut short")
	}
	r := &Result{Receipt: new(receipt.Signed), Response: b[4+n:]}
	if err := json.Unmarshal(b[4:4+n], r.Receipt); err != nil {
		return nil, fmt.Errorf("stored result: %w", err)
	}
	return r, nil
}

// PutResult stores the result of a job. The first one stays: [ErrExists].
func (s *Store) PutResult(ctx context.Context, r *receipt.Signed, response []byte) error {
	b, err := encodeResult(r, response)
	if err != nil {
		return err
	}
	ctx, cancel := s.op(ctx)
	defer cancel()
	id := r.Receipt().Job
	failpoint.Here("store.result.begin")
	_, err = s.js.Publish(ctx, "results."+id.String(), b, jetstream.WithExpectLastSequencePerSubject(0))
	var api *jetstream.APIError
	if errors.As(err, &api) && (api.ErrorCode == jetstream.JSErrCodeStreamWrongLastSequence || api.ErrorCode == jetstream.JSErrCodeStreamWrongLastSequenceConstant) {
		return fmt.Errorf("result of job %s: %w", id, ErrExists)
	}
	if err != nil {
		return fmt.Errorf("store result of job %s: %w", id, s.failure(err))
	}
	failpoint.Here("store.result.stored")
	return nil
}

// Result returns the counted result of a job or [ErrNotFound].
func (s *Store) Result(ctx context.Context, id receipt.JobID) (*Result, error) {
	m, err := s.results.GetLastMsgForSubject(ctx, "results."+id.String())
	if errors.Is(err, jetstream.ErrMsgNotFound) {
		return nil, fmt.Errorf("result of job %s: %w", id, ErrNotFound)
	}
	if err != nil {
		return nil, fmt.Errorf("result of job %s: %w", id, err)
	}
	r, err := decodeResult(m.Data)
	if err != nil {
		return nil, err
	}
	r.Stored = m.Time
	return r, nil
}
