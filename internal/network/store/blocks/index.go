package blocks

import (
	"crypto/sha256"
	"encoding/binary"

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
	blocks   []uint32
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
		block := next()
		skip(5) // bytes, first number, its time, last number, its time
		deleted := next()
		skip(2) // messages with a lifetime, and with a schedule
		if deleted > 0 {
			_, size, err := avl.Decode(b)
			if err != nil {
				return nil
			}
			b = b[size:]
		}
		m.blocks = append(m.blocks, uint32(block))
	}
	if !ok {
		return nil
	}
	return m
}
