package ctl

import (
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/resultity/node/internal/durable"
	"github.com/resultity/node/internal/receipt"
)

// sized makes a file of so many bytes.
func sized(t *testing.T, size int64) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "f")
	if err := os.WriteFile(name, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(name, size); err != nil {
		t.Fatal(err)
	}
	return name
}

// A file that is named by mistake is not read to its end.
func TestLargeFiles(t *testing.T) {
	for _, over := range []int64{0, 1} {
		name := sized(t, maxSmall+over)
		f, err := os.Open(name)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		for _, from := range []string{name, "-"} {
			if _, err := (&command{IO: IO{In: f}}).readSmall(from); errors.Is(err, durable.ErrLarge) != (over > 0) {
				t.Errorf("%d bytes of %s: %v", maxSmall+over, from, err)
			}
		}
	}
	small := sized(t, 1)
	for flag, most := range map[string]int64{"--request": maxBody, "--response": maxBody, "--receipt": receipt.MaxSize} {
		args := map[string]string{"--request": small, "--response": small, "--receipt": small}
		for over, want := range []string{"the agent does not run", "too large: more than " + strconv.FormatInt(most, 10)} {
			args[flag] = sized(t, most+int64(over))
			all := []string{"replay", "--socket", filepath.Join(t.TempDir(), "none")}
			for k, v := range args {
				all = append(all, k, v)
			}
			var said strings.Builder
			code := Main(t.Context(), all, IO{In: strings.NewReader(""), Out: &said, Err: &said, Getenv: func(string) string { return "" }}, "1")
			if code == ExitOK || !strings.Contains(said.String(), want) {
				t.Errorf("%s of %d bytes: exit code %d, %q; want %q", flag, most+int64(over), code, said.String(), want)
			}
		}
	}
}

// Units of any length cost no more than those of the bound, and it is said.
func TestLongUnits(t *testing.T) {
	lines := func(n int, text string) []string { return strings.Split(strings.Repeat(text+"\n", n-1)+text, "\n") }
	if got := diffLines(lines(maxUnitLines, "a"), lines(maxUnitLines, "b")); len(got) != 2*maxUnitLines {
		t.Errorf("%d lines", len(got))
	}
	got := diffLines(lines(maxUnitLines+1, "a"), lines(100*maxUnitLines, "a"))
	if len(got) != 1 || !strings.Contains(got[0], "first "+strconv.Itoa(maxUnitLines)) {
		t.Errorf("%d lines, the first is %.80q", len(got), got)
	}
}

// A program that does not end, or does not stop talking, holds nobody up.
func TestTool(t *testing.T) {
	if out, err := tool(t.Context(), "head", "-c", strconv.Itoa(maxTool), "/dev/zero"); err != nil || len(out) != maxTool {
		t.Errorf("%d bytes, %v", len(out), err)
	}
	defer func(d time.Duration) { toolTimeout = d }(toolTimeout)
	toolTimeout = time.Minute
	begin := time.Now()
	if out, err := tool(t.Context(), "cat", "/dev/zero"); err == nil || out != nil || time.Since(begin) > toolTimeout {
		t.Errorf("%d bytes, %v after %v", len(out), err, time.Since(begin))
	}
	toolTimeout = 50 * time.Millisecond
	ended := make(chan error, 2)
	for _, script := range []string{"exec sleep 60", "sleep 60 & exec sleep 60"} {
		go func() {
			_, err := tool(t.Context(), "sh", "-c", script)
			ended <- err
		}()
		select {
		case err := <-ended:
			if err == nil {
				t.Errorf("%s: it has ended well", script)
			}
		case <-time.After(30 * time.Second): // the machine may be busy
			t.Fatalf("%s: it is waited for", script)
		}
	}
}
