package state

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"math/rand/v2"
	"reflect"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/resultity/node/internal/evm"
	"github.com/resultity/node/internal/receipt"
	"github.com/resultity/node/internal/receiptlog"
	"github.com/resultity/node/internal/wire"
)

// memory is a disk that can be stopped or failed at any operation, and that
// knows what of it a power cut may leave: each sector and each name as it was
// last synced, or as it has been since.
type memory struct {
	mu     sync.Mutex
	names  map[string]*memoryFile
	log    []func(map[string]*memoryFile) // changes of names since the last sync
	synced map[string]*memoryFile
	rand   *rand.Rand
	count  int                          // operations that change something, so far
	fail   func(n int, op string) error // the fault of the n-th, which is not done, or, a write, half
	part   func(n int) int              // how many of n bytes a write that fails has written; nil: any
	limit  int64                        // bytes of all files, 0 for no limit
}

const sector = 512

type memoryFile struct {
	d     *memory
	now   []byte
	safe  []byte
	dirty map[int]bool // sectors

	unread map[int64]bool // pages that cannot be read until they are written
}

var (
	errStopped = errors.New("stopped")
	errIO      = &fs.PathError{Op: "sync", Path: "memory", Err: syscall.EIO}
	errNoSpace = &fs.PathError{Op: "write", Path: "memory", Err: syscall.ENOSPC}
)

func newMemory(seed uint64) *memory {
	return &memory{names: map[string]*memoryFile{}, synced: map[string]*memoryFile{}, rand: rand.New(rand.NewPCG(seed, 1))}
}

// op counts an operation. The caller holds the lock.
func (d *memory) op(what string) error {
	d.count++
	if d.fail != nil {
		return d.fail(d.count, what)
	}
	return nil
}

func (d *memory) change(what string, f func(map[string]*memoryFile)) error {
	if err := d.op(what); err != nil {
		return err
	}
	f(d.names)
	d.log = append(d.log, f)
	return nil
}

func (d *memory) list() ([]string, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Sorted(maps.Keys(d.names)), nil
}

func (d *memory) create(name string) (file, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.names[name] != nil {
		return nil, fs.ErrExist
	}
	f := &memoryFile{d: d, dirty: map[int]bool{}}
	return f, d.change("create", func(m map[string]*memoryFile) { m[name] = f })
}

func (d *memory) open(name string) (file, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if f := d.names[name]; f != nil {
		return f, nil
	}
	return nil, fs.ErrNotExist
}

func (d *memory) rename(from, to string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	f := d.names[from]
	if f == nil {
		return fs.ErrNotExist
	}
	return d.change("rename", func(m map[string]*memoryFile) { delete(m, from); m[to] = f })
}

func (d *memory) remove(name string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.change("remove", func(m map[string]*memoryFile) { delete(m, name) })
}

func (d *memory) sync() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.op("sync names"); err != nil {
		return err
	}
	d.synced, d.log = maps.Clone(d.names), nil
	return nil
}

func (f *memoryFile) ReadAt(b []byte, at int64) (int, error) {
	f.d.mu.Lock()
	defer f.d.mu.Unlock()
	if at >= int64(len(f.now)) {
		return 0, io.EOF
	}
	for p := at &^ (page - 1); p < at+int64(len(b)); p += page {
		if f.unread[p] {
			return 0, errIO
		}
	}
	n := copy(b, f.now[at:])
	if n < len(b) {
		return n, io.ErrUnexpectedEOF
	}
	return n, nil
}

func (f *memoryFile) WriteAt(b []byte, at int64) (int, error) {
	f.d.mu.Lock()
	defer f.d.mu.Unlock()
	what := "write"
	if len(b) == frameHead {
		what = "mark" // a frame as none
	}
	err := f.d.op(what)
	if err != nil && f.d.part != nil {
		b = b[:f.d.part(len(b))]
	} else if err != nil && f.d.rand.IntN(4) > 0 {
		b = b[:f.d.rand.IntN(len(b)+1)]
	}
	if more := at + int64(len(b)) - int64(len(f.now)); more > 0 {
		if f.d.limit > 0 {
			for _, other := range f.d.names {
				more += int64(len(other.now))
			}
			if more > f.d.limit {
				return 0, errNoSpace
			}
		}
		f.now = append(f.now, make([]byte, at+int64(len(b))-int64(len(f.now)))...)
	}
	copy(f.now[at:], b)
	delete(f.unread, at)
	for s := int(at) / sector; s*sector < int(at)+len(b); s++ {
		f.dirty[s] = true
	}
	return len(b), err
}

