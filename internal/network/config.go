package network

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"time"

	"github.com/go-viper/mapstructure/v2"

	"github.com/resultity/node/internal/durable"
	"github.com/resultity/node/internal/network/mail"
	"github.com/resultity/node/internal/network/store"
	"github.com/resultity/node/internal/toml"
)

// ErrConfig says that the service cannot work as it is configured; trying again
// changes nothing. The program then ends with status 78.
var ErrConfig = errors.New("configuration")

// ConfigFile is where serve looks for its configuration unless it is told.
const ConfigFile = "/etc/resultity-network/network.toml"

// Config is the service's own configuration, what stands in network.toml. What
// the network decides for its nodes is in the published config.json instead.
type Config struct {
	// Dir is the directory that init made: keys, repository and store. Absolute.
	Dir string `koanf:"dir"`
	// Listen is host:port; an empty host means every address.
	Listen string `koanf:"listen"`
	// MetricsListen is host:port for GET /metrics, which asks nobody who they are: in
	// plain HTTP, apart from what the world reaches. Empty for nowhere.
	MetricsListen string `koanf:"metrics_listen"`
	// TLSCert and TLSKey are PEM files, read again when they change. Without them
	// the service speaks plain HTTP, on a loopback address only.
	TLSCert string `koanf:"tls_cert"`
	TLSKey  string `koanf:"tls_key"`

	// TrustedProxies are networks, as CIDR, of front proxies whose X-Forwarded-For
	// is believed: bounds for each source then count the sources behind them.
	TrustedProxies []string `koanf:"trusted_proxies"`

	// MaxQueued and MaxQueuedBytes bound the requests that wait for a node.
	MaxQueued      int   `koanf:"max_queued"`
	MaxQueuedBytes int64 `koanf:"max_queued_bytes"`
	// NodeWait is how long a request waits where no node is ready.
	NodeWait time.Duration `koanf:"node_wait"`
	// MaxUploadBytes bounds the requests that are still arriving.
	MaxUploadBytes int64 `koanf:"max_upload_bytes"`
	// KeyShare is how much of these three one API key may hold, in percent.
	KeyShare int `koanf:"key_share"`
	// MaxResultsBytes bounds the results that are kept for clients that ask for
	// receipts; the oldest go first.
	MaxResultsBytes int64 `koanf:"max_results_bytes"`
	// KeepRequestsBytes bounds the requests of finished jobs that are kept for replays,
	// as long as their results at most; the oldest go first. With 0 none are, and those
	// that are there are deleted.
	KeepRequestsBytes int64 `koanf:"keep_requests_bytes"`
	// MinFreeBytes must be free on the disk of the store, or no new requests are
	// taken; a tenth of a small disk.
	MinFreeBytes int64 `koanf:"min_free_bytes"`
	// MaxSessions bounds the nodes that are connected at once.
	MaxSessions int `koanf:"max_sessions"`
	// MaxConnections bounds all connections, of nodes, clients and strangers; one
	// address may have a quarter of them.
	MaxConnections int `koanf:"max_connections"`
	// MaxArrivingBytes bounds the frames of nodes above 20 KiB that are still arriving.
	MaxArrivingBytes int `koanf:"max_arriving_bytes"`
	// Drain is how long requests may go on after the service was told to stop.
	Drain time.Duration `koanf:"drain"`
	// Registration is "token": a node needs an enrolment token to become known;
	// or "open": anybody's node becomes known, and gets jobs once it is bound to
	// an account.
	Registration string `koanf:"registration"`
	// SMTP is the mail server, host:port, that codes are sent through; without one
	// no account is bound by e-mail. The other keys are described at [mail.Config].
	SMTP         string `koanf:"smtp"`
	SMTPSecurity string `koanf:"smtp_security"`
	SMTPFrom     string `koanf:"smtp_from"`
	SMTPLogin    string `koanf:"smtp_login"`
	SMTPCA       string `koanf:"smtp_ca"`

	// LogLevel is debug, info, warn or error.
	LogLevel string `koanf:"log_level"`

	// Ready is called with the addresses in use, metrics nil for none, once the
	// service serves; for programs that embed it.
	Ready func(api, metrics net.Addr) `koanf:"-"`
}

// Defaults is the configuration that files and flags change.
func Defaults() Config {
	return Config{
		Dir: "/var/lib/resultity-network", Listen: "127.0.0.1:8443", MetricsListen: "127.0.0.1:9464", TrustedProxies: []string{},
		MaxQueued: 1024, MaxQueuedBytes: 256 << 20, NodeWait: 5 * time.Second, MaxUploadBytes: 256 << 20, KeyShare: 50,
		MaxResultsBytes: store.DefaultLimits.Results, MinFreeBytes: store.DefaultLimits.Free, MaxSessions: 16384, MaxConnections: 32768, MaxArrivingBytes: 768 << 20, Drain: 10 * time.Second,
		Registration: "token", SMTPSecurity: string(mail.StartTLS), LogLevel: "info",
	}
}

// maxConfigFile bounds network.toml, in bytes.
const maxConfigFile = 1 << 20

