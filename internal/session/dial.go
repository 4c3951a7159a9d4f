package session

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/gorilla/websocket"

	"github.com/resultity/node/internal/evm"
	"github.com/resultity/node/internal/failpoint"
	"github.com/resultity/node/internal/wire"
)

// dial makes the connection and agrees with whoever is there on a session.
func (s *Session) dial(ctx context.Context) (*link, *wire.Session, error) {
	u, err := endpoint(s.cfg.URL, "wss", wire.SessionPath)
	if err != nil {
		return nil, nil, err
	}
	own := wire.NewSecret()

	config := s.cfg.TLS.Clone() // nil is fine
	if config == nil {
		config = new(tls.Config)
	}
	config.MinVersion = tls.VersionTLS13
	config.NextProtos = []string{"http/1.1"}
	config.DynamicRecordSizingDisabled = true // a record holds a fragment
	var raw *liveConn
	var keep func() bool
	d := websocket.Dialer{
		Proxy: http.ProxyFromEnvironment,
		NetDialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
			c, err := new(net.Dialer).DialContext(ctx, network, addr)
			if err != nil {
				return nil, err
			}
			raw = &liveConn{Conn: c, read: s.cfg.Dead, write: max(s.cfg.Dead, s.patience.write)}
			if err := raw.tune(); err != nil {
				_ = c.Close() // the error says more
				return nil, err
			}
			keep = context.AfterFunc(ctx, func() { _ = c.Close() }) // the dialler heeds ctx's deadline, not its end
			return raw, nil
		},
		TLSClientConfig: config,
		Subprotocols:    []string{wire.Subprotocol},
		WriteBufferSize: fragment,
	}
	ctx, cancel := context.WithTimeout(ctx, s.patience.dial)
	defer cancel()
	conn, resp, err := d.DialContext(ctx, u, http.Header{
		wire.HeaderNetwork: {s.cfg.Network},
		wire.HeaderNode:    {s.cfg.Node.Hex()},
		wire.HeaderKey:     {own.Public().String()},
		"User-Agent":       {"resultity-agent/" + s.cfg.Agent},
	})
	if errors.Is(err, websocket.ErrBadHandshake) {
		return nil, nil, refused(resp)
	}
	if err != nil {
		return nil, nil, fmt.Errorf("connect to %s: %w", u, err)
	}
	agreed, err := s.checkReply(conn, resp, own)
	if err != nil {
		_ = conn.Close() // the error says more
		return nil, nil, err
	}
	if !keep() {
		return nil, nil, ctx.Err()
	}
	conn.SetReadLimit(maxWelcome)
	raw.live = true
	return newLink(conn, raw), agreed, nil
}

// maxWelcome bounds the network's first frame, in bytes: its sender is not known yet.
const maxWelcome = 16 << 10

// checkReply looks at what the WebSocket library lets pass in a 101 reply.
func (s *Session) checkReply(conn *websocket.Conn, resp *http.Response, own *wire.Secret) (*wire.Session, error) {
	if got := conn.Subprotocol(); got != wire.Subprotocol {
		return nil, fmt.Errorf("%w: it chose the subprotocol %.40q", ErrProtocol, got)
	}
	// Not offered, and the library would agree: then a small frame could become
	// a large one in memory.
	if got := resp.Header.Get("Sec-Websocket-Extensions"); got != "" {
		return nil, fmt.Errorf("%w: it insists on the extension %.40q", ErrProtocol, got)
	}
	theirs, err := wire.ParsePublicKey(resp.Header.Get(wire.HeaderKey))
	if err == nil {
		var agreed *wire.Session
		if agreed, err = own.Agree(s.cfg.Network, s.cfg.Node, own.Public(), theirs); err == nil {
			return agreed, nil
		}
	}
	return nil, fmt.Errorf("%w: header %s: %w", ErrProtocol, wire.HeaderKey, err)
}

// refused makes an error of a reply that is not 101.
func refused(resp *http.Response) error {
	text, _ := io.ReadAll(io.LimitReader(resp.Body, maxReason)) // the library has read it already
	e := &StatusError{Status: resp.StatusCode, Reason: reason(text)}
	switch resp.StatusCode {
	case http.StatusForbidden:
		e.Err = ErrNotRegistered
	case http.StatusConflict:
		e.Err = ErrWrongNetwork
	case http.StatusSwitchingProtocols, http.StatusOK, http.StatusNotFound, http.StatusMethodNotAllowed, http.StatusUpgradeRequired:
		e.Err = ErrProtocol
	}
	return e
}

// StatusError is the network's refusal of a connection or a registration. It
// wraps [ErrNotRegistered], [ErrWrongNetwork], [ErrToken], [ErrProtocol] or
// nothing.
type StatusError struct {
	Status int    // of HTTP
	Reason string // the network's own words, cut short
	Err    error
}

