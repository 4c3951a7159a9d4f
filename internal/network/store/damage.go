package store

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/resultity/node/internal/durable"
	"github.com/resultity/node/internal/network/store/blocks"
)

// ErrDamaged says that something in the store is not what was put there.
var ErrDamaged = errors.New("damaged in the store")

const (
	// maxTried bounds, in bytes that are hashed, how much is tried to find out what
	// damaged records were, at one time.
	maxTried = 4 << 30
	// maxEvidence bounds the bytes of damaged records that are kept.
	maxEvidence = 256 << 20
	// openRead is how much of streams that were closed well is read before the store
	// opens; the rest is looked at while it runs.
	openRead = 1 << 30
	// lostAge is how long a lost record is remembered that is not waited for.
	lostAge = 30 * 24 * time.Hour
)

// Lost is a record that could not be read any more, and was not to be mended.
type Lost struct {
	ID      string    `json:"id"`
	Found   time.Time `json:"found"`
	Stream  string    `json:"stream"`
	Block   uint32    `json:"block"`
	Offset  int       `json:"offset"`
	Size    int       `json:"size"`    // of what is damaged, in bytes
	Seq     uint64    `json:"seq"`     // its number, or the first that it can have
	Last    uint64    `json:"last"`    // the last that it can have; there may be others between
	Subject string    `json:"subject"` // "" where it cannot be read
	Means   string    `json:"means"`
	Waits   bool      `json:"waits"` // nothing takes its place before the operator says so
}

// lost knows the records that are lost. Each has a file in the directory damaged, and
// one with the bytes as they were found beside it.
type lost struct {
	dir string

	mu        sync.Mutex // guards what follows
	byID      map[string]*Lost
	bySubject map[string]string // id
	bytes     int64             // of evidence
	suspects  map[string]bool   // streams that something speaks against

	counts [5]atomic.Int64 // by blocks.Kind
}

func openLost(dir string) (*lost, error) {
	l := &lost{dir: dir, byID: map[string]*Lost{}, bySubject: map[string]string{}, suspects: map[string]bool{}}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		name := filepath.Join(dir, e.Name())
		if strings.HasSuffix(e.Name(), ".bin") {
			if info, err := e.Info(); err == nil {
				l.bytes += info.Size()
			}
		}
		if !strings.HasSuffix(e.Name(), ".json") {
			continue
		}
		raw, err := os.ReadFile(name)
		if err != nil {
			return nil, err
		}
		r := new(Lost)
		if err := json.Unmarshal(raw, r); err != nil || r.ID == "" {
			return nil, fmt.Errorf("%s: %w: it says which record was lost; if that is not needed any more, delete it", name, errors.Join(ErrDamaged, err))
		}
		if !r.Waits && time.Since(r.Found) > lostAge {
			if err := l.remove(r); err != nil {
				return nil, err
			}
			continue
		}
		l.keep(r)
	}
	return l, nil
}

func (l *lost) keep(r *Lost) {
	l.byID[r.ID] = r
	if r.Subject != "" {
		l.bySubject[r.Subject] = r.ID
	}
}

// add makes the loss known, durably, with what was found and, if there is one, the last
// whole record of the subject from before.
func (l *lost) add(r *Lost, evidence, older []byte) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.byID[r.ID] == nil {
		for ending, b := range map[string][]byte{".bin": evidence, ".older.bin": older} {
			if l.bytes+int64(len(b)) > maxEvidence || len(b) == 0 && ending != ".bin" {
				continue
			}
			if err := blocks.Write(filepath.Join(l.dir, r.ID+ending), b); err != nil {
				return err
			}
			l.bytes += int64(len(b))
		}
		raw, err := json.Marshal(r)
		if err != nil {
			return err
		}
		if err := blocks.Write(filepath.Join(l.dir, r.ID+".json"), raw); err != nil {
			return err
		}
	}
	l.keep(r)
	return nil
}

// remove forgets a loss.
func (l *lost) remove(r *Lost) error {
	for _, ending := range []string{".older.bin", ".bin", ".json"} {
		name := filepath.Join(l.dir, r.ID+ending)
		if st, err := os.Stat(name); err == nil && ending != ".json" {
			l.bytes -= st.Size()
		}
		if err := ignored(os.Remove(name)); err != nil {
			return err
		}
	}
	if err := durable.SyncDir(l.dir); err != nil {
		return err
	}
	delete(l.byID, r.ID)
	if l.bySubject[r.Subject] == r.ID {
		delete(l.bySubject, r.Subject)
	}
	return nil
}

