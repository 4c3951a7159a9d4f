// Package generation owns what a node has been: each configuration that it was
// brought to is a numbered generation on disk, with all that it takes to bring
// the node there again.
//
//	generations/state           what is current, and how each one fared
//	generations/N/manifest      what generation N is, and the digests of the rest
//	generations/N/proof         its configuration, with the signatures over it
//	generations/N/unit          the runtime's unit as it was rendered
//	generations/N.staging/      one that is being written
//
// The rules it keeps: a generation is written whole and synced before it gets
// its number, and never changes after that. Everything else is one small file
// that is replaced by one rename, so that a kill at any instant leaves the old
// state or the new one.
//
// The disk is not trusted: each file carries or has a digest, is bounded and is
// decoded strictly, and a generation that is not whole is forgotten in favour of
// the one before. Digests find damage, not a forger: what a proof is worth is for
// package tuf to say, and the unit is rendered anew before it is used.
package generation

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"syscall"
	"time"

	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/durable"
	"github.com/resultity/node/internal/failpoint"
)

// State is how far a generation has come.
type State string

// The states.
const (
	Staged  State = "staged"  // complete on disk, never tried
	Trial   State = "trial"   // current, and not known to be healthy yet
	Healthy State = "healthy" // has come up and given the expected answers
	Failed  State = "failed"  // did not come up; whose fault it is, is open
	Dead    State = "dead"    // did not come up where another did: not tried again
)

var states = []State{Staged, Trial, Healthy, Failed, Dead}

// ErrDamaged says that a generation on disk is not what was written.
var ErrDamaged = errors.New("generation is damaged")

// ErrUnknown says that there is no such generation.
var ErrUnknown = errors.New("no such generation")

// Model is a model of a generation.
type Model struct {
	Name    string        `json:"name"`
	Version string        `json:"version"`
	Digest  digest.Digest `json:"digest"`
}

// Manifest says what a generation is. It never changes.
type Manifest struct {
	Number  int           `json:"number"`
	Created time.Time     `json:"created"`
	Network string        `json:"network"` // whose configuration it is
	Config  digest.Digest `json:"config"`  // config digest of its snapshot
	Version int64         `json:"version"` // of the snapshot
	Engine  string        `json:"engine"`
	Image   string        `json:"image"` // by digest
	Models  []Model       `json:"models"`
	Unit    digest.Digest `json:"unit"`  // SHA-256 of the unit's text; zero where none could be rendered
	Proof   digest.Digest `json:"proof"` // SHA-256 of the proof
}

// Phase is a part of the way of a generation, and how long it took.
type Phase struct {
	Name   string `json:"name"`
	TookMS int64  `json:"took_ms"`
}

// Status is how a generation has fared.
type Status struct {
	State   State     `json:"state"`
	Since   time.Time `json:"since"`             // of State
	Tries   int       `json:"tries,omitempty"`   // trials that were begun and have not ended
	Step    string    `json:"step,omitempty"`    // that failed
	Reason  string    `json:"reason,omitempty"`  // of the failure
	Machine bool      `json:"machine,omitempty"` // the failure is this machine's, not the configuration's
	Phases  []Phase   `json:"phases,omitempty"`  // of the last try
}

// Generation is both.
type Generation struct {
	Manifest
	Status
}

// record is the status of one generation.
type record struct {
	Number int `json:"number"`
	Status
}

// Content is what makes a new generation.
type Content struct {
	Network string
	Config  digest.Digest
	Version int64
	Engine  string
	Image   string
	Models  []Model
	Unit    []byte // nil where none could be rendered
	Proof   []byte
}

// index is the state file.
type index struct {
	Next     int           `json:"next"`     // number of the next generation
	Current  int           `json:"current"`  // 0 for none
	Previous int           `json:"previous"` // the healthy one before; 0 for none
	Order    int           `json:"order"`    // that the operator wants current; 0 for none
	Aside    digest.Digest `json:"aside"`    // configuration that the operator has put aside
	AsideOf  string        `json:"aside_of"` // network whose configuration that is
	Records  []record      `json:"records"`
}

