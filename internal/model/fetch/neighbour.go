package fetch

import (
	"net/http"
	"strings"
	"time"
)

// neighbour is a web server nearby as a source. It may be anything: it is asked for a hash,
// and every chunk of what it answers is checked.
func (x *Fetcher) neighbour(base string, f *File) *source {
	address := strings.TrimSuffix(base, "/") + "/" + f.SHA256.Hex()
	return &source{name: place(address), url: address, client: x.lan, ranges: true}
}

// lanClient reaches neighbours directly: a proxy is for the world. Where it is sent
// elsewhere, it does not go.
func lanClient() *http.Client {
	return &http.Client{
		Transport:     &http.Transport{ResponseHeaderTimeout: 10 * time.Second, TLSHandshakeTimeout: 10 * time.Second, IdleConnTimeout: time.Minute, MaxIdleConnsPerHost: perSource},
		CheckRedirect: func(*http.Request, []*http.Request) error { return ErrRedirects },
	}
}
