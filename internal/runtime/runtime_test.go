package runtime

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"path/filepath"
	goruntime "runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/resultity/node/internal/bridge/contract"
	"github.com/resultity/node/internal/determinism"
	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/openai"
	"github.com/resultity/node/internal/receipt"
	"github.com/resultity/node/internal/snapshot"
	"github.com/resultity/node/internal/wire"
)

// TestMain fails when a connection of a client or a server stays behind.
func TestMain(m *testing.M) {
	code := m.Run()
	for end := time.Now().Add(time.Minute); code == 0; goruntime.Gosched() {
		buf := make([]byte, 1<<20)
		buf = buf[:goruntime.Stack(buf, true)]
		if !bytes.Contains(buf, []byte("net/http.")) {
			break
		}
		if time.Now().After(end) {
			fmt.Fprintf(os.Stderr, "goroutines left:\n%s", buf)
			code = 1
		}
	}
	os.Exit(code)
}

// serve answers on a unix socket with h and returns a client of it.
func serve(t testing.TB, h http.HandlerFunc) *Client {
	t.Helper()
	path := socketPath(t)
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	s := &http.Server{Handler: h}
	var done sync.WaitGroup
	done.Go(func() { _ = s.Serve(l) })
	c := New(path, anybody)
	t.Cleanup(func() { c.Close(); _ = s.Close(); done.Wait() })
	return c
}

// raw answers each connection with what answer writes.
func raw(t testing.TB, answer func(net.Conn)) *Client {
	t.Helper()
	path := socketPath(t)
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	var done sync.WaitGroup
	done.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			done.Go(func() {
				defer conn.Close()
				if req, err := http.ReadRequest(bufio.NewReader(conn)); err == nil {
					_, _ = io.Copy(io.Discard, req.Body)
					answer(conn)
				}
			})
		}
	})
	c := New(path, anybody)
	t.Cleanup(func() { c.Close(); _ = l.Close(); done.Wait() })
	return c
}

// socketPath is short enough for a socket, whatever the test is called.
func socketPath(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "rt")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return filepath.Join(dir, "s")
}

func chunk(s string) string {
	return fmt.Sprintf(`data: {"object":"chat.completion.chunk","choices":[{"index":0,"delta":{"content":%q},"finish_reason":null}]}`+"\n\n", s)
}

const (
	role = `data: {"object":"chat.completion.chunk","choices":[{"index":0,"delta":{"role":"assistant","content":null},"finish_reason":null}]}` + "\n\n"
	end  = `data: {"object":"chat.completion.chunk","choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}` + "\n\n" + counts
	// counts ends a stream whose finish reason was given.
	counts = `data: {"object":"chat.completion.chunk","choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2,"total_tokens":5}}` + "\n\n" + "data: [DONE]\n\n"
)

func job(t testing.TB, stream bool) Job {
	t.Helper()
	body := fmt.Sprintf(`{"model":"m","messages":[{"role":"user","content":"secret prompt"}],"stream":%v}`, stream)
	r, err := openai.Parse(wire.KindChat, []byte(body), openai.Limits{RequestBytes: 1 << 20, Tokens: 10, Messages: 10})
	if err != nil {
		t.Fatal(err)
	}
	return Job{ID: receipt.JobID{1}, Request: r, Model: "m", Created: 5, Seed: 9, Tokens: 10, ResponseBytes: 1 << 20}
}

// want is what the engine's stream becomes, computed without the client.
func want(t testing.TB, stream bool, engine string) string {
	t.Helper()
	a := openai.NewAssembler(wire.KindChat, receipt.JobID{1}, "m", 5, stream, false, 64<<20)
	for event := range strings.SplitSeq(strings.TrimSuffix(engine, "\n\n"), "\n\n") {
		if _, err := a.Event([]byte(strings.TrimPrefix(event, "data: "))); err != nil {
			t.Fatal(err)
		}
	}
	body, _, err := a.Finish()
	if err != nil {
		t.Fatal(err)
	}
	return string(body)
}

func eventStream(w http.ResponseWriter) { w.Header().Set("Content-Type", "text/event-stream") }