func (f *memoryFile) sync() error {
	f.d.mu.Lock()
	defer f.d.mu.Unlock()
	if err := f.d.op("sync"); err != nil {
		clear(f.dirty) // a kernel that could not write pages holds them to be clean
		return err
	}
	f.safe = append(f.safe[:min(len(f.safe), len(f.now))], make([]byte, max(0, len(f.now)-len(f.safe)))...)
	for s := range f.dirty {
		copy(f.safe[s*sector:], f.now[s*sector:min((s+1)*sector, len(f.now))])
	}
	clear(f.dirty)
	return nil
}

func (f *memoryFile) size() (int64, error) {
	f.d.mu.Lock()
	defer f.d.mu.Unlock()
	return int64(len(f.now)), nil
}

func (f *memoryFile) Close() error { return nil }

// after returns the disk as the next start finds it, after a kill or after a
// power cut.
func (d *memory) after(cut bool) *memory {
	d.mu.Lock()
	defer d.mu.Unlock()
	next := newMemory(d.rand.Uint64())
	names := d.names
	if cut {
		names = maps.Clone(d.synced)
		for _, f := range d.log[:d.rand.IntN(len(d.log)+1)] {
			f(names)
		}
	}
	for name, f := range names {
		b := bytes.Clone(f.now)
		if cut {
			clear(b)
			copy(b, f.safe)
			for s := range f.dirty {
				if d.rand.IntN(2) == 0 {
					copy(b[s*sector:min((s+1)*sector, len(b))], f.now[s*sector:])
				}
			}
			if len(f.safe) < len(b) && d.rand.IntN(2) == 0 {
				b = b[:len(f.safe)]
			}
		}
		g := &memoryFile{d: next, now: b, safe: bytes.Clone(b), dirty: map[int]bool{}, unread: maps.Clone(f.unread)}
		if !cut { // what a kill leaves is not on the disk for that
			g.safe, g.dirty = bytes.Clone(f.safe), maps.Clone(f.dirty)
		}
		next.names[name] = g
	}
	next.synced = maps.Clone(next.names)
	return next
}

const small = 32 << 10 // segments of the tests, so that there are many

// fewLeaves of the log are kept in the model's tests, so that some are given up.
const fewLeaves = 25

// modelLoad opens a store for a model, whose results have no real receipts.
func modelLoad(d disk, b Bounds) (*Store, error) {
	b.Leaves = fewLeaves
	return loadWith(d, b, now, small, modelLeaf)
}

func modelLeaf(r *wire.Result) (evm.Hash, bool) {
	return receiptlog.Leaf(evm.Keccak(r.Job[:])), r.Code == ""
}

// model is what a store must know.
type model struct {
	t     testing.TB
	jobs  map[receipt.JobID]*modelJob
	order []receipt.JobID
	rand  *rand.Rand
	reg   *wire.Registered
	lax   bool       // settled ids are forgotten at some time
	log   []modelLog // what the receipt log may be; the last one is what it is without a crash
}

// modelLog is a receipt log: leaves that follow another log.
type modelLog struct {
	base   *receiptlog.Log
	leaves []evm.Hash
	acked  uint64
}

func (l *modelLog) size() uint64 { return l.base.Size() + uint64(len(l.leaves)) }

// first is the index of the first leaf that is kept.
func (l *modelLog) first() uint64 { return l.size() - min(fewLeaves, uint64(len(l.leaves))) }

func (l *modelLog) grown(leaves ...evm.Hash) modelLog {
	return modelLog{l.base, append(slices.Clip(l.leaves), leaves...), l.acked}
}

func (l *modelLog) at(size uint64) *receiptlog.Log {
	log := l.base.Clone()
	for _, leaf := range l.leaves[:size-l.base.Size()] {
		log.Append(leaf, nil)
	}
	return log
}

