// Package gateway owns the network's face to its clients: OpenAI's API, receipts
// and the list of nodes.
//
// The rule it keeps: a response passes through byte for byte, so that its hash
// is the one in the receipt. What does not come from a node, an error, has no
// receipt; in a stream that has begun it is an event with an "error" object in
// place of the end mark.
//
// # Answers
//
// Every request under /v1/ needs the header Authorization: Bearer KEY. Errors
// have OpenAI's form, {"error": {"message", "type", "param", "code"}}:
//
//	400  what the request asks for cannot be had; code and param say what
//	401  invalid_api_key
//	404  model_not_found, receipt_not_found, sandbox_not_found, unknown_url; receipt_not_proven, with Retry-After
//	405  method_not_allowed
//	413  request_too_large
//	415  invalid_content_type
//	429  queue_full, uploads_full, proofs_full, with Retry-After
//	502  node_failed: every attempt failed; stream_interrupted: only within a stream
//	503  no_node, unavailable, model_withdrawn, stopping, storage, with Retry-After
//	504  deadline
//
// GET /v1/receipts/{id} returns the receipt of a response, and .../proof what shows
// that it is in its node's log (see receiptlog.Inclusion), once the node has said so:
// within a heartbeat or two. GET /v1/sandbox/{digest} returns the record of the
// sandbox that a receipt names (64 hexadecimal digits, with or without 0x or sha256:
// before them) as its node has signed it. GET /v1/nodes returns the
// registered nodes and what is known about each, but not whose they are: that is
// the operator's to see (resultity-network nodes).
package gateway

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"mime"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/evm"
	"github.com/resultity/node/internal/failpoint"
	"github.com/resultity/node/internal/network/dispatch"
	"github.com/resultity/node/internal/network/metrics"
	"github.com/resultity/node/internal/network/mirror"
	"github.com/resultity/node/internal/network/store"
	"github.com/resultity/node/internal/openai"
	"github.com/resultity/node/internal/receipt"
	"github.com/resultity/node/internal/receiptlog"
	"github.com/resultity/node/internal/sandbox/record"
	"github.com/resultity/node/internal/wire"
)

// HeaderReceipt names the receipt of a response: the job's id. Of a plain
// response the receipt exists when the response arrives, of a stream when its
// end mark has.
const HeaderReceipt = "Resultity-Receipt"

const (
	bodyTimeout  = 30 * time.Second // for a request's body to arrive; a long one gets more, see allow
	writeTimeout = 30 * time.Second // for one write to a client, likewise
	slowLink     = 64 << 10         // bytes a second; who is slower is cut off
)

// allow is when n bytes must have passed that may take d and what slowLink
// gives them.
func allow(d time.Duration, n int64) time.Time {
	return time.Now().Add(d + time.Duration(n/slowLink)*time.Second)
}

// records is what the gateway reads of the store.
type records interface {
	Client(key string) (store.Client, bool)
	Result(context.Context, receipt.JobID) (*store.Result, error)
	Nodes(context.Context) ([]store.Node, error)
	Sandbox(context.Context, digest.Digest) (*record.Signed, error)
}

// prover makes proofs from what the network has of nodes' logs.
type prover interface {
	Prove(ctx context.Context, node evm.Address, leaf evm.Hash, at time.Time) (*receiptlog.Inclusion, error)
}

// Gateway answers /v1/. Safe for concurrent use.
type Gateway struct {
	records  records
	prover   prover
	dispatch *dispatch.Dispatcher
	metrics  *metrics.Metrics
	log      *slog.Logger
	uploads  *shares // bytes
	proofs   *shares
	mux      *http.ServeMux
}

// Options bound the gateway.
type Options struct {
	MaxUploadBytes int64 // of requests that are still arriving
	Share          int   // how much of it one client may hold, in percent
}

