package deploy

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/resultity/node/internal/journal"
	"github.com/resultity/node/internal/podman"
	"github.com/resultity/node/internal/quadlet"
	"github.com/resultity/node/internal/snapshot"
)

// ErrDevice says that the snapshot orders a device that the operator does not
// give away.
var ErrDevice = errors.New("the configuration orders a device that runtime.devices in agent.toml does not list")

// mayRun asks, before anything is fetched, whether this machine may run c at
// all, and returns what Podman says of it.
func (d *Deployer) mayRun(ctx context.Context, c *snapshot.Config) (podman.Info, error) {
	for _, name := range c.Runtime.Devices {
		if !d.allows(name) {
			return podman.Info{}, fmt.Errorf("%w: %s; listed are %q", ErrDevice, name, d.Allowed)
		}
	}
	ctx, cancel := context.WithTimeout(ctx, lookTimeout)
	defer cancel()
	info, err := d.Containers.Info(ctx)
	if err != nil {
		return podman.Info{}, err
	}
	return info, podmanVersion(info).Supported()
}

func podmanVersion(info podman.Info) quadlet.PodmanVersion {
	return quadlet.PodmanVersion{Major: info.Version.Major, Minor: info.Version.Minor}
}

// allows says whether the operator's list has a device, or all of its kind.
func (d *Deployer) allows(name string) bool {
	kind, _, _ := strings.Cut(name, "=")
	return slices.Contains(d.Allowed, name) || slices.Contains(d.Allowed, kind+"=*")
}

// ceiling is the runtime's, if this account can set one. That it cannot is said
// once: a memory leak then reaches the rest of the machine.
func (d *Deployer) ceiling(info podman.Info) int64 {
	if slices.Contains(info.CgroupControllers, "memory") {
		return d.Memory
	}
	if d.Memory > 0 && !d.unlimited {
		d.Log.Warn("the runtime's memory has no ceiling: the memory controller is not delegated to this account", journal.MemoryUnlimited.Attr())
		d.unlimited = true
	}
	return 0
}