// is reports whether a store has the log.
func (l *modelLog) is(s *Store) error {
	got, want := s.ReceiptLog(), ReceiptLog{l.size(), l.at(l.size()).Root(), l.first(), l.acked}
	if got != want {
		return fmt.Errorf("log %+v, want %+v", got, want)
	}
	if leaves := s.Leaves(want.First, fewLeaves+1); !slices.Equal(leaves, l.leaves[want.First-l.base.Size():]) {
		return fmt.Errorf("%d leaves from %d on, and not the right ones", len(leaves), want.First)
	}
	if want.First > 0 && s.Leaves(want.First-1, 1) != nil {
		return fmt.Errorf("leaf %d is there", want.First-1)
	}
	for size := want.First; size <= want.Size; size += 7 {
		if log := s.LogAt(size); log == nil || log.Root() != l.at(size).Root() {
			return fmt.Errorf("log at %d is another", size)
		}
	}
	return nil
}

type modelJob struct {
	*wire.Job
	result *wire.Result
	may    []Known // what the store may say; the last one is what it says without a crash
}

func newModel(t testing.TB, seed uint64) *model {
	return &model{t: t, jobs: map[receipt.JobID]*modelJob{}, rand: rand.New(rand.NewPCG(seed, 2)), log: []modelLog{{base: receiptlog.New()}}}
}

var (
	templateJob = newJob(0)
	// Without a receipt, whose signature takes a while to check.
	templateResult = &wire.Result{}
)

// step does one thing with the store and notes what may be true, should it fail.
func (m *model) step(s *Store) error {
	pick := func(state Known) *modelJob {
		var of []receipt.JobID
		for _, id := range m.order {
			if k := m.jobs[id]; k.may[len(k.may)-1] == state {
				of = append(of, id)
			}
		}
		if len(of) == 0 {
			return nil
		}
		return m.jobs[of[m.rand.IntN(len(of))]]
	}
	try := func(k *modelJob, next Known, f func() error) error {
		was := k.may
		k.may = append(slices.Clone(was), next)
		err := f()
		switch {
		case err == nil:
			k.may = []Known{next}
		case errors.Is(err, ErrFull):
			k.may = was
		}
		return err
	}
	// tryLog does something that leaves the receipt log as next.
	tryLog := func(next modelLog, f func() error) error {
		was := m.log
		m.log = append(slices.Clone(was), next)
		err := f()
		switch {
		case err == nil:
			m.log = []modelLog{next}
		case errors.Is(err, ErrFull):
			m.log = was
		}
		return err
	}
	is := m.log[len(m.log)-1]
	switch n := m.rand.IntN(105); {
	case n >= 104:
		other := receiptlog.New()
		for i := range is.size() + uint64(m.rand.IntN(40)) {
			other.Append(receiptlog.Leaf(evm.Keccak(number(i), number(m.rand.Uint64()))), nil)
		}
		own := is.leaves[max(is.acked, is.first())-is.base.Size():]
		next := modelLog{other, slices.Clone(own), other.Size()}
		return tryLog(next, func() error { return s.RestoreLog(other) })
	case n >= 100:
		next := is.grown()
		next.acked = max(is.base.Size(), is.size()-min(is.size(), uint64(m.rand.IntN(20))))
		if err := s.AckLeaves(next.acked); err != nil {
			return err
		}
		m.log = append(m.log, next) // written with the next commit
	case n < 40:
		j := *templateJob
		j.ID = receipt.NewJobID()
		j.Request = bytes.Repeat([]byte("q"), m.rand.IntN(3000))
		if n == 0 {
			j.Request = bytes.Repeat([]byte("Q"), small+m.rand.IntN(small)) // larger than a segment
		}
		k := &modelJob{Job: &j, may: []Known{0}}
		m.jobs[j.ID], m.order = k, append(m.order, j.ID)
		return try(k, Running, func() error { _, err := s.Accept(k.Job); return err })
	case n < 75:
		if k := pick(Running); k != nil {
			r := *templateResult
			r.Job, r.Response = k.ID, bytes.Repeat([]byte("a"), m.rand.IntN(4000)+1)
			if n%3 == 0 {
				r = wire.Result{Job: k.ID, Code: wire.CodeEngine, Message: strings.Repeat("m", m.rand.IntN(MaxMessage))}
			}
			was := k.result
			k.result = &r
			next := is
			if leaf, ok := modelLeaf(&r); ok {
				next = is.grown(leaf)
			}
			err := try(k, Done, func() error { return tryLog(next, func() error { return s.Finish(&r) }) })
			if errors.Is(err, ErrFull) {
				k.result = was
			}
			return err
		}
	case n < 98:
		if k := pick(Done); k != nil {
			next := Known(0)
			if k.result.Code == "" {
				next = Settled
			}
			if err := s.Ack([]receipt.JobID{k.ID}); err != nil {
				return err
			}
			k.may = []Known{Done, next}
		}
	case n == 98:
		r := &wire.Registered{Network: "testnet", Node: key.Address(), Account: fmt.Sprint(m.rand.IntN(3))}
		if err := s.SetRegistration(r); err != nil {
			return err
		}
		m.reg = r
	default: // let the acknowledgements be written, as the timer would
		if err := s.commit(func(*batch) error { return nil }); err != nil {
			return err
		}
	}
	return nil
}

