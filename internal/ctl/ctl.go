// Package ctl owns resultityctl, the operator's command. It shows what the
// agent says and decides nothing itself, except for receipts, which it checks
// without any agent or network, and for a node whose agent does not answer: then
// it looks at the machine by itself.
//
// # For scripts
//
// `status --json` prints a [control.Status], also where no agent runs. Its
// fields stay; new ones may come. gates has the gates in a fixed order, that of
// [gate.List]: name, state ("open", "closed" or "unknown"), detail, and where
// they make sense remedy and since (RFC 3339). Those of the machine come first,
// once; then those of each network, with its name in network, by priority. The first one that is closed
// answers "why no jobs". What an agent alone can tell is "unknown" without one.
//
// `replay --json` prints a [control.Replay]: verdict is "same", "different" or
// "not_comparable".
//
// `doctor --json` prints a [control.Report]: checks in a fixed order with name,
// result ("PASS", "FAIL" or "NOT MEASURED"), detail, remedy and, where something
// was timed, ms.
//
// Exit codes:
//
//	0   done; status: no gate is closed; doctor: nothing has failed
//	1   the command failed
//	2   status: a gate is closed; doctor: a check has failed; replay: the answers differ
//	3   replay: the answers cannot be compared
//	64  the command line is wrong
//	69  the agent does not run (doctor: 2, since that is what it has found)
package ctl

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"
	"unicode"

	"github.com/spf13/cobra"

	"github.com/resultity/node/internal/control"
	"github.com/resultity/node/internal/durable"
	"github.com/resultity/node/internal/preflight"
	"github.com/resultity/node/internal/receipt"
	"github.com/resultity/node/internal/receiptlog"
	"github.com/resultity/node/internal/sandbox/record"
)

// Exit codes, for scripts.
const (
	ExitOK           = 0
	ExitFailed       = 1 // the command failed
	ExitClosed       = 2 // status: a gate is closed; doctor: a check has failed; replay: the answers differ
	ExitIncomparable = 3 // replay: the answers cannot be compared
	ExitUsage        = 64
	ExitDown         = 69 // the agent does not run
)

// Account is the system account that the packaged agent runs as.
const Account = preflight.Packaged

// IO is what the command reads and writes.
type IO struct {
	In       io.Reader
	Out, Err io.Writer
	Getenv   func(string) string
}

// exitError carries an exit code without a further message.
type exitError int

func (e exitError) Error() string { return fmt.Sprintf("exit status %d", int(e)) }

// Main runs the command and returns its exit code.
func Main(ctx context.Context, args []string, stdio IO, version string) int {
	stdio.Err = &printable{stdio.Err}
	c := &command{IO: stdio, version: version}
	root := c.root(version)
	root.SetArgs(args)
	root.SetIn(stdio.In)
	root.SetOut(stdio.Out)
	root.SetErr(stdio.Err)
	err := root.ExecuteContext(ctx)
	var code exitError
	switch {
	case err == nil:
		return ExitOK
	case errors.As(err, &code):
		return int(code)
	case errors.Is(err, control.ErrNotRunning):
		fmt.Fprintf(stdio.Err, "resultityctl: %v\nStart it: sudo systemctl --user -M %s@ start resultity-agent (without sudo and -M for a node of your own)\nIts log:  sudo journalctl _SYSTEMD_USER_UNIT=resultity-agent.service\n", err, Account)
		return ExitDown
	case errors.Is(err, errUsage):
		fmt.Fprintf(stdio.Err, "resultityctl: %v\n", err)
		return ExitUsage
	case errors.Is(err, control.ErrDenied):
		fmt.Fprintf(stdio.Err, "resultityctl: %v\nTry: sudo resultityctl …\n", err)
		return ExitFailed
	}
	fmt.Fprintf(stdio.Err, "resultityctl: %v\n", err)
	return ExitFailed
}

var errUsage = errors.New("usage")

type command struct {
	IO
	version string
	socket  string
	json    bool
	network string // the only one that is asked about; "" for all
	bundle  string // doctor: where the support archive goes
	proof   string // verify: the file of the proof; "" for none
	sandbox string // verify: the file of the sandbox's record; "" for none
}

