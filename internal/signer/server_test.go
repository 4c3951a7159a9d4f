package signer

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/resultity/node/internal/bridge/contract"
	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/evm"
	"github.com/resultity/node/internal/journal"
	"github.com/resultity/node/internal/receipt"
	"github.com/resultity/node/internal/receiptlog"
	"github.com/resultity/node/internal/sandbox/record"
	"github.com/resultity/node/internal/wire"
)

// service is a signer on a socket of its own.
type service struct {
	t    testing.TB
	dir  string
	key  *evm.Key
	log  bytes.Buffer
	uids func(uint32) bool
	stop func()
}

func newService(t testing.TB) *service {
	t.Helper()
	key, err := evm.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("", "s") // a socket's name is short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	s := &service{t: t, dir: dir, key: key, uids: func(uid uint32) bool { return uid == uint32(os.Getuid()) }, stop: func() {}}
	t.Cleanup(func() { s.stop() })
	return s
}

func (s *service) socket() string { return filepath.Join(s.dir, "socket") }

func (s *service) start() {
	s.t.Helper()
	c, err := OpenCounters(filepath.Join(s.dir, "counters"), s.key.Address())
	if err != nil {
		s.t.Fatal(err)
	}
	_ = os.Remove(s.socket())
	ln, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: s.socket(), Net: "unixpacket"})
	if err != nil {
		s.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		srv := &Server{Local: NewLocal(s.key, c), Serves: s.uids, Log: slog.New(journal.Text(&s.log, slog.LevelInfo))}
		if err := srv.Serve(ctx, ln); err != nil {
			s.t.Error(err)
		}
	})
	s.stop = func() {
		cancel()
		wg.Wait()
		_ = c.Close()
		s.stop = func() {}
	}
}

func (s *service) client() *Client {
	s.t.Helper()
	c, err := dial(s.socket(), 2*time.Minute)
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { _ = c.Close() })
	return c
}

func (s *service) receipt() receipt.Receipt { return stated(s.key.Address()) }

func stated(node evm.Address) receipt.Receipt {
	d := digest.Of([]byte("x"))
	return receipt.Receipt{
		Job: receipt.NewJobID(), Node: node,
		Measured: receipt.Measured{
			ConfigDigest: d, ImageDigest: digest.Of([]byte("i")), ModelDigest: digest.Of([]byte("m")), SandboxDigest: digest.Of([]byte("s")),
			RequestHash: digest.Of([]byte("q")), ResponseHash: digest.Of([]byte("r")),
		},
		Claimed: receipt.Claimed{ClassDigest: digest.Of([]byte("c")), PromptTokens: 1, CompletionTokens: 2, StartedAt: 3, FinishedAt: 4},
	}
}

func sandboxRecord(node evm.Address) *record.Record {
	return &record.Record{
		Version: record.Version, Node: node, Network: "testnet", Time: 1, Start: strings.Repeat("a", 32), Config: digest.Of([]byte("c")), Image: digest.Of([]byte("i")),
		Views: record.Views{Inside: contract.Sandbox{Version: contract.Version, OK: true, Checks: []contract.Check{{Name: "x", OK: true}}, Label: strings.Repeat("x", maxOther)}},
	}
}

// encoded is a request for a record's signature.
func encoded(t *testing.T, r *record.Record) []byte {
	t.Helper()
	b, err := r.Encode()
	if err != nil {
		t.Fatal(err)
	}
	return append([]byte{byte(kindSandbox)}, b...)
}

