// Package preflight owns the look at the machine that a node needs around it:
// account, lingering, subordinate ids, cgroups, Podman, storage, disk, clock and
// the modes of the identity's files. The agent and resultityctl ask it alike, so
// that a node that never came up gets the same answers as one that runs.
//
// The rule it keeps: it only looks, changes nothing, and says "unknown" where it
// could not look. It is one edge, this machine; what it asks of Podman is what
// can be had without the agent, and by somebody else's user id.
package preflight

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/godbus/dbus/v5"
	"golang.org/x/sys/unix"

	"github.com/resultity/node/internal/durable"
	"github.com/resultity/node/internal/gate"
)

// Packaged is the system account that the package makes.
const Packaged = "resultity"

// Machine says what is looked at. Its methods may be called concurrently.
type Machine struct {
	Root    string // of the files of the machine; "/" but for tests
	Account string // name that the node runs as; "" when it is not known
	UID     int    // of the account; negative when there is no such account
	Socket  string // of the node's Podman API
	State   string // the agent's state directory; "" when that is not known
	Need    int64  // bytes that the configuration still has to have fetched
	Running bool   // the agent runs

	// Offset is how far this machine's clock is ahead of the network's, where a
	// session has shown it, and Window how far it may be.
	Offset *time.Duration
	Window time.Duration
	Synced func(context.Context) (bool, error) // does anything keep the clock? nil for [ClockSynced]
}

// Bounds of what counts as enough.
const (
	MinIDs     = 65536     // subordinate ids of each kind
	minStorage = 512 << 20 // bytes where Podman stores images
	minDisk    = 64 << 20  // bytes for the agent's own records
	minMargin  = 512 << 20 // bytes that the model store leaves free
)

// Gates looks at everything, in the order of [gate.List]. It takes at most the
// time that ctx gives and the answers of Podman and D-Bus need.
func (m *Machine) Gates(ctx context.Context) []gate.Gate {
	info, err := m.podman(ctx)
	gs := []gate.Gate{m.account(), m.linger(), m.subIDs(info), m.cgroup(), m.podmanGate(info, err), m.storage(info)}
	return append(gs, m.disk(), m.clock(ctx))
}

func open(name, format string, a ...any) gate.Gate {
	return gate.Gate{Name: name, State: gate.Open, Detail: fmt.Sprintf(format, a...)}
}

func closed(name, remedy, format string, a ...any) gate.Gate {
	return gate.Gate{Name: name, Detail: fmt.Sprintf(format, a...), Remedy: remedy}
}

func unknown(name, remedy, format string, a ...any) gate.Gate {
	return gate.Gate{Name: name, State: gate.Unknown, Detail: fmt.Sprintf(format, a...), Remedy: remedy}
}

func (m *Machine) path(name string) string { return filepath.Join(m.Root, name) }

// Systemctl is the command line that steers a unit of the account's.
func (m *Machine) Systemctl(verb, unit string) string {
	if m.Account == Packaged {
		return fmt.Sprintf("sudo systemctl --user -M %s@ %s %s", m.Account, verb, unit)
	}
	return fmt.Sprintf("systemctl --user %s %s", verb, unit)
}

func (m *Machine) account() gate.Gate {
	switch {
	case m.UID < 0:
		return closed(gate.Account, "sudo systemd-sysusers resultity.conf && sudo /usr/libexec/resultity/postinstall.sh configure", "there is no account %s", m.Account)
	case m.UID == 0:
		return closed(gate.Account, (&Machine{Account: Packaged}).Systemctl("start", "resultity-agent"), "the node runs as root; it belongs into an account of its own")
	}
	return open(gate.Account, "%s", strings.TrimPrefix(fmt.Sprintf("%s, uid %d", m.Account, m.UID), ", "))
}

func (m *Machine) linger() gate.Gate {
	if m.Account == "" {
		return unknown(gate.Linger, "", "the name of uid %d is not known", m.UID)
	}
	remedy := "sudo loginctl enable-linger " + m.Account
	switch _, err := os.Stat(m.path("var/lib/systemd/linger/" + m.Account)); {
	case err == nil:
		return open(gate.Linger, "the account's service manager stays without a login")
	case errors.Is(err, fs.ErrNotExist):
		return closed(gate.Linger, remedy, "lingering is off for %s: its service manager, and the node with it, runs only while somebody is logged in", m.Account)
	default:
		return unknown(gate.Linger, remedy, "%v", err)
	}
}

