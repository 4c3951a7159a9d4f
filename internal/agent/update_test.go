package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/resultity/node/internal/deploy"
	"github.com/resultity/node/internal/deploy/deploytest"
	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/gate"
	"github.com/resultity/node/internal/image"
	"github.com/resultity/node/internal/journal"
	"github.com/resultity/node/internal/model"
	"github.com/resultity/node/internal/model/format"
	"github.com/resultity/node/internal/model/signature"
	"github.com/resultity/node/internal/podman"
	"github.com/resultity/node/internal/quadlet"
	"github.com/resultity/node/internal/runtime"
	"github.com/resultity/node/internal/sandbox"
	"github.com/resultity/node/internal/session"
	"github.com/resultity/node/internal/snapshot"
	"github.com/resultity/node/internal/systemd"
	"github.com/resultity/node/internal/tuf"
	"github.com/resultity/node/internal/wire"
	"github.com/resultity/node/test/oci"
)

const untilSettled = time.Second / 2 // shorter than any retry

func TestFirstStart(t *testing.T) {
	bubble(t, func(t *testing.T, f *fixture, n *deploytest.Network) {
		s := n.Publish(nil)
		f.tuf.serve(s, nil)
		defer f.run()()
		pass(untilSettled)
		f.serves(s)
		if len(f.enrols) != 1 || !f.isRegistered() {
			t.Errorf("%d registrations", len(f.enrols))
		}
		r := f.enrols[0]
		if key := s.Config().Network.MessageKeys[0]; !r.Trusted(key) || r.Trusted(nodeKey.Address()) || r.Body.Node != nodeKey.Address() || r.Body.Network != "testnet" {
			t.Errorf("registration %+v", r.Body)
		}
		for _, e := range []*journal.Event{journal.SnapshotVerified, journal.Registered, journal.RuntimeActive} {
			if f.book.count(e) != 1 {
				t.Errorf("event %s: %d times", e.Name, f.book.count(e))
			}
		}
		if m := f.Models(); len(m) != 2 || m[0].State != "active" || m[0].Done != m[0].Bytes || m[1].State != "archived" {
			t.Errorf("models %+v", m)
		}
		// From there on nothing happens but a question now and then.
		f.machine.Calls()
		pass(time.Hour)
		for _, c := range f.machine.Calls() {
			if c != deploytest.State {
				t.Errorf("%s, although all is well", c)
			}
		}
		if k := len(f.tuf.calls()); k < 8 || k > 24 {
			t.Errorf("the network was asked %d times in an hour", k)
		}
	})
}

// gaps checks that the times between calls follow the schedule.
func gaps(t *testing.T, at []time.Time) {
	t.Helper()
	for i := range len(at) - 1 {
		d, gap := retries[min(i, len(retries)-1)], at[i+1].Sub(at[i])
		if gap < d/2 || gap > d+d/2 {
			t.Errorf("try %d came after %v, want %v and some jitter", i+1, gap, d)
		}
	}
}

func TestUnreachableNetwork(t *testing.T) {
	bubble(t, func(t *testing.T, f *fixture, n *deploytest.Network) {
		f.tuf.serve(nil, fmt.Errorf("%w: no route", tuf.ErrUnreachable))
		defer f.run()()
		pass(20 * time.Minute)
		f.serves(nil)
		gaps(t, f.tuf.calls())
		if k := f.book.count(journal.SnapshotStale); k != 1 {
			t.Errorf("said %d times", k)
		}
		if g := f.gate("configuration"); g.State == gate.Open || !strings.Contains(g.Remedy, "network.testnet.url") {
			t.Errorf("%+v", g)
		}
		s := n.Publish(nil)
		f.tuf.serve(s, nil)
		pass(10 * time.Minute)
		f.serves(s)
		asked := len(f.tuf.calls())
		f.tuf.serve(nil, tuf.ErrUnreachable) // the schedule begins at its front again
		pass(10 * time.Minute)
		gaps(t, f.tuf.calls()[asked:])
	})
}

// A node goes on without its network, and says so.
func TestUnreachableNetworkWithKeptSnapshot(t *testing.T) {
	bubble(t, func(t *testing.T, f *fixture, n *deploytest.Network) {
		s := n.Publish(nil)
		f.tuf.last = s
		f.tuf.serve(nil, tuf.ErrUnreachable)
		if err := f.store.SetRegistration(&wire.Registered{Network: "testnet", Node: nodeKey.Address(), Account: "acme", Time: 1}); err != nil {
			t.Fatal(err)
		}
		defer f.run()()
		pass(untilSettled)
		f.serves(s)
		if g := f.gate("configuration"); g.State != gate.Open || !strings.Contains(g.Detail, "before this start") || !strings.Contains(g.Detail, tuf.ErrUnreachable.Error()) {
			t.Errorf("%+v", g)
		}
		if g := f.gate("registration"); g.State != gate.Open || !strings.Contains(g.Detail, "acme") {
			t.Errorf("%+v", g)
		}
	})
}

