package fetch

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"

	"github.com/resultity/node/internal/snapshot"
)

// ErrArtifact says that an OCI artifact is not what its digest names, or does not
// have the file.
var ErrArtifact = errors.New("artifact does not hold the file")

// maxManifest is what registries take at most, in bytes.
const maxManifest = 4 << 20

// manifestTypes are those of artifacts with files in them. Podman, RamaLama and
// Docker's model runner write the first.
const manifestTypes = "application/vnd.oci.image.manifest.v1+json, application/vnd.docker.distribution.manifest.v2+json"

// inArtifact finds the blob of f in the artifact ref, which is a file as it is: its
// digest is the file's own. It logs in as nobody, as registries want it for what is
// public.
func (x *Fetcher) inArtifact(ctx context.Context, ref string, f *File) (string, *http.Client, error) {
	d, err := snapshot.ParseImageRef(ref)
	if err != nil {
		return "", nil, permanentError{err}
	}
	repo, err := name.NewRepository(d.Repository(), name.StrictValidation)
	if err != nil {
		return "", nil, permanentError{err}
	}
	// x's own transport lets no request through that is not https, whatever the
	// library thinks of hosts near by.
	rt, err := transport.NewWithContext(ctx, repo.Registry, authn.Anonymous, x.world.Transport, []string{repo.Scope(transport.PullScope)})
	if err != nil {
		return "", nil, refusedBy(err)
	}
	c := &http.Client{Transport: rt, CheckRedirect: checkRedirect}
	base := "https://" + repo.RegistryStr() + "/v2/" + repo.RepositoryStr()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, base+"/manifests/"+d.Digest().String(), nil)
	if err != nil {
		return "", nil, permanentError{err}
	}
	req.Header.Set("Accept", manifestTypes)
	resp, err := c.Do(req)
	if err != nil {
		return "", nil, err
	}
	defer resp.Body.Close() // what was not read is not wanted
	if resp.StatusCode != http.StatusOK {
		return "", nil, refusal(resp)
	}
	raw, err := io.ReadAll(io.LimitReader(resp.Body, maxManifest+1))
	if err != nil {
		return "", nil, err
	}
	if len(raw) > maxManifest {
		return "", nil, permanentError{fmt.Errorf("%w: its manifest has more than %d bytes", ErrArtifact, maxManifest)}
	}
	if err := d.Digest().Check(raw); err != nil {
		return "", nil, permanentError{fmt.Errorf("%w: its manifest: %w", ErrArtifact, err)}
	}
	var manifest struct {
		Layers []struct {
			Digest string `json:"digest"`
			Size   int64  `json:"size"`
		} `json:"layers"`
	}
	if err := json.Unmarshal(raw, &manifest); err != nil {
		return "", nil, permanentError{fmt.Errorf("%w: its manifest: %w", ErrArtifact, err)}
	}
	for _, l := range manifest.Layers {
		if l.Digest != f.SHA256.String() {
			continue
		}
		if l.Size != f.List.Size() {
			return "", nil, permanentError{fmt.Errorf("%w: the artifact says %d bytes, the configuration %d", ErrLength, l.Size, f.List.Size())}
		}
		return base + "/blobs/" + l.Digest, c, nil
	}
	return "", nil, permanentError{fmt.Errorf("%w: none of its %d layers is %s", ErrArtifact, len(manifest.Layers), f.SHA256)}
}

// refusedBy sorts what the library says of a registry that does not let us in.
func refusedBy(err error) error {
	e, ok := errors.AsType[*transport.Error](err)
	if !ok {
		return err
	}
	said := fmt.Errorf("%w %d %s", ErrStatus, e.StatusCode, http.StatusText(e.StatusCode))
	if e.Temporary() || e.StatusCode >= 500 {
		return said
	}
	return permanentError{said}
}
