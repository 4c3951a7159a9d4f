package deploy_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/resultity/node/internal/bridge/contract"
	"github.com/resultity/node/internal/deploy"
	. "github.com/resultity/node/internal/deploy/deploytest"
	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/journal"
	"github.com/resultity/node/internal/podman"
	"github.com/resultity/node/internal/runtime"
	"github.com/resultity/node/internal/sandbox"
)

// Each way in which the container can differ from the order is found and named.
func TestDriftIsNamed(t *testing.T) {
	s := NewNetwork(t).Publish(nil)
	mount := func(c *podman.ContainerState, place string) *podman.Mount {
		return &c.Mounts[slices.IndexFunc(c.Mounts, func(m podman.Mount) bool { return m.Destination == place })]
	}
	for _, tt := range []struct {
		name, want string
		drift      func(*podman.ContainerState)
	}{
		{"image", "image is sha256:", func(c *podman.ContainerState) { c.ImageDigest = digest.Of([]byte("x")) }},
		{"image id", "image id is 0", func(c *podman.ContainerState) { c.ImageID = "0" }},
		{"privileged", "privileged is true", func(c *podman.ContainerState) { c.Privileged = true }},
		{"root", "read-only root is false", func(c *podman.ContainerState) { c.ReadOnly = false }},
		{"network", "network is host", func(c *podman.ContainerState) { c.Network = "host" }},
		{"user", "user is 0:0", func(c *podman.ContainerState) { c.User = "0:0" }},
		{"command", `it runs ["/bin/sh"`, func(c *podman.ContainerState) { c.Command = append([]string{"/bin/sh"}, c.Command[1:]...) }},
		{"argument", `"--more"]`, func(c *podman.ContainerState) { c.Command = append(slices.Clone(c.Command), "--more") }},
		{"capability", "capabilities is [CAP_NET_RAW]", func(c *podman.ContainerState) { c.Capabilities = []string{"CAP_NET_RAW"} }},
		{"seccomp", "seccomp=unconfined", func(c *podman.ContainerState) { c.Security = append(c.Security, "seccomp=unconfined") }},
		{"new privileges", "security options is []", func(c *podman.ContainerState) { c.Security = nil }},
		{"hosts", "extra hosts is [a:192.0.2.1]", func(c *podman.ContainerState) { c.Hosts = []string{"a:192.0.2.1"} }},
		{"process namespace", `pid namespace is "host"`, func(c *podman.ContainerState) { c.Namespaces["pid"] = "host" }},
		{"user namespace", `user namespace is "keep-id"`, func(c *podman.ContainerState) { c.Namespaces["user"] = "keep-id" }},
		{"ipc namespace", `ipc namespace is "host"`, func(c *podman.ContainerState) { c.Namespaces["ipc"] = "host" }},
		{"device", "device /dev/fuse", func(c *podman.ContainerState) { c.Devices = []string{"/dev/fuse"} }},
		{"variable", "variable LD_PRELOAD, which nobody ordered", func(c *podman.ContainerState) { c.Env = append(c.Env, "LD_PRELOAD=SECRET") }},
		{"variable of the image's", "variable PATH has another value", func(c *podman.ContainerState) {
			c.Env[slices.Index(c.Env, "PATH=/opt/bin")] = "PATH=SECRET"
		}},
		{"no variable", "variable LANG is missing", func(c *podman.ContainerState) {
			c.Env = slices.DeleteFunc(c.Env, func(v string) bool { return v == "LANG=C" })
		}},
		{"volume", "/etc is mounted at /host", func(c *podman.ContainerState) {
			c.Mounts = append(c.Mounts, podman.Mount{Type: "bind", Source: "/etc", Destination: "/host"})
		}},
		{"model elsewhere", "/models has bind /etc", func(c *podman.ContainerState) { mount(c, "/models").Source = "/etc" }},
		{"model writable", "/models has bind", func(c *podman.ContainerState) { mount(c, "/models").Writable = true }},
		{"model executable", "/models has bind", func(c *podman.ContainerState) {
			m := mount(c, "/models")
			m.Options = []string{"nosuid", "nodev", "rbind"}
		}},
		{"bridge shared", "/resultity-bridge has bind", func(c *podman.ContainerState) {
			m := mount(c, "/resultity-bridge")
			m.Options = append(m.Options, "rshared")
		}},
		{"volume in the socket's place", "/run/resultity has volume", func(c *podman.ContainerState) { mount(c, "/run/resultity").Type = "volume" }},
		{"no model", "nothing is mounted at /models", func(c *podman.ContainerState) {
			c.Mounts = slices.DeleteFunc(c.Mounts, func(m podman.Mount) bool { return m.Destination == "/models" })
		}},
		{"model twice", "is mounted at /models, which nobody ordered", func(c *podman.ContainerState) { c.Mounts = append(c.Mounts, *mount(c, "/models")) }},
		{"one more tmpfs", "tmpfs at /run", func(c *podman.ContainerState) { c.Tmpfs["/run"] = []string{"rw"} }},
		{"tmpfs without bounds", "tmpfs at /tmp with ", func(c *podman.ContainerState) {
			c.Tmpfs["/tmp"] = slices.DeleteFunc(c.Tmpfs["/tmp"], func(o string) bool { return strings.HasPrefix(o, "size=") })
		}},
		{"no tmpfs", "no tmpfs at /dev/shm", func(c *podman.ContainerState) { delete(c.Tmpfs, "/dev/shm") }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			m := New(t)
			m.Do(func(m *Locked) { m.Drift(tt.drift) })
			_, err := bring(t, m.Deployer(), s)
			if step(err) != deploy.StepSandbox || !errors.Is(err, sandbox.ErrNotSealed) || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("%v, want %q", err, tt.want)
			}
			if strings.Contains(fmt.Sprint(err), "SECRET") {
				t.Errorf("a variable's value is told: %v", err)
			}
			if strings.Contains(fmt.Sprint(err), "; ") {
				t.Errorf("more than one difference: %v", err)
			}
		})
	}
}

