package quadlet

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/containers/podman/v5/pkg/systemd/parser"

	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/snapshot"
)

var update = flag.Bool("update", false, "rewrite the golden files")

// params returns valid parameters for an engine.
func params(t testing.TB, engine snapshot.Engine, devices ...string) Params {
	t.Helper()
	image, err := snapshot.ParseImageRef("registry.example:5000/resultity/runtime@" + digest.Of([]byte("image")).String())
	if err != nil {
		t.Fatal(err)
	}
	model := snapshot.Model{Name: "tiny-chat", Version: "1", Format: "gguf", Files: []snapshot.File{{Path: "sub/tiny-chat-q8_0.gguf", Size: 1, SHA256: digest.Of(nil)}}}
	p := Params{
		Config: &snapshot.Config{
			Limits: snapshot.Limits{RequestBytes: 1 << 20},
			Models: []snapshot.Model{{Name: "other", Files: model.Files}, model},
			Runtime: snapshot.Runtime{
				Engine: engine, Image: image, Model: "tiny-chat", Devices: devices,
				Settings: snapshot.Settings{Context: 1024, Slots: 2, Threads: 1},
				TmpBytes: 64 << 20, ShmBytes: 1 << 20,
				StartTimeout: 120, Watchdog: 30, Stall: 20, StopTimeout: 15,
			},
		},
		ModelDir:      "/var/lib/resultity/.local/state/resultity/models/41bf282b6fda",
		SocketDir:     "/run/user/990/resultity/engine",
		BridgePath:    "/usr/libexec/resultity/resultity-bridge",
		PodmanVersion: PodmanVersion{5, 4},
		DelegatedPids: true,
	}
	if len(devices) > 0 {
		p.Config.Runtime.Settings.GPULayers = 99
		p.DeviceNodes = []string{"/dev/nvidia0", "/dev/nvidiactl", "/dev/nvidia-uvm"}
	}
	return p
}

func render(t testing.TB, p Params) Unit {
	t.Helper()
	u, err := Render(p)
	if err != nil {
		t.Fatal(err)
	}
	return u
}

// TestGolden compares units, and the podman command lines that the generator
// makes of them, with what was reviewed.
func TestGolden(t *testing.T) {
	noPids := params(t, snapshot.LlamaCpp)
	noPids.DelegatedPids = false
	ceiling := params(t, snapshot.LlamaCpp)
	ceiling.MemoryMax = 24 << 30
	for name, p := range map[string]Params{
		"llamacpp-memory":  ceiling,
		"llamacpp":         params(t, snapshot.LlamaCpp),
		"llamacpp-no-pids": noPids,
		"llamacpp-gpu":     params(t, snapshot.LlamaCpp, "nvidia.com/gpu=0", "nvidia.com/gpu=1"),
		"vllm":             params(t, snapshot.VLLM, "nvidia.com/gpu=all"),
	} {
		t.Run(name, func(t *testing.T) {
			u := render(t, p)
			if u.Name != FileName || u.Service != ServiceName || u.Digest != digest.Of(u.Text) {
				t.Errorf("%+v", u)
			}
			if err := Check(u); err != nil {
				t.Error(err)
			}
			golden(t, name+".container", u.Text)
			golden(t, name+".run", []byte(readable(command(t, u))))
		})
	}
}

// command returns the podman command line that the generator makes.
func command(t testing.TB, u Unit) []string {
	t.Helper()
	unit := parser.NewUnitFile()
	if err := unit.Parse(string(u.Text)); err != nil {
		t.Fatal(err)
	}
	service, err := convert(unit)
	if err != nil {
		t.Fatal(err)
	}
	argv, err := commandLine(service, "ExecStart")
	if err != nil {
		t.Fatal(err)
	}
	return argv
}

