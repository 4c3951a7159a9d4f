package quadlet

import (
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/containers/podman/v5/pkg/systemd/parser"
	"github.com/containers/podman/v5/pkg/systemd/quadlet"

	"github.com/resultity/node/internal/bridge/contract"
	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/snapshot"
)

// ErrUnsealed says that a unit would run something that is not sealed.
var ErrUnsealed = errors.New("the unit is not sealed")

// Check converts the unit as Podman's generator will and compares the service
// and its command lines with the sealing rules. The rules are lists of what is
// allowed: what they do not know is refused, and so is a unit that lacks
// something they ask for. Errors wrap [ErrUnsealed] and name everything that is
// wrong.
func Check(u Unit) error {
	var bad []error
	if u.Name != FileName || u.Service != ServiceName {
		bad = append(bad, fmt.Errorf("it is called %q and %q", u.Name, u.Service))
	}
	if digest.Of(u.Text) != u.Digest {
		bad = append(bad, errors.New("the text is not the one of its digest"))
	}
	if i := odd.FindIndex(u.Text); i != nil {
		bad = append(bad, fmt.Errorf("byte %d begins something that systemd and Podman might read in two ways", i[0]))
	}
	unit := parser.NewUnitFile()
	if err := unit.Parse(string(u.Text)); err != nil {
		return fmt.Errorf("%w: %w", ErrUnsealed, errors.Join(append(bad, err)...))
	}
	bad = append(bad, checkKeys(unit)...)
	service, err := convert(unit)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrUnsealed, errors.Join(append(bad, err)...))
	}
	bad = append(bad, checkService(service)...)
	argv, err := commandLine(service, "ExecStart")
	if err != nil {
		bad = append(bad, err)
	} else {
		bad = append(bad, checkRun(argv)...)
	}
	if err := errors.Join(bad...); err != nil {
		return fmt.Errorf("%w: %w", ErrUnsealed, err)
	}
	return nil
}

// CheckCommand compares the podman command line that systemd has for the
// service (the ExecStart property) with the same rules. An administrator's drop-in, which Podman merges
// into any unit of the account, shows there and not in the file.
func CheckCommand(argv []string) error {
	if err := errors.Join(checkRun(argv)...); err != nil {
		return fmt.Errorf("%w: %w", ErrUnsealed, err)
	}
	return nil
}

// CheckSettings compares what systemd has for the service beside that command
// line, by the names of its properties, with what the generator makes. What a
// drop-in adds that runs something, or changes the surroundings in which podman
// runs, is refused by its name.
func CheckSettings(settings map[string][]string) error {
	if err := errors.Join(check("["+ServiceName+"]", loadedRules, settings)...); err != nil {
		return fmt.Errorf("%w: %w", ErrUnsealed, err)
	}
	return nil
}

// removed is how the container is removed; the file is Podman's up to 5.4.
const removed = `/usr/bin/podman rm -v -f -i (?:` + ContainerName + `|--cidfile=/run/user/[0-9]+/resultity-runtime\.cid)`

// loadedRules are about the properties of the service.
var loadedRules = map[string]rule{
	"Type":         must("notify"),
	"NotifyAccess": must("all"),
	"Environment":  must("PODMAN_SYSTEMD_UNIT=" + ServiceName),
	"ExecStop":     matching(removed, "the removal of the container"),
	"ExecStopPost": matching("-"+removed, "the removal of the container"),
}

// odd is what the two parsers of the file might not agree upon: bytes that do
// not print, lines that go on, and space around a line.
var odd = regexp.MustCompile(`[^ -~\n]|\\\n|(?m:^[ ]|[ ]$)`)

// keys are those that the file may have, by group. The value says whether a key
// may stand there more than once. Generators differ in what they do with a key
// that they do not know, or with the first of two.
var keys = map[string]map[string]bool{
	"Unit":    {"Description": false, "Documentation": false, "StartLimitIntervalSec": false, "StartLimitBurst": false},
	"Quadlet": {"DefaultDependencies": false},
	"Container": {
		"ContainerName": false, "Image": false, "Pull": false, "Network": false, "PodmanArgs": true, "ReadOnly": false, "ReadOnlyTmpfs": false,
		"Tmpfs": true, "Volume": true, "User": false, "DropCapability": false, "NoNewPrivileges": false, "PidsLimit": false, "Ulimit": false,
		"AddDevice": true, "GroupAdd": false, "WorkingDir": false, "StopSignal": false, "Environment": true, "Entrypoint": false,
		"Exec": false, "Notify": false, "LogDriver": false, "StopTimeout": false,
	},
	"Service": {
		"Restart": false, "RestartSec": false, "RestartSteps": false, "RestartMaxDelaySec": false, "RestartPreventExitStatus": false,
		"TimeoutStartSec": false, "TimeoutStopSec": false, "WatchdogSec": false, "WatchdogSignal": false, "KillMode": false,
		"MemoryMax": false, "MemorySwapMax": false, "OOMPolicy": false,
	},
}

