package agent

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"regexp"
	gort "runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/resultity/node/internal/config"
	"github.com/resultity/node/internal/control"
	"github.com/resultity/node/internal/deploy/deploytest"
	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/evm"
	"github.com/resultity/node/internal/gate"
	"github.com/resultity/node/internal/generation"
	"github.com/resultity/node/internal/journal"
	"github.com/resultity/node/internal/openai"
	"github.com/resultity/node/internal/podman"
	"github.com/resultity/node/internal/receipt"
	"github.com/resultity/node/internal/runtime"
	"github.com/resultity/node/internal/session"
	"github.com/resultity/node/internal/signer"
	"github.com/resultity/node/internal/snapshot"
	"github.com/resultity/node/internal/state"
	"github.com/resultity/node/internal/tuf"
	"github.com/resultity/node/internal/wire"
)

var nodeKey = newKey()

func newKey() *evm.Key {
	k, err := evm.NewKey()
	if err != nil {
		panic(err)
	}
	return k
}

// TestMain fails when a test leaves a goroutine of ours behind.
func TestMain(m *testing.M) {
	code := m.Run()
	if left := strays(); code == 0 && left != "" {
		fmt.Fprintln(os.Stderr, "goroutines left:\n"+left)
		code = 1
	}
	os.Exit(code)
}

func strays() string {
	var left []string
	for range 6000 { // what is ending may take a moment, on a busy machine a minute
		buf := make([]byte, 4<<20)
		left = nil
		for i, g := range strings.Split(string(buf[:gort.Stack(buf, true)]), "\n\n") {
			if i > 0 && strings.Contains(g, "resultity/node/internal/") {
				left = append(left, g)
			}
		}
		if left == nil {
			return ""
		}
		time.Sleep(10 * time.Millisecond)
	}
	return strings.Join(left, "\n\n")
}

// patience is for what must come, also on a busy machine.
const patience = 2 * time.Minute

// logbook keeps what was logged.
type logbook struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logbook) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logbook) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// count returns how often an event was logged.
func (l *logbook) count(e *journal.Event) int {
	return len(regexp.MustCompile(`event=`+e.Name+`\b`).FindAllString(l.String(), -1))
}

// tufs is the network's repository and the cache, as package tuf shows them.
type tufs struct {
	mu    sync.Mutex
	next  *snapshot.Snapshot // what the network has
	err   error              // what it answers in its place
	last  *snapshot.Snapshot // what is kept
	bad   error              // of what is kept
	hangs bool               // the network does not answer
	asked []time.Time
}

func (f *tufs) serve(s *snapshot.Snapshot, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.next, f.err = s, err
}

func (f *tufs) calls() []time.Time {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.asked)
}

func (f *tufs) Refresh(ctx context.Context) (*snapshot.Snapshot, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.asked = append(f.asked, time.Now())
	if f.hangs {
		f.mu.Unlock()
		<-ctx.Done()
		f.mu.Lock()
	}
	switch {
	case ctx.Err() != nil:
		return nil, ctx.Err()
	case f.err != nil:
		return nil, f.err
	}
	f.last = f.next
	return f.next, nil
}

func (f *tufs) Last() (*snapshot.Snapshot, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	switch {
	case f.bad != nil:
		return nil, f.bad
	case f.last == nil:
		return nil, fs.ErrNotExist
	}
	return f.last, nil
}

func (f *tufs) Trust() (*tuf.Trust, error) {
	return &tuf.Trust{Roots: []tuf.Metadata{{Version: 7}}}, nil
}

// proofs are of all networks of all tests, by what stands for them on disk.
var proofs sync.Map

func (f *tufs) Proof(s *snapshot.Snapshot) ([]byte, error) {
	proofs.Store(s.Digest().String(), s)
	return []byte(s.Digest().String()), nil
}