// check compares a store with what must be. After a crash it learns what has
// come true.
func (m *model) check(s *Store, crashed bool) {
	m.t.Helper()
	var want Counts
	for _, id := range m.order {
		k := m.jobs[id]
		got, err := s.Lookup(id)
		if err != nil {
			m.t.Fatal(err)
		}
		if m.lax && slices.Contains(k.may, Settled) {
			k.may = append(k.may, 0)
		} else if !crashed && got != k.may[len(k.may)-1] {
			m.t.Fatalf("job %s is %v, want %v", id, got, k.may)
		}
		if !slices.Contains(k.may, got) {
			m.t.Fatalf("job %s is %v, may be %v (crash: %v)", id, got, k.may, crashed)
		}
		if crashed {
			k.may = []Known{got}
		}
		switch got {
		case Running:
			want.Accepted++
		case Done:
			want.Results++
			r, ok, err := s.Result(id)
			if err != nil || !ok || !reflect.DeepEqual(r, k.result) {
				m.t.Fatalf("result of %s: %v, %v, or another than was given", id, ok, err)
			}
		case Settled:
			want.Settled++
		}
	}
	got := s.Counts()
	want.Bytes = got.Bytes
	if got != want || (got.Accepted+got.Results == 0) != (got.Bytes == 0) {
		m.t.Fatalf("Counts = %+v, want %+v", got, want)
	}
	jobs, err := s.Unfinished()
	if err != nil || len(jobs) != want.Accepted {
		m.t.Fatalf("%d unfinished, %v; want %d", len(jobs), err, want.Accepted)
	}
	for _, j := range jobs {
		if !reflect.DeepEqual(j, m.jobs[j.ID].Job) && !bytes.Equal(j.Request, m.jobs[j.ID].Request) {
			m.t.Fatalf("job %s is not the one accepted", j.ID)
		}
	}
	results, last := 0, uint64(0)
	if _, err := s.Outbox(0, func(n uint64, r *wire.Result) error {
		if n <= last {
			m.t.Fatalf("number %d after %d", n, last)
		}
		last = n
		results++
		return nil
	}); err != nil || results != want.Results {
		m.t.Fatalf("%d in the outbox, %v; want %d", results, err, want.Results)
	}
	for _, g := range s.segments {
		if g.live < 0 || g.live > g.size {
			m.t.Fatalf("segment %d has %d live bytes of %d", g.Number, g.live, g.size)
		}
	}
	var wrong error
	for i := len(m.log) - 1; i >= 0; i-- {
		wrong = m.log[i].is(s)
		if wrong == nil && crashed {
			m.log = m.log[i : i+1]
		}
		if wrong == nil || !crashed {
			break
		}
	}
	if wrong != nil {
		m.t.Fatalf("receipt log, crash %v, %d possibilities: %v", crashed, len(m.log), wrong)
	}
	reg, err := s.Registration()
	if err != nil || !crashed && !sameRegistration(reg, m.reg) || m.reg != nil && reg == nil {
		m.t.Fatalf("Registration = %v, %v; want %v", reg, err, m.reg)
	}
	m.reg = reg
}

func sameRegistration(a, b *wire.Registered) bool {
	return a == b || a != nil && b != nil && *a == *b
}

