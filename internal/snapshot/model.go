package snapshot

import (
	"bytes"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net/url"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/resultity/node/internal/chunk"
	"github.com/resultity/node/internal/digest"
)

// Model is a named set of files.
type Model struct {
	Name      string     `json:"name"`
	Version   string     `json:"version"`
	Format    Format     `json:"format"`
	Archived  bool       `json:"archived,omitempty"` // who has it keeps it; nobody fetches or serves it
	Files     []File     `json:"files"`
	Signature *Signature `json:"signature,omitempty"` // nil if it need not be signed
}

// Format is a format of models. Formats that can carry code have no name here.
type Format string

// The formats.
const (
	GGUF        Format = "gguf"
	Safetensors Format = "safetensors"
)

// File is one file of a model.
type File struct {
	Path    string        `json:"path"` // relative, slash-separated
	Size    int64         `json:"size"` // bytes
	SHA256  digest.Digest `json:"sha256"`
	Chunks  Chunks        `json:"chunks"`
	Sources []string      `json:"sources"` // https://… of the file, or oci://host/path@sha256:… of an artifact with it
}

// Chunks names the chunks of a file (package chunk has their definition). The
// hashes are here or, where there are too many, in a file of their own.
type Chunks struct {
	Root    digest.Digest `json:"root"`
	Hashes  []byte        `json:"hashes,omitempty"`  // of all chunks, one after the other; absent for a file of one chunk
	Sources []string      `json:"sources,omitempty"` // https://… of the hashes, where they are not here
}

// Signature asks for an OpenSSF model signature.
type Signature struct {
	File string   `json:"file"` // path of the sigstore bundle; one of the model's files, and the one that it does not cover
	Keys []string `json:"keys"` // ECDSA public keys in PEM; any one of them may sign
}

// NewFile describes what r brings as a file of a model, with all that a node needs
// to fetch it in parts.
func NewFile(name string, r io.Reader, sources ...string) (File, error) {
	l, sum, err := chunk.Read(r)
	if err != nil {
		return File{}, err
	}
	f := File{Path: name, Size: l.Size(), SHA256: sum, Chunks: Chunks{Root: l.Root()}, Sources: sources}
	if l.Len() > 1 {
		f.Chunks.Hashes = l.Bytes()
	}
	return f, nil
}

// Digest names the model's content: SHA-256 over the lines that sha256sum
// prints for its files, sorted by path.
func (m *Model) Digest() digest.Digest {
	files := slices.SortedFunc(slices.Values(m.Files), func(a, b File) int { return strings.Compare(a.Path, b.Path) })
	var b bytes.Buffer
	for _, f := range files {
		fmt.Fprintf(&b, "%s  %s\n", f.SHA256.Hex(), f.Path)
	}
	return digest.Of(b.Bytes())
}

// Size returns the bytes of all files.
func (m *Model) Size() (n int64) {
	for _, f := range m.Files {
		n += f.Size
	}
	return n
}

// Memory is how much memory a runtime needs at least, in bytes.
type Memory struct {
	Machine  int64 // of the machine's
	Devices  int64 // of its devices', together
	Together int64 // of both
	Stated   bool  // by the configuration; else it is an estimate
}

// Memory returns what the configuration states, if it states anything. Else it is
// what the weights alone take, so that nothing is refused that might work: the files of
// a gguf model, which its engine maps as they are, and half of those of a safetensors
// model, which may have 32 bits for each weight where the engine takes 16. Where
// layers go to a device, nobody knows how many before the model is here, so that it is
// for both together. Contexts, caches and the engine itself are left out.
//
// A model that is larger than all memory may still work, at the speed of the disk. Who
// means that states what it takes.
func (c *Config) Memory() Memory {
	r, m := &c.Runtime, c.model()
	if r.MemoryBytes > 0 || r.DeviceBytes > 0 {
		return Memory{Machine: r.MemoryBytes, Devices: r.DeviceBytes, Stated: true}
	}
	var n int64
	for _, p := range m.weights() {
		for i := range m.Files {
			if m.Files[i].Path == p {
				n += m.Files[i].Size
			}
		}
	}
	switch {
	case m.Format == Safetensors && len(r.Devices) > 0:
		return Memory{Devices: n / 2}
	case m.Format == Safetensors:
		return Memory{Machine: n / 2}
	case len(r.Devices) > 0 && r.Settings.GPULayers > 0:
		return Memory{Together: n}
	}
	return Memory{Machine: n}
}

