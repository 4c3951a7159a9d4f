package wire

import (
	"bytes"
	"compress/gzip"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"reflect"
	"strings"
	"testing"

	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/evm"
)

func TestOrder(t *testing.T) {
	key := newKey(t)
	want := Directive{ID: NewOrderID(), Network: "testnet", Node: key.Address(), Kind: "dance", Reason: "well", Issued: 1, Expires: 2}
	o, err := SealOrder(key, &want)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := json.Marshal(o)
	if err != nil {
		t.Fatal(err)
	}
	m, err := decode([]byte("order"), ToNode, raw)
	if err != nil {
		t.Fatal(err)
	}
	got, who, err := m.(*Order).Open()
	if err != nil || who != key.Address() || *got != want {
		t.Fatalf("%+v by %s, %v; an unknown kind is no matter of the form", got, who, err)
	}
	for i := range o.Body {
		bad := *o
		bad.Body = bytes.Clone(o.Body)
		bad.Body[i] ^= 1
		if _, who, err := bad.Open(); err == nil && who == key.Address() {
			t.Fatalf("byte %d of an order does not matter", i)
		}
	}
	// A signature over the same bytes for another purpose is none over an order.
	if s, err := makeStatement(key, logsDomain, &want); err != nil {
		t.Fatal(err)
	} else if _, who, _ := (&Order{want.ID, s}).Open(); who == key.Address() {
		t.Error("a batch of logs passes for an order")
	}
	for name, change := range map[string]func(*Directive){
		"for ever":    func(d *Directive) { d.Expires = d.Issued + MaxOrderLife*1000 + 1 },
		"never":       func(d *Directive) { d.Expires = d.Issued },
		"long reason": func(d *Directive) { d.Reason = strings.Repeat("x", MaxOrderReason+1) },
		"control":     func(d *Directive) { d.Reason = "a\x1b[2J" },
	} {
		d := want
		change(&d)
		o, err := SealOrder(key, &d)
		if err != nil {
			t.Fatal(err)
		}
		if _, _, err := o.Open(); !errors.Is(err, ErrMalformed) {
			t.Errorf("%s: %v", name, err)
		}
	}
	other := *o
	other.ID = NewOrderID()
	if _, _, err := other.Open(); !errors.Is(err, ErrMalformed) {
		t.Errorf("an order under another id: %v", err)
	}
	s, err := makeStatement(key, orderDomain, map[string]any{"id": want.ID, "force": true})
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := (&Order{want.ID, s}).Open(); !errors.Is(err, ErrMalformed) {
		t.Errorf("an order with an unknown field: %v", err)
	}
}

func logRecord(n uint64, fields map[string]string) LogRecord {
	return LogRecord{Position: n, Time: 1, Level: "INFO", Event: "job-done", Message: "job done", Fields: fields}
}

func pack(t *testing.T, limit int, records ...LogRecord) (*LogBatch, []byte) {
	t.Helper()
	p := NewPacker(limit)
	for _, r := range records {
		b, err := json.Marshal(r)
		if err != nil {
			t.Fatal(err)
		}
		if !p.Add(b) {
			t.Fatal("no room")
		}
	}
	last := records[len(records)-1].Position
	return &LogBatch{Network: "testnet", Spool: strings.Repeat("ab", 16), Last: last, Count: uint64(len(records))}, p.Data()
}

