package fetch

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/resultity/node/internal/chunk"
	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/journal"
	"github.com/resultity/node/internal/model/modeltest"
	"github.com/resultity/node/internal/snapshot"
)

// target takes chunks.
type target struct {
	mu    sync.Mutex
	b     []byte
	puts  []int
	after func(puts int) error
}

func (g *target) put(i int, b []byte) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	copy(g.b[i*chunk.Size:], b)
	g.puts = append(g.puts, i)
	if g.after != nil {
		return g.after(len(g.puts))
	}
	return nil
}

func open(rt http.RoundTripper, neighbours ...string) *Fetcher {
	x := New(rt, neighbours, slog.New(slog.DiscardHandler))
	x.Pace.Delays = []time.Duration{time.Millisecond, time.Millisecond}
	return x
}

// fetch fetches b, but for the chunks that are here.
func fetch(ctx context.Context, x *Fetcher, b []byte, here []int, sources ...string) (*target, error) {
	list, sum, err := chunk.Read(bytes.NewReader(b))
	if err != nil {
		return nil, err
	}
	g := &target{b: make([]byte, len(b))}
	return g, g.fetch(ctx, x, b, list, sum, here, sources...)
}

func (g *target) fetch(ctx context.Context, x *Fetcher, b []byte, list *chunk.List, sum digest.Digest, here []int, sources ...string) error {
	var missing []int
	for i := range list.Len() {
		off, n := list.Range(i)
		if slices.Contains(here, i) {
			copy(g.b[off:], b[off:off+int64(n)])
		} else {
			missing = append(missing, i)
		}
	}
	err := x.Fetch(ctx, &File{Path: "f", SHA256: sum, List: list, Sources: sources}, missing, g.put, nil)
	if err == nil && !bytes.Equal(g.b, b) {
		return errors.New("it has succeeded, and something else is there")
	}
	return err
}

// TestHostileSources plays every source that must not be believed: alone it fails
// with the named error and nothing wrong is taken; beside a good one, the good one
// wins. The names of its cases are stable.
func TestHostileSources(t *testing.T) {
	const size = 2<<20 + 100
	b := modeltest.Content(size)
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
			bad := modeltest.Serve(t, c.h)
			var log bytes.Buffer
			x := open(modeltest.Transport(bad))
			x.log = slog.New(slog.NewTextHandler(&log, nil))
			g, err := fetch(t.Context(), x, b, nil, bad.URL+"/f?token=secret")
			t.Logf("expected: %v; got: %v", c.want, err)
			if !errors.Is(err, c.want) {
				t.Errorf("error %v, want %v", err, c.want)
			}
			said := journal.ModelSourceFailed
			if c.want == digest.ErrMismatch {
				said = journal.ModelSourceWrong
			}
			if l := log.String(); !strings.Contains(l, said.Name) || !strings.Contains(l, c.want.Error()) {
				t.Errorf("the journal does not say %s and why:\n%s", said.Name, l)
			}
			if err != nil && strings.Contains(err.Error()+log.String(), "secret") {
				t.Errorf("the error shows the query: %v\n%s", err, &log)
			}
			if len(g.puts) != 0 {
				t.Errorf("took chunks %v", g.puts)
			}
			fine := modeltest.Serve(t, (&modeltest.Good{B: b}).ServeHTTP)
			if _, err := fetch(t.Context(), open(modeltest.Transport(bad, fine)), b, nil, bad.URL, fine.URL); err != nil {
				t.Errorf("with a good source after it: %v", err)
			}
		})
	}
	t.Run("asked once", func(t *testing.T) {
		// Trying again cannot mend these, so it would only be a nuisance.
		for _, code := range []int{http.StatusForbidden, http.StatusNotFound, http.StatusGone} {
			var requests atomic.Int32
			srv := modeltest.Serve(t, func(w http.ResponseWriter, _ *http.Request) {
				requests.Add(1)
				w.WriteHeader(code)
			})
			_, err := fetch(t.Context(), open(modeltest.Transport(srv)), b, nil, srv.URL)
			t.Logf("%d: expected: asked once, %v; got: asked %d times, %v", code, ErrStatus, requests.Load(), err)
			if !errors.Is(err, ErrStatus) {
				t.Errorf("%d: %v", code, err)
			}
			if n := requests.Load(); n != 1 {
				t.Errorf("%d: %d requests", code, n)
			}
		}
	})
	t.Run("unknown certificate", func(t *testing.T) {
		g := &modeltest.Good{B: b}
		srv := modeltest.Serve(t, g.ServeHTTP)
		_, err := fetch(t.Context(), open(modeltest.Transport()), b, nil, srv.URL)
		t.Logf("expected: no trust in the certificate, nothing asked; got: %v, asked %d times", err, len(g.Asked()))
		if _, ok := errors.AsType[*tls.CertificateVerificationError](err); !ok || len(g.Asked()) != 0 {
			t.Errorf("error %v, %d requests", err, len(g.Asked()))
		}
	})
	t.Run("http source", func(t *testing.T) {
		_, err := fetch(t.Context(), open(nil), b, nil, plain.URL)
		t.Logf("expected: %v; got: %v", ErrInsecure, err)
		if !errors.Is(err, ErrInsecure) {
			t.Errorf("error %v", err)
		}
	})
	t.Run("no sources", func(t *testing.T) {
		_, err := fetch(t.Context(), open(nil), b, nil)
		t.Logf("expected: no source is named; got: %v", err)
		if err == nil {
			t.Error("it has succeeded")
		}
	})
}

