package agent

import (
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/resultity/node/internal/deploy/deploytest"
	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/gate"
	"github.com/resultity/node/internal/journal"
	"github.com/resultity/node/internal/wire"
)

// scheduled runs a test with a node whose runtime is validated every 100 seconds,
// which jitter makes 50 to 150, and has so many slots.
func scheduled(t *testing.T, slots int, test func(t *testing.T, f *fixture)) {
	t.Helper()
	bubble(t, func(t *testing.T, f *fixture, n *deploytest.Network) {
		var golden []any
		for _, name := range []string{"a", "b", "c"} {
			golden = append(golden, map[string]any{"name": name, "prompt": name, "answers": []any{name}, "tokens": 4, "timeout_s": 3})
		}
		s := n.Publish(map[string]any{"validation.interval_s": 100, "validation.golden": golden, "runtime.settings.slots": slots, "limits.deadline_s": 7200})
		f.tuf.serve(s, nil)
		close(f.link.up)
		defer f.run()()
		pass(time.Second)
		f.serves(s)
		f.machine.Calls()
		test(t, f)
	})
}

// asked returns how often the golden requests were put to the engine since the last
// look, all of them each time.
func (f *fixture) goldens() int {
	f.t.Helper()
	n := deploytest.Count(f.machine.Calls(), deploytest.Golden)
	all := len(f.board.snapshot().Config().Validation.Golden)
	if n%all != 0 {
		f.t.Errorf("%d golden requests of %d", n, all)
	}
	return n / all
}

func (f *fixture) drainSent() { last[*wire.Heartbeat](f.party) }

func TestScheduledValidation(t *testing.T) {
	scheduled(t, 4, func(t *testing.T, f *fixture) {
		v := f.Status().Networks[0].Validation
		if v == nil || !v.Passed || v.Cause != byInstallation || v.Next == nil || time.Until(*v.Next) < 48*time.Second || time.Until(*v.Next) > 150*time.Second {
			t.Fatalf("%+v", v)
		}
		pass(time.Until(*v.Next) - time.Second)
		if n := f.goldens(); n != 0 {
			t.Fatalf("validated %d times before the time", n)
		}
		pass(2 * time.Second)
		if n := f.goldens(); n != 1 {
			t.Fatalf("validated %d times at the time", n)
		}
		again := f.Status().Networks[0].Validation
		if !again.Passed || again.Cause != bySchedule || !again.At.After(v.At) || !again.Next.After(*v.Next) || f.book.count(journal.Validated) != 1 {
			t.Errorf("%+v\n%s", again, f.book)
		}
		for range 10 { // at most every 50 seconds, at least every 150
			f.drainSent()
			pass(5 * time.Minute)
			if n := f.goldens(); n < 2 || n > 6 {
				t.Errorf("validated %d times in 5 minutes", n)
			}
		}
		f.serves(f.board.snapshot())
		if _, starts := f.machine.Now(); starts != 1 {
			t.Errorf("%d starts", starts)
		}
		if c := f.board.validationCounts(); c[bySchedule].good < 20 || c[bySchedule].bad != 0 || c[byInstallation].good != 1 {
			t.Errorf("%+v", c)
		}
	})
}

// An order is a validation like any other: the interval begins anew.
func TestOrderPutsTheScheduleOff(t *testing.T) {
	scheduled(t, 4, func(t *testing.T, f *fixture) {
		pass(45 * time.Second)
		f.mustObey(wire.OrderRevalidate)
		v := f.Status().Networks[0].Validation
		if n := f.goldens(); n != 1 || v.Cause != byOrder || time.Until(*v.Next) < 48*time.Second {
			t.Fatalf("%d, %+v", n, v)
		}
	})
}

// A validation is one of the jobs that the engine may have at once.
func TestValidationTakesASlot(t *testing.T) {
	scheduled(t, 1, func(t *testing.T, f *fixture) {
		first := job(f.board.snapshot())
		first.Deadline = time.Now().Add(10 * time.Minute).UnixMilli()
		until := time.Until(*f.Status().Networks[0].Validation.Next)
		pass(until - 5*time.Second)
		f.Message(first)
		synctest.Wait()
		<-f.engine.asked
		pass(10 * time.Second)
		if n := f.goldens(); n != 0 {
			t.Fatal("validated beside a job that has the only slot")
		}
		f.machine.Fail(deploytest.Golden, &deploytest.Fault{Block: true, Times: 1})
		f.drainSent()
		f.engine.answer <- struct{}{}
		synctest.Wait()
		f.drainSent()
		second := job(f.board.snapshot())
		f.Message(second)
		synctest.Wait()
		var refused *wire.Refuse
		for refused == nil {
			select {
			case m := <-f.link.sent:
				refused, _ = m.(*wire.Refuse)
			default:
				t.Fatal("a job was let in beside the validation that has the only slot")
			}
		}
		if refused.Job != second.ID || refused.Code != wire.CodeBusy {
			t.Errorf("%+v", refused)
		}
	})
}