func TestLogs(t *testing.T) {
	key := newKey(t)
	b, data := pack(t, 1<<16, logRecord(1, map[string]string{"job": "ab"}), logRecord(4, map[string]string{"error": "no /dev/null on host x"}))
	b.Node = key.Address()
	l, err := SealLogs(key, *b, data)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := json.Marshal(l)
	if err != nil {
		t.Fatal(err)
	}
	m, err := decode([]byte("logs"), ToNetwork, raw)
	if err != nil {
		t.Fatal(err)
	}
	got, who, err := m.(*Logs).Open()
	if err != nil || who != key.Address() || got.Dropped() != 2 {
		t.Fatalf("%+v by %s, %v", got, who, err)
	}
	records, err := got.Unpack(m.(*Logs).Data)
	if err != nil || len(records) != 2 || records[1].Position != 4 || records[0].Fields["job"] != "ab" {
		t.Fatalf("%+v, %v", records, err)
	}
	for i := range l.Data {
		bad := *l
		bad.Data = bytes.Clone(l.Data)
		bad.Data[i] ^= 1
		if _, _, err := bad.Open(); !errors.Is(err, ErrLogs) {
			t.Fatalf("byte %d of the data does not matter: %v", i, err)
		}
	}
	for name, change := range map[string]func(*LogBatch){
		"backwards": func(b *LogBatch) { b.After = b.Last },
		"too many":  func(b *LogBatch) { b.Count = 5 },
		"none":      func(b *LogBatch) { b.Count = 0 },
		"spool":     func(b *LogBatch) { b.Spool = "../x" },
	} {
		c := *b
		change(&c)
		bad, err := SealLogs(key, c, data)
		if err != nil {
			t.Fatal(err)
		}
		if _, _, err := bad.Open(); !errors.Is(err, ErrLogs) {
			t.Errorf("%s: %v", name, err)
		}
	}
	big, err := SealLogs(key, *b, make([]byte, MaxLogBatch+1))
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := big.Open(); !errors.Is(err, ErrLogs) {
		t.Errorf("oversize: %v", err)
	}
}

func TestLogsHoldOnlyWhatMayLeave(t *testing.T) {
	for name, r := range map[string]LogRecord{
		"text":           logRecord(1, map[string]string{"prompt": "secret"}),
		"unknown":        logRecord(1, map[string]string{"path": "/home"}),
		"long field":     logRecord(1, map[string]string{"model": strings.Repeat("m", 129)}),
		"control":        logRecord(1, map[string]string{"model": "\x1b[2J"}),
		"job with error": logRecord(1, map[string]string{"job": "ab", "error": "secret"}),
		"debug":          {Position: 1, Level: "DEBUG", Message: "x"},
		"long message":   {Position: 1, Level: "INFO", Message: strings.Repeat("x", maxLogMessage+1)},
		"event":          {Position: 1, Level: "INFO", Event: "Secret words", Message: "x"},
		"behind":         logRecord(2, nil),
	} {
		b, data := pack(t, 1<<16, r)
		b.Last = 1
		_, err := b.Unpack(data)
		t.Logf("%s: expected: %v; got: %v", name, ErrLogs, err)
		if !errors.Is(err, ErrLogs) {
			t.Errorf("%s: %v", name, err)
		}
	}
	longest, data := pack(t, 1<<16, LogRecord{Position: 1, Level: "INFO", Message: strings.Repeat("x", maxLogMessage)})
	if _, err := longest.Unpack(data); err != nil {
		t.Errorf("the longest message: %v", err)
	}
	b, data := pack(t, 1<<16, logRecord(1, nil), logRecord(2, nil))
	b.Count = 1
	if _, err := b.Unpack(data); !errors.Is(err, ErrLogs) {
		t.Errorf("more records than said: %v", err)
	}
	b.Count, b.Last = 2, 3
	if _, err := b.Unpack(data); !errors.Is(err, ErrLogs) {
		t.Errorf("ends before it says: %v", err)
	}
	if _, err := b.Unpack([]byte("gzip?")); !errors.Is(err, ErrLogs) {
		t.Errorf("no gzip: %v", err)
	}
}

func TestLogsBomb(t *testing.T) {
	line := fmt.Sprintf(`{"n":%%d,"time":1,"level":"INFO","message":%q}`+"\n", strings.Repeat("x", 200))
	var buf bytes.Buffer
	w := gzip.NewWriter(&buf)
	n := uint64(0)
	for size := 0; size <= MaxLogInflated; n++ {
		k, _ := fmt.Fprintf(w, line, n+1)
		size += k
	}
	_ = w.Close()
	if buf.Len() > MaxLogBatch {
		t.Fatalf("the bomb has %d bytes", buf.Len())
	}
	b := LogBatch{Spool: strings.Repeat("ab", 16), Last: n, Count: n, Digest: digest.Of(buf.Bytes())}
	_, err := b.Unpack(buf.Bytes())
	t.Logf("%d lines in %d bytes: expected: %v; got: %v", n, buf.Len(), ErrLogs, err)
	if !errors.Is(err, ErrLogs) || !strings.Contains(err.Error(), "inflates") {
		t.Errorf("%v", err)
	}
	// Zeros without a line's end.
	buf.Reset()
	w = gzip.NewWriter(&buf)
	_, _ = w.Write(make([]byte, 64<<20))
	_ = w.Close()
	b.Digest = digest.Of(buf.Bytes())
	_, err = b.Unpack(buf.Bytes())
	t.Logf("one endless line: expected: %v; got: %v", ErrLogs, err)
	if !errors.Is(err, ErrLogs) {
		t.Errorf("one endless line: %v", err)
	}
}

