// Package state owns what a node must not forget: the jobs it has accepted, the
// results that the network has not acknowledged, the log of its receipts, and the
// registration, of one network, in one directory.
//
// The rule it keeps: when [Store.Accept] or [Store.Finish] has returned, a kill
// or a power cut changes nothing about it. An accepted job is unfinished or has
// exactly one result, never both and never neither. A receipt is in the log if
// and only if its result is durable, once, in the order in which results became so.
//
// A full disk is met before a job is accepted, not after: room for the failure
// of every accepted job is set aside ahead of time, so an accepted job can
// always be ended. Results are bounded in number and bytes.
//
// # Without the network
//
// No new jobs come then, so that what gathers is what was accepted before, and
// days change nothing. Only a network that gives jobs and takes no results fills
// the store; at its bound Accept fails with [ErrFull], by which the network learns
// to ask another node, and Finish takes a failure in the place of a result that
// there is no room for. The oldest result is never given up for a newer one.
//
// # What is remembered about a job
//
//	nothing ── Accept ──▶ accepted ── Finish ──▶ finished ── Ack, Expire ──▶ settled
//	                                                  └───── a failure ────▶ nothing
//
// A settled id is remembered for a while, so that a node never signs two
// receipts for one job. A failed result carries no receipt: once it is
// acknowledged the network may send the same job again, to this node too.
//
// Acknowledgements wait for nothing and are written with the next commit, or a
// moment later. A crash may lose one. Then the job is finished again, as it was
// before: its result is sent once more, the network acknowledges it once more,
// and all the while the job is known, so that no second receipt comes to be.
//
// The receipt log grows with each result that carries a receipt, whatever becomes
// of the result. Of its leaves the last ones are kept, for a network that has lost
// some; of those before, what is needed to append. A store that is begun anew has
// an empty log, until [Store.RestoreLog] has it go on from the network's copy.
//
// # On disk
//
// A log in segments, one sync for all who commit at once; see log.go for its
// form. In memory are some hundred bytes for each job and none of its text.
// Open reads the whole log. What a crash has torn off at its end is what nobody
// was told of; any other damage it puts right, or sets aside, and says what is
// lost: see salvage.go and [Store.Salvage]. No damage needs a hand.
//
// One kind of damage looks like a crash: what reaches to the end of the log, where
// that was not closed, and is more than one byte. Open then drops that. To tell the two
// apart would take a second sync for each commit. A store that was closed has a mark as
// its last commit, so that nothing is lost with it.
//
// Apart from all this are the last jobs with their answers that an operator may
// have kept to run them again, see [Kept].
package state

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/resultity/node/internal/evm"
	"github.com/resultity/node/internal/failpoint"
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

	// ErrCorrupt says that files, or records, are not what this package has written, in a way
	// that no disk does by itself: they are of different times, or nothing is a directory.
	ErrCorrupt = errors.New("job store is damaged; stop the agent and move its directory away: the agent begins a new one, and what had not been delivered to the network is lost")

	// ErrFormat says that another version of this package has written the files.
	ErrFormat = errors.New("job store is of another version; use the agent that wrote it, or move its directory away: the agent begins a new one, and what had not been delivered to the network is lost")

	// ErrBroken says that a write or a sync has failed, so that it is not known
	// what the disk holds, and nothing can be written before the store is opened
	// anew.
	ErrBroken = errors.New("job store cannot be written any more; restart the agent")

	// ErrUnknown says that a result belongs to no accepted job.
	ErrUnknown = errors.New("job was not accepted")

	// ErrConflict says that a job has another result already.
	ErrConflict = errors.New("job has another result already")
)

// Known says what the store knew about a job when it was offered.
type Known uint8

// What can be known.
const (
	New       Known = iota + 1 // not known before; it is accepted now
	Running                    // accepted, no result yet
	Done                       // its result waits for the network's acknowledgement
	Settled                    // its receipt was delivered, or has expired
	Forgotten                  // damage has taken what was known of jobs of its time
)

