package work

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/resultity/node/internal/openai"
	"github.com/resultity/node/internal/receipt"
	"github.com/resultity/node/internal/runtime"
	"github.com/resultity/node/internal/wire"

	"testing/synctest"
)

type replayed struct {
	res runtime.Result
	err error
}

// replay runs a job's request again, beside the test.
func (n *node) replay(ctx context.Context, j *wire.Job) <-chan replayed {
	n.t.Helper()
	req, err := openai.Parse(j.Kind, j.Request, openai.Limits{RequestBytes: 4096, Tokens: 100, Messages: 2})
	if err != nil {
		n.t.Fatal(err)
	}
	done := make(chan replayed, 1)
	go func() {
		res, err := n.worker.Replay(ctx, n.active, j, req)
		done <- replayed{res, err}
	}()
	synctest.Wait()
	return done
}

// A replay asks the engine what the job asked it, and nothing else comes of it.
func TestReplay(t *testing.T) {
	bubble(t, func(t *testing.T) {
		var asked []runtime.Job
		n := newNode(t, func(ctx context.Context, j runtime.Job, emit func([]byte) error) (runtime.Result, error) {
			asked = append(asked, j)
			return say(answer)(ctx, j, emit)
		})
		n.begin(n.active)
		j := n.job(false)
		n.worker.Job(j)
		n.expect("accept", "result")
		n.worker.Ack(&wire.Ack{Jobs: []receipt.JobID{j.ID}})
		before := n.state.Counts()
		got := <-n.replay(t.Context(), j)
		if got.err != nil || string(got.res.Body) != answer || got.res.Usage != usage {
			t.Fatalf("%+v", got)
		}
		a, b := asked[0], asked[1]
		if b.Seed != j.Seed || a.ID != b.ID || a.Model != b.Model || a.Created != b.Created || a.Tokens != b.Tokens || a.ResponseBytes != b.ResponseBytes {
			t.Errorf("asked for %+v, and then for %+v", a, b)
		}
		n.expect() // nobody hears of it
		n.status(Status{Slots: 2})
		if after := n.state.Counts(); after != before {
			t.Errorf("the store has %+v, and had %+v", after, before)
		}
		if e := n.worker.Ended(); e.Done != 1 || e.Failed != 0 {
			t.Errorf("counted: %+v", e)
		}
	})
}

// A job is neither refused nor waits because of a replay: that gives its slot
// back, and begins anew when there is one.
func TestReplayGivesWay(t *testing.T) {
	bubble(t, func(t *testing.T) {
		var mu sync.Mutex // guards what follows
		running, most, begun := 0, 0, 0
		counts := func() (int, int) {
			mu.Lock()
			defer mu.Unlock()
			return begun, running
		}
		release := make(chan struct{})
		n := newNode(t, func(ctx context.Context, j runtime.Job, _ func([]byte) error) (runtime.Result, error) {
			mu.Lock()
			running++
			most = max(most, running)
			if strings.HasPrefix(j.ID.String(), "00") { // the replay's
				begun++
			}
			mu.Unlock()
			defer func() {
				mu.Lock()
				defer mu.Unlock()
				running--
			}()
			select {
			case <-ctx.Done():
				return runtime.Result{}, fmt.Errorf("engine: answer: %w", context.Cause(ctx))
			case <-release:
				return runtime.Result{Body: []byte(answer), Usage: usage}, nil
			}
		})
		n.begin(n.active)
		old := n.job(false)
		old.ID = receipt.JobID{0, 1}
		done := n.replay(t.Context(), old)
		if begun, _ := counts(); begun != 1 {
			t.Fatal("it did not begin")
		}
		n.status(Status{Slots: 2}) // its slot counts as free
		n.worker.Job(n.job(false))
		n.expect("accept")
		if begun, running := counts(); begun != 1 || running != 2 {
			t.Fatalf("begun %d times, %d run: there was a slot for each", begun, running)
		}
		n.worker.Job(n.job(false)) // wants the replay's
		n.expect("accept")
		if _, running := counts(); running != 2 {
			t.Fatalf("%d run in two slots", running)
		}
		n.worker.Job(n.job(false))
		n.refused(wire.CodeBusy) // as without any replay
		time.Sleep(10 * wantedPause)
		if begun, _ := counts(); begun != 1 {
			t.Fatal("it began anew without a slot")
		}
		release <- struct{}{}
		n.expect("result")
		time.Sleep(2 * wantedPause)
		synctest.Wait()
		if begun, running := counts(); begun != 2 || running != 2 {
			t.Fatalf("begun %d times, %d run", begun, running)
		}
		close(release)
		if got := <-done; got.err != nil || string(got.res.Body) != answer {
			t.Fatalf("%+v", got)
		}
		n.expect("result")
		if most > 3 {
			t.Errorf("%d requests at once", most)
		}
	})
}

