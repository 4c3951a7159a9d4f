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
		if c.ok && err != nil || !c.ok && (!errors.Is(err, deploy.ErrDevice) || !strings.Contains(err.Error(), "nvidia.com/gpu=0")) {
			t.Errorf("%q: %v", c.allowed, err)
		}
		if calls := m.Calls(); !c.ok && slices.Contains(calls, EnsureImage) {
			t.Errorf("%q: refused after %q", c.allowed, calls)
		}
	}
}

// A Podman that would not read the agent's policy pulls nothing.
func TestUntriedPodmanIsRefused(t *testing.T) {
	for _, major := range []int{4, 6} {
		m, s := New(t), NewNetwork(t).Publish(nil)
		m.Do(func(m *Locked) { m.PodmanMajor(major) })
		_, err := m.Deployer().Stage(t.Context(), s)
		if step(err) != deploy.StepUnit || !strings.Contains(err.Error(), "Podman") {
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
		if _, err := bring(t, d, s); c.ok != (err == nil) || !c.ok && !errors.Is(err, sandbox.ErrNotSealed) {
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
