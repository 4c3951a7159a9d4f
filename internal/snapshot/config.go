package snapshot

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/evm"
)

// Config is the content of config.json: all that a network decides for its
// nodes. Every value has been checked by [Parse].
type Config struct {
	Schema     int        `json:"schema"` // 1
	Network    Network    `json:"network"`
	Limits     Limits     `json:"limits"`
	Logs       Logs       `json:"logs"`
	ImageTrust ImageTrust `json:"image_trust"`
	Models     []Model    `json:"models"` // what a node keeps; everything else is removed
	Runtime    Runtime    `json:"runtime"`
	Validation Validation `json:"validation"`
}

// Network names the network and says how its sessions work.
type Network struct {
	Name        string        `json:"name"`
	ChainID     uint64        `json:"chain_id"`     // EIP-155, in the domain of receipts
	MessageKeys []evm.Address `json:"message_keys"` // who may sign frames to a node
	Heartbeat   Seconds       `json:"heartbeat_s"`  // interval of heartbeats
	Window      Seconds       `json:"window_s"`     // silence after which a node gets no jobs
	ClockWindow Seconds       `json:"clock_window_s"`
}

// Limits bound a job. A node refuses what is over them.
type Limits struct {
	RequestBytes  int64   `json:"request_bytes"`
	ResponseBytes int64   `json:"response_bytes"`
	Tokens        int     `json:"tokens"`     // completion tokens
	Messages      int     `json:"messages"`   // of a chat
	Deadline      Seconds `json:"deadline_s"` // longest time a job may be given
	ResultTTL     Seconds `json:"result_ttl_s"`
}

// Logs says how a node uploads its own log, if its operator lets it.
type Logs struct {
	Interval   Seconds `json:"interval_s"`  // at least this often, if there is anything
	BatchBytes int     `json:"batch_bytes"` // of one message, compressed
}

// Runtime is the one container that a node runs.
type Runtime struct {
	Engine       Engine   `json:"engine"`
	Image        ImageRef `json:"image"`
	Model        string   `json:"model"` // name of one of Config.Models; also the name it is served as
	Settings     Settings `json:"settings"`
	MemoryBytes  int64    `json:"memory_bytes,omitempty"`        // of the machine that it needs at least; 0: see [Config.Memory]
	DeviceBytes  int64    `json:"device_memory_bytes,omitempty"` // of all devices together, likewise
	Devices      []string `json:"devices"`                       // CDI names
	TmpBytes     int64    `json:"tmp_bytes"`
	ShmBytes     int64    `json:"shm_bytes"`
	StartTimeout Seconds  `json:"start_timeout_s"`
	Watchdog     Seconds  `json:"watchdog_s"`
	Stall        Seconds  `json:"stall_s"` // silence of a busy engine that counts as a hang
	StopTimeout  Seconds  `json:"stop_timeout_s"`
}

// Settings are the engine's, in terms that every engine has.
type Settings struct {
	Context   int `json:"context"` // tokens per request
	Slots     int `json:"slots"`   // requests at once
	Threads   int `json:"threads"` // CPU threads, where the engine has them
	GPULayers int `json:"gpu_layers"`
}

// Engine is an inference engine that a node can drive. Ollama is none: it takes
// models from a store of its own layout, which the files of a model are not.
// What it runs on the same gguf file, llama.cpp's server, is.
type Engine string

// The engines.
const (
	LlamaCpp Engine = "llamacpp"
	VLLM     Engine = "vllm"
)

// Seconds is a time span as the snapshot writes it: whole seconds.
type Seconds int64

// Duration returns the span.
func (s Seconds) Duration() time.Duration { return time.Duration(s) * time.Second }

// ImageRef names an image by digest; a tag has no spelling here.
type ImageRef struct {
	repository string // host[:port]/path
	digest     digest.Digest
}

var repositoryPattern = regexp.MustCompile(`^[a-z0-9]([a-z0-9.-]{0,250}[a-z0-9])?(:[0-9]{1,5})?(/[a-z0-9]+([._-][a-z0-9]+)*)+$`)

// ParseImageRef reads host[:port]/path@sha256:….
func ParseImageRef(s string) (ImageRef, error) {
	repo, d, ok := strings.Cut(s, "@")
	if !ok {
		return ImageRef{}, fmt.Errorf("image %.200q: want host/path@sha256:…; tags are not taken, since they can move", s)
	}
	if len(repo) > 255 || !repositoryPattern.MatchString(repo) {
		return ImageRef{}, fmt.Errorf("image %.200q: want host[:port]/path in lower case before the @", s)
	}
	dig, err := digest.Parse(d)
	if err != nil {
		return ImageRef{}, fmt.Errorf("image %.200q: %w", s, err)
	}
	return ImageRef{repo, dig}, nil
}

// Repository returns host[:port]/path.
func (r ImageRef) Repository() string { return r.repository }

// At returns another image of the same repository.
func (r ImageRef) At(d digest.Digest) ImageRef { return ImageRef{r.repository, d} }

