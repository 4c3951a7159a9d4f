package agent

import (
	"context"
	"errors"
	"fmt"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/resultity/node/internal/control"
	"github.com/resultity/node/internal/deploy/deploytest"
	"github.com/resultity/node/internal/gate"
	"github.com/resultity/node/internal/generation"
	"github.com/resultity/node/internal/journal"
	"github.com/resultity/node/internal/model"
	"github.com/resultity/node/internal/podman"
	"github.com/resultity/node/internal/quadlet"
	"github.com/resultity/node/internal/runtime"
	"github.com/resultity/node/internal/snapshot"
	"github.com/resultity/node/internal/systemd"
	"github.com/resultity/node/internal/tuf"
)

// lives runs agents one after the other in one directory, each in a bubble of
// its own, as restarts do.
type lives struct {
	dir     string
	n       *deploytest.Network
	machine *deploytest.Machine
}

func newLives(t *testing.T) *lives {
	return &lives{t.TempDir(), deploytest.NewNetwork(t), deploytest.New(t)}
}

// live runs an agent that the network answers with s; nil is no network.
func (l *lives) live(t *testing.T, s *snapshot.Snapshot, during func(f *fixture)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		f := build(t, l.dir, l.machine)
		f.tuf.last = s
		f.tuf.serve(s, nil)
		if s == nil {
			f.tuf.serve(nil, tuf.ErrUnreachable)
		}
		defer f.run()()
		pass(untilSettled)
		during(f)
	})
}

// reboot loses what a reboot loses.
func (l *lives) reboot() { l.machine.Do((*deploytest.Locked).Reboot) }

func (f *fixture) states() string {
	var b strings.Builder
	gs := f.Generations()
	for _, g := range gs.Generations {
		fmt.Fprintf(&b, "%d %s; ", g.Number, g.State)
	}
	fmt.Fprintf(&b, "current %d", gs.Current)
	return b.String()
}

func (f *fixture) stands(want string) {
	f.t.Helper()
	if got := f.states(); got != want {
		f.t.Errorf("%s; want %s\n%s", got, want, f.book)
	}
}

// bad makes a configuration fail at a call for as long as it lasts.
func (l *lives) bad(call string, err error, s *snapshot.Snapshot) (tries *int) {
	tries = new(int)
	l.machine.Fail(call, &deploytest.Fault{Err: err, When: func(m *deploytest.Locked) bool {
		if m.Runs(s) {
			*tries++
		}
		return m.Runs(s)
	}})
	return tries
}

func (l *lives) two() (one, next *snapshot.Snapshot) {
	return l.n.Publish(nil), l.n.Publish(map[string]any{"runtime.image": deploytest.Image(2), "models": []any{deploytest.Model(2)}})
}

// A generation that fails is left for the one before, is dead, and stays so over
// a reboot; the network is told why.
func TestRollbackSurvivesReboot(t *testing.T) {
	l := newLives(t)
	one, next := l.two()
	l.live(t, one, func(f *fixture) { f.serves(one); f.stands("1 healthy; current 1") })
	tries := l.bad(deploytest.Golden, &runtime.GoldenError{Name: "sum"}, next)
	l.live(t, next, func(f *fixture) {
		f.serves(one)
		f.stands("1 healthy; 2 dead; current 1")
		if h := f.heartbeat(); h.Config != one.Digest() || h.Failed == nil || h.Failed.Config != next.Digest() || h.Failed.Step != "validation" || !h.Failed.Final || h.Failed.Reason == "" {
			t.Errorf("the network is told %+v", h.Failed)
		}
		for _, e := range []*journal.Event{journal.GenerationStaged, journal.GenerationFailed, journal.GenerationDead} {
			if f.book.count(e) != 1 {
				t.Errorf("event %s: %d times\n%s", e.Name, f.book.count(e), f.book)
			}
		}
		g, err := f.Generation(2)
		var names []string
		for _, p := range g.Phases {
			names = append(names, p.Name)
		}
		if want := []string{"stage", "drain", "stop", "start", "seal", "validate"}; err != nil || !slices.Equal(names, want) {
			t.Errorf("phases %q, %v", names, err)
		}
	})
	l.reboot()
	for _, s := range []*snapshot.Snapshot{nil, next} { // without the network, and with it
		l.live(t, s, func(f *fixture) {
			f.serves(one)
			pass(2 * time.Hour)
			f.serves(one)
			if s != nil {
				if g := f.gate("validation"); g.State == gate.Open || !strings.Contains(g.Remedy, "generations forward") {
					t.Errorf("%+v", g)
				}
				if h := f.heartbeat(); h.Failed == nil {
					t.Error("the network is not told after a restart")
				}
			}
		})
	}
	if *tries != 1 {
		t.Errorf("%d tries, over a reboot", *tries)
	}
	// The operator may have it tried once more.
	l.machine.Fail(deploytest.Golden, nil)
	l.live(t, next, func(f *fixture) {
		f.serves(one)
		if err := f.Forward(f.t.Context()); err != nil {
			t.Fatal(err)
		}
		pass(untilSettled)
		f.serves(next)
		if f.heartbeat().Failed != nil {
			t.Error("a failure is told that was mended")
		}
	})
}

