// Package nodetest is a node for tests of the network service: it speaks the
// protocol with a key of its own, honestly or not.
//
// The rule it keeps: it does what the test says, one message at a time, and
// nothing by itself; it starts no goroutine. A test that waits too long fails.
package nodetest

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/gorilla/websocket"

	"github.com/resultity/node/internal/bridge/contract"
	"github.com/resultity/node/internal/chunk"
	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/evm"
	"github.com/resultity/node/internal/receipt"
	"github.com/resultity/node/internal/sandbox/record"
	"github.com/resultity/node/internal/snapshot"
	"github.com/resultity/node/internal/wire"
)

// Patience is how long a wait may take before the test fails: it ends as soon as
// what it is for comes, and a busy machine may stand still for seconds.
const Patience = 2 * time.Minute

// Model is the model that [Config] serves.
const Model = "tiny"

// Config returns a configuration that nodes accept, for a network whose message
// key is key.
func Config(t testing.TB, key evm.Address) *snapshot.Config {
	t.Helper()
	image, err := snapshot.ParseImageRef("registry.test/runtime@" + digest.Of([]byte("image")).String())
	if err != nil {
		t.Fatal(err)
	}
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKIXPublicKey(&k.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	return &snapshot.Config{
		Schema:  1,
		Network: snapshot.Network{Name: "testnet", ChainID: 31337, MessageKeys: []evm.Address{key}, Heartbeat: 1, Window: 3, ClockWindow: 60},
		Limits: snapshot.Limits{
			RequestBytes: 1 << 20, ResponseBytes: 1 << 20, Tokens: 1000, Messages: 32, Deadline: 30, ResultTTL: 3600,
		},
		Logs:       snapshot.Logs{Interval: 900, BatchBytes: 64 << 10},
		ImageTrust: snapshot.ImageTrust{Keys: []string{string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}))}},
		Models: []snapshot.Model{{Name: Model, Version: "1", Format: "gguf", Files: []snapshot.File{{
			Path: "tiny.gguf", Size: 4, SHA256: digest.Of([]byte("tiny")), Chunks: snapshot.Chunks{Root: digest.FromSum(chunk.Hash([]byte("tiny")))},
			Sources: []string{"https://models.test/tiny.gguf"},
		}}}},
		Runtime: snapshot.Runtime{
			Engine: snapshot.LlamaCpp, Image: image, Model: Model, Settings: snapshot.Settings{Context: 1024, Slots: 4},
			Devices: []string{}, TmpBytes: 1 << 20, ShmBytes: 1 << 20, StartTimeout: 10, Watchdog: 5, Stall: 5, StopTimeout: 5,
		},
		Validation: snapshot.Validation{Golden: []snapshot.Golden{{Name: "hello", Prompt: "Hello", Answers: []string{"Hi"}, Tokens: 8, Timeout: 10}}},
	}
}

// JSON prints a configuration as it is published.
func JSON(t testing.TB, c *snapshot.Config) []byte {
	t.Helper()
	raw, err := json.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := snapshot.Parse(raw); err != nil {
		t.Fatal(err)
	}
	return raw
}

// Node is a node's identity and what it believes to be the configuration.
type Node struct {
	Key    *evm.Key
	URL    string // of the network, http or https
	TLS    *tls.Config
	Config *snapshot.Config
	Digest digest.Digest // of the published bytes
	Class  *wire.Class   // as it says of itself; nil for none

	// Sandbox is the record that its sessions begin with and its receipts name; nil
	// for none.
	Sandbox *record.Signed
}

// New makes a node with a fresh key.
func New(t testing.TB, url string, config []byte) *Node {
	t.Helper()
	k, err := evm.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	c, err := snapshot.Parse(config)
	if err != nil {
		t.Fatal(err)
	}
	n := &Node{Key: k, URL: url, Config: c, Digest: digest.Of(config)}
	n.Sandbox = n.Record(t, nil)
	return n
}

// Record signs a record of the node's sandbox. change, if not nil, may falsify it
// before that.
func (n *Node) Record(t testing.TB, change func(*record.Record)) *record.Signed {
	t.Helper()
	r := &record.Record{
		Version: record.Version, Node: n.Key.Address(), Network: n.Config.Network.Name, Time: time.Now().UnixMilli(), Start: strings.Repeat("0a", 16),
		Config: n.Digest, Image: n.Config.Runtime.Image.Digest(),
		Views: record.Views{
			Inside:  contract.Sandbox{Version: contract.Version, OK: true, UID: 1000, GID: 1000, Checks: []contract.Check{{Name: "user", Got: "1000", OK: true}}},
			Outside: record.Outside{UIDs: []int{100999, 100999, 100999, 100999}, NoNewPrivs: true, Seccomp: 2, Interfaces: []string{"lo"}},
		},
	}
	if change != nil {
		change(r)
	}
	signed, err := r.Sign(n.Key)
	if err != nil {
		t.Fatal(err)
	}
	return signed
}

