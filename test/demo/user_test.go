package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/resultity/node/internal/receipt"
	"github.com/resultity/node/test/chat"
	"github.com/resultity/node/test/host"
	"github.com/resultity/node/test/model"
	"github.com/resultity/node/test/stack"
)

// An ordinary user on a machine with what a node needs and nothing else: no
// root, no Go, no registry.
func TestOrdinaryUser(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	dir := t.TempDir()
	if err := stack.Prepare(ctx, dir); err != nil {
		t.Fatal(err)
	}
	if err := host.Prepare(ctx, os.Stderr, host.Image{}); err != nil {
		t.Fatal(err)
	}
	lab, err := host.Create(ctx, host.Options{Progress: os.Stderr})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := lab.Close(); err != nil {
			t.Error(err)
		}
	})
	h, err := lab.Up(ctx, host.Config{Name: "desk"})
	if err != nil {
		t.Fatal(err)
	}
	if err := h.CopyTo(dir, "/opt/demo"); err != nil {
		t.Fatal(err)
	}
	u := &account{t, ctx, h}
	u.root("useradd", "--create-home", "alice")

	if out, code := u.demo(); code != 1 || !strings.Contains(out, "loginctl enable-linger alice") {
		t.Errorf("without a session: %d, %s", code, out)
	}
	u.root("loginctl", "enable-linger", "alice")
	u.root("systemctl", "start", "user@1000.service")

	// What a node of the user's own begins with.
	u.run("mkdir", "-p", "/home/alice/.config/resultity")
	if out, code := u.demo(); code != 1 || !strings.Contains(out, "there is /home/alice/.config/resultity") {
		t.Errorf("with a node: %d, %s", code, out)
	}
	u.run("rmdir", "/home/alice/.config/resultity")
	u.nothingLeft("refusals")

	out, code := u.demo()
	if code != 0 || !strings.HasSuffix(out, "\ndemo: ok\n") {
		t.Fatalf("exit status %d:\n%s\n%s", code, out, u.journal())
	}
	u.outputs()
	u.nothingLeft("a demo")

	u.keptAndDown()

	// It is interrupted while the node comes up.
	var cut bytes.Buffer
	if err := h.Exec(ctx, host.Cmd{User: "alice", Args: []string{"sh", "-c", `
		/opt/demo/bin/demo -prebuilt /opt/demo > interrupted & pid=$!
		until grep -q nothing.to.active interrupted; do sleep 0.05; done
		kill -INT $pid; wait $pid; code=$?; cat interrupted; rm interrupted; exit $code`}, Stdout: &cut}); err == nil || !strings.Contains(cut.String(), "demo: failed: ") {
		t.Errorf("interrupted: %v, %s", err, cut.Bytes())
	}
	u.nothingLeft("an interruption")
}

// keptAndDown leaves the demo running and uses it, in a directory whose name
// cannot stand in a unit.
func (u *account) keptAndDown() {
	u.Helper()
	odd := "XDG_CACHE_HOME=/home/alice/my cache"
	if out, code := u.demoWith([]string{odd}, "-keep"); code != 0 || !strings.HasSuffix(out, "\ndemo: ok\n") {
		u.Fatalf("kept: exit status %d:\n%s\n%s", code, out, u.journal())
	}
	p := model.Prompts()[0]
	r := request(p)
	answer := u.run("sh", "-c", `. build/demo/env && curl -sS --cacert "$RESULTITY_CA" -H "Authorization: Bearer $RESULTITY_API_KEY" -H "Content-Type: application/json" -d "$0" "$RESULTITY_API/v1/chat/completions"`, string(r.JSON()))
	if got, err := chat.Text([]byte(answer), false); err != nil || got != p.Answer {
		u.Errorf("the kept network answered %q (%v), want %q", got, err, p.Answer)
	}
	if out, code := u.demoWith([]string{odd}, "-down"); code != 0 || out != "demo: down\n" {
		u.Errorf("down: %d, %s", code, out)
	}
	u.nothingLeft("going down")
}

