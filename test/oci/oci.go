// Package oci pushes images to a registry and signs them, for tests and the
// demo.
//
// What it writes is what `cosign sign` writes: the classic signature, which
// Podman's policy and cosign read, and the bundle of newer cosigns. No
// transparency log is asked, and nothing but the registry is reached.
//
// The rule it keeps: an image is referred to by digest, never by a tag. A
// registry is only spoken to over TLS, and only if its certificate leads to
// the given authorities.
package oci

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"fmt"
	"net/http"
	"runtime"
	"strings"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/sigstore/cosign/v2/pkg/cosign/bundle"
	"github.com/sigstore/cosign/v2/pkg/oci"
	comutate "github.com/sigstore/cosign/v2/pkg/oci/mutate"
	coremote "github.com/sigstore/cosign/v2/pkg/oci/remote"
	costatic "github.com/sigstore/cosign/v2/pkg/oci/static"
	cotypes "github.com/sigstore/cosign/v2/pkg/types"
	"github.com/sigstore/sigstore/pkg/signature"
	"github.com/sigstore/sigstore/pkg/signature/dsse"
	"github.com/sigstore/sigstore/pkg/signature/options"
	"github.com/sigstore/sigstore/pkg/signature/payload"

	"github.com/resultity/node/packaging/images"
)

// A Registry is a container registry, spoken to over TLS. Its methods may be
// called concurrently.
type Registry struct {
	host string
	tr   *http.Transport
}

// NewRegistry returns the registry at host, a name or address with a port. Its
// certificate must lead to one of the authorities in ca.
func NewRegistry(host string, ca *x509.CertPool) *Registry {
	tr := remote.DefaultTransport.(*http.Transport).Clone()
	tr.Proxy = nil // a registry of a test is never behind one
	tr.TLSClientConfig = &tls.Config{RootCAs: ca, MinVersion: tls.VersionTLS12}
	return &Registry{host: host, tr: tr}
}

// Close drops idle connections.
func (r *Registry) Close() { r.tr.CloseIdleConnections() }

// Options are for callers that ask the registry themselves.
func (r *Registry) Options(ctx context.Context) []remote.Option {
	return []remote.Option{
		remote.WithContext(ctx),
		remote.WithTransport(tlsOnly{r.tr}),
		remote.WithRetryBackoff(remote.Backoff{Duration: 100 * time.Millisecond, Factor: 2, Steps: 3}),
	}
}

// tlsOnly keeps the client library from trying again without TLS, as it does
// with registries in private networks.
type tlsOnly struct{ rt http.RoundTripper }

func (t tlsOnly) RoundTrip(req *http.Request) (*http.Response, error) {
	if req.URL.Scheme != "https" {
		return nil, fmt.Errorf("registry %s: refusing to go on without TLS", req.URL.Host)
	}
	return t.rt.RoundTrip(req)
}

// Push writes the image into the repository, a path without host, and returns
// its reference by digest. What the registry has already is not sent again.
func (r *Registry) Push(ctx context.Context, repo string, img v1.Image) (name.Digest, error) {
	rp, err := name.NewRepository(r.host + "/" + repo)
	if err != nil {
		return name.Digest{}, err
	}
	d, err := img.Digest()
	if err != nil {
		return name.Digest{}, err
	}
	ref := rp.Digest(d.String())
	if err := remote.Write(ref, img, r.Options(ctx)...); err != nil {
		return name.Digest{}, fmt.Errorf("pushing %s: %w", ref, err)
	}
	return ref, nil
}

// PushLayout is [Registry.Push] of the only image in an OCI layout directory.
func (r *Registry) PushLayout(ctx context.Context, repo, dir string) (name.Digest, error) {
	img, err := Layout(dir)
	if err != nil {
		return name.Digest{}, err
	}
	return r.Push(ctx, repo, img)
}

// Layout returns the only image in an OCI layout directory.
func Layout(dir string) (v1.Image, error) {
	idx, err := layout.ImageIndexFromPath(dir)
	if err != nil {
		return nil, err
	}
	m, err := idx.IndexManifest()
	if err != nil {
		return nil, err
	}
	if len(m.Manifests) != 1 {
		return nil, fmt.Errorf("%s holds %d images, want one", dir, len(m.Manifests))
	}
	return idx.Image(m.Manifests[0].Digest)
}