func abandon(s *Store) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ackDue = true // no timer any more
	if s.ackTimer != nil {
		s.ackTimer.Stop()
	}
}

// Wherever a process is killed, or a machine loses power, the next start finds
// everything that was said to be there.
func TestStopAnywhere(t *testing.T) {
	const steps = 150
	for _, cut := range []bool{false, true} {
		stops := 0
		for n := 1; ; n++ {
			if !cut && n%2 == 0 {
				continue // what a kill leaves is also one of what a power cut may leave
			}
			seed := uint64(n % 7)
			d := newMemory(uint64(n))
			d.fail = func(i int, _ string) error {
				if i >= n {
					return errStopped
				}
				return nil
			}
			m := newModel(t, seed)
			s, err := modelLoad(d, Bounds{})
			for i := 0; err == nil && i < steps; i++ {
				err = m.step(s)
			}
			if err == nil {
				abandon(s)
				break // n is beyond the last operation
			}
			if !errors.Is(err, errStopped) {
				t.Fatalf("stop at %d: %v", n, err)
			}
			if s != nil {
				abandon(s)
			}
			stops++
			for round := range 2 { // and a power cut, so that what was found is on the disk
				d = d.after(cut || round == 1)
				s, err = modelLoad(d, Bounds{})
				if err != nil {
					t.Fatalf("cut %v, stop at %d, round %d: %v", cut, n, round, err)
				}
				m.check(s, true)
				abandon(s)
			}
			for range 30 { // and it works
				if err := m.step(s); err != nil {
					t.Fatalf("cut %v, stop at %d: afterwards: %v", cut, n, err)
				}
			}
			m.check(s, false)
			abandon(s)
		}
		t.Logf("cut %v: %d stops", cut, stops)
	}
}

// Any operations, and openings between them, give what the model says.
func TestModel(t *testing.T) {
	for seed := range uint64(10) {
		d := newMemory(seed)
		m := newModel(t, seed)
		bounds := Bounds{}
		if m.lax = seed%2 == 1; m.lax {
			bounds.IDs = 1 + m.rand.IntN(100)
		}
		s, err := modelLoad(d, bounds)
		if err != nil {
			t.Fatal(err)
		}
		most := 0
		for range 12 {
			for range 60 {
				if err := m.step(s); err != nil {
					t.Fatal(err)
				}
			}
			m.check(s, false)
			most = max(most, len(s.segments))
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			d = d.after(true) // all of it was synced
			before := s.Counts()
			if s, err = modelLoad(d, bounds); err != nil {
				t.Fatal(err)
			}
			m.check(s, false)
			if got := s.Counts(); got != before {
				t.Fatalf("Counts = %+v after opening again, want %+v", got, before)
			}
			if m.lax && m.rand.IntN(4) == 0 {
				if _, err := s.Expire(-time.Hour); err != nil { // everything
					t.Fatal(err)
				}
				for _, id := range m.order {
					if k := m.jobs[id]; slices.Contains(k.may, Done) || slices.Contains(k.may, Settled) {
						k.may = []Known{0}
					}
				}
				m.check(s, false)
			}
		}
		if _, live := s.sizes(); int64(len(s.segments))*small > 4*live+16*small {
			t.Errorf("seed %d: %d segments for %d live bytes", seed, len(s.segments), live)
		}
		abandon(s)
	}
}

// A disk that is full at the n-th write costs nothing that was accepted, and
// the store goes on when there is room again.
func TestFullAnywhere(t *testing.T) {
	for n := 1; n < 400; n += 1 + rand.IntN(4) {
		d := newMemory(uint64(n))
		m := newModel(t, uint64(n%5))
		s, err := modelLoad(d, Bounds{})
		if err != nil {
			t.Fatal(err)
		}
		d.fail = func(i int, op string) error {
			if i >= n && i < n+6 && (op == "write" || op == "create" || op == "rename") {
				return errNoSpace
			}
			return nil
		}
		for range 120 {
			if err := m.step(s); err != nil && !errors.Is(err, ErrFull) {
				t.Fatalf("full at %d: %v", n, err)
			} else if err != nil && n%2 == 0 {
				break // and killed
			}
		}
		m.check(s, false)
		abandon(s)
		d.fail = nil
		if s, err = modelLoad(d.after(true), Bounds{}); err != nil {
			t.Fatalf("full at %d: %v", n, err)
		}
		m.check(s, true)
		abandon(s)
	}
}

