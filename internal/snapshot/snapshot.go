// Package snapshot owns the network's configuration: its form, its bounds, and
// the type that only a verified configuration has.
//
// The rule it keeps: [Open] is the only maker of a [Snapshot], and it makes one
// only from TUF metadata whose whole chain has been verified, over the exact
// bytes that the metadata names. No I/O and no clock: the caller's trusted
// metadata carries the reference time it was checked at.
package snapshot

import (
	"errors"
	"fmt"
	"time"

	"github.com/theupdateframework/go-tuf/v2/metadata/trustedmetadata"

	"github.com/resultity/node/internal/digest"
)

// Target is the name of the configuration in the TUF repository.
const Target = "config.json"

// ErrUntrusted says that bytes are not what the network's keys have signed.
var ErrUntrusted = errors.New("configuration is not signed by the network")

// Snapshot is a verified configuration. It is immutable and safe to share.
type Snapshot struct {
	config  *Config
	digest  digest.Digest
	version int64
	expires time.Time
}

// Open checks raw against verified TUF metadata, then looks inside.
func Open(trusted *trustedmetadata.TrustedMetadata, raw []byte) (*Snapshot, error) {
	if trusted == nil || trusted.Root == nil || trusted.Timestamp == nil || trusted.Snapshot == nil || trusted.Targets["targets"] == nil {
		return nil, fmt.Errorf("%w: metadata is incomplete", ErrUntrusted)
	}
	targets := trusted.Targets["targets"].Signed
	info := targets.Targets[Target]
	if info == nil { // absent, or a signed null
		return nil, fmt.Errorf("%w: the targets metadata does not name %s", ErrUntrusted, Target)
	}
	if len(info.Hashes["sha256"]) == 0 {
		return nil, fmt.Errorf("%w: no sha256 of %s", ErrUntrusted, Target)
	}
	if err := info.VerifyLengthHashes(raw); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrUntrusted, err)
	}
	c, err := Parse(raw)
	if err != nil {
		return nil, err
	}
	// The timestamp's is the first, unless somebody has its key and lets it last.
	expires := trusted.Timestamp.Signed.Expires
	for _, e := range []time.Time{trusted.Snapshot.Signed.Expires, targets.Expires, trusted.Root.Signed.Expires} {
		if e.Before(expires) {
			expires = e
		}
	}
	return &Snapshot{config: c, digest: digest.Of(raw), version: targets.Version, expires: expires}, nil
}

// Config returns the content. The caller must not change it.
func (s *Snapshot) Config() *Config { return s.config }

// Digest returns the config digest: SHA-256 of config.json.
func (s *Snapshot) Digest() digest.Digest { return s.digest }

// Version returns the version of the targets metadata; it never falls.
func (s *Snapshot) Version() int64 { return s.version }

// Expires returns when the network must have confirmed the snapshot again: the
// first of what its metadata says.
func (s *Snapshot) Expires() time.Time { return s.expires }

// Model returns the model that the runtime serves.
func (s *Snapshot) Model() *Model { return s.config.model() }

// model returns the one that the runtime serves.
func (c *Config) model() *Model {
	for i := range c.Models {
		if c.Models[i].Name == c.Runtime.Model {
			return &c.Models[i]
		}
	}
	panic("snapshot: Parse let a runtime without its model pass")
}
