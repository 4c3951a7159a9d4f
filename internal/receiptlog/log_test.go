package receiptlog

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/resultity/node/internal/evm"
)

func leaf(i uint64) evm.Hash { return Leaf(evm.Keccak(binary.BigEndian.AppendUint64(nil, i))) }

// grow makes a log of n leaves and all nodes of its tree.
func grow(n uint64) (*Log, map[NodeID]evm.Hash) {
	l, nodes := New(), map[NodeID]evm.Hash{}
	for i := range n {
		l.Append(leaf(i), func(id NodeID, h evm.Hash) { nodes[id] = h })
	}
	return l, nodes
}

// from returns what a node that is not there is an error for.
func from(nodes map[NodeID]evm.Hash) func(NodeID) (evm.Hash, error) {
	return func(id NodeID) (evm.Hash, error) {
		h, ok := nodes[id]
		if !ok {
			return h, fmt.Errorf("no node %v", id)
		}
		return h, nil
	}
}

// naive is the root as RFC 9162, 2.1.1 defines it.
func naive(leaves []evm.Hash) evm.Hash {
	switch n := len(leaves); n {
	case 0:
		return evm.Keccak()
	case 1:
		return leaves[0]
	default:
		k := 1
		for 2*k < n {
			k *= 2
		}
		l, r := naive(leaves[:k]), naive(leaves[k:])
		return evm.Keccak([]byte{1}, l[:], r[:])
	}
}

func TestRoot(t *testing.T) {
	var leaves []evm.Hash
	l := New()
	for n := range uint64(70) {
		if got, want := l.Root(), naive(leaves); got != want {
			t.Fatalf("root of %d leaves is %s, want %s", n, got, want)
		}
		again, err := Resume(l.Size(), l.Hashes())
		if err != nil || again.Root() != l.Root() {
			t.Fatalf("%d leaves, resumed: %v, %v", n, again, err)
		}
		c := l.Clone()
		c.Append(leaf(1000), nil)
		leaves = append(leaves, leaf(n))
		l.Append(leaf(n), nil)
	}
	if _, err := Resume(5, l.Hashes()); err == nil {
		t.Error("hashes of another size are taken")
	}
	if _, err := Resume(MaxSize+1, nil); err == nil {
		t.Error("an absurd size is taken")
	}
}

func TestProofs(t *testing.T) {
	for n := uint64(1); n < 40; n++ {
		l, nodes := grow(n)
		for i := range n {
			p, err := Prove(i, n, from(nodes))
			if err != nil {
				t.Fatal(err)
			}
			if err := p.Check(leaf(i), l.Root()); err != nil {
				t.Errorf("%d of %d: %v", i, n, err)
			}
			wrong := []struct {
				name       string
				p          Proof
				leaf, root evm.Hash
			}{
				{"another leaf", *p, leaf(i + 1), l.Root()},
				{"another root", *p, leaf(i), leaf(i)},
				{"another place", Proof{(i + 1) % n, n, p.Path}, leaf(i), l.Root()},
				{"a place outside", Proof{n, n, p.Path}, leaf(i), l.Root()},
				{"a path too long", Proof{i, n, append(p.Path[:len(p.Path):len(p.Path)], leaf(0))}, leaf(i), l.Root()},
				{"an inner node as leaf", Proof{i / 2, n / 2, p.Path[min(1, len(p.Path)):]}, leaf(i), l.Root()},
			}
			if len(p.Path) > 0 {
				bent := append([]evm.Hash(nil), p.Path...)
				bent[0][7] ^= 1
				wrong = append(wrong, struct {
					name       string
					p          Proof
					leaf, root evm.Hash
				}{"a path with a changed bit", Proof{i, n, bent}, leaf(i), l.Root()})
			}
			for _, w := range wrong {
				if n == 1 && (w.name == "another place" || w.name == "another root") {
					continue // of one leaf there is one place, and the root is the leaf
				}
				if err := w.p.Check(w.leaf, w.root); !errors.Is(err, ErrProof) {
					t.Errorf("%s, %d of %d: %v", w.name, i, n, err)
				}
			}
		}
		for m := uint64(1); m <= n; m++ {
			old, _ := grow(m)
			path, err := ProveGrowth(m, n, from(nodes))
			if err != nil {
				t.Fatal(err)
			}
			was, is := Head{Size: m, Root: old.Root()}, Head{Size: n, Root: l.Root()}
			if err := CheckGrowth(was, is, path); err != nil {
				t.Errorf("from %d to %d: %v", m, n, err)
			}
			was.Root[0] ^= 1
			if err := CheckGrowth(was, is, path); !errors.Is(err, ErrProof) {
				t.Errorf("from another log of %d to %d: %v", m, n, err)
			}
		}
	}
	if _, err := Prove(3, 3, nil); !errors.Is(err, ErrProof) {
		t.Errorf("a place behind the end: %v", err)
	}
	if err := CheckGrowth(Head{Node: evm.Address{1}}, Head{}, nil); !errors.Is(err, ErrProof) {
		t.Errorf("heads of two nodes: %v", err)
	}
	if err := CheckGrowth(Head{Network: "testnet"}, Head{Network: "mainnet"}, nil); !errors.Is(err, ErrProof) {
		t.Errorf("heads of two networks: %v", err)
	}
}