// What this machine is to blame for is tried again, not too often.
func TestMachineFaultsAreTriedAgain(t *testing.T) {
	for name, err := range map[string]error{
		"memory": &systemd.JobError{Verb: "start", Unit: quadlet.ServiceName, Outcome: "failed", State: systemd.State{Result: "oom-kill"}},
		"bus":    systemd.ErrLost,
	} {
		t.Run(name, func(t *testing.T) {
			l := newLives(t)
			one, next := l.two()
			l.live(t, one, func(f *fixture) {
				tries := l.bad(deploytest.Start, err, next)
				f.publish(next)
				pass(time.Second)
				f.serves(one)
				f.stands("1 healthy; 2 failed; current 1")
				if h := f.heartbeat(); h.Failed == nil || h.Failed.Final {
					t.Errorf("%+v", h.Failed)
				}
				pass(10 * time.Hour)
				if *tries < 8 || *tries > 30 {
					t.Errorf("%d tries in 10 hours", *tries)
				}
				f.serves(one)
				l.machine.Fail(deploytest.Start, nil)
				pass(2 * time.Hour)
				f.serves(next)
				f.stands("1 healthy; 2 healthy; current 2")
			})
		})
	}
}

// A unit that breaks the rules never replaces what serves.
func TestRefusedUnitIsDeadAtOnce(t *testing.T) {
	l := newLives(t)
	one, next := l.two()
	l.live(t, one, func(f *fixture) {
		f.publish(next)
		l.machine.Fail(deploytest.Devices, &deploytest.Fault{Err: quadlet.ErrUnsealed})
		pass(untilSettled)
		l.machine.Calls()
		pass(time.Hour)
		f.serves(one)
		f.stands("1 healthy; 2 dead; current 1")
		if c := l.machine.Calls(); slices.Contains(c, deploytest.EnsureImage) || slices.Contains(c, deploytest.Stop) {
			t.Errorf("calls %q", c)
		}
	})
}

// The agent is killed at each step of a switch: the next one comes up with the
// old or the new, and ends at the new.
func TestKilledInASwitch(t *testing.T) {
	for _, call := range []string{
		deploytest.EnsureImage, deploytest.EnsureModel, deploytest.Info, deploytest.Devices, deploytest.WarmModel, deploytest.Install, deploytest.Start,
		deploytest.Container, deploytest.Look, deploytest.Record, deploytest.Golden, deploytest.RetainImages, deploytest.RetainModels,
	} {
		for _, late := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s late=%v", call, late), func(t *testing.T) {
				l := newLives(t)
				one, next := l.two()
				l.live(t, one, func(f *fixture) { f.serves(one) })
				synctest.Test(t, func(t *testing.T) {
					f := build(t, l.dir, l.machine)
					f.tuf.last = one
					f.tuf.serve(one, nil)
					ctx, kill := context.WithCancel(t.Context())
					defer kill()
					f.recall()
					done := make(chan struct{})
					go func() { _ = f.updates(ctx); close(done) }()
					pass(untilSettled)
					f.serves(one)
					l.machine.Fail(call, &deploytest.Fault{Err: errors.New("killed"), Late: late, Times: 1, Also: func(*deploytest.Locked) { kill() }})
					f.learn(next)
					poke(f.look)
					<-done
					synctest.Wait()
					if err := f.Close(); err != nil {
						t.Error(err)
					}
				})
				l.machine.Fail(call, nil)
				// Without the network, what is current on disk is served.
				l.live(t, nil, func(f *fixture) {
					v := f.gens.View()
					if v.Current == 1 {
						f.serves(one)
					} else {
						f.serves(next)
					}
				})
				l.live(t, next, func(f *fixture) {
					pass(time.Minute)
					f.serves(next)
					f.stands("1 healthy; 2 healthy; current 2")
				})
			})
		}
	}
}

