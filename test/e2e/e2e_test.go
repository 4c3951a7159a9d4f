package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/resultity/node/internal/control"
	"github.com/resultity/node/test/chat"
	"github.com/resultity/node/test/clients"
	"github.com/resultity/node/test/host"
	"github.com/resultity/node/test/model"
	"github.com/resultity/node/test/stack"
)

// s is the stack of all tests; its nodes are a Debian 13 and a Debian testing.
var s *stack.Stack

func TestMain(m *testing.M) {
	code, err := run(m)
	if err != nil {
		fmt.Fprintln(os.Stderr, "e2e:", err)
		code = 1
	}
	os.Exit(code)
}

func run(m *testing.M) (code int, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), 15*time.Minute)
	defer cancel()
	s, err = stack.Up(ctx, stack.Options{
		Host:  host.Options{Progress: os.Stderr},
		Nodes: []host.Config{{Name: "trixie", Release: host.Trixie}, {Name: "forky", Release: host.Forky}},
	})
	if err != nil {
		return 1, err
	}
	defer func() { err = errors.Join(err, s.Close()) }()
	if err := s.WaitRoutable(ctx); err != nil {
		for _, n := range s.Nodes {
			fmt.Fprintf(os.Stderr, "--- journal of %s\n%s\n", n.Name(), n.Journal(ctx, 100))
		}
		return 1, err
	}
	return m.Run(), nil
}

func eachNode(t *testing.T, f func(t *testing.T, n *stack.Node)) {
	for _, n := range s.Nodes {
		t.Run(n.Name(), func(t *testing.T) { f(t, n) })
	}
}

