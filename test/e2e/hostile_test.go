package e2e

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/resultity/node/internal/journal"
	"github.com/resultity/node/internal/snapshot"
	"github.com/resultity/node/test/bench/instant"
	"github.com/resultity/node/test/chat"
	"github.com/resultity/node/test/hostile"
	"github.com/resultity/node/test/stack"
)

// hostileTokens are those of an answer of the hostile engine's when it is good.
const hostileTokens = 8

// A signed image with a hostile engine becomes the runtime of both nodes. It tries
// everything from within, and answers in every way that is none. Nothing gets out;
// clients have their answers from the other node; and when the good engine is back,
// all is as before.
func TestHostileEngine(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	h := deployHostile(ctx, t)
	eachNode(t, func(t *testing.T, n *stack.Node) { h.attempts(ctx, t, n) })
	if !t.Failed() {
		h.misdeeds(ctx, t, s.Nodes[0])
	}
}

type hostileTest struct {
	address map[*stack.Node]string // node ids
}

func deployHostile(ctx context.Context, t *testing.T) *hostileTest {
	t.Helper()
	program := filepath.Join(t.TempDir(), "hostile")
	if err := stack.BuildProgram(ctx, program, "./test/hostile/engine"); err != nil {
		t.Fatal(err)
	}
	content, err := os.ReadFile(program)
	if err != nil {
		t.Fatal(err)
	}
	ref, err := s.PushEngine(ctx, s.Reg, "hostile", content, func(img v1.Image) (v1.Image, error) { return withRights(img, content) })
	if err != nil {
		t.Fatal(err)
	}
	var before snapshot.Config
	if err := s.Publish(ctx, func(c *snapshot.Config) {
		before = *c
		c.Runtime.Image = ref
		c.Runtime.Watchdog, c.Runtime.Stall = 2, 2
		c.Limits.Deadline = 12 // after a third of it the other node gets the job, too
		c.Validation.Golden = []snapshot.Golden{{Name: "words", Prompt: "words", Answers: []string{instant.Text(hostileTokens)}, Tokens: hostileTokens, Timeout: 20}}
	}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), 3*time.Minute)
		defer cancel()
		if err := s.Publish(ctx, func(c *snapshot.Config) {
			c.Runtime, c.Limits, c.Validation = before.Runtime, before.Limits, before.Validation
		}); err != nil {
			t.Fatal(err)
		}
		active(ctx, t, s.Image)
	})
	up, cancel := context.WithTimeout(ctx, 3*time.Minute)
	defer cancel()
	active(up, t, ref)
	h := &hostileTest{address: map[*stack.Node]string{}}
	for _, n := range s.Nodes {
		st, err := n.Status(ctx)
		if err != nil {
			t.Fatal(err)
		}
		h.address[n] = st.Node
	}
	return h
}

