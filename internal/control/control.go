// Package control owns the agent's control socket: what an operator can ask a
// running agent, and the types of the answers. It is HTTP with JSON over a unix
// socket that only the account and root can open; file permissions are the
// whole of its access control.
package control

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/resultity/node/internal/binding"
	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/durable"
	"github.com/resultity/node/internal/evm"
	"github.com/resultity/node/internal/gate"
	"github.com/resultity/node/internal/wire"
)

// SocketName is the socket's name in the agent's runtime directory.
const SocketName = "control.sock"

// Status is the answer to "why no jobs". Where no agent runs, resultityctl fills
// in what it can see by itself: version, node and networks are empty then.
//
// What stands here is the machine's: its sums of all networks, and the one runtime.
type Status struct {
	Version  string            `json:"version"`  // of the agent that runs
	Node     string            `json:"node"`     // address
	Gates    []gate.Gate       `json:"gates"`    // of the machine, then of each network, both in the order of [gate.List]
	Networks []Network         `json:"networks"` // by priority, the highest first
	Runtime  wire.RuntimeState `json:"runtime"`
	Current  *Generation       `json:"generation,omitempty"` // the current one
	Slots    int               `json:"slots"`
	Busy     int               `json:"busy"`
	Outbox   int               `json:"outbox"`   // results that no network has acknowledged
	Draining bool              `json:"draining"` // takes no new jobs of any network

	// Since the agent's start, and no longer ago than a day.
	Done    int        `json:"done"`              // jobs with an answer
	Failed  int        `json:"failed"`            // jobs that ended without one
	LastJob *time.Time `json:"lastJob,omitempty"` // end of the last job since the agent's start
}

// Network is the node's part in one network.
type Network struct {
	Name       string            `json:"name"`
	Priority   int               `json:"priority"`
	Snapshot   *Snapshot         `json:"snapshot,omitempty"`
	Runtime    wire.RuntimeState `json:"runtime"`              // as the network is told: standby where it is another network's
	Class      *wire.Class       `json:"class,omitempty"`      // determinism class of the runtime
	Validation *Validation       `json:"validation,omitempty"` // the last one since the agent's start
	Slots      int               `json:"slots"`
	Busy       int               `json:"busy"`  // with jobs of this network
	Taken      int               `json:"taken"` // slots that others use, or that are kept for them
	Outbox     int               `json:"outbox"`
	Draining   bool              `json:"draining"`
	Drains     []Drain           `json:"drains,omitempty"` // who has drained the node; all have to take it back
	Logs       Logs              `json:"logs,omitzero"`
	Sandbox    *Sandbox          `json:"sandbox,omitempty"` // none before the runtime's first start
	Penalty    *Penalty          `json:"penalty,omitempty"` // the network's, in force

	ReceiptLog *ReceiptLog `json:"receiptLog,omitempty"` // absent before the first receipt
	Damage     *Damage     `json:"damage,omitempty"`     // of the job store, where the agent's start has found any

	Orders  []Order    `json:"orders,omitempty"` // the network's last ones, oldest first
	Done    int        `json:"done"`
	Failed  int        `json:"failed"`
	LastJob *time.Time `json:"lastJob,omitempty"`
}

// Of returns the node's part in a network, or nil.
func (s *Status) Of(network string) *Network {
	for i := range s.Networks {
		if s.Networks[i].Name == network {
			return &s.Networks[i]
		}
	}
	return nil
}

// Keep leaves of the networks only one, for whoever asks about that.
func (s *Status) Keep(network string) {
	s.Gates = slices.DeleteFunc(s.Gates, func(g gate.Gate) bool { return g.Network != "" && g.Network != network })
	s.Networks = slices.DeleteFunc(s.Networks, func(n Network) bool { return n.Name != network })
}

// ReceiptLog says how the log of the node's receipts is.
type ReceiptLog struct {
	Size  uint64 `json:"size"`  // receipts
	Root  string `json:"root"`  // of the tree; 0x and 64 hexadecimal digits
	Acked uint64 `json:"acked"` // of how many the network has it
}

