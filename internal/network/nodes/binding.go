package nodes

import (
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/resultity/node/internal/binding"
	"github.com/resultity/node/internal/evm"
	"github.com/resultity/node/internal/failpoint"
	"github.com/resultity/node/internal/journal"
	"github.com/resultity/node/internal/network/mail"
	"github.com/resultity/node/internal/network/store"
	"github.com/resultity/node/internal/wire"
)

// Bounds of a binding.
const (
	challengeLife = 10 * time.Minute // of a nonce
	codeLife      = 10 * time.Minute
	codeTries     = 5
)

// Codes makes the codes that are sent by mail. The store has a code's seed and
// not this key: who reads the one finds no code.
type Codes struct{ key [32]byte }

// NewCodes derives the key from the network's.
func NewCodes(k *evm.Key) Codes {
	return Codes{sha256.Sum256([]byte("resultity codes\n" + k.Hex()))}
}

// Of returns the code of a seed for a node: eight digits.
func (c Codes) Of(seed evm.Hash, node evm.Address) string {
	h := hmac.New(sha256.New, c.key[:])
	h.Write(seed[:]) // a hash's Write does not fail
	h.Write(node[:])
	return fmt.Sprintf("%08d", binary.BigEndian.Uint64(h.Sum(nil))%1e8)
}

// Outbox takes the message with a code; nil in [Options] where no mail is sent.
type Outbox interface {
	Put(context.Context, store.Mail) error
}

// refusal is an answer to a request that is not granted. The text is for the
// node's operator.
type refusal struct {
	status int
	text   string
}

func (r *refusal) Error() string { return r.text }

func refuse(status int, format string, args ...any) error {
	return &refusal{status, fmt.Sprintf(format, args...)}
}

// ServeBinding answers POST /node/v1/binding.
func (m *Manager) ServeBinding(w http.ResponseWriter, r *http.Request) {
	req, reply, err := m.bind(r.Context(), w, r)
	status, text := http.StatusOK, ""
	if err != nil {
		status, text = http.StatusInternalServerError, "the network could not write it down; try again later"
		if no, ok := errors.AsType[*refusal](err); ok {
			status, text = no.status, no.text
		}
		m.log.Warn("binding refused", journal.NodeBindingRefused.Attr(), "node", req.Node, "step", fmt.Sprintf("%.20q", req.Step), "status", status, "from", r.RemoteAddr, "error", err)
	}
	m.metrics.Bindings.WithLabelValues(stepLabel(req.Step), http.StatusText(status)).Inc()
	if err == nil {
		w.Header().Set("Content-Type", "application/octet-stream")
		failpoint.Here("nodes.bind.answered")
		_, _ = w.Write(reply) // a node that has gone asks again
		return
	}
	if status == http.StatusTooManyRequests || status >= 500 {
		w.Header().Set("Retry-After", "60")
	}
	http.Error(w, text, status)
}

// stepLabel keeps what strangers send out of the metrics.
func stepLabel(s wire.BindStep) string {
	if slices.Contains([]wire.BindStep{wire.BindBegin, wire.BindWallet, wire.BindEmail, wire.BindCode, wire.BindToken, wire.BindUnbind}, s) {
		return string(s)
	}
	return "unknown"
}

