// Package sealtest starts a test's own binary in a container sealed the way
// rootless Podman seals one, or with one flaw in the seal. It is for tests
// only, needs root, and uses nothing but the kernel: user, mount, process,
// network and other namespaces of its own, a read-only root of a few bind
// mounts, masked kernel files, no capabilities, a system call filter.
//
// The test binary starts itself twice: once as the namespaces' first process,
// which builds the container, and from there as what the container runs. Its
// TestMain must call [Main] before anything else.
package sealtest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
)

// Binary is where the container finds the test binary, whatever it runs.
const Binary = "/test"

const program = "/program"

// User is the id of the container's user and group.
const User = 1000

// Flaw is one way in which the container is not sealed.
type Flaw string

// The flaws. What they break stands beside them.
const (
	SecondProcess   Flaw = "second process"    // is not PID 1
	RootUser        Flaw = "root user"         // runs as the container's 0
	IdentityMap     Flaw = "identity map"      // ids are the host's own
	AccountMap      Flaw = "account map"       // the user is the account outside
	KeptBounding    Flaw = "kept bounding set" // CapBnd is full
	KeptAmbient     Flaw = "kept ambient set"  // all sets but CapBnd hold CAP_CHOWN
	NewPrivileges   Flaw = "new privileges"    // no_new_privs is off
	NoFilter        Flaw = "no filter"         // no system call filter
	Interface       Flaw = "interface"         // one more that is up, with an address
	DefaultRoute    Flaw = "default route"     // and a way out over it
	NoLoopback      Flaw = "no loopback"       // lo is down
	WritableRoot    Flaw = "writable root"
	WritableModels  Flaw = "writable models"
	NoModels        Flaw = "no models"
	WritableMount   Flaw = "writable mount"     // /extra, for anybody
	HiddenWritable  Flaw = "hidden writable"    // /extra/a/b only
	WritableFile    Flaw = "writable file"      // bind mount of a single file
	UnlistedTmpfs   Flaw = "unlisted tmpfs"     // at /var/tmp
	Unmasked        Flaw = "unmasked"           // /proc/keys
	WritableProcSys Flaw = "writable /proc/sys" // its mount, not its files
	WritableSys     Flaw = "writable /sys"
	ExtraDevice     Flaw = "extra device"    // /dev/fuse
	FakeDevice      Flaw = "fake device"     // the fuse device by the name of /dev/zero
	MountedDevice   Flaw = "mounted device"  // the fuse device at /extra
	ForeignSocket   Flaw = "foreign socket"  // in /models
	AbstractSocket  Flaw = "abstract socket" // of another process in the network namespace
	NamedPipe       Flaw = "named pipe"      // in /models
	InheritedFile   Flaw = "inherited file"  // descriptor 9 is the old root
	OutsideWorkDir  Flaw = "outside work dir"
	ProxyVariable   Flaw = "proxy variable"

	// UnreachableMount is none: what could be written is below a directory
	// that the user cannot enter.
	UnreachableMount Flaw = "unreachable mount"

	// NoNamespaces is none either: there are no more user namespaces.
	NoNamespaces Flaw = "no namespaces"
)

// interpreter is what starts binaries that are not static, where it exists.
var interpreter = []string{"/lib64/ld-linux-x86-64.so.2", "/lib/ld-linux-aarch64.so.1"}

// Container is what to start. Inside, /run/resultity is Dir/run and writable,
// /run/notify is Dir/notify and read-only, /models holds model.gguf and is
// read-only; /tmp and /dev/shm are empty and writable.
type Container struct {
	Dir     string   // of [MakeDir]; "" makes one
	Program string   // outside: a static program to run, "" for the test binary
	Args    []string // for it
	Env     []string // all of it
	Flaws   []Flaw

	Stdout, Stderr io.Writer // nil discards
}

// Box is a container that was started.
type Box struct {
	Dir string // outside: its directories, with a short path
	PID int    // outside: its first process
	cmd *exec.Cmd
}

// plan is what the namespaces' first process is told.
type plan struct {
	Dir, Program string
	Args, Env    []string
	Flaws        []Flaw
}