// New makes a gateway.
func New(r records, d *dispatch.Dispatcher, p prover, m *metrics.Metrics, log *slog.Logger, opt Options) *Gateway {
	g := &Gateway{
		records: r, prover: p, dispatch: d, metrics: m, log: log, uploads: newShares(opt.MaxUploadBytes, opt.MaxUploadBytes/100*int64(opt.Share)),
		proofs: newShares(maxProofs, maxProofsOf), mux: http.NewServeMux(),
	}
	for _, route := range []struct {
		method, path string
		handle       func(http.ResponseWriter, *http.Request, store.Client)
	}{
		{"POST", "/v1/chat/completions", g.infer(wire.KindChat)},
		{"POST", "/v1/completions", g.infer(wire.KindCompletion)},
		{"GET", "/v1/models", g.models},
		{"GET", "/v1/models/{id}", g.model},
		{"GET", "/v1/receipts/{id}", g.receipt},
		{"GET", "/v1/receipts/{id}/proof", g.proof},
		{"GET", "/v1/sandbox/{digest}", g.sandbox},
		{"GET", "/v1/nodes", g.nodes},
	} {
		g.mux.Handle(route.method+" "+route.path, g.counted(route.path, g.authenticated(route.handle)))
		g.mux.Handle(route.path, g.counted(route.path, func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Allow", route.method)
			openai.WriteError(w, &openai.Error{
				Status: http.StatusMethodNotAllowed, Type: openai.TypeInvalidRequest, Code: "method_not_allowed",
				Message: "Not allowed to " + clean(r.Method) + " on this URL; use " + route.method + ".",
			})
		}))
	}
	g.mux.Handle("/v1/", g.counted("other", func(w http.ResponseWriter, _ *http.Request) {
		openai.WriteError(w, &openai.Error{Status: http.StatusNotFound, Type: openai.TypeInvalidRequest, Code: "unknown_url", Message: "Unknown request URL."})
	}))
	return g
}

func clean(method string) string {
	if len(method) > 16 {
		method = method[:16]
	}
	return method
}

// ServeHTTP implements [http.Handler].
func (g *Gateway) ServeHTTP(w http.ResponseWriter, r *http.Request) { g.mux.ServeHTTP(w, r) }

// statusGone stands in metrics for a client that left before its answer.
const statusGone = 499

// status remembers the status code for metrics.
type status struct {
	http.ResponseWriter
	code int
}

func (s *status) WriteHeader(code int) {
	s.code = code
	s.ResponseWriter.WriteHeader(code)
}

// Unwrap lets [http.ResponseController] reach the connection.
func (s *status) Unwrap() http.ResponseWriter { return s.ResponseWriter }

func (g *Gateway) counted(route string, next http.HandlerFunc) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s := &status{ResponseWriter: w, code: http.StatusOK}
		next(s, r)
		if r.Context().Err() != nil {
			s.code = statusGone
		}
		g.metrics.Requests.WithLabelValues(route, strconv.Itoa(s.code)).Inc()
	})
}

func (g *Gateway) authenticated(next func(http.ResponseWriter, *http.Request, store.Client)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		scheme, key, _ := strings.Cut(r.Header.Get("Authorization"), " ")
		if strings.EqualFold(scheme, "Bearer") && key != "" {
			if c, ok := g.records.Client(strings.TrimSpace(key)); ok {
				next(w, r, c)
				return
			}
		}
		w.Header().Set("WWW-Authenticate", "Bearer")
		openai.WriteError(w, &openai.Error{
			Status: http.StatusUnauthorized, Type: openai.TypeInvalidRequest, Code: "invalid_api_key",
			Message: "Incorrect or missing API key. Send one of this network's in the header Authorization: Bearer KEY.",
		})
	}
}

// infer answers the two APIs that models work for.
func (g *Gateway) infer(kind wire.Kind) func(http.ResponseWriter, *http.Request, store.Client) {
	return func(w http.ResponseWriter, r *http.Request, client store.Client) {
		t, stream, err := g.take(w, r, kind, client.Name)
		if err != nil {
			g.fail(w, err)
			return
		}
		w.Header().Set("X-Request-Id", t.ID().String())
		// The wait is bounded by the job's deadline; each write gets its own. It
		// fails on a closed connection only, and then so does writing.
		_ = http.NewResponseController(w).SetWriteDeadline(time.Time{})
		if stream {
			g.stream(w, r, t)
		} else {
			g.plain(w, r, t)
		}
	}
}

