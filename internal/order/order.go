// Package order owns what a node remembers of its network's orders.
//
// The rule it keeps: an order is on disk before it is begun, and its outcome
// before anybody is told. So an order is carried out at most once, over crashes
// too, and its outcome is told until the network has it. What is remembered is
// bounded: by number, and by time, since an order that has expired is refused
// whether it is remembered or not.
//
// The memory is on disk twice, each with its digest, so that damage to one takes
// nothing. Where both are damaged it begins anew, and refuses what was issued before.
package order

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/durable"
	"github.com/resultity/node/internal/evm"
	"github.com/resultity/node/internal/failpoint"
	"github.com/resultity/node/internal/wire"
)

// Bounds of the memory.
const (
	maxEntries = 256
	maxFile    = 1 << 20            // bytes
	grace      = 10 * time.Minute   // a clock may have been set back by as much
	untold     = 7 * 24 * time.Hour // after its expiry, an outcome that nobody asks for is forgotten
	behind     = 10 * time.Second   // by how much this clock may be behind the network's, both set by the same time
)

// MaxRestarts is how many restarts of the runtime a network may order within
// [RestartsPer]. Each costs minutes without jobs, those of other networks included:
// whoever holds a message key could keep a node from working by nothing else.
const (
	MaxRestarts = 3
	RestartsPer = time.Hour
)

// Damage says what the start has found of the memory.
type Damage int

// What was found.
const (
	Whole  Damage = iota
	Mended        // one of the two copies was damaged
	Lost          // both were: what was there is beside them, and orders of before are refused
)

// copySuffix ends the name of the second copy, and lostSuffix that of what was lost.
const (
	copySuffix = ".copy"
	lostSuffix = ".damaged"
)

// A Refusal says why an order is not begun. Code is one of [Codes].
type Refusal struct{ Code, Reason string }

func (r *Refusal) Error() string { return r.Reason }

func refuse(code, format string, args ...any) error {
	return &Refusal{code, fmt.Sprintf(format, args...)}
}

// Why an order is refused, in the words of the journal's catalog.
const (
	byStranger  = "signer"
	malformed   = "malformed"
	elsewhere   = "addressee"
	expired     = "expired"
	unknownKind = "kind"
	endless     = "penalty"
	overtaken   = "overtaken"
	forgotten   = "forgotten"
	tooMany     = "full"
	tooOften    = "restarts"
)

// Codes lists them.
var Codes = []string{byStranger, malformed, elsewhere, expired, unknownKind, endless, overtaken, forgotten, tooMany, tooOften}

// Begun is the outcome of an order that is being carried out.
const Begun wire.Outcome = "begun"

// Entry is an order and what became of it.
type Entry struct {
	ID      wire.OrderID   `json:"id"`
	Kind    wire.OrderKind `json:"kind"`
	Reason  string         `json:"reason"`
	Until   int64          `json:"until"`   // Unix milliseconds
	Issued  int64          `json:"issued"`  // Unix milliseconds
	Expires int64          `json:"expires"` // Unix milliseconds
	Outcome wire.Outcome   `json:"outcome"`
	Message string         `json:"message"`
	Told    bool           `json:"told"` // the network has acknowledged the outcome
}

// Done is the answer to the order.
func (e *Entry) Done() *wire.OrderDone {
	return &wire.OrderDone{ID: e.ID, Outcome: e.Outcome, Message: e.Message}
}

// memory is the content of the file.
type memory struct {
	Entries  []Entry `json:"orders"`   // in the order of their beginning
	Drain    *Entry  `json:"drain"`    // the network's, in force
	Turned   int64   `json:"turned"`   // when the last drain or resume was issued, Unix milliseconds
	Penalty  *Entry  `json:"penalty"`  // the last one
	Restarts []int64 `json:"restarts"` // when the last ones were begun, Unix milliseconds of this node's clock
	Lost     int64   `json:"lost"`     // what was issued up to then may have been in a memory that was lost, Unix milliseconds
}

// Book is the memory of one node in one network. Safe for concurrent use; calls
// that change it wait for the disk.
type Book struct {
	path    string
	node    evm.Address
	network string
	now     func() time.Time
	damage  Damage

	mu sync.Mutex // guards what follows, also while it is written
	m  memory
}