func (f *tufs) Open(proof []byte) (*snapshot.Snapshot, error) {
	s, ok := proofs.Load(string(proof))
	if !ok {
		return nil, snapshot.ErrUntrusted
	}
	return s.(*snapshot.Snapshot), nil
}

// wirelink is the session, which connects when it runs.
type wirelink struct {
	h    session.Handler
	sent chan wire.Message
	up   chan struct{} // closed when it runs
}

func (l *wirelink) Run(ctx context.Context) error {
	close(l.up) // a second Run fails here
	l.h.Opened()
	<-ctx.Done()
	return nil
}

func (l *wirelink) Send(m wire.Message) error {
	select {
	case <-l.up:
	default:
		return session.ErrNotConnected
	}
	l.sent <- m
	return nil
}

// talker is an engine that answers when it is told to.
type talker struct {
	mu     sync.Mutex
	open   int
	asked  chan struct{}
	answer chan struct{}
	fails  error  // what it does in place of all this
	says   string // with that it writes real answers
}

func (e *talker) Run(ctx context.Context, j runtime.Job, _ func([]byte) error) (runtime.Result, error) {
	if j.Sent != nil {
		if err := j.Sent(); err != nil {
			return runtime.Result{}, err
		}
	}
	e.mu.Lock()
	fails, says := e.fails, e.says
	e.mu.Unlock()
	if fails != nil {
		return runtime.Result{}, fails
	}
	e.asked <- struct{}{}
	select {
	case <-e.answer:
		if says != "" {
			return written(j, says)
		}
		return runtime.Result{Body: []byte("{}"), Usage: openai.Usage{PromptTokens: 1, CompletionTokens: 1}}, nil
	case <-ctx.Done():
		return runtime.Result{}, context.Cause(ctx)
	}
}

func (e *talker) Close() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.open--
}

// party is a network and the node's part in it.
type party struct {
	*membership
	tuf  *tufs
	link *wirelink

	mu      sync.Mutex
	enrols  []session.Registration
	refusal error // of registrations
}

// fixture is an agent in a world that does as it is told.
type fixture struct {
	*Agent
	*party  // the first network
	parties []*party
	t       *testing.T
	machine *deploytest.Machine
	engine  *talker
	book    *logbook
	damaged error // what is found when the models are hashed
	altered error // and when the image is looked at
}

var errBroken = errors.New("broken")

// build makes an agent in testnet alone. Call it again with the same directory
// for a restart.
func build(t *testing.T, dir string, m *deploytest.Machine) *fixture {
	return buildIn(t, dir, m, config.Network{Name: "testnet", URL: "https://network.example.net"})
}

// buildIn makes an agent in networks, the one of the highest priority first.
func buildIn(t *testing.T, dir string, m *deploytest.Machine, networks ...config.Network) *fixture {
	t.Helper()
	cfg := &config.Config{Networks: networks, Paths: config.Paths{State: dir, Runtime: filepath.Join(dir, "run")}}
	f := &fixture{t: t, machine: m, book: &logbook{}, engine: &talker{asked: make(chan struct{}, 16), answer: make(chan struct{}, 16)}}
	f.Agent = empty(cfg, slog.New(journal.Text(f.book, slog.LevelInfo)), "1.2.3")
	f.held, f.Agent.key = nodeKey, signer.NewLocal(nodeKey, nil)
	f.units = m.Units()
	for _, n := range networks {
		p := f.joined(n)
		f.parties, f.members = append(f.parties, p), append(f.members, p.membership)
	}
	f.party = f.parties[0]
	f.distrust = func(context.Context, digest.Digest) error { return f.damaged }
	f.verifyImage = func(context.Context, *snapshot.Snapshot) error { return f.altered }
	f.verify = func(ctx context.Context, s *snapshot.Snapshot) error { return f.damaged }
	var err error
	if f.gens, err = generation.Open(filepath.Join(dir, "generations"), time.Now); err != nil {
		t.Fatal(err)
	}
	f.memory = func() int64 { return 1 << 30 }
	f.recallDrain()
	f.openDeployer = func(context.Context) (deployer, error) {
		d := m.Deployer()
		d.Progress, d.Reached = f.progress, f.reached
		d.Newest = func(network string) *snapshot.Snapshot { return f.named(network).board.snapshot() }
		return d, nil
	}
	f.openEngine = func(string) engine {
		f.engine.mu.Lock()
		defer f.engine.mu.Unlock()
		f.engine.open++
		return f.engine
	}
	return f
}

