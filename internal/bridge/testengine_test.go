package bridge

import (
	"bufio"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/signal"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// testEngine is an engine that does as its requests say: the prompt is an
// order. It is used in the test's own process and, by startTestEngine, as a
// process of its own.
type testEngine struct {
	mu     sync.Mutex
	frozen chan struct{} // nil unless completions hang; closed to thaw
	seen   chan http.Header
	gone   chan string // gets the prompt of a request whose caller went away
}

func newTestEngine() *testEngine {
	return &testEngine{seen: make(chan http.Header, 100), gone: make(chan string, 100)}
}

func (e *testEngine) freeze(on bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	switch {
	case on && e.frozen == nil:
		e.frozen = make(chan struct{})
	case !on && e.frozen != nil:
		close(e.frozen)
		e.frozen = nil
	}
}

func (e *testEngine) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	switch r.URL.Path {
	case "/health":
		io.WriteString(w, `{"status":"ok"}`)
	case "/metrics":
		w.Header().Set("Content-Type", "text/plain; version=0.0.4")
		io.WriteString(w, "llamacpp:requests_processing 1\n")
	case "/v1/models":
		w.Header().Set("Content-Type", "application/json")
		w.Header().Set("X-Engine", "must not be passed on")
		io.WriteString(w, `{"object":"list","data":[{"id":"tiny"}]}`)
	case "/v1/embeddings":
		e.early(w, r)
	case "/v1/completions", "/v1/chat/completions":
		select {
		case e.seen <- r.Header.Clone():
		default:
		}
		e.complete(w, r)
	default:
		http.Error(w, "File Not Found", http.StatusNotFound)
	}
}

// early begins to answer before it has read the request, as an engine may, and
// ends with what it has read.
func (e *testEngine) early(w http.ResponseWriter, r *http.Request) {
	var seed uint64
	fmt.Sscanf(r.Header.Get("Accept"), "bytes/%d", &seed)
	http.NewResponseController(w).EnableFullDuplex()
	pour(w, seed)
	w.(http.Flusher).Flush()
	body := sha256.New()
	if n, err := io.Copy(body, r.Body); err != nil || n != r.ContentLength {
		panic(http.ErrAbortHandler)
	}
	w.Write(body.Sum(nil))
	pour(w, seed+1)
}

func (e *testEngine) complete(w http.ResponseWriter, r *http.Request) {
	var q struct {
		Prompt string `json:"prompt"`
	}
	body, err := io.ReadAll(r.Body)
	if err == nil {
		err = json.Unmarshal(body, &q)
	}
	if err != nil {
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(http.StatusBadRequest)
		io.WriteString(w, `{"error":{"message":"not JSON","type":"invalid_request_error"}}`)
		return
	}
	e.mu.Lock()
	frozen := e.frozen
	e.mu.Unlock()
	if frozen != nil {
		select {
		case <-frozen:
		case <-r.Context().Done():
			e.gone <- q.Prompt
			return
		}
	}
	order, arg, _ := strings.Cut(q.Prompt, " ")
	n, _ := strconv.Atoi(arg)
	say := func(text string) {
		io.WriteString(w, text)
		w.(http.Flusher).Flush()
	}
	stream := func() { w.Header().Set("Content-Type", "text/event-stream") }
	wait := func() {
		<-r.Context().Done()
		e.gone <- q.Prompt
	}
	switch order {
	case "stream":
		stream()
		for i := range n {
			say(fmt.Sprintf("data: {\"n\":%d}\n\n", i))
		}
		say("data: [DONE]\n\n")
	case "random": // bytes of a seed, in pieces of all sizes
		w.Header().Set("Content-Type", "application/octet-stream")
		pour(w, uint64(n))
	case "hang":
		wait()
	case "pause":
		stream()
		say("data: one\n\n")
		wait()
	case "comments":
		stream()
		say("data: one\n\n")
		for r.Context().Err() == nil {
			say(": ping\n\n")
			time.Sleep(time.Millisecond) // the pace of a fake, not of a test
		}
		e.gone <- q.Prompt
	case "endless":
		w.Header().Set("Content-Type", "text/plain")
		for r.Context().Err() == nil {
			if _, err := io.WriteString(w, strings.Repeat("x", 1<<16)); err != nil {
				break
			}
		}
		e.gone <- q.Prompt
	case "raw": // what stands in the argument, and nothing after it
		c, _, _ := http.NewResponseController(w).Hijack()
		io.WriteString(c, arg)
		c.Close()
	case "headers": // without an end
		c, _, _ := http.NewResponseController(w).Hijack()
		defer c.Close()
		io.WriteString(c, "HTTP/1.1 200 OK\r\n")
		for {
			if _, err := io.WriteString(c, "X-Pad: "+strings.Repeat("x", 1000)+"\r\n"); err != nil {
				return
			}
		}
	case "status":
		w.Header().Set("Content-Type", "application/json")
		w.Header().Set("Retry-After", "7")
		w.WriteHeader(n)
		io.WriteString(w, `{"error":{"message":"as you wish"}}`)
	case "freeze":
		e.freeze(true)
		say(`{"choices":[{"text":""}]}`)
	case "exit":
		os.Exit(n)
	case "signal":
		syscall.Kill(os.Getpid(), syscall.Signal(n))
		select {}
	case "orphans":
		say(orphans(n))
	case "trace": // tries what the kernel must not let an engine do to its parent
		say(trace(os.Getppid()))
	case "filters": // of system calls, that this process is under
		status, _ := os.ReadFile("/proc/self/status")
		_, after, _ := strings.Cut(string(status), "Seccomp_filters:\t")
		n, _, _ := strings.Cut(after, "\n")
		say(n)
	case "clutter": // what an engine may make, where it may
		_, err1 := net.Listen("unix", "/tmp/engine.sock")
		_, err2 := net.Listen("unix", "@engine")
		err3 := syscall.Mkfifo("/dev/shm/engine", 0o600)
		say(fmt.Sprint(err1, err2, err3))
	case "environment":
		say(strings.Join(os.Environ(), "\n"))
	default:
		w.Header().Set("Content-Type", "application/json")
		io.WriteString(w, `{"choices":[{"text":"b"}]}`)
	}
}

