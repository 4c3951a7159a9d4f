package cli

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/spf13/cobra"

	"github.com/resultity/node/internal/evm"
	"github.com/resultity/node/internal/network"
)

func logsCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use: "logs", Short: "Show what nodes have uploaded of their logs", Args: exactly(0),
		Long: "Show what nodes have uploaded of their logs: those of one node, about one job, or\nall. 64 batches of each node are kept, for 30 days at most. Lines come in the order\nin which the network got them. Nothing in them is text of a request or an answer.",
	}
	dir := dirFlag(cmd)
	node := cmd.Flags().String("node", "", "only those of the node of this address")
	var q network.LogQuery
	cmd.Flags().StringVar(&q.Job, "job", "", "only those about the job of this id")
	since := cmd.Flags().Duration("since", 0, "only those not older than this, as 1h")
	asJSON := cmd.Flags().Bool("json", false, "print a line of JSON for each record")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		d, err := dir()
		if err != nil {
			return err
		}
		if *node != "" {
			a, err := evm.ParseAddress(*node)
			if err != nil {
				return fmt.Errorf("%w: %w", errUsage, err)
			}
			q.Node = &a
		}
		if *since > 0 {
			q.Since = time.Now().Add(-*since)
		}
		out := cmd.OutOrStdout()
		e := json.NewEncoder(out)
		return withAdmin(cmd, d, func(a network.Admin) error {
			return a.Logs(cmd.Context(), q, func(l network.LogLine) error {
				if *asJSON {
					return e.Encode(l)
				}
				_, err := fmt.Fprintln(out, logText(l))
				return err
			})
		})
	}
	return cmd
}

// logText is a line for people. Whatever is in it has been found printable.
func logText(l network.LogLine) string {
	at := time.UnixMilli(l.Time).UTC().Format("2006-01-02T15:04:05.000Z")
	if l.Dropped > 0 {
		return fmt.Sprintf("%s %s (%d records were dropped before %d)", at, l.Node.Hex(), l.Dropped, l.Position)
	}
	s := fmt.Sprintf("%s %s %s %s", at, l.Node.Hex(), l.Level, l.Message)
	if l.Event != "" {
		s += " event=" + l.Event
	}
	for _, k := range slices.Sorted(maps.Keys(l.Fields)) {
		s += fmt.Sprintf(" %s=%q", k, l.Fields[k])
	}
	return s
}
