package bridge

import (
	"bytes"
	"crypto/rand"
	"encoding/json"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/resultity/node/internal/bridge/contract"
	"github.com/resultity/node/internal/bridge/internal/sealtest"
	"github.com/resultity/node/test/hostile"
)

// A hostile engine under the bridge tries everything that a container can be
// made to refuse here. What only the rendered unit refuses is tried on hosts.
func TestHostileEngine(t *testing.T) {
	t.Parallel()
	n, rows := hostileEngine(t)
	for _, r := range rows {
		t.Run(strings.ReplaceAll(r.Name, " ", "_"), func(t *testing.T) {
			t.Logf("expected: %s; got: %s", r.Want, r.Got)
			if !r.OK {
				t.Error("not so")
			}
		})
	}
	var s contract.Sandbox
	if n.get(contract.SandboxPath, &s); !s.Hidden {
		t.Error("the record says that the engine sees the sockets")
	}
	n.hear("WATCHDOG=1\nSTATUS=serving tiny: 0 in flight, 1 answered") // and goes on
}

// Where the kernel gives no namespaces, the engine sees the sockets of the agent and
// of systemd. What it does there ends the bridge, also where it feeds the watchdog.
func TestHostileEngineThatSeesTheSockets(t *testing.T) {
	t.Parallel()
	n, rows := hostileEngine(t, sealtest.NoNamespaces)
	for _, r := range rows {
		sees := strings.HasPrefix(r.Name, "systemd's notify socket") || strings.HasPrefix(r.Name, "the socket itself")
		if r.OK == sees {
			t.Errorf("%s: want %s, got %s", r.Name, r.Want, r.Got)
		}
	}
	if log := n.log(); !strings.Contains(log, "the engine sees the sockets of the agent and of systemd") {
		t.Errorf("it is not said:\n%s", log)
	}
	n.hear("WATCHDOG=1") // the engine's
	n.hear("STATUS=hung: something else is in the place of the socket")
	n.end(contract.ExitInternal)
	if log := n.log(); !strings.Contains(log, "systemd does not end it") {
		t.Errorf("it is not said:\n%s", log)
	}
}

// hostileEngine has a hostile engine try everything in a container.
func hostileEngine(t *testing.T, flaws ...sealtest.Flaw) (*node, []hostile.Row) {
	t.Helper()
	// Something to reach, outside of the container.
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	name := "resultity-" + rand.Text()
	abstract, err := net.Listen("unix", "@"+name)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { abstract.Close() })
	at := hostile.Where{TCP: []string{l.Addr().String()}, Abstract: []string{name}, Files: []string{"/etc/shadow", "/root", "/run/dbus/system_bus_socket"}}

	o := testOptions()
	o.Stall = time.Minute // it is busy
	o.Command = []string{sealtest.Binary, asHostile, "--host", o.Engine.Addr().String(), "--port", "8080"}
	n := start(t, o, flaws...)
	n.hear("READY=1")
	body, err := json.Marshal(map[string]any{"prompt": hostile.Ask(at), "max_tokens": 1})
	if err != nil {
		t.Fatal(err)
	}
	resp, err := n.client.Post("http://engine/v1/completions", "application/json", bytes.NewReader(body))
	if err != nil {
		t.Fatal(err, n.log())
	}
	defer resp.Body.Close()
	var answer struct{ Choices []struct{ Text string } }
	if err := json.NewDecoder(resp.Body).Decode(&answer); err != nil || len(answer.Choices) != 1 {
		t.Fatalf("%+v, %v", answer, err)
	}
	var rows []hostile.Row
	if err := json.Unmarshal([]byte(answer.Choices[0].Text), &rows); err != nil || len(rows) < 40 {
		t.Fatalf("%d attempts, %v", len(rows), err)
	}
	return n, rows
}
