// Command fuzz runs every fuzz target of the repository, one after the other.
//
//	fuzz [-for 5m | -for 2000x] [-blind] [-run REGEXP]
//
// Each gets a time, or, which takes as much work on every machine, a number of inputs.
// With -blind inputs are changed without a look at what they reach, which is a quick
// run for CI: to see that, everything would have to be built a second time.
//
// It finds them with `go test -list`, and prints a line for each. What a target
// found stays in the package's testdata/fuzz, as input of the next `go test`; the
// line says where. The exit status is 1 if one has found something, or could not run.
package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"time"
)

const module = "github.com/resultity/node/"

func main() {
	var each budget = "5m"
	flag.Var(&each, "for", "how long each target runs, or how many inputs it tries, such as 2000x")
	only := flag.String("run", "", "run only targets whose `package name` matches this expression")
	blind := flag.Bool("blind", false, "do not build everything anew to see what an input reaches")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	failed, err := fuzz(ctx, each, *blind, *only)
	if err != nil {
		fmt.Fprintln(os.Stderr, "fuzz:", err)
	}
	if err != nil || failed {
		os.Exit(1)
	}
}

// budget is what each target gets, as -fuzztime has it.
type budget string

func (b *budget) String() string { return string(*b) }

func (b *budget) Set(s string) error {
	if n, ok := strings.CutSuffix(s, "x"); ok {
		if v, err := strconv.ParseUint(n, 10, 31); err != nil || v == 0 {
			return errors.New("want a number of inputs, such as 2000x")
		}
	} else if d, err := time.ParseDuration(s); err != nil || d <= 0 {
		return errors.New("want a time such as 5m, or a number of inputs such as 2000x")
	}
	*b = budget(s)
	return nil
}

func fuzz(ctx context.Context, each budget, blind bool, only string) (failed bool, err error) {
	match, err := regexp.Compile(only)
	if err != nil {
		return false, err
	}
	all, err := targets(ctx)
	if err != nil {
		return false, err
	}
	// What is found blindly is not worth keeping, but for failures.
	tmp := ""
	if blind {
		if tmp, err = os.MkdirTemp("", "fuzz"); err != nil {
			return false, err
		}
		defer os.RemoveAll(tmp) // what stays is in a directory for what may
	}
	n, bad := 0, 0
	for _, t := range all {
		name := t.pkg + " " + t.name
		if !match.MatchString(name) {
			continue
		}
		n++
		said, err := t.run(ctx, each, tmp)
		if ctx.Err() != nil {
			return true, ctx.Err()
		}
		if err == nil || ended.MatchString(said) {
			fmt.Printf("fuzz: %-50s ok      %s\n", name, last(progress, said, "no inputs tried"))
			continue
		}
		bad++
		fmt.Printf("fuzz: %-50s FAILED  %s\n%s", name, last(found, said, err.Error()), said)
	}
	if n == 0 {
		return false, errors.New("there is no such target")
	}
	fmt.Printf("fuzz: %d targets for %s each, %d failed\n", n, each, bad)
	return bad > 0, nil
}

// What `go test` says, of which the last counts.
var (
	progress = regexp.MustCompile(`fuzz: elapsed: \w+, (execs: \d+) .*`)
	found    = regexp.MustCompile(`Failing input written to (\S+)`)
	// The end of its time in the middle of an input is a failure to package testing
	// now and then, though nothing was found: https://go.dev/issue/75804. Go 1.27 has
	// it mended, and this can go then.
	ended = regexp.MustCompile(`(?m)^--- FAIL: \w+ \(\S+\)\n    context deadline exceeded\nFAIL$`)
)

func last(of *regexp.Regexp, text, otherwise string) string {
	if all := of.FindAllStringSubmatch(text, -1); all != nil {
		return all[len(all)-1][1]
	}
	return otherwise
}

type target struct{ pkg, name string }

// targets lists those of the packages whose tests need no hosts.
func targets(ctx context.Context) (list []target, err error) {
	var stderr bytes.Buffer
	cmd := exec.CommandContext(ctx, "go", "test", "-json", "-list", "^Fuzz", "./internal/...", "./cmd/...")
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("go test -list: %w\n%s%s", err, out, stderr.Bytes())
	}
	for dec := json.NewDecoder(bytes.NewReader(out)); ; {
		var e struct{ Package, Output string }
		if err := dec.Decode(&e); errors.Is(err, io.EOF) {
			return list, nil
		} else if err != nil {
			return nil, err
		}
		if strings.HasPrefix(e.Output, "Fuzz") {
			list = append(list, target{strings.TrimPrefix(e.Package, module), strings.TrimSpace(e.Output)})
		}
	}
}

// run fuzzes one target; blindly, if there is a directory for that.
func (t target) run(ctx context.Context, each budget, blind string) (said string, err error) {
	args := []string{"-run=^$", "-fuzz=^" + t.name + "$", "-fuzztime=" + string(each), "-fuzzminimizetime=2s"}
	if blind == "" {
		return command(ctx, "", "go", append(append([]string{"test", "-vet=off"}, args...), "./"+t.pkg)...)
	}
	program := filepath.Join(blind, strings.ReplaceAll(t.pkg, "/", "_"))
	if _, err := os.Stat(program); err != nil {
		if said, err := command(ctx, "", "go", "test", "-vet=off", "-c", "-o", program, "./"+t.pkg); err != nil {
			return said, err
		}
	}
	for i := range args {
		args[i] = "-test." + args[i][1:]
	}
	return command(ctx, t.pkg, program, append(args, "-test.fuzzcachedir="+filepath.Join(blind, "corpus"))...)
}

func command(ctx context.Context, dir, name string, args ...string) (said string, err error) {
	cmd := exec.CommandContext(ctx, name, args...)
	// Some targets write files and wait for the disk, which fuzzing need not.
	cmd.Dir, cmd.Env = dir, append(os.Environ(), "GOTMPDIR="+os.TempDir(), "TMPDIR=/dev/shm")
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.WaitDelay = 30 * time.Second
	out, err := cmd.CombinedOutput()
	return string(out), err
}
