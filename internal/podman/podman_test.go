package podman

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/resultity/node/internal/snapshot"
)

// What a real Podman does is tested on hosts, with image. Here are the answers
// that a real one cannot be asked for.

// service is a stand-in for Podman's API on a unix socket: a map from the end
// of a request's path to the answer.
type service map[string]http.HandlerFunc

var version = regexp.MustCompile(`^/v[0-9.]+/libpod`)

func (s service) dial(t *testing.T) *Client {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	srv := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		path := version.ReplaceAllString(r.URL.Path, "")
		if path == "/_ping" {
			w.Header().Set("Libpod-API-Version", "5.4.0")
			return
		}
		h := s[r.Method+" "+path]
		if h == nil && path == "/info" {
			h = says(`{"host":{},"store":{"graphRoot":"/"},"version":{"Version":"5.4.2"}}`)
		}
		if h == nil {
			t.Errorf("asked for %s %s", r.Method, path)
			http.Error(w, "{}", http.StatusTeapot)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		h(w, r)
	}))
	if err := srv.Listener.Close(); err != nil {
		t.Fatal(err)
	}
	srv.Listener = l
	srv.Start()
	t.Cleanup(srv.Close)
	c, err := Dial(t.Context(), socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

func says(body string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, body) }
}

func fails(code int, message string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(code)
		_ = json.NewEncoder(w).Encode(map[string]any{"cause": message, "message": message, "response": code})
	}
}

func refTo(t *testing.T, repo string, fill string) snapshot.ImageRef {
	t.Helper()
	ref, err := snapshot.ParseImageRef(repo + "@sha256:" + strings.Repeat(fill, 64))
	if err != nil {
		t.Fatal(err)
	}
	return ref
}

func TestUnavailable(t *testing.T) {
	dir := t.TempDir()
	dead := filepath.Join(dir, "dead")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: dead})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, socket := range []string{filepath.Join(dir, "none"), dead, file} {
		_, err := Dial(t.Context(), socket)
		if !errors.Is(err, ErrUnavailable) || !strings.Contains(fmt.Sprint(err), socket) {
			t.Errorf("%s: %v", filepath.Base(socket), err)
		}
	}
}

func TestDialEndsWithItsContext(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	// Says nothing about the service.
	if _, err := Dial(ctx, filepath.Join(t.TempDir(), "s")); !errors.Is(err, context.Canceled) || errors.Is(err, ErrUnavailable) {
		t.Errorf("error %v", err)
	}
}

func TestPull(t *testing.T) {
	ref := refTo(t, "registry.test/a", "a")
	stored := func(digests ...string) http.HandlerFunc {
		b, err := json.Marshal(map[string]any{"Id": "1", "Digest": "sha256:" + strings.Repeat("a", 64), "RepoDigests": digests})
		if err != nil {
			t.Fatal(err)
		}
		return says(string(b))
	}
	const done = `{"stream":"Copying blob\n"}{"images":["1"],"id":"1"}`
	other := refTo(t, "registry.test/a", "b").String()
	elsewhere := refTo(t, "registry.test/b", "a").String()
	for name, c := range map[string]struct {
		pull, image http.HandlerFunc
		want        error // nil is success
	}{
		"good":                        {says(done), stored(ref.String()), nil},
		"of an index":                 {says(done), stored(other, ref.String()), nil},
		"other digest stored":         {says(done), stored(other), ErrOtherImage},
		"other repository stored":     {says(done), stored(elsewhere), ErrOtherImage},
		"nothing stored":              {says(done), fails(http.StatusNotFound, "no such image"), ErrNotFound},
		"stream ends without a word":  {says(""), fails(http.StatusNotFound, "no such image"), ErrNotFound},
		"unsigned":                    {says(`{"error":"copying: Source image rejected: A signature was required, but no signature exists"}`), nil, ErrRefused},
		"stream is cut":               {says(`{"stream":"Copy`), nil, io.ErrUnexpectedEOF},
		"an error that is not a text": {says(`{"error":{}}`), nil, errAny},
		"unknown":                     {says(`{"what":1}`), nil, errAny},
		"registry is down":            {says(`{"error":"pinging container registry: connection refused"}`), nil, errAny},
		"service fails":               {fails(http.StatusInternalServerError, "storage is broken"), nil, errAny},
	} {
		t.Run(name, func(t *testing.T) {
			client := service{"POST /images/pull": c.pull, "GET /images/" + ref.String() + "/json": c.image}.dial(t)
			err := client.Pull(t.Context(), ref, nil)
			switch {
			case c.want == nil && err == nil:
			case c.want == errAny && err != nil:
				for _, named := range []error{ErrRefused, ErrNotFound, ErrOtherImage, ErrUnavailable, ErrInUse} {
					if errors.Is(err, named) {
						t.Errorf("error %v is %v", err, named)
					}
				}
			case !errors.Is(err, c.want):
				t.Errorf("error %v, want %v", err, c.want)
			}
		})
	}
}

