package crash

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/resultity/node/internal/control"
	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/receiptlog"
	"github.com/resultity/node/test/stack"
)

// scenarios say what passes which points, by the beginning of their names. The first
// entry that fits counts.
var scenarios = []struct {
	points string
	do     scenario
}{
	// The agent.
	{`identity\.|signer\.counters|session\.register|state\.(registration|dir)`, freshNode},
	{`state\.spare`, freshLog},
	{`state\.restore`, replaceStore},
	{`state\.salvage`, damageStore},
	{`session\.bind`, bind},
	{`state\.(segment|clean|retire)`, largeJobs},
	{`signer\.count\.|state\.(close|open)|session\.frame\.\w+ \*wire\.(Hello|Bye|Sandbox)$`, restartAgent},
	{`session\.frame\.\w+ \*wire\.Refuse`, refuse},
	{`session\.frame\.\w+ \*wire\.OrderDone|order\.`, ordered("resume")},
	{`session\.frame\.\w+ \*wire\.Logs|spool\.mark`, ordered("logs")},
	{`state\.|work\.|session\.frame|spool\.record`, nothing},
	{`agent\.(head|leaves)`, nothing},
	{`agent\.(drain|resume)`, drain},
	{`book\.|tuf\.|generation\.|image\.|systemd\.|model\.(origin|part|file|tree|hashes)`, publish},
	{`model\.damage\.begin`, scrub},
	{`model\.damage`, damage},
	{`model\.length`, shorten},

	// The network service.
	{`store\.logreset`, resetLog},
	{`store\.(job|jobs|request|result|receiptlog)\.|nodes\.frame\.\w+ \*wire\.(Job|Ack|LeavesAck)$|gateway\.`, nothing},
	{`nodes\.count|nodes\.frame\.\w+ \*wire\.(Welcome|Bound|Status|SandboxAck)$`, restartAgent},
	{`nodes\.frame\.\w+ \*wire\.Cancel|store\.deletion`, leave},
	{`nodes\.frame\.\w+ \*wire\.Update|store\.(config|sandbox)`, publish},
	{`nodes\.frame\.\w+ \*wire\.Order|store\.order`, ordered("resume")},
	{`nodes\.frame\.\w+ \*wire\.LogsAck|store\.logs`, ordered("logs")},
	{`nodes\.register|store\.(node|use)`, freshNode},
	{`nodes\.bind|store\.binding`, bind},
	{`store\.(account|mail)`, bindByMail},
	{`store\.token`, command("token", "create")},
	{`store\.key`, command("apikey", "create", "--name", "another")},
	{`store\.revocation`, revoke},
	{`network\.admin|blocks\.`, restartNetwork},

	// The network's command line.
	{`network\.secret|publish\.(settings|key)`, initialize},
	{`publish\.file`, publishByHand},
	{`publish\.succession|cli\.file`, newRoot},
}

func scenarioOf(p Point) scenario {
	for _, s := range scenarios {
		if regexp.MustCompile(`^(` + s.points + `)`).MatchString(p.Name) {
			return s.do
		}
	}
	return nil
}

// perPoint is how long one point may take. The machine may be busy.
const perPoint = 3 * time.Minute

// All tests share a world.
func TestCrash(t *testing.T) {
	w := up(t)
	t.Run("clock", w.clock)
	t.Run("walk", w.walk)
}