func (m *Manager) bind(ctx context.Context, w http.ResponseWriter, r *http.Request) (req wire.BindRequest, reply []byte, err error) {
	raw, err := m.body(w, r)
	if err != nil {
		return req, nil, err
	}
	signer, err := wire.OpenBinding(raw, &req)
	now, net := time.Now(), m.dispatch.Terms().Config.Network
	switch off := now.Sub(time.UnixMilli(req.Time)).Abs(); {
	case errors.Is(err, wire.ErrSigner):
		return req, nil, refuse(http.StatusUnauthorized, "%v", err)
	case err != nil:
		return req, nil, refuse(http.StatusBadRequest, "%v", err)
	case signer != req.Node:
		return req, nil, refuse(http.StatusUnauthorized, "request of %s is signed by %s", req.Node, signer)
	case req.Network != net.Name:
		return req, nil, refuse(http.StatusConflict, "this is network %s, not %.64q", net.Name, req.Network)
	case off > net.ClockWindow.Duration():
		return req, nil, refuse(http.StatusBadRequest, "clocks are %v apart, at most %v; check that the node keeps time (timedatectl)", off.Round(time.Millisecond), net.ClockWindow.Duration())
	case len(req.Email) > 254 || len(req.Token) > 256 || len(req.Code) > 64:
		return req, nil, refuse(http.StatusBadRequest, "address, token or code is too long")
	}
	node, err := m.registry.Node(ctx, req.Node)
	if errors.Is(err, store.ErrNotFound) {
		return req, nil, refuse(http.StatusForbidden, "node %s is not registered", req.Node)
	}
	if err != nil {
		return req, nil, err
	}
	if !m.limits.requestsOf.allow(req.Node) {
		return req, nil, refuse(http.StatusTooManyRequests, "too many requests of this node; try again in an hour")
	}
	old := node.Binding
	node, expires, err := m.step(ctx, &req, node, now, Source(r.RemoteAddr))
	if err != nil {
		return req, nil, err
	}
	if old != node.Binding {
		m.tell(node)
	}
	reply, err = wire.SealBinding(m.key, &wire.BindReply{
		Network: net.Name, Node: node.Address, Time: now.UnixMilli(), Bound: *bound(node.Binding), Nonce: node.Challenge, Expires: expires,
	})
	return req, reply, err
}

// step does what is asked for and returns the node as it is then, and until when
// what was made for the next step is good.
func (m *Manager) step(ctx context.Context, req *wire.BindRequest, node store.Node, now time.Time, source netip.Prefix) (store.Node, int64, error) {
	change := func(f func(*store.Node) error) (store.Node, int64, error) {
		n, err := m.registry.UpdateNode(ctx, node.Address, f)
		return n, n.ChallengeExpires, err
	}
	// granted binds the node, or unbinds it, if the nonce is good.
	granted := func(b store.Binding, e store.BindEvent, more func(*store.Node) error) (store.Node, int64, error) {
		b.Since, b.Nonce = now.UnixMilli(), req.Nonce
		return change(func(n *store.Node) error {
			if again, err := present(n, req.Nonce, b, now); again || err != nil {
				return err
			}
			if more != nil {
				if err := more(n); err != nil {
					return err
				}
			}
			n.SetBinding(b, e)
			return nil
		})
	}
	switch req.Step {
	case wire.BindBegin:
		return change(func(n *store.Node) error {
			_, _ = rand.Read(n.Challenge[:]) // never fails: it ends the program instead
			n.ChallengeExpires = now.Add(challengeLife).UnixMilli()
			if n.Code != nil && now.UnixMilli() >= n.Code.Expires {
				n.Code = nil // and with it the address
			}
			return nil
		})
	case wire.BindWallet:
		return m.bindWallet(req, node, now, granted)
	case wire.BindToken:
		account, name, err := m.registry.TokenAccount(ctx, req.Token, node.Address, now)
		if err != nil {
			return node, 0, asRefusal(err)
		}
		n, expires, err := granted(store.Binding{Account: account, Method: wire.MethodToken}, store.BindEvent{By: "owner"}, func(n *store.Node) error { return n.UseToken(name) })
		return n, expires, asRefusal(err)
	case wire.BindUnbind:
		return granted(store.Binding{}, store.BindEvent{By: "node"}, nil)
	case wire.BindEmail:
		return m.sendCode(ctx, req, node, now, source, change)
	case wire.BindCode:
		return m.takeCode(ctx, req, node, now, change)
	}
	return node, 0, refuse(http.StatusBadRequest, "unknown step %.20q", req.Step)
}

