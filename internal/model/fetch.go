package model

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/resultity/node/internal/digest"
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

// pace is how patient a fetch is.
type pace struct {
	// A source must bring floor bytes in each window that we wait for it. A
	// larger span than any pause of a healthy line, and a rate at which nobody
	// would download a model: it ends drips without limiting how long a file
	// may take.
	window time.Duration
	floor  int64
	// delays are waited between turns through all sources that brought nothing
	// new; after the last one the fetch fails.
	delays []time.Duration
	// progress is how many bytes beyond the best so far make a turn a success.
	progress int64
}

var defaultPace = pace{
	window:   30 * time.Second,
	floor:    32 << 10,
	delays:   []time.Duration{time.Second, 5 * time.Second, 15 * time.Second, time.Minute},
	progress: 1 << 20,
}

const (
	maxRedirects  = 5
	maxRetryAfter = 5 * time.Minute
)

// source is one place of a file, with what is known of it in this fetch.
type source struct {
	url    string
	ranges bool    // not proven to be unable to continue a file
	errs   []error // what it did wrong, the first few different things
}

func (s *source) failed(err error) {
	same := func(e error) bool { return e.Error() == err.Error() }
	if len(s.errs) < 4 && !slices.ContainsFunc(s.errs, same) {
		s.errs = append(s.errs, err)
	}
}

// permanentError is a failure that trying the source again cannot mend.
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

// errMixed says that bytes of several sources, or of an earlier process, make
// up something wrong, so that nobody can be blamed.
var errMixed = errors.New("bytes of several origins do not fit together")

// fetch makes f a blob from its sources. The caller has the blob's lock.
func (s *Store) fetch(ctx context.Context, f *snapshot.File, report func(int64)) error {
	if len(f.Sources) == 0 {
		return errors.New("it has no sources")
	}
	p, err := s.openPartial(ctx, f, report)
	if err != nil {
		return err
	}
	defer p.close()

	all := make([]*source, len(f.Sources))
	for i, u := range f.Sources {
		all[i] = &source{url: u, ranges: true}
	}
	// Sources may complete each other's bytes until the sum is wrong once. From
	// then on each has to bring the whole file alone, so that one that lies is
	// found out instead of spoiling the others' work for ever.
	err = s.turns(ctx, p, all, report)
	if errors.Is(err, errMixed) {
		s.log.WarnContext(ctx, "partial model file was wrong, starting over", "file", f.Path, "error", err)
		for _, src := range all {
			if err = p.reset(); err != nil {
				return err
			}
			report(p.off)
			src.ranges = true
			if err = s.turns(ctx, p, []*source{src}, report); err == nil || !errors.Is(err, errExhausted) {
				return err
			}
		}
	}
	if !errors.Is(err, errExhausted) {
		return err
	}
	var errs []error
	for _, src := range all {
		if src.errs != nil {
			errs = append(errs, fmt.Errorf("%s: %w", place(src.url), errors.Join(src.errs...)))
		}
	}
	return fmt.Errorf("no source has brought it: %w", errors.Join(errs...))
}

// errExhausted says that no source of a list has brought the file; they know
// why.
var errExhausted = errors.New("sources are exhausted")

