// Package support owns the support archive: what an operator may hand to
// somebody else.
//
// The rule it keeps: what goes in is copied by name from lists of what is known
// to be harmless; everything else is left out. Beside that, nothing is written
// when one of the node's actual secrets is found in what would be written, plain
// or in hexadecimal or base64. There is no prompt, no answer, no key, no
// environment in it.
package support

import (
	"archive/tar"
	"bufio"
	"bytes"
	"compress/gzip"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/resultity/node/internal/config"
	"github.com/resultity/node/internal/durable"
	"github.com/resultity/node/internal/toml"
)

// Bounds of an archive, in bytes before compression.
const (
	MaxFile  = 1 << 20
	maxTotal = 16 << 20
	maxFiles = 200
)

// ErrSecret says that a secret was found in what would have been written.
var ErrSecret = errors.New("a secret of this node is in it, so that no archive was written")

// Archive collects files. Not safe for concurrent use.
type Archive struct {
	files []file
	total int
}

type file struct {
	name string
	data []byte
}

// Add puts a file in. What is over the bounds is cut, which the file's end says.
func (a *Archive) Add(name string, data []byte) {
	const note = "\n(cut here)\n"
	room := min(MaxFile, maxTotal-a.total)
	if len(a.files) >= maxFiles || room <= len(note) {
		return
	}
	if len(data) > room {
		data = append(bytes.Clone(data[:room-len(note)]), note...)
	}
	a.files = append(a.files, file{name, data})
	a.total += len(data)
}

// AddJSON puts a value in.
func (a *Archive) AddJSON(name string, v any) {
	raw, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		raw = []byte(err.Error())
	}
	a.Add(name, append(raw, '\n'))
}

// Write writes the archive as tar.gz, unless one of secrets is in it: then it
// writes nothing and returns [ErrSecret] with the file's name.
func (a *Archive) Write(w io.Writer, now time.Time, secrets [][]byte) error {
	for _, s := range secrets {
		for _, form := range forms(s) {
			for _, f := range a.files {
				if bytes.Contains(f.data, form) || strings.Contains(f.name, string(form)) {
					return fmt.Errorf("%w: see where %s gets it from", ErrSecret, f.name)
				}
			}
		}
	}
	z := gzip.NewWriter(w)
	t := tar.NewWriter(z)
	for _, f := range a.files {
		if err := t.WriteHeader(&tar.Header{Name: "resultity-support/" + f.name, Mode: 0o600, Size: int64(len(f.data)), ModTime: now}); err != nil {
			return err
		}
		if _, err := t.Write(f.data); err != nil {
			return err
		}
	}
	if err := t.Close(); err != nil {
		return err
	}
	return z.Close()
}

// minSecret is the length below which a secret's bytes would be found anywhere.
const minSecret = 4

// forms are the ways in which a secret could have been written: as it is, and in
// hexadecimal or base64, also as a part of something longer.
func forms(secret []byte) [][]byte {
	secret = bytes.TrimSpace(secret)
	if len(secret) < minSecret {
		return nil
	}
	h := hex.EncodeToString(secret)
	fs := [][]byte{secret, []byte(h), []byte(strings.ToUpper(h))}
	for _, enc := range []*base64.Encoding{base64.RawStdEncoding, base64.RawURLEncoding} {
		for shift := range 3 {
			// With bytes before and after it, the characters at both ends are
			// not the secret's alone.
			s := enc.EncodeToString(append(make([]byte, shift), secret...))
			s = s[(shift*8+5)/6:]
			if whole := (shift + len(secret)) % 3; whole != 0 {
				s = s[:len(s)-1]
			}
			if len(s) >= minSecret {
				fs = append(fs, []byte(s))
			}
		}
	}
	return fs
}

// Forms of values that may be shown of a configuration.
var (
	plainDevice = regexp.MustCompile(`^[a-z0-9.-]{1,64}/[a-z0-9_-]{1,64}=[A-Za-z0-9:._*-]{1,64}$`)

	plainPath = regexp.MustCompile(`^/[A-Za-z0-9/._@+-]{0,1000}$`)
	plainURL  = regexp.MustCompile(`^https://[A-Za-z0-9.:\[\]-]{1,255}/?$`)
	plainSize = regexp.MustCompile(`^[0-9]{1,15}[KMGT%]?$`)
	plainKey  = regexp.MustCompile(`^[a-z_]{1,40}(\.[a-z0-9._-]{1,64})?(\.[a-z_]{1,40}){0,2}$`)
)

