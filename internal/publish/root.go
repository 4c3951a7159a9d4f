package publish

import (
	"bytes"
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/secure-systems-lab/go-securesystemslib/cjson"
	"github.com/theupdateframework/go-tuf/v2/metadata"

	"github.com/resultity/node/internal/chain"
	"github.com/resultity/node/internal/digest"
)

// Proposal is a root to come, as it travels to its holders: with all roots before
// it, so that each of them can judge it from the one that they trust, without
// believing anybody on the way.
type Proposal struct {
	Roots [][]byte `json:"roots"` // from the first to the present one; none before the first
	Next  []byte   `json:"next"`  // without signatures
}

// Signature is a holder's signature of a proposal.
type Signature struct {
	Next  digest.Digest     `json:"next"` // of Proposal.Next
	KeyID string            `json:"keyid"`
	Sig   metadata.HexBytes `json:"sig"`
}

// Bounds of the files of a ceremony, in bytes.
const (
	MaxProposal  = 32 << 20 // roots of a long life, in base64
	MaxSignature = 4 << 10
)

// ParseProposal reads a proposal. Nothing in it is to be believed before
// [Proposal.Review].
func ParseProposal(raw []byte) (*Proposal, error) { return parse[Proposal](raw, MaxProposal) }

// ParseSignature reads a signature, which counts only for [Adopt].
func ParseSignature(raw []byte) (*Signature, error) { return parse[Signature](raw, MaxSignature) }

func parse[T any](raw []byte, most int) (*T, error) {
	if len(raw) > most {
		return nil, fmt.Errorf("%d bytes, at most %d", len(raw), most)
	}
	v := new(T)
	dec := json.NewDecoder(bytes.NewReader(raw))
	dec.DisallowUnknownFields()
	if err := dec.Decode(v); err != nil {
		return nil, err
	}
	if dec.More() {
		return nil, errors.New("something follows")
	}
	return v, nil
}

// Digest is what holders compare with each other.
func (p *Proposal) Digest() digest.Digest { return digest.Of(p.Next) }

// Change says what the next root has that the present one has not. The zero value
// is a renewal: nothing but a later expiry.
type Change struct {
	Add       []Public      // root keys
	Remove    []string      // root keys, by id, the beginning of one, or the holder's name
	Threshold int           // of root; 0 means the same
	Renew     []string      // of targets, snapshot and timestamp: roles whose new key is made in DIR/keys
	Targets   Public        // a targets key that lies elsewhere, instead of the present one
	Lifetime  time.Duration // 0 means that of publish.json
}

// Propose writes down the next root. No key is needed, and nothing is published.
// It fails where nodes could not follow the root, whoever signed it.
func Propose(dir string, c Change) (*Proposal, error) {
	r, err := open(dir)
	if err != nil {
		return nil, err
	}
	defer r.unlock()
	p := new(Proposal)
	if p.Roots, err = r.roots(); err != nil {
		return nil, err
	}
	lifetime := r.RootSeconds
	if c.Lifetime != 0 {
		lifetime = int64(c.Lifetime / time.Second)
	}
	if lifetime < 1 || lifetime > maxLifetime {
		return nil, fmt.Errorf("lifetime is %d seconds, want 1 to %d", lifetime, maxLifetime)
	}
	for _, role := range c.Renew {
		if !slices.Contains(online, role) {
			return nil, fmt.Errorf("no role %q: want any of %q", role, online)
		}
	}
	old := &r.root.Signed
	root := metadata.Root(expiry(lifetime))
	next := &root.Signed
	next.Version = old.Version + 1
	names := holders(old)
	set := func(role string, threshold int, remove []string, add ...Public) error {
		var keys []Public
		for _, id := range old.Roles[role].KeyIDs {
			if !slices.Contains(remove, id) {
				keys = append(keys, Public{names[id], old.Keys[id], id})
			}
		}
		return setRole(next, role, threshold, append(keys, add...)...)
	}
	remove, err := find(old, c.Remove)
	if err != nil {
		return nil, err
	}
	if c.Threshold == 0 {
		c.Threshold = old.Roles[metadata.ROOT].Threshold
	}
	if err := set(metadata.ROOT, c.Threshold, remove, c.Add...); err != nil {
		return nil, err
	}
	for _, role := range online {
		var add []Public
		if role == metadata.TARGETS && c.Targets.key != nil {
			add = []Public{c.Targets}
		}
		if slices.Contains(c.Renew, role) {
			if add != nil {
				return nil, errors.New("targets: a new key is given, and one is to be made")
			}
			// This completes a rotation that was cut short, so that a successor that
			// is in use is not taken for a new one. That the key is lost is no fault.
			_, _ = r.key(role)
			k, err := MakeKey(r.keyFile(role)+successor, nil)
			if err != nil {
				return nil, err
			}
			add = []Public{k.Public("")}
		}
		var remove []string
		if add != nil {
			remove = old.Roles[role].KeyIDs
		}
		if err := set(role, 1, remove, add...); err != nil {
			return nil, err
		}
	}
	p.Next, err = unsigned(root)
	return p, err
}

