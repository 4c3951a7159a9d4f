package publish

import "github.com/resultity/node/internal/snapshot"

// Current returns the published configuration, verified as nodes verify it. It
// fails with [ErrNothing] before the first [Publish], and when the timestamp
// has expired: call [Refresh] first.
func Current(dir string) (*snapshot.Snapshot, error) {
	r, err := look(dir)
	if err != nil {
		return nil, err
	}
	n, err := r.current()
	if err != nil {
		return nil, err
	}
	return n.verify(r.rootRaw)
}
