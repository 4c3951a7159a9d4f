package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"github.com/ethereum/go-ethereum/accounts/keystore"
	"github.com/google/uuid"

	"github.com/resultity/node/internal/durable"
	"github.com/resultity/node/internal/evm"
	"github.com/resultity/node/internal/identity"
	"github.com/resultity/node/internal/signer"
)

// Where the key and its counters are on a packaged machine.
const (
	credentialFile = "/etc/credstore.encrypted/resultity-key"
	stateDir       = "/var/lib/resultity-signer"
	agentIdentity  = "/var/lib/resultity/.local/state/resultity/agent/identity"
	service        = "resultity-signer.service"
)

// run runs a program of systemd's and returns what it prints. Nothing of stdin
// ends in an error.
func run(ctx context.Context, name string, stdin []byte, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Stdin = bytes.NewReader(stdin)
	var text bytes.Buffer
	cmd.Stderr = &text
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("%s %s: %w: %.500s", name, args[0], err, bytes.TrimSpace(text.Bytes()))
	}
	return out, nil
}

func (c *command) path(name string) string { return filepath.Join("/", c.root, name) }

func (c *command) counters() string { return filepath.Join(c.path(stateDir), countersFile) }

var errNoKey = errors.New("there is no key here; make one with resultity-signer init, migrate or import")

// key decrypts the key, for which one has to be root.
func (c *command) key(ctx context.Context) (*evm.Key, error) {
	if _, err := os.Stat(c.path(credentialFile)); errors.Is(err, fs.ErrNotExist) {
		return nil, errNoKey
	} else if err != nil {
		return nil, err
	}
	raw, err := c.systemd(ctx, "systemd-creds", nil, "decrypt", "--name="+keyCredential, c.path(credentialFile), "-")
	if err != nil {
		return nil, err
	}
	return evm.ParseKey(strings.TrimSpace(string(raw)))
}

// seal puts a key in place. The old one's file is kept under its node's name, and
// its counters are moved aside after it has gone: a service that was started before
// that must not begin to count anew.
func (c *command) seal(ctx context.Context, key *evm.Key) error {
	old, err := c.key(ctx)
	switch {
	case err == nil && old.Address() == key.Address():
		return c.aside(key.Address(), key.Address())
	case err == nil:
		kept := c.path(credentialFile) + "." + suffix(old.Address())
		if err := copyFile(c.path(credentialFile), kept); err != nil {
			return err
		}
		fmt.Fprintf(c.out, "the key of %s is kept in %s\n", old.Address(), kept)
	case errors.Is(err, errNoKey):
		old = key
	default:
		return err
	}
	sealed, err := c.systemd(ctx, "systemd-creds", []byte(key.Hex()+"\n"), "encrypt", "--name="+keyCredential, "-", "-")
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(c.path(credentialFile)), 0o700); err != nil {
		return err
	}
	if err := durable.WriteFile(c.path(credentialFile), sealed, 0o600); err != nil {
		return err
	}
	return c.aside(key.Address(), old.Address())
}

// aside moves counters away that are not node's. Damaged ones are those of the key
// that was here before.
func (c *command) aside(node, before evm.Address) error {
	counts, err := signer.ReadCounts(c.counters())
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case errors.Is(err, signer.ErrCounters):
		counts.Node = before
	case err != nil:
		return err
	}
	if counts.Node == node || counts.Node == (evm.Address{}) {
		return nil
	}
	if err := os.Rename(c.counters(), c.counters()+"."+suffix(counts.Node)); err != nil {
		return err
	}
	return durable.SyncDir(c.path(stateDir))
}

// suffix is of the files of a node that is not this one any more.
func suffix(node evm.Address) string { return strings.ToLower(node.Hex()) }

func copyFile(from, to string) error {
	raw, err := durable.ReadFile(from, maxBackup)
	if err != nil {
		return err
	}
	return durable.WriteFile(to, raw, 0o600)
}

// stop ends the service, so that nobody signs while the key changes. The socket
// starts it again when the agent asks.
func (c *command) stop(ctx context.Context) error {
	_, err := c.systemd(ctx, "systemctl", nil, "stop", service)
	return err
}

