package wire

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/resultity/node/internal/evm"
)

// Constants of the protocol; doc.go says what they mean.
const (
	Subprotocol  = "resultity.v1"
	SessionPath  = "/node/v1/session"
	RegisterPath = "/node/v1/register"
	BindPath     = "/node/v1/binding"

	HeaderNode    = "Resultity-Node"
	HeaderNonce   = "Resultity-Nonce"
	HeaderNetwork = "Resultity-Network"

	// MaxFrame bounds a WebSocket message in bytes, signature included. Both
	// sides set it as their read limit, so that a larger one is never held.
	MaxFrame = 24 << 20

	sessionDomain  = "resultity.v1 session\n"
	frameDomain    = "resultity.v1 frame\n"
	registerDomain = "resultity.v1 register\n"
	bindDomain     = "resultity.v1 binding\n"
)

// Errors of the frame layer. Each ends the session: after one of them nothing
// that the peer says can be placed.
var (
	ErrTooLarge  = errors.New("frame too large")
	ErrMalformed = errors.New("malformed frame")
	ErrSigner    = errors.New("frame signed by somebody else")
	ErrSequence  = errors.New("frame replayed or out of order")
	ErrClock     = errors.New("clocks differ by more than the protocol allows; check that both machines keep time (timedatectl)")
)

// Nonce is 32 random bytes of one side of a session, or of the session itself.
type Nonce [32]byte

// ParseNonce reads 64 lower-case hexadecimal digits.
func ParseNonce(s string) (Nonce, error) {
	var n Nonce
	b, err := hex.DecodeString(s)
	if err != nil || len(b) != len(n) || hex.EncodeToString(b) != s {
		return Nonce{}, fmt.Errorf("nonce %.80q: want %d lower-case hexadecimal digits", s, 2*len(n))
	}
	return Nonce(b), nil
}

// String prints 64 lower-case hexadecimal digits.
func (n Nonce) String() string { return hex.EncodeToString(n[:]) }

// SessionNonce binds a session to its network, its node and to randomness of
// both sides, so that neither can be made to take frames of another session.
func SessionNonce(network string, node evm.Address, ofNode, ofNetwork Nonce) Nonce {
	name := evm.Keccak([]byte(network))
	return Nonce(evm.Keccak([]byte(sessionDomain), name[:], node[:], ofNode[:], ofNetwork[:]))
}

// Direction tells the two halves of a session apart, so that a frame cannot be
// sent back to its sender.
type Direction byte

// The two directions.
const (
	ToNetwork Direction = 1
	ToNode    Direction = 2
)

func signingHash(n Nonce, d Direction, body []byte) evm.Hash {
	return evm.Keccak([]byte(frameDomain), n[:], []byte{byte(d)}, body)
}

// signer is what the frame layer needs of a key.
type signer interface {
	Sign(evm.Hash) (evm.Signature, error)
}

// envelope is the JSON body of a frame.
type envelope struct {
	Seq  uint64          `json:"seq"`
	Time int64           `json:"time"` // Unix milliseconds
	Type Type            `json:"type"`
	Data json.RawMessage `json:"data"`
}

// Sealer makes the frames of one direction of one session. Not safe for
// concurrent use: the order of calls is the order on the wire.
type Sealer struct {
	key   signer
	nonce Nonce
	dir   Direction
	now   func() time.Time
	seq   uint64
}

// NewSealer begins a direction; its first frame has sequence number 1.
func NewSealer(key signer, nonce Nonce, dir Direction, now func() time.Time) *Sealer {
	return &Sealer{key: key, nonce: nonce, dir: dir, now: now}
}

// Seal makes the next frame. A message that does not fit fails with
// [ErrTooLarge] and uses no sequence number.
func (s *Sealer) Seal(m Message) ([]byte, error) {
	data, err := json.Marshal(m)
	if err != nil {
		return nil, err
	}
	body, err := json.Marshal(envelope{Seq: s.seq + 1, Time: s.now().UnixMilli(), Type: m.Type(), Data: data})
	if err != nil {
		return nil, err
	}
	if len(body)+len(evm.Signature{}) > MaxFrame {
		return nil, fmt.Errorf("%w: %s of %d bytes, at most %d", ErrTooLarge, m.Type(), len(body), MaxFrame)
	}
	sig, err := s.key.Sign(signingHash(s.nonce, s.dir, body))
	if err != nil {
		return nil, err
	}
	s.seq++
	return append(sig[:], body...), nil
}

