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
	slices.Sort(took)
	b.ReportMetric(float64(took[len(took)/2].Microseconds()), "p50-µs")
}

// BenchmarkToken is the time from a chunk's sending by the node to its reading
// by the client, one at a time.
func BenchmarkToken(b *testing.B) {
	n := start(b, func(c *snapshot.Config) { c.Limits.ResponseBytes, c.Limits.Deadline = 16<<20, 3600 })
	s := n.node().Ready(b)
	req, err := http.NewRequest(http.MethodPost, n.url+"/v1/chat/completions", strings.NewReader(chatStream))
	if err != nil {
		b.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+n.apiKey)
	req.Header.Set("Content-Type", "application/json")
	got := make(chan *http.Response, 1)
	go func() {
		res, err := http.DefaultClient.Do(req)
		if err != nil {
			b.Error(err)
		}
		got <- res
	}()
	j := s.Take()
	event := []byte("data: " + strings.Repeat("x", 180) + "\n\n")
	s.Send(&wire.Chunk{Job: j.ID, Data: event})
	res := <-got
	defer res.Body.Close()
	in := bufio.NewReader(res.Body)
	buf := make([]byte, len(event))
	if _, err := io.ReadFull(in, buf); err != nil {
		b.Fatal(err)
	}
	at := int64(len(event))
	var took []time.Duration
	for b.Loop() {
		start := time.Now()
		s.Send(&wire.Chunk{Job: j.ID, Offset: at, Data: event})
		if _, err := io.ReadFull(in, buf); err != nil {
			b.Fatal(err)
		}
		at += int64(len(event))
		took = append(took, time.Since(start))
	}
	slices.Sort(took)
	b.ReportMetric(float64(took[len(took)/2].Microseconds()), "p50-µs")
}