// A generation that takes the machine down with it is left after a few times.
func TestTrialThatNeverEnds(t *testing.T) {
	l := newLives(t)
	one, next := l.two()
	l.live(t, one, func(f *fixture) { f.serves(one) })
	tries := 0
	l.machine.Fail(deploytest.Start, &deploytest.Fault{Block: true, When: func(m *deploytest.Locked) bool {
		if m.Runs(next) {
			tries++
		}
		return m.Runs(next)
	}})
	trial := func(f *fixture) { f.stands("1 healthy; 2 trial; current 2") }
	// An agent that is told to end, as by an upgrade, is no reason to leave it.
	for range generation.Trials + 1 {
		l.live(t, next, trial)
	}
	tries = 0
	for range generation.Trials {
		dir := filepath.Join(l.dir, "generations")
		l.live(t, next, func(f *fixture) {
			trial(f)
			if err := os.Rename(dir, dir+".away"); err != nil { // as a crash, it writes nothing any more
				t.Fatal(err)
			}
		})
		if err := os.Rename(dir+".away", dir); err != nil {
			t.Fatal(err)
		}
	}
	if tries != generation.Trials {
		t.Errorf("%d tries", tries)
	}
	l.live(t, next, func(f *fixture) {
		pass(2 * time.Second)
		f.serves(one)
		f.stands("1 healthy; 2 dead; current 1")
	})
	if tries != generation.Trials {
		t.Errorf("%d tries", tries)
	}
}

// What does not come up in its time is given up.
func TestNotHealthyInTime(t *testing.T) {
	l := newLives(t)
	one, next := l.two()
	l.live(t, one, func(f *fixture) {
		l.machine.Fail(deploytest.Start, &deploytest.Fault{Block: true, When: func(m *deploytest.Locked) bool { return m.Runs(next) }})
		f.publish(next)
		pass(untilSettled)
		f.serves(nil)
		pass(20 * time.Minute)
		f.serves(one)
		f.stands("1 healthy; 2 dead; current 1")
	})
}

// A download that takes hours holds up nothing: the runtime is watched, and a
// newer configuration ends it.
func TestSlowStaging(t *testing.T) {
	l := newLives(t)
	one, next := l.two()
	third := l.n.Publish(map[string]any{"runtime.image": deploytest.Image(3), "models": []any{deploytest.Model(3)}})
	l.live(t, one, func(f *fixture) {
		l.machine.Fail(deploytest.EnsureModel, &deploytest.Fault{Block: true})
		f.publish(next)
		pass(time.Hour)
		f.serves(one)
		for _, again := range []bool{true, false} {
			l.machine.Do(func(m *deploytest.Locked) { m.Crash(again) })
			pass(untilSettled)
			f.serves(one)
		}
		l.machine.Fail(deploytest.EnsureModel, nil)
		pass(time.Hour)
		f.serves(one) // the call from before still hangs
		f.publish(third)
		pass(untilSettled)
		f.serves(third)
		f.stands("1 healthy; 2 healthy; current 2")
	})
}

// Stagings of one network come one after the other, also where Podman takes its time
// to give one up.
func TestOneStagingAtATime(t *testing.T) {
	l := newLives(t)
	one, next := l.two()
	synctest.Test(t, func(t *testing.T) {
		f := build(t, l.dir, l.machine)
		var running, tries atomic.Int32
		release, open := make(chan struct{}), f.openDeployer
		f.openDeployer = func(ctx context.Context) (deployer, error) {
			if tries.Add(1); running.Add(1) > 1 {
				t.Error("two at once")
			}
			defer running.Add(-1)
			<-release
			return open(ctx)
		}
		f.tuf.serve(one, nil)
		defer f.run()()
		pass(untilSettled)
		f.publish(next)
		pass(untilSettled)
		if k := tries.Load(); k != 1 {
			t.Errorf("%d stagings", k)
		}
		close(release)
		pass(untilSettled)
		f.serves(next)
	})
}

