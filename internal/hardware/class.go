package hardware

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"

	"github.com/resultity/node/internal/determinism"
	"github.com/resultity/node/internal/durable"
)

// Computes is what of a machine an engine computes on.
type Computes struct {
	CPU     bool     // also where it has GPUs
	Threads bool     // it chooses by itself how many
	Nodes   []string // device nodes that it is given, as of [DeviceNodes]
}

// ErrUnknown says that something that changes an engine's arithmetic cannot be
// named, so that a machine is in no class.
var ErrUnknown = errors.New("this machine is in no determinism class")

// Class names what an engine computes on, from the kernel's files below root,
// which is "/" but in tests. What cannot be named is an [ErrUnknown]: to leave it out
// would have different machines look alike.
func Class(root string, c Computes) (determinism.Hardware, error) {
	h := determinism.Hardware{Arch: runtime.GOARCH}
	if c.CPU {
		if err := cpus(filepath.Join(root, "proc/cpuinfo"), &h); err != nil {
			return determinism.Hardware{}, fmt.Errorf("%w: CPU: %w", ErrUnknown, err)
		}
		if c.Threads {
			h.CPUs = runtime.NumCPU()
		}
	}
	var drivers []string
	for _, node := range c.Nodes {
		name, driver, err := gpu(root, node)
		switch {
		case err != nil:
			return determinism.Hardware{}, fmt.Errorf("%w: device %s: %w", ErrUnknown, node, err)
		case name != "":
			h.GPUs, drivers = append(h.GPUs, name), append(drivers, driver)
		}
	}
	if !c.CPU && len(h.GPUs) == 0 {
		return determinism.Hardware{}, fmt.Errorf("%w: none of the devices %.200q is a GPU that can be named", ErrUnknown, c.Nodes)
	}
	slices.Sort(h.GPUs)
	slices.Sort(drivers)
	h.Driver = determinism.Text(strings.Join(slices.Compact(drivers), ", "))
	if err := h.Check(); err != nil {
		return determinism.Hardware{}, fmt.Errorf("%w: %w", ErrUnknown, err)
	}
	return h, nil
}

// Bounds of the kernel's files, in bytes.
const (
	maxCPUInfo = 64 << 20 // half of it is of 8192 CPUs; what is longer is no answer
	maxSmall   = 4 << 10  // of each other one
)

// maxKinds bounds the kinds of CPU in one machine: as many as are named in full.
const maxKinds = 8

var (
	errLong  = fmt.Errorf("the kernel says more than %d bytes of the CPUs", maxCPUInfo)
	errKinds = fmt.Errorf("there are more than %d kinds", maxKinds)
)

func cpus(file string, h *determinism.Hardware) error {
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	defer f.Close() // read only: nothing to lose
	return readCPU(f, h)
}

// readCPU reads the models of the CPUs, of which there may be several kinds, and
// the features that all of them have. Nothing of that is the order's in which the
// kernel lists them.
func readCPU(r io.Reader, h *determinism.Hardware) error {
	var models []string
	var features []string
	first, last := true, ""
	of := map[string]string{} // of the CPU that is being read
	end := func() {
		if m := cpuModel(of); m != "" && !slices.Contains(models, m) && len(models) <= maxKinds {
			models = append(models, m)
		}
		flags := of["flags"] + " " + of["features"] // as x86 and the others say it
		if flags != last && strings.TrimSpace(flags) != "" {
			last = flags
			words := strings.Fields(flags)
			have := slices.DeleteFunc(slices.Clone(determinism.Features), func(s string) bool { return !slices.Contains(words, s) })
			if first {
				features, first = have, false
			} else {
				features = slices.DeleteFunc(features, func(s string) bool { return !slices.Contains(have, s) })
			}
		}
		clear(of)
	}
	whole := &io.LimitedReader{R: r, N: maxCPUInfo + 1}
	s := bufio.NewScanner(whole)
	s.Buffer(nil, 64<<10)
	for s.Scan() {
		k, v, ok := strings.Cut(s.Text(), ":")
		if !ok {
			end()
			continue
		}
		if len(of) < 128 {
			of[strings.ToLower(strings.TrimSpace(k))] = strings.TrimSpace(v)
		}
	}
	if err := s.Err(); err != nil {
		return err
	}
	end()
	switch {
	case whole.N == 0:
		return errLong
	case len(models) == 0:
		return errors.New("the kernel names no model")
	case len(models) > maxKinds:
		return errKinds
	}
	slices.Sort(models)
	slices.Sort(features)
	h.CPU, h.Features = determinism.Text(strings.Join(models, ", ")), features
	return nil
}

