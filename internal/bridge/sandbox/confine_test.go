package sandbox

import (
	"errors"
	"net"
	"os"
	"strings"
	"syscall"
	"testing"
)

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
