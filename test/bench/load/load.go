// Package load asks an engine or a network's API and measures how long the
// answers take. It runs on a host of the stack, so that the two ways are
// measured by the same code on the same machine in one run.
//
// The rule it keeps: an answer counts only if it is complete, and only if it is
// the expected one where that is known.
package load

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/test/bench/instant"
	"github.com/resultity/node/test/chat"
)

// Spec is what a run consists of.
type Spec struct {
	API, Key, Socket string // where, and with which API key; the engine's socket
	CA               []byte // PEM
	Model            string
	Ops              []Op // one after the other
	Busy             int  // processes that do nothing but work meanwhile
}

// Op is one series of equal requests.
type Op struct {
	Direct      bool   // at the engine's socket, not through the API
	Stream      bool   // as tokens
	Prompt      string // one user message
	Tokens      int    // max_tokens
	Requests    int
	Concurrency int
	Want        string // the answer's text; "" where it is not known
	Stamped     bool   // the tokens say when they were written
	Receipts    bool   // check that each answer's receipt is over the bytes that came
	Floor       bool   // no request at all, but what one may not do without, see floor
	Hops        bool   // no request at all, but the way of a token with nothing on it, see hops
	Relays      int    // programs on that way, between its ends
}

// Outcome is what came of an op. Times are medians over its exact answers, in
// microseconds.
type Outcome struct {
	Requests int
	Exact    int     // answers that are complete and as expected
	Wrong    string  // about the first other one
	Seconds  float64 // for all of them
	Total    float64
	First    float64 // until the first token
	Token    float64 // stamped: from writing to reading of a token; else between first token and end, for each of the others
}

type runner struct {
	spec   *Spec
	engine *http.Client
	api    *http.Client
}

// Run does all ops. Answers that are wrong or missing are counted; they end
// nothing.
func Run(ctx context.Context, s *Spec) ([]Outcome, error) {
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(s.CA)
	idle := 1
	for _, o := range s.Ops {
		idle = max(idle, o.Concurrency)
	}
	r := &runner{
		spec: s,
		engine: &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: idle, DisableCompression: true,
			DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
				return new(net.Dialer).DialContext(ctx, "unix", s.Socket)
			}}},
		api: &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: idle, TLSClientConfig: &tls.Config{RootCAs: pool}}},
	}
	defer r.engine.CloseIdleConnections()
	defer r.api.CloseIdleConnections()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	for range s.Busy {
		spin := exec.CommandContext(ctx, os.Args[0], "spin")
		if err := spin.Start(); err != nil {
			return nil, err
		}
		defer spin.Wait() // killed by cancel, which has run by then
		defer cancel()
	}
	var all []Outcome
	for i := range s.Ops {
		out, err := r.op(ctx, &s.Ops[i])
		if err != nil {
			return nil, err
		}
		all = append(all, out)
	}
	return all, nil
}