// What the machine itself asks the engine goes before a replay, too.
func TestReplayGivesWayToHold(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := newNode(t, hang)
		n.begin(n.active)
		ctx, cancel := context.WithCancel(t.Context())
		done := n.replay(ctx, n.job(false))
		release, err := n.worker.cfg.Slots.Hold(t.Context(), 1)
		if err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		n.worker.cfg.Slots.mu.Lock()
		if len(n.worker.cfg.Slots.loans) != 0 {
			t.Error("its slot was not recalled")
		}
		n.worker.cfg.Slots.mu.Unlock()
		release()
		cancel()
		if got := <-done; !errors.Is(got.err, context.Canceled) {
			t.Errorf("%+v", got)
		}
	})
}

// A replay does not outlive what it is of.
func TestReplayEnds(t *testing.T) {
	for name, end := range map[string]func(n *node, stop func() error, cancel func()){
		"with whoever asked":       func(_ *node, _ func() error, cancel func()) { cancel() },
		"with the deployment":      func(n *node, _ func() error, _ func()) { n.worker.SetActive(nil) },
		"with another one":         func(n *node, _ func() error, _ func()) { n.worker.SetActive(anew(n.active)) },
		"with the agent":           func(_ *node, stop func() error, _ func()) { _ = stop() },
		"when the agent is to end": func(n *node, _ func() error, _ func()) { _ = n.worker.Drain(n.t.Context()) },
	} {
		for _, full := range []bool{false, true} { // it waits for a slot
			t.Run(fmt.Sprintf("%s, full %v", name, full), func(t *testing.T) {
				bubble(t, func(t *testing.T) {
					n := newNode(t, hang)
					stop := n.begin(n.active)
					if full {
						release, err := n.worker.cfg.Slots.Hold(t.Context(), 2)
						if err != nil {
							t.Fatal(err)
						}
						defer release()
						if release, err = n.worker.cfg.Slots.Hold(t.Context(), 2); err != nil {
							t.Fatal(err)
						}
						defer release()
					}
					ctx, cancel := context.WithCancel(t.Context())
					defer cancel()
					done := n.replay(ctx, n.job(false))
					end(n, stop, cancel)
					if got := <-done; !errors.Is(got.err, ErrNoRuntime) && !errors.Is(got.err, context.Canceled) {
						t.Errorf("%+v", got)
					}
					if l := n.worker.cfg.Slots.loans; len(l) != 0 || len(n.worker.replays) != 0 {
						t.Errorf("left: %v, %v", l, n.worker.replays)
					}
				})
			})
		}
	}
}

// An engine that fails a replay is not judged by it, and one that is gone, or
// suspect, is not asked.
func TestReplayFails(t *testing.T) {
	bubble(t, func(t *testing.T) {
		fails := errors.New("no")
		n := newNode(t, func(context.Context, runtime.Job, func([]byte) error) (runtime.Result, error) {
			return runtime.Result{}, fails
		})
		n.suspect = func(*Active, string) { t.Error("the engine is suspect") }
		n.begin(n.active)
		for range suspectAfter + 1 {
			if got := <-n.replay(t.Context(), n.job(false)); !errors.Is(got.err, fails) {
				t.Fatalf("%+v", got)
			}
		}
		n.active.failures = suspectAfter
		if got := <-n.replay(t.Context(), n.job(false)); !errors.Is(got.err, ErrNoRuntime) {
			t.Errorf("suspect: %+v", got)
		}
		n.active.failures = 0
		n.worker.SetActive(nil)
		if got := <-n.replay(t.Context(), n.job(false)); !errors.Is(got.err, ErrNoRuntime) {
			t.Errorf("none: %+v", got)
		}
	})
}

// What is kept of a job is its answer, once that is safe, and nothing of one that
// failed.
func TestKeep(t *testing.T) {
	bubble(t, func(t *testing.T) {
		fails := false
		n := newNode(t, func(ctx context.Context, j runtime.Job, emit func([]byte) error) (runtime.Result, error) {
			if fails {
				return runtime.Result{}, errors.New("no")
			}
			return say(answer)(ctx, j, emit)
		})
		var kept []receipt.JobID
		stop := n.start()
		n.worker.cfg.Keep = func(j *wire.Job, r *wire.Result) {
			if _, ok, err := n.state.Result(j.ID); !ok || err != nil {
				t.Errorf("kept before it is safe: %v", err)
			}
			if string(r.Response) != answer || r.Job != j.ID || len(j.Request) == 0 {
				t.Errorf("kept %+v and %+v", j, r)
			}
			kept = append(kept, j.ID)
		}
		n.worker.SetActive(n.active)
		j := n.job(false)
		n.worker.Job(j)
		n.expect("accept", "result")
		fails = true
		n.worker.Job(n.job(false))
		n.expect("accept", "result")
		if len(kept) != 1 || kept[0] != j.ID {
			t.Errorf("kept %v", kept)
		}
		_ = stop()
	})
}
