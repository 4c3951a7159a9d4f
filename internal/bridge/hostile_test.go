package bridge

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"net"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/resultity/node/internal/bridge/contract"
	"github.com/resultity/node/internal/bridge/internal/sealtest"
	"github.com/resultity/node/internal/openai"
	agentruntime "github.com/resultity/node/internal/runtime"
	"github.com/resultity/node/internal/wire"
	"github.com/resultity/node/test/bench/instant"
	"github.com/resultity/node/test/chat"
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
	t.Logf("expected: the bridge ends itself with status %d; got: it, %s", contract.ExitInternal, lastLine(n.log()))
	if log := n.log(); !strings.Contains(log, "systemd does not end it") {
		t.Errorf("it is not said:\n%s", log)
	}
}

// A hostile engine answers in every way that is none. The agent's client, behind the
// bridge, takes none of it for an answer, and neither of them grows.
func TestHostileAnswers(t *testing.T) {
	t.Parallel()
	o := testOptions()
	o.Stall = time.Second
	o.Command = []string{sealtest.Binary, asHostile, "--host", o.Engine.Addr().String(), "--port", "8080"}
	n := start(t, o)
	n.hear("READY=1")
	client := agentruntime.New(n.socket(), func(int, uint32) error { return nil })
	t.Cleanup(client.Close)
	const tokens = 8
	ask := func(ctx context.Context, prompt string) (text, code string) {
		body, err := json.Marshal(map[string]any{"model": "tiny", "max_tokens": tokens, "messages": []map[string]string{{"role": "user", "content": prompt}}})
		if err != nil {
			t.Fatal(err)
		}
		req, err := openai.Parse(wire.KindChat, body, openai.Limits{RequestBytes: 1 << 20, Tokens: tokens, Messages: 1})
		if err != nil {
			t.Fatal(err)
		}
		res, err := client.Run(ctx, agentruntime.Job{Request: req, Model: "tiny", Tokens: tokens, ResponseBytes: 1 << 20}, nil)
		var refusal *openai.Error
		var output *openai.OutputError
		switch {
		case ctx.Err() != nil:
			return "", "deadline"
		case errors.As(err, &refusal) && refusal.Code == openai.CodeContextLength:
			return "", "context_length"
		case errors.As(err, &refusal):
			return "", "bad_request"
		case errors.As(err, &output):
			return "", "engine_output"
		case err != nil:
			return "", "engine_failed"
		}
		if text, err = chat.Text(res.Body, false); err != nil {
			t.Error(err)
		}
		return text, ""
	}
	n.kill(syscall.SIGUSR1)
	n.logUntil("armed: true")
	before := n.resident()
	for _, m := range hostile.Misdeeds {
		t.Run(strings.ReplaceAll(m.Name, " ", "_"), func(t *testing.T) {
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			want := m.Want
			var text, code string
			answered := make(chan struct{})
			go func() {
				defer close(answered)
				text, code = ask(ctx, m.Prompt())
			}()
			if m.Ends {
				want = []string{"deadline"} // here nobody ends it
				n.hear("STATUS=hung: ")
				cancel()
			} else if slices.Contains(want, "deadline") {
				time.AfterFunc(time.Second, cancel)
			}
			<-answered
			t.Logf("expected: %q; got: %q", want, code)
			if !slices.Contains(want, code) || code == "" && text != instant.Text(tokens) {
				t.Errorf("not so: %.100q", text)
			}
			if text, code := ask(t.Context(), "words"); text != instant.Text(tokens) {
				t.Errorf("the next one: %s %.100q", code, text)
			}
		})
	}
	if after := n.resident(); after > before+16<<20 {
		t.Errorf("the bridge grew from %d to %d KiB", before>>10, after>>10)
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
	o.Stall = 5 * time.Minute // it is busy
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
	rows, err := hostile.Read(answer.Choices[0].Text)
	if err != nil || len(rows) < 40 {
		t.Fatalf("%d attempts, %v", len(rows), err)
	}
	return n, rows
}
