package image

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	goruntime "runtime"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/snapshot"
)

// beside pushes an artifact of layers with so many bytes each, and so many in the text
// of its signature, and returns its manifest's descriptor.
func (w *world) beside(at name.Reference, subject *v1.Descriptor, kind types.MediaType, layers, size, text int) v1.Descriptor {
	w.t.Helper()
	img := mutate.MediaType(v1.Image(empty.Image), types.OCIManifestSchema1)
	for range layers {
		var err error
		img, err = mutate.Append(img, mutate.Addendum{
			Layer:       static.NewLayer(bytes.Repeat([]byte(" "), size), kind),
			Annotations: map[string]string{"dev.cosignproject.cosign/signature": strings.Repeat("A", text)},
		})
		w.must(err)
	}
	if subject != nil {
		img = mutate.Subject(img, *subject).(v1.Image)
	}
	h, err := img.Digest()
	w.must(err)
	if at == nil {
		repo, err := name.NewRepository(w.srv.Host + "/net/runtime")
		w.must(err)
		at = repo.Digest(h.String())
	}
	w.must(remote.Write(at, img, w.reg.Options(w.t.Context())...))
	return v1.Descriptor{MediaType: types.OCIManifestSchema1, Digest: h, Size: 1}
}

// Whoever may write to a registry may put anything beside an image, as much of it as
// he likes. So much is read, and what is beyond it is not looked at.
func TestWhatLiesBesideIsBounded(t *testing.T) {
	for what, c := range map[string][2]struct{ n, size, text, found int }{ // at the bound, and beyond it
		"signatures":           {{maxSignatures, 1, 4, maxSignatures}, {maxSignatures + 1, 1, 4, maxSignatures}},
		"bytes of a payload":   {{1, maxPayload, 4, 1}, {1, maxPayload + 1, 4, 0}},
		"bytes of a signature": {{1, 1, maxPayload, 1}, {1, 1, maxPayload + 1, 0}},
	} {
		w := newWorld(t)
		d, _ := w.push("net/runtime", what)
		tag := d.Context().Tag(strings.Replace(d.DigestStr(), ":", "-", 1) + ".sig")
		for _, s := range c {
			w.beside(tag, nil, "application/vnd.dev.cosign.simplesigning.v1+json", s.n, s.size, s.text)
			all, err := classics(d, w.reg.Options(t.Context()))
			w.must(err)
			t.Logf("%s: expected: %d of %+v are taken; got: %d", what, s.found, s, len(all))
			if len(all) != s.found {
				t.Errorf("%s: %d of %+v are taken", what, len(all), s)
			}
		}
	}
	w := newWorld(t)
	d, _ := w.push("net/runtime", "bundles")
	subject, err := remote.Head(d, w.reg.Options(t.Context())...)
	w.must(err)
	const kind = "application/vnd.dev.sigstore.bundle.v0.3+json"
	for _, c := range []struct{ n, size, asked, found int }{
		{1, maxBundle, 1, 1}, {1, maxBundle + 1, 1, 0}, {maxSignatures, 1, maxSignatures, maxSignatures}, {maxSignatures + 1, 1, maxSignatures, maxSignatures},
	} {
		one := w.beside(nil, subject, kind, 1, c.size, 4)
		index, err := json.Marshal(v1.IndexManifest{SchemaVersion: 2, MediaType: types.OCIImageIndex, Manifests: slices.Repeat([]v1.Descriptor{one}, c.n)})
		w.must(err)
		asked := 0
		rt := roundTrip(func(r *http.Request) (*http.Response, error) {
			if strings.Contains(r.URL.Path, "/referrers/") {
				return &http.Response{StatusCode: http.StatusOK, Header: http.Header{"Content-Type": {string(types.OCIImageIndex)}}, Body: io.NopCloser(bytes.NewReader(index)), Request: r}, nil
			}
			if strings.HasSuffix(r.URL.Path, one.Digest.String()) {
				asked++
			}
			return w.tr.RoundTrip(r)
		})
		all, err := bundles(d, append(w.reg.Options(t.Context()), remote.WithTransport(rt)))
		w.must(err)
		t.Logf("%d bundles of %d bytes: expected: %d asked for and %d taken; got: %d and %d", c.n, c.size, c.asked, c.found, asked, len(all))
		if len(all) != c.found || asked != c.asked {
			t.Errorf("%d bundles of %d bytes: %d are taken, %d asked for", c.n, c.size, len(all), asked)
		}
	}
}

