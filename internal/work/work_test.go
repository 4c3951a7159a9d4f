package work

import (
	"bytes"
	"cmp"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	mathrand "math/rand/v2"
	"os"
	"path/filepath"
	"runtime/pprof"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/theupdateframework/go-tuf/v2/metadata"
	"github.com/theupdateframework/go-tuf/v2/metadata/trustedmetadata"

	"github.com/resultity/node/internal/chunk"
	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/evm"
	"github.com/resultity/node/internal/openai"
	"github.com/resultity/node/internal/receipt"
	"github.com/resultity/node/internal/runtime"
	"github.com/resultity/node/internal/signer"
	"github.com/resultity/node/internal/snapshot"
	"github.com/resultity/node/internal/state"
	"github.com/resultity/node/internal/wire"
)

// TestMain fails when a test leaves a goroutine behind.
func TestMain(m *testing.M) {
	if os.Getenv(peersVariable) != "" { // a benchmark has started this program again
		if err := runPeers(); err != nil {
			fmt.Fprintln(os.Stderr, "peers:", err)
			os.Exit(1)
		}
		return
	}
	code := m.Run()
	if code == 0 {
		code = leaks()
	}
	os.Exit(code)
}

func leaks() int {
	var b bytes.Buffer
	for range 6000 { // what is ending may take a moment, on a busy machine a minute
		b.Reset()
		_ = pprof.Lookup("goroutine").WriteTo(&b, 2)
		if !strings.Contains(b.String(), "internal/work.(") {
			return 0
		}
		time.Sleep(10 * time.Millisecond)
	}
	fmt.Fprintf(os.Stderr, "goroutines left:\n%s\n", b.Bytes())
	return 1
}

// Text that must never be in a log.
const (
	prompt = "SECRET-PROMPT"
	answer = "SECRET-ANSWER" + end

	end = "data: [DONE]\n\n" // of a stream
)

// engineWords are in errors of the engine's, and not for the network.
const engineWords = "ENGINE-WORDS"

// config is a configuration of two slots.
func config() *snapshot.Config {
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		panic(err)
	}
	der, err := x509.MarshalPKIXPublicKey(&k.PublicKey)
	if err != nil {
		panic(err)
	}
	image, err := snapshot.ParseImageRef("registry.test/runtime@" + digest.Of([]byte("image")).String())
	if err != nil {
		panic(err)
	}
	return &snapshot.Config{
		Schema:     1,
		Network:    snapshot.Network{Name: "testnet", ChainID: 31337, MessageKeys: []evm.Address{{1}}, Heartbeat: 1, Window: 3, ClockWindow: 5},
		Limits:     snapshot.Limits{RequestBytes: 4096, ResponseBytes: 200 << 10, Tokens: 100, Messages: 2, Deadline: 30, ResultTTL: 3600},
		Logs:       snapshot.Logs{Interval: 900, BatchBytes: 64 << 10},
		ImageTrust: snapshot.ImageTrust{Keys: []string{string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}))}},
		Models: []snapshot.Model{{Name: "tiny", Version: "1", Format: "gguf", Files: []snapshot.File{{
			Path: "tiny.gguf", Size: 4, SHA256: digest.Of([]byte("tiny")), Chunks: snapshot.Chunks{Root: digest.FromSum(chunk.Hash([]byte("tiny")))}, Sources: []string{"https://models.test/tiny.gguf"},
		}}}},
		Runtime: snapshot.Runtime{
			Engine: snapshot.LlamaCpp, Image: image, Model: "tiny", Settings: snapshot.Settings{Context: 1024, Slots: 2},
			Devices: []string{}, TmpBytes: 1 << 20, ShmBytes: 1 << 20, StartTimeout: 10, Watchdog: 5, Stall: 5, StopTimeout: 5,
		},
		Validation: snapshot.Validation{Golden: []snapshot.Golden{{Name: "hello", Prompt: "Hello", Answers: []string{"Hi"}, Tokens: 8, Timeout: 10}}},
	}
}

// verified makes a snapshot, as the network's keys would have signed it.
func verified(t testing.TB, c *snapshot.Config) *snapshot.Snapshot {
	t.Helper()
	raw, err := json.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	targets := metadata.Targets(time.Now().Add(time.Hour))
	if targets.Signed.Targets[snapshot.Target], err = metadata.TargetFile().FromBytes(snapshot.Target, raw, "sha256"); err != nil {
		t.Fatal(err)
	}
	s, err := snapshot.Open(&trustedmetadata.TrustedMetadata{
		Root:      metadata.Root(time.Now().Add(time.Hour)),
		Timestamp: metadata.Timestamp(time.Now().Add(time.Hour)),
		Snapshot:  metadata.Snapshot(time.Now().Add(time.Hour)),
		Targets:   map[string]*metadata.Metadata[metadata.TargetsType]{"targets": targets},
	}, raw)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// script is an engine that does what a test says.
type script func(ctx context.Context, j runtime.Job, emit func([]byte) error) (runtime.Result, error)

func (s script) Run(ctx context.Context, j runtime.Job, emit func([]byte) error) (runtime.Result, error) {
	if j.Sent != nil {
		if err := j.Sent(); err != nil {
			return runtime.Result{}, err
		}
	}
	return s(ctx, j, emit)
}

var usage = openai.Usage{PromptTokens: 3, CompletionTokens: 4}

// inRecord is the record of the sandbox.
func inRecord() digest.Digest { return digest.Of([]byte("sandbox")) }

// say answers at once, in three pieces if it is a stream.
func say(body string) script {
	return func(_ context.Context, _ runtime.Job, emit func([]byte) error) (runtime.Result, error) {
		if emit != nil {
			buf := make([]byte, len(body)) // used again, as a client does
			for _, piece := range []string{body[:len(body)/3], body[len(body)/3 : len(body)/2], body[len(body)/2:]} {
				if err := emit(buf[:copy(buf, piece)]); err != nil {
					return runtime.Result{}, err
				}
			}
		}
		return runtime.Result{Body: []byte(body), Usage: usage}, nil
	}
}

// hang works until it is told to stop.
func hang(ctx context.Context, _ runtime.Job, _ func([]byte) error) (runtime.Result, error) {
	<-ctx.Done()
	return runtime.Result{}, fmt.Errorf("engine: answer: %w", context.Cause(ctx))
}

// node is a worker with all that it needs, and the network's side of it.
type node struct {
	t      testing.TB
	path   string
	state  *state.Store
	store  store // state, or something around it
	key    *evm.Key
	active *Active
	worker *Worker
	log    *bytes.Buffer
	now    func() time.Time

	suspect func(*Active, string)

	mu      sync.Mutex
	sent    []wire.Message
	sending func(wire.Message) error // before a message counts as sent; nil: fine
}

func newNode(t testing.TB, e script) *node {
	t.Helper()
	key, err := evm.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	n := &node{t: t, path: filepath.Join(t.TempDir(), "jobs"), key: key, log: new(bytes.Buffer), now: time.Now}
	n.open()
	n.active = &Active{Snapshot: verified(t, config()), Image: digest.Of([]byte("image")), Model: digest.Of([]byte("model")), Class: digest.Of([]byte("class")), Sandbox: inRecord, Engine: e}
	t.Cleanup(func() {
		_ = n.state.Close()
		if s := n.log.String(); strings.Contains(s, prompt) || strings.Contains(s, answer) {
			t.Errorf("the log has text of a prompt or an answer:\n%s", s)
		}
	})
	return n
}

func (n *node) open() {
	n.t.Helper()
	s, err := state.Open(n.path, state.Bounds{}, time.Now)
	if err != nil {
		n.t.Fatal(err)
	}
	n.state, n.store = s, s
}

// start runs a new worker and returns what ends it.
func (n *node) start() (stop func() error) {
	n.t.Helper()
	n.worker = New(Config{Store: n.store, Key: signer.NewLocal(n.key, nil), Send: n.send, Suspect: n.suspect, Log: slog.New(slog.NewTextHandler(n.log, &slog.HandlerOptions{Level: slog.LevelDebug})), Now: n.now})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- n.worker.Run(ctx) }()
	stop = sync.OnceValue(func() error {
		cancel()
		return <-done
	})
	n.t.Cleanup(func() { _ = stop() })
	synctest.Wait() // it runs
	return stop
}

