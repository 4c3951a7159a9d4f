package fetch

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/resultity/node/internal/chunk"
	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/model/modeltest"
	"github.com/resultity/node/internal/snapshot"
)

// artifact pushes files as the layers of an artifact and returns its source.
func artifact(t *testing.T, srv *httptest.Server, rt http.RoundTripper, layer types.MediaType, files ...[]byte) string {
	t.Helper()
	img := mutate.MediaType(v1.Image(empty.Image), types.OCIManifestSchema1)
	for i, f := range files {
		var err error
		img, err = mutate.Append(img, mutate.Addendum{Layer: static.NewLayer(f, layer), Annotations: map[string]string{"org.opencontainers.image.title": fmt.Sprint(i)}})
		if err != nil {
			t.Fatal(err)
		}
	}
	host := strings.TrimPrefix(srv.URL, "https://")
	ref, err := name.NewTag(host + "/models/tiny:1")
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.Write(ref, img, remote.WithTransport(rt)); err != nil {
		t.Fatal(err)
	}
	d, err := img.Digest()
	if err != nil {
		t.Fatal(err)
	}
	return snapshot.OCI + host + "/models/tiny@" + d.String()
}

// login has a registry ask everybody for a token, which it gives to everybody.
type login struct {
	http.Handler
	host   *string
	tokens atomic.Int64
}

func (l *login) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.URL.Path == "/token" {
		l.tokens.Add(1)
		fmt.Fprint(w, `{"token":"anonymous"}`)
		return
	}
	if r.Header.Get("Authorization") != "Bearer anonymous" {
		w.Header().Set("WWW-Authenticate", fmt.Sprintf(`Bearer realm="%s/token",service="registry"`, *l.host))
		w.WriteHeader(http.StatusUnauthorized)
		return
	}
	l.Handler.ServeHTTP(w, r)
}

