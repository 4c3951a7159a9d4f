package receiptlog

import (
	"github.com/transparency-dev/merkle/compact"

	"github.com/resultity/node/internal/evm"
)

// Parent returns the node above two.
func Parent(left, right evm.Hash) evm.Hash { return evm.Hash(hasher{}.HashChildren(left[:], right[:])) }

// Leaves returns the range of leaves that is below a node.
func (id NodeID) Leaves() (begin, end uint64) {
	return id.Index << id.Level, (id.Index + 1) << id.Level
}

// Children returns the nodes below one that is no leaf.
func (id NodeID) Children() (left, right NodeID) {
	return NodeID{id.Level - 1, 2 * id.Index}, NodeID{id.Level - 1, 2*id.Index + 1}
}

// EdgeNodes names the nodes whose hashes [Log.Hashes] has for a size.
func EdgeNodes(size uint64) []NodeID {
	var ids []NodeID
	for _, id := range compact.RangeNodes(0, size, nil) {
		ids = append(ids, NodeID{id.Level, id.Index})
	}
	return ids
}
