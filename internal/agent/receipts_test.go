package agent

import (
	"bytes"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/resultity/node/internal/deploy/deploytest"
	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/evm"
	"github.com/resultity/node/internal/journal"
	"github.com/resultity/node/internal/receipt"
	"github.com/resultity/node/internal/receiptlog"
	"github.com/resultity/node/internal/signer"
	"github.com/resultity/node/internal/snapshot"
	"github.com/resultity/node/internal/state"
	"github.com/resultity/node/internal/wire"
)

// archive is a network's copy of a receipt log. It objects to whatever the protocol
// does not allow.
type archive struct {
	t       *testing.T
	network string
	first   uint64 // index of leaves[0]
	base    *receiptlog.Log
	leaves  []evm.Hash
	stored  int // of leaves
	head    *receiptlog.SignedHead
	deaf    bool // heads are not stored
	got     int  // leaves that came since the session began
	beats   int  // heartbeats that came with a head
	reset   *receiptlog.SignedReset
	lost    *receiptlog.SignedHead
	again   []*wire.Leaves
}

func newArchive(t *testing.T, network string) *archive {
	return &archive{t: t, network: network, base: receiptlog.New()}
}

func (a *archive) at(n int) *receiptlog.Log {
	l := a.base.Clone()
	for _, leaf := range a.leaves[:n] {
		l.Append(leaf, nil)
	}
	return l
}

// say is what the network says that it has.
func (a *archive) say() *wire.LeavesAck {
	l := a.at(a.stored)
	said := &wire.LeavesAck{Size: l.Size(), Head: a.head, Edge: l.Hashes(), Reset: a.reset}
	if a.lost != nil && a.lost.Size > said.Size {
		said.Lost = a.lost
	}
	return said
}

// opens begins a session.
func (a *archive) opens(p *party) {
	p.drop()
	a.leaves, a.got, a.beats = a.leaves[:a.stored], 0, 0
	p.opened()
	p.Message(a.say())
	a.hears(p, 20*time.Second)
}

// hears has the network take what the node sends for a while, and answer.
func (a *archive) hears(p *party, d time.Duration) {
	a.t.Helper()
	for end := time.Now().Add(d); time.Now().Before(end); pass(100 * time.Millisecond) {
		for len(p.link.sent) > 0 {
			switch m := (<-p.link.sent).(type) {
			case *wire.Leaves:
				if m.Again {
					a.again = append(a.again, m)
					continue
				}
				if len(m.Edge) > 0 && a.stored == len(a.leaves) && m.From > a.at(a.stored).Size() {
					l, err := receiptlog.Resume(m.From, m.Edge)
					if err != nil {
						a.t.Fatal(err)
					}
					a.first, a.base, a.leaves, a.stored = m.From, l, nil, 0
				} else if len(m.Edge) > 0 {
					a.t.Errorf("an edge before %d", m.From)
				}
				if have := a.first + uint64(len(a.leaves)); m.From != have {
					a.t.Fatalf("leaves from %d on, and the network has %d", m.From, have)
				}
				a.leaves = append(a.leaves, m.Leaves...)
				a.got += len(m.Leaves)
			case *wire.Heartbeat:
				if m.Head == nil {
					continue
				}
				a.beats++
				l := a.at(len(a.leaves))
				era := uint64(0)
				if a.reset != nil {
					era = a.reset.Era
				}
				if m.Head.Era != era || m.Head.Network != a.network || m.Head.Size != l.Size() || m.Head.Root != l.Root() || m.Head.Verify() != nil || m.Head.Node != nodeKey.Address() {
					a.t.Fatalf("head %+v, and there are %d leaves, root %s; %v", m.Head, l.Size(), l.Root(), m.Head.Verify())
				}
				if a.head != nil && *m.Head == *a.head || a.deaf {
					continue
				}
				a.head, a.stored = m.Head, len(a.leaves)
				p.Message(a.say())
			}
		}
	}
}

