// Package contract runs the contract of packaging/contracts in go-ethereum's own
// virtual machine, compiled by Solidity's own compiler, with no chain around it.
package contract

import (
	"bytes"
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/ethereum/go-ethereum/accounts/abi"
	"github.com/ethereum/go-ethereum/core"
	"github.com/ethereum/go-ethereum/core/state"
	"github.com/ethereum/go-ethereum/core/types"
	"github.com/ethereum/go-ethereum/core/vm"
	"github.com/ethereum/go-ethereum/core/vm/runtime"
	"github.com/ethereum/go-ethereum/params"

	"github.com/resultity/node/internal/evm"
	"github.com/resultity/node/internal/receipt"
	"github.com/resultity/node/internal/receiptlog"
	"github.com/resultity/node/test/clients"
)

// Contract is the contract as it was created on a chain of its own. Not safe for
// concurrent use.
type Contract struct {
	abi     abi.ABI
	address evm.Address
	cfg     runtime.Config
	Created uint64 // gas that its creation took
}

// gasLimit is that of a block on Ethereum.
const gasLimit = 30_000_000

// New compiles the contract and creates it on a chain.
func New(ctx context.Context, chainID uint64) (*Contract, error) {
	mod, err := exec.Command("go", "env", "GOMOD").Output()
	if err != nil {
		return nil, err
	}
	source, err := os.ReadFile(filepath.Join(filepath.Dir(strings.TrimSpace(string(mod))), "packaging/contracts/ResultityReceipts.sol"))
	if err != nil {
		return nil, err
	}
	out, err := clients.Run(ctx, "solc.mjs", source, "CONTRACT=ResultityReceipts")
	if err != nil {
		return nil, err
	}
	var compiled struct {
		ABI  json.RawMessage
		Code string
	}
	if err := json.Unmarshal([]byte(out), &compiled); err != nil {
		return nil, err
	}
	code, err := hex.DecodeString(compiled.Code)
	if err != nil {
		return nil, err
	}
	c := &Contract{}
	if c.abi, err = abi.JSON(bytes.NewReader(compiled.ABI)); err != nil {
		return nil, err
	}
	chain := *params.MergedTestChainConfig
	chain.ChainID = new(big.Int).SetUint64(chainID)
	c.cfg = runtime.Config{ChainConfig: &chain, GasLimit: gasLimit}
	if c.cfg.State, err = state.New(types.EmptyRootHash, state.NewDatabaseForTesting()); err != nil {
		return nil, err
	}
	_, address, left, err := runtime.Create(code, &c.cfg)
	if err != nil {
		return nil, fmt.Errorf("create the contract: %w", err)
	}
	c.address = address
	c.Created = gasLimit - left
	return c, c.settle(code, nil, &c.Created)
}

// settle ends a transaction, and adds to gas what it costs before its first
// instruction.
func (c *Contract) settle(data []byte, to *evm.Address, gas *uint64) error {
	rules := c.cfg.ChainConfig.Rules(new(big.Int), true, 0)
	c.cfg.State.Finalise(rules)
	before, err := core.IntrinsicGas(data, nil, nil, evm.Address{}, to, nil, rules)
	*gas += before
	return err
}

// Reverted is the error of a call that the contract has refused: the name of its
// error, or "" where it has none.
type Reverted struct{ Name string }

func (r *Reverted) Error() string { return "reverted: " + r.Name }

// Call sends a transaction that calls a method. It returns the values, the names
// of the events and the gas of the whole transaction. A refusal is [Reverted].
func (c *Contract) Call(method string, args ...any) (values []any, events []string, gas uint64, err error) {
	data, err := c.abi.Pack(method, args...)
	if err != nil {
		return nil, nil, 0, err
	}
	return c.Send(data)
}

// Send is [Contract.Call] with encoded arguments.
func (c *Contract) Send(data []byte) (values []any, events []string, gas uint64, err error) {
	known := len(c.cfg.State.Logs())
	ret, left, err := runtime.Call(c.address, data, &c.cfg)
	if errors.Is(err, vm.ErrExecutionReverted) {
		r := &Reverted{}
		if len(ret) >= 4 {
			if e, unknown := c.abi.ErrorByID([4]byte(ret)); unknown == nil {
				r.Name = e.Name
			}
		}
		return nil, nil, 0, r
	}
	if err != nil {
		return nil, nil, 0, err
	}
	for _, l := range c.cfg.State.Logs()[known:] {
		e, err := c.abi.EventByID(l.Topics[0])
		if err != nil {
			return nil, nil, 0, err
		}
		events = append(events, e.Name)
	}
	gas = gasLimit - left
	if err := c.settle(data, &c.address, &gas); err != nil {
		return nil, nil, 0, err
	}
	m, err := c.abi.MethodById(data)
	if err != nil {
		return nil, nil, 0, err
	}
	values, err = m.Outputs.UnpackValues(ret)
	return values, events, gas, err
}

// Pack encodes a call.
func (c *Contract) Pack(method string, args ...any) ([]byte, error) {
	return c.abi.Pack(method, args...)
}

// Receipt is a receipt in the contract's form.
type Receipt struct {
	Job      [16]byte
	Node     evm.Address
	Measured Measured
	Claimed  Claimed
	Sequence uint64
}

// Measured is part of a receipt in the contract's form.
type Measured struct {
	ConfigDigest  [32]byte
	ImageDigest   [32]byte
	ModelDigest   [32]byte
	SandboxDigest [32]byte
	RequestHash   [32]byte
	ResponseHash  [32]byte
}

// Claimed is part of a receipt in the contract's form.
type Claimed struct {
	ClassDigest      [32]byte
	PromptTokens     uint64
	CompletionTokens uint64
	StartedAt        uint64
	FinishedAt       uint64
}

// Of returns a receipt in the contract's form.
func Of(r receipt.Receipt) Receipt {
	m, c := &r.Measured, &r.Claimed
	return Receipt{
		r.Job, r.Node,
		Measured{m.ConfigDigest.Sum(), m.ImageDigest.Sum(), m.ModelDigest.Sum(), m.SandboxDigest.Sum(), m.RequestHash.Sum(), m.ResponseHash.Sum()},
		Claimed{c.ClassDigest.Sum(), c.PromptTokens, c.CompletionTokens, c.StartedAt, c.FinishedAt},
		r.Sequence,
	}
}

// Head is a head in the contract's form.
type Head struct {
	Node    evm.Address
	Network [32]byte
	Era     uint64
	Size    uint64
	Root    [32]byte
	Time    uint64
}

// OfHead returns a head in the contract's form.
func OfHead(h receiptlog.Head) Head {
	return Head{h.Node, evm.Keccak([]byte(h.Network)), h.Era, h.Size, h.Root, h.Time}
}
