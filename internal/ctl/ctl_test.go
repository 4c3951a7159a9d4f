package ctl

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/resultity/node/internal/binding"
	"github.com/resultity/node/internal/control"
	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/evm"
	"github.com/resultity/node/internal/openai"
	"github.com/resultity/node/internal/receipt"
	"github.com/resultity/node/internal/receiptlog"
	"github.com/resultity/node/internal/wire"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){
		"resultityctl": func() {
			os.Exit(Main(context.Background(), os.Args[1:], IO{In: os.Stdin, Out: os.Stdout, Err: os.Stderr, Getenv: os.Getenv}, "1.2.3"))
		},
	})
}

// The scripts have commands of their own:
//
//	agent FILE [broken]      an agent with this status listens in $WORK/run/resultity
//	ctl [CODE] ARGS          resultityctl asks it and ends with the code (0)
//	ctl-plain CODE ARGS      the same, without being told where the agent is
//	for-each CODE ARGS -- C  ctl-plain with each command
//	stale FILE               leaves a socket on which nobody listens
//	receipt FILE [stranger]  writes a signed receipt, each time another one; by another node
//	prove RECEIPT TO [CHAIN] writes the proof that it is in the node's log
//	bend FROM TO NAME        copies a file with a digit of the hexadecimal value of a name changed
//	change FROM TO OLD NEW   copies a file with a text replaced once
//	large FILE               writes more than any receipt has
//	sign KEY FILE OUT        signs typed data with the key of that number
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata",
		RequireExplicitExec: true,
		Setup: func(e *testscript.Env) error {
			return os.MkdirAll(filepath.Join(e.WorkDir, "run/resultity"), 0o700)
		},
		Cmds: map[string]func(ts *testscript.TestScript, neg bool, args []string){
			"agent": startAgent,
			"ctl": func(ts *testscript.TestScript, _ bool, args []string) {
				code := "0"
				if _, err := strconv.Atoi(args[0]); err == nil {
					code, args = args[0], args[1:]
				}
				if args[0] != "--socket" {
					args = append([]string{"--socket", ts.MkAbs(ts.Getenv("WORK") + "/run/resultity/" + control.SocketName)}, args...)
				}
				plain(ts, code, args)
			},
			"ctl-plain": func(ts *testscript.TestScript, _ bool, args []string) { plain(ts, args[0], args[1:]) },
			"for-each": func(ts *testscript.TestScript, _ bool, args []string) {
				for i, a := range args {
					if a == "--" {
						for _, c := range args[i+1:] {
							plain(ts, args[0], append(args[1:i:i], c))
						}
					}
				}
			},
			"stale": func(ts *testscript.TestScript, _ bool, args []string) {
				l, err := net.ListenUnix("unix", &net.UnixAddr{Name: args[0], Net: "unix"})
				ts.Check(err)
				l.SetUnlinkOnClose(false)
				ts.Check(l.Close())
			},
			"receipt": func(ts *testscript.TestScript, _ bool, args []string) {
				key := nodeKey()
				if len(args) > 1 { // by another node
					var err error
					key, err = evm.NewKey()
					ts.Check(err)
				}
				ts.Check(os.WriteFile(ts.MkAbs(args[0]), signed(ts, key), 0o600))
			},
			"prove": func(ts *testscript.TestScript, _ bool, args []string) {
				chain := uint64(31337)
				if len(args) > 2 { // of the head
					var err error
					chain, err = strconv.ParseUint(args[2], 10, 64)
					ts.Check(err)
				}
				ts.Check(os.WriteFile(ts.MkAbs(args[1]), prove(ts, []byte(ts.ReadFile(args[0])), chain, 0), 0o600))
			},
			"prove-anew": func(ts *testscript.TestScript, _ bool, args []string) {
				ts.Check(os.WriteFile(ts.MkAbs(args[1]), prove(ts, []byte(ts.ReadFile(args[0])), 31337, 1_700_000_000_000), 0o600))
			},
			"bend": func(ts *testscript.TestScript, _ bool, args []string) {
				raw := []byte(ts.ReadFile(args[0]))
				at := bytes.Index(raw, []byte(`"`+args[2]+`":`)) + len(args[2]) + 20
				raw[at] = "10"[raw[at]&1]
				ts.Check(os.WriteFile(ts.MkAbs(args[1]), raw, 0o600))
			},
			"sandbox": writeSandbox,
			"change": func(ts *testscript.TestScript, _ bool, args []string) {
				text := ts.ReadFile(args[0])
				if strings.Count(text, args[2]) != 1 {
					ts.Fatalf("%q is %d times in %s", args[2], strings.Count(text, args[2]), text)
				}
				ts.Check(os.WriteFile(ts.MkAbs(args[1]), []byte(strings.Replace(text, args[2], args[3], 1)), 0o600))
			},
			"sign": func(ts *testscript.TestScript, _ bool, args []string) {
				key, err := evm.ParseKey(fmt.Sprintf("%064s", args[0]))
				ts.Check(err)
				st, chain, err := binding.ParseTypedData([]byte(ts.ReadFile(args[1])))
				ts.Check(err)
				sig, err := key.Sign(st.Hash(chain))
				ts.Check(err)
				ts.Check(os.WriteFile(ts.MkAbs(args[2]), []byte(sig.String()+"\n"), 0o600))
			},
			"large": func(ts *testscript.TestScript, _ bool, args []string) {
				ts.Check(os.WriteFile(ts.MkAbs(args[0]), append(signed(ts, nodeKey()), bytes.Repeat([]byte(" "), receipt.MaxSize)...), 0o600))
			},
		},
	})
}