// asRefusal gives a token that is not good the status that registrations have.
func asRefusal(err error) error {
	if errors.Is(err, store.ErrToken) {
		return refuse(http.StatusForbidden, "%v", err)
	}
	return err
}

// present says whether the node is already as want would make it, by the request
// with this nonce, and else whether it may be changed so.
func present(n *store.Node, nonce evm.Hash, want store.Binding, now time.Time) (again bool, err error) {
	switch {
	case nonce == evm.Hash{}:
		return false, refuse(http.StatusBadRequest, "no nonce; begin anew")
	case n.Nonce == nonce && n.Account == want.Account && n.Method == want.Method:
		return true, nil
	case n.Challenge != nonce:
		return false, refuse(http.StatusBadRequest, "the nonce was used already, or another one has taken its place; begin anew")
	case now.UnixMilli() >= n.ChallengeExpires:
		return false, refuse(http.StatusBadRequest, "the nonce has expired; begin anew")
	}
	return false, free(n, want)
}

// free says why a node cannot be bound as wanted, if so.
func free(n *store.Node, want store.Binding) error {
	switch {
	case want.Account != "" && n.Account != "" && n.Account != want.Account:
		return refuse(http.StatusConflict, "this node is bound to another account, %s; unbind it first: resultityctl unbind", n.Account)
	case want.Account != "" && n.Account != "":
		return refuse(http.StatusConflict, "this node is bound to %s already", n.Account)
	case want.Account == "" && n.Account == "":
		return refuse(http.StatusConflict, "this node is bound to no account")
	}
	return nil
}

type grant func(store.Binding, store.BindEvent, func(*store.Node) error) (store.Node, int64, error)

func (m *Manager) bindWallet(req *wire.BindRequest, node store.Node, now time.Time, granted grant) (store.Node, int64, error) {
	s := req.Statement
	if s == nil {
		return node, 0, refuse(http.StatusBadRequest, "no statement")
	}
	action := s.Statement.Action
	if action != binding.Bind && action != binding.Unbind {
		return node, 0, refuse(http.StatusBadRequest, "unknown action %.20q", action)
	}
	net := m.dispatch.Terms().Config.Network
	if err := s.CheckTerms(binding.Terms{
		Network: net.Name, ChainID: net.ChainID, Node: node.Address, Action: action, Nonce: req.Nonce, Now: now, Window: net.ClockWindow.Duration(),
	}); err != nil {
		return node, 0, refuse(http.StatusForbidden, "%v", err)
	}
	account := s.Statement.Owner.Hex()
	event := store.BindEvent{By: "owner", Signed: s}
	if action == binding.Bind {
		return granted(store.Binding{Account: account, Method: wire.MethodWallet}, event, nil)
	}
	return granted(store.Binding{}, event, func(n *store.Node) error {
		if n.Account != account {
			return refuse(http.StatusForbidden, "%s is not the account that this node is bound to", account)
		}
		return nil
	})
}