// answers starts the service anew and compares whose key it has. Who asked
// meanwhile may have started it with the key before.
func (c *command) answers(ctx context.Context, want evm.Address) error {
	if err := c.stop(ctx); err != nil {
		return err
	}
	if _, err := c.systemd(ctx, "systemctl", nil, "start", "resultity-signer.socket"); err != nil {
		return err
	}
	s, err := signer.Dial(c.path(signer.SocketPath))
	if err != nil {
		return err
	}
	defer s.Close() // nothing was asked
	if s.Address() != want {
		return fmt.Errorf("the service has the key of %s, want %s", s.Address(), want)
	}
	return nil
}

func (c *command) show(ctx context.Context) error {
	key, err := c.key(ctx)
	if err != nil {
		return err
	}
	fmt.Fprintf(c.out, "node      %s\nkey       %s\n", key.Address(), c.path(credentialFile))
	counts, err := signer.ReadCounts(c.counters())
	if errors.Is(err, fs.ErrNotExist) {
		fmt.Fprintln(c.out, "counters  none: it has signed nothing yet")
		return nil
	}
	if err != nil {
		return err
	}
	fmt.Fprintf(c.out, "counters  %s, start %d\n", c.counters(), counts.Starts)
	for name, n := range counts.Networks {
		fmt.Fprintf(c.out, "network   %s, %d hellos\n", name, n)
	}
	for _, id := range counts.Chains {
		fmt.Fprintf(c.out, "chain     %d\n", id)
	}
	return nil
}

// init makes a key where there is neither one here nor one of the agent's.
func (c *command) init(ctx context.Context) error {
	key, err := c.key(ctx)
	if err == nil {
		fmt.Fprintf(c.out, "there is a key already, of node %s\n", key.Address())
		return nil
	}
	if !errors.Is(err, errNoKey) {
		return err
	}
	if identity.Exists(c.path(agentIdentity)) {
		return errors.New("the agent has a key; take it over with resultity-signer migrate")
	}
	_, err = c.fresh(ctx)
	return err
}

// fresh puts a new key in place.
func (c *command) fresh(ctx context.Context) (evm.Address, error) {
	key, err := evm.NewKey()
	if err != nil {
		return evm.Address{}, err
	}
	if err := c.seal(ctx, key); err != nil {
		return evm.Address{}, err
	}
	fmt.Fprintf(c.out, "made the key of node %s\n", key.Address())
	return key.Address(), nil
}

// migrate takes over the agent's key with its counters. The agent is stopped over
// it, so that the key counts in one place at a time, and goes on when the service
// has answered, or when nothing was taken over.
func (c *command) migrate(ctx context.Context) (err error) {
	dir := c.path(agentIdentity)
	if c.from != "" {
		dir = c.from
	}
	if here, err := c.key(ctx); err == nil && !identity.Exists(dir) {
		fmt.Fprintf(c.out, "the agent has no key; resultity-signer has that of node %s\n", here.Address())
		return erase(dir) // what a migration left that was cut short
	}
	o, err := c.owned(dir)
	if err != nil {
		return err
	}
	agent := func(verb string) error {
		_, err := c.systemd(ctx, "systemctl", nil, "--user", "-M", account+"@", verb, "resultity-agent.service")
		return err
	}
	_, inactive := c.systemd(ctx, "systemctl", nil, "--user", "-M", account+"@", "is-active", "resultity-agent.service")
	taken := false
	if inactive == nil {
		if err := agent("stop"); err != nil {
			return err
		}
		defer func() {
			switch {
			case err == nil, !taken:
				err = errors.Join(err, agent("start"))
			default:
				err = fmt.Errorf("%w; the agent stays stopped, so that the key does not count in two places: migrate again, then start it", err)
			}
		}()
	}
	key, err := identity.Load(o)
	if err != nil {
		return err
	}
	if err := c.stop(ctx); err != nil {
		return err
	}
	if err := c.seal(ctx, key); err != nil {
		return err
	}
	taken = true
	if err := c.place(filepath.Join(dir, countersFile), key.Address()); err != nil {
		return err
	}
	if err := c.answers(ctx, key.Address()); err != nil {
		return fmt.Errorf("%w; the agent still has its key, nothing is lost", err)
	}
	if err := erase(dir); err != nil {
		return err
	}
	fmt.Fprintf(c.out, "resultity-signer has the key of node %s; the agent's is overwritten and removed\n", key.Address())
	return nil
}