// Bounds of what is read.
const (
	maxRecords = 256
	maxIndex   = 4 << 20
	maxManif   = 1 << 20
	maxProof   = 32 << 20
	maxUnit    = 1 << 20
	maxReason  = 2000
	maxNumber  = 1 << 30
)

// keepFailed is how many generations that failed are kept, to be looked at.
const keepFailed = 5

// Trials is how often a generation is begun without coming to an end, as when
// the machine goes down with it, before it counts as failed.
const Trials = 3

const (
	stateFile = "state"
	manifest  = "manifest"
	proofFile = "proof"
	unitFile  = "unit"
	staging   = ".staging"
)

// Store keeps the generations of one machine, of all its networks, in one directory. Changes come from
// one goroutine; looking is safe for concurrent use.
type Store struct {
	dir   string
	now   func() time.Time
	point func(string) error // tests end the world here; nil goes on

	mu        sync.Mutex // guards what follows; never held over the disk
	ix        index
	manifests map[int]Manifest
	warnings  []error
}

// Open reads the store in dir, which is made if it is missing. What a kill left
// half written is removed. Damage is no error: what is whole is used, and
// [Store.Warnings] says what was not. An error may pass.
func Open(dir string, now func() time.Time) (*Store, error) {
	s := &Store{dir: dir, now: now, manifests: map[int]Manifest{}}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("generations: %w", err)
	}
	found, err := s.scan()
	if err != nil {
		return nil, fmt.Errorf("generations: %w", err)
	}
	raw, err := durable.ReadOwn(filepath.Join(dir, stateFile), maxIndex)
	if err == nil {
		err = open(raw, &s.ix)
	}
	if err == nil {
		err = s.ix.check()
	}
	switch {
	case err == nil:
	case passing(err):
		return nil, fmt.Errorf("generations: %w", err)
	case errors.Is(err, fs.ErrNotExist) && len(found) == 0:
		s.ix = index{Next: 1}
	default:
		s.warnings = append(s.warnings, fmt.Errorf("%s cannot be used, and is made anew from what is whole: %w", filepath.Join(dir, stateFile), err))
		s.rebuild(found)
	}
	s.settle(found)
	return s, s.sweep()
}

// Warnings returns what was found damaged, once.
func (s *Store) Warnings() []error {
	s.mu.Lock()
	defer s.mu.Unlock()
	w := s.warnings
	s.warnings = nil
	return w
}

// scan returns the whole generations.
func (s *Store) scan() (map[int]Manifest, error) {
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		return nil, err
	}
	found := map[int]Manifest{}
	for _, e := range entries {
		n, ok := number(e.Name())
		if !ok || len(found) >= maxRecords {
			continue
		}
		m, err := s.manifest(n)
		switch {
		case passing(err):
			return nil, err
		case err != nil:
			s.warnings = append(s.warnings, err)
			continue
		}
		found[n] = m
	}
	return found, nil
}

// number reads the name of a generation's directory.
func number(name string) (int, bool) {
	n, err := strconv.Atoi(name)
	return n, err == nil && n > 0 && n <= maxNumber && strconv.Itoa(n) == name
}

func (s *Store) manifest(n int) (m Manifest, err error) {
	raw, err := durable.ReadOwn(filepath.Join(s.dir, strconv.Itoa(n), manifest), maxManif)
	if err == nil {
		err = open(raw, &m)
	}
	if err == nil && m.Number != n {
		err = fmt.Errorf("it is of generation %d", m.Number)
	}
	return m, damaged(n, manifest, err)
}

// damaged says that a file of generation n is not what was written, unless what
// keeps it from being read may pass.
func damaged(n int, file string, err error) error {
	switch {
	case err == nil:
		return nil
	case passing(err):
		return err
	}
	return fmt.Errorf("%w: %d: %s: %w", ErrDamaged, n, file, err)
}

