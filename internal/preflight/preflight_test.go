package preflight

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/resultity/node/internal/durable"
	"github.com/resultity/node/internal/gate"
)

// info is what Podman 5.4 says, as far as it is read.
const info = `{"host":{"idMappings":{"uidmap":[{"container_id":0,"host_id":990,"size":1},{"container_id":1,"host_id":524288,"size":65536}]}},
"store":{"graphDriverName":"overlay","graphRoot":"/g","graphRootAllocated":100000000000,"graphRootUsed":1000,"graphStatus":{"Native Overlay Diff":"true"}},"version":{"Version":"5.4.2"}}`

// machine is one where all is well, in a directory.
type machine struct {
	*Machine
	t *testing.T
}

func well(t *testing.T, podman string) *machine {
	m := &machine{&Machine{Root: t.TempDir(), Account: "resultity", UID: 990, State: t.TempDir(), Running: true, Window: 30 * time.Second,
		Synced: func(context.Context) (bool, error) { return true, nil }}, t}
	m.write("var/lib/systemd/linger/resultity", "")
	m.write("etc/subuid", "someone:100000:65536\nresultity:524288:65536\n")
	m.write("etc/subgid", "990:524288:65536\n")
	m.write("usr/bin/podman", "")
	m.write("sys/fs/cgroup/cgroup.controllers", "cpuset cpu io memory pids\n")
	m.write("sys/fs/cgroup/user.slice/user-990.slice/user@990.service/cgroup.controllers", "cpu memory pids\n")
	dir, err := os.MkdirTemp("", "preflight") // short enough for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	m.Socket = filepath.Join(dir, "s")
	if podman == "" {
		return m
	}
	l, err := net.Listen("unix", m.Socket)
	if err != nil {
		t.Fatal(err)
	}
	s := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/v5.0.0/libpod/info" {
			http.NotFound(w, r)
			return
		}
		fmt.Fprint(w, podman)
	})}
	done := make(chan error, 1)
	go func() { done <- s.Serve(l) }()
	t.Cleanup(func() {
		_ = s.Close()
		<-done
	})
	return m
}

func (m *machine) write(name, text string) {
	m.t.Helper()
	name = m.path(name)
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		m.t.Fatal(err)
	}
	if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
		m.t.Fatal(err)
	}
}

func (m *machine) remove(name string) {
	m.t.Helper()
	if err := os.RemoveAll(m.path(name)); err != nil {
		m.t.Fatal(err)
	}
}

func TestGates(t *testing.T) {
	const dir = "sys/fs/cgroup/user.slice/user-990.slice/user@990.service"
	for _, c := range []struct {
		name   string
		podman string
		edit   func(m *machine)
		gate   string // the only one that is not open; "" for none
		state  gate.State
		detail string
		remedy string
	}{
		{name: "all is well"},
		{name: "no account", edit: func(m *machine) { m.UID = -1; m.remove("sys/fs"); m.write("sys/fs/cgroup/cgroup.controllers", "") }, gate: gate.Account, remedy: "systemd-sysusers"},
		{name: "root", edit: func(m *machine) { m.UID = 0 }, gate: gate.Account, detail: "root"},
		{name: "no linger", edit: func(m *machine) { m.remove("var/lib/systemd/linger/resultity") }, gate: gate.Linger, remedy: "sudo loginctl enable-linger resultity"},
		{name: "no name", edit: func(m *machine) { m.Account = ""; m.write("etc/subuid", "990:524288:65536\n") }, gate: gate.Linger, state: gate.Unknown, detail: "uid 990"},
		{name: "too few ids", podman: strings.Replace(info, "65536", "1000", 1), edit: func(m *machine) { m.write("etc/subuid", "resultity:524288:1000\nother:600000:65536\n") },
			gate: gate.SubIDs, detail: "1000 in /etc/subuid", remedy: "usermod --add-subuids 665536-731071 --add-subgids 665536-731071 resultity"},
		{name: "no files of ids, but Podman has some", edit: func(m *machine) { m.remove("etc/subuid"); m.remove("etc/subgid") }},
		{name: "two ranges add up", podman: strings.Replace(info, "65536", "0", 1), edit: func(m *machine) {
			m.write("etc/subuid", "resultity:1:32768\nnonsense\nresultity:x:1\n990:100000:32768\n")
		}},
		{name: "files of ids without end", podman: strings.Replace(info, "65536", "1000", 1), edit: func(m *machine) {
			m.write("etc/subuid", strings.Repeat("#", maxFile)+"\nresultity:524288:65536\n")
		}, gate: gate.SubIDs, state: gate.Unknown, detail: "more than"},
		{name: "cgroup v1", edit: func(m *machine) { m.remove("sys/fs/cgroup") }, gate: gate.Cgroup, detail: "no cgroup v2"},
		{name: "pids not delegated", edit: func(m *machine) { m.write(dir+"/cgroup.controllers", "cpu memory\n") }, gate: gate.Cgroup, detail: "not delegated to the account: pids", remedy: "Delegate="},
		{name: "nothing to delegate", edit: func(m *machine) {
			m.write(dir+"/cgroup.controllers", "")
			m.write("sys/fs/cgroup/cgroup.controllers", "")
		}, gate: gate.Cgroup, state: gate.Unknown, detail: "cpu memory pids"},
		{name: "old Podman", podman: strings.Replace(info, "5.4.2", "4.9.3", 1), gate: gate.Podman, detail: "4.9.3 is too old", remedy: "apt install"},
		{name: "old minor", podman: strings.Replace(info, "5.4.2", "5.2.5", 1), gate: gate.Podman, detail: "too old"},
		{name: "newer Podman", podman: strings.Replace(info, "5.4.2", "6.0.0-rc1", 1), gate: gate.Podman, detail: "newer"},
		{name: "odd Podman", podman: strings.Replace(info, "5.4.2", "five", 1), gate: gate.Podman, state: gate.Unknown},
		{name: "vfs", podman: strings.Replace(info, `"overlay"`, `"vfs"`, 1), gate: gate.Storage, detail: `"vfs"`, remedy: "storage.conf"},
		{name: "fuse", podman: strings.Replace(info, `"true"`, `"false"`, 1)},
		{name: "storage full", podman: strings.Replace(info, `"graphRootUsed":1000`, `"graphRootUsed":99999999999`, 1), gate: gate.Storage, detail: "0 KiB free in /g"},
		{name: "disk too small", edit: func(m *machine) { m.Need = 1 << 60 }, gate: gate.Disk, detail: "want", remedy: "df -h"},
		{name: "clock off", edit: func(m *machine) { m.Offset = new(-31 * time.Second) }, gate: gate.Clock, detail: "31s from the network's clock, at most 30s", remedy: "timedatectl"},
		{name: "clock not kept but right", edit: func(m *machine) { m.Offset = new(time.Second); m.Synced = says(false, nil) }},
		{name: "clock not kept", edit: func(m *machine) { m.Synced = says(false, nil) }, gate: gate.Clock, state: gate.Unknown, detail: "not kept", remedy: "timedatectl"},
		{name: "clock cannot be told", edit: func(m *machine) { m.Synced = says(true, errors.New("no bus")) }, gate: gate.Clock, state: gate.Unknown, detail: "cannot be told"},
	} {
		t.Run(c.name, func(t *testing.T) {
			if c.podman == "" {
				c.podman = info
			}
			m := well(t, c.podman)
			if c.edit != nil {
				c.edit(m)
			}
			for i, g := range m.Gates(t.Context()) {
				if g.Name != gate.List[i].Name {
					t.Errorf("gate %d is %s", i, g.Name)
				}
				if g.Name == c.gate {
					if g.State != c.state || !strings.Contains(g.Detail, c.detail) || !strings.Contains(g.Remedy, c.remedy) {
						t.Errorf("%+v (%v), want %v, %q, %q", g, g.State, c.state, c.detail, c.remedy)
					}
				} else if g.State != gate.Open && c.gate != gate.Account { // without an account nothing else is right
					t.Errorf("%+v is %v", g, g.State)
				}
			}
		})
	}
}