// earn makes a receipt durable, as the worker would, and returns its leaf.
func (p *party) earn(t *testing.T, s *snapshot.Snapshot) evm.Hash {
	t.Helper()
	j := job(s)
	if _, err := p.store.Accept(j); err != nil {
		t.Fatal(err)
	}
	d := digest.Of([]byte("x"))
	signed, err := p.key.Receipt(s.Config().Network.ChainID, receipt.Receipt{
		Job: j.ID, Node: p.key.Address(),
		Measured: receipt.Measured{ConfigDigest: s.Digest(), ImageDigest: d, ModelDigest: d, SandboxDigest: p.inForce(), RequestHash: d, ResponseHash: d},
		Claimed:  receipt.Claimed{ClassDigest: receipt.Unknown},
	})
	if err != nil {
		t.Fatal(err)
	}
	r := &wire.Result{Job: j.ID, Response: []byte("x"), Receipt: &signed}
	if err := p.store.Finish(r); err != nil {
		t.Fatal(err)
	}
	if err := p.deliver(r); err != nil {
		t.Log(err) // it is in the store
	}
	return receiptlog.Leaf(signed.Hash())
}

// has checks what the network has in the end.
func (a *archive) has(leaves ...evm.Hash) {
	a.t.Helper()
	if !slices.Equal(a.leaves[:a.stored], leaves) {
		a.t.Errorf("the network has %d leaves from %d on, want %d, or others", a.stored, a.first, len(leaves))
	}
}

// logged runs a test with agents on one machine's disk after another.
func logged(t *testing.T, test func(t *testing.T, start func(dir string) (*fixture, *snapshot.Snapshot, func()), dirs []string)) {
	t.Helper()
	n, m, dirs := deploytest.NewNetwork(t), deploytest.New(t), []string{t.TempDir(), t.TempDir()}
	synctest.Test(t, func(t *testing.T) {
		s := n.Publish(nil)
		test(t, func(dir string) (*fixture, *snapshot.Snapshot, func()) {
			f := build(t, dir, m)
			f.tuf.serve(s, nil)
			stop := f.run()
			pass(5 * time.Second)
			return f, s, stop
		}, dirs)
	})
}

// The network gets every leaf once and in order, and a head for all of them; what
// it has already is not sent again, over sessions and restarts.
func TestReceiptLogIsShown(t *testing.T) {
	logged(t, func(t *testing.T, start func(string) (*fixture, *snapshot.Snapshot, func()), dirs []string) {
		a := newArchive(t, "testnet")
		f, s, stop := start(dirs[0])
		a.opens(f.party)
		if a.beats != 0 || f.status().ReceiptLog != nil {
			t.Errorf("%d heads of an empty log", a.beats)
		}
		var leaves []evm.Hash
		for range 3 {
			leaves = append(leaves, f.earn(t, s))
		}
		a.hears(f.party, 30*time.Second)
		a.has(leaves...)
		beats, first := a.beats, *a.head
		a.hears(f.party, time.Minute)
		if a.beats < beats+3 || *a.head != first || a.got != 3 {
			t.Errorf("%d heartbeats with a head in a minute, %d leaves", a.beats-beats, a.got)
		}
		if l := f.status().ReceiptLog; l == nil || l.Size != 3 || l.Acked != 3 || l.Root != first.Root.Hex() {
			t.Errorf("status %+v", l)
		}
		w := httptest.NewRecorder()
		f.Metrics().ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/metrics", nil))
		for _, want := range []string{`resultity_receipt_log_size{network="testnet"} 3`, `resultity_receipt_log_acknowledged{network="testnet"} 3`} {
			if !strings.Contains(w.Body.String(), want) {
				t.Errorf("metrics without %s", want)
			}
		}
		// Without a session, and in the next one.
		f.Closed(errBroken)
		leaves = append(leaves, f.earn(t, s), f.earn(t, s))
		pass(time.Minute)
		a.opens(f.party)
		a.has(leaves...)
		if a.got != 2 {
			t.Errorf("%d leaves, want the last two", a.got)
		}
		stop()
		f, _, stop = start(dirs[0])
		defer func() { stop() }()
		before := *a.head
		a.opens(f.party)
		if a.got != 0 || *a.head != before || a.beats == 0 {
			t.Errorf("after a restart %d leaves, %d heads, and a new one: %v", a.got, a.beats, *a.head != before)
		}
		leaves = append(leaves, f.earn(t, s))
		a.hears(f.party, 30*time.Second)
		a.has(leaves...)
		if n := f.book.count(journal.ReceiptLogRestored) + f.book.count(journal.ReceiptLogRefused) + f.book.count(journal.ReceiptLogBehind); n > 0 {
			t.Errorf("the operator is bothered:\n%s", f.book)
		}
	})
}

