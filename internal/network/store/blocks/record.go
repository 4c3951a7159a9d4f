package blocks

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"fmt"

	"github.com/minio/highwayhash"
)

// A record is, in little-endian order:
//
//	length 4, its highest bit: there is a header
//	sequence 8, its two highest bits: erased, tombstone
//	time 8, subject's length 2, subject, [header's length 4, header], message
//	checksum 8: HighwayHash of sequence, time, subject, header and message
//
// The three lengths are under no checksum.
const (
	headSize = 22
	sumSize  = 8
	least    = headSize + sumSize
	most     = 32 << 20 // JetStream takes no longer one

	headerBit    = 1 << 31
	erasedBit    = 1 << 63
	tombstoneBit = 1 << 62

	longestSubject = 512
)

// record is one that could be read.
type record struct {
	seq     uint64 // with its bits
	time    int64
	subject []byte
	header  []byte // nil for none
	message []byte
}

// number is the sequence without its bits.
func (r *record) number() uint64 { return r.seq &^ (erasedBit | tombstoneBit) }

// live says that the record is a message, and not the mark of a deletion.
func (r *record) live() bool { return r.seq&(erasedBit|tombstoneBit) == 0 }

// hasher computes the checksums of one block.
type hasher struct {
	key    [32]byte
	budget *int64 // bytes that may still be hashed in search of something
	buf    []byte
}

func newHasher(stream string, block uint32, budget *int64) *hasher {
	return &hasher{key: sha256.Sum256(fmt.Appendf(nil, "%s-%d", stream, block)), budget: budget}
}

func (h *hasher) sum(parts ...[]byte) (sum [sumSize]byte) {
	h.buf = h.buf[:0]
	for _, p := range parts {
		h.buf = append(h.buf, p...)
	}
	binary.LittleEndian.PutUint64(sum[:], highwayhash.Sum64(h.buf, h.key[:]))
	return sum
}

// encode makes the record's bytes.
func (h *hasher) encode(r *record) []byte {
	n := least + len(r.subject) + len(r.message)
	length := uint32(n)
	if r.header != nil {
		n += 4 + len(r.header)
		length = uint32(n) | headerBit
	}
	b := make([]byte, headSize, n)
	binary.LittleEndian.PutUint32(b, length)
	binary.LittleEndian.PutUint64(b[4:], r.seq)
	binary.LittleEndian.PutUint64(b[12:], uint64(r.time))
	binary.LittleEndian.PutUint16(b[20:], uint16(len(r.subject)))
	b = append(b, r.subject...)
	if r.header != nil {
		b = binary.LittleEndian.AppendUint32(b, uint32(len(r.header)))
		b = append(b, r.header...)
	}
	b = append(b, r.message...)
	sum := h.sum(b[4:20], r.subject, r.header, r.message)
	return append(b, sum[:]...)
}

// state is how a record was found.
type state int

const (
	bad   state = iota
	other       // whole, but for one of its lengths, which is known now
	good
)

// frame returns the length of the record at the beginning of b, if it can be one.
func frame(b []byte) (n int, ok bool) {
	if len(b) < least {
		return 0, false
	}
	length := binary.LittleEndian.Uint32(b)
	n = int(length &^ headerBit)
	slen := int(binary.LittleEndian.Uint16(b[20:]))
	if length&headerBit != 0 {
		slen += 4
	}
	return n, n >= least+slen && n <= most && n <= len(b)
}

