package state

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/resultity/node/internal/durable"
	"github.com/resultity/node/internal/failpoint"
	"github.com/resultity/node/internal/receipt"
	"github.com/resultity/node/internal/wire"
)

// This file keeps the last jobs with their results for the operator, who may run
// them again. It is apart from the store: nothing rests on it, a job is in it only
// after its result is safe, and where the operator wants none kept there is no
// directory. The rules are:
//
//   - A job is a file of its own, mode 0600, whole under its name or not there.
//   - Its number rises; the lowest goes first when there are too many, or too many
//     bytes. A damaged one goes when it is met.
//   - What a crash has left half-written is a prompt, too: it goes at the next start.
//   - What is on the disk is counted, also where it could not be made durable.

const maxKeptBytes = 256 << 20 // of all files, however few jobs that are

// ErrNotKept says that a job is not among those that are kept.
var ErrNotKept = errors.New("job is not kept")

// ErrKeptDamaged says, beside [ErrNotKept], that it was.
var ErrKeptDamaged = errors.New("its file was damaged")

// Kept are the last jobs of a node with their results. Safe for concurrent use.
type Kept struct {
	dir   string
	most  int
	bytes int64 // that all files may have
	write func(name string, data []byte, mode fs.FileMode) error

	mu   sync.Mutex // guards what follows, and the directory
	list []keptJob  // oldest first
	size int64
	last uint64
}

type keptJob struct {
	id     receipt.JobID
	number uint64
	size   int64
}

func (k *keptJob) file() string { return fmt.Sprintf("%016x-%s.job", k.number, k.id) }

// OpenKept opens what is kept in the directory path, of most jobs at most. Where
// most is 0, path is removed with all that is in it.
func OpenKept(path string, most int) (*Kept, error) {
	k := &Kept{dir: path, most: most, bytes: maxKeptBytes, write: durable.WriteFile}
	if err := k.open(); err != nil {
		return nil, fmt.Errorf("jobs kept for replay: %w", err)
	}
	return k, nil
}

func (k *Kept) open() error {
	if k.most == 0 {
		return os.RemoveAll(k.dir) // what a power cut brings back goes at the next start
	}
	if err := os.Mkdir(k.dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	if err := os.Chmod(k.dir, 0o700); err != nil { // prompts and answers are nobody else's
		return err
	}
	entries, err := os.ReadDir(k.dir) // by name, which is by number
	if err != nil {
		return err
	}
	for _, e := range entries {
		j, ok := parseKept(e.Name())
		info, err := e.Info()
		if !ok || err != nil || !info.Mode().IsRegular() {
			if err := os.RemoveAll(filepath.Join(k.dir, e.Name())); err != nil {
				return err
			}
			continue
		}
		j.size = info.Size()
		k.list, k.size, k.last = append(k.list, j), k.size+j.size, j.number
	}
	return k.trim()
}

func parseKept(name string) (j keptJob, ok bool) {
	number, id, ok := strings.Cut(strings.TrimSuffix(name, ".job"), "-")
	if !ok {
		return j, false
	}
	var err, idErr error
	j.number, err = strconv.ParseUint(number, 16, 64)
	j.id, idErr = receipt.ParseJobID(id)
	return j, err == nil && idErr == nil && j.file() == name
}

// trim removes the oldest jobs until the others are within bounds.
func (k *Kept) trim() error {
	for len(k.list) > k.most || k.size > k.bytes {
		if err := k.remove(0); err != nil {
			return err
		}
	}
	return nil
}

func (k *Kept) remove(i int) error {
	j := k.list[i]
	if err := os.Remove(filepath.Join(k.dir, j.file())); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	k.list = slices.Delete(k.list, i, i+1)
	k.size -= j.size
	return nil
}

func (k *Kept) find(id receipt.JobID) int {
	return slices.IndexFunc(k.list, func(j keptJob) bool { return j.id == id })
}

// Put keeps a job and the result that it has been given. One that is kept already
// has the new result then.
func (k *Kept) Put(j *wire.Job, r *wire.Result) error {
	if k.most == 0 {
		return nil
	}
	now := time.Time{} // of no interest
	job, err := encodeJob(now, j)
	if err != nil {
		return fmt.Errorf("keep job %s: %w", j.ID, err)
	}
	result, err := encodeResult(now, r)
	if err != nil {
		return fmt.Errorf("keep job %s: %w", j.ID, err)
	}
	text := binary.BigEndian.AppendUint32(make([]byte, 0, 4+len(job)+len(result)), uint32(len(job)))
	text = append(append(text, job...), result...)

	k.mu.Lock()
	defer k.mu.Unlock()
	n := keptJob{id: j.ID, number: k.last + 1, size: int64(len(text))}
	failpoint.Here("state.kept.begin")
	k.last = n.number // also of one that fails: its file may come back after a power cut
	wrong := k.write(filepath.Join(k.dir, n.file()), text, 0o600)
	k.list, k.size = append(k.list, n), k.size+n.size
	if wrong != nil {
		// It may be there all the same, where only the directory could not be synced. A
		// file that cannot be removed counts, so that it goes in its turn.
		wrong = errors.Join(fmt.Errorf("keep job %s: %w", j.ID, wrong), k.remove(len(k.list)-1))
	} else if i := k.find(j.ID); k.list[i].number != n.number {
		wrong = k.remove(i)
	}
	if err := k.trim(); err != nil {
		wrong = errors.Join(wrong, fmt.Errorf("remove old jobs kept for replay: %w", err))
	}
	return wrong
}

// Get returns a job and its result, or [ErrNotKept]. A damaged one is removed.
func (k *Kept) Get(id receipt.JobID) (*wire.Job, *wire.Result, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	i := k.find(id)
	if i < 0 {
		return nil, nil, fmt.Errorf("job %s: %w", id, ErrNotKept)
	}
	text, err := os.ReadFile(filepath.Join(k.dir, k.list[i].file()))
	if err != nil {
		return nil, nil, fmt.Errorf("read job %s, which is kept: %w", id, err)
	}
	j, r, err := decodeKept(text)
	if err != nil || j.ID != id || r.Job != id {
		return nil, nil, errors.Join(fmt.Errorf("job %s: %w any more: %w, and is removed; look at this machine's disk", id, ErrNotKept, ErrKeptDamaged), k.remove(i))
	}
	return j, r, nil
}

func decodeKept(text []byte) (*wire.Job, *wire.Result, error) {
	if len(text) < 4 || uint64(binary.BigEndian.Uint32(text)) > uint64(len(text)-4) {
		return nil, nil, fmt.Errorf("%w: %d bytes", ErrCorrupt, len(text))
	}
	n := binary.BigEndian.Uint32(text)
	j, err := decodeJob(text[4 : 4+n])
	if err != nil {
		return nil, nil, err
	}
	r, err := decodeResult(text[4+n:])
	return j, r, err
}

// IDs returns the jobs that are kept, the newest first.
func (k *Kept) IDs() []receipt.JobID {
	k.mu.Lock()
	defer k.mu.Unlock()
	ids := make([]receipt.JobID, 0, len(k.list))
	for _, j := range slices.Backward(k.list) {
		ids = append(ids, j.id)
	}
	return ids
}
