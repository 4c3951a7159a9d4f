// Package book owns the node's records of its sandbox on disk.
//
// The rule it keeps: a record is on disk before a receipt names it, and stays
// there until the network has it. The newest stays in any case, so that an agent
// that starts beside a runtime knows what it was like.
package book

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"

	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/durable"
	"github.com/resultity/node/internal/evm"
	"github.com/resultity/node/internal/failpoint"
	"github.com/resultity/node/internal/sandbox/record"
)

// Most is how many records are kept. A network that is away for long misses those
// that nothing was signed under.
const Most = 64

const suffix = ".json"

// Book holds the records of one node for one network. Safe for concurrent use;
// calls that change it wait for the disk.
type Book struct {
	dir string

	mu      sync.Mutex       // guards what follows, also while it is written
	records []*record.Signed // on disk, the oldest first
	has     digest.Digest    // the newest, once the network has it
}

// Open reads the records in dir, which is made. What is no record of the node's
// for the network is removed; one that the disk does not give back is left alone.
func Open(dir, network string, node evm.Address) (*Book, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	b := &Book{dir: dir}
	for _, e := range entries {
		s, err := read(filepath.Join(dir, e.Name()))
		switch {
		case errors.Is(err, syscall.EIO):
			continue // a receipt may name it, and the disk may give it back
		case err != nil && !errors.Is(err, record.ErrInvalid):
			return nil, err
		}
		if err != nil || s.Record().Network != network || s.Record().Node != node || e.Name() != name(s.Digest()) {
			// Nothing is lost: the network asks for no record that it was not told of,
			// and this one nobody would believe.
			if err := os.RemoveAll(filepath.Join(dir, e.Name())); err != nil {
				return nil, err
			}
			continue
		}
		b.records = append(b.records, s)
	}
	slices.SortStableFunc(b.records, func(x, y *record.Signed) int { return cmp.Compare(x.Record().Time, y.Record().Time) })
	return b, nil
}

func name(d digest.Digest) string { return d.Hex() + suffix }

var readFile = durable.ReadOwn // tests have disks that fail

func read(path string) (*record.Signed, error) {
	if !strings.HasSuffix(path, suffix) {
		return nil, record.ErrInvalid
	}
	raw, err := readFile(path, record.MaxSigned)
	if errors.Is(err, durable.ErrNotFile) || errors.Is(err, durable.ErrLarge) {
		return nil, fmt.Errorf("%w: %w", record.ErrInvalid, err)
	}
	if err != nil {
		return nil, err
	}
	return record.Open(raw)
}

// Newest returns the newest record, or nil.
func (b *Book) Newest() *record.Signed {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.newest()
}

func (b *Book) newest() *record.Signed {
	if len(b.records) == 0 {
		return nil
	}
	return b.records[len(b.records)-1]
}

// Records returns all, the oldest first.
func (b *Book) Records() []*record.Signed {
	b.mu.Lock()
	defer b.mu.Unlock()
	return slices.Clone(b.records)
}

// Pending returns those that the network may not have.
func (b *Book) Pending() []*record.Signed {
	b.mu.Lock()
	defer b.mu.Unlock()
	return slices.DeleteFunc(slices.Clone(b.records), func(s *record.Signed) bool { return s.Digest() == b.has })
}

// Put makes s the newest record. Where there are too many, the oldest go that
// needed does not name.
func (b *Book) Put(s *record.Signed, needed func() (map[digest.Digest]bool, error)) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if n := b.newest(); n != nil && n.Digest() == s.Digest() {
		return nil
	}
	if err := b.makeRoom(needed); err != nil {
		return err
	}
	raw, err := json.Marshal(s)
	if err != nil {
		return err
	}
	failpoint.Here("book.put.begin")
	if err := durable.WriteFile(filepath.Join(b.dir, name(s.Digest())), raw, 0o600); err != nil {
		return fmt.Errorf("write the sandbox's record down: %w", err)
	}
	failpoint.Here("book.put.written")
	before := b.newest()
	b.records = append(b.records, s)
	if before != nil && before.Digest() == b.has {
		return b.remove(b.has)
	}
	return nil
}

func (b *Book) makeRoom(needed func() (map[digest.Digest]bool, error)) error {
	if len(b.records) < Most {
		return nil
	}
	keep, err := needed()
	if err != nil {
		return err
	}
	for _, s := range b.records[:len(b.records)-1] {
		if d := s.Digest(); !keep[d] {
			return b.remove(d)
		}
	}
	return fmt.Errorf("%d records of the sandbox wait for the network, and results wait with each of them", len(b.records))
}

// Has notes that the network has stored a record. All but the newest go then.
func (b *Book) Has(d digest.Digest) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if n := b.newest(); n != nil && n.Digest() == d {
		b.has = d
		return nil
	}
	return b.remove(d)
}

func (b *Book) remove(d digest.Digest) error {
	i := slices.IndexFunc(b.records, func(s *record.Signed) bool { return s.Digest() == d })
	if i < 0 {
		return nil
	}
	failpoint.Here("book.remove.begin")
	if err := os.Remove(filepath.Join(b.dir, name(d))); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	failpoint.Here("book.remove.removed")
	b.records = slices.Delete(b.records, i, i+1)
	return nil
}
