package systemd

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/resultity/node/internal/journal"
	"github.com/resultity/node/test/host"
)

// This file shows the package real service managers, and the units of this
// repository to systemd. On the hosts this test binary plays all parts: the
// agent that talks to the manager, and the services it talks about.

const part = "SYSTEMD_TEST_PART"

func TestMain(m *testing.M) {
	var err error
	switch os.Getenv(part) {
	case "":
		os.Exit(m.Run())
	case "agent":
		err = within(5*time.Minute, asAgent)
	case "sandboxed agent":
		err = within(5*time.Minute, asSandboxedAgent)
	case "service":
		err = asService(os.Args[1])
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func within(d time.Duration, f func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(context.Background(), d)
	defer cancel()
	return f(ctx)
}

const program = "/usr/local/bin/part"

// asService is a service that can be told what to do.
func asService(what string) error {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	switch what {
	case "serve":
		if err := Ready("serving"); err != nil {
			return err
		}
		return Watchdog(ctx, func() bool { return true })
	case "hang later":
		if err := Ready("hanging"); err != nil {
			return err
		}
	case "fail":
		if err := Status("no luck\nREADY=1"); err != nil {
			return err
		}
		os.Exit(3)
	}
	<-ctx.Done() // "hang"
	return nil
}

// check is one expectation of an agent's part.
type check struct {
	name string
	do   func(ctx context.Context, c *Conn) error
}

// asAgent goes through everything that the agent does with the manager.
func asAgent(ctx context.Context) error {
	c, err := Dial(ctx)
	if err != nil {
		return err
	}
	defer c.Close()
	for _, k := range []check{
		{"the version", func(ctx context.Context, c *Conn) error {
			v, err := c.Version(ctx)
			if err == nil && (v == "" || v[0] < '2' || v[0] > '9') { // 257 and so on
				err = fmt.Errorf("it is %q", v)
			}
			return err
		}},
		{"an unknown unit", unknownUnit},
		{"start and stop", startAndStop},
		{"failures", failures},
		{"a start limit", startLimit},
		{"watch", watch},
		{"the watchdog", watchdog},
		{"Quadlet files", quadletFiles},
		{"an agent that dies while it installs", dyingAgent},
		{"a lost bus", lostBus},
	} {
		begin := time.Now()
		if err := k.do(ctx, c); err != nil {
			return fmt.Errorf("%s: %w", k.name, err)
		}
		fmt.Printf("%s: %v\n", k.name, time.Since(begin).Round(time.Millisecond))
	}
	return nil
}

// unit writes a service of this program into the account's own units.
func unit(ctx context.Context, c *Conn, name, what, settings string) error {
	text := fmt.Sprintf("[Unit]\nStartLimitIntervalSec=60\nStartLimitBurst=3\n[Service]\nType=notify\nExecStart=%s %q\nEnvironment=\"%s=service\"\n%s\n", program, what, part, settings)
	dir := os.Getenv("HOME") + "/.config/systemd/user"
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
		return err
	}
	return c.reload(ctx)
}

// expect compares a unit's state.
func expect(ctx context.Context, c *Conn, name string, ok func(State) bool) error {
	s, err := c.State(ctx, name)
	if err == nil && !ok(s) {
		err = fmt.Errorf("%s is %+v", name, s)
	}
	return err
}

func unknownUnit(ctx context.Context, c *Conn) error {
	if err := expect(ctx, c, "nosuch.service", func(s State) bool { return s.Load == "not-found" && s.Active == "inactive" }); err != nil {
		return err
	}
	if err := c.Start(ctx, "nosuch.service"); err == nil || !strings.Contains(err.Error(), "not found") {
		return fmt.Errorf("start: %w", err)
	}
	if err := c.Remove(ctx, os.Getenv("HOME"), "nosuch.container"); err != nil {
		return err
	}
	return nil
}

func startAndStop(ctx context.Context, c *Conn) error {
	const name = "serve.service"
	if err := unit(ctx, c, name, "serve", "WatchdogSec=10"); err != nil {
		return err
	}
	if err := c.Start(ctx, name); err != nil {
		return err
	}
	first, err := c.State(ctx, name)
	if err != nil {
		return err
	}
	if first.Load != "loaded" || first.Active != "active" || first.Sub != "running" || first.Result != "success" || first.StatusText != "serving" ||
		first.MainPID == 0 || len(first.InvocationID) != 32 || time.Since(first.Since) > time.Minute || !slices.Equal(first.Command, []string{program, "serve"}) {
		return fmt.Errorf("state %+v", first)
	}
	if err := c.Restart(ctx, name); err != nil {
		return err
	}
	if err := expect(ctx, c, name, func(s State) bool {
		return s.Active == "active" && s.MainPID != first.MainPID && s.InvocationID != first.InvocationID && s.NRestarts == 0
	}); err != nil {
		return err
	}
	if err := c.Stop(ctx, name); err != nil {
		return err
	}
	if err := expect(ctx, c, name, func(s State) bool { return s.Active == "inactive" && s.MainPID == 0 }); err != nil {
		return err
	}
	return c.Stop(ctx, name) // once more is no error
}

func failures(ctx context.Context, c *Conn) error {
	for _, tt := range []struct {
		what, settings string
		want           string // pattern for the error
	}{
		{"fail", "", `^start x.service: failed, result exit-code, exit status 3, it said: no luck READY=1$`},
		{"hang", "TimeoutStartSec=300ms", `^start x.service: failed, result timeout`},
	} {
		if err := unit(ctx, c, "x.service", tt.what, tt.settings); err != nil {
			return err
		}
		err := c.Start(ctx, "x.service")
		var job *JobError
		if !errors.As(err, &job) || !regexp.MustCompile(tt.want).MatchString(err.Error()) {
			return fmt.Errorf("%s: got %w, want %s", tt.what, err, tt.want)
		}
		if err := expect(ctx, c, "x.service", func(s State) bool { return s.Active == "failed" }); err != nil {
			return err
		}
		if err := c.ResetFailed(ctx, "x.service"); err != nil {
			return err
		}
		if err := expect(ctx, c, "x.service", func(s State) bool { return s.Active == "inactive" && s.Result == "success" }); err != nil {
			return err
		}
	}
	// Who does not want to wait any more is not held up.
	if err := unit(ctx, c, "x.service", "hang", "TimeoutStartSec=1h"); err != nil {
		return err
	}
	short, cancel := context.WithTimeout(ctx, 200*time.Millisecond)
	defer cancel()
	if err := c.Start(short, "x.service"); !errors.Is(err, context.DeadlineExceeded) {
		return fmt.Errorf("a start that was given up: %w", err)
	}
	return c.Stop(ctx, "x.service")
}

func startLimit(ctx context.Context, c *Conn) error {
	const name = "limit.service"
	if err := unit(ctx, c, name, "fail", ""); err != nil {
		return err
	}
	var last State
	for range 4 {
		err := c.Start(ctx, name)
		var job *JobError
		if !errors.As(err, &job) {
			return fmt.Errorf("got %w", err)
		}
		if last.InvocationID == job.State.InvocationID {
			last = State{} // the manager did not even try
			break
		}
		last = job.State
	}
	if last.InvocationID != "" {
		return errors.New("it was started four times")
	}
	if err := unit(ctx, c, name, "serve", ""); err != nil {
		return err
	}
	if err := c.ResetFailed(ctx, name); err != nil {
		return err
	}
	if err := c.Start(ctx, name); err != nil {
		return err
	}
	return c.Stop(ctx, name)
}

// until waits for changes of a unit until its state is as wanted, and returns
// how many changes there were.
func until(ctx context.Context, c *Conn, name string, ok func(State) bool) (changes int, err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	err = c.Watch(ctx, name, func() {
		changes++
		if s, err := c.State(ctx, name); err == nil && ok(s) {
			cancel()
		}
	})
	return changes, err
}

func watch(ctx context.Context, c *Conn) error {
	const name = "watched.service"
	if err := unit(ctx, c, name, "serve", "Restart=always\nRestartSec=300ms"); err != nil {
		return err
	}
	if err := c.Start(ctx, name); err != nil {
		return err
	}
	s, err := c.State(ctx, name)
	if err != nil {
		return err
	}
	if n, err := until(ctx, c, name, func(s State) bool { return s.Active == "active" }); n != 1 || err != nil {
		return fmt.Errorf("the present state came with call %d: %w", n, err)
	}
	if err := syscall.Kill(s.MainPID, syscall.SIGKILL); err != nil {
		return err
	}
	n, err := until(ctx, c, name, func(s State) bool { return s.NRestarts == 1 && s.StatusText == "serving" })
	if err != nil || n > 50 {
		return fmt.Errorf("%d changes until it was back: %w", n, err)
	}
	return c.Stop(ctx, name)
}

func watchdog(ctx context.Context, c *Conn) error {
	const name = "hangs.service"
	if err := unit(ctx, c, name, "hang later", "WatchdogSec=300ms\nWatchdogSignal=SIGKILL"); err != nil {
		return err
	}
	if err := c.Start(ctx, name); err != nil {
		return err
	}
	if _, err := until(ctx, c, name, func(s State) bool { return s.Active == "failed" }); err != nil {
		return err
	}
	return expect(ctx, c, name, func(s State) bool { return s.Result == "watchdog" })
}

// quadlet returns a Quadlet file for the image that the test has made.
func quadlet(setting string) []byte {
	return fmt.Appendf(nil, "[Quadlet]\nDefaultDependencies=false\n[Container]\nContainerName=q\nImage=localhost/part:1\nPull=never\nNetwork=none\nPodmanArgs=--pids-limit=0\n%s\n[Service]\nTimeoutStopSec=20\n", setting)
}

const quadletFile = "q.container"

func quadletDir() string { return os.Getenv("XDG_RUNTIME_DIR") + "/containers/systemd" }

func quadletFiles(ctx context.Context, c *Conn) error {
	install := func(text []byte, want bool) error {
		changed, err := c.Install(ctx, quadletDir(), quadletFile, text)
		if err == nil && changed != want {
			err = fmt.Errorf("changed is %v", changed)
		}
		return err
	}
	running := func(s State) bool { return s.Active == "active" }
	stopped := func(s State) bool { return s.Active == "inactive" }
	one, two, bad := quadlet("Environment=A=1"), quadlet("Environment=A=2"), quadlet("NoSuchKey=1")

	if err := install(one, true); err != nil {
		return err
	}
	if err := c.Restart(ctx, "q.service"); err != nil {
		return err
	}
	if err := install(one, false); err != nil {
		return fmt.Errorf("the same again: %w", err)
	}
	if err := expect(ctx, c, "q.service", running); err != nil {
		return err
	}
	if err := install(two, true); err != nil {
		return fmt.Errorf("another text: %w", err)
	}
	if err := expect(ctx, c, "q.service", func(s State) bool { return stopped(s) && slices.Contains(s.Command, "A=2") }); err != nil {
		return fmt.Errorf("another text: %w", err)
	}
	if err := c.Start(ctx, "q.service"); err != nil {
		return err
	}
	if _, err := c.Install(ctx, quadletDir(), quadletFile, bad); err == nil || !strings.Contains(err.Error(), "generator") {
		return fmt.Errorf("a key that Podman does not know: %w", err)
	}
	if err := expect(ctx, c, "q.service", func(s State) bool { return s.Load != "loaded" && stopped(s) }); err != nil {
		return fmt.Errorf("a key that Podman does not know: %w", err)
	}
	// The bad file is not mistaken for a good one the next time.
	if _, err := c.Install(ctx, quadletDir(), quadletFile, bad); err == nil {
		return errors.New("a key that Podman does not know was taken the second time")
	}
	if err := install(one, true); err != nil {
		return fmt.Errorf("after a bad one: %w", err)
	}
	if err := c.Start(ctx, "q.service"); err != nil {
		return err
	}
	if err := c.Remove(ctx, quadletDir(), quadletFile); err != nil {
		return err
	}
	if err := expect(ctx, c, "q.service", func(s State) bool { return s.Load == "not-found" && stopped(s) }); err != nil {
		return fmt.Errorf("removed: %w", err)
	}
	return c.Remove(ctx, quadletDir(), quadletFile)
}

// dyingAgent leaves what an agent that was killed at the worst moments leaves.
func dyingAgent(ctx context.Context, c *Conn) error {
	old, text := quadlet("Environment=A=1"), quadlet("Environment=A=2")
	if _, err := c.Install(ctx, quadletDir(), quadletFile, old); err != nil {
		return err
	}
	if err := c.Start(ctx, "q.service"); err != nil {
		return err
	}
	// The file was written, but the manager has not read it. It looks at times
	// of change, which on a tmpfs are those of the last clock tick.
	if err := os.WriteFile(filepath.Join(quadletDir(), quadletFile), text, 0o644); err != nil {
		return err
	}
	if err := expect(ctx, c, "q.service", func(s State) bool { return s.Stale && s.Active == "active" }); err != nil {
		return err
	}
	changed, err := c.Install(ctx, quadletDir(), quadletFile, text)
	if err != nil || !changed {
		return fmt.Errorf("changed is %v, %w", changed, err)
	}
	if err := expect(ctx, c, "q.service", func(s State) bool {
		return !s.Stale && s.Active == "inactive" && slices.Contains(s.Command, "A=2")
	}); err != nil {
		return err
	}
	// The same, with a service that is down: the manager may have forgotten it, and
	// then takes what it finds for what is there.
	if err := os.WriteFile(filepath.Join(quadletDir(), quadletFile), old, 0o644); err != nil {
		return err
	}
	if _, err := c.Install(ctx, quadletDir(), quadletFile, old); err != nil {
		return err
	}
	if err := expect(ctx, c, "q.service", func(s State) bool { return slices.Contains(s.Command, "A=1") }); err != nil {
		return fmt.Errorf("written while it was down: %w", err)
	}
	// The file was removed, but the manager has not noticed.
	if err := c.Start(ctx, "q.service"); err != nil {
		return err
	}
	if err := os.Remove(filepath.Join(quadletDir(), quadletFile)); err != nil {
		return err
	}
	if err := c.Remove(ctx, quadletDir(), quadletFile); err != nil {
		return err
	}
	return expect(ctx, c, "q.service", func(s State) bool { return s.Load == "not-found" && s.Active == "inactive" })
}

func lostBus(ctx context.Context, c *Conn) error {
	watching := make(chan struct{}, 1)
	ended := make(chan error, 1)
	go func() {
		ended <- c.Watch(ctx, "serve.service", func() {
			select {
			case watching <- struct{}{}:
			default:
			}
		})
	}()
	<-watching
	starting := make(chan error, 1)
	if err := unit(ctx, c, "x.service", "hang", "TimeoutStartSec=1h"); err != nil {
		return err
	}
	go func() { starting <- c.Start(ctx, "x.service") }()
	if _, err := until(ctx, c, "x.service", func(s State) bool { return s.Active == "activating" }); err != nil {
		return err
	}
	if out, err := exec.CommandContext(ctx, "systemctl", "--user", "restart", "dbus.service").CombinedOutput(); err != nil {
		return fmt.Errorf("restart the bus: %w: %s", err, out)
	}
	if err := <-ended; !errors.Is(err, ErrLost) {
		return fmt.Errorf("watch ended with %w", err)
	}
	if err := <-starting; !errors.Is(err, ErrLost) {
		return fmt.Errorf("start ended with %w", err)
	}
	return c.Stop(ctx, "x.service") // over a new connection
}

// asSandboxedAgent does the same as the agent's first steps, in the agent's own
// unit, and tries what the unit must keep it from.
func asSandboxedAgent(ctx context.Context) error {
	c, err := Dial(ctx)
	if err != nil {
		return err
	}
	defer c.Close()
	if err := expect(ctx, c, "resultity-agent.service", func(s State) bool { return s.Active == "activating" && s.Load == "loaded" }); err != nil {
		return err
	}
	if _, err := c.Install(ctx, quadletDir(), quadletFile, quadlet("")); err != nil {
		return err
	}
	if err := c.Start(ctx, "q.service"); err != nil {
		return err
	}
	if err := c.Remove(ctx, quadletDir(), quadletFile); err != nil {
		return err
	}
	state, run := os.Getenv("STATE_DIRECTORY"), os.Getenv("RUNTIME_DIRECTORY")
	for dir, want := range map[string]string{state: ".local/state/resultity/agent", run: os.Getenv("XDG_RUNTIME_DIR") + "/resultity"} {
		if !strings.HasSuffix(dir, want) {
			return fmt.Errorf("directory %q, want %s", dir, want)
		}
		if err := os.WriteFile(dir+"/probe", nil, 0o600); err != nil {
			return err
		}
	}
	podman, err := os.Stat(os.Getenv("XDG_RUNTIME_DIR") + "/resultity-podman/podman.sock")
	if err != nil || podman.Mode().Perm() != 0o600 {
		return fmt.Errorf("Podman's socket: %v, %w", podman, err)
	}
	for _, path := range []string{os.Getenv("HOME") + "/probe", "/etc/probe", "/usr/probe", "/proc/sys/kernel/core_pattern"} {
		if err := os.WriteFile(path, nil, 0o600); err == nil {
			return fmt.Errorf("%s can be written", path)
		}
	}
	// The test's own binary may be linked dynamically; this asks the kernel
	// what it would say to any program.
	if err := syscall.Unshare(syscall.CLONE_NEWNS); !errors.Is(err, syscall.EPERM) {
		return fmt.Errorf("unshare: %w", err)
	}
	if _, err := syscall.Socket(syscall.AF_NETLINK, syscall.SOCK_RAW, 0); err == nil {
		return errors.New("a netlink socket can be made")
	}
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return err
	}
	for _, want := range []string{"NoNewPrivs:\t1", "Seccomp:\t2", "CapEff:\t0000000000000000", "CapBnd:\t0000000000000000"} {
		if !bytes.Contains(status, []byte(want)) {
			return fmt.Errorf("no %q in %s", want, status)
		}
	}
	if err := Ready("probed"); err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	return Watchdog(ctx, func() bool { return true })
}

