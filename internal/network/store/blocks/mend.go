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
	"strings"

	"github.com/resultity/node/internal/durable"
)

// Mend reads all of the stream, and mends it. Nothing else may have it open. Each
// part that is damaged is handed to found, and on disk wherever that puts it, before
// it is removed; an error of found ends it. It may be cut off at any moment, and
// called again.
//
// budget bounds, in bytes that are hashed, how much is tried to find out what a
// damaged record was.
func (s *Stream) Mend(budget int64, found func(Damage) error) (r Report, err error) {
	if err := errors.Join(s.tidy(), s.takeRescued(&budget)); err != nil {
		return r, err
	}
	list, err := s.Blocks()
	if err != nil || len(list) == 0 {
		return r, err
	}
	newest := map[string]uint64{}        // by subject
	fixed := map[uint32]map[int][]byte{} // of damaged blocks, what is as it was again, by its place
	floors := make([]uint64, len(list))  // the highest number before each block
	var lost []Damage
	var highest uint64
	for i, block := range list {
		b, err := os.ReadFile(s.file(block))
		if err != nil {
			return r, err
		}
		r.Bytes += int64(len(b))
		h := newHasher(s.Name, block, &budget)
		chunks, clean := s.parse(b, h, true, i == len(list)-1)
		if !clean {
			fixed[block] = map[int][]byte{}
		}
		floors[i] = highest
		for j, c := range chunks {
			if c.r != nil && (s.Single || s.Known != nil) && c.r.live() {
				newest[string(c.r.subject)] = c.r.number()
			}
			if c.r != nil {
				highest = max(highest, c.r.number())
			}
			if c.as != nil {
				fixed[block][c.from] = c.as
			}
			if c.as != nil || c.r == nil {
				d := s.damage(block, b, chunks, j, floors[i])
				highest = max(highest, d.Seq)
				lost = append(lost, d)
			}
		}
	}
	spare, err := s.missing(newest, &budget)
	if err != nil {
		return r, err
	}
	for subject := range s.Known {
		_, back := spare[subject]
		if _, here := newest[subject]; !here && !back && !named(lost, subject) {
			lost = append(lost, Damage{Stream: s.Name, Block: list[len(list)-1], Subject: subject, Seq: highest + 1})
		}
	}
	if len(lost) == 0 && len(spare) == 0 {
		if s.Known != nil { // what JetStream has written down may come of damage that it has cut off
			err = s.unindex()
		}
		return r, err
	}
	for i := range lost {
		d := &lost[i]
		back := spare[d.Subject]
		switch {
		case d.Kind != Lost || d.Subject == "":
		case newest[d.Subject] > d.Seq:
			d.Kind = Superseded
		case back != nil && back.number() >= d.Seq:
			d.Kind = Restored
		default:
			delete(spare, d.Subject) // it is older
		}
	}
	for _, d := range lost {
		if err := found(d); err != nil {
			return r, err
		}
		d.Bytes = nil
		r.Damage = append(r.Damage, d)
	}
	for subject, back := range spare {
		if !named(lost, subject) { // the file was cut off there
			d := Damage{Stream: s.Name, Block: list[len(list)-1], Seq: back.number(), Subject: subject, Kind: Restored}
			if err := found(d); err != nil {
				return r, err
			}
			r.Damage = append(r.Damage, d)
		}
	}
	// From here on JetStream must read the blocks itself. What it has written down of
	// them it may have got from a damaged record.
	if err := s.unindex(); err != nil {
		return r, err
	}
	gone := map[string]uint64{} // older messages of these subjects must not come back
	for _, d := range lost {
		if d.Kind == Lost && s.Single && d.Subject != "" {
			gone[d.Subject] = d.Seq
		}
	}
	for i, block := range list {
		last := i == len(list)-1
		if fixed[block] == nil && len(gone) == 0 && !(last && len(spare) > 0) {
			continue
		}
		b, err := os.ReadFile(s.file(block))
		if err != nil {
			return r, err
		}
		h := newHasher(s.Name, block, &budget)
		chunks, _ := s.parse(b, h, false, last)
		for j, c := range chunks {
			if as := fixed[block][c.from]; as != nil {
				chunks[j].as = as
				chunks[j].r, _ = h.read(as, s.Fits)
			}
		}
		out := s.rewrite(b, chunks, h, gone, floors[i])
		if last {
			for _, back := range spare {
				highest++
				back.seq = highest
				out = append(out, h.encode(back)...)
			}
		}
		if bytes.Equal(out, b) {
			continue
		}
		if err := Write(s.file(block), out); err != nil {
			return r, err
		}
	}
	return r, nil
}

