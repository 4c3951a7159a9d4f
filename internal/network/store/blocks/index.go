package blocks

import (
	"crypto/sha256"
	"encoding/binary"

	"github.com/minio/highwayhash"
)

const (
	// indexName is what JetStream writes down of a stream at the end of a run, and now
	// and then before, so that it need not read the blocks.
	indexName    = "index.db"
	indexMagic   = 11
	indexVersion = 4
)

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
