// Package fetch brings the chunks of a file from several sources at once. It
// knows nothing of disks: who calls says which chunks are missing and takes them.
//
// The rule it keeps: a chunk is handed on only after its hash was found right, and
// all bytes of a chunk come from one source, so that a wrong one has one culprit.
// That source is not asked again for the file, and the journal names it.
//
// Sources are asked in their order and beside each other, with [connections]
// requests in all, and as many more for each other one who waits for the file and has
// further sources; one that is out of order is asked again later, ever less often,
// as long as it brings nothing. Who has nothing left to ask for takes over half of
// what another has not begun, and in the end also a chunk that another is slow with.
package fetch

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"slices"
	"sync"
	"time"

	"github.com/resultity/node/internal/chunk"
	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/journal"
)

const (
	connections = 6               // requests at once for a file, over all sources of one who wants it
	perSource   = 4               // and of one source
	maxSpan     = 16              // chunks in one request
	slow        = 5 * time.Second // for one chunk, until another source is asked for it, too
)

// Pace is how patient a fetch is.
type Pace struct {
	// A source must bring Floor bytes in each Window that we wait for it. A
	// larger span than any pause of a healthy line, and a rate at which nobody
	// would download a model: it ends drips without limiting how long a file
	// may take.
	Window time.Duration
	Floor  int64
	// Delays are waited between requests to a source that brings nothing; after
	// the last one it is not asked again.
	Delays []time.Duration
	// Progress is how many bytes make a request that was cut short a success.
	Progress int64
}

// DefaultPace is for the internet.
var DefaultPace = Pace{
	Window:   30 * time.Second,
	Floor:    32 << 10,
	Delays:   []time.Duration{time.Second, 5 * time.Second, 15 * time.Second, time.Minute},
	Progress: 1 << 20,
}

// Fetcher fetches files. Its methods may be called concurrently.
type Fetcher struct {
	Pace       Pace
	world      *http.Client // https alone
	lan        *http.Client // http, too; nobody's proxy
	neighbours []string     // base URLs
	log        *slog.Logger

	mu     sync.Mutex // guards what follows
	offers []*File    // sources that those who wait for a file have for it
	runs   []*run     // under way
}

// New returns a fetcher that reaches sources through rt; nil means Go's default.
// Neighbours are base URLs of web servers nearby that may have files, by their SHA-256. They are
// trusted no more than any other source.
func New(rt http.RoundTripper, neighbours []string, log *slog.Logger) *Fetcher {
	if rt == nil {
		rt = http.DefaultTransport
	}
	return &Fetcher{Pace: DefaultPace, world: &http.Client{Transport: secure{rt}, CheckRedirect: checkRedirect}, lan: lanClient(), neighbours: neighbours, log: log}
}

// File is what is to be fetched.
type File struct {
	Path    string // for people
	SHA256  digest.Digest
	List    *chunk.List
	Sources []string // https://… or oci://…
}

