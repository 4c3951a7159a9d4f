package image

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync/atomic"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/sigstore/cosign/v2/pkg/cosign"
	"github.com/sigstore/cosign/v2/pkg/oci"
	ociremote "github.com/sigstore/cosign/v2/pkg/oci/remote"
	"github.com/sigstore/cosign/v2/pkg/oci/static"
	"github.com/sigstore/cosign/v2/pkg/types"
	"github.com/sigstore/sigstore-go/pkg/bundle"
	"github.com/sigstore/sigstore-go/pkg/root"
	"github.com/sigstore/sigstore-go/pkg/verify"
	"github.com/sigstore/sigstore/pkg/signature"
	"github.com/sigstore/sigstore/pkg/signature/payload"

	"github.com/resultity/node/internal/snapshot"
)

// Bounds on what a registry may have us read. Whoever may write to it may put
// anything beside an image.
const (
	maxSignatures = 100
	maxPayload    = 64 << 10 // a classic signature's
	maxBundle     = 1 << 20
	maxTalk       = 64 << 20 // bytes of all answers in one check
)

// attached is a signature as it lies beside an image: classic, which is a
// payload and its signature in base64, or a bundle.
type attached struct {
	Payload   []byte          `json:"payload,omitempty"`
	Signature string          `json:"signature,omitempty"`
	Bundle    json.RawMessage `json:"bundle,omitempty"`
}

// check verifies that one of the keys has signed ref. It asks nobody.
func (a *attached) check(ctx context.Context, ref snapshot.ImageRef, keys []signature.Verifier) error {
	errs := make([]error, len(keys))
	for n, k := range keys {
		if a.Bundle != nil {
			errs[n] = checkBundle(a.Bundle, ref, k)
		} else {
			errs[n] = checkClassic(ctx, a, ref, k)
		}
		if errs[n] == nil {
			return nil
		}
	}
	return worst(errs)
}

// checkClassic has cosign verify a signature with a key, and then its claims:
// the digest, and also the repository, which cosign leaves to its caller.
func checkClassic(ctx context.Context, a *attached, ref snapshot.ImageRef, key signature.Verifier) error {
	sig, err := static.NewSignature(a.Payload, a.Signature)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrWrongKey, err)
	}
	h := v1.Hash{Algorithm: "sha256", Hex: ref.Digest().Hex()}
	var claim error
	_, err = cosign.VerifyImageSignature(ctx, sig, h, &cosign.CheckOpts{
		SigVerifier: key,
		IgnoreTlog:  true, // the key is the network's own; no log knows it
		Offline:     true,
		// Called only for what the key has signed.
		ClaimVerifier: func(sig oci.Signature, h v1.Hash, annotations map[string]any) error {
			if cosign.SimpleClaimVerifier(sig, h, annotations) != nil {
				claim = ErrOtherDigest
			} else {
				claim = checkIdentity(a.Payload, ref)
			}
			return claim
		},
	})
	switch {
	case claim != nil:
		return claim
	case err != nil:
		return fmt.Errorf("%w: %w", ErrWrongKey, err)
	}
	return nil
}

// checkIdentity compares the repository in a payload with ref's.
func checkIdentity(raw []byte, ref snapshot.ImageRef) error {
	var p payload.SimpleContainerImage
	if err := json.Unmarshal(raw, &p); err != nil {
		return fmt.Errorf("%w: %w", ErrIdentity, err)
	}
	if p.Critical.Type != payload.CosignSignatureType {
		return fmt.Errorf("%w: it is a %.80q", ErrIdentity, p.Critical.Type)
	}
	want, err := name.NewRepository(ref.Repository())
	if err != nil {
		return fmt.Errorf("%w: %w", ErrIdentity, err)
	}
	// Cosign writes the repository; some signers add the tag that they pushed.
	got, err := name.ParseReference(p.Critical.Identity.DockerReference)
	if err != nil || got.Context().Name() != want.Name() {
		return fmt.Errorf("%w: signed is %.200q", ErrIdentity, p.Critical.Identity.DockerReference)
	}
	return nil
}

