package stack

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os/exec"
	"path"
	"strings"
	"time"

	"github.com/resultity/node/internal/control"
	"github.com/resultity/node/internal/journal"
	"github.com/resultity/node/test/host"
)

// Node is a machine with an agent.
type Node struct {
	Machine
	testHost

	Agent  string // the agent's unit
	State  string // the agent's state directory
	prefix string // before the paths of what is installed
	ctl    []string
	podman string // socket of the agent's Podman, below the account's runtime directory
}

// testHost is what only test hosts can do: be cut off, killed, rebooted. It is
// nil in a node of one's own account.
type testHost struct{ *host.Host }

// AddNode boots a host and installs and starts a node on it.
func (s *Stack) AddNode(ctx context.Context, c host.Config) error {
	h, err := s.Lab.Up(ctx, c)
	if err != nil {
		return err
	}
	n := &Node{
		Machine: h, testHost: testHost{h}, Agent: "resultity-agent.service", State: "/var/lib/" + Account + "/.local/state/resultity",
		ctl: []string{"resultityctl"}, podman: "resultity-podman/podman.sock",
	}
	if err := s.install(ctx, n); err != nil {
		return fmt.Errorf("%s: %w", c.Name, err)
	}
	s.Nodes = append(s.Nodes, n)
	return nil
}

func (s *Stack) install(ctx context.Context, n *Node) error {
	if err := n.CopyTo(s.root+"/.", "/"); err != nil {
		return err
	}
	more := ""
	if s.keyInAgent {
		more = "[identity]\nsigner = \"none\"\n"
	}
	if err := s.configure(ctx, n, "/etc/resultity", more); err != nil {
		return err
	}
	// No cgroup controllers reach the test hosts, and crun refuses to start
	// anything with a limit that it cannot set.
	if err := n.WriteFile("/etc/containers/containers.conf.d/no-controllers.conf", []byte("[containers]\npids_limit = 0\n"), 0o644); err != nil {
		return err
	}
	if out, err := n.Output(ctx, "/usr/libexec/resultity/postinstall.sh", "configure"); err != nil {
		return fmt.Errorf("postinstall: %w: %s", err, out)
	}
	return n.UserCtl(ctx, "start", n.Agent)
}

// configure writes what an operator would into dir: the agent's configuration,
// ending with more, and what it names.
func (s *Stack) configure(ctx context.Context, n *Node, dir, more string) error {
	token, err := s.Network(ctx, "token", "create", "--uses", "1", "--account", "demo")
	if err != nil {
		return err
	}
	root, err := s.net.ReadFile(s.net.path(networkDir) + "/repository/metadata/1.root.json")
	if err != nil {
		return err
	}
	toml := fmt.Appendf(nil, "[network.demo]\nurl = \"https://%s\"\nroot = \"%[2]s/root.json\"\nca = \"%[2]s/ca.pem\"\nenrolment_token = \"%[2]s/enrolment-token\"\n%[3]s",
		net.JoinHostPort(s.net.Addr().String(), s.net.networkPort), dir, more)
	return place(n, map[string][]byte{
		dir + "/agent.toml": toml, dir + "/root.json": root, dir + "/ca.pem": s.CA, dir + "/enrolment-token": token,
	})
}

// UserCtl runs systemctl in the account's user manager.
func (n *Node) UserCtl(ctx context.Context, args ...string) error {
	out, err := n.OutputAs(ctx, Account, append([]string{"systemctl", "--user"}, args...)...)
	if err != nil {
		return fmt.Errorf("systemctl --user %s: %w: %s", strings.Join(args, " "), err, bytes.TrimSpace(out))
	}
	return nil
}

// Property returns a property of a unit of the account's.
func (n *Node) Property(ctx context.Context, unit, name string) (string, error) {
	out, err := n.OutputAs(ctx, Account, "systemctl", "--user", "show", "-P", name, unit)
	return strings.TrimSpace(string(out)), err
}

// Ctl runs resultityctl.
func (n *Node) Ctl(ctx context.Context, args ...string) ([]byte, error) {
	return n.Output(ctx, n.CtlArgs(args...)...)
}

// CtlArgs is the command line that [Node.Ctl] runs.
func (n *Node) CtlArgs(args ...string) []string {
	return append(n.ctl[:len(n.ctl):len(n.ctl)], args...)
}

// Podman runs the podman command as the node's account, for looking at it from
// outside; the agent never does. It returns all that was printed.
func (n *Node) Podman(ctx context.Context, args ...string) ([]byte, error) {
	var out bytes.Buffer
	err := n.Exec(ctx, host.Cmd{User: Account, Args: append([]string{"podman"}, args...), Stdout: &out, Stderr: &out})
	return out.Bytes(), err
}

// PodmanSocket is where the agent's Podman, with the agent's policy, listens.
func (n *Node) PodmanSocket(ctx context.Context) (string, error) {
	out, err := n.OutputAs(ctx, Account, "id", "-u")
	return "/run/user/" + strings.TrimSpace(string(out)) + "/" + n.podman, err
}

// Status asks the node's agent.
func (n *Node) Status(ctx context.Context) (*control.Status, error) {
	out, err := n.Ctl(ctx, "status", "--json")
	var exit *exec.ExitError
	if err != nil && !(errors.As(err, &exit) && exit.ExitCode() == 2) { // 2: a gate is closed
		return nil, err
	}
	var s control.Status
	return &s, json.Unmarshal(out, &s)
}

