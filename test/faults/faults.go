package faults

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/resultity/node/internal/chain"
	"github.com/resultity/node/internal/control"
	"github.com/resultity/node/internal/gate"
	"github.com/resultity/node/internal/network/store"
	"github.com/resultity/node/internal/snapshot"
	"github.com/resultity/node/test/chat"
	"github.com/resultity/node/test/host"
	"github.com/resultity/node/test/stack"
)

// Fault is something that breaks.
type Fault struct {
	Name string
	Do   func(context.Context, *World) error // breaks it, and returns when it is whole again or has to heal by itself

	Before, After func(context.Context, *World) error // what it needs and leaves; not measured

	Network bool // the network itself is hit: clients may be told so, but nothing worse
	Streams bool // what A has said already cannot be taken back: streams may break off
	Agent   bool // ends A's agent
	Slow    bool // not in the quick set
}

// Outcome is what came of a fault.
type Outcome struct {
	Fault    string
	Broken   time.Duration // for so long
	Recovery time.Duration // from then until A had answered a new request
	Clients  chat.Tally    // of that time
}

// patience is for a recovery.
const patience = 2 * time.Minute

// Run breaks one thing, waits for the recovery, and says what of that must be
// true is not.
func (w *World) Run(ctx context.Context, f *Fault) (o Outcome, err error) {
	o.Fault = f.Name
	if f.Before != nil {
		if err := errors.Join(f.Before(ctx, w), w.WaitRoutable(ctx)); err != nil {
			return o, fmt.Errorf("to prepare it: %w", err)
		}
	}
	if f.After != nil {
		defer func() { err = errors.Join(err, f.After(ctx, w), w.WaitRoutable(ctx)) }()
	}
	resume := w.Load.Quiet()
	before, err := w.look(ctx, -1)
	between := w.Load.Take()
	quiet := time.Now()
	resume()
	if err != nil {
		return o, fmt.Errorf("before it: %w", err)
	}
	begin := time.Now()
	if err := f.Do(ctx, w); err != nil {
		return o, fmt.Errorf("it could not be done: %w", err)
	}
	healed := time.Now()
	o.Broken = healed.Sub(begin)
	rctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	if err := w.WaitRecovered(rctx); err != nil {
		return o, fmt.Errorf("no recovery: %w", err)
	}
	o.Recovery = time.Since(healed)

	resume = w.Load.Quiet()
	defer resume()
	o.Clients = w.Load.Take()
	after, err := w.look(rctx, before.counted+o.Clients.Answered)
	if err != nil {
		return o, fmt.Errorf("after it: %w", err)
	}
	errs := []error{between.Fault()}
	c := &o.Clients
	failed := c.Sent - c.Answered
	if f.Streams {
		failed -= c.Broken
	}
	if c.Fault() != nil || !f.Network && failed+c.Late > 0 {
		errs = append(errs, fmt.Errorf("clients: %s", c))
	}
	if counted := after.counted - before.counted; !f.Network && counted != o.Clients.Answered {
		errs = append(errs, fmt.Errorf("%d results were counted for %d answers", counted, o.Clients.Answered))
	}
	if (after.agent != before.agent) != f.Agent {
		errs = append(errs, fmt.Errorf("the agent was invocation %s and is %s", before.agent, after.agent))
	}
	if all, lost, err := w.Load.Recheck(rctx, quiet); err != nil {
		errs = append(errs, fmt.Errorf("%d of %d receipts are lost, the first: %w", lost, all, err))
	}
	return o, errors.Join(append(errs, w.Check(rctx))...)
}

// sight is what is compared before and after.
type sight struct {
	counted int    // results, by the network
	agent   string // invocation
}

// look is for when the clients are quiet. A job may be done after its client has
// gone, and a result is counted when it is stored, which may be after its answer: it
// waits until no job is unfinished, and then until as many results are counted as
// want says, or until no more come.
func (w *World) look(ctx context.Context, want int) (s sight, err error) {
	if s.agent, err = w.A.Property(ctx, w.A.Agent, "InvocationID"); err != nil {
		return s, err
	}
	for {
		n, err := w.Unfinished(ctx)
		if err != nil {
			return s, err
		}
		if n == 0 {
			break
		}
		if err := pause(ctx, 20*time.Millisecond); err != nil {
			return s, fmt.Errorf("%d jobs are unfinished: %w", n, err)
		}
	}
	for same := time.Now(); ; {
		n, err := w.Counted(ctx)
		if err != nil {
			return s, err
		}
		if n != s.counted {
			s.counted, same = n, time.Now()
		}
		if n == want || time.Since(same) > 500*time.Millisecond {
			return s, nil
		}
		if err := pause(ctx, 20*time.Millisecond); err != nil {
			return s, err
		}
	}
}

