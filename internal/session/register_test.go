package session

import (
	"bytes"
	"crypto/sha1"
	"crypto/tls"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/resultity/node/internal/evm"
	"github.com/resultity/node/internal/signer"
	"github.com/resultity/node/internal/wire"
)

func acceptKey(r *http.Request) string {
	sum := sha1.Sum([]byte(r.Header.Get("Sec-Websocket-Key") + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"))
	return base64.StdEncoding.EncodeToString(sum[:])
}

func tls12() *tls.Config { return &tls.Config{MaxVersion: tls.VersionTLS12} }

func registration(url string, client *http.Client) Registration {
	return Registration{
		URL: url + "/base", Client: client, Key: signer.NewLocal(nodeKey, nil),
		Trusted: func(a evm.Address) bool { return a == networkKey.Address() },
		Body:    wire.Registration{Network: "testnet", Node: nodeKey.Address(), Token: "secret-token", Agent: "v1"},
	}
}

func TestRegister(t *testing.T) {
	want := wire.Registered{Network: "testnet", Node: nodeKey.Address(), Account: "a", Time: 7}
	seal := func(k *evm.Key, body any) []byte {
		b, err := wire.SealRegistration(k, body)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	answer := func(b []byte) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(b) }
	}
	status := func(code int, text string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) { http.Error(w, text, code) }
	}
	flipped := seal(networkKey, &want)
	flipped[bytes.Index(flipped, []byte(`"a"`))+1] = 'b' // the account
	otherNode, otherNetwork := want, want
	otherNode.Node, otherNetwork.Network = evm.Address{1}, "mainnet"
	for _, c := range []struct {
		name   string
		answer http.HandlerFunc
		want   error
		text   string
	}{
		{"registered", answer(seal(networkKey, &want)), nil, ""},
		{"token", status(403, "token used up"), ErrToken, "token used up"},
		{"another network", status(409, ""), ErrWrongNetwork, "409"},
		{"clock", status(400, "clocks are 5m apart"), wire.ErrClock, "timedatectl"},
		{"malformed", status(400, "bad json"), errAny, "bad json"},
		{"signer", status(401, "not you"), errAny, "not you"},
		{"busy", status(429, "later"), errAny, "429"},
		{"broken", status(500, strings.Repeat("x", 1<<20)), errAny, "500"},
		{"no such path", status(404, ""), ErrProtocol, "404"},
		{"redirected", func(w http.ResponseWriter, r *http.Request) {
			if strings.Contains(r.URL.Path, "elsewhere") {
				t.Error("the token was sent elsewhere")
			}
			http.Redirect(w, r, "/elsewhere", http.StatusPermanentRedirect)
		}, errAny, "308"},
		{"signed by somebody else", answer(seal(otherKey, &want)), wire.ErrSigner, ""},
		{"signed by the node", answer(seal(nodeKey, &want)), wire.ErrSigner, ""},
		{"a flipped bit", answer(flipped), wire.ErrSigner, ""},
		{"about another node", answer(seal(networkKey, &otherNode)), ErrProtocol, ""},
		{"of another network", answer(seal(networkKey, &otherNetwork)), ErrProtocol, "mainnet"},
		{"empty", answer(nil), ErrProtocol, ""},
		{"not ours", answer(bytes.Repeat([]byte("<html>"), 100)), errAny, ""},
		{"endless", func(w http.ResponseWriter, _ *http.Request) {
			for range 1000 {
				if _, err := w.Write(make([]byte, 1<<10)); err != nil {
					return
				}
			}
		}, ErrProtocol, "more than"},
	} {
		t.Run(c.name, func(t *testing.T) {
			srv := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				body, err := io.ReadAll(r.Body)
				if err != nil {
					t.Error(err)
				}
				var reg wire.Registration
				who, err := wire.OpenRegistration(body, &reg)
				off := time.Since(time.UnixMilli(reg.Time)).Abs()
				reg.Time = 0
				if err != nil || who != nodeKey.Address() || r.Method != http.MethodPost || r.URL.Path != "/base"+wire.RegisterPath ||
					r.Header.Get("Content-Type") != "application/octet-stream" || off > time.Minute || reg != registration("", nil).Body {
					t.Errorf("%s %s: %+v by %s (%v)", r.Method, r.URL, reg, who, err)
				}
				c.answer(w, r)
			}))
			defer srv.Close()
			got, err := Register(t.Context(), registration(srv.URL, srv.Client()))
			if c.want == nil {
				if err != nil || *got != want {
					t.Fatalf("Register = %+v, %v; want %+v", got, err, want)
				}
				return
			}
			if err == nil || c.want != errAny && !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.text) || len(err.Error()) > 2000 {
				t.Errorf("Register = %+v, %v; want %v and %q", got, err, c.want, c.text)
			}
			if err != nil && strings.Contains(err.Error(), "secret-token") {
				t.Error("the error tells the token")
			}
		})
	}
}

var errAny = fmt.Errorf("any error")

func TestRegisterNeedsHTTPS(t *testing.T) {
	srv := httptest.NewServer(http.NotFoundHandler())
	defer srv.Close()
	_, err := Register(t.Context(), registration(srv.URL, srv.Client()))
	t.Logf("expected: an error that names https://; got: %v", err)
	if err == nil || !strings.Contains(err.Error(), "https://") {
		t.Errorf("Register over plain HTTP = %v, want a refusal", err)
	}
}
