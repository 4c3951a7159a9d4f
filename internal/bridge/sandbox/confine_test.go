package sandbox

import (
	"errors"
	"net"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"
)

// run interprets a filter's program on one system call, as the kernel does.
func run(t *testing.T, prog []syscall.SockFilter, arch, nr, arg uint32) uint32 {
	t.Helper()
	data := map[uint32]uint32{0: nr, 4: arch, 16: arg}
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

func TestFilterLetsOnlyNamespacedSocketsPass(t *testing.T) {
	const (
		arch  = 0xc000003e
		other = 0x40000003 // 32-bit x86, whose socketcall hides the family
	)
	prog := socketFilter(arch)
	errno := func(e syscall.Errno) uint32 { return seccompErrno | uint32(e) }
	for _, nr := range []uint32{syscall.SYS_SOCKET, syscall.SYS_SOCKETPAIR} {
		for family := range uint32(256) {
			want := errno(syscall.EAFNOSUPPORT)
			if slices.Contains(families, family) {
				want = seccompAllow
			}
			if got := run(t, prog, arch, nr, family); got != want {
				t.Errorf("call %d, family %d: %#x, want %#x", nr, family, got, want)
			}
		}
	}
	for nr := range uint32(600) {
		want := uint32(seccompAllow)
		if nr == syscall.SYS_SOCKET || nr == syscall.SYS_SOCKETPAIR {
			continue
		}
		if nr == 425 {
			want = errno(syscall.ENOSYS)
		}
		if got := run(t, prog, arch, nr, 40); got != want {
			t.Errorf("call %d: %#x, want %#x", nr, got, want)
		}
		for _, strange := range []uint32{run(t, prog, other, nr, 1), run(t, prog, arch, nr|0x40000000, 1)} {
			if strange != errno(syscall.ENOSYS) {
				t.Errorf("call %d, not native: %#x", nr, strange)
			}
		}
	}
}

func TestConfineHoldsItsThreadAndChildrenAlone(t *testing.T) {
	var inside, netlink error
	var pid int
	err := Confine(func() {
		inside = try(syscall.AF_PACKET, syscall.SOCK_DGRAM)
		netlink = try(syscall.AF_NETLINK, syscall.SOCK_RAW)
		// The child is this test binary, which reports in its exit code.
		pid, _ = syscall.ForkExec("/proc/self/exe", []string{"confined"}, &syscall.ProcAttr{Env: append(os.Environ(), childVar+"=1")})
	})
	if err != nil {
		t.Fatal(err)
	}
	if !errors.Is(inside, syscall.EAFNOSUPPORT) {
		t.Errorf("a packet socket inside: %v, want %v", inside, syscall.EAFNOSUPPORT)
	}
	if netlink != nil {
		t.Errorf("a netlink socket inside: %v", netlink)
	}
	if err := try(syscall.AF_PACKET, syscall.SOCK_DGRAM); err != nil {
		t.Errorf("a packet socket outside: %v", err)
	}
	var ws syscall.WaitStatus
	if _, err := syscall.Wait4(pid, &ws, 0, nil); err != nil || ws.ExitStatus() != childConfined {
		t.Errorf("the child ended with %v (%v), want exit code %d", ws, err, childConfined)
	}
}

// childVar makes the test binary a child that tells whether it is confined.
const (
	childVar      = "TEST_CONFINED_CHILD"
	childConfined = 42
)

func confinedChild() {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil || !errors.Is(try(syscall.AF_PACKET, syscall.SOCK_DGRAM), syscall.EAFNOSUPPORT) {
		os.Exit(1)
	}
	l.Close()
	status, _ := os.ReadFile("/proc/self/status")
	if !strings.Contains(string(status), "Seccomp:\t2\n") {
		os.Exit(2)
	}
	os.Exit(childConfined)
}

func try(family, kind int) error {
	fd, err := syscall.Socket(family, kind, 0)
	if err == nil {
		syscall.Close(fd)
	}
	return err
}
