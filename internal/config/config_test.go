package config

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/resultity/node/internal/durable"
)

func env(k string) string {
	return map[string]string{"XDG_RUNTIME_DIR": "/run/user/7", "STATE_DIRECTORY": "/s", "RUNTIME_DIRECTORY": "/run/user/7/resultity"}[k]
}

const good = "[network.t]\nurl = \"https://n.example:8443/\"\nroot = \"/r.json\"\n"

func write(t *testing.T, text string, dropins ...string) string {
	t.Helper()
	f := filepath.Join(t.TempDir(), "agent.toml")
	if err := os.WriteFile(f, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	for i, d := range dropins {
		if err := os.MkdirAll(f+".d", 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(f+".d", string(rune('a'+i))+".toml"), []byte(d), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return f
}

func TestLoadFillsAndOverrides(t *testing.T) {
	c, err := Load(write(t, good, "[log]\nlevel = \"debug\"\n[network.t]\nca = \"/a\"\n", "[network.t]\nca = \"/b\"\n"), env)
	if err != nil {
		t.Fatal(err)
	}
	want := Config{
		Networks: []Network{{Name: "t", URL: "https://n.example:8443", Root: "/r.json", CA: "/b"}},
		Paths: Paths{State: "/s", Runtime: "/run/user/7/resultity", Units: "/run/user/7/containers/systemd",
			Podman: "/run/user/7/resultity-podman/podman.sock", Bridge: "/usr/libexec/resultity/resultity-bridge"},
		Runtime: Runtime{Devices: []string{"amd.com/gpu=*", "intel.com/gpu=*", "nvidia.com/gpu=*"}},
		Models:  Models{ServeRate: "64M"},
		Log:     Log{Level: "debug", Upload: "on"},
	}
	if !reflect.DeepEqual(*c, want) {
		t.Errorf("got  %+v\nwant %+v", *c, want)
	}
}

// second is a drop-in that joins a network.
func second(name, more string) string {
	return fmt.Sprintf("[network.%[1]q]\nurl = \"https://%[1]s.example\"\nroot = \"/r.json\"\n%[2]s", name, more)
}

func many(n int) (text string) {
	for i := range n {
		text += second(fmt.Sprintf("n%d", i), fmt.Sprintf("priority = %d\n", i+1))
	}
	return text
}

// A drop-in joins a network; the highest priority comes first, wherever it stands.
func TestSeveralNetworks(t *testing.T) {
	c, err := Load(write(t, good, second("main.net", "priority = 7\n"), second("z", "priority = 3\n")+"[network.t]\nca = \"/b\"\n"), env)
	if err != nil {
		t.Fatal(err)
	}
	want := []Network{
		{Name: "main.net", URL: "https://main.net.example", Root: "/r.json", Priority: 7},
		{Name: "z", URL: "https://z.example", Root: "/r.json", Priority: 3},
		{Name: "t", URL: "https://n.example:8443", Root: "/r.json", CA: "/b"},
	}
	if !slices.Equal(c.Networks, want) {
		t.Errorf("got  %+v\nwant %+v", c.Networks, want)
	}
	if _, err := Load(write(t, many(MaxNetworks)), env); err != nil {
		t.Error(err)
	}
}

func TestErrorsNameFileAndKey(t *testing.T) {
	for _, c := range []struct{ name, base, drop, file, key, expect string }{
		{"unknown key", good + "x = 1\n", "", "agent.toml", "network.t.x", "unknown key"},
		{"no TOML", good + "x 1\n", "", "agent.toml", "line ", "column 3"},
		{"unknown section", good + "[zap]\na = 1\n", "", "agent.toml", "zap.a", "unknown key"},
		{"unknown key in drop-in", good, "[log]\nlvl = \"info\"\n", "a.toml", "log.lvl", "unknown key"},
		{"wrong type", good + "[log]\nlevel = 3\n", "", "agent.toml", "log.level", "string"},
		{"memory no size", good, "[runtime]\nmemory_max = \"much\"\n", "a.toml", "runtime.memory_max", "want bytes like"},
		{"memory too small", good, "[runtime]\nmemory_max = \"63M\"\n", "a.toml", "runtime.memory_max", "at least 64M"},
		{"memory beyond all", good, "[runtime]\nmemory_max = \"101%\"\n", "a.toml", "runtime.memory_max", "a percentage"},
		{"memory overflows", good, "[runtime]\nmemory_max = \"99999999999T\"\n", "a.toml", "runtime.memory_max", "want bytes"},
		{"device memory a share", good, "[runtime]\ndevice_memory = \"50%\"\n", "a.toml", "runtime.device_memory", "want bytes like"},
		{"device memory no size", good, "[runtime]\ndevice_memory = \"lots\"\n", "a.toml", "runtime.device_memory", "want bytes like"},
		{"neighbour without scheme", good, "[models]\nneighbours = [\"10.0.0.2:8080\"]\n", "a.toml", "models.neighbours", "want URLs like"},
		{"neighbour with a user", good, "[models]\nneighbours = [\"http://u:p@h\"]\n", "a.toml", "models.neighbours", "want URLs like"},
		{"neighbour that is a file", good, "[models]\nneighbours = [\"file:///etc\"]\n", "a.toml", "models.neighbours", "want URLs like"},
		{"serve to everybody", good, "[models]\nserve = \"0.0.0.0:80\"\n", "a.toml", "models.serve", "private network"},
		{"serve to the internet", good, "[models]\nserve = \"203.0.113.7:80\"\n", "a.toml", "models.serve", "private network"},
		{"serve to the internet, mapped", good, "[models]\nserve = \"[::ffff:203.0.113.7]:80\"\n", "a.toml", "models.serve", "private network"},
		{"serve by a name", good, "[models]\nserve = \"localhost:80\"\n", "a.toml", "models.serve", "private network"},
		{"serve at no port", good, "[models]\nserve = \"10.0.0.2\"\n", "a.toml", "models.serve", "private network"},
		{"serve at port 0", good, "[models]\nserve = \"10.0.0.2:0\"\n", "a.toml", "models.serve", "private network"},
		{"serve drips", good, "[models]\nserve_rate = \"1023K\"\n", "a.toml", "models.serve_rate", "at least 1M"},
		{"serve half", good, "[models]\nserve_rate = \"50%\"\n", "a.toml", "models.serve_rate", "bytes a second"},
		{"too many neighbours", good, "[models]\nneighbours = [" + strings.Repeat("\"http://h\",", maxNeighbours+1) + "]\n", "a.toml", "models.neighbours", fmt.Sprintf("at most %d", maxNeighbours)},
		{"device no list", good + "[runtime]\ndevices = \"nvidia.com/gpu=0\"\n", "", "agent.toml", "runtime.devices", "list of strings"},
		{"device no string", good, "[runtime]\ndevices = [\"nvidia.com/gpu=0\", 1]\n", "a.toml", "runtime.devices", "list of strings"},
		{"device no name", good, "[runtime]\ndevices = [\"/dev/kvm\"]\n", "a.toml", "runtime.devices", "want CDI devices"},
		{"device of all kinds", good, "[runtime]\ndevices = [\"*\"]\n", "a.toml", "runtime.devices", "want CDI devices"},
		{"bad level in drop-in", good, "[log]\nlevel = \"loud\"\n", "a.toml", "log.level", "debug, info"},
		{"no network", "[log]\nlevel = \"info\"\n", "", "agent.toml", "network", "[network.NAME]"},
		{"empty section", "[network]\n", "", "agent.toml", "network", "[network.NAME]"},
		{"no table", "[network]\nname = \"t\"\nurl = \"https://n\"\n", "", "agent.toml", "network.", "[network.NAME] with ca, enrolment_token, priority, root, url"},
		{"bad name", good, "[network.T]\n", "a.toml", "network.T", "want the network's name"},
		{"half a network", good, "[network.u]\npriority = 1\n", "a.toml", "network.u.url", "want https://"},
		{"empty network", good, "[network.u]\n", "a.toml", "network.u", "want https://"},
		{"equal priorities", good, second("u", ""), "a.toml", "network.u.priority", "like that of t"},
		{"equal addresses", strings.Replace(good, "n.example:8443/", "u.example", 1), second("u", "priority = 3\n"), "agent.toml", "network.t.url", "that of u"},
		{"priority no number", good, second("u", "priority = \"3\"\n"), "a.toml", "network.u.priority", "whole number"},
		{"priority no whole number", good, second("u", "priority = 1.5\n"), "a.toml", "network.u.priority", "whole number"},
		{"priority too high", good, second("u", fmt.Sprintf("priority = %d\n", maxNumber+1)), "a.toml", "network.u.priority", fmt.Sprintf("0 to %d", maxNumber)},
		{"too many kept", good + fmt.Sprintf("[replay]\nkeep = %d\n", maxNumber+1), "", "agent.toml", "replay.keep", fmt.Sprintf("0 to %d", maxNumber)},
		{"priority below zero", good, second("u", "priority = -1\n"), "a.toml", "network.u.priority", "0 to 1000"},
		{"too many", good, many(MaxNetworks), "agent.toml", "network", fmt.Sprintf("%d networks, at most %d", MaxNetworks+1, MaxNetworks)},
		{"http", strings.Replace(good, "https", "http", 1), "", "agent.toml", "network.t.url", "want https://"},
		{"password in url", strings.Replace(good, "//n", "//u:p@n", 1), "", "agent.toml", "network.t.url", "want https://"},
		{"relative root", strings.Replace(good, `"/r.json"`, `"r.json"`, 1), "", "agent.toml", "network.t.root", "absolute path"},
		{"no root", strings.Replace(good, `root = "/r.json"`, "", 1), "", "agent.toml", "network.t.root", "absolute path"},
		{"unclean bridge", good + "[paths]\nbridge = \"/a/../b\"\n", "", "agent.toml", "paths.bridge", "absolute path"},
		{"not TOML", "[network\n", "", "agent.toml", "", ""},
	} {
		var drops []string
		if c.drop != "" {
			drops = append(drops, c.drop)
		}
		_, err := Load(write(t, c.base, drops...), env)
		if err == nil {
			t.Errorf("%s: accepted", c.name)
			continue
		}
		for _, part := range []string{c.file, c.key, c.expect} {
			if !strings.Contains(err.Error(), part) {
				t.Errorf("%s: error %q does not say %q", c.name, err, part)
			}
		}
	}
	if _, err := Load(filepath.Join(t.TempDir(), "none.toml"), env); err == nil || !strings.Contains(err.Error(), "does not exist") {
		t.Errorf("missing file: %v", err)
	}
	most := good + many(MaxNetworks-1) + second("last", fmt.Sprintf("priority = %d\n", maxNumber))
	most = strings.Replace(most, many(1), "", 1) // one in place of another
	most += "[models]\nneighbours = [" + strings.Repeat("\"http://h\",", maxNeighbours) + "]\n"
	most += strings.Repeat("#", maxFile-len(most))
	if c, err := Load(write(t, most), env); err != nil || len(c.Networks) != MaxNetworks || c.Networks[0].Priority != maxNumber || len(c.Models.Neighbours) != maxNeighbours {
		t.Errorf("all that there may be: %v", err)
	}
	big := write(t, most+"#")
	if _, err := Load(big, env); !errors.Is(err, durable.ErrLarge) {
		t.Errorf("huge file: %v", err)
	}
}

// The example is documentation: it must load, and mention every key.
func TestExampleIsWholeAndLoads(t *testing.T) {
	if _, err := Load("agent.toml", env); err != nil {
		t.Error(err)
	}
	raw, err := os.ReadFile("agent.toml")
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	section := ""
	for line := range strings.Lines(string(raw)) {
		if m := regexp.MustCompile(`^\[(\w+)(\.\w+)?\]`).FindStringSubmatch(line); m != nil {
			if section = m[1]; m[2] != "" {
				section += ".NAME"
			}
		}
		if m := regexp.MustCompile(`^(?:# )?(\w+) *= ["\[0-9]`).FindStringSubmatch(line); m != nil {
			got = append(got, section+"."+m[1])
		}
	}
	slices.Sort(got)
	if !slices.Equal(got, Keys()) {
		t.Errorf("the example has\n%v\nthe agent knows\n%v", got, Keys())
	}
}

// A later list stands for itself, also an empty one.
func TestListsAreNotMixed(t *testing.T) {
	list := func(l string) string { return "[runtime]\ndevices = " + l + "\n" }
	for _, c := range []struct {
		last string
		want []string
	}{
		{`["a.b/c=0"]`, []string{"a.b/c=0"}},
		{`[]`, []string{}},
	} {
		got, err := Load(write(t, good+list(`["nvidia.com/gpu=0", "nvidia.com/gpu=1"]`), list(c.last)), env)
		if err != nil || !slices.Equal(got.Runtime.Devices, c.want) {
			t.Errorf("%s: %v, %v", c.last, got, err)
		}
	}
}

func TestMemoryCeiling(t *testing.T) {
	for _, c := range []struct {
		text        string
		total, want int64
	}{
		{"", 4 << 30, 4<<30 - 4<<30/10},
		{"", 256 << 30, 255 << 30},
		{"", 0, 0},
		{"75%", 1000, 750},
		{"75%", 0, 0},
		{"24G", 8 << 30, 24 << 30},
		{"65536K", 0, 64 << 20},
		{"512M", 0, 512 << 20},
		{"1T", 0, 1 << 40},
		{"67108864", 0, 64 << 20},
	} {
		if _, err := (Runtime{MemoryMax: c.text}).check(); err != nil {
			t.Error(err)
		}
		if got := (Runtime{MemoryMax: c.text}).Memory(c.total); got != c.want {
			t.Errorf("%q of %d: %d, want %d", c.text, c.total, got, c.want)
		}
	}
}

func TestServe(t *testing.T) {
	for _, at := range []string{"10.0.0.2:8080", "192.168.1.1:80", "[fd00::1]:8080", "[fe80::2%eth0]:8080", "169.254.3.4:1"} {
		c, err := Load(write(t, good, fmt.Sprintf("[models]\nserve = %q\nserve_rate = \"2G\"\n", at)), env)
		if err != nil || c.Models.Serve != at || c.Models.Rate() != 2<<30 {
			t.Errorf("%s: %v", at, err)
		}
	}
}