// damage describes a chunk.
func (s *Stream) damage(block uint32, b []byte, chunks []chunk, i int, floor uint64) Damage {
	c := chunks[i]
	d := Damage{Stream: s.Name, Block: block, Offset: c.from, Bytes: b[c.from:c.to], Kind: c.kind}
	if c.r != nil {
		d.Seq, d.Subject = c.r.number(), string(c.r.subject)
		return d
	}
	d.Seq = number(chunks, i, d.Bytes, floor)
	if len(d.Bytes) > least {
		data := d.Bytes[headSize:]
		slen := int(d.Bytes[20]) | int(d.Bytes[21])<<8
		alone := func(subject, _ []byte) bool { return s.Fits(subject, nil) }
		if slen > len(data) || !s.Fits(data[:slen], nil) {
			slen = max(0, fitting(data, alone))
		}
		d.Subject = string(data[:slen])
	}
	return d
}

// number is the number that the message of a chunk has, or where that is not known the
// lowest that it can have. floor is the highest one of the blocks before.
func number(chunks []chunk, i int, b []byte, floor uint64) uint64 {
	before, after := floor, uint64(math.MaxUint64)
	for _, c := range chunks[:i] {
		if c.r != nil && c.r.seq&tombstoneBit == 0 {
			before = max(before, c.r.number())
		}
	}
	for _, c := range chunks[i+1:] {
		if c.r != nil && c.r.seq&tombstoneBit == 0 && c.r.number() > before {
			after = c.r.number()
			break
		}
	}
	if len(b) >= headSize {
		r := record{seq: binary.LittleEndian.Uint64(b[4:])}
		if n := r.number(); n > before && n < min(after, before+1<<16) {
			return n
		}
	}
	return before + 1
}

// rewrite returns the block as it is to be. Older messages of the subjects in gone are
// left out.
func (s *Stream) rewrite(b []byte, chunks []chunk, h *hasher, gone map[string]uint64, floor uint64) []byte {
	out := make([]byte, 0, len(b))
	var last, highest uint64
	for i, c := range chunks {
		if c.r == nil {
			if c.kind != Cut {
				highest = max(highest, number(chunks, i, b[c.from:c.to], floor))
			}
			continue
		}
		highest = max(highest, c.r.number())
		if seq, ok := gone[string(c.r.subject)]; ok && c.r.live() && c.r.number() < seq {
			continue
		}
		last = max(last, c.r.number())
		if c.as != nil {
			out = append(out, c.as...)
		} else {
			out = append(out, b[c.from:c.to]...)
		}
	}
	if highest > last { // numbers are not given again
		out = append(out, h.encode(&record{seq: highest | erasedBit})...)
	}
	return out
}

// missing reads the spare blocks, and returns the messages that are in none of the
// stream's own, and no later ones of their subjects.
func (s *Stream) missing(newest map[string]uint64, budget *int64) (map[string]*record, error) {
	if s.Spare == "" || !s.Single {
		return nil, nil
	}
	list, err := blocksIn(s.Spare)
	if err != nil {
		return nil, err
	}
	back := map[string]*record{}
	for _, block := range list {
		b, err := os.ReadFile(filepath.Join(s.Spare, fmt.Sprintf("%d.blk", block)))
		if err != nil {
			return nil, err
		}
		chunks, _ := s.parse(b, newHasher(s.Name, block, budget), false, true)
		for _, c := range chunks {
			if c.r == nil || !c.r.live() || !s.Fits(c.r.subject, nil) {
				continue
			}
			if seq, ok := newest[string(c.r.subject)]; !ok || seq < c.r.number() {
				back[string(c.r.subject)] = c.r
			}
		}
	}
	return back, nil
}

// named says whether the loss of a message of a subject is among those.
func named(lost []Damage, subject string) bool {
	for _, d := range lost {
		if d.Subject == subject && (d.Kind == Lost || d.Kind == Restored) {
			return true
		}
	}
	return false
}

// unindex has JetStream read the blocks.
func (s *Stream) unindex() error {
	if err := os.Remove(filepath.Join(s.msgs(), indexName)); ignore(err, fs.ErrNotExist) != nil {
		return err
	}
	return durable.SyncDir(s.msgs())
}

// tidy removes what an interrupted rewriting has left.
func (s *Stream) tidy() error {
	entries, err := os.ReadDir(s.msgs())
	err = ignore(err, fs.ErrNotExist)
	for _, e := range entries {
		if strings.Contains(e.Name(), ".blk.tmp") {
			err = errors.Join(err, os.Remove(filepath.Join(s.msgs(), e.Name())))
		}
	}
	return err
}