func (n *node) begin(a *Active) (stop func() error) {
	n.t.Helper()
	stop = n.start()
	n.worker.SetActive(a)
	return stop
}

// anew is a deployment that has been validated once more.
func anew(a *Active) *Active {
	return &Active{Snapshot: a.Snapshot, Image: a.Image, Model: a.Model, Class: a.Class, Sandbox: a.Sandbox, Engine: a.Engine}
}

func (n *node) send(m wire.Message) error {
	n.mu.Lock()
	f := n.sending
	n.mu.Unlock()
	if f != nil {
		if err := f(m); err != nil {
			return err
		}
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.sent = append(n.sent, m)
	return nil
}

func (n *node) onSend(f func(wire.Message) error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.sending = f
}

// said returns what has been sent when nothing moves any more, and forgets it.
func (n *node) said() []wire.Message {
	n.t.Helper()
	synctest.Wait()
	n.mu.Lock()
	defer n.mu.Unlock()
	s := n.sent
	n.sent = nil
	return s
}

// expect is said, by type.
func (n *node) expect(types ...wire.Type) []wire.Message {
	n.t.Helper()
	said := n.said()
	var got []wire.Type
	for _, m := range said {
		got = append(got, m.Type())
	}
	if !slices.Equal(got, types) {
		n.t.Fatalf("the node says %v, want %v", got, types)
	}
	return said
}

// refused is said to be one refusal with the code.
func (n *node) refused(code wire.Code) {
	n.t.Helper()
	r := n.expect("refuse")[0].(*wire.Refuse)
	if r.Code != code || r.Message == "" {
		n.t.Fatalf("refused with %s (%s), want %s", r.Code, r.Message, code)
	}
}

// failed is said to be a result with the code, after what else is said.
func (n *node) failed(code wire.Code, before ...wire.Type) *wire.Result {
	n.t.Helper()
	said := n.expect(append(before, "result")...)
	r := said[len(said)-1].(*wire.Result)
	if r.Code != code || r.Message == "" || strings.Contains(r.Message, engineWords) || r.Response != nil || r.Receipt != nil {
		n.t.Fatalf("result with code %q (%s), want %s alone", r.Code, r.Message, code)
	}
	return r
}

func (n *node) job(stream bool) *wire.Job {
	return &wire.Job{
		ID: receipt.NewJobID(), Model: "tiny", Kind: wire.KindChat, Stream: stream,
		Request: fmt.Appendf(nil, `{"model":"tiny","stream":%v,"messages":[{"role":"user","content":%q}]}`, stream, prompt),
		Seed:    7, Created: time.Now().Unix(), Deadline: time.Now().Add(20 * time.Second).UnixMilli(), Config: n.active.Snapshot.Digest(),
	}
}

// answered checks a result that carries an answer.
func (n *node) answered(j *wire.Job, m wire.Message, body string) {
	n.t.Helper()
	r, ok := m.(*wire.Result)
	if !ok || r.Job != j.ID || r.Code != "" || string(r.Response) != body || r.Receipt == nil {
		n.t.Fatalf("not the answer: %+v", m)
	}
	got := r.Receipt.Receipt()
	want := receipt.Receipt{
		Job: j.ID, Node: n.key.Address(),
		Measured: receipt.Measured{
			ConfigDigest: j.Config, ImageDigest: n.active.Image, ModelDigest: n.active.Model, SandboxDigest: inRecord(),
			RequestHash: digest.Of(j.Request), ResponseHash: digest.Of([]byte(body)),
		},
		Claimed: receipt.Claimed{
			ClassDigest: cmp.Or(n.active.Class, receipt.Unknown), PromptTokens: 3, CompletionTokens: 4,
			StartedAt: got.Claimed.StartedAt, FinishedAt: got.Claimed.FinishedAt,
		},
		Sequence: got.Sequence,
	}
	if got != want || got.Sequence == 0 || got.Claimed.StartedAt == 0 || got.Claimed.FinishedAt < got.Claimed.StartedAt || r.Receipt.ChainID() != 31337 {
		n.t.Fatalf("receipt %+v, want %+v", got, want)
	}
	raw, err := json.Marshal(r.Receipt)
	if err != nil {
		n.t.Fatal(err)
	}
	if _, err := receipt.Verify(raw); err != nil {
		n.t.Fatal(err)
	}
}

func (n *node) status(want Status) {
	n.t.Helper()
	synctest.Wait()
	if got := n.worker.Status(); got != want {
		n.t.Fatalf("Status = %+v, want %+v", got, want)
	}
}

// bubble runs a test with a clock of its own.
func bubble(t *testing.T, f func(t *testing.T)) {
	t.Helper()
	synctest.Test(t, f)
}

func TestAJobFromEndToEnd(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := newNode(t, say(answer))
		n.begin(n.active)
		j := n.job(false)
		n.onSend(func(m wire.Message) error {
			switch known, err := n.state.Lookup(j.ID); {
			case err != nil:
				t.Error(err)
			case m.Type() == "accept" && known != state.Running:
				t.Errorf("accepted before it was written down: %v", known)
			case m.Type() == "result" && known != state.Done:
				t.Errorf("result sent before it was written down: %v", known)
			}
			return nil
		})
		n.worker.Job(j)
		said := n.expect("accept", "result")
		n.answered(j, said[1], answer)
		n.status(Status{Slots: 2, Outbox: 1})
		n.worker.Ack(&wire.Ack{Jobs: []receipt.JobID{j.ID, receipt.NewJobID()}})
		n.status(Status{Slots: 2})
		n.expect()
	})
}

// A receipt of a runtime that is in no class says so in its place.
func TestReceiptWithoutAClass(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := newNode(t, say(answer))
		n.active.Class = digest.Digest{}
		n.begin(n.active)
		j := n.job(false)
		n.worker.Job(j)
		n.answered(j, n.expect("accept", "result")[1], answer)
	})
}

func TestTheEngineIsAskedForWhatTheJobSays(t *testing.T) {
	bubble(t, func(t *testing.T) {
		var got runtime.Job
		n := newNode(t, func(_ context.Context, j runtime.Job, emit func([]byte) error) (runtime.Result, error) {
			if emit != nil {
				t.Error("chunks are wanted of what is no stream")
			}
			got = j
			return say(answer)(t.Context(), j, nil)
		})
		n.begin(n.active)
		j := n.job(false)
		n.worker.Job(j)
		n.expect("accept", "result")
		if got.ID != j.ID || got.Model != "tiny" || got.Created != j.Created || got.Seed != 7 || got.Tokens != 100 || got.ResponseBytes != 200<<10 || got.Request.Model != "tiny" {
			t.Errorf("the engine was asked for %+v", got)
		}
	})
}

