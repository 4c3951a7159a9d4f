package wire

import (
	"bytes"
	"encoding/json"
	"errors"
	"reflect"
	"testing"
	"time"

	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/evm"
	"github.com/resultity/node/internal/receipt"
)

var at = time.UnixMilli(1_800_000_000_000)

func now() time.Time { return at }

type side struct {
	key   *evm.Key
	nonce Nonce
}

func newSide(t testing.TB) side {
	t.Helper()
	k, err := evm.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	return side{key: k, nonce: SessionNonce("testnet", k.Address(), Nonce{1}, Nonce{2})}
}

func (s side) sealer() *Sealer { return NewSealer(s.key, s.nonce, ToNetwork, now) }
func (s side) opener() *Opener {
	return NewOpener(func(a evm.Address) bool { return a == s.key.Address() }, s.nonce, ToNetwork, time.Minute)
}

func seal(t testing.TB, s *Sealer, m Message) []byte {
	t.Helper()
	f, err := s.Seal(m)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func TestFramesArriveInOrder(t *testing.T) {
	p := newSide(t)
	s, o := p.sealer(), p.opener()
	want := []Message{
		&Hello{Agent: "1", Config: digest.Of([]byte("c"))},
		&Heartbeat{Models: []ModelState{{Name: "m", State: "active"}}},
		&Chunk{Job: receipt.NewJobID(), Offset: 3, Data: []byte("data")},
	}
	for _, m := range want {
		got, err := o.Open(seal(t, s, m), at)
		if err != nil || !reflect.DeepEqual(got, m) {
			t.Fatalf("Open = %+v, %v; want %+v", got, err, m)
		}
	}
}

func TestOpenRefusesEveryFlippedByte(t *testing.T) {
	p := newSide(t)
	f := seal(t, p.sealer(), &Hello{Agent: "1"})
	for i := range f {
		bad := bytes.Clone(f)
		bad[i] ^= 1
		if m, err := p.opener().Open(bad, at); !errors.Is(err, ErrSigner) {
			t.Errorf("byte %d flipped: Open = %v, %v; want ErrSigner", i, m, err)
		}
	}
	for n := range f {
		if _, err := p.opener().Open(f[:n], at); err == nil {
			t.Errorf("truncated to %d bytes and accepted", n)
		}
	}
}

func TestOpenRefuses(t *testing.T) {
	p, other := newSide(t), newSide(t)
	hello := &Hello{Agent: "1"}
	first := seal(t, p.sealer(), hello)
	raw := func(body string) []byte {
		sig, err := p.key.Sign(signingHash(p.nonce, ToNetwork, []byte(body)))
		if err != nil {
			t.Fatal(err)
		}
		return append(sig[:], body...)
	}
	gap := p.sealer()
	seal(t, gap, hello)
	late := NewSealer(p.key, p.nonce, ToNetwork, func() time.Time { return at.Add(-61 * time.Second) })
	early := NewSealer(p.key, p.nonce, ToNetwork, func() time.Time { return at.Add(61 * time.Second) })
	replay := p.opener()
	if _, err := replay.Open(first, at); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name   string
		opener *Opener
		frame  []byte
		want   error
	}{
		{"another signer", p.opener(), seal(t, NewSealer(other.key, p.nonce, ToNetwork, now), hello), ErrSigner},
		{"another session", p.opener(), seal(t, NewSealer(p.key, other.nonce, ToNetwork, now), hello), ErrSigner},
		{"other direction", p.opener(), seal(t, NewSealer(p.key, p.nonce, ToNode, now), hello), ErrSigner},
		{"replay", replay, first, ErrSequence},
		{"gap", p.opener(), seal(t, gap, hello), ErrSequence},
		{"slow clock", p.opener(), seal(t, late, hello), ErrClock},
		{"fast clock", p.opener(), seal(t, early, hello), ErrClock},
		{"too large", p.opener(), make([]byte, MaxFrame+1), ErrTooLarge},
		{"empty", p.opener(), nil, ErrMalformed},
		{"not JSON", p.opener(), raw("hello"), ErrMalformed},
		{"trailing", p.opener(), raw(`{"seq":1,"time":1800000000000,"type":"hello","data":{"agent":"1","config":""}} {}`), ErrMalformed},
		{"unknown field", p.opener(), raw(`{"seq":1,"time":1800000000000,"type":"hello","x":1,"data":{}}`), ErrMalformed},
		{"unknown data field", p.opener(), raw(`{"seq":1,"time":1800000000000,"type":"hello","data":{"x":1}}`), ErrMalformed},
		{"unknown type", p.opener(), raw(`{"seq":1,"time":1800000000000,"type":"zap","data":{}}`), ErrMalformed},
		{"wrong way", p.opener(), raw(`{"seq":1,"time":1800000000000,"type":"welcome","data":{}}`), ErrMalformed},
		{"no data", p.opener(), raw(`{"seq":1,"time":1800000000000,"type":"hello"}`), ErrMalformed},
		{"null data", p.opener(), raw(`{"seq":1,"time":1800000000000,"type":"hello","data":null}`), ErrMalformed},
	} {
		if m, err := c.opener.Open(c.frame, at); !errors.Is(err, c.want) {
			t.Errorf("%s: Open = %v, %v; want %v", c.name, m, err, c.want)
		}
	}
}

