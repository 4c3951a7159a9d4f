package stack

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os/exec"
	"strings"
	"time"

	"github.com/resultity/node/internal/control"
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