// Single returns an image of one static program, /name, beside the places
// that a runtime image must have. It is for images that must be refused, and
// for stand-ins of an engine. The same program gives the same digest.
func Single(program string, content []byte) (v1.Image, error) {
	if program == "" || strings.ContainsAny(program, "/\x00") {
		return nil, fmt.Errorf("bad program name %q", program)
	}
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	at := time.Unix(0, 0)
	dir := func(name string, mode int64) tar.Header {
		return tar.Header{Name: strings.TrimPrefix(name, "/") + "/", Typeflag: tar.TypeDir, Mode: mode, ModTime: at}
	}
	for _, f := range []struct {
		h tar.Header
		b []byte
	}{
		{dir("dev", 0o755), nil}, {dir("etc", 0o755), nil}, {dir("proc", 0o755), nil}, {dir("run", 0o755), nil},
		{dir("sys", 0o755), nil}, {dir("tmp", 0o1777), nil}, {dir("var", 0o755), nil}, {dir("var/tmp", 0o1777), nil},
		{dir(images.ModelsDir, 0o755), nil}, {dir(images.SocketDir, 0o755), nil},
		{tar.Header{Name: strings.TrimPrefix(images.BridgeFile, "/"), Typeflag: tar.TypeReg, Mode: 0o644, ModTime: at}, nil},
		{tar.Header{Name: program, Typeflag: tar.TypeReg, Mode: 0o755, ModTime: at, Size: int64(len(content))}, content},
	} {
		if err := w.WriteHeader(&f.h); err != nil {
			return nil, err
		}
		if _, err := w.Write(f.b); err != nil {
			return nil, err
		}
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	img := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	img, err := mutate.AppendLayers(img, static.NewLayer(b.Bytes(), types.OCIUncompressedLayer))
	if err != nil {
		return nil, err
	}
	cf, err := img.ConfigFile()
	if err != nil {
		return nil, err
	}
	cf = cf.DeepCopy()
	cf.OS, cf.Architecture = "linux", runtime.GOARCH
	cf.Config = v1.Config{User: images.User, WorkingDir: "/", Entrypoint: []string{"/" + program}}
	return mutate.ConfigFile(img, cf)
}

// A Key signs images. It lives in memory only.
type Key struct {
	signer *signature.ECDSASignerVerifier
}

// NewKey makes a key of the kind that `cosign generate-key-pair` makes.
func NewKey() (*Key, error) {
	priv, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	sv, err := signature.LoadECDSASignerVerifier(priv, crypto.SHA256)
	if err != nil {
		return nil, err
	}
	return &Key{sv}, nil
}

// PublicPEM returns the public half, as cosign.pub has it.
func (k *Key) PublicPEM() ([]byte, error) {
	pub, err := k.signer.PublicKey()
	if err != nil {
		return nil, err
	}
	der, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil {
		return nil, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}), nil
}

// Sign adds a classic signature to those that the image has: one more layer of
// the image under the tag sha256-DIGEST.sig.
func (r *Registry) Sign(ctx context.Context, ref name.Digest, k *Key) error {
	body, err := (payload.Cosign{Image: ref}).MarshalJSON()
	if err != nil {
		return err
	}
	return r.attach(ctx, ref, body, k)
}

// SignAs signs the image with a payload that names another image. No verifier
// may take that for a signature of either.
func (r *Registry) SignAs(ctx context.Context, ref, other name.Digest, k *Key) error {
	body, err := (payload.Cosign{Image: other}).MarshalJSON()
	if err != nil {
		return err
	}
	return r.attach(ctx, ref, body, k)
}

func (r *Registry) attach(ctx context.Context, ref name.Digest, body []byte, k *Key) error {
	sig, err := k.signer.SignMessage(bytes.NewReader(body), options.WithContext(ctx))
	if err != nil {
		return err
	}
	layer, err := costatic.NewSignature(body, base64.StdEncoding.EncodeToString(sig))
	if err != nil {
		return err
	}
	return r.attachLayer(ctx, ref, layer)
}

func (r *Registry) attachLayer(ctx context.Context, ref name.Digest, layer oci.Signature) error {
	opts := coremote.WithRemoteOptions(r.Options(ctx)...)
	img, err := coremote.SignedEntity(ref, opts)
	if err != nil {
		return fmt.Errorf("signing %s: %w", ref, err)
	}
	signed, err := comutate.AttachSignatureToEntity(img, layer)
	if err != nil {
		return fmt.Errorf("signing %s: %w", ref, err)
	}
	if err := coremote.WriteSignatures(ref.Repository, signed, opts); err != nil {
		return fmt.Errorf("writing the signature of %s: %w", ref, err)
	}
	return nil
}

// SignBundle adds a signature in the bundle format that cosign 3 writes by
// default: a signed statement about the image's digest, which refers to the
// image as its subject.
func (r *Registry) SignBundle(ctx context.Context, ref name.Digest, k *Key) error {
	body, err := statement(ref)
	if err != nil {
		return err
	}
	env, err := dsse.WrapSigner(k.signer, cotypes.IntotoPayloadType).SignMessage(bytes.NewReader(body), options.WithContext(ctx))
	if err != nil {
		return err
	}
	pub, err := k.signer.PublicKey()
	if err != nil {
		return err
	}
	pubPEM, err := k.PublicPEM()
	if err != nil {
		return err
	}
	b, err := bundle.MakeNewBundle(pub, nil, body, env, pubPEM, nil)
	if err != nil {
		return err
	}
	return r.attachBundle(ctx, ref, b)
}
