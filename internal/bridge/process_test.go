package bridge

import (
	"bytes"
	"context"
	"debug/elf"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/resultity/node/internal/bridge/contract"
	"github.com/resultity/node/internal/bridge/internal/sealtest"
	"github.com/resultity/node/internal/bridge/sandbox"
	"github.com/resultity/node/test/hostile"
)

// What the test binary is when it is started in a container.
const (
	asBridge = "bridge"
	asEngine = "engine"
	asParent = "parent" // of an orphan
	asOrphan = "orphan"

	asHostile = "hostile" // an engine
)

// patience is for what must come. A busy kernel is slow to make namespaces.
const patience = 2 * time.Minute

// codeLeak is the exit code of a bridge that left goroutines behind.
const codeLeak = 99

func TestMain(m *testing.M) {
	sealtest.Main()
	if hostile.Again(os.Args) {
		os.Exit(0)
	}
	if len(os.Args) > 1 {
		switch os.Args[1] {
		case asBridge:
			neglect = 45 * time.Second // an engine that a busy machine makes late is no reason to end
			code := Main(os.Args[2:], os.Stderr)
			// The bridge ends at once when its engine does; a handler that is on its
			// way out is no leak, one that stays is.
			if left := straysAfter(patience); left != "" {
				fmt.Fprintf(os.Stderr, "goroutines left:\n%s\n", left)
				code = codeLeak
			}
			os.Exit(code)
		case asEngine:
			engineProcess(os.Args[2:])
			os.Exit(0)
		case contract.LaunchCommand:
			os.Exit(Launch())
		case asHostile:
			hostile.Main(os.Args[1:])
			os.Exit(0)
		case asParent:
			pid, err := syscall.ForkExec("/proc/self/exe", []string{"test", asOrphan}, &syscall.ProcAttr{Env: os.Environ(), Files: []uintptr{0, 2, 2}})
			fmt.Println(pid, err)
			os.Exit(0)
		case asOrphan:
			io.Copy(io.Discard, os.Stdin)
			os.Exit(0)
		}
	}
	os.Exit(m.Run())
}

// node is a bridge that runs as PID 1 of a container, with the test in the
// place of systemd and of the agent.
type node struct {
	t      testing.TB
	box    *sealtest.Box
	told   chan string // messages to systemd
	client *http.Client

	mu     sync.Mutex
	stderr bytes.Buffer
}

func (n *node) Write(p []byte) (int, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.stderr.Write(p)
}

func (n *node) log() string {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.stderr.String()
}

// testOptions are those of a bridge with the test binary as its engine, quick
// enough to watch.
func testOptions(words ...string) contract.Options {
	o := contract.Defaults()
	o.Model, o.MaxInFlight = "tiny", 4
	o.StartTimeout = time.Minute
	o.Watchdog = 300 * time.Millisecond
	o.Stall = 600 * time.Millisecond
	o.CanaryEvery = 200 * time.Millisecond
	o.StopGrace = time.Minute
	o.Writable = []string{"/tmp", "/dev/shm"}
	o.ReadOnly = []string{"/models"}
	o.Command = append([]string{sealtest.Binary, asEngine}, words...)
	return o
}

// start starts a bridge. It does not wait for anything.
func start(t testing.TB, o contract.Options, flaws ...sealtest.Flaw) *node {
	t.Helper()
	args, err := o.Args()
	if err != nil {
		t.Fatal(err)
	}
	return startArgs(t, "", args, flaws...)
}

func startArgs(t testing.TB, program string, args []string, flaws ...sealtest.Flaw) *node {
	t.Helper()
	dir := sealtest.MakeDir(t)
	return startIn(t, dir, program, args, flaws...)
}

func startIn(t testing.TB, dir, program string, args []string, flaws ...sealtest.Flaw) *node {
	t.Helper()
	path := filepath.Join(dir, "notify", "notify.sock")
	c, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	if err := os.Chmod(path, 0o777); err != nil {
		t.Fatal(err)
	}
	n := &node{t: t, told: make(chan string, 10000)}
	go func() {
		defer close(n.told)
		buf := make([]byte, 1<<16)
		for {
			k, err := c.Read(buf)
			if err != nil {
				return
			}
			n.told <- string(buf[:k])
		}
	}()
	if program == "" {
		args = append([]string{asBridge}, args...)
	}
	n.box = sealtest.Start(t, sealtest.Container{
		Dir:     dir,
		Program: program,
		Args:    args,
		Env:     []string{"NOTIFY_SOCKET=/run/notify/notify.sock", "HOME=/", "WATCHDOG_USEC=1"},
		Flaws:   flaws,
		Stderr:  n,
	})
	transport := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", n.socket())
	}}
	t.Cleanup(transport.CloseIdleConnections)
	n.client = &http.Client{Transport: transport, Timeout: patience}
	return n
}

