package network_test

import (
	"bufio"
	"context"
	"io"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/resultity/node/internal/network/nodetest"
	"github.com/resultity/node/internal/snapshot"
	"github.com/resultity/node/internal/wire"
)

// BenchmarkPlain is the time of a whole plain request whose node answers at
// once: what the network and one hop to a node add.
func BenchmarkPlain(b *testing.B) {
	n := start(b, nil)
	s := n.node().Ready(b)
	go func() {
		for {
			m, err := s.Receive()
			if err != nil {
				return
			}
			if j, ok := m.(*wire.Job); ok {
				_ = s.TrySend(&wire.Accept{Job: j.ID})
				_ = s.TrySend(s.Node.Result(b, j, nodetest.Body(j, strings.Repeat("word ", 100)), nil))
			}
		}
	}()
	var took []time.Duration
	for b.Loop() {
		start := time.Now()
		if r := n.do(context.Background(), http.MethodPost, "/v1/chat/completions", chat); r.err != nil || r.status != http.StatusOK {
			b.Fatalf("%d %s %v", r.status, r.body, r.err)
		}
		took = append(took, time.Since(start))
	}
	quantiles(b, took)
}

// BenchmarkToken is the time from a chunk's sending by the node to its reading
// by the client, one at a time. A response has a bound: when it is reached, the
// client goes, and the next stream begins, outside of the time.
func BenchmarkToken(b *testing.B) {
	n := start(b, func(c *snapshot.Config) { c.Limits.Deadline = 3600 })
	s := n.node().Ready(b)
	event := []byte("data: " + strings.Repeat("x", 180) + "\n\n")
	buf := make([]byte, len(event))
	var j *wire.Job
	var res *http.Response
	var in *bufio.Reader
	var at int64
	token := func() {
		s.Send(&wire.Chunk{Job: j.ID, Offset: at, Data: event})
		at += int64(len(event))
		if in == nil {
			return
		}
		if _, err := io.ReadFull(in, buf); err != nil {
			b.Fatal(err)
		}
	}
	begin := func() {
		got := make(chan *http.Response, 1)
		go func() {
			req, err := http.NewRequest(http.MethodPost, n.url+"/v1/chat/completions", strings.NewReader(chatStream))
			if err == nil {
				req.Header.Set("Authorization", "Bearer "+n.apiKey)
				req.Header.Set("Content-Type", "application/json")
				res, err = http.DefaultClient.Do(req)
			}
			if err != nil {
				b.Error(err)
			}
			got <- res
		}()
		j, in, at = s.Take(), nil, 0
		token() // the reply begins with it
		if res = <-got; res == nil {
			b.FailNow()
		}
		in = bufio.NewReader(res.Body)
		if _, err := io.ReadFull(in, buf); err != nil {
			b.Fatal(err)
		}
	}
	end := func() {
		_ = res.Body.Close() // it is not read to its end
		if c := nodetest.Expect[*wire.Cancel](s); c.Job != j.ID {
			b.Fatalf("cancelled %s, want %s", c.Job, j.ID)
		}
		s.Send(&wire.Result{Job: j.ID, Code: wire.CodeCancelled})
		nodetest.Expect[*wire.Ack](s)
	}
	begin()
	var took []time.Duration
	for b.Loop() {
		if at+int64(len(event)) > n.config.Limits.ResponseBytes {
			b.StopTimer()
			end()
			begin()
			b.StartTimer()
		}
		start := time.Now()
		token()
		took = append(took, time.Since(start))
	}
	end()
	quantiles(b, took)
}

// quantiles reports p25 beside p50, since other work on the machine moves it less.
func quantiles(b *testing.B, took []time.Duration) {
	slices.Sort(took)
	b.ReportMetric(float64(took[len(took)/4].Microseconds()), "p25-µs")
	b.ReportMetric(float64(took[len(took)/2].Microseconds()), "p50-µs")
}
