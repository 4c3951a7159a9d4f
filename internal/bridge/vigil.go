package bridge

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/resultity/node/internal/bridge/contract"
)

// vigil knows whether the engine is alive. It is told about every request that
// is with the engine and about every sign of life.
//
// The engine owes bytes from the begin of a call to its end, except between
// heard and owes, when the caller is the one to act. A call that ends while
// they are owed leaves a debt, which only a proof of life cancels: without it
// a caller that gives up early and tries again would hide a hung engine.
type vigil struct {
	stall time.Duration // how long bytes may be owed
	every time.Duration // how long an idle engine is believed

	// wake tells the canaries that the calls have ended. One place: they look
	// at everything again anyway.
	wake chan struct{}

	mu    sync.Mutex // guards what follows and the calls, for a few instructions
	calls map[*call]struct{}
	busy  int       // calls that are not canaries
	proof time.Time // last one
	debt  time.Time // begin of the oldest silence that ended without an answer; zero without
	asked time.Time // end of the last canary
	hung  string    // why, as the watchdog found; "" when alive

	canaries, withheld uint64
}

// call is one request that is with the engine. The methods of a nil call, a
// request that says nothing about the model, do nothing.
type call struct {
	v      *vigil
	canary bool
	since  time.Time // when the engine began to owe; zero while it owes nothing
}

// outcome is how a call ended.
type outcome int

const (
	answered outcome = iota // in full, with a success
	refused                 // in full, with an error: proves nothing, owes nothing
	failed                  // cut short, garbled, or no answer
	canceled                // by the caller
)

func newVigil(stall, every time.Duration) *vigil {
	return &vigil{stall: stall, every: every, wake: make(chan struct{}, 1), calls: make(map[*call]struct{}), proof: time.Now()}
}

// begin begins a call. The engine owes bytes from now on.
func (v *vigil) begin() *call {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.busy++
	return v.add(false)
}

// beginCanary begins a canary unless calls are in flight, and then returns nil.
func (v *vigil) beginCanary() *call {
	v.mu.Lock()
	defer v.mu.Unlock()
	if len(v.calls) > 0 {
		return nil
	}
	return v.add(true)
}

func (v *vigil) add(canary bool) *call {
	c := &call{v: v, canary: canary, since: time.Now()}
	v.calls[c] = struct{}{}
	return c
}

// heard says that bytes came; proof says that they tell of a working model.
// The engine owes nothing more until owes.
func (c *call) heard(proof bool) {
	if c == nil {
		return
	}
	c.v.mu.Lock()
	defer c.v.mu.Unlock()
	c.since = time.Time{}
	if proof {
		c.v.alive()
	}
}

// owes says that the bytes were passed on and the engine is to send more.
func (c *call) owes() {
	if c == nil {
		return
	}
	c.v.mu.Lock()
	defer c.v.mu.Unlock()
	c.since = time.Now()
}

func (c *call) end(o outcome) {
	if c == nil {
		return
	}
	v := c.v
	v.mu.Lock()
	defer v.mu.Unlock()
	delete(v.calls, c)
	if c.canary {
		v.asked = time.Now()
	} else {
		v.busy--
	}
	owed := !c.since.IsZero()
	switch {
	case o == answered:
		v.alive()
		if c.canary {
			v.canaries++
		}
	case o == refused && !c.canary, !owed:
		// The engine's HTTP side works. A canary, though, is a request that
		// must succeed.
	case v.debt.IsZero() || c.since.Before(v.debt):
		v.debt = c.since
	}
	if len(v.calls) == 0 {
		select {
		case v.wake <- struct{}{}:
		default:
		}
	}
}

// alive notes a proof of life. The caller holds mu.
func (v *vigil) alive() {
	v.proof = time.Now()
	v.debt = time.Time{}
}

// silence returns since when the engine owes bytes; zero when it owes none.
// The caller holds mu.
func (v *vigil) silence() time.Time {
	oldest := v.debt
	for c := range v.calls {
		if !c.since.IsZero() && (oldest.IsZero() || c.since.Before(oldest)) {
			oldest = c.since
		}
	}
	return oldest
}

// judge decides whether the engine is hung now, remembers it, and returns why,
// or "". A hung engine that comes back before systemd has killed it is alive.
func (v *vigil) judge() string {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.hung = ""
	if since := v.silence(); !since.IsZero() && time.Since(since) > v.stall {
		v.hung = fmt.Sprintf("engine silent for %s with %d requests in flight", round(time.Since(since)), v.busy)
		if v.busy == 0 {
			v.hung = fmt.Sprintf("engine has not answered a canary for %s", round(time.Since(since)))
		}
	} else if len(v.calls) == 0 && time.Since(v.proof) > v.every+v.stall {
		// Would be the fault of the canaries. Better a restart than a watchdog
		// that nobody feeds with proofs.
		v.hung = fmt.Sprintf("no sign of life for %s", round(time.Since(v.proof)))
	}
	if v.hung != "" {
		v.withheld++
	}
	return v.hung
}

func round(d time.Duration) time.Duration { return d.Round(100 * time.Millisecond) }

// canaryPause is the time between canaries while one is not answered with a
// success.
const canaryPause = time.Second

// due returns how long to wait for the next canary; false means until calls
// have ended.
func (v *vigil) due() (time.Duration, bool) {
	v.mu.Lock()
	defer v.mu.Unlock()
	switch {
	case len(v.calls) > 0:
		return 0, false
	case !v.debt.IsZero():
		return time.Until(v.asked.Add(min(canaryPause, v.every))), true
	}
	return time.Until(v.proof.Add(v.every)), true
}

// sing runs canaries whenever the engine is idle and due for one, until ctx
// ends. Ask sends one and returns nil when it was answered with a success.
func (v *vigil) sing(ctx context.Context, ask func(context.Context) error) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for ctx.Err() == nil {
		timer.Stop()
		if wait, ok := v.due(); ok {
			timer.Reset(wait)
		}
		select {
		case <-ctx.Done():
		case <-v.wake:
		case <-timer.C:
			if c := v.beginCanary(); c != nil {
				o := answered
				if ask(ctx) != nil {
					o = failed
				}
				c.end(o)
			}
		}
	}
}

// fill writes what the vigil knows into a status.
func (v *vigil) fill(s *contract.Status) {
	v.mu.Lock()
	defer v.mu.Unlock()
	s.State, s.Reason = contract.Serving, v.hung
	if v.hung != "" {
		s.State = contract.Hung
	}
	s.InFlight = v.busy
	if since := v.silence(); !since.IsZero() {
		s.SilentMS = time.Since(since).Milliseconds()
	}
	s.ProofMS = time.Since(v.proof).Milliseconds()
	s.Canaries, s.Withheld = v.canaries, v.withheld
}
