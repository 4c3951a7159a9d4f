package contract

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"net/netip"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Options is the bridge's command line. [Defaults] fills what has a default.
type Options struct {
	// Socket is the unix socket to listen on, at most 107 bytes.
	Socket string
	// Engine is where the engine listens, a loopback address and a port.
	Engine netip.AddrPort
	// Model is the name that the engine serves the model under.
	Model string
	// Health is the engine's path that answers 200 once it can work.
	Health string
	// StartTimeout bounds the time from the engine's start to its first completion.
	StartTimeout time.Duration
	// Watchdog is the unit's WatchdogSec=.
	Watchdog time.Duration
	// Stall is how long the engine may owe bytes before it counts as hung.
	Stall time.Duration
	// CanaryEvery is how long an idle engine is believed to be alive.
	CanaryEvery time.Duration
	// StopGrace is how long requests in flight may take to end at a stop.
	StopGrace time.Duration
	// MaxBody bounds a request body, in bytes.
	MaxBody int64
	// MaxInFlight is the number of requests that the engine works on at once.
	MaxInFlight int
	// Writable are mount points that may be writable beside the socket's directory.
	Writable []string
	// ReadOnly are paths that must exist on a read-only mount.
	ReadOnly []string
	// Devices are device nodes, and sockets of device daemons, that may be
	// there beside the standard ones.
	Devices []string
	// Command is the engine's command line, an absolute path first.
	Command []string
}

// Defaults returns options that lack only Model, MaxInFlight and Command.
func Defaults() Options {
	return Options{
		Socket:       "/run/resultity/engine.sock",
		Engine:       netip.MustParseAddrPort("127.0.0.1:8080"),
		Health:       "/health",
		StartTimeout: 5 * time.Minute,
		Watchdog:     30 * time.Second,
		Stall:        time.Minute,
		CanaryEvery:  30 * time.Second,
		StopGrace:    10 * time.Second,
		MaxBody:      1 << 20,
	}
}

// setting is one flag: how its text becomes a value and back. Parse and Args
// are made from the same list and cannot disagree.
type setting struct {
	name     string
	required bool
	repeated bool
	parse    func(string) error
	print    func() []string
}

func (o *Options) settings() []setting {
	return []setting{
		one("socket", &o.Socket, parseSocket, same),
		one("engine", &o.Engine, parseEngine, func(a netip.AddrPort) string { return "http://" + a.String() }),
		required(one("model", &o.Model, parseModel, same)),
		one("health", &o.Health, parseURLPath, same),
		one("start-timeout", &o.StartTimeout, parseDuration, time.Duration.String),
		one("watchdog", &o.Watchdog, parseDuration, time.Duration.String),
		one("stall", &o.Stall, parseDuration, time.Duration.String),
		one("canary-every", &o.CanaryEvery, parseDuration, time.Duration.String),
		one("stop-grace", &o.StopGrace, parseDuration, time.Duration.String),
		one("max-body", &o.MaxBody, parseSize, func(n int64) string { return strconv.FormatInt(n, 10) }),
		required(one("max-in-flight", &o.MaxInFlight, parseCount, strconv.Itoa)),
		many("writable", &o.Writable),
		many("read-only", &o.ReadOnly),
		many("device", &o.Devices),
	}
}

func one[T any](name string, v *T, parse func(string) (T, error), print func(T) string) setting {
	return setting{
		name:  name,
		parse: func(s string) (err error) { *v, err = parse(s); return err },
		print: func() []string { return []string{print(*v)} },
	}
}

func many(name string, v *[]string) setting {
	return setting{
		name:     name,
		repeated: true,
		parse: func(s string) error {
			p, err := parsePath(s)
			if err == nil && slices.Contains(*v, p) {
				err = errors.New("given twice")
			}
			*v = append(*v, p)
			return err
		},
		print: func() []string { return *v },
	}
}

func required(s setting) setting { s.required = true; return s }

func same(s string) string { return s }

