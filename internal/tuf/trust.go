package tuf

import (
	"encoding/json"
	"time"
)

// Trust is which metadata a client has verified, for people: nothing may rest
// upon it.
type Trust struct {
	Roots     []Metadata `json:"roots"` // the shipped one first
	Timestamp *Metadata  `json:"timestamp,omitempty"`
	Snapshot  *Metadata  `json:"snapshot,omitempty"`
	Targets   *Metadata  `json:"targets,omitempty"`
	Last      time.Time  `json:"last,omitzero"` // when the last good configuration was verified
}

// Metadata is a file of a repository.
type Metadata struct {
	Version int64     `json:"version"`
	Expires time.Time `json:"expires"`
}

// Trust reads the cache. It fails as [Client.Last] does, for the cache as a
// whole.
func (c *Client) Trust() (*Trust, error) {
	st, err := c.load()
	if err != nil {
		return nil, err
	}
	t := &Trust{Timestamp: summary(st.Timestamp), Snapshot: summary(st.Snapshot), Targets: summary(st.Targets)}
	for _, raw := range st.Roots {
		if m := summary(raw); m != nil {
			t.Roots = append(t.Roots, *m)
		}
	}
	if st.Last != nil {
		t.Last = st.Last.At
	}
	return t, nil
}

// summary is nil for what is missing, or is no metadata.
func summary(raw []byte) *Metadata {
	var m struct {
		Signed Metadata `json:"signed"`
	}
	if json.Unmarshal(raw, &m) != nil {
		return nil
	}
	return &m.Signed
}