func ignored(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// of returns the loss of a subject's record, or nil.
func (l *lost) of(subject string) *Lost {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.byID[l.bySubject[subject]]
}

// check fails with [ErrDamaged] when the record of a subject is lost.
func (l *lost) check(subject string) error {
	if r := l.of(subject); r != nil {
		return fmt.Errorf("%w: found on %s, kept as %s (resultity-network damage list)", ErrDamaged, r.Found.UTC().Format(time.RFC3339), r.ID)
	}
	return nil
}

// replaced forgets the loss of a record in whose place there is another one.
func (l *lost) replaced(subject string) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if r := l.byID[l.bySubject[subject]]; r != nil {
		return l.remove(r)
	}
	return nil
}

// Lost lists the records that are lost, in the order in which that was found.
func (s *Store) Lost() []Lost {
	s.lost.mu.Lock()
	defer s.lost.mu.Unlock()
	list := make([]Lost, 0, len(s.lost.byID))
	for _, r := range s.lost.byID {
		list = append(list, *r)
	}
	slices.SortFunc(list, func(a, b Lost) int { return a.Found.Compare(b.Found) })
	return list
}

// ForgetLost has a record that is lost be one that never was. What is left of it goes too.
func (s *Store) ForgetLost(id string) (int, error) {
	s.lost.mu.Lock()
	defer s.lost.mu.Unlock()
	r := s.lost.byID[id]
	if r == nil {
		return 0, fmt.Errorf("damaged record %.80q: %w", id, ErrNotFound)
	}
	return 1, s.lost.remove(r)
}

// Damaged returns how many damaged records were found since the start, by what
// became of them.
func (s *Store) Damaged() map[string]int64 {
	m := map[string]int64{}
	for _, k := range []blocks.Kind{blocks.Lost, blocks.Mended, blocks.Restored, blocks.Superseded} {
		m[k.String()] = s.lost.counts[k].Load()
	}
	return m
}

// mend looks at the files of the streams that which says, before JetStream does,
// and mends them. closed says that it was closed well, and known, by stream, what it
// knew before it ended, see [blocks.Stream].
func (s *Store) mend(closed bool, known map[string]*blocks.Memory, which func(*kind, *blocks.Stream) bool) error {
	for i := range kinds {
		k := &kinds[i]
		f := s.files(k)
		if _, err := os.Stat(f.Dir); errors.Is(err, fs.ErrNotExist) {
			continue
		}
		done, err := f.MendMeta()
		if err != nil {
			return fmt.Errorf("mend stream %s: %w", k.stream, err)
		}
		if done != "" {
			s.lost.counts[blocks.Mended].Add(1)
			s.log.Warn("the configuration of a stream of the store was damaged, and nothing is lost; its disk or its memory fails", "stream", k.stream, "outcome", done)
		}
		if !which(k, f) {
			continue
		}
		f.Closed, f.Known = closed, known[k.stream]
		r, err := f.Mend(maxTried, func(d blocks.Damage) error { return s.found(k, d) })
		if err != nil {
			return fmt.Errorf("mend stream %s: %w", k.stream, err)
		}
		for _, block := range r.Unread {
			s.log.Error("the disk of the store does not give all of a file; the file is kept under another name", "stream", k.stream, "file", fmt.Sprintf("%d.blk.unreadable", block))
		}
		s.lost.mu.Lock()
		delete(s.lost.suspects, k.stream)
		s.lost.mu.Unlock()
	}
	return nil
}

// scrub reads all of the store, slowly, and copies what there are to be copies of, until
// ctx ends.
func (s *Store) scrub(ctx context.Context) {
	wait := time.Duration(0)
	for last := (time.Time{}); ; {
		select {
		case <-ctx.Done():
			return
		case <-time.After(wait):
		}
		s.copy()
		if time.Since(last) >= scrubEvery {
			if !s.scrubOnce(ctx) {
				return
			}
			last = time.Now()
		}
		wait = copyEvery
	}
}

