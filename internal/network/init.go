package network

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/resultity/node/internal/durable"
	"github.com/resultity/node/internal/evm"
	"github.com/resultity/node/internal/failpoint"
	"github.com/resultity/node/internal/network/store"
	"github.com/resultity/node/internal/publish"
	"github.com/resultity/node/internal/snapshot"
)

// InitOptions say what network to make.
type InitOptions struct {
	Name    string
	ChainID uint64
	Publish publish.Options
	// TokenUses is how many nodes the first enrolment token is good for.
	TokenUses int
}

// Init makes a network in dir: the keys, an empty repository, the store, and,
// as files of the owner alone, DIR/api-key, DIR/enrolment-token and a
// DIR/config.json to fill in. The repository is made last: what a call that was
// cut short left behind is used by the next one. It returns the address of the
// message key, and the first root where its holders have still to sign it.
func Init(ctx context.Context, dir string, o InitOptions, log *slog.Logger) (evm.Address, *publish.Proposal, error) {
	var none evm.Address
	if !filepath.IsAbs(dir) {
		return none, nil, fmt.Errorf("%w: dir: %q is not an absolute path", ErrConfig, dir)
	}
	if err := os.MkdirAll(filepath.Join(dir, "keys"), 0o700); err != nil {
		return none, nil, err
	}
	// Before anything else is made: keys may go to media that are not there.
	for _, name := range append(o.Publish.RootKeys[:len(o.Publish.RootKeys):len(o.Publish.RootKeys)], o.Publish.TargetsKey) {
		if name == "" {
			continue
		}
		if st, err := os.Stat(filepath.Dir(name)); err != nil || !st.IsDir() {
			return none, nil, fmt.Errorf("%w: key %s: %s is not a directory; make it, or mount what it is on, first", ErrConfig, name, filepath.Dir(name))
		}
	}
	if _, err := os.Stat(filepath.Join(dir, "repository/metadata/1.root.json")); err == nil {
		return none, nil, fmt.Errorf("%w: dir: %s holds a network already", ErrConfig, dir)
	}
	key, err := makeMessageKey(dir)
	if err != nil {
		return none, nil, err
	}
	if err := writeSkeleton(filepath.Join(dir, snapshot.Target), o, key.Address()); err != nil {
		return none, nil, err
	}
	if err := firstSecrets(ctx, dir, o, log); err != nil {
		return none, nil, err
	}
	if err := giveToOwner(dir); err != nil {
		return none, nil, err
	}
	var p *publish.Proposal
	if o.Publish.Holders != nil {
		p, err = publish.Prepare(dir, o.Publish)
	} else {
		err = publish.Init(dir, o.Publish)
	}
	return key.Address(), p, errors.Join(err, giveToOwner(dir))
}

// firstSecrets makes the store, an API key and an enrolment token.
func firstSecrets(ctx context.Context, dir string, o InitOptions, log *slog.Logger) error {
	s, err := store.Open(ctx, filepath.Join(dir, "store"), log)
	if err != nil {
		return err
	}
	defer s.Close()
	now := time.Now()
	for _, f := range []struct {
		name string
		make func() (string, error)
	}{
		{"api-key", func() (string, error) { return s.CreateAPIKey(ctx, "first", now) }},
		{"enrolment-token", func() (string, error) {
			return s.CreateToken(ctx, store.Token{Uses: o.TokenUses, Account: "operator", Expires: now.Add(7 * 24 * time.Hour).UnixMilli()})
		}},
	} {
		if err := ifMissing(filepath.Join(dir, f.name), f.make); err != nil {
			return err
		}
	}
	return nil
}

// made are the names in a network's directory of what [Init] makes.
var made = []string{"keys", "store", "repository", "publish.json", "lock", "api-key", "enrolment-token", snapshot.Target}

