// Package receipt owns the signed statement that a node makes about each
// result: its EIP-712 type, its hash, its JSON form and its verification.
//
// The rule it keeps: a receipt is checked with the node's address and nothing
// else. The JSON form is what eth_signTypedData_v4 takes, so a wallet, ethers.js
// or a contract with ecrecover reaches the same verdict as [Verify]. What the
// node's agent has measured and what it passes on as a claim are apart in it,
// for every reader.
package receipt

import (
	"bytes"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"

	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/evm"
	"github.com/resultity/node/internal/spelling"
)

// JobID names one job for ever, across nodes, retries and restarts: 16 random
// bytes, printed as 32 lower-case hexadecimal digits.
type JobID [16]byte

// NewJobID makes a job id from the system's randomness.
func NewJobID() JobID {
	var id JobID
	_, _ = rand.Read(id[:]) // crypto/rand never fails: it ends the program instead
	return id
}

// ParseJobID reads the one spelling of a job id.
func ParseJobID(s string) (JobID, error) {
	var id JobID
	if len(s) != 2*len(id) || strings.ContainsAny(s, "ABCDEF") {
		return JobID{}, fmt.Errorf("job id %.40q: want %d lower-case hexadecimal digits", s, 2*len(id))
	}
	if _, err := hex.Decode(id[:], []byte(s)); err != nil {
		return JobID{}, fmt.Errorf("job id %.40q: want %d lower-case hexadecimal digits", s, 2*len(id))
	}
	if id == (JobID{}) {
		return JobID{}, errors.New("job id: all zero")
	}
	return id, nil
}

// String prints the one spelling.
func (id JobID) String() string { return hex.EncodeToString(id[:]) }

// MarshalText implements [encoding.TextMarshaler].
func (id JobID) MarshalText() ([]byte, error) { return []byte(id.String()), nil }

// UnmarshalText implements [encoding.TextUnmarshaler].
func (id *JobID) UnmarshalText(b []byte) error {
	v, err := ParseJobID(string(b))
	if err != nil {
		return err
	}
	*id = v
	return nil
}

// Receipt is what a node states about one result.
type Receipt struct {
	Job      JobID
	Node     evm.Address
	Measured Measured
	Claimed  Claimed
	// Sequence is given by whoever holds the node's key, never twice on a chain:
	// in the upper 32 bits how many times it has been started, below them the
	// receipt's number since then, from 1. Two receipts with one sequence are by two
	// holders of the key; one that is missing between others may have been signed and
	// not shown, or its signature was asked for twice.
	Sequence uint64
}

// Measured is what the node's agent has hashed or verified itself, with code that
// is none of the engine's. Who has the request and the response can check their
// hashes; for the others one has the agent's word.
type Measured struct {
	ConfigDigest  digest.Digest // the configuration snapshot the job was accepted under
	ImageDigest   digest.Digest // manifest of the runtime's image
	ModelDigest   digest.Digest // manifest of the model's files
	SandboxDigest digest.Digest // record of the runtime's sandbox when the job started
	RequestHash   digest.Digest // SHA-256 of the HTTP request body, byte for byte
	ResponseHash  digest.Digest // SHA-256 of the HTTP response body, byte for byte
}

// Claimed is what the engine, the hardware or the node's clock say. Nobody else
// can check it.
type Claimed struct {
	ClassDigest      digest.Digest // determinism class: what answers alike is meant to have it in common
	PromptTokens     uint64
	CompletionTokens uint64
	StartedAt        uint64 // Unix milliseconds, by the node's clock
	FinishedAt       uint64 // Unix milliseconds, by the node's clock
}

// Unknown stands for a digest that a node cannot give: it is that of nothing.
var Unknown = digest.Of(nil)

const primaryType = "Receipt"

