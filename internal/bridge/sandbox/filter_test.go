package sandbox

import (
	"go/ast"
	"go/parser"
	"go/token"
	"maps"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
)

// run interprets a filter's program on one system call, as the kernel does.
func run(t *testing.T, prog program, arch, nr uint32, args ...uint32) uint32 {
	t.Helper()
	data := map[uint32]uint32{0: nr, 4: arch, 16: 0, 24: 0, 32: 0}
	for i, a := range args {
		data[16+8*uint32(i)] = a
	}
	var a uint32
	for pc := 0; pc < len(prog); pc++ {
		switch i := prog[pc]; i.Code {
		case syscall.BPF_LD | syscall.BPF_W | syscall.BPF_ABS:
			v, ok := data[i.K]
			if !ok {
				t.Fatalf("instruction %d reads at %d", pc, i.K)
			}
			a = v
		case syscall.BPF_JMP | syscall.BPF_JEQ | syscall.BPF_K:
			pc += jump(a == i.K, i)
		case syscall.BPF_JMP | syscall.BPF_JGE | syscall.BPF_K:
			pc += jump(a >= i.K, i)
		case syscall.BPF_JMP | syscall.BPF_JSET | syscall.BPF_K:
			pc += jump(a&i.K != 0, i)
		case syscall.BPF_RET | syscall.BPF_K:
			return i.K
		default:
			t.Fatalf("instruction %d: code %#x", pc, i.Code)
		}
	}
	t.Fatal("ran past the end")
	return 0
}

func jump(yes bool, i syscall.SockFilter) int {
	if yes {
		return int(i.Jt)
	}
	return int(i.Jf)
}

func errno(e syscall.Errno) uint32 { return seccompErrno | uint32(e) }

// Every number, on both architectures: what is not in the tables passes.
func TestFilterRefusesWhatTheTablesSay(t *testing.T) {
	for goarch, arch := range native {
		prog, err := filter(goarch)
		if err != nil {
			t.Fatal(err)
		}
		want := map[uint32]uint32{}
		for _, c := range refused {
			want[c.number(goarch)] = errno(syscall.EPERM)
		}
		for _, c := range unknown {
			want[c.number(goarch)] = errno(syscall.ENOSYS)
		}
		for _, c := range []call{socketCall, socketpairCall} {
			want[c.number(goarch)] = errno(syscall.EAFNOSUPPORT) // with the argument below
		}
		want[prlimitCall.number(goarch)] = errno(syscall.EPERM)
		verdicts := map[uint32]int{}
		for nr := range uint32(700) {
			w, ok := want[nr]
			if !ok {
				w = seccompAllow
			}
			got := run(t, prog, arch, nr, 40)
			verdicts[got]++
			if got != w {
				t.Errorf("%s, call %d: %#x, want %#x", goarch, nr, got, w)
			}
			for _, strange := range []uint32{run(t, prog, 0x40000003, nr, 1), run(t, prog, arch, nr|x32, 1)} {
				if strange != errno(syscall.ENOSYS) {
					t.Errorf("%s, call %d, not native: %#x", goarch, nr, strange)
				}
			}
		}
		maps.DeleteFunc(want, func(nr, _ uint32) bool { return nr >= 700 }) // calls that this architecture has not
		t.Logf("%s, 700 calls: expected: %d refused; got: %d with EPERM, %d with ENOSYS, %d with EAFNOSUPPORT", goarch, len(want),
			verdicts[errno(syscall.EPERM)], verdicts[errno(syscall.ENOSYS)], verdicts[errno(syscall.EAFNOSUPPORT)])
	}
	_, err := filter("riscv64")
	t.Logf("riscv64: expected: no filter; got: %v", err)
	if err == nil {
		t.Error("a filter for an architecture that nobody has looked at")
	}
}

// usual are the sockets that an engine may make, by family and protocols.
var usual = map[uint32][]uint32{1: {0, 1}, 2: {0, 6, 17}, 10: {0, 6, 17}, 16: {0}}

func TestFilterLetsOnlyOwnLimitsPass(t *testing.T) {
	for goarch, arch := range native {
		prog, err := filter(goarch)
		if err != nil {
			t.Fatal(err)
		}
		if got := run(t, prog, arch, prlimitCall.number(goarch), 0, 7); got != seccompAllow {
			t.Errorf("%s, own: %#x", goarch, got)
		}
		for _, pid := range []uint32{1, 2, 40, 1 << 31} {
			got := run(t, prog, arch, prlimitCall.number(goarch), pid, 7)
			t.Logf("%s, process %d: expected: %v (%#x); got: %#x", goarch, pid, syscall.EPERM, errno(syscall.EPERM), got)
			if got != errno(syscall.EPERM) {
				t.Errorf("%s, process %d: %#x", goarch, pid, got)
			}
		}
	}
}

