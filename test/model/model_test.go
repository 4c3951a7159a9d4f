package model

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"os"
	"strings"
	"testing"
	"unicode/utf8"
)

func TestHash(t *testing.T) {
	sum := sha256.Sum256(GGUF())
	if got := hex.EncodeToString(sum[:]); got != SHA256 {
		t.Errorf("sha256 of %s is %s, want %s", FileName, got, SHA256)
	}
	if !bytes.HasPrefix(GGUF(), []byte("GGUF")) {
		t.Errorf("%s does not begin with GGUF's magic", FileName)
	}
}

// TestSums keeps the file that `sha256sum -c` reads in step with the constant
// and with the files beside it.
func TestSums(t *testing.T) {
	sums, err := os.ReadFile("SHA256SUMS")
	if err != nil {
		t.Fatal(err)
	}
	seen := make(map[string]string)
	for line := range strings.Lines(string(sums)) {
		want, name, ok := strings.Cut(strings.TrimSuffix(line, "\n"), "  ")
		if !ok {
			t.Fatalf("SHA256SUMS: bad line %q", line)
		}
		b, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		sum := sha256.Sum256(b)
		if got := hex.EncodeToString(sum[:]); got != want {
			t.Errorf("sha256 of %s is %s, SHA256SUMS says %s", name, got, want)
		}
		seen[name] = want
	}
	if seen[FileName] != SHA256 {
		t.Errorf("SHA256SUMS has %q for %s, want %s", seen[FileName], FileName, SHA256)
	}
}

func TestPrompts(t *testing.T) {
	ps := Prompts()
	if len(ps) < 20 {
		t.Fatalf("%d prompts, want at least 20", len(ps))
	}
	seen := make(map[string]bool)
	long := 0
	for _, p := range ps {
		switch {
		case p.User == "" || p.Answer == "":
			t.Errorf("empty prompt or answer: %+v", p)
		case seen[p.User]:
			t.Errorf("prompt %q is there twice", p.User)
		case strings.TrimSpace(p.Answer) != p.Answer:
			t.Errorf("answer to %q has space around it", p.User)
		case !utf8.ValidString(p.Answer):
			t.Errorf("answer to %q is not UTF-8", p.User)
		case strings.Contains(p.Answer, "<|"):
			t.Errorf("answer to %q holds a special token", p.User)
		}
		seen[p.User] = true
		if len(p.Answer) > 150 {
			long++
		}
	}
	if long < 3 {
		t.Errorf("%d long answers, want at least 3: streams need them", long)
	}
}

// TestOwnCopies writes into what the package hands out: one test must not be
// able to spoil another's model.
func TestOwnCopies(t *testing.T) {
	GGUF()[0]++
	Prompts()[0].Answer = "spoilt"
	if GGUF()[0] != 'G' || Prompts()[0].Answer == "spoilt" {
		t.Error("a caller's write reached the package's own data")
	}
}
