package cli

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/ethereum/go-ethereum/accounts/keystore"

	"github.com/resultity/node/internal/evm"
	"github.com/resultity/node/internal/identity"
	"github.com/resultity/node/internal/signer"
)

// machine is a command on a machine of its own, whose systemd-creds turns bytes
// around instead of encrypting.
func machine(t *testing.T) (*command, *os.File) {
	t.Helper()
	out, err := os.Create(filepath.Join(t.TempDir(), "out"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = out.Close() })
	c := &command{out: out, err: out, env: func(string) string { return "" }, root: t.TempDir(), scryptN: keystore.LightScryptN}
	c.systemd = func(_ context.Context, name string, stdin []byte, args ...string) ([]byte, error) {
		if name != "systemd-creds" {
			return nil, fmt.Errorf("%s %v is not for this test", name, args)
		}
		if args[1] != "--name="+keyCredential {
			return nil, errors.New("credential of another name")
		}
		raw := stdin
		if args[0] == "decrypt" {
			if raw, err = os.ReadFile(args[2]); err != nil {
				return nil, err
			}
		}
		raw = bytes.Clone(raw)
		slices.Reverse(raw)
		return raw, nil
	}
	return c, out
}

func said(t *testing.T, out *os.File) string {
	t.Helper()
	raw, err := os.ReadFile(out.Name())
	if err != nil {
		t.Fatal(err)
	}
	return string(raw)
}

func TestInitMakesOneKey(t *testing.T) {
	c, out := machine(t)
	if err := c.show(t.Context()); !errors.Is(err, errNoKey) {
		t.Errorf("show without a key: %v", err)
	}
	if err := c.init(t.Context()); err != nil {
		t.Fatal(err)
	}
	key, err := c.key(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := c.init(t.Context()); err != nil {
		t.Fatal(err)
	}
	if again, err := c.key(t.Context()); err != nil || again.Address() != key.Address() {
		t.Errorf("a second init has made another key: %v, %v", again, err)
	}
	if err := c.show(t.Context()); err != nil {
		t.Error(err)
	}
	if text := said(t, out); !strings.Contains(text, key.Address().Hex()) || strings.Contains(text, key.Hex()) {
		t.Errorf("said %s", text)
	}
	st, err := os.Stat(c.path(credentialFile))
	if err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", st.Mode(), err)
	}
	// A damaged one is not replaced.
	if err := os.WriteFile(c.path(credentialFile), []byte("garbage"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := c.init(t.Context()); err == nil {
		t.Error("init has made a key over one that it could not read")
	}
}

func TestInitLeavesTheAgentsKey(t *testing.T) {
	c, _ := machine(t)
	if _, _, err := identity.Open(identity.Options{Dir: c.path(agentIdentity)}); err != nil {
		t.Fatal(err)
	}
	if err := c.init(t.Context()); err == nil || !strings.Contains(err.Error(), "migrate") {
		t.Errorf("%v", err)
	}
}

// A backup can be read by wallets, and by nobody without the passphrase.
func TestExport(t *testing.T) {
	c, _ := machine(t)
	if err := c.init(t.Context()); err != nil {
		t.Fatal(err)
	}
	key, err := c.key(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(c.path(stateDir), 0o700); err != nil {
		t.Fatal(err)
	}
	raw, err := signer.FormatCounts(signer.Counts{Node: key.Address(), Starts: 5, Networks: map[string]uint64{"testnet": 7}, Chains: []uint64{1}})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(c.counters(), raw, 0o600); err != nil {
		t.Fatal(err)
	}
	name := filepath.Join(t.TempDir(), "backup.json")
	if err := c.export(t.Context(), name); !errors.Is(err, errUsage) {
		t.Errorf("without a passphrase: %v", err)
	}
	c.passphrase = filepath.Join(t.TempDir(), "pass")
	for text, want := range map[string]bool{"short": false, "long enough to keep\n": true} {
		if err := os.WriteFile(c.passphrase, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := c.export(t.Context(), name); (err == nil) != want {
			t.Errorf("passphrase %q: %v", text, err)
		}
	}
	if err := os.WriteFile(c.passphrase, []byte("long enough to keep\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	_ = os.Remove(name)
	if err := c.export(t.Context(), name); err != nil {
		t.Fatal(err)
	}
	if err := c.export(t.Context(), name); err == nil {
		t.Error("a backup was overwritten")
	}
	file, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	k, err := keystore.DecryptKey(file, "long enough to keep")
	if err != nil || evm.FromECDSA(k.PrivateKey).Address() != key.Address() {
		t.Errorf("%v", err)
	}
	if bytes.Contains(file, []byte(key.Hex())) || !bytes.Contains(file, []byte(`"testnet":7`)) && !bytes.Contains(file, []byte(`"testnet": 7`)) {
		t.Errorf("backup: %s", file)
	}
}

// Whatever is left of the agent's key is gone, also after a cut.
func TestErase(t *testing.T) {
	for _, cut := range []string{"", "key.json", "passphrase"} {
		dir := filepath.Join(t.TempDir(), "id")
		if _, _, err := identity.Open(identity.Options{Dir: dir}); err != nil {
			t.Fatal(err)
		}
		if cut != "" { // it was renamed, and no more
			if err := os.Rename(filepath.Join(dir, cut), filepath.Join(dir, cut+".erased")); err != nil {
				t.Fatal(err)
			}
		}
		if err := erase(dir); err != nil {
			t.Fatal(err)
		}
		if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
			t.Errorf("cut at %q: left %v, %v", cut, left, err)
		}
	}
	if err := erase(filepath.Join(t.TempDir(), "none")); err != nil {
		t.Errorf("nothing there: %v", err)
	}
}

func TestAllowAndAccounts(t *testing.T) {
	if got, err := parseAllow("testnet:31337,mainnet:1"); err != nil || got["testnet"] != 31337 || got["mainnet"] != 1 || len(got) != 2 {
		t.Errorf("%v, %v", got, err)
	}
	for _, s := range []string{"x", ":1", "x:", "x:-1", "x:1,"} {
		if _, err := parseAllow(s); !errors.Is(err, errUsage) {
			t.Errorf("%q: %v", s, err)
		}
	}
	file := filepath.Join(t.TempDir(), "passwd")
	if err := os.WriteFile(file, []byte("root:x:0:0::/:/bin/sh\nresultity:x:995:995::/:\nresultity2:x:1:1::/:\nbroken:x\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if uid, err := uidOf(file, "resultity"); uid != 995 || err != nil {
		t.Errorf("%d, %v", uid, err)
	}
	for _, name := range []string{"nobody", "broken", ""} {
		if uid, err := uidOf(file, name); err == nil {
			t.Errorf("%q: %d", name, uid)
		}
	}
}
