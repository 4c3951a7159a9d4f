package network

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"time"

	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/evm"
	"github.com/resultity/node/internal/journal"
	"github.com/resultity/node/internal/network/dispatch"
	"github.com/resultity/node/internal/network/store"
	"github.com/resultity/node/internal/openai"
	"github.com/resultity/node/internal/receipt"
)

// Replay is what came of giving a job out again. It holds no text. The receipts
// show who has signed what: a dispute needs them, and whatever node is at fault
// cannot take its own back.
type Replay struct {
	Job    receipt.JobID `json:"job"`
	Replay receipt.JobID `json:"replay,omitzero"` // the id under which it was given out again
	At     time.Time     `json:"at"`
	Class  digest.Digest `json:"class"` // determinism class in which it was given out again: what the first node had named when it got the job
	openai.Comparison
	First  *receipt.Signed `json:"first"`
	Second *receipt.Signed `json:"second,omitempty"` // the last one that was asked; nil where nobody was

	// SameAccount says that both nodes belong to one account, since no other node of the
	// class was there, or the operator has named one: that they agree says less then.
	SameAccount bool      `json:"same_account,omitempty"`
	Findings    []Finding `json:"findings,omitempty"`
}

// Finding is what a replay has shown of a node beside the verdict.
type Finding struct {
	Node    evm.Address     `json:"node"`
	Text    string          `json:"finding"`
	Receipt *receipt.Signed `json:"receipt,omitempty"` // which shows it
}

// reason is what it says in one word of the journal's catalog.
func (f *Finding) reason() openai.Cause {
	if f.Receipt != nil {
		return openai.OtherClass
	}
	return openai.Unanswered
}

// maxAsked is how many nodes are asked, one after the other, for an answer that can be
// compared.
const maxAsked = 3

// ReplayQuery says how a job is to be given out again.
type ReplayQuery struct {
	Node    *evm.Address `json:"node,omitempty"`    // of the class, also the first one; nil for another one than the first
	Request []byte       `json:"request,omitempty"` // the client's, where the network has not kept it
}

// maxReplayQuery bounds it as JSON, in bytes.
const maxReplayQuery = 32 << 20

// replay gives a finished job out again and compares the answers.
func (s *service) replay(ctx context.Context, id receipt.JobID, q ReplayQuery) (*Replay, error) {
	first, err := s.store.Result(ctx, id)
	if errors.Is(err, store.ErrNotFound) {
		return nil, refuseReplay(noResult, "job %s has no result here: it is not finished, has failed, or its result is older than this network keeps them", id)
	}
	if err != nil {
		return nil, err
	}
	v := &Replay{Job: id, At: time.Now().UTC(), Class: classOf(first), First: first.Receipt}
	if rc := first.Receipt.Receipt(); !first.Said.IsZero() && first.Said != rc.Claimed.ClassDigest {
		v.find(first.Receipt, first.Said)
	}
	was, err := claimed(first)
	if err != nil {
		v.Comparison = openai.Incomparable(openai.NoAnswer, "the first response is %v", err)
		return s.replayed(v), nil
	}
	r, err := s.requestOf(ctx, first, q.Request)
	if err != nil {
		return nil, err
	}
	r.Class, r.Node = v.Class, q.Node
	if n, err := s.store.Node(ctx, r.First); err == nil {
		r.Account = n.Account
	} else if !errors.Is(err, store.ErrNotFound) {
		return nil, err
	}
	if why := s.incomparable(r, first.Receipt, was); why != nil {
		v.Comparison = *why
		return s.replayed(v), nil
	}
	if err := s.askAgain(ctx, v, r, was); err != nil {
		return nil, err
	}
	ctx = context.WithoutCancel(ctx) // it is done; now it is written down
	raw, err := json.Marshal(v)
	if err == nil {
		err = s.store.PutReplay(ctx, id, raw)
	}
	return s.replayed(v), err
}

// askAgain gives r to a node, and to another one, and a third, as long as what comes
// cannot be compared: a node that is at fault must not be able to end it by that. One
// that the operator has named is the only one.
func (s *service) askAgain(ctx context.Context, v *Replay, r *dispatch.Replay, was *openai.Answer) error {
	var failed error
	for len(r.Asked) < maxAsked && (r.Node == nil || len(r.Asked) == 0) {
		t, to, err := s.dispatch.SubmitReplay(*r)
		if err != nil {
			if failed == nil {
				failed = refuseReplay(noNode, "%w", err)
			}
			break
		}
		r.Asked = append(r.Asked, to.Node)
		s.log.Info("job given out again", "job", v.Job, "replay", t.ID(), "node", to.Node)
		if _, err := t.Wait(ctx); err != nil {
			t.Cancel()
			f, ok := dispatch.AsFailure(err)
			if !ok {
				return err
			}
			failed = refuseReplay(unanswered, "node %s did not answer: %w (%s)", to.Node, err, f.Outcome)
			v.Findings = append(v.Findings, Finding{Node: to.Node, Text: fmt.Sprintf("did not answer as job %s (%s)", t.ID(), f.Outcome)})
			continue
		}
		second, err := s.store.Result(context.WithoutCancel(ctx), t.ID())
		if err != nil {
			return err
		}
		v.Replay, v.Second = t.ID(), second.Receipt
		v.SameAccount = to.Node != r.First && r.Account != "" && to.Account == r.Account
		if signed := second.Receipt.Receipt().Claimed.ClassDigest; signed != v.Class {
			v.find(second.Receipt, v.Class)
			v.Comparison = openai.Incomparable(openai.OtherClass, "node %s has answered in another class than it said before, %s", to.Node, signed)
			continue
		}
		v.Comparison = compare(was, second)
		return nil
	}
	switch {
	case v.Second != nil: // which cannot be compared
	case len(v.Findings) > 0 && v.Findings[0].Receipt != nil: // the first node's word is on record, whoever answers
		v.Comparison = openai.Incomparable(openai.Unanswered, "%v", failed)
	default:
		return failed
	}
	return nil
}

