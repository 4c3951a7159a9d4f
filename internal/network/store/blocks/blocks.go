// Package blocks reads and mends the files in which JetStream keeps the messages
// of a stream.
//
// JetStream verifies the checksum of a message when it reads it, and does nothing
// good with one that is damaged: it says that there is no such message, it stops
// taking writes, or it cuts the block's file off there, so that all that came behind
// is gone too. It is worst where no checksum is, in a record's lengths and its
// number: then it may read one message as another, or fill the memory. So files
// are read here before JetStream gets to see them.
//
// The rule it keeps: what can be read is kept, byte for byte; what cannot is handed
// out before it is removed, and stays until all else that follows from its loss is on
// disk. A record of which one byte was changed is as a rule found again, by
// trying: its checksum of 64 bits tells. What is not there at all is known by what
// JetStream remembers, see [Memory]: messages by their numbers, and in streams of which
// only the last message of a subject counts by their names.
//
// The format is that of the nats-server of go.mod, and the tests are about files
// that it has written.
package blocks

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// Stream says where a stream is, and what its messages look like.
type Stream struct {
	Name string
	Dir  string // its directory, which has msgs in it
	// Spare is a directory with older copies of blocks, see [Stream.Copy], or "".
	Spare string
	// Rescued is a directory with blocks from before JetStream cut them off, see
	// [Stream.Rescue], or "".
	Rescued string
	Meta    string // directory with a copy of the stream's configuration
	// Single says that of the messages of a subject only the last one counts.
	Single bool
	// Known is what JetStream knew of when it met damage, or nil. It may have cut a
	// block off, and then that is all that is left of its messages.
	Known *Memory
	// Closed says that it was closed well: no write of it was cut off.
	Closed bool
	// Fits says whether a message can be one of this stream; with nil for the
	// message, whether a subject can.
	Fits func(subject, message []byte) bool

	kept func() error // called behind each write, by tests
}

// Damage is a part of a block that is not what was written, or one that is gone.
type Damage struct {
	Stream string
	Block  uint32
	Offset int
	Bytes  []byte // as they were found
	// Older is the last whole record of the subject from before one that is lost. It goes
	// too: it must not be taken for the last one.
	Older     []byte
	Seq, Last uint64 // the numbers that its messages can have
	Subject   string // or "" where it cannot be read
	Kind      Kind

	place, older place
	sure         bool // Seq is the number of the message
}

// Kind is what became of damage.
type Kind int

const (
	Lost       Kind = iota // the message is gone
	Mended                 // it is what it was
	Restored               // likewise, from a copy
	Superseded             // it is gone, and was to be: it was deleted, or a later one of its subject is there
	Cut                    // the last write did not come to its end
)

func (k Kind) String() string {
	return [...]string{"lost", "mended", "restored", "superseded", "cut"}[k]
}

// Report is what [Stream.Mend] found.
type Report struct {
	Bytes  int64
	Damage []Damage // without Bytes and Older
	// Unread are the blocks of which the disk does not give all. Each is kept beside what
	// is left of it, under a name with .unreadable behind.
	Unread []uint32
}

func (s *Stream) msgs() string { return filepath.Join(s.Dir, "msgs") }

func (s *Stream) file(block uint32) string { return blockIn(s.msgs(), block) }

// blockIn names a block in a directory.
func blockIn(dir string, block uint32) string {
	return filepath.Join(dir, fmt.Sprintf("%d.blk", block))
}

// blocksIn lists the numbers of the blocks in a directory.
func blocksIn(dir string) (list []uint32, err error) {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	for _, e := range entries {
		name, ok := strings.CutSuffix(e.Name(), ".blk")
		if !ok {
			continue
		}
		if n, err := strconv.ParseUint(name, 10, 32); err == nil && strconv.FormatUint(n, 10) == name {
			list = append(list, uint32(n))
		}
	}
	slices.Sort(list)
	return list, err
}

