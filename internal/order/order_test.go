package order

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/evm"
	"github.com/resultity/node/internal/wire"
)

type world struct {
	t    testing.TB
	key  *evm.Key // the network's
	node *evm.Key
	now  time.Time
	path string
}

func newWorld(t testing.TB) *world {
	t.Helper()
	w := &world{t: t, now: time.UnixMilli(1_800_000_000_000), path: filepath.Join(t.TempDir(), "orders.json")}
	for k, digit := range map[**evm.Key]string{&w.key: "1", &w.node: "2"} { // the same in each process that fuzzes
		var err error
		if *k, err = evm.ParseKey(strings.Repeat(digit, 64)); err != nil {
			t.Fatal(err)
		}
	}
	return w
}

func (w *world) open() *Book {
	w.t.Helper()
	b, err := Open(w.path, "testnet", w.node.Address(), func() time.Time { return w.now })
	if err != nil {
		w.t.Fatal(err)
	}
	return b
}

func (w *world) trusted(a evm.Address) bool { return a == w.key.Address() }

func (w *world) directive(kind wire.OrderKind) wire.Directive {
	return wire.Directive{
		ID: wire.NewOrderID(), Network: "testnet", Node: w.node.Address(), Kind: kind, Reason: "test",
		Issued: w.now.UnixMilli(), Expires: w.now.Add(time.Hour).UnixMilli(), Until: w.now.Add(time.Hour).UnixMilli(),
	}
}

func (w *world) order(key *evm.Key, d wire.Directive) *wire.Order {
	w.t.Helper()
	o, err := wire.SealOrder(key, &d)
	if err != nil {
		w.t.Fatal(err)
	}
	return o
}

func (w *world) carryOut(b *Book, d wire.Directive) Entry {
	w.t.Helper()
	if _, known, err := b.Begin(w.order(w.key, d), w.trusted); known || err != nil {
		w.t.Fatalf("%s: known %v, %v", d.Kind, known, err)
	}
	e, err := b.Finish(d.ID, nil)
	if err != nil {
		w.t.Fatal(err)
	}
	return e
}

func TestRefusals(t *testing.T) {
	w := newWorld(t)
	stranger, err := evm.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	b := w.open()
	later := w.directive(wire.OrderDrain)
	later.Issued++
	w.carryOut(b, later)
	before, err := os.ReadFile(w.path)
	if err != nil {
		t.Fatal(err)
	}
	change := func(f func(*wire.Directive)) *wire.Order {
		d := w.directive(wire.OrderDrain)
		d.Issued += 2
		f(&d)
		return w.order(w.key, d)
	}
	torn := w.order(w.key, w.directive(wire.OrderDrain))
	torn.Body = torn.Body[:len(torn.Body)-1]
	for name, c := range map[string]struct {
		order      *wire.Order
		code, want string
	}{
		"forged":            {w.order(stranger, w.directive(wire.OrderDrain)), byStranger, "not signed by a message key"},
		"by the node":       {w.order(w.node, w.directive(wire.OrderDrain)), byStranger, "not signed by a message key"},
		"cut short":         {torn, byStranger, "not signed by a message key"},
		"another node's":    {change(func(d *wire.Directive) { d.Node = stranger.Address() }), elsewhere, "it is for node"},
		"another network's": {change(func(d *wire.Directive) { d.Network = "mainnet" }), elsewhere, "it is for node"},
		"expired":           {change(func(d *wire.Directive) { d.Issued -= 7200_000; d.Expires = w.now.UnixMilli() }), expired, "expired"},
		"for ever":          {change(func(d *wire.Directive) { d.Expires = d.Issued + 8*24*3600_000 }), malformed, "malformed"},
		"unknown kind":      {change(func(d *wire.Directive) { d.Kind = "dance" }), unknownKind, `"dance"`},
		"endless penalty":   {change(func(d *wire.Directive) { d.Kind, d.Until = wire.OrderPenalty, d.Issued }), endless, "has to end"},
		"overtaken":         {change(func(d *wire.Directive) { d.Kind = wire.OrderResume; d.Issued -= 2 }), overtaken, "later order"},
	} {
		_, known, err := b.Begin(c.order, w.trusted)
		t.Logf("%s: expected: %s; got: %v", name, c.want, err)
		var r *Refusal
		if known || !errors.As(err, &r) || r.Code != c.code || !strings.Contains(r.Reason, c.want) {
			t.Errorf("%s: known %v, %v, want a refusal for %s with %q", name, known, err, c.code, c.want)
		}
	}
	if after, err := os.ReadFile(w.path); err != nil || string(after) != string(before) {
		t.Errorf("refused orders left a trace: %v", err)
	}
}

