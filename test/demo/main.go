// Command demo shows the whole system at work: a network, nodes, real answers
// with receipts, and what happens when things go wrong. Root sees two nodes on
// test hosts; anybody else sees one in their own account, without the proofs
// that need a second node or a network that can be cut.
//
// It ends with one line, "demo: ok" (exit 0) or "demo: failed: WHY" (exit 1).
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/resultity/node/test/host"
	"github.com/resultity/node/test/stack"
)

const labName = "demo"

func main() {
	keep := flag.Bool("keep", false, "leave everything running")
	down := flag.Bool("down", false, "end what -keep left")
	verbose := flag.Bool("v", false, "show what the hosts are doing")
	prepare := flag.String("prepare", "", "only build everything into `directory`, for -prebuilt on a machine without Go")
	prebuilt := flag.String("prebuilt", "", "build nothing, use the `directory` that -prepare has filled; the output goes to build/demo below the working directory")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if *down {
		if err := takeDown(); err != nil {
			fmt.Printf("demo: failed: %v\n", err)
			os.Exit(1)
		}
		fmt.Println("demo: down")
		return
	}
	if *prepare != "" {
		if err := stack.Prepare(ctx, *prepare); err != nil {
			fmt.Printf("demo: failed: %v\n", err)
			os.Exit(1)
		}
		return
	}
	d, err := newDemo(*keep, *verbose, *prebuilt)
	if err == nil {
		err = d.run(ctx)
	}
	if err != nil {
		fmt.Printf("demo: failed: %s\n", strings.ReplaceAll(err.Error(), "\n", "\n    "))
		os.Exit(1)
	}
	fmt.Println("demo: ok")
}

func takeDown() error {
	if os.Geteuid() != 0 {
		return stack.CloseLocal()
	}
	lab, err := host.Open(labName, nil)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	return lab.Close()
}

// demo runs steps and keeps their times.
type demo struct {
	keep, verbose bool
	local         bool   // in this user's account, without test hosts
	prebuilt      string // directory of programs; empty: they are built
	dir           string // build/demo
	began         time.Time
	s             *stack.Stack

	mu       sync.Mutex // guards timeline
	timeline []entry
}

type entry struct {
	Step string  `json:"step"`
	Host string  `json:"host"`
	MS   float64 `json:"ms"`
	OK   bool    `json:"ok"`
}

func newDemo(keep, verbose bool, prebuilt string) (*demo, error) {
	top, err := filepath.Abs(".")
	if prebuilt == "" {
		top, err = stack.Repository()
	}
	if err != nil {
		return nil, err
	}
	d := &demo{
		keep: keep, verbose: verbose, local: os.Geteuid() != 0, prebuilt: prebuilt,
		dir: filepath.Join(top, "build/demo"), began: time.Now(), timeline: []entry{},
	}
	if err := os.RemoveAll(d.dir); err != nil { // what is there must be of this run
		return nil, err
	}
	return d, os.MkdirAll(d.dir, 0o755)
}

// step runs f, prints one line about it, and records its time.
func (d *demo) step(where, name string, f func() (string, error)) error {
	begin := time.Now()
	fmt.Printf("%7.1f s  %-6s %s ...", begin.Sub(d.began).Seconds(), where, name)
	if d.verbose {
		fmt.Println()
	}
	// A first run downloads and builds for minutes: show that it is alive.
	dots := time.NewTicker(5 * time.Second)
	done := make(chan struct{})
	var dotting sync.WaitGroup
	dotting.Go(func() {
		for {
			select {
			case <-dots.C:
				fmt.Print(".")
			case <-done:
				return
			}
		}
	})
	note, err := f()
	dots.Stop()
	close(done)
	dotting.Wait()
	took := time.Since(begin)
	d.mu.Lock()
	d.timeline = append(d.timeline, entry{name, where, float64(took.Microseconds()) / 1000, err == nil})
	d.mu.Unlock()
	switch {
	case err != nil:
		fmt.Printf(" FAILED after %.1f s\n", took.Seconds())
		return fmt.Errorf("%s: %w", name, err)
	case note != "":
		fmt.Printf(" %s (%.1f s)\n", note, took.Seconds())
	default:
		fmt.Printf(" %.1f s\n", took.Seconds())
	}
	return nil
}

