package contract

import (
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"
)

func full() Options {
	o := Defaults()
	o.Socket = "/run/resultity/a.sock"
	o.Engine = netip.MustParseAddrPort("[::1]:9931")
	o.Model = "org/tiny-chat:1.0"
	o.Health = "/api/version"
	o.StartTimeout = 90 * time.Second
	o.Watchdog = 3 * time.Second
	o.Stall = 1500 * time.Millisecond
	o.CanaryEvery = time.Hour
	o.StopGrace = 100 * time.Millisecond
	o.MaxBody = 1
	o.MaxInFlight = 4096
	o.Writable = []string{"/tmp", "/dev/shm"}
	o.ReadOnly = []string{"/models"}
	o.Devices = []string{"/dev/nvidia0", "/dev/nvidiactl"}
	o.Command = []string{"/usr/bin/llama-server", "-m", "/models/x.gguf", "--", "", "a b"}
	return o
}

func TestArgsAndParseAgree(t *testing.T) {
	want := full()
	args, err := want.Args()
	if err != nil {
		t.Fatal(err)
	}
	got, err := Parse(args)
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("Parse(Args()) =\n%+v, want\n%+v", got, want)
	}
	// A field that no flag carries would be lost on the way unseen.
	if n, fields := len(want.settings()), reflect.TypeFor[Options]().NumField(); n != fields-1 {
		t.Errorf("%d flags for %d fields beside Command", n, fields-1)
	}
}

func TestParseFillsDefaults(t *testing.T) {
	got, err := Parse([]string{"--model", "m", "--max-in-flight=2", "--", "/engine"})
	if err != nil {
		t.Fatal(err)
	}
	want := Defaults()
	want.Model, want.MaxInFlight, want.Command = "m", 2, []string{"/engine"}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v, want %+v", got, want)
	}
}

func TestParseRefuses(t *testing.T) {
	ok := []string{"--model", "m", "--max-in-flight", "2"}
	for _, tt := range []struct {
		args string // before " -- /engine"
		want string // in the message
	}{
		{"--sockets /x", "not defined"},
		{"--socket", "needs an argument"},
		{"--socket run/x.sock", "absolute path"},
		{"--socket /run/../x.sock", "absolute path"},
		{"--socket /" + strings.Repeat("x", 107), "107 bytes"},
		{"--socket /a --socket /a", "given twice"},
		{"--engine http://10.0.0.1:80", "loopback"},
		{"--engine http://localhost:80", "loopback"},
		{"--engine https://127.0.0.1:80", "loopback"},
		{"--engine http://127.0.0.1:0", "loopback"},
		{"--engine http://127.0.0.1:80/v1", "loopback"},
		{"--engine http://127.0.0.1:080", "loopback"},
		{"--model m", "given twice"},
		{"--health health", "want a path"},
		{"--health /health?x=1", "want a path"},
		{"--watchdog 30", "duration"},
		{"--watchdog 99ms", "duration"},
		{"--stall -1s", "duration"},
		{"--stall 25h", "duration"},
		{"--max-body 0", "number of bytes"},
		{"--max-body 1073741825", "number of bytes"},
		{"--max-body 1M", "number of bytes"},
		{"--writable tmp", "absolute path"},
		{"--writable /tmp --writable /tmp", "given twice"},
		{"--read-only /a\nb", "control characters"},
		{"--device /" + strings.Repeat("x", 4095), "4095 bytes"},
		{"stray", "only flags"},
	} {
		args := slices.Concat(ok, strings.Split(tt.args, " "), []string{"--", "/engine"})
		_, err := Parse(args)
		t.Logf("%.60s: expected: %s; got: %v", tt.args, tt.want, err)
		if err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("Parse(%q) = %v, want an error with %q", tt.args, err, tt.want)
		}
	}
	for _, tt := range []struct {
		args []string
		want string
	}{
		{nil, `"--"`},
		{append(ok, "/engine"), `"--"`},
		{append(ok, "--"), "command line is missing"},
		{append(ok, "--", "engine"), "absolute path"},
		{append(ok, "--", "/engine", "a\x00b"), "NUL"},
		{[]string{"--model", "m", "--", "/engine"}, "--max-in-flight is missing"},
		{[]string{"--max-in-flight", "2", "--", "/engine"}, "--model is missing"},
		{[]string{"--model", "", "--max-in-flight", "2", "--", "/engine"}, "letters"},
		{[]string{"--model", "a b", "--max-in-flight", "2", "--", "/engine"}, "letters"},
		{[]string{"--model", "m", "--max-in-flight", "0", "--", "/engine"}, "number from 1"},
		{[]string{"--model", "m", "--max-in-flight", "4097", "--", "/engine"}, "number from 1"},
	} {
		_, err := Parse(tt.args)
		t.Logf("%q: expected: %s; got: %v", tt.args, tt.want, err)
		if err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("Parse(%q) = %v, want an error with %q", tt.args, err, tt.want)
		}
	}
}

func TestArgsRefusesWhatParseRefuses(t *testing.T) {
	for name, spoil := range map[string]func(*Options){
		"no engine address": func(o *Options) { o.Engine = netip.AddrPort{} },
		"public address":    func(o *Options) { o.Engine = netip.MustParseAddrPort("192.0.2.1:80") },
		"model with quote":  func(o *Options) { o.Model = `m" --x` },
		"no command":        func(o *Options) { o.Command = nil },
		"no limit":          func(o *Options) { o.MaxInFlight = 0 },
		"path up":           func(o *Options) { o.Writable = []string{"/tmp/.."} },
		"path that ends it": func(o *Options) { o.Socket = "--" },
	} {
		o := full()
		spoil(&o)
		if args, err := o.Args(); err == nil {
			t.Errorf("%s: Args() = %q, want an error", name, args)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add("--model\nm\n--max-in-flight\n2\n--\n/engine")
	args, _ := full().Args()
	f.Add(strings.Join(args, "\n"))
	f.Fuzz(func(t *testing.T, s string) {
		o, err := Parse(strings.Split(s, "\n"))
		if err != nil {
			return
		}
		args, err := o.Args()
		if err != nil {
			t.Fatalf("accepted %q, but does not print it: %v", s, err)
		}
		if again, err := Parse(args); err != nil || !reflect.DeepEqual(again, o) {
			t.Fatalf("%+v became %+v (%v)", o, again, err)
		}
	})
}
