package stack

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/resultity/node/internal/control"
	"github.com/resultity/node/test/host"
)

// local is the account of whoever runs this program. All that is made there is
// below one directory, or has a name that begins with localUnit; the container,
// its unit and its image are the exceptions. So it can be found again and
// removed by whoever comes later. The user's own node, if there is one, has
// other names, but would share the container's, and is left alone.
type local struct {
	base   string // a root of our own: base/usr/bin, base/etc, …
	run    string // XDG_RUNTIME_DIR
	config string // XDG_CONFIG_HOME
	lock   *os.File
}

const (
	localName = "resultity-demo"
	localUnit = localName + "-"
)

// units is where generated unit files of a user's go. They are gone after a
// logout at the latest.
func (l *local) units() string { return filepath.Join(l.run, "systemd/user") }

// Files in base that closing needs.
const (
	registryNote = "registry" // the registry's address, part of the image's name
	pauseNote    = "idle"     // there when Podman kept no process before
)

// plain is what paths in units, and in mounts of containers, are made of.
var plain = regexp.MustCompile(`^(/[A-Za-z0-9._+@-]+){2,}$`)

// findLocal finds the account's directories, and keeps others of its user's out
// until closed. It changes nothing.
func findLocal() (*local, error) {
	l := &local{run: os.Getenv("XDG_RUNTIME_DIR")}
	if l.run == "" {
		l.run = fmt.Sprintf("/run/user/%d", os.Getuid())
	}
	if _, err := os.Stat(filepath.Join(l.run, "systemd")); err != nil || !plain.MatchString(l.run) {
		return nil, fmt.Errorf("%s is not the runtime directory of a session (XDG_RUNTIME_DIR): log in by console, desktop or ssh, not by su or sudo, or have root run \"loginctl enable-linger %s\"", l.run, os.Getenv("USER"))
	}
	cache, err := os.UserCacheDir()
	if err != nil {
		return nil, err
	}
	if l.config, err = os.UserConfigDir(); err != nil {
		return nil, err
	}
	if l.base = filepath.Join(cache, localName); !plain.MatchString(l.base) {
		l.base = filepath.Join(l.run, localName+"-files")
	}
	if l.lock, err = os.Open(l.run); err != nil {
		return nil, err
	}
	if err := syscall.Flock(int(l.lock.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		return nil, errors.Join(fmt.Errorf("another demo of yours is at work: %w", err), l.lock.Close())
	}
	return l, nil
}

// openLocal makes sure that the account can run a node and does not yet, and
// begins to use it.
func openLocal(ctx context.Context) (_ *local, err error) {
	l, err := findLocal()
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			l.lock.Close()
		}
	}()
	if err := l.check(ctx); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(l.base, 0o700); err != nil {
		return nil, err
	}
	if _, ok := l.pause(); !ok {
		if err := l.WriteFile(filepath.Join(l.base, pauseNote), nil, 0o600); err != nil {
			return nil, err
		}
	}
	// Even asking for its version leaves a process of Podman's.
	if err := l.checkPodman(ctx); err != nil {
		return nil, errors.Join(err, l.remove(ctx))
	}
	return l, nil
}

// CloseLocal removes what an earlier stack has left in this account, if
// anything.
func CloseLocal() error {
	l, err := findLocal()
	if err != nil {
		return err
	}
	return l.close()
}

// check looks for what is missing, and for what must not be there.
func (l *local) check(ctx context.Context) error {
	if _, err := l.Output(ctx, "systemctl", "--user", "show", "-P", "Version"); err != nil {
		return fmt.Errorf("your service manager (systemd --user) does not answer: %w; log in by console, desktop or ssh, and on Debian install dbus-user-session", err)
	}
	if _, err := l.Output(ctx, "journalctl", "-q", "-n", "0", "--show-cursor"); err != nil {
		return fmt.Errorf("you may not read your own journal: %w; have root make it persistent (mkdir /var/log/journal), or join the group systemd-journal", err)
	}
	return l.checkNoNode(ctx)
}

