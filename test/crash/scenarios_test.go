package crash

import (
	"context"
	"errors"
	"fmt"
	"path"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/resultity/node/internal/snapshot"
	"github.com/resultity/node/test/bench/instant"
	"github.com/resultity/node/test/chat"
	"github.com/resultity/node/test/stack"
)

// scenario makes a program pass points. It is repeated until the point is
// reached, and until it succeeds.
type scenario func(ctx context.Context, w *world) error

// nothing leaves it to the clients, who ask all the time.
func nothing(context.Context, *world) error { return nil }

// freshNode has a node begin its life.
func freshNode(ctx context.Context, w *world) error {
	if err := w.token(ctx); err != nil {
		return err
	}
	if err := w.node.UserCtl(ctx, "stop", w.node.Agent); err != nil {
		return err
	}
	w.key, w.address = nil, ""
	if out, err := w.node.Output(ctx, "rm", "-rf", w.node.State+"/agent/identity", w.node.State+"/agent/networks", w.node.State+"/agent/generations"); err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	w.logged = time.Now()
	if err := w.node.UserCtl(ctx, "start", "--no-block", w.node.Agent); err != nil {
		return err
	}
	w.untilJobs(ctx)
	return nil
}

// replaceStore takes the node's store away, and with it its receipt log, as when its
// disk was replaced and the key restored. The network has seen the log before.
func replaceStore(ctx context.Context, w *world) error {
	a, err := w.load.Ask(ctx, ask)
	if err != nil {
		return err
	}
	if _, err := w.await(ctx, "/v1/receipts/"+a.Receipt.Receipt().Job.String()+"/proof"); err != nil {
		return err
	}
	if err := w.node.UserCtl(ctx, "stop", w.node.Agent); err != nil {
		return err
	}
	out, err := w.node.Output(ctx, "sh", "-c", `rm -rf "$0"/agent/networks/*/jobs`, w.node.State)
	if err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	w.logged = time.Now()
	if err := w.node.UserCtl(ctx, "start", "--no-block", w.node.Agent); err != nil {
		return err
	}
	w.untilJobs(ctx)
	return nil
}

// damageStore takes some bytes of a request out of the middle of the node's store.
func damageStore(ctx context.Context, w *world) error {
	if _, err := w.load.Ask(ctx, ask); err != nil {
		return err
	}
	if err := w.node.UserCtl(ctx, "stop", w.node.Agent); err != nil {
		return err
	}
	out, err := w.node.Output(ctx, "sh", "-ec", `cd "$0"/agent/networks/*/jobs
		for f in *.log; do
			at=$(grep -abo '"messages"' $f | head -n1 | cut -d: -f1)
			[ -z "$at" ] || { printf damaged. | dd of=$f bs=1 seek=$at conv=notrunc; exit; }
		done; echo no request is there; exit 1`, w.node.State)
	if err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	if err := w.node.UserCtl(ctx, "start", "--no-block", w.node.Agent); err != nil {
		return err
	}
	w.untilJobs(ctx)
	return nil
}

func restartAgent(ctx context.Context, w *world) error {
	if err := w.node.UserCtl(ctx, "restart", "--no-block", w.node.Agent); err != nil {
		return err
	}
	pause(ctx, 100*time.Millisecond) // the job begins
	w.untilJobs(ctx)
	return nil
}

func restartNetwork(ctx context.Context, w *world) error {
	_, err := w.Net.Output(ctx, "systemctl", "restart", "--no-block", stack.NetworkUnit)
	return err
}

func publish(ctx context.Context, w *world) error {
	if err := w.publish(ctx, func(*snapshot.Config) {}); err != nil {
		return err
	}
	w.untilJobs(ctx)
	return nil
}

// ordered gives the node an order and waits for the answer.
func ordered(kind string) scenario {
	return func(ctx context.Context, w *world) error {
		_, err := w.Network(ctx, "order", w.address, kind, "--expires", "20s", "--wait")
		return err
	}
}

// command runs the network's command line, which has the service do it.
func command(args ...string) scenario {
	return func(ctx context.Context, w *world) error {
		_, err := w.Network(ctx, args...)
		return err
	}
}

// resetLog has the node's receipt log begin anew.
func resetLog(ctx context.Context, w *world) error {
	_, err := w.Network(ctx, "nodes", "reset-log", w.address, "--reason", "a test", "--force")
	return err
}