// What the client makes is what the key itself would have made.
func TestEveryStatement(t *testing.T) {
	s := newService(t)
	s.start()
	c := s.client()
	if c.Address() != s.key.Address() {
		t.Fatalf("address %s, want %s", c.Address(), s.key.Address())
	}

	r := s.receipt()
	signed, err := c.Receipt(31337, r)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := json.Marshal(signed)
	if err != nil {
		t.Fatal(err)
	}
	back, err := receipt.Verify(raw)
	if err != nil {
		t.Fatal(err)
	}
	got := back.Receipt()
	if got.Sequence == 0 || back.ChainID() != 31337 {
		t.Errorf("sequence %d, chain %d", got.Sequence, back.ChainID())
	}
	got.Sequence = 0
	if got != r {
		t.Errorf("signed %+v, want %+v", got, r)
	}

	look := sandboxRecord(s.key.Address())
	sealed, err := c.Sandbox(look)
	if err != nil {
		t.Fatal(err)
	}
	if raw, err = json.Marshal(sealed); err != nil {
		t.Fatal(err)
	}
	if again, err := record.Open(raw); err != nil || !reflect.DeepEqual(again.Record(), look) {
		t.Errorf("signed %+v (%v), want %+v", again, err, look)
	}

	own, theirs := wire.NewSecret(), wire.NewSecret()
	agreed, err := theirs.Agree("testnet", s.key.Address(), own.Public(), theirs.Public())
	if err != nil {
		t.Fatal(err)
	}
	for count := range uint64(3) {
		frame, err := c.Hello(agreed.Terms(), wire.Hello{Agent: "v1", Config: r.Measured.ConfigDigest, Count: 77}, time.Now())
		if err != nil {
			t.Fatal(err)
		}
		m, err := wire.NewOpener(func(a evm.Address) bool { return a == s.key.Address() }, agreed, wire.ToNetwork, time.Minute).Open(frame, time.Now())
		if h, ok := m.(*wire.Hello); err != nil || !ok || *h != (wire.Hello{Agent: "v1", Config: r.Measured.ConfigDigest, Count: count + 1}) {
			t.Fatalf("hello %+v, %v", m, err)
		}
	}

	reg := wire.Registration{Network: "testnet", Node: s.key.Address(), Token: "t", Time: 5, Agent: "v1"}
	var opened wire.Registration
	body, err := c.Registration(&reg)
	if err != nil {
		t.Fatal(err)
	}
	if who, err := wire.OpenRegistration(body, &opened); err != nil || who != s.key.Address() || opened != reg {
		t.Errorf("registration %+v by %s, %v", opened, who, err)
	}
	bind := wire.BindRequest{Network: "testnet", Node: s.key.Address(), Step: wire.BindCode, Code: "1"}
	var bound wire.BindRequest
	if body, err = c.Binding(&bind); err != nil {
		t.Fatal(err)
	}
	if who, err := wire.OpenBinding(body, &bound); err != nil || who != s.key.Address() || bound != bind {
		t.Errorf("binding %+v by %s, %v", bound, who, err)
	}
	batch := wire.LogBatch{Network: "testnet", Node: s.key.Address(), Spool: strings.Repeat("0", 32), Last: 1, Count: 1}
	logs, err := c.Logs(batch, []byte("data"))
	if err != nil {
		t.Fatal(err)
	}
	if b, who, err := logs.Open(); err != nil || who != s.key.Address() || b.Last != 1 {
		t.Errorf("logs %+v by %s, %v", b, who, err)
	}
	head := receiptlog.Head{Node: s.key.Address(), Network: "testnet", Size: 7, Root: evm.Keccak([]byte("root")), Time: 5}
	if last, known, err := c.LastHead("testnet"); known || err != nil {
		t.Errorf("last head %+v, %v, %v", last, known, err)
	}
	h, err := c.Head(31337, head, Growth{})
	if err != nil {
		t.Fatal(err)
	}
	if last, known, err := c.LastHead("testnet"); !known || err != nil || last != LogOf(&head) {
		t.Errorf("last head %+v, %v, %v", last, known, err)
	}
	if err := h.Verify(); err != nil || h.Head != head || h.ChainID != 31337 {
		t.Errorf("head %+v, %v", h, err)
	}
	head.Size--
	if _, err := c.Head(31337, head, Growth{}); !errors.Is(err, ErrBehind) {
		t.Errorf("a head of a smaller log: %v", err)
	}
	first := headOf("mainnet", 0, "abc")
	first.Node = s.key.Address()
	if _, err := c.Head(31337, *first, Growth{}); err != nil {
		t.Error(err)
	}
	more := headOf("mainnet", 0, "abcdefgh")
	more.Node = s.key.Address()
	if _, err := c.Head(31337, *more, Growth{Path: path(t, "abcdefgh", 3)}); err != nil {
		t.Errorf("a log that has grown: %v", err)
	}
	if err := c.Takeover(); err != nil {
		t.Error(err)
	}
	s.stop()
	if log := s.log.String(); !strings.Contains(log, "is not signed") || strings.Contains(log, "signature-refused") {
		t.Errorf("of a node whose disk was replaced it says: %s", log)
	}
}