// starting is an engine that says itself when it works on a request.
type starting func(ctx context.Context, j runtime.Job, emit func([]byte) error) (runtime.Result, error)

func (s starting) Run(ctx context.Context, j runtime.Job, emit func([]byte) error) (runtime.Result, error) {
	return s(ctx, j, emit)
}

// Writing down takes time, and the engine begins before; but until it is done
// nobody hears of it, and if it fails nobody ever does.
func TestTheEngineBeginsBeforeTheDisk(t *testing.T) {
	for name, fails := range map[string]bool{"and the disk is fine": false, "and the disk fails": true} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				disk, begun, ended := make(chan struct{}), false, false
				n := newNode(t, nil)
				n.active.Engine = starting(func(ctx context.Context, j runtime.Job, emit func([]byte) error) (runtime.Result, error) {
					begun = true
					if err := j.Sent(); err != nil {
						ended = true
						return runtime.Result{}, err
					}
					_ = emit([]byte("one "))
					time.Sleep(time.Second)
					_ = emit([]byte("two" + end))
					return runtime.Result{Body: []byte("one two" + end), Usage: usage}, nil
				})
				n.store = &broken{Store: n.state, accept: func(*wire.Job) error {
					<-disk
					if fails {
						return errors.New("input/output error")
					}
					return nil
				}}
				n.begin(n.active)
				j := n.job(true)
				n.worker.Job(j)
				n.worker.Job(j) // while it is not accepted
				n.expect()
				if !begun {
					t.Error("the engine waits for the disk")
				}
				close(disk)
				if fails {
					n.refused(wire.CodeStorage)
					if !ended {
						t.Error("the engine is not told")
					}
					n.status(Status{Slots: 2})
					time.Sleep(time.Minute)
					n.expect()
					return
				}
				n.expect("accept", "chunk")
				time.Sleep(time.Second)
				n.answered(j, n.expect("chunk", "result")[1], "one two"+end)
			})
		})
	}
}

// Every reason to refuse, one mended after the other: so this is their order too.
// lastRefusal returns the code and the reason of the last refusal in a log.
func lastRefusal(log string) string {
	_, line, _ := strings.Cut(log[max(0, strings.LastIndex(log, "job refused")):], " code=")
	line, _, _ = strings.Cut(line, "\n")
	return line
}

func TestAdmission(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := newNode(t, hang)
		good := n.job(false)
		bad := *good
		bad.Config, bad.Model, bad.Kind = digest.Of([]byte("other")), "other", "embedding"
		bad.Request, bad.Deadline = make([]byte, 4097), time.Now().UnixMilli()
		bad.Stream = true

		n.worker = New(Config{Store: n.store, Key: signer.NewLocal(n.key, nil), Send: n.send, Log: slog.New(slog.DiscardHandler), Now: time.Now})
		n.worker.Job(&bad)
		n.refused(wire.CodeNotReady)
		n.start()
		n.worker.Pause()
		try := func(code wire.Code) {
			t.Helper()
			before := strings.Count(n.log.String(), "job-refused")
			n.worker.Job(&bad)
			n.refused(code)
			t.Logf("expected: job-refused, %s; got: %s", code, lastRefusal(n.log.String()))
			if said := strings.Count(n.log.String(), "job-refused"); said != before+1 {
				t.Fatalf("%s: the journal has %d refusals more", code, said-before)
			}
			if known, err := n.state.Lookup(bad.ID); known != 0 || err != nil {
				t.Fatalf("a refused job is known: %v, %v", known, err)
			}
		}
		try(wire.CodeDraining)
		n.worker.Resume()
		try(wire.CodeNotReady)
		n.worker.SetActive(n.active)
		try(wire.CodeConfig)
		bad.Config = good.Config
		try(wire.CodeUnknownModel)
		bad.Model = good.Model
		try(wire.CodeBadRequest)
		bad.Kind = good.Kind
		try(wire.CodeLimit)
		bad.Request = bad.Request[1:]
		try(wire.CodeDeadline)
		bad.Deadline = time.Now().Add(35*time.Second + time.Millisecond).UnixMilli()
		try(wire.CodeLimit)
		bad.Deadline = time.Now().Add(35 * time.Second).UnixMilli()
		running := []*wire.Job{n.job(false), n.job(false)}
		for _, j := range running {
			n.worker.Job(j)
			n.expect("accept")
		}
		n.status(Status{Slots: 2, Busy: 2})
		try(wire.CodeBusy)
		n.worker.Cancel(&wire.Cancel{Job: running[0].ID})
		n.failed(wire.CodeCancelled)
		for request, code := range map[string]wire.Code{
			string(bad.Request):                            wire.CodeBadRequest, // zeros
			`{"model":"tiny","stream":true,"messages":[]}`: wire.CodeBadRequest,
			`{"model":"tiny","stream":true,"messages":[{"role":"user","content":"a"}],"tools":[]}`:                                                 wire.CodeBadRequest,
			`{"model":"tiny","stream":true,"messages":[{"role":"user","content":"a"}],"max_tokens":101}`:                                           wire.CodeLimit,
			`{"model":"tiny","stream":true,"messages":[` + strings.Repeat(`{"role":"user","content":"a"},`, 2) + `{"role":"user","content":"a"}]}`: wire.CodeLimit,
			`{"model":"other","stream":true,"messages":[{"role":"user","content":"a"}]}`:                                                           wire.CodeBadRequest,
			`{"model":"tiny","messages":[{"role":"user","content":"a"}]}`:                                                                          wire.CodeBadRequest,
		} {
			bad.Request = []byte(request)
			try(code)
		}
		n.status(Status{Slots: 2, Busy: 1, Outbox: 1}) // no refusal keeps a slot
		bad.Request = []byte(`{"model":"tiny","stream":true,"messages":[{"role":"user","content":"a"}]}`)
		n.worker.Job(&bad)
		n.expect("accept")
	})
}

// broken is a store that fails as a test says; the rest is real.
type broken struct {
	*state.Store
	accept func(*wire.Job) error
	finish func(*wire.Result) error
}

func (b *broken) Accept(j *wire.Job) (state.Known, error) {
	if b.accept != nil {
		if err := b.accept(j); err != nil {
			return 0, err
		}
	}
	return b.Store.Accept(j)
}

func (b *broken) Finish(r *wire.Result) error {
	if b.finish != nil {
		if err := b.finish(r); err != nil {
			return err
		}
	}
	return b.Store.Finish(r)
}