func (w *world) walk(t *testing.T) {
	points, err := Points("../..")
	must(t, err)
	for _, p := range points {
		if scenarioOf(p) == nil {
			t.Errorf("%s: nothing in scenarios passes %s", p.At, p.Name)
		}
	}
	w.checkPrograms(t, points)
	for _, network := range []bool{false, true} {
		missing := w.missing(t)
		for _, p := range points {
			if p.Network != network {
				continue
			}
			t.Run(p.Name, func(t *testing.T) {
				ctx, cancel := context.WithTimeout(t.Context(), perPoint)
				defer cancel()
				begin := time.Now()
				if err := w.die(ctx, p); err != nil {
					t.Fatalf("%s: %v\n%s\n%s", p.At, err, w.node.Journal(t.Context(), 40), tail(w.NetworkJournal(t.Context()), 4<<10))
				}
				t.Logf("%s: %v", p.At, time.Since(begin).Round(10*time.Millisecond))
			})
		}
		if !network {
			if now := w.missing(t); now != missing {
				t.Errorf("clients have got %d answers more than the network has counted results", now-missing)
			}
			must(t, w.fault())
			if w.tally.Broken > 0 {
				t.Errorf("answers were cut short by deaths of the agent: %s", &w.tally)
			}
		}
	}
	w.load.Stop()
	err = w.fault()
	t.Logf("clients: %s", &w.tally)
	must(t, err)
	w.checkReceipts(t)
}

func tail(b []byte, n int) []byte { return b[max(0, len(b)-n):] }

// checkPrograms makes sure that fail points are in the program with the tag, and
// that no trace of them is in the one that is shipped.
func (w *world) checkPrograms(t *testing.T, points []Point) {
	t.Helper()
	tagged, err := os.ReadFile(w.tagged)
	must(t, err)
	plain, err := os.ReadFile(w.plain)
	must(t, err)
	for _, p := range points {
		name, _, _ := strings.Cut(p.Name, ">")
		name, _, _ = strings.Cut(name, " ")
		if !p.Network && !bytes.Contains(tagged, []byte(name)) {
			t.Errorf("the agent with fail points has no %s", name)
		}
		if bytes.Contains(plain, []byte(name)) {
			t.Errorf("the agent that is shipped contains %s", name)
		}
	}
	if bytes.Contains(plain, []byte("RESULTITY_FAILPOINT")) {
		t.Error("the agent that is shipped can be told to die")
	}
}

// missing returns how many more answers clients have got than the network, since
// it was started, has counted results. Before the load began, nobody listened.
func (w *world) missing(t *testing.T) int {
	t.Helper()
	defer w.load.Quiet()()
	for last := -1; ; {
		n, err := w.Counted(t.Context())
		must(t, err)
		if n == last {
			return len(w.load.Answers(time.Time{})) - n
		}
		last = n
		pause(t.Context(), 300*time.Millisecond)
	}
}

// checkReceipts asks for the receipt of every answer once more. Those since the
// node's store was last taken away are in its log, as far as a few hundred of them
// can tell: no death has cost it one, or had the node contradict itself. And the
// network has the records of the sandboxes that they name.
func (w *world) checkReceipts(t *testing.T) {
	t.Helper()
	all, lost, err := w.load.Recheck(t.Context(), time.Time{})
	if err != nil {
		t.Errorf("%d of %d receipts are lost, the first: %v", lost, all, err)
	}
	logged := w.load.Answers(w.logged)
	logged = logged[:min(300, len(logged))]
	recorded := map[digest.Digest]bool{}
	for _, id := range logged {
		_, signed, err := w.Receipt(t.Context(), id)
		if err != nil {
			t.Error(err)
			continue
		}
		stated := signed.Receipt()
		if d := stated.Measured.SandboxDigest; !recorded[d] {
			recorded[d] = true
			if _, err := w.await(t.Context(), "/v1/sandbox/"+d.Hex()); err != nil {
				t.Errorf("receipt %s names a sandbox whose record is lost: %v", id, err)
			}
		}
		var i *receiptlog.Inclusion
		raw, err := w.await(t.Context(), "/v1/receipts/"+id+"/proof")
		if err == nil {
			i, err = receiptlog.ParseInclusion(raw)
		}
		if err == nil {
			err = i.Check(stated.Node, signed.ChainID(), stated.Hash(signed.ChainID()))
		}
		if err != nil {
			t.Errorf("receipt %s is not in its node's log: %v", id, err)
		}
	}
	t.Logf("%d of %d receipts were looked for in the log; they name %d records of the sandbox", len(logged), all, len(recorded))
}