// take reads and checks a request and submits it. It reports whether the answer
// is to be a stream.
func (g *Gateway) take(w http.ResponseWriter, r *http.Request, kind wire.Kind, client string) (_ *dispatch.Ticket, stream bool, _ error) {
	cfg := g.dispatch.Terms().Config
	room := r.ContentLength
	if limit := cfg.Limits.RequestBytes; room < 0 || room > limit {
		room = limit // the most that is read
	}
	if !g.uploads.begin(client, room) {
		w.Header().Set("Connection", "close") // or the server would read the body before it answers
		return nil, false, &openai.Error{
			Status: http.StatusTooManyRequests, Type: "rate_limit_error", Code: "uploads_full",
			Message: "Too many requests are being sent at once. Please try again later.",
		}
	}
	defer g.uploads.end(client, room) // from here on the dispatcher counts its bytes
	body, err := readBody(w, r, cfg.Limits.RequestBytes)
	if err != nil {
		return nil, false, err
	}
	req, err := openai.Parse(kind, body, openai.Limits{
		RequestBytes: cfg.Limits.RequestBytes, Tokens: cfg.Limits.Tokens, Messages: cfg.Limits.Messages,
	})
	if err != nil {
		return nil, false, err
	}
	if req.Model != cfg.Runtime.Model {
		return nil, false, openai.ModelNotFound(req.Model)
	}
	t, err := g.dispatch.Submit(dispatch.Work{Kind: kind, Model: req.Model, Stream: req.Stream, Body: body, Client: client})
	return t, req.Stream, err
}

func readBody(w http.ResponseWriter, r *http.Request, limit int64) ([]byte, error) {
	if typ, _, err := mime.ParseMediaType(r.Header.Get("Content-Type")); err != nil || typ != "application/json" {
		return nil, &openai.Error{
			Status: http.StatusUnsupportedMediaType, Type: openai.TypeInvalidRequest, Code: "invalid_content_type",
			Message: "The body must be JSON; send the header Content-Type: application/json.",
		}
	}
	rc := http.NewResponseController(w)
	_ = rc.SetReadDeadline(allow(bodyTimeout, limit)) // fails on a closed connection only, and then so does reading
	var buf bytes.Buffer
	if n := r.ContentLength; n > 0 && n <= limit {
		buf.Grow(int(n) + bytes.MinRead)
	}
	_, err := buf.ReadFrom(http.MaxBytesReader(w, r.Body, limit))
	if err == nil { // else the server reads on before it answers, and would wait for ever
		_ = rc.SetReadDeadline(time.Time{}) // from here on a read only watches for the client's leaving
	}
	var tooLarge *http.MaxBytesError
	switch {
	case errors.As(err, &tooLarge):
		return nil, &openai.Error{
			Status: http.StatusRequestEntityTooLarge, Type: openai.TypeInvalidRequest, Code: "request_too_large",
			Message: "The request has more than " + strconv.FormatInt(limit, 10) + " bytes, the most that this network takes.",
		}
	case err != nil:
		return nil, &openai.Error{
			Status: http.StatusBadRequest, Type: openai.TypeInvalidRequest, Code: "incomplete_body",
			Message: "The request's body did not arrive in full, or not in time.",
		}
	}
	return buf.Bytes(), nil
}

func (g *Gateway) plain(w http.ResponseWriter, r *http.Request, t *dispatch.Ticket) {
	response, err := t.Wait(r.Context())
	if r.Context().Err() != nil {
		t.Cancel()
		return
	}
	if err != nil {
		g.fail(w, err)
		return
	}
	h := w.Header()
	h.Set(HeaderReceipt, t.ID().String())
	h.Set("Content-Type", "application/json")
	h.Set("Content-Length", strconv.Itoa(len(response)))
	_ = http.NewResponseController(w).SetWriteDeadline(allow(writeTimeout, int64(len(response)))) // as in infer
	failpoint.Here("gateway.answer.begin")
	_, _ = w.Write(response) // a client that has gone may still fetch the receipt
}