func TestRun(t *testing.T) {
	const answer = role + `data: {"object":"chat.completion.chunk","choices":[{"index":0,"delta":{"content":"one"}}]}` + "\n\n" + end
	var asked atomic.Value
	c := serve(t, func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		asked.Store(fmt.Sprint(r.Method, " ", r.URL.Path, " ", r.Header.Get("Content-Type"), " ", string(body)))
		eventStream(w)
		_, _ = io.WriteString(w, answer)
	})
	for _, stream := range []bool{false, true} {
		var got []byte
		res, err := c.Run(t.Context(), job(t, stream), func(b []byte) error { got = append(got, b...); return nil })
		if err != nil {
			t.Fatal(err)
		}
		if w := want(t, stream, answer); string(res.Body) != w || stream && string(got) != w || !stream && got != nil {
			t.Errorf("stream %v: body\n%s\nemitted\n%s\nwant\n%s", stream, res.Body, got, w)
		}
		if res.Usage != (openai.Usage{PromptTokens: 3, CompletionTokens: 2}) {
			t.Errorf("usage %+v", res.Usage)
		}
	}
	const wantAsked = `POST /v1/chat/completions application/json {"model":"m","messages":[{"role":"user","content":"secret prompt"}],"seed":9,"max_tokens":10,"stream":true,"stream_options":{"include_usage":true}}`
	if asked.Load() != wantAsked {
		t.Errorf("asked\n%s\nwant\n%s", asked.Load(), wantAsked)
	}
}

// Sent is called while the engine works, and nothing is made of its answer before
// it has returned.
func TestSent(t *testing.T) {
	asked, gone := make(chan struct{}), make(chan struct{})
	seen := make(chan struct{}) // a piece of the first answer
	var second atomic.Bool
	c := serve(t, func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		eventStream(w)
		_, _ = io.WriteString(w, role+chunk("a"))
		_ = http.NewResponseController(w).Flush()
		asked <- struct{}{}
		if second.Load() {
			<-r.Context().Done()
			close(gone)
			return
		}
		<-seen
		_, _ = io.WriteString(w, end)
	})
	j, calls, sent := job(t, true), 0, false
	errDisk := errors.New("the disk is full")
	for _, fails := range []error{nil, errDisk} {
		calls, sent = 0, false
		j.Sent = func() error {
			calls++
			<-asked // the engine has said something already
			sent = fails == nil
			return fails
		}
		_, err := c.Run(t.Context(), j, func([]byte) error {
			if !sent {
				t.Error("a piece is passed on before")
			}
			select {
			case <-seen:
			default:
				close(seen)
			}
			return nil
		})
		if !errors.Is(err, fails) || calls != 1 {
			t.Errorf("got %v after %d calls, want %v", err, calls, fails)
		}
		second.Store(true)
	}
	<-gone // else the engine would work for nobody

	// Also where there is no engine, or no time left.
	nobody := New(socketPath(t), anybody)
	ended, cancel := context.WithCancelCause(t.Context())
	errLate := errors.New("too late")
	cancel(errLate)
	for _, try := range []struct {
		c    *Client
		ctx  context.Context
		want error
	}{{nobody, t.Context(), syscall.ENOENT}, {c, ended, errLate}} {
		calls = 0
		j.Sent = func() error { calls++; return nil }
		if _, err := try.c.Run(try.ctx, j, nil); !errors.Is(err, try.want) || calls != 1 {
			t.Errorf("got %v after %d calls, want %v", err, calls, try.want)
		}
	}
}

// A piece must be handed on before the engine has written the next one.
func TestRunPassesPiecesOnAtOnce(t *testing.T) {
	seen := make(chan struct{})
	c := serve(t, func(w http.ResponseWriter, r *http.Request) {
		eventStream(w)
		for _, piece := range []string{role, chunk("a"), chunk("b"), end} {
			_, _ = io.WriteString(w, piece)
			_ = http.NewResponseController(w).Flush()
			<-seen
		}
	})
	if _, err := c.Run(t.Context(), job(t, true), func([]byte) error { seen <- struct{}{}; return nil }); err != nil {
		t.Fatal(err)
	}
}

