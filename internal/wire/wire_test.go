package wire

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/evm"
	"github.com/resultity/node/internal/receipt"
)

var at = time.UnixMilli(1_800_000_000_000)

func now() time.Time { return at }

func newKey(t testing.TB) *evm.Key {
	t.Helper()
	k, err := evm.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// pair is both sides of one session.
type pair struct {
	t             testing.TB
	node, network *evm.Key
	ofNode        *Session // as the node has computed it
	ofNetwork     *Session
}

func newPair(t testing.TB) *pair {
	t.Helper()
	p := &pair{t: t, node: newKey(t), network: newKey(t)}
	a, b := NewSecret(), NewSecret()
	p.ofNode = agree(t, a, p.node.Address(), a.Public(), b.Public())
	p.ofNetwork = agree(t, b, p.node.Address(), a.Public(), b.Public())
	return p
}

func agree(t testing.TB, s *Secret, node evm.Address, ofNode, ofNetwork PublicKey) *Session {
	t.Helper()
	session, err := s.Agree("testnet", node, ofNode, ofNetwork)
	if err != nil {
		t.Fatal(err)
	}
	return session
}

func only(k *evm.Key) func(evm.Address) bool {
	return func(a evm.Address) bool { return a == k.Address() }
}

// The halves of a session, by who uses them.
func (p *pair) nodeSeals() *Sealer {
	return NewNodeSealer(func(t Terms, h Hello, at time.Time) ([]byte, error) { return SealHello(p.node, t, h, at) }, p.ofNode, now)
}
func (p *pair) networkSeals() *Sealer { return NewSealer(p.network, p.ofNetwork, ToNode, now) }
func (p *pair) nodeOpens() *Opener    { return NewOpener(only(p.network), p.ofNode, ToNode, time.Minute) }
func (p *pair) networkOpens() *Opener {
	return NewOpener(only(p.node), p.ofNetwork, ToNetwork, time.Minute)
}

// shake has both sides exchange their first frames.
func (p *pair) shake() (nodeSeals *Sealer, networkOpens *Opener, networkSeals *Sealer, nodeOpens *Opener) {
	p.t.Helper()
	nodeSeals, networkOpens, networkSeals, nodeOpens = p.nodeSeals(), p.networkOpens(), p.networkSeals(), p.nodeOpens()
	open(p.t, networkOpens, seal(p.t, nodeSeals, hello))
	open(p.t, nodeOpens, seal(p.t, networkSeals, &Welcome{Session: "s", Server: "1"}))
	return nodeSeals, networkOpens, networkSeals, nodeOpens
}

var hello = &Hello{Agent: "1"}

func seal(t testing.TB, s *Sealer, m Message) []byte {
	t.Helper()
	f, err := s.Seal(nil, m)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func open(t testing.TB, o *Opener, frame []byte) Message {
	t.Helper()
	m, err := o.Open(frame, at)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func TestFramesArriveInOrder(t *testing.T) {
	p := newPair(t)
	s, o := p.nodeSeals(), p.networkOpens()
	open(t, o, seal(t, s, &Hello{Agent: "1", Config: digest.Of([]byte("c"))}))
	open(t, p.nodeOpens(), seal(t, p.networkSeals(), &Welcome{}))
	for _, want := range []Message{
		&Heartbeat{Models: []ModelState{{Name: "m", State: "active"}}},
		&Chunk{Job: receipt.NewJobID(), Offset: 3, Data: []byte("data")},
		newResult(t, 5),
		&Bye{Reason: "\"<é"},
	} {
		if got := open(t, o, seal(t, s, want)); !reflect.DeepEqual(got, want) {
			t.Fatalf("Open = %+v; want %+v", got, want)
		}
	}
	if o.Signer() != p.node.Address() {
		t.Errorf("Signer = %s, want %s", o.Signer(), p.node.Address())
	}
}

// Only the first frame of a direction costs a signature, and a recovery.
func TestOnlyTheFirstFrameIsSigned(t *testing.T) {
	p := newPair(t)
	s, o, _, _ := p.shake()
	s.first = nil // would panic
	for range 3 {
		f := seal(t, s, hello)
		if body := f[tagSize:]; body[0] != '{' {
			t.Errorf("no body behind the tag: %.20q", body)
		}
		open(t, o, f)
	}
}

// What is appended to stays.
func TestSealAppends(t *testing.T) {
	p := newPair(t)
	s, o := p.nodeSeals(), p.networkOpens()
	buf, err := s.Seal([]byte("before"), hello)
	if err != nil || string(buf[:6]) != "before" {
		t.Fatalf("Seal = %.10q, %v", buf, err)
	}
	open(t, o, buf[6:])
}

// A node must know who the network is before it says anything but hello.
func TestNothingIsTaggedBeforeThePeerIsMet(t *testing.T) {
	p := newPair(t)
	s := p.nodeSeals()
	seal(t, s, hello)
	if f, err := s.Seal(nil, &Bye{}); !errors.Is(err, errNotMet) {
		t.Fatalf("Seal = %q, %v; want errNotMet", f, err)
	}
	o := p.nodeOpens()
	welcome := seal(t, p.networkSeals(), &Welcome{})
	bad := bytes.Clone(welcome)
	bad[len(bad)-1] ^= 1
	if _, err := o.Open(bad, at); err == nil {
		t.Fatal("a changed welcome was taken")
	}
	if _, err := s.Seal(nil, &Bye{}); !errors.Is(err, errNotMet) {
		t.Fatalf("after a welcome that was refused: Seal = %v; want errNotMet", err)
	}
	open(t, o, welcome)
	seal(t, s, &Bye{})
}

func TestOpenRefusesEveryFlippedBit(t *testing.T) {
	p := newPair(t)
	s, _, _, _ := p.shake()
	later := seal(t, s, &Chunk{Job: receipt.NewJobID(), Data: []byte("x")})
	for name, c := range map[string]struct {
		frame  []byte
		opener func() *Opener
		want   error
	}{
		"first": {seal(t, p.nodeSeals(), hello), p.networkOpens, ErrSigner},
		"later": {later, func() *Opener { _, o, _, _ := p.shake(); return o }, ErrTag},
	} {
		open(t, c.opener(), c.frame) // it is good as it is
		o := c.opener()
		got := map[string]int{}
		for i := range 8 * len(c.frame) {
			bad := bytes.Clone(c.frame)
			bad[i/8] ^= 1 << (i % 8)
			m, err := o.Open(bad, at)
			got[fmt.Sprint(err)]++
			if !errors.Is(err, c.want) {
				t.Errorf("%s: bit %d flipped: Open = %v, %v; want %v", name, i, m, err, c.want)
			}
		}
		t.Logf("%s frame, %d flips: expected: %v; got: %v", name, 8*len(c.frame), c.want, got)
		for n := range c.frame {
			if _, err := o.Open(c.frame[:n], at); err == nil {
				t.Errorf("%s: truncated to %d bytes and accepted", name, n)
			}
		}
	}
}

// signed and tagged make frames around any body.
func (p *pair) signed(k *evm.Key, body string) []byte {
	sig, err := k.Sign(p.ofNode.id.hash(ToNetwork, []byte(body)))
	if err != nil {
		p.t.Fatal(err)
	}
	return append(sig[:], body...)
}

func (p *pair) tagged(d Direction, body string) []byte {
	tags := newTagger(p.ofNode, d)
	return append(bytes.Clone(tags.tag([]byte(body))), body...)
}

const (
	first  = `{"seq":1,"time":1800000000000,"type":"hello","data":{"agent":"1","config":""}}`
	second = `{"seq":2,"time":1800000000000,"type":"bye","data":{"reason":""}}`
)

func TestOpenRefusesTheFirstFrame(t *testing.T) {
	p, other := newPair(t), newPair(t)
	tooEarly, tooLate := p.nodeSeals(), p.nodeSeals()
	tooEarly.now = func() time.Time { return at.Add(61 * time.Second) }
	tooLate.now = func() time.Time { return at.Add(-61 * time.Second) }
	for _, c := range []struct {
		name  string
		frame []byte
		want  error
	}{
		{"another signer", p.signed(p.network, first), ErrSigner},
		{"another session", other.signed(p.node, first), ErrSigner},
		{"other direction", seal(t, NewSealer(p.node, p.ofNode, ToNode, now), hello), ErrSigner},
		{"a tag instead", p.tagged(ToNetwork, first), ErrSigner},
		{"a number beyond", p.signed(p.node, second), ErrSequence},
		{"fast clock", seal(t, tooEarly, hello), ErrClock},
		{"slow clock", seal(t, tooLate, hello), ErrClock},
		{"too large", make([]byte, MaxFrame+1), ErrTooLarge},
		{"empty", nil, ErrMalformed},
		{"signature alone", make([]byte, signatureSize), ErrMalformed},
	} {
		o := p.networkOpens()
		m, err := o.Open(c.frame, at)
		t.Logf("%s: expected: %v; got: %v", c.name, c.want, err)
		if !errors.Is(err, c.want) {
			t.Errorf("%s: Open = %v, %v; want %v", c.name, m, err, c.want)
		}
		if o.Signer() != (evm.Address{}) || p.ofNetwork.met.Load() {
			t.Errorf("%s: the signer counts as met", c.name)
		}
	}
	if m, err := p.networkOpens().Open(p.signed(p.node, first), at); err != nil || !reflect.DeepEqual(m, hello) || !p.ofNetwork.met.Load() {
		t.Fatalf("the good one: Open = %v, %v", m, err)
	}
}

func TestOpenRefusesLaterFrames(t *testing.T) {
	p, other := newPair(t), newPair(t)
	p.shake()
	other.shake()
	for _, c := range []struct {
		name  string
		frame []byte
		want  error
	}{
		{"good", p.tagged(ToNetwork, second), nil},
		{"wrong tag", append(make([]byte, tagSize), second...), ErrTag},
		{"tag of the other direction", p.tagged(ToNode, second), ErrTag},
		{"tag of another session", other.tagged(ToNetwork, second), ErrTag},
		{"a signature instead", p.signed(p.node, second), ErrTag},
		{"the hello again", p.signed(p.node, first), ErrTag},
		{"replay", p.tagged(ToNetwork, first), ErrSequence},
		{"gap", p.tagged(ToNetwork, strings.Replace(second, "2", "3", 1)), ErrSequence},
		{"tag alone", p.tagged(ToNetwork, ""), ErrTag},
		{"too large", make([]byte, MaxFrame+1), ErrTooLarge},
	} {
		_, o, _, _ := p.shake()
		m, err := o.Open(c.frame, at)
		t.Logf("%s: expected: %v; got: %v", c.name, c.want, err)
		if !errors.Is(err, c.want) || (m != nil) != (err == nil) {
			t.Errorf("%s: Open = %v, %v; want %v", c.name, m, err, c.want)
		}
	}
	_, o, _, _ := p.shake()
	open(t, o, p.tagged(ToNetwork, second))
	m, err := o.Open(p.tagged(ToNetwork, second), at)
	t.Logf("the same again: expected: %v; got: %v", ErrSequence, err)
	if !errors.Is(err, ErrSequence) {
		t.Errorf("the same again: Open = %v, %v; want ErrSequence", m, err)
	}
}

// How far the clocks are apart is known also of a frame that is refused for it,
// and never from one that somebody else may have written.
func TestAhead(t *testing.T) {
	p := newPair(t)
	for _, c := range []struct {
		late, want time.Duration
		err        error
	}{{5 * time.Second, 5 * time.Second, nil}, {-time.Hour, -time.Hour, ErrClock}} {
		_, o, _, _ := p.shake()
		if _, err := o.Open(p.tagged(ToNetwork, second), at.Add(c.late)); !errors.Is(err, c.err) || o.Ahead() != c.want {
			t.Errorf("%v: ahead by %v, %v", c.late, o.Ahead(), err)
		}
		before := o.Ahead()
		if _, err := o.Open(append(make([]byte, tagSize), second...), at.Add(time.Minute)); err == nil || o.Ahead() != before {
			t.Errorf("a frame of nobody's moved it to %v (%v)", o.Ahead(), err)
		}
	}
}

// A key that is no longer trusted ends the session with the next frame.
func TestRevokedKey(t *testing.T) {
	p := newPair(t)
	trust := true
	o := NewOpener(func(a evm.Address) bool { return trust && a == p.network.Address() }, p.ofNode, ToNode, time.Minute)
	s := p.networkSeals()
	open(t, p.networkOpens(), seal(t, p.nodeSeals(), hello))
	open(t, o, seal(t, s, &Welcome{}))
	open(t, o, seal(t, s, &Update{}))
	trust = false
	m, err := o.Open(seal(t, s, &Update{}), at)
	t.Logf("expected: %v; got: %v", ErrRevoked, err)
	if !errors.Is(err, ErrRevoked) {
		t.Errorf("Open = %v, %v; want ErrRevoked", m, err)
	}
}

// Whoever changes a header on the way changes the session, so that the first
// frame is refused.
func TestManInTheMiddle(t *testing.T) {
	p := newPair(t)
	node, network, mallory := NewSecret(), NewSecret(), NewSecret()
	addr := p.node.Address()
	for name, c := range map[string]struct{ toNetwork, toNode PublicKey }{
		"the node's key":    {mallory.Public(), network.Public()},
		"the network's key": {node.Public(), mallory.Public()},
		"both":              {mallory.Public(), mallory.Public()},
		// X25519 passes the highest bit over, the session does not.
		"a bit that counts for nothing": {func() PublicKey { k := node.Public(); k[31] ^= 0x80; return k }(), network.Public()},
	} {
		ofNode := agree(t, node, addr, node.Public(), c.toNode)
		ofNetwork := agree(t, network, addr, c.toNetwork, network.Public())
		if ofNode.ID() == ofNetwork.ID() {
			t.Errorf("%s: the session is the same", name)
		}
		if ofNode.keys == ofNetwork.keys {
			t.Errorf("%s: the keys are the same", name)
		}
		o := NewOpener(only(p.node), ofNetwork, ToNetwork, time.Minute)
		if m, err := o.Open(seal(t, NewSealer(p.node, ofNode, ToNetwork, now), hello), at); !errors.Is(err, ErrSigner) {
			t.Errorf("%s: the network opens %v, %v; want ErrSigner", name, m, err)
		} else {
			t.Logf("to the network, changed %s: expected: %v; got: %v", name, ErrSigner, err)
		}
		o = NewOpener(only(p.network), ofNode, ToNode, time.Minute)
		if m, err := o.Open(seal(t, NewSealer(p.network, ofNetwork, ToNode, now), &Welcome{}), at); !errors.Is(err, ErrSigner) {
			t.Errorf("%s: the node opens %v, %v; want ErrSigner", name, m, err)
		} else {
			t.Logf("to the node, changed %s: expected: %v; got: %v", name, ErrSigner, err)
		}
	}
}

func TestAgree(t *testing.T) {
	a, b := NewSecret(), NewSecret()
	base := agree(t, a, evm.Address{1}, a.Public(), b.Public())
	if same := agree(t, b, evm.Address{1}, a.Public(), b.Public()); same.ID() != base.ID() || same.keys != base.keys {
		t.Error("the two sides disagree")
	}
	if base.keys[0] == base.keys[1] {
		t.Error("both directions have the same key")
	}
	elsewhere, err := a.Agree("mainnet", evm.Address{1}, a.Public(), b.Public())
	if err != nil {
		t.Fatal(err)
	}
	for name, other := range map[string]*Session{
		"another network": elsewhere,
		"another node":    agree(t, a, evm.Address{2}, a.Public(), b.Public()),
		"turned round":    agree(t, a, evm.Address{1}, b.Public(), a.Public()),
	} {
		if other.ID() == base.ID() || other.keys == base.keys {
			t.Errorf("%s: the same session", name)
		}
	}
	for name, k := range lowOrder(t) {
		if _, err := a.Agree("testnet", evm.Address{1}, a.Public(), k); err == nil {
			t.Errorf("point of low order %s was taken from the network", name)
		}
		if _, err := a.Agree("testnet", evm.Address{1}, k, a.Public()); err == nil {
			t.Errorf("point of low order %s was taken from a node", name)
		}
	}
	if _, err := a.Agree("testnet", evm.Address{1}, a.Public(), a.Public()); err == nil {
		t.Error("our own key was taken as the peer's")
	}
	if _, err := a.Agree("testnet", evm.Address{1}, b.Public(), NewSecret().Public()); err == nil {
		t.Error("keys of others were taken")
	}
}

// lowOrder is every u-coordinate of a point whose order divides the cofactor.
func lowOrder(t *testing.T) map[string]PublicKey {
	t.Helper()
	points := map[string]PublicKey{}
	for name, h := range map[string]string{
		"0":    "0000000000000000000000000000000000000000000000000000000000000000",
		"1":    "0100000000000000000000000000000000000000000000000000000000000000",
		"8":    "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800",
		"8'":   "5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157",
		"p-1":  "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
		"p":    "edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
		"p+1":  "eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
		"0, h": "0000000000000000000000000000000000000000000000000000000000000080",
	} {
		b, err := hex.DecodeString(h)
		if err != nil {
			t.Fatal(err)
		}
		points[name] = PublicKey(b)
	}
	return points
}

func TestParsePublicKey(t *testing.T) {
	k := NewSecret().Public()
	if got, err := ParsePublicKey(k.String()); err != nil || got != k {
		t.Errorf("ParsePublicKey = %v, %v", got, err)
	}
	for _, bad := range []string{"", "00", strings.Repeat("A", 64), strings.Repeat("g", 64), k.String() + "00", " " + k.String()[1:]} {
		if _, err := ParsePublicKey(bad); err == nil {
			t.Errorf("ParsePublicKey(%q) succeeds", bad)
		}
	}
}

// An envelope has one spelling.
func TestOpenRefusesOtherSpellings(t *testing.T) {
	p := newPair(t)
	_, good, _, _ := p.shake()
	open(t, good, p.tagged(ToNetwork, second))
	job := receipt.NewJobID()
	chunk := func(data string) string {
		return `{"seq":2,"time":1800000000000,"type":"chunk","data":` + strings.ReplaceAll(data, "ID", job.String()) + `}`
	}
	result := func(data string) string { return strings.Replace(chunk(data), `"chunk"`, `"result"`, 1) }
	for name, body := range map[string]string{
		"chunk":           chunk(`{"job":"ID","offset":0,"data":"aGk="}`),
		"empty chunk":     chunk(`{"job":"ID","offset":0,"data":""}`),
		"result":          result(`{"job":"ID","response":"aGk="}`),
		"failure":         result(`{"job":"ID","code":"busy","message":"a \"\\ b"}`),
		"space in data":   `{"seq":2,"time":1800000000000,"type":"bye","data":{ "reason" : "" }}`,
		"without a field": `{"seq":2,"time":1800000000000,"type":"bye","data":{}}`,
	} {
		_, o, _, _ := p.shake()
		if _, err := o.Open(p.tagged(ToNetwork, body), at); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	for name, body := range map[string]string{
		"not JSON":               "hello",
		"empty object":           "{}",
		"space before":           " " + second,
		"space after":            second + " ",
		"line end after":         second + "\n",
		"space in the middle":    strings.Replace(second, ":2", ": 2", 1),
		"space before data":      strings.Replace(second, `"data":`, `"data": `, 1),
		"space behind data":      strings.Replace(second, `}}`, `} }`, 1),
		"another order":          `{"time":1800000000000,"seq":2,"type":"bye","data":{"reason":""}}`,
		"wrong case":             strings.Replace(second, "seq", "Seq", 1),
		"wrong case of type":     strings.Replace(second, "bye", "Bye", 1),
		"duplicate":              strings.Replace(second, `{"seq":2`, `{"seq":2,"seq":2`, 1),
		"unknown field":          strings.Replace(second, `,"type"`, `,"x":1,"type"`, 1),
		"unknown field behind":   strings.Replace(second, `}}`, `},"x":{}}`, 1),
		"something follows":      second + `{}`,
		"something follows data": strings.Replace(second, `}}`, `}{}}`, 1),
		"leading zero":           strings.Replace(second, `:2`, `:02`, 1),
		"sign":                   strings.Replace(second, `:2`, `:+2`, 1),
		"negative":               strings.Replace(second, `:2`, `:-2`, 1),
		"fraction":               strings.Replace(second, `:2`, `:2.0`, 1),
		"exponent":               strings.Replace(second, `:2`, `:2e0`, 1),
		"a string":               strings.Replace(second, `:2`, `:"2"`, 1),
		"no number":              strings.Replace(second, `:2`, `:`, 1),
		"of 64 bits":             strings.Replace(second, `:2`, `:9223372036854775808`, 1),
		"endless number":         strings.Replace(second, `:2`, `:`+strings.Repeat("2", 1<<20), 1),
		"escape in type":         strings.Replace(second, "bye", `b\u0079e`, 1),
		"unknown type":           strings.Replace(second, "bye", "zap", 1),
		"no type":                strings.Replace(second, "bye", "", 1),
		"endless type":           strings.Replace(second, `bye"`, strings.Repeat("b", 1<<20), 1),
		"wrong way":              strings.Replace(second, "bye", "welcome", 1),
		"no data":                `{"seq":2,"time":1800000000000,"type":"bye"}`,
		"null data":              strings.Replace(second, `{"reason":""}`, "null", 1),
		"a list":                 strings.Replace(second, `{"reason":""}`, "[]", 1),
		"half an object":         `{"seq":2,"time":1800000000000,"type":"bye","data":{}`,
		"unknown data field":     strings.Replace(second, "reason", "x", 1),
		"chunk: space":           chunk(`{"job":"ID", "offset":0,"data":"aGk="}`),
		"chunk: another order":   chunk(`{"offset":0,"job":"ID","data":"aGk="}`),
		"chunk: wrong case":      chunk(`{"Job":"ID","offset":0,"data":"aGk="}`),
		"chunk: duplicate":       chunk(`{"job":"ID","job":"ID","offset":0,"data":"aGk="}`),
		"chunk: unknown field":   chunk(`{"job":"ID","offset":0,"data":"aGk=","x":1}`),
		"chunk: no data":         chunk(`{"job":"ID","offset":0}`),
		"chunk: null data":       chunk(`{"job":"ID","offset":0,"data":null}`),
		"chunk: half":            chunk(`{"job":"ID","offset":0,"data":"aGk=}`),
		"chunk: negative":        chunk(`{"job":"ID","offset":-1,"data":"aGk="}`),
		"chunk: no padding":      chunk(`{"job":"ID","offset":0,"data":"aGk"}`),
		"chunk: loose bits":      chunk(`{"job":"ID","offset":0,"data":"aGl="}`),
		"chunk: line break":      chunk("{\"job\":\"ID\",\"offset\":0,\"data\":\"aG\nk=\"}"),
		"chunk: break at end":    chunk("{\"job\":\"ID\",\"offset\":0,\"data\":\"aGk=\n\"}"),
		"chunk: escape":          chunk(`{"job":"ID","offset":0,"data":"aGk\u003d"}`),
		"chunk: not base64":      chunk(`{"job":"ID","offset":0,"data":"....."}`),
		"chunk: upper case job":  strings.Replace(chunk(`{"job":"ID","offset":0,"data":"aGk="}`), job.String(), strings.Repeat("AB", 16), 1),
		"chunk: zero job":        strings.Replace(chunk(`{"job":"ID","offset":0,"data":"aGk="}`), job.String(), strings.Repeat("00", 16), 1),
		"chunk: short job":       strings.Replace(chunk(`{"job":"ID","offset":0,"data":"aGk="}`), job.String(), "ab", 1),
		"result: nothing":        result(`{}`),
		"result: space":          result(`{"job":"ID" }`),
		"result: zero job":       strings.Replace(result(`{"job":"ID"}`), job.String(), strings.Repeat("00", 16), 1),
		"result: another order":  result(`{"job":"ID","message":"a","code":"busy"}`),
		"result: wrong case":     result(`{"job":"ID","Code":"busy"}`),
		"result: duplicate":      result(`{"job":"ID","code":"busy","code":"busy"}`),
		"result: unknown field":  result(`{"job":"ID","x":1}`),
		"result: null code":      result(`{"job":"ID","code":null}`),
		"result: empty code":     result(`{"job":"ID","code":""}`),
		"result: empty message":  result(`{"job":"ID","message":""}`),
		"result: no end":         result(`{"job":"ID","message":"a\"}`),
		"result: bad escape":     result(`{"job":"ID","message":"\x"}`),
		"result: raw line end":   result("{\"job\":\"ID\",\"message\":\"\n\"}"),
		"result: empty response": result(`{"job":"ID","response":""}`),
		"result: not base64":     result(`{"job":"ID","response":"...."}`),
		"result: null receipt":   result(`{"job":"ID","receipt":null}`),
		"result: bad receipt":    result(`{"job":"ID","receipt":{}}`),
		"result: half a receipt": result(`{"job":"ID","receipt":}`),
	} {
		_, o, _, _ := p.shake()
		m, err := o.Open(p.tagged(ToNetwork, body), at)
		t.Logf("%s: expected: %v; got: %v", name, ErrMalformed, err)
		if !errors.Is(err, ErrMalformed) {
			t.Errorf("%s: Open = %v, %v; want ErrMalformed", name, m, err)
		} else if len(err.Error()) > 1000 {
			t.Errorf("%s: an error of %d bytes", name, len(err.Error()))
		}
	}
}

func newResult(t testing.TB, size int) *Result {
	t.Helper()
	k := newKey(t)
	d := digest.Of([]byte("d"))
	r := receipt.Receipt{
		Job: receipt.NewJobID(), Node: k.Address(), Measured: receipt.Measured{ConfigDigest: d, ImageDigest: d, ModelDigest: d, SandboxDigest: d, RequestHash: d, ResponseHash: d}, Claimed: receipt.Claimed{ClassDigest: d},
	}
	signed, err := r.Sign(31337, k)
	if err != nil {
		t.Fatal(err)
	}
	return &Result{Job: r.Job, Response: bytes.Repeat([]byte("r"), size), Receipt: &signed}
}

// What is written by hand is what package json writes, and reads back.
func TestHandWrittenIsJSON(t *testing.T) {
	id := receipt.NewJobID()
	for _, m := range []Message{
		&Chunk{Job: id, Data: []byte{}},
		&Chunk{Job: id, Offset: 1<<63 - 1, Data: []byte("\x00\xff<>&\"\\")},
		&Result{Job: id},
		&Result{Job: id, Code: CodeBusy, Message: "a \"quoted\" \\ <text>\n\u2028 é"},
		&Result{Job: id, Code: "\"", Message: "\\"},
		&Result{Job: id, Response: []byte("x")},
		newResult(t, 1), newResult(t, 1000),
	} {
		got, err := encode(nil, m)
		if err != nil {
			t.Fatal(err)
		}
		want, err := json.Marshal(m)
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("encode(%+v) = %s, want %s (%v)", m, got, want, err)
		}
		back, err := decode([]byte(m.Type()), ToNetwork, got)
		if bound(m); err != nil || !reflect.DeepEqual(back, m) {
			t.Errorf("decode(%s) = %+v, %v; want %+v", got, back, err, m)
		}
	}
}

func TestSealRefusesTooLargeAndGoesOn(t *testing.T) {
	p := newPair(t)
	s, o, _, _ := p.shake()
	for _, m := range []Message{&Result{Response: make([]byte, MaxFrame)}, &Bye{Reason: strings.Repeat("x", MaxFrame)}} {
		if _, err := s.Seal(nil, m); !errors.Is(err, ErrTooLarge) {
			t.Fatalf("Seal = %v, want ErrTooLarge", err)
		}
	}
	if _, err := o.Open(seal(t, s, &Bye{}), at); err != nil {
		t.Fatalf("a message that did not fit used up a number: %v", err)
	}
}

func TestRegistration(t *testing.T) {
	key := newKey(t)
	want := Registration{Network: "testnet", Node: key.Address(), Token: "t", Time: 1, Agent: "v"}
	b, err := SealRegistration(key, want)
	if err != nil {
		t.Fatal(err)
	}
	var got Registration
	if who, err := OpenRegistration(b, &got); err != nil || who != key.Address() || got != want {
		t.Fatalf("OpenRegistration = %v, %v, %+v", who, err, got)
	}
	for i := range b {
		bad := bytes.Clone(b)
		bad[i] ^= 1
		if who, err := OpenRegistration(bad, new(Registration)); err == nil && who == key.Address() {
			t.Errorf("byte %d flipped and still the node's", i)
		}
	}
	// What a peer sends does not come back at length in the error that is logged.
	long := `{"` + strings.Repeat("x", 1<<15) + `":1}`
	sig, err := key.Sign(evm.Keccak([]byte(registerDomain), []byte(long)))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := OpenRegistration(append(sig[:], long...), &got); !errors.Is(err, ErrMalformed) || len(err.Error()) > 400 {
		t.Errorf("error of %d bytes", len(fmt.Sprint(err)))
	}
}

// Texts of a peer end in logs and on terminals: wherever one is, it enters as
// one printable line of bounded length.
func TestTextsAreBounded(t *testing.T) {
	hostile := "\x1b[2J\u202e\nlevel=ERROR\x00" + strings.Repeat("é", 100_000)
	exempt := map[string]bool{
		"Job.Model": true, // compared with what is served, and then that
		// Statements, which are refused where a text is not as it should be.
		"Order": true, "OrderDone": true, "Logs": true,
		"Heartbeat.Class": true, // likewise
	}
	var walk func(name string, v reflect.Value, f func(name string, s reflect.Value))
	walk = func(name string, v reflect.Value, f func(string, reflect.Value)) {
		if exempt[name] {
			return
		}
		switch {
		case v.Type() == reflect.TypeFor[string]():
			f(name, v)
		case v.Kind() == reflect.Struct && strings.HasPrefix(v.Type().PkgPath(), "github.com/resultity/node/internal/wire"):
			for i := range v.NumField() {
				if v.Type().Field(i).IsExported() {
					walk(name+"."+v.Type().Field(i).Name, v.Field(i), f)
				}
			}
		case v.Kind() == reflect.Pointer && strings.HasPrefix(v.Type().Elem().PkgPath(), "github.com/resultity/node/internal/wire"):
			if v.IsNil() {
				v.Set(reflect.New(v.Type().Elem()))
			}
			walk(name, v.Elem(), f)
		case v.Kind() == reflect.Slice && (v.Type().Elem().Kind() == reflect.String || v.Type().Elem().Kind() == reflect.Struct):
			if v.Len() == 0 {
				v.Set(reflect.MakeSlice(v.Type(), 1, 1))
			}
			walk(name+"[]", v.Index(0), f)
		}
	}
	n, longest := 0, 0
	for typ, newMessage := range messages {
		m := newMessage()
		v := reflect.ValueOf(m).Elem()
		before := n
		walk(v.Type().Name(), v, func(_ string, s reflect.Value) { s.SetString(hostile); n++ })
		if n == before {
			continue
		}
		for _, name := range []string{"Job", "ID"} {
			if id := v.FieldByName(name); id.IsValid() && id.Type() == reflect.TypeFor[receipt.JobID]() {
				id.Set(reflect.ValueOf(receipt.NewJobID()))
			}
		}
		if r, ok := m.(*Result); ok {
			r.Code = CodeBusy
		}
		raw, err := json.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		got, err := decode([]byte(typ), m.direction(), raw)
		if err != nil {
			t.Fatalf("%s: %v", typ, err)
		}
		v = reflect.ValueOf(got).Elem()
		walk(v.Type().Name(), v, func(name string, s reflect.Value) {
			longest = max(longest, len(s.String()))
			if text := s.String(); len(text) > MaxText || Printable(text) != text || !utf8.ValidString(text) {
				t.Errorf("%s enters with %d bytes: %.40q", name, len(text), text)
			}
		})
	}
	t.Logf("expected: printable, at most %d bytes of %d; got: %d texts of at most %d bytes", MaxText, len(hostile), n, longest)
	if n < 15 {
		t.Errorf("only %d texts were looked at", n)
	}
	key := newKey(t)
	raw, err := SealRegistration(key, &Registered{Account: hostile[:1000]})
	if err != nil {
		t.Fatal(err)
	}
	var reg Registered
	if _, err := OpenRegistration(raw, &reg); err != nil || len(reg.Account) > MaxText || Printable(reg.Account) != reg.Account {
		t.Errorf("an account of %d bytes, %v", len(reg.Account), err)
	}
}

// Every type is listed, so that none can be sent that cannot be received.
func TestEveryTypeDecodes(t *testing.T) {
	for typ, f := range messages {
		m := f()
		if m.Type() != typ {
			t.Errorf("%s is listed as %s", m.Type(), typ)
		}
		if _, err := decode([]byte(typ), 3, []byte("{}")); !errors.Is(err, ErrMalformed) {
			t.Errorf("%s accepted from nowhere", typ)
		}
	}
}

// Whatever body the node itself tags, the network takes it or refuses it; what
// it takes is spelt in the one way.
func FuzzOpen(f *testing.F) {
	p := newPair(f)
	_, met, _, _ := p.shake()
	f.Add([]byte(second))
	_, head, leaves := grown(f, 3)
	for _, m := range []Message{
		&Chunk{Job: receipt.NewJobID(), Data: []byte("hi")}, newResult(f, 10), &Heartbeat{}, &Refuse{Job: receipt.NewJobID(), Code: CodeBusy}, &Heartbeat{Head: head}, &Leaves{From: 5, Leaves: leaves},
	} {
		s, _, _, _ := p.shake()
		f.Add(seal(f, s, m)[tagSize:])
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		o := *met
		m, err := o.Open(p.tagged(ToNetwork, string(body)), at)
		if err != nil {
			return
		}
		if m.direction() != ToNetwork {
			t.Fatalf("%T the wrong way", m)
		}
		e, err := parseEnvelope(body)
		if err != nil {
			t.Fatal(err)
		}
		if want := fmt.Sprintf(`{"seq":%d,"time":%d,"type":"%s","data":%s}`, e.seq, e.time, e.typ, e.data); want != string(body) {
			t.Fatalf("%q was taken for %q", body, want)
		}
		if c, ok := m.(*Chunk); ok && !bytes.Equal(c.append(nil), e.data) {
			t.Fatalf("%q was taken for %q", e.data, c.append(nil))
		}
	})
}

// A frame that was changed anywhere is refused.
func FuzzFlip(f *testing.F) {
	p := newPair(f)
	s, met, _, _ := p.shake()
	frames := [][]byte{seal(f, p.nodeSeals(), hello), seal(f, s, &Chunk{Job: receipt.NewJobID(), Data: []byte("hi")})}
	f.Add(true, uint(3), []byte{1})
	f.Add(false, uint(100), []byte{0, 0xff})
	f.Fuzz(func(t *testing.T, later bool, at uint, mask []byte) {
		frame, o, want := frames[0], p.networkOpens(), ErrSigner
		if later {
			again := *met
			frame, o, want = frames[1], &again, ErrTag
		}
		bad := bytes.Clone(frame)
		for i, m := range mask[:min(len(mask), len(bad))] {
			bad[(at%uint(len(bad))+uint(i))%uint(len(bad))] ^= m
		}
		if _, err := o.Open(bad, now()); !bytes.Equal(bad, frame) && !errors.Is(err, want) {
			t.Fatalf("Open = %v, want %v", err, want)
		}
	})
}

// What a token of a stream and a plain answer cost each way.
func BenchmarkFrame(b *testing.B) {
	p := newPair(b)
	for _, c := range []struct {
		name string
		m    Message
	}{
		{"hello", hello},
		{"chunk of 200 B", &Chunk{Job: receipt.NewJobID(), Data: make([]byte, 200)}},
		{"result of 4 KiB", newResult(b, 4<<10)},
		{"result of 64 KiB", newResult(b, 64<<10)},
	} {
		s, o, _, _ := p.shake()
		if c.m == hello {
			s, o = p.nodeSeals(), p.networkOpens()
		}
		start := *s
		frame := seal(b, s, c.m)
		b.Run("seal "+c.name, func(b *testing.B) {
			b.ReportAllocs()
			buf := make([]byte, 0, len(frame))
			for b.Loop() {
				s := start
				if _, err := s.Seal(buf, c.m); err != nil {
					b.Fatal(err)
				}
			}
		})
		b.Run("open "+c.name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				o := *o
				if _, err := o.Open(frame, at); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// The bounds on what a token allocates: its frame's buffer is the caller's.
func TestAllocations(t *testing.T) {
	p := newPair(t)
	s, o, _, _ := p.shake()
	var m Message = &Chunk{Job: receipt.NewJobID(), Data: make([]byte, 200)}
	frame := seal(t, s, m)
	buf := make([]byte, 0, 1024)
	if n := testing.AllocsPerRun(100, func() {
		if _, err := s.Seal(buf, m); err != nil {
			t.Error(err)
		}
	}); n > 0 {
		t.Errorf("Seal of a chunk allocates %v times, want 0", n)
	}
	if n := testing.AllocsPerRun(100, func() {
		o := *o
		if _, err := o.Open(frame, at); err != nil {
			t.Error(err)
		}
	}); n > 4 { // the opener's copy, the job's name, the message and its data
		t.Errorf("Open of a chunk allocates %v times, want 4 at most", n)
	}
}
