package tuf

import (
	"bytes"
	"fmt"
	"slices"

	"github.com/resultity/node/internal/snapshot"
)

// Proof returns the bytes from which [Client.Open] makes s again, at any time
// and without the network. It is the last configuration that was verified, or
// else there is no proof of it any more.
func (c *Client) Proof(s *snapshot.Snapshot) ([]byte, error) {
	st, err := c.load()
	if err != nil {
		return nil, err
	}
	if st.Last == nil {
		return nil, fmt.Errorf("no proof of configuration version %d is kept", s.Version())
	}
	last, err := st.Last.open(st.Roots)
	if err != nil {
		return nil, err
	}
	if last.Digest() != s.Digest() {
		return nil, fmt.Errorf("no proof of configuration version %d is kept any more: the last one verified is %d", s.Version(), last.Version())
	}
	return (&state{Roots: st.Roots[:st.Last.Root+1], Last: st.Last}).marshal()
}

// Open verifies a proof as [Client.Last] verifies what the cache holds: from the
// shipped root to the bytes of config.json, at the time at which it was valid. It
// fails with [snapshot.ErrUntrusted] when a single byte of it has changed.
func (c *Client) Open(proof []byte) (*snapshot.Snapshot, error) {
	if len(proof) > maxState {
		return nil, fmt.Errorf("%w: a proof of %d bytes", snapshot.ErrUntrusted, len(proof))
	}
	st, err := parseState(proof)
	if err != nil {
		return nil, fmt.Errorf("%w: the proof is damaged: %w", snapshot.ErrUntrusted, err)
	}
	i := slices.IndexFunc(st.Roots, func(r []byte) bool { return bytes.Equal(r, c.root) })
	if i < 0 || st.Last == nil {
		return nil, fmt.Errorf("%w: the proof does not lead to the root of this network", snapshot.ErrUntrusted)
	}
	st.rebase(i)
	return st.Last.open(st.Roots)
}