func (g *Gateway) stream(w http.ResponseWriter, r *http.Request, t *dispatch.Ticket) {
	rc := http.NewResponseController(w)
	var sent int
	var last []byte
	for {
		data, err := t.Next(r.Context(), sent)
		whole := errors.Is(err, io.EOF)
		switch {
		case r.Context().Err() != nil:
			t.Cancel()
			return
		case whole:
		case err != nil && sent == 0:
			g.fail(w, err)
			return
		case err != nil:
			// End an event that was cut, then say what happened. There is no end
			// mark: the stream is not whole.
			event := bytes.Join([][]byte{[]byte("data: "), asError(err).Body(), []byte("\n\n")}, nil)
			if !bytes.HasSuffix(last, []byte("\n\n")) {
				event = append([]byte("\n\n"), event...)
			}
			_ = rc.SetWriteDeadline(allow(writeTimeout, 0)) // as in infer
			_, _ = w.Write(event)                           // nobody is left to be told
			_ = rc.Flush()                                  // likewise
			return
		}
		if sent == 0 {
			h := w.Header()
			h.Set(HeaderReceipt, t.ID().String())
			h.Set("Content-Type", "text/event-stream; charset=utf-8")
			h.Set("Cache-Control", "no-cache")
			h.Set("X-Accel-Buffering", "no") // reverse proxies must not collect events
		}
		_ = rc.SetWriteDeadline(allow(writeTimeout, int64(len(data)))) // as in infer
		failpoint.Here("gateway.event.begin")
		_, err = w.Write(data)
		if whole {
			return // what is left is flushed together with the end of the body
		}
		if err == nil {
			err = rc.Flush()
		}
		if err != nil {
			t.Cancel()
			return
		}
		sent, last = sent+len(data), data
	}
}

// fail answers with what went wrong.
func (g *Gateway) fail(w http.ResponseWriter, err error) {
	e := asError(err)
	_ = http.NewResponseController(w).SetWriteDeadline(allow(writeTimeout, 0)) // as in infer
	switch e.Status {
	case http.StatusTooManyRequests:
		w.Header().Set("Retry-After", "1")
	case http.StatusServiceUnavailable:
		w.Header().Set("Retry-After", "5")
	}
	openai.WriteError(w, e)
}

// asError puts an error into OpenAI's words.
func asError(err error) *openai.Error {
	var e *openai.Error
	if errors.As(err, &e) {
		return e
	}
	server := func(status int, code, message string) *openai.Error {
		return &openai.Error{Status: status, Type: openai.TypeServer, Code: code, Message: message}
	}
	f, ok := dispatch.AsFailure(err)
	if !ok {
		return server(http.StatusInternalServerError, "internal", "Internal error.")
	}
	switch f.Outcome {
	case dispatch.QueueFull:
		return &openai.Error{Status: http.StatusTooManyRequests, Type: "rate_limit_error", Code: "queue_full", Message: f.Message}
	case dispatch.Storage:
		return server(http.StatusServiceUnavailable, "storage", "The network cannot write requests down at the moment. Please try again later.")
	case dispatch.NoNode:
		return server(http.StatusServiceUnavailable, "no_node", "No node is ready to serve the model. Please try again later.")
	case dispatch.Withdrawn:
		return server(http.StatusServiceUnavailable, "model_withdrawn", "The model is no longer served.")
	case dispatch.Closing:
		return server(http.StatusServiceUnavailable, "stopping", "The service is restarting. Please try again.")
	case dispatch.Deadline:
		return server(http.StatusGatewayTimeout, "deadline", "The request was not finished in time.")
	case dispatch.Diverged:
		return server(http.StatusBadGateway, "stream_interrupted", "The stream was interrupted and another node could not continue it. Please try again.")
	case dispatch.Refused:
		switch f.Code {
		case wire.CodeDeadline:
			return server(http.StatusGatewayTimeout, "deadline", "The request could not be finished in time.")
		case wire.CodeContext:
			return &openai.Error{Status: http.StatusBadRequest, Type: openai.TypeInvalidRequest, Code: openai.CodeContextLength, Message: f.Message}
		case wire.CodeBadRequest, wire.CodeLimit:
			return &openai.Error{Status: http.StatusBadRequest, Type: openai.TypeInvalidRequest, Code: string(f.Code), Message: f.Message}
		}
	}
	switch f.Code {
	case wire.CodeBusy, wire.CodeDraining, wire.CodeNotReady, wire.CodeConfig, wire.CodeUnknownModel, wire.CodeStorage:
		return server(http.StatusServiceUnavailable, "unavailable", "No node could take the request. Please try again.")
	}
	return server(http.StatusBadGateway, "node_failed", "No node could finish the request. Please try again.")
}

