package network_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"runtime"
	"runtime/pprof"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/resultity/node/internal/evm"
	"github.com/resultity/node/internal/journal"
	"github.com/resultity/node/internal/network"
	"github.com/resultity/node/internal/network/cli"
	"github.com/resultity/node/internal/network/nodetest"
	"github.com/resultity/node/internal/publish"
	"github.com/resultity/node/internal/snapshot"
	"github.com/resultity/node/internal/wire"
)

// TestMain fails when tests leave goroutines behind. With [asProgram] set the
// test binary is the program itself, for tests that kill it.
func TestMain(m *testing.M) {
	if os.Getenv(asProgram) != "" {
		ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
		defer stop()
		os.Exit(profiled(func() int { return cli.Main(ctx, os.Args[1:], os.Stdout, os.Stderr, "test") }))
	}
	before := runtime.NumGoroutine()
	code := m.Run()
	if f := flag.Lookup("test.fuzz"); f.Value.String() != "" {
		os.Exit(code) // package testing leaves one of its own
	}
	http.DefaultClient.CloseIdleConnections()
	for end := time.Now().Add(time.Minute); code == 0; runtime.Gosched() {
		if runtime.NumGoroutine() <= before {
			break
		}
		if time.Now().After(end) {
			buf := make([]byte, 1<<20)
			_, _ = os.Stderr.Write(buf[:runtime.Stack(buf, true)])
			_, _ = os.Stderr.WriteString("goroutines were left behind\n")
			code = 1
		}
	}
	os.Exit(code)
}

const asProgram = "RESULTITY_NETWORK_TEST"

// asProfiled names a file for the program's profile; asAllocating that it is to
// be of its allocations, not of its time.
const asProfiled, asAllocating = "RESULTITY_NETWORK_PROFILE", "RESULTITY_NETWORK_PROFILE_ALLOCS"

// profiled runs the program and writes its profile, if one is asked for.
func profiled(program func() int) (code int) {
	name := os.Getenv(asProfiled)
	if name == "" {
		return program()
	}
	f, err := os.Create(name)
	if err != nil {
		panic(err)
	}
	if os.Getenv(asAllocating) != "" {
		runtime.MemProfileRate = 512
		code = program()
		err = pprof.Lookup("allocs").WriteTo(f, 0)
	} else if err = pprof.StartCPUProfile(f); err == nil {
		code = program()
		pprof.StopCPUProfile()
	}
	if err := errors.Join(err, f.Close()); err != nil {
		panic(err)
	}
	return code
}

// testNetwork is a network under test: a real service on a real store.
type testNetwork struct {
	t      testing.TB
	dir    string
	key    evm.Address
	config *snapshot.Config
	raw    []byte
	logs   *logBuffer

	tweak func(*network.Config) // of the service's own configuration, or nil

	url     string
	metrics string // address of /metrics
	apiKey  string
	client  *http.Client // nil for the default
	stop    func()       // ends the service and checks that it ended well
}

// shortDir is a directory whose unix sockets have short paths.
func shortDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "rn")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

// setUp makes a network without starting it. change, if not nil, changes the
// configuration that is published.
func setUp(t testing.TB, change func(*snapshot.Config)) *testNetwork {
	t.Helper()
	n := &testNetwork{t: t, dir: shortDir(t), logs: &logBuffer{t: t}}
	key, _, err := network.Init(t.Context(), n.dir, network.InitOptions{
		Name: "testnet", ChainID: 31337, TokenUses: 100,
		Publish: publish.Options{RootKeys: []string{filepath.Join(n.dir, "keys", "root.pem")}},
	}, n.log())
	if err != nil {
		t.Fatal(err)
	}
	n.key, n.apiKey = key, n.file("api-key")
	n.config = nodetest.Config(t, key)
	n.config.Network.Window = 3600 // test nodes send heartbeats when they are told to
	if change != nil {
		change(n.config)
	}
	n.publish()
	return n
}

func (n *testNetwork) publish() {
	n.t.Helper()
	n.raw = nodetest.JSON(n.t, n.config)
	if err := network.Publish(n.dir, n.raw); err != nil {
		n.t.Fatal(err)
	}
}

func (n *testNetwork) file(name string) string {
	n.t.Helper()
	b, err := os.ReadFile(filepath.Join(n.dir, name))
	if err != nil {
		n.t.Fatal(err)
	}
	return strings.TrimSpace(string(b))
}

// admin is what the command line has of the network, until the test ends.
func (n *testNetwork) admin() network.Admin {
	n.t.Helper()
	a, err := network.OpenAdmin(n.t.Context(), n.dir, n.log())
	if err != nil {
		n.t.Fatal(err)
	}
	n.t.Cleanup(a.Close)
	return a
}

func (n *testNetwork) log() *slog.Logger {
	return slog.New(journal.Text(n.logs, slog.LevelDebug))
}

// start makes and starts a network that ends with the test.
func start(t testing.TB, change func(*snapshot.Config)) *testNetwork {
	t.Helper()
	n := setUp(t, change)
	n.serve()
	return n
}

