package mirror

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/resultity/node/internal/evm"
	"github.com/resultity/node/internal/network/metrics"
	"github.com/resultity/node/internal/network/store"
	"github.com/resultity/node/internal/receipt"
	"github.com/resultity/node/internal/receiptlog"
	"github.com/resultity/node/internal/wire"
)

const (
	network   = "testnet"
	chain     = 31337
	heartbeat = 5 * time.Second
)

// disk keeps records as the store does: as JSON, and tiles by name.
type disk struct {
	mu    sync.Mutex
	fail  error
	reads int // one more than succeed before all fail; 0 for no end
	hangs bool
	puts  int
	logs  map[evm.Address][]byte
	ended map[string][]byte
	tiles map[string]tile
}

func newDisk() *disk {
	return &disk{logs: map[evm.Address][]byte{}, ended: map[string][]byte{}, tiles: map[string]tile{}}
}

func name(node evm.Address, level int, index uint64) string { return inEra(node, 0, level, index) }

func inEra(node evm.Address, era uint64, level int, index uint64) string {
	return fmt.Sprint(node, era, level, index)
}

func (d *disk) ReceiptLog(ctx context.Context, node evm.Address) (*store.ReceiptLog, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.hangs {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	if d.reads == 1 {
		return nil, errors.New("no answer")
	}
	d.reads = max(0, d.reads-1)
	raw, ok := d.logs[node]
	return parse(raw, ok)
}

func (d *disk) EndedReceiptLog(_ context.Context, node evm.Address, era uint64) (*store.ReceiptLog, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	raw, ok := d.ended[fmt.Sprint(node, era)]
	return parse(raw, ok)
}

func (d *disk) ResetReceiptLog(_ context.Context, node evm.Address, ended, anew *store.ReceiptLog) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.fail != nil {
		return d.fail
	}
	var errs [2]error
	if ended != nil {
		d.ended[fmt.Sprint(node, ended.Era())], errs[0] = json.Marshal(ended)
	}
	d.logs[node], errs[1] = json.Marshal(anew)
	return errors.Join(errs[:]...)
}

func parse(raw []byte, ok bool) (*store.ReceiptLog, error) {
	if !ok {
		return nil, store.ErrNotFound
	}
	l := new(store.ReceiptLog)
	if err := json.Unmarshal(raw, l); err != nil {
		return nil, fmt.Errorf("%w: %w", store.ErrDamaged, err)
	}
	return l, nil
}

func (d *disk) PutReceiptLog(_ context.Context, node evm.Address, l *store.ReceiptLog, full []store.Tile) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.fail != nil {
		return d.fail
	}
	for _, t := range full {
		d.tiles[inEra(node, l.Era(), t.Level, t.Index)] = tile{nil, t.Hashes, time.Now()}
	}
	raw, err := json.Marshal(l)
	d.logs[node] = raw
	d.puts++
	return err
}

func (d *disk) Tile(_ context.Context, node evm.Address, era uint64, level int, index uint64) ([]byte, time.Time, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	t, ok := d.tiles[inEra(node, era, level, index)]
	if !ok {
		return nil, time.Time{}, store.ErrNotFound
	}
	return t.hashes, t.at, nil
}

func (d *disk) MendTile(_ context.Context, node evm.Address, era uint64, t store.Tile, at time.Time) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.tiles[inEra(node, era, t.Level, t.Index)] = tile{nil, t.Hashes, at}
	return d.fail
}

func (d *disk) set(err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.fail = err
}

// change rewrites the record of a node.
func (d *disk) change(t *testing.T, node evm.Address, f func(*store.ReceiptLog)) {
	t.Helper()
	l, err := d.ReceiptLog(t.Context(), node)
	if err != nil {
		t.Fatal(err)
	}
	f(l)
	if d.logs[node], err = json.Marshal(l); err != nil {
		t.Fatal(err)
	}
}

// prover is a node with a log, and the network's mirror of it.
type prover struct {
	t    *testing.T
	key  *evm.Key
	disk *disk
	m    *Mirror
	s    *Session
	own  *evm.Key // the network's
	era  uint64
	log  *receiptlog.Log
	all  []evm.Hash
	made []time.Time // each of them

	mu   sync.Mutex
	acks []*wire.LeavesAck
	out  string
	over string // why the session has to begin again
}

func newProver(t *testing.T) *prover {
	key, err := evm.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	own, err := evm.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	p := &prover{t: t, key: key, own: own, disk: newDisk(), log: receiptlog.New()}
	p.restart()
	return p
}

// restart has another network service begin over the same disk.
func (p *prover) restart() {
	p.m = New(p.disk, func() Terms { return Terms{network, chain, heartbeat, 30 * time.Second} }, p.own, metrics.New(func() metrics.State { return metrics.State{} }),
		slog.New(slog.NewTextHandler(p.t.Output(), nil)), func(a evm.Address, why string) {
			if a != p.key.Address() {
				p.t.Errorf("%s is out", a)
			}
			p.mu.Lock()
			defer p.mu.Unlock()
			p.out = why
		})
	p.m.every = 0
}

// join begins a session and returns what the network says to it.
func (p *prover) join() (first *wire.LeavesAck, out string) {
	p.t.Helper()
	var err error
	p.acks = nil
	p.s, out, err = p.m.Join(p.t.Context(), p.key.Address(), func(a *wire.LeavesAck) {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.acks = append(p.acks, a)
	}, func(why string) { p.over = why })
	if err != nil {
		p.t.Fatal(err)
	}
	return p.last(), out
}

// told is how many times the network has said what it has.
func (p *prover) told() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.acks)
}

