package publish

import (
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/resultity/node/internal/digest"
)

func get(h http.Handler, method, target string, header ...string) *httptest.ResponseRecorder {
	r := httptest.NewRequest(method, "/", nil)
	r.URL.Path = target // as it stands, uncleaned
	for i := 0; i < len(header); i += 2 {
		r.Header.Set(header[i], header[i+1])
	}
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	return w
}

func TestHandlerServes(t *testing.T) {
	dir := published(t, Options{})
	h := Handler(dir)
	const forever = "public, max-age=31536000, immutable"
	for target, cache := range map[string]string{
		"/metadata/1.root.json":                                      forever,
		"/metadata/1.targets.json":                                   forever,
		"/metadata/1.snapshot.json":                                  forever,
		"/metadata/timestamp.json":                                   "no-cache",
		"/targets/" + digest.Of(config(t, 1)).Hex() + ".config.json": forever,
	} {
		want, err := os.ReadFile(filepath.Join(dir, "repository", target))
		if err != nil {
			t.Fatal(err)
		}
		w := get(h, "GET", target)
		if w.Code != 200 || w.Body.String() != string(want) {
			t.Errorf("GET %s: %d, %d bytes; want %d bytes", target, w.Code, w.Body.Len(), len(want))
		}
		if got := w.Header().Get("Cache-Control"); got != cache {
			t.Errorf("%s: Cache-Control %q, want %q", target, got, cache)
		}
		if got := w.Header().Get("Content-Type"); got != "application/json" {
			t.Errorf("%s: Content-Type %q", target, got)
		}
		if w := get(h, "HEAD", target); w.Code != 200 || w.Body.Len() != 0 {
			t.Errorf("HEAD %s: %d, %d bytes", target, w.Code, w.Body.Len())
		}
		if w := get(h, "GET", target, "If-None-Match", w.Header().Get("ETag")); w.Code != 304 {
			t.Errorf("GET %s again: %d, want 304", target, w.Code)
		}
	}
}

func TestHandlerRefuses(t *testing.T) {
	dir := published(t, Options{})
	meta := filepath.Join(dir, "repository/metadata")
	for name, err := range map[string]error{
		"a link out of the repository": os.Symlink("../../keys/targets.pem", filepath.Join(meta, "2.root.json")),
		"an absolute link":             os.Symlink("/etc/passwd", filepath.Join(meta, "3.root.json")),
		"a pipe":                       syscall.Mkfifo(filepath.Join(meta, "4.root.json"), 0o600),
		"a directory":                  os.Mkdir(filepath.Join(meta, "5.root.json"), 0o700),
		"a file that is being written": os.WriteFile(filepath.Join(meta, "timestamp.json.tmp1"), []byte("secret"), 0o600),
	} {
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
	}
	h := Handler(dir)
	for _, target := range []string{
		"", "/", "/metadata", "/metadata/", "/targets/", "/keys/targets.pem", "/publish.json", "/lock",
		"/metadata/../../keys/targets.pem", "/../keys/targets.pem", "//etc/passwd", "/metadata/..", "/metadata/%2e%2e/x", "/metadata/1.root.json/",
		"/metadata/1.root.json\x00", "/metadata/1.root.json\n", "/metadata/01.root.json", "/metadata/0.root.json", "/metadata/root.json", "metadata/1.root.json",
		"/metadata/timestamp.json.tmp1", "/metadata/2.root.json", "/metadata/3.root.json", "/metadata/4.root.json", "/metadata/5.root.json", "/metadata/6.root.json",
		"/targets/" + digest.Of(nil).Hex() + ".config.json", "/targets/config.json",
	} {
		w := get(h, "GET", target)
		t.Logf("%q: expected: 404 or 500; got: %d %s", target, w.Code, strings.TrimSpace(w.Body.String()))
		if w.Code != 404 && w.Code != 500 {
			t.Errorf("GET %q: %d: %q", target, w.Code, w.Body)
		}
		if got := w.Header().Get("Cache-Control"); got != "no-store" {
			t.Errorf("GET %q: Cache-Control %q: a cache would hide a later root", target, got)
		}
		if w.Body.Len() > 40 {
			t.Errorf("GET %q says %q", target, w.Body)
		}
	}
	for _, method := range []string{"POST", "PUT", "DELETE", "PATCH", "OPTIONS", "CONNECT", "TRACE"} {
		if w := get(h, method, "/metadata/1.root.json"); w.Code != 405 || w.Header().Get("Allow") != "GET, HEAD" {
			t.Errorf("%s: %d, Allow %q", method, w.Code, w.Header().Get("Allow"))
		}
	}
	if w := get(Handler(t.TempDir()), "GET", "/metadata/1.root.json"); w.Code != 404 {
		t.Errorf("no repository: %d, want 404", w.Code)
	}
}