// Parse reads a command line without the program's name. Every flag takes a
// value, is known, and is given once unless it is a list; the engine's command
// line follows after "--".
func Parse(args []string) (Options, error) {
	end := slices.Index(args, "--")
	if end < 0 {
		return Options{}, errors.New(`"--" and the engine's command line are missing`)
	}
	o := Defaults()
	given := make(map[string]bool)
	set := flag.NewFlagSet("resultity-bridge", flag.ContinueOnError)
	set.SetOutput(io.Discard)
	for _, s := range o.settings() {
		set.Func(s.name, "", func(text string) error {
			if given[s.name] && !s.repeated {
				return errors.New("given twice")
			}
			given[s.name] = true
			return s.parse(text)
		})
	}
	if err := set.Parse(args[:end]); err != nil {
		return Options{}, err
	}
	if set.NArg() > 0 {
		return Options{}, fmt.Errorf(`%q: only flags may stand before "--"`, set.Arg(0))
	}
	for _, s := range o.settings() {
		if s.required && !given[s.name] {
			return Options{}, fmt.Errorf("--%s is missing", s.name)
		}
	}
	o.Command = slices.Clone(args[end+1:])
	return o, checkCommand(o.Command)
}

// Args prints the command line that [Parse] reads back as the same options. It
// refuses options that Parse would refuse.
func (o Options) Args() ([]string, error) {
	var args []string
	for _, s := range o.settings() {
		for _, v := range s.print() {
			args = append(args, "--"+s.name, v)
		}
	}
	args = append(append(args, "--"), o.Command...)
	if _, err := Parse(args); err != nil {
		return nil, fmt.Errorf("bridge options: %w", err)
	}
	return args, nil
}

func checkCommand(argv []string) error {
	if len(argv) == 0 {
		return errors.New(`the engine's command line is missing after "--"`)
	}
	if _, err := parsePath(argv[0]); err != nil {
		return fmt.Errorf("the engine's command %q: %w", argv[0], err)
	}
	for _, a := range argv {
		if strings.ContainsRune(a, 0) {
			return errors.New("the engine's command line holds a NUL byte")
		}
	}
	return nil
}

// sunPath is the room for a path in a socket address, without its final NUL.
const sunPath = 107

func parsePath(s string) (string, error) {
	switch {
	case !path.IsAbs(s) || path.Clean(s) != s:
		return "", errors.New("want an absolute path without . and .. in it")
	case strings.ContainsFunc(s, func(r rune) bool { return r < ' ' || r == 0x7f }):
		return "", errors.New("want a path without control characters")
	case len(s) > 4095:
		return "", errors.New("want a path of at most 4095 bytes")
	}
	return s, nil
}

func parseSocket(s string) (string, error) {
	if len(s) > sunPath {
		return "", fmt.Errorf("want a path of at most %d bytes", sunPath)
	}
	return parsePath(s)
}

func parseEngine(s string) (netip.AddrPort, error) {
	text, ok := strings.CutPrefix(s, "http://")
	a, err := netip.ParseAddrPort(text)
	if !ok || err != nil || !a.Addr().IsLoopback() || a.Port() == 0 || a.String() != text {
		return netip.AddrPort{}, errors.New("want http://, a loopback address and a port, like http://127.0.0.1:8080")
	}
	return a, nil
}

func parseModel(s string) (string, error) {
	if s == "" || len(s) > 256 || strings.Trim(s, letters+"._:/@+-") != "" {
		return "", errors.New("want 1 to 256 letters, digits and . _ : / @ + -")
	}
	return s, nil
}

func parseURLPath(s string) (string, error) {
	if len(s) > 256 || !path.IsAbs(s) || strings.Trim(s, letters+"._/-") != "" {
		return "", errors.New("want a path of letters, digits and . _ / -, like /health")
	}
	return s, nil
}

const letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"

func parseDuration(s string) (time.Duration, error) {
	d, err := time.ParseDuration(s)
	if err != nil || d < 100*time.Millisecond || d > 24*time.Hour {
		return 0, errors.New("want a duration from 100ms to 24h, like 30s")
	}
	return d, nil
}

func parseSize(s string) (int64, error) {
	n, err := strconv.ParseInt(s, 10, 64)
	if err != nil || n < 1 || n > 1<<30 {
		return 0, errors.New("want a number of bytes from 1 to 1073741824")
	}
	return n, nil
}

func parseCount(s string) (int, error) {
	n, err := strconv.Atoi(s)
	if err != nil || n < 1 || n > 4096 {
		return 0, errors.New("want a number from 1 to 4096")
	}
	return n, nil
}
