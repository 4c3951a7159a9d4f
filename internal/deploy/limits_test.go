package deploy_test

import (
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/resultity/node/internal/deploy"
	. "github.com/resultity/node/internal/deploy/deploytest"
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
