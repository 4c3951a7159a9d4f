package receiptlog

import (
	"errors"
	"fmt"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/resultity/node/internal/evm"
)

// MaxReason bounds the reason of a reset, in bytes.
const MaxReason = 512

// Reset is a network's word that the log of a node begins anew: that its heads
// of the new era need not go on from those of the era before. It keeps what was
// there: the last head, and the one that contradicts it, if there is one.
type Reset struct {
	Node    evm.Address `json:"node"`
	Network string      `json:"network"`
	Era     uint64      `json:"era"`              // that begins: Unix milliseconds, by the network's clock
	Before  uint64      `json:"before"`           // the era that ends, 0 for the first
	First   *SignedHead `json:"first,omitempty"`  // the newest of that which the network knows
	Second  *SignedHead `json:"second,omitempty"` // of that, too, and not of the same log
	Reason  string      `json:"reason"`           // of the network's operator, for everybody
}

const resetType = "ReceiptLogReset"

var resetTypeHash = evm.TypeHash(resetType, ResetFields())

// ResetFields returns the members of a reset's EIP-712 type, ReceiptLogReset.
func ResetFields() []evm.Field {
	return []evm.Field{
		{Name: "node", Type: "address"}, {Name: "network", Type: "string"}, {Name: "era", Type: "uint64"}, {Name: "before", Type: "uint64"},
		{Name: "first", Type: "bytes32"}, {Name: "second", Type: "bytes32"}, {Name: "reason", Type: "string"},
	}
}

// Hash returns the EIP-712 hash that the network signs for a chain. Of heads the
// hash is in it that their node has signed, zero for none.
func (r *Reset) Hash(chainID uint64) evm.Hash {
	of := func(h *SignedHead) (hash evm.Hash) {
		if h != nil {
			hash = h.Hash(h.ChainID)
		}
		return hash
	}
	network, reason := evm.Keccak([]byte(r.Network)), evm.Keccak([]byte(r.Reason))
	first, second := of(r.First), of(r.Second)
	return evm.TypedHash(chainID, resetTypeHash, evm.AddressWord(r.Node), network[:], evm.Word(r.Era), evm.Word(r.Before), first[:], second[:], reason[:])
}

// Sign makes the signed form, with a message key of the network.
func (r *Reset) Sign(chainID uint64, key *evm.Key) (*SignedReset, error) {
	if err := r.bound(); err != nil {
		return nil, err
	}
	sig, err := key.Sign(r.Hash(chainID))
	if err != nil {
		return nil, err
	}
	return &SignedReset{Reset: *r, ChainID: chainID, Signature: sig}, nil
}

// SignedReset is a reset with its network's signature. It is JSON as it is; who
// reads one calls Verify.
type SignedReset struct {
	Reset
	ChainID   uint64        `json:"chain_id"` // EIP-155, in the domain of the signature
	Signature evm.Signature `json:"signature"`
}

// bound refuses a reset that no network signs.
func (r *Reset) bound() error {
	switch {
	case !networkPattern.MatchString(r.Network):
		return fmt.Errorf("reset of a log in network %.80q", r.Network)
	case r.Era > maxTime || r.Era <= r.Before:
		return fmt.Errorf("reset of a log to era %d, from %d", r.Era, r.Before)
	case r.First == nil && r.Second != nil:
		return errors.New("reset of a log with a second head and no first one")
	case r.First != nil && r.Second != nil && r.First.Head == r.Second.Head:
		return errors.New("reset of a log with one head twice")
	}
	for _, h := range []*SignedHead{r.First, r.Second} {
		if h == nil {
			continue
		}
		if h.Node != r.Node || h.Network != r.Network || h.Era != r.Before {
			return errors.New("reset of a log with a head of another one")
		}
		if err := h.Verify(); err != nil {
			return fmt.Errorf("reset of a log: %w", err)
		}
	}
	return CheckReason(r.Reason)
}

// CheckReason refuses what is not one printable line.
func CheckReason(s string) error {
	if s == "" || len(s) > MaxReason || !utf8.ValidString(s) || strings.ContainsFunc(s, func(c rune) bool { return !unicode.IsPrint(c) }) {
		return fmt.Errorf("reset of a log for a reason of %d bytes; it must be one printable line of 1 to %d", len(s), MaxReason)
	}
	return nil
}

// Verify checks bounds and signatures, and returns the key that has signed. Whether
// that is the network's, its configuration says.
func (s *SignedReset) Verify() (by evm.Address, err error) {
	if err := s.bound(); err != nil {
		return by, err
	}
	by, err = evm.Recover(s.Hash(s.ChainID), s.Signature)
	if err != nil {
		return by, fmt.Errorf("reset of the log of %s: %w", s.Node, err)
	}
	return by, nil
}
