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

// MemoryError says that this machine has not the memory that a configuration needs.
type MemoryError struct {
	Need, Have int64  // bytes
	Of         string // what has it
	Stated     bool   // by the configuration; else [snapshot.Config.Memory] has estimated it
}

func (e *MemoryError) Error() string {
	why := "the size of its weights alone, as the configuration states no memory_bytes"
	if e.Stated {
		why = "which the configuration states"
	}
	return fmt.Sprintf("the model needs at least %s of memory (%s), and %s %s", inGiB(e.Need), why, e.Of, inGiB(e.Have))
}

func inGiB(n int64) string { return fmt.Sprintf("%.2f GiB", float64(n)/(1<<30)) }

// fits compares what a model needs with the memory that there is, whether anybody uses
// it now or not: the runtime before, for one, will have given its own back. Where a
// part of it is not known, that is no reason to refuse; nor is an estimate, where the
// model is here already, since it can be tried.
func (d *Deployer) fits(s *snapshot.Snapshot) error {
	const host, devices = "the runtime may have", "the devices that the configuration orders have"
	c := s.Config()
	need := c.Memory()
	if !need.Stated && d.Models.Have(s.Model()) {
		return nil
	}
	if d.Memory > 0 && need.Machine > d.Memory {
		return &MemoryError{need.Machine, d.Memory, host, need.Stated}
	}
	if need.Devices == 0 && need.Together == 0 {
		return nil
	}
	have, known := d.OfDevices(c.Runtime.Devices)
	switch {
	case !known:
	case need.Devices > have:
		return &MemoryError{need.Devices, have, devices, need.Stated}
	case d.Memory > 0 && need.Together > d.Memory+have:
		return &MemoryError{need.Together, d.Memory + have, host + " and " + devices + " together", need.Stated}
	}
	return nil
}

// mayRun asks, before anything is fetched, whether this machine may run s at
// all, and returns what Podman says of it.
func (d *Deployer) mayRun(ctx context.Context, s *snapshot.Snapshot) (podman.Info, error) {
	c := s.Config()
	for _, name := range c.Runtime.Devices {
		if !d.allows(name) {
			return podman.Info{}, fmt.Errorf("%w: %s; listed are %q", ErrDevice, name, d.Allowed)
		}
	}
	if err := d.fits(s); err != nil {
		return podman.Info{}, err
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
	if d.Memory > 0 && d.unlimited.CompareAndSwap(false, true) {
		d.Log.Warn("the runtime's memory has no ceiling: the memory controller is not delegated to this account", journal.MemoryUnlimited.Attr())
	}
	return 0
}