// raw is a caller that says what it likes.
func (s *service) raw(packets ...[]byte) (replies [][]byte, err error) {
	s.t.Helper()
	c, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: s.socket(), Net: "unixpacket"})
	if err != nil {
		return nil, err
	}
	defer c.Close()
	if _, err := c.Read(make([]byte, maxReply)); err != nil { // the address
		return nil, err
	}
	for _, p := range packets {
		_ = c.SetDeadline(time.Now().Add(2 * time.Minute))
		if _, err := c.Write(p); err != nil {
			return replies, err
		}
		b := make([]byte, maxReply)
		n, err := c.Read(b)
		if err != nil {
			return replies, err
		}
		replies = append(replies, b[:n])
	}
	return replies, nil
}

func TestRefusals(t *testing.T) {
	s := newService(t)
	s.start()
	other := evm.Address{9}
	enc := func(k kind, v any) []byte {
		b, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		return append([]byte{byte(k)}, b...)
	}
	rc := func(change func(*receipt.Receipt)) []byte {
		r := s.receipt()
		change(&r)
		return encodeReceipt([]byte{byte(kindReceipt)}, 1, &r)
	}
	good := rc(func(*receipt.Receipt) {})
	key := wire.NewSecret().Public().String()
	hello := helloRequest{Network: "testnet", OfNode: key, OfNetwork: wire.NewSecret().Public().String()}
	with := func(change func(*helloRequest)) []byte {
		h := hello
		change(&h)
		return enc(kindHello, h)
	}
	if _, err := s.raw(good); err != nil { // after which its chain is written down
		t.Fatal(err)
	}
	before, err := os.ReadFile(filepath.Join(s.dir, "counters"))
	if err != nil {
		t.Fatal(err)
	}
	for what, c := range map[string]struct {
		packet []byte
		want   error
	}{
		"unknown kind":               {[]byte{'x'}, ErrMalformed},
		"a hash":                     {append([]byte{byte(kindSandbox)}, make([]byte, 32)...), ErrMalformed},
		"another's sandbox record":   {encoded(t, sandboxRecord(other)), ErrNode},
		"a spelling of one's own":    {append(encoded(t, sandboxRecord(s.key.Address())), ' '), ErrMalformed},
		"garbage":                    {bytes.Repeat([]byte{0xff}, 300), ErrMalformed},
		"too large":                  {append([]byte{byte(kindRegistration)}, make([]byte, maxRequest)...), ErrMalformed},
		"half a receipt":             {good[:len(good)/2], ErrMalformed},
		"a receipt and more":         {append(bytes.Clone(good), 0), ErrMalformed},
		"a receipt of another node":  {rc(func(r *receipt.Receipt) { r.Node = other }), ErrNode},
		"a receipt about no job":     {rc(func(r *receipt.Receipt) { r.Job = receipt.JobID{} }), ErrMalformed},
		"a receipt without a class":  {rc(func(r *receipt.Receipt) { r.Claimed.ClassDigest = digest.Digest{} }), ErrMalformed},
		"a receipt that runs back":   {rc(func(r *receipt.Receipt) { r.Claimed.FinishedAt = 0 }), ErrMalformed},
		"half a hello":               {enc(kindHello, hello)[:40], ErrMalformed},
		"two hellos":                 {append(enc(kindHello, hello), '{', '}'), ErrMalformed},
		"a hello with a field more":  {enc(kindHello, map[string]any{"network": "testnet", "count": 7}), ErrMalformed},
		"a hello without keys":       {with(func(h *helloRequest) { h.OfNode = "" }), ErrMalformed},
		"a hello of a long agent":    {with(func(h *helloRequest) { h.Agent = strings.Repeat("x", 129) }), ErrMalformed},
		"a hello to nowhere":         {with(func(h *helloRequest) { h.Network = "../" }), ErrTerms},
		"another's registration":     {enc(kindRegistration, wire.Registration{Network: "testnet", Node: other}), ErrNode},
		"a registration to nowhere":  {enc(kindRegistration, wire.Registration{Node: s.key.Address()}), ErrTerms},
		"a long token":               {enc(kindRegistration, wire.Registration{Network: "testnet", Node: s.key.Address(), Token: strings.Repeat("x", 257)}), ErrMalformed},
		"another's binding":          {enc(kindBinding, wire.BindRequest{Network: "testnet", Node: other}), ErrNode},
		"a binding with fields more": {enc(kindBinding, map[string]any{"order": 1}), ErrMalformed},
		"another's logs":             {enc(kindLogs, wire.LogBatch{Network: "testnet", Node: other}), ErrNode},
		"another's head":             {enc(kindHead, headRequest{1, receiptlog.Head{Node: other, Network: "testnet", Size: 1}, Growth{}}), ErrNode},
		"a head to nowhere":          {enc(kindHead, headRequest{1, receiptlog.Head{Node: s.key.Address()}, Growth{}}), ErrMalformed},
		"a head of too large a log":  {enc(kindHead, headRequest{1, receiptlog.Head{Node: s.key.Address(), Network: "testnet", Size: receiptlog.MaxSize + 1}, Growth{}}), ErrMalformed},
		"the last head of nowhere":   {append([]byte{byte(kindLastHead)}, "../"...), ErrTerms},
		"a head with fields more":    {enc(kindHead, map[string]any{"chain_id": 1, "hash": 1}), ErrMalformed},
		"a root alone":               {append([]byte{byte(kindHead)}, make([]byte, 32)...), ErrMalformed},
		"a takeover and more":        {[]byte{byte(kindTakeover), 0}, ErrMalformed},
	} {
		replies, err := s.raw(c.packet, good)
		if err != nil || len(replies) != 2 {
			t.Errorf("%s: %v", what, err)
			continue
		}
		t.Logf("%s: expected: %v; got: %v", what, c.want, decodeError(replies[0]))
		if got := replies[0]; len(got) == 0 || got[0] == 0 || !errors.Is(decodeError(got), c.want) {
			t.Errorf("%s: %.200q, want %v", what, got, c.want)
		}
		if replies[1][0] != 0 {
			t.Errorf("%s: the next request of the connection: %.200q", what, replies[1])
		}
	}
	if after, err := os.ReadFile(filepath.Join(s.dir, "counters")); err != nil || !bytes.Equal(before, after) {
		t.Errorf("what was refused has changed the counters (%v)", err)
	}
	s.stop()
	if log := s.log.String(); !strings.Contains(log, "signature-refused") || strings.Contains(log, s.key.Hex()) {
		t.Errorf("log: %s", log)
	}
}

