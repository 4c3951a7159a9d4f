package state

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/resultity/node/internal/evm"
	"github.com/resultity/node/internal/failpoint"
	"github.com/resultity/node/internal/receipt"
	"github.com/resultity/node/internal/wire"
)

// This file puts a damaged log right. A head is there twice, and one changed byte of a
// frame is found again by its checksum. What is left is lost: of a frame that is wrong,
// before one that is right; of a segment whose heads are both wrong, or whose file is
// missing between others. The rules are:
//
//   - What is right beside it counts: all other frames, and in the same frame the records
//     whose own checksums are right, up to where it cannot be told any more where one begins.
//   - No second answer: a job whose result may have been lost is settled, so that it is
//     refused when the network offers it again, which it does when a session begins. Where
//     it cannot be read which jobs those were, they are all that were accepted before, and
//     all that come and were made before the start.
//   - The receipt log goes on without the receipts that are lost, unless the network has
//     them; the node's key signs no head that contradicts an earlier one.
//   - What was found is copied to a file of its own first, what is right of it to the end of
//     the log, and then a frame takes its place that says so, where it is: that takes no room.
//     Killed anywhere in between, the next start does the same again.
const (
	// maxAside bounds the bytes of what was set aside, and asideAge how long it stays.
	maxAside = 16 << 20
	asideAge = 30 * 24 * time.Hour

	// blindFor is by how much this clock may be behind that of the network, which
	// dates jobs, where both are set by the same time.
	blindFor = 10 * time.Second

	maxHoles = 1024 // segments in a row that may be missing
	page     = 4 << 10
	maxNamed = 1024 // jobs that a Salvage names
)

// Salvage says what a start has found damaged, and what became of it.
type Salvage struct {
	Mended int             // places at which something was wrong, and is right again
	Aside  []string        // names, in the store's directory, of files with what was not to be mended
	Lost   []receipt.JobID // jobs of which the job or the result was lost and that can be named, at most 1024
	Blind  time.Time       // jobs that were made before may have been lost, too, and are refused; zero: none
	Leaves uint64          // receipts that the receipt log has lost
	Full   error           // why it could not be put right on the disk: the next start does so
}

// Loss reports whether something may be lost, or may be later.
func (f *Salvage) Loss() bool {
	return len(f.Lost)+len(f.Aside) > 0 || f.Leaves > 0 || !f.Blind.IsZero() || f.Full != nil
}

// Salvage says what the start has found damaged, nil for nothing.
func (s *Store) Salvage() *Salvage { return s.found }

// replay is what a start has read.
type replay struct {
	s       *Store
	stale   []uint64 // segments that were given back
	broken  []uint64 // segments without a head
	pending []string // names of those at the end, while it is not written down that they are lost
	holes   []*segment
	regions []*region
	writes  []rewrite

	results, settled []item
	again            []item // of settled, those that are nowhere any more
	latest           int64  // time of a record, Unix milliseconds
	tree             treeReader
	oldest           uint64
	raised           bool // the oldest is not what the log says

	found    Salvage
	blind    []position      // results that are before may be lost
	unsure   bool            // which jobs were settled is not known for all
	doubtful []receipt.JobID // their results are lost
	missed   []receipt.JobID // their acceptance is lost
}

// position is a place in the log.
type position struct {
	seg uint64
	at  int64
}

// region is a part of a segment that is lost.
type region struct {
	g    *segment
	at   int64
	b    []byte
	last uint64 // number of the last frame that was in it
	tail bool   // nothing follows in the segment
}

// size is that of the frame that takes its place.
func (r *region) size() int {
	if r.tail {
		return lostLeast
	}
	return len(r.b)
}

// rewrite is what a place of a segment should hold.
type rewrite struct {
	g  *segment
	at int64
	b  []byte
}

func (r *replay) damaged() bool {
	return r.found.Mended > 0 || len(r.regions)+len(r.holes)+len(r.broken)+len(r.pending) > 0 || r.raised
}

