package bridge

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/resultity/node/internal/bridge/contract"
	"github.com/resultity/node/internal/plainhttp"
)

// Patience with slow peers. A model may be slow, so nothing here bounds how
// long the engine takes over a request: that is the vigil's.
const (
	headerPatience = 10 * time.Second // for the head of a request
	bodyPatience   = 30 * time.Second // for all of its body
	readerPatience = 30 * time.Second // for the caller to take a piece of the answer
	asidePatience  = 10 * time.Second // for the engine's answer to a GET
	idlePatience   = 5 * time.Minute  // for the next request on a connection
	engineIdle     = 2 * time.Second  // below what any engine keeps a connection open
)

const (
	maxHeader = 16 << 10 // bytes, of requests and of the engine's answers
	maxAsides = 4        // GETs that are with the engine at once
	pieceSize = 32 << 10 // bytes of an answer that are held at once
)

// kind is what the bridge does with a request.
type kind int

const (
	unknown kind = iota
	inference
	aside // to the engine, but not work for the model
	sandboxRecord
	statusRecord
)

// allowed lists all requests that are answered, by method and exact target.
var allowed = map[string]kind{
	"POST /v1/chat/completions":   inference,
	"POST /v1/completions":        inference,
	"POST /v1/embeddings":         inference,
	"GET /v1/models":              aside,
	"GET /health":                 aside,
	"GET /metrics":                aside,
	"GET " + contract.SandboxPath: sandboxRecord,
	"GET " + contract.StatusPath:  statusRecord,
}

// forwarder carries requests to the engine and answers back. It holds a
// request in full, since a body that is passed on live is cut short when the
// engine answers early, and of an answer one piece at a time.
type forwarder struct {
	base    string // of the engine's URLs
	maxBody int64
	slots   chan struct{} // one place for each inference
	asides  chan struct{} // and for each GET
	engine  *plainhttp.Transport
	vigil   *vigil
	looking sync.Mutex              // held while the sandbox is looked at
	look    func() contract.Sandbox // looks at it again
	fill    func(*contract.Status)
	pieces  sync.Pool      // of *[pieceSize]byte
	serving sync.WaitGroup // requests

	answered, failed, canceled, busy atomic.Uint64
}

func newForwarder(o contract.Options, v *vigil, look func() contract.Sandbox, fill func(*contract.Status)) *forwarder {
	return &forwarder{
		base:    "http://" + o.Engine.String(),
		maxBody: o.MaxBody,
		slots:   make(chan struct{}, o.MaxInFlight),
		asides:  make(chan struct{}, maxAsides),
		engine:  newTransport(o.Engine, o.MaxInFlight),
		vigil:   v,
		look:    look,
		fill:    fill,
		pieces:  sync.Pool{New: func() any { return new([pieceSize]byte) }},
	}
}

func newServer(f *forwarder, logger *log.Logger) *http.Server {
	return &http.Server{
		Handler:           f,
		ReadHeaderTimeout: headerPatience,
		IdleTimeout:       idlePatience,
		MaxHeaderBytes:    maxHeader,
		ErrorLog:          logger,

		DisableGeneralOptionsHandler: true,
	}
}

// newTransport returns the way to the engine: loopback, no proxy, no redirects,
// no compression.
func newTransport(engine netip.AddrPort, connections int) *plainhttp.Transport {
	dialer := net.Dialer{Timeout: 5 * time.Second}
	return &plainhttp.Transport{
		Dial:      func(ctx context.Context) (net.Conn, error) { return dialer.DialContext(ctx, "tcp", engine.String()) },
		MaxIdle:   connections,
		Idle:      engineIdle,
		MaxHeader: maxHeader,
	}
}

// ServeHTTP answers one request. It counts what came of it and logs nothing.
func (f *forwarder) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	f.serving.Add(1)
	defer f.serving.Done()
	switch allowed[r.Method+" "+r.RequestURI] {
	case inference:
		f.infer(w, r)
	case aside:
		f.askAside(w, r)
	case sandboxRecord:
		writeJSON(w, http.StatusOK, f.sandbox())
	case statusRecord:
		s := contract.Status{
			Version:  contract.Version,
			Answered: f.answered.Load(),
			Failed:   f.failed.Load(),
			Canceled: f.canceled.Load(),
			Busy:     f.busy.Load(),
		}
		f.fill(&s)
		text, err := json.Marshal(s)
		if err != nil {
			panic(err) // numbers and strings
		}
		writeJSON(w, http.StatusOK, text)
	default:
		fault{http.StatusNotFound, "invalid_request_error", "not_found", "this path is not served here"}.write(w)
	}
}

