package model

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"runtime/pprof"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/snapshot"
)

func TestMain(m *testing.M) {
	// The strictest umask that a unit may set: the container must still be able
	// to read.
	syscall.Umask(0o077)
	if child := children[os.Getenv("MODEL_TEST_CHILD")]; child != nil {
		child()
		return
	}
	code := m.Run()
	if code == 0 {
		code = leaks()
	}
	os.Exit(code)
}

// leaks looks for goroutines of this package that outlived the tests.
func leaks() int {
	http.DefaultTransport.(*http.Transport).CloseIdleConnections()
	var b bytes.Buffer
	for range 100 {
		b.Reset()
		if err := pprof.Lookup("goroutine").WriteTo(&b, 2); err != nil {
			panic(err)
		}
		// The first stack is this one.
		_, others, _ := strings.Cut(b.String(), "\n\n")
		if !strings.Contains(others, "node/internal/model.") {
			return 0
		}
		time.Sleep(10 * time.Millisecond) // they may be on their way out
	}
	fmt.Fprintf(os.Stderr, "leaked goroutines:\n%s", b.String())
	return 1
}

// content makes n bytes that compress badly and repeat nowhere.
func content(n int) []byte {
	b := make([]byte, n)
	src := rand.NewChaCha8([32]byte{byte(n), byte(n >> 8), byte(n >> 16)})
	_, _ = src.Read(b) // never fails
	return b
}

func modelOf(files ...snapshot.File) *snapshot.Model {
	return &snapshot.Model{Name: "m", Version: "1", Format: "gguf", Files: files}
}

func fileOf(name string, b []byte, sources ...string) snapshot.File {
	return snapshot.File{Path: name, Size: int64(len(b)), SHA256: digest.Of(b), Sources: sources}
}

// serve runs a TLS server for the test.
func serve(t testing.TB, h http.HandlerFunc) *httptest.Server {
	t.Helper()
	srv := httptest.NewUnstartedServer(h)
	srv.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelError)
	srv.StartTLS()
	t.Cleanup(srv.Close)
	return srv
}

// clientFor trusts all of the servers.
func clientFor(servers ...*httptest.Server) *http.Client {
	pool := x509.NewCertPool()
	for _, s := range servers {
		if c := s.Certificate(); c != nil {
			pool.AddCert(c)
		}
	}
	return &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool}, DisableKeepAlives: true}}
}

