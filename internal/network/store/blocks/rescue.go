package blocks

import (
	"bytes"
	"errors"
	"io/fs"
	"os"

	"github.com/resultity/node/internal/durable"
)

// Rescue copies a block that JetStream is about to cut off. The first copy stays
// until [Stream.Mend].
func (s *Stream) Rescue(block uint32) error {
	name := blockIn(s.Rescued, block)
	if _, err := os.Stat(name); err == nil {
		return nil
	}
	b, _, err := readBlock(s.file(block))
	if err != nil {
		return err
	}
	return s.keep(name, b)
}

// takeRescued puts rescued blocks back. What JetStream has written behind the place where
// it cut one off comes behind, under numbers of its own.
func (s *Stream) takeRescued(budget *int64) error {
	if s.Rescued == "" {
		return nil
	}
	list, err := blocksIn(s.Rescued)
	if err != nil {
		return err
	}
	for _, block := range list {
		name := blockIn(s.Rescued, block)
		was, _, err := readBlock(name)
		if err != nil {
			return err
		}
		is, _, err := readBlock(s.file(block))
		if ignore(err, fs.ErrNotExist) != nil {
			return err
		}
		if !bytes.HasPrefix(is, was) {
			if err := s.unindex(); err != nil {
				return err
			}
			if err := Write(s.file(block), s.join(block, was, is, budget)); err != nil {
				return err
			}
		}
		if err := errors.Join(os.Remove(name), durable.SyncDir(s.Rescued)); err != nil {
			return err
		}
	}
	return nil
}

// join returns a block as it was, with what is new of it behind.
func (s *Stream) join(block uint32, was, is []byte, budget *int64) []byte {
	h := newHasher(s.Name, block, budget)
	had := map[[sumSize]byte]bool{} // checksums
	var highest uint64
	for _, c := range s.parse(was, h, false, 0, false) {
		if c.r != nil {
			had[[sumSize]byte(was[c.to-sumSize:c.to])] = true
			highest = max(highest, c.r.number())
		}
	}
	out := bytes.Clone(was)
	moved := map[uint64]uint64{}
	for _, c := range s.parse(is, h, false, 0, false) {
		if c.r == nil || had[[sumSize]byte(is[c.to-sumSize:c.to])] {
			continue
		}
		switch n := c.r.number(); {
		case c.r.live():
			c.r.seq = max(n, highest+1)
			moved[n], highest = c.r.seq, c.r.seq
		case moved[n] > 0:
			c.r.seq += moved[n] - n
		}
		out = append(out, h.encode(c.r)...)
	}
	return out
}
