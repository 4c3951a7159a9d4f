package publish

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/resultity/node/internal/tuf"
)

// Rotation is a whole ceremony on one machine. The zero value of the last three
// changes nothing but the expiry.
type Rotation struct {
	SignWith  []string // files of keys that the present root lists for root
	RootKeys  []string // files of all root keys of the next root, made when missing, which sign, too; nil means the same keys
	Threshold int      // of the next root; 0 means the same, or more than half of new RootKeys
	Renew     []string // roles that get a new key
}

func rotate(dir string, o Rotation) error {
	signers := slices.Clone(o.SignWith)
	c := Change{Threshold: o.Threshold, Renew: o.Renew}
	if o.RootKeys != nil {
		r, err := open(dir)
		if err != nil {
			return err
		}
		r.unlock()
		c.Remove = slices.Clone(r.root.Signed.Roles["root"].KeyIDs)
		for _, name := range o.RootKeys {
			k, err := MakeKey(name, nil)
			if err != nil {
				return err
			}
			if i := slices.Index(c.Remove, k.ID()); i >= 0 {
				c.Remove = slices.Delete(c.Remove, i, i+1)
			} else {
				c.Add = append(c.Add, k.Public(strings.TrimSuffix(filepath.Base(name), ".pem")))
			}
		}
		if c.Threshold == 0 {
			c.Threshold = len(o.RootKeys)/2 + 1
		}
		signers = append(signers, o.RootKeys...)
	}
	p, err := Propose(dir, c)
	if err != nil {
		return err
	}
	var sigs []*Signature
	for _, name := range signers {
		k, err := OpenKey(name, nil)
		if err != nil {
			return err
		}
		s, err := p.Sign(k)
		if err != nil {
			return err
		}
		sigs = append(sigs, s)
	}
	return Adopt(dir, p, sigs)
}

func TestRotateRoot(t *testing.T) {
	dir := published(t, Options{})
	c := node(t, dir)
	sees(t, c, config(t, 1))
	offline := node(t, dir) // sees none of the roots in between
	for n, o := range []Rotation{
		{SignWith: rootKeys(dir, 1, 2)},                                                                        // renewed
		{SignWith: rootKeys(dir, 2, 3), RootKeys: rootKeys(dir, 2, 3, 4)},                                      // one key replaced
		{SignWith: rootKeys(dir, 3, 4), RootKeys: rootKeys(dir, 5, 6, 7, 8, 9), Threshold: 4},                  // all replaced
		{SignWith: rootKeys(dir, 5, 6, 7, 8), Threshold: 1},                                                    // threshold lowered
		{SignWith: rootKeys(dir, 9), Renew: []string{"timestamp"}},                                             // an online key
		{SignWith: rootKeys(dir, 9), RootKeys: rootKeys(dir, 1, 2, 3), Renew: []string{"targets", "snapshot"}}, // and the rest
	} {
		if err := rotate(dir, o); err != nil {
			t.Fatalf("rotation %d: %v", n, err)
		}
		sees(t, c, config(t, n+1))
		if err := Publish(dir, config(t, n+2)); err != nil {
			t.Fatalf("after rotation %d: %v", n, err)
		}
		sees(t, c, config(t, n+2))
		sees(t, node(t, dir), config(t, n+2))
	}
	sees(t, offline, config(t, 7))
	for name := range tree(t, filepath.Join(dir, "keys")) {
		if strings.HasSuffix(name, successor) {
			t.Errorf("%s was left", name)
		}
	}
}

func TestRotateBeforeAnythingIsPublished(t *testing.T) {
	dir := initialised(t, Options{})
	c := node(t, dir)
	if err := rotate(dir, Rotation{SignWith: rootKeys(dir, 1, 2), Renew: online}); err != nil {
		t.Fatal(err)
	}
	if err := Publish(dir, config(t, 1)); err != nil {
		t.Fatal(err)
	}
	sees(t, c, config(t, 1))
}

func TestRotateRootRefuses(t *testing.T) {
	dir := published(t, Options{})
	other := initialised(t, Options{})
	for _, name := range rootKeys(dir, 4, 5, 6) {
		if _, err := MakeKey(name, nil); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chmod(rootKeys(dir, 6)[0], 0o644); err != nil {
		t.Fatal(err)
	}
	before := tree(t, dir)
	for name, o := range map[string]Rotation{
		"no signer":               {},
		"below the threshold":     {SignWith: rootKeys(dir, 1)},
		"the same signer twice":   {SignWith: rootKeys(dir, 1, 1)},
		"others' keys":            {SignWith: rootKeys(other, 1, 2)},
		"only the next keys":      {SignWith: rootKeys(dir, 4, 5), RootKeys: rootKeys(dir, 4, 5)},
		"unreachable threshold":   {SignWith: rootKeys(dir, 1, 2), Threshold: 4},
		"below the next":          {SignWith: rootKeys(dir, 1, 2), Threshold: 3},
		"a missing signer":        {SignWith: append(rootKeys(dir, 1), filepath.Join(dir, "absent.pem"))},
		"a signer open to all":    {SignWith: rootKeys(dir, 1, 2, 6)},
		"the same root key twice": {SignWith: rootKeys(dir, 1, 2), RootKeys: rootKeys(dir, 4, 4)},
		"root is not online":      {SignWith: rootKeys(dir, 1, 2), Renew: []string{"root"}},
		"no such role":            {SignWith: rootKeys(dir, 1, 2), Renew: []string{"mirrors"}},
	} {
		if err := rotate(dir, o); err == nil {
			t.Errorf("%s: taken", name)
		}
		unchanged(t, dir, before)
	}
	sees(t, node(t, dir), config(t, 1))
}

// The disk with the targets key is gone: a rotation brings a new one.
func TestRotateReplacesALostKey(t *testing.T) {
	dir := published(t, Options{})
	c := node(t, dir)
	sees(t, c, config(t, 1))
	if err := os.Remove(filepath.Join(dir, "keys/targets.pem")); err != nil {
		t.Fatal(err)
	}
	if err := Publish(dir, config(t, 2)); err == nil {
		t.Fatal("published without a key")
	}
	if err := rotate(dir, Rotation{SignWith: rootKeys(dir, 1, 2), Renew: []string{"targets"}}); err != nil {
		t.Fatal(err)
	}
	sees(t, c, config(t, 1))
	if err := Publish(dir, config(t, 2)); err != nil {
		t.Fatal(err)
	}
	sees(t, c, config(t, 2))
	sees(t, node(t, dir), config(t, 2))
}

// The disk was lost and the backup is from before the last publications.
func TestRotateAfterRestore(t *testing.T) {
	dir := published(t, Options{})
	backup := tree(t, dir)
	c := node(t, dir)
	for i := 2; i <= 4; i++ {
		if err := Publish(dir, config(t, i)); err != nil {
			t.Fatal(err)
		}
		sees(t, c, config(t, i))
	}
	for name := range tree(t, dir) {
		if err := os.Remove(filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	for name, content := range backup {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := c.Refresh(t.Context()); !errors.Is(err, tuf.ErrRollback) {
		t.Fatalf("after the restore: %v, want ErrRollback", err)
	}
	if err := rotate(dir, Rotation{SignWith: rootKeys(dir, 1, 2), Renew: online}); err != nil {
		t.Fatal(err)
	}
	s, err := c.Refresh(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("with new online keys: expected: the older configuration is taken; got: version %d", s.Version())
	sees(t, c, config(t, 1))
	if err := Publish(dir, config(t, 5)); err != nil {
		t.Fatal(err)
	}
	sees(t, c, config(t, 5))
}