// joined opens the part in one network, without a real one.
func (f *fixture) joined(n config.Network) *party {
	f.t.Helper()
	p := &party{membership: newMembership(n, f.Agent, f.shared), tuf: &tufs{}}
	p.link = &wirelink{h: p.membership, sent: make(chan wire.Message, 1000), up: make(chan struct{})}
	p.key, p.snaps, p.session = f.Agent.key, p.tuf, p.link
	dir := p.dir
	if err := os.MkdirAll(dir, 0o700); err != nil {
		f.t.Fatal(err)
	}
	var err error
	if p.store, err = state.Open(filepath.Join(dir, "jobs"), state.DefaultBounds, time.Now); err != nil {
		f.t.Fatal(err)
	}
	p.closers = append(p.closers, p.store.Close)
	if err := p.openRecords(dir); err != nil {
		f.t.Fatal(err)
	}
	if err := p.openBook(filepath.Join(dir, "orders.json")); err != nil {
		f.t.Fatal(err)
	}
	p.openWorker(time.Now)
	p.enrol = func(_ context.Context, r session.Registration) (*wire.Registered, error) {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.enrols = append(p.enrols, r)
		if p.refusal != nil {
			return nil, p.refusal
		}
		return &wire.Registered{Network: r.Body.Network, Node: r.Body.Node, Account: "acme", Time: 1}, nil
	}
	return p
}

// refuse is the network's answer to registrations from now on.
func (p *party) refuse(err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.refusal = err
}

// run runs the loops until the returned function is called. Only what a bubble
// of synctest can follow: no control socket, and no session.
func (f *fixture) run() (stop func()) {
	ctx, cancel := context.WithCancel(f.t.Context())
	loops := []func(context.Context) error{f.updates, f.watchRuntime, f.watchGates, f.mendDamage, f.watchImage}
	for _, m := range f.members {
		m.recall()
		loops = append(loops, m.worker.Run, m.follow, m.heartbeats, m.orders, m.showReceipts, m.validations)
	}
	var wg sync.WaitGroup
	for _, loop := range loops {
		wg.Go(func() {
			if err := loop(ctx); err != nil {
				f.t.Error(err)
			}
		})
	}
	return func() {
		cancel()
		wg.Wait()
		if err := f.Close(); err != nil {
			f.t.Error(err)
		}
		if f.engine.open != 0 {
			f.t.Errorf("%d engine clients were not closed", f.engine.open)
		}
	}
}

// bubble runs a test with an agent whose time is its own.
func bubble(t *testing.T, test func(t *testing.T, f *fixture, n *deploytest.Network)) {
	t.Helper()
	n, dir := deploytest.NewNetwork(t), t.TempDir()
	m := deploytest.New(t)
	synctest.Test(t, func(t *testing.T) { test(t, build(t, dir, m), n) })
}

// pass lets some time pass.
func pass(d time.Duration) { time.Sleep(d); synctest.Wait() }

func (f *fixture) gate(name string) gate.Gate {
	f.t.Helper()
	for _, g := range f.Status().Gates {
		if g.Name == name {
			return g
		}
	}
	f.t.Fatalf("no gate %s", name)
	return gate.Gate{}
}