// Damage says what the agent's start has found damaged in the job store.
type Damage struct {
	Mended   int        `json:"mended"`             // places that are right again
	Lost     []string   `json:"lost,omitempty"`     // jobs of which something is lost, as far as they can be named
	Before   *time.Time `json:"before,omitempty"`   // other jobs that were made before may be lost, too
	Receipts uint64     `json:"receipts"`           // that the receipt log has lost
	Kept     []string   `json:"kept,omitempty"`     // files with what was found
	Unsolved string     `json:"unsolved,omitempty"` // why it could not be put right on the disk
}

// Sandbox says what is on record of the runtime's sandbox.
type Sandbox struct {
	Record  digest.Digest `json:"record"` // which receipts name
	Made    time.Time     `json:"made"`
	Looked  time.Time     `json:"looked,omitzero"` // last, and found nothing else
	Waiting int           `json:"waiting"`         // records that the network may not have
}

// Logs says how far the upload of the node's log is. The numbers count records.
type Logs struct {
	Upload   string `json:"upload"`          // on or off
	Waiting  uint64 `json:"waiting"`         // that the network does not have yet
	Uploaded uint64 `json:"uploaded"`        // position up to which it has everything there is
	Dropped  uint64 `json:"dropped"`         // that it never got, since the agent's start
	Error    string `json:"error,omitempty"` // why nothing is kept at the moment
}

// Validation is how a runtime has answered the golden requests.
type Validation struct {
	At     time.Time  `json:"at"`    // its end
	Cause  string     `json:"cause"` // installation, schedule, order or doubt
	Passed bool       `json:"passed"`
	Error  string     `json:"error,omitempty"` // why not
	Next   *time.Time `json:"next,omitempty"`  // on schedule, while something serves
}

// Drain is somebody's word that the node takes no new jobs.
type Drain struct {
	By     string    `json:"by"` // operator, network, or agent: it ends
	Reason string    `json:"reason,omitempty"`
	Since  time.Time `json:"since,omitzero"`
}

// Penalty is a notice of the network's.
type Penalty struct {
	Reason string    `json:"reason"`
	Until  time.Time `json:"until"`
}

// Order is one of the network's orders and what became of it.
type Order struct {
	ID      string       `json:"id"`
	Kind    string       `json:"kind"`
	Reason  string       `json:"reason,omitempty"`
	Issued  time.Time    `json:"issued"`
	Outcome wire.Outcome `json:"outcome"` // begun, ok or failed
	Message string       `json:"message,omitempty"`
	Told    bool         `json:"told"` // the network has acknowledged the outcome
}

// Snapshot is the configuration in force.
type Snapshot struct {
	Version int64     `json:"version"`
	Digest  string    `json:"digest"`
	Expires time.Time `json:"expires"`
}

// Closed returns the first gate that is closed, or nil.
func (s *Status) Closed() *gate.Gate { return gate.FirstClosed(s.Gates) }

// GetsJobs reports whether a network sends jobs to the node now: it says so,
// and nothing of what the agent does is in the way. A gate of the machine may be
// closed all the same, and end that at the next logout or reboot.
func (s *Status) GetsJobs() bool {
	own := slices.IndexFunc(s.Gates, func(g gate.Gate) bool { return g.Name == gate.Identity })
	if own < 0 {
		return false
	}
	closed := map[string]bool{} // by network; "" is the machine
	for _, g := range s.Gates[own:] {
		closed[g.Network] = closed[g.Network] || g.State == gate.Closed
		if g.Name == gate.Routable && g.State == gate.Open && !closed[g.Network] && !closed[""] {
			return true
		}
	}
	return false
}

// Identity is who the node is.
type Identity struct {
	Node    string `json:"node"`
	Network string `json:"network"`
	Account string `json:"account,omitempty"` // empty for none, and before the registration

	Registered bool        `json:"registered"`
	Method     wire.Method `json:"method,omitempty"` // how it was bound to the account
	Since      int64       `json:"since,omitempty"`  // Unix milliseconds
}

// BindRequest is a step towards a binding, or its end. A nonce that a step needs
// and that is not given is asked for.
type BindRequest struct {
	Network   string          `json:"network,omitempty"` // may be empty where the node is in one only
	Step      wire.BindStep   `json:"step"`
	Nonce     evm.Hash        `json:"nonce"`
	Statement *binding.Signed `json:"statement,omitempty"`
	Email     string          `json:"email,omitempty"`
	Code      string          `json:"code,omitempty"`
	Token     string          `json:"token,omitempty"`
}

