package model

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"net/http"
	"os"
	"path"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/failpoint"
	"github.com/resultity/node/internal/snapshot"
)

const (
	bufferSize = 1 << 20
	buffers    = 4
	// defaultWindow is how much the kernel may have in memory that is not on
	// disk yet, twice over. The sync at a file's end then takes the same short
	// time for every size.
	defaultWindow = 32 << 20
)

// partial is the file of one blob while it is being fetched: the bytes [0,off)
// of the file on disk are those that hash has seen.
type partial struct {
	s      *Store
	name   string // of the blob; the file's has a suffix
	f      *os.File
	hash   hash.Hash
	off    int64
	size   int64
	want   digest.Digest
	origin originRecord
	sole   *source     // who brought every byte; nil if nobody did alone, or it is not known
	spare  chan []byte // buffers that nobody uses
}

// originRecord says which version of which source a partial file is of. It is
// only a hint to ask for the right continuation, so it needs no care: what
// comes of a wrong one is found out by the digest.
type originRecord struct {
	Source       string `json:"source"`
	ETag         string `json:"etag,omitempty"`
	LastModified string `json:"last_modified,omitempty"`
}

func originOf(source string, h http.Header) originRecord {
	const most = 1 << 10 // of what a source may have us write down
	o := originRecord{Source: source}
	// If-Range takes no weak tags.
	if t := h.Get("ETag"); len(t) < most && strings.HasPrefix(t, `"`) {
		o.ETag = t
	}
	if t := h.Get("Last-Modified"); len(t) < most {
		o.LastModified = t
	}
	return o
}

// validator returns what makes source send the rest only if it is the rest of
// the same version.
func (o originRecord) validator(source string) string {
	if o.Source != source {
		return ""
	}
	if o.ETag != "" {
		return o.ETag
	}
	return o.LastModified
}

