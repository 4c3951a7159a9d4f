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

// group is what has to be the same for fingerprints to be compared.
type group struct{ config, class digest.Digest }

type entry struct {
	group
	print digest.Digest
}

// tally is what is known of a group.
type tally struct {
	nodes map[evm.Address]struct{}
	count map[digest.Digest]int // of nodes, by fingerprint
}

// majority returns the fingerprint that more than half have, or none.
func (t *tally) majority() digest.Digest {
	for p, n := range t.count {
		if 2*n > len(t.nodes) {
			return p
		}
	}
	return digest.Digest{}
}

func (t *tally) verdict(print digest.Digest) Verdict {
	most := t.majority()
	switch {
	case len(t.nodes) < 2:
		return Unknown
	case print == most:
		return Same
	case most.IsZero() || len(t.nodes) < quorum:
		return Disputed
	}
	return Odd
}

// Book remembers what each node has said last, also one that has gone, until it
// says something else. Its methods are safe for concurrent use.
type Book struct {
	mu     sync.Mutex // guards what follows
	of     map[evm.Address]entry
	groups map[group]*tally
	said   map[evm.Address]time.Time // when a node was pointed out last
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
	for _, n := range b.take(node, beat) {
		if at, said := b.said[n]; !said || now.Sub(at) >= quiet {
			b.said[n] = now
			odd = append(odd, n)
		}
	}
	return odd
}

func (b *Book) take(node evm.Address, beat *wire.Heartbeat) (odd []evm.Address) {
	was, known := b.of[node]
	c := beat.Class
	if c == nil || c.Fingerprint.IsZero() {
		if known && (beat.Config != was.config || c != nil && c.Digest != was.class) {
			b.remove(node, was)
		}
		return nil
	}
	now := entry{group{beat.Config, c.Digest}, c.Fingerprint}
	if known && now == was {
		return nil
	}
	if known {
		b.remove(node, was)
	}
	t := b.groups[now.group]
	if t == nil {
		t = &tally{map[evm.Address]struct{}{}, map[digest.Digest]int{}}
		b.groups[now.group] = t
	}
	before, few := t.majority(), len(t.nodes)+1 <= quorum
	t.nodes[node] = struct{}{}
	t.count[now.print]++
	b.of[node] = now
	if t.verdict(now.print) == Odd {
		odd = append(odd, node)
	}
	if t.majority() != before || few { // else it changes nothing for the others
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
