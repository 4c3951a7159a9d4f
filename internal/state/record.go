package state

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"hash/crc32"
	"time"

	bolt "go.etcd.io/bbolt"

	"github.com/resultity/node/internal/receipt"
	"github.com/resultity/node/internal/wire"
)

// A record is a job or a result as the file holds it:
//
//	CRC-32C of what follows   4 bytes
//	time it was made          8 bytes, Unix milliseconds
//	length of the header      4 bytes
//	header                    JSON, without the bytes of request or response
//	body                      request or response, as it is
//
// Numbers are big-endian. The checksum is ours because bbolt has none on its
// data pages, and a request or a response with a flipped bit would be found out
// only by the network, again and again.
const recordPrefix = 4 + 8 + 4

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func encodeRecord(now time.Time, header any, body []byte) ([]byte, error) {
	h, err := json.Marshal(header)
	if err != nil {
		return nil, err
	}
	b := make([]byte, 4, recordPrefix+len(h)+len(body))
	b = binary.BigEndian.AppendUint64(b, uint64(now.UnixMilli()))
	b = binary.BigEndian.AppendUint32(b, uint32(len(h)))
	b = append(append(b, h...), body...)
	binary.BigEndian.PutUint32(b, crc32.Checksum(b[4:], castagnoli))
	return b, nil
}

// decodeRecord checks a record, fills header, and returns a copy of the body:
// b is the database's memory and ends with the transaction.
func decodeRecord(b []byte, header any) (body []byte, err error) {
	if len(b) < recordPrefix {
		return nil, fmt.Errorf("%w: a record of %d bytes", ErrCorrupt, len(b))
	}
	if crc32.Checksum(b[4:], castagnoli) != binary.BigEndian.Uint32(b) {
		return nil, fmt.Errorf("%w: wrong checksum of a record", ErrCorrupt)
	}
	rest := b[recordPrefix:]
	n := binary.BigEndian.Uint32(b[12:])
	if uint64(n) > uint64(len(rest)) {
		return nil, fmt.Errorf("%w: a record's header is longer than the record", ErrCorrupt)
	}
	if err := json.Unmarshal(rest[:n], header); err != nil {
		return nil, fmt.Errorf("%w: a record's header: %w", ErrCorrupt, err)
	}
	if body = rest[n:]; len(body) == 0 {
		return nil, nil
	}
	return append([]byte(nil), body...), nil
}

func recordTime(b []byte) time.Time {
	if len(b) < recordPrefix {
		return time.Time{}
	}
	return timeOf(b[4:])
}

// content is a record without checksum and time: what makes two results equal.
func content(b []byte) []byte {
	if len(b) < recordPrefix {
		return nil
	}
	return b[12:]
}

func encodeJob(now time.Time, j *wire.Job) ([]byte, error) {
	h := *j
	h.Request = nil
	return encodeRecord(now, h, j.Request)
}

func decodeJob(b []byte) (*wire.Job, error) {
	j := new(wire.Job)
	var err error
	if j.Request, err = decodeRecord(b, j); err != nil {
		return nil, err
	}
	return j, nil
}

func encodeResult(now time.Time, r *wire.Result) ([]byte, error) {
	h := *r
	h.Response = nil
	return encodeRecord(now, h, r.Response)
}

// decodeResult also checks the receipt's signature: [receipt.Signed] has no
// other way to be read.
func decodeResult(b []byte) (*wire.Result, error) {
	r := new(wire.Result)
	var err error
	if r.Response, err = decodeRecord(b, r); err != nil {
		return nil, err
	}
	return r, nil
}

func putRecord(b *bolt.Bucket, key, rec []byte) error {
	own, err := b.CreateBucket(key)
	if err != nil {
		return err
	}
	return own.Put(keyRecord, rec)
}

// getRecord returns memory of the database, and nil where there is no record.
func getRecord(b *bolt.Bucket, key []byte) []byte {
	own := b.Bucket(key)
	if own == nil {
		return nil
	}
	return own.Get(keyRecord)
}

// entry is what the bucket known says of a job id.
type entry struct {
	state   Known  // Running, Done or Settled
	receipt bool   // of Done: the result carries a receipt
	seq     uint64 // of Done: in outbox; of Settled: in settled
	size    int64  // of Running and Done: bytes of the record
}

const entrySize = 1 + 1 + 8 + 8

func putEntry(tx *bolt.Tx, id receipt.JobID, e entry) error {
	b := make([]byte, 2, entrySize)
	b[0] = byte(e.state)
	if e.receipt {
		b[1] = 1
	}
	b = binary.BigEndian.AppendUint64(b, e.seq)
	b = binary.BigEndian.AppendUint64(b, uint64(e.size))
	return tx.Bucket(bucketKnown).Put(id[:], b)
}

func lookup(tx *bolt.Tx, id receipt.JobID) (entry, bool) {
	b := tx.Bucket(bucketKnown).Get(id[:])
	if len(b) != entrySize { // Open has checked those that are there
		return entry{}, false
	}
	return entry{
		state: Known(b[0]), receipt: b[1] == 1,
		seq: binary.BigEndian.Uint64(b[2:]), size: int64(binary.BigEndian.Uint64(b[10:])),
	}, true
}

func number(n uint64) []byte { return binary.BigEndian.AppendUint64(nil, n) }

func fromNumber(b []byte) uint64 { return binary.BigEndian.Uint64(b) }

func timeOf(b []byte) time.Time { return time.UnixMilli(int64(binary.BigEndian.Uint64(b))) }
