package state

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"time"
	"unicode/utf8"

	"github.com/resultity/node/internal/receipt"
	"github.com/resultity/node/internal/wire"
)

// A job or a result lies in the log as
//
//	CRC-32 of what follows    4 bytes, by IEEE's polynomial
//	time it was made          8 bytes, Unix milliseconds
//	length of the header      4 bytes
//	header                    JSON, without the bytes of the body; a result's as in a frame
//	body                      request, response or a failure's message, as it is
//
// Numbers are big-endian. It has a checksum beside that of its frame, since it
// is read again, alone, long after the log was checked; and by another polynomial, so
// that a change by which the frame's would be right again is not right for both.
const textPrefix = 4 + 8 + 4

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func encodeText(now time.Time, header, body []byte) []byte {
	b := append(beginText(len(header)+len(body)), header...)
	return endText(now, b, body)
}

// beginText is where a header of about size bytes, with the body, is appended to.
func beginText(size int) []byte { return make([]byte, textPrefix, textPrefix+size) }

// endText completes what begins with a header.
func endText(now time.Time, b, body []byte) []byte {
	binary.BigEndian.PutUint64(b[4:], uint64(now.UnixMilli()))
	binary.BigEndian.PutUint32(b[12:], uint32(len(b)-textPrefix))
	b = append(b, body...)
	binary.BigEndian.PutUint32(b, crc32.ChecksumIEEE(b[4:]))
	return b
}

// decodeText checks b, and returns header and body, which are parts of it.
func decodeText(b []byte) (header, body []byte, err error) {
	if !sound(b) {
		return nil, nil, fmt.Errorf("%w: wrong checksum of a record of %d bytes", ErrCorrupt, len(b))
	}
	rest := b[textPrefix:]
	n := binary.BigEndian.Uint32(b[12:])
	if uint64(n) > uint64(len(rest)) {
		return nil, nil, fmt.Errorf("%w: a record's header is longer than the record", ErrCorrupt)
	}
	if header, body = rest[:n], rest[n:]; len(body) == 0 {
		body = nil
	}
	return header, body, nil
}

func headerError(err error) error { return fmt.Errorf("%w: a record's header: %w", ErrCorrupt, err) }

// sound reports whether b is as it was made.
func sound(b []byte) bool {
	return len(b) >= textPrefix && crc32.ChecksumIEEE(b[4:]) == binary.BigEndian.Uint32(b)
}

func textTime(b []byte) int64 { return int64(binary.BigEndian.Uint64(b[4:])) }

// content is a text without checksum and time: what makes two results equal.
func content(b []byte) []byte { return b[12:] }

// encodeJob fails for a job that [decodeJob] would not make again.
func encodeJob(now time.Time, j *wire.Job) ([]byte, error) {
	switch {
	case j.ID == receipt.JobID{}:
		return nil, errors.New("it has no id")
	case !utf8.ValidString(j.Model), !utf8.ValidString(string(j.Kind)):
		return nil, fmt.Errorf("model %.80q, kind %.80q: want UTF-8", j.Model, j.Kind)
	}
	h := *j
	h.Request = nil
	header, err := json.Marshal(h)
	if err != nil {
		return nil, err
	}
	return encodeText(now, header, j.Request), nil
}

func decodeJob(b []byte) (*wire.Job, error) {
	header, body, err := decodeText(b)
	if err != nil {
		return nil, err
	}
	j := new(wire.Job)
	if err := json.Unmarshal(header, j); err != nil {
		return nil, headerError(err)
	}
	j.Request = body
	return j, nil
}

// resultHeader is about the bytes of a result's header.
const resultHeader = 3 << 10

// encodeResult puts a failure's message where an answer's bytes are, so that it
// takes no more room than it has bytes. It fails for a result that [decodeResult]
// would not make again.
func encodeResult(now time.Time, r *wire.Result) ([]byte, error) {
	switch {
	case r.Code == "" && r.Message != "":
		return nil, errors.New("it has a message and no code")
	case r.Code != "" && (len(r.Response) > 0 || r.Receipt != nil):
		return nil, fmt.Errorf("it has code %.80q, and a response or a receipt", r.Code)
	case !utf8.ValidString(string(r.Code)):
		return nil, fmt.Errorf("code %.80q: want UTF-8", r.Code)
	}
	h, body := *r, r.Response
	h.Response = nil
	if r.Code != "" {
		h.Message, body = "", []byte(r.Message)
	}
	b, err := h.AppendJSON(beginText(resultHeader + len(body)))
	if err != nil {
		return nil, err
	}
	return endText(now, b, body), nil
}