func TestStorageFails(t *testing.T) {
	full := fmt.Errorf("accept: %w", state.ErrFull)
	t.Run("full before acceptance", func(t *testing.T) {
		bubble(t, func(t *testing.T) {
			n := newNode(t, say(answer))
			b := &broken{Store: n.state, accept: func(*wire.Job) error { return full }}
			n.store = b
			n.begin(n.active)
			j := n.job(false)
			n.worker.Job(j)
			n.refused(wire.CodeStorage)
			n.status(Status{Slots: 2})
			b.accept = nil // there is room again
			n.worker.Job(j)
			n.expect("accept", "result")
		})
	})
	t.Run("broken before acceptance", func(t *testing.T) {
		bubble(t, func(t *testing.T) {
			n := newNode(t, say(answer))
			n.store = &broken{Store: n.state, accept: func(*wire.Job) error { return fmt.Errorf("accept: %w", state.ErrBroken) }}
			stop := n.begin(n.active)
			n.worker.Job(n.job(false))
			n.refused(wire.CodeStorage)
			if err := stop(); !errors.Is(err, state.ErrBroken) {
				t.Errorf("Run = %v, want ErrBroken", err)
			}
		})
	})
	t.Run("no room for the answer", func(t *testing.T) {
		bubble(t, func(t *testing.T) {
			n := newNode(t, say(answer))
			n.store = &broken{Store: n.state, finish: func(r *wire.Result) error {
				if r.Code == "" {
					return full
				}
				return nil
			}}
			n.begin(n.active)
			n.worker.Job(n.job(false))
			n.failed(wire.CodeStorage, "accept")
		})
	})
	t.Run("no room for anything, for a while", func(t *testing.T) {
		bubble(t, func(t *testing.T) {
			n := newNode(t, say(answer))
			back := time.Now().Add(time.Minute)
			n.store = &broken{Store: n.state, finish: func(*wire.Result) error {
				if time.Now().Before(back) {
					return full
				}
				return nil
			}}
			n.begin(n.active)
			n.worker.Job(n.job(false))
			n.expect("accept")
			time.Sleep(2 * time.Minute)
			n.failed(wire.CodeStorage)
		})
	})
	t.Run("no room for anything, until the stop", func(t *testing.T) {
		bubble(t, func(t *testing.T) {
			n := newNode(t, say(answer))
			n.store = &broken{Store: n.state, finish: func(*wire.Result) error { return full }}
			stop := n.begin(n.active)
			n.worker.Job(n.job(false))
			n.expect("accept")
			if err := stop(); err != nil {
				t.Errorf("Run = %v", err)
			}
			if jobs, err := n.state.Unfinished(); len(jobs) != 1 || err != nil {
				t.Errorf("Unfinished = %v, %v; want the job", jobs, err)
			}
		})
	})
	// What was promised cannot be kept by going on: start anew.
	t.Run("broken after acceptance", func(t *testing.T) {
		bubble(t, func(t *testing.T) {
			n := newNode(t, say(answer))
			eio := errors.New("input/output error")
			n.store = &broken{Store: n.state, finish: func(*wire.Result) error { return eio }}
			stop := n.begin(n.active)
			n.worker.Job(n.job(false))
			n.expect("accept")
			if err := stop(); !errors.Is(err, eio) {
				t.Errorf("Run = %v, want the store's error", err)
			}
		})
	})
}

func TestWhatTheEngineMayDo(t *testing.T) {
	fails := func(err error) script {
		return func(context.Context, runtime.Job, func([]byte) error) (runtime.Result, error) {
			return runtime.Result{}, err
		}
	}
	reports := func(_ context.Context, j runtime.Job, _ func([]byte) error) (runtime.Result, error) {
		a := openai.NewAssembler(j.Request.Kind, j.ID, j.Model, j.Created, false, false, j.ResponseBytes)
		_, err := a.Event([]byte(`{"error":{"code":500,"message":"` + engineWords + `"}}`))
		return runtime.Result{}, &runtime.EngineError{Op: "answer", Err: err}
	}
	counts := func(u openai.Usage) script {
		return func(context.Context, runtime.Job, func([]byte) error) (runtime.Result, error) {
			return runtime.Result{Body: []byte(answer), Usage: u}, nil
		}
	}
	for _, c := range []struct {
		name   string
		engine script
		want   wire.Code
	}{
		{"it counts more than its context", counts(openai.Usage{PromptTokens: 1025, CompletionTokens: 1}), wire.CodeOutput},
		{"it counts more than was allowed", counts(openai.Usage{PromptTokens: 1, CompletionTokens: 1 << 20}), wire.CodeOutput},
		{"it ends", fails(&runtime.EngineError{Op: "answer", Err: errors.New(engineWords)}), wire.CodeEngine},
		{"it refuses", fails(&openai.Error{Status: 400, Code: "refused_by_engine", Message: engineWords}), wire.CodeBadRequest},
		{"the prompt is too long for it", fails(&openai.Error{Status: 400, Code: openai.CodeContextLength, Message: engineWords}), wire.CodeContext},
		{"it breaks its API", fails(&openai.OutputError{Reason: openai.ReasonJSON, Detail: engineWords}), wire.CodeOutput},
		{"it reports an error", reports, wire.CodeEngine},
		{"anything else", fails(errors.New("strange")), wire.CodeEngine},
		{"it says nothing", say(""), wire.CodeOutput},
		{"it says too much", say(strings.Repeat("a", 200<<10+1)), wire.CodeOutput},
		{"it hangs", hang, wire.CodeDeadline},
		{"it knows of no deadline", func(ctx context.Context, _ runtime.Job, _ func([]byte) error) (runtime.Result, error) {
			<-ctx.Done()
			return runtime.Result{}, errors.New("strange")
		}, wire.CodeDeadline},
	} {
		t.Run(c.name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				n := newNode(t, c.engine)
				n.begin(n.active)
				start, j := time.Now(), n.job(false)
				n.worker.Job(j)
				if c.want == wire.CodeDeadline {
					n.expect("accept")
					time.Sleep(20*time.Second - time.Millisecond)
					n.expect()
					time.Sleep(time.Millisecond)
					n.failed(c.want)
				} else {
					n.failed(c.want, "accept")
					if time.Since(start) != 0 {
						t.Errorf("took %v", time.Since(start))
					}
				}
				n.status(Status{Slots: 2, Outbox: 1})
			})
		})
	}
	t.Run("its stream has no end", func(t *testing.T) {
		bubble(t, func(t *testing.T) {
			n := newNode(t, say("data: {}\n\n"))
			n.begin(n.active)
			n.worker.Job(n.job(true))
			said := n.said()
			if r, ok := said[len(said)-1].(*wire.Result); !ok || r.Code != wire.CodeOutput || r.Receipt != nil {
				t.Errorf("%+v, want a failure", said[len(said)-1])
			}
		})
	})
	t.Run("the job is of tomorrow", func(t *testing.T) {
		bubble(t, func(t *testing.T) {
			n := newNode(t, say(answer))
			n.begin(n.active)
			j := n.job(false)
			j.Created += 86400
			n.worker.Job(j)
			n.failed(wire.CodeInternal, "accept")
		})
	})
	t.Run("it streams one thing and answers another", func(t *testing.T) {
		bubble(t, func(t *testing.T) {
			n := newNode(t, func(_ context.Context, _ runtime.Job, emit func([]byte) error) (runtime.Result, error) {
				_ = emit([]byte("one"))
				return runtime.Result{Body: []byte("another")}, nil
			})
			n.begin(n.active)
			n.worker.Job(n.job(true))
			n.failed(wire.CodeOutput, "accept", "chunk")
		})
	})
}

