// Package config owns the agent's local configuration file.
//
// The rule it keeps: reading is strict. An unknown key, a wrong type or a value
// that cannot work is an error that names file, key and what was expected, so
// that a typing error never becomes a silent default. What the network decides
// is in its snapshot, never here.
package config

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/go-viper/mapstructure/v2"
	"github.com/knadh/koanf/v2"

	"github.com/resultity/node/internal/durable"
	"github.com/resultity/node/internal/toml"
)

// Config is a checked configuration. The example file, agent.toml beside this
// package, documents every key; a test holds the two together.
type Config struct {
	Networks []Network `koanf:"-"` // tables network.NAME; by priority, the highest first

	Identity Identity `koanf:"identity"`
	Paths    Paths    `koanf:"paths"`
	Runtime  Runtime  `koanf:"runtime"`
	Models   Models   `koanf:"models"`
	Replay   Replay   `koanf:"replay"`
	Log      Log      `koanf:"log"`
}

// Replay says what is kept of jobs, so that the operator can run them again.
type Replay struct {
	// Keep is how many of the last jobs of each network are kept on this machine's
	// disk, with prompt and answer; 0 for none.
	Keep int `koanf:"keep"`
}

// Models says where models may come from, beside the sources that the network names.
type Models struct {
	// Neighbours are base URLs, http or https, of web servers nearby that may have
	// files of models below them, each under its SHA-256 in hexadecimal digits. They
	// are asked first and trusted with nothing: every chunk is checked.
	Neighbours []string `koanf:"neighbours"`
	// Serve is where this node gives verified files of models to machines nearby:
	// ADDRESS:PORT, of a private or link-local network. "" is nowhere.
	Serve string `koanf:"serve"`
	// ServeRate is how much it gives, in bytes a second with K, M or G.
	ServeRate string `koanf:"serve_rate"`
}

const maxNeighbours = 8

func checkNeighbours(list []string) error {
	if len(list) > maxNeighbours {
		return fmt.Errorf("%d of them, at most %d", len(list), maxNeighbours)
	}
	for _, s := range list {
		u, err := url.Parse(s)
		if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Hostname() == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "" {
			return fmt.Errorf("%.200q: want URLs like \"http://10.0.0.2:8080/models\", without user, query and fragment", s)
		}
	}
	return nil
}

// Rate returns the bytes a second that neighbours are given.
func (m Models) Rate() int64 {
	n, _ := size(m.ServeRate) // checked by Load
	return n
}

const leastRate = 1 << 20 // bytes a second; below, a chunk takes longer than who asks may want to wait

// check returns the first key whose value cannot work, without its section.
func (m Models) check() (key string, err error) {
	if err := checkNeighbours(m.Neighbours); err != nil {
		return "neighbours", err
	}
	if m.Serve != "" {
		at, err := netip.ParseAddrPort(m.Serve)
		if a := at.Addr(); err != nil || at.Port() == 0 || !a.IsPrivate() && !a.IsLinkLocalUnicast() && !a.IsLoopback() {
			return "serve", fmt.Errorf("%.80q: want this machine's address in a private network, with a port, like \"10.0.0.2:8080\" or \"[fe80::2%%eth0]:8080\"", m.Serve)
		}
	}
	if m.Rate() < leastRate {
		return "serve_rate", fmt.Errorf("%.40q: want bytes a second, like \"64M\", at least 1M", m.ServeRate)
	}
	return "", nil
}

// Runtime bounds what the network's configuration may have of this machine.
type Runtime struct {
	// Devices are the CDI devices that it may order: vendor/class=name, or
	// vendor/class=* for all of a kind. The default is every GPU.
	Devices []string `koanf:"devices"`
	// MemoryMax is how much of the machine's memory it may use: bytes, with K, M,
	// G or T for powers of 1024, or a percentage. "" is all but a tenth, and never
	// keeps back more than 1 GiB.
	MemoryMax string `koanf:"memory_max"`
	// DeviceMemory is how much memory the devices have that the network may order,
	// together: bytes, with K, M, G or T. "" is what the kernel says, which it does for
	// AMD's alone.
	DeviceMemory string `koanf:"device_memory"`
	// LookEvery is how often its sandbox is looked at: a number with s or m, from 1s
	// to 60m. "" is a minute.
	LookEvery string `koanf:"look_every"`
}

