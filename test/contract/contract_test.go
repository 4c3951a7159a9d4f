package contract

import (
	"context"
	"encoding/binary"
	"errors"
	"math/big"
	"reflect"
	"slices"
	"sync"
	"testing"

	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/evm"
	"github.com/resultity/node/internal/receipt"
	"github.com/resultity/node/internal/receiptlog"
)

const chainID = 31337

// words is how many words a receipt has.
const words = 14

// order is that of the curve, secp256k1 (SEC 2).
var order, _ = new(big.Int).SetString("FFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141", 16)

var created = sync.OnceValues(func() (Contract, error) {
	c, err := New(context.Background(), chainID)
	if err != nil {
		return Contract{}, err
	}
	return *c, nil
})

// contract returns the contract on a chain that no other test has touched.
func contract(t *testing.T) *Contract {
	t.Helper()
	c, err := created()
	if err != nil {
		t.Fatal(err)
	}
	c.cfg.State = c.cfg.State.Copy()
	return &c
}

func newKey(t *testing.T) *evm.Key {
	t.Helper()
	k, err := evm.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func example(node evm.Address, n uint64) receipt.Receipt {
	d := func(s string) digest.Digest { return digest.Of(binary.BigEndian.AppendUint64([]byte(s), n)) }
	return receipt.Receipt{
		Job: receipt.NewJobID(), Node: node,
		Measured: receipt.Measured{
			ConfigDigest: d("config"), ImageDigest: d("image"), ModelDigest: d("model"), SandboxDigest: d("sandbox"),
			RequestHash: d("request"), ResponseHash: d("response"),
		},
		Claimed:  receipt.Claimed{ClassDigest: d("class"), PromptTokens: 12, CompletionTokens: 1 << 60, StartedAt: 1_800_000_000_000, FinishedAt: 1_800_000_000_123},
		Sequence: 7<<32 + n,
	}
}

func sign(t *testing.T, r receipt.Receipt, key *evm.Key, chain uint64) []byte {
	t.Helper()
	s, err := r.Sign(chain, key)
	if err != nil {
		t.Fatal(err)
	}
	sig := s.Signature()
	return sig[:]
}

// accept calls a method that has to do something.
func accept(t *testing.T, c *Contract, method string, args ...any) (values []any, events []string) {
	t.Helper()
	values, events, gas, err := c.Call(method, args...)
	if err != nil {
		t.Fatalf("%s: %v", method, err)
	}
	t.Logf("%s: %d gas", method, gas)
	return values, events
}

// refuse calls a method that has to revert with an error.
func refuse(t *testing.T, c *Contract, name, what, method string, args ...any) {
	t.Helper()
	_, _, _, err := c.Call(method, args...)
	var r *Reverted
	t.Logf("%s: expected: %s; got: %v", what, name, err)
	if !errors.As(err, &r) || r.Name != name {
		t.Errorf("%s: %v, want %s", what, err, name)
	}
}

func TestReceipt(t *testing.T) {
	c, key := contract(t), newKey(t)
	r := example(key.Address(), 1)
	sig := sign(t, r, key, chainID)
	values, _ := accept(t, c, "check", Of(r), sig)
	if got, want := evm.Hash(values[0].([32]byte)), r.Hash(chainID); got != want {
		t.Fatalf("the contract's hash is %s, ours %s", got, want)
	}

	// Each single field, changed.
	good := Of(r)
	fields := 0
	for _, f := range reflect.VisibleFields(reflect.TypeFor[Receipt]()) {
		inner := []reflect.StructField{{}}
		if f.Type.Kind() == reflect.Struct {
			inner = reflect.VisibleFields(f.Type)
		}
		for _, in := range inner {
			bad := good
			v := reflect.ValueOf(&bad).Elem().FieldByIndex(append(f.Index, in.Index...))
			switch v.Kind() {
			case reflect.Uint64:
				v.SetUint(v.Uint() + 1)
			case reflect.Array:
				last := v.Index(v.Len() - 1)
				last.SetUint(last.Uint() ^ 1)
			default:
				t.Fatalf("a field of kind %s", v.Kind())
			}
			refuse(t, c, "BadSignature", f.Name+" "+in.Name, "check", bad, sig)
			fields++
		}
	}
	if fields != words {
		t.Fatalf("%d fields were changed, want %d", fields, words)
	}
	for i := range sig {
		bad := slices.Clone(sig)
		bad[i] ^= 1
		refuse(t, c, "BadSignature", "a changed signature", "check", good, bad)
	}
	twin := slices.Clone(sig) // the other signature that the curve allows
	new(big.Int).Sub(order, new(big.Int).SetBytes(sig[32:64])).FillBytes(twin[32:64])
	twin[64] ^= 27 ^ 28
	refuse(t, c, "BadSignature", "the signature's twin", "check", good, twin)
	refuse(t, c, "BadSignature", "v of 0 or 1", "check", good, append(slices.Clone(sig[:64]), sig[64]-27))
	refuse(t, c, "BadSignature", "a short signature", "check", good, sig[:64])
	refuse(t, c, "BadSignature", "a long signature", "check", good, append(slices.Clone(sig), 0))
	refuse(t, c, "BadSignature", "no signature", "check", good, []byte{})
	refuse(t, c, "BadSignature", "another chain's", "check", good, sign(t, r, key, chainID+1))
	nobody := good
	nobody.Node = evm.Address{}
	refuse(t, c, "BadSignature", "nobody's, with a signature that recovers to nobody", "check", nobody, make([]byte, 65))

	elsewhere, chain := *c, *c.cfg.ChainConfig
	chain.ChainID = big.NewInt(chainID + 1)
	elsewhere.cfg.ChainConfig = &chain
	refuse(t, &elsewhere, "BadSignature", "on another chain", "check", good, sig)

	// What the encoding has no room for is not cut off.
	data, err := c.Pack("check", good, sig)
	if err != nil {
		t.Fatal(err)
	}
	for name, at := range map[string]int{"job": 4 + 31, "node": 4 + 32, "sequence": 4 + (words-1)*32} {
		bad := slices.Clone(data)
		bad[at] ^= 1
		var r *Reverted
		if _, _, _, err := c.Send(bad); !errors.As(err, &r) {
			t.Errorf("bits outside of %s: %v", name, err)
		}
	}
}

func TestRecord(t *testing.T) {
	c, key := contract(t), newKey(t)
	r := example(key.Address(), 1)
	sig := sign(t, r, key, chainID)
	if _, events := accept(t, c, "record", Of(r), sig); !slices.Equal(events, []string{"ReceiptRecorded"}) {
		t.Errorf("events %v", events)
	}
	refuse(t, c, "AlreadyRecorded", "the same again", "record", Of(r), sig)
	other := r
	other.Claimed.CompletionTokens++
	refuse(t, c, "BadSignature", "another with its signature", "record", Of(other), sig)
	if _, events := accept(t, c, "record", Of(other), sign(t, other, key, chainID)); !slices.Equal(events, []string{"Contradiction"}) {
		t.Errorf("two receipts with one sequence: events %v", events)
	}
	values, _ := accept(t, c, "receipts", r.Node, r.Sequence)
	if got := evm.Hash(values[0].([32]byte)); got != r.Hash(chainID) {
		t.Errorf("recorded is %s, want the first one, %s", got, r.Hash(chainID))
	}
}

func TestHead(t *testing.T) {
	c, key := contract(t), newKey(t)
	const most = 21
	nodes, log := map[receiptlog.NodeID]evm.Hash{}, receiptlog.New()
	var digests []evm.Hash
	node := func(id receiptlog.NodeID) (evm.Hash, error) { return nodes[id], nil }
	signed := func(h receiptlog.Head, chain uint64) []byte {
		s, err := h.Sign(chain, key)
		if err != nil {
			t.Fatal(err)
		}
		return s.Signature[:]
	}
	var h receiptlog.Head
	for size := uint64(1); size <= most; size++ {
		r := example(key.Address(), size)
		digests = append(digests, r.Hash(chainID))
		log.Append(receiptlog.Leaf(digests[size-1]), func(id receiptlog.NodeID, x evm.Hash) { nodes[id] = x })
		h = receiptlog.Head{Node: key.Address(), Network: "testnet", Size: size, Root: log.Root(), Time: 1_800_000_000_000 + size}
		if _, events := accept(t, c, "recordHead", OfHead(h), signed(h, chainID)); !slices.Equal(events, []string{"HeadRecorded"}) {
			t.Fatalf("events %v", events)
		}
		for i := range size {
			p, err := receiptlog.Prove(i, size, node)
			if err != nil {
				t.Fatal(err)
			}
			in := func(digest evm.Hash, at uint64, path [][32]byte) bool {
				values, _, _, err := c.Call("included", key.Address(), evm.Keccak([]byte("testnet")), uint64(0), digest, at, path)
				if err != nil {
					t.Fatal(err)
				}
				return values[0].(bool)
			}
			path := make([][32]byte, len(p.Path))
			for j, x := range p.Path {
				path[j] = x
			}
			if !in(digests[i], i, path) {
				t.Errorf("receipt %d of %d is not in the log", i, size)
			}
			if in(evm.Keccak([]byte("other")), i, path) || in(digests[i], i, append(path, [32]byte{})) {
				t.Errorf("a wrong proof for receipt %d of %d is taken", i, size)
			}
			for other := range size + 2 {
				if other != i && in(digests[i], other, path) {
					t.Errorf("receipt %d of %d is also at %d", i, size, other)
				}
			}
			for j := range path {
				path[j][31] ^= 1
				if in(digests[i], i, path) {
					t.Errorf("a changed path for receipt %d of %d is taken", i, size)
				}
				path[j][31] ^= 1
			}
			if len(path) > 0 && in(digests[i], i, path[:len(path)-1]) {
				t.Errorf("a short path for receipt %d of %d is taken", i, size)
			}
		}
	}
	sig := signed(h, chainID)
	refuse(t, c, "AlreadyRecorded", "the same again", "recordHead", OfHead(h), sig)
	for i := range reflect.TypeFor[Head]().NumField() {
		bad := OfHead(h)
		switch f := reflect.ValueOf(&bad).Elem().Field(i); f.Kind() {
		case reflect.Uint64:
			f.SetUint(f.Uint() + 1)
		default:
			last := f.Index(f.Len() - 1)
			last.SetUint(last.Uint() ^ 1)
		}
		refuse(t, c, "BadSignature", reflect.TypeFor[Head]().Field(i).Name, "recordHead", bad, sig)
	}
	refuse(t, c, "BadSignature", "another chain's", "recordHead", OfHead(h), signed(h, chainID+1))
	elsewhere := h
	elsewhere.Network, elsewhere.Size = "mainnet", 1
	if _, events := accept(t, c, "recordHead", OfHead(elsewhere), signed(elsewhere, chainID)); !slices.Equal(events, []string{"HeadRecorded"}) {
		t.Errorf("the log of another network: events %v", events)
	}
	older := h
	older.Size--
	refuse(t, c, "Outdated", "a smaller log", "recordHead", OfHead(older), signed(older, chainID))
	fork := h
	fork.Root[0] ^= 1
	if _, events := accept(t, c, "recordHead", OfHead(fork), signed(fork, chainID)); !slices.Equal(events, []string{"Contradiction"}) {
		t.Errorf("another log of the same size: events %v", events)
	}
	anew := h
	anew.Era, anew.Size = 1_800_000_000_000, 1
	if _, events := accept(t, c, "recordHead", OfHead(anew), signed(anew, chainID)); !slices.Equal(events, []string{"HeadRecorded"}) {
		t.Errorf("a log that began anew: events %v", events)
	}
	timeless := h
	timeless.Network, timeless.Time = "othernet", 0 // the time is what the node likes
	if _, events := accept(t, c, "recordHead", OfHead(timeless), signed(timeless, chainID)); !slices.Equal(events, []string{"HeadRecorded"}) {
		t.Errorf("a log at no time: events %v", events)
	}
	timeless.Root[0] ^= 1
	if _, events := accept(t, c, "recordHead", OfHead(timeless), signed(timeless, chainID)); !slices.Equal(events, []string{"Contradiction"}) {
		t.Errorf("another log of the same size, both at no time: events %v", events)
	}
}
