package hardware

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/resultity/node/internal/durable"
)

func TestProfileOfThisMachine(t *testing.T) {
	h := Profile(t.TempDir())
	if h.Arch == "" || h.CPUs < 1 || h.Memory < 1<<20 || h.Disk <= 0 || h.Kernel == "" || h.GPUs == nil {
		t.Errorf("%+v", h)
	}
}

// specDirs writes CDI specifications and returns their directories.
func specDirs(t *testing.T, files map[string]string) []string {
	t.Helper()
	base := t.TempDir()
	dirs := []string{filepath.Join(base, "etc"), filepath.Join(base, "run"), filepath.Join(base, "missing")}
	for name, text := range files {
		name = filepath.Join(base, name)
		if err := os.MkdirAll(filepath.Dir(name), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, []byte(strings.ReplaceAll(text, "BASE", base)), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dirs
}

const nvidia = `{"cdiVersion": "0.6.0", "kind": "nvidia.com/gpu",
"devices": [
	{"name": "0", "containerEdits": {"deviceNodes": [{"path": "/dev/nvidia0"}]}},
	{"name": "1", "containerEdits": {"deviceNodes": [{"path": "/dev/nvidia1", "hostPath": "/dev/host-only"}]}},
	{"name": "all", "containerEdits": {"deviceNodes": [{"path": "/dev/nvidia0"}, {"path": "/dev/nvidia1"}]}}],
"containerEdits": {"env": ["NVIDIA_VISIBLE_DEVICES=void"], "deviceNodes": [{"path": "/dev/nvidiactl"}], "mounts": [
	{"hostPath": "BASE/daemon.sock", "containerPath": "/run/daemon.sock"},
	{"hostPath": "BASE/etc/nvidia.json", "containerPath": "/usr/lib/libcuda.so"},
	{"hostPath": "BASE/gone", "containerPath": "/run/gone"}]}}`

func TestDeviceNodes(t *testing.T) {
	dirs := specDirs(t, map[string]string{"etc/nvidia.json": nvidia})
	l, err := net.Listen("unix", filepath.Join(filepath.Dir(dirs[0]), "daemon.sock"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	common := []string{"/dev/nvidiactl", "/run/daemon.sock"}
	for _, c := range []struct {
		names, want []string
	}{
		{nil, nil},
		{[]string{"nvidia.com/gpu=0"}, append([]string{"/dev/nvidia0"}, common...)},
		{[]string{"nvidia.com/gpu=1"}, append([]string{"/dev/nvidia1"}, common...)},
		{[]string{"nvidia.com/gpu=1", "nvidia.com/gpu=all"}, append([]string{"/dev/nvidia0", "/dev/nvidia1"}, common...)},
	} {
		if got, err := DeviceNodes(dirs, c.names); err != nil || !slices.Equal(got, c.want) {
			t.Errorf("%q: %q, %v; want %q", c.names, got, err, c.want)
		}
	}
	for want, names := range map[string][]string{"": nil, "NVIDIA_VISIBLE_DEVICES=void": {"nvidia.com/gpu=1", "nvidia.com/gpu=0"}} {
		if got, err := DeviceEnv(dirs, names); err != nil || strings.Join(got, " ") != want {
			t.Errorf("%q: %q, %v; want %q", names, got, err, want)
		}
	}
	if got := Devices(dirs); !slices.Equal(got, []string{"nvidia.com/gpu=0", "nvidia.com/gpu=1", "nvidia.com/gpu=all"}) {
		t.Errorf("devices %q", got)
	}
}

// A device that is missing is said, with what may be the reason.
func TestNoSuchDevice(t *testing.T) {
	for name, c := range map[string]struct {
		files map[string]string
		says  string
	}{
		"no specification": {nil, "nvidia-ctk"},
		"another one":      {map[string]string{"etc/nvidia.json": nvidia}, "nvidia.com/gpu=7"},
		"a broken one":     {map[string]string{"etc/nvidia.json": nvidia, "run/other.json": "{"}, "other.json"},
	} {
		dirs := specDirs(t, c.files)
		if got, err := DeviceNodes(dirs, []string{"nvidia.com/gpu=7"}); got != nil || !errors.Is(err, ErrNoDevice) || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %q, %v; want an error with %q", name, got, err, c.says)
		}
	}
	dirs := specDirs(t, map[string]string{"etc/a.json": nvidia, "etc/b.json": nvidia}) // who is right?
	if got, err := DeviceNodes(dirs, []string{"nvidia.com/gpu=0"}); !errors.Is(err, ErrNoDevice) || !strings.Contains(err.Error(), "conflict") {
		t.Errorf("two of the same: %q, %v", got, err)
	}
	if got := Devices(nil); got == nil || len(got) != 0 {
		t.Errorf("devices %#v", got)
	}
}

// A specification that the library panics at is one that cannot be read.
func TestSpecificationThatPanics(t *testing.T) {
	dirs := specDirs(t, map[string]string{"etc/x.json": `{"cdiVersion": "0.6.0", "kind": "example.com/x", "devices": [{"name": "a", "containerEdits": {"deviceNodes": [{"path": "/dev/x"}]}}]}`})
	if got := Devices(dirs); got == nil || len(got) != 0 {
		t.Errorf("devices %#v", got)
	}
	if got, err := DeviceNodes(dirs, []string{"example.com/x=a"}); got != nil || err == nil {
		t.Errorf("%q, %v", got, err)
	}
}

func TestProfileIsBounded(t *testing.T) {
	var b strings.Builder
	for i := range 2 * maxDevices {
		fmt.Fprintf(&b, `,{"name": "d%d", "containerEdits": {"deviceNodes": [{"path": "/dev/x"}]}}`, i)
	}
	dirs := specDirs(t, map[string]string{"etc/x.json": `{"cdiVersion": "0.6.0", "kind": "example.com/xx", "devices": [` + b.String()[1:] + `]}`})
	if n := len(Devices(dirs)); n != maxDevices {
		t.Errorf("%d devices", n)
	}
}

func TestOddFilesGiveNothing(t *testing.T) {
	f := filepath.Join(t.TempDir(), "f")
	if got := memory(f); got != 0 {
		t.Errorf("missing file: %d", got)
	}
	for text, want := range map[string]int64{"MemTotal:  16 kB\n": 16 << 10, "MemTotal: -1 kB\n": 0, "MemTotal: x\n": 0, "": 0} {
		if err := os.WriteFile(f, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if got := memory(f); got != want {
			t.Errorf("%q: %d, want %d", text, got, want)
		}
	}
	for size, want := range map[int]int64{maxSmall: 7, maxSmall + 1: 0} {
		if err := os.WriteFile(f, []byte("7"+strings.Repeat("\n", size-1)), 0o600); err != nil {
			t.Fatal(err)
		}
		if got := number(f); got != want {
			t.Errorf("a number in %d bytes: %d, want %d", size, got, want)
		}
		if text, err := small(f); errors.Is(err, durable.ErrLarge) != (size > maxSmall) || len(text) > maxSmall {
			t.Errorf("%d bytes of %d: %v", len(text), size, err)
		}
	}
	if err := os.WriteFile(f, []byte(`PRETTY_NAME="`+strings.Repeat("x", 1000)), 0o600); err != nil {
		t.Fatal(err)
	}
	if got := osName(f); len(got) > 200 {
		t.Errorf("%d bytes", len(got))
	}
}

func TestDeviceMemory(t *testing.T) {
	dirs := specDirs(t, map[string]string{"etc/amd.json": `{"cdiVersion": "0.6.0", "kind": "amd.com/gpu", "devices": [
		{"name": "0", "containerEdits": {"deviceNodes": [{"path": "/dev/kfd"}, {"path": "/dev/dri/card1"}, {"path": "/dev/dri/renderD128"}]}},
		{"name": "1", "containerEdits": {"deviceNodes": [{"path": "/dev/dri/renderD129"}]}},
		{"name": "2", "containerEdits": {"deviceNodes": [{"path": "/dev/dri/renderD130"}]}},
		{"name": "all", "containerEdits": {"deviceNodes": [{"path": "/dev/dri/renderD128"}, {"path": "/dev/dri/renderD129"}]}}]}`, "etc/nvidia.json": nvidia})
	sys := t.TempDir()
	file := func(name, text string) {
		name = filepath.Join(sys, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(name), 0o700), os.WriteFile(name, []byte(text), 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	file("pci/a/mem_info_vram_total", "17163091968\n")
	file("pci/a/mem_info_gtt_total", "1000\n")
	file("pci/b/mem_info_vram_total", "2000\n")
	file("pci/c/mem_info_vram_total", "-2000\n")
	for node, card := range map[string]string{"card1": "a", "renderD128": "a", "renderD129": "b", "renderD130": "c"} {
		dir := filepath.Join(sys, "class/drm", node)
		if err := errors.Join(os.MkdirAll(dir, 0o700), os.Symlink("../../../pci/"+card, filepath.Join(dir, "device"))); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct {
		names string
		want  int64 // negative: not known
	}{
		{"", 0}, {"amd.com/gpu=0", 17163092968}, {"amd.com/gpu=1", 2000}, {"amd.com/gpu=0 amd.com/gpu=1", 17163094968},
		{"amd.com/gpu=all", 17163094968}, {"amd.com/gpu=all amd.com/gpu=0", 17163094968},
		{"amd.com/gpu=2", -1}, {"amd.com/gpu=9", -1}, {"nvidia.com/gpu=0", -1}, {"amd.com/gpu=0 nvidia.com/gpu=0", -1},
	} {
		n, known := DeviceMemory(sys, dirs, strings.Fields(c.names))
		if known != (c.want >= 0) || known && n != c.want {
			t.Errorf("%q: %d, %v", c.names, n, known)
		}
	}
}