// What is signed as it must be and has one byte too many is refused unread, and what has
// just enough is not.
func TestSizesAreBounded(t *testing.T) {
	key, err := evm.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	signed := func(domain string, body []byte) evm.Signature {
		sig, err := key.Sign(evm.Keccak([]byte(domain), body))
		if err != nil {
			t.Fatal(err)
		}
		return sig
	}
	padded := func(v any, n int) []byte { // white space is free in them
		b, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		return append(b, bytes.Repeat([]byte(" "), n-len(b))...)
	}
	for name, c := range map[string]struct {
		bound int
		open  func(n int) error
	}{
		"order": {maxStatement, func(n int) error {
			d := &Directive{ID: NewOrderID(), Kind: OrderDrain, Issued: 1, Expires: 2}
			body := padded(d, n)
			_, _, err := (&Order{d.ID, statement{body, signed(orderDomain, body)}}).Open()
			return err
		}},
		"batch of logs": {maxStatement, func(n int) error {
			data := []byte("x")
			body := padded(&LogBatch{Spool: strings.Repeat("ab", 16), Last: 1, Count: 1, Digest: digest.Of(data)}, n)
			_, _, err := (&Logs{statement{body, signed(logsDomain, body)}, data}).Open()
			return err
		}},
		"registration": {MaxRegistration, func(n int) error {
			body := padded(&Registration{}, n-65)
			sig := signed(registerDomain, body)
			_, err := OpenRegistration(append(sig[:], body...), new(Registration))
			return err
		}},
		"binding": {MaxRegistration, func(n int) error {
			body := padded(&BindRequest{}, n-65)
			sig := signed(bindDomain, body)
			_, err := OpenBinding(append(sig[:], body...), new(BindRequest))
			return err
		}},
		"line of a log": {MaxLogRecord, func(n int) error {
			var buf bytes.Buffer
			w := gzip.NewWriter(&buf)
			_, _ = w.Write(append(padded(&LogRecord{Position: 1, Level: "INFO"}, n-1), '\n'))
			_ = w.Close()
			b := LogBatch{Spool: strings.Repeat("ab", 16), Last: 1, Count: 1, Digest: digest.Of(buf.Bytes())}
			_, err := b.Unpack(buf.Bytes())
			return err
		}},
		"order that is made": {maxStatement, func(n int) error {
			_, err := makeStatement(key, orderDomain, strings.Repeat("x", n-2)) // in quotes
			return err
		}},
		"list of models": {maxListed, func(n int) error { return (&Heartbeat{Models: make([]ModelState, n)}).check() }},
		"list of GPUs":   {maxListed, func(n int) error { return (&Heartbeat{Hardware: Hardware{GPUs: make([]string, n)}}).check() }},
		"slots":          {maxSlots, func(n int) error { return (&Heartbeat{Slots: n}).check() }},
		"busy slots":     {maxSlots, func(n int) error { return (&Heartbeat{Busy: n}).check() }},
	} {
		enough, over := c.open(c.bound), c.open(c.bound+1)
		t.Logf("%s of %d: expected: refused; got: %v", name, c.bound+1, over)
		if enough != nil || over == nil {
			t.Errorf("%s: with %d bytes %v, with one more %v", name, c.bound, enough, over)
		}
	}
}

// However badly records compress, a batch keeps to its bound.
func TestPackerKeepsItsBound(t *testing.T) {
	for _, limit := range []int{4 << 10, 64 << 10, MaxLogBatch} {
		p := NewPacker(limit)
		rng := rand.New(rand.NewPCG(1, 2))
		n := 0
		for {
			line := make([]byte, 900)
			for i := range line {
				line[i] = byte(rng.Uint32())
			}
			if !p.Add(line) {
				break
			}
			n++
		}
		if size := len(p.Data()); size > limit || n < limit/900/2 {
			t.Errorf("limit %d: %d bytes of %d records", limit, size, n)
		}
	}
}

