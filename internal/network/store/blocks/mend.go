package blocks

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/nats-io/nats-server/v2/server/avl"

	"github.com/resultity/node/internal/durable"
)

// Mend reads all of the stream, and mends it. Nothing else may have it open. Each
// part that is damaged is handed to found, and on disk wherever that puts it, before
// it is removed; an error of found ends it. It may be cut off at any moment, and
// called again.
//
// budget bounds, in bytes that are hashed, how much is tried to find out what
// damaged records were.
func (s *Stream) Mend(budget int64, found func(Damage) error) (r Report, err error) {
	if err := errors.Join(s.tidy(), s.takeRescued(&budget)); err != nil {
		return r, err
	}
	memory, err := s.memory()
	if err != nil {
		return r, err
	}
	a, err := s.look(memory, &budget)
	if err != nil {
		return r, err
	}
	r.Bytes, r.Unread = a.bytes, a.unread
	copies, err := s.judge(a, memory, &budget)
	if err != nil {
		return r, err
	}
	if len(a.damage) == 0 {
		if s.Known != nil { // what JetStream has written down may come of damage that it has cut off
			err = s.unindex()
		}
		return r, err
	}
	at := s.reader()
	for _, d := range a.damage {
		if d.Bytes, err = at(d.place); err == nil {
			d.Older, err = at(d.older)
		}
		if err == nil {
			err = found(d)
		}
		if err != nil {
			return r, err
		}
		d.Bytes, d.Older = nil, nil
		r.Damage = append(r.Damage, d)
	}
	// From here on JetStream must read the blocks itself. What it has written down of
	// them it may have got from a damaged record.
	if err := s.unindex(); err != nil {
		return r, err
	}
	return r, s.rewrite(a, copies, &budget)
}

// place is where bytes are in a stream.
type place struct {
	block    uint32
	from, to int
}

// reader returns what reads the bytes of places; there are none at the zero one.
func (s *Stream) reader() func(place) ([]byte, error) {
	var b []byte
	var block uint32
	return func(p place) (_ []byte, err error) {
		if p.to == 0 {
			return nil, nil
		}
		if b == nil || block != p.block {
			if b, _, err = readBlock(s.file(p.block)); err != nil {
				return nil, err
			}
			block = p.block
		}
		if p.to > len(b) {
			return nil, fmt.Errorf("block %d of stream %s has become shorter", p.block, s.Name)
		}
		return b[p.from:p.to], nil
	}
}

// account is what there is in the blocks of a stream.
type account struct {
	list   []uint32
	bytes  int64
	unread []uint32 // blocks of which the disk does not give all
	damage []Damage
	// fixes has, by block, the bytes with which its records are what they were, by offset.
	fixes map[uint32]map[int]byte
	// newest is the last message of a subject, in streams of which only that one counts.
	newest  map[string]message
	before  map[uint32]uint64 // the highest number of the blocks before a block
	highest uint64            // number, that of a lost record not included
	last    uint64            // number that must not be given again
	time    int64             // of the newest message
	deleted avl.SequenceSet   // numbers of messages that were deleted, as far as that matters
}

// message is one that is in the blocks.
type message struct {
	seq uint64
	place
}