func open(t testing.TB, dir string, c *http.Client) *Store {
	t.Helper()
	s, err := Open(dir, c, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	s.pace.delays = []time.Duration{time.Millisecond, time.Millisecond}
	s.margin = 1 << 20
	t.Cleanup(func() { _ = s.Close() })
	return s
}

// listing returns all files below dir with their sizes.
func listing(t testing.TB, dir string) []string {
	t.Helper()
	var out []string
	err := filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		st, err := d.Info()
		rel, _ := filepath.Rel(dir, p)
		out = append(out, fmt.Sprintf("%s %d", rel, st.Size()))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// finals returns the names below dir that claim to be verified.
func finals(t testing.TB, dir string) []string {
	t.Helper()
	return slices.DeleteFunc(listing(t, dir), func(s string) bool {
		return strings.Contains(s, unverified) || strings.Contains(s, quarantined)
	})
}

// good serves b with ranges, and notes what it was asked for.
type good struct {
	b    []byte
	etag string

	mu     sync.Mutex
	ranges []string // Range and If-Range of each request
	sent   int64
}

func (g *good) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	g.mu.Lock()
	g.ranges = append(g.ranges, r.Header.Get("Range")+" "+r.Header.Get("If-Range"))
	g.mu.Unlock()
	if g.etag != "" {
		w.Header().Set("ETag", g.etag)
	}
	cw := &countingWriter{ResponseWriter: w}
	http.ServeContent(cw, r, "", time.Time{}, bytes.NewReader(g.b))
	g.mu.Lock()
	g.sent += cw.n
	g.mu.Unlock()
}

// asked returns what the requests so far asked for.
func (g *good) asked() []string {
	g.mu.Lock()
	defer g.mu.Unlock()
	return slices.Clone(g.ranges)
}

// served returns the bytes of all bodies; no more requests can be made.
func (g *good) served(srv *httptest.Server) int64 {
	srv.Close() // waits for the handlers
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.sent
}

type countingWriter struct {
	http.ResponseWriter
	n int64
}

func (w *countingWriter) Write(b []byte) (int, error) {
	n, err := w.ResponseWriter.Write(b)
	w.n += int64(n)
	return n, err
}

func TestEnsure(t *testing.T) {
	a, b := content(3<<20+17), content(5)
	var requests atomic.Int32
	srv := serve(t, func(w http.ResponseWriter, r *http.Request) {
		requests.Add(1)
		body := map[string][]byte{"/a": a, "/b": b}[r.URL.Path]
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(body))
	})
	m := modelOf(fileOf("weights/a.gguf", a, srv.URL+"/a"), fileOf("b.json", b, srv.URL+"/b"), fileOf("same.json", b, srv.URL+"/b"))
	s := open(t, filepath.Join(t.TempDir(), "store"), clientFor(srv))
	if s.Have(m) {
		t.Fatal("has it before it was fetched")
	}
	var last int64
	dir, err := s.Ensure(t.Context(), m, func(done, total int64) {
		if done < last || total != m.Size() {
			t.Errorf("progress %d after %d, of %d", done, last, total)
		}
		last = done
	})
	if err != nil {
		t.Fatal(err)
	}
	if last != m.Size() {
		t.Errorf("progress ended at %d of %d", last, m.Size())
	}
	for name, want := range map[string][]byte{"weights/a.gguf": a, "b.json": b, "same.json": b} {
		got, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s: %d bytes, %v", name, len(got), err)
		}
	}
	// What another user can do below the directory that the container gets.
	err = filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		st, err := d.Info()
		if err != nil {
			return err
		}
		want := fs.FileMode(0o444)
		if d.IsDir() {
			want = 0o755
		}
		if st.Mode().Perm() != want {
			t.Errorf("%s has mode %v, want %v", p, st.Mode(), want)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if !s.Have(m) {
		t.Error("does not have it afterwards")
	}
	if err := s.Verify(t.Context(), m); err != nil {
		t.Error(err)
	}
	before := requests.Load()
	again, err := s.Ensure(t.Context(), m, nil)
	if err != nil || again != dir || requests.Load() != before {
		t.Errorf("second call: %q, %v, %d requests", again, err, requests.Load()-before)
	}
	if n := requests.Load(); n != 2 {
		t.Errorf("%d requests for two different files", n)
	}
	for _, f := range listing(t, s.dir) {
		if strings.Contains(f, unverified) || strings.Contains(f, building) {
			t.Errorf("left behind: %s", f)
		}
	}
}

func TestHaveSeesWhatIsNotTheModel(t *testing.T) {
	b := content(1000)
	srv := serve(t, (&good{b: b}).ServeHTTP)
	m := modelOf(fileOf("d/a", b, srv.URL))
	for name, spoil := range map[string]func(dir string) error{
		"file removed": func(dir string) error { return os.Remove(filepath.Join(dir, "d/a")) },
		"file added":   func(dir string) error { return os.WriteFile(filepath.Join(dir, "d/config.json"), nil, 0o600) },
		"file replaced": func(dir string) error {
			return errors.Join(os.Remove(filepath.Join(dir, "d/a")), os.WriteFile(filepath.Join(dir, "d/a"), b, 0o600))
		},
		"link instead": func(dir string) error {
			return errors.Join(os.Rename(filepath.Join(dir, "d/a"), filepath.Join(dir, "d/b")), os.Symlink("b", filepath.Join(dir, "d/a")))
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := open(t, t.TempDir(), clientFor(srv))
			dir, err := s.Ensure(t.Context(), m, nil)
			if err != nil {
				t.Fatal(err)
			}
			if err := spoil(dir); err != nil {
				t.Fatal(err)
			}
			if s.Have(m) {
				t.Fatal("takes it for the model")
			}
			if err := s.Verify(t.Context(), m); !errors.Is(err, ErrIncomplete) {
				t.Errorf("verify: %v", err)
			}
			if _, err := s.Ensure(t.Context(), m, nil); err != nil || !s.Have(m) {
				t.Fatalf("not mended: %v", err)
			}
		})
	}
}

