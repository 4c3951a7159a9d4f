package work

import (
	"errors"
	"fmt"
	"time"

	"github.com/resultity/node/internal/journal"
	"github.com/resultity/node/internal/openai"
	"github.com/resultity/node/internal/snapshot"
	"github.com/resultity/node/internal/wire"
)

// refusal says why a job is not taken.
type refusal struct {
	code    wire.Code
	message string
}

func refuse(code wire.Code, format string, args ...any) *refusal {
	return &refusal{code, fmt.Sprintf(format, args...)}
}

func (w *Worker) refuse(j *wire.Job, r refusal) {
	w.cfg.Log.Warn("job refused", journal.JobRefused.Attr(), "job", j.ID, "code", r.code, "reason", r.message)
	w.send(&wire.Refuse{Job: j.ID, Code: r.code, Message: r.message})
}

// admitLocked checks a job against all that can be known at once, and takes a
// slot for it. That is not its request's content, which parse reads, and not the
// disk.
func (w *Worker) admitLocked(j *wire.Job) *refusal {
	if w.stopping || w.paused || w.held {
		return refuse(wire.CodeDraining, "this node takes no new jobs")
	}
	if w.active == nil {
		return refuse(wire.CodeNotReady, "this node has no active deployment")
	}
	if w.active.suspect() {
		return refuse(wire.CodeNotReady, "this node's engine has failed job after job")
	}
	if r := admit(w.active.Snapshot, j, w.cfg.Now()); r != nil {
		return r
	}
	if slots := w.active.slots(); !w.cfg.Slots.take(w, slots, w.cfg.Now()) {
		return refuse(wire.CodeBusy, "all %d slots are busy, or kept for another network", slots)
	}
	return nil
}

// admit checks a job against the terms of a snapshot.
func admit(s *snapshot.Snapshot, j *wire.Job, now time.Time) *refusal {
	c := s.Config()
	left := time.UnixMilli(j.Deadline).Sub(now)
	// The network's clock may be ahead of ours, by no more than the window.
	most := c.Limits.Deadline.Duration() + c.Network.ClockWindow.Duration()
	switch {
	case j.Config != s.Digest():
		return refuse(wire.CodeConfig, "the job is for configuration %s, this node is on %s", j.Config, s.Digest())
	case j.Model != c.Runtime.Model:
		return refuse(wire.CodeUnknownModel, "this node serves %s", c.Runtime.Model)
	case j.Kind != wire.KindChat && j.Kind != wire.KindCompletion:
		return refuse(wire.CodeBadRequest, "unknown kind of job %.40q", j.Kind)
	case int64(len(j.Request)) > c.Limits.RequestBytes:
		return refuse(wire.CodeLimit, "the request has %d bytes, at most %d", len(j.Request), c.Limits.RequestBytes)
	case left <= 0:
		return refuse(wire.CodeDeadline, "the deadline has passed")
	case left > most:
		return refuse(wire.CodeLimit, "the deadline is %v away, at most %v", left.Round(time.Second), c.Limits.Deadline.Duration())
	}
	return nil
}

// parse reads the request, and checks that the job says the same.
func parse(c *snapshot.Config, j *wire.Job) (*openai.Request, *refusal) {
	l := &c.Limits
	req, err := openai.Parse(j.Kind, j.Request, openai.Limits{RequestBytes: l.RequestBytes, Tokens: l.Tokens, Messages: l.Messages})
	var bad *openai.Error
	switch {
	case errors.As(err, &bad):
		return nil, refuse(requestCode(bad), "%s", bad.Message)
	case err != nil:
		return nil, refuse(wire.CodeBadRequest, "%v", err)
	case req.Stream != j.Stream:
		return nil, refuse(wire.CodeBadRequest, "the job and its request differ about streaming")
	case req.Model != j.Model:
		// The receipt binds the request's bytes to the model that answered.
		return nil, refuse(wire.CodeBadRequest, "the job and its request differ about the model")
	}
	return req, nil
}

// requestCode tells a request over a limit of the snapshot from one that is
// wrong in itself.
func requestCode(e *openai.Error) wire.Code {
	switch e.Code {
	case "request_too_large", "integer_above_max_value", "array_above_max_length":
		return wire.CodeLimit
	}
	return wire.CodeBadRequest
}