// What could not be removed at a switch is removed later.
func TestCleaningIsCertain(t *testing.T) {
	l := newLives(t)
	one, next := l.two()
	third := l.n.Publish(map[string]any{"runtime.image": deploytest.Image(3), "models": []any{deploytest.Model(3)}})
	l.live(t, one, func(f *fixture) {
		f.publish(next)
		pass(untilSettled)
		l.machine.Fail(deploytest.RetainImages, &deploytest.Fault{Err: podman.ErrUnavailable, Times: 1})
		f.publish(third)
		pass(untilSettled)
		f.serves(third)
		if image, _ := l.machine.Has(one); !image {
			t.Fatal("removed by a Podman that does not answer")
		}
		pass(10 * time.Minute)
		if image, _ := l.machine.Has(one); image {
			t.Error("it is still there")
		}
		if image, _ := l.machine.Has(next); !image {
			t.Error("the generation before has lost its image")
		}
	})
}

// A Podman that is long about removing an image holds up nobody but the removal.
func TestCleaningIsBounded(t *testing.T) {
	l := newLives(t)
	one, next := l.two()
	third := l.n.Publish(map[string]any{"runtime.image": deploytest.Image(3)})
	l.live(t, one, func(f *fixture) {
		l.machine.Fail(deploytest.RetainImages, &deploytest.Fault{Block: true})
		f.publish(next)
		pass(cleanPatience / 2)
		f.publish(third)
		pass(cleanPatience)
		f.serves(third)
	})
}

// Configurations that fail before anything is switched leave a few records, not
// as many as the network can publish.
func TestFewOfThoseThatFail(t *testing.T) {
	l := newLives(t)
	one := l.n.Publish(nil)
	l.live(t, one, func(f *fixture) {
		l.machine.Fail(deploytest.Devices, &deploytest.Fault{Err: quadlet.ErrUnsealed})
		for i := range 9 {
			f.publish(l.n.Publish(map[string]any{"runtime.image": deploytest.Image(10 + i)}))
			pass(untilSettled)
		}
		f.serves(one)
		if k := len(f.Generations().Generations); k > 7 {
			t.Errorf("%d are kept: %s", k, f.states())
		}
	})
}

// A start of the runtime that nobody has looked at gets no job, also while the
// update loop is busy with something else.
func TestRestartedRuntimeGetsNoJobs(t *testing.T) {
	l := newLives(t)
	one := l.n.Publish(nil)
	l.machine.Fail(deploytest.RetainImages, &deploytest.Fault{Block: true}) // the loop hangs here
	l.live(t, one, func(f *fixture) {
		if f.worker.Status().Slots == 0 {
			t.Fatal("it does not serve")
		}
		l.machine.Do(func(m *deploytest.Locked) { m.Crash(true) })
		synctest.Wait()
		if k := f.worker.Status().Slots; k != 0 {
			t.Errorf("%d slots on a start that nobody has looked at", k)
		}
	})
}

// A look at an older state does not keep the node from its jobs.
func TestFalseAlarm(t *testing.T) {
	l := newLives(t)
	one := l.n.Publish(nil)
	l.live(t, one, func(f *fixture) {
		f.door.check(f.worker, systemd.State{Active: "active", InvocationID: "of before"})
		if f.worker.Status().Slots != 0 {
			t.Error("jobs for another start")
		}
		poke(f.look)
		synctest.Wait()
		f.serves(one)
		if f.book.count(journal.RuntimeLost) != 0 {
			t.Error("lost")
		}
	})
}

// A start that is seen while the loop looks at the one before stays shut out.
func TestAlarmInALook(t *testing.T) {
	l := newLives(t)
	one := l.n.Publish(nil)
	l.live(t, one, func(f *fixture) {
		seen := false
		l.machine.Fail(deploytest.State, &deploytest.Fault{Late: true, Times: 1, Also: func(*deploytest.Locked) {
			seen = true
			f.door.check(f.worker, systemd.State{Active: "active", InvocationID: "of after"})
		}})
		l.machine.Fail(deploytest.Look, &deploytest.Fault{Block: true}) // nothing is validated from here on
		poke(f.look)
		synctest.Wait()
		if k := f.worker.Status().Slots; !seen || k != 0 {
			t.Errorf("%d slots for a start that nobody has looked at", k)
		}
	})
}

