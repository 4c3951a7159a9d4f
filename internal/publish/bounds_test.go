package publish

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/resultity/node/internal/durable"
)

// Files of the operator's, and of other holders', are as long as they may be, and
// not one byte longer.
func TestFilesAreBounded(t *testing.T) {
	dir := published(t, Options{})
	own := filepath.Join(t.TempDir(), "anna.pub")
	key := rootKeys(dir, 1)[0]
	k, err := OpenKey(key, nil)
	if err != nil {
		t.Fatal(err)
	}
	public, err := k.Public("anna").PEM()
	if err != nil {
		t.Fatal(err)
	}
	publish := func() error { return Publish(dir, config(t, 1)) }
	root := filepath.Join(dir, "repository/metadata/1.root.json")
	for _, c := range []struct {
		name  string
		file  string
		raw   []byte // nil for what is in it
		bound int
		read  func() error
	}{
		{"a key", key, nil, maxKeyFile, func() error { _, err := OpenKey(key, nil); return err }},
		{"a public key", own, public, maxKeyFile, func() error { _, err := ReadPublic(own); return err }},
		{"publish.json", filepath.Join(dir, "publish.json"), nil, maxFile, publish},
		{"a file of the repository", root, nil, maxFile, func() error {
			_, err := (&repository{dir: dir}).read("metadata/1.root.json")
			return err
		}},
	} {
		raw := c.raw
		if raw == nil {
			if raw, err = os.ReadFile(c.file); err != nil {
				t.Fatal(err)
			}
		}
		for over, want := range []error{nil, durable.ErrLarge, nil} {
			padded := bytes.Clone(raw)
			if over < 2 { // and then as it was
				padded = append(padded, bytes.Repeat([]byte("\n"), c.bound+over-len(raw))...)
			}
			if err := os.WriteFile(c.file, padded, 0o600); err != nil {
				t.Fatal(err)
			}
			err := c.read()
			if want != nil {
				t.Logf("%s of %d bytes: expected: %v; got: %v", c.name, c.bound+over, want, err)
			}
			if !errors.Is(err, want) || want != nil && !strings.Contains(err.Error(), filepath.Base(c.file)) {
				t.Errorf("%s of %d bytes: %v, want %v and the file's name", c.name, len(padded), err, want)
			}
		}
	}
}

// So are the parts of a ceremony, and the time for which something is signed.
func TestCeremoniesAreBounded(t *testing.T) {
	proposal := func(n int) error {
		const p = `{"roots":[],"next":""}`
		_, err := ParseProposal([]byte(p + strings.Repeat(" ", n-len(p))))
		return err
	}
	signature := func(n int) error {
		const s = `{"next":"","keyid":"","sig":""}`
		_, err := ParseSignature([]byte(s + strings.Repeat(" ", n-len(s))))
		return err
	}
	dir := initialised(t, Options{})
	life := func(seconds int) error {
		_, err := Propose(dir, Change{Lifetime: time.Duration(seconds) * time.Second})
		return err
	}
	for name, c := range map[string]struct {
		bound int
		try   func(int) error
	}{
		"bytes of a proposal":      {MaxProposal, proposal},
		"bytes of a signature":     {MaxSignature, signature},
		"seconds of a root":        {maxLifetime, life},
		"seconds of a new network": {maxLifetime, func(n int) error { _, err := Lifetimes{Root: time.Duration(n) * time.Second}.settings(); return err }},
		"seconds of new targets":   {maxLifetime, func(n int) error { _, err := Lifetimes{Targets: time.Duration(n) * time.Second}.settings(); return err }},
		"seconds of new timestamps": {maxLifetime, func(n int) error {
			_, err := Lifetimes{Timestamp: time.Duration(n) * time.Second}.settings()
			return err
		}},
	} {
		if err := c.try(c.bound); err != nil {
			t.Errorf("%d %s: %v", c.bound, name, err)
		}
		err := c.try(c.bound + 1)
		t.Logf("%d %s: expected: refused; got: %v", c.bound+1, name, err)
		if err == nil {
			t.Errorf("%d %s are taken", c.bound+1, name)
		}
	}
}