// Main returns the path of the file that an engine is pointed to, the first one
// with weights; "" if there is none.
func (m *Model) Main() string {
	if w := m.weights(); len(w) > 0 {
		return slices.Min(w)
	}
	return ""
}

// weights returns the paths of the files with weights.
func (m *Model) weights() (paths []string) {
	for _, f := range m.Files {
		if strings.HasSuffix(f.Path, "."+string(m.Format)) {
			paths = append(paths, f.Path)
		}
	}
	return paths
}

// takes are the files that a model of each format may have: weights, and what
// engines read beside them as data. The bundle of a signature is one more.
var takes = map[Format]*regexp.Regexp{
	GGUF:        regexp.MustCompile(`\.gguf$`),
	Safetensors: regexp.MustCompile(`(\.(safetensors|json|txt|md|jinja)|(^|/)(tokenizer\.model|[a-z]+\.tiktoken|LICENSE|NOTICE))$`),
}

// Check checks a model by itself, as [Parse] does.
func (m *Model) Check() error { return m.check() }

func (m *Model) check() error {
	if err := first(
		named(m.Name, "name", namePattern), named(m.Version, "version", versionPattern),
		between(len(m.Files), "number of files", 1, maxFiles),
	); err != nil {
		return err
	}
	allowed := takes[m.Format]
	if allowed == nil {
		return fmt.Errorf("format %.40q: want gguf or safetensors; other formats can carry code", m.Format)
	}
	files, dirs := map[string]bool{}, map[string]bool{}
	for i := range m.Files {
		f := &m.Files[i]
		if err := f.check(); err != nil {
			return fmt.Errorf("files[%d]: %w", i, err)
		}
		if files[f.Path] {
			return fmt.Errorf("files[%d]: a second %q", i, f.Path)
		}
		files[f.Path] = true
		for d := path.Dir(f.Path); d != "."; d = path.Dir(d) {
			dirs[d] = true
		}
		if !allowed.MatchString(f.Path) && (m.Signature == nil || f.Path != m.Signature.File) {
			return fmt.Errorf("files[%d]: %q is no file of a model of format %s: %w", i, f.Path, m.Format, ErrFiles)
		}
	}
	for i, f := range m.Files {
		if dirs[f.Path] {
			return fmt.Errorf("files[%d]: %q is a file and a directory", i, f.Path)
		}
	}
	if m.Signature != nil {
		if err := m.Signature.check(files); err != nil {
			return fmt.Errorf("signature: %w", err)
		}
	}
	if len(m.weights()) == 0 {
		return fmt.Errorf("no file of format %s is among the files", m.Format)
	}
	if m.Format == GGUF {
		return checkSplit(m.weights())
	}
	return nil
}

// ErrFiles says that a model lists a file of a kind that is not taken. It is an
// [ErrInvalid], too.
var ErrFiles = errors.New("such files can run code, or no engine needs them")

var splitPattern = regexp.MustCompile(`^(.*)-([0-9]{5})-of-([0-9]{5})\.gguf$`)

