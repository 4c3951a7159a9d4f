package model

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/resultity/node/internal/chunk"
	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/failpoint"
	"github.com/resultity/node/internal/model/fetch"
	"github.com/resultity/node/internal/snapshot"
)

// unwritten is how many chunks the kernel may have in memory that are not on disk
// yet. The sync at a file's end then takes the same short time for every size.
const unwritten = 8

// partial is the file of one blob while it is being fetched. Only verified chunks
// are in it, those that an earlier process left as well as those of this one.
type partial struct {
	s    *Store
	name string // of the blob; the file's has a suffix
	f    *os.File
	list *chunk.List
	want digest.Digest
	seal *verityHash // of what was hashed; nil where files are not sealed

	mu      sync.Mutex // guards what follows
	arrived *sync.Cond // of mu: have or ended has changed
	have    []bool     // by chunk
	bytes   int64      // of those
	ended   bool       // no more chunks come
	writing []int      // chunks on their way to the disk, the oldest first
}

// fetch makes f a blob from its sources, and from what of it is on this disk. The
// caller has the blob's lock.
func (s *Store) fetch(ctx context.Context, f *snapshot.File, report func(int64)) error {
	list, err := s.list(ctx, f)
	if err != nil {
		return err
	}
	p, err := s.openPartial(ctx, f, list)
	if err != nil {
		return err
	}
	if s.canSeal(p.f) {
		p.seal = newVerityHash()
	}
	err = p.fill(ctx, f, report)
	p.close() // nobody may have a file open for writing that is sealed
	failpoint.Here("model.file.closed")
	if err != nil || p.seal == nil {
		return err
	}
	return s.seal(ctx, f.SHA256, p.seal.sum())
}

// fill brings what is missing and gives the file its final name.
func (p *partial) fill(ctx context.Context, f *snapshot.File, report func(int64)) error {
	if err := p.salvage(ctx); err != nil {
		return err
	}
	sum := make(chan error, 1)
	go func() { sum <- p.sum(ctx) }()
	missing := p.missing()
	err := p.s.fetcher.Fetch(ctx, &fetch.File{Path: f.Path, SHA256: f.SHA256, List: p.list, Sources: f.Sources}, missing, p.put,
		func(int) { report(p.here()) })
	p.mu.Lock()
	p.ended = true
	p.arrived.Broadcast()
	p.mu.Unlock()
	if err = errors.Join(err, <-sum); err == nil && len(p.missing()) > 0 {
		err = errors.New("chunks are missing at the end") // never, but a name is for what was hashed
	}
	if err != nil {
		if errors.Is(err, digest.ErrMismatch) && len(p.missing()) == 0 {
			// Each chunk is what the root names, so this is not what arrived.
			return errors.Join(err, p.reset())
		}
		return err
	}
	return p.finish()
}

// list returns the hashes of f's chunks. They are kept beside the blob where they
// are not in the configuration: it may have to be repaired when the place that had
// them is gone.
func (s *Store) list(ctx context.Context, f *snapshot.File) (*chunk.List, error) {
	name := path.Join(blobs, f.SHA256.Hex()) + hashes
	if f.Chunks.Sources != nil {
		if raw, err := s.root.ReadFile(name); err == nil {
			if l, err := chunk.Parse(raw, f.Size, f.Chunks.Root); err == nil {
				return l, nil
			}
		}
	}
	l, err := s.fetcher.List(ctx, f)
	if err != nil || f.Chunks.Sources == nil {
		return l, err
	}
	failpoint.Here("model.hashes.begin")
	if err := s.root.WriteFile(name, l.Bytes(), 0o600); err != nil { // what is cut short is found out above
		return nil, s.local(err, f.Size)
	}
	return l, nil
}

// openPartial opens the partial file of f, looks which of its chunks are there
// already, and keeps other processes away from it.
func (s *Store) openPartial(ctx context.Context, f *snapshot.File, list *chunk.List) (*partial, error) {
	p := &partial{s: s, name: path.Join(blobs, f.SHA256.Hex()), list: list, want: f.SHA256, have: make([]bool, list.Len())}
	p.arrived = sync.NewCond(&p.mu)
	open := func() (*os.File, error) { return s.root.OpenFile(p.name+unverified, os.O_RDWR|os.O_CREATE, 0o600) }
	file, err := open()
	if errors.Is(err, fs.ErrPermission) {
		if err = p.thaw(); err == nil {
			file, err = open()
		}
	}
	if err != nil {
		return nil, p.local(err)
	}
	p.f = file
	if err := p.own(); err != nil {
		_ = file.Close() // it is somebody else's, untouched
		return nil, p.local(fmt.Errorf("another process is fetching %s: %w", p.name, err))
	}
	if err := p.load(ctx); err != nil {
		p.close()
		return nil, err
	}
	return p, nil
}

