// Package chain owns the verification of the network's TUF metadata, from the
// root that is trusted to what names the configuration. Nodes and the publisher
// both use it, so that nothing is published that nodes would refuse.
//
// The rule it keeps: a file counts only when its form, its signatures and its
// place in the chain are right, in this order; what fails changes nothing, and the
// error says which of them it was (see [Refusal]). No I/O and no clock: the time
// of reference is the caller's.
//
// It drives go-tuf's trustedmetadata, which is the workflow of the TUF
// specification (section 5), and is stricter than it where our publisher never
// needs the freedom: bounds on sizes and nesting, no JSON name twice, nothing
// beside signed and signatures, key ids that are the hash of their key, no key
// twice in a role, consistent snapshots, no delegations, and length and SHA-256
// of each file in the one that names it.
package chain

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/theupdateframework/go-tuf/v2/metadata"
	"github.com/theupdateframework/go-tuf/v2/metadata/trustedmetadata"

	"github.com/resultity/node/internal/snapshot"
)

// Why metadata is refused. Each comes together with [snapshot.ErrUntrusted].
var (
	ErrUnsigned  = errors.New("not enough valid signatures")
	ErrExpired   = errors.New("metadata has expired: the network has not renewed it, somebody holds newer metadata back, or the clock of this machine is ahead")
	ErrRollback  = errors.New("metadata is older than what was seen before")
	ErrMixed     = errors.New("files of different versions are mixed")
	ErrRoot      = errors.New("the root does not follow the one that is trusted")
	ErrMalformed = errors.New("metadata does not have the form that it must have")
	ErrTooLarge  = errors.New("more data than there may be")
)

// Bounds of files, in bytes. The metadata of a network with one target and a
// handful of keys is a tenth of them.
const (
	MaxRoot      = 64 << 10
	MaxTimestamp = 16 << 10
	MaxSnapshot  = 64 << 10
	MaxTargets   = 64 << 10
)

// Names by which one file names another.
const (
	snapshotFile = "snapshot.json"
	targetsFile  = "targets.json"
)

// Begin verifies roots, the first of which is trusted, each by the one before,
// and returns a chain that ends with the last. ref is the time at which
// everything has to be valid. Its error is a [Refusal].
func Begin(roots [][]byte, ref time.Time) (trusted *trustedmetadata.TrustedMetadata, err error) {
	err = guard(func() error {
		if err := form(roots[0], MaxRoot); err != nil {
			return err
		}
		if trusted, err = trustedmetadata.New(roots[0]); err != nil {
			return err
		}
		return usable(&trusted.Root.Signed)
	})
	if err != nil {
		return nil, Refusal("first root", err)
	}
	trusted.RefTime = ref
	for i, raw := range roots[1:] {
		if err := Root(trusted, raw); err != nil {
			return nil, Refusal(fmt.Sprintf("root %d after the first", i+1), err)
		}
	}
	return trusted, nil
}

// Root makes raw the trusted root.
func Root(trusted *trustedmetadata.TrustedMetadata, raw []byte) error {
	before := trusted.Root
	err := guard(func() error {
		if err := form(raw, MaxRoot); err != nil {
			return err
		}
		_, err := trusted.UpdateRoot(raw)
		if errors.Is(err, &metadata.ErrBadVersionNumber{}) {
			return fmt.Errorf("%w: %s", ErrRoot, err)
		}
		if err != nil {
			return err
		}
		return usable(&trusted.Root.Signed)
	})
	if err != nil {
		trusted.Root = before
	}
	return err
}

// Verify is the whole chain, from roots as for [Begin] to what names the
// configuration. Its error is a [Refusal].
func Verify(roots [][]byte, ref time.Time, timestamp, snap, targets []byte) (*trustedmetadata.TrustedMetadata, error) {
	trusted, err := Begin(roots, ref)
	if err != nil {
		return nil, err
	}
	if err := Timestamp(trusted, timestamp); err != nil {
		return nil, Refusal("timestamp.json", err)
	}
	if err := Snapshot(trusted, snap, false); err != nil {
		return nil, Refusal(snapshotFile, err)
	}
	if err := Targets(trusted, targets); err != nil {
		return nil, Refusal(targetsFile, err)
	}
	return trusted, nil
}

// usable refuses a root of a repository that could not be followed, or whose
// thresholds are not what they look like.
func usable(root *metadata.RootType) error {
	if err := header(root.SpecVersion, root.Version); err != nil {
		return err
	}
	if !root.ConsistentSnapshot {
		return fmt.Errorf("%w: consistent_snapshot is off: without it, files of different versions are mixed while a new one is published", ErrRoot)
	}
	for id, k := range root.Keys {
		if want, err := k.ID(); err != nil || id != want {
			return fmt.Errorf("%w: key %.80q is not named by its hash", ErrMalformed, id)
		}
	}
	for _, role := range metadata.TOP_LEVEL_ROLE_NAMES {
		r := root.Roles[role]
		if r == nil {
			return fmt.Errorf("%w: no role %s", ErrMalformed, role)
		}
		// One key may be written in several ways, and have as many ids.
		var keys []string
		for _, id := range r.KeyIDs {
			k := root.Keys[id]
			if k == nil {
				return fmt.Errorf("%w: no key %.80q of role %s", ErrMalformed, id, role)
			}
			public := strings.ToLower(strings.TrimSpace(k.Value.PublicKey))
			if slices.Contains(keys, public) {
				return fmt.Errorf("%w: role %s has the same key twice", ErrMalformed, role)
			}
			keys = append(keys, public)
		}
		if r.Threshold < 1 || r.Threshold > len(keys) {
			return fmt.Errorf("%w: role %s has a threshold of %d and %d keys", ErrMalformed, role, r.Threshold, len(keys))
		}
	}
	return nil
}

