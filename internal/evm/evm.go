// Package evm owns secp256k1 keys, addresses and signatures in the form that
// EVM wallets and contracts use. It is the only user of go-ethereum's crypto.
//
// Every signature is over a 32-byte hash made by a caller that bound it to one
// purpose (a domain string or an EIP-712 domain); this package never hashes a
// message on its own, so it cannot be made to sign one thing as another.
package evm

import (
	"crypto/ecdsa"
	"encoding/hex"
	"errors"
	"fmt"
	"math/big"
	"strings"

	"github.com/ethereum/go-ethereum/common"
	"github.com/ethereum/go-ethereum/crypto"
)

// Address is the 20-byte account address: the identity of a node or a key.
type Address = common.Address

// Hash is a 32-byte Keccak-256.
type Hash = common.Hash

// ErrSignature says that a signature is malformed or not by who it should be.
var ErrSignature = errors.New("bad signature")

// Keccak returns the Keccak-256 of the concatenation of parts.
func Keccak(parts ...[]byte) Hash { return crypto.Keccak256Hash(parts...) }

// ParseAddress reads "0x" and 40 hexadecimal digits: all lower case, or with a
// correct EIP-55 checksum. Mixed case without the checksum is refused, since
// that is how a typing error shows.
func ParseAddress(s string) (Address, error) {
	h, ok := strings.CutPrefix(s, "0x")
	if !ok || len(h) != 2*common.AddressLength {
		return Address{}, fmt.Errorf("address %.60q: want 0x and 40 hexadecimal digits", s)
	}
	b, err := hex.DecodeString(h)
	if err != nil {
		return Address{}, fmt.Errorf("address %.60q: %w", s, err)
	}
	a := Address(b)
	if h != strings.ToLower(h) && s != a.Hex() {
		return Address{}, fmt.Errorf("address %.60q: wrong checksum (EIP-55), check for a typing error", s)
	}
	return a, nil
}

// Signature is r, s and v (27 or 28) in 65 bytes, with s in the lower half of
// the group order (EIP-2): one spelling per signature.
type Signature [65]byte

// ParseSignature reads "0x" and 130 hexadecimal digits.
func ParseSignature(s string) (Signature, error) {
	var sig Signature
	h, ok := strings.CutPrefix(s, "0x")
	if !ok || len(h) != 2*len(sig) {
		return Signature{}, fmt.Errorf("%w: want 0x and 130 hexadecimal digits", ErrSignature)
	}
	if _, err := hex.Decode(sig[:], []byte(h)); err != nil {
		return Signature{}, fmt.Errorf("%w: %v", ErrSignature, err)
	}
	return sig, nil
}

// String prints 0x and 130 lower-case hexadecimal digits.
func (s Signature) String() string { return "0x" + hex.EncodeToString(s[:]) }

// MarshalText implements [encoding.TextMarshaler].
func (s Signature) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// UnmarshalText implements [encoding.TextUnmarshaler].
func (s *Signature) UnmarshalText(b []byte) error {
	v, err := ParseSignature(string(b))
	if err != nil {
		return err
	}
	*s = v
	return nil
}

// Key is a private key. It prints as its address only. Safe for concurrent use.
type Key struct {
	priv *ecdsa.PrivateKey
	addr Address
}

// NewKey makes a key from the system's randomness.
func NewKey() (*Key, error) {
	p, err := crypto.GenerateKey()
	if err != nil {
		return nil, err
	}
	return FromECDSA(p), nil
}

// FromECDSA wraps a secp256k1 key, as go-ethereum's keystore returns it.
func FromECDSA(p *ecdsa.PrivateKey) *Key {
	return &Key{priv: p, addr: crypto.PubkeyToAddress(p.PublicKey)}
}

// ParseKey reads a private key of 64 hexadecimal digits. Errors never quote it.
func ParseKey(s string) (*Key, error) {
	p, err := crypto.HexToECDSA(s)
	if err != nil {
		return nil, errors.New("private key: want 64 hexadecimal digits within the group order of secp256k1")
	}
	return FromECDSA(p), nil
}

// Hex returns the private key for writing it to a file of the owner's.
func (k *Key) Hex() string { return hex.EncodeToString(crypto.FromECDSA(k.priv)) }

// ECDSA returns the private key for go-ethereum's keystore.
func (k *Key) ECDSA() *ecdsa.PrivateKey { return k.priv }

// Address returns the key's address.
func (k *Key) Address() Address { return k.addr }

// String prints the address, never the key.
func (k *Key) String() string { return k.addr.Hex() }

// GoString prints the address, never the key.
func (k *Key) GoString() string { return "evm.Key(" + k.addr.Hex() + ")" }

// Sign signs h deterministically (RFC 6979).
func (k *Key) Sign(h Hash) (Signature, error) {
	b, err := crypto.Sign(h[:], k.priv)
	if err != nil {
		return Signature{}, err
	}
	b[64] += 27
	return Signature(b), nil
}

// Recover returns the address whose key signed h. It fails with
// [ErrSignature] for anything that [Key.Sign] would not have made.
func Recover(h Hash, sig Signature) (Address, error) {
	v := sig[64]
	r, s := new(big.Int).SetBytes(sig[:32]), new(big.Int).SetBytes(sig[32:64])
	if (v != 27 && v != 28) || !crypto.ValidateSignatureValues(v-27, r, s, true) {
		return Address{}, fmt.Errorf("%w: values out of range", ErrSignature)
	}
	raw := sig
	raw[64] -= 27
	pub, err := crypto.Ecrecover(h[:], raw[:]) // 4 ‖ x ‖ y
	if err != nil {
		return Address{}, fmt.Errorf("%w: %v", ErrSignature, err)
	}
	sum := Keccak(pub[1:])
	return Address(sum[12:]), nil
}
