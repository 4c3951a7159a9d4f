// Package share gives verified files of models to machines nearby, which need not fetch
// them from far away then. It is plain HTTP: who asks checks every chunk by its hash,
// and would have to with TLS, too. Package fetch has the other end.
//
//	GET /models/<sha256>, whole or with one range
//
// The rule it keeps: it only gives, and only files that a verified configuration of this
// node lists; who does not know a file's hash learns nothing, and who does, whether it is
// here. It answers private and link-local addresses alone, and takes of this machine no
// more than its bounds: connections in all and for each address, bytes a second, time.
package share

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"

	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/journal"
)

const (
	prefix       = "/models/"
	connections  = 32              // at once
	perAddress   = 4               // of these
	piece        = 256 << 10       // bytes that are written at once
	requestCost  = 8 << 10         // bytes that a request counts for, beside what it is given
	headPatience = 5 * time.Second // for a request to be there
	idlePatience = 30 * time.Second
	patience     = 30 * time.Second // for a piece to be taken
	maxHead      = 4 << 10          // bytes
	sayEvery     = 10 * time.Minute // that somebody was refused
)

// MinRate is the least that a bound on bytes a second may be.
const MinRate = piece

// retries is how long to wait before listening is tried again: an address may come
// with the network, long after the agent.
var retries = []time.Duration{time.Second, 5 * time.Second, 30 * time.Second, time.Minute}

// Nearby reports whether an address is of a network that ends at a router: private,
// link-local, or this machine.
func Nearby(a netip.Addr) bool {
	a = a.Unmap()
	return a.IsPrivate() || a.IsLinkLocalUnicast() || a.IsLoopback()
}

// Server gives files away. Its methods may be called concurrently.
type Server struct {
	listed  func(digest.Digest) bool
	open    func(digest.Digest) (*os.File, error)
	log     *slog.Logger
	limiter *rate.Limiter

	patience time.Duration

	bytes, answers, refused atomic.Int64

	mu    sync.Mutex           // guards what follows
	by    map[netip.Prefix]int // connections
	all   int
	said  time.Time // that somebody was refused
	since int64     // refused then
}

// New returns a server of the files that listed names and open opens, which fails with
// [os.ErrNotExist] for one that is not here in full. It gives at most bytesPerSecond.
func New(listed func(digest.Digest) bool, open func(digest.Digest) (*os.File, error), bytesPerSecond int64, log *slog.Logger) *Server {
	return &Server{
		listed: listed, open: open, log: log, patience: patience, by: map[netip.Prefix]int{},
		limiter: rate.NewLimiter(rate.Limit(bytesPerSecond), int(max(piece, bytesPerSecond/8))),
	}
}

// Counts is what a server has done since it was made.
type Counts struct {
	Connections int   // now
	Answers     int64 // requests that were given something
	Bytes       int64
	Refused     int64 // connections and requests
}

// Counts returns them.
func (s *Server) Counts() Counts {
	s.mu.Lock()
	defer s.mu.Unlock()
	return Counts{s.all, s.answers.Load(), s.bytes.Load(), s.refused.Load()}
}

// Run listens at address until ctx ends. Where that fails it says so once, and tries
// again: nothing of the node depends on it.
func (s *Server) Run(ctx context.Context, address string) error {
	said := ""
	for try := 0; ; try++ {
		l, err := new(net.ListenConfig).Listen(ctx, "tcp", address)
		if err == nil {
			s.log.Info("models are given to neighbours", journal.ModelsShared.Attr(), "address", address)
			try, said = 0, ""
			err = s.serve(ctx, l)
		}
		if ctx.Err() != nil {
			return nil
		}
		if err != nil && err.Error() != said {
			said = err.Error()
			s.log.Warn("models cannot be given to neighbours; it is tried again", journal.ModelShareFailed.Attr(), "address", address, "error", err)
		}
		t := time.NewTimer(retries[min(try, len(retries)-1)])
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return nil
		}
	}
}

// serve answers until ctx ends or l fails.
func (s *Server) serve(ctx context.Context, l net.Listener) error {
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	srv := s.server(ctx)
	defer context.AfterFunc(ctx, func() { _ = srv.Close() })() // who was being answered asks elsewhere
	err := srv.Serve(&bounded{l, s})
	stop()
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return err
}

// server is patient for so long, and lets go of everybody when ctx ends.
func (s *Server) server(ctx context.Context) *http.Server {
	return &http.Server{
		Handler: s, BaseContext: func(net.Listener) context.Context { return ctx },
		ReadHeaderTimeout: min(headPatience, s.patience), ReadTimeout: min(headPatience, s.patience), WriteTimeout: s.patience, IdleTimeout: idlePatience, MaxHeaderBytes: maxHead,
		ErrorLog: log.New(io.Discard, "", 0), // what strangers send is not for the log
	}
}

// bounded takes the connections that there is room for.
type bounded struct {
	net.Listener
	s *Server
}

// Accept implements [net.Listener].
func (b *bounded) Accept() (net.Conn, error) {
	for {
		c, err := b.Listener.Accept()
		if err != nil {
			return nil, err
		}
		if p, ok := b.s.admit(c.RemoteAddr()); ok {
			return &conn{Conn: c, leave: sync.OnceFunc(func() { b.s.leave(p) })}, nil
		}
		_ = c.Close() // it was given nothing
	}
}

// conn leaves its place when it is closed.
type conn struct {
	net.Conn
	leave func()
}

// Close implements [net.Conn].
func (c *conn) Close() error {
	c.leave()
	return c.Conn.Close()
}

