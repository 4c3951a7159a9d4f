package store

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/resultity/node/internal/digest"
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
	db, ctx, end, err := s.write(ctx, more, len(b))
	if err != nil {
		return fmt.Errorf("write job %s down: %w", j.ID, err)
	}
	defer end()
	written := s.pending.begin()
	failpoint.Here("store.job.begin")
	seq, err := db.publish(ctx, "jobs."+j.ID.String(), b)
	if err != nil {
		written(0, 0)
		var api *jetstream.APIError
		if errors.As(err, &api) && strings.Contains(api.Description, "maximum bytes exceeded") {
			return fmt.Errorf("write job %s down: %w", j.ID, ErrFull)
		}
		if api == nil && !errors.Is(err, ErrExists) { // it said nothing: the job may be there, or come to be
			s.pending.doubt(j.ID)
		}
		return fmt.Errorf("write job %s down: %w", j.ID, db.failure(err))
	}
	failpoint.Here("store.job.stored")
	j.Seq = seq
	written(seq, len(b))
	return nil
}

// publish stores data under a subject that has nothing yet, else [ErrExists], and
// returns its number. It is js.Publish without package json for the usual reply, which took
// as long as all else that happens here.
func (d *db) publish(ctx context.Context, subject string, data []byte) (seq uint64, err error) {
	m, err := d.conn.RequestMsgWithContext(ctx, &nats.Msg{Subject: subject, Data: data, Header: nats.Header{jetstream.ExpectedLastSubjSeqHeader: {"0"}}})
	if err != nil {
		return 0, err
	}
	if _, number, ok := bytes.Cut(m.Data, []byte(`","seq":`)); ok && bytes.HasPrefix(m.Data, []byte(`{"stream":`)) { // not an error
		if seq, err = strconv.ParseUint(strings.TrimSuffix(string(number), "}"), 10, 64); err == nil {
			return seq, nil
		}
	}
	var reply struct {
		Error *jetstream.APIError `json:"error"`
	}
	if err := json.Unmarshal(m.Data, &reply); err != nil || reply.Error == nil {
		return 0, jetstream.ErrInvalidJSAck
	}
	switch reply.Error.ErrorCode {
	case jetstream.JSErrCodeStreamWrongLastSequence, jetstream.JSErrCodeStreamWrongLastSequenceConstant:
		return 0, ErrExists
	}
	return 0, reply.Error
}

// pending knows which jobs in the store are finished. To delete a message
// costs as much as to write it, to delete all below a number costs little more
// than one: so finished jobs are deleted together.
type pending struct {
	mu         sync.Mutex           // guards what follows
	open, done map[uint64]int       // jobs by number, with the size of their record in bytes
	writing    map[*uint64]struct{} // each with a number that the job being written will be above
	highest    uint64
	void       []receipt.JobID // jobs whose writing failed, and may not have
}

// doubt notes a job that may be in the store and must not.
func (p *pending) doubt(id receipt.JobID) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.void = append(p.void, id)
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

// sweep deletes finished jobs, and those that should not be there. The finished
// ones go first: there may be no room for the marks of the others before.
func (s *Store) sweep(ctx context.Context) error {
	return errors.Join(s.deleteDone(ctx), s.voidJobs(ctx))
}

// deleteDone deletes finished jobs.
func (s *Store) deleteDone(ctx context.Context) error {
	below, above, size := s.pending.settled()
	if len(below) > 0 {
		db, ctx, end, err := s.write(ctx, needed, 0)
		if err != nil {
			return fmt.Errorf("delete finished jobs: %w", err)
		}
		defer end()
		if err := db.jobs.Purge(ctx, jetstream.WithPurgeSequence(slices.Max(below)+1)); err != nil {
			return fmt.Errorf("delete finished jobs: %w", db.failure(err))
		}
		failpoint.Here("store.jobs.purged")
		s.pending.forget(below...)
	}
	if len(above) > maxDone || size > s.now.Load().jobs.CachedInfo().Config.MaxBytes/maxDoneShare {
		for _, seq := range above {
			if err := s.DeleteJob(ctx, seq); err != nil {
				return err
			}
		}
	}
	return nil
}

// voidJobs deletes the jobs whose writing failed and may not have. The mark goes
// the way that the job went, so that the job is there before it or never will be.
func (s *Store) voidJobs(ctx context.Context) error {
	s.pending.mu.Lock()
	list := slices.Clone(s.pending.void)
	s.pending.mu.Unlock()
	for _, id := range list {
		if err := s.voidJob(ctx, id); err != nil {
			return fmt.Errorf("delete job %s, whose writing failed: %w", id, err)
		}
		s.pending.mu.Lock()
		s.pending.void = slices.DeleteFunc(s.pending.void, func(v receipt.JobID) bool { return v == id })
		s.pending.mu.Unlock()
	}
	return nil
}

