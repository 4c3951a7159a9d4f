package network_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"log/slog"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/evm"
	"github.com/resultity/node/internal/network"
	"github.com/resultity/node/internal/network/nodetest"
	"github.com/resultity/node/internal/session"
	"github.com/resultity/node/internal/signer"
	"github.com/resultity/node/internal/tuf"
	"github.com/resultity/node/internal/wire"
)

// events passes what the agent's session has to say to a test.
type events struct {
	opened   chan struct{}
	messages chan wire.Message
}

func (e *events) Opened()                { e.opened <- struct{}{} }
func (e *events) Message(m wire.Message) { e.messages <- m }
func (e *events) Closed(error)           {}

func wait[T any](t *testing.T, ch <-chan T) (v T) {
	t.Helper()
	select {
	case v = <-ch:
	case <-time.After(nodetest.Patience):
		t.Fatal("waited in vain")
	}
	return v
}

// The agent's own client of the protocol and of the repository agree with this
// service, over TLS and over its restart.
func TestAgentsSide(t *testing.T) {
	n := setUp(t, nil)
	certFile, keyFile := filepath.Join(n.dir, "cert.pem"), filepath.Join(n.dir, "key.pem")
	pool := x509.NewCertPool()
	pool.AddCert(certificate(t, certFile, keyFile))
	trust := &tls.Config{RootCAs: pool}
	n.tweak = func(c *network.Config) {
		c.TLSCert, c.TLSKey = certFile, keyFile
		if n.url != "" { // the agent comes back to the same address
			c.Listen = strings.TrimPrefix(n.url, "http://")
		}
	}
	n.serve()
	address := strings.TrimPrefix(n.url, "http://")
	transport := &http.Transport{TLSClientConfig: trust}
	defer transport.CloseIdleConnections()
	client := &http.Client{Transport: transport, Timeout: nodetest.Patience}

	repository, err := tuf.New(tuf.Config{
		URL: "https://" + address + "/tuf", Dir: t.TempDir(), Client: client,
		Root: []byte(n.file("repository/metadata/1.root.json")), Now: time.Now,
	})
	if err != nil {
		t.Fatal(err)
	}
	snap, err := repository.Refresh(t.Context())
	if err != nil || snap.Digest() != digest.Of(n.raw) {
		t.Fatalf("snapshot: %v", err)
	}

	v := nodetest.New(t, "", n.raw)
	trusted := func(a evm.Address) bool { return a == n.key }
	if _, err := session.Register(t.Context(), session.Registration{
		URL: "https://" + address, Client: client, Key: signer.NewLocal(v.Key, nil), Trusted: trusted, Body: v.Registration(n.file("enrolment-token")),
	}); err != nil {
		t.Fatal(err)
	}
	begun, err := session.Bind(t.Context(), session.Binding{
		URL: "https://" + address, Client: client, Key: signer.NewLocal(v.Key, nil), Trusted: trusted,
		Body: wire.BindRequest{Network: "testnet", Node: v.Key.Address(), Step: wire.BindBegin},
	})
	if err != nil || begun.Bound.Account != "operator" || begun.Nonce == (evm.Hash{}) {
		t.Fatalf("%+v %v", begun, err)
	}
	e := &events{opened: make(chan struct{}, 16), messages: make(chan wire.Message, 64)}
	s := session.New(session.Config{
		URL: "wss://" + address, Network: "testnet", Node: v.Key.Address(), Key: signer.NewLocal(v.Key, nil), Trusted: trusted, Agent: "test", TLS: trust,
		Log: slog.New(slog.DiscardHandler), Now: time.Now, Config: func() digest.Digest { return v.Digest }, Delays: []time.Duration{50 * time.Millisecond},
	}, e)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- s.Run(ctx) }()
	defer func() {
		cancel()
		if err := wait(t, ended); err != nil {
			t.Error(err)
		}
	}()
	serve := func() {
		t.Helper()
		wait(t, e.opened)
		if a, ok := wait(t, e.messages).(*wire.LeavesAck); !ok || a.Size != 0 {
			t.Fatalf("%+v", a)
		}
		if b, ok := wait(t, e.messages).(*wire.Bound); !ok || b.Account != "operator" || b.Method != wire.MethodToken {
			t.Fatalf("%+v", b)
		}
		if err := s.Send(v.Heartbeat()); err != nil {
			t.Fatal(err)
		}
		if st, ok := wait(t, e.messages).(*wire.Status); !ok || !st.Routable {
			t.Fatalf("%+v", st)
		}
		ask := func(body string) <-chan reply {
			ch := make(chan reply, 1)
			go func() {
				ch <- n.with(client, "https://"+address).do(ctx, http.MethodPost, "/v1/chat/completions", body)
			}()
			return ch
		}
		for _, body := range []string{chat, chatStream} {
			ch := ask(body)
			j, ok := wait(t, e.messages).(*wire.Job)
			if !ok {
				t.Fatal("no job")
			}
			want := nodetest.Body(j, "secret answer")
			out := []wire.Message{&wire.Accept{Job: j.ID}}
			if j.Stream {
				out = append(out, &wire.Chunk{Job: j.ID, Data: want[:20]})
			}
			for _, m := range append(out, v.Result(t, j, want, nil)) {
				if err := s.Send(m); err != nil {
					t.Fatal(err)
				}
			}
			if a, ok := wait(t, e.messages).(*wire.Ack); !ok || a.Jobs[0] != j.ID {
				t.Fatalf("%+v", a)
			}
			if r := n.answer(ch); r.status != http.StatusOK || !bytes.Equal(r.body, want) {
				t.Fatalf("%d %s", r.status, r.body)
			}
		}
	}
	serve()
	n.stop()
	n.serve()
	serve()
}