// passing tells what says nothing of the disk: no descriptors, no memory, or
// rights that somebody has to mend. Nothing is forgotten for that.
func passing(err error) bool {
	for _, e := range []syscall.Errno{syscall.EMFILE, syscall.ENFILE, syscall.ENOMEM, syscall.EACCES, syscall.EPERM} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// rebuild makes a state of what is there: the newest is current, and has to show
// anew what it is worth.
func (s *Store) rebuild(found map[int]Manifest) {
	s.ix = index{Next: 1}
	for _, n := range sorted(found) {
		s.ix.Previous, s.ix.Current, s.ix.Next = s.ix.Current, n, n+1
		s.ix.Records = append(s.ix.Records, record{n, Status{State: Healthy, Since: found[n].Created}})
	}
	if r := s.ix.record(s.ix.Current); r != nil {
		r.State = Trial
	}
}

func sorted(found map[int]Manifest) []int {
	var ns []int
	for n := range found {
		ns = append(ns, n)
	}
	slices.Sort(ns)
	return ns
}

// settle drops records whose generation is not whole, and the other way round.
func (s *Store) settle(found map[int]Manifest) {
	s.ix.Records = slices.DeleteFunc(s.ix.Records, func(r record) bool { _, ok := found[r.Number]; return !ok })
	for n, m := range found {
		if s.ix.record(n) != nil {
			s.manifests[n] = m
		}
	}
	s.ix.mend()
}

// mend turns pointers to what is gone to the next best.
func (x *index) mend() {
	if x.record(x.Order) == nil {
		x.Order = 0
	}
	if p := x.record(x.Previous); p == nil || p.State != Healthy || x.Previous == x.Current {
		x.Previous = x.lastHealthy(x.Current)
	}
	if x.record(x.Current) == nil {
		x.Current = x.Previous
		x.Previous = x.lastHealthy(x.Current)
	}
}

// lastHealthy returns the newest healthy generation but one.
func (x *index) lastHealthy(but int) (n int) {
	for _, r := range x.Records {
		if r.State == Healthy && r.Number != but {
			n = max(n, r.Number)
		}
	}
	return n
}

func (x *index) record(n int) *record {
	if i := slices.IndexFunc(x.Records, func(r record) bool { return r.Number == n }); i >= 0 {
		return &x.Records[i]
	}
	return nil
}

func (x *index) check() error {
	if x.Next < 1 || x.Next > maxNumber || len(x.Records) > maxRecords {
		return fmt.Errorf("next is %d, with %d records", x.Next, len(x.Records))
	}
	seen := map[int]bool{}
	for _, r := range x.Records {
		if r.Number < 1 || r.Number >= x.Next || seen[r.Number] || !slices.Contains(states, r.State) || r.Tries < 0 || len(r.Reason) > maxReason || len(r.Phases) > 64 {
			return fmt.Errorf("record of generation %d makes no sense", r.Number)
		}
		seen[r.Number] = true
	}
	return nil
}

// sweep removes directories that no record knows.
func (s *Store) sweep() error {
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		return fmt.Errorf("generations: %w", err)
	}
	for _, e := range entries {
		n, numbered := number(e.Name())
		if e.Name() == stateFile || numbered && s.ix.record(n) != nil {
			continue
		}
		if err := os.RemoveAll(filepath.Join(s.dir, e.Name())); err != nil {
			return fmt.Errorf("generations: %w", err)
		}
	}
	return nil
}

// View is the store at one time.
type View struct {
	Current, Previous, Order int // 0 for none
	Aside                    digest.Digest
	AsideOf                  string
	Generations              []Generation // by number
}

// Get returns a generation, or nil.
func (v *View) Get(n int) *Generation {
	if i := slices.IndexFunc(v.Generations, func(g Generation) bool { return g.Number == n }); i >= 0 {
		return &v.Generations[i]
	}
	return nil
}

// Find returns the newest generation of a configuration, or nil.
func (v *View) Find(config digest.Digest) *Generation {
	for i := len(v.Generations) - 1; i >= 0; i-- {
		if v.Generations[i].Config == config {
			return &v.Generations[i]
		}
	}
	return nil
}

// View returns what there is now.
func (s *Store) View() View {
	s.mu.Lock()
	defer s.mu.Unlock()
	v := View{Current: s.ix.Current, Previous: s.ix.Previous, Order: s.ix.Order, Aside: s.ix.Aside, AsideOf: s.ix.AsideOf}
	for _, r := range s.ix.Records {
		v.Generations = append(v.Generations, Generation{s.manifests[r.Number], r.Status})
	}
	slices.SortFunc(v.Generations, func(a, b Generation) int { return a.Number - b.Number })
	return v
}

