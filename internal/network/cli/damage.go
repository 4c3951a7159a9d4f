package cli

import (
	"cmp"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/resultity/node/internal/network"
)

func damageCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "damage", Short: "Records of the store that a failing disk or memory has cost"}
	list := adminCommand("list", "List the lost records, and what there is to be done", 0, func(cmd *cobra.Command, a network.Admin, _ []string) (any, func(io.Writer), error) {
		lost, err := a.Lost(cmd.Context())
		return lost, func(w io.Writer) {
			fmt.Fprintln(w, "ID\tFOUND\tSUBJECT\tBYTES\tWAITS FOR YOU")
			for _, l := range lost {
				waits := "no"
				if l.Waits {
					waits = "yes"
				}
				fmt.Fprintf(w, "%s\t%s\t%s\t%d\t%s\n", l.ID, when(l.Found.UnixMilli()), cmp.Or(l.Subject, "(cannot be read)"), l.Size, waits)
			}
			said := map[string]bool{}
			for _, l := range lost {
				if !said[l.Stream] {
					said[l.Stream] = true
					fmt.Fprintf(w, "\n%s: %s\n", l.Stream, l.Means)
				}
			}
		}, err
	})
	forget := adminCommand("forget ID", "Have a lost record be one that never was; what is left of its bytes goes too", 1, func(cmd *cobra.Command, a network.Admin, args []string) (any, func(io.Writer), error) {
		_, err := a.ForgetLost(cmd.Context(), args[0])
		return struct{}{}, func(w io.Writer) { fmt.Fprintln(w, "forgotten", args[0]) }, err
	})
	cmd.AddCommand(list, forget)
	return cmd
}
