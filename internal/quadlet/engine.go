package quadlet

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"

	"github.com/resultity/node/internal/snapshot"
)

// listen is where every engine listens inside the container.
var listen = netip.MustParseAddrPort("127.0.0.1:8080")

// driver is how one engine is run.
type driver struct {
	health  string   // path that answers 200 once it can work
	command []string // absolute path first
	env     []string // NAME=value
	execTmp bool     // loads code that it has compiled into /tmp
}

// drivers make a driver for a runtime of their engine and its model. All values
// that they print have been checked by [snapshot.Parse].
var drivers = map[snapshot.Engine]func(r *snapshot.Runtime, m *snapshot.Model) driver{
	snapshot.LlamaCpp: llamacpp,
	snapshot.VLLM:     vllm,
}

// drive returns the driver for a configuration's runtime.
func drive(c *snapshot.Config) (driver, error) {
	r := &c.Runtime
	i := slices.IndexFunc(c.Models, func(m snapshot.Model) bool { return m.Name == r.Model })
	of := drivers[r.Engine]
	if i < 0 || c.Models[i].Main() == "" || of == nil {
		return driver{}, fmt.Errorf("no model %.80q or no engine %.80q", r.Model, r.Engine)
	}
	return of(r, &c.Models[i]), nil
}

// Engine returns how the unit of a configuration runs its engine: the command
// inside the container, and its environment beside the image's.
func Engine(c *snapshot.Config) (command, env []string, err error) {
	d, err := drive(c)
	return d.command, d.env, err
}

func llamacpp(r *snapshot.Runtime, m *snapshot.Model) driver {
	s := &r.Settings
	command := []string{
		"/usr/bin/llama-server",
		"-m", modelsDir + "/" + m.Main(), // without it, it starts and serves nothing
		"--alias", r.Model,
		"--host", listen.Addr().String(),
		"--port", fmt.Sprint(listen.Port()), // the default differs between versions
		"-np", strconv.Itoa(s.Slots),
		"-c", strconv.Itoa(s.Slots * s.Context), // for all slots together
		"-ngl", strconv.Itoa(s.GPULayers),
		"--fit", "off", // sizes chosen by the machine would change the answers
		"--cache-ram", "0", // the default grows to 8 GiB
		"--no-cache-prompt", // what others have asked must not show in answers or their timing
		"--threads-http", strconv.Itoa(s.Slots + 4),
		"--offline", "--no-ui", "--no-slots", "--metrics",
		"-lv", "2", // warnings; more is ten lines for each job
	}
	if s.Threads > 0 {
		command = append(command, "-t", strconv.Itoa(s.Threads))
	}
	d := driver{health: "/health", command: command}
	if len(r.Devices) > 0 {
		d.env = []string{"CUDA_CACHE_PATH=/tmp/cuda"}
	}
	return d
}

func vllm(r *snapshot.Runtime, _ *snapshot.Model) driver {
	s := &r.Settings
	return driver{
		health: "/health",
		// Images have vllm in different places, but always on their PATH.
		command: []string{
			"/usr/bin/env", "vllm", "serve", modelsDir,
			"--load-format", "safetensors", // by itself it would take pickles, too, which run code
			"--served-model-name", r.Model,
			"--host", listen.Addr().String(),
			"--port", fmt.Sprint(listen.Port()),
			"--max-model-len", strconv.Itoa(s.Context),
			"--max-num-seqs", strconv.Itoa(s.Slots),
			"--seed", "0",
			"--disable-fastapi-docs",
		},
		env: []string{
			"DO_NOT_TRACK=1", "VLLM_NO_USAGE_STATS=1", "HF_HUB_DISABLE_TELEMETRY=1",
			"HF_HUB_OFFLINE=1", "TRANSFORMERS_OFFLINE=1", "HF_DATASETS_OFFLINE=1",
			// Its processes talk over the one interface that there is.
			"VLLM_HOST_IP=127.0.0.1", "VLLM_LOOPBACK_IP=127.0.0.1", "GLOO_SOCKET_IFNAME=lo", "NCCL_SOCKET_IFNAME=lo",
			// At INFO it may log requests.
			"VLLM_LOGGING_LEVEL=WARNING",
			// All caches; one that cannot be written ends the start.
			"HOME=/tmp", "XDG_CACHE_HOME=/tmp/cache", "XDG_CONFIG_HOME=/tmp/config", "HF_HOME=/tmp/hf",
			"VLLM_CACHE_ROOT=/tmp/vllm", "VLLM_CONFIG_ROOT=/tmp/config/vllm", "VLLM_RPC_BASE_PATH=/tmp",
			"TRITON_CACHE_DIR=/tmp/triton", "TORCHINDUCTOR_CACHE_DIR=/tmp/inductor", "NUMBA_CACHE_DIR=/tmp/numba", "CUDA_CACHE_PATH=/tmp/cuda",
		},
		execTmp: true,
	}
}
