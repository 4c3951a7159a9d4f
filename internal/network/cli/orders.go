package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/resultity/node/internal/evm"
	"github.com/resultity/node/internal/network"
	"github.com/resultity/node/internal/network/orders"
	"github.com/resultity/node/internal/wire"
)

func orderCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use: "order NODE|all KIND", Short: "Order a node, or all, to do something", Args: exactly(2),
		Long: "Order a node (by address), or all registered ones, to do something. KIND is one of\n\n" +
			"  drain       take no new jobs\n" +
			"  resume      take back a drain of the network's; an operator's own stays\n" +
			"  restart     restart the runtime, once its jobs are done, and validate it\n" +
			"  revalidate  hash the model's files again and repeat the golden requests\n" +
			"  logs        upload the log now\n" +
			"  shutdown    finish the jobs, stop the runtime and end\n" +
			"  penalty     tell the operator why the node gets fewer jobs or none, and until when\n\n" +
			"An order is signed, written down, and given to its node until that has answered\nor the order has expired.",
	}
	dir := dirFlag(cmd)
	var w orders.What
	cmd.Flags().StringVar(&w.Reason, "reason", "", "one line for the node's operator")
	cmd.Flags().DurationVar(&w.Life, "expires", 24*time.Hour, "how long the node may take to begin")
	lasts := cmd.Flags().Duration("for", 0, "how long a penalty lasts")
	wait := cmd.Flags().Bool("wait", false, "wait for the answers; fail if one is not ok")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		d, err := dir()
		if err != nil {
			return err
		}
		var node *evm.Address
		if args[0] != "all" {
			a, err := evm.ParseAddress(args[0])
			if err != nil {
				return fmt.Errorf("%w: %w", errUsage, err)
			}
			node = &a
		}
		w.Kind = wire.OrderKind(args[1])
		if *lasts != 0 {
			w.Until = time.Now().Add(*lasts)
		}
		if err := w.Check(time.Now()); err != nil {
			return fmt.Errorf("%w: %w", errUsage, err)
		}
		return withAdmin(cmd, d, func(a network.Admin) error {
			ids, err := a.IssueOrders(cmd.Context(), node, w)
			for _, id := range ids {
				fmt.Fprintln(cmd.OutOrStdout(), id)
			}
			if err != nil || !*wait {
				return err
			}
			return waitFor(cmd.Context(), cmd, a, ids)
		})
	}
	return cmd
}

func waitFor(ctx context.Context, cmd *cobra.Command, a network.Admin, ids []wire.OrderID) error {
	if err := a.WaitOrders(ctx, ids); err != nil {
		return err
	}
	list, err := a.Orders(ctx)
	if err != nil {
		return err
	}
	list = slices.DeleteFunc(list, func(o network.OrderState) bool { return !slices.Contains(ids, o.ID) })
	if err := showOrders(cmd, list); err != nil {
		return err
	}
	if i := slices.IndexFunc(list, func(o network.OrderState) bool { return o.State != string(wire.OutcomeOK) }); i >= 0 {
		return errors.New("not every order was carried out")
	}
	return nil
}

func ordersCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "orders", Short: "Show the orders of the last 30 days and what became of them", Args: exactly(0)}
	dir := dirFlag(cmd)
	node := cmd.Flags().String("node", "", "only those to the node of this address")
	asJSON := cmd.Flags().Bool("json", false, "print JSON, with the signed orders")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		d, err := dir()
		if err != nil {
			return err
		}
		return withAdmin(cmd, d, func(a network.Admin) error {
			list, err := a.Orders(cmd.Context())
			if err != nil {
				return err
			}
			if *node != "" {
				list = slices.DeleteFunc(list, func(o network.OrderState) bool { return !strings.EqualFold(o.Node.Hex(), *node) })
			}
			if *asJSON {
				e := json.NewEncoder(cmd.OutOrStdout())
				e.SetIndent("", "  ")
				return e.Encode(list)
			}
			return showOrders(cmd, list)
		})
	}
	return cmd
}

func showOrders(cmd *cobra.Command, list []network.OrderState) error {
	w := tabwriter.NewWriter(cmd.OutOrStdout(), 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "ISSUED\tNODE\tKIND\tSTATE\tID\tREASON, MESSAGE")
	for _, o := range list {
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\n", o.Issued.Format(time.RFC3339), o.Node.Hex(), o.Kind, o.State, o.ID, strings.TrimSpace(o.Reason+" "+o.Message))
	}
	return w.Flush()
}

// exactly is cobra.ExactArgs, and its look at required flags, with the exit status
// of a usage error.
func exactly(n int) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		err := cobra.ExactArgs(n)(cmd, args)
		if err == nil {
			err = cmd.ValidateRequiredFlags()
		}
		if err != nil {
			return fmt.Errorf("%w: %w; see %s --help", errUsage, err, cmd.CommandPath())
		}
		return nil
	}
}
