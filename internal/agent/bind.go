package agent

import (
	"context"
	"errors"

	"github.com/resultity/node/internal/control"
	"github.com/resultity/node/internal/evm"
	"github.com/resultity/node/internal/journal"
	"github.com/resultity/node/internal/session"
	"github.com/resultity/node/internal/wire"
)

// askBinding passes the operator's wish on to the
// network, with the node's signature. That is the node's consent; the network
// checks the owner's.
func (m *membership) askBinding(ctx context.Context, q control.BindRequest) (control.Binding, error) {
	snap := m.board.snapshot()
	if snap == nil {
		return control.Binding{}, errors.New("there is no verified configuration yet, so the network's answer could not be checked; see resultityctl status")
	}
	ask := func(body wire.BindRequest) (*wire.BindReply, error) {
		body.Network, body.Node = m.net.Name, m.key.Address()
		return m.bind(ctx, session.Binding{URL: m.net.URL, Client: m.http, Key: m.key, Trusted: trusted(snap), Body: body})
	}
	body := wire.BindRequest{Step: q.Step, Nonce: q.Nonce, Statement: q.Statement, Email: q.Email, Code: q.Code, Token: q.Token}
	if q.Step != wire.BindBegin && q.Step != wire.BindCode && q.Nonce == (evm.Hash{}) {
		begun, err := ask(wire.BindRequest{Step: wire.BindBegin})
		if err != nil {
			return control.Binding{}, inWords(err)
		}
		body.Nonce = begun.Nonce
	}
	reply, err := ask(body)
	if err != nil {
		return control.Binding{}, inWords(err)
	}
	m.setBound(reply.Bound)
	return control.Binding{
		Network: reply.Network, ChainID: snap.Config().Network.ChainID, Node: reply.Node,
		Bound: reply.Bound, Nonce: reply.Nonce, Now: reply.Time, Expires: reply.Expires,
	}, nil
}

// inWords leaves the network's own words of a refusal, which say what to do.
func inWords(err error) error {
	if e, ok := errors.AsType[*session.StatusError](err); ok && e.Err == nil && e.Reason != "" {
		return errors.New(e.Reason)
	}
	return err
}

// setBound takes the network's word about whose node this is.
func (m *membership) setBound(now wire.Bound) {
	var before wire.Bound
	m.board.set(func(b *board) { before, b.bound = b.bound, now })
	if before == now {
		return
	}
	if now.Account != "" {
		m.log.Info("bound to an account", journal.Bound.Attr(), "account", now.Account, "method", now.Method)
	} else {
		m.log.Warn("bound to no account", journal.Unbound.Attr(), "account", before.Account)
	}
	m.on.changed()
	poke(m.keep)
}

// bindings writes down whose node this is, so that it is known before the next
// session. It is the network's word that counts: failing here harms nothing.
func (m *membership) bindings(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-m.keep:
		}
		reg, err := m.store.Registration()
		if err == nil && reg != nil {
			m.board.set(func(b *board) { reg.Account, reg.Method, reg.Since = b.bound.Account, b.bound.Method, b.bound.Since })
			err = m.store.SetRegistration(reg)
		}
		if err != nil {
			m.log.Warn("account not written down; the network says it again", "error", err)
		}
	}
}