// checkSplit takes one gguf file, or all parts of one that was split.
func checkSplit(paths []string) error {
	if len(paths) == 1 && !splitPattern.MatchString(paths[0]) {
		return nil
	}
	for i, p := range slices.Sorted(slices.Values(paths)) {
		part := splitPattern.FindStringSubmatch(p)
		if part == nil {
			return fmt.Errorf("file %q is no part of a split gguf file (NAME-00001-of-%05d.gguf), and there are others beside it", p, len(paths))
		}
		no, _ := strconv.Atoi(part[2])
		of, _ := strconv.Atoi(part[3]) // five digits
		if no != i+1 || of != len(paths) || !strings.HasPrefix(paths[0], part[1]+"-") {
			return fmt.Errorf("file %q: the parts of a split gguf file are not all here, and nothing else: there are %d", p, len(paths))
		}
	}
	return nil
}

func (s *Signature) check(files map[string]bool) error {
	if !files[s.File] {
		return fmt.Errorf("file %.80q is not among the files", s.File)
	}
	if err := between(len(s.Keys), "number of keys", 1, 16); err != nil {
		return err
	}
	for i, k := range s.Keys {
		if err := checkKey(k); err != nil {
			return fmt.Errorf("keys[%d]: %w", i, err)
		}
	}
	return nil
}

var pathPattern = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,127}(/[A-Za-z0-9][A-Za-z0-9._-]{0,127}){0,3}$`)

func (f *File) check() error {
	if err := first(
		named(f.Path, "path", pathPattern),
		between(f.Size, "size", 1, maxFileBytes),
		between(len(f.Sources), "number of sources", 1, maxSources),
	); err != nil {
		return err
	}
	if f.SHA256.IsZero() {
		return errors.New("sha256 is missing")
	}
	for _, s := range f.Sources {
		if err := checkSource(s); err != nil {
			return err
		}
	}
	if err := f.Chunks.check(f.Size); err != nil {
		return fmt.Errorf("chunks: %w", err)
	}
	return nil
}

func (c *Chunks) check(size int64) error {
	switch {
	case c.Root.IsZero():
		return errors.New("root is missing")
	case c.Hashes != nil && len(c.Hashes) == 0, c.Sources != nil && len(c.Sources) == 0:
		return errors.New("hashes or sources are empty: leave them out")
	case chunk.Count(size) == 1 && (c.Hashes != nil || c.Sources != nil):
		return errors.New("a file of one chunk has neither hashes nor sources of them: its root is the hash")
	case chunk.Count(size) == 1:
		return nil
	case (c.Hashes == nil) == (c.Sources == nil):
		return errors.New("want either hashes or sources of them")
	case c.Hashes != nil:
		_, err := chunk.Parse(c.Hashes, size, c.Root)
		return err
	}
	if err := between(len(c.Sources), "number of sources", 1, maxSources); err != nil {
		return err
	}
	for _, s := range c.Sources {
		if err := checkURL(s); err != nil {
			return err
		}
	}
	return nil
}

// checkBase64 takes the one spelling of its bytes.
func checkBase64(s string) error {
	b, err := base64.StdEncoding.DecodeString(s)
	if err == nil && base64.StdEncoding.EncodeToString(b) != s {
		err = errors.New("want base64 with padding and nothing else")
	}
	return err
}

// OCI is the scheme of a source that is an artifact in a registry.
const OCI = "oci://"

func checkSource(s string) error {
	ref, ok := strings.CutPrefix(s, OCI)
	if !ok {
		return checkURL(s)
	}
	if _, err := ParseImageRef(ref); err != nil {
		return fmt.Errorf("source: %w", err)
	}
	return nil
}

// maxURL bounds a URL, in bytes.
const maxURL = 2048

func checkURL(s string) error {
	if err := between(len(s), "bytes of a source", 1, maxURL); err != nil {
		return err
	}
	u, err := url.Parse(s)
	if err != nil || u.Scheme != "https" || u.Hostname() == "" || u.User != nil || strings.Contains(s, "#") {
		return fmt.Errorf("source %.200q: want an https URL without user or fragment, or oci://host/path@sha256:…", s)
	}
	return nil
}