// A network that takes its time gets one head after the other, not all at once.
func TestReceiptLogWaits(t *testing.T) {
	logged(t, func(t *testing.T, start func(string) (*fixture, *snapshot.Snapshot, func()), dirs []string) {
		a := newArchive(t, "testnet")
		f, s, stop := start(dirs[0])
		defer stop()
		a.opens(f.party)
		leaves := []evm.Hash{f.earn(t, s)}
		a.deaf = true
		a.hears(f.party, 30*time.Second)
		for range 5 {
			leaves = append(leaves, f.earn(t, s))
			a.hears(f.party, 10*time.Second)
		}
		if a.got != 1 || a.beats < 4 {
			t.Errorf("%d leaves and %d heads for a network that stores none", a.got, a.beats)
		}
		// It has dropped them, and says so.
		f.party.drop() // what is on its way
		a.deaf, a.leaves = false, nil
		f.Message(a.say())
		a.hears(f.party, 10*time.Second)
		a.has(leaves...)
	})
}

// A node whose disk was replaced goes on from the network's copy, with what it has
// done since behind it.
func TestReceiptLogOfAReplacedDisk(t *testing.T) {
	logged(t, func(t *testing.T, start func(string) (*fixture, *snapshot.Snapshot, func()), dirs []string) {
		a := newArchive(t, "testnet")
		f, s, stop := start(dirs[0])
		a.opens(f.party)
		var leaves []evm.Hash
		for range 5 {
			leaves = append(leaves, f.earn(t, s))
		}
		a.hears(f.party, 30*time.Second)
		stop()

		f, _, stop = start(dirs[1])
		defer func() { stop() }()
		leaves = append(leaves, f.earn(t, s), f.earn(t, s)) // before the network can be reached
		a.opens(f.party)
		a.has(leaves...)
		leaves = append(leaves, f.earn(t, s))
		a.hears(f.party, 30*time.Second)
		a.has(leaves...)
		if a.got != 3 || f.book.count(journal.ReceiptLogRestored) != 1 {
			t.Errorf("%d leaves\n%s", a.got, f.book)
		}
		stop()
		// The old disk is put back: it has the first five, and two of its own since.
		f, _, stop = start(dirs[0])
		leaves = append(leaves, f.earn(t, s), f.earn(t, s))
		a.opens(f.party)
		a.has(leaves...)
		if a.got != 2 || f.book.count(journal.ReceiptLogRestored) != 1 {
			t.Errorf("%d leaves\n%s", a.got, f.book)
		}
	})
}

