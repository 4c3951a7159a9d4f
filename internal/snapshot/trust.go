package snapshot

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"net/url"
	"regexp"
	"slices"
	"strings"

	trustroot "github.com/sigstore/protobuf-specs/gen/pb-go/trustroot/v1"
	"google.golang.org/protobuf/encoding/protojson"
)

// ImageTrust says whose signature makes an image trusted: that of any one of
// the keys, or that of one identity. It is never both: two locks have to say
// the same of an image, the agent's and Podman's, and Podman's policy has no
// word for alternatives of two kinds.
type ImageTrust struct {
	Keys    []string `json:"keys"`              // cosign public keys in PEM; any one of them may sign
	Keyless *Keyless `json:"keyless,omitempty"` // in the place of keys
	Revoked []string `json:"revoked"`           // keys that once stood in Keys; what is signed by them alone stops
}

// Keyless trusts what one identity has signed with a certificate for the moment,
// and a log has seen at that moment.
type Keyless struct {
	Email  string `json:"email"`  // the certificate's subject
	Issuer string `json:"issuer"` // https URL of who has vouched for it (OIDC)

	// TrustedRoot is the text of a trusted_root.json, as sigstore calls it: the
	// authorities of certificates and of timestamps, and the keys of logs. Nothing
	// is asked of any of them when an image is checked.
	TrustedRoot string `json:"trusted_root"`
}

// ErrOneLock says that only one of the two locks on images could check what an
// image trust asks for. A network must not rely on one alone.
var ErrOneLock = errors.New("podman's policy cannot ask for it, and an image has to pass two locks")

// Bounds of an image trust.
const (
	maxImageKeys   = 16
	maxImageKey    = 4 << 10 // bytes of one, in PEM
	maxIssuer      = 512     // bytes
	maxRevoked     = 64
	maxTrustedRoot = 64 << 10 // bytes
	maxAuthorities = 16
)

var (
	emailPattern  = regexp.MustCompile(`^[A-Za-z0-9._%+-]{1,64}@[a-z0-9]([a-z0-9.-]{0,250}[a-z0-9])?$`)
	errKeyMissing = errors.New("neither keys nor keyless: nobody could sign")
)

func (t *ImageTrust) check() error {
	switch {
	case t.Keyless != nil && len(t.Keys) > 0:
		return fmt.Errorf("keys and keyless: %w; have one of them", ErrOneLock)
	case t.Keyless == nil && len(t.Keys) == 0:
		return errKeyMissing
	}
	if err := first(
		between(len(t.Keys), "number of keys", 0, maxImageKeys),
		between(len(t.Revoked), "number of revoked", 0, maxRevoked),
	); err != nil {
		return err
	}
	for i, k := range t.Keys {
		if err := checkKey(k); err != nil {
			return fmt.Errorf("keys[%d]: %w", i, err)
		}
	}
	for i, k := range t.Revoked {
		if err := checkKey(k); err != nil {
			return fmt.Errorf("revoked[%d]: %w", i, err)
		}
		if hasKey(t.Keys, k) {
			return fmt.Errorf("revoked[%d]: it is among the keys, too", i)
		}
	}
	if t.Keyless != nil {
		if err := t.Keyless.check(); err != nil {
			return fmt.Errorf("keyless: %w", err)
		}
	}
	return nil
}

func (k *Keyless) check() error {
	if strings.Contains(k.Email, "://") {
		return fmt.Errorf("email is a URI: %w; sign as an e-mail address, or with a key", ErrOneLock)
	}
	if err := named(k.Email, "email", emailPattern); err != nil {
		return err
	}
	if err := between(len(k.Issuer), "bytes of issuer", 1, maxIssuer); err != nil {
		return err
	}
	if u, err := url.Parse(k.Issuer); err != nil || u.Scheme != "https" || u.Hostname() == "" || u.User != nil || u.Fragment != "" {
		return fmt.Errorf("issuer %.200q: want an https URL", k.Issuer)
	}
	if _, _, err := k.Authorities(); err != nil {
		return fmt.Errorf("trusted_root: %w", err)
	}
	return nil
}

