// Package state owns what a node must not forget: the jobs it has accepted, the
// results that the network has not acknowledged, and the registration, of one
// network, in one file.
//
// The rule it keeps: when [Store.Accept], [Store.Finish] or [Store.Ack] has
// returned, a kill or a power cut changes nothing about it. An accepted job is
// unfinished or has exactly one result, never both and never neither.
//
// A full disk is met before a job is accepted, not after: room for the failure
// of every accepted job is allocated in the file ahead of time, so an accepted
// job can always be ended. Results are bounded in number and bytes.
//
// # What is remembered about a job
//
//	nothing ── Accept ──▶ accepted ── Finish ──▶ finished ── Ack, Expire ──▶ settled
//	                                                  └───── a failure ────▶ nothing
//
// A settled id is remembered for a while, so that a node never signs two
// receipts for one job. A failed result carries no receipt: once it is
// acknowledged the network may send the same job again, to this node too.
package state

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"
	"time"

	bolt "go.etcd.io/bbolt"

	"github.com/resultity/node/internal/receipt"
	"github.com/resultity/node/internal/wire"
)

// Errors that a caller acts on.
var (
	// ErrFull says that there is no room: on the disk, or within [Bounds].
	// Nothing was changed; work may go on when results have been acknowledged
	// or the disk has room again.
	ErrFull = errors.New("no room for more jobs")

	// ErrLocked says that another process has the store open.
	ErrLocked = errors.New("another agent is running on this store; stop it first, or give each its own state directory")

	// ErrCorrupt says that the file is not what this package has written.
	ErrCorrupt = errors.New("job store is damaged; stop the agent and move the file away: the agent begins a new one, and what had not been delivered to the network is lost")

	// ErrBroken says that a write has failed halfway, so that nothing more can
	// be written before the store is opened anew.
	ErrBroken = errors.New("job store cannot be written any more; restart the agent")

	// ErrUnknown says that a result belongs to no accepted job.
	ErrUnknown = errors.New("job was not accepted")

	// ErrConflict says that a job has another result already.
	ErrConflict = errors.New("job has another result already")
)

// Known says what the store knew about a job when it was offered.
type Known int

// What can be known.
const (
	New     Known = iota + 1 // not known before; it is accepted now
	Running                  // accepted, no result yet
	Done                     // its result waits for the network's acknowledgement
	Settled                  // its receipt was delivered, or has expired
)

// Bounds limit what a store holds. Zero fields have the value of [DefaultBounds].
type Bounds struct {
	Jobs  int   // accepted jobs and unacknowledged results
	Bytes int64 // of their requests and responses
	IDs   int   // settled ids that are remembered
}

// DefaultBounds hold a day of small results, or a few of the largest.
var DefaultBounds = Bounds{Jobs: 10_000, Bytes: 256 << 20, IDs: 65_536}

// MaxMessage bounds the text of a failed result in bytes. Finish cuts what is
// longer, so that a failure always fits into the room kept for it.
const MaxMessage = 1024

// Store is an open store. Safe for concurrent use.
type Store struct {
	db     *bolt.DB
	file   *os.File // of db; only to allocate room and to look at its size
	bounds Bounds
	now    func() time.Time

	reserve func(fd uintptr, size int64) error // fallocate; a test has none

	mu    sync.Mutex // guards queue, counts; never held while writing
	queue []*change
	count totals // as of the last commit

	writing   sync.Mutex // held for one commit; guards the fields below and change.done
	allocated int64      // bytes of the file that are backed by the disk
	broken    error      // why nothing can be written any more
}

// Counts says what a store holds.
type Counts struct {
	Accepted int   // jobs without a result
	Results  int   // results without an acknowledgement
	Settled  int   // remembered ids
	Bytes    int64 // of requests and responses
}

// Counts returns what the store holds now.
func (s *Store) Counts() Counts {
	s.mu.Lock()
	defer s.mu.Unlock()
	return Counts{Accepted: s.count.accepted, Results: s.count.results, Settled: s.count.settled, Bytes: s.count.bytes}
}

// Close ends the store. Calls that are running finish first.
func (s *Store) Close() error {
	s.writing.Lock()
	defer s.writing.Unlock()
	return s.db.Close()
}