// TestWrongChunkNamesItsSource: the culprit is named, is not asked again, and costs
// no more than one chunk.
func TestWrongChunkNamesItsSource(t *testing.T) {
	b := modeltest.Content(12 * chunk.Size)
	var lies atomic.Int32
	liar := modeltest.Serve(t, func(w http.ResponseWriter, r *http.Request) {
		lies.Add(1)
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(make([]byte, len(b))))
	})
	honest := modeltest.Serve(t, (&modeltest.Good{B: b}).ServeHTTP)
	var log bytes.Buffer
	x := open(modeltest.Transport(liar, honest))
	x.log = slog.New(slog.NewTextHandler(&log, nil))
	if _, err := fetch(t.Context(), x, b, nil, liar.URL+"/lie", honest.URL); err != nil {
		t.Fatal(err)
	}
	t.Logf("expected: model-source-wrong, asked at most %d times; got: %s, asked %d times", perSource, strings.Join(regexp.MustCompile(`model-source-\w+`).FindAllString(log.String(), -1), " "), lies.Load())
	if n := lies.Load(); n > perSource {
		t.Errorf("the liar was asked %d times", n)
	}
	if l := log.String(); !strings.Contains(l, "/lie") || !strings.Contains(l, "model-source-wrong") {
		t.Errorf("the log does not name it:\n%s", l)
	}
}

// TestParallelFromSeveral fetches from three sources of which each brings a part.
func TestParallelFromSeveral(t *testing.T) {
	b := modeltest.Content(20*chunk.Size + 17)
	var most, now atomic.Int32
	goods := make([]*modeltest.Good, 3)
	var servers []*httptest.Server
	var urls []string
	for i := range goods {
		goods[i] = &modeltest.Good{B: b}
		srv := modeltest.Serve(t, func(w http.ResponseWriter, r *http.Request) {
			for n := now.Add(1); n > most.Load(); {
				most.Store(n)
			}
			goods[i].ServeHTTP(w, r)
			now.Add(-1)
		})
		servers, urls = append(servers, srv), append(urls, srv.URL)
	}
	g, err := fetch(t.Context(), open(modeltest.Transport(servers...)), b, []int{0, 7, 20}, urls...)
	if err != nil {
		t.Fatal(err)
	}
	if slices.Sort(g.puts); len(g.puts) != 18 || slices.Contains(g.puts, 7) {
		t.Errorf("took %v", g.puts)
	}
	for i, good := range goods {
		if len(good.Asked()) == 0 {
			t.Errorf("source %d was not asked", i)
		}
	}
	if n := most.Load(); n < 2 || n > connections {
		t.Errorf("%d requests at once", n)
	}
}

// TestOnlyMissingIsAskedFor counts the bytes of a repair.
func TestOnlyMissingIsAskedFor(t *testing.T) {
	b := modeltest.Content(9*chunk.Size + 5)
	good := &modeltest.Good{B: b}
	srv := modeltest.Serve(t, good.ServeHTTP)
	if _, err := fetch(t.Context(), open(modeltest.Transport(srv)), b, []int{0, 1, 2, 3, 5, 6, 7, 8}, srv.URL); err != nil {
		t.Fatal(err)
	}
	asked := good.Asked()
	slices.Sort(asked)
	want := []string{fmt.Sprintf("bytes=%d-%d", 4*chunk.Size, 5*chunk.Size-1), fmt.Sprintf("bytes=%d-%d", 9*chunk.Size, len(b)-1)}
	slices.Sort(want)
	if !slices.Equal(asked, want) || good.Sent(srv) != chunk.Size+5 {
		t.Errorf("asked for %v, want %v", asked, want)
	}
}

