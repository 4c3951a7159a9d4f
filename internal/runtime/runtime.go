// Package runtime is the client of the engine in the sealed container, over
// the one unix socket that leads there.
//
// The rules it keeps: nothing is sent before the kernel has said that the
// container is on the other side; and the engine is always asked to stream and
// its output is checked event by event, also where the client wants a plain
// answer, so that an engine stops working when nobody wants its answer any
// more, and so that no byte of it leaves unchecked.
package runtime

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"net"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/resultity/node/internal/bridge/contract"
	"github.com/resultity/node/internal/determinism"
	"github.com/resultity/node/internal/openai"
	"github.com/resultity/node/internal/plainhttp"
	"github.com/resultity/node/internal/receipt"
	"github.com/resultity/node/internal/snapshot"
	"github.com/resultity/node/internal/wire"
)

// Bounds on what the other side of the socket may send.
const (
	maxHeader = 64 << 10
	maxError  = 64 << 10 // body of an error
	maxRecord = 1 << 20  // body of the bridge's own answers
)

// Client talks to the engine. It is safe for concurrent use and keeps
// connections; the socket may come and go with the container.
type Client struct{ engine *plainhttp.Transport }

// New makes a client of the socket at path. Nothing is opened before the first
// request; each connection is shown to guard before it is used.
func New(path string, guard Guard) *Client {
	return &Client{&plainhttp.Transport{
		Dial:      func(ctx context.Context) (net.Conn, error) { return dial(ctx, path, guard) },
		MaxIdle:   64,
		Idle:      time.Minute,
		MaxHeader: maxHeader,
	}}
}

// Close ends the connections that no request uses.
func (c *Client) Close() { c.engine.CloseIdleConnections() }

// EngineError says that the engine, or the way to it, failed: another node, or
// the same one after a restart, may do better. It holds nothing of what the
// engine said.
type EngineError struct {
	Op     string // what was being done
	Status int    // of HTTP, 0 where none was had
	Err    error  // nil where Status says all
}

func (e *EngineError) Error() string {
	switch {
	case e.Err == nil:
		return fmt.Sprintf("engine: %s: status %d", e.Op, e.Status)
	case e.Status == 0:
		return fmt.Sprintf("engine: %s: %v", e.Op, e.Err)
	}
	return fmt.Sprintf("engine: %s: status %d: %v", e.Op, e.Status, e.Err)
}

func (e *EngineError) Unwrap() error { return e.Err }

var errProtocol = errors.New("what came is not HTTP")

// quiet keeps those errors of net/http that speak of the connection. The others
// quote what the engine sent, which may be a piece of an answer.
func quiet(err error) error {
	var op *net.OpError
	switch {
	case errors.Is(err, ErrForeign):
		return err
	case errors.As(err, &op):
		return op
	case errors.Is(err, io.ErrUnexpectedEOF):
		return io.ErrUnexpectedEOF
	case errors.Is(err, io.EOF):
		return io.EOF
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return err
	}
	return errProtocol
}

// Job is one request to be answered.
type Job struct {
	ID            receipt.JobID
	Request       *openai.Request
	Model         string // the name the engine serves it under; also stands in the answer
	Created       int64  // Unix seconds, stands in the answer
	Seed          uint32 // where the request has none
	Tokens        int    // completion tokens at most
	ResponseBytes int64  // of the answer at most

	// Sent is called once, when the engine works on the request or could not be
	// given it, and before anything is made of an answer. Its error ends the run.
	// It may be nil.
	Sent func() error
}

// Result is a whole answer.
type Result struct {
	Body  []byte // of the HTTP response
	Usage openai.Usage
}

// Run lets the engine answer j. Where the client wants a stream, emit gets the
// body piece by piece, one call for what has come at once; it must not keep
// the bytes, and its error ends the run. Pieces that were emitted before an
// error stay emitted. A nil emit is for who wants only the whole.
//
// When ctx ends, the connection is closed, so that the engine stops, and the
// error wraps [context.Cause], unless the answer was whole by then. Other errors are: [*openai.Error], the engine
// refuses the request and any engine would; [*openai.OutputError], its output
// breaks the API; [*EngineError], it failed.
func (c *Client) Run(ctx context.Context, j Job, emit func([]byte) error) (Result, error) {
	res, err := c.run(ctx, j, emit)
	if err != nil && ctx.Err() != nil {
		return Result{}, fmt.Errorf("engine: answer: %w", context.Cause(ctx))
	}
	return res, err
}

// paths of the APIs at the engine.
var paths = map[wire.Kind]string{
	wire.KindChat:       "/v1/chat/completions",
	wire.KindCompletion: "/v1/completions",
}

