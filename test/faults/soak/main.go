// Command soak breaks things for a long time, in an order that only its seed
// knows, and then counts.
//
//	soak [-for 1h] [-seed N]
//
// It prints the seed first: the same one breaks the same things in the same
// order. It ends with what clients have sent and got; none of it may be lost or
// counted twice. The exit status is 1 if something is not as it must be.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"os/signal"
	"slices"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/resultity/node/test/chat"
	"github.com/resultity/node/test/faults"
)

func main() {
	length := flag.Duration("for", time.Hour, "how long things are broken")
	seed := flag.Uint64("seed", uint64(time.Now().UnixNano()), "decides what is broken, and when")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, *length, *seed); err != nil {
		fmt.Printf("soak: failed with -seed %d: %v\n", *seed, err)
		os.Exit(1)
	}
	fmt.Println("soak: ok")
}

func run(ctx context.Context, length time.Duration, seed uint64) (err error) {
	fmt.Printf("soak: for %v, -seed %d\n", length, seed)
	w, err := faults.New(ctx, os.Stderr)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, w.Close()) }()
	order := rand.New(rand.NewPCG(seed, 0))
	var all chat.Tally
	took := map[string][]time.Duration{}
	var errs []error
	for end := time.Now().Add(length); time.Now().Before(end) && ctx.Err() == nil; {
		f := faults.Faults[order.IntN(len(faults.Faults))]
		o, err := w.Run(ctx, f)
		all.Add(&o.Clients)
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", f.Name, err))
			fmt.Printf("%-55s FAILED: %v\n", f.Name, err)
			fmt.Fprintf(os.Stderr, "--- journal of the node\n%s\n", w.A.Journal(ctx, 100))
			continue
		}
		took[f.Name] = append(took[f.Name], o.Recovery)
		fmt.Printf("%-55s recovery in %v; %s\n", f.Name, o.Recovery.Round(time.Millisecond), &o.Clients)
	}
	fmt.Println()
	t := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "fault\ttimes\trecovery, median\tlongest")
	for _, f := range faults.Faults {
		if v := took[f.Name]; len(v) > 0 {
			slices.Sort(v)
			fmt.Fprintf(t, "%s\t%d\t%v\t%v\n", f.Name, len(v), v[len(v)/2].Round(time.Millisecond), v[len(v)-1].Round(time.Millisecond))
		}
	}
	if err := t.Flush(); err != nil {
		return err
	}
	w.Load.Stop()
	last := w.Load.Take()
	all.Add(&last)
	_, lost, err := w.Load.Recheck(ctx, time.Time{})
	if err != nil {
		err = fmt.Errorf("%d receipts are lost, the first: %w", lost, err)
	}
	fmt.Printf("\n%s\n%d lost, %d answered twice\n", &all, lost, all.Twice)
	return errors.Join(append(errs, err, ctx.Err())...)
}
