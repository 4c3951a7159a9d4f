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
// trusted key is only what it has signed, word for word. What is in testdata/signed
// is about the image whose digest is that of "image".
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
	raw, said, classic := read("bundle.json"), read("payload.json"), string(read("payload.sig"))
	signers, err := load(&snapshot.ImageTrust{Keys: []string{string(read("key.pem"))}})
	if err != nil {
		f.Fatal(err)
	}
	var genuine envelope
	if err := json.Unmarshal(raw, &genuine); err != nil || len(genuine.DSSE.Payload) == 0 {
		f.Fatal(err, string(raw))
	}
	for _, a := range []*attached{{Payload: said, Signature: classic}, {Bundle: raw}} {
		if err := a.check(f.Context(), ref, signers); err != nil {
			f.Fatal(err)
		}
	}
	f.Add(said, classic, []byte(nil))
	f.Add([]byte(nil), "", raw)
	f.Add([]byte(nil), "", bytes.Replace(raw, []byte("publicKey"), []byte("certificate"), 1))
	f.Add([]byte("{}"), strings.Repeat("A", 96), []byte(`{"mediaType":"application/vnd.dev.sigstore.bundle.v0.3+json","dsseEnvelope":{"signatures":[{}]}}`))
	f.Fuzz(func(t *testing.T, text []byte, sig string, raw []byte) {
		a := &attached{Payload: text, Signature: sig}
		if raw != nil {
			a.Bundle = raw
		}
		if a.check(t.Context(), ref, signers) != nil {
			return
		}
		var b envelope
		if raw == nil && !bytes.Equal(text, said) || raw != nil && (json.Unmarshal(raw, &b) != nil || !bytes.Equal(b.DSSE.Payload, genuine.DSSE.Payload)) {
			t.Fatalf("%q, %q, %q pass", text, sig, raw)
		}
	})
}

// envelope is what is signed in a bundle.
type envelope struct {
	DSSE struct{ Payload []byte } `json:"dsseEnvelope"`
}