// What the operator has fixed is all that is signed for.
func TestAllowed(t *testing.T) {
	l := NewLocal(newService(t).key, nil)
	l.Allow(map[string]uint64{"testnet": 31337})
	r := stated(l.Address())
	if _, err := l.Receipt(31337, r); err != nil {
		t.Error(err)
	}
	_, err := l.Receipt(1, r)
	t.Logf("a receipt for another chain: expected: %v; got: %v", ErrTerms, err)
	if !errors.Is(err, ErrTerms) {
		t.Errorf("receipt for another chain: %v", err)
	}
	elsewhere := sandboxRecord(l.Address())
	elsewhere.Network = "mainnet"
	_, err = l.answer(encoded(t, elsewhere))
	t.Logf("a sandbox record for another network: expected: %v; got: %v", ErrTerms, err)
	if !errors.Is(err, ErrTerms) {
		t.Errorf("sandbox record for another network: %v", err)
	}
	if _, err := l.Hello(wire.Terms{Network: "testnet"}, wire.Hello{}, time.Now()); err != nil {
		t.Error(err)
	}
	h := receiptlog.Head{Node: l.Address(), Network: "testnet", Size: 1}
	if _, err := l.Head(31337, h, Growth{}); err != nil {
		t.Error(err)
	}
	_, err = l.Head(1, h, Growth{})
	t.Logf("a head for another chain: expected: %v; got: %v", ErrTerms, err)
	if !errors.Is(err, ErrTerms) {
		t.Errorf("head for another chain: %v", err)
	}
	h.Network = "mainnet"
	_, err = l.Head(31337, h, Growth{})
	t.Logf("a head for another network: expected: %v; got: %v", ErrTerms, err)
	if !errors.Is(err, ErrTerms) {
		t.Errorf("head for another network: %v", err)
	}
	_, err = l.Hello(wire.Terms{Network: "mainnet"}, wire.Hello{}, time.Now())
	t.Logf("a hello to another network: expected: %v; got: %v", ErrTerms, err)
	if !errors.Is(err, ErrTerms) {
		t.Errorf("hello to another network: %v", err)
	}
}