// Faults are all of them.
var Faults = []*Fault{
	{Name: "network cut for a second", Do: cut(time.Second)},
	{Name: "network cut for six seconds", Do: cut(6 * time.Second)},
	{Name: "network cut for a minute", Do: cut(time.Minute), Slow: true},
	{Name: "network cut ten times in a row", Do: func(ctx context.Context, w *World) error {
		for range 10 {
			if err := errors.Join(cut(300*time.Millisecond)(ctx, w), pause(ctx, 300*time.Millisecond)); err != nil {
				return err
			}
		}
		return nil
	}},
	{Name: "nothing arrives at the node for six seconds", Do: lose(100, 0, 6*time.Second)},
	{Name: "nothing leaves the node for six seconds", Do: lose(0, 100, 6*time.Second)},
	{Name: "30 % of packets lost for ten seconds", Do: lose(30, 30, 10*time.Second)},
	{Name: "a proxy delays messages", Do: behave(Manner{Delay: 100 * time.Millisecond})},
	{Name: "a proxy duplicates messages", Do: behave(Manner{Duplicate: 5})},
	{Name: "a proxy changes their order", Do: behave(Manner{Reorder: 5})},
	{Name: "a proxy flips bits", Do: behave(Manner{Change: 5})},
	{Name: "names are not resolved for eight seconds", Do: func(ctx context.Context, w *World) error {
		if err := w.setName(false); err != nil {
			return err
		}
		w.Proxy.Break()
		return errors.Join(pause(ctx, 8*time.Second), w.setName(true))
	}},
	{Name: "engine killed", Do: told("KILL")},
	{Name: "engine stopped (SIGSTOP)", Do: told("STOP")},
	{Name: "engine hangs and says that it is well", Do: told("USR1")},
	{Name: "engine answers garbage", Do: told("USR2"), After: absolved},
	{Name: "engine answers without end", Do: told("HUP"), After: absolved, Streams: true},
	{Name: "engine answers nothing", Do: told("WINCH")},
	{Name: "engine runs out of memory", Do: outOfMemory, After: absolved},
	{Name: "Podman's storage locked, and the engine ends", Do: lockedStorage},
	{Name: "agent killed", Agent: true, Do: func(ctx context.Context, w *World) error {
		return w.A.UserCtl(ctx, "kill", "--signal=KILL", w.A.Agent)
	}},
	{Name: "agent stopped (SIGSTOP)", Agent: true, Do: func(ctx context.Context, w *World) error {
		return w.A.UserCtl(ctx, "kill", "--signal=STOP", w.A.Agent)
	}},
	{Name: "user manager restarted", Agent: true, Do: func(ctx context.Context, w *World) error {
		uid, err := w.uid(ctx)
		if err != nil {
			return err
		}
		_, err = w.A.Output(ctx, "systemctl", "restart", "user@"+uid+".service")
		return err
	}},
	{Name: "host rebooted", Agent: true, Do: func(ctx context.Context, w *World) error {
		return errors.Join(w.A.Reboot(ctx), w.setName(true))
	}},
	{Name: "host loses power", Agent: true, Do: func(ctx context.Context, w *World) error {
		return errors.Join(w.A.Kill(ctx), w.A.Boot(ctx), w.setName(true))
	}},
	{Name: "model source slow", Do: trouble(Slow, anotherModel)},
	{Name: "model source lies about sizes", Do: trouble(Lying, anotherModel)},
	{Name: "model source ends early", Do: trouble(Short, anotherModel)},
	{Name: "model source sends other bytes", Do: trouble(Wrong, anotherModel)},
	{Name: "registry slow", Do: trouble(Slow, anotherImage)},
	{Name: "registry lies about sizes", Do: trouble(Lying, anotherImage)},
	{Name: "registry ends early", Do: trouble(Short, anotherImage)},
	{Name: "registry sends other bytes", Do: trouble(Wrong, anotherImage)},
	{Name: "disk of the node's state full", Before: smallDisk, Do: fullDisk, After: wholeDisk},
	{Name: "a write to the node's job store fails", Agent: true, Do: noGrowth},
	{Name: "node's models, snapshot and generations read-only", Before: ownDisks("models", "tuf", "generations"), Do: readOnly("models", "tuf", "generations"), After: sharedDisk("models", "tuf", "generations")},
	{Name: "node's models read-only", Before: ownDisks("models"), Do: readOnly("models"), After: sharedDisk("models"), Slow: true},
	{Name: "node's snapshot read-only", Before: ownDisks("tuf"), Do: readOnly("tuf"), After: sharedDisk("tuf"), Slow: true},
	{Name: "node's generations read-only", Before: ownDisks("generations"), Do: readOnly("generations"), After: sharedDisk("generations"), Slow: true},
	{Name: "node's job store read-only when its agent starts", Agent: true, Before: ownDisks("jobs"), Do: readOnlyAtStart("jobs"), After: sharedDisk("jobs")},
	{Name: "node's log spool read-only when its agent starts", Agent: true, Before: ownDisks("spool"), Do: readOnlyAtStart("spool"), After: sharedDisk("spool"), Slow: true},
	{Name: "a byte of the node's live job store changes, and its agent is killed", Agent: true, Do: damagedStore("messages", "#", "store-mended")},
	{Name: "bytes of a result in the node's live job store change, and its agent is killed", Agent: true, Do: damagedStore("choices", "damaged.", "store-salvaged")},
	{Name: "network service killed", Network: true, Do: func(ctx context.Context, w *World) error {
		_, err := w.Net.Output(ctx, "systemctl", "kill", "--signal=KILL", "resultity-network.service")
		return err
	}},
	{Name: "disk of the network full, and the service killed", Network: true, Before: smallNetworkDisk, Do: fullNetworkDisk, After: wholeNetworkDisk},
	{Name: "store of the network read-only when it starts", Network: true, Before: smallNetworkDisk, Do: readOnlyNetwork, After: wholeNetworkDisk},
	{Name: "network service goes back to an older snapshot", Network: true, Do: olderSnapshot},
}