// Bounds limit what a store holds. Zero fields have the value of [DefaultBounds].
type Bounds struct {
	Jobs   int   // accepted jobs and unacknowledged results
	Bytes  int64 // of their requests and responses
	IDs    int   // settled ids that are remembered
	Leaves int   // of the receipt log that are kept; a store is not opened with more than before
}

// DefaultBounds hold a day of small results, or a few of the largest, and no more leaves
// than may be sent before a head.
var DefaultBounds = Bounds{Jobs: 10_000, Bytes: 256 << 20, IDs: 65_536, Leaves: wire.MaxPending}

// MaxMessage bounds the text of a failed result in bytes. Finish cuts what is
// longer, so that a failure always fits into the room kept for it.
const MaxMessage = 1024

// maxRegistration bounds a registration, which is in the head of each segment.
const maxRegistration = 3 << 10

// ackDelay is how long an acknowledgement waits for a commit to go with.
const ackDelay = 200 * time.Millisecond

// Store is an open store. Safe for concurrent use.
type Store struct {
	path        string
	disk        disk
	lock        *os.File
	bounds      Bounds
	now         func() time.Time
	segmentSize int64
	leafOf      func(*wire.Result) (evm.Hash, bool) // [receiptLeaf]

	mu                                 sync.Mutex // guards what follows; never held over the disk
	queue                              []*change
	leading                            bool // somebody writes
	jobs                               map[receipt.JobID]entry
	outbox                             queue     // results in the order of finishing
	settled                            queue     // ids in the order of settling
	acks                               []verdict // not written yet
	ackTimer                           *time.Timer
	ackDue                             bool // it runs
	count                              Counts
	tree                               tree // the receipt log
	registered                         *wire.Registered
	lastResult, lastSettled, forgotten uint64
	broken                             error // why nothing can be written any more
	closed                             bool

	// Of whoever writes; the lists change with mu held.
	segments  []*segment // oldest first; the last one is written to
	spares    []spare
	lastSpare int
	nextFrame uint64
	frame     []byte // room for the next one
	lastFrame int64  // of the last segment as it was opened: where its last frame begins
	cleaning  bool

	reading sync.RWMutex // held by readers of segments; before mu

	// Set while the store is opened.
	found      *Salvage
	blind      int64 // Unix milliseconds: of jobs made up to then something may be lost
	unrepaired bool  // what is lost is still in its place: nothing is given back
}

// entry is what is known of a job.
type entry struct {
	num     uint64 // of Done: of finishing; of Settled: of settling
	seg     uint64 // number of the segment it lies in; 0 for one that is not written yet
	at      uint32 // of its text there
	size    uint32 // of the text
	state   Known  // 0: nothing is known
	receipt bool   // of Done: the result carries a receipt
}

// verdict is a record about acknowledgements.
type verdict struct {
	kind kind // settled, dropped, forget, acked, blind
	item
}

var errClosed = errors.New("job store is closed")

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
	return s.count
}

// Close ends the store. Calls that are running finish first.
func (s *Store) Close() error {
	failpoint.Here("state.close.begin")
	err := s.commit(func(b *batch) error {
		// The mark says to the next start that all before it was synced. It can
		// do without, where there is no room.
		if b.room(0, -1) == nil {
			b.put(kindClosed)
		}
		b.closed = true
		return nil
	})
	if errors.Is(err, errClosed) {
		return err
	}
	s.mu.Lock()
	s.closed = true
	if s.ackTimer != nil {
		s.ackTimer.Stop()
	}
	s.mu.Unlock()
	s.closeFiles()
	if err != nil {
		return fmt.Errorf("close job store: %w", err)
	}
	return nil
}

// closeFiles gives everything back. All content was synced.
func (s *Store) closeFiles() {
	s.reading.Lock()
	defer s.reading.Unlock()
	for _, g := range s.segments {
		if g.f != nil {
			_ = g.f.Close()
		}
	}
	for _, f := range s.spares {
		_ = f.f.Close()
	}
	if s.lock != nil {
		_ = s.lock.Close()
	}
}