// Start starts c and ends it at the end of the test.
func Start(t testing.TB, c Container) *Box {
	t.Helper()
	if os.Getuid() != 0 {
		t.Fatal("these tests make containers: run them as root")
	}
	dir := c.Dir
	if dir == "" {
		dir = MakeDir(t)
	}
	p, err := json.Marshal(plan{dir, c.Program, c.Args, c.Env, c.Flaws})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cmd := exec.CommandContext(ctx, filepath.Join(dir, "binary"), builder, string(p))
	cmd.Env = []string{}
	cmd.Stdout, cmd.Stderr = c.Stdout, c.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWUSER | syscall.CLONE_NEWNS | syscall.CLONE_NEWPID | syscall.CLONE_NEWNET |
			syscall.CLONE_NEWIPC | syscall.CLONE_NEWUTS | syscall.CLONE_NEWCGROUP,
		UidMappings:                idMap(c.Flaws),
		GidMappings:                idMap(c.Flaws),
		GidMappingsEnableSetgroups: true,
		Credential:                 &syscall.Credential{},
		Pdeathsig:                  syscall.SIGKILL,
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	b := &Box{Dir: dir, PID: cmd.Process.Pid, cmd: cmd}
	t.Cleanup(func() {
		cancel()
		cmd.Wait() // an error when the test has waited itself
	})
	return b
}

// Wait waits for the container's first process and returns its exit code,
// 128 and the signal's number when one ended it.
func (b *Box) Wait() int {
	b.cmd.Wait()
	ws := b.cmd.ProcessState.Sys().(syscall.WaitStatus)
	if ws.Signaled() {
		return 128 + int(ws.Signal())
	}
	return ws.ExitStatus()
}

// Signal sends a signal to the container's first process.
func (b *Box) Signal(s syscall.Signal) error { return b.cmd.Process.Signal(s) }

// MakeDir makes the directories that a container shares with the test. Their
// path is short enough for sockets, and open to the container's user.
func MakeDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "seal")
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(err)
	t.Cleanup(func() { must(os.RemoveAll(dir)) })
	must(os.Chmod(dir, 0o755))
	for _, d := range []string{"root", "run", "notify"} {
		must(os.MkdirAll(filepath.Join(dir, d), 0o755))
	}
	must(os.Chmod(filepath.Join(dir, "run"), 0o777))
	self, err := os.Executable()
	must(err)
	must(os.Link(self, filepath.Join(dir, "binary")))
	must(os.Chmod(filepath.Join(dir, "binary"), 0o755))
	return dir
}

// outer is the first of the ids outside that the container's are mapped to.
const outer = 200000

func idMap(flaws []Flaw) []syscall.SysProcIDMap {
	for _, f := range flaws {
		switch f {
		case IdentityMap:
			return []syscall.SysProcIDMap{{ContainerID: 0, HostID: 0, Size: 65536}}
		case AccountMap:
			return []syscall.SysProcIDMap{{ContainerID: 0, HostID: outer, Size: User}, {ContainerID: User, HostID: 0, Size: 1}}
		}
	}
	return []syscall.SysProcIDMap{{ContainerID: 0, HostID: outer, Size: 65536}}
}

// builder is the first argument of the test binary as container builder.
const builder = "sealtest-build"

// holder is the one of a process that does nothing but keep a socket open.
const holder = "sealtest-hold"

// Main turns the test binary into the container's builder when it was started
// as that, and returns otherwise.
func Main() {
	if len(os.Args) == 2 && os.Args[1] == holder {
		syscall.Pause() // until the container ends
	}
	if len(os.Args) != 3 || os.Args[1] != builder {
		return
	}
	if err := build(os.Args[2]); err != nil {
		fmt.Fprintln(os.Stderr, "sealtest:", err)
		os.Exit(120)
	}
}

// Children returns the processes, outside, that the given one started, by any of
// its threads.
func Children(pid int) ([]int, error) {
	files, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	if err != nil {
		return nil, err
	}
	var pids []int
	for _, name := range files {
		b, err := os.ReadFile(name)
		if err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, syscall.ESRCH) { // the thread has ended
			return nil, err
		}
		for _, f := range strings.Fields(string(b)) {
			n, err := strconv.Atoi(f)
			if err != nil {
				return nil, err
			}
			pids = append(pids, n)
		}
	}
	return pids, nil
}