// Look returns how often the sandbox is looked at.
func (r Runtime) Look() time.Duration {
	if r.LookEvery == "" {
		return time.Minute
	}
	d, _ := time.ParseDuration(r.LookEvery) // checked by Load
	return d
}

var lookPattern = regexp.MustCompile(`^[1-9][0-9]{0,3}[sm]$`)

func checkLook(s string) error {
	if d, err := time.ParseDuration(s); s != "" && (err != nil || !lookPattern.MatchString(s) || d > time.Hour) {
		return fmt.Errorf("%.40q: want a time like \"30s\" or \"5m\", from 1s to 60m", s)
	}
	return nil
}

const (
	gib         = 1 << 30
	leastMemory = 64 << 20 // no engine starts with less
)

var memoryPattern = regexp.MustCompile(`^([1-9][0-9]{0,14})([KMGT%]?)$`)

// Memory returns the ceiling in bytes on a machine with total bytes of memory; 0
// where there is none, since nobody knows how much the machine has.
func (r Runtime) Memory(total int64) int64 {
	if r.MemoryMax == "" {
		return max(0, total-min(total/10, gib))
	}
	if n, ok := size(r.MemoryMax); ok {
		return n
	}
	n, _ := strconv.ParseInt(strings.TrimSuffix(r.MemoryMax, "%"), 10, 64) // checked by Load
	return max(0, total/100*n)
}

// size reads a number of bytes, with K, M, G or T for powers of 1024.
func size(s string) (n int64, ok bool) {
	m := memoryPattern.FindStringSubmatch(s)
	if m == nil || m[2] == "%" || m[2] != "" && len(m[1]) > 6 {
		return 0, false
	}
	n, _ = strconv.ParseInt(m[1], 10, 64) // digits
	return n << (10 * (1 + strings.Index("KMGT", m[2])) * min(1, len(m[2]))), true
}

// OfDevices returns the bytes of memory of the devices; 0 where only the kernel can
// say.
func (r Runtime) OfDevices() int64 {
	n, _ := size(r.DeviceMemory) // checked by Load
	return n
}

func (r Runtime) check() (key string, err error) {
	for _, d := range r.Devices {
		if !devicePattern.MatchString(d) {
			return "devices", fmt.Errorf("%.200q: want CDI devices, like \"nvidia.com/gpu=0\", or \"nvidia.com/gpu=*\" for all of a kind", d)
		}
	}
	// The text alone is checked: on which machine it counts is not known yet.
	share, isShare := strings.CutSuffix(r.MemoryMax, "%")
	n, isSize := size(r.MemoryMax)
	if percent, err := strconv.Atoi(share); r.MemoryMax != "" && !(isSize && n >= leastMemory) && !(isShare && err == nil && memoryPattern.MatchString(r.MemoryMax) && percent <= 100) {
		return "memory_max", fmt.Errorf("%.40q: want bytes like \"24G\", at least 64M, or a percentage like \"75%%\"", r.MemoryMax)
	}
	if _, ok := size(r.DeviceMemory); !ok && r.DeviceMemory != "" {
		return "device_memory", fmt.Errorf("%.40q: want bytes like \"24G\"", r.DeviceMemory)
	}
	if err := checkLook(r.LookEvery); err != nil {
		return "look_every", err
	}
	return "", nil
}

// gpus are the kinds that the vendors' own tools make CDI specifications of. A
// node is there to give its GPU away; that somebody put another device of the
// machine into a specification was for another purpose.
var gpus = []string{"amd.com/gpu=*", "intel.com/gpu=*", "nvidia.com/gpu=*"}

// Network is a network that the node takes part in, and how it is reached.
type Network struct {
	Name           string `koanf:"-"`               // of the table; as in the network's snapshot
	URL            string `koanf:"url"`             // https://host[:port]
	Root           string `koanf:"root"`            // file: the network's first TUF root
	CA             string `koanf:"ca"`              // file: PEM certificates of a private network; "" for the system's
	EnrolmentToken string `koanf:"enrolment_token"` // file: token for the first registration; "" for none
	Priority       int    `koanf:"priority"`        // the highest decides what the machine runs; no two are equal
}

// MaxNetworks is how many networks a node can take part in.
const MaxNetworks = 8

// maxNumber bounds priorities, so that what is written is what is compared, and
// counts.
const maxNumber = 1000

