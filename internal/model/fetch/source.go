package fetch

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/resultity/node/internal/chunk"
	"github.com/resultity/node/internal/snapshot"
)

// What a source can do wrong.
var (
	// ErrInsecure says that a source, or a place it redirects to, is not https.
	ErrInsecure = errors.New("source is not https")
	// ErrRedirects says that a source redirects without end.
	ErrRedirects = errors.New("source redirects too often")
	// ErrStalled says that a source let the line stand still, or nearly so.
	ErrStalled = errors.New("source stalled")
	// ErrLength says that a source has not the length that the configuration
	// gives.
	ErrLength = errors.New("wrong length")
	// ErrRange says that a source answered a request for a range with another
	// one.
	ErrRange = errors.New("source does not serve the range asked for")
	// ErrEncoding says that a source sent the file encoded, though asked not to.
	ErrEncoding = errors.New("source encodes the file")
	// ErrStatus says that a source answered with an HTTP status that brings no
	// file.
	ErrStatus = errors.New("source answered")
)

const (
	maxRedirects  = 5
	maxRetryAfter = 5 * time.Minute
)

// permanentError is a failure that asking the source again cannot mend.
type permanentError struct{ error }

func (e permanentError) Unwrap() error { return e.error }

// localError is a failure of this machine; no source can mend it.
type localError struct{ error }

func (e localError) Unwrap() error { return e.error }

// laterError is a failure in passing with the source's wish when to come back.
type laterError struct {
	error
	after time.Duration
}

func (e laterError) Unwrap() error { return e.error }

// source is one place of a file, with what is known of it in this run.
type source struct {
	name   string // without what may be secret in it
	client *http.Client
	url    string                                                      // "" until it has been found out
	find   func(context.Context) (url string, c *http.Client, _ error) // finds it out; nil if url is given

	ranges   bool    // not proven to be unable to serve a part
	out      bool    // it is not asked again
	limit    int     // workers
	only     *worker // who goes on with a source that serves no parts
	fails    int     // in a row, without a chunk
	failures int     // ever
	failed   time.Time
	until    time.Time // when it is asked again
	errs     []error   // what it did wrong, the first few different things
	bytes    int64     // that came
	waited   time.Duration
}

func (s *source) note(err error) {
	same := func(e error) bool { return e.Error() == err.Error() }
	if len(s.errs) < 4 && !slices.ContainsFunc(s.errs, same) {
		s.errs = append(s.errs, err)
	}
}

// rate is how fast the source was while we waited for it, in bytes a second.
func (s *source) rate() int64 { return int64(float64(s.bytes) / max(s.waited.Seconds(), 1e-3)) }

func (x *Fetcher) source(address string, f *File) *source {
	if ref, ok := strings.CutPrefix(address, snapshot.OCI); ok {
		return &source{name: ref, ranges: true, find: func(ctx context.Context) (string, *http.Client, error) { return x.inArtifact(ctx, ref, f) }}
	}
	return &source{name: place(address), url: address, client: x.world, ranges: true}
}