var errAny = errors.New("any")

// TestHang ends a call to a service that does not answer.
func TestHang(t *testing.T) {
	ref := refTo(t, "registry.test/a", "a")
	asked, over := make(chan struct{}), make(chan struct{})
	defer close(over)
	hang := func(w http.ResponseWriter, r *http.Request) {
		w.(http.Flusher).Flush() // as a pull begins
		asked <- struct{}{}
		select {
		case <-r.Context().Done():
		case <-over:
		}
	}
	c := service{"POST /images/pull": hang, "GET /version": hang}.dial(t)
	for name, call := range map[string]func(context.Context) error{
		"pull":    func(ctx context.Context) error { return c.Pull(ctx, ref, nil) },
		"version": func(ctx context.Context) error { _, err := c.Version(ctx); return err },
	} {
		ctx, cancel := context.WithCancel(t.Context())
		go func() {
			<-asked
			cancel()
		}()
		if err := call(ctx); !errors.Is(err, context.Canceled) || errors.Is(err, ErrUnavailable) {
			t.Errorf("%s: %v", name, err)
		}
		cancel()
	}
}

// A pull that stands still ends; one that says something, or writes, does not.
func TestStalledPull(t *testing.T) {
	ref := refTo(t, "registry.test/a", "a")
	over := make(chan struct{})
	t.Cleanup(func() { close(over) })
	pull := func(silent int) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			for words := range 45 + silent {
				if words < 45 { // for longer than it may stand still
					fmt.Fprint(w, `{"stream":"Copying blob\n"}`)
				}
				w.(http.Flusher).Flush()
				select {
				case <-r.Context().Done():
					return
				case <-over:
					return
				case <-time.After(50 * time.Millisecond): // the pace of what is pulled
				}
			}
			fmt.Fprint(w, `{"images":["1"],"id":"1"}`)
		}
	}
	image := says(fmt.Sprintf(`{"Id":"1","RepoDigests":[%q]}`, ref))
	for name, c := range map[string]struct {
		writes int64 // bytes between two looks
		silent int   // words that do not come in the end
		want   error
	}{"quiet": {0, 2400, ErrStalled}, "a log is written": {1000, 2400, ErrStalled}, "writing": {pullFloor, 80, nil}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel() // it waits more than it works
			client := service{"POST /images/pull": pull(c.silent), "GET /images/" + ref.String() + "/json": image}.dial(t)
			left := atomic.Int64{}
			left.Store(1 << 40)
			client.stall = 2 * time.Second // that a busy machine does not stand still for
			client.free = func(string) int64 { return left.Add(-c.writes) }
			begin := time.Now()
			if err := client.Pull(t.Context(), ref, nil); !errors.Is(err, c.want) {
				t.Error(err)
			}
			if took := time.Since(begin); took < 45*50*time.Millisecond {
				t.Errorf("ended after %v, while it was talking", took)
			}
		})
	}
	if n := free(t.TempDir()); n <= 0 {
		t.Errorf("%d bytes free", n)
	}
}

func TestRemoveImages(t *testing.T) {
	a, b, c, d := refTo(t, "r.test/a", "a"), refTo(t, "r.test/b", "b"), refTo(t, "r.test/c", "c"), refTo(t, "r.test/d", "d")
	mirror := refTo(t, "mirror.test/a", "a")
	var asked []string
	client := service{"DELETE /images/remove": func(w http.ResponseWriter, r *http.Request) {
		q := r.URL.Query()
		asked = append(asked, q["images"]...)
		if q.Get("force") != "false" {
			t.Errorf("force is %q", q.Get("force"))
		}
		var errs []string
		switch q.Get("images") {
		case c.String():
			errs = []string{c.String() + ": image not known"}
		case d.String():
			errs = []string{"image used by 1: image is in use by a container: consider listing external containers"}
		}
		_ = json.NewEncoder(w).Encode(map[string]any{"Errors": errs})
	}}.dial(t)
	// The same image under another name is kept as well.
	gone, err := client.RemoveImages(t.Context(), []snapshot.ImageRef{a, b, c, d}, []snapshot.ImageRef{mirror})
	if !errors.Is(err, ErrInUse) || !slices.Equal(gone, []snapshot.ImageRef{b, c}) {
		t.Errorf("gone %v, %v", gone, err)
	}
	if want := []string{b.String(), c.String(), d.String()}; !slices.Equal(asked, want) {
		t.Errorf("asked to remove %q", asked)
	}
}

