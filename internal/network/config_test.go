package network

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/resultity/node/internal/durable"
)

// Whatever stands in the file, what it does not name keeps its default, and an error
// is one of the configuration.
func FuzzReadFile(f *testing.F) {
	example, err := os.ReadFile("network.toml")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(example)
	f.Add([]byte("drain = 10\n"))
	f.Add([]byte("trusted_proxies = [1, [\"10.0.0.0/8\"]]\nmax_queued = 9999999999999999999\n"))
	f.Add([]byte("listen = { a = 1 }\n[listen.b]\n"))
	f.Fuzz(func(t *testing.T, raw []byte) {
		name := filepath.Join(t.TempDir(), "network.toml")
		if err := os.WriteFile(name, raw, 0o600); err != nil {
			t.Fatal(err)
		}
		c := Defaults()
		if err := c.ReadFile(name); err != nil {
			return
		}
		if c.Ready != nil {
			t.Fatal("a file sets what only a program may")
		}
		_ = c.check() // it returns
	})
}

// A message key is nobody else's to read, and as long as one is.
func TestMessageKeyFile(t *testing.T) {
	dir := t.TempDir()
	name := messageKeyFile(dir)
	if err := os.MkdirAll(filepath.Dir(name), 0o700); err != nil {
		t.Fatal(err)
	}
	text := strings.Repeat("1", 64)
	for _, c := range []struct {
		size int
		mode os.FileMode
		want error
	}{
		{maxMessageKey, 0o600, nil},
		{maxMessageKey + 1, 0o600, durable.ErrLarge},
		{maxMessageKey, 0o604, durable.ErrShared},
		{maxMessageKey, 0o620, durable.ErrShared},
	} {
		if err := os.WriteFile(name, []byte(text+strings.Repeat("\n", c.size-len(text))), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(name, c.mode); err != nil {
			t.Fatal(err)
		}
		_, err := readMessageKey(dir)
		t.Logf("%d bytes of mode %04o: expected: %v; got: %v", c.size, c.mode, c.want, err)
		if !errors.Is(err, c.want) || err != nil && (!errors.Is(err, ErrConfig) || strings.Contains(err.Error(), text[:20])) {
			t.Errorf("%d bytes of mode %04o: %v, want %v", c.size, c.mode, err, c.want)
		}
	}
}
