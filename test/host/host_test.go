package host

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// peer is the program of testdata/peer, built.
var peer string

func TestMain(m *testing.M) {
	if role := os.Getenv(envCaller); role != "" {
		callers[role]()
		os.Exit(1)
	}
	os.Exit(func() int {
		dir, err := os.MkdirTemp("", "host-test-")
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		defer os.RemoveAll(dir)
		peer = filepath.Join(dir, "peer")
		build := exec.Command("go", "build", "-o", peer, "./testdata/peer")
		build.Env = append(os.Environ(), "CGO_ENABLED=0")
		build.Stderr = os.Stderr
		err = errors.Join(build.Run(), Prepare(context.Background(), os.Stderr, Image{}, Image{Release: Forky}, Image{Role: Network}))
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		return m.Run()
	}())
}

// newLab makes a lab that is gone after the test.
func newLab(t *testing.T, o Options) *Lab {
	t.Helper()
	if o.Name == "" {
		o.Name = fmt.Sprintf("test-%d-%x", os.Getpid(), randomID()[:4])
	}
	o.Progress = t.Output()
	l, err := Create(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	return l
}

// up boots a host with the peer program.
func up(t *testing.T, l *Lab, c Config) *Host {
	t.Helper()
	h, err := l.Up(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	if err := h.CopyTo(peer, "/usr/local/bin/peer"); err != nil {
		t.Fatal(err)
	}
	return h
}

func output(t *testing.T, h *Host, user string, args ...string) string {
	t.Helper()
	out, err := h.OutputAs(t.Context(), user, args...)
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(out))
}

// TestRootless is what a node needs of a host: an account that lingers, its
// user manager, and a container through Quadlet in which there is no network.
func TestRootless(t *testing.T) {
	for _, release := range []Release{Trixie, Forky} {
		t.Run(string(release), func(t *testing.T) {
			t.Parallel()
			l := newLab(t, Options{})
			h := up(t, l, Config{Name: "node", Release: release})
			for _, args := range [][]string{
				{"useradd", "--system", "--add-subids-for-system", "--create-home", "--home-dir", "/var/lib/worker", "--shell", "/usr/sbin/nologin", "worker"},
				{"loginctl", "enable-linger", "worker"},
				{"sh", "-c", `systemctl start "user@$(id -u worker).service"`}, // waits until it has started
			} {
				output(t, h, "", args...)
			}
			if got := output(t, h, "worker", "systemctl", "--user", "is-system-running", "--wait"); got != "running" {
				t.Fatalf("user manager is %s, want running", got)
			}
			if got := output(t, h, "worker", "podman", "info", "--format", `{{.Store.GraphDriverName}} {{index .Store.GraphStatus "Native Overlay Diff"}} {{.Host.Security.Rootless}}`); got != "overlay true true" {
				t.Errorf("podman storage, native, rootless: %s, want overlay true true", got)
			}

			if got := output(t, h, "", "findmnt", "--noheadings", "--output=PROPAGATION", "/"); got != "shared" {
				t.Errorf("mounts are %s, want shared", got)
			}

			for name, text := range map[string]string{
				"/var/lib/worker/image/Containerfile": "FROM scratch\nCOPY peer /peer\nENTRYPOINT [\"/peer\"]\n",
				"/etc/containers/systemd/users/stay.container": `[Quadlet]
DefaultDependencies=false
[Container]
Image=localhost/peer
Pull=never
Network=none
ReadOnly=true
DropCapability=all
NoNewPrivileges=true
User=1000:1000
ContainerName=stay
Exec=stay
`,
			} {
				if err := h.WriteFile(name, []byte(text), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			if err := h.CopyTo(peer, "/var/lib/worker/image/peer"); err != nil {
				t.Fatal(err)
			}
			output(t, h, "worker", "podman", "build", "--quiet", "--tag", "localhost/peer", "/var/lib/worker/image")
			output(t, h, "worker", "systemctl", "--user", "daemon-reload")
			output(t, h, "worker", "systemctl", "--user", "start", "stay.service")
			if got := output(t, h, "worker", "podman", "inspect", "--format", "{{.State.Status}} {{.HostConfig.NetworkMode}}", "stay"); got != "running none" {
				t.Errorf("container: %s, want running none", got)
			}
			// The container prints its interfaces, through conmon into the journal.
			follow(t, h, "interface lo", "journalctl", "--follow", "--lines=all", "--output=cat", "CONTAINER_NAME=stay")
			if got := output(t, h, "", "journalctl", "--output=cat", "CONTAINER_NAME=stay", "--grep=^interface"); got != "interface lo" {
				t.Errorf("interfaces in the container: %q, want lo alone", got)
			}
			pid := output(t, h, "worker", "podman", "inspect", "--format", "{{.State.Pid}}", "stay")
			status, err := h.ReadFile("/proc/" + pid + "/status")
			if err != nil {
				t.Fatal(err)
			}
			for _, want := range []string{"CapEff:\t0000000000000000\n", "NoNewPrivs:\t1\n", "Seccomp:\t2\n"} {
				if !bytes.Contains(status, []byte(want)) {
					t.Errorf("container's status lacks %q:\n%s", want, status)
				}
			}
		})
	}
}

// follow runs a command until it prints the line.
func follow(t *testing.T, h *Host, line string, args ...string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	r, w := io.Pipe()
	done := make(chan error, 1)
	go func() {
		err := h.Exec(ctx, Cmd{Args: args, Stdout: w})
		w.CloseWithError(err)
		done <- err
	}()
	defer func() { cancel(); r.Close(); <-done }()
	for s := bufio.NewScanner(r); s.Scan(); {
		if s.Text() == line {
			return
		}
	}
	t.Fatalf("%q has not printed %q", args, line)
}

// serve runs peer's echo on the host until the test ends.
func serve(t *testing.T, h *Host, address string) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	r, w := io.Pipe()
	done := make(chan struct{})
	go func() {
		defer close(done)
		w.CloseWithError(h.Exec(ctx, Cmd{User: "nobody", Args: []string{"peer", "echo", address}, Stdout: w}))
	}()
	t.Cleanup(func() { cancel(); r.Close(); <-done })
	if line, err := bufio.NewReader(r).ReadString('\n'); err != nil {
		t.Fatalf("echo server printed %q: %v", line, err)
	}
}

func TestNames(t *testing.T) {
	t.Parallel()
	l := newLab(t, Options{Reachable: true})
	a := up(t, l, Config{Name: "a"})
	b := up(t, l, Config{Name: "b"})
	if err := l.AddName(t.Context(), "registry.example", b.Addr()); err != nil {
		t.Fatal(err)
	}
	serve(t, b, ":7000")
	for _, name := range []string{"b", "registry.example"} {
		if got := output(t, a, "nobody", "peer", "dial", name+":7000", "10s"); got != "connected" {
			t.Errorf("a to %s: %s", name, got)
		}
	}
	serve(t, a, ":7000")
	if got := output(t, b, "nobody", "peer", "dial", "a:7000", "10s"); got != "connected" {
		t.Errorf("b to a, which came first: %s", got)
	}

	// The machine and the hosts.
	c, err := net.DialTimeout("tcp", netip.AddrPortFrom(a.Addr(), 7000).String(), 10*time.Second)
	if err != nil {
		t.Fatalf("machine to a: %v", err)
	}
	c.Close()
	ln, err := net.Listen("tcp", netip.AddrPortFrom(l.Addr(), 0).String())
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	_, port, _ := net.SplitHostPort(ln.Addr().String())
	if got := output(t, a, "", "peer", "dial", "machine:"+port, "10s"); got != "connected" {
		t.Errorf("a to the machine: %s", got)
	}

	if err := b.Down(t.Context()); err != nil {
		t.Fatal(err)
	}
	hosts, err := a.ReadFile("/etc/hosts")
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Contains(hosts, []byte("\tb\n")) {
		t.Errorf("a still knows b, which is gone:\n%s", hosts)
	}
}

// TestIsolated checks that labs do not see each other or the machine, nor the
// machine them.
func TestIsolated(t *testing.T) {
	t.Parallel()
	before := links(t)
	l1, l2 := newLab(t, Options{}), newLab(t, Options{})
	a, b := up(t, l1, Config{Name: "a"}), up(t, l2, Config{Name: "a"})
	if a.Addr() == b.Addr() {
		t.Errorf("two hosts with address %s", a.Addr())
	}
	for name := range links(t) {
		// Other tests make links, too.
		if !before[name] && (name == l1.fabric().machineLink() || name == l2.fabric().machineLink()) {
			t.Errorf("the machine has got interface %s", name)
		}
	}
	serve(t, b, ":7000")
	for _, address := range []string{b.Addr().String() + ":7000", l1.Addr().String() + ":22"} {
		out, err := a.Output(t.Context(), "peer", "dial", address, "500ms")
		if err == nil && strings.TrimSpace(string(out)) != "timeout" {
			t.Errorf("a to %s: %s", address, out)
		}
	}
}

func links(t *testing.T) map[string]bool {
	t.Helper()
	ifs, err := net.Interfaces()
	if err != nil {
		t.Fatal(err)
	}
	names := map[string]bool{}
	for _, i := range ifs {
		names[i.Name] = true
	}
	return names
}

// TestLose checks that packets can be lost in one direction alone.
func TestLose(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	l := newLab(t, Options{})
	a, b := up(t, l, Config{Name: "a"}), up(t, l, Config{Name: "b"})
	serve(t, b, ":7000")
	for _, c := range []struct {
		in, out int
		want    string
	}{{100, 0, "timeout"}, {0, 100, "timeout"}, {0, 0, "connected"}} {
		if err := a.Lose(ctx, c.in, c.out); err != nil {
			t.Fatal(err)
		}
		if got := output(t, a, "", "peer", "dial", "b:7000", "3s"); got != c.want {
			t.Errorf("%d %% in and %d %% out: %s, want %s", c.in, c.out, got, c.want)
		}
	}
}

// TestCut checks that a cut is silence: an established connection neither
// ends nor delivers, a new one does not even fail, and both go on after Heal.
func TestCut(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	l := newLab(t, Options{})
	a, b := up(t, l, Config{Name: "a"}), up(t, l, Config{Name: "b"})
	serve(t, b, ":7000")

	in, stdin := io.Pipe()
	stdout, out := io.Pipe()
	talk := make(chan error, 1)
	go func() {
		err := a.Exec(ctx, Cmd{Args: []string{"peer", "talk", "b:7000"}, Stdin: in, Stdout: out})
		out.CloseWithError(err)
		talk <- err
	}()
	lines := make(chan string)
	go func() {
		defer close(lines)
		for s := bufio.NewScanner(stdout); s.Scan(); {
			lines <- s.Text()
		}
	}()
	say := func(s string) {
		t.Helper()
		if _, err := io.WriteString(stdin, s+"\n"); err != nil {
			t.Fatal(err)
		}
	}
	hear := func(want string) {
		t.Helper()
		select {
		case got := <-lines:
			if got != want {
				t.Fatalf("answer %q, want %q", got, want)
			}
		case err := <-talk:
			t.Fatalf("connection ended: %v", err)
		case <-time.After(2 * time.Minute):
			t.Fatalf("no answer, want %q", want)
		}
	}

	say("before")
	hear("before")
	if err := b.Cut(ctx); err != nil {
		t.Fatal(err)
	}
	say("during")
	// Without a neighbour entry the kernel would call b unreachable after
	// three seconds.
	output(t, a, "", "ip", "neighbour", "flush", "all")
	if got := output(t, a, "", "peer", "dial", "b:7000", "4s"); got != "timeout" {
		t.Errorf("new connection while cut: %s, want timeout", got)
	}
	select {
	case got := <-lines:
		t.Fatalf("heard %q through a cut network", got)
	case err := <-talk:
		t.Fatalf("connection noticed the cut: %v", err)
	default:
	}
	if err := b.Heal(ctx); err != nil {
		t.Fatal(err)
	}
	hear("during")
	if got := output(t, a, "", "peer", "dial", "b:7000", "10s"); got != "connected" {
		t.Errorf("new connection after the cut: %s, want connected", got)
	}
	stdin.Close()
	if err := <-talk; err != nil {
		t.Errorf("connection ended: %v", err)
	}
	for range lines { // ends with the connection
	}
}

func TestKillAndReboot(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	l := newLab(t, Options{})
	h := up(t, l, Config{Name: "a"})
	other := up(t, l, Config{Name: "b"})
	boots := map[string]bool{}
	check := func(after string) {
		t.Helper()
		for name, want := range map[string]string{"/etc/kept": "etc", "/var/lib/kept": "var", "/root/kept": "root"} {
			if got, err := h.ReadFile(name); err != nil || string(got) != want {
				t.Errorf("%s: %s: %q, %v", after, name, got, err)
			}
		}
		id := output(t, h, "", "cat", "/proc/sys/kernel/random/boot_id")
		if boots[id] {
			t.Errorf("%s: boot id %s again", after, id)
		}
		boots[id] = true
	}
	for name, text := range map[string]string{"/etc/kept": "etc", "/var/lib/kept": "var", "/root/kept": "root"} {
		if err := h.WriteFile(name, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	check("first boot")

	// What runs there dies with it, whoever started it.
	running := make(chan error, 1)
	r, w := io.Pipe()
	go func() {
		running <- h.Exec(ctx, Cmd{Args: []string{"sh", "-c", "echo started; exec sleep 1000"}, Stdout: w})
	}()
	if _, err := bufio.NewReader(r).ReadString('\n'); err != nil {
		t.Fatal(err)
	}
	if err := h.Kill(ctx); err != nil {
		t.Fatal(err)
	}
	if err := <-running; err == nil {
		t.Error("a command has survived the power cut")
	}
	if _, err := h.Output(ctx, "true"); !errors.Is(err, ErrDown) {
		t.Errorf("command on a dead host: %v, want ErrDown", err)
	}
	if s, err := h.Status(); err != nil || s.PID != 0 {
		t.Errorf("status of a dead host: %+v, %v", s, err)
	}
	if err := h.Kill(ctx); err != nil {
		t.Errorf("second kill: %v", err)
	}
	if err := h.Cut(ctx); err != nil { // holds for the next boot
		t.Fatal(err)
	}
	if err := h.Boot(ctx); err != nil {
		t.Fatal(err)
	}
	check("boot after kill")
	if err := h.Boot(ctx); err == nil {
		t.Error("booted a running host")
	}
	serve(t, other, ":7000")
	if got := output(t, h, "", "peer", "dial", "b:7000", "500ms"); got != "timeout" {
		t.Errorf("booted while cut, then dialled: %s, want timeout", got)
	}
	if err := h.Heal(ctx); err != nil {
		t.Fatal(err)
	}
	if got := output(t, h, "", "peer", "dial", "b:7000", "10s"); got != "connected" {
		t.Errorf("healed, then dialled: %s, want connected", got)
	}

	// In order: units are stopped.
	err := h.WriteFile("/etc/systemd/system/goodbye.service", []byte(`[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=true
ExecStop=touch /var/lib/goodbye
`), 0o644)
	if err != nil {
		t.Fatal(err)
	}
	output(t, h, "", "systemctl", "start", "goodbye")
	if err := h.Reboot(ctx); err != nil {
		t.Fatal(err)
	}
	check("reboot")
	if _, err := h.ReadFile("/var/lib/goodbye"); err != nil {
		t.Errorf("reboot did not stop a unit: %v", err)
	}

	// A host that switches itself off.
	_, _ = h.Output(ctx, "systemctl", "poweroff") // may be killed by what it asks for
	if err := cgroupOf(h.dir).wait(ctx); err != nil {
		t.Fatal(err)
	}
	if err := h.Boot(ctx); err != nil {
		t.Fatal(err)
	}
	check("boot after poweroff")
}

func TestExec(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	l := newLab(t, Options{})
	h := up(t, l, Config{Name: "a"})
	output(t, h, "", "useradd", "--system", "--no-create-home", "--home-dir", "/nonexistent", "--groups", "audio", "--shell", "/usr/sbin/nologin", "tester")

	t.Run("status", func(t *testing.T) {
		for _, tt := range []struct {
			args []string
			want int
		}{
			{[]string{"sh", "-c", "exit 7"}, 7},
			{[]string{"no-such-command"}, 127},
			{[]string{"/etc/passwd"}, 126},
		} {
			_, err := h.Output(ctx, tt.args...)
			exit, ok := errors.AsType[*exec.ExitError](err)
			if !ok || exit.ExitCode() != tt.want {
				t.Errorf("%q: %v, want status %d", tt.args, err, tt.want)
			}
		}
	})
	t.Run("stderr in error", func(t *testing.T) {
		_, err := h.Output(ctx, "sh", "-c", "echo it broke >&2; exit 1")
		if err == nil || !strings.Contains(err.Error(), "it broke") {
			t.Errorf("%v, want what it said", err)
		}
	})
	t.Run("arguments", func(t *testing.T) {
		args := []string{"", "a b", "$HOME", "'\"\\", "-n", "--", "new\nline", "*"}
		got, err := h.OutputAs(ctx, "tester", append([]string{"printf", "%s\\0"}, args...)...)
		if want := strings.Join(args, "\x00") + "\x00"; err != nil || string(got) != want {
			t.Errorf("%q, %v, want %q", got, err, want)
		}
	})
	t.Run("account", func(t *testing.T) {
		if got, want := output(t, h, "tester", "id", "-un"), "tester"; got != want {
			t.Errorf("user %s, want %s", got, want)
		}
		if got, want := output(t, h, "tester", "id", "-Gn"), "tester audio"; got != want {
			t.Errorf("groups %s, want %s", got, want)
		}
		if got, want := output(t, h, "", "id", "-Gn"), "root"; got != want {
			t.Errorf("root's groups %s, want %s", got, want)
		}
		if _, err := h.OutputAs(ctx, "nobody-like-that", "true"); err == nil {
			t.Error("ran a command for an unknown account")
		}
	})
	t.Run("environment", func(t *testing.T) {
		var out bytes.Buffer
		err := h.Exec(ctx, Cmd{User: "tester", Args: []string{"env"}, Env: []string{"MORE=1"}, Stdout: &out})
		if err != nil {
			t.Fatal(err)
		}
		want := "HOME=/nonexistent\nUSER=tester\nLOGNAME=tester\nSHELL=/usr/sbin/nologin\nLANG=C.UTF-8\nPATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin\nMORE=1\n"
		if got := out.String(); !sameLines(got, want) {
			t.Errorf("environment:\n%swant:\n%s", got, want)
		}
	})
	t.Run("pipes", func(t *testing.T) {
		var out, stderr bytes.Buffer
		err := h.Exec(ctx, Cmd{Args: []string{"sh", "-c", "cat; echo two >&2"}, Stdin: strings.NewReader("one\n"), Stdout: &out, Stderr: &stderr})
		if err != nil || out.String() != "one\n" || stderr.String() != "two\n" {
			t.Errorf("%q, %q, %v", out.String(), stderr.String(), err)
		}
	})
	t.Run("cancel", func(t *testing.T) {
		ctx, cancel := context.WithCancel(ctx)
		r, w := io.Pipe()
		done := make(chan error, 1)
		go func() {
			done <- h.Exec(ctx, Cmd{Args: []string{"sh", "-c", "sleep 1000 & echo started; wait"}, Stdout: w})
		}()
		if _, err := bufio.NewReader(r).ReadString('\n'); err != nil {
			t.Fatal(err)
		}
		cancel()
		if err := <-done; err == nil {
			t.Error("no error from a cancelled command")
		}
		ctx, cancel = context.WithTimeout(t.Context(), 2*time.Minute)
		defer cancel()
		if err := (cgroupOf(h.dir) + "/exec").waitEmpty(ctx); err != nil {
			t.Errorf("a child has survived: %v", err)
		}
	})
	t.Run("place", func(t *testing.T) {
		got := output(t, h, "", "sh", "-c", "grep ^0: /proc/self/cgroup; hostname; readlink /proc/self/ns/net /proc/1/ns/net | uniq | wc -l")
		if want := "0::/exec\na\n1"; got != want {
			t.Errorf("%q, want %q", got, want)
		}
	})
}

func sameLines(a, b string) bool {
	lines := func(s string) map[string]bool {
		m := map[string]bool{}
		for l := range strings.Lines(s) {
			m[l] = true
		}
		return m
	}
	return fmt.Sprint(lines(a)) == fmt.Sprint(lines(b)) // maps print sorted
}

func TestFiles(t *testing.T) {
	t.Parallel()
	l := newLab(t, Options{})
	h := up(t, l, Config{Name: "a"})

	// An absolute symbolic link leads to the host's file, not to the machine's.
	trap := t.TempDir()
	output(t, h, "", "ln", "-s", trap, "/etc/trap")
	output(t, h, "", "mkdir", "-p", trap)
	if err := h.WriteFile("/etc/trap/file", []byte("host"), 0o640); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(trap, "file")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("wrote to the machine: %v", err)
	}
	if got := output(t, h, "", "stat", "-c", "%a %U %s", filepath.Join(trap, "file")); got != "640 root 4" {
		t.Errorf("file is %s, want 640 root 4", got)
	}
	if _, err := h.ReadFile("/no/such/file"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("missing file: %v", err)
	}

	src := filepath.Join(t.TempDir(), "src")
	for _, err := range []error{
		os.MkdirAll(filepath.Join(src, "sub", "empty"), 0o700),
		os.WriteFile(filepath.Join(src, "sub", "run"), []byte("#!"), 0o755),
		os.WriteFile(filepath.Join(src, "secret"), []byte("s"), 0o600),
		os.Symlink("sub/run", filepath.Join(src, "link")),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	if err := h.CopyTo(src, "/opt/new/dst"); err != nil {
		t.Fatal(err)
	}
	if err := h.CopyTo(src, "/opt/new/dst"); err != nil { // over itself
		t.Fatal(err)
	}
	want := "d 755 .\nf 600 secret\nl 777 link\nd 700 sub\nd 700 sub/empty\nf 755 sub/run\n"
	srcInfo, err := os.Stat(src)
	if err != nil {
		t.Fatal(err)
	}
	want = strings.Replace(want, "d 755 .", fmt.Sprintf("d %o .", srcInfo.Mode().Perm()), 1)
	list := `find . -printf '%y %m %P\n' | sed 's/ $/ ./'`
	if got := output(t, h, "", "sh", "-c", "cd /opt/new/dst; "+list) + "\n"; !sameLines(got, want) {
		t.Errorf("copied to the host:\n%swant:\n%s", got, want)
	}
	back := filepath.Join(t.TempDir(), "back")
	if err := h.CopyFrom("/opt/new/dst", back); err != nil {
		t.Fatal(err)
	}
	found := exec.Command("sh", "-c", list)
	found.Dir = back
	if got, err := found.Output(); err != nil || !sameLines(string(got), want) {
		t.Errorf("copied back, %v:\n%swant:\n%s", err, got, want)
	}
	if err := h.CopyFrom("/opt/new/dst/sub/run", filepath.Join(back, "one")); err != nil {
		t.Error(err)
	}
	if err := h.CopyFrom("/dev/null", filepath.Join(back, "null")); err == nil {
		t.Error("copied a device")
	}
}

// TestMachineIsSafe checks that what has no namespace is out of a host's reach.
func TestMachineIsSafe(t *testing.T) {
	t.Parallel()
	l := newLab(t, Options{})
	h := up(t, l, Config{Name: "a"})
	for _, script := range []string{ // all change nothing if they succeed
		"read v < /proc/sys/kernel/panic; echo $v > /proc/sys/kernel/panic",
		"read v < /sys/kernel/mm/transparent_hugepage/khugepaged/defrag; echo $v > /sys/kernel/mm/transparent_hugepage/khugepaged/defrag",
		"date --set=now",
		"dd if=/dev/kmsg of=/dev/null count=1 iflag=nonblock",
	} {
		if _, err := h.Output(t.Context(), "sh", "-c", script); err == nil {
			t.Errorf("%q succeeded", script)
		}
	}
	output(t, h, "", "sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward") // this one is its own
	// The same holds for what systemd starts.
	if _, err := h.Output(t.Context(), "systemd-run", "--quiet", "--pipe", "--wait", "date", "--set=now"); err == nil {
		t.Error("a unit has set the clock")
	}
}

// TestNetworkRole checks that its tools are there and that none runs unasked.
func TestNetworkRole(t *testing.T) {
	t.Parallel()
	l := newLab(t, Options{})
	h := up(t, l, Config{Name: "network", Role: Network})
	for _, args := range [][]string{
		{"docker-registry", "--version"}, {"cosign", "version"}, {"skopeo", "--version"}, {"openssl", "version"},
		{"test", "-x", "/usr/sbin/smtpd"},
	} {
		output(t, h, "", args...)
	}
	if got := output(t, h, "", "ss", "--listening", "--tcp", "--no-header"); got != "" {
		t.Errorf("somebody listens:\n%s", got)
	}
}

func TestConfigRefused(t *testing.T) {
	t.Parallel()
	l := newLab(t, Options{})
	for _, c := range []Config{
		{Name: ""}, {Name: "../a"}, {Name: "a/b"}, {Name: "A"}, {Name: "machine"}, {Name: "localhost"},
		{Name: strings.Repeat("a", 41)},
		{Name: "a", Release: "sid"}, {Name: "a", Role: "desktop"},
	} {
		if _, err := l.Up(t.Context(), c); err == nil {
			t.Errorf("%+v: no error", c)
		}
	}
	if _, err := Create(t.Context(), Options{Name: l.Name()}); !errors.Is(err, fs.ErrExist) {
		t.Errorf("second lab of one name: %v, want fs.ErrExist", err)
	}
	if _, err := Create(t.Context(), Options{Name: "../x"}); err == nil {
		t.Error("made a lab elsewhere")
	}
	if _, err := l.Host("a"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("host that does not exist: %v, want fs.ErrNotExist", err)
	}
	if _, err := Open("no-such-lab", nil); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("lab that does not exist: %v, want fs.ErrNotExist", err)
	}
}

// TestFailedUnit checks that a host with a failed unit is not passed off as up.
func TestFailedUnit(t *testing.T) {
	t.Parallel()
	l := newLab(t, Options{})
	h := up(t, l, Config{Name: "a"})
	err := h.WriteFile("/etc/systemd/system/broken.service", []byte("[Service]\nExecStart=sh -c 'echo the reason; exit 3'\n[Install]\nWantedBy=multi-user.target\n"), 0o644)
	if err != nil {
		t.Fatal(err)
	}
	output(t, h, "", "systemctl", "enable", "broken")
	if err := h.Reboot(t.Context()); err == nil || !strings.Contains(err.Error(), "broken.service") || !strings.Contains(err.Error(), "the reason") {
		t.Errorf("booted with a failed unit: %v", err)
	}
}

// BenchmarkBoot is the time from nothing to a system that has started.
func BenchmarkBoot(b *testing.B) {
	l, err := Create(b.Context(), Options{})
	if err != nil {
		b.Fatal(err)
	}
	defer l.Close()
	for b.Loop() {
		h, err := l.Up(b.Context(), Config{Name: "a"})
		if err != nil {
			b.Fatal(err)
		}
		b.StopTimer()
		if err := h.Down(b.Context()); err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
	}
}

func BenchmarkExec(b *testing.B) {
	l, err := Create(b.Context(), Options{})
	if err != nil {
		b.Fatal(err)
	}
	defer l.Close()
	h, err := l.Up(b.Context(), Config{Name: "a"})
	if err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		if _, err := h.Output(b.Context(), "true"); err != nil {
			b.Fatal(err)
		}
	}
}
