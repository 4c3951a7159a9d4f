package publish

import (
	"bytes"
	"errors"
	"io"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"time"

	"github.com/resultity/node/internal/digest"
)

// served are the only paths that exist. Everything else in the directory, such
// as a file that is being written, does not.
var served = regexp.MustCompile(`^/(metadata/([1-9][0-9]{0,17}\.(root|targets|snapshot)|timestamp)\.json|targets/[0-9a-f]{64}\.config\.json)$`)

// Handler serves the repository in dir, read-only, at metadata/ and targets/
// below where it is mounted (see [http.StripPrefix]). It may run while another
// process publishes.
//
// A name with a version or a hash never changes its content and may be cached
// for ever. timestamp.json must be asked for again each time, and a missing
// root may exist the next time.
func Handler(dir string) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodGet && r.Method != http.MethodHead {
			w.Header().Set("Allow", "GET, HEAD")
			http.Error(w, "this is read-only", http.StatusMethodNotAllowed)
			return
		}
		w.Header().Set("X-Content-Type-Options", "nosniff")
		w.Header().Set("Cache-Control", "no-store")
		if !served.MatchString(r.URL.Path) {
			http.NotFound(w, r)
			return
		}
		raw, err := readWithin(filepath.Join(dir, "repository"), strings.TrimPrefix(r.URL.Path, "/"))
		if errors.Is(err, fs.ErrNotExist) {
			http.NotFound(w, r)
			return
		}
		if err != nil {
			// The reason names paths of this machine, which are nobody's business.
			http.Error(w, "cannot be read", http.StatusInternalServerError)
			return
		}
		cache := "public, max-age=31536000, immutable"
		if r.URL.Path == "/metadata/timestamp.json" {
			cache = "no-cache"
		}
		w.Header().Set("Cache-Control", cache)
		w.Header().Set("Content-Type", "application/json")
		w.Header().Set("ETag", `"`+digest.Of(raw).Hex()+`"`)
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(raw))
	})
}

// readWithin reads a regular file below dir; no link leads out of it.
func readWithin(dir, name string) ([]byte, error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, err
	}
	defer root.Close()
	// Opening a pipe would wait for its other end.
	f, err := root.OpenFile(filepath.FromSlash(name), os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !st.Mode().IsRegular() {
		return nil, errors.New("not a regular file")
	}
	return io.ReadAll(f)
}
