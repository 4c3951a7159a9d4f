// Command bench measures what a node costs: the time it adds to its engine's,
// its memory, its start, and the parts that have a yardstick of their own.
//
//	bench [-quick] [-only NAME,…]
//
// It prints a table for each measurement and leaves it in build/bench as JSON.
// What is compared is measured in turns within one run, so that both sides see
// the same machine; a goal is held against the median. A goal that is missed is
// reported and no failure: the exit status is 1 only if something could not be
// measured.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/resultity/node/test/host"
	"github.com/resultity/node/test/stack"
)

// measurements are run in this order: those without the stack, then those that
// need it as it comes up, then those on the instant engine.
var measurements = []struct {
	name     string
	measured string
	f        func(context.Context, *bench, *table) error
}{
	{"crypto", "receipts and frames, in process", crypto},
	{"gas", "what a transaction to packaging/contracts takes on an EVM chain (Cancun)", gas},
	{"verify", "reading a model of 512 MiB again, page cache, against other programs on the same file", verify},
	{"download", "from the last byte that the source has sent to the verified model", download},
	{"boot", "test host from nothing to a reached default target", boot},
	{"engine", "node path over the engine's socket, real engine and model", addedReal},
	{"ready", "agent start to READY=1 with a warm store", ready},
	{"added", "node path over the engine's socket, engine that answers at once", addedInstant},
	{"memory", "resident (Rss) and proportional (Pss) memory", memory},
	{"throughput", "jobs through one node whose engine answers at once", throughput},
	{"streams", "streams through the API compared with the known text and the signed hash of all bytes, both cores busy", streams},
	{"recovery", "from the end of a fault until the node has answered a new request", recovery},
}

// bench is one run.
type bench struct {
	quick bool
	dir   string // build/bench
	s     *stack.Stack
	fast  bool // the node runs the instant engine
}

// scale returns n, or few in a quick run.
func (b *bench) scale(n, few int) int {
	if b.quick {
		return few
	}
	return n
}

func main() {
	testing.Init() // for testing.Benchmark
	quick := flag.Bool("quick", false, "fewer rounds: whether it works, not how fast")
	only := flag.String("only", "", "names of measurements, separated by commas")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, *quick, *only); err != nil {
		fmt.Fprintf(os.Stderr, "bench: %v\n", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, quick bool, only string) (err error) {
	var wanted []string
	if only != "" {
		wanted = strings.Split(only, ",")
	}
	top, err := stack.Repository()
	if err != nil {
		return err
	}
	b := &bench{quick: quick, dir: filepath.Join(top, "build/bench")}
	if err := os.MkdirAll(b.dir, 0o755); err != nil {
		return err
	}
	if _, err := host.GC(ctx, false); err != nil {
		return err
	}
	defer func() {
		if b.s != nil {
			err = errors.Join(err, b.s.Close())
		}
	}()
	var errs []error
	known := 0
	for _, m := range measurements {
		if wanted != nil && !slices.Contains(wanted, m.name) {
			continue
		}
		known++
		t := &table{Name: m.name, Measured: m.measured, On: machine()}
		if err := m.f(ctx, b, t); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", m.name, err))
			fmt.Fprintf(os.Stderr, "bench: %s could not be measured: %v\n", m.name, err)
			continue
		}
		if err := errors.Join(t.print(os.Stdout), t.write(b.dir)); err != nil {
			return err
		}
	}
	if known < max(len(wanted), 1) {
		return fmt.Errorf("-only %s: the measurements are %s", only, names())
	}
	if len(errs) > 0 {
		return fmt.Errorf("%d of %d measurements failed", len(errs), known)
	}
	return nil
}

func names() string {
	var all []string
	for _, m := range measurements {
		all = append(all, m.name)
	}
	return strings.Join(all, ", ")
}