// readable prints an option a line. The generator's order is not always the
// same, so options are sorted.
func readable(argv []string) string {
	var options []string
	rest := argv[2:]
	for ; strings.HasPrefix(rest[0], "-"); rest = rest[1:] {
		o := rest[0]
		if runRules[o].takes && !strings.Contains(o, "=") {
			o += " " + rest[1]
			rest = rest[1:]
		}
		options = append(options, o)
	}
	slices.Sort(options)
	return strings.Join(slices.Concat(argv[:2], options, rest), "\n") + "\n"
}

func golden(t *testing.T, name string, got []byte) {
	t.Helper()
	file := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(file, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("%s: got\n%s\nwant\n%s", file, got, want)
	}
}

// What the unit does not depend on must not change it: each change restarts
// the engine.
func TestTextDependsOnTheRuntimeAlone(t *testing.T) {
	want := render(t, params(t, snapshot.LlamaCpp))
	p := params(t, snapshot.LlamaCpp)
	p.Config.Network.Name = "other"
	p.Config.Models = append(p.Config.Models, snapshot.Model{Name: "third"})
	p.Config.Limits.Tokens = 7
	p.Config.Validation.Golden = []snapshot.Golden{{Name: "x"}}
	p.PodmanVersion = PodmanVersion{5, 8}
	if got := render(t, p); got.Digest != want.Digest {
		t.Errorf("the text changed to\n%s", got.Text)
	}
	p.Config.Runtime.Settings.Slots++
	if got := render(t, p); got.Digest == want.Digest {
		t.Error("the text does not show the number of slots")
	}
}

