package cli

import (
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/user"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/resultity/node/internal/evm"
	"github.com/resultity/node/internal/network"
	"github.com/resultity/node/internal/network/classes"
	"github.com/resultity/node/internal/network/store"
	"github.com/resultity/node/internal/receiptlog"
	"github.com/resultity/node/internal/wire"
)

func nodesCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "nodes", Short: "Registered nodes and the accounts that they are bound to"}
	list := adminCommand("list", "List the registered nodes", 0, func(cmd *cobra.Command, a network.Admin, _ []string) (any, func(io.Writer), error) {
		nodes, err := a.Nodes(cmd.Context())
		return nodes, func(w io.Writer) {
			fmt.Fprintln(w, "NODE\tACCOUNT\tMETHOD\tBOUND\tREGISTERED\tCLONED KEY\tCLASS\tANSWERS\tRECEIPT LOG")
			for _, n := range nodes {
				fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n", n.Address.Hex(), cmp.Or(n.Account, "(none)"), n.Method, when(n.Since), when(n.Registered), when(n.Cloned), class(n.Class), goldenAnswers(n), logState(n.Log))
			}
		}, err
	})
	show := adminCommand("show NODE", "Show a node and the history of its binding", 1, func(cmd *cobra.Command, a network.Admin, args []string) (any, func(io.Writer), error) {
		addr, err := evm.ParseAddress(args[0])
		if err != nil {
			return nil, nil, fmt.Errorf("%w: %w", errUsage, err)
		}
		n, err := a.Node(cmd.Context(), addr)
		return n, func(w io.Writer) {
			fmt.Fprintf(w, "node\t%s\nregistered\t%s\nagent\t%q\naccount\t%s\n", n.Address.Hex(), when(n.Registered), n.Agent, cmp.Or(n.Account, "(none)"))
			if n.Cloned != 0 {
				fmt.Fprintf(w, "cloned key\tseen %s: two machines have signed as this node, or one was set back\n", when(n.Cloned))
			}
			if c := n.Class; c != nil {
				fmt.Fprintf(w, "class\t%s\nhardware\t%s\nfingerprint\t%s\n", c.Digest, &c.Hardware, cmp.Or(c.Fingerprint.String(), "(none yet)"))
			}
			switch n.Answers {
			case classes.Odd:
				fmt.Fprintln(w, "golden answers\tother ones than most nodes of its class: look at this machine")
			case classes.Disputed:
				fmt.Fprintln(w, "golden answers\tthe nodes of its class give several, and none is of most")
			case classes.Same:
				fmt.Fprintln(w, "golden answers\tthose of its class")
			}
			showLog(w, n.Log)
			if n.Account != "" {
				fmt.Fprintf(w, "method\t%s\nbound\t%s\n", n.Method, when(n.Since))
			}
			fmt.Fprintln(w, "\nTIME\tACTION\tACCOUNT\tMETHOD\tBY")
			for _, e := range n.History {
				fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\n", when(e.Time), e.Action, e.Account, e.Method, e.By)
			}
		}, err
	})
	unbind := adminCommand("unbind NODE", "Take a node from its account; it gets no jobs until it is bound again", 1, func(cmd *cobra.Command, a network.Admin, args []string) (any, func(io.Writer), error) {
		addr, err := evm.ParseAddress(args[0])
		if err != nil {
			return nil, nil, fmt.Errorf("%w: %w", errUsage, err)
		}
		return struct{}{}, func(w io.Writer) { fmt.Fprintln(w, "unbound", addr.Hex()) }, a.Unbind(cmd.Context(), addr)
	})
	cmd.AddCommand(list, show, unbind, resetLogCommand())
	return cmd
}