func (m *Machine) subIDs(info *podmanInfo) gate.Gate {
	var short, where []string
	free := int64(524288)
	for _, name := range []string{"subuid", "subgid"} {
		n, next, err := m.ranges("etc/" + name)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			where = append(where, err.Error())
		}
		free = max(free, next)
		if n < MinIDs {
			short = append(short, fmt.Sprintf("%d in /etc/%s", n, name))
		}
	}
	switch {
	case len(short) == 0:
		return open(gate.SubIDs, "at least %d of each kind", MinIDs)
	// They may come from elsewhere, by nsswitch.conf; Podman has been given them.
	case info != nil && info.subordinate() >= MinIDs:
		return open(gate.SubIDs, "Podman has %d", info.subordinate())
	}
	remedy := fmt.Sprintf("sudo usermod --add-subuids %d-%d --add-subgids %[1]d-%[2]d %[3]s && %[4]s", free, free+MinIDs-1, m.Account, m.Systemctl("restart", "resultity-podman.service"))
	if len(where) > 0 {
		return unknown(gate.SubIDs, remedy, "%s", strings.Join(where, "; "))
	}
	return closed(gate.SubIDs, remedy, "%s has too few subordinate ids for a container: %s, want %d", m.Account, strings.Join(short, ", "), MinIDs)
}

// ranges adds up the account's ids in a file, and returns the first id above all
// that are given out. It needs no getent, which small systems do not have.
func (m *Machine) ranges(name string) (own, next int64, err error) {
	raw, err := m.read(name)
	for line := range strings.Lines(string(raw)) {
		f := strings.Split(strings.TrimSpace(line), ":")
		if len(f) != 3 {
			continue
		}
		first, err1 := strconv.ParseUint(f[1], 10, 32)
		count, err2 := strconv.ParseUint(f[2], 10, 32)
		if err1 != nil || err2 != nil {
			continue
		}
		next = max(next, int64(first+count))
		if f[0] == m.Account || m.UID > 0 && f[0] == strconv.Itoa(m.UID) {
			own += int64(count)
		}
	}
	return own, next, err
}

// maxFile bounds what is read of one file, in bytes.
const maxFile = 1 << 20

func (m *Machine) read(name string) ([]byte, error) {
	return durable.ReadFile(m.path(name), maxFile)
}

// controllers are those that limit the runtime.
var controllers = []string{"cpu", "memory", "pids"}

func (m *Machine) cgroup() gate.Gate {
	all, err := m.read("sys/fs/cgroup/cgroup.controllers")
	if errors.Is(err, fs.ErrNotExist) {
		return closed(gate.Cgroup, "boot without systemd.unified_cgroup_hierarchy=0 on the kernel's command line", "this machine has no cgroup v2 at /sys/fs/cgroup")
	} else if err != nil {
		return unknown(gate.Cgroup, "", "%v", err)
	}
	own, err := m.read(fmt.Sprintf("sys/fs/cgroup/user.slice/user-%d.slice/user@%[1]d.service/cgroup.controllers", m.UID))
	if err != nil {
		return unknown(gate.Cgroup, "sudo systemctl start user@"+strconv.Itoa(max(m.UID, 0))+".service", "cgroup v2; the account's service manager does not run, so that nothing is delegated to it yet")
	}
	var missing, absent []string
	for _, c := range controllers {
		switch {
		case slices.Contains(strings.Fields(string(own)), c):
		case slices.Contains(strings.Fields(string(all)), c):
			missing = append(missing, c)
		default:
			absent = append(absent, c)
		}
	}
	const drop = "sudo mkdir -p /etc/systemd/system/user@.service.d && printf '[Service]\\nDelegate=cpu memory pids\\n' | sudo tee /etc/systemd/system/user@.service.d/delegate.conf && sudo systemctl daemon-reload && sudo systemctl restart user@"
	switch {
	case len(missing) > 0:
		return closed(gate.Cgroup, drop+strconv.Itoa(m.UID)+".service", "not delegated to the account: %s, so that the runtime cannot be limited", strings.Join(missing, " "))
	case len(absent) > 0:
		return unknown(gate.Cgroup, "", "cgroup v2; this machine has no controllers to delegate: %s", strings.Join(absent, " "))
	}
	return open(gate.Cgroup, "v2, %s delegated", strings.Join(controllers, " "))
}