// What the network serves and the node refuses changes nothing.
// A configuration that expires while the network is away serves on, and that is
// said.
func TestExpiredWhileTheNetworkIsAway(t *testing.T) {
	bubble(t, func(t *testing.T, f *fixture, n *deploytest.Network) {
		s := n.Publish(nil)
		time.Sleep(time.Until(s.Expires()) - time.Hour)
		f.tuf.last = s
		f.tuf.serve(nil, tuf.ErrUnreachable)
		close(f.link.up)
		if err := f.store.SetRegistration(&wire.Registered{Network: "testnet", Node: nodeKey.Address(), Account: "acme", Time: 1}); err != nil {
			t.Fatal(err)
		}
		defer f.run()()
		pass(30 * time.Minute)
		f.serves(s)
		if g := f.gate("configuration"); strings.Contains(g.Detail, "expired") || f.book.count(journal.SnapshotExpired) != 0 {
			t.Errorf("before its time: %+v", g)
		}
		last[*wire.Heartbeat](f.party)
		pass(90 * time.Minute)
		f.serves(s)
		g := f.gate("configuration")
		t.Logf("expected: %s, and the node goes on; got: %s", journal.SnapshotExpired.Name, g.Detail)
		if g.State != gate.Open || !strings.Contains(g.Detail, "it expired on") || f.book.count(journal.SnapshotExpired) != 1 {
			t.Errorf("%+v, said %d times", g, f.book.count(journal.SnapshotExpired))
		}
		f.Message(job(s))
		synctest.Wait()
		<-f.engine.asked
		f.engine.answer <- struct{}{}
		synctest.Wait()
		if r := last[*wire.Result](f.party); r == nil || r.Code != "" {
			t.Errorf("%+v", r)
		}
	})
}

func TestRefusedSnapshots(t *testing.T) {
	for name, c := range map[string]struct {
		err    error
		event  *journal.Event
		remedy string
	}{
		"unsigned":   {fmt.Errorf("%w: %w", tuf.ErrUnsigned, snapshot.ErrUntrusted), journal.SnapshotUnsigned, "network.testnet.root"},
		"expired":    {fmt.Errorf("%w: %w", tuf.ErrExpired, snapshot.ErrUntrusted), journal.SnapshotFrozen, "timedatectl"},
		"older":      {fmt.Errorf("%w: %w", tuf.ErrRollback, snapshot.ErrUntrusted), journal.SnapshotRollback, "older files"},
		"mixed":      {fmt.Errorf("%w: %w", tuf.ErrMixed, snapshot.ErrUntrusted), journal.SnapshotMixed, "proxy"},
		"wrong root": {fmt.Errorf("%w: %w", tuf.ErrRoot, snapshot.ErrUntrusted), journal.SnapshotRoot, "root keys"},
		"malformed":  {fmt.Errorf("%w: %w", tuf.ErrMalformed, snapshot.ErrUntrusted), journal.SnapshotMalformed, "portal"},
		"endless":    {fmt.Errorf("%w: %w", tuf.ErrTooLarge, snapshot.ErrUntrusted), journal.SnapshotTooLarge, "network.testnet.root"},
		"redirected": {fmt.Errorf("%w: %w", tuf.ErrRedirect, snapshot.ErrUntrusted), journal.SnapshotRedirected, "network.testnet.root"},
		"too new":    {fmt.Errorf("%w: schema is 2", snapshot.ErrInvalid), journal.SnapshotUnusable, "upgrade"},
		"a pickle":   {fmt.Errorf("%w: %w", snapshot.ErrInvalid, snapshot.ErrFiles), journal.SnapshotFiles, "another format"},
		"the disk":   {errors.New("no space left on device"), journal.SnapshotRefused, "this machine"},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T, f *fixture, n *deploytest.Network) {
				f.tuf.serve(nil, c.err)
				defer f.run()()
				pass(untilSettled)
				if g := f.gate("configuration"); g.State == gate.Open || !strings.Contains(g.Remedy, c.remedy) {
					t.Errorf("%+v, want a remedy with %q", g, c.remedy)
				}
				s := n.Publish(nil)
				f.tuf.serve(s, nil)
				pass(time.Minute)
				f.tuf.serve(nil, c.err)
				before := f.book.count(c.event)
				f.Message(&wire.Update{})
				pass(time.Hour)
				f.serves(s)
				if k := f.book.count(c.event) - before; k != 1 {
					t.Errorf("the refusal was logged %d times", k)
				}
				// The node serves, and status begins with what somebody has to look at.
				g := f.gate("configuration")
				if refused := name != "the disk"; (g.State == gate.Open) == refused || !strings.Contains(g.Detail, c.err.Error()) || refused && !strings.Contains(g.Remedy, c.remedy) {
					t.Errorf("%+v", g)
				}
			})
		})
	}
}

// A configuration of another network is refused, also where it was kept by a
// start before: whether somebody has changed the name or the address.
func TestOtherNetwork(t *testing.T) {
	bubble(t, func(t *testing.T, f *fixture, n *deploytest.Network) {
		other := n.Publish(map[string]any{"network.name": "mainnet"})
		f.tuf.last = other
		f.tuf.serve(other, nil)
		defer f.run()()
		pass(time.Minute)
		f.serves(nil)
		if f.board.snapshot() != nil || len(f.enrols) != 0 {
			t.Errorf("snapshot %v, %d registrations", f.board.snapshot(), len(f.enrols))
		}
		if g := f.gate("configuration"); g.State == gate.Open || !strings.Contains(g.Detail, "mainnet") || !strings.Contains(g.Remedy, "[network.testnet]") {
			t.Errorf("%+v", g)
		}
		for _, c := range f.machine.Calls() {
			if c != deploytest.State {
				t.Errorf("call of %s", c)
			}
		}
	})
}

