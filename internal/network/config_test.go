package network

import (
	"os"
	"path/filepath"
	"testing"
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
