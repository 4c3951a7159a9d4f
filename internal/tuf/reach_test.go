package tuf

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"maps"
	"net/http"
	"net/http/httptest"
	"path"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/theupdateframework/go-tuf/v2/metadata/trustedmetadata"

	"github.com/resultity/node/internal/chain"
	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/snapshot"
)

func flip(raw []byte, i int) []byte {
	raw = slices.Clone(raw)
	raw[i] ^= 1
	return raw
}

// Every byte of every file that is served, without the disk: what that is worth
// is another test's.
func TestFlippedBytesOnTheWay(t *testing.T) {
	n := newNetwork(t)
	n.rotate(t)
	c := n.client(t)
	st := &state{Roots: [][]byte{c.root}}
	trusted, err := chain.Begin(st.Roots, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	for _, step := range []struct {
		name string
		run  func(context.Context, *trustedmetadata.TrustedMetadata, *state) error
	}{
		{"metadata/2.root.json", c.updateRoot},
		{"metadata/timestamp.json", c.updateTimestamp},
		{"metadata/1.snapshot.json", c.updateSnapshot},
		{"metadata/1.targets.json", c.updateTargets},
		{"targets/" + digest.Of(config(t, 1)).Hex() + ".config.json", func(ctx context.Context, tm *trustedmetadata.TrustedMetadata, st *state) error {
			raw, err := c.config(ctx, tm, st)
			if err != nil {
				return err
			}
			_, err = snapshot.Open(tm, raw)
			return err
		}},
	} {
		raw := n.file(t, step.name)
		reasons := map[string]int{}
		for i := range raw {
			n.overlay[step.name] = flip(raw, i)
			tm, copied := *trusted, *st
			tm.Targets = maps.Clone(trusted.Targets)
			err := step.run(t.Context(), &tm, &copied)
			if !errors.Is(err, snapshot.ErrUntrusted) {
				t.Fatalf("%s, byte %d (%q): %v, want ErrUntrusted", step.name, i, raw[i], err)
			}
			reasons[Event(err).Name]++
			if !copied.equal(st) {
				t.Fatalf("%s, byte %d (%q): refused, and remembered", step.name, i, raw[i])
			}
		}
		t.Logf("%s: expected: %d refusals; got: %v", path.Base(step.name), len(raw), reasons)
		delete(n.overlay, step.name)
		if err := step.run(t.Context(), trusted, st); err != nil {
			t.Fatal(err)
		}
	}
}

// A server that says nothing, and a caller that ends.
func TestCancel(t *testing.T) {
	n := newNetwork(t)
	asked := make(chan struct{})
	server := httptest.NewTLSServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		close(asked)
		<-r.Context().Done()
	}))
	defer server.Close()
	c, err := New(Config{Dir: t.TempDir(), URL: server.URL, Root: n.root(t), Client: server.Client()})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	cause := errors.New("shutting down")
	go func() {
		<-asked
		cancel(cause)
	}()
	if _, err := c.Refresh(ctx); !errors.Is(err, ErrUnreachable) || !errors.Is(err, cause) {
		t.Errorf("Refresh: %v, want %v", err, cause)
	}
}

func TestReach(t *testing.T) {
	status := func(code int) *http.Response { return &http.Response{StatusCode: code, Body: http.NoBody} }
	redirect := func(to string) *http.Response {
		r := status(http.StatusFound)
		r.Header = http.Header{"Location": {to}}
		return r
	}
	tests := []struct {
		name   string
		file   string
		answer func(name string) *http.Response
		want   error // nil: all is well
	}{
		{"no next root", "root.json", func(string) *http.Response { return status(404) }, nil},
		{"no next root at an object store", "root.json", func(string) *http.Response { return status(403) }, nil},
		{"root: out of order", "root.json", func(string) *http.Response { return status(500) }, ErrUnreachable},
		{"root: unauthorized", "root.json", func(string) *http.Response { return status(401) }, ErrUnreachable},
		{"root: no content", "root.json", func(string) *http.Response { return status(204) }, ErrUnreachable},
		{"no timestamp", "timestamp.json", func(string) *http.Response { return status(404) }, ErrUnreachable},
		{"no snapshot", "snapshot.json", func(string) *http.Response { return status(404) }, ErrUnreachable},
		{"no targets", "targets.json", func(string) *http.Response { return status(404) }, ErrUnreachable},
		{"no configuration", "config.json", func(string) *http.Response { return status(404) }, ErrUnreachable},
		{"cut short", "config.json", func(string) *http.Response {
			r := status(200)
			r.Body = io.NopCloser(io.MultiReader(strings.NewReader("{"), broken{}))
			return r
		}, ErrUnreachable},
		{"moved", "timestamp.json", func(name string) *http.Response {
			return redirect("https://elsewhere.example/tuf/" + name + "?moved")
		}, nil},
		{"redirect to http", "timestamp.json", func(name string) *http.Response {
			return redirect("http://network.example/tuf/" + name + "?moved")
		}, snapshot.ErrUntrusted},
		{"redirect to a file", "timestamp.json", func(string) *http.Response { return redirect("file:///etc/passwd") }, snapshot.ErrUntrusted},
		{"redirect with a password", "timestamp.json", func(name string) *http.Response {
			return redirect("https://a:b@network.example/tuf/" + name + "?moved")
		}, snapshot.ErrUntrusted},
		{"redirect in a circle", "timestamp.json", func(name string) *http.Response { return redirect("/tuf/" + name) }, snapshot.ErrUntrusted},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			n := newNetwork(t)
			n.intercept = func(r *http.Request, name string) *http.Response {
				if strings.HasSuffix(name, tt.file) && r.URL.RawQuery == "" {
					return tt.answer(name)
				}
				return nil
			}
			c := n.client(t)
			if tt.want == nil {
				sees(t, c, 1)
				return
			}
			refuses(t, c, tt.want)
			if len(n.fetched) > 5+maxRedirects {
				t.Errorf("fetched %q", n.fetched)
			}
			n.intercept = nil
			sees(t, c, 1)
		})
	}
}

type broken struct{}

func (broken) Read([]byte) (int, error) { return 0, io.ErrUnexpectedEOF }

// A server that cannot show who it is.
func TestTLSIsChecked(t *testing.T) {
	n := newNetwork(t)
	server := httptest.NewUnstartedServer(http.NotFoundHandler())
	server.Config.ErrorLog = log.New(io.Discard, "", 0)
	server.StartTLS()
	defer server.Close()
	c, err := New(Config{Dir: t.TempDir(), URL: server.URL, Root: n.root(t)})
	if err != nil {
		t.Fatal(err)
	}
	_, err = c.Refresh(t.Context())
	t.Logf("expected: %v: a certificate of an unknown authority; got: %v", ErrUnreachable, err)
	if !strings.Contains(fmt.Sprint(err), "certificate") {
		t.Errorf("%v, want a word about the certificate", err)
	}
	refuses(t, c, ErrUnreachable)
}
