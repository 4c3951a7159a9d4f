package bridge

import (
	"context"
	"errors"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/resultity/node/internal/bridge/contract"
)

const (
	testStall = time.Minute
	testEvery = 30 * time.Second
)

// choir runs the canaries of a vigil in a bubble. Each asks what answer says.
func choir(t *testing.T, v *vigil, answer func(context.Context) error) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { v.sing(ctx, answer); close(done) }()
	t.Cleanup(func() { cancel(); <-done })
}

func wantAlive(t *testing.T, v *vigil) {
	t.Helper()
	if why := v.judge(); why != "" {
		t.Fatalf("counts as hung: %s", why)
	}
}

func wantHung(t *testing.T, v *vigil, say string) {
	t.Helper()
	if why := v.judge(); !strings.Contains(why, say) {
		t.Fatalf("judged %q, want %q in it", why, say)
	}
}

func never(ctx context.Context) error { <-ctx.Done(); return ctx.Err() }

func TestIdleEngineAnswersCanaries(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		v := newVigil(testStall, testEvery)
		var asked atomic.Int64
		choir(t, v, func(context.Context) error { asked.Add(1); return nil })
		for range 24 * 60 {
			time.Sleep(time.Minute)
			wantAlive(t, v)
		}
		if want := int64(24 * 60 * 2); asked.Load() < want-1 || asked.Load() > want {
			t.Errorf("%d canaries in a day, want %d", asked.Load(), want)
		}
	})
}

func TestIdleEngineThatDoesNotAnswerIsHung(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		v := newVigil(testStall, testEvery)
		var asked atomic.Int64
		choir(t, v, func(ctx context.Context) error { asked.Add(1); return never(ctx) })
		time.Sleep(testEvery + testStall - time.Second)
		wantAlive(t, v)
		time.Sleep(2 * time.Second)
		wantHung(t, v, "has not answered a canary for 1m1s")
		if asked.Load() != 1 {
			t.Errorf("%d canaries at once", asked.Load())
		}
	})
}

func TestEngineThatFailsCanariesIsHung(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		v := newVigil(testStall, testEvery)
		var asked atomic.Int64
		var works atomic.Bool
		choir(t, v, func(context.Context) error {
			asked.Add(1)
			if works.Load() {
				return nil
			}
			return errors.New("engine answered 500")
		})
		time.Sleep(testEvery + testStall + 2*time.Second)
		wantHung(t, v, "canary")
		if want := int64(testStall / canaryPause); asked.Load() < want || asked.Load() > want+3 {
			t.Errorf("%d canaries, want about %d", asked.Load(), want)
		}
		works.Store(true)
		time.Sleep(2 * canaryPause)
		wantAlive(t, v)
	})
}

func TestSilenceInFlightIsHung(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		v := newVigil(testStall, testEvery)
		choir(t, v, func(context.Context) error { t.Error("a canary with requests in flight"); return nil })
		quiet, busy := v.begin(), v.begin()
		for range 59 { // a busy stream does not hide a silent one
			time.Sleep(time.Second)
			busy.heard(true)
			busy.owes()
			wantAlive(t, v)
		}
		time.Sleep(2 * time.Second)
		wantHung(t, v, "silent for 1m1s with 2 requests in flight")
		quiet.heard(true)
		quiet.owes()
		wantAlive(t, v)
		quiet.end(answered)
		busy.end(answered)
	})
}

func TestSlowCallerIsNotTheEnginesFault(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		v := newVigil(testStall, testEvery)
		c := v.begin()
		time.Sleep(testStall)
		c.heard(true)
		time.Sleep(10 * testStall) // in a write to the caller
		wantAlive(t, v)
		c.owes()
		time.Sleep(testStall)
		wantAlive(t, v)
		time.Sleep(time.Second)
		wantHung(t, v, "silent")
		c.end(canceled)
	})
}

// A caller that always gives up before the stall would otherwise keep the
// engine from ever being found out.
func TestCallersThatGiveUpDoNotHideAHang(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		v := newVigil(testStall, testEvery)
		choir(t, v, never)
		c := v.begin()
		for range 6 {
			time.Sleep(9 * time.Second)
			next := v.begin() // never a moment without one in flight
			c.end(canceled)
			c = next
		}
		wantAlive(t, v)
		time.Sleep(7 * time.Second)
		wantHung(t, v, "silent for 1m1s")
		c.end(canceled)
	})
}

func TestCanceledRequestIsFollowedByACanaryAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		v := newVigil(testStall, testEvery)
		asked := make(chan time.Time, 10)
		choir(t, v, func(context.Context) error { asked <- time.Now(); return nil })
		c := v.begin()
		time.Sleep(5 * time.Second)
		c.end(canceled)
		synctest.Wait()
		select {
		case <-asked:
		default:
			t.Fatal("no canary")
		}
		time.Sleep(testStall)
		wantAlive(t, v)
	})
}