// --- what follows runs outside of the hosts ---

func TestOnHosts(t *testing.T) {
	image := filepath.Join(t.TempDir(), "image.tar")
	makeImage(t, image)
	lab, err := host.Create(t.Context(), host.Options{Name: fmt.Sprintf("systemd-%d", os.Getpid()), Progress: t.Output()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := lab.Close(); err != nil {
			t.Error(err)
		}
	})
	for _, release := range []host.Release{host.Trixie, host.Forky} {
		t.Run(string(release), func(t *testing.T) {
			t.Parallel()
			s := newSite(t, lab, release, image)
			s.accounts()
			for name, f := range map[string]func(*site){"units": (*site).units, "manager": (*site).manager, "sandbox": (*site).sandbox, "others": (*site).others} {
				t.Run(name, func(t *testing.T) { f(&site{t, s.h}) })
			}
		})
	}
}

// makeImage makes an image of one program that waits for its end.
func makeImage(t *testing.T, file string) {
	t.Helper()
	dir := t.TempDir()
	for _, argv := range [][]string{
		{"go", "build", "-trimpath", "-o", dir + "/wait", "./testdata/wait"},
		{"tar", "-C", dir, "-cf", file, "wait"},
	} {
		cmd := exec.CommandContext(t.Context(), argv[0], argv[1:]...)
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%q: %v: %s", argv, err, out)
		}
	}
}