// turns asks the sources in turn until p is finished, or fails with
// [errExhausted], [errMixed], a [localError] or the context's error.
func (s *Store) turns(ctx context.Context, p *partial, left []*source, report func(int64)) error {
	left = slices.Clone(left)
	best := p.off
	var wait time.Duration // that a source asked for
	for n, idle := 0, 0; len(left) > 0; {
		n %= len(left)
		src := left[n]
		if !src.ranges && p.off > 0 && p.off < p.size {
			if err := p.reset(); err != nil {
				return err
			}
		}
		err := s.attempt(ctx, p, src, report)
		if err == nil {
			err = p.finish()
		}
		if err == nil {
			return nil
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if _, ok := errors.AsType[localError](err); ok {
			return err
		}
		if errors.Is(err, digest.ErrMismatch) {
			if p.sole != src {
				return fmt.Errorf("%w: %w", errMixed, err)
			}
			if err := p.reset(); err != nil {
				return err
			}
			report(p.off)
			err = permanentError{err}
		}
		src.failed(err)
		s.log.WarnContext(ctx, "model source failed", "source", place(src.url), "bytes", p.off, "of", p.size, "error", err)
		if _, ok := errors.AsType[permanentError](err); ok {
			left = slices.Delete(left, n, n+1)
			continue
		}
		if p.off >= best+s.pace.progress {
			best, idle = p.off, 0
			continue // the line was cut: go on where it was
		}
		if e, ok := errors.AsType[laterError](err); ok {
			wait = max(wait, e.after)
		}
		n++
		if idle++; idle%len(left) != 0 {
			continue
		}
		turn := idle/len(left) - 1
		if turn >= len(s.pace.delays) {
			return errExhausted
		}
		d := s.pace.delays[turn]
		d = max(d/2+rand.N(d), wait) // nodes must not come back as a herd
		wait = 0
		if err := sleep(ctx, d); err != nil {
			return err
		}
	}
	return errExhausted
}

// attempt asks src for the bytes that p lacks and appends them. It returns nil
// when p has its full length.
func (s *Store) attempt(ctx context.Context, p *partial, src *source, report func(int64)) error {
	if p.off == p.size {
		return nil
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	line := newLine(s.pace, func() { cancel(ErrStalled) })
	defer line.close()
	why := func(err error) error { // the transport says only "canceled"
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		return err
	}

	req, err := http.NewRequestWithContext(ctx, http.MethodGet, src.url, nil)
	if err != nil {
		return permanentError{err}
	}
	if req.URL.Scheme != "https" {
		return permanentError{ErrInsecure}
	}
	req.Header.Set("User-Agent", "resultity-node")
	req.Header.Set("Accept-Encoding", "identity") // else the transport would ask for gzip and undo it
	if p.off > 0 {
		req.Header.Set("Range", fmt.Sprintf("bytes=%d-", p.off))
		if v := p.origin.validator(src.url); v != "" {
			req.Header.Set("If-Range", v)
		}
	}
	var resp *http.Response
	line.wait(func() int {
		resp, err = s.client.Do(req)
		return 0
	})
	if err != nil {
		return classify(why(err))
	}
	defer resp.Body.Close() // what was not read is not wanted
	if err := p.accept(resp, src); err != nil {
		return err
	}
	err = p.pour(&lineReader{line, resp.Body}, report)
	if _, ok := errors.AsType[localError](err); ok {
		return err
	}
	if err != nil {
		return why(err)
	}
	if p.off < p.size {
		return fmt.Errorf("%w: the source ended after %d of %d bytes", ErrLength, p.off, p.size)
	}
	return nil
}

// accept checks the head of an answer and prepares p for its body.
func (p *partial) accept(resp *http.Response, src *source) error {
	switch c := resp.StatusCode; c {
	case http.StatusOK:
		if n := resp.ContentLength; n >= 0 && n != p.size {
			return permanentError{fmt.Errorf("%w: the source has %d bytes, the configuration says %d", ErrLength, n, p.size)}
		}
	case http.StatusPartialContent:
		want := fmt.Sprintf("bytes %d-%d/%d", p.off, p.size-1, p.size)
		got := resp.Header.Get("Content-Range")
		if n := resp.ContentLength; p.off == 0 || got != want || n >= 0 && n != p.size-p.off {
			src.ranges = false
			return fmt.Errorf("%w: want %q, got %.80q with %d bytes", ErrRange, want, got, n)
		}
	case http.StatusRequestedRangeNotSatisfiable:
		src.ranges = false
		return fmt.Errorf("%w: it has nothing after byte %d of %d", ErrRange, p.off, p.size)
	default:
		err := fmt.Errorf("%w %d %s", ErrStatus, c, http.StatusText(c))
		if c >= 500 || c == http.StatusRequestTimeout || c == http.StatusTooEarly || c == http.StatusTooManyRequests {
			n, _ := strconv.ParseUint(resp.Header.Get("Retry-After"), 10, 16) // a date or nonsense counts as none
			return laterError{err, min(time.Duration(n)*time.Second, maxRetryAfter)}
		}
		return permanentError{err}
	}
	if e := resp.Header.Get("Content-Encoding"); e != "" && !strings.EqualFold(e, "identity") {
		return permanentError{fmt.Errorf("%w as %.40q", ErrEncoding, e)}
	}
	if resp.StatusCode == http.StatusOK && p.off > 0 { // cannot or will not continue
		if err := p.reset(); err != nil {
			return err
		}
	}
	return p.begin(src, originOf(src.url, resp.Header))
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

func checkRedirect(req *http.Request, via []*http.Request) error {
	if req.URL.Scheme != "https" {
		return fmt.Errorf("%w: it redirects to %s on %s", ErrInsecure, req.URL.Scheme, req.URL.Host)
	}
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

func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// line measures the time that we wait for a source, and only that: a slow disk
// of ours is not the source's fault. It has one user at a time.
type line struct {
	pace   pace
	timer  *time.Timer // runs while we wait
	waited time.Duration
	got    int64
}

func newLine(p pace, stalled func()) *line {
	t := time.AfterFunc(p.window, stalled)
	t.Stop()
	return &line{pace: p, timer: t}
}

// wait runs f, which waits for the source and returns the bytes that it brought.
func (l *line) wait(f func() int) {
	start := time.Now()
	l.timer.Reset(l.pace.window - l.waited)
	n := f()
	l.timer.Stop()
	l.waited += time.Since(start)
	if l.got += int64(n); l.got >= l.pace.floor {
		l.waited, l.got = 0, 0
	}
}

func (l *line) close() { l.timer.Stop() }

type lineReader struct {
	line *line
	r    io.Reader
}

func (r *lineReader) Read(b []byte) (n int, err error) {
	r.line.wait(func() int {
		n, err = r.r.Read(b)
		return n
	})
	return n, err
}
