package e2e

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"io"
	"os/exec"
	"path"
	"slices"
	"strings"
	"testing"

	"github.com/resultity/node/internal/control"
	"github.com/resultity/node/internal/gate"
	"github.com/resultity/node/test/stack"
)

// doctor runs doctor on a node and returns its report and exit code.
func doctor(t *testing.T, n *stack.Node, args ...string) (*control.Report, int) {
	t.Helper()
	out, err := n.Output(t.Context(), append([]string{"resultityctl", "doctor", "--json"}, args...)...)
	code := 0
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		code = exit.ExitCode()
	} else if err != nil {
		t.Fatal(err)
	}
	r := new(control.Report)
	if err := json.Unmarshal(out, r); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return r, code
}

func find(r *control.Report, name string) control.Check {
	i := slices.IndexFunc(r.Checks, func(c control.Check) bool { return c.Name == name })
	if i < 0 {
		return control.Check{}
	}
	return r.Checks[i]
}

// A healthy node passes every probe, and its support archive has what the
// passphrase and the token do not.
func TestDoctor(t *testing.T) {
	eachNode(t, func(t *testing.T, n *stack.Node) {
		const archive = "/root/support.tar.gz"
		r, code := doctor(t, n, "--bundle", archive)
		for _, c := range r.Checks {
			if slices.Contains(control.Probes, c.Name) {
				t.Logf("%s: expected: %s; got: %s, %s", c.Name, control.Pass, c.Result, c.Detail)
			}
			if c.Result == control.Fail || c.Result != control.Pass && slices.Contains(control.Probes, c.Name) {
				t.Errorf("%+v", c)
			}
		}
		if code != 0 || find(r, control.ProbeOneToken).MS == 0 {
			t.Errorf("exit code %d, %+v", code, find(r, control.ProbeOneToken))
		}
		if out, err := n.Output(t.Context(), "stat", "-c", "%a %U", archive); err != nil || strings.TrimSpace(string(out)) != "600 root" {
			t.Errorf("%s, %v", out, err)
		}
		files := unpack(t, n, archive)
		for _, want := range []string{"status.json", "doctor.json", "versions.json", "podman.json", "config/agent.toml", "units/resultity-agent.service/0-resultity-agent.service"} {
			if len(files["resultity-support/"+want]) == 0 {
				t.Errorf("the archive has no %s", want)
			}
		}
		for _, secret := range []string{"/etc/resultity/enrolment-token"} {
			raw, err := n.Output(t.Context(), "cat", secret)
			if err != nil || len(raw) < 10 {
				t.Fatal(err, len(raw))
			}
			for name, text := range files {
				if bytes.Contains(text, bytes.TrimSpace(raw)) {
					t.Errorf("%s is in %s", secret, name)
				}
			}
		}
	})
}

func unpack(t *testing.T, n *stack.Node, name string) map[string][]byte {
	t.Helper()
	raw, err := n.Output(t.Context(), "cat", name)
	if err != nil {
		t.Fatal(err)
	}
	z, err := gzip.NewReader(bytes.NewReader(raw))
	if err != nil {
		t.Fatal(err)
	}
	files := map[string][]byte{}
	for r := tar.NewReader(z); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return files
		}
		if err == nil {
			files[h.Name], err = io.ReadAll(r)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

// Podman's policy, loosened by hand, is found by trying, and by what the agent
// wrote where only an image of the runtime's own repository would show it.
func TestDoctorFindsALoosePolicy(t *testing.T) {
	n := s.Nodes[0]
	file := path.Join(n.State, "agent/podman/.config/containers/policy.json")
	before, err := n.Output(t.Context(), "cat", file)
	if err != nil {
		t.Fatal(err)
	}
	write := func(text []byte) {
		t.Helper()
		if err := n.WriteFile(file, text, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	defer write(before)
	var policy map[string]any
	if err := json.Unmarshal(before, &policy); err != nil {
		t.Fatal(err)
	}
	anything := []any{map[string]any{"type": "insecureAcceptAnything"}}
	own := policy["transports"].(map[string]any)["docker"].(map[string]any)
	for scope := range own {
		own[scope] = anything // for the runtime's repository alone
	}
	hidden, err := json.Marshal(policy)
	if err != nil {
		t.Fatal(err)
	}
	for _, loose := range [][]byte{hidden, []byte(`{"default":[{"type":"insecureAcceptAnything"}]}`)} {
		write(loose)
		r, code := doctor(t, n)
		probe := find(r, control.ProbeUnsignedPodman)
		t.Logf("%.60s: expected: %s; got: %s, %s", loose, control.Fail, probe.Result, probe.Detail)
		for _, c := range r.Checks {
			if (c.Result == control.Fail) != (c.Name == control.ProbeUnsignedPodman) {
				t.Errorf("%+v", c)
			}
		}
		if code != 2 || !strings.Contains(probe.Detail, file) {
			t.Errorf("exit code %d", code)
		}
	}
	if out, err := n.Podman(t.Context(), "images", "--format", "{{.Repository}}"); err != nil || strings.Contains(string(out), "resultity-doctor") {
		t.Errorf("the probe left an image: %v\n%s", err, out)
	}
}

// Status names the gate also where there is no agent to ask.
func TestStatusWithoutAnAgent(t *testing.T) {
	n := s.Nodes[1]
	ctx := t.Context()
	look := func(name, detail, remedy string) {
		t.Helper()
		out, err := n.Output(ctx, "resultityctl", "status", "--json")
		var exit *exec.ExitError
		var st control.Status
		if !errors.As(err, &exit) || exit.ExitCode() != 69 {
			t.Errorf("%v, want exit status 69", err)
		}
		if err := json.Unmarshal(out, &st); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		if g := st.Closed(); g == nil || g.Name != name || !strings.Contains(g.Detail, detail) || !strings.Contains(g.Remedy, remedy) {
			t.Errorf("closed: %+v, want %s", g, name)
		}
		if len(st.Gates) != len(gate.List) {
			t.Errorf("%d gates, want %d", len(st.Gates), len(gate.List))
		}
		if text, _ := n.Output(ctx, "resultityctl", "status"); text != nil {
			t.Logf("status:\n%s", text)
		}
	}
	if err := n.UserCtl(ctx, "stop", n.Agent); err != nil {
		t.Fatal(err)
	}
	look(gate.Agent, "stopped", "systemctl --user -M resultity@ start resultity-agent")

	if out, err := n.Output(ctx, "loginctl", "disable-linger", stack.Account); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	// The account's service manager takes a moment to end.
	if out, err := n.Output(ctx, "sh", "-c", "systemctl stop user@$(id -u "+stack.Account+").service"); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	defer func() { // the remedies, as they are given
		ctx := context.WithoutCancel(ctx)
		if out, err := n.Output(ctx, "loginctl", "enable-linger", stack.Account); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		if out, err := n.Output(ctx, "sh", "-c", "systemctl start user@$(id -u "+stack.Account+").service && systemctl --user -M "+stack.Account+"@ start resultity-agent"); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		if err := n.WaitRoutable(ctx); err != nil {
			t.Error(err)
		}
	}()
	look(gate.Linger, "lingering is off", "sudo loginctl enable-linger resultity")
	// Looking has started nothing.
	if out, err := n.Output(ctx, "sh", "-c", "systemctl is-active user@$(id -u "+stack.Account+").service"); err == nil {
		t.Errorf("the account's service manager: %s", out)
	}
}