func TestOtherUID(t *testing.T) {
	s := newService(t)
	s.uids = func(uid uint32) bool { return uid == uint32(os.Getuid())+1 }
	s.start()
	_, err := dial(s.socket(), 2*time.Minute)
	t.Logf("expected: %v; got: %v", ErrCaller, err)
	if !errors.Is(err, ErrCaller) {
		t.Errorf("%v, want a refusal", err)
	}
}

// Those who hold connections do not bring the signer down, and make room.
func TestManyConnections(t *testing.T) {
	s := newService(t)
	s.start()
	var held []net.Conn
	for range maxConns {
		c, err := net.Dial("unixpacket", s.socket())
		if err != nil {
			t.Fatal(err)
		}
		if _, err := c.Read(make([]byte, 100)); err != nil {
			t.Fatal(err)
		}
		held = append(held, c)
	}
	_, err := dial(s.socket(), 100*time.Millisecond)
	t.Logf("one more than %d: expected: %v; got: %v", maxConns, ErrCrowded, err)
	if !errors.Is(err, ErrCrowded) {
		t.Errorf("one more: %v", err)
	}
	for _, c := range held {
		_ = c.Close()
	}
	s.client() // gets a place once one is free
}

// within shortens a patience of the server's, until the test's service has ended.
func within(t *testing.T, v *time.Duration, d time.Duration) {
	old := *v
	*v = d
	t.Cleanup(func() { *v = old })
}

// Who holds all places and says nothing loses them, and within the patience of a client
// that waits.
func TestIdle(t *testing.T) {
	if idleTime >= patience {
		t.Errorf("a place is free after %v, and clients wait for %v only", idleTime, patience)
	}
	within(t, &idleTime, 50*time.Millisecond)
	s := newService(t)
	s.start()
	var held []net.Conn
	buf := make([]byte, maxReply)
	for range maxConns {
		c, err := net.Dial("unixpacket", s.socket())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(10 * time.Second))
		if _, err := c.Read(buf); err != nil {
			t.Fatal(err)
		}
		held = append(held, c)
	}
	c := s.client()
	for _, h := range held {
		_, err := h.Read(buf)
		if !errors.Is(err, io.EOF) {
			t.Fatalf("a silent connection ended with %v", err)
		}
	}
	t.Logf("%d silent connections: expected: their end, and a place for the agent; got: %v, node %s", maxConns, io.EOF, c.Address())
	// The agent's own is ended, too, and nothing that it asks is lost by that.
	_ = c.conn.SetDeadline(time.Now().Add(10 * time.Second))
	if _, err := c.conn.Read(buf); !errors.Is(err, io.EOF) {
		t.Errorf("the agent's connection ended with %v", err)
	}
	if _, err := c.Receipt(1, s.receipt()); err != nil {
		t.Error(err)
	}
}