// An engine that fails job after job gets no more of them until it has been
// looked at; what is not its fault does not count.
func TestSuspect(t *testing.T) {
	engineFails := &runtime.EngineError{Op: "ask", Status: 500}
	garbage := &openai.OutputError{Reason: openai.ReasonJSON, Detail: engineWords}
	refusal := &openai.Error{Status: 400, Code: "refused_by_engine"}
	endless := errors.New("endless") // until the deadline
	const long, short = 20 * time.Second, 2 * time.Second
	type step struct {
		err  error
		time time.Duration // until the deadline; 0 is long
	}
	fail, ok := step{err: engineFails}, step{}
	for _, c := range []struct {
		name    string
		steps   []step
		suspect bool
	}{
		{"three failures", []step{fail, {err: garbage}, fail}, true},
		{"without end", []step{{err: endless}, {err: endless}, {err: endless}}, true},
		{"a success between", []step{fail, fail, ok, fail, fail, ok}, false},
		{"requests that it refuses", []step{{err: refusal}, {err: refusal}, {err: refusal}, {err: refusal}}, false},
		{"a refusal between", []step{fail, fail, {err: refusal}, fail}, true},
		{"too little time", []step{{endless, short}, {endless, short}, {endless, short}, {endless, short}}, false},
		{"cancelled", []step{{err: errCancelled}, {err: errCancelled}, {err: errCancelled}}, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				var now step
				n := newNode(t, func(ctx context.Context, j runtime.Job, emit func([]byte) error) (runtime.Result, error) {
					switch {
					case now.err == nil:
						return say(answer)(ctx, j, emit)
					case errors.Is(now.err, endless), errors.Is(now.err, errCancelled):
						<-ctx.Done()
						return runtime.Result{}, context.Cause(ctx)
					}
					return runtime.Result{}, now.err
				})
				var told []string
				n.suspect = func(a *Active, why string) {
					if a != n.active {
						t.Error("another one is suspect")
					}
					told = append(told, why)
				}
				n.begin(n.active)
				for _, now = range c.steps {
					j := n.job(false)
					j.Deadline = time.Now().Add(cmp.Or(now.time, long)).UnixMilli()
					n.worker.Job(j)
					synctest.Wait()
					if errors.Is(now.err, errCancelled) {
						n.worker.Cancel(&wire.Cancel{Job: j.ID})
					}
					time.Sleep(long)
					n.expect("accept", "result")
				}
				if (len(told) == 1) != c.suspect || len(told) > 1 {
					t.Fatalf("told %q, want %t", told, c.suspect)
				}
				if !c.suspect {
					return
				}
				if strings.Contains(told[0], engineWords) {
					t.Error(told[0])
				}
				now = ok
				n.worker.Job(n.job(false))
				n.refused(wire.CodeNotReady)
				n.worker.SetActive(anew(n.active))
				n.worker.Job(n.job(false))
				n.expect("accept", "result")
			})
		})
	}
}

// A job that began before does not clear an engine that is suspect.
func TestSuspectStaysSuspect(t *testing.T) {
	bubble(t, func(t *testing.T) {
		release, first := make(chan struct{}), true
		n := newNode(t, func(ctx context.Context, j runtime.Job, emit func([]byte) error) (runtime.Result, error) {
			if first {
				first = false
				<-release
				return say(answer)(ctx, j, emit)
			}
			return runtime.Result{}, &runtime.EngineError{Op: "ask", Status: 500}
		})
		n.begin(n.active)
		n.worker.Job(n.job(false))
		n.expect("accept")
		for range suspectAfter {
			n.worker.Job(n.job(false))
			n.expect("accept", "result")
		}
		close(release)
		n.expect("result")
		n.worker.Job(n.job(false))
		n.refused(wire.CodeNotReady)
	})
}

func TestStream(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := newNode(t, say("data: "+answer))
		n.begin(n.active)
		j := n.job(true)
		n.worker.Job(j)
		said := n.said()
		if said[0].Type() != "accept" {
			t.Errorf("the node says %s first", said[0].Type())
		}
		n.answered(j, said[len(said)-1], "data: "+answer)
		if got := joined(t, said); got != "data: "+answer {
			t.Errorf("chunks %q", got)
		}
	})
}

// The network does not wait for the log.
func TestTheResultGoesOutFirst(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := newNode(t, say(answer))
		n.begin(n.active)
		n.onSend(func(m wire.Message) error {
			if m.Type() == "result" && strings.Contains(n.log.String(), "job done") {
				t.Error("it is logged before it is sent")
			}
			return nil
		})
		j := n.job(false)
		n.worker.Job(j)
		n.answered(j, n.expect("accept", "result")[1], answer)
		if !strings.Contains(n.log.String(), "job done") {
			t.Error("it is not logged")
		}
	})
}

// joined puts chunks together, each of which begins within or right behind what
// the ones before it have brought.
func joined(t testing.TB, said []wire.Message) string {
	t.Helper()
	var body []byte
	for _, m := range said {
		c, ok := m.(*wire.Chunk)
		if !ok {
			continue
		}
		if c.Offset < 0 || c.Offset > int64(len(body)) || len(c.Data) == 0 || len(c.Data) > maxChunk {
			t.Fatalf("chunk at %d of %d bytes behind %d", c.Offset, len(c.Data), len(body))
		}
		body = append(body[:c.Offset:c.Offset], c.Data...)
	}
	return string(body)
}

// A chunk that finds no room goes out with the next one; one that finds none at
// the end is in the result.
func TestStreamWithoutRoom(t *testing.T) {
	bubble(t, func(t *testing.T) {
		want := strings.Repeat("0123456789", 15_000) + end // more than two chunks hold
		n := newNode(t, func(_ context.Context, _ runtime.Job, emit func([]byte) error) (runtime.Result, error) {
			time.Sleep(time.Second) // the job is accepted
			for i := 0; i < len(want); i += 1000 {
				_ = emit([]byte(want[i:min(i+1000, len(want))]))
			}
			return runtime.Result{Body: []byte(want), Usage: usage}, nil
		})
		n.begin(n.active)
		chunks := 0
		n.onSend(func(m wire.Message) error {
			if m.Type() != "chunk" {
				return nil
			}
			if chunks++; chunks > 10 && chunks < 140 || chunks > 145 {
				return errors.New("no room")
			}
			return nil
		})
		j := n.job(true)
		n.worker.Job(j)
		n.expect("accept")
		time.Sleep(time.Second)
		said := n.said()
		if got := joined(t, said); !strings.HasPrefix(want, got) || len(got) < 130_000 {
			t.Errorf("chunks bring %d bytes", len(got))
		}
		if len(said) > 20 {
			t.Errorf("%d messages", len(said))
		}
		n.answered(j, said[len(said)-1], want)
	})
}

// The network asks again for what runs: it has lost the connection, and perhaps
// chunks.
func TestARunningJobArrivesAgain(t *testing.T) {
	bubble(t, func(t *testing.T) {
		goOn, runs := make(chan struct{}), 0
		n := newNode(t, func(_ context.Context, _ runtime.Job, emit func([]byte) error) (runtime.Result, error) {
			runs++
			_ = emit([]byte("one "))
			<-goOn
			_ = emit([]byte("two" + end))
			return runtime.Result{Body: []byte("one two" + end), Usage: usage}, nil
		})
		n.begin(n.active)
		j := n.job(true)
		n.worker.Job(j)
		n.expect("accept", "chunk")
		// Whatever has become of the node meanwhile.
		n.worker.SetActive(nil)
		n.worker.Pause()
		n.worker.Job(j)
		again := n.expect("accept", "chunk")
		if got := joined(t, again); got != "one " {
			t.Errorf("chunks %q, want all so far", got)
		}
		close(goOn)
		said := n.expect("chunk", "result")
		n.answered(j, said[1], "one two"+end)
		if runs != 1 {
			t.Errorf("it ran %d times", runs)
		}
	})
}

