package bridge

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/resultity/node/internal/bridge/contract"
)

// span is a forwarder between a unix socket and a test engine, all in this
// process.
type span struct {
	*forwarder
	engine *testEngine
	path   string // of the socket
	client *http.Client
}

func newSpan(t testing.TB, change func(*contract.Options)) *span {
	t.Helper()
	e := newTestEngine()
	upstream, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	return newSpanTo(t, upstream, e, change)
}

func newSpanTo(t testing.TB, upstream net.Listener, e *testEngine, change func(*contract.Options)) *span {
	t.Helper()
	engineServer := &http.Server{Handler: e, ErrorLog: log.New(io.Discard, "", 0)}
	go engineServer.Serve(upstream)

	o := contract.Defaults()
	o.Engine = upstream.Addr().(*net.TCPAddr).AddrPort()
	o.Model, o.MaxInFlight, o.MaxBody = "tiny", 16, 256<<10
	if change != nil {
		change(&o)
	}
	v := newVigil(o.Stall, o.CanaryEvery)
	look := func() contract.Sandbox { return contract.Sandbox{Version: contract.Version, OK: true} }
	f := newForwarder(o, v, look, func(s *contract.Status) {
		s.Model = o.Model
		v.fill(s)
	})
	dir, err := os.MkdirTemp("", "span") // short, for a socket
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "s")
	l, err := listen(path, 100, nobody)
	if err != nil {
		t.Fatal(err)
	}
	server := newServer(f, log.New(io.Discard, "", 0))
	done := make(chan error, 1)
	go func() { done <- server.Serve(l) }()
	transport := &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", path)
		},
		DisableCompression:  true,
		MaxIdleConnsPerHost: 16,
	}
	t.Cleanup(func() {
		transport.CloseIdleConnections()
		server.Close()
		<-done
		engineServer.Close()
		f.serving.Wait()
		f.engine.CloseIdleConnections()
		os.RemoveAll(dir)
		noneLeft(t)
	})
	return &span{forwarder: f, engine: e, path: path, client: &http.Client{Transport: transport, Timeout: patience}}
}

// noneLeft fails the test when goroutines of this package are left, other than
// tests.
func noneLeft(t testing.TB) {
	t.Helper()
	if left := straysAfter(patience); left != "" {
		t.Fatalf("goroutines left:\n%s", left)
	}
}

// straysAfter gives goroutines that are on their way out the time to end.
func straysAfter(d time.Duration) string {
	for deadline := time.Now().Add(d); ; runtime.Gosched() {
		left := strays()
		if left == "" || time.Now().After(deadline) {
			return left
		}
	}
}

// strays returns the stacks of this package's goroutines but the caller's and
// those of tests.
func strays() string {
	buf := make([]byte, 1<<20)
	var left []string
	for i, g := range strings.Split(string(buf[:runtime.Stack(buf, true)]), "\n\n") {
		if i > 0 && strings.Contains(g, "/internal/bridge.") && !strings.Contains(g, "\ntesting.") {
			left = append(left, g)
		}
	}
	return strings.Join(left, "\n\n")
}

func prompt(order string) string {
	b, err := json.Marshal(map[string]any{"model": "tiny", "prompt": order})
	if err != nil {
		panic(err)
	}
	return string(b)
}