// sendCode sends a code. What it answers depends on the node alone, not on the
// address: whether somebody has it, or has an account here, or has been sent too
// many codes, is nobody's business.
func (m *Manager) sendCode(ctx context.Context, req *wire.BindRequest, node store.Node, now time.Time, source netip.Prefix, change func(func(*store.Node) error) (store.Node, int64, error)) (store.Node, int64, error) {
	if m.opt.Outbox == nil {
		return node, 0, refuse(http.StatusForbidden, "this network sends no mail; bind by wallet or enrolment token")
	}
	to, err := mail.ParseAddress(req.Email)
	if err != nil {
		return node, 0, refuse(http.StatusBadRequest, "%v", err)
	}
	if err := free(&node, store.Binding{Account: "any"}); err != nil {
		return node, 0, err
	}
	if !m.limits.codesOf.allow(node.Address) || !m.limits.codesSource.allow(source) || !m.limits.codes.Allow() {
		return node, 0, refuse(http.StatusTooManyRequests, "too many codes were asked for; try again in an hour")
	}
	send := m.limits.codesTo.allow(strings.ToLower(to))
	code := store.Code{Email: to, Expires: now.Add(codeLife).UnixMilli()}
	if !send {
		code.Email = "" // nobody can know it, so nobody is to guess it
	}
	_, _ = rand.Read(code.Seed[:]) // never fails: it ends the program instead
	n, _, err := change(func(n *store.Node) error {
		if again, err := present(n, req.Nonce, store.Binding{Account: "any"}, now); again || err != nil {
			return err
		}
		n.Challenge, n.ChallengeExpires, n.Code = evm.Hash{}, 0, &code
		return nil
	})
	if err != nil {
		return n, 0, err
	}
	if !send {
		m.log.Warn("no code is sent: too many for this address", "node", node.Address)
		return n, code.Expires, nil
	}
	err = m.opt.Outbox.Put(ctx, store.Mail{ID: rand.Text(), To: to, Node: node.Address, Seed: code.Seed, Expires: code.Expires})
	if errors.Is(err, mail.ErrFull) {
		return n, 0, refuse(http.StatusServiceUnavailable, "%v; try again later", err)
	}
	return n, code.Expires, err
}

// takeCode binds a node to the address whose code it knows. A wrong code is
// written down, so that a restart gives no further tries.
func (m *Manager) takeCode(ctx context.Context, req *wire.BindRequest, node store.Node, now time.Time, change func(func(*store.Node) error) (store.Node, int64, error)) (store.Node, int64, error) {
	given := strings.TrimSpace(req.Code)
	matches := func(seed evm.Hash) bool { return hmac.Equal([]byte(given), []byte(m.codes.Of(seed, node.Address))) }
	if node.Method == wire.MethodEmail && matches(node.Nonce) {
		return node, 0, nil // the code that has bound it
	}
	var wrong error
	n, expires, err := change(func(n *store.Node) error {
		wrong = nil
		switch c := n.Code; {
		case n.Account != "":
			return free(n, store.Binding{Account: "any"})
		case c == nil, now.UnixMilli() >= c.Expires, c.Tries >= codeTries:
			return refuse(http.StatusForbidden, "there is no code that is good: it has expired, was used, or was guessed at too often; ask for another (resultityctl bind --email)")
		case c.Email == "" || !matches(c.Seed):
			copied := *c
			copied.Tries++
			n.Code = &copied
			wrong = refuse(http.StatusForbidden, "wrong code; %d tries are left", codeTries-copied.Tries)
			return nil
		}
		account, err := m.registry.EmailAccount(ctx, n.Code.Email, now)
		if err != nil {
			return err
		}
		n.SetBinding(store.Binding{Account: account.ID, Method: wire.MethodEmail, Since: now.UnixMilli(), Nonce: n.Code.Seed}, store.BindEvent{By: "owner"})
		return nil
	})
	return n, expires, errors.Join(wrong, err)
}

// Changed tells the node and dispatch that the operator has changed a binding.
func (m *Manager) Changed(n store.Node) { m.tell(n) }

// tell passes a change on to dispatch and to the node.
func (m *Manager) tell(n store.Node) {
	m.log.Info("binding changed", "node", n.Address, "account", n.Account, "method", n.Method)
	m.joining.Lock()
	defer m.joining.Unlock()
	ctx, cancel := context.WithTimeout(context.Background(), helloTimeout)
	defer cancel()
	// Another change may have come after this one, and be told already.
	if latest, err := m.registry.Node(ctx, n.Address); err == nil {
		n = latest
	}
	m.mu.Lock()
	s := m.current[n.Address]
	m.mu.Unlock()
	if s != nil {
		s.Send(bound(n.Binding))
	}
	m.dispatch.SetAccount(n.Address, n.Account)
}

func bound(b store.Binding) *wire.Bound {
	return &wire.Bound{Account: b.Account, Method: b.Method, Since: b.Since}
}
