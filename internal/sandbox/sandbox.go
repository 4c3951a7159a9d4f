// Package sandbox owns the outside view of the runtime's container: what the
// kernel says of its first process, seen from the agent.
//
// The rule it keeps: a container counts as sealed only when both views, this
// one and the record that the bridge made inside, say so and agree.
package sandbox

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/resultity/node/internal/bridge/contract"
	"github.com/resultity/node/internal/sandbox/record"
)

// ErrNotSealed says that the effective state of the container differs from the
// rules. The text names every difference.
var ErrNotSealed = errors.New("the runtime is not sealed")

// Outside is what the agent can see of a process of another user.
type Outside struct {
	PID        int
	UIDs       []int    // real, effective, saved and file system user, in the agent's user namespace
	Caps       []string // names of capability sets that are not empty
	NoNewPrivs bool
	Seccomp    int // 2: filtered
	Interfaces []string
	Routes     []string // interfaces other than lo that something is routed over
	Cgroup     string   // path in the unified hierarchy, "" without one

	// Namespaces are those of the process as far as the agent may see them, and
	// Own the agent's: "net" to "net:[4026532000]", and so on.
	Namespaces, Own map[string]string
}

// Record is what a record holds of it, with the ceiling of its memory.
func (o *Outside) Record(memory int64) record.Outside {
	return record.Outside{
		UIDs: o.UIDs, Capabilities: o.Caps, NoNewPrivs: o.NoNewPrivs, Seccomp: o.Seccomp, Interfaces: o.Interfaces, Routes: o.Routes,
		Namespaces: o.Namespaces, Cgroup: o.Cgroup, Memory: memory,
	}
}

// Order is what the record's mounts are compared with.
type Order struct {
	Mounts map[string]bool // places of what was ordered: whether it is read-only
	Others []string        // paths that ordered devices bring along
}

// namespaces are those that a container has of its own.
var namespaces = []string{"cgroup", "ipc", "mnt", "net", "pid", "user", "uts"}

// fallback are the devices that the kernel puts into every new network namespace
// where the modules of tunnels are loaded. They are down, lead nowhere, and
// whoever has no capabilities cannot change that.
var fallback = []string{"tunl0", "gre0", "gretap0", "erspan0", "ip_vti0", "ip6_vti0", "sit0", "ip6tnl0", "ip6gre0"}

