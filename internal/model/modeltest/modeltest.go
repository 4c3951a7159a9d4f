// Package modeltest has what tests of models need: content, files and sources.
package modeltest

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/resultity/node/internal/snapshot"
)

// Content makes n bytes that compress badly and repeat nowhere.
func Content(n int) []byte {
	b := make([]byte, n)
	src := rand.NewChaCha8([32]byte{byte(n), byte(n >> 8), byte(n >> 16)})
	_, _ = src.Read(b) // never fails
	return b
}

// File describes b as a file of a model.
func File(name string, b []byte, sources ...string) snapshot.File {
	f, err := snapshot.NewFile(name, bytes.NewReader(b), sources...)
	if err != nil {
		panic(err)
	}
	return f
}

// Model is a model of these files.
func Model(files ...snapshot.File) *snapshot.Model {
	return &snapshot.Model{Name: "m", Version: "1", Format: snapshot.GGUF, Files: files}
}

// Serve runs a TLS server for the test.
func Serve(t testing.TB, h http.HandlerFunc) *httptest.Server {
	t.Helper()
	srv := httptest.NewUnstartedServer(h)
	srv.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelError)
	srv.StartTLS()
	t.Cleanup(srv.Close)
	return srv
}

// Transport trusts all of the servers.
func Transport(servers ...*httptest.Server) http.RoundTripper {
	pool := x509.NewCertPool()
	for _, s := range servers {
		if c := s.Certificate(); c != nil {
			pool.AddCert(c)
		}
	}
	return &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool}, DisableKeepAlives: true}
}

// Good serves B with ranges, and notes what it was asked for.
type Good struct {
	B []byte

	mu     sync.Mutex
	ranges []string // Range of each request
	sent   int64
}

func (g *Good) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	g.mu.Lock()
	g.ranges = append(g.ranges, r.Header.Get("Range"))
	g.mu.Unlock()
	cw := &countingWriter{ResponseWriter: w}
	http.ServeContent(cw, r, "", time.Time{}, bytes.NewReader(g.B))
	g.mu.Lock()
	g.sent += cw.n
	g.mu.Unlock()
}

// Asked returns the ranges that the requests so far asked for.
func (g *Good) Asked() []string {
	g.mu.Lock()
	defer g.mu.Unlock()
	return slices.Clone(g.ranges)
}

// Sent returns the bytes of all bodies; no more requests can be made.
func (g *Good) Sent(srv *httptest.Server) int64 {
	srv.Close() // waits for the handlers
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.sent
}

type countingWriter struct {
	http.ResponseWriter
	n int64
}

func (w *countingWriter) Write(b []byte) (int, error) {
	n, err := w.ResponseWriter.Write(b)
	w.n += int64(n)
	return n, err
}
