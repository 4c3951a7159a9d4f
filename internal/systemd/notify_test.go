package systemd

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"unicode/utf8"
)

// listen plays the service manager and returns what it is told.
func listen(t *testing.T) func() string {
	t.Helper()
	dir, err := os.MkdirTemp("", "sd")
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "n")
	c, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close(); _ = os.RemoveAll(dir) })
	t.Setenv("NOTIFY_SOCKET", path)
	return func() string {
		buf := make([]byte, 4096)
		n, err := c.Read(buf)
		if err != nil {
			t.Error(err)
		}
		return string(buf[:n])
	}
}

func TestNotify(t *testing.T) {
	told := listen(t)
	for _, tt := range []struct {
		say  func() error
		want string // pattern
	}{
		{func() error { return Ready("up") }, "^READY=1\nSTATUS=up$"},
		{func() error { return Status("") }, "^STATUS=$"},
		{func() error { return Stopping("finishing jobs") }, "^STOPPING=1\nSTATUS=finishing jobs$"},
		// A second line would be a message of its own.
		{func() error { return Status("a\nMAINPID=1\r\x00\x7fb") }, "^STATUS=a MAINPID=1   b$"},
	} {
		if err := tt.say(); err != nil {
			t.Error(err)
		}
		if got := told(); !regexp.MustCompile(tt.want).MatchString(got) {
			t.Errorf("got %q, want %q", got, tt.want)
		}
	}
	if err := Status("x" + strings.Repeat("é", maxStatus/2)); err != nil {
		t.Error(err)
	}
	if got := told(); len(got) > len("STATUS=")+maxStatus+len("…") || !strings.HasSuffix(got, "…") || !utf8.ValidString(got) {
		t.Errorf("%d bytes: %q", len(got), got)
	}
	if err := Status(strings.Repeat("x", maxStatus)); err != nil || told() != "STATUS="+strings.Repeat("x", maxStatus) {
		t.Errorf("the longest status: %v", err)
	}
}

func TestNotifyWithoutManager(t *testing.T) {
	t.Setenv("NOTIFY_SOCKET", "")
	if err := Ready("up"); err != nil {
		t.Error(err)
	}
	t.Setenv("NOTIFY_SOCKET", filepath.Join(t.TempDir(), "gone"))
	if err := Ready("up"); err == nil {
		t.Error("nobody was told, and that was no error")
	}
}

func TestWatchdog(t *testing.T) {
	told := listen(t)
	t.Setenv("WATCHDOG_USEC", "30000")
	t.Setenv("WATCHDOG_PID", fmt.Sprint(os.Getpid()))
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	asked := 0
	done := make(chan error, 1)
	go func() {
		done <- Watchdog(ctx, func() bool { asked++; return asked != 2 })
	}()
	for range 3 {
		if got := told(); got != "WATCHDOG=1" {
			t.Errorf("got %q", got)
		}
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if asked < 4 {
		t.Errorf("three messages after asking %d times, although the second answer was no", asked)
	}
}

func TestWatchdogElsewhere(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	for usec, pid := range map[string]string{"": "", "1000": "1"} { // not wanted; wanted of another process
		t.Setenv("WATCHDOG_USEC", usec)
		t.Setenv("WATCHDOG_PID", pid)
		if err := Watchdog(ctx, func() bool { t.Error("asked"); return true }); err != nil {
			t.Error(err)
		}
	}
	t.Setenv("WATCHDOG_USEC", "soon")
	t.Setenv("WATCHDOG_PID", fmt.Sprint(os.Getpid()))
	if err := Watchdog(t.Context(), func() bool { return true }); err == nil {
		t.Error("a bad WATCHDOG_USEC is no error")
	}
}
