package state

import (
	"crypto/rand"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"slices"
	"strconv"
	"strings"

	"github.com/resultity/node/internal/wire"
)

// The log is a row of segments, files that have their size from the beginning.
// A segment is
//
//	head     twice, in 4 KiB each: magic and version, each number below
//	frames   one after another, each at a multiple of 8 bytes
//
// and a frame, which is what one commit writes,
//
//	CRC-32C    4 bytes, of the segment's salt and all that follows
//	length     4 bytes, of the records
//	number     8 bytes, xor the salt; it rises by one from frame to frame through all segments
//	records    kind, length, body; see [kind]
//
// A frame is written when the one before it has been synced. So a last frame
// that a crash has torn, nobody was told of; and where a frame is wrong
// and a later one is right, something that was synced is damaged; see salvage.go.
// In the place of what could not be mended is a frame of one record, [kindLost],
// with the number of the last frame that was lost. Files are
// used again: the number and the salt, which is random, tell what an earlier
// use has left behind from frames, and no request can hold a forged one, nor what looks
// like one up to its checksum: a start that looks for frames would take hours over them.
const (
	segmentSize = 2 << 20
	maxSegment  = 1 << 30 // of one for a single large record
	headCopy    = 4 << 10
	headRoom    = 2 * headCopy
	frameHead   = 4 + 4 + 8
	frameAlign  = 8

	magic     = "resjobs\n"
	version   = 5
	headFixed = len(magic) + 4 + 4 + 4 + 4 // version, CRC of both, CRC and length of the rest
)

// head is the beginning of a segment: what is known without the segments before
// it.
type head struct {
	Number     uint64           `json:"number"` // of the segment
	Salt       uint64           `json:"salt"`
	Frame      uint64           `json:"frame"`     // number of the first frame
	Results    uint64           `json:"results"`   // last number of finishing
	Settled    uint64           `json:"settled"`   // last number of settling
	Forgotten  uint64           `json:"forgotten"` // settlements up to this one are forgotten
	Oldest     uint64           `json:"oldest"`    // segments before this one hold nothing that counts
	Acked      uint64           `json:"acked"`     // of how many receipts the network has the log
	Blind      int64            `json:"blind,omitempty"`
	Registered *wire.Registered `json:"registered,omitempty"`
}

// encode makes the head with its second copy.
func (h *head) encode() ([]byte, error) {
	body, err := json.Marshal(h)
	if err != nil {
		return nil, err
	}
	if len(body) > headCopy-headFixed {
		return nil, fmt.Errorf("a segment's head of %d bytes", len(body))
	}
	b := binary.BigEndian.AppendUint32([]byte(magic), version)
	b = binary.BigEndian.AppendUint32(b, crc32.Checksum(b, castagnoli))
	rest := append(binary.BigEndian.AppendUint32(nil, uint32(len(body))), body...)
	b = binary.BigEndian.AppendUint32(b, crc32.Checksum(rest, castagnoli))
	b = append(b, rest...)
	return append(append(b, make([]byte, headCopy-len(b))...), b...), nil
}

// decodeHead reads the head of segment n, from either copy. whole says that both are
// right.
func decodeHead(b []byte, n uint64) (h head, whole bool, err error) {
	if len(b) < headRoom {
		return h, false, fmt.Errorf("%w: %d bytes are no head", ErrCorrupt, len(b))
	}
	h, err = decodeCopy(b[:headCopy], n)
	other, err2 := decodeCopy(b[headCopy:headRoom], n)
	switch {
	case err == nil:
		return h, err2 == nil, nil
	case err2 == nil:
		return other, false, nil
	case errors.Is(err2, ErrFormat):
		return h, false, err2
	}
	return h, false, err
}

// decodeCopy reads a head. Another version has a checksum of its own, so that it can
// be told from damage.
func decodeCopy(b []byte, number uint64) (h head, err error) {
	if string(b[:len(magic)]) != magic {
		return h, fmt.Errorf("%w: it does not begin as a segment does", ErrCorrupt)
	}
	v := binary.BigEndian.Uint32(b[len(magic):])
	at := len(magic) + 4
	if crc32.Checksum(b[:at], castagnoli) != binary.BigEndian.Uint32(b[at:]) {
		return h, fmt.Errorf("%w: wrong checksum of the version", ErrCorrupt)
	}
	if v != version {
		return h, fmt.Errorf("%w: it has format %d, this agent knows %d", ErrFormat, v, version)
	}
	rest := b[at+8:]
	n := binary.BigEndian.Uint32(rest)
	if uint64(n) > uint64(len(rest)-4) || crc32.Checksum(rest[:4+n], castagnoli) != binary.BigEndian.Uint32(b[at+4:]) {
		return h, fmt.Errorf("%w: wrong checksum of the head", ErrCorrupt)
	}
	if err := json.Unmarshal(rest[4:4+n], &h); err != nil {
		return h, fmt.Errorf("%w: the head: %w", ErrCorrupt, err)
	}
	if h.Number != number || h.Frame == 0 || h.Oldest > number {
		return h, fmt.Errorf("%w: it says that it is segment %x, with frames from %d on and the log from %x on", ErrCorrupt, h.Number, h.Frame, h.Oldest)
	}
	return h, nil
}

// newSalt is unknown to whoever sends jobs.
func newSalt() uint64 {
	var b [8]byte
	_, _ = rand.Read(b[:]) // crypto/rand never fails: it ends the program instead
	// JSON numbers of other tools end at 2^53.
	return binary.BigEndian.Uint64(b[:]) >> 11
}