// openPartial opens the partial file of f, reads what is there already, and
// keeps other processes away from it.
func (s *Store) openPartial(ctx context.Context, f *snapshot.File, report func(int64)) (*partial, error) {
	p := &partial{
		s: s, name: path.Join(blobs, f.SHA256.Hex()), hash: sha256.New(), size: f.Size, want: f.SHA256,
		spare: make(chan []byte, buffers),
	}
	for range buffers {
		p.spare <- make([]byte, bufferSize)
	}
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
	if err := p.load(ctx, report); err != nil {
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

// load hashes what an earlier process left.
func (p *partial) load(ctx context.Context, report func(int64)) error {
	st, err := p.f.Stat()
	if err != nil {
		return p.local(err)
	}
	if st.Size() > p.size {
		return p.reset()
	}
	if raw, err := p.s.root.ReadFile(p.name + origin); err == nil {
		if json.Unmarshal(raw, &p.origin) != nil {
			p.origin = originRecord{} // torn by a crash
		}
	}
	b := <-p.spare
	defer func() { p.spare <- b }()
	for p.off < st.Size() {
		if err := ctx.Err(); err != nil {
			return err
		}
		n, err := p.f.ReadAt(b[:min(int64(len(b)), st.Size()-p.off)], p.off)
		if err != nil && err != io.EOF {
			// Unreadable is as good as wrong, and must not stop us for ever.
			p.s.log.WarnContext(ctx, "partial model file cannot be read, starting over", "error", err)
			return p.reset()
		}
		p.hash.Write(b[:n])
		p.off += int64(n)
		report(p.off)
	}
	return nil
}

// begin notes that src's bytes follow.
func (p *partial) begin(src *source, o originRecord) error {
	switch {
	case p.off == 0:
		p.sole = src
	case p.sole != src:
		p.sole = nil
	}
	if p.origin == o {
		return nil
	}
	p.origin = o
	raw, err := json.Marshal(o)
	if err != nil {
		return p.local(err)
	}
	failpoint.Here("model.origin.begin")
	return p.local(p.s.root.WriteFile(p.name+origin, raw, 0o600))
}

// pour appends r until the full length is there or r ends, and never reads
// beyond. This goroutine reads and writes while another one hashes, so the
// slower of the two sets the pace instead of their sum. At return the hash has
// seen everything up to off.
func (p *partial) pour(r io.Reader, report func(int64)) error {
	filled := make(chan []byte, buffers)
	var hashing sync.WaitGroup
	hashing.Go(func() {
		for b := range filled {
			p.hash.Write(b)
			p.spare <- b[:cap(b)]
		}
	})
	defer hashing.Wait()
	defer close(filled)

	for p.off < p.size {
		b := <-p.spare
		n, readErr := fill(r, b[:min(int64(len(b)), p.size-p.off)])
		if n > 0 {
			failpoint.Here("model.part.begin")
			if _, err := p.f.WriteAt(b[:n], p.off); err != nil {
				p.spare <- b
				// A part of b may be there; the hash has not seen it.
				return p.local(errors.Join(err, p.f.Truncate(p.off)))
			}
			filled <- b[:n]
			p.off += int64(n)
			if err := p.writeOut(int64(n)); err != nil {
				return err
			}
			report(p.off)
		} else {
			p.spare <- b
		}
		if readErr == io.EOF {
			return nil
		}
		if readErr != nil {
			return readErr
		}
	}
	return nil
}

// fill reads until b is full or r fails, and keeps r's own error, which tells a
// whole body from one that was cut.
func fill(r io.Reader, b []byte) (n int, err error) {
	for n < len(b) && err == nil {
		var k int
		k, err = r.Read(b[n:])
		n += k
	}
	if n == len(b) {
		err = nil
	}
	return n, err
}

// writeOut is called after n bytes more. At each full window it has the kernel
// begin to write that one to disk, waits for the one before, and sees to it
// that the rest of the file system's space stays free.
func (p *partial) writeOut(n int64) error {
	window := p.s.window
	end := p.off / window * window
	if end <= p.off-n {
		return nil
	}
	start := end - window
	err := unix.SyncFileRange(int(p.f.Fd()), start, window, unix.SYNC_FILE_RANGE_WRITE)
	if err == nil && start >= window {
		err = unix.SyncFileRange(int(p.f.Fd()), start-window, window,
			unix.SYNC_FILE_RANGE_WAIT_BEFORE|unix.SYNC_FILE_RANGE_WRITE|unix.SYNC_FILE_RANGE_WAIT_AFTER)
	}
	// Some file systems do not know this call, and need not. Any other error
	// counts: the kernel reports it once, so the sync at the end may not.
	if err != nil && !errors.Is(err, unix.ENOSYS) && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ESPIPE) && !errors.Is(err, unix.EOPNOTSUPP) {
		return p.local(err)
	}
	free, err := p.s.free()
	if err != nil {
		return p.local(err)
	}
	if free == 0 && p.off < p.size {
		return p.local(unix.ENOSPC)
	}
	return nil
}

// finish gives the file its final name if it is what its digest names, and
// fails with [digest.ErrMismatch] otherwise.
//
// System calls, in order: fsync, fchmod, rename, fsync of the directory.
func (p *partial) finish() error {
	if got := digest.FromSum([sha256.Size]byte(p.hash.Sum(nil))); got != p.want {
		return fmt.Errorf("%w: want %s, got %s", digest.ErrMismatch, p.want, got)
	}
	// The container's user is another one than ours.
	if err := errors.Join(p.f.Chmod(0o444), p.f.Sync()); err != nil {
		return p.local(err)
	}
	failpoint.Here("model.file.synced")
	if err := p.s.root.Rename(p.name+unverified, p.name); err != nil {
		return p.local(err)
	}
	failpoint.Here("model.file.renamed")
	if err := p.s.root.Remove(p.name + origin); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return p.local(err)
	}
	return p.local(p.s.sync(blobs))
}

// reset throws away what is there.
func (p *partial) reset() error {
	p.hash.Reset()
	p.off, p.sole, p.origin = 0, nil, originRecord{}
	if err := p.f.Truncate(0); err != nil {
		return p.local(err)
	}
	if err := p.s.root.Remove(p.name + origin); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return p.local(err)
	}
	return nil
}

// close leaves what has arrived for the next time; an empty file is no use.
func (p *partial) close() {
	if p.off == 0 {
		// At worst they are found again, and say nothing.
		_ = p.s.root.Remove(p.name + unverified)
		_ = p.s.root.Remove(p.name + origin)
	}
	_ = p.f.Close() // what had to be on disk has been synced
}

// local marks an error as this machine's, and makes a full disk say so.
func (p *partial) local(err error) error {
	if err == nil {
		return nil
	}
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
		return localError{&NoSpaceError{Dir: p.s.dir, Need: p.size - p.off}}
	}
	return localError{err}
}
