package wire

import (
	"errors"
	"fmt"

	"github.com/resultity/node/internal/evm"
	"github.com/resultity/node/internal/receiptlog"
)

// Bounds of what a node sends of its receipt log.
const (
	// MaxLeaves bounds the leaves of one message.
	MaxLeaves = 1024

	// MaxPending bounds the leaves that a node sends before the head that covers
	// them.
	MaxPending = 1 << 16

	// LeavesAgain is how many leaves a network asks for again at once.
	LeavesAgain = 256
)

// Leaves is what the node's receipt log has gained, see "Receipt log". It
// counts from the next heartbeat with a head on.
type Leaves struct {
	From   uint64     `json:"from"` // index of the first
	Leaves []evm.Hash `json:"leaves"`

	// Edge is the compact range before From, given only where the network's copy
	// ends before that, and the node has the leaves between no longer.
	Edge []evm.Hash `json:"edge,omitempty"`

	// Again says that these are the leaves that the network has asked for again, or
	// that the node has not got them.
	Again bool `json:"again,omitempty"`
}

// LeavesAck says what the network has of the node's receipt log.
type LeavesAck struct {
	Size uint64                 `json:"size"`
	Head *receiptlog.SignedHead `json:"head,omitempty"` // the node's, of that size
	Edge []evm.Hash             `json:"edge,omitempty"` // compact range of that size

	// Reset is the network's word for the log's era, in the first of a session; nil
	// in the first era.
	Reset *receiptlog.SignedReset `json:"reset,omitempty"`

	// Lost is the node's head of a longer log of this era, of which the network has lost
	// its copy.
	Lost *receiptlog.SignedHead `json:"lost,omitempty"`

	// Again is the first of [LeavesAgain] leaves that the network asks for once more.
	Again *uint64 `json:"again,omitempty"`
}

func (m *Leaves) check() error {
	switch n := len(m.Leaves); {
	case m.Again && (n != 0 && n != LeavesAgain || m.From%LeavesAgain != 0 || len(m.Edge) > 0):
		return fmt.Errorf("%d leaves again from %d on", n, m.From)
	case m.Again && n == 0:
		return nil
	case n == 0 || n > MaxLeaves:
		return fmt.Errorf("%d leaves, at most %d", n, MaxLeaves)
	case m.From > receiptlog.MaxSize-uint64(n):
		return fmt.Errorf("%d leaves from %d on", n, m.From)
	case len(m.Edge) > 0 && len(m.Edge) != receiptlog.Edge(m.From):
		return fmt.Errorf("an edge of %d hashes before leaf %d", len(m.Edge), m.From)
	}
	return nil
}

func (m *LeavesAck) check() error {
	switch {
	case (m.Head == nil) != (m.Size == 0):
		return fmt.Errorf("a log of %d receipts, and a head is there: %v", m.Size, m.Head != nil)
	case m.Head != nil && m.Head.Size != m.Size:
		return fmt.Errorf("a log of %d receipts with the head of %d", m.Size, m.Head.Size)
	case len(m.Edge) != receiptlog.Edge(m.Size):
		return fmt.Errorf("an edge of %d hashes for %d receipts", len(m.Edge), m.Size)
	case m.Again != nil && (*m.Again%LeavesAgain != 0 || *m.Again > m.Size || m.Size-*m.Again < LeavesAgain):
		return fmt.Errorf("a log of %d receipts, and those from %d on are wanted again", m.Size, *m.Again)
	case m.Lost != nil && m.Lost.Size <= m.Size:
		return fmt.Errorf("a log of %d receipts, and one of %d is lost", m.Size, m.Lost.Size)
	case m.Reset != nil && (m.Head != nil && m.Head.Era != m.Reset.Era || m.Lost != nil && m.Lost.Era != m.Reset.Era):
		return fmt.Errorf("a head of another era than %d", m.Reset.Era)
	}
	return errors.Join(boundHead(m.Head), boundHead(m.Lost))
}

func boundHead(h *receiptlog.SignedHead) error {
	if h == nil {
		return nil
	}
	return h.Bound()
}