// A connection may end as idle in the very moment in which something is asked on it:
// whoever asks gets one sequence all the same, and nobody else the same one.
func TestIdleWhileAsking(t *testing.T) {
	within(t, &idleTime, 300*time.Microsecond) // about what an exchange takes
	s := newService(t)
	s.start()
	const clients, each = 4, 100
	var mu sync.Mutex
	seen := map[uint64]bool{}
	var wg sync.WaitGroup
	for range clients {
		c := s.client()
		c.patience = time.Minute // each try may end as idle on a machine that is busy
		wg.Go(func() {
			for range each {
				signed, err := c.Receipt(1, s.receipt())
				if err != nil {
					t.Error(err)
					return
				}
				mu.Lock()
				seen[signed.Receipt().Sequence] = true
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	t.Logf("expected: %d sequences; got: %d", clients*each, len(seen))
	if len(seen) != clients*each {
		t.Errorf("%d sequences, want %d", len(seen), clients*each)
	}
}

// Who asks and does not read the replies is waited for, and not for ever.
func TestDoesNotRead(t *testing.T) {
	within(t, &writeTime, 50*time.Millisecond)
	s := newService(t)
	s.start()
	c, err := net.Dial("unixpacket", s.socket())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(10 * time.Second))
	for err == nil {
		_, err = c.Write([]byte{0xff})
	}
	t.Logf("expected: %v; got: %v", syscall.EPIPE, err)
	if !errors.Is(err, syscall.EPIPE) && !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("it ended with %v", err)
	}
}

// A signer that is restarted loses nothing that somebody waits for, and never
// gives a sequence twice.
func TestRestartUnderLoad(t *testing.T) {
	s := newService(t)
	s.start()
	c := s.client()
	var mu sync.Mutex
	seen := map[uint64]bool{}
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range 100 {
				signed, err := c.Receipt(1, s.receipt())
				if err != nil {
					t.Error(err)
					return
				}
				n := signed.Receipt().Sequence
				mu.Lock()
				if seen[n] {
					t.Errorf("sequence %x twice", n)
				}
				seen[n] = true
				mu.Unlock()
			}
		})
	}
	for range 5 {
		time.Sleep(2 * time.Millisecond) // in the midst of it
		s.stop()
		s.start()
	}
	wg.Wait()
	if len(seen) != 400 {
		t.Errorf("%d receipts, want 400", len(seen))
	}
}

// Who connects in the moment in which the signer ends is told so at once, and does
// not wait on a connection that nobody serves.
func TestEndsWhileAccepting(t *testing.T) {
	s := newService(t)
	for i := range 100 {
		ln, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: s.socket(), Net: "unixpacket"})
		if err != nil {
			t.Fatal(err)
		}
		c, err := net.Dial("unixpacket", s.socket())
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(context.Background())
		cancel() // and the connection waits already
		srv := &Server{Local: NewLocal(s.key, nil), Serves: s.uids, Log: slog.New(journal.Text(&s.log, slog.LevelInfo))}
		if err := srv.Serve(ctx, ln); err != nil {
			t.Fatal(err)
		}
		_ = c.SetReadDeadline(time.Now().Add(2 * time.Minute))
		if _, err := c.Read(make([]byte, 100)); errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatalf("round %d: the connection stayed open behind the end", i)
		}
		_ = c.Close()
	}
}