func (s *span) post(t testing.TB, ctx context.Context, path, body string) (*http.Response, error) {
	t.Helper()
	req, err := http.NewRequestWithContext(ctx, "POST", "http://engine"+path, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/json")
	return s.client.Do(req)
}

// read posts an order and reads the answer in full.
func (s *span) read(t testing.TB, order string) (*http.Response, string) {
	t.Helper()
	resp, err := s.post(t, t.Context(), "/v1/completions", prompt(order))
	if err != nil {
		t.Fatalf("%s: %v", order, err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatalf("%s: %v", order, err)
	}
	return resp, string(b)
}

func (s *span) status(t testing.TB) contract.Status {
	t.Helper()
	resp, err := s.client.Get("http://engine" + contract.StatusPath)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	var st contract.Status
	if err := json.NewDecoder(resp.Body).Decode(&st); err != nil || st.Version != contract.Version {
		t.Fatalf("status %+v: %v", st, err)
	}
	return st
}

// until asks for the status until it is as wanted.
func (s *span) until(t testing.TB, what string, ok func(contract.Status) bool) contract.Status {
	t.Helper()
	for deadline := time.Now().Add(patience); ; {
		st := s.status(t)
		if ok(st) {
			return st
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: still %+v", what, st)
		}
	}
}

func wantError(t testing.TB, resp *http.Response, body string, status int, code string) {
	t.Helper()
	var e struct {
		Error *struct {
			Message *string         `json:"message"`
			Type    *string         `json:"type"`
			Param   json.RawMessage `json:"param"`
			Code    *string         `json:"code"`
		} `json:"error"`
	}
	if err := json.Unmarshal([]byte(body), &e); err != nil || e.Error == nil || e.Error.Message == nil || e.Error.Type == nil || e.Error.Code == nil || string(e.Error.Param) != "null" {
		t.Fatalf("%d %q is not an error in OpenAI's shape (%v)", resp.StatusCode, body, err)
	}
	if resp.StatusCode != status || *e.Error.Code != code || resp.Header.Get("Content-Type") != "application/json" {
		t.Errorf("got %d %s %q, want %d %s", resp.StatusCode, *e.Error.Code, resp.Header.Get("Content-Type"), status, code)
	}
}

func TestForwardsOnlyWhatIsAllowed(t *testing.T) {
	s := newSpan(t, nil)
	for _, tt := range []struct{ method, target, want string }{
		{"GET", "/v1/models", `{"object":"list","data":[{"id":"tiny"}]}`},
		{"GET", "/health", `{"status":"ok"}`},
		{"GET", "/metrics", "llamacpp:requests_processing 1\n"},
		{"POST", "/v1/completions", `{"choices":[{"text":"b"}]}`},
		{"POST", "/v1/chat/completions", `{"choices":[{"text":"b"}]}`},

		{"GET", "/.bridge/sandbox", `{"version":2,"ok":true,"checks":null,"uid":0,"gid":0,"groups":null,"uidMap":null,"gidMap":null,"namespaces":null,"label":"","landlock":0,"hidden":false,"cgroup":"","interfaces":null,"devices":null,"mounts":null}`},
	} {
		status, body := s.target(t, tt.method, tt.target)
		if status != 200 || body != tt.want {
			t.Errorf("%s %s: %d %q, want %q", tt.method, tt.target, status, body, tt.want)
		}
	}
	for _, refused := range []string{
		"GET /", "GET /v1/completions", "POST /v1/models", "HEAD /health", "POST /health", "PUT /v1/completions", "OPTIONS *",
		"GET /slots", "GET /props", "POST /props", "POST /tokenize", "POST /v1/responses", "POST /v1/messages", "POST /infill",
		"POST /api/pull", "DELETE /api/delete", "POST /sleep", "GET /debug/pprof/",
		"GET /v1/models?x=1", "GET /v1/models/", "GET /v1//models", "GET /v1/../health", "GET /./health", "GET /%68ealth", "GET /health%00", "GET /HEALTH",
		"GET http://engine/health", "GET http://127.0.0.1:1/health", "POST /v1/completions?stream", "POST /v1/completions;x",
		"GET /.bridge/", "GET /.bridge/sandbox/", "POST /.bridge/sandbox",
	} {
		method, target, _ := strings.Cut(refused, " ")
		status, body := s.target(t, method, target)
		t.Logf("%s: expected: 404; got: %d %s", refused, status, strings.TrimSpace(body))
		if status != 404 || method != "HEAD" && !strings.Contains(body, `"code":"not_found"`) {
			t.Errorf("%s: %d %q, want 404", refused, status, body)
		}
	}
}

// target sends a request with exactly this target, which a client would clean.
func (s *span) target(t testing.TB, method, target string) (int, string) {
	t.Helper()
	c, err := net.Dial("unix", s.path)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	body := ""
	if method == "POST" {
		body = prompt("x")
	}
	fmt.Fprintf(c, "%s %s HTTP/1.1\r\nHost: engine\r\nContent-Length: %d\r\n\r\n%s", method, target, len(body), body)
	resp, err := http.ReadResponse(bufio.NewReader(c), &http.Request{Method: method})
	if err != nil {
		t.Fatalf("%s %s: %v", method, target, err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatalf("%s %s: %v", method, target, err)
	}
	return resp.StatusCode, string(b)
}

func TestForwardsOnlyTheHeadersThatMatter(t *testing.T) {
	s := newSpan(t, nil)
	req, _ := http.NewRequestWithContext(t.Context(), "POST", "http://engine/v1/completions", strings.NewReader(prompt("x")))
	for _, k := range []string{"Authorization", "Cookie", "Origin", "User-Agent", "X-Forwarded-For", "Accept-Encoding", "Connection", "Te", "Upgrade", "Proxy-Authorization", "Idempotency-Key"} {
		req.Header.Set(k, "x")
	}
	req.Header.Set("Content-Type", "application/json; charset=utf-8")
	req.Header.Set("Accept", "text/event-stream")
	resp, err := s.client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	got := <-s.engine.seen
	t.Logf("to the engine: expected: Accept, Content-Length, Content-Type; got: %q", slices.Sorted(maps.Keys(got)))
	if got.Get("Content-Type") != "application/json; charset=utf-8" || got.Get("Accept") != "text/event-stream" || got.Get("Content-Length") == "" || len(got) != 3 {
		t.Errorf("the engine saw %v", got)
	}
	resp, err = s.client.Get("http://engine/v1/models")
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	t.Logf("to the caller: expected: Content-Length, Content-Type, Date; got: %q", slices.Sorted(maps.Keys(resp.Header)))
	if resp.Header.Get("Content-Type") != "application/json" || resp.Header.Get("X-Engine") != "" || resp.Header.Get("Date") == "" || len(resp.Header) != 3 {
		t.Errorf("the caller saw %v", resp.Header)
	}
}

// The engine must be left with the whole of a request and the caller with the
// whole of an answer, also when it answers early and while the cores are busy.
// A body that is passed on live fails here.
func TestStreamsAreExact(t *testing.T) {
	s := newSpan(t, nil)
	stop := make(chan struct{})
	var busy sync.WaitGroup
	for range 2 * runtime.GOMAXPROCS(0) {
		busy.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
					runtime.Gosched()
				}
			}
		})
	}
	defer busy.Wait()
	defer close(stop)

	const streams, callers = 2000, 12
	var next, exact, wrong atomic.Int64
	var work sync.WaitGroup
	for range callers {
		work.Go(func() {
			for {
				seed := next.Add(1)
				if seed > streams {
					return
				}
				if err := s.stream(t, uint64(seed)); err == nil {
					exact.Add(1)
				} else if wrong.Add(1) < 5 {
					t.Errorf("stream %d: %v", seed, err)
				}
			}
		})
	}
	work.Wait()
	if exact.Load() != streams {
		t.Errorf("%d of %d streams were exact", exact.Load(), streams)
	}
	st := s.until(t, "after the streams", func(st contract.Status) bool { return st.InFlight == 0 })
	if st.Answered != streams || st.Failed+st.Canceled+st.Busy > 0 {
		t.Errorf("status %+v", st)
	}
}