// A cache that cannot be used is said and not needed.
func TestKeptSnapshotIsDamaged(t *testing.T) {
	bubble(t, func(t *testing.T, f *fixture, n *deploytest.Network) {
		s := n.Publish(nil)
		f.tuf.bad = snapshot.ErrUntrusted
		f.tuf.serve(s, nil)
		defer f.run()()
		pass(untilSettled)
		f.serves(s)
		if f.book.count(journal.SnapshotRefused) != 1 {
			t.Errorf("not said:\n%s", f.book)
		}
	})
}

// A new start of the unit gets no jobs before it has been looked at.
func TestRuntimeLost(t *testing.T) {
	for name, lose := range map[string]func(*deploytest.Locked){
		"started again": func(m *deploytest.Locked) { m.Crash(true) },
		"failed":        func(m *deploytest.Locked) { m.Crash(false) },
		"starting":      func(m *deploytest.Locked) { m.Activate("activating") },
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T, f *fixture, n *deploytest.Network) {
				s := n.Publish(nil)
				f.tuf.serve(s, nil)
				defer f.run()()
				pass(untilSettled)
				f.serves(s)
				f.machine.Calls()
				checked := 0
				f.machine.Fail(deploytest.Look, &deploytest.Fault{Late: true, Also: func(*deploytest.Locked) {
					checked++
					if k := f.worker.Status().Slots; k != 0 {
						t.Errorf("%d slots before the new start was looked at", k)
					}
				}})
				f.machine.Do(lose)
				pass(untilSettled)
				if name == "starting" {
					f.serves(nil)
					if calls := f.machine.Calls(); slices.Contains(calls, deploytest.Start) {
						t.Errorf("systemd was at it, and yet: %q", calls)
					}
					pass(10 * time.Minute)
					f.serves(nil)
					f.machine.Do(func(m *deploytest.Locked) { m.Come() })
					pass(untilSettled)
				}
				f.serves(s)
				if checked != 1 || f.book.count(journal.RuntimeLost) != 1 {
					t.Errorf("looked %d times, lost %d times", checked, f.book.count(journal.RuntimeLost))
				}
			})
		})
	}
}

// Another command than ours is not waited for, however often systemd starts it.
func TestSystemdStartsSomethingElse(t *testing.T) {
	bubble(t, func(t *testing.T, f *fixture, n *deploytest.Network) {
		f.tuf.serve(n.Publish(nil), nil)
		defer f.run()()
		pass(untilSettled)
		f.machine.Calls()
		f.machine.Do(func(m *deploytest.Locked) {
			m.DropIn("--privileged")
			m.Activate("activating")
		})
		pass(untilSettled)
		f.serves(nil)
		if f.book.count(journal.SandboxRefused) != 1 {
			t.Errorf("not said:\n%s", f.book)
		}
		if calls := f.machine.Calls(); !slices.Contains(calls, deploytest.Stop) || slices.Contains(calls, deploytest.Start) {
			t.Errorf("it was not stopped, or started: %q", calls)
		}
	})
}

// A deployment that fails is tried again on the schedule: its own doings with
// the unit are no reason to try sooner.
func TestFirstDeploymentFails(t *testing.T) {
	for _, c := range []struct {
		call  string
		err   error
		event *journal.Event
		gate  string
	}{
		{deploytest.EnsureImage, image.ErrUnsigned, journal.ImageUnsigned, "image"},
		{deploytest.EnsureImage, podman.ErrRefused, journal.ImageRefused, "image"},
		{deploytest.EnsureImage, podman.ErrUnavailable, journal.ImageFailed, "image"},
		{deploytest.EnsureImage, errBroken, journal.ImageFailed, "image"},
		{deploytest.EnsureModel, digest.ErrMismatch, journal.ModelRefused, "model"},
		{deploytest.EnsureModel, errBroken, journal.ModelFailed, "model"},
		{deploytest.Install, errBroken, journal.RuntimeFailed, "runtime"},
		{deploytest.State, errBroken, journal.RuntimeFailed, "runtime"},
		{deploytest.Start, errBroken, journal.RuntimeFailed, "runtime"},
		{deploytest.Record, sandbox.ErrNotSealed, journal.SandboxRefused, "sandbox"},
		{deploytest.Golden, &runtime.GoldenError{Name: "sum"}, journal.ValidationFailed, "validation"},
	} {
		t.Run(c.call, func(t *testing.T) {
			bubble(t, func(t *testing.T, f *fixture, n *deploytest.Network) {
				s := n.Publish(nil)
				f.tuf.serve(s, nil)
				var at []time.Time
				f.machine.Fail(c.call, &deploytest.Fault{Err: c.err, When: func(*deploytest.Locked) bool {
					if k := len(at); k == 0 || !at[k-1].Equal(time.Now()) {
						at = append(at, time.Now())
					}
					return true
				}})
				defer f.run()()
				pass(10 * time.Minute)
				f.serves(nil)
				if c.call != deploytest.State { // which is asked at other times, too
					gaps(t, at)
				}
				if k := len(at); k < 5 || k > 30 {
					t.Errorf("%d tries in 10 minutes", k)
				}
				if k := f.book.count(c.event); k != 1 {
					t.Errorf("event %s was logged %d times\n%s", c.event.Name, k, f.book)
				}
				var st = f.Status()
				if g := st.Closed(); g == nil || g.Name != c.gate || !strings.Contains(g.Detail, c.err.Error()) {
					t.Errorf("closed: %+v, want %s", g, c.gate)
				}
				if st.Runtime.State != failed {
					t.Errorf("runtime is %s", st.Runtime.State)
				}
				if m := f.Models()[0]; (m.State == "failed") != (c.gate == "model") {
					t.Errorf("model is %s", m.State)
				}
				f.machine.Fail(c.call, nil)
				pass(10 * time.Minute)
				f.serves(s)
			})
		})
	}
}

