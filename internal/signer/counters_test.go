package signer

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/resultity/node/internal/durable"
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

// A write that a power cut tears, or a disk damages, leaves counts that are behind
// whatever was signed, and nobody has to come. One byte is found again.
func TestDamagedSlot(t *testing.T) {
	name := filepath.Join(t.TempDir(), "counters")
	c := openCounters(t, name)
	for range 4 {
		next(t, func() (uint64, error) { return c.hello("testnet") })
	}
	sequence := next(t, func() (uint64, error) { return c.receipt(1) })
	next(t, func() (uint64, error) { return c.hello("testnet") })
	raw, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	size := int(slotHeader + binary.BigEndian.Uint32(raw[int(c.turn%2)*slotSize+8:]))
	for slot := range 2 {
		damages := map[string]func(b []byte){
			"zeros":     func(b []byte) { clear(b) },
			"half":      func(b []byte) { clear(b[40:]) },
			"two bytes": func(b []byte) { b[3]++; b[40]++ },
		}
		for at := rand.IntN(9); at < size; at += 1 + rand.IntN(17) {
			damages[fmt.Sprint("byte ", at)] = func(b []byte) { b[at] ^= byte(1 + rand.IntN(255)) }
		}
		for what, damage := range damages {
			b := bytes.Clone(raw)
			damage(b[slot*slotSize:][:slotSize])
			if err := os.WriteFile(name, b, 0o600); err != nil {
				t.Fatal(err)
			}
			for start := range 2 {
				c := openCounters(t, name)
				if start == 0 {
					if got := next(t, func() (uint64, error) { return c.receipt(1) }); got <= sequence {
						t.Fatalf("slot %d, %s: sequence %x, and %x was signed", slot, what, got, sequence)
					}
				}
				got := next(t, func() (uint64, error) { return c.hello("testnet") })
				want := uint64(6 + start)
				if !strings.HasPrefix(what, "byte") {
					want = epoch + 1 + uint64(start) // what was there may have been a takeover
				}
				if got != want {
					t.Fatalf("slot %d, %s, start %d: hello %d, want %d", slot, what, start, got, want)
				}
			}
		}
	}
}

