package main

import (
	"context"
	"fmt"

	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/evm"
	"github.com/resultity/node/internal/receipt"
	"github.com/resultity/node/internal/receiptlog"
	"github.com/resultity/node/test/contract"
)

// gas is what a transaction takes, from its first byte on. It is exact: there is
// one round.
func gas(ctx context.Context, b *bench, t *table) error {
	c, err := contract.New(ctx, chainID)
	if err != nil {
		return err
	}
	key, err := evm.NewKey()
	if err != nil {
		return err
	}
	t.add("create the contract", "gas", []float64{float64(c.Created)})
	call := func(name, method string, args ...any) error {
		_, _, used, err := c.Call(method, args...)
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		t.add(name, "gas", []float64{float64(used)})
		return nil
	}
	const most = 1 << 20
	log, nodes := receiptlog.New(), map[receiptlog.NodeID]evm.Hash{}
	var digests []evm.Hash
	for i := range uint64(most) {
		r := receipt.Receipt{
			Job: receipt.NewJobID(), Node: key.Address(),
			Measured: receipt.Measured{
				ConfigDigest: digest.Of([]byte("c")), ImageDigest: digest.Of([]byte("i")), ModelDigest: digest.Of([]byte("m")), SandboxDigest: digest.Of([]byte("s")),
				RequestHash: digest.Of([]byte("q")), ResponseHash: digest.Of([]byte("a")),
			},
			Claimed: receipt.Claimed{
				ClassDigest: digest.Of([]byte("k")), PromptTokens: 100, CompletionTokens: 200, StartedAt: 1_790_000_000_000, FinishedAt: 1_790_000_001_000,
			},
			Sequence: i,
		}
		digests = append(digests, r.Hash(chainID))
		log.Append(receiptlog.Leaf(digests[i]), func(id receiptlog.NodeID, h evm.Hash) { nodes[id] = h })
		switch size := i + 1; size {
		case 1:
			s, err := r.Sign(chainID, key)
			if err != nil {
				return err
			}
			sig := s.Signature()
			if err := call("record a receipt", "record", contract.Of(r), sig[:]); err != nil {
				return err
			}
		case 1 << 10, 1<<10 + 1, most:
			h := receiptlog.Head{Node: key.Address(), Network: "testnet", Size: size, Root: log.Root(), Time: 1_790_000_000_000}
			s, err := h.Sign(chainID, key)
			if err != nil {
				return err
			}
			name := map[uint64]string{1 << 10: "record a root, the node's first", 1<<10 + 1: "record a root", most: "record a root of 1,048,576 receipts"}[size]
			if err := call(name, "recordHead", contract.OfHead(h), s.Signature[:]); err != nil {
				return err
			}
		}
	}
	p, err := receiptlog.Prove(12345, most, func(id receiptlog.NodeID) (evm.Hash, error) { return nodes[id], nil })
	if err != nil {
		return err
	}
	path := make([][32]byte, len(p.Path))
	for i, h := range p.Path {
		path[i] = h
	}
	return call("prove one of them", "included", key.Address(), evm.Keccak([]byte("testnet")), uint64(0), digests[12345], uint64(12345), path)
}