// Whatever a node compresses: what is taken is as many records as were said, each
// may leave a node, and all of them together are within the bound of a batch.
func FuzzUnpack(f *testing.F) {
	seed := func(after, last, count uint64, lines string) {
		var buf bytes.Buffer
		w := gzip.NewWriter(&buf)
		_, _ = w.Write([]byte(lines))
		_ = w.Close()
		f.Add(after, last, count, true, []byte(lines))
		f.Add(after, last, count, false, buf.Bytes())
	}
	seed(0, 1, 1, `{"n":1,"time":1,"level":"INFO","message":"job done","event":"job-done","fields":{"job":"ab"}}`+"\n")
	seed(3, 9, 2, `{"n":4,"time":1,"level":"WARN","message":""}`+"\n"+`{"n":9,"time":1,"level":"ERROR+2","message":"x","fields":{"error":"y"}}`)
	seed(0, 1, 1, `{"n":1,"N":2,"level":"INFO"}`+"\n{}")
	seed(0, 2, 2, "\n\n")
	f.Fuzz(func(t *testing.T, after, last, count uint64, zip bool, data []byte) {
		if zip {
			var buf bytes.Buffer
			w := gzip.NewWriter(&buf)
			_, _ = w.Write(data)
			_ = w.Close()
			data = buf.Bytes()
		}
		b := &LogBatch{After: after, Last: last, Count: count}
		records, err := b.Unpack(data)
		if err != nil {
			if !errors.Is(err, ErrLogs) && !errors.Is(err, ErrMalformed) || records != nil {
				t.Fatalf("%d records, %v", len(records), err)
			}
			return
		}
		if uint64(len(records)) != count {
			t.Fatalf("%d records, said were %d", len(records), count)
		}
		p, size := NewPacker(MaxLogBatch), 0
		for _, r := range records {
			if err := r.Check(); err != nil || r.Position <= after || r.Position > last {
				t.Fatalf("%+v: %v", r, err)
			}
			line, err := json.Marshal(r)
			if err != nil {
				t.Fatal(err)
			}
			if size += len(line) + 1; !p.Add(line) {
				return // what compressed better before
			}
		}
		again, err := b.Unpack(p.Data())
		if err != nil || !reflect.DeepEqual(again, records) {
			t.Fatalf("%+v came back as %+v, %v", records, again, err)
		}
	})
}

// fixedKey is the same in each process that fuzzes, so that what one has signed is
// signed for the others.
func fixedKey(t testing.TB) *evm.Key {
	t.Helper()
	k, err := evm.ParseKey(strings.Repeat("1", 64))
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// Whoever has no key may change a signed body as he likes: as the signer's it is
// taken only when it is the signer's, word for word.
func FuzzOpenRegistration(f *testing.F) {
	key := fixedKey(f)
	want := Registration{Network: "testnet", Node: key.Address(), Token: "t", Time: 1, Agent: "v"}
	good, err := SealRegistration(key, want)
	if err != nil {
		f.Fatal(err)
	}
	bound, err := SealBinding(key, want)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add(bound)
	f.Add(good[:65])
	f.Fuzz(func(t *testing.T, b []byte) {
		var got Registration
		who, err := OpenRegistration(b, &got)
		if err == nil && who == key.Address() && got != want {
			t.Fatalf("%q passes for the node's", b)
		}
		if err != nil && len(err.Error()) > 400 {
			t.Fatalf("an error of %d bytes goes into the log", len(err.Error()))
		}
	})
}

// An order is taken as the network's only if its body is one that was signed.
func FuzzOrder(f *testing.F) {
	key := fixedKey(f)
	want := Directive{ID: OrderID{1}, Network: "testnet", Node: key.Address(), Kind: OrderDrain, Reason: "well", Issued: 1, Expires: 2}
	o, err := SealOrder(key, &want)
	if err != nil {
		f.Fatal(err)
	}
	raw, err := json.Marshal(o)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(raw)
	f.Add([]byte(`{"id":"00000000000000000000000000000000","body":"e30=","signature":"0x"}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		m, err := decode([]byte("order"), ToNode, raw)
		if err != nil {
			return
		}
		d, who, err := m.(*Order).Open()
		if err != nil {
			return
		}
		if who == key.Address() && *d != want {
			t.Fatalf("%+v passes for the network's", d)
		}
		if len(d.Reason) > MaxOrderReason || Printable(d.Reason) != d.Reason || d.Expires-d.Issued > MaxOrderLife*1000 {
			t.Fatalf("%+v is out of bounds", d)
		}
	})
}