func TestOneIDManyTimesAtOnce(t *testing.T) {
	bubble(t, func(t *testing.T) {
		goOn, runs := make(chan struct{}), 0
		n := newNode(t, func(ctx context.Context, j runtime.Job, emit func([]byte) error) (runtime.Result, error) {
			runs++
			<-goOn
			return say(answer)(ctx, j, emit)
		})
		n.begin(n.active)
		j := n.job(false)
		var wg sync.WaitGroup
		for range 16 {
			wg.Go(func() { n.worker.Job(j) })
		}
		wg.Wait()
		said := n.said()
		for _, m := range said {
			if m.Type() != "accept" {
				t.Errorf("the node says %s", m.Type())
			}
		}
		if len(said) == 0 || runs != 1 {
			t.Errorf("accepted %d times, ran %d times", len(said), runs)
		}
		n.status(Status{Slots: 2, Busy: 1})
		close(goOn)
		n.answered(j, n.expect("result")[0], answer)
	})
}

// The result of a job is sent again whatever the node would say to a new one.
func TestADoneJobArrivesAgain(t *testing.T) {
	bubble(t, func(t *testing.T) {
		runs := 0
		n := newNode(t, func(ctx context.Context, j runtime.Job, emit func([]byte) error) (runtime.Result, error) {
			runs++
			return say(answer)(ctx, j, emit)
		})
		n.begin(n.active)
		j := n.job(false)
		n.worker.Job(j)
		n.expect("accept", "result")
		same := func() {
			t.Helper()
			n.worker.Job(j)
			n.answered(j, n.expect("result")[0], answer)
		}
		same()
		n.worker.Pause()
		same()
		n.worker.SetActive(nil)
		same()
		n.worker.Resume()
		time.Sleep(time.Hour) // past its deadline
		same()
		n.status(Status{Outbox: 1})

		n.worker.SetActive(n.active)
		n.worker.Ack(&wire.Ack{Jobs: []receipt.JobID{j.ID}})
		n.said()
		j.Deadline = time.Now().Add(time.Second).UnixMilli()
		n.worker.Job(j) // a second receipt for the same job is not signed
		n.refused(wire.CodeInternal)
		n.status(Status{Slots: 2})
		if runs != 1 {
			t.Errorf("it ran %d times", runs)
		}
	})
}

// A job that failed here may be given to this node once more.
func TestAFailedJobArrivesAgain(t *testing.T) {
	bubble(t, func(t *testing.T) {
		fails := true
		n := newNode(t, func(ctx context.Context, j runtime.Job, emit func([]byte) error) (runtime.Result, error) {
			if fails {
				return runtime.Result{}, errors.New("no")
			}
			return say(answer)(ctx, j, emit)
		})
		n.begin(n.active)
		j := n.job(false)
		n.worker.Job(j)
		n.failed(wire.CodeEngine, "accept")
		fails = false
		n.worker.Job(j)
		n.failed(wire.CodeEngine) // the same result: it has not been acknowledged
		n.worker.Ack(&wire.Ack{Jobs: []receipt.JobID{j.ID}})
		n.said()
		n.worker.Job(j)
		n.answered(j, n.expect("accept", "result")[1], answer)
	})
}

// A result that the disk spoils holds back no other one, and its operator learns of it.
func TestAResultThatCannotBeRead(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := newNode(t, say(answer))
		n.begin(n.active)
		jobs := []*wire.Job{n.job(false), n.job(false), n.job(false)}
		for _, j := range jobs {
			n.worker.Job(j)
			n.expect("accept", "result")
		}
		names, err := filepath.Glob(filepath.Join(n.path, "*"))
		if err != nil {
			t.Fatal(err)
		}
		spoilt := 0
		for _, name := range names {
			b, err := os.ReadFile(name)
			if err != nil {
				t.Fatal(err)
			}
			// The last record that begins with the job's id is its result.
			if at := bytes.LastIndex(b, jobs[0].ID[:]); at >= 0 {
				b[at+100] ^= 4
				f, err := os.OpenFile(name, os.O_WRONLY, 0)
				if err != nil {
					t.Fatal(err)
				}
				if _, err := f.WriteAt(b[at+100:at+101], int64(at+100)); err != nil {
					t.Fatal(err)
				}
				_ = f.Close()
				spoilt++
			}
		}
		if spoilt != 1 {
			t.Fatalf("%d results are spoilt", spoilt)
		}
		for range 2 {
			n.worker.Connected()
			said := n.expect("result", "result")
			n.answered(jobs[1], said[0], answer)
			n.answered(jobs[2], said[1], answer)
		}
		n.worker.Job(jobs[0])
		n.refused(wire.CodeInternal)
		log := n.log.String()
		if want := "level=ERROR msg=\"a result cannot be read and is not sent\""; strings.Count(log, want) != 1 || !strings.Contains(log, "job="+jobs[0].ID.String()) {
			t.Errorf("want once %s:\n%s", want, log)
		}
		n.status(Status{Slots: 2, Outbox: 3})
	})
}

func TestCancel(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := newNode(t, hang)
		n.begin(n.active)
		j := n.job(false)
		n.worker.Cancel(&wire.Cancel{Job: j.ID}) // unknown
		n.worker.Job(j)
		n.expect("accept")
		n.worker.Cancel(&wire.Cancel{Job: j.ID, Reason: "client left"})
		n.failed(wire.CodeCancelled)
		n.worker.Cancel(&wire.Cancel{Job: j.ID}) // done
		n.expect()
		n.status(Status{Slots: 2, Outbox: 1})
	})
}

// The network counts a slot as free when it has the result, and is quick.
func TestTheSlotIsFreeBeforeTheResultIsSent(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := newNode(t, say(answer))
		c := config()
		c.Runtime.Settings.Slots = 1
		n.active.Snapshot = verified(t, c)
		n.begin(n.active)
		left := 5
		n.onSend(func(m wire.Message) error {
			if m.Type() == "result" && left > 0 {
				left--
				n.worker.Job(n.job(false))
			}
			return nil
		})
		n.worker.Job(n.job(false))
		for _, m := range n.said() {
			if m.Type() == "refuse" {
				t.Fatalf("refused: %+v", m)
			}
		}
		n.status(Status{Slots: 1, Outbox: 6})
	})
}

// Jobs that run keep their terms; new ones get the new.
func TestTerms(t *testing.T) {
	bubble(t, func(t *testing.T) {
		goOn := make(chan struct{})
		n := newNode(t, func(ctx context.Context, j runtime.Job, emit func([]byte) error) (runtime.Result, error) {
			<-goOn
			return say(answer)(ctx, j, emit)
		})
		n.begin(n.active)
		j := n.job(false)
		n.worker.Job(j)
		n.expect("accept")
		c := config()
		c.Limits.Tokens++
		n.worker.SetActive(&Active{Snapshot: verified(t, c), Image: digest.Of([]byte("x")), Model: digest.Of([]byte("y")), Sandbox: inRecord, Engine: script(hang)})
		close(goOn)
		n.answered(j, n.expect("result")[0], answer)
		n.worker.Job(n.job(false))
		n.refused(wire.CodeConfig)
	})
}