func (l *local) checkNoNode(ctx context.Context) error {
	state := os.Getenv("XDG_STATE_HOME")
	if state == "" {
		state = filepath.Join(os.Getenv("HOME"), ".local/state")
	}
	for _, name := range []string{
		filepath.Join(l.config, "resultity"), filepath.Join(state, "resultity"),
		filepath.Join(l.config, "systemd/user/resultity-agent.service"), filepath.Join(l.config, "systemd/user", Runtime),
		filepath.Join(l.config, "containers/systemd", quadletFile), l.quadlet(),
	} {
		if _, err := os.Lstat(name); !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("this account has a node already, which the demo could disturb: there is %s (%w)", name, errors.Join(err, errHasNode))
		}
	}
	for _, unit := range []string{"resultity-agent.service", Runtime} {
		if out, _ := l.Output(ctx, "systemctl", "--user", "is-active", unit); strings.TrimSpace(string(out)) == "active" { // its exit status says the same
			return fmt.Errorf("%s runs in this account (%w)", unit, errHasNode)
		}
	}
	return nil
}

var errHasNode = errors.New("use another account")

const quadletFile = "resultity-runtime.container"

func (l *local) quadlet() string { return filepath.Join(l.run, "containers/systemd", quadletFile) }

// checkPodman makes sure that rootless containers can run here.
func (l *local) checkPodman(ctx context.Context) error {
	out, err := l.Output(ctx, "podman", "version", "--format", "{{.Client.Version}}")
	if err != nil {
		return fmt.Errorf("podman: %w; install Podman 5.3 or newer", err)
	}
	var major, minor int
	if _, err := fmt.Sscanf(string(out), "%d.%d", &major, &minor); err != nil || major < 5 || major == 5 && minor < 3 {
		return fmt.Errorf("Podman %s is too old: 5.3 or newer is needed", bytes.TrimSpace(out))
	}
	out, err = l.Output(ctx, "podman", "unshare", "cat", "/proc/self/uid_map")
	if err != nil {
		return fmt.Errorf("rootless Podman does not work: %w", err)
	}
	ids := 0
	for line := range strings.Lines(string(out)) {
		if f := strings.Fields(line); len(f) == 3 {
			n, _ := strconv.Atoi(f[2]) // the kernel writes numbers
			ids += n
		}
	}
	if ids < 1<<16 {
		return fmt.Errorf("this account has %d subordinate ids, 65536 are needed: as root, usermod --add-subuids 1000000-1065535 --add-subgids 1000000-1065535 %s (a range that nobody else has in /etc/subuid), then podman system migrate",
			max(0, ids-1), os.Getenv("USER"))
	}
	return nil
}

// pause returns the process that keeps Podman's user namespace. The first
// podman command starts it.
func (l *local) pause() (pid int, ok bool) {
	raw, err := os.ReadFile(filepath.Join(l.run, "libpod/tmp/pause.pid"))
	if err != nil {
		return 0, false
	}
	if pid, err = strconv.Atoi(strings.TrimSpace(string(raw))); err != nil {
		return 0, false
	}
	// The number may be old, and somebody else's by now.
	comm, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid))
	return pid, err == nil && (bytes.HasPrefix(comm, []byte("catatonit")) || bytes.HasPrefix(comm, []byte("podman")))
}

// site is the account as a place for services, on ports that are free.
func (l *local) site() site {
	s := site{
		Machine: l, prefix: l.base, units: l.units(), unit: localUnit,
		ctl: []string{"systemctl", "--user"}, start: []string{"start"}, address: l.Addr().String(),
	}
	for _, p := range []*string{&s.networkPort, &s.metricsPort, &s.registryPort, &s.modelPort} {
		*p = freePort(s.address)
	}
	return s
}

