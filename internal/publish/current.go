package publish

import (
	"time"

	"github.com/theupdateframework/go-tuf/v2/metadata/trustedmetadata"

	"github.com/resultity/node/internal/snapshot"
)

// Current returns the published configuration, verified as nodes verify it. It
// fails with [ErrNothing] before the first [Publish], and when the timestamp
// has expired: call [Refresh] first.
func Current(dir string) (*snapshot.Snapshot, error) {
	r, err := open(dir)
	if err != nil {
		return nil, err
	}
	defer r.unlock()
	n, err := r.current()
	if err != nil {
		return nil, err
	}
	trusted, err := trustedmetadata.New(r.rootRaw)
	if err != nil {
		return nil, err
	}
	trusted.RefTime = time.Now()
	if _, err := trusted.UpdateTimestamp(n.timestamp.raw); err != nil {
		return nil, err
	}
	if _, err := trusted.UpdateSnapshot(n.snapshot.raw, false); err != nil {
		return nil, err
	}
	if _, err := trusted.UpdateTargets(n.targets.raw); err != nil {
		return nil, err
	}
	return snapshot.Open(trusted, n.config)
}
