// Package binding owns the statement by which the owner of a wallet binds a node
// to it, or ends that: its EIP-712 type, its hash, the JSON form that wallets
// sign, and the check of what they return.
//
// The rule it keeps: a statement is good for one node, one network on one chain,
// one purpose and one nonce of that network, for the time that it names. It is
// checked with the owner's address alone, which is why it has to be that of a
// key: the signature of a contract wallet (EIP-1271) means what the contract
// says, and only its chain could tell.
package binding

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/resultity/node/internal/evm"
)

// Action is what a statement asks for.
type Action string

// The actions.
const (
	Bind   Action = "bind"
	Unbind Action = "unbind"
)

// Statement is what an owner signs.
type Statement struct {
	Network   string      `json:"network"`
	Node      evm.Address `json:"node"`
	Owner     evm.Address `json:"owner"` // the wallet's
	Action    Action      `json:"action"`
	Nonce     evm.Hash    `json:"nonce"`     // the network's, for one use
	IssuedAt  int64       `json:"issuedAt"`  // Unix milliseconds
	ExpiresAt int64       `json:"expiresAt"` // Unix milliseconds
}

// Signed is a statement with what is said to be its owner's signature;
// [Signed.Check] tells.
type Signed struct {
	Statement Statement     `json:"statement"`
	Signature evm.Signature `json:"signature"`
}

// MaxAge bounds the time between IssuedAt and ExpiresAt.
const MaxAge = time.Hour

const primaryType = "Binding"

var (
	fields = []evm.Field{
		{Name: "network", Type: "string"}, {Name: "node", Type: "address"}, {Name: "owner", Type: "address"},
		{Name: "action", Type: "string"}, {Name: "nonce", Type: "bytes32"},
		{Name: "issuedAt", Type: "uint64"}, {Name: "expiresAt", Type: "uint64"},
	}
	typeHash = evm.TypeHash(primaryType, fields)
)

// Hash returns the EIP-712 hash that the owner's wallet signs.
func (s *Statement) Hash(chainID uint64) evm.Hash {
	network, action := evm.Keccak([]byte(s.Network)), evm.Keccak([]byte(s.Action))
	return evm.TypedHash(chainID, typeHash, network[:], evm.AddressWord(s.Node), evm.AddressWord(s.Owner), action[:],
		s.Nonce[:], evm.Word(uint64(s.IssuedAt)), evm.Word(uint64(s.ExpiresAt)))
}

// typedData is the argument of eth_signTypedData_v4. Its numbers are decimal
// strings: a JavaScript number loses digits above 2^53, and wallets take both.
type typedData struct {
	Types struct {
		Domain  []evm.Field `json:"EIP712Domain"`
		Binding []evm.Field `json:"Binding"`
	} `json:"types"`
	PrimaryType string `json:"primaryType"`
	Domain      struct {
		Name    string `json:"name"`
		Version string `json:"version"`
		ChainID uint64 `json:"chainId"`
	} `json:"domain"`
	Message struct {
		Network   string   `json:"network"`
		Node      string   `json:"node"`
		Owner     string   `json:"owner"`
		Action    Action   `json:"action"`
		Nonce     evm.Hash `json:"nonce"`
		IssuedAt  int64    `json:"issuedAt,string"`
		ExpiresAt int64    `json:"expiresAt,string"`
	} `json:"message"`
}

// TypedData returns the statement as wallets take it: exactly the argument of
// eth_signTypedData_v4, indented for people.
func (s *Statement) TypedData(chainID uint64) []byte {
	var t typedData
	t.Types.Domain, t.Types.Binding, t.PrimaryType = evm.DomainFields(), fields, primaryType
	t.Domain.Name, t.Domain.Version, t.Domain.ChainID = evm.DomainName, evm.DomainVersion, chainID
	m := &t.Message
	m.Network, m.Node, m.Owner, m.Action = s.Network, s.Node.Hex(), s.Owner.Hex(), s.Action
	m.Nonce, m.IssuedAt, m.ExpiresAt = s.Nonce, s.IssuedAt, s.ExpiresAt
	raw, err := json.MarshalIndent(&t, "", "  ")
	if err != nil {
		panic(err) // nothing in it can fail
	}
	return append(raw, '\n')
}

// ErrInvalid says that a statement or its signature does not hold.
var ErrInvalid = errors.New("invalid binding statement")

// MaxSize bounds the JSON form, in bytes.
const MaxSize = 8 << 10

