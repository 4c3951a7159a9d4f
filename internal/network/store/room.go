package store

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"github.com/resultity/node/internal/journal"
)

var (
	// ErrNoRoom says that the disk is too full for a write. It ends by itself when
	// there is room.
	ErrNoRoom = errors.New("too little room on the disk")
	// ErrFailed says that JetStream has stopped after a write error. [Store.Run]
	// starts it anew.
	ErrFailed = errors.New("the store cannot write")
)

// room knows how much of its disk the store may use.
type room struct {
	dir  string
	free func(dir string) (int64, error) // bytes

	retries  int       // openings of the files anew, one soon after the other; the guard's
	reopened time.Time // the last one, or attempt; likewise

	mu    sync.Mutex // guards what follows
	keep  int64      // bytes that must be free for new jobs and logs
	state State

	requests int64 // bytes of requests that are kept; 0 for none
}

// writesShare is which part of that must be free for anything to be written.
const writesShare = 8

func (r *room) limit() (jobs, writes int64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.keep, r.keep / writesShare
}

// State is how the store is.
type State struct {
	Free     int64 // bytes on its file system, as of the last look
	Err      error // why no new jobs are taken, or nil
	Reopened int   // how often the files were opened anew
}

// State returns how the store was found at the last look.
func (s *Store) State() State {
	s.room.mu.Lock()
	defer s.room.mu.Unlock()
	return s.room.state
}

// Accepting says why no new jobs are taken, or nil. It does not touch the disk.
func (s *Store) Accepting() error { return s.State().Err }

// check fails when writing n bytes would leave less than keep.
func (r *room) check(keep, n int64) error {
	free, err := r.free(r.dir)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrNoRoom, err)
	}
	if free-n < keep {
		return fmt.Errorf("%w: %d MiB are free on the file system of %s, and %d MiB must be: delete what else is there, or enlarge it", ErrNoRoom, free>>20, r.dir, keep>>20)
	}
	return nil
}

// purpose says how much must stay free when something is written.
type purpose int

const (
	more   purpose = iota // new work: it has more written later
	needed                // what work that was taken needs, and what is small
)

// write begins an operation that writes about n bytes. It is bounded by time and
// ends when the server fails. The caller calls end.
func (s *Store) write(ctx context.Context, why purpose, n int) (_ *db, _ context.Context, end func(), err error) {
	d := s.now.Load()
	if d.failed.Err() != nil {
		return nil, nil, nil, context.Cause(d.failed)
	}
	keep, writes := s.room.limit()
	if why == needed {
		keep = writes
	}
	if err := s.room.check(keep, int64(n)); err != nil {
		return nil, nil, nil, err
	}
	limited, cancel := context.WithTimeout(ctx, opTimeout)
	stop := context.AfterFunc(d.failed, cancel)
	return d, limited, func() {
		if errors.Is(limited.Err(), context.DeadlineExceeded) && ctx.Err() == nil {
			d.fail(fmt.Errorf("%w: no answer within %v", ErrFailed, opTimeout))
		}
		stop()
		cancel()
	}, nil
}

// failure adds why an operation failed, when that is the server's own state.
func (d *db) failure(err error) error {
	if err != nil && d.failed.Err() != nil {
		return fmt.Errorf("%w: %w", context.Cause(d.failed), err)
	}
	return err
}

// reopenDelays are between openings of the files anew; the first one is at once.
// A full disk is not tried before there is room.
var reopenDelays = []time.Duration{0, time.Second, 2 * time.Second, 5 * time.Second}

// calm is how long a server must have run for its failure to be a new one.
const calm = time.Minute

// guard looks at the disk and the server, has another server run when this one has
// failed, and notes how things are.
func (s *Store) guard(ctx context.Context) {
	r := &s.room
	was := s.State()
	now := was
	jobs, writes := r.limit()
	if was.Err != nil {
		jobs += jobs / 4 // or it would go to and fro
	}
	d := s.now.Load()
	if !d.server.JetStreamEnabled() || !d.conn.IsConnected() {
		d.fail(ErrFailed)
	}
	if d.failed.Err() != nil {
		now.Err = r.check(writes, 0)
		if now.Err == nil {
			now.Err = s.reopen(ctx)
		}
		if now.Err == nil {
			now.Reopened++
		}
	}
	if s.now.Load().failed.Err() == nil {
		now.Err = r.check(jobs, 0)
	}
	if free, err := r.free(r.dir); err == nil { // else check has said so
		now.Free = free
	}
	switch {
	case was.Err == nil && now.Err != nil:
		s.log.Error("no new requests are taken until the disk of the store is well", journal.RequestsRefused.Attr(), "error", now.Err, "free", now.Free)
	case was.Err != nil && now.Err == nil:
		s.log.Info("requests are taken again", "free", now.Free, "reopened", now.Reopened)
	}
	r.mu.Lock()
	r.state = now
	r.mu.Unlock()
}

// reopen has another server run over the files, once the disk takes writes and it
// is time. Otherwise it says why the store has failed.
func (s *Store) reopen(ctx context.Context) error {
	r, d := &s.room, s.now.Load()
	if since := time.Since(r.reopened); since > calm {
		r.retries = 0
	} else if since < reopenDelays[min(r.retries, len(reopenDelays)-1)] {
		return context.Cause(d.failed)
	}
	r.retries++
	defer func() { r.reopened = time.Now() }()
	if err := tryWrite(s.dir); err != nil {
		return fmt.Errorf("%w: %w", ErrFailed, err)
	}
	known := s.remembered(ctx, d)
	if !d.close() {
		return errStuck
	}
	if err := s.mendSome(known); err != nil {
		return fmt.Errorf("%w: %w", ErrFailed, err)
	}
	ctx, cancel := context.WithTimeout(ctx, reopenTimeout)
	defer cancel()
	d, err := s.start(ctx)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrFailed, err)
	}
	s.now.Store(d)
	return nil
}

// errStuck says that JetStream does not end. It may try for ever to remove a damaged
// record; only the end of the process helps.
var errStuck = fmt.Errorf("%w: JetStream does not end", ErrFailed)

// reopenTimeout is for JetStream to say what there is, once it has read it.
const reopenTimeout = time.Minute

// tryWrite shows that the disk of a directory takes writes.
func tryWrite(dir string) error {
	f, err := os.Create(filepath.Join(dir, "try"))
	if err != nil {
		return err
	}
	_, err = f.Write(make([]byte, 4096))
	return errors.Join(err, f.Sync(), f.Close(), os.Remove(f.Name()))
}

// freeIn is what is free on the file system of a directory, in bytes.
func freeIn(dir string) (int64, error) {
	var st syscall.Statfs_t
	if err := syscall.Statfs(dir, &st); err != nil {
		return 0, &fs.PathError{Op: "statfs", Path: dir, Err: err}
	}
	return int64(st.Bavail) * st.Bsize, nil
}
