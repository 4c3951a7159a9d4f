// Package hardware owns what a node says about its machine in heartbeats. All
// of it is claims: nothing here is proof, and nothing that decides trust may
// depend on it.
package hardware

import (
	"bufio"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
	"tags.cncf.io/container-device-interface/pkg/cdi"
	specs "tags.cncf.io/container-device-interface/specs-go"

	"github.com/resultity/node/internal/durable"
	"github.com/resultity/node/internal/wire"
)

// Profile reads the machine's profile. store is a directory of the model store,
// for its free space. What cannot be read is left empty: a profile is never a
// reason to fail.
func Profile(store string) wire.Hardware {
	h := wire.Hardware{Arch: runtime.GOARCH, CPUs: runtime.NumCPU(), Memory: Memory(), OS: osName("/etc/os-release"), GPUs: Devices(SpecDirs), Disk: Free(store)}
	var u unix.Utsname
	if unix.Uname(&u) == nil {
		h.Kernel = unix.ByteSliceToString(u.Release[:])
	}
	return h
}

// SpecDirs is where every Podman looks for CDI specifications; a later one wins.
var SpecDirs = []string{"/etc/cdi", "/var/run/cdi"}

// maxDevices bounds what a profile lists.
const maxDevices = 64

// Devices lists the CDI devices that containers can be given, by the
// specifications in dirs, sorted; never nil.
func Devices(dirs []string) []string {
	names := []string{}
	c, err := cache(dirs)
	if err != nil {
		return names
	}
	names = append(names, c.ListDevices()...)
	slices.Sort(names)
	return names[:min(len(names), maxDevices)]
}

// cache reads the specifications. The library that does so panics at some that
// are wrong, such as one with a class of a single letter; any program may have
// put those there, and a node without a GPU does not even need them.
func cache(dirs []string) (_ *cdi.Cache, err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("a CDI specification in %s cannot be read: %v", strings.Join(dirs, " or "), p)
		}
	}()
	return cdi.NewCache(cdi.WithAutoRefresh(false), cdi.WithSpecDirs(dirs...))
}

// DeviceNodes lists the device nodes, and the sockets of device daemons, that
// the CDI devices bring into a container, by the specifications in dirs: under
// their paths in the container, sorted, each once.
func DeviceNodes(dirs, names []string) ([]string, error) {
	return paths(dirs, names, func(e *specs.ContainerEdits) (nodes []string) {
		for _, n := range e.DeviceNodes {
			nodes = append(nodes, n.Path)
		}
		for _, m := range e.Mounts {
			if st, err := os.Stat(m.HostPath); err == nil && st.Mode()&os.ModeSocket != 0 {
				nodes = append(nodes, m.ContainerPath)
			}
		}
		return nodes
	})
}

// DeviceMounts lists what of the host the CDI devices mount into a container, in
// the same way.
func DeviceMounts(dirs, names []string) ([]string, error) {
	return paths(dirs, names, func(e *specs.ContainerEdits) (places []string) {
		for _, m := range e.Mounts {
			places = append(places, m.ContainerPath)
		}
		return places
	})
}

// DeviceEnv lists the variables, NAME=value, that the CDI devices bring into a
// container, in the same way.
func DeviceEnv(dirs, names []string) ([]string, error) {
	return paths(dirs, names, func(e *specs.ContainerEdits) []string { return e.Env })
}

// DeviceMemory returns the most memory that the CDI devices can use together, in bytes,
// by the specifications in dirs and the kernel's files in sys: their own, and what of
// the machine's the driver maps for them, which is nearly all that a processor's own GPU
// has. It is not known where one of them is no device whose driver says so: AMD's does.
func DeviceMemory(sys string, dirs, names []string) (bytes int64, known bool) {
	cards := map[string]int64{} // a device has several nodes
	for _, name := range names {
		nodes, err := DeviceNodes(dirs, []string{name})
		if err != nil {
			return 0, false
		}
		found := false
		for _, node := range nodes {
			card, err := filepath.EvalSymlinks(filepath.Join(sys, "class/drm", filepath.Base(node), "device"))
			if err != nil {
				continue
			}
			own, shared := number(filepath.Join(card, "mem_info_vram_total")), number(filepath.Join(card, "mem_info_gtt_total"))
			if own > 0 {
				cards[card], found = own+shared, true
			}
		}
		if !found {
			return 0, false
		}
	}
	for _, n := range cards {
		bytes += n
	}
	return bytes, true
}