// Registration is what an honest node sends.
func (n *Node) Registration(token string) wire.Registration {
	return wire.Registration{Network: n.Config.Network.Name, Node: n.Key.Address(), Token: token, Time: time.Now().UnixMilli(), Agent: "nodetest"}
}

// Register sends a registration, signed by key, and returns the status and the
// checked reply.
func (n *Node) Register(ctx context.Context, reg wire.Registration, key *evm.Key) (int, wire.Registered, error) {
	var reply wire.Registered
	body, err := wire.SealRegistration(key, &reg)
	if err != nil {
		return 0, reply, err
	}
	status, raw, err := n.post(ctx, wire.RegisterPath, body)
	if err != nil || status != http.StatusOK {
		return status, reply, err
	}
	signer, err := wire.OpenRegistration(raw, &reply)
	if err == nil && signer != n.Config.Network.MessageKeys[0] {
		err = fmt.Errorf("reply is signed by %s", signer)
	}
	return status, reply, err
}

// RegisterRaw sends any bytes as a registration and returns the status.
func (n *Node) RegisterRaw(ctx context.Context, body []byte) (int, error) {
	status, _, err := n.post(ctx, wire.RegisterPath, body)
	return status, err
}

// Bind sends a request about the node's binding, signed by key, with what an
// honest node says of itself. text is the network's refusal.
func (n *Node) Bind(ctx context.Context, req wire.BindRequest, key *evm.Key) (status int, reply wire.BindReply, text string, err error) {
	if req.Network == "" {
		req.Network = n.Config.Network.Name
	}
	if req.Node == (evm.Address{}) {
		req.Node = n.Key.Address()
	}
	if req.Time == 0 {
		req.Time = time.Now().UnixMilli()
	}
	body, err := wire.SealBinding(key, &req)
	if err != nil {
		return 0, reply, "", err
	}
	status, raw, err := n.post(ctx, wire.BindPath, body)
	if err != nil || status != http.StatusOK {
		return status, reply, string(raw), err
	}
	signer, err := wire.OpenBinding(raw, &reply)
	if err == nil && signer != n.Config.Network.MessageKeys[0] {
		err = fmt.Errorf("reply is signed by %s", signer)
	}
	return status, reply, "", err
}

func (n *Node) post(ctx context.Context, path string, body []byte) (int, []byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, n.URL+path, bytes.NewReader(body))
	if err != nil {
		return 0, nil, err
	}
	req.Header.Set("Content-Type", "application/octet-stream")
	c := http.Client{Transport: &http.Transport{TLSClientConfig: n.TLS, DisableKeepAlives: true}}
	res, err := c.Do(req)
	if err != nil {
		return 0, nil, err
	}
	defer res.Body.Close()
	raw, err := io.ReadAll(res.Body)
	return res.StatusCode, raw, err
}

// Enrol registers the node and fails the test when that fails.
func (n *Node) Enrol(t testing.TB, token string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), Patience)
	defer cancel()
	if status, _, err := n.Register(ctx, n.Registration(token), n.Key); err != nil || status != http.StatusOK {
		t.Fatalf("registration: status %d, %v", status, err)
	}
}

// Session is an open WebSocket of a node.
type Session struct {
	t      testing.TB
	Node   *Node
	Conn   *websocket.Conn
	Agreed *wire.Session
	sealer *wire.Sealer
	opener *wire.Opener
	began  digest.Digest // the record that it began with, until that is acknowledged
}

// counter gives the counts of hellos and the sequences of receipts.
var counter atomic.Uint64

// Headers is what an honest node sends with the upgrade.
func (n *Node) Headers(own *wire.Secret) http.Header {
	return http.Header{
		wire.HeaderNetwork: {n.Config.Network.Name},
		wire.HeaderNode:    {n.Key.Address().Hex()},
		wire.HeaderKey:     {own.Public().String()},
	}
}

// Dial opens a WebSocket with the given headers and returns the HTTP status
// when that fails.
func (n *Node) Dial(t testing.TB, h http.Header, own *wire.Secret) (*Session, int, error) {
	t.Helper()
	d := websocket.Dialer{TLSClientConfig: n.TLS, Subprotocols: []string{wire.Subprotocol}, HandshakeTimeout: Patience}
	conn, res, err := d.Dial("ws"+strings.TrimPrefix(n.URL, "http")+wire.SessionPath, h)
	if err != nil {
		if res != nil {
			return nil, res.StatusCode, err
		}
		return nil, 0, err
	}
	t.Cleanup(func() { _ = conn.Close() })
	theirs, err := wire.ParsePublicKey(res.Header.Get(wire.HeaderKey))
	if err != nil {
		return nil, res.StatusCode, err
	}
	agreed, err := own.Agree(n.Config.Network.Name, n.Key.Address(), own.Public(), theirs)
	if err != nil {
		return nil, res.StatusCode, err
	}
	s := &Session{t: t, Node: n, Conn: conn, Agreed: agreed}
	conn.SetReadLimit(wire.MaxFrame)
	s.sealer = wire.NewSealer(n.Key, agreed, wire.ToNetwork, time.Now)
	s.opener = wire.NewOpener(func(a evm.Address) bool { return a == n.Config.Network.MessageKeys[0] }, agreed, wire.ToNode, time.Minute)
	return s, res.StatusCode, nil
}

