package config

import (
	"os"
	"path/filepath"
	"testing"
)

// What is taken has a network, and is taken again; what is not says why.
func FuzzLoad(f *testing.F) {
	example, err := os.ReadFile("agent.toml")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(example, []byte("[log]\nlevel = \"debug\"\n"))
	f.Add([]byte("[network.t]\nurl = \"https://n\"\nroot = \"/r\"\n"), []byte("[network.t]\nca = \"/b\"\n[network.\"a.b\"]\n"))
	f.Add([]byte("[network]\nt = 1\n"), []byte("network.t.url = [[]]\n"))
	env := func(string) string { return "/dir" }
	f.Fuzz(func(t *testing.T, base, more []byte) {
		dir := t.TempDir()
		file := filepath.Join(dir, "agent.toml")
		if err := os.Mkdir(file+".d", 0o700); err != nil {
			t.Fatal(err)
		}
		for name, raw := range map[string][]byte{file: base, filepath.Join(file+".d", "1.toml"): more} {
			if err := os.WriteFile(name, raw, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		c, err := Load(file, env)
		if err == nil && len(c.Networks) == 0 || err != nil && (c != nil || err.Error() == "") {
			t.Fatalf("%+v, %v", c, err)
		}
	})
}
