package dispatch

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"maps"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/evm"
	"github.com/resultity/node/internal/network/metrics"
	"github.com/resultity/node/internal/network/nodetest"
	"github.com/resultity/node/internal/network/store"
	"github.com/resultity/node/internal/receipt"
	"github.com/resultity/node/internal/snapshot"
	"github.com/resultity/node/internal/wire"
)

// memory is a store that objects: nothing may be written twice, and what is
// deleted must be there.
type memory struct {
	t       *testing.T
	mu      sync.Mutex
	seq     uint64
	jobs    map[uint64]*store.Job
	results map[receipt.JobID]*store.Result
	kept    []receipt.JobID // whose requests are

	putJob    func() error // called before a job is written
	putResult func() error // called before a result is written
	full      error        // why nothing is accepted
}

func (m *memory) PutJob(_ context.Context, j *store.Job) error {
	if m.putJob != nil {
		if err := m.putJob(); err != nil {
			return err
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.seq++
	j.Seq = m.seq
	m.jobs[j.Seq] = j
	return nil
}

func (m *memory) Accepting() error { return m.full }

func (m *memory) KeepRequest(_ context.Context, j *store.Job) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.results[j.ID] == nil {
		m.t.Errorf("job %s is kept before its result", j.ID)
	}
	m.kept = append(m.kept, j.ID)
	return nil
}

func (m *memory) DeleteJob(_ context.Context, seq uint64) error { m.JobDone(seq); return nil }

func (m *memory) JobDone(seq uint64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.jobs[seq] == nil {
		m.t.Errorf("job %d is deleted and is not there", seq)
	}
	delete(m.jobs, seq)
}

func (m *memory) PutResult(_ context.Context, r *receipt.Signed, said digest.Digest, response []byte) error {
	if m.putResult != nil {
		if err := m.putResult(); err != nil {
			return err
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	id := r.Receipt().Job
	if m.results[id] != nil {
		return store.ErrExists
	}
	m.results[id] = &store.Result{Receipt: r, Response: response, Said: said}
	return nil
}

func (m *memory) Result(_ context.Context, id receipt.JobID) (*store.Result, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if r := m.results[id]; r != nil {
		return r, nil
	}
	return nil, store.ErrNotFound
}

func (m *memory) count() (jobs, results int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return len(m.jobs), len(m.results)
}

// peer is a node's session that keeps what it is sent.
type peer struct {
	f      *fixture
	node   *nodetest.Node
	member *Member
	mu     sync.Mutex
	sent   []wire.Message
}

func (p *peer) Send(m wire.Message) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.sent = append(p.sent, m)
}

// next waits until everything has settled and takes the first message of type M.
func next[M wire.Message](p *peer) (found M, ok bool) {
	synctest.Wait()
	p.mu.Lock()
	defer p.mu.Unlock()
	for i, m := range p.sent {
		if v, is := m.(M); is {
			p.sent = slices.Delete(p.sent, i, i+1)
			return v, true
		}
	}
	return found, false
}

func must[M wire.Message](p *peer) M {
	p.f.t.Helper()
	m, ok := next[M](p)
	if !ok {
		p.f.t.Fatalf("node %s was sent %+v, want a %T", p.node.Key, p.sent, m)
	}
	return m
}

func none[M wire.Message](p *peer) {
	p.f.t.Helper()
	if m, ok := next[M](p); ok {
		p.f.t.Fatalf("node %s was sent %T %+v", p.node.Key, m, m)
	}
}

type fixture struct {
	t     *testing.T
	raw   []byte
	terms *Terms
	store *memory
	d     *Dispatcher
	m     *metrics.Metrics
}

func termsOf(t *testing.T, raw []byte, version int64) *Terms {
	t.Helper()
	c, err := snapshot.Parse(raw)
	if err != nil {
		t.Fatal(err)
	}
	terms, err := NewTerms(c, digest.Of(raw), version, time.Now(), time.Now().Add(24*time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	return terms
}

// run runs f in a bubble of its own time, with a window of 10 s, a deadline of
// 60 s, and 2 slots a node unless change says otherwise.
func run(t *testing.T, opt Options, change func(*snapshot.Config), f func(*testing.T, *fixture)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		c := nodetest.Config(t, evm.Address{1})
		c.Network.Heartbeat, c.Network.Window, c.Network.ClockWindow, c.Limits.Deadline, c.Runtime.Settings.Slots = 5, 10, 5, 60, 2
		if change != nil {
			change(c)
		}
		x := &fixture{t: t, raw: nodetest.JSON(t, c)}
		x.terms = termsOf(t, x.raw, 1)
		x.store = &memory{t: t, jobs: map[uint64]*store.Job{}, results: map[receipt.JobID]*store.Result{}}
		x.m = metrics.New(func() metrics.State { return x.d.State() })
		x.d = New(x.store, x.terms, x.m, slog.New(slog.DiscardHandler), opt)
		f(t, x)
		x.d.Close()
	})
}

// join begins a session of a node, which reports itself well.
func (f *fixture) join(n *nodetest.Node) *peer {
	f.t.Helper()
	if n == nil {
		n = nodetest.New(f.t, "", f.raw)
	}
	p := &peer{f: f, node: n}
	p.member = f.d.Join(n.Key.Address(), p)
	p.beat(nil)
	return p
}

func (p *peer) beat(change func(*wire.Heartbeat)) {
	p.f.t.Helper()
	b := p.node.Heartbeat()
	if change != nil {
		change(b)
	}
	p.member.Heartbeat(b)
}

// sleep lets time pass in steps in which the given nodes send heartbeats.
func (f *fixture) sleep(d time.Duration, peers ...*peer) {
	for step := time.Second; d > 0; d -= step {
		time.Sleep(min(step, d))
		for _, p := range peers {
			p.beat(nil)
		}
	}
	synctest.Wait()
}

func (f *fixture) submit(stream bool) *Ticket {
	f.t.Helper()
	body := `{"model":"tiny"}`
	t, err := f.d.Submit(Work{Kind: wire.KindChat, Model: nodetest.Model, Stream: stream, Body: []byte(body), Client: "test"})
	if err != nil {
		f.t.Fatal(err)
	}
	return t
}

// take is what an honest node does with a job first.
func (p *peer) take() *wire.Job {
	p.f.t.Helper()
	j := must[*wire.Job](p)
	if !p.member.Accepted(j.ID) {
		p.f.t.Fatal("acceptance of an unknown job")
	}
	return j
}

func (p *peer) deliver(j *wire.Job, text string) {
	p.f.t.Helper()
	if _, err := p.member.Result(p.node.Result(p.f.t, j, nodetest.Body(j, text), nil)); err != nil {
		p.f.t.Fatal(err)
	}
}

func (p *peer) acked(j *wire.Job) {
	p.f.t.Helper()
	if a := must[*wire.Ack](p); !slices.Contains(a.Jobs, j.ID) {
		p.f.t.Fatalf("acknowledged %v, want %s", a.Jobs, j.ID)
	}
}

// answered checks that the ticket has the response of text, and returns it.
func (f *fixture) answered(t *Ticket, text string) string {
	f.t.Helper()
	synctest.Wait()
	ctx, cancel := context.WithTimeout(f.t.Context(), time.Millisecond)
	defer cancel()
	got, err := t.Wait(ctx)
	if err != nil || string(got) != string(nodetest.Body(&t.j.spec.Job, text)) {
		f.t.Fatalf("answer %q, %v", got, err)
	}
	return string(got)
}

func (f *fixture) failed(t *Ticket, want Outcome) *Failure {
	f.t.Helper()
	synctest.Wait()
	ctx, cancel := context.WithTimeout(f.t.Context(), time.Millisecond)
	defer cancel()
	_, err := t.Wait(ctx)
	failure, ok := AsFailure(err)
	if !ok || failure.Outcome != want {
		f.t.Fatalf("ended with %v, want %s", err, want)
	}
	return failure
}

func (f *fixture) waiting(t *Ticket) {
	f.t.Helper()
	synctest.Wait()
	select {
	case <-t.j.done:
		f.t.Fatalf("ended: %v", t.j.failure)
	default:
	}
}

// empty checks that nothing is left behind.
func (f *fixture) empty(results int) {
	f.t.Helper()
	synctest.Wait()
	if jobs, res := f.store.count(); jobs != 0 || res != results {
		f.t.Errorf("store holds %d jobs and %d results, want 0 and %d", jobs, res, results)
	}
	f.d.mu.Lock()
	defer f.d.mu.Unlock()
	if len(f.d.jobs) != 0 || f.d.queue.len != 0 || f.d.queue.places != 0 || len(f.d.queue.lanes) != 0 || f.d.bytes != 0 {
		f.t.Errorf("%d jobs, %d queued, %d bytes are left", len(f.d.jobs), f.d.queue.len, f.d.bytes)
	}
	for _, n := range f.d.nodes {
		if len(n.running) != 0 {
			f.t.Errorf("node %s still has %d jobs", n.addr, len(n.running))
		}
		if n.member != nil && n.routable && n.index < 0 && !time.Now().Before(n.blocked) {
			f.t.Errorf("node %s is idle and not free", n.addr)
		}
	}
}

// metric returns the value of a series.
func (f *fixture) metric(series string) string {
	f.t.Helper()
	w := httptest.NewRecorder()
	f.m.Handler().ServeHTTP(w, httptest.NewRequest("GET", "/", nil))
	for line := range strings.Lines(w.Body.String()) {
		if v, ok := strings.CutPrefix(line, series+" "); ok {
			return strings.TrimSpace(v)
		}
	}
	return ""
}

func TestPlain(t *testing.T) {
	run(t, Options{}, nil, func(t *testing.T, f *fixture) {
		p := f.join(nil)
		if s := must[*wire.Status](p); !s.Routable {
			t.Fatalf("status %+v", s)
		}
		ticket := f.submit(false)
		j := p.take()
		if j.Config != f.terms.Digest || j.Deadline != time.Now().Add(time.Minute).UnixMilli() {
			t.Fatalf("job %+v", j)
		}
		p.deliver(j, "hello")
		f.answered(ticket, "hello")
		p.acked(j)
		none[*wire.Cancel](p)
		f.empty(1)
	})
}

// A node gets a job at once; the client gets its answer when the job is on
// disk, and the node its acknowledgement when the result is.
func TestDurableFirst(t *testing.T) {
	run(t, Options{}, nil, func(t *testing.T, f *fixture) {
		p := f.join(nil)
		job, result := make(chan error), make(chan error)
		f.store.putJob, f.store.putResult = func() error { return <-job }, func() error { return <-result }
		ticket := f.submit(false)
		j := p.take()
		p.deliver(j, "hello")
		f.waiting(ticket)
		none[*wire.Ack](p)
		if f.d.Receipt(j.ID) != nil {
			t.Fatal("a receipt before the answer")
		}
		job <- nil
		f.answered(ticket, "hello")
		if r := f.d.Receipt(j.ID); r == nil || r.Receipt().Job != j.ID {
			t.Fatalf("receipt %v", r)
		}
		none[*wire.Ack](p)
		result <- nil
		p.acked(j)
		f.empty(1)
	})
}

// A result that is stored before its job answers the client by itself, and the
// job's record goes as soon as it is there.
func TestResultIsStoredFirst(t *testing.T) {
	for name, err := range map[string]error{"written": nil, "failed": errors.New("disk full")} {
		t.Run(name, func(t *testing.T) {
			run(t, Options{}, nil, func(t *testing.T, f *fixture) {
				p := f.join(nil)
				job := make(chan error)
				f.store.putJob = func() error { return <-job }
				ticket := f.submit(true)
				j := p.take()
				p.deliver(j, "hello")
				f.answered(ticket, "hello")
				p.acked(j)
				job <- err
				f.empty(1)
			})
		})
	}
}

// A job that ends before it is written down does not stay behind.
func TestCancelWhileWriting(t *testing.T) {
	run(t, Options{}, nil, func(t *testing.T, f *fixture) {
		p := f.join(nil)
		job := make(chan error)
		f.store.putJob = func() error { return <-job }
		ticket := f.submit(false)
		p.take()
		ticket.Cancel()
		must[*wire.Cancel](p)
		job <- nil
		f.empty(0)
	})
}

func TestJobThatCannotBeWritten(t *testing.T) {
	run(t, Options{}, nil, func(t *testing.T, f *fixture) {
		p := f.join(nil)
		f.store.putJob = func() error { return errors.New("disk full") }
		ticket := f.submit(false)
		f.failed(ticket, Storage)
		j := must[*wire.Job](p)
		if c := must[*wire.Cancel](p); c.Job != j.ID {
			t.Fatal("another job")
		}
		p.deliver(j, "hello") // it was faster; nobody needs it, and it is no fault
		p.acked(j)
		f.empty(0)
	})
}

// While the store takes nothing no node is bothered.
func TestStoreTakesNothing(t *testing.T) {
	run(t, Options{}, nil, func(t *testing.T, f *fixture) {
		p := f.join(nil)
		f.store.full = errors.New("disk full")
		_, err := f.d.Submit(Work{Kind: wire.KindChat, Model: "tiny", Body: []byte("{}"), Client: "alice"})
		if failure, ok := AsFailure(err); !ok || failure.Outcome != Storage {
			t.Fatalf("%v", err)
		}
		none[*wire.Job](p)
		f.store.full = nil
		ticket := f.submit(false)
		p.deliver(p.take(), "hello")
		f.answered(ticket, "hello")
	})
}

// When neither the job nor its result can be stored, the client is told, and
// the node may forget the result.
func TestNothingCanBeWritten(t *testing.T) {
	for _, first := range []string{"job", "result"} {
		t.Run(first, func(t *testing.T) {
			run(t, Options{}, nil, func(t *testing.T, f *fixture) {
				p := f.join(nil)
				full := errors.New("disk full")
				job, result := make(chan error), make(chan error, 2)
				f.store.putJob, f.store.putResult = func() error { return <-job }, func() error { return <-result }
				ticket := f.submit(false)
				j := p.take()
				p.deliver(j, "hello")
				f.waiting(ticket)
				if first == "job" {
					job <- full
					f.waiting(ticket)
					result <- full
				} else {
					result <- full
					f.waiting(ticket)
					result <- full // for the try that the job's outcome brings about
					job <- full
				}
				f.failed(ticket, Storage)
				p.acked(j)
				f.empty(0)
			})
		})
	}
}

func TestLeastBusyNodeFirst(t *testing.T) {
	run(t, Options{}, func(c *snapshot.Config) { c.Runtime.Settings.Slots = 8 }, func(t *testing.T, f *fixture) {
		a, b := f.join(nil), f.join(nil)
		b.beat(func(h *wire.Heartbeat) { h.Slots = 2 })
		count := map[*peer]int{}
		share := func(n int) {
			for range n {
				f.submit(false)
				for _, p := range []*peer{a, b} {
					if j, ok := next[*wire.Job](p); ok {
						count[p]++
						p.member.Accepted(j.ID)
					}
				}
			}
		}
		share(5)
		if count[a] != 4 || count[b] != 1 {
			t.Fatalf("a has %d of 8, b %d of 2", count[a], count[b])
		}
		share(5)
		if count[a] != 8 || count[b] != 2 {
			t.Fatalf("a has %d of 8, b %d of 2", count[a], count[b])
		}
		last := f.submit(false)
		none[*wire.Job](a)
		none[*wire.Job](b)
		f.waiting(last)
	})
}

// Nodes that are equally busy take turns.
func TestTurns(t *testing.T) {
	run(t, Options{}, nil, func(t *testing.T, f *fixture) {
		peers := []*peer{f.join(nil), f.join(nil), f.join(nil)}
		count := map[*peer]int{}
		for range 9 {
			f.submit(false)
			for _, p := range peers {
				if j, ok := next[*wire.Job](p); ok {
					p.member.Accepted(j.ID)
					p.deliver(j, "x")
					count[p]++
				}
			}
		}
		for _, p := range peers {
			if count[p] != 3 {
				t.Errorf("one had %d of 9", count[p])
			}
		}
	})
}

// A node may offer more slots than the configuration gives to its runtime.
func TestSlotsAreTheConfigurations(t *testing.T) {
	run(t, Options{}, nil, func(t *testing.T, f *fixture) {
		p := f.join(nil)
		p.beat(func(h *wire.Heartbeat) { h.Slots = 1000 })
		for range 3 {
			f.submit(false)
		}
		must[*wire.Job](p)
		must[*wire.Job](p)
		none[*wire.Job](p)
	})
}

// Jobs that a node runs for somebody else, or that were given up, take slots.
func TestForeignJobsTakeSlots(t *testing.T) {
	run(t, Options{}, nil, func(t *testing.T, f *fixture) {
		p := f.join(nil)
		p.beat(func(h *wire.Heartbeat) { h.Busy = 2 })
		f.submit(false)
		none[*wire.Job](p)
		p.beat(func(h *wire.Heartbeat) { h.Busy = 1 })
		must[*wire.Job](p)
	})
}

func TestGates(t *testing.T) {
	for name, tc := range map[string]struct {
		change func(*wire.Heartbeat)
		reason string
	}{
		"other configuration": {func(h *wire.Heartbeat) { h.Config = digest.Of([]byte("x")) }, "configuration"},
		"gone back": {func(h *wire.Heartbeat) {
			h.Failed = &wire.Failed{Config: h.Config, Step: "validation", Reason: "another answer", Final: true}
			h.Config = digest.Of([]byte("x"))
		}, "failed there: validation: another answer"},
		"gone back from another": {func(h *wire.Heartbeat) {
			h.Failed = &wire.Failed{Config: digest.Of([]byte("y")), Step: "validation", Reason: "another answer"}
			h.Config = digest.Of([]byte("x"))
		}, ", the network on"},
		"no configuration": {func(h *wire.Heartbeat) { h.Config = digest.Digest{} }, "configuration none"},
		"draining":         {func(h *wire.Heartbeat) { h.Draining = true }, "draining"},
		"standby":          {func(h *wire.Heartbeat) { h.Runtime.State, h.Slots = wire.RuntimeStandby, 0 }, "serves another network"},
		"runtime":          {func(h *wire.Heartbeat) { h.Runtime.State = "starting" }, `"starting"`},
		"image":            {func(h *wire.Heartbeat) { h.Runtime.Image = digest.Of([]byte("x")) }, "image"},
		"model state":      {func(h *wire.Heartbeat) { h.Models[0].State = "pending" }, `"pending"`},
		"model digest":     {func(h *wire.Heartbeat) { h.Models[0].Digest = digest.Of([]byte("x")) }, "does not have model"},
		"no model":         {func(h *wire.Heartbeat) { h.Models = nil }, "does not have model"},
		"no slots":         {func(h *wire.Heartbeat) { h.Slots = 0 }, "slots"},
	} {
		t.Run(name, func(t *testing.T) {
			run(t, Options{}, nil, func(t *testing.T, f *fixture) {
				p := f.join(nil)
				must[*wire.Status](p)
				p.beat(tc.change)
				if s := must[*wire.Status](p); s.Routable || !strings.Contains(s.Reason, tc.reason) {
					t.Fatalf("status %+v", s)
				}
				f.submit(false)
				none[*wire.Job](p)
				p.beat(nil)
				if s := must[*wire.Status](p); !s.Routable || s.Reason != "" {
					t.Fatalf("status %+v", s)
				}
				must[*wire.Job](p)
				p.beat(nil)
				none[*wire.Status](p) // only changes are told
			})
		})
	}
}

func TestGrace(t *testing.T) {
	run(t, Options{}, nil, func(t *testing.T, f *fixture) {
		a := f.join(nil)
		ticket := f.submit(false)
		j := a.take()
		b := f.join(nil)
		a.member.Leave(false)
		f.sleep(1900*time.Millisecond, b)
		none[*wire.Job](b)
		a2 := f.join(a.node)
		if again := must[*wire.Job](a2); again.ID != j.ID {
			t.Fatalf("job %s, want %s again", again.ID, j.ID)
		}
		f.sleep(2*time.Second, a2, b) // within the time to accept
		none[*wire.Job](b)
		a2.member.Accepted(j.ID)
		a2.deliver(j, "hello")
		f.answered(ticket, "hello")
		a2.acked(j)
		f.empty(1)
	})
}

func TestSessionLost(t *testing.T) {
	run(t, Options{}, nil, func(t *testing.T, f *fixture) {
		a := f.join(nil)
		ticket := f.submit(false)
		j := a.take()
		b := f.join(nil)
		a.member.Leave(false)
		f.sleep(2*time.Second, b)
		if got := b.take(); got.ID != j.ID {
			t.Fatal("another job")
		}
		// The first node comes back with the result: whoever is first counts.
		a2 := f.join(a.node)
		none[*wire.Job](a2)
		a2.deliver(j, "hello")
		f.answered(ticket, "hello")
		a2.acked(j)
		if c := must[*wire.Cancel](b); c.Job != j.ID {
			t.Fatal("another job is cancelled")
		}
		// The second one's result is acknowledged and not counted.
		b.deliver(j, "other")
		b.acked(j)
		f.empty(1)
	})
}

func TestSilentNode(t *testing.T) {
	run(t, Options{}, nil, func(t *testing.T, f *fixture) {
		a := f.join(nil)
		must[*wire.Status](a)
		ticket := f.submit(false)
		j := a.take()
		b := f.join(nil)
		f.sleep(9*time.Second, b)
		none[*wire.Job](b)
		f.sleep(time.Second, b)
		b.take()
		if s := must[*wire.Status](a); s.Routable || s.Reason != "no heartbeat for 10s" {
			t.Fatalf("status %+v", s)
		}
		b.deliver(j, "hello")
		f.answered(ticket, "hello")
		must[*wire.Cancel](a)
		f.empty(1)
	})
}

func TestNotAccepted(t *testing.T) {
	run(t, Options{}, nil, func(t *testing.T, f *fixture) {
		a := f.join(nil)
		ticket := f.submit(false)
		j := must[*wire.Job](a)
		b := f.join(nil)
		f.sleep(2*time.Second, a, b)
		none[*wire.Job](b)
		f.sleep(1001*time.Millisecond, a, b) // its bytes have time too
		b.take()
		b.deliver(j, "hello")
		f.answered(ticket, "hello")
		must[*wire.Cancel](a)
		f.empty(1)
	})
}

// A node that does not accept gets nothing else for a moment.
func TestNotAcceptedPause(t *testing.T) {
	run(t, Options{}, nil, func(t *testing.T, f *fixture) {
		a := f.join(nil)
		f.submit(false)
		must[*wire.Job](a)
		time.Sleep(3001 * time.Millisecond)
		f.submit(false)
		none[*wire.Job](a)
		time.Sleep(refusalPause)
		must[*wire.Job](a)
	})
}

// A node that was busy after all is asked again, soon or at its next heartbeat.
func TestRefusalPause(t *testing.T) {
	for code, pause := range map[wire.Code]time.Duration{wire.CodeBusy: busyPause, wire.CodeNotReady: refusalPause} {
		refused := func(t *testing.T, f *fixture) *peer {
			a := f.join(nil)
			f.submit(false)
			a.member.Refused(&wire.Refuse{Job: must[*wire.Job](a).ID, Code: code})
			f.submit(false) // a job that it has not refused
			return a
		}
		run(t, Options{}, nil, func(t *testing.T, f *fixture) {
			a := refused(t, f)
			time.Sleep(pause - time.Millisecond)
			none[*wire.Job](a)
			time.Sleep(time.Millisecond)
			must[*wire.Job](a)
		})
		run(t, Options{}, nil, func(t *testing.T, f *fixture) {
			a := refused(t, f)
			none[*wire.Job](a)
			a.beat(nil)
			must[*wire.Job](a)
		})
	}
}

// However often a node is busy, its job does not fail for that.
func TestBusyIsNoFailure(t *testing.T) {
	run(t, Options{Attempts: 2}, nil, func(t *testing.T, f *fixture) {
		a := f.join(nil)
		ticket := f.submit(false)
		for range 10 {
			a.member.Refused(&wire.Refuse{Job: must[*wire.Job](a).ID, Code: wire.CodeBusy})
			f.sleep(retries[0], a)
		}
		a.deliver(a.take(), "hello")
		f.answered(ticket, "hello")
		f.empty(1)
	})
}

// The only node accepts late: it keeps the job.
func TestLateAccept(t *testing.T) {
	run(t, Options{}, nil, func(t *testing.T, f *fixture) {
		a := f.join(nil)
		ticket := f.submit(false)
		j := must[*wire.Job](a)
		f.sleep(4*time.Second, a)
		a.member.Accepted(j.ID)
		b := f.join(nil)
		f.sleep(5*time.Second, a, b)
		none[*wire.Job](b)
		a.deliver(j, "hello")
		f.answered(ticket, "hello")
		f.empty(1)
	})
}

func TestStalled(t *testing.T) {
	run(t, Options{}, nil, func(t *testing.T, f *fixture) {
		a := f.join(nil)
		ticket := f.submit(false)
		j := a.take()
		b := f.join(nil)
		f.sleep(19*time.Second, a, b)
		none[*wire.Job](b)
		f.sleep(time.Second, a, b)
		b.take()
		none[*wire.Job](a)    // it has it
		none[*wire.Cancel](a) // it may still be first
		a.deliver(j, "hello")
		f.answered(ticket, "hello")
		must[*wire.Cancel](b)
		f.empty(1)
	})
}

// A job that takes long is no reason to ask the same node again, or to make
// younger jobs wait.
func TestStalledJobStandsBehind(t *testing.T) {
	run(t, Options{}, func(c *snapshot.Config) { c.Runtime.Settings.Slots = 1 }, func(t *testing.T, f *fixture) {
		a := f.join(nil)
		slow := f.submit(false)
		js := a.take()
		quick := f.submit(false)
		f.sleep(21*time.Second, a)
		none[*wire.Job](a)
		b := f.join(nil)
		j := b.take()
		if j.ID != quick.ID() {
			t.Fatal("the slow job went first")
		}
		b.deliver(j, "quick")
		f.answered(quick, "quick")
		if j := b.take(); j.ID != slow.ID() {
			t.Fatal("another job")
		}
		// The first one gives up: the second is at it, nobody else is needed.
		if _, err := a.member.Result(&wire.Result{Job: js.ID, Code: wire.CodeEngine}); err != nil {
			t.Fatal(err)
		}
		c := f.join(nil)
		f.sleep(3*time.Second, a, b, c)
		none[*wire.Job](a)
		none[*wire.Job](c)
		b.deliver(js, "slow")
		f.answered(slow, "slow")
		f.empty(2)
	})
}

// The jobs of a node that broke the protocol do not wait for its return.
func TestViolationTakesAllJobs(t *testing.T) {
	run(t, Options{}, nil, func(t *testing.T, f *fixture) {
		a := f.join(nil)
		f.submit(false)
		f.submit(false)
		a.take()
		a.take()
		b := f.join(nil)
		a.member.Leave(true)
		t.Logf("expected: both jobs at the other node; got: %s and %s", b.take().ID, b.take().ID)
	})
}

// A result that is on its way to the disk when the deadline passes counts.
func TestDeadlineWhileStoring(t *testing.T) {
	run(t, Options{}, nil, func(t *testing.T, f *fixture) {
		a := f.join(nil)
		ticket := f.submit(false)
		j := a.take()
		hold := make(chan struct{})
		f.store.putResult = func() error { <-hold; return nil }
		a.deliver(j, "hello")
		f.sleep(61*time.Second, a)
		f.answered(ticket, "hello")
		close(hold)
		a.acked(j)
		f.empty(1)
	})
}

// A try to store a result whose outcome was not heard of may have been good.
func TestResultIsStoredAlready(t *testing.T) {
	run(t, Options{}, nil, func(t *testing.T, f *fixture) {
		a := f.join(nil)
		ticket := f.submit(false)
		j := a.take()
		body := nodetest.Body(j, "hello")
		if err := f.store.PutResult(t.Context(), a.node.Result(t, j, body, nil).Receipt, digest.Digest{}, body); err != nil {
			t.Fatal(err)
		}
		a.deliver(j, "hello")
		f.answered(ticket, "hello")
		a.acked(j)
		f.empty(1)
	})
}

func TestRefusals(t *testing.T) {
	for _, code := range []wire.Code{wire.CodeBusy, wire.CodeDraining, wire.CodeNotReady, wire.CodeConfig, wire.CodeUnknownModel, wire.CodeStorage, wire.CodeInternal, wire.CodeEngine, wire.CodeOutput, wire.CodeCancelled} {
		t.Run(string(code), func(t *testing.T) {
			run(t, Options{}, nil, func(t *testing.T, f *fixture) {
				a := f.join(nil)
				ticket := f.submit(false)
				j := must[*wire.Job](a)
				b := f.join(nil)
				a.member.Refused(&wire.Refuse{Job: j.ID, Code: code})
				b.take()
				b.deliver(j, "hello")
				f.answered(ticket, "hello")
				none[*wire.Cancel](a) // it does not have the job
				f.empty(1)
			})
		})
	}
	for _, code := range []wire.Code{wire.CodeBadRequest, wire.CodeContext, wire.CodeLimit, wire.CodeDeadline} {
		t.Run(string(code), func(t *testing.T) {
			run(t, Options{}, nil, func(t *testing.T, f *fixture) {
				a := f.join(nil)
				ticket := f.submit(false)
				j := must[*wire.Job](a)
				a.member.Refused(&wire.Refuse{Job: j.ID, Code: code, Message: "a node's text"})
				if got := f.failed(ticket, Refused); got.Code != code || strings.Contains(got.Message, "a node's") {
					t.Fatalf("failure %+v", got)
				}
				f.empty(0)
			})
		})
	}
}

// One node cannot end a job that another one can do.
func TestSecondOpinion(t *testing.T) {
	refuse := func(p *peer, j *wire.Job, code wire.Code) {
		p.member.Refused(&wire.Refuse{Job: j.ID, Code: code})
	}
	give := func(t *testing.T, f *fixture, nodes int) (*Ticket, []*peer, *wire.Job) {
		list := []*peer{f.join(nil)}
		ticket := f.submit(false)
		j := list[0].take()
		for range nodes - 1 {
			list = append(list, f.join(nil))
		}
		refuse(list[0], j, wire.CodeBadRequest)
		return ticket, list, j
	}
	to := func(list []*peer, j *wire.Job) (*peer, []*peer) {
		for i, p := range list {
			if got, ok := next[*wire.Job](p); ok && got.ID == j.ID {
				return p, slices.Delete(slices.Clone(list), i, i+1)
			}
		}
		t.Fatal("nobody has the job")
		return nil, nil
	}
	t.Run("another does it", func(t *testing.T) {
		run(t, Options{}, nil, func(t *testing.T, f *fixture) {
			ticket, list, j := give(t, f, 2)
			p, _ := to(list[1:], j)
			p.member.Accepted(j.ID)
			p.deliver(j, "hello")
			t.Logf("expected: the other's answer; got: %.60s", f.answered(ticket, "hello"))
			f.empty(1)
		})
	})
	t.Run("two agree", func(t *testing.T) {
		run(t, Options{}, nil, func(t *testing.T, f *fixture) {
			ticket, list, j := give(t, f, 3)
			p, rest := to(list[1:], j)
			p.member.Accepted(j.ID)
			if _, err := p.member.Result(&wire.Result{Job: j.ID, Code: wire.CodeBadRequest}); err != nil {
				t.Fatal(err)
			}
			t.Logf("expected: %s; got: %v", Refused, f.failed(ticket, Refused))
			none[*wire.Job](rest[0])
			f.empty(0)
		})
	})
	t.Run("two differ", func(t *testing.T) {
		run(t, Options{}, nil, func(t *testing.T, f *fixture) {
			ticket, list, j := give(t, f, 3)
			p, rest := to(list[1:], j)
			refuse(p, j, wire.CodeLimit)
			p, _ = to(rest, j)
			p.member.Accepted(j.ID)
			p.deliver(j, "hello")
			t.Logf("expected: the other's answer; got: %.60s", f.answered(ticket, "hello"))
			f.empty(1)
		})
	})
	t.Run("the other is lost", func(t *testing.T) {
		run(t, Options{}, nil, func(t *testing.T, f *fixture) {
			ticket, list, j := give(t, f, 2)
			p, _ := to(list[1:], j)
			p.member.Leave(false)
			f.sleep(5*time.Second, list[0]) // it gets the job once more
			must[*wire.Job](list[0])
			refuse(list[0], j, wire.CodeBadRequest)
			t.Logf("expected: %s; got: %v", Refused, f.failed(ticket, Refused))
			f.empty(0)
		})
	})
	t.Run("while another is at it", func(t *testing.T) {
		run(t, Options{}, nil, func(t *testing.T, f *fixture) {
			a := f.join(nil)
			ticket := f.submit(false)
			j := a.take()
			b := f.join(nil)
			f.sleep(20*time.Second, a, b) // a stalls
			b.take()
			if _, err := a.member.Result(&wire.Result{Job: j.ID, Code: wire.CodeLimit}); err != nil {
				t.Fatal(err)
			}
			f.waiting(ticket)
			b.deliver(j, "hello")
			t.Logf("expected: the other's answer; got: %.60s", f.answered(ticket, "hello"))
			f.empty(1)
		})
	})
}

// A node cannot keep a job by repeating itself.
func TestRepetitionIsNoProgress(t *testing.T) {
	for name, say := range map[string]func(*peer, *wire.Job){
		"accept":    func(p *peer, j *wire.Job) { p.member.Accepted(j.ID) },
		"duplicate": func(p *peer, j *wire.Job) { p.member.Refused(&wire.Refuse{Job: j.ID, Code: wire.CodeDuplicate}) },
		"chunk":     func(p *peer, j *wire.Job) { p.chunk(j, nodetest.Body(j, "hello"), 0, 50) },
	} {
		t.Run(name, func(t *testing.T) {
			run(t, Options{}, nil, func(t *testing.T, f *fixture) {
				a := f.join(nil)
				ticket := f.submit(true)
				j := a.take()
				say(a, j)
				b := f.join(nil)
				for range 20 {
					none[*wire.Job](b)
					f.sleep(time.Second, a, b)
					say(a, j)
				}
				b.take()
				b.deliver(j, "hello")
				f.answered(ticket, "hello")
				b.acked(j)
				f.empty(1)
			})
		})
	}
}

// With one node alone a job comes back to it, after a pause and so often only.
func TestOneNodeThatFails(t *testing.T) {
	run(t, Options{Attempts: 3}, nil, func(t *testing.T, f *fixture) {
		a := f.join(nil)
		ticket := f.submit(false)
		for i := range 3 {
			j := a.take()
			if _, err := a.member.Result(&wire.Result{Job: j.ID, Code: wire.CodeEngine, Message: "it ended"}); err != nil {
				t.Fatal(err)
			}
			a.acked(j)
			if i < 2 {
				time.Sleep(retries[i] - time.Millisecond)
				none[*wire.Job](a)
				time.Sleep(time.Millisecond)
			}
		}
		if got := f.failed(ticket, Failed); got.Code != wire.CodeEngine {
			t.Fatalf("failure %+v", got)
		}
		f.empty(0)
	})
}

// A busy node that has not had the job is better than a free one that failed it.
func TestFailedNodeIsAvoided(t *testing.T) {
	run(t, Options{}, func(c *snapshot.Config) { c.Runtime.Settings.Slots = 1 }, func(t *testing.T, f *fixture) {
		a := f.join(nil)
		first := f.submit(false)
		ja := a.take()
		b := f.join(nil)
		second := f.submit(false)
		jb := b.take()
		if _, err := a.member.Result(&wire.Result{Job: ja.ID, Code: wire.CodeEngine}); err != nil {
			t.Fatal(err)
		}
		f.sleep(3*time.Second, a, b)
		none[*wire.Job](a)
		b.deliver(jb, "two")
		f.answered(second, "two")
		if j := b.take(); j.ID != ja.ID {
			t.Fatal("another job")
		}
		b.deliver(ja, "one")
		f.answered(first, "one")
		f.empty(2)
	})
}

func TestDeadline(t *testing.T) {
	run(t, Options{}, nil, func(t *testing.T, f *fixture) {
		a := f.join(nil)
		ticket := f.submit(false)
		j := a.take()
		f.sleep(59*time.Second, a)
		f.waiting(ticket)
		f.sleep(time.Second, a)
		f.failed(ticket, Deadline)
		must[*wire.Cancel](a)
		f.empty(0)
		// What comes now is too late to count.
		a.deliver(j, "hello")
		a.acked(j)
		f.empty(0)
	})
}

func TestNoNode(t *testing.T) {
	run(t, Options{}, nil, func(t *testing.T, f *fixture) {
		ticket := f.submit(false) // the service has just begun: nodes may be on their way
		f.sleep(5 * time.Second)
		f.failed(ticket, NoNode)
		_, err := f.d.Submit(Work{Kind: wire.KindChat, Model: nodetest.Model, Body: []byte("{}")})
		if got, ok := AsFailure(err); !ok || got.Outcome != NoNode {
			t.Fatalf("got %v", err)
		}
		if got := f.metric(`resultity_jobs_total{outcome="no_node"}`); got != "2" {
			t.Errorf("%s jobs are counted, want 2", got)
		}
		a := f.join(nil)
		f.submit(false)
		must[*wire.Job](a)
		// Nobody is left, but the job was given out: the node may come back.
		a.member.Leave(false)
		second := f.submit(false)
		f.sleep(6 * time.Second)
		f.failed(second, NoNode)
		if jobs, _ := f.store.count(); jobs != 1 {
			t.Fatalf("%d jobs", jobs)
		}
	})
}

// A job that every node refused which was given it is given up like one that was never
// given out; one that a node may have is not, whatever that says.
func TestNoNodeAfterRefusals(t *testing.T) {
	refuse := func(p *peer, j *wire.Job) {
		p.member.Refused(&wire.Refuse{Job: j.ID, Code: wire.CodeDraining})
	}
	drain := func(p *peer) { p.beat(func(h *wire.Heartbeat) { h.Draining = true }) }
	give := func(t *testing.T, opt Options, test func(t *testing.T, f *fixture, a *peer, ticket *Ticket, j *wire.Job)) {
		run(t, opt, nil, func(t *testing.T, f *fixture) {
			a := f.join(nil)
			ticket := f.submit(false)
			test(t, f, a, ticket, must[*wire.Job](a))
		})
	}
	// unsure checks that a job waits for its deadline, and for the node.
	unsure := func(t *testing.T, f *fixture, a *peer, ticket *Ticket, j *wire.Job) {
		drain(a)
		f.sleep(40 * time.Second)
		f.waiting(ticket)
		a.deliver(j, "hello")
		f.answered(ticket, "hello")
		a.acked(j)
		f.empty(1)
	}
	t.Run("refused", func(t *testing.T) {
		give(t, Options{}, func(t *testing.T, f *fixture, a *peer, ticket *Ticket, j *wire.Job) {
			refuse(a, j)
			drain(a)
			f.sleep(4999 * time.Millisecond)
			f.waiting(ticket)
			f.sleep(time.Millisecond)
			f.failed(ticket, NoNode)
			f.empty(0)
		})
	})
	t.Run("refused for ever", func(t *testing.T) { // by one whose heartbeats say that it takes jobs
		give(t, Options{Attempts: 3}, func(t *testing.T, f *fixture, a *peer, ticket *Ticket, j *wire.Job) {
			for range 2 {
				refuse(a, j)
				f.sleep(time.Second, a)
				must[*wire.Job](a)
			}
			refuse(a, j)
			if got := f.failed(ticket, Failed); got.Code != wire.CodeDraining {
				t.Errorf("%+v", got)
			}
			f.empty(0)
		})
	})
	t.Run("refused after everybody has gone", func(t *testing.T) {
		give(t, Options{}, func(t *testing.T, f *fixture, a *peer, ticket *Ticket, j *wire.Job) {
			drain(a)
			f.sleep(2 * time.Second)
			refuse(a, j)
			f.sleep(2999 * time.Millisecond)
			f.waiting(ticket)
			f.sleep(time.Millisecond)
			f.failed(ticket, NoNode)
			f.empty(0)
		})
	})
	t.Run("by one, and another has it", func(t *testing.T) {
		give(t, Options{}, func(t *testing.T, f *fixture, a *peer, ticket *Ticket, j *wire.Job) {
			b := f.join(nil)
			refuse(a, j)
			must[*wire.Job](b)
			drain(a)
			b.member.Leave(false)
			f.sleep(10 * time.Second)
			f.waiting(ticket) // it may have written it down
			b = f.join(b.node)
			if must[*wire.Job](b).ID != j.ID {
				t.Fatal("another job")
			}
			refuse(b, j) // it says that it has not, and an agent that is starting says so, too
			unsure(t, f, b, ticket, j)
		})
	})
	t.Run("by both", func(t *testing.T) {
		give(t, Options{}, func(t *testing.T, f *fixture, a *peer, ticket *Ticket, j *wire.Job) {
			b := f.join(nil)
			refuse(a, j)
			refuse(b, must[*wire.Job](b))
			drain(a)
			drain(b)
			f.sleep(5 * time.Second)
			f.failed(ticket, NoNode)
			f.empty(0)
		})
	})
	t.Run("late", func(t *testing.T) { // it was slow to say so, and nobody else was there
		give(t, Options{}, func(t *testing.T, f *fixture, a *peer, ticket *Ticket, j *wire.Job) {
			time.Sleep(3500 * time.Millisecond)
			refuse(a, j)
			drain(a)
			f.sleep(5 * time.Second)
			f.failed(ticket, NoNode)
			f.empty(0)
		})
	})
	t.Run("never answered", func(t *testing.T) {
		give(t, Options{}, func(t *testing.T, f *fixture, a *peer, ticket *Ticket, j *wire.Job) {
			time.Sleep(3500 * time.Millisecond)
			unsure(t, f, a, ticket, j)
		})
	})
	for what, has := range map[string]wire.Message{"accepted": &wire.Accept{}, "a duplicate": &wire.Refuse{Code: wire.CodeDuplicate}, "failed": &wire.Result{Code: wire.CodeEngine}} {
		t.Run(what, func(t *testing.T) {
			give(t, Options{}, func(t *testing.T, f *fixture, a *peer, ticket *Ticket, j *wire.Job) {
				switch m := has.(type) {
				case *wire.Accept:
					a.member.Accepted(j.ID)
				case *wire.Refuse:
					m.Job = j.ID
					a.member.Refused(m)
				case *wire.Result:
					m.Job = j.ID
					if _, err := a.member.Result(m); err != nil {
						t.Fatal(err)
					}
					a.acked(j)
				}
				refuse(a, j)
				unsure(t, f, a, ticket, j)
			})
		})
	}
}

func TestQueueBounds(t *testing.T) {
	run(t, Options{MaxQueued: 2, MaxBytes: 100, Share: 100}, nil, func(t *testing.T, f *fixture) {
		f.submit(false)
		_, err := f.d.Submit(Work{Model: nodetest.Model, Body: make([]byte, 90)})
		t.Logf("too many bytes: expected: Too many requests are waiting; got: %v", err)
		if err == nil || !strings.HasPrefix(err.Error(), "Too many requests are waiting") {
			t.Fatalf("bytes: %v", err)
		}
		f.submit(false)
		_, err = f.d.Submit(Work{Model: nodetest.Model, Body: []byte("{}")})
		t.Logf("too many: expected: Too many requests are waiting; got: %v", err)
		if got, ok := AsFailure(err); !ok || got.Outcome != QueueFull {
			t.Fatalf("count: %v", err)
		}
		f.join(nil) // takes both
		synctest.Wait()
		f.submit(false)
	})
}

func (f *fixture) submitAs(client string, size int) (*Ticket, error) {
	return f.d.Submit(Work{Kind: wire.KindChat, Model: nodetest.Model, Body: make([]byte, size), Client: client})
}

// One client cannot take all places, nor all bytes.
func TestShares(t *testing.T) {
	run(t, Options{MaxQueued: 8, MaxBytes: 1000}, nil, func(t *testing.T, f *fixture) {
		full := func(client string, size int, want string) {
			t.Helper()
			_, err := f.submitAs(client, size)
			t.Logf("%s, %d bytes: expected: %s; got: %v", client, size, want, err)
			if got, ok := AsFailure(err); !ok || got.Outcome != QueueFull || !strings.Contains(got.Message, want) {
				t.Fatalf("got %v, want %q", err, want)
			}
		}
		taken := func(client string, size int) *Ticket {
			t.Helper()
			ticket, err := f.submitAs(client, size)
			if err != nil {
				t.Fatal(err)
			}
			return ticket
		}
		for range 4 {
			taken("greedy", 10)
		}
		full("greedy", 10, "of this API key")
		big := taken("big", 450)
		full("big", 100, "of this API key")
		taken("big", 50)
		for range 2 {
			taken("modest", 10)
		}
		full("modest", 10, "requests are waiting")
		big.Cancel()
		taken("big", 450)
	})
}

// A request larger than the share is served when it is the only one.
func TestShareOfOneRequest(t *testing.T) {
	run(t, Options{MaxQueued: 1, MaxBytes: 1000}, nil, func(t *testing.T, f *fixture) {
		_, err := f.submitAs("a", 900)
		t.Logf("90 %% of all bytes, alone: expected: <nil>; got: %v", err)
		if err != nil {
			t.Fatal(err)
		}
	})
}

// Clients take turns; each one's requests are served in their order.
func TestClientsTakeTurns(t *testing.T) {
	run(t, Options{}, func(c *snapshot.Config) { c.Runtime.Settings.Slots = 1 }, func(t *testing.T, f *fixture) {
		p := f.join(nil)
		name := map[receipt.JobID]string{}
		put := func(client string, count int) {
			for range count {
				ticket, err := f.submitAs(client, 10)
				if err != nil {
					t.Fatal(err)
				}
				name[ticket.ID()] = client
			}
		}
		put("a", 5)
		put("b", 2)
		put("c", 1)
		var got string
		for range 8 {
			j := p.take()
			got += name[j.ID]
			p.deliver(j, "x")
		}
		t.Logf("aaaaa, then bb, then c: expected: aabcabaa; got: %s", got)
		if got != "aabcabaa" {
			t.Errorf("served %s", got)
		}
		f.empty(8)
	})
}

// A job that no node may have yet is in nobody's way.
func TestTurnsPassOver(t *testing.T) {
	run(t, Options{}, nil, func(t *testing.T, f *fixture) {
		a := f.join(nil)
		ticket, err := f.submitAs("a", 10)
		if err != nil {
			t.Fatal(err)
		}
		j := a.take()
		a.member.Refused(&wire.Refuse{Job: j.ID, Code: wire.CodeEngine})
		for _, client := range []string{"a", "b"} { // its own client's, and another's
			if _, err := f.submitAs(client, 10); err != nil {
				t.Fatal(err)
			}
			if got := a.take(); got.ID == j.ID {
				t.Fatal("the job came back at once")
			}
		}
		f.waiting(ticket)
	})
}

// read reads what a stream has by now.
func (f *fixture) read(t *Ticket, from int) (string, error) {
	f.t.Helper()
	synctest.Wait()
	ctx, cancel := context.WithTimeout(f.t.Context(), time.Millisecond)
	defer cancel()
	b, err := t.Next(ctx, from)
	return string(b), err
}

func (p *peer) chunk(j *wire.Job, body []byte, from, to int) {
	p.f.t.Helper()
	if _, err := p.member.Chunk(&wire.Chunk{Job: j.ID, Offset: int64(from), Data: body[from:to]}); err != nil {
		p.f.t.Fatal(err)
	}
}

func TestStream(t *testing.T) {
	run(t, Options{}, nil, func(t *testing.T, f *fixture) {
		a := f.join(nil)
		ticket := f.submit(true)
		j := a.take()
		body := nodetest.Body(j, "one two three")
		a.chunk(j, body, 0, 30)
		if got, err := f.read(ticket, 0); err != nil || got != string(body[:30]) {
			t.Fatalf("%q %v", got, err)
		}
		a.chunk(j, body, 10, 40) // overlaps
		if got, _ := f.read(ticket, 30); got != string(body[30:40]) {
			t.Fatalf("%q", got)
		}
		a.chunk(j, body, 50, 60) // behind a gap
		if got, err := f.read(ticket, 40); !errors.Is(err, context.DeadlineExceeded) {
			t.Fatalf("%q %v", got, err)
		}
		a.chunk(j, body, 40, len(body))
		// The end mark waits for the receipt.
		mark := len(body) - len(endMark)
		if got, _ := f.read(ticket, 40); got != string(body[40:mark]) {
			t.Fatalf("%q", got)
		}
		if got, err := f.read(ticket, mark); !errors.Is(err, context.DeadlineExceeded) {
			t.Fatalf("%q %v", got, err)
		}
		a.deliver(j, "one two three")
		if got, err := f.read(ticket, mark); got != endMark || !errors.Is(err, io.EOF) {
			t.Fatalf("%q %v", got, err)
		}
		if _, err := f.read(ticket, len(body)); !errors.Is(err, io.EOF) {
			t.Fatal(err)
		}
		a.acked(j)
		f.empty(1)
	})
}

// The end mark is held back in whatever pieces it comes.
func TestEndMarkInPieces(t *testing.T) {
	run(t, Options{}, nil, func(t *testing.T, f *fixture) {
		a := f.join(nil)
		ticket := f.submit(true)
		j := a.take()
		body := nodetest.Body(j, "x")
		for i := range body {
			a.chunk(j, body, i, i+1)
			if got, _ := f.read(ticket, 0); strings.Contains(got, "[DONE]") {
				t.Fatalf("after %d of %d bytes: %q", i+1, len(body), got)
			}
		}
	})
}

// A result alone completes a stream of which no chunk came.
func TestStreamWithoutChunks(t *testing.T) {
	run(t, Options{}, nil, func(t *testing.T, f *fixture) {
		a := f.join(nil)
		ticket := f.submit(true)
		j := a.take()
		a.deliver(j, "one two")
		if got, _ := f.read(ticket, 0); got != string(nodetest.Body(j, "one two")) {
			t.Fatalf("%q", got)
		}
		f.empty(1)
	})
}

func TestStreamGoesOnFromAnotherNode(t *testing.T) {
	run(t, Options{}, nil, func(t *testing.T, f *fixture) {
		a := f.join(nil)
		ticket := f.submit(true)
		j := a.take()
		body := nodetest.Body(j, "one two three")
		a.chunk(j, body, 0, 100)
		b := f.join(nil)
		a.member.Leave(false)
		f.sleep(2*time.Second, b)
		b.take()
		b.chunk(j, body, 0, 90) // known already
		if got, _ := f.read(ticket, 0); got != string(body[:100]) {
			t.Fatalf("%q", got)
		}
		b.chunk(j, body, 90, 150)
		if got, _ := f.read(ticket, 100); got != string(body[100:150]) {
			t.Fatalf("%q", got)
		}
		b.deliver(j, "one two three")
		if got, _ := f.read(ticket, 150); got != string(body[150:]) {
			t.Fatalf("%q", got)
		}
		b.acked(j)
		f.empty(1)
	})
}

func TestStreamThatAnotherNodeContradicts(t *testing.T) {
	for name, contradict := range map[string]func(*peer, *wire.Job){
		"chunk":  func(b *peer, j *wire.Job) { b.chunk(j, nodetest.Body(j, "other words"), 0, 200) },
		"result": func(b *peer, j *wire.Job) { b.deliver(j, "other words") },
	} {
		t.Run(name, func(t *testing.T) {
			run(t, Options{}, nil, func(t *testing.T, f *fixture) {
				a := f.join(nil)
				ticket := f.submit(true)
				j := a.take()
				body := nodetest.Body(j, "one two three")
				a.chunk(j, body, 0, 200)
				b := f.join(nil)
				a.member.Leave(false)
				f.sleep(2*time.Second, b)
				b.take()
				contradict(b, j)
				if got, _ := f.read(ticket, 0); got != string(body[:200]) {
					t.Fatalf("%q", got)
				}
				_, err := f.read(ticket, 200)
				t.Logf("expected: %s; got: %v", Diverged, err)
				if got, ok := AsFailure(err); !ok || got.Outcome != Diverged {
					t.Fatalf("got %v", err)
				}
				f.empty(0)
			})
		})
	}
}

// Two nodes are at a stream; the one that contradicts it loses, even when it is
// first to finish.
func TestContradictingNodeLosesTheRace(t *testing.T) {
	run(t, Options{}, nil, func(t *testing.T, f *fixture) {
		a := f.join(nil)
		ticket := f.submit(true)
		j := a.take()
		body := nodetest.Body(j, "one two three")
		a.chunk(j, body, 0, 200)
		b := f.join(nil)
		f.sleep(20*time.Second, a, b)
		b.take()
		a.chunk(j, body, 200, 210) // alive after all, but it was given up: b has the job now
		c := f.join(nil)
		f.sleep(20*time.Second, a, b, c) // b makes no progress either
		c.take()
		b.deliver(j, "other words")
		b.acked(j)
		f.waiting(ticket)
		c.deliver(j, "one two three")
		t.Logf("expected: one two three, from a node that agrees; got: %s", f.answered(ticket, "one two three"))
		f.empty(1)
	})
}

func TestChunkViolations(t *testing.T) {
	run(t, Options{}, nil, func(t *testing.T, f *fixture) {
		a := f.join(nil)
		f.submit(false)
		plain := a.take()
		_, err := a.member.Chunk(&wire.Chunk{Job: plain.ID, Data: []byte("x")})
		t.Logf("of a plain job: expected: %v; got: %v", ErrInvalid, err)
		if !errors.Is(err, ErrInvalid) {
			t.Errorf("chunk of a plain job: %v", err)
		}
		f.submit(true)
		j := a.take()
		for _, offset := range []int64{-1, 1 << 20, 1<<63 - 1} {
			_, err := a.member.Chunk(&wire.Chunk{Job: j.ID, Offset: offset, Data: []byte("x")})
			t.Logf("offset %d: expected: %v; got: %v", offset, ErrInvalid, err)
			if !errors.Is(err, ErrInvalid) {
				t.Errorf("offset %d: %v", offset, err)
			}
		}
		_, err = a.member.Chunk(&wire.Chunk{Job: j.ID, Data: make([]byte, 1<<20+1)})
		t.Logf("too long: expected: %v; got: %v", ErrInvalid, err)
		if !errors.Is(err, ErrInvalid) {
			t.Errorf("long chunk: %v", err)
		}
	})
}

// Each thing that a result claims is checked; a false one is not acknowledged,
// costs the node its next jobs, and the job goes elsewhere.
func TestInvalidResults(t *testing.T) {
	other := digest.Of([]byte("other"))
	receiptCase := func(change func(*receipt.Receipt)) func(*testing.T, *peer, *wire.Job) *wire.Result {
		return func(t *testing.T, p *peer, j *wire.Job) *wire.Result {
			return p.node.Result(t, j, nodetest.Body(j, "x"), change)
		}
	}
	responseCase := func(change func([]byte) []byte) func(*testing.T, *peer, *wire.Job) *wire.Result {
		return func(t *testing.T, p *peer, j *wire.Job) *wire.Result {
			return p.node.Result(t, j, change(nodetest.Body(j, "x")), nil)
		}
	}
	cases := map[string]func(*testing.T, *peer, *wire.Job) *wire.Result{
		"no receipt": func(_ *testing.T, _ *peer, j *wire.Job) *wire.Result {
			return &wire.Result{Job: j.ID, Response: nodetest.Body(j, "x")}
		},
		"another node's": func(t *testing.T, p *peer, j *wire.Job) *wire.Result {
			return nodetest.New(t, "", p.f.raw).Result(t, j, nodetest.Body(j, "x"), nil)
		},
		"another chain's": func(t *testing.T, p *peer, j *wire.Job) *wire.Result {
			r := p.node.Result(t, j, nodetest.Body(j, "x"), nil)
			r.Receipt = p.node.Sign(t, r.Receipt.Receipt(), 1)
			return r
		},
		"another job's":     receiptCase(func(r *receipt.Receipt) { r.Job = receipt.JobID{1} }),
		"configuration":     receiptCase(func(r *receipt.Receipt) { r.Measured.ConfigDigest = other }),
		"image":             receiptCase(func(r *receipt.Receipt) { r.Measured.ImageDigest = other }),
		"model":             receiptCase(func(r *receipt.Receipt) { r.Measured.ModelDigest = other }),
		"request":           receiptCase(func(r *receipt.Receipt) { r.Measured.RequestHash = other }),
		"response":          receiptCase(func(r *receipt.Receipt) { r.Measured.ResponseHash = other }),
		"tokens":            receiptCase(func(r *receipt.Receipt) { r.Claimed.CompletionTokens = 1001 }),
		"prompt tokens":     receiptCase(func(r *receipt.Receipt) { r.Claimed.PromptTokens = 1025 }),
		"huge tokens":       receiptCase(func(r *receipt.Receipt) { r.Claimed.PromptTokens = 1 << 63 }),
		"backwards":         receiptCase(func(r *receipt.Receipt) { r.Claimed.StartedAt = r.Claimed.FinishedAt + 1 }),
		"before the job":    receiptCase(func(r *receipt.Receipt) { r.Claimed.StartedAt -= 20_000 }),
		"in the future":     receiptCase(func(r *receipt.Receipt) { r.Claimed.FinishedAt += 20_000 }),
		"far in the future": receiptCase(func(r *receipt.Receipt) { r.Claimed.FinishedAt = 1<<64 - 1 }),
		"no JSON":           responseCase(func([]byte) []byte { return []byte("hello") }),
		"another id":        responseCase(func(b []byte) []byte { return []byte(strings.Replace(string(b), "chatcmpl-", "chatcmpl-0", 1)) }),
		"another model": responseCase(func(b []byte) []byte {
			return []byte(strings.Replace(string(b), `"model":"tiny"`, `"model":"other"`, 1))
		}),
		"too long": responseCase(func(b []byte) []byte { return append(b, strings.Repeat(" ", 1<<20)...) }),
	}
	for name, make := range cases {
		t.Run(name, func(t *testing.T) {
			run(t, Options{}, nil, func(t *testing.T, f *fixture) {
				a := f.join(nil)
				ticket := f.submit(false)
				j := a.take()
				b := f.join(nil)
				_, err := a.member.Result(make(t, a, j))
				t.Logf("expected: %v; got: %v", ErrInvalid, err)
				if !errors.Is(err, ErrInvalid) {
					t.Fatalf("got %v", err)
				} else if strings.Contains(err.Error(), "hello") {
					t.Fatalf("the error quotes the response: %v", err)
				}
				a.member.Leave(true) // what the session does with that error
				none[*wire.Ack](a)
				f.waiting(ticket)
				b.take()
				b.deliver(j, "y")
				f.answered(ticket, "y")
				f.empty(1)
			})
		})
	}
	t.Run("stream without end", func(t *testing.T) {
		run(t, Options{}, nil, func(t *testing.T, f *fixture) {
			a := f.join(nil)
			f.submit(true)
			j := a.take()
			body := nodetest.Body(j, "x")
			_, err := a.member.Result(a.node.Result(t, j, body[:len(body)-1], nil))
			t.Logf("expected: %v; got: %v", ErrInvalid, err)
			if !errors.Is(err, ErrInvalid) {
				t.Fatalf("got %v", err)
			}
		})
	})
}

func TestPenalty(t *testing.T) {
	run(t, Options{}, nil, func(t *testing.T, f *fixture) {
		a := f.join(nil)
		for _, d := range []time.Duration{10 * time.Second, 30 * time.Second, time.Minute, 5 * time.Minute, 5 * time.Minute} {
			a.member.Leave(true)
			a = f.join(a.node) // a new session is no way around it
			if s := must[*wire.Status](a); s.Routable {
				t.Fatalf("routable after a violation")
			}
			f.sleep(d-time.Second, a)
			none[*wire.Status](a)
			f.sleep(time.Second, a)
			if s := must[*wire.Status](a); !s.Routable {
				t.Fatalf("after %v: %+v", d, s)
			}
		}
		f.sleep(forgiven, a)
		a.member.Leave(true)
		a = f.join(a.node)
		must[*wire.Status](a)
		f.sleep(10*time.Second, a)
		if s := must[*wire.Status](a); !s.Routable {
			t.Fatalf("old violations are not forgiven: %+v", s)
		}
	})
}

// A result that cannot be stored is kept: in memory, where it is tried again,
// and by its node, which is not told to forget it.
func TestResultThatCannotBeStored(t *testing.T) {
	run(t, Options{}, nil, func(t *testing.T, f *fixture) {
		a := f.join(nil)
		ticket := f.submit(false)
		j := a.take()
		var room atomic.Bool
		f.store.putResult = func() error {
			if !room.Load() {
				return errors.New("disk full")
			}
			return nil
		}
		a.deliver(j, "hello")
		f.answered(ticket, "hello")
		f.sleep(time.Minute, a)
		none[*wire.Ack](a)
		if f.d.Receipt(j.ID) == nil {
			t.Fatal("the receipt that the client was promised is not there")
		}
		// The node sends it again in a new session, and any number of times.
		a.member.Leave(false)
		a2 := f.join(a.node)
		none[*wire.Job](a2)
		res := a2.node.Result(t, j, nodetest.Body(j, "hello"), nil)
		for i, want := range []bool{true, false, false} {
			if known, err := a2.member.Result(res); known != want || err != nil {
				t.Fatalf("%d: %v %v", i, known, err)
			}
		}
		room.Store(true)
		f.sleep(time.Minute, a2)
		a2.acked(j)
		none[*wire.Ack](a2)
		if got := f.metric(`resultity_results_total{verdict="counted"}`); got != "1" {
			t.Errorf("counted %s results", got)
		}
		f.empty(1)
	})
}

// The service ends between the answer and the store: the node sends the result
// again to the next run, where it counts, and no other node's.
func TestCrashBetweenAnswerAndStore(t *testing.T) {
	run(t, Options{}, nil, func(t *testing.T, f *fixture) {
		a := f.join(nil)
		ticket := f.submit(false)
		j := a.take()
		f.store.putResult = func() error { return errors.New("it ends here") }
		a.deliver(j, "hello")
		f.answered(ticket, "hello")
		f.d.Close()
		none[*wire.Ack](a)
		f.store.putResult = nil

		f.d = New(f.store, f.terms, f.m, slog.New(slog.DiscardHandler), Options{})
		lookup := func(context.Context, digest.Digest) (*Terms, error) { return f.terms, nil }
		if err := f.d.Restore(t.Context(), slices.Collect(maps.Values(f.store.jobs)), lookup); err != nil {
			t.Fatal(err)
		}
		b := f.join(nil) // is there first, and must not get it
		none[*wire.Job](b)
		a = f.join(a.node)
		a.deliver(j, "hello")
		a.acked(j)
		none[*wire.Job](b)
		if r, err := f.store.Result(t.Context(), j.ID); err != nil || r.Receipt.Receipt().Node != a.node.Key.Address() {
			t.Fatalf("%+v %v", r, err)
		}
		f.empty(1)
	})
}

// Two nodes deliver while the first result is on its way to the disk.
func TestResultsAtTheSameTime(t *testing.T) {
	run(t, Options{}, nil, func(t *testing.T, f *fixture) {
		a := f.join(nil)
		ticket := f.submit(false)
		j := a.take()
		b := f.join(nil)
		f.sleep(20*time.Second, a, b)
		b.take()
		hold := make(chan struct{})
		f.store.putResult = func() error { <-hold; return nil }
		a.deliver(j, "one")
		synctest.Wait()
		b.deliver(j, "two")
		none[*wire.Ack](b)
		f.answered(ticket, "one")
		close(hold)
		a.acked(j)
		b.acked(j)
		if got := f.metric(`resultity_results_total{verdict="counted"}`); got != "1" {
			t.Errorf("counted %s results", got)
		}
		f.empty(1)
	})
}

// A node refuses a job while the result of another one is on its way to the disk.
func TestRefusalBesideAResult(t *testing.T) {
	run(t, Options{}, nil, func(t *testing.T, f *fixture) {
		a := f.join(nil)
		ticket := f.submit(false)
		j := a.take()
		b := f.join(nil)
		f.sleep(20*time.Second, a, b) // a stalls
		b.take()
		hold := make(chan struct{})
		f.store.putResult = func() error { <-hold; return nil }
		b.deliver(j, "hello")
		synctest.Wait()
		if !a.member.Refused(&wire.Refuse{Job: j.ID, Code: wire.CodeBadRequest}) {
			t.Error("the node does not have the job")
		}
		f.answered(ticket, "hello")
		if f.d.Receipt(j.ID) == nil {
			t.Error("the client was answered, and there is no receipt")
		}
		close(hold)
		b.acked(j)
		if got := f.metric(`resultity_jobs_total{outcome="refused"}`); got != "" {
			t.Errorf("%s jobs are counted as refused", got)
		}
		f.empty(1)
	})
}

func TestCancel(t *testing.T) {
	run(t, Options{}, nil, func(t *testing.T, f *fixture) {
		a := f.join(nil)
		ticket := f.submit(false)
		j := a.take()
		ticket.Cancel()
		if c := must[*wire.Cancel](a); c.Job != j.ID {
			t.Fatal("another job")
		}
		f.empty(0)
		if _, err := a.member.Result(&wire.Result{Job: j.ID, Code: wire.CodeCancelled}); err != nil {
			t.Fatal(err)
		}
		a.acked(j)
		// Once the result is on its way to the disk it counts.
		ticket = f.submit(false)
		j = a.take()
		hold := make(chan struct{})
		f.store.putResult = func() error { <-hold; return nil }
		a.deliver(j, "hello")
		synctest.Wait()
		ticket.Cancel()
		none[*wire.Cancel](a)
		close(hold)
		a.acked(j)
		f.empty(1)
	})
}

// What happens to a job while the service stops does not take it from the next run.
func TestCloseLeavesJobs(t *testing.T) {
	run(t, Options{}, nil, func(t *testing.T, f *fixture) {
		a := f.join(nil)
		ticket, other := f.submit(false), f.submit(false)
		a.take()
		a.take()
		synctest.Wait()
		f.d.Close()
		f.failed(ticket, Closing)
		ticket.Cancel() // the client sees its connection closed
		a.member.Refused(&wire.Refuse{Job: other.ID(), Code: wire.CodeBadRequest})
		synctest.Wait()
		if jobs, _ := f.store.count(); jobs != 2 {
			t.Errorf("%d jobs are left for the next run, want 2", jobs)
		}
		if got := f.metric(`resultity_jobs_total{outcome="closing"}`); got != "2" {
			t.Errorf("%q jobs are counted, want 2", got)
		}
	})
}

func TestRestore(t *testing.T) {
	run(t, Options{}, nil, func(t *testing.T, f *fixture) {
		a := f.join(nil)
		stored, open, late := f.submit(false), f.submit(false), f.submit(false)
		jobs := map[receipt.JobID]*wire.Job{}
		for range 2 {
			j := a.take()
			jobs[j.ID] = j
		}
		// The service ends after it stored a result and before it forgot the job.
		if err := f.store.PutResult(t.Context(), a.node.Result(t, jobs[stored.ID()], nodetest.Body(jobs[stored.ID()], "x"), nil).Receipt, digest.Digest{}, nil); err != nil {
			t.Fatal(err)
		}
		f.d.Close()
		f.failed(open, Closing)
		records := slices.SortedFunc(maps.Values(f.store.jobs), func(a, b *store.Job) int { return int(a.Seq) - int(b.Seq) })
		for _, r := range records {
			if r.ID == late.ID() {
				r.Deadline = time.Now().UnixMilli()
			}
		}
		// What a node sends meanwhile is not acknowledged: nobody would keep it.
		a.deliver(jobs[open.ID()], "hello")
		none[*wire.Ack](a)

		f.d = New(f.store, f.terms, f.m, slog.New(slog.DiscardHandler), Options{})
		lookup := func(context.Context, digest.Digest) (*Terms, error) { return f.terms, nil }
		if err := f.d.Restore(t.Context(), records, lookup); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if n, _ := f.store.count(); n != 1 {
			t.Fatalf("%d jobs, want the open one", n)
		}
		// The node comes back with its result before the job is given out.
		b := &peer{f: f, node: a.node}
		b.member = f.d.Join(a.node.Key.Address(), b)
		b.deliver(jobs[open.ID()], "hello")
		b.acked(jobs[open.ID()])
		f.empty(2)
	})
}

// A restored job is given out again, even to nodes that come late.
func TestRestoredJobIsGivenOut(t *testing.T) {
	run(t, Options{}, nil, func(t *testing.T, f *fixture) {
		f.submit(true)
		f.d.Close()
		records := slices.Collect(maps.Values(f.store.jobs))
		f.d = New(f.store, f.terms, f.m, slog.New(slog.DiscardHandler), Options{})
		if err := f.d.Restore(t.Context(), records, func(context.Context, digest.Digest) (*Terms, error) { return nil, store.ErrNotFound }); err != nil {
			t.Fatal(err)
		}
		f.sleep(20 * time.Second)
		a := f.join(nil)
		none[*wire.Job](a) // the node that had it may come
		f.sleep(10*time.Second, a)
		j := a.take()
		a.chunk(j, nodetest.Body(j, "hello"), 0, 50) // nobody reads it
		a.deliver(j, "hello")
		a.acked(j)
		f.empty(1)
	})
}

func TestConfigure(t *testing.T) {
	run(t, Options{}, nil, func(t *testing.T, f *fixture) {
		a := f.join(nil)
		must[*wire.Status](a)
		running := f.submit(false)
		j := a.take()
		old := a.node.Digest

		c := nodetest.Config(t, evm.Address{1})
		c.Limits.Tokens++
		raw := nodetest.JSON(t, c)
		f.d.Configure(termsOf(t, raw, 2))
		if u := must[*wire.Update](a); u.Version != 2 {
			t.Fatalf("update %+v", u)
		}
		if s := must[*wire.Status](a); s.Routable || !strings.Contains(s.Reason, old.String()) {
			t.Fatalf("status %+v", s)
		}
		waiting := f.submit(false)
		none[*wire.Job](a)
		// What runs ends under the terms that it was given out under.
		a.deliver(j, "hello")
		f.answered(running, "hello")
		// The node follows.
		a.node.Digest = digest.Of(raw)
		a.beat(nil)
		if s := must[*wire.Status](a); !s.Routable {
			t.Fatalf("status %+v", s)
		}
		j = a.take()
		if j.Config != a.node.Digest {
			t.Fatalf("job under %s", j.Config)
		}
		a.deliver(j, "new")
		f.answered(waiting, "new")
		f.empty(2)
	})
}

// Many nodes are told of a new configuration one after the other.
func TestConfigureManyNodes(t *testing.T) {
	run(t, Options{}, nil, func(t *testing.T, f *fixture) {
		var peers []*peer
		for range 3 * atOnce {
			peers = append(peers, f.join(nil))
		}
		told := func() (n int) {
			for _, p := range peers {
				if _, ok := next[*wire.Update](p); ok {
					n++
				}
			}
			return n
		}
		again := func(version int64) {
			terms := *f.d.Terms()
			terms.Version = version
			f.d.Configure(&terms)
		}
		again(2)
		if n := told(); n != atOnce {
			t.Errorf("%d at once", n)
		}
		time.Sleep(atOnce * turnTime)
		if n := told(); n != atOnce {
			t.Errorf("%d in the time for %d", n, atOnce)
		}
		again(3) // who waits for the one before is told of this
		time.Sleep(3 * atOnce * turnTime)
		if n := told(); n != 3*atOnce {
			t.Errorf("%d of the next", n)
		}
	})
}

func TestModelWithdrawn(t *testing.T) {
	run(t, Options{}, nil, func(t *testing.T, f *fixture) {
		waiting, other := f.submit(false), f.submit(false)
		c := nodetest.Config(t, evm.Address{1})
		c.Models[0].Name, c.Runtime.Model = "new", "new"
		f.d.Configure(termsOf(t, nodetest.JSON(t, c), 2))
		f.failed(waiting, Withdrawn)
		f.failed(other, Withdrawn)
		f.empty(0)
	})
}

// The same node in a new session: the old one's word no longer counts.
func TestReplacedSession(t *testing.T) {
	run(t, Options{}, nil, func(t *testing.T, f *fixture) {
		old := f.join(nil)
		ticket := f.submit(false)
		j := old.take()
		p := f.join(old.node)
		must[*wire.Job](p)
		if old.member.Accepted(j.ID) {
			t.Error("the old session still has the job")
		}
		old.deliver(j, "old")
		none[*wire.Ack](old)
		old.member.Leave(true) // too late to hurt
		f.waiting(ticket)
		p.deliver(j, "hello")
		f.answered(ticket, "hello")
		f.submit(false)
		must[*wire.Job](p)
	})
}

// A node that comes and goes cannot hold a job for ever.
func TestFlappingNode(t *testing.T) {
	run(t, Options{}, nil, func(t *testing.T, f *fixture) {
		a := f.join(nil)
		ticket := f.submit(false)
		j := a.take()
		b := f.join(nil)
		for range adoptions + 1 {
			a.member.Leave(false)
			f.sleep(time.Second, b)
			a = f.join(a.node)
		}
		f.sleep(3*time.Second, a, b)
		b.take()
		b.deliver(j, "hello")
		f.answered(ticket, "hello")
	})
}

// Nodes that have gone are forgotten.
func TestNodesAreForgotten(t *testing.T) {
	run(t, Options{}, nil, func(t *testing.T, f *fixture) {
		for range 10 {
			f.join(nil).member.Leave(false)
		}
		if n := len(f.d.Nodes()); n != 0 {
			t.Fatalf("%d nodes are remembered", n)
		}
	})
}