func decodeResult(b []byte) (*wire.Result, error) {
	header, body, err := decodeText(b)
	if err != nil {
		return nil, err
	}
	r := new(wire.Result)
	if err := r.ParseJSON(header); err != nil {
		return nil, headerError(err)
	}
	if r.Code != "" {
		r.Message = string(body)
	} else {
		r.Response = body
	}
	return r, nil
}

// kind says what a record of the log means. Numbers in it are big-endian.
type kind byte

const (
	kindJob        kind = 'j' // id, text: the job is accepted
	kindResult     kind = 'r' // id, number u64, 1 if it carries a receipt, text: the job is finished
	kindSettled    kind = 's' // settlements: the results are not needed, the ids are remembered
	kindDropped    kind = 'd' // ids: as if the jobs had never been
	kindForget     kind = 'f' // number u64: settlements up to it are forgotten
	kindOldest     kind = 'o' // number u64: segments before it hold nothing that counts
	kindRegistered kind = 'g' // JSON of the registration
	kindLeaves     kind = 'l' // see [leaves]: the receipt log has gained them, or they were copied
	kindAdopted    kind = 'a' // likewise: the receipt log is that before them, and them
	kindAcked      kind = 'k' // number u64: of how many receipts the network has the log
	kindClosed     kind = 'c' // nothing: whatever is before it was synced
	kindLost       kind = 'x' // anything: here was what could not be read any more
	kindBlind      kind = 'b' // Unix milliseconds: what was known of jobs made up to then is not known any more
)

const (
	idSize       = 16
	jobPrefix    = idSize
	resultPrefix = idSize + 8 + 1
	itemSize     = idSize + 8 + 8 // a settlement: id, number, time

	recordHead = 1 + 4 // kind, length of what follows
)

var _ = [idSize]byte(receipt.JobID{})

// item is a result in the order of finishing, or a settled id in the order of
// settling.
type item struct {
	id   receipt.JobID
	num  uint64
	time int64 // Unix milliseconds
}

func appendItem(b []byte, i item) []byte {
	b = append(b, i.id[:]...)
	b = binary.BigEndian.AppendUint64(b, i.num)
	return binary.BigEndian.AppendUint64(b, uint64(i.time))
}

func readItem(b []byte) item {
	return item{receipt.JobID(b), binary.BigEndian.Uint64(b[idSize:]), int64(binary.BigEndian.Uint64(b[idSize+8:]))}
}

// eachRecord walks through the payload of a frame. at is the offset of body in
// it. It fails where the payload is not made of records, or f does.
func eachRecord(payload []byte, f func(k kind, at int, body []byte) error) error {
	for at := 0; at < len(payload); {
		if len(payload)-at < recordHead {
			return fmt.Errorf("a record's head is cut short")
		}
		k, n := kind(payload[at]), binary.BigEndian.Uint32(payload[at+1:])
		at += recordHead
		if uint64(n) > uint64(len(payload)-at) {
			return fmt.Errorf("a record is longer than its frame")
		}
		body := payload[at : at+int(n) : at+int(n)]
		if err := checkBody(k, body); err != nil {
			return err
		}
		if err := f(k, at, body); err != nil {
			return err
		}
		at += int(n)
	}
	return nil
}

func checkBody(k kind, body []byte) error {
	ok := false
	switch n := len(body); k {
	case kindJob:
		ok = n >= jobPrefix+textPrefix
	case kindResult:
		ok = n >= resultPrefix+textPrefix && body[resultPrefix-1] <= 1
	case kindSettled:
		ok = n > 0 && n%itemSize == 0
	case kindDropped:
		ok = n > 0 && n%idSize == 0
	case kindForget, kindOldest, kindAcked, kindBlind:
		ok = n == 8
	case kindLeaves, kindAdopted:
		_, ok = decodeLeaves(body)
	case kindRegistered:
		ok = json.Unmarshal(body, new(wire.Registered)) == nil
	case kindLost:
		ok = true
	case kindClosed:
		ok = n == 0
	}
	if !ok {
		return fmt.Errorf("a record of kind %q with %d bytes", byte(k), len(body))
	}
	return nil
}