func checkKeys(unit *parser.UnitFile) (bad []error) {
	for _, group := range unit.ListGroups() {
		if keys[group] == nil { // [Install] would start the runtime without the agent
			bad = append(bad, fmt.Errorf("group [%.80s] has no place in a sealed runtime", group))
			continue
		}
		for _, key := range unit.ListKeys(group) {
			many, known := keys[group][key]
			switch n := len(unit.LookupAllRaw(group, key)); {
			case !known:
				bad = append(bad, fmt.Errorf("[%s] %.80s= has no place in a sealed runtime", group, key))
			case n == 0, n > 1 && !many:
				bad = append(bad, fmt.Errorf("[%s] %s= has %d values", group, key, n))
			}
		}
	}
	return bad
}

// convert is what Podman's generator does with the file.
func convert(unit *parser.UnitFile) (*parser.UnitFile, error) {
	unit.Filename = FileName
	info := map[string]*quadlet.UnitInfo{FileName: {ServiceName: strings.TrimSuffix(ServiceName, ".service"), ResourceName: ContainerName}}
	service, warnings, err := quadlet.ConvertContainer(unit, info, true)
	if err := errors.Join(err, warnings); err != nil {
		return nil, err
	}
	return service, nil
}

// A rule says which values are allowed.
type rule struct {
	ok       func(value string) bool
	want     string // in words
	required bool
	many     bool
}

func must(values ...string) rule {
	return rule{ok: func(s string) bool { return slices.Contains(values, s) }, want: strings.Join(values, " or "), required: true}
}

func may(r rule) rule { r.required = false; return r }

func matching(pattern, want string) rule {
	re := regexp.MustCompile(`^(?:` + pattern + `)$`)
	return rule{ok: re.MatchString, want: want, required: true}
}

func number(lo, hi int64) rule {
	return rule{
		ok: func(s string) bool {
			n, err := strconv.ParseInt(s, 10, 64)
			return err == nil && n >= lo && n <= hi && strconv.FormatInt(n, 10) == s
		},
		want: fmt.Sprintf("%d to %d", lo, hi), required: true,
	}
}

// check applies the rules to names with their values.
func check(what string, rules map[string]rule, have map[string][]string) (bad []error) {
	for name, values := range have {
		r, known := rules[name]
		if !known {
			bad = append(bad, fmt.Errorf("%s %.80q has no place in a sealed runtime", what, name))
			continue
		}
		if len(values) > 1 && !r.many {
			bad = append(bad, fmt.Errorf("%s %s is given %d times", what, name, len(values)))
		}
		for _, v := range values {
			if !r.ok(v) {
				bad = append(bad, fmt.Errorf("%s %s is %.200q, want %s", what, name, v, r.want))
			}
		}
	}
	for name, r := range rules {
		if r.required && len(have[name]) == 0 {
			bad = append(bad, fmt.Errorf("%s %s is missing, want %s", what, name, r.want))
		}
	}
	slices.SortFunc(bad, func(a, b error) int { return strings.Compare(a.Error(), b.Error()) })
	return bad
}

// plainText is text for people that systemd takes as it is.
var plainText = matching(`[A-Za-z0-9 ./():_-]*`, "plain text")

