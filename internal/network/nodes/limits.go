package nodes

import (
	"net/netip"
	"sync"
	"time"

	"golang.org/x/time/rate"

	"github.com/resultity/node/internal/evm"
	"github.com/resultity/node/internal/wire"
)

// Bounds of registrations and requests about bindings, a second. A fleet may be
// behind one address, and each of its nodes asks three times to register and to
// be bound. One request costs a fifth of a millisecond.
const (
	allRate, allBurst       = 200, 2400
	sourceRate, sourceBurst = 20, 1200
)

// How often somebody may ask for what lasts or goes to others, each in an hour.
const (
	perNodeRequests = 60
	perNodeCodes    = 5
	perAddress      = 5
	perSource       = 20
	perNetwork      = 600 // codes of all
	perSourceNodes  = 50  // new nodes without a token; each stays in the registry
	perNetworkNodes = 2000
)

// A batch of logs costs as much as hundreds of other messages, and a node sends
// one at a time, now and then.
const logsRate, logsBurst = 0.5, 16

// leavesRate and leavesBurst are of leaves for which the session has seen no result:
// those of sessions before, and those that a network asks for which has lost them.
const leavesRate, leavesBurst = 100, 2 * wire.MaxPending

// A node makes a record of its sandbox in an hour, and sends a few again with each
// session.
const recordsRate, recordsBurst = 0.1, 256

// What nobody asked for in one session, a second.
const strayRate, strayBurst = 20, 200

func newStray() *rate.Limiter { return rate.NewLimiter(strayRate, strayBurst) }

// maxKeys bounds what limiters remember; it is twice as many, to be exact.
const maxKeys = 8192

// limits are the bounds of what may be asked for. In memory: a restart forgives.
type limits struct {
	asksOf *limiters[netip.Prefix] // before anything is looked at, since a signature costs time
	asks   *rate.Limiter

	requestsOf  *limiters[evm.Address] // about bindings, of a registered node
	codesOf     *limiters[evm.Address]
	codesTo     *limiters[string] // an address, in lower case
	codesSource *limiters[netip.Prefix]
	codes       *rate.Limiter

	nodesOf *limiters[netip.Prefix] // new ones, without a token
	nodes   *rate.Limiter

	logsOf    *limiters[evm.Address] // in all of its sessions
	leavesOf  *limiters[evm.Address] // likewise
	recordsOf *limiters[evm.Address] // of its sandbox, likewise
}

func newLimits() limits {
	return limits{
		asksOf: newLimiters[netip.Prefix](sourceRate, sourceBurst), asks: rate.NewLimiter(allRate, allBurst),
		requestsOf: newLimiters[evm.Address](hourly(perNodeRequests)), codesOf: newLimiters[evm.Address](hourly(perNodeCodes)),
		codesTo: newLimiters[string](hourly(perAddress)), codesSource: newLimiters[netip.Prefix](hourly(perSource)), codes: rate.NewLimiter(hourly(perNetwork)),
		nodesOf: newLimiters[netip.Prefix](hourly(perSourceNodes)), nodes: rate.NewLimiter(hourly(perNetworkNodes)),
		logsOf:    newLimiters[evm.Address](logsRate, logsBurst),
		leavesOf:  newLimiters[evm.Address](leavesRate, leavesBurst),
		recordsOf: newLimiters[evm.Address](recordsRate, recordsBurst),
	}
}

// hourly is the rate and the burst of n in an hour.
func hourly(n int) (rate.Limit, int) { return rate.Limit(float64(n) / time.Hour.Seconds()), n }

// Source is where a connection comes from, as far as it counts as one: an IPv4
// address, or the /64 that an IPv6 host has for itself. Behind a proxy it is the
// proxy; what cannot be read is one source, too.
func Source(remote string) netip.Prefix {
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

// limiters bounds how often each of many may do something, and remembers a
// bounded number of them: whoever has more keys than that buys himself no more
// than to be forgotten, and keeps nobody else out. Safe for concurrent use.
type limiters[K comparable] struct {
	rate  rate.Limit
	burst int

	// mu guards what follows, for the length of a map operation. Keys that are
	// heard of move from old to young; when that is full, the old are forgotten.
	mu         sync.Mutex
	young, old map[K]*rate.Limiter
}

func newLimiters[K comparable](r rate.Limit, burst int) *limiters[K] {
	return &limiters[K]{rate: r, burst: burst, young: map[K]*rate.Limiter{}}
}

// allow takes one of what the key may do; false when it has had it all.
func (l *limiters[K]) allow(key K) bool { return l.of(key).Allow() }

func (l *limiters[K]) of(key K) *rate.Limiter {
	l.mu.Lock()
	defer l.mu.Unlock()
	lim := l.young[key]
	if lim == nil {
		if lim = l.old[key]; lim == nil {
			lim = rate.NewLimiter(l.rate, l.burst)
		}
		if len(l.young) >= maxKeys {
			l.young, l.old = map[K]*rate.Limiter{}, l.young
		}
		l.young[key] = lim
	}
	return lim
}