// Whatever has come at once is handed on at once.
func TestRunCoalesces(t *testing.T) {
	c := serve(t, func(w http.ResponseWriter, r *http.Request) {
		eventStream(w)
		_, _ = io.WriteString(w, role+strings.Repeat(chunk("a"), 10)+end)
	})
	n := 0
	if _, err := c.Run(t.Context(), job(t, true), func([]byte) error { n++; return nil }); err != nil {
		t.Fatal(err)
	}
	if n > 3 {
		t.Errorf("%d calls for 13 events that came together", n)
	}
}

// The forms that an event stream may have, and every way to cut it.
func TestForms(t *testing.T) {
	const plain = role + `data: {"object":"chat.completion.chunk","choices":[{"index":0,"delta":{"content":"one"}}]}` + "\n\n" + end
	w := want(t, true, plain)
	for name, s := range map[string]string{
		"LF":         plain,
		"CRLF":       strings.ReplaceAll(plain, "\n", "\r\n"),
		"CR":         strings.ReplaceAll(plain, "\n", "\r"),
		"BOM":        "\ufeff" + plain,
		"no space":   strings.ReplaceAll(plain, "data: ", "data:"),
		"comments":   ":\n\n: hello\n" + strings.ReplaceAll(plain, "\n\n", "\n:\n\n:\n\n"),
		"fields":     strings.ReplaceAll(plain, "data: ", "event: x\nid: 7\nretry: 5\nodd\ndata: "),
		"many lines": strings.ReplaceAll(plain, `,"choices"`, "\ndata: ,\ndata:\"choices\""),
		"blank":      "\n\n\n" + plain + "\n\n",
		"cut event":  plain + "data: dropped, since the stream ends before it does",
	} {
		for cut := range len(s) + 1 {
			a := openai.NewAssembler(wire.KindChat, receipt.JobID{1}, "m", 5, true, false, 1<<20)
			if err := pump(t.Context(), func() {}, io.MultiReader(strings.NewReader(s[:cut]), strings.NewReader(s[cut:])), a, 10, nil); err != nil {
				t.Fatalf("%s, cut at %d: %v", name, cut, err)
			}
			body, _, err := a.Finish()
			if err != nil || string(body) != w {
				t.Fatalf("%s, cut at %d: %v\n%s", name, cut, err, body)
			}
		}
	}
}