// An order is begun once, whatever happens between, and what was cut short has
// failed.
func TestOnceOverRestarts(t *testing.T) {
	w := newWorld(t)
	b := w.open()
	d := w.directive(wire.OrderRestart)
	o := w.order(w.key, d)
	if _, known, err := b.Begin(o, w.trusted); known || err != nil {
		t.Fatal(known, err)
	}
	if e, known, err := b.Begin(o, w.trusted); !known || err != nil || e.Outcome != Begun {
		t.Fatalf("again while it is under way: %+v %v %v", e, known, err)
	}
	b = w.open() // after a kill
	e, known, err := b.Begin(o, w.trusted)
	if !known || err != nil || e.Outcome != wire.OutcomeFailed {
		t.Fatalf("after a restart: %+v %v %v", e, known, err)
	}
	t.Logf("the same order after a restart: expected: known, %s; got: known %t, %s", wire.OutcomeFailed, known, e.Outcome)
	if u := b.Untold(); len(u) != 1 || u[0].ID != d.ID || u[0].Check() != nil {
		t.Fatalf("untold %+v", u)
	}
	if err := b.Told(d.ID); err != nil {
		t.Fatal(err)
	}
	b = w.open()
	if u := b.Untold(); len(u) != 0 {
		t.Errorf("told, and told again: %+v", u)
	}
	// Replayed when it has been forgotten, it has expired.
	w.now = w.now.Add(2 * time.Hour)
	w.carryOut(b, w.directive(wire.OrderRevalidate))
	if n := len(b.Last(10)); n != 1 {
		t.Errorf("%d orders are remembered, want the new one", n)
	}
	_, known, err = b.Begin(o, w.trusted)
	t.Logf("when it has been forgotten: expected: refused as expired; got: %v", err)
	if known || !errors.As(err, new(*Refusal)) || !strings.Contains(err.Error(), "expired") {
		t.Errorf("replayed after it was forgotten: %v %v", known, err)
	}
}

func TestDrainAndPenaltyStay(t *testing.T) {
	w := newWorld(t)
	b := w.open()
	w.carryOut(b, w.directive(wire.OrderDrain))
	w.carryOut(b, w.directive(wire.OrderPenalty))
	b = w.open()
	if b.Drain() == nil || b.Drain().Reason != "test" || b.Penalty() == nil {
		t.Fatalf("drain %v, penalty %v", b.Drain(), b.Penalty())
	}
	w.now = w.now.Add(time.Hour)
	if b.Penalty() != nil {
		t.Error("the penalty does not end")
	}
	w.carryOut(b, w.directive(wire.OrderResume))
	if b = w.open(); b.Drain() != nil {
		t.Error("drained after a resume")
	}
}

func TestFlood(t *testing.T) {
	w := newWorld(t)
	b := w.open()
	for range maxEntries {
		w.carryOut(b, w.directive(wire.OrderPenalty))
	}
	_, _, err := b.Begin(w.order(w.key, w.directive(wire.OrderDrain)), w.trusted)
	t.Logf("one more than %d: expected: a refusal; got: %v", maxEntries, err)
	if r := new(Refusal); !errors.As(err, &r) || r.Code != tooMany {
		t.Fatalf("one too many: %v", err)
	}
	if st, err := os.Stat(w.path); err != nil || st.Size() > maxFile {
		t.Fatalf("%v, %v", st, err)
	}
	w.now = w.now.Add(untold + 2*time.Hour)
	w.carryOut(b, w.directive(wire.OrderDrain))
}

