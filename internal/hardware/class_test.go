package hardware

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/resultity/node/internal/determinism"
)

// kernel writes files as the kernel has them; "-> x" makes a link.
func kernel(t *testing.T, files map[string]string) string {
	t.Helper()
	root := t.TempDir()
	for name, text := range files {
		name = filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(name), 0o700); err != nil {
			t.Fatal(err)
		}
		var err error
		if target, link := strings.CutPrefix(text, "-> "); link {
			err = os.Symlink(target, name)
		} else {
			err = os.WriteFile(name, []byte(text), 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return root
}

const xeon = "processor\t: 0\nvendor_id\t: GenuineIntel\ncpu family\t: 6\nmodel\t\t: 167\nmodel name\t: Intel(R)  Xeon(R) Processor\ncpu MHz\t\t: 2600.000\nflags\t\t: fpu sse4_2 avx2 avx fma\n\n" +
	"processor\t: 1\nvendor_id\t: GenuineIntel\ncpu family\t: 6\nmodel\t\t: 167\nmodel name\t: Intel(R)  Xeon(R) Processor\ncpu MHz\t\t: 1200.000\nflags\t\t: fpu sse4_2 avx2 avx\n\n"

func cpuinfo(text string) map[string]string { return map[string]string{"proc/cpuinfo": text} }

var gpus = map[string]string{
	"proc/cpuinfo": xeon,
	"proc/driver/nvidia/gpus/0000:01:00.0/information": "Model: \t\t NVIDIA L4\nIRQ:   \t\t 42\nGPU UUID: \t GPU-1\nDevice Minor: \t 0\n",
	"proc/driver/nvidia/gpus/0000:02:00.0/information": "Model: \t\t NVIDIA A100\nDevice Minor: \t 1\n",
	"proc/driver/nvidia/gpus/0000:03:00.0/information": "Model: \t\t NVIDIA L4\nDevice Minor: \t 12\n",
	"sys/module/nvidia/version":                        "550.54.14\n",
	"sys/class/drm/renderD128/device/driver":           "-> ../../bus/pci/drivers/nvidia",
	"sys/class/drm/renderD129/device/driver":           "-> ../../bus/pci/drivers/amdgpu",
	"sys/class/drm/renderD129/device/vendor":           "0x1002\n",
	"sys/class/drm/renderD129/device/device":           "0x744c\n",
	"sys/class/drm/renderD129/device/revision":         "0xc8\n",
	"proc/sys/kernel/osrelease":                        "6.18.1\n",
}

func TestClass(t *testing.T) {
	for name, c := range map[string]struct {
		files    map[string]string
		computes Computes
		want     determinism.Hardware
	}{
		"x86": {cpuinfo(xeon), Computes{CPU: true}, determinism.Hardware{CPU: "Intel(R) Xeon(R) Processor (GenuineIntel 6-167)", Features: []string{"avx", "avx2", "sse4_2"}}},
		"threads of the engine's choice": {cpuinfo(xeon), Computes{CPU: true, Threads: true}, determinism.Hardware{
			CPU: "Intel(R) Xeon(R) Processor (GenuineIntel 6-167)", Features: []string{"avx", "avx2", "sse4_2"}, CPUs: runtime.NumCPU()}},
		"arm64, two kinds": {cpuinfo("processor : 0\nFeatures : fp asimd asimddp\nCPU implementer : 0x41\nCPU variant : 0x1\nCPU part : 0xd05\n\n" +
			"processor : 1\nFeatures : fp asimd asimddp i8mm\nCPU implementer : 0x41\nCPU variant : 0x3\nCPU part : 0xd0a\n"), Computes{CPU: true},
			determinism.Hardware{CPU: "0x41 0xd05 0x1, 0x41 0xd0a 0x3", Features: []string{"asimd", "asimddp"}}},
		"s390x": {cpuinfo("vendor_id       : IBM/S390\nfeatures\t: esan3 vx vxe nnpa \n\ncpu number : 0\n\n"), Computes{CPU: true},
			determinism.Hardware{CPU: "IBM/S390", Features: []string{"nnpa", "vx", "vxe"}}},
		"no flags":    {cpuinfo("model name : x\n"), Computes{CPU: true}, determinism.Hardware{CPU: "x"}},
		"hostile CPU": {cpuinfo("model name : \x1b[2J\"x\\\u202e" + strings.Repeat("y", 5000) + "\n"), Computes{CPU: true}, determinism.Hardware{CPU: "[2J x " + strings.Repeat("y", 122)}},
		"one GPU":     {gpus, Computes{Nodes: []string{"/dev/nvidia0", "/dev/nvidiactl", "/dev/nvidia-uvm", "/dev/dri/renderD128", "/run/daemon.sock"}}, determinism.Hardware{GPUs: []string{"NVIDIA L4"}, Driver: "nvidia 550.54.14"}},
		"three GPUs":  {gpus, Computes{Nodes: []string{"/dev/nvidia0", "/dev/nvidia1", "/dev/nvidia12"}}, determinism.Hardware{GPUs: []string{"NVIDIA A100", "NVIDIA L4", "NVIDIA L4"}, Driver: "nvidia 550.54.14"}},
		"GPU and CPU": {gpus, Computes{CPU: true, Nodes: []string{"/dev/nvidia1"}}, determinism.Hardware{
			CPU: "Intel(R) Xeon(R) Processor (GenuineIntel 6-167)", Features: []string{"avx", "avx2", "sse4_2"}, GPUs: []string{"NVIDIA A100"}, Driver: "nvidia 550.54.14"}},
		"AMD": {gpus, Computes{Nodes: []string{"/dev/kfd", "/dev/dri/renderD129"}}, determinism.Hardware{GPUs: []string{"pci 0x1002:0x744c rev 0xc8"}, Driver: "amdgpu 6.18.1"}},
		"both": {gpus, Computes{Nodes: []string{"/dev/nvidia0", "/dev/dri/renderD129"}}, determinism.Hardware{
			GPUs: []string{"NVIDIA L4", "pci 0x1002:0x744c rev 0xc8"}, Driver: "amdgpu 6.18.1, nvidia 550.54.14"}},
	} {
		got, err := Class(kernel(t, c.files), c.computes)
		c.want.Arch = runtime.GOARCH
		if err != nil || got.CPU != c.want.CPU || !slices.Equal(got.Features, c.want.Features) || got.CPUs != c.want.CPUs ||
			!slices.Equal(got.GPUs, c.want.GPUs) || got.Driver != c.want.Driver || got.Arch != c.want.Arch {
			t.Errorf("%s: %+v, %v\nwant %+v", name, got, err, c.want)
		}
	}
}

// A machine that cannot be named is in no class: it would look like another one.
func TestNoClass(t *testing.T) {
	without := func(name string) map[string]string {
		files := map[string]string{}
		for k, v := range gpus {
			if k != name {
				files[k] = v
			}
		}
		return files
	}
	for name, c := range map[string]struct {
		files    map[string]string
		computes Computes
	}{
		"no cpuinfo":        {nil, Computes{CPU: true}},
		"empty cpuinfo":     {cpuinfo(""), Computes{CPU: true}},
		"a line too long":   {cpuinfo("model name : x\nflags : " + strings.Repeat("avx ", 1<<15)), Computes{CPU: true}},
		"no device":         {gpus, Computes{}},
		"controls only":     {gpus, Computes{Nodes: []string{"/dev/nvidiactl", "/dev/kfd"}}},
		"another minor":     {gpus, Computes{Nodes: []string{"/dev/nvidia2"}}},
		"a part":            {gpus, Computes{Nodes: []string{"/dev/nvidia0", "/dev/nvidia-caps/nvidia-cap21"}}},
		"no such node":      {gpus, Computes{Nodes: []string{"/dev/dri/renderD200"}}},
		"driver's version":  {without("sys/module/nvidia/version"), Computes{Nodes: []string{"/dev/nvidia0"}}},
		"PCI id":            {without("sys/class/drm/renderD129/device/device"), Computes{Nodes: []string{"/dev/dri/renderD129"}}},
		"kernel's version":  {without("proc/sys/kernel/osrelease"), Computes{Nodes: []string{"/dev/dri/renderD129"}}},
		"no driver at all":  {without("sys/class/drm/renderD129/device/driver"), Computes{Nodes: []string{"/dev/dri/renderD129"}}},
		"NVIDIA without it": {cpuinfo(xeon), Computes{CPU: true, Nodes: []string{"/dev/nvidia0"}}},
	} {
		if got, err := Class(kernel(t, c.files), c.computes); !errors.Is(err, ErrUnknown) {
			t.Errorf("%s: %+v, %v", name, got, err)
		}
	}
}

// A machine's class is of all its CPUs, however many and in whatever order.
func TestClassOfManyCPUs(t *testing.T) {
	x86 := func(flags string) string {
		return "processor : 0\nvendor_id : GenuineIntel\ncpu family : 6\nmodel : 167\nmodel name : Xeon\nflags : " + flags + "\n\n"
	}
	arm := func(part, features string) string {
		return "processor : 0\nBogoMIPS : 50.00\nFeatures : " + features + "\nCPU implementer : 0x41\nCPU architecture: 8\nCPU variant : 0x1\nCPU part : " + part + "\nCPU revision : 1\n\n"
	}
	class := func(text string) determinism.Hardware {
		t.Helper()
		h, err := Class(kernel(t, cpuinfo(text)), Computes{CPU: true})
		if err != nil {
			t.Fatal(err)
		}
		return h
	}
	// Wherever the text would be cut, there are flags.
	many := x86(strings.Repeat("other ", 500) + "avx avx2 fma")
	one := class(many)
	if got := class(strings.Repeat(many, 4096)); !reflect.DeepEqual(got, one) {
		t.Errorf("4096 CPUs are %+v, and one of them %+v", got, one)
	}
	if got := class(strings.Repeat(many, 4095) + x86("avx")); !slices.Equal(got.Features, []string{"avx"}) {
		t.Errorf("the last CPU has avx alone, and all of them %q", got.Features)
	}
	cores := []string{arm("0xd46", "asimd asimddp i8mm"), arm("0xd4d", "asimd asimddp"), arm("0xd4e", "asimd asimddp i8mm bf16")}
	want := determinism.Hardware{Arch: runtime.GOARCH, CPU: "0x41 0xd46 0x1, 0x41 0xd4d 0x1, 0x41 0xd4e 0x1", Features: []string{"asimd", "asimddp"}}
	for _, order := range [][]int{{0, 1, 2}, {0, 2, 1}, {1, 0, 2}, {1, 2, 0}, {2, 0, 1}, {2, 1, 0}, {2, 2, 1, 0, 1}} {
		text := ""
		for _, i := range order {
			text += cores[i]
		}
		if got := class(text); !reflect.DeepEqual(got, want) {
			t.Errorf("in the order %v: %+v, want %+v", order, got, want)
		}
	}
	// With more kinds than are named, which of them are would be the order's to say.
	text := ""
	for i := range maxKinds + 1 {
		text += arm(fmt.Sprintf("0xd%02x", i), "asimd")
	}
	if got, err := Class(kernel(t, cpuinfo(text)), Computes{CPU: true}); !errors.Is(err, ErrUnknown) {
		t.Errorf("%d kinds: %+v, %v", maxKinds+1, got, err)
	}
}

// endless is a file that says a text again and again.
type endless struct {
	text string
	at   int
	read int // bytes
}

func (e *endless) Read(p []byte) (int, error) {
	n := copy(p, e.text[e.at:])
	e.at = (e.at + n) % len(e.text)
	e.read += n
	return n, nil
}

// A file that is too long is not half read.
func TestEndlessCPUs(t *testing.T) {
	var h determinism.Hardware
	e := &endless{text: "model name : x\nflags : " + strings.Repeat("avx ", 8000) + "\n\n"}
	if err := readCPU(e, &h); !errors.Is(err, errLong) || e.read != maxCPUInfo+1 {
		t.Errorf("%+v, %v after %d bytes", h, err, e.read)
	}
}

// The same machine is the same every time.
func TestClassOfThisMachine(t *testing.T) {
	first, err := Class("/", Computes{CPU: true, Threads: true})
	if err != nil {
		t.Fatal(err)
	}
	second, err := Class("/", Computes{CPU: true, Threads: true})
	if err != nil || first.String() != second.String() || !slices.Equal(first.Features, second.Features) || first.CPUs < 1 {
		t.Errorf("%+v, then %+v, %v", first, second, err)
	}
}