func TestBadEngine(t *testing.T) {
	const ok = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n"
	sized := func(body string) string { return fmt.Sprintf("%sContent-Length: %d\r\n\r\n%s", ok, len(body), body) }
	status := func(line, body string) string {
		return fmt.Sprintf("HTTP/1.1 %s\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s", line, len(body), body)
	}
	engine := func(e error) string {
		var x *EngineError
		if errors.As(e, &x) {
			return fmt.Sprint("engine ", x.Status)
		}
		return ""
	}
	tooLong := func(n int) string {
		const text = `{"error":{"type":"exceed_context_size_error","n_prompt_tokens":6010,"n_ctx":1024}`
		return text + strings.Repeat(" ", n-len(text)-1) + "}"
	}
	bad := func(e error) string {
		var x *openai.OutputError
		if errors.As(e, &x) && engine(e) == "" {
			return string(x.Reason)
		}
		return ""
	}
	refused := func(e error) string {
		var x *openai.Error
		if errors.As(e, &x) && x.Status == http.StatusBadRequest {
			return x.Code
		}
		return ""
	}
	for _, tt := range []struct {
		name, answer string
		class        func(error) string
		want         string
	}{
		{"nothing", "", engine, "engine 0"},
		{"no HTTP", "secret\r\n\r\n", engine, "engine 0"},
		{"endless header", "HTTP/1.1 200 OK\r\nX: " + strings.Repeat("x", 2*maxHeader), engine, "engine 0"},
		{"half a header", "HTTP/1.1 200 OK\r\nContent-", engine, "engine 0"},
		{"cut by length", ok + "Content-Length: 9999\r\n\r\n" + role + chunk("secret"), engine, "engine 0"},
		{"cut in a chunk", ok + "Transfer-Encoding: chunked\r\n\r\nffff\r\n" + role, engine, "engine 0"},
		{"bad chunk", ok + "Transfer-Encoding: chunked\r\n\r\nxyz\r\n", engine, "engine 0"},
		{"500", status("500 Internal Server Error", `{"error":{"message":"secret","type":"server_error"}}`), engine, "engine 500"},
		{"404", status("404 Not Found", "secret"), engine, "engine 404"},
		{"503", status("503 Service Unavailable", "secret"), engine, "engine 503"},
		{"302", "HTTP/1.1 302 Found\r\nLocation: http://example.com/\r\nContent-Length: 0\r\n\r\n", engine, "engine 302"},
		{"204", "HTTP/1.1 204 No Content\r\n\r\n", engine, "engine 204"},
		{"error event", sized(role + `data: {"error":{"code":500,"message":"secret"}}` + "\n\n"), engine, "engine 0"},
		{"400", status("400 Bad Request", `{"error":{"message":"secret","type":"invalid_request_error"}}`), refused, "refused_by_engine"},
		{"400 garbled", status("400 Bad Request", `secret`), refused, "refused_by_engine"},
		{"422", status("422 Unprocessable Entity", `{}`), refused, "refused_by_engine"},
		{"413", status("413 Content Too Large", `{}`), refused, "refused_by_engine"},
		{"too long for llama.cpp", status("400 Bad Request", `{"error":{"code":400,"message":"secret","type":"exceed_context_size_error","n_prompt_tokens":6010,"n_ctx":1024}}`), refused, "context_length_exceeded"},
		{"too long for vLLM", status("400 Bad Request", `{"error":{"message":"This model's maximum context length is 10 tokens. secret","type":"BadRequestError"}}`), refused, "context_length_exceeded"},
		{"too long for llama.cpp, in the largest error", status("400 Bad Request", tooLong(maxError)), refused, "context_length_exceeded"},
		{"too long for llama.cpp, in a larger error", status("400 Bad Request", tooLong(maxError+1)), refused, "refused_by_engine"},
		{"JSON in place of a stream", status("200 OK", `{"object":"chat.completion"}`), bad, "not_a_stream"},
		{"ended early", sized(role + chunk("a")), bad, "no_done"},
		{"empty", sized(""), bad, "no_done"},
		{"no [DONE]", sized(role + strings.TrimSuffix(end, "data: [DONE]\n\n")), bad, "no_done"},
		{"after [DONE]", sized(role + end + chunk("secret")), bad, "data_after_done"},
		{"garbage", sized(role + "data: {secret\n\n"), bad, "not_json"},
		{"two choices", sized(`data: {"object":"chat.completion.chunk","choices":[{"index":0,"delta":{}},{"index":1,"delta":{}}]}` + "\n\n"), bad, "wrong_choices"},
		{"too many tokens", sized(role + strings.Replace(end, `"completion_tokens":2,"total_tokens":5`, `"completion_tokens":11,"total_tokens":14`, 1)), bad, "wrong_usage"},
		{"without end", sized(role + strings.Repeat(chunk("secret"), 10+slack+1)), bad, "wrong_usage"},
		{"long line", sized("data: " + strings.Repeat("x", maxEvent)), bad, "not_a_stream"},
		{"long event", sized(strings.Repeat("data: "+strings.Repeat("x", 1000)+"\n", 1100)), bad, "not_a_stream"},
		{"too much", sized(role + strings.Repeat(chunk(strings.Repeat("secret", 10_000)), 20)), bad, "response_too_large"},
	} {
		for _, stream := range []bool{false, true} {
			t.Run(fmt.Sprint(tt.name, " ", stream), func(t *testing.T) {
				c := raw(t, func(conn net.Conn) { _, _ = io.WriteString(conn, tt.answer) })
				res, err := c.Run(t.Context(), job(t, stream), func([]byte) error { return nil })
				t.Logf("expected: %s; got: %v", tt.want, err)
				if err == nil || tt.class(err) != tt.want {
					t.Fatalf("got %v (%T), want %s", err, err, tt.want)
				}
				if strings.Contains(err.Error(), "secret") {
					t.Errorf("the error quotes prompt or output: %v", err)
				}
				if res.Body != nil {
					t.Error("a body beside an error")
				}
			})
		}
	}
}