var (
	domainFields  = evm.DomainFields()
	receiptFields = []evm.Field{
		{Name: "job", Type: "bytes16"}, {Name: "node", Type: "address"},
		{Name: "measured", Type: "Measured"}, {Name: "claimed", Type: "Claimed"}, {Name: "sequence", Type: "uint64"},
	}
	measuredFields = []evm.Field{
		{Name: "configDigest", Type: "bytes32"}, {Name: "imageDigest", Type: "bytes32"}, {Name: "modelDigest", Type: "bytes32"},
		{Name: "sandboxDigest", Type: "bytes32"}, {Name: "requestHash", Type: "bytes32"}, {Name: "responseHash", Type: "bytes32"},
	}
	claimedFields = []evm.Field{
		{Name: "classDigest", Type: "bytes32"}, {Name: "promptTokens", Type: "uint64"}, {Name: "completionTokens", Type: "uint64"},
		{Name: "startedAt", Type: "uint64"}, {Name: "finishedAt", Type: "uint64"},
	}
	receiptTypeHash  = evm.TypeHash(primaryType, receiptFields, evm.EncodeType("Claimed", claimedFields), evm.EncodeType("Measured", measuredFields))
	measuredTypeHash = evm.TypeHash("Measured", measuredFields)
	claimedTypeHash  = evm.TypeHash("Claimed", claimedFields)
)

// Hash returns the EIP-712 hash that a node of the chain signs.
func (r *Receipt) Hash(chainID uint64) evm.Hash {
	var job [32]byte
	copy(job[:], r.Job[:]) // bytesN is padded on the right
	m, c := &r.Measured, &r.Claimed
	sums := [7][32]byte{
		m.ConfigDigest.Sum(), m.ImageDigest.Sum(), m.ModelDigest.Sum(), m.SandboxDigest.Sum(), m.RequestHash.Sum(), m.ResponseHash.Sum(),
		c.ClassDigest.Sum(),
	}
	measured := evm.StructHash(measuredTypeHash, sums[0][:], sums[1][:], sums[2][:], sums[3][:], sums[4][:], sums[5][:])
	claimed := evm.StructHash(claimedTypeHash, sums[6][:],
		evm.Word(c.PromptTokens), evm.Word(c.CompletionTokens), evm.Word(c.StartedAt), evm.Word(c.FinishedAt))
	return evm.TypedHash(chainID, receiptTypeHash, job[:], evm.AddressWord(r.Node), measured[:], claimed[:], evm.Word(r.Sequence))
}

// Whole fails with [ErrInvalid] where something is missing that no receipt may
// lack: it could be signed, but nobody would read it.
func (r *Receipt) Whole() error {
	m := &r.Measured
	for _, v := range [...]struct {
		name string
		zero bool
	}{
		{"job", r.Job == JobID{}}, {"node", r.Node == evm.Address{}},
		{"configDigest", m.ConfigDigest.IsZero()}, {"imageDigest", m.ImageDigest.IsZero()}, {"modelDigest", m.ModelDigest.IsZero()},
		{"sandboxDigest", m.SandboxDigest.IsZero()}, {"requestHash", m.RequestHash.IsZero()}, {"responseHash", m.ResponseHash.IsZero()},
		{"classDigest", r.Claimed.ClassDigest.IsZero()},
	} {
		if v.zero {
			return fmt.Errorf("%w: it has no %s", ErrInvalid, v.name)
		}
	}
	return nil
}

// Sign makes the signed form. The key must be r.Node's. It fails with
// [ErrInvalid] for a receipt that lacks something.
func (r *Receipt) Sign(chainID uint64, key *evm.Key) (Signed, error) {
	if err := r.Whole(); err != nil {
		return Signed{}, err
	}
	if key.Address() != r.Node {
		return Signed{}, fmt.Errorf("receipt of %s cannot be signed by %s", r.Node, key.Address())
	}
	hash := r.Hash(chainID)
	sig, err := key.Sign(hash)
	if err != nil {
		return Signed{}, err
	}
	return Signed{*r, chainID, sig, hash}, nil
}

// With makes the signed form of a signature that the node's signer has made. It
// is not checked again: that costs more than to make it. It fails with
// [ErrInvalid] for a receipt that lacks something.
func (r *Receipt) With(chainID uint64, sig evm.Signature) (Signed, error) {
	if err := r.Whole(); err != nil {
		return Signed{}, err
	}
	return Signed{*r, chainID, sig, r.Hash(chainID)}, nil
}