// checkBundle verifies a statement of cosign's newer format. It names the image
// by digest alone; the repository is the configuration's word, and Podman's
// policy asks for it, too.
func checkBundle(raw []byte, ref snapshot.ImageRef, key signature.Verifier) error {
	var b bundle.Bundle
	if err := b.UnmarshalJSON(raw); err != nil {
		return fmt.Errorf("%w: %w", ErrWrongKey, err)
	}
	always := root.NewExpiringKey(key, time.Time{}, time.Time{})
	v, err := verify.NewVerifier(root.NewTrustedPublicKeyMaterial(func(string) (root.TimeConstrainedVerifier, error) {
		return always, nil
	}), verify.WithNoObserverTimestamps())
	if err != nil {
		return err
	}
	// The signature first, so that a signed statement about something else is
	// told from one that somebody else has signed.
	if _, err := v.Verify(&b, verify.NewPolicy(verify.WithoutArtifactUnsafe(), verify.WithKey())); err != nil {
		return fmt.Errorf("%w: %w", ErrWrongKey, err)
	}
	sum := ref.Digest().Sum()
	r, err := v.Verify(&b, verify.NewPolicy(verify.WithArtifactDigest("sha256", sum[:]), verify.WithKey()))
	if err != nil {
		return fmt.Errorf("%w: %w", ErrOtherDigest, err)
	}
	// The same key may sign other statements about an image, such as what is in
	// it. None of them says that it may be run.
	if r.Statement == nil || r.Statement.GetPredicateType() != types.CosignSignPredicateType {
		return fmt.Errorf("%w: a statement of another kind about it is", ErrUnsigned)
	}
	return nil
}

// worst picks the error that says most: what the keys have signed wrongly
// before what others have signed.
func worst(errs []error) error {
	for _, kind := range []error{ErrOtherDigest, ErrIdentity, ErrUnsigned, ErrWrongKey} {
		for _, err := range errs {
			if errors.Is(err, kind) {
				return err
			}
		}
	}
	return errors.Join(errs...)
}

// find looks in the registry for a signature of ref by one of the keys. A
// classic one is preferred: Podman reads no other.
func (i *Images) find(ctx context.Context, ref snapshot.ImageRef, keys []signature.Verifier) (*attached, error) {
	ctx, cancel := context.WithTimeout(ctx, checkTimeout)
	defer cancel()
	ctx, stalled := context.WithCancelCause(ctx)
	defer stalled(nil)
	quiet := time.AfterFunc(i.stall, func() { stalled(errStalled) })
	defer quiet.Stop()
	at, err := name.NewDigest(ref.String(), name.StrictValidation)
	if err != nil {
		return nil, err
	}
	opts := []remote.Option{
		remote.WithContext(ctx),
		remote.WithTransport(&careful{next: i.transport, heard: func() { quiet.Reset(i.stall) }}),
		remote.WithAuthFromKeychain(authn.DefaultKeychain),
		remote.WithUserAgent("resultity-node"),
	}
	var unread, bad []error
	for _, list := range []func(name.Digest, []remote.Option) ([]*attached, error){classics, bundles} {
		found, err := list(at, opts)
		if err != nil {
			unread = append(unread, err)
		}
		for _, a := range found {
			err := a.check(ctx, ref, keys)
			if err == nil {
				return a, nil
			}
			bad = append(bad, err)
		}
	}
	switch {
	case errors.Is(context.Cause(ctx), errStalled):
		return nil, fmt.Errorf("asking the registry for signatures: %w for %v", errStalled, i.stall)
	case unread != nil: // one of them might have been it
		return nil, fmt.Errorf("asking the registry for signatures: %w", errors.Join(unread...))
	case bad != nil:
		return nil, worst(bad)
	}
	return nil, ErrUnsigned
}