func says(kept bool, err error) func(context.Context) (bool, error) {
	return func(context.Context) (bool, error) { return kept, err }
}

// A Podman that says too much is not half read.
func TestPodmanInfoIsBounded(t *testing.T) {
	for _, more := range []int{0, 1} {
		raw, err := well(t, info+strings.Repeat(" ", maxFile-len(info)+more)).PodmanInfo(t.Context())
		if errors.Is(err, durable.ErrLarge) != (more > 0) || err == nil && len(raw) != maxFile {
			t.Errorf("%d bytes: %d and %v", maxFile+more, len(raw), err)
		}
	}
}

func TestNoPodman(t *testing.T) {
	for _, c := range []struct {
		name  string
		edit  func(m *machine)
		state gate.State
		want  string
	}{
		{"nobody answers the agent", func(*machine) {}, gate.Closed, "does not answer"},
		{"not asked for without an agent", func(m *machine) { m.Running = false }, gate.Unknown, "cannot be asked"},
		{"not installed", func(m *machine) { m.Running = false; m.remove("usr/bin/podman") }, gate.Closed, "not installed"},
	} {
		m := well(t, "")
		c.edit(m)
		gs := m.Gates(t.Context())
		if g := gs[4]; g.Name != gate.Podman || g.State != c.state || !strings.Contains(g.Detail, c.want) {
			t.Errorf("%s: %+v is %v", c.name, g, g.State)
		}
		if g := gs[5]; g.State != gate.Unknown {
			t.Errorf("%s: %+v: nobody looked", c.name, g)
		}
	}
}

func TestIdentityModes(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "identity")
	if g := Identity(dir); g.State != gate.Unknown {
		t.Errorf("%+v", g)
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	key := filepath.Join(dir, "key.json")
	if err := os.WriteFile(key, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if g := Identity(dir); g.State != gate.Open {
		t.Errorf("%+v", g)
	}
	if err := os.Chmod(key, 0o640); err != nil {
		t.Fatal(err)
	}
	if g := Identity(dir); g.State != gate.Closed || g.Remedy != "sudo chmod go= "+key {
		t.Errorf("%+v", g)
	}
}

// What is said to an agent of root's is about another account.
func TestRoot(t *testing.T) {
	m := well(t, "")
	m.Account, m.UID = "root", 0
	if g := m.account(); g.State != gate.Closed || g.Remedy != "sudo systemctl --user -M resultity@ start resultity-agent" {
		t.Errorf("%+v", g)
	}
}
