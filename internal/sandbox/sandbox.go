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
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/resultity/node/internal/bridge/contract"
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
}

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

// maxProc bounds what is read of one file of /proc, in bytes.
const maxProc = 1 << 20

func lines(name string, f func(string) error) error {
	file, err := os.Open(name)
	if err != nil {
		return err
	}
	defer file.Close() // read only: nothing to lose
	s := bufio.NewScanner(io.LimitReader(file, maxProc))
	for s.Scan() {
		if err := f(s.Text()); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	return s.Err()
}

// Check compares both views with the rules and with each other. agent is the
// user that the agent runs as; it must not be the container's.
func Check(out *Outside, in *contract.Sandbox, agent int) error {
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
	if len(bad) > 0 {
		return fmt.Errorf("%w: %s", ErrNotSealed, strings.Join(bad, "; "))
	}
	return nil
}