func TestNoSocket(t *testing.T) {
	c := New(filepath.Join(t.TempDir(), "none"), anybody)
	defer c.Close()
	_, err := c.Run(t.Context(), job(t, false), nil)
	var e *EngineError
	if !errors.As(err, &e) || !errors.Is(err, os.ErrNotExist) {
		t.Errorf("got %v", err)
	}
}

// When the job is given up, the engine must see its connection close: only so
// does it stop to work.
func TestCancelClosesConnection(t *testing.T) {
	errGivenUp := errors.New("given up")
	for _, stream := range []bool{false, true} {
		ctx, cancel := context.WithCancelCause(t.Context())
		gone := make(chan struct{})
		c := serve(t, func(w http.ResponseWriter, r *http.Request) {
			eventStream(w)
			_, _ = io.WriteString(w, role+chunk("a"))
			_ = http.NewResponseController(w).Flush()
			cancel(errGivenUp)
			<-r.Context().Done()
			close(gone)
		})
		if _, err := c.Run(ctx, job(t, stream), func([]byte) error { return nil }); !errors.Is(err, errGivenUp) {
			t.Errorf("got %v", err)
		}
		<-gone
	}
}

func TestDeadline(t *testing.T) {
	c := serve(t, func(w http.ResponseWriter, r *http.Request) {
		eventStream(w)
		for { // an engine that only says that it is there
			if _, err := io.WriteString(w, ":\n\n"); err != nil {
				return
			}
			if http.NewResponseController(w).Flush() != nil || r.Context().Err() != nil {
				return
			}
		}
	})
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := c.Run(ctx, job(t, true), func([]byte) error { return nil }); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v", err)
	}
}

// What follows the end mark is not waited for.
func TestAfterTheEndMark(t *testing.T) {
	for name, more := range map[string]func(write func(string) error, gone <-chan struct{}){
		"nothing": func(_ func(string) error, gone <-chan struct{}) { <-gone },
		"lines without end": func(write func(string) error, gone <-chan struct{}) {
			for write(": x\n\n") == nil {
			}
			<-gone
		},
		"a little": func(write func(string) error, _ <-chan struct{}) { _ = write("x: y\n\n") },
	} {
		for _, stream := range []bool{false, true} {
			t.Run(fmt.Sprint(name, " ", stream), func(t *testing.T) {
				served := make(chan struct{})
				c := serve(t, func(w http.ResponseWriter, r *http.Request) {
					defer close(served)
					eventStream(w)
					write := func(s string) error {
						_, err := io.WriteString(w, s)
						return errors.Join(err, http.NewResponseController(w).Flush())
					}
					_ = write(role + chunk("a") + end)
					more(write, r.Context().Done())
				})
				ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
				defer cancel()
				res, err := c.Run(ctx, job(t, stream), func([]byte) error { return nil })
				if err != nil || string(res.Body) != want(t, stream, role+chunk("a")+end) {
					t.Errorf("%v, %q", err, res.Body)
				}
				<-served // the connection was closed, where it had to be
			})
		}
	}
}

// An answer that is whole when its time is up is an answer.
func TestTheEndMarkCameInTime(t *testing.T) {
	done := make(chan struct{})
	c := serve(t, func(w http.ResponseWriter, r *http.Request) {
		eventStream(w)
		_, _ = io.WriteString(w, role+chunk("a")+end)
		_ = http.NewResponseController(w).Flush()
		<-r.Context().Done()
	})
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	res, err := c.Run(ctx, job(t, true), func(b []byte) error {
		if strings.HasSuffix(string(b), "[DONE]\n\n") {
			close(done)
			cancel()
		}
		return nil
	})
	<-done
	if err != nil || string(res.Body) != want(t, true, role+chunk("a")+end) {
		t.Errorf("%v, %q", err, res.Body)
	}
}

func TestEmitErrorEndsRun(t *testing.T) {
	gone := make(chan struct{})
	c := serve(t, func(w http.ResponseWriter, r *http.Request) {
		eventStream(w)
		_, _ = io.WriteString(w, role)
		_ = http.NewResponseController(w).Flush()
		<-r.Context().Done()
		close(gone)
	})
	errFull := errors.New("full")
	if _, err := c.Run(t.Context(), job(t, true), func([]byte) error { return errFull }); !errors.Is(err, errFull) {
		t.Errorf("got %v", err)
	}
	<-gone
}