// serves checks what is active, nil for nothing.
func (f *fixture) serves(s *snapshot.Snapshot) {
	f.t.Helper()
	slots := f.worker.Status().Slots
	phase := f.board.runtimeState().State
	switch {
	case s == nil && (slots != 0 || phase == active):
		f.t.Errorf("%d slots, %s; want nothing active", slots, phase)
	case s != nil && (slots != s.Config().Runtime.Settings.Slots || phase != active || f.board.config() != s.Digest()):
		f.t.Errorf("%d slots, %s, configuration %s; want version %d active\n%s", slots, phase, f.board.config().Short(), s.Version(), f.book)
	}
}

func TestRun(t *testing.T) {
	n, m := deploytest.NewNetwork(t), deploytest.New(t)
	f := build(t, t.TempDir(), m)
	s := n.Publish(nil)
	f.tuf.serve(s, nil)

	// systemd's side.
	name := filepath.Join(t.TempDir(), "notify")
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: name, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	t.Setenv("NOTIFY_SOCKET", name)
	t.Setenv("WATCHDOG_USEC", "30000")
	t.Setenv("WATCHDOG_PID", fmt.Sprint(os.Getpid()))
	expect := func(want string) {
		t.Helper()
		buf := make([]byte, 4096)
		for {
			if err := conn.SetReadDeadline(time.Now().Add(patience)); err != nil {
				t.Fatal(err)
			}
			k, err := conn.Read(buf)
			if err != nil {
				t.Fatalf("no %s: %v\n%s", want, err, f.book)
			}
			if strings.HasPrefix(string(buf[:k]), want) {
				return
			}
		}
	}

	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	done := make(chan error, 1)
	if err := os.MkdirAll(f.cfg.Paths.Runtime, 0o700); err != nil {
		t.Fatal(err)
	}
	go func() { done <- f.Run(ctx) }()
	expect("READY=1")
	expect("WATCHDOG=1")

	// A hung agent says nothing. What it said before may wait here to be read, and one
	// message may have been on its way.
	f.board.mu.Lock()
	buf := make([]byte, 4096)
	quiet := func() int {
		k := 0
		if err := conn.SetReadDeadline(time.Now().Add(150 * time.Millisecond)); err != nil {
			t.Error(err)
		}
		for {
			if _, err := conn.Read(buf); err != nil {
				return k
			}
			k++
		}
	}
	first, second := quiet(), quiet()
	f.board.mu.Unlock()
	if second > 1 {
		t.Errorf("%d and then %d messages from an agent that hangs", first, second)
	}
	expect("WATCHDOG=1")

	// The control socket answers, and a job is taken.
	client := control.NewClient(filepath.Join(f.cfg.Paths.Runtime, control.SocketName))
	await(t, f, func(h *wire.Heartbeat) bool { return h.Runtime.State == active && h.Slots > 0 })
	f.Message(&wire.Status{Routable: true})
	var st control.Status
	if err := client.Get(ctx, "status", &st); err != nil || !st.GetsJobs() || st.Node != nodeKey.Address().Hex() || st.Networks[0].Snapshot.Digest != s.Digest().String() || st.Version != "1.2.3" {
		t.Errorf("%+v, %v", st, err)
	}
	f.Message(job(s))
	await(t, f, func(*wire.Accept) bool { return true })
	<-f.engine.asked
	var jobs []control.Job
	if err := client.Get(ctx, "jobs", &jobs); err != nil || len(jobs) != 1 || jobs[0].State != "running" {
		t.Errorf("jobs %+v, %v", jobs, err)
	}

	// Told to stop, it finishes the job, takes no other and says goodbye.
	cancel()
	expect("STOPPING=1")
	await(t, f, func(h *wire.Heartbeat) bool { return h.Draining }) // so that others get the jobs
	other := job(s)
	f.Message(other)
	select {
	case err := <-done:
		t.Fatalf("it ended before the job: %v", err)
	default:
	}
	f.engine.answer <- struct{}{}
	if err := <-done; err != nil {
		t.Error(err)
	}
	var results, byes int
	close(f.link.sent)
	for m := range f.link.sent {
		switch m := m.(type) {
		case *wire.Result:
			if results++; m.Code != "" || m.Receipt == nil {
				t.Errorf("result %+v", m)
			}
		case *wire.Bye:
			byes++
		case *wire.Refuse:
			if m.Job != other.ID || m.Code != wire.CodeDraining {
				t.Errorf("%+v", m)
			}
		}
	}
	if results != 1 || byes != 1 {
		t.Errorf("%d results, %d goodbyes", results, byes)
	}
	if err := client.Get(context.Background(), "status", &st); !errors.Is(err, control.ErrNotRunning) {
		t.Errorf("after the end: %v", err)
	}
	if err := f.Close(); err != nil {
		t.Error(err)
	}
}

