package image

import (
	"bytes"
	"context"
	"crypto"
	"encoding/pem"
	"fmt"
	"time"

	"github.com/sigstore/cosign/v2/pkg/cosign"
	"github.com/sigstore/sigstore-go/pkg/root"
	"github.com/sigstore/sigstore-go/pkg/verify"
	"github.com/sigstore/sigstore/pkg/cryptoutils"
	"github.com/sigstore/sigstore/pkg/signature"
	podmanpolicy "go.podman.io/image/v5/signature"

	"github.com/resultity/node/internal/snapshot"
)

// A signer is somebody whose signature counts. It is made ready to be checked
// without asking anybody.
type signer struct {
	classic cosign.CheckOpts // without a verifier of claims
	bundle  *verify.Verifier
	who     verify.PolicyOption // whom the bundle has to be of
}

// load makes the signers of a trust. There may be none.
func load(t *snapshot.ImageTrust) ([]*signer, error) {
	var out []*signer
	for n, k := range t.Keys {
		pub, err := cryptoutils.UnmarshalPEMToPublicKey([]byte(k))
		if err != nil {
			return nil, fmt.Errorf("%w: key %d: %w", ErrKeys, n, err)
		}
		v, err := signature.LoadVerifier(pub, crypto.SHA256)
		if err != nil {
			return nil, fmt.Errorf("%w: key %d: %w", ErrKeys, n, err)
		}
		s, err := keySigner(v)
		if err != nil {
			return nil, fmt.Errorf("%w: key %d: %w", ErrKeys, n, err)
		}
		out = append(out, s)
	}
	if t.Keyless != nil {
		s, err := keylessSigner(t.Keyless)
		if err != nil {
			return nil, fmt.Errorf("%w: keyless: %w", ErrKeys, err)
		}
		out = append(out, s)
	}
	return out, nil
}

// keySigner is the owner of a key. The key is the network's own; no log knows it.
func keySigner(key signature.Verifier) (*signer, error) {
	always := root.NewExpiringKey(key, time.Time{}, time.Time{})
	v, err := verify.NewVerifier(root.NewTrustedPublicKeyMaterial(func(string) (root.TimeConstrainedVerifier, error) {
		return always, nil
	}), verify.WithNoObserverTimestamps())
	if err != nil {
		return nil, err
	}
	return &signer{cosign.CheckOpts{SigVerifier: key, IgnoreTlog: true, Offline: true}, v, verify.WithKey()}, nil
}

// keylessSigner is an identity whose certificate an authority of the trusted root
// has given, and whose signature one of its logs has seen while that was good. An
// authority whose logs of certificates the root names has to have told them, too;
// that, and stamps of time, is what Podman does not ask for.
func keylessSigner(k *snapshot.Keyless) (*signer, error) {
	r, err := root.NewTrustedRootFromJSON([]byte(k.TrustedRoot))
	if err != nil {
		return nil, err
	}
	opts := []verify.VerifierOption{verify.WithTransparencyLog(1), verify.WithObserverTimestamps(1)}
	if len(r.CTLogs()) > 0 {
		opts = append(opts, verify.WithSignedCertificateTimestamps(1))
	}
	v, err := verify.NewVerifier(r, opts...)
	if err != nil {
		return nil, err
	}
	id, err := verify.NewShortCertificateIdentity(k.Issuer, "", k.Email, "")
	if err != nil {
		return nil, err
	}
	return &signer{
		cosign.CheckOpts{
			TrustedMaterial: r, IgnoreSCT: len(r.CTLogs()) == 0, Offline: true,
			Identities: []cosign.Identity{{Issuer: k.Issuer, Subject: k.Email}},
		},
		v, verify.WithCertificateIdentity(id),
	}, nil
}

// requirement is what Podman has to ask for of an image that t trusts. It is made
// from the very same values as the signers, so that the two locks have one key.
func requirement(t *snapshot.ImageTrust) (podmanpolicy.PolicyRequirement, error) {
	// Cosign's signatures name the repository alone, and it has to be this one.
	opts := []podmanpolicy.PRSigstoreSignedOption{podmanpolicy.PRSigstoreSignedWithSignedIdentity(podmanpolicy.NewPRMMatchRepository())}
	switch {
	case t.Keyless != nil:
		certs, logs, err := t.Keyless.Authorities()
		if err != nil {
			return nil, err
		}
		cas, err := cryptoutils.MarshalCertificatesToPEM(certs)
		if err != nil {
			return nil, err
		}
		var keys [][]byte
		for _, l := range logs {
			der, err := cryptoutils.MarshalPublicKeyToDER(l)
			if err != nil {
				return nil, err
			}
			keys = append(keys, pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}))
		}
		fulcio, err := podmanpolicy.NewPRSigstoreSignedFulcio(
			podmanpolicy.PRSigstoreSignedFulcioWithCAData(cas),
			podmanpolicy.PRSigstoreSignedFulcioWithOIDCIssuer(t.Keyless.Issuer),
			podmanpolicy.PRSigstoreSignedFulcioWithSubjectEmail(t.Keyless.Email),
		)
		if err != nil {
			return nil, err
		}
		opts = append(opts, podmanpolicy.PRSigstoreSignedWithFulcio(fulcio), podmanpolicy.PRSigstoreSignedWithRekorPublicKeyDatas(keys))
	case len(t.Keys) > 0:
		var datas [][]byte // any one of them is enough
		for _, k := range t.Keys {
			datas = append(datas, []byte(k))
		}
		opts = append(opts, podmanpolicy.PRSigstoreSignedWithKeyDatas(datas))
	default:
		return podmanpolicy.NewPRReject(), nil
	}
	return podmanpolicy.NewPRSigstoreSigned(opts...)
}

// trust is an image trust as it counts now.
type trust struct {
	still, gone []*signer
}

// judge says who has signed: nil for somebody who is trusted, [ErrRevoked] for
// one who was.
func (t *trust) judge(ctx context.Context, a *attached, ref snapshot.ImageRef) error {
	err := a.check(ctx, ref, t.still)
	if err != nil && a.check(ctx, ref, t.gone) == nil {
		return ErrRevoked
	}
	return err
}

// under loads what counts of own where now is the network's newest word.
func under(own, now *snapshot.ImageTrust) (*trust, *snapshot.ImageTrust, error) {
	if len(own.Keys) == 0 && own.Keyless == nil {
		return nil, nil, fmt.Errorf("%w: there are none", ErrKeys)
	}
	still, gone := own.Under(now)
	s, err := load(&still)
	if err != nil {
		return nil, nil, err
	}
	g, err := load(&gone)
	if err != nil {
		return nil, nil, err
	}
	return &trust{s, g}, &still, nil
}

// certificate returns the first certificate of a PEM text.
func certificate(text string) ([]byte, bool) {
	b, _ := pem.Decode([]byte(text))
	if b == nil || b.Type != "CERTIFICATE" {
		return nil, false
	}
	return bytes.Clone(b.Bytes), true
}