// TestWithoutRanges: a source that knows whole files alone is streamed, once.
func TestWithoutRanges(t *testing.T) {
	b := modeltest.Content(5*chunk.Size + 1)
	whole := func(w http.ResponseWriter) {
		w.Header().Set("Content-Length", strconv.Itoa(len(b)))
		_, _ = w.Write(b)
	}
	for name, h := range map[string]func(w http.ResponseWriter, r *http.Request){
		"ignores them": func(w http.ResponseWriter, _ *http.Request) { whole(w) },
		"other range": func(w http.ResponseWriter, r *http.Request) {
			if r.Header.Get("Range") == "" {
				whole(w)
				return
			}
			w.Header().Set("Content-Range", fmt.Sprintf("bytes 0-%d/%d", len(b)-1, len(b)))
			w.WriteHeader(http.StatusPartialContent)
			_, _ = w.Write(b)
		},
		"not satisfiable": func(w http.ResponseWriter, r *http.Request) {
			if r.Header.Get("Range") == "" {
				whole(w)
				return
			}
			w.WriteHeader(http.StatusRequestedRangeNotSatisfiable)
		},
	} {
		for _, here := range [][]int{nil, {0, 2}} {
			t.Run(fmt.Sprintf("%s, %d here", name, len(here)), func(t *testing.T) {
				var requests atomic.Int32
				srv := modeltest.Serve(t, func(w http.ResponseWriter, r *http.Request) {
					requests.Add(1)
					h(w, r)
				})
				g, err := fetch(t.Context(), open(modeltest.Transport(srv)), b, here, srv.URL)
				if err != nil || len(g.puts) != 6-len(here) {
					t.Errorf("%v, chunks %v", err, g.puts)
				}
				if n := requests.Load(); n > 2*perSource {
					t.Errorf("%d requests", n)
				}
			})
		}
	}
}

// TestCutLineGoesOn: an honest source whose line is cut in the middle of a chunk again
// and again, and that is away every second time, brings all. There is one chunk, so that
// its requests are one after the other: of several at once as many might find it away, one
// behind the other, as end it.
func TestCutLineGoesOn(t *testing.T) {
	b := modeltest.Content(chunk.Size)
	const part = 1<<20 + 1 // is progress, and a few times too little
	var requests atomic.Int32
	srv := modeltest.Serve(t, func(w http.ResponseWriter, r *http.Request) {
		if requests.Add(1)%2 == 0 {
			w.WriteHeader(http.StatusServiceUnavailable)
			return
		}
		from, to := 0, len(b)-1
		if s := r.Header.Get("Range"); s != "" {
			if _, err := fmt.Sscanf(s, "bytes=%d-%d", &from, &to); err != nil {
				t.Error(err)
			}
			w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", from, to, len(b)))
			w.Header().Set("Content-Length", strconv.Itoa(to+1-from))
			w.WriteHeader(http.StatusPartialContent)
		} else {
			w.Header().Set("Content-Length", strconv.Itoa(len(b)))
		}
		_, _ = w.Write(b[from:min(from+part, to+1)])
	})
	liar := modeltest.Serve(t, func(w http.ResponseWriter, r *http.Request) {
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(make([]byte, len(b))))
	})
	for _, order := range [][]string{{srv.URL}, {liar.URL, srv.URL}, {srv.URL, liar.URL}} {
		if _, err := fetch(t.Context(), open(modeltest.Transport(srv, liar)), b, nil, order...); err != nil {
			t.Errorf("%v: %v", order, err)
		}
	}
}

// TestLocalErrorEndsIt: a full disk is no source's fault.
func TestLocalErrorEndsIt(t *testing.T) {
	b := modeltest.Content(8 * chunk.Size)
	srv := modeltest.Serve(t, (&modeltest.Good{B: b}).ServeHTTP)
	full := errors.New("full")
	list, sum, _ := chunk.Read(bytes.NewReader(b))
	g := &target{b: make([]byte, len(b)), after: func(n int) error {
		if n >= 3 {
			return full
		}
		return nil
	}}
	if err := g.fetch(t.Context(), open(modeltest.Transport(srv)), b, list, sum, nil, srv.URL); err != full {
		t.Errorf("error %v", err)
	}
}

func TestCancel(t *testing.T) {
	b := modeltest.Content(2 * chunk.Size)
	ctx, cancel := context.WithCancel(t.Context())
	srv := modeltest.Serve(t, func(w http.ResponseWriter, r *http.Request) {
		w.(http.Flusher).Flush()
		cancel()
		<-r.Context().Done()
	})
	if _, err := fetch(ctx, open(modeltest.Transport(srv)), b, nil, srv.URL); !errors.Is(err, context.Canceled) {
		t.Errorf("error %v", err)
	}
}