const (
	copyEvery  = 10 * time.Minute
	scrubEvery = 24 * time.Hour
	scrubRate  = 32 << 20 // bytes in a second
)

// copy makes copies of the streams that there are to be copies of, or of some of them.
func (s *Store) copy(which ...string) {
	s.copying.Lock()
	defer s.copying.Unlock()
	_, writes := s.room.limit()
	for i := range kinds {
		if len(which) == 0 || slices.Contains(which, kinds[i].stream) {
			s.copyOne(&kinds[i], writes)
		}
	}
}

func (s *Store) copyOne(k *kind, keep int64) {
	f := s.files(k)
	if !k.copied || s.suspected(k.stream) || s.room.check(keep, 2*f.Size()) != nil {
		return
	}
	// A file that JetStream has cut off is whole: it must not take the place of its copy.
	ctx, cancel := context.WithTimeout(context.Background(), opTimeout)
	defer cancel()
	if d := s.now.Load(); s.fewer(ctx, d, k.stream) {
		s.suspect(d, k.stream, "it has fewer records than it had")
		return
	}
	if err := f.Copy(); err != nil {
		s.log.Warn("the second copy of a part of the store could not be made", "stream", k.stream, "error", err)
	}
}

// compare looks for streams that have fewer messages than subjects: JetStream has met
// damage in them, and has cut a file off there without a word.
func (s *Store) compare(ctx context.Context) {
	d := s.now.Load()
	ctx, cancel := context.WithTimeout(ctx, opTimeout) // for all: when it hangs it answers nothing
	defer cancel()
	for i := range kinds {
		if k := &kinds[i]; !k.many && s.fewer(ctx, d, k.stream) {
			s.suspect(d, k.stream, "it has fewer records than it had")
		}
	}
}

// fewer says that it is so for longer than a write takes.
func (s *Store) fewer(ctx context.Context, d *db, stream string) bool {
	for range 3 {
		str, err := d.js.Stream(ctx, stream)
		if err != nil {
			return false
		}
		if st := str.CachedInfo().State; st.Msgs >= st.NumSubjects {
			return false
		}
	}
	return true
}

// scrubOnce reads every block once. It returns false when ctx has ended.
func (s *Store) scrubOnce(ctx context.Context) bool {
	for i := range kinds {
		f := s.files(&kinds[i])
		list, err := f.Blocks()
		if err != nil {
			s.log.Warn("a part of the store could not be looked at", "stream", f.Name, "error", err)
		}
		for j, block := range list {
			var n int64
			ok := false
			for range 3 { // it may have been replaced, or cut short, in the middle
				if n, ok, err = f.Verify(block, j == len(list)-1); ok || err != nil {
					break
				}
			}
			if err != nil {
				s.log.Error("a file of the store cannot be read", "stream", f.Name, "block", block, "error", err)
			} else if !ok {
				s.suspect(s.now.Load(), f.Name, fmt.Sprintf("block %d is not what was written", block))
			}
			select {
			case <-ctx.Done():
				return false
			case <-time.After(time.Duration(n) * time.Second / scrubRate):
			}
		}
	}
	return true
}

// mendAll looks at the files before the store opens: at all of them if it was not closed
// well, and otherwise at what is small.
func (s *Store) mendAll() error {
	well := os.Remove(filepath.Join(s.dir, closedName)) == nil
	if err := durable.SyncDir(s.dir); err != nil {
		return err
	}
	left := int64(openRead)
	return s.mend(well, nil, func(k *kind, f *blocks.Stream) bool {
		left -= f.Size()
		return !well || left >= 0 || k.copied || !f.Settled()
	})
}

// mendSome looks at the files of streams that something speaks against, and of those that
// JetStream would read as a whole, before it is started anew. known is what it knew of the
// former.
func (s *Store) mendSome(known map[string]*blocks.Memory) error {
	return s.mend(false, known, func(k *kind, f *blocks.Stream) bool { return k.copied || s.suspected(k.stream) || !f.Settled() })
}