// roots reads all roots so far.
func (r *repository) roots() ([][]byte, error) {
	var list [][]byte
	for n := int64(1); n <= r.root.Signed.Version; n++ {
		raw, err := r.read(fmt.Sprintf("metadata/%d.root.json", n))
		if err != nil {
			return nil, err
		}
		list = append(list, raw)
	}
	return list, nil
}

// find returns the ids of the root keys that are meant.
func find(root *metadata.RootType, meant []string) ([]string, error) {
	var ids []string
	for _, m := range meant {
		var found []string
		for _, id := range root.Roles[metadata.ROOT].KeyIDs {
			if holders(root)[id] == m || len(m) >= 8 && strings.HasPrefix(id, m) {
				found = append(found, id)
			}
		}
		if len(found) != 1 {
			return nil, fmt.Errorf("%q means %d of the root keys, want one: give the holder's name or at least 8 digits of the key's id", m, len(found))
		}
		ids = append(ids, found[0])
	}
	return ids, nil
}

// unsigned prints a root without signatures, in a form that nodes could follow.
func unsigned(root *metadata.Metadata[metadata.RootType]) ([]byte, error) {
	raw, err := root.ToBytes(true)
	if err != nil {
		return nil, err
	}
	_, err = chain.Unsigned(raw)
	return raw, err
}

// verified returns the root from which the proposal is judged, the present one, and
// the next. trusted must be one of the proposal's roots, and lead to the last one.
func (p *Proposal) verified(trusted []byte) (from, present, next *metadata.RootType, err error) {
	if next, err = chain.Unsigned(p.Next); err != nil {
		return nil, nil, nil, fmt.Errorf("nodes would refuse the next root: %w", err)
	}
	if len(p.Roots) == 0 && trusted == nil {
		if next.Version != 1 {
			return nil, nil, nil, fmt.Errorf("the first root has version %d", next.Version)
		}
		return nil, nil, next, nil
	}
	i := slices.IndexFunc(p.Roots, func(r []byte) bool { return bytes.Equal(r, trusted) })
	if i < 0 {
		return nil, nil, nil, errors.New("the root that you trust is none of the roots before this one: the proposal is for another network, or somebody wants to deceive you")
	}
	first, err := chain.Begin(p.Roots[i:i+1], time.Time{})
	if err != nil {
		return nil, nil, nil, err
	}
	last, err := chain.Begin(p.Roots[i:], time.Time{})
	if err != nil {
		return nil, nil, nil, fmt.Errorf("the roots in the proposal do not follow from the one that you trust: %w", err)
	}
	from, present = &first.Root.Signed, &last.Root.Signed
	if next.Version != present.Version+1 {
		return nil, nil, nil, fmt.Errorf("root %d cannot follow root %d", next.Version, present.Version)
	}
	return from, present, next, nil
}

