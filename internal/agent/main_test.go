package agent

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/resultity/node/internal/deploy/deploytest"
	"github.com/resultity/node/internal/journal"
	"github.com/resultity/node/internal/state"
	"github.com/resultity/node/internal/wire"
)

// installation is a directory with all that an agent needs on disk.
type installation struct {
	t   *testing.T
	dir string
	env map[string]string
}

func install(t *testing.T) *installation {
	t.Helper()
	i := &installation{t, t.TempDir(), map[string]string{}}
	i.env["XDG_RUNTIME_DIR"] = i.path("run")
	root, err := os.ReadFile(deploytest.NewNetwork(t).Root())
	if err != nil {
		t.Fatal(err)
	}
	i.write("root.json", string(root))
	i.write("agent.toml", fmt.Sprintf("[network.testnet]\nurl = \"https://127.0.0.1:1\"\nroot = %q\n[paths]\nstate = %q\n", i.path("root.json"), i.path("state")))
	// Without a user manager the start ends where it would be asked.
	t.Setenv("DBUS_SESSION_BUS_ADDRESS", "unix:path="+i.path("no-bus"))
	t.Setenv("XDG_RUNTIME_DIR", i.path("run"))
	return i
}

func (i *installation) path(name string) string { return filepath.Join(i.dir, name) }

func (i *installation) write(name, text string) {
	i.t.Helper()
	if err := os.MkdirAll(filepath.Dir(i.path(name)), 0o700); err != nil {
		i.t.Fatal(err)
	}
	if err := os.WriteFile(i.path(name), []byte(text), 0o600); err != nil {
		i.t.Fatal(err)
	}
}

// main runs the program and returns its exit code and what it said.
func (i *installation) main(ctx context.Context, args ...string) (code int, stdout, stderr string) {
	i.t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		i.t.Fatal(err)
	}
	said := make(chan string)
	go func() {
		b, _ := io.ReadAll(r)
		said <- string(b)
	}()
	var out bytes.Buffer
	code = Main(ctx, append([]string{"--config", i.path("agent.toml")}, args...), &out, w, func(k string) string { return i.env[k] }, "1.2.3")
	_ = w.Close() // nothing more is said
	stderr = <-said
	_ = r.Close() // read to its end
	return code, out.String(), stderr
}

func TestCommandLine(t *testing.T) {
	i := install(t)
	for _, c := range []struct {
		args []string
		code int
		out  string
		err  string
	}{
		{[]string{"version"}, ExitOK, "1.2.3\n", ""},
		{[]string{"check"}, ExitOK, i.path("agent.toml") + ": ok\n", ""},
		{[]string{"--help"}, ExitOK, "", "usage:"},
		{nil, ExitUsage, "", "usage:"},
		{[]string{"start"}, ExitUsage, "", "usage:"},
		{[]string{"run", "now"}, ExitUsage, "", "usage:"},
		{[]string{"check", "--config", "/etc/other.toml"}, ExitUsage, "", "usage:"}, // not silently ignored
		{[]string{"--verbose", "run"}, ExitUsage, "", "verbose"},
	} {
		code, out, err := i.main(t.Context(), c.args...)
		if code != c.code || out != c.out || !strings.Contains(err, c.err) {
			t.Errorf("%q: %d, %q, %q", c.args, code, out, err)
		}
	}
}

// Root checks a file by way of sudo, without the environment of a login session.
func TestCheckAsRoot(t *testing.T) {
	i := install(t)
	i.env = map[string]string{"HOME": i.dir}
	if code, out, err := i.main(t.Context(), "check"); code != ExitOK || out != i.path("agent.toml")+": ok\n" {
		t.Errorf("%d, %q, %q", code, out, err)
	}
	if code, _, err := i.main(t.Context(), "run"); code != ExitConfig || !strings.Contains(err, "paths.runtime") {
		t.Errorf("run: %d, %q", code, err)
	}
}

