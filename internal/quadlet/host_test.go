package quadlet

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/resultity/node/test/host"
)

// TestRealGenerators shows the golden units to the generators of the oldest and
// the newest Podman that is supported. Both must know every key, and the
// command lines that they make must keep the sealing rules.
func TestRealGenerators(t *testing.T) {
	units, err := filepath.Glob("testdata/*.container")
	if err != nil || len(units) < 5 {
		t.Fatalf("%d units, %v", len(units), err)
	}
	lab, err := host.Create(t.Context(), host.Options{Name: fmt.Sprintf("quadlet-%d", os.Getpid()), Progress: t.Output()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := lab.Close(); err != nil {
			t.Error(err)
		}
	})
	for _, release := range []host.Release{host.Trixie, host.Forky} {
		t.Run(string(release), func(t *testing.T) {
			t.Parallel()
			h, err := lab.Up(t.Context(), host.Config{Name: string(release), Release: release})
			if err != nil {
				t.Fatal(err)
			}
			// generate returns the service that the generator makes of a unit.
			generate := func(text []byte) (string, error) {
				if err := h.WriteFile("/tmp/units/"+FileName, text, 0o644); err != nil {
					t.Fatal(err)
				}
				var out bytes.Buffer
				err := h.Exec(t.Context(), host.Cmd{
					Args: []string{"/usr/libexec/podman/quadlet", "-user", "-dryrun"}, Env: []string{"QUADLET_UNIT_DIRS=/tmp/units"}, Stdout: &out,
				})
				return out.String(), err
			}
			for _, file := range units {
				text, err := os.ReadFile(file)
				if err != nil {
					t.Fatal(err)
				}
				service, err := generate(text)
				if err != nil {
					t.Errorf("%s: %v", file, err)
					continue
				}
				command := ""
				for line := range strings.Lines(service) {
					if c, ok := strings.CutPrefix(line, "ExecStart="); ok {
						command += c
					}
				}
				if err := CheckCommand(strings.Fields(command)); err != nil {
					t.Errorf("%s: %v\n%s", file, err, command)
				}
				if strings.Contains(service, "network-online") {
					t.Errorf("%s: waits for a network\n%s", file, service)
				}
				if _, err := generate(append(text, "\n[Container]\nNoSuchKey=1\n"...)); err == nil {
					t.Errorf("%s: a generator that knows every key proves nothing", file)
				}
			}
		})
	}
}