// giveToOwner gives what root has made in a directory, now or in a call before that
// was cut short, to whose directory it is: the account that the service runs as.
// What else is in there stays whose it is.
func giveToOwner(dir string) error {
	st, err := os.Stat(dir)
	if err != nil {
		return err
	}
	owner, ok := st.Sys().(*syscall.Stat_t)
	if !ok || os.Geteuid() != 0 || owner.Uid == 0 {
		return nil
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer root.Close() // it was only looked into
	for _, top := range made {
		if err := fs.WalkDir(root.FS(), top, func(name string, d fs.DirEntry, err error) error {
			if errors.Is(err, fs.ErrNotExist) {
				return nil
			} else if err != nil {
				return err
			}
			info, err := d.Info()
			if err != nil {
				return err
			}
			// A file with a second name may be one of root's from elsewhere.
			if is := info.Sys().(*syscall.Stat_t); is.Uid != 0 || !d.IsDir() && is.Nlink != 1 {
				return nil
			}
			return root.Lchown(name, int(owner.Uid), int(owner.Gid))
		}); err != nil {
			return err
		}
	}
	return nil
}

func ifMissing(name string, content func() (string, error)) error {
	if _, err := os.Stat(name); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	s, err := content()
	if err != nil {
		return err
	}
	failpoint.Here("network.secret.begin")
	return durable.WriteFile(name, []byte(s+"\n"), 0o600)
}

func messageKeyFile(dir string) string { return filepath.Join(dir, "keys", "message.key") }

func makeMessageKey(dir string) (*evm.Key, error) {
	if err := ifMissing(messageKeyFile(dir), func() (string, error) {
		k, err := evm.NewKey()
		if err != nil {
			return "", err
		}
		return k.Hex(), nil
	}); err != nil {
		return nil, err
	}
	return readMessageKey(dir)
}

const maxMessageKey = 1 << 10 // bytes; it has 64 digits

// readMessageKey refuses a key that others could read. Errors never quote it.
func readMessageKey(dir string) (*evm.Key, error) {
	name := messageKeyFile(dir)
	raw, err := durable.ReadSecret(name, maxMessageKey)
	if err != nil {
		return nil, fmt.Errorf("%w: message key: %w", ErrConfig, err)
	}
	k, err := evm.ParseKey(strings.TrimSpace(string(raw)))
	if err != nil {
		return nil, fmt.Errorf("%w: message key %s: %w", ErrConfig, name, err)
	}
	return k, nil
}

// Publish makes a configuration the network's. Beside what its nodes would
// refuse it refuses what this service could not serve, and a change of the
// network's name or chain, which would make every node a stranger. A running
// service takes it over within seconds; [Reload] makes it do so at once.
// keys are TUF keys that do not lie in DIR/keys.
func Publish(dir string, raw []byte, keys ...*publish.Key) error {
	c, err := snapshot.Parse(raw)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrConfig, err)
	}
	// Who publishes from another machine has no message key there; the service
	// itself refuses a configuration that does not list it.
	if key, err := readMessageKey(dir); err == nil {
		if err := listsKey(c, key.Address()); err != nil {
			return err
		}
	} else if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if _, err := publish.Refresh(dir); err == nil {
		old, err := publish.Current(dir)
		if err != nil {
			return err
		}
		if was := old.Config().Network; was.Name != c.Network.Name || was.ChainID != c.Network.ChainID {
			return fmt.Errorf("%w: network.name and network.chain_id are %s and %d; they cannot change to %s and %d: make another network for that", ErrConfig, was.Name, was.ChainID, c.Network.Name, c.Network.ChainID)
		}
	} else if !errors.Is(err, publish.ErrNothing) {
		return err
	}
	return publish.Publish(dir, raw, keys...)
}

// writeSkeleton writes a configuration in which only the operator's choices
// are missing. It is refused by publish until they are made.
func writeSkeleton(name string, o InitOptions, key evm.Address) error {
	return ifMissing(name, func() (string, error) {
		b, err := json.MarshalIndent(skeleton(o, key), "", "  ")
		return string(b), err
	})
}

type object = map[string]any

func skeleton(o InitOptions, key evm.Address) any {
	const (
		hash  = "sha256:FILL-IN"
		model = "fill-in"
	)
	// Ordered as people read it, which a map would not be.
	return struct {
		Schema     int      `json:"schema"`
		Network    any      `json:"network"`
		Limits     any      `json:"limits"`
		Logs       any      `json:"logs"`
		ImageTrust any      `json:"image_trust"`
		Models     []object `json:"models"`
		Runtime    any      `json:"runtime"`
		Validation any      `json:"validation"`
	}{
		Schema: 1,
		Network: snapshot.Network{
			Name: o.Name, ChainID: o.ChainID, MessageKeys: []evm.Address{key}, Heartbeat: 10, Window: 30, ClockWindow: 60,
		},
		Limits: snapshot.Limits{
			RequestBytes: 1 << 20, ResponseBytes: 4 << 20, Tokens: 4096, Messages: 256, Deadline: 300, ResultTTL: 7 * 24 * 3600,
		},
		Logs:       snapshot.Logs{Interval: 900, BatchBytes: 64 << 10},
		ImageTrust: snapshot.ImageTrust{Keys: []string{"FILL-IN: the text of cosign.pub"}, Revoked: []string{}},
		Models: []object{{
			"name": model, "version": "1", "format": "gguf",
			"files": []object{{"path": "model.gguf", "size": 0, "sha256": hash, "chunks": object{"root": hash}, "sources": []string{"https://FILL-IN/model.gguf"}}},
		}},
		Runtime: object{
			"engine": "llamacpp", "image": "registry.example/runtime@" + hash, "model": model,
			"settings":  snapshot.Settings{Context: 4096, Slots: 4},
			"devices":   []string{},
			"tmp_bytes": 64 << 20, "shm_bytes": 64 << 20,
			"start_timeout_s": 300, "watchdog_s": 30, "stall_s": 60, "stop_timeout_s": 20,
		},
		Validation: object{"golden": []object{{"name": "greeting", "prompt": "FILL-IN", "answers": []string{"FILL-IN"}, "tokens": 32, "timeout_s": 60}}},
	}
}