func frameSum(salt uint64, b []byte) uint32 {
	seed := crc32.Checksum(binary.BigEndian.AppendUint64(nil, salt), castagnoli)
	return crc32.Update(seed, castagnoli, b)
}

// sealFrame fills the head of b, a frame whose records are in place, and pads it.
func sealFrame(b []byte, salt, number uint64) []byte {
	binary.BigEndian.PutUint32(b[4:], uint32(len(b)-frameHead))
	putFrameNumber(b, salt, number)
	binary.BigEndian.PutUint32(b, frameSum(salt, b[4:]))
	return append(b, make([]byte, aligned(len(b))-len(b))...)
}

// frameNumber is the number of the frame that b begins with, if it is one.
func frameNumber(b []byte, salt uint64) uint64 { return binary.BigEndian.Uint64(b[8:]) ^ salt }

func putFrameNumber(b []byte, salt, number uint64) {
	binary.BigEndian.PutUint64(b[8:], number^salt)
}

func aligned[T int | int64](n T) T { return (n + frameAlign - 1) &^ (frameAlign - 1) }

// readFrame returns the records of the frame that b begins with, and its number.
func readFrame(b []byte, salt uint64) (payload []byte, number uint64, ok bool) {
	if len(b) < frameHead {
		return nil, 0, false
	}
	n := binary.BigEndian.Uint32(b[4:])
	if uint64(n) > uint64(len(b)-frameHead) {
		return nil, 0, false
	}
	end := frameHead + int(n)
	if frameSum(salt, b[4:end]) != binary.BigEndian.Uint32(b) {
		return nil, 0, false
	}
	return b[frameHead:end:end], frameNumber(b, salt), true
}

// laterFrame finds a frame in b that was written after the one of this number.
func laterFrame(b []byte, salt, number uint64) (at int, found bool) {
	most := number + uint64(len(b)/frameHead) + 1
	for at := 0; at+frameHead <= len(b); at += frameAlign {
		if n := frameNumber(b[at:], salt); n <= number || n > most {
			continue
		}
		if _, _, ok := readFrame(b[at:], salt); ok {
			return at, true
		}
	}
	return 0, false
}

// segment is an open segment.
type segment struct {
	head
	f    file // nil while there is none, see salvage.go
	size int64
	end  int64 // of its last frame
	live int64 // bytes of its records that count; guarded by Store.mu

	whole bool   // both copies of the head were right
	lost  uint64 // of one that takes the place of a lost one: number of the last frame of that
}

func segmentName(number uint64) string { return fmt.Sprintf("%016x.log", number) }

// segmentNumber reads such a name.
func segmentNumber(name string) (uint64, bool) {
	hex, _ := strings.CutSuffix(name, ".log")
	n, err := strconv.ParseUint(hex, 16, 64)
	return n, err == nil && n > 0 && segmentName(n) == name
}

func spareName(n int) string { return fmt.Sprintf("%d.spare", n) }

// spare is a file that waits to become a segment.
type spare struct {
	name string
	f    file
}

// makeFile makes a file of zeros whose bytes the disk has set aside: those of a
// segment are written only where they are, so that a sync has no length to
// write, and a full disk is met here.
func makeFile(d disk, name string, size int64) (_ file, err error) {
	f, err := d.create(name)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			_, _ = f.Close(), d.remove(name) // so that a full disk is not made fuller
		}
	}()
	zeros := make([]byte, 256<<10)
	for at := int64(0); at < size; at += int64(len(zeros)) {
		if _, err := f.WriteAt(zeros[:min(int64(len(zeros)), size-at)], at); err != nil {
			return nil, err
		}
	}
	if err := f.sync(); err != nil {
		return nil, err
	}
	return f, d.sync()
}

// scanned is how far the frames of a segment were read.
type scanned struct {
	end  int64  // of the last good frame
	last int64  // where that one begins, 0 for none
	next uint64 // number of the frame after it
}

// scan reads the frames of a segment's bytes in order, from where at is on. It ends at
// the first one that is not right. f must not keep body.
func scan(b []byte, salt uint64, at scanned, f func(k kind, at int64, body []byte)) scanned {
	for at.end < int64(len(b)) {
		payload, number, ok := readFrame(b[at.end:], salt)
		lost := ok && len(payload) > 0 && kind(payload[0]) == kindLost
		if !ok || number != at.next && !(lost && number > at.next) || !wellMade(payload) {
			break
		}
		from := at.end + frameHead
		_ = eachRecord(payload, func(k kind, off int, body []byte) error { f(k, from+int64(off), body); return nil }) // it is well made
		at = scanned{end: min(aligned(from+int64(len(payload))), int64(len(b))), last: at.end, next: number + 1}
	}
	return at
}

// frames is where a segment's frames begin.
func (h *head) frames() scanned { return scanned{end: headRoom, next: h.Frame} }

// readAll returns the content of f, in buf if that is large enough.
func readAll(f file, buf []byte) ([]byte, error) {
	n, err := f.size()
	if err != nil {
		return nil, err
	}
	if n < headRoom || n > maxSegment {
		return nil, fmt.Errorf("%w: %d bytes are not the size of a segment", ErrCorrupt, n)
	}
	b := slices.Grow(buf[:0], int(n))[:n]
	if _, err := f.ReadAt(b, 0); err != nil {
		return nil, err
	}
	return b, nil
}

func number(n uint64) []byte { return binary.BigEndian.AppendUint64(nil, n) }

func fromNumber(b []byte) uint64 { return binary.BigEndian.Uint64(b) }