// site is a host with the units of this repository, as a package would install
// them.
type site struct {
	t *testing.T
	h *host.Host
}

func newSite(t *testing.T, lab *host.Lab, release host.Release, image string) *site {
	t.Helper()
	h, err := lab.Up(t.Context(), host.Config{Name: string(release), Release: release})
	if err != nil {
		t.Fatal(err)
	}
	s := &site{t, h}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for from, to := range map[string]string{self: program, image: "/var/tmp/image.tar"} {
		if err := h.CopyTo(from, to); err != nil {
			t.Fatal(err)
		}
	}
	for from, to := range map[string]string{
		"resultity-agent.service":   "/usr/lib/systemd/user/resultity-agent.service",
		"resultity-podman.service":  "/usr/lib/systemd/user/resultity-podman.service",
		"resultity-podman.socket":   "/usr/lib/systemd/user/resultity-podman.socket",
		"sysusers.conf":             "/usr/lib/sysusers.d/resultity.conf",
		"tmpfiles.conf":             "/usr/lib/tmpfiles.d/resultity.conf",
		"user.preset":               "/usr/lib/systemd/user-preset/90-resultity.preset",
		"resultity.catalog":         "/usr/lib/systemd/catalog/resultity.catalog",
		"resultity-network.catalog": "/usr/lib/systemd/catalog/resultity-network.catalog",
	} {
		raw, err := os.ReadFile(filepath.Join("../../units", from))
		if err != nil {
			t.Fatal(err)
		}
		if err := h.WriteFile(to, raw, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	// The unit's own program, for verify, and in its place the test's part.
	if err := h.WriteFile("/usr/bin/resultity-agent", []byte("#!/bin/true\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, page := range []string{"resultity-agent", "podman-system-service"} {
		if err := h.WriteFile("/usr/share/man/man8/"+page+".8", nil, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return s
}

// accounts makes the package's account and an ordinary one, op, with their
// service managers.
func (s *site) accounts() {
	s.root("systemd-sysusers", "resultity.conf")
	s.root("usermod", "--add-subuids", "524288-589823", "--add-subgids", "524288-589823", "resultity")
	s.root("systemd-tmpfiles", "--create", "resultity.conf")
	s.root("systemctl", "--global", "preset", "resultity-agent.service")
	s.root("journalctl", "--update-catalog")
	s.root("useradd", "--create-home", "op")
	s.root("loginctl", "enable-linger", "op")
	for _, name := range []string{"op", "resultity"} {
		s.root("systemctl", "start", "user@"+s.root("id", "-u", name)+".service")
		s.as(name, "podman", "import", "--quiet", "--change", `CMD ["/wait"]`, "/var/tmp/image.tar", "localhost/part:1")
	}
}

func (s *site) root(args ...string) string { s.t.Helper(); return s.run(host.Cmd{Args: args}) }

// as runs a command as a user; leading NAME=value arguments are environment.
func (s *site) as(user string, args ...string) string {
	s.t.Helper()
	n := slices.IndexFunc(args, func(a string) bool { return !strings.Contains(a, "=") })
	return s.run(host.Cmd{User: user, Env: args[:n], Args: args[n:]})
}

func (s *site) run(c host.Cmd) string {
	s.t.Helper()
	out, err := s.try(c)
	if err != nil {
		s.t.Fatalf("%q: %v\n%s", c.Args, err, out)
	}
	return out
}

func (s *site) try(c host.Cmd) (string, error) {
	var out bytes.Buffer
	c.Stdout = &out
	err := s.h.Exec(s.t.Context(), c)
	return strings.TrimSpace(out.String()), err
}

// manager runs the agent's conversation in an ordinary account.
func (s *site) manager() { s.t.Log(s.as("op", part+"=agent", program)) }

// units has systemd judge the files.
func (s *site) units() {
	t := s.t
	for _, unit := range []string{"resultity-agent.service", "resultity-podman.service", "resultity-podman.socket"} {
		var complaints bytes.Buffer
		if err := s.h.Exec(t.Context(), host.Cmd{
			User: "resultity", Args: []string{"systemd-analyze", "--user", "--man=no", "verify", "/usr/lib/systemd/user/" + unit}, Stderr: &complaints,
		}); err != nil || complaints.Len() > 0 {
			t.Errorf("verify %s: %v\n%s", unit, err, &complaints)
		}
	}
	table := s.as("resultity", "systemd-analyze", "--user", "--no-pager", "security", "resultity-agent.service")
	found := regexp.MustCompile(`Overall exposure level for resultity-agent.service: ([0-9.]+)`).FindStringSubmatch(table)
	if found == nil {
		t.Fatalf("no level in %s", table)
	}
	if level, err := strconv.ParseFloat(found[1], 64); err != nil || level > 2.1 {
		t.Errorf("exposure level %s, want at most 2.1\n%s", found[1], table)
	} else {
		t.Logf("exposure level %s", found[1])
	}
	// Every setting of the unit is one that this systemd knows and keeps.
	for _, property := range []string{"WatchdogUSec=20s", "RestartSteps=5", "RestartMaxDelayUSec=30s", "StateDirectory=resultity/agent", "ProtectHome=read-only", "TasksMax=256", "LimitCORE=0", "ProtectSystem=strict", "RestartPreventExitStatus=78"} {
		name, _, _ := strings.Cut(property, "=")
		if got := s.as("resultity", "systemctl", "--user", "show", "--property="+name, "resultity-agent.service"); got != property {
			t.Errorf("got %s, want %s", got, property)
		}
	}
	if got := s.root("journalctl", "--dump-catalog", "7c1f2a2f6f8e4d6a9a4a5d1e0b7c3f03"); !strings.Contains(got, "configuration file") {
		t.Errorf("catalog: %s", got)
	}
	if got := s.root("journalctl", "--dump-catalog", journal.NodeFrameRefused.ID); !strings.Contains(got, "message of a node was refused") {
		t.Errorf("catalog of the network service: %s", got)
	}
}

// sandbox runs the agent's unit in both kinds of account, with this program in
// the agent's place.
func (s *site) sandbox() {
	t := s.t
	const dropIn = "[Service]\nExecStart=\nExecStart=" + program + "\nEnvironment=\"" + part + "=sandboxed agent\"\n"
	if err := s.h.WriteFile("/etc/systemd/user/resultity-agent.service.d/test.conf", []byte(dropIn), 0o644); err != nil {
		t.Fatal(err)
	}
	s.as("op", "mkdir", "-p", "/home/op/.config/resultity")
	s.as("op", "touch", "/home/op/.config/resultity/agent.toml")
	for _, name := range []string{"resultity", "op"} {
		s.as(name, "systemctl", "--user", "daemon-reload")
		if out, err := s.try(host.Cmd{User: name, Args: []string{"systemctl", "--user", "restart", "resultity-agent.service"}}); err != nil {
			log, _ := s.try(host.Cmd{Args: []string{"journalctl", "--no-pager", "-n", "30", "_UID=" + s.root("id", "-u", name)}})
			t.Errorf("%s: %v %s\n%s", name, err, out, log)
			continue
		}
		if got := s.as(name, "systemctl", "--user", "show", "--value", "--property=StatusText", "resultity-agent.service"); got != "probed" {
			t.Errorf("%s: status %q", name, got)
		}
		// Podman's API answers, with the agent's home and the account's storage.
		got := s.as(name, "podman", "--url", "unix:///run/user/"+s.root("id", "-u", name)+"/resultity-podman/podman.sock", "images", "--format", "{{.Repository}}")
		if got != "localhost/part" {
			t.Errorf("%s: images %q", name, got)
		}
		env := s.root("sh", "-c", "tr '\\0' '\\n' < /proc/$(pgrep -u "+name+" -f 'system service')/environ")
		for _, want := range []string{"/.local/state/resultity/agent/podman\n", "XDG_DATA_HOME=", "/.local/share\n", "XDG_CONFIG_HOME=", "/.config\n"} {
			if !strings.Contains(env+"\n", want) {
				t.Errorf("%s: no %q in the environment of Podman's service:\n%s", name, want, env)
			}
		}
	}
}

// others is an account that has nothing to do with us.
func (s *site) others() {
	t := s.t
	s.root("useradd", "--create-home", "bob")
	s.root("loginctl", "enable-linger", "bob")
	uid := s.root("id", "-u", "bob")
	s.root("systemctl", "start", "user@"+uid+".service")
	for _, unit := range []string{"resultity-agent.service", "resultity-podman.socket"} {
		got := s.as("bob", "systemctl", "--user", "show", "--value", "--property=ConditionResult", "--property=ActiveState", unit)
		if !strings.Contains(got, "no") || !strings.Contains(got, "inactive") {
			t.Errorf("%s in another's account: %q", unit, got)
		}
	}
	if _, err := s.h.ReadFile("/run/user/" + uid + "/resultity-podman/podman.sock"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("Podman's socket in another's account: %v", err)
	}
	if got := s.as("bob", "systemctl", "--user", "is-enabled", "resultity-agent.service"); got != "enabled" {
		t.Errorf("the preset made the unit %q", got)
	}
}
