package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/resultity/node/internal/config"
	"github.com/resultity/node/internal/control"
	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/journal"
	"github.com/resultity/node/internal/openai"
	"github.com/resultity/node/internal/receipt"
	"github.com/resultity/node/internal/state"
	"github.com/resultity/node/internal/wire"
	"github.com/resultity/node/internal/work"
)

// This file runs a request again for the operator, on the deployment that jobs
// are let to, and compares the answers. The rules are:
//
//   - It is no job: no receipt comes of it, no job waits for it, and the network
//     hears of it in the log only.
//   - Only what can be the same is compared, and what cannot is said to be so.
//   - Text of a request or an answer goes to whoever asked for it, nowhere else.

// keptDir is below a membership's directory.
const keptDir = "replay"

// openKept opens what is kept of jobs for the operator. Nothing rests on it: the
// node goes on without.
func (m *membership) openKept() {
	k, err := state.OpenKept(filepath.Join(m.dir, keptDir), m.keepN)
	if err != nil {
		m.log.Error("jobs are not kept for replay, or those of before could not be removed", journal.StorageFailed.Attr(), "error", err)
		return
	}
	m.kept = k
}

// forgetKept removes what was kept of jobs of networks that the node has left, and where
// none are to be kept any more that of all, also of one that cannot be opened now.
func (a *Agent) forgetKept() {
	dir := filepath.Join(a.cfg.Paths.State, "networks")
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return
	}
	for _, e := range entries {
		if a.cfg.Replay.Keep == 0 || !slices.ContainsFunc(a.cfg.Networks, func(n config.Network) bool { return n.Name == e.Name() }) {
			err = errors.Join(err, os.RemoveAll(filepath.Join(dir, e.Name(), keptDir)))
		}
	}
	if err != nil {
		a.log.Error("jobs kept for replay before could not be removed", journal.StorageFailed.Attr(), "error", err)
	}
}

// keepJob keeps a job and its answer.
func (m *membership) keepJob(j *wire.Job, r *wire.Result) {
	err := m.kept.Put(j, r)
	if before := m.unkept.Swap(err != nil); err != nil && !before {
		m.log.Warn("jobs are not kept for replay", journal.StorageFailed.Attr(), "error", err)
	}
}

// past is an answer that was given, and what it was given to.
type past struct {
	job      *wire.Job
	seeded   bool // job.Seed is what it was given with, where the request has none
	response []byte
	receipt  receipt.Receipt
	chain    uint64
}

// Replay implements [control.Backend].
func (a *Agent) Replay(ctx context.Context, q control.ReplayRequest) (v control.Replay, err error) {
	m, p, err := a.past(&q)
	if err == nil {
		v, err = m.replay(ctx, p, q.Show)
	}
	if err != nil {
		log := a.log
		if m != nil {
			log = m.log
		}
		if p != nil {
			log = log.With("job", p.job.ID)
		}
		sayNotReplayed(log, err)
	}
	return v, err
}

// NotReplayed implements [control.Backend].
func (a *Agent) NotReplayed(r *control.ReplayRefusal) { sayNotReplayed(a.log, r) }

// sayNotReplayed logs by its code why a request was not run again. The error may have
// words of whoever made what was handed over.
func sayNotReplayed(log *slog.Logger, err error) {
	code := control.ReplayEngine // which alone fails with errors of its own
	if r, ok := errors.AsType[*control.ReplayRefusal](err); ok {
		code = r.Code
	}
	log.Warn("request not run again", journal.ReplayRefused.Attr(), "code", code)
}