// Fetch brings the chunks of f with these numbers. It calls put for each, once it
// is verified, in several goroutines and at worst twice for the same one; the bytes
// are put's only until it returns. An error of put's is this machine's: it ends the
// fetch and is returned as it is. tell, if not nil, is called in this goroutine
// with the number of chunks that are still missing.
//
// Otherwise Fetch fails with ctx, or when no source is left to be asked; the error
// then wraps what happened at each.
func (x *Fetcher) Fetch(ctx context.Context, f *File, missing []int, put func(i int, b []byte) error, tell func(left int)) error {
	if len(missing) == 0 {
		return nil
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	r := &run{x: x, f: f, put: put, most: connections, owner: make([]*worker, f.List.Len()), left: len(missing), changed: make(chan struct{})}
	for i := range r.owner {
		r.owner[i] = nobody
	}
	for _, i := range missing {
		r.owner[i] = nil
	}
	for _, n := range x.neighbours {
		r.sources = append(r.sources, x.neighbour(n, f))
	}
	x.begin(r)
	err := r.supervise(ctx, tell)
	x.end(r)
	cancel()
	r.wg.Wait()
	if err == nil {
		r.account(ctx)
	}
	return err
}

// Offer says that somebody waits for a file and where that one would fetch it: who is
// fetching it, or begins to, asks there as well, and is helped out of sources that
// bring next to nothing. It holds until withdraw is called.
func (x *Fetcher) Offer(file digest.Digest, sources []string) (withdraw func()) {
	o := &File{SHA256: file, Sources: sources}
	x.mu.Lock()
	defer x.mu.Unlock()
	x.offers = append(x.offers, o)
	for _, r := range x.runs {
		if r.f.SHA256 == file {
			r.join(sources)
		}
	}
	return func() {
		x.mu.Lock()
		defer x.mu.Unlock()
		x.offers = slices.DeleteFunc(x.offers, func(p *File) bool { return p == o })
	}
}

// begin has r ask its own sources and those that were offered.
func (x *Fetcher) begin(r *run) {
	x.mu.Lock()
	defer x.mu.Unlock()
	for _, s := range r.f.Sources {
		r.sources = append(r.sources, x.source(s, r.f))
	}
	for _, o := range x.offers {
		if o.SHA256 == r.f.SHA256 {
			r.join(o.Sources)
		}
	}
	x.runs = append(x.runs, r)
}

// end has nothing more join r.
func (x *Fetcher) end(r *run) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.runs = slices.DeleteFunc(x.runs, func(o *run) bool { return o == r })
}

// nobody is who owns what is here, or was never missing.
var nobody = &worker{}

// run is one fetch of one file.
type run struct {
	x   *Fetcher
	f   *File
	put func(int, []byte) error
	wg  sync.WaitGroup

	// mu guards what follows, and all fields of sources and workers that others
	// than their own goroutine use.
	mu      sync.Mutex
	sources []*source
	most    int           // requests at once
	joined  bool          // there are sources that were not there before
	owner   []*worker     // by chunk: who fetches it; nil if nobody does yet
	low     int           // no chunk before it is nobody's to fetch
	left    int           // chunks that are missing
	workers []*worker     // that go on
	local   error         // of this machine
	changed chan struct{} // closed and replaced at every change
}

// worker is one connection to a source.
type worker struct {
	src      *source
	at, to   int       // chunks of its request; others may take some away from the end
	since    time.Time // it is at the first of them
	doubled  bool      // another one has been asked for that chunk, too
	kept     int       // chunk of which it has a part
	buf      []byte    // that part
	finished int       // chunks
}

// join adds another's sources, and connections for them: the ones that are there may
// all be with sources that bring nothing.
func (r *run) join(sources []string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	known := len(r.sources)
	for _, address := range sources {
		s := r.x.source(address, r.f)
		if !slices.ContainsFunc(r.sources, func(o *source) bool { return o.name == s.name && o.url == s.url }) {
			r.sources = append(r.sources, s)
		}
	}
	if len(r.sources) > known {
		r.most += connections
		r.joined = true
		r.change()
	}
}

// supervise starts sources until enough are at work, and further ones when one
// fails or is slow. It returns when all is here or nothing goes on.
func (r *run) supervise(ctx context.Context, tell func(int)) error {
	next, more := 0, true // one source more than is needed by number
	tick := time.NewTicker(slow)
	defer tick.Stop()
	seen := 0        // failures
	before := r.left // at the last tick
	for {
		r.mu.Lock()
		failures := 0
		for _, s := range r.sources {
			failures += s.failures
		}
		more = more || failures > seen || r.joined
		seen, r.joined = failures, false
		for next < len(r.sources) && (more || len(r.workers) < min(r.most, r.left)) && len(r.workers) < r.most {
			r.start(ctx, r.sources[next])
			next++
			more = false
		}
		changed, left, local := r.changed, r.left, r.local
		none := len(r.workers) == 0 && next == len(r.sources)
		r.mu.Unlock()
		if tell != nil {
			tell(left)
		}
		switch {
		case local != nil:
			return local
		case left == 0:
			return nil
		case ctx.Err() != nil:
			return ctx.Err()
		case none:
			return r.failed()
		}
		select {
		case <-changed:
		case <-tick.C:
			r.mu.Lock()
			// A source that knows no ranges has no chunk to be slow with.
			more = r.left == before || slices.ContainsFunc(r.workers, func(w *worker) bool { return w.slow() })
			before = r.left
			r.mu.Unlock()
		case <-ctx.Done():
		}
	}
}