// What can be wrong at the start: the exit code says whether a restart may help,
// and one line says what is wrong.
func TestCannotStart(t *testing.T) {
	db := "state/networks/testnet/jobs"
	newer := binary.BigEndian.AppendUint32([]byte("resjobs\n"), 99)
	newer = binary.BigEndian.AppendUint32(newer, crc32.Checksum(newer, crc32.MakeTable(crc32.Castagnoli)))
	for name, c := range map[string]struct {
		prepare func(t *testing.T, i *installation)
		code    int
		event   string
		says    string
	}{
		"no user manager": {func(*testing.T, *installation) {}, ExitFailed, "agent-failed", "service manager"},
		"unknown key": {func(_ *testing.T, i *installation) {
			i.write("agent.toml.d/1.toml", "[network.testnet]\nurll = \"x\"\n")
		}, ExitConfig, "config-invalid", "network.testnet.urll"},
		"no root": {func(t *testing.T, i *installation) {
			if err := os.Remove(i.path("root.json")); err != nil {
				t.Fatal(err)
			}
		}, ExitConfig, "config-invalid", "network.testnet.root"},
		"root is a directory": {func(t *testing.T, i *installation) {
			if err := os.Remove(i.path("root.json")); err != nil {
				t.Fatal(err)
			}
			if err := os.Mkdir(i.path("root.json"), 0o700); err != nil {
				t.Fatal(err)
			}
		}, ExitConfig, "config-invalid", "network.testnet.root"},
		"root is none": {func(_ *testing.T, i *installation) { i.write("root.json", "{}") }, ExitConfig, "config-invalid", "network.testnet.root"},
		"no authority": {func(_ *testing.T, i *installation) {
			i.write("agent.toml.d/1.toml", fmt.Sprintf("[network.testnet]\nca = %q\n", i.path("root.json")))
		}, ExitConfig, "config-invalid", "network.testnet.ca"},
		"locked": {func(t *testing.T, i *installation) {
			if err := os.MkdirAll(filepath.Dir(i.path(db)), 0o700); err != nil {
				t.Fatal(err)
			}
			s, err := state.Open(i.path(db), state.DefaultBounds, time.Now)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = s.Close() })
		}, ExitFailed, "agent-failed", "another agent"},
		"of a newer agent": {func(_ *testing.T, i *installation) {
			i.write(db+"/0000000000000001.log", string(newer)+strings.Repeat("\x00", 64<<10))
		}, ExitConfig, "store-refused", "another version"},
		"another node's": {func(t *testing.T, i *installation) {
			if err := os.MkdirAll(filepath.Dir(i.path(db)), 0o700); err != nil {
				t.Fatal(err)
			}
			s, err := state.Open(i.path(db), state.DefaultBounds, time.Now)
			if err != nil {
				t.Fatal(err)
			}
			if err := s.SetRegistration(&wire.Registered{Network: "testnet", Node: nodeKey.Address(), Account: "acme", Time: 1}); err != nil {
				t.Fatal(err)
			}
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
		}, ExitConfig, "identity-refused", nodeKey.Address().Hex()},
		"state is a file":   {func(_ *testing.T, i *installation) { i.write("state", "") }, ExitConfig, "config-invalid", "paths.state"},
		"runtime is a file": {func(_ *testing.T, i *installation) { i.write("run", "") }, ExitConfig, "config-invalid", "paths.runtime"},
		"open identity": {func(t *testing.T, i *installation) {
			if err := os.MkdirAll(i.path("state/identity"), 0o700); err != nil {
				t.Fatal(err)
			}
			if err := os.Chmod(i.path("state/identity"), 0o755); err != nil {
				t.Fatal(err)
			}
		}, ExitConfig, "identity-refused", "chmod"},
	} {
		t.Run(name, func(t *testing.T) {
			i := install(t)
			c.prepare(t, i)
			code, out, said := i.main(t.Context(), "run")
			if code != c.code || out != "" {
				t.Errorf("exit code %d, want %d (%q)", code, c.code, out)
			}
			var errs []string
			for line := range strings.Lines(said) {
				if strings.Contains(line, "level=ERROR") {
					errs = append(errs, line)
				}
			}
			if len(errs) != 1 || !strings.Contains(errs[0], "event="+c.event) || !strings.Contains(errs[0], c.says) {
				t.Errorf("want one line with event %s and %q:\n%s", c.event, c.says, said)
			}
			// Where the log is kept for the network, it says why there is no node.
			kept, err := filepath.Glob(i.path("state/networks/testnet/spool/*.log"))
			if _, none := os.Stat(i.path("state/networks/testnet/spool")); err != nil || none != nil {
				return
			}
			raw := []byte{}
			for _, name := range kept {
				if raw, err = os.ReadFile(name); err != nil {
					t.Fatal(err)
				}
			}
			if !bytes.Contains(raw, []byte(`"event":"`+c.event+`"`)) {
				t.Errorf("not for the network: %s", raw)
			}
		})
	}
}