// Unsigned reads a root whose signatures do not count yet, if nodes could follow
// it once it has them.
func Unsigned(raw []byte) (root *metadata.RootType, err error) {
	err = guard(func() error {
		if err := form(raw, MaxRoot); err != nil {
			return err
		}
		m, err := metadata.Root().FromBytes(raw)
		if err != nil {
			return err
		}
		root = &m.Signed
		return usable(root)
	})
	if err != nil {
		return nil, Refusal("root", err)
	}
	return root, nil
}

// Timestamp takes raw for the chain's timestamp. One that is no newer than the
// chain's fails with [metadata.ErrEqualVersionNumber]. One that has expired fails,
// and is there for comparison with what follows.
func Timestamp(trusted *trustedmetadata.TrustedMetadata, raw []byte) error {
	before := trusted.Timestamp
	return guard(func() error {
		if err := form(raw, MaxTimestamp); err != nil {
			return err
		}
		_, err := trusted.UpdateTimestamp(raw)
		if t := trusted.Timestamp; t != before {
			if bad := errors.Join(header(t.Signed.SpecVersion, t.Signed.Version), named(t.Signed.Meta, snapshotFile, MaxSnapshot)); bad != nil {
				trusted.Timestamp = before
				return bad
			}
		}
		return err
	})
}

// Snapshot takes raw for the chain's snapshot metadata. What was seen before may
// be another than the timestamp names, and have expired: it fails then, and is
// there for comparison with what follows.
func Snapshot(trusted *trustedmetadata.TrustedMetadata, raw []byte, seen bool) error {
	before := trusted.Snapshot
	return guard(func() error {
		if err := form(raw, MaxSnapshot); err != nil {
			return err
		}
		_, err := trusted.UpdateSnapshot(raw, seen)
		if s := trusted.Snapshot; s != before {
			if bad := errors.Join(header(s.Signed.SpecVersion, s.Signed.Version), named(s.Signed.Meta, targetsFile, MaxTargets)); bad != nil {
				trusted.Snapshot = before
				return bad
			}
			// It is not older than what was seen: it is from somewhere else.
			if errors.Is(err, &metadata.ErrBadVersionNumber{}) {
				err = fmt.Errorf("%w: %s", ErrMixed, err)
			}
		}
		return err
	})
}

// Targets takes raw for the chain's targets metadata.
func Targets(trusted *trustedmetadata.TrustedMetadata, raw []byte) error {
	return guard(func() error {
		if err := form(raw, MaxTargets); err != nil {
			return err
		}
		t, err := trusted.UpdateTargets(raw)
		if errors.Is(err, &metadata.ErrBadVersionNumber{}) {
			return fmt.Errorf("%w: %s", ErrMixed, err)
		}
		if err != nil {
			return err
		}
		err = header(t.Signed.SpecVersion, t.Signed.Version)
		if t.Signed.Delegations != nil {
			err = fmt.Errorf("%w: the targets role delegates", ErrMalformed)
		}
		if err != nil {
			delete(trusted.Targets, metadata.TARGETS)
		}
		return err
	})
}

// header checks what all roles have.
func header(spec string, version int64) error {
	if !strings.HasPrefix(spec, "1.") {
		return fmt.Errorf("%w: spec_version %.20q, want 1.x", ErrMalformed, spec)
	}
	if version < 1 {
		return fmt.Errorf("%w: version %d", ErrMalformed, version)
	}
	return nil
}

// named checks that meta describes a file of at most so many bytes completely:
// not a single one is looked at before the hash is right.
func named(meta map[string]*metadata.MetaFiles, name string, most int64) error {
	m := meta[name]
	switch {
	case m == nil:
		return fmt.Errorf("%w: it does not name %s", ErrMalformed, name)
	case m.Version < 1:
		return fmt.Errorf("%w: %s has version %d", ErrMalformed, name, m.Version)
	case m.Length > most:
		return fmt.Errorf("%w: %s is said to have %d bytes, at most %d", ErrTooLarge, name, m.Length, most)
	case m.Length < 1 || len(m.Hashes["sha256"]) != sha256.Size:
		return fmt.Errorf("%w: %s has no length or no sha256", ErrMalformed, name)
	}
	return nil
}

// guard turns a panic of go-tuf into a refusal. It dereferences entries of maps
// that a JSON null leaves nil, in some places before it looks at a signature:
// nobody may stop an agent with that.
func guard(step func() error) (err error) {
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("%w: %v", ErrMalformed, r)
		}
	}()
	return step()
}

// kinds are the errors of go-tuf that say why, and ours.
var kinds = []struct{ tuf, ours error }{
	{&metadata.ErrUnsignedMetadata{}, ErrUnsigned},
	{&metadata.ErrExpiredMetadata{}, ErrExpired},
	{&metadata.ErrBadVersionNumber{}, ErrRollback},
	{&metadata.ErrLengthOrHashMismatch{}, ErrMixed},
}

// Refusal says that the file of this name is refused because of err: it is
// [snapshot.ErrUntrusted] and exactly one of this package's errors.
func Refusal(name string, err error) error {
	for _, kind := range []error{ErrUnsigned, ErrExpired, ErrRollback, ErrMixed, ErrRoot, ErrMalformed, ErrTooLarge} {
		if errors.Is(err, kind) {
			return fmt.Errorf("%w: %s: %w", snapshot.ErrUntrusted, name, err)
		}
	}
	ours := ErrMalformed // what cannot be read
	for _, k := range kinds {
		if errors.Is(err, k.tuf) {
			ours = k.ours
			break
		}
	}
	return fmt.Errorf("%w: %s: %w: %w", snapshot.ErrUntrusted, name, ours, err)
}