func resetLogCommand() *cobra.Command {
	var reason string
	var force bool
	cmd := adminCommand("reset-log NODE", "Have the receipt log of a node begin anew, and set aside what contradicts it", 1, func(cmd *cobra.Command, a network.Admin, args []string) (any, func(io.Writer), error) {
		addr, err := evm.ParseAddress(args[0])
		if err != nil {
			return nil, nil, fmt.Errorf("%w: %w", errUsage, err)
		}
		if err := receiptlog.CheckReason(reason); err != nil {
			return nil, nil, fmt.Errorf("%w: --reason: %w", errUsage, err)
		}
		r, err := a.ResetLog(cmd.Context(), addr, whoIs(), reason, force)
		if err != nil || r == nil {
			return nil, nil, err
		}
		return r, func(w io.Writer) {
			showReset(w, r)
			fmt.Fprintln(w, "The node takes it over in its next session, which begins at once; nothing has to be done there.")
		}, nil
	})
	cmd.Long = "Have the receipt log of a node begin anew.\n\n" +
		"A node that has signed two logs gets no jobs any more. A honest one may have, or\n" +
		"can sign none at all, where its disk and the network's copy were both lost. Look into\n" +
		"it first (nodes show NODE), and ask the node's operator.\n\n" +
		"The network signs that the log begins anew. The heads that were there are kept with\n" +
		"that for good, and old proofs stay valid; each proof of the new log shows when it\n" +
		"began, and the reason. A log can begin anew 16 times."
	cmd.Flags().StringVar(&reason, "reason", "", "one line that says why, which everybody sees who gets a proof of the new log")
	cmd.Flags().BoolVar(&force, "force", false, "also where the network sees nothing wrong: the node's disk was lost before the network had its last receipts (its journal says receipt-log-behind), or its copy or the node was set back to an older state")
	_ = cmd.MarkFlagRequired("reason") // fails for a flag that is not there
	return cmd
}

// whoIs names the operator for the network's own record.
func whoIs() string {
	if name := os.Getenv("SUDO_USER"); name != "" {
		return name
	}
	if u, err := user.Current(); err == nil {
		return u.Username
	}
	return fmt.Sprintf("uid %d", os.Getuid())
}

// showReset says what was set aside.
func showReset(w io.Writer, r *store.Reset) {
	fmt.Fprintf(w, "began anew\t%s, by %q: %q\n", when(int64(r.Era)), r.Operator, r.Reason)
	for _, h := range []*receiptlog.SignedHead{r.First, r.Second} {
		if h != nil {
			fmt.Fprintf(w, "\tset aside: root %s of %d receipts, signed %s, signature %s\n", h.Root, h.Size, when(int64(h.Time)), h.Signature)
		}
	}
}

func accountsCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "accounts", Short: "Accounts and their nodes"}
	list := adminCommand("list", "List the accounts and how many nodes each has", 0, func(cmd *cobra.Command, a network.Admin, _ []string) (any, func(io.Writer), error) {
		accounts, err := a.Accounts(cmd.Context())
		for i := range accounts {
			accounts[i].Email = "" // show tells it
		}
		return accounts, func(w io.Writer) {
			fmt.Fprintln(w, "ACCOUNT\tNODES")
			for _, c := range accounts {
				fmt.Fprintf(w, "%s\t%d\n", c.ID, len(c.Nodes))
			}
		}, err
	})
	show := adminCommand("show ACCOUNT", "Show an account, its address if it has one, and its nodes", 1, func(cmd *cobra.Command, a network.Admin, args []string) (any, func(io.Writer), error) {
		accounts, err := a.Accounts(cmd.Context())
		if err != nil {
			return nil, nil, err
		}
		for _, c := range accounts {
			if c.ID != args[0] {
				continue
			}
			return c, func(w io.Writer) {
				fmt.Fprintf(w, "account\t%s\n", c.ID)
				if c.Email != "" {
					fmt.Fprintf(w, "e-mail\t%s\n", c.Email)
				}
				for _, n := range c.Nodes {
					fmt.Fprintf(w, "node\t%s\n", n.Hex())
				}
			}, nil
		}
		return nil, nil, fmt.Errorf("no node is, or was by e-mail, bound to an account %q", args[0])
	})
	cmd.AddCommand(list, show)
	return cmd
}