func (n *node) socket() string { return filepath.Join(n.box.Dir, "run", "engine.sock") }

// logUntil waits until the log holds what, and returns it. It comes through a
// pipe and can be behind the messages to systemd.
func (n *node) logUntil(what string) string {
	n.t.Helper()
	for deadline := time.Now().Add(patience); ; runtime.Gosched() {
		log := n.log()
		if strings.Contains(log, what) {
			return log
		}
		if time.Now().After(deadline) {
			n.t.Fatalf("no %q in the log:\n%s", what, log)
		}
	}
}

// hear waits for a message to systemd that holds what, and returns it and those
// before it.
func (n *node) hear(what string) (message string, before []string) {
	n.t.Helper()
	timeout := time.After(patience)
	for {
		select {
		case m, ok := <-n.told:
			switch {
			case !ok:
				n.t.Fatalf("no message with %q", what)
			case strings.Contains(m, what):
				return m, before
			}
			before = append(before, m)
		case <-timeout:
			n.t.Fatalf("no message with %q, but %q; log:\n%s", what, before, n.log())
		}
	}
}

// lastLine is that of a text.
func lastLine(text string) string {
	text = strings.TrimSpace(text)
	return text[strings.LastIndexByte(text, '\n')+1:]
}

// end waits for the bridge to end, which must be with a code.
func (n *node) end(want int) {
	n.t.Helper()
	giveUp := time.AfterFunc(patience, func() { n.box.Signal(syscall.SIGKILL) })
	defer giveUp.Stop()
	if code := n.box.Wait(); code != want {
		n.t.Fatalf("ended with %d, want %d; log:\n%s", code, want, n.log())
	}
}

func (n *node) signal(s syscall.Signal) {
	n.t.Helper()
	if err := n.box.Signal(s); err != nil {
		n.t.Fatal(err)
	}
}

// engine is the engine's process id outside.
func (n *node) engine() int {
	n.t.Helper()
	pids, err := sealtest.Children(n.box.PID)
	if err != nil || len(pids) != 1 {
		n.t.Fatalf("the bridge's children are %v (%v), want the engine alone", pids, err)
	}
	return pids[0]
}

func (n *node) kill(s syscall.Signal) {
	n.t.Helper()
	if err := syscall.Kill(n.engine(), s); err != nil {
		n.t.Fatal(err)
	}
}

func (n *node) post(order string) (*http.Response, error) {
	return n.client.Post("http://engine/v1/completions", "application/json", strings.NewReader(prompt(order)))
}