// plain runs the program and checks its exit code.
func plain(ts *testscript.TestScript, code string, args []string) {
	err := ts.Exec("resultityctl", args...)
	got := "0"
	if err != nil {
		var exit interface{ ExitCode() int }
		if !errors.As(err, &exit) {
			ts.Fatalf("%v", err)
		}
		got = strconv.Itoa(exit.ExitCode())
	}
	if got != code {
		ts.Fatalf("resultityctl %q: exit code %s, want %s", args, got, code)
	}
}

// node is an agent of a script.
type node struct {
	mu     sync.Mutex
	status control.Status
	broken bool
	bound  wire.Bound
	order  int
	taken  int // over
}

// Bind grants everything that a network would, with one nonce for all.
func (n *node) Bind(_ context.Context, q control.BindRequest) (control.Binding, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	now := time.Now()
	b := control.Binding{Network: "testnet", ChainID: 31337, Node: evm.Address{7}, Nonce: evm.Hash{9}, Now: now.UnixMilli(), Expires: now.Add(10 * time.Minute).UnixMilli()}
	switch q.Step {
	case wire.BindWallet:
		action := q.Statement.Statement.Action
		if err := q.Statement.CheckTerms(binding.Terms{
			Network: b.Network, ChainID: b.ChainID, Node: b.Node, Action: action, Nonce: b.Nonce, Now: now, Window: time.Minute,
		}); err != nil {
			return b, err
		}
		n.bound = wire.Bound{}
		if action == binding.Bind {
			n.bound = wire.Bound{Account: q.Statement.Statement.Owner.Hex(), Method: wire.MethodWallet, Since: 1_800_000_000_000}
		}
	case wire.BindCode:
		if q.Code != "12345678" {
			return b, errors.New("wrong code; 4 tries are left")
		}
		n.bound = wire.Bound{Account: "email-x", Method: wire.MethodEmail}
	case wire.BindToken:
		n.bound = wire.Bound{Account: "fleet " + q.Token, Method: wire.MethodToken}
	case wire.BindUnbind:
		n.bound = wire.Bound{}
	}
	b.Bound = n.bound
	return b, nil
}

func startAgent(ts *testscript.TestScript, _ bool, args []string) {
	n := &node{broken: len(args) > 1}
	ts.Check(json.Unmarshal([]byte(ts.ReadFile(args[0])), &n.status))
	// The one before it goes on until the end, and nobody finds it any more.
	l, err := control.Listen(ts.MkAbs(ts.Getenv("WORK") + "/run/resultity"))
	ts.Check(err)
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- control.Serve(ctx, l, n) }()
	ts.Defer(func() {
		cancel()
		ts.Check(<-done)
	})
}