// What is current is on disk: neither the network nor the cache is needed.
func TestStartFromGeneration(t *testing.T) {
	l := newLives(t)
	one, next := l.two()
	l.live(t, one, func(f *fixture) { f.serves(one) })
	l.live(t, next, func(f *fixture) { f.serves(next) })
	l.reboot()
	l.live(t, nil, func(f *fixture) {
		f.serves(next)
		if g := f.gate("configuration"); g.State != gate.Open {
			t.Errorf("%+v", g)
		}
	})
	// Damaged, the one before does.
	name := filepath.Join(l.dir, "generations/2/proof")
	if err := errors.Join(os.Chmod(name, 0o600), os.Truncate(name, 3)); err != nil {
		t.Fatal(err)
	}
	l.reboot()
	l.live(t, nil, func(f *fixture) {
		f.serves(one)
		if f.book.count(journal.GenerationBroken) != 1 {
			t.Errorf("not said:\n%s", f.book)
		}
	})
	// Forged, too: the right digests over something that nobody has signed.
	s, err := generation.Open(filepath.Join(l.dir, "generations"), time.Now)
	if err != nil {
		t.Fatal(err)
	}
	n, err := s.Add(generation.Content{Config: next.Digest(), Proof: []byte("mine")})
	if err == nil {
		err = s.Begin(n)
	}
	if err == nil {
		_, err = s.Passed(n, nil)
	}
	if err != nil {
		t.Fatal(err)
	}
	l.live(t, nil, func(f *fixture) { f.serves(one) })
	l.live(t, next, func(f *fixture) { f.serves(next) })
}

// The operator goes back; that stays, over restarts, until the network has
// another configuration.
func TestOperatorRollsBack(t *testing.T) {
	l := newLives(t)
	one, next := l.two()
	l.live(t, one, func(f *fixture) {
		if err := f.Rollback(f.t.Context(), 0); !errors.Is(err, control.ErrRefused) {
			t.Errorf("nothing to go back to: %v", err)
		}
		f.publish(next)
		pass(untilSettled)
		f.serves(next)
		for _, n := range []int{2, 7} {
			if err := f.Rollback(f.t.Context(), n); !errors.Is(err, control.ErrRefused) {
				t.Errorf("to %d: %v", n, err)
			}
		}
		if err := f.Rollback(f.t.Context(), 0); err != nil {
			t.Fatal(err)
		}
		pass(untilSettled)
		f.serves(one)
		pass(time.Hour)
		f.serves(one)
		if g := f.gate("configuration"); g.State == gate.Open || !strings.Contains(g.Detail, "generation 1") || !strings.Contains(g.Remedy, "forward") {
			t.Errorf("%+v", g)
		}
		if f.heartbeat().Failed != nil {
			t.Error("what the operator put aside has not failed")
		}
	})
	l.reboot()
	l.live(t, nil, func(f *fixture) { f.serves(one) })
	l.live(t, next, func(f *fixture) {
		f.serves(one)
		if err := f.Forward(f.t.Context()); err != nil {
			t.Fatal(err)
		}
		pass(untilSettled)
		f.serves(next)
		if err := f.Rollback(f.t.Context(), 1); err != nil {
			t.Fatal(err)
		}
		pass(untilSettled)
		f.serves(one)
		third := l.n.Publish(map[string]any{"runtime.image": deploytest.Image(3)})
		f.publish(third)
		pass(untilSettled)
		f.serves(third)
		if g := f.gate("configuration"); g.State != gate.Open {
			t.Errorf("%+v", g)
		}
	})
}

// A rollback that does not come up goes back to where it came from.
func TestRollbackFails(t *testing.T) {
	l := newLives(t)
	one, next := l.two()
	l.live(t, one, func(f *fixture) {
		f.publish(next)
		pass(untilSettled)
		l.bad(deploytest.Golden, &runtime.GoldenError{Name: "sum"}, one)
		if err := f.Rollback(f.t.Context(), 1); err != nil {
			t.Fatal(err)
		}
		pass(time.Minute)
		f.serves(next)
		f.stands("1 dead; 2 healthy; current 2")
	})
}

