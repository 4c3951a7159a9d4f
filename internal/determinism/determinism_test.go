package determinism

import (
	"crypto/sha256"
	"encoding/hex"
	"slices"
	"strings"
	"testing"

	"github.com/resultity/node/internal/digest"
)

func example() Class {
	return Class{
		Image: digest.Of([]byte("image")), Model: digest.Of([]byte("model")),
		Engine:   Engine{Name: "llamacpp", Command: []string{"/usr/bin/llama-server", "-np", "2"}},
		Hardware: Hardware{Arch: "amd64", CPU: "Some <CPU> & more (GenuineIntel 6-167)", Features: []string{"avx", "avx2"}},
	}
}

// The digest of a class is that of a text which anybody can write down.
func TestDigest(t *testing.T) {
	c := example()
	got, err := c.Digest()
	if err != nil {
		t.Fatal(err)
	}
	text := `{"image":"` + c.Image.String() + `","model":"` + c.Model.String() +
		`","engine":{"name":"llamacpp","command":["/usr/bin/llama-server","-np","2"],"env":[]}` +
		`,"hardware":{"arch":"amd64","cpu":"Some <CPU> & more (GenuineIntel 6-167)","features":["avx","avx2"],"cpus":0,"gpus":[],"driver":""}}`
	if sum := sha256.Sum256([]byte(text)); got.Hex() != hex.EncodeToString(sum[:]) {
		t.Errorf("%s is not the digest of %s", got, text)
	}
}

// Whatever differs makes another class.
func TestEveryFieldCounts(t *testing.T) {
	c := example()
	base, err := c.Digest()
	if err != nil {
		t.Fatal(err)
	}
	seen := map[digest.Digest]string{base: "the base"}
	for name, change := range map[string]func(c *Class){
		"image":          func(c *Class) { c.Image = digest.Of(nil) },
		"model":          func(c *Class) { c.Model = digest.Of(nil) },
		"engine":         func(c *Class) { c.Engine.Name = "vllm" },
		"command":        func(c *Class) { c.Engine.Command = []string{"/usr/bin/llama-server", "-np 2"} },
		"another option": func(c *Class) { c.Engine.Command = append(slices.Clone(c.Engine.Command), "-t", "4") },
		"env":            func(c *Class) { c.Engine.Env = []string{"A=b"} },
		"arch":           func(c *Class) { c.Hardware.Arch = "arm64" },
		"cpu":            func(c *Class) { c.Hardware.CPU = "another" },
		"feature":        func(c *Class) { c.Hardware.Features = []string{"avx"} },
		"cpus":           func(c *Class) { c.Hardware.CPUs = 2 },
		"a gpu":          func(c *Class) { c.Hardware.GPUs = []string{"NVIDIA L4"} },
		"two gpus":       func(c *Class) { c.Hardware.GPUs = []string{"NVIDIA L4", "NVIDIA L4"} },
		"driver":         func(c *Class) { c.Hardware.Driver = "nvidia 550.54.14" },
	} {
		c := example()
		change(&c)
		d, err := c.Digest()
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if seen[d] != "" {
			t.Errorf("%s: the same class as %s", name, seen[d])
		}
		seen[d] = name
	}
}

func TestNoClass(t *testing.T) {
	for name, change := range map[string]func(c *Class){
		"no image":         func(c *Class) { c.Image = digest.Digest{} },
		"no model":         func(c *Class) { c.Model = digest.Digest{} },
		"no command":       func(c *Class) { c.Engine.Command = nil },
		"empty word":       func(c *Class) { c.Engine.Env = []string{""} },
		"quote in command": func(c *Class) { c.Engine.Command = []string{`a"b`} },
		"no hardware":      func(c *Class) { c.Hardware = Hardware{} },
		"no computer":      func(c *Class) { c.Hardware.CPU = "" },
		"unsorted":         func(c *Class) { c.Hardware.Features = []string{"avx2", "avx"} },
		"two spaces":       func(c *Class) { c.Hardware.CPU = "a  b" },
		"escape":           func(c *Class) { c.Hardware.CPU = "a\x1b[2Jb" },
		"long":             func(c *Class) { c.Hardware.Driver = strings.Repeat("x", MaxText+1) },
		"many":             func(c *Class) { c.Hardware.GPUs = slices.Repeat([]string{"x"}, MaxList+1) },
		"negative":         func(c *Class) { c.Hardware.CPUs = -1 },
	} {
		c := example()
		change(&c)
		if d, err := c.Digest(); err == nil || !d.IsZero() {
			t.Errorf("%s: %s, %v", name, d, err)
		}
	}
}

func TestText(t *testing.T) {
	for in, want := range map[string]string{
		"": "", "  Intel(R)\tXeon(R)  \n": "Intel(R) Xeon(R)", "a\"b\\c\x00d\u202ee": "a b c d e", "é": "",
		strings.Repeat("é", 1000):                         "",
		strings.Repeat("x", 1000):                         strings.Repeat("x", MaxText),
		strings.Repeat("x", MaxText-1) + " " + "y":        strings.Repeat("x", MaxText-1),
		strings.Repeat("\x1b", 4*MaxText-1) + "a" + "bcd": "a",
	} {
		if got := Text(in); got != want || Text(got) != got {
			t.Errorf("%.40q: %q, want %q", in, got, want)
		}
	}
}

func FuzzText(f *testing.F) {
	f.Add("Intel(R) Xeon(R)\x00\"")
	f.Fuzz(func(t *testing.T, s string) {
		got := Text(s)
		c := example()
		c.Hardware.CPU = "x" + got
		if len(got) > MaxText || Text(got) != got {
			t.Errorf("%q", got)
		}
		if _, err := c.Digest(); err != nil && len(got) < MaxText && !strings.HasSuffix(c.Hardware.CPU, " ") {
			t.Error(err)
		}
	})
}

// Nor has a fingerprint a secret.
func TestFingerprint(t *testing.T) {
	h := func(s string) string { d := digest.Of([]byte(s)); return d.String() }
	answers := []Answer{NewAnswer("hello", "Hi <you> \"é\"", "", "stop", 11, 9), NewAnswer("sum", "7", "3 + 4", "length", 5, 1)}
	got, err := Fingerprint(answers)
	text := `[{"name":"hello","text":"` + h("Hi <you> \"é\"") + `","reasoning":"` + h("") + `","finish_reason":"stop","prompt_tokens":11,"completion_tokens":9},` +
		`{"name":"sum","text":"` + h("7") + `","reasoning":"` + h("3 + 4") + `","finish_reason":"length","prompt_tokens":5,"completion_tokens":1}]`
	if err != nil || got != digest.Of([]byte(text)) {
		t.Errorf("%s, %v is not the digest of %s", got, err, text)
	}
	slices.Reverse(answers)
	if other, err := Fingerprint(answers); err != nil || other == got {
		t.Errorf("another order is the same: %s, %v", other, err)
	}
	if none, err := Fingerprint(nil); err == nil {
		t.Errorf("no answers have the fingerprint %s", none)
	}
}

func TestString(t *testing.T) {
	h := Hardware{Arch: "amd64", GPUs: []string{"NVIDIA A100", "NVIDIA L4", "NVIDIA L4"}, Driver: "nvidia 550.54.14"}
	if got, want := h.String(), "amd64, 1 × NVIDIA A100, 2 × NVIDIA L4, nvidia 550.54.14"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
}
