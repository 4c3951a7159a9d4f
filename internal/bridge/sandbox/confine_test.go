package sandbox

import (
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

func TestConfineHoldsItsThreadAndChildrenAlone(t *testing.T) {
	var inside, netlink error
	var pid int
	_, err := Confine(Order{}, func() {
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

// An engine makes and moves files where it may, and nothing elsewhere.
func TestConfinedWritesGoWhereTheyMay(t *testing.T) {
	may, mayNot := t.TempDir(), t.TempDir()
	there := filepath.Join(mayNot, "there")
	if err := os.WriteFile(there, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	var fine, bad []error
	version, err := Confine(Order{Writable: []string{may, "/there/is/none"}, SocketDir: mayNot}, func() {
		fine = []error{
			os.Mkdir(filepath.Join(may, "a"), 0o700), os.Mkdir(filepath.Join(may, "b"), 0o700), os.WriteFile(filepath.Join(may, "a/x"), []byte("x"), 0o600),
			os.Rename(filepath.Join(may, "a/x"), filepath.Join(may, "b/x")), os.Truncate(filepath.Join(may, "b/x"), 0), os.Remove(filepath.Join(may, "b/x")),
			os.WriteFile("/dev/null", []byte("x"), 0o600), os.WriteFile("/proc/thread-self/comm", []byte("x"), 0o600),
			readable(there),
		}
		bad = []error{
			os.WriteFile(filepath.Join(mayNot, "x"), []byte("x"), 0o600), os.WriteFile(there, []byte("x"), 0o600), os.Truncate(there, 0), os.Remove(there),
			os.Mkdir(filepath.Join(mayNot, "a"), 0o700), os.Symlink("/", filepath.Join(mayNot, "l")), syscall.Mkfifo(filepath.Join(mayNot, "p"), 0o600),
			os.Rename(there, filepath.Join(may, "there")), os.WriteFile("/dev/made", nil, 0o600),
		}
	})
	if err != nil || version < oldestLandlock {
		t.Fatalf("version %d, %v; this kernel cannot be tested on", version, err)
	}
	for i, err := range fine {
		if err != nil {
			t.Errorf("allowed %d: %v", i, err)
		}
	}
	for i, err := range bad {
		t.Logf("not allowed %d: expected: %v or %v; got: %v", i, syscall.EACCES, syscall.EXDEV, err)
		if !errors.Is(err, syscall.EACCES) && !errors.Is(err, syscall.EXDEV) {
			t.Errorf("not allowed %d: %v", i, err)
		}
	}
}

func readable(name string) error { _, err := os.ReadFile(name); return err }

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