func (n *node) ask(order string) string {
	n.t.Helper()
	resp, err := n.post(order)
	if err != nil {
		n.t.Fatalf("%s: %v", order, err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != 200 {
		n.t.Fatalf("%s: %d %q (%v)", order, resp.StatusCode, b, err)
	}
	return string(b)
}

func (n *node) get(path string, v any) {
	n.t.Helper()
	resp, err := n.client.Get("http://engine" + path)
	if err != nil {
		n.t.Fatal(err)
	}
	defer resp.Body.Close()
	if err := json.NewDecoder(resp.Body).Decode(v); err != nil {
		n.t.Fatal(err)
	}
}

func TestBridgeServes(t *testing.T) {
	t.Parallel()
	n := start(t, testOptions())
	ready, before := n.hear("READY=1")
	if !strings.Contains(ready, "\nSTATUS=serving tiny") {
		t.Errorf("READY says %q", ready)
	}
	for i, want := range []string{"STATUS=starting tiny: waits for /health, 0s of 1m0s", "STATUS=starting tiny: waits for a first completion"} {
		if len(before) <= i || !strings.HasPrefix(before[i], want) {
			t.Errorf("messages before READY are %q, want %q", before, want)
		}
	}
	for _, message := range append(before, ready) {
		for line := range strings.SplitSeq(message, "\n") {
			if name, _, _ := strings.Cut(line, "="); !slices.Contains([]string{"READY", "WATCHDOG", "STATUS"}, name) {
				t.Errorf("it says %q, which does not leave the container", line)
			}
		}
	}
	if info, err := os.Stat(n.socket()); err != nil || info.Mode().Perm() != 0o666 {
		t.Errorf("socket: %v (%v), want mode 0666", info, err)
	}
	var s contract.Sandbox
	n.get(contract.SandboxPath, &s)
	if !s.OK || s.Version != contract.Version || len(s.Checks) < 20 || s.UID != sealtest.User {
		t.Errorf("sandbox %+v", s)
	}
	if got := n.ask("stream 3"); got != "data: {\"n\":0}\n\ndata: {\"n\":1}\n\ndata: {\"n\":2}\n\ndata: [DONE]\n\n" {
		t.Errorf("stream: %q", got)
	}
	if got := n.ask("environment"); strings.Contains(got, "NOTIFY_SOCKET") || strings.Contains(got, "WATCHDOG") || !strings.Contains(got, "HOME=/") {
		t.Errorf("the engine's environment: %q", got)
	}
	if got := n.ask("trace"); got != "got: " {
		t.Errorf("the engine can reach into the bridge: %s", got)
	}
	if got := n.ask("filters"); got != "2" {
		t.Errorf("the engine is under %s system call filters, want the container's and the bridge's", got)
	}
	n.hear("WATCHDOG=1\nSTATUS=serving tiny: 0 in flight, 4 answered")
	var st contract.Status
	n.get(contract.StatusPath, &st)
	if st.State != contract.Serving || st.Model != "tiny" || st.Answered != 4 || st.StartMS < 1 {
		t.Errorf("status %+v", st)
	}

	n.signal(syscall.SIGTERM)
	n.hear("STOPPING=1")
	n.end(contract.ExitStopped)
	if _, err := os.Lstat(n.socket()); !os.IsNotExist(err) {
		t.Errorf("the socket is still there (%v)", err)
	}
}

// The bridge looks again when it is asked: not at what the engine may make, but
// at what root has done to the container.
func TestBridgeLooksAgain(t *testing.T) {
	t.Parallel()
	n := start(t, testOptions())
	n.hear("READY=1")
	look := func() (s contract.Sandbox) {
		n.get(contract.SandboxPath, &s)
		return s
	}
	first := look()
	if !first.OK || len(first.Interfaces) == 0 || len(first.Devices) == 0 {
		t.Fatalf("%+v", first)
	}
	if got := n.ask("clutter"); got != "<nil> <nil> <nil>" {
		t.Fatalf("the engine could not make what it may: %s", got)
	}
	if again := look(); !reflect.DeepEqual(first, again) {
		t.Errorf("%q\n%+v, was\n%+v", sandbox.Failed(again), again, first)
	}
	from := func(args ...string) {
		t.Helper()
		if out, err := exec.Command("nsenter", append([]string{"-t", strconv.Itoa(n.box.PID)}, args...)...).CombinedOutput(); err != nil {
			t.Fatalf("%q: %v: %s", args, err, out)
		}
	}
	from("-n", "ip", "link", "add", "leak7", "type", "veth", "peer", "name", "leak8")
	from("-n", "ip", "link", "set", "leak7", "up")
	mounted := make(chan error)
	go func() { // on a thread that ends with it
		runtime.LockOSThread()
		ns, err := os.Open(fmt.Sprintf("/proc/%d/ns/mnt", n.box.PID))
		if err == nil {
			err = errors.Join(unix.Unshare(unix.CLONE_FS), unix.Setns(int(ns.Fd()), unix.CLONE_NEWNS), unix.Mount("none", "/models", "tmpfs", 0, ""))
		}
		mounted <- err
	}()
	if err := <-mounted; err != nil {
		t.Fatal(err)
	}
	foreign := exec.CommandContext(t.Context(), "nsenter", "-t", strconv.Itoa(n.box.PID), "-p", "sleep", "60") // which ends with the container
	if err := foreign.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = foreign.Wait() }) // it was killed
	for deadline := time.Now().Add(patience); ; runtime.Gosched() {
		if pids, err := sealtest.Children(foreign.Process.Pid); err == nil && len(pids) == 1 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("nsenter starts nothing in the container")
		}
	}
	var names []string
	for _, c := range look().Checks {
		if !c.OK {
			names = append(names, c.Name)
		}
	}
	if want := []string{"processes", "interfaces", "read-only /models", "mounts"}; !slices.Equal(names, want) {
		t.Errorf("failed %q, want %q", names, want)
	}
}