// Answers that are not inference.

type modelObject struct {
	ID      string `json:"id"`
	Object  string `json:"object"`
	Created int64  `json:"created"`
	OwnedBy string `json:"owned_by"`
}

func (g *Gateway) served() modelObject {
	t := g.dispatch.Terms()
	return modelObject{ID: t.Config.Runtime.Model, Object: "model", Created: t.Published.Unix(), OwnedBy: t.Config.Network.Name}
}

func (g *Gateway) models(w http.ResponseWriter, _ *http.Request, _ store.Client) {
	g.write(w, map[string]any{"object": "list", "data": []modelObject{g.served()}})
}

func (g *Gateway) model(w http.ResponseWriter, r *http.Request, _ store.Client) {
	m := g.served()
	if id := r.PathValue("id"); id != m.ID {
		openai.WriteError(w, openai.ModelNotFound(id))
		return
	}
	g.write(w, m)
}

// sandbox answers with the record that receipts name by its digest. Who has the
// digest has a receipt, or the record.
func (g *Gateway) sandbox(w http.ResponseWriter, r *http.Request, _ store.Client) {
	text := strings.TrimPrefix(strings.TrimPrefix(r.PathValue("digest"), "0x"), "sha256:")
	d, err := digest.ParseHex(text)
	if err != nil {
		err = store.ErrNotFound
	}
	var found *record.Signed
	if err == nil {
		found, err = g.records.Sandbox(r.Context(), d)
	}
	switch {
	case errors.Is(err, store.ErrNotFound):
		openai.WriteError(w, &openai.Error{
			Status: http.StatusNotFound, Type: openai.TypeInvalidRequest, Code: "sandbox_not_found", Param: "digest",
			Message: "No such record: its node has not sent it, or it is older than this network keeps receipts.",
		})
	case err != nil:
		g.log.Error("record of a sandbox could not be read", "digest", d, "error", err)
		openai.WriteError(w, &openai.Error{Status: http.StatusInternalServerError, Type: openai.TypeServer, Code: "storage", Message: "The record could not be read."})
	default:
		g.write(w, found)
	}
}

func (g *Gateway) receipt(w http.ResponseWriter, r *http.Request, _ store.Client) {
	if signed, _, ok := g.find(w, r); ok {
		g.write(w, signed)
	}
}

// find returns the receipt that a request names, and when it came, or answers.
func (g *Gateway) find(w http.ResponseWriter, r *http.Request) (_ *receipt.Signed, at time.Time, ok bool) {
	missing := &openai.Error{
		Status: http.StatusNotFound, Type: openai.TypeInvalidRequest, Code: "receipt_not_found", Param: "id",
		Message: "No such receipt: the request is not finished, or it has failed, or the receipt is older than this network keeps them.",
	}
	id, err := receipt.ParseJobID(r.PathValue("id"))
	if err != nil {
		openai.WriteError(w, missing)
		return nil, at, false
	}
	if r := g.dispatch.Receipt(id); r != nil { // asked first: it leaves for the store
		return r, time.Now(), true
	}
	res, err := g.records.Result(r.Context(), id)
	switch {
	case errors.Is(err, store.ErrNotFound):
		openai.WriteError(w, missing)
	case err != nil:
		g.log.Error("receipt could not be read", "job", id, "error", err)
		openai.WriteError(w, &openai.Error{Status: http.StatusInternalServerError, Type: openai.TypeServer, Code: "storage", Message: "The receipt could not be read."})
	default:
		return res.Receipt, res.Stored, true
	}
	return nil, at, false
}

// A proof reads up to some six hundred tiles, most a handful. maxProofs bounds how many are
// made at once, and maxProofsOf how many of one client.
const (
	maxProofs   = 8
	maxProofsOf = 2
)