// classics returns the signatures under the tag that cosign derives from the
// digest, also with an error about others.
func classics(at name.Digest, opts []remote.Option) ([]*attached, error) {
	tag, err := ociremote.SignatureTag(at, ociremote.WithRemoteOptions(opts...))
	if err != nil {
		return nil, err
	}
	sigs, err := ociremote.Signatures(tag, ociremote.WithRemoteOptions(opts...))
	if err != nil {
		return nil, err
	}
	all, err := sigs.Get()
	if err != nil {
		return nil, err
	}
	var out []*attached
	var errs []error
	for _, s := range all[:min(len(all), maxSignatures)] {
		b64, err := s.Base64Signature()
		if err != nil || b64 == "" {
			continue // something else in the same place
		}
		// Not Payload, which would unpack without bound.
		switch raw, err := readLayer(s, maxPayload); {
		case errors.Is(err, errTooLarge):
		case err != nil:
			errs = append(errs, err)
		default:
			out = append(out, &attached{Payload: raw, Signature: b64})
		}
	}
	return out, errors.Join(errs...)
}

// bundles returns the signatures that refer to the image as their subject, also
// with an error about others.
func bundles(at name.Digest, opts []remote.Option) ([]*attached, error) {
	index, err := ociremote.Referrers(at, "", ociremote.WithRemoteOptions(opts...))
	if err != nil {
		return nil, err
	}
	var out []*attached
	var errs []error
	// What the index says of their types is not the same with all registries.
	for _, d := range index.Manifests[:min(len(index.Manifests), maxSignatures)] {
		if d.MediaType.IsIndex() {
			continue
		}
		img, err := remote.Image(at.Digest(d.Digest.String()), opts...)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		layers, err := img.Layers()
		if err != nil {
			errs = append(errs, err)
			continue
		}
		if len(layers) != 1 {
			continue
		}
		if mt, err := layers[0].MediaType(); err != nil || !strings.HasPrefix(string(mt), "application/vnd.dev.sigstore.bundle") {
			continue
		}
		switch raw, err := readLayer(layers[0], maxBundle); {
		case errors.Is(err, errTooLarge):
		case err != nil:
			errs = append(errs, err)
		default:
			out = append(out, &attached{Bundle: raw})
		}
	}
	return out, errors.Join(errs...)
}

// errTooLarge says that something cannot be a signature.
var errTooLarge = errors.New("too large for a signature")

// readLayer reads a small layer as it is stored.
func readLayer(l v1.Layer, most int64) ([]byte, error) {
	r, err := l.Compressed()
	if err != nil {
		return nil, err
	}
	defer r.Close() // only read from
	var b bytes.Buffer
	n, err := io.Copy(&b, io.LimitReader(r, most+1))
	if err != nil {
		return nil, err
	}
	if n > most {
		return nil, errTooLarge
	}
	return b.Bytes(), nil
}

var errStalled = errors.New("the registry has said nothing")

// careful keeps the registry client, which falls back to plain http with some
// names, to TLS, and bounds what it reads.
type careful struct {
	next  http.RoundTripper
	heard func() // called when something has come
	read  atomic.Int64
}

func (c *careful) RoundTrip(r *http.Request) (*http.Response, error) {
	if r.URL.Scheme != "https" {
		return nil, fmt.Errorf("registry %s: not without TLS", r.URL.Host)
	}
	resp, err := c.next.RoundTrip(r)
	if err == nil {
		c.heard()
		resp.Body = &bounded{resp.Body, c}
	}
	return resp, err
}

type bounded struct {
	io.ReadCloser
	by *careful
}

func (b *bounded) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	if n > 0 {
		b.by.heard()
	}
	if b.by.read.Add(int64(n)) > maxTalk {
		return n, fmt.Errorf("registry sent more than %d bytes about signatures", maxTalk)
	}
	return n, err
}