// podmanInfo is the part of Podman's account of itself that matters here.
type podmanInfo struct {
	Host struct {
		IDMappings struct {
			UIDMap []struct {
				ContainerID int64 `json:"container_id"`
				Size        int64 `json:"size"`
			} `json:"uidmap"`
		} `json:"idMappings"`
	} `json:"host"`
	Store struct {
		Driver    string            `json:"graphDriverName"`
		Root      string            `json:"graphRoot"`
		Allocated uint64            `json:"graphRootAllocated"`
		Used      uint64            `json:"graphRootUsed"`
		Status    map[string]string `json:"graphStatus"`
	} `json:"store"`
	Version struct {
		Version string `json:"Version"`
	} `json:"version"`
}

func (i *podmanInfo) subordinate() (n int64) {
	for _, m := range i.Host.IDMappings.UIDMap {
		if m.ContainerID > 0 {
			n += m.Size
		}
	}
	return n
}

// PodmanInfo returns Podman's account of itself as it is, JSON of at most a
// megabyte.
func (m *Machine) PodmanInfo(ctx context.Context) ([]byte, error) {
	c := &http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", m.Socket)
		},
	}}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://podman/v5.0.0/libpod/info", nil)
	if err != nil {
		return nil, err
	}
	res, err := c.Do(req)
	if err != nil {
		return nil, err
	}
	defer res.Body.Close() // read only: nothing to lose
	raw, err := durable.ReadAll(res.Body, maxFile)
	if err == nil && res.StatusCode != http.StatusOK {
		err = fmt.Errorf("podman answers %s", res.Status)
	}
	return raw, err
}

func (m *Machine) podman(ctx context.Context) (*podmanInfo, error) {
	raw, err := m.PodmanInfo(ctx)
	if err != nil {
		return nil, err
	}
	i := new(podmanInfo)
	if err := json.Unmarshal(raw, i); err != nil {
		return nil, fmt.Errorf("podman's answer: %w", err)
	}
	return i, nil
}

func (m *Machine) podmanGate(i *podmanInfo, err error) gate.Gate {
	const install = "sudo apt install podman crun passt uidmap"
	if err != nil {
		_, found := os.Stat(m.path("usr/bin/podman"))
		switch {
		case errors.Is(found, fs.ErrNotExist):
			return closed(gate.Podman, install, "Podman is not installed: there is no /usr/bin/podman")
		case !m.Running || errors.Is(err, context.DeadlineExceeded):
			return unknown(gate.Podman, m.Systemctl("status", "resultity-podman.socket"), "its API cannot be asked: %v", err)
		}
		return closed(gate.Podman, m.Systemctl("restart", "resultity-podman.socket"), "its API does not answer: %v", err)
	}
	major, minor, ok := version(i.Version.Version)
	switch {
	case !ok:
		return unknown(gate.Podman, "podman --version", "Podman says that its version is %.40q", i.Version.Version)
	case major < 5 || major == 5 && minor < 3:
		return closed(gate.Podman, install, "Podman %s is too old, want 5.3 or newer", i.Version.Version)
	case major > newestMajor:
		return closed(gate.Podman, "install Podman 5, or an agent that knows Podman "+strconv.Itoa(major), "Podman %s is newer than this agent knows", i.Version.Version)
	}
	return open(gate.Podman, "%s", i.Version.Version)
}

// newestMajor is the last series of Podman that the agent was run with.
const newestMajor = 5

func version(s string) (major, minor int, ok bool) {
	a, rest, _ := strings.Cut(s, ".")
	b, _, _ := strings.Cut(rest, ".")
	major, err1 := strconv.Atoi(a)
	minor, err2 := strconv.Atoi(b)
	return major, minor, err1 == nil && err2 == nil && major >= 0 && minor >= 0
}

func (m *Machine) storage(i *podmanInfo) gate.Gate {
	if i == nil {
		return unknown(gate.Storage, "", "Podman's API cannot be asked")
	}
	room := int64(i.Store.Allocated) - int64(i.Store.Used)
	switch {
	case i.Store.Driver != "overlay":
		return closed(gate.Storage, `set driver = "overlay" in /etc/containers/storage.conf, then podman system reset as the account, which removes its images`,
			"Podman stores images with %.40q, which copies each image in full; want overlay", i.Store.Driver)
	case i.Store.Allocated > 0 && room < minStorage:
		return closed(gate.Storage, "df -h "+i.Store.Root+", then free some space there", "%s free in %s, want %s", bytes(room), i.Store.Root, bytes(minStorage))
	}
	how := "native overlay"
	if i.Store.Status["Native Overlay Diff"] == "false" {
		how = "overlay, not native"
	}
	return open(gate.Storage, "%s, %s free", how, bytes(room))
}