func (c *command) root(version string) *cobra.Command {
	root := &cobra.Command{
		Use: "resultityctl", Short: "Look at and steer a Resultity node", Version: version,
		Long: `Look at and steer a Resultity node. Run it as root or as the node's own account;
verify needs neither a node nor a network.

Exit status: 0 done; 1 failed; 2 a gate is closed (status), a check has failed
(doctor) or the answers differ (replay); 3 they cannot be compared; 64 wrong command
line; 69 the agent does not run.`,
		SilenceErrors: true, SilenceUsage: true,
		// Without these cobra takes no command, and any other, for a call for help.
		Args: func(cmd *cobra.Command, a []string) error {
			if len(a) > 0 {
				return fmt.Errorf("%w: unknown command %q; see resultityctl --help", errUsage, a[0])
			}
			return nil
		},
		RunE: func(*cobra.Command, []string) error {
			return fmt.Errorf("%w: which command? see resultityctl --help", errUsage)
		},
	}
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return fmt.Errorf("%w: %w", errUsage, err) })
	root.PersistentFlags().StringVar(&c.socket, "socket", "", "the agent's control socket (default: that of your own agent, else of the account "+Account+")")
	root.PersistentFlags().StringVar(&c.network, "network", "", "show or bind this network only, on a node that is in several")
	root.PersistentFlags().BoolVar(&c.json, "json", false, "print JSON")
	doctor := &cobra.Command{Use: "doctor", Short: "Check everything, with live probes of the image policy, the sandbox and the engine", Args: func(cmd *cobra.Command, a []string) error {
		if err := cobra.NoArgs(cmd, a); err != nil {
			return fmt.Errorf("%w: %w", errUsage, err)
		}
		return nil
	}, RunE: func(cmd *cobra.Command, a []string) error { return c.doctor(cmd.Context(), a) }}
	doctor.Flags().StringVar(&c.bundle, "bundle", "", "also write a support archive without secrets to this new `file`")
	root.AddCommand(doctor)
	command := func(use, short string, args cobra.PositionalArgs, run func(context.Context, []string) error) *cobra.Command {
		return &cobra.Command{Use: use, Short: short, Args: func(cmd *cobra.Command, a []string) error {
			if err := args(cmd, a); err != nil {
				return fmt.Errorf("%w: %w", errUsage, err)
			}
			return nil
		}, RunE: func(cmd *cobra.Command, a []string) error { return run(cmd.Context(), a) }}
	}
	add := func(use, short string, args cobra.PositionalArgs, run func(context.Context, []string) error) {
		root.AddCommand(command(use, short, args, run))
	}
	add("status", "Show the gates between this node and its jobs", cobra.NoArgs, c.status)
	add("models", "Show the models and their states", cobra.NoArgs, c.models)
	add("jobs", "Show running jobs, unacknowledged results, and jobs kept for a replay", cobra.NoArgs, c.jobs)
	root.AddCommand(c.replayCommand())
	id := command("identity", "Show who this node is", cobra.NoArgs, c.identity)
	id.AddCommand(command("takeover", "After the key was moved or restored on purpose: be the one whom the network believes", cobra.NoArgs, c.takeover))
	root.AddCommand(id)
	root.AddCommand(c.generations(command))
	add("metrics", "Print the agent's metrics in the text format of Prometheus", cobra.NoArgs, c.metrics)
	add("drain", "Take no new jobs; running ones are finished", cobra.NoArgs, func(ctx context.Context, _ []string) error { return c.order(ctx, "drain") })
	add("resume", "Take jobs again", cobra.NoArgs, func(ctx context.Context, _ []string) error { return c.order(ctx, "resume") })
	add("restart", "Start the engine anew, also when the agent waits with that; running jobs are finished", cobra.NoArgs, c.restart)
	root.AddCommand(c.bindCommand(), c.unbindCommand())
	verify := command("verify RECEIPT", "Check a receipt (a file, or - for standard input) without any network", cobra.ExactArgs(1), c.verify)
	verify.Flags().StringVar(&c.proof, "proof", "", "also check with this `file`, or -, that the receipt is in the log of its node")
	verify.Flags().StringVar(&c.sandbox, "sandbox", "", "also check this `file`, or -: the record of the sandbox that the receipt names")
	root.AddCommand(verify)
	return root
}

// client finds the agent's socket: the one asked for, this user's own, or the
// packaged account's.
func (c *command) client() *control.Client {
	return control.NewClient(socketPath(c.socket, c.Getenv("XDG_RUNTIME_DIR"), func() string {
		if u, err := user.Lookup(Account); err == nil {
			return u.Uid
		}
		return ""
	}))
}

func socketPath(asked, runtimeDir string, uid func() string) string {
	below := func(dir string) string { return filepath.Join(dir, "resultity", control.SocketName) }
	if asked != "" {
		return asked
	}
	// Never below the current directory, where anybody may have put a socket.
	own := ""
	if filepath.IsAbs(runtimeDir) {
		own = below(runtimeDir)
		if _, err := os.Stat(own); err == nil {
			return own
		}
	}
	if id := uid(); id != "" {
		return below(filepath.Join("/run/user", id))
	}
	if own == "" {
		own = below(filepath.Join("/run/user", strconv.Itoa(os.Getuid())))
	}
	return own
}