// Identity says how the node's key is protected.
type Identity struct {
	Signer     string `koanf:"signer"`     // socket of resultity-signer; none for a key in the agent; "" for whichever there is
	Passphrase string `koanf:"passphrase"` // file; "" for the credential "resultity-passphrase", or one made at first start
}

// NoSigner is the value of [Identity].Signer for a key that the agent holds.
const NoSigner = "none"

// Paths are where things are; all absolute. Empty ones are filled in from the
// service manager's environment.
type Paths struct {
	State   string `koanf:"state"`   // $STATE_DIRECTORY, else $XDG_STATE_HOME/resultity/agent
	Runtime string `koanf:"runtime"` // $RUNTIME_DIRECTORY, else $XDG_RUNTIME_DIR/resultity
	Units   string `koanf:"units"`   // $XDG_RUNTIME_DIR/containers/systemd
	Podman  string `koanf:"podman"`  // Podman's API socket, $XDG_RUNTIME_DIR/resultity-podman/podman.sock
	Bridge  string `koanf:"bridge"`  // /usr/libexec/resultity/resultity-bridge
}

// Log says how much is logged.
type Log struct {
	Level  string `koanf:"level"`  // debug, info, warn or error
	Upload string `koanf:"upload"` // on or off: whether the network gets the log, without any text of jobs
}

// SlogLevel returns the level in slog's terms.
func (l Log) SlogLevel() slog.Level {
	var v slog.Level
	_ = v.UnmarshalText([]byte(l.Level)) // checked by Load
	return v
}

// maxFile bounds a configuration file, in bytes.
const maxFile = 1 << 20

// Load reads file and the *.toml drop-ins of file.d in the order of their
// names; later ones win key by key. env is os.Getenv.
func Load(file string, env func(string) string) (*Config, error) {
	files := []string{file}
	drop, err := os.ReadDir(file + ".d")
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("drop-in directory: %w", err)
	}
	for _, d := range drop {
		if strings.HasSuffix(d.Name(), ".toml") && !strings.HasPrefix(d.Name(), ".") {
			files = append(files, filepath.Join(file+".d", d.Name()))
		}
	}
	all := koanf.New(".")
	from := map[string]string{} // key → file that set it last
	for _, f := range files {
		k, err := read(f)
		if err == nil {
			err = all.Merge(k)
		}
		if err != nil {
			return nil, fmt.Errorf("%s: %w", f, err)
		}
		for _, key := range k.Keys() {
			from[key] = f
			if name, field, ok := cutNetwork(key); ok && from["network."+name] == "" && field != "" {
				from["network."+name] = f // where to add what is missing
			}
		}
	}
	c := &Config{Log: Log{Level: "info", Upload: "on"}, Paths: Paths{Bridge: "/usr/libexec/resultity/resultity-bridge"}, Runtime: Runtime{Devices: slices.Clone(gpus)}, Models: Models{ServeRate: "64M"}}
	if err := c.decode(all); err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	c.Paths.fill(env)
	if key, err := c.check(); err != nil {
		where := from[key]
		if name, _, ok := cutNetwork(key); ok && where == "" {
			where = from["network."+name]
		}
		if where == "" {
			where = file
		}
		return nil, fmt.Errorf("%s: %s: %w", where, key, err)
	}
	return c, nil
}

// cutNetwork takes the name of a network from a key network.NAME.FIELD. A name
// may have dots; no field has.
func cutNetwork(key string) (name, field string, ok bool) {
	rest, ok := strings.CutPrefix(key, "network.")
	if !ok {
		return "", "", false
	}
	i := strings.LastIndexByte(rest, '.')
	if i < 0 {
		return rest, "", true
	}
	return rest[:i], rest[i+1:], true
}

// decode takes the values, whose keys and types have been checked.
func (c *Config) decode(all *koanf.Koanf) error {
	if all.Exists("runtime.devices") {
		c.Runtime.Devices = []string{} // lists are not mixed
	}
	into := func(path string, v any) error {
		return all.UnmarshalWithConf(path, v, koanf.UnmarshalConf{DecoderConfig: &mapstructure.DecoderConfig{Result: v, TagName: "koanf"}})
	}
	networks := map[string]Network{}
	if err := errors.Join(into("", c), into("network", &networks)); err != nil {
		return err
	}
	for name, n := range networks {
		n.Name = name
		c.Networks = append(c.Networks, n)
	}
	slices.SortFunc(c.Networks, func(a, b Network) int {
		return cmp.Or(cmp.Compare(b.Priority, a.Priority), strings.Compare(a.Name, b.Name))
	})
	return nil
}

