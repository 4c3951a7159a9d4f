// Package determinism owns what two nodes must have in common for their answers
// to be compared, the class of a deployment, and how the answers themselves become
// one value, its fingerprint. It does no I/O.
//
// The rule it keeps: whatever may change which tokens an engine computes for a
// request is in the class, so that two nodes of one class should give one answer,
// and different answers of two classes are nobody's fault. All of it is what a
// node says of itself.
//
// # The class digest
//
// It is the SHA-256 of the JSON of a [Class], in exactly one spelling: UTF-8
// without white space, the fields of each object in the order in which its type
// lists them, none left out, lists never null, numbers in decimal. No text in it
// needs an escape: each is as [Text] leaves it.
//
//	{"image":"sha256:…","model":"sha256:…",
//	 "engine":{"name":"llamacpp","command":["/usr/bin/llama-server",…],"env":[]},
//	 "hardware":{"arch":"amd64","cpu":"Intel(R) Xeon(R) Processor (GenuineIntel 6-167)",
//	             "features":["avx","avx2",…],"cpus":0,"gpus":[],"driver":""}}
//
// (here with line breaks, to be read). Image and model are those of receipts. The
// rest is said at the fields below.
//
// # The fingerprint
//
// It is the SHA-256 of the JSON of a list of [Answer], in the same spelling: what an
// engine has made of the golden requests of a snapshot, in the snapshot's order.
//
//	[{"name":"hello","text":"sha256:…","reasoning":"sha256:…","finish_reason":"stop",
//	  "prompt_tokens":11,"completion_tokens":9},…]
//
// It is taken while the engine does nothing else. Beside other requests most engines
// compute in batches, and a sum in a batch may have other last bits. Two fingerprints
// can be compared where class and snapshot are the same.
package determinism

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/resultity/node/internal/digest"
)

// Class is all that decides which tokens are computed for a request.
type Class struct {
	Image    digest.Digest `json:"image"` // manifest of the runtime's image
	Model    digest.Digest `json:"model"` // manifest of the model's files
	Engine   Engine        `json:"engine"`
	Hardware Hardware      `json:"hardware"`
}

// Engine is how the engine is run, as the unit has it: settings that an agent
// gives of its own are in it, too, so that a newer agent may make another class.
type Engine struct {
	Name    string   `json:"name"`    // as in the snapshot
	Command []string `json:"command"` // inside the container, program first
	Env     []string `json:"env"`     // NAME=value, in the unit's order; not what the image or a CDI device brings
}

// Hardware is what the engine computes on, as far as it changes its arithmetic.
//
// CPU, Features and CPUs are of the engines that compute on the CPU: all without
// devices, and llama.cpp where gpu_layers is below 999, since some layers may stay
// there. CPUs is their number where the configuration leaves the number of threads
// to the engine, else 0: how a sum is split among threads changes its last bits.
type Hardware struct {
	Arch     string   `json:"arch"`     // as Go names it: amd64, arm64
	CPU      string   `json:"cpu"`      // model; "" where the CPU does not compute
	Features []string `json:"features"` // of [Features], those that the CPU has, sorted
	CPUs     int      `json:"cpus"`
	GPUs     []string `json:"gpus"`   // model of each that the engine is given, sorted; one stands here as often as there are
	Driver   string   `json:"driver"` // of the GPUs, with its version; several are sorted and joined by ", "
}

// Bounds.
const (
	MaxText = 128 // bytes of a text of Hardware
	MaxList = 64  // entries of a list of Hardware
)

// Features are the instruction sets by which engines choose how to compute, as
// /proc/cpuinfo names them. A new one is added here, which makes new classes of the
// nodes that have it.
var Features = []string{
	// x86
	"pni", "ssse3", "sse4_1", "sse4_2", "sse4a", "avx", "f16c", "fma", "fma4", "bmi2", "avx2", "avx_vnni", "avx_vnni_int8", "avx_ne_convert", "avx_ifma",
	"avx512f", "avx512cd", "avx512bw", "avx512dq", "avx512vl", "avx512ifma", "avx512vbmi", "avx512_vbmi2", "avx512_vnni", "avx512_bf16", "avx512_fp16",
	"amx_tile", "amx_int8", "amx_bf16", "amx_fp16",
	// arm64
	"asimd", "asimdhp", "asimddp", "asimdfhm", "fphp", "i8mm", "bf16", "sve", "sve2", "svei8mm", "svebf16", "sme", "sme2", "smei8i32", "smef16f32", "smeb16f32", "smef32f32",
	// s390x, ppc64le
	"vx", "vxd", "vxe", "vxe2", "nnpa", "altivec", "vsx",
}