func TestPauseIdleDrain(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := newNode(t, hang)
		n.begin(n.active)
		j := n.job(false)
		n.worker.Job(j)
		n.expect("accept")
		n.worker.Pause()
		n.status(Status{Slots: 2, Busy: 1, Draining: true, Paused: true})
		n.worker.Job(n.job(false))
		n.refused(wire.CodeDraining)
		n.worker.Hold(true) // the network does, too
		n.worker.Resume()
		n.status(Status{Slots: 2, Busy: 1, Draining: true})
		n.worker.Job(n.job(false))
		n.refused(wire.CodeDraining)
		n.worker.Hold(false)
		n.status(Status{Slots: 2, Busy: 1})

		for name, wait := range map[string]func(context.Context) error{"Idle": n.worker.Idle, "Drain": n.worker.Drain} {
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			if err := wait(ctx); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("%s = %v while a job runs", name, err)
			}
			cancel()
		}
		n.worker.Resume() // not after Drain
		n.worker.Job(n.job(false))
		n.refused(wire.CodeDraining)
		idle, drained := make(chan error, 1), make(chan error, 1)
		go func() { idle <- n.worker.Idle(t.Context()) }()
		go func() { drained <- n.worker.Drain(t.Context()) }()
		// A result that waits for room is on its way only when it has found it.
		release := make(chan struct{})
		n.onSend(func(wire.Message) error { <-release; return nil })
		n.worker.Cancel(&wire.Cancel{Job: j.ID})
		if err := <-idle; err != nil {
			t.Error(err)
		}
		synctest.Wait()
		if len(drained) != 0 {
			t.Error("drained before the result was sent")
		}
		close(release)
		if err := <-drained; err != nil {
			t.Error(err)
		}
		n.failed(wire.CodeCancelled)
	})
}

// A stop cuts jobs short; the next start runs them again and there is one
// result in the end.
func TestRestart(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := newNode(t, hang)
		stop := n.begin(n.active)
		plain, stream := n.job(false), n.job(true)
		n.worker.Job(plain)
		n.expect("accept")
		n.worker.Job(stream)
		n.expect("accept")
		if err := stop(); err != nil {
			t.Fatalf("Run = %v", err)
		}
		n.expect()
		n.worker.Job(plain)
		n.refused(wire.CodeNotReady)

		again := func() func() error {
			if err := n.state.Close(); err != nil {
				t.Fatal(err)
			}
			n.open()
			return n.start()
		}
		stop = again()
		n.expect()
		n.worker.Job(plain) // before the terms are active again
		n.expect("accept")
		n.status(Status{})
		if err := stop(); err != nil { // and once more, while they wait
			t.Fatalf("Run = %v", err)
		}

		again()
		n.active.Engine = say(answer)
		n.worker.SetActive(n.active)
		var results []wire.Message
		for _, m := range n.said() {
			if m.Type() == "result" {
				results = append(results, m)
			}
		}
		if len(results) != 2 {
			t.Fatalf("%d results, want 2", len(results))
		}
		for _, m := range results {
			j := plain
			if m.(*wire.Result).Job == stream.ID {
				j = stream
			}
			n.answered(j, m, answer)
		}
		n.status(Status{Slots: 2, Outbox: 2})
	})
}

// interrupted makes a node that was stopped while jobs ran.
func interrupted(t *testing.T, jobs int) (*node, []*wire.Job) {
	n := newNode(t, hang)
	stop := n.begin(n.active)
	var list []*wire.Job
	for range jobs {
		j := n.job(false)
		if known, err := n.state.Accept(j); known != state.New || err != nil {
			t.Fatal(known, err)
		}
		list = append(list, j)
	}
	if err := stop(); err != nil {
		t.Fatal(err)
	}
	return n, list
}

func TestRestartIntoAnotherConfiguration(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n, _ := interrupted(t, 1)
		n.start()
		c := config()
		c.Limits.Tokens++
		n.worker.SetActive(&Active{Snapshot: verified(t, c), Sandbox: inRecord, Engine: say(answer)})
		n.failed(wire.CodeConfig)
		n.status(Status{Slots: 2, Outbox: 1})
	})
}

func TestRestartPastTheDeadline(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n, _ := interrupted(t, 1)
		time.Sleep(10 * time.Second)
		stop := n.start()
		time.Sleep(10*time.Second - time.Millisecond)
		n.expect()
		time.Sleep(time.Millisecond) // never active within it
		n.failed(wire.CodeDeadline)
		_ = stop()

		n, _ = interrupted(t, 1)
		time.Sleep(time.Hour)
		n.begin(n.active)
		n.failed(wire.CodeDeadline)
	})
}

func TestRestartKeepsToTheSlots(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n, jobs := interrupted(t, 5)
		goOn := make(chan struct{})
		n.active.Engine = script(func(ctx context.Context, j runtime.Job, emit func([]byte) error) (runtime.Result, error) {
			<-goOn
			return say(answer)(ctx, j, emit)
		})
		n.begin(n.active)
		n.status(Status{Slots: 2, Busy: 2})
		waiting := jobs[0]
		for _, j := range jobs {
			if k := n.worker.jobs[j.ID]; k != nil && k.stream == nil {
				waiting = j
			}
		}
		n.worker.Job(n.job(false))
		n.refused(wire.CodeBusy)
		n.worker.Cancel(&wire.Cancel{Job: waiting.ID}) // whether it waits or runs
		close(goOn)
		synctest.Wait()
		n.status(Status{Slots: 2, Outbox: 5})
	})
}

func TestCancelWhileWaitingForTerms(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n, jobs := interrupted(t, 1)
		n.start()
		n.worker.Cancel(&wire.Cancel{Job: jobs[0].ID})
		n.failed(wire.CodeCancelled)
	})
}

func TestDrainDoesNotWaitForTerms(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n, _ := interrupted(t, 3)
		n.start()
		if err := n.worker.Drain(t.Context()); err != nil {
			t.Error(err)
		}
		if jobs, err := n.state.Unfinished(); len(jobs) != 3 || err != nil {
			t.Errorf("Unfinished = %v, %v; want three", jobs, err)
		}
		n.expect()
	})
}

// The agent is killed after the engine has answered and before the network has
// acknowledged: the same result is delivered, and nothing runs again.
func TestKilledBeforeTheAck(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := newNode(t, say(answer))
		stop := n.begin(n.active)
		n.onSend(func(m wire.Message) error { return errors.New("not connected") })
		var jobs []*wire.Job
		for range 5 {
			j := n.job(false)
			n.worker.Job(j)
			synctest.Wait()
			jobs = append(jobs, j)
		}
		n.expect()
		_ = stop()
		if err := n.state.Close(); err != nil {
			t.Fatal(err)
		}
		n.open()
		n.active.Engine = script(func(context.Context, runtime.Job, func([]byte) error) (runtime.Result, error) {
			t.Error("it ran again")
			return runtime.Result{}, errors.New("again")
		})
		n.begin(n.active)
		n.onSend(nil)
		for range 2 { // each session begins with all of them, in order
			n.worker.Connected()
			said := n.expect("result", "result", "result", "result", "result")
			for i, j := range jobs {
				n.answered(j, said[i], answer)
			}
		}
		n.worker.Ack(&wire.Ack{Jobs: []receipt.JobID{jobs[0].ID, jobs[2].ID}})
		synctest.Wait()
		n.worker.Connected()
		n.answered(jobs[1], n.expect("result", "result", "result")[0], answer)
	})
}

