package identity

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func open(t *testing.T, o Options) string {
	t.Helper()
	k, _, err := Open(o)
	if err != nil {
		t.Fatal(err)
	}
	return k.String()
}

func TestMadeOnceAndPrivate(t *testing.T) {
	o := Options{Dir: filepath.Join(t.TempDir(), "id")}
	k, created, err := Open(o)
	if err != nil || !created {
		t.Fatalf("created %v, %v", created, err)
	}
	k2, created, err := Open(o)
	if err != nil || created || k2.Address() != k.Address() {
		t.Fatalf("second start: created %v, %v, address %v, want %v", created, err, k2, k)
	}
	for _, n := range []string{keyFile, passphraseFile} {
		st, err := os.Stat(filepath.Join(o.Dir, n))
		if err != nil || st.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v", n, st, err)
		}
		raw, err := os.ReadFile(filepath.Join(o.Dir, n))
		if err != nil || strings.Contains(string(raw), k.Hex()) {
			t.Errorf("%s holds the key in clear (%v)", n, err)
		}
	}
}

func TestPassphraseSources(t *testing.T) {
	secret := filepath.Join(t.TempDir(), "pass")
	creds := t.TempDir()
	for name, text := range map[string]string{secret: "from the file\n", filepath.Join(creds, CredentialName): "from the credential"} {
		if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	byFile := Options{Dir: filepath.Join(t.TempDir(), "a"), Passphrase: secret, Credentials: creds}
	byCred := Options{Dir: filepath.Join(t.TempDir(), "b"), Credentials: creds}
	a, b := open(t, byFile), open(t, byCred)
	if open(t, byFile) != a || open(t, byCred) != b {
		t.Error("another key at the second start")
	}
	byFile.Passphrase = ""
	if _, _, err := Open(byFile); !errors.Is(err, ErrRefused) {
		t.Errorf("opened with another passphrase: %v", err)
	}
	for _, d := range []string{byFile.Dir, byCred.Dir} {
		if _, err := os.Stat(filepath.Join(d, passphraseFile)); err == nil {
			t.Error("a passphrase of our own was made beside a given one")
		}
	}
}

func TestRefused(t *testing.T) {
	for _, c := range []struct {
		name, want string
		harm       func(t *testing.T, dir string) error
	}{
		{"key readable by the group", "mode 0640", func(t *testing.T, d string) error { return os.Chmod(filepath.Join(d, keyFile), 0o640) }},
		{"key writable by others", "mode 0602", func(t *testing.T, d string) error { return os.Chmod(filepath.Join(d, keyFile), 0o602) }},
		{"passphrase readable by others", "mode 0604", func(t *testing.T, d string) error { return os.Chmod(filepath.Join(d, passphraseFile), 0o604) }},
		{"directory open", "mode 0755", func(t *testing.T, d string) error { return os.Chmod(d, 0o755) }},
		{"somebody else's key", "belongs to uid 12345", func(t *testing.T, d string) error { return os.Chown(filepath.Join(d, keyFile), 12345, 12345) }},
		{"symbolic link", "symbolic link", func(t *testing.T, d string) error {
			if err := os.Rename(filepath.Join(d, keyFile), filepath.Join(d, "x")); err != nil {
				return err
			}
			return os.Symlink("x", filepath.Join(d, keyFile))
		}},
		{"wrong passphrase", "does not open", func(t *testing.T, d string) error {
			return os.WriteFile(filepath.Join(d, passphraseFile), []byte("wrong"), 0o600)
		}},
		{"empty passphrase", "is empty", func(t *testing.T, d string) error {
			return os.WriteFile(filepath.Join(d, passphraseFile), nil, 0o600)
		}},
		{"lost passphrase", "is missing", func(t *testing.T, d string) error { return os.Remove(filepath.Join(d, passphraseFile)) }},
		{"truncated key", "not a keystore file that", func(t *testing.T, d string) error { return os.Truncate(filepath.Join(d, keyFile), 10) }},
		{"huge key", "more than", func(t *testing.T, d string) error { return os.Truncate(filepath.Join(d, keyFile), maxFile+1) }},
		{"huge passphrase", "more than", func(t *testing.T, d string) error {
			return os.Truncate(filepath.Join(d, passphraseFile), maxFile+1)
		}},
		{"a directory instead", "not a regular file", func(t *testing.T, d string) error {
			if err := os.Remove(filepath.Join(d, keyFile)); err != nil {
				return err
			}
			return os.Mkdir(filepath.Join(d, keyFile), 0o700)
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			o := Options{Dir: filepath.Join(t.TempDir(), "id")}
			open(t, o)
			if err := c.harm(t, o.Dir); err != nil {
				t.Fatal(err)
			}
			before, _ := os.ReadDir(o.Dir)
			_, created, err := Open(o)
			t.Logf("expected: %s; got: %v", c.want, err)
			if !errors.Is(err, ErrRefused) || created || !strings.Contains(err.Error(), c.want) {
				t.Errorf("created %v, error %v; want refused with %q", created, err, c.want)
			}
			if after, _ := os.ReadDir(o.Dir); len(after) != len(before) {
				t.Errorf("a refusal changed the directory: %v, was %v", after, before)
			}
		})
	}
}