// Another configuration does not wait for the schedule of one that fails.
func TestNextOneIsTriedAtOnce(t *testing.T) {
	bubble(t, func(t *testing.T, f *fixture, n *deploytest.Network) {
		one, next := two(t, f, n)
		f.machine.Fail(deploytest.Start, &deploytest.Fault{Err: errBroken, When: func(m *deploytest.Locked) bool { return m.Runs(one) }})
		defer f.run()()
		pass(20 * time.Minute)
		f.serves(nil)
		f.publish(next)
		pass(untilSettled)
		f.serves(next)
	})
}

// Podman's service may come later than the agent.
func TestNoPodman(t *testing.T) {
	bubble(t, func(t *testing.T, f *fixture, n *deploytest.Network) {
		s := n.Publish(nil)
		f.tuf.serve(s, nil)
		open := f.openDeployer
		var up atomic.Bool
		f.openDeployer = func(ctx context.Context) (deployer, error) {
			if !up.Load() {
				return nil, podman.ErrUnavailable
			}
			return open(ctx)
		}
		defer f.run()()
		pass(untilSettled)
		if g := f.gate("image"); g.State == gate.Open || !strings.Contains(g.Remedy, "resultity-podman") {
			t.Errorf("%+v", g)
		}
		up.Store(true)
		pass(time.Minute)
		f.serves(s)
	})
}

// two returns a served configuration and the next one, which is not published.
func two(t *testing.T, f *fixture, n *deploytest.Network) (one, next *snapshot.Snapshot) {
	t.Helper()
	one = n.Publish(nil)
	f.tuf.serve(one, nil)
	return one, n.Publish(map[string]any{"runtime.image": deploytest.Image(2), "models": []any{deploytest.Model(2)}})
}

func (f *fixture) publish(s *snapshot.Snapshot) {
	f.tuf.serve(s, nil)
	f.Message(&wire.Update{})
}

func TestUpdate(t *testing.T) {
	bubble(t, func(t *testing.T, f *fixture, n *deploytest.Network) {
		one, next := two(t, f, n)
		close(f.link.up)
		defer f.run()()
		pass(untilSettled)
		// A job that runs is finished under its terms before the switch.
		j := job(one)
		f.Message(j)
		<-f.engine.asked
		f.publish(next)
		pass(10 * time.Second)
		if _, starts := f.machine.Now(); starts != 1 {
			t.Fatal("the runtime was restarted under a job")
		}
		if f.worker.Status().Slots != 0 {
			t.Error("jobs are taken although the runtime is about to be restarted")
		}
		f.engine.answer <- struct{}{}
		pass(untilSettled)
		f.serves(next)
		if r := last[*wire.Result](f.party); r == nil || r.Code != "" || r.Receipt.Receipt().Measured.ConfigDigest != one.Digest() {
			t.Errorf("result %+v", r)
		}
		// What a rollback needs is kept, and no more.
		if image, model := f.machine.Has(one); !image || !model {
			t.Errorf("the generation before has its image: %v, its model: %v", image, model)
		}
		f.publish(n.Publish(map[string]any{"runtime.image": deploytest.Image(3), "models": []any{deploytest.Model(3)}}))
		pass(untilSettled)
		if image, model := f.machine.Has(one); image || model {
			t.Errorf("the old image (%v) or model (%v) was kept", image, model)
		}
	})
}

// A job that does not end holds up the switch no longer than a job may take.
func TestUpdateDoesNotWaitForEver(t *testing.T) {
	bubble(t, func(t *testing.T, f *fixture, n *deploytest.Network) {
		one, next := two(t, f, n)
		close(f.link.up)
		defer f.run()()
		pass(untilSettled)
		j := job(one)
		j.Deadline = time.Now().Add(one.Config().Limits.Deadline.Duration()).UnixMilli()
		f.Message(j)
		<-f.engine.asked
		f.publish(next)
		pass(one.Config().Limits.Deadline.Duration() + time.Second)
		f.serves(next)
	})
}

