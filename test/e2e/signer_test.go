package e2e

import (
	"bytes"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/resultity/node/internal/control"
	"github.com/resultity/node/internal/gate"
	"github.com/resultity/node/test/chat"
	"github.com/resultity/node/test/model"
	"github.com/resultity/node/test/stack"
)

const signerUnit = "resultity-signer.service"

// root runs a shell on a node as root.
func root(t *testing.T, n *stack.Node, script string) string {
	t.Helper()
	out, err := n.Output(t.Context(), "sh", "-ec", script)
	if err != nil {
		t.Fatalf("%s: %v: %s", script, err, out)
	}
	return strings.TrimSpace(string(out))
}

func identityOf(t *testing.T, n *stack.Node) (node, detail string) {
	t.Helper()
	st, err := n.Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	i := slices.IndexFunc(st.Gates, func(g gate.Gate) bool { return g.Name == gate.Identity })
	return st.Node, st.Gates[i].Detail
}

// The node's key is where nothing of the agent's account reaches, neither by files
// nor in memory, and the signer is as tight as systemd can tell.
func TestKeyIsIsolated(t *testing.T) {
	eachNode(t, func(t *testing.T, n *stack.Node) {
		if _, detail := identityOf(t, n); !strings.Contains(detail, "held by resultity-signer") {
			t.Fatal(detail)
		}
		out := root(t, n, "systemd-analyze security --no-pager "+signerUnit)
		m := regexp.MustCompile(`Overall exposure level .*: ([0-9.]+) `).FindStringSubmatch(out)
		if m == nil {
			t.Fatal(out)
		}
		if v, err := strconv.ParseFloat(m[1], 64); err != nil || v > 0.5 {
			t.Errorf("exposure %s, want 0.5 or less\n%s", m[1], out)
		}
		pid := root(t, n, "systemctl show -P MainPID "+signerUnit)
		for _, file := range []string{
			"/etc/credstore.encrypted/resultity-key", "/run/credentials/" + signerUnit + "/resultity-key", "/var/lib/resultity-signer/counters",
			"/proc/" + pid + "/mem", "/proc/" + pid + "/environ", "/proc/" + pid + "/root/etc",
		} {
			out, err := n.OutputAs(t.Context(), stack.Account, "cat", file)
			t.Logf("%s: expected: Permission denied; got: %v", strings.ReplaceAll(file, pid, "PID"), err)
			if err == nil || !strings.Contains(err.Error(), "Permission denied") {
				t.Errorf("the agent's account reads %s: %d bytes, %v", file, len(out), err)
			}
		}
		if left := root(t, n, "find /proc/"+pid+"/root/ -xdev -type f | sed s,/proc/"+pid+"/root,,"); left != "/usr/libexec/resultity/resultity-signer" && left != "" {
			t.Errorf("files in the signer's root: %s", left)
		}
		key, err := hex.DecodeString(root(t, n, "systemd-creds decrypt --name=resultity-key /etc/credstore.encrypted/resultity-key -"))
		if err != nil || len(key) != 32 {
			t.Fatal(len(key), err)
		}
		agent, err := n.Property(t.Context(), n.Agent, "MainPID")
		if err != nil {
			t.Fatal(err)
		}
		if found := inMemory(t, n, pid, key); !found {
			t.Error("the key is not in the signer's memory either: the search is at fault")
		}
		found := inMemory(t, n, agent, key)
		t.Logf("the agent's memory: expected: without the key; got: the key is there: %t", found)
		if found {
			t.Error("the key is in the agent's memory")
		}
		if out, err := n.Output(t.Context(), "grep", "-rl", hex.EncodeToString(key), n.State+"/agent/identity", n.State+"/agent/networks", "/etc"); err == nil {
			t.Errorf("the key is in files: %s", out)
		}
	})
}

// inMemory searches the writable memory of a process on a host for a key in the
// forms that programs have it in.
func inMemory(t *testing.T, n *stack.Node, pid string, key []byte) bool {
	t.Helper()
	back := bytes.Clone(key)
	slices.Reverse(back)
	forms := [][]byte{key, back, []byte(hex.EncodeToString(key))}
	proc := outside(t, n, pid)
	maps, err := os.ReadFile(proc + "/maps")
	if err != nil {
		t.Fatal(err)
	}
	mem, err := os.Open(proc + "/mem")
	if err != nil {
		t.Fatal(err)
	}
	defer mem.Close()
	for line := range strings.Lines(string(maps)) {
		var from, to int64
		var mode string
		if _, err := fmt.Sscanf(line, "%x-%x %s", &from, &to, &mode); err != nil || !strings.HasPrefix(mode, "rw") || to-from > 1<<30 {
			continue
		}
		b := make([]byte, to-from)
		got, _ := mem.ReadAt(b, from) // what is not there cannot hold it
		for _, form := range forms {
			if bytes.Contains(b[:got], form) {
				return true
			}
		}
	}
	return false
}