func (w *World) uid(ctx context.Context) (string, error) {
	out, err := w.A.OutputAs(ctx, stack.Account, "id", "-u")
	return strings.TrimSpace(string(out)), err
}

func cut(d time.Duration) func(context.Context, *World) error {
	return func(ctx context.Context, w *World) error {
		if err := w.A.Cut(ctx); err != nil {
			return err
		}
		return errors.Join(pause(ctx, d), w.A.Heal(ctx))
	}
}

func lose(in, out int, d time.Duration) func(context.Context, *World) error {
	return func(ctx context.Context, w *World) error {
		if err := w.A.Lose(ctx, in, out); err != nil {
			return err
		}
		return errors.Join(pause(ctx, d), w.A.Lose(ctx, 0, 0))
	}
}

func behave(m Manner) func(context.Context, *World) error {
	return func(ctx context.Context, w *World) error {
		w.Proxy.Behave(m)
		defer w.Proxy.Behave(Manner{})
		return pause(ctx, 8*time.Second)
	}
}

// absolved has A forget that its engine was wrong: an engine that is wrong again
// soon after is left alone for a while.
func absolved(ctx context.Context, w *World) error {
	out, err := w.A.Ctl(ctx, "restart")
	if err != nil {
		return fmt.Errorf("resultityctl restart: %w: %s", err, out)
	}
	return nil
}

// told has A's engine go wrong, and waits until there is another one.
func told(signal string) func(context.Context, *World) error {
	return func(ctx context.Context, w *World) error {
		before, err := w.A.Property(ctx, stack.Runtime, "InvocationID")
		if err != nil {
			return err
		}
		if _, err := w.A.SignalEngine(ctx, signal); err != nil {
			return err
		}
		return w.startedAnew(ctx, stack.Runtime, before)
	}
}

// startedAnew waits until a unit of A's has another invocation.
func (w *World) startedAnew(ctx context.Context, unit, before string) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for {
		now, err := w.A.Property(ctx, unit, "InvocationID")
		if err == nil && now != "" && now != before {
			return nil
		}
		if pause(ctx, 100*time.Millisecond) != nil {
			return fmt.Errorf("%s was not started anew: %w", unit, errors.Join(ctx.Err(), err))
		}
	}
}