// await waits for a message that is ok.
func await[M wire.Message](t *testing.T, f *fixture, ok func(M) bool) {
	t.Helper()
	late := time.After(patience)
	for {
		select {
		case m := <-f.link.sent:
			if h, is := m.(M); is && ok(h) {
				return
			}
		case <-late:
			t.Fatalf("the message does not come\n%s", f.book)
		}
	}
}

func job(s *snapshot.Snapshot) *wire.Job {
	return &wire.Job{
		ID: receipt.NewJobID(), Model: s.Config().Runtime.Model, Kind: wire.KindChat, Config: s.Digest(),
		Request: []byte(`{"model":"tiny-chat","messages":[{"role":"user","content":"hi"}]}`),
		Created: time.Now().Unix(), Deadline: time.Now().Add(time.Minute).UnixMilli(),
	}
}

// A loop that fails ends the agent, with everything.
func TestRunFails(t *testing.T) {
	f := build(t, t.TempDir(), deploytest.New(t))
	if err := os.MkdirAll(f.cfg.Paths.Runtime, 0o700); err != nil {
		t.Fatal(err)
	}
	f.tuf.serve(nil, errBroken)
	if err := f.store.Close(); err != nil { // the worker cannot read it
		t.Fatal(err)
	}
	if err := f.Run(t.Context()); err == nil {
		t.Error("it ran without a store")
	}
	f = build(t, t.TempDir(), deploytest.New(t))
	f.cfg.Paths.Runtime = filepath.Join(t.TempDir(), "missing")
	if err := f.Run(t.Context()); err == nil {
		t.Error("it ran without a control socket")
	}
	if err := f.Close(); err != nil {
		t.Error(err)
	}
}

func TestHeartbeats(t *testing.T) {
	bubble(t, func(t *testing.T, f *fixture, n *deploytest.Network) {
		s := n.Publish(map[string]any{"network.heartbeat_s": 7, "network.window_s": 60})
		f.tuf.serve(s, nil)
		close(f.link.up)
		defer f.run()()
		pass(time.Second)
		h := last[*wire.Heartbeat](f.party)
		if h == nil || h.Config != s.Digest() || h.Runtime.State != active || h.Slots != 4 || len(h.Models) != 2 || h.Models[0].State != "active" || h.Models[1].State != "archived" || h.Draining {
			t.Fatalf("%+v", h)
		}
		if c := h.Class; c == nil || c.Digest.IsZero() || c.Hardware.CPU != "a CPU" || f.Status().Networks[0].Class.Digest != c.Digest {
			t.Errorf("class %+v, in status %+v", c, f.Status().Networks[0].Class)
		}
		pass(6*time.Second - time.Millisecond)
		if h := last[*wire.Heartbeat](f.party); h != nil {
			t.Errorf("one before its time: %+v", h)
		}
		pass(time.Millisecond)
		if h := last[*wire.Heartbeat](f.party); h == nil {
			t.Error("none at the interval")
		}
		f.podman.Store(&podman.Version{Major: 5, Minor: 8, Patch: 2})
		if err := f.Drain(); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if h := last[*wire.Heartbeat](f.party); h == nil || !h.Draining || h.Hardware.Podman != "5.8.2" {
			t.Errorf("after drain: %+v", h)
		}
		poke(f.beat)
		synctest.Wait()
		if h := last[*wire.Heartbeat](f.party); h == nil || !h.Draining {
			t.Errorf("after drain: %+v", h)
		}
		f.Resume()
		synctest.Wait()
		if h := last[*wire.Heartbeat](f.party); h == nil || h.Draining {
			t.Errorf("after resume: %+v", h)
		}
	})
}

