package control

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"sync"
	"time"

	"github.com/resultity/node/internal/gate"
)

// Result is what came of a check. What did not run never says [Pass].
type Result string

// The results.
const (
	Pass        Result = "PASS"
	Fail        Result = "FAIL"
	NotMeasured Result = "NOT MEASURED"
)

// Names of the live probes, in their order; they follow the gates.
const (
	ProbeUnsignedAgent  = "unsigned-agent"  // the agent refuses an image that nobody has signed
	ProbeUnsignedPodman = "unsigned-podman" // and so does Podman's policy
	ProbeSocketOut      = "socket-out"      // no socket leads out of the container
	ProbeOneToken       = "one-token"       // the engine produces a token
	ProbeKey            = "key-isolated"    // the agent cannot read the node's key
)

// Probes lists the live probes in order.
var Probes = []string{ProbeUnsignedAgent, ProbeUnsignedPodman, ProbeSocketOut, ProbeOneToken, ProbeKey}

// Check is one thing that doctor looked at. The JSON is part of `resultityctl
// doctor --json`: fields are added, never changed.
type Check struct {
	Name    string `json:"name"`
	Network string `json:"network,omitempty"` // that a gate is of; empty for the machine
	Result  Result `json:"result"`
	Detail  string `json:"detail"`
	Remedy  string `json:"remedy,omitempty"`
	MS      int64  `json:"ms,omitempty"` // one-token: until the first token came
}

// Report is doctor's answer: the gates in their order, then the probes.
type Report struct {
	Version string    `json:"version"` // of the agent; "" when none runs
	At      time.Time `json:"at"`
	Checks  []Check   `json:"checks"`
}

// Failed reports whether a check has failed.
func (r *Report) Failed() bool {
	for _, c := range r.Checks {
		if c.Result == Fail {
			return true
		}
	}
	return false
}

// ChecksOf makes checks of gates.
func ChecksOf(gs []gate.Gate) []Check {
	results := map[gate.State]Result{gate.Open: Pass, gate.Closed: Fail, gate.Unknown: NotMeasured}
	cs := []Check{}
	for _, g := range gs {
		cs = append(cs, Check{Name: g.Name, Network: g.Network, Result: results[g.State], Detail: g.Detail, Remedy: g.Remedy})
	}
	return cs
}

// NothingMeasured is what the probes say when none could run.
func NothingMeasured(why string) []Check {
	var cs []Check
	for _, p := range Probes {
		cs = append(cs, Check{Name: p, Result: NotMeasured, Detail: why})
	}
	return cs
}

// ErrBusy says that doctor runs already, or that an archive is being made.
var ErrBusy = errors.New("doctor runs already, or an archive is being made; wait until it is done")

// doctorTime bounds doctor and the making of an archive, from outside. The agent
// ends both earlier.
const (
	doctorTime = 2 * time.Minute
	maxReport  = 4 << 20  // bytes
	maxBundle  = 32 << 20 // bytes; what is in one has 16 MiB
)

// patient gives a request that takes time more than the others have.
func patient(w http.ResponseWriter) error {
	c, until := http.NewResponseController(w), time.Now().Add(doctorTime)
	return errors.Join(c.SetReadDeadline(until), c.SetWriteDeadline(until))
}

// serveDoctor adds what takes time to mux. Whoever hangs up ends it.
func serveDoctor(mux *http.ServeMux, b Backend) {
	mux.HandleFunc("POST /v1/doctor", func(w http.ResponseWriter, r *http.Request) {
		if err := patient(w); err != nil {
			reply(w, nil, err)
			return
		}
		report, err := b.Doctor(r.Context())
		if errors.Is(err, ErrBusy) {
			http.Error(w, err.Error(), http.StatusConflict)
			return
		}
		reply(w, report, err)
	})
	var archives sync.Mutex // one at a time bounds memory
	mux.HandleFunc("POST /v1/bundle", func(w http.ResponseWriter, r *http.Request) {
		if !archives.TryLock() {
			http.Error(w, ErrBusy.Error(), http.StatusConflict)
			return
		}
		defer archives.Unlock()
		if err := patient(w); err != nil {
			reply(w, nil, err)
			return
		}
		archive, err := b.Bundle(r.Context())
		if err != nil {
			reply(w, nil, err)
			return
		}
		w.Header().Set("Content-Type", "application/gzip")
		_, _ = w.Write(archive) // the peer has gone: nobody to tell
	})
}

// Doctor has the agent look at its gates and probe; [ErrBusy] if it does
// already.
func (c *Client) Doctor(ctx context.Context) (*Report, error) {
	raw, err := c.order(ctx, "doctor", maxReport)
	if err != nil {
		return nil, err
	}
	r := new(Report)
	return r, json.Unmarshal(raw, r)
}

// Bundle has the agent make a support archive, tar.gz, with the last report of
// doctor in it.
func (c *Client) Bundle(ctx context.Context) ([]byte, error) {
	return c.order(ctx, "bundle", maxBundle)
}

func (c *Client) order(ctx context.Context, what string, most int64) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, doctorTime)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://agent/v1/"+what, nil)
	if err != nil {
		return nil, err
	}
	long := *c.http
	long.Timeout = 0 // ctx has one
	res, err := long.Do(req)
	if err != nil {
		return nil, unanswered(err)
	}
	defer res.Body.Close() // read only: nothing to lose
	raw, err := readAnswer(res, most)
	switch {
	case err != nil:
		return nil, err
	case res.StatusCode == http.StatusConflict:
		return nil, ErrBusy
	case res.StatusCode != http.StatusOK:
		return nil, refusal(res.StatusCode, raw)
	}
	return raw, nil
}