// freePort is 0, which everybody refuses, if there is none.
func freePort(address string) string {
	ln, err := net.Listen("tcp", net.JoinHostPort(address, "0"))
	if err != nil {
		return "0"
	}
	defer ln.Close() // nothing was written
	_, port, _ := net.SplitHostPort(ln.Addr().String())
	return port
}

// localUnits are the units of a package, which a node of one's own has as well.
var localUnits = map[string]string{
	"resultity-agent.service": `
[Unit]
ConditionUser=
[Service]
ExecStart=
ExecStart=%[1]s/usr/bin/resultity-agent --config %[1]s/etc/resultity/agent.toml run
StateDirectory=
ReadWritePaths=%[2]s
RuntimeDirectory=
RuntimeDirectory=` + localName + `
`,
	"resultity-podman.socket": "\n[Unit]\nConditionUser=\n",
	"resultity-podman.service": `
[Service]
Environment=HOME=%[2]s/podman
`,
}

// installLocal installs and starts the node.
func (s *Stack) installLocal(ctx context.Context) error {
	l := s.local
	n := &Node{
		Machine: l, prefix: l.base, Agent: localUnit + "agent.service", State: filepath.Join(l.base, "var/lib/resultity"),
		ctl:    []string{filepath.Join(l.base, "usr/bin/resultityctl"), "--socket", filepath.Join(l.run, localName, control.SocketName)},
		podman: localUnit + "podman/podman.sock",
	}
	if err := l.CopyTo(s.root, l.base); err != nil {
		return err
	}
	if err := l.WriteFile(filepath.Join(l.base, registryNote), []byte(s.Image.Repository()), 0o600); err != nil {
		return err
	}
	if err := os.MkdirAll(n.State, 0o700); err != nil {
		return err
	}
	if err := s.configure(ctx, n, filepath.Join(l.base, "etc/resultity"),
		fmt.Sprintf("[paths]\nstate = %q\npodman = %q\nbridge = %q\n", n.State, filepath.Join(l.run, n.podman), filepath.Join(l.base, "usr/libexec/resultity/resultity-bridge"))); err != nil {
		return err
	}
	for name, more := range localUnits {
		text, err := os.ReadFile(filepath.Join(l.base, "usr/lib/systemd/user", name))
		if err != nil {
			return err
		}
		if strings.Contains(more, "%[") {
			more = fmt.Sprintf(more, l.base, n.State)
		}
		// Names of its own, also where units name one another.
		own := strings.NewReplacer("resultity-agent.", localUnit+"agent.", "resultity-podman", localUnit+"podman")
		if err := l.WriteFile(filepath.Join(l.units(), own.Replace(name)), []byte(own.Replace(string(text))+more), 0o644); err != nil {
			return err
		}
	}
	s.Nodes = append(s.Nodes, n)
	if err := n.UserCtl(ctx, "daemon-reload"); err != nil {
		return err
	}
	return n.UserCtl(ctx, "start", n.Agent)
}

// close removes everything, if there is anything, and lets others in.
func (l *local) close() error {
	// Whatever ended the work must not end this.
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	err := l.remove(ctx)
	return errors.Join(err, l.lock.Close())
}

