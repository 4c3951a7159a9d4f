package ctl

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/resultity/node/internal/control"
	"github.com/resultity/node/internal/gate"
)

func (c *command) status(ctx context.Context, _ []string) error {
	var s control.Status
	err := c.client().Get(ctx, "status", &s)
	if errors.Is(err, control.ErrNotRunning) {
		s = c.lookOffline(ctx)
		if err := c.showStatus(&s); err != nil {
			return err
		}
		return exitError(ExitDown)
	}
	if err == nil {
		err = c.showStatus(&s)
	}
	if err == nil && s.Closed() != nil {
		return exitError(ExitClosed)
	}
	return err
}

// showStatus begins with the answer, and ends with where it comes from.
func (c *command) showStatus(s *control.Status) error {
	if c.network != "" {
		if s.Node != "" && s.Of(c.network) == nil {
			return fmt.Errorf("this node is not in network %.64q", c.network)
		}
		s.Keep(c.network)
	}
	return c.show(s, func(w *tabwriter.Writer) {
		c.answer(w, s)
		fmt.Fprintln(w)
		if s.Node != "" {
			fmt.Fprintf(w, "node\t%s\n", s.Node)
		}
		for i := range s.Networks {
			showNetwork(w, &s.Networks[i], len(s.Networks) > 1)
		}
		fmt.Fprintln(w)
		var rest []string
		of := ""
		for _, g := range s.Gates {
			mark := g.State.String()
			switch {
			case g.Detail == agentOnly:
				rest = append(rest, g.Name)
				continue
			case g.State == gate.Closed:
				mark = "CLOSED"
			}
			if g.Network != of && len(s.Networks) > 1 {
				fmt.Fprintf(w, "\nof %s:\n", g.Network)
			}
			of = g.Network
			fmt.Fprintf(w, "%s\t%s\t%s\n", g.Name, mark, short(line(g.Detail)))
		}
		if len(rest) > 0 {
			fmt.Fprintf(w, "\nNot looked at, since %s: %s.\n", agentOnly, strings.Join(rest, ", "))
		}
		for i := range s.Networks {
			showOrders(w, &s.Networks[i])
		}
		if s.Version != "" && s.Version != c.version {
			fmt.Fprintf(w, "\nThe agent is %s and resultityctl %s: restart the agent to finish an upgrade.\n", line(s.Version), c.version)
		}
	})
}

// showNetwork shows the node's part in a network in a few lines.
func showNetwork(w *tabwriter.Writer, n *control.Network, several bool) {
	fmt.Fprintf(w, "network\t%s", n.Name)
	if several {
		fmt.Fprintf(w, ", priority %d, runtime %s", n.Priority, n.Runtime.State)
	}
	fmt.Fprintln(w)
	if n.Snapshot != nil {
		fmt.Fprintf(w, "configuration\tversion %d, %s, expires %s\n", n.Snapshot.Version, n.Snapshot.Digest, n.Snapshot.Expires.Format(time.RFC3339))
	}
	if n.Class != nil {
		fmt.Fprintf(w, "class\t%s, %s\n", n.Class.Digest.Short(), &n.Class.Hardware)
	}
	if v := n.Validation; v != nil {
		result := "passed"
		if !v.Passed {
			result = "FAILED"
		}
		fmt.Fprintf(w, "validation\t%s %s ago (%s)", result, ago(v.At), v.Cause)
		if v.Next != nil {
			fmt.Fprintf(w, "; the next in %s", span(time.Until(*v.Next)))
		}
		fmt.Fprintln(w)
	}
	if n.Sandbox != nil {
		fmt.Fprintf(w, "sandbox\t%s, made %s", n.Sandbox.Record.Short(), n.Sandbox.Made.Format(time.RFC3339))
		if !n.Sandbox.Looked.IsZero() {
			fmt.Fprintf(w, ", looked at again %s", n.Sandbox.Looked.Format(time.RFC3339))
		}
		fmt.Fprintln(w)
	}
	fmt.Fprintf(w, "jobs\t%d of %d slots busy", n.Busy, n.Slots)
	if n.Taken > 0 {
		fmt.Fprintf(w, ", %d with or for other networks", n.Taken)
	}
	fmt.Fprintf(w, ", %d results to deliver; last day: %d done, %d failed", n.Outbox, n.Done, n.Failed)
	if n.LastJob != nil {
		fmt.Fprintf(w, "; last one %s ago", ago(*n.LastJob))
	}
	fmt.Fprintln(w)
	if l := n.ReceiptLog; l != nil {
		fmt.Fprintf(w, "receipts\t%d in the log, of which the network has %d; root %s\n", l.Size, l.Acked, l.Root)
	}
	if d := n.Damage; d != nil {
		fmt.Fprintf(w, "store\tdamaged when the agent started: %d places mended, %d jobs lost, %d receipts lost; look at this machine's disk\n", d.Mended, len(d.Lost), d.Receipts)
		if d.Before != nil {
			fmt.Fprintf(w, "\tother jobs made before %s may be lost, too\n", d.Before.Format(time.RFC3339))
		}
		for _, name := range d.Kept {
			fmt.Fprintf(w, "\tkept as it was found: %s\n", line(name))
		}
		if d.Unsolved != "" {
			fmt.Fprintf(w, "\tnot put right yet; make room and restart the agent: %s\n", line(d.Unsolved))
		}
	}
	if l := n.Logs; l.Upload == "on" {
		fmt.Fprintf(w, "log\tuploaded up to record %d; %d wait, %d were dropped\n", l.Uploaded, l.Waiting, l.Dropped)
		if l.Error != "" {
			fmt.Fprintf(w, "\t%s\n", line(l.Error))
		}
	}
}

