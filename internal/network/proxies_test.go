package network

import (
	"net/http"
	"net/netip"
	"strings"
	"testing"
)

func TestProxies(t *testing.T) {
	p, err := parseProxies([]string{"10.0.0.0/8", "2001:db8::/32"})
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		remote string
		header []string
		want   string
	}{
		{"192.0.2.1:5", nil, "192.0.2.1:5"},
		{"192.0.2.1:5", []string{"203.0.113.9"}, "192.0.2.1:5"}, // no proxy of ours: not believed
		{"10.0.0.1:5", nil, "10.0.0.1:5"},
		{"10.0.0.1:5", []string{"203.0.113.9"}, "203.0.113.9:0"},
		{"[::ffff:10.0.0.1]:5", []string{"203.0.113.9"}, "203.0.113.9:0"},
		{"10.0.0.1:5", []string{"1.1.1.1, 203.0.113.9"}, "203.0.113.9:0"}, // the client made the first one up
		{"10.0.0.1:5", []string{"10.1.1.1, 203.0.113.9"}, "203.0.113.9:0"},
		{"10.0.0.1:5", []string{"1.1.1.1", "203.0.113.9 ,\t10.9.9.9"}, "203.0.113.9:0"}, // two headers, two proxies
		{"10.0.0.1:5", []string{"203.0.113.9, 10.9.9.9", "junk"}, "10.0.0.1:5"},         // not even the proxy's own word
		{"10.0.0.1:5", []string{"junk, 10.9.9.9"}, "10.9.9.9:0"},                        // the last that is known
		{"10.0.0.1:5", []string{"203.0.113.9,"}, "10.0.0.1:5"},                          // an empty word
		{"10.0.0.1:5", []string{"203.0.113.9:80"}, "10.0.0.1:5"},                        // not in this form
		{"10.0.0.1:5", []string{"fe80::1%eth0"}, "10.0.0.1:5"},                          // nor a zone
		{"10.0.0.1:5", []string{"unknown"}, "10.0.0.1:5"},
		{"10.0.0.1:5", []string{"::ffff:203.0.113.9"}, "203.0.113.9:0"},
		{"[2001:db8::1]:5", []string{"2001:dead::7, 2001:db8::2"}, "[2001:dead::7]:0"},
		{"10.0.0.1:5", []string{"10.0.0.2, 10.0.0.3"}, "10.0.0.2:0"}, // nobody but proxies
		{"pipe", []string{"203.0.113.9"}, "pipe"},
	} {
		r := &http.Request{RemoteAddr: tc.remote, Header: http.Header{"X-Forwarded-For": tc.header}}
		got := p.client(r)
		t.Logf("%s says %q: expected: %s; got: %s", tc.remote, tc.header, tc.want, got)
		if got != tc.want {
			t.Errorf("%s %q: %s, want %s", tc.remote, tc.header, got, tc.want)
		}
	}
	var many []string
	for range maxHops + 5 {
		many = append(many, "10.0.0.2")
	}
	many[0] = "203.0.113.9"
	if got := p.client(&http.Request{RemoteAddr: "10.0.0.1:5", Header: http.Header{"X-Forwarded-For": many}}); got != "10.0.0.2:0" {
		t.Errorf("behind too many hops: %s", got)
	}
	if got := (proxies)(nil).client(&http.Request{RemoteAddr: "10.0.0.1:5", Header: http.Header{"X-Forwarded-For": {"1.1.1.1"}}}); got != "10.0.0.1:5" {
		t.Errorf("without proxies: %s", got)
	}
	for _, bad := range []string{"", "10.0.0.1", "10.0.0.1/8", "10.0.0.0/33", "::ffff:10.0.0.0/104", "all", "10.0.0.0/8 "} {
		if _, err := parseProxies([]string{bad}); err == nil {
			t.Errorf("%q is taken", bad)
		}
	}
}

// Whatever stands in the header before what our proxy has added, it changes
// nothing; and who is no proxy of ours is not believed at all.
func FuzzClient(f *testing.F) {
	p, err := parseProxies([]string{"10.0.0.0/8", "2001:db8::/32"})
	if err != nil {
		f.Fatal(err)
	}
	f.Add("", "10.0.0.1:1")
	f.Add("192.0.2.7, 10.0.0.2", "10.0.0.1:1")
	f.Add("10.0.0.2,::ffff:10.1.1.1, fe80::1%eth0", "[2001:db8::1]:9")
	f.Add(strings.Repeat("10.0.0.2,", 40), "[::ffff:10.0.0.1]:1")
	f.Fuzz(func(t *testing.T, header, remote string) {
		r := &http.Request{RemoteAddr: remote, Header: http.Header{forwardedHeader: {header}}}
		got := p.client(r)
		at, err := netip.ParseAddrPort(remote)
		if err != nil || !p.has(at.Addr()) {
			if got != remote {
				t.Fatalf("%q, which is no proxy, is believed to speak for %q", remote, got)
			}
			return
		}
		if _, err := netip.ParseAddrPort(got); err != nil {
			t.Fatalf("%q is no address", got)
		}
		const honest = "198.51.100.9"
		r.Header[forwardedHeader] = []string{header, honest}
		if got := p.client(r); got != honest+":0" {
			t.Fatalf("%q before it makes %s %q", header, honest, got)
		}
	})
}