// weigh counts a job's record for its segment, or, with -1, no longer. The
// caller holds mu.
func (s *Store) weigh(e entry, sign int64) {
	if e.seg < s.segments[0].Number {
		return
	}
	n := int64(itemSize)
	if e.state != Settled {
		n = int64(e.size) + recordHead + resultPrefix
	}
	s.segments[e.seg-s.segments[0].Number].live += sign * n
}

// Accept writes a job down unless its id is known. With [New] the job is on
// disk; with any other answer nothing has changed and the caller looks at what
// is there; what comes again of a time of which something was lost is [Forgotten]. It
// fails with [ErrFull] when there is no room.
func (s *Store) Accept(j *wire.Job) (Known, error) {
	text, err := encodeJob(s.now(), j)
	if err != nil {
		return 0, fmt.Errorf("job %s: %w", j.ID, err)
	}
	var known Known
	failpoint.Here("state.accept.begin")
	err = s.commit(func(b *batch) error {
		if known = b.lookup(j.ID).state; known != 0 {
			return nil
		}
		if s.forgot(j) {
			known = Forgotten
			return nil
		}
		size := int64(len(text))
		accepted, results := s.count.Accepted+b.accepted, s.count.Results+b.results
		if n := accepted + results; n >= s.bounds.Jobs {
			return fmt.Errorf("%w: %d of %d are waiting to be finished or acknowledged", ErrFull, n, s.bounds.Jobs)
		}
		if n := s.count.Bytes + b.bytes + size + int64(accepted+1)*failureSize; n > s.bounds.Bytes {
			return fmt.Errorf("%w: it would hold %d bytes, at most %d", ErrFull, n, s.bounds.Bytes)
		}
		if err := b.room(jobPrefix+len(text), reserve(accepted+1, results)); err != nil {
			return err
		}
		known = New
		b.accepted++
		b.bytes += size
		b.set(j.ID, entry{state: Running, seg: b.seg, at: b.put(kindJob, j.ID[:], text), size: uint32(size)})
		return nil
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
	text, err := encodeResult(s.now(), r)
	if err != nil {
		return fmt.Errorf("result of job %s: %w", r.Job, err)
	}
	leaf, stated := s.leafOf(r)
	var done bool // there is a result already
	failpoint.Here("state.finish.begin")
	err = s.commit(func(b *batch) error {
		e := b.lookup(r.Job)
		switch done = e.state == Done; {
		case done:
			return nil
		case e.state == 0:
			return ErrUnknown
		case e.state != Running:
			return ErrConflict
		}
		size := int64(len(text))
		all := resultPrefix + len(text)
		var inLog []byte
		if stated {
			inLog = b.leaf(leaf).encode()
			all += recordHead + len(inLog)
		}
		want := int64(-1) // what is small has its room already
		if all > resultPrefix+failureSize {
			accepted, results := s.count.Accepted+b.accepted-1, s.count.Results+b.results+1
			if n := s.count.Bytes + b.bytes - int64(e.size) + size + int64(accepted)*failureSize; n > s.bounds.Bytes {
				return fmt.Errorf("%w: it would hold %d bytes, at most %d", ErrFull, n, s.bounds.Bytes)
			}
			want = reserve(accepted, results)
		}
		if err := b.room(all, want); err != nil {
			return err
		}
		if stated {
			b.put(kindLeaves, inLog)
			b.leaves = append(b.leaves, leaf)
		}
		b.accepted--
		b.results++
		b.bytes += size - int64(e.size)
		b.finished++
		i := item{id: r.Job, num: b.finished, time: textTime(text)}
		prefix := append(append(r.Job[:len(r.Job):len(r.Job)], number(i.num)...), 0)
		if r.Code == "" {
			prefix[len(prefix)-1] = 1
		}
		b.set(r.Job, entry{state: Done, receipt: r.Code == "", num: i.num, seg: b.seg, at: b.put(kindResult, prefix, text), size: uint32(size)})
		b.then = append(b.then, func() { s.outbox.push(i) })
		return nil
	})
	if err == nil && done {
		err = s.compare(r.Job, text)
	}
	if err != nil {
		return fmt.Errorf("finish job %s: %w", r.Job, err)
	}
	return nil
}

// compare fails unless the result of a job is text.
func (s *Store) compare(id receipt.JobID, text []byte) error {
	old, e, err := s.read(id, Done)
	switch {
	case err != nil:
		return err
	case e.state != Done || !sound(old) || !bytes.Equal(content(old), content(text)):
		return ErrConflict
	}
	return nil
}

// Ack forgets results that the network has stored. Ids that are unknown, not
// finished or settled already are passed over, so it may be repeated. It does
// not wait for the disk: a crash may undo it.
func (s *Store) Ack(ids []receipt.JobID) error {
	now := s.now().UnixMilli()
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.unusable(); err != nil {
		return fmt.Errorf("forget %d acknowledged results: %w", len(ids), err)
	}
	for _, id := range ids {
		if e := s.jobs[id]; e.state == Done {
			s.settle(id, e, now)
		}
	}
	s.writeLater()
	return nil
}

// Expire forgets results that have waited for an acknowledgement longer than
// ttl, and ids that were settled longer ago, and returns how many results it
// dropped. Call it only while the clock is known to be right, which an open
// session shows: a clock that jumps ahead would throw results away. As [Store.Ack]
// it does not wait for the disk.
func (s *Store) Expire(ttl time.Duration) (dropped int, err error) {
	now := s.now()
	before := now.Add(-ttl).UnixMilli()
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.unusable(); err != nil {
		return 0, fmt.Errorf("drop expired results: %w", err)
	}
	var old []receipt.JobID
	for _, i := range s.outbox.items {
		if i.time >= before {
			break
		}
		if s.waits(i) {
			old = append(old, i.id)
		}
	}
	for _, id := range old {
		s.settle(id, s.jobs[id], now.UnixMilli())
	}
	dropped = len(old)
	if last := s.forget(before); last > s.forgotten {
		s.forgotten = last
		s.acks = append(s.acks, verdict{kindForget, item{num: last}})
	}
	s.writeLater()
	return dropped, nil
}

// settle removes a finished job's result. It leaves the id of one that carried
// a receipt. The caller holds mu.
func (s *Store) settle(id receipt.JobID, e entry, now int64) {
	s.count.Results--
	s.count.Bytes -= int64(e.size)
	s.weigh(e, -1)
	if e.receipt {
		s.lastSettled++
		i := item{id, s.lastSettled, now}
		s.jobs[id] = entry{state: Settled, num: i.num}
		s.settled.push(i)
		s.count.Settled++
		s.acks = append(s.acks, verdict{kindSettled, i})
		s.forget(math.MinInt64)
	} else {
		delete(s.jobs, id)
		s.acks = append(s.acks, verdict{kindDropped, item{id: id}})
	}
	s.outbox.drop(s.waits)
}

// waits reports whether an item of the outbox is unacknowledged. The caller
// holds mu.
func (s *Store) waits(i item) bool {
	e := s.jobs[i.id]
	return e.state == Done && e.num == i.num
}

// forget removes the oldest settled ids while there are too many, or while they
// are older than before. It returns the number of the last one, 0 for none. The
// caller holds mu.
func (s *Store) forget(before int64) (last uint64) {
	for len(s.settled.items) > 0 && (s.count.Settled > s.bounds.IDs || s.settled.items[0].time < before) {
		last = s.forgetFirst()
	}
	return last
}

// forgetFirst removes the oldest settled id. The caller holds mu.
func (s *Store) forgetFirst() (num uint64) {
	i := s.settled.items[0]
	s.weigh(s.jobs[i.id], -1)
	delete(s.jobs, i.id)
	s.count.Settled--
	s.settled.items = s.settled.items[1:]
	return i.num
}

// writeLater has what is in acks written, should no commit take it along. The
// caller holds mu.
func (s *Store) writeLater() {
	switch {
	case len(s.acks) == 0 || s.ackDue:
	case s.ackTimer == nil:
		s.ackDue = true
		s.ackTimer = time.AfterFunc(ackDelay, s.writeAcks)
	default:
		s.ackDue = true
		s.ackTimer.Reset(ackDelay)
	}
}

func (s *Store) writeAcks() {
	s.mu.Lock()
	s.ackDue = false
	none := len(s.acks) == 0
	s.mu.Unlock()
	if none {
		return
	}
	// What fails here fails again, and is said, at the next commit.
	failpoint.Here("state.acks.begin")
	_ = s.commit(func(*batch) error { return nil })
}

// putAcks appends what has been acknowledged.
func (b *batch) putAcks() error {
	s := b.s
	for b.acks < len(s.acks) {
		first := s.acks[b.acks]
		var body []byte
		n := 0
		for n < ackGroup && b.acks+n < len(s.acks) && s.acks[b.acks+n].kind == first.kind {
			switch a := s.acks[b.acks+n]; a.kind {
			case kindSettled:
				body = appendItem(body, a.item)
			case kindDropped:
				body = append(body, a.id[:]...)
			case kindForget, kindAcked, kindBlind: // the last one is for all
				body = number(a.num)
			}
			n++
		}
		if err := b.room(len(body), -1); err != nil {
			return err
		}
		b.put(first.kind, body)
		if first.kind == kindSettled {
			for _, a := range s.acks[b.acks : b.acks+n] {
				i := a.item // the list moves
				b.then = append(b.then, func() {
					if e := s.jobs[i.id]; e.state == Settled && e.num == i.num {
						e.seg = b.seg
						s.jobs[i.id] = e
						s.weigh(e, +1)
					}
				})
			}
		}
		b.acks += n
	}
	return nil
}

// Lookup says what is known about a job: [Running], [Done], [Settled], or 0 for
// nothing.
func (s *Store) Lookup(id receipt.JobID) (Known, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return 0, fmt.Errorf("look up job %s: %w", id, errClosed)
	}
	return s.jobs[id].state, nil
}

// read returns the text of a job that is in a state, and nothing of another.
func (s *Store) read(id receipt.JobID, state Known) (text []byte, e entry, err error) {
	s.reading.RLock() // the segment stays what it is
	defer s.reading.RUnlock()
	s.mu.Lock()
	e = s.jobs[id]
	if s.closed {
		s.mu.Unlock()
		return nil, entry{}, errClosed
	}
	if e.state != state {
		s.mu.Unlock()
		return nil, entry{}, nil
	}
	g := s.segments[e.seg-s.segments[0].Number]
	s.mu.Unlock()
	text = make([]byte, e.size)
	if _, err := g.f.ReadAt(text, int64(e.at)); err != nil {
		return nil, entry{}, fmt.Errorf("%s at %d: %w", segmentName(g.Number), e.at, err)
	}
	return text, e, nil
}

// Unfinished returns the accepted jobs without a result, those with the nearest
// deadline first. It is what a start has to deal with.
func (s *Store) Unfinished() ([]*wire.Job, error) {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return nil, fmt.Errorf("read accepted jobs: %w", errClosed)
	}
	var ids []receipt.JobID
	if s.count.Accepted > 0 {
		for id, e := range s.jobs {
			if e.state == Running {
				ids = append(ids, id)
			}
		}
	}
	s.mu.Unlock()
	var jobs []*wire.Job
	for _, id := range ids {
		text, e, err := s.read(id, Running)
		if err == nil && e.state == 0 {
			continue // finished meanwhile
		}
		var j *wire.Job
		if err == nil {
			j, err = decodeJob(text)
		}
		if err == nil && j.ID != id {
			err = fmt.Errorf("%w: it is job %s", ErrCorrupt, j.ID)
		}
		if err != nil {
			return nil, fmt.Errorf("read accepted job %s: %w", id, err)
		}
		jobs = append(jobs, j)
	}
	slices.SortFunc(jobs, func(a, b *wire.Job) int {
		return cmp.Or(cmp.Compare(a.Deadline, b.Deadline), bytes.Compare(a.ID[:], b.ID[:]))
	})
	return jobs, nil
}