func TestFilterLetsOnlyNamespacedSocketsPass(t *testing.T) {
	for goarch, arch := range native {
		prog, err := filter(goarch)
		if err != nil {
			t.Fatal(err)
		}
		verdicts := map[uint32]int{}
		for _, c := range []call{socketCall, socketpairCall} {
			for family := range uint32(256) {
				for protocol := range uint32(300) {
					want := errno(syscall.EAFNOSUPPORT)
					if protocols, ok := usual[family]; ok {
						want = errno(syscall.EPROTONOSUPPORT)
						if slices.Contains(protocols, protocol) {
							want = seccompAllow
						}
					}
					got := run(t, prog, arch, c.number(goarch), family, syscall.SOCK_STREAM, protocol)
					verdicts[got]++
					if got != want {
						t.Errorf("%s, %s, family %d, protocol %d: %#x, want %#x", goarch, c.name, family, protocol, got, want)
					}
				}
			}
		}
		t.Logf("%s: expected: EAFNOSUPPORT, EPROTONOSUPPORT, and few that pass; got: %d, %d, %d", goarch, verdicts[errno(syscall.EAFNOSUPPORT)], verdicts[errno(syscall.EPROTONOSUPPORT)], verdicts[seccompAllow])
	}
}

func TestFilterLetsThreadsPassAndNoNamespace(t *testing.T) {
	// What the C library passes for a thread, for fork and for posix_spawn.
	const (
		thread = 0x3d0f00
		fork   = syscall.CLONE_CHILD_SETTID | syscall.CLONE_CHILD_CLEARTID | uint32(syscall.SIGCHLD)
		spawn  = syscall.CLONE_VM | syscall.CLONE_VFORK | uint32(syscall.SIGCHLD)
	)
	for goarch, arch := range native {
		prog, err := filter(goarch)
		if err != nil {
			t.Fatal(err)
		}
		for _, flags := range []uint32{thread, fork, spawn} {
			if got := run(t, prog, arch, cloneCall.number(goarch), flags); got != seccompAllow {
				t.Errorf("%s, clone %#x: %#x", goarch, flags, got)
			}
			for _, ns := range []uint32{0x00020000, 0x02000000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000} {
				got := run(t, prog, arch, cloneCall.number(goarch), flags|ns)
				t.Logf("%s, clone %#x: expected: %v (%#x); got: %#x", goarch, flags|ns, syscall.EPERM, errno(syscall.EPERM), got)
				if got != errno(syscall.EPERM) {
					t.Errorf("%s, clone %#x: %#x", goarch, flags|ns, got)
				}
				if got := run(t, prog, arch, unshareCall.number(goarch), ns); got != errno(syscall.EPERM) {
					t.Errorf("%s, unshare %#x: %#x", goarch, ns, got)
				}
			}
		}
		if got := run(t, prog, arch, unshareCall.number(goarch), newTime); got != errno(syscall.EPERM) {
			t.Errorf("%s, unshare of time: %#x", goarch, got)
		}
		if got := run(t, prog, arch, unshareCall.number(goarch), syscall.CLONE_FS|syscall.CLONE_FILES); got != seccompAllow {
			t.Errorf("%s, unshare of no namespace: %#x", goarch, got)
		}
	}
}

// A wrong number would refuse another call than it says, and let pass the one
// that it names.
func TestNumbersAreTheKernels(t *testing.T) {
	out, err := exec.Command("go", "list", "-f", "{{.Dir}}", "golang.org/x/sys/unix").Output()
	if err != nil {
		t.Fatal(err)
	}
	all := append(slices.Concat(refused, unknown), prlimitCall, socketCall, socketpairCall, cloneCall, unshareCall)
	for goarch := range native {
		file, err := parser.ParseFile(token.NewFileSet(), filepath.Join(strings.TrimSpace(string(out)), "zsysnum_linux_"+goarch+".go"), nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		numbers := map[string]string{}
		ast.Inspect(file, func(n ast.Node) bool {
			if v, ok := n.(*ast.ValueSpec); ok && len(v.Values) == 1 {
				numbers[strings.ToLower(v.Names[0].Name)] = v.Values[0].(*ast.BasicLit).Value
			}
			return true
		})
		for _, c := range all {
			want := "" // there is none
			if n := c.number(goarch); n != absent {
				want = strconv.Itoa(int(n))
			}
			if got := numbers["sys_"+c.name]; got != want {
				t.Errorf("%s on %s is %q, want %q", c.name, goarch, want, got)
			}
		}
	}
}