// An answer that is wrong beside jobs and right alone is not the engine's fault.
func TestWrongInCompany(t *testing.T) {
	scheduled(t, 4, func(t *testing.T, f *fixture) {
		f.machine.Fail(deploytest.Golden, &deploytest.Fault{Err: errBroken, Times: 1})
		pass(150 * time.Second)
		calls := f.machine.Calls()
		f.serves(f.board.snapshot())
		if _, starts := f.machine.Now(); starts != 1 || deploytest.Count(calls, deploytest.Stop) != 0 || f.book.count(journal.ValidationFailed) != 0 {
			t.Errorf("%d starts, calls %q\n%s", starts, calls, f.book)
		}
		if v := f.Status().Networks[0].Validation; !v.Passed {
			t.Errorf("%+v", v)
		}
	})
}

// A wrong answer takes the node out of service, and everybody hears of it. It
// heals by itself, where the answers are right again.
func TestWrongOnSchedule(t *testing.T) {
	scheduled(t, 4, func(t *testing.T, f *fixture) {
		s := f.board.snapshot()
		f.machine.Fail(deploytest.Golden, &deploytest.Fault{Err: errBroken})
		pass(150 * time.Second)
		f.serves(nil)
		if c := f.machine.Calls(); deploytest.Count(c, deploytest.Stop) == 0 {
			t.Errorf("a runtime that answers wrongly goes on: %q", c)
		}
		if f.book.count(journal.ValidationFailed) == 0 {
			t.Errorf("nothing is in the journal:\n%s", f.book)
		}
		if g := f.gate("validation"); g.State == gate.Open || !strings.Contains(g.Detail, "broken") {
			t.Errorf("%+v", g)
		}
		if h := last[*wire.Heartbeat](f.party); h == nil || h.Runtime.State == active || h.Class != nil || h.Slots != 0 {
			t.Errorf("the network hears %+v", h)
		}
		if v := f.Status().Networks[0].Validation; v.Passed || !strings.Contains(v.Error, "broken") || v.Next != nil {
			t.Errorf("%+v", v)
		}
		f.machine.Fail(deploytest.Golden, nil)
		pass(10 * time.Minute)
		f.serves(s)
		if v := f.Status().Networks[0].Validation; !v.Passed || v.Next == nil || f.board.validationCounts()[bySchedule].bad != 1 {
			t.Errorf("%+v, %+v", v, f.board.validationCounts())
		}
	})
}

// An engine that ends while it is asked is lost, and not wrong.
func TestEndsWhileValidated(t *testing.T) {
	scheduled(t, 4, func(t *testing.T, f *fixture) {
		f.machine.Fail(deploytest.Golden, &deploytest.Fault{Err: errors.New("connection reset"), Times: 1, Also: func(l *deploytest.Locked) { l.Crash(true) }})
		pass(150 * time.Second)
		f.serves(f.board.snapshot())
		if f.book.count(journal.ValidationFailed) != 0 || f.board.validationCounts()[bySchedule].bad != 0 {
			t.Errorf("%+v\n%s", f.board.validationCounts(), f.book)
		}
	})
}

func TestNoValidationWhileDraining(t *testing.T) {
	scheduled(t, 4, func(t *testing.T, f *fixture) {
		if err := f.Drain(); err != nil {
			t.Fatal(err)
		}
		pass(10 * time.Minute)
		if n := f.goldens(); n != 0 {
			t.Errorf("validated %d times while draining", n)
		}
		if err := f.Resume(); err != nil {
			t.Fatal(err)
		}
		pass(150 * time.Second)
		if n := f.goldens(); n == 0 {
			t.Error("never validated again")
		}
	})
}

// The fingerprint is of answers that the engine gave with nothing else to do.
func TestFingerprint(t *testing.T) {
	scheduled(t, 4, func(t *testing.T, f *fixture) {
		print := func() digest.Digest {
			if c := f.heartbeat().Class; c != nil {
				return c.Fingerprint
			}
			return digest.Digest{}
		}
		first := print()
		if first.IsZero() {
			t.Fatal("none after the installation")
		}
		pass(150 * time.Second)
		if n := f.goldens(); n == 0 || print() != first {
			t.Fatalf("%d validations made %s of %s", n, print(), first)
		}
		f.machine.Do(func(l *deploytest.Locked) { l.Speak("!") })
		j := job(f.board.snapshot())
		j.Deadline = time.Now().Add(100 * time.Minute).UnixMilli()
		f.Message(j)
		synctest.Wait()
		<-f.engine.asked
		pass(150 * time.Second)
		if n := f.goldens(); n == 0 || print() != first {
			t.Errorf("%d validations beside a job made %s of %s", n, print(), first)
		}
		f.engine.answer <- struct{}{}
		pass(150 * time.Second)
		if n := f.goldens(); n == 0 || print() == first || print().IsZero() {
			t.Errorf("%d validations alone made %s of %s", n, print(), first)
		}
	})
}