// trouble has A's way to models and images in trouble when change, which needs
// it, is published.
func trouble(t Trouble, change func(context.Context, *World) (func(*snapshot.Config), error)) func(context.Context, *World) error {
	return func(ctx context.Context, w *World) error {
		f, err := change(ctx, w)
		if err != nil {
			return err
		}
		w.Site.Be(t)
		defer w.Site.Be(None)
		if err := w.Publish(ctx, f); err != nil {
			return err
		}
		return pause(ctx, 5*time.Second)
	}
}

// maxModels keeps the disks from filling over a long run.
const maxModels = 4

func anotherModel(_ context.Context, w *World) (func(*snapshot.Config), error) {
	data, address := w.Site.Put(1 << 20)
	file, err := snapshot.NewFile("m.gguf", bytes.NewReader(data), address)
	return func(c *snapshot.Config) {
		if len(c.Models) >= maxModels {
			c.Models = append(c.Models[:1:1], c.Models[2:]...) // the first one is served
		}
		c.Models = append(c.Models, snapshot.Model{
			Name: "m" + file.SHA256.Hex()[:8], Version: "1", Format: "gguf",
			Files: []snapshot.File{file},
		})
	}, err
}

// anotherImage is the same engine with other bytes behind it.
func anotherImage(ctx context.Context, w *World) (func(*snapshot.Config), error) {
	w.program = append(w.program, 0)
	ref, err := w.PushEngine(ctx, w.Site.Reg, "faulty", w.program)
	return func(c *snapshot.Config) { c.Runtime.Image = ref }, err
}

// sh runs a script as root on A's host; $1 is the agent's state directory, $2
// the account.
func (w *World) sh(ctx context.Context, script string) error {
	out, err := w.A.Output(ctx, "sh", "-euc", script+"\n", "sh", w.A.State+"/agent", stack.Account)
	if err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	return nil
}

// onNet is sh on the network's host; $1 is the directory of the service.
func (w *World) onNet(ctx context.Context, script string) error {
	out, err := w.Net.Output(ctx, "sh", "-euc", script, "sh", "/var/lib/resultity-network")
	if err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	return nil
}

// smallDisk gives the agent's state a disk of its own.
func smallDisk(ctx context.Context, w *World) error {
	return w.moveState(ctx, `mount -t tmpfs -o "size=64m,mode=0700,uid=$(id -u $2),gid=$(id -g $2)" tmpfs "$1"`)
}

// wholeDisk undoes smallDisk.
func wholeDisk(ctx context.Context, w *World) error {
	return w.moveState(ctx, `umount "$1" && find "$1" -mindepth 1 -delete`)
}

// moveState has the state directory become another one, with the same in it.
func (w *World) moveState(ctx context.Context, become string) error {
	units := []string{w.A.Agent, stack.Runtime, "resultity-podman.service"} // the container has a model of it, Podman its policy
	return errors.Join(
		w.A.UserCtl(ctx, append([]string{"stop"}, units...)...),
		w.sh(ctx, `cp -a "$1" /var/tmp/kept && `+become+` && cp -a /var/tmp/kept/. "$1" && rm -r /var/tmp/kept`),
		w.A.UserCtl(ctx, "start", w.A.Agent),
	)
}

// fill leaves not a byte of a disk.
const fill = `for bs in 1M 4k 1; do dd if=/dev/zero of="$1/fill-$bs" bs=$bs 2>/dev/null || true; done`

func fullDisk(ctx context.Context, w *World) error {
	return errors.Join(
		w.sh(ctx, fill),
		pause(ctx, 6*time.Second),
		w.sh(ctx, `rm "$1"/fill-*`),
	)
}

// noGrowth has every write of A's agent to a file fail that makes the file longer.
// What its job store has in memory may not be what is on disk after that, so the
// agent ends, and reads it anew in its next life, which has no such bound.
func noGrowth(ctx context.Context, w *World) error {
	before, err := w.A.Property(ctx, w.A.Agent, "InvocationID")
	if err != nil {
		return err
	}
	pid, err := w.A.Property(ctx, w.A.Agent, "MainPID")
	if err != nil {
		return err
	}
	// As the account: root of the host may not, as the agent has a user namespace.
	if out, err := w.A.OutputAs(ctx, stack.Account, "prlimit", "--pid", pid, "--fsize=1:unlimited"); err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	return w.startedAnew(ctx, w.A.Agent, before) // with the next job
}

