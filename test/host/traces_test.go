package host

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// envCaller makes the test program one that uses the package and is killed.
const envCaller = "RESULTITY_HOST_TEST_CALLER"

// callers print a line when they have done what they do, and then wait.
var callers = map[string]func(){
	"lab": func() {
		ctx := context.Background()
		l, err := Create(ctx, Options{Reachable: true})
		if err != nil {
			fmt.Println(err)
			return
		}
		h, err := l.Up(ctx, Config{Name: "a"})
		if err != nil {
			fmt.Println(err)
			return
		}
		go func() { fmt.Println(h.Exec(ctx, Cmd{Args: []string{"sleep", "1000"}})) }()
		fmt.Println("is up:", l.Name())
		select {}
	},
	"image": func() {
		fmt.Println(Prepare(context.Background(), os.Stdout, Image{}))
	},
}

// caller starts one of the callers and returns it when it has printed a line
// with certain words, with what follows them.
func caller(t *testing.T, role, words string, env ...string) (cmd *exec.Cmd, rest string) {
	t.Helper()
	cmd = exec.CommandContext(t.Context(), "/proc/self/exe")
	cmd.Env = append(append(os.Environ(), envCaller+"="+role), env...)
	cmd.Stderr = t.Output()
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var seen strings.Builder
	for s := bufio.NewScanner(out); s.Scan(); {
		seen.WriteString(s.Text() + "\n")
		if _, rest, ok := strings.Cut(s.Text(), words); ok {
			return cmd, strings.TrimSpace(rest)
		}
	}
	t.Fatalf("%s: %v; it printed:\n%s", role, cmd.Wait(), seen.String())
	return nil, ""
}

// traces are what a lab has on the machine.
type traces struct {
	dir        string
	links      []string
	cgroups    []cgroup
	processes  map[int]string // process ids with start times
	namespaces map[string]bool
	seen       int64 // when, in the unit of start times
}

// tracesOf finds all of a lab with hosts that run.
func tracesOf(t *testing.T, l *Lab) traces {
	t.Helper()
	tr := traces{dir: l.dir, links: []string{l.fabric().machineLink()}, processes: map[int]string{}, namespaces: map[string]bool{}}
	var st unix.Stat_t
	if err := unix.Stat(string(l.fabric()), &st); err != nil {
		t.Fatal(err)
	}
	tr.namespaces[fmt.Sprintf("net:[%d]", st.Ino)] = true
	hosts, err := l.Hosts()
	if err != nil {
		t.Fatal(err)
	}
	tr.seen = now(t)
	own := ownNamespaces(t)
	for _, h := range hosts {
		cg := cgroupOf(h.dir)
		tr.cgroups = append(tr.cgroups, cg)
		for _, p := range processes(t) {
			if !cg.holds(p) {
				continue
			}
			tr.processes[p] = startTime(fmt.Sprintf("/proc/%d", p))
			for _, ns := range namespacesOf(fmt.Sprintf("/proc/%d", p)) {
				if !own[ns] {
					tr.namespaces[ns] = true
				}
			}
		}
	}
	return tr
}

// left returns what is still there.
func (tr traces) left(t *testing.T) []string {
	t.Helper()
	var left []string
	if _, err := os.Lstat(tr.dir); !errors.Is(err, fs.ErrNotExist) {
		left = append(left, "directory "+tr.dir)
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(mounts)) {
		if strings.Contains(line, tr.dir) {
			left = append(left, "mount "+line)
		}
	}
	present := links(t)
	for _, name := range tr.links {
		if present[name] {
			left = append(left, "interface "+name)
		}
	}
	root, err := cgroups()
	if err != nil {
		t.Fatal(err)
	}
	for _, cg := range tr.cgroups {
		if _, err := root.Stat(string(cg)); !errors.Is(err, fs.ErrNotExist) {
			left = append(left, "cgroup "+string(cg))
		}
	}
	for p, start := range tr.processes {
		if s := startTime(fmt.Sprintf("/proc/%d", p)); s == start {
			left = append(left, fmt.Sprintf("process %d", p))
		}
	}
	return left
}