// sandbox looks at it again, for one caller after the other.
func (f *forwarder) sandbox() []byte {
	f.looking.Lock()
	defer f.looking.Unlock()
	text, err := json.Marshal(f.look())
	if err != nil {
		panic(err) // numbers and strings
	}
	return text
}

// fault is an error in OpenAI's shape.
type fault struct {
	status              int
	kind, code, message string
}

func (e fault) write(w http.ResponseWriter) {
	type detail struct {
		Message string  `json:"message"`
		Type    string  `json:"type"`
		Param   *string `json:"param"`
		Code    string  `json:"code"`
	}
	text, err := json.Marshal(struct {
		Error detail `json:"error"`
	}{detail{e.message, e.kind, nil, e.code}})
	if err != nil {
		panic(err) // strings
	}
	if e.status == http.StatusServiceUnavailable {
		w.Header().Set("Retry-After", "1")
	}
	writeJSON(w, e.status, text)
}

func writeJSON(w http.ResponseWriter, status int, text []byte) {
	limitWrites(w)
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Content-Length", strconv.Itoa(len(text)))
	w.WriteHeader(status)
	w.Write(text) // an error is the caller's, who is gone
}

var errBusy = fault{http.StatusServiceUnavailable, "server_error", "engine_busy", "the engine has all the requests that it works on at once"}

func (f *forwarder) infer(w http.ResponseWriter, r *http.Request) {
	// The place is taken before the body is read: it bounds memory too.
	select {
	case f.slots <- struct{}{}:
		defer func() { <-f.slots }()
	default:
		f.busy.Add(1)
		errBusy.write(w)
		return
	}
	body, bad := f.body(w, r)
	if bad != nil {
		w.Header().Set("Connection", "close") // what is left of the body is not waited for
		bad.write(w)
		return
	}
	c := f.vigil.begin()
	o, begun := f.carry(r.Context(), w, r, body, c)
	c.end(o)
	f.count(o, begun)
}

func (f *forwarder) askAside(w http.ResponseWriter, r *http.Request) {
	select {
	case f.asides <- struct{}{}:
		defer func() { <-f.asides }()
	default:
		f.busy.Add(1)
		errBusy.write(w)
		return
	}
	ctx, cancel := context.WithTimeout(r.Context(), asidePatience)
	defer cancel()
	f.count(f.carry(ctx, w, r, nil, nil))
}

// count counts an outcome. An answer that was begun and cannot be ended is cut
// for the caller too: a neat end would pass a part for the whole.
func (f *forwarder) count(o outcome, begun bool) {
	switch o {
	case answered, refused:
		f.answered.Add(1)
		return
	case canceled:
		f.canceled.Add(1)
	case failed:
		f.failed.Add(1)
	}
	if begun {
		panic(http.ErrAbortHandler)
	}
}

// body reads a request body in full.
func (f *forwarder) body(w http.ResponseWriter, r *http.Request) ([]byte, *fault) {
	tooLarge := &fault{http.StatusRequestEntityTooLarge, "invalid_request_error", "body_too_large",
		fmt.Sprintf("the request body has more than %d bytes", f.maxBody)}
	if r.ContentLength > f.maxBody {
		return nil, tooLarge
	}
	control := http.NewResponseController(w)
	if err := control.SetReadDeadline(time.Now().Add(bodyPatience)); err != nil {
		return nil, &fault{http.StatusInternalServerError, "server_error", "internal", "the connection has no deadlines"}
	}
	var b bytes.Buffer
	if r.ContentLength > 0 {
		b.Grow(int(r.ContentLength) + bytes.MinRead) // what ReadFrom wants, once
	}
	switch n, err := b.ReadFrom(io.LimitReader(r.Body, f.maxBody+1)); {
	case errors.Is(err, os.ErrDeadlineExceeded):
		return nil, &fault{http.StatusRequestTimeout, "invalid_request_error", "body_too_slow", "the request body took too long"}
	case err != nil:
		return nil, &fault{http.StatusBadRequest, "invalid_request_error", "body_unreadable", "the request body cannot be read"}
	case n > f.maxBody:
		return nil, tooLarge
	}
	// From here on the server only watches for the caller to hang up.
	if err := control.SetReadDeadline(time.Time{}); err != nil {
		return nil, &fault{http.StatusInternalServerError, "server_error", "internal", "the connection has no deadlines"}
	}
	return b.Bytes(), nil
}

