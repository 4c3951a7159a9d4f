// Command attack runs the tests that play somebody hostile and prints one table
// of their cases: what was expected, and what came.
//
//	attack [-hosts]
//
// Which tests these are is in cases.txt. With -hosts, those that boot hosts run,
// too; that takes root and minutes. A case that failed, or that did not run, makes
// the exit status 1.
package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	_ "embed"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"
	"unicode/utf8"

	"golang.org/x/sync/errgroup"
)

//go:embed cases.txt
var cases string

// suite is one line of cases.txt.
type suite struct {
	who       string // who attacks
	pkg, test string
	shows     string // what each of its cases shows
	hosts     bool
}

var line = regexp.MustCompile(`^(hosts )?((?:internal|test)/\S+) (Test\w+): (.+)$`)

func parse(text string) (suites []suite, err error) {
	who := ""
	for l := range strings.Lines(text) {
		l = strings.TrimSpace(l)
		if name, ok := strings.CutPrefix(l, "## "); ok {
			who = name
		} else if m := line.FindStringSubmatch(l); m != nil {
			suites = append(suites, suite{who, m[2], m[3], m[4], m[1] != ""})
		} else if l != "" && !strings.HasPrefix(l, "#") {
			return nil, fmt.Errorf("cases.txt: %q is no line of it", l)
		}
	}
	return suites, nil
}

// row is one case of the table.
type row struct {
	name, expected, got string
	failed              bool
	output              string // of a case that failed
}

// event is what `go test -json` says; see `go doc test2json`.
type event struct {
	Action, Test, Output string
}

// results are the events of one package's tests, put together.
type results struct {
	order  []string          // tests as they began
	ended  map[string]string // test → pass, fail, skip
	output map[string]string // test → what it wrote; "" is the package
}

func read(r io.Reader) (*results, error) {
	res := &results{ended: map[string]string{}, output: map[string]string{}}
	for dec := json.NewDecoder(r); ; {
		var e event
		if err := dec.Decode(&e); errors.Is(err, io.EOF) {
			return res, nil
		} else if err != nil {
			return res, err
		}
		switch e.Action {
		case "run":
			res.order = append(res.order, e.Test)
		case "pass", "fail", "skip":
			res.ended[e.Test] = e.Action
		case "output", "build-output":
			res.output[e.Test] += e.Output
		}
	}
}

// said is the line that a case logs about itself. A test that has several cases
// without a subtest for each writes the case's name before it.
var said = regexp.MustCompile(`(?m)^ *\w+\.go:\d+: (?:(.+?): )??expected:? (.+?); got:? (.+)$`)

// rows makes the rows of a suite, by name: many tests keep their cases in a map, and
// run them in another order each time. What a case got is its own word, so one that
// passes and says nothing is no case: nobody could see what it has shown. A test with
// subtests need not be a case itself, unless it fails while they do not.
func (res *results) rows(s suite) (rows []row) {
	for _, name := range res.order {
		if name != s.test && !strings.HasPrefix(name, s.test+"/") {
			continue
		}
		below := func(other string) bool { return strings.HasPrefix(other, name+"/") }
		parent := slices.ContainsFunc(res.order, below)
		if parent && slices.ContainsFunc(res.order, func(other string) bool { return below(other) && res.ended[other] != "pass" }) {
			continue // they say it
		}
		title, words := s.pkg+" "+strings.ReplaceAll(name, "_", " "), said.FindAllStringSubmatch(res.output[name], -1)
		r := row{name: title, expected: s.shows, output: res.output[name], failed: true}
		switch {
		case res.ended[name] == "skip":
			r.got = "NOT RUN"
		case res.ended[name] != "pass": // a panic or an end of time leaves none
			r.got = "NOT SO"
		case parent && words == nil:
			continue
		case words == nil:
			r.got = "NOT SAID"
		}
		if r.got != "" {
			rows = append(rows, r)
			continue
		}
		for _, m := range words {
			r := row{name: title, expected: m[2], got: m[3]}
			if m[1] != "" {
				r.name += "/" + m[1]
			}
			rows = append(rows, r)
		}
	}
	slices.SortStableFunc(rows, func(a, b row) int { return strings.Compare(a.name, b.name) })
	if len(rows) == 0 {
		rows = []row{{name: s.pkg + " " + s.test, expected: s.shows, got: "NOT RUN", failed: true, output: res.output[""]}}
	}
	return rows
}

