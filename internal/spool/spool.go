// Package spool keeps what the agent logs until the network has it, in a ring of
// files of bounded size.
//
// The rule it keeps: it takes only what may leave the node (see [wire.LogField]),
// and it never holds up who logs. A record gets its position when it is logged; one that finds
// no room, in memory or on disk, or is overwritten before the network has it,
// leaves a gap, by which it is counted. A record is lost in a crash only if it was
// logged in the last moments before.
package spool

import (
	"bufio"
	"bytes"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/resultity/node/internal/durable"
	"github.com/resultity/node/internal/failpoint"
	"github.com/resultity/node/internal/wire"
)

// Bounds of a spool.
const (
	segments    = 8
	segmentSize = 1 << 20         // bytes
	maxWaiting  = 1024            // records that wait for the disk
	syncEvery   = 2 * time.Second // what is lost when the machine loses power
	maxLine     = 9 + wire.MaxLogRecord
	maxMark     = 4 << 10 // bytes of the file with the position
)

const markFile = "position.json"

var (
	idPattern      = regexp.MustCompile(`^[0-9a-f]{32}$`)
	segmentPattern = regexp.MustCompile(`^[0-9]{16}\.log$`)
	castagnoli     = crc32.MakeTable(crc32.Castagnoli)
)

// mark says which spool this is, and how much of it the network has.
type mark struct {
	Spool    string `json:"spool"`
	Position uint64 `json:"position"`
}

// Spool is an open spool. Safe for concurrent use.
type Spool struct {
	dir     string
	waiting chan *wire.LogRecord
	done    chan struct{} // closed when nothing is written any more

	enter  sync.RWMutex // held for reading while a record is put in line
	closed bool

	numbers sync.Mutex // guards next, also while a record is put in line, so that the line is in order
	next    uint64     // position of the next record

	mu       sync.Mutex // guards what follows, also over the disk; who logs does not take it
	mark     mark
	segments []uint64 // first positions of the segments, oldest first
	file     *os.File // the newest segment
	size     int64    // of it
	last     uint64   // position of the last record on disk
	broken   error    // why nothing can be written, or nil
}

// Open opens the spool in dir, making it if it is not there. What a crash has
// torn is cut off. A spool that cannot be read is begun anew, under another
// name, so that its positions are not taken for those of the old one.
func Open(dir string) (*Spool, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	s := &Spool{dir: dir, waiting: make(chan *wire.LogRecord, maxWaiting), done: make(chan struct{})}
	if err := s.readMark(); err != nil {
		return nil, err
	}
	if err := s.readSegments(); err != nil {
		return nil, err
	}
	s.last = max(s.last, s.mark.Position)
	s.next = s.last + 1
	go s.run()
	return s, nil
}

func (s *Spool) path(first uint64) string {
	return filepath.Join(s.dir, fmt.Sprintf("%016d.log", first))
}

func (s *Spool) readMark() error {
	name := filepath.Join(s.dir, markFile)
	raw, err := durable.ReadOwn(name, maxMark)
	if err == nil && json.Unmarshal(raw, &s.mark) == nil && idPattern.MatchString(s.mark.Spool) && s.mark.Position < 1<<53 {
		return nil
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, durable.ErrLarge) {
		return err
	}
	var id [16]byte
	_, _ = rand.Read(id[:]) // crypto/rand never fails: it ends the program instead
	s.mark = mark{Spool: hex.EncodeToString(id[:])}
	old, err := s.list()
	if err != nil {
		return err
	}
	for _, first := range old { // their positions belong to a spool that nobody knows
		if err := os.Remove(s.path(first)); err != nil {
			return err
		}
	}
	return s.writeMark(s.mark)
}

func (s *Spool) writeMark(m mark) error {
	b, err := json.Marshal(m)
	if err != nil {
		return err
	}
	failpoint.Here("spool.mark.begin")
	return durable.WriteFile(filepath.Join(s.dir, markFile), b, 0o600)
}

// list returns the first positions of the segments that are there.
func (s *Spool) list() (firsts []uint64, err error) {
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		if !segmentPattern.MatchString(e.Name()) {
			continue
		}
		n, err := strconv.ParseUint(strings.TrimSuffix(e.Name(), ".log"), 10, 64)
		if err != nil {
			return nil, err
		}
		firsts = append(firsts, n)
	}
	slices.Sort(firsts)
	return firsts, nil
}

