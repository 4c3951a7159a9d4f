package modeltest

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"maps"
	"slices"

	"github.com/resultity/node/internal/digest"
)

// Key is a publisher's key for model signatures.
type Key struct{ key *ecdsa.PrivateKey }

// NewKey makes one.
func NewKey() Key {
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		panic(err)
	}
	return Key{k}
}

// PEM returns the public key.
func (k Key) PEM() string {
	der, err := x509.MarshalPKIXPublicKey(&k.key.PublicKey)
	if err != nil {
		panic(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}))
}

// Statement is what the model_signing tools sign for these files, for a test to
// change before [Key.Bundle] signs it.
func Statement(files map[string]digest.Digest) map[string]any {
	all := sha256.New()
	resources := []any{}
	for _, name := range slices.Sorted(maps.Keys(files)) {
		sum := files[name].Sum()
		_, _ = all.Write(sum[:]) // never fails
		resources = append(resources, map[string]any{"name": name, "algorithm": "sha256", "digest": files[name].Hex()})
	}
	return map[string]any{
		"_type":         "https://in-toto.io/Statement/v1",
		"subject":       []any{map[string]any{"name": "model", "digest": map[string]any{"sha256": hex.EncodeToString(all.Sum(nil))}}},
		"predicateType": "https://model_signing/signature/v1.0",
		"predicate": map[string]any{
			"serialization": map[string]any{"method": "files", "hash_type": "sha256", "allow_symlinks": false, "ignore_paths": []any{"model.sig"}},
			"resources":     resources,
		},
	}
}

// Bundle signs a statement: a sigstore bundle, version 0.3.
func (k Key) Bundle(statement map[string]any) []byte {
	payload, err := json.Marshal(statement)
	if err != nil {
		panic(err)
	}
	const kind = "application/vnd.in-toto+json"
	signed := sha256.Sum256(fmt.Appendf(nil, "DSSEv1 %d %s %d %s", len(kind), kind, len(payload), payload))
	sig, err := ecdsa.SignASN1(rand.Reader, k.key, signed[:])
	if err != nil {
		panic(err)
	}
	raw, err := json.Marshal(map[string]any{
		"mediaType":            "application/vnd.dev.sigstore.bundle.v0.3+json",
		"verificationMaterial": map[string]any{"publicKey": map[string]any{"hint": "test"}, "tlogEntries": []any{}},
		"dsseEnvelope": map[string]any{
			"payload": base64.StdEncoding.EncodeToString(payload), "payloadType": kind,
			"signatures": []any{map[string]any{"sig": base64.StdEncoding.EncodeToString(sig), "keyid": ""}},
		},
	})
	if err != nil {
		panic(err)
	}
	return raw
}
