package quadlet

import (
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/resultity/node/internal/snapshot"
)

func TestOrderIsWhatTheUnitSays(t *testing.T) {
	p := params(t, snapshot.LlamaCpp, "nvidia.com/gpu=0")
	o, err := render(t, p).Order()
	if err != nil {
		t.Fatal(err)
	}
	wantMounts := []Mount{
		{p.ModelDir, "/models", true, []string{"nosuid", "nodev", "noexec"}},
		{p.SocketDir, "/run/resultity", false, []string{"nosuid", "nodev", "noexec"}},
		{p.BridgePath, "/resultity-bridge", true, []string{"nosuid", "nodev"}},
	}
	wantTmpfs := map[string][]string{
		"/tmp":     {"rw", "size=67108864", "mode=1777", "nosuid", "nodev", "noexec"},
		"/dev/shm": {"rw", "size=1048576", "mode=1777", "nosuid", "nodev", "noexec"},
	}
	if !reflect.DeepEqual(o.Mounts, wantMounts) || !reflect.DeepEqual(o.Tmpfs, wantTmpfs) {
		t.Errorf("mounts %+v and %+v, want %+v and %+v", o.Mounts, o.Tmpfs, wantMounts, wantTmpfs)
	}
	if o.Image != p.Config.Runtime.Image || o.User != "1000:1000" || !slices.Equal(o.Bridge.Devices, p.DeviceNodes) {
		t.Errorf("%+v", o)
	}
	if o.Command[0] != "/resultity-bridge" || o.Command[1] != "--socket" || !slices.Contains(o.Command, "/usr/bin/llama-server") {
		t.Errorf("command %q", o.Command)
	}
	for _, bad := range []string{"", "[Container]\nImage=x\n", strings.Replace(string(render(t, p).Text), "User=1000:1000\n", "", 1)} {
		if o, err := remake(bad).Order(); err == nil {
			t.Errorf("%q orders %+v", bad, o)
		}
	}
}
