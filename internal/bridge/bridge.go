// Package bridge is PID 1 of the sealed runtime container: it starts the
// engine, carries requests between the agent's unix socket and the engine's
// loopback port, and tells systemd whether the engine is alive.
//
// What it promises to the agent and to the unit around it stands in package
// contract. The rule it keeps: the engine never runs in a sandbox that was not
// inspected, no request reaches it by a path that is not on the list, and
// systemd never hears WATCHDOG=1 from a bridge whose engine is hung.
//
// It uses the standard library alone, and plainhttp, which does so too, since
// everything in here is within reach of the engine.
package bridge

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"sync"
	"syscall"
	"time"

	"github.com/resultity/node/internal/bridge/contract"
	"github.com/resultity/node/internal/bridge/sandbox"
)

// Main runs the bridge with a command line and returns its exit code. It may
// run once in a process, which must have nothing else going on: it reaps all
// children and changes settings of the process.
func Main(args []string, stderr io.Writer) int {
	// A setting of the image's, which can make parsers of the library lenient.
	os.Unsetenv("GODEBUG")
	b := &bridge{
		notifier: notifier{os.Getenv("NOTIFY_SOCKET")},
		log:      log.New(stderr, "resultity-bridge: ", 0),
	}
	o, err := contract.Parse(args)
	if err != nil {
		return b.fail(contract.ExitConfig, fmt.Errorf("command line: %w", err))
	}
	b.o = o
	return b.run()
}

// bridge is what all parts share; it does not change while they run.
type bridge struct {
	o        contract.Options
	notifier notifier
	log      *log.Logger
	client   *client
	vigil    *vigil
	engine   *engine
	hidden   bool           // the sockets, from the engine
	signals  chan os.Signal // SIGTERM and SIGINT
	running  sync.WaitGroup // goroutines
}

// fail says on both ways why the bridge ends.
func (b *bridge) fail(code int, err error) int {
	b.log.Print(err)
	b.tell(status("%s", err))
	return code
}

// tell sends messages to systemd. A watchdog without messages will end this
// process, so there is nothing to do about an error but to say it.
func (b *bridge) tell(assignments ...string) {
	if err := b.notifier.send(assignments...); err != nil {
		b.log.Print(err)
	}
}