// ParseTypedData reads what [Statement.TypedData] wrote. White space apart it
// must be that to the letter, so that nobody signs one thing and sends another.
func ParseTypedData(b []byte) (s Statement, chainID uint64, err error) {
	bad := func(err error) (Statement, uint64, error) {
		return Statement{}, 0, fmt.Errorf("%w: this is not the typed data that resultityctl wrote: %w", ErrInvalid, err)
	}
	if len(b) > MaxSize {
		return bad(fmt.Errorf("more than %d bytes", MaxSize))
	}
	var t typedData
	dec := json.NewDecoder(bytes.NewReader(b))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&t); err != nil {
		return bad(err)
	}
	if _, err := dec.Token(); err != io.EOF {
		return bad(errors.New("something follows it"))
	}
	m := &t.Message
	s = Statement{Network: m.Network, Action: m.Action, Nonce: m.Nonce, IssuedAt: m.IssuedAt, ExpiresAt: m.ExpiresAt}
	if s.Node, err = evm.ParseAddress(m.Node); err != nil {
		return bad(err)
	}
	if s.Owner, err = evm.ParseAddress(m.Owner); err != nil {
		return bad(err)
	}
	var got, want bytes.Buffer
	if err := errors.Join(json.Compact(&got, b), json.Compact(&want, s.TypedData(t.Domain.ChainID))); err != nil {
		return bad(err)
	}
	if !bytes.Equal(got.Bytes(), want.Bytes()) {
		return bad(errors.New("a field was changed, added, moved or left out"))
	}
	return s, t.Domain.ChainID, nil
}

// ParseSignature reads what a wallet returned: 65 bytes in hexadecimal, with or
// without 0x, quotes and space around it. Its last byte may be 0 or 1, as some
// wallets write it, and becomes 27 or 28. What else it must be, [Signed.Check]
// sees.
func ParseSignature(text string) (evm.Signature, error) {
	var sig evm.Signature
	bad := func(format string, args ...any) (evm.Signature, error) {
		return evm.Signature{}, fmt.Errorf("%w: %s", evm.ErrSignature, fmt.Sprintf(format, args...))
	}
	h := strings.Trim(text, " \t\r\n\"'")
	h = strings.TrimPrefix(strings.TrimPrefix(h, "0x"), "0X")
	raw, err := hex.DecodeString(h)
	switch {
	case err != nil || len(raw) == 0:
		return bad("want 0x and 130 hexadecimal digits, as eth_signTypedData_v4 returns them")
	case len(raw) != len(sig):
		return bad("%d bytes, want %d: this is cut short, or comes from a contract wallet (EIP-1271), whose signatures only its chain can check; sign with a wallet that holds a key, or bind by e-mail or enrolment token", len(raw), len(sig))
	}
	copy(sig[:], raw)
	if sig[64] < 2 {
		sig[64] += 27
	}
	return sig, nil
}

// Check tells whether the statement was signed by its owner, for the chain.
// Errors wrap [ErrInvalid].
func (s *Signed) Check(chainID uint64) error {
	who, err := evm.Recover(s.Statement.Hash(chainID), s.Signature)
	if err != nil {
		return fmt.Errorf("%w: %w: want v of 27 or 28 and s in the lower half of the group order, as wallets make them", ErrInvalid, err)
	}
	if who != s.Statement.Owner {
		return fmt.Errorf("%w: the signature is that of %s, not of %s; sign exactly this typed data, with that wallet", ErrInvalid, who.Hex(), s.Statement.Owner.Hex())
	}
	return nil
}

// Terms are what a network holds a statement against.
type Terms struct {
	Network string
	ChainID uint64
	Node    evm.Address
	Action  Action
	Nonce   evm.Hash
	Now     time.Time
	Window  time.Duration // how far clocks may be apart
}

// CheckTerms is [Signed.Check], after a look at what the statement is about.
func (s *Signed) CheckTerms(t Terms) error {
	st := &s.Statement
	bad := func(format string, args ...any) error {
		return fmt.Errorf("%w: %s", ErrInvalid, fmt.Sprintf(format, args...))
	}
	issued, expires := time.UnixMilli(st.IssuedAt), time.UnixMilli(st.ExpiresAt)
	switch {
	case st.Network != t.Network:
		return bad("it is about network %.64q, this is %s", st.Network, t.Network)
	case st.Node != t.Node:
		return bad("it is about node %s, this is %s", st.Node.Hex(), t.Node.Hex())
	case st.Action != t.Action:
		return bad("it asks to %.20q, not to %s", st.Action, t.Action)
	case st.Owner == evm.Address{}:
		return bad("it names no owner")
	case st.Nonce != t.Nonce:
		return bad("its nonce is not the network's; begin anew")
	case st.IssuedAt < 0 || issued.After(t.Now.Add(t.Window)):
		return bad("it was issued in the future; check the clocks (timedatectl)")
	case !t.Now.Before(expires):
		return bad("it has expired; begin anew")
	case expires.Sub(issued) > MaxAge:
		return bad("it is good for more than %v", MaxAge)
	}
	return s.Check(t.ChainID)
}