// look reads all blocks.
func (s *Stream) look(memory *Memory, budget *int64) (*account, error) {
	list, err := s.Blocks()
	if err != nil {
		return nil, err
	}
	a := &account{list: list, fixes: map[uint32]map[int]byte{}, newest: map[string]message{}, before: map[uint32]uint64{}}
	known := slices.Clone(list)
	if n := len(memory.blocks); s.Closed && n > 0 && (s.Settled() || len(list) == 0 || slices.Max(list) < memory.blocks[n-1].block) { // or it is older
		for _, b := range memory.blocks {
			known = append(known, b.block)
		}
		slices.Sort(known)
		known = slices.Compact(known)
	}
	var open []*Damage // lost records behind which no whole one has been seen
	settle := func(after uint64) {
		before := a.highest
		for _, d := range open {
			d.sure = d.Seq > before && d.Seq < min(after, before+1<<16)
			if !d.sure {
				d.Seq = before + 1
				d.sure = len(open) == 1 && after == before+2
			}
			d.Last = max(d.Seq, after-1)
			before = d.Seq
		}
		open = nil
	}
	var damage []*Damage
	for _, block := range known {
		if !slices.Contains(list, block) {
			d := &Damage{Stream: s.Name, Block: block}
			damage, open = append(damage, d), append(open, d)
			continue
		}
		b, unread, err := readBlock(s.file(block))
		if err != nil {
			return nil, err
		}
		if unread {
			a.unread = append(a.unread, block)
		}
		a.bytes += int64(len(b))
		a.before[block] = a.highest
		h := newHasher(s.Name, block, budget)
		for _, c := range s.parse(b, h, true, a.highest, block == list[len(list)-1] && !s.Closed) {
			at := place{block, c.from, c.to}
			if c.as != nil {
				if a.fixes[block] == nil {
					a.fixes[block] = map[int]byte{}
				}
				for i, x := range c.as {
					if b[c.from+i] != x {
						a.fixes[block][c.from+i] = x
					}
				}
				damage = append(damage, &Damage{Stream: s.Name, Block: block, Offset: c.from, Seq: c.r.number(), Last: c.r.number(),
					Subject: string(c.r.subject), Kind: Mended, place: at})
			}
			if c.r == nil {
				d := &Damage{Stream: s.Name, Block: block, Offset: c.from, Subject: s.subjectIn(b[c.from:c.to]), Kind: c.kind, place: at}
				if c.to-c.from >= headSize {
					d.Seq = (&record{seq: binary.LittleEndian.Uint64(b[c.from+4:])}).number()
				}
				damage, open = append(damage, d), append(open, d)
				continue
			}
			n := c.r.number()
			a.last = max(a.last, n)
			if c.r.seq&tombstoneBit != 0 {
				if s.Single || len(damage) > 0 {
					a.deleted.Insert(n)
				}
				continue
			}
			if n > a.highest {
				settle(n)
				a.highest = n
			}
			if c.r.live() {
				a.time = max(a.time, c.r.time)
				if s.Single {
					a.newest[string(c.r.subject)] = message{n, at}
				}
			}
		}
	}
	if memory.Last > a.last+1<<20 { // a damaged number
		memory.Last = a.last
	}
	if len(open) == 0 && a.last < memory.Last { // the file was cut off, or it is gone
		d := &Damage{Stream: s.Name, Seq: a.last + 1}
		damage, open = append(damage, d), append(open, d)
	}
	settle(max(a.highest+1, a.last, memory.Last) + 1)
	for _, d := range damage {
		if d.Kind == Cut && d.Seq <= memory.Last {
			d.Kind = Lost
		}
		if d.Kind == Lost {
			a.last = max(a.last, d.Seq)
		}
		a.damage = append(a.damage, *d)
	}
	a.last = max(a.last, memory.Last)
	return a, nil
}

// subjectIn is the subject in the bytes of a damaged record, or "".
func (s *Stream) subjectIn(b []byte) string {
	if len(b) <= least {
		return ""
	}
	data := b[headSize:]
	slen := int(binary.LittleEndian.Uint16(b[20:]))
	if slen > len(data) || !s.Fits(data[:slen], nil) {
		slen = max(0, fitting(data, func(subject, _ []byte) bool { return s.Fits(subject, nil) }))
	}
	return string(data[:slen])
}