func (n *testNetwork) serve() {
	n.t.Helper()
	cfg := network.Defaults()
	cfg.Dir, cfg.Listen, cfg.MetricsListen, cfg.Drain = n.dir, "127.0.0.1:0", "127.0.0.1:0", time.Second
	if n.tweak != nil {
		n.tweak(&cfg)
	}
	ready := make(chan net.Addr, 2)
	cfg.Ready = func(api, metrics net.Addr) { ready <- api; ready <- metrics }
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- network.Run(ctx, cfg, n.log()) }()
	stopped := false
	n.stop = func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		if err := <-done; err != nil {
			n.t.Errorf("service ended with %v", err)
		}
	}
	n.t.Cleanup(n.stop)
	select {
	case a := <-ready:
		n.url, n.metrics = "http://"+a.String(), "http://"+(<-ready).String()+"/metrics"
	case err := <-done:
		stopped = true
		n.t.Fatalf("service did not start: %v", err)
	}
}

// node makes a registered node.
func (n *testNetwork) node() *nodetest.Node {
	n.t.Helper()
	v := nodetest.New(n.t, n.url, n.raw)
	v.Enrol(n.t, n.file("enrolment-token"))
	return v
}

// reply is an HTTP answer that was read to its end.
type reply struct {
	status int
	header http.Header
	body   []byte
	err    error
}

// code returns the code of an OpenAI error.
func (r reply) code() string {
	var v struct {
		Error struct {
			Code    string `json:"code"`
			Type    string `json:"type"`
			Message string `json:"message"`
		} `json:"error"`
	}
	_ = json.Unmarshal(r.body, &v)
	return v.Error.Code
}

func (n *testNetwork) do(ctx context.Context, method, path, body string, header ...string) reply {
	req, err := http.NewRequestWithContext(ctx, method, n.url+path, strings.NewReader(body))
	if err != nil {
		return reply{err: err}
	}
	req.Header.Set("Authorization", "Bearer "+n.apiKey)
	req.Header.Set("Content-Type", "application/json")
	for i := 0; i < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	client := n.client
	if client == nil {
		client = http.DefaultClient
	}
	res, err := client.Do(req)
	if err != nil {
		return reply{err: err}
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	return reply{res.StatusCode, res.Header, b, err}
}

// with is the same network reached in another way.
func (n *testNetwork) with(client *http.Client, url string) *testNetwork {
	other := *n
	other.client, other.url = client, url
	return &other
}

func (n *testNetwork) get(path string) reply {
	n.t.Helper()
	r := n.do(n.t.Context(), http.MethodGet, path, "")
	if r.err != nil {
		n.t.Fatal(r.err)
	}
	return r
}

const chat = `{"model":"tiny","messages":[{"role":"user","content":"secret words"}]}`
const chatStream = `{"model":"tiny","stream":true,"messages":[{"role":"user","content":"secret words"}]}`

// ask sends a request in the background.
func (n *testNetwork) ask(body string) <-chan reply {
	ch := make(chan reply, 1)
	go func() { ch <- n.do(context.Background(), http.MethodPost, "/v1/chat/completions", body) }()
	return ch
}

// answer waits for a reply.
func (n *testNetwork) answer(ch <-chan reply) reply {
	n.t.Helper()
	select {
	case r := <-ch:
		if r.err != nil {
			n.t.Fatal(r.err)
		}
		return r
	case <-time.After(nodetest.Patience):
		n.t.Fatal("no answer")
	}
	panic("unreachable")
}

// until waits for a condition that somebody else brings about.
func (n *testNetwork) until(what string, ok func() bool) {
	n.t.Helper()
	for end := time.Now().Add(nodetest.Patience); !ok(); {
		if time.Now().After(end) {
			n.t.Fatalf("waited in vain: %s", what)
		}
		time.Sleep(5 * time.Millisecond) // between two looks, not instead of an event
	}
}

func (n *testNetwork) readMetrics() []byte {
	n.t.Helper()
	res, err := http.Get(n.metrics)
	if err != nil {
		n.t.Fatal(err)
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil || res.StatusCode != http.StatusOK {
		n.t.Fatalf("%s %s %v", res.Status, b, err)
	}
	return b
}

// metric returns the value of a series, 0 when it is not there.
func (n *testNetwork) metric(series string) float64 {
	n.t.Helper()
	m := regexp.MustCompile(`(?m)^` + regexp.QuoteMeta(series) + ` (\S+)$`).FindSubmatch(n.readMetrics())
	if m == nil {
		return 0
	}
	v, err := strconv.ParseFloat(string(m[1]), 64)
	if err != nil {
		n.t.Fatal(err)
	}
	return v
}

// logBuffer collects the service's log, shows it when the test fails, and fails
// the test when a prompt or an answer is in it.
type logBuffer struct {
	t  testing.TB
	w  bytes.Buffer // written by slog's handler only, which locks
	on func([]byte) // called with each record, unless nil; set before the service starts
}

func (l *logBuffer) Write(p []byte) (int, error) {
	if bytes.Contains(p, []byte("secret words")) || bytes.Contains(p, []byte("secret answer")) {
		l.t.Errorf("text of a request or a response in the log: %s", p)
	}
	if l.on != nil {
		l.on(p)
	}
	return l.w.Write(p)
}

// sendChunks sends body[from:to] in pieces.
func sendChunks(s *nodetest.Session, j *wire.Job, body []byte, from, to, piece int) {
	for at := from; at < to; at += piece {
		s.Send(&wire.Chunk{Job: j.ID, Offset: int64(at), Data: body[at:min(at+piece, to)]})
	}
}