// TestArtifacts takes files out of what Podman, RamaLama and Docker's model runner
// push: the same manifest, with media types of their own.
func TestArtifacts(t *testing.T) {
	b, other := modeltest.Content(2*chunk.Size+5), []byte("something else")
	var host string
	l := &login{Handler: registry.New(registry.Logger(slog.NewLogLogger(slog.DiscardHandler, 0))), host: &host}
	srv := modeltest.Serve(t, l.ServeHTTP)
	host = srv.URL
	rt := modeltest.Transport(srv)
	for _, layer := range []types.MediaType{"application/octet-stream", "application/vnd.docker.ai.gguf.v3", "application/vnd.cnai.model.weight.v1.raw"} {
		source := artifact(t, srv, rt, layer, other, b)
		before := l.tokens.Load()
		if _, err := fetch(t.Context(), open(rt), b, nil, source); err != nil {
			t.Errorf("%s: %v", layer, err)
		}
		if l.tokens.Load() == before {
			t.Error("it was let in without a token")
		}
	}
	source := artifact(t, srv, rt, "application/octet-stream", other)
	for name, c := range map[string]struct {
		source string
		want   error
	}{
		"artifact without the file":      {source, ErrArtifact},
		"artifact that is not there":     {source[:strings.Index(source, "@")] + "@" + digest.Of(nil).String(), ErrStatus},
		"artifact of another name":       {strings.Replace(source, "tiny", "huge", 1), ErrStatus},
		"artifact at another registry":   {"oci://127.0.0.1:1/x@" + digest.Of(nil).String(), nil},
		"artifact by tag":                {source[:strings.Index(source, "@")] + ":1", nil},
		"artifact at a plain web server": {"oci://" + strings.TrimPrefix(plainServer(t), "http://") + "/x@" + digest.Of(nil).String(), nil},
	} {
		t.Run(name, func(t *testing.T) {
			g, err := fetch(t.Context(), open(rt), b, nil, c.source)
			if err == nil || !errors.Is(err, c.want) && c.want != nil || len(g.puts) != 0 {
				t.Errorf("error %v, want %v", err, c.want)
			}
		})
	}
	t.Run("manifest of another digest", func(t *testing.T) {
		liar := modeltest.Serve(t, func(w http.ResponseWriter, r *http.Request) {
			fmt.Fprintf(w, `{"layers":[{"digest":%q,"size":%d}]}`, digest.Of(b), len(b))
		})
		source := "oci://" + strings.TrimPrefix(liar.URL, "https://") + "/x@" + digest.Of(nil).String()
		if _, err := fetch(t.Context(), open(modeltest.Transport(liar)), b, nil, source); !errors.Is(err, ErrArtifact) {
			t.Errorf("error %v", err)
		}
	})
	for _, more := range []int{0, 1} {
		t.Run(fmt.Sprintf("the largest manifest and %d", more), func(t *testing.T) {
			manifest := fmt.Appendf(nil, `{"layers":[{"digest":%q,"size":%d}]}`, digest.Of(b), len(b))
			manifest = append(manifest, bytes.Repeat([]byte(" "), maxManifest+more-len(manifest))...)
			srv := modeltest.Serve(t, func(w http.ResponseWriter, r *http.Request) {
				if strings.Contains(r.URL.Path, "/manifests/") {
					_, _ = w.Write(manifest)
					return
				}
				(&modeltest.Good{B: b}).ServeHTTP(w, r)
			})
			source := "oci://" + strings.TrimPrefix(srv.URL, "https://") + "/x@" + digest.Of(manifest).String()
			_, err := fetch(t.Context(), open(modeltest.Transport(srv)), b, nil, source)
			if more == 0 && err != nil || more > 0 && (!errors.Is(err, ErrArtifact) || !strings.Contains(err.Error(), "its manifest has more than")) {
				t.Errorf("error %v", err)
			}
		})
	}
	t.Run("blob is another one", func(t *testing.T) {
		manifest := fmt.Appendf(nil, `{"layers":[{"digest":%q,"size":%d}]}`, digest.Of(b), len(b))
		liar := modeltest.Serve(t, func(w http.ResponseWriter, r *http.Request) {
			if strings.Contains(r.URL.Path, "/manifests/") {
				_, _ = w.Write(manifest)
				return
			}
			if strings.Contains(r.URL.Path, "/blobs/") {
				_, _ = w.Write(make([]byte, len(b)))
			}
		})
		source := "oci://" + strings.TrimPrefix(liar.URL, "https://") + "/x@" + digest.Of(manifest).String()
		if _, err := fetch(t.Context(), open(modeltest.Transport(liar)), b, nil, source); !errors.Is(err, digest.ErrMismatch) {
			t.Errorf("error %v", err)
		}
	})
}

func plainServer(t *testing.T) string {
	srv := httptest.NewServer(http.NotFoundHandler())
	t.Cleanup(srv.Close)
	return srv.URL
}

// TestNeighbours: a neighbour is asked first, and believed nothing.
func TestNeighbours(t *testing.T) {
	b := modeltest.Content(3 * chunk.Size)
	far := &modeltest.Good{B: b}
	world := modeltest.Serve(t, far.ServeHTTP)
	elsewhere := plainServer(t)
	for name, c := range map[string]struct {
		h     http.HandlerFunc
		takes bool // from the neighbour, and nothing from the world
	}{
		"neighbour has it": {func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path != "/models/"+digest.Of(b).Hex() {
				http.NotFound(w, r)
				return
			}
			(&modeltest.Good{B: b}).ServeHTTP(w, r)
		}, true},
		"neighbour lies":        {(&modeltest.Good{B: make([]byte, len(b))}).ServeHTTP, false},
		"neighbour has nothing": {http.NotFound, false},
		"neighbour sends it elsewhere": {func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, elsewhere, http.StatusFound)
		}, false},
	} {
		t.Run(name, func(t *testing.T) {
			srv := httptest.NewServer(c.h)
			t.Cleanup(srv.Close)
			before := len(far.Asked())
			g, err := fetch(t.Context(), open(modeltest.Transport(world), srv.URL+"/models/"), b, nil, world.URL)
			if err != nil || !bytes.Equal(g.b, b) {
				t.Fatal(err)
			}
			asked := len(far.Asked()) > before
			t.Logf("expected: the right bytes, the source asked too: %t; got: %d right bytes, the source asked: %t", !c.takes, len(g.b), asked)
			if !c.takes && !asked {
				t.Error("the world was not asked")
			}
		})
	}
}