func (p *prover) last() *wire.LeavesAck {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.acks[len(p.acks)-1]
}

// hash is the EIP-712 hash of the i-th receipt.
func hash(i uint64) evm.Hash { return evm.Keccak(binary.BigEndian.AppendUint64(nil, i)) }

// grow adds n receipts to the node's log.
func (p *prover) grow(n int) {
	for range n {
		p.add(receiptlog.Leaf(hash(uint64(len(p.all)))))
	}
}

func (p *prover) add(leaf evm.Hash) {
	p.log.Append(leaf, nil)
	p.all = append(p.all, leaf)
	p.made = append(p.made, time.Now())
}

// edge is the log before a leaf.
func (p *prover) edge(n int) []evm.Hash {
	l := receiptlog.New()
	for _, leaf := range p.all[:n] {
		l.Append(leaf, nil)
	}
	return l.Hashes()
}

// send sends the leaves from a place on, as a node does.
func (p *prover) send(from int, edge []evm.Hash) {
	p.t.Helper()
	for from < len(p.all) {
		n := min(wire.MaxLeaves, len(p.all)-from)
		if _, err := p.leaves(from, p.all[from:from+n], edge); err != nil {
			p.t.Fatal(err)
		}
		from, edge = from+n, nil
	}
}

func (p *prover) leaves(from int, leaves, edge []evm.Hash) (news bool, err error) {
	return p.s.Leaves(&wire.Leaves{From: uint64(from), Leaves: leaves, Edge: edge})
}

// sign makes a head of the log.
func (p *prover) sign(change func(*receiptlog.Head)) *receiptlog.SignedHead {
	p.t.Helper()
	h := receiptlog.Head{Node: p.key.Address(), Network: network, Era: p.era, Size: p.log.Size(), Root: p.log.Root(), Time: uint64(time.Now().UnixMilli())}
	if change != nil {
		change(&h)
	}
	s, err := h.Sign(chain, p.key)
	if err != nil {
		p.t.Fatal(err)
	}
	return s
}

// beat sends a head and waits for what becomes of it.
func (p *prover) beat(h *receiptlog.SignedHead) {
	p.t.Helper()
	if err := p.s.Beat(h); err != nil {
		p.t.Fatal(err)
	}
	p.m.wg.Wait()
}

// sync brings the copy to where the log is.
func (p *prover) sync() {
	p.t.Helper()
	p.send(int(p.last().Size), nil)
	h := p.sign(nil)
	p.beat(h)
	if a := p.last(); a.Size != h.Size || a.Head == nil || *a.Head != *h {
		p.t.Fatalf("acknowledged %+v, want head %+v", a, h)
	}
}

// prove asks for the proof of a receipt and checks it as a client would.
func (p *prover) prove(i int) error {
	p.t.Helper()
	in, err := p.m.Prove(p.t.Context(), p.key.Address(), p.all[i], p.made[i])
	if err != nil {
		return err
	}
	if i%64 == 0 { // a signature takes its time
		raw, err := json.Marshal(in)
		if err != nil {
			p.t.Fatal(err)
		}
		if in, err = receiptlog.ParseInclusion(raw); err != nil {
			p.t.Fatal(err)
		}
	}
	if in.Index != uint64(i) || in.Head != *p.last().Head {
		p.t.Fatalf("proof of %d under head %+v", in.Index, in.Head)
	}
	return in.Check(p.key.Address(), chain, hash(uint64(i)))
}

func (p *prover) mustProve(list ...int) {
	p.t.Helper()
	for _, i := range list {
		if err := p.prove(i); err != nil {
			p.t.Errorf("receipt %d of %d: %v", i, len(p.all), err)
		}
	}
}

func is(t *testing.T, what string, got, want error) {
	t.Helper()
	if !errors.Is(got, want) {
		t.Errorf("%s: %v, want %v", what, got, want)
	}
}

// A log is copied as it grows, in batches of any size, over restarts of both, and
// each receipt in it is proven under the newest head.
func TestCopy(t *testing.T) {
	p := newProver(t)
	if a, out := p.join(); a.Size != 0 || a.Head != nil || len(a.Edge) != 0 || out != "" {
		t.Fatalf("a new node is told %+v, %q", a, out)
	}
	is(t, "before the first head", func() error { p.grow(1); return p.prove(0) }(), ErrPending)
	for i, n := range []int{0, 1, 2, 252, 1, 1, 255, 256, 300, 1024, 3000, 1} {
		p.grow(n)
		if i%3 == 0 {
			p.restart()
		}
		if i%3 == 0 || i%2 == 0 {
			p.join()
		}
		p.sync()
		last := len(p.all) - 1
		p.mustProve(0, last/3, last/2, max(0, last-1), last)
		is(t, "a receipt that comes next", func() error {
			_, err := p.m.Prove(t.Context(), p.key.Address(), receiptlog.Leaf(hash(uint64(last+1))), time.Now())
			return err
		}(), ErrPending)
	}
	for i := 0; i < len(p.all); i += 31 {
		p.mustProve(i)
	}
	if _, err := p.m.Prove(t.Context(), evm.Address{1}, p.all[7], time.Now()); !errors.Is(err, ErrPending) {
		t.Errorf("of a node without a log: %v", err)
	}
	puts := p.disk.puts
	p.beat(p.last().Head)
	p.beat(p.sign(nil)) // signed anew after a restart, say
	if p.disk.puts != puts {
		t.Error("a head that says nothing new was written down")
	}
}