func (e *StatusError) Error() string {
	text := fmt.Sprintf("the network answers %d", e.Status)
	if e.Reason != "" {
		text += fmt.Sprintf(" (%q)", e.Reason)
	}
	if e.Err != nil {
		text = e.Err.Error() + ": " + text
	}
	return text
}

func (e *StatusError) Unwrap() error { return e.Err }

const maxReason = 300 // bytes

func reason(b []byte) string {
	return strings.ToValidUTF8(strings.TrimSpace(string(b[:min(len(b), maxReason)])), "")
}

// endpoint appends path to a base URL, which must be of the scheme.
func endpoint(base, scheme, path string) (string, error) {
	u, err := url.Parse(base)
	if err != nil {
		return "", fmt.Errorf("address of the network: %w", err)
	}
	if u.Scheme != scheme || u.Host == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "" {
		return "", fmt.Errorf("address of the network %.200q: want %s://host[:port][/path]", base, scheme)
	}
	return u.JoinPath(path).String(), nil
}

// ErrToken says that the network does not take the enrolment token.
var ErrToken = errors.New("the enrolment token is missing, unknown, used up or expired; get one from the network's operator")

// Registration is what [Register] sends, and how.
type Registration struct {
	URL     string // https://host[:port][/path]
	Client  *http.Client
	Key     registrationSigner // the node's
	Trusted func(evm.Address) bool
	Body    wire.Registration // a Time of 0 is replaced by the present
}

// Register makes the node known to the network and returns its reply, which has
// been checked: it is by a key of the network, and about this node. Refusals are
// [*StatusError]; a reply that does not hold is [ErrProtocol] or
// [wire.ErrSigner]. Registering again is harmless.
func Register(ctx context.Context, r Registration) (*wire.Registered, error) {
	if r.Body.Time == 0 {
		r.Body.Time = time.Now().UnixMilli()
	}
	failpoint.Here("session.register.begin")
	reply := new(wire.Registered)
	err := exchange{r.URL, wire.RegisterPath, r.Client, r.Trusted, wire.OpenRegistration, registerRefused}.do(ctx, reply, func() ([]byte, error) {
		return r.Key.Registration(&r.Body)
	})
	if err == nil && (reply.Network != r.Body.Network || reply.Node != r.Body.Node) {
		err = fmt.Errorf("%w: the reply is about node %s of network %.80q", ErrProtocol, reply.Node, reply.Network)
	}
	if err != nil {
		return nil, fmt.Errorf("register: %w", err)
	}
	failpoint.Here("session.register.answered")
	return reply, nil
}

// exchange is a signed request over HTTPS and its signed reply.
type exchange struct {
	url, path string
	client    *http.Client
	trusted   func(evm.Address) bool
	open      func([]byte, any) (evm.Address, error)
	refused   func(status int, text []byte) error
}

// do sends what seal makes and reads the reply, whose signer it checks.
func (x exchange) do(ctx context.Context, reply any, seal func() ([]byte, error)) error {
	u, err := endpoint(x.url, "https", x.path)
	if err != nil {
		return err
	}
	body, err := seal()
	if err != nil {
		return err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, u, bytes.NewReader(body))
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/octet-stream")
	client := *x.client
	client.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse } // what is in it is for nobody else
	resp, err := client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	raw, err := io.ReadAll(io.LimitReader(resp.Body, maxReply+1))
	switch {
	case err != nil:
		return fmt.Errorf("read the reply: %w", err)
	case resp.StatusCode != http.StatusOK:
		return x.refused(resp.StatusCode, raw)
	case len(raw) > maxReply:
		return fmt.Errorf("%w: a reply of more than %d bytes", ErrProtocol, maxReply)
	}
	who, err := x.open(raw, reply)
	switch {
	case err != nil && !errors.Is(err, wire.ErrSigner):
		return fmt.Errorf("%w: %w", ErrProtocol, err)
	case err != nil:
		return err
	case !x.trusted(who):
		return fmt.Errorf("%w: the reply is by %s, which is no key of the network", wire.ErrSigner, who)
	}
	return nil
}

const maxReply = 16 << 10 // bytes

func registerRefused(status int, raw []byte) error {
	e := &StatusError{Status: status, Reason: reason(raw)}
	switch status {
	case http.StatusForbidden:
		e.Err = ErrToken
	case http.StatusConflict:
		e.Err = ErrWrongNetwork
	case http.StatusBadRequest:
		e.Err = saysClock(e.Reason)
	case http.StatusNotFound, http.StatusMethodNotAllowed:
		e.Err = ErrProtocol
	}
	return e
}

// saysClock returns [wire.ErrClock] if those are the network's words. Whoever
// checks the other's clock first is the one to find out, and that is usually the
// network; the operator who has to set the clock is here.
func saysClock(text string) error {
	if strings.HasPrefix(text, "clocks ") {
		return wire.ErrClock
	}
	return nil
}
