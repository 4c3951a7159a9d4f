package agent

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/resultity/node/internal/control"
	"github.com/resultity/node/internal/deploy/deploytest"
	"github.com/resultity/node/internal/evm"
	"github.com/resultity/node/internal/gate"
	"github.com/resultity/node/internal/session"
	"github.com/resultity/node/internal/wire"
)

// The network's word about whose node this is reaches the operator at once, and
// the disk.
func TestBound(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := build(t, t.TempDir(), deploytest.New(t))
		defer f.Close()
		reg := &wire.Registered{Network: "testnet", Node: nodeKey.Address(), Account: "acme", Time: 1}
		if err := f.store.SetRegistration(reg); err != nil {
			t.Fatal(err)
		}
		f.board.registered, f.board.bound = true, wire.Bound{Account: "acme"}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- f.bindings(ctx) }()
		for _, b := range []wire.Bound{{}, {Account: "0xaa", Method: wire.MethodWallet, Since: 1_800_000_000_000}} {
			f.Message(&b)
			synctest.Wait()
			g := f.gate("registration")
			if (g.State == gate.Open) != (b.Account != "") || g.State != gate.Open && !strings.Contains(g.Remedy, "resultityctl bind") || !strings.Contains(g.Detail, b.Account) {
				t.Errorf("%+v: %+v", b, g)
			}
			kept, err := f.store.Registration()
			if err != nil || kept.Account != b.Account || kept.Method != b.Method || kept.Since != b.Since || kept.Time != 1 {
				t.Errorf("%+v: kept %+v, %v", b, kept, err)
			}
		}
		if g := f.gate("registration"); !strings.Contains(g.Detail, "by wallet on 2027-01-15") {
			t.Errorf("%+v", g)
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

// A step that needs a nonce gets one; what the network says against it is what
// the operator reads.
func TestBindAsksForANonce(t *testing.T) {
	f := build(t, t.TempDir(), deploytest.New(t))
	defer f.Close()
	var steps []wire.BindStep
	var refused error
	f.bind = func(_ context.Context, b session.Binding) (*wire.BindReply, error) {
		steps = append(steps, b.Body.Step)
		if b.Body.Network != "testnet" || b.Body.Node != nodeKey.Address() || b.Key != f.membership.key || b.URL != "https://network.example.net" {
			t.Errorf("%+v", b)
		}
		if b.Body.Step == wire.BindBegin {
			return &wire.BindReply{Nonce: evm.Hash{5}, Bound: wire.Bound{Account: "other"}}, nil
		}
		if b.Body.Nonce != (evm.Hash{5}) && b.Body.Step != wire.BindCode {
			t.Errorf("%s with nonce %s", b.Body.Step, b.Body.Nonce)
		}
		return &wire.BindReply{Network: "testnet", Bound: wire.Bound{Account: "mine"}}, refused
	}
	if _, err := f.Bind(t.Context(), control.BindRequest{Step: wire.BindUnbind}); err == nil || !strings.Contains(err.Error(), "no verified configuration") {
		t.Errorf("without a configuration: %v", err)
	}
	s := deploytest.NewNetwork(t).Publish(nil)
	f.board.learn(s)
	got, err := f.Bind(t.Context(), control.BindRequest{Step: wire.BindToken, Token: "x"})
	if err != nil || got.Bound.Account != "mine" || got.ChainID != s.Config().Network.ChainID || f.Identity()[0].Account != "mine" {
		t.Errorf("%+v, %v, %+v", got, err, f.Identity()[0])
	}
	if _, err := f.Bind(t.Context(), control.BindRequest{Step: wire.BindCode, Code: "1"}); err != nil {
		t.Error(err)
	}
	if want := []wire.BindStep{wire.BindBegin, wire.BindToken, wire.BindCode}; !slices.Equal(steps, want) {
		t.Errorf("steps %q, want %q", steps, want)
	}
	refused = &session.StatusError{Status: 409, Reason: "bound to another account; unbind it first"}
	if _, err := f.Bind(t.Context(), control.BindRequest{Step: wire.BindCode}); err == nil || err.Error() != "bound to another account; unbind it first" {
		t.Errorf("%v", err)
	}
	refused = errors.New("no route to host")
	if _, err := f.Bind(t.Context(), control.BindRequest{Step: wire.BindCode}); !errors.Is(err, refused) {
		t.Errorf("%v", err)
	}
}
