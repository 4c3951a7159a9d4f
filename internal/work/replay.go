package work

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/resultity/node/internal/openai"
	"github.com/resultity/node/internal/runtime"
	"github.com/resultity/node/internal/wire"
)

// This file runs a request again for the operator. It is no job: nothing of it is
// written down, signed or counted, and no job is refused or waits for it. It uses
// a slot that is free, as a loan, and has its answer begun anew where a job wanted
// the slot.

// replay is a request that is run again.
type replay struct {
	active *Active
	cancel context.CancelCauseFunc
}

// Why a request is not run again.
var (
	// ErrNoRuntime says that there is no deployment to run it, or no longer.
	ErrNoRuntime = errors.New("no runtime is active, or it is being changed")

	errWanted = errors.New("a job wants the slot")
)

// wantedPause is how long a replay that had to make room leaves the engine alone.
const wantedPause = time.Second

// Active returns the deployment under which jobs are taken now, nil for none.
func (w *Worker) Active() *Active {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.active
}

// Replay has the engine of a deployment answer the request of j once more, under
// that deployment's limits. It waits for a slot that no job wants. It fails with
// ctx, with [ErrNoRuntime] if the deployment is not, or no longer, the active one,
// and otherwise as [runtime.Client.Run] does.
func (w *Worker) Replay(ctx context.Context, a *Active, j *wire.Job, req *openai.Request) (runtime.Result, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	r := &replay{a, cancel}
	w.mu.Lock()
	if w.base == nil || w.stopping || w.active != a || a.suspect() {
		w.mu.Unlock()
		return runtime.Result{}, ErrNoRuntime
	}
	w.replays[r] = struct{}{}
	w.mu.Unlock()
	defer func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		delete(w.replays, r)
	}()
	for {
		res, err := w.replay(ctx, a, j, req)
		switch {
		case ctx.Err() != nil:
			return runtime.Result{}, fmt.Errorf("replay: %w", context.Cause(ctx))
		case !errors.Is(err, errWanted):
			return res, err
		}
		pause := time.NewTimer(wantedPause)
		select {
		case <-pause.C:
		case <-ctx.Done():
			pause.Stop()
		}
	}
}

// replay tries once.
func (w *Worker) replay(ctx context.Context, a *Active, j *wire.Job, req *openai.Request) (runtime.Result, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	giveBack, err := w.cfg.Slots.Borrow(ctx, a.slots(), func() { cancel(errWanted) })
	if err != nil {
		return runtime.Result{}, err
	}
	defer giveBack()
	limits := &a.Snapshot.Config().Limits
	return a.Engine.Run(ctx, runtime.Job{
		ID: j.ID, Request: req, Model: j.Model, Created: j.Created, Seed: j.Seed,
		Tokens: limits.Tokens, ResponseBytes: limits.ResponseBytes,
	}, nil)
}

// endReplaysLocked ends the replays whose deployment is no longer the active one.
func (w *Worker) endReplaysLocked() {
	for r := range w.replays {
		if w.stopping || r.active != w.active {
			r.cancel(ErrNoRuntime)
		}
	}
}