// account is alice on a host.
type account struct {
	*testing.T
	ctx context.Context
	*host.Host
}

// Name is that of the test.
func (u *account) Name() string { return u.T.Name() }

func (u *account) demo(args ...string) (out string, code int) { return u.demoWith(nil, args...) }

func (u *account) demoWith(env []string, args ...string) (out string, code int) {
	u.Helper()
	var b bytes.Buffer
	err := u.Exec(u.ctx, host.Cmd{User: "alice", Env: env, Args: append([]string{"/opt/demo/bin/demo", "-prebuilt", "/opt/demo"}, args...), Stdout: &b, Stderr: &b})
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return b.String(), exit.ExitCode()
	}
	if err != nil {
		u.Fatal(err)
	}
	return b.String(), 0
}

func (u *account) root(args ...string) string {
	u.Helper()
	out, err := u.Output(u.ctx, args...)
	if err != nil {
		u.Fatalf("%v: %s", err, out)
	}
	return string(out)
}

func (u *account) run(args ...string) string {
	u.Helper()
	out, err := u.OutputAs(u.ctx, "alice", args...)
	if err != nil {
		u.Fatalf("%v: %s", err, out)
	}
	return string(out)
}

func (u *account) journal() string { return u.root("journalctl", "--no-pager", "-n", "200") }

// outputs looks at the files that the demo leaves.
func (u *account) outputs() {
	u.Helper()
	read := func(name string) []byte {
		u.Helper()
		raw, err := u.ReadFile("/home/alice/build/demo/" + name)
		if err != nil {
			u.Fatal(err)
		}
		return raw
	}
	if got, err := chat.Text(read("answer.json"), false); err != nil || got != model.Prompts()[0].Answer {
		u.Errorf("answer.json says %q (%v)", got, err)
	}
	if _, err := receipt.Verify(read("receipt.json")); err != nil {
		u.Error(err)
	}
	var steps []entry
	if err := json.Unmarshal(read("timeline.json"), &steps); err != nil || len(steps) < 10 {
		u.Errorf("timeline.json has %d steps (%v)", len(steps), err)
	}
}

// nothingLeft looks for what the demo could have forgotten. Podman's own files
// stay, as after any use of it.
func (u *account) nothingLeft(after string) {
	u.Helper()
	belongs := []string{"systemd", "(sd-pam)", "dbus-daemon"} // to an idle session
	for line := range strings.Lines(u.root("ps", "-eo", "uid=,comm=,args=")) {
		f := strings.Fields(line)
		if uid := f[0]; len(uid) > 3 && !slices.Contains(belongs, f[1]) { // alice's, and her subordinate ids
			u.Errorf("after %s there is a process: %s", after, line)
		}
	}
	for _, list := range []string{"list-units", "list-unit-files"} {
		for line := range strings.Lines(u.run("systemctl", "--user", "--all", "--plain", "--no-legend", list)) {
			if strings.Contains(line, "resultity") || strings.Contains(line, "podman-pause") || strings.Contains(line, "libpod") {
				u.Errorf("after %s there is a unit: %s", after, line)
			}
		}
	}
	for line := range strings.Lines(u.root("find", "/home/alice", "/run/user/1000", "/tmp", "/var/tmp", "/dev/shm", "-name", "*resultity*")) {
		u.Errorf("after %s there is %s", after, line)
	}
	for _, name := range []string{"overlay-images/images.json", "overlay-layers/layers.json", "overlay-containers/volatile-containers.json"} {
		raw, err := u.ReadFile("/home/alice/.local/share/containers/storage/" + name)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			u.Error(err)
		} else if s := strings.TrimSpace(string(raw)); s != "" && s != "[]" {
			u.Errorf("after %s %s holds %.300s", after, name, s)
		}
	}
}
