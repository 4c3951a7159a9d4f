package image

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"go.podman.io/image/v5/docker/reference"
	podmanpolicy "go.podman.io/image/v5/signature"

	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/durable"
	"github.com/resultity/node/internal/failpoint"
	"github.com/resultity/node/internal/snapshot"
	"github.com/resultity/node/policy"
)

// Names in the directory. Podman knows all but the last.
const (
	policyFile     = "policy.json"
	registriesFile = "registries.d/resultity.yaml"
	certsDir       = "certs.d"
	records        = "resultity-signatures"
)

// deny writes the policy that lets nothing in, unless there is one.
func (i *Images) deny() error {
	_, err := os.Lstat(filepath.Join(i.dir, policyFile))
	if errors.Is(err, fs.ErrNotExist) {
		return i.write(policyFile, policy.JSON)
	}
	return err
}

// repository returns what Podman calls ref's repository: by its long name,
// docker.io/library/….
func repository(ref snapshot.ImageRef) (reference.Named, error) {
	return reference.ParseNormalizedNamed(ref.Repository())
}

// requirements are what Podman asks of the images of one repository.
type requirements struct {
	registry string
	signed   podmanpolicy.PolicyRequirement
}

// allow writes Podman's part of the trust in ref: its repository, with what t
// asks for, beside those that others work on, and nothing else. The policy comes
// last, since without the files before it refuses too much, never too little.
func (i *Images) allow(ref snapshot.ImageRef, t *snapshot.ImageTrust) error {
	named, err := repository(ref)
	if err != nil {
		return err
	}
	signed, err := requirement(t)
	if err != nil {
		return err
	}
	p, err := podmanpolicy.NewPolicyFromBytes(policy.JSON)
	if err != nil {
		return err
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	for name := range i.open {
		if i.busy[name] == nil {
			delete(i.open, name)
		}
	}
	i.open[named.Name()] = &requirements{reference.Domain(named), signed}
	scopes, attachments, hosts := podmanpolicy.PolicyTransportScopes{}, map[string]any{}, map[string]bool{}
	for name, r := range i.open {
		scopes[name] = podmanpolicy.PolicyRequirements{r.signed}
		attachments[name] = map[string]any{"use-sigstore-attachments": true}
		hosts[r.registry] = true
	}
	p.Transports["docker"] = scopes
	policyJSON, err := json.MarshalIndent(p, "", "  ")
	if err != nil {
		return err
	}
	// JSON is YAML. Without this file Podman would not look for signatures.
	registries, err := json.MarshalIndent(map[string]any{"docker": attachments}, "", "  ")
	if err != nil {
		return err
	}
	if err := i.trustRegistries(hosts); err != nil {
		return err
	}
	if err := i.write(registriesFile, registries); err != nil {
		return err
	}
	i.policyMu.Lock()
	defer i.policyMu.Unlock()
	if err := i.write(policyFile, policyJSON); err != nil {
		return err
	}
	i.policy = policyJSON
	return nil
}

// ErrPolicy says that Podman's policy is another one than was written.
var ErrPolicy = errors.New("it is not what the agent wrote")

// CheckPolicy compares Podman's policy with what was written there last. A
// requirement that was loosened for the runtime's own repository shows here
// alone: no image of another one can be offered to it. The error is [ErrPolicy],
// or about the file. It is nil, false as long as nothing was written.
func (i *Images) CheckPolicy() (written bool, err error) {
	i.policyMu.Lock()
	defer i.policyMu.Unlock()
	if i.policy == nil {
		return false, nil
	}
	now, err := durable.ReadOwn(filepath.Join(i.dir, policyFile), int64(len(i.policy)))
	if errors.Is(err, durable.ErrLarge) || err == nil && !bytes.Equal(now, i.policy) {
		err = ErrPolicy
	}
	return true, err
}

// trustRegistries writes the private authority for these registries, and removes
// what an earlier configuration has left.
func (i *Images) trustRegistries(hosts map[string]bool) error {
	entries, err := os.ReadDir(filepath.Join(i.dir, certsDir))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	for _, e := range entries {
		if !hosts[e.Name()] || len(i.ca) == 0 {
			if err := os.RemoveAll(filepath.Join(i.dir, certsDir, e.Name())); err != nil {
				return err
			}
		}
	}
	if len(i.ca) == 0 {
		return nil
	}
	for host := range hosts {
		if err := i.write(filepath.Join(certsDir, host, "ca.crt"), i.ca); err != nil {
			return err
		}
	}
	return nil
}

// write replaces a file, unless it has this content.
func (i *Images) write(file string, data []byte) error {
	file = filepath.Join(i.dir, file)
	if old, err := durable.ReadOwn(file, int64(len(data))); err == nil && bytes.Equal(old, data) {
		return nil
	}
	if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
		return err
	}
	failpoint.Here("image.write.begin")
	return durable.WriteFile(file, data, 0o600)
}

