package session

import (
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/resultity/node/internal/evm"
	"github.com/resultity/node/internal/signer"
	"github.com/resultity/node/internal/wire"
)

func TestBind(t *testing.T) {
	want := wire.BindReply{Network: "testnet", Node: nodeKey.Address(), Bound: wire.Bound{Account: "a", Method: wire.MethodToken, Since: 3}, Nonce: evm.Hash{7}}
	seal := func(k *evm.Key, seal func(k *evm.Key, body any) ([]byte, error), change func(*wire.BindReply)) http.HandlerFunc {
		reply := want
		if change != nil {
			change(&reply)
		}
		b, err := seal(k, &reply)
		if err != nil {
			t.Fatal(err)
		}
		return func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(b) }
	}
	binding := func(k *evm.Key, body any) ([]byte, error) { return wire.SealBinding(k, body) }
	registration := func(k *evm.Key, body any) ([]byte, error) { return wire.SealRegistration(k, body) }
	status := func(code int, text string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) { http.Error(w, text, code) }
	}
	for _, c := range []struct {
		name   string
		answer http.HandlerFunc
		want   error
		text   string
	}{
		{"bound", seal(networkKey, binding, nil), nil, ""},
		{"refused", status(409, "bound to another account"), errAny, "bound to another account"},
		{"clock", status(400, "clocks are 5m apart"), wire.ErrClock, "timedatectl"},
		{"no such path", status(404, ""), ErrProtocol, "404"},
		{"signed by somebody else", seal(otherKey, binding, nil), wire.ErrSigner, ""},
		{"a registration's reply", seal(networkKey, registration, nil), wire.ErrSigner, ""},
		{"about another node", seal(networkKey, binding, func(r *wire.BindReply) { r.Node = evm.Address{1} }), ErrProtocol, ""},
		{"of another network", seal(networkKey, binding, func(r *wire.BindReply) { r.Network = "mainnet" }), ErrProtocol, "mainnet"},
		{"redirected", func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "/elsewhere", http.StatusPermanentRedirect)
		}, errAny, "308"},
		{"not ours", status(200, "<html>"), ErrProtocol, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			srv := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				raw, err := io.ReadAll(r.Body)
				if err != nil {
					t.Error(err)
				}
				var req wire.BindRequest
				who, err := wire.OpenBinding(raw, &req)
				if err != nil || who != nodeKey.Address() || r.URL.Path != "/base"+wire.BindPath || req.Code != "12345678" || req.Time == 0 {
					t.Errorf("%s: %+v by %s (%v)", r.URL, req, who, err)
				}
				c.answer(w, r)
			}))
			defer srv.Close()
			got, err := Bind(t.Context(), Binding{
				URL: srv.URL + "/base", Client: srv.Client(), Key: signer.NewLocal(nodeKey, nil), Trusted: func(a evm.Address) bool { return a == networkKey.Address() },
				Body: wire.BindRequest{Network: "testnet", Node: nodeKey.Address(), Step: wire.BindCode, Code: "12345678"},
			})
			if c.want == nil {
				if err != nil || *got != want {
					t.Fatalf("Bind = %+v, %v", got, err)
				}
				return
			}
			if err == nil || c.want != errAny && !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.text) || strings.Contains(err.Error(), "12345678") {
				t.Errorf("Bind = %+v, %v; want %v and %q", got, err, c.want, c.text)
			}
		})
	}
}