// number reads a file with a number of bytes, 0 where there is none that makes sense.
func number(file string) int64 {
	raw, err := durable.ReadFile(file, maxSmall)
	n, failed := strconv.ParseInt(strings.TrimSpace(string(raw)), 10, 64)
	if err != nil || failed != nil || n < 0 || n > 1<<50 {
		return 0
	}
	return n
}

// paths collects what of picks from the edits of the named devices.
func paths(dirs, names []string, of func(*specs.ContainerEdits) []string) ([]string, error) {
	if len(names) == 0 {
		return nil, nil
	}
	c, err := cache(dirs)
	if err != nil {
		return nil, err
	}
	var found []string
	for _, name := range names {
		d := c.GetDevice(name)
		if d == nil {
			return nil, fmt.Errorf("%w: %s (specifications are in %s; for NVIDIA: nvidia-ctk cdi generate --output=/etc/cdi/nvidia.yaml)%s",
				ErrNoDevice, name, strings.Join(dirs, " and "), broken(c))
		}
		found = append(found, of(&d.ContainerEdits)...)
		found = append(found, of(&d.GetSpec().ContainerEdits)...)
	}
	slices.Sort(found)
	return slices.Compact(found), nil
}

// ErrNoDevice says that no CDI specification has a device.
var ErrNoDevice = errors.New("no such device")

// broken says which specifications cannot be read: the device may be in one of
// them. Two that name the same device are at fault, too.
func broken(c *cdi.Cache) string {
	var b strings.Builder
	errs := c.GetErrors()
	for _, file := range slices.Sorted(maps.Keys(errs)) {
		fmt.Fprintf(&b, "; %s: %v", file, errors.Join(errs[file]...))
	}
	s := b.String()
	return s[:min(len(s), 1000)]
}

// Free returns the free bytes of the file system that dir is on, 0 where that
// cannot be told.
func Free(dir string) int64 {
	var fs unix.Statfs_t
	if unix.Statfs(dir, &fs) != nil {
		return 0
	}
	return int64(fs.Bavail) * fs.Bsize
}

// Memory returns the machine's memory in bytes, 0 where that cannot be told.
func Memory() int64 { return memory("/proc/meminfo") }

func memory(file string) int64 { return kilobytes(file, "MemTotal:") }

// kilobytes returns the bytes of a value in kB, 0 where that cannot be told.
func kilobytes(file, prefix string) int64 {
	kb := value(file, prefix)
	n, err := strconv.ParseInt(strings.TrimSpace(strings.TrimSuffix(kb, "kB")), 10, 64)
	if err != nil || n < 0 || n > 1<<40 {
		return 0
	}
	return n << 10
}

func osName(file string) string {
	return strings.Trim(value(file, "PRETTY_NAME="), `"`)
}

// value returns what follows prefix on the first line that begins with it, at
// most 200 bytes.
func value(file, prefix string) string {
	f, err := os.Open(filepath.Clean(file))
	if err != nil {
		return ""
	}
	defer f.Close() // read only: nothing to lose
	s := bufio.NewScanner(f)
	for s.Scan() {
		if v, ok := strings.CutPrefix(s.Text(), prefix); ok {
			return v[:min(len(v), 200)]
		}
	}
	return ""
}

// Available returns the bytes of memory that new work may take without others
// losing theirs, 0 where that cannot be told. Files in memory that nobody needs
// count.
func Available() int64 { return kilobytes("/proc/meminfo", "MemAvailable:") }