// ask requests what w has claimed from its source, or everything from a source
// that knows no ranges, and delivers what comes. It returns how many bytes came.
func (r *run) ask(ctx context.Context, w *worker) (n int64, err error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	l := newLine(r.x.Pace, func() { cancel(ErrStalled) })
	defer func() {
		l.close()
		r.mu.Lock()
		defer r.mu.Unlock()
		w.src.bytes += l.total
		w.src.waited += l.all
		n = l.total
		if err != nil && ctx.Err() != nil { // the transport says only "canceled"
			if _, ok := errors.AsType[localError](err); !ok {
				err = context.Cause(ctx)
			}
		}
	}()
	address, client, err := r.address(ctx, w.src, l)
	if err != nil {
		return 0, classify(err)
	}
	r.mu.Lock()
	ranges, first, last := w.src.ranges, w.at, w.to
	r.mu.Unlock()
	size := r.f.List.Size()
	from, to := int64(0), size
	if ranges {
		from = int64(first)*chunk.Size + int64(len(w.buf))
		off, length := r.f.List.Range(last - 1)
		to = off + int64(length)
	} else {
		first, last, w.kept, w.buf = 0, len(r.owner), -1, w.buf[:0]
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, address, nil)
	if err != nil {
		return 0, permanentError{err}
	}
	req.Header.Set("User-Agent", "resultity-node")
	req.Header.Set("Accept-Encoding", "identity") // else the transport would ask for gzip and undo it
	if whole := from == 0 && to == size; !whole {
		req.Header.Set("Range", fmt.Sprintf("bytes=%d-%d", from, to-1))
	}
	var resp *http.Response
	l.wait(func() int {
		resp, err = client.Do(req)
		return 0
	})
	if err != nil {
		return 0, classify(err)
	}
	defer resp.Body.Close() // what was not read is not wanted
	partial, err := accept(resp, from, to, size)
	if errors.Is(err, ErrRange) || err == nil && !partial && req.Header.Get("Range") != "" {
		if !r.rangeless(w) {
			return 0, nil // another one goes on
		}
		if err != nil {
			return 0, err
		}
		first, last, w.kept, w.buf = 0, len(r.owner), -1, w.buf[:0]
		ranges = false
	}
	if err != nil {
		return 0, err
	}
	return 0, r.read(w, &lineReader{line: l, r: resp.Body}, ranges, first, last)
}

// rangeless notes that w's source serves whole files alone. The first worker to see
// it goes on with it and takes the file from its beginning; it reports whether w is.
func (r *run) rangeless(w *worker) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.release(w)
	w.src.ranges = false
	if w.src.only == nil {
		w.src.only = w
	}
	return w.src.only == w
}

// address returns where the source is to be asked.
func (r *run) address(ctx context.Context, s *source, l *line) (address string, c *http.Client, err error) {
	r.mu.Lock()
	address, c = s.url, s.client
	r.mu.Unlock()
	if address != "" {
		return address, c, nil
	}
	l.wait(func() int {
		address, c, err = s.find(ctx)
		return 0
	})
	if err == nil {
		r.mu.Lock()
		s.url, s.client = address, c
		r.mu.Unlock()
	}
	return address, c, err
}