var errEngine = fault{http.StatusBadGateway, "server_error", "engine_failed", "the engine did not give an answer that can be passed on"}

// carry sends one request to the engine and passes the answer on. It reports
// whether the answer was begun. A call of nil stands for a request that says
// nothing about the model.
func (f *forwarder) carry(ctx context.Context, w http.ResponseWriter, r *http.Request, body []byte, c *call) (o outcome, begun bool) {
	req, err := http.NewRequestWithContext(ctx, r.Method, f.base+r.RequestURI, bytes.NewReader(body))
	if err != nil {
		panic(err) // method and target are from our own list
	}
	for _, key := range []string{"Content-Type", "Accept"} {
		if v := r.Header.Get(key); v != "" {
			req.Header.Set(key, v)
		}
	}
	req.Header["User-Agent"] = nil // none
	resp, err := f.engine.RoundTrip(req)
	if err == nil && (resp.StatusCode < 200 || resp.StatusCode >= 300 && resp.StatusCode < 400) {
		resp.Body.Close()
		err = errors.New("neither an answer nor an error")
	}
	if err != nil {
		if r.Context().Err() != nil {
			return canceled, false
		}
		errEngine.write(w)
		return failed, false
	}
	defer resp.Body.Close()

	for _, key := range []string{"Content-Type", "Retry-After"} {
		if v := resp.Header.Get(key); v != "" {
			w.Header().Set(key, v)
		}
	}
	if resp.ContentLength >= 0 {
		w.Header().Set("Content-Length", strconv.FormatInt(resp.ContentLength, 10))
	}
	w.WriteHeader(resp.StatusCode)
	return f.pass(r.Context(), w, resp, c), true
}

// pass passes the body of an answer on, each piece as it comes.
func (f *forwarder) pass(ctx context.Context, w http.ResponseWriter, resp *http.Response, c *call) outcome {
	success := resp.StatusCode < 300
	stream := speech{events: isEventStream(resp.Header.Get("Content-Type"))}
	piece := f.pieces.Get().(*[pieceSize]byte)
	defer f.pieces.Put(piece)
	for {
		n, err := resp.Body.Read(piece[:])
		if n > 0 {
			said := stream.says(piece[:n])
			if said {
				c.heard(success)
			}
			if !deliver(w, piece[:n], resp.ContentLength < 0) {
				return canceled
			}
			if said {
				c.owes()
			}
		}
		switch {
		case err == io.EOF:
			limitWrites(w) // the server writes the end
			if success {
				return answered
			}
			return refused
		case err != nil && ctx.Err() != nil:
			return canceled
		case err != nil:
			return failed
		}
	}
}

// deliver writes a piece to the caller, at once if flush, and reports whether
// the caller took it in time.
func deliver(w http.ResponseWriter, piece []byte, flush bool) bool {
	limitWrites(w)
	if _, err := w.Write(piece); err != nil {
		return false
	}
	return !flush || http.NewResponseController(w).Flush() == nil
}

// limitWrites gives the caller some time to take what is written next. The
// limit holds for the connection until it is set again.
func limitWrites(w http.ResponseWriter) {
	// An error means that the connection is gone, which the write will find.
	http.NewResponseController(w).SetWriteDeadline(time.Now().Add(readerPatience))
}

func isEventStream(contentType string) bool {
	media, _, _ := strings.Cut(contentType, ";")
	return strings.EqualFold(strings.TrimSpace(media), "text/event-stream")
}

// speech tells an engine that says something from one that clears its throat:
// the comment lines of an event stream are sent by the engine's HTTP side on a
// timer, whether the model works or not.
type speech struct {
	events  bool // the bytes are an event stream
	within  bool // a line has begun
	comment bool // and is a comment
}

// says reports whether p holds more than comments and line ends. It is given
// the whole stream, cut anywhere.
func (s *speech) says(p []byte) bool {
	if !s.events {
		return true
	}
	said := false
	for len(p) > 0 {
		end := p[0] == '\n' || p[0] == '\r'
		if !s.within && !end {
			s.within, s.comment = true, p[0] == ':'
		}
		if s.within && !end && !s.comment {
			said = true
		}
		i := bytes.IndexAny(p, "\r\n")
		if i < 0 {
			return said
		}
		s.within = false
		p = p[i+1:]
	}
	return said
}
