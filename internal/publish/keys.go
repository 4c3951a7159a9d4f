package publish

import (
	"bytes"
	"crypto"
	"crypto/ed25519"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"

	"github.com/secure-systems-lab/go-securesystemslib/encrypted"
	"github.com/sigstore/sigstore/pkg/signature"
	"github.com/theupdateframework/go-tuf/v2/metadata"

	"github.com/resultity/node/internal/durable"
	"github.com/resultity/node/internal/failpoint"
)

// Key is a private key of the repository. It is never printed.
type Key struct {
	signer signature.Signer
	public *metadata.Key
	id     string
}

// ID returns the key's TUF id, which is the hash of its public half.
func (k *Key) ID() string { return k.id }

// Public returns the public half, for a holder of that name (see [Public]).
func (k *Key) Public(name string) Public { return Public{name, k.public, k.id} }

// Passphrase returns what opens the encrypted key in file, or, if the key is new,
// what to encrypt it with: nothing leaves it unencrypted. A nil one opens no
// encrypted key.
type Passphrase func(file string, new bool) ([]byte, error)

// Forms of key files.
const (
	pemType       = "PRIVATE KEY"                    // PKCS 8
	encryptedType = "ENCRYPTED SIGSTORE PRIVATE KEY" // the same in scrypt and secretbox, as cosign has it
	publicType    = "PUBLIC KEY"                     // PKIX
)

// ErrEncrypted says that a key cannot be used without its passphrase.
var ErrEncrypted = errors.New("the key is encrypted: give it with --key, and its passphrase")

// MakeKey reads the key in the file, or makes one there.
func MakeKey(file string, pass Passphrase) (*Key, error) {
	k, err := OpenKey(file, pass)
	if !errors.Is(err, fs.ErrNotExist) {
		return k, err
	}
	_, priv, err := ed25519.GenerateKey(nil)
	if err != nil {
		return nil, err
	}
	der, err := x509.MarshalPKCS8PrivateKey(priv)
	if err != nil {
		return nil, err
	}
	block := &pem.Block{Type: pemType, Bytes: der}
	var phrase []byte
	if pass != nil {
		if phrase, err = pass(file, true); err != nil {
			return nil, err
		}
	}
	if len(phrase) > 0 {
		block.Type = encryptedType
		if block.Bytes, err = encrypted.EncryptWithCustomKDFParameters(der, phrase, encrypted.Standard); err != nil {
			return nil, err
		}
	}
	failpoint.Here("publish.key.begin")
	if err := durable.WriteFile(file, pem.EncodeToMemory(block), 0o600); err != nil {
		return nil, err
	}
	return parseKey(file, &pem.Block{Type: pemType, Bytes: der}, nil)
}

