package sandbox

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/resultity/node/internal/bridge/contract"
)

const status = "Name:\tbridge\nUid:\t65534\t65534\t65534\t65534\nCapInh:\t0000000000000000\nCapPrm:\t0000000000000000\n" +
	"CapEff:\t0000000000000000\nCapBnd:\t0000000000000000\nCapAmb:\t0000000000000000\nNoNewPrivs:\t1\nSeccomp:\t2\nSeccomp_filters:\t1\n"

const dev = "Inter-|   Receive\n face |bytes\n    lo:       0       0\n"

const (
	route  = "Iface\tDestination\tGateway\n"
	route6 = "00000000000000000000000000000001 80 00000000000000000000000000000000 00 00000000000000000000000000000000 00000000 00000002 00000000 80200001       lo\n"
)

func look(t *testing.T, status, dev string) (*Outside, error) {
	t.Helper()
	return lookAt(t, map[string]string{"7/status": status, "7/net/dev": dev, "7/net/route": route, "7/net/ipv6_route": route6, "7/cgroup": "0::/user.slice/runtime\n"})
}

func lookAt(t *testing.T, files map[string]string) (*Outside, error) {
	t.Helper()
	proc := t.TempDir()
	for _, dir := range []string{"7/net", "7/ns", "self/ns"} {
		if err := os.MkdirAll(filepath.Join(proc, dir), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	for _, ns := range namespaces {
		if err := errors.Join(os.Symlink(ns+":[2]", filepath.Join(proc, "7/ns", ns)), os.Symlink(ns+":[1]", filepath.Join(proc, "self/ns", ns))); err != nil {
			t.Fatal(err)
		}
	}
	for name, text := range files {
		if err := os.WriteFile(filepath.Join(proc, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return Look(proc, 7)
}

func sealed() *contract.Sandbox {
	s := &contract.Sandbox{
		Version: contract.Version, OK: true, UID: 1000, Checks: []contract.Check{{Name: "seccomp", Want: "2", Got: "2", OK: true}}, Namespaces: map[string]string{},
		Mounts: []contract.Mount{
			{Point: "/models", Type: "ext4", ReadOnly: true}, {Point: "/tmp", Type: "tmpfs"}, {Point: "/", Type: "overlay", ReadOnly: true},
			{Point: "/etc/hosts", Type: "tmpfs", ReadOnly: true}, {Point: "/proc/keys", Type: "tmpfs", ReadOnly: true}, {Point: "/usr/lib/libcuda.so.1", Type: "ext4", ReadOnly: true},
		},
	}
	for _, ns := range namespaces {
		s.Namespaces[ns] = ns + ":[2]"
	}
	return s
}

// order is what sealed has, with a path over a link of the image's.
func order() Order {
	return Order{Mounts: map[string]bool{"/models": true, "/tmp": false}, Others: []string{"/lib/libcuda.so.1"}}
}

func TestSealed(t *testing.T) {
	o, err := look(t, status, dev)
	if err != nil {
		t.Fatal(err)
	}
	if err := Check(o, sealed(), order(), 993); err != nil {
		t.Error(err)
	}
}

func TestEachDifferenceIsRefused(t *testing.T) {
	for _, c := range []struct {
		name, from, to, dev, want string
		inside                    func(*contract.Sandbox)
	}{
		{"agent's user", "65534\t65534\t65534\t65534", "65534\t993\t65534\t65534", "", "none may be the agent's", nil},
		{"root", "65534\t65534\t65534\t65534", "0\t0\t0\t0", "", "or root", nil},
		{"effective capability", "CapEff:\t0000000000000000", "CapEff:\t0000000000000400", "", "CapEff", nil},
		{"bounding capability", "CapBnd:\t0000000000000000", "CapBnd:\t00000000800405fb", "", "CapBnd", nil},
		{"privileges", "NoNewPrivs:\t1", "NoNewPrivs:\t0", "", "no-new-privileges", nil},
		{"no seccomp", "Seccomp:\t2", "Seccomp:\t0", "", "seccomp mode 0", nil},
		{"an interface", "", "", dev + "  eth0: 1 1\n", "eth0", nil},
		{"inside failed", "", "", "", "inside: seccomp is 0, want 2", func(s *contract.Sandbox) { s.OK, s.Checks[0].OK, s.Checks[0].Got = false, false, "0" }},
		{"inside failed but says ok", "", "", "", "inside: seccomp", func(s *contract.Sandbox) { s.Checks[0].OK = false }},
		{"inside says no", "", "", "", "without a failed check", func(s *contract.Sandbox) { s.OK = false }},
		{"no checks", "", "", "", "without checks", func(s *contract.Sandbox) { s.Checks = nil }},
		{"other version", "", "", "", "version 9", func(s *contract.Sandbox) { s.Version = 9 }},
		{"the agent's namespace", "", "", "", "net namespace is the agent's", func(s *contract.Sandbox) { s.Namespaces["net"] = "net:[1]" }},
		{"another namespace", "", "", "", "pid namespace is pid:[3], outside pid:[2]", func(s *contract.Sandbox) { s.Namespaces["pid"] = "pid:[3]" }},
		{"no namespace", "", "", "", "uts namespace is not told", func(s *contract.Sandbox) { delete(s.Namespaces, "uts") }},
		{"one more mount", "", "", "", "type nfs is mounted at /host, which nobody ordered", func(s *contract.Sandbox) {
			s.Mounts = append(s.Mounts, contract.Mount{Point: "/host", Type: "nfs", ReadOnly: true})
		}},
		{"no model", "", "", "", "0 mounts at /models", func(s *contract.Sandbox) { s.Mounts = s.Mounts[1:] }},
		{"mounted over", "", "", "", "2 mounts at /models", func(s *contract.Sandbox) { s.Mounts = append(s.Mounts, s.Mounts[0]) }},
		{"writable model", "", "", "", "/models is mounted writable, want read-only", func(s *contract.Sandbox) { s.Mounts[0].ReadOnly = false }},
		{"read-only tmpfs", "", "", "", "/tmp is mounted read-only, want writable", func(s *contract.Sandbox) { s.Mounts[1].ReadOnly = true }},
		{"root inside", "", "", "", "root of its namespace", func(s *contract.Sandbox) { s.UID = 0 }},
	} {
		d := c.dev
		if d == "" {
			d = dev
		}
		o, err := look(t, strings.Replace(status, c.from, c.to, 1), d)
		if err != nil {
			t.Fatal(err)
		}
		in := sealed()
		if c.inside != nil {
			c.inside(in)
		}
		err = Check(o, in, order(), 993)
		t.Logf("%s: expected: %s; got: %v", c.name, c.want, err)
		if !errors.Is(err, ErrNotSealed) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want ErrNotSealed with %q", c.name, err, c.want)
		}
	}
}

// A host with tunnel modules loaded is as sealed as another.
func TestFallbackDevicesAreFine(t *testing.T) {
	o, err := look(t, status, dev+"  sit0: 0 0\n tunl0: 0 0\n")
	if err != nil {
		t.Fatal(err)
	}
	if err := Check(o, sealed(), order(), 993); err != nil {
		t.Error(err)
	}
}

func TestARouteIsRefused(t *testing.T) {
	for i, c := range [][2]string{
		{route + "sit0\t00000000\t00000000\n", route6},
		{route, route6 + strings.Replace(route6, "lo", "sit0", 1)},
	} {
		o, err := lookAt(t, map[string]string{"7/status": status, "7/net/dev": dev, "7/net/route": c[0], "7/net/ipv6_route": c[1], "7/cgroup": "0::/\n"})
		if err != nil {
			t.Fatal(err)
		}
		err = Check(o, sealed(), order(), 993)
		t.Logf("of IPv%d: expected: %v: sit0; got: %v", 4+2*i, ErrNotSealed, err)
		if !errors.Is(err, ErrNotSealed) || !strings.Contains(err.Error(), "sit0") {
			t.Errorf("%v, want ErrNotSealed with sit0", err)
		}
	}
}

// A list that is too long is refused, and not cut: the route out could stand at its end.
func TestLongListIsRefused(t *testing.T) {
	line := "lo\t" + strings.Repeat("0", 1020) + "\n" // of 1 KiB
	loops := strings.Repeat(line, maxProc/len(line)-1)
	loops += "lo\t" + strings.Repeat("0", maxProc-len(route)-len(loops)-len("lo\t\n")) + "\n"
	for more, want := range map[string]bool{"": true, "sit0\t00000000\t00000000\n": false} {
		_, err := lookAt(t, map[string]string{"7/status": status, "7/net/dev": dev, "7/net/route": route + loops + more, "7/net/ipv6_route": route6, "7/cgroup": "0::/\n"})
		t.Logf("%d bytes: expected: at most %d are taken; got: %v", len(route+loops+more), maxProc, err)
		if (err == nil) != want {
			t.Errorf("%d bytes: %v", len(route+loops+more), err)
		}
	}
}

func TestLookRefusesGarbage(t *testing.T) {
	for _, s := range []string{"", "Uid:\tx\n", "Uid:\t1 1\n", "Seccomp:\tx\n"} {
		o, err := look(t, s, dev)
		t.Logf("status %q: expected: an error; got: %v", s, err)
		if err == nil {
			t.Errorf("status %q: %+v, want an error", s, o)
		}
	}
}

func TestCeilingIsTheLowest(t *testing.T) {
	for _, c := range []struct {
		files map[string]string
		want  int64
	}{
		{nil, 0},
		{map[string]string{"a/memory.max": "max\n", "a/b/memory.max": "5000\n"}, 5000},
		{map[string]string{"a/memory.max": "4000\n", "a/b/memory.max": "5000\n", "a/b/c/memory.max": "max\n"}, 4000},
	} {
		proc, groups := t.TempDir(), t.TempDir()
		write := func(name, text string) {
			if err := errors.Join(os.MkdirAll(filepath.Dir(name), 0o700), os.WriteFile(name, []byte(text), 0o600)); err != nil {
				t.Fatal(err)
			}
		}
		write(filepath.Join(proc, "7/cgroup"), "4:memory:/x\n0::/a/b/c\n")
		for name, text := range c.files {
			write(filepath.Join(groups, name), text)
		}
		if got, err := Ceiling(proc, groups, 7); err != nil || got != c.want {
			t.Errorf("%v: %d, %v", c.files, got, err)
		}
		write(filepath.Join(groups, "a/memory.max"), "much\n")
		if got, err := Ceiling(proc, groups, 7); err == nil {
			t.Errorf("garbage: %d", got)
		}
	}
}
