package network_test

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/resultity/node/internal/network/nodetest"
	"github.com/resultity/node/internal/snapshot"
	"github.com/resultity/node/internal/wire"
)

// benched is a network in a process of its own, over TLS, as it is in use: what
// it needs is told from what its clients and nodes need here. A profile of it
// alone comes with the variable [asProfiled].
type benched struct {
	*testNetwork
	pid int
	tls *tls.Config
}

func bench(b *testing.B, change func(*snapshot.Config)) *benched {
	n := setUp(b, change)
	certFile, keyFile := filepath.Join(n.dir, "cert.pem"), filepath.Join(n.dir, "key.pem")
	pool := x509.NewCertPool()
	pool.AddCert(certificate(b, certFile, keyFile))
	k := n.spawn("--tls-cert", certFile, "--tls-key", keyFile)
	b.Cleanup(k.end)
	trust := &tls.Config{RootCAs: pool}
	transport := &http.Transport{TLSClientConfig: trust, MaxIdleConnsPerHost: 64}
	b.Cleanup(transport.CloseIdleConnections)
	n.url, n.client = "https"+strings.TrimPrefix(n.url, "http"), &http.Client{Transport: transport}
	return &benched{n, k.cmd.Process.Pid, trust}
}

func (n *benched) ready() *nodetest.Session {
	v := nodetest.New(n.t, n.url, n.raw)
	v.TLS = n.tls
	v.Enrol(n.t, n.file("enrolment-token"))
	return v.Ready(n.t)
}

// usage is what the network's process has used so far.
type usage struct {
	cpu                      time.Duration
	switches, mallocs, bytes float64
}

func (n *benched) usage() (u usage) {
	dir := fmt.Sprintf("/proc/%d/", n.pid)
	stat, err := os.ReadFile(dir + "stat")
	if err != nil {
		n.t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(stat), ") ")
	f := strings.Fields(rest)
	u.cpu = time.Duration(n.number(f[11])+n.number(f[12])) * (time.Second / 100) // USER_HZ
	tasks, err := filepath.Glob(dir + "task/*/status")
	if err != nil {
		n.t.Fatal(err)
	}
	for _, name := range tasks {
		status, err := os.ReadFile(name)
		if err != nil {
			continue // the thread has ended
		}
		for line := range strings.Lines(string(status)) {
			if v, ok := strings.CutPrefix(line, "voluntary_ctxt_switches:"); ok {
				u.switches += n.number(strings.TrimSpace(v))
			}
		}
	}
	u.mallocs, u.bytes = n.metric("go_memstats_mallocs_total"), n.metric("go_memstats_alloc_bytes_total")
	return u
}

func (n *benched) number(s string) float64 {
	v, err := strconv.ParseFloat(s, 64)
	if err != nil {
		n.t.Fatal(err)
	}
	return v
}

// report prints what the network used for each operation since u.
func (n *benched) report(b *testing.B, u usage) {
	now, ops := n.usage(), float64(b.N)
	b.ReportMetric(float64((now.cpu-u.cpu).Microseconds())/ops, "cpu-µs/op")
	b.ReportMetric((now.switches-u.switches)/ops, "switches/op")
	b.ReportMetric((now.mallocs-u.mallocs)/ops, "mallocs/op")
	b.ReportMetric((now.bytes-u.bytes)/ops, "allocB/op")
}

// BenchmarkPlain is a whole plain request whose node answers at once: its time
// is what the network and one hop to a node add, the rest what it costs the
// network. BenchmarkStream is a stream that comes in one chunk.
func BenchmarkPlain(b *testing.B)  { requests(b, chat) }
func BenchmarkStream(b *testing.B) { requests(b, chatStream) }

func requests(b *testing.B, request string) {
	for _, clients := range []int{1, 4} {
		b.Run(fmt.Sprintf("clients=%d", clients), func(b *testing.B) {
			n := bench(b, nil)
			s := n.ready()
			go func() {
				for {
					m, err := s.Receive()
					if err != nil {
						return
					}
					j, ok := m.(*wire.Job)
					if !ok {
						continue
					}
					_ = s.TrySend(&wire.Accept{Job: j.ID})
					body := nodetest.Body(j, strings.Repeat("word ", 100))
					if j.Stream {
						body = nodetest.Body(j, "word")
						_ = s.TrySend(&wire.Chunk{Job: j.ID, Data: body})
					}
					_ = s.TrySend(s.Node.Result(b, j, body, nil))
				}
			}()
			ask := func() time.Duration {
				start := time.Now()
				if r := n.do(context.Background(), http.MethodPost, "/v1/chat/completions", request); r.err != nil || r.status != http.StatusOK {
					b.Errorf("%d %s %v", r.status, r.body, r.err)
				}
				return time.Since(start)
			}
			for range 200 { // what is made once
				ask()
			}
			before := n.usage()
			var left atomic.Int64
			left.Store(int64(b.N))
			took := make([]time.Duration, b.N)
			b.ResetTimer()
			var wg sync.WaitGroup
			for range clients {
				wg.Go(func() {
					for i := left.Add(-1); i >= 0; i = left.Add(-1) {
						took[i] = ask()
					}
				})
			}
			wg.Wait()
			b.StopTimer()
			n.report(b, before)
			quantiles(b, took)
		})
	}
}

// BenchmarkToken is the time from a chunk's sending by the node to its reading
// by the client, one at a time. A response has a bound: when it is reached, the
// client goes, and the next stream begins, outside of the time.
func BenchmarkToken(b *testing.B) {
	n := bench(b, func(c *snapshot.Config) { c.Limits.Deadline = 3600 })
	s := n.ready()
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
				res, err = n.client.Do(req)
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
	before := n.usage()
	took := make([]time.Duration, b.N)
	b.ResetTimer()
	for i := range took {
		if at+int64(len(event)) > n.config.Limits.ResponseBytes {
			b.StopTimer()
			end()
			begin()
			b.StartTimer()
		}
		start := time.Now()
		token()
		took[i] = time.Since(start)
	}
	b.StopTimer()
	n.report(b, before)
	quantiles(b, took)
	end()
}

// quantiles reports p25 beside p50, since other work on the machine moves it less.
func quantiles(b *testing.B, took []time.Duration) {
	slices.Sort(took)
	b.ReportMetric(float64(took[len(took)/4].Microseconds()), "p25-µs")
	b.ReportMetric(float64(took[len(took)/2].Microseconds()), "p50-µs")
}
