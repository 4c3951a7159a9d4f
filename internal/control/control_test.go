package control

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/evm"
	"github.com/resultity/node/internal/gate"
	"github.com/resultity/node/internal/wire"
	"github.com/resultity/node/test/pipes"
)

// TestMain fails when a test leaves a goroutine of ours behind.
func TestMain(m *testing.M) {
	code := m.Run()
	for try := 0; code == 0; try++ {
		buf := make([]byte, 1<<20)
		s := string(buf[:runtime.Stack(buf, true)])
		if strings.Count(s, "internal/control.") == strings.Count(s, "internal/control.TestMain(") {
			break
		}
		if try == 6000 {
			fmt.Fprintf(os.Stderr, "goroutines left:\n%s\n", s)
			code = 1
		}
		time.Sleep(10 * time.Millisecond) // what is ending may take a moment
	}
	os.Exit(code)
}

// node is a backend that remembers its orders.
type node struct {
	mu       sync.Mutex
	draining bool
	limit    int
	err      error
	orders   []string
	enter    chan struct{} // if there is one, Jobs says that it runs, and waits
	leave    chan struct{}
	refused  chan ReplayCode // what NotReplayed is told, if there is one
	cause    error           // that ended a Replay
}

func (n *node) Status() Status {
	n.mu.Lock()
	defer n.mu.Unlock()
	return Status{
		Version: "1.2.3", Node: "0xaa", Gates: []gate.Gate{{Name: "identity", State: gate.Open, Detail: "d"}, {Name: "image", Detail: "e", Remedy: "r"}},
		Networks: []Network{{Name: "testnet", Snapshot: &Snapshot{Version: 7, Digest: "sha256:aa", Expires: time.Unix(1_000_000, 0).UTC()}}}, Slots: 4, Busy: 1, Outbox: 2, Draining: n.draining,
	}
}
func (n *node) Identity() []Identity {
	return []Identity{Identity{Node: "0xaa", Network: "testnet", Account: "acme"}}
}
func (n *node) Models() []Model {
	return []Model{{ModelState: wire.ModelState{Name: "tiny", Version: "1", Digest: digest.Of(nil), State: "pending"}, Bytes: 10, Done: 5}}
}
func (n *node) Jobs(limit int) ([]Job, error) {
	n.mu.Lock()
	n.limit = limit
	n.mu.Unlock()
	if n.enter != nil {
		close(n.enter)
		<-n.leave
	}
	return []Job{{ID: "aa", State: "running"}}, n.err
}
func (n *node) Doctor(ctx context.Context) (*Report, error) {
	if n.enter != nil {
		close(n.enter)
		<-n.leave
	}
	return &Report{Version: "1.2.3", Checks: []Check{{Name: "a", Result: Pass, Detail: "d"}}}, n.err
}
func (n *node) Bundle(context.Context) ([]byte, error) {
	if n.enter != nil {
		close(n.enter)
		<-n.leave
	}
	return []byte("archive"), n.err
}
func (n *node) Drain() error                   { n.set(true); return nil }
func (n *node) Resume() error                  { n.set(false); return nil }
func (n *node) Restart(context.Context) error  { n.orders = append(n.orders, "restart"); return nil }
func (n *node) Takeover() error                { n.orders = append(n.orders, "takeover"); return nil }
func (n *node) Scrubbed(context.Context) error { n.orders = append(n.orders, "scrubbed"); return nil }
func (n *node) Damaged(_ context.Context, d digest.Digest) error {
	n.orders = append(n.orders, "damaged "+d.Hex())
	return nil
}
func (n *node) Bind(ctx context.Context, q BindRequest) (Binding, error) {
	if n.enter != nil { // the network does not answer
		<-ctx.Done()
		return Binding{}, ctx.Err()
	}
	return Binding{Network: "testnet", Bound: wire.Bound{Account: q.Email}, Nonce: q.Nonce}, n.err
}
func (n *node) Generations() Generations {
	return Generations{Current: 2, Previous: 1, Generations: []Generation{{Number: 1, State: "healthy", Phases: []Phase{{"start", 7}}}, {Number: 2, State: "healthy"}}}
}
func (n *node) Generation(i int) (Generation, error) {
	gs := n.Generations()
	if g := gs.Get(i); g != nil {
		return *g, nil
	}
	return Generation{}, fmt.Errorf("%w: no generation %d is kept", ErrRefused, i)
}
func (n *node) Rollback(_ context.Context, i int) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.orders = append(n.orders, fmt.Sprint("rollback ", i))
	return n.err
}
func (n *node) Forward(context.Context) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.orders = append(n.orders, "forward")
	return n.err
}
func (n *node) Metrics() http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "resultity_slots 4") })
}
func (n *node) set(draining bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.draining = draining
}

