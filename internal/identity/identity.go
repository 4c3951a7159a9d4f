// Package identity owns the node's key on disk: an Ethereum keystore file, made
// once, and the passphrase that opens it.
//
// The rule it keeps: the key is made only where there is none, and used only
// where nobody else could have read or placed it. It never leaves this process.
package identity

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/ethereum/go-ethereum/accounts/keystore"
	"github.com/google/uuid"

	"github.com/resultity/node/internal/durable"
	"github.com/resultity/node/internal/evm"
	"github.com/resultity/node/internal/failpoint"
)

// ErrRefused says that an identity is there and must not be used as it is. The
// text says why and what to do.
var ErrRefused = errors.New("identity refused")

// CredentialName is the systemd credential that holds the passphrase.
const CredentialName = "resultity-passphrase"

const (
	keyFile        = "key.json"
	passphraseFile = "passphrase"
	maxFile        = 64 << 10
)

// Options say where an identity is and how it is opened.
type Options struct {
	Dir         string // made with mode 0700 where it does not exist
	Passphrase  string // file with the passphrase; "" for the credential or our own
	Credentials string // $CREDENTIALS_DIRECTORY, or ""
	Owner       int    // uid whose files these may be beside root's and this process's, 0 for none
}

// Exists reports whether there is a key in a directory.
func Exists(dir string) bool {
	_, err := os.Lstat(filepath.Join(dir, keyFile))
	return err == nil
}

// Load returns the key that is there. It makes none.
func Load(o Options) (*evm.Key, error) {
	if !Exists(o.Dir) {
		return nil, fmt.Errorf("%w: there is no key in %s", ErrRefused, o.Dir)
	}
	key, _, err := Open(o)
	return key, err
}

// Open returns the node's key and whether it was made just now. Everything is
// durable before it returns. Errors about what is there wrap [ErrRefused].
func Open(o Options) (key *evm.Key, created bool, err error) {
	if err := os.MkdirAll(o.Dir, 0o700); err != nil {
		return nil, false, err
	}
	if err := private(o.Dir, o.Owner); err != nil {
		return nil, false, err
	}
	name := filepath.Join(o.Dir, keyFile)
	raw, err := readPrivate(name, o.Owner)
	exists := !errors.Is(err, fs.ErrNotExist)
	if exists && err != nil {
		return nil, false, err
	}
	pass, err := o.passphrase(!exists)
	if err != nil {
		return nil, false, err
	}
	if !exists {
		key, err := create(name, pass)
		return key, err == nil, err
	}
	key, err = ParseKeystore(raw, pass)
	if errors.Is(err, keystore.ErrDecrypt) {
		return nil, false, fmt.Errorf("%w: the passphrase does not open %s; put the right one in place (identity.passphrase, or the credential %s), or move the identity directory, and networks/NAME beside it, away to become a new node", ErrRefused, name, CredentialName)
	}
	if err != nil {
		return nil, false, fmt.Errorf("%w: %s is not a keystore file that can be opened: %w; restore it from a backup", ErrRefused, name, err)
	}
	return key, false, nil
}

func create(name, pass string) (*evm.Key, error) {
	key, err := evm.NewKey()
	if err != nil {
		return nil, err
	}
	// The light parameters cost 4 MiB and some 50 ms. The standard ones take
	// 256 MiB at each start, to protect a passphrase that is random here, or
	// lies beside the key anyway.
	raw, err := keystore.EncryptKey(&keystore.Key{Id: uuid.New(), Address: key.Address(), PrivateKey: key.ECDSA()},
		pass, keystore.LightScryptN, keystore.LightScryptP)
	if err != nil {
		return nil, err
	}
	failpoint.Here("identity.key.begin")
	if err := durable.WriteFile(name, raw, 0o600); err != nil {
		return nil, err
	}
	failpoint.Here("identity.key.written")
	return key, nil
}

// passphrase finds the passphrase; the first source that is configured counts.
// Our own is made only together with the key: a key whose passphrase file is
// gone must not be hidden behind a new one.
func (o Options) passphrase(fresh bool) (string, error) {
	own := filepath.Join(o.Dir, passphraseFile)
	name := own
	credential := filepath.Join(o.Credentials, CredentialName)
	switch _, err := os.Stat(credential); {
	case o.Passphrase != "":
		name = o.Passphrase
	case o.Credentials != "" && err == nil:
		name = credential
	}
	raw, err := readPrivate(name, o.Owner)
	if errors.Is(err, fs.ErrNotExist) && name == own && fresh {
		b := make([]byte, 32)
		_, _ = rand.Read(b) // crypto/rand never fails: it ends the program instead
		raw = []byte(hex.EncodeToString(b) + "\n")
		failpoint.Here("identity.passphrase.begin")
		err = durable.WriteFile(own, raw, 0o600)
		failpoint.Here("identity.passphrase.written")
	}
	if errors.Is(err, fs.ErrNotExist) {
		return "", fmt.Errorf("%w: the key's passphrase %s is missing; restore it from a backup", ErrRefused, name)
	}
	if err != nil {
		return "", err
	}
	pass := strings.TrimRight(string(raw), "\r\n")
	if pass == "" {
		return "", fmt.Errorf("%w: the passphrase in %s is empty", ErrRefused, name)
	}
	return pass, nil
}

// readPrivate reads a file of ours that nobody else may read or write. The
// checks are on the opened file, so that it cannot be exchanged in between.
func readPrivate(name string, owner int) ([]byte, error) {
	f, err := os.OpenFile(name, os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	if errors.Is(err, syscall.ELOOP) {
		return nil, fmt.Errorf("%w: %s is a symbolic link; put the file itself there", ErrRefused, name)
	}
	if err != nil {
		return nil, err
	}
	defer f.Close() // read only: nothing to lose
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if err := checkPrivate(name, st, owner); err != nil {
		return nil, err
	}
	if !st.Mode().IsRegular() {
		return nil, fmt.Errorf("%w: %s is not a regular file", ErrRefused, name)
	}
	raw, err := durable.ReadAll(f, maxFile)
	if errors.Is(err, durable.ErrLarge) {
		err = fmt.Errorf("%w: %s is %w", ErrRefused, name, err)
	}
	return raw, err
}

func private(name string, owner int) error {
	st, err := os.Lstat(name)
	if err != nil {
		return err
	}
	return checkPrivate(name, st, owner)
}

func checkPrivate(name string, st fs.FileInfo, owner int) error {
	if st.Mode().Perm()&0o077 != 0 {
		return fmt.Errorf("%w: %s has mode %04o, so that others may use it; if nobody did: chmod go= %s", ErrRefused, name, st.Mode().Perm(), name)
	}
	// systemd owns credentials as root and grants them by ACL.
	if s, ok := st.Sys().(*syscall.Stat_t); ok && !slices.Contains([]int{os.Getuid(), 0, owner}, int(s.Uid)) {
		return fmt.Errorf("%w: %s belongs to uid %d, not to uid %d that the agent runs as", ErrRefused, name, s.Uid, os.Getuid())
	}
	return nil
}