// pour writes the bytes of a seed.
func pour(w io.Writer, seed uint64) error {
	source := rand.New(rand.NewPCG(seed, 1))
	text := rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8)})
	buf := make([]byte, 8<<10)
	for range source.IntN(12) {
		p, flush := buf[:1+source.IntN(len(buf))], source.IntN(2) == 0
		text.Read(p)
		if _, err := w.Write(p); err != nil {
			return err
		}
		if f, ok := w.(http.Flusher); ok && flush {
			f.Flush()
		}
	}
	return nil
}

// orphans makes n processes whose parent is gone, and returns once they are
// this process's parent's problem.
func orphans(n int) string {
	var pids []string
	for range n {
		// The child makes a child and ends; its child waits for its input to
		// end, which it does when the pipe is closed here.
		r, w, _ := os.Pipe()
		out, in, _ := os.Pipe()
		pid, err := syscall.ForkExec("/proc/self/exe", []string{"test", "parent"}, &syscall.ProcAttr{Env: os.Environ(), Files: []uintptr{r.Fd(), in.Fd(), 2}})
		if err != nil {
			return err.Error()
		}
		in.Close()
		r.Close()
		line, _ := bufio.NewReader(out).ReadString('\n')
		syscall.Wait4(pid, nil, 0, nil)
		pids = append(pids, strings.TrimSpace(line))
		w.Close()
	}
	return strings.Join(pids, " ")
}

// trace tries to get at another process with the same user id.
func trace(pid int) string {
	var got []string
	for _, f := range []string{"mem", "environ", "maps", "fd/0"} {
		if h, err := os.Open(fmt.Sprintf("/proc/%d/%s", pid, f)); err == nil {
			h.Close()
			got = append(got, f)
		}
	}
	runtime.LockOSThread() // a tracer is a thread
	defer runtime.UnlockOSThread()
	if err := syscall.PtraceAttach(pid); err == nil {
		syscall.Wait4(pid, nil, 0, nil)
		syscall.PtraceDetach(pid)
		got = append(got, "ptrace")
	}
	return "got: " + strings.Join(got, " ")
}

// engineProcess is the engine as a process. The words change it.
func engineProcess(words []string) {
	has := func(w string) bool { return slices.Contains(words, w) }
	e := newTestEngine()
	fmt.Fprintln(os.Stderr, engineStarted)
	e.freeze(has("frozen"))
	thaw := make(chan os.Signal, 1)
	signal.Notify(thaw, syscall.SIGUSR1)
	go func() {
		for range thaw {
			e.freeze(false)
		}
	}()
	if has("ignore-term") {
		signal.Ignore(syscall.SIGTERM)
	}
	if has("second-term") {
		terms := make(chan os.Signal, 2)
		signal.Notify(terms, syscall.SIGTERM)
		go func() {
			<-terms
			<-terms
			os.Exit(1)
		}()
	}
	for _, w := range words {
		if code, ok := strings.CutPrefix(w, "exit="); ok {
			n, _ := strconv.Atoi(code)
			os.Exit(n)
		}
	}
	if has("silent") {
		select {}
	}
	l, err := net.Listen("tcp", "127.0.0.1:8080")
	if err != nil {
		fmt.Fprintln(os.Stderr, "test engine:", err)
		os.Exit(119)
	}
	http.Serve(l, e)
}
