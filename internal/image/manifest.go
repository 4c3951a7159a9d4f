package image

import (
	"encoding/json"
	"fmt"
	"strings"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"go.podman.io/image/v5/manifest"

	"github.com/resultity/node/internal/digest"
)

// maxPlatforms bounds the images of an index.
const maxPlatforms = 256

// resolve returns the digest of the manifest that this machine gets when it asks
// for at: of the image itself, or of the one for this platform where at is an
// index. Podman's own code chooses, so that Podman chooses the same.
func resolve(at name.Digest, opts []remote.Option) (d digest.Digest, err error) {
	raw, kind, err := readManifest(at, opts)
	if err != nil {
		return d, err
	}
	if !types.MediaType(kind).IsIndex() {
		return digest.Parse(at.DigestStr())
	}
	list, err := manifest.ListFromBlob(raw, kind)
	if err != nil {
		return d, fmt.Errorf("%w: %w", ErrManifest, err)
	}
	if n := len(list.Instances()); n > maxPlatforms {
		return d, fmt.Errorf("%w: an index of %d images, at most %d are looked at", ErrManifest, n, maxPlatforms)
	}
	chosen, err := list.ChooseInstance(nil)
	if err != nil {
		return d, fmt.Errorf("%w: %w", ErrPlatform, err)
	}
	if d, err = digest.Parse(chosen.String()); err != nil {
		return d, fmt.Errorf("%w: %w", ErrManifest, err)
	}
	_, kind, err = readManifest(at.Digest(d.String()), opts)
	if err == nil && types.MediaType(kind).IsIndex() {
		err = fmt.Errorf("%w: an index inside of an index", ErrManifest)
	}
	return d, err
}

// readManifest returns a manifest as it is stored, and its media type, after it
// has been made sure that the bytes are those of the digest and can be read in
// one way only.
func readManifest(at name.Digest, opts []remote.Option) ([]byte, string, error) {
	d, err := remote.Get(at, opts...)
	switch {
	case err != nil && strings.Contains(err.Error(), "does not match requested digest"): // it has no type
		return nil, "", fmt.Errorf("%w: %w", ErrOtherBytes, err)
	case err != nil:
		return nil, "", fmt.Errorf("asking the registry for the manifest: %w", err)
	}
	said := string(d.MediaType)
	var m struct {
		SchemaVersion int               `json:"schemaVersion"`
		MediaType     string            `json:"mediaType"`
		Manifests     []json.RawMessage `json:"manifests"`
		Config        json.RawMessage   `json:"config"`
		Layers        []json.RawMessage `json:"layers"`
		FSLayers      json.RawMessage   `json:"fsLayers"`
	}
	if err := json.Unmarshal(d.Manifest, &m); err != nil {
		return nil, "", fmt.Errorf("%w: %w", ErrManifest, err)
	}
	var index bool
	switch d.MediaType {
	case types.OCIManifestSchema1, types.DockerManifestSchema2:
	case types.OCIImageIndex, types.DockerManifestList:
		index = true
	default:
		return nil, "", fmt.Errorf("%w: the registry calls it %.100q", ErrManifest, said)
	}
	switch {
	case m.SchemaVersion != 2 || m.FSLayers != nil:
		return nil, "", fmt.Errorf("%w: schema version is %d, want 2", ErrManifest, m.SchemaVersion)
	case m.MediaType != "" && m.MediaType != said:
		return nil, "", fmt.Errorf("%w: it calls itself %.100q, and the registry %.100q", ErrManifest, m.MediaType, said)
	case index && (m.Config != nil || m.Layers != nil) || !index && m.Manifests != nil:
		return nil, "", fmt.Errorf("%w: it is an image and an index at once", ErrManifest)
	}
	return d.Manifest, said, nil
}