// find notes that a node has signed for another class than it had named before.
func (v *Replay) find(signed *receipt.Signed, said digest.Digest) {
	rc := signed.Receipt()
	v.Findings = append(v.Findings, Finding{Node: rc.Node, Receipt: signed,
		Text: fmt.Sprintf("signed for class %s as job %s, and had named %s when it was given the job", className(rc.Claimed.ClassDigest), rc.Job, className(said))})
}

func className(d digest.Digest) string {
	if d == receipt.Unknown {
		return "none"
	}
	return d.String()
}

// classOf is the class by which a result is judged: the one for which the node was
// given the job, also where it has signed for another.
func classOf(r *store.Result) digest.Digest {
	if r.Said.IsZero() || r.Said == receipt.Unknown {
		return r.Receipt.Receipt().Claimed.ClassDigest
	}
	return r.Said
}

// claimed reads a stored response, with the token counts of its receipt: those are
// what a node is paid for.
func claimed(r *store.Result) (*openai.Answer, error) {
	a, err := openai.ReadAnswer(r.Response)
	if err == nil {
		c := r.Receipt.Receipt().Claimed
		a.Usage = &openai.Usage{PromptTokens: c.PromptTokens, CompletionTokens: c.CompletionTokens}
	}
	return a, err
}

// requestOf finds the request of a result: what was kept, or what the operator has
// from the client. The receipt says whether it is the right one.
func (s *service) requestOf(ctx context.Context, first *store.Result, given []byte) (*dispatch.Replay, error) {
	rc := first.Receipt.Receipt()
	r := &dispatch.Replay{Request: given, First: rc.Node}
	kept, err := s.store.Request(ctx, rc.Job)
	switch {
	case err == nil:
		r.Request, r.Seed = kept.Request, &kept.Seed
	case !errors.Is(err, store.ErrNotFound):
		return nil, err
	case given == nil:
		return nil, refuseReplay(notKept, "the request of job %s is not kept: keep_requests_bytes of network.toml is %d; with --request FILE the client's can be given out", rc.Job, s.cfg.KeepRequestsBytes)
	}
	if given != nil && !bytes.Equal(given, r.Request) || digest.Of(r.Request) != rc.Measured.RequestHash {
		return nil, refuseReplay(otherRequest, "this is not the request of job %s: its SHA-256 is not the one in the receipt, %s; it has to be the body of the HTTP request, byte for byte", rc.Job, rc.Measured.RequestHash)
	}
	return r, nil
}

// incomparable completes r, or says why another answer than the first could be
// right.
func (s *service) incomparable(r *dispatch.Replay, first *receipt.Signed, was *openai.Answer) *openai.Comparison {
	t, rc := s.dispatch.Terms(), first.Receipt()
	c := t.Config
	no := func(cause openai.Cause, format string, args ...any) *openai.Comparison {
		return new(openai.Incomparable(cause, format, args...))
	}
	switch {
	case r.Class.IsZero() || r.Class == receipt.Unknown:
		return no(openai.NoClass, "the first node could not say in which class it was")
	case was.Model != c.Runtime.Model || rc.Measured.ModelDigest != t.Model:
		return no(openai.OtherModel, "the first answer is by model %.80q of %s, and the network serves %q of %s now", was.Model, rc.Measured.ModelDigest, c.Runtime.Model, t.Model)
	case rc.Measured.ImageDigest != c.Runtime.Image.Digest():
		return no(openai.OtherImage, "the image of the runtime was %s then, and is %s now", rc.Measured.ImageDigest, c.Runtime.Image.Digest())
	}
	req, err := openai.Parse(was.Kind, r.Request, openai.Limits{RequestBytes: c.Limits.RequestBytes, Tokens: c.Limits.Tokens, Messages: c.Limits.Messages})
	if err != nil {
		return no(openai.OverLimits, "the request is not within the limits of the configuration that is published now")
	}
	r.Kind, r.Model, r.Stream = req.Kind, req.Model, req.Stream
	return req.Incomparable(was, openai.Conditions{Seed: r.Seed != nil, Limits: rc.Measured.ConfigDigest == t.Digest, Tokens: c.Limits.Tokens})
}