// replay reads the segments.
func (s *Store) replay(numbers []uint64, pending []string) (*replay, error) {
	r := &replay{s: s, pending: pending}
	if err := r.open(numbers); err != nil || len(s.segments) == 0 {
		return r, err
	}
	var b []byte // for one after the other
	for i, g := range s.segments {
		if g.f == nil {
			r.hole(i)
			continue
		}
		if g.Frame < s.nextFrame {
			return nil, fmt.Errorf("%w: %s goes back to frame %d, after frame %d", ErrCorrupt, segmentName(g.Number), g.Frame, s.nextFrame-1)
		}
		s.nextFrame = g.Frame
		var unread []int64
		var err error
		if b, unread, err = readSegment(g.f, g.size, b); err != nil {
			return nil, fmt.Errorf("%s: %w", segmentName(g.Number), err)
		}
		if h, err := g.head.encode(); err == nil && !g.whole {
			copy(b, h)
		}
		s.lastResult, s.lastSettled = max(s.lastResult, g.Results), max(s.lastSettled, g.Settled)
		s.forgotten, r.oldest = max(s.forgotten, g.Forgotten), max(r.oldest, g.Oldest)
		s.blind = g.Blind
		s.registered, r.tree.acked = g.Registered, g.Acked
		behind := uint64(0)
		if i+1 < len(s.segments) && s.segments[i+1].f != nil {
			behind = s.segments[i+1].Frame
		}
		if err := r.read(g, b, behind); err != nil {
			return nil, err
		}
		if behind == 0 && slices.ContainsFunc(unread, func(at int64) bool { return g.hides(at, b, s.nextFrame) }) {
			r.blind = append(r.blind, position{g.Number, g.end}) // no crash does that
		}
		r.found.Mended += len(unread)
		for _, at := range unread { // a disk gives a sector that is written another place
			r.rewrite(g, at, b[at:min(at+page, int64(len(b)))])
		}
	}
	return r, r.conclude()
}

// open opens the segments, and finds out which are missing.
func (r *replay) open(numbers []uint64) error {
	s := r.s
	var unread error
	for _, n := range numbers {
		g, err := s.openSegment(n)
		switch {
		case errors.Is(err, ErrCorrupt), errors.Is(err, syscall.EIO):
			r.broken, unread = append(r.broken, n), errors.Join(unread, err)
			continue
		case err != nil:
			return fmt.Errorf("%s: %w", segmentName(n), err)
		}
		for missing := s.lastSegment() + 1; len(s.segments) > 0 && missing < n; missing++ {
			if n-missing > maxHoles {
				return fmt.Errorf("%w: %d segments are missing before %s", ErrCorrupt, n-missing, segmentName(n))
			}
			s.segments = append(s.segments, &segment{head: head{Number: missing}})
		}
		s.segments = append(s.segments, g)
		if b, err := g.head.encode(); err == nil && !g.whole {
			r.found.Mended++
			r.rewrite(g, 0, b)
		}
	}
	if len(s.segments) == 0 && errors.Is(unread, syscall.EIO) {
		return unread // perhaps there is no disk any more
	}
	if len(s.segments) == 0 && len(r.broken)+len(r.pending) > 0 {
		r.blind = append(r.blind, position{})
		r.doubt()
	}
	return nil
}

func (s *Store) lastSegment() uint64 {
	if len(s.segments) == 0 {
		return 0
	}
	return s.current().Number
}

// openSegment opens a segment and reads its head.
func (s *Store) openSegment(n uint64) (_ *segment, err error) {
	f, err := s.disk.open(segmentName(n))
	if err != nil {
		return nil, err
	}
	g := &segment{f: f}
	defer func() {
		if err != nil {
			_ = f.Close() // the error says more
		}
	}()
	if g.size, err = f.size(); err != nil {
		return nil, err
	}
	if g.size < headRoom || g.size > maxSegment {
		return nil, fmt.Errorf("%w: %d bytes are not the size of a segment", ErrCorrupt, g.size)
	}
	b, _, err := readSegment(f, headRoom, nil)
	if err != nil {
		return nil, err
	}
	g.size &^= frameAlign - 1
	g.head, g.whole, err = decodeHead(b, n)
	return g, err
}

// readSegment returns the first n bytes of f, in buf if that is large enough. Pages that
// the disk does not give back are zero, and named; where it gives back none, it fails.
func readSegment(f file, n int64, buf []byte) (b []byte, unread []int64, err error) {
	b = slices.Grow(buf[:0], int(n))[:n]
	if _, err = f.ReadAt(b, 0); err == nil {
		return b, nil, nil
	}
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return nil, nil, err // it has become shorter
	}
	for at := int64(0); at < n; at += page {
		part := b[at:min(at+page, n)]
		if _, bad := f.ReadAt(part, at); bad != nil {
			clear(part)
			unread = append(unread, at)
		}
	}
	if int64(len(unread))*page >= n {
		return nil, nil, err
	}
	return b, unread, nil
}