// WaitStatus asks the agent until ok holds.
func (n *Node) WaitStatus(ctx context.Context, what string, ok func(*control.Status) bool) error {
	var last *control.Status
	for {
		s, err := n.Status(ctx)
		if err == nil && ok(s) {
			return nil
		}
		if s != nil {
			last = s
		}
		select {
		case <-ctx.Done():
			why := fmt.Sprint(err)
			if last != nil && last.Closed() != nil {
				why = fmt.Sprintf("gate %q is closed: %s", last.Closed().Name, last.Closed().Detail)
			}
			return fmt.Errorf("%s: waited for %s: %s", n.Name(), what, why)
		case <-time.After(100 * time.Millisecond): // the control socket answers, it does not notify
		}
	}
}

// WaitRoutable waits until every gate of the node is open.
func (n *Node) WaitRoutable(ctx context.Context) error {
	return n.WaitStatus(ctx, "jobs", (*control.Status).GetsJobs)
}

// Journal returns what the account's units have logged, for failures.
func (n *Node) Journal(ctx context.Context, lines int) string {
	uid, err := n.OutputAs(ctx, Account, "id", "-u")
	if err != nil {
		return err.Error()
	}
	out, err := n.Output(ctx, "journalctl", "--no-pager", "-o", "short-precise", "-n", fmt.Sprint(lines), "_SYSTEMD_OWNER_UID="+strings.TrimSpace(string(uid)))
	if err != nil {
		return err.Error()
	}
	return string(out)
}

// Engine returns the process id of the node's engine, as its host counts.
func (n *Node) Engine(ctx context.Context) (string, error) {
	out, err := n.Podman(ctx, "top", "resultity-runtime", "hpid", "comm")
	if err != nil {
		return "", fmt.Errorf("%w: %s", err, out)
	}
	for line := range strings.Lines(string(out)) {
		if f := strings.Fields(line); len(f) == 2 && f[1] == "llama-server" {
			return f[0], nil
		}
	}
	return "", fmt.Errorf("no engine in the container: %s", out)
}

// SignalEngine signals the node's engine, and returns its process id.
func (n *Node) SignalEngine(ctx context.Context, signal string) (string, error) {
	pid, err := n.Engine(ctx)
	if err != nil {
		return "", err
	}
	// The engine's user is a subordinate id of the account's, whose master the
	// account is in there only.
	if out, err := n.Podman(ctx, "unshare", "kill", "-"+signal, pid); err != nil {
		return "", fmt.Errorf("%w: %s", err, out)
	}
	return pid, nil
}

// CheckModels compares every model file of the node with its name.
func (n *Node) CheckModels(ctx context.Context) error {
	out, err := n.Output(ctx, "find", n.State, "-type", "f", "-regextype", "egrep", "-regex", ".*/[0-9a-f]{64}", "-exec", "sha256sum", "{}", ";")
	if err != nil {
		return err
	}
	files := 0
	for line := range strings.Lines(string(out)) {
		sum, name, _ := strings.Cut(strings.TrimSpace(line), "  ")
		if files++; sum != path.Base(name) {
			return fmt.Errorf("%s has the hash %s", name, sum)
		}
	}
	if files == 0 {
		return errors.New("no model file was found to check")
	}
	return nil
}

// Cursor returns the end that the journal of the node's machine has now.
func (n *Node) Cursor(ctx context.Context) (string, error) {
	out, err := n.Output(ctx, "journalctl", "--no-pager", "-n", "0", "--show-cursor", "-q")
	_, c, ok := strings.Cut(strings.TrimSpace(string(out)), "-- cursor: ")
	if err == nil && !ok {
		err = fmt.Errorf("journalctl gave no cursor: %q", out)
	}
	return c, err
}

// Record is what the journal has of an event.
type Record struct {
	Message string `json:"MESSAGE"`
	Error   string `json:"RESULTITY_ERROR"`
}

// WaitEvent waits until the node has logged the event after a cursor.
func (n *Node) WaitEvent(ctx context.Context, cursor string, e *journal.Event) ([]Record, error) {
	return n.waitLogged(ctx, cursor, e.Name, func(Record) bool { return true }, "MESSAGE_ID="+e.ID)
}

// WaitWords waits until anything on the node's machine has logged a message with the
// words after a cursor.
func (n *Node) WaitWords(ctx context.Context, cursor, words string) error {
	_, err := n.waitLogged(ctx, cursor, words, func(r Record) bool { return strings.Contains(r.Message+r.Error, words) })
	return err
}

func (n *Node) waitLogged(ctx context.Context, cursor, what string, ok func(Record) bool, match ...string) ([]Record, error) {
	args := append([]string{"journalctl", "-q", "--no-pager", "-o", "json", "--after-cursor", cursor}, match...)
	for {
		out, err := n.Output(ctx, args...)
		if err == nil {
			var found []Record
			for line := range bytes.Lines(out) {
				var r Record
				if json.Unmarshal(line, &r) == nil && ok(r) { // what has no text is not of ours
					found = append(found, r)
				}
			}
			if len(found) > 0 {
				return found, nil
			}
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("%s logs no %q: %w", n.Name(), what, errors.Join(ctx.Err(), err))
		case <-time.After(100 * time.Millisecond): // the journal is a file on another host
		}
	}
}
