package e2e

import (
	"bytes"
	"context"
	"strings"
	"testing"
	"time"

	"github.com/resultity/node/internal/control"
	"github.com/resultity/node/internal/journal"
	"github.com/resultity/node/test/stack"
)

// What nothing in the container may do, it cannot, and the engine still less.
func TestNothingGetsOutOfTheContainer(t *testing.T) {
	eachNode(t, func(t *testing.T, n *stack.Node) {
		out, err := s.Probe(t.Context(), n, strings.TrimPrefix(s.API, "https://"))
		if err != nil {
			t.Fatal(err)
		}
		c := bytes.Count(out, []byte("refused  as the engine"))
		t.Logf("expected: all of at least 30 attempts as the engine refused; got: %d refused", c)
		if c < 30 {
			t.Errorf("%d attempts as the engine:\n%s", c, out)
		}
		t.Logf("%s", out)
	})
}

// What the account's own configuration, or an administrator's, adds to the
// runtime is found and named, wherever it was added, and the runtime does not go
// on. When it is gone, so is the refusal.
func TestDriftIsFound(t *testing.T) {
	const home = "/var/lib/resultity/.config/"
	for _, d := range []struct{ name, file, text, want string }{
		{"a volume of a Quadlet drop-in", "containers/systemd/resultity-runtime.container.d/50-more.conf", "[Container]\nVolume=/etc:/host\n", "/etc:/host"},
		{"a device of a Quadlet drop-in", "containers/systemd/resultity-runtime.container.d/50-more.conf", "[Container]\nAddDevice=/dev/fuse\n", "/dev/fuse"},
		{"another command of a systemd drop-in", "systemd/user/resultity-runtime.service.d/override.conf",
			"[Service]\nExecStart=\nExecStart=/usr/bin/podman run --name=resultity-runtime --sdnotify=container -v /etc:/host x\n", "/etc:/host"},
		{"a command of a systemd drop-in", "systemd/user/resultity-runtime.service.d/override.conf", "[Service]\nExecStartPre=/bin/true\n", "ExecStartPre"},
		{"a program of a systemd drop-in", "systemd/user/resultity-runtime.service.d/override.conf", "[Service]\nEnvironment=CONTAINERS_CONF=/tmp/none\n", "CONTAINERS_CONF"},
		{"a variable of containers.conf", "containers/containers.conf", "[containers]\npids_limit=0\nenv=[\"LD_PRELOAD=/tmp/x\"]\n", "variable LD_PRELOAD, which nobody ordered"},
		{"a mount of mounts.conf", "containers/mounts.conf", "/usr/share/doc:/host\n", "is mounted at /host, which nobody ordered"},
		{"a volume of containers.conf", "containers/containers.conf", "[containers]\npids_limit=0\nvolumes=[\"/etc:/host:ro\"]\n", "is mounted at /host, which nobody ordered"},
	} {
		t.Run(strings.ReplaceAll(d.name, " ", "-"), func(t *testing.T) {
			eachNode(t, func(t *testing.T, n *stack.Node) { drift(t, n, home+d.file, d.text, d.want) })
		})
	}
}

func drift(t *testing.T, n *stack.Node, file, text, want string) {
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	as := func(ctx context.Context, script string) {
		t.Helper()
		if out, err := n.OutputAs(ctx, stack.Account, "sh", "-c", script); err != nil {
			t.Fatalf("%s: %v\n%s", script, err, out)
		}
	}
	since := mark(ctx, t, n)
	as(ctx, "mkdir -p $(dirname "+file+") && printf '%s' '"+strings.ReplaceAll(text, "'", "")+"' > "+file+" && systemctl --user daemon-reload && systemctl --user restart --no-block "+stack.Runtime)
	defer func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 3*time.Minute)
		defer cancel()
		as(ctx, "rm "+file+" && systemctl --user daemon-reload && systemctl --user reset-failed "+stack.Runtime+"; systemctl --user restart resultity-agent.service")
		if err := n.WaitStatus(ctx, "jobs after the drift", func(st *control.Status) bool { return st.Closed() == nil }); err != nil {
			t.Errorf("%v\n%s", err, n.Journal(context.WithoutCancel(ctx), 60))
		}
	}()
	for {
		records, err := n.WaitEvent(ctx, since, journal.SandboxRefused)
		if err != nil {
			t.Fatalf("nothing was refused: %v\n%s", err, n.Journal(context.WithoutCancel(ctx), 60))
		}
		last := records[len(records)-1].Error
		if strings.Contains(last, want) {
			t.Logf("expected: %s: %s; got: %s", journal.SandboxRefused.Name, want, last)
			return
		}
		select {
		case <-ctx.Done():
			t.Fatalf("what was refused was not %q: %s\n%s", want, last, n.Journal(context.WithoutCancel(ctx), 60))
		case <-time.After(200 * time.Millisecond): // the journal is a file on another host
		}
	}
}