// hides reports whether there may have been a frame of a number behind the last that was
// read of b, with a part in the page at a place, which the disk does not give back.
func (g *segment) hides(at int64, b []byte, number uint64) bool {
	switch {
	case at+page <= g.end || g.end+frameHead > int64(len(b)):
		return false
	case at < g.end+frameHead:
		return true
	}
	n := int64(binary.BigEndian.Uint32(b[g.end+4:]))
	return frameNumber(b[g.end:], g.Salt) == number && at < g.end+frameHead+n
}

func (r *replay) rewrite(g *segment, at int64, b []byte) {
	r.writes = append(r.writes, rewrite{g, at, bytes.Clone(b)})
}

// hole makes the head of a segment that is lost, the i-th, between others.
func (r *replay) hole(i int) {
	s, g := r.s, r.s.segments[i]
	behind := s.segments[slices.IndexFunc(s.segments[i:], func(g *segment) bool { return g.f != nil })+i]
	g.head = head{
		Number: g.Number, Salt: newSalt(), Frame: s.nextFrame, Results: s.lastResult, Settled: s.lastSettled,
		Forgotten: s.forgotten, Oldest: r.oldest, Acked: r.tree.acked, Blind: s.blind, Registered: s.registered,
	}
	g.lost = behind.Frame - 1
	s.nextFrame = max(s.nextFrame, behind.Frame)
	r.holes = append(r.holes, g)
	r.blind = append(r.blind, position{g.Number, 0})
}

// read reads the frames of a segment; behind is the number of the first frame after it, 0
// where that is not known.
func (r *replay) read(g *segment, b []byte, behind uint64) error {
	s, at := r.s, g.frames()
	for {
		at = scan(b, g.Salt, at, func(k kind, at int64, body []byte) { r.apply(g, k, at, body) })
		if n := mendFrame(b[at.end:], g.Salt, at.next); n > 0 {
			r.found.Mended++
			r.rewrite(g, at.end, b[at.end:at.end+int64(n)])
			continue
		}
		lost := region{g: g, at: at.end}
		rest := b[at.end:]
		if n, found := laterFrame(rest[min(frameAlign, len(rest)):], g.Salt, at.next); found {
			rest = rest[:frameAlign+n]
			lost.last = frameNumber(b[at.end+int64(len(rest)):], g.Salt) - 1
		} else if behind > at.next {
			lost.last, lost.tail = behind-1, true
		} else {
			break
		}
		if len(rest) < lostLeast && !lost.tail {
			return fmt.Errorf("%w: frames %d to %d of %s are missing at byte %d", ErrCorrupt, at.next, lost.last, segmentName(g.Number), at.end)
		}
		lost.b = bytes.Clone(rest)
		r.regions = append(r.regions, &lost)
		r.recover(&lost, at.next)
		at = scanned{end: at.end + int64(lost.size()), next: lost.last + 1}
		if at.end >= int64(len(b)) {
			break // it was cut short
		}
	}
	g.end, s.nextFrame, s.lastFrame = at.end, at.next, at.last
	return nil
}

// apply takes one record.
func (r *replay) apply(g *segment, k kind, at int64, body []byte) {
	s := r.s
	text := func(prefix int) entry {
		return entry{seg: g.Number, at: uint32(at) + uint32(prefix), size: uint32(len(body) - prefix)}
	}
	switch k {
	case kindJob:
		e := text(jobPrefix)
		e.state = Running
		s.jobs[receipt.JobID(body)] = e
		r.latest = max(r.latest, textTime(body[jobPrefix:]))
	case kindResult:
		e := text(resultPrefix)
		e.state, e.num, e.receipt = Done, fromNumber(body[idSize:]), body[resultPrefix-1] == 1
		s.jobs[receipt.JobID(body)] = e
		s.lastResult = max(s.lastResult, e.num)
		i := item{receipt.JobID(body), e.num, textTime(body[resultPrefix:])}
		r.results, r.latest = append(r.results, i), max(r.latest, i.time)
	case kindSettled:
		for ; len(body) > 0; body = body[itemSize:] {
			i := readItem(body)
			s.jobs[i.id] = entry{state: Settled, num: i.num, seg: g.Number}
			s.lastSettled = max(s.lastSettled, i.num)
			r.settled, r.latest = append(r.settled, i), max(r.latest, i.time)
		}
	case kindDropped:
		for ; len(body) > 0; body = body[idSize:] {
			delete(s.jobs, receipt.JobID(body))
		}
	case kindLeaves, kindAdopted:
		r.tree.read(k, body, g.Number)
	case kindAcked:
		r.tree.acked = fromNumber(body)
	case kindForget:
		s.forgotten = max(s.forgotten, fromNumber(body))
	case kindOldest:
		r.oldest = max(r.oldest, fromNumber(body))
	case kindBlind:
		s.blind = int64(fromNumber(body))
	case kindRegistered:
		is := new(wire.Registered)
		_ = json.Unmarshal(body, is) // it is well made
		s.registered = is
	}
}