// withRights adds what an image can hold that is more than programs: one of root's
// with the set-user-ID bit, one with all capabilities, and settings for whoever
// starts in it.
func withRights(img v1.Image, program []byte) (v1.Image, error) {
	// Version 2 of struct vfs_cap_data, all permitted and in effect.
	var capable []byte
	for _, v := range []uint32{0x02000001, ^uint32(0), 0, 0x1ff, 0} {
		capable = binary.LittleEndian.AppendUint32(capable, v)
	}
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, f := range []tar.Header{
		{Name: strings.TrimPrefix(hostile.SetUID, "/"), Mode: 0o4755},
		{Name: strings.TrimPrefix(hostile.WithCapabilities, "/"), Mode: 0o755, PAXRecords: map[string]string{"SCHILY.xattr.security.capability": string(capable)}},
	} {
		f.Typeflag, f.Size, f.ModTime = tar.TypeReg, int64(len(program)), time.Unix(0, 0)
		if err := w.WriteHeader(&f); err != nil {
			return nil, err
		}
		if _, err := w.Write(program); err != nil {
			return nil, err
		}
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	img, err := mutate.AppendLayers(img, static.NewLayer(b.Bytes(), types.OCIUncompressedLayer))
	if err != nil {
		return nil, err
	}
	file, err := img.ConfigFile()
	if err != nil {
		return nil, err
	}
	file = file.DeepCopy()
	file.Config.User = "0:0"
	file.Config.Env = []string{"GODEBUG=httplaxcontentlength=1", "LD_PRELOAD=" + hostile.SetUID, "container=hostile"}
	file.Config.Volumes = map[string]struct{}{"/var": {}, "/etc": {}}
	file.Config.Entrypoint, file.Config.Cmd, file.Config.StopSignal = []string{hostile.SetUID}, []string{"hostile"}, "SIGWINCH"
	file.Config.Healthcheck = &v1.HealthConfig{Test: []string{"CMD", hostile.SetUID}, Interval: time.Second}
	return mutate.ConfigFile(img, file)
}

// ask sends a chat and returns its text, if it is whole, the node that has
// answered, and what else there is to say.
func (h *hostileTest) ask(ctx context.Context, t *testing.T, prompt string, tokens int, stream bool) (text, node, other string) {
	t.Helper()
	a, err := s.Ask(ctx, chat.Request{Prompt: prompt, Tokens: tokens, Stream: stream})
	var refused *chat.Refusal
	switch {
	case errors.Is(err, chat.ErrBroken):
		return "", "", "broken off"
	case errors.As(err, &refused) && refused.Code != "":
		return "", "", fmt.Sprintf("%d %s", refused.Status, refused.Code)
	case err != nil:
		t.Fatal(err)
	}
	for name := range a.Header {
		if !slices.Contains([]string{"Content-Type", "Content-Length", "Date", "Cache-Control", "X-Accel-Buffering", "X-Request-Id", "Resultity-Receipt"}, name) {
			t.Errorf("a client was sent the header %s", name)
		}
	}
	return a.Text, a.Receipt.Receipt().Node.Hex(), ""
}

// attempts has the engine of a node try everything.
func (h *hostileTest) attempts(ctx context.Context, t *testing.T, n *stack.Node) {
	// Something of the host's to reach: sockets without and with a name, and files.
	const name = "hostile-test"
	if out, err := n.Output(ctx, "systemd-run", "-q", "--unit="+name, "--socket-property=ListenStream=@"+name, "--socket-property=ListenStream=127.0.0.1:4711", "--socket-property=ListenStream=0.0.0.0:4712", "sleep", "60"); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	defer func() {
		_, _ = n.Output(context.WithoutCancel(ctx), "systemctl", "stop", name+".socket", name+".service") // the host goes, in any case
	}()
	uid, err := n.OutputAs(ctx, stack.Account, "id", "-u")
	if err != nil {
		t.Fatal(err)
	}
	run := "/run/user/" + strings.TrimSpace(string(uid))
	at := hostile.Where{
		Unit:     true,
		TCP:      []string{strings.TrimPrefix(s.API, "https://"), "127.0.0.1:4711", n.Addr().String() + ":4712", n.Addr().String() + ":22"},
		Abstract: []string{name},
		Files: []string{
			"/etc/shadow", "/etc/resultity/agent.toml", "/root", n.State, "/var/lib/resultity-signer", "/run/resultity-signer/signer.sock", "/run/dbus/system_bus_socket",
			"/run/systemd/notify", "/run/systemd/private", "/run/systemd/journal/socket", run, run + "/bus", run + "/systemd/notify", run + "/systemd/private", run + "/podman/podman.sock", run + "/resultity-podman/podman.sock",
		},
	}
	var rows []hostile.Row
	for range 8 { // nodes take turns
		text, node, other := h.ask(ctx, t, hostile.Ask(at), 200, false)
		if other != "" {
			t.Fatalf("%s\n%s", other, n.Journal(context.WithoutCancel(ctx), 40))
		}
		if node != h.address[n] {
			continue
		}
		if rows, err = hostile.Read(text); err != nil {
			t.Fatal(err)
		}
		break
	}
	var names []string
	for _, r := range rows {
		names = append(names, r.Name)
		t.Run(strings.ReplaceAll(r.Name, " ", "_"), func(t *testing.T) {
			t.Logf("expected: %s; got: %s", r.Want, r.Got)
			if !r.OK {
				t.Error("not so")
			}
		})
	}
	if !slices.Equal(names, hostile.Names()) {
		t.Errorf("attempts %q, want %q", names, hostile.Names())
	}
}

// tell signals the engine of a node.
func (h *hostileTest) tell(ctx context.Context, t *testing.T, n *stack.Node, signal string) {
	t.Helper()
	if out, err := n.Podman(ctx, "unshare", "pkill", "-"+signal, "-x", "llama-server"); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
}

// misdeeds has the engine of a node answer in every way that is none.
func (h *hostileTest) misdeeds(ctx context.Context, t *testing.T, n *stack.Node) {
	bridge := h.peak(ctx, t, n, "pgrep -x resultity-bridg")
	agent := h.peak(ctx, t, n, "systemctl --user show -P MainPID resultity-agent.service")
	engine := "" // invocation that was told to misbehave
	for i, m := range hostile.Misdeeds {
		t.Run(strings.ReplaceAll(m.Name, " ", "_"), func(t *testing.T) {
			began := time.Now()
			since := mark(ctx, t, n)
			code, other, by := "", "", ""
			for try := 0; by != h.address[n] && code == ""; try++ { // nodes take turns
				if try == 20 {
					t.Fatal("the node gets no jobs")
				}
				// The job before may have ended the engine behind its answer.
				if err := n.WaitRoutable(ctx); err != nil {
					t.Fatal(err)
				}
				if now := h.invocation(ctx, t, n); now != engine {
					engine = now
					h.tell(ctx, t, n, "USR1")
				}
				var text string
				text, by, other = h.ask(ctx, t, m.Prompt(), hostileTokens, i%2 == 1)
				if other == "" && text != instant.Text(hostileTokens) {
					t.Errorf("a client was sent %.200q", text)
				}
				code = h.failed(ctx, t, n, since)
				if h.invocation(ctx, t, n) != engine && code == "" {
					by = "" // an engine that had not been told to misbehave
				}
			}
			// Whoever has been sent a piece already cannot be sent another answer.
			if other != "" && !(other == "broken off" && i%2 == 1) {
				t.Errorf("a client was told %s", other)
			}
			want := m.Want
			if m.Ends { // unless the other node was quicker
				want = append([]string{"cancelled"}, want...)
			}
			if !slices.Contains(want, code) {
				t.Errorf("the job failed with %q, want one of %q", code, want)
			}
			if m.Ends && code != "cancelled" {
				h.ended(ctx, t, n, engine)
			}
			// Three in a row would have the node validated.
			for by = ""; by != h.address[n]; {
				var text string
				if text, by, other = h.ask(ctx, t, "words", hostileTokens, i%2 == 1); other != "" || text != instant.Text(hostileTokens) {
					t.Fatalf("the next one: %s %q", other, text)
				}
			}
			if m.Ends && code == "cancelled" {
				h.settled(ctx, t, n, engine, since)
			}
			t.Logf("expected: %s; got: %s, in %v", answered(strings.Join(want, " or ")), answered(code), time.Since(began).Round(10*time.Millisecond))
		})
		if t.Failed() {
			t.Logf("%s", n.Journal(context.WithoutCancel(ctx), 30))
			return
		}
	}
	t.Run("the_memory_of_bridge_and_agent", func(t *testing.T) {
		const most = 32 << 10 // KiB
		b, a := h.peak(ctx, t, n, "pgrep -x resultity-bridg"), h.peak(ctx, t, n, "systemctl --user show -P MainPID resultity-agent.service")
		t.Logf("expected: at most 32 MiB more; got: bridge %d to %d KiB, agent %d to %d KiB", bridge, b, agent, a)
		if b > bridge+most || a > agent+most {
			t.Error("not so")
		}
	})
	t.Run("three_in_a_row", func(t *testing.T) {
		since := mark(ctx, t, n)
		var said []byte
		for {
			h.ask(ctx, t, "misdeed no JSON", hostileTokens, false)
			out, err := n.Output(ctx, "journalctl", "-q", "--no-pager", "-o", "cat", "--after-cursor", since, "MESSAGE_ID="+journal.RuntimeSuspect.ID)
			if err != nil {
				t.Fatal(err)
			}
			if said = out; len(said) > 0 {
				break
			}
		}
		if err := n.WaitRoutable(ctx); err != nil {
			t.Error(err)
		}
		t.Logf("expected: %s, and jobs again when it has been validated; got: %s", journal.RuntimeSuspect.Name, strings.TrimSpace(string(said)))
	})
}

func answered(code string) string {
	if code == "" {
		return "answered"
	}
	return strings.ReplaceAll(code, " or ", ", ")
}

// failed returns the code of a job that a node has failed since a place in its
// journal, "" for none.
func (h *hostileTest) failed(ctx context.Context, t *testing.T, n *stack.Node, since string) string {
	t.Helper()
	out, err := n.Output(ctx, "journalctl", "-q", "--no-pager", "-o", "cat", "--output-fields=RESULTITY_CODE", "--after-cursor", since, "MESSAGE_ID="+journal.JobFailed.ID)
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	code, _, _ := strings.Cut(string(out), "\n")
	return code
}

// invocation names the start of a node's engine.
func (h *hostileTest) invocation(ctx context.Context, t *testing.T, n *stack.Node) string {
	t.Helper()
	id, err := n.Property(ctx, stack.Runtime, "InvocationID")
	if err != nil {
		t.Fatal(err)
	}
	return id
}

// ended waits until a node has another engine.
func (h *hostileTest) ended(ctx context.Context, t *testing.T, n *stack.Node, before string) {
	t.Helper()
	for {
		now, err := n.Property(ctx, stack.Runtime, "InvocationID")
		if err == nil && now != before && n.WaitRoutable(ctx) == nil {
			break
		}
		select {
		case <-ctx.Done():
			t.Fatalf("the engine was not ended\n%s", n.Journal(context.WithoutCancel(ctx), 40))
		case <-time.After(100 * time.Millisecond): // systemd is asked on another host
		}
	}
}

// settled waits until an engine that was silent, since a place in the journal, has
// been heard of again or is another one: systemd may have been about to end it when
// its job was cancelled.
func (h *hostileTest) settled(ctx context.Context, t *testing.T, n *stack.Node, engine, since string) {
	t.Helper()
	for {
		now, err := n.Property(ctx, stack.Runtime, "InvocationID")
		if err == nil && now != engine {
			h.ended(ctx, t, n, engine)
			return
		}
		out, err := n.Output(ctx, "journalctl", "-q", "--no-pager", "-o", "cat", "--after-cursor", since, "SYSLOG_IDENTIFIER="+strings.TrimSuffix(stack.Runtime, ".service"))
		if err == nil && bytes.Count(out, []byte("no more watchdog messages")) <= bytes.Count(out, []byte("engine is back")) {
			return
		}
		select {
		case <-ctx.Done():
			t.Fatalf("the engine was neither ended nor heard of again\n%s", n.Journal(context.WithoutCancel(ctx), 40))
		case <-time.After(100 * time.Millisecond): // systemd is asked on another host
		}
	}
}

// peak is the most memory that a process has had, in KiB.
func (h *hostileTest) peak(ctx context.Context, t *testing.T, n *stack.Node, which string) int {
	t.Helper()
	out, err := n.OutputAs(ctx, stack.Account, "sh", "-c", which)
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	out, err = n.Output(ctx, "sed", "-n", `s/^VmHWM:\s*\([0-9]*\) kB/\1/p`, "/proc/"+strings.TrimSpace(string(out))+"/status")
	k, e := strconv.Atoi(strings.TrimSpace(string(out)))
	if err != nil || e != nil {
		t.Fatalf("%v, %v: %s", err, e, out)
	}
	return k
}
