package session

import (
	"context"
	"fmt"
	"net/http"
	"time"

	"github.com/resultity/node/internal/evm"
	"github.com/resultity/node/internal/failpoint"
	"github.com/resultity/node/internal/wire"
)

// Binding is what [Bind] sends, and how.
type Binding struct {
	URL     string // https://host[:port][/path]
	Client  *http.Client
	Key     bindingSigner // the node's
	Trusted func(evm.Address) bool
	Body    wire.BindRequest // a Time of 0 is replaced by the present
}

// Bind makes one step towards a binding, or its end, and returns the network's
// reply, which has been checked as that of [Register] has. Refusals are
// [*StatusError], whose Reason is for the operator. A step may be repeated: the
// network knows it by its nonce.
func Bind(ctx context.Context, b Binding) (*wire.BindReply, error) {
	if b.Body.Time == 0 {
		b.Body.Time = time.Now().UnixMilli()
	}
	failpoint.Here("session.bind.begin")
	reply := new(wire.BindReply)
	err := exchange{b.URL, wire.BindPath, b.Client, b.Trusted, wire.OpenBinding, bindRefused}.do(ctx, reply, func() ([]byte, error) {
		return b.Key.Binding(&b.Body)
	})
	if err == nil && (reply.Network != b.Body.Network || reply.Node != b.Body.Node) {
		err = fmt.Errorf("%w: the reply is about node %s of network %.80q", ErrProtocol, reply.Node, reply.Network)
	}
	if err != nil {
		return nil, err
	}
	failpoint.Here("session.bind.answered")
	return reply, nil
}

func bindRefused(status int, raw []byte) error {
	e := &StatusError{Status: status, Reason: reason(raw)}
	switch status {
	case http.StatusBadRequest:
		e.Err = saysClock(e.Reason)
	case http.StatusNotFound, http.StatusMethodNotAllowed:
		e.Err = ErrProtocol
	}
	return e
}