// A disk that has damaged the log beyond mending costs it nothing that the network has, and
// of the rest what is damaged; the network hears of no contradiction.
func TestReceiptLogOfADamagedDisk(t *testing.T) {
	for name, gone := range map[string]int{"known to the network": 1, "known to nobody else": 3} {
		t.Run(name, func(t *testing.T) {
			logged(t, func(t *testing.T, start func(string) (*fixture, *snapshot.Snapshot, func()), dirs []string) {
				a := newArchive(t, "testnet")
				f, s, stop := start(dirs[0])
				a.opens(f.party)
				leaves := []evm.Hash{f.earn(t, s), f.earn(t, s), f.earn(t, s)}
				a.hears(f.party, 30*time.Second)
				f.Closed(errBroken)
				leaves = append(leaves, f.earn(t, s), f.earn(t, s))
				stop()
				logs, err := filepath.Glob(filepath.Join(f.party.dir, "jobs/*.log"))
				if err != nil || len(logs) != 1 {
					t.Fatal(logs, err)
				}
				raw, err := os.ReadFile(logs[0])
				if err != nil {
					t.Fatal(err)
				}
				at := bytes.Index(raw, leaves[gone][:])
				clear(raw[at : at+100])
				if err := os.WriteFile(logs[0], raw, 0o600); err != nil {
					t.Fatal(err)
				}

				f, _, stop = start(dirs[0])
				defer func() { stop() }()
				if is := f.store.ReceiptLog(); is.Size != 4 {
					t.Errorf("the log has %d receipts, want those that are left", is.Size)
				}
				if d := f.status().Damage; d == nil || d.Receipts != 1 || d.Before == nil || len(d.Kept) != 1 {
					t.Errorf("status %+v", d)
				}
				w := httptest.NewRecorder()
				f.Metrics().ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/metrics", nil))
				if want := `resultity_store_damage{network="testnet",outcome="receipts lost"} 1`; !strings.Contains(w.Body.String(), want) {
					t.Errorf("metrics without %s", want)
				}
				if gone >= 3 {
					leaves = slices.Delete(leaves, gone, gone+1)
				}
				a.opens(f.party) // for so long that jobs are new ones
				a.has(leaves...)
				leaves = append(leaves, f.earn(t, s))
				a.hears(f.party, 30*time.Second)
				a.has(leaves...)
				if n := f.book.count(journal.ReceiptLogRefused) + f.book.count(journal.ReceiptLogBehind); n > 0 {
					t.Errorf("the operator is bothered:\n%s", f.book)
				}
				stop()
				f, _, stop = start(dirs[0])
				a.opens(f.party)
				a.has(leaves...)
				if d := f.status().Damage; d != nil {
					t.Errorf("after the next start: %+v", d)
				}
			})
		})
	}
}

// A network that has lost its copy gets what there is.
func TestReceiptLogOfAForgetfulNetwork(t *testing.T) {
	logged(t, func(t *testing.T, start func(string) (*fixture, *snapshot.Snapshot, func()), dirs []string) {
		a := newArchive(t, "testnet")
		f, s, stop := start(dirs[0])
		defer func() { stop() }()
		a.opens(f.party)
		var leaves []evm.Hash
		for range 4 {
			leaves = append(leaves, f.earn(t, s))
		}
		a.hears(f.party, 30*time.Second)
		old := *a
		leaves = append(leaves, f.earn(t, s))
		a.hears(f.party, 30*time.Second)
		for name, copy := range map[string]archive{"an older copy": old, "none": *newArchive(t, "testnet")} {
			f.Closed(errBroken)
			b := &copy
			b.leaves = slices.Clone(b.leaves)
			b.opens(f.party)
			b.has(leaves...)
			if f.book.count(journal.ReceiptLogRestored) > 0 {
				t.Errorf("%s: %s", name, f.book)
			}
		}
		// One whose disk was replaced meanwhile has only what came since.
		stop()
		f, _, stop = start(dirs[1])
		b := newArchive(t, "testnet")
		b.leaves, b.stored = leaves, len(leaves)
		l := b.at(len(leaves))
		h := receiptlog.Head{Node: nodeKey.Address(), Network: "testnet", Size: l.Size(), Root: l.Root()}
		var err error
		if b.head, err = h.Sign(31337, nodeKey); err != nil {
			t.Fatal(err)
		}
		b.opens(f.party)
		since := f.earn(t, s)
		b.hears(f.party, 30*time.Second)
		b.has(append(leaves, since)...)
		f.Closed(errBroken)
		c := newArchive(t, "testnet")
		c.opens(f.party)
		c.has(since)
		if c.first != uint64(len(leaves)) || c.at(1).Root() != b.at(len(leaves)+1).Root() {
			t.Errorf("the rest begins at %d, want %d, or leads to another root", c.first, len(leaves))
		}
	})
}