// await asks the network for what it has to have soon.
func (w *world) await(ctx context.Context, path string) ([]byte, error) {
	var res *http.Response
	var raw []byte
	var err error
	w.wait(ctx, 20*time.Second, func() bool {
		res, raw, err = w.Do(ctx, http.MethodGet, path, nil)
		return err == nil && res.StatusCode == http.StatusOK
	})
	switch {
	case err != nil:
		return nil, err
	case res == nil:
		return nil, ctx.Err()
	case res.StatusCode != http.StatusOK:
		return nil, fmt.Errorf("%s: %s: %s", path, res.Status, tail(raw, 300))
	}
	return raw, nil
}

// die has a program killed at a point and looks at what comes after.
func (w *world) die(ctx context.Context, p Point) error {
	do := scenarioOf(p)
	if do == nil {
		return errors.New("nothing passes this point")
	}
	file, machine, victim := w.agentPoint(), w.node.Host, w.agentPID
	if p.Network {
		file, machine, victim = networkPoint, w.Net, w.networkPID
	}
	before, err := victim(ctx)
	if err != nil {
		return err
	}
	w.reached = func() bool {
		_, err := machine.ReadFile(file + ".reached")
		return err == nil
	}
	if err := machine.WriteFile(file, []byte(p.Name), 0o644); err != nil {
		return err
	}
	var failed error
	for !w.reached() {
		if ctx.Err() != nil {
			return fmt.Errorf("not reached: %w; what should pass it: %v", ctx.Err(), failed)
		}
		failed = do(ctx, w)
		w.until(ctx, time.Second, func() bool { return false })
	}
	if out, err := machine.Output(ctx, "rm", file+".reached"); err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	if key, err := w.node.ReadFile(w.keyFile()); err == nil && w.key == nil {
		w.key, w.address = key, "" // made before the death, or right after it
	}
	if p.Network && !w.other {
		// A node whose sessions are short waits longer for each next one. Its next
		// start does not.
		if err := w.node.UserCtl(ctx, "restart", "--no-block", w.node.Agent); err != nil {
			return err
		}
	}
	// Whoever was cut off asks again.
	for failed != nil && ctx.Err() == nil {
		if failed = do(ctx, w); failed != nil {
			pause(ctx, 100*time.Millisecond)
		}
	}
	if failed != nil {
		return fmt.Errorf("after the death: %w", failed)
	}
	if err := w.recovered(ctx); err != nil {
		return err
	}
	if after, err := victim(ctx); err != nil || after == before && !w.other {
		return fmt.Errorf("process %s has not died (%v)", after, err)
	}
	w.other = false
	return nil
}

func (w *world) agentPID(ctx context.Context) (string, error) {
	return w.node.Property(ctx, w.node.Agent, "MainPID")
}

func (w *world) networkPID(ctx context.Context) (string, error) {
	out, err := w.Net.Output(ctx, "systemctl", "show", "-P", "MainPID", stack.NetworkUnit)
	return strings.TrimSpace(string(out)), err
}

// until waits until the point is reached or ok holds, at most for so long.
func (w *world) until(ctx context.Context, most time.Duration, ok func() bool) {
	for end := time.Now().Add(most); ctx.Err() == nil && time.Now().Before(end) && !w.reached() && !ok(); {
		pause(ctx, 20*time.Millisecond) // a file that appears sends no event into another mount namespace
	}
}

// untilJobs waits until the point is reached or the node gets jobs.
func (w *world) untilJobs(ctx context.Context) {
	w.until(ctx, 30*time.Second, func() bool {
		s, err := w.node.Status(ctx)
		return err == nil && (*control.Status).GetsJobs(s) && s.Runtime.Image == w.image
	})
}
