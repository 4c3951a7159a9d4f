package main

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/resultity/node/test/host"
)

// TestStory goes through the commands as a person would.
func TestStory(t *testing.T) {
	lab := fmt.Sprintf("cli-test-%d", os.Getpid())
	t.Cleanup(func() {
		if l, err := host.Open(lab, nil); err == nil {
			if err := l.Close(); err != nil {
				t.Error(err)
			}
		}
	})
	do := func(args ...string) (string, error) {
		t.Helper()
		var out bytes.Buffer
		err := run(t.Context(), append([]string{"-lab", lab}, args...), strings.NewReader("input\n"), &out, t.Output())
		return out.String(), err
	}
	must := func(args ...string) string {
		t.Helper()
		out, err := do(args...)
		if err != nil {
			t.Fatalf("%q: %v", args, err)
		}
		return out
	}

	must("up", "a", "--release", "trixie")
	if _, err := do("up", "a"); err == nil {
		t.Error("made a host twice")
	}
	if got := must("exec", "a", "cat"); got != "input\n" {
		t.Errorf("cat printed %q", got)
	}
	if got := must("exec", "a", "--user", "nobody", "id", "-un"); got != "nobody\n" {
		t.Errorf("user is %q", got)
	}
	if got := must("exec", "a", "--", "printf", "%s", "--user"); got != "--user" {
		t.Errorf("printf printed %q", got)
	}
	_, err := do("exec", "a", "sh", "-c", "exit 9")
	if exit, ok := errors.AsType[*exec.ExitError](err); !ok || exit.ExitCode() != 9 {
		t.Errorf("exit 9: %v", err)
	}

	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, []byte("text"), 0o640); err != nil {
		t.Fatal(err)
	}
	must("copy", file, "a:/srv/")
	must("copy", file, "a:/srv/other")
	if got := must("exec", "a", "cat", "/srv/file", "/srv/other"); got != "texttext" {
		t.Errorf("copied %q", got)
	}
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	must("copy", "a:/srv/file", dir)
	if got, err := os.ReadFile(file); err != nil || string(got) != "text" {
		t.Errorf("copied back %q, %v", got, err)
	}
	for _, args := range [][]string{{"copy", file, file}, {"copy", "a:/x", "a:/y"}} {
		if _, err := do(args...); err == nil {
			t.Errorf("%q: no error", args)
		}
	}

	must("cut", "a")
	if got := must("list"); !strings.Contains(got, lab) || !strings.Contains(got, "cut") {
		t.Errorf("list shows no cut:\n%s", got)
	}
	must("heal", "a")
	must("kill", "a")
	if got := must("list"); !strings.Contains(got, "down") {
		t.Errorf("list shows no host that is down:\n%s", got)
	}
	must("boot", "a")
	must("gc") // keeps it
	must("reboot", "a")
	must("down", "a")
	if got := must("list"); strings.Contains(got, lab) {
		t.Errorf("the lab is left:\n%s", got)
	}
}

func TestUsage(t *testing.T) {
	for _, args := range [][]string{{}, {"bogus", "a"}, {"up"}, {"exec"}, {"copy", "a"}, {"-h"}} {
		if err := run(t.Context(), args, nil, t.Output(), t.Output()); !errors.Is(err, flag.ErrHelp) {
			t.Errorf("%q: %v, want help", args, err)
		}
	}
}
