package network

import (
	"crypto/tls"
	"fmt"
	"os"
	"sync"
	"time"
)

// tls returns the TLS configuration, or nil for plain HTTP.
func (c *Config) tls() (*tls.Config, error) {
	if c.TLSCert == "" {
		return nil, nil
	}
	p := &pair{cert: c.TLSCert, key: c.TLSKey}
	if _, err := p.get(nil); err != nil {
		return nil, fmt.Errorf("%w: tls_cert: %w", ErrConfig, err)
	}
	return &tls.Config{MinVersion: tls.VersionTLS13, GetCertificate: p.get, NextProtos: []string{"h2", "http/1.1"}}, nil
}

// pair is a certificate that is read again when its file has changed, so that
// a renewal needs no restart.
type pair struct {
	cert, key string

	mu     sync.Mutex // guards what follows, also while the files are read
	loaded *tls.Certificate
	at     time.Time // of the file that was loaded
	looked time.Time
}

func (p *pair) get(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.loaded != nil && time.Since(p.looked) < time.Second {
		return p.loaded, nil
	}
	p.looked = time.Now()
	st, err := os.Stat(p.cert)
	if err == nil && p.loaded != nil && st.ModTime().Equal(p.at) {
		return p.loaded, nil
	}
	if err == nil {
		var c tls.Certificate
		if c, err = tls.LoadX509KeyPair(p.cert, p.key); err == nil {
			p.loaded, p.at = &c, st.ModTime()
		}
	}
	if p.loaded == nil {
		return nil, err
	}
	return p.loaded, nil // a renewal in the middle of its writing; look again
}
