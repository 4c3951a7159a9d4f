package oci

import (
	"context"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	intoto "github.com/in-toto/attestation/go/v1"
	cobundle "github.com/sigstore/cosign/v2/pkg/cosign/bundle"
	coremote "github.com/sigstore/cosign/v2/pkg/oci/remote"
	costatic "github.com/sigstore/cosign/v2/pkg/oci/static"
	cotypes "github.com/sigstore/cosign/v2/pkg/types"
	bundlepb "github.com/sigstore/protobuf-specs/gen/pb-go/bundle/v1"
	commonpb "github.com/sigstore/protobuf-specs/gen/pb-go/common/v1"
	dssepb "github.com/sigstore/protobuf-specs/gen/pb-go/dsse"
	rekorpb "github.com/sigstore/protobuf-specs/gen/pb-go/rekor/v1"
	"github.com/sigstore/sigstore-go/pkg/bundle"
	"github.com/sigstore/sigstore-go/pkg/root"
	"github.com/sigstore/sigstore-go/pkg/testing/ca"
	"github.com/sigstore/sigstore-go/pkg/tlog"
	sgverify "github.com/sigstore/sigstore-go/pkg/verify"
	"github.com/sigstore/sigstore/pkg/cryptoutils"
	"github.com/sigstore/sigstore/pkg/signature/payload"
	"google.golang.org/protobuf/encoding/protojson"
)

// A Sigstore is what keyless signatures need, all in memory: an authority that
// gives certificates to whoever asks, a log, and an authority of timestamps.
type Sigstore struct{ vs *ca.VirtualSigstore }

// NewSigstore makes one with keys of its own.
func NewSigstore() (*Sigstore, error) {
	vs, err := ca.NewVirtualSigstore()
	if err != nil {
		return nil, err
	}
	return &Sigstore{vs}, nil
}

// TrustedRoot returns the text of its trusted_root.json.
func (s *Sigstore) TrustedRoot() (string, error) {
	logs := s.vs.RekorLogs()
	for id, l := range logs {
		raw, err := hex.DecodeString(id)
		if err != nil {
			return "", err
		}
		l.ID = raw
	}
	r, err := root.NewTrustedRoot(root.TrustedRootMediaType01, s.vs.FulcioCertificateAuthorities(), nil, s.vs.TimestampingAuthorities(), logs)
	if err != nil {
		return "", err
	}
	text, err := r.MarshalJSON()
	return string(text), err
}

// Identity is who signs: an e-mail address, vouched for by an issuer.
type Identity struct{ Email, Issuer string }

// Soon is when a log sees a signature that was made just now. The certificates
// of a [Sigstore] are good for ten minutes.
func Soon() time.Time { return time.Now().Add(time.Minute) }

// SignKeyless adds a classic signature by an identity, whose payload names
// other, and which the log has seen at a time.
func (r *Registry) SignKeyless(ctx context.Context, ref, other name.Digest, s *Sigstore, who Identity, at time.Time) error {
	body, err := (payload.Cosign{Image: other}).MarshalJSON()
	if err != nil {
		return err
	}
	e, err := s.vs.SignAtTime(who.Email, who.Issuer, body, at)
	if err != nil {
		return err
	}
	cert, sig, entry, err := s.parts(e)
	if err != nil {
		return err
	}
	pem, err := cryptoutils.MarshalCertificateToPEM(cert.Certificate())
	if err != nil {
		return err
	}
	chain, err := cryptoutils.MarshalCertificatesToPEM(s.vs.FulcioCertificateAuthorities()[0].(*root.FulcioCertificateAuthority).Intermediates)
	if err != nil {
		return err
	}
	top, err := cryptoutils.MarshalCertificateToPEM(s.vs.FulcioCertificateAuthorities()[0].(*root.FulcioCertificateAuthority).Root)
	if err != nil {
		return err
	}
	seen := &cobundle.RekorBundle{
		SignedEntryTimestamp: entry.GetInclusionPromise().GetSignedEntryTimestamp(),
		Payload: cobundle.RekorPayload{
			Body:           base64.StdEncoding.EncodeToString(entry.GetCanonicalizedBody()),
			IntegratedTime: entry.GetIntegratedTime(), LogIndex: entry.GetLogIndex(), LogID: hex.EncodeToString(entry.GetLogId().GetKeyId()),
		},
	}
	layer, err := costatic.NewSignature(body, base64.StdEncoding.EncodeToString(sig.Signature()),
		costatic.WithCertChain(pem, append(chain, top...)), costatic.WithBundle(seen))
	if err != nil {
		return err
	}
	return r.attachLayer(ctx, ref, layer)
}