func (s *Store) voidJob(ctx context.Context, id receipt.JobID) error {
	db, ctx, end, err := s.write(ctx, needed, 0)
	if err != nil {
		return err
	}
	defer end()
	subject := "jobs." + id.String()
	if _, err := db.js.Publish(ctx, subject, nil); err != nil {
		return db.failure(err)
	}
	return db.failure(db.jobs.Purge(ctx, jetstream.WithPurgeSubject(subject)))
}

// DeleteJob forgets a job at once. A job that is gone already is no error.
func (s *Store) DeleteJob(ctx context.Context, seq uint64) error {
	db, ctx, end, err := s.write(ctx, needed, 0)
	if err != nil {
		return fmt.Errorf("delete job: %w", err)
	}
	defer end()
	if err := db.jobs.DeleteMsg(ctx, seq); err != nil {
		if _, gone := db.jobs.GetMsg(ctx, seq); !errors.Is(gone, jetstream.ErrMsgNotFound) {
			return fmt.Errorf("delete job: %w", db.failure(err))
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
	db := s.now.Load()
	stream := db.jobs
	for seq := uint64(1); ; seq++ {
		m, err := stream.GetMsg(ctx, seq, jetstream.WithGetMsgSubject("jobs.*")) // the first from seq on
		if errors.Is(err, jetstream.ErrMsgNotFound) {
			return jobs, s.end(ctx, db, stream, "jobs.*", seq)
		}
		if err != nil {
			return nil, fmt.Errorf("read jobs: %w", err)
		}
		seq = m.Sequence
		if len(m.Data) == 0 { // see voidJobs
			if id, err := receipt.ParseJobID(strings.TrimPrefix(m.Subject, "jobs.")); err == nil {
				jobs = slices.DeleteFunc(jobs, func(j *Job) bool { return j.ID == id })
				s.pending.doubt(id)
			}
			continue
		}
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

	// Said is the determinism class that the node had named in its heartbeats when it
	// was given the job, [receipt.Unknown] for none, zero where that is not known any
	// more. The receipt may name another one.
	Said digest.Digest
}

// A stored result is the length of the receipt in four bytes, the receipt's
// JSON, the class that was said in 32 bytes, then the response's bytes as they are.
func encodeResult(r *receipt.Signed, said digest.Digest, response []byte) ([]byte, error) {
	b, err := r.MarshalJSON() // which package json would check and copy once more
	if err != nil {
		return nil, err
	}
	sum := said.Sum()
	out := make([]byte, 4, 4+len(b)+len(sum)+len(response))
	binary.BigEndian.PutUint32(out, uint32(len(b)))
	return append(append(append(out, b...), sum[:]...), response...), nil
}

func decodeResult(b []byte) (*Result, error) {
	if len(b) < 4 {
		return nil, errors.New("stored result is cut short")
	}
	n := uint64(binary.BigEndian.Uint32(b))
	var sum [sha256.Size]byte
	if n+uint64(len(sum)) > uint64(len(b)-4) {
		return nil, errors.New("stored result is cut short")
	}
	rest := b[4+n:]
	rest = rest[copy(sum[:], rest):]
	r := &Result{Receipt: new(receipt.Signed), Response: rest, Said: digest.FromSum(sum)}
	if err := json.Unmarshal(b[4:4+n], r.Receipt); err != nil {
		return nil, fmt.Errorf("stored result: %w", err)
	}
	return r, nil
}

// PutResult stores the result of a job; see [Result] for said. The first one stays:
// [ErrExists].
func (s *Store) PutResult(ctx context.Context, r *receipt.Signed, said digest.Digest, response []byte) error {
	b, err := encodeResult(r, said, response)
	if err != nil {
		return err
	}
	id := r.Receipt().Job
	db, ctx, end, err := s.write(ctx, needed, len(b))
	if err != nil {
		return fmt.Errorf("store result of job %s: %w", id, err)
	}
	defer end()
	failpoint.Here("store.result.begin")
	_, err = db.publish(ctx, "results."+id.String(), b)
	if err != nil {
		return fmt.Errorf("store result of job %s: %w", id, db.failure(err))
	}
	failpoint.Here("store.result.stored")
	return errors.Join(s.lost.replaced("results."+id.String()), s.lost.replaced("jobs."+id.String()))
}

// Result returns the counted result of a job or [ErrNotFound].
func (s *Store) Result(ctx context.Context, id receipt.JobID) (*Result, error) {
	db := s.now.Load()
	m, err := s.last(ctx, db, db.results, "results."+id.String())
	if errors.Is(err, ErrNotFound) {
		if lost := s.lost.check("jobs." + id.String()); lost != nil {
			err = lost // and with the job its result
		}
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