// A damaged store keeps no node from starting: what is wrong is put right or set aside, said
// once, and the next start finds nothing.
func TestDamagedStore(t *testing.T) {
	log := "state/networks/testnet/jobs/0000000000000001.log"
	for name, c := range map[string]struct {
		damage func(b []byte)
		event  string
	}{
		"one byte":  {func(b []byte) { b[20] ^= 1 }, "store-mended"},
		"no header": {func(b []byte) { clear(b[:8<<10]) }, "store-salvaged"},
	} {
		t.Run(name, func(t *testing.T) {
			i := install(t)
			run := func() string {
				code, _, said := i.main(t.Context(), "run")
				if code != ExitFailed || !strings.Contains(said, "service manager") {
					t.Fatalf("exit code %d, and it says %s", code, said)
				}
				return said
			}
			run()
			b, err := os.ReadFile(i.path(log))
			if err != nil {
				t.Fatal(err)
			}
			c.damage(b)
			i.write(log, string(b))
			if said := run(); strings.Count(said, "event="+c.event) != 1 {
				t.Errorf("want %s once:\n%s", c.event, said)
			}
			if said := run(); strings.Contains(said, "event=store-") {
				t.Errorf("it is said at the next start, too:\n%s", said)
			}
		})
	}
}

// Who may write is for the operator to mend; a full disk is not.
func TestDirectories(t *testing.T) {
	for err, final := range map[error]bool{syscall.EACCES: true, syscall.EPERM: true, syscall.EROFS: false, syscall.ENOTDIR: true, syscall.ENOSPC: false, syscall.EIO: false} {
		got := inDir("paths.state", fmt.Errorf("mkdir: %w", err))
		if _, is := got.(*finalError); is != final || !strings.Contains(got.Error(), "paths.state") {
			t.Errorf("%v: %v, final %v", err, got, is)
		}
	}
	if inDir("paths.state", nil) != nil {
		t.Error("an error of nothing")
	}
}

func TestExitCode(t *testing.T) {
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	log := slog.New(slog.DiscardHandler)
	wrap := func(err error) error { return fmt.Errorf("start: %w", err) }
	for _, c := range []struct {
		ctx  context.Context
		err  error
		want int
	}{
		{t.Context(), nil, ExitOK},
		{ended, nil, ExitOK},
		{ended, wrap(context.Canceled), ExitOK}, // told to stop while it started
		{t.Context(), wrap(context.Canceled), ExitFailed},
		{ended, wrap(errBroken), ExitFailed},
		{t.Context(), wrap(&finalError{journal.ConfigInvalid, errBroken}), ExitConfig},
	} {
		if got := exitCode(c.ctx, c.err, log); got != c.want {
			t.Errorf("%v: %d, want %d", c.err, got, c.want)
		}
	}
}

func TestDefaultConfig(t *testing.T) {
	dir := t.TempDir()
	own, xdg := filepath.Join(dir, ".config/resultity/agent.toml"), filepath.Join(dir, "xdg/resultity/agent.toml")
	env := map[string]string{"HOME": dir}
	get := func() string { return defaultConfig(func(k string) string { return env[k] }) }
	if got := get(); got != DefaultConfig {
		t.Error(got)
	}
	for _, f := range []string{own, xdg} {
		if err := os.MkdirAll(filepath.Dir(f), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(f, nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if got := get(); got != own {
		t.Error(got)
	}
	env["XDG_CONFIG_HOME"] = filepath.Join(dir, "xdg")
	if got := get(); got != xdg {
		t.Error(got)
	}
}