func (n *node) Status() control.Status {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.status
}
func (n *node) Generations() control.Generations {
	n.mu.Lock()
	defer n.mu.Unlock()
	gs := control.Generations{Current: 2, Previous: 1, Order: n.order, Generations: []control.Generation{generationOf(1), generationOf(2), generationOf(3)}}
	if n.order != 0 {
		gs.PutAside = "sha256:ab"
	}
	gs.Generations[2].State, gs.Generations[2].Step, gs.Generations[2].Reason = "dead", "validation", "wrong \x1b[31m\nanswer"
	return gs
}
func generationOf(i int) control.Generation {
	return control.Generation{
		Number: i, Network: "testnet", State: "healthy", Since: time.Unix(1_900_000_000, 0).UTC(), Version: int64(i), Config: "sha256:c", Engine: "llamacpp",
		Image:  "registry.example.net/resultity/llamacpp@" + digest.Of([]byte{byte(i)}).String(),
		Models: []control.GenerationModel{{Name: "tiny-chat", Version: "1", Digest: "sha256:d"}}, Unit: "sha256:e",
		Phases:   []control.Phase{{Name: "stage", TookMS: 60_000}, {Name: "drain", TookMS: 10}, {Name: "start", TookMS: 1500}},
		Snapshot: json.RawMessage(fmt.Sprintf(`{"limits":{"tokens":%d},"models":[{"name":"x"}]}`, 100*i)), UnitText: fmt.Sprintf("[Container]\nImage=%d\nPull=never\n", i),
	}
}
func (n *node) Generation(i int) (control.Generation, error) {
	if i == 0 {
		i = 2
	}
	gs := n.Generations()
	if g := gs.Get(i); g != nil {
		return *g, nil
	}
	return control.Generation{}, fmt.Errorf("%w: no generation %d is kept", control.ErrRefused, i)
}
func (n *node) Rollback(_ context.Context, i int) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if i > 1 {
		return fmt.Errorf("%w: generation %d is current already", control.ErrRefused, i)
	}
	n.order = 1
	return nil
}
func (n *node) Forward(context.Context) error { return nil }
func (n *node) Metrics() http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "resultity_slots 4") })
}
func (n *node) Identity() (ids []control.Identity) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, net := range n.status.Networks {
		ids = append(ids, control.Identity{
			Node: n.status.Node, Network: net.Name, Account: n.bound.Account, Method: n.bound.Method, Since: n.bound.Since,
			Registered: n.status.Draining || n.bound != wire.Bound{},
		})
	}
	return ids
}
func (n *node) Models() []control.Model {
	return []control.Model{
		{ModelState: wire.ModelState{Name: "tiny", Version: "1", Digest: digest.Of(nil), State: "pending"}, Network: "testnet", Bytes: 10, Done: 5},
		{ModelState: wire.ModelState{Name: "none", Version: "1", Digest: digest.Of(nil), State: "failed"}, Network: "testnet"},
	}
}
func (n *node) Jobs(int) ([]control.Job, error) {
	if n.broken {
		return nil, errors.New("the disk is gone")
	}
	return []control.Job{{ID: "aa", Network: "testnet", State: "running", Model: "tiny"}, {ID: "bb", Network: "testnet", State: "unacknowledged", Code: wire.CodeEngine}}, nil
}
func (n *node) Doctor(context.Context) (*control.Report, error) {
	if n.broken {
		return nil, control.ErrBusy
	}
	r := &control.Report{Version: "1", Checks: control.ChecksOf(n.status.Gates)}
	r.Checks = append(r.Checks, control.Check{Name: control.ProbeOneToken, Result: control.Pass, Detail: "first token after 12 ms", MS: 12})
	return r, nil
}
func (n *node) Bundle(context.Context) ([]byte, error) { return []byte("archive"), nil }
func (n *node) Drain() error {
	n.set(true)
	if n.broken {
		return errors.New("the node takes no new jobs, but a restart forgets that: the disk is \x1b[2Jgone")
	}
	return nil
}
func (n *node) Resume() error                                { n.set(false); return nil }
func (n *node) Restart(context.Context) error                { return nil }
func (n *node) Scrubbed(context.Context) error               { return nil }
func (n *node) Damaged(context.Context, digest.Digest) error { return nil }

func (n *node) Takeover() error {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.taken++
	return nil
}
func (n *node) set(draining bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.status.Draining = draining
}

func signed(ts *testscript.TestScript, key *evm.Key) []byte {
	r := receipt.Receipt{
		Job: receipt.NewJobID(), Node: key.Address(),
		Measured: receipt.Measured{
			ConfigDigest: digest.Of([]byte("c")), ImageDigest: digest.Of([]byte("i")), ModelDigest: digest.Of([]byte("m")), SandboxDigest: digest.Of([]byte("s")),
			RequestHash: digest.Of([]byte("q")), ResponseHash: digest.Of([]byte("a")),
		},
		Claimed: receipt.Claimed{
			ClassDigest: digest.Of([]byte("k")), PromptTokens: 3, CompletionTokens: 5, StartedAt: 1_000_000_000_000, FinishedAt: 1_000_000_000_250,
		},
	}
	s, err := r.Sign(31337, key)
	ts.Check(err)
	raw, err := json.Marshal(s)
	ts.Check(err)
	return raw
}

