package ctl

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/resultity/node/internal/control"
	"github.com/resultity/node/internal/gate"
	"github.com/resultity/node/internal/preflight"
)

// offline is what the command knows of a node without its agent.
type offline struct {
	*preflight.Machine
	home string
	run  func(ctx context.Context, name string, args ...string) ([]byte, error)
}

const agentUnit = "resultity-agent.service"

// toolTimeout bounds each program that is asked, and as long again those that it has
// started itself; tests are less patient.
var toolTimeout = 5 * time.Second

// maxTool bounds what one says, in bytes. Some of it is the account's to say.
const maxTool = 1 << 20

var errTool = fmt.Errorf("it says more than %d bytes", maxTool)

// said is what one says, up to the bound. It has no other methods of a buffer, by which
// more would get in.
type said struct{ b bytes.Buffer }

func (s *said) Write(p []byte) (int, error) {
	if s.b.Len()+len(p) > maxTool {
		return 0, errTool
	}
	return s.b.Write(p)
}

func tool(ctx context.Context, name string, args ...string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, toolTimeout)
	defer cancel()
	c := exec.CommandContext(ctx, name, args...)
	var out said
	c.Stdout, c.WaitDelay = &out, toolTimeout
	if err := c.Run(); err != nil {
		return nil, err
	}
	return out.b.Bytes(), nil
}

// offline finds the account whose node is meant: the caller's own where there is
// a configuration for it, else the packaged one.
func (c *command) offline() *offline {
	o := &offline{Machine: &preflight.Machine{Root: "/", Account: Account, UID: -1}, run: tool}
	u, err := user.Lookup(Account)
	if me, meErr := user.Current(); meErr == nil && me.Uid != "0" {
		_, own := os.Stat(filepath.Join(me.HomeDir, ".config/resultity/agent.toml"))
		if own == nil || err != nil {
			u, err = me, nil
		}
	}
	if err != nil {
		return o
	}
	o.Account, o.home = u.Username, u.HomeDir
	if n, err := strconv.Atoi(u.Uid); err == nil {
		o.UID = n
		o.Socket = filepath.Join("/run/user", u.Uid, "resultity-podman/podman.sock")
	}
	o.State = filepath.Join(o.home, ".local/state/resultity/agent")
	return o
}

// lookOffline answers for an agent that does not.
func (c *command) lookOffline(ctx context.Context) control.Status {
	return c.offline().status(ctx)
}

func (o *offline) status(ctx context.Context) control.Status {
	ctx, cancel := context.WithTimeout(ctx, 15*time.Second)
	defer cancel()
	gs := append(o.Gates(ctx), o.agentGate(ctx))
	if o.home != "" {
		gs = append(gs, preflight.Identity(filepath.Join(o.State, "identity")))
	}
	for _, a := range gate.List {
		if !slices.ContainsFunc(gs, func(g gate.Gate) bool { return g.Name == a.Name }) {
			gs = append(gs, gate.Gate{Name: a.Name, State: gate.Unknown, Detail: agentOnly})
		}
	}
	gate.Order(gs)
	return control.Status{Gates: gs}
}

// agentOnly is what is said of gates that nobody else can look at.
const agentOnly = "only a running agent can tell"

var errNoManager = errors.New("does not run")

// systemctl asks the account's service manager. To ask one that does not run
// would log the account in, and so start it, and the agent with it, for as long
// as the question takes; that is [errNoManager].
func (o *offline) systemctl(ctx context.Context, args ...string) ([]byte, error) {
	_, err := os.Stat(filepath.Join(o.Root, "run/user", strconv.Itoa(o.UID), "systemd"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, errNoManager
	}
	args = append([]string{"--user", "--no-pager"}, args...)
	if os.Getuid() != o.UID {
		args = append([]string{"-M", o.Account + "@"}, args...)
	}
	out, err := o.run(ctx, "systemctl", args...)
	if err != nil {
		return nil, fmt.Errorf("does not answer: %w", err)
	}
	return out, nil
}

// exitConfig is how the agent ends over what no restart mends.
const exitConfig = "78"

// agentGate says what has become of the agent's unit, in the agent's last words
// where it has left some.
func (o *offline) agentGate(ctx context.Context) gate.Gate {
	g := gate.Gate{Name: gate.Agent, Remedy: o.Systemctl("start", "resultity-agent")}
	if o.UID < 0 {
		g.Detail = "it has no account to run in"
		return g
	}
	raw, err := o.systemctl(ctx, "show", "-p", "LoadState,ActiveState,SubState,ExecMainStatus,StateChangeTimestamp", "--timestamp=unix", agentUnit)
	if err != nil {
		g.Detail = fmt.Sprintf("the service manager of %s %v", o.Account, err)
		g.Remedy = "sudo systemctl start user@" + strconv.Itoa(o.UID) + ".service"
		return g
	}
	p := properties(raw)
	if s, err := strconv.ParseInt(strings.TrimPrefix(p["StateChangeTimestamp"], "@"), 10, 64); err == nil && s > 0 {
		g.Since = new(time.Unix(s, 0))
	}
	said := o.lastWords(ctx)
	switch {
	case p["LoadState"] == "not-found":
		g.Detail, g.Remedy = agentUnit+" is not installed", "install the package resultity-agent"
	case p["ActiveState"] == "active", p["ActiveState"] == "activating":
		g.Detail, g.Remedy = fmt.Sprintf("it is %s (%s), and its control socket does not answer", p["ActiveState"], p["SubState"]), o.Systemctl("restart", "resultity-agent")
		if p["SubState"] == "auto-restart" {
			g.Detail = "it ends again and again, with exit status " + p["ExecMainStatus"]
		}
	case o.unconfigured():
		install := "install -D -m 0644 /usr/share/doc/resultity-agent/agent.toml "
		if o.Account == Account {
			install = "sudo " + install
		}
		g.Detail, g.Remedy, said = "it has no configuration yet", install+o.config()+", fill in [network.NAME], then "+g.Remedy, ""
	case p["ExecMainStatus"] == exitConfig:
		g.Detail = "it ended with exit status 78, over something that no restart mends"
		g.Remedy = "mend what it names, then " + g.Remedy
	case p["ActiveState"] == "failed":
		g.Detail = "it failed with exit status " + p["ExecMainStatus"]
	default:
		g.Detail, said = "it is stopped", ""
	}
	if said != "" {
		g.Detail += "; its last words: " + said
	}
	return g
}

// config is where the node's configuration has to be.
func (o *offline) config() string {
	if o.Account == Account {
		return "/etc/resultity/agent.toml"
	}
	return filepath.Join(o.home, ".config/resultity/agent.toml")
}

// unconfigured reports whether nobody has written a configuration yet.
func (o *offline) unconfigured() bool {
	_, err := os.Stat(filepath.Join(o.Root, o.config()))
	return errors.Is(err, fs.ErrNotExist)
}

// lastWords is the last message of the agent that is a warning or worse.
func (o *offline) lastWords(ctx context.Context) string {
	raw, err := o.run(ctx, "journalctl", "--no-pager", "-q", "-o", "cat", "-n", "1", "-p", "warning", "_UID="+strconv.Itoa(o.UID), "_SYSTEMD_USER_UNIT="+agentUnit)
	if err != nil {
		return ""
	}
	const most = 1000
	return string(bytes.TrimSpace(raw[:min(len(raw), most)]))
}

func properties(raw []byte) map[string]string {
	p := map[string]string{}
	for l := range strings.Lines(string(raw)) {
		if k, v, ok := strings.Cut(strings.TrimSuffix(l, "\n"), "="); ok {
			p[k] = v
		}
	}
	return p
}