// Devices bring variables along: for those alone that are ordered.
func TestVariablesOfDevices(t *testing.T) {
	for _, devices := range [][]string{{}, {"nvidia.com/gpu=0"}} {
		m, s := New(t), NewNetwork(t).Publish(map[string]any{"runtime.devices": devices})
		m.Do(func(m *Locked) {
			m.Drift(func(c *podman.ContainerState) { c.Env[slices.Index(c.Env, "LANG=C")] = DeviceEnv })
		})
		if _, err := bring(t, m.Deployer(), s); (err == nil) != (len(devices) > 0) {
			t.Errorf("devices %q: %v", devices, err)
		}
		m.Do(func(m *Locked) {
			m.Drift(func(c *podman.ContainerState) { c.Env[slices.Index(c.Env, "LANG=C")] = DeviceEnv + "s" })
		})
		if _, err := bring(t, m.Deployer(), s); !errors.Is(err, sandbox.ErrNotSealed) {
			t.Errorf("another value with devices %q: %v", devices, err)
		}
	}
}

// All differences are in one error, so that nobody mends them one by one.
func TestAllDriftIsNamedAtOnce(t *testing.T) {
	m, s := New(t), NewNetwork(t).Publish(nil)
	m.Do(func(m *Locked) {
		m.Drift(func(c *podman.ContainerState) {
			c.Privileged, c.Network, c.Devices = true, "host", []string{"/dev/fuse"}
		})
	})
	_, err := bring(t, m.Deployer(), s)
	for _, want := range []string{"privileged", "network", "/dev/fuse"} {
		if !strings.Contains(fmt.Sprint(err), want) {
			t.Errorf("%v does not name %s", err, want)
		}
	}
}

// Whoever else listens on the socket is found, and the runtime ended.
func TestForeignSocketIsUnsealed(t *testing.T) {
	m, s := New(t), NewNetwork(t).Publish(nil)
	m.Fail(Record, &Fault{Err: fmt.Errorf("ask: %w", runtime.ErrForeign)})
	_, err := bring(t, m.Deployer(), s)
	if step(err) != deploy.StepSandbox || !errors.Is(err, sandbox.ErrNotSealed) {
		t.Error(err)
	}
	if state, _ := m.Now(); state.Active != "inactive" {
		t.Errorf("it is left %s", state.Active)
	}
}

// events collects the names of those that were logged.
type events []string