// A small disk: whatever was accepted can be ended, and acknowledgements make
// room again without any from outside.
func TestSmallDisk(t *testing.T) {
	for seed := range uint64(15) {
		d := newMemory(seed)
		d.limit = 10 * small
		s, err := load(d, Bounds{}, now, small)
		if err != nil {
			t.Fatal(err)
		}
		r := rand.New(rand.NewPCG(seed, 3))
		for range 3 {
			var ids []receipt.JobID
			for {
				j := newJob(r.IntN(9000))
				_, err := s.Accept(j)
				if errors.Is(err, ErrFull) {
					break
				}
				if err != nil {
					t.Fatal(err)
				}
				ids = append(ids, j.ID)
				if r.IntN(4) == 0 {
					big := *templateResult
					big.Job, big.Response = j.ID, make([]byte, r.IntN(20_000))
					if err := s.Finish(&big); err != nil && !errors.Is(err, ErrFull) {
						t.Fatal(err)
					}
				}
			}
			if len(ids) < 8 {
				t.Fatalf("seed %d: only %d jobs fit", seed, len(ids))
			}
			for i, id := range ids {
				if k, _ := s.Lookup(id); k != Running {
					continue
				}
				if err := s.Finish(&wire.Result{Job: id, Code: wire.CodeEngine, Message: strings.Repeat("\x01", 2*MaxMessage)}); err != nil {
					t.Fatalf("seed %d: failure %d of %d: %v", seed, i, len(ids), err)
				}
			}
			if r.IntN(2) == 0 {
				if err := s.Close(); err != nil {
					t.Fatal(err)
				}
				if s, err = load(d, Bounds{}, now, small); err != nil {
					t.Fatal(err)
				}
			}
			if err := s.Ack(ids); err != nil {
				t.Fatal(err)
			}
			if err := s.commit(func(*batch) error { return nil }); err != nil {
				t.Fatalf("seed %d: the acknowledgements do not fit: %v", seed, err)
			}
		}
		abandon(s)
	}
}

// After a sync has failed nothing is written, whatever is tried.
func TestAFailedSyncIsTheEnd(t *testing.T) {
	d := newMemory(1)
	s, err := load(d, Bounds{}, now, small)
	if err != nil {
		t.Fatal(err)
	}
	accept(t, s, newJob(10), New)
	failed := false
	d.fail = func(_ int, op string) error {
		if op == "sync" {
			failed = true
			return errIO
		}
		return nil
	}
	if _, err := s.Accept(newJob(10)); !errors.Is(err, ErrBroken) || !errors.Is(err, syscall.EIO) || !failed {
		t.Fatalf("Accept = %v, want ErrBroken and EIO", err)
	}
	d.fail = func(int, string) error {
		t.Error("it was written to after that")
		return nil
	}
	if _, err := s.Accept(newJob(10)); !errors.Is(err, ErrBroken) {
		t.Fatalf("Accept = %v, want ErrBroken", err)
	}
	if err := s.Ack([]receipt.JobID{receipt.NewJobID()}); !errors.Is(err, ErrBroken) {
		t.Fatalf("Ack = %v, want ErrBroken", err)
	}
	if err := s.Close(); !errors.Is(err, ErrBroken) {
		t.Fatalf("Close = %v, want ErrBroken", err)
	}
}

// An acknowledgement is on the disk soon, also if nothing else happens.
func TestAcknowledgementsAreWrittenByThemselves(t *testing.T) {
	d := newMemory(1)
	s, err := load(d, Bounds{}, now, small)
	if err != nil {
		t.Fatal(err)
	}
	j := newJob(10)
	accept(t, s, j, New)
	finish(t, s, failure(j))
	written := make(chan struct{}, 100)
	d.mu.Lock()
	d.fail = func(_ int, op string) error {
		if op == "sync" {
			written <- struct{}{}
		}
		return nil
	}
	d.mu.Unlock()
	ack(t, s, j.ID)
	select {
	case <-written:
	case <-time.After(2 * time.Minute):
		t.Fatal("nothing was written")
	}
	if err := s.commit(func(*batch) error { return nil }); err != nil { // behind it
		t.Fatal(err)
	}
	if s, err = load(d.after(true), Bounds{}, now, small); err != nil {
		t.Fatal(err)
	}
	counts(t, s, 0, 0, 0)
}