// While the new image or model cannot be had, the old deployment serves.
func TestUpdateCannotBeStaged(t *testing.T) {
	for call, closed := range map[string]string{deploytest.EnsureImage: "image", deploytest.EnsureModel: "model"} {
		t.Run(call, func(t *testing.T) {
			bubble(t, func(t *testing.T, f *fixture, n *deploytest.Network) {
				one, next := two(t, f, n)
				defer f.run()()
				pass(untilSettled)
				f.Opened()
				f.Message(&wire.Status{Reason: "it is on another configuration"})
				f.machine.Fail(call, &deploytest.Fault{Err: image.ErrUnsigned})
				f.machine.Calls()
				f.publish(next)
				pass(time.Minute)
				f.serves(one)
				if calls := f.machine.Calls(); slices.Contains(calls, deploytest.Golden) {
					t.Errorf("what serves was disturbed: %q", calls)
				}
				st := f.Status()
				if g := st.Closed(); g == nil || g.Name != closed || !strings.Contains(g.Detail, image.ErrUnsigned.Error()) ||
					!strings.Contains(g.Detail, fmt.Sprintf("version %d", next.Version())) || !strings.Contains(g.Detail, fmt.Sprintf("version %d goes on", one.Version())) {
					t.Errorf("closed: %+v", g)
				}
				// The runtime is lost meanwhile: the old one comes back.
				f.machine.Do(func(m *deploytest.Locked) { m.Crash(false) })
				pass(untilSettled)
				f.serves(one)
				f.machine.Do(func(m *deploytest.Locked) { m.Crash(true) })
				pass(untilSettled)
				f.serves(one)
				f.machine.Fail(call, nil) // and the new one is not given up
				pass(10 * time.Minute)
				f.serves(next)
				if st := f.Status(); slices.ContainsFunc(st.Gates[:6], func(g gate.Gate) bool { return g.State != gate.Open }) {
					t.Errorf("gates %+v", st.Gates)
				}
			})
		})
	}
}

// When the network takes back its trust in who signed what runs, that stops, is
// started by nothing, and comes back with the trust.
func TestTrustTakenBack(t *testing.T) {
	k, err := oci.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	pem, err := k.PublicPEM()
	if err != nil {
		t.Fatal(err)
	}
	bubble(t, func(t *testing.T, f *fixture, n *deploytest.Network) {
		one := n.Publish(nil)
		trusted := one.Config().ImageTrust.Keys
		f.tuf.serve(one, nil)
		stop := f.run()
		pass(untilSettled)
		f.serves(one)
		f.machine.Calls()

		// The new configuration's image cannot be had; the old one's is not good.
		f.machine.Fail(deploytest.EnsureImage, &deploytest.Fault{Err: image.ErrRevoked})
		next := n.Publish(map[string]any{"image_trust.keys": []string{string(pem)}, "image_trust.revoked": trusted})
		f.publish(next)
		pass(untilSettled)
		f.serves(nil)
		if f.book.count(journal.ImageRevoked) == 0 {
			t.Errorf("not said:\n%s", f.book)
		}
		pass(time.Hour)
		if calls := f.machine.Calls(); !slices.Contains(calls, deploytest.Stop) || slices.Contains(calls, deploytest.Start) {
			t.Errorf("it was not stopped, or started: %q", calls)
		}
		t.Logf("expected: %s; got: %s", journal.ImageRevoked.Name, f.gate("image").Detail)
		if st := f.Status(); st.Closed() == nil || st.Closed().Name != "image" {
			t.Errorf("closed: %+v", st.Closed())
		}
		// Nor does systemd's own start bring it back.
		f.machine.Do(func(m *deploytest.Locked) { m.Come() })
		pass(10 * time.Minute)
		f.serves(nil)
		if state, _ := f.machine.Now(); state.Active == "active" {
			t.Error("what systemd has started runs on")
		}

		f.machine.Fail(deploytest.EnsureImage, nil)
		back := n.Publish(map[string]any{"image_trust.keys": trusted, "image_trust.revoked": []string{}})
		f.publish(back)
		pass(untilSettled)
		f.serves(back)
		stop()
	})
}

// What is found wrong with the stored image has it fetched anew, and the runtime
// started from that.
func TestImageAltered(t *testing.T) {
	bubble(t, func(t *testing.T, f *fixture, n *deploytest.Network) {
		s := n.Publish(nil)
		f.tuf.serve(s, nil)
		f.machine.Fail(deploytest.VerifyImage, &deploytest.Fault{Err: fmt.Errorf("x: %w", image.ErrAltered), Times: 1})
		defer f.run()()
		synctest.Wait()
		if calls := f.machine.Calls(); slices.Contains(calls, deploytest.Start) {
			t.Errorf("it was started: %q", calls)
		}
		pass(time.Minute)
		f.serves(s)
		if n := f.book.count(journal.ImageAltered); n != 1 {
			t.Errorf("said %d times:\n%s", n, f.book)
		}
	})
}

