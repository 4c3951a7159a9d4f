package publish

import (
	"bytes"
	"crypto"
	"crypto/ed25519"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/sigstore/sigstore/pkg/signature"
	"github.com/theupdateframework/go-tuf/v2/metadata"

	"github.com/resultity/node/internal/durable"
	"github.com/resultity/node/internal/failpoint"
)

// key is a role's private key. It is never printed.
type key struct {
	signer signature.Signer
	public *metadata.Key
	id     string
}

const pemType = "PRIVATE KEY" // PKCS 8

// makeKey reads the key in name, or makes one there.
func makeKey(name string) (*key, error) {
	k, err := readKey(name)
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
	failpoint.Here("publish.key.begin")
	if err := durable.WriteFile(name, pem.EncodeToMemory(&pem.Block{Type: pemType, Bytes: der}), 0o600); err != nil {
		return nil, err
	}
	return readKey(name)
}

// readKey refuses a file that others may read or write. Errors never quote it.
func readKey(name string) (*key, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !st.Mode().IsRegular() || st.Mode().Perm()&0o077 != 0 {
		return nil, fmt.Errorf("key %s has mode %v: want a file for its owner alone; if nobody has copied it, chmod 600 it, else replace the key", name, st.Mode())
	}
	raw, err := io.ReadAll(io.LimitReader(f, 64<<10))
	if err != nil {
		return nil, fmt.Errorf("key %s: %w", name, err)
	}
	b, rest := pem.Decode(raw)
	if b == nil || b.Type != pemType || len(bytes.TrimSpace(rest)) != 0 {
		return nil, fmt.Errorf("key %s: want one PEM block %s", name, pemType)
	}
	priv, err := x509.ParsePKCS8PrivateKey(b.Bytes)
	if err != nil {
		return nil, fmt.Errorf("key %s: not a PKCS 8 private key", name)
	}
	ed, ok := priv.(ed25519.PrivateKey)
	if !ok {
		return nil, fmt.Errorf("key %s: %T, want ed25519", name, priv)
	}
	signer, err := signature.LoadSigner(ed, crypto.Hash(0))
	if err != nil {
		return nil, fmt.Errorf("key %s: %w", name, err)
	}
	public, err := metadata.KeyFromPublicKey(ed.Public())
	if err != nil {
		return nil, fmt.Errorf("key %s: %w", name, err)
	}
	id, err := public.ID()
	return &key{signer, public, id}, err
}

// next is where the successor of a role's key waits until a root names it.
const next = ".next"

// key returns the key of role that the root names. A rotation that was cut
// short after its root had been published is completed here.
func (r *repository) key(role string) (*key, error) {
	want := r.root.Signed.Roles[role].KeyIDs
	name := r.keyFile(role)
	k, err := readKey(name)
	if err == nil && slices.Contains(want, k.id) {
		return k, nil
	}
	succ, succErr := readKey(name + next)
	switch {
	case succErr == nil && slices.Contains(want, succ.id):
		if err := os.Rename(name+next, name); err != nil {
			return nil, err
		}
		return succ, durable.SyncDir(r.dir + "/keys")
	case err != nil:
		return nil, err
	}
	return nil, fmt.Errorf("key %s is not the one that root %d names for %s", name, r.root.Signed.Version, role)
}

// signers reads keys that lie elsewhere and tells by the root whose they are.
func (r *repository) signers(files []string) (map[string]*key, error) {
	list := map[string]*key{}
	for _, name := range files {
		k, err := readKey(name)
		if err != nil {
			return nil, err
		}
		role := slices.IndexFunc(online, func(role string) bool { return slices.Contains(r.root.Signed.Roles[role].KeyIDs, k.id) })
		if role < 0 {
			return nil, fmt.Errorf("key %s is none that root %d names for %s", name, r.root.Signed.Version, strings.Join(online, ", "))
		}
		list[online[role]] = k
	}
	return list, nil
}

// atHand reports whether this process can read a file.
func atHand(name string) bool {
	f, err := os.Open(name)
	if err != nil {
		return false
	}
	_ = f.Close() // nothing was written
	return true
}

// Exposed lists the files in DIR/keys that decide about a network and that this
// process can read: root and targets keys. To serve takes none of them.
func Exposed(dir string) ([]string, error) {
	var list []string
	for _, pattern := range []string{"root*.pem*", metadata.TARGETS + ".pem*"} {
		names, err := filepath.Glob(filepath.Join(dir, "keys", pattern))
		if err != nil {
			return nil, err
		}
		list = append(list, slices.DeleteFunc(names, func(name string) bool { return !atHand(name) })...)
	}
	return list, nil
}

// sign signs with the role's key and the one that extra has for it, and prints
// the result. One of them is enough.
func sign[T metadata.Roles](r *repository, role string, m *metadata.Metadata[T], extra map[string]*key) (file[T], error) {
	k, err := r.key(role)
	if err != nil && (extra[role] == nil || !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, fs.ErrPermission)) {
		return file[T]{}, err
	}
	if err := addSignatures(m, k, extra[role]); err != nil {
		return file[T]{}, err
	}
	raw, err := m.ToBytes(true)
	return file[T]{m, raw}, err
}

// addSignatures signs with each of keys once; nil is passed over.
func addSignatures[T metadata.Roles](m *metadata.Metadata[T], keys ...*key) error {
	for _, k := range keys {
		if k == nil || slices.ContainsFunc(m.Signatures, func(s metadata.Signature) bool { return s.KeyID == k.id }) {
			continue
		}
		if _, err := m.Sign(k.signer); err != nil {
			return err
		}
	}
	return nil
}

// makeKeys reads the keys in names; those that are missing are made.
func makeKeys(names []string) ([]*key, error) {
	keys := make([]*key, len(names))
	for i, name := range names {
		var err error
		if keys[i], err = makeKey(name); err != nil {
			return nil, err
		}
	}
	return keys, nil
}

// setRole lists keys for role. The same key twice would make a threshold that
// looks higher than it is.
func setRole(root *metadata.Metadata[metadata.RootType], role string, threshold int, keys ...*key) error {
	var ids []string
	for _, k := range keys {
		if slices.Contains(ids, k.id) {
			return fmt.Errorf("%s: the same key is given twice", role)
		}
		ids = append(ids, k.id)
		root.Signed.Keys[k.id] = k.public
	}
	if threshold < 1 || threshold > len(ids) {
		return fmt.Errorf("%s: threshold is %d, want 1 to the number of keys, %d", role, threshold, len(ids))
	}
	root.Signed.Roles[role] = &metadata.Role{KeyIDs: ids, Threshold: threshold}
	return nil
}