func (r *runner) op(ctx context.Context, o *Op) (Outcome, error) {
	body, err := json.Marshal(map[string]any{
		"model": r.spec.Model, "stream": o.Stream, "temperature": 0, "max_tokens": o.Tokens,
		"messages": []map[string]string{{"role": "user", "content": o.Prompt}},
	})
	if err != nil {
		return Outcome{}, err
	}
	var (
		left   atomic.Int64
		mu     sync.Mutex // guards what follows
		out    = Outcome{Requests: o.Requests}
		totals []float64
		firsts []float64
		tokens []float64
		wg     sync.WaitGroup
	)
	ask := func() (answer, error) { return r.ask(ctx, o, body) }
	switch {
	case o.Hops:
		ask = func() (answer, error) { return hops(ctx, o.Relays) }
	case o.Floor:
		f, err := newFloor()
		if err != nil {
			return Outcome{}, err
		}
		defer f.close()
		ask = f.once
	}
	left.Store(int64(o.Requests))
	begin := time.Now()
	for range o.Concurrency {
		wg.Go(func() {
			for left.Add(-1) >= 0 {
				a, err := ask()
				mu.Lock()
				switch {
				case err == nil:
					out.Exact++
					totals, firsts, tokens = append(totals, a.total), append(firsts, a.first), append(tokens, a.tokens...)
				case out.Wrong == "":
					out.Wrong = err.Error()
				}
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	out.Seconds = time.Since(begin).Seconds()
	out.Total, out.First, out.Token = median(totals), median(firsts), median(tokens)
	return out, nil
}

// answer is one that was measured, in microseconds.
type answer struct {
	total, first float64
	tokens       []float64
}

func (r *runner) ask(ctx context.Context, o *Op, body []byte) (a answer, err error) {
	client, base := r.api, r.spec.API
	if o.Direct {
		client, base = r.engine, "http://engine"
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, base+"/v1/chat/completions", bytes.NewReader(body))
	if err != nil {
		return a, err
	}
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("Authorization", "Bearer "+r.spec.Key)
	begin := time.Now()
	res, err := client.Do(req)
	if err != nil {
		return a, err
	}
	defer res.Body.Close() // read to its end below
	var raw bytes.Buffer
	in := io.TeeReader(res.Body, &raw)
	if res.StatusCode != http.StatusOK {
		_, _ = io.CopyN(&raw, res.Body, 500) // for the error only
		return a, fmt.Errorf("%s: %s", res.Status, raw.Bytes())
	}
	text := ""
	if o.Stream {
		text, err = a.stream(in, o, begin)
	} else if _, err = io.Copy(io.Discard, in); err == nil {
		a.total = micros(time.Since(begin))
		text, err = chat.Text(raw.Bytes(), false)
	}
	switch {
	case err != nil:
		return a, err
	case o.Want != "" && text != o.Want:
		return a, fmt.Errorf("%d bytes of text differ from the %d expected", len(text), len(o.Want))
	case o.Receipts:
		return a, r.checkReceipt(ctx, res.Header.Get("Resultity-Receipt"), body, raw.Bytes())
	}
	return a, nil
}

type event struct {
	Choices []struct {
		Message, Delta struct{ Content string }
	}
}

// stream reads and times an event stream.
func (a *answer) stream(r io.Reader, o *Op, begin time.Time) (string, error) {
	var text strings.Builder
	done, n := false, 0
	for lines := bufio.NewScanner(r); lines.Scan(); {
		at := time.Now()
		data, ok := bytes.CutPrefix(lines.Bytes(), []byte("data: "))
		if !ok {
			continue
		}
		if done = string(data) == "[DONE]"; done {
			a.total = micros(at.Sub(begin))
			continue
		}
		var e event
		if err := json.Unmarshal(data, &e); err != nil {
			return "", err
		}
		if len(e.Choices) == 0 || e.Choices[0].Delta.Content == "" {
			continue
		}
		token := e.Choices[0].Delta.Content
		if n++; n == 1 {
			a.first = micros(at.Sub(begin))
		}
		if o.Stamped {
			written, err := instant.Stamp(token)
			if err != nil {
				return "", err
			}
			a.tokens = append(a.tokens, micros(at.Sub(written)))
		}
		text.WriteString(token)
	}
	if !done {
		return "", errors.New("the stream ended without [DONE]")
	}
	if !o.Stamped && n > 1 {
		a.tokens = []float64{(a.total - a.first) / float64(n-1)}
	}
	return text.String(), nil
}

// checkReceipt proves that the bytes are those that the node signed.
func (r *runner) checkReceipt(ctx context.Context, id string, request, response []byte) error {
	c := chat.Client{API: r.spec.API, APIKey: r.spec.Key, HTTP: r.api}
	_, s, err := c.Receipt(ctx, id)
	if err != nil {
		return err
	}
	if got := s.Receipt().Measured; got.RequestHash != digest.Of(request) || got.ResponseHash != digest.Of(response) {
		return errors.New("the receipt is for other bytes")
	}
	return nil
}

func micros(d time.Duration) float64 { return float64(d.Nanoseconds()) / 1000 }

func median(v []float64) float64 {
	if len(v) == 0 {
		return 0
	}
	slices.Sort(v)
	return v[len(v)/2]
}
