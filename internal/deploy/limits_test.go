package deploy_test

import (
	"errors"
	"log/slog"
	"slices"
	"strings"
	"testing"

	"github.com/resultity/node/internal/deploy"
	. "github.com/resultity/node/internal/deploy/deploytest"
	"github.com/resultity/node/internal/journal"
	"github.com/resultity/node/internal/sandbox"
	"github.com/resultity/node/internal/snapshot"
)

// What the operator does not give away is refused before anything is fetched.
func TestOnlyAllowedDevicesAreGiven(t *testing.T) {
	n := NewNetwork(t)
	for _, c := range []struct {
		allowed []string
		ok      bool
	}{
		{nil, false},
		{[]string{"nvidia.com/gpu=1", "amd.com/gpu=*", "nvidia.com/gpus=*", "nvidia.com/gpu"}, false},
		{[]string{"nvidia.com/gpu=0"}, true},
		{[]string{"amd.com/gpu=0", "nvidia.com/gpu=*"}, true},
	} {
		m := New(t)
		d := m.Deployer()
		d.Allowed = c.allowed
		s := n.Publish(map[string]any{"runtime.devices": []any{"nvidia.com/gpu=0"}})
		_, err := d.Stage(t.Context(), s)
		t.Logf("allowed %q: expected: %s; got: %v", c.allowed, map[bool]string{true: "<nil>", false: deploy.ErrDevice.Error()}[c.ok], err)
		if c.ok && err != nil || !c.ok && (!errors.Is(err, deploy.ErrDevice) || !strings.Contains(err.Error(), "nvidia.com/gpu=0")) {
			t.Errorf("%q: %v", c.allowed, err)
		}
		if calls := m.Calls(); !c.ok && slices.Contains(calls, EnsureImage) {
			t.Errorf("%q: refused after %q", c.allowed, calls)
		}
	}
}

// What has no room in memory is refused before anything is fetched, with numbers; what
// nobody knows, and what can be tried without a download, is not.
func TestMemoryIsLookedAtFirst(t *testing.T) {
	n := NewNetwork(t)
	plain := n.Publish(nil)
	weights := plain.Model().Size()
	gpu := n.Publish(map[string]any{"runtime.devices": []any{"nvidia.com/gpu=0"}, "runtime.settings.gpu_layers": 9})
	states := func(key string, bytes int64, devices ...any) *snapshot.Snapshot {
		return NewNetwork(t).Publish(map[string]any{"runtime.devices": devices, "runtime." + key: bytes})
	}
	for name, c := range map[string]struct {
		s       *snapshot.Snapshot
		memory  int64 // 0: not known
		devices int64 // negative: not known
		here    bool
		of      string // "" for not refused
	}{
		"just enough":                     {plain, weights, -1, false, ""},
		"a byte short":                    {plain, weights - 1, -1, false, "the runtime may have"},
		"no ceiling":                      {plain, 0, -1, false, ""},
		"a byte short and here":           {plain, weights - 1, -1, true, ""},
		"with a device, just enough":      {gpu, weights - 5, 5, false, ""},
		"with a device, a byte short":     {gpu, weights - 5, 4, false, "together"},
		"with a device that nobody knows": {gpu, 1, -1, false, ""},
		"stated, enough":                  {states("memory_bytes", 1<<30), 1 << 30, -1, false, ""},
		"stated, less than its weights":   {states("memory_bytes", 1), 1, -1, false, ""},
		"stated, short":                   {states("memory_bytes", 1<<30), 1<<30 - 1, -1, false, "the runtime may have"},
		"stated, short and here":          {states("memory_bytes", 1<<30), 1<<30 - 1, -1, true, "the runtime may have"},
		"stated of devices, enough":       {states("device_memory_bytes", 1<<30, "nvidia.com/gpu=0"), 1, 1 << 30, false, ""},
		"stated of devices, short":        {states("device_memory_bytes", 1<<30, "nvidia.com/gpu=0"), 1, 1<<30 - 1, false, "the devices"},
		"stated of devices nobody knows":  {states("device_memory_bytes", 1<<30, "nvidia.com/gpu=0"), 1, -1, false, ""},
	} {
		m := New(t)
		d := m.Deployer()
		if c.here {
			if _, err := d.Stage(t.Context(), c.s); err != nil {
				t.Fatal(err)
			}
		}
		m.Calls()
		d.Memory, d.OfDevices = c.memory, func([]string) (int64, bool) { return max(c.devices, 0), c.devices >= 0 }
		_, err := d.Stage(t.Context(), c.s)
		refused, ok := errors.AsType[*deploy.MemoryError](err)
		if calls := m.Calls(); ok && slices.Contains(calls, EnsureImage) {
			t.Errorf("%s: refused after %q", name, calls)
		}
		e, _ := errors.AsType[*deploy.Error](err)
		switch {
		case c.of == "" && err != nil, c.of != "" && !ok:
			t.Errorf("%s: %v", name, err)
		case ok && (!strings.Contains(refused.Of, c.of) || e.Step != deploy.StepMachine || !e.Machine() || refused.Need <= refused.Have):
			t.Errorf("%s: %v", name, err)
		}
	}
}

// A Podman that would not read the agent's policy pulls nothing.
func TestUntriedPodmanIsRefused(t *testing.T) {
	for _, major := range []int{4, 6} {
		m, s := New(t), NewNetwork(t).Publish(nil)
		m.Do(func(m *Locked) { m.PodmanMajor(major) })
		_, err := m.Deployer().Stage(t.Context(), s)
		if step(err) != deploy.StepMachine || !strings.Contains(err.Error(), "Podman") {
			t.Errorf("Podman %d: %v", major, err)
		}
		if calls := m.Calls(); slices.Contains(calls, EnsureImage) {
			t.Errorf("Podman %d: refused after %q", major, calls)
		}
	}
}

// A ceiling counts only if the kernel keeps it, and none is claimed where the
// account cannot set one.
func TestMemoryCeilingIsInForce(t *testing.T) {
	const want = 2 << 30
	s := NewNetwork(t).Publish(nil)
	for _, c := range []struct {
		kernel int64
		ok     bool
	}{{want, true}, {want - 4096, true}, {0, false}, {want + 4096, false}, {want / 2, true}} {
		m := New(t)
		m.Do(func(m *Locked) { m.Memory(c.kernel) })
		d := m.Deployer()
		d.Memory = want
		_, err := bring(t, d, s)
		t.Logf("the kernel has %d of %d bytes: expected: %s; got: %v", c.kernel, int64(want), map[bool]string{true: "<nil>", false: sandbox.ErrNotSealed.Error()}[c.ok], err)
		if c.ok != (err == nil) || !c.ok && !errors.Is(err, sandbox.ErrNotSealed) {
			t.Errorf("kernel's ceiling %d: %v", c.kernel, err)
		}
	}
	m := New(t) // without the controller
	d := m.Deployer()
	d.Memory = want
	var logged events
	d.Log = slog.New(&logged)
	up(t, d, s)
	up(t, d, s)
	said := slices.DeleteFunc(slices.Clone(logged), func(e string) bool { return e != journal.MemoryUnlimited.Name })
	if len(said) != 1 {
		t.Errorf("said %d times that there is no ceiling", len(said))
	}
}