// ReadFile puts what stands in a TOML file over c. Unknown keys are errors.
func (c *Config) ReadFile(name string) error {
	bad := func(err error) error { return fmt.Errorf("%w: %s: %w", ErrConfig, name, err) }
	raw, err := durable.ReadFile(name, maxConfigFile)
	if err != nil {
		return bad(err)
	}
	k, err := toml.Parse(raw, "\x00") // no key has a NUL, so none is split
	if err != nil {
		return bad(err)
	}
	known := keys()
	for key := range k.Raw() {
		if !slices.Contains(known, key) {
			return bad(fmt.Errorf("%s: unknown key; known are %s", key, strings.Join(known, ", ")))
		}
		// One at a time, so that an error can name its key.
		field := reflect.ValueOf(c).Elem().Field(slices.Index(known, key))
		dec, err := mapstructure.NewDecoder(&mapstructure.DecoderConfig{
			Result: field.Addr().Interface(), DecodeHook: mapstructure.StringToTimeDurationHookFunc(),
		})
		if err != nil {
			return bad(err)
		}
		value := k.Get(key)
		if _, isText := value.(string); field.Type() == reflect.TypeFor[time.Duration]() && !isText {
			return bad(fmt.Errorf("%s: want a duration in quotes, such as \"10s\", got %v", key, value))
		}
		if err := dec.Decode(value); err != nil {
			return bad(fmt.Errorf("%s: want %s, got %v", key, wanted(field.Type()), value))
		}
	}
	return nil
}

// keys lists the configuration's keys in the order of its fields.
func keys() []string {
	var list []string
	for f := range reflect.TypeFor[Config]().Fields() {
		if key := f.Tag.Get("koanf"); key != "-" {
			list = append(list, key)
		}
	}
	return list
}

func wanted(t reflect.Type) string {
	switch {
	case t == reflect.TypeFor[time.Duration]():
		return `a duration in quotes, such as "10s"`
	case t.Kind() == reflect.Slice:
		return `a list of texts in quotes, such as ["10.0.0.0/8"]`
	case t.Kind() == reflect.String:
		return "a text in quotes"
	}
	return "a whole number"
}

// check refuses what cannot work. Errors wrap [ErrConfig] and name the key.
func (c *Config) check() error {
	bad := func(key, format string, args ...any) error {
		return fmt.Errorf("%w: %s: %s", ErrConfig, key, fmt.Sprintf(format, args...))
	}
	if !filepath.IsAbs(c.Dir) {
		return bad("dir", "%q is not an absolute path", c.Dir)
	}
	if _, err := os.Stat(filepath.Join(c.Dir, "publish.json")); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return bad("dir", "%s holds no network; run resultity-network init --dir %s first", c.Dir, c.Dir)
		}
		return bad("dir", "%v", err)
	}
	host, _, err := net.SplitHostPort(c.Listen)
	if err != nil {
		return bad("listen", "%q: want host:port, such as :8443", c.Listen)
	}
	if _, _, err := net.SplitHostPort(c.MetricsListen); err != nil && c.MetricsListen != "" {
		return bad("metrics_listen", "%q: want host:port, such as 127.0.0.1:9464, or nothing", c.MetricsListen)
	}
	if (c.TLSCert == "") != (c.TLSKey == "") {
		return bad("tls_key", "tls_cert and tls_key go together; one of them is missing")
	}
	if ip := net.ParseIP(host); c.TLSCert == "" && host != "localhost" && (ip == nil || !ip.IsLoopback()) {
		return bad("tls_cert", "%s can be reached from other machines, so a certificate is needed: set tls_cert and tls_key, or listen on 127.0.0.1", c.Listen)
	}
	for key, v := range map[string]int64{
		"max_queued": int64(c.MaxQueued), "max_queued_bytes": c.MaxQueuedBytes, "max_upload_bytes": c.MaxUploadBytes,
		"max_results_bytes": c.MaxResultsBytes, "min_free_bytes": c.MinFreeBytes, "max_sessions": int64(c.MaxSessions), "max_connections": int64(c.MaxConnections), "max_arriving_bytes": int64(c.MaxArrivingBytes),
	} {
		if v < 1 {
			return bad(key, "is %d, want at least 1", v)
		}
	}
	if c.KeepRequestsBytes < 0 {
		return bad("keep_requests_bytes", "is %d, want 0 for none, or more", c.KeepRequestsBytes)
	}
	if _, err := parseProxies(c.TrustedProxies); err != nil {
		return bad("trusted_proxies", "%v", err)
	}
	if c.KeyShare < 1 || c.KeyShare > 100 {
		return bad("key_share", "is %d, want 1 to 100 percent", c.KeyShare)
	}
	if c.Registration != "token" && c.Registration != "open" {
		return bad("registration", "%q: want token or open", c.Registration)
	}
	if c.NodeWait < time.Second || c.NodeWait > 10*time.Minute {
		return bad("node_wait", "is %v, want 1s to 10m", c.NodeWait)
	}
	if c.Drain < 0 || c.Drain > 10*time.Minute {
		return bad("drain", "is %v, want 0s to 10m", c.Drain)
	}
	if err := new(slog.Level).UnmarshalText([]byte(c.LogLevel)); err != nil {
		return bad("log_level", "%q: want debug, info, warn or error", c.LogLevel)
	}
	return nil
}

// mailer returns who sends codes, or nil.
func (c *Config) mailer() (*mail.Sender, error) {
	if c.SMTP == "" {
		if c.SMTPFrom != "" || c.SMTPLogin != "" || c.SMTPCA != "" {
			return nil, fmt.Errorf("%w: smtp: which mail server? the other smtp keys are of no use without it", ErrConfig)
		}
		return nil, nil
	}
	s, err := mail.NewSender(mail.Config{
		Server: c.SMTP, Security: mail.Security(c.SMTPSecurity), From: c.SMTPFrom, Login: c.SMTPLogin, CA: c.SMTPCA,
	})
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrConfig, err)
	}
	return s, nil
}