// Has tells "no" from no answer.
func TestHas(t *testing.T) {
	ref := refTo(t, "registry.test/a", "a")
	for name, c := range map[string]struct {
		image http.HandlerFunc
		has   bool
		fails bool
	}{
		"stored":           {says(fmt.Sprintf(`{"Id":"1","RepoDigests":[%q]}`, ref)), true, false},
		"not stored":       {fails(http.StatusNotFound, "no such image"), false, false},
		"under other name": {says(`{"Id":"1","RepoDigests":["registry.test/b@sha256:00"]}`), false, false},
		"service fails":    {fails(http.StatusInternalServerError, "storage is broken"), false, true},
		"empty":            {says(`{}`), false, true},
	} {
		client := service{"GET /images/" + ref.String() + "/json": c.image}.dial(t)
		if has, err := client.Has(t.Context(), ref); has != c.has || (err != nil) != c.fails {
			t.Errorf("%s: %v, %v", name, has, err)
		}
	}
}

// TestIncompleteAnswers: a field that is not there must not be a crash.
func TestIncompleteAnswers(t *testing.T) {
	c := service{
		"GET /version": says(`{}`), "GET /info": says(`{}`), "GET /containers/x/json": says(`{}`),
		"GET /images/" + refTo(t, "r.test/a", "a").String() + "/json": says(`{}`),
	}.dial(t)
	if _, err := c.Version(t.Context()); err == nil {
		t.Error("version of nothing")
	}
	if _, err := c.Info(t.Context()); err == nil {
		t.Error("info of nothing")
	}
	if _, err := c.Container(t.Context(), "x"); err == nil {
		t.Error("container of nothing")
	}
	if _, _, err := c.Image(t.Context(), refTo(t, "r.test/a", "a")); err == nil {
		t.Error("image of nothing")
	}
}

// A command in a container may print what is of use, and not fill the memory of who has
// asked.
func TestExecOutput(t *testing.T) {
	for _, c := range []struct {
		stream byte
		bytes  int
		want   error
	}{
		{1, maxOutput, nil},
		{1, maxOutput + 1, errOutput},
		{2, maxOutput + 1, errOutput},
		{1, 1 << 30, errOutput}, // as if without end
	} {
		var wrote int
		gone := make(chan struct{})
		start := func(w http.ResponseWriter, r *http.Request) {
			defer close(gone)
			conn, _, err := http.NewResponseController(w).Hijack()
			if err != nil {
				t.Error(err)
				return
			}
			defer conn.Close()
			_, err = io.WriteString(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\n")
			for err == nil && wrote < c.bytes {
				n := min(8<<10, c.bytes-wrote)
				_, err = conn.Write(append([]byte{c.stream, 0, 0, 0, 0, 0, byte(n >> 8), byte(n)}, make([]byte, n)...))
				wrote += n
			}
		}
		cl := service{
			"POST /containers/c/exec": func(w http.ResponseWriter, _ *http.Request) {
				w.WriteHeader(http.StatusCreated)
				fmt.Fprint(w, `{"Id":"1"}`)
			},
			"GET /exec/1/json":   says(`{"ProcessConfig":{"tty":false}}`),
			"POST /exec/1/start": start,
		}.dial(t)
		out, err := cl.Exec(t.Context(), "c", "env")
		<-gone
		t.Logf("%d bytes: expected: %v; got: %v", c.bytes, c.want, err)
		if !errors.Is(err, c.want) || err == nil && len(out) != c.bytes || wrote > 32*maxOutput {
			t.Errorf("%d bytes: %d and %v after %d, want %v", c.bytes, len(out), err, wrote, c.want)
		}
	}
}

func TestVersion(t *testing.T) {
	for s, want := range map[string]Version{
		"5.4.2": {5, 4, 2}, "5.8.6": {5, 8, 6}, "6.0.0-dev": {6, 0, 0}, "5.8.2-rc1": {5, 8, 2}, "5.8": {5, 8, 0}, "v5.4.2": {5, 4, 2},
		"": {}, "five": {}, "99999999999.1.1": {}, "-1.0.0": {},
	} {
		got, err := parseVersion(s)
		if got != want || (err == nil) != (want != Version{}) {
			t.Errorf("%q: %v, %v", s, got, err)
		}
	}
	v := Version{5, 4, 2}
	for _, c := range []struct {
		major, minor int
		want         bool
	}{{5, 4, true}, {5, 3, true}, {4, 9, true}, {5, 5, false}, {6, 0, false}} {
		if v.AtLeast(c.major, c.minor) != c.want {
			t.Errorf("%v at least %d.%d", v, c.major, c.minor)
		}
	}
}