// judge says what became of each damage, and returns the copies that are to be put back, in
// the order of their numbers.
func (s *Stream) judge(a *account, memory *Memory, budget *int64) ([]*record, error) {
	copies, err := s.copies(a, budget)
	if err != nil {
		return nil, err
	}
	told := map[string]bool{}
	for i := range a.damage {
		d := &a.damage[i]
		here, back := a.newest[d.Subject], copies[d.Subject]
		switch {
		case d.Kind != Lost:
		case d.sure && a.deleted.Exists(d.Seq):
			d.Kind = Superseded
		case d.Subject == "" || !s.Single:
		case here.seq > d.Seq:
			d.Kind = Superseded
		case back != nil && back.number() >= d.Seq:
			d.Kind = Restored
			told[d.Subject] = true
		default:
			d.older = here.place
			told[d.Subject] = true
			delete(copies, d.Subject) // it is older
		}
	}
	wide := a.wide()
	if s.Single && (wide != nil || s.Known != nil) {
		for _, subject := range slices.Sorted(maps.Keys(memory.Subjects)) {
			here, ok := a.newest[subject]
			if ok && memory.has(here.seq) || copies[subject] != nil || told[subject] {
				continue
			}
			d := Damage{Stream: s.Name, Subject: subject, Seq: a.last, Last: a.last, older: here.place}
			if wide != nil {
				if wide.Subject == "" && wide.place == (place{}) {
					wide.Subject, wide.Seq, wide.older = subject, max(wide.Seq, here.seq+1), here.place
					continue
				}
				d.Block, d.Seq, d.Last = wide.Block, max(wide.Seq, here.seq+1), wide.Last
			}
			a.damage = append(a.damage, d)
			wide = a.wide() // it may have moved
		}
	}
	list := slices.SortedFunc(maps.Values(copies), func(x, y *record) int { return cmp.Compare(x.number(), y.number()) })
	for _, back := range list {
		if subject := string(back.subject); !told[subject] {
			a.damage = append(a.damage, Damage{Stream: s.Name, Seq: back.number(), Last: back.number(), Subject: subject, Kind: Restored})
		}
	}
	for i := range a.damage { // of what has no name, all may be back
		d := &a.damage[i]
		if d.Kind == Lost && d.Subject == "" {
			n := uint64(0)
			for _, back := range list {
				if d.covers(back.number()) {
					n++
				}
			}
			if n > d.Last-d.Seq {
				d.Kind = Restored
			}
		}
	}
	return list, nil
}

// covers says whether the message of a number may have been in what is lost.
func (d *Damage) covers(n uint64) bool { return d.Kind == Lost && d.Seq <= n && n <= d.Last }

// wide returns the first loss that may be one of more messages than it names, or nil.
func (a *account) wide() *Damage {
	for i := range a.damage {
		if d := &a.damage[i]; d.Kind == Lost && (d.Subject == "" || d.Seq < d.Last) {
			return d
		}
	}
	return nil
}

// copies returns the copies of messages that were in what is lost, by subject.
func (s *Stream) copies(a *account, budget *int64) (map[string]*record, error) {
	if s.Spare == "" {
		return nil, nil
	}
	list, err := blocksIn(s.Spare)
	if err != nil {
		return nil, err
	}
	back := map[string]*record{}
	for _, block := range list {
		b, _, err := readBlock(blockIn(s.Spare, block))
		if err != nil {
			return nil, err
		}
		for _, c := range s.parse(b, newHasher(s.Name, block, budget), false, 0, false) {
			if c.r == nil || !c.r.live() || !s.Fits(c.r.subject, nil) {
				continue
			}
			n, lost := c.r.number(), false
			for i := range a.damage {
				lost = lost || a.damage[i].covers(n)
			}
			if (lost || n > a.last) && a.newest[string(c.r.subject)].seq < n && !a.deleted.Exists(n) {
				back[string(c.r.subject)] = c.r
			}
		}
	}
	return back, nil
}

