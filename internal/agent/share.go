package agent

import (
	"context"

	"github.com/resultity/node/internal/deploy"
	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/snapshot"
)

// shareModels gives files of models to machines nearby, where the operator wants it.
func (a *Agent) shareModels(ctx context.Context) error {
	if a.share == nil {
		return nil
	}
	return a.share.Run(ctx, a.cfg.Models.Serve)
}

// lists reports whether a file is of a model that a verified configuration lists: a
// network's newest, or the one that is served.
func (a *Agent) lists(file digest.Digest) bool {
	for _, m := range a.members {
		var active *deploy.Deployment
		var newest *snapshot.Snapshot
		m.board.set(func(b *board) { active, newest = b.active, b.snap })
		if active != nil && uses(active.Snapshot(), file) || newest != nil && uses(newest, file) {
			return true
		}
	}
	return false
}
