package signer

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/evm"
	"github.com/resultity/node/internal/receipt"
	"github.com/resultity/node/internal/receiptlog"
	"github.com/resultity/node/internal/sandbox/record"
	"github.com/resultity/node/internal/wire"
)

// SocketPath is where resultity-signer listens.
const SocketPath = "/run/resultity-signer/socket"

// ErrAway says that nobody answers on the signer's socket.
var ErrAway = errors.New("resultity-signer does not answer; see systemctl status resultity-signer.socket resultity-signer.service")

// ErrOtherKey says that the signer's key has changed under a running agent.
var ErrOtherKey = errors.New("the signer has another key than before; restart the agent")

// Client is a [Signer] whose key is in another process, resultity-signer. A
// request that meets no answer is repeated over a new connection, until its
// patience ends: the signer may be restarted at any time, and ends connections that
// are idle. A statement may be signed twice thereby, with two sequences, but whoever
// asked for it is given one: a reply ends its request, and one that comes too late is
// on a connection that is closed already.
type Client struct {
	path     string
	patience time.Duration
	addr     evm.Address

	mu   sync.Mutex // held over an exchange: one request and its reply
	conn *net.UnixConn
	in   []byte
	out  []byte
}

// patience is how long a request waits for a signer that is not there: the time
// of a restart, and not longer than a job's result may be late.
const patience = 15 * time.Second

// once is for one exchange. A signer that is slower hangs.
var once = 5 * time.Second // tests are less patient

// Dial reaches the signer and learns whose key it has.
func Dial(path string) (*Client, error) { return dial(path, patience) }

func dial(path string, patience time.Duration) (*Client, error) {
	c := &Client{path: path, patience: patience, in: make([]byte, maxReply)}
	_, err := c.retry(c.connect)
	return c, err
}

// Close gives the connection back.
func (c *Client) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.drop()
	return nil
}

func (c *Client) drop() {
	if c.conn != nil {
		_ = c.conn.Close() // nothing is on it
		c.conn = nil
	}
}

// ask makes one exchange. The reply is the caller's.
func (c *Client) ask(k kind, body func(b []byte) ([]byte, error)) ([]byte, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.out = append(c.out[:0], byte(k))
	if body != nil {
		var err error
		if c.out, err = body(c.out); err != nil {
			return nil, err
		}
	}
	if len(c.out) > k.most() {
		return nil, fmt.Errorf("%w: %s of %d bytes, at most %d", ErrMalformed, k, len(c.out), k.most())
	}
	return c.retry(func() ([]byte, error) {
		if c.conn == nil {
			if b, err := c.connect(); err != nil || b[0] != 0 {
				return b, err
			}
		}
		if err := c.conn.SetDeadline(time.Now().Add(once)); err != nil {
			return nil, err
		}
		if _, err := c.conn.Write(c.out); err != nil {
			return nil, err
		}
		return c.read()
	})
}

// retry calls try until it is answered, and returns what follows the code.
func (c *Client) retry(try func() ([]byte, error)) ([]byte, error) {
	var wait time.Duration // at first none: the signer ends connections that are idle
	for end := time.Now().Add(c.patience); ; {
		b, err := try()
		switch {
		case errors.Is(err, ErrOtherKey):
			return nil, err
		case err != nil:
			c.drop()
			err = fmt.Errorf("%w: %w", ErrAway, err)
		case b[0] == 0:
			return append([]byte(nil), b[1:]...), nil
		default:
			if err = decodeError(b); !errors.Is(err, ErrCrowded) {
				return nil, err
			}
			c.drop()
		}
		if time.Now().Add(wait).After(end) {
			return nil, err
		}
		time.Sleep(wait)
		wait = min(max(2*wait, 5*time.Millisecond), 500*time.Millisecond)
	}
}

// connect makes a connection and returns the reply that it begins with. Another
// key than before is refused: what it signed would be another node's.
func (c *Client) connect() ([]byte, error) {
	conn, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: c.path, Net: "unixpacket"})
	if err != nil {
		return nil, err
	}
	c.conn = conn
	if err := conn.SetDeadline(time.Now().Add(once)); err != nil {
		return nil, err
	}
	b, err := c.read()
	switch {
	case err != nil || b[0] != 0:
		return b, err
	case len(b) != 1+len(c.addr):
		return nil, fmt.Errorf("an address of %d bytes", len(b)-1)
	case c.addr == evm.Address{}:
		c.addr = evm.Address(b[1:])
	case c.addr != evm.Address(b[1:]):
		c.drop()
		return nil, ErrOtherKey
	}
	return b, nil
}

