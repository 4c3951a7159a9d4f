package bridge

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/resultity/node/internal/bridge/contract"
)

// ways are the two that a request can go: straight to the engine's port, and
// through the forwarder's socket. Compare them within one run.
func ways(b *testing.B, each func(b *testing.B, client *http.Client, base string)) {
	s := newSpan(b, nil)
	direct := &http.Transport{DisableCompression: true}
	b.Cleanup(direct.CloseIdleConnections)
	b.Run("direct", func(b *testing.B) { each(b, &http.Client{Transport: direct}, s.base) })
	b.Run("bridge", func(b *testing.B) { each(b, s.client, "http://engine") })
}

// BenchmarkForward is one small request with a small answer.
func BenchmarkForward(b *testing.B) {
	body := prompt("x" + strings.Repeat(" ", 2000))
	ways(b, func(b *testing.B, client *http.Client, base string) {
		var took []time.Duration
		for b.Loop() {
			began := time.Now()
			resp, err := client.Post(base+"/v1/completions", "application/json", strings.NewReader(body))
			if err != nil {
				b.Fatal(err)
			}
			io.Copy(io.Discard, resp.Body)
			resp.Body.Close()
			took = append(took, time.Since(began))
		}
		reportMedian(b, took, "p50-ns/op")
	})
}

// BenchmarkStream is the throughput of tokens that come as fast as they can.
func BenchmarkStream(b *testing.B) {
	const tokens = 1000
	body := prompt(fmt.Sprintf("stream %d", tokens))
	ways(b, func(b *testing.B, client *http.Client, base string) {
		for b.Loop() {
			resp, err := client.Post(base+"/v1/completions", "application/json", strings.NewReader(body))
			if err != nil {
				b.Fatal(err)
			}
			if n, err := io.Copy(io.Discard, resp.Body); err != nil || n < tokens {
				b.Fatalf("%d bytes: %v", n, err)
			}
			resp.Body.Close()
		}
		b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*tokens), "ns/token")
	})
}

// BenchmarkToken is the way of one token of a paced stream, from the engine's
// write to the caller's read.
func BenchmarkToken(b *testing.B) {
	const pace = 200 * time.Microsecond
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	began := time.Now()
	engine := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		w.Header().Set("Content-Type", "text/event-stream")
		tick := time.NewTicker(pace)
		defer tick.Stop()
		for r.Context().Err() == nil {
			<-tick.C
			fmt.Fprintf(w, "data: %d\n\n", time.Since(began))
			w.(http.Flusher).Flush()
		}
	})}
	go engine.Serve(l)
	defer engine.Close()
	s := newSpan(b, func(o *contract.Options) { o.Engine = l.Addr().(*net.TCPAddr).AddrPort() })
	for _, way := range []struct {
		name, base string
		client     *http.Client
	}{
		{"direct", s.base, &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}},
		{"bridge", "http://engine", s.client},
	} {
		b.Run(way.name, func(b *testing.B) {
			ctx, cancel := context.WithCancel(b.Context())
			defer cancel()
			req, _ := http.NewRequestWithContext(ctx, "POST", way.base+"/v1/completions", strings.NewReader("{}"))
			resp, err := way.client.Do(req)
			if err != nil {
				b.Fatal(err)
			}
			defer resp.Body.Close()
			lines := bufio.NewReader(resp.Body)
			var took []time.Duration
			for b.Loop() {
				line, err := lines.ReadString('\n')
				if err != nil {
					b.Fatal(err)
				}
				var sent time.Duration
				if _, err := fmt.Sscanf(line, "data: %d", &sent); err != nil {
					b.Fatalf("%q: %v", line, err)
				}
				took = append(took, time.Since(began)-sent)
				lines.ReadString('\n')
			}
			reportMedian(b, took, "p50-ns/token")
		})
	}
}

func reportMedian(b *testing.B, took []time.Duration, unit string) {
	slices.Sort(took)
	b.ReportMetric(float64(took[len(took)/2].Nanoseconds()), unit)
}