// stream sends a request of a random size and compares the answer with its
// seed's bytes around the request's digest.
func (s *span) stream(t testing.TB, seed uint64) error {
	body := make([]byte, 1+rand.New(rand.NewPCG(seed, 2)).IntN(200<<10))
	rand.NewChaCha8([32]byte{byte(seed)}).Read(body)
	req, err := http.NewRequestWithContext(t.Context(), "POST", "http://engine/v1/embeddings", bytes.NewReader(body))
	if err != nil {
		return err
	}
	req.Header.Set("Accept", fmt.Sprintf("bytes/%d", seed))
	resp, err := s.client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	got, err := io.ReadAll(resp.Body)
	if err != nil {
		return err
	}
	var want bytes.Buffer
	pour(&want, seed)
	sum := sha256.Sum256(body)
	want.Write(sum[:])
	pour(&want, seed+1)
	if !bytes.Equal(got, want.Bytes()) {
		return fmt.Errorf("%d bytes of %d, or others", len(got), want.Len())
	}
	return nil
}

// Each piece must reach the caller before the engine sends the next.
func TestStreamIsFlushed(t *testing.T) {
	s := newSpan(t, nil)
	resp, err := s.post(t, t.Context(), "/v1/completions", prompt("pause"))
	if err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(resp.Body).ReadString('\n')
	if err != nil || line != "data: one\n" {
		t.Fatalf("got %q (%v) of a stream that pauses", line, err)
	}
	if st := s.status(t); st.InFlight != 1 || st.State != contract.Serving {
		t.Errorf("status %+v", st)
	}
	resp.Body.Close()
	if got := <-s.engine.gone; got != "pause" {
		t.Errorf("%q was given up", got)
	}
	s.until(t, "after the end", func(st contract.Status) bool { return st.InFlight == 0 && st.Canceled == 1 })
}

