package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"path/filepath"
	"time"

	"github.com/resultity/node/internal/config"
	"github.com/resultity/node/internal/control"
	"github.com/resultity/node/internal/deploy"
	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/image"
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
	if err := client.Post(ctx, "scrubbed", nil); err != nil {
		log.Error("scrub", journal.ScrubFailed.Attr(), "error", err)
		code = ExitFailed
	}
	return code
}

// Scrubbed implements [control.Backend].
func (a *Agent) Scrubbed(context.Context) error {
	poke(a.scrubDone)
	return nil
}

// imageAfter is how long after the agent's start the image is looked at. A runtime that
// has outlived the agent is of an image that nobody has looked at for as long; one that
// the agent starts itself is looked at before.
const imageAfter = 5 * time.Minute

// watchImage has the stored image of what runs read again, after the start and after
// each scrub. One that is damaged is taken out of service like a damaged model.
func (a *Agent) watchImage(ctx context.Context) error {
	first := time.NewTimer(imageAfter)
	defer first.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-first.C:
		case <-a.scrubDone:
		}
		runs := a.running()
		if runs == nil {
			continue // it is looked at when it is brought up
		}
		began := time.Now()
		damage := a.verifyImage(ctx, runs.Snapshot())
		ref := runs.Snapshot().Config().Runtime.Image
		switch {
		case ctx.Err() != nil:
			return nil
		case damage == nil:
			a.log.Info("image read again", journal.ImageChecked.Attr(), "image", ref, "took", time.Since(began).Round(time.Millisecond))
			continue
		case !errors.Is(damage, image.ErrAltered): // nothing is known to be wrong with it
			a.log.Error("scrub", journal.ScrubFailed.Attr(), "image", ref, "error", damage)
			continue
		}
		err := a.inUpdates(ctx, func(u *updater, ctx context.Context) error {
			if u.active == nil || u.active.Snapshot().Config().Runtime.Image != ref {
				return nil
			}
			return u.judge(ctx, u.active, damage, byDoubt)
		})
		if err != nil && ctx.Err() == nil {
			a.log.Warn("a damaged image is replaced", "image", ref, "error", err)
		}
	}
}

// running returns what the active runtime is a deployment of, or nil.
func (a *Agent) running() (d *deploy.Deployment) {
	for _, m := range a.members {
		m.board.set(func(b *board) {
			if b.active != nil {
				d = b.active
			}
		})
	}
	return d
}

// Damaged implements [control.Backend].
func (a *Agent) Damaged(_ context.Context, file digest.Digest) error {
	select {
	case a.scrubbed <- file:
		return nil
	default:
		return fmt.Errorf("%w: %d damaged files wait to be looked at; the next scrub finds this one", control.ErrRefused, maxScrubbed)
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
	return u.judge(ctx, u.active, damage, byDoubt)
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
