package oci

import (
	"bytes"
	"context"
	"crypto/x509"
	"errors"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/sigstore/cosign/v2/pkg/cosign"
	coremote "github.com/sigstore/cosign/v2/pkg/oci/remote"
	"github.com/sigstore/sigstore-go/pkg/root"
	"github.com/sigstore/sigstore/pkg/cryptoutils"
	"github.com/sigstore/sigstore/pkg/signature"

	"github.com/resultity/node/test/oci/ocitest"
)

// setup returns a registry with two images in it.
func setup(t *testing.T) (r *Registry, a, b name.Digest) {
	t.Helper()
	srv := ocitest.Serve(t)
	r = NewRegistry(srv.Host, srv.CA)
	t.Cleanup(r.Close)
	return r, push(t, r, "runtime", single(t, "a")), push(t, r, "runtime", single(t, "b"))
}

func single(t *testing.T, content string) v1.Image {
	t.Helper()
	img, err := Single("program", []byte(content))
	if err != nil {
		t.Fatal(err)
	}
	return img
}

func push(t *testing.T, r *Registry, repo string, img v1.Image) name.Digest {
	t.Helper()
	ref, err := r.Push(t.Context(), repo, img)
	if err != nil {
		t.Fatal(err)
	}
	return ref
}

func key(t *testing.T) *Key {
	t.Helper()
	k, err := NewKey()
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// verifier is the key as somebody sees it who only has its public file.
func verifier(t *testing.T, k *Key) signature.Verifier {
	t.Helper()
	b, err := k.PublicPEM()
	if err != nil {
		t.Fatal(err)
	}
	pub, err := cryptoutils.UnmarshalPEMToPublicKey(b)
	if err != nil {
		t.Fatal(err)
	}
	v, err := signature.LoadDefaultVerifier(pub)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// verify asks cosign whether the image has a classic signature of the key.
func verify(t *testing.T, r *Registry, ref name.Digest, k *Key) error {
	t.Helper()
	sigs, _, err := cosign.VerifyImageSignatures(t.Context(), ref, &cosign.CheckOpts{
		RegistryClientOpts: []coremote.Option{coremote.WithRemoteOptions(r.Options(t.Context())...)},
		SigVerifier:        verifier(t, k),
		ClaimVerifier:      cosign.SimpleClaimVerifier,
		IgnoreTlog:         true,
		Offline:            true,
	})
	if err == nil && len(sigs) == 0 {
		t.Error("cosign verified nothing and gave no error")
	}
	return err
}

// verifyBundle asks the same about a bundle.
func verifyBundle(t *testing.T, r *Registry, ref name.Digest, k *Key) error {
	t.Helper()
	_, ok, err := cosign.VerifyImageAttestations(t.Context(), ref, &cosign.CheckOpts{
		RegistryClientOpts: []coremote.Option{coremote.WithRemoteOptions(r.Options(t.Context())...)},
		SigVerifier:        verifier(t, k),
		TrustedMaterial:    &root.BaseTrustedMaterial{},
		NewBundleFormat:    true,
		IgnoreTlog:         true,
		Offline:            true,
	})
	if err == nil && !ok {
		t.Error("cosign verified no bundle and gave no error")
	}
	return err
}

func TestPush(t *testing.T) {
	r, a, _ := setup(t)
	img := single(t, "a")
	want, err := img.Digest()
	if err != nil {
		t.Fatal(err)
	}
	if a.DigestStr() != want.String() {
		t.Errorf("pushed as %s, want %s", a.DigestStr(), want)
	}
	desc, err := remote.Get(a, r.Options(t.Context())...)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := img.RawManifest()
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(desc.Manifest, raw) {
		t.Errorf("the registry has the manifest %s, want %s", desc.Manifest, raw)
	}

	dir := t.TempDir()
	p, err := layout.Write(dir, empty.Index)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.PushLayout(t.Context(), "other", dir); err == nil {
		t.Error("a layout without an image: no error")
	}
	if err := p.AppendImage(img); err != nil {
		t.Fatal(err)
	}
	ref, err := r.PushLayout(t.Context(), "other", dir)
	if err != nil {
		t.Fatal(err)
	}
	if ref.DigestStr() != want.String() || ref.RepositoryStr() != "other" {
		t.Errorf("pushed as %s, want other@%s", ref, want)
	}
	if err := p.AppendImage(single(t, "b")); err != nil {
		t.Fatal(err)
	}
	if _, err := Layout(dir); err == nil {
		t.Error("a layout with two images: no error")
	}
}

// TestTLS makes sure that only the registry with the right certificate is
// spoken to, and no registry without TLS.
func TestTLS(t *testing.T) {
	srv := ocitest.Serve(t)
	r := NewRegistry(srv.Host, x509.NewCertPool())
	t.Cleanup(r.Close)
	if _, err := r.Push(t.Context(), "runtime", single(t, "a")); err == nil {
		t.Error("a certificate that nobody vouches for: no error")
	} else if _, ok := errors.AsType[x509.UnknownAuthorityError](err); !ok && !strings.Contains(err.Error(), "without TLS") {
		t.Errorf("error %v, want an unknown authority", err)
	}

	asked := make(chan struct{}, 100)
	plain := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { asked <- struct{}{} }))
	t.Cleanup(plain.Close)
	u, err := url.Parse(plain.URL)
	if err != nil {
		t.Fatal(err)
	}
	r = NewRegistry(u.Host, srv.CA)
	t.Cleanup(r.Close)
	if _, err := r.Push(t.Context(), "runtime", single(t, "a")); err == nil {
		t.Error("a registry without TLS: no error")
	}
	if len(asked) > 0 {
		t.Error("a request went out without TLS")
	}
}