// Where there is room for one model only, the generation before is given up.
func TestNoRoomForTwoModels(t *testing.T) {
	l := newLives(t)
	one, next := l.two()
	third := l.n.Publish(map[string]any{"runtime.image": deploytest.Image(3), "models": []any{deploytest.Model(3)}})
	l.live(t, one, func(f *fixture) {
		f.publish(next)
		pass(untilSettled)
		l.machine.Fail(deploytest.EnsureModel, &deploytest.Fault{Err: &model.NoSpaceError{Need: 2, Free: 1}, When: func(m *deploytest.Locked) bool { return m.Models() > 1 }})
		f.publish(third)
		pass(untilSettled)
		f.serves(third)
		if image, model := l.machine.Has(one); image || model {
			t.Error("the generation before was kept")
		}
	})
}

// The next model is read into memory before the switch, as far as there is room
// beside the one that serves.
func TestWarm(t *testing.T) {
	for memory, want := range map[int64]bool{1 << 30: true, 500: false, 0: false} {
		l := newLives(t)
		one, next := l.two()
		l.live(t, one, func(f *fixture) {
			f.memory = func() int64 { return memory }
			l.machine.Calls()
			f.publish(next)
			pass(untilSettled)
			f.serves(next)
			calls := l.machine.Calls()
			if at := slices.Index(calls, deploytest.WarmModel); (at >= 0) != want || at > slices.Index(calls, deploytest.Install) {
				t.Errorf("%d bytes free: calls %q", memory, calls)
			}
		})
	}
}

// A drain lasts no longer than the last job that runs may.
func TestDrainDeadline(t *testing.T) {
	bubble(t, func(t *testing.T, f *fixture, n *deploytest.Network) {
		one, next := two(t, f, n)
		close(f.link.up)
		defer f.run()()
		pass(untilSettled)
		j := job(one)
		j.Deadline = time.Now().Add(10 * time.Second).UnixMilli()
		f.Message(j)
		<-f.engine.asked
		f.publish(next)
		pass(11 * time.Second)
		f.serves(next)
		g, err := f.Generation(0)
		if err != nil || g.Number != 2 {
			t.Fatalf("%+v, %v", g, err)
		}
		for _, p := range g.Phases {
			if p.Name == "drain" && (p.TookMS < 9000 || p.TookMS > 10_000) {
				t.Errorf("the drain took %d ms", p.TookMS)
			}
		}
		if f.book.count(journal.GenerationPhase) < 5 || !strings.Contains(f.book.String(), "phase=drain took_ms=") {
			t.Errorf("phases are not logged:\n%s", f.book)
		}
		rec := httptest.NewRecorder()
		f.Metrics().ServeHTTP(rec, httptest.NewRequestWithContext(t.Context(), "GET", "/metrics", nil))
		for _, line := range []string{`resultity_generation_current 2`, `resultity_generation_phase_seconds{generation="2",phase="drain"} `, `resultity_gate_open{gate="identity",network=""} 1`, `resultity_runtime_state{network="testnet",state="active"} 1`, `resultity_generation_state{generation="1",state="healthy"} 1`} {
			if !strings.Contains(rec.Body.String(), line) {
				t.Errorf("no %s in\n%s", line, rec.Body)
			}
		}
		if st := f.Status(); st.Current == nil || st.Current.Number != 2 || len(st.Current.Phases) < 5 {
			t.Errorf("status %+v", st.Current)
		}
	})
}

// A disk that takes no generation leaves alone what serves, and is asked again.
func TestGenerationCannotBeWritten(t *testing.T) {
	l := newLives(t)
	one, next := l.two()
	l.live(t, one, func(f *fixture) {
		dir := filepath.Join(l.dir, "generations")
		if err := os.Rename(dir, dir+".away"); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(dir, []byte("not a directory"), 0o600); err != nil {
			t.Fatal(err)
		}
		f.publish(next)
		pass(10 * time.Minute)
		f.serves(one)
		if err := errors.Join(os.Remove(dir), os.Rename(dir+".away", dir)); err != nil {
			t.Fatal(err)
		}
		pass(10 * time.Minute)
		f.serves(next)
	})
}