// serve serves n until the returned function is called.
func serve(t testing.TB, n Backend) (path string, stop func()) {
	t.Helper()
	dir := t.TempDir()
	l, err := Listen(dir)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- Serve(ctx, l, n) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(stop)
	return filepath.Join(dir, SocketName), stop
}

func TestEndpoints(t *testing.T) {
	n := &node{}
	path, _ := serve(t, n)
	c := NewClient(path)
	for what, want := range map[string]any{
		"status": n.Status(), "identity": n.Identity(), "models": n.Models(), "jobs": []Job{{ID: "aa", State: "running"}}, "generations": n.Generations(), "generations/1": n.Generations().Generations[0],
	} {
		got := reflect.New(reflect.TypeOf(want))
		if err := c.Get(t.Context(), what, got.Interface()); err != nil || !reflect.DeepEqual(got.Elem().Interface(), want) {
			t.Errorf("%s: %+v, %v; want %+v", what, got.Elem(), err, want)
		}
		if err := c.Post(t.Context(), what, got.Interface()); err == nil {
			t.Errorf("%s can be posted", what)
		}
	}
	if n.limit != maxJobs {
		t.Errorf("at most %d jobs were asked for", n.limit)
	}
	for what, want := range map[string]bool{"drain": true, "resume": false} {
		var s Status
		if err := c.Get(t.Context(), what, &s); err == nil {
			t.Errorf("looking at %s is an order", what)
		}
		if err := c.Post(t.Context(), what, &s); err != nil || s.Draining != want {
			t.Errorf("%s: %+v, %v", what, s, err)
		}
	}
	var gs Generations
	for _, what := range []string{"generations/1/rollback", "generations/0/rollback", "generations/forward"} {
		if err := c.Get(t.Context(), what, &gs); err == nil {
			t.Errorf("looking at %s is an order", what)
		}
		if err := c.Post(t.Context(), what, &gs); err != nil || !reflect.DeepEqual(gs, n.Generations()) {
			t.Errorf("%s: %+v, %v", what, gs, err)
		}
	}
	file := digest.Of([]byte("file"))
	if err := c.Post(t.Context(), "damaged/"+file.Hex(), &Status{}); err != nil || c.Post(t.Context(), "damaged/..%2f", &Status{}) == nil {
		t.Errorf("damaged: %v", err)
	}
	if err := c.Post(t.Context(), "scrubbed", nil); err != nil || c.Get(t.Context(), "scrubbed", &Status{}) == nil {
		t.Errorf("scrubbed: %v, or looking at it is an order", err)
	}
	if err := c.Post(t.Context(), "restart", nil); err != nil || c.Get(t.Context(), "restart", &Status{}) == nil {
		t.Errorf("restart: %v, or looking at it is an order", err)
	}
	if err := c.Post(t.Context(), "identity/takeover", &Status{}); err != nil || c.Get(t.Context(), "identity/takeover", &Status{}) == nil {
		t.Errorf("takeover: %v, or looking at it is an order", err)
	}
	if want := []string{"rollback 1", "rollback 0", "forward", "damaged " + file.Hex(), "scrubbed", "restart", "takeover"}; !slices.Equal(n.orders, want) {
		t.Errorf("orders %q", n.orders)
	}
	for what, call := range map[string]func(context.Context, string, any) error{
		"generations/9": c.Get, "generations/x": c.Get, "generations/-1": c.Get, "generations/99999999999999999999/rollback": c.Post,
	} {
		if err := call(t.Context(), what, new(Generation)); !errors.Is(err, ErrRefused) || strings.Count(err.Error(), ErrRefused.Error()) != 1 {
			t.Errorf("%s: %v", what, err)
		}
	}
	if text, err := c.Metrics(t.Context()); err != nil || string(text) != "resultity_slots 4\n" {
		t.Errorf("metrics %q, %v", text, err)
	}
	n.err = errors.New("the disk is gone")
	if err := c.Get(t.Context(), "jobs", new([]Job)); err == nil || !strings.Contains(err.Error(), "the disk is gone") {
		t.Errorf("jobs: %v", err)
	}
	if err := c.Get(t.Context(), "else", new(Status)); err == nil || errors.Is(err, ErrNotRunning) {
		t.Errorf("an unknown endpoint: %v", err)
	}
}