// recover takes what is right of a region whose first frame has a number.
func (r *replay) recover(lost *region, frame uint64) {
	type record struct {
		k    kind
		at   int
		body []byte
	}
	if len(lost.b) < frameHead {
		r.blind = append(r.blind, position{lost.g.Number, lost.at})
		return
	}
	payload := lost.b[frameHead:]
	n := int64(binary.BigEndian.Uint32(lost.b[4:]))
	one := lost.last == frame && n <= int64(len(payload)) && (lost.tail || aligned(n) == int64(len(payload)))
	if one {
		payload = payload[:n]
	}
	var records []record
	end := 0
	_ = eachRecord(payload, func(k kind, at int, body []byte) error { // up to where it cannot be told
		records = append(records, record{k, frameHead + at, body})
		end = at + len(body)
		return nil
	})
	all := one && end == len(payload)
	if !all {
		p := position{lost.g.Number, lost.at}
		if lost.last > frame {
			p.at += int64(len(lost.b))
		}
		r.blind = append(r.blind, p)
	}
	var leaf *evm.Hash // of the result that comes next
	for _, c := range records {
		n := textAt(c.k)
		if n > 0 && sound(c.body[n:]) {
			if id, ok := textOf(c.k, c.body[n:]); ok {
				body := bytes.Clone(c.body)
				copy(body, id[:])
				if c.k == kindResult {
					res, _ := decodeResult(body[resultPrefix:]) // textOf has done so
					if num := fromNumber(body[idSize:]); num == 0 || num > r.s.lastResult+maxNamed {
						copy(body[idSize:], number(r.s.lastResult+1))
					}
					body[resultPrefix-1] = 0
					if res.Code == "" {
						body[resultPrefix-1] = 1
					}
					if own, ok := r.s.leafOf(res); ok {
						r.tree.add(own, lost.g.Number, false)
					}
					leaf = nil
				}
				r.apply(lost.g, c.k, lost.at+int64(c.at), body)
				continue
			}
		}
		if !all {
			if n > 0 {
				break // its length may be what is damaged
			}
			continue
		}
		switch c.k {
		case kindJob:
			r.missed = append(r.missed, receipt.JobID(c.body))
		case kindResult:
			id := receipt.JobID(c.body)
			if r.s.jobs[id].state == Running {
				r.doubtful = append(r.doubtful, id)
			} else { // what is damaged may be the id
				r.blind = append(r.blind, position{lost.g.Number, lost.at})
			}
			if leaf != nil {
				r.tree.add(*leaf, lost.g.Number, true)
			}
			leaf = nil
		case kindLeaves, kindAdopted:
			if l, _ := decodeLeaves(c.body); c.k == kindLeaves && len(l.leaves) == 1 {
				leaf = &l.leaves[0]
			} else {
				r.tree.read(c.k, c.body, lost.g.Number)
				r.tree.damage(l.first)
				r.tree.doubted = true
			}
		case kindSettled:
			for b := c.body; len(b) > 0; b = b[itemSize:] {
				i := readItem(b)
				if r.s.jobs[i.id].state == 0 { // likewise
					r.unsure = true
				}
				if i.num <= r.s.lastSettled+maxNamed {
					r.s.lastSettled = max(r.s.lastSettled, i.num)
					r.settle(i)
				}
			}
		case kindRegistered:
			r.apply(lost.g, c.k, 0, c.body)
		case kindBlind: // until when is not known any more
			r.unsure = true
		}
	}
}