// The service as the generator makes it. What was for Quadlet is in groups of
// which systemd ignores the names.
var (
	unitRules = map[string]rule{
		"Description":           plainText,
		"Documentation":         plainText,
		"StartLimitIntervalSec": number(1, 86400),
		"StartLimitBurst":       number(1, 1000),
		"RequiresMountsFor":     {ok: func(s string) bool { return s == "%t/containers" || cleanPath(s) }, want: "paths", required: true, many: true},
		"SourcePath":            {ok: cleanPath, want: "a path"},
	}
	remove       = "/usr/bin/podman rm -v -f -i " + ContainerName
	serviceRules = map[string]rule{
		"Type":                     must("notify"),
		"NotifyAccess":             must("all"),
		"KillMode":                 must("control-group"),
		"Delegate":                 must("yes"),
		"SyslogIdentifier":         must("%N"),
		"Environment":              must("PODMAN_SYSTEMD_UNIT=%n"),
		"ExecStart":                {ok: func(string) bool { return true }, want: "podman run", required: true}, // see runRules
		"ExecStop":                 must(remove),
		"ExecStopPost":             must("-" + remove),
		"Restart":                  must("always"),
		"RestartSec":               matching(`[1-9][0-9]{0,4}ms`, "milliseconds"),
		"RestartSteps":             number(1, 100),
		"RestartMaxDelaySec":       number(1, 3600),
		"RestartPreventExitStatus": must(fmt.Sprintf("%d %d", contract.ExitSandbox, contract.ExitConfig)),
		"TimeoutStartSec":          number(1, 5*3600),
		"TimeoutStopSec":           number(1, 3600),
		"WatchdogSec":              number(1, 3600),
		"WatchdogSignal":           must("SIGKILL"),
		"MemoryMax":                may(number(1, 1<<50)),
		"MemorySwapMax":            may(must("0")),
		"OOMPolicy":                may(must("kill")),
	}
)

func checkService(service *parser.UnitFile) (bad []error) {
	for group, rules := range map[string]map[string]rule{"Unit": unitRules, "Service": serviceRules} {
		have := make(map[string][]string)
		for _, key := range service.ListKeys(group) {
			have[key] = service.LookupAllRaw(group, key)
		}
		bad = append(bad, check("["+group+"]", rules, have)...)
		// A ceiling is all three or none: without the others it would swap, or
		// lose one process and go on.
		if n := len(have["MemoryMax"]); len(have["MemorySwapMax"]) != n || len(have["OOMPolicy"]) != n {
			bad = append(bad, errors.New("[Service] has some of MemoryMax, MemorySwapMax and OOMPolicy, want all or none"))
		}
	}
	return bad
}

// commandLine splits a command line of the service. systemd would replace %x
// and $X in it, so there must be none.
func commandLine(service *parser.UnitFile, key string) ([]string, error) {
	raw, _ := service.LookupLastRaw("Service", key)
	if i := strings.IndexAny(raw, `%$"'\`+"`"); i >= 0 {
		return nil, fmt.Errorf("%s holds a %q, which systemd would not take literally", key, raw[i])
	}
	return strings.Fields(raw), nil
}

// An option of podman run.
type option struct {
	rule
	takes bool // a value of its own; without, one can only be attached with =
}

func value(r rule) option { return option{rule: r, takes: true} }
func onOff(r rule) option { return option{rule: r} }
func bare() option        { return option{rule: must("")} }

// runRules is everything that podman run may be given.
var runRules = map[string]option{
	"--name":            value(must(ContainerName)),
	"--cidfile":         value(may(matching(`/run/user/[0-9]+/resultity-runtime\.cid|%t/%N\.cid`, "a file of the service"))), // up to Podman 5.4
	"--replace":         bare(),
	"--rm":              bare(),
	"-d":                bare(),
	"--log-driver":      value(must("journald")),
	"--cgroups":         value(must("split")),
	"--sdnotify":        value(must("container")),
	"--pull":            value(must("never")),
	"--network":         value(must("none")),
	"--http-proxy":      onOff(must("false")),
	"--read-only":       bare(),
	"--read-only-tmpfs": onOff(must("false")),
	"--image-volume":    value(must("ignore")),
	"--systemd":         value(must("false")),
	"--no-healthcheck":  bare(),
	"--tmpfs": value(rule{
		ok:   matching(`/tmp:rw,size=[1-9][0-9]{0,13},mode=1777,nosuid,nodev,(?:no)?exec|/dev/shm:rw,size=[1-9][0-9]{0,13},mode=1777,nosuid,nodev,noexec`, "").ok,
		want: "/tmp or /dev/shm with a size", required: true, many: true,
	}),
	"-v":             value(rule{ok: func(s string) bool { _, ok := mount(s); return ok }, want: "the model, the socket or the bridge", required: true, many: true}),
	"--user":         value(must(containerUser)),
	"--cap-drop":     value(must("all")),
	"--security-opt": value(must("no-new-privileges")),
	"--pids-limit":   value(number(0, pidsLimit)),
	"--ulimit":       value(must("core=0:0")),
	"--device": value(rule{
		ok:   matching(`[a-z0-9][a-z0-9.-]*/[a-z][a-z0-9_-]*=[A-Za-z0-9][A-Za-z0-9:._-]*`, "").ok,
		want: "a CDI name", many: true,
	}),
	"--group-add":    value(may(must("keep-groups"))),
	"--workdir":      value(must("/")),
	"--stop-signal":  value(must("SIGTERM")),
	"--stop-timeout": value(number(1, 3600)),
	"--env": value(rule{
		ok:   matching(`(?:VLLM|HF|XDG|TRITON|TORCHINDUCTOR|NUMBA|CUDA|TRANSFORMERS|NCCL|GLOO)_[A-Z_]+=`+wordChars+`|HOME=/tmp|DO_NOT_TRACK=1`, "").ok,
		want: "a setting of an engine", many: true,
	}),
	"--entrypoint": value(must(BridgeFile)),
}