// cpuModel names a CPU by what the kernel says of it: on x86 its name, which
// hypervisors make up, with the family and model that they do not; on arm64 the
// numbers of its maker and design; elsewhere its name.
func cpuModel(of map[string]string) string {
	join := func(sep string, keys ...string) string {
		var parts []string
		for _, k := range keys {
			if of[k] != "" {
				parts = append(parts, of[k])
			}
		}
		return strings.Join(parts, sep)
	}
	switch {
	case of["cpu family"] != "":
		return fmt.Sprintf("%s (%s %s)", of["model name"], of["vendor_id"], join("-", "cpu family", "model"))
	case of["cpu implementer"] != "":
		return join(" ", "model name", "cpu implementer", "cpu part", "cpu variant")
	}
	return join(" ", "vendor_id", "model name", "cpu", "machine", "uarch", "isa")
}

var (
	nvidiaNode = regexp.MustCompile(`^/dev/nvidia([0-9]{1,4})$`)
	renderNode = regexp.MustCompile(`^/dev/(dri/renderD[0-9]{1,4}|accel/accel[0-9]{1,4})$`)
	unnamed    = regexp.MustCompile(`^/dev/(nvidia-caps/.*|dxg)$`)
)

// gpu names the GPU or accelerator that a device node is of, and its driver; ""
// for a node that is no device of its own, such as one that controls all. Of a part
// of a GPU the kernel does not say how large it is.
func gpu(root, node string) (name, driver string, err error) {
	if m := nvidiaNode.FindStringSubmatch(node); m != nil {
		return nvidiaGPU(root, m[1])
	}
	if m := renderNode.FindStringSubmatch(node); m != nil {
		class := "drm"
		if strings.HasPrefix(m[1], "accel/") {
			class = "accel"
		}
		return pci(root, filepath.Join(root, "sys/class", class, path.Base(m[1]), "device"))
	}
	if unnamed.MatchString(node) {
		return "", "", errors.New("it is a part of a GPU, or a GPU behind another system, and has no name here")
	}
	return "", "", nil
}

// nvidiaGPU reads what the driver's own files say of the GPU with a minor number.
func nvidiaGPU(root, minor string) (name, driver string, err error) {
	dir := filepath.Join(root, "proc/driver/nvidia/gpus")
	gpus, err := os.ReadDir(dir)
	if err != nil {
		return "", "", err
	}
	for _, g := range gpus[:min(len(gpus), 256)] {
		text, err := small(filepath.Join(dir, g.Name(), "information"))
		if err != nil {
			return "", "", err
		}
		if field(text, "Device Minor") != minor {
			continue
		}
		version, err := small(filepath.Join(root, "sys/module/nvidia/version"))
		name, version = determinism.Text(field(text, "Model")), determinism.Text(version)
		switch {
		case err != nil:
			return "", "", err
		case name == "" || version == "":
			return "", "", errors.New("the driver gives no model or no version")
		}
		return name, "nvidia " + version, nil
	}
	return "", "", fmt.Errorf("no GPU of the driver has the minor number %s", minor)
}

// field returns what follows "name:" on a line of text.
func field(text, name string) string {
	for line := range strings.Lines(text) {
		if k, v, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(k) == name {
			return strings.TrimSpace(v)
		}
	}
	return ""
}

// pci names a device by its numbers. A driver that is part of the kernel has its
// version. Those of NVIDIA's have a node of their own.
func pci(root, dir string) (name, driver string, err error) {
	link, err := os.Readlink(filepath.Join(dir, "driver"))
	if err != nil {
		return "", "", err
	}
	if driver = determinism.Text(path.Base(link)); driver == "nvidia" {
		return "", "", nil
	}
	var numbers [3]string
	for i, file := range []string{"vendor", "device", "revision"} {
		text, err := small(filepath.Join(dir, file))
		if err != nil {
			return "", "", err
		}
		if numbers[i] = determinism.Text(text); numbers[i] == "" {
			return "", "", fmt.Errorf("its %s is empty", file)
		}
	}
	version, err := small(filepath.Join(root, "sys/module", path.Base(link), "version"))
	if errors.Is(err, fs.ErrNotExist) {
		version, err = small(filepath.Join(root, "proc/sys/kernel/osrelease"))
	}
	if err != nil {
		return "", "", err
	}
	return fmt.Sprintf("pci %s:%s rev %s", numbers[0], numbers[1], numbers[2]), determinism.Text(driver + " " + version), nil
}

// small reads a file of the kernel's that has a few lines.
func small(name string) (string, error) {
	b, err := durable.ReadFile(filepath.Clean(name), maxSmall)
	return string(b), err
}