// What the network says of a log that is not this node's has no effect but to be
// told.
func TestReceiptLogIsNotTheNetworks(t *testing.T) {
	sign := func(l *receiptlog.Log, key *evm.Key, network string) *receiptlog.SignedHead {
		h := receiptlog.Head{Node: key.Address(), Network: network, Size: l.Size(), Root: l.Root()}
		signed, err := h.Sign(31337, key)
		if err != nil {
			t.Fatal(err)
		}
		return signed
	}
	other := receiptlog.New()
	for i := range 6 {
		other.Append(receiptlog.Leaf(evm.Hash{byte(i)}), nil)
	}
	bent := sign(other, nodeKey, "testnet")
	bent.Time++
	elsewhere := other.Hashes()
	elsewhere[0][3] ^= 1
	for name, said := range map[string]*wire.LeavesAck{
		"another node's head":     {Size: 6, Head: sign(other, newKey(), "testnet"), Edge: other.Hashes()},
		"another network's head":  {Size: 6, Head: sign(other, nodeKey, "mainnet"), Edge: other.Hashes()},
		"a changed head":          {Size: 6, Head: bent, Edge: other.Hashes()},
		"an edge of another log":  {Size: 6, Head: sign(other, nodeKey, "testnet"), Edge: elsewhere},
		"an edge of another size": {Size: 6, Head: sign(other, nodeKey, "testnet"), Edge: other.Hashes()[:1]},
	} {
		t.Run(name, func(t *testing.T) {
			logged(t, func(t *testing.T, start func(string) (*fixture, *snapshot.Snapshot, func()), dirs []string) {
				a := newArchive(t, "testnet")
				f, s, stop := start(dirs[0])
				defer stop()
				leaves := []evm.Hash{f.earn(t, s)}
				f.opened()
				f.Message(said)
				a.hears(f.party, time.Minute)
				if a.got != 0 || a.beats != 0 || f.book.count(journal.ReceiptLogRefused) != 1 {
					t.Errorf("%d leaves and %d heads\n%s", a.got, a.beats, f.book)
				}
				if is := f.store.ReceiptLog(); is.Size != 1 || is.Root != leaves[0] {
					t.Errorf("the log is %+v now", is)
				}
				// The next session is another one.
				f.Closed(errBroken)
				a.opens(f.party)
				a.has(leaves...)
			})
		})
	}
}

// A network takes nothing back by showing the node a log that an older state of its
// machine has signed.
func TestReceiptLogIsNotTakenBack(t *testing.T) {
	logged(t, func(t *testing.T, start func(string) (*fixture, *snapshot.Snapshot, func()), dirs []string) {
		a := newArchive(t, "testnet")
		f, s, stop := start(dirs[0])
		defer stop()
		a.opens(f.party)
		var leaves []evm.Hash
		for range 4 {
			leaves = append(leaves, f.earn(t, s))
		}
		a.hears(f.party, 30*time.Second)
		is := f.store.ReceiptLog()
		fork := newArchive(t, "testnet")
		fork.leaves, fork.stored = []evm.Hash{leaves[0], leaves[2], leaves[1], leaves[3]}, 4
		h := receiptlog.Head{Node: nodeKey.Address(), Network: "testnet", Size: 4, Root: fork.at(4).Root()}
		var err error
		if fork.head, err = h.Sign(31337, nodeKey); err != nil {
			t.Fatal(err)
		}
		f.Closed(errBroken)
		fork.opens(f.party)
		t.Logf("expected: %s once, and no head; got: %d times, %d heads", journal.ReceiptLogRefused.Name, f.book.count(journal.ReceiptLogRefused), fork.beats)
		if now := f.store.ReceiptLog(); now != is || fork.beats > 0 || f.book.count(journal.ReceiptLogRefused) != 1 {
			t.Errorf("log %+v, was %+v; %d heads\n%s", now, is, fork.beats, f.book)
		}
		f.Closed(errBroken)
		leaves = append(leaves, f.earn(t, s))
		a.opens(f.party)
		a.has(leaves...)
	})
}