// rewrite writes the blocks that are to be others than they are. What is lost is there until all
// the rest is done, so that mending that is cut off finds it again.
func (s *Stream) rewrite(a *account, copies []*record, budget *int64) error {
	gone := map[string]uint64{} // older messages of these subjects must not come back
	damaged := map[uint32]bool{}
	for _, d := range a.damage {
		if d.Kind == Lost && s.Single && d.Subject != "" {
			gone[d.Subject] = d.Seq
		}
		if d.place.to > 0 {
			damaged[d.Block] = true
		}
	}
	if len(a.list) == 0 {
		a.list = []uint32{max(1, a.damage[0].Block)}
	}
	end := a.list[len(a.list)-1]
	for _, block := range a.list {
		if len(gone) == 0 && block != end {
			continue
		}
		if err := s.replace(a, block, budget, func(b []byte, chunks []chunk, h *hasher) (out []byte) {
			for _, c := range chunks {
				if c.r == nil || !c.r.live() || c.r.number() >= gone[string(c.r.subject)] {
					out = append(out, b[c.from:c.to]...)
				}
			}
			if block == end {
				out = append(out, s.end(a, copies, h)...)
			}
			return out
		}); err != nil {
			return err
		}
	}
	for block := range damaged {
		if err := s.replace(a, block, budget, func(b []byte, chunks []chunk, _ *hasher) (out []byte) {
			for _, c := range chunks {
				if c.r != nil {
					out = append(out, b[c.from:c.to]...)
				}
			}
			return out
		}); err != nil {
			return err
		}
	}
	return nil
}

// replace writes a block that is made of the chunks of what there is.
func (s *Stream) replace(a *account, block uint32, budget *int64, with func([]byte, []chunk, *hasher) []byte) error {
	was, unread, err := readBlock(s.file(block))
	if ignore(err, fs.ErrNotExist) != nil {
		return err
	}
	b := bytes.Clone(was)
	for at, x := range a.fixes[block] {
		b[at] = x
	}
	delete(a.fixes, block)
	h := newHasher(s.Name, block, budget)
	out := with(b, s.parse(b, h, false, a.before[block], false), h)
	if bytes.Equal(out, was) && err == nil {
		return nil
	}
	if unread { // the disk may give it another time
		if err := os.Link(s.file(block), s.file(block)+".unreadable"); ignore(err, fs.ErrExist) != nil {
			return err
		}
	}
	return s.keep(s.file(block), out)
}

// end is what comes behind the last record: the copies, with numbers that were not given yet,
// or what keeps the number of a lost message from being given again. JetStream takes
// a block for expired by its last record, so none is older than the one before.
func (s *Stream) end(a *account, copies []*record, h *hasher) (b []byte) {
	if len(copies) == 0 && a.last > a.highest {
		return h.encode(&record{seq: a.last | erasedBit, time: a.time})
	}
	n := a.last
	for _, back := range copies {
		n = max(n+1, back.number())
		a.time = max(a.time, back.time)
		b = append(b, h.encode(&record{n, a.time, back.subject, back.header, back.message})...)
	}
	return b
}

// memory is what JetStream remembers: what it said, and what it has written down.
func (s *Stream) memory() (*Memory, error) {
	m := &Memory{}
	raw, err := durable.ReadOwn(filepath.Join(s.msgs(), indexName), largest)
	if ignore(err, fs.ErrNotExist) != nil && !errors.Is(err, durable.ErrLarge) && !unreadable(err) {
		return nil, err
	}
	if wrote := readIndex(raw, s.Name); wrote != nil {
		m = wrote
	}
	if !s.Closed { // it may have written down what it took damage for
		m.blocks, m.written = nil, 0
	}
	if s.Known != nil {
		m.Last, m.Subjects = max(m.Last, s.Known.Last), s.Known.Subjects
	}
	return m, nil
}

// unindex has JetStream read the blocks.
func (s *Stream) unindex() error {
	if err := os.Remove(filepath.Join(s.msgs(), indexName)); ignore(err, fs.ErrNotExist) != nil {
		return err
	}
	return ignore(durable.SyncDir(s.msgs()), fs.ErrNotExist)
}

// tidy removes what an interrupted rewriting has left, of ours and of JetStream's.
func (s *Stream) tidy() error {
	entries, err := os.ReadDir(s.msgs())
	err = ignore(err, fs.ErrNotExist)
	for _, e := range entries {
		if strings.Contains(e.Name(), ".blk.tmp") || strings.HasSuffix(e.Name(), ".new") {
			err = errors.Join(err, os.Remove(filepath.Join(s.msgs(), e.Name())))
		}
	}
	return err
}