// Unjudged reports whether a generation has failed and it is open whose fault that
// was.
func (v *View) Unjudged() bool {
	return slices.ContainsFunc(v.Generations, func(g Generation) bool { return g.State == Failed && !g.Machine })
}

// Load reads a generation's proof and unit. [ErrDamaged] says that they are not
// what was written; another error may pass.
func (s *Store) Load(n int) (proof, unit []byte, err error) {
	s.mu.Lock()
	m, ok := s.manifests[n]
	s.mu.Unlock()
	if !ok {
		return nil, nil, fmt.Errorf("%w: %d", ErrUnknown, n)
	}
	dir := filepath.Join(s.dir, strconv.Itoa(n))
	if proof, err = durable.ReadOwn(filepath.Join(dir, proofFile), maxProof); err == nil {
		err = m.Proof.Check(proof)
	}
	if err != nil {
		return nil, nil, damaged(n, proofFile, err)
	}
	if m.Unit.IsZero() {
		return proof, nil, nil
	}
	if unit, err = durable.ReadOwn(filepath.Join(dir, unitFile), maxUnit); err == nil {
		err = m.Unit.Check(unit)
	}
	if err != nil {
		return nil, nil, damaged(n, unitFile, err)
	}
	return proof, unit, nil
}

// change makes a copy of the state, changes it, writes it, and only then lets
// it be seen.
func (s *Store) change(f func(x *index) error) error {
	s.mu.Lock()
	next := s.ix
	next.Records = slices.Clone(s.ix.Records)
	s.mu.Unlock()
	if err := f(&next); err != nil {
		return err
	}
	body, err := seal(&next)
	if err != nil {
		return err
	}
	if err := s.at("state"); err != nil {
		return err
	}
	failpoint.Here("generation.state.begin")
	if err := durable.WriteFile(filepath.Join(s.dir, stateFile), body, 0o600); err != nil {
		return fmt.Errorf("generations: %w", err)
	}
	failpoint.Here("generation.state.written")
	if err := s.at("state written"); err != nil {
		return err
	}
	s.mu.Lock()
	s.ix = next
	s.mu.Unlock()
	return nil
}

func (s *Store) at(point string) error {
	if s.point == nil {
		return nil
	}
	return s.point(point)
}

// Add writes a generation and returns its number. What is there already, of the
// same configuration with the same unit, and has not failed for good, keeps its
// number and is not written again.
func (s *Store) Add(c Content) (int, error) {
	if len(c.Proof) > maxProof || len(c.Unit) > maxUnit {
		return 0, fmt.Errorf("generations: a proof of %d bytes and a unit of %d are too much", len(c.Proof), len(c.Unit))
	}
	var unit digest.Digest
	if c.Unit != nil {
		unit = digest.Of(c.Unit)
	}
	s.mu.Lock()
	n := s.ix.Next
	for _, r := range s.ix.Records {
		if m := s.manifests[r.Number]; m.Config == c.Config && m.Unit == unit && r.State != Dead {
			n = r.Number
		}
	}
	known := s.ix.record(n) != nil
	s.mu.Unlock()
	if known {
		return n, nil
	}
	m := Manifest{Number: n, Created: s.now().UTC(), Network: c.Network, Config: c.Config, Version: c.Version, Engine: c.Engine, Image: c.Image, Models: c.Models, Unit: unit, Proof: digest.Of(c.Proof)}
	if err := s.write(&m, c); err != nil {
		return 0, fmt.Errorf("generations: %d: %w", n, err)
	}
	s.mu.Lock()
	s.manifests[n] = m
	s.mu.Unlock()
	return n, s.change(func(x *index) error {
		if len(x.Records) >= maxRecords {
			return fmt.Errorf("generations: %d are kept already", len(x.Records))
		}
		x.Next = n + 1
		x.Records = append(x.Records, record{n, Status{State: Staged, Since: m.Created}})
		return nil
	})
}