func TestCanariesWaitForRequests(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		v := newVigil(testStall, testEvery)
		var asked atomic.Int64
		choir(t, v, func(context.Context) error { asked.Add(1); return nil })
		c := v.begin()
		for range 10 {
			time.Sleep(testEvery)
			c.heard(true)
			c.owes()
		}
		if asked.Load() > 0 {
			t.Errorf("%d canaries with a request in flight", asked.Load())
		}
		c.end(answered)
		time.Sleep(testEvery - time.Second)
		if asked.Load() > 0 {
			t.Errorf("a canary %s after a proof of life", testEvery-time.Second)
		}
		time.Sleep(2 * time.Second)
		if asked.Load() != 1 {
			t.Errorf("%d canaries after %s of idleness", asked.Load(), testEvery)
		}
	})
}

// A request that the engine refuses owes nothing and proves nothing.
func TestRefusals(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		v := newVigil(testStall, testEvery)
		var asked atomic.Int64
		choir(t, v, func(context.Context) error { asked.Add(1); return nil })
		for range 59 {
			c := v.begin()
			time.Sleep(time.Second)
			c.heard(false)
			c.owes()
			c.end(refused)
			synctest.Wait()
			wantAlive(t, v)
		}
		if asked.Load() != 1 {
			t.Errorf("%d canaries in a minute of refusals, want 1", asked.Load())
		}
	})
}

// If nobody sang, the watchdog must not go on for ever.
func TestVigilWithoutCanariesEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		v := newVigil(testStall, testEvery)
		time.Sleep(testEvery + testStall)
		wantAlive(t, v)
		time.Sleep(time.Second)
		wantHung(t, v, "no sign of life for 1m31s")
	})
}

func TestStatusOfVigil(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		v := newVigil(testStall, testEvery)
		c := v.begin()
		time.Sleep(testStall + time.Second)
		v.judge()
		var s contract.Status
		v.fill(&s)
		if s.State != contract.Hung || s.Reason == "" || s.InFlight != 1 || s.SilentMS != 61000 || s.ProofMS != 61000 || s.Withheld != 1 {
			t.Errorf("got %+v", s)
		}
		c.end(answered)
		v.judge()
		s = contract.Status{}
		v.fill(&s)
		if s.State != contract.Serving || s.Reason != "" || s.InFlight != 0 || s.SilentMS != 0 || s.ProofMS != 0 || s.Withheld != 1 {
			t.Errorf("got %+v", s)
		}
	})
}

func TestSpeech(t *testing.T) {
	for _, tt := range []struct {
		pieces []string
		want   []bool
	}{
		{[]string{"data: x\n\n"}, []bool{true}},
		{[]string{":\n\n", ": ping\r\n\r\n", "\n", "\r"}, []bool{false, false, false, false}},
		{[]string{": pi", "ng data: x", "\n", "data"}, []bool{false, false, false, true}},
		{[]string{"da", "ta: :\n", ":x\nid"}, []bool{true, true, true}},
		{[]string{"data: x", ":still data"}, []bool{true, true}},
		{[]string{":a\rdata: lone returns end lines too"}, []bool{true}},
		{[]string{""}, []bool{false}},
	} {
		s := speech{events: true}
		for i, p := range tt.pieces {
			if got := s.says([]byte(p)); got != tt.want[i] {
				t.Errorf("%q: piece %d says %v, want %v", tt.pieces, i, got, tt.want[i])
			}
		}
	}
	if s := (speech{}); !s.says([]byte(":")) {
		t.Error("outside event streams a colon is data")
	}
	for text, want := range map[string]bool{"text/event-stream": true, "Text/Event-Stream; charset=utf-8": true, "text/event-streams": false, "application/json": false, "": false} {
		if got := isEventStream(text); got != want {
			t.Errorf("isEventStream(%q) = %v", text, got)
		}
	}
}

// However a stream is cut, the same is said in it.
func FuzzSpeech(f *testing.F) {
	f.Add("data: x\n\n: ping\n\n", 3)
	f.Add(":\r\n\r\ndata", 2)
	f.Fuzz(func(t *testing.T, text string, cut int) {
		if cut < 0 || cut > len(text) {
			return
		}
		whole, parts := speech{events: true}, speech{events: true}
		want := whole.says([]byte(text))
		first := parts.says([]byte(text[:cut]))
		if got := parts.says([]byte(text[cut:])) || first; got != want {
			t.Fatalf("%q cut at %d says %v, whole %v", text, cut, got, want)
		}
	})
}