func (m *Machine) disk() gate.Gate {
	if m.State == "" {
		return unknown(gate.Disk, "", "the state directory is not known")
	}
	var st unix.Statfs_t
	if err := unix.Statfs(m.State, &st); err != nil {
		return unknown(gate.Disk, "df -h "+m.State, "%s: %v", m.State, err)
	}
	unit := st.Frsize
	if unit == 0 {
		unit = st.Bsize
	}
	return m.enough(int64(st.Bavail) * unit)
}

// enough judges the free bytes of the state directory.
func (m *Machine) enough(free int64) gate.Gate {
	want := int64(minDisk)
	if m.Need > 0 {
		want = m.Need + minMargin
	}
	if free < want {
		return closed(gate.Disk, "df -h "+m.State+", then free some space there, or set paths.state to a larger disk", "%s free in %s, want %s", bytes(free), m.State, bytes(want))
	}
	if m.Need > 0 {
		return open(gate.Disk, "%s free, %s still to be fetched", bytes(free), bytes(m.Need))
	}
	return open(gate.Disk, "%s free", bytes(free))
}

// bytes prints a number of bytes for people.
func bytes(n int64) string {
	switch {
	case n >= 10<<30:
		return fmt.Sprintf("%d GiB", n>>30)
	case n >= 10<<20:
		return fmt.Sprintf("%d MiB", n>>20)
	}
	return fmt.Sprintf("%d KiB", n>>10)
}

const remedyClock = "sudo timedatectl set-ntp true"

func (m *Machine) clock(ctx context.Context) gate.Gate {
	synced := m.Synced
	if synced == nil {
		synced = ClockSynced
	}
	kept, err := synced(ctx)
	word := "kept by time synchronisation"
	switch {
	case err != nil:
		word = "whether it is kept by time synchronisation cannot be told"
	case !kept:
		word = "not kept by time synchronisation"
	}
	switch {
	case m.Offset != nil && m.Offset.Abs() > m.Window:
		return closed(gate.Clock, remedyClock, "%v from the network's clock, at most %v; %s", m.Offset.Abs().Round(time.Millisecond), m.Window, word)
	case m.Offset != nil:
		return open(gate.Clock, "%v from the network's; %s", m.Offset.Abs().Round(time.Millisecond), word)
	case err == nil && kept:
		return open(gate.Clock, "%s", word)
	}
	return unknown(gate.Clock, remedyClock, "%s", word)
}

// ClockSynced asks the machine whether something keeps its clock: timedated,
// which is started on demand, or else the kernel, which a sandbox forbids to ask.
func ClockSynced(ctx context.Context) (bool, error) {
	var tx unix.Timex
	if state, err := unix.Adjtimex(&tx); err == nil {
		return state != unix.TIME_ERROR, nil
	}
	bus, err := dbus.ConnectSystemBus(dbus.WithContext(ctx))
	if err != nil {
		return false, err
	}
	defer bus.Close()
	var v dbus.Variant
	err = bus.Object("org.freedesktop.timedate1", "/org/freedesktop/timedate1").
		CallWithContext(ctx, "org.freedesktop.DBus.Properties.Get", 0, "org.freedesktop.timedate1", "NTPSynchronized").Store(&v)
	if err != nil {
		return false, err
	}
	kept, ok := v.Value().(bool)
	if !ok {
		return false, errors.New("timedated does not say")
	}
	return kept, nil
}

// Identity looks at the modes of the files in an identity directory. It opens
// none of them.
func Identity(dir string) gate.Gate {
	entries, err := os.ReadDir(dir)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return unknown(gate.Identity, "", "%s is made at the first start", dir)
	case err != nil:
		return unknown(gate.Identity, "sudo resultityctl status", "%v", err)
	}
	names := []string{dir}
	for _, e := range entries {
		names = append(names, filepath.Join(dir, e.Name()))
	}
	for _, name := range names {
		st, err := os.Lstat(name)
		switch {
		case errors.Is(err, fs.ErrNotExist): // gone since
		case err != nil:
			return unknown(gate.Identity, "", "%v", err)
		case st.Mode().Perm()&0o077 != 0:
			return closed(gate.Identity, "sudo chmod go= "+name, "%s has mode %04o, so that others may use it", name, st.Mode().Perm())
		}
	}
	return open(gate.Identity, "%d files, of nobody else's", len(names)-1)
}
