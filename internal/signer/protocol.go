package signer

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/evm"
	"github.com/resultity/node/internal/receipt"
	"github.com/resultity/node/internal/receiptlog"
	"github.com/resultity/node/internal/sandbox/record"
	"github.com/resultity/node/internal/wire"
)

// The protocol between the agent and resultity-signer: packets of a
// SOCK_SEQPACKET socket. The signer begins with a reply that holds the node's
// address; then one request and one reply take turns. A request is its kind, one byte, and the statement: of a receipt the fields in fixed size, of others
// their JSON. A reply is a code, one byte, and what was signed, or a text.
type kind byte

const (
	kindHello        kind = 'h' // helloRequest
	kindRegistration kind = 'r' // wire.Registration
	kindBinding      kind = 'b' // wire.BindRequest
	kindLogs         kind = 'l' // wire.LogBatch
	kindReceipt      kind = 'c' // chain and receipt, see encodeReceipt
	kindHead         kind = 'm' // headRequest
	kindLastHead     kind = 'n' // name of the network
	kindSandbox      kind = 's' // record.Record, in its one spelling
	kindTakeover     kind = 't' // counts go on elsewhere
)

var kindNames = map[kind]string{
	kindHello: "hello", kindRegistration: "registration", kindBinding: "binding",
	kindLogs: "logs", kindReceipt: "receipt", kindHead: "head", kindLastHead: "last head", kindSandbox: "sandbox record", kindTakeover: "takeover",
}

func (k kind) String() string {
	if name := kindNames[k]; name != "" {
		return name
	}
	return fmt.Sprintf("kind %#02x", byte(k))
}

const (
	maxRequest = 1 + record.MaxSize // bytes, of a sandbox record
	maxOther   = 16 << 10           // bytes, of all others
	maxReply   = 32 << 10           // bytes
)

// most is how large a request may be, in bytes.
func (k kind) most() int {
	if k == kindSandbox {
		return maxRequest
	}
	return maxOther
}

// Errors with which a signer refuses. They mean the same on both sides of the
// socket.
var (
	// ErrMalformed says that a request is not one of those that there are.
	ErrMalformed = errors.New("malformed request to the signer")

	// ErrNode says that a statement is another node's.
	ErrNode = errors.New("the statement is about another node than the key's")

	// ErrFailed says that the signer could not do what it should have: its disk
	// is broken.
	ErrFailed = errors.New("the signer has failed")

	// ErrBehind says that a head of a receipt log goes back behind one that was
	// signed before: the key states no smaller log of one era, no other one of the same
	// size, and none of an earlier era.
	ErrBehind = errors.New("the key has signed a head of a larger receipt log")

	// ErrGrowth says that it is not shown that a head's log begins with the one that
	// the key has signed.
	ErrGrowth = errors.New("the receipt log is not shown to begin with the one that the key has signed")

	// ErrCaller says that the signer is not there for this account.
	ErrCaller = errors.New("the signer does not serve this account")

	// ErrCrowded says that too many are connected to the signer.
	ErrCrowded = errors.New("too many connections to the signer")
)

// codes are the first byte of a reply. 0 is success.
var codes = []error{nil, ErrMalformed, ErrTerms, ErrNode, ErrFailed, ErrCaller, ErrCrowded, ErrBehind, ErrGrowth}

func encodeError(err error) []byte {
	for code, known := range codes[1:] {
		if errors.Is(err, known) {
			return append([]byte{byte(code + 1)}, err.Error()...)
		}
	}
	return append([]byte{4}, fmt.Sprintf("%v: %v", ErrFailed, err)...)
}

// decodeError makes an error of a reply's.
func decodeError(b []byte) error {
	text := string(b[1:min(len(b), 500)])
	if int(b[0]) >= len(codes) {
		return fmt.Errorf("%w: code %d of a signer that is newer than this agent: %.200q", ErrFailed, b[0], text)
	}
	known := codes[b[0]]
	if rest, ok := strings.CutPrefix(text, known.Error()); ok {
		return fmt.Errorf("%w%s", known, rest)
	}
	return fmt.Errorf("%w: %s", known, text)
}