// A configuration that does not come up is left for the last good one, and not
// tried again until the network has another one.
func TestUpdateFails(t *testing.T) {
	for call, closed := range map[string]string{deploytest.Start: "runtime", deploytest.Record: "sandbox", deploytest.Golden: "validation"} {
		t.Run(call, func(t *testing.T) {
			bubble(t, func(t *testing.T, f *fixture, n *deploytest.Network) {
				one, next := two(t, f, n)
				defer f.run()()
				pass(untilSettled)
				tries := 0
				f.machine.Fail(call, &deploytest.Fault{Err: errBroken, When: func(m *deploytest.Locked) bool {
					if m.Runs(next) {
						tries++
					}
					return m.Runs(next)
				}})
				f.publish(next)
				pass(untilSettled)
				f.serves(one)
				st := f.Status()
				if g := st.Closed(); g == nil || g.Name != closed || !strings.Contains(g.Detail, "broken") || !strings.Contains(g.Detail, fmt.Sprintf("version %d goes on", one.Version())) {
					t.Errorf("closed: %+v", g)
				}
				_, starts := f.machine.Now()
				pass(time.Hour)
				f.Message(&wire.Update{})
				pass(time.Hour)
				if _, now := f.machine.Now(); tries != 1 || now != starts {
					t.Errorf("%d tries, and %d starts after the fall back", tries, now-starts)
				}
				// Nor when the last good one has to be brought back.
				f.machine.Do(func(m *deploytest.Locked) { m.Crash(false) })
				pass(untilSettled)
				f.serves(one)
				if tries != 1 {
					t.Errorf("%d tries", tries)
				}
				// And both are kept: the one that runs, and what the network lists.
				for _, s := range []*snapshot.Snapshot{one, next} {
					if image, model := f.machine.Has(s); !image || !model {
						t.Errorf("version %d: image %v, model %v", s.Version(), image, model)
					}
				}
				third := n.Publish(map[string]any{"runtime.image": deploytest.Image(3)})
				f.publish(third)
				pass(untilSettled)
				f.serves(third)
				st = f.Status()
				for _, g := range st.Gates[:8] {
					if g.State != gate.Open {
						t.Errorf("%+v", g)
					}
				}
			})
		})
	}
}

// When the last good one does not come up either, the machine is at fault, and
// both get their chance.
func TestNothingComesUp(t *testing.T) {
	bubble(t, func(t *testing.T, f *fixture, n *deploytest.Network) {
		_, next := two(t, f, n)
		defer f.run()()
		pass(untilSettled)
		f.machine.Fail(deploytest.Start, &deploytest.Fault{Err: errBroken})
		f.publish(next)
		pass(30 * time.Minute)
		f.serves(nil)
		if k := deploytest.Count(f.machine.Calls(), deploytest.Start); k < 8 || k > 60 {
			t.Errorf("%d starts in half an hour", k)
		}
		f.machine.Fail(deploytest.Start, nil)
		pass(10 * time.Minute)
		f.serves(next)
	})
}

// A unit that systemd brings up by itself, at last, does not wait for the
// schedule.
func TestComesUpLate(t *testing.T) {
	bubble(t, func(t *testing.T, f *fixture, n *deploytest.Network) {
		s := n.Publish(nil)
		f.tuf.serve(s, nil)
		f.machine.Fail(deploytest.Start, &deploytest.Fault{Err: errBroken})
		defer f.run()()
		pass(5 * time.Minute)
		f.machine.Do(func(m *deploytest.Locked) { m.Come() })
		pass(untilSettled)
		f.serves(s)
	})
}

// A runtime that comes and goes does not keep the network from being asked.
func TestFlappingRuntime(t *testing.T) {
	bubble(t, func(t *testing.T, f *fixture, n *deploytest.Network) {
		s := n.Publish(nil)
		f.tuf.serve(s, nil)
		defer f.run()()
		for range 200 {
			pass(10 * time.Second)
			f.machine.Do(func(m *deploytest.Locked) { m.Crash(true) })
		}
		pass(untilSettled)
		f.serves(s)
		if k := len(f.tuf.calls()); k < 4 || k > 15 {
			t.Errorf("the network was asked %d times in half an hour", k)
		}
	})
}

// The runtime is brought back at once while the network does not answer.
func TestRuntimeLostWithoutNetwork(t *testing.T) {
	bubble(t, func(t *testing.T, f *fixture, n *deploytest.Network) {
		s := n.Publish(nil)
		f.tuf.last = s
		f.tuf.serve(nil, tuf.ErrUnreachable)
		defer f.run()()
		pass(10 * time.Minute)
		asked := len(f.tuf.calls())
		f.machine.Do(func(m *deploytest.Locked) { m.Crash(false) })
		pass(untilSettled)
		f.serves(s)
		if k := len(f.tuf.calls()) - asked; k > 1 {
			t.Errorf("the network was asked %d times for it", k)
		}
	})
}

