package receiptlog

import (
	"encoding/json"
	"errors"
	"strings"
	"testing"

	"github.com/resultity/node/internal/evm"
)

// anew makes a log of three that began anew, the proof of its second receipt, and
// the network's key.
func anew(t *testing.T) (*Inclusion, evm.Hash, *evm.Key) {
	t.Helper()
	node, network := newKey(t), newKey(t)
	sign := func(h Head) *SignedHead {
		h.Node, h.Network = node.Address(), "testnet"
		s, err := h.Sign(31337, node)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	reset := Reset{
		Node: node.Address(), Network: "testnet", Era: 1_800_000_000_000,
		First: sign(Head{Size: 9, Root: evm.Hash{1}}), Second: sign(Head{Size: 4, Root: evm.Hash{2}}), Reason: "two disks were lost",
	}
	word, err := reset.Sign(31337, network)
	if err != nil {
		t.Fatal(err)
	}
	l, nodes := New(), map[NodeID]evm.Hash{}
	receipts := []evm.Hash{{1}, {2}, {3}}
	for _, r := range receipts {
		l.Append(Leaf(r), func(id NodeID, h evm.Hash) { nodes[id] = h })
	}
	p, err := Prove(1, 3, from(nodes))
	if err != nil {
		t.Fatal(err)
	}
	return &Inclusion{Head: *sign(Head{Era: reset.Era, Size: 3, Root: l.Root()}), Index: 1, Path: p.Path, Reset: word}, receipts[1], network
}

func newKey(t *testing.T) *evm.Key {
	t.Helper()
	k, err := evm.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// A proof from a log that began anew holds with the network's word for that, and
// with no other.
func TestReset(t *testing.T) {
	good, receipt, network := anew(t)
	parse := func(i *Inclusion) (*Inclusion, error) {
		raw, err := json.Marshal(i)
		if err != nil {
			t.Fatal(err)
		}
		if len(raw) > MaxInclusion/2 {
			t.Errorf("%d bytes leave no room for a longer path", len(raw))
		}
		return ParseInclusion(raw)
	}
	got, err := parse(good)
	if err != nil {
		t.Fatal(err)
	}
	if err := got.Check(good.Head.Node, 31337, receipt); err != nil {
		t.Error(err)
	}
	if by, err := got.Reset.Verify(); err != nil || by != network.Address() {
		t.Errorf("the word is %s's, %v", by, err)
	}
	for what, bend := range map[string]func(i *Inclusion, r *SignedReset){
		"without the word":        func(i *Inclusion, _ *SignedReset) { i.Reset = nil },
		"of another era":          func(_ *Inclusion, r *SignedReset) { r.Era++ },
		"of another node":         func(_ *Inclusion, r *SignedReset) { r.Node[0] ^= 1 },
		"of another network":      func(_ *Inclusion, r *SignedReset) { r.Network = "mainnet" },
		"from a later era":        func(_ *Inclusion, r *SignedReset) { r.Before = r.Era },
		"with another's head":     func(_ *Inclusion, r *SignedReset) { h := *r.First; h.Node[0] ^= 1; r.First = &h },
		"with a changed head":     func(_ *Inclusion, r *SignedReset) { h := *r.Second; h.Size++; r.Second = &h },
		"with a later era's head": func(i *Inclusion, r *SignedReset) { r.First = &i.Head },
		"with one head twice":     func(_ *Inclusion, r *SignedReset) { r.Second = r.First },
		"without the first head":  func(_ *Inclusion, r *SignedReset) { r.First = nil },
		"without a reason":        func(_ *Inclusion, r *SignedReset) { r.Reason = "" },
		"with two lines":          func(_ *Inclusion, r *SignedReset) { r.Reason = "a\nb" },
		"with a long reason":      func(_ *Inclusion, r *SignedReset) { r.Reason = strings.Repeat("x", MaxReason+1) },
		"without a signature":     func(_ *Inclusion, r *SignedReset) { r.Signature = evm.Signature{} },
	} {
		i, r := *good, *good.Reset
		i.Reset = &r
		bend(&i, &r)
		if _, err := parse(&i); !errors.Is(err, ErrProof) {
			t.Errorf("%s: %v", what, err)
		}
	}
	// The reason is what was signed: by a changed one, another key.
	r := *good.Reset
	r.Reason += "."
	if by, err := r.Verify(); err == nil && by == network.Address() {
		t.Error("a changed reason is the network's word")
	}
	if _, err := (&Reset{Node: good.Head.Node, Network: "testnet", Era: 1}).Sign(31337, network); err == nil {
		t.Error("a reset without a reason is signed")
	}
}