// thaw makes a file writable again whose process died right before it got its
// final name: it had its final mode already.
func (p *partial) thaw() error {
	f, err := p.s.root.Open(p.name + unverified)
	if err != nil {
		return err
	}
	defer f.Close() // nothing is written
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return fmt.Errorf("another process is fetching %s: %w", p.name, err)
	}
	return f.Chmod(0o600)
}

// own takes the file for this process until it is closed, and makes sure that
// the name has not gone to another file meanwhile: what is renamed at the end
// must be what was written.
func (p *partial) own() error {
	if err := unix.Flock(int(p.f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return err
	}
	mine, err := p.f.Stat()
	if err != nil {
		return err
	}
	named, err := p.s.root.Lstat(p.name + unverified)
	if err != nil {
		return err
	}
	if !os.SameFile(mine, named) {
		return errors.New("the file was replaced")
	}
	return nil
}

// load hashes the chunks that an earlier process left.
func (p *partial) load(ctx context.Context) error {
	st, err := p.f.Stat()
	if err != nil {
		return p.local(err)
	}
	if st.Size() > p.list.Size() {
		if err := p.f.Truncate(p.list.Size()); err != nil {
			return p.local(err)
		}
	}
	return p.scan(ctx, p.f, func(i int, _ []byte) error {
		p.got(i)
		return nil
	})
}

// scan calls found for each chunk that p lacks and that from has, at its own place.
// What cannot be read is as good as wrong.
func (p *partial) scan(ctx context.Context, from *os.File, found func(i int, b []byte) error) error {
	buf := make([]byte, chunk.Size)
	for i := 0; i < p.list.Len(); i++ {
		if err := ctx.Err(); err != nil {
			return err
		}
		off, n := p.list.Range(i)
		// Nothing was ever written into holes.
		data, err := unix.Seek(int(from.Fd()), off, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			return nil
		}
		if next := int(data / chunk.Size); err == nil && next > i {
			i = next - 1
			continue
		}
		if p.have[i] {
			continue
		}
		if _, err := from.ReadAt(buf[:n], off); err != nil || p.list.Check(i, buf[:n]) != nil {
			continue
		}
		if err := found(i, buf[:n]); err != nil {
			return err
		}
	}
	return nil
}

// salvage takes what is right out of a damaged file of this name, so that only what
// is broken has to be fetched. That one is left as it is: an engine may have it in
// memory.
func (p *partial) salvage(ctx context.Context) error {
	old, err := p.s.root.Open(p.name + quarantined)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return p.local(err)
	}
	defer old.Close() // read only: nothing can be lost
	taken := 0
	err = p.scan(ctx, old, func(i int, b []byte) error {
		taken++
		off, n := p.list.Range(i)
		// Where the file system can, both files have the same blocks then.
		from, to := off, off
		if k, err := unix.CopyFileRange(int(old.Fd()), &from, int(p.f.Fd()), &to, n, 0); err == nil && k == n {
			return p.arrive(i)
		}
		return p.put(i, b)
	})
	if err == nil {
		p.s.log.InfoContext(ctx, "a damaged model file is repaired", "sha256", p.want.Hex(), "chunks", p.list.Len(), "broken", p.list.Len()-taken)
	}
	return err
}

// missing lists the chunks that are not here.
func (p *partial) missing() (list []int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for i, here := range p.have {
		if !here {
			list = append(list, i)
		}
	}
	return list
}

// got notes that a chunk is here.
func (p *partial) got(i int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.have[i] {
		_, n := p.list.Range(i)
		p.have[i] = true
		p.bytes += int64(n)
		p.arrived.Broadcast()
	}
}

// here returns how many bytes are here.
func (p *partial) here() int64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.bytes
}

// put writes a chunk, which has been verified. It may be called concurrently, also
// for the same chunk.
func (p *partial) put(i int, b []byte) error {
	off, _ := p.list.Range(i)
	failpoint.Here("model.part.begin")
	if _, err := p.f.WriteAt(b, off); err != nil {
		return p.local(err)
	}
	return p.arrive(i)
}

