package dispatch

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/evm"
	"github.com/resultity/node/internal/receipt"
	"github.com/resultity/node/internal/snapshot"
	"github.com/resultity/node/internal/wire"
)

// Terms are a published configuration as dispatch needs it. Immutable.
type Terms struct {
	Config    *snapshot.Config
	Digest    digest.Digest // of config.json
	Version   int64         // of the targets metadata
	Published time.Time
	Expires   time.Time     // when the network must have confirmed it again
	Model     digest.Digest // of the files of the model that is served
}

// NewTerms makes terms of a configuration that [snapshot.Parse] has checked.
func NewTerms(c *snapshot.Config, d digest.Digest, version int64, published, expires time.Time) (*Terms, error) {
	t := &Terms{Config: c, Digest: d, Version: version, Published: published, Expires: expires}
	for i := range c.Models {
		if c.Models[i].Name == c.Runtime.Model {
			t.Model = c.Models[i].Digest()
			return t, nil
		}
	}
	return nil, fmt.Errorf("configuration %s serves model %q and does not list it", d, c.Runtime.Model)
}

// ErrInvalid says that a node sent what the protocol does not allow. It ends the
// session.
var ErrInvalid = errors.New("protocol violation")

// claim is what a result is held against.
type claim struct {
	job   *wire.Job
	hash  digest.Digest // of job.Request
	terms *Terms        // of the configuration that the receipt names, nil when the job was never given out under it
	node  evm.Address   // whose session it came through
	now   time.Time
}

// check tells whether a result is the valid result of its job. The receipt's
// own signature has been checked by its decoder.
func (c *claim) check(r *wire.Result) error {
	if r.Receipt == nil {
		return fmt.Errorf("%w: no receipt", ErrInvalid)
	}
	rc := r.Receipt.Receipt()
	bad := func(format string, args ...any) error {
		return fmt.Errorf("%w: %s", ErrInvalid, fmt.Sprintf(format, args...))
	}
	if rc.Node != c.node {
		return bad("receipt is by node %s", rc.Node)
	}
	if rc.Job != c.job.ID {
		return bad("receipt is about job %s", rc.Job)
	}
	if c.terms == nil {
		return bad("receipt names configuration %s, under which the job was never given out", rc.Measured.ConfigDigest)
	}
	cfg := c.terms.Config
	window := cfg.Network.ClockWindow.Duration()
	started, finished := time.UnixMilli(clamp(rc.Claimed.StartedAt)), time.UnixMilli(clamp(rc.Claimed.FinishedAt))
	switch {
	case r.Receipt.ChainID() != cfg.Network.ChainID:
		return bad("receipt is for chain %d, want %d", r.Receipt.ChainID(), cfg.Network.ChainID)
	case rc.Measured.ImageDigest != cfg.Runtime.Image.Digest():
		return bad("receipt names image %s, want %s", rc.Measured.ImageDigest, cfg.Runtime.Image.Digest())
	case rc.Measured.ModelDigest != c.terms.Model:
		return bad("receipt names model %s, want %s", rc.Measured.ModelDigest, c.terms.Model)
	case rc.Measured.RequestHash != c.hash:
		return bad("request hash is %s, want %s", rc.Measured.RequestHash, c.hash)
	case rc.Claimed.CompletionTokens > uint64(cfg.Limits.Tokens):
		return bad("%d completion tokens, at most %d", rc.Claimed.CompletionTokens, cfg.Limits.Tokens)
	case rc.Claimed.PromptTokens > uint64(cfg.Runtime.Settings.Context):
		return bad("%d prompt tokens, the context has %d", rc.Claimed.PromptTokens, cfg.Runtime.Settings.Context)
	case rc.Sequence == 0:
		return bad("it has no sequence")
	case finished.Before(started):
		return bad("it finished before it started")
	case started.Before(time.Unix(c.job.Created, 0).Add(-window)), finished.After(c.now.Add(window)):
		return bad("its times lie outside the job's")
	case int64(len(r.Response)) > cfg.Limits.ResponseBytes:
		return bad("response of %d bytes, at most %d", len(r.Response), cfg.Limits.ResponseBytes)
	}
	if got := digest.Of(r.Response); rc.Measured.ResponseHash != got {
		return bad("response hash is %s, the response has %s", rc.Measured.ResponseHash, got)
	}
	return c.shape(r.Response)
}

// shape refuses a response that no client could read.
func (c *claim) shape(response []byte) error {
	if c.job.Stream {
		if !bytes.HasSuffix(response, []byte(endMark)) {
			return fmt.Errorf("%w: the stream has no end mark", ErrInvalid)
		}
		return nil
	}
	var v struct {
		ID    string `json:"id"`
		Model string `json:"model"`
	}
	if err := json.Unmarshal(response, &v); err != nil {
		return fmt.Errorf("%w: the response is not a JSON object", ErrInvalid) // the decoder's text could quote the response
	}
	if want := ResponseID(c.job.Kind, c.job.ID); v.ID != want || v.Model != c.job.Model {
		return fmt.Errorf("%w: the response has another id or model than the job", ErrInvalid)
	}
	return nil
}

// ResponseID is the id that a response of the job carries.
func ResponseID(k wire.Kind, id receipt.JobID) string {
	if k == wire.KindChat {
		return "chatcmpl-" + id.String()
	}
	return "cmpl-" + id.String()
}

// clamp keeps a node's number within what time can hold.
func clamp(ms uint64) int64 { return int64(min(ms, 1<<53)) }