// A container that was replaced leaves dead connections behind; the next job
// must not pay for them.
func TestRestartedEngine(t *testing.T) {
	path := socketPath(t)
	answer := func(conn net.Conn) {
		_, _ = fmt.Fprintf(conn, "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: %d\r\n\r\n%s", len(role+end), role+end)
	}
	c := New(path, anybody)
	defer c.Close()
	for range 20 {
		l, err := net.Listen("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		var done sync.WaitGroup
		done.Go(func() { // answers one request and dies
			conn, err := l.Accept()
			if err != nil {
				return
			}
			defer conn.Close()
			if req, err := http.ReadRequest(bufio.NewReader(conn)); err == nil {
				_, _ = io.Copy(io.Discard, req.Body)
				answer(conn)
			}
		})
		if _, err := c.Run(t.Context(), job(t, false), nil); err != nil {
			t.Fatal(err)
		}
		done.Wait()
		_ = l.Close()
	}
}

func TestGolden(t *testing.T) {
	var events, asked, path atomic.Value
	c := serve(t, func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		asked.Store(string(body))
		path.Store(r.URL.Path)
		eventStream(w)
		_, _ = io.WriteString(w, events.Load().(string))
	})
	const text = `Hello, "you"!`
	chat := func(s string) string { return role + chunk(s) + end }
	g := snapshot.Golden{Name: "hello", Prompt: "Hi?", Answers: []string{"Good day!", text}, Tokens: 8, Timeout: 10}
	events.Store(chat(text))
	got, err := c.Golden(t.Context(), g, "m")
	if want := determinism.NewAnswer("hello", text, "", "stop", 3, 2); err != nil || got != want {
		t.Errorf("%+v, %v; want %+v", got, err, want)
	}
	if s := asked.Load().(string); path.Load() != "/v1/chat/completions" || !strings.Contains(s, `"temperature":0`) || !strings.Contains(s, `"max_tokens":8`) || !strings.Contains(s, `"Hi?"`) || strings.Contains(s, "system") {
		t.Errorf("asked %s", s)
	}
	g.System = "Be short."
	if _, err := c.Golden(t.Context(), g, "m"); err != nil {
		t.Error(err)
	}
	if s := asked.Load().(string); !strings.Contains(s, `[{"role":"system","content":"Be short."},{"role":"user","content":"Hi?"}]`) {
		t.Errorf("asked %s", s)
	}
	for _, wrong := range []string{"", `Hello, "you"`, text + " ", `hello, "you"!`} {
		events.Store(chat(wrong))
		_, err := c.Golden(t.Context(), g, "m")
		var e *GoldenError
		if !errors.As(err, &e) || e.Got.Text != digest.Of([]byte(wrong)) || e.Err == nil {
			t.Errorf("%q: got %v", wrong, err)
		}
		if err != nil && strings.Contains(err.Error(), "you") {
			t.Errorf("the error quotes the text: %v", err)
		}
	}
	done := snapshot.Golden{Name: "end", Kind: snapshot.GoldenCompletion, Prompt: "Once", Answers: []string{" upon a time, and so on"}, Share: 70, MinTokens: 4, Tokens: 8, Timeout: 10}
	events.Store(`data: {"object":"text_completion","choices":[{"index":0,"text":" upon a time,","finish_reason":null}]}` + "\n\n" +
		`data: {"object":"text_completion","choices":[{"index":0,"text":" long","finish_reason":"length"}]}` + "\n\n" +
		`data: {"object":"text_completion","choices":[],"usage":{"prompt_tokens":1,"completion_tokens":8,"total_tokens":9}}` + "\n\ndata: [DONE]\n\n")
	if got, err := c.Golden(t.Context(), done, "m"); err == nil {
		t.Errorf("the answer is the expected one for 14 of 16 bytes, and was taken: %+v", got)
	}
	done.Share = 60
	got, err = c.Golden(t.Context(), done, "m")
	if want := determinism.NewAnswer("end", " upon a time, long", "", "length", 1, 8); err != nil || got != want {
		t.Errorf("%+v, %v; want %+v", got, err, want)
	}
	if s := asked.Load().(string); path.Load() != "/v1/completions" || !strings.Contains(s, `"prompt":"Once"`) {
		t.Errorf("asked %s of %s", s, path.Load())
	}
}

