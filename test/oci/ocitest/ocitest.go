// Package ocitest runs a container registry inside a test.
//
// The rule it keeps: the registry lives as long as the test, speaks TLS only,
// listens on the loopback interface, and holds everything in memory.
package ocitest

import (
	"crypto/x509"
	"encoding/pem"
	"io"
	"log"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/registry"
)

// A Server is a registry.
type Server struct {
	// Host is the address with the port.
	Host string

	// CA is the authority that its certificate leads to.
	CA *x509.CertPool

	// CAPEM is CA in the form of a file.
	CAPEM []byte
}

// Serve starts a registry that answers referrer queries, and stops it when the
// test ends.
func Serve(tb testing.TB) *Server {
	tb.Helper()
	srv := httptest.NewTLSServer(registry.New(
		registry.WithReferrersSupport(true),
		registry.Logger(log.New(io.Discard, "", 0)),
	))
	tb.Cleanup(srv.Close)
	ca := x509.NewCertPool()
	ca.AddCert(srv.Certificate())
	return &Server{
		Host:  strings.TrimPrefix(srv.URL, "https://"),
		CA:    ca,
		CAPEM: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: srv.Certificate().Raw}),
	}
}