// Text reduces what a machine calls itself to one spelling: printable ASCII
// without quotes and backslashes, no white space but single spaces inside, at most
// [MaxText] bytes. What else there is counts as a space.
func Text(s string) string {
	s = s[:min(len(s), 4*MaxText)]
	words := strings.FieldsFunc(s, func(r rune) bool { return r <= ' ' || r > '~' || r == '"' || r == '\\' })
	s = strings.Join(words, " ")
	return strings.TrimSpace(s[:min(len(s), MaxText)])
}

// String names the machine for people, without the features of its CPU.
func (h *Hardware) String() string {
	parts := []string{h.Arch}
	if h.CPU != "" {
		parts = append(parts, h.CPU)
	}
	for i, g := range h.GPUs {
		if i == 0 || g != h.GPUs[i-1] {
			n := len(h.GPUs[i:]) - len(slices.DeleteFunc(slices.Clone(h.GPUs[i:]), func(o string) bool { return o == g }))
			parts = append(parts, fmt.Sprintf("%d × %s", n, g))
		}
	}
	if h.Driver != "" {
		parts = append(parts, h.Driver)
	}
	return strings.Join(parts, ", ")
}

// Check reports whether h is in its one spelling and within its bounds.
func (h *Hardware) Check() error {
	if len(h.Features) > MaxList || len(h.GPUs) > MaxList {
		return fmt.Errorf("%d features and %d GPUs, at most %d each", len(h.Features), len(h.GPUs), MaxList)
	}
	texts := append([]string{h.Arch, h.CPU, h.Driver}, h.Features...)
	for _, s := range append(texts, h.GPUs...) {
		if s != Text(s) {
			return fmt.Errorf("%.80q is no text of printable ASCII of at most %d bytes", s, MaxText)
		}
	}
	switch {
	case h.Arch == "" || h.CPU == "" && len(h.GPUs) == 0:
		return errors.New("it names neither a CPU nor a GPU")
	case !slices.IsSorted(h.Features) || !slices.IsSorted(h.GPUs):
		return errors.New("a list is not sorted")
	case h.CPUs < 0 || h.CPUs > 1<<16:
		return fmt.Errorf("%d CPUs", h.CPUs)
	}
	return nil
}

// Digest returns the class digest. It fails for a class that has no digest, since
// something in it is not known or not in its one spelling.
func (c *Class) Digest() (digest.Digest, error) {
	if err := c.Hardware.Check(); err != nil {
		return digest.Digest{}, fmt.Errorf("class: hardware: %w", err)
	}
	for _, s := range append(append([]string{c.Engine.Name}, c.Engine.Command...), c.Engine.Env...) {
		if s == "" || strings.ContainsFunc(s, func(r rune) bool { return r < ' ' || r > '~' || r == '"' || r == '\\' }) {
			return digest.Digest{}, fmt.Errorf("class: engine: %.80q is no text of printable ASCII", s)
		}
	}
	if c.Image.IsZero() || c.Model.IsZero() || len(c.Engine.Command) == 0 {
		return digest.Digest{}, errors.New("class: no image, model or engine")
	}
	return sum(c.spelled())
}

// spelled returns c with lists that are empty in the place of those that are not
// there.
func (c Class) spelled() Class {
	for _, l := range []*[]string{&c.Engine.Command, &c.Engine.Env, &c.Hardware.Features, &c.Hardware.GPUs} {
		if *l == nil {
			*l = []string{}
		}
	}
	return c
}

// sum is the SHA-256 of a value's JSON. No text in it needs an escape, but for
// those that encoding/json makes by itself for the sake of HTML.
func sum(v any) (digest.Digest, error) {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	if err := e.Encode(v); err != nil {
		return digest.Digest{}, err
	}
	return digest.Of(bytes.TrimSuffix(b.Bytes(), []byte("\n"))), nil
}

// Answer is what an engine has made of a golden request.
type Answer struct {
	Name             string        `json:"name"`          // of the request, in the snapshot
	Text             digest.Digest `json:"text"`          // SHA-256 of the text, UTF-8, of no bytes where it is empty
	Reasoning        digest.Digest `json:"reasoning"`     // likewise, of what a model says before the text
	Finish           string        `json:"finish_reason"` // stop, length or content_filter
	PromptTokens     uint64        `json:"prompt_tokens"`
	CompletionTokens uint64        `json:"completion_tokens"`
}

// NewAnswer makes an answer of its texts.
func NewAnswer(name, text, reasoning, finish string, promptTokens, completionTokens uint64) Answer {
	return Answer{name, digest.Of([]byte(text)), digest.Of([]byte(reasoning)), finish, promptTokens, completionTokens}
}

// Fingerprint returns the fingerprint of answers in the order of their requests.
func Fingerprint(answers []Answer) (digest.Digest, error) {
	if len(answers) == 0 {
		return digest.Digest{}, errors.New("fingerprint: no answers")
	}
	return sum(answers)
}