// start has a source take part. The caller holds the lock.
func (r *run) start(ctx context.Context, s *source) {
	n := min(max(connections/len(r.sources), 1), perSource)
	s.limit = n
	for k := range min(n, r.left, r.most-len(r.workers)) {
		w := &worker{src: s, kept: -1}
		r.workers = append(r.workers, w)
		r.claim(w) // in the order of sources; else the goroutines' would count
		r.wg.Go(func() { r.work(ctx, w, k) })
	}
}

// failed says why nobody has brought the file.
func (r *run) failed() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	var errs []error
	for _, s := range r.sources {
		if s.errs != nil {
			errs = append(errs, fmt.Errorf("%s: %w", s.name, errors.Join(s.errs...)))
		}
	}
	if errs == nil {
		return errors.New("it has no sources")
	}
	return fmt.Errorf("no source has brought it: %w", errors.Join(errs...))
}

// account says who has brought how much.
func (r *run) account(ctx context.Context) {
	for _, s := range r.sources {
		if s.bytes > 0 {
			r.x.log.InfoContext(ctx, "model source", "source", s.name, "file", r.f.Path, "bytes", s.bytes, "rate", s.rate())
		}
	}
}

// change tells everybody who waits. The caller holds the lock.
func (r *run) change() {
	close(r.changed)
	r.changed = make(chan struct{})
}

// work asks w's source again and again, until all is here or the source is of no
// more use; number says which of the source's workers it is.
func (r *run) work(ctx context.Context, w *worker, number int) {
	defer func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.release(w)
		r.workers = slices.DeleteFunc(r.workers, func(o *worker) bool { return o == w })
		r.change()
	}()
	for {
		r.mu.Lock()
		s := w.src
		changed := r.changed
		switch {
		case s.out || s.only != nil && s.only != w || s.only == nil && number >= s.limit || r.left == 0 || r.local != nil:
			r.mu.Unlock()
			return
		case time.Now().Before(s.until):
			r.release(w) // for others, while it waits
			d := time.Until(s.until)
			r.mu.Unlock()
			if sleep(ctx, d) != nil {
				return
			}
			continue
		}
		if s.ranges && w.at == w.to && !r.claim(w) {
			r.mu.Unlock()
			t := time.NewTimer(slow)
			select {
			case <-changed:
			case <-t.C: // somebody may be slow by now
			case <-ctx.Done():
			}
			t.Stop()
			if ctx.Err() != nil {
				return
			}
			continue
		}
		r.mu.Unlock()
		began, before := time.Now(), w.finished
		n, err := r.ask(ctx, w)
		if ctx.Err() != nil {
			return
		}
		if err != nil {
			r.blame(ctx, w, began, w.finished > before || n >= r.x.Pace.Progress && len(w.buf) > 0, err)
		}
	}
}

