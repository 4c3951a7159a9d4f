// Command fuzz runs every fuzz target of the repository, one after the other.
//
//	fuzz [-for 5m] [-run REGEXP]
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
	"regexp"
	"strings"
	"syscall"
	"time"
)

const module = "github.com/resultity/node/"

func main() {
	each := flag.Duration("for", 5*time.Minute, "how long each target runs")
	only := flag.String("run", "", "run only targets whose `package name` matches this expression")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	failed, err := fuzz(ctx, *each, *only)
	if err != nil {
		fmt.Fprintln(os.Stderr, "fuzz:", err)
	}
	if err != nil || failed {
		os.Exit(1)
	}
}

func fuzz(ctx context.Context, each time.Duration, only string) (failed bool, err error) {
	match, err := regexp.Compile(only)
	if err != nil {
		return false, err
	}
	all, err := targets(ctx)
	if err != nil {
		return false, err
	}
	n, bad := 0, 0
	for _, t := range all {
		name := t.pkg + " " + t.name
		if !match.MatchString(name) {
			continue
		}
		n++
		said, err := t.run(ctx, each)
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
	fmt.Printf("fuzz: %d targets for %v each, %d failed\n", n, each, bad)
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

func (t target) run(ctx context.Context, each time.Duration) (said string, err error) {
	cmd := exec.CommandContext(ctx, "go", "test", "-run=^$", "-fuzz=^"+t.name+"$", "-fuzztime="+each.String(), "-fuzzminimizetime=2s", "./"+t.pkg)
	// Some targets write files and wait for the disk, which fuzzing need not.
	cmd.Env = append(os.Environ(), "GOTMPDIR="+os.TempDir(), "TMPDIR=/dev/shm")
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.WaitDelay = 30 * time.Second
	out, err := cmd.CombinedOutput()
	return string(out), err
}