// TestBadSources plays every source that must not be believed: alone it fails
// with the named error and leaves nothing under a final name; with a good one
// after it, the good one wins.
func TestBadSources(t *testing.T) {
	const size = 2<<20 + 100
	b := content(size)
	plain := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(b) }))
	t.Cleanup(plain.Close)
	flipped := bytes.Clone(b)
	flipped[size/2] ^= 1

	cases := map[string]struct {
		h    http.HandlerFunc
		want error
	}{
		"one flipped byte": {func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(flipped) }, digest.ErrMismatch},
		"another file of the same size": {func(w http.ResponseWriter, _ *http.Request) {
			_, _ = w.Write(make([]byte, size))
		}, digest.ErrMismatch},
		"says it is longer": {func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", strconv.Itoa(size+1))
			_, _ = w.Write(b)
		}, ErrLength},
		"endless": {func(w http.ResponseWriter, r *http.Request) {
			for r.Context().Err() == nil {
				if _, err := w.Write(flipped); err != nil {
					return
				}
			}
		}, digest.ErrMismatch},
		"says it is shorter": {func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", strconv.Itoa(size-1))
			_, _ = w.Write(b[:size-1])
		}, ErrLength},
		"ends early": {func(w http.ResponseWriter, _ *http.Request) {
			w.(http.Flusher).Flush() // no length
			_, _ = w.Write(b[:size-1])
		}, ErrLength},
		"cuts the line each time": {func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", strconv.Itoa(size))
			_, _ = w.Write(b[:1<<20])
		}, io.ErrUnexpectedEOF},
		"cuts, then another range": {func(w http.ResponseWriter, r *http.Request) {
			if r.Header.Get("Range") == "" {
				w.Header().Set("Content-Length", strconv.Itoa(size))
				_, _ = w.Write(b[:1<<20])
				return
			}
			w.Header().Set("Content-Range", fmt.Sprintf("bytes 0-%d/%d", size-1<<20-1, size))
			w.WriteHeader(http.StatusPartialContent)
			_, _ = w.Write(b[:size-1<<20])
		}, ErrRange},
		"a range nobody asked for": {func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Range", fmt.Sprintf("bytes 0-%d/%d", size-1, size))
			w.WriteHeader(http.StatusPartialContent)
			_, _ = w.Write(b)
		}, ErrRange},
		"encodes": {func(w http.ResponseWriter, r *http.Request) {
			if r.Header.Get("Accept-Encoding") != "identity" {
				return
			}
			w.Header().Set("Content-Encoding", "gzip")
			_, _ = w.Write(b)
		}, ErrEncoding},
		"redirects to http": {func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, plain.URL, http.StatusFound)
		}, ErrInsecure},
		"redirects for ever": {func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, r.URL.Path+"x", http.StatusFound)
		}, ErrRedirects},
		"does not have it": {func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusNotFound) }, ErrStatus},
		"is out of order":  {func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusBadGateway) }, ErrStatus},
		"an error page":    {func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "<html>sorry</html>") }, ErrLength},
		"an empty answer":  {func(w http.ResponseWriter, _ *http.Request) { w.(http.Flusher).Flush() }, ErrLength},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			bad := serve(t, c.h)
			s := open(t, t.TempDir(), clientFor(bad))
			m := modelOf(fileOf("f", b, bad.URL+"/f?token=secret"))
			_, err := s.Ensure(t.Context(), m, nil)
			if !errors.Is(err, c.want) {
				t.Errorf("error %v, want %v", err, c.want)
			}
			if err != nil && strings.Contains(err.Error(), "secret") {
				t.Errorf("the error shows the query: %v", err)
			}
			if got := finals(t, s.dir); len(got) != 0 || s.Have(m) {
				t.Errorf("under a final name: %v", got)
			}

			g := &good{b: b, etag: `"g"`}
			fine := serve(t, g.ServeHTTP)
			s = open(t, s.dir, clientFor(bad, fine))
			m.Files[0].Sources = append(m.Files[0].Sources, fine.URL)
			dir, err := s.Ensure(t.Context(), m, nil)
			if err != nil {
				t.Fatalf("with a good source after it: %v", err)
			}
			if got, err := os.ReadFile(filepath.Join(dir, "f")); err != nil || !bytes.Equal(got, b) {
				t.Errorf("got %d bytes, %v", len(got), err)
			}
		})
	}

	t.Run("asked once", func(t *testing.T) {
		// Trying again cannot mend these, so it would only be a nuisance.
		for _, code := range []int{http.StatusForbidden, http.StatusNotFound, http.StatusGone} {
			var requests atomic.Int32
			srv := serve(t, func(w http.ResponseWriter, _ *http.Request) {
				requests.Add(1)
				w.WriteHeader(code)
			})
			if _, err := open(t, t.TempDir(), clientFor(srv)).Ensure(t.Context(), modelOf(fileOf("f", b, srv.URL)), nil); !errors.Is(err, ErrStatus) {
				t.Errorf("%d: %v", code, err)
			}
			if n := requests.Load(); n != 1 {
				t.Errorf("%d: %d requests", code, n)
			}
		}
	})
	t.Run("unknown certificate", func(t *testing.T) {
		g := &good{b: b}
		srv := serve(t, g.ServeHTTP)
		_, err := open(t, t.TempDir(), clientFor()).Ensure(t.Context(), modelOf(fileOf("f", b, srv.URL)), nil)
		if _, ok := errors.AsType[*tls.CertificateVerificationError](err); !ok || len(g.asked()) != 0 {
			t.Errorf("error %v, %d requests", err, len(g.asked()))
		}
	})
	t.Run("http source", func(t *testing.T) {
		_, err := open(t, t.TempDir(), clientFor()).Ensure(t.Context(), modelOf(fileOf("f", b, plain.URL)), nil)
		if !errors.Is(err, ErrInsecure) {
			t.Errorf("error %v", err)
		}
	})
}