// Opener checks the frames of one direction of one session. Not safe for
// concurrent use.
type Opener struct {
	trusted func(evm.Address) bool
	nonce   Nonce
	dir     Direction
	window  time.Duration
	seq     uint64
	ahead   time.Duration
}

// Ahead is how far this machine's clock was ahead of the sender's at the last
// frame that was signed as it must be, also of one that was refused for that.
func (o *Opener) Ahead() time.Duration { return o.ahead }

// NewOpener begins a direction. trusted says which keys may sign; window is how
// far the sender's clock may be off.
func NewOpener(trusted func(evm.Address) bool, nonce Nonce, dir Direction, window time.Duration) *Opener {
	return &Opener{trusted: trusted, nonce: nonce, dir: dir, window: window}
}

// Open checks a frame and returns its message. The signature is checked over
// the received bytes before anything looks inside. Any error ends the session.
//
// begun is when the frame began to arrive. A large one may take longer on a slow
// link than clocks may differ, and that says nothing about clocks.
func (o *Opener) Open(frame []byte, begun time.Time) (Message, error) {
	var sig evm.Signature
	switch {
	case len(frame) > MaxFrame:
		return nil, fmt.Errorf("%w: %d bytes, at most %d", ErrTooLarge, len(frame), MaxFrame)
	case len(frame) <= len(sig):
		return nil, fmt.Errorf("%w: %d bytes", ErrMalformed, len(frame))
	}
	body := frame[copy(sig[:], frame):]
	who, err := evm.Recover(signingHash(o.nonce, o.dir, body), sig)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrSigner, err)
	}
	if !o.trusted(who) {
		return nil, fmt.Errorf("%w: %s (or its bytes were changed, or it belongs to another session)", ErrSigner, who)
	}
	var e envelope
	if err := strict(body, &e); err != nil {
		return nil, err
	}
	if e.Seq != o.seq+1 {
		return nil, fmt.Errorf("%w: number %d, want %d", ErrSequence, e.Seq, o.seq+1)
	}
	o.ahead = begun.Sub(time.UnixMilli(e.Time))
	if off := o.ahead.Abs(); off > o.window {
		return nil, fmt.Errorf("%w: %v apart, at most %v", ErrClock, off.Round(time.Millisecond), o.window)
	}
	m, err := decode(e.Type, o.dir, e.Data)
	if err != nil {
		return nil, err
	}
	o.seq++
	return m, nil
}

// strict decodes exactly one JSON value without unknown fields.
func strict(b []byte, v any) error {
	dec := json.NewDecoder(bytes.NewReader(b))
	dec.DisallowUnknownFields()
	if err := dec.Decode(v); err != nil {
		// The decoder quotes what it was sent; that is the sender's text, of any
		// length, and this ends in logs.
		return fmt.Errorf("%w: %.200q", ErrMalformed, err.Error())
	}
	if _, err := dec.Token(); err != io.EOF {
		return fmt.Errorf("%w: something follows the body", ErrMalformed)
	}
	return nil
}

// SealRegistration signs the body of a registration request or reply.
func SealRegistration(key signer, body any) ([]byte, error) {
	return sealBody(key, registerDomain, body)
}

// OpenRegistration checks a sealed registration into body and returns its
// signer, which the caller compares with who it should be.
func OpenRegistration(b []byte, body any) (evm.Address, error) {
	return openBody(b, registerDomain, body)
}

// SealBinding and OpenBinding are the same for requests about a binding. The
// domains differ, so that neither can be shown as the other.
func SealBinding(key signer, body any) ([]byte, error) { return sealBody(key, bindDomain, body) }

// OpenBinding is described at [SealBinding].
func OpenBinding(b []byte, body any) (evm.Address, error) { return openBody(b, bindDomain, body) }

func sealBody(key signer, domain string, body any) ([]byte, error) {
	b, err := json.Marshal(body)
	if err != nil {
		return nil, err
	}
	sig, err := key.Sign(evm.Keccak([]byte(domain), b))
	if err != nil {
		return nil, err
	}
	return append(sig[:], b...), nil
}

func openBody(b []byte, domain string, body any) (evm.Address, error) {
	var sig evm.Signature
	if len(b) <= len(sig) || len(b) > 64<<10 {
		return evm.Address{}, fmt.Errorf("%w: a body of %d bytes", ErrMalformed, len(b))
	}
	raw := b[copy(sig[:], b):]
	who, err := evm.Recover(evm.Keccak([]byte(domain), raw), sig)
	if err != nil {
		return evm.Address{}, fmt.Errorf("%w: %w", ErrSigner, err)
	}
	return who, strict(raw, body)
}
