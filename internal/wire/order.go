package wire

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"unicode"

	"github.com/resultity/node/internal/evm"
)

// OrderID names an order: 16 random bytes, printed as 32 hexadecimal digits.
type OrderID [16]byte

// NewOrderID makes a random one.
func NewOrderID() (id OrderID) {
	_, _ = rand.Read(id[:]) // crypto/rand never fails: it ends the program instead
	return id
}

// ParseOrderID reads the one spelling.
func ParseOrderID(s string) (id OrderID, err error) {
	b, err := hex.DecodeString(s)
	if err != nil || len(b) != len(id) || hex.EncodeToString(b) != s {
		return id, fmt.Errorf("order id %.80q: want %d lower-case hexadecimal digits", s, 2*len(id))
	}
	return OrderID(b), nil
}

// String prints 32 hexadecimal digits.
func (id OrderID) String() string { return hex.EncodeToString(id[:]) }

// MarshalText implements [encoding.TextMarshaler].
func (id OrderID) MarshalText() ([]byte, error) { return []byte(id.String()), nil }

// UnmarshalText implements [encoding.TextUnmarshaler].
func (id *OrderID) UnmarshalText(b []byte) (err error) {
	*id, err = ParseOrderID(string(b))
	return err
}

// OrderKind is what the network orders a node to do.
type OrderKind string

// The kinds of order. A node refuses one that it does not know.
const (
	OrderDrain      OrderKind = "drain"      // take no new jobs
	OrderResume     OrderKind = "resume"     // take back a drain of the network's; the operator's own stays
	OrderRestart    OrderKind = "restart"    // restart the runtime, once its jobs are done, and validate it
	OrderRevalidate OrderKind = "revalidate" // hash the model's files again and repeat the golden requests
	OrderLogs       OrderKind = "logs"       // upload the logs now
	OrderShutdown   OrderKind = "shutdown"   // finish the jobs, stop the runtime and end
	OrderPenalty    OrderKind = "penalty"    // a notice to the operator: fewer or no jobs, why and until when
)

// OrderKinds lists the kinds of order.
var OrderKinds = []OrderKind{OrderDrain, OrderResume, OrderRestart, OrderRevalidate, OrderLogs, OrderShutdown, OrderPenalty}

// Bounds of orders.
const (
	MaxOrderReason  = 300           // bytes
	MaxOrderMessage = 300           // bytes
	MaxOrderLife    = 7 * 24 * 3600 // seconds from issue to expiry, so that a node's memory of orders is bounded
)

// Directive is what an order says.
type Directive struct {
	ID      OrderID     `json:"id"`
	Network string      `json:"network"`
	Node    evm.Address `json:"node"`
	Kind    OrderKind   `json:"kind"`
	Reason  string      `json:"reason,omitempty"` // for people
	Until   int64       `json:"until,omitempty"`  // Unix milliseconds; of a penalty
	Issued  int64       `json:"issued"`           // Unix milliseconds
	Expires int64       `json:"expires"`          // Unix milliseconds; a node does not begin it later
}

// Order has a node do something outside of its jobs. The body is a [Directive],
// signed by a message key over keccak("resultity.v1 order\n" ‖ body).
type Order struct {
	ID OrderID `json:"id"` // of the directive, so that any order can be answered
	statement
}

// SealOrder signs a directive.
func SealOrder(key signer, d *Directive) (*Order, error) {
	s, err := makeStatement(key, orderDomain, d)
	return &Order{d.ID, s}, err
}

// Open checks the signature and the form of an order. The caller compares the
// signer with the network's keys, and what is said with itself and the time.
func (o *Order) Open() (*Directive, evm.Address, error) {
	d := new(Directive)
	who, err := o.open(orderDomain, d)
	switch {
	case err != nil:
		return nil, who, err
	case d.ID != o.ID:
		return nil, who, fmt.Errorf("%w: an order of another id", ErrMalformed)
	case d.Expires <= d.Issued || d.Expires-d.Issued > MaxOrderLife*1000:
		return nil, who, fmt.Errorf("%w: an order that lives for %d ms", ErrMalformed, d.Expires-d.Issued)
	case len(d.Reason) > MaxOrderReason || Printable(d.Reason) != d.Reason:
		return nil, who, fmt.Errorf("%w: the reason of an order is too long or no text", ErrMalformed)
	}
	return d, who, nil
}

// Outcome is what became of an order.
type Outcome string

// The outcomes.
const (
	OutcomeOK      Outcome = "ok"
	OutcomeRefused Outcome = "refused" // not begun; it left no trace
	OutcomeFailed  Outcome = "failed"  // begun
)

// OrderDone answers an order. The node sends it again until it is acknowledged.
type OrderDone struct {
	ID      OrderID `json:"id"`
	Outcome Outcome `json:"outcome"`
	Message string  `json:"message,omitempty"` // for people
}

func (d *OrderDone) check() error { return d.Check() }

// Check refuses an answer that is out of bounds.
func (d *OrderDone) Check() error {
	if d.Outcome != OutcomeOK && d.Outcome != OutcomeRefused && d.Outcome != OutcomeFailed {
		return fmt.Errorf("outcome %.40q of an order", d.Outcome)
	}
	if len(d.Message) > MaxOrderMessage || Printable(d.Message) != d.Message {
		return errors.New("the message about an order is too long or no text")
	}
	return nil
}

// OrderAck says that the network has written the answer down.
type OrderAck struct {
	ID OrderID `json:"id"`
}

// Printable makes s one line of valid UTF-8 without control characters.
func Printable(s string) string {
	return strings.Map(func(r rune) rune {
		if r == unicode.ReplacementChar || !unicode.IsPrint(r) {
			return '?'
		}
		return r
	}, s)
}

// Cut makes s printable and at most n bytes.
func Cut(s string, n int) string {
	s = Printable(s)
	if len(s) <= n {
		return s
	}
	return strings.ToValidUTF8(s[:n], "")
}