// Digest returns the manifest's digest.
func (r ImageRef) Digest() digest.Digest { return r.digest }

// String prints the one spelling.
func (r ImageRef) String() string { return r.repository + "@" + r.digest.String() }

// MarshalText implements [encoding.TextMarshaler].
func (r ImageRef) MarshalText() ([]byte, error) { return []byte(r.String()), nil }

// UnmarshalText implements [encoding.TextUnmarshaler].
func (r *ImageRef) UnmarshalText(b []byte) error {
	v, err := ParseImageRef(string(b))
	if err != nil {
		return err
	}
	*r = v
	return nil
}

// MaxSize bounds config.json, in bytes.
const MaxSize = 1 << 20

// ErrInvalid says that a configuration cannot be used by this agent, whoever
// signed it: an unknown field or engine, an absurd size, a name that is none.
var ErrInvalid = errors.New("invalid configuration")

// Parse reads and checks config.json. Publishers use it too, so that a network
// cannot publish what its nodes would refuse. Errors wrap [ErrInvalid] and name
// the field.
//
// It takes one spelling only: UTF-8, no field twice, names exactly as written
// here. Go's decoder alone would take the last of two equal fields and any
// case, so that another reader of the same signed bytes could see something
// else.
func Parse(raw []byte) (*Config, error) {
	if len(raw) > MaxSize {
		return nil, fmt.Errorf("%w: %d bytes, at most %d", ErrInvalid, len(raw), MaxSize)
	}
	if !utf8.Valid(raw) {
		return nil, fmt.Errorf("%w: not UTF-8", ErrInvalid)
	}
	// The schema comes first: the fields of a later one are unknown here, and
	// "upgrade the agent" says more than the name of the first of them.
	var v struct {
		Schema int `json:"schema"`
	}
	if err := json.Unmarshal(raw, &v); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	switch {
	case v.Schema > schema:
		return nil, fmt.Errorf("%w: schema is %d, this agent knows %d: upgrade the agent", ErrInvalid, v.Schema, schema)
	case v.Schema != schema:
		return nil, fmt.Errorf("%w: schema is %d, want %d", ErrInvalid, v.Schema, schema)
	}
	if err := checkSpelling(json.NewDecoder(bytes.NewReader(raw)), "", 0); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	var c Config
	dec := json.NewDecoder(bytes.NewReader(raw))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&c); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	if err := c.check(); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	return &c, nil
}

// checkSpelling reads one JSON value, whose syntax is known to be right, and
// fails when an object in it names a field twice or in other than lower case,
// or when a text is not the one spelling of its value.
func checkSpelling(dec *json.Decoder, at string, depth int) error {
	t, err := dec.Token()
	if err != nil {
		return err
	}
	if s, ok := t.(string); ok {
		if err := checkText(at, s); err != nil {
			return fmt.Errorf("%s: %w", at, err)
		}
	}
	d, ok := t.(json.Delim)
	if !ok {
		return nil
	}
	if depth > maxDepth {
		return fmt.Errorf("%s: deeper than any field", at)
	}
	seen := map[string]bool{}
	for i := 0; dec.More(); i++ {
		in := fmt.Sprintf("%s[%d]", at, i)
		if d == '{' {
			k, err := dec.Token()
			if err != nil {
				return err
			}
			name := k.(string) // the syntax allows nothing else
			in = strings.TrimPrefix(fmt.Sprintf("%s.%.80s", at, name), ".")
			if !fieldPattern.MatchString(name) {
				return fmt.Errorf("unknown field %q: names are of lower-case letters, digits and _", in)
			}
			if seen[name] {
				return fmt.Errorf("%s is given twice", in)
			}
			seen[name] = true
		}
		if err := checkSpelling(dec, in, depth+1); err != nil {
			return err
		}
	}
	_, err = dec.Token() // the closing bracket
	return err
}

// checkText checks the texts that the decoder turns into values of other
// packages: their errors do not name the field, and the decoder takes addresses
// whose checksum is wrong.
func checkText(at, s string) (err error) {
	switch {
	case strings.HasPrefix(at, "network.message_keys["):
		_, err = evm.ParseAddress(s)
	case strings.HasSuffix(at, ".sha256"), strings.HasSuffix(at, ".chunks.root"):
		_, err = digest.Parse(s)
	case strings.HasSuffix(at, ".chunks.hashes"):
		err = checkBase64(s)
	case at == "runtime.image":
		_, err = ParseImageRef(s)
	}
	return err
}

