package fetch

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/resultity/node/internal/chunk"
	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/model/modeltest"
)

// roundTrip answers requests in memory, so that time can be the test's.
type roundTrip func(*http.Request) (*http.Response, error)

func (f roundTrip) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

// drip is a body that brings n bytes after each pause until all are there; with
// no bytes it stands still until it is closed.
type drip struct {
	r     *http.Request
	b     []byte
	n     int
	pause time.Duration
}

func (d *drip) Read(p []byte) (int, error) {
	if d.n == 0 {
		<-d.r.Context().Done()
		return 0, d.r.Context().Err()
	}
	if err := sleep(d.r.Context(), d.pause); err != nil {
		return 0, err
	}
	if len(d.b) == 0 {
		return 0, io.EOF
	}
	n := copy(p, d.b[:min(d.n, len(d.b))])
	d.b = d.b[n:]
	return n, nil
}

func (d *drip) Close() error { return nil }

func TestPace(t *testing.T) {
	b := modeltest.Content(1 << 20)
	body := func(r *http.Request, n int, pause time.Duration) *http.Response {
		return &http.Response{StatusCode: http.StatusOK, ContentLength: -1, Header: http.Header{}, Body: &drip{r, b, n, pause}}
	}
	for name, c := range map[string]struct {
		rt   roundTrip
		want error
		most time.Duration // for the one attempt
	}{
		"no answer": {func(r *http.Request) (*http.Response, error) {
			<-r.Context().Done()
			return nil, r.Context().Err()
		}, ErrStalled, DefaultPace.Window},
		"no byte":           {func(r *http.Request) (*http.Response, error) { return body(r, 0, 0), nil }, ErrStalled, DefaultPace.Window},
		"endless drip":      {func(r *http.Request) (*http.Response, error) { return body(r, 1, time.Second), nil }, ErrStalled, DefaultPace.Window},
		"drip within reach": {func(r *http.Request) (*http.Response, error) { return body(r, 1, 29*time.Second), nil }, ErrStalled, 2 * DefaultPace.Window},
		// No limit on the whole: this takes half an hour and is right.
		"slow but honest": {func(r *http.Request) (*http.Response, error) { return body(r, 16<<10, 29*time.Second/2), nil }, nil, time.Hour},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				x := open(c.rt)
				x.Pace.Delays = nil
				start := time.Now()
				_, err := fetch(t.Context(), x, b, nil, "https://source.test/f")
				if !errors.Is(err, c.want) || (err == nil) != (c.want == nil) {
					t.Errorf("error %v, want %v", err, c.want)
				}
				if took := time.Since(start); took > c.most {
					t.Errorf("took %v, at most %v", took, c.most)
				}
			})
		})
	}
}

// TestBackOff counts a source's requests and the time between them.
func TestBackOff(t *testing.T) {
	b := modeltest.Content(1000)
	unavailable := func(h http.Header) *http.Response {
		return &http.Response{StatusCode: http.StatusServiceUnavailable, Header: h, Body: http.NoBody}
	}
	t.Run("grows and ends", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			var at []time.Time
			x := New(roundTrip(func(r *http.Request) (*http.Response, error) {
				at = append(at, time.Now())
				return unavailable(http.Header{}), nil
			}), nil, slog.New(slog.DiscardHandler))
			if _, err := fetch(t.Context(), x, b, nil, "https://source.test/f"); !errors.Is(err, ErrStatus) {
				t.Errorf("error %v", err)
			}
			if len(at) != len(DefaultPace.Delays)+1 {
				t.Fatalf("%d requests", len(at))
			}
			for i, d := range DefaultPace.Delays {
				if got := at[i+1].Sub(at[i]); got < d/2 || got > d*3/2 {
					t.Errorf("pause %d was %v, want about %v", i, got, d)
				}
			}
		})
	})
	t.Run("source asks for more", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			for ask, want := range map[string]time.Duration{"100": 100 * time.Second, "60000": maxRetryAfter, "-5": 0, "soon": 0} {
				n := 0
				x := open(roundTrip(func(*http.Request) (*http.Response, error) {
					if n++; n == 1 {
						return unavailable(http.Header{"Retry-After": {ask}}), nil
					}
					return &http.Response{StatusCode: http.StatusOK, ContentLength: -1, Header: http.Header{}, Body: io.NopCloser(bytes.NewReader(b))}, nil
				}))
				start := time.Now()
				if _, err := fetch(t.Context(), x, b, nil, "https://source.test/f"); err != nil {
					t.Fatal(err)
				}
				if took := time.Since(start); took < want || took > want+2*time.Millisecond {
					t.Errorf("asked for %s, waited %v", ask, took)
				}
			}
		})
	})
}

// TestSlowSourceIsHelped: a source that brings its one chunk in half an hour does
// not hold up a fetch that another could end at once.
func TestSlowSourceIsHelped(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := modeltest.Content(1 << 20)
		x := open(roundTrip(func(r *http.Request) (*http.Response, error) {
			resp := &http.Response{StatusCode: http.StatusOK, ContentLength: -1, Header: http.Header{}, Request: r, Body: io.NopCloser(bytes.NewReader(b))}
			if r.URL.Host == "slow.test" {
				resp.Body = &drip{r, b, 16 << 10, 10 * time.Second}
			}
			return resp, nil
		}))
		start := time.Now()
		if _, err := fetch(t.Context(), x, b, nil, "https://slow.test/f", "https://fast.test/f"); err != nil {
			t.Fatal(err)
		}
		if took := time.Since(start); took < slow || took > 3*slow {
			t.Errorf("took %v", took)
		}
	})
}

// TestOfferHelps: who waits for a file that another is fetching from sources that bring
// next to nothing, on all connections that there are, helps with its own.
func TestOfferHelps(t *testing.T) {
	for name, late := range map[string]bool{"offered before": false, "offered meanwhile": true} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b := modeltest.Content(connections * chunk.Size)
				var withdraw func()
				defer func() { withdraw() }()
				asked := 0
				var x *Fetcher
				offer := func() {
					withdraw = x.Offer(digest.Of(b), []string{"https://fast.test/f", "https://0.slow.test/f"})
				}
				var mu sync.Mutex
				x = open(roundTrip(func(r *http.Request) (*http.Response, error) {
					resp := &http.Response{StatusCode: http.StatusOK, ContentLength: -1, Header: http.Header{}, Request: r, Body: io.NopCloser(bytes.NewReader(b))}
					if r.URL.Host == "fast.test" {
						return resp, nil
					}
					mu.Lock()
					defer mu.Unlock()
					if asked++; asked == connections && late {
						offer()
					}
					resp.Body = &drip{r, b, 16 << 10, 10 * time.Second}
					return resp, nil
				}))
				x.Offer(digest.Of([]byte("another file")), []string{"https://other.test/f"})
				if !late {
					offer()
				}
				var slowOnes []string
				for i := range connections {
					slowOnes = append(slowOnes, fmt.Sprintf("https://%d.slow.test/f", i))
				}
				start := time.Now()
				if _, err := fetch(t.Context(), x, b, nil, slowOnes...); err != nil {
					t.Fatal(err)
				}
				if took := time.Since(start); took > 10*slow {
					t.Errorf("took %v", took)
				}
				if len(x.runs) != 0 {
					t.Errorf("%d runs left", len(x.runs))
				}
				withdraw()
				withdraw = func() {}
				if len(x.offers) != 1 {
					t.Errorf("%d offers left, want the one for another file", len(x.offers))
				}
			})
		})
	}
}