func TestPushCancelled(t *testing.T) {
	srv := ocitest.Serve(t)
	r := NewRegistry(srv.Host, srv.CA)
	t.Cleanup(r.Close)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := r.Push(ctx, "runtime", single(t, "a")); !errors.Is(err, context.Canceled) {
		t.Errorf("error %v, want that it was cancelled", err)
	}
}

func TestSign(t *testing.T) {
	r, a, b := setup(t)
	first, second, stranger := key(t), key(t), key(t)
	if err := verify(t, r, a, first); err == nil {
		t.Error("an image without a signature verifies")
	}
	for _, k := range []*Key{first, second} {
		if err := r.Sign(t.Context(), a, k); err != nil {
			t.Fatal(err)
		}
	}
	for i, k := range []*Key{first, second} {
		if err := verify(t, r, a, k); err != nil {
			t.Errorf("key %d: %v", i, err)
		}
	}
	if err := verify(t, r, a, stranger); err == nil {
		t.Error("the image verifies with a key that did not sign it")
	}
	if err := verify(t, r, b, first); err == nil {
		t.Error("an image verifies with the signature of another")
	}
	if err := r.SignAs(t.Context(), b, a, first); err != nil {
		t.Fatal(err)
	}
	if err := verify(t, r, b, first); err == nil {
		t.Error("an image verifies with a payload that names another")
	}

	// The place and the form that Podman's policy looks for.
	tag := a.Tag(strings.Replace(a.DigestStr(), ":", "-", 1) + ".sig")
	img, err := remote.Image(tag, r.Options(t.Context())...)
	if err != nil {
		t.Fatal(err)
	}
	m, err := img.Manifest()
	if err != nil {
		t.Fatal(err)
	}
	if len(m.Layers) != 2 {
		t.Fatalf("%d signatures, want 2", len(m.Layers))
	}
	for _, l := range m.Layers {
		if l.MediaType != "application/vnd.dev.cosign.simplesigning.v1+json" || l.Annotations["dev.cosignproject.cosign/signature"] == "" {
			t.Errorf("signature layer is %s with %v", l.MediaType, l.Annotations)
		}
	}

	gone := a.Digest("sha256:" + strings.Repeat("0", 64))
	if err := r.Sign(t.Context(), gone, first); err == nil {
		t.Error("signing an image that is not there: no error")
	}
}

func TestSignBundle(t *testing.T) {
	r, a, b := setup(t)
	first, stranger := key(t), key(t)
	if err := verifyBundle(t, r, a, first); err == nil {
		t.Error("an image without a bundle verifies")
	}
	if err := r.SignBundle(t.Context(), a, first); err != nil {
		t.Fatal(err)
	}
	if err := verifyBundle(t, r, a, first); err != nil {
		t.Errorf("verify: %v", err)
	}
	if err := verifyBundle(t, r, a, stranger); err == nil {
		t.Error("the image verifies with a key that did not sign it")
	}
	if err := verifyBundle(t, r, b, first); err == nil {
		t.Error("an image verifies with the bundle of another")
	}
}

func TestSingle(t *testing.T) {
	one, err := single(t, "a").Digest()
	if err != nil {
		t.Fatal(err)
	}
	two, err := single(t, "a").Digest()
	if err != nil {
		t.Fatal(err)
	}
	if one != two {
		t.Errorf("one program gives %s and %s", one, two)
	}
	for _, bad := range []string{"", "a/b", "/a"} {
		if _, err := Single(bad, nil); err == nil {
			t.Errorf("program name %q: no error", bad)
		}
	}
}
