package systemd

import (
	"errors"
	"net"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"
)

func TestStateOf(t *testing.T) {
	got := stateOf(map[string]any{
		"LoadState": "loaded", "ActiveState": "failed", "SubState": "failed", "Result": "watchdog", "StatusText": "serving",
		"ExecMainStatus": int32(9), "NRestarts": uint32(3), "MainPID": uint32(77), "NeedDaemonReload": true, "StartLimitBurst": uint32(10), "StartLimitIntervalUSec": uint64(600_000_000),
		"InvocationID": []byte{0xab, 0x01}, "ActiveEnterTimestamp": uint64(1767225600_000001),
		"ExecStart":    [][]any{{"/usr/bin/podman", []string{"/usr/bin/podman", "run"}, false}},
		"ExecStartPre": [][]any{{"/bin/a", []string{"/bin/a", "b"}, false, uint64(1)}, {"/bin/c", []string{"d", "e"}, true, uint64(1)}},
		"Environment":  []string{"A=b", "C=d"}, "EnvironmentFiles": [][]any{{"/etc/x", true}}, "User": "root", "Group": "", "DynamicUser": true,
		"PassEnvironment": []string{}, "BindPaths": [][]any{}, "SetLoginEnvironment": false, "FileDescriptorStoreMax": uint32(0), "LimitNOFILE": uint64(7),
	})
	want := State{
		Load: "loaded", Active: "failed", Sub: "failed", Result: "watchdog", StatusText: "serving", ExitStatus: 9, NRestarts: 3, MainPID: 77, StartLimit: 10, StartWindow: 10 * time.Minute,
		Settings: map[string][]string{
			"ExecStartPre": {"/bin/a b", "-@/bin/c d e"}, "Environment": {"A=b", "C=d"}, "EnvironmentFiles": {"/etc/x true"}, "User": {"root"}, "DynamicUser": {"true"},
		},
		InvocationID: "ab01", Since: time.UnixMicro(1767225600_000001), Stale: true, Command: []string{"/usr/bin/podman", "run"},
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v, want %+v", got, want)
	}
	// Nothing, or something of another type, is no reason to fall over.
	for _, p := range []map[string]any{nil, {"ExecStart": [][]any{{"/x", []string{"/usr/bin/podman", "run"}}}}, {"ExecStart": [][]any{{"/x"}}, "MainPID": "x", "InvocationID": []byte{}, "LoadState": 1}} {
		if got := stateOf(p); !reflect.DeepEqual(got, State{}) {
			t.Errorf("got %+v", got)
		}
	}
}

func TestJobErrorTellsAll(t *testing.T) {
	e := &JobError{"start", "x.service", "failed", State{Load: "loaded", Result: "exit-code", ExitStatus: 77, StatusText: "user: want one that is not 0"}}
	const want = "start x.service: failed, result exit-code, exit status 77, it said: user: want one that is not 0"
	if e.Error() != want {
		t.Errorf("got %q, want %q", e.Error(), want)
	}
}

func TestDialWithoutBus(t *testing.T) {
	t.Setenv("DBUS_SESSION_BUS_ADDRESS", "unix:path="+filepath.Join(t.TempDir(), "none"))
	if _, err := Dial(t.Context()); err == nil || !strings.Contains(err.Error(), "enable-linger") {
		t.Errorf("got %v", err)
	}
}

// What is not the file that was written is written anew, whatever it is.
func TestHolds(t *testing.T) {
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	for name, text := range map[string]string{"same": "[Unit]\n", "other": "[Unix]\n", "shorter": "[Unit]", "longer": "[Unit]\nx"} {
		if err := os.WriteFile(at(name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(os.Symlink(at("same"), at("link")), os.Mkdir(at("dir"), 0o700)); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"same", "other", "shorter", "longer", "link", "dir", "none"} {
		if got, err := holds(at(name), []byte("[Unit]\n")); got != (name == "same") || err != nil {
			t.Errorf("%s: %v, %v", name, got, err)
		}
	}
	if _, err := holds(at("same/x"), nil); err == nil {
		t.Error("what cannot be looked at is as good as absent")
	}
}

// A bus that accepts and then says nothing must not hang the agent for ever.
func TestDialWithASilentBus(t *testing.T) {
	path := filepath.Join(t.TempDir(), "bus")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	t.Setenv("DBUS_SESSION_BUS_ADDRESS", "unix:path="+path)
	defer func(d time.Duration) { busPatience = d }(busPatience)
	busPatience = 50 * time.Millisecond
	if _, err := Dial(t.Context()); !errors.Is(err, errSilent) || !strings.Contains(err.Error(), "lingering") {
		t.Fatalf("Dial = %v, want errSilent and what to look at", err)
	}
}
