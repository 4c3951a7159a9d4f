package work

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/gorilla/websocket"
	"golang.org/x/sys/unix"

	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/evm"
	"github.com/resultity/node/internal/journal"
	"github.com/resultity/node/internal/receipt"
	"github.com/resultity/node/internal/runtime"
	"github.com/resultity/node/internal/session"
	"github.com/resultity/node/internal/signer"
	"github.com/resultity/node/internal/spool"
	"github.com/resultity/node/internal/state"
	"github.com/resultity/node/internal/wire"
	"github.com/resultity/node/test/bench/instant"
)

// BenchmarkJob has an agent's whole way of a job in this process, from a frame of
// a session over TLS to the frame with the result: all but the journal's socket.
// Network and engine are another process, so that what this one uses of the
// processors is what the agent does. Compare two builds in turns: a job's CPU time
// and switches depend little on who else uses the machine, its duration very much.
func BenchmarkJob(b *testing.B) {
	for _, load := range []peerLoad{
		{AtOnce: 1, Tokens: 1},
		{AtOnce: 4, Tokens: 1},
		{AtOnce: 1, Tokens: 1, Stream: true},
		{AtOnce: 4, Tokens: 200, Stream: true, Pace: 2 * time.Millisecond},
	} {
		name := fmt.Sprintf("plain/%d", load.AtOnce)
		if load.Stream {
			name = fmt.Sprintf("stream/%d/tokens=%d", load.AtOnce, load.Tokens)
		}
		b.Run(name, func(b *testing.B) {
			p := newPeers(b)
			load.Jobs = 20 // what is opened and grows with the first jobs is no part of one
			p.do(b, load)
			load.Jobs = b.N
			b.ReportAllocs()
			before := used(b)
			b.ResetTimer()
			p50 := p.do(b, load)
			b.StopTimer()
			after := used(b)
			per := func(v float64) float64 { return v / float64(b.N*load.Tokens) }
			cpu := time.Duration(after.Utime.Nano() + after.Stime.Nano() - before.Utime.Nano() - before.Stime.Nano())
			unit := "job"
			if load.Tokens > 1 {
				unit = "token"
			}
			b.ReportMetric(per(float64(cpu.Nanoseconds())/1e3), "cpu-µs/"+unit)
			b.ReportMetric(per(float64(after.Nvcsw-before.Nvcsw)), "switches/"+unit)
			b.ReportMetric(float64(p50.Microseconds()), "p50-µs")
		})
	}
}

func used(b *testing.B) (u unix.Rusage) {
	b.Helper()
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return u
}

// peers are the process with the network and the engine.
type peers struct {
	in  *json.Encoder
	out *json.Decoder
}

// peerOrder and peerReply are said when the process starts.
type (
	peerOrder struct {
		Node   evm.Address
		Config digest.Digest
		Socket string // the engine's
	}
	peerReply struct {
		URL string
		CA  []byte // DER
		Key evm.Address
	}
)

// peerLoad is some jobs, after which the median time of one is said.
type peerLoad struct {
	Jobs, AtOnce, Tokens int
	Stream               bool
	Pace                 time.Duration
}

const peersVariable = "RESULTITY_BENCH_PEERS"

// newPeers starts the peers, and an agent's worker that works for them.
func newPeers(b *testing.B) *peers {
	b.Helper()
	c := config()
	c.Runtime.Settings.Slots = 16
	c.Limits.Tokens = 1000
	active := &Active{Snapshot: verified(b, c), Image: digest.Of([]byte("image")), Model: digest.Of([]byte("model")), Sandbox: inRecord}
	dir := b.TempDir()
	key, err := evm.NewKey()
	if err != nil {
		b.Fatal(err)
	}

	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), peersVariable+"=1")
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		b.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		b.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		in.Close() // ends it
		if err := cmd.Wait(); err != nil {
			b.Errorf("peers: %v", err)
		}
	})
	p := &peers{json.NewEncoder(in), json.NewDecoder(bufio.NewReader(out))}
	socket := filepath.Join(dir, "engine.sock")
	var r peerReply
	if err := errors.Join(p.in.Encode(peerOrder{key.Address(), active.Snapshot.Digest(), socket}), p.out.Decode(&r)); err != nil {
		b.Fatal(err)
	}
	ca, err := x509.ParseCertificate(r.CA)
	if err != nil {
		b.Fatal(err)
	}

	store, err := state.Open(filepath.Join(dir, "jobs"), state.Bounds{}, time.Now)
	if err != nil {
		b.Fatal(err)
	}
	logs, err := spool.Open(filepath.Join(dir, "spool"))
	if err != nil {
		b.Fatal(err)
	}
	log := slog.New(slog.NewMultiHandler(journal.Text(io.Discard, slog.LevelInfo), logs.Handler(slog.LevelInfo)))
	client := runtime.New(socket, func(int, uint32) error { return nil })
	active.Engine = client
	roots := x509.NewCertPool()
	roots.AddCert(ca)
	h := &peersHandler{opened: make(chan struct{})}
	link := session.New(session.Config{
		URL: r.URL, Network: "testnet", Node: key.Address(), Key: signer.NewLocal(key, nil), Agent: "bench", Log: log, Now: time.Now,
		Trusted: func(a evm.Address) bool { return a == r.Key }, TLS: &tls.Config{RootCAs: roots},
	}, h)
	h.worker = New(Config{Store: store, Key: signer.NewLocal(key, nil), Send: link.Send, Log: log, Now: time.Now})
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() { _ = h.worker.Run(ctx) })
	running.Go(func() { _ = link.Run(ctx) })
	b.Cleanup(func() {
		cancel()
		running.Wait()
		client.Close()
		if err := errors.Join(store.Close(), logs.Close()); err != nil {
			b.Error(err)
		}
	})
	h.worker.SetActive(active)
	<-h.opened
	return p
}