// Sign signs the proposal. The key has to be a root key of the present or of the
// next root. Let the holder read [Proposal.Review] before.
func (p *Proposal) Sign(k *Key) (*Signature, error) {
	next, err := chain.Unsigned(p.Next)
	if err != nil {
		return nil, fmt.Errorf("nodes would refuse the next root: %w", err)
	}
	roots := []*metadata.RootType{next}
	if n := len(p.Roots); n > 0 {
		last, err := chain.Begin(p.Roots[n-1:], time.Time{})
		if err != nil {
			return nil, err
		}
		roots = append(roots, &last.Root.Signed)
	}
	if !slices.ContainsFunc(roots, func(r *metadata.RootType) bool { return slices.Contains(r.Roles[metadata.ROOT].KeyIDs, k.id) }) {
		return nil, fmt.Errorf("key %s is no root key, neither of the present nor of the next root", k.id)
	}
	m := &metadata.Metadata[metadata.RootType]{Signed: *next}
	s, err := m.Sign(k.signer)
	if err != nil {
		return nil, err
	}
	return &Signature{p.Digest(), s.KeyID, s.Signature}, nil
}

// Missing says that a proposal does not have the signatures that it needs.
type Missing struct {
	Root int64    // by whose threshold
	Have int      // valid signatures
	Want int      // threshold
	Of   []string // labels of the keys that have not signed
}

func (m *Missing) Error() string {
	return fmt.Sprintf("%d of the %d signatures that root %d asks for are there; %d more of: %s", m.Have, m.Want, m.Root, m.Want-m.Have, strings.Join(m.Of, ", "))
}

// Signed puts the signatures to the proposal and returns the root as it is
// published. It fails with [Missing] while there are not enough.
func (p *Proposal) Signed(sigs []*Signature) ([]byte, error) {
	var trusted []byte
	if len(p.Roots) > 0 {
		trusted = p.Roots[0]
	}
	_, present, next, err := p.verified(trusted)
	if err != nil {
		return nil, err
	}
	m := &metadata.Metadata[metadata.RootType]{Signed: *next}
	payload, err := cjson.EncodeCanonical(m.Signed)
	if err != nil {
		return nil, err
	}
	by := []*metadata.RootType{next}
	if present != nil {
		by = []*metadata.RootType{present, next}
	}
	for _, s := range sigs {
		if s.Next != p.Digest() {
			return nil, fmt.Errorf("the signature of key %.64q is for another proposal", s.KeyID)
		}
		var key *metadata.Key
		for _, r := range by {
			if slices.Contains(r.Roles[metadata.ROOT].KeyIDs, s.KeyID) {
				key = r.Keys[s.KeyID]
			}
		}
		if key == nil {
			return nil, fmt.Errorf("key %.64q is no root key", s.KeyID)
		}
		public, err := key.ToPublicKey()
		if err != nil {
			return nil, err
		}
		if ed, ok := public.(ed25519.PublicKey); !ok || len(ed) != ed25519.PublicKeySize || !ed25519.Verify(ed, payload, s.Sig) {
			return nil, fmt.Errorf("the signature of key %.64q is wrong", s.KeyID)
		}
		if !slices.ContainsFunc(m.Signatures, func(have metadata.Signature) bool { return have.KeyID == s.KeyID }) {
			m.Signatures = append(m.Signatures, metadata.Signature{KeyID: s.KeyID, Signature: s.Sig})
		}
	}
	for _, r := range by {
		missing := &Missing{Root: r.Version, Want: r.Roles[metadata.ROOT].Threshold}
		for _, id := range r.Roles[metadata.ROOT].KeyIDs {
			if slices.ContainsFunc(m.Signatures, func(s metadata.Signature) bool { return s.KeyID == id }) {
				missing.Have++
			} else {
				missing.Of = append(missing.Of, label(r, id))
			}
		}
		if missing.Have < missing.Want {
			return nil, missing
		}
	}
	raw, err := m.ToBytes(true)
	if err != nil {
		return nil, err
	}
	if _, err := chain.Begin(append(slices.Clip(p.Roots), raw), time.Time{}); err != nil {
		return nil, fmt.Errorf("nodes would refuse root %d: %w", next.Version, err)
	}
	return raw, nil
}