// The engine's orphans become PID 1's children, whoever their parents were.
func TestBridgeReapsOrphans(t *testing.T) {
	t.Parallel()
	n := start(t, testOptions())
	n.hear("READY=1")
	if got := strings.Fields(n.ask("orphans 5")); len(got) != 10 {
		t.Fatalf("orphans: %q", got) // five ids, each with its error
	}
	for deadline := time.Now().Add(patience); ; runtime.Gosched() {
		pids, err := sealtest.Children(n.box.PID)
		if err == nil && len(pids) == 1 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("children %v (%v), want the engine alone", pids, err)
		}
	}
	n.signal(syscall.SIGINT)
	n.end(contract.ExitStopped)
}

func TestBridgeRefusesItsCommandLine(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		args []string
		want string
	}{
		{[]string{"--modell", "x"}, "command line"},
		{[]string{"--model", "m", "--max-in-flight", "1", "--socket", "x", "--", "/engine"}, "absolute path"},
	} {
		n := startArgs(t, "", tt.args)
		n.end(contract.ExitConfig)
		n.hear("STATUS=command line: ")
		t.Logf("%q: expected: exit status %d, %s; got: it, %s", tt.args, contract.ExitConfig, tt.want, lastLine(n.log()))
		if !strings.Contains(n.log(), tt.want) {
			t.Errorf("log %q, want %q in it", n.log(), tt.want)
		}
	}
}

func TestBridgeRefusesToStart(t *testing.T) {
	t.Parallel()
	missing := testOptions()
	missing.Command[0] = "/no/such/engine"
	device := testOptions()
	device.Command[0] = "/dev/null"
	for name, tt := range map[string]struct {
		options contract.Options
		prepare func(dir string) error
		flaw    []sealtest.Flaw
		code    int
		want    string
	}{
		"no engine":          {options: missing, code: contract.ExitConfig, want: "start engine /no/such/engine"},
		"not executable":     {options: device, code: contract.ExitConfig, want: "start engine /dev/null"},
		"interface":          {options: testOptions(), flaw: []sealtest.Flaw{sealtest.Interface}, code: contract.ExitSandbox, want: "sandbox: interfaces: want lo alone, got leak0"},
		"writable models":    {options: testOptions(), flaw: []sealtest.Flaw{sealtest.WritableModels}, code: contract.ExitSandbox, want: "sandbox: read-only /models: want read-only, got possible"},
		"inherited file":     {options: testOptions(), flaw: []sealtest.Flaw{sealtest.InheritedFile}, code: contract.ExitSandbox, want: "sandbox: descriptors"},
		"unordered writable": {options: func() contract.Options { o := testOptions(); o.Writable = nil; return o }(), code: contract.ExitSandbox, want: "sandbox: mounts"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := sealtest.MakeDir(t)
			if tt.prepare != nil {
				if err := tt.prepare(filepath.Join(dir, "run", "engine.sock")); err != nil {
					t.Fatal(err)
				}
			}
			args, err := tt.options.Args()
			if err != nil {
				t.Fatal(err)
			}
			n := startIn(t, dir, "", args, tt.flaw...)
			n.end(tt.code)
			n.hear(tt.want)
			t.Logf("expected: exit status %d, %s; got: it, %s", tt.code, tt.want, lastLine(n.log()))
			if log := n.log(); !strings.Contains(log, tt.want) {
				t.Errorf("log %q, want %q in it", log, tt.want)
			}
			if strings.Contains(n.log(), engineStarted) {
				t.Error("the engine was started")
			}
		})
	}
}