func TestList(t *testing.T) {
	b := modeltest.Content(3*chunk.Size + 1)
	f := modeltest.File("f", b)
	inline, err := open(nil).List(t.Context(), &f)
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		h    http.HandlerFunc
		want error
	}{
		"right":     {func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(inline.Bytes()) }, nil},
		"flipped":   {func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(make([]byte, 4*chunk.HashSize)) }, chunk.ErrList},
		"too short": {func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(inline.Bytes()[1:]) }, chunk.ErrList},
		"endless": {func(w http.ResponseWriter, r *http.Request) {
			for r.Context().Err() == nil {
				if _, err := w.Write(inline.Bytes()); err != nil {
					return
				}
			}
		}, chunk.ErrList},
		"absent": {func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusNotFound) }, ErrStatus},
		"broken": {func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusInternalServerError) }, ErrStatus},
		"http": {func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "http://"+r.Host, http.StatusFound)
		}, ErrInsecure},
	} {
		t.Run(name, func(t *testing.T) {
			srv := modeltest.Serve(t, c.h)
			fine := modeltest.Serve(t, func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(inline.Bytes()) })
			f := f
			f.Chunks = snapshot.Chunks{Root: f.Chunks.Root, Sources: []string{srv.URL + "?token=secret"}}
			x := open(modeltest.Transport(srv, fine))
			l, err := x.List(t.Context(), &f)
			if !errors.Is(err, c.want) || err == nil && !bytes.Equal(l.Bytes(), inline.Bytes()) || err != nil && strings.Contains(err.Error(), "secret") {
				t.Errorf("error %v, want %v", err, c.want)
			}
			f.Chunks.Sources = append(f.Chunks.Sources, fine.URL)
			if _, err := x.List(t.Context(), &f); err != nil {
				t.Errorf("with a good source after it: %v", err)
			}
		})
	}
}

// TestDeliveredChunkIsNotTakenOver: a slow worker that has delivered its chunk, and
// has not moved on yet, has nothing that another could take over. The chunk would
// count twice, and another one would be missing in the end.
func TestDeliveredChunkIsNotTakenOver(t *testing.T) {
	b := modeltest.Content(2 * chunk.Size)
	list, _, err := chunk.Read(bytes.NewReader(b))
	if err != nil {
		t.Fatal(err)
	}
	tardy, other := &worker{src: &source{ranges: true}, kept: -1}, &worker{src: &source{ranges: true}, kept: -1}
	r := &run{f: &File{List: list}, put: func(int, []byte) error { return nil }, owner: make([]*worker, 2), left: 2, workers: []*worker{tardy, other}, changed: make(chan struct{})}
	r.owner[0], r.owner[1] = tardy, other
	tardy.set(0, 1)
	tardy.since = time.Now().Add(-2 * slow)
	idle := &worker{src: &source{ranges: true}, kept: -1}
	if err := r.deliver(tardy, 0, b[:chunk.Size]); err != nil {
		t.Fatal(err)
	}
	if r.claim(idle) || r.owner[0] != nobody || r.left != 1 {
		t.Errorf("a chunk that is here was given away; %d are left", r.left)
	}
}

// TestSpanIsBounded: however much is missing, one request asks for no more, so that a
// source that is slow holds no more back.
func TestSpanIsBounded(t *testing.T) {
	for missing, want := range map[int]int{2 * connections * (maxSpan - 1): maxSpan - 1, 2 * connections * maxSpan: maxSpan, 20 * connections * maxSpan: maxSpan} {
		w := &worker{src: &source{ranges: true}, kept: -1}
		r := &run{owner: make([]*worker, missing), left: missing, workers: []*worker{w}}
		if !r.claim(w) || w.to-w.at != want {
			t.Errorf("of %d chunks one request has %d, want %d", missing, w.to-w.at, want)
		}
	}
}

// TestRedirectsAreBounded: a source may send us on so often, and not once more.
func TestRedirectsAreBounded(t *testing.T) {
	b := modeltest.Content(100)
	for _, n := range []int{maxRedirects, maxRedirects + 1} {
		srv := modeltest.Serve(t, func(w http.ResponseWriter, r *http.Request) {
			if left, err := strconv.Atoi(r.URL.Path[1:]); err == nil && left > 0 {
				http.Redirect(w, r, fmt.Sprint("/", left-1), http.StatusFound)
				return
			}
			(&modeltest.Good{B: b}).ServeHTTP(w, r)
		})
		_, err := fetch(t.Context(), open(modeltest.Transport(srv)), b, nil, fmt.Sprint(srv.URL, "/", n))
		if want := map[bool]error{true: ErrRedirects}[n > maxRedirects]; !errors.Is(err, want) {
			t.Errorf("%d times: %v, want %v", n, err, want)
		}
	}
}