func TestRenderRefuses(t *testing.T) {
	for name, tt := range map[string]struct {
		spoil func(*Params)
		want  string
	}{
		"old Podman":           {func(p *Params) { p.PodmanVersion = PodmanVersion{5, 2} }, "upgrade Podman"},
		"very old Podman":      {func(p *Params) { p.PodmanVersion = PodmanVersion{4, 9} }, "upgrade Podman"},
		"no Podman":            {func(p *Params) { p.PodmanVersion = PodmanVersion{} }, "upgrade Podman"},
		"no configuration":     {func(p *Params) { p.Config = nil }, "no configuration"},
		"unknown engine":       {func(p *Params) { p.Config.Runtime.Engine = "x" }, "no engine"},
		"unknown model":        {func(p *Params) { p.Config.Runtime.Model = "x" }, "no model"},
		"model without files":  {func(p *Params) { p.Config.Models[1].Files = nil }, "no model"},
		"relative path":        {func(p *Params) { p.ModelDir = "models/x" }, "model directory"},
		"no path":              {func(p *Params) { p.SocketDir = "" }, "socket directory"},
		"root":                 {func(p *Params) { p.ModelDir = "/" }, "model directory"},
		"all of /home":         {func(p *Params) { p.ModelDir = "/home" }, "model directory"},
		"path up":              {func(p *Params) { p.ModelDir = "/var/../etc" }, "model directory"},
		"path with //":         {func(p *Params) { p.ModelDir = "/var//lib" }, "model directory"},
		"path with end":        {func(p *Params) { p.ModelDir = "/var/lib/" }, "model directory"},
		"path with colon":      {func(p *Params) { p.ModelDir = "/var/lib:/etc" }, "model directory"},
		"path with specifier":  {func(p *Params) { p.BridgePath = "/usr/%h" }, "bridge"},
		"path with variable":   {func(p *Params) { p.BridgePath = "/usr/$HOME" }, "bridge"},
		"path with line":       {func(p *Params) { p.ModelDir = "/var/lib\nPodmanArgs=--privileged" }, "model directory"},
		"path with space":      {func(p *Params) { p.ModelDir = "/var/lib x" }, "model directory"},
		"path with quote":      {func(p *Params) { p.ModelDir = `/var/"lib` }, "model directory"},
		"path with backslash":  {func(p *Params) { p.ModelDir = `/var/lib\` }, "model directory"},
		"path with comma":      {func(p *Params) { p.ModelDir = `/var/lib,rw` }, "model directory"},
		"long socket path":     {func(p *Params) { p.SocketDir = "/run/" + strings.Repeat("x", maxSocketPath+1-len("/run//"+SocketName)) }, strconv.Itoa(maxSocketPath)},
		"model name":           {func(p *Params) { p.Config.Models[1].Name, p.Config.Runtime.Model = "a b", "a b" }, "model"},
		"model file":           {func(p *Params) { p.Config.Models[1].Files[0].Path = "a\nb.gguf" }, "argument"},
		"device":               {func(p *Params) { p.Config.Runtime.Devices = []string{"a\nb"} }, "device"},
		"device node":          {func(p *Params) { p.DeviceNodes = []string{"/dev/a b"} }, "argument"},
		"relative device node": {func(p *Params) { p.DeviceNodes = []string{"dev/a"} }, "bridge options"},
		"no slots":             {func(p *Params) { p.Config.Runtime.Settings.Slots = 0 }, "bridge options"},
	} {
		p := params(t, snapshot.LlamaCpp)
		tt.spoil(&p)
		if u, err := Render(p); err == nil || !strings.Contains(err.Error(), tt.want) || u.Text != nil {
			t.Errorf("%s: got %v, want an error with %q", name, err, tt.want)
		}
	}
}

// remake makes a unit of changed text.
func remake(text string) Unit {
	return Unit{Name: FileName, Service: ServiceName, Text: []byte(text), Digest: digest.Of([]byte(text))}
}

func TestLongestSocketPath(t *testing.T) {
	p := params(t, snapshot.LlamaCpp)
	p.SocketDir = "/run/" + strings.Repeat("x", maxSocketPath-len("/run//"+SocketName))
	if err := Check(render(t, p)); err != nil {
		t.Error(err)
	}
}

// Every line of the unit is there for a reason: without it, the unit is
// refused.
func TestCheckMissesEveryLine(t *testing.T) {
	harmless := []string{"Description=", "Documentation=", "AddDevice=", "GroupAdd=", "Environment="}
	ceiling := params(t, snapshot.VLLM, "nvidia.com/gpu=all")
	ceiling.MemoryMax = 1 << 30
	for _, p := range []Params{params(t, snapshot.LlamaCpp), ceiling} {
		lines := strings.SplitAfter(string(render(t, p).Text), "\n")
		removed := 0
		for i, line := range lines {
			if strings.TrimSpace(line) == "" || line[0] == '#' || slices.ContainsFunc(harmless, func(h string) bool { return strings.HasPrefix(line, h) }) {
				continue
			}
			removed++
			u := remake(strings.Join(slices.Delete(slices.Clone(lines), i, i+1), ""))
			if err := Check(u); !errors.Is(err, ErrUnsealed) {
				t.Errorf("without %q: got %v", line, err)
			}
		}
		if removed < 40 {
			t.Errorf("only %d lines were tried", removed)
		}
	}
}

func TestCheckRefusesChanges(t *testing.T) {
	pids := fmt.Sprintf("PidsLimit=%d", pidsLimit)
	text := string(render(t, params(t, snapshot.LlamaCpp)).Text)
	for _, tt := range []struct{ old, new string }{
		{"Network=none", "Network=host"},
		{"Network=none", "Network=pasta"},
		{"Network=none", "Network=none\nNetwork=host"},
		{"Pull=never", "Pull=always"},
		{"ReadOnly=true", "ReadOnly=false"},
		{"ReadOnlyTmpfs=false", "ReadOnlyTmpfs=true"},
		{"--http-proxy=false", "--http-proxy=true"},
		{"--image-volume=ignore", "--image-volume=tmpfs"},
		{"--systemd=false", "--systemd=always"},
		{"DropCapability=all", "DropCapability=CAP_NET_RAW"},
		{"NoNewPrivileges=true", "NoNewPrivileges=false"},
		{"User=1000:1000", "User=0:0"},
		{"User=1000:1000", "User=1000:1000\nUserNS=keep-id"},
		{pids, "PidsLimit=-1"},
		{pids, fmt.Sprintf("PidsLimit=%d", pidsLimit+1)},
		{"core=0:0", "core=-1:-1"},
		{"--no-healthcheck", "--health-cmd=/bin/sh"},
		{"KillMode=control-group", "KillMode=mixed"},
		{"Entrypoint=/resultity-bridge", "Entrypoint=/bin/sh"},
		{"Notify=true", "Notify=healthy"},
		{"Notify=true", "Notify=false"},
		{"LogDriver=journald", "LogDriver=k8s-file"},
		{"WorkingDir=/", "WorkingDir=/tmp"},
		{"@sha256:", ":latest@sha256:"},
		{"noexec,z\nVolume=/run", "noexec,z,exec\nVolume=/run"},
		{":/models:ro,", ":/models:rw,"},
		{":/models:ro,", ":/etc:ro,"},
		{":/models:ro,", ":/run/resultity:ro,"},
		{":/resultity-bridge:ro,", ":/resultity-bridge:rw,"},
		{":/resultity-bridge:ro,nosuid", ":/resultity-bridge:ro"},
		{"Volume=/var/lib/resultity/.local/state/resultity/models/41bf282b6fda:", "Volume=/:"},
		{"Volume=/var/lib/resultity/.local/state/resultity/models/41bf282b6fda:", "Volume=/home:"},
		{"Volume=/var/lib/resultity/.local/state/resultity/models/41bf282b6fda:", "Volume=/var/lib/resultity/../../../etc:"},
		{"Volume=/var/lib/resultity/.local/state/resultity/models/41bf282b6fda:", "Volume=models:"},
		{"Tmpfs=/tmp:rw", "Tmpfs=/root:rw"},
		{"size=67108864,", ""},
		{"Tmpfs=/dev/shm", "Tmpfs=/tmp"},
		{"--socket /run/resultity/engine.sock", "--socket /tmp/engine.sock"},
		{"--writable /tmp", "--writable /models"},
		{"--read-only /models", "--read-only /etc"},
		{"--engine http://127.0.0.1:8080", "--engine http://192.0.2.1:8080"},
		{"--max-in-flight 3", "--max-in-flight 0"},
		{"Exec=--socket", "Exec=--sockets"},
		{"/usr/bin/llama-server", "%h/llama-server"},
		{"/usr/bin/llama-server", "$HOME/llama-server"},
		{"/usr/bin/llama-server", `"/usr/bin/llama server"`},
		{" -- /usr", " --device /dev/mem -- /usr"},
		{"Restart=always", "Restart=no"},
		{"RestartSec=200ms", "RestartSec=0"},
		{"=77 78", "="},
		{"WatchdogSec=30", "WatchdogSec=infinity"},
		{"WatchdogSignal=SIGKILL", "WatchdogSignal=SIGCONT"},
		{"TimeoutStopSec=45", "TimeoutStopSec=infinity"},
		{"DefaultDependencies=false", "DefaultDependencies=true"},
		{"ContainerName=resultity-runtime", "ContainerName=other"},
		{"Pull=never", "Pull=\\\nnever"},
		{"Pull=never", " Pull=never"},
		{"Pull=never", "Pull=never "},
		{"Pull=never", "Pull=never\t"},
		{"Pull=never", "Pull=never\x00"},
		{"Pull=never", "# é\nPull=never"},
		{"Resultity runtime:", "%h:"},
	} {
		changed := strings.Replace(text, tt.old, tt.new, 1)
		if changed == text {
			t.Errorf("the unit has no %q", tt.old)
		}
		if err := Check(remake(changed)); !errors.Is(err, ErrUnsealed) {
			t.Errorf("%q in place of %q: got %v", tt.new, tt.old, err)
		}
	}
}

func TestCheckRefusesAdditions(t *testing.T) {
	text := string(render(t, params(t, snapshot.LlamaCpp)).Text)
	add := func(group, line string) {
		t.Helper()
		changed := strings.Replace(text, "["+group+"]\n", "["+group+"]\n"+line+"\n", 1)
		if changed == text {
			changed = text + "\n[" + group + "]\n" + line + "\n"
		}
		err := Check(remake(changed))
		t.Logf("[%s] %s: expected: %v; got: %v", group, line, ErrUnsealed, err)
		if !errors.Is(err, ErrUnsealed) {
			t.Errorf("with %q in [%s]: got %v", line, group, err)
		}
	}
	// Everything else that a container unit may say.
	for _, line := range []string{
		"AddCapability=CAP_SYS_ADMIN", "AddDevice=/dev/mem", "AddDevice=/dev/kvm:/dev/kvm:rwm", "AddHost=a:1.2.3.4", "Annotation=a=b", "AppArmor=unconfined", "AutoUpdate=registry",
		"CgroupsMode=disabled", "ContainersConfModule=/etc/x.conf", "DNS=1.1.1.1", "DNSOption=x", "DNSSearch=x", "Environment=LD_PRELOAD=/tmp/x", "Environment=PATH=/tmp",
		"EnvironmentFile=/etc/environment", "EnvironmentHost=true", "ExposeHostPort=80", "GIDMap=0:0:1", "GlobalArgs=--root=/tmp/x", "Group=0", "GroupAdd=keep-groups", "GroupAdd=video",
		"HealthCmd=/bin/true", "HealthInterval=1s", "HealthOnFailure=kill", "HostName=x", "HttpProxy=true", "IP=10.0.0.1", "Label=a=b", "LogOpt=path=/tmp/x", "Mask=/proc/x", "Memory=1g",
		"Mount=type=bind,source=/,destination=/host", "NetworkAlias=x", "Pod=x.pod", "PublishPort=80:80", "ReloadCmd=/bin/sh", "ReloadSignal=HUP", "Retry=3", "Rootfs=/", "RunInit=true",
		"SeccompProfile=unconfined", "Secret=x", "SecurityLabelDisable=true", "SecurityLabelFileType=x", "SecurityLabelLevel=x", "SecurityLabelNested=true", "SecurityLabelType=x",
		"ShmSize=1g", "StartWithPod=true", "SubGIDMap=x", "SubUIDMap=x", "Sysctl=net.ipv4.ip_forward=1", "Tmpfs=/run", "Timezone=local", "UIDMap=0:0:1", "Ulimit=nofile=1:1", "Unmask=ALL",
		"UserNS=host", "UserNS=keep-id", "UserNS=nomap", "VolatileTmp=true", "Volume=/etc:/etc", "Volume=/scratch", "Volume=/var/lib/x:/models:ro,nosuid,nodev,noexec,z", "Bogus=1",
		"PodmanArgs=--privileged", "PodmanArgs=--pid=host", "PodmanArgs=--ipc host", "PodmanArgs=--uts=host", "PodmanArgs=--cgroupns=host", "PodmanArgs=--security-opt seccomp=unconfined",
		"PodmanArgs=--security-opt=label=disable", "PodmanArgs=--security-opt=unmask=ALL", "PodmanArgs=--cap-add=all", "PodmanArgs=--network=host", "PodmanArgs=--net host", "PodmanArgs=--user=0",
		"PodmanArgs=-v /:/host", "PodmanArgs=--volume=/:/host", "PodmanArgs=--mount type=bind,src=/,dst=/host", "PodmanArgs=--device=/dev/mem", "PodmanArgs=--read-only=false",
		"PodmanArgs=--env-host", "PodmanArgs=-e A=b", "PodmanArgs=--tmpfs /run", "PodmanArgs=--rootfs", "PodmanArgs=--userns=host", "PodmanArgs=--env", "PodmanArgs=--hooks-dir=/tmp",
		"PodmanArgs=--cidfile=/etc/x", "PodmanArgs=other/image", "PodmanArgs=--",
	} {
		add("Container", line)
	}
	for _, line := range []string{
		"ExecStartPre=/bin/sh", "ExecStartPost=/bin/sh", "ExecStop=/bin/sh", "ExecStopPost=/bin/sh", "ExecReload=/bin/sh", "ExecCondition=/bin/sh", "ExecStart=/bin/sh",
		"Environment=PODMAN=/tmp/x", "EnvironmentFile=/tmp/x", "PassEnvironment=PATH", "User=root", "Slice=x.slice", "RootDirectory=/x", "KillMode=process", "Type=oneshot",
		"NotifyAccess=none", "SyslogIdentifier=x", "FailureAction=reboot", "AmbientCapabilities=CAP_NET_ADMIN", "LoadCredential=x:/etc/shadow", "Restart=no",
	} {
		add("Service", line)
	}
	for _, line := range []string{"OnFailure=x.service", "Wants=network-online.target", "Requires=x.service", "FailureAction=reboot", "JobTimeoutAction=reboot", "SuccessAction=exit", "Description=a$b"} {
		add("Unit", line)
	}
	add("Install", "WantedBy=default.target")
	add("Socket", "ListenStream=1")
	add("Quadlet", "DefaultDependencies=true")
	add("Quadlet", "Bogus=true")
}

func TestCheckComparesNames(t *testing.T) {
	good := render(t, params(t, snapshot.LlamaCpp))
	for name, spoil := range map[string]func(*Unit){
		"file":      func(u *Unit) { u.Name = "other.container" },
		"service":   func(u *Unit) { u.Service = "other.service" },
		"digest":    func(u *Unit) { u.Digest = digest.Of(nil) },
		"no text":   func(u *Unit) { *u = remake("") },
		"no unit":   func(u *Unit) { *u = remake("Container") },
		"zero unit": func(u *Unit) { *u = Unit{} },
	} {
		u := good
		spoil(&u)
		if err := Check(u); !errors.Is(err, ErrUnsealed) {
			t.Errorf("%s: got %v", name, err)
		}
	}
}

// The command line that systemd reports is the one of the file, with the
// file of the container's id that older Podman adds.
// What a drop-in can add to the service beside the command line is refused.
func TestCheckSettings(t *testing.T) {
	loaded := func() map[string][]string {
		return map[string][]string{
			"Type": {"notify"}, "NotifyAccess": {"all"}, "Environment": {"PODMAN_SYSTEMD_UNIT=resultity-runtime.service"},
			"ExecStop":     {"/usr/bin/podman rm -v -f -i --cidfile=/run/user/996/resultity-runtime.cid"}, // of Podman 5.4
			"ExecStopPost": {"-/usr/bin/podman rm -v -f -i resultity-runtime"},                            // of Podman 5.8
		}
	}
	if err := CheckSettings(loaded()); err != nil {
		t.Error(err)
	}
	for name, values := range map[string][]string{
		"ExecStartPre": {"/bin/sh"}, "ExecStartPost": {"/bin/sh"}, "ExecCondition": {"/bin/true"}, "ExecReload": {"/bin/sh"},
		"ExecStop": {"/usr/bin/podman rm -v -f -i resultity-runtime", "/bin/sh"}, "ExecStopPost": {"-/bin/sh"},
		"Environment": {"PODMAN_SYSTEMD_UNIT=resultity-runtime.service", "CONTAINERS_CONF=/tmp/x"}, "EnvironmentFiles": {"/etc/x false"},
		"User": {"root"}, "BindPaths": {"/a /usr/bin/podman false 0"}, "RootDirectory": {"/x"}, "NotifyAccess": {"main"}, "Type": nil,
	} {
		s := loaded()
		s[name] = values
		if err := CheckSettings(s); !errors.Is(err, ErrUnsealed) || !strings.Contains(err.Error(), name) {
			t.Errorf("%s=%q: %v", name, values, err)
		}
	}
}

func TestCheckCommand(t *testing.T) {
	argv := command(t, render(t, params(t, snapshot.LlamaCpp)))
	with := func(extra ...string) []string { return slices.Insert(slices.Clone(argv), 2, extra...) }
	split := slices.Clone(argv) // as older Podman writes it
	for i := 0; i < len(split); i++ {
		if name, v, _ := strings.Cut(split[i], "="); name == "--entrypoint" {
			split = slices.Replace(split, i, i+1, name, v)
		}
	}
	for _, ok := range [][]string{argv, split, with("--cidfile=/run/user/990/resultity-runtime.cid")} {
		if err := CheckCommand(ok); err != nil {
			t.Error(err)
		}
	}
	for _, bad := range [][]string{
		nil, argv[:1], argv[:2], argv[:10], argv[:len(argv)-30], argv[1:], with("--cidfile=/etc/x"), with("--privileged"), with("--volume", "/:/host"),
		with("--pid=host"), with("--env", "A=b"), with("--name=resultity-runtime"),
		with("--read-only=false"), with("--http-proxy", "true"), with("--network=host"), append(argv[:5:5], "--env"), append([]string{"/tmp/podman"}, argv[1:]...),
	} {
		if err := CheckCommand(bad); !errors.Is(err, ErrUnsealed) {
			t.Errorf("%q: got %v", bad, err)
		}
	}
}

// keysOf lists the groups and keys of a unit as Podman's parser sees them.
func keysOf(t testing.TB, text []byte) []string {
	t.Helper()
	f := parser.NewUnitFile()
	if err := f.Parse(string(text)); err != nil {
		t.Fatal(err)
	}
	var all []string
	for _, g := range f.ListGroups() {
		for _, k := range f.ListKeys(g) {
			all = append(all, g+"/"+k)
		}
	}
	slices.Sort(all)
	return all
}

// FuzzRender feeds hostile strings to everything that takes a string. What is
// not refused has the same keys as always and keeps the sealing rules.
func FuzzRender(f *testing.F) {
	f.Add("tiny-chat", "a.gguf", "nvidia.com/gpu=0", "/var/lib/m", "/run/user/1/s", "/usr/lib/b", "/dev/x", 0)
	f.Add("x\n[Service]\nExecStart=/bin/sh", "a b", "-nvidia.com/gpu=0", "/a:/b", "/%h/x", "/$x/y", "--", 1)
	f.Add("--", "--", "--", "/--/--", "/-/-", "/--privileged/x", "/--", 2)
	engines := []snapshot.Engine{snapshot.LlamaCpp, snapshot.VLLM}
	f.Fuzz(func(t *testing.T, model, file, device, modelDir, socketDir, bridge, node string, engine int) {
		p := params(t, engines[uint(engine)%2], "nvidia.com/gpu=0")
		want := keysOf(t, render(t, p).Text)
		c := p.Config
		c.Models[1].Name, c.Runtime.Model, c.Models[1].Files[0].Path = model, model, file
		c.Runtime.Devices = []string{device}
		p.ModelDir, p.SocketDir, p.BridgePath, p.DeviceNodes = modelDir, socketDir, bridge, []string{node}
		u, err := Render(p)
		if err != nil {
			return
		}
		if got := keysOf(t, u.Text); !slices.Equal(got, want) {
			t.Fatalf("keys %q, want %q\n%s", got, want, u.Text)
		}
		// Some words have meaning for podman or the bridge; Check knows those.
		if err := Check(u); err != nil && !errors.Is(err, ErrUnsealed) {
			t.Fatal(err)
		}
	})
}