// Connect opens a session, says hello and sends the record of the sandbox.
func (n *Node) Connect(t testing.TB) *Session {
	t.Helper()
	own := wire.NewSecret()
	s, status, err := n.Dial(t, n.Headers(own), own)
	if err != nil {
		t.Fatalf("session: status %d, %v", status, err)
	}
	s.Send(&wire.Hello{Agent: "nodetest", Config: n.Digest, Count: counter.Add(1)})
	Expect[*wire.Welcome](s)
	if n.Sandbox != nil {
		s.Send(&wire.Sandbox{Sandbox: n.Sandbox})
		s.began = n.Sandbox.Digest()
	}
	return s
}

// Ready opens a session and waits until the node may get jobs.
func (n *Node) Ready(t testing.TB) *Session {
	t.Helper()
	s := n.Connect(t)
	s.Send(n.Heartbeat())
	for {
		if st := Expect[*wire.Status](s); st.Routable {
			return s
		} else if st.Reason != "" && !strings.HasPrefix(st.Reason, "it broke the protocol") {
			t.Fatalf("not routable: %s", st.Reason)
		}
	}
}

// Heartbeat is one of a healthy node with the configuration's slots.
func (n *Node) Heartbeat() *wire.Heartbeat {
	m := n.Config.Models[0]
	return &wire.Heartbeat{
		Config:  n.Digest,
		Models:  []wire.ModelState{{Name: m.Name, Version: m.Version, Digest: m.Digest(), State: "active"}},
		Runtime: wire.RuntimeState{State: "active", Engine: "llamacpp", Image: n.Config.Runtime.Image.Digest()},
		Slots:   n.Config.Runtime.Settings.Slots,
		Class:   n.Class,
	}
}

// Send sends a message.
func (s *Session) Send(m wire.Message) {
	s.t.Helper()
	frame, err := s.sealer.Seal(nil, m)
	if err != nil {
		s.t.Fatal(err)
	}
	s.SendRaw(frame)
}

// SendPart sends the first half of a message's frame; the other never comes.
func (s *Session) SendPart(m wire.Message) {
	s.t.Helper()
	frame, err := s.sealer.Seal(nil, m)
	if err != nil {
		s.t.Fatal(err)
	}
	w, err := s.Conn.NextWriter(websocket.BinaryMessage)
	if err == nil {
		_, err = w.Write(frame[:len(frame)/2])
	}
	if err != nil {
		s.t.Fatal(err)
	}
}

// TrySend is Send where the network may have ended the session already.
func (s *Session) TrySend(m wire.Message) error {
	frame, err := s.sealer.Seal(nil, m)
	if err != nil {
		return err
	}
	_ = s.Conn.SetWriteDeadline(time.Now().Add(Patience))
	return s.Conn.WriteMessage(websocket.BinaryMessage, frame)
}

// SendRaw sends any bytes as a frame.
func (s *Session) SendRaw(frame []byte) {
	s.t.Helper()
	_ = s.Conn.SetWriteDeadline(time.Now().Add(Patience))
	if err := s.Conn.WriteMessage(websocket.BinaryMessage, frame); err != nil {
		s.t.Fatal(err)
	}
}

// Receive returns the next message. That the record has come which the session began
// with is passed over.
func (s *Session) Receive() (wire.Message, error) {
	for {
		_ = s.Conn.SetReadDeadline(time.Now().Add(Patience))
		_, frame, err := s.Conn.ReadMessage()
		if err != nil {
			return nil, err
		}
		m, err := s.opener.Open(frame, time.Now())
		if a, ok := m.(*wire.SandboxAck); ok && err == nil && a.Digest == s.began {
			s.began = digest.Digest{}
			continue
		}
		return m, err
	}
}

// Expect returns the next message of type M. Bound, Status, Update and LeavesAck
// come at any time and are passed over unless asked for.
func Expect[M wire.Message](s *Session) M {
	s.t.Helper()
	for {
		m, err := s.Receive()
		if err != nil {
			s.t.Fatalf("waiting for %T: %v", *new(M), err)
		}
		switch v := m.(type) {
		case M:
			return v
		case *wire.Bound, *wire.Status, *wire.Update, *wire.LeavesAck:
		default:
			s.t.Fatalf("got %T %+v, want %T", m, m, *new(M))
		}
	}
}