// A clock that is set while the engine works makes no receipt that ends before it
// begins, or in a time to come, which the network would count as a violation.
func TestTheClockIsSet(t *testing.T) {
	for _, by := range []time.Duration{time.Hour, -time.Hour} {
		bubble(t, func(t *testing.T) {
			n := newNode(t, say(answer))
			var ahead atomic.Int64
			n.active.Engine = script(func(ctx context.Context, j runtime.Job, emit func([]byte) error) (runtime.Result, error) {
				ahead.Store(int64(by))
				time.Sleep(3 * time.Second)
				return say(answer)(ctx, j, emit)
			})
			n.now = func() time.Time { return time.Now().Add(time.Duration(ahead.Load())) }
			n.begin(n.active)
			begun := uint64(time.Now().UnixMilli())
			j := n.job(false)
			n.worker.Job(j)
			n.expect("accept")
			time.Sleep(3 * time.Second)
			m := n.expect("result")[0]
			n.answered(j, m, answer)
			if got := m.(*wire.Result).Receipt.Receipt().Claimed; got.StartedAt != begun || got.FinishedAt != begun+3000 {
				t.Errorf("clock set by %v: from %d to %d, want %d and three seconds", by, got.StartedAt, got.FinishedAt, begun)
			}
		})
	}
}

func TestASessionBeforeRun(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := newNode(t, hang)
		j := n.job(false)
		if _, err := n.state.Accept(j); err != nil {
			t.Fatal(err)
		}
		if err := n.state.Finish(&wire.Result{Job: j.ID, Code: wire.CodeEngine, Message: "m"}); err != nil {
			t.Fatal(err)
		}
		n.worker = New(Config{Store: n.store, Key: signer.NewLocal(n.key, nil), Send: n.send, Log: slog.New(slog.DiscardHandler), Now: time.Now})
		n.worker.Connected()
		n.expect()
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		wg.Go(func() { _ = n.worker.Run(ctx) })
		n.failed(wire.CodeEngine)
		cancel()
		wg.Wait()
	})
}

// Results are dropped only while the clock is known to be right.
// With the network gone the node finishes what it has and keeps the results, over
// their time to live too, since nothing says that the clock is right. At the
// store's bound it refuses more; what it has kept is delivered in the order of
// finishing, once, and then there is room again.
func TestTheNetworkIsAway(t *testing.T) {
	bubble(t, func(t *testing.T) {
		var held sync.Map // channels, by job
		n := newNode(t, func(ctx context.Context, j runtime.Job, emit func([]byte) error) (runtime.Result, error) {
			until, _ := held.Load(j.ID)
			select {
			case <-until.(chan struct{}):
			case <-ctx.Done():
				return runtime.Result{}, context.Cause(ctx)
			}
			return say(answer)(ctx, j, emit)
		})
		if err := n.state.Close(); err != nil {
			t.Fatal(err)
		}
		var err error
		if n.state, err = state.Open(n.path, state.Bounds{Jobs: 3}, time.Now); err != nil {
			t.Fatal(err)
		}
		n.store = n.state
		stop := n.begin(n.active)
		give := func() *wire.Job {
			j := n.job(false)
			held.Store(j.ID, make(chan struct{}))
			n.worker.Job(j)
			return j
		}
		release := func(j *wire.Job) {
			until, _ := held.Load(j.ID)
			close(until.(chan struct{}))
			synctest.Wait()
		}
		first, second := give(), give()
		n.expect("accept", "accept")
		n.onSend(func(wire.Message) error { return errors.New("not connected") })
		release(second)
		release(first)
		third := give() // as it came with the last packet
		release(third)
		time.Sleep(10 * time.Hour) // longer than results are kept
		n.expect()
		n.status(Status{Slots: 2, Outbox: 3})
		give()
		n.expect()

		// Over a restart, too.
		if err := stop(); err != nil {
			t.Fatal(err)
		}
		n.begin(n.active)
		n.onSend(nil)
		fourth := give()
		n.refused(wire.CodeStorage)
		n.worker.Connected()
		said := n.expect("result", "result", "result")
		for i, j := range []*wire.Job{second, first, third} {
			n.answered(j, said[i], answer)
		}
		n.worker.Ack(&wire.Ack{Jobs: []receipt.JobID{first.ID, second.ID, third.ID}})
		synctest.Wait()
		n.worker.Connected()
		n.expect()
		n.status(Status{Slots: 2})
		release(fourth)
		n.worker.Job(fourth) // a job that was refused has left no trace
		n.answered(fourth, n.expect("accept", "result")[1], answer)
	})
}

func TestExpiry(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := newNode(t, say(answer))
		n.begin(n.active)
		n.worker.Job(n.job(false))
		n.expect("accept", "result")
		time.Sleep(10 * time.Hour) // longer than results are kept, and nothing is heard
		n.status(Status{Slots: 2, Outbox: 1})
		n.worker.Cancel(&wire.Cancel{Job: receipt.NewJobID()})
		time.Sleep(housekeeping)
		n.status(Status{Slots: 2})
	})
}

// A network that loses, repeats and reorders, and an agent that is restarted:
// every job is answered, and no job has two receipts.
func TestExactlyOnce(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := newNode(t, func(ctx context.Context, j runtime.Job, emit func([]byte) error) (runtime.Result, error) {
			select {
			case <-time.After(mathrand.N(200 * time.Millisecond)):
			case <-ctx.Done():
				return runtime.Result{}, context.Cause(ctx)
			}
			if mathrand.IntN(10) == 0 {
				return runtime.Result{}, &runtime.EngineError{Op: "answer", Status: 500}
			}
			return say(j.ID.String()+end)(ctx, j, emit)
		})
		n.suspect = func(a *Active, _ string) { // as the agent does that has validated it
			n.worker.SetActive(anew(a))
		}
		stop := n.begin(anew(n.active))
		open := map[receipt.JobID]*wire.Job{}
		for range 100 {
			j := n.job(mathrand.IntN(2) == 0)
			j.Deadline = time.Now().Add(35 * time.Second).UnixMilli()
			open[j.ID] = j
		}
		receipts := map[receipt.JobID]evm.Signature{}
		var acks []receipt.JobID
		var connected atomic.Bool
		connected.Store(true)
		n.onSend(func(wire.Message) error {
			if !connected.Load() {
				return errors.New("not connected")
			}
			return nil
		})
		for step := 0; len(open) > 0; step++ {
			if step > 5000 {
				t.Fatalf("%d jobs have no answer", len(open))
			}
			for _, m := range n.said() {
				r, ok := m.(*wire.Result)
				if !ok || mathrand.IntN(4) == 0 { // lost
					continue
				}
				acks = append(acks, r.Job)
				if r.Code != "" {
					continue // it will be asked for again
				}
				if old, ok := receipts[r.Job]; ok && old != r.Receipt.Signature() {
					t.Fatalf("job %s has two receipts", r.Job)
				}
				receipts[r.Job] = r.Receipt.Signature()
				delete(open, r.Job)
			}
			switch mathrand.IntN(40) {
			case 0:
				if connected.Store(!connected.Load()); connected.Load() {
					n.worker.Connected()
				}
			case 1:
				if err := stop(); err != nil {
					t.Fatal(err)
				}
				if err := n.state.Close(); err != nil {
					t.Fatal(err)
				}
				n.open()
				stop = n.begin(anew(n.active))
			case 2, 3:
				if connected.Load() && len(acks) > 0 {
					n.worker.Ack(&wire.Ack{Jobs: acks})
					acks = nil
				}
			}
			for _, j := range open { // in any order
				if !connected.Load() || mathrand.IntN(3) == 0 {
					break
				}
				j.Deadline = time.Now().Add(35 * time.Second).UnixMilli()
				fresh := *j
				n.worker.Job(&fresh)
			}
			time.Sleep(10 * time.Millisecond)
		}
	})
}