// past finds what is to be run again, and the network in which. With an error, p is
// there where the job's id is known.
func (a *Agent) past(q *control.ReplayRequest) (m *membership, p *past, err error) {
	members := slices.DeleteFunc(slices.Clone(a.members), func(m *membership) bool { return q.Network != "" && q.Network != m.net.Name })
	if len(members) == 0 {
		return nil, nil, control.RefuseReplay(control.ReplayNetwork, "this node is not in network %.80q", q.Network)
	}
	if q.Job != "" {
		id, err := receipt.ParseJobID(q.Job)
		if err != nil {
			return nil, nil, control.RefuseReplay(control.ReplayMalformed, "%w", err)
		}
		return recollect(members, id)
	}
	if p, err = handedOver(q); err != nil {
		return nil, p, err
	}
	for _, m := range members {
		if now := m.worker.Active(); now != nil && now.Snapshot.Config().Network.ChainID == p.chain {
			return m, p, nil
		}
	}
	return nil, p, control.RefuseReplay(control.ReplayChain, "the receipt is of chain %d, and no network of that chain has a runtime here now; resultityctl status says why", p.chain)
}

// recollect finds a job that is kept.
func recollect(members []*membership, id receipt.JobID) (*membership, *past, error) {
	unknown := &past{job: &wire.Job{ID: id}}
	for _, m := range members {
		j, r, err := m.kept.Get(id)
		switch {
		case errors.Is(err, state.ErrNotKept) && !errors.Is(err, state.ErrKeptDamaged):
			if known, err := m.store.Lookup(id); err == nil && known == state.Running {
				return m, unknown, control.RefuseReplay(control.ReplayRunning, "job %s is still running", id)
			}
			continue
		case err != nil:
			return m, unknown, &control.ReplayRefusal{Code: control.ReplayStorage, Err: err}
		}
		return m, &past{job: j, seeded: true, response: r.Response, receipt: r.Receipt.Receipt(), chain: r.Receipt.ChainID()}, nil
	}
	return nil, unknown, control.RefuseReplay(control.ReplayNotKept, "job %s is not kept: a node forgets a request once it has answered it, but for the last ones where replay.keep of agent.toml is not 0 (it is %d); who has the request, the response and the receipt can give all three as files", id, members[0].keepN)
}

// handedOver checks that a request, a response and a receipt belong together. With an
// error, it returns what has a receipt all the same.
func handedOver(q *control.ReplayRequest) (*past, error) {
	signed, err := receipt.Verify(q.Receipt)
	if err != nil {
		return nil, control.RefuseReplay(control.ReplayReceipt, "the receipt: %w", err)
	}
	r := signed.Receipt()
	p := &past{job: &wire.Job{ID: r.Job, Request: q.Request, Created: int64(r.Claimed.StartedAt / 1000)}, response: q.Response, receipt: r, chain: signed.ChainID()}
	switch {
	case digest.Of(q.Request) != r.Measured.RequestHash:
		return p, control.RefuseReplay(control.ReplayRequested, "the request is not the one that the receipt is about: its SHA-256 is another one; it has to be the body of the HTTP request, byte for byte")
	case digest.Of(q.Response) != r.Measured.ResponseHash:
		return p, control.RefuseReplay(control.ReplayResponse, "the response is not the one that the receipt is about: its SHA-256 is another one; it has to be the body of the HTTP response, byte for byte")
	}
	was, err := openai.ReadAnswer(q.Response)
	if err != nil {
		return p, control.RefuseReplay(control.ReplayResponse, "the response: %w", err)
	}
	p.job.Kind, p.job.Model = was.Kind, was.Model
	return p, nil
}

