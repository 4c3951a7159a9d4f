package receiptlog

import (
	"encoding/json"
	"errors"
	"reflect"
	"strings"
	"testing"

	"github.com/resultity/node/internal/evm"
)

// What no log can have is refused before a signature is looked at, and the last that it
// can have is not.
func TestHeadIsBounded(t *testing.T) {
	key := newKey(t)
	last := Head{Node: key.Address(), Network: strings.Repeat("n", 64), Size: MaxSize, Time: maxTime, Era: maxTime}
	if err := last.Bound(); err != nil {
		t.Error(err)
	}
	reset := Reset{Node: key.Address(), Network: "testnet", Era: maxTime, Reason: strings.Repeat("x", MaxReason)}
	if _, err := reset.Sign(1, key); err != nil {
		t.Error(err)
	}
	for name, refused := range map[string]func(Head, Reset) error{
		"a size":            func(h Head, _ Reset) error { h.Size++; return h.Bound() },
		"a time":            func(h Head, _ Reset) error { h.Time++; return h.Bound() },
		"an era":            func(h Head, _ Reset) error { h.Era++; return h.Bound() },
		"a network's name":  func(h Head, _ Reset) error { h.Network += "n"; return h.Bound() },
		"an era of a reset": func(_ Head, r Reset) error { r.Era++; _, err := r.Sign(1, key); return err },
		"a reason":          func(_ Head, r Reset) error { r.Reason += "x"; _, err := r.Sign(1, key); return err },
	} {
		err := refused(last, reset)
		t.Logf("%s beyond its bound: expected: refused; got: %v", name, err)
		if err == nil {
			t.Errorf("%s beyond its bound is taken", name)
		}
	}
	if _, err := ParseInclusion(make([]byte, MaxInclusion+1)); !errors.Is(err, ErrProof) || !strings.Contains(err.Error(), "at most") {
		t.Errorf("an inclusion beyond its bound: %v", err)
	}
}

// Whoever has no key may change an inclusion as he likes: it holds for no receipt
// but the one that it was made for.
func FuzzInclusion(f *testing.F) {
	key, err := evm.ParseKey(strings.Repeat("1", 64)) // the same in each process that fuzzes
	if err != nil {
		f.Fatal(err)
	}
	const size, at = 5, 3
	l, nodes := grow(size)
	p, err := Prove(at, size, from(nodes))
	if err != nil {
		f.Fatal(err)
	}
	h := Head{Node: key.Address(), Network: "testnet", Size: size, Root: l.Root()}
	s, err := h.Sign(1, key)
	if err != nil {
		f.Fatal(err)
	}
	good, err := json.Marshal(Inclusion{Head: *s, Index: p.Index, Path: p.Path})
	if err != nil {
		f.Fatal(err)
	}
	mine, other := evm.Keccak([]byte{0, 0, 0, 0, 0, 0, 0, at}), evm.Keccak([]byte("another"))
	if i, err := ParseInclusion(good); err != nil || i.Check(key.Address(), 1, mine) != nil {
		f.Fatalf("%v, %s", err, good)
	}
	f.Add(good)
	f.Add([]byte(`{"head":{"size":0},"path":null}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		i, err := ParseInclusion(b)
		if err != nil {
			if !errors.Is(err, ErrProof) {
				t.Fatal(err)
			}
			return
		}
		if i.Check(key.Address(), 1, other) == nil {
			t.Fatalf("%s holds for another receipt", b)
		}
		if i.Head.Node == key.Address() && !reflect.DeepEqual(i.Head.Head, s.Head) {
			t.Fatalf("%s has another head of the node", b)
		}
		if i.Check(key.Address(), 1, mine) == nil && (i.Index != at || !reflect.DeepEqual(i.Path, p.Path)) {
			t.Fatalf("%s has the receipt in another place", b)
		}
	})
}