// A pipe in the shared directory would fail the inspection, and a directory in
// the socket's place the bind: an engine must not get that far.
func TestWhatAnEngineLeftIsRemoved(t *testing.T) {
	t.Parallel()
	dir := sealtest.MakeDir(t)
	if err := syscall.Mkfifo(filepath.Join(dir, "run", "pipe"), 0o666); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(dir, "run", "engine.sock"), 0o777); err != nil {
		t.Fatal(err)
	}
	args, err := testOptions().Args()
	if err != nil {
		t.Fatal(err)
	}
	n := startIn(t, dir, "", args)
	n.hear("READY=1")
	n.ask("x")
	left, err := os.ReadDir(filepath.Join(dir, "run"))
	t.Logf("a pipe, and a directory in the socket's place: expected: the socket alone; got: %v", left)
	if err != nil || len(left) != 1 || left[0].Type() != os.ModeSocket {
		t.Errorf("%v, %v", left, err)
	}
}

func TestEngineThatNeverAnswersIsNotReady(t *testing.T) {
	t.Parallel()
	for word, want := range map[string]string{
		"silent": "engine is not ready after 3s: waits for /health",
		"frozen": "engine is not ready after 3s: waits for a first completion",
	} {
		o := testOptions(word)
		o.StartTimeout = 3 * time.Second // enough for a busy machine to get to the second wait
		n := start(t, o)
		n.end(contract.ExitNotReady)
		n.hear("STATUS=" + want)
		if !strings.Contains(n.log(), want) {
			t.Errorf("%s: log %q", word, n.log())
		}
		if _, err := os.Lstat(n.socket()); !os.IsNotExist(err) {
			t.Errorf("%s: a socket was there (%v)", word, err)
		}
	}
}

func TestEngineThatEndsEndsTheBridge(t *testing.T) {
	t.Parallel()
	for order, want := range map[string]int{
		"exit 3": 3,
		"exit 0": contract.ExitEngine,
		"exit " + strconv.Itoa(contract.ExitSandbox): contract.ExitEngine,
		"exit " + strconv.Itoa(contract.ExitConfig):  contract.ExitEngine,
		"exit 255":  255,
		"signal 9":  128 + 9,
		"signal 15": 128 + 15,
	} {
		t.Run(order, func(t *testing.T) {
			t.Parallel()
			n := start(t, testOptions())
			n.hear("READY=1")
			if resp, err := n.post(order); err == nil {
				resp.Body.Close()
			}
			n.end(want)
			n.hear("STATUS=engine ")
		})
	}
	t.Run("at once", func(t *testing.T) {
		t.Parallel()
		n := start(t, testOptions("exit=5"))
		n.end(5)
		n.hear("STATUS=engine ended with exit code 5")
	})
}

// wantSilence waits for the message that the engine is hung, lets the watchdog
// pass a few times, revives the engine, and demands that there was no WATCHDOG
// in between.
func wantSilence(n *node, why string, revive func()) {
	n.t.Helper()
	hung, _ := n.hear("STATUS=hung: ")
	n.t.Logf("expected: hung: %s; got: %s", why, lastLine(hung))
	if !strings.Contains(hung, why) {
		n.t.Errorf("says %q, want %q in it", hung, why)
	}
	var st contract.Status
	for deadline := time.Now().Add(patience); st.Withheld < 5; {
		n.get(contract.StatusPath, &st)
		if time.Now().After(deadline) {
			n.t.Fatalf("status %+v", st)
		}
	}
	if st.State != contract.Hung || !strings.Contains(st.Reason, why) {
		n.t.Errorf("status %+v", st)
	}
	for len(n.told) > 0 {
		if m := <-n.told; strings.Contains(m, "WATCHDOG") {
			n.t.Fatalf("says %q of a hung engine", m)
		}
	}
	revive()
	n.hear("WATCHDOG=1")
	for _, line := range []string{"no more watchdog messages", "engine is back"} {
		if k := strings.Count(n.logUntil(line), line); k != 1 {
			n.t.Errorf("said %d times that %s; log:\n%s", k, line, n.log())
		}
	}
}

func TestStoppedEngineIsHungWhileIdle(t *testing.T) {
	t.Parallel()
	n := start(t, testOptions())
	n.hear("WATCHDOG=1\nSTATUS=serving tiny: 0")
	n.kill(syscall.SIGSTOP)
	wantSilence(n, "has not answered a canary", func() { n.kill(syscall.SIGCONT) })
}

func TestStoppedEngineIsHungInFlight(t *testing.T) {
	t.Parallel()
	n := start(t, testOptions())
	n.hear("READY=1")
	resp, err := n.post("comments") // a stream that never ends
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	n.kill(syscall.SIGSTOP)
	wantSilence(n, "with 1 requests in flight", func() {
		n.kill(syscall.SIGCONT)
		resp.Body.Close() // what follows is a canary, which proves life
	})
}

