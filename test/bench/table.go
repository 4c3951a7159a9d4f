package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"text/tabwriter"

	"golang.org/x/sys/unix"
)

// table is what one measurement found.
type table struct {
	Name     string `json:"name"`
	Measured string `json:"measured"` // what, and how
	On       string `json:"on"`       // machine and its load at the start
	Rows     []row  `json:"rows"`
}

type row struct {
	Name   string  `json:"name"`
	Unit   string  `json:"unit"`
	Rounds int     `json:"rounds"`
	Median float64 `json:"median"`
	Min    float64 `json:"min"`
	Goal   goal    `json:"goal,omitzero"`
	Met    *bool   `json:"met,omitempty"` // absent without a goal
}

// goal is what the median should reach.
type goal struct {
	Sense string  `json:"sense"` // ≤ or ≥
	Value float64 `json:"value"`
}

func atMost(v float64) goal  { return goal{"≤", v} }
func atLeast(v float64) goal { return goal{"≥", v} }

// add makes a row of one sample a round.
func (t *table) add(name, unit string, samples []float64, g ...goal) {
	s := slices.Sorted(slices.Values(samples))
	r := row{Name: name, Unit: unit, Rounds: len(s), Median: s[len(s)/2], Min: s[0]}
	if len(s)%2 == 0 {
		r.Median = (s[len(s)/2-1] + s[len(s)/2]) / 2
	}
	if len(g) > 0 {
		met := g[0].Sense == "≤" && r.Median <= g[0].Value || g[0].Sense == "≥" && r.Median >= g[0].Value
		r.Goal, r.Met = g[0], &met
	}
	t.Rows = append(t.Rows, r)
}

// paired makes a list of f of the pairs of a and b: what was measured in one
// round is compared in that round.
func paired(a, b []float64, f func(a, b float64) float64) []float64 {
	out := make([]float64, len(a))
	for i := range a {
		out[i] = f(a[i], b[i])
	}
	return out
}

func minus(a, b float64) float64 { return a - b }
func over(a, b float64) float64  { return a / b }

func (t *table) print(w io.Writer) error {
	fmt.Fprintf(w, "\n%s: %s\n(%s)\n", t.Name, t.Measured, t.On)
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(tw, "  what\tmedian\tmin\tunit\trounds\tgoal\tmet")
	for _, r := range t.Rows {
		aim, met := "", ""
		if r.Met != nil {
			aim, met = r.Goal.Sense+" "+number(r.Goal.Value), map[bool]string{true: "yes", false: "NO"}[*r.Met]
		}
		fmt.Fprintf(tw, "  %s\t%s\t%s\t%s\t%d\t%s\t%s\n", r.Name, number(r.Median), number(r.Min), r.Unit, r.Rounds, aim, met)
	}
	return tw.Flush()
}

// number prints three digits that count.
func number(v float64) string {
	switch {
	case v >= 100 || v <= -100 || v == float64(int64(v)):
		return fmt.Sprintf("%.0f", v)
	case v >= 10 || v <= -10:
		return fmt.Sprintf("%.1f", v)
	}
	return fmt.Sprintf("%.2f", v)
}

func (t *table) write(dir string) error {
	raw, err := json.MarshalIndent(t, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, t.Name+".json"), append(raw, '\n'), 0o644)
}

// machine describes where and beside what else this runs.
func machine() string {
	model := runtime.GOARCH
	if info, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		if _, after, ok := strings.Cut(string(info), "model name"); ok {
			line, _, _ := strings.Cut(after, "\n")
			model = strings.TrimSpace(strings.TrimLeft(line, "\t: "))
		}
	}
	load := "unknown"
	if l, err := os.ReadFile("/proc/loadavg"); err == nil {
		load, _, _ = strings.Cut(string(l), " ")
	}
	var u unix.Utsname
	_ = unix.Uname(&u) // what is missing prints as nothing
	return fmt.Sprintf("%d cores of %s, Linux %s, load %s at the start", runtime.NumCPU(), model, unix.ByteSliceToString(u.Release[:]), load)
}