// read returns a reply, valid until the next.
func (c *Client) read() ([]byte, error) {
	n, err := c.conn.Read(c.in)
	if err == nil && n == 0 {
		err = errors.New("an empty reply")
	}
	return c.in[:n], err
}

// Address implements [Signer].
func (c *Client) Address() evm.Address { return c.addr }

func (c *Client) askJSON(k kind, v any) ([]byte, error) {
	return c.ask(k, func(b []byte) ([]byte, error) {
		text, err := json.Marshal(v)
		return append(b, text...), err
	})
}

// Hello implements [Signer].
func (c *Client) Hello(t wire.Terms, h wire.Hello, at time.Time) ([]byte, error) {
	return c.askJSON(kindHello, helloRequest{t.Network, t.OfNode.String(), t.OfNetwork.String(), h.Agent, h.Config, at.UnixMilli()})
}

// Registration implements [Signer].
func (c *Client) Registration(r *wire.Registration) ([]byte, error) {
	return c.askJSON(kindRegistration, r)
}

// Binding implements [Signer].
func (c *Client) Binding(r *wire.BindRequest) ([]byte, error) { return c.askJSON(kindBinding, r) }

// Logs implements [Signer].
func (c *Client) Logs(l wire.LogBatch, data []byte) (*wire.Logs, error) {
	l.Digest = digest.Of(data)
	b, err := c.askJSON(kindLogs, &l)
	var sig evm.Signature
	if err == nil && len(b) <= len(sig) {
		err = fmt.Errorf("%w: signed logs of %d bytes", ErrFailed, len(b))
	}
	if err != nil {
		return nil, err
	}
	return wire.NewLogs(b[copy(sig[:], b):], sig, data), nil
}

// Sandbox implements [Signer].
func (c *Client) Sandbox(r *record.Record) (*record.Signed, error) {
	body, err := r.Encode()
	if err != nil {
		return nil, err
	}
	b, err := c.ask(kindSandbox, func(b []byte) ([]byte, error) { return append(b, body...), nil })
	if err == nil && len(b) != len(evm.Signature{}) {
		err = fmt.Errorf("%w: the signature of a sandbox record with %d bytes", ErrFailed, len(b))
	}
	if err != nil {
		return nil, err
	}
	return record.With(body, evm.Signature(b))
}

// Receipt implements [Signer].
func (c *Client) Receipt(chainID uint64, r receipt.Receipt) (receipt.Signed, error) {
	if err := whole(&r); err != nil {
		return receipt.Signed{}, err
	}
	b, err := c.ask(kindReceipt, func(b []byte) ([]byte, error) { return encodeReceipt(b, chainID, &r), nil })
	var sig evm.Signature
	if err == nil && len(b) != 8+len(sig) {
		err = fmt.Errorf("%w: a signed receipt of %d bytes", ErrFailed, len(b))
	}
	if err != nil {
		return receipt.Signed{}, err
	}
	r.Sequence = binary.BigEndian.Uint64(b)
	return r.With(chainID, evm.Signature(b[8:]))
}

// LastHead implements [Signer].
func (c *Client) LastHead(network string) (last Log, known bool, err error) {
	b, err := c.ask(kindLastHead, func(b []byte) ([]byte, error) { return append(b, network...), nil })
	if err != nil || len(b) == 0 {
		return last, false, err
	}
	if err := json.Unmarshal(b, &last); err != nil {
		return last, false, fmt.Errorf("%w: the last head: %w", ErrFailed, err)
	}
	return last, true, nil
}

// Head implements [Signer].
func (c *Client) Head(chainID uint64, h receiptlog.Head, g Growth) (*receiptlog.SignedHead, error) {
	b, err := c.askJSON(kindHead, headRequest{chainID, h, g})
	if err == nil && len(b) != len(evm.Signature{}) {
		err = fmt.Errorf("%w: a signature of %d bytes", ErrFailed, len(b))
	}
	if err != nil {
		return nil, err
	}
	return &receiptlog.SignedHead{Head: h, ChainID: chainID, Signature: evm.Signature(b)}, nil
}

// Takeover implements [Signer].
func (c *Client) Takeover() error {
	_, err := c.ask(kindTakeover, nil)
	return err
}
