// Package model owns the models on disk: fetching, checking, keeping, removing.
//
// The store is content-addressed:
//
//	blobs/<sha256>                  a verified file, mode 0444
//	blobs/<sha256>.unverified       the chunks of it that have arrived, each at its place
//	blobs/<sha256>.chunks           the hashes of its chunks, where the configuration has only their root
//	blobs/<sha256>.verity           what the kernel calls it, where it is sealed (see verity.go)
//	blobs/<sha256>.quarantined      what a scrub found damaged; its good chunks are used again
//	trees/<model digest>/<path>     hard links to blobs, to be mounted read-only
//
// The rule it keeps: a file under its final name has been verified, over all
// of its bytes, and nothing else ever gets such a name. Chunks are verified before
// they are written (package fetch), and the whole file is hashed as they arrive, so
// it is verified when its last byte is there. What an earlier process left is read
// back chunk by chunk rather than trusted to a note: a note proves what was received,
// not what the disk kept; reading costs a fraction of the download that it saves.
//
// A verified file is never written to again: an engine may have it in memory. A
// repair makes a new one, of the old one's good chunks and of fetched ones.
package model

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/failpoint"
	"github.com/resultity/node/internal/model/fetch"
	"github.com/resultity/node/internal/snapshot"
)

const (
	blobs       = "blobs"
	trees       = "trees"
	unverified  = ".unverified"
	hashes      = ".chunks"
	quarantined = ".quarantined"
	building    = ".building" // of a tree
)

// ErrIncomplete says that a model's files are not all here. [Store.Ensure]
// fetches what is missing.
var ErrIncomplete = errors.New("model is not complete on disk")

// Store keeps models below one directory. Its methods may be called
// concurrently, also for the same model.
type Store struct {
	dir     string // absolute
	root    *os.Root
	fetcher *fetch.Fetcher
	log     *slog.Logger
	seals   seals
	margin  int64 // bytes of the file system that are never used

	locks keyed // by blob or tree name: who works on it

	space  sync.Mutex        // guards coming; held while it is looked whether one more fits
	coming []*snapshot.Model // what running calls of Ensure fetch

	// mu guards busy. It is also held while Retain removes files, so that no
	// Ensure begins to rely on one that is going away.
	mu   sync.Mutex
	busy map[string]int // names of blobs and trees that running calls rely on
}

// Open returns the store in dir, which is made if it is missing. What is missing in
// it comes through fetcher.
func Open(dir string, fetcher *fetch.Fetcher, log *slog.Logger) (*Store, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, fmt.Errorf("model store: %w", err)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("model store: %w", err)
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, fmt.Errorf("model store: %w", err)
	}
	for _, d := range []string{blobs, trees} {
		if err := root.MkdirAll(d, 0o700); err != nil {
			_ = root.Close() // nothing was done through it
			return nil, fmt.Errorf("model store: %w", err)
		}
	}
	return &Store{dir: dir, root: root, fetcher: fetcher, log: log, seals: fsVerity{}, margin: defaultMargin, busy: map[string]int{}}, nil
}

// Close releases the directory. No method may be running or called afterwards.
func (s *Store) Close() error { return s.root.Close() }