func TestSealRefusesTooLargeAndGoesOn(t *testing.T) {
	p := newSide(t)
	s, o := p.sealer(), p.opener()
	if _, err := s.Seal(&Result{Response: make([]byte, MaxFrame)}); !errors.Is(err, ErrTooLarge) {
		t.Fatalf("Seal = %v, want ErrTooLarge", err)
	}
	if _, err := o.Open(seal(t, s, &Hello{}), at); err != nil {
		t.Fatalf("a message that did not fit used up a number: %v", err)
	}
}

func TestRegistration(t *testing.T) {
	p := newSide(t)
	want := Registration{Network: "testnet", Node: p.key.Address(), Token: "t", Time: 1, Agent: "v"}
	b, err := SealRegistration(p.key, want)
	if err != nil {
		t.Fatal(err)
	}
	var got Registration
	if who, err := OpenRegistration(b, &got); err != nil || who != p.key.Address() || got != want {
		t.Fatalf("OpenRegistration = %v, %v, %+v", who, err, got)
	}
	for i := range b {
		bad := bytes.Clone(b)
		bad[i] ^= 1
		if who, err := OpenRegistration(bad, new(Registration)); err == nil && who == p.key.Address() {
			t.Errorf("byte %d flipped and still the node's", i)
		}
	}
}

// What a peer sends does not come back at length in the error that is logged.
func TestErrorsDoNotQuoteThePeerAtLength(t *testing.T) {
	var e envelope
	err := strict([]byte(`{"`+string(bytes.Repeat([]byte("x"), 1<<20))+`":1}`), &e)
	if !errors.Is(err, ErrMalformed) || len(err.Error()) > 400 {
		t.Errorf("error of %d bytes", len(err.Error()))
	}
}

// Every type is listed, so that none can be sent that cannot be received.
func TestEveryTypeDecodes(t *testing.T) {
	for typ, f := range messages {
		m := f()
		if m.Type() != typ {
			t.Errorf("%s is listed as %s", m.Type(), typ)
		}
		data, err := json.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		_ = data // zero values need not decode (ids are refused when zero); the switch below is the check
		if _, err := decode(typ, 3, data); !errors.Is(err, ErrMalformed) {
			t.Errorf("%s accepted from nowhere", typ)
		}
	}
}

func FuzzOpen(f *testing.F) {
	p := newSide(f)
	f.Add([]byte(`{"seq":1,"time":1800000000000,"type":"hello","data":{"agent":"1","config":""}}`))
	f.Add([]byte(`{"seq":1,"time":1800000000000,"type":"result","data":{"job":"00000000000000000000000000000001","response":"aGk="}}`))
	f.Fuzz(func(t *testing.T, body []byte) {
		sig, err := p.key.Sign(signingHash(p.nonce, ToNetwork, body))
		if err != nil {
			t.Fatal(err)
		}
		m, err := p.opener().Open(append(sig[:], body...), at)
		if err == nil && m.direction() != ToNetwork {
			t.Fatalf("%T the wrong way", m)
		}
	})
}

func BenchmarkSealOpenChunk(b *testing.B) {
	p := newSide(b)
	s, o := p.sealer(), p.opener()
	m := &Chunk{Job: receipt.NewJobID(), Data: make([]byte, 200)}
	for b.Loop() {
		if _, err := o.Open(seal(b, s, m), at); err != nil {
			b.Fatal(err)
		}
	}
}
