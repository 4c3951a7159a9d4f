package state

import (
	"errors"
	"slices"
	"testing"

	"github.com/resultity/node/internal/evm"
	"github.com/resultity/node/internal/receiptlog"
)

// wantLog fails unless a store's receipt log has these leaves behind base.
func wantLog(t *testing.T, s *Store, base *receiptlog.Log, leaves ...evm.Hash) {
	t.Helper()
	l := base.Clone()
	for _, leaf := range leaves {
		l.Append(leaf, nil)
	}
	is := s.ReceiptLog()
	if is.Size != l.Size() || is.Root != l.Root() || !slices.Equal(s.Leaves(base.Size(), 1000), leaves) {
		t.Fatalf("receipt log %+v, want %d receipts, root %s", is, l.Size(), l.Root())
	}
}

// A receipt enters the log with its result, once, in the order of finishing;
// what has no receipt does not.
func TestReceiptLog(t *testing.T) {
	s := open(t, newPath(t))
	wantLog(t, s, receiptlog.New())
	var leaves []evm.Hash
	for i := range 5 {
		j := newJob(10)
		accept(t, s, j, New)
		if i == 3 {
			finish(t, s, failure(j))
			wantLog(t, s, receiptlog.New(), leaves...)
			continue
		}
		r := success(t, j, 100)
		stated := r.Receipt.Receipt()
		leaves = append(leaves, receiptlog.Leaf(stated.Hash(1)))
		for range 2 { // it says so again
			finish(t, s, r)
		}
		if err := s.Finish(success(t, j, 50)); !errors.Is(err, ErrConflict) {
			t.Errorf("another result: %v", err)
		}
		wantLog(t, s, receiptlog.New(), leaves...)
		if i%2 == 0 {
			ack(t, s, j.ID)
		}
		if err := s.Finish(success(t, j, 50)); !errors.Is(err, ErrConflict) {
			t.Errorf("another result after the acknowledgement: %v", err)
		}
		s = reopen(t, s)
		wantLog(t, s, receiptlog.New(), leaves...)
	}
	if err := s.Finish(success(t, newJob(1), 1)); !errors.Is(err, ErrUnknown) {
		t.Errorf("a job that was not accepted: %v", err)
	}
	wantLog(t, s, receiptlog.New(), leaves...)
	if got := s.Leaves(1, 2); !slices.Equal(got, leaves[1:3]) {
		t.Errorf("two leaves from 1 on: %v", got)
	}
	if s.Leaves(5, 1) != nil || s.LogAt(5) != nil {
		t.Error("there is something behind the end")
	}
	if err := s.AckLeaves(5); err == nil {
		t.Error("the network is said to have more than there is")
	}
	if err := s.AckLeaves(3); err != nil {
		t.Fatal(err)
	}
	if s = reopen(t, s); s.ReceiptLog().Acked != 3 {
		t.Errorf("the network has 3, and is said to have %d", s.ReceiptLog().Acked)
	}

	// On a log of the network's, only what that has never had comes behind it.
	other := receiptlog.New()
	for i := range 100 {
		other.Append(receiptlog.Leaf(evm.Keccak([]byte{byte(i)})), nil)
	}
	if err := s.RestoreLog(other); err != nil {
		t.Fatal(err)
	}
	wantLog(t, s, other, leaves[3])
	s = reopen(t, s)
	wantLog(t, s, other, leaves[3])
	if is := s.ReceiptLog(); is.First != 100 || is.Acked != 100 {
		t.Errorf("receipt log %+v", is)
	}
	if s.Leaves(99, 1) != nil || s.LogAt(99) != nil {
		t.Error("the store has what it was not given")
	}
	j := newJob(10)
	accept(t, s, j, New)
	r := success(t, j, 1)
	stated := r.Receipt.Receipt()
	finish(t, s, r)
	wantLog(t, s, other, leaves[3], receiptlog.Leaf(stated.Hash(1)))
}

// A log that nothing was appended to since it was taken over outlives the
// segment that it was written in.
func TestRestoredLogIsCopied(t *testing.T) {
	d := newMemory(1)
	s, err := modelLoad(d, Bounds{})
	if err != nil {
		t.Fatal(err)
	}
	other := receiptlog.New()
	for i := range 1000 {
		other.Append(receiptlog.Leaf(evm.Keccak(number(uint64(i)))), nil)
	}
	if err := s.RestoreLog(other); err != nil {
		t.Fatal(err)
	}
	for round := range 3 {
		for first := s.segments[0].Number; s.segments[0].Number == first; {
			j := newJob(2000)
			accept(t, s, j, New)
			finish(t, s, failure(j))
			ack(t, s, j.ID)
			if len(s.segments) > 2 {
				if err := s.tryClean(t); err != nil {
					t.Fatal(err)
				}
			}
		}
		abandon(s)
		d = d.after(true)
		if s, err = modelLoad(d, Bounds{}); err != nil {
			t.Fatalf("round %d: %v", round, err)
		}
		wantLog(t, s, other)
	}
	abandon(s)
}

// What the model's disk tests read back was encoded and decoded; this is what
// comes of other bytes.
func FuzzLeaves(f *testing.F) {
	edge := []evm.Hash{{1}, {2}}
	for _, l := range []leaves{{leaves: edge}, {first: 3, begins: true, edge: edge}, {first: 5, begins: true, edge: edge, leaves: edge}} {
		f.Add(l.encode())
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		l, ok := decodeLeaves(b)
		if !ok {
			return
		}
		if !slices.Equal(l.encode(), b) {
			t.Fatalf("%x is read as %+v", b, l)
		}
		if l.begins && len(l.edge) != receiptlog.Edge(l.first) {
			t.Fatalf("%+v", l)
		}
		var r treeReader
		r.read(kindAdopted, b, 1)
		r.read(kindLeaves, b, 1)
	})
}

// What a receipt costs in the log beside what it costs anyway.
func BenchmarkLeaf(b *testing.B) {
	d := newMemory(1)
	s, err := load(d, Bounds{}, now, small)
	if err != nil {
		b.Fatal(err)
	}
	r, err := sign(newJob(10), nil)
	if err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		leaf, _ := receiptLeaf(r)
		s.addLeaf(leaf, 1)
	}
}
