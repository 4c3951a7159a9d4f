package host

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// fakeBuilder puts a mmdebstrap before the real one that makes an empty
// system, counts its runs in a file and then does what end says.
func fakeBuilder(t *testing.T, end string) (path, runs string) {
	t.Helper()
	dir := t.TempDir()
	runs = filepath.Join(dir, "runs")
	script := fmt.Sprintf(`#!/bin/sh
set -e
for root; do :; done
mkdir -p "$root/etc/systemd/system"
echo "$$" >> %s
echo building in "$root"
%s
`, runs, end)
	if err := os.WriteFile(filepath.Join(dir, "mmdebstrap"), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	return dir + ":" + os.Getenv("PATH"), runs
}

func countRuns(t *testing.T, runs string) int {
	t.Helper()
	b, err := os.ReadFile(runs)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	return strings.Count(string(b), "\n")
}

func TestImageBuiltOnce(t *testing.T) {
	t.Setenv(EnvDir, t.TempDir())
	path, runs := fakeBuilder(t, "sleep 0.2")
	t.Setenv("PATH", path)
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			if _, err := (Image{}).ensure(t.Context(), nil); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if n := countRuns(t, runs); n != 1 {
		t.Errorf("built %d times, want once", n)
	}
	if _, err := (Image{Release: Forky}).ensure(t.Context(), nil); err != nil {
		t.Error(err)
	}
	if n := countRuns(t, runs); n != 2 {
		t.Errorf("another release: built %d times in all, want 2", n)
	}
}

func TestImageFailedBuildIsNoImage(t *testing.T) {
	t.Setenv(EnvDir, t.TempDir())
	path, _ := fakeBuilder(t, "echo the reason >&2; exit 1")
	t.Setenv("PATH", path)
	for range 2 { // the first leaves nothing that the second takes for an image
		if _, err := (Image{}).ensure(t.Context(), nil); err == nil || !strings.Contains(err.Error(), "the reason") {
			t.Errorf("error %v, want one with the reason", err)
		}
	}
	noParts(t)
}

func noParts(t *testing.T) {
	t.Helper()
	base, err := baseDir()
	if err != nil {
		t.Fatal(err)
	}
	left, err := filepath.Glob(filepath.Join(base, "roots", "*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range left {
		if !strings.HasSuffix(name, ".lock") {
			t.Errorf("left: %s", name)
		}
	}
}

// lines is a Writer that closes a channel at the first line with a word.
type lines struct {
	word string
	seen chan struct{}
	once sync.Once
}

func (l *lines) Write(p []byte) (int, error) {
	if strings.Contains(string(p), l.word) {
		l.once.Do(func() { close(l.seen) })
	}
	return len(p), nil
}

func TestImageCancelledBuild(t *testing.T) {
	t.Setenv(EnvDir, t.TempDir())
	path, _ := fakeBuilder(t, "sleep 1000")
	t.Setenv("PATH", path)
	ctx, cancel := context.WithCancel(t.Context())
	building := &lines{word: "building in", seen: make(chan struct{})}
	go func() { <-building.seen; cancel() }()
	if _, err := (Image{}).ensure(ctx, building); err == nil {
		t.Error("no error from a cancelled build")
	}
	noParts(t)
}

// TestImageKilledBuild kills a process that builds. The builder goes with it,
// and the next one starts afresh.
func TestImageKilledBuild(t *testing.T) {
	t.Setenv(EnvDir, t.TempDir())
	path, _ := fakeBuilder(t, "sleep 1000")
	cmd, part := caller(t, "image", ": building in ", "PATH="+path)
	if err := os.WriteFile(filepath.Join(part, "half"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	path, _ = fakeBuilder(t, "")
	t.Setenv("PATH", path)
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	dir, err := (Image{}).ensure(ctx, t.Output()) // gets the lock only when the other builder is gone
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(dir, "half")); !errors.Is(err, fs.ErrNotExist) {
		t.Error("the new image contains what the killed builder left")
	}
}

func TestSetupInstalls(t *testing.T) {
	dir := t.TempDir()
	calls := filepath.Join(dir, "calls")
	script := func(more string) {
		t.Helper()
		text := fmt.Sprintf("#!/bin/sh\necho \"$@\" >> %s\n%s\n", calls, more)
		if err := os.WriteFile(filepath.Join(dir, "apt-get"), []byte(text), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv("PATH", dir)
	script("")
	if err := Setup(t.Context(), nil); err == nil {
		t.Error("no error though nothing was installed")
	}
	script("/bin/echo broken archive; exit 100")
	if err := Setup(t.Context(), nil); err == nil || !strings.Contains(err.Error(), "broken archive") {
		t.Errorf("failed installation: %v, want its reason", err)
	}
	script(fmt.Sprintf("for tool in mmdebstrap ip unshare cp nft; do echo > %[1]s/$tool; /bin/chmod 755 %[1]s/$tool; done", dir))
	if err := os.Remove(calls); err != nil {
		t.Fatal(err)
	}
	for range 2 { // the second has nothing to do
		if err := Setup(t.Context(), nil); err != nil {
			t.Fatal(err)
		}
	}
	got, err := os.ReadFile(calls)
	want := "-o DPkg::Lock::Timeout=600 -q update\n" +
		"-o DPkg::Lock::Timeout=600 -q install --yes --no-install-recommends coreutils iproute2 mmdebstrap nftables util-linux\n"
	if err != nil || string(got) != want {
		t.Errorf("apt-get was called with\n%s%v, want\n%s", got, err, want)
	}
}

func TestPrune(t *testing.T) {
	t.Setenv(EnvDir, t.TempDir())
	path, _ := fakeBuilder(t, "")
	t.Setenv("PATH", path)
	base, err := baseDir()
	if err != nil {
		t.Fatal(err)
	}
	roots := filepath.Join(base, "roots")
	old := time.Now().Add(-2 * keepUnused)
	for name, at := range map[string]time.Time{"old": old, "used": old, "new": time.Now()} {
		if err := os.MkdirAll(filepath.Join(roots, name, "usr"), 0o755); err != nil {
			t.Fatal(err)
		}
		lock := filepath.Join(roots, name+".lock")
		if err := os.WriteFile(lock, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chtimes(lock, at, at); err != nil {
			t.Fatal(err)
		}
	}
	host := filepath.Join(base, "labs", "l", "hosts", "a")
	if err := os.MkdirAll(host, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := writeRecord(filepath.Join(host, "host.json"), hostRecord{Lower: filepath.Join(roots, "used")}); err != nil {
		t.Fatal(err)
	}
	if _, err := (Image{}).ensure(t.Context(), io.Discard); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]bool{"old": false, "used": true, "new": true} {
		if _, err := os.Stat(filepath.Join(roots, name)); (err == nil) != want {
			t.Errorf("image %s: %v, want it kept: %v", name, err, want)
		}
	}
}

func TestImageKey(t *testing.T) {
	seen := map[string]Image{}
	for _, i := range []Image{{Trixie, Node}, {Forky, Node}, {Trixie, Network}, {Forky, Network}} {
		key, err := i.key()
		if err != nil {
			t.Fatal(err)
		}
		if other, ok := seen[key]; ok {
			t.Errorf("%v and %v are both %s", i, other, key)
		}
		seen[key] = i
	}
}

// TestUmask checks that a caller's mask does not become a host's.
func TestUmask(t *testing.T) {
	defer unix.Umask(unix.Umask(0o077))
	l := newLab(t, Options{})
	h := up(t, l, Config{Name: "a"})
	if got := output(t, h, "nobody", "cat", "/etc/hostname"); got != "a" {
		t.Errorf("host name %q", got)
	}
	if got := output(t, h, "", "sh", "-c", "stat -c %a / /etc /etc/hosts /usr/local/bin/peer; umask"); got != "755\n755\n644\n755\n0022" {
		t.Errorf("modes and mask: %q", got)
	}
}