// A tenth of the time, and a minute at once.
func TestAllowance(t *testing.T) {
	var a allowance
	now := time.Unix(1_000_000_000, 0)
	begin, used := now, time.Duration(0)
	for now.Sub(begin) < 24*time.Hour {
		if d := a.wait(now); d > 0 {
			now = now.Add(d)
			if a.wait(now) > 0 || a.wait(now.Add(-time.Second)) == 0 {
				t.Fatal("it names another time than it keeps")
			}
		}
		a.spend(5*time.Minute, now)
		now, used = now.Add(5*time.Minute), used+5*time.Minute
	}
	if share := used.Seconds() / now.Sub(begin).Seconds(); share > 0.11 || share < 0.09 {
		t.Errorf("%.3f of the time", share)
	}
	if a = (allowance{}); a.wait(now) != 0 {
		t.Error("there is nothing at first")
	}
	a.spend(atOnce, now)
	if a.wait(now) != 0 {
		t.Error("what may be had at once makes wait")
	}
}

// Orders to validate again are counted in time: what keeps a node from its jobs is
// refused before it does so for more than a tenth of that.
func TestOrdersToValidateAreBounded(t *testing.T) {
	scheduled(t, 4, func(t *testing.T, f *fixture) {
		j := job(f.board.snapshot())
		j.Deadline = time.Now().Add(time.Hour).UnixMilli()
		f.Message(j)
		synctest.Wait()
		<-f.engine.asked
		f.Message(f.order(networkKey, wire.OrderRevalidate)) // has all jobs wait for the end of this one
		pass(5 * time.Minute)
		f.engine.answer <- struct{}{}
		synctest.Wait()
		if d := last[*wire.OrderDone](f.party); d == nil || d.Outcome != wire.OutcomeOK {
			t.Fatalf("%+v\n%s", d, f.book)
		}
		f.machine.Calls()
		if d := f.obey(f.order(networkKey, wire.OrderRevalidate)); d == nil || d.Outcome != wire.OutcomeFailed || !strings.Contains(d.Message, "a tenth of the node's time") || !strings.Contains(d.Message, "40m") {
			t.Errorf("%+v", d)
		}
		if f.book.count(journal.OrderFailed) != 1 || !strings.Contains(f.book.String(), "a tenth of the node's time") {
			t.Errorf("the journal does not say why:\n%s", f.book)
		}
		pass(39 * time.Minute) // nor does the schedule go on meanwhile
		if n := f.goldens(); n != 0 {
			t.Errorf("validated %d times", n)
		}
		f.serves(f.board.snapshot())
		pass(10 * time.Minute)
		f.drainSent()
		f.mustObey(wire.OrderRevalidate)
	})
}

// Who leads is not condemned either for what is wrong in company that it cannot stop.
func TestNeverAlone(t *testing.T) {
	scheduled(t, 4, func(t *testing.T, f *fixture) {
		s := f.board.snapshot()
		release, err := f.slots.Hold(t.Context(), 4) // as another network's validation has
		if err != nil {
			t.Fatal(err)
		}
		f.machine.Fail(deploytest.Golden, &deploytest.Fault{Err: errBroken})
		f.Message(f.order(networkKey, wire.OrderRevalidate))
		pass(slotPatience + time.Second)
		if d := last[*wire.OrderDone](f.party); d == nil || d.Outcome != wire.OutcomeFailed || !strings.Contains(d.Message, "never idle") {
			t.Errorf("%+v", d)
		}
		f.serves(s)
		if c := f.board.validationCounts(); c[byOrder].bad != 0 || deploytest.Count(f.machine.Calls(), deploytest.Stop) != 0 || f.book.count(journal.ValidationFailed) != 0 {
			t.Errorf("%+v\n%s", c, f.book)
		}
		release()
		if d := f.obey(f.order(networkKey, wire.OrderRevalidate)); d == nil || d.Outcome != wire.OutcomeFailed || strings.Contains(d.Message, "never idle") {
			t.Errorf("%+v", d)
		}
		f.serves(nil)
	})
}