// SignBundleKeyless adds the bundle of a statement about the image, by an
// identity.
func (r *Registry) SignBundleKeyless(ctx context.Context, ref name.Digest, s *Sigstore, who Identity, at time.Time) error {
	raw, err := KeylessBundle(ref, s, who, at)
	if err != nil {
		return err
	}
	return r.attachBundle(ctx, ref, raw)
}

// KeylessBundle makes the bundle of [Registry.SignBundleKeyless].
func KeylessBundle(ref name.Digest, s *Sigstore, who Identity, at time.Time) ([]byte, error) {
	body, err := statement(ref)
	if err != nil {
		return nil, err
	}
	e, err := s.vs.AttestAtTime(who.Email, who.Issuer, body, at, true)
	if err != nil {
		return nil, err
	}
	cert, sig, entry, err := s.parts(e)
	if err != nil {
		return nil, err
	}
	env, ok := sig.(*bundle.Envelope)
	if !ok {
		return nil, fmt.Errorf("%T is no envelope", sig)
	}
	stamps, err := e.Timestamps()
	if err != nil {
		return nil, err
	}
	var signed []*bundlepb.TimestampVerificationData
	for _, t := range stamps {
		signed = append(signed, &bundlepb.TimestampVerificationData{Rfc3161Timestamps: []*commonpb.RFC3161SignedTimestamp{{SignedTimestamp: t}}})
	}
	if len(signed) != 1 {
		return nil, fmt.Errorf("%d timestamps, want one", len(signed))
	}
	return protojson.Marshal(&bundlepb.Bundle{
		MediaType: "application/vnd.dev.sigstore.bundle.v0.3+json",
		VerificationMaterial: &bundlepb.VerificationMaterial{
			Content:                   &bundlepb.VerificationMaterial_Certificate{Certificate: &commonpb.X509Certificate{RawBytes: cert.Certificate().Raw}},
			TlogEntries:               []*rekorpb.TransparencyLogEntry{entry},
			TimestampVerificationData: signed[0],
		},
		Content: &bundlepb.Bundle_DsseEnvelope{DsseEnvelope: &dssepb.Envelope{
			Payload: body, PayloadType: env.PayloadType, Signatures: []*dssepb.Signature{{Sig: sig.Signature()}},
		}},
	})
}

// parts takes a signed entity apart. The log's promise, which the entity keeps
// to itself, is given once more.
func (s *Sigstore) parts(e *ca.TestEntity) (sgverify.VerificationContent, sgverify.SignatureContent, *rekorpb.TransparencyLogEntry, error) {
	cert, err1 := e.VerificationContent()
	sig, err2 := e.SignatureContent()
	entries, err3 := e.TlogEntries()
	if err := errors.Join(err1, err2, err3); err != nil {
		return nil, nil, nil, err
	}
	t := entries[0].TransparencyLogEntry()
	id := hex.EncodeToString(t.GetLogId().GetKeyId())
	set, err := s.vs.RekorSignPayload(tlog.RekorPayload{
		Body: base64.StdEncoding.EncodeToString(t.GetCanonicalizedBody()), IntegratedTime: t.GetIntegratedTime(), LogIndex: t.GetLogIndex(), LogID: id,
	})
	if err != nil {
		return nil, nil, nil, err
	}
	var kind struct{ Kind, APIVersion string }
	if err := json.Unmarshal(t.GetCanonicalizedBody(), &kind); err != nil {
		return nil, nil, nil, err
	}
	t.KindVersion = &rekorpb.KindVersion{Kind: kind.Kind, Version: kind.APIVersion}
	t.InclusionPromise = &rekorpb.InclusionPromise{SignedEntryTimestamp: set}
	return cert, sig, t, nil
}

// statement says that the image with this digest is signed.
func statement(ref name.Digest) ([]byte, error) {
	alg, sum, ok := strings.Cut(ref.DigestStr(), ":")
	if !ok {
		return nil, fmt.Errorf("bad digest in %s", ref)
	}
	return protojson.Marshal(&intoto.Statement{
		Type:          intoto.StatementTypeUri,
		Subject:       []*intoto.ResourceDescriptor{{Digest: map[string]string{alg: sum}}},
		PredicateType: cotypes.CosignSignPredicateType,
	})
}

func (r *Registry) attachBundle(ctx context.Context, ref name.Digest, raw []byte) error {
	err := coremote.WriteAttestationNewBundleFormat(ref, raw, cotypes.CosignSignPredicateType, coremote.WithRemoteOptions(r.Options(ctx)...))
	if err != nil {
		return fmt.Errorf("writing the bundle of %s: %w", ref, err)
	}
	return nil
}
