package state

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"time"

	bolt "go.etcd.io/bbolt"

	"github.com/resultity/node/internal/durable"
	"github.com/resultity/node/internal/receipt"
	"github.com/resultity/node/internal/wire"
)

const (
	schema = "1"

	// lockWait is how long another agent may still be on its way out.
	lockWait = time.Second

	// mapSize is the address space that the file gets at first. It costs no
	// memory, and until the file is larger no commit has to wait for readers.
	mapSize = 64 << 20
)

// Open opens the store at path, and makes it if there is none; its directory
// must exist. The whole content is read and checked. It fails with [ErrLocked]
// or [ErrCorrupt], and leaves the file as it was.
func Open(path string, b Bounds, now func() time.Time) (_ *Store, err error) {
	if b.Jobs == 0 {
		b.Jobs = DefaultBounds.Jobs
	}
	if b.Bytes == 0 {
		b.Bytes = DefaultBounds.Bytes
	}
	if b.IDs == 0 {
		b.IDs = DefaultBounds.IDs
	}
	if err := create(path); err != nil {
		return nil, fmt.Errorf("job store %s: %w", path, err)
	}
	s := &Store{bounds: b, now: now, reserve: fallocate}
	if s.db, err = s.open(path); err != nil {
		return nil, fmt.Errorf("job store %s: %w", path, err)
	}
	return s, nil
}

// create makes an empty store under a name of its own and then gives it the
// final one, so that no half-made store is ever found there.
func create(path string) error {
	if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(path), filepath.Base(path)+".new*") // mode 0600
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	if err := f.Close(); err != nil {
		return err
	}
	db, err := bolt.Open(f.Name(), 0o600, &bolt.Options{PageSize: pageSize})
	if err != nil {
		return err
	}
	err = db.Update(func(tx *bolt.Tx) error {
		for _, name := range [][]byte{bucketMeta, bucketKnown, bucketJobs, bucketOutbox, bucketSettled} {
			if _, err := tx.CreateBucket(name); err != nil {
				return err
			}
		}
		return tx.Bucket(bucketMeta).Put(keySchema, []byte(schema))
	})
	if err := errors.Join(err, db.Close()); err != nil {
		return err
	}
	// A link, since a rename would replace what another agent has made meanwhile.
	if err := os.Link(f.Name(), path); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return durable.SyncDir(filepath.Dir(path))
}

// open locks the file, reads all of it, and only then lets bbolt have it.
func (s *Store) open(path string) (_ *bolt.DB, err error) {
	db, err := bolt.Open(path, 0o600, &bolt.Options{
		InitialMmapSize: mapSize,
		NoStatistics:    true,
		OpenFile: func(name string, _ int, _ os.FileMode) (*os.File, error) {
			f, err := openVerified(name)
			s.file = f
			return f, err
		},
	})
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			_ = db.Close() // the error that brought us here says more
		}
	}()
	if err := db.View(s.check); err != nil {
		return nil, err
	}
	// Also fills holes, should bbolt have grown the file itself once. A full
	// disk is no reason not to start: results can still be delivered.
	info, err := s.file.Stat()
	if err != nil {
		return nil, err
	}
	if s.reserve(s.file.Fd(), info.Size()) == nil {
		s.allocated = info.Size()
	}
	return db, nil
}

// openVerified opens a file that is ours alone and that bbolt can walk through.
func openVerified(name string) (_ *os.File, err error) {
	f, err := os.OpenFile(name, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			_ = f.Close() // the error that brought us here says more
		}
	}()
	if err := lock(f); err != nil {
		return nil, err
	}
	if err := f.Chmod(0o600); err != nil { // requests and responses are nobody else's
		return nil, err
	}
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if err := verifyPages(f, info.Size()); err != nil {
		if _, ok := errors.AsType[*fs.PathError](err); ok {
			return nil, err // the disk's own word
		}
		return nil, fmt.Errorf("%w: %w", ErrCorrupt, err)
	}
	return f, nil
}

// lock takes the lock that bbolt takes again, through the same file, a moment
// later. Nobody else may write while the file is read.
func lock(f *os.File) error {
	for end := time.Now().Add(lockWait); ; time.Sleep(20 * time.Millisecond) {
		switch err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); {
		case err == nil:
			return nil
		case err != syscall.EWOULDBLOCK && err != syscall.EINTR:
			return fmt.Errorf("lock: %w", err)
		case time.Now().After(end):
			return ErrLocked
		}
	}
}

// check reads every record and compares the buckets with one another. What it
// finds is the count of the store.
func (s *Store) check(tx *bolt.Tx) error {
	damaged := func(format string, a ...any) error {
		return fmt.Errorf("%w: %w", ErrCorrupt, fmt.Errorf(format, a...))
	}
	for _, name := range [][]byte{bucketMeta, bucketKnown, bucketJobs, bucketOutbox, bucketSettled} {
		if tx.Bucket(name) == nil {
			return damaged("it has no bucket %s", name)
		}
	}
	if v := string(tx.Bucket(bucketMeta).Get(keySchema)); v != schema {
		return fmt.Errorf("its format is %.20q, this agent knows %q: use the agent that wrote it, or move the file away", v, schema)
	}
	if _, err := registration(tx); err != nil {
		return err
	}
	var t totals
	known := func(id receipt.JobID, want entry) error {
		if e, ok := lookup(tx, id); !ok || e != want {
			return damaged("job %s is not listed as it is stored", id)
		}
		return nil
	}
	jobs, outbox := tx.Bucket(bucketJobs), tx.Bucket(bucketOutbox)
	if err := jobs.ForEach(func(k, _ []byte) error {
		rec := getRecord(jobs, k)
		j, err := decodeJob(rec)
		switch {
		case err != nil:
			return err
		case string(k) != string(j.ID[:]):
			return damaged("job %s lies in the wrong place", j.ID)
		}
		t.accepted++
		t.bytes += int64(len(rec))
		return known(j.ID, entry{state: Running, size: int64(len(rec))})
	}); err != nil {
		return err
	}
	if err := outbox.ForEach(func(k, _ []byte) error {
		rec := getRecord(outbox, k)
		var r struct { // not its receipt, whose signature takes a while
			Job  receipt.JobID
			Code wire.Code
		}
		if _, err := decodeRecord(rec, &r); err != nil {
			return err
		}
		if len(k) != 8 || fromNumber(k) > outbox.Sequence() {
			return damaged("result of job %s lies in the wrong place", r.Job)
		}
		t.results++
		t.bytes += int64(len(rec))
		return known(r.Job, entry{state: Done, receipt: r.Code == "", seq: fromNumber(k), size: int64(len(rec))})
	}); err != nil {
		return err
	}
	if err := tx.Bucket(bucketSettled).ForEach(func(k, v []byte) error {
		if len(k) != 8 || len(v) != 8+len(receipt.JobID{}) {
			return damaged("a settled id of %d bytes", len(v))
		}
		t.settled++
		return known(receipt.JobID(v[8:]), entry{state: Settled, seq: fromNumber(k)})
	}); err != nil {
		return err
	}
	n := 0
	if err := tx.Bucket(bucketKnown).ForEach(func(_, _ []byte) error { n++; return nil }); err != nil {
		return err
	}
	if want := t.accepted + t.results + t.settled; n != want {
		return damaged("%d jobs are listed, %d are stored", n, want)
	}
	s.count = t
	return nil
}