// do has the peers give jobs and wait for them.
func (p *peers) do(b *testing.B, l peerLoad) (p50 time.Duration) {
	b.Helper()
	if err := errors.Join(p.in.Encode(l), p.out.Decode(&p50)); err != nil {
		b.Fatal(err)
	}
	return p50
}

// peersHandler does what the agent does with messages about jobs.
type peersHandler struct {
	worker *Worker
	opened chan struct{}
}

func (h *peersHandler) Opened() {
	h.worker.Connected()
	close(h.opened)
}

func (h *peersHandler) Message(m wire.Message) {
	switch m := m.(type) {
	case *wire.Job:
		h.worker.Job(m)
	case *wire.Ack:
		h.worker.Ack(m)
	}
}

func (h *peersHandler) Closed(error) {}

// runPeers is that process, until its input ends.
func runPeers() error {
	in, out := json.NewDecoder(os.Stdin), json.NewEncoder(os.Stdout)
	var o peerOrder
	if err := in.Decode(&o); err != nil {
		return err
	}
	l, err := net.Listen("unix", o.Socket)
	if err != nil {
		return err
	}
	engine := http.Server{Handler: instant.Handler(), ReadHeaderTimeout: time.Minute}
	go func() { _ = engine.Serve(l) }()
	key, err := evm.NewKey()
	if err != nil {
		return err
	}
	conns := make(chan *peersConn, 1)
	n := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if c, err := peersUpgrade(w, r, o, key); err != nil {
			fmt.Fprintln(os.Stderr, "peers:", err)
		} else {
			conns <- c
		}
	}))
	if err := out.Encode(peerReply{"wss" + n.URL[len("https"):], n.Certificate().Raw, key.Address()}); err != nil {
		return err
	}
	c := <-conns
	for {
		var l peerLoad
		if err := in.Decode(&l); err == io.EOF {
			return nil
		} else if err != nil {
			return err
		}
		p50, err := c.run(o, l)
		if err != nil {
			return err
		}
		if err := out.Encode(p50); err != nil {
			return err
		}
	}
}

// peersConn is the network's side of the session.
type peersConn struct {
	conn   *websocket.Conn
	sealer *wire.Sealer
	opener *wire.Opener
}

func peersUpgrade(w http.ResponseWriter, r *http.Request, o peerOrder, key *evm.Key) (*peersConn, error) {
	own := wire.NewSecret()
	theirs, err := wire.ParsePublicKey(r.Header.Get(wire.HeaderKey))
	if err != nil {
		return nil, err
	}
	up := websocket.Upgrader{Subprotocols: []string{wire.Subprotocol}}
	conn, err := up.Upgrade(w, r, http.Header{wire.HeaderKey: {own.Public().String()}})
	if err != nil {
		return nil, err
	}
	agreed, err := own.Agree("testnet", o.Node, theirs, own.Public())
	if err != nil {
		return nil, err
	}
	c := &peersConn{conn, wire.NewSealer(key, agreed, wire.ToNode, time.Now),
		wire.NewOpener(func(a evm.Address) bool { return a == o.Node }, agreed, wire.ToNetwork, time.Minute)}
	if _, err := c.next(); err != nil { // hello
		return nil, err
	}
	return c, c.send(&wire.Welcome{Session: "bench", Server: "1"})
}

func (c *peersConn) next() (wire.Message, error) {
	_, frame, err := c.conn.ReadMessage()
	if err != nil {
		return nil, err
	}
	return c.opener.Open(frame, time.Now())
}

func (c *peersConn) send(m wire.Message) error {
	frame, err := c.sealer.Seal(nil, m)
	if err != nil {
		return err
	}
	return c.conn.WriteMessage(websocket.BinaryMessage, frame)
}

// run gives jobs, so many at once, and returns the median time to a result.
func (c *peersConn) run(o peerOrder, l peerLoad) (p50 time.Duration, err error) {
	words := "x"
	if l.Pace > 0 {
		words = instant.Pace(l.Pace)
	}
	request := fmt.Appendf(nil, `{"model":"tiny","stream":%v,"max_tokens":%d,"messages":[{"role":"user","content":%q}]}`, l.Stream, l.Tokens, words)
	sent := map[receipt.JobID]time.Time{}
	var took []time.Duration
	for given := 0; len(took) < l.Jobs; {
		for ; given < l.Jobs && len(sent) < l.AtOnce; given++ {
			now := time.Now()
			j := &wire.Job{
				ID: receipt.NewJobID(), Model: "tiny", Kind: wire.KindChat, Stream: l.Stream, Request: request,
				Seed: 7, Created: now.Unix(), Deadline: now.Add(20 * time.Second).UnixMilli(), Config: o.Config,
			}
			if err := c.send(j); err != nil {
				return 0, err
			}
			sent[j.ID] = now
		}
		m, err := c.next()
		if err != nil {
			return 0, err
		}
		switch m := m.(type) {
		case *wire.Result:
			if m.Code != "" || m.Receipt == nil {
				return 0, fmt.Errorf("a job failed: %s: %s", m.Code, m.Message)
			}
			took = append(took, time.Since(sent[m.Job]))
			delete(sent, m.Job)
			if err := c.send(&wire.Ack{Jobs: []receipt.JobID{m.Job}}); err != nil {
				return 0, err
			}
		case *wire.Refuse:
			return 0, fmt.Errorf("a job is refused: %s: %s", m.Code, m.Message)
		}
	}
	slices.Sort(took)
	return took[len(took)/2], nil
}
