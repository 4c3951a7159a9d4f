package wire

import (
	"github.com/resultity/node/internal/binding"
	"github.com/resultity/node/internal/evm"
)

// Bound says to which account the node is bound, as the network has it.
type Bound struct {
	Account string `json:"account"` // "" for none
	Method  Method `json:"method,omitempty"`
	Since   int64  `json:"since,omitempty"` // Unix milliseconds
}

// Type implements [Message].
func (*Bound) Type() Type { return "bound" }

func (*Bound) direction() Direction { return ToNode }

// Method is how an account showed that it is who it says.
type Method string

// The methods.
const (
	MethodToken  Method = "token"
	MethodWallet Method = "wallet"
	MethodEmail  Method = "email"
)

// BindStep is what a [BindRequest] asks for.
type BindStep string

// The steps. Every one but the first needs the nonce of the last reply.
const (
	BindBegin  BindStep = "begin"  // a nonce
	BindWallet BindStep = "wallet" // to be bound to, or unbound from, a wallet: Statement
	BindEmail  BindStep = "email"  // a code, sent to Email
	BindCode   BindStep = "code"   // to be bound to the address that Code was sent to; Nonce is not looked at
	BindToken  BindStep = "token"  // to be bound to the account of Token
	BindUnbind BindStep = "unbind" // to be bound to nobody
)

// BindRequest is the body of a request about the node's binding, signed by the
// node: that is the node's consent. What a step does not need stays empty.
type BindRequest struct {
	Network   string          `json:"network"`
	Node      evm.Address     `json:"node"`
	Time      int64           `json:"time"` // Unix milliseconds
	Step      BindStep        `json:"step"`
	Nonce     evm.Hash        `json:"nonce"`
	Statement *binding.Signed `json:"statement,omitempty"`
	Email     string          `json:"email,omitempty"`
	Code      string          `json:"code,omitempty"`
	Token     string          `json:"token,omitempty"`
}

// BindReply is the reply, signed by a message key of the network.
type BindReply struct {
	Network string      `json:"network"`
	Node    evm.Address `json:"node"`
	Time    int64       `json:"time"` // Unix milliseconds, of the network's clock
	Bound   Bound       `json:"bound"`
	Nonce   evm.Hash    `json:"nonce"`   // for the next request
	Expires int64       `json:"expires"` // Unix milliseconds, of the nonce or of the code that was sent
}
