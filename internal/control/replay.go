package control

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"sync"
	"time"

	"github.com/resultity/node/internal/openai"
)

// ReplayRequest asks for a request to be run again: that of a job which is kept,
// or one that a client hands over, with the response and the receipt that it got.
type ReplayRequest struct {
	Network  string `json:"network,omitempty"` // the only one that is looked at; "" for all
	Job      string `json:"job,omitempty"`
	Request  []byte `json:"request,omitempty"`
	Response []byte `json:"response,omitempty"`
	Receipt  []byte `json:"receipt,omitempty"`
	Show     bool   `json:"show,omitempty"`    // the answer may hold text of the answers
	TimeoutS int    `json:"timeout,omitempty"` // seconds that it may take, waiting for a slot included; 0 for five minutes
}

// Replay is what came of it.
type Replay struct {
	Job     string `json:"job"`
	Network string `json:"network"`
	Model   string `json:"model"`
	openai.Comparison
	// Of the new answer; 0 where there is none.
	PromptTokens     uint64 `json:"prompt_tokens"`
	CompletionTokens uint64 `json:"completion_tokens"`
	TookMS           int64  `json:"took_ms"`
	// Was and Is are what both answers say where they part; only where that was
	// asked for.
	Was string `json:"was_text,omitempty"`
	Is  string `json:"is_text,omitempty"`
}

// MaxReplayTime is how long a replay may take at most: no job may take longer.
const MaxReplayTime = 24 * time.Hour

const (
	replayPath    = "/v1/replay"
	replayTime    = 5 * time.Minute
	maxReplay     = 48 << 20 // bytes; two bodies of 16 MiB in base64, and a receipt
	replayArrives = 30 * time.Second
	replayBeyond  = 10 * time.Second
)

// Timeout is how long the replay may take.
func (q *ReplayRequest) Timeout() time.Duration {
	if q.TimeoutS <= 0 {
		return replayTime
	}
	return min(time.Duration(min(q.TimeoutS, 1<<20))*time.Second, MaxReplayTime)
}

// ReplayCode says why a request was not run again, in one of a few words: what was
// wrong with it may not stand in a log that leaves the machine.
type ReplayCode string

// The codes. Each is explained in the journal's catalog, at journal.ReplayRefused.
const (
	ReplayBusy      ReplayCode = "busy"       // another one runs
	ReplayMalformed ReplayCode = "malformed"  // what was asked cannot be read
	ReplayNetwork   ReplayCode = "network"    // the node is not in that network
	ReplayNotKept   ReplayCode = "not_kept"   // the job's request is not on the disk
	ReplayRunning   ReplayCode = "running"    // the job has not ended
	ReplayReceipt   ReplayCode = "receipt"    // what was handed over is no receipt
	ReplayRequested ReplayCode = "request"    // it is not the one of the receipt
	ReplayResponse  ReplayCode = "response"   // it is not the one of the receipt, or no answer
	ReplayChain     ReplayCode = "chain"      // no network of the receipt's chain has a runtime
	ReplayNoRuntime ReplayCode = "no_runtime" // nothing serves, or no longer
	ReplayTimeout   ReplayCode = "timeout"    // it took too long
	ReplayCancelled ReplayCode = "cancelled"  // who has asked has gone, or the agent ends
	ReplayStorage   ReplayCode = "storage"    // what is kept cannot be read
	ReplayEngine    ReplayCode = "engine"     // it has failed
)

// ReplayCodes lists them.
var ReplayCodes = []ReplayCode{
	ReplayBusy, ReplayMalformed, ReplayNetwork, ReplayNotKept, ReplayRunning, ReplayReceipt, ReplayRequested,
	ReplayResponse, ReplayChain, ReplayNoRuntime, ReplayTimeout, ReplayCancelled, ReplayStorage, ReplayEngine,
}

// A ReplayRefusal says why a request was not run again, to the log and to who has asked.
type ReplayRefusal struct {
	Code ReplayCode
	Err  error
}

func (r *ReplayRefusal) Error() string { return r.Err.Error() }
func (r *ReplayRefusal) Unwrap() error { return r.Err }

// RefuseReplay makes a refusal that wraps [ErrRefused].
func RefuseReplay(code ReplayCode, format string, args ...any) *ReplayRefusal {
	return &ReplayRefusal{code, fmt.Errorf("%w: %w", ErrRefused, fmt.Errorf(format, args...))}
}

// serveReplay adds the replay to mux: one at a time, which bounds memory, too.
// Whoever hangs up ends it.
func serveReplay(mux *http.ServeMux, b Backend) {
	var running sync.Mutex
	refuse := func(w http.ResponseWriter, r *ReplayRefusal) {
		b.NotReplayed(r)
		reply(w, nil, r)
	}
	mux.HandleFunc("POST "+replayPath, func(w http.ResponseWriter, r *http.Request) {
		if !running.TryLock() {
			refuse(w, RefuseReplay(ReplayBusy, "another replay runs; wait until it is done"))
			return
		}
		defer running.Unlock()
		// These fail on a closed connection only.
		c := http.NewResponseController(w)
		_ = c.SetReadDeadline(time.Now().Add(replayArrives))
		var q ReplayRequest
		dec := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxReplay))
		dec.DisallowUnknownFields()
		if err := dec.Decode(&q); err != nil {
			refuse(w, RefuseReplay(ReplayMalformed, "%w", err))
			return
		}
		// They fail on a closed connection only, and then so does the answer.
		_ = c.SetReadDeadline(time.Time{})
		_ = c.SetWriteDeadline(time.Now().Add(q.Timeout() + replayBeyond))
		ctx, cancel := context.WithTimeoutCause(r.Context(), q.Timeout(), RefuseReplay(ReplayTimeout, "it was not done within %v: a replay waits until no job wants its slot; try again later, or with a longer --timeout", q.Timeout()))
		defer cancel()
		v, err := b.Replay(ctx, q)
		reply(w, v, err)
	})
}

// Replay has the agent run a request again, and returns what came of it.
func (c *Client) Replay(ctx context.Context, q ReplayRequest) (Replay, error) {
	var v Replay
	raw, err := json.Marshal(q)
	if err != nil {
		return v, err
	}
	if len(raw) > maxReplay {
		return v, fmt.Errorf("request and response are too large for a replay: %d bytes in all, at most %d", len(raw), maxReplay)
	}
	long := *c.http
	long.Timeout = q.Timeout() + replayArrives + 2*replayBeyond
	status, answer, err := (&Client{&long}).ask(ctx, http.MethodPost, replayPath[len("/v1/"):], bytes.NewReader(raw))
	if err != nil {
		return v, err
	}
	if status != http.StatusOK {
		return v, refusal(status, answer)
	}
	return v, json.Unmarshal(answer, &v)
}
