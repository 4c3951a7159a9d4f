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
// out before it is removed. A record of which one byte was changed is as a rule
// found again, by trying: its checksum of 64 bits tells.
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
	// Known has the subjects that JetStream knew of when it met damage, or nil. It may
	// have cut a block off, and then they are all that is left of its messages.
	Known map[string]uint64
	// Fits says whether a message can be one of this stream; with nil for the
	// message, whether a subject can.
	Fits func(subject, message []byte) bool
}

// Damage is a part of a block that is not what was written.
type Damage struct {
	Stream  string
	Block   uint32
	Offset  int
	Bytes   []byte // as they were found
	Seq     uint64 // the message's number, or 0
	Subject string // or "" where it cannot be read
	Kind    Kind
}

// Kind is what became of damage.
type Kind int

const (
	Lost       Kind = iota // the message is gone
	Mended                 // it is what it was
	Restored               // likewise, from a copy
	Superseded             // it is gone, and a later one of its subject is there
	Cut                    // the last write did not come to its end
)

func (k Kind) String() string {
	return [...]string{"lost", "mended", "restored", "superseded", "cut"}[k]
}

// Report is what [Stream.Mend] found.
type Report struct {
	Bytes  int64
	Damage []Damage // without Bytes
}

func (s *Stream) msgs() string { return filepath.Join(s.Dir, "msgs") }

func (s *Stream) file(block uint32) string {
	return filepath.Join(s.msgs(), fmt.Sprintf("%d.blk", block))
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
		if n, err := strconv.ParseUint(name, 10, 32); err == nil {
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
	kind     Kind
	as       []byte // what it is written as; nil for what it is
}

// parse takes a block apart. clean says that there is nothing to be mended. Without
// try nothing is, and what could be is lost.
func (s *Stream) parse(b []byte, h *hasher, try, last bool) (list []chunk, clean bool) {
	clean = true
	budget := resyncShare * int64(len(b))
	ends := map[int]int{}
	at := func(i int) int { // where the record ends that begins at i, or 0
		if end, ok := ends[i]; ok {
			return end
		}
		end := 0
		if n, ok := frame(b[i:]); ok {
			if budget -= int64(n); budget >= 0 {
				if r, is := h.read(b[i:i+n], s.Fits); is == good && (!r.live() || s.Fits(r.subject, nil)) {
					end = i + n
				}
			}
		}
		ends[i] = end
		return end
	}
	for i := 0; i < len(b); {
		n, framed := frame(b[i:])
		if framed {
			if r, is := h.read(b[i:i+n], s.Fits); is != bad {
				c := chunk{from: i, to: i + n, r: r}
				if is == other {
					c.kind, c.as, clean = Mended, h.encode(r), false
				}
				list = append(list, c)
				i += n
				continue
			}
		}
		clean = false
		c := chunk{from: i, kind: Lost}
		if framed && (i+n == len(b) || at(i+n) > 0) {
			c.to = i + n
		} else {
			c.to = resync(len(b), i, at)
		}
		if try {
			if r := h.mend(b[i:c.to], s.Fits); r != nil {
				c.r, c.kind, c.as = r, Mended, h.encode(r)
			}
		}
		if c.r == nil && last && c.to == len(b) && !framed && cut(b[i:]) {
			c.kind = Cut
		}
		list = append(list, c)
		i = c.to
	}
	return list, clean
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

// resyncShare bounds what is hashed in search of the next record, in sizes of the block.
const resyncShare = 64

// resync finds where the records of n bytes go on behind the one at i, of which it is
// not known how long it is. A message may hold what looks like records; but these do
// not go on to the end, as those behind it do.
func resync(n, i int, at func(int) int) int {
	first, seen := n, map[int]bool{}
	for j := i + least; j <= n-least; j++ {
		if seen[j] || at(j) == 0 {
			continue
		}
		end := j
		for end < n {
			seen[end] = true
			next := at(end)
			if next == 0 {
				break
			}
			end = next
		}
		if end == n {
			return j
		}
		first = min(first, j)
	}
	return first
}

// Verify reads one block and says whether it is what was written. It may be written
// to meanwhile.
func (s *Stream) Verify(block uint32, last bool) (n int64, ok bool, err error) {
	b, err := os.ReadFile(s.file(block))
	if err != nil {
		return 0, errors.Is(err, fs.ErrNotExist), ignore(err, fs.ErrNotExist)
	}
	budget := int64(math.MaxInt64)
	h := newHasher(s.Name, block, &budget)
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
	budget := int64(math.MaxInt64)
	for i, block := range list {
		b, err := os.ReadFile(s.file(block))
		if err != nil {
			return ignore(err, fs.ErrNotExist)
		}
		name := filepath.Join(s.Spare, fmt.Sprintf("%d.blk", block))
		if old, err := os.ReadFile(name); err == nil && bytes.Equal(old, b) {
			continue
		}
		if _, clean := s.parse(b, newHasher(s.Name, block, &budget), false, i == len(list)-1); !clean {
			continue
		}
		if err := s.keep(name, b); err != nil {
			return err
		}
	}
	spare, err := blocksIn(s.Spare)
	for _, block := range spare {
		if !slices.Contains(list, block) { // all of it is superseded
			err = errors.Join(err, os.Remove(filepath.Join(s.Spare, fmt.Sprintf("%d.blk", block))))
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
