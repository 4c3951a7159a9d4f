package nodes

import (
	"net/netip"
	"sync"

	"golang.org/x/time/rate"
)

// Bounds of what strangers may take together, and from one source.
const (
	allRate, allBurst       = 50, 200 // registrations and bindings a second
	sourceRate, sourceBurst = 5, 100  // a fleet may be behind one address

	maxSources = 4096 // that are remembered; twice as many, to be exact
)

// source is where a connection comes from, as far as it counts as one: an IPv4
// address, or the /64 that an IPv6 host has for itself. Behind a proxy it is the
// proxy; what cannot be read is one source, too.
func source(remote string) netip.Prefix {
	a, err := netip.ParseAddrPort(remote)
	if err != nil {
		return netip.Prefix{}
	}
	addr := a.Addr().Unmap().WithZone("")
	bits := 32
	if addr.Is6() {
		bits = 64
	}
	p, _ := addr.Prefix(bits) // fails for more bits than there are
	return p
}

// limiters bounds what each source may do, and holds a bounded number of
// sources. Safe for concurrent use.
type limiters struct {
	rate  rate.Limit
	burst int

	// mu guards what follows, for the length of a map operation. Sources that are
	// heard of move from old to young; when that is full, the old are forgotten.
	mu         sync.Mutex
	young, old map[netip.Prefix]*rate.Limiter
}

func newLimiters(r rate.Limit, burst int) *limiters {
	return &limiters{rate: r, burst: burst, young: map[netip.Prefix]*rate.Limiter{}}
}

// allow takes one of what the source may do; false when it has had it all.
func (l *limiters) allow(from netip.Prefix) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	lim := l.young[from]
	if lim == nil {
		if lim = l.old[from]; lim == nil {
			lim = rate.NewLimiter(l.rate, l.burst)
		}
		if len(l.young) >= maxSources {
			l.young, l.old = map[netip.Prefix]*rate.Limiter{}, l.young
		}
		l.young[from] = lim
	}
	return lim.Allow()
}