// A node shows its log anew, and its key signs it, when the network's operator has set
// the one before aside: by the network's own word only.
func TestReceiptLogBeginsAnew(t *testing.T) {
	logged(t, func(t *testing.T, start func(string) (*fixture, *snapshot.Snapshot, func()), dirs []string) {
		a := newArchive(t, "testnet")
		f, s, stop := start(dirs[0])
		defer func() { stop() }()
		a.opens(f.party)
		leaves := []evm.Hash{f.earn(t, s), f.earn(t, s), f.earn(t, s)}
		a.hears(f.party, 30*time.Second)
		anew := func(key *evm.Key, change func(*receiptlog.Reset)) *archive {
			b := newArchive(t, "testnet")
			r := receiptlog.Reset{Node: nodeKey.Address(), Network: "testnet", Era: 1_000, First: a.head, Reason: "two disks were lost"}
			if change != nil {
				change(&r)
			}
			var err error
			if b.reset, err = r.Sign(31337, key); err != nil {
				t.Fatal(err)
			}
			return b
		}
		own := networkKey
		for what, b := range map[string]*archive{
			"somebody else's word":  anew(newKey(), nil),
			"about another node":    anew(own, func(r *receiptlog.Reset) { r.Node, r.First = newKey().Address(), nil }),
			"about another network": anew(own, func(r *receiptlog.Reset) { r.Network, r.First = "mainnet", nil }),
		} {
			f.Closed(errBroken)
			before := f.book.count(journal.ReceiptLogRefused)
			b.opens(f.party)
			if b.got != 0 || b.beats != 0 || f.book.count(journal.ReceiptLogRefused) != before+1 {
				t.Errorf("%s: %d leaves and %d heads\n%s", what, b.got, b.beats, f.book)
			}
			t.Logf("%s: expected: no head; got: %d heads", what, b.beats)
		}
		b := anew(own, nil)
		for range 2 {
			f.Closed(errBroken)
			b.opens(f.party)
			b.has(leaves...)
			leaves = append(leaves, f.earn(t, s))
			b.hears(f.party, 30*time.Second)
			b.has(leaves...)
		}
		if n := f.book.count(journal.ReceiptLogReset); n != 1 || f.book.count(journal.ReceiptLogRestored) > 0 {
			t.Errorf("it is said %d times\n%s", n, f.book)
		}
		if is := f.store.ReceiptLog(); is.Acked != uint64(len(leaves)) {
			t.Errorf("of %d receipts the network is thought to have %d", len(leaves), is.Acked)
		}
		// In the new era a replaced disk is what it was in the first.
		stop()
		f, _, stop = start(dirs[1])
		leaves = append(leaves, f.earn(t, s))
		b.opens(f.party)
		b.has(leaves...)
	})
}

// The network's first word of a session names the era, also where the node hears it
// together with a later one.
func TestReceiptLogEraIsHeard(t *testing.T) {
	logged(t, func(t *testing.T, start func(string) (*fixture, *snapshot.Snapshot, func()), dirs []string) {
		a := newArchive(t, "testnet")
		f, s, stop := start(dirs[0])
		defer stop()
		a.opens(f.party)
		leaves := []evm.Hash{f.earn(t, s)}
		a.hears(f.party, 30*time.Second)
		b := newArchive(t, "testnet")
		r := receiptlog.Reset{Node: nodeKey.Address(), Network: "testnet", Era: 1_000, First: a.head, Reason: "two disks were lost"}
		var err error
		if b.reset, err = r.Sign(31337, networkKey); err != nil {
			t.Fatal(err)
		}
		leaves = append(leaves, f.earn(t, s))
		a.hears(f.party, 100*time.Millisecond)
		leaves = append(leaves, f.earn(t, s))
		a.hears(f.party, 100*time.Millisecond) // the next head waits for a heartbeat's time
		f.Closed(errBroken)
		f.party.drop()
		f.opened()
		f.Message(b.say())
		later := b.say()
		later.Reset = nil
		f.Message(later)
		b.hears(f.party, 30*time.Second)
		b.has(leaves...)
	})
}