// One level of tiles more than other tests have.
func TestLargeLog(t *testing.T) {
	p := newProver(t)
	p.join()
	p.grow(66_000)
	p.sync()
	p.mustProve(0, 255, 256, 65_535, 65_536, 65_999)
	p.grow(300)
	p.restart()
	p.join()
	p.sync()
	p.mustProve(0, 65_535, 65_536, 66_299)
	delete(p.disk.tiles, name(p.key.Address(), 0, 3)) // at the bound
	is(t, "a receipt whose tile has gone", p.prove(3*256), ErrPending)
	p.mustProve(2*256, 4*256)
}

// What a node must not say ends its session; what may come of a restart does not.
func TestHostileWords(t *testing.T) {
	p := newProver(t)
	p.join()
	p.grow(10)
	for what, f := range map[string]func() error{
		"a leaf of zeros":  func() error { _, err := p.leaves(0, make([]evm.Hash, 1), nil); return err },
		"another's edge":   func() error { _, err := p.leaves(5, p.all, p.edge(7)); return err },
		"an absurd size":   func() error { return p.s.Beat(p.sign(func(h *receiptlog.Head) { h.Size = 1 << 62 })) },
		"another network":  func() error { return p.s.Beat(p.sign(func(h *receiptlog.Head) { h.Network = "mainnet" })) },
		"a bent signature": func() error { h := p.sign(nil); h.Size--; return p.s.Beat(h) },
		"another chain": func() error {
			h, err := p.sign(nil).Head.Sign(chain+1, p.key)
			if err != nil {
				t.Fatal(err)
			}
			return p.s.Beat(h)
		},
		"another node": func() error {
			other := newProver(t)
			return p.s.Beat(other.sign(nil))
		},
		"leaves behind a gap":   func() error { p.join(); _, err := p.leaves(3, p.all[3:], nil); return err },
		"a head without leaves": func() error { p.join(); return p.s.Beat(p.sign(nil)) },
		"a head of more than came": func() error {
			p.join()
			if _, err := p.leaves(0, p.all[:9], nil); err != nil {
				t.Fatal(err)
			}
			return p.s.Beat(p.sign(nil))
		},
		"an edge later": func() error {
			p.join()
			if _, err := p.leaves(0, p.all[:2], nil); err != nil {
				t.Fatal(err)
			}
			_, err := p.leaves(5, p.all[5:], p.edge(5))
			return err
		},
		"a first head that is not of its leaves": func() error {
			p.join()
			p.send(0, nil)
			return p.s.Beat(p.sign(func(h *receiptlog.Head) { h.Root[3] ^= 1 }))
		},
	} {
		err := f()
		is(t, what, err, ErrInvalid)
		t.Logf("%s: expected: %v; got: %v", what, ErrInvalid, err)
	}
	p.m.wg.Wait()
	if p.disk.puts > 0 {
		t.Error("something of it was stored")
	}

	p.join()
	p.sync()
	if news, err := p.leaves(3, p.all[3:], nil); news || err != nil {
		t.Errorf("leaves that are there: %v, %v", news, err)
	}
	p.grow(5)
	if news, err := p.leaves(8, p.all[8:], nil); !news || err != nil {
		t.Errorf("leaves of which some are there: %v, %v", news, err)
	}
	p.beat(p.sign(nil))
	p.mustProve(9, 10, 14)

	// A flood without a head.
	flood := make([]evm.Hash, wire.MaxLeaves)
	for i := range flood {
		flood[i] = evm.Hash{1}
	}
	if maxUnsigned < wire.MaxPending {
		t.Errorf("%d leaves may wait, and a node may send %d before a head", maxUnsigned, wire.MaxPending)
	}
	for i := range maxUnsigned / wire.MaxLeaves {
		if _, err := p.leaves(15+i*wire.MaxLeaves, flood, nil); err != nil {
			t.Fatal(err)
		}
	}
	_, err := p.leaves(15+maxUnsigned, flood, nil)
	is(t, "a flood", err, ErrCrowded)
	t.Logf("a flood: expected: %v; got: %v", ErrCrowded, err)
	p.s.Leave()
	if p.m.unsigned.Load() != 0 {
		t.Errorf("%d leaves are kept of a node that has gone", p.m.unsigned.Load())
	}
	if len(p.m.copies) != 0 {
		t.Error("its copy is kept in memory")
	}
}

// A disk that does not answer is given up in time, and what it was to store is tried
// again.
func TestDiskHangs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newProver(t)
		p.join()
		p.grow(10)
		p.sync()
		p.grow(10)
		p.send(10, nil)
		h := p.sign(nil)
		p.disk.hangs = true
		begun := time.Now()
		p.beat(h)
		took := time.Since(begun)
		t.Logf("expected: given up after %v; got: after %v", opTimeout, took)
		if took != opTimeout || p.last().Size != 10 {
			t.Errorf("it took %v, want %v; %d leaves are stored", took, opTimeout, p.last().Size)
		}
		p.disk.hangs = false
		p.beat(h)
		p.mustProve(0, 19)
		p.s.Leave()
	})
}

// So many damaged tiles of a node wait to be mended; more are found again when they are
// asked for.
func TestBrokenTilesAreBounded(t *testing.T) {
	p := newProver(t)
	p.join()
	c := p.s.c
	c.mu.Lock()
	for i := range maxBroken + 2 {
		c.broke(&damagedTile{id: receiptlog.NodeID{Index: uint64(i)}})
		c.broke(&damagedTile{id: receiptlog.NodeID{Index: uint64(i)}}) // once more
		if n := len(c.broken); n != min(i+1, maxBroken) {
			t.Fatalf("%d wait after %d", n, i+1)
		}
	}
	t.Logf("%d tiles: expected: %d wait; got: %d", maxBroken+2, maxBroken, len(c.broken))
	c.settleTile(errors.New("gone"))
	c.broke(&damagedTile{id: receiptlog.NodeID{Index: maxBroken}})
	if n := len(c.broken); n != maxBroken || c.broken[n-1].id.Index != maxBroken {
		t.Errorf("%d wait once one is settled", n)
	}
	c.mu.Unlock()
	p.s.Leave()
}