// remembered asks JetStream, before it ends, what it knows of the streams that something
// speaks against.
func (s *Store) remembered(ctx context.Context, d *db) map[string]*blocks.Memory {
	ctx, cancel := context.WithTimeout(ctx, opTimeout)
	defer cancel()
	known := map[string]*blocks.Memory{}
	for i := range kinds {
		if name := kinds[i].stream; s.suspected(name) {
			str, err := d.js.Stream(ctx, name)
			if err == nil {
				var info *jetstream.StreamInfo
				if info, err = str.Info(ctx, jetstream.WithSubjectFilter(">")); err == nil {
					m := &blocks.Memory{Last: info.State.LastSeq, Subjects: map[string]bool{}}
					for subject := range info.State.Subjects {
						m.Subjects[subject] = true
					}
					known[name] = m
				}
			}
			if err != nil {
				s.log.Warn("JetStream does not say what a damaged stream of the store had", "stream", name, "error", err)
			}
		}
	}
	return known
}

// closedName is a file that says that the store was closed well.
const closedName = "closed"

// closedWell notes that the store was closed well.
func (s *Store) closedWell() {
	s.lost.mu.Lock()
	n := len(s.lost.suspects)
	s.lost.mu.Unlock()
	if n > 0 {
		return
	}
	if err := blocks.Write(filepath.Join(s.dir, closedName), nil); err != nil {
		s.log.Warn("the next start has to read all of the store", "error", err)
	}
}

// heard looks at what JetStream says for signs of damage. It is called before JetStream
// goes on, which may be to cut a file off.
func (s *Store) heard(d *db, said string) {
	if !damageSaid.MatchString(said) {
		return
	}
	m := streamSaid.FindStringSubmatch(said)
	if m == nil {
		return
	}
	k := kindOf(m[1])
	if k == nil {
		return
	}
	if m := fileSaid.FindStringSubmatch(said); m != nil {
		if n, err := strconv.ParseUint(m[1], 10, 32); err == nil {
			if err := s.files(k).Rescue(uint32(n)); err != nil {
				s.log.Error("a damaged file of the store could not be copied before JetStream cuts it off", "file", m[0], "error", err)
			}
		}
	}
	s.suspect(d, k.stream, said)
}

var (
	damageSaid = regexp.MustCompile(`malformed or corrupt message|corrupt record state|corrupt state in|sequence numbers for cache load did not match`)
	streamSaid = regexp.MustCompile(`^Filestore \[(\w+)\] `)
	fileSaid   = regexp.MustCompile(`/(\d+)\.blk\b`)
)

// found takes note of damage, before it is removed.
func (s *Store) found(k *kind, d blocks.Damage) error {
	s.lost.counts[d.Kind].Add(1)
	log := s.log.With("stream", d.Stream, "subject", d.Subject, "seq", d.Seq, "last", d.Last, "block", d.Block, "offset", d.Offset, "bytes", len(d.Bytes))
	switch d.Kind {
	case blocks.Cut:
		log.Info("the last write to the store was cut off, and nobody was told that it was done")
	case blocks.Lost:
		sum := sha256.Sum256(append([]byte(d.Subject), d.Bytes...))
		r := &Lost{
			ID:    fmt.Sprintf("%s-%d-%s", strings.ToLower(k.stream), d.Seq, hex.EncodeToString(sum[:4])),
			Found: time.Now().UTC().Truncate(time.Second), Stream: d.Stream, Block: d.Block, Offset: d.Offset, Size: len(d.Bytes),
			Seq: d.Seq, Last: d.Last, Subject: d.Subject, Means: k.means, Waits: k.closed && d.Subject != "",
		}
		if err := s.lost.add(r, d.Bytes, d.Older); err != nil {
			return err
		}
		log.Error("a record of the store is damaged and lost; its disk or its memory fails", "id", r.ID, "means", k.means)
	default:
		log.Warn("a record of the store was damaged, and nothing is lost; its disk or its memory fails", "outcome", d.Kind)
	}
	return nil
}

// suspect has the files of a stream be looked at, for which the server is ended.
func (s *Store) suspect(d *db, stream, why string) {
	if kindOf(stream) == nil {
		return
	}
	s.lost.mu.Lock()
	s.lost.suspects[stream] = true
	s.lost.mu.Unlock()
	d.fail(fmt.Errorf("%w: stream %s: %s", ErrFailed, stream, why))
}

func (s *Store) suspected(stream string) bool {
	s.lost.mu.Lock()
	defer s.lost.mu.Unlock()
	return s.lost.suspects[stream]
}