func TestAway(t *testing.T) {
	s := newService(t)
	if _, err := dial(s.socket(), 50*time.Millisecond); !errors.Is(err, ErrAway) {
		t.Errorf("no socket: %v", err)
	}
	s.start()
	c := s.client()
	s.stop()
	c.patience = 50 * time.Millisecond
	if _, err := c.Receipt(1, s.receipt()); !errors.Is(err, ErrAway) {
		t.Errorf("stopped: %v", err)
	}
	// Another key in its place is not taken for this one.
	if err := os.Remove(filepath.Join(s.dir, "counters")); err != nil {
		t.Fatal(err)
	}
	var err error
	if s.key, err = evm.NewKey(); err != nil {
		t.Fatal(err)
	}
	s.start()
	if _, err := c.Receipt(1, s.receipt()); !errors.Is(err, ErrOtherKey) {
		t.Errorf("another key: %v", err)
	}
}

// A signer that hangs is waited for, and not for ever.
func TestHangs(t *testing.T) {
	s := newService(t)
	ln, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: s.socket(), Net: "unixpacket"})
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	before := once
	once = 20 * time.Millisecond
	defer func() { once = before }()
	if _, err := dial(s.socket(), 100*time.Millisecond); !errors.Is(err, ErrAway) {
		t.Error(err)
	}
}

func FuzzAnswer(f *testing.F) {
	key, err := evm.ParseKey(strings.Repeat("1", 64)) // the same in each process that fuzzes
	if err != nil {
		f.Fatal(err)
	}
	l := NewLocal(key, nil)
	for k := range kindNames {
		f.Add([]byte{byte(k)})
		f.Add(fmt.Appendf(nil, "%c{\"network\":\"testnet\",\"node\":%q}", k, key.Address().Hex()))
	}
	f.Add(encodeReceipt([]byte{byte(kindReceipt)}, 1, new(stated(key.Address()))))
	f.Fuzz(func(t *testing.T, req []byte) {
		out, err := l.answer(req)
		if err != nil && (len(out) > 65 || decodeError(encodeError(err)) == nil) {
			t.Errorf("%q: %q and %v", req, out, err)
		}
		if len(out) >= maxReply {
			t.Errorf("a reply of %d bytes", len(out))
		}
	})
}

// What a receipt costs more than in this process.
func BenchmarkReceipt(b *testing.B) {
	s := newService(b)
	s.start()
	for name, signer := range map[string]Signer{"local": NewLocal(s.key, nil), "socket": s.client()} {
		b.Run(name, func(b *testing.B) {
			r := s.receipt()
			for b.Loop() {
				if _, err := signer.Receipt(1, r); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// A caller that asks for nonsense without end is slowed down, fills no log, and keeps
// nobody from what is signed.
func TestFlood(t *testing.T) {
	s := newService(t)
	s.start()
	c, err := net.Dial("unixpacket", s.socket())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	const n = 2 * burst
	buf := make([]byte, 1024)
	if _, err := c.Read(buf); err != nil {
		t.Fatal(err)
	}
	begin := time.Now()
	for range n {
		_, err := c.Write([]byte{0xff})
		if err == nil {
			_, err = c.Read(buf)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	took := time.Since(begin)
	if _, err := s.client().Receipt(1, s.receipt()); err != nil {
		t.Error(err)
	}
	s.stop()
	said := strings.Count(s.log.String(), "event="+journal.SignatureRefused.Name)
	least, most := time.Duration(n-burst)*time.Second/perSecond, 20+int(took/time.Second)+1
	t.Logf("%d requests: expected: at least %v, at most %d records; got: %v, %d", n, least, most, took.Round(time.Millisecond), said)
	if took < least || said == 0 || said > most {
		t.Errorf("%d requests took %v, want at least %v; %d records, want some and at most %d", n, took, least, said, most)
	}
}