// read reads one file and checks its keys and the types of its values. Each is
// read on its own, so that an error can name it.
func read(file string) (*koanf.Koanf, error) {
	raw, err := durable.ReadFile(file, maxFile)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, errors.New("does not exist; copy the example from /usr/share/doc/resultity-agent/agent.toml and fill in [network.NAME]")
	}
	if err != nil {
		return nil, err
	}
	k, err := toml.Parse(raw, ".")
	if err != nil {
		return nil, err
	}
	for _, key := range k.Keys() {
		name, field, ofNetwork := cutNetwork(key)
		if m, ok := k.Get(key).(map[string]any); ok && len(m) == 0 && (sections[key] || ofNetwork) {
			continue // a section with nothing in it
		}
		kind, ok := known[Generalise(key)]
		if ofNetwork && field == "" {
			return nil, fmt.Errorf("%s: a network has a table of its own: [network.NAME] with %s; %q stands outside of one", key, networkKeys(), name)
		}
		if !ok {
			return nil, fmt.Errorf("%s: unknown key; known are %s", key, strings.Join(Keys(), ", "))
		}
		switch v := k.Get(key); kind {
		case reflect.Slice:
			if _, ok := v.([]any); !ok || slices.ContainsFunc(v.([]any), func(e any) bool { _, ok := e.(string); return !ok }) {
				return nil, fmt.Errorf("%s: want a list of strings in quotes, got %v", key, v)
			}
		case reflect.Int:
			if n, ok := v.(int64); !ok || n < 0 || n > maxNumber {
				return nil, fmt.Errorf("%s: want a whole number from 0 to %d, got %v", key, maxNumber, v)
			}
		default:
			if _, ok := v.(string); !ok {
				return nil, fmt.Errorf("%s: want a string in quotes, got %v", key, v)
			}
		}
	}
	return k, nil
}

// known has every key with its kind, in the form of [Generalise]; sections has
// every section. Values are strings, lists of strings and numbers, so that the
// kind is all there is to check before decoding.
var known, sections = func() (keys map[string]reflect.Kind, sections map[string]bool) {
	keys, sections = map[string]reflect.Kind{}, map[string]bool{"network": true}
	add := func(section string, t reflect.Type) {
		sections[section] = true
		for f := range t.NumField() {
			if name := t.Field(f).Tag.Get("koanf"); name != "-" {
				keys[section+"."+name] = t.Field(f).Type.Kind()
			}
		}
	}
	add("network.NAME", reflect.TypeFor[Network]())
	t := reflect.TypeFor[Config]()
	for s := range t.NumField() {
		if name := t.Field(s).Tag.Get("koanf"); name != "-" {
			add(name, t.Field(s).Type)
		}
	}
	return keys, sections
}()

// Generalise writes NAME for the name of a network in a key.
func Generalise(key string) string {
	if _, field, ok := cutNetwork(key); ok && field != "" {
		return "network.NAME." + field
	}
	return key
}

func networkKeys() string {
	var ks []string
	for _, k := range Keys() {
		if field, ok := strings.CutPrefix(k, "network.NAME."); ok {
			ks = append(ks, field)
		}
	}
	return strings.Join(ks, ", ")
}

// Keys returns every key, sorted, in the form of [Generalise].
func Keys() []string {
	var ks []string
	for k := range known {
		ks = append(ks, k)
	}
	slices.Sort(ks)
	return ks
}

func (p *Paths) fill(env func(string) string) {
	or := func(v *string, alternatives ...string) {
		for _, a := range alternatives {
			if *v == "" {
				*v = a
			}
		}
	}
	below := func(dir, name string) string {
		if dir == "" {
			return ""
		}
		return filepath.Join(dir, name)
	}
	run := env("XDG_RUNTIME_DIR")
	or(&p.State, env("STATE_DIRECTORY"), below(env("XDG_STATE_HOME"), "resultity/agent"), below(env("HOME"), ".local/state/resultity/agent"))
	or(&p.Runtime, env("RUNTIME_DIRECTORY"), below(run, "resultity"))
	or(&p.Units, below(run, "containers/systemd"))
	or(&p.Podman, below(run, "resultity-podman/podman.sock"))
}