// Unread is a result that the disk does not give back as it was written. It stays
// where it is until [Store.Expire] drops it.
type Unread struct {
	Job receipt.JobID
	Err error
}

// Outbox calls f with the results whose number is above after, in the order of
// finishing. Numbers rise and are never used twice. It holds one result at a
// time; f may use the store and may take as long as it likes. Results that cannot be
// read are passed over and returned, so that they hold back no others. The error is
// f's, or that the store is closed.
func (s *Store) Outbox(after uint64, f func(seq uint64, r *wire.Result) error) (unread []Unread, err error) {
	for {
		s.mu.Lock()
		i, ok := s.outbox.after(after)
		s.mu.Unlock()
		if !ok {
			return unread, nil
		}
		after = i.num
		r, ok, err := s.Result(i.id)
		switch {
		case errors.Is(err, errClosed):
			return unread, err
		case err != nil:
			unread = append(unread, Unread{i.id, err})
		case ok: // else it was acknowledged
			if err := f(i.num, r); err != nil {
				return unread, err
			}
		}
	}
}

// Result returns the unacknowledged result of a job, and false if there is none.
func (s *Store) Result(id receipt.JobID) (r *wire.Result, ok bool, err error) {
	text, e, err := s.read(id, Done)
	if err == nil && e.state == 0 {
		return nil, false, nil
	}
	if err == nil {
		r, err = decodeResult(text)
	}
	if err == nil && r.Job != id {
		err = fmt.Errorf("%w: it is that of job %s", ErrCorrupt, r.Job)
	}
	if err != nil {
		return nil, false, fmt.Errorf("read result of job %s: %w", id, err)
	}
	return r, true, nil
}