// Signed is a receipt whose signature has been checked, or made by this node.
// Only [Receipt.Sign], [Receipt.With] and [Verify] make one. As JSON it is
//
//	{"typedData": …, "signature": "0x…", "node": "0x…"}
//
// where typedData is exactly the argument of eth_signTypedData_v4. The zero value
// is no receipt, and is not printed.
type Signed struct {
	receipt Receipt
	chainID uint64
	sig     evm.Signature
	hash    evm.Hash // of receipt on the chain
}

// Receipt returns what was signed.
func (s *Signed) Receipt() Receipt { return s.receipt }

// ChainID returns the EIP-155 chain id of the signature's domain.
func (s *Signed) ChainID() uint64 { return s.chainID }

// Hash returns what was signed as [Receipt.Hash] makes it, without the work.
func (s *Signed) Hash() evm.Hash { return s.hash }

// Signature returns the signature over [Receipt.Hash].
func (s *Signed) Signature() evm.Signature { return s.sig }

// The JSON form. 64-bit numbers are decimal strings: a JavaScript number loses
// digits above 2^53, and wallets take both.
type signedJSON struct {
	TypedData typedData     `json:"typedData"`
	Signature evm.Signature `json:"signature"`
	Node      string        `json:"node"`
}

type typedData struct {
	Types struct {
		Domain   []evm.Field `json:"EIP712Domain"`
		Receipt  []evm.Field `json:"Receipt"`
		Measured []evm.Field `json:"Measured"`
		Claimed  []evm.Field `json:"Claimed"`
	} `json:"types"`
	PrimaryType string `json:"primaryType"`
	Domain      struct {
		Name    string      `json:"name"`
		Version string      `json:"version"`
		ChainID json.Number `json:"chainId"`
	} `json:"domain"`
	Message message `json:"message"`
}

type message struct {
	Job      string `json:"job"`
	Node     string `json:"node"`
	Measured struct {
		ConfigDigest  string `json:"configDigest"`
		ImageDigest   string `json:"imageDigest"`
		ModelDigest   string `json:"modelDigest"`
		SandboxDigest string `json:"sandboxDigest"`
		RequestHash   string `json:"requestHash"`
		ResponseHash  string `json:"responseHash"`
	} `json:"measured"`
	Claimed struct {
		ClassDigest      string `json:"classDigest"`
		PromptTokens     string `json:"promptTokens"`
		CompletionTokens string `json:"completionTokens"`
		StartedAt        string `json:"startedAt"`
		FinishedAt       string `json:"finishedAt"`
	} `json:"claimed"`
	Sequence string `json:"sequence"`
}

// The one spelling that is printed: printedHead, then each value with what stands
// behind it in printedMarks. Nearly all that is read is spelt so, too.
var (
	printedHead  = printHead()
	printedMarks = [...]string{
		`},"message":{"job":"`, `","node":"`,
		`","measured":{"configDigest":"`, `","imageDigest":"`, `","modelDigest":"`, `","sandboxDigest":"`, `","requestHash":"`, `","responseHash":"`,
		`"},"claimed":{"classDigest":"`, `","promptTokens":"`, `","completionTokens":"`, `","startedAt":"`, `","finishedAt":"`,
		`"},"sequence":"`, `"}},"signature":"`, `","node":"`, `"}`,
	}
)

// printHead prints what is the same in all receipts: the types and the domain
// before the chain's id.
func printHead() []byte {
	const cut = `0},"message":`
	var j signedJSON
	j.TypedData.Types.Domain, j.TypedData.Types.Receipt, j.TypedData.Types.Measured, j.TypedData.Types.Claimed = domainFields, receiptFields, measuredFields, claimedFields
	j.TypedData.PrimaryType = primaryType
	j.TypedData.Domain.Name, j.TypedData.Domain.Version, j.TypedData.Domain.ChainID = evm.DomainName, evm.DomainVersion, "0"
	b, err := json.Marshal(j)
	head, _, ok := bytes.Cut(b, []byte(cut))
	if err != nil || !ok {
		panic("receipt: its types cannot be printed") // constants
	}
	return head
}

// MarshalJSON implements [json.Marshaler].
func (s Signed) MarshalJSON() ([]byte, error) { return s.AppendJSON(nil) }