// Ensure fetches and verifies what is missing of m and returns the directory
// that holds its files under their paths, readable by everybody, to be mounted
// read-only. What it brings has been looked into ([ErrRefused]). It does nothing that is done already, and of several calls for the
// same file one fetches, from all their sources, and the others wait.
//
// Progress, if not nil, is called in this goroutine with the bytes of m that
// are on disk, as chunks arrive.
//
// It fails when no source of a file has brought it for long (package fetch), and
// the caller may call again later: what has arrived is kept. Errors wrap what happened
// at every source, or are a [*NoSpaceError], which no source can mend.
func (s *Store) Ensure(ctx context.Context, m *snapshot.Model, progress func(done, total int64)) (string, error) {
	for _, f := range m.Files {
		if f.Path == "." || !filepath.IsLocal(f.Path) || path.Clean(f.Path) != f.Path || f.Size < 0 || f.SHA256.IsZero() {
			return "", fmt.Errorf("model %s %s: file %.200q has no usable path, size or digest", m.Name, m.Version, f.Path)
		}
	}
	defer s.use(m)()

	total := m.Size()
	var before int64 // bytes of the files that are done
	report := func(n int64) {
		if progress != nil {
			progress(before+n, total)
		}
	}
	report(0)
	arrived, err := s.preflight(ctx, m)
	if err != nil {
		return "", fmt.Errorf("model %s %s: %w", m.Name, m.Version, err)
	}
	defer arrived()
	for i := range m.Files {
		f := &m.Files[i]
		if err := s.ensureBlob(ctx, f, report); err != nil {
			return "", fmt.Errorf("model %s %s: file %s: %w", m.Name, m.Version, f.Path, err)
		}
		before += f.Size
		report(0)
	}
	dir, err := s.ensureTree(ctx, m)
	if err != nil {
		return "", fmt.Errorf("model %s %s: %w", m.Name, m.Version, err)
	}
	return dir, nil
}

// Have reports whether m is complete on disk: every file is there, of the right
// size, and is the very file that was verified; and nothing else is with them.
func (s *Store) Have(m *snapshot.Model) bool {
	tree := path.Join(trees, m.Digest().Hex())
	for _, f := range m.Files {
		blob, err := s.root.Lstat(path.Join(blobs, f.SHA256.Hex()))
		if err != nil || !blob.Mode().IsRegular() || blob.Size() != f.Size {
			return false
		}
		link, err := s.root.Lstat(path.Join(tree, f.Path))
		if err != nil || !os.SameFile(blob, link) {
			return false
		}
	}
	files := 0
	err := fs.WalkDir(s.root.FS(), tree, func(_ string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			files++
		}
		return err
	})
	return err == nil && files == len(m.Files)
}