// Who holds a message key cannot keep a node from working by restarts, whatever the
// orders say of their times, and over restarts of the agent.
func TestRestartsAreBounded(t *testing.T) {
	w := newWorld(t)
	b := w.open()
	brief := func() wire.Directive { // is forgotten soon
		d := w.directive(wire.OrderRestart)
		d.Expires = d.Issued + 1000
		return d
	}
	refused := func() {
		t.Helper()
		d := brief()
		_, known, err := b.Begin(w.order(w.key, d), w.trusted)
		if r := new(Refusal); known || !errors.As(err, &r) || r.Code != tooOften || !strings.Contains(r.Reason, "the next at 2027-01-15T09:00:00Z") {
			t.Errorf("%v", err)
		}
	}
	for range MaxRestarts {
		d := brief()
		w.carryOut(b, d)
		if err := b.Told(d.ID); err != nil {
			t.Fatal(err)
		}
		w.now = w.now.Add(time.Minute)
	}
	refused()
	w.carryOut(b, w.directive(wire.OrderPenalty)) // others go on
	w.now = w.now.Add(30 * time.Minute)
	w.carryOut(b, w.directive(wire.OrderPenalty)) // forgets what is over
	if b = w.open(); len(b.Last(9)) != 2 {
		t.Fatalf("%+v", b.Last(9))
	}
	refused()
	at := w.now
	w.now = w.now.Add(-time.Hour) // the clock is set back, and right again
	refused()
	w.now = at.Add(27 * time.Minute)
	w.carryOut(b, brief())
	w.now = at.Add(-24 * time.Hour) // it was a day ahead, and keeps nobody waiting for that
	b = w.open()
	w.carryOut(b, brief())
}