// Others that have filled the room for leaves keep a node only from sending many, and
// that for a while: its session goes on, and it is told where to go on.
func TestNoRoom(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newProver(t)
		p.join()
		p.m.unsigned.Store(maxAllUnsigned + 1)
		for range 3 {
			p.grow(few)
			p.sync()
		}
		p.mustProve(0, 3*few-1)
		p.grow(few + 1)
		for range 3 {
			told := p.told()
			p.send(3*few, nil)
			p.beat(p.sign(nil))
			p.beat(p.sign(nil))
			if p.told() != told {
				t.Fatal("the node is told to go on at once")
			}
			time.Sleep(2 * deafFor)
			synctest.Wait()
			if a := p.last(); p.told() != told+1 || a.Size != 3*few {
				t.Fatalf("told %d times, %+v", p.told()-told, a)
			}
		}
		t.Logf("more than %d leaves without a head where others have filled the room: expected: not taken, %d receipts told; got: %d told", few, 3*few, p.last().Size)
		p.m.unsigned.Store(0)
		p.sync()
		p.mustProve(4 * few)
		p.s.Leave()
	})
}

// Leaves that nobody signs are not kept for long. A node that is so slow goes on
// in the same session.
func TestHoardedLeaves(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newProver(t)
		p.join()
		p.grow(3000)
		p.sync()
		time.Sleep(2 * unheaded)
		p.grow(3000)
		p.send(3000, nil)
		time.Sleep(unheaded / 2)
		if n := p.m.unsigned.Load(); n != 3000 {
			t.Fatalf("%d leaves are kept", n)
		}
		time.Sleep(unheaded)
		synctest.Wait()
		if n := p.m.unsigned.Load(); n != 0 {
			t.Fatalf("%d leaves are kept of a node that signs nothing", n)
		}
		told := p.told()
		for range 3 {
			if news, err := p.leaves(6000, []evm.Hash{{1}}, nil); news || err != nil {
				t.Fatalf("%v, %v", news, err)
			}
			time.Sleep(unheaded)
		}
		if p.told() != told {
			t.Error("the node is told to go on while its leaves are on their way")
		}
		p.beat(p.sign(nil))
		time.Sleep(2 * deafFor)
		synctest.Wait()
		p.sync()
		p.mustProve(5999)
		p.s.Leave()
	})
}

// One head a second is stored, whatever a node signs, and nothing is lost by that.
func TestManyHeads(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newProver(t)
		p.m.every = headEvery
		p.join()
		begun := time.Now()
		for i := range 500 {
			p.grow(1)
			if _, err := p.leaves(i, p.all[i:], nil); err != nil {
				t.Fatal(err)
			}
			if err := p.s.Beat(p.sign(nil)); err != nil {
				t.Fatal(err)
			}
			time.Sleep(10 * time.Millisecond)
		}
		p.m.wg.Wait()
		if a := p.last(); a.Size != 500 {
			t.Errorf("told %+v", a)
		}
		if most := int(time.Since(begun)/headEvery) + 1; p.disk.puts > most || p.disk.puts < most-1 {
			t.Errorf("%d heads are stored, want %d", p.disk.puts, most)
		}
		p.mustProve(0, 499)
		p.s.Leave()
	})
}

// A head says when it was signed, as the network's clock has it.
func TestHeadTimes(t *testing.T) {
	p := newProver(t)
	p.join()
	p.grow(1)
	p.send(0, nil)
	at := func(d time.Duration) *receiptlog.SignedHead {
		return p.sign(func(h *receiptlog.Head) { h.Time = uint64(time.Now().Add(d).UnixMilli()) })
	}
	is(t, "a head of tomorrow", p.s.Beat(at(24*time.Hour)), ErrInvalid)
	p.beat(at(25 * time.Second)) // its clock is ahead
	p.grow(1)
	p.send(1, nil)
	is(t, "a head of yesterday", p.s.Beat(at(-24*time.Hour)), ErrInvalid)
	p.beat(at(-25 * time.Second)) // and set right
	if a := p.last(); a.Size != 2 {
		t.Errorf("told %+v", a)
	}
	p.s.Leave()
}