// Open reads the memory at path, or begins one. Orders that were under way when
// the last agent ended have failed.
func Open(path, network string, node evm.Address, now func() time.Time) (*Book, error) {
	b := &Book{path: path, node: node, network: network, now: now}
	stale := false // the second copy
	m, err := read(path)
	none := errors.Is(err, fs.ErrNotExist)
	if err != nil && (none || errors.Is(err, errDamaged)) {
		b.damage = Mended
		m, err = read(path + copySuffix)
	} else if err == nil {
		second, err2 := read(path + copySuffix)
		if errors.Is(err2, errDamaged) {
			b.damage = Mended
		}
		stale = err2 != nil || !reflect.DeepEqual(second, m) // a kill came before it was written
	}
	_, aside := os.Lstat(path + lostSuffix)
	switch {
	case errors.Is(err, fs.ErrNotExist) && none && errors.Is(aside, fs.ErrNotExist): // else a start ended behind the renaming below
		b.damage = Whole // there was none
		return b, nil
	case errors.Is(err, errDamaged), errors.Is(err, fs.ErrNotExist):
		b.damage = Lost
		if err := os.Rename(path, path+lostSuffix); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
		return b, b.write(memory{Lost: now().Add(behind).UnixMilli()})
	case err != nil:
		return nil, err
	}
	b.m = *m
	cut := false
	for i := range b.m.Entries {
		if e := &b.m.Entries[i]; e.Outcome == Begun {
			e.Outcome, e.Message, cut = wire.OutcomeFailed, "the agent ended before it was done", true
		}
	}
	if cut || stale || b.damage == Mended {
		return b, b.write(b.m)
	}
	return b, nil
}

// Damage says what Open has found.
func (b *Book) Damage() Damage { return b.damage }

var errDamaged = errors.New("it is not what was written")

// read reads a copy.
func read(name string) (*memory, error) {
	raw, err := durable.ReadOwn(name, maxFile)
	if errors.Is(err, durable.ErrLarge) || errors.Is(err, durable.ErrNotFile) || errors.Is(err, syscall.EIO) {
		return nil, fmt.Errorf("%w: %w", errDamaged, err)
	}
	if err != nil {
		return nil, err
	}
	sum, text, _ := bytes.Cut(raw, []byte("\n"))
	if string(sum) != digest.Of(text).Hex() {
		return nil, errDamaged
	}
	m := new(memory)
	d := json.NewDecoder(bytes.NewReader(text))
	d.DisallowUnknownFields()
	if err := d.Decode(m); err != nil || len(m.Entries) > maxEntries || len(m.Restarts) > MaxRestarts {
		return nil, fmt.Errorf("%w: %v", errDamaged, err)
	}
	return m, nil
}

// write makes m the memory. On an error the old one stays, until the next start, which may
// find the new one.
func (b *Book) write(m memory) error {
	text, err := json.Marshal(m)
	if err != nil {
		return err
	}
	raw := append([]byte(digest.Of(text).Hex()+"\n"), text...)
	if err := os.MkdirAll(filepath.Dir(b.path), 0o700); err != nil {
		return err
	}
	failpoint.Here("order.write.begin")
	if err := durable.WriteFile(b.path, raw, 0o600); err != nil {
		return fmt.Errorf("the node cannot write the order down: %w", err)
	}
	failpoint.Here("order.write.written")
	if err := durable.WriteFile(b.path+copySuffix, raw, 0o600); err != nil {
		return fmt.Errorf("the node cannot write the order down twice: %w", err)
	}
	b.m = m
	return nil
}

