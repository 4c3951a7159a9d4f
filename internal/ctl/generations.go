package ctl

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/resultity/node/internal/control"
)

// generations is the command of that name, with those below it.
func (c *command) generations(add adder) *cobra.Command {
	g := add("generations", "Show what this node has been, and go back", cobra.NoArgs, c.listGenerations)
	g.Long = `Each configuration that the node was brought to is a generation: configuration,
image, models and unit, complete on disk. A new one that does not become healthy
is left for the one before by itself.`
	for _, sub := range []*cobra.Command{
		add("list", "List the generations that are kept", cobra.NoArgs, c.listGenerations),
		add("show [N]", "Show one, the current one without N: what it is and how its switch went", cobra.MaximumNArgs(1), c.showGeneration),
		add("diff A B", "Show what changed between two", cobra.ExactArgs(2), c.diffGenerations),
		add("rollback [N]", "Make an older healthy one current (the one before without N), until the network has another configuration", cobra.MaximumNArgs(1), c.rollback),
		add("forward", "Take up the network's configuration again: after a rollback, or once more when it is dead", cobra.NoArgs, c.forward),
	} {
		g.AddCommand(sub)
	}
	return g
}

// adder makes a command whose wrong arguments are a wrong usage.
type adder func(use, short string, args cobra.PositionalArgs, run func(context.Context, []string) error) *cobra.Command

func (c *command) listGenerations(ctx context.Context, _ []string) error {
	var gs control.Generations
	if err := c.client().Get(ctx, "generations", &gs); err != nil {
		return err
	}
	return c.show(gs, func(w *tabwriter.Writer) {
		fmt.Fprintln(w, "\tN\tNETWORK\tSTATE\tSINCE\tVERSION\tIMAGE\tMODELS\tSWITCH\tREASON")
		for i := range gs.Generations {
			g := &gs.Generations[i]
			mark := ""
			switch g.Number {
			case gs.Current:
				mark = "*"
			case gs.Order:
				mark = ">"
			}
			var models []string
			for _, m := range g.Models {
				models = append(models, m.Name+" "+m.Version)
			}
			reason := line(g.Reason)
			if g.Step != "" {
				reason = g.Step + ": " + reason
			}
			fmt.Fprintf(w, "%s\t%d\t%s\t%s\t%s\t%d\t%s\t%s\t%s\t%s\n", mark, g.Number, g.Network, g.State, g.Since.Format(time.DateTime), g.Version,
				shortImage(g.Image), strings.Join(models, ", "), outage(g), clip(reason, 100))
		}
		if gs.PutAside != "" {
			fmt.Fprintf(w, "\nPinned: configuration %s of %s is put aside. %s\n", gs.PutAside, cmp.Or(gs.PutAsideOf, "the network"), unpin)
		}
	})
}

const unpin = "resultityctl generations forward takes it up again."

// outage is how long nothing was served, as far as it was this switch's doing.
func outage(g *control.Generation) string {
	var ms int64
	for _, p := range g.Phases {
		if p.Name != "stage" && p.Name != "warm" {
			ms += p.TookMS
		}
	}
	if len(g.Phases) == 0 {
		return ""
	}
	return (time.Duration(ms) * time.Millisecond).String()
}

// shortImage leaves of a digest what people compare.
func shortImage(ref string) string {
	before, d, ok := strings.Cut(ref, "sha256:")
	if !ok {
		return ref
	}
	if i := strings.LastIndexByte(before, '/'); i >= 0 {
		before = before[i+1:]
	}
	return before + d[:min(len(d), 12)]
}

func clip(s string, most int) string {
	if len(s) > most {
		return s[:most] + "…"
	}
	return s
}

// generation asks for one; "0" is the current one.
func (c *command) generation(ctx context.Context, n string) (*control.Generation, error) {
	if _, err := strconv.ParseUint(n, 10, 31); err != nil {
		return nil, fmt.Errorf("%w: %.40q is no number of a generation", errUsage, n)
	}
	var g control.Generation
	err := c.client().Get(ctx, "generations/"+n, &g)
	return &g, err
}

func (c *command) showGeneration(ctx context.Context, args []string) error {
	g, err := c.generation(ctx, append(args, "0")[0])
	if err != nil {
		return err
	}
	if err := c.show(g, func(w *tabwriter.Writer) {
		fmt.Fprintf(w, "generation\t%d\nnetwork\t%s\nstate\t%s, since %s\n", g.Number, g.Network, g.State, g.Since.Format(time.RFC3339))
		if g.Step != "" {
			whose := "the configuration's"
			if g.Machine {
				whose = "this machine's: it is tried again"
			}
			fmt.Fprintf(w, "failed at\t%s\nreason\t%s\nfault\t%s\n", g.Step, line(g.Reason), whose)
		}
		fmt.Fprintf(w, "created\t%s\nconfiguration\tversion %d, %s\nengine\t%s\nimage\t%s\n", g.Created.Format(time.RFC3339), g.Version, g.Config, g.Engine, g.Image)
		for _, m := range g.Models {
			fmt.Fprintf(w, "model\t%s %s, %s\n", m.Name, m.Version, m.Digest)
		}
		fmt.Fprintf(w, "unit\t%s\n", g.Unit)
		for _, p := range g.Phases {
			fmt.Fprintf(w, "phase\t%s\t%d ms\n", p.Name, p.TookMS)
		}
	}); err != nil || c.json {
		return err
	}
	_, err = fmt.Fprintf(&printable{c.Out}, "\n%s", g.UnitText)
	return err
}