// entry is what is kept of an image that was trusted: the signatures, so that
// they can be checked again without the registry, what it came to on this machine,
// and whose image it is.
type entry struct {
	Image      snapshot.ImageRef `json:"image"`
	Manifest   digest.Digest     `json:"manifest"`          // Image's own, or that of this platform if Image is an index
	Foreign    bool              `json:"foreign,omitempty"` // it was here before
	Signatures []attached        `json:"signatures"`        // the newest first; networks that share an image may trust different ones
}

// maxKept bounds the signatures that are kept of an image: one for each network
// that a node may be in.
const maxKept = 8

// maxRecord bounds what is kept of an image, in bytes: each signature with its texts.
const maxRecord = maxKept * 2 * maxBundle

// judge is [trust.judge] of all signatures: one that is trusted is enough. Without
// one the error is about each.
func (e *entry) judge(ctx context.Context, t *trust) error {
	errs := []error{ErrUnsigned}
	for i := range e.Signatures[:min(len(e.Signatures), maxKept)] {
		err := t.judge(ctx, &e.Signatures[i], e.Image)
		if err == nil {
			return nil
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// add puts a signature first. It is in there once.
func (e *entry) add(a *attached) {
	raw, err := json.Marshal(a) // spaces in a bundle are not those that were found
	others := slices.DeleteFunc(e.Signatures, func(b attached) bool {
		kept, keptErr := json.Marshal(b)
		return err == nil && keptErr == nil && bytes.Equal(raw, kept)
	})
	e.Signatures = append([]attached{*a}, others[:min(len(others), maxKept-1)]...)
}

// recordName has no part of the reference in it: what is a name for a registry
// need not be one for a file system.
func recordName(ref snapshot.ImageRef) string {
	return filepath.Join(records, digest.Of([]byte(ref.String())).Hex()+".json")
}

// record returns what is kept of ref. It proves nothing before it is checked.
func (i *Images) record(ref snapshot.ImageRef) (entry, bool) {
	e, err := readEntry(filepath.Join(i.dir, recordName(ref)))
	if err != nil || e.Image != ref {
		return entry{Image: ref}, false
	}
	return e, true
}

func readEntry(file string) (entry, error) {
	raw, err := durable.ReadOwn(file, maxRecord)
	if err != nil {
		return entry{}, err
	}
	var e entry
	if err := json.Unmarshal(raw, &e); err != nil {
		return entry{}, fmt.Errorf("%s: %w", file, err)
	}
	return e, nil
}

func (i *Images) keep(ref snapshot.ImageRef, e entry) error {
	raw, err := json.Marshal(e)
	if err != nil {
		return err
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.write(recordName(ref), raw)
}

func (i *Images) forget(ref snapshot.ImageRef) error {
	i.mu.Lock()
	defer i.mu.Unlock()
	err := os.Remove(filepath.Join(i.dir, recordName(ref)))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// allRecords returns all records; what is none is removed.
func (i *Images) allRecords() ([]entry, error) {
	i.mu.Lock() // else one that is being written would be none
	defer i.mu.Unlock()
	files, err := filepath.Glob(filepath.Join(i.dir, records, "*"))
	if err != nil {
		return nil, err
	}
	var out []entry
	for _, f := range files {
		e, err := readEntry(f)
		if err != nil || recordName(e.Image) != filepath.Join(records, filepath.Base(f)) {
			if err := os.Remove(f); err != nil {
				return nil, err
			}
			continue
		}
		out = append(out, e)
	}
	return out, nil
}