func TestCallerThatHangsUpEndsTheRequest(t *testing.T) {
	s := newSpan(t, nil)
	for _, order := range []string{"hang", "pause", "comments", "endless"} {
		ctx, cancel := context.WithCancel(t.Context())
		go func() { // once the engine has it
			<-s.engine.seen
			cancel()
		}()
		resp, err := s.post(t, ctx, "/v1/completions", prompt(order))
		if err == nil {
			_, err = io.Copy(io.Discard, resp.Body)
			resp.Body.Close()
		}
		if !errors.Is(err, context.Canceled) {
			t.Fatalf("%s: %v", order, err)
		}
		if got := <-s.engine.gone; got != order {
			t.Errorf("%q was given up, want %q", got, order)
		}
	}
	st := s.until(t, "after the ends", func(st contract.Status) bool { return st.InFlight == 0 && st.Canceled == 4 })
	if st.Failed > 0 || st.Answered > 0 {
		t.Errorf("status %+v", st)
	}
}

func TestEngineThatMisbehavesIsNoAnswer(t *testing.T) {
	s := newSpan(t, nil)
	failed := uint64(0)
	for _, order := range []string{
		"headers", // without an end
		"raw HTTP/1.1 200 OK\r\nX-Pad: " + strings.Repeat("x", 2*maxHeader) + "\r\nContent-Length: 0\r\n\r\n",
		"raw ",
		"raw SSH-2.0-OpenSSH_9.2\r\n",
		"raw HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n",
		"raw HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nx",
		"raw HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\n",
		"raw HTTP/1.1 099 What\r\n\r\n",
		"raw HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n",
		"raw HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n",
	} {
		resp, body := s.read(t, order)
		wantError(t, resp, body, http.StatusBadGateway, "engine_failed")
		t.Logf("%.60q: expected: 502 engine_failed; got: %d %s", order, resp.StatusCode, strings.TrimSpace(body))
		failed++
	}
	for _, order := range []string{
		"raw HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nx",
		"raw HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n",
		"raw HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
		"raw HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n9\r\ndata: x\n\n\r\n0\r\n",
	} {
		resp, err := s.post(t, t.Context(), "/v1/completions", prompt(order))
		var b []byte
		if err == nil {
			b, err = io.ReadAll(resp.Body)
			resp.Body.Close()
		}
		t.Logf("%.90q: expected: no neat end; got: %q, %v", order, b, err)
		if err == nil {
			t.Errorf("%q: a neat end after %q", order, b)
		}
		failed++
	}
	if st := s.until(t, "after the failures", func(st contract.Status) bool { return st.InFlight == 0 }); st.Failed != failed {
		t.Errorf("status %+v, want %d failed", st, failed)
	}
	if resp, body := s.read(t, "x"); resp.StatusCode != 200 || !strings.Contains(body, "choices") {
		t.Errorf("a good request after the bad ones: %d %q", resp.StatusCode, body)
	}
}

func TestEngineThatIsGoneIsBadGateway(t *testing.T) {
	l, err := net.Listen("tcp", "127.11.77.4:0") // where no other test takes the port afterwards
	if err != nil {
		t.Fatal(err)
	}
	nobody := l.Addr().(*net.TCPAddr).AddrPort()
	l.Close()
	s := newSpan(t, func(o *contract.Options) { o.Engine = nobody })
	resp, body := s.read(t, "x")
	wantError(t, resp, body, http.StatusBadGateway, "engine_failed")
	resp, err = s.client.Get("http://engine/health")
	if err != nil || resp.StatusCode != http.StatusBadGateway {
		t.Errorf("health: %v %v", resp, err)
	}
	resp.Body.Close()
}

