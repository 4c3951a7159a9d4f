package wire

import (
	"bytes"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"strconv"
	"time"

	"github.com/resultity/node/internal/evm"
)

// Sizes of what a frame begins with, in bytes.
const (
	signatureSize = len(evm.Signature{}) // of the first frame
	tagSize       = sha256.Size          // of every later one
)

var errNotMet = errors.New("the peer has not shown yet who it is")

// tagger makes the tags of one direction.
type tagger struct {
	mac hash.Hash
	sum [tagSize]byte
}

func newTagger(s *Session, d Direction) tagger {
	return tagger{mac: hmac.New(sha256.New, s.tagKey(d))}
}

// tag returns the tag of a body. It is valid until the next call.
func (t *tagger) tag(body []byte) []byte {
	t.mac.Reset()
	t.mac.Write(body)
	return t.mac.Sum(t.sum[:0])
}

// Sealer makes the frames of one direction of one session. Not safe for
// concurrent use: the order of calls is the order on the wire.
type Sealer struct {
	first   func(buf []byte, m Message) ([]byte, error) // makes the first frame, which is signed
	session *Session
	now     func() time.Time
	tags    tagger
	seq     uint64
}

// NewSealer begins a direction; its first frame has sequence number 1 and is
// signed with key. The key is not asked again.
func NewSealer(key signer, session *Session, dir Direction, now func() time.Time) *Sealer {
	s := &Sealer{session: session, now: now, tags: newTagger(session, dir)}
	s.first = func(buf []byte, m Message) ([]byte, error) { return sealFirst(buf, key, session.id, dir, m, s.now()) }
	return s
}

// NewNodeSealer begins the direction to the network for a node whose key is not
// at hand: hello makes its first frame, as [SealHello] does.
func NewNodeSealer(hello func(Terms, Hello, time.Time) ([]byte, error), session *Session, now func() time.Time) *Sealer {
	s := &Sealer{session: session, now: now, tags: newTagger(session, ToNetwork)}
	s.first = func(buf []byte, m Message) ([]byte, error) {
		h, ok := m.(*Hello)
		if !ok {
			return nil, fmt.Errorf("%s before hello", m.Type())
		}
		frame, err := hello(session.terms, *h, s.now())
		return append(buf, frame...), err
	}
	return s
}

// SealHello makes the first frame of a node.
func SealHello(key signer, t Terms, h Hello, at time.Time) ([]byte, error) {
	return sealFirst(nil, key, t.ID(), ToNetwork, &h, at)
}

// sealFirst appends the first frame of a direction.
func sealFirst(buf []byte, key signer, id ID, dir Direction, m Message, at time.Time) ([]byte, error) {
	buf, frame, err := begin(buf, signatureSize, 1, m, at)
	if err != nil {
		return nil, err
	}
	sig, err := key.Sign(id.hash(dir, frame[signatureSize:]))
	if err != nil {
		return nil, err
	}
	copy(frame, sig[:])
	return buf, nil
}

// begin appends a frame to buf, which may be nil, with room for its proof. It
// returns the longer buf and the frame at its end.
func begin(buf []byte, proof int, seq uint64, m Message, at time.Time) (_, frame []byte, err error) {
	start := len(buf)
	var room [signatureSize]byte
	buf = append(buf, room[:proof]...)
	buf = append(buf, `{"seq":`...)
	buf = strconv.AppendUint(buf, seq, 10)
	buf = append(buf, `,"time":`...)
	buf = strconv.AppendInt(buf, at.UnixMilli(), 10)
	buf = append(buf, `,"type":"`...)
	buf = append(buf, m.Type()...)
	buf = append(buf, `","data":`...)
	if buf, err = encode(buf, m); err != nil {
		return nil, nil, err
	}
	buf = append(buf, '}')
	if frame = buf[start:]; len(frame) > MaxFrame {
		return nil, nil, fmt.Errorf("%w: %s of %d bytes, at most %d", ErrTooLarge, m.Type(), len(frame), MaxFrame)
	}
	return buf, frame, nil
}

// Seal appends the next frame to buf, which may be nil. A message that does not
// fit fails with [ErrTooLarge] and uses no sequence number. Frames after the
// first need the peer's first one to have been opened: before that, nobody knows
// who else holds the keys.
func (s *Sealer) Seal(buf []byte, m Message) ([]byte, error) {
	switch {
	case s.seq == 0:
		buf, err := s.first(buf, m)
		if err == nil {
			s.seq++
		}
		return buf, err
	case !s.session.met.Load():
		return nil, errNotMet
	}
	buf, frame, err := begin(buf, tagSize, s.seq+1, m, s.now())
	if err != nil {
		return nil, err
	}
	copy(frame, s.tags.tag(frame[tagSize:]))
	s.seq++
	return buf, nil
}

// encode appends a message's data.
func encode(buf []byte, m Message) ([]byte, error) {
	switch m := m.(type) {
	case *Chunk:
		return m.append(buf), nil
	case *Result:
		return m.AppendJSON(buf)
	}
	w := appender{buf}
	if err := json.NewEncoder(&w).Encode(m); err != nil {
		return nil, err
	}
	return bytes.TrimSuffix(w.b, []byte("\n")), nil
}

type appender struct{ b []byte }

func (w *appender) Write(p []byte) (int, error) {
	w.b = append(w.b, p...)
	return len(p), nil
}

// Opener checks the frames of one direction of one session. Not safe for
// concurrent use.
type Opener struct {
	trusted func(evm.Address) bool
	session *Session
	dir     Direction
	window  time.Duration
	tags    tagger
	seq     uint64
	signer  evm.Address // of the first frame
	ahead   time.Duration
}