func revoke(ctx context.Context, w *world) error {
	if _, err := w.Network(ctx, "apikey", "create", "--name", "gone"); err != nil {
		return err
	}
	_, err := w.Network(ctx, "apikey", "revoke", "--name", "gone")
	return err
}

// ctl runs resultityctl; an answer with one of the words is fine, too.
func (w *world) ctl(ctx context.Context, fine string, args ...string) error {
	out, err := w.node.Ctl(ctx, args...)
	if err != nil && (fine == "" || !strings.Contains(err.Error()+string(out), fine)) {
		return fmt.Errorf("resultityctl %s: %w: %s", args[0], err, out)
	}
	return nil
}

// bind takes the node from its account and gives it back.
func bind(ctx context.Context, w *world) error {
	if err := w.ctl(ctx, "bound to no account", "unbind"); err != nil {
		return err
	}
	if err := w.token(ctx); err != nil {
		return err
	}
	return w.ctl(ctx, "", "bind", "--token", "/etc/resultity/enrolment-token")
}

var code = regexp.MustCompile(`(?m)^([0-9]{8})\r?$`)

// bindByMail does so with a code that a mail server delivers.
func bindByMail(ctx context.Context, w *world) error {
	if err := w.ctl(ctx, "bound to no account", "unbind"); err != nil {
		return err
	}
	if _, err := w.Net.Output(ctx, "sh", "-c", "rm -f /home/ann/Maildir/new/*"); err != nil {
		return err
	}
	if err := w.ctl(ctx, "", "bind", "--email", "ann@net"); err != nil {
		return err
	}
	var found string
	w.wait(ctx, 10*time.Second, func() bool {
		out, err := w.Net.Output(ctx, "sh", "-c", "cat /home/ann/Maildir/new/* 2>/dev/null")
		if m := code.FindSubmatch(out); err == nil && m != nil {
			found = string(m[1])
		}
		return found != ""
	})
	if found == "" {
		return errors.New("no mail came")
	}
	return w.ctl(ctx, "", "bind", "--code", found)
}

// largeJobs fill the agent's log, so that it is continued and cleaned up.
func largeJobs(ctx context.Context, w *world) error {
	large := ask
	large.Prompt = strings.Repeat("x ", 100<<10)
	var wg sync.WaitGroup
	errs := make([]error, 12)
	for i := range errs {
		wg.Go(func() { _, errs[i] = w.load.Ask(ctx, large) })
	}
	wg.Wait()
	return errors.Join(errs...)
}

// freshLog has the log of a node that begins its life continued: from then on
// its files are used again.
func freshLog(ctx context.Context, w *world) error {
	if err := freshNode(ctx, w); err != nil {
		return err
	}
	return largeJobs(ctx, w)
}

// refuse drains the node while jobs are on their way to it. Nobody who asks is cut
// short: their jobs would be counted, and have no answer.
func refuse(ctx context.Context, w *world) error {
	enough := time.Now().Add(5 * time.Second)
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for n := 0; n < 20 && time.Now().Before(enough); n++ {
				_, _ = w.load.Ask(ctx, ask) // refusals are what is wanted
			}
		})
	}
	err := errors.Join(drain(ctx, w), drain(ctx, w))
	for err != nil && ctx.Err() == nil && w.ctl(ctx, "", "resume") != nil { // it has died drained, and those who ask wait for it
		pause(ctx, 100*time.Millisecond)
	}
	wg.Wait()
	return err
}

func drain(ctx context.Context, w *world) error {
	return errors.Join(w.ctl(ctx, "", "drain"), w.ctl(ctx, "", "resume"))
}

// leave asks for a stream and goes away.
func leave(ctx context.Context, w *world) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	begun := false
	_, err := w.Ask(ctx, chat.Request{Prompt: instant.Pace(50 * time.Millisecond), Tokens: 500, Stream: true, Begun: func() error {
		begun = true
		cancel()
		return ctx.Err()
	}})
	if begun {
		return nil
	}
	return err
}

// blob is the only file of the model that is served: the one that came last. A
// node keeps the model of the generation before, too.
func (w *world) blob(ctx context.Context) (string, error) {
	out, err := w.node.Output(ctx, "find", w.node.State, "-type", "f", "-regextype", "egrep", "-regex", ".*/[0-9a-f]{64}", "-printf", "%T@ %p\n")
	if err != nil {
		return "", err
	}
	lines := strings.Split(strings.TrimSpace(string(out)), "\n")
	slices.Sort(lines)
	_, name, ok := strings.Cut(lines[len(lines)-1], " ")
	if !ok {
		return "", errors.New("no model")
	}
	return name, nil
}