// A log that grows shows that it has, from any size to any other.
func TestGrow(t *testing.T) {
	for n := range uint64(70) {
		for m := range n + 1 {
			l, _ := grow(m)
			was := Head{Size: m, Root: l.Root()}
			var more []evm.Hash
			for i := m; i < n; i++ {
				more = append(more, leaf(i))
			}
			path, err := l.Grow(more)
			if err != nil {
				t.Fatal(err)
			}
			want, nodes := grow(n)
			if l.Root() != want.Root() {
				t.Fatalf("from %d to %d: another log", m, n)
			}
			is := Head{Size: n, Root: l.Root()}
			if err := CheckGrowth(was, is, path); err != nil {
				t.Errorf("from %d to %d: %v", m, n, err)
			}
			if other, err := ProveGrowth(m, n, from(nodes)); err != nil || !slices.Equal(path, other) {
				t.Errorf("from %d to %d: path %v, want %v, %v", m, n, path, other, err)
			}
		}
	}
	last, err := Resume(MaxSize, []evm.Hash{leaf(0)})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := last.Grow([]evm.Hash{leaf(1)}); !errors.Is(err, ErrProof) {
		t.Errorf("beyond the bound: %v", err)
	}
}

func TestInclusion(t *testing.T) {
	key, err := evm.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	receipts := []evm.Hash{evm.Keccak([]byte("a")), evm.Keccak([]byte("b")), evm.Keccak([]byte("c"))}
	l, nodes := New(), map[NodeID]evm.Hash{}
	for _, r := range receipts {
		l.Append(Leaf(r), func(id NodeID, h evm.Hash) { nodes[id] = h })
	}
	h := Head{Node: key.Address(), Network: "testnet", Size: 3, Root: l.Root(), Time: 1_800_000_000_000}
	signed, err := h.Sign(31337, key)
	if err != nil {
		t.Fatal(err)
	}
	p, err := Prove(1, 3, from(nodes))
	if err != nil {
		t.Fatal(err)
	}
	good, err := json.Marshal(Inclusion{Head: *signed, Index: 1, Path: p.Path})
	if err != nil {
		t.Fatal(err)
	}
	i, err := ParseInclusion(good)
	if err != nil {
		t.Fatal(err)
	}
	if err := i.Check(key.Address(), 31337, receipts[1]); err != nil {
		t.Error(err)
	}
	for name, err := range map[string]error{
		"another receipt": i.Check(key.Address(), 31337, receipts[0]),
		"another node":    i.Check(evm.Address{1}, 31337, receipts[1]),
		"another chain":   i.Check(key.Address(), 1, receipts[1]),
	} {
		t.Logf("%s: expected: %v; got: %v", name, ErrProof, err)
		if !errors.Is(err, ErrProof) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, change := range [][2]string{
		{`"size":3`, `"size":4`}, {`"testnet"`, `"mainnet"`}, {`"testnet"`, `"Testnet"`}, {`"time":1800000000000`, `"time":1800000000001`}, {`"chain_id":31337`, `"chain_id":31338`},
		{l.Root().Hex(), receipts[0].Hex()}, {strings.ToLower(key.Address().Hex()), "0x0100000000000000000000000000000000000000"},
		{`"size":3`, `"size":4398046511105`}, {`{`, `[`}, {`"index"`, strings.Repeat(" ", MaxInclusion) + `"index"`},
		// What other readers may understand in another way.
		{`"index":1`, `"index":0,"index":1`}, {`"index":1`, `"index":1,"Index":1`}, {`"index"`, `"Index"`}, {`"index":1`, `"index":1,"job":"x"`},
		{`"size":3`, `"size":4,"size":3`}, {`"size":3`, `"size":3,"edge":[]`}, {`0x`, `0X`}, {`}`, `}}`},
	} {
		bad := strings.Replace(string(good), change[0], change[1], 1)
		if bad == string(good) {
			t.Fatalf("%s is not in %s", change[0], good)
		}
		_, err := ParseInclusion([]byte(bad))
		t.Logf("%.40s for %.40s: expected: %v; got: %.150v", strings.TrimSpace(change[1]), change[0], ErrProof, err)
		if !errors.Is(err, ErrProof) {
			t.Errorf("%s for %s: %v", change[1], change[0], err)
		}
	}
	other, err := evm.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := h.Sign(1, other); err == nil {
		t.Error("somebody else's head is signed")
	}
}
