// Package signature verifies OpenSSF model signatures: a sigstore bundle with an
// in-toto statement that lists the files of a model with their SHA-256, as the
// model_signing tools write it (https://model_signing/signature/v1.0).
//
// The rule it keeps: the statement is looked at only after its signature was found
// to be by one of the given keys, and the files that it lists have to be exactly
// those of the model, all but the bundle itself. No I/O.
package signature

import (
	"crypto"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/sigstore/sigstore-go/pkg/bundle"
	"github.com/sigstore/sigstore-go/pkg/root"
	"github.com/sigstore/sigstore-go/pkg/verify"
	"github.com/sigstore/sigstore/pkg/cryptoutils"
	"github.com/sigstore/sigstore/pkg/signature"

	"github.com/resultity/node/internal/digest"
)

// MaxSize bounds a bundle, in bytes.
const MaxSize = 1 << 20

// Why a signature does not count.
var (
	ErrMalformed = errors.New("model signature cannot be read")
	ErrKey       = errors.New("model is not signed by a key of the configuration")
	ErrStatement = errors.New("model signature is of another kind")
	ErrFiles     = errors.New("model signature is for other files")
)

const (
	statementType = "https://in-toto.io/Statement/v1"
	predicateType = "https://model_signing/signature/v1.0"
)

// statement is what is signed, as far as it says which files these are.
type statement struct {
	Type    string `json:"_type"`
	Subject []struct {
		Name   string            `json:"name"`
		Digest map[string]string `json:"digest"`
	} `json:"subject"`
	PredicateType string `json:"predicateType"`
	Predicate     struct {
		Serialization struct {
			Method        string `json:"method"`
			HashType      string `json:"hash_type"`
			AllowSymlinks bool   `json:"allow_symlinks"`
		} `json:"serialization"`
		Resources []struct {
			Name      string `json:"name"`
			Algorithm string `json:"algorithm"`
			Digest    string `json:"digest"`
		} `json:"resources"`
	} `json:"predicate"`
}

// Verify checks that the holder of one of keys, public keys in PEM, has signed
// files, by path.
func Verify(raw []byte, keys []string, files map[string]digest.Digest) (err error) {
	// These bytes are somebody's, and the library that reads them takes more for
	// granted than it should.
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("%w: %v", ErrMalformed, r)
		}
	}()
	if len(raw) > MaxSize {
		return fmt.Errorf("%w: %d bytes, at most %d", ErrMalformed, len(raw), MaxSize)
	}
	var b bundle.Bundle
	if err := b.UnmarshalJSON(raw); err != nil {
		return fmt.Errorf("%w: %w", ErrMalformed, err)
	}
	envelope, err := b.Envelope()
	if err != nil {
		return fmt.Errorf("%w: it has no statement: %w", ErrMalformed, err)
	}
	if err := signedByOne(&b, keys); err != nil {
		return err
	}
	payload, err := envelope.DecodeB64Payload()
	if err != nil {
		return fmt.Errorf("%w: %w", ErrMalformed, err)
	}
	var s statement
	if err := json.Unmarshal(payload, &s); err != nil {
		return fmt.Errorf("%w: %w", ErrStatement, err)
	}
	return s.check(files)
}

func signedByOne(b *bundle.Bundle, keys []string) error {
	var errs []error
	for _, k := range keys {
		err := signedBy(b, k)
		if err == nil {
			return nil
		}
		errs = append(errs, err)
	}
	return fmt.Errorf("%w: %w", ErrKey, errors.Join(errs...))
}

func signedBy(b *bundle.Bundle, key string) error {
	pub, err := cryptoutils.UnmarshalPEMToPublicKey([]byte(key))
	if err != nil {
		return err
	}
	v, err := signature.LoadVerifier(pub, crypto.SHA256)
	if err != nil {
		return err
	}
	always := root.NewExpiringKey(v, time.Time{}, time.Time{})                                       // as long as the configuration lists it
	trusted := root.NewTrustedPublicKeyMaterial(func(string) (root.TimeConstrainedVerifier, error) { // a hint proves nothing
		return always, nil
	})
	verifier, err := verify.NewVerifier(trusted, verify.WithNoObserverTimestamps())
	if err != nil {
		return err
	}
	_, err = verifier.Verify(b, verify.NewPolicy(verify.WithoutArtifactUnsafe(), verify.WithKey()))
	return err
}

func (s *statement) check(files map[string]digest.Digest) error {
	switch p := &s.Predicate; {
	case s.Type != statementType:
		return fmt.Errorf("%w: statement %.100q", ErrStatement, s.Type)
	case s.PredicateType != predicateType:
		return fmt.Errorf("%w: predicate %.100q", ErrStatement, s.PredicateType)
	case p.Serialization.Method != "files" || p.Serialization.HashType != "sha256" || p.Serialization.AllowSymlinks:
		return fmt.Errorf("%w: serialization %.40q of %.40q, symbolic links %t; want files of sha256 and no links",
			ErrStatement, p.Serialization.Method, p.Serialization.HashType, p.Serialization.AllowSymlinks)
	case len(s.Subject) != 1:
		return fmt.Errorf("%w: %d subjects, want one", ErrStatement, len(s.Subject))
	}
	all := sha256.New()
	left := maps.Clone(files)
	for _, r := range s.Predicate.Resources {
		if r.Algorithm != "sha256" {
			return fmt.Errorf("%w: %.200q has a digest of %.40q", ErrStatement, r.Name, r.Algorithm)
		}
		d, err := digest.ParseHex(r.Digest)
		if err != nil {
			return fmt.Errorf("%w: %.200q: %w", ErrStatement, r.Name, err)
		}
		sum := d.Sum()
		_, _ = all.Write(sum[:]) // never fails
		switch want, ok := left[r.Name]; {
		case !ok:
			return fmt.Errorf("%w: it lists %.200q, which the model has not, or twice", ErrFiles, r.Name)
		case want != d:
			return fmt.Errorf("%w: %.200q has SHA-256 %s there, and %s in the configuration", ErrFiles, r.Name, d.Hex(), want.Hex())
		}
		delete(left, r.Name)
	}
	if len(left) > 0 {
		return fmt.Errorf("%w: it does not list %.200q", ErrFiles, slices.Min(slices.Collect(maps.Keys(left))))
	}
	if got := digest.FromSum([sha256.Size]byte(all.Sum(nil))); s.Subject[0].Digest["sha256"] != got.Hex() {
		return fmt.Errorf("%w: the digest of its subject is not that of its files", ErrStatement)
	}
	return nil
}
