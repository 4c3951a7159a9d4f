package publish

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/theupdateframework/go-tuf/v2/metadata"

	"github.com/resultity/node/internal/chain"
)

// Rotation says what the next root changes. The zero value of the last three
// changes nothing but the expiry.
type Rotation struct {
	SignWith  []string // files of keys that the present root lists for root, at least its threshold
	RootKeys  []string // files of all root keys of the next root, made when missing; nil means the same keys
	Threshold int      // of the next root; 0 means the same, or more than half of new RootKeys
	Renew     []string // of targets, snapshot and timestamp: roles that get a new key
}

// RotateRoot publishes the next root, signed by the thresholds of the present
// and the next one.
//
// Where a role gets a new key, what it has signed is signed by both keys first:
// a node that refreshes meanwhile can verify it with either root, so there is
// no instant at which the repository is invalid. If the old key is lost, it is
// signed with the new one alone, and such a node is refused for that moment.
func RotateRoot(dir string, o Rotation) error {
	r, err := open(dir)
	if err != nil {
		return err
	}
	defer r.unlock()
	signers, err := readKeys(o.SignWith)
	if err != nil {
		return err
	}

	old := &r.root.Signed
	root := metadata.Root(expiry(r.RootSeconds))
	root.Signed.Version = old.Version + 1
	for role, entry := range old.Roles {
		root.Signed.Roles[role] = &metadata.Role{KeyIDs: slices.Clone(entry.KeyIDs), Threshold: entry.Threshold}
	}
	maps.Copy(root.Signed.Keys, old.Keys)
	switch {
	case o.RootKeys != nil:
		keys, err := makeKeys(o.RootKeys)
		if err != nil {
			return err
		}
		if o.Threshold == 0 {
			o.Threshold = len(keys)/2 + 1
		}
		if err := setRole(root, metadata.ROOT, o.Threshold, keys...); err != nil {
			return err
		}
		signers = append(signers, keys...)
	case o.Threshold != 0:
		root.Signed.Roles[metadata.ROOT].Threshold = o.Threshold
	}
	successors := map[string]*key{}
	lost := false
	for _, role := range o.Renew {
		if !slices.Contains(online, role) {
			return fmt.Errorf("no role %q: want any of %q", role, online)
		}
		// This also completes a rotation that was cut short, so that a
		// successor that is in use is not taken for a new one.
		if _, err := r.key(role); err != nil {
			lost = true
		}
		if successors[role], err = makeKey(r.keyFile(role) + next); err != nil {
			return err
		}
		if err := setRole(root, role, 1, successors[role]); err != nil {
			return err
		}
	}
	// Keys that no role lists any more.
	maps.DeleteFunc(root.Signed.Keys, func(id string, _ *metadata.Key) bool {
		for _, role := range root.Signed.Roles {
			if slices.Contains(role.KeyIDs, id) {
				return false
			}
		}
		return true
	})
	if err := addSignatures(root, signers...); err != nil {
		return err
	}
	raw, err := root.ToBytes(true)
	if err != nil {
		return err
	}
	if _, err := chain.Begin([][]byte{r.rootRaw, raw}, time.Now()); err != nil {
		return fmt.Errorf("nodes would refuse root %d: %w", root.Signed.Version, err)
	}

	if len(o.Renew) > 0 {
		if err := r.resign(successors, raw, lost); err != nil {
			return err
		}
	}
	if err := r.write(fmt.Sprintf("metadata/%d.root.json", root.Signed.Version), raw); err != nil {
		return err
	}
	r.root, r.rootRaw = root, raw
	for _, role := range o.Renew {
		if _, err := r.key(role); err != nil {
			return err
		}
	}
	return nil
}

// resign publishes what is published, signed by the successors too.
func (r *repository) resign(successors map[string]*key, root []byte, lost bool) error {
	seen, err := r.current()
	if errors.Is(err, ErrNothing) {
		return nil
	}
	if err != nil {
		return err
	}
	n, err := r.build(seen, change{
		config:   seen.config,
		targets:  successors[metadata.TARGETS] != nil,
		snapshot: successors[metadata.SNAPSHOT] != nil,
		extra:    successors,
	})
	if err != nil {
		return err
	}
	if err := n.check(root); err != nil {
		return err
	}
	if !lost {
		if err := n.check(r.rootRaw); err != nil {
			return err
		}
	}
	return r.show(n)
}

func readKeys(names []string) ([]*key, error) {
	keys := make([]*key, len(names))
	for i, name := range names {
		var err error
		if keys[i], err = readKey(name); err != nil {
			return nil, err
		}
	}
	return keys, nil
}
