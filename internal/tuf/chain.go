package tuf

import (
	"errors"
	"fmt"
	"time"

	"github.com/theupdateframework/go-tuf/v2/metadata"
	"github.com/theupdateframework/go-tuf/v2/metadata/trustedmetadata"

	"github.com/resultity/node/internal/snapshot"
)

// chain verifies roots, the first of which is trusted, one by the one before.
func chain(roots [][]byte, ref time.Time) (trusted *trustedmetadata.TrustedMetadata, err error) {
	err = guard(func() error {
		trusted, err = trustedmetadata.New(roots[0])
		return err
	})
	if err == nil {
		err = usable(trusted)
	}
	if err != nil {
		return nil, untrusted("first root", err)
	}
	trusted.RefTime = ref
	for i, raw := range roots[1:] {
		if err := addRoot(trusted, raw); err != nil {
			return nil, untrusted(fmt.Sprintf("cached root %d", i+1), err)
		}
	}
	return trusted, nil
}

func addRoot(trusted *trustedmetadata.TrustedMetadata, raw []byte) error {
	return guard(func() error {
		if _, err := trusted.UpdateRoot(raw); err != nil {
			return err
		}
		return usable(trusted)
	})
}

// usable refuses a root of a repository that this client could not follow.
func usable(trusted *trustedmetadata.TrustedMetadata) error {
	if !trusted.Root.Signed.ConsistentSnapshot {
		return errors.New("consistent_snapshot is off: without it, files of different versions are mixed while a new one is published")
	}
	return nil
}

func addTimestamp(trusted *trustedmetadata.TrustedMetadata, raw []byte) error {
	return guard(func() error {
		_, err := trusted.UpdateTimestamp(raw)
		if trusted.Timestamp != nil && trusted.Timestamp.Signed.Meta["snapshot.json"] == nil {
			trusted.Timestamp = nil
			return errors.New("it does not name snapshot.json")
		}
		return err
	})
}

func addSnapshot(trusted *trustedmetadata.TrustedMetadata, raw []byte, seen bool) error {
	return guard(func() error {
		_, err := trusted.UpdateSnapshot(raw, seen)
		if trusted.Snapshot != nil && trusted.Snapshot.Signed.Meta["targets.json"] == nil {
			trusted.Snapshot = nil
			return errors.New("it does not name targets.json")
		}
		return err
	})
}

func addTargets(trusted *trustedmetadata.TrustedMetadata, raw []byte) error {
	return guard(func() error {
		_, err := trusted.UpdateTargets(raw)
		return err
	})
}

// guard turns a panic of go-tuf into a refusal. It dereferences entries of maps
// that a JSON null leaves nil, in some places before it looks at a signature
// ({"targets":{"x":null}}): nobody may stop an agent with that.
func guard(step func() error) (err error) {
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("malformed metadata: %v", r)
		}
	}()
	return step()
}

// untrusted names what was wrong with a file.
func untrusted(name string, err error) error {
	var kind error
	switch {
	case errors.Is(err, &metadata.ErrExpiredMetadata{}):
		kind = ErrExpired
	case errors.Is(err, &metadata.ErrBadVersionNumber{}):
		kind = ErrRollback
	case errors.Is(err, &metadata.ErrLengthOrHashMismatch{}):
		kind = ErrMixed
	default:
		return fmt.Errorf("%w: %s: %w", snapshot.ErrUntrusted, name, err)
	}
	return fmt.Errorf("%w: %s: %w: %w", snapshot.ErrUntrusted, name, kind, err)
}
