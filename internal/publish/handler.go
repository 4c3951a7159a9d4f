package publish

import (
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"time"
)

// served are the only paths that exist. Everything else in the directory, such
// as a file that is being written, does not.
var served = regexp.MustCompile(`^/(metadata/([1-9][0-9]{0,17}\.(root|targets|snapshot)|timestamp)\.json|targets/[0-9a-f]{64}\.config\.json)$`)

// Handler serves the repository in dir, read-only, at metadata/ and targets/
// below where it is mounted (see [http.StripPrefix]). It may run while another
// process publishes. Files are read as they are sent, so that what a request takes of
// memory does not depend on them.
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
		f, st, err := openWithin(filepath.Join(dir, "repository"), strings.TrimPrefix(r.URL.Path, "/"))
		if errors.Is(err, fs.ErrNotExist) {
			http.NotFound(w, r)
			return
		}
		if err != nil {
			// The reason names paths of this machine, which are nobody's business.
			http.Error(w, "cannot be read", http.StatusInternalServerError)
			return
		}
		defer f.Close() // it was only read
		cache := "public, max-age=31536000, immutable"
		if r.URL.Path == "/metadata/timestamp.json" {
			cache = "no-cache"
		}
		w.Header().Set("Cache-Control", cache)
		w.Header().Set("Content-Type", "application/json")
		// What is published has another time: files are made elsewhere and renamed.
		w.Header().Set("ETag", fmt.Sprintf(`"%x-%x"`, st.ModTime().UnixNano(), st.Size()))
		http.ServeContent(w, r, "", time.Time{}, f)
	})
}

// openWithin opens a regular file below dir; no link leads out of it.
func openWithin(dir, name string) (*os.File, fs.FileInfo, error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, nil, err
	}
	defer root.Close()
	// Opening a pipe would wait for its other end.
	f, err := root.OpenFile(filepath.FromSlash(name), os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, nil, err
	}
	st, err := f.Stat()
	if err == nil && !st.Mode().IsRegular() {
		err = errors.New("not a regular file")
	}
	if err != nil {
		_ = f.Close() // nothing was read
		return nil, nil, err
	}
	return f, st, nil
}