var namePattern = regexp.MustCompile(`^[a-z0-9][a-z0-9._-]{0,63}$`)

var devicePattern = regexp.MustCompile(`^[a-z0-9][a-z0-9.-]*/[a-z][a-z0-9_-]*=(?:\*|[A-Za-z0-9][A-Za-z0-9:._-]*)$`)

// check returns the first key whose value cannot work.
func (c *Config) check() (key string, err error) {
	if len(c.Networks) == 0 {
		return "network", errors.New("there is none: add a table [network.NAME] with url and root")
	}
	if len(c.Networks) > MaxNetworks {
		return "network", fmt.Errorf("%d networks, at most %d", len(c.Networks), MaxNetworks)
	}
	for i := range c.Networks {
		if key, err := c.Networks[i].check(); err != nil {
			return "network." + c.Networks[i].Name + key, err
		}
		for _, other := range c.Networks[:i] {
			switch n := c.Networks[i]; {
			case n.Priority == other.Priority:
				return "network." + n.Name + ".priority", fmt.Errorf("it is %d, like that of %s: give each network its own; the highest decides what this machine runs", n.Priority, other.Name)
			case n.URL == other.URL:
				return "network." + n.Name + ".url", fmt.Errorf("%.200q is that of %s, too", n.URL, other.Name)
			}
		}
	}
	if s := c.Identity.Signer; s != "" && s != NoSigner && !filepath.IsAbs(s) {
		return "identity.signer", fmt.Errorf("%.200q: want the absolute path of resultity-signer's socket, or none", s)
	}
	if key, err := checkFiles([]file{
		{"identity.passphrase", c.Identity.Passphrase, false, "the absolute path of a file with the passphrase"},
		{"paths.state", c.Paths.State, true, "an absolute path (or run under a service manager that sets STATE_DIRECTORY)"},
		{"paths.runtime", c.Paths.Runtime, true, "an absolute path (or a login session that sets XDG_RUNTIME_DIR)"},
		{"paths.units", c.Paths.Units, true, "an absolute path (or a login session that sets XDG_RUNTIME_DIR)"},
		{"paths.podman", c.Paths.Podman, true, "an absolute path (or a login session that sets XDG_RUNTIME_DIR)"},
		{"paths.bridge", c.Paths.Bridge, true, "an absolute path"},
	}); err != nil {
		return key, err
	}
	if key, err := c.Runtime.check(); err != nil {
		return "runtime." + key, err
	}
	if key, err := c.Models.check(); err != nil {
		return "models." + key, err
	}
	if c.Log.Upload != "on" && c.Log.Upload != "off" {
		return "log.upload", fmt.Errorf("%.40q: want on or off", c.Log.Upload)
	}
	if !slices.Contains([]string{"debug", "info", "warn", "error"}, c.Log.Level) {
		return "log.level", fmt.Errorf("%.40q: want debug, info, warn or error", c.Log.Level)
	}
	return "", nil
}

// check returns the first key of a network whose value cannot work, with a dot
// before it; "" stands for the name.
func (n *Network) check() (key string, err error) {
	switch u, err := url.Parse(n.URL); {
	case !namePattern.MatchString(n.Name):
		return "", fmt.Errorf("%.80q: want the network's name, e.g. \"testnet\" (%s)", n.Name, namePattern)
	case err != nil || u.Scheme != "https" || u.Host == "" || u.User != nil || (u.Path != "" && u.Path != "/") || u.RawQuery != "" || u.Fragment != "":
		return ".url", fmt.Errorf("%.200q: want https://host or https://host:port", n.URL)
	}
	n.URL = strings.TrimSuffix(n.URL, "/")
	return checkFiles([]file{
		{".root", n.Root, true, "the absolute path of the network's first TUF root"},
		{".ca", n.CA, false, "the absolute path of a PEM file"},
		{".enrolment_token", n.EnrolmentToken, false, "the absolute path of a file with the token"},
	})
}

// file is a value that has to be an absolute path.
type file struct {
	key, value string
	needed     bool
	what       string
}

func checkFiles(fs []file) (key string, err error) {
	for _, f := range fs {
		if (f.value != "" || f.needed) && (!filepath.IsAbs(f.value) || filepath.Clean(f.value) != f.value) {
			return f.key, fmt.Errorf("%.200q: want %s", f.value, f.what)
		}
	}
	return "", nil
}