// write makes the directory of a generation.
func (s *Store) write(m *Manifest, c Content) error {
	raw, err := seal(m)
	if err != nil {
		return err
	}
	final := filepath.Join(s.dir, strconv.Itoa(m.Number))
	tmp := final + staging
	// Also what a try that met a full disk has left, which nothing names.
	if err := errors.Join(os.RemoveAll(tmp), os.RemoveAll(final)); err != nil {
		return err
	}
	if err := os.Mkdir(tmp, 0o700); err != nil {
		return err
	}
	for _, f := range []struct {
		name string
		data []byte
	}{{proofFile, c.Proof}, {unitFile, c.Unit}, {manifest, raw}} {
		if err := s.at(f.name); err != nil {
			return err
		}
		if f.data == nil {
			continue
		}
		failpoint.Here("generation.file.begin")
		if err := durable.WriteFile(filepath.Join(tmp, f.name), f.data, 0o400); err != nil {
			return err
		}
		failpoint.Here("generation.file.written")
	}
	if err := s.at("rename"); err != nil {
		return err
	}
	failpoint.Here("generation.rename.begin")
	if err := os.Rename(tmp, final); err != nil {
		return err
	}
	failpoint.Here("generation.rename.renamed")
	if err := s.at("renamed"); err != nil {
		return err
	}
	return durable.SyncDir(s.dir)
}

// Begin makes n current, on trial. The one before is what a failure goes back
// to, if it was healthy. An order of the operator's is carried out with that.
func (s *Store) Begin(n int) error {
	return s.set(n, func(x *index, r *record) {
		if old := x.record(x.Current); old != nil && old.Number != n && old.State == Healthy {
			x.Previous = old.Number
		}
		if x.Previous == n {
			x.Previous = 0
		}
		x.Current, x.Order = n, 0
		if r.State != Trial {
			r.Tries = 0
		}
		r.Tries++
		r.enter(Trial, s.now())
		r.Step, r.Reason, r.Machine, r.Phases = "", "", false, nil
	})
}

// Interrupted takes back the try that [Store.Begin] has counted: the agent was
// told to end, which says nothing of n.
func (s *Store) Interrupted(n int) error {
	return s.set(n, func(_ *index, r *record) {
		if r.State == Trial {
			r.Tries = max(0, r.Tries-1)
		}
	})
}

func (r *record) enter(st State, now time.Time) {
	if r.State != st {
		r.State, r.Since = st, now.UTC()
	}
}

// Passed says that n, which is current, is healthy. That convicts those that
// failed while n did not, but for faults of the machine; their numbers are
// returned.
func (s *Store) Passed(n int, phases []Phase) (dead []int, err error) {
	return dead, s.set(n, func(x *index, r *record) {
		r.enter(Healthy, s.now())
		r.Tries, r.Step, r.Reason, r.Machine, r.Phases = 0, "", "", false, phases
		for i := range x.Records {
			if o := &x.Records[i]; o.State == Failed && !o.Machine {
				o.enter(Dead, s.now())
				dead = append(dead, o.Number)
			}
		}
	})
}

// Fail says that n did not come up, and makes the healthy one before current
// again, whose number is returned; 0 says that there is none and n stays.
func (s *Store) Fail(n int, step, reason string, machine bool, phases []Phase) (back int, err error) {
	return back, s.set(n, func(x *index, r *record) {
		r.enter(Failed, s.now())
		r.Tries, r.Step, r.Reason, r.Machine, r.Phases = 0, step, reason[:min(len(reason), maxReason)], machine, phases
		if x.Current != n {
			return
		}
		if x.record(x.Previous) == nil {
			x.Previous = x.lastHealthy(n)
		}
		if back = x.Previous; back != 0 {
			x.Current = back
			x.Previous = x.lastHealthy(back)
		}
	})
}

// Condemn says that n is not to be tried at all. That ends an order of the
// operator's to go back to its configuration.
func (s *Store) Condemn(n int, step, reason string) error {
	return s.set(n, func(x *index, r *record) {
		if x.Order != 0 && s.manifests[x.Order].Config == s.manifests[n].Config {
			x.Order = 0
		}
		r.enter(Dead, s.now())
		r.Step, r.Reason = step, reason[:min(len(reason), maxReason)]
	})
}