// TestLongerBodyIsNotRead proves that nothing beyond the size is taken: a body
// that goes on behind the right bytes neither spoils them nor is waited for.
func TestLongerBodyIsNotRead(t *testing.T) {
	b := content(1 << 20)
	released := make(chan struct{})
	srv := serve(t, func(w http.ResponseWriter, r *http.Request) {
		defer close(released)
		_, _ = w.Write(b)
		_, _ = w.Write(b)
		w.(http.Flusher).Flush()
		<-r.Context().Done() // the client has hung up
	})
	s := open(t, t.TempDir(), clientFor(srv))
	if _, err := s.Ensure(t.Context(), modelOf(fileOf("f", b, srv.URL)), nil); err != nil {
		t.Fatal(err)
	}
	<-released
	if got, want := finals(t, filepath.Join(s.dir, blobs)), []string{fmt.Sprintf("%s %d", digest.Of(b).Hex(), len(b))}; !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

// cutter serves like good, but the first request only up to a byte.
func cutter(g *good, at int) http.HandlerFunc {
	var later atomic.Bool
	return func(w http.ResponseWriter, r *http.Request) {
		if later.Swap(true) {
			g.ServeHTTP(w, r)
			return
		}
		w.Header().Set("ETag", g.etag)
		w.Header().Set("Content-Length", strconv.Itoa(len(g.b)))
		_, _ = w.Write(g.b[:at])
	}
}

func TestResumeAfterCut(t *testing.T) {
	b := content(5<<20 + 3)
	const at = 3<<20 + 1000
	t.Run("same version", func(t *testing.T) {
		g := &good{b: b, etag: `"v1"`}
		srv := serve(t, cutter(g, at))
		if _, err := open(t, t.TempDir(), clientFor(srv)).Ensure(t.Context(), modelOf(fileOf("f", b, srv.URL)), nil); err != nil {
			t.Fatal(err)
		}
		if want := []string{fmt.Sprintf(`bytes=%d- "v1"`, at)}; !slices.Equal(g.asked(), want) {
			t.Errorf("asked for %q, want %q", g.asked(), want)
		}
		if sent := g.served(srv); sent != int64(len(b)-at) {
			t.Errorf("sent %d bytes again", sent-int64(len(b)-at))
		}
	})
	t.Run("version changed", func(t *testing.T) {
		// The first version is not ours; the second one is, and If-Range has
		// the source send all of it.
		g := &good{b: b, etag: `"v2"`}
		var later atomic.Bool
		old := serve(t, func(w http.ResponseWriter, r *http.Request) {
			if later.Swap(true) {
				g.ServeHTTP(w, r)
				return
			}
			w.Header().Set("ETag", `"v1"`)
			w.Header().Set("Content-Length", strconv.Itoa(len(b)))
			_, _ = w.Write(make([]byte, at))
		})
		if _, err := open(t, t.TempDir(), clientFor(old)).Ensure(t.Context(), modelOf(fileOf("f", b, old.URL)), nil); err != nil {
			t.Fatal(err)
		}
		asked, sent := g.asked(), g.served(old)
		if len(asked) != 1 || !strings.HasSuffix(asked[0], `- "v1"`) || sent != int64(len(b)) {
			t.Errorf("asked for %q, sent %d", asked, sent)
		}
	})
	t.Run("ranges ignored", func(t *testing.T) {
		var later atomic.Bool
		srv := serve(t, func(w http.ResponseWriter, _ *http.Request) {
			n := at
			if later.Swap(true) {
				n = len(b)
			}
			w.Header().Set("Content-Length", strconv.Itoa(len(b)))
			_, _ = w.Write(b[:n])
		})
		if _, err := open(t, t.TempDir(), clientFor(srv)).Ensure(t.Context(), modelOf(fileOf("f", b, srv.URL)), nil); err != nil {
			t.Fatal(err)
		}
	})
	for name, refuse := range map[string]func(w http.ResponseWriter, r *http.Request){
		"wrong range": func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Range", fmt.Sprintf("bytes 0-%d/%d", len(b)-1, len(b)))
			w.WriteHeader(http.StatusPartialContent)
			_, _ = w.Write(b)
		},
		"range not satisfiable": func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(http.StatusRequestedRangeNotSatisfiable)
		},
	} {
		t.Run(name, func(t *testing.T) {
			var requests atomic.Int32
			srv := serve(t, func(w http.ResponseWriter, r *http.Request) {
				n := requests.Add(1)
				if r.Header.Get("Range") != "" {
					refuse(w, r)
					return
				}
				w.Header().Set("Content-Length", strconv.Itoa(len(b)))
				if n == 1 {
					_, _ = w.Write(b[:at])
					return
				}
				_, _ = w.Write(b)
			})
			if _, err := open(t, t.TempDir(), clientFor(srv)).Ensure(t.Context(), modelOf(fileOf("f", b, srv.URL)), nil); err != nil {
				t.Fatal(err)
			}
			if n := requests.Load(); n != 3 {
				t.Errorf("%d requests, want the cut one, the refused one and all from zero", n)
			}
		})
	}
	t.Run("another source goes on", func(t *testing.T) {
		g := &good{b: b}
		dead := serve(t, func(w http.ResponseWriter, r *http.Request) {
			if r.Header.Get("Range") != "" {
				w.WriteHeader(http.StatusServiceUnavailable)
				return
			}
			w.Header().Set("ETag", `"dead"`)
			w.Header().Set("Content-Length", strconv.Itoa(len(b)))
			_, _ = w.Write(b[:at])
		})
		fine := serve(t, g.ServeHTTP)
		if _, err := open(t, t.TempDir(), clientFor(dead, fine)).Ensure(t.Context(), modelOf(fileOf("f", b, dead.URL, fine.URL)), nil); err != nil {
			t.Fatal(err)
		}
		// The tag of one source says nothing to another.
		if want := []string{fmt.Sprintf("bytes=%d- ", at)}; !slices.Equal(g.asked(), want) {
			t.Errorf("asked for %q, want %q", g.asked(), want)
		}
	})
}