// Authorities returns what of the trusted root Podman's policy can hold: the
// certificates of the authorities, and the keys of the logs. Until when each was
// good is known to the agent's lock alone.
func (k *Keyless) Authorities() (certs []*x509.Certificate, logs []*ecdsa.PublicKey, err error) {
	if len(k.TrustedRoot) > maxTrustedRoot {
		return nil, nil, fmt.Errorf("%d bytes, want at most %d", len(k.TrustedRoot), maxTrustedRoot)
	}
	var r trustroot.TrustedRoot
	if err := protojson.Unmarshal([]byte(k.TrustedRoot), &r); err != nil {
		return nil, nil, fmt.Errorf("want the text of a trusted_root.json: %w", err)
	}
	if err := first(
		between(len(r.GetCertificateAuthorities()), "number of certificateAuthorities", 1, maxAuthorities),
		between(len(r.GetTlogs()), "number of tlogs", 1, maxAuthorities),
		between(len(r.GetCtlogs()), "number of ctlogs", 0, maxAuthorities),
		between(len(r.GetTimestampAuthorities()), "number of timestampAuthorities", 0, maxAuthorities),
	); err != nil {
		return nil, nil, err
	}
	for i, a := range r.GetCertificateAuthorities() {
		chain := a.GetCertChain().GetCertificates()
		if err := between(len(chain), fmt.Sprintf("number of certificates of certificateAuthorities[%d]", i), 1, 8); err != nil {
			return nil, nil, err
		}
		for _, raw := range chain {
			c, err := x509.ParseCertificate(raw.GetRawBytes())
			switch {
			case err != nil:
				return nil, nil, fmt.Errorf("certificateAuthorities[%d]: %w", i, err)
			case !c.IsCA:
				return nil, nil, fmt.Errorf("certificateAuthorities[%d]: a certificate of it is no authority's", i)
			}
			certs = append(certs, c)
		}
	}
	for i, l := range r.GetTlogs() {
		pub, err := x509.ParsePKIXPublicKey(l.GetPublicKey().GetRawBytes())
		if err != nil {
			return nil, nil, fmt.Errorf("tlogs[%d]: %w", i, err)
		}
		key, ok := pub.(*ecdsa.PublicKey)
		if !ok {
			return nil, nil, fmt.Errorf("tlogs[%d]: %T: %w; want a log with an ECDSA key", i, pub, ErrOneLock)
		}
		logs = append(logs, key)
	}
	return certs, logs, nil
}

// Under returns what of t still counts where now is the network's newest word:
// what both of them trust. Gone is what counts no more, and may have signed what
// a node has. Both may be empty. What an older configuration trusted is thus
// never trusted again only because a node goes back to it.
func (t *ImageTrust) Under(now *ImageTrust) (still, gone ImageTrust) {
	for _, k := range t.Keys {
		if hasKey(now.Keys, k) {
			still.Keys = append(still.Keys, k)
		} else {
			gone.Keys = append(gone.Keys, k)
		}
	}
	for _, k := range slices.Concat(t.Revoked, now.Revoked) {
		if !hasKey(gone.Keys, k) && !hasKey(still.Keys, k) {
			gone.Keys = append(gone.Keys, k)
		}
	}
	switch {
	case t.Keyless == nil:
	case now.Keyless != nil && now.Keyless.Email == t.Keyless.Email && now.Keyless.Issuer == t.Keyless.Issuer:
		still.Keyless = now.Keyless // an authority may have been taken out
	default:
		gone.Keyless = t.Keyless
	}
	return still, gone
}

// hasKey compares keys, not their spelling.
func hasKey(keys []string, k string) bool {
	der := keyBytes(k)
	return slices.ContainsFunc(keys, func(o string) bool { return bytes.Equal(keyBytes(o), der) })
}

func keyBytes(k string) []byte {
	if b, _ := pem.Decode([]byte(k)); b != nil {
		return b.Bytes
	}
	return nil
}

func checkKey(s string) error {
	if err := between(len(s), "bytes of a key", 1, maxImageKey); err != nil {
		return err
	}
	// Decode skips whatever stands before a block.
	b, rest := pem.Decode([]byte(s))
	if b == nil || b.Type != "PUBLIC KEY" || len(bytes.TrimSpace(rest)) != 0 || !strings.HasPrefix(s, "-----BEGIN") {
		return errors.New("want one PEM block PUBLIC KEY, as cosign.pub has")
	}
	k, err := x509.ParsePKIXPublicKey(b.Bytes)
	if err != nil {
		return err
	}
	if _, ok := k.(*ecdsa.PublicKey); !ok {
		return fmt.Errorf("%T: want an ECDSA key, as cosign makes", k)
	}
	return nil
}
