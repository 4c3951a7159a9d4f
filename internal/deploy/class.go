package deploy

import (
	"github.com/resultity/node/internal/determinism"
	"github.com/resultity/node/internal/hardware"
	"github.com/resultity/node/internal/journal"
	"github.com/resultity/node/internal/quadlet"
	"github.com/resultity/node/internal/snapshot"
)

// allLayers is a number of layers that no model has: whoever orders so many on GPUs
// leaves none to the CPU.
const allLayers = 999

// computes says what of the machine the engine computes on.
func computes(r *snapshot.Runtime, nodes []string) hardware.Computes {
	cpu := len(r.Devices) == 0 || r.Engine == snapshot.LlamaCpp && r.Settings.GPULayers < allLayers
	return hardware.Computes{CPU: cpu, Threads: r.Settings.Threads == 0, Nodes: nodes}
}

// class is the determinism class of what c would run as on this machine now.
func (d *Deployer) class(c *snapshot.Config, model *snapshot.Model) (determinism.Class, error) {
	command, env, err := quadlet.Engine(c)
	if err != nil {
		return determinism.Class{}, err
	}
	nodes, err := d.Devices(c.Runtime.Devices)
	if err != nil {
		return determinism.Class{}, err
	}
	h, err := d.Computer(computes(&c.Runtime, nodes))
	if err != nil {
		return determinism.Class{}, err
	}
	return determinism.Class{
		Image: c.Runtime.Image.Digest(), Model: model.Digest(),
		Engine:   determinism.Engine{Name: string(c.Runtime.Engine), Command: command, Env: env},
		Hardware: h,
	}, nil
}

// classify writes the class of a runtime into its deployment. One that has none
// serves all the same: its answers can be compared with nobody's.
func (d *Deployer) classify(dep *Deployment) {
	c, err := d.class(dep.snapshot.Config(), dep.snapshot.Model())
	if err == nil {
		dep.class, err = c.Digest()
	}
	if err != nil {
		d.log(dep.snapshot.Config()).Warn("the runtime is in no determinism class", journal.ClassUnknown.Attr(), "error", err)
		return
	}
	dep.hardware = c.Hardware
}