// outside finds the directory of a host's process in this machine's /proc.
func outside(t *testing.T, n *stack.Node, pid string) string {
	t.Helper()
	namespace := root(t, n, "readlink /proc/1/ns/pid")
	all, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		t.Fatal(err)
	}
	for _, dir := range all {
		raw, err := os.ReadFile(dir + "/status")
		if err != nil {
			continue // it has ended
		}
		m := regexp.MustCompile(`(?m)^NSpid:.*\t(\d+)$`).FindSubmatch(raw)
		if ns, err := os.Readlink(dir + "/ns/pid"); err == nil && m != nil && string(m[1]) == pid && ns == namespace {
			return dir
		}
	}
	t.Fatalf("process %s of %s is not seen from outside", pid, n.Name())
	return ""
}

// A signer that is killed again and again while jobs run loses none of them.
func TestSignerIsKilled(t *testing.T) {
	done := make(chan struct{})
	var wg sync.WaitGroup
	answers := make(chan string, 4)
	seen := map[string]bool{}
	for range 4 {
		wg.Go(func() {
			defer func() { answers <- "" }()
			for {
				select {
				case <-done:
					return
				default:
				}
				a, err := s.Ask(t.Context(), chat.Request{Prompt: model.Prompts()[0].User, Tokens: 16})
				if err != nil {
					t.Error(err)
					return
				}
				answers <- a.Receipt.Receipt().Job.String()
			}
		})
	}
deaths:
	for range 10 {
		for range 5 { // some work between two deaths
			a := <-answers
			if a == "" || seen[a] {
				t.Errorf("answer %q, %v", a, seen[a])
				break deaths
			}
			seen[a] = true
		}
		for _, n := range s.Nodes {
			if out, err := n.Output(t.Context(), "systemctl", "kill", "-s", "KILL", signerUnit); err != nil {
				t.Logf("%s: %v: %s", n.Name(), err, out) // it may be between two starts
			}
		}
	}
	close(done)
	go func() {
		for range answers { // what is on its way
		}
	}()
	wg.Wait()
	close(answers)
}

// The whole life of a key: set back and noticed, taken over, backed up, brought to
// an agent without a signer, and moved back.
func TestKeyMoves(t *testing.T) {
	n := s.Nodes[1]
	ctx := t.Context()
	node, _ := identityOf(t, n)
	identity := n.State + "/agent/identity"
	restart := func() {
		t.Helper()
		if err := n.UserCtl(ctx, "restart", n.Agent); err != nil {
			t.Fatal(err)
		}
	}
	routable := func(want string) {
		t.Helper()
		if err := n.WaitRoutable(ctx); err != nil {
			t.Fatalf("%v\n%s", err, n.Journal(ctx, 40))
		}
		if now, detail := identityOf(t, n); now != node || !strings.Contains(detail, want) {
			t.Errorf("node %s, %s; want %s, %s", now, detail, node, want)
		}
	}

	root(t, n, "systemctl stop "+signerUnit+" && cp -a /var/lib/resultity-signer/counters /root/old")
	restart()
	routable("held by resultity-signer")
	root(t, n, "systemctl stop "+signerUnit+" && cp -a /root/old /var/lib/resultity-signer/counters")
	restart()
	if err := n.WaitStatus(ctx, "the network to notice", func(st *control.Status) bool {
		i := slices.IndexFunc(st.Gates, func(g gate.Gate) bool { return g.Name == gate.Session })
		return i >= 0 && strings.Contains(st.Gates[i].Detail, "cloned key") && strings.Contains(st.Gates[i].Remedy, "takeover")
	}); err != nil {
		t.Fatal(err)
	}
	if out, err := s.Network(ctx, "nodes", "show", node); err != nil || !bytes.Contains(out, []byte("cloned key")) {
		t.Errorf("%s, %v", out, err)
	}
	if out, err := n.Ctl(ctx, "identity", "takeover"); err != nil {
		t.Fatalf("%s, %v", out, err)
	}
	restart()
	routable("held by resultity-signer")

	// A backup is a keystore file, as the agent's own is.
	root(t, n, "echo a passphrase of some length >/root/pass && rm -f /root/backup && /usr/libexec/resultity/resultity-signer --passphrase /root/pass export /root/backup")
	if err := n.UserCtl(ctx, "stop", n.Agent); err != nil {
		t.Fatal(err)
	}
	root(t, n, "systemctl stop "+signerUnit+` resultity-signer.socket
		install -d -m 0700 -o resultity -g resultity `+identity+`
		install -m 0600 -o resultity -g resultity /root/backup `+identity+`/key.json
		install -m 0600 -o resultity -g resultity /root/pass `+identity+`/passphrase
		install -m 0600 -o resultity -g resultity /var/lib/resultity-signer/counters `+identity+`/counters
		rm /var/lib/resultity-signer/counters /etc/credstore.encrypted/resultity-key`)
	if err := n.UserCtl(ctx, "start", n.Agent); err != nil {
		t.Fatal(err)
	}
	routable("key in the agent")
	root(t, n, "/usr/libexec/resultity/resultity-signer migrate")
	routable("held by resultity-signer")
	if left := root(t, n, "ls "+identity); left != "" {
		t.Errorf("left with the agent: %s", left)
	}
	root(t, n, "/usr/libexec/resultity/resultity-signer migrate") // again is harmless

	// A key that comes from a backup counts on where the other one is not.
	root(t, n, "systemctl stop "+signerUnit+" && rm /etc/credstore.encrypted/resultity-key /var/lib/resultity-signer/counters && /usr/libexec/resultity/resultity-signer --passphrase /root/pass import /root/backup")
	restart()
	routable("held by resultity-signer")
}