func TestGoldenTimeout(t *testing.T) {
	c := serve(t, func(_ http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body) // the server notices a closed connection only then
		<-r.Context().Done()
	})
	_, err := c.Golden(t.Context(), snapshot.Golden{Name: "slow", Prompt: "p", Answers: []string{"a"}, Tokens: 1, Timeout: 1}, "m")
	if !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "no answer within 1s") {
		t.Errorf("got %v", err)
	}
}

// A head as large as allowed is read, and not one byte more.
func TestHeadIsBounded(t *testing.T) {
	head := func(n int) string {
		const text = "HTTP/1.1 200 OK\r\nContent-Length: 0\r\nX: \r\n\r\n"
		return strings.Replace(text, "X: ", "X: "+strings.Repeat("x", n-len(text)), 1)
	}
	for _, n := range []int{maxHeader, maxHeader + 1} {
		c := raw(t, func(conn net.Conn) { _, _ = io.WriteString(conn, head(n)) })
		err := c.Health(t.Context())
		t.Logf("%d bytes: expected: read up to %d; got: %v", n, maxHeader, err)
		if (err == nil) != (n <= maxHeader) {
			t.Errorf("%d bytes: %v", n, err)
		}
	}
}

// tail is a stream whose end mark is followed by so many bytes, or without end.
type tail struct {
	begun bool
	left  int // bytes; below 0 they never end
	read  int
	waits <-chan struct{} // in the place of bytes, if not nil
	toEnd bool
}

func (r *tail) Read(p []byte) (int, error) {
	switch {
	case !r.begun:
		r.begun = true
		return copy(p, role+end), nil
	case r.waits != nil:
		<-r.waits
		return 0, context.Canceled
	case r.left == 0:
		r.toEnd = true
		return 0, io.EOF
	}
	n := copy(p[:min(len(p), 100)], strings.Repeat("\n", 100))
	if r.left > 0 {
		n = min(n, r.left)
		r.left -= n
	}
	r.read += n
	return n, nil
}

// What follows the end mark has little room and little time. The clock is the bubble's,
// and stands still while bytes come.
func TestTailIsBounded(t *testing.T) {
	for name, c := range map[string]struct {
		tail  *tail
		toEnd bool // so that the connection can be used again
		took  time.Duration
	}{
		"all that it may":    {&tail{left: maxTail}, true, 0},
		"a byte more":        {&tail{left: maxTail + 1}, false, 0},
		"without end":        {&tail{left: -1}, false, 0},
		"nothing and no end": {&tail{waits: make(chan struct{})}, false, tailPatience},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ctx, cut := context.WithCancel(t.Context())
				defer cut()
				if c.tail.waits != nil {
					c.tail.waits = ctx.Done()
				}
				a := openai.NewAssembler(wire.KindChat, receipt.JobID{1}, "m", 5, false, false, 1<<20)
				began := time.Now()
				err := pump(ctx, cut, c.tail, a, 10, nil)
				t.Logf("expected: the answer, after %v and about %d bytes more at most; got: %v after %v and %d", c.took, maxTail, err, time.Since(began), c.tail.read)
				if err != nil || c.tail.toEnd != c.toEnd || c.tail.read > maxTail+100 || time.Since(began) != c.took {
					t.Errorf("%v after %v: %+v", err, time.Since(began), c.tail)
				}
			})
		})
	}
}

func TestRecords(t *testing.T) {
	answers := map[string]string{}
	c := serve(t, func(w http.ResponseWriter, r *http.Request) {
		s, ok := answers[r.URL.Path]
		if !ok {
			http.NotFound(w, r)
			return
		}
		_, _ = io.WriteString(w, s)
	})
	fails := func(name string, err error) {
		t.Helper()
		var e *EngineError
		if !errors.As(err, &e) {
			t.Errorf("%s: got %v", name, err)
		}
	}
	fails("health 404", c.Health(t.Context()))
	answers["/health"] = `{"status":"ok"}`
	if err := c.Health(t.Context()); err != nil {
		t.Error(err)
	}

	fails("sandbox 404", func() error { _, err := c.Sandbox(t.Context()); return err }())
	answers[contract.SandboxPath] = strings.Repeat("x", maxRecord)
	if raw, err := c.Sandbox(t.Context()); err != nil || len(raw) != maxRecord {
		t.Errorf("%d bytes, %v", len(raw), err)
	}
	answers[contract.SandboxPath] += "x"
	fails("a sandbox too large", func() error { _, err := c.Sandbox(t.Context()); return err }())
}