// The buckets of the file. A record lies in a bucket of its own below jobs or
// outbox: bbolt rewrites whole leaves, and so a change of one job never copies
// the requests and responses of its neighbours.
var (
	bucketMeta    = []byte("meta")    // schema, registration
	bucketKnown   = []byte("known")   // job id → entry
	bucketJobs    = []byte("jobs")    // job id → record of the job
	bucketOutbox  = []byte("outbox")  // sequence number of finishing → record of the result
	bucketSettled = []byte("settled") // sequence number of settling → time, job id
	keySchema     = []byte("schema")
	keyRegistered = []byte("registered")
	keyRecord     = []byte("r")
)

// Accept writes a job down unless its id is known. With [New] the job is on
// disk; with any other answer nothing has changed and the caller looks at what
// is there. It fails with [ErrFull] when there is no room.
func (s *Store) Accept(j *wire.Job) (Known, error) {
	rec, err := encodeJob(s.now(), j)
	if err != nil {
		return 0, fmt.Errorf("job %s: %w", j.ID, err)
	}
	var known Known
	err = s.commit(func(tx *bolt.Tx, t *totals) error {
		if e, ok := lookup(tx, j.ID); ok {
			known = e.state
			return nil
		}
		size := int64(len(rec))
		if n := t.accepted + t.results; n >= s.bounds.Jobs {
			return fmt.Errorf("%w: %d of %d are waiting to be finished or acknowledged", ErrFull, n, s.bounds.Jobs)
		}
		if n := t.bytes + size + int64(t.accepted+1)*failureSize; n > s.bounds.Bytes {
			return fmt.Errorf("%w: it would hold %d bytes, at most %d", ErrFull, n, s.bounds.Bytes)
		}
		if err := s.makeRoom(tx, t, size, t.accepted+1); err != nil {
			return err
		}
		t.accepted++
		t.bytes += size
		known = New
		return t.put(
			putEntry(tx, j.ID, entry{state: Running, size: size}),
			putRecord(tx.Bucket(bucketJobs), j.ID[:], rec),
		)
	})
	if err != nil {
		return 0, fmt.Errorf("accept job %s: %w", j.ID, err)
	}
	return known, nil
}

// Finish replaces an accepted job by its result. The same result again is fine;
// another one is [ErrConflict], and a job that was not accepted [ErrUnknown].
// With [ErrFull] the job stays accepted, and a failure (a result with a code)
// can be stored in its place.
func (s *Store) Finish(r *wire.Result) error {
	if r.Code != "" && len(r.Message) > MaxMessage {
		short := *r
		short.Message = r.Message[:MaxMessage]
		r = &short
	}
	rec, err := encodeResult(s.now(), r)
	if err != nil {
		return fmt.Errorf("result of job %s: %w", r.Job, err)
	}
	err = s.commit(func(tx *bolt.Tx, t *totals) error {
		e, ok := lookup(tx, r.Job)
		switch {
		case !ok:
			return ErrUnknown
		case e.state == Done && bytes.Equal(content(getRecord(tx.Bucket(bucketOutbox), number(e.seq))), content(rec)):
			return nil
		case e.state != Running:
			return ErrConflict
		}
		size := int64(len(rec))
		if size > failureSize { // what is smaller has its room already
			if n := t.bytes - e.size + size + int64(t.accepted-1)*failureSize; n > s.bounds.Bytes {
				return fmt.Errorf("%w: it would hold %d bytes, at most %d", ErrFull, n, s.bounds.Bytes)
			}
			if err := s.makeRoom(tx, t, size, t.accepted); err != nil {
				return err
			}
		}
		t.accepted--
		t.results++
		t.bytes += size - e.size
		outbox := tx.Bucket(bucketOutbox)
		seq, err := outbox.NextSequence()
		return t.put(err,
			tx.Bucket(bucketJobs).DeleteBucket(r.Job[:]),
			putRecord(outbox, number(seq), rec),
			putEntry(tx, r.Job, entry{state: Done, receipt: r.Code == "", seq: seq, size: size}),
		)
	})
	if err != nil {
		return fmt.Errorf("finish job %s: %w", r.Job, err)
	}
	return nil
}

