package publish

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// Proposals and signatures come from other people's machines. What is read survives
// printing, and who reviews a proposal is told in words that say one thing.
func FuzzProposal(f *testing.F) {
	root, err := os.ReadFile("../chain/testdata/1.root.json")
	if err != nil {
		f.Fatal(err)
	}
	next := bytes.Replace(root, []byte(`"version": 1`), []byte(`"version": 2`), 1)
	for _, p := range []Proposal{{Next: root}, {Roots: [][]byte{root}, Next: next}} {
		raw, err := json.Marshal(p)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(raw)
	}
	f.Add([]byte(`{"next":"sha256:00","keyid":"x","sig":"00"}`))
	now := time.Date(2026, 6, 1, 0, 0, 0, 0, time.UTC)
	f.Fuzz(func(t *testing.T, raw []byte) {
		if s, err := ParseSignature(raw); err == nil {
			again(t, s, ParseSignature)
		}
		p, err := ParseProposal(raw)
		if err != nil {
			return
		}
		again(t, p, ParseProposal)
		for _, trusted := range [][]byte{nil, root} {
			text, err := p.Review(trusted, now)
			if err == nil && text == "" {
				t.Fatal("nothing is said")
			}
			for _, c := range text {
				if c < ' ' && c != '\n' || c == 0x7f {
					t.Fatalf("%q reaches the terminal", c)
				}
			}
		}
	})
}

func again[T any](t *testing.T, v *T, parse func([]byte) (*T, error)) {
	t.Helper()
	raw, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	back, err := parse(raw)
	if err != nil {
		t.Fatal(err)
	}
	if twice, err := json.Marshal(back); err != nil || !bytes.Equal(twice, raw) {
		t.Fatalf("%s became %s, %v", raw, twice, err)
	}
}

// Keys are read from files that others send.
func FuzzReadPublic(f *testing.F) {
	key, err := MakeKey(filepath.Join(f.TempDir(), "a.pem"), nil)
	if err != nil {
		f.Fatal(err)
	}
	raw, err := key.Public("a").PEM()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(raw)
	f.Add([]byte("-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n"))
	f.Fuzz(func(t *testing.T, raw []byte) {
		file := filepath.Join(t.TempDir(), "a.pub")
		if err := os.WriteFile(file, raw, 0o600); err != nil {
			t.Fatal(err)
		}
		if p, err := ReadPublic(file); err == nil {
			if _, err := p.PEM(); err != nil || p.Name != "a" || len(p.ID()) != 64 {
				t.Fatalf("%+v, %v", p, err)
			}
		}
		if err := os.Chmod(file, 0o600); err != nil {
			t.Fatal(err)
		}
		_, _ = OpenKey(file, nil) // it returns
	})
}