// showOrders shows what a network has ordered, and its penalty.
func showOrders(w *tabwriter.Writer, n *control.Network) {
	if p := n.Penalty; p != nil {
		fmt.Fprintf(w, "\nPenalised by %s until %s: %s\n", n.Name, p.Until.Format(time.RFC3339), line(p.Reason))
	}
	if len(n.Orders) > 0 {
		fmt.Fprintf(w, "\nThe last orders of %s:\n", n.Name)
	}
	for _, o := range n.Orders {
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\n", o.Issued.Format(time.RFC3339), o.Kind, o.Outcome, line(o.Reason+" "+o.Message))
	}
}

// short cuts what stands in full in the first lines, or in the JSON.
func short(s string) string {
	const most = 120
	if r := []rune(s); len(r) > most {
		return string(r[:most]) + "…"
	}
	return s
}

// answer says in at most two lines why there are no jobs, or that there are; with
// several networks, in as many for each whose jobs do not come.
func (c *command) answer(w *tabwriter.Writer, s *control.Status) {
	sending := []string{}
	for _, n := range s.Networks {
		one := *s
		one.Gates = slices.Clone(s.Gates)
		one.Networks = slices.Clone(s.Networks)
		if one.Keep(n.Name); one.GetsJobs() {
			sending = append(sending, n.Name)
		}
	}
	if len(s.Networks) < 2 || len(sending) == 0 {
		why(w, s.Closed(), s.GetsJobs(), "")
		return
	}
	fmt.Fprintf(w, "Jobs come from %s.\n", strings.Join(sending, " and "))
	told := map[string]bool{}
	for i := range s.Gates {
		g := &s.Gates[i]
		if g.State == gate.Closed && !told[g.Network] {
			told[g.Network] = true
			why(w, g, slices.Contains(sending, g.Network) || g.Network == "", g.Network)
		}
	}
}

// why says what a closed gate means; nil is none.
func why(w *tabwriter.Writer, closed *gate.Gate, jobs bool, network string) {
	if closed == nil {
		if jobs {
			fmt.Fprintln(w, "The network sends jobs to this node.")
		} else {
			fmt.Fprintln(w, "No gate is closed, but not all could be looked at.")
		}
		return
	}
	begin := "No jobs, because"
	switch {
	case network != "" && !jobs:
		begin = "No jobs of " + network + ", because"
	case jobs:
		begin = "The network sends jobs to this node, but"
	}
	since := ""
	if closed.Since != nil {
		since = " for " + ago(*closed.Since)
	}
	fmt.Fprintf(w, "%s %q is closed%s: %s\n", begin, closed.Name, since, line(closed.Detail))
	if closed.Remedy != "" {
		fmt.Fprintf(w, "What to do: %s\n", line(closed.Remedy))
	}
}

// ago is how long something is past, for people.
func ago(t time.Time) string { return span(time.Since(t)) }

// span is a length of time for people.
func span(d time.Duration) string {
	d = max(0, d)
	switch {
	case d < time.Minute:
		return fmt.Sprintf("%d s", d/time.Second)
	case d < 2*time.Hour:
		return fmt.Sprintf("%d min", d/time.Minute)
	case d < 48*time.Hour:
		return fmt.Sprintf("%d h", d/time.Hour)
	}
	return fmt.Sprintf("%d days", d/(24*time.Hour))
}