func (e *events) Enabled(context.Context, slog.Level) bool { return true }
func (e *events) WithAttrs([]slog.Attr) slog.Handler       { return e }
func (e *events) WithGroup(string) slog.Handler            { return e }
func (e *events) Handle(_ context.Context, r slog.Record) error {
	r.Attrs(func(a slog.Attr) bool {
		if event, ok := a.Value.Any().(*journal.Event); ok {
			*e = append(*e, event.Name)
		}
		return true
	})
	return nil
}

func TestKernelWithoutLandlockIsSaid(t *testing.T) {
	for _, version := range []int{0, 7} {
		m, s := New(t), NewNetwork(t).Publish(nil)
		m.Do(func(m *Locked) { m.Record(func(s *contract.Sandbox) { s.Landlock, s.Hidden = version, false }) })
		var logged events
		d := m.Deployer()
		d.Log = slog.New(&logged)
		up(t, d, s)
		if said := slices.Contains(logged, journal.LandlockMissing.Name); said != (version == 0) {
			t.Errorf("Landlock %d: logged %q", version, logged)
		}
	}
}

// A look at a runtime that goes on finds what has changed, by the rules or not.
func TestInspect(t *testing.T) {
	for name, tt := range map[string]struct {
		change func(*Locked)
		want   string
	}{
		"an interface":   {func(m *Locked) { m.Outside(func(o *sandbox.Outside) { o.Interfaces = []string{"lo", "eth0"} }) }, "eth0"},
		"a capability":   {func(m *Locked) { m.Outside(func(o *sandbox.Outside) { o.Caps = []string{"CapEff"} }) }, "CapEff"},
		"a mount":        {func(m *Locked) { m.Record(func(s *contract.Sandbox) { s.Mounts[0].Point = "/host" }) }, "/host"},
		"a check":        {func(m *Locked) { m.Record(func(s *contract.Sandbox) { s.Checks[0].OK = false }) }, "user"},
		"another cgroup": {func(m *Locked) { m.Outside(func(o *sandbox.Outside) { o.Cgroup = "/" }) }, "cgroup"},
		"another user":   {func(m *Locked) { m.Outside(func(o *sandbox.Outside) { o.UIDs = []int{7, 7, 7, 7} }) }, "uids"},
		"another label":  {func(m *Locked) { m.Record(func(s *contract.Sandbox) { s.Label = "unconfined" }) }, "label"},
		"a device": {func(m *Locked) {
			m.Record(func(s *contract.Sandbox) { s.Devices = []contract.Device{{Path: "/dev/x"}} })
		}, "devices"},
		"another engine's pid": {func(m *Locked) { m.Record(func(s *contract.Sandbox) { s.UID++ }) }, "uid"},
	} {
		t.Run(name, func(t *testing.T) {
			m, s := New(t), NewNetwork(t).Publish(nil)
			d := m.Deployer()
			dep := up(t, d, s)
			was := m.Calls()
			if v, err := d.Inspect(t.Context(), dep); err != nil || !reflect.DeepEqual(v, dep.Views()) {
				t.Fatalf("%+v, %v, want %+v", v, err, dep.Views())
			}
			if calls := m.Calls(); slices.Contains(calls, Container) {
				t.Errorf("Podman was asked: %q after %q", calls, was)
			}
			m.Do(tt.change)
			_, err := d.Inspect(t.Context(), dep)
			if !errors.Is(err, deploy.ErrDrifted) || !errors.Is(err, sandbox.ErrNotSealed) || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("%v, want ErrDrifted with %q", err, tt.want)
			}
		})
	}
	m, s := New(t), NewNetwork(t).Publish(nil)
	d := m.Deployer()
	dep := up(t, d, s)
	m.Fail(Record, &Fault{Err: errBroken})
	if _, err := d.Inspect(t.Context(), dep); !errors.Is(err, errBroken) || errors.Is(err, sandbox.ErrNotSealed) {
		t.Errorf("no answer: %v", err)
	}
	m.Do(func(m *Locked) { m.End("exit-code", 1, "") })
	if _, err := d.Inspect(t.Context(), dep); !errors.Is(err, deploy.ErrEnded) {
		t.Errorf("it ended: %v", err)
	}
}
