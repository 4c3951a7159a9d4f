package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"net/http"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/resultity/node/internal/evm"
	"github.com/resultity/node/internal/network/store"
	"github.com/resultity/node/internal/receipt"
	"github.com/resultity/node/internal/receiptlog"
	"github.com/resultity/node/test/chat"
	"github.com/resultity/node/test/contract"
	"github.com/resultity/node/test/model"
	"github.com/resultity/node/test/stack"
)

// proven is a receipt and what shows that it is in its node's log, as a client has
// them.
type proven struct {
	id                 string
	rawReceipt, rawLog []byte
	signed             receipt.Signed
	proof              *receiptlog.Inclusion
}

// askProven has a request answered and waits for the proof of its receipt.
func askProven(t *testing.T) *proven {
	t.Helper()
	ask := chat.Request{Prompt: model.Prompts()[0].User, Tokens: 8}
	a, err := s.Ask(t.Context(), ask)
	var refused *chat.Refusal
	for end := time.Now().Add(3 * time.Minute); errors.As(err, &refused) && refused.Status == http.StatusServiceUnavailable && time.Now().Before(end); {
		time.Sleep(200 * time.Millisecond) // the node has to come back to a network that was restarted
		a, err = s.Ask(t.Context(), ask)
	}
	if err != nil {
		t.Fatal(err)
	}
	v := &proven{id: a.Receipt.Receipt().Job.String(), rawReceipt: a.RawReceipt, signed: a.Receipt}
	v.prove(t)
	return v
}

// prove fetches the proof, as soon as there is one.
func (v *proven) prove(t *testing.T) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	for begun := time.Now(); ; {
		res, raw, err := s.Do(ctx, http.MethodGet, "/v1/receipts/"+v.id+"/proof", nil)
		if err != nil {
			t.Fatal(err)
		}
		if res.StatusCode == http.StatusOK {
			if v.proof, err = receiptlog.ParseInclusion(raw); err != nil {
				t.Fatal(err)
			}
			v.rawLog = raw
			t.Logf("receipt %d of %d, proven after %v", v.proof.Index, v.proof.Head.Size, time.Since(begun).Round(time.Millisecond))
			return
		}
		damaged := res.StatusCode == http.StatusInternalServerError && strings.Contains(string(raw), "log_damaged") // until the node has shown it again
		if !damaged && (res.StatusCode != http.StatusNotFound || res.Header.Get("Retry-After") == "") {
			t.Fatalf("proof: %s %s", res.Status, raw)
		}
		select {
		case <-ctx.Done():
			t.Fatalf("no proof came: %s", raw)
		case <-time.After(200 * time.Millisecond): // sooner than the network asks for
		}
	}
}

// verify has resultityctl check it on a machine where nothing answers it.
func (v *proven) verify(t *testing.T, proof []byte) (string, error) {
	t.Helper()
	n := s.Nodes[0]
	for name, b := range map[string][]byte{"receipt": v.rawReceipt, "proof": proof} {
		if err := n.WriteFile("/tmp/"+name+".json", b, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	out, err := n.Output(t.Context(), append([]string{"unshare", "--net"}, n.CtlArgs("verify", "/tmp/receipt.json", "--proof", "/tmp/proof.json")...)...)
	return string(out), err
}

// alone has all receipts be of one node, until the test ends.
func alone(t *testing.T, n *stack.Node) {
	t.Helper()
	for _, other := range s.Nodes {
		if other == n {
			continue
		}
		if _, err := other.Ctl(t.Context(), "drain"); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), 3*time.Minute)
			defer cancel()
			if _, err := other.Ctl(ctx, "resume"); err != nil {
				t.Error(err)
			}
			if err := other.WaitRoutable(ctx); err != nil {
				t.Error(err)
			}
		})
	}
}