// damagedStore writes something else where a late record with a word in A's job store
// has that, and kills the agent. What its next life finds has to be said by an event.
//
// The very last record is none: what is damaged at the end is taken for cut off by the
// kill. And the file may have been in use before, so that what looks late is of that
// use, and nothing to the store; then the first one that is found is the store's.
func damagedStore(word, with, event string) func(context.Context, *World) error {
	return func(ctx context.Context, w *World) error {
		ctx, cancel := context.WithTimeout(ctx, patience)
		defer cancel()
		since := time.Now()
		for _, choice := range []string{"tail -n 20 | head -n 1", "head -n 1"} {
			before, err := w.A.Property(ctx, w.A.Agent, "InvocationID")
			if err != nil {
				return err
			}
			if err := w.sh(ctx, `cd "$1"/networks/*/jobs
				for f in $(ls -r *.log); do
					at=$(grep -abo '`+word+`' $f | `+choice+` | cut -d: -f1)
					[ -n "$at" ] || continue
					printf '`+with+`' | dd of=$f bs=1 seek=$at conv=notrunc
					exit
				done
				echo 'no record has `+word+`'; ls -l; exit 1`); err != nil {
				return err
			}
			if err := w.A.UserCtl(ctx, "kill", "--signal=KILL", w.A.Agent); err != nil {
				return err
			}
			if err := w.startedAnew(ctx, w.A.Agent, before); err != nil {
				return err
			}
			for state := ""; state != "active"; { // it has its store then
				if state, err = w.A.Property(ctx, w.A.Agent, "ActiveState"); err != nil {
					return err
				}
				if err := pause(ctx, 50*time.Millisecond); err != nil {
					return err
				}
			}
			out, err := w.A.Output(ctx, "sh", "-c", fmt.Sprintf("journalctl --sync; journalctl --no-pager -q --since @%d RESULTITY_EVENT=%s", since.Unix(), event))
			if err != nil {
				return fmt.Errorf("journalctl: %w: %s", err, out)
			}
			if len(bytes.TrimSpace(out)) > 0 {
				return nil
			}
		}
		return fmt.Errorf("the journal has no %s", event)
	}
}

// ownDisks gives stores of A's agent a file system each, which can be made
// read-only as a whole, for whoever sees it: one cannot be told so within the
// mounts of the agent's sandbox from outside.
func ownDisks(stores ...string) func(context.Context, *World) error {
	return func(ctx context.Context, w *World) error {
		return w.moveStores(ctx, stores, `mount -t tmpfs -o "size=1g,mode=0700,uid=$(id -u $2),gid=$(id -g $2)" tmpfs "$d"`)
	}
}

// sharedDisk undoes ownDisks.
func sharedDisk(stores ...string) func(context.Context, *World) error {
	return func(ctx context.Context, w *World) error {
		return w.moveStores(ctx, stores, `umount "$d" && find "$d" -mindepth 1 -delete`)
	}
}

// storeDir sets d to the directory of a store, below the agent's state.
const storeDir = `d=$(find "$1" -maxdepth 3 -type d -name %s | head -n 1); test -n "$d"; `

func (w *World) moveStores(ctx context.Context, stores []string, become string) error {
	var script strings.Builder
	for _, store := range stores {
		fmt.Fprintf(&script, storeDir+`cp -a "$d" /var/tmp/kept; `+become+`; cp -a /var/tmp/kept/. "$d"; rm -r /var/tmp/kept`+"\n", store)
	}
	return errors.Join(
		w.A.UserCtl(ctx, "stop", w.A.Agent, stack.Runtime, "resultity-podman.service"),
		w.sh(ctx, script.String()),
		w.A.UserCtl(ctx, "start", w.A.Agent),
	)
}

// remount makes stores with a file system of their own read-only (ro) or writable
// (rw). The kernel refuses the first while a file is open to be written, which
// these files are for an instant only.
func (w *World) remount(ctx context.Context, how string, stores []string) error {
	var script strings.Builder
	for _, store := range stores {
		fmt.Fprintf(&script, storeDir+`n=0; until mount -o remount,%s "$d"; do n=$((n+1)); test $n -lt 50; sleep 0.1; done`+"\n", store, how)
	}
	return w.sh(ctx, script.String())
}