// Binding is what the network answered to it.
type Binding struct {
	Network string      `json:"network"`
	ChainID uint64      `json:"chain_id"`
	Node    evm.Address `json:"node"`
	Bound   wire.Bound  `json:"bound"`
	Nonce   evm.Hash    `json:"nonce"`
	Now     int64       `json:"now"`     // Unix milliseconds, by the network's clock
	Expires int64       `json:"expires"` // Unix milliseconds, of the nonce or of the code that was sent
}

// Model is a model and what has become of it.
type Model struct {
	wire.ModelState
	Network string `json:"network"`
	Bytes   int64  `json:"bytes"`
	Done    int64  `json:"done"` // of Bytes, while pending
}

// Job is one job the node has not forgotten yet. One that is unacknowledged may be
// kept, too.
type Job struct {
	ID      string    `json:"id"`
	Network string    `json:"network"`
	State   string    `json:"state"` // running, unacknowledged, unreadable (a result that the disk does not give back), or kept for a replay
	Model   string    `json:"model,omitempty"`
	Code    wire.Code `json:"code,omitempty"` // why it failed
}

// Generations is what the node has been, and what it is.
type Generations struct {
	Current     int          `json:"current"`                // 0 for none
	Previous    int          `json:"previous,omitempty"`     // healthy: what a rollback goes to
	Order       int          `json:"order,omitempty"`        // the operator's, under way
	PutAsideOf  string       `json:"put_aside_of,omitempty"` // network whose configuration that is
	PutAside    string       `json:"put_aside,omitempty"`    // digest of the configuration that the operator has gone back from
	Generations []Generation `json:"generations"`            // by number
}

// Generation is a configuration that the node was brought to, and how that went.
type Generation struct {
	Number   int               `json:"number"`
	Network  string            `json:"network"` // whose configuration it is
	State    string            `json:"state"`   // staged, trial, healthy, failed, dead
	Since    time.Time         `json:"since"`
	Created  time.Time         `json:"created"`
	Version  int64             `json:"version"`
	Config   string            `json:"config"` // digest
	Engine   string            `json:"engine"`
	Image    string            `json:"image"` // by digest
	Models   []GenerationModel `json:"models"`
	Unit     string            `json:"unit,omitempty"` // digest of the unit's text
	Step     string            `json:"step,omitempty"` // that failed
	Reason   string            `json:"reason,omitempty"`
	Machine  bool              `json:"machine,omitempty"`  // the fault is this machine's: it is tried again
	Phases   []Phase           `json:"phases,omitempty"`   // of its last switch
	Snapshot json.RawMessage   `json:"snapshot,omitempty"` // config.json; of one generation alone
	UnitText string            `json:"unit_text,omitempty"`
}

// GenerationModel is a model of a generation.
type GenerationModel struct {
	Name    string `json:"name"`
	Version string `json:"version"`
	Digest  string `json:"digest"`
}

// Phase is a part of a switch.
type Phase struct {
	Name   string `json:"name"`
	TookMS int64  `json:"took_ms"`
}

// Get returns a generation, or nil.
func (g *Generations) Get(n int) *Generation {
	for i := range g.Generations {
		if g.Generations[i].Number == n {
			return &g.Generations[i]
		}
	}
	return nil
}

// ErrRefused says that an order makes no sense now; the error says why.
var ErrRefused = errors.New("refused")

