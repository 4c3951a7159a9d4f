package sandbox

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/resultity/node/internal/bridge/contract"
	"github.com/resultity/node/internal/bridge/internal/sealtest"
)

func TestMain(m *testing.M) {
	sealtest.Main()
	switch {
	case os.Getenv(childVar) != "":
		confinedChild()
	case os.Getenv(boundVar) != "":
		boundChild()
	case len(os.Args) == 3 && os.Args[1] == inspector:
		inspect(os.Args[2])
	case len(os.Args) == 2 && os.Args[1] == collector:
		json.NewEncoder(os.Stdout).Encode(look(Order{ReadOnly: podmanOrder().ReadOnly}, false))
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// inspector is the first argument of the test binary as the container's
// program, which prints what it finds.
const inspector = "inspect"

// collector makes the files in testdata: build this package's test binary
// without cgo and run it with this argument in the container of podmanOrder.
const collector = "collect"

func inspect(order string) {
	var o Order
	if err := json.Unmarshal([]byte(order), &o); err != nil {
		panic(err)
	}
	json.NewEncoder(os.Stdout).Encode(Inspect(o))
	os.Exit(0)
}

// ordered is what the containers of these tests are checked against.
func ordered() Order {
	return Order{
		Writable:  []string{"/tmp", "/dev/shm"},
		SocketDir: "/run/resultity",
		ReadOnly:  []string{"/models", "/models/model.gguf"},
		Sockets:   []string{"/run/notify/notify.sock"},
	}
}

// inBox inspects a container with the given flaws.
func inBox(t *testing.T, o Order, flaws ...sealtest.Flaw) contract.Sandbox {
	t.Helper()
	order, err := json.Marshal(o)
	if err != nil {
		t.Fatal(err)
	}
	var stdout, stderr bytes.Buffer
	b := sealtest.Start(t, sealtest.Container{Args: []string{inspector, string(order)}, Flaws: flaws, Stdout: &stdout, Stderr: &stderr})
	if code := b.Wait(); code != 0 {
		t.Fatalf("ended with %d: %s", code, &stderr)
	}
	var s contract.Sandbox
	if err := json.Unmarshal(stdout.Bytes(), &s); err != nil {
		t.Fatalf("%v in %q", err, &stdout)
	}
	return s
}

func failed(s contract.Sandbox) []string {
	var names []string
	for _, c := range s.Checks {
		if !c.OK {
			names = append(names, c.Name)
		}
	}
	return names
}

func TestInspectAcceptsASealedContainer(t *testing.T) {
	s := inBox(t, ordered())
	if !s.OK {
		t.Errorf("refused:\n%s", strings.Join(Failed(s), "\n"))
	}
	if s.Version != contract.Version || s.UID != sealtest.User || s.GID != sealtest.User || len(s.UIDMap) != 1 {
		t.Errorf("record of %+v", s)
	}
	if s.Landlock < oldestLandlock {
		t.Errorf("Landlock %d", s.Landlock)
	}
	if net, ours := s.Namespaces["net"], readlink(t, "/proc/self/ns/net"); net == ours || !strings.HasPrefix(net, "net:[") {
		t.Errorf("network namespace %q, outside %q", net, ours)
	}
	i := slices.IndexFunc(s.Mounts, func(m contract.Mount) bool { return m.Point == "/models" })
	if i < 0 || !s.Mounts[i].ReadOnly || s.Mounts[i].Allowed || s.Mounts[i].Type != "tmpfs" {
		t.Errorf("/models is not as expected in %+v", s.Mounts)
	}
}

func readlink(t *testing.T, p string) string {
	t.Helper()
	s, err := os.Readlink(p)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// Each flaw must be seen, and by the check that is there for it.
func TestInspectRefuses(t *testing.T) {
	for _, tt := range []struct {
		flaw sealtest.Flaw
		want []string
		got  string // part of what the first of them says
	}{
		{sealtest.SecondProcess, []string{"process"}, ""},
		{sealtest.RootUser, []string{"user", "group", "mounts"}, "0 (effective 0"},
		{sealtest.IdentityMap, []string{"user mapping", "group mapping"}, "1000 is 1000 outside"},
		{sealtest.AccountMap, []string{"user mapping", "group mapping"}, "1000 is 0 outside"},
		{sealtest.KeptBounding, []string{"capabilities"}, "CapBnd"},
		{sealtest.KeptAmbient, []string{"capabilities"}, "CapAmb"},
		{sealtest.NewPrivileges, []string{"inspection", "no new privileges"}, "landlock: operation not permitted"},
		{sealtest.NoFilter, []string{"system call filter"}, "0"},
		{sealtest.Interface, []string{"interfaces", "routes"}, "leak0"},
		{sealtest.DefaultRoute, []string{"interfaces", "routes", "reachable addresses"}, "leak0"},
		{sealtest.NoLoopback, []string{"interfaces"}, "no loopback"},
		{sealtest.WritableRoot, []string{"root"}, "possible on a writable mount"},
		{sealtest.WritableModels, []string{"read-only /models", "read-only /models/model.gguf", "mounts"}, "possible"},
		{sealtest.NoModels, []string{"read-only /models", "read-only /models/model.gguf"}, "missing"},
		{sealtest.WritableMount, []string{"mounts"}, "/extra (in /extra)"},
		{sealtest.HiddenWritable, []string{"mounts"}, "/extra/a/b (in /extra)"},
		{sealtest.WritableFile, []string{"mounts"}, "/etc/hosts"},
		{sealtest.UnlistedTmpfs, []string{"mounts"}, "/var/tmp"},
		{sealtest.Unmasked, []string{"kernel interfaces"}, "/proc/keys is not masked"},
		{sealtest.WritableProcSys, []string{"kernel interfaces"}, "/proc/sys is writable"},
		{sealtest.WritableSys, []string{"mounts", "kernel interfaces"}, "/sys (sysfs)"},
		{sealtest.ExtraDevice, []string{"devices"}, "/dev/fuse (10:229)"},
		{sealtest.FakeDevice, []string{"devices"}, "/dev/zero (10:229)"},
		{sealtest.MountedDevice, []string{"devices"}, "/extra (10:229)"},
		{sealtest.ForeignSocket, []string{"sockets and pipes"}, "/models/host.sock"},
		{sealtest.AbstractSocket, []string{"processes", "sockets and pipes"}, "user 0"}, // whose holder is the builder's
		{sealtest.NamedPipe, []string{"sockets and pipes"}, "/models/pipe"},
		{sealtest.InheritedFile, []string{"descriptors"}, "9 ("},
		{sealtest.OutsideWorkDir, []string{"working directory"}, "(unreachable)"},
		{sealtest.ProxyVariable, []string{"proxy variables"}, "https_proxy"},
	} {
		t.Run(string(tt.flaw), func(t *testing.T) {
			t.Parallel()
			s := inBox(t, ordered(), tt.flaw)
			t.Logf("expected: %q; got: %.200q", tt.want, Failed(s))
			if got := failed(s); s.OK || !slices.Equal(got, tt.want) {
				t.Fatalf("OK is %v and these failed: %q, want %q\n%s", s.OK, got, tt.want, strings.Join(Failed(s), "\n"))
			}
			if first := Failed(s)[0]; !strings.Contains(first, tt.got) {
				t.Errorf("says %q, want %q in it", first, tt.got)
			}
			if strings.Contains(strings.Join(Failed(s), ""), "secret") {
				t.Error("tells the value of a variable")
			}
		})
	}
}

// A mount that nobody inside can reach says nothing.
func TestInspectAcceptsUnreachableMount(t *testing.T) {
	if s := inBox(t, ordered(), sealtest.UnreachableMount); !s.OK {
		t.Errorf("refused: %q", Failed(s))
	}
}

func TestInspectAcceptsWhatWasOrdered(t *testing.T) {
	for _, tt := range []struct {
		flaw  sealtest.Flaw
		allow func(*Order)
	}{
		{sealtest.ExtraDevice, func(o *Order) { o.Devices = []string{"/dev/fuse"} }},
		{sealtest.ForeignSocket, func(o *Order) { o.Devices = []string{"/models/host.sock"} }},
		{sealtest.UnlistedTmpfs, func(o *Order) { o.Writable = append(o.Writable, "/var/tmp") }},
	} {
		o := ordered()
		tt.allow(&o)
		if s := inBox(t, o, tt.flaw); !s.OK {
			t.Errorf("%s, although ordered: %q", tt.flaw, Failed(s))
		}
	}
}

// The facts in testdata were collected by this package in real containers,
// under the Podman that the file is named after. They hold what the containers
// of the other tests cannot imitate.
func TestJudgeAcceptsPodman(t *testing.T) {
	files, err := filepath.Glob("testdata/podman-*.json")
	if err != nil || len(files) < 2 {
		t.Fatalf("%d files (%v)", len(files), err)
	}
	for _, file := range files {
		f := golden(t, file)
		s := judge(f, podmanOrder())
		if !s.OK {
			t.Errorf("%s: %q", file, Failed(s))
		}
		// Podman's own temporary directory is refused unless ordered.
		o := podmanOrder()
		o.Writable = slices.DeleteFunc(o.Writable, func(p string) bool { return p == "/var/tmp" })
		if got := failed(judge(f, o)); !slices.Equal(got, []string{"mounts"}) {
			t.Errorf("%s without /var/tmp: %q failed, want mounts", file, got)
		}
	}
}

func podmanOrder() Order {
	return Order{
		Writable:  []string{"/tmp", "/var/tmp", "/dev/shm"},
		SocketDir: "/run/resultity",
		ReadOnly:  []string{"/models"},
		Sockets:   []string{"/run/notify/notify.sock"},
	}
}

func golden(t *testing.T, file string) facts {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var f facts
	if err := json.Unmarshal(b, &f); err != nil {
		t.Fatalf("%s: %v", file, err)
	}
	return f
}

// What the containers of these tests cannot be made to have.
func TestJudgeRefuses(t *testing.T) {
	for _, tt := range []struct {
		want  string
		spoil func(*facts)
	}{
		{"inspection", func(f *facts) { f.Problems = []string{"unreadable"} }},
		{"socket families", func(f *facts) { f.Families = []string{"40"} }},
		{"processes", func(f *facts) { f.Processes = []string{"process 7: seccomp mode 0"} }},
		{"engine's writes", func(f *facts) { f.Landlock, f.Engine = 7, "possible" }},
		{"system calls", func(f *facts) { f.Calls = []string{"unshare (errno 0)"} }},
		{"reachable addresses", func(f *facts) { f.Reachable = []string{"192.0.2.1:9"} }},
		{"user", func(f *facts) { f.Status.UID[2] = 0 }},
		{"group", func(f *facts) { f.Status.GID[1] = 0 }},
		{"user mapping", func(f *facts) { f.UIDMap = nil }},
		{"system call filter", func(f *facts) { f.Status.Seccomp = "1" }},
		{"mounts", func(f *facts) {
			f.Mounts = append(f.Mounts, mount{ID: 9999, Point: "/sys/fs/cgroup", Type: "cgroup2"})
		}},
		{"mounts", func(f *facts) { f.Mounts = append(f.Mounts, mount{ID: 9999, Point: "/host/proc", Type: "proc"}) }},
		{"root", func(f *facts) { f.Writes["/"] = "file name too long" }},
		{"root", func(f *facts) { f.ReadOnly["/"] = false }},
		{"read-only /models", func(f *facts) { f.Writes["/models"] = "possible" }},
	} {
		f := golden(t, "testdata/podman-5.8.6.json")
		tt.spoil(&f)
		s := judge(f, podmanOrder())
		t.Logf("%s: expected: %s; got: %.200q", tt.want, tt.want, Failed(s))
		if got := failed(s); !slices.Equal(got, []string{tt.want}) {
			t.Errorf("%q failed, want %s alone", got, tt.want)
		}
	}
}

// A container can hold any number of things; its record does not. What is left out
// of a list has failed its check all the same.
func TestRecordIsBounded(t *testing.T) {
	for _, more := range []int{0, 1} {
		f := golden(t, "testdata/podman-5.8.6.json")
		f.Devices, f.Processes, f.Mounts = nil, nil, append(f.Mounts, mount{ID: 9999, Point: "/extra", Type: "ext4"})
		for i := range contract.MaxDevices + more {
			f.Devices = append(f.Devices, device{Path: "/dev/x", Major: 9, Minor: uint32(i)})
		}
		for i := range maxList + more {
			f.Processes = append(f.Processes, fmt.Sprintf("process %d", i))
			f.Writable[9999] = append(f.Writable[9999], fmt.Sprintf("/extra/%d", i))
		}
		s := judge(f, podmanOrder())
		if got := failed(s); !slices.Equal(got, []string{"processes", "mounts", "devices"}) {
			t.Errorf("failed: %q", got)
		}
		said := Failed(s)[0]
		if m := s.Mounts[len(s.Mounts)-1]; len(s.Devices) != contract.MaxDevices || len(m.Writable) != maxList || strings.Count(said, "process ") != maxList || strings.Contains(said, "and 1 more") != (more == 1) {
			t.Errorf("%d more: %d devices, %d writable, %q", more, len(s.Devices), len(m.Writable), said)
		}
	}
}

// So many files are looked at, and one more has the inspection fail.
func TestWalkIsBounded(t *testing.T) {
	dir := t.TempDir()
	for i := range 9 {
		if err := os.WriteFile(filepath.Join(dir, fmt.Sprint(i)), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for before, want := range map[int]string{maxEntries - 10: "", maxEntries - 9: fmt.Sprintf("more than %d files in mounted directories", maxEntries)} {
		e := &eye{entries: before}
		e.walk(mount{Point: dir, ReadOnly: true}, nil, false)
		got := strings.Join(e.Problems, "; ")
		t.Logf("%d files: expected: %q; got: %q", before+10, want, got)
		if !strings.HasSuffix(got, want) || (got == "") != (want == "") {
			t.Errorf("%d files: %q, want %q", before+10, got, want)
		}
	}
}

// boundVar makes the test binary a child that tells what it may have.
const boundVar = "TEST_BOUND_CHILD"

func boundChild() {
	if os.Getenv(boundVar) == "less" {
		limits = map[int]uint64{syscall.RLIMIT_NOFILE: 150, rlimitNproc: 99}
	}
	if err := Bound(); err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	last := 0
	for {
		fd, err := syscall.Open(os.DevNull, syscall.O_RDONLY, 0)
		if err != nil {
			var processes syscall.Rlimit
			failed := syscall.Getrlimit(rlimitNproc, &processes)
			fmt.Printf("%d files, then %v; processes: %d %v", last+1, err, processes.Max, failed)
			os.Exit(0)
		}
		last = fd
	}
}

// The engine gets no more than this, and no more than the bridge itself has. An engine
// that makes processes without end is package hostile's.
func TestBoundLowers(t *testing.T) {
	var files, processes syscall.Rlimit
	if err := errors.Join(syscall.Getrlimit(syscall.RLIMIT_NOFILE, &files), syscall.Getrlimit(rlimitNproc, &processes)); err != nil {
		t.Fatal(err)
	}
	for let, want := range map[string][2]uint64{"all": {min(files.Max, maxDescriptors), min(processes.Max, maxProcesses)}, "less": {150, 99}} {
		cmd := exec.Command("/proc/self/exe")
		cmd.Env = append(os.Environ(), boundVar+"="+let)
		out, err := cmd.CombinedOutput()
		said := fmt.Sprintf("%d files, then %v; processes: %d <nil>", want[0], syscall.EMFILE, want[1])
		t.Logf("expected: %s; got: %s", said, out)
		if err != nil || string(out) != said {
			t.Errorf("%s: %s (%v), want %s", let, out, err, said)
		}
	}
}

// What the kernel did not tell must not pass for sealed.
func TestJudgeRefusesMissingFacts(t *testing.T) {
	s := judge(facts{}, ordered())
	passing := []string{}
	for _, c := range s.Checks {
		if c.OK {
			passing = append(passing, c.Name)
		}
	}
	// These are lists of what was found; that they are complete is the first
	// check, which look fails whenever it could not read something.
	want := []string{"inspection", "processes", "routes", "reachable addresses", "socket families", "system calls", "engine's writes", "mounts", "kernel interfaces", "devices", "sockets and pipes", "descriptors", "proxy variables"}
	t.Logf("expected: all fail but %d lists of what was found; got: %d of %d fail", len(want), len(s.Checks)-len(passing), len(s.Checks))
	if !slices.Equal(passing, want) {
		t.Errorf("with no facts at all these pass: %q, want %q", passing, want)
	}
	if s := judge(facts{Problems: []string{"x"}}, ordered()); s.Checks[0].OK {
		t.Error("a problem passes")
	}
}