// Two heads that cannot be of one log are kept, whatever the second one is, and the
// node is out in later sessions, too.
func TestContradiction(t *testing.T) {
	for what, second := range map[string]func(*prover) *receiptlog.SignedHead{
		"another log of the same size": func(p *prover) *receiptlog.SignedHead {
			return p.sign(func(h *receiptlog.Head) { h.Root[0] ^= 1 })
		},
		"another log that is shorter": func(p *prover) *receiptlog.SignedHead {
			return p.sign(func(h *receiptlog.Head) { h.Size, h.Root = 300, evm.Hash{2} })
		},
		"a longer log that is not the leaves'": func(p *prover) *receiptlog.SignedHead {
			p.grow(3)
			p.send(400, nil)
			return p.sign(func(h *receiptlog.Head) { h.Root[0] ^= 1 })
		},
		"a log with a receipt taken out": func(p *prover) *receiptlog.SignedHead {
			all := p.all
			p.log, p.all, p.made = receiptlog.New(), nil, nil
			for i, leaf := range all {
				if i != 17 {
					p.add(leaf)
				}
			}
			p.grow(4)
			p.send(int(p.last().Size), nil)
			return p.sign(nil)
		},
	} {
		t.Run(what, func(t *testing.T) {
			p := newProver(t)
			p.join()
			p.grow(400)
			p.sync()
			first := *p.last().Head
			bad := second(p)
			p.disk.set(errors.New("full"))
			p.beat(bad)
			if !strings.Contains(p.out, "does not go on") {
				t.Fatalf("the node is not out: %q", p.out)
			}
			t.Logf("expected: no jobs, both heads kept; got: %s", p.out)
			p.disk.set(nil)
			p.beat(nil) // what was not written down is tried again
			l, err := p.disk.ReceiptLog(t.Context(), p.key.Address())
			if err != nil || l.Conflict == nil || l.Conflict.First != first || l.Conflict.Second != *bad || *l.Head != first {
				t.Fatalf("kept is %+v, %v", l, err)
			}
			p.restart()
			if _, out := p.join(); out != p.out {
				t.Errorf("in the next session the node is out for %q", out)
			}
			p.grow(1)
			p.send(400, nil)
			p.beat(p.sign(nil))
			if a := p.last(); a.Size != 400 {
				t.Errorf("its log goes on: %+v", a)
			}
			if _, err := p.m.Prove(t.Context(), p.key.Address(), receiptlog.Leaf(hash(3)), time.Now()); err != nil {
				t.Errorf("what was in the log before cannot be proven: %v", err)
			}
		})
	}

	p := newProver(t)
	p.join()
	p.grow(300)
	p.sync()
	older := p.last().Head
	p.grow(300)
	p.sync()
	p.beat(older)
	if p.out != "" {
		t.Errorf("an older head of the same log is taken for another one: %s", p.out)
	}
}