func TestSocketPath(t *testing.T) {
	dir := t.TempDir()
	own := filepath.Join(dir, "resultity", control.SocketName)
	none, some := func() string { return "" }, func() string { return "990" }
	mine := "/run/user/" + strconv.Itoa(os.Getuid()) + "/resultity/" + control.SocketName
	for _, c := range []struct {
		asked, run string
		uid        func() string
		want       string
	}{
		{"/x.sock", dir, some, "/x.sock"},
		{"", dir, some, "/run/user/990/resultity/control.sock"}, // nothing of our own runs
		{"", dir, none, own},
		{"", "", none, mine},
		{"", ".", none, mine},
		{"", "", some, "/run/user/990/resultity/control.sock"},
	} {
		if got := socketPath(c.asked, c.run, c.uid); got != c.want {
			t.Errorf("%q, %q: %s, want %s", c.asked, c.run, got, c.want)
		}
	}
	if err := os.MkdirAll(filepath.Dir(own), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(own, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if got := socketPath("", dir, some); got != own {
		t.Errorf("%s, want %s", got, own)
	}
}

// A terminal that is gone is an error, not silence.
func TestOutputFails(t *testing.T) {
	l, err := control.Listen(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	done := make(chan error, 1)
	go func() { done <- control.Serve(ctx, l, &node{}) }()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{{"models"}, {"models", "--json"}, {"drain"}} {
		var said strings.Builder
		code := Main(ctx, append(args, "--socket", l.Addr().String()), IO{In: strings.NewReader(""), Out: w, Err: &said, Getenv: func(string) string { return "" }}, "1")
		if code != ExitFailed || said.Len() == 0 {
			t.Errorf("%q: exit code %d, %q", args, code, said.String())
		}
	}
	_ = w.Close() // nobody reads
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// Replay does what the job's name says.
func (n *node) NotReplayed(*control.ReplayRefusal) {}

func (n *node) Replay(_ context.Context, q control.ReplayRequest) (control.Replay, error) {
	v := control.Replay{Job: q.Job, Network: "testnet", Model: "tiny", PromptTokens: 7, CompletionTokens: 3}
	switch v.Verdict = openai.Same; q.Job {
	case "":
		v.Job = fmt.Sprintf("%s %s %s %d", bytes.TrimSpace(q.Request), bytes.TrimSpace(q.Response), bytes.TrimSpace(q.Receipt), q.TimeoutS)
	case "different":
		v.Comparison = openai.Comparison{Verdict: openai.Different, Difference: &openai.Difference{Part: openai.PartText, Offset: 12, Was: "20", Is: "21"}}
		if q.Show {
			v.Was, v.Is = "secret\n\x1b[31mwords", "secret"
		}
	case "incomparable":
		v.Comparison = openai.Incomparable(openai.OtherModel, "it is by\nmodel \x1b[2J%q", "large")
	case "gone":
		return v, fmt.Errorf("%w: job gone is not kept", control.ErrRefused)
	}
	return v, nil
}

// nodeKey is of the node whose receipts the scripts have.
var nodeKey = sync.OnceValue(func() *evm.Key {
	k, err := evm.NewKey()
	if err != nil {
		panic(err)
	}
	return k
})

// prove makes a log of an era with a receipt in it, and the proof of that.
func prove(ts *testscript.TestScript, raw []byte, chain, era uint64) []byte {
	s, err := receipt.Verify(raw)
	ts.Check(err)
	r := s.Receipt()
	log, nodes := receiptlog.New(), map[receiptlog.NodeID]evm.Hash{}
	for _, h := range []evm.Hash{evm.Keccak([]byte("before")), r.Hash(s.ChainID()), evm.Keccak([]byte("behind"))} {
		log.Append(receiptlog.Leaf(h), func(id receiptlog.NodeID, h evm.Hash) { nodes[id] = h })
	}
	p, err := receiptlog.Prove(1, 3, func(id receiptlog.NodeID) (evm.Hash, error) { return nodes[id], nil })
	ts.Check(err)
	h := receiptlog.Head{Node: r.Node, Network: "testnet", Era: era, Size: 3, Root: log.Root(), Time: 1_000_000_000_000}
	head, err := h.Sign(chain, nodeKey())
	ts.Check(err)
	i := receiptlog.Inclusion{Head: *head, Index: 1, Path: p.Path}
	if era > 0 {
		word := receiptlog.Reset{Node: r.Node, Network: "testnet", Era: era, Reason: "two disks were lost"}
		i.Reset, err = word.Sign(chain, nodeKey()) // whose key it is, is not known here
		ts.Check(err)
	}
	out, err := json.Marshal(i)
	ts.Check(err)
	return out
}