// Ahead is how far this machine's clock was ahead of the sender's at the last
// frame that was the sender's, also of one that was refused for that.
func (o *Opener) Ahead() time.Duration { return o.ahead }

// NewOpener begins a direction. trusted says which keys may sign its first
// frame, and is asked again, about the key that did, for each later one; window
// is how far the sender's clock may be off.
func NewOpener(trusted func(evm.Address) bool, session *Session, dir Direction, window time.Duration) *Opener {
	return &Opener{trusted: trusted, session: session, dir: dir, window: window, tags: newTagger(session, dir)}
}

// Signer returns the key that signed the first frame, once that is open.
func (o *Opener) Signer() evm.Address { return o.signer }

// Open checks a frame and returns its message, which does not refer to frame.
// The signature or the tag is checked over the received bytes before anything
// looks inside. Any error ends the session.
//
// begun is when the frame began to arrive. A large one may take longer on a slow
// link than clocks may differ, and that says nothing about clocks.
func (o *Opener) Open(frame []byte, begun time.Time) (Message, error) {
	proof := tagSize
	if o.seq == 0 {
		proof = signatureSize
	}
	switch {
	case len(frame) > MaxFrame:
		return nil, fmt.Errorf("%w: %d bytes, at most %d", ErrTooLarge, len(frame), MaxFrame)
	case len(frame) <= proof && o.seq > 0:
		return nil, fmt.Errorf("%w: of %d bytes", ErrTag, len(frame))
	case len(frame) <= proof:
		return nil, fmt.Errorf("%w: %d bytes", ErrMalformed, len(frame))
	}
	body, who := frame[proof:], o.signer
	if o.seq == 0 {
		var err error
		if who, err = evm.Recover(o.session.id.hash(o.dir, body), evm.Signature(frame[:proof])); err != nil {
			return nil, fmt.Errorf("%w: %w", ErrSigner, err)
		}
		if !o.trusted(who) {
			return nil, fmt.Errorf("%w: %s (or its bytes were changed, or it belongs to another session)", ErrSigner, who)
		}
	} else {
		if !hmac.Equal(frame[:proof], o.tags.tag(body)) {
			return nil, ErrTag
		}
		if !o.trusted(who) {
			return nil, fmt.Errorf("%w: %s", ErrRevoked, who)
		}
	}
	e, err := parseEnvelope(body)
	if err != nil {
		return nil, err
	}
	if e.seq != o.seq+1 {
		return nil, fmt.Errorf("%w: number %d, want %d", ErrSequence, e.seq, o.seq+1)
	}
	o.ahead = begun.Sub(time.UnixMilli(e.time))
	if off := o.ahead.Abs(); off > o.window {
		return nil, fmt.Errorf("%w: %v apart, at most %v", ErrClock, off.Round(time.Millisecond), o.window)
	}
	m, err := decode(e.typ, o.dir, e.data)
	if err != nil {
		return nil, err
	}
	o.seq++
	o.signer = who
	o.session.met.Store(true)
	return m, nil
}

// envelope is the body of a frame. Its parts refer to the frame.
type envelope struct {
	seq  uint64
	time int64 // Unix milliseconds
	typ  []byte
	data []byte // a JSON object, as far as its ends show
}

// parseEnvelope reads the one spelling that [Sealer.Seal] writes.
func parseEnvelope(body []byte) (envelope, error) {
	t := text{rest: body}
	t.want(`{"seq":`)
	seq := t.number()
	t.want(`,"time":`)
	at := t.number()
	t.want(`,"type":"`)
	typ := t.plain()
	t.want(`","data":`)
	data, ok := bytes.CutSuffix(t.rest, []byte("}"))
	if t.bad || !ok {
		return envelope{}, fmt.Errorf("%w: its envelope is not spelt as the protocol says", ErrMalformed)
	}
	if len(data) < 2 || data[0] != '{' || data[len(data)-1] != '}' {
		return envelope{}, fmt.Errorf("%w: data of %.40q is not an object", ErrMalformed, typ)
	}
	return envelope{seq: seq, time: int64(at), typ: typ, data: data}, nil
}

// text reads what has one spelling, from its beginning. Once it is bad, nothing
// that it returns means anything.
type text struct {
	rest []byte
	bad  bool
}

// skip takes a literal if it comes next.
func (t *text) skip(literal string) bool {
	if len(t.rest) < len(literal) || string(t.rest[:len(literal)]) != literal {
		return false
	}
	t.rest = t.rest[len(literal):]
	return true
}

// want takes a literal that must come next.
func (t *text) want(literal string) {
	if !t.skip(literal) {
		t.bad = true
	}
}

// number takes a decimal without sign and without leading zeros, of 63 bits.
func (t *text) number() uint64 {
	n := 0
	for n < len(t.rest) && '0' <= t.rest[n] && t.rest[n] <= '9' {
		n++
	}
	v, err := strconv.ParseUint(string(t.rest[:min(n, 20)]), 10, 63)
	if err != nil || n > 1 && t.rest[0] == '0' || n > 20 {
		t.bad = true
	}
	t.rest = t.rest[n:]
	return v
}

// plain takes all before the next quote. There are no escapes in what it is for.
func (t *text) plain() []byte {
	n := bytes.IndexByte(t.rest, '"')
	if n < 0 {
		t.bad = true
		return nil
	}
	b := t.rest[:n]
	t.rest = t.rest[n:]
	return b
}