// The network's operator has a log begin anew that contradicts itself. What was set
// aside is kept, what could be proven still can be, and the new log is as any other.
func TestReset(t *testing.T) {
	p := newProver(t)
	p.join()
	p.grow(400)
	p.sync()
	reset := func(reason string, force bool) (*store.Reset, error) {
		return p.m.Reset(t.Context(), p.key.Address(), "ann", reason, force)
	}
	_, err := reset("because", false)
	is(t, "a log that is whole", err, ErrWhole)
	first := *p.last().Head
	second := p.sign(func(h *receiptlog.Head) { h.Root[0] ^= 1 })
	p.beat(second)
	if _, err := reset(" \n", false); err == nil || p.out == "" {
		t.Fatalf("without a reason: %v, out for %q", err, p.out)
	}
	p.disk.set(errors.New("full"))
	if _, err := reset("two disks", false); err == nil {
		t.Error("nothing is written down, and it is said to be")
	}
	p.disk.set(nil)
	p.beat(nil)
	if _, out := p.join(); out == "" {
		t.Error("what was not written down has an effect")
	}
	p.over = ""
	r, err := reset("two disks", false)
	if err != nil {
		t.Fatal(err)
	}
	by, err := r.Verify()
	if err != nil || by != p.own.Address() || r.First == nil || *r.First != first || r.Second == nil || *r.Second != *second || r.Operator != "ann" || r.Reason != "two disks" || r.Before != 0 {
		t.Errorf("the word is %+v by %s, %v", r, by, err)
	}
	if p.out != "" || p.over == "" {
		t.Errorf("the node is out for %q, its session over for %q", p.out, p.over)
	}

	// What the node has now, of which the network has seen some.
	old := p.all
	p.log, p.all, p.made = receiptlog.New(), nil, nil
	for _, leaf := range old[300:] {
		p.add(leaf)
	}
	for i := range uint64(500) {
		p.add(receiptlog.Leaf(hash(1000 + i)))
	}
	for range 2 {
		a, out := p.join()
		if a.Size != 0 || a.Head != nil || out != "" || a.Reset == nil || a.Reset.Era != r.Era || a.Lost != nil {
			t.Fatalf("the node is told %+v, out for %q", a, out)
		}
		p.restart()
	}
	p.join()
	p.send(0, nil)
	is(t, "a head of the era before", p.s.Beat(p.sign(nil)), ErrInvalid)
	p.era = r.Era + 1
	is(t, "a head of another era", p.s.Beat(p.sign(nil)), ErrInvalid)
	p.era = r.Era
	p.beat(p.sign(nil))
	prove := func(leaf evm.Hash) *receiptlog.Inclusion {
		t.Helper()
		i, err := p.m.Prove(t.Context(), p.key.Address(), leaf, time.Now())
		if err != nil {
			t.Fatal(err)
		}
		raw, err := json.Marshal(i)
		if err != nil {
			t.Fatal(err)
		}
		if i, err = receiptlog.ParseInclusion(raw); err != nil {
			t.Fatal(err)
		}
		return i
	}
	if i := prove(old[5]); i.Head != first || i.Reset != nil {
		t.Errorf("what only the old log has is proven under %+v", i.Head)
	}
	for _, leaf := range []evm.Hash{old[300], p.all[0], p.all[599]} {
		if i := prove(leaf); i.Head.Era != r.Era || i.Reset == nil {
			t.Errorf("what the new log has is proven under %+v", i.Head)
		}
	}
	// And again, with the copy lost meanwhile.
	p.s.Leave()
	p.disk.change(t, p.key.Address(), func(l *store.ReceiptLog) { l.Edge[0][0] ^= 1 })
	a, _ := p.join()
	if a.Lost == nil || a.Lost.Size != 600 || a.Reset == nil {
		t.Fatalf("the node is told %+v", a)
	}
	again, err := reset("once more", false)
	if err != nil || again.Era <= r.Era || again.Before != r.Era || *again.First != *a.Lost || again.Second != nil {
		t.Fatalf("%+v, %v", again, err)
	}
	for range store.MaxResets - 2 {
		if _, err := reset("more", true); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := reset("more", true); err == nil {
		t.Error("a log begins anew without an end")
	}
	p.join()
	p.era = p.last().Reset.Era
	p.send(300, p.edge(300)) // a node with a long log has not all of it
	p.beat(p.sign(nil))
	if i := prove(p.all[300]); i.Head.Era != p.era || i.Reset == nil {
		t.Errorf("what the last log has is proven under %+v", i.Head)
	}
	if i := prove(old[5]); i.Head != first {
		t.Errorf("what only the first log has is proven under %+v", i.Head)
	}
	if l, err := p.disk.ReceiptLog(t.Context(), p.key.Address()); err != nil || len(l.Resets) != store.MaxResets || *l.Resets[0].Second != *second {
		t.Errorf("kept is %+v, %v", l, err)
	}
}

// A copy that was lost goes on with what the node still has, and must go on from the
// head that was there.
func TestLostCopy(t *testing.T) {
	for _, from := range []int{1, 3, 255, 256, 257, 300, 511, 512, 700, 1000} {
		p := newProver(t)
		p.join()
		p.grow(1000)
		p.sync()
		p.disk.logs, p.disk.tiles = map[evm.Address][]byte{}, map[string]tile{} // the whole disk
		p.restart()
		if a, _ := p.join(); a.Size != 0 {
			t.Fatalf("told %+v", a)
		}
		p.grow(900)
		p.send(from, p.edge(from))
		p.beat(p.sign(nil))
		for i := range p.all {
			if far := i < from-3 || i > from+3; far && i%31 > 0 {
				continue
			}
			switch err := p.prove(i); {
			case i < from && !errors.Is(err, ErrPending):
				t.Fatalf("from %d: receipt %d, before it: %v", from, i, err)
			case i >= from && err != nil:
				t.Fatalf("from %d: receipt %d: %v", from, i, err)
			}
		}
		p.restart()
		p.join()
		p.grow(600)
		p.sync()
		p.mustProve(from, 1000, 1899, 1900, 2499)
	}
}

func TestDamagedCopy(t *testing.T) {
	begin := func(t *testing.T, damage func(*store.ReceiptLog)) *prover {
		p := newProver(t)
		p.join()
		p.grow(700)
		p.sync()
		p.s.Leave()
		p.disk.change(t, p.key.Address(), damage)
		return p
	}
	for what, damage := range map[string]func(*store.ReceiptLog){
		"a leaf":       func(l *store.ReceiptLog) { l.Open[0][40] ^= 1 },
		"a subtree":    func(l *store.ReceiptLog) { l.Open[1][33] ^= 1 },
		"a leaf less":  func(l *store.ReceiptLog) { l.Open[0] = l.Open[0][:len(l.Open[0])-32] },
		"a level less": func(l *store.ReceiptLog) { l.Open = l.Open[:1] },
		"the edge":     func(l *store.ReceiptLog) { l.Edge[0][0] ^= 1 },
		"the head":     func(l *store.ReceiptLog) { l.Head.Size++ },
		"the root":     func(l *store.ReceiptLog) { l.Head.Root[0] ^= 1 },
		"the begin":    func(l *store.ReceiptLog) { l.From = 1 },
	} {
		t.Run(what, func(t *testing.T) {
			p := begin(t, damage)
			err := p.prove(690)
			t.Logf("expected: %s; got: %v", map[bool]string{true: "<nil>, since nothing is proven by it", false: store.ErrDamaged.Error()}[what == "the edge"], err)
			if err == nil && what != "the edge" {
				t.Error("a receipt is proven from it")
			}
			signed := what != "the head" && what != "the root"
			if a, _ := p.join(); a.Size != 0 || a.Head != nil {
				t.Fatalf("the node is told %+v", a)
			}
			p.grow(100)
			p.send(600, p.edge(600))
			p.beat(p.sign(nil))
			p.mustProve(600, 699, 799)
			l, err := p.disk.ReceiptLog(t.Context(), p.key.Address())
			if err != nil || l.Lost != nil {
				t.Errorf("the new copy goes on from the old head, and is said not to: %v, %v", l.Lost, err)
			}
			if !signed {
				return
			}
			// A node that uses the occasion to change its log is caught.
			p = begin(t, damage)
			p.join()
			p.all[650][0] ^= 1
			forked, err := receiptlog.Resume(600, p.edge(600))
			if err != nil {
				t.Fatal(err)
			}
			for _, leaf := range p.all[600:] {
				forked.Append(leaf, nil)
			}
			p.log = forked
			p.send(600, p.edge(600))
			p.beat(p.sign(nil))
			if p.out == "" {
				t.Error("a log that was changed where the copy was damaged is taken")
			}
		})
	}
	t.Run("while it runs", func(t *testing.T) {
		p := newProver(t)
		p.join()
		p.grow(700)
		p.sync()
		p.disk.change(t, p.key.Address(), func(l *store.ReceiptLog) { l.Open[0][40] ^= 1 })
		p.grow(10)
		p.send(700, nil)
		p.beat(p.sign(nil))
		if p.over == "" {
			t.Fatal("the session goes on")
		}
		t.Logf("expected: the session is ended; got: %s", p.over)
		if a, _ := p.join(); a.Size != 0 {
			t.Fatalf("the node is told %+v", a)
		}
		p.send(512, p.edge(512))
		p.beat(p.sign(nil))
		p.mustProve(512, 709)
	})
	t.Run("while it runs, and then cannot be read", func(t *testing.T) {
		p := newProver(t)
		p.join()
		p.grow(700)
		p.sync()
		p.disk.change(t, p.key.Address(), func(l *store.ReceiptLog) { l.Open[0][40] ^= 1 })
		p.disk.reads = 2
		p.grow(10)
		p.send(700, nil)
		p.beat(p.sign(nil))
		if p.over == "" {
			t.Fatal("the session goes on, and would end with a violation")
		}
		t.Logf("expected: the session is ended; got: %s", p.over)
		p.disk.reads = 0
		if a, _ := p.join(); a.Size != 0 {
			t.Fatalf("the node is told %+v", a)
		}
		p.send(512, p.edge(512))
		p.beat(p.sign(nil))
		p.mustProve(512, 709)
	})
	t.Run("a full tile", func(t *testing.T) {
		p := newProver(t)
		p.join()
		p.grow(700)
		p.sync()
		p.disk.tiles[name(p.key.Address(), 0, 1)].hashes[40] ^= 1
		for _, i := range []int{256, 257, 300} { // the second of them is the one that was changed
			err := p.prove(i)
			t.Logf("receipt %d: expected: %v; got: %v", i, store.ErrDamaged, err)
			if !errors.Is(err, store.ErrDamaged) {
				t.Errorf("receipt %d: %v", i, err)
			}
		}
		p.mustProve(255, 512)
		p.made[0], p.made[512] = time.Time{}, time.Now() // on both sides of it
		p.mustProve(0, 512)

		// The node is asked for its leaves, and what it sends is held against the tree.
		answer := func(leaves []evm.Hash) bool {
			t.Helper()
			if a := p.last(); a.Again == nil || *a.Again != 256 || a.Size != 700 {
				t.Fatalf("told %+v", a)
			}
			asked, err := p.s.Leaves(&wire.Leaves{From: 256, Leaves: leaves, Again: true})
			if err != nil {
				t.Fatal(err)
			}
			p.m.wg.Wait()
			return asked
		}
		changed := slices.Clone(p.all[256:512])
		changed[3][0] ^= 1
		if !answer(changed) {
			t.Error("the node was not asked")
		}
		is(t, "what cannot be mended", p.prove(300), store.ErrDamaged)
		p.join()
		is(t, "in the next session", p.prove(300), store.ErrDamaged)
		answer(nil)
		is(t, "what the node has no longer", p.prove(300), store.ErrDamaged)
		p.join()
		is(t, "in the next session", p.prove(300), store.ErrDamaged)
		answer(p.all[256:512])
		p.mustProve(256, 257, 300, 511, 512)
		if asked := answer(p.all[256:512]); asked {
			t.Error("leaves are taken that nobody has asked for")
		}
	})
	t.Run("two full tiles", func(t *testing.T) {
		p := newProver(t)
		p.join()
		p.grow(700)
		p.sync()
		for _, i := range []uint64{0, 1} {
			p.disk.tiles[name(p.key.Address(), 0, i)].hashes[40] ^= 1
			is(t, "a damaged tile", p.prove(int(256*i)), store.ErrDamaged)
		}
		for _, from := range []uint64{0, 256} { // one after the other, though nothing else happens
			if a := p.last(); a.Again == nil || *a.Again != from {
				t.Fatalf("told %+v", a)
			}
			if _, err := p.s.Leaves(&wire.Leaves{From: from, Leaves: p.all[from : from+256], Again: true}); err != nil {
				t.Fatal(err)
			}
			p.m.wg.Wait()
		}
		p.mustProve(0, 256)
		t.Log("expected: asked for again, and proven; got: both proven")
	})
	t.Run("a full tile, and then the copy", func(t *testing.T) {
		p := newProver(t)
		p.join()
		p.grow(700)
		p.sync()
		p.s.Result(evm.Hash{1}, receipt.JobID{1}) // so that the copy is not forgotten with the session
		p.disk.tiles[name(p.key.Address(), 0, 1)].hashes[40] ^= 1
		is(t, "a damaged tile", p.prove(300), store.ErrDamaged)
		p.disk.change(t, p.key.Address(), func(l *store.ReceiptLog) { l.Open[0][40] ^= 1 })
		p.grow(10)
		p.send(700, nil)
		p.beat(p.sign(nil))
		if p.over == "" {
			t.Fatal("the session goes on")
		}
		if a, _ := p.join(); a.Size != 0 || a.Again != nil {
			t.Fatalf("the node is told %+v, which no node takes", a)
		}
		t.Logf("expected: the session ends, and the copy begins anew; got: %s", p.over)
	})
	t.Run("a full tile above", func(t *testing.T) {
		p := newProver(t)
		p.join()
		p.grow(66_000)
		p.sync()
		above := p.disk.tiles[name(p.key.Address(), 1, 0)]
		before := above.at
		above.hashes[40] ^= 1
		if err := p.prove(3); !errors.Is(err, store.ErrDamaged) {
			t.Fatal(err)
		}
		p.m.wg.Wait()
		p.mustProve(3, 256, 65_535)
		if now := p.disk.tiles[name(p.key.Address(), 1, 0)]; now.at.Before(before) || now.at.After(before.Add(time.Minute)) {
			t.Errorf("it is said to be put at %v, was %v", now.at, before)
		}
		// Of what is damaged below, too, nothing can be made.
		above.hashes[40] ^= 1
		p.disk.tiles[name(p.key.Address(), 1, 0)].hashes[40] ^= 1
		p.disk.tiles[name(p.key.Address(), 0, 9)].hashes[40] ^= 1
		if err := p.prove(3); !errors.Is(err, store.ErrDamaged) {
			t.Fatal(err)
		}
		p.m.wg.Wait()
		is(t, "what cannot be made again", p.prove(3), store.ErrDamaged)
		t.Logf("expected: made again from the ones below, unless those are damaged, too; got: made again, and then %v", p.prove(3))
	})
	t.Run("a gap", func(t *testing.T) {
		p := newProver(t)
		p.join()
		p.grow(100)
		p.sync()
		lost := *p.last().Head
		p.grow(500)
		_, err := p.leaves(100, p.all[100:], p.edge(100))
		is(t, "an edge where there is no gap", err, ErrInvalid)
		p.join()
		p.send(400, p.edge(400))
		p.beat(p.sign(nil))
		p.mustProve(400, 599)
		if l, err := p.disk.ReceiptLog(t.Context(), p.key.Address()); err != nil || l.Lost == nil || *l.Lost != lost {
			t.Fatalf("the head before the gap is not kept: %+v, %v", l, err)
		} else {
			t.Logf("expected: the head before it is kept; got: that of %d receipts", l.Lost.Size)
		}
	})
}

// What cannot be written down is tried again with each heartbeat, and said not to
// be there meanwhile.
func TestFullDisk(t *testing.T) {
	p := newProver(t)
	p.join()
	p.grow(300)
	p.disk.set(errors.New("full"))
	p.send(0, nil)
	p.beat(p.sign(nil))
	p.beat(p.sign(nil))
	if a := p.last(); a.Size != 0 {
		t.Fatalf("told %+v", a)
	}
	p.grow(300)
	p.send(300, nil)
	p.disk.set(nil)
	h := p.sign(nil)
	p.beat(h)
	if a := p.last(); a.Size != 600 || *a.Head != *h {
		t.Fatalf("told %+v", a)
	}
	p.mustProve(0, 299, 300, 599)
}

// A session that was replaced says nothing any more.
func TestReplacedSession(t *testing.T) {
	p := newProver(t)
	p.join()
	old := p.s
	p.grow(10)
	p.join()
	if news, err := old.Leaves(&wire.Leaves{Leaves: p.all}); news || err != nil {
		t.Errorf("leaves of the old session: %v, %v", news, err)
	}
	if err := old.Beat(p.sign(nil)); err != nil {
		t.Error(err)
	}
	old.Result(evm.Hash{}, receipt.JobID{1})
	old.Leave()
	p.sync()
	p.mustProve(9)
}

// A node whose results wait shows their leaves long before the results come.
func TestResultsLongAfterTheirLeaves(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newProver(t)
		p.join()
		for range 4 {
			p.grow(3000)
			p.sync()
			time.Sleep(time.Hour)
		}
		p.s.Leave()
		time.Sleep(24 * time.Hour)
		p.join()
		p.s.Result(p.all[2000], receipt.JobID{1})
		p.s.Result(p.all[11_999], receipt.JobID{2})
		for range 3 {
			time.Sleep(heartbeat)
			p.beat(p.last().Head)
		}
		if got := p.m.States()[p.key.Address()]; got != (State{}) {
			t.Errorf("what is in the log is said not to be: %+v", got)
		}
		for i := range p.made {
			p.made[i] = time.Now()
		}
		p.mustProve(2000, 2047, 2048, 9000, 11_999)
	})
}