// Open opens a verified file for reading; one that is not here in full is
// [fs.ErrNotExist].
func (s *Store) Open(file digest.Digest) (*os.File, error) {
	name := path.Join(blobs, file.Hex())
	f, err := s.root.OpenFile(name, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	if st, err := f.Stat(); err != nil || !st.Mode().IsRegular() {
		return nil, errors.Join(fmt.Errorf("%s is no file", name), err, f.Close())
	}
	return f, nil
}

// Verify reads all of m again. A file that is no longer what its digest names, or
// that the disk cannot read, loses its name, so that [Store.Have] turns false and
// [Store.Ensure] fetches it anew; the error wraps [digest.ErrMismatch] for every such
// file. A model that is not complete is [ErrIncomplete].
func (s *Store) Verify(ctx context.Context, m *snapshot.Model) error {
	defer s.use(m)()
	if !s.Have(m) {
		return fmt.Errorf("model %s %s: %w", m.Name, m.Version, ErrIncomplete)
	}
	var bad []error
	for i := range m.Files {
		f := &m.Files[i]
		err := s.recheck(ctx, f.SHA256)
		if errors.Is(err, fs.ErrNotExist) { // somebody else has found it damaged
			err = fmt.Errorf("%w: %w", ErrIncomplete, err)
		}
		if errors.Is(err, digest.ErrMismatch) {
			s.log.ErrorContext(ctx, "model file is damaged on disk", "model", m.Name, "file", f.Path, "sha256", f.SHA256.Hex())
			bad = append(bad, fmt.Errorf("file %s: %w", f.Path, err))
			continue
		}
		if err != nil {
			return fmt.Errorf("model %s %s: file %s: %w", m.Name, m.Version, f.Path, errors.Join(append(bad, err)...))
		}
	}
	if bad != nil {
		return fmt.Errorf("model %s %s: %w; it will be fetched again, check this disk", m.Name, m.Version, errors.Join(bad...))
	}
	return nil
}

// Distrust reads a file again that somebody says is damaged. If it is, it loses its
// name as in [Store.Verify], so that every model that has it is no longer complete; the
// error wraps [digest.ErrMismatch]. A file that is not here is no error.
func (s *Store) Distrust(ctx context.Context, file digest.Digest) error {
	if err := s.recheck(ctx, file); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// recheck reads a blob again, and takes its name away if it is not what that says, or
// if the disk cannot read it: [digest.ErrMismatch]. Nobody else works on the blob
// meanwhile, so that what was read is what loses its name.
func (s *Store) recheck(ctx context.Context, d digest.Digest) error {
	name := path.Join(blobs, d.Hex())
	unlock, err := s.locks.lock(ctx, name)
	if err != nil {
		return err
	}
	defer unlock()
	return s.inspect(ctx, d)
}

// inspect is [Store.recheck] for who has the blob's lock.
func (s *Store) inspect(ctx context.Context, d digest.Digest) error {
	name := path.Join(blobs, d.Hex())
	err := s.rehash(ctx, d)
	unreadable := errors.Is(err, unix.EIO)
	if !unreadable && !errors.Is(err, digest.ErrMismatch) {
		return err
	}
	failpoint.Here("model.damage.begin")
	if failed := s.root.Rename(name, name+quarantined); failed != nil {
		return errors.Join(err, failed) // and a disk that does neither is no damaged file
	}
	failpoint.Here("model.damage.renamed")
	if unreadable {
		err = fmt.Errorf("%w: %w", digest.ErrMismatch, err)
	}
	return errors.Join(err, s.sync(blobs))
}

// Retain removes everything that the models in keep do not need: files, trees,
// partial files, quarantined ones. What a running Ensure or Verify relies on
// stays until the next call.
func (s *Store) Retain(keep []*snapshot.Model) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	wanted := map[string]bool{}
	for name := range s.busy {
		wanted[name] = true
	}
	for _, m := range keep {
		for _, name := range names(m) {
			wanted[name] = true
		}
	}
	var errs []error
	for _, d := range []string{trees, blobs} {
		entries, err := fs.ReadDir(s.root.FS(), d)
		if err != nil {
			return fmt.Errorf("model store: %w", err)
		}
		removed := 0
		for _, e := range entries {
			name := path.Join(d, e.Name())
			stem, suffix, _ := strings.Cut(name, ".")
			switch {
			case suffix == "" && wanted[name]:
				continue
			case "."+suffix == building && s.busy[stem] > 0:
				continue
			case ("."+suffix == hashes || "."+suffix == sealed) && wanted[stem]:
				continue
			case ("."+suffix == unverified || "."+suffix == quarantined) && wanted[stem]:
				// The rest of a file that a restart interrupted, or what a repair
				// begins with; but once the whole is there nobody asks for parts.
				if _, err := s.root.Lstat(stem); err != nil || s.busy[stem] > 0 {
					continue
				}
			}
			if err := s.root.RemoveAll(name); err != nil {
				errs = append(errs, err)
				continue
			}
			removed++
		}
		if removed > 0 {
			s.log.Info("removed what the configuration does not list", "kind", d, "count", removed)
			errs = append(errs, s.sync(d))
		}
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("model store: %w", err)
	}
	return nil
}

// names returns the names below the root that m has when it is complete.
func names(m *snapshot.Model) []string {
	out := []string{path.Join(trees, m.Digest().Hex())}
	for _, f := range m.Files {
		out = append(out, path.Join(blobs, f.SHA256.Hex()))
	}
	return out
}

// use keeps Retain away from m until the returned function is called.
func (s *Store) use(m *snapshot.Model) func() {
	held := names(m)
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, n := range held {
		s.busy[n]++
	}
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		for _, n := range held {
			if s.busy[n]--; s.busy[n] == 0 {
				delete(s.busy, n)
			}
		}
	}
}

