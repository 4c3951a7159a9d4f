package network

import (
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/resultity/node/internal/journal"
	"github.com/resultity/node/internal/network/nodes"
)

// crowd bounds the connections of a listener, of all and of each source, before
// anything is read from them: each costs memory, and whoever says nothing on it costs
// the most for the least. One too many is closed at once.
//
// This machine and the front proxies are no source: many may be behind them.
type crowd struct {
	net.Listener
	most, ofSource int
	front          proxies
	refused        prometheus.Counter
	log            *slog.Logger

	mu   sync.Mutex // guards what follows, for the length of a map operation
	open int
	of   map[netip.Prefix]int
	said time.Time // when the log said that there are too many
}

// sourceShare is which part of all connections one source may have.
const sourceShare = 4

func newCrowd(l net.Listener, most int, front proxies, refused prometheus.Counter, log *slog.Logger) *crowd {
	return &crowd{Listener: l, most: most, ofSource: max(1, most/sourceShare), front: front, refused: refused, log: log, of: map[netip.Prefix]int{}}
}

// Accept waits for a connection for which there is room.
func (c *crowd) Accept() (net.Conn, error) {
	for {
		conn, err := c.Listener.Accept()
		if err != nil {
			return nil, err
		}
		from := c.source(conn)
		if c.enter(from) {
			return &guest{Conn: conn, leave: sync.OnceFunc(func() { c.leave(from) })}, nil
		}
		c.refused.Inc()
		_ = conn.Close() // nothing was said on it
	}
}

// source is the zero value for who is none.
func (c *crowd) source(conn net.Conn) netip.Prefix {
	at, err := netip.ParseAddrPort(conn.RemoteAddr().String())
	if err != nil || at.Addr().Unmap().IsLoopback() || c.front.has(at.Addr()) {
		return netip.Prefix{}
	}
	return nodes.Source(at.String())
}

func (c *crowd) enter(from netip.Prefix) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	full := c.open >= c.most
	if full || from.IsValid() && c.of[from] >= c.ofSource {
		if time.Since(c.said) > time.Minute {
			c.said = time.Now()
			c.log.Warn("too many connections; more are closed at once, and the log says so once a minute", journal.ConnectionsRefused.Attr(), "open", c.open, "source", from, "of_source", c.of[from])
		}
		return false
	}
	c.open++
	if from.IsValid() {
		c.of[from]++
	}
	return true
}

func (c *crowd) leave(from netip.Prefix) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.open--
	if !from.IsValid() {
		return
	}
	if c.of[from]--; c.of[from] == 0 {
		delete(c.of, from)
	}
}

// guest is a connection that counts until it is closed.
type guest struct {
	net.Conn
	leave func()
}

func (g *guest) Close() error {
	defer g.leave()
	return g.Conn.Close()
}