// shown reports whether a value has the form that its key's values have.
func shown(key, value string) bool {
	switch key {
	case "network.NAME.url":
		return plainURL.MatchString(value)
	case "log.level":
		return slices.Contains([]string{"debug", "info", "warn", "error"}, value)
	case "log.upload":
		return slices.Contains([]string{"on", "off"}, value)
	case "runtime.memory_max":
		return plainSize.MatchString(value)
	case "runtime.devices":
		return plainDevice.MatchString(value)
	}
	return value == "" || plainPath.MatchString(value) // all others are files
}

// Config rewrites a configuration file: known keys with values of the form that
// they have to have. What is left out is named, as far as the name is harmless.
func Config(raw []byte) []byte {
	k, err := toml.Parse(raw, ".")
	if err != nil {
		return []byte("# not TOML; its text was left out\n") // the error may quote it
	}
	var b bytes.Buffer
	for _, key := range k.Keys() {
		value, isString := k.Get(key).(string)
		list, isList := k.Get(key).([]any)
		number, isNumber := k.Get(key).(int64)
		switch {
		case !plainKey.MatchString(key):
			b.WriteString("# a key of an odd form was left out\n")
		case !slices.Contains(config.Keys(), config.Generalise(key)):
			fmt.Fprintf(&b, "# %s: an unknown key; its value was left out\n", key)
		case isString && shown(config.Generalise(key), value):
			fmt.Fprintf(&b, "%s = %q\n", key, value)
		case isNumber && config.Generalise(key) == "network.NAME.priority":
			fmt.Fprintf(&b, "%s = %d\n", key, number)
		case isList && !slices.ContainsFunc(list, func(v any) bool { s, ok := v.(string); return !ok || !shown(key, s) }):
			fmt.Fprintf(&b, "%s = %s\n", key, strings.ReplaceAll(fmt.Sprintf("%q", list), `" "`, `", "`))
		default:
			fmt.Fprintf(&b, "# %s: not of the form that it has to have; its value was left out\n", key)
		}
	}
	return b.Bytes()
}

// directives of unit files that may be shown: those of our own units and what
// administrators add to such. None of them holds an environment, a credential or
// a command line, which may hold either.
var directives = strings.Fields(`Description Documentation ConditionUser ConditionPathExists Wants Requires After Before PartOf BindsTo
	StartLimitIntervalSec StartLimitBurst Type WatchdogSec WatchdogSignal Restart RestartSec RestartSteps RestartMaxDelaySec RestartPreventExitStatus
	TimeoutStartSec TimeoutStopSec KillMode Delegate StateDirectory StateDirectoryMode RuntimeDirectory RuntimeDirectoryMode RuntimeDirectoryPreserve
	ImportCredential UMask ManagedOOMPreference TasksMax LimitCORE LimitNOFILE MemoryMax MemoryHigh CPUQuota CPUWeight IOWeight Nice Slice
	NoNewPrivileges ProtectSystem ProtectHome ReadWritePaths ReadOnlyPaths InaccessiblePaths PrivateTmp PrivateDevices PrivateUsers PrivateNetwork
	ProtectKernelTunables ProtectKernelModules ProtectKernelLogs ProtectControlGroups ProtectClock ProtectHostname ProtectProc ProcSubset
	LockPersonality MemoryDenyWriteExecute RestrictRealtime RestrictSUIDSGID RestrictNamespaces RestrictAddressFamilies IPAddressDeny IPAddressAllow
	SystemCallArchitectures SystemCallFilter SystemCallErrorNumber CapabilityBoundingSet AmbientCapabilities WantedBy
	ListenStream SocketMode DirectoryMode DefaultDependencies ContainerName Image Pull Network ReadOnly ReadOnlyTmpfs Tmpfs Volume User
	DropCapability AddCapability PidsLimit Ulimit AddDevice GroupAdd WorkingDir StopSignal Entrypoint Notify LogDriver StopTimeout SourcePath`)