// compare holds a second result of the same class against the first.
func compare(was *openai.Answer, second *store.Result) openai.Comparison {
	is, err := claimed(second)
	if err != nil { // an honest node signs no such thing
		return openai.Comparison{Verdict: openai.Different, Reason: "the second response is " + err.Error()}
	}
	return openai.Compare(was, is)
}

// Why a job is not given out again, in the words of the journal's catalog.
const (
	malformed    = "malformed"
	noResult     = "no_result"
	notKept      = "not_kept"
	otherRequest = "request"
	noNode       = "no_node"
	unanswered   = "unanswered"
	failedReplay = "failed" // the store, as a rule; or who has asked has gone
)

// replayRefusal is an error with one of these words.
type replayRefusal struct {
	reason string
	error
}

func (r *replayRefusal) Unwrap() error { return r.error }

func refuseReplay(reason, format string, args ...any) error {
	return &replayRefusal{reason, fmt.Errorf(format, args...)}
}

// notReplayed logs why a job was not given out again.
func (s *service) notReplayed(id receipt.JobID, err error) {
	reason := failedReplay
	if r, ok := errors.AsType[*replayRefusal](err); ok {
		reason = r.reason
	}
	s.log.Warn("job not given out again", journal.NetworkReplayRefused.Attr(), "job", id, "reason", reason, "error", err)
}

// replayed says what came of it.
func (s *service) replayed(v *Replay) *Replay {
	s.metrics.Replays.WithLabelValues(string(v.Verdict)).Inc()
	for _, f := range v.Findings {
		event := journal.ReplayUndecided
		if f.Receipt != nil {
			event = journal.NodeClassContradicted
		}
		s.log.Warn("finding of a replay", event.Attr(), "job", v.Job, "node", f.Node, "reason", f.reason(), "finding", f.Text)
	}
	attrs := []any{"job", v.Job, "verdict", v.Verdict, "class", v.Class, "first", v.First.Receipt().Node, "same_account", v.SameAccount}
	if v.Second == nil {
		s.log.Info("job cannot be compared", append(attrs, journal.ReplayUndecided.Attr(), "reason", v.Cause, "why", v.Reason)...)
		return v
	}
	attrs = append(attrs, "second", v.Second.Receipt().Node, "replay", v.Replay)
	switch v.Verdict {
	case openai.Same:
		s.log.Info("two nodes give one answer", attrs...)
	case openai.Different:
		s.log.Warn("two nodes give different answers", append(attrs, journal.AnswersDiffer.Attr(), "difference", v.Difference, "why", v.Reason)...)
	default:
		s.log.Warn("two answers cannot be compared", append(attrs, journal.ReplayUndecided.Attr(), "reason", v.Cause, "why", v.Reason)...)
	}
	return v
}

func (s *service) adminReplays(mux *http.ServeMux, handle func(string, func(*http.Request) (adminReply, error))) {
	// It has a larger body than the others.
	mux.HandleFunc("POST /jobs/{id}/replay", func(w http.ResponseWriter, r *http.Request) {
		var reply adminReply
		id, err := receipt.ParseJobID(r.PathValue("id"))
		var q ReplayQuery
		if err == nil {
			err = decode(http.MaxBytesReader(w, r.Body, maxReplayQuery), &q)
		}
		if err != nil {
			err = refuseReplay(malformed, "%w", err)
		} else {
			reply.Replay, err = s.replay(r.Context(), id, q)
		}
		if err != nil {
			s.notReplayed(id, err)
		}
		answer(w, reply, err)
	})
	handle("GET /replays", func(r *http.Request) (reply adminReply, err error) {
		reply.Replays, err = storeAdmin{s.store}.Replays(r.Context())
		return reply, err
	})
}

// Replay gives a finished job out again and compares the answers.
func (c *adminClient) Replay(ctx context.Context, id receipt.JobID, q ReplayQuery) (*Replay, error) {
	patient := adminClient{c.http}
	patient.http.Timeout = 0 // as long as the job may take
	r, err := patient.call(ctx, http.MethodPost, "/jobs/"+id.String()+"/replay", q)
	return r.Replay, err
}

// Replays returns what came of replays, in the order of their ends.
func (c *adminClient) Replays(ctx context.Context) ([]Replay, error) {
	r, err := c.call(ctx, http.MethodGet, "/replays", struct{}{})
	return r.Replays, err
}

func (a storeAdmin) Replay(context.Context, receipt.JobID, ReplayQuery) (*Replay, error) {
	return nil, fmt.Errorf("%w: jobs are given out by the running service; start it (resultity-network serve)", ErrConfig)
}

func (a storeAdmin) Replays(ctx context.Context) ([]Replay, error) {
	list := []Replay{}
	err := a.store.Replays(ctx, func(raw []byte) error {
		var v Replay
		if err := json.Unmarshal(raw, &v); err != nil {
			return fmt.Errorf("stored replay: %w", err)
		}
		list = append(list, v)
		return nil
	})
	return list, err
}