// Receipts that the network has are looked for in the log, in whichever order they
// and their leaves come.
func TestUnlogged(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newProver(t)
		p.join()
		p.grow(3)
		want := func(what string, want State) {
			t.Helper()
			got := p.m.States()[p.key.Address()]
			t.Logf("%s: expected: %+v; got: %+v", what, want, got)
			if got != want {
				t.Errorf("%s: %+v, want %+v", what, got, want)
			}
		}
		beats := func(n int) {
			for range n {
				time.Sleep(heartbeat)
				p.beat(p.last().Head)
			}
		}
		job := receipt.JobID{1}
		p.s.Result(p.all[0], job) // before its leaf
		want("a result", State{Waiting: 1})
		p.sync()
		want("its leaf", State{})
		p.s.Result(p.all[1], job)
		want("a result behind its leaf", State{Waiting: 1})
		beats(patience + 1)
		want("found in the log", State{})
		missing := evm.Hash{9}
		p.s.Result(missing, job)
		beats(patience)
		want("soon", State{Waiting: 1})
		beats(1)
		want("after its heartbeats", State{Waiting: 1, Overdue: 1})
		p.s.Leave()
		want("while it is away", State{Waiting: 1, Overdue: 1})
		p.join()
		want("when it is back", State{Waiting: 1})
		beats(patience + 1)
		want("as many heartbeats later", State{Waiting: 1, Overdue: 1})
		p.add(missing)
		p.sync()
		want("in the end", State{})

		p.s.Result(evm.Hash{8}, job)
		beats(2 * surrender)
		want("a log that does not grow", State{Waiting: 1, Overdue: 1})
		p.grow(300)
		p.sync()
		beats(1)
		want("one that goes on without a receipt", State{LeftOut: 1})
		p.grow(1)
		p.sync()
		p.restart()
		p.join()
		want("after a restart", State{LeftOut: 1})
		for i := range 2 * maxExpected {
			p.s.Result(hash(uint64(i)), job)
		}
		want("a flood", State{Waiting: maxExpected, LeftOut: 1})

		p.disk.set(errors.New("full"))
		p.grow(1)
		p.send(len(p.all)-1, nil)
		p.beat(p.sign(nil))
		beats(5)
		want("while the network cannot write", State{Waiting: maxExpected, LeftOut: 1})
	})
}
