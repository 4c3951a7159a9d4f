package model

import (
	"bytes"
	"context"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"runtime/pprof"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/model/fetch"
	"github.com/resultity/node/internal/model/modeltest"
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
	for range 6000 { // they may be on their way out, on a busy machine for a minute
		b.Reset()
		if err := pprof.Lookup("goroutine").WriteTo(&b, 2); err != nil {
			panic(err)
		}
		// The first stack is this one.
		_, others, _ := strings.Cut(b.String(), "\n\n")
		if !strings.Contains(others, "node/internal/model.") {
			return 0
		}
		time.Sleep(10 * time.Millisecond)
	}
	fmt.Fprintf(os.Stderr, "leaked goroutines:\n%s", b.String())
	return 1
}

var (
	content = modeltest.Content
	modelOf = modeltest.Model
	fileOf  = modeltest.File
	serve   = modeltest.Serve
)

// fetcher reaches the servers, and does not wait for long.
func fetcher(servers ...*httptest.Server) *fetch.Fetcher {
	x := fetch.New(modeltest.Transport(servers...), nil, slog.New(slog.DiscardHandler))
	x.Pace.Delays = []time.Duration{time.Millisecond, time.Millisecond}
	return x
}

func open(t testing.TB, dir string, servers ...*httptest.Server) *Store {
	t.Helper()
	s, err := Open(dir, fetcher(servers...), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
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

func TestEnsure(t *testing.T) {
	a, b := content(3<<20+17), content(5)
	var requests atomic.Int32
	srv := serve(t, func(w http.ResponseWriter, r *http.Request) {
		requests.Add(1)
		body := map[string][]byte{"/a": a, "/b": b}[r.URL.Path]
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(body))
	})
	m := modelOf(fileOf("weights/a", a, srv.URL+"/a"), fileOf("b.txt", b, srv.URL+"/b"), fileOf("same.txt", b, srv.URL+"/b"))
	s := open(t, filepath.Join(t.TempDir(), "store"), srv)
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
	for name, want := range map[string][]byte{"weights/a": a, "b.txt": b, "same.txt": b} {
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
	srv := serve(t, (&modeltest.Good{B: b}).ServeHTTP)
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
			s := open(t, t.TempDir(), srv)
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

func TestConcurrentEnsureFetchesOnce(t *testing.T) {
	b := content(2 << 20)
	g := &modeltest.Good{B: b}
	srv := serve(t, g.ServeHTTP)
	s := open(t, t.TempDir(), srv)
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
	if asked := g.Asked(); len(asked) != 1 {
		t.Errorf("%d requests", len(asked))
	}
	if len(s.locks.held) != 0 || len(s.busy) != 0 {
		t.Errorf("left over: %v, %v", s.locks.held, s.busy)
	}
}

// TestWaiterHelps: a file whose first source has gone silent comes from where another
// one, whose model has the same file, may fetch it.
func TestWaiterHelps(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := content(2 << 20)
		arrived := make(chan struct{})
		s := open(t, t.TempDir())
		s.fetcher = fetch.New(roundTrip(func(r *http.Request) (*http.Response, error) {
			if r.URL.Host == "silent.test" {
				close(arrived)
				<-r.Context().Done()
				return nil, r.Context().Err()
			}
			return &http.Response{StatusCode: http.StatusOK, ContentLength: int64(len(b)), Request: r, Body: io.NopCloser(bytes.NewReader(b))}, nil
		}), nil, s.log)
		s.fetcher.Pace.Window = time.Hour
		start := time.Now()
		var wg sync.WaitGroup
		ensure := func(source string) {
			if _, err := s.Ensure(t.Context(), modelOf(fileOf("f", b, source)), nil); err != nil {
				t.Errorf("%s: %v", source, err)
			}
			if took := time.Since(start); took > time.Minute {
				t.Errorf("%s: took %v", source, took)
			}
		}
		wg.Go(func() { ensure("https://silent.test/f") })
		<-arrived
		wg.Go(func() { ensure("https://good.test/f") })
		wg.Wait()
	})
}

type roundTrip func(*http.Request) (*http.Response, error)

// RoundTrip implements [http.RoundTripper].
func (f roundTrip) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

// TestWaiterTakesOver ends the call that fetches; the one that waits goes on.
func TestWaiterTakesOver(t *testing.T) {
	b := content(2 << 20)
	arrived := make(chan struct{}, 2)
	g := &modeltest.Good{B: b}
	var later atomic.Bool
	srv := serve(t, func(w http.ResponseWriter, r *http.Request) {
		if !later.Swap(true) {
			arrived <- struct{}{}
			<-r.Context().Done()
			return
		}
		g.ServeHTTP(w, r)
	})
	s := open(t, t.TempDir(), srv)
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
	srv := serve(t, (&modeltest.Good{B: b}).ServeHTTP)
	m := modelOf(fileOf("f", b, srv.URL))
	dir := t.TempDir()
	other := open(t, dir, srv) // another store is another process to flock
	list, err := other.list(t.Context(), &m.Files[0])
	if err != nil {
		t.Fatal(err)
	}
	p, err := other.openPartial(t.Context(), &m.Files[0], list)
	if err != nil {
		t.Fatal(err)
	}
	s := open(t, dir, srv)
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
	s := open(t, t.TempDir(), srv)
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
	err := s.Verify(t.Context(), m)
	t.Logf("expected: %v; got: %v", digest.ErrMismatch, err)
	if !errors.Is(err, digest.ErrMismatch) {
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

// TestVerifyWaits: what is being repaired is looked at afterwards, and the repaired file
// keeps its name.
func TestVerifyWaits(t *testing.T) {
	b := content(1 << 20)
	srv := serve(t, (&modeltest.Good{B: b}).ServeHTTP)
	m := modelOf(fileOf("a", b, srv.URL))
	s := open(t, t.TempDir(), srv)
	dir, err := s.Ensure(t.Context(), m, nil)
	if err != nil {
		t.Fatal(err)
	}
	flip(t, filepath.Join(dir, "a"))
	name := blobs + "/" + m.Files[0].SHA256.Hex()
	unlock, err := s.locks.lock(t.Context(), name)
	if err != nil {
		t.Fatal(err)
	}
	verified := make(chan error)
	go func() { verified <- s.Verify(t.Context(), m) }()
	for waiting := false; !waiting; time.Sleep(time.Millisecond) {
		s.locks.mu.Lock()
		waiting = s.locks.held[name].users == 2
		s.locks.mu.Unlock()
	}
	flip(t, filepath.Join(dir, "a")) // back
	unlock()
	if err := <-verified; err != nil || !s.Have(m) {
		t.Errorf("the repaired file: %v", err)
	}
}

func TestDistrust(t *testing.T) {
	b := content(1 << 20)
	srv := serve(t, (&modeltest.Good{B: b}).ServeHTTP)
	m := modelOf(fileOf("a", b, srv.URL))
	s := open(t, t.TempDir(), srv)
	if err := s.Distrust(t.Context(), digest.Of(b)); err != nil {
		t.Errorf("a file that is not here: %v", err)
	}
	if _, err := s.Ensure(t.Context(), m, nil); err != nil {
		t.Fatal(err)
	}
	if err := s.Distrust(t.Context(), digest.Of(b)); err != nil || !s.Have(m) {
		t.Errorf("a file that is right: %v", err)
	}
	flip(t, filepath.Join(s.dir, blobs, digest.Of(b).Hex()))
	if err := s.Distrust(t.Context(), digest.Of(b)); !errors.Is(err, digest.ErrMismatch) || s.Have(m) {
		t.Errorf("a damaged file: %v", err)
	}
	if _, err := s.Ensure(t.Context(), m, nil); err != nil || !s.Have(m) {
		t.Errorf("not mended: %v", err)
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
	srv := serve(t, (&modeltest.Good{B: b}).ServeHTTP)
	m := modelOf(fileOf("f", b, srv.URL))
	s := open(t, t.TempDir(), srv)
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
	if _, err := s.Ensure(t.Context(), m2, nil); !errors.Is(err, fetch.ErrLength) {
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
	s := open(t, t.TempDir(), srv)
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
		partOf(pending): true, filepath.Join(blobs, digest.Of(pending).Hex()+quarantined): true, // still to come
		filepath.Join(blobs, digest.Of(a).Hex()+hashes): true, filepath.Join(blobs, digest.Of([]byte{1}).Hex()+hashes): false,
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
	s := open(t, t.TempDir())
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
	s.fetcher = fetcher(srv)
	m := modelOf(fileOf("a", a, srv.URL+"/a"), fileOf("b", b, srv.URL+"/b"))
	if _, err := s.Ensure(t.Context(), m, nil); err != nil || !s.Have(m) {
		t.Fatalf("%v", err)
	}
}

func TestNoPathEscapes(t *testing.T) {
	b := content(100)
	srv := serve(t, (&modeltest.Good{B: b}).ServeHTTP)
	outer := t.TempDir()
	s := open(t, filepath.Join(outer, "store"), srv)
	for _, p := range []string{"", ".", "..", "../x", "a/../../x", "/etc/x", "a//b", "./a", "a/../b", "x/"} {
		dir, err := s.Ensure(t.Context(), modelOf(fileOf(p, b, srv.URL)), nil)
		t.Logf("path %q: expected: no usable path; got: %v", p, err)
		if err == nil || !strings.Contains(err.Error(), "no usable path") {
			t.Errorf("took path %q into %s: %v", p, dir, err)
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
	_, err := s.Ensure(t.Context(), modelOf(fileOf("f", b, srv.URL)), nil)
	t.Logf("a link out of the store: expected: path escapes; got: %v", err)
	if err == nil || !strings.Contains(err.Error(), "escapes") {
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
