// Package sandbox looks at the container from inside and judges whether it is
// sealed as ordered.
//
// Looking and judging are apart: [Inspect] collects facts from the kernel, by
// trying where a try is harmless, and a pure function compares them with what
// was ordered. What cannot be read counts as different. Nothing here trusts
// that a flag was passed; only what the kernel answers counts.
//
// [Confine] and [Hide] take from the engine what a sealed container still leaves.
package sandbox

import (
	"fmt"
	"path"
	"slices"
	"strings"

	"github.com/resultity/node/internal/bridge/contract"
)

// Order is the part of the sandbox that differs from one runtime to the next.
// Everything else about it is fixed.
type Order struct {
	Writable  []string // mount points that may be writable, by the engine too
	SocketDir string   // one more, but not by the engine
	ReadOnly  []string // paths that must exist on a read-only mount
	Devices   []string // device nodes, and sockets of device daemons, beside the standard ones
	Sockets   []string // other unix sockets that may be there
}

// allows says whether a mount may be writable.
func (o Order) allows(point string) bool {
	return point == o.SocketDir || slices.Contains(o.Writable, point)
}

// Inspect looks around and judges. It must run before the caller opens files
// or starts processes, and takes a few milliseconds. The only traces it may
// leave are those of a failed check: a file that it could create is removed.
func Inspect(o Order) contract.Sandbox {
	return judge(look(o, false), o)
}

// Again is Inspect beside a running engine: what that may have made is left out,
// which is what lies where it may write, its abstract sockets and its terminals.
// A process that an administrator has just started is given half a second to
// shed its privileges. Safe for concurrent use.
func Again(o Order) contract.Sandbox {
	return judge(look(o, true), o)
}

// facts is what the kernel told. An entry of problems means that something
// could not be found out.
type facts struct {
	Problems   []string
	PID        int
	Status     status
	UIDMap     []contract.IDRange
	GIDMap     []contract.IDRange
	Interfaces []link
	Routes     []string // destinations that have a route not over lo
	Reachable  []string // addresses that the kernel would send packets to
	Families   []string // kinds of sockets beyond the usual ones that the engine could make
	Calls      []string // system calls that should be refused and are not
	Landlock   int      // version, 0 without
	Engine     string   // how the engine's try to write into the socket's directory will go
	Writes     map[string]string
	ReadOnly   map[string]bool // mount flag, by path
	Shields    []shield
	Mounts     []mount
	Writable   map[int][]string // by mount id: what could be written below
	Sockets    []string         // abstract ones; sockets and named pipes in mounted directories
	Devices    []device         // nodes below /dev, and nodes mounted elsewhere
	Processes  []string         // those that are not confined as this one is
	Cgroup     string           // in the unified hierarchy
	Inherited  []string         // descriptors above 2 that exec handed over
	WorkDir    string
	Proxies    []string // names of environment variables
	Namespaces map[string]string
	Label      string
}

// link is a network interface.
type link = contract.Interface

// shield is a kernel path that a container must not reach in full.
type shield struct {
	Path     string
	Masked   bool // something else is mounted over it
	ReadOnly bool
}

// Kernel interfaces that every supported Podman hides or makes read-only, where
// the kernel has them. Podman's own lists grew over time; these are common to
// all of them.
var (
	masked   = []string{"/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/sched_debug", "/proc/scsi", "/proc/timer_list", "/proc/timer_stats", "/sys/firmware", "/sys/fs/selinux"}
	readOnly = []string{"/proc/asound", "/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger", "/sys", "/sys/fs/cgroup"}
)