// Ack forgets results that the network has stored. Ids that are unknown, not
// finished or settled already are passed over, so it may be repeated.
func (s *Store) Ack(ids []receipt.JobID) error {
	now := s.now()
	// Few at a time: each may touch another page, and a full disk has room for few.
	for few := range slices.Chunk(ids, 16) {
		err := s.commit(func(tx *bolt.Tx, t *totals) error {
			for _, id := range few {
				if e, ok := lookup(tx, id); ok && e.state == Done {
					if err := s.settle(tx, t, id, e, now); err != nil {
						return err
					}
				}
			}
			return nil
		})
		if err != nil {
			return fmt.Errorf("forget %d acknowledged results: %w", len(ids), err)
		}
	}
	return nil
}

// Expire forgets results that have waited for an acknowledgement longer than
// ttl, and ids that were settled longer ago, and returns how many results it
// dropped. Call it only while the clock is known to be right, which an open
// session shows: a clock that jumps ahead would throw results away.
func (s *Store) Expire(ttl time.Duration) (dropped int, err error) {
	now := s.now()
	before := now.Add(-ttl)
	err = s.commit(func(tx *bolt.Tx, t *totals) error {
		dropped = 0
		var old [][]byte // of the bucket outbox, whose order is that of time
		c := tx.Bucket(bucketOutbox).Cursor()
		for k, _ := c.First(); k != nil; k, _ = c.Next() {
			if !recordTime(getRecord(tx.Bucket(bucketOutbox), k)).Before(before) {
				break
			}
			old = append(old, bytes.Clone(k))
		}
		for _, k := range old {
			r, err := decodeResult(getRecord(tx.Bucket(bucketOutbox), k))
			if err != nil {
				return t.put(err)
			}
			e, ok := lookup(tx, r.Job)
			if !ok {
				return t.put(fmt.Errorf("%w: result of job %s is not listed", ErrCorrupt, r.Job))
			}
			if err := s.settle(tx, t, r.Job, e, now); err != nil {
				return err
			}
			dropped++
		}
		return s.forget(tx, t, before)
	})
	if err != nil {
		return 0, fmt.Errorf("drop expired results: %w", err)
	}
	return dropped, nil
}

// settle removes a finished job's result. It leaves the id of one that carried
// a receipt.
func (s *Store) settle(tx *bolt.Tx, t *totals, id receipt.JobID, e entry, now time.Time) error {
	t.results--
	t.bytes -= e.size
	if err := t.put(tx.Bucket(bucketOutbox).DeleteBucket(number(e.seq))); err != nil {
		return err
	}
	if !e.receipt {
		return t.put(tx.Bucket(bucketKnown).Delete(id[:]))
	}
	settled := tx.Bucket(bucketSettled)
	seq, err := settled.NextSequence()
	if err := t.put(err,
		settled.Put(number(seq), append(number(uint64(now.UnixMilli())), id[:]...)),
		putEntry(tx, id, entry{state: Settled, seq: seq}),
	); err != nil {
		return err
	}
	t.settled++
	return s.forget(tx, t, time.Time{})
}

// forget removes the oldest settled ids while there are too many, or while they
// are older than before.
func (s *Store) forget(tx *bolt.Tx, t *totals, before time.Time) error {
	settled := tx.Bucket(bucketSettled)
	for {
		k, v := settled.Cursor().First()
		if k == nil || t.settled <= s.bounds.IDs && !timeOf(v).Before(before) {
			return nil
		}
		id := bytes.Clone(v[8:])
		if err := t.put(settled.Delete(bytes.Clone(k)), tx.Bucket(bucketKnown).Delete(id)); err != nil {
			return err
		}
		t.settled--
	}
}

// Lookup says what is known about a job: [Running], [Done], [Settled], or 0 for
// nothing.
func (s *Store) Lookup(id receipt.JobID) (known Known, err error) {
	err = s.db.View(func(tx *bolt.Tx) error {
		e, _ := lookup(tx, id)
		known = e.state
		return nil
	})
	if err != nil {
		return 0, fmt.Errorf("look up job %s: %w", id, err)
	}
	return known, nil
}