// The engine's HTTP side goes on sending comments while its model hangs.
func TestCommentsAreNoSignOfLife(t *testing.T) {
	t.Parallel()
	n := start(t, testOptions())
	n.hear("READY=1")
	resp, err := n.post("comments")
	if err != nil {
		t.Fatal(err)
	}
	go io.Copy(io.Discard, resp.Body)
	wantSilence(n, "with 1 requests in flight", func() { resp.Body.Close() })
}

func TestHealthIsNoSignOfLife(t *testing.T) {
	t.Parallel()
	n := start(t, testOptions())
	n.hear("READY=1")
	n.ask("freeze")
	if resp, err := n.client.Get("http://engine/health"); err != nil || resp.StatusCode != 200 {
		t.Fatalf("health: %v %v", resp, err)
	}
	wantSilence(n, "has not answered a canary", func() { n.kill(syscall.SIGUSR1) })
}

func TestReplacedSocketIsNoSignOfLife(t *testing.T) {
	t.Parallel()
	n := start(t, testOptions())
	n.hear("WATCHDOG=1\nSTATUS=serving tiny: 0")
	if err := os.Remove(n.socket()); err != nil {
		t.Fatal(err)
	}
	const want = "STATUS=hung: something else is in the place of the socket"
	got, _ := n.hear(want)
	t.Logf("expected: %s; got: %s", want, lastLine(got))
}

func TestStopWaitsForRequests(t *testing.T) {
	t.Parallel()
	n := start(t, testOptions())
	n.hear("READY=1")
	n.ask("freeze")
	answer := make(chan string, 1)
	go func() { answer <- n.ask("x") }()
	n.inFlight(1)
	n.signal(syscall.SIGTERM)
	n.hear("STOPPING=1")
	n.refused()
	// Longer than the engine may be silent, and than systemd would wait.
	for range 10 {
		n.hear("WATCHDOG=1")
	}
	n.kill(syscall.SIGUSR1)
	if got := <-answer; !strings.Contains(got, "choices") {
		t.Errorf("answer %q", got)
	}
	n.end(contract.ExitStopped)
}

// inFlight waits until that many requests are with the engine.
func (n *node) inFlight(want int) {
	n.t.Helper()
	for deadline := time.Now().Add(patience); ; {
		var st contract.Status
		n.get(contract.StatusPath, &st)
		if st.InFlight == want {
			return
		}
		if time.Now().After(deadline) {
			n.t.Fatalf("status %+v, want %d in flight", st, want)
		}
	}
}

// refused waits until there is no new connection any more.
func (n *node) refused() {
	n.t.Helper()
	for deadline := time.Now().Add(patience); ; {
		c, err := net.Dial("unix", n.socket())
		if err != nil {
			return
		}
		c.Close()
		if time.Now().After(deadline) {
			n.t.Fatal("still accepts connections")
		}
	}
}

func TestStopGivesUpOnRequests(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		grace time.Duration
		again bool
		want  string
	}{
		"after the grace time":    {100 * time.Millisecond, false, "after the grace time"},
		"after the second signal": {time.Hour, true, "again: not waiting"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			o := testOptions()
			o.Stall, o.StopGrace = time.Hour, tt.grace
			n := start(t, o)
			n.hear("READY=1")
			n.ask("freeze")
			cut := make(chan error, 1)
			go func() {
				resp, err := n.post("x")
				if err == nil {
					resp.Body.Close()
				}
				cut <- err
			}()
			n.inFlight(1)
			n.signal(syscall.SIGTERM)
			n.hear("STOPPING=1")
			if tt.again {
				n.signal(syscall.SIGTERM)
			}
			n.end(contract.ExitStopped)
			if err := <-cut; err == nil {
				t.Error("the request was answered")
			}
			if !strings.Contains(n.log(), tt.want) {
				t.Errorf("log %q, want %q in it", n.log(), tt.want)
			}
		})
	}
}

func TestStopInsists(t *testing.T) {
	t.Parallel()
	for word, want := range map[string]string{
		"second-term": "engine ended with exit code 1",
		"ignore-term": "engine was ended by signal 9",
	} {
		t.Run(word, func(t *testing.T) {
			t.Parallel()
			n := start(t, testOptions(word))
			n.hear("READY=1")
			n.signal(syscall.SIGTERM)
			n.end(contract.ExitStopped)
			if !strings.Contains(n.log(), want) {
				t.Errorf("log %q, want %q in it", n.log(), want)
			}
		})
	}
}

