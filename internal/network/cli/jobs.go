package cli

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/resultity/node/internal/durable"
	"github.com/resultity/node/internal/evm"
	"github.com/resultity/node/internal/network"
	"github.com/resultity/node/internal/openai"
	"github.com/resultity/node/internal/receipt"
)

var (
	errDiffers      = errors.New("the answers differ")
	errIncomparable = errors.New("the answers cannot be compared")
)

// maxRequest bounds a request from a file, in bytes.
const maxRequest = 16 << 20

func jobsCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "jobs", Short: "Give jobs out again, and see whether nodes agree"}
	cmd.AddCommand(replayCommand(), replaysCommand())
	return cmd
}

func replayCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use: "replay JOB", Short: "Give a finished job to a second node and compare the answers", Args: exactly(1),
		Long: `Give a finished job to a second node of the same determinism class and compare
text, finish reason and token counts. JOB is the id in its receipt. To the node it
is a job like any other; no client gets the answer, and it is not counted among the
jobs. Nodes of other classes are never asked: their answers may rightly differ. One
of another account than the first node's is asked if there is one; else a note says
so. The class is what a node names in its heartbeats when it is given a job. One that
signs for another class is a finding, and the next node is asked, three at most; so it
is with one that does not answer.

The request must be there: keep_requests_bytes of network.toml says how much is
kept of those of finished jobs, by default nothing; --request takes the client's,
which the receipt proves to be the right one.

It prints SAME, DIFFERENT with the place of the first difference, or NOT COMPARABLE
and why. The verdict is kept for 30 days with both receipts, which show who has
signed what (jobs replays --json); what is in the receipts cannot be taken back. One
DIFFERENT does not say which node is at fault, if any: engines may compute in
another order when they are busy. Ask a third node, and ask again.

Exit status: 0 the same; 2 different; 3 not comparable; others as usual.`,
	}
	dir := dirFlag(cmd)
	node := cmd.Flags().String("node", "", "the node to ask, by address, also the first one; it has to be of the class (default: the least busy other one)")
	file := cmd.Flags().String("request", "", "file with the body of the client's request, byte for byte")
	asJSON := cmd.Flags().Bool("json", false, "print JSON, with both receipts")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		d, err := dir()
		if err != nil {
			return err
		}
		id, err := receipt.ParseJobID(args[0])
		if err != nil {
			return fmt.Errorf("%w: %w", errUsage, err)
		}
		var q network.ReplayQuery
		if *node != "" {
			a, err := evm.ParseAddress(*node)
			if err != nil {
				return fmt.Errorf("%w: %w", errUsage, err)
			}
			q.Node = &a
		}
		if *file != "" {
			if q.Request, err = durable.ReadFile(*file, maxRequest); err != nil {
				return err
			}
		}
		var v *network.Replay
		err = withAdmin(cmd, d, func(a network.Admin) (err error) {
			v, err = a.Replay(cmd.Context(), id, q)
			return err
		})
		if v == nil {
			return err
		}
		if show := showReplay(cmd, v, *asJSON); show != nil || err != nil {
			return errors.Join(err, show)
		}
		switch v.Verdict {
		case openai.Same:
			return nil
		case openai.Different:
			return errDiffers
		}
		return errIncomparable
	}
	return cmd
}

func showReplay(cmd *cobra.Command, v *network.Replay, asJSON bool) error {
	if asJSON {
		e := json.NewEncoder(cmd.OutOrStdout())
		e.SetIndent("", "  ")
		return e.Encode(v)
	}
	w := tabwriter.NewWriter(cmd.OutOrStdout(), 0, 0, 2, ' ', 0)
	fmt.Fprintf(w, "%s\t%s\njob\t%s\nclass\t%s\n", verdict(v), why(v), v.Job, v.Class)
	showSide(w, "first", v.First)
	showSide(w, "second", v.Second)
	if v.SameAccount {
		fmt.Fprint(w, "note\tboth nodes belong to one account: what they agree on says less\n")
	}
	for _, f := range v.Findings {
		fmt.Fprintf(w, "finding\tnode %s %s\n", f.Node.Hex(), f.Text)
	}
	return w.Flush()
}

func verdict(v *network.Replay) string {
	return strings.ToUpper(strings.ReplaceAll(string(v.Verdict), "_", " "))
}

func why(v *network.Replay) string {
	if v.Difference != nil {
		return v.Difference.String()
	}
	return v.Reason
}

// beside sums up for the list what came up beside the verdict.
func beside(v *network.Replay) string {
	var s string
	if v.SameAccount {
		s = "; both of one account"
	}
	for _, f := range v.Findings {
		s += "; node " + f.Node.Hex() + " " + f.Text
	}
	return s
}

// showSide prints what a node has signed.
func showSide(w io.Writer, name string, s *receipt.Signed) {
	if s == nil {
		return
	}
	r := s.Receipt()
	fmt.Fprintf(w, "%s\tnode %s signed, as job %s,\n\tresponse %s,\n\t%d prompt and %d completion tokens\n", name, r.Node.Hex(), r.Job, r.Measured.ResponseHash, r.Claimed.PromptTokens, r.Claimed.CompletionTokens)
}

func replaysCommand() *cobra.Command {
	return adminCommand("replays", "Show what came of replays in the last 30 days; --json has both receipts of each", 0, func(cmd *cobra.Command, a network.Admin, _ []string) (any, func(io.Writer), error) {
		list, err := a.Replays(cmd.Context())
		return list, func(w io.Writer) {
			fmt.Fprintln(w, "TIME\tJOB\tVERDICT\tFIRST NODE\tSECOND NODE\tDIFFERENCE")
			for i := range list {
				v := &list[i]
				second := ""
				if v.Second != nil {
					second = v.Second.Receipt().Node.Hex()
				}
				fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\n", when(v.At.UnixMilli()), v.Job, verdict(v), v.First.Receipt().Node.Hex(), second, strings.TrimPrefix(why(v)+beside(v), "; "))
			}
		}, err
	})
}
