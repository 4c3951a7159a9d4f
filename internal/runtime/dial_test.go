package runtime

import (
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// anybody is the guard of the tests that are about something else.
func anybody(int, uint32) error { return nil }

func TestForeignListenerGetsNothing(t *testing.T) {
	path := socketPath(t)
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	got := make(chan string, 1)
	go func() {
		conn, err := l.Accept()
		if err != nil {
			got <- err.Error()
			return
		}
		b, _ := io.ReadAll(conn)
		got <- string(b)
	}()
	// The guard of production: this process listens as this very user.
	c := New(path, Container("/proc", "resultity-runtime.service"))
	defer c.Close()
	_, err = c.Run(t.Context(), job(t, false), nil)
	t.Logf("expected: %v; got: %v", ErrForeign, err)
	if !errors.Is(err, ErrForeign) || !strings.Contains(err.Error(), "whom the container does not have") {
		t.Errorf("%v, want %v with the listener's name", err, ErrForeign)
	}
	if s := <-got; s != "" {
		t.Errorf("the listener got %q", s)
	}
}

// What the container could put in the socket's place must not lead the agent to
// another socket.
func TestOnlyTheSocketItselfIsDialled(t *testing.T) {
	path := socketPath(t)
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	link := filepath.Join(filepath.Dir(path), "link")
	file := filepath.Join(filepath.Dir(path), "file")
	if err := errors.Join(os.Symlink(path, link), os.WriteFile(file, nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	for _, p := range []string{link, file} {
		c := New(p, anybody)
		if err := c.Health(t.Context()); !errors.Is(err, ErrForeign) {
			t.Errorf("%s: %v, want %v", p, err, ErrForeign)
		}
		c.Close()
	}
}

func TestAbsentSocketIsNamed(t *testing.T) {
	path := socketPath(t)
	c := New(path, anybody)
	defer c.Close()
	err := c.Health(t.Context())
	if !errors.Is(err, os.ErrNotExist) || !strings.Contains(err.Error(), path) {
		t.Errorf("%v, want %v with the path", err, os.ErrNotExist)
	}
	// One that nobody listens on any more.
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	l.Close()
	if err := c.Health(t.Context()); err == nil || !strings.Contains(err.Error(), path) || errors.Is(err, ErrForeign) {
		t.Errorf("%v, want the path and that nobody listens", err)
	}
}

func TestGuardOfTheContainer(t *testing.T) {
	const service = "resultity-runtime.service"
	base := "0::/user.slice/user-990.slice/user@990.service/app.slice/"
	for _, c := range []struct {
		name, groups string
		uid          uint32
		want         string // "" is fine
	}{
		{"container", base + service + "/libpod-payload-0a1b\n", 65534, ""},
		{"below it", base + service + "/libpod-payload-0a1b/deep\n", 100999, ""},
		{"hybrid", "3:pids:/x\n" + base + service + "/libpod-payload-0a1b\n", 100999, ""},
		{"monitor", base + service + "/runtime\n", 65534, "not the container"},
		{"service itself", base + service + "\n", 65534, "not the container"},
		{"another service", base + "x.service/libpod-payload-0a1b\n", 65534, "x.service"},
		{"name in a name", base + "my-" + service + "/libpod-payload-0a1b\n", 65534, "not the container"},
		{"no hierarchy", "3:pids:/x\n", 65534, "cannot be looked at"},
		{"gone", "", 65534, "cannot be looked at"},
		{"this user", base + service + "/libpod-payload-0a1b\n", uint32(os.Getuid()), "does not have"},
		{"root", base + service + "/libpod-payload-0a1b\n", 0, "does not have"},
	} {
		proc := t.TempDir()
		if c.groups != "" {
			if err := errors.Join(os.Mkdir(filepath.Join(proc, "7"), 0o700), os.WriteFile(filepath.Join(proc, "7/cgroup"), []byte(c.groups), 0o600)); err != nil {
				t.Fatal(err)
			}
		}
		err := Container(proc, service)(7, c.uid)
		if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
			t.Errorf("%s: %v, want %q", c.name, err, c.want)
		}
	}
}

// The guard is asked about who listens, not about who connected last.
func TestGuardSeesTheListener(t *testing.T) {
	var pid int
	var uid uint32
	path := socketPath(t)
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	s := &http.Server{Handler: http.HandlerFunc(func(http.ResponseWriter, *http.Request) {})}
	go func() { _ = s.Serve(l) }()
	defer s.Close()
	c := New(path, func(p int, u uint32) error { pid, uid = p, u; return nil })
	defer c.Close()
	if err := c.Health(t.Context()); err != nil {
		t.Fatal(err)
	}
	if pid != os.Getpid() || int(uid) != os.Getuid() {
		t.Errorf("guard was asked about process %d of user %d, want %d and %d", pid, uid, os.Getpid(), os.Getuid())
	}
}
