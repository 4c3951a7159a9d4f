package image

import (
	"bytes"
	"encoding/json"
	"io"
	"net/http"
	"os"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	podmanmanifest "go.podman.io/image/v5/manifest"

	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/snapshot"
)

type answers func(*http.Request) *http.Response

func (a answers) RoundTrip(r *http.Request) (*http.Response, error) { return a(r), nil }

// What a registry calls a manifest and what is in it may be anything. What is
// taken is either an image or an index, to Podman's parser too.
func FuzzManifest(f *testing.F) {
	const image, index = "application/vnd.oci.image.manifest.v1+json", "application/vnd.oci.image.index.v1+json"
	f.Add(image, []byte(`{"schemaVersion":2,"mediaType":"`+image+`","config":{},"layers":[]}`))
	f.Add(index, []byte(`{"schemaVersion":2,"manifests":[]}`))
	f.Add(image, []byte(`{"schemaVersion":2,"Manifests":[],"layers":[]}`))
	f.Add("application/vnd.docker.distribution.manifest.v1+json", []byte(`{"schemaVersion":1,"fsLayers":[]}`))
	f.Fuzz(func(t *testing.T, said string, raw []byte) {
		at, err := name.NewDigest("registry.example.net/x@" + digest.Of(raw).String())
		if err != nil {
			t.Fatal(err)
		}
		got, kind, err := readManifest(at, []remote.Option{remote.WithTransport(answers(func(r *http.Request) *http.Response {
			return &http.Response{StatusCode: http.StatusOK, Header: http.Header{"Content-Type": {said}}, Body: io.NopCloser(bytes.NewReader(raw)), ContentLength: int64(len(raw)), Request: r}
		}))})
		if err != nil {
			return
		}
		var fields map[string]json.RawMessage
		if !bytes.Equal(got, raw) || kind != said || json.Unmarshal(raw, &fields) != nil {
			t.Fatalf("%q of type %q is taken for %q of type %q", raw, said, got, kind)
		}
		_, isIndex := fields["manifests"]
		_, isImage := fields["layers"]
		if list := podmanmanifest.MIMETypeIsMultiImage(kind); isIndex && !list && string(fields["manifests"]) != "null" || isImage && list && string(fields["layers"]) != "null" {
			t.Fatalf("%q is taken for a %s", raw, kind)
		}
	})
}

// Whoever may write to a registry puts beside an image what he likes. Of the
// trusted key and the trusted identity is only what they have signed, word for word.
// What is in testdata/signed is about the image whose digest is that of "image": by a
// key, and by an identity of the trusted root there, in both forms. The keyless ones
// were made by SignKeyless and KeylessBundle of test/oci, and are good for ever, since
// the log saw them in time.
func FuzzSignature(f *testing.F) {
	d, err := name.NewDigest("registry.example.net/net/runtime@" + digest.Of([]byte("image")).String())
	if err != nil {
		f.Fatal(err)
	}
	ref, err := snapshot.ParseImageRef(d.String())
	if err != nil {
		f.Fatal(err)
	}
	read := func(name string) []byte {
		b, err := os.ReadFile("testdata/signed/" + name)
		if err != nil {
			f.Fatal(err)
		}
		return b
	}
	var byIdentity attached
	if err := json.Unmarshal(read("keyless.json"), &byIdentity); err != nil {
		f.Fatal(err)
	}
	trusts := []*snapshot.ImageTrust{
		{Keys: []string{string(read("key.pem"))}},
		{Keyless: &snapshot.Keyless{Email: "release@example.net", Issuer: "https://accounts.example.net", TrustedRoot: string(read("trusted-root.json"))}},
	}
	genuine := [][]*attached{
		{{Payload: read("payload.json"), Signature: string(read("payload.sig"))}, {Bundle: read("bundle.json")}},
		{&byIdentity, {Bundle: read("keyless-bundle.json")}},
	}
	var signers [][]*signer
	payloads := map[string]bool{} // that somebody trusted has signed
	for i, t := range trusts {
		s, err := load(t)
		if err != nil {
			f.Fatal(err)
		}
		signers = append(signers, s)
		for _, a := range genuine[i] {
			if err := a.check(f.Context(), ref, s); err != nil {
				f.Fatal(err)
			}
			payloads[string(payloadOf(a))] = true
			seen, err := json.Marshal(a.Seen)
			if err != nil {
				f.Fatal(err)
			}
			f.Add(a.Payload, a.Signature, a.Certificate, seen, []byte(a.Bundle))
		}
	}
	f.Add([]byte(nil), "", "", []byte(nil), bytes.Replace(genuine[0][1].Bundle, []byte("publicKey"), []byte("certificate"), 1))
	f.Add([]byte("{}"), strings.Repeat("A", 96), byIdentity.Certificate, []byte("{}"), []byte(`{"mediaType":"application/vnd.dev.sigstore.bundle.v0.3+json","dsseEnvelope":{"signatures":[{}]}}`))
	f.Fuzz(func(t *testing.T, text []byte, sig, cert string, promise, raw []byte) {
		a := &attached{Payload: text, Signature: sig, Certificate: cert}
		var s seen
		if json.Unmarshal(promise, &s) == nil && string(promise) != "null" {
			a.Seen = &s
		}
		if len(raw) > 0 {
			a.Bundle = raw
		}
		for _, by := range signers {
			if a.check(t.Context(), ref, by) == nil && !payloads[string(payloadOf(a))] {
				t.Fatalf("%q, %q, %q, %q, %q pass", text, sig, cert, promise, raw)
			}
		}
	})
}

// payloadOf returns what is signed in a signature; nil where it cannot be read.
func payloadOf(a *attached) []byte {
	if a.Bundle == nil {
		return a.Payload
	}
	var b struct {
		DSSE struct{ Payload []byte } `json:"dsseEnvelope"`
	}
	if json.Unmarshal(a.Bundle, &b) != nil {
		return nil
	}
	return b.DSSE.Payload
}