// Damage to one copy takes nothing; to both, the memory begins anew, and what may have
// been carried out before is not done again.
func TestDamagedMemory(t *testing.T) {
	w := newWorld(t)
	old := w.directive(wire.OrderDrain)
	w.carryOut(w.open(), old)
	good, err := os.ReadFile(w.path)
	if err != nil {
		t.Fatal(err)
	}
	damages := map[string][]byte{"empty": {}, "torn": good[:len(good)/2], "huge": make([]byte, maxFile+1), "missing": nil}
	for at := 0; at < len(good); at += 7 {
		b := slices.Clone(good)
		b[at] ^= 1 << (at % 8)
		damages[fmt.Sprint("byte ", at)] = b
	}
	write := func(name string, raw []byte) {
		t.Helper()
		err := os.WriteFile(name, raw, 0o600)
		if raw == nil {
			err = os.Remove(name)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	for what, raw := range damages {
		for _, name := range []string{w.path, w.path + copySuffix} {
			write(name, raw)
			b := w.open()
			if want := raw != nil || name == w.path; (b.Damage() == Mended) != want || b.Drain() == nil {
				t.Fatalf("%s of %s: damage %d, drain %v", what, name, b.Damage(), b.Drain())
			}
			if b = w.open(); b.Damage() != Whole || b.Drain() == nil {
				t.Fatalf("%s of %s: damage %d at the next start", what, name, b.Damage())
			}
		}
		if raw == nil || len(what) > 5 && !strings.HasSuffix(what, "0") {
			continue // none at all is a new memory; and some are enough
		}
		write(w.path, raw)
		write(w.path+copySuffix, raw)
		b := w.open()
		if b.Damage() != Lost || b.Drain() != nil {
			t.Fatalf("%s: damage %d, drain %v", what, b.Damage(), b.Drain())
		}
		if kept, err := os.ReadFile(w.path + lostSuffix); err != nil || !bytes.Equal(kept, raw) {
			t.Fatalf("%s: what was there is not kept: %v", what, err)
		}
		for range 2 {
			var refused *Refusal
			if _, _, err := b.Begin(w.order(w.key, old), w.trusted); !errors.As(err, &refused) || !strings.Contains(refused.Reason, "order it again") {
				t.Fatalf("%s: an order of before: %v", what, err)
			}
			b = w.open()
		}
		if b.Damage() != Whole {
			t.Fatalf("%s: damage %d at the next start", what, b.Damage())
		}
		write(w.path, good)
		write(w.path+copySuffix, good)
	}
	t.Logf("expected: mended from the other copy, and with both damaged, orders of before are refused; got: that, with %d kinds of damage", len(damages))
}

// A kill while the memory is begun anew does not make it one that never had an order.
func TestLossIsNotForgotten(t *testing.T) {
	w := newWorld(t)
	old := w.directive(wire.OrderDrain)
	w.carryOut(w.open(), old)
	// There was no second copy, and the first, damaged, has been moved away.
	if err := errors.Join(os.Remove(w.path+copySuffix), os.Rename(w.path, w.path+lostSuffix)); err != nil {
		t.Fatal(err)
	}
	b := w.open()
	_, _, err := b.Begin(w.order(w.key, old), w.trusted)
	if r := new(Refusal); b.Damage() != Lost || !errors.As(err, &r) || r.Code != forgotten {
		t.Errorf("damage %d; an order of before: %v", b.Damage(), err)
	}
	if b = w.open(); b.Damage() != Whole {
		t.Errorf("damage %d at the next start", b.Damage())
	}
}

// What cannot be written down is not begun.
func TestFullDisk(t *testing.T) {
	w := newWorld(t)
	b := w.open()
	w.carryOut(b, w.directive(wire.OrderPenalty))
	b.path = filepath.Join("/dev/full", "orders.json")
	d := w.directive(wire.OrderDrain)
	if _, known, err := b.Begin(w.order(w.key, d), w.trusted); known || err == nil || errors.As(err, new(*Refusal)) {
		t.Fatalf("known %v, %v", known, err)
	}
	b.path = w.path
	w.carryOut(b, d)
}

// Whatever is in the file: it is refused as damaged, or it is a memory that reads
// the same when it is opened again, and that takes orders.
func FuzzOpen(f *testing.F) {
	w := newWorld(f)
	if _, _, err := w.open().Begin(w.order(w.key, w.directive(wire.OrderDrain)), w.trusted); err != nil {
		f.Fatal(err)
	}
	raw, err := os.ReadFile(w.path)
	if err != nil {
		f.Fatal(err)
	}
	_, raw, _ = bytes.Cut(raw, []byte("\n"))
	f.Add(raw)
	f.Add([]byte(`{"orders":null}`))
	f.Add([]byte(`{"orders":[{}],"turned":-1} {`))
	next := w.order(w.key, w.directive(wire.OrderRestart))
	f.Fuzz(func(t *testing.T, raw []byte) {
		path := filepath.Join(t.TempDir(), "orders.json")
		raw = append([]byte(digest.Of(raw).Hex()+"\n"), raw...)
		if err := os.WriteFile(path, raw, 0o600); err != nil {
			t.Fatal(err)
		}
		open := func() (*Book, error) {
			return Open(path, "testnet", w.node.Address(), func() time.Time { return w.now })
		}
		b, err := open()
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range b.Last(maxEntries) {
			if e.Outcome == Begun {
				t.Fatalf("%+v has not ended with the agent", e)
			}
		}
		_, _, err = b.Begin(next, w.trusted)
		if r := (*Refusal)(nil); err != nil && !errors.As(err, &r) {
			t.Fatal(err)
		}
		again, err := open()
		if err != nil {
			t.Fatalf("what the book has written cannot be read: %v", err)
		}
		if a, b := len(again.Last(maxEntries)), len(b.Last(maxEntries)); a != b {
			t.Fatalf("%d orders, %d when it is opened again", b, a)
		}
	})
}

// A clock that was ahead when the memory was lost keeps no order out for longer than
// until it is right; and one that is a little behind lets none in that was issued before.
func TestLostByAWrongClock(t *testing.T) {
	for what, off := range map[string]time.Duration{"ahead": 10 * 365 * 24 * time.Hour, "behind": -5 * time.Second} {
		w := newWorld(t)
		old := w.directive(wire.OrderDrain)
		w.carryOut(w.open(), old)
		for _, name := range []string{w.path, w.path + copySuffix} {
			if err := os.WriteFile(name, []byte("x"), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		right := w.now
		w.now = right.Add(off)
		b := w.open()
		if b.Damage() != Lost {
			t.Fatalf("%s: damage %d", what, b.Damage())
		}
		w.now = right.Add(time.Second)
		if _, _, err := b.Begin(w.order(w.key, old), w.trusted); !errors.As(err, new(*Refusal)) {
			t.Errorf("%s: an order of before: %v", what, err)
		}
		w.now = right.Add(2 * behind)
		w.carryOut(b, w.directive(wire.OrderDrain))
		w.now = w.now.Add(time.Second)
		w.carryOut(w.open(), w.directive(wire.OrderResume))
	}
}