// Errors of the engine are the engine's to word.
func TestEngineErrorsAreForwarded(t *testing.T) {
	s := newSpan(t, nil)
	resp, body := s.read(t, "status 429")
	if resp.StatusCode != 429 || body != `{"error":{"message":"as you wish"}}` || resp.Header.Get("Retry-After") != "7" {
		t.Errorf("got %d %q %v", resp.StatusCode, body, resp.Header)
	}
	if st := s.status(t); st.Answered != 1 || st.Failed != 0 {
		t.Errorf("status %+v", st)
	}
}

func TestBodyIsBounded(t *testing.T) {
	const limit = 1000
	s := newSpan(t, func(o *contract.Options) { o.MaxBody = limit })
	pad := func(size int) string {
		p := prompt("x")
		return strings.Replace(p, "{", `{"pad":"`+strings.Repeat("p", size-len(p)-len(`"pad":"",`))+`",`, 1)
	}
	for _, chunked := range []bool{false, true} {
		for size, want := range map[int]int{limit: 200, limit + 1: 413, 100 * limit: 413} {
			var body io.Reader = strings.NewReader(pad(size))
			if chunked {
				body = io.MultiReader(body) // hides the length
			}
			req, _ := http.NewRequestWithContext(t.Context(), "POST", "http://engine/v1/completions", body)
			resp, err := s.client.Do(req)
			if err != nil {
				t.Fatal(err)
			}
			text, _ := io.ReadAll(resp.Body)
			resp.Body.Close()
			t.Logf("%d bytes of at most %d, chunked %t: expected: %d; got: %d %s", size, limit, chunked, want, resp.StatusCode, text)
			if resp.StatusCode != want {
				t.Errorf("%d bytes, chunked %v: %d %s, want %d", size, chunked, resp.StatusCode, text, want)
			}
			if want == 413 {
				wantError(t, resp, string(text), 413, "body_too_large")
			}
		}
	}
	if len(s.engine.seen) != 2 {
		t.Errorf("the engine saw %d requests, want the 2 within the limit", len(s.engine.seen))
	}
}

func TestHeadersAreBounded(t *testing.T) {
	s := newSpan(t, nil)
	for pad, want := range map[int]int{maxHeader / 2: http.StatusOK, 2 * maxHeader: http.StatusRequestHeaderFieldsTooLarge} {
		req, _ := http.NewRequestWithContext(t.Context(), "GET", "http://engine/health", nil)
		req.Header.Set("X-Pad", strings.Repeat("x", pad))
		resp, err := s.client.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		t.Logf("%d bytes: expected: %d; got: %d", pad, want, resp.StatusCode)
		if resp.StatusCode != want {
			t.Errorf("%d bytes: %d, want %d", pad, resp.StatusCode, want)
		}
	}
}

// A body that announces too much is not waited for.
func TestAnnouncedBodyIsRefusedAtOnce(t *testing.T) {
	s := newSpan(t, nil)
	c, err := net.Dial("unix", s.path)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	fmt.Fprintf(c, "POST /v1/completions HTTP/1.1\r\nHost: engine\r\nContent-Length: %d\r\n\r\n", s.maxBody+1)
	c.SetReadDeadline(time.Now().Add(bodyPatience / 2))
	resp, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil || resp.StatusCode != http.StatusRequestEntityTooLarge || !resp.Close {
		t.Errorf("got %v (%v), want 413 and the end of the connection", resp, err)
	}
}

// A caller that does not read is given up. Whether the patience is right is
// not the point, so there is none.
func TestSlowReaderIsGivenUp(t *testing.T) {
	s := newSpan(t, nil)
	for _, order := range []string{"random 3", "status 400"} {
		w := expired{header: make(http.Header), write: os.ErrDeadlineExceeded}
		r, _ := http.NewRequestWithContext(t.Context(), "POST", "/v1/completions", strings.NewReader(prompt(order)))
		r.RequestURI = "/v1/completions"
		func() {
			defer func() {
				if got := recover(); got != http.ErrAbortHandler {
					t.Errorf("%s: panicked with %v, want an abort", order, got)
				}
			}()
			s.ServeHTTP(&w, r)
		}()
		if w.writeDeadline.IsZero() {
			t.Errorf("%s: no deadline", order)
		}
	}
	w := expired{header: make(http.Header)}
	errBusy.write(&w)
	if w.writeDeadline.IsZero() {
		t.Error("no deadline for an error")
	}
	if st := s.status(t); st.Canceled != 2 || st.InFlight != 0 {
		t.Errorf("status %+v", st)
	}
}

