package e2e

import (
	"bytes"
	"context"
	"errors"
	"net/http"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/resultity/node/internal/control"
	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/journal"
	"github.com/resultity/node/internal/receipt"
	"github.com/resultity/node/internal/sandbox/record"
	"github.com/resultity/node/test/chat"
	"github.com/resultity/node/test/model"
	"github.com/resultity/node/test/stack"
)

// attested is a receipt and the record of the sandbox that it names, as a client has
// them.
type attested struct {
	rawReceipt, rawRecord []byte
	receipt               receipt.Receipt
	record                *record.Signed
}

// askAttested has a request answered and fetches both.
func askAttested(ctx context.Context, t *testing.T) *attested {
	t.Helper()
	answer, err := s.Ask(ctx, chat.Request{Prompt: model.Prompts()[0].User, Tokens: 8})
	if err != nil {
		t.Fatal(err)
	}
	a := &attested{rawReceipt: answer.RawReceipt, receipt: answer.Receipt.Receipt()}
	res, raw, err := s.Do(ctx, http.MethodGet, "/v1/sandbox/"+a.receipt.Measured.SandboxDigest.Hex(), nil)
	if err != nil || res.StatusCode != http.StatusOK {
		t.Fatalf("%v %v: %s", res, err, raw)
	}
	a.rawRecord = raw
	if a.record, err = record.Open(a.rawRecord); err != nil {
		t.Fatal(err)
	}
	if got := a.record.Digest(); got != a.receipt.Measured.SandboxDigest {
		t.Fatalf("the network serves record %s for %s", got, a.receipt.Measured.SandboxDigest)
	}
	return a
}

// verify has resultityctl check the receipt with a record on a machine where nothing
// answers it.
func (a *attested) verify(ctx context.Context, t *testing.T, raw []byte) (string, error) {
	t.Helper()
	n := s.Nodes[0]
	for name, b := range map[string][]byte{"receipt": a.rawReceipt, "sandbox": raw} {
		if err := n.WriteFile("/tmp/"+name+".json", b, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	out, err := n.Output(ctx, append([]string{"unshare", "--net"}, n.CtlArgs("verify", "/tmp/receipt.json", "--sandbox", "/tmp/sandbox.json")...)...)
	return string(out), err
}

// A receipt names the record of the sandbox that its job was done in, which the
// network serves and anybody checks. When root reaches into the container, the node
// finds that out, begins anew, and says so in the receipts from then on.
func TestSandboxRecord(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	n := s.Nodes[1]
	alone(t, n)
	const drop = "/etc/resultity/agent.toml.d/50-look.toml"
	restart := func(ctx context.Context) {
		t.Helper()
		if err := n.UserCtl(ctx, "restart", n.Agent); err != nil {
			t.Fatal(err)
		}
		if err := n.WaitRoutable(ctx); err != nil {
			t.Fatalf("%v\n%s", err, n.Journal(context.WithoutCancel(ctx), 60))
		}
	}
	if err := n.WriteFile(drop, []byte("[runtime]\nlook_every = \"2s\"\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	defer func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 3*time.Minute)
		defer cancel()
		if out, err := n.Output(ctx, "rm", drop); err != nil {
			t.Errorf("%v: %s", err, out)
		}
		restart(ctx)
	}()
	restart(ctx)
	start := func() string {
		t.Helper()
		id, err := n.Property(ctx, stack.Runtime, "InvocationID")
		if err != nil {
			t.Fatal(err)
		}
		return id
	}

	a := askAttested(ctx, t)
	status, err := n.Status(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if is := a.record.Record(); !strings.EqualFold(is.Node.Hex(), status.Node) || is.Start != start() || is.Image != s.Image.Digest() || is.Inside.UID == 0 || is.Outside.Seccomp != 2 {
		t.Errorf("the record is %+v, the node %s, the start %s", is, status.Node, start())
	}
	if out, err := a.verify(ctx, t, a.rawRecord); err != nil || !strings.Contains(out, a.record.Record().Start) {
		t.Errorf("verify: %v: %s", err, out)
	}
	var exit *exec.ExitError
	for what, change := range map[string][2]string{
		"another seccomp mode": {`"seccomp":2`, `"seccomp":0`}, "another signature": {`"signature":"0x`, `"signature":"0x0`},
	} {
		bad := bytes.Replace(a.rawRecord, []byte(change[0]), []byte(change[1]), 1)
		if bytes.Equal(bad, a.rawRecord) {
			t.Fatalf("%s: nothing to change in %s", what, a.rawRecord)
		}
		if out, err := a.verify(ctx, t, bad); !errors.As(err, &exit) || exit.ExitCode() != 1 {
			t.Errorf("%s: %v: %s", what, err, out)
		}
	}
	var looked time.Time
	if err := n.WaitStatus(ctx, "looks at the sandbox", func(st *control.Status) bool {
		if len(st.Networks) != 1 || st.Networks[0].Sandbox == nil {
			return false
		}
		at := st.Networks[0].Sandbox.Looked
		if looked.IsZero() {
			looked = at
		}
		return at.After(looked)
	}); err != nil {
		t.Fatalf("%v\n%s", err, n.Journal(context.WithoutCancel(ctx), 60))
	}
	if again := askAttested(ctx, t); again.record.Digest() != a.record.Digest() {
		t.Errorf("nothing has changed, and there is another record")
	}

	since, before := mark(ctx, t, n), start()
	out, err := n.Podman(ctx, "inspect", "--format", "{{.State.Pid}}", "resultity-runtime")
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if out, err := n.Output(ctx, "nsenter", "-t", strings.TrimSpace(string(out)), "-n", "ip", "link", "add", "leak0", "type", "veth", "peer", "name", "leak1"); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	began := time.Now()
	why := told(ctx, t, n, since, journal.SandboxDrifted)
	found := time.Since(began)
	if !strings.Contains(why, "leak0") {
		t.Errorf("not for what was done: %s", why)
	}
	var named digest.Digest
	if err := n.WaitStatus(ctx, "another start of the runtime, with a record, that gets jobs", func(st *control.Status) bool {
		if !st.GetsJobs() || st.Networks[0].Sandbox == nil {
			return false
		}
		named = st.Networks[0].Sandbox.Record
		now, err := n.Property(ctx, stack.Runtime, "InvocationID")
		return err == nil && now != before && now != "" && named != a.record.Digest()
	}); err != nil {
		t.Fatalf("%v\n%s", err, n.Journal(context.WithoutCancel(ctx), 60))
	}
	t.Logf("found after %v, and back after %v", found.Round(time.Millisecond), time.Since(began).Round(time.Millisecond))
	b := askAttested(ctx, t)
	if is := b.record.Record(); b.record.Digest() != named || is.Start != start() || is.Start == before {
		t.Errorf("record %s of start %s, want %s of %s", b.record.Digest(), is.Start, named, start())
	}
	if out, err := a.verify(ctx, t, b.rawRecord); !errors.As(err, &exit) || exit.ExitCode() != 1 {
		t.Errorf("the record of another start: %v: %s", err, out)
	}
}