// Whatever was written last: the counts that go on without it are behind it.
func TestDamagedLast(t *testing.T) {
	sign := func(c *Counters) uint64 { return next(t, func() (uint64, error) { return c.receipt(1) }) }
	for what, last := range map[string]func(c *Counters) error{
		"hello":    func(c *Counters) error { _, err := c.hello("testnet"); return err },
		"takeover": (*Counters).Takeover,
	} {
		for _, turn := range []uint64{2, 3} { // of the last write
			name := filepath.Join(t.TempDir(), "counters")
			c := openCounters(t, name)
			c.turn--
			before := c.now.clone()
			before.Starts, before.Networks["testnet"], before.Chains = 1000, 5, []uint64{1}
			for c.turn < turn-1 {
				if err := c.write(before); err != nil {
					t.Fatal(err)
				}
			}
			if err := last(c); err != nil {
				t.Fatal(err)
			}
			was, sequence := c.now.Networks["testnet"], sign(c)
			if _, err := c.file.WriteAt(make([]byte, 50), int64(c.turn%2)*slotSize); err != nil {
				t.Fatal(err)
			}
			c = openCounters(t, name)
			if got := sign(c); got <= sequence {
				t.Errorf("%s, write %d: sequence %x, and %x was signed", what, turn, got, sequence)
			}
			if got, err := c.hello("testnet"); err != nil || got <= was {
				t.Errorf("%s, write %d: hello %d, %v, and %d was signed", what, turn, got, err, was)
			}
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

// logsOf are a log whose leaves are the letters of a text, and every log on the way there.
func logsOf(leaves string) []*receiptlog.Log {
	l := receiptlog.New()
	logs := []*receiptlog.Log{l.Clone()}
	for _, b := range []byte(leaves) {
		l.Append(receiptlog.Leaf(evm.Keccak([]byte{b})), nil)
		logs = append(logs, l.Clone())
	}
	return logs
}

// path shows that a log of these leaves begins with its first from.
func path(t *testing.T, leaves string, from int) []evm.Hash {
	t.Helper()
	var more []evm.Hash
	for _, b := range []byte(leaves[from:]) {
		more = append(more, receiptlog.Leaf(evm.Keccak([]byte{b})))
	}
	p, err := logsOf(leaves)[from].Grow(more)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func headOf(network string, era uint64, leaves string) *receiptlog.Head {
	l := logsOf(leaves)[len(leaves)]
	return &receiptlog.Head{Node: node, Network: network, Era: era, Size: l.Size(), Root: l.Root()}
}

// The key states no smaller log than before, and no other one: not over restarts
// either, and not after a takeover, which whoever has the agent can ask for.
func TestHeadsNeverGoBack(t *testing.T) {
	name := filepath.Join(t.TempDir(), "counters")
	for i, want := range []struct {
		network string
		era     uint64
		leaves  string
		growth  Growth
		err     error
	}{
		{"testnet", 0, "", Growth{}, nil},
		{"testnet", 0, "abcde", Growth{}, nil},
		{"testnet", 0, "abcde", Growth{}, nil}, // again
		{"testnet", 0, "abcdX", Growth{}, ErrBehind},
		{"testnet", 0, "abcd", Growth{}, ErrBehind},
		{"mainnet", 0, "X", Growth{}, nil}, // a log of its own
		{"testnet", 0, "abcdef", Growth{}, ErrGrowth},
		{"testnet", 0, "abcdef", Growth{Path: make([]evm.Hash, 60)}, ErrGrowth},
		{"testnet", 0, "abcdef", Growth{Path: path(t, "abcdef", 4)}, ErrGrowth},
		{"testnet", 0, "abcdXf", Growth{Path: path(t, "abcdXf", 5)}, ErrGrowth},
		{"testnet", 0, "abcdef", Growth{Path: path(t, "abcdef", 5)}, nil},
		{"testnet", 0, "abcde", Growth{}, ErrBehind},
		{"testnet", 7, "xy", Growth{}, nil}, // the log begins anew
		{"testnet", 0, "abcdefg", Growth{Path: path(t, "abcdefg", 6)}, ErrBehind},
		{"testnet", 6, "xyz", Growth{Path: path(t, "xyz", 2)}, ErrBehind},
		{"testnet", 7, "x", Growth{}, ErrBehind},
		{"testnet", 7, "Xyz", Growth{Path: path(t, "Xyz", 2)}, ErrGrowth},
		{"testnet", 7, "xyz", Growth{Path: path(t, "xyz", 2)}, nil},
		{"testnet", 8, "", Growth{}, nil},
	} {
		c := openCounters(t, name)
		before, _, err := c.lastHead(want.network)
		if err != nil {
			t.Fatal(err)
		}
		h := headOf(want.network, want.era, want.leaves)
		if err := c.head(31337, h, want.growth); !errors.Is(err, want.err) {
			t.Errorf("%d: head of %q in %s, era %d: %v, want %v", i, want.leaves, want.network, want.era, err, want.err)
		}
		if want.err == nil {
			before = LogOf(h)
		}
		if err := c.Takeover(); err != nil {
			t.Fatal(err)
		}
		c = openCounters(t, name)
		if last, known, err := c.lastHead(want.network); err != nil || !known || last != before {
			t.Errorf("%d: the last head is %+v, %v, %v; want %+v", i, last, known, err, before)
		}
	}
	c := openCounters(t, name)
	if _, known, err := c.lastHead("elsewhere"); known || err != nil {
		t.Errorf("a network without a head: %v, %v", known, err)
	}
	if _, _, err := c.lastHead("../"); !errors.Is(err, ErrTerms) {
		t.Errorf("no network: %v", err)
	}
	larger := Counts{Heads: map[string]Log{"testnet": {Era: 1, Size: 9}}}
	for _, v := range []Counts{larger.Above(Counts{Heads: map[string]Log{"testnet": {Era: 1, Size: 8}}}), Counts{}.Above(larger), larger.Above(Counts{Heads: map[string]Log{"testnet": {Size: 10}}})} {
		if v.Heads["testnet"].Size != 9 {
			t.Errorf("merged counts have the head of %d receipts", v.Heads["testnet"].Size)
		}
	}
}

// Whatever whoever has the agent asks for, with proofs that are right for logs of
// his own: all that the key has signed of one era is one log that grew.
func TestHeadsNeverContradict(t *testing.T) {
	key, err := evm.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	rnd := rand.New(rand.NewPCG(3, 4))
	signed, refused := 0, 0
	for range 20 {
		l := NewLocal(key, nil)
		forks := []string{"abcdefghijklmnopqrstuvwxyz", "abcdefghXYZ0123456789", "abcdefghijklmnopqrsTUVW", "Z"}
		var last string // what the key has signed
		var all []*receiptlog.SignedHead
		for range 60 {
			f := forks[rnd.IntN(len(forks))]
			leaves := f[:rnd.IntN(len(f)+1)]
			if rnd.IntN(2) == 0 && len(last) < len(f) {
				leaves = f[:min(len(f), len(last)+rnd.IntN(3))]
			}
			var g Growth
			if from := len(last); rnd.IntN(4) > 0 && from <= len(leaves) {
				g.Path = path(t, leaves, from)
			} else if rnd.IntN(2) == 0 {
				g.Path = path(t, leaves, rnd.IntN(len(leaves)+1))
			}
			if len(g.Path) > 0 && rnd.IntN(10) == 0 {
				g.Path[rnd.IntN(len(g.Path))][rnd.IntN(32)] ^= 1
			}
			if len(all) > 0 && rnd.IntN(2) == 0 { // an older one, from which the path may even be right
				g.Since = all[rnd.IntN(len(all))]
				if from := int(g.Since.Size); from <= len(leaves) {
					g.Path = path(t, leaves, from)
				}
			}
			if rnd.IntN(10) == 0 {
				if err := l.Takeover(); err != nil {
					t.Fatal(err)
				}
			}
			h := headOf("testnet", 0, leaves)
			h.Node = key.Address()
			s, err := l.Head(31337, *h, g)
			if err != nil {
				refused++
				continue
			}
			signed++
			if !strings.HasPrefix(leaves, last) {
				t.Fatalf("signed %q behind %q", leaves, last)
			}
			last = leaves
			all = append(all, s)
		}
	}
	if signed < 100 || refused < 100 {
		t.Errorf("%d heads signed, %d refused: it says little", signed, refused)
	}
}

// A machine that was set back to an older state goes on from a head that its key has
// signed later, and from nobody else's.
func TestHeadSinceAnother(t *testing.T) {
	key, err := evm.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	other, err := evm.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	head := func(network, leaves string) receiptlog.Head {
		h := *headOf(network, 0, leaves)
		h.Node = key.Address()
		return h
	}
	sign := func(h receiptlog.Head, k *evm.Key) *receiptlog.SignedHead {
		h.Node = k.Address()
		s, err := h.Sign(31337, k)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	l := NewLocal(key, nil)
	if _, err := l.Head(31337, head("testnet", "ab"), Growth{}); err != nil {
		t.Fatal(err)
	}
	later := sign(head("testnet", "abcd"), key)
	forged, renamed := *later, sign(head("testnet", "abcd"), other)
	forged.Size++
	renamed.Node = key.Address()
	from4 := path(t, "abcdef", 4)
	for name, c := range map[string]struct {
		g   Growth
		err error
	}{
		"no path":               {Growth{Since: later}, ErrGrowth},
		"a path from elsewhere": {Growth{Path: path(t, "abcdef", 2), Since: later}, ErrGrowth},
		"another's head":        {Growth{Path: from4, Since: sign(head("testnet", "abcd"), other)}, ErrMalformed},
		"another's, renamed":    {Growth{Path: from4, Since: renamed}, ErrMalformed},
		"a changed head":        {Growth{Path: from4, Since: &forged}, ErrMalformed},
		"a head of another log": {Growth{Path: from4, Since: sign(head("mainnet", "abcd"), key)}, ErrMalformed},
		"a path without it":     {Growth{Path: from4}, ErrGrowth},
		"one that it knows of":  {Growth{Path: path(t, "abcdef", 1), Since: sign(head("testnet", "a"), key)}, ErrGrowth},
	} {
		if _, err := l.Head(31337, head("testnet", "abcdef"), c.g); !errors.Is(err, c.err) {
			t.Errorf("%s: %v, want %v", name, err, c.err)
		}
	}
	if _, err := l.Head(31337, head("testnet", "abc"), Growth{Path: path(t, "abc", 2), Since: later}); !errors.Is(err, ErrBehind) {
		t.Errorf("a head before it: %v", err)
	}
	if _, err := l.Head(31337, head("testnet", "abcdef"), Growth{Path: from4, Since: later}); err != nil {
		t.Error(err)
	}
	if _, err := l.Head(31337, receiptlog.Head{Node: key.Address(), Network: "testnet", Era: 1, Root: evm.Hash{1}}, Growth{}); !errors.Is(err, ErrMalformed) {
		t.Errorf("an empty log with a root of its own: %v", err)
	}
}

// Who has the agent for a while cannot have the key sign for an era behind all that a
// network can begin.
func TestEraAhead(t *testing.T) {
	key, err := evm.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	l := NewLocal(key, nil)
	head := func(at time.Time) error {
		_, err := l.Head(31337, receiptlog.Head{Node: key.Address(), Network: "testnet", Era: uint64(at.UnixMilli()), Size: 1}, Growth{})
		return err
	}
	now := time.Now()
	if err := head(now.AddDate(0, 0, 2)); !errors.Is(err, ErrMalformed) {
		t.Errorf("an era of the day after tomorrow: %v", err)
	}
	if err := head(now); err != nil {
		t.Errorf("an era that begins now: %v", err)
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
// Root reads the counters that the agent's account has written: what it has put there
// instead leads root nowhere, and holds nobody up.
func TestReadCounts(t *testing.T) {
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	c := openCounters(t, at("counters"))
	if err := errors.Join(os.Symlink(at("counters"), at("link")), syscall.Mkfifo(at("pipe"), 0o600), os.WriteFile(at("large"), nil, 0o600), os.Truncate(at("large"), 1<<40)); err != nil {
		t.Fatal(err)
	}
	if got, err := ReadCounts(at("counters")); err != nil || got.Node != node || got.Starts != c.Starts() {
		t.Errorf("%+v, %v", got, err)
	}
	for name, want := range map[string]error{"link": durable.ErrNotFile, "pipe": durable.ErrNotFile, "large": ErrCounters, "none": fs.ErrNotExist} {
		_, err := ReadCounts(at(name))
		t.Logf("%s in place of the counters: expected: %v; got: %v", name, want, err)
		if !errors.Is(err, want) {
			t.Errorf("%s: %v, want %v", name, err, want)
		}
	}
}

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