// only leaves of a list what is of the network that is asked about.
func only[T any](c *command, list []T, network func(*T) string) []T {
	return slices.DeleteFunc(list, func(v T) bool { return c.network != "" && network(&v) != c.network })
}

func (c *command) show(v any, text func(w *tabwriter.Writer)) error {
	if c.json {
		e := json.NewEncoder(c.Out)
		e.SetIndent("", "  ")
		return e.Encode(v)
	}
	w := tabwriter.NewWriter(&printable{c.Out}, 0, 0, 2, ' ', 0)
	text(w)
	return w.Flush()
}

// printable lets through what prints. Details come from the network and from
// engines, who have no business with the operator's terminal.
type printable struct{ w io.Writer }

func (p *printable) Write(b []byte) (int, error) {
	clean := strings.Map(func(r rune) rune {
		if r == '\n' || unicode.IsPrint(r) {
			return r
		}
		return '?'
	}, string(b))
	if _, err := io.WriteString(p.w, clean); err != nil {
		return 0, err
	}
	return len(b), nil
}

// line makes one line of a text of several, so that it cannot pass for lines of
// ours.
func line(s string) string { return strings.Join(strings.Fields(s), " ") }

func (c *command) order(ctx context.Context, what string) error {
	var s control.Status
	if err := c.client().Post(ctx, what, &s); err != nil {
		return err
	}
	if c.json {
		return c.show(s, nil)
	}
	word := "takes jobs"
	if s.Draining {
		word = "takes no new jobs"
	}
	_, err := fmt.Fprintf(c.Out, "%s; %d of %d slots busy\n", word, s.Busy, s.Slots)
	return err
}

func (c *command) restart(ctx context.Context, _ []string) error {
	var s control.Status
	if err := c.client().Post(ctx, "restart", &s); err != nil {
		return err
	}
	if c.json {
		return c.show(s, nil)
	}
	_, err := fmt.Fprintln(c.Out, "The runtime is started anew once running jobs have ended; resultityctl status shows how far it is.")
	return err
}

func (c *command) models(ctx context.Context, _ []string) error {
	var ms []control.Model
	if err := c.client().Get(ctx, "models", &ms); err != nil {
		return err
	}
	ms = only(c, ms, func(m *control.Model) string { return m.Network })
	return c.show(ms, func(w *tabwriter.Writer) {
		fmt.Fprintln(w, "NAME\tVERSION\tNETWORK\tSTATE\tSIZE\tHERE\tDIGEST")
		for _, m := range ms {
			fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%d\t%d %%\t%s\n", m.Name, m.Version, m.Network, m.State, m.Bytes, percent(m.Done, m.Bytes), m.Digest)
		}
	})
}

func percent(part, whole int64) int64 {
	if whole <= 0 {
		return 0
	}
	return part * 100 / whole
}

func (c *command) jobs(ctx context.Context, _ []string) error {
	var js []control.Job
	if err := c.client().Get(ctx, "jobs", &js); err != nil {
		return err
	}
	js = only(c, js, func(j *control.Job) string { return j.Network })
	return c.show(js, func(w *tabwriter.Writer) {
		fmt.Fprintln(w, "JOB\tNETWORK\tSTATE\tMODEL\tCODE")
		for _, j := range js {
			fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\n", j.ID, j.Network, j.State, j.Model, j.Code)
		}
	})
}

func (c *command) identity(ctx context.Context, _ []string) error {
	var ids []control.Identity
	if err := c.client().Get(ctx, "identity", &ids); err != nil {
		return err
	}
	ids = only(c, ids, func(id *control.Identity) string { return id.Network })
	return c.show(ids, func(w *tabwriter.Writer) {
		for i, id := range ids {
			account := line(id.Account)
			switch {
			case account == "" && !id.Registered:
				account = "(not registered yet)"
			case account == "":
				account = "(none: resultityctl bind)"
			}
			if i == 0 {
				fmt.Fprintf(w, "node\t%s\n", id.Node)
			}
			fmt.Fprintf(w, "network\t%s\naccount\t%s\n", id.Network, account)
			if id.Since != 0 {
				fmt.Fprintf(w, "bound\tby %s, since %s\n", id.Method, time.UnixMilli(id.Since).UTC().Format(time.RFC3339))
			}
		}
	})
}