// AppendJSON appends the JSON form, in the one spelling that is printed.
func (s *Signed) AppendJSON(b []byte) ([]byte, error) {
	if s.hash == (evm.Hash{}) {
		return nil, fmt.Errorf("%w: nobody has signed it", ErrInvalid)
	}
	return s.print(b), nil
}

// printedRest is more than follows printedHead, in bytes.
const printedRest = 1280

func (s *Signed) print(b []byte) []byte {
	r, m, c, node := &s.receipt, &s.receipt.Measured, &s.receipt.Claimed, s.receipt.Node.Hex()
	b = slices.Grow(b, len(printedHead)+printedRest)
	b = append(b, printedHead...)
	next := 0
	mark := func() {
		b = append(b, printedMarks[next]...)
		next++
	}
	number := func(v uint64) {
		b = strconv.AppendUint(b, v, 10)
		mark()
	}
	raw := func(v []byte) {
		b = hex.AppendEncode(append(b, "0x"...), v)
		mark()
	}
	text := func(v string) {
		b = append(b, v...)
		mark()
	}
	sum := func(d digest.Digest) {
		v := d.Sum()
		raw(v[:])
	}
	number(s.chainID)
	raw(r.Job[:])
	text(node)
	sum(m.ConfigDigest)
	sum(m.ImageDigest)
	sum(m.ModelDigest)
	sum(m.SandboxDigest)
	sum(m.RequestHash)
	sum(m.ResponseHash)
	sum(c.ClassDigest)
	number(c.PromptTokens)
	number(c.CompletionTokens)
	number(c.StartedAt)
	number(c.FinishedAt)
	number(r.Sequence)
	raw(s.sig[:])
	text(node)
	return b
}

// printed reads what [Signed.print] has printed, byte for byte, and nothing else.
func printed(b []byte) (s Signed, ok bool) {
	rest, ok := bytes.CutPrefix(b, printedHead)
	var v [len(printedMarks)]string
	for i := 0; ok && i < len(v); i++ {
		var value []byte
		value, rest, ok = bytes.Cut(rest, []byte(printedMarks[i]))
		v[i] = string(value)
	}
	if !ok || len(rest) > 0 {
		return Signed{}, false
	}
	var p parser
	s = Signed{chainID: p.number("", v[0]), receipt: Receipt{
		Job: p.job(v[1]), Node: p.address("", v[2]),
		Measured: Measured{
			ConfigDigest: p.digest("", v[3]), ImageDigest: p.digest("", v[4]), ModelDigest: p.digest("", v[5]),
			SandboxDigest: p.digest("", v[6]), RequestHash: p.digest("", v[7]), ResponseHash: p.digest("", v[8]),
		},
		Claimed: Claimed{
			ClassDigest: p.digest("", v[9]), PromptTokens: p.number("", v[10]), CompletionTokens: p.number("", v[11]),
			StartedAt: p.number("", v[12]), FinishedAt: p.number("", v[13]),
		},
		Sequence: p.number("", v[14]),
	}}
	p.fail("", s.sig.UnmarshalText([]byte(v[15])))
	return s, p.err == nil && bytes.Equal(s.print(nil), b)
}

// UnmarshalJSON implements [json.Unmarshaler]; it is [Verify].
func (s *Signed) UnmarshalJSON(b []byte) error {
	v, err := Verify(b)
	if err != nil {
		return err
	}
	*s = v
	return nil
}

// ErrInvalid says that a receipt is malformed or its signature does not hold.
var ErrInvalid = errors.New("invalid receipt")

// MaxSize bounds the JSON form, in bytes.
const MaxSize = 16 << 10