// Closed waits until the network has ended the session and returns the code.
func (s *Session) Closed() int {
	s.t.Helper()
	return s.Ended().Code
}

// Ended is Closed, with the reason that the network has given.
func (s *Session) Ended() *websocket.CloseError {
	s.t.Helper()
	for {
		_, err := s.Receive()
		if c := new(websocket.CloseError); errors.As(err, &c) {
			return c
		}
		if err != nil {
			s.t.Fatalf("session ended without a close frame: %v", err)
		}
	}
}

// Drop cuts the connection without a word.
func (s *Session) Drop() { _ = s.Conn.NetConn().Close() }

// Take waits for a job and accepts it.
func (s *Session) Take() *wire.Job {
	s.t.Helper()
	j := Expect[*wire.Job](s)
	s.Send(&wire.Accept{Job: j.ID})
	return j
}

// Finish sends the honest result of a job and waits for its acknowledgement.
func (s *Session) Finish(j *wire.Job, text string) {
	s.t.Helper()
	s.Send(s.Node.Result(s.t, j, Body(j, text), nil))
	if a := Expect[*wire.Ack](s); len(a.Jobs) != 1 || a.Jobs[0] != j.ID {
		s.t.Fatalf("acknowledged %v, want %s", a.Jobs, j.ID)
	}
}

// Result makes the result of a job with response as it is. change, if not nil,
// may falsify the receipt before it is signed.
func (n *Node) Result(t testing.TB, j *wire.Job, response []byte, change func(*receipt.Receipt)) *wire.Result {
	t.Helper()
	now := uint64(time.Now().UnixMilli())
	r := receipt.Receipt{
		Job: j.ID, Node: n.Key.Address(),
		Measured: receipt.Measured{
			ConfigDigest: n.Digest, ImageDigest: n.Config.Runtime.Image.Digest(), ModelDigest: n.Config.Models[0].Digest(), SandboxDigest: receipt.Unknown,
			RequestHash: digest.Of(j.Request), ResponseHash: digest.Of(response),
		},
		Claimed:  receipt.Claimed{ClassDigest: receipt.Unknown, PromptTokens: 7, CompletionTokens: 3, StartedAt: now, FinishedAt: now},
		Sequence: counter.Add(1),
	}
	if n.Class != nil {
		r.Claimed.ClassDigest = n.Class.Digest
	}
	if n.Sandbox != nil {
		r.Measured.SandboxDigest = n.Sandbox.Digest()
	}
	if change != nil {
		change(&r)
	}
	return &wire.Result{Job: j.ID, Response: response, Receipt: n.Sign(t, r, n.Config.Network.ChainID)}
}

// Sign signs a receipt for any chain.
func (n *Node) Sign(t testing.TB, r receipt.Receipt, chain uint64) *receipt.Signed {
	t.Helper()
	signed, err := r.Sign(chain, n.Key)
	if err != nil {
		t.Fatal(err)
	}
	return &signed
}

// Body is the response that an honest node writes, plain or as a stream with
// one event per word.
func Body(j *wire.Job, text string) []byte {
	id, object := "chatcmpl-"+j.ID.String(), "chat.completion"
	if j.Kind == wire.KindCompletion {
		id, object = "cmpl-"+j.ID.String(), "text_completion"
	}
	head := fmt.Sprintf(`{"id":%q,"object":%q,"created":%d,"model":%q`, id, object, j.Created, j.Model)
	if !j.Stream {
		return fmt.Appendf(nil, `%s,"choices":[{"index":0,"message":{"role":"assistant","content":%q},"text":%q,"finish_reason":"stop"}],"usage":{"prompt_tokens":7,"completion_tokens":3,"total_tokens":10}}`, head, text, text)
	}
	head = strings.Replace(head, `"chat.completion"`, `"chat.completion.chunk"`, 1)
	var b []byte
	for i, word := range strings.SplitAfter(text, " ") {
		role := ""
		if i == 0 {
			role = `"role":"assistant",`
		}
		b = fmt.Appendf(b, "data: %s,\"choices\":[{\"index\":0,\"delta\":{%s\"content\":%q},\"text\":%q,\"finish_reason\":null}]}\n\n", head, role, word, word)
	}
	b = fmt.Appendf(b, "data: %s,\"choices\":[{\"index\":0,\"delta\":{},\"text\":\"\",\"finish_reason\":\"stop\"}]}\n\n", head)
	return append(b, "data: [DONE]\n\n"...)
}

// Fatalf fails the session's test.
func (s *Session) Fatalf(format string, args ...any) {
	s.t.Helper()
	s.t.Fatalf(format, args...)
}