// Begin checks an order and writes it down. trusted says which keys may sign for
// the network. An order that is remembered is returned as it is: known. A
// [*Refusal] leaves no trace; any other error is the disk's.
func (b *Book) Begin(o *wire.Order, trusted func(evm.Address) bool) (e Entry, known bool, err error) {
	d, who, err := o.Open()
	now := b.now()
	switch {
	case !trusted(who):
		return e, false, refuse(byStranger, "it is not signed by a message key of the network's configuration")
	case err != nil:
		return e, false, refuse(malformed, "it is malformed")
	case d.Network != b.network || d.Node != b.node:
		return e, false, refuse(elsewhere, "it is for node %s of network %.64q", d.Node, wire.Printable(d.Network))
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if i := b.find(d.ID); i >= 0 {
		return b.m.Entries[i], true, nil
	}
	// A clock that was ahead when the memory was lost would have the node refuse orders
	// until that time. It is right now that a network gives one.
	b.m.Lost = min(b.m.Lost, now.Add(behind).UnixMilli())
	turn := d.Kind == wire.OrderDrain || d.Kind == wire.OrderResume
	switch {
	case d.Issued <= b.m.Lost:
		return e, false, refuse(forgotten, "it was issued before this node's disk lost its memory of orders, and may have been carried out; if it is still wanted, order it again")
	case now.UnixMilli() >= d.Expires:
		return e, false, refuse(expired, "it expired at %s by this node's clock", time.UnixMilli(d.Expires).UTC().Format(time.RFC3339))
	case !slices.Contains(wire.OrderKinds, d.Kind):
		return e, false, refuse(unknownKind, "this agent does not know orders of kind %.40q", wire.Printable(string(d.Kind)))
	case d.Kind == wire.OrderPenalty && d.Until <= d.Issued:
		return e, false, refuse(endless, "a penalty has to end after it was issued")
	case turn && d.Issued < b.m.Turned:
		return e, false, refuse(overtaken, "a later order to drain or to resume has been carried out already")
	}
	m := b.m
	m.Entries = slices.DeleteFunc(slices.Clone(m.Entries), func(e Entry) bool {
		late := now.Sub(time.UnixMilli(e.Expires))
		return e.Outcome != Begun && (late > grace && e.Told || late > untold)
	})
	if len(m.Entries) >= maxEntries {
		return e, false, refuse(tooMany, "the node remembers %d orders that have not expired, and takes no more", maxEntries)
	}
	if d.Kind == wire.OrderRestart {
		// A time that is ahead is of a clock that was set back since.
		m.Restarts = slices.DeleteFunc(slices.Clone(m.Restarts), func(at int64) bool { return now.Sub(time.UnixMilli(at)).Abs() >= RestartsPer })
		if len(m.Restarts) >= MaxRestarts {
			next := time.UnixMilli(slices.Min(m.Restarts)).Add(RestartsPer)
			return e, false, refuse(tooOften, "the network has ordered %d restarts within %v, and may order the next at %s", MaxRestarts, RestartsPer, next.UTC().Format(time.RFC3339))
		}
		m.Restarts = append(m.Restarts, now.UnixMilli())
	}
	e = Entry{ID: d.ID, Kind: d.Kind, Reason: d.Reason, Until: d.Until, Issued: d.Issued, Expires: d.Expires, Outcome: Begun}
	m.Entries = append(m.Entries, e)
	return e, false, b.write(m)
}

func (b *Book) find(id wire.OrderID) int {
	return slices.IndexFunc(b.m.Entries, func(e Entry) bool { return e.ID == id })
}

// Finish writes down what became of an order that was begun: err is nil for
// success. A drain, a resume and a penalty are in force from then on.
func (b *Book) Finish(id wire.OrderID, err error) (Entry, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	i := b.find(id)
	if i < 0 || b.m.Entries[i].Outcome != Begun {
		return Entry{}, fmt.Errorf("order %s was not begun", id)
	}
	m := b.m
	m.Entries = slices.Clone(m.Entries)
	e := &m.Entries[i]
	if e.Outcome = wire.OutcomeOK; err != nil {
		e.Outcome, e.Message = wire.OutcomeFailed, wire.Cut(err.Error(), wire.MaxOrderMessage)
	}
	if err == nil {
		done := *e
		switch e.Kind {
		case wire.OrderDrain:
			m.Drain, m.Turned = &done, e.Issued
		case wire.OrderResume:
			m.Drain, m.Turned = nil, e.Issued
		case wire.OrderPenalty:
			m.Penalty = &done
		}
	}
	if err := b.write(m); err != nil {
		return Entry{}, err
	}
	return *e, nil
}

// Told notes that the network has the outcome of an order.
func (b *Book) Told(id wire.OrderID) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	i := b.find(id)
	if i < 0 || b.m.Entries[i].Told || b.m.Entries[i].Outcome == Begun {
		return nil
	}
	m := b.m
	m.Entries = slices.Clone(m.Entries)
	m.Entries[i].Told = true
	return b.write(m)
}

// Untold returns the answers that the network has not acknowledged.
func (b *Book) Untold() (list []*wire.OrderDone) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for i := range b.m.Entries {
		if e := &b.m.Entries[i]; !e.Told && e.Outcome != Begun {
			list = append(list, e.Done())
		}
	}
	return list
}

// Last returns the newest n orders, the oldest of them first.
func (b *Book) Last(n int) []Entry {
	b.mu.Lock()
	defer b.mu.Unlock()
	return slices.Clone(b.m.Entries[max(0, len(b.m.Entries)-n):])
}

// Drain returns the network's drain that is in force, or nil.
func (b *Book) Drain() *Entry {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.m.Drain
}

// Penalty returns the penalty that is in force, or nil.
func (b *Book) Penalty() *Entry {
	b.mu.Lock()
	defer b.mu.Unlock()
	if p := b.m.Penalty; p != nil && b.now().UnixMilli() < p.Until {
		return p
	}
	return nil
}
