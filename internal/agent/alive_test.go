package agent

import (
	"errors"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/resultity/node/internal/deploy/deploytest"
	"github.com/resultity/node/internal/gate"
	"github.com/resultity/node/internal/journal"
	"github.com/resultity/node/internal/openai"
	"github.com/resultity/node/internal/systemd"
	"github.com/resultity/node/internal/wire"
)

// garble has the engine fail jobs until it gets no more, and looks at once
// whether it does.
func (f *fixture) garble() {
	f.t.Helper()
	s := f.board.snapshot()
	for range 3 {
		f.Message(job(s))
		synctest.Wait()
	}
	last[*wire.Heartbeat](f.party) // nobody else reads what is sent
}

func (f *fixture) fails(err error) {
	f.engine.mu.Lock()
	defer f.engine.mu.Unlock()
	f.engine.fails = err
}

// An engine that answers garbage is found although it looks alive: it is
// validated, restarted when that does not help, and left alone for longer each
// time when that does not help either.
func TestEngineThatAnswersGarbage(t *testing.T) {
	serving(t, func(t *testing.T, f *fixture) {
		s := f.board.snapshot()
		f.fails(&openai.OutputError{Reason: openai.ReasonJSON})
		looked := 0
		f.machine.Fail(deploytest.Golden, &deploytest.Fault{Late: true, Also: func(*deploytest.Locked) {
			looked++
			if k := f.worker.Status().Slots; k != 0 {
				t.Errorf("%d slots while it is validated", k)
			}
		}})
		_, before := f.machine.Now()

		// The first time, the right answers are enough.
		f.garble()
		pass(time.Second)
		f.serves(s)
		if _, now := f.machine.Now(); now != before || looked == 0 || f.book.count(journal.RuntimeSuspect) != 1 {
			t.Fatalf("%d starts, looked %d times\n%s", now-before, looked, f.book)
		}
		// The second time, it is started anew.
		f.garble()
		pass(time.Second)
		f.serves(s)
		if _, now := f.machine.Now(); now != before+1 || f.book.count(journal.RuntimeReplaced) != 1 {
			t.Fatalf("%d starts\n%s", now-before, f.book)
		}
		// Then it waits, longer each time, and says why.
		for _, wait := range []time.Duration{time.Minute, 5 * time.Minute, 15 * time.Minute, time.Hour, time.Hour} {
			f.garble()
			pass(wait/2 - time.Second)
			last[*wire.Heartbeat](f.party)
			f.serves(nil)
			g := f.gate("validation")
			t.Logf("out of service for %v: expected: engine_output; got: %s", wait, g.Detail)
			if g.State == gate.Open || !strings.Contains(g.Detail, "job after job") || !strings.Contains(g.Detail, "engine_output") {
				t.Errorf("%+v", g)
			}
			for end := time.Now().Add(wait + 2*time.Second); f.worker.Status().Slots == 0 && time.Now().Before(end); {
				pass(10 * time.Second)
				last[*wire.Heartbeat](f.party)
			}
			f.serves(s)
		}
		// After a quiet time it begins at the front.
		_, before = f.machine.Now()
		pass(doubtWindow)
		f.garble()
		pass(time.Second)
		f.serves(s)
		if _, now := f.machine.Now(); now != before {
			t.Errorf("%d starts", now-before)
		}
	})
}

// One that is wrong also when it is validated is started anew at once.
func TestSuspectEngineIsWrong(t *testing.T) {
	serving(t, func(t *testing.T, f *fixture) {
		s := f.board.snapshot()
		_, before := f.machine.Now()
		f.fails(errBroken)
		f.machine.Fail(deploytest.Golden, &deploytest.Fault{Err: errBroken, Times: 1})
		f.garble()
		pass(time.Second)
		f.serves(s)
		if _, now := f.machine.Now(); now != before+1 || f.book.count(journal.RuntimeReplaced) != 1 || f.book.count(journal.ValidationFailed) != 1 {
			t.Errorf("%d starts\n%s", now-before, f.book)
		}
	})
}

// A suspicion of a runtime that was lost meanwhile is none of the next one.
func TestSuspectAndLost(t *testing.T) {
	serving(t, func(t *testing.T, f *fixture) {
		s := f.board.snapshot()
		f.fails(errBroken)
		f.machine.Do(func(m *deploytest.Locked) { m.Crash(true) })
		for range 3 { // still of the old one
			f.Message(job(s))
		}
		pass(untilSettled)
		f.fails(nil)
		f.serves(s)
		if f.book.count(journal.RuntimeReplaced) != 0 {
			t.Errorf("%s", f.book)
		}
	})
}

