package signer

import (
	"encoding/binary"
	"errors"
	"hash/crc32"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/resultity/node/internal/evm"
	"github.com/resultity/node/internal/receiptlog"
)

var node = evm.Address{1}

func openCounters(t *testing.T, name string) *Counters {
	t.Helper()
	c, err := OpenCounters(name, node)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

func next(t *testing.T, f func() (uint64, error)) uint64 {
	t.Helper()
	n, err := f()
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func TestCountersNeverGoBack(t *testing.T) {
	name := filepath.Join(t.TempDir(), "counters")
	var last uint64
	for start := range 5 {
		c := openCounters(t, name)
		for i := range 3 {
			if got := next(t, func() (uint64, error) { return c.hello("testnet") }); got != uint64(start*3+i+1) {
				t.Fatalf("hello %d, want %d", got, start*3+i+1)
			}
			got := next(t, func() (uint64, error) { return c.receipt(31337) })
			if got <= last || got&(1<<32-1) != uint64(i+1) {
				t.Fatalf("sequence %x after %x, receipt %d of its start", got, last, i+1)
			}
			t.Logf("start %d, receipt %d: expected: more than %x; got: %x", start+1, i+1, last, got)
			last = got
			if other := next(t, func() (uint64, error) { return c.receipt(1) }); other != got {
				t.Errorf("sequence %x on one chain and %x on the other: receipts are counted apart", got, other)
			}
		}
		if got := next(t, func() (uint64, error) { return c.hello("mainnet") }); got != uint64(start+1) {
			t.Errorf("hello %d of the other network, want %d", got, start+1)
		}
	}
}

// A write that a power cut tears leaves the counts before it.
func TestTornWrite(t *testing.T) {
	name := filepath.Join(t.TempDir(), "counters")
	c := openCounters(t, name)
	for range 4 {
		next(t, func() (uint64, error) { return c.hello("testnet") })
	}
	raw, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	slot := int(c.turn%2) * slotSize // the newest
	for _, at := range []int{0, 7, 8, 11, 12, 16, 30} {
		torn := append([]byte(nil), raw...)
		torn[slot+at] ^= 1
		if err := os.WriteFile(name, torn, 0o600); err != nil {
			t.Fatal(err)
		}
		if got := next(t, func() (uint64, error) { return openCounters(t, name).hello("testnet") }); got != 4 {
			t.Errorf("byte %d: hello %d, want that after the third", at, got)
		}
	}
}

func TestCountersRefused(t *testing.T) {
	for what, harm := range map[string]func(b []byte) []byte{
		"cut short": func(b []byte) []byte { return b[:len(b)-1] },
		"empty":     func([]byte) []byte { return nil },
		"longer":    func(b []byte) []byte { return append(b, 0) },
		"damaged": func(b []byte) []byte {
			b[20], b[slotSize+20] = b[20]^1, b[slotSize+20]^1
			return b
		},
	} {
		name := filepath.Join(t.TempDir(), "counters")
		c := openCounters(t, name)
		next(t, func() (uint64, error) { return c.hello("testnet") })
		raw, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, harm(raw), 0o600); err != nil {
			t.Fatal(err)
		}
		_, err = OpenCounters(name, node)
		t.Logf("%s: expected: %v; got: %v", what, ErrCounters, err)
		if !errors.Is(err, ErrCounters) {
			t.Errorf("%s: %v, want a refusal", what, err)
		}
	}
	name := filepath.Join(t.TempDir(), "counters")
	openCounters(t, name)
	_, err := OpenCounters(name, evm.Address{2})
	t.Logf("of another key: expected: %v; got: %v", ErrCounters, err)
	if !errors.Is(err, ErrCounters) || !strings.Contains(err.Error(), "belong to node") {
		t.Errorf("of another key: %v", err)
	}
}

// The key states no smaller log than before, nor another one of the same size,
// over restarts too; until whoever moves it on purpose says so.
func TestHeadsNeverGoBack(t *testing.T) {
	name := filepath.Join(t.TempDir(), "counters")
	c := openCounters(t, name)
	say := func(c *Counters, network string, size uint64, root string) error {
		return c.head(31337, &receiptlog.Head{Node: node, Network: network, Size: size, Root: evm.Keccak([]byte(root))})
	}
	for i, want := range []struct {
		network string
		size    uint64
		root    string
		err     error
	}{
		{"testnet", 0, "none", nil},
		{"testnet", 0, "other", ErrBehind},
		{"testnet", 5, "a", nil},
		{"testnet", 5, "a", nil}, // again
		{"testnet", 5, "b", ErrBehind},
		{"testnet", 4, "a", ErrBehind},
		{"mainnet", 1, "b", nil}, // a log of its own
		{"testnet", 6, "b", nil},
		{"testnet", 5, "a", ErrBehind},
	} {
		if err := say(c, want.network, want.size, want.root); !errors.Is(err, want.err) {
			t.Errorf("%d: head of %d in %s: %v, want %v", i, want.size, want.network, err, want.err)
		}
		c = openCounters(t, name)
	}
	anew := func(era, size uint64) error {
		return openCounters(t, name).head(31337, &receiptlog.Head{Node: node, Network: "testnet", Era: era, Size: size})
	}
	for i, want := range []struct {
		era, size uint64
		err       error
	}{{7, 2, nil}, {0, 7, ErrBehind}, {6, 9, ErrBehind}, {7, 1, ErrBehind}, {7, 3, nil}, {8, 0, nil}} {
		if err := anew(want.era, want.size); !errors.Is(err, want.err) {
			t.Errorf("%d: head of %d in era %d: %v, want %v", i, want.size, want.era, err, want.err)
		}
	}
	c = openCounters(t, name)
	if err := c.Takeover(); err != nil {
		t.Fatal(err)
	}
	if err := say(openCounters(t, name), "testnet", 1, "c"); err != nil {
		t.Errorf("after a takeover: %v", err)
	}
	larger := Counts{Heads: map[string]Log{"testnet": {Era: 1, Size: 9}}}
	for _, v := range []Counts{larger.Above(Counts{Heads: map[string]Log{"testnet": {Era: 1, Size: 8}}}), Counts{}.Above(larger), larger.Above(Counts{Heads: map[string]Log{"testnet": {Size: 10}}})} {
		if v.Heads["testnet"].Size != 9 {
			t.Errorf("merged counts have the head of %d receipts", v.Heads["testnet"].Size)
		}
	}
}

// Counts with all their bounds used have room in a slot.
func TestCountsFit(t *testing.T) {
	v := Counts{Node: node, Starts: 1<<64 - 1, Networks: map[string]uint64{}, Heads: map[string]Log{}}
	for i := range maxNetworks {
		name := strings.Repeat(string(rune('a'+i)), 64)
		v.Networks[name], v.Heads[name] = 1<<64-1, Log{253402300799999, receiptlog.MaxSize, evm.Keccak()}
	}
	for i := range maxChains {
		v.Chains = append(v.Chains, 1<<64-1-uint64(i))
	}
	if _, err := FormatCounts(v); err != nil {
		t.Error(err)
	}
}

// What was lost begins above what was.
func TestLostCounters(t *testing.T) {
	before := uint64(time.Now().Unix())
	c := openCounters(t, filepath.Join(t.TempDir(), "counters"))
	if got := next(t, func() (uint64, error) { return c.receipt(1) }) >> 32; got <= before {
		t.Errorf("start %d, want one after %d", got, before)
	}
}

func TestTakeover(t *testing.T) {
	name := filepath.Join(t.TempDir(), "counters")
	c := openCounters(t, name)
	next(t, func() (uint64, error) { return c.hello("testnet") })
	first := next(t, func() (uint64, error) { return c.receipt(1) })
	for i := range 2 {
		if err := c.Takeover(); err != nil {
			t.Fatal(err)
		}
		if got := next(t, func() (uint64, error) { return c.hello("testnet") }); got != uint64(i+1)*epoch+1 {
			t.Errorf("hello %d after takeover %d", got, i+1)
		}
		if got := next(t, func() (uint64, error) { return c.receipt(1) }); got <= first {
			t.Errorf("sequence %x after %x", got, first)
		}
	}
	if got := next(t, func() (uint64, error) { return openCounters(t, name).hello("testnet") }); got != 2*epoch+2 {
		t.Errorf("hello %d after a restart", got)
	}
}

func TestTerms(t *testing.T) {
	c := openCounters(t, filepath.Join(t.TempDir(), "counters"))
	for _, name := range []string{"", "A", "a b", "../x", strings.Repeat("x", 65)} {
		if _, err := c.hello(name); !errors.Is(err, ErrTerms) {
			t.Errorf("network %.20q: %v", name, err)
		}
	}
	for i := range maxNetworks + 1 {
		_, err := c.hello(strings.Repeat("n", 64-i))
		if want := i == maxNetworks; errors.Is(err, ErrTerms) != want {
			t.Errorf("network %d: %v", i, err)
		}
		_, err = c.receipt(1<<63 + uint64(i))
		if want := i == maxChains; errors.Is(err, ErrTerms) != want {
			t.Errorf("chain %d: %v", i, err)
		}
	}
}

// A count that is not written down is not used.
func TestCountersOnABadDisk(t *testing.T) {
	c := openCounters(t, filepath.Join(t.TempDir(), "counters"))
	next(t, func() (uint64, error) { return c.hello("testnet") })
	if err := c.file.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := c.hello("testnet"); err == nil || errors.Is(err, ErrTerms) {
		t.Errorf("hello with a count that nobody has written down: %v", err)
	}
	if c.now.Networks["testnet"] != 1 {
		t.Error("the count has risen all the same")
	}
}

// A slot that is taken is one that could have been written; anything else is none.
func FuzzSlot(f *testing.F) {
	f.Add(uint64(1), []byte(`{"start":3,"networks":{"testnet":7}}`))
	f.Add(uint64(1<<63), []byte(`{"networks":null}`))
	f.Add(uint64(0), []byte(`{}`))
	f.Fuzz(func(t *testing.T, turn uint64, body []byte) {
		raw := make([]byte, slotSize)
		copy(raw, body)
		parseSlot(raw) // it returns
		body = body[:min(len(body), slotSize-slotHeader)]
		b := make([]byte, slotSize)
		binary.BigEndian.PutUint64(b, turn)
		binary.BigEndian.PutUint32(b[8:], uint32(len(body)))
		copy(b[slotHeader:], body)
		binary.BigEndian.PutUint32(b[12:], crc32.ChecksumIEEE(append(b[:12:12], body...)))
		got, v, ok := parseSlot(b)
		if !ok {
			return
		}
		again, err := formatSlot(got, v)
		if err != nil || got != turn || turn == 0 {
			t.Fatalf("turn %d of %d, %v", got, turn, err)
		}
		if _, back, ok := parseSlot(again); !ok || !reflect.DeepEqual(back, v) {
			t.Fatalf("%+v became %+v", v, back)
		}
	})
}
