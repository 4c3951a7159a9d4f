package publish

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// says is a passphrase that is known.
func says(phrase string) Passphrase {
	return func(string, bool) ([]byte, error) { return []byte(phrase), nil }
}

func TestEncryptedKey(t *testing.T) {
	file := filepath.Join(t.TempDir(), "k.pem")
	k, err := MakeKey(file, says("right"))
	if err != nil {
		t.Fatal(err)
	}
	if again, err := MakeKey(file, says("right")); err != nil || again.ID() != k.ID() {
		t.Errorf("opened again: %v, %v", again, err)
	}
	raw, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	failed := errors.New("the terminal is gone")
	for name, tc := range map[string]struct {
		pass Passphrase
		want error
	}{
		"no passphrase": {nil, ErrEncrypted},
		"a wrong one":   {says("wrong"), ErrEncrypted},
		"an empty one":  {says(""), ErrEncrypted},
		"nobody to ask": {func(string, bool) ([]byte, error) { return nil, failed }, failed},
	} {
		k, err := OpenKey(file, tc.pass)
		if k != nil || !errors.Is(err, tc.want) {
			t.Errorf("%s: %v, want %v", name, err, tc.want)
		}
		// It is not taken for one that is missing, and not written over.
		if k, err := MakeKey(file, tc.pass); k != nil || !errors.Is(err, tc.want) {
			t.Errorf("%s: made again: %v", name, err)
		}
	}
	if now, err := os.ReadFile(file); err != nil || !bytes.Equal(now, raw) {
		t.Errorf("the file has changed: %v", err)
	}
	// A damaged file never opens as another key.
	for i := bytes.IndexByte(raw, '\n') + 1; i < len(raw); i += 211 {
		damaged := bytes.Clone(raw)
		damaged[i] ^= 1
		if err := os.WriteFile(file, damaged, 0o600); err != nil {
			t.Fatal(err)
		}
		if got, err := OpenKey(file, says("right")); err == nil && got.ID() != k.ID() {
			t.Errorf("byte %d: opened as %q", i, got.ID())
		}
	}
}

// A targets key that lies in DIR/keys and is encrypted is as good as elsewhere: the
// service goes on without it, and whoever publishes gives it.
func TestEncryptedTargetsKey(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := t.TempDir()
		if err := Init(dir, Options{RootKeys: []string{filepath.Join(dir, "root.pem")}, Passphrase: says("right")}); err != nil {
			t.Fatal(err)
		}
		if err := Publish(dir, config(t, 1)); !errors.Is(err, ErrEncrypted) || !strings.Contains(err.Error(), "--key") {
			t.Errorf("published without the passphrase: %v", err)
		}
		k, err := OpenKey(filepath.Join(dir, "keys/targets.pem"), says("right"))
		if err != nil {
			t.Fatal(err)
		}
		if err := Publish(dir, config(t, 1), k); err != nil {
			t.Fatal(err)
		}
		if exposed, err := Exposed(dir); err != nil || len(exposed) != 0 {
			t.Errorf("exposed: %v, %v", exposed, err)
		}
		time.Sleep(50 * 24 * time.Hour) // more than half of the life of targets
		if _, err := Refresh(dir); err != nil {
			t.Fatal(err)
		}
		sees(t, node(t, dir), config(t, 1))
	})
}

func TestPublicKeyFiles(t *testing.T) {
	dir := t.TempDir()
	k, err := MakeKey(filepath.Join(dir, "k.pem"), nil)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := k.Public("").PEM()
	if err != nil {
		t.Fatal(err)
	}
	private, err := os.ReadFile(filepath.Join(dir, "k.pem"))
	if err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct {
		raw []byte
		ok  bool
	}{
		"anna.pub":             {raw, true},
		"anna@example.org.pub": {raw, true},
		"-anna.pub":            {raw, false},
		"\x1b[2J.pub":          {raw, false}, // clears a screen
		"an na.pub":            {raw, false},
		"private.pub":          {private, false},
		"empty.pub":            {nil, false},
		"two.pub":              {append(bytes.Clone(raw), raw...), false},
		"rsa.pub":              {[]byte("-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n"), false},
	} {
		file := filepath.Join(dir, name)
		if err := os.WriteFile(file, tc.raw, 0o644); err != nil {
			t.Fatal(err)
		}
		p, err := ReadPublic(file)
		if (err == nil) != tc.ok || err == nil && (p.ID() != k.ID() || p.Name+".pub" != name) {
			t.Errorf("%q: %+v, %v", name, p, err)
		}
	}
}

// What an attacker writes into a proposal does not reach the holder's screen.
func TestReviewShowsNoControlCharacters(t *testing.T) {
	dir := published(t, Options{})
	p, err := Propose(dir, Change{})
	if err != nil {
		t.Fatal(err)
	}
	p.Next = bytes.Replace(p.Next, []byte(`"root-1"`), []byte(`"root-1\u001b[2J"`), 1)
	p.Next = bytes.Replace(p.Next, []byte(`"consistent_snapshot"`), []byte(`"\u001b[1A": 1, "consistent_snapshot"`), 1)
	text, err := p.Review(p.Roots[0], time.Now())
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("expected: no control characters; got: %d of %d bytes", strings.Count(text, "\x1b"), len(text))
	if strings.ContainsAny(text, "\x1b") || !strings.Contains(text, "which this program does not know") || !strings.Contains(text, `was called "root-1" and is called ""`) {
		t.Errorf("%q", text)
	}
}