// read reads b, which is one whole record, whatever its length field says, except
// for its highest bit.
func (h *hasher) read(b []byte, fits func(subject, message []byte) bool) (*record, state) {
	if len(b) < least || len(b) > most {
		return nil, bad
	}
	length := binary.LittleEndian.Uint32(b)
	r := &record{seq: binary.LittleEndian.Uint64(b[4:]), time: int64(binary.LittleEndian.Uint64(b[12:]))}
	data, sum := b[headSize:len(b)-sumSize], [sumSize]byte(b[len(b)-sumSize:])
	slen := int(binary.LittleEndian.Uint16(b[20:]))
	is := good
	if int(length&^headerBit) != len(b) {
		is = other
	}
	if length&headerBit == 0 {
		if h.sum(b[4:20], data) != sum {
			return nil, bad
		}
		if !r.live() {
			if slen != 0 {
				is = other
			}
			r.message = data
			return r, is
		}
		if slen > len(data) || !fits(data[:slen], data[slen:]) {
			if n := fitting(data, fits); n >= 0 {
				slen, is = n, other
			}
		}
		if slen > len(data) {
			return nil, bad
		}
		r.subject, r.message = data[:slen], data[slen:]
		return r, is
	}
	if slen+4 > len(data) || h.sum(b[4:20], data[:slen], data[slen+4:]) != sum {
		at := bytes.Index(data, []byte(headerBegins)) - 4
		if at < 0 || at == slen || h.sum(b[4:20], data[:at], data[at+4:]) != sum {
			return nil, bad
		}
		slen, is = at, other
	}
	hlen := int(binary.LittleEndian.Uint32(data[slen:]))
	rest := data[slen+4:]
	if bytes.HasPrefix(rest, []byte(headerBegins)) {
		if at := bytes.Index(rest, []byte("\r\n\r\n")); at >= 0 && at+4 != hlen {
			hlen, is = at+4, other
		}
	}
	if hlen > len(rest) {
		return nil, bad
	}
	r.subject, r.header, r.message = data[:slen], rest[:hlen:hlen], rest[hlen:]
	return r, is
}

// headerBegins is the beginning of a message's header.
const headerBegins = "NATS/1.0\r\n"

// fitting returns the length of the one subject that b can begin with, or -1.
func fitting(b []byte, fits func(subject, message []byte) bool) int {
	found := -1
	for n := 1; n <= min(len(b), longestSubject); n++ {
		if fits(b[:n], b[n:]) {
			if found >= 0 {
				return -1
			}
			found = n
		}
	}
	return found
}

// mend finds the record that b was before one byte of it was changed. It tries
// as many as the budget allows.
func (h *hasher) mend(b []byte, fits func(subject, message []byte) bool) *record {
	if r := h.reframe(b, fits); r != nil {
		return r
	}
	n, ok := frame(b)
	if !ok || n != len(b) {
		return nil // more than one byte is damaged
	}
	slen, skip := int(binary.LittleEndian.Uint16(b[20:])), 0
	if binary.LittleEndian.Uint32(b)&headerBit != 0 {
		skip = 4
	}
	text := join(b[4:20], b[headSize:headSize+slen], b[headSize+slen+skip:len(b)-sumSize])
	sum := binary.LittleEndian.Uint64(b[len(b)-sumSize:])
	at := func(i int) int { // in b
		switch {
		case i < 16:
			return i + 4
		case i < 16+slen:
			return i - 16 + headSize
		default:
			return i - 16 + headSize + skip
		}
	}
	try := func(c []byte) *record {
		if r, is := h.read(c, fits); is != bad && (!r.live() || fits(r.subject, r.message)) {
			return r
		}
		return nil
	}
	// The checksum itself?
	var own [sumSize]byte
	binary.LittleEndian.PutUint64(own[:], highwayhash.Sum64(text, h.key[:]))
	wrong := 0
	for i := range own {
		if own[i] != b[len(b)-sumSize+i] {
			wrong++
		}
	}
	if wrong == 1 {
		return try(append(bytes.Clone(b[:len(b)-sumSize]), own[:]...))
	}
	// Half of what is left, so that something is left for others.
	budget := *h.budget / 2
	defer func(was int64) { *h.budget -= was - budget }(budget)
	// One bit, which is what happens most, and then any byte.
	for _, bits := range []bool{true, false} {
		for i := range text {
			was := text[i]
			for x := 1; x < 256; x++ {
				if x&(x-1) == 0 != bits {
					continue
				}
				if budget -= int64(len(text)) + 64; budget < 0 {
					return nil
				}
				text[i] = was ^ byte(x)
				if highwayhash.Sum64(text, h.key[:]) != sum {
					continue
				}
				c := bytes.Clone(b)
				c[at(i)] = text[i]
				if r := try(c); r != nil {
					return r
				}
			}
			text[i] = was
		}
	}
	return nil
}

// reframe reads b as a whole record of which the length field may be wrong.
func (h *hasher) reframe(b []byte, fits func(subject, message []byte) bool) *record {
	if len(b) < least {
		return nil
	}
	for _, bit := range []uint32{0, headerBit} {
		c := bytes.Clone(b)
		binary.LittleEndian.PutUint32(c, uint32(len(b))|bit)
		if r, is := h.read(c, fits); is != bad {
			return r
		}
	}
	return nil
}

func join(parts ...[]byte) []byte { return bytes.Join(parts, nil) }