// An index may have images for so many platforms.
func TestIndexIsBounded(t *testing.T) {
	image := []byte(`{"schemaVersion":2,"mediaType":"` + string(types.OCIManifestSchema1) + `","config":{},"layers":[]}`)
	for _, n := range []int{maxPlatforms, maxPlatforms + 1} {
		var parts []string
		for i := range n {
			arch := "other" + fmt.Sprint(i)
			if i == n-1 {
				arch = goruntime.GOARCH
			}
			parts = append(parts, fmt.Sprintf(`{"mediaType":%q,"digest":%q,"size":%d,"platform":{"os":"linux","architecture":%q}}`, types.OCIManifestSchema1, digest.Of(image), len(image), arch))
		}
		index := fmt.Appendf(nil, `{"schemaVersion":2,"mediaType":%q,"manifests":[%s]}`, types.OCIImageIndex, strings.Join(parts, ","))
		at, err := name.NewDigest("registry.example.net/x@" + digest.Of(index).String())
		if err != nil {
			t.Fatal(err)
		}
		d, err := resolve(at, []remote.Option{remote.WithTransport(answers(func(r *http.Request) *http.Response {
			raw, kind := index, types.OCIImageIndex
			if strings.HasSuffix(r.URL.Path, digest.Of(image).String()) {
				raw, kind = image, types.OCIManifestSchema1
			}
			return &http.Response{StatusCode: http.StatusOK, Header: http.Header{"Content-Type": {string(kind)}}, Body: io.NopCloser(bytes.NewReader(raw)), ContentLength: int64(len(raw)), Request: r}
		}))})
		t.Logf("%d images: expected: at most %d are looked at; got: %v", n, maxPlatforms, err)
		if n <= maxPlatforms && (err != nil || d != digest.Of(image)) || n > maxPlatforms && !errors.Is(err, ErrManifest) {
			t.Errorf("%d images: %v, %v", n, d, err)
		}
	}
}

// One answer of a registry has its bound, and all of them together.
func TestAnswersAreBounded(t *testing.T) {
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "https://registry.example.net/", nil)
	if err != nil {
		t.Fatal(err)
	}
	c := &careful{heard: func() {}, next: answers(func(r *http.Request) *http.Response {
		return &http.Response{StatusCode: http.StatusOK, Body: io.NopCloser(zeros{}), Request: r}
	})}
	read := func(n int64) error {
		resp, err := c.RoundTrip(req)
		if err != nil {
			t.Fatal(err)
		}
		for buf := make([]byte, 64<<10); n > 0 && err == nil; {
			var k int
			k, err = resp.Body.Read(buf[:min(n, int64(len(buf)))])
			n -= int64(k)
		}
		return err
	}
	if err := read(maxAnswer + 1); !errors.Is(err, ErrTooLarge) || !strings.Contains(err.Error(), "one answer") {
		t.Errorf("one answer: %v", err)
	}
	c.read.Store(0)
	for left := int64(maxTalk); left > 0; left -= maxAnswer {
		if err := read(min(left, maxAnswer)); err != nil {
			t.Fatalf("%d bytes before the bound: %v", left, err)
		}
	}
	err = read(1)
	t.Logf("a byte more than %d: expected: %v; got: %v", maxTalk, ErrTooLarge, err)
	if !errors.Is(err, ErrTooLarge) {
		t.Errorf("all together: %v", err)
	}
}

// drips is a body of which a byte comes now and then, without end.
type drips struct {
	ctx   context.Context
	every time.Duration
}

func (d drips) Read(p []byte) (int, error) {
	select {
	case <-time.After(d.every):
		p[0] = ' '
		return 1, nil
	case <-d.ctx.Done():
		return 0, context.Cause(d.ctx)
	}
}

// A registry that says nothing is left after a while, and one that never comes to an
// end, too. The clock is the bubble's.
func TestRegistryIsLeftInTime(t *testing.T) {
	ref, err := snapshot.ParseImageRef("registry.example.net/a@" + digest.Of(nil).String())
	if err != nil {
		t.Fatal(err)
	}
	for what, c := range map[string]struct {
		every, most time.Duration
		want        error
	}{
		"silent": {2 * stallTimeout, stallTimeout, errStalled},
		"slow":   {stallTimeout - time.Second, checkTimeout, errSlow},
	} {
		synctest.Test(t, func(t *testing.T) {
			i := &Images{stall: stallTimeout, transport: roundTrip(func(r *http.Request) (*http.Response, error) {
				return &http.Response{StatusCode: http.StatusOK, Header: http.Header{}, Body: io.NopCloser(drips{r.Context(), c.every}), Request: r, ContentLength: -1}, nil
			})}
			began := time.Now()
			_, _, err := i.find(t.Context(), ref, &trust{})
			t.Logf("%s: expected: %v after %v; got: %v after %v", what, c.want, c.most, err, time.Since(began))
			if !errors.Is(err, c.want) || time.Since(began) != c.most {
				t.Errorf("%s: %v after %v", what, err, time.Since(began))
			}
		})
	}
}

// A record that is longer than any is none: the image is looked for again.
func TestRecordIsBounded(t *testing.T) {
	w := newWorld(t)
	k, pub := newKey(t)
	d, ref := w.push("net/runtime", "a")
	w.must(w.reg.Sign(t.Context(), d, k))
	w.must(ensure(t, w.img, ref, pub))
	file := filepath.Join(w.dir, recordName(ref))
	raw, err := os.ReadFile(file)
	w.must(err)
	for more, want := range []bool{true, false} {
		w.must(os.WriteFile(file, append(raw, bytes.Repeat([]byte(" "), maxRecord+more-len(raw))...), 0o600))
		if _, known := w.img.record(ref); known != want {
			t.Errorf("one of %d bytes is known: %v", maxRecord+more, known)
		}
	}
	all, err := w.img.allRecords()
	if err != nil || len(all) != 0 {
		t.Errorf("%d records are left, %v", len(all), err)
	}
	if err := ensure(t, w.img, ref, pub); err != nil {
		t.Error(err)
	}
}