// Excuse says that those that failed are not to blame, since what was healthy
// does not come up either.
func (s *Store) Excuse() error {
	if v := s.View(); !v.Unjudged() {
		return nil
	}
	return s.change(func(x *index) error {
		for i := range x.Records {
			if x.Records[i].State == Failed {
				x.Records[i].Machine = true
			}
		}
		return nil
	})
}

// Rollback is the operator's order to make n current, and to put a network's
// configuration aside: it is not taken up until the network has another one.
func (s *Store) Rollback(n int, network string, aside digest.Digest) error {
	return s.set(n, func(x *index, r *record) { x.Order, x.Aside, x.AsideOf = n, aside, network })
}

// Forward ends what [Store.Rollback] began, and gives a configuration that is
// dead another chance; a zero digest is none.
func (s *Store) Forward(config digest.Digest) error {
	return s.change(func(x *index) error {
		x.Order, x.Aside, x.AsideOf = 0, digest.Digest{}, ""
		for i := range x.Records {
			if r := &x.Records[i]; r.State == Dead && !config.IsZero() && s.manifests[r.Number].Config == config {
				r.enter(Failed, s.now())
				r.Machine = true
			}
		}
		return nil
	})
}

// Forget drops a generation: because it is damaged, or because there is no room
// for what it needs.
func (s *Store) Forget(n int) error {
	if err := s.change(func(x *index) error {
		x.Records = slices.DeleteFunc(x.Records, func(r record) bool { return r.Number == n })
		x.mend()
		return nil
	}); err != nil {
		return err
	}
	return s.remove(n)
}

func (s *Store) remove(n int) error {
	s.mu.Lock()
	delete(s.manifests, n)
	s.mu.Unlock()
	if err := os.RemoveAll(filepath.Join(s.dir, strconv.Itoa(n))); err != nil {
		return fmt.Errorf("generations: %w", err)
	}
	return nil
}

// Prune drops what is of no more use. Kept are the current one, the healthy one
// before, what the operator has ordered, the newest of each network if it is still
// to be tried, and the last few that failed.
func (s *Store) Prune() error {
	var gone []int
	err := s.change(func(x *index) error {
		newest, failed := map[string]int{}, []int{}
		for _, r := range x.Records {
			network := s.manifests[r.Number].Network
			newest[network] = max(newest[network], r.Number)
			if r.State == Dead || r.State == Failed {
				failed = append(failed, r.Number)
			}
		}
		slices.Sort(failed)
		failed = failed[max(0, len(failed)-keepFailed):]
		x.Records = slices.DeleteFunc(x.Records, func(r record) bool {
			n := r.Number
			if n == x.Current || n == x.Previous || n == x.Order || r.State == Staged && n == newest[s.manifests[n].Network] || slices.Contains(failed, n) {
				return false
			}
			gone = append(gone, n)
			return true
		})
		if len(gone) == 0 {
			return errNothing
		}
		return nil
	})
	if errors.Is(err, errNothing) {
		return nil
	}
	for _, n := range gone {
		if err == nil {
			err = s.remove(n)
		}
	}
	return err
}

var errNothing = errors.New("nothing to do")

// set changes one record.
func (s *Store) set(n int, f func(x *index, r *record)) error {
	return s.change(func(x *index) error {
		r := x.record(n)
		if r == nil {
			return fmt.Errorf("%w: %d", ErrUnknown, n)
		}
		f(x, r)
		return nil
	})
}

// seal prints v as JSON after a line with its digest.
func seal(v any) ([]byte, error) {
	body, err := json.Marshal(v)
	if err != nil {
		return nil, err
	}
	return append([]byte(digest.Of(body).String()+"\n"), body...), nil
}

// open reads what seal has written.
func open(raw []byte, v any) error {
	line, body, ok := bytes.Cut(raw, []byte("\n"))
	if !ok {
		return errors.New("cut short")
	}
	d, err := digest.Parse(string(line))
	if err != nil {
		return err
	}
	if err := d.Check(body); err != nil {
		return err
	}
	dec := json.NewDecoder(bytes.NewReader(body))
	dec.DisallowUnknownFields()
	return dec.Decode(v)
}