// What a caller sends as its body too slowly, or not in full, never reaches the
// engine. Whether the patience is right is not the point, so there is none.
func TestSlowBodyIsRefused(t *testing.T) {
	s := newSpan(t, nil)
	c, err := net.Dial("unix", s.path)
	if err != nil {
		t.Fatal(err)
	}
	fmt.Fprintf(c, "POST /v1/completions HTTP/1.1\r\nHost: engine\r\nContent-Length: 100\r\n\r\nhalf")
	c.(*net.UnixConn).CloseWrite()
	resp, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		t.Fatal(err)
	}
	b, _ := io.ReadAll(resp.Body)
	wantError(t, resp, string(b), 400, "body_unreadable")
	c.Close()

	w := expired{header: make(http.Header)}
	r, _ := http.NewRequestWithContext(t.Context(), "POST", "/v1/completions", failing{os.ErrDeadlineExceeded})
	r.RequestURI = "/v1/completions"
	s.ServeHTTP(&w, r)
	if w.status != http.StatusRequestTimeout || w.readDeadline.IsZero() {
		t.Errorf("status %d, deadline %v; want 408 and a deadline", w.status, w.readDeadline)
	}
	if len(s.engine.seen) > 0 {
		t.Error("the engine saw a request without its end")
	}
}

type failing struct{ err error }

func (r failing) Read([]byte) (int, error) { return 0, r.err }

// expired is a response writer that notes the deadlines.
type expired struct {
	header                      http.Header
	status                      int
	write                       error
	readDeadline, writeDeadline time.Time
}

func (w *expired) Header() http.Header                { return w.header }
func (w *expired) WriteHeader(status int)             { w.status = status }
func (w *expired) Write(p []byte) (int, error)        { return len(p), w.write }
func (w *expired) SetReadDeadline(t time.Time) error  { w.readDeadline = t; return nil }
func (w *expired) SetWriteDeadline(t time.Time) error { w.writeDeadline = t; return nil }

func TestConcurrencyIsBounded(t *testing.T) {
	s := newSpan(t, func(o *contract.Options) { o.MaxInFlight = 2 })
	ctx, cancel := context.WithCancel(t.Context())
	var work sync.WaitGroup
	for range 2 {
		work.Go(func() { s.post(t, ctx, "/v1/completions", prompt("hang")) })
		<-s.engine.seen
	}
	resp, body := s.read(t, "x")
	wantError(t, resp, body, 503, "engine_busy")
	if resp.Header.Get("Retry-After") == "" {
		t.Error("no Retry-After")
	}
	// What is not inference has places of its own.
	if code, _ := s.target(t, "GET", "/health"); code != 200 {
		t.Errorf("health: %d", code)
	}
	if st := s.status(t); st.InFlight != 2 || st.Busy != 1 {
		t.Errorf("status %+v", st)
	}
	cancel()
	work.Wait()
	s.until(t, "after the end", func(st contract.Status) bool { return st.InFlight == 0 })
	if resp, _ := s.read(t, "x"); resp.StatusCode != 200 {
		t.Errorf("the places were not given back: %d", resp.StatusCode)
	}
}

func TestConnectionsAreBounded(t *testing.T) {
	dir := t.TempDir()
	l, err := listen(filepath.Join(dir, "s"), 2, nobody)
	if err != nil {
		t.Fatal(err)
	}
	accepted := make(chan net.Conn)
	done := make(chan error)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				done <- err
				return
			}
			accepted <- c
		}
	}()
	dial := func() net.Conn {
		c, err := net.Dial("unix", filepath.Join(dir, "s"))
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	a, b, third := dial(), dial(), dial()
	defer func() { a.Close(); b.Close(); third.Close() }()
	first, second := <-accepted, <-accepted
	select {
	case <-accepted:
		t.Fatal("a third connection was accepted")
	default:
	}
	if len(l.places) != 2 {
		t.Fatalf("%d places taken", len(l.places))
	}
	first.Close()
	first.Close() // gives back one place only
	(<-accepted).Close()
	second.Close()
	l.Close()
	if err := <-done; !errors.Is(err, net.ErrClosed) {
		t.Errorf("ended with %v", err)
	}
	if len(l.places) != 0 {
		t.Errorf("%d places not given back", len(l.places))
	}
}