func TestOpenAIClient(t *testing.T) {
	p := model.Prompts()[0]
	in, err := json.Marshal(map[string]string{"model": model.Name, "prompt": p.User, "answer": p.Answer})
	if err != nil {
		t.Fatal(err)
	}
	ca := t.TempDir() + "/ca.pem"
	if err := os.WriteFile(ca, s.CA, 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := clients.Run(t.Context(), "openai.mjs", in, "RESULTITY_API="+s.API, "RESULTITY_API_KEY="+s.APIKey, "NODE_EXTRA_CA_CERTS="+ca)
	if err != nil || out != "ok" {
		t.Fatalf("%q, %v", out, err)
	}
}

var exposure = regexp.MustCompile(`(?m)^.*Overall exposure level for resultity-agent\.service: ([0-9.]+)`)

func TestAgentUnitIsTight(t *testing.T) {
	eachNode(t, func(t *testing.T, n *stack.Node) {
		out, err := n.OutputAs(t.Context(), stack.Account, "systemd-analyze", "--user", "--no-pager", "security", "resultity-agent.service")
		if err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		m := exposure.FindSubmatch(out)
		if m == nil {
			t.Fatalf("no exposure level in:\n%s", out)
		}
		level, err := strconv.ParseFloat(string(m[1]), 64)
		if err != nil || level > 2.1 {
			t.Errorf("exposure level %s, want at most 2.1 (%v)\n%s", m[1], err, out)
		}
	})
}

// The agent never starts a program: under it there are threads only, and the
// runtime belongs to systemd.
func TestAgentHasNoChildren(t *testing.T) {
	eachNode(t, func(t *testing.T, n *stack.Node) {
		pid, err := n.Property(t.Context(), "resultity-agent.service", "MainPID")
		if err != nil {
			t.Fatal(err)
		}
		out, err := n.Output(t.Context(), "cat", "/proc/"+pid+"/task/"+pid+"/children")
		if err != nil || strings.TrimSpace(string(out)) != "" {
			t.Errorf("children %q, %v", out, err)
		}
	})
}

func TestCatalogExplains(t *testing.T) {
	eachNode(t, func(t *testing.T, n *stack.Node) {
		out, err := n.Output(t.Context(), "journalctl", "-x", "--no-pager", "RESULTITY_EVENT=registered")
		words := strings.Join(strings.Fields(strings.ReplaceAll(string(out), "░░", "")), " ")
		if err != nil || !strings.Contains(words, "knows this node now, for account demo.") {
			t.Errorf("journalctl -x does not explain the registration (%v):\n%s", err, out)
		}
	})
}

// No text of a request or an answer is in any log of the nodes or the network.
func TestLogsHoldNoText(t *testing.T) {
	const secret = "Spell the word marzipan."
	if _, err := s.Ask(t.Context(), chat.Request{Prompt: secret, Tokens: 40}); err != nil {
		t.Fatal(err)
	}
	for _, h := range append([]*host.Host{s.Net}, s.Nodes[0].Host, s.Nodes[1].Host) {
		out, err := h.Output(t.Context(), "journalctl", "--no-pager", "-o", "export")
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("%s: expected: no word of prompt or answer; got: %d in %d bytes of journal", h.Name(), strings.Count(string(out), "marzipan"), len(out))
		if strings.Contains(string(out), "marzipan") {
			t.Errorf("%s logged a prompt or an answer", h.Name())
		}
	}
}

// A wrong configuration ends the agent with 78, names file and key, and systemd
// leaves it at that.
func TestWrongConfigurationIsFinal(t *testing.T) {
	n := s.Nodes[0]
	ctx := t.Context()
	drop := "/etc/resultity/agent.toml.d/50-wrong.toml"
	if err := n.WriteFile(drop, []byte("[network.demo]\nurll = \"x\"\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := n.UserCtl(ctx, "restart", "resultity-agent.service"); err == nil {
		t.Error("the agent started with an unknown key")
	}
	status, err := n.Property(ctx, "resultity-agent.service", "ExecMainStatus")
	if err != nil || status != "78" {
		t.Errorf("exit status %q, %v; want 78", status, err)
	}
	if state, err := n.Property(ctx, "resultity-agent.service", "ActiveState"); err != nil || state != "failed" {
		t.Errorf("state %q, %v; want failed: no restart mends a file", state, err)
	}
	if log := n.Journal(ctx, 20); !strings.Contains(log, drop) || !strings.Contains(log, "network.demo.urll") {
		t.Errorf("the journal names neither file nor key:\n%s", log)
	}
	var exit *exec.ExitError
	out, err := n.Output(ctx, "resultityctl", "status")
	if !errors.As(err, &exit) || exit.ExitCode() != 69 {
		t.Errorf("resultityctl without an agent: %v, want exit status 69", err)
	}
	if first, _, _ := strings.Cut(string(out), "\n"); !strings.Contains(first, `"agent" is closed`) || !strings.Contains(first, "78") || !strings.Contains(first, drop) || !strings.Contains(first, "network.demo.urll") {
		t.Errorf("status does not begin with the agent's last words:\n%s", out)
	}
	t.Logf("status:\n%s", out)
	if out, err := n.Output(ctx, "rm", drop); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if err := n.UserCtl(ctx, "restart", "resultity-agent.service"); err != nil {
		t.Fatal(err)
	}
	if err := n.WaitRoutable(ctx); err != nil {
		t.Error(err)
	}
}

// An agent that is stopped and started keeps identity, registration and the
// running engine.
func TestRestartKeepsEverything(t *testing.T) {
	eachNode(t, func(t *testing.T, n *stack.Node) {
		ctx := t.Context()
		look := func() (node, engine string) {
			t.Helper()
			st, err := n.Status(ctx)
			if err != nil {
				t.Fatal(err)
			}
			engine, err = n.Property(ctx, stack.Runtime, "InvocationID")
			if err != nil {
				t.Fatal(err)
			}
			return st.Node, engine
		}
		node, engine := look()
		if err := n.UserCtl(ctx, "restart", "resultity-agent.service"); err != nil {
			t.Fatal(err)
		}
		if err := n.WaitRoutable(ctx); err != nil {
			t.Fatal(err)
		}
		if node2, engine2 := look(); node2 != node || engine2 != engine {
			t.Errorf("node %s and engine start %s became %s and %s", node, engine, node2, engine2)
		}
	})
}

// The whole machine goes down and comes back without anybody's hand.
func TestReboot(t *testing.T) {
	n := s.Nodes[0]
	before, err := n.Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := n.Reboot(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := n.WaitStatus(t.Context(), "jobs after a reboot", (*control.Status).GetsJobs); err != nil {
		t.Fatalf("%v\n%s", err, n.Journal(t.Context(), 60))
	}
	if after, err := n.Status(t.Context()); err != nil || after.Node != before.Node {
		t.Errorf("node %s became %v (%v)", before.Node, after, err)
	}
}