// Backend is the agent as its operator sees it. Safe for concurrent use.
type Backend interface {
	Status() Status
	Identity() []Identity // by network, in the order of [Status].Networks
	Models() []Model
	Jobs(limit int) ([]Job, error)
	Generations() Generations
	// Generation returns one generation with all that is kept of it.
	Generation(n int) (Generation, error)
	// Rollback makes a healthy generation current; 0 is the one before. It
	// returns when the order is written down, and fails with [ErrRefused].
	Rollback(ctx context.Context, n int) error
	// Forward ends what Rollback began, and tries once more what is dead.
	Forward(ctx context.Context) error
	// Metrics serves numbers about the node to Prometheus.
	Metrics() http.Handler
	// Drain and Resume are remembered over restarts. Also with an error they
	// have been obeyed, for as long as this process lives.
	Drain() error
	Resume() error
	// Restart has the runtime stopped and brought up anew, also one that was given
	// up for a while. It returns when that is ordered.
	Restart(ctx context.Context) error
	// Damaged says that a file of a model, by its SHA-256, is damaged on disk. It
	// returns when that is noted, or fails with [ErrRefused]; the agent looks for
	// itself. A note does not outlive the agent, and need not: the damage does, and
	// the next scrub finds it.
	Damaged(ctx context.Context, file digest.Digest) error
	// Scrubbed says that the models were read again, and that it is time for the
	// image, which the agent has Podman read. It returns at once.
	Scrubbed(ctx context.Context) error
	// Doctor looks at everything once more and probes what only a try shows; it
	// ends within a minute and a half, and is [ErrBusy] while another runs.
	Doctor(ctx context.Context) (*Report, error)
	// Bundle returns a support archive, tar.gz, without secrets.
	Bundle(ctx context.Context) ([]byte, error)
	Bind(context.Context, BindRequest) (Binding, error)
	// Replay runs a request again and compares the answers. It ends with ctx, and is
	// [ErrRefused] where there is nothing to run, or nothing to run it with. NotReplayed
	// hears of those that do not get as far as that.
	Replay(context.Context, ReplayRequest) (Replay, error)
	NotReplayed(*ReplayRefusal)
	// Takeover has the key's counts go on where no other holder of the key is; see
	// package signer.
	Takeover() error
}

// maxJobs bounds an answer.
const maxJobs = 1000

// Listen binds the socket, mode 0600, replacing one that a killed agent left.
// The agent's store is locked by then, so that no other agent can own it. dir
// becomes the agent's alone, so that nobody gets in before the socket has its
// mode.
func Listen(dir string) (net.Listener, error) {
	if err := os.Chmod(dir, 0o700); err != nil {
		return nil, err
	}
	name := filepath.Join(dir, SocketName)
	if err := os.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	l, err := net.Listen("unix", name)
	if err != nil {
		return nil, err
	}
	if err := os.Chmod(name, 0o600); err != nil {
		_ = l.Close() // the chmod error says more
		return nil, err
	}
	return l, nil
}

// Bounds of what those take who ask.
const (
	maxConns = 64                      // connections; more wait in the kernel until one ends
	maxHead  = 8 << 10                 // bytes of a request's head
	askTime  = 10 * time.Second        // to ask, to read the answer, and between two requests
	waitTime = askTime + 5*time.Second // a client waits for an answer; so it gets one also if all connections were held by silent ones
)

// goodbye is how long requests may take to end with Serve.
const goodbye = time.Second