// ReadFrom lets the kernel copy a file.
func (c *conn) ReadFrom(r io.Reader) (int64, error) { return io.Copy(c.Conn, r) }

// admit says whether there is room for one more connection from an address, and what
// it counts under: of IPv6 a machine may have as many addresses as it likes.
func (s *Server) admit(remote net.Addr) (netip.Prefix, bool) {
	at, err := netip.ParseAddrPort(remote.String())
	if err != nil {
		return netip.Prefix{}, false
	}
	a := at.Addr().Unmap().WithZone("")
	bits := a.BitLen()
	if a.Is6() && !a.IsLinkLocalUnicast() && !a.IsLoopback() {
		bits = 64
	}
	p, err := a.Prefix(bits)
	s.mu.Lock()
	defer s.mu.Unlock()
	if err != nil || !Nearby(a) || s.all >= connections || s.by[p] >= perAddress {
		s.refuse(a)
		return p, false
	}
	s.all++
	s.by[p]++
	return p, true
}

func (s *Server) leave(p netip.Prefix) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.all--
	if s.by[p]--; s.by[p] == 0 {
		delete(s.by, p)
	}
}

// refuse counts a connection that was refused, and says so now and then: a flood must
// not become one of the log. The caller holds the lock.
func (s *Server) refuse(a netip.Addr) {
	n := s.refused.Add(1)
	if now := time.Now(); s.said.IsZero() || now.Sub(s.said) >= sayEvery {
		s.log.Warn("neighbours were refused connections", journal.ModelShareCrowded.Attr(), "count", n-s.since, "address", a.String())
		s.said, s.since = now, n
	}
}

// ServeHTTP implements [http.Handler].
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if err := s.limiter.WaitN(r.Context(), requestCost); err != nil {
		return // it has gone, or the agent ends
	}
	status, err := s.answer(w, r)
	if status != 0 {
		s.refused.Add(1)
		w.Header().Set("Connection", "close")
		http.Error(w, http.StatusText(status), status)
		return
	}
	s.answers.Add(1)
	if err != nil {
		// The answer is cut short, and must not look whole.
		panic(http.ErrAbortHandler)
	}
}

// answer gives a file, or a part of it. The status is 0 if it has begun to.
func (s *Server) answer(w http.ResponseWriter, r *http.Request) (status int, err error) {
	if r.Method != http.MethodGet {
		return http.StatusMethodNotAllowed, nil
	}
	if r.ContentLength != 0 {
		return http.StatusBadRequest, nil
	}
	name, ok := strings.CutPrefix(r.RequestURI, prefix) // as it was sent: there is one spelling
	file, err := digest.ParseHex(name)
	if !ok || err != nil || !s.listed(file) {
		return http.StatusNotFound, nil
	}
	f, err := s.open(file)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return http.StatusNotFound, nil
	case err != nil:
		s.log.DebugContext(r.Context(), "a file cannot be given", "sha256", file.Hex(), "error", err)
		return http.StatusServiceUnavailable, nil
	}
	defer f.Close() // read only: nothing can be lost
	st, err := f.Stat()
	if err != nil {
		return http.StatusServiceUnavailable, nil
	}
	from, to, ok := span(r.Header["Range"], st.Size())
	if !ok {
		w.Header().Set("Content-Range", fmt.Sprintf("bytes */%d", st.Size()))
		return http.StatusRequestedRangeNotSatisfiable, nil
	}
	h := w.Header()
	h.Set("Content-Type", "application/octet-stream")
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("Accept-Ranges", "bytes")
	h.Set("Content-Length", strconv.FormatInt(to-from, 10))
	code := http.StatusOK
	if r.Header.Get("Range") != "" {
		h.Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", from, to-1, st.Size()))
		code = http.StatusPartialContent
	}
	if _, err := f.Seek(from, io.SeekStart); err != nil {
		return http.StatusServiceUnavailable, nil
	}
	w.WriteHeader(code)
	return 0, s.write(w, r, f, to-from)
}

// write gives n bytes, in pieces, each within its time.
func (s *Server) write(w http.ResponseWriter, r *http.Request, f *os.File, n int64) error {
	out := http.NewResponseController(w)
	for n > 0 {
		next := min(n, piece)
		if err := s.limiter.WaitN(r.Context(), int(next)); err != nil {
			return err
		}
		if err := out.SetWriteDeadline(time.Now().Add(s.patience)); err != nil {
			return err
		}
		k, err := io.CopyN(w, f, next)
		s.bytes.Add(k)
		if err != nil {
			return err
		}
		n -= k
	}
	return out.Flush()
}

// span reads the header of a range: none, or one of "bytes=FROM-" and "bytes=FROM-LAST".
// Several, which HTTP knows, are for nobody who asks here.
func span(header []string, size int64) (from, to int64, ok bool) {
	if len(header) == 0 {
		return 0, size, true
	}
	text, ok := strings.CutPrefix(header[0], "bytes=")
	first, last, dash := strings.Cut(text, "-")
	if !ok || !dash || len(header) > 1 {
		return 0, 0, false
	}
	from, ok = number(first)
	if to = size; ok && last != "" {
		to, ok = number(last)
		to = min(to, size-1) + 1
	}
	return from, to, ok && from < to
}

// number reads digits, and nothing else.
func number(s string) (int64, bool) {
	n, err := strconv.ParseInt(s, 10, 64)
	return n, err == nil && n >= 0 && s[0] != '+' && s[0] != '-'
}
