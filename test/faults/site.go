package faults

import (
	"crypto/rand"
	"crypto/tls"
	"errors"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/resultity/node/test/model"
	"github.com/resultity/node/test/oci"
)

// Trouble is what is wrong with a site, for A alone.
type Trouble int32

// The troubles.
const (
	None  Trouble = iota
	Slow          // a few bytes a second
	Lying         // says a size and sends another
	Short         // ends early
	Wrong         // other bytes
)

// Site is where images and models come from: a front of the stack's registry,
// and files of its own.
type Site struct {
	Address string // host:port
	Reg     *oci.Registry

	server  *http.Server
	served  chan error
	victim  atomic.Value // string: A's address
	trouble atomic.Int32

	mu    sync.Mutex
	files map[string][]byte
}

func (w *World) newSite() (*Site, error) {
	cert, err := w.Certificate("site.test", net.IP(w.Lab.Addr().AsSlice()))
	if err != nil {
		return nil, err
	}
	registry, _, _ := strings.Cut(w.Image.Repository(), "/")
	l, err := tls.Listen("tcp", net.JoinHostPort(w.Lab.Addr().String(), "0"), &tls.Config{Certificates: []tls.Certificate{cert}})
	if err != nil {
		return nil, err
	}
	transport, ok := w.HTTP.Transport.(*http.Transport)
	if !ok {
		return nil, errors.Join(errors.New("the stack's client has another transport"), l.Close())
	}
	s := &Site{Address: l.Addr().String(), served: make(chan error, 1), files: map[string][]byte{}}
	s.victim.Store("")
	s.Reg = oci.NewRegistry(s.Address, transport.TLSClientConfig.RootCAs)
	front := &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) {
			r.SetURL(&url.URL{Scheme: "https", Host: registry})
			r.Out.Host = r.In.Host // its links lead here again
		},
		Transport: transport, ErrorLog: log.New(discard{}, "", 0),
	}
	s.server = &http.Server{ReadHeaderTimeout: 10 * time.Second, ErrorLog: log.New(discard{}, "", 0), Handler: http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		host, _, _ := net.SplitHostPort(r.RemoteAddr)
		if host == s.victim.Load() && r.Method == http.MethodGet {
			rw = &troubled{ResponseWriter: rw, site: s, gone: r.Context().Done()}
		}
		if strings.HasPrefix(r.URL.Path, "/v2/") {
			front.ServeHTTP(rw, r)
			return
		}
		s.mu.Lock()
		data, ok := s.files[r.URL.Path]
		s.mu.Unlock()
		if !ok {
			http.NotFound(rw, r)
			return
		}
		rw.Header().Set("Content-Length", strconv.Itoa(len(data)))
		_, _ = rw.Write(data) // whoever asked may be gone
	})}
	go func() { s.served <- s.server.Serve(l) }()
	return s, nil
}

// Close ends the site.
func (s *Site) Close() error {
	s.Reg.Close()
	err := s.server.Close()
	if e := <-s.served; !errors.Is(e, http.ErrServerClosed) {
		err = errors.Join(err, e)
	}
	return err
}

// Be sets the trouble from now on.
func (s *Site) Be(t Trouble) { s.trouble.Store(int32(t)) }

// Put serves a model file of so many bytes, and returns them with their URL.
func (s *Site) Put(size int) (data []byte, address string) {
	data = model.Random(size)
	path := "/" + rand.Text()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.files[path] = data
	return data, "https://" + s.Address + path
}

// troubled is a response with the site's trouble, for as long as that lasts.
type troubled struct {
	http.ResponseWriter
	site  *Site
	gone  <-chan struct{}
	begun bool
}

func (t *troubled) trouble() Trouble { return Trouble(t.site.trouble.Load()) }

// Unwrap is for [http.ResponseController].
func (t *troubled) Unwrap() http.ResponseWriter { return t.ResponseWriter }

// WriteHeader implements [http.ResponseWriter].
func (t *troubled) WriteHeader(status int) {
	if t.trouble() == Lying {
		if n, err := strconv.Atoi(t.Header().Get("Content-Length")); err == nil {
			t.Header().Set("Content-Length", strconv.Itoa(n+1+n/2))
		}
	}
	t.begun = true
	t.ResponseWriter.WriteHeader(status)
}

// Write implements [http.ResponseWriter].
func (t *troubled) Write(p []byte) (int, error) {
	if !t.begun {
		t.WriteHeader(http.StatusOK)
	}
	switch t.trouble() {
	case Slow:
		for i := range p {
			if t.trouble() != Slow {
				n, err := t.ResponseWriter.Write(p[i:])
				return i + n, err
			}
			if _, err := t.ResponseWriter.Write(p[i : i+1]); err != nil {
				return i, err
			}
			_ = http.NewResponseController(t.ResponseWriter).Flush() // the next write tells
			select {
			case <-time.After(200 * time.Millisecond): // this is what it is for
			case <-t.gone:
				return i, io.ErrClosedPipe
			}
		}
		return len(p), nil
	case Short:
		_, _ = t.ResponseWriter.Write(p[:len(p)/2]) // it ends in any case
		panic(http.ErrAbortHandler)
	case Wrong:
		p = append([]byte(nil), p...)
		p[len(p)/2] ^= 1
	}
	return t.ResponseWriter.Write(p)
}
