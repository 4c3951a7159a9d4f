package agent

import (
	"crypto/tls"
	"encoding/pem"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"testing"

	"github.com/resultity/node/internal/config"
)

// The network is reached by its own authority and TLS 1.3 alone; sources of
// models may be older, and are trusted by that authority, too.
func TestClients(t *testing.T) {
	serve := func(newest uint16) *httptest.Server {
		s := httptest.NewUnstartedServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
		s.TLS = &tls.Config{MaxVersion: newest}
		s.StartTLS()
		t.Cleanup(s.Close)
		return s
	}
	now, old := serve(tls.VersionTLS13), serve(tls.VersionTLS12)
	ca := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(ca, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: now.Certificate().Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	own := config.Network{Name: "n", CA: ca}
	network, err := networkClient(&own)
	if err != nil {
		t.Fatal(err)
	}
	sources, _, err := sourcesClient([]config.Network{{Name: "public"}, own})
	if err != nil {
		t.Fatal(err)
	}
	strange, err := networkClient(&config.Network{})
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name   string
		client *http.Client
		url    string
		ok     bool
	}{
		{"network", network, now.URL, true},
		{"network over TLS 1.2", network, old.URL, false},
		{"network without its authority", strange, now.URL, false},
		{"source", sources, now.URL, true},
		{"source over TLS 1.2", sources, old.URL, true},
	} {
		res, err := c.client.Get(c.url)
		if (err == nil) != c.ok {
			t.Errorf("%s: %v", c.name, err)
		}
		if err == nil {
			res.Body.Close()
		}
		c.client.CloseIdleConnections()
	}
	if network.Transport.(*http.Transport).TLSClientConfig.RootCAs.Equal(sources.Transport.(*http.Transport).TLSClientConfig.RootCAs) {
		t.Error("sources are trusted by the network's authority alone; public hosts are out of reach")
	}
	for _, bad := range []string{ca + ".none", "/dev/null"} {
		n := config.Network{Name: "n", CA: bad}
		if _, err := networkClient(&n); err == nil {
			t.Errorf("%s: accepted", bad)
		}
		if _, _, err := sourcesClient([]config.Network{n}); err == nil {
			t.Errorf("%s: accepted", bad)
		}
	}
}