// The room for the failures of accepted jobs is there after a power cut, too.
func TestRoomOutlivesAPowerCut(t *testing.T) {
	for seed := range uint64(10) {
		d := newMemory(seed)
		s, err := load(d, Bounds{}, now, small)
		if err != nil {
			t.Fatal(err)
		}
		for range 10 {
			accept(t, s, newJob(1000), New)
		}
		want := len(s.segments) + len(s.spares)
		if len(s.spares) < 2 {
			t.Fatalf("%d spares", len(s.spares))
		}
		if got := len(d.after(true).names); got != want {
			t.Fatalf("seed %d: %d files after a power cut, want %d", seed, got, want)
		}
		abandon(s)
	}
}

// What a full disk has cut off of a frame may be what was there before: then all
// of the frame is there, and still nobody may take it for one.
func TestARefusedFrameIsNone(t *testing.T) {
	d := newMemory(1)
	s, err := load(d, Bounds{}, now, small)
	if err != nil {
		t.Fatal(err)
	}
	accept(t, s, newJob(10), New)
	j := newJob(0)
	j.Request = make([]byte, 500) // as the rest of the segment
	d.part = func(n int) int { return n - 200 }
	d.fail = func(_ int, op string) error {
		if op == "write" {
			return errNoSpace
		}
		return nil
	}
	if _, err := s.Accept(j); !errors.Is(err, ErrFull) {
		t.Fatalf("Accept = %v, want ErrFull", err)
	}
	abandon(s)
	if s, err = load(d.after(false), Bounds{}, now, small); err != nil {
		t.Fatal(err)
	}
	counts(t, s, 1, 0, 0)
}

// A segment whose content cannot be copied stays.
func TestACopyThatFails(t *testing.T) {
	d := newMemory(1)
	s, err := load(d, Bounds{}, now, small)
	if err != nil {
		t.Fatal(err)
	}
	large := newJob(3 * small) // in a segment of its own
	accept(t, s, large, New)
	if err := s.tryClean(t); err != nil { // the first segment, which is empty
		t.Fatal(err)
	}
	if len(s.segments) != 1 {
		t.Fatalf("%d segments", len(s.segments))
	}
	for len(s.segments) < 2 {
		j := newJob(1000)
		accept(t, s, j, New)
		finish(t, s, failure(j))
		ack(t, s, j.ID)
	}
	for _, f := range d.names {
		d.limit += int64(len(f.now))
	}
	if err := s.tryClean(t); !errors.Is(err, ErrFull) {
		t.Fatalf("clean = %v, want ErrFull", err)
	}
	abandon(s)
	d.limit = 0
	if s, err = load(d.after(true), Bounds{}, now, small); err != nil {
		t.Fatal(err)
	}
	accept(t, s, large, Running)
}

func (s *Store) tryClean(t *testing.T) error {
	t.Helper()
	ok, err := s.clean()
	if !ok && err == nil {
		t.Fatal("there was nothing to clean")
	}
	return err
}

// A result that is acknowledged while its segment is being copied does not come
// back.
func TestAcknowledgedWhileCopied(t *testing.T) {
	d := newMemory(1)
	s, err := load(d, Bounds{}, now, small)
	if err != nil {
		t.Fatal(err)
	}
	j, stays := newJob(1000), newJob(1000)
	for _, j := range []*wire.Job{j, stays} {
		accept(t, s, j, New)
		finish(t, s, failure(j))
	}
	group, err := s.evacuate(s.segments[0])
	if err != nil || len(group) != 2 {
		t.Fatalf("evacuate = %d, %v; want two results", len(group), err)
	}
	ack(t, s, j.ID)
	s.write(group)
	abandon(s)
	if s, err = load(d.after(true), Bounds{}, now, small); err != nil {
		t.Fatal(err)
	}
	counts(t, s, 0, 1, 0)
	if k, err := s.Lookup(j.ID); k != 0 || err != nil {
		t.Errorf("Lookup = %v, %v of what was acknowledged, want nothing", k, err)
	}
}
