package cli

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/ethereum/go-ethereum/accounts/keystore"
	"github.com/google/uuid"

	"github.com/resultity/node/internal/durable"
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
		if cut == "passphrase" { // and made so large that overwriting it would take hours
			if err := os.Truncate(filepath.Join(dir, cut+".erased"), 1<<40); err != nil {
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

// The account that has the directory does not get root to overwrite other files, or to
// wait.
func TestEraseTouchesNothingElse(t *testing.T) {
	for name, lay := range map[string]func(dir, other string) error{
		"a link to a directory": func(dir, other string) error { return os.Symlink(filepath.Dir(other), dir) },
		"a link": func(dir, other string) error {
			return errors.Join(os.Mkdir(dir, 0o700), os.Symlink(other, filepath.Join(dir, "key.json")))
		},
		"a hard link": func(dir, other string) error {
			return errors.Join(os.Mkdir(dir, 0o700), os.Link(other, filepath.Join(dir, "key.json")))
		},
		"a pipe": func(dir, _ string) error {
			return errors.Join(os.Mkdir(dir, 0o700), syscall.Mkfifo(filepath.Join(dir, "key.json"), 0o600))
		},
	} {
		t.Run(name, func(t *testing.T) {
			other := filepath.Join(t.TempDir(), "key.json")
			if err := os.WriteFile(other, []byte("root's"), 0o600); err != nil {
				t.Fatal(err)
			}
			dir := filepath.Join(t.TempDir(), "id")
			if err := lay(dir, other); err != nil {
				t.Fatal(err)
			}
			err := erase(dir)
			t.Logf("expected: an error, and the file of others as it was; got: %v", err)
			if err == nil {
				t.Error("it was erased")
			}
			if b, err := os.ReadFile(other); err != nil || string(b) != "root's" {
				t.Errorf("%q, %v", b, err)
			}
		})
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

// withService gives the machine a resultity-signer.service, which begins with the
// key and the counters that are there at that moment. The returned function starts
// it as its socket does.
func withService(t *testing.T, c *command) (start func()) {
	t.Helper()
	stop := func() {}
	t.Cleanup(func() { stop() })
	start = func() {
		key, err := c.key(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for _, dir := range []string{c.path(stateDir), filepath.Dir(c.path(signer.SocketPath))} {
			if err := os.MkdirAll(dir, 0o700); err != nil {
				t.Fatal(err)
			}
		}
		counters, err := signer.OpenCounters(c.counters(), key.Address())
		if err != nil {
			t.Fatal(err)
		}
		ln, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: c.path(signer.SocketPath), Net: "unixpacket"})
		if err != nil {
			t.Fatal(err)
		}
		s := &signer.Server{Local: signer.NewLocal(key, counters), Log: slog.New(slog.DiscardHandler), Serves: func(uint32) bool { return true }}
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan error, 1)
		go func() { done <- s.Serve(ctx, ln) }()
		stop = sync.OnceFunc(func() {
			cancel()
			if err := errors.Join(<-done, counters.Close()); err != nil {
				t.Error(err)
			}
		})
	}
	creds := c.systemd
	c.systemd = func(ctx context.Context, name string, stdin []byte, args ...string) ([]byte, error) {
		switch {
		case name != "systemctl":
			return creds(ctx, name, stdin, args...)
		case slices.Equal(args, []string{"stop", service}):
			stop()
		case slices.Equal(args, []string{"start", "resultity-signer.socket"}):
			start()
		default:
			return nil, fmt.Errorf("%s %v is not for this test", name, args)
		}
		return nil, nil
	}
	return start
}

// The agent is stopped for as long as its key is in two places, and no longer.
func TestMigrate(t *testing.T) {
	c, out := machine(t)
	withService(t, c)
	agent, broken := "active", error(nil)
	rest := c.systemd
	c.systemd = func(ctx context.Context, name string, stdin []byte, args ...string) ([]byte, error) {
		switch {
		case name == "systemd-creds" && args[0] == "encrypt" && broken != nil:
			return nil, broken
		case slices.Contains(args, "resultity-agent.service"):
			switch verb := args[len(args)-2]; {
			case verb == "is-active" && agent != "active":
				return nil, errors.New(agent)
			case verb != "is-active":
				agent = map[string]string{"stop": "inactive", "start": "active"}[verb]
			}
			return nil, nil
		}
		return rest(ctx, name, stdin, args...)
	}
	dir := c.path(agentIdentity)
	key, _, err := identity.Open(identity.Options{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}

	broken = errors.New("no TPM")
	if err := c.migrate(t.Context()); !errors.Is(err, broken) || agent != "active" || !identity.Exists(dir) {
		t.Errorf("the key could not be encrypted: %v; the agent is %s", err, agent)
	}
	broken = nil
	counters := filepath.Join(dir, countersFile)
	if err := os.WriteFile(counters, []byte("damaged"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := c.migrate(t.Context()); err == nil || agent != "inactive" || !identity.Exists(dir) {
		t.Errorf("the counters could not be taken over: %v; the agent is %s", err, agent)
	}
	if err := os.Remove(counters); err != nil {
		t.Fatal(err)
	}
	agent = "active" // whoever started it again
	if err := c.migrate(t.Context()); err != nil || agent != "active" || identity.Exists(dir) {
		t.Errorf("%v; the agent is %s", err, agent)
	}
	if now, err := c.key(t.Context()); err != nil || now.Address() != key.Address() {
		t.Errorf("the signer's key: %v, %v", now, err)
	}
	if text := said(t, out); strings.Contains(text, key.Hex()) {
		t.Errorf("said %s", text)
	}
}

// TestRotate makes a new node of a machine whose agent goes on asking. The old
// node's key and counters are kept, and whatever fails on the way leaves the old
// node as it was or the new one whole.
func TestRotate(t *testing.T) {
	c, out := machine(t)
	start := withService(t, c)
	if err := c.rotate(t.Context()); !errors.Is(err, errNoKey) {
		t.Errorf("without a key: %v", err)
	}
	if err := c.init(t.Context()); err != nil {
		t.Fatal(err)
	}
	old, err := c.key(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	start()
	before, err := signer.ReadCounts(c.counters())
	if err != nil || before.Node != old.Address() {
		t.Fatal(before, err)
	}

	good, broken := c.systemd, errors.New("no TPM")
	c.systemd = func(ctx context.Context, name string, stdin []byte, args ...string) ([]byte, error) {
		if args[0] == "encrypt" {
			return nil, broken
		}
		return good(ctx, name, stdin, args...)
	}
	if err := c.rotate(t.Context()); !errors.Is(err, broken) {
		t.Errorf("the key could not be encrypted: %v", err)
	}
	if key, err := c.key(t.Context()); err != nil || key.Address() != old.Address() {
		t.Errorf("the old key is gone: %v", err)
	}
	if now, err := signer.ReadCounts(c.counters()); err != nil || now.Node != old.Address() || now.Starts < before.Starts {
		t.Errorf("the old key's counters went back from %+v to %+v, %v", before, now, err)
	}

	c.systemd = good
	if err := c.rotate(t.Context()); err != nil {
		t.Fatal(err)
	}
	key, err := c.key(t.Context())
	if err != nil || key.Address() == old.Address() {
		t.Fatalf("the key is %v, %v", key.Address(), err)
	}
	s, err := signer.Dial(c.path(signer.SocketPath))
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil || s.Address() != key.Address() {
		t.Errorf("the service signs for %s, and the key is that of %s: %v", s.Address(), key.Address(), err)
	}
	kept := c.path(credentialFile) + "." + strings.ToLower(old.Address().Hex())
	if st, err := os.Stat(kept); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", st, err)
	}
	if raw, err := c.systemd(t.Context(), "systemd-creds", nil, "decrypt", "--name="+keyCredential, kept, "-"); err != nil || strings.TrimSpace(string(raw)) != old.Hex() {
		t.Errorf("the old key was not kept: %v", err)
	}
	if counts, err := signer.ReadCounts(c.counters() + "." + strings.ToLower(old.Address().Hex())); err != nil || counts.Node != old.Address() {
		t.Errorf("the old key's counters were not kept: %v, %v", counts, err)
	}
	if counts, err := signer.ReadCounts(c.counters()); err != nil || counts.Node != key.Address() {
		t.Errorf("the new key's counters: %v, %v", counts, err)
	}
	if text := said(t, out); !strings.Contains(text, key.Address().Hex()) || strings.Contains(text, key.Hex()) || strings.Contains(text, old.Hex()) {
		t.Errorf("said %s", text)
	}

	// Cut short between key and counters: they are the node's before, and the
	// next try moves them.
	if err := c.stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	raw, err := signer.FormatCounts(before)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(c.counters(), raw, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := c.rotate(t.Context()); err != nil {
		t.Errorf("given again: %v", err)
	}
}

// A backup says itself what it costs to open. One that would take all the memory is
// refused before it is tried, and changes nothing.
func TestImportOfACostlyFile(t *testing.T) {
	c, _ := machine(t)
	key, err := evm.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	const pass = "long enough to keep"
	raw, err := keystore.EncryptKey(&keystore.Key{Id: uuid.New(), Address: key.Address(), PrivateKey: key.ECDSA()}, pass, 4096, 1)
	if err != nil {
		t.Fatal(err)
	}
	c.passphrase = filepath.Join(t.TempDir(), "pass")
	name := filepath.Join(t.TempDir(), "backup.json")
	costly := bytes.Replace(raw, []byte(`"n":4096`), []byte(`"n":4194304`), 1)
	if bytes.Equal(costly, raw) {
		t.Fatalf("another form: %s", raw)
	}
	if err := errors.Join(os.WriteFile(c.passphrase, []byte(pass), 0o600), os.WriteFile(name, costly, 0o600)); err != nil {
		t.Fatal(err)
	}
	if err := c.importKey(t.Context(), name); err == nil || !strings.Contains(err.Error(), name) || !strings.Contains(err.Error(), "4096 MiB") {
		t.Errorf("%v", err)
	}
	if _, err := c.key(t.Context()); !errors.Is(err, errNoKey) {
		t.Errorf("a key is there: %v", err)
	}
}

// A file that is named by mistake, or was put in place of another one, is not read to
// its end.
func TestLargeFiles(t *testing.T) {
	c, _ := machine(t)
	dir := t.TempDir()
	at := func(name string, size int) string {
		name = filepath.Join(dir, name)
		if err := os.WriteFile(name, bytes.Repeat([]byte("x"), size), 0o600); err != nil {
			t.Fatal(err)
		}
		return name
	}
	pass := at("pass", 12)
	for name, x := range map[string]struct {
		most int
		read func(file string) error
	}{
		"passphrase": {maxBackup, func(f string) error { c.passphrase = f; _, err := c.secret(); return err }},
		"backup":     {maxBackup, func(f string) error { c.passphrase = pass; return c.importKey(t.Context(), f) }},
		"key":        {maxBackup, func(f string) error { return copyFile(f, f+".copy") }},
		"accounts":   {maxCredential, func(f string) error { _, err := uidOf(f, "resultity"); return err }},
	} {
		file := at(name, x.most+1)
		err := x.read(file)
		t.Logf("%s of %d bytes: expected: %v; got: %v", name, x.most+1, durable.ErrLarge, err)
		if !errors.Is(err, durable.ErrLarge) || !strings.Contains(err.Error(), file) {
			t.Errorf("%s of %d bytes: %v", name, x.most+1, err)
		}
		if err := x.read(at(name, x.most)); errors.Is(err, durable.ErrLarge) {
			t.Errorf("%s of %d bytes: %v", name, x.most, err)
		}
	}
}
