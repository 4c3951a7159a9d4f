// Package signer owns the use of the node's key: what is signed with it, and by
// whom it is held.
//
// The rule it keeps: the key signs what a node states, each kind by a method of
// its own that is given the statement and not a hash. Whoever may ask for a
// signature can thereby not have anything else signed.
//
// Nor can they have the key contradict itself where it must not. Of one era of a
// receipt log (package receiptlog) it signs a head only if that shows, by log n
// hashes, that its log begins with the one of the last head; what that has stated is
// on disk before the signature is made. So all heads of an era are of one log that only
// grows, whoever has the agent. An era that the network has not begun is worth nothing
// to those who check proofs. A kill between a head's signature and its use does no
// harm: who asks begins with [Signer.LastHead], and has all receipts on disk of which a
// head was ever asked for.
package signer

import (
	"fmt"
	"time"

	"github.com/resultity/node/internal/evm"
	"github.com/resultity/node/internal/receipt"
	"github.com/resultity/node/internal/receiptlog"
	"github.com/resultity/node/internal/sandbox/record"
	"github.com/resultity/node/internal/wire"
)

// Signer signs for a node. Safe for concurrent use.
type Signer interface {
	// Address returns the node's address.
	Address() evm.Address
	// Hello makes the first frame of a session, and its count.
	Hello(wire.Terms, wire.Hello, time.Time) ([]byte, error)
	// Registration makes the body of a registration request.
	Registration(*wire.Registration) ([]byte, error)
	// Binding makes the body of a request about a binding.
	Binding(*wire.BindRequest) ([]byte, error)
	// Logs makes a batch of what a [wire.Packer] has packed.
	Logs(b wire.LogBatch, data []byte) (*wire.Logs, error)
	// Receipt signs a receipt for a chain, and gives it its sequence. It fails with
	// [ErrMalformed] for one that lacks something.
	Receipt(chainID uint64, r receipt.Receipt) (receipt.Signed, error)
	// LastHead returns what the last head for a network has stated, false where there
	// is none.
	LastHead(network string) (Log, bool, error)
	// Head signs a head of the node's receipt log for a chain. It fails with
	// [ErrBehind] for one that goes back behind the last one, and with [ErrGrowth]
	// where it is not shown that its log begins with the last one's.
	Head(chainID uint64, h receiptlog.Head, g Growth) (*receiptlog.SignedHead, error)
	// Sandbox signs a record of the runtime's sandbox.
	Sandbox(r *record.Record) (*record.Signed, error)
	// Takeover has the counts go on where no other holder of the key is, for
	// whoever has moved or restored it.
	Takeover() error
	Close() error
}

// Local is a [Signer] that holds the key in this process.
type Local struct {
	key *evm.Key
	*Counters
}

// NewLocal makes a signer of a key. The counters are the key's; nil stands for
// such that end with the process.
func NewLocal(key *evm.Key, c *Counters) *Local {
	if c == nil {
		c = &Counters{now: Counts{Node: key.Address(), Networks: map[string]uint64{}}, receipts: map[uint64]uint32{}}
	}
	return &Local{key, c}
}

// Address implements [Signer].
func (l *Local) Address() evm.Address { return l.key.Address() }

// Hello implements [Signer].
func (l *Local) Hello(t wire.Terms, h wire.Hello, at time.Time) ([]byte, error) {
	var err error
	if h.Count, err = l.hello(t.Network); err != nil {
		return nil, err
	}
	return wire.SealHello(l.key, t, h, at)
}

// Registration implements [Signer].
func (l *Local) Registration(r *wire.Registration) ([]byte, error) {
	return wire.SealRegistration(l.key, r)
}

// Binding implements [Signer].
func (l *Local) Binding(r *wire.BindRequest) ([]byte, error) { return wire.SealBinding(l.key, r) }

// Logs implements [Signer].
func (l *Local) Logs(b wire.LogBatch, data []byte) (*wire.Logs, error) {
	return wire.SealLogs(l.key, b, data)
}

// Sandbox implements [Signer].
func (l *Local) Sandbox(r *record.Record) (*record.Signed, error) { return r.Sign(l.key) }

// Receipt implements [Signer].
func (l *Local) Receipt(chainID uint64, r receipt.Receipt) (receipt.Signed, error) {
	// What is not signed takes no sequence.
	err := l.own(r.Node)
	if err == nil {
		err = whole(&r)
	}
	if err == nil {
		r.Sequence, err = l.receipt(chainID)
	}
	if err != nil {
		return receipt.Signed{}, err
	}
	return r.Sign(chainID, l.key)
}

// whole refuses a receipt that lacks something.
func whole(r *receipt.Receipt) error {
	if err := r.Whole(); err != nil {
		return fmt.Errorf("%w: %w", ErrMalformed, err)
	}
	return nil
}

// LastHead implements [Signer].
func (l *Local) LastHead(network string) (Log, bool, error) { return l.lastHead(network) }

// Growth shows that the log of a head begins with that of [Signer.LastHead].
type Growth struct {
	// Path is that of [receiptlog.CheckGrowth], a hash for each bit of the sizes at
	// most. A head of another era needs none.
	Path []evm.Hash `json:"path,omitempty"`
	// Since is given where the key's counters were set back to an older state: a head
	// that the key has signed behind the last one that they know of. Path begins there.
	Since *receiptlog.SignedHead `json:"since,omitempty"`
}

// eraAhead is how far an era may be ahead of this machine's clock; it is the time of its
// beginning, by the network's clock, which may have been wrong. The key signs no head of
// an earlier era behind it: whoever has taken the agent over could else keep it from
// signing heads for ever, and not only until the network's operator has the log begin
// anew a day later.
const eraAhead = 24 * time.Hour

// Head implements [Signer].
func (l *Local) Head(chainID uint64, h receiptlog.Head, g Growth) (*receiptlog.SignedHead, error) {
	if err := h.Bound(); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrMalformed, err)
	}
	if h.Size == 0 && h.Root != receiptlog.New().Root() {
		return nil, fmt.Errorf("%w: an empty log with root %s", ErrMalformed, h.Root)
	}
	if last := uint64(time.Now().Add(eraAhead).UnixMilli()); h.Era > last {
		return nil, fmt.Errorf("%w: an era of %d milliseconds, which has not begun; it is %d at most by this machine's clock", ErrMalformed, h.Era, last)
	}
	if err := l.own(h.Node); err != nil {
		return nil, err
	}
	if s := g.Since; s != nil {
		if s.Node != h.Node || s.Network != h.Network {
			return nil, fmt.Errorf("%w: a head of %s in %.64q as that of %s in %s", ErrMalformed, s.Node, s.Network, h.Node, h.Network)
		}
		if err := s.Verify(); err != nil {
			return nil, fmt.Errorf("%w: %w", ErrMalformed, err)
		}
	}
	if err := l.head(chainID, &h, g); err != nil {
		return nil, err
	}
	return h.Sign(chainID, l.key)
}
