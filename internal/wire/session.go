package wire

import (
	"crypto/ecdh"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"sync/atomic"

	"github.com/resultity/node/internal/evm"
)

// PublicKey is one side's X25519 key of one session. It is fresh, so it is that
// side's nonce, too.
type PublicKey [32]byte

// ParsePublicKey reads 64 lower-case hexadecimal digits.
func ParsePublicKey(s string) (PublicKey, error) {
	var k PublicKey
	b, err := hex.DecodeString(s)
	if err != nil || len(b) != len(k) || hex.EncodeToString(b) != s {
		return PublicKey{}, fmt.Errorf("key %.80q: want %d lower-case hexadecimal digits", s, 2*len(k))
	}
	return PublicKey(b), nil
}

// String prints 64 lower-case hexadecimal digits.
func (k PublicKey) String() string { return hex.EncodeToString(k[:]) }

// Secret is the private half of a [PublicKey]. It serves one session: use it
// once, and drop it.
type Secret struct{ key *ecdh.PrivateKey }

// NewSecret makes one from the system's randomness.
func NewSecret() *Secret {
	key, err := ecdh.X25519().GenerateKey(rand.Reader)
	if err != nil {
		panic(err) // crypto/rand never fails: it ends the program instead
	}
	return &Secret{key}
}

// Public returns the half that the peer is told.
func (s *Secret) Public() PublicKey { return PublicKey(s.key.PublicKey().Bytes()) }

// ID names a session. It binds the session to its network, its node and to
// randomness of both sides, so that neither can be made to take frames of
// another one.
type ID [32]byte

// String prints 64 lower-case hexadecimal digits.
func (id ID) String() string { return hex.EncodeToString(id[:]) }

// Terms are what a session is about, and all that its name is made of.
type Terms struct {
	Network           string
	Node              evm.Address
	OfNode, OfNetwork PublicKey
}

// ID returns the session's name.
func (t *Terms) ID() ID {
	name := evm.Keccak([]byte(t.Network))
	return ID(evm.Keccak([]byte(sessionDomain), name[:], t.Node[:], t.OfNode[:], t.OfNetwork[:]))
}

// Session is what both sides know of one session. Its keys are known to whoever
// holds one of the two secrets; that those are the node and the network is known
// once the first frames have been checked. Safe for concurrent use.
type Session struct {
	terms Terms
	id    ID                   // the terms'
	keys  [2][sha256.Size]byte // of the tags, by direction
	met   atomic.Bool          // the peer's first frame has been checked
}

// Agree makes the session of the two keys, one of which is that of the secret.
// It fails for a key that would give away the session's secret.
func (s *Secret) Agree(network string, node evm.Address, ofNode, ofNetwork PublicKey) (*Session, error) {
	theirs := ofNetwork
	switch own := s.Public(); {
	case ofNode == ofNetwork:
		return nil, errors.New("both sides have the same key")
	case own == ofNetwork:
		theirs = ofNode
	case own != ofNode:
		return nil, errors.New("neither key is that of the secret")
	}
	peer, err := ecdh.X25519().NewPublicKey(theirs[:])
	if err != nil {
		return nil, err
	}
	shared, err := s.key.ECDH(peer) // refuses points of low order
	if err != nil {
		return nil, err
	}
	defer clear(shared)
	session := &Session{terms: Terms{Network: network, Node: node, OfNode: ofNode, OfNetwork: ofNetwork}}
	session.id = session.terms.ID()
	for _, d := range []Direction{ToNetwork, ToNode} {
		key, err := hkdf.Key(sha256.New, shared, session.id[:], tagDomain+string([]byte{byte(d)}), sha256.Size)
		if err != nil {
			return nil, err
		}
		copy(session.tagKey(d), key)
		clear(key)
	}
	return session, nil
}

// ID returns the session's name.
func (s *Session) ID() ID { return s.id }

// Terms returns what the session is about.
func (s *Session) Terms() Terms { return s.terms }

func (s *Session) tagKey(d Direction) []byte { return s.keys[d-1][:] }

// hash is what the first frame of a direction signs.
func (id ID) hash(d Direction, body []byte) evm.Hash {
	return evm.Keccak([]byte(frameDomain), id[:], []byte{byte(d)}, body)
}