func (b *bridge) run() int {
	b.signals = make(chan os.Signal, 4)
	signal.Notify(b.signals, syscall.SIGTERM, syscall.SIGINT)
	defer signal.Stop(b.signals)
	children := make(chan os.Signal, 1)
	signal.Notify(children, syscall.SIGCHLD)
	defer signal.Stop(children)
	if err := b.settle(); err != nil {
		return b.fail(contract.ExitInternal, err)
	}

	// Before the inspection, which a pipe left there would fail for ever.
	if err := clearDir(filepath.Dir(b.o.Socket)); err != nil {
		return b.fail(contract.ExitConfig, err)
	}
	order := b.order()
	record := sandbox.Inspect(order)
	if !record.OK {
		failed := sandbox.Failed(record)
		for _, line := range failed {
			b.log.Printf("sandbox: %s", line)
		}
		b.log.Print("the sandbox is not the one that was ordered: the engine is not started")
		b.tell(status("sandbox: %s", failed[0]))
		return contract.ExitSandbox
	}

	var hidden, err error
	if b.engine, hidden, err = startEngine(b.o.Command, order, b.hide()); err != nil {
		return b.fail(contract.ExitConfig, err)
	}
	if b.hidden = hidden == nil; !b.hidden {
		b.log.Printf("the engine sees the sockets of the agent and of systemd: %v", hidden)
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer b.running.Wait()
	defer cancel()
	b.running.Go(func() { b.engine.reap(ctx, children) })
	b.client = newClient(b.o)
	defer b.client.close()
	return b.oversee(ctx, order)
}

// settle makes this process one that the engine, which has the same user id,
// can neither trace nor read, and that stays small beside it.
func (b *bridge) settle() error {
	if err := setDumpable(0); err != nil {
		return err
	}
	// The engine wants the processors. Some tens of thousands of tokens a second
	// can be carried with one, and with more of them each hand-over between
	// goroutines wakes a thread.
	runtime.GOMAXPROCS(1)
	const idle, perRequest = 12 << 20, 256 << 10
	debug.SetMemoryLimit(idle + int64(b.o.MaxInFlight)*(b.o.MaxBody+perRequest))
	return nil
}

// hide lists the directories that the engine does not see: of its own socket, and
// of systemd's.
func (b *bridge) hide() []string {
	dirs := []string{filepath.Dir(b.o.Socket)}
	if dir := filepath.Dir(b.notifier.socket); filepath.IsAbs(dir) && dir != "/" && dir != dirs[0] {
		dirs = append(dirs, dir)
	}
	return dirs
}

// order is what the sandbox is compared with.
func (b *bridge) order() sandbox.Order {
	return sandbox.Order{
		Writable:  b.o.Writable,
		SocketDir: filepath.Dir(b.o.Socket),
		ReadOnly:  b.o.ReadOnly,
		Devices:   b.o.Devices,
		Sockets:   []string{b.notifier.socket, b.o.Socket},
	}
}

// oversee brings the engine up, serves, and returns the exit code.
func (b *bridge) oversee(ctx context.Context, order sandbox.Order) int {
	began := time.Now()
	starting, stop := context.WithTimeout(ctx, b.o.StartTimeout)
	defer stop()
	ready := make(chan error, 1)
	b.running.Go(func() { ready <- b.awaken(starting) })
	select {
	case ws := <-b.engine.exited:
		return b.fail(exitCode(ws), errors.New(describe(ws)))
	case s := <-b.signals:
		b.log.Printf("%s while the engine starts", s)
		return b.endEngine(ctx)
	case err := <-ready:
		if err != nil {
			return b.fail(contract.ExitNotReady, err)
		}
	}

	b.vigil = newVigil(b.o.Stall, b.o.CanaryEvery)
	took := time.Since(began)
	f := newForwarder(b.o, b.vigil, func() contract.Sandbox {
		found := sandbox.Again(order)
		found.Hidden = b.hidden
		return found
	}, func(s *contract.Status) {
		s.Model, s.StartMS = b.o.Model, took.Milliseconds()
		b.vigil.fill(s)
	})
	return b.serve(ctx, f, took)
}

// Intervals of the start.
const (
	pollFirst   = 20 * time.Millisecond // an engine can be up at once
	pollMost    = 500 * time.Millisecond
	reportEvery = 5 * time.Second
)

// awaken returns once the engine has answered a completion. Until then it says how
// far it is.
func (b *bridge) awaken(ctx context.Context) error {
	phase := "waits for " + b.o.Health
	began := time.Now()
	again := time.NewTicker(reportEvery)
	defer again.Stop()
	poll := time.NewTimer(0)
	defer poll.Stop()
	report := func() {
		b.tell(status("starting %s: %s, %s of %s", b.o.Model, phase, time.Since(began).Round(time.Second), b.o.StartTimeout))
	}
	report()

	ask, wait := b.client.healthy, pollFirst
	answers := make(chan error, 1)
	var last error
	for {
		select {
		case <-ctx.Done():
			if last == nil {
				last = errors.New("no answer")
			}
			return fmt.Errorf("engine is not ready after %s: %s: %w", b.o.StartTimeout, phase, last)
		case <-again.C:
			report()
		case <-poll.C:
			b.running.Go(func() { answers <- ask(ctx) })
		case err := <-answers:
			switch {
			case err != nil:
				last = err
				poll.Reset(wait)
				wait = min(2*wait, pollMost)
			case phase != firstCompletion:
				phase, ask, last = firstCompletion, b.client.complete, nil
				report()
				poll.Reset(0)
			default:
				return nil
			}
		}
	}
}

const firstCompletion = "waits for a first completion"

// serve opens the socket and says READY, then serves until it is told to stop
// or the engine ends, and returns the exit code.
func (b *bridge) serve(ctx context.Context, f *forwarder, took time.Duration) int {
	defer f.engine.CloseIdleConnections()
	// Some connections more than requests: for status and metrics, and for
	// those that the other side keeps for later.
	l, err := listen(b.o.Socket, 2*b.o.MaxInFlight+32, os.Getuid())
	if err != nil {
		return b.fail(contract.ExitInternal, err)
	}
	server := newServer(f, b.log)
	broken := make(chan error, 1)
	b.running.Go(func() { broken <- server.Serve(l) })
	defer f.serving.Wait()
	defer server.Close()

	singing, stopSinging := context.WithCancel(ctx)
	defer stopSinging()
	b.running.Go(func() { b.vigil.sing(singing, b.client.complete) })
	stopping := make(chan struct{})
	neglected := make(chan struct{})
	b.running.Go(func() { b.watch(ctx, stopping, neglected, l, f) })
	b.log.Printf("serving %s, first completion after %s", b.o.Model, took.Round(time.Millisecond))
	b.tell("READY=1", "WATCHDOG=1", status("serving %s", b.o.Model))

	select {
	case ws := <-b.engine.exited:
		return b.fail(exitCode(ws), errors.New(describe(ws)))
	case err := <-broken:
		return b.fail(contract.ExitInternal, fmt.Errorf("serve: %w", err))
	case <-neglected:
		return b.fail(contract.ExitInternal, errNeglected)
	case s := <-b.signals:
		b.log.Printf("%s: stopping", s)
		b.tell("STOPPING=1", status("stopping: requests in flight may end within %s", b.o.StopGrace))
		close(stopping)
		stopSinging()
		b.drain(ctx, server)
		server.Close()
		return b.endEngine(ctx)
	}
}

// neglect is how much longer than the watchdog's time the bridge waits for systemd
// to end what is hung.
var neglect = 5 * time.Second // the tests have a slower systemd

var errNeglected = errors.New("hung, and systemd does not end it: somebody else feeds its watchdog, or nobody watches")

// watch feeds systemd's watchdog while the engine is alive, until ctx ends.
// Systemd goes on watching during a stop, which has time limits of its own:
// from then on the watchdog is fed in any case. Neglected is closed when systemd
// should have ended this process long ago.
func (b *bridge) watch(ctx context.Context, stopping <-chan struct{}, neglected chan<- struct{}, l *listener, f *forwarder) {
	tick := time.NewTicker(b.o.Watchdog / 3)
	defer tick.Stop()
	before := ""
	var since time.Time // of before
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		select {
		case <-stopping:
			b.tell("WATCHDOG=1")
			continue
		default:
		}
		why := b.vigil.judge()
		if why == "" && !l.inPlace() {
			why = "something else is in the place of the socket"
		}
		switch {
		case why == "":
			if before != "" {
				b.log.Print("engine is back, watchdog messages go on")
			}
			b.tell("WATCHDOG=1", status("serving %s: %d in flight, %d answered", b.o.Model, len(f.slots), f.answered.Load()))
		case before == "":
			since = time.Now()
			b.log.Printf("%s: no more watchdog messages", why)
			b.tell(status("hung: %s", why))
		case time.Since(since) > b.o.Watchdog+neglect:
			close(neglected)
			return
		}
		before = why
	}
}