func TestStopWhileStarting(t *testing.T) {
	t.Parallel()
	n := start(t, testOptions("frozen"))
	n.hear("waits for a first completion")
	n.signal(syscall.SIGTERM)
	n.end(contract.ExitStopped)
}

func TestNotifier(t *testing.T) {
	if err := (notifier{}).send("READY=1"); err != nil {
		t.Errorf("without a socket: %v", err)
	}
	if err := (notifier{"/no/such/socket"}).send("READY=1"); err == nil {
		t.Error("no error without a listener")
	}
	for _, name := range []string{filepath.Join(t.TempDir(), "n"), fmt.Sprintf("@resultity-bridge-test-%d", os.Getpid())} {
		c, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: name, Net: "unixgram"})
		if err != nil {
			t.Fatal(err)
		}
		if err := (notifier{name}).send("READY=1", status("a\nWATCHDOG=1 %s", strings.Repeat("ü", 200))); err != nil {
			t.Fatal(err)
		}
		buf := make([]byte, 1000)
		k, err := c.Read(buf)
		want := "READY=1\nSTATUS=a WATCHDOG=1 " + strings.Repeat("ü", (maxStatus-len("a WATCHDOG=1 "))/2)
		if got := string(buf[:k]); err != nil || got != want {
			t.Errorf("%s: got %q (%v), want %q", name, got, err, want)
		}
		c.Close()
	}
}

// program builds the real bridge.
var program = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "bridge")
	if err != nil {
		return "", err
	}
	path := filepath.Join(dir, "resultity-bridge")
	cmd := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", path, "github.com/resultity/node/cmd/resultity-bridge")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("%v: %s", err, out)
	}
	return path, os.Chmod(dir, 0o755)
})

// The real program must run in an image that holds nothing, and stay small.
func TestProgram(t *testing.T) {
	path, err := program()
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(filepath.Dir(path))
	f, err := elf.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if libs, err := f.ImportedLibraries(); err != nil || len(libs) > 0 || slices.ContainsFunc(f.Progs, func(p *elf.Prog) bool { return p.Type == elf.PT_INTERP }) {
		t.Errorf("not static: needs %q (%v)", libs, err)
	}
	out, err := exec.Command("go", "list", "-deps", "-f", "{{if not .Standard}}{{.ImportPath}}{{end}}", "github.com/resultity/node/cmd/resultity-bridge").Output()
	if err != nil {
		t.Fatal(err)
	}
	for p := range strings.FieldsSeq(string(out)) {
		if !strings.HasPrefix(p, "github.com/resultity/node/internal/bridge") && p != "github.com/resultity/node/internal/plainhttp" && p != "github.com/resultity/node/cmd/resultity-bridge" {
			t.Errorf("needs %s: the bridge uses nothing but the standard library and what is made for it", p)
		}
	}

	o := testOptions()
	o.Watchdog, o.CanaryEvery = 30*time.Second, 30*time.Second
	args, err := o.Args()
	if err != nil {
		t.Fatal(err)
	}
	n := startArgs(t, path, args)
	n.hear("READY=1")
	idle := n.resident()
	for range 3000 {
		n.ask("stream 20")
	}
	used := n.resident()
	t.Logf("resident: %d KiB idle, %d KiB after 3000 streams", idle>>10, used>>10)
	if idle > 10<<20 {
		t.Errorf("resident when idle: %d KiB, want at most 10 MiB", idle>>10)
	}
	if used > 16<<20 {
		t.Errorf("resident after 3000 streams: %d KiB, want at most 16 MiB", used>>10)
	}
	n.signal(syscall.SIGTERM)
	n.end(contract.ExitStopped)
}

// resident is the bridge's memory in bytes.
func (n *node) resident() int {
	n.t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", n.box.PID))
	if err != nil {
		n.t.Fatal(err)
	}
	pages, err := strconv.Atoi(strings.Fields(string(b))[1])
	if err != nil {
		n.t.Fatal(err)
	}
	return pages * os.Getpagesize()
}

// engineStarted is what the engine says first.
const engineStarted = "test engine started"