// TestStreamsExact runs two thousand streams while all cores are busy. Not one
// byte may be missing, whatever way the engine cuts its writes.
func TestStreamsExact(t *testing.T) {
	const streams, at = 2000, 16
	var engines [32]string
	for i := range engines {
		var b strings.Builder
		b.WriteString(role)
		r := rand.New(rand.NewPCG(1, uint64(i)))
		for range r.IntN(10 + slack) { // no more than job allows
			b.WriteString(chunk(strings.Repeat("x", r.IntN(30)) + "é🚀"))
		}
		b.WriteString(end)
		engines[i] = b.String()
	}
	c := serve(t, func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		var i int
		if _, err := fmt.Sscanf(string(body[bytes.Index(body, []byte(`"seed":`)):]), `"seed":%d`, &i); err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		eventStream(w)
		for s := engines[i%len(engines)]; s != ""; {
			n := min(len(s), 1+rand.IntN(2000))
			_, _ = io.WriteString(w, s[:n])
			s = s[n:]
			if rand.IntN(2) == 0 {
				_ = http.NewResponseController(w).Flush()
			}
		}
	})
	var busy, work sync.WaitGroup
	stop := make(chan struct{})
	for range goruntime.GOMAXPROCS(0) {
		busy.Go(func() {
			for x := 0; ; x++ {
				select {
				case <-stop:
					return
				default:
				}
			}
		})
	}
	var wants [2][len(engines)]string
	for i := range engines {
		wants[0][i], wants[1][i] = want(t, false, engines[i]), want(t, true, engines[i])
	}
	plain, streamed := job(t, false), job(t, true)
	var next atomic.Int64
	for range at {
		work.Go(func() {
			for i := int(next.Add(1)); i <= streams; i = int(next.Add(1)) {
				j, w := plain, wants[0][i%len(engines)]
				if i%4 != 0 {
					j, w = streamed, wants[1][i%len(engines)]
				}
				j.Seed = uint32(i)
				var got []byte
				res, err := c.Run(t.Context(), j, func(b []byte) error { got = append(got, b...); return nil })
				if err != nil || string(res.Body) != w || i%4 != 0 && string(got) != w {
					t.Errorf("stream %d: %v, %d bytes in the body and %d emitted, want %d", i, err, len(res.Body), len(got), len(w))
				}
			}
		})
	}
	work.Wait()
	close(stop)
	busy.Wait()
}

func BenchmarkRun(b *testing.B) {
	answer := role + strings.Repeat(chunk("token"), 100) + end
	c := serve(b, func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		eventStream(w)
		_, _ = io.WriteString(w, answer)
	})
	j := job(b, true)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := c.Run(b.Context(), j, func([]byte) error { return nil }); err != nil {
			b.Fatal(err)
		}
	}
}

func FuzzParser(f *testing.F) {
	f.Add([]byte("\ufeffdata: a\r\ndata:b\r\r\n:x\nevent: y\n\ndata\n\n"), uint16(3))
	f.Fuzz(func(t *testing.T, b []byte, cut uint16) {
		split := func(parts ...[]byte) (events []string, err error) {
			var p parser
			for _, part := range parts {
				if err := p.feed(part, func(d []byte) error { events = append(events, string(d)); return nil }); err != nil {
					return events, err
				}
			}
			return events, nil
		}
		i := min(int(cut), len(b))
		whole, err1 := split(b)
		parts, err2 := split(b[:i], b[i:])
		if fmt.Sprintf("%q", whole) != fmt.Sprintf("%q", parts) || (err1 == nil) != (err2 == nil) {
			t.Fatalf("%q: whole %q, cut at %d %q", b, whole, i, parts)
		}
	})
}