func (d *demo) run(ctx context.Context) (err error) {
	ctx, cancel := context.WithTimeout(ctx, 15*time.Minute)
	defer cancel()
	var progress io.Writer
	if d.verbose {
		progress = os.Stdout
	}
	if !d.local {
		if _, err := host.GC(ctx, false); err != nil {
			return err
		}
	}
	if err := takeDown(); err != nil { // a demo that was kept
		return err
	}
	o := stack.Options{
		Local: d.local, Prebuilt: d.prebuilt,
		Step: func(name string, f func() error) error {
			return d.step("", name, func() (string, error) { return "", f() })
		},
	}
	proofs := []func(context.Context) error{
		d.fromNothingToActive, d.answers,
		d.unsignedImage, d.flippedByte, d.insideTheContainer, d.engineKilled, d.engineStopped,
	}
	if !d.local {
		o.Host = host.Options{Name: labName, Keep: d.keep, Progress: progress}
		o.Nodes = []host.Config{{Name: "node1", Release: host.Trixie}, {Name: "node2", Release: host.Forky}}
		proofs = append(proofs, d.networkCut, d.agentKilled)
	}
	d.s, err = stack.Up(ctx, o)
	if err != nil {
		return errors.Join(err, d.write("timeline.json", d.timeline))
	}
	defer func() {
		if err != nil {
			d.explain()
		}
		if werr := d.write("timeline.json", d.timeline); err == nil {
			err = werr
		}
		if d.keep {
			if eerr := d.writeEnv(); err == nil {
				err = eerr
			}
			fmt.Println("everything is left running; build/demo/env says where; `make demo-down` ends it")
			return
		}
		if cerr := d.s.Close(); err == nil {
			err = cerr
		}
	}()
	for _, f := range proofs {
		if err := f(ctx); err != nil {
			return err
		}
	}
	if d.local {
		fmt.Println("left out: a network cut in the middle of a job, an agent killed with an unacknowledged result; they need test hosts, so run this as root")
	}
	return nil
}

// explain leaves the journals of a failed run where they can be read.
func (d *demo) explain() {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	for _, n := range d.s.Nodes {
		name := filepath.Join(d.dir, n.Name()+".journal")
		if err := os.WriteFile(name, []byte(n.Journal(ctx, 2000)), 0o644); err == nil {
			fmt.Printf("the journal of %s is in %s\n", n.Name(), name)
		}
	}
	_ = os.WriteFile(filepath.Join(d.dir, "net.journal"), d.s.NetworkJournal(ctx), 0o644) // the run has failed already
}

func (d *demo) write(name string, v any) error {
	raw, ok := v.([]byte)
	if !ok {
		var err error
		if raw, err = json.MarshalIndent(v, "", "  "); err != nil {
			return err
		}
		raw = append(raw, '\n')
	}
	return os.WriteFile(filepath.Join(d.dir, name), raw, 0o644)
}

func (d *demo) writeEnv() error {
	var hosts []string
	if !d.local {
		hosts = append(hosts, d.s.Net.Name()+"="+d.s.Net.Addr().String())
	}
	for _, n := range d.s.Nodes {
		hosts = append(hosts, n.Name()+"="+n.Addr().String())
	}
	if err := d.write("ca.pem", d.s.CA); err != nil {
		return err
	}
	env := fmt.Sprintf("RESULTITY_API=%s\nRESULTITY_API_KEY=%s\nRESULTITY_HOSTS='%s'\nRESULTITY_CA=%s\n",
		d.s.API, d.s.APIKey, strings.Join(hosts, " "), filepath.Join(d.dir, "ca.pem"))
	return os.WriteFile(filepath.Join(d.dir, "env"), []byte(env), 0o600)
}