// A network that takes no head for so long that leaves are given up meanwhile gets
// what is there: the key has signed heads in time.
func TestReceiptLogOfALongSilence(t *testing.T) {
	most := state.DefaultBounds.Leaves
	state.DefaultBounds.Leaves = 64
	defer func() { state.DefaultBounds.Leaves = most }()
	logged(t, func(t *testing.T, start func(string) (*fixture, *snapshot.Snapshot, func()), dirs []string) {
		a := newArchive(t, "testnet")
		f, s, stop := start(dirs[0])
		defer stop()
		a.opens(f.party)
		for range 3 {
			f.earn(t, s)
		}
		a.hears(f.party, 30*time.Second)
		a.deaf = true
		var leaves []evm.Hash
		for range 100 {
			leaves = append(leaves, f.earn(t, s))
			a.hears(f.party, 100*time.Millisecond)
		}
		f.Closed(errBroken)
		for range 100 {
			leaves = append(leaves, f.earn(t, s))
			pass(100 * time.Millisecond)
		}
		a.deaf = false
		a.opens(f.party)
		a.has(leaves[len(leaves)-64:]...)
		if n := f.book.count(journal.ReceiptLogBehind); n > 0 {
			t.Errorf("the operator is bothered:\n%s", f.book)
		}
	})
}

// Leaves that the network has lost are shown again where they are still there.
func TestReceiptLogIsShownAgain(t *testing.T) {
	logged(t, func(t *testing.T, start func(string) (*fixture, *snapshot.Snapshot, func()), dirs []string) {
		a := newArchive(t, "testnet")
		f, s, stop := start(dirs[0])
		defer func() { stop() }()
		a.opens(f.party)
		var leaves []evm.Hash
		for range 520 {
			leaves = append(leaves, f.earn(t, s))
			a.hears(f.party, 100*time.Millisecond)
		}
		a.hears(f.party, 30*time.Second)
		a.has(leaves...)
		ask := func(from uint64) *wire.Leaves {
			t.Helper()
			a.again = nil
			said := a.say()
			said.Again = &from
			f.Message(said)
			a.hears(f.party, 10*time.Second)
			if len(a.again) != 1 || a.again[0].From != from {
				t.Fatalf("%d answers", len(a.again))
			}
			return a.again[0]
		}
		if got := ask(256); !slices.Equal(got.Leaves, leaves[256:512]) {
			t.Errorf("%d leaves, or others", len(got.Leaves))
		}
		stop()
		f, _, stop = start(dirs[1])
		a.opens(f.party)
		if got := ask(256); len(got.Leaves) != 0 {
			t.Errorf("%d leaves of a disk that was replaced", len(got.Leaves))
		}
		f.earn(t, s)
		a.hears(f.party, 30*time.Second)
		if a.stored != 521 {
			t.Errorf("the network has %d leaves", a.stored)
		}
	})
}

// Where node and network have both lost receipts, the key signs nothing that
// contradicts what it has signed; what only the network has lost is shown again.
func TestReceiptLogLostTwice(t *testing.T) {
	logged(t, func(t *testing.T, start func(string) (*fixture, *snapshot.Snapshot, func()), dirs []string) {
		a := newArchive(t, "testnet")
		f, s, stop := start(dirs[0])
		defer func() { stop() }()
		a.opens(f.party)
		leaves := []evm.Hash{f.earn(t, s), f.earn(t, s), f.earn(t, s)}
		a.hears(f.party, 30*time.Second)
		damaged := newArchive(t, "testnet")
		damaged.lost = a.head
		once := *damaged
		f.Closed(errBroken)
		once.opens(f.party)
		once.has(leaves...)
		stop()
		f, _, stop = start(dirs[1])
		twice := *damaged
		for range 5 { // fewer than there were, as many, more
			f.earn(t, s)
			f.Closed(errBroken)
			twice.opens(f.party)
		}
		if twice.got != 0 || twice.beats != 0 || f.book.count(journal.ReceiptLogLost) != 5 {
			t.Errorf("%d leaves and %d heads\n%s", twice.got, twice.beats, f.book)
		}
	})
}

