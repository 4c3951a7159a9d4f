package publish

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/theupdateframework/go-tuf/v2/metadata"

	"github.com/resultity/node/internal/chain"
)

// Expiry is until when a role's newest metadata is valid.
type Expiry struct {
	Role    string
	Version int64
	Expires time.Time
	Due     bool // less than a quarter of its lifetime is left
}

// Remedy says what has to be done before it has expired.
func (e Expiry) Remedy() string {
	switch e.Role {
	case metadata.ROOT:
		return "its holders have to sign the next: resultity-network root new"
	case metadata.TARGETS:
		return "publish the configuration again, with the targets key: resultity-network publish --key"
	}
	return "the service renews it while it runs: see its log"
}

// Check verifies everything that is published as a node does that begins with the
// first root, and says until when each part is valid. It takes no key and changes
// nothing. Where something has expired, it says what, too. It fails with
// [ErrNothing], and the expiry of the root, before the first [Publish].
func Check(dir string) ([]Expiry, error) {
	r, err := look(dir)
	if err != nil {
		return nil, err
	}
	now := time.Now()
	var list []Expiry
	add := func(role string, version int64, expires time.Time, lifetime int64) {
		list = append(list, Expiry{role, version, expires, expires.Sub(now) < time.Duration(lifetime)*time.Second/4})
	}
	add(metadata.ROOT, r.root.Signed.Version, r.root.Signed.Expires, r.RootSeconds)
	roots, err := r.roots()
	if err != nil {
		return list, err
	}
	if _, err := chain.Begin(roots, now); err != nil {
		return list, err
	}
	n, err := r.current()
	if err != nil {
		return list, err
	}
	t, s, m := n.targets.meta.Signed, n.snapshot.meta.Signed, n.timestamp.meta.Signed
	add(metadata.TARGETS, t.Version, t.Expires, r.TargetsSeconds)
	add(metadata.SNAPSHOT, s.Version, s.Expires, r.SnapshotSeconds)
	add(metadata.TIMESTAMP, m.Version, m.Expires, r.TimestampSeconds)
	return list, n.check(r.rootRaw)
}

// Describe says in words what a root holds. It does not say whether it is to be
// trusted: its signatures may be missing.
func Describe(raw []byte) (string, error) {
	m, err := metadata.Root().FromBytes(raw)
	if err != nil {
		return "", err
	}
	if len(m.Signatures) == 0 {
		return "", errors.New("no signatures")
	}
	if _, err := chain.Begin([][]byte{raw}, time.Time{}); err != nil {
		return "", err
	}
	var b strings.Builder
	fmt.Fprintf(&b, "Root %d, signed by enough of its own keys. Expires %s.\n", m.Signed.Version, m.Signed.Expires.UTC().Format(time.DateOnly))
	for _, role := range metadata.TOP_LEVEL_ROLE_NAMES {
		r := m.Signed.Roles[role]
		fmt.Fprintf(&b, "  %-11s %d of %d\n", role, r.Threshold, len(r.KeyIDs))
		for _, id := range r.KeyIDs {
			signed := ""
			if role == metadata.ROOT && slices.ContainsFunc(m.Signatures, func(s metadata.Signature) bool { return s.KeyID == id }) {
				signed = ", has signed it"
			}
			fmt.Fprintf(&b, "              %s%s\n", label(&m.Signed, id), signed)
		}
	}
	return b.String(), nil
}