// held returns which of the namespaces are in use.
func (tr traces) held(t *testing.T) []string {
	t.Helper()
	var held []string
	for _, p := range processes(t) {
		// Of a process that has ended, which may wait for its parent, the
		// machine's init, nothing can be said. And a later process may have
		// got a namespace with a number of ours.
		start, err := strconv.ParseInt(startTime(fmt.Sprintf("/proc/%d", p)), 10, 64)
		if err != nil || start > tr.seen {
			continue
		}
		tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*", p))
		if err != nil {
			t.Fatal(err)
		}
		for _, task := range tasks {
			for _, ns := range namespacesOf(task) {
				if tr.namespaces[ns] {
					held = append(held, fmt.Sprintf("namespace %s in %s", ns, task))
				}
			}
		}
		mounts, err := os.ReadFile(fmt.Sprintf("/proc/%d/mountinfo", p))
		if err != nil {
			continue // has ended
		}
		if strings.Contains(string(mounts), "/"+filepath.Base(tr.dir)+"/") {
			held = append(held, fmt.Sprintf("files mounted for process %d", p))
		}
	}
	return held
}

// none fails if anything is left.
func (tr traces) none(t *testing.T) {
	t.Helper()
	for _, s := range tr.left(t) {
		t.Errorf("left behind: %s", s)
	}
	// A host that another process boots has the machine's mounts for a
	// moment, and ours among them; a thread of another process may use a
	// recycled number. A leak lasts.
	var held []string
	for range 1500 {
		if held = tr.held(t); len(held) == 0 {
			return
		}
		time.Sleep(20 * time.Millisecond)
	}
	for _, s := range held {
		t.Errorf("left behind: %s", s)
	}
}

func processes(t *testing.T) []int {
	t.Helper()
	entries, err := os.ReadDir("/proc")
	if err != nil {
		t.Fatal(err)
	}
	var pids []int
	for _, e := range entries {
		var pid int
		if _, err := fmt.Sscan(e.Name(), &pid); err == nil {
			pids = append(pids, pid)
		}
	}
	return pids
}

// startTime tells processes apart that had the same id, given the directory of
// one. It is empty for one that has ended.
func startTime(proc string) string {
	b, err := os.ReadFile(filepath.Join(proc, "stat"))
	if err != nil {
		return ""
	}
	f := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:]))
	if len(f) < 20 || f[0] == "Z" || f[0] == "X" {
		return ""
	}
	return f[19]
}

// now is the time in the unit of start times.
func now(t *testing.T) int64 {
	t.Helper()
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		t.Fatal(err)
	}
	return ts.Nano() / int64(time.Second/100) // a hundred ticks a second, for programs, on every Linux
}

// namespacesOf returns the namespaces of a process or thread by its directory.
func namespacesOf(proc string) []string {
	var all []string
	for _, kind := range []string{"mnt", "pid", "uts", "ipc", "cgroup", "net", "user"} {
		if ns, err := os.Readlink(filepath.Join(proc, "ns", kind)); err == nil {
			all = append(all, ns)
		}
	}
	return all
}

func ownNamespaces(t *testing.T) map[string]bool {
	t.Helper()
	own := map[string]bool{}
	for _, ns := range namespacesOf("/proc/self") {
		own[ns] = true
	}
	if len(own) < 6 {
		t.Fatalf("own namespaces: %v", own)
	}
	return own
}

// check fails unless there are traces of every kind, and so a later look that
// finds none means something.
func (tr traces) check(t *testing.T) {
	t.Helper()
	left := strings.Join(append(tr.left(t), tr.held(t)...), "\n")
	for _, kind := range []string{"directory", "mount", "interface", "cgroup", "process", "namespace net", "namespace mnt", "namespace pid", "namespace uts", "namespace ipc", "namespace cgroup", "mounted for"} {
		if !strings.Contains(left, kind+" ") && !strings.Contains(left, kind+":") {
			t.Fatalf("a running lab shows no %s:\n%s", kind, left)
		}
	}
}

func TestDownLeavesNothing(t *testing.T) {
	l := newLab(t, Options{Reachable: true})
	h := up(t, l, Config{Name: "a"})
	up(t, l, Config{Name: "b"})
	output(t, h, "", "sh", "-c", "sleep 1000 >/dev/null 2>&1 &")
	tr := tracesOf(t, l)
	tr.check(t)
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	tr.none(t)
	if err := l.Close(); err != nil {
		t.Errorf("second close: %v", err)
	}
}