// Verify reads the JSON form and checks it: the types are exactly ours, every
// value has its one spelling, and the signature is by the node that both the
// envelope and the message name. It needs no network and no other file. Errors
// wrap [ErrInvalid].
func Verify(b []byte) (Signed, error) {
	s, err := verify(b)
	if err != nil {
		return Signed{}, fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	return s, nil
}

func verify(b []byte) (Signed, error) {
	if len(b) > MaxSize {
		return Signed{}, fmt.Errorf("%d bytes, at most %d", len(b), MaxSize)
	}
	s, ok := printed(b)
	if !ok { // by another program, or wrong
		var err error
		if s, err = read(b); err != nil {
			return Signed{}, err
		}
	}
	err := s.check()
	return s, err
}

// read reads any spelling that has one meaning.
func read(b []byte) (Signed, error) {
	var j signedJSON
	dec := json.NewDecoder(bytes.NewReader(b))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&j); err != nil {
		return Signed{}, err
	}
	if _, err := dec.Token(); err != io.EOF {
		return Signed{}, errors.New("something follows the receipt")
	}
	if err := spelling.Check(b, &j); err != nil {
		return Signed{}, err
	}
	t := &j.TypedData
	switch {
	case !slices.Equal(t.Types.Domain, domainFields), !slices.Equal(t.Types.Receipt, receiptFields), t.PrimaryType != primaryType,
		!slices.Equal(t.Types.Measured, measuredFields), !slices.Equal(t.Types.Claimed, claimedFields):
		return Signed{}, errors.New("types are not those of a Resultity receipt")
	case t.Domain.Name != evm.DomainName || t.Domain.Version != evm.DomainVersion:
		return Signed{}, fmt.Errorf("domain is %.40q version %.40q, want %q version %q", t.Domain.Name, t.Domain.Version, evm.DomainName, evm.DomainVersion)
	}
	var p parser
	s := Signed{chainID: p.number("chainId", t.Domain.ChainID.String()), sig: j.Signature}
	m, c := &t.Message.Measured, &t.Message.Claimed
	s.receipt = Receipt{
		Job: p.job(t.Message.Job), Node: p.address("message.node", t.Message.Node),
		Measured: Measured{
			ConfigDigest: p.digest("configDigest", m.ConfigDigest), ImageDigest: p.digest("imageDigest", m.ImageDigest), ModelDigest: p.digest("modelDigest", m.ModelDigest),
			SandboxDigest: p.digest("sandboxDigest", m.SandboxDigest), RequestHash: p.digest("requestHash", m.RequestHash), ResponseHash: p.digest("responseHash", m.ResponseHash),
		},
		Claimed: Claimed{
			ClassDigest: p.digest("classDigest", c.ClassDigest), PromptTokens: p.number("promptTokens", c.PromptTokens), CompletionTokens: p.number("completionTokens", c.CompletionTokens),
			StartedAt: p.number("startedAt", c.StartedAt), FinishedAt: p.number("finishedAt", c.FinishedAt),
		},
		Sequence: p.number("sequence", t.Message.Sequence),
	}
	if node := p.address("node", j.Node); p.err == nil && node != s.receipt.Node {
		p.err = fmt.Errorf("envelope names node %s, message names %s", node, s.receipt.Node)
	}
	return s, p.err
}

// check makes the hash of what was read, and looks who has signed it.
func (s *Signed) check() error {
	s.hash = s.receipt.Hash(s.chainID)
	signer, err := evm.Recover(s.hash, s.sig)
	if err != nil {
		return err
	}
	if signer != s.receipt.Node {
		return fmt.Errorf("%w: by %s, not by node %s; a field may have been changed", evm.ErrSignature, signer, s.receipt.Node)
	}
	return nil
}

// parser keeps the first error, so that a row of fields reads as a row.
type parser struct{ err error }

func (p *parser) fail(name string, err error) {
	if p.err == nil && err != nil {
		p.err = fmt.Errorf("%s: %w", name, err)
	}
}

func (p *parser) number(name, s string) uint64 {
	v, err := strconv.ParseUint(s, 10, 64)
	if err == nil && strconv.FormatUint(v, 10) != s {
		err = fmt.Errorf("%.30q: want a decimal number without sign or leading zero", s)
	}
	p.fail(name, err)
	return v
}

func (p *parser) digest(name, s string) digest.Digest {
	d, err := digest.ParseHex(hexPart(s))
	p.fail(name, err)
	return d
}

func (p *parser) address(name, s string) evm.Address {
	a, err := evm.ParseAddress(s)
	p.fail(name, err)
	return a
}

func (p *parser) job(s string) JobID {
	id, err := ParseJobID(hexPart(s))
	p.fail("job", err)
	return id
}

func hexPart(s string) string {
	if len(s) < 2 || s[:2] != "0x" {
		return "" // refused by every parser that is given it
	}
	return s[2:]
}