// change is one difference of two configurations.
type change struct {
	Field string `json:"field"`
	Old   string `json:"old"`
	New   string `json:"new"`
}

func (c *command) diffGenerations(ctx context.Context, args []string) error {
	a, err := c.generation(ctx, args[0])
	if err != nil {
		return err
	}
	b, err := c.generation(ctx, args[1])
	if err != nil {
		return err
	}
	changes, err := diff(a.Snapshot, b.Snapshot)
	if err != nil {
		return err
	}
	unit := diffLines(strings.Split(a.UnitText, "\n"), strings.Split(b.UnitText, "\n"))
	return c.show(map[string]any{"a": a.Number, "b": b.Number, "configuration": changes, "unit": unit}, func(w *tabwriter.Writer) {
		if len(changes) == 0 && len(unit) == 0 {
			fmt.Fprintln(w, "The two are the same.")
		}
		for _, d := range changes {
			fmt.Fprintf(w, "%s\t%s\t→ %s\n", d.Field, clip(line(d.Old), 90), clip(line(d.New), 90))
		}
		if len(unit) > 0 {
			fmt.Fprintln(w, "\nunit:")
		}
		for _, l := range unit {
			fmt.Fprintln(w, l)
		}
	})
}

// diff lists the fields that differ, by name.
func diff(a, b json.RawMessage) ([]change, error) {
	flat := [2]map[string]string{{}, {}}
	for i, raw := range []json.RawMessage{a, b} {
		var v any
		if len(raw) == 0 {
			continue
		}
		if err := json.Unmarshal(raw, &v); err != nil {
			return nil, err
		}
		flatten(flat[i], "", v)
	}
	changes := []change{}
	for k, v := range flat[0] {
		if flat[1][k] != v {
			changes = append(changes, change{k, v, flat[1][k]})
		}
	}
	for k, v := range flat[1] {
		if _, ok := flat[0][k]; !ok {
			changes = append(changes, change{k, "", v})
		}
	}
	slices.SortFunc(changes, func(x, y change) int { return cmp.Compare(x.Field, y.Field) })
	return changes, nil
}

func flatten(out map[string]string, at string, v any) {
	switch v := v.(type) {
	case map[string]any:
		for k, e := range v {
			flatten(out, strings.TrimPrefix(at+"."+k, "."), e)
		}
	case []any:
		for i, e := range v {
			flatten(out, fmt.Sprintf("%s[%d]", at, i), e)
		}
	default:
		raw, err := json.Marshal(v)
		if err != nil {
			raw = []byte("?") // it has been JSON a moment ago
		}
		out[at] = string(raw)
	}
}

// maxUnitLines bounds the work of comparing two units, which have some dozens.
const maxUnitLines = 1000

// diffLines lists the lines that only a has, with a minus, and those that only b
// has, with a plus, in order.
func diffLines(a, b []string) (out []string) {
	if max(len(a), len(b)) > maxUnitLines {
		a, b = a[:min(len(a), maxUnitLines)], b[:min(len(b), maxUnitLines)]
		defer func() { out = append(out, fmt.Sprintf("(the first %d lines are compared)", maxUnitLines)) }()
	}
	common := make([][]int, len(a)+1) // of a[i:] and b[j:]
	for i := range common {
		common[i] = make([]int, len(b)+1)
	}
	for i := len(a) - 1; i >= 0; i-- {
		for j := len(b) - 1; j >= 0; j-- {
			if a[i] == b[j] {
				common[i][j] = common[i+1][j+1] + 1
			} else {
				common[i][j] = max(common[i+1][j], common[i][j+1])
			}
		}
	}
	i, j := 0, 0
	for i < len(a) || j < len(b) {
		switch {
		case i < len(a) && j < len(b) && a[i] == b[j]:
			i, j = i+1, j+1
		case j == len(b) || i < len(a) && common[i+1][j] >= common[i][j+1]:
			out = append(out, "-"+a[i])
			i++
		default:
			out = append(out, "+"+b[j])
			j++
		}
	}
	return out
}

func (c *command) rollback(ctx context.Context, args []string) error {
	n := append(args, "0")[0]
	if _, err := strconv.ParseUint(n, 10, 31); err != nil {
		return fmt.Errorf("%w: %.40q is no number of a generation", errUsage, n)
	}
	var gs control.Generations
	if err := c.client().Post(ctx, "generations/"+n+"/rollback", &gs); err != nil {
		return err
	}
	if c.json {
		return c.show(gs, nil)
	}
	_, err := fmt.Fprintf(c.Out, `Going back to generation %d, which stays until the network has another configuration.
A node that is not on the network's configuration gets no jobs from it (config_mismatch).
%s
How it goes: resultityctl generations
`, cmp.Or(gs.Order, gs.Current), unpin)
	return err
}

func (c *command) forward(ctx context.Context, _ []string) error {
	var gs control.Generations
	if err := c.client().Post(ctx, "generations/forward", &gs); err != nil {
		return err
	}
	if c.json {
		return c.show(gs, nil)
	}
	_, err := fmt.Fprintln(c.Out, "Taking up the network's configuration. How it goes: resultityctl generations")
	return err
}

func (c *command) metrics(ctx context.Context, _ []string) error {
	text, err := c.client().Metrics(ctx)
	if err != nil {
		return err
	}
	_, err = (&printable{c.Out}).Write(text)
	return err
}