// readSegments finds the last record, and cuts off what follows it.
func (s *Spool) readSegments() (err error) {
	if s.segments, err = s.list(); err != nil {
		return err
	}
	for len(s.segments) > 0 {
		first := s.segments[len(s.segments)-1]
		whole := int64(0)
		s.last = 0
		err := s.scan(first, func(n uint64, _ []byte, end int64) bool {
			s.last, whole = n, end
			return true
		})
		if err != nil {
			return err
		}
		if s.last == 0 { // nothing in it is whole
			if err := os.Remove(s.path(first)); err != nil {
				return err
			}
			s.segments = s.segments[:len(s.segments)-1]
			continue
		}
		if s.file, err = os.OpenFile(s.path(first), os.O_WRONLY|os.O_APPEND, 0o600); err != nil {
			return err
		}
		s.size = whole
		return s.file.Truncate(whole)
	}
	return nil
}

// scan passes the whole records of a segment to f, with the offset at which each
// ends, until f returns false. Positions rise. What is no whole record is passed over:
// a damaged one takes none with it that is behind it.
func (s *Spool) scan(first uint64, f func(n uint64, line []byte, end int64) bool) error {
	file, err := os.Open(s.path(first))
	if err != nil {
		return err
	}
	defer file.Close() // read only: nothing to lose
	r := bufio.NewReaderSize(io.LimitReader(file, 2*segmentSize), maxLine)
	last, end := uint64(0), int64(0)
	within := false // a line that is longer than any of ours
	for {
		raw, err := r.ReadSlice('\n')
		end += int64(len(raw))
		long := errors.Is(err, bufio.ErrBufferFull)
		if err != nil && !long {
			return nil
		}
		if within, long = long, within || long; long {
			continue
		}
		line, ok := decode(raw)
		if !ok {
			continue
		}
		var head struct {
			Position uint64 `json:"n"`
		}
		if json.Unmarshal(line, &head) != nil || head.Position <= last || head.Position < first || head.Position >= 1<<53 {
			continue
		}
		last = head.Position
		if !f(last, line, end) {
			return nil
		}
	}
}

// A line is the checksum of the record in eight hexadecimal digits, a space, and
// its JSON.
func encode(record []byte) []byte {
	return fmt.Appendf(nil, "%08x %s\n", crc32.Checksum(record, castagnoli), record)
}

func decode(line []byte) ([]byte, bool) {
	if len(line) < 10 || line[8] != ' ' {
		return nil, false
	}
	record := bytes.TrimSuffix(line[9:], []byte("\n"))
	return record, string(line[:8]) == fmt.Sprintf("%08x", crc32.Checksum(record, castagnoli))
}

// put gives a record its position and puts it in line for the disk. It does not
// wait: with no room in the line, the position stays empty.
func (s *Spool) put(r *wire.LogRecord) {
	s.enter.RLock()
	defer s.enter.RUnlock()
	if s.closed {
		return
	}
	s.numbers.Lock()
	defer s.numbers.Unlock()
	r.Position = s.next
	s.next++
	select {
	case s.waiting <- r:
	default:
	}
}

// run writes what is in line until the spool is closed.
func (s *Spool) run() {
	defer close(s.done)
	tick := time.NewTicker(syncEvery)
	defer tick.Stop()
	dirty := false
	for {
		select {
		case r, ok := <-s.waiting:
			if !ok {
				return
			}
			s.mu.Lock()
			s.broken = s.write(r)
			s.mu.Unlock()
			dirty = true
		case <-tick.C:
			s.mu.Lock()
			f := s.file
			s.mu.Unlock()
			if dirty && f != nil {
				_ = f.Sync() // a failure shows at the next write; what is lost is counted
			}
			dirty = false
		}
	}
}

// write appends a record to the newest segment. One that cannot be written is
// lost. The caller holds the lock.
func (s *Spool) write(r *wire.LogRecord) error {
	record, err := json.Marshal(r)
	if err != nil {
		return err
	}
	line := encode(record)
	if len(line) > maxLine { // the network would refuse all that goes with it
		return nil
	}
	if s.file == nil || s.size+int64(len(line)) > segmentSize {
		if err := s.rotate(r.Position); err != nil {
			return err
		}
	}
	if _, err := s.file.Write(line); err != nil {
		// Half a line would hide those that follow it.
		if err := s.file.Truncate(s.size); err != nil {
			_ = s.file.Close() // the error says more
			s.file = nil
		}
		return err
	}
	failpoint.Here("spool.record.written")
	s.size += int64(len(line))
	s.last = r.Position
	return nil
}