var (
	fieldPattern   = regexp.MustCompile(`^[a-z0-9_]+$`)
	namePattern    = regexp.MustCompile(`^[a-z0-9][a-z0-9._-]{0,63}$`)
	versionPattern = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$`)
	devicePattern  = regexp.MustCompile(`^[a-z0-9][a-z0-9.-]{0,63}/[a-z][a-z0-9_-]{0,31}=[A-Za-z0-9][A-Za-z0-9:._-]{0,63}$`)
)

// Bounds that hold for every network, so that no signer can make a node do
// something absurd.
const (
	schema       = 1
	maxDepth     = 8 // of nested JSON; the deepest field lies at 5
	maxModels    = 64
	maxFiles     = 1024
	maxSources   = 16
	maxFileBytes = 4 << 40
	maxBody      = 16 << 20
	day          = Seconds(24 * 60 * 60)
)

func between[T ~int | ~int64 | ~uint64](v T, name string, lo, hi T) error {
	if v < lo || v > hi {
		return fmt.Errorf("%s is %d, want %d to %d", name, v, lo, hi)
	}
	return nil
}

func named(v, what string, p *regexp.Regexp) error {
	if !p.MatchString(v) {
		return fmt.Errorf("%s %.80q does not match %s", what, v, p)
	}
	return nil
}

func (c *Config) check() error {
	n, l := &c.Network, &c.Limits
	if err := first(
		named(n.Name, "network.name", namePattern),
		between(n.ChainID, "network.chain_id", 1, 1<<53),
		between(len(n.MessageKeys), "number of network.message_keys", 1, 16),
		between(n.Heartbeat, "network.heartbeat_s", 1, 3600),
		between(n.Window, "network.window_s", n.Heartbeat+1, 2*3600),
		between(n.ClockWindow, "network.clock_window_s", 1, 600),
		between(l.RequestBytes, "limits.request_bytes", 1<<10, maxBody),
		between(l.ResponseBytes, "limits.response_bytes", 1<<10, maxBody),
		between(l.Tokens, "limits.tokens", 1, 1<<20),
		between(l.Messages, "limits.messages", 1, 10_000),
		between(l.Deadline, "limits.deadline_s", 1, day),
		between(l.ResultTTL, "limits.result_ttl_s", 60, 30*day),
		between(c.Logs.Interval, "logs.interval_s", 10, day),
		between(c.Logs.BatchBytes, "logs.batch_bytes", 4<<10, 256<<10),
		between(len(c.Models), "number of models", 1, maxModels),
	); err != nil {
		return err
	}
	for i, k := range n.MessageKeys {
		if k == (evm.Address{}) {
			return fmt.Errorf("network.message_keys[%d] is the zero address", i)
		}
	}
	if err := c.ImageTrust.check(); err != nil {
		return fmt.Errorf("image_trust: %w", err)
	}
	names := map[string]*Model{}
	for i := range c.Models {
		m := &c.Models[i]
		if err := m.check(); err != nil {
			return fmt.Errorf("models[%d]: %w", i, err)
		}
		if names[m.Name] != nil {
			return fmt.Errorf("models[%d]: a second %q", i, m.Name)
		}
		names[m.Name] = m
	}
	if err := c.Runtime.check(names); err != nil {
		return fmt.Errorf("runtime: %w", err)
	}
	if err := c.Validation.check(l); err != nil {
		return fmt.Errorf("validation: %w", err)
	}
	return nil
}

func (r *Runtime) check(models map[string]*Model) error {
	m := models[r.Model]
	switch {
	case m == nil:
		return fmt.Errorf("model %.80q is not among the models", r.Model)
	case r.Engine != LlamaCpp && r.Engine != VLLM:
		return fmt.Errorf("engine %.40q: this agent drives %s and %s", r.Engine, LlamaCpp, VLLM)
	case m.Archived:
		return fmt.Errorf("model %s is archived: it is kept, and served by nobody", r.Model)
	case r.Engine == LlamaCpp && m.Format != GGUF:
		return fmt.Errorf("engine %s takes a model of format gguf", r.Engine)
	case r.Engine == VLLM && m.Format != Safetensors:
		return fmt.Errorf("engine %s takes a model of format safetensors", r.Engine)
	case r.Image == ImageRef{}:
		return errors.New("image is missing")
	}
	if err := between(len(r.Devices), "number of devices", 0, 16); err != nil {
		return err
	}
	for _, d := range r.Devices {
		if err := named(d, "devices", devicePattern); err != nil {
			return err
		}
	}
	s := &r.Settings
	return first(
		between(s.Context, "settings.context", 16, 1<<24),
		between(s.Slots, "settings.slots", 1, 1024),
		between(s.Threads, "settings.threads", 0, 1024),
		between(s.GPULayers, "settings.gpu_layers", 0, 10_000),
		between(r.TmpBytes, "tmp_bytes", 1<<20, 1<<40),
		between(r.ShmBytes, "shm_bytes", 1<<20, 1<<40),
		between(r.MemoryBytes, "memory_bytes", 0, 1<<50),
		between(r.DeviceBytes, "device_memory_bytes", 0, int64(min(len(r.Devices), 1))<<50), // of none there is none
		between(r.StartTimeout, "start_timeout_s", 1, 4*3600),
		between(r.Watchdog, "watchdog_s", 1, 3600),
		between(r.Stall, "stall_s", 1, 3600),
		between(r.StopTimeout, "stop_timeout_s", 1, 600),
	)
}

func first(errs ...error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}