// Serve answers on l until ctx ends. No call of b outlives it, unless it takes
// longer than a second.
func Serve(ctx context.Context, l net.Listener, b Backend) error {
	mux := http.NewServeMux()
	get := func(path string, f func() (any, error)) {
		mux.HandleFunc("GET "+path, func(w http.ResponseWriter, _ *http.Request) {
			v, err := f()
			reply(w, v, err)
		})
	}
	get("/v1/status", func() (any, error) { return b.Status(), nil })
	get("/v1/identity", func() (any, error) { return b.Identity(), nil })
	get("/v1/models", func() (any, error) { return b.Models(), nil })
	get("/v1/jobs", func() (any, error) { return b.Jobs(maxJobs) })
	get("/v1/generations", func() (any, error) { return b.Generations(), nil })
	mux.HandleFunc("GET /v1/generations/{n}", func(w http.ResponseWriter, r *http.Request) {
		n, err := generationNumber(r)
		var g Generation
		if err == nil {
			g, err = b.Generation(n)
		}
		reply(w, g, err)
	})
	metrics := b.Metrics()
	mux.Handle("GET /metrics", metrics) // where Prometheus looks
	mux.Handle("GET /v1/metrics", metrics)
	mux.HandleFunc("POST /v1/generations/{n}/rollback", func(w http.ResponseWriter, r *http.Request) {
		n, err := generationNumber(r)
		if err == nil {
			err = b.Rollback(r.Context(), n)
		}
		reply(w, b.Generations(), err)
	})
	mux.HandleFunc("POST /v1/generations/forward", func(w http.ResponseWriter, r *http.Request) {
		err := b.Forward(r.Context())
		reply(w, b.Generations(), err)
	})
	post := func(path string, f func(context.Context) error) {
		mux.HandleFunc("POST "+path, func(w http.ResponseWriter, r *http.Request) {
			err := f(r.Context())
			reply(w, b.Status(), err)
		})
	}
	post("/v1/drain", func(context.Context) error { return b.Drain() })
	post("/v1/resume", func(context.Context) error { return b.Resume() })
	post("/v1/restart", b.Restart)
	post("/v1/scrubbed", b.Scrubbed)
	post("/v1/identity/takeover", func(context.Context) error { return b.Takeover() })
	mux.HandleFunc("POST /v1/damaged/{sha256}", func(w http.ResponseWriter, r *http.Request) {
		file, err := digest.ParseHex(r.PathValue("sha256"))
		if err != nil {
			err = fmt.Errorf("%w: %w", ErrRefused, err)
		} else {
			err = b.Damaged(r.Context(), file)
		}
		reply(w, b.Status(), err)
	})
	serveDoctor(mux, b)
	serveReplay(mux, b)
	mux.HandleFunc("POST "+bindPath, func(w http.ResponseWriter, r *http.Request) {
		// It asks the network. This fails on a closed connection only.
		_ = http.NewResponseController(w).SetWriteDeadline(time.Now().Add(bindTimeout + askTime))
		ctx, cancel := context.WithTimeout(r.Context(), bindTimeout)
		defer cancel()
		var q BindRequest
		dec := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxBind))
		dec.DisallowUnknownFields()
		if err := dec.Decode(&q); err != nil {
			w.WriteHeader(http.StatusBadRequest)
			_ = json.NewEncoder(w).Encode(map[string]string{"error": err.Error()}) // the peer has gone: nobody to tell
			return
		}
		v, err := b.Bind(ctx, q)
		reply(w, v, err)
	})
	place := make(chan struct{}, maxConns)
	s := &http.Server{
		Handler: noBody(mux), MaxHeaderBytes: maxHead,
		ReadTimeout: askTime, WriteTimeout: askTime, IdleTimeout: askTime,
		ConnState: func(_ net.Conn, st http.ConnState) {
			switch st {
			case http.StateNew:
				place <- struct{}{} // Serve accepts no other one meanwhile
			case http.StateClosed:
				<-place
			}
		},
		ErrorLog: log.New(io.Discard, "", 0), // whoever speaks no HTTP here is told so
	}
	closed := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(closed)
		gctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), goodbye)
		defer cancel()
		if s.Shutdown(gctx) != nil {
			_ = s.Close() // somebody who asks slowly, or does not read
		}
	})
	err := s.Serve(l)
	if stop() { // ctx goes on: it failed by itself
		_ = s.Close() // the error says more
		return fmt.Errorf("control socket: %w", err)
	}
	<-closed
	return nil
}

const (
	bindPath    = "/v1/bind"
	bindTimeout = 30 * time.Second // for the network's answers
	maxBind     = 16 << 10         // bytes
)

// noBody refuses requests with a body: but for two no request here has anything
// to say.
func noBody(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.ContentLength != 0 && r.URL.Path != bindPath && r.URL.Path != replayPath {
			http.Error(w, "requests have no body", http.StatusRequestEntityTooLarge)
			return
		}
		h.ServeHTTP(w, r)
	})
}

// generationNumber reads the number in a request's path; 0 stands for the one
// before the current one.
func generationNumber(r *http.Request) (int, error) {
	n, err := strconv.Atoi(r.PathValue("n"))
	if err != nil || n < 0 {
		return 0, fmt.Errorf("%w: %.20q is no number of a generation", ErrRefused, r.PathValue("n"))
	}
	return n, nil
}

func reply(w http.ResponseWriter, v any, err error) {
	w.Header().Set("Content-Type", "application/json")
	if err != nil {
		code := http.StatusInternalServerError
		if errors.Is(err, ErrRefused) {
			code = http.StatusConflict
		}
		w.WriteHeader(code)
		v = map[string]string{"error": err.Error()}
	}
	_ = json.NewEncoder(w).Encode(v) // the peer has gone: nobody to tell
}

// Client asks a running agent.
type Client struct{ http *http.Client }

// Why an agent cannot be asked.
var (
	// ErrNotRunning says that no agent answers on the socket.
	ErrNotRunning = errors.New("the agent does not run")
	// ErrDenied says that the agent is another user's.
	ErrDenied = errors.New("only root and the agent's own account may ask the agent")
)