// settle remembers that a job is settled, which is to be written down again.
func (r *replay) settle(i item) {
	r.s.jobs[i.id] = entry{state: Settled, num: i.num}
	r.settled, r.again = append(r.settled, i), append(r.again, i)
}

// textOf returns the job that a text is of, if it is what its record says.
func textOf(k kind, text []byte) (receipt.JobID, bool) {
	if k == kindJob {
		if j, err := decodeJob(text); err == nil {
			return j.ID, true
		}
	} else if res, err := decodeResult(text); err == nil {
		return res.Job, true
	}
	return receipt.JobID{}, false
}

// conclude makes of what was read what the store knows.
func (r *replay) conclude() error {
	s := r.s
	first := s.segments[0].Number
	if n := s.lastSegment(); r.oldest > n {
		return fmt.Errorf("%w: %s is missing", ErrCorrupt, segmentName(r.oldest))
	}
	for len(r.broken) > 0 && r.broken[0] < r.oldest {
		r.stale, r.broken = append(r.stale, r.broken[0]), r.broken[1:]
	}
	if len(r.broken) > 0 && r.broken[len(r.broken)-1] > s.lastSegment() {
		r.blind = append(r.blind, position{r.broken[len(r.broken)-1], 0})
	}
	if len(r.pending) > 0 {
		r.blind = append(r.blind, position{s.lastSegment() + 1, 0})
	}
	if first > r.oldest && r.oldest > 0 {
		r.blind = append(r.blind, position{first, 0})
		r.raised = true
	}
	r.oldest = max(r.oldest, first)
	// Nothing counts of what is before the oldest.
	gone := func(g *segment) bool { return g.Number < r.oldest }
	r.holes = slices.DeleteFunc(r.holes, gone)
	r.regions = slices.DeleteFunc(r.regions, func(lost *region) bool { return gone(lost.g) })
	r.writes = slices.DeleteFunc(r.writes, func(w rewrite) bool { return gone(w.g) })
	r.blind = slices.DeleteFunc(r.blind, func(p position) bool { return p.seg < r.oldest })
	s.buildTree(&r.tree, r.oldest)
	if r.tree.changed {
		r.found.Leaves = r.tree.shift
	}
	r.doubt()
	return s.index(r)
}

// doubt settles the jobs that may have had a result that is lost.
func (r *replay) doubt() {
	s := r.s
	for id, e := range s.jobs {
		if e.state != Settled && e.seg < r.oldest && len(r.blind) > 0 { // its copy may be lost
			r.doubtful = append(r.doubtful, id)
		} else if e.state == Running && slices.ContainsFunc(r.blind, func(p position) bool {
			return e.seg < p.seg || e.seg == p.seg && int64(e.at) < p.at
		}) {
			r.doubtful = append(r.doubtful, id)
		}
	}
	now := s.now()
	name := func(id receipt.JobID) {
		if len(r.found.Lost) < maxNamed && !slices.Contains(r.found.Lost, id) {
			r.found.Lost = append(r.found.Lost, id)
		}
	}
	for _, id := range r.doubtful {
		if e := s.jobs[id]; e.state == Settled || e.state == Done && e.seg >= r.oldest {
			continue // what counts of it was found elsewhere
		}
		s.lastSettled++
		r.settle(item{id, s.lastSettled, now.UnixMilli()})
		name(id)
	}
	for _, i := range r.again {
		if e := s.jobs[i.id]; e == (entry{state: Settled, num: i.num}) && i.num > s.forgotten {
			s.acks = append(s.acks, verdict{kindSettled, i})
		}
	}
	for _, id := range r.missed {
		if s.jobs[id].state == 0 {
			name(id)
		}
	}
	if len(r.blind) > 0 || r.unsure {
		// A clock without a battery begins anew.
		r.found.Blind = later(now, time.UnixMilli(r.latest))
		s.blind = max(s.blind, r.found.Blind.Add(blindFor).UnixMilli())
	}
}

