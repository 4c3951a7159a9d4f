package ctl

import (
	"context"
	"errors"
	"fmt"
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
	return c.show(s, func(w *tabwriter.Writer) {
		c.answer(w, s)
		fmt.Fprintln(w)
		if s.Node != "" {
			fmt.Fprintf(w, "node\t%s\nnetwork\t%s\n", s.Node, s.Network)
		}
		if s.Snapshot != nil {
			fmt.Fprintf(w, "configuration\tversion %d, %s, expires %s\n", s.Snapshot.Version, s.Snapshot.Digest, s.Snapshot.Expires.Format(time.RFC3339))
		}
		if s.Node != "" {
			fmt.Fprintf(w, "jobs\t%d of %d slots busy, %d results to deliver; last day: %d done, %d failed", s.Busy, s.Slots, s.Outbox, s.Done, s.Failed)
			if s.LastJob != nil {
				fmt.Fprintf(w, "; last one %s ago", ago(*s.LastJob))
			}
			fmt.Fprint(w, "\n\n")
		}
		var rest []string
		for _, g := range s.Gates {
			mark := g.State.String()
			switch {
			case g.Detail == agentOnly:
				rest = append(rest, g.Name)
				continue
			case g.State == gate.Closed:
				mark = "CLOSED"
			}
			fmt.Fprintf(w, "%s\t%s\t%s\n", g.Name, mark, short(line(g.Detail)))
		}
		if len(rest) > 0 {
			fmt.Fprintf(w, "\nNot looked at, since %s: %s.\n", agentOnly, strings.Join(rest, ", "))
		}
		if l := s.Logs; l.Upload == "on" {
			fmt.Fprintf(w, "\nlog\tuploaded up to record %d; %d wait, %d were dropped\n", l.Uploaded, l.Waiting, l.Dropped)
			if l.Error != "" {
				fmt.Fprintf(w, "\t%s\n", line(l.Error))
			}
		}
		c.showOrders(w, s)
		if s.Version != "" && s.Version != c.version {
			fmt.Fprintf(w, "\nThe agent is %s and resultityctl %s: restart the agent to finish an upgrade.\n", line(s.Version), c.version)
		}
	})
}

// showOrders shows what the network has ordered, and its penalty.
func (c *command) showOrders(w *tabwriter.Writer, s *control.Status) {
	if p := s.Penalty; p != nil {
		fmt.Fprintf(w, "\nPenalised by the network until %s: %s\n", p.Until.Format(time.RFC3339), line(p.Reason))
	}
	if len(s.Orders) > 0 {
		fmt.Fprintln(w, "\nThe network's last orders:")
	}
	for _, o := range s.Orders {
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

// answer says in at most two lines why there are no jobs, or that there are.
func (c *command) answer(w *tabwriter.Writer, s *control.Status) {
	closed := s.Closed()
	if closed == nil {
		if s.GetsJobs() {
			fmt.Fprintln(w, "The network sends jobs to this node.")
		} else {
			fmt.Fprintln(w, "No gate is closed, but not all could be looked at.")
		}
		return
	}
	begin := "No jobs, because"
	if s.GetsJobs() {
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
func ago(t time.Time) string {
	d := max(0, time.Since(t))
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