// A runtime that ends again and again is left alone for longer each time, and
// says so; systemd's own starts are used up.
func TestRestartStorm(t *testing.T) {
	storm := func(m *deploytest.Locked) { m.Storm(1, "engine ended with exit code 1") }
	quiet := func(t *testing.T, f *fixture, d time.Duration) {
		t.Helper()
		f.machine.Calls()
		pass(d)
		if c := f.machine.Calls(); slices.Contains(c, deploytest.Start) || slices.Contains(c, deploytest.ResetFailed) {
			t.Errorf("not left alone: %q", c)
		}
		f.serves(nil)
		g := f.gate("runtime")
		if f.book.count(journal.RuntimeStorm) == 1 {
			t.Logf("expected: %s, and no start for a while; got: %s", journal.RuntimeStorm.Name, g.Detail)
		}
		for _, want := range []string{"ended 10 times within 10m0s", "last exit status 1", "engine ended with exit code 1"} {
			if g.State == gate.Open || !strings.Contains(g.Detail, want) {
				t.Errorf("%+v, want %q", g, want)
			}
		}
		if !strings.Contains(g.Remedy, "resultityctl restart") {
			t.Errorf("remedy %q", g.Remedy)
		}
	}
	t.Run("heals by itself", func(t *testing.T) {
		serving(t, func(t *testing.T, f *fixture) {
			s := f.board.snapshot()
			for i, wait := range []time.Duration{5 * time.Minute, 10 * time.Minute, 20 * time.Minute, 40 * time.Minute, time.Hour, time.Hour} {
				f.machine.Do(storm)
				pass(time.Second)
				quiet(t, f, wait/2-2*time.Second)
				pass(wait + 2*time.Second)
				last[*wire.Heartbeat](f.party)
				f.serves(s)
				if k := f.book.count(journal.RuntimeStorm); k != i+1 {
					t.Errorf("said %d times, want %d", k, i+1)
				}
			}
		})
	})
	t.Run("heals by the operator's word", func(t *testing.T) {
		serving(t, func(t *testing.T, f *fixture) {
			f.machine.Do(storm)
			pass(time.Second)
			quiet(t, f, time.Minute)
			if err := f.Restart(t.Context()); err != nil {
				t.Fatal(err)
			}
			pass(time.Second)
			f.serves(f.board.snapshot())
			// It is a way to restart one that works, too.
			_, before := f.machine.Now()
			if err := f.Restart(t.Context()); err != nil {
				t.Fatal(err)
			}
			pass(time.Second)
			f.serves(f.board.snapshot())
			if _, now := f.machine.Now(); now != before+1 {
				t.Errorf("%d starts", now-before)
			}
		})
	})
	t.Run("heals by a new configuration", func(t *testing.T) {
		bubble(t, func(t *testing.T, f *fixture, n *deploytest.Network) {
			f.tuf.serve(n.Publish(nil), nil)
			defer f.run()()
			pass(untilSettled)
			f.machine.Do(storm)
			pass(time.Second)
			quiet(t, f, time.Minute)
			s := n.Publish(map[string]any{"runtime.image": deploytest.Image(2)})
			f.tuf.serve(s, nil)
			poke(f.update)
			pass(time.Second)
			f.serves(s)
		})
	})
	t.Run("an agent that starts tries at once", func(t *testing.T) {
		bubble(t, func(t *testing.T, f *fixture, n *deploytest.Network) {
			s := n.Publish(nil)
			f.tuf.serve(s, nil)
			f.machine.Do(storm)
			defer f.run()()
			pass(untilSettled)
			f.serves(s)
			t.Logf("expected: the runtime is up; got: %s", f.gate("runtime").Detail)
		})
	})
}

// Why a runtime was lost stands in the journal by its name.
func TestLossesByName(t *testing.T) {
	for _, c := range []struct {
		result string
		status int
		want   *journal.Event
	}{
		{"oom-kill", 137, journal.MemoryExceeded},
		{"exit-code", 77, journal.SandboxRefused},
		{"exit-code", 1, journal.RuntimeLost},
		{"watchdog", 77, journal.RuntimeLost},
	} {
		serving(t, func(t *testing.T, f *fixture) {
			f.machine.Do(func(m *deploytest.Locked) { m.End(c.result, c.status, "words") })
			pass(untilSettled)
			f.serves(f.board.snapshot())
			if f.book.count(c.want) != 1 {
				t.Errorf("%s, %d: no %s\n%s", c.result, c.status, c.want.Name, f.book)
			}
		})
	}
}

// A bridge that refuses to start the engine, since its sandbox differs, is not
// an engine that fails.
func TestBridgeRefusesTheSandbox(t *testing.T) {
	bubble(t, func(t *testing.T, f *fixture, n *deploytest.Network) {
		s := n.Publish(nil)
		f.tuf.serve(s, nil)
		f.machine.Fail(deploytest.Start, &deploytest.Fault{Err: &systemd.JobError{
			Verb: "start", Unit: "x", Outcome: "failed", State: systemd.State{Load: "loaded", Result: "exit-code", ExitStatus: 77, StatusText: "sandbox: root is writable, want read-only"},
		}})
		defer f.run()()
		pass(untilSettled)
		f.serves(nil)
		if g := f.gate("sandbox"); g.State == gate.Open || !strings.Contains(g.Detail, "root is writable") || f.book.count(journal.SandboxRefused) != 1 || f.book.count(journal.RuntimeFailed) != 0 {
			t.Errorf("%+v\n%s", g, f.book)
		}
		f.machine.Fail(deploytest.Start, &deploytest.Fault{Err: errors.New("started, and lost"), Late: true, Times: 1})
		pass(10 * time.Minute)
		f.serves(s)
	})
}
