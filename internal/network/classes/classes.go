// Package classes owns what the network makes of the fingerprints of its nodes:
// which of them answers otherwise than the others of its determinism class.
//
// The rule it keeps: it points out, and decides nothing. What it compares is what
// nodes say of themselves, and many nodes of one owner can be a majority.
package classes

import (
	"sync"
	"time"

	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/evm"
	"github.com/resultity/node/internal/wire"
)

// Verdict says how a node's fingerprint compares with those of the other nodes of
// its class, on the same configuration.
type Verdict string

// The verdicts.
const (
	Unknown  Verdict = ""         // it has none, or there is no other to compare it with
	Same     Verdict = "same"     // it is that of more than half of them, or of all
	Odd      Verdict = "odd"      // more than half of at least three have another one, the same
	Disputed Verdict = "disputed" // there are several, and none is of more than half
)

// quorum is the least number of nodes of which one can be the odd one.
const quorum = 3

// quiet is how long a node that has been pointed out is not again: one that says
// something else with each heartbeat fills no log.
const quiet = 10 * time.Minute

// A node that has gone stops counting after a while, which is looked at now and then.
const (
	remember = 24 * time.Hour
	every    = time.Hour
)

// group is what has to be the same for fingerprints to be compared.
type group struct{ config, class digest.Digest }

type entry struct {
	group
	print digest.Digest
	at    time.Time // of the node's last heartbeat
}

// tally is what is known of a group.
type tally struct {
	nodes map[evm.Address]struct{}
	count map[digest.Digest]int // of nodes, by fingerprint
	most  digest.Digest         // that more than half have, or none
}

// settle finds the majority anew. There may be as many fingerprints as nodes, so it
// is done once for each change, and not for each verdict.
func (t *tally) settle() {
	t.most = digest.Digest{}
	for p, n := range t.count {
		if 2*n > len(t.nodes) {
			t.most = p
		}
	}
}

func (t *tally) verdict(print digest.Digest) Verdict {
	switch {
	case len(t.nodes) < 2:
		return Unknown
	case print == t.most:
		return Same
	case t.most.IsZero() || len(t.nodes) < quorum:
		return Disputed
	}
	return Odd
}

// Book remembers what each node has said last until it says something else, and of
// one that has gone for a day. Its methods are safe for concurrent use.
type Book struct {
	mu     sync.Mutex // guards what follows
	of     map[evm.Address]entry
	groups map[group]*tally
	said   map[evm.Address]time.Time // when a node was pointed out last
	swept  time.Time
}

// New returns an empty book.
func New() *Book {
	return &Book{of: map[evm.Address]entry{}, groups: map[group]*tally{}, said: map[evm.Address]time.Time{}}
}

// Take notes what a node's heartbeat says, and returns the nodes that are odd by
// that: itself, or others of which it makes a minority; each at most once within
// quiet. One without a class takes nothing back but what was said on another
// configuration.
func (b *Book) Take(node evm.Address, beat *wire.Heartbeat, now time.Time) (odd []evm.Address) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.sweep(now)
	for _, n := range b.take(node, beat, now) {
		if at, said := b.said[n]; !said || now.Sub(at) >= quiet {
			b.said[n] = now
			odd = append(odd, n)
		}
	}
	return odd
}

// sweep forgets nodes that have gone. The caller holds the lock.
func (b *Book) sweep(now time.Time) {
	if now.Sub(b.swept) < every {
		return
	}
	b.swept = now
	for n, e := range b.of {
		if now.Sub(e.at) >= remember {
			b.remove(n, e)
		}
	}
	for n, at := range b.said {
		if now.Sub(at) >= quiet {
			delete(b.said, n)
		}
	}
}

func (b *Book) take(node evm.Address, beat *wire.Heartbeat, at time.Time) (odd []evm.Address) {
	was, known := b.of[node]
	c := beat.Class
	if c == nil || c.Fingerprint.IsZero() {
		switch {
		case !known:
		case beat.Config != was.config || c != nil && c.Digest != was.class:
			b.remove(node, was)
		default: // what it has said stands
			was.at = at
			b.of[node] = was
		}
		return nil
	}
	now := entry{group{beat.Config, c.Digest}, c.Fingerprint, at}
	if known && now.group == was.group && now.print == was.print {
		b.of[node] = now
		return nil
	}
	if known {
		b.remove(node, was)
	}
	t := b.groups[now.group]
	if t == nil {
		t = &tally{nodes: map[evm.Address]struct{}{}, count: map[digest.Digest]int{}}
		b.groups[now.group] = t
	}
	before, few := t.most, len(t.nodes)+1 <= quorum
	t.nodes[node] = struct{}{}
	t.count[now.print]++
	t.settle()
	b.of[node] = now
	if t.verdict(now.print) == Odd {
		odd = append(odd, node)
	}
	if t.most != before || few { // else it changes nothing for the others
		for n := range t.nodes {
			if n != node && t.verdict(b.of[n].print) == Odd {
				odd = append(odd, n)
			}
		}
	}
	return odd
}

// remove forgets what a node has said. The caller holds the lock.
func (b *Book) remove(node evm.Address, e entry) {
	delete(b.of, node)
	t := b.groups[e.group]
	delete(t.nodes, node)
	if t.count[e.print]--; t.count[e.print] == 0 {
		delete(t.count, e.print)
	}
	t.settle()
	if len(t.nodes) == 0 {
		delete(b.groups, e.group)
	}
}

// Verdict returns that of a node.
func (b *Book) Verdict(node evm.Address) Verdict {
	b.mu.Lock()
	defer b.mu.Unlock()
	e, known := b.of[node]
	if !known {
		return Unknown
	}
	return b.groups[e.group].verdict(e.print)
}

// Count returns how many nodes are odd, and how many are disputed.
func (b *Book) Count() (odd, disputed int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, t := range b.groups {
		for p, n := range t.count {
			switch t.verdict(p) {
			case Odd:
				odd += n
			case Disputed:
				disputed += n
			}
		}
	}
	return odd, disputed
}
