package image

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
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
	bundlelog "github.com/sigstore/cosign/v2/pkg/cosign/bundle"
	"github.com/sigstore/cosign/v2/pkg/oci"
	ociremote "github.com/sigstore/cosign/v2/pkg/oci/remote"
	"github.com/sigstore/cosign/v2/pkg/oci/static"
	"github.com/sigstore/cosign/v2/pkg/types"
	"github.com/sigstore/sigstore-go/pkg/bundle"
	"github.com/sigstore/sigstore-go/pkg/verify"
	"github.com/sigstore/sigstore/pkg/signature/payload"

	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/snapshot"
)

// Bounds on what a registry may have us read. Whoever may write to it may put
// anything beside an image.
const (
	maxSignatures = 100
	maxPayload    = 64 << 10 // a classic signature's, and each text beside it
	maxBundle     = 1 << 20
	maxAnswer     = 4 << 20  // bytes of one answer, as a manifest may have
	maxTalk       = 64 << 20 // bytes of all answers in one check
)

// attached is a signature as it lies beside an image: classic, which is a
// payload and its signature in base64, or a bundle. A classic keyless one has its
// certificate and what the log said beside it.
type attached struct {
	Payload     []byte          `json:"payload,omitempty"`
	Signature   string          `json:"signature,omitempty"`
	Certificate string          `json:"certificate,omitempty"` // PEM
	Seen        *seen           `json:"seen,omitempty"`
	Bundle      json.RawMessage `json:"bundle,omitempty"`
}

// seen is the promise of a log that it has taken up an entry, as cosign notes it.
type seen struct {
	SignedEntryTimestamp []byte
	Payload              struct {
		Body           string `json:"body"` // cosign takes any type here, and then believes that it is this one
		IntegratedTime int64  `json:"integratedTime"`
		LogIndex       int64  `json:"logIndex"`
		LogID          string `json:"logID"`
	}
}

// check verifies that one of the signers has signed ref. It asks nobody.
func (a *attached) check(ctx context.Context, ref snapshot.ImageRef, signers []*signer) (err error) {
	// Whoever may write to a registry chooses these bytes, and some of the
	// libraries that read them take more for granted than they should.
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("%w: it cannot be read: %v", ErrWrongKey, r)
		}
	}()
	if len(signers) == 0 {
		return fmt.Errorf("%w: nobody is trusted any more", ErrWrongKey)
	}
	errs := make([]error, len(signers))
	for n, s := range signers {
		if a.Bundle != nil {
			errs[n] = checkBundle(a.Bundle, ref, s)
		} else {
			errs[n] = checkClassic(ctx, a, ref, s)
		}
		if errs[n] == nil {
			return nil
		}
	}
	return worst(errs)
}

// checkClassic has cosign verify a signature, and then its claims: the digest,
// and also the repository, which cosign leaves to its caller.
func checkClassic(ctx context.Context, a *attached, ref snapshot.ImageRef, by *signer) error {
	var opts []static.Option
	if by.classic.SigVerifier == nil { // a key needs nothing but the signature
		if a.Certificate == "" || a.Seen == nil {
			return fmt.Errorf("%w: it has no certificate, or no log has seen it", ErrWrongKey)
		}
		p := a.Seen.Payload
		opts = append(opts, static.WithCertChain([]byte(a.Certificate), nil), static.WithBundle(&bundlelog.RekorBundle{
			SignedEntryTimestamp: a.Seen.SignedEntryTimestamp,
			Payload:              bundlelog.RekorPayload{Body: p.Body, IntegratedTime: p.IntegratedTime, LogIndex: p.LogIndex, LogID: p.LogID},
		}))
	}
	sig, err := static.NewSignature(a.Payload, a.Signature, opts...)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrWrongKey, err)
	}
	h := v1.Hash{Algorithm: "sha256", Hex: ref.Digest().Hex()}
	var claim error
	co := by.classic
	// Called only for what the signer has signed.
	co.ClaimVerifier = func(sig oci.Signature, h v1.Hash, annotations map[string]any) error {
		if cosign.SimpleClaimVerifier(sig, h, annotations) != nil {
			claim = ErrOtherDigest
		} else {
			claim = checkIdentity(a.Payload, ref)
		}
		return claim
	}
	_, err = cosign.VerifyImageSignature(ctx, sig, h, &co)
	switch {
	case claim != nil:
		return claim
	case err != nil && a.expired():
		return fmt.Errorf("%w: %w", ErrExpired, err)
	case err != nil:
		return fmt.Errorf("%w: %w", ErrWrongKey, err)
	}
	return nil
}

