package agent

import (
	"context"
	"errors"
	"io/fs"
	"log/slog"
	"path/filepath"

	"github.com/resultity/node/internal/config"
	"github.com/resultity/node/internal/control"
	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/journal"
	"github.com/resultity/node/internal/model"
	"github.com/resultity/node/internal/snapshot"
)

// maxScrubbed bounds the damaged files that wait to be looked at. The next scrub
// finds what found no room.
const maxScrubbed = 64

// scrub is a process of its own, at the lowest priority (resultity-scrub.service). It
// changes nothing: it tells the agent, which looks for itself.
func scrub(ctx context.Context, cfg *config.Config, log *slog.Logger) int {
	s, err := model.Scrub(ctx, filepath.Join(cfg.Paths.State, "models"))
	code := ExitOK
	if err != nil && !errors.Is(err, fs.ErrNotExist) { // nothing was fetched yet
		log.Error("scrub", journal.ScrubFailed.Attr(), "error", err)
		code = ExitFailed // what was found before is told all the same
	} else {
		log.Info("models read again", journal.ScrubDone.Attr(), "files", s.Files, "bytes", s.Bytes, "damaged", len(s.Damaged))
	}
	client := control.NewClient(filepath.Join(cfg.Paths.Runtime, control.SocketName))
	for _, d := range s.Damaged {
		if err := client.Post(ctx, "damaged/"+d.Hex(), nil); err != nil {
			log.Error("scrub", journal.ScrubFailed.Attr(), "sha256", d.Hex(), "error", err)
			code = ExitFailed
		}
	}
	return code
}

// Damaged implements [control.Backend].
func (a *Agent) Damaged(_ context.Context, file digest.Digest) error {
	select {
	case a.scrubbed <- file:
		return nil
	default:
		return control.ErrBusy
	}
}

// mendDamage looks at the files that a scrub calls damaged. One that is loses its
// name, so that the ordinary steps repair it; what was planned with it is staged anew,
// and a runtime that serves it is stopped.
func (a *Agent) mendDamage(ctx context.Context) error {
	for {
		var file digest.Digest
		select {
		case <-ctx.Done():
			return nil
		case file = <-a.scrubbed:
		}
		damage := a.distrust(ctx, file)
		switch {
		case ctx.Err() != nil:
			return nil
		case damage == nil:
			a.log.Info("a scrub took a file for damaged that is not", "sha256", file.Hex())
			continue
		case !errors.Is(damage, digest.ErrMismatch): // nothing is known to be wrong with it
			a.log.Error("scrub", journal.ScrubFailed.Attr(), "sha256", file.Hex(), "error", damage)
			continue
		}
		a.log.Error("a model file is damaged on disk", journal.ModelDamaged.Attr(), "sha256", file.Hex(), "error", damage)
		err := a.inUpdates(ctx, func(u *updater, ctx context.Context) error { return u.mend(ctx, file, damage) })
		if err != nil && ctx.Err() == nil {
			a.log.Warn("a damaged model is mended", "sha256", file.Hex(), "error", err)
		}
	}
}

// mend has everything staged anew that needs the file, and ends the service of it.
func (u *updater) mend(ctx context.Context, file digest.Digest, damage error) error {
	for d, p := range u.plans {
		if uses(p.plan.Snapshot(), file) {
			delete(u.plans, d)
		}
	}
	if u.active == nil || !uses(u.active.Snapshot(), file) {
		poke(u.look)
		return nil
	}
	return u.judge(ctx, u.active, damage)
}

// uses reports whether a file is of one of the models that s has on disk.
func uses(s *snapshot.Snapshot, file digest.Digest) bool {
	for i := range s.Config().Models {
		for _, f := range s.Config().Models[i].Files {
			if f.SHA256 == file {
				return true
			}
		}
	}
	return false
}