// arrive is called after chunk i has been written. It has the kernel begin to write
// it to disk, waits for the one that was [unwritten] before it, and sees to it that the
// rest of the file system's space stays free.
func (p *partial) arrive(i int) error {
	p.got(i)
	p.mu.Lock()
	p.writing = append(p.writing, i)
	oldest := -1
	if len(p.writing) > unwritten {
		oldest, p.writing = p.writing[0], p.writing[1:]
	}
	p.mu.Unlock()
	if err := p.writeOut(i, unix.SYNC_FILE_RANGE_WRITE); err != nil {
		return err
	}
	if oldest >= 0 {
		if err := p.writeOut(oldest, unix.SYNC_FILE_RANGE_WAIT_BEFORE|unix.SYNC_FILE_RANGE_WRITE|unix.SYNC_FILE_RANGE_WAIT_AFTER); err != nil {
			return err
		}
	}
	free, err := p.s.free()
	if err != nil {
		return p.local(err)
	}
	if free == 0 && len(p.missing()) > 0 {
		return p.local(unix.ENOSPC)
	}
	return nil
}

func (p *partial) writeOut(i, how int) error {
	off, n := p.list.Range(i)
	err := unix.SyncFileRange(int(p.f.Fd()), off, int64(n), how)
	// Some file systems do not know this call, and need not. Any other error
	// counts: the kernel reports it once, so the sync at the end may not.
	if err != nil && !errors.Is(err, unix.ENOSYS) && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ESPIPE) && !errors.Is(err, unix.EOPNOTSUPP) {
		return p.local(err)
	}
	return nil
}

// sum hashes the whole file as its chunks arrive, and fails with
// [digest.ErrMismatch] if it is not what its digest names. If chunks are missing in
// the end, it says nothing.
func (p *partial) sum(ctx context.Context) error {
	h, buf := sha256.New(), make([]byte, 1<<20)
	to := io.Writer(h)
	if p.seal != nil {
		to = io.MultiWriter(h, p.seal)
	}
	for i := range p.list.Len() {
		p.mu.Lock()
		for !p.have[i] && !p.ended {
			p.arrived.Wait()
		}
		here := p.have[i]
		p.mu.Unlock()
		if !here {
			return nil
		}
		if err := ctx.Err(); err != nil {
			return err // nothing was found out
		}
		off, n := p.list.Range(i)
		if _, err := io.CopyBuffer(to, struct{ io.Reader }{io.NewSectionReader(p.f, off, int64(n))}, buf); err != nil {
			return p.local(err)
		}
	}
	if got := digest.FromSum([sha256.Size]byte(h.Sum(nil))); got != p.want {
		return fmt.Errorf("%w: its chunks are those of the root, and its SHA-256 is %s instead of %s: either the publisher has mixed two files up, or this disk returns other bytes than were written", digest.ErrMismatch, got, p.want)
	}
	return nil
}

// finish gives the file its final name. It has been verified.
//
// System calls, in order: fsync, fchmod, rename, fsync of the directory.
func (p *partial) finish() error {
	// The container's user is another one than ours.
	if err := errors.Join(p.f.Chmod(0o444), p.f.Sync()); err != nil {
		return p.local(err)
	}
	failpoint.Here("model.file.synced")
	if err := p.s.root.Rename(p.name+unverified, p.name); err != nil {
		return p.local(err)
	}
	failpoint.Here("model.file.renamed")
	return p.local(p.s.sync(blobs))
}

// reset throws away what is there.
func (p *partial) reset() error {
	clear(p.have)
	p.bytes = 0
	return p.local(p.f.Truncate(0))
}

// close leaves what has arrived for the next time; an empty file is no use.
func (p *partial) close() {
	if len(p.missing()) == p.list.Len() {
		_ = p.s.root.Remove(p.name + unverified) // at worst it is found again, and says nothing
	}
	_ = p.f.Close() // what had to be on disk has been synced
}

// local marks an error as this machine's, and makes a full disk say so.
func (p *partial) local(err error) error {
	return p.s.local(err, p.list.Size()-p.here())
}

// local makes a full disk say so, and how much of a file could not be written.
func (s *Store) local(err error, need int64) error {
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
		return &NoSpaceError{Dir: s.dir, Need: need}
	}
	return err
}