// adminCommand makes a command that prints what it gets from the network, as a
// table or as JSON.
func adminCommand(use, short string, args int, run func(*cobra.Command, network.Admin, []string) (any, func(io.Writer), error)) *cobra.Command {
	cmd := &cobra.Command{Use: use, Short: short, Args: exactly(args)}
	dir := dirFlag(cmd)
	asJSON := cmd.Flags().Bool("json", false, "print JSON")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		d, err := dir()
		if err != nil {
			return err
		}
		return withAdmin(cmd, d, func(a network.Admin) error {
			v, table, err := run(cmd, a, args)
			if err != nil {
				return err
			}
			if *asJSON {
				e := json.NewEncoder(cmd.OutOrStdout())
				e.SetIndent("", "  ")
				return e.Encode(v)
			}
			w := tabwriter.NewWriter(cmd.OutOrStdout(), 0, 0, 2, ' ', 0)
			table(w)
			return w.Flush()
		})
	}
	return cmd
}

// goldenAnswers prints a node's fingerprint in a table, and whether it is its class's.
func goldenAnswers(n network.NodeInfo) string {
	s := ""
	if n.Class != nil && !n.Class.Fingerprint.IsZero() {
		s = n.Class.Fingerprint.Short()
	}
	switch n.Answers {
	case classes.Odd:
		s += " ODD"
	case classes.Disputed:
		s += " disputed"
	}
	return strings.TrimSpace(s)
}

// class prints a node's determinism class in a table.
func class(c *wire.Class) string {
	if c == nil {
		return ""
	}
	return c.Digest.Short()
}

// logState says in few words how a receipt log is.
func logState(l *network.NodeLog) string {
	if l == nil {
		return ""
	}
	switch {
	case l.Damaged != "":
		return "damaged"
	case l.Conflict != nil:
		return "contradicts itself"
	}
	s := strconv.FormatUint(l.Size(), 10)
	for _, n := range []struct {
		count uint64
		what  string
	}{{l.LeftOut, "left out"}, {uint64(l.Overdue), "overdue"}} {
		if n.count > 0 {
			s += fmt.Sprintf(", %d %s", n.count, n.what)
		}
	}
	if l.Lost != nil {
		s += ", gap"
	}
	if n := len(l.Resets); n > 0 {
		s += fmt.Sprintf(", reset %d×", n)
	}
	return s
}

// showLog says all that is known of a receipt log.
func showLog(w io.Writer, l *network.NodeLog) {
	if l == nil {
		return
	}
	if l.Damaged != "" {
		fmt.Fprintf(w, "receipt log\tdamaged: %s\n", l.Damaged)
		return
	}
	fmt.Fprintf(w, "receipt log\t%d receipts", l.Size())
	if l.Head != nil {
		fmt.Fprintf(w, ", root %s, signed %s", l.Head.Root, when(int64(l.Head.Time)))
	}
	fmt.Fprintln(w)
	if l.From > 0 {
		fmt.Fprintf(w, "\tthe first %d cannot be proven: the network's copy begins behind them\n", l.From)
	}
	if l.Lost != nil {
		fmt.Fprintf(w, "\tnot shown to go on from the log of %d receipts, root %s, of which the network has lost its copy\n", l.Lost.Size, l.Lost.Root)
		if l.Lost.Size > l.Size() {
			fmt.Fprintln(w, "\tif the node has lost it, too, it signs no other one: see nodes reset-log --help")
		}
	}
	if l.Overdue > 0 {
		fmt.Fprintf(w, "\t%d receipts should have been in it for two heartbeats\n", l.Overdue)
	}
	if l.LeftOut > 0 {
		fmt.Fprintf(w, "\t%d receipts of this node are not in it, though it went on\n", l.LeftOut)
	}
	if c := l.Conflict; c != nil {
		fmt.Fprintf(w, "\tcontradicts itself, found %s: root %s of %d receipts, and root %s of %d; the node gets no jobs, --json prints both heads with their signatures; see nodes reset-log --help\n",
			when(c.Found), c.First.Root, c.First.Size, c.Second.Root, c.Second.Size)
	}
	for i := range l.Resets {
		showReset(w, &l.Resets[i])
	}
}

// when prints Unix milliseconds.
func when(ms int64) string {
	if ms == 0 {
		return ""
	}
	return time.UnixMilli(ms).UTC().Format(time.RFC3339)
}