// Adopt publishes a root with the signatures of its holders. To renew it takes no
// key at all. Where an online role gets a new key, what the role has signed is
// signed by both keys first, so that a node that refreshes meanwhile can verify it
// with either root: there is no instant at which the repository is invalid. Keys
// that do not lie in DIR/keys are given; the new one is needed, and without the
// old one such a node is refused for that moment.
func Adopt(dir string, p *Proposal, sigs []*Signature, keys ...*Key) error {
	r, err := prepared(dir)
	if err != nil {
		return err
	}
	defer r.unlock()
	if (r.root == nil) != (len(p.Roots) == 0) || r.root != nil && !bytes.Equal(p.Roots[len(p.Roots)-1], r.rootRaw) {
		return errors.New("another root was published since this one was written down: begin again")
	}
	raw, err := p.Signed(sigs)
	if err != nil {
		return err
	}
	root, err := metadata.Root().FromBytes(raw)
	if err != nil {
		return err
	}
	if !time.Now().Before(root.Signed.Expires) {
		return fmt.Errorf("root %d has expired while it was signed: begin again", root.Signed.Version)
	}
	if r.root != nil {
		if err := r.resign(root, raw, keys); err != nil {
			return err
		}
	}
	if err := r.write(fmt.Sprintf("metadata/%d.root.json", root.Signed.Version), raw); err != nil {
		return err
	}
	r.root, r.rootRaw = root, raw
	for _, role := range online {
		if _, err := r.key(role); err != nil && !elsewhere(err) {
			return err
		}
	}
	return nil
}

// resign publishes what is published, signed by the new keys of root too.
func (r *repository) resign(root *metadata.Metadata[metadata.RootType], raw []byte, keys []*Key) error {
	old, c, lost := &r.root.Signed, change{}, time.Now().After(r.root.Signed.Expires)
	extra, err := rolesOf(keys, old, &root.Signed)
	if err != nil {
		return err
	}
	changed := false
	for _, role := range online {
		want := root.Signed.Roles[role].KeyIDs
		if slices.Equal(want, old.Roles[role].KeyIDs) {
			continue
		}
		changed = true
		switch role {
		case metadata.TARGETS:
			c.targets = true
		case metadata.SNAPSHOT:
			c.snapshot = true
		}
		isNew := func(k *Key) bool { return slices.Contains(want, k.id) }
		if k, err := OpenKey(r.keyFile(role)+successor, nil); err == nil && isNew(k) {
			extra[role] = append(extra[role], k)
		}
		if !slices.ContainsFunc(extra[role], isNew) {
			return fmt.Errorf("%s: its new key is needed, to sign what is published", role)
		}
		if _, err := r.key(role); err != nil && !slices.ContainsFunc(extra[role], func(k *Key) bool { return !isNew(k) }) {
			lost = true
		}
	}
	if !changed {
		return nil
	}
	seen, err := r.current()
	if errors.Is(err, ErrNothing) {
		return nil
	}
	if err != nil {
		return err
	}
	c.config, c.extra = seen.config, extra
	n, err := r.build(seen, c)
	if err != nil {
		return err
	}
	if err := n.check(raw); err != nil {
		return err
	}
	if !lost {
		if err := n.check(r.rootRaw); err != nil {
			return err
		}
	}
	return r.show(n)
}

// setRole lists keys for role. The same key twice would make a threshold that
// looks higher than it is.
func setRole(root *metadata.RootType, role string, threshold int, keys ...Public) error {
	var ids []string
	for _, k := range keys {
		if slices.Contains(ids, k.id) {
			return fmt.Errorf("%s: the same key is given twice", role)
		}
		ids = append(ids, k.id)
		root.Keys[k.id] = k.key
		if k.Name != "" {
			if root.UnrecognizedFields == nil {
				root.UnrecognizedFields = map[string]any{}
			}
			names := map[string]any{k.id: k.Name}
			for id, name := range holders(root) {
				names[id] = name
			}
			root.UnrecognizedFields[holdersField] = names
		}
	}
	if threshold < 1 || threshold > len(ids) {
		return fmt.Errorf("%s: threshold is %d, want 1 to the number of keys, %d", role, threshold, len(ids))
	}
	root.Roles[role] = &metadata.Role{KeyIDs: ids, Threshold: threshold}
	return nil
}

// holdersField has the names of keys by their id. TUF clients ignore it.
const holdersField = "x-resultity-holders"