// readOnly has stores take no writes while there is something to be stored.
func readOnly(stores ...string) func(context.Context, *World) error {
	return func(ctx context.Context, w *World) error {
		change, err := anotherModel(ctx, w)
		if err != nil {
			return err
		}
		if err := w.remount(ctx, "ro", stores); err != nil {
			return err
		}
		return errors.Join(w.Publish(ctx, change), pause(ctx, 6*time.Second), w.remount(ctx, "rw", stores))
	}
}

// readOnlyAtStart is readOnly for a store that the agent always has open to be
// written. It must say why it does not start.
func readOnlyAtStart(name string) func(context.Context, *World) error {
	return func(ctx context.Context, w *World) error {
		since, err := w.A.Cursor(ctx)
		if err != nil {
			return err
		}
		if err := errors.Join(
			w.A.UserCtl(ctx, "stop", w.A.Agent),
			w.remount(ctx, "ro", []string{name}),
			w.A.UserCtl(ctx, "start", "--no-block", w.A.Agent),
		); err != nil {
			return err
		}
		saying, cancel := context.WithTimeout(ctx, patience)
		defer cancel()
		return errors.Join(
			w.A.WaitWords(saying, since, syscall.EROFS.Error()),
			pause(ctx, 2*time.Second), // it goes on like that
			w.remount(ctx, "rw", []string{name}),
		)
	}
}

// smallNetworkDisk gives the network a disk of its own. What it has fits into half
// of it, which is what the network gives results before it deletes the oldest.
func smallNetworkDisk(ctx context.Context, w *World) error {
	return w.moveNetwork(ctx, `mount -t tmpfs -o size=$((256 + 4 * $(du -sm $1 | cut -f1)))m,mode=0700,uid=$(stat -c %u $1),gid=$(stat -c %g $1) tmpfs $1`)
}

// wholeNetworkDisk undoes smallNetworkDisk.
func wholeNetworkDisk(ctx context.Context, w *World) error {
	return w.moveNetwork(ctx, `umount $1 && find $1 -mindepth 1 -delete`)
}

func (w *World) moveNetwork(ctx context.Context, become string) error {
	return errors.Join(
		w.onNet(ctx, `systemctl stop resultity-network; cp -a $1/. /var/tmp/kept; `+become+`; cp -a /var/tmp/kept/. $1; rm -r /var/tmp/kept; systemctl start resultity-network`),
		w.waitHealth(ctx, http.StatusOK),
	)
}

// waitHealth waits until the network says how it is.
func (w *World) waitHealth(ctx context.Context, status int) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for {
		res, raw, err := w.Do(ctx, http.MethodGet, "/healthz", nil)
		if err == nil && res.StatusCode == status {
			return nil
		}
		if ctx.Err() != nil {
			return fmt.Errorf("the network's health is not %d: %w: %s", status, errors.Join(err, ctx.Err()), raw)
		}
		if err := pause(ctx, 100*time.Millisecond); err != nil { // a service sends no event
			return err
		}
	}
}

// fullNetworkDisk leaves not a byte on the network's disk, and kills the service
// meanwhile. It must start all the same, say what is wrong, and go on by itself.
func fullNetworkDisk(ctx context.Context, w *World) error {
	if err := w.onNet(ctx, fill); err != nil {
		return err
	}
	err := w.saysFull(ctx)
	if err == nil {
		err = errors.Join(
			w.onNet(ctx, `systemctl kill --signal=KILL resultity-network`),
			w.saysFull(ctx),
			pause(ctx, 2*time.Second),
		)
	}
	return errors.Join(err, w.onNet(ctx, `rm $1/fill-*`))
}

// saysFull checks what clients are told, and that this run of the service has told
// the operator what to do.
func (w *World) saysFull(ctx context.Context) error {
	if err := w.waitHealth(ctx, http.StatusServiceUnavailable); err != nil {
		return err
	}
	_, err := w.Ask(ctx, ask)
	var refused *chat.Refusal
	if !errors.As(err, &refused) || refused.Status != http.StatusServiceUnavailable || refused.RetryAfter == "" || refused.Code != "storage" {
		return fmt.Errorf("with a full disk the network answers %+v", err)
	}
	return w.networkSays(ctx, store.ErrNoRoom)
}