// read takes the chunks from first to last off a body that begins with what w
// lacks of the first.
func (r *run) read(w *worker, body io.Reader, ranges bool, first, last int) error {
	for i := first; i < last; i++ {
		if ranges && !r.begin(w, i) {
			return nil // somebody else has taken the rest
		}
		off, length := r.f.List.Range(i)
		have := len(w.buf)
		w.buf = slices.Grow(w.buf, length-have)[:length]
		n, err := io.ReadFull(body, w.buf[have:])
		w.kept, w.buf = i, w.buf[:have+n]
		if err != nil {
			if !ranges {
				w.kept, w.buf = -1, w.buf[:0]
			}
			// A line that is cut says so; a body that ends by itself is too short.
			if err == io.EOF || err == io.ErrUnexpectedEOF && ended(body) {
				err = fmt.Errorf("%w: the source ended after %d of %d bytes", ErrLength, off+int64(have+n), r.f.List.Size())
			}
			return err
		}
		if ranges || r.wanted(i) {
			err = r.deliver(w, i, w.buf)
		}
		w.kept, w.buf = -1, w.buf[:0]
		if err != nil {
			return err
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if ranges {
		w.at = w.to
	}
	return nil
}

// ended reports whether a body came to its end without an error.
func ended(r io.Reader) bool {
	l, ok := r.(*lineReader)
	return ok && l.err == io.EOF
}

// accept checks the head of an answer to a request for the bytes [from,to) of
// size, and reports whether it is only of these.
func accept(resp *http.Response, from, to, size int64) (partial bool, err error) {
	switch c := resp.StatusCode; c {
	case http.StatusOK:
		if n := resp.ContentLength; n >= 0 && n != size {
			return false, permanentError{fmt.Errorf("%w: the source has %d bytes, the configuration says %d", ErrLength, n, size)}
		}
	case http.StatusPartialContent:
		partial = true
		want := fmt.Sprintf("bytes %d-%d/%d", from, to-1, size)
		got := resp.Header.Get("Content-Range")
		if n := resp.ContentLength; got != want || n >= 0 && n != to-from || resp.Request.Header.Get("Range") == "" {
			return false, fmt.Errorf("%w: want %q, got %.80q with %d bytes", ErrRange, want, got, n)
		}
	case http.StatusRequestedRangeNotSatisfiable:
		return false, fmt.Errorf("%w: it has nothing between %d and %d of %d", ErrRange, from, to, size)
	default:
		return false, refusal(resp)
	}
	if e := resp.Header.Get("Content-Encoding"); e != "" && !strings.EqualFold(e, "identity") {
		return false, permanentError{fmt.Errorf("%w as %.40q", ErrEncoding, e)}
	}
	return partial, nil
}

// refusal is the error of an answer that brings nothing.
func refusal(resp *http.Response) error {
	c := resp.StatusCode
	err := fmt.Errorf("%w %d %s", ErrStatus, c, http.StatusText(c))
	if c >= 500 || c == http.StatusRequestTimeout || c == http.StatusTooEarly || c == http.StatusTooManyRequests {
		n, _ := strconv.ParseUint(resp.Header.Get("Retry-After"), 10, 16) // a date or nonsense counts as none
		return laterError{err, min(time.Duration(n)*time.Second, maxRetryAfter)}
	}
	return permanentError{err}
}

// classify sorts what the HTTP client says. The client's own wrapper prints the
// whole URL, which may hold a token.
func classify(err error) error {
	if e, ok := errors.AsType[*url.Error](err); ok {
		err = e.Err
	}
	_, badCert := errors.AsType[*tls.CertificateVerificationError](err)
	if badCert || errors.Is(err, ErrInsecure) || errors.Is(err, ErrRedirects) {
		return permanentError{err}
	}
	return err
}

// secure lets https through and nothing else.
type secure struct{ http.RoundTripper }

func (s secure) RoundTrip(req *http.Request) (*http.Response, error) {
	if req.URL.Scheme != "https" {
		return nil, fmt.Errorf("%w: it is %s on %s", ErrInsecure, req.URL.Scheme, req.URL.Host)
	}
	return s.RoundTripper.RoundTrip(req)
}

func checkRedirect(req *http.Request, via []*http.Request) error {
	if len(via) > maxRedirects {
		return fmt.Errorf("%w: more than %d times", ErrRedirects, maxRedirects)
	}
	return nil
}

// place prints a URL without its query, which may hold a token.
func place(raw string) string {
	u, err := url.Parse(raw)
	if err != nil {
		return "unreadable URL"
	}
	return u.Host + u.Path
}

// line measures the time that we wait for a source, and only that: a slow disk
// of ours is not the source's fault. It has one user at a time.
type line struct {
	pace   Pace
	timer  *time.Timer // runs while we wait
	waited time.Duration
	got    int64
	all    time.Duration // ever
	total  int64
}

func newLine(p Pace, stalled func()) *line {
	t := time.AfterFunc(p.Window, stalled)
	t.Stop()
	return &line{pace: p, timer: t}
}

// wait runs f, which waits for the source and returns the bytes that it brought.
func (l *line) wait(f func() int) {
	start := time.Now()
	l.timer.Reset(l.pace.Window - l.waited)
	n := f()
	l.timer.Stop()
	d := time.Since(start)
	l.waited += d
	l.all += d
	l.total += int64(n)
	if l.got += int64(n); l.got >= l.pace.Floor {
		l.waited, l.got = 0, 0
	}
}

func (l *line) close() { l.timer.Stop() }

type lineReader struct {
	line *line
	r    io.Reader
	err  error // of r, the last one
}

func (r *lineReader) Read(b []byte) (n int, err error) {
	r.line.wait(func() int {
		n, err = r.r.Read(b)
		return n
	})
	r.err = err
	return n, err
}