// Registration returns what the network answered when the node was registered,
// and nil before that.
func (s *Store) Registration() (*wire.Registered, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, fmt.Errorf("read registration: %w", errClosed)
	}
	if s.registered == nil {
		return nil, nil
	}
	r := *s.registered
	return &r, nil
}

// SetRegistration writes the registration down. A store belongs to the network
// and the node that it was first registered with: another one is refused, since
// the results in it could be delivered to nobody.
func (s *Store) SetRegistration(r *wire.Registered) error {
	own := *r
	text, err := json.Marshal(own)
	if err == nil && len(text) > maxRegistration {
		err = fmt.Errorf("it has %d bytes, at most %d", len(text), maxRegistration)
	}
	if err != nil {
		return fmt.Errorf("store registration: %w", err)
	}
	failpoint.Here("state.registration.begin")
	err = s.commit(func(b *batch) error {
		switch old := b.registered; {
		case old != nil && (old.Network != r.Network || old.Node != r.Node):
			return fmt.Errorf("%s belongs to node %s of network %.80q, not to node %s of %.80q; give each network and each identity its own state directory",
				s.path, old.Node, old.Network, r.Node, r.Network)
		case old != nil && *old == own:
			return nil
		}
		if err := b.room(len(text), reserve(s.count.Accepted+b.accepted, s.count.Results+b.results)); err != nil {
			return err
		}
		b.put(kindRegistered, text)
		b.registered = &own
		return nil
	})
	if err != nil {
		return fmt.Errorf("store registration: %w", err)
	}
	return nil
}

// queue is a list of items by rising number. Those in its middle may be ones
// that do not count any more.
type queue struct {
	items []item
	stale int
}

func (q *queue) push(i item) { q.items = append(q.items, i) }

// drop removes one item, wherever it is: one that counts no longer.
func (q *queue) drop(counts func(item) bool) {
	q.stale++
	for len(q.items) > 0 && !counts(q.items[0]) {
		q.items = q.items[1:]
		q.stale--
	}
	if q.stale > 64 && q.stale > len(q.items)/2 {
		q.items = slices.DeleteFunc(q.items, func(i item) bool { return !counts(i) })
		q.stale = 0
	}
}

// after returns the first item whose number is above n.
func (q *queue) after(n uint64) (item, bool) {
	at, _ := slices.BinarySearchFunc(q.items, n+1, func(i item, n uint64) int { return cmp.Compare(i.num, n) })
	if at == len(q.items) {
		return item{}, false
	}
	return q.items[at], true
}