// replay runs a request again and compares the answers.
func (m *membership) replay(ctx context.Context, p *past, show bool) (control.Replay, error) {
	v := control.Replay{Job: p.job.ID.String(), Network: m.net.Name, Model: p.job.Model}
	now := m.worker.Active()
	if now == nil {
		return v, errNotServing
	}
	req, was, no := toCompare(now, p)
	if no != nil {
		v.Comparison = *no
		m.sayReplayed(&v, now)
		return v, nil
	}
	begin := time.Now()
	res, err := m.worker.Replay(ctx, now, p.job, req)
	v.TookMS = time.Since(begin).Milliseconds()
	switch {
	case errors.Is(context.Cause(ctx), context.Canceled): // nobody reads this
		return v, &control.ReplayRefusal{Code: control.ReplayCancelled, Err: context.Cause(ctx)}
	case ctx.Err() != nil:
		return v, context.Cause(ctx)
	case errors.Is(err, work.ErrNoRuntime):
		return v, errNotServing
	case err != nil:
		return v, err
	}
	is, err := openai.ReadAnswer(res.Body)
	if err != nil {
		return v, fmt.Errorf("the new answer: %w", err)
	}
	is.Usage = &res.Usage
	v.PromptTokens, v.CompletionTokens = res.Usage.PromptTokens, res.Usage.CompletionTokens
	v.Comparison = openai.Compare(was, is)
	if show {
		v.Was, v.Is = openai.Excerpts(was, is, v.Difference)
	}
	m.sayReplayed(&v, now)
	return v, nil
}

var errNotServing = control.RefuseReplay(control.ReplayNoRuntime, "%w; resultityctl status says why", work.ErrNoRuntime)

// toCompare reads what is to be compared, and says why it cannot be.
func toCompare(now *work.Active, p *past) (*openai.Request, *openai.Answer, *openai.Comparison) {
	c := now.Snapshot.Config()
	no := func(cause openai.Cause, format string, args ...any) (*openai.Request, *openai.Answer, *openai.Comparison) {
		return nil, nil, new(openai.Incomparable(cause, format, args...))
	}
	switch r := &p.receipt; {
	case p.job.Model != c.Runtime.Model:
		return no(openai.OtherModel, "it is by model %.80q, and this node serves %.80q now", p.job.Model, c.Runtime.Model)
	case r.Measured.ModelDigest != now.Model:
		return no(openai.OtherModel, "the model's files were others then: %s, now %s", r.Measured.ModelDigest, now.Model)
	case r.Measured.ImageDigest != now.Image:
		return no(openai.OtherImage, "the engine's image was another one then: %s, now %s", r.Measured.ImageDigest, now.Image)
	case now.Class.IsZero():
		return no(openai.NoClass, "it is not known what this machine computes on, so that it is in no class")
	case r.Claimed.ClassDigest != now.Class:
		return no(openai.OtherClass, "it is of class %s, and this node is in class %s now: other hardware or engine settings may rightly answer otherwise", r.Claimed.ClassDigest.Short(), now.Class.Short())
	}
	was, err := openai.ReadAnswer(p.response)
	if err != nil {
		return no(openai.NoAnswer, "the response is %v", err)
	}
	// What is paid for is what the receipt says.
	was.Usage = &openai.Usage{PromptTokens: p.receipt.Claimed.PromptTokens, CompletionTokens: p.receipt.Claimed.CompletionTokens}
	l := &c.Limits
	req, err := openai.Parse(p.job.Kind, p.job.Request, openai.Limits{RequestBytes: l.RequestBytes, Tokens: l.Tokens, Messages: l.Messages})
	if err != nil { // it was taken once
		return no(openai.OverLimits, "the request is not within the limits of the configuration that is active now")
	}
	return req, was, req.Incomparable(was, openai.Conditions{Seed: p.seeded, Limits: p.receipt.Measured.ConfigDigest == now.Snapshot.Digest(), Tokens: l.Tokens})
}

// sayReplayed logs what came of a replay, with neither the reason nor the model that
// the answer names: those may be words of whoever made the files that were handed over.
func (m *membership) sayReplayed(v *control.Replay, now *work.Active) {
	level := slog.LevelInfo
	if v.Verdict == openai.Different {
		level = slog.LevelWarn
	}
	attrs := []any{journal.JobReplayed.Attr(), "job", v.Job, "model", now.Snapshot.Config().Runtime.Model, "outcome", v.Verdict, "took", time.Duration(v.TookMS) * time.Millisecond}
	if v.Cause != "" {
		attrs = append(attrs, "code", v.Cause)
	}
	m.log.Log(context.Background(), level, "job run again", attrs...)
}