// A key that has signed what nobody has any more signs nothing, since whatever it
// signed would be another log: the node works all the while.
func TestReceiptLogBehindItsKey(t *testing.T) {
	key := signer.NewLocal(nodeKey, nil)
	if _, err := key.Head(31337, receiptlog.Head{Node: nodeKey.Address(), Network: "testnet", Size: 3, Root: evm.Hash{1}}, signer.Growth{}); err != nil {
		t.Fatal(err)
	}
	logged(t, func(t *testing.T, start func(string) (*fixture, *snapshot.Snapshot, func()), dirs []string) {
		a := newArchive(t, "testnet")
		f, s, stop := start(dirs[0])
		defer stop()
		f.membership.key = key
		a.opens(f.party)
		for range 5 {
			f.earn(t, s)
			a.hears(f.party, 30*time.Second)
		}
		if a.got != 0 || a.beats != 0 || f.book.count(journal.ReceiptLogBehind) != 1 {
			t.Errorf("%d leaves and %d heads\n%s", a.got, a.beats, f.book)
		}
	})
}

// losing is a key whose signature is lost on its way, as with a kill.
type losing struct {
	signer.Signer
	lost int
}

func (l *losing) Head(chain uint64, h receiptlog.Head, g signer.Growth) (*receiptlog.SignedHead, error) {
	s, err := l.Signer.Head(chain, h, g)
	if err == nil && l.lost > 0 {
		l.lost--
		return nil, errBroken
	}
	return s, err
}

// The key may have signed a head that the agent has never seen; and it may have been
// set back to an older state, so that it does not know of one that the network has.
func TestReceiptLogGrowsFromTheKeysLastHead(t *testing.T) {
	logged(t, func(t *testing.T, start func(string) (*fixture, *snapshot.Snapshot, func()), dirs []string) {
		key := &losing{signer.NewLocal(nodeKey, nil), 0}
		a := newArchive(t, "testnet")
		var leaves []evm.Hash
		for round := range 4 {
			f, s, stop := start(dirs[0])
			f.membership.key = key
			a.opens(f.party)
			for range 3 + round {
				leaves = append(leaves, f.earn(t, s))
				a.hears(f.party, 30*time.Second)
			}
			a.has(leaves...)
			key.lost = 1
			leaves = append(leaves, f.earn(t, s))
			for range 60 {
				if a.hears(f.party, time.Second); key.lost == 0 {
					break
				}
			}
			if key.lost > 0 {
				t.Fatal("no head was asked for")
			}
			if round == 2 {
				key = &losing{signer.NewLocal(nodeKey, nil), 0}
			}
			if n := f.book.count(journal.ReceiptLogBehind); n > 0 {
				t.Errorf("round %d: it is behind\n%s", round, f.book)
			}
			stop()
		}
		f, s, stop := start(dirs[1]) // a new disk, and a key that knows of less
		defer stop()
		a.hears(f.party, time.Second)
		f.membership.key = signer.NewLocal(nodeKey, nil)
		l := a.at(2)
		was := receiptlog.Head{Node: nodeKey.Address(), Network: a.network, Size: l.Size(), Root: l.Root()}
		if _, err := f.membership.key.Head(31337, was, signer.Growth{}); err != nil {
			t.Fatal(err)
		}
		before := a.stored
		a.opens(f.party)
		leaf := f.earn(t, s)
		a.hears(f.party, 30*time.Second)
		if a.stored != before+1 || a.leaves[before] != leaf {
			t.Errorf("the network has %d leaves, had %d\n%s", a.stored, before, f.book)
		}
	})
}

// Each network has a log of its own.
func TestTwoNetworksHaveTwoLogs(t *testing.T) {
	inTwo(t, nil, func(t *testing.T, w *duo, sa, sb *snapshot.Snapshot) {
		a, b := newArchive(t, "mainnet"), newArchive(t, "testnet")
		a.opens(w.a)
		b.opens(w.b)
		ofA := []evm.Hash{w.a.earn(t, sa), w.a.earn(t, sa)}
		ofB := []evm.Hash{w.b.earn(t, sb)}
		a.hears(w.a, 30*time.Second)
		b.hears(w.b, 30*time.Second)
		a.has(ofA...)
		b.has(ofB...)
		if a.head.ChainID != 1 || b.head.ChainID != 31337 {
			t.Errorf("heads for chains %d and %d", a.head.ChainID, b.head.ChainID)
		}
	})
}