// remove may be repeated; base goes last, since it says that there is something.
func (l *local) remove(ctx context.Context) error {
	if _, err := os.Stat(l.base); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	var errs []error
	try := func(args ...string) {
		_, err := l.Output(ctx, args...)
		errs = append(errs, err)
	}
	files, err := filepath.Glob(filepath.Join(l.units(), localUnit+"*"))
	errs = append(errs, err)
	stop := []string{"systemctl", "--user", "stop"}
	for _, f := range files {
		stop = append(stop, filepath.Base(f))
	}
	if _, err := os.Stat(l.quadlet()); err == nil {
		stop = append(stop, Runtime)
	}
	if len(stop) > 3 {
		try(stop...)
	}
	if image, err := os.ReadFile(filepath.Join(l.base, registryNote)); err == nil {
		errs = append(errs, l.removeImages(ctx, string(image)))
	}
	if _, err := os.Stat(filepath.Join(l.base, pauseNote)); err == nil {
		if pid, ok := l.pause(); ok {
			errs = append(errs, syscall.Kill(pid, syscall.SIGKILL), os.Remove(filepath.Join(l.run, "libpod/tmp/pause.pid")))
		}
	}
	for _, f := range append(files, l.quadlet()) {
		if err := os.Remove(f); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	try("systemctl", "--user", "daemon-reload")
	try("systemctl", "--user", "reset-failed", localUnit+"*", strings.TrimSuffix(Runtime, ".service")+"*")
	for _, dir := range []string{filepath.Join(l.run, localName), filepath.Join(l.run, localUnit+"podman")} {
		errs = append(errs, os.RemoveAll(dir))
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("removing what the demo made: %w; it is noted in %s, so try again with -down", err, l.base)
	}
	return os.RemoveAll(l.base)
}

// removeImages removes the container, which is gone already unless something
// went wrong, and the images of the demo's registry.
func (l *local) removeImages(ctx context.Context, repository string) error {
	registry, _, _ := strings.Cut(repository, "/")
	if _, err := l.Output(ctx, "podman", "rm", "--force", "--ignore", "--time", "1", strings.TrimSuffix(quadletFile, ".container")); err != nil {
		return err
	}
	out, err := l.Output(ctx, "podman", "images", "--format", "{{.Repository}}@{{.Digest}}")
	if err != nil {
		return err
	}
	for _, ref := range strings.Fields(string(out)) {
		if strings.HasPrefix(ref, registry+"/") {
			if _, err := l.Output(ctx, "podman", "rmi", ref); err != nil {
				return err
			}
		}
	}
	return nil
}

// Name implements [Machine].
func (l *local) Name() string { return "local" }

// Addr implements [Machine].
func (l *local) Addr() netip.Addr { return netip.AddrFrom4([4]byte{127, 0, 0, 1}) }

// Exec implements [Machine]. Every user is this one.
func (l *local) Exec(ctx context.Context, c host.Cmd) error {
	cmd := exec.CommandContext(ctx, c.Args[0], c.Args[1:]...)
	cmd.Env = append(os.Environ(), "XDG_RUNTIME_DIR="+l.run, "DBUS_SESSION_BUS_ADDRESS=unix:path="+l.run+"/bus")
	cmd.Env = append(cmd.Env, c.Env...)
	cmd.Dir = c.Dir
	cmd.Stdin, cmd.Stdout, cmd.Stderr = c.Stdin, c.Stdout, c.Stderr
	var stderr bytes.Buffer
	if c.Stderr == nil {
		cmd.Stderr = &stderr
	}
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("%s: %w %s", filepath.Base(c.Args[0]), err, bytes.TrimSpace(stderr.Bytes()))
	}
	return nil
}

// Output implements [Machine].
func (l *local) Output(ctx context.Context, args ...string) ([]byte, error) {
	return l.OutputAs(ctx, "", args...)
}

// OutputAs implements [Machine].
func (l *local) OutputAs(ctx context.Context, user string, args ...string) ([]byte, error) {
	var out bytes.Buffer
	err := l.Exec(ctx, host.Cmd{User: user, Args: args, Stdout: &out})
	return out.Bytes(), err
}

// ReadFile implements [Machine].
func (l *local) ReadFile(name string) ([]byte, error) { return os.ReadFile(name) }

// WriteFile implements [Machine].
func (l *local) WriteFile(name string, data []byte, mode os.FileMode) error {
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		return err
	}
	if err := os.WriteFile(name, data, mode); err != nil {
		return err
	}
	return os.Chmod(name, mode) // whatever the umask
}

// CopyTo implements [Machine].
func (l *local) CopyTo(src, dst string) error { return copyTree(context.Background(), src, dst) }