// expired reports whether a classic signature says of itself that its
// certificate was not good when the log saw it.
func (a *attached) expired() bool {
	der, ok := certificate(a.Certificate)
	if !ok || a.Seen == nil || a.Seen.Payload.IntegratedTime == 0 {
		return false
	}
	c, err := x509.ParseCertificate(der)
	at := time.Unix(a.Seen.Payload.IntegratedTime, 0)
	return err == nil && (at.Before(c.NotBefore) || at.After(c.NotAfter))
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
func checkBundle(raw []byte, ref snapshot.ImageRef, by *signer) error {
	var b bundle.Bundle
	if err := b.UnmarshalJSON(raw); err != nil {
		return fmt.Errorf("%w: %w", ErrWrongKey, err)
	}
	// The signature first, so that a signed statement about something else is
	// told from one that somebody else has signed.
	if _, err := by.bundle.Verify(&b, verify.NewPolicy(verify.WithoutArtifactUnsafe(), by.who)); err != nil {
		if bundleExpired(&b) {
			return fmt.Errorf("%w: %w", ErrExpired, err)
		}
		return fmt.Errorf("%w: %w", ErrWrongKey, err)
	}
	sum := ref.Digest().Sum()
	r, err := by.bundle.Verify(&b, verify.NewPolicy(verify.WithArtifactDigest("sha256", sum[:]), by.who))
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

// bundleExpired is [attached.expired] of a bundle.
func bundleExpired(b *bundle.Bundle) bool {
	content, err := b.VerificationContent()
	if err != nil || content.Certificate() == nil {
		return false
	}
	entries, err := b.TlogEntries()
	for _, e := range entries {
		at, c := e.IntegratedTime(), content.Certificate()
		if !at.IsZero() && (at.Before(c.NotBefore) || at.After(c.NotAfter)) {
			return err == nil
		}
	}
	return false
}

// worst picks the error that says most: what those who are or were trusted have
// signed before what others have.
func worst(errs []error) error {
	for _, kind := range []error{ErrRevoked, ErrOtherDigest, ErrIdentity, ErrExpired, ErrUnsigned, ErrWrongKey} {
		for _, err := range errs {
			if errors.Is(err, kind) {
				return err
			}
		}
	}
	return errors.Join(errs...)
}

// talk begins a conversation with a registry about ref, which ends when it stands
// still. The error of what was asked for is made better by explain.
func (i *Images) talk(ctx context.Context, ref snapshot.ImageRef) (at name.Digest, opts []remote.Option, explain func(error) error, end func(), err error) {
	at, err = name.NewDigest(ref.String(), name.StrictValidation)
	if err != nil {
		return at, nil, nil, nil, err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, checkTimeout, errSlow)
	ctx, stalled := context.WithCancelCause(ctx)
	quiet := time.AfterFunc(i.stall, func() { stalled(errStalled) })
	opts = []remote.Option{
		remote.WithContext(ctx),
		remote.WithTransport(&careful{next: i.transport, heard: func() { quiet.Reset(i.stall) }}),
		remote.WithAuthFromKeychain(authn.DefaultKeychain),
		remote.WithUserAgent("resultity-node"),
	}
	explain = func(err error) error {
		switch cause := context.Cause(ctx); {
		case errors.Is(cause, errStalled):
			return fmt.Errorf("%w for %v", errStalled, i.stall)
		case errors.Is(cause, errSlow):
			return fmt.Errorf("%w within %v", errSlow, checkTimeout)
		}
		return err
	}
	return at, opts, explain, func() { quiet.Stop(); stalled(nil); cancel() }, nil
}

// find looks in the registry for a signature of ref by somebody who is trusted,
// and returns it with the image for this machine. A classic one is preferred:
// Podman reads no other.
func (i *Images) find(ctx context.Context, ref snapshot.ImageRef, t *trust) (sig *attached, manifest digest.Digest, err error) {
	at, opts, explain, end, err := i.talk(ctx, ref)
	if err != nil {
		return nil, manifest, err
	}
	defer end()
	if sig, err = signed(ctx, at, opts, ref, t); err != nil {
		return nil, manifest, explain(err)
	}
	if manifest, err = resolve(at, opts); err != nil {
		return nil, manifest, explain(err)
	}
	return sig, manifest, nil
}

func signed(ctx context.Context, at name.Digest, opts []remote.Option, ref snapshot.ImageRef, t *trust) (*attached, error) {
	var unread, bad []error
	for _, list := range []func(name.Digest, []remote.Option) ([]*attached, error){classics, bundles} {
		found, err := list(at, opts)
		if err != nil {
			unread = append(unread, err)
		}
		for _, a := range found {
			err := t.judge(ctx, a, ref)
			if err == nil {
				return a, nil
			}
			bad = append(bad, err)
		}
	}
	switch {
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
		if err != nil || b64 == "" || len(b64) > maxPayload {
			continue // something else in the same place
		}
		// Not Payload, which would unpack without bound.
		switch raw, err := readLayer(s, maxPayload); {
		case errors.Is(err, errTooLarge):
		case err != nil:
			errs = append(errs, err)
		default:
			out = append(out, withCertificate(&attached{Payload: raw, Signature: b64}, s))
		}
	}
	return out, errors.Join(errs...)
}

// withCertificate adds to a classic signature what makes it keyless, if it has
// that and it can be read.
func withCertificate(a *attached, s oci.Signature) *attached {
	notes, err := s.Annotations()
	if err != nil {
		return a
	}
	var promise seen
	cert, told := notes[static.CertificateAnnotationKey], notes[static.BundleAnnotationKey]
	if len(cert) <= maxPayload && len(told) <= maxPayload && json.Unmarshal([]byte(told), &promise) == nil {
		if der, ok := certificate(cert); ok { // one alone: Podman refuses more
			a.Certificate, a.Seen = string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})), &promise
		}
	}
	return a
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

var (
	errStalled = errors.New("the registry has said nothing")
	errSlow    = errors.New("the registry has not said all that is asked about the image")
)

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
		resp.Body = &bounded{ReadCloser: resp.Body, by: c}
	}
	return resp, err
}

type bounded struct {
	io.ReadCloser
	by   *careful
	read int64
}

func (b *bounded) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	if n > 0 {
		b.by.heard()
	}
	b.read += int64(n)
	if b.read > maxAnswer {
		return n, fmt.Errorf("%w: one answer of more than %d bytes", ErrTooLarge, maxAnswer)
	}
	if b.by.read.Add(int64(n)) > maxTalk {
		return n, fmt.Errorf("%w: more than %d bytes", ErrTooLarge, maxTalk)
	}
	return n, err
}