// rotate begins a segment, and removes the oldest ones.
func (s *Spool) rotate(first uint64) error {
	for len(s.segments) >= segments {
		if err := os.Remove(s.path(s.segments[0])); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		s.segments = s.segments[1:]
	}
	f, err := os.OpenFile(s.path(first), os.O_CREATE|os.O_TRUNC|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	if s.file != nil {
		_ = s.file.Close() // what it could not write is found missing when it is read
	}
	s.file, s.size = f, 0
	if len(s.segments) == 0 || s.segments[len(s.segments)-1] != first {
		s.segments = append(s.segments, first)
	}
	return nil
}

// Batch is what the network does not have yet, or the beginning of it.
type Batch struct {
	Spool       string
	After, Last uint64
	Count       uint64
	Data        []byte // see [wire.Logs]
}

// Next returns the next batch of at most limit bytes, or nil when the network has
// everything that is on disk.
func (s *Spool) Next(limit int) (*Batch, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	b := &Batch{Spool: s.mark.Spool, After: s.mark.Position}
	p := wire.NewPacker(limit)
	for i, first := range s.segments {
		if i+1 < len(s.segments) && s.segments[i+1] <= b.After+1 {
			continue // all of it has been acknowledged
		}
		full := false
		err := s.scan(first, func(n uint64, line []byte, _ int64) bool {
			if n <= max(b.After, b.Last) {
				return true
			}
			var r wire.LogRecord
			if json.Unmarshal(line, &r) != nil || r.Check() != nil {
				return true // not by this version of the agent; the network would refuse all
			}
			if !p.Add(line) {
				full = true
				return false
			}
			b.Last, b.Count = n, b.Count+1
			return true
		})
		if err != nil {
			return nil, err
		}
		if full {
			break
		}
	}
	if b.Count == 0 {
		return nil, nil
	}
	b.Data = p.Data()
	return b, nil
}

// Recent returns the last records on disk, JSON by the line, of at most limit
// bytes, also those that the network has.
func (s *Spool) Recent(limit int) ([]byte, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []byte
	for i := len(s.segments) - 1; i >= 0 && len(out) < limit; i-- {
		var b []byte
		if err := s.scan(s.segments[i], func(_ uint64, line []byte, _ int64) bool {
			var r wire.LogRecord
			if json.Unmarshal(line, &r) == nil && r.Check() == nil {
				b = append(append(b, line...), '\n')
			}
			return true
		}); err != nil {
			return nil, err
		}
		out = append(b, out...)
	}
	if over := len(out) - limit; over > 0 {
		out = out[over:]
		out = out[bytes.IndexByte(out, '\n')+1:] // of the first one the beginning is missing
	}
	return out, nil
}

// Ack notes that the network has everything up to a position of a spool. What it
// says of another spool, or of positions that were never written, is ignored.
func (s *Spool) Ack(spool string, position uint64) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if spool != s.mark.Spool || position <= s.mark.Position || position > s.last {
		return nil
	}
	m := mark{spool, position}
	if err := s.writeMark(m); err != nil {
		return err
	}
	s.mark = m
	return nil
}

// Stats is the state of a spool.
type Stats struct {
	Position uint64 // up to which the network has everything
	Last     uint64 // position of the last record on disk
	Written  uint64 // position of the last record that was logged
	Err      error  // why nothing can be written, or nil
}

// Stats returns the state.
func (s *Spool) Stats() Stats {
	s.numbers.Lock()
	next := s.next
	s.numbers.Unlock()
	s.mu.Lock()
	defer s.mu.Unlock()
	return Stats{Position: s.mark.Position, Last: s.last, Written: next - 1, Err: s.broken}
}

// Close writes what is in line, and closes the files. What is logged afterwards
// is not kept.
func (s *Spool) Close() error {
	s.enter.Lock()
	if s.closed {
		s.enter.Unlock()
		return nil
	}
	s.closed = true
	close(s.waiting)
	s.enter.Unlock()
	<-s.done
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.file == nil {
		return nil
	}
	err := errors.Join(s.file.Sync(), s.file.Close())
	s.file = nil
	return err
}
