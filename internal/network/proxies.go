package network

import (
	"fmt"
	"net/http"
	"net/netip"
	"strings"
)

// proxies are the networks of front proxies whose word about where a request comes
// from is believed.
type proxies []netip.Prefix

// forwardedHeader is where proxies write that, each behind what is there already.
const forwardedHeader = "X-Forwarded-For"

// maxHops bounds the proxies that one request may have passed.
const maxHops = 16

func parseProxies(list []string) (proxies, error) {
	var p proxies
	for _, text := range list {
		n, err := netip.ParsePrefix(text)
		if err != nil || n != n.Masked() || n.Addr().Is4In6() {
			return nil, fmt.Errorf("%q: want a network such as 10.0.0.0/8 or 2001:db8::/32, without bits behind its length", text)
		}
		p = append(p, n)
	}
	return p, nil
}

func (p proxies) has(a netip.Addr) bool {
	a = a.Unmap().WithZone("")
	for _, n := range p {
		if n.Contains(a) {
			return true
		}
	}
	return false
}

// client is where a request comes from, as host:port: the last hop that is no
// proxy of ours. What stands before it in the header anybody may have written. With
// a word in the header that is no address, it is the proxy that passed that on.
func (p proxies) client(r *http.Request) string {
	at, err := netip.ParseAddrPort(r.RemoteAddr)
	if err != nil || !p.has(at.Addr()) {
		return r.RemoteAddr
	}
	hops := strings.Split(strings.Join(r.Header.Values(forwardedHeader), ","), ",")
	last := r.RemoteAddr
	for i := len(hops) - 1; i >= 0 && i >= len(hops)-maxHops; i-- {
		hop, err := netip.ParseAddr(strings.Trim(hops[i], " \t"))
		if err != nil || hop.Zone() != "" {
			return last
		}
		last = netip.AddrPortFrom(hop.Unmap(), 0).String()
		if !p.has(hop) {
			return last
		}
	}
	return last
}