// drain stops accepting and waits for the requests in flight, up to the grace
// time, a second signal or the engine's end.
func (b *bridge) drain(ctx context.Context, server *http.Server) {
	ctx, cancel := context.WithTimeout(ctx, b.o.StopGrace)
	defer cancel()
	done := make(chan error, 1)
	b.running.Go(func() { done <- server.Shutdown(ctx) })
	select {
	case err := <-done:
		if err != nil {
			b.log.Print("requests were still in flight after the grace time")
		}
	case s := <-b.signals:
		b.log.Printf("%s again: not waiting for requests in flight", s)
	case ws := <-b.engine.exited:
		b.engine.exited <- ws // for endEngine
	}
}

// patience with an engine that was told to end, before the next means.
const endPatience = 2 * time.Second

// endEngine ends the engine, first by asking twice: with a request that it does
// not want to give up, llama-server heeds only the second.
func (b *bridge) endEngine(ctx context.Context) int {
	for _, s := range []syscall.Signal{syscall.SIGTERM, syscall.SIGTERM, syscall.SIGKILL} {
		b.engine.signal(ctx, s)
		patience := time.NewTimer(endPatience)
		defer patience.Stop()
		select {
		case ws := <-b.engine.exited:
			b.log.Print(describe(ws))
			return contract.ExitStopped
		case <-patience.C:
		}
	}
	// Not even SIGKILL: it hangs in the kernel. PID 1's end is all that is left.
	b.log.Print("engine does not end")
	return contract.ExitStopped
}