// judge compares. Its checks come in a fixed order and are always all there.
func judge(f facts, o Order) contract.Sandbox {
	s := contract.Sandbox{
		Version:    contract.Version,
		UID:        f.Status.UID[0],
		GID:        f.Status.GID[0],
		Groups:     f.Status.Groups,
		UIDMap:     f.UIDMap,
		GIDMap:     f.GIDMap,
		Namespaces: f.Namespaces,
		Label:      f.Label,
		Landlock:   f.Landlock,
		Cgroup:     f.Cgroup,
		Interfaces: f.Interfaces,
		Devices:    f.Devices[:min(len(f.Devices), contract.MaxDevices)],
	}
	check := func(name, want, got string, ok bool) {
		s.Checks = append(s.Checks, contract.Check{Name: name, Want: want, Got: got, OK: ok})
	}
	// none is a check for a list that must be empty.
	none := func(name, want string, got []string) {
		check(name, want, list(got), len(got) == 0)
	}

	none("inspection", "complete", f.Problems)
	check("process", "1", fmt.Sprint(f.PID), f.PID == 1)
	check("user", "one that is not 0", ids(f.Status.UID), steady(f.Status.UID))
	check("group", "one that is not 0", ids(f.Status.GID), steady(f.Status.GID))
	check("user mapping", "a subordinate id", mapped(f.UIDMap, s.UID), subordinate(f.UIDMap, s.UID))
	check("group mapping", "a subordinate id", mapped(f.GIDMap, s.GID), subordinate(f.GIDMap, s.GID))
	none("capabilities", "none", f.Status.capabilities())
	check("no new privileges", "1", f.Status.NoNewPrivs, f.Status.NoNewPrivs == "1")
	check("system call filter", "2", f.Status.Seccomp, f.Status.Seccomp == "2")
	none("processes", "all of this user, without privileges and filtered", f.Processes)
	none("interfaces", "lo alone", foreign(f.Interfaces))
	none("routes", "none out", f.Routes)
	none("reachable addresses", "none", f.Reachable)
	none("socket families", "unix, internet and routes of netlink", f.Families)
	none("system calls", "none that makes namespaces, mounts or reaches into the kernel", f.Calls)
	check("engine's writes", "refused in the socket's directory where the kernel can", f.Engine, f.Landlock == 0 || refusals[f.Engine])
	check("root", "read-only", f.write("/"), f.sealed("/"))
	for _, p := range o.ReadOnly {
		check("read-only "+p, "read-only", f.write(p), f.sealed(p))
	}
	all, wrong := judgeMounts(f, o)
	s.Mounts = all
	none("mounts", "writable only where ordered", wrong)
	none("kernel interfaces", "masked or read-only", exposed(f.Shields))
	none("devices", "standard and ordered ones", extra(f.Devices, o.Devices))
	none("sockets and pipes", "ordered ones", without(f.Sockets, slices.Concat(o.Sockets, o.Devices)))
	none("descriptors", "0, 1 and 2", f.Inherited)
	check("working directory", "inside the root", f.WorkDir, path.IsAbs(f.WorkDir))
	none("proxy variables", "none", f.Proxies)

	s.OK = !slices.ContainsFunc(s.Checks, func(c contract.Check) bool { return !c.OK })
	return s
}

// Failed lists the checks that differ, one line each, ready for a person.
func Failed(s contract.Sandbox) []string {
	var lines []string
	for _, c := range s.Checks {
		if !c.OK {
			lines = append(lines, fmt.Sprintf("%s: want %s, got %s", c.Name, c.Want, c.Got))
		}
	}
	return lines
}

// maxList bounds how many things one check or mount names.
const maxList = 16

// list prints what a check found; a container can hold any number of things.
func list(got []string) string {
	if len(got) == 0 {
		return "as wanted"
	}
	if n := len(got) - maxList; n > 0 {
		got = append(slices.Clone(got[:maxList]), fmt.Sprintf("and %d more", n))
	}
	return strings.Join(got, ", ")
}

func ids(v [4]int) string { return fmt.Sprintf("%d (effective %d, saved %d)", v[0], v[1], v[2]) }

// steady says that no id differs from the others, so none can be taken back
// on, and that it is not the container's root.
func steady(v [4]int) bool {
	return v[0] > 0 && v[1] == v[0] && v[2] == v[0] && v[3] == v[0]
}

func mapped(m []contract.IDRange, id int) string {
	out, ok := outside(m, id)
	if !ok {
		return fmt.Sprintf("%d is not mapped", id)
	}
	return fmt.Sprintf("%d is %d outside", id, out)
}

// subordinate says that id is neither itself outside, as in the host's own
// user namespace, nor the 0 of the namespace around this one, which is the
// account that runs the container.
func subordinate(m []contract.IDRange, id int) bool {
	out, ok := outside(m, id)
	return ok && out != 0 && out != uint32(id)
}

func outside(m []contract.IDRange, id int) (uint32, bool) {
	for _, r := range m {
		if id >= 0 && uint64(id) >= uint64(r.Inside) && uint64(id) < uint64(r.Inside)+uint64(r.Size) {
			return r.Outside + uint32(id) - r.Inside, true
		}
	}
	return 0, false
}