// erase takes the key, its passphrase and its counters out of the agent's reach,
// then overwrites and removes them. What a disk or a file system keeps of old
// blocks is beyond it. The directory is the account's, which gets root to touch nothing
// outside of the one that it is in.
func erase(dir string) error {
	parent, err := os.OpenRoot(filepath.Dir(dir))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer parent.Close() // what was done through it is synced
	root, err := parent.OpenRoot(filepath.Base(dir))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("erase %s: %w", dir, err)
	}
	defer root.Close() // likewise
	for _, name := range []string{"key.json", "passphrase", countersFile} {
		if err := eraseFile(root, name); err != nil {
			return fmt.Errorf("erase %s: %w", filepath.Join(dir, name), err)
		}
	}
	d, err := root.Open(".")
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

func eraseFile(root *os.Root, name string) error {
	gone := name + ".erased"
	if err := root.Rename(name, gone); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	f, err := root.OpenFile(gone, os.O_WRONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	st, err := f.Stat()
	if err == nil && (!st.Mode().IsRegular() || st.Sys().(*syscall.Stat_t).Nlink != 1) {
		err = errors.New("it is no file of its own, and stays as it is; see who has put it there")
	}
	if err != nil {
		return errors.Join(err, f.Close())
	}
	_, err = f.WriteAt(make([]byte, min(st.Size(), maxBackup)), 0)
	return errors.Join(err, f.Sync(), f.Close(), root.Remove(gone))
}

// owned says how an identity directory of an account is opened by root.
func (c *command) owned(dir string) (identity.Options, error) {
	st, err := os.Stat(dir)
	if err != nil {
		return identity.Options{}, err
	}
	return identity.Options{Dir: dir, Passphrase: c.passphrase, Owner: uidOfFile(st)}, nil
}

// place copies counters to where the service has them, if there are any.
func (c *command) place(from string, node evm.Address) error {
	counts, err := signer.ReadCounts(from)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	return c.restore(counts, node)
}

// restore puts counts in place, unless the ones there are ahead.
func (c *command) restore(counts signer.Counts, node evm.Address) error {
	if counts.Node != node {
		return fmt.Errorf("the counters are those of node %s, and the key that of %s", counts.Node, node)
	}
	if now, err := signer.ReadCounts(c.counters()); err == nil && now.Node == node {
		counts = counts.Above(now)
	}
	u, err := user.Lookup("resultity-signer")
	if err != nil {
		return fmt.Errorf("%w; systemd-sysusers makes it", err)
	}
	uid, err1 := strconv.Atoi(u.Uid)
	gid, err2 := strconv.Atoi(u.Gid)
	if err := errors.Join(err1, err2); err != nil {
		return err
	}
	if err := os.MkdirAll(c.path(stateDir), 0o700); err != nil {
		return err
	}
	raw, err := signer.FormatCounts(counts)
	if err != nil {
		return err
	}
	if err := durable.WriteFile(c.counters(), raw, 0o600); err != nil {
		return err
	}
	return errors.Join(os.Chown(c.path(stateDir), uid, gid), os.Chown(c.counters(), uid, gid))
}

// backup is a keystore file, version 3, as wallets read it, and beside it what
// the key has counted.
type backup struct {
	json.RawMessage
	Counts *signer.Counts
}

func (b backup) MarshalJSON() ([]byte, error) {
	m := map[string]json.RawMessage{}
	if err := json.Unmarshal(b.RawMessage, &m); err != nil {
		return nil, err
	}
	if b.Counts != nil {
		raw, err := json.Marshal(b.Counts)
		if err != nil {
			return nil, err
		}
		m["resultity"] = raw
	}
	return json.MarshalIndent(m, "", "  ")
}

// maxBackup bounds a key's file, a passphrase's, and what is overwritten of one, in
// bytes.
const maxBackup = 64 << 10

func (c *command) secret() (string, error) {
	if c.passphrase == "" {
		return "", fmt.Errorf("%w: --passphrase FILE is needed", errUsage)
	}
	raw, err := durable.ReadFile(c.passphrase, maxBackup)
	pass := strings.TrimRight(string(raw), "\r\n")
	if err == nil && len(pass) < 12 {
		err = fmt.Errorf("the passphrase in %s has %d characters, want at least 12: whoever finds the backup can try for ever", c.passphrase, len(pass))
	}
	return pass, err
}

func (c *command) export(ctx context.Context, name string) error {
	pass, err := c.secret()
	if err != nil {
		return err
	}
	var key *evm.Key
	counters := c.counters()
	if c.from != "" {
		o, err := c.owned(c.from)
		if err != nil {
			return err
		}
		o.Passphrase = "" // that is the backup's
		if key, err = identity.Load(o); err != nil {
			return err
		}
		counters = filepath.Join(c.from, countersFile)
	} else if key, err = c.key(ctx); err != nil {
		return err
	}
	raw, err := keystore.EncryptKey(&keystore.Key{Id: uuid.New(), Address: key.Address(), PrivateKey: key.ECDSA()}, pass, c.scryptN, keystore.StandardScryptP)
	if err != nil {
		return err
	}
	b := backup{RawMessage: raw}
	if counts, err := signer.ReadCounts(counters); err == nil {
		b.Counts = &counts
	}
	text, err := json.Marshal(b)
	if err != nil {
		return err
	}
	if _, err := os.Lstat(name); err == nil {
		return fmt.Errorf("%s exists already", name)
	}
	if err := durable.WriteFile(name, append(text, '\n'), 0o600); err != nil {
		return err
	}
	fmt.Fprintf(c.out, "wrote the key of node %s to %s\n", key.Address(), name)
	return nil
}

// importKey makes this machine the node of a backup. Its counts go on where the
// machine that it came from is not.
func (c *command) importKey(ctx context.Context, name string) error {
	pass, err := c.secret()
	if err != nil {
		return err
	}
	raw, err := durable.ReadFile(name, maxBackup)
	if err != nil {
		return err
	}
	key, err := identity.ParseKeystore(raw, pass)
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	var rest struct {
		Counts *signer.Counts `json:"resultity"`
	}
	if err := json.Unmarshal(raw, &rest); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	if identity.Exists(c.path(agentIdentity)) {
		return errors.New("the agent has a key of its own; resultity-signer migrate takes it over, or move its identity directory away")
	}
	if err := c.stop(ctx); err != nil {
		return err
	}
	if err := c.seal(ctx, key); err != nil {
		return err
	}
	if rest.Counts != nil {
		if err := c.restore(rest.Counts.Takeover(), key.Address()); err != nil {
			return err
		}
	}
	if err := c.answers(ctx, key.Address()); err != nil {
		return err
	}
	fmt.Fprintf(c.out, "this machine is node %s now. Restart the agent. Another machine that still uses this key will be refused by the network.\n", key.Address())
	if rest.Counts == nil {
		fmt.Fprintln(c.out, "The file has no counters: if the network says cloned key, resultityctl identity takeover.")
	}
	return nil
}

// rotate begins as a new node. What the old one has to deliver, its account and
// its registration stay with the old key: the network knows nodes by their keys.
func (c *command) rotate(ctx context.Context) error {
	if _, err := c.key(ctx); err != nil {
		return err
	}
	node, err := c.fresh(ctx)
	if err != nil {
		return err
	}
	if err := c.answers(ctx, node); err != nil {
		return err
	}
	fmt.Fprintln(c.out, "This is a new node: it has to be registered and bound anew. Move networks/ in the agent's state directory away, put an enrolment token in place, and restart the agent.")
	return nil
}

func uidOfFile(st fs.FileInfo) int {
	s, ok := st.Sys().(*syscall.Stat_t)
	if !ok {
		return 0
	}
	return int(s.Uid)
}