// OpenKey reads a key. It refuses a file that others may read or write, and fails
// with [ErrEncrypted] where pass is nil or wrong. Errors never quote the file.
func OpenKey(file string, pass Passphrase) (*Key, error) {
	f, err := os.OpenFile(file, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !st.Mode().IsRegular() || st.Mode().Perm()&0o077 != 0 {
		return nil, fmt.Errorf("key %s has mode %v: want a file for its owner alone; if nobody has copied it, chmod 600 it, else replace the key", file, st.Mode())
	}
	raw, err := durable.ReadAll(f, maxKeyFile)
	if err != nil {
		return nil, fmt.Errorf("key %s: %w", file, err)
	}
	b, rest := pem.Decode(raw)
	if b == nil || len(bytes.TrimSpace(rest)) != 0 {
		return nil, fmt.Errorf("key %s: want one PEM block %s or %s", file, pemType, encryptedType)
	}
	return parseKey(file, b, pass)
}

const maxKeyFile = 64 << 10 // bytes

func parseKey(file string, b *pem.Block, pass Passphrase) (*Key, error) {
	der := b.Bytes
	switch b.Type {
	case pemType:
	case encryptedType:
		if pass == nil {
			return nil, fmt.Errorf("key %s: %w", file, ErrEncrypted)
		}
		phrase, err := pass(file, false)
		if err != nil {
			return nil, err
		}
		if der, err = encrypted.Decrypt(b.Bytes, phrase); err != nil {
			return nil, fmt.Errorf("key %s: the passphrase does not open it: %w", file, ErrEncrypted)
		}
	default:
		return nil, fmt.Errorf("key %s: PEM block %.40q, want %s or %s", file, b.Type, pemType, encryptedType)
	}
	priv, err := x509.ParsePKCS8PrivateKey(der)
	if err != nil {
		return nil, fmt.Errorf("key %s: not a PKCS 8 private key", file)
	}
	ed, ok := priv.(ed25519.PrivateKey)
	if !ok {
		return nil, fmt.Errorf("key %s: %T, want ed25519", file, priv)
	}
	signer, err := signature.LoadSigner(ed, crypto.Hash(0))
	if err != nil {
		return nil, fmt.Errorf("key %s: %w", file, err)
	}
	public, err := metadata.KeyFromPublicKey(ed.Public())
	if err != nil {
		return nil, fmt.Errorf("key %s: %w", file, err)
	}
	id, err := public.ID()
	return &Key{signer, public, id}, err
}

// Public is the public half of a key, and whose it is. The name is for people:
// roots carry it, and nothing rests upon it.
type Public struct {
	Name string
	key  *metadata.Key
	id   string
}

// ID returns the key's TUF id.
func (p Public) ID() string { return p.id }

// holderName is what a holder may be called.
var holderName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._@+-]{0,63}$`)

// PEM returns the public key as a file that [ReadPublic] takes.
func (p Public) PEM() ([]byte, error) {
	public, err := p.key.ToPublicKey()
	if err != nil {
		return nil, err
	}
	der, err := x509.MarshalPKIXPublicKey(public)
	return pem.EncodeToMemory(&pem.Block{Type: publicType, Bytes: der}), err
}

// HolderOf returns the name of the holder of a public key's file: the file's,
// without .pub. It fails when nobody may be called so.
func HolderOf(file string) (string, error) {
	name := strings.TrimSuffix(filepath.Base(file), ".pub")
	if !holderName.MatchString(name) {
		return "", fmt.Errorf("public key %s: call the file NAME.pub after its holder, NAME of letters, digits and . _ @ + -, at most 64", file)
	}
	return name, nil
}

// ReadPublic reads a public key; see [HolderOf].
func ReadPublic(file string) (Public, error) {
	raw, err := durable.ReadFile(file, maxKeyFile)
	if err != nil {
		return Public{}, fmt.Errorf("public key %s: %w", file, err)
	}
	b, rest := pem.Decode(raw)
	if b == nil || b.Type != publicType || len(bytes.TrimSpace(rest)) != 0 {
		return Public{}, fmt.Errorf("public key %s: want one PEM block %s", file, publicType)
	}
	parsed, err := x509.ParsePKIXPublicKey(b.Bytes)
	if err != nil {
		return Public{}, fmt.Errorf("public key %s: %w", file, err)
	}
	ed, ok := parsed.(ed25519.PublicKey)
	if !ok {
		return Public{}, fmt.Errorf("public key %s: %T, want ed25519", file, parsed)
	}
	name, err := HolderOf(file)
	if err != nil {
		return Public{}, err
	}
	k, err := metadata.KeyFromPublicKey(ed)
	if err != nil {
		return Public{}, fmt.Errorf("public key %s: %w", file, err)
	}
	id, err := k.ID()
	return Public{name, k, id}, err
}

// successor is the end of the file in which a role's next key waits until a root
// names it.
const successor = ".next"

// key returns the key of role that the root names. A rotation that was cut
// short after its root had been published is completed here.
func (r *repository) key(role string) (*Key, error) {
	want := r.root.Signed.Roles[role].KeyIDs
	name := r.keyFile(role)
	k, err := OpenKey(name, nil)
	if err == nil && slices.Contains(want, k.id) {
		return k, nil
	}
	succ, succErr := OpenKey(name+successor, nil)
	switch {
	case succErr == nil && slices.Contains(want, succ.id):
		failpoint.Here("publish.succession.begin")
		if err := os.Rename(name+successor, name); err != nil {
			return nil, err
		}
		failpoint.Here("publish.succession.renamed")
		return succ, durable.SyncDir(r.dir + "/keys")
	case err != nil:
		return nil, err
	}
	return nil, fmt.Errorf("key %s is not the one that root %d names for %s", name, r.root.Signed.Version, role)
}

// elsewhere reports whether err says that a role's key is not within reach, which
// is a choice and no fault.
func elsewhere(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission) || errors.Is(err, ErrEncrypted)
}

// rolesOf tells by roots whose keys these are.
func rolesOf(keys []*Key, roots ...*metadata.RootType) (map[string][]*Key, error) {
	list := map[string][]*Key{}
	for _, k := range keys {
		found := false
		for _, role := range online {
			if slices.ContainsFunc(roots, func(r *metadata.RootType) bool { return slices.Contains(r.Roles[role].KeyIDs, k.id) }) {
				list[role], found = append(list[role], k), true
			}
		}
		if !found {
			return nil, fmt.Errorf("key %s is none that root %d names for %s", k.id, roots[len(roots)-1].Version, strings.Join(online, ", "))
		}
	}
	return list, nil
}

// Exposed lists the files in DIR/keys that decide about a network and that this
// process can use: root and targets keys that are not encrypted. To serve takes
// none of them.
func Exposed(dir string) ([]string, error) {
	var list []string
	for _, pattern := range []string{"root*.pem*", metadata.TARGETS + ".pem*"} {
		names, err := filepath.Glob(filepath.Join(dir, "keys", pattern))
		if err != nil {
			return nil, err
		}
		for _, name := range names {
			if _, err := OpenKey(name, nil); !elsewhere(err) {
				list = append(list, name)
			}
		}
	}
	return list, nil
}

// sign signs with the role's key, if it is within reach, and those of extra, and
// prints the result. One of them is enough.
func sign[T metadata.Roles](r *repository, role string, m *metadata.Metadata[T], extra map[string][]*Key) (file[T], error) {
	keys := extra[role]
	k, err := r.key(role)
	switch {
	case err == nil:
		keys = append(slices.Clone(keys), k)
	case len(keys) == 0 || !elsewhere(err):
		return file[T]{}, err
	}
	if err := addSignatures(m, keys...); err != nil {
		return file[T]{}, err
	}
	raw, err := m.ToBytes(true)
	return file[T]{m, raw}, err
}

// addSignatures signs with each of keys once.
func addSignatures[T metadata.Roles](m *metadata.Metadata[T], keys ...*Key) error {
	for _, k := range keys {
		if slices.ContainsFunc(m.Signatures, func(s metadata.Signature) bool { return s.KeyID == k.id }) {
			continue
		}
		if _, err := m.Sign(k.signer); err != nil {
			return err
		}
	}
	return nil
}