// Look reads the state of pid from the /proc at proc.
func Look(proc string, pid int) (*Outside, error) {
	dir := filepath.Join(proc, strconv.Itoa(pid))
	o := &Outside{PID: pid}
	err := lines(filepath.Join(dir, "status"), func(line string) error {
		name, value, _ := strings.Cut(line, ":")
		value = strings.TrimSpace(value)
		switch name {
		case "Uid":
			for f := range strings.FieldsSeq(value) {
				n, err := strconv.Atoi(f)
				if err != nil {
					return fmt.Errorf("field Uid: %w", err)
				}
				o.UIDs = append(o.UIDs, n)
			}
		case "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb":
			if strings.Trim(value, "0") != "" {
				o.Caps = append(o.Caps, name)
			}
		case "NoNewPrivs":
			o.NoNewPrivs = value == "1"
		case "Seccomp":
			n, err := strconv.Atoi(value)
			if err != nil {
				return fmt.Errorf("field Seccomp: %w", err)
			}
			o.Seccomp = n
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	n := 0
	err = lines(filepath.Join(dir, "net/dev"), func(line string) error {
		if n++; n <= 2 {
			return nil // two lines of headings
		}
		name, _, _ := strings.Cut(line, ":")
		o.Interfaces = append(o.Interfaces, strings.TrimSpace(name))
		return nil
	})
	if err != nil {
		return nil, err
	}
	if o.Routes, err = routes(dir); err != nil {
		return nil, err
	}
	if o.Cgroup, err = cgroup(dir); err != nil {
		return nil, err
	}
	o.Namespaces, o.Own = make(map[string]string), make(map[string]string)
	for _, ns := range namespaces {
		if o.Own[ns], err = os.Readlink(filepath.Join(proc, "self/ns", ns)); err != nil {
			return nil, err
		}
		// The kernel lets nobody see this from a user namespace beside the
		// container's, which is what the agent's sandbox has.
		switch target, err := os.Readlink(filepath.Join(dir, "ns", ns)); {
		case err == nil:
			o.Namespaces[ns] = target
		case !errors.Is(err, fs.ErrPermission):
			return nil, err
		}
	}
	if len(o.UIDs) != 4 {
		return nil, fmt.Errorf("%s: no Uid line", dir)
	}
	return o, nil
}

// routes lists the interfaces other than lo in the routing tables.
func routes(dir string) ([]string, error) {
	var over []string
	add := func(name string) {
		if name != "lo" && !slices.Contains(over, name) {
			over = append(over, name)
		}
	}
	n := 0
	err := lines(filepath.Join(dir, "net/route"), func(line string) error {
		if f := strings.Fields(line); n > 0 && len(f) > 0 {
			add(f[0])
		}
		n++ // the first line is headings
		return nil
	})
	if err != nil && !errors.Is(err, fs.ErrNotExist) { // a kernel without IPv4
		return nil, err
	}
	err = lines(filepath.Join(dir, "net/ipv6_route"), func(line string) error {
		if f := strings.Fields(line); len(f) > 0 {
			add(f[len(f)-1])
		}
		return nil
	})
	if err != nil && !errors.Is(err, fs.ErrNotExist) { // or without IPv6
		return nil, err
	}
	return over, nil
}

// cgroup returns the path in the unified hierarchy.
func cgroup(dir string) (group string, err error) {
	err = lines(filepath.Join(dir, "cgroup"), func(line string) error {
		if g, ok := strings.CutPrefix(line, "0::"); ok {
			group = path.Clean(g)
		}
		return nil
	})
	return group, err
}

// maxProc bounds one file of /proc, in bytes. A longer one is refused: what stands at
// its end may be what matters.
const maxProc = 1 << 20

func lines(name string, f func(string) error) error {
	file, err := os.Open(name)
	if err != nil {
		return err
	}
	defer file.Close() // read only: nothing to lose
	rest := &io.LimitedReader{R: file, N: maxProc + 1}
	s := bufio.NewScanner(rest)
	for s.Scan() {
		if err := f(s.Text()); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	if rest.N <= 0 {
		return fmt.Errorf("%s: more than %d bytes", name, maxProc)
	}
	return s.Err()
}

// Check compares both views with the rules, with each other and with what was
// ordered. agent is the user that the agent runs as; it must not be the
// container's.
func Check(out *Outside, in *contract.Sandbox, order Order, agent int) error {
	var bad []string
	fail := func(format string, a ...any) { bad = append(bad, fmt.Sprintf(format, a...)) }
	if slices.Contains(out.UIDs, agent) || slices.Contains(out.UIDs, 0) {
		fail("outside: its users are %v, none may be the agent's (%d) or root", out.UIDs, agent)
	}
	if len(out.Caps) > 0 {
		fail("outside: capabilities in %s, want none", strings.Join(out.Caps, " "))
	}
	if !out.NoNewPrivs {
		fail("outside: no-new-privileges is off")
	}
	if out.Seccomp != 2 {
		fail("outside: seccomp mode %d, want 2 (filter)", out.Seccomp)
	}
	for _, i := range out.Interfaces {
		if i != "lo" && !slices.Contains(fallback, i) {
			fail("outside: network interface %s, want lo alone", i)
		}
	}
	if len(out.Routes) > 0 {
		fail("outside: routes over %v, want none", out.Routes)
	}
	switch {
	case in.Version != contract.Version:
		fail("inside: record of version %d, want %d", in.Version, contract.Version)
	case len(in.Checks) == 0:
		fail("inside: a record without checks")
	}
	for _, c := range in.Checks {
		if !c.OK {
			fail("inside: %s is %s, want %s", c.Name, c.Got, c.Want)
		}
	}
	if !in.OK && len(bad) == 0 {
		fail("inside: the record says no, without a failed check")
	}
	if in.UID == 0 {
		fail("inside: runs as root of its namespace")
	}
	for _, ns := range namespaces {
		switch got := in.Namespaces[ns]; {
		case got == "":
			fail("inside: %s namespace is not told", ns)
		case got == out.Own[ns]:
			fail("inside: %s namespace is the agent's", ns)
		case out.Namespaces[ns] != "" && out.Namespaces[ns] != got:
			fail("inside: %s namespace is %s, outside %s", ns, got, out.Namespaces[ns])
		}
	}
	bad = append(bad, checkMounts(in.Mounts, order)...)
	if len(bad) > 0 {
		return fmt.Errorf("%w: %s", ErrNotSealed, strings.Join(bad, "; "))
	}
	return nil
}

// podmans are the places where Podman mounts something of its own into every
// container: devices, and files that it has made for this one. What is below
// /proc and /sys hides files there, and is a check of the bridge's.
var podmans = []string{
	"/", "/proc", "/sys", "/dev", "/dev/pts", "/dev/mqueue", "/dev/shm",
	"/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/tty",
	"/etc/hosts", "/etc/hostname", "/etc/resolv.conf", "/etc/passwd", "/etc/group",
	"/run/.containerenv", "/run/notify", "/run/notify/notify.sock",
	"/run/secrets", // distributions with subscriptions put theirs there
}

// checkMounts compares the mounts that the container has with the ordered ones.
func checkMounts(mounts []contract.Mount, order Order) (bad []string) {
	seen := make(map[string]int)
	for _, m := range mounts {
		readOnly, ordered := order.Mounts[m.Point]
		switch {
		case ordered:
			if seen[m.Point]++; m.ReadOnly != readOnly {
				bad = append(bad, fmt.Sprintf("inside: %s is mounted %s, want %s", m.Point, mode(m.ReadOnly), mode(readOnly)))
			}
		// A path of a device's may lead over links of the image; its name stays.
		case slices.Contains(podmans, m.Point), slices.ContainsFunc(order.Others, func(p string) bool { return path.Base(p) == path.Base(m.Point) }),
			strings.HasPrefix(m.Point, "/proc/"), strings.HasPrefix(m.Point, "/sys/"):
		default:
			bad = append(bad, fmt.Sprintf("inside: something of type %s is mounted at %s, which nobody ordered", m.Type, m.Point))
		}
	}
	for place := range order.Mounts {
		if n := seen[place]; n != 1 {
			bad = append(bad, fmt.Sprintf("inside: %d mounts at %s, want one", n, place))
		}
	}
	slices.Sort(bad)
	return bad
}

func mode(readOnly bool) string {
	if readOnly {
		return "read-only"
	}
	return "writable"
}

// Ceiling returns the lowest memory.max that process pid is under, in bytes, 0
// for none. proc is /proc, groups where the unified hierarchy is mounted.
func Ceiling(proc, groups string, pid int) (lowest int64, err error) {
	group, err := cgroup(filepath.Join(proc, strconv.Itoa(pid)))
	if err != nil {
		return 0, err
	}
	for ; path.IsAbs(group) && group != "/"; group = path.Dir(group) {
		err := lines(filepath.Join(groups, group, "memory.max"), func(line string) error {
			if line == "max" {
				return nil
			}
			n, err := strconv.ParseInt(line, 10, 64)
			if err == nil && (lowest == 0 || n < lowest) {
				lowest = n
			}
			return err
		})
		if err != nil && !errors.Is(err, fs.ErrNotExist) { // where the controller is off there is no such file
			return 0, err
		}
	}
	return lowest, nil
}
