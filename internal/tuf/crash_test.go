package tuf

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/publish"
)

// childDir, when set, makes the test program a node: it refreshes once from
// the repository that the files in this directory describe.
const childDir = "TUF_TEST_CHILD"

func TestMain(m *testing.M) {
	if dir := os.Getenv(childDir); dir != "" {
		if err := child(dir); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func child(dir string) error {
	part := func(name string) []byte {
		raw, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			panic(err)
		}
		return raw
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(part("ca.pem"))
	c, err := New(Config{
		Dir:    filepath.Join(dir, "cache"),
		URL:    string(part("url")),
		Root:   part("root.json"),
		Client: &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool}}},
	})
	if err != nil {
		return err
	}
	// The parent arms its trap first.
	fmt.Println("ready")
	if _, err := bufio.NewReader(os.Stdin).ReadString('\n'); err != nil {
		return err
	}
	_, err = c.Refresh(context.Background())
	return err
}

// A node is killed with SIGKILL at each request and at each thing that happens
// to its cache directory. What the next start finds is the set before or the
// set after, whole.
func TestKilled(t *testing.T) {
	n := newNetwork(t)
	var request atomic.Pointer[func()] // called at each request
	server := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if f := request.Load(); f != nil {
			(*f)()
		}
		publish.Handler(n.dir).ServeHTTP(w, r)
	}))
	defer server.Close()
	dir := t.TempDir()
	cache := filepath.Join(dir, "cache")
	writeFile(t, filepath.Join(dir, "ca.pem"), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw}))
	writeFile(t, filepath.Join(dir, "url"), []byte(server.URL))
	writeFile(t, filepath.Join(dir, "root.json"), n.root(t))

	type trap struct {
		name string
		set  func(t *testing.T, kill func()) (release func())
	}
	traps := []trap{{"not at all", func(*testing.T, func()) func() { return func() {} }}}
	for k := range int32(6) {
		traps = append(traps, trap{fmt.Sprintf("at request %d", k+1), func(_ *testing.T, kill func()) func() {
			var count atomic.Int32
			f := func() {
				if count.Add(1) == k+1 {
					kill()
				}
			}
			request.Store(&f)
			return func() { request.Store(nil) }
		}})
	}
	for _, event := range []struct {
		name string
		mask uint32
	}{
		{"when the new file is there", syscall.IN_CREATE},
		{"when it is written", syscall.IN_MODIFY},
		{"when it is closed", syscall.IN_CLOSE_WRITE},
		{"when it gets its name", syscall.IN_MOVED_TO},
		{"when the directory is synced", syscall.IN_CLOSE_NOWRITE},
	} {
		for range 2 { // the kill comes a moment later, not always the same
			traps = append(traps, trap{event.name, func(t *testing.T, kill func()) func() { return onEvent(t, cache, event.mask, kill) }})
		}
	}

	version, outcomes := 1, map[string]int{}
	for _, trap := range traps {
		// The set that is there before, and the one that is news.
		before := n.clientAt(t, cache, n.root(t))
		sees(t, before, version)
		n.publish(t, version+1)
		if trap.name == "at request 1" { // a root as well, once: they add up
			n.rotate(t)
		}

		killed := run(t, dir, trap.set)
		after := n.clientAt(t, cache, n.root(t))
		s, err := after.Last()
		if err != nil {
			t.Fatalf("killed %s: %v", trap.name, err)
		}
		outcome := "after"
		switch s.Digest() {
		case digest.Of(config(t, version)):
			outcome = "before"
		case digest.Of(config(t, version+1)):
		default:
			t.Fatalf("killed %s: Last = %s", trap.name, s.Digest())
		}
		if !killed && outcome == "before" {
			t.Fatalf("killed %s: it ended well and nothing is new", trap.name)
		}
		outcomes[outcome]++
		version++
		sees(t, after, version)
		left, err := os.ReadDir(cache)
		if err != nil || len(left) != 1 {
			t.Fatalf("killed %s: left %v, %v", trap.name, left, err)
		}
	}
	if outcomes["before"] < 5 || outcomes["after"] < 1 {
		t.Errorf("the kills did not come at different times: %v", outcomes)
	}
}

// run starts a node, sets the trap, lets the node refresh, and reports whether
// the trap killed it.
func run(t *testing.T, dir string, set func(*testing.T, func()) func()) (killed bool) {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(self)
	cmd.Env = append(os.Environ(), childDir+"="+dir)
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(out)
	if !lines.Scan() || lines.Text() != "ready" {
		t.Fatalf("the node says %q", lines.Text())
	}
	release := set(t, func() { _ = cmd.Process.Kill() }) // it may have ended already
	if _, err := in.Write([]byte("\n")); err != nil {
		t.Fatal(err)
	}
	var said []string
	for lines.Scan() {
		said = append(said, lines.Text())
	}
	err = cmd.Wait()
	release()
	if state := cmd.ProcessState.Sys().(syscall.WaitStatus); state.Signaled() && state.Signal() == syscall.SIGKILL {
		return true
	}
	if err != nil {
		t.Fatalf("the node failed: %v: %s", err, strings.Join(said, "\n"))
	}
	return false
}

// onEvent calls f at the first inotify event of a kind below dir.
func onEvent(t *testing.T, dir string, mask uint32, f func()) (release func()) {
	t.Helper()
	fd, err := syscall.InotifyInit1(syscall.IN_CLOEXEC | syscall.IN_NONBLOCK)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := syscall.InotifyAddWatch(fd, dir, mask); err != nil {
		t.Fatal(err)
	}
	events := os.NewFile(uintptr(fd), "inotify")
	done := make(chan struct{})
	go func() {
		defer close(done)
		if n, err := events.Read(make([]byte, 4096)); err == nil && n > 0 {
			f()
		}
	}()
	return func() {
		_ = events.Close() // ends the read
		<-done
	}
}