func (c *Client) run(ctx context.Context, j Job, emit func([]byte) error) (Result, error) {
	ctx, cut := context.WithCancel(ctx) // which closes the connection
	defer cut()
	asked, err := c.ask(ctx, j)
	if j.Sent != nil {
		if err := j.Sent(); err != nil {
			if asked != nil {
				asked.Close()
			}
			return Result{}, err
		}
	}
	if err != nil {
		return Result{}, &EngineError{Op: "ask", Err: quiet(err)}
	}
	resp, err := asked.Response()
	if err != nil {
		return Result{}, &EngineError{Op: "ask", Err: quiet(err)}
	}
	// Before the end of the body, closing it closes the connection, by which
	// the engine learns that it may stop.
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return Result{}, refusal(resp)
	}
	if t, _, _ := mime.ParseMediaType(resp.Header.Get("Content-Type")); t != "text/event-stream" {
		return Result{}, &openai.OutputError{Reason: openai.ReasonNoStream, Detail: "the answer is no event stream"}
	}
	a := openai.NewAssembler(j.Request.Kind, j.ID, j.Model, j.Created, j.Request.Stream, j.Request.IncludeUsage, j.ResponseBytes)
	most := j.Request.Bound(j.Tokens)
	if err := pump(ctx, cut, resp.Body, a, most, emit); err != nil {
		return Result{}, err
	}
	body, usage, err := a.Finish()
	if err != nil {
		return Result{}, err
	}
	if usage.CompletionTokens > uint64(most) {
		return Result{}, &openai.OutputError{Reason: openai.ReasonUsage, Detail: fmt.Sprintf("%d completion tokens where %d were allowed", usage.CompletionTokens, most)}
	}
	return Result{Body: body, Usage: usage}, nil
}

// slack is for engines that cut one token's text in two.
const slack = 16

// pieces are what is read of a stream at once.
var pieces = sync.Pool{New: func() any { return new([pieceSize]byte) }}

const pieceSize = 32 << 10 // bytes

// What an engine may still send, and how long, when it has said [DONE]: the answer
// is whole, and waits for nothing more. A connection that has come to its end by then
// is used again.
const (
	tailPatience = 250 * time.Millisecond
	maxTail      = 4 << 10 // bytes
)

// pump moves the engine's stream, of at most so many tokens, through a until it
// ends, or until a has all and ctx has ended. Cut ends ctx.
func pump(ctx context.Context, cut context.CancelFunc, r io.Reader, a *openai.Assembler, tokens int, emit func([]byte) error) error {
	var (
		p       parser
		pending []byte // of our stream, not emitted yet
		buf     = pieces.Get().(*[pieceSize]byte)
		late    *time.Timer // runs when a has all
		tail    int         // bytes since then
	)
	defer pieces.Put(buf)
	event := func(data []byte) error {
		out, err := a.Event(data)
		pending = append(pending, out...)
		if err == nil && a.Pieces() > tokens+slack {
			err = &openai.OutputError{Reason: openai.ReasonUsage, Detail: fmt.Sprintf("%d pieces of text where %d tokens were allowed", a.Pieces(), tokens)}
		}
		return err
	}
	for {
		n, readErr := r.Read(buf[:])
		err := p.feed(buf[:n], event)
		if len(pending) > 0 && emit != nil {
			if err := emit(pending); err != nil {
				return fmt.Errorf("pass on: %w", err)
			}
		}
		pending = pending[:0]
		switch {
		case err != nil:
			if reported, ok := errors.AsType[*openai.ReportedError](err); ok {
				return &EngineError{Op: "answer", Err: reported}
			}
			return err
		case readErr == io.EOF, a.Done() && ctx.Err() != nil:
			return nil
		case readErr != nil:
			return &EngineError{Op: "answer", Err: quiet(readErr)}
		case late != nil:
			if tail += n; tail > maxTail {
				return nil
			}
		case a.Done():
			late = time.AfterFunc(tailPatience, cut)
			defer late.Stop()
		}
	}
}

func (c *Client) ask(ctx context.Context, j Job) (*plainhttp.Exchange, error) {
	body := j.Request.ForEngine(j.Model, j.Seed, j.Tokens)
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://engine"+paths[j.Request.Kind], bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	req.Header = http.Header{
		"Content-Type": {"application/json"},
		"Accept":       {"text/event-stream"},
		"User-Agent":   {"resultity-agent"},
	}
	return c.engine.Send(req)
}

