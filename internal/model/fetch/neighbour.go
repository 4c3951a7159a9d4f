package fetch

import (
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"time"
)

// ErrNeighbour says that what is configured is no neighbour's address.
var ErrNeighbour = errors.New("want http://HOST:PORT or https://HOST:PORT")

// CheckNeighbour checks the base URL of a neighbour.
func CheckNeighbour(base string) error {
	u, err := url.Parse(base)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Hostname() == "" || u.User != nil || strings.Trim(u.Path, "/") != "" || u.RawQuery != "" || u.Fragment != "" {
		return fmt.Errorf("%.200q: %w", base, ErrNeighbour)
	}
	return nil
}

// NeighbourPath is where nodes serve files to each other, by their SHA-256 in
// hexadecimal digits.
const NeighbourPath = "/resultity/v1/models/"

// neighbour is another node as a source. It may be anything: it is asked for a hash,
// and every chunk of what it answers is checked.
func (x *Fetcher) neighbour(base string, f *File) *source {
	address := strings.TrimSuffix(base, "/") + NeighbourPath + f.SHA256.Hex()
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