func TestGCAfterKilledCaller(t *testing.T) {
	elsewhere(t) // others' GC would do it for us
	cmd, name := caller(t, "lab", "is up:")
	l, err := Open(name, nil)
	if err != nil {
		t.Fatal(err)
	}
	tr := tracesOf(t, l)
	tr.check(t)
	if removed, err := GC(t.Context(), true); err != nil || slices.Contains(removed, name) {
		t.Fatalf("GC took the lab of a living process: %v, %v", removed, err)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait() // it was killed
	tr.check(t)    // nothing went by itself, so what GC removes is all of it
	if removed, err := GC(t.Context(), false); err != nil || !slices.Contains(removed, name) {
		t.Fatalf("GC removed %v, %v; want %s", removed, err, name)
	}
	tr.none(t)
}

// TestGCAtAnyMoment kills callers at moments of all the time that one takes.
func TestGCAtAnyMoment(t *testing.T) {
	elsewhere(t)
	base, err := baseDir()
	if err != nil {
		t.Fatal(err)
	}
	for moment := range 12 {
		ctx, cancel := context.WithTimeout(t.Context(), time.Duration(moment)*60*time.Millisecond)
		cmd := exec.CommandContext(ctx, "/proc/self/exe")
		cmd.Env = append(os.Environ(), envCaller+"=lab")
		if err := cmd.Start(); err == nil { // the first may be too late even for that
			_ = cmd.Wait()
		}
		cancel()
		labs, err := Labs()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := GC(t.Context(), false); err != nil {
			t.Errorf("killed after %d ms: %v", moment*60, err)
		}
		for _, name := range labs {
			dir := filepath.Join(base, "labs", name)
			tr := traces{
				dir:     dir,
				links:   []string{fabric(filepath.Join(dir, "net")).machineLink()},
				cgroups: []cgroup{cgroupOf(filepath.Join(dir, "hosts", "a"))},
			}
			for _, s := range tr.left(t) {
				t.Errorf("killed after %d ms: left behind: %s", moment*60, s)
			}
		}
	}
}

// elsewhere gives the test a directory for labs of its own, with the images
// of the usual one.
func elsewhere(t *testing.T) {
	t.Helper()
	base, err := baseDir()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if err := os.Symlink(filepath.Join(base, "roots"), filepath.Join(dir, "roots")); err != nil {
		t.Fatal(err)
	}
	t.Setenv(EnvDir, dir)
}

func TestGCKeeps(t *testing.T) {
	elsewhere(t)
	l := newLab(t, Options{Keep: true})
	up(t, l, Config{Name: "a"})
	if removed, err := GC(t.Context(), false); err != nil || len(removed) != 0 {
		t.Fatalf("GC removed %v, %v", removed, err)
	}
	if removed, err := GC(t.Context(), true); err != nil || !slices.Equal(removed, []string{l.Name()}) {
		t.Fatalf("GC of all removed %v, %v; want %s", removed, err, l.Name())
	}
	if labs, err := Labs(); err != nil || len(labs) != 0 {
		t.Errorf("labs left: %v, %v", labs, err)
	}
}

// TestGCHalfMade checks every state that a caller can leave a lab in.
func TestGCHalfMade(t *testing.T) {
	elsewhere(t)
	base, err := baseDir()
	if err != nil {
		t.Fatal(err)
	}
	for _, files := range []map[string]string{
		{},
		{"owner": ""},
		{"hosts/": ""},
		{"hosts/": "", "lab.json.new": "{"},
		{"hosts/": "", "lab.json": `{"Index":7,"Reachable":true}`},
		{"hosts/": "", "lab.json": `{"Index":7,"Reachable":true}`, "net": ""},
		{"hosts/a/": "", "lab.json": `{"Index":7}`, "net": ""},
		{"hosts/a/upper/etc/": "", "hosts/a/host.json.new": "{", "lab.json": `{"Index":7}`, "net": ""},
	} {
		for name, text := range files {
			name := filepath.Join(base, "labs", "half") + "/" + name
			if err := os.MkdirAll(filepath.Dir(name), 0o700); err != nil {
				t.Fatal(err)
			}
			if !strings.HasSuffix(name, "/") {
				if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
					t.Fatal(err)
				}
			}
		}
		if len(files) == 0 {
			if err := os.MkdirAll(filepath.Join(base, "labs", "half"), 0o700); err != nil {
				t.Fatal(err)
			}
		}
		what := slices.Sorted(maps.Keys(files))
		if removed, err := GC(t.Context(), false); err != nil || len(removed) != 1 {
			t.Errorf("lab with %q: removed %v, %v", what, removed, err)
		}
		if labs, err := Labs(); err != nil || len(labs) != 0 {
			t.Errorf("lab with %q is left: %v, %v", what, labs, err)
		}
	}
}