// takeover is for a node that the network has called cloned.
func (c *command) takeover(ctx context.Context, _ []string) error {
	var s control.Status
	if err := c.client().Post(ctx, "identity/takeover", &s); err != nil {
		return err
	}
	_, err := fmt.Fprintln(c.Out, "The network believes this machine from its next session on, within two minutes; any other one with this key is refused. If it still says cloned key, once more.")
	return err
}

// read reads a file, or standard input.
func (c *command) read(name string, most int64) ([]byte, error) {
	if name == "-" {
		return durable.ReadAll(c.In, most)
	}
	return durable.ReadFile(name, most)
}

// verified is what verify has found good, as JSON, where there is more than a
// receipt.
type verified struct {
	Receipt receipt.Signed        `json:"receipt"`
	Proof   *receiptlog.Inclusion `json:"proof,omitempty"`
	Sandbox *record.Signed        `json:"sandbox,omitempty"`
}

func (c *command) verify(_ context.Context, args []string) error {
	fromIn := 0
	for _, name := range []string{args[0], c.proof, c.sandbox} {
		if name == "-" {
			fromIn++
		}
	}
	if fromIn > 1 {
		return fmt.Errorf("%w: only one file can come from standard input", errUsage)
	}
	raw, err := c.read(args[0], receipt.MaxSize)
	if err != nil {
		return err
	}
	s, err := receipt.Verify(raw)
	if err != nil {
		return err
	}
	r := s.Receipt()
	var p *receiptlog.Inclusion
	if c.proof != "" {
		if raw, err = c.read(c.proof, receiptlog.MaxInclusion); err != nil {
			return err
		}
		if p, err = receiptlog.ParseInclusion(raw); err != nil {
			return fmt.Errorf("the receipt is signed by node %s, but %s is no proof: %w", r.Node, c.proof, err)
		}
		if err := p.Check(r.Node, s.ChainID(), s.Hash()); err != nil {
			return fmt.Errorf("the receipt is signed by node %s, but %s does not show it in the node's log: %w", r.Node, c.proof, err)
		}
	}
	var look *record.Signed
	if c.sandbox != "" {
		if raw, err = c.read(c.sandbox, record.MaxSigned); err != nil {
			return err
		}
		if look, err = record.Open(raw); err == nil {
			err = belongs(&r, look)
		}
		if err != nil {
			return fmt.Errorf("the receipt is signed by node %s, but not so %s: %w", r.Node, c.sandbox, err)
		}
	}
	if c.json && (p != nil || look != nil) {
		return c.show(verified{s, p, look}, nil)
	}
	if c.json {
		return c.show(s, nil)
	}
	return c.show(s, func(w *tabwriter.Writer) {
		fmt.Fprintf(w, "valid\tsigned by node %s\nchain\t%d\njob\t%s\nsequence\t%d\n", r.Node, s.ChainID(), r.Job, r.Sequence)
		m := &r.Measured
		fmt.Fprintf(w, "\nMeasured by the node\t(hashed or verified by its agent; compare request and response with sha256sum)\n"+
			"configuration\t%s\nimage\t%s\nmodel\t%s\nsandbox\t%s\nrequest\t%s\nresponse\t%s\n",
			m.ConfigDigest, m.ImageDigest, m.ModelDigest, m.SandboxDigest, m.RequestHash, m.ResponseHash)
		k := &r.Claimed
		fmt.Fprintf(w, "\nClaimed by the node\t(said by its engine, hardware and clock; nobody else can check it)\n"+
			"class\t%s\ntokens\t%d prompt, %d completion\ntime\t%s, %d ms\n",
			k.ClassDigest, k.PromptTokens, k.CompletionTokens, time.UnixMilli(int64(k.StartedAt)).UTC().Format(time.RFC3339), int64(k.FinishedAt)-int64(k.StartedAt))
		if p != nil {
			h := &p.Head
			fmt.Fprintf(w, "\nIn the node's log\t(which the node cannot change without signing two logs that contradict each other)\n"+
				"network\t%s\nplace\t%d of %d receipts\nroot\t%s\nsigned\t%s\n",
				h.Network, p.Index, h.Size, h.Root, time.UnixMilli(int64(h.Time)).UTC().Format(time.RFC3339))
			if r := p.Reset; r != nil {
				by, err := r.Verify()
				if err != nil {
					panic(err) // else it would not have been parsed
				}
				fmt.Fprintf(w, "began anew\t%s, for %q\n\tby the word of key %s: look whether that is the network's; what the node signed before is another log\n",
					time.UnixMilli(int64(r.Era)).UTC().Format(time.RFC3339), r.Reason, by)
			}
		}
		if look != nil {
			showSandbox(w, look.Record())
		}
	})
}