// An engine closes idle connections when it likes. A request that meets one is
// sent again, not failed.
func TestClosedIdleConnectionIsNotAnError(t *testing.T) {
	inner, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	// Answers one request on each connection, says that it would take more,
	// and closes when the next has come.
	go func() {
		for {
			c, err := inner.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				r := bufio.NewReader(c)
				req, err := http.ReadRequest(r)
				if err != nil {
					return
				}
				io.Copy(io.Discard, req.Body)
				io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
				r.ReadByte()
			}()
		}
	}()
	defer inner.Close()
	s := newSpan(t, func(o *contract.Options) { o.Engine = inner.Addr().(*net.TCPAddr).AddrPort() })
	for i := range 20 {
		if resp, body := s.read(t, "x"); resp.StatusCode != 200 || body != "ok" {
			t.Fatalf("request %d: %d %q", i, resp.StatusCode, body)
		}
	}
}

func TestSocket(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "engine.sock")
	l, err := listen(path, 1, nobody)
	if err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o666 {
		t.Errorf("mode %v (%v), want 0666", info.Mode(), err)
	}
	if !l.inPlace() {
		t.Error("not in its place")
	}
	os.Remove(path)
	if l.inPlace() {
		t.Error("in place although removed")
	}
	other, err := listen(path, 1, nobody)
	if err != nil {
		t.Fatal(err)
	}
	if l.inPlace() {
		t.Error("in place although replaced")
	}
	other.Close()
	l.Close()
}

// Whatever an engine left in the directory is gone before the next one starts.
func TestClearDir(t *testing.T) {
	dir := t.TempDir()
	outside := filepath.Join(t.TempDir(), "kept")
	if err := os.WriteFile(outside, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	left := func(name string) string { return filepath.Join(dir, name) }
	for _, make := range []func() error{
		func() error { return os.WriteFile(left("engine.sock"), []byte("data"), 0o600) },
		func() error { return os.MkdirAll(left("a/b/c"), 0o700) },
		func() error { return os.Mkdir(left("closed"), 0) },
		func() error { return os.Symlink(outside, left("link")) },
		func() error { return os.Symlink(filepath.Dir(outside), left("linkdir")) },
		func() error { return syscall.Mkfifo(left("pipe"), 0o666) },
		func() error { // as a killed bridge leaves it
			l, err := net.ListenUnix("unix", &net.UnixAddr{Name: left("stale.sock")})
			if err == nil {
				l.SetUnlinkOnClose(false)
				err = l.Close()
			}
			return err
		},
		func() error {
			for i := range 1000 {
				if err := os.WriteFile(left(fmt.Sprint("many", i)), nil, 0o600); err != nil {
					return err
				}
			}
			return nil
		},
	} {
		if err := make(); err != nil {
			t.Fatal(err)
		}
	}
	for range 2 { // an empty one is fine, too
		if err := clearDir(dir); err != nil {
			t.Fatal(err)
		}
	}
	if names, err := os.ReadDir(dir); err != nil || len(names) != 0 {
		t.Errorf("left: %v, %v", names, err)
	}
	if _, err := os.Stat(outside); err != nil {
		t.Errorf("removed what a link led to: %v", err)
	}
}

func FuzzTarget(f *testing.F) {
	for k := range allowed {
		f.Add(k)
	}
	f.Add("GET /v1/models?x")
	f.Fuzz(func(t *testing.T, line string) {
		method, target, _ := strings.Cut(line, " ")
		k := allowed[method+" "+target]
		if k == unknown {
			return
		}
		if strings.ContainsAny(target, "?#%;*:\\ ") || strings.Contains(target, "..") || strings.Contains(target, "//") {
			t.Fatalf("%q is allowed", line)
		}
	})
}

// nobody is no user's id.
const nobody = -1
