package receiptlog

import (
	"encoding/json"
	"fmt"
	"regexp"

	"github.com/resultity/node/internal/evm"
	"github.com/resultity/node/internal/spelling"
)

// Head states what the log of a node in one network is at one time.
type Head struct {
	Node    evm.Address `json:"node"`
	Network string      `json:"network"` // its name: networks may share a chain, and logs of one node in two of them contradict nothing
	Era     uint64      `json:"era"`     // since when the log is this one, see [Reset]; 0 for the first. Logs of two eras contradict nothing
	Size    uint64      `json:"size"`    // receipts
	Root    evm.Hash    `json:"root"`
	Time    uint64      `json:"time"` // Unix milliseconds, by the node's clock
}

const headType = "ReceiptLogHead"

var headTypeHash = evm.TypeHash(headType, HeadFields())

// HeadFields returns the members of a head's EIP-712 type, ReceiptLogHead.
func HeadFields() []evm.Field {
	return []evm.Field{
		{Name: "node", Type: "address"}, {Name: "network", Type: "string"}, {Name: "era", Type: "uint64"}, {Name: "size", Type: "uint64"}, {Name: "root", Type: "bytes32"}, {Name: "time", Type: "uint64"},
	}
}

// Hash returns the EIP-712 hash that the node signs for a chain.
func (h *Head) Hash(chainID uint64) evm.Hash {
	network := evm.Keccak([]byte(h.Network))
	return evm.TypedHash(chainID, headTypeHash, evm.AddressWord(h.Node), network[:], evm.Word(h.Era), evm.Word(h.Size), h.Root[:], evm.Word(h.Time))
}

// Sign makes the signed form. The key must be h.Node's.
func (h *Head) Sign(chainID uint64, key *evm.Key) (*SignedHead, error) {
	if key.Address() != h.Node {
		return nil, fmt.Errorf("head of %s cannot be signed by %s", h.Node, key.Address())
	}
	sig, err := key.Sign(h.Hash(chainID))
	if err != nil {
		return nil, err
	}
	return &SignedHead{Head: *h, ChainID: chainID, Signature: sig}, nil
}

// SignedHead is a head with its node's signature. It is JSON as it is; who reads
// one calls Verify.
type SignedHead struct {
	Head
	ChainID   uint64        `json:"chain_id"` // EIP-155, in the domain of the signature
	Signature evm.Signature `json:"signature"`
}

var networkPattern = regexp.MustCompile(`^[a-z0-9][a-z0-9._-]{0,63}$`)

// maxTime is the last millisecond of the year 9999: what is later cannot be
// printed as a date.
const maxTime = 253402300799999

// Bound refuses a head that no log can have. It does not look at the signature.
func (h *Head) Bound() error {
	switch {
	case !networkPattern.MatchString(h.Network):
		return fmt.Errorf("head of a log in network %.80q", h.Network)
	case h.Size > MaxSize:
		return fmt.Errorf("head of a log of %d receipts, at most %d", h.Size, uint64(MaxSize))
	case h.Time > maxTime || h.Era > maxTime:
		return fmt.Errorf("head of %d milliseconds, in an era of %d; no clock shows more than %d", h.Time, h.Era, uint64(maxTime))
	}
	return nil
}

// Verify checks bounds and signature.
func (s *SignedHead) Verify() error {
	if err := s.Bound(); err != nil {
		return err
	}
	by, err := evm.Recover(s.Hash(s.ChainID), s.Signature)
	if err != nil {
		return fmt.Errorf("head of %s: %w", s.Node, err)
	}
	if by != s.Node {
		return fmt.Errorf("head of %s: %w: it is by %s", s.Node, evm.ErrSignature, by)
	}
	return nil
}

// Inclusion is what shows to anybody that a receipt is in the log of its node:
// a signed head, and the receipt's place under it.
type Inclusion struct {
	Head  SignedHead `json:"head"`
	Index uint64     `json:"index"`
	Path  []evm.Hash `json:"path"`
	// Reset is the network's word for the head's era, nil in the first. It shows that
	// the era is not the node's own idea.
	Reset *SignedReset `json:"reset,omitempty"`
}

// MaxInclusion bounds the JSON of an inclusion, in bytes.
const MaxInclusion = 16 << 10

// ParseInclusion reads one and checks the head's signature, and that of the reset
// where there is one: by whom that is, [SignedReset.Verify] tells. It refuses what another
// reader may understand in another way, as package receipt does.
func ParseInclusion(b []byte) (*Inclusion, error) {
	if len(b) > MaxInclusion {
		return nil, fmt.Errorf("%w: %d bytes, at most %d", ErrProof, len(b), MaxInclusion)
	}
	i := new(Inclusion)
	if err := json.Unmarshal(b, i); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrProof, err)
	}
	if err := spelling.Check(b, i); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrProof, err)
	}
	if err := i.Head.Verify(); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrProof, err)
	}
	switch r := i.Reset; {
	case r == nil && i.Head.Era != 0:
		return nil, fmt.Errorf("%w: the head is of a log that began anew, and the network's word for that is not there", ErrProof)
	case r == nil:
	case r.Node != i.Head.Node || r.Network != i.Head.Network || r.Era != i.Head.Era:
		return nil, fmt.Errorf("%w: the reset is not that of the head's log", ErrProof)
	default:
		if _, err := r.Verify(); err != nil {
			return nil, fmt.Errorf("%w: %w", ErrProof, err)
		}
	}
	return i, nil
}

// Check fails with [ErrProof] unless the receipt, given by its node, chain and
// EIP-712 hash, is in the log.
func (i *Inclusion) Check(node evm.Address, chainID uint64, receipt evm.Hash) error {
	if i.Head.Node != node || i.Head.ChainID != chainID {
		return fmt.Errorf("%w: the head is of node %s on chain %d, the receipt of %s on %d", ErrProof, i.Head.Node, i.Head.ChainID, node, chainID)
	}
	p := Proof{Index: i.Index, Size: i.Head.Size, Path: i.Path}
	return p.Check(Leaf(receipt), i.Head.Root)
}