// Blocks lists the numbers of the stream's blocks. The last one is written to.
func (s *Stream) Blocks() ([]uint32, error) { return blocksIn(s.msgs()) }

// Size is how many bytes the blocks have.
func (s *Stream) Size() (n int64) {
	list, _ := s.Blocks() // whoever reads them fails then
	for _, block := range list {
		if st, err := os.Stat(s.file(block)); err == nil {
			n += st.Size()
		}
	}
	return n
}

// Settled says that the stream was closed well, so that JetStream will not read it
// as a whole.
func (s *Stream) Settled() bool {
	list, err := s.Blocks()
	if err != nil || len(list) == 0 {
		return false
	}
	raw, err := os.ReadFile(filepath.Join(s.msgs(), indexName))
	if err != nil {
		return false
	}
	want, ok := indexed(raw, s.Name)
	if !ok {
		return false
	}
	f, err := os.Open(s.file(list[len(list)-1]))
	if err != nil {
		return false
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil || st.Size() < sumSize {
		return err == nil && want == [sumSize]byte{}
	}
	var sum [sumSize]byte
	_, err = f.ReadAt(sum[:], st.Size()-sumSize)
	return err == nil && sum == want
}

// chunk is a part of a block.
type chunk struct {
	from, to int
	r        *record // nil for what cannot be read
	kind     Kind    // of what cannot be read
	as       []byte  // what it was before it was damaged; nil where it was not
}

// allWhole says that chunks are what was written.
func allWhole(list []chunk) bool {
	return !slices.ContainsFunc(list, func(c chunk) bool { return c.r == nil || c.as != nil })
}

// parse takes a block apart. before is the highest number of the blocks before it. Without
// try nothing is mended, and what could be is lost. With torn its end may be that of
// a write that was cut off.
func (s *Stream) parse(b []byte, h *hasher, try bool, before uint64, torn bool) (list []chunk) {
	f := &finder{s: s, h: h, b: b, budget: resyncShare * int64(len(b)), ends: map[int]int{}}
	for i := 0; i < len(b); {
		n, framed := frame(b[i:])
		if framed {
			if r, is := h.read(b[i:i+n], s.Fits); is != bad {
				c := chunk{from: i, to: i + n, r: r}
				if is == other {
					c.as = h.encode(r)
				}
				if r.seq&tombstoneBit == 0 {
					before = max(before, r.number())
				}
				list = append(list, c)
				i += n
				continue
			}
		}
		c := chunk{from: i, kind: Lost}
		if framed && (i+n == len(b) || f.end(i+n) > 0 || f.head(i) > 0 && f.head(i+n) > 0) {
			c.to = i + n
		} else {
			c.to = f.resync(i+least, before)
		}
		if try {
			if r := h.mend(b[i:c.to], s.Fits); r != nil {
				c.r, c.as = r, h.encode(r)
			}
		}
		if c.r == nil && torn && c.to == len(b) && !framed && cut(b[i:]) {
			c.kind = Cut
		}
		list = append(list, c)
		i = c.to
	}
	return list
}

// cut says that b is the beginning of a record, or what a file system shows of
// one that did not get to the disk.
func cut(b []byte) bool {
	if len(b) < least {
		return true
	}
	n := int(binary.LittleEndian.Uint32(b) &^ headerBit)
	return n > len(b) && n <= most || !slices.ContainsFunc(b, func(x byte) bool { return x != 0 })
}

// finder finds where records go on behind one of which it is not known how long it is.
type finder struct {
	s      *Stream
	h      *hasher
	b      []byte
	budget int64       // bytes that may still be hashed for nothing
	ends   map[int]int // of what was hashed: where the record ends, or 0
}

// resyncShare bounds what is hashed for nothing, in sizes of the block.
const resyncShare = 64

// head returns how long the record is that begins at i by its lengths and its subject, or 0.
func (f *finder) head(i int) int {
	n, ok := frame(f.b[i:])
	if !ok {
		return 0
	}
	b := f.b[i : i+n]
	slen := int(binary.LittleEndian.Uint16(b[20:]))
	r := record{seq: binary.LittleEndian.Uint64(b[4:])}
	if r.live() != (slen > 0) || r.live() && !f.s.Fits(b[headSize:headSize+slen], nil) {
		return 0
	}
	return n
}

// end returns where the whole record ends that begins at i, or 0.
func (f *finder) end(i int) int {
	n := f.head(i)
	if n == 0 {
		return 0
	}
	end, ok := f.ends[i]
	if ok || f.budget < 0 {
		return end
	}
	if _, is := f.h.read(f.b[i:i+n], f.s.Fits); is == good {
		end = i + n
	} else {
		f.budget -= int64(n)
	}
	f.ends[i] = end
	return end
}

// chain is whole records, one behind the other.
type chain struct{ from, to int }

// next returns the first chain from i on; there is none at the end.
func (f *finder) next(i int) chain {
	for ; i <= len(f.b)-least; i++ {
		if to := f.end(i); to > 0 {
			c := chain{i, to}
			for to > 0 {
				c.to, to = to, f.end(to)
			}
			return c
		}
	}
	return chain{len(f.b), len(f.b)}
}

// numbers are the lowest and the highest one of the messages of a chain.
func (f *finder) numbers(c chain) (low, high uint64) {
	low = math.MaxUint64
	for i := c.from; i < c.to; i = f.ends[i] {
		if r := (record{seq: binary.LittleEndian.Uint64(f.b[i+4:])}); r.seq&tombstoneBit == 0 {
			low, high = min(low, r.number()), max(high, r.number())
		}
	}
	return low, high
}

// resync returns where records go on, from i on. The damaged message may hold what looks like
// records; but their numbers are not between those of the records around it.
func (f *finder) resync(i int, before uint64) int {
	for c := f.next(i); c.from < len(f.b); {
		after := f.next(c.to)
		low, high := f.numbers(c)
		if next, _ := f.numbers(after); low > before && high < next || high == 0 {
			return c.from
		}
		c = after
	}
	return f.next(i).from
}

// Verify reads one block and says whether it is what was written. It may be written
// to meanwhile.
func (s *Stream) Verify(block uint32, last bool) (n int64, ok bool, err error) {
	b, _, err := readBlock(s.file(block))
	if err != nil {
		return 0, errors.Is(err, fs.ErrNotExist), ignore(err, fs.ErrNotExist)
	}
	h := newHasher(s.Name, block, nil)
	for i := 0; i < len(b); {
		n, framed := frame(b[i:])
		if framed {
			if _, is := h.read(b[i:i+n], s.Fits); is == good {
				i += n
				continue
			}
		}
		return int64(len(b)), last && !framed && cut(b[i:]) && h.reframe(b[i:], s.Fits) == nil, nil
	}
	return int64(len(b)), true, nil
}

// Copy copies the blocks that are whole and have changed to the spare ones.
func (s *Stream) Copy() error {
	list, err := s.Blocks()
	if err != nil {
		return err
	}
	for _, block := range list {
		b, _, err := readBlock(s.file(block))
		if err != nil {
			return ignore(err, fs.ErrNotExist)
		}
		name := blockIn(s.Spare, block)
		if old, err := os.ReadFile(name); err == nil && bytes.Equal(old, b) {
			continue
		}
		if !allWhole(s.parse(b, newHasher(s.Name, block, nil), false, 0, false)) {
			continue
		}
		if err := s.keep(name, b); err != nil {
			return err
		}
	}
	spare, err := blocksIn(s.Spare)
	for _, block := range spare {
		if !slices.Contains(list, block) { // all of it is superseded
			err = errors.Join(err, os.Remove(blockIn(s.Spare, block)))
		}
	}
	return err
}

func ignore(err, what error) error {
	if errors.Is(err, what) {
		return nil
	}
	return err
}