// TestResumeAfterRestart leaves a partial file by ending the context and goes
// on with a new store.
func TestResumeAfterRestart(t *testing.T) {
	b := content(4 << 20)
	const at = 2 << 20
	g := &good{b: b, etag: `"v1"`}
	ctx, cancel := context.WithCancel(t.Context())
	var later atomic.Bool
	srv := serve(t, func(w http.ResponseWriter, r *http.Request) {
		if later.Swap(true) {
			g.ServeHTTP(w, r)
			return
		}
		w.Header().Set("ETag", g.etag)
		w.Header().Set("Content-Length", strconv.Itoa(len(b)))
		_, _ = w.Write(b[:at])
		w.(http.Flusher).Flush()
		<-r.Context().Done()
	})
	m := modelOf(fileOf("f", b, srv.URL))
	dir := t.TempDir()
	_, err := open(t, dir, clientFor(srv)).Ensure(ctx, m, func(done, _ int64) {
		if done == at {
			cancel()
		}
	})
	if !errors.Is(err, context.Canceled) {
		t.Fatalf("interrupted with %v", err)
	}
	if got := finals(t, dir); len(got) != 0 {
		t.Errorf("under a final name: %v", got)
	}

	damage := func(t *testing.T, change func([]byte) []byte) string {
		t.Helper()
		d := t.TempDir()
		if err := os.CopyFS(d, os.DirFS(dir)); err != nil {
			t.Fatal(err)
		}
		name := filepath.Join(d, blobs, m.Files[0].SHA256.Hex()+unverified)
		part, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, change(part), 0o600); err != nil {
			t.Fatal(err)
		}
		return d
	}
	resumed := fmt.Sprintf(`bytes=%d- "v1"`, at)
	for name, c := range map[string]struct {
		change func([]byte) []byte
		want   []string // requests
	}{
		"whole":         {func(p []byte) []byte { return p }, []string{resumed}},
		"flipped byte":  {func(p []byte) []byte { p[5] ^= 1; return p }, []string{resumed, " "}},
		"zeroed tail":   {func(p []byte) []byte { clear(p[at-4096:]); return p }, []string{resumed, " "}},
		"too long":      {func(p []byte) []byte { return append(p, b...) }, []string{" "}},
		"complete":      {func([]byte) []byte { return b }, nil},
		"complete, bad": {func([]byte) []byte { return make([]byte, len(b)) }, []string{" "}},
		"empty":         {func([]byte) []byte { return nil }, []string{" "}},
	} {
		t.Run(name, func(t *testing.T) {
			before := len(g.asked())
			s := open(t, damage(t, c.change), clientFor(srv))
			if _, err := s.Ensure(t.Context(), m, nil); err != nil {
				t.Fatal(err)
			}
			if got := g.asked()[before:]; !slices.Equal(got, c.want) {
				t.Errorf("requests %q, want %q", got, c.want)
			}
			if err := s.Verify(t.Context(), m); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestLiarCannotSpoilTheOthers: one source never brings a file that could be
// found wrong. It begins wrongly and cuts the line, or ends what another has
// begun. The other is honest, but its line is bad.
func TestLiarCannotSpoilTheOthers(t *testing.T) {
	const size, part = 3 << 20, 1<<20 + 1
	b := content(size)
	liar := serve(t, func(w http.ResponseWriter, r *http.Request) {
		from := 0
		if n, err := fmt.Sscanf(r.Header.Get("Range"), "bytes=%d-", &from); n == 1 && err == nil {
			w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", from, size-1, size))
			w.WriteHeader(http.StatusPartialContent)
			_, _ = w.Write(make([]byte, size-from))
			return
		}
		w.Header().Set("Content-Length", strconv.Itoa(size))
		_, _ = w.Write(make([]byte, part))
	})
	var requests atomic.Int32
	honest := serve(t, func(w http.ResponseWriter, r *http.Request) {
		n := requests.Add(1)
		if n%2 == 0 || n > 100 {
			w.WriteHeader(http.StatusServiceUnavailable)
			return
		}
		from := 0
		if r.Header.Get("Range") != "" {
			if _, err := fmt.Sscanf(r.Header.Get("Range"), "bytes=%d-", &from); err != nil {
				t.Error(err)
			}
			w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", from, size-1, size))
			w.Header().Set("Content-Length", strconv.Itoa(size-from))
			w.WriteHeader(http.StatusPartialContent)
		} else {
			w.Header().Set("Content-Length", strconv.Itoa(size))
		}
		_, _ = w.Write(b[from:min(from+part, size)])
	})
	for name, sources := range map[string][]string{"honest first": {honest.URL, liar.URL}, "liar first": {liar.URL, honest.URL}} {
		t.Run(name, func(t *testing.T) {
			requests.Store(0)
			s := open(t, t.TempDir(), clientFor(liar, honest))
			m := modelOf(fileOf("f", b, sources...))
			if _, err := s.Ensure(t.Context(), m, nil); err != nil {
				t.Fatal(err)
			}
			if err := s.Verify(t.Context(), m); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestConcurrentEnsureFetchesOnce(t *testing.T) {
	b := content(2 << 20)
	g := &good{b: b}
	srv := serve(t, g.ServeHTTP)
	s := open(t, t.TempDir(), clientFor(srv))
	var wg sync.WaitGroup
	for i := range 8 {
		// Two models that share the file.
		m := modelOf(fileOf(fmt.Sprintf("f%d", i%2), b, srv.URL))
		wg.Go(func() {
			dir, err := s.Ensure(t.Context(), m, nil)
			if err != nil || !s.Have(m) || dir != filepath.Join(s.dir, trees, m.Digest().Hex()) {
				t.Errorf("%q, %v", dir, err)
			}
		})
	}
	wg.Wait()
	if asked := g.asked(); len(asked) != 1 {
		t.Errorf("%d requests", len(asked))
	}
	if len(s.locks.held) != 0 || len(s.busy) != 0 {
		t.Errorf("left over: %v, %v", s.locks.held, s.busy)
	}
}

// TestWaiterTakesOver ends the call that fetches; the one that waits goes on.
func TestWaiterTakesOver(t *testing.T) {
	b := content(2 << 20)
	arrived := make(chan struct{}, 2)
	g := &good{b: b}
	var later atomic.Bool
	srv := serve(t, func(w http.ResponseWriter, r *http.Request) {
		if !later.Swap(true) {
			arrived <- struct{}{}
			<-r.Context().Done()
			return
		}
		g.ServeHTTP(w, r)
	})
	s := open(t, t.TempDir(), clientFor(srv))
	m := modelOf(fileOf("f", b, srv.URL))
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() {
		if _, err := s.Ensure(ctx, m, nil); !errors.Is(err, context.Canceled) {
			t.Errorf("the first ended with %v", err)
		}
	})
	<-arrived
	wg.Go(func() {
		if _, err := s.Ensure(t.Context(), m, nil); err != nil {
			t.Errorf("the second ended with %v", err)
		}
	})
	cancel()
	wg.Wait()
}

func TestTwoProcessesDoNotMix(t *testing.T) {
	b := content(1 << 20)
	srv := serve(t, (&good{b: b}).ServeHTTP)
	m := modelOf(fileOf("f", b, srv.URL))
	dir := t.TempDir()
	other := open(t, dir, clientFor(srv)) // another store is another process to flock
	p, err := other.openPartial(t.Context(), &m.Files[0], func(int64) {})
	if err != nil {
		t.Fatal(err)
	}
	s := open(t, dir, clientFor(srv))
	if _, err := s.Ensure(t.Context(), m, nil); !errors.Is(err, syscall.EWOULDBLOCK) {
		t.Fatalf("error %v", err)
	}
	if got := listing(t, dir); len(got) != 1 {
		t.Errorf("the other's file is gone: %v", got)
	}
	// The name goes to another file: what p holds is no longer what a rename
	// would move.
	name := filepath.Join(dir, p.name+unverified)
	if err := errors.Join(os.Remove(name), os.WriteFile(name, []byte("x"), 0o600)); err != nil {
		t.Fatal(err)
	}
	if err := p.own(); err == nil {
		t.Error("took a name that is another file's")
	}
	p.close()
	if _, err := s.Ensure(t.Context(), m, nil); err != nil {
		t.Fatal(err)
	}
}

func TestVerifyQuarantines(t *testing.T) {
	a, b := content(1<<20), content(1<<20+1)
	srv := serve(t, func(w http.ResponseWriter, r *http.Request) {
		body := map[string][]byte{"/a": a, "/b": b}[r.URL.Path]
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(body))
	})
	m := modelOf(fileOf("a", a, srv.URL+"/a"), fileOf("b", b, srv.URL+"/b"))
	s := open(t, t.TempDir(), clientFor(srv))
	if err := s.Verify(t.Context(), m); !errors.Is(err, ErrIncomplete) {
		t.Errorf("verify of nothing: %v", err)
	}
	if _, err := s.Ensure(t.Context(), m, nil); err != nil {
		t.Fatal(err)
	}
	blob := filepath.Join(s.dir, blobs, m.Files[0].SHA256.Hex())
	flip(t, blob)
	if !s.Have(m) {
		t.Fatal("sizes and names are right, so Have should not notice")
	}
	if err := s.Verify(t.Context(), m); !errors.Is(err, digest.ErrMismatch) {
		t.Fatalf("error %v", err)
	}
	if s.Have(m) {
		t.Error("still has it")
	}
	if _, err := os.Lstat(blob); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the damaged file still has its name: %v", err)
	}
	if _, err := os.Lstat(blob + quarantined); err != nil {
		t.Error(err)
	}
	if _, err := s.Ensure(t.Context(), m, nil); err != nil {
		t.Fatal(err)
	}
	if err := s.Verify(t.Context(), m); err != nil {
		t.Error(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := s.Verify(ctx, m); !errors.Is(err, context.Canceled) || !s.Have(m) {
		t.Errorf("cancelled: %v", err)
	}
}

// flip changes one byte of a read-only file, as a bad disk would.
func flip(t *testing.T, name string) {
	t.Helper()
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(name, 0o600); err != nil {
		t.Fatal(err)
	}
	b[len(b)/3] ^= 0x10
	if err := os.WriteFile(name, b, 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestEnsureMendsTruncatedBlob(t *testing.T) {
	b := content(1 << 20)
	srv := serve(t, (&good{b: b}).ServeHTTP)
	m := modelOf(fileOf("f", b, srv.URL))
	s := open(t, t.TempDir(), clientFor(srv))
	if _, err := s.Ensure(t.Context(), m, nil); err != nil {
		t.Fatal(err)
	}
	blob := filepath.Join(s.dir, blobs, m.Files[0].SHA256.Hex())
	if err := errors.Join(os.Chmod(blob, 0o600), os.Truncate(blob, 1000)); err != nil {
		t.Fatal(err)
	}
	if s.Have(m) {
		t.Error("has it")
	}
	dir, err := s.Ensure(t.Context(), m, nil)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(filepath.Join(dir, "f")); err != nil || !bytes.Equal(got, b) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
	// The same file with another size in the configuration must not cost the
	// good file its name.
	m2 := modelOf(fileOf("f", b, srv.URL))
	m2.Files[0].Size++
	if _, err := s.Ensure(t.Context(), m2, nil); !errors.Is(err, ErrLength) {
		t.Errorf("error %v", err)
	}
	if !s.Have(m) {
		t.Error("lost the good file")
	}
}

func TestRetain(t *testing.T) {
	a, b, shared := content(1000), content(2000), content(3000)
	srv := serve(t, func(w http.ResponseWriter, r *http.Request) {
		body := map[string][]byte{"/a": a, "/b": b, "/s": shared}[r.URL.Path]
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(body))
	})
	keep := modelOf(fileOf("a", a, srv.URL+"/a"), fileOf("s", shared, srv.URL+"/s"))
	drop := modelOf(fileOf("b", b, srv.URL+"/b"), fileOf("s", shared, srv.URL+"/s"))
	s := open(t, t.TempDir(), clientFor(srv))
	for _, m := range []*snapshot.Model{keep, drop} {
		if _, err := s.Ensure(t.Context(), m, nil); err != nil {
			t.Fatal(err)
		}
	}
	want := listing(t, s.dir)
	want = slices.DeleteFunc(want, func(l string) bool {
		return strings.Contains(l, drop.Digest().Hex()) || strings.Contains(l, digest.Of(b).Hex())
	})
	pending := content(4000)
	partOf := func(b []byte) string { return filepath.Join(blobs, digest.Of(b).Hex()+unverified) }
	for name, keep := range map[string]bool{
		partOf(pending): true, partOf(pending) + ".json": true, // still to come
		partOf(a):          false, // is there
		partOf([]byte{1}):  false, // of nothing listed
		"blobs/stray":      false,
		"trees/0.building": false, "blobs/" + digest.Of(a).Hex() + quarantined: false,
	} {
		if err := os.WriteFile(filepath.Join(s.dir, name), []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
		if keep {
			want = append(want, name+" 1")
		}
	}
	slices.Sort(want)
	waiting := modelOf(fileOf("p", pending, srv.URL+"/p"))
	if err := s.Retain([]*snapshot.Model{keep, waiting}); err != nil {
		t.Fatal(err)
	}
	if got := listing(t, s.dir); !slices.Equal(got, want) {
		t.Errorf("left:\n%s\nwant:\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	if !s.Have(keep) || s.Have(drop) {
		t.Error("kept the wrong one")
	}
	if err := s.Retain(nil); err != nil {
		t.Fatal(err)
	}
	if got := listing(t, s.dir); len(got) != 0 {
		t.Errorf("left: %v", got)
	}
}

// TestRetainSparesRunningEnsure removes everything while a model is half there.
func TestRetainSparesRunningEnsure(t *testing.T) {
	a, b := content(1<<20), content(2<<20)
	s := open(t, t.TempDir(), nil)
	srv := serve(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/a" {
			_, _ = w.Write(a)
			return
		}
		_, _ = w.Write(b[:1<<20])
		w.(http.Flusher).Flush()
		if err := s.Retain(nil); err != nil {
			t.Error(err)
		}
		_, _ = w.Write(b[1<<20:])
	})
	s.client.Transport = clientFor(srv).Transport
	m := modelOf(fileOf("a", a, srv.URL+"/a"), fileOf("b", b, srv.URL+"/b"))
	if _, err := s.Ensure(t.Context(), m, nil); err != nil || !s.Have(m) {
		t.Fatalf("%v", err)
	}
}

func TestNoPathEscapes(t *testing.T) {
	b := content(100)
	srv := serve(t, (&good{b: b}).ServeHTTP)
	outer := t.TempDir()
	s := open(t, filepath.Join(outer, "store"), clientFor(srv))
	for _, p := range []string{"", ".", "..", "../x", "a/../../x", "/etc/x", "a//b", "./a", "a/../b", "x/"} {
		if dir, err := s.Ensure(t.Context(), modelOf(fileOf(p, b, srv.URL)), nil); err == nil {
			t.Errorf("took path %q into %s", p, dir)
		}
	}
	if got := listing(t, outer); len(got) != 0 {
		t.Errorf("wrote %v", got)
	}
	// A directory that has become a link out of the store.
	if err := errors.Join(os.Remove(filepath.Join(s.dir, trees)), os.Mkdir(filepath.Join(outer, "elsewhere"), 0o700),
		os.Symlink("../elsewhere", filepath.Join(s.dir, trees))); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Ensure(t.Context(), modelOf(fileOf("f", b, srv.URL)), nil); err == nil {
		t.Error("followed a link out of the store")
	}
	if got := listing(t, filepath.Join(outer, "elsewhere")); len(got) != 0 {
		t.Errorf("wrote %v", got)
	}
}

// writeCA writes a file with the server's certificate.
func writeCA(t *testing.T, srv *httptest.Server) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "ca.pem")
	b := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: srv.Certificate().Raw})
	if err := os.WriteFile(name, b, 0o600); err != nil {
		t.Fatal(err)
	}
	return name
}