func TestClosed(t *testing.T) {
	s := new(node).Status()
	if g := s.Closed(); g == nil || g.Name != "image" {
		t.Errorf("%+v", g)
	}
	s.Gates = s.Gates[:1]
	if g := s.Closed(); g != nil {
		t.Errorf("%+v", g)
	}
}

// Only the account and root get in, whatever the umask.
func TestMode(t *testing.T) {
	for _, umask := range []int{0, 0o777} {
		dir := t.TempDir()
		if err := os.Chmod(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		old := syscall.Umask(umask)
		l, err := Listen(dir)
		syscall.Umask(old)
		if err != nil {
			t.Fatal(err)
		}
		for name, want := range map[string]os.FileMode{SocketName: os.ModeSocket | 0o600, ".": os.ModeDir | 0o700} {
			st, err := os.Stat(filepath.Join(dir, name))
			if err != nil {
				t.Fatal(err)
			}
			t.Logf("%s at umask %03o: expected: %v; got: %v", name, umask, want, st.Mode())
			if st.Mode() != want {
				t.Errorf("umask %03o: %s is %v, %v; want %v", umask, name, st.Mode(), err, want)
			}
		}
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	}
}

func TestStaleSocket(t *testing.T) {
	dir := t.TempDir()
	old, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(dir, SocketName), Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	old.SetUnlinkOnClose(false) // as a kill does
	if err := old.Close(); err != nil {
		t.Fatal(err)
	}
	if err := NewClient(filepath.Join(dir, SocketName)).Get(t.Context(), "status", new(Status)); !errors.Is(err, ErrNotRunning) {
		t.Errorf("nobody listens: %v", err)
	}
	l, err := Listen(dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := l.Close(); err != nil {
		t.Error(err)
	}
}

func TestListenFails(t *testing.T) {
	dir := t.TempDir()
	if l, err := Listen(filepath.Join(dir, "missing")); err == nil {
		t.Errorf("listens on %v", l.Addr())
	}
	if err := os.MkdirAll(filepath.Join(dir, SocketName, "x"), 0o700); err != nil {
		t.Fatal(err)
	}
	if l, err := Listen(dir); err == nil {
		t.Errorf("listens on %v in place of a directory with something in it", l.Addr())
	}
}

func TestClientErrors(t *testing.T) {
	dir := t.TempDir()
	if err := NewClient(filepath.Join(dir, "x")).Get(t.Context(), "status", new(Status)); !errors.Is(err, ErrNotRunning) {
		t.Errorf("no socket: %v", err)
	}
	path, stop := serve(t, &node{})
	stop()
	if err := NewClient(path).Get(t.Context(), "status", new(Status)); !errors.Is(err, ErrNotRunning) {
		t.Errorf("after the end: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	path, _ = serve(t, &node{})
	if err := NewClient(path).Get(ctx, "status", new(Status)); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

// The kernel's word for a socket of somebody else's becomes ours. (Root gets in
// everywhere, so that it cannot be asked for a real one here.)
func TestDenied(t *testing.T) {
	c := &Client{&http.Client{Transport: &http.Transport{DialContext: func(context.Context, string, string) (net.Conn, error) {
		return nil, &net.OpError{Op: "dial", Net: "unix", Err: os.NewSyscallError("connect", syscall.EACCES)}
	}}}}
	err := c.Get(t.Context(), "status", new(Status))
	t.Logf("expected: %v; got: %v", ErrDenied, err)
	if !errors.Is(err, ErrDenied) || errors.Is(err, ErrNotRunning) {
		t.Error(err)
	}
}

// raw sends text as it is and returns the answer's status line.
func raw(t *testing.T, path, text string) string {
	t.Helper()
	conn, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(2 * time.Minute)); err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(conn, text); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(conn).ReadString('\n')
	if err != nil {
		t.Errorf("%.60q: %v", text, err)
	}
	return strings.TrimSpace(line)
}

func TestOddRequests(t *testing.T) {
	n := &node{}
	path, _ := serve(t, n)
	for text, want := range map[string]string{
		"POST /v1/drain HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\n\r\nx":                     "413",
		"POST /v1/drain HTTP/1.1\r\nHost: a\r\nContent-Length: 99999999999\r\n\r\n":            "413",
		"POST /v1/drain HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n":    "413",
		"GET /v1/status HTTP/1.1\r\nHost: a\r\nX: " + strings.Repeat("x", 64<<10) + "\r\n\r\n": "431",
		"hello\r\n\r\n": "400",
		"DELETE /v1/status HTTP/1.1\r\nHost: a\r\n\r\n": "405",
		"GET / HTTP/1.1\r\nHost: a\r\n\r\n":             "404",
	} {
		got := raw(t, path, text)
		line, _, _ := strings.Cut(got, "\r")
		t.Logf("%.60q: expected: %s; got: %s", text, want, line)
		if !strings.Contains(got, want) {
			t.Errorf("%.60q: %q, want %s", text, got, want)
		}
	}
	if n.Status().Draining {
		t.Error("a refused order was carried out")
	}
}

// Somebody who asks slowly, or does not read, holds up neither others nor the
// end.
func TestSlowClient(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l, served := pipes.Listen(), make(chan error, 1)
		ctx, cancel := context.WithCancel(t.Context())
		go func() { served <- Serve(ctx, l, &node{}) }()
		for range 20 {
			conn := l.Dial()
			defer conn.Close()
			if _, err := io.WriteString(conn, "GET /v1/sta"); err != nil {
				t.Fatal(err)
			}
		}
		if _, answer := l.Lasts(t, "GET /v1/status HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", true); !strings.Contains(answer, "200 OK") {
			t.Errorf("another one: %q", answer)
		}
		begin := time.Now()
		cancel()
		if err := <-served; err != nil {
			t.Error(err)
		}
		took := time.Since(begin)
		t.Logf("20 that say half of a request: expected: the end after %v; got: after %v", goodbye, took)
		if took > goodbye {
			t.Errorf("the end took %v", took)
		}
	})
}

// Serve returns when nobody asks the backend any more, and who had asked gets
// an answer.
func TestEndWaitsForAnswers(t *testing.T) {
	n := &node{enter: make(chan struct{}), leave: make(chan struct{})}
	dir := t.TempDir()
	l, err := Listen(dir)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	served, answered := make(chan error, 1), make(chan error, 1)
	go func() { served <- Serve(ctx, l, n) }()
	go func() {
		answered <- NewClient(filepath.Join(dir, SocketName)).Get(context.Background(), "jobs", new([]Job))
	}()
	<-n.enter
	cancel()
	select {
	case err := <-served:
		t.Errorf("it ended (%v) while it was asking", err)
	case <-time.After(goodbye / 10):
	}
	close(n.leave)
	if err := <-answered; err != nil {
		t.Error(err)
	}
	if err := <-served; err != nil {
		t.Error(err)
	}
}

// A socket that fails by itself is an error.
func TestServeFails(t *testing.T) {
	l, err := Listen(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if err := Serve(t.Context(), l, &node{}); err == nil {
		t.Error("nobody listens, and all is well")
	}
}

// Doctor may take longer than any other request, is refused while it runs, and
// ends when nobody waits for it any more.
func TestDoctor(t *testing.T) {
	n := &node{}
	path, _ := serve(t, n)
	c := NewClient(path)
	r, err := c.Doctor(t.Context())
	if err != nil || r.Version != "1.2.3" || len(r.Checks) != 1 || r.Failed() {
		t.Errorf("%+v, %v", r, err)
	}
	if b, err := c.Bundle(t.Context()); err != nil || string(b) != "archive" {
		t.Errorf("%q, %v", b, err)
	}
	n.err = ErrBusy
	if _, err := c.Doctor(t.Context()); !errors.Is(err, ErrBusy) {
		t.Errorf("%v, want %v", err, ErrBusy)
	}
	n.err = errors.New("the disk is gone")
	if _, err := c.Doctor(t.Context()); err == nil || !strings.Contains(err.Error(), "the disk is gone") {
		t.Errorf("%v", err)
	}
	if b, err := c.Bundle(t.Context()); err == nil || b != nil {
		t.Errorf("%q, %v", b, err)
	}
	n.enter, n.leave = make(chan struct{}), make(chan struct{})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		_, err := c.Doctor(ctx)
		done <- err
	}()
	<-n.enter
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
	close(n.leave)
	if _, err := NewClient(filepath.Join(t.TempDir(), "none")).Doctor(t.Context()); !errors.Is(err, ErrNotRunning) {
		t.Errorf("%v, want %v", err, ErrNotRunning)
	}
}

// What did not run never says PASS.
func TestChecksOfGates(t *testing.T) {
	cs := append(ChecksOf([]gate.Gate{{Name: "a", State: gate.Open}, {Name: "b", Detail: "d", Remedy: "r"}, {Name: "c", State: gate.Unknown}}), NothingMeasured("why")...)
	for i, want := range []Result{Pass, Fail, NotMeasured, NotMeasured, NotMeasured, NotMeasured, NotMeasured} {
		if cs[i].Result != want {
			t.Errorf("%+v, want %s", cs[i], want)
		}
	}
	if r := (&Report{Checks: cs}); !r.Failed() {
		t.Error("it has failed")
	}
	if r := (&Report{Checks: cs[2:]}); r.Failed() || len(cs) != 3+len(Probes) {
		t.Error("what was not measured has not failed")
	}
}

// A step of a binding is the one request with a body; what is said against it
// comes back as it is.
func TestBind(t *testing.T) {
	n := &node{}
	path, _ := serve(t, n)
	c := NewClient(path)
	got, err := c.Bind(t.Context(), BindRequest{Step: wire.BindEmail, Email: "a@b", Nonce: evm.Hash{3}})
	if err != nil || got.Bound.Account != "a@b" || got.Nonce != (evm.Hash{3}) {
		t.Errorf("%+v, %v", got, err)
	}
	n.err = errors.New("bound to another account")
	if _, err := c.Bind(t.Context(), BindRequest{}); err == nil || err.Error() != n.err.Error() {
		t.Errorf("%v", err)
	}
	n.err = nil
	for name, body := range map[string]string{"huge": `{"email":"` + strings.Repeat("x", maxBind) + `"}`, "unknown": `{"x":1}`, "empty": ""} {
		if status, raw, err := c.ask(t.Context(), "POST", "bind", strings.NewReader(body)); err != nil || status != 400 {
			t.Errorf("%s: %d %s %v", name, status, raw, err)
		}
	}
}
