package clients

import (
	"bytes"
	"context"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/resultity/node/internal/binding"
	"github.com/resultity/node/internal/control"
	"github.com/resultity/node/internal/ctl"
	"github.com/resultity/node/internal/evm"
	"github.com/resultity/node/internal/wire"
)

// agent is one whose network grants what is signed as it must be.
type agent struct {
	control.Backend
	t testing.TB
}

func (a agent) Bind(_ context.Context, q control.BindRequest) (control.Binding, error) {
	now := time.Now()
	b := control.Binding{Network: "testnet", ChainID: 31337, Node: evm.Address{7}, Nonce: evm.Hash{9}, Now: now.UnixMilli(), Expires: now.Add(time.Minute).UnixMilli()}
	if q.Step != wire.BindWallet {
		return b, nil
	}
	b.Bound = wire.Bound{Account: q.Statement.Statement.Owner.Hex(), Method: wire.MethodWallet}
	return b, q.Statement.CheckTerms(binding.Terms{
		Network: b.Network, ChainID: b.ChainID, Node: b.Node, Action: binding.Bind, Nonce: b.Nonce, Now: now, Window: time.Minute,
	})
}

func (agent) Metrics() http.Handler { return http.NotFoundHandler() } // nobody asks here

// What resultityctl prints is what a wallet of somebody else's signs, and what
// that returns is what resultityctl takes.
func TestEthersSignsBinding(t *testing.T) {
	key, err := evm.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	l, err := control.Listen(dir)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- control.Serve(ctx, l, agent{t: t}) }()
	defer func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}()
	run := func(args ...string) string {
		t.Helper()
		var out, text bytes.Buffer
		args = append([]string{"--socket", filepath.Join(dir, control.SocketName)}, args...)
		if code := ctl.Main(t.Context(), args, ctl.IO{In: strings.NewReader(""), Out: &out, Err: &text, Getenv: os.Getenv}, "test"); code != 0 {
			t.Fatalf("resultityctl %s: %d\n%s", args, code, text.Bytes())
		}
		return out.String()
	}
	file, wallet := filepath.Join(dir, "typed.json"), key.Address().Hex()
	run("bind", "--wallet", wallet, "--typed-data", file)
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	sig, err := Run(t.Context(), "sign.mjs", data, "PRIVATE_KEY=0x"+key.Hex())
	if err != nil {
		t.Fatal(err)
	}
	if out := run("bind", "--wallet", wallet, "--typed-data", file, "--signature", sig); !strings.Contains(out, "is bound to "+wallet) {
		t.Errorf("%s", out)
	}
}