const wordChars = `[A-Za-z0-9/._:=,+@-]+`

// mounts of the host, by their place in the container.
var mounts = map[string]string{
	modelsDir:  "ro,nosuid,nodev,noexec,z",
	socketDir:  "rw,nosuid,nodev,noexec,z",
	BridgeFile: "ro,nosuid,nodev",
}

// mount returns the place of a mount in the container, if it is an allowed one.
func mount(s string) (place string, ok bool) {
	parts := strings.Split(s, ":")
	if len(parts) != 3 || !cleanPath(parts[0]) || mounts[parts[1]] != parts[2] {
		return "", false
	}
	return parts[1], true
}

// splitRun sorts a podman command line into the options of podman run, and the
// image with what follows it.
func splitRun(argv []string) (have map[string][]string, rest []string, err error) {
	if len(argv) < 2 || argv[0] != "/usr/bin/podman" || argv[1] != "run" {
		return nil, nil, fmt.Errorf("it runs %.80q, want /usr/bin/podman run", argv)
	}
	have = make(map[string][]string)
	rest = argv[2:]
	for len(rest) > 0 && strings.HasPrefix(rest[0], "-") {
		name, v, attached := strings.Cut(rest[0], "=")
		rest = rest[1:]
		if runRules[name].takes && !attached {
			if len(rest) == 0 {
				return nil, nil, fmt.Errorf("podman run %s has no value", name)
			}
			v, rest = rest[0], rest[1:]
		}
		have[name] = append(have[name], v)
	}
	return have, rest, nil
}

func checkRun(argv []string) (bad []error) {
	have, rest, err := splitRun(argv)
	if err != nil {
		return []error{err}
	}
	rules := make(map[string]rule, len(runRules))
	for name, f := range runRules {
		rules[name] = f.rule
	}
	bad = append(bad, check("podman run", rules, have)...)
	bad = append(bad, each("-v", have["-v"], mounts, func(s string) string { p, _ := mount(s); return p })...)
	bad = append(bad, each("--tmpfs", have["--tmpfs"], map[string]string{"/tmp": "", "/dev/shm": ""},
		func(s string) string { p, _, _ := strings.Cut(s, ":"); return p })...)
	if n := len(have["--group-add"]); n > 0 && len(have["--device"]) == 0 {
		bad = append(bad, errors.New("podman run --group-add without a device"))
	}
	if len(rest) == 0 {
		return append(bad, errors.New("podman run has no image"))
	}
	if _, err := snapshot.ParseImageRef(rest[0]); err != nil {
		bad = append(bad, err)
	}
	return append(bad, checkBridge(rest[1:], len(have["--device"]) > 0)...)
}

// each asks that every place is there once.
func each[V any](flag string, values []string, places map[string]V, place func(string) string) (bad []error) {
	n := make(map[string]int)
	for _, v := range values {
		n[place(v)]++
	}
	for p := range places {
		if n[p] != 1 {
			bad = append(bad, fmt.Errorf("podman run %s has %s %d times, want once", flag, p, n[p]))
		}
	}
	return bad
}

// checkBridge reads the command line as the bridge will.
func checkBridge(args []string, devices bool) (bad []error) {
	o, err := contract.Parse(args)
	if err != nil {
		return []error{fmt.Errorf("bridge: %w", err)}
	}
	if o.Socket != socketDir+"/"+SocketName {
		bad = append(bad, fmt.Errorf("bridge: the socket is %s", o.Socket))
	}
	for _, p := range o.Writable {
		if p != "/tmp" && p != "/dev/shm" {
			bad = append(bad, fmt.Errorf("bridge: %s may not be writable", p))
		}
	}
	if len(o.Devices) > 0 && !devices {
		bad = append(bad, fmt.Errorf("bridge: expects %s although no device is given", o.Devices[0]))
	}
	for _, p := range []string{modelsDir, BridgeFile} {
		if !slices.Contains(o.ReadOnly, p) {
			bad = append(bad, fmt.Errorf("bridge: %s is not ordered to be read-only", p))
		}
	}
	return bad
}