// Of two operators at one instant one comes first, and the node is as the other
// has said: what it does, what it says and what it remembers.
func TestTwoOperators(t *testing.T) {
	f := build(t, t.TempDir(), deploytest.New(t))
	for range 200 {
		var wg sync.WaitGroup
		wg.Go(func() { _ = f.Drain() })
		wg.Go(func() { _ = f.Resume() })
		wg.Wait()
		_, err := os.Stat(f.drainFile())
		if s, kept := f.Status(), err == nil; s.Draining != kept || s.Draining != (len(s.Networks[0].Drains) == 1) {
			t.Fatalf("draining %v by %+v, remembered: %v", s.Draining, s.Networks[0].Drains, kept)
		}
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
}

// The operator's drain outlives the process, until the operator takes it back.
func TestDrainIsRemembered(t *testing.T) {
	dir, n := t.TempDir(), deploytest.New(t)
	start := func(want bool) *fixture {
		t.Helper()
		f := build(t, dir, n)
		s := f.Status()
		if s.Draining != want || want != (len(s.Networks[0].Drains) == 1 && s.Networks[0].Drains[0].By == byOperator) {
			t.Fatalf("draining %v by %+v, want %v", s.Draining, s.Networks[0].Drains, want)
		}
		return f
	}
	stop := func(f *fixture) {
		t.Helper()
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
	}
	f := start(false)
	before := time.Now().Add(-time.Second)
	for range 2 {
		if err := f.Drain(); err != nil {
			t.Fatal(err)
		}
	}
	since := f.Status().Networks[0].Drains[0].Since
	if since.Before(before.Truncate(time.Second)) || since.After(time.Now()) {
		t.Errorf("since %v", since)
	}
	stop(f)
	f = start(true)
	if got := f.Status().Networks[0].Drains[0].Since; !got.Equal(since) {
		t.Errorf("since %v after a restart, want %v", got, since)
	}
	var accepting gate.Gate
	for _, g := range f.Status().Gates {
		if g.Name == gate.Accepting {
			accepting = g
		}
	}
	if !strings.Contains(accepting.Detail, since.Format("since 2006-01-02 15:04")) {
		t.Errorf("%+v does not say since when", accepting)
	}
	stop(f)
	if err := os.WriteFile(f.drainFile(), []byte("\xff"), 0o600); err != nil {
		t.Fatal(err)
	}
	f = start(true) // the word counts, even where its time is gone
	for range 2 {
		if err := f.Resume(); err != nil {
			t.Fatal(err)
		}
	}
	stop(f)
	f = start(false)
	defer f.Close()
	// Where it cannot be written down, it is obeyed and said.
	f.cfg.Paths.State = filepath.Join(dir, "nowhere")
	if err := f.Drain(); err == nil || !f.Status().Draining {
		t.Errorf("Drain = %v, draining %v", err, f.Status().Draining)
	}
}

func TestSessionNews(t *testing.T) {
	f := build(t, t.TempDir(), deploytest.New(t))
	defer f.Close()
	f.Closed(errBroken)
	f.Closed(errBroken)
	if got := f.book.count(journal.SessionClosed); got != 1 {
		t.Errorf("a failure that repeats was logged %d times", got)
	}
	for _, c := range []struct {
		err   error
		event *journal.Event
		word  string
	}{
		{wire.ErrClock, journal.ClockWrong, "clock"},
		{&session.StatusError{Status: 400, Err: wire.ErrClock}, journal.ClockWrong, "clock"},
		{session.ErrCloned, journal.KeyCloned, "cloned"},
		{session.ErrNotRegistered, journal.SessionRefused, "not_registered"},
		{session.ErrWrongNetwork, journal.SessionRefused, "wrong_network"},
		{session.ErrProtocol, journal.SessionRefused, "protocol"},
		{session.ErrBlamed, journal.SessionRefused, "blamed"},
		{&session.StatusError{Status: 400}, journal.SessionRefused, "refused"},
		{&session.StatusError{Status: 503}, journal.SessionClosed, "lost"},
		{session.ErrSilent, journal.SessionClosed, "lost"},
		{wire.ErrRevoked, journal.SessionClosed, "lost"},
		{wire.ErrTooLarge, journal.FrameRefused, "too_large"},
		{wire.ErrSigner, journal.FrameRefused, "signer"},
		{wire.ErrTag, journal.FrameRefused, "tag"},
		{wire.ErrSequence, journal.FrameRefused, "sequence"},
		{wire.ErrMalformed, journal.FrameRefused, "malformed"},
	} {
		before := f.book.count(c.event)
		f.Closed(fmt.Errorf("x: %w", c.err))
		if f.book.count(c.event) != before+1 || !strings.Contains(f.book.String(), "reason="+c.word+` error="x: `+c.err.Error()) {
			t.Errorf("%v: no event %s with reason %s:\n%s", c.err, c.event.Name, c.word, f.book)
		}
	}
	f.Opened()
	f.Message(&wire.Status{Reason: "no heartbeat"})
	f.Message(&wire.Status{Reason: "no heartbeat"})
	f.Message(&wire.Status{Routable: true})
	f.Message(&wire.Status{Routable: true})
	if f.book.count(journal.NotRoutable) != 1 || f.book.count(journal.Routable) != 1 {
		t.Errorf("the network's word was not logged once:\n%s", f.book)
	}
	f.Message(&wire.Update{})
	select {
	case <-f.update:
	default:
		t.Error("an update does not wake the loop")
	}
	f.Closed(errBroken)
	if f.gate("routable").State == gate.Open || f.gate("session").State == gate.Open {
		t.Error("gates are open without a session")
	}
}

func TestIdentity(t *testing.T) {
	f := build(t, t.TempDir(), deploytest.New(t))
	defer f.Close()
	f.board.registered, f.board.bound = true, wire.Bound{Account: "acme", Method: wire.MethodToken, Since: 5}
	if got, want := f.Identity()[0], (control.Identity{Node: nodeKey.Address().Hex(), Network: "testnet", Account: "acme", Registered: true, Method: wire.MethodToken, Since: 5}); got != want {
		t.Errorf("%+v", got)
	}
	if raw, err := json.Marshal(f.Models()); err != nil || string(raw) != "[]" {
		t.Errorf("models %s, %v; want a list", raw, err)
	}
}

func TestJobsAreBounded(t *testing.T) {
	f := build(t, t.TempDir(), deploytest.New(t))
	defer f.Close()
	s := deploytest.NewNetwork(t).Publish(nil)
	for i := range 4 {
		j := job(s)
		if _, err := f.store.Accept(j); err != nil {
			t.Fatal(err)
		}
		if i%2 == 0 {
			if err := f.store.Finish(&wire.Result{Job: j.ID, Code: wire.CodeEngine}); err != nil {
				t.Fatal(err)
			}
		}
	}
	for limit, want := range map[int]int{0: 0, 1: 1, 3: 3, 9: 4} {
		if js, err := f.Jobs(limit); err != nil || len(js) != want {
			t.Errorf("at most %d: %d jobs, %v", limit, len(js), err)
		}
	}
}