// absent says why there is no record under a subject: [ErrNotFound], or [ErrDamaged]
// when there was one, or JetStream knows of one that it cannot read, of which it says
// that there is none. [errAppeared]: there is one now.
func (s *Store) absent(ctx context.Context, d *db, subject string) error {
	if err := s.lost.check(subject); err != nil {
		return err
	}
	stream := streamOf(subject)
	ctx, cancel := context.WithTimeout(ctx, opTimeout)
	defer cancel()
	for range 3 {
		if n, err := d.known(ctx, stream, subject); err != nil {
			return err
		} else if n == 0 {
			return ErrNotFound
		}
		str, err := d.js.Stream(ctx, stream)
		if err != nil {
			return err
		}
		if m, err := str.GetLastMsgForSubject(ctx, subject); err == nil && m.Header.Get(operation) != "" {
			return ErrNotFound // it was deleted
		} else if err == nil {
			return errAppeared
		}
	}
	s.suspect(d, stream, "JetStream has a record that it cannot read")
	return fmt.Errorf("%w: it is being looked at", ErrDamaged)
}

// errAppeared says that there is a record that there was not a moment before.
var errAppeared = errors.New("written meanwhile")

// known is how many records of a subject JetStream has, by what it remembers of them.
func (d *db) known(ctx context.Context, stream, subject string) (total uint64, err error) {
	q, err := json.Marshal(map[string]string{"subjects_filter": subject})
	if err != nil {
		return 0, err
	}
	m, err := d.conn.RequestMsgWithContext(ctx, &nats.Msg{Subject: "$JS.API.STREAM.INFO." + stream, Data: q})
	if err != nil {
		return 0, err
	}
	var reply struct {
		State struct {
			Subjects map[string]uint64 `json:"subjects"`
		} `json:"state"`
	}
	err = json.Unmarshal(m.Data, &reply)
	for _, n := range reply.State.Subjects {
		total += n
	}
	return total, err
}

// entry reads a record of a bucket. There is none: [ErrNotFound], or [ErrDamaged].
func (s *Store) entry(ctx context.Context, d *db, kv jetstream.KeyValue, key string) (jetstream.KeyValueEntry, error) {
	for {
		e, err := kv.Get(ctx, key)
		if !errors.Is(err, jetstream.ErrKeyNotFound) {
			return e, err
		}
		if err := s.absent(ctx, d, subjectOf(kv, key)); !errors.Is(err, errAppeared) {
			return nil, err
		}
	}
}

// put writes a record of a bucket, unless the one in its place cannot be read: JetStream
// would try to remove that for ever.
func (s *Store) put(ctx context.Context, d *db, kv jetstream.KeyValue, key string, value []byte) error {
	subject := subjectOf(kv, key)
	if _, err := s.entry(ctx, d, kv, key); err != nil && !errors.Is(err, ErrNotFound) && s.lost.of(subject) == nil {
		return err
	}
	if _, err := kv.Put(ctx, key, value); err != nil {
		return err
	}
	return s.lost.replaced(subject)
}

func subjectOf(kv jetstream.KeyValue, key string) string { return "$KV." + kv.Bucket() + "." + key }

// last reads the last message of a subject, as entry does.
func (s *Store) last(ctx context.Context, d *db, str jetstream.Stream, subject string) (*jetstream.RawStreamMsg, error) {
	for {
		m, err := str.GetLastMsgForSubject(ctx, subject)
		if !errors.Is(err, jetstream.ErrMsgNotFound) {
			return m, err
		}
		if err := s.absent(ctx, d, subject); !errors.Is(err, errAppeared) {
			return nil, err
		}
	}
}

// end says whether there is nothing from a number on: a message that JetStream cannot
// read looks like the end to it.
func (s *Store) end(ctx context.Context, d *db, str jetstream.Stream, subject string, from uint64) error {
	m, err := s.last(ctx, d, str, subject)
	if errors.Is(err, ErrNotFound) {
		return nil
	}
	if err == nil && m.Sequence >= from {
		if _, err := str.GetMsg(ctx, from, jetstream.WithGetMsgSubject(subject)); err == nil {
			return nil // it came a moment ago
		}
		s.suspect(d, str.CachedInfo().Config.Name, "JetStream has a record that it cannot read")
		err = fmt.Errorf("%w: it is being looked at", ErrDamaged)
	}
	return err
}
