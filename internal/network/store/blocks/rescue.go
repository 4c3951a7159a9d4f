package blocks

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/resultity/node/internal/durable"
)

// Rescue copies a block that JetStream is about to cut off. The first copy stays
// until [Stream.Mend].
func (s *Stream) Rescue(block uint32) error {
	name := filepath.Join(s.Rescued, fmt.Sprintf("%d.blk", block))
	if _, err := os.Stat(name); err == nil {
		return nil
	}
	b, err := os.ReadFile(s.file(block))
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
		name := filepath.Join(s.Rescued, fmt.Sprintf("%d.blk", block))
		was, err := os.ReadFile(name)
		if err != nil {
			return err
		}
		is, err := os.ReadFile(s.file(block))
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
	same := 0
	for same < min(len(was), len(is)) && was[same] == is[same] {
		same++
	}
	h := newHasher(s.Name, block, budget)
	old, _ := s.parse(was, h, false, true)
	var highest uint64
	for _, c := range old {
		if c.r != nil {
			highest = max(highest, c.r.number())
		}
	}
	out := bytes.Clone(was)
	now, _ := s.parse(is, h, false, true)
	for _, c := range now {
		if c.r == nil || c.to <= same {
			continue
		}
		if c.r.live() {
			highest++
			c.r.seq = highest
		}
		out = append(out, h.encode(c.r)...)
	}
	return out
}