// networkSays waits until this run of the network's service, or its last one, has
// logged an error: its answers, and its end, may be faster than the journal.
func (w *World) networkSays(ctx context.Context, what error) error {
	if err := w.onNet(ctx, fmt.Sprintf(`timeout 60 sh -c 'until journalctl -q _SYSTEMD_INVOCATION_ID=$(systemctl show -P InvocationID resultity-network) | grep -qF "%s"; do sleep 0.1; done'`, what)); err != nil {
		return fmt.Errorf("the log of the network says nothing of %q: %w", what, err)
	}
	return nil
}

// readOnlyNetwork has the network find its disk read-only when it starts.
func readOnlyNetwork(ctx context.Context, w *World) error {
	return errors.Join(
		w.onNet(ctx, `systemctl stop resultity-network; mount -o remount,ro $1; systemctl start --no-block resultity-network`),
		w.networkSays(ctx, syscall.EROFS),
		pause(ctx, 2*time.Second), // it goes on like that
		w.onNet(ctx, `mount -o remount,rw $1`),
	)
}

// olderSnapshot replaces the network's repository by a copy from before its
// last snapshot, for a while. No node may follow it there.
func olderSnapshot(ctx context.Context, w *World) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	if err := w.onNet(ctx, `rm -rf $1/older && cp -a $1/repository $1/older`); err != nil {
		return err
	}
	change, err := anotherModel(ctx, w)
	if err != nil {
		return err
	}
	if err := errors.Join(w.Publish(ctx, change), w.WaitRoutable(ctx)); err != nil {
		return err
	}
	newer, err := w.A.Status(ctx)
	if err != nil {
		return err
	}
	if err := w.onNet(ctx, `systemctl stop resultity-network && mv $1/repository $1/newer && mv $1/older $1/repository && systemctl start resultity-network`); err != nil {
		return err
	}
	refused := w.A.WaitStatus(ctx, "a refusal of the older snapshot", func(s *control.Status) bool {
		return slices.ContainsFunc(s.Gates, func(g gate.Gate) bool {
			return g.Name == gate.Configuration && strings.Contains(g.Detail, chain.ErrRollback.Error())
		})
	})
	now, err := w.A.Status(ctx)
	if err == nil && now.Networks[0].Snapshot.Version != newer.Networks[0].Snapshot.Version {
		err = fmt.Errorf("the node went from version %d to %d", newer.Networks[0].Snapshot.Version, now.Networks[0].Snapshot.Version)
	}
	return errors.Join(refused, err,
		w.onNet(ctx, `systemctl stop resultity-network && rm -r $1/repository && mv $1/newer $1/repository && systemctl start resultity-network`))
}

// outOfMemory bounds what A's engine may take, since the hosts have no cgroup
// controllers, and has it take all it can get.
func outOfMemory(ctx context.Context, w *World) error {
	pid, err := w.A.Engine(ctx)
	if err != nil {
		return err
	}
	if out, err := w.A.Podman(ctx, "unshare", "prlimit", "--pid", pid, "--data=268435456"); err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	return told("PWR")(ctx, w)
}

// lockedStorage holds a lock that every command of Podman takes, while a
// container has to be made.
func lockedStorage(ctx context.Context, w *World) (err error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	pid, err := w.A.Engine(ctx) // asks Podman
	if err != nil {
		return err
	}
	release, stdin := io.Pipe()
	stdout, out := io.Pipe()
	ended := make(chan error, 1)
	go func() {
		err := w.A.Exec(ctx, host.Cmd{
			User: stack.Account, Stdin: release, Stdout: out,
			Args: []string{w.locker, "/var/lib/" + stack.Account + "/.local/share/containers/storage/overlay-layers/layers.lock"},
		})
		out.CloseWithError(err)
		ended <- err
	}()
	defer func() {
		stdin.Close() // a pipe in memory
		err = errors.Join(err, <-ended)
	}()
	if _, err := bufio.NewReader(stdout).ReadString('\n'); err != nil {
		return err
	}
	if out, err := w.A.Output(ctx, "kill", "-KILL", pid); err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	return pause(ctx, 8*time.Second)
}