// setAside copies what is lost to files of their own, and removes old ones. What is left
// of one changed byte is put right.
func (s *Store) setAside(r *replay, aside []string) error {
	now := s.now()
	var err error
	done := func(name string, e error) {
		switch {
		case e == nil:
			r.found.Aside = append(r.found.Aside, name)
		case full(e): // it goes on without
		default:
			err = errors.Join(err, e)
		}
	}
	has := func(place string) bool {
		return slices.ContainsFunc(aside, func(name string) bool { return strings.HasSuffix(name, place) })
	}
	for _, n := range r.broken {
		name := asideName(now, n, 0)
		to := name
		if n > s.lastSegment() { // else it is seen that it is missing
			to += pendingSuffix
		}
		e := s.disk.rename(segmentName(n), to)
		if e == nil && to != name {
			r.pending = append(r.pending, to)
		}
		done(name, e)
	}
	for _, lost := range r.regions {
		name := asideName(now, lost.g.Number, lost.at)
		if _, place, _ := strings.Cut(name, "-"); has("-" + place) {
			continue // by a start that was killed then
		}
		b := bytes.TrimRight(lost.b, "\x00")
		done(name, writeAside(s.disk, name, b[:min(len(b), maxAside/4)]))
	}
	if err != nil {
		return err
	}
	s.dropAside(aside, now)
	if r.damaged() {
		if err := s.disk.sync(); err != nil {
			return err
		}
		failpoint.Here("state.salvage.aside")
	}
	for _, w := range r.writes {
		if _, err := w.g.f.WriteAt(w.b, w.at); err != nil {
			return fmt.Errorf("put %s right: %w", segmentName(w.g.Number), err)
		}
		if err := w.g.f.sync(); err != nil {
			return fmt.Errorf("put %s right: %w", segmentName(w.g.Number), err)
		}
	}
	if r.damaged() {
		s.found = &r.found
	}
	s.unrepaired = len(r.regions)+len(r.blind) > 0 || r.raised || r.tree.changed
	return nil
}

// pendingSuffix ends the name of what is to be set aside when that is known to the log.
const pendingSuffix = ".next"

func asideName(now time.Time, segment uint64, at int64) string {
	return fmt.Sprintf("%d-%016x-%d.damaged", now.Unix(), segment, at)
}

func asideTime(name string) (time.Time, bool) {
	stamp, rest, ok := strings.Cut(name, "-")
	n, err := strconv.ParseInt(stamp, 10, 64)
	return time.Unix(n, 0), ok && err == nil && strings.HasSuffix(rest, ".damaged")
}

func writeAside(d disk, name string, b []byte) error {
	f, err := d.create(name)
	if errors.Is(err, fs.ErrExist) {
		return nil
	}
	if err != nil {
		return err
	}
	_, err = f.WriteAt(b, 0)
	if err == nil {
		err = f.sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		_ = d.remove(name) // so that a full disk is not made fuller
	}
	return err
}

// dropAside removes what was set aside, the oldest first, where it is old or too much.
func (s *Store) dropAside(aside []string, now time.Time) {
	total := int64(0)
	for _, name := range slices.Backward(aside) {
		if f, err := s.disk.open(name); err == nil {
			n, _ := f.size() // counts as nothing
			total += n
			_ = f.Close() // nothing was written
		}
		if at, _ := asideTime(name); now.Sub(at) > asideAge || total > maxAside {
			_ = s.disk.remove(name) // it is tried again
		}
	}
}

// fill makes a segment in the place of one that is lost between others.
func (s *Store) fill(g *segment) (err error) {
	var file spare
	if n := len(s.spares); n > 0 {
		file, s.spares = s.spares[n-1], s.spares[:n-1]
	} else {
		s.lastSpare++
		file.name = spareName(s.lastSpare)
		if file.f, err = makeFile(s.disk, file.name, headRoom+page); err != nil {
			return err
		}
	}
	made := segment{head: g.head, f: file.f, end: headRoom}
	defer func() {
		if err != nil {
			_, _ = file.f.Close(), s.disk.remove(file.name) // the error says more
		}
	}()
	if made.size, err = made.f.size(); err != nil {
		return err
	}
	if g.lost >= g.Frame {
		b := lostFrame(lostLeast, g.Salt, g.lost)
		if _, err := made.f.WriteAt(b, made.end); err != nil {
			return err
		}
		made.end += int64(len(b))
	}
	if err := startSegment(s.disk, file.name, &made); err != nil {
		return err
	}
	g.f, g.size, g.end = made.f, made.size, made.end
	return nil
}

// lostLeast is the least room for a frame that says that something is lost.
const lostLeast = (frameHead + recordHead + frameAlign - 1) &^ (frameAlign - 1)