// run runs the suites of one package.
func run(ctx context.Context, pkg string, suites []suite, within time.Duration) (*results, error) {
	var names []string
	for _, s := range suites {
		names = append(names, s.test)
	}
	cmd := exec.CommandContext(ctx, "go", "test", "-json", "-count=1", "-timeout="+within.String(), "-run", "^("+strings.Join(names, "|")+")$", "./"+pkg)
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGINT) }
	cmd.WaitDelay = 30 * time.Second
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	res, err := read(bufio.NewReader(out))
	_, _ = io.Copy(io.Discard, out)
	_ = cmd.Wait() // the cases say it in detail
	res.output[""] += stderr.String()
	return res, err
}

func main() {
	hosts := flag.Bool("hosts", false, "also the tests that boot hosts (needs root)")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	failed, err := attack(ctx, *hosts)
	if err != nil {
		fmt.Fprintln(os.Stderr, "attack:", err)
	}
	if err != nil || failed {
		os.Exit(1)
	}
}

func attack(ctx context.Context, hosts bool) (failed bool, err error) {
	all, err := parse(cases)
	if err != nil {
		return false, err
	}
	if hosts && os.Geteuid() != 0 {
		return false, errors.New("hosts need root")
	}
	// What runs on hosts comes last, one after the other.
	type part struct {
		pkg   string
		hosts bool
	}
	parts := map[part][]suite{}
	var order []part
	left := 0
	for _, s := range all {
		if s.hosts && !hosts {
			left++
			continue
		}
		p := part{s.pkg, s.hosts}
		if parts[p] == nil {
			order = append(order, p)
		}
		parts[p] = append(parts[p], s)
	}
	found := make([]*results, len(order))
	for _, onHosts := range []bool{false, true} {
		var g errgroup.Group
		g.SetLimit(runtime.NumCPU())
		within := 20 * time.Minute
		if onHosts {
			g.SetLimit(1)
			within = 45 * time.Minute
		}
		for i, p := range order {
			if p.hosts != onHosts {
				continue
			}
			g.Go(func() (err error) {
				begin := time.Now()
				if found[i], err = run(ctx, p.pkg, parts[p], within); err != nil {
					return fmt.Errorf("%s: %w", p.pkg, err)
				}
				n, bad := 0, 0
				for _, s := range parts[p] {
					for _, r := range found[i].rows(s) {
						n++
						if r.failed {
							bad++
						}
					}
				}
				fmt.Fprintf(os.Stderr, "attack: %s: %d cases, %d failed, %v\n", p.pkg, n, bad, time.Since(begin).Round(100*time.Millisecond))
				return nil
			})
		}
		if err := g.Wait(); err != nil {
			return false, err
		}
	}
	if err := ctx.Err(); err != nil {
		return false, err
	}

	var outputs strings.Builder
	n, bad := 0, 0
	for _, who := range attackers(all) {
		rows := []row{{name: "CASE", expected: "EXPECTED", got: "GOT"}}
		for _, s := range all {
			if s.who != who || s.hosts && !hosts {
				continue
			}
			rows = append(rows, found[slices.Index(order, part{s.pkg, s.hosts})].rows(s)...)
		}
		fmt.Printf("\n%s\n", strings.ToUpper(who[:1])+who[1:])
		n += len(rows) - 1
		for _, r := range rows {
			fmt.Printf("  %s  %s  %s\n", pad(r.name, width(rows, func(r row) string { return r.name })), pad(r.expected, width(rows, func(r row) string { return r.expected })), r.got)
			if r.failed {
				bad++
				fmt.Fprintf(&outputs, "\n%s\n%s", r.name, cmp.Or(r.output, "no output\n"))
			}
		}
	}
	fmt.Print(outputs.String())
	fmt.Printf("\nattack: %d cases, %d failed\n", n, bad)
	if left > 0 {
		fmt.Printf("attack: %d tests that boot hosts are left out; -hosts runs them\n", left)
	}
	return bad > 0, nil
}

func attackers(suites []suite) (list []string) {
	for _, s := range suites {
		if !slices.Contains(list, s.who) {
			list = append(list, s.who)
		}
	}
	return list
}

// width is that of a column. Single long cells do not push all the others away.
func width(rows []row, cell func(row) string) (w int) {
	for _, r := range rows {
		w = max(w, utf8.RuneCountInString(cell(r)))
	}
	return min(w, 80)
}

func pad(s string, w int) string {
	return s + strings.Repeat(" ", max(0, w-utf8.RuneCountInString(s)))
}