// Unfinished returns the accepted jobs without a result, those with the nearest
// deadline first. It is what a start has to deal with.
func (s *Store) Unfinished() ([]*wire.Job, error) {
	var jobs []*wire.Job
	err := s.db.View(func(tx *bolt.Tx) error {
		b := tx.Bucket(bucketJobs)
		return b.ForEachBucket(func(k []byte) error {
			j, err := decodeJob(getRecord(b, k))
			jobs = append(jobs, j)
			return err
		})
	})
	if err != nil {
		return nil, fmt.Errorf("read accepted jobs: %w", err)
	}
	slices.SortStableFunc(jobs, func(a, b *wire.Job) int { return cmp.Compare(a.Deadline, b.Deadline) })
	return jobs, nil
}

// Outbox calls f with the results whose number is above after, in the order of
// finishing. Numbers rise and are never used twice. It holds one result at a
// time; f may use the store and may take as long as it likes.
func (s *Store) Outbox(after uint64, f func(seq uint64, r *wire.Result) error) error {
	for {
		r, seq, err := s.next(after)
		if err != nil {
			return fmt.Errorf("read result %d of the outbox: %w", seq, err)
		}
		if r == nil {
			return nil
		}
		if err := f(seq, r); err != nil {
			return err
		}
		after = seq
	}
}

func (s *Store) next(after uint64) (r *wire.Result, seq uint64, err error) {
	err = s.db.View(func(tx *bolt.Tx) error {
		b := tx.Bucket(bucketOutbox)
		k, _ := b.Cursor().Seek(number(after + 1))
		if k == nil {
			return nil
		}
		seq = fromNumber(k)
		var err error
		r, err = decodeResult(getRecord(b, k))
		return err
	})
	return r, seq, err
}

// Result returns the unacknowledged result of a job, and false if there is none.
func (s *Store) Result(id receipt.JobID) (r *wire.Result, ok bool, err error) {
	err = s.db.View(func(tx *bolt.Tx) error {
		e, known := lookup(tx, id)
		if !known || e.state != Done {
			return nil
		}
		var err error
		r, err = decodeResult(getRecord(tx.Bucket(bucketOutbox), number(e.seq)))
		ok = err == nil
		return err
	})
	if err != nil {
		return nil, false, fmt.Errorf("read result of job %s: %w", id, err)
	}
	return r, ok, nil
}

// Registration returns what the network answered when the node was registered,
// and nil before that.
func (s *Store) Registration() (r *wire.Registered, err error) {
	err = s.db.View(func(tx *bolt.Tx) error {
		var err error
		r, err = registration(tx)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("read registration: %w", err)
	}
	return r, nil
}

func registration(tx *bolt.Tx) (*wire.Registered, error) {
	b := tx.Bucket(bucketMeta).Get(keyRegistered)
	if b == nil {
		return nil, nil
	}
	r := new(wire.Registered)
	if _, err := decodeRecord(b, r); err != nil {
		return nil, fmt.Errorf("registration: %w", err)
	}
	return r, nil
}

// SetRegistration writes the registration down. A store belongs to the network
// and the node that it was first registered with: another one is refused, since
// the results in it could be delivered to nobody.
func (s *Store) SetRegistration(r *wire.Registered) error {
	b, err := encodeRecord(s.now(), r, nil)
	if err != nil {
		return fmt.Errorf("store registration: %w", err)
	}
	err = s.commit(func(tx *bolt.Tx, t *totals) error {
		old, err := registration(tx)
		switch {
		case err != nil:
			return err
		case old != nil && (old.Network != r.Network || old.Node != r.Node):
			return fmt.Errorf("%s belongs to node %s of network %.80q, not to node %s of %.80q; give each network and each identity its own state directory",
				s.db.Path(), old.Node, old.Network, r.Node, r.Network)
		case old != nil && *old == *r:
			return nil
		}
		if err := s.makeRoom(tx, t, int64(len(b)), t.accepted); err != nil {
			return err
		}
		return t.put(tx.Bucket(bucketMeta).Put(keyRegistered, b))
	})
	if err != nil {
		return fmt.Errorf("store registration: %w", err)
	}
	return nil
}