// foreign names the interfaces that could carry something out. A kernel with
// tunnel modules loaded gives every network namespace a few dead ones; without
// capabilities nobody inside can bring them up.
func foreign(links []link) []string {
	var names []string
	for _, l := range links {
		if !l.Loopback && (l.Up || len(l.Addresses) > 0) {
			names = append(names, l.Name)
		}
	}
	if !slices.ContainsFunc(links, func(l link) bool { return l.Loopback && l.Up }) {
		names = append(names, "no loopback that is up")
	}
	return names
}

// write tells how writing at path went.
func (f *facts) write(p string) string {
	if f.ReadOnly[p] {
		return f.Writes[p] + " on a read-only mount"
	}
	return f.Writes[p] + " on a writable mount"
}

func (f *facts) sealed(p string) bool {
	return f.ReadOnly[p] && refusals[f.Writes[p]]
}

// refusals are the answers to a try to write that mean no. Anything else, and
// first of all a path that does not exist, means that nothing was proved.
var refusals = map[string]bool{"EROFS": true, "EACCES": true}

// judgeMounts describes the mounts for the record and returns what is wrong
// with them. A mount that is not read-only needs no permission where this user
// cannot write anything: Podman leaves a few of those.
func judgeMounts(f facts, o Order) (all []contract.Mount, wrong []string) {
	for _, m := range f.Mounts {
		c := contract.Mount{
			Point:    m.Point,
			Type:     m.Type,
			ReadOnly: m.ReadOnly,
			Allowed:  o.allows(m.Point),
			Writable: f.Writable[m.ID],
		}
		switch {
		case m.ReadOnly || c.Allowed || harmless[m.Type] == m.Point:
		case kernel[m.Type]:
			wrong = append(wrong, fmt.Sprintf("%s (%s)", m.Point, m.Type))
		default:
			for _, p := range c.Writable {
				wrong = append(wrong, fmt.Sprintf("%s (in %s)", p, m.Point))
			}
		}
		if len(c.Writable) > maxList {
			c.Writable = c.Writable[:maxList]
		}
		all = append(all, c)
	}
	return all, wrong
}

// kernel lists the file systems that are interfaces of the kernel. A writable
// mount of them is judged by its place alone: writing there is not about files.
var kernel = map[string]bool{"proc": true, "sysfs": true, "cgroup": true, "cgroup2": true, "devpts": true, "mqueue": true}

// harmless is where each may be writable. What must not be reached below /proc
// is a check of its own.
var harmless = map[string]string{"proc": "/proc", "devpts": "/dev/pts", "mqueue": "/dev/mqueue"}

// exposed lists the kernel's interfaces that are neither hidden nor read-only,
// as their kind demands.
func exposed(shields []shield) []string {
	var got []string
	for _, s := range shields {
		switch {
		case slices.Contains(masked, s.Path) && !s.Masked:
			got = append(got, s.Path+" is not masked")
		case !s.Masked && !s.ReadOnly:
			got = append(got, s.Path+" is writable")
		}
	}
	return got
}

// device is a device node or what a mount put in its place.
type device = contract.Device

// standard are the nodes that the OCI runtime puts into every container. Their
// numbers count, not their names: a disk could be called /dev/null.
var standard = []device{
	{Path: "/dev/null", Major: 1, Minor: 3}, {Path: "/dev/zero", Major: 1, Minor: 5}, {Path: "/dev/full", Major: 1, Minor: 7},
	{Path: "/dev/random", Major: 1, Minor: 8}, {Path: "/dev/urandom", Major: 1, Minor: 9},
	{Path: "/dev/tty", Major: 5, Minor: 0}, {Path: "/dev/pts/ptmx", Major: 5, Minor: 2},
}

// extra lists the devices that are neither standard nor ordered. The null
// device may be anywhere, since Podman hides kernel files behind it.
func extra(found []device, ordered []string) []string {
	var got []string
	for _, d := range found {
		if d.Major == 1 && d.Minor == 3 || slices.Contains(standard, d) || slices.Contains(ordered, d.Path) {
			continue
		}
		got = append(got, fmt.Sprintf("%s (%d:%d)", d.Path, d.Major, d.Minor))
	}
	return got
}

func without(found, allowed []string) []string {
	return slices.DeleteFunc(slices.Clone(found), func(s string) bool { return slices.Contains(allowed, s) })
}
