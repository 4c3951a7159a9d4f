package blocks

import (
	"crypto/sha256"
	"encoding/binary"
	"slices"

	"github.com/minio/highwayhash"
	"github.com/nats-io/nats-server/v2/server/avl"
)

const (
	// indexName is what JetStream writes down of a stream at the end of a run, and now
	// and then before, so that it need not read the blocks.
	indexName    = "index.db"
	indexMagic   = 11
	indexVersion = 4
)

// Memory is what JetStream remembers of a stream.
type Memory struct {
	Last     uint64          // the highest number that it has given
	Subjects map[string]bool // those that have messages
	blocks   []span
	written  uint64 // the highest number when it was written down; the blocks are of then
}

// span is which messages JetStream had in a block.
type span struct {
	block       uint32
	first, last uint64
	deleted     *avl.SequenceSet // between them; nil for none
}

// has says whether there was a message of a number, as far as is known.
func (m *Memory) has(n uint64) bool {
	return n > m.written || slices.ContainsFunc(m.blocks, func(b span) bool {
		return b.first <= n && n <= b.last && (b.deleted == nil || !b.deleted.Exists(n))
	})
}

// whole says that a file with its HighwayHash behind it is what was written, and
// returns it without. name is that of the stream.
func whole(b []byte, name string) ([]byte, bool) {
	if len(b) < sumSize {
		return nil, false
	}
	key := sha256.Sum256([]byte(name))
	n := len(b) - sumSize
	return b[:n], highwayhash.Sum64(b[:n], key[:]) == binary.LittleEndian.Uint64(b[n:])
}

// indexed returns the checksum of the last record that an index knows of.
func indexed(b []byte, name string) (sum [sumSize]byte, ok bool) {
	b, ok = whole(b, name)
	if !ok || len(b) < 2+sumSize || b[0] != indexMagic || b[1] != indexVersion {
		return sum, false
	}
	return [sumSize]byte(b[len(b)-sumSize:]), true
}

// readIndex returns what an index says, or nil if it is not whole.
func readIndex(b []byte, name string) *Memory {
	if _, ok := indexed(b, name); !ok {
		return nil
	}
	b = b[2 : len(b)-sumSize]
	ok := true
	next := func() uint64 {
		v, n := binary.Uvarint(b)
		if n <= 0 {
			ok = false
			return 0
		}
		b = b[n:]
		return v
	}
	skip := func(fields int) {
		for range fields {
			next()
		}
	}
	m := &Memory{Subjects: map[string]bool{}}
	skip(4) // messages, bytes, first number, its time
	m.Last = next()
	m.written = m.Last
	skip(1) // its time
	for n := next(); ok && n > 0; n-- {
		size := next()
		if size > uint64(len(b)) {
			return nil
		}
		m.Subjects[string(b[:size])] = true
		b = b[size:]
		skip(3) // messages, first block, last block
	}
	for n := next(); ok && n > 0; n-- {
		x := span{block: uint32(next())}
		skip(1) // bytes
		x.first = next()
		skip(1) // its time
		x.last = next()
		skip(1) // its time
		deleted := next()
		skip(2) // messages with a lifetime, and with a schedule
		if deleted > 0 {
			set, size, err := avl.Decode(b)
			if err != nil {
				return nil
			}
			x.deleted, b = set, b[size:]
		}
		m.blocks = append(m.blocks, x)
	}
	if !ok {
		return nil
	}
	return m
}
