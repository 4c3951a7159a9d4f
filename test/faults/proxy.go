package faults

import (
	"crypto/tls"
	"errors"
	"fmt"
	"log"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"strings"
	"sync"
	"time"

	"github.com/gorilla/websocket"

	"github.com/resultity/node/internal/wire"
)

// Manner is what a proxy does to the messages of a node's sessions.
type Manner struct {
	Delay     time.Duration // at most, for each
	Duplicate int           // so many of a hundred come twice
	Reorder   int           // so many of a hundred come after the next
	Change    int           // in so many of a hundred a bit is flipped
}

// Proxy stands between a node and its network. It ends TLS, as a front of an
// operator's would, and passes everything on; sessions in its manner.
type Proxy struct {
	URL string // https://name:port

	server *http.Server
	to     *url.URL
	tls    *tls.Config // towards the network
	served chan error

	mu     sync.Mutex
	manner Manner
	conns  map[*websocket.Conn]struct{}
}

func (w *World) newProxy() (*Proxy, error) {
	cert, err := w.Certificate(proxyName)
	if err != nil {
		return nil, err
	}
	to, err := url.Parse(w.API)
	if err != nil {
		return nil, err
	}
	l, err := tls.Listen("tcp", net.JoinHostPort(w.Lab.Addr().String(), "0"), &tls.Config{Certificates: []tls.Certificate{cert}})
	if err != nil {
		return nil, err
	}
	_, port, err := net.SplitHostPort(l.Addr().String())
	if err != nil {
		return nil, errors.Join(err, l.Close())
	}
	transport, ok := w.HTTP.Transport.(*http.Transport)
	if !ok {
		return nil, errors.Join(fmt.Errorf("the stack's client has a %T", w.HTTP.Transport), l.Close())
	}
	p := &Proxy{
		URL: "https://" + net.JoinHostPort(proxyName, port), to: to, tls: transport.TLSClientConfig.Clone(),
		served: make(chan error, 1), conns: map[*websocket.Conn]struct{}{},
	}
	plain := &httputil.ReverseProxy{
		Rewrite:   func(r *httputil.ProxyRequest) { r.SetURL(to) },
		Transport: transport,
		ErrorLog:  log.New(discard{}, "", 0), // the network is away while it is broken
	}
	p.server = &http.Server{
		ReadHeaderTimeout: 10 * time.Second, ErrorLog: log.New(discard{}, "", 0),
		Handler: http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
			if websocket.IsWebSocketUpgrade(r) {
				p.session(rw, r)
				return
			}
			plain.ServeHTTP(rw, r)
		}),
	}
	go func() { p.served <- p.server.Serve(l) }()
	return p, nil
}

type discard struct{}

func (discard) Write(p []byte) (int, error) { return len(p), nil }

// Close ends the proxy and what runs through it.
func (p *Proxy) Close() error {
	err := p.server.Close()
	p.Break()
	if e := <-p.served; !errors.Is(e, http.ErrServerClosed) {
		err = errors.Join(err, e)
	}
	return err
}

// Behave sets the manner from now on.
func (p *Proxy) Behave(m Manner) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.manner = m
}

// Break ends all sessions.
func (p *Proxy) Break() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for c := range p.conns {
		_ = c.Close() // ended already is as good
	}
}

func (p *Proxy) keep(c *websocket.Conn) (forget func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.conns[c] = struct{}{}
	return func() {
		_ = c.Close() // ended already is as good
		p.mu.Lock()
		defer p.mu.Unlock()
		delete(p.conns, c)
	}
}

// session passes one session on, message by message.
func (p *Proxy) session(rw http.ResponseWriter, r *http.Request) {
	const mine = "Sec-Websocket-"
	header := http.Header{}
	for name, values := range r.Header {
		if !strings.HasPrefix(name, mine) && name != "Connection" && name != "Upgrade" {
			header[name] = values
		}
	}
	dialer := websocket.Dialer{TLSClientConfig: p.tls, Subprotocols: []string{wire.Subprotocol}, HandshakeTimeout: 10 * time.Second}
	network, res, err := dialer.DialContext(r.Context(), "wss://"+p.to.Host+r.URL.Path, header)
	if err != nil {
		status := http.StatusBadGateway
		if res != nil {
			status = res.StatusCode
		}
		http.Error(rw, "the network does not take the session", status)
		return
	}
	defer p.keep(network)()
	reply := http.Header{}
	for name, values := range res.Header {
		if strings.HasPrefix(name, "Resultity-") {
			reply[name] = values
		}
	}
	node, err := (&websocket.Upgrader{Subprotocols: []string{wire.Subprotocol}}).Upgrade(rw, r, reply)
	if err != nil {
		return
	}
	defer p.keep(node)()
	var wg sync.WaitGroup
	wg.Go(func() { p.pump(network, node) })
	p.pump(node, network)
	wg.Wait()
}

// pump passes messages on until an end is gone, and then ends both. Pings are
// for each side's own peer.
func (p *Proxy) pump(from, to *websocket.Conn) {
	defer to.Close()   // ended already is as good
	defer from.Close() // likewise
	var held []byte    // to come after the next
	for {
		kind, m, err := from.ReadMessage()
		if err != nil {
			var end *websocket.CloseError
			if errors.As(err, &end) && end.Code != websocket.CloseAbnormalClosure && end.Code != websocket.CloseNoStatusReceived {
				_ = to.WriteControl(websocket.CloseMessage, websocket.FormatCloseMessage(end.Code, end.Text), time.Now().Add(time.Second)) // as a courtesy
			}
			return
		}
		p.mu.Lock()
		manner := p.manner
		p.mu.Unlock()
		happens := func(percent int) bool { return rand.N(100) < percent }
		if manner.Delay > 0 {
			time.Sleep(rand.N(manner.Delay)) // this is what it is for
		}
		if happens(manner.Change) {
			m[rand.N(len(m))] ^= 1 << rand.N(8)
		}
		send := [][]byte{m}
		if held == nil && happens(manner.Reorder) {
			held = m
			continue
		}
		if held != nil {
			send, held = append(send, held), nil
		}
		if happens(manner.Duplicate) {
			send = append(send, m)
		}
		for _, m := range send {
			if to.WriteMessage(kind, m) != nil {
				return
			}
		}
	}
}
