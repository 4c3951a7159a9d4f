package ctl

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/resultity/node/internal/gate"
	"github.com/resultity/node/internal/preflight"
)

// A node of one's own is begun without root, which would own the configuration.
func TestOwnNodeNotConfigured(t *testing.T) {
	root := t.TempDir()
	if err := os.MkdirAll(filepath.Join(root, "run/user/1000/systemd"), 0o755); err != nil {
		t.Fatal(err)
	}
	o := &offline{Machine: &preflight.Machine{Root: root, Account: "me", UID: 1000}, home: "/home/me",
		run: func(context.Context, string, ...string) ([]byte, error) {
			return []byte("LoadState=loaded\nActiveState=inactive\n"), nil
		}}
	const want = "install -D -m 0644 /usr/share/doc/resultity-agent/agent.toml /home/me/.config/resultity/agent.toml, fill in [network.NAME], then systemctl --user start resultity-agent"
	if g := o.agentGate(t.Context()); g.Remedy != want {
		t.Errorf("%q, want %q", g.Remedy, want)
	}
}

// What the service manager and the journal say becomes one gate with a command.
func TestAgentGateOffline(t *testing.T) {
	for _, c := range []struct {
		name, show, journal string
		err                 error
		detail, remedy      string
	}{
		{"ended over a file", "LoadState=loaded\nActiveState=failed\nSubState=failed\nExecMainStatus=78\nStateChangeTimestamp=@1000000000\n", "configuration: /etc/resultity/agent.toml: network.demo.urll: unknown key\n", nil,
			"exit status 78, over something that no restart mends; its last words: configuration: /etc/resultity/agent.toml: network.demo.urll: unknown key", "mend what it names, then sudo systemctl --user -M resultity@ start resultity-agent"},
		{"never configured", "LoadState=loaded\nActiveState=inactive\nSubState=dead\n", "old news", nil, "no configuration yet", "/etc/resultity/agent.toml, fill in"},
		{"never configured, but started", "LoadState=loaded\nActiveState=failed\nSubState=failed\nExecMainStatus=78\n", "old news", nil, "no configuration yet", "/etc/resultity/agent.toml, fill in"},
		{"stopped", "LoadState=loaded\nActiveState=inactive\nSubState=dead\nExecMainStatus=0\n", "old news", nil, "it is stopped", "sudo systemctl --user -M resultity@ start resultity-agent"},
		{"in a loop", "LoadState=loaded\nActiveState=activating\nSubState=auto-restart\nExecMainStatus=1\n", "no space left", nil, "again and again, with exit status 1; its last words: no space left", "restart"},
		{"hangs", "LoadState=loaded\nActiveState=active\nSubState=running\n", "", nil, "does not answer", "restart"},
		{"failed", "LoadState=loaded\nActiveState=failed\nExecMainStatus=1\n", "", nil, "exit status 1", "start"},
		{"not installed", "LoadState=not-found\nActiveState=inactive\n", "", nil, "not installed", "install"},
		{"manager down", "LoadState=loaded\nActiveState=active\n", "", nil, "the service manager of resultity does not run", "sudo systemctl start user@990.service"},
		{"no manager", "", "", errors.New("exit status 1"), "service manager of resultity does not answer", "sudo systemctl start user@990.service"},
	} {
		root := t.TempDir()
		if c.name != "manager down" {
			if err := os.MkdirAll(filepath.Join(root, "run/user/990/systemd"), 0o755); err != nil {
				t.Fatal(err)
			}
		}
		if !strings.HasPrefix(c.name, "never configured") {
			if err := os.MkdirAll(filepath.Join(root, "etc/resultity"), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(root, "etc/resultity/agent.toml"), nil, 0o644); err != nil {
				t.Fatal(err)
			}
		}
		o := &offline{Machine: &preflight.Machine{Root: root, Account: "resultity", UID: 990}, home: t.TempDir(),
			run: func(_ context.Context, name string, args ...string) ([]byte, error) {
				if c.name == "manager down" {
					t.Errorf("%s was run", name)
				}
				if name == "journalctl" {
					return []byte(c.journal), nil
				}
				return []byte(c.show), c.err
			}}
		g := o.agentGate(t.Context())
		if g.State != gate.Closed || !strings.Contains(g.Detail, c.detail) || !strings.Contains(g.Remedy, c.remedy) {
			t.Errorf("%s: %+v, want %q and %q", c.name, g, c.detail, c.remedy)
		}
		if since := strings.Contains(c.show, "@1000000000"); since != (g.Since != nil) || since && g.Since.Unix() != 1_000_000_000 {
			t.Errorf("%s: since %v", c.name, g.Since)
		}
		if !strings.Contains(c.detail, "last words") && strings.Contains(g.Detail, "old news") {
			t.Errorf("%s: what was said before is no reason", c.name)
		}
	}
}

// Without the account's service manager the reason is lingering, which comes
// first, and all gates are there.
func TestOfflineNamesTheFirstCause(t *testing.T) {
	root := t.TempDir()
	for name, text := range map[string]string{"etc/subuid": "resultity:524288:65536\n", "etc/subgid": "resultity:524288:65536\n", "usr/bin/podman": "", "sys/fs/cgroup/cgroup.controllers": "cpu memory pids\n"} {
		if err := os.MkdirAll(filepath.Dir(filepath.Join(root, name)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(root, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	o := &offline{Machine: &preflight.Machine{Root: root, Account: "resultity", UID: 990, Synced: func(context.Context) (bool, error) { return true, nil }}, home: root,
		run: func(context.Context, string, ...string) ([]byte, error) { return nil, errors.New("exit status 1") }}
	s := o.status(t.Context())
	if g := s.Closed(); g == nil || g.Name != gate.Linger || g.Remedy != "sudo loginctl enable-linger resultity" {
		t.Errorf("closed: %+v", g)
	}
	if len(s.Gates) != len(gate.List) {
		t.Fatalf("%d gates, want %d", len(s.Gates), len(gate.List))
	}
	for i, g := range s.Gates {
		if g.Name != gate.List[i].Name {
			t.Errorf("gate %d is %s", i, g.Name)
		}
	}
}