// ensureBlob makes f a verified blob.
func (s *Store) ensureBlob(ctx context.Context, f *snapshot.File, report func(int64)) error {
	name := path.Join(blobs, f.SHA256.Hex())
	defer s.fetcher.Offer(f.SHA256, f.Sources)()
	unlock, err := s.locks.lock(ctx, name)
	if err != nil {
		return err
	}
	defer unlock()

	switch st, err := s.root.Lstat(name); {
	case errors.Is(err, fs.ErrNotExist):
		return s.fetch(ctx, f, report)
	case err != nil:
		return err
	case st.Mode().IsRegular() && st.Size() == f.Size:
		if err := s.unbroken(ctx, f.SHA256); !errors.Is(err, digest.ErrMismatch) {
			return err
		}
		s.log.ErrorContext(ctx, "model file is damaged on disk", "file", f.Path, "sha256", f.SHA256.Hex())
		return s.fetch(ctx, f, report)
	}
	// A length that is not the configuration's: damage here, or a mistake there.
	switch err := s.rehash(ctx, f.SHA256); {
	case err == nil:
		return fmt.Errorf("%w: the configuration says %d bytes, but the file of this digest has another length; the publisher must correct it", fetch.ErrLength, f.Size)
	case !errors.Is(err, digest.ErrMismatch):
		return err
	}
	s.log.ErrorContext(ctx, "model file is damaged on disk", "file", f.Path, "sha256", f.SHA256.Hex())
	if err := s.root.Rename(name, name+quarantined); err != nil {
		return err
	}
	failpoint.Here("model.length.renamed")
	return s.fetch(ctx, f, report)
}

// ensureTree makes the directory of hard links whose name is the model's
// digest. It appears whole or not at all.
func (s *Store) ensureTree(ctx context.Context, m *snapshot.Model) (string, error) {
	tree := path.Join(trees, m.Digest().Hex())
	unlock, err := s.locks.lock(ctx, tree)
	if err != nil {
		return "", err
	}
	defer unlock()

	dir := filepath.Join(s.dir, tree)
	if s.Have(m) {
		return dir, nil
	}
	if err := s.accept(m); err != nil {
		return "", err
	}
	tmp := tree + building
	if err := errors.Join(s.root.RemoveAll(tmp), s.root.RemoveAll(tree)); err != nil {
		return "", err
	}
	dirs := map[string]bool{tmp: true}
	for _, f := range m.Files {
		for d := path.Dir(path.Join(tmp, f.Path)); !dirs[d]; d = path.Dir(d) {
			dirs[d] = true
		}
	}
	for _, d := range slices.Sorted(maps.Keys(dirs)) { // parents first
		if err := s.root.Mkdir(d, 0o755); err != nil {
			return "", err
		}
		// The container's user is another one than ours, and our umask may
		// leave it nothing.
		if err := s.root.Chmod(d, 0o755); err != nil {
			return "", err
		}
	}
	for _, f := range m.Files {
		if err := s.root.Link(path.Join(blobs, f.SHA256.Hex()), path.Join(tmp, f.Path)); err != nil {
			return "", err
		}
	}
	for d := range dirs {
		if err := s.sync(d); err != nil {
			return "", err
		}
	}
	failpoint.Here("model.tree.synced")
	if err := s.root.Rename(tmp, tree); err != nil {
		return "", err
	}
	failpoint.Here("model.tree.renamed")
	return dir, s.sync(trees)
}

// rehash reads a blob again.
func (s *Store) rehash(ctx context.Context, d digest.Digest) error {
	f, err := s.root.Open(path.Join(blobs, d.Hex()))
	if err != nil {
		return err
	}
	defer f.Close() // read only: nothing can be lost
	return d.CheckReader(&contextReader{ctx, f})
}

// sync makes changes of a directory below the root survive a power cut.
func (s *Store) sync(dir string) error {
	d, err := s.root.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// contextReader ends reading when its context does.
type contextReader struct {
	ctx context.Context
	r   io.Reader
}

func (c *contextReader) Read(p []byte) (int, error) {
	if err := c.ctx.Err(); err != nil {
		return 0, err
	}
	return c.r.Read(p)
}