// turnByte damages the model, and returns its file.
func (w *world) turnByte(ctx context.Context) (name string, err error) {
	if name, err = w.blob(ctx); err != nil {
		return "", err
	}
	if out, err := w.node.Output(ctx, "sh", "-c", `printf wrong | dd of="$0" bs=1 seek=1000 conv=notrunc`, name); err != nil {
		return "", fmt.Errorf("%w: %s", err, out)
	}
	return name, nil
}

// damage turns a byte of the model, and has the network order to look at it.
func damage(ctx context.Context, w *world) error {
	if _, err := w.turnByte(ctx); err != nil {
		return err
	}
	_ = ordered("revalidate")(ctx, w) // which fails, as it has to
	return nil
}

// scrub turns a byte of the model, and has the scrub find it. What the agent had
// not dealt with when it died, the next scrub finds.
func scrub(ctx context.Context, w *world) error {
	name, err := w.turnByte(ctx)
	if err != nil {
		return err
	}
	if err := w.node.UserCtl(ctx, "start", "--wait", "resultity-scrub.service"); err != nil {
		return err
	}
	mended := func() bool {
		out, err := w.node.Output(ctx, "sha256sum", name)
		return err == nil && strings.HasPrefix(string(out), path.Base(name))
	}
	w.until(ctx, 20*time.Second, mended)
	if !mended() {
		return errors.New("the damage is still there")
	}
	return nil
}

// shorten cuts the model's file, and has the agent look at it.
func shorten(ctx context.Context, w *world) error {
	name, err := w.blob(ctx)
	if err != nil {
		return err
	}
	if out, err := w.node.Output(ctx, "truncate", "-s", "1000", name); err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	return restartAgent(ctx, w)
}

// byHand runs the network's command line with fail points.
func (w *world) byHand(ctx context.Context, args ...string) error {
	w.other = true // the service goes on
	out, err := w.Net.Output(ctx, append([]string{"env", "RESULTITY_FAILPOINT=" + networkPoint, networkProgram}, args...)...)
	if err != nil {
		return fmt.Errorf("%s: %w: %s", args[0], err, out)
	}
	return nil
}

// initialize makes another network, in as many tries as it takes.
func initialize(ctx context.Context, w *world) error {
	const dir = "/var/lib/another-network"
	if !w.begun {
		if _, err := w.Net.Output(ctx, "rm", "-rf", dir); err != nil {
			return err
		}
	}
	w.begun = true
	if err := w.byHand(ctx, "init", "--name", "another", "--chain-id", "1", "--dir", dir); err != nil {
		return err
	}
	w.begun = false
	return w.byHand(ctx, "token", "create", "--dir", dir)
}

func publishByHand(ctx context.Context, w *world) error {
	return w.byHand(ctx, "publish", "--config", networkDir+"/next.json", "--dir", networkDir)
}

// newRoot replaces the keys of the service, in as many tries as it takes.
func newRoot(ctx context.Context, w *world) error {
	const dir = "/var/lib/ceremony"
	if out, err := w.Net.Output(ctx, "sh", "-c", "rm -rf "+dir+"; mkdir "+dir+"; cp $(ls -v "+networkDir+"/repository/metadata/*.root.json | tail -n 1) "+dir+"/root.json"); err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	if err := w.byHand(ctx, "root", "new", "--renew", "snapshot", "--renew", "timestamp", "--out", dir+"/next.proposal", "--dir", networkDir); err != nil {
		return err
	}
	step := []string{"root", "publish", dir + "/next.proposal"}
	for _, holder := range []string{"root-1", "root-2"} {
		sig := dir + "/" + holder + ".sig"
		line := fmt.Sprintf("echo yes | RESULTITY_FAILPOINT=%s %s root sign --trusted %s/root.json --key %s/keys/%s.pem --out %s %s/next.proposal", networkPoint, networkProgram, dir, networkDir, holder, sig, dir)
		if out, err := w.Net.Output(ctx, "sh", "-c", line); err != nil {
			return fmt.Errorf("sign: %w: %s", err, out)
		}
		step = append(step, sig)
	}
	return w.byHand(ctx, append(step, "--dir", networkDir)...)
}