// NewClient returns a client of the agent whose socket is at path. It connects
// at each call.
func NewClient(path string) *Client {
	return &Client{&http.Client{Timeout: waitTime, Transport: &http.Transport{
		DisableKeepAlives: true, // nothing to close
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", path)
		},
	}}}
}

// Get asks for one of status, identity, models, jobs, generations, or
// generations/N.
func (c *Client) Get(ctx context.Context, what string, answer any) error {
	return c.do(ctx, http.MethodGet, what, answer)
}

// Post orders drain, resume, restart, identity/takeover, scrubbed or damaged/SHA256, which a
// [Status] answers, or generations/forward or generations/N/rollback, which
// [Generations] answer. A nil answer is for who does not want to know.
func (c *Client) Post(ctx context.Context, what string, answer any) error {
	return c.do(ctx, http.MethodPost, what, answer)
}

// Metrics returns the agent's numbers in the text format of Prometheus.
func (c *Client) Metrics(ctx context.Context) ([]byte, error) {
	status, text, err := c.ask(ctx, http.MethodGet, "metrics", nil)
	if err == nil && status != http.StatusOK {
		err = refusal(status, text)
	}
	return text, err
}

// Bind asks the agent to make a step towards a binding. What the network has to
// say against it is the error, without a word around it.
func (c *Client) Bind(ctx context.Context, q BindRequest) (Binding, error) {
	var v Binding
	raw, err := json.Marshal(q)
	if err != nil {
		return v, err
	}
	patient := Client{&http.Client{Timeout: bindTimeout + 2*askTime, Transport: c.http.Transport}}
	status, answer, err := patient.ask(ctx, http.MethodPost, strings.TrimPrefix(bindPath, "/v1/"), bytes.NewReader(raw))
	if err != nil {
		return v, err
	}
	if status != http.StatusOK {
		return v, refusal(status, answer)
	}
	return v, json.Unmarshal(answer, &v)
}

func (c *Client) do(ctx context.Context, method, what string, answer any) error {
	status, raw, err := c.ask(ctx, method, what, nil)
	if err != nil {
		return err
	}
	if status != http.StatusOK {
		return refusal(status, raw)
	}
	if answer == nil {
		return nil
	}
	return json.Unmarshal(raw, answer)
}

// refusal is an answer other than 200: the agent's own words where it has some.
func refusal(status int, raw []byte) error {
	var no struct {
		Error string `json:"error"`
	}
	if json.Unmarshal(raw, &no) != nil || no.Error == "" {
		return fmt.Errorf("the agent answered %d %s: %.500s", status, http.StatusText(status), bytes.TrimSpace(raw))
	}
	if rest, ok := strings.CutPrefix(no.Error, ErrRefused.Error()); ok && status == http.StatusConflict {
		return fmt.Errorf("%w%s", ErrRefused, rest)
	}
	return errors.New(no.Error)
}

func (c *Client) ask(ctx context.Context, method, what string, body io.Reader) (status int, raw []byte, err error) {
	req, err := http.NewRequestWithContext(ctx, method, "http://agent/v1/"+what, body)
	if err != nil {
		return 0, nil, err
	}
	res, err := c.http.Do(req)
	if err != nil {
		return 0, nil, unanswered(err)
	}
	defer res.Body.Close() // read only: nothing to lose
	raw, err = readAnswer(res, maxAnswer)
	return res.StatusCode, raw, err
}

// maxAnswer bounds an answer, in bytes. The longest have some thousand lists of
// configurations and units.
const maxAnswer = 16 << 20

func readAnswer(res *http.Response, most int64) ([]byte, error) {
	raw, err := durable.ReadAll(res.Body, most)
	if errors.Is(err, durable.ErrLarge) {
		return nil, fmt.Errorf("the agent's answer is %w; see that resultityctl and the agent are of one version", err)
	}
	return raw, err
}

// unanswered says why an agent did not answer.
func unanswered(err error) error {
	var dial *net.OpError
	switch {
	case os.IsTimeout(err):
		return fmt.Errorf("the agent runs and does not answer; if others hold all of its %d connections, ss -xp shows who (%w)", maxConns, err)
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ECONNREFUSED):
		return fmt.Errorf("%w (%w)", ErrNotRunning, err)
	case errors.As(err, &dial) && errors.Is(dial, fs.ErrPermission):
		return fmt.Errorf("%w (%w)", ErrDenied, err)
	}
	return err
}
