package wire

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strconv"

	"github.com/resultity/node/internal/evm"
)

// Constants of the protocol; doc.go says what they mean.
const (
	Subprotocol  = "resultity.v1"
	SessionPath  = "/node/v1/session"
	RegisterPath = "/node/v1/register"
	BindPath     = "/node/v1/binding"

	HeaderNode    = "Resultity-Node"
	HeaderKey     = "Resultity-Key"
	HeaderNetwork = "Resultity-Network"

	// MaxFrame bounds a WebSocket message in bytes, proof included. Both
	// sides set it as their read limit, so that a larger one is never held.
	MaxFrame = 24 << 20

	// MaxRegistration bounds the body of a registration or of a request about a
	// binding, in bytes, signature included.
	MaxRegistration = 64 << 10

	sessionDomain  = "resultity.v1 session\n"
	frameDomain    = "resultity.v1 frame\n"
	tagDomain      = "resultity.v1 tag\n"
	registerDomain = "resultity.v1 register\n"
	bindDomain     = "resultity.v1 binding\n"
)

// Errors of the frame layer. Each ends the session: after one of them nothing
// that the peer says can be placed.
var (
	ErrTooLarge  = errors.New("frame too large")
	ErrMalformed = errors.New("malformed frame")
	ErrSigner    = errors.New("frame signed by somebody else")
	ErrTag       = errors.New("frame without the session's tag: changed on its way, or not of this session")
	ErrRevoked   = errors.New("the key that signed this session's first frame is no longer trusted")
	ErrSequence  = errors.New("frame replayed or out of order")
	ErrClock     = errors.New("clocks differ by more than the protocol allows; check that both machines keep time (timedatectl)")
)

// Direction tells the two halves of a session apart, so that a frame cannot be
// sent back to its sender.
type Direction byte

// The two directions.
const (
	ToNetwork Direction = 1
	ToNode    Direction = 2
)

// signer is what the frame layer needs of a key.
type signer interface {
	Sign(evm.Hash) (evm.Signature, error)
}

// strict is parse for what is no message. It fails with [ErrMalformed].
func strict(b []byte, v any) error { return malformed(parse(b, v)) }

// parse decodes exactly one JSON value without unknown fields.
func parse(b []byte, v any) error {
	dec := json.NewDecoder(bytes.NewReader(b))
	dec.DisallowUnknownFields()
	if err := dec.Decode(v); err != nil {
		return err
	}
	if _, err := dec.Token(); err != io.EOF {
		return errors.New("something follows the body")
	}
	return nil
}

// malformed makes an error of one about text that the peer wrote, some of which
// it may quote: of any length, and this ends in logs.
func malformed(err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%w: %.300s", ErrMalformed, strconv.QuoteToASCII(err.Error()))
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
	if len(b) <= len(sig) || len(b) > MaxRegistration {
		return evm.Address{}, fmt.Errorf("%w: a body of %d bytes, at most %d", ErrMalformed, len(b), MaxRegistration)
	}
	raw := b[copy(sig[:], b):]
	who, err := evm.Recover(evm.Keccak([]byte(domain), raw), sig)
	if err != nil {
		return evm.Address{}, fmt.Errorf("%w: %w", ErrSigner, err)
	}
	err = strict(raw, body)
	bound(body)
	return who, err
}
