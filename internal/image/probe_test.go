package image

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net/http"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/remote"

	"github.com/resultity/node/internal/snapshot"
)

// puller is a Podman that reads the whole image and then does as its policy
// says.
type puller struct {
	t       *testing.T
	refuses error
	gone    []snapshot.ImageRef
}

func (p *puller) Offer(ctx context.Context, ref snapshot.ImageRef) error {
	at, err := name.NewDigest(ref.String())
	if err != nil {
		p.t.Fatal(err)
	}
	tr := &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, DisableKeepAlives: true}
	img, err := remote.Image(at, remote.WithContext(ctx), remote.WithTransport(tr))
	if err != nil {
		p.t.Fatal(err)
	}
	// Reading a layer to its end checks its digest.
	layers, err := img.Layers()
	if err != nil || len(layers) != 1 {
		p.t.Fatalf("%d layers, %v", len(layers), err)
	}
	r, err := layers[0].Uncompressed()
	if err != nil {
		p.t.Fatal(err)
	}
	if _, err := io.Copy(io.Discard, r); err != nil {
		p.t.Errorf("the probe's image is none: %v", err)
	}
	if _, err := img.ConfigFile(); err != nil {
		p.t.Error(err)
	}
	return p.refuses
}

func (p *puller) RemoveImages(_ context.Context, pulled, _ []snapshot.ImageRef) ([]snapshot.ImageRef, error) {
	p.gone = append(p.gone, pulled...)
	return pulled, nil
}

func TestProbeUnsigned(t *testing.T) {
	refused := errors.New("no")
	_, key := newKey(t)
	for _, c := range []error{refused, nil} {
		p := &puller{t: t, refuses: c}
		r, err := ProbeUnsigned(t.Context(), p, &snapshot.ImageTrust{Keys: []string{key}})
		if err != nil || !errors.Is(r.Agent, ErrUnsigned) || !errors.Is(r.Podman, c) || !r.Asked {
			t.Errorf("%+v, %v", r, err)
		}
		if (c == nil) != (len(p.gone) == 1) {
			t.Errorf("let in: %v, removed: %v", c == nil, p.gone)
		}
	}
	if _, err := ProbeUnsigned(t.Context(), &puller{t: t}, &snapshot.ImageTrust{}); !errors.Is(err, ErrKeys) {
		t.Errorf("%v, want %v", err, ErrKeys)
	}
}