var section = regexp.MustCompile(`^\[[A-Za-z-]{1,40}\]$`)

// Unit rewrites a unit file: sections, and directives that may be shown.
// Comments are dropped; other directives keep their names alone.
func Unit(raw []byte) []byte {
	var b bytes.Buffer
	s := bufio.NewScanner(bytes.NewReader(raw))
	s.Buffer(nil, MaxFile)
	continued := false
	for s.Scan() {
		l := strings.TrimSpace(s.Text())
		was := continued
		continued = strings.HasSuffix(l, `\`)
		if was || l == "" || l[0] == '#' || l[0] == ';' {
			continue // what a continued line goes on with may be anything
		}
		name, value, ok := strings.Cut(l, "=")
		name = strings.TrimSpace(name)
		switch {
		case section.MatchString(l):
			fmt.Fprintln(&b, l)
		case ok && slices.Contains(directives, name):
			fmt.Fprintf(&b, "%s=%s\n", name, strings.TrimSpace(value))
		case ok && directive.MatchString(name):
			fmt.Fprintf(&b, "# %s: its value was left out\n", name)
		}
	}
	return b.Bytes()
}

var directive = regexp.MustCompile(`^[A-Za-z]{1,40}$`)

// PodmanInfo keeps of Podman's account of itself what says how it works.
func PodmanInfo(raw []byte) any {
	type named struct {
		Name    string `json:"name"`
		Package string `json:"package"`
		Version string `json:"version"`
	}
	var i struct {
		Host struct {
			Arch              string   `json:"arch"`
			Kernel            string   `json:"kernel"`
			OS                string   `json:"os"`
			CPUs              int      `json:"cpus"`
			MemTotal          int64    `json:"memTotal"`
			MemFree           int64    `json:"memFree"`
			CgroupControllers []string `json:"cgroupControllers"`
			CgroupManager     string   `json:"cgroupManager"`
			CgroupVersion     string   `json:"cgroupVersion"`
			Conmon            named    `json:"conmon"`
			OCIRuntime        named    `json:"ociRuntime"`
			Distribution      struct {
				Distribution string `json:"distribution"`
				Version      string `json:"version"`
			} `json:"distribution"`
			IDMappings json.RawMessage `json:"idMappings"`
			Security   struct {
				AppArmor bool `json:"apparmorEnabled"`
				Rootless bool `json:"rootless"`
				Seccomp  bool `json:"seccompEnabled"`
				SELinux  bool `json:"selinuxEnabled"`
			} `json:"security"`
		} `json:"host"`
		Store struct {
			Driver    string            `json:"graphDriverName"`
			Root      string            `json:"graphRoot"`
			Allocated uint64            `json:"graphRootAllocated"`
			Used      uint64            `json:"graphRootUsed"`
			Status    map[string]string `json:"graphStatus"`
		} `json:"store"`
		Version struct {
			API     string `json:"APIVersion"`
			Version string `json:"Version"`
		} `json:"version"`
	}
	if err := json.Unmarshal(raw, &i); err != nil {
		return map[string]string{"error": "Podman's answer cannot be read"}
	}
	return i
}

// maxSecret bounds what is read of a file that holds a secret, in bytes.
const maxSecret = 64 << 10

// Secrets reads the files that hold the node's secrets: those that a configuration
// names, which may be links, and the node's own, which are none. One that is not there
// has none; one that cannot be read is an error, since then nothing could be looked
// for.
func Secrets(named, own []string) ([][]byte, error) {
	var all [][]byte
	for i, name := range slices.Concat(named, own) {
		if name == "" {
			continue
		}
		raw, err := read(name, maxSecret, i < len(named), nil)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("a file with a secret, which the archive must not hold: %w", err)
		}
		all = append(all, raw)
		// A keystore file is one secret as a whole, and its ciphertext alone is
		// one, too.
		var key struct {
			Crypto struct {
				Ciphertext string `json:"ciphertext"`
			} `json:"crypto"`
		}
		if json.Unmarshal(raw, &key) == nil && key.Crypto.Ciphertext != "" {
			all = append(all, []byte(key.Crypto.Ciphertext))
			if b, err := hex.DecodeString(key.Crypto.Ciphertext); err == nil {
				all = append(all, b)
			}
		}
	}
	return all, nil
}

// read reads a regular file of at most so many bytes. Nothing else is even opened,
// which may do something: root reads here what stands in the account's directories,
// and a link there may lead to a device. Links are followed only if they may be.
// who, if there is one, looks at the file that was found, and where that is.
func read(name string, most int64, links bool, who func(at string, st *unix.Stat_t) error) ([]byte, error) {
	fail := func(err error) ([]byte, error) { return nil, &fs.PathError{Op: "read", Path: name, Err: err} }
	flags := unix.O_PATH | unix.O_CLOEXEC
	if !links {
		flags |= unix.O_NOFOLLOW
	}
	fd, err := unix.Open(name, flags, 0)
	if err != nil {
		return fail(err)
	}
	found := os.NewFile(uintptr(fd), name)
	defer found.Close() // a path alone
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return fail(err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return fail(durable.ErrNotFile)
	}
	self := fmt.Sprintf("/proc/self/fd/%d", fd)
	if who != nil {
		at, err := os.Readlink(self)
		if err == nil {
			err = who(at, &st)
		}
		if err != nil {
			return fail(err)
		}
	}
	f, err := os.Open(self)
	if err != nil {
		return fail(err)
	}
	defer f.Close() // read only: nothing to lose
	raw, err := durable.ReadAll(f, most)
	if err != nil {
		return fail(err)
	}
	return raw, nil
}

// errNotShown says that a file is for others than the node's account.
var errNotShown = errors.New("neither the account's nor for everybody to read")

// readable refuses what an account could not read either: a file that is for others, or
// one that is for everybody in a directory that is for others.
func readable(account int) func(string, *unix.Stat_t) error {
	return func(at string, st *unix.Stat_t) error {
		if int(st.Uid) != account && st.Mode&0o004 == 0 {
			return errNotShown
		}
		for at != "/" {
			at = filepath.Dir(at)
			var dir unix.Stat_t
			if err := unix.Stat(at, &dir); err != nil {
				return err
			}
			if int(dir.Uid) != account && dir.Mode&0o001 == 0 {
				return errNotShown
			}
		}
		return nil
	}
}

// Configs adds a configuration file and its drop-ins. It returns the files with
// secrets that any of them names, also where the whole is not valid.
func (a *Archive) Configs(main string) (secretFiles []string) {
	names := []string{main}
	if drop, err := filepath.Glob(main + ".d/*.toml"); err == nil {
		names = append(names, drop...)
	}
	for _, name := range names {
		raw, err := read(name, MaxFile, true, nil)
		if err != nil {
			a.Add("config/"+filepath.Base(name)+".error", []byte(reason(err)+"\n"))
			continue
		}
		a.Add("config/"+filepath.Base(name), Config(raw))
		if k, err := toml.Parse(raw, "."); err == nil {
			for _, key := range k.Keys() {
				switch config.Generalise(key) {
				case "network.NAME.enrolment_token", "identity.passphrase":
					if f, ok := k.Get(key).(string); ok && filepath.IsAbs(f) {
						secretFiles = append(secretFiles, f)
					}
				}
			}
		}
	}
	return secretFiles
}

// Units adds unit files, which the account's service manager has named, under the
// directory of a unit's name: such as the account, of this uid, could read itself.
func (a *Archive) Units(unit string, files []string, account int) {
	for i, name := range files {
		raw, err := read(name, MaxFile, true, readable(account))
		if err != nil {
			a.Add(fmt.Sprintf("units/%s/%d.error", unit, i), []byte(reason(err)+"\n"))
			continue
		}
		a.Add(fmt.Sprintf("units/%s/%d-%s", unit, i, filepath.Base(name)), append([]byte("# "+name+"\n"), Unit(raw)...))
	}
}

// reason is what an error of a file says, without the file's name.
func reason(err error) string {
	if e, ok := errors.AsType[*fs.PathError](err); ok {
		return e.Err.Error()
	}
	return "cannot be read"
}