func (g *Gateway) proof(w http.ResponseWriter, r *http.Request, c store.Client) {
	if !g.proofs.begin(c.Name, 1) {
		w.Header().Set("Retry-After", "1")
		openai.WriteError(w, &openai.Error{
			Status: http.StatusTooManyRequests, Type: "rate_limit_error", Code: "proofs_full",
			Message: "Too many proofs are being made at once: at most 2 with one API key, and 8 with all. Please try again.",
		})
		return
	}
	defer g.proofs.end(c.Name, 1)
	signed, at, ok := g.find(w, r)
	if !ok {
		return
	}
	stated := signed.Receipt()
	p, err := g.prover.Prove(r.Context(), stated.Node, receiptlog.Leaf(signed.Hash()), at)
	switch {
	case errors.Is(err, mirror.ErrPending):
		beat := g.dispatch.Terms().Config.Network.Heartbeat.Duration()
		w.Header().Set("Retry-After", strconv.Itoa(max(1, int(beat/time.Second))))
		openai.WriteError(w, &openai.Error{
			Status: http.StatusNotFound, Type: openai.TypeInvalidRequest, Code: "receipt_not_proven", Param: "id",
			Message: "The node has not shown this receipt in its log yet, which it does with its heartbeats. Please try again later.",
		})
	case errors.Is(err, store.ErrDamaged):
		openai.WriteError(w, &openai.Error{Status: http.StatusInternalServerError, Type: openai.TypeServer, Code: "log_damaged", Message: "The network's copy of the node's log is damaged. The receipt itself is not touched by this."})
	case err != nil:
		g.log.Error("proof could not be made", "job", stated.Job, "error", err)
		openai.WriteError(w, &openai.Error{Status: http.StatusInternalServerError, Type: openai.TypeServer, Code: "storage", Message: "The log of the node could not be read."})
	default:
		g.write(w, p)
	}
}

// node is one entry of GET /v1/nodes. What the node says about itself stands in
// heartbeat; everything else is the network's own knowledge.
type node struct {
	ID         string          `json:"id"`
	Object     string          `json:"object"`
	Registered int64           `json:"registered"` // Unix seconds
	Connected  bool            `json:"connected"`
	Since      int64           `json:"connected_since,omitempty"` // Unix seconds
	Routable   bool            `json:"routable"`
	Reason     string          `json:"reason,omitempty"` // why it gets no jobs
	Running    int             `json:"running"`          // jobs it has been given
	BeatAt     int64           `json:"heartbeat_at,omitempty"`
	Heartbeat  *wire.Heartbeat `json:"heartbeat,omitempty"`
}

func (g *Gateway) nodes(w http.ResponseWriter, r *http.Request, _ store.Client) {
	registered, err := g.records.Nodes(r.Context())
	if err != nil {
		g.log.Error("nodes could not be read", "error", err)
		openai.WriteError(w, &openai.Error{Status: http.StatusInternalServerError, Type: openai.TypeServer, Code: "storage", Message: "The nodes could not be read."})
		return
	}
	known := map[string]dispatch.NodeStatus{}
	for _, s := range g.dispatch.Nodes() {
		known[s.Address.Hex()] = s
	}
	list := make([]node, 0, len(registered))
	for _, n := range registered {
		v := node{ID: n.Address.Hex(), Object: "node", Registered: n.Registered / 1000, Reason: "not connected"}
		if s, ok := known[v.ID]; ok {
			v.Connected, v.Routable, v.Reason, v.Running, v.Heartbeat = s.Connected, s.Routable, s.Reason, s.Running, s.Heartbeat
			if s.Connected {
				v.Since = s.Since.Unix()
			}
			if s.Heartbeat != nil {
				v.BeatAt = s.BeatAt.Unix()
			}
		}
		list = append(list, v)
	}
	g.write(w, map[string]any{"object": "list", "data": list})
}

func (g *Gateway) write(w http.ResponseWriter, v any) {
	b, err := json.Marshal(v)
	if err != nil {
		g.log.Error("answer could not be written", "error", err)
		openai.WriteError(w, &openai.Error{Status: http.StatusInternalServerError, Type: openai.TypeServer, Message: "Internal error."})
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Content-Length", strconv.Itoa(len(b)))
	_, _ = w.Write(b) // who has gone needs no answer
}