// holders returns the names of keys. What is no name is left out: it is printed on
// the screens of people who decide by it.
func holders(root *metadata.RootType) map[string]string {
	names := map[string]string{}
	fields, _ := root.UnrecognizedFields[holdersField].(map[string]any) // nil has none
	for id, v := range fields {
		if name, ok := v.(string); ok && holderName.MatchString(name) {
			names[id] = name
		}
	}
	return names
}

// label is how people are told of a key.
func label(root *metadata.RootType, id string) string {
	if name := holders(root)[id]; name != "" {
		return id[:16] + " " + name
	}
	return id[:16]
}

// Review says in words what the next root changes, seen from the root that its
// reader trusts, and whether there is something to be wary of. trusted is nil for a
// network's first root. It fails if the proposal does not follow from trusted.
func (p *Proposal) Review(trusted []byte, now time.Time) (string, error) {
	from, present, next, err := p.verified(trusted)
	if err != nil {
		return "", err
	}
	var b strings.Builder
	var wary []string
	if from == nil {
		fmt.Fprintf(&b, "Root 1, the first of a new network.\n")
		from = &metadata.RootType{Keys: map[string]*metadata.Key{}, Roles: map[string]*metadata.Role{}}
	} else {
		fmt.Fprintf(&b, "Root %d, to follow root %d. What follows is seen from root %d, which you trust.\n", next.Version, present.Version, from.Version)
	}
	fmt.Fprintf(&b, "  expires     %s, in %d days", next.Expires.UTC().Format(time.DateOnly), int(next.Expires.Sub(now)/(24*time.Hour)))
	if from.Version > 0 {
		fmt.Fprintf(&b, " (root %d: %s)", from.Version, from.Expires.UTC().Format(time.DateOnly))
		if next.Expires.Before(from.Expires) {
			wary = append(wary, "it expires earlier than the one that you trust")
		}
	}
	b.WriteString("\n")
	if !next.Expires.After(now) {
		wary = append(wary, "it has expired already (or this machine's clock is ahead)")
	}
	for _, role := range metadata.TOP_LEVEL_ROLE_NAMES {
		was, is := from.Roles[role], next.Roles[role]
		if was == nil {
			was = &metadata.Role{}
		}
		fmt.Fprintf(&b, "  %-11s %d of %d", role, is.Threshold, len(is.KeyIDs))
		switch {
		case from.Version > 0 && was.Threshold != is.Threshold || len(was.KeyIDs) != 0 && len(was.KeyIDs) != len(is.KeyIDs):
			fmt.Fprintf(&b, " (before: %d of %d)", was.Threshold, len(was.KeyIDs))
		}
		b.WriteString("\n")
		if is.Threshold < was.Threshold {
			wary = append(wary, fmt.Sprintf("fewer signatures suffice for %s: %d instead of %d", role, is.Threshold, was.Threshold))
		}
		kept := 0
		for _, id := range was.KeyIDs {
			if !slices.Contains(is.KeyIDs, id) {
				fmt.Fprintf(&b, "            - %s\n", label(from, id))
			}
		}
		for _, id := range is.KeyIDs {
			mark := " "
			if !slices.Contains(was.KeyIDs, id) {
				mark = "+"
			} else {
				kept++
			}
			fmt.Fprintf(&b, "            %s %s\n", mark, label(next, id))
			if was, is := holders(from)[id], holders(next)[id]; mark == " " && was != is {
				wary = append(wary, fmt.Sprintf("key %s was called %q and is called %q", id[:16], was, is))
			}
		}
		if role == metadata.ROOT && from.Version > 0 && len(is.KeyIDs)-kept >= is.Threshold {
			wary = append(wary, "the new root keys alone are enough to sign the root after it")
		}
	}
	for _, field := range slices.Sorted(maps.Keys(next.UnrecognizedFields)) {
		if field != holdersField {
			wary = append(wary, fmt.Sprintf("it has a field %.40q, which this program does not know", field))
		}
	}
	for _, w := range wary {
		fmt.Fprintf(&b, "  ! %s\n", w)
	}
	fmt.Fprintf(&b, "  digest      %s\n              Compare it with the other holders.\n", p.Digest())
	return b.String(), nil
}