// A receipt is in its node's log, which the network proves and anybody checks, a
// contract included. The log goes on over restarts of both, and what the network's
// disk has lost of it the node shows again. The operator can have it begin anew.
func TestReceiptLog(t *testing.T) {
	ctx := t.Context()
	n := s.Nodes[0]
	alone(t, n)
	status, err := n.Status(ctx)
	if err != nil {
		t.Fatal(err)
	}
	first := askProven(t)
	if got := first.signed.Receipt().Node.Hex(); !strings.EqualFold(got, status.Node) {
		t.Fatalf("the receipt is of %s, want %s", got, status.Node)
	}
	if out, err := first.verify(t, first.rawLog); err != nil || !strings.Contains(out, "In the node's log") {
		t.Errorf("verify: %v: %s", err, out)
	}
	var other receiptlog.Inclusion
	if err := json.Unmarshal(first.rawLog, &other); err != nil {
		t.Fatal(err)
	}
	other.Index++
	raw, err := json.Marshal(other)
	if err != nil {
		t.Fatal(err)
	}
	var exit *exec.ExitError
	if out, err := first.verify(t, raw); !errors.As(err, &exit) || exit.ExitCode() != 1 {
		t.Errorf("the proof of another place: %v: %s", err, out)
	}

	c, err := contract.New(ctx, first.signed.ChainID())
	if err != nil {
		t.Fatal(err)
	}
	onChain := func(v *proven) {
		t.Helper()
		h := v.proof.Head
		if _, _, _, err := c.Call("recordHead", contract.OfHead(h.Head), h.Signature[:]); err != nil {
			t.Fatalf("record the head on a chain: %v", err)
		}
		path := make([][32]byte, len(v.proof.Path))
		for i, x := range v.proof.Path {
			path[i] = x
		}
		r := v.signed.Receipt()
		values, _, _, err := c.Call("included", r.Node, contract.OfHead(h.Head).Network, h.Era, r.Hash(v.signed.ChainID()), v.proof.Index, path)
		if err != nil || !values[0].(bool) {
			t.Errorf("the contract does not take the proof: %v, %v", values, err)
		}
	}
	onChain(first)

	grown := func(after string, before *proven) *proven {
		t.Helper()
		next := askProven(t)
		if next.proof.Index < before.proof.Head.Size {
			t.Errorf("%s: receipt %d, and the log had %d", after, next.proof.Index, before.proof.Head.Size)
		}
		first.prove(t)
		if out, err := first.verify(t, first.rawLog); err != nil {
			t.Errorf("%s: verify: %v: %s", after, err, out)
		}
		onChain(next)
		return next
	}
	if err := n.UserCtl(ctx, "restart", n.Agent); err != nil {
		t.Fatal(err)
	}
	if err := n.WaitRoutable(ctx); err != nil {
		t.Fatal(err)
	}
	second := grown("after a restart of the node", first)
	network := func(do string) {
		t.Helper()
		if out, err := s.Net.Output(ctx, "systemctl", do, stack.NetworkUnit); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}
	network("restart")
	if err := n.WaitRoutable(ctx); err != nil {
		t.Fatal(err)
	}
	third := grown("after a restart of the network", second)

	network("stop")
	alterLog(t, first.signed.Receipt().Node)
	network("start")
	if err := n.WaitRoutable(ctx); err != nil {
		t.Fatal(err)
	}
	grown("after a leaf was altered on the network's disk", third)
	if journal := string(s.NetworkJournal(ctx)); !strings.Contains(journal, "copy of the node's receipt log is damaged") {
		t.Error("the network has not found the altered leaf")
	}

	if out, err := s.Network(ctx, "nodes", "reset-log", status.Node, "--reason", "for a test"); err == nil {
		t.Errorf("a log that is whole begins anew: %s", out)
	}
	if out, err := s.Network(ctx, "nodes", "reset-log", status.Node, "--reason", "for a test", "--force"); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if err := n.WaitRoutable(ctx); err != nil {
		t.Fatal(err)
	}
	anew := askProven(t)
	if anew.proof.Head.Era == 0 || anew.proof.Reset == nil {
		t.Errorf("a proof of the log that began anew: %+v", anew.proof)
	}
	if out, err := anew.verify(t, anew.rawLog); err != nil || !strings.Contains(out, `"for a test"`) {
		t.Errorf("verify: %v: %s", err, out)
	}
	onChain(anew)
	if out, err := first.verify(t, first.rawLog); err != nil {
		t.Errorf("verify what was proven before: %v: %s", err, out)
	}
}

// alterLog changes the last leaf of a node's log in the store of the network, which
// is stopped.
func alterLog(t *testing.T, node evm.Address) {
	t.Helper()
	const dir = "/var/lib/resultity-network"
	out, err := s.Net.Output(t.Context(), "tar", "-C", dir, "-cf", "-", "store")
	if err != nil {
		t.Fatal(err)
	}
	here := t.TempDir()
	tar := func(in []byte, args ...string) []byte {
		t.Helper()
		cmd := exec.CommandContext(t.Context(), "tar", append([]string{"-C", here}, args...)...)
		cmd.Stdin = bytes.NewReader(in)
		out, err := cmd.Output()
		if err != nil {
			t.Fatalf("tar %v: %v", args, err)
		}
		return out
	}
	tar(out, "-xf", "-")
	records, err := store.Open(t.Context(), filepath.Join(here, "store"), slog.New(slog.NewTextHandler(t.Output(), nil)))
	if err != nil {
		t.Fatal(err)
	}
	log, err := records.ReceiptLog(t.Context(), node)
	if err == nil {
		leaves := log.Open[0]
		leaves[len(leaves)-1] ^= 1
		err = records.PutReceiptLog(t.Context(), node, log, nil)
	}
	records.Close()
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Net.WriteFile("/root/store.tar", tar(nil, "--numeric-owner", "-cf", "-", "store"), 0o600); err != nil {
		t.Fatal(err)
	}
	script := "owner=$(stat -c %u:%g store); rm -r store; tar -xf /root/store.tar; chown -R $owner store; rm /root/store.tar"
	if out, err := s.Net.Output(t.Context(), "sh", "-ec", "cd "+dir+"; "+script); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
}