// lostFrame is such a frame of size bytes.
func lostFrame(size int, salt, number uint64) []byte {
	b := make([]byte, size)
	b[frameHead] = byte(kindLost)
	binary.BigEndian.PutUint32(b[frameHead+1:], uint32(size-frameHead-recordHead))
	return sealFrame(b, salt, number)
}

// repair copies to the end of the log what is right of what is lost, and says in its place
// that it is.
func (s *Store) repair(r *replay) error {
	if !s.unrepaired {
		return nil
	}
	var group []*change
	add := func(n int, do func(b *batch)) {
		group = append(group, &change{do: func(b *batch) error {
			if err := b.room(n, -1); err != nil {
				return err
			}
			do(b)
			return nil
		}})
	}
	for _, lost := range r.regions {
		for id, e := range s.jobs {
			at := int64(e.at) - lost.at
			if e.seg != lost.g.Number || e.state == Settled || at < 0 || at >= int64(len(lost.b)) {
				continue
			}
			k, prefix, text := kindJob, id[:], lost.b[at:at+int64(e.size)]
			if e.state == Done {
				k, prefix = kindResult, append(append(id[:len(id):len(id)], number(e.num)...), 0)
				if e.receipt {
					prefix[len(prefix)-1] = 1
				}
			}
			add(len(prefix)+len(text), func(b *batch) { b.move(id, lost.g, b.put(k, prefix, text)) })
		}
	}
	acked := s.tree.acked
	if r.tree.changed {
		t := &s.tree
		from := max(t.base.Size(), min(acked, t.log.Size()))
		log, own := t.base.Clone(), slices.Clone(t.leaves[from-t.base.Size():])
		for _, leaf := range t.leaves[:from-t.base.Size()] {
			log.Append(leaf, nil)
		}
		text := (&leaves{first: from, begins: true, edge: log.Hashes(), leaves: own}).encode()
		add(len(text), func(b *batch) {
			b.put(kindAdopted, text)
			b.adopted, b.leaves = log, own
		})
	}
	if r.raised {
		add(8, func(b *batch) { b.put(kindOldest, number(r.oldest)) })
	}
	if !r.found.Blind.IsZero() {
		add(8, func(b *batch) { b.put(kindBlind, number(uint64(s.blind))) })
	}
	s.write(append(group, &change{do: func(*batch) error { return nil }})) // and what is settled
	for _, c := range group {
		if c.err != nil && !full(c.err) {
			return c.err
		} else if c.err != nil {
			r.found.Full = c.err
			return nil
		}
	}
	failpoint.Here("state.salvage.moved")
	place := func(g *segment, f func() error) error {
		switch err := f(); {
		case full(err):
			r.found.Full = err
		case err != nil:
			return fmt.Errorf("put %s right: %w", segmentName(g.Number), err)
		}
		return nil
	}
	for _, lost := range r.regions {
		if err := place(lost.g, func() error {
			if _, err := lost.g.f.WriteAt(lostFrame(lost.size(), lost.g.Salt, lost.last), lost.at); err != nil {
				return err
			}
			if err := lost.g.f.sync(); err != nil {
				return fmt.Errorf("%w: %w", errSync, err)
			}
			return nil
		}); err != nil {
			return err
		}
	}
	for _, g := range r.holes {
		if err := place(g, func() error { return s.fill(g) }); err != nil {
			return err
		}
	}
	for _, name := range r.pending {
		if err := s.disk.rename(name, strings.TrimSuffix(name, pendingSuffix)); full(err) {
			r.found.Full = err
		} else if err != nil {
			return err
		}
	}
	if r.found.Full != nil {
		return nil
	}
	if err := s.disk.sync(); err != nil {
		return err
	}
	failpoint.Here("state.salvage.written")
	s.unrepaired = false
	if r.tree.changed {
		return s.AckLeaves(acked)
	}
	return nil
}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

// forgot reports whether a job that is not known may have been known when something of the
// log was lost that cannot be named. That was before now: a clock that was ahead then would
// have the node refuse jobs until that time, and is right now that a job comes. The caller
// holds mu.
func (s *Store) forgot(j *wire.Job) bool {
	if most := s.now().Add(blindFor).UnixMilli(); s.blind > most {
		s.blind = most
		s.acks = append(s.acks, verdict{kindBlind, item{num: uint64(most)}})
		s.writeLater()
	}
	return j.Created*1000 <= s.blind
}