// helloRequest is what a hello is made of.
type helloRequest struct {
	Network   string        `json:"network"`
	OfNode    string        `json:"ofNode"`
	OfNetwork string        `json:"ofNetwork"`
	Agent     string        `json:"agent"`
	Config    digest.Digest `json:"config"`
	Time      int64         `json:"time"` // Unix milliseconds
}

// headRequest is a head, the chain that it is signed for, and what shows that its log
// has grown from that of the last one.
type headRequest struct {
	ChainID uint64          `json:"chain_id"`
	Head    receiptlog.Head `json:"head"`
	Growth  Growth          `json:"growth"`
}

// strict decodes exactly one JSON value without unknown fields.
func strict(b []byte, v any) error {
	dec := json.NewDecoder(bytes.NewReader(b))
	dec.DisallowUnknownFields()
	if err := dec.Decode(v); err != nil {
		return fmt.Errorf("%w: %.200q", ErrMalformed, err.Error())
	}
	if _, err := dec.Token(); err != io.EOF {
		return fmt.Errorf("%w: something follows the statement", ErrMalformed)
	}
	return nil
}

const receiptSize = 8 + 16 + 20 + 7*32 + 4*8

// encodeReceipt appends a receipt without its sequence, which is the signer's.
func encodeReceipt(b []byte, chainID uint64, r *receipt.Receipt) []byte {
	b = binary.BigEndian.AppendUint64(b, chainID)
	b = append(b, r.Job[:]...)
	b = append(b, r.Node[:]...)
	m, c := &r.Measured, &r.Claimed
	for _, d := range []digest.Digest{m.ConfigDigest, m.ImageDigest, m.ModelDigest, m.SandboxDigest, m.RequestHash, m.ResponseHash, c.ClassDigest} {
		sum := d.Sum()
		b = append(b, sum[:]...)
	}
	for _, v := range []uint64{c.PromptTokens, c.CompletionTokens, c.StartedAt, c.FinishedAt} {
		b = binary.BigEndian.AppendUint64(b, v)
	}
	return b
}

func decodeReceipt(b []byte) (chainID uint64, r receipt.Receipt, err error) {
	if len(b) != receiptSize {
		return 0, r, fmt.Errorf("%w: a receipt of %d bytes, want %d", ErrMalformed, len(b), receiptSize)
	}
	number := func() uint64 {
		v := binary.BigEndian.Uint64(b)
		b = b[8:]
		return v
	}
	sum := func() digest.Digest {
		d := digest.FromSum([32]byte(b))
		b = b[32:]
		return d
	}
	chainID = number()
	b = b[copy(r.Job[:], b):]
	b = b[copy(r.Node[:], b):]
	m, c := &r.Measured, &r.Claimed
	m.ConfigDigest, m.ImageDigest, m.ModelDigest, m.SandboxDigest, m.RequestHash, m.ResponseHash = sum(), sum(), sum(), sum(), sum(), sum()
	c.ClassDigest = sum()
	c.PromptTokens, c.CompletionTokens, c.StartedAt, c.FinishedAt = number(), number(), number(), number()
	if c.FinishedAt < c.StartedAt {
		return 0, r, fmt.Errorf("%w: a job that finished before it started", ErrMalformed)
	}
	return chainID, r, nil
}

