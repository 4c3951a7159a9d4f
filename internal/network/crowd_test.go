package network

import (
	"io"
	"log/slog"
	"net"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
)

// visitors are connections from addresses, one after the other.
type visitors struct {
	net.Listener
	from []string
}

type visitor struct {
	net.Conn
	from net.Addr
}

func (v visitor) RemoteAddr() net.Addr { return v.from }
func (v visitor) Close() error         { return nil }

func (v *visitors) Accept() (net.Conn, error) {
	if len(v.from) == 0 {
		return nil, io.EOF
	}
	at, err := net.ResolveTCPAddr("tcp", v.from[0])
	v.from = v.from[1:]
	return visitor{from: at}, err
}

func TestConnectionsAreBounded(t *testing.T) {
	front, err := parseProxies([]string{"198.51.100.0/24"})
	if err != nil {
		t.Fatal(err)
	}
	all := &visitors{}
	c := newCrowd(all, 8, front, prometheus.NewCounter(prometheus.CounterOpts{Name: "x"}), slog.New(slog.DiscardHandler))
	// accepted returns those of the addresses that find room.
	var open []net.Conn
	accepted := func(from string) string {
		t.Helper()
		all.from = strings.Fields(from)
		var in []string
		for {
			conn, err := c.Accept()
			if err == io.EOF {
				return strings.Join(in, " ")
			} else if err != nil {
				t.Fatal(err)
			}
			open = append(open, conn)
			in = append(in, conn.RemoteAddr().String())
		}
	}
	for _, step := range []struct{ name, from, want string }{
		{"a source has a quarter", "192.0.2.1:1 192.0.2.1:2 192.0.2.1:3 192.0.2.2:1", "192.0.2.1:1 192.0.2.1:2 192.0.2.2:1"},
		{"of IPv6 a /64", "[2001:db8::1]:1 [2001:db8::2]:1 [2001:db8::3]:1", "[2001:db8::1]:1 [2001:db8::2]:1"},
		{"a proxy and this machine are none", "198.51.100.1:1 127.0.0.1:1 127.0.0.1:2 127.0.0.1:3", "198.51.100.1:1 127.0.0.1:1 127.0.0.1:2"},
		{"all are eight", "192.0.2.3:1 127.0.0.1:4", ""},
	} {
		got := accepted(step.from)
		t.Logf("%s: expected: room for %q; got: for %q", step.name, step.want, got)
		if got != step.want {
			t.Errorf("%s: %q, want %q", step.name, got, step.want)
		}
	}
	for range 2 { // closing twice frees one place
		if err := open[0].Close(); err != nil {
			t.Fatal(err)
		}
	}
	if got := accepted("192.0.2.1:9 192.0.2.9:9"); got != "192.0.2.1:9" {
		t.Errorf("after one was closed: %q", got)
	}
	for _, conn := range open {
		_ = conn.Close() // of a visitor, which cannot fail
	}
	if c.open != 0 || len(c.of) != 0 {
		t.Errorf("%d and %v are left", c.open, c.of)
	}
}