// refusal makes an error of an answer that is not 200. The engine's own words
// may quote the prompt and are dropped.
func refusal(resp *http.Response) error {
	switch resp.StatusCode {
	case http.StatusBadRequest, http.StatusRequestEntityTooLarge, http.StatusUnprocessableEntity:
	default:
		return &EngineError{Op: "ask", Status: resp.StatusCode}
	}
	e := &openai.Error{
		Status: http.StatusBadRequest, Type: openai.TypeInvalidRequest, Code: "refused_by_engine",
		Message: "The engine refused the request.",
	}
	var body struct {
		Error struct {
			Type    string
			Prompt  int `json:"n_prompt_tokens"`
			Context int `json:"n_ctx"`
		}
	}
	raw, err := io.ReadAll(io.LimitReader(resp.Body, maxError))
	if err == nil && json.Unmarshal(raw, &body) == nil && body.Error.Type == "exceed_context_size_error" { // llama.cpp
		e.Code = openai.CodeContextLength
		e.Message = fmt.Sprintf("The prompt has %d tokens, more than the model's context of %d.", body.Error.Prompt, body.Error.Context)
	} else if strings.Contains(string(raw), "maximum context length") { // vLLM
		e.Code = openai.CodeContextLength
		e.Message = "The prompt, with the completion that is asked for, is longer than the model's context."
	}
	return e
}

// GoldenError says that the engine gave another answer than the one that the
// network knows to be right. It does not hold the texts.
type GoldenError struct {
	Name string
	Got  determinism.Answer
	Err  error // in which way it is wrong
}

func (e *GoldenError) Error() string {
	return fmt.Sprintf("validation %s: the answer (%s, %d tokens) is wrong: %v", e.Name, e.Got.Text.Short(), e.Got.CompletionTokens, e.Err)
}

func (e *GoldenError) Unwrap() error { return e.Err }

// Golden puts g to the engine and returns the answer if it is as g expects. It
// fails with a [*GoldenError] if it is not, and otherwise as [Client.Run] does.
func (c *Client) Golden(ctx context.Context, g snapshot.Golden, model string) (determinism.Answer, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, g.Timeout.Duration(),
		fmt.Errorf("no answer within %v: %w", g.Timeout.Duration(), context.DeadlineExceeded))
	defer cancel()
	got, text, err := c.golden(ctx, &g, model)
	if err != nil {
		return determinism.Answer{}, fmt.Errorf("validation %s: %w", g.Name, err)
	}
	if err := g.Expect(text, got.CompletionTokens); err != nil {
		return determinism.Answer{}, &GoldenError{Name: g.Name, Got: got, Err: err}
	}
	return got, nil
}

func (c *Client) golden(ctx context.Context, g *snapshot.Golden, model string) (got determinism.Answer, text string, err error) {
	kind := wire.KindChat
	ask := map[string]any{"model": model, "temperature": 0, "max_tokens": g.Tokens}
	if g.Kind == snapshot.GoldenCompletion {
		kind, ask["prompt"] = wire.KindCompletion, g.Prompt
	} else {
		messages := []map[string]string{{"role": "user", "content": g.Prompt}}
		if g.System != "" {
			messages = append([]map[string]string{{"role": "system", "content": g.System}}, messages...)
		}
		ask["messages"] = messages
	}
	body, err := json.Marshal(ask)
	if err != nil {
		return got, "", err
	}
	req, err := openai.Parse(kind, body, openai.Limits{RequestBytes: int64(len(body)), Tokens: g.Tokens, Messages: 2})
	if err != nil {
		return got, "", err
	}
	res, err := c.Run(ctx, Job{Request: req, Model: model, Tokens: g.Tokens, ResponseBytes: maxRecord}, nil)
	if err != nil {
		return got, "", err
	}
	answer, err := openai.ReadAnswer(res.Body)
	if err != nil {
		return got, "", fmt.Errorf("read our own answer: %w", err)
	}
	text, reasoning, finish, ok := answer.Only()
	if !ok {
		return got, "", errors.New("read our own answer: it has several choices")
	}
	return determinism.NewAnswer(g.Name, text, reasoning, finish, res.Usage.PromptTokens, res.Usage.CompletionTokens), text, nil
}

// Health asks whether the engine says that it can work.
func (c *Client) Health(ctx context.Context) error {
	_, err := c.get(ctx, "health", "/health")
	return err
}

// Sandbox returns what the bridge found around itself before it started the
// engine: JSON of [contract.Sandbox], for the agent to judge.
func (c *Client) Sandbox(ctx context.Context) ([]byte, error) {
	return c.get(ctx, "sandbox", contract.SandboxPath)
}

func (c *Client) get(ctx context.Context, op, path string) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://engine"+path, nil)
	if err != nil {
		return nil, err
	}
	resp, err := c.engine.RoundTrip(req)
	if err != nil {
		return nil, &EngineError{Op: op, Err: quiet(err)}
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return nil, &EngineError{Op: op, Status: resp.StatusCode}
	}
	raw, err := io.ReadAll(io.LimitReader(resp.Body, maxRecord+1))
	switch {
	case err != nil:
		return nil, &EngineError{Op: op, Err: quiet(err)}
	case len(raw) > maxRecord:
		return nil, &EngineError{Op: op, Err: fmt.Errorf("the answer is larger than %d bytes", maxRecord)}
	}
	return raw, nil
}