// answer does what one request asks for.
func (l *Local) answer(req []byte) ([]byte, error) {
	if len(req) == 0 {
		return nil, fmt.Errorf("%w: it is empty", ErrMalformed)
	}
	if most := kind(req[0]).most(); len(req) > most {
		return nil, fmt.Errorf("%w: %d bytes, at most %d", ErrMalformed, len(req), most)
	}
	body := req[1:]
	switch k := kind(req[0]); k {
	case kindTakeover:
		if len(body) > 0 {
			return nil, fmt.Errorf("%w: something follows the kind", ErrMalformed)
		}
		return nil, l.Takeover()
	case kindReceipt:
		chain, r, err := decodeReceipt(body)
		if err != nil {
			return nil, err
		}
		signed, err := l.Receipt(chain, r)
		if err != nil {
			return nil, err
		}
		sig := signed.Signature()
		return append(binary.BigEndian.AppendUint64(nil, signed.Receipt().Sequence), sig[:]...), nil
	case kindHello:
		return l.answerHello(body)
	case kindRegistration:
		var r wire.Registration
		if err := strict(body, &r); err != nil {
			return nil, err
		}
		if err := l.about(r.Node, r.Network, short("agent", r.Agent, 128), short("token", r.Token, 256)); err != nil {
			return nil, err
		}
		return l.Registration(&r)
	case kindBinding:
		var r wire.BindRequest
		if err := strict(body, &r); err != nil {
			return nil, err
		}
		if err := l.about(r.Node, r.Network); err != nil {
			return nil, err
		}
		return l.Binding(&r)
	case kindLogs:
		var b wire.LogBatch
		if err := strict(body, &b); err != nil {
			return nil, err
		}
		if err := l.about(b.Node, b.Network, short("spool", b.Spool, 64)); err != nil {
			return nil, err
		}
		text, sig, err := wire.SignLogs(l.key, &b)
		return append(sig[:], text...), err
	case kindHead:
		var q headRequest
		if err := strict(body, &q); err != nil {
			return nil, err
		}
		s, err := l.Head(q.ChainID, q.Head, q.Growth)
		if err != nil {
			return nil, err
		}
		return s.Signature[:], nil
	case kindLastHead:
		last, known, err := l.LastHead(string(body))
		if err != nil || !known {
			return nil, err
		}
		return json.Marshal(last)
	case kindSandbox:
		r, err := record.Parse(body)
		if err != nil {
			return nil, fmt.Errorf("%w: %w", ErrMalformed, err)
		}
		if err := l.about(r.Node, r.Network); err != nil {
			return nil, err
		}
		s, err := l.Sandbox(r)
		if err != nil {
			return nil, err
		}
		sig := s.Signature()
		return sig[:], nil
	default:
		return nil, fmt.Errorf("%w: %s", ErrMalformed, k)
	}
}

func (l *Local) answerHello(body []byte) ([]byte, error) {
	var q helloRequest
	if err := strict(body, &q); err != nil {
		return nil, err
	}
	t := wire.Terms{Network: q.Network, Node: l.Address()}
	var errs [2]error
	t.OfNode, errs[0] = wire.ParsePublicKey(q.OfNode)
	t.OfNetwork, errs[1] = wire.ParsePublicKey(q.OfNetwork)
	if err := errors.Join(errs[0], errs[1]); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrMalformed, err)
	}
	if err := short("agent", q.Agent, 128); err != nil {
		return nil, err
	}
	return l.Hello(t, wire.Hello{Agent: q.Agent, Config: q.Config}, time.UnixMilli(q.Time))
}

// own refuses what is said in another node's name.
func (l *Local) own(node evm.Address) error {
	if node != l.Address() {
		return fmt.Errorf("%w: %s, not %s", ErrNode, node, l.Address())
	}
	return nil
}

// about refuses what is said in another node's name, to a network that the key
// does not sign for, or with something wrong in it.
func (l *Local) about(node evm.Address, network string, wrong ...error) error {
	if err := errors.Join(append(wrong, l.own(node))...); err != nil {
		return err
	}
	return l.network(network) // the last, since it is written down
}

func short(name, s string, most int) error {
	if len(s) > most {
		return fmt.Errorf("%w: %s has %d bytes, at most %d", ErrMalformed, name, len(s), most)
	}
	return nil
}