func TestRegistration(t *testing.T) {
	dir := t.TempDir()
	token := filepath.Join(dir, "token")
	n := deploytest.NewNetwork(t)
	s := n.Publish(nil)
	start := func(t *testing.T, f *fixture) func() {
		f.membership.net.EnrolmentToken = token
		f.tuf.serve(s, nil)
		return f.run()
	}
	closed := func(t *testing.T, f *fixture, detail, remedy string) {
		t.Helper()
		if g := f.gate("registration"); g.State == gate.Open || !strings.Contains(g.Detail, detail) || !strings.Contains(g.Remedy, remedy) {
			t.Errorf("%+v", g)
		}
	}
	m := deploytest.New(t)
	synctest.Test(t, func(t *testing.T) {
		f := build(t, dir, m)
		defer start(t, f)()
		pass(time.Minute)
		closed(t, f, token, "network.testnet.enrolment_token")
		if len(f.enrols) != 0 {
			t.Error("registered without the token")
		}
		for _, bad := range []string{"", " \n", strings.Repeat("x", maxToken+1)} {
			if err := os.WriteFile(token, []byte(bad), 0o600); err != nil {
				t.Fatal(err)
			}
			pass(10 * time.Minute)
			closed(t, f, "holds no token", "network.testnet.enrolment_token")
		}
		// The network refuses; then it does not.
		f.refuse(fmt.Errorf("register: %w", session.ErrToken))
		if err := os.WriteFile(token, []byte("secret\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		pass(time.Hour)
		closed(t, f, "token", "network.testnet.enrolment_token")
		if k := len(f.enrols); k < 8 || k > 24 {
			t.Errorf("%d tries in an hour", k)
		}
		if k := f.book.count(journal.RegisterRefused); k != 3 { // no file, no token, refused
			t.Errorf("logged %d times\n%s", k, f.book)
		}
		if strings.Contains(f.book.String(), "secret") {
			t.Error("the token was logged")
		}
		for err, remedy := range map[error]string{wire.ErrClock: "timedatectl", session.ErrWrongNetwork: "[network.testnet]", wire.ErrSigner: "operator", errBroken: "network.testnet.url"} {
			f.refuse(err)
			pass(10 * time.Minute)
			closed(t, f, err.Error(), remedy)
		}
		if a, b, c := f.book.count(journal.RegisterRefused), f.book.count(journal.RegisterFailed), f.book.count(journal.ClockWrong); a != 5 || b != 1 || c != 1 {
			t.Errorf("logged as refused %d times, as failed %d, as the clock's fault %d\n%s", a, b, c, f.book)
		}
		f.refuse(nil)
		pass(10 * time.Minute)
		if !f.isRegistered() || f.enrols[len(f.enrols)-1].Body.Token != "secret" {
			t.Errorf("not registered, or without the token")
		}
		k := len(f.enrols)
		pass(24 * time.Hour)
		if len(f.enrols) != k {
			t.Error("registered again")
		}
	})
	// Never again, over restarts; the token may be gone by then.
	if err := os.Remove(token); err != nil {
		t.Fatal(err)
	}
	synctest.Test(t, func(t *testing.T) {
		f := build(t, dir, m)
		defer start(t, f)()
		pass(time.Minute)
		if len(f.enrols) != 0 || f.Identity()[0].Account != "acme" {
			t.Errorf("%d registrations, account %q", len(f.enrols), f.Identity()[0].Account)
		}
	})
}

// A registration that the network has and the disk has not is made again.
func TestRegistrationIsNotKept(t *testing.T) {
	bubble(t, func(t *testing.T, f *fixture, n *deploytest.Network) {
		f.tuf.serve(n.Publish(nil), nil)
		if err := f.store.Close(); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		go func() { _ = f.updates(ctx) }()
		pass(time.Minute)
		if f.isRegistered() || f.gate("registration").State == gate.Open {
			t.Error("registered, and it is not kept")
		}
		cancel()
		synctest.Wait()
	})
}

func TestModelStates(t *testing.T) {
	bubble(t, func(t *testing.T, f *fixture, n *deploytest.Network) {
		other := deploytest.Model(9)
		other["name"] = "other"
		s := n.Publish(map[string]any{"models": []any{deploytest.Model(1), other}})
		states := func(want ...string) {
			t.Helper()
			for i, m := range f.Models() {
				if m.State != want[i] {
					t.Errorf("%s is %s, want %s", m.Name, m.State, want[i])
				}
			}
		}
		f.tuf.serve(s, nil)
		var good atomic.Bool
		f.machine.Fail(deploytest.EnsureModel, &deploytest.Fault{Err: errBroken, When: func(*deploytest.Locked) bool { return !good.Load() && f.Models()[0].State == "inactive" }})
		states()
		defer f.run()()
		pass(untilSettled)
		states("inactive", "failed") // the second one cannot be had
		if m := f.Models()[0]; m.Done != m.Bytes || m.Digest != s.Config().Models[0].Digest() {
			t.Errorf("%+v", m)
		}
		good.Store(true)
		pass(time.Minute)
		states("active", "inactive")
		if h := f.heartbeat(); len(h.Models) != 2 || h.Models[0].State != "active" || h.Models[1].State != "inactive" {
			t.Errorf("%+v", h.Models)
		}
		// The next configuration has another model under the name.
		next := n.Publish(map[string]any{"models": []any{deploytest.Model(2)}})
		f.machine.Fail(deploytest.EnsureModel, &deploytest.Fault{Err: errBroken})
		f.publish(next)
		pass(untilSettled)
		states("failed")
		f.board.set(func(b *board) {
			if len(b.models) != 1 {
				t.Errorf("%d models are remembered", len(b.models))
			}
		})
	})
}

// flaky is a watch that ends.
type flaky struct {
	units
	at []time.Time
}

func (f *flaky) Watch(ctx context.Context, _ string, call func()) error {
	f.at = append(f.at, time.Now())
	call()
	if len(f.at) == 8 { // one that lasts
		time.Sleep(time.Hour)
	}
	return errBroken
}

func TestWatchIsTakenUpAgain(t *testing.T) {
	bubble(t, func(t *testing.T, f *fixture, _ *deploytest.Network) {
		defer f.Close()
		w := &flaky{units: f.machine.Units()}
		f.units = w
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- f.watchRuntime(ctx) }()
		pass(2 * time.Hour)
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		gaps(t, w.at[:8])
		if gap := w.at[8].Sub(w.at[7]) - time.Hour; gap > 2*time.Second {
			t.Errorf("%v after a watch that had lasted", gap)
		}
		if len(f.look) != 1 {
			t.Error("nobody looks after a watch that ended")
		}
	})
}

func TestEventsOfErrors(t *testing.T) {
	for _, c := range []struct {
		err  error
		want *journal.Event
	}{
		{errBroken, journal.RuntimeFailed},
		{&deploy.Error{Step: deploy.StepUnit, Err: quadlet.ErrUnsealed}, journal.SandboxRefused},
		{&deploy.Error{Step: deploy.StepStart, Err: &systemd.JobError{}}, journal.RuntimeFailed},
		{&deploy.Error{Step: deploy.StepMachine, Err: fmt.Errorf("%w: x", deploy.ErrDevice)}, journal.DeviceRefused},
		{&deploy.Error{Step: deploy.StepMachine, Err: &deploy.MemoryError{}}, journal.MemoryRefused},
		{&deploy.Error{Step: deploy.StepSandbox, Err: fmt.Errorf("x: %w", sandbox.ErrNotSealed)}, journal.SandboxRefused},
		{&deploy.Error{Step: deploy.StepSandbox, Err: fmt.Errorf("x: %w", deploy.ErrDrifted)}, journal.SandboxDrifted},
		{&deploy.Error{Step: deploy.StepSandbox, Err: fmt.Errorf("x: %w", deploy.ErrUnrecorded)}, journal.SandboxUnrecorded},
		{&deploy.Error{Step: deploy.StepValidate, Err: errBroken}, journal.ValidationFailed},
		{&deploy.Error{Step: deploy.StepImage, Err: errBroken}, journal.ImageFailed},
		{&deploy.Error{Step: deploy.StepModel, Err: errBroken}, journal.ModelFailed},
	} {
		if got := eventOf(c.err); got != c.want {
			t.Errorf("%v: %s, want %s", c.err, got.Name, c.want.Name)
		}
	}
}

// Each reason to refuse an image or a model has an event of its own, which is none
// of those for what may pass by itself, and status says what to do about it.
func TestRefusalsAreToldApart(t *testing.T) {
	for step, reasons := range map[deploy.Step]map[string][]error{
		deploy.StepImage: {
			"image-unsigned-refused":   {image.ErrUnsigned},
			"image-signer-refused":     {image.ErrWrongKey},
			"image-expired-refused":    {image.ErrExpired},
			"image-revoked-refused":    {image.ErrRevoked},
			"image-digest-refused":     {image.ErrOtherDigest},
			"image-repository-refused": {image.ErrIdentity},
			"image-bytes-refused":      {image.ErrOtherBytes},
			"image-manifest-refused":   {image.ErrManifest},
			"image-platform-refused":   {image.ErrPlatform},
			"image-oversize-refused":   {image.ErrTooLarge},
			"image-altered-refused":    {image.ErrAltered},
			"image-keys-refused":       {image.ErrKeys},
			"image-refused":            {podman.ErrRefused},
			"image-other-refused":      {podman.ErrOtherImage, image.ErrOtherImage},
		},
		deploy.StepModel: {
			"model-refused":           {digest.ErrMismatch},
			"model-code-refused":      {format.ErrCode},
			"model-format-refused":    {format.ErrMagic, format.ErrHeader, format.ErrTensors},
			"model-parts-refused":     {format.ErrParts},
			"model-signer-refused":    {signature.ErrKey},
			"model-signature-refused": {signature.ErrMalformed, signature.ErrStatement, signature.ErrFiles},
			"model-space-refused":     {&model.NoSpaceError{}},
		},
		deploy.StepMachine: {
			"memory-refused": {&deploy.MemoryError{}},
			"device-refused": {deploy.ErrDevice},
		},
	} {
		for want, errs := range reasons {
			for _, err := range errs {
				if step == deploy.StepModel && want != "model-refused" && want != "model-space-refused" {
					err = fmt.Errorf("%w: %w", model.ErrRefused, err)
				}
				e := &deploy.Error{Step: step, Err: fmt.Errorf("x: %w", err)}
				if got := eventOf(e).Name; got != want {
					t.Errorf("%v: %s, want %s", err, got, want)
				}
				if r := remedyOfStep(e); r == "" || r == remedyOfStep(&deploy.Error{Step: step, Err: errBroken}) && step != deploy.StepMachine {
					t.Errorf("%v: status says what it says of anything: %q", err, r)
				}
			}
		}
	}
}