// claim gives w something to do, if there is something. The caller holds the lock.
func (r *run) claim(w *worker) bool {
	if !w.src.ranges {
		return false // it gets what comes
	}
	for r.low < len(r.owner) && r.owner[r.low] != nil {
		r.low++
	}
	from := r.low
	if w.kept >= 0 && r.owner[w.kept] == nil {
		from = w.kept
	}
	if from < len(r.owner) {
		most := min(max(r.left/(2*connections), 1), maxSpan)
		to := from
		for to < len(r.owner) && to-from < most && r.owner[to] == nil {
			r.owner[to] = w
			to++
		}
		w.set(from, to)
		return true
	}
	// Half of what another has not begun.
	var victim *worker
	for _, v := range r.workers {
		if v != w && v.src.ranges && v.to-v.at > 1 && (victim == nil || v.to-v.at > victim.to-victim.at) {
			victim = v
		}
	}
	if victim != nil {
		n := (victim.to - victim.at) / 2
		from, to := victim.to-n, victim.to
		victim.to = from
		for i := from; i < to; i++ {
			r.owner[i] = w
		}
		w.set(from, to)
		return true
	}
	for _, v := range r.workers {
		// It may have delivered that chunk and not gone on yet.
		if v.src != w.src && v.slow() && !v.doubled && r.owner[v.at] == v {
			v.doubled = true
			r.owner[v.at] = w
			w.set(v.at, v.at+1)
			return true
		}
	}
	return false
}

func (w *worker) set(from, to int) {
	w.at, w.to, w.since, w.doubled = from, to, time.Now(), false
	if w.kept != from {
		w.kept, w.buf = -1, w.buf[:0]
	}
}

// slow reports whether w has been at one chunk for long. The caller holds the lock.
func (w *worker) slow() bool { return w.at < w.to && time.Since(w.since) >= slow }

// release gives back what w has not finished. The caller holds the lock.
func (r *run) release(w *worker) {
	for i := w.at; i < w.to; i++ {
		if r.owner[i] == w {
			r.owner[i] = nil
			r.low = min(r.low, i)
		}
	}
	w.to = w.at
	r.change()
}

// deliver hands chunk i on, if it is right and still missing.
func (r *run) deliver(w *worker, i int, b []byte) error {
	if err := r.f.List.Check(i, b); err != nil {
		return permanentError{fmt.Errorf("%w: %w", digest.ErrMismatch, err)}
	}
	if err := r.put(i, b); err != nil {
		return localError{err}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.owner[i] != nobody {
		r.owner[i] = nobody
		r.left--
		w.finished++
		w.src.fails = 0
		r.change()
	}
	return nil
}

// wanted reports whether chunk i is missing.
func (r *run) wanted(i int) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.owner[i] != nobody
}

// begin moves w to chunk i of its request, and reports whether it is still w's.
func (r *run) begin(w *worker, i int) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if i >= w.to {
		w.at = w.to
		return false
	}
	w.at, w.since, w.doubled = i, time.Now(), false
	return true
}

// blame notes a failed request and plans the next one.
func (r *run) blame(ctx context.Context, w *worker, began time.Time, progress bool, err error) {
	r.mu.Lock()
	s := w.src
	r.release(w)
	if e, ok := errors.AsType[localError](err); ok {
		if r.local == nil {
			r.local = e.error
		}
		r.mu.Unlock()
		return
	}
	s.note(err)
	s.failures++
	_, permanent := errors.AsType[permanentError](err)
	switch {
	case permanent:
		s.out = true
	case progress:
		s.fails = 0
	case began.Before(s.failed): // what broke this one has been counted
	case s.fails >= len(r.x.Pace.Delays):
		s.out = true
	default:
		d := r.x.Pace.Delays[s.fails]
		d = jittered(d)
		if e, ok := errors.AsType[laterError](err); ok {
			d = max(d, e.after)
			s.limit = max(1, s.limit-1) // it may be too much for it
		}
		s.fails++
		s.failed = time.Now()
		s.until = s.failed.Add(d)
	}
	r.mu.Unlock()
	event := journal.ModelSourceFailed
	if errors.Is(err, digest.ErrMismatch) {
		event = journal.ModelSourceWrong
	}
	r.x.log.WarnContext(ctx, "model source failed", event.Attr(), "source", s.name, "file", r.f.Path, "error", err)
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

// jittered spreads d: nodes must not come back as a herd.
func jittered(d time.Duration) time.Duration { return d/2 + rand.N(d) }
