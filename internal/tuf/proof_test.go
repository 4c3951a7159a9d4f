package tuf

import (
	"errors"
	"testing"

	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/snapshot"
)

// A proof opens for ever: after newer configurations, rotated keys, a lost cache
// and with a newer shipped root; and only for the network it is of.
func TestProof(t *testing.T) {
	n := newNetwork(t)
	c := n.client(t)
	sees(t, c, 1)
	one := remembers(t, c, 1)
	proof, err := c.Proof(one)
	if err != nil {
		t.Fatal(err)
	}
	n.publish(t, 2)
	n.rotate(t, "timestamp", "snapshot", "targets")
	sees(t, c, 2)
	if _, err := c.Proof(one); err == nil {
		t.Error("a proof of what is not kept any more")
	}
	fresh := n.client(t) // with an empty cache
	for _, who := range []*Client{c, fresh} {
		s, err := who.Open(proof)
		if err != nil || s.Digest() != digest.Of(config(t, 1)) || s.Version() != one.Version() || !s.Expires().Equal(one.Expires()) {
			t.Errorf("%v, %v", s, err)
		}
	}
	other := newNetwork(t)
	refused := func(who *Client, name string, bad []byte) {
		t.Helper()
		s, err := who.Open(bad)
		if s != nil || !errors.Is(err, snapshot.ErrUntrusted) {
			t.Errorf("%s: %v, %v", name, s, err)
		}
		t.Logf("%s: expected: %v; got: %v", name, snapshot.ErrUntrusted, err)
	}
	refused(other.client(t), "another network's", proof)
	flips := 0
	for i := 0; i < len(proof); i += 97 {
		for _, bad := range [][]byte{flip(proof, i), proof[:i]} {
			if s, err := c.Open(bad); s != nil || !errors.Is(err, snapshot.ErrUntrusted) {
				t.Fatalf("byte %d: %v, %v", i, s, err)
			}
			flips++
		}
	}
	t.Logf("a byte flipped, or the rest missing: expected: refused; got: %d refusals", flips)
	refused(c, "too large", make([]byte, maxState+1))
	// With the right digest over wrong content, the signatures say no.
	st, err := parseState(proof)
	if err != nil {
		t.Fatal(err)
	}
	for name, forge := range map[string]func(*state){
		"config":    func(st *state) { last := *st.Last; last.Config = config(t, 2); st.Last = &last },
		"targets":   func(st *state) { last := *st.Last; last.Targets = flip(last.Targets, 40); st.Last = &last },
		"nothing":   func(st *state) { st.Last = nil },
		"no chain":  func(st *state) { last := *st.Last; last.Timestamp = nil; st.Last = &last },
		"its roots": func(st *state) { st.Roots = [][]byte{flip(st.Roots[0], 50)} },
	} {
		bad := *st
		forge(&bad)
		raw, err := bad.marshal()
		if err != nil {
			t.Fatal(err)
		}
		refused(c, "with the right digest, other "+name, raw)
	}
}
