package network_test

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"net/http"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/resultity/node/internal/network"
	"github.com/resultity/node/internal/network/nodetest"
	"github.com/resultity/node/internal/snapshot"
	"github.com/resultity/node/internal/wire"
)

func TestRequestErrors(t *testing.T) {
	n := start(t, func(c *snapshot.Config) { c.Limits.RequestBytes = 2048 })
	n.node().Ready(t)
	for name, tc := range map[string]struct {
		method, path, body string
		header             []string
		status             int
		code               string
	}{
		"no key":          {"POST", "/v1/chat/completions", chat, []string{"Authorization", ""}, 401, "invalid_api_key"},
		"wrong key":       {"POST", "/v1/chat/completions", chat, []string{"Authorization", "Bearer rk-x"}, 401, "invalid_api_key"},
		"wrong scheme":    {"GET", "/v1/models", "", []string{"Authorization", "Basic " + n.apiKey}, 401, "invalid_api_key"},
		"key for nodes":   {"GET", "/v1/nodes", "", []string{"Authorization", ""}, 401, "invalid_api_key"},
		"key, receipts":   {"GET", "/v1/receipts/00000000000000000000000000000001", "", []string{"Authorization", ""}, 401, "invalid_api_key"},
		"no JSON":         {"POST", "/v1/chat/completions", "{", nil, 400, "invalid_json"},
		"no messages":     {"POST", "/v1/chat/completions", `{"model":"tiny"}`, nil, 400, "missing_required_parameter"},
		"form":            {"POST", "/v1/chat/completions", chat, []string{"Content-Type", "application/x-www-form-urlencoded"}, 415, "invalid_content_type"},
		"other model":     {"POST", "/v1/chat/completions", strings.Replace(chat, "tiny", "huge", 1), nil, 404, "model_not_found"},
		"too large":       {"POST", "/v1/chat/completions", strings.Replace(chat, "secret", strings.Repeat("x", 4096), 1), nil, 413, "request_too_large"},
		"GET":             {"GET", "/v1/chat/completions", "", nil, 405, "method_not_allowed"},
		"other path":      {"GET", "/v1/engines", "", nil, 404, "unknown_url"},
		"other model 2":   {"GET", "/v1/models/huge", "", nil, 404, "model_not_found"},
		"bad receipt":     {"GET", "/v1/receipts/xyz", "", nil, 404, "receipt_not_found"},
		"unknown receipt": {"GET", "/v1/receipts/00000000000000000000000000000001", "", nil, 404, "receipt_not_found"},
	} {
		r := n.do(t.Context(), tc.method, tc.path, tc.body, tc.header...)
		t.Logf("%s: expected: %d %s; got: %d %s", name, tc.status, tc.code, r.status, r.code())
		if r.err != nil || r.status != tc.status || r.code() != tc.code {
			t.Errorf("%s: %d %s %v, want %d %s", name, r.status, r.body, r.err, tc.status, tc.code)
		}
		if ct := r.header.Get("Content-Type"); ct != "application/json" {
			t.Errorf("%s: content type %q", name, ct)
		}
	}
}

func TestCompletion(t *testing.T) {
	n := start(t, nil)
	s := n.node().Ready(t)
	ch := make(chan reply, 1)
	go func() {
		ch <- n.do(context.Background(), "POST", "/v1/completions", `{"model":"tiny","prompt":"secret words"}`)
	}()
	j := s.Take()
	if j.Kind != wire.KindCompletion {
		t.Fatalf("job %+v", j)
	}
	s.Finish(j, "secret answer")
	if r := n.answer(ch); r.status != 200 || !bytes.Equal(r.body, nodetest.Body(j, "secret answer")) {
		t.Fatalf("%d %s", r.status, r.body)
	}
}

func TestModelsAndNodes(t *testing.T) {
	n := start(t, nil)
	v := n.node()
	away := n.node()
	v.Ready(t)
	var models struct {
		Object string
		Data   []struct {
			ID      string
			Object  string
			Created int64
			OwnedBy string `json:"owned_by"`
		}
	}
	if err := json.Unmarshal(n.get("/v1/models").body, &models); err != nil {
		t.Fatal(err)
	}
	if len(models.Data) != 1 || models.Object != "list" || models.Data[0].ID != "tiny" || models.Data[0].Object != "model" ||
		models.Data[0].OwnedBy != "testnet" || time.Since(time.Unix(models.Data[0].Created, 0)) > time.Minute {
		t.Fatalf("%+v", models)
	}
	if r := n.get("/v1/models/tiny"); r.status != 200 {
		t.Fatalf("%d %s", r.status, r.body)
	}
	var nodes struct {
		Data []struct {
			ID        string
			Connected bool
			Routable  bool
			Reason    string
			Heartbeat *wire.Heartbeat
		}
	}
	raw := n.get("/v1/nodes").body
	if err := json.Unmarshal(raw, &nodes); err != nil {
		t.Fatal(err)
	}
	if bytes.Contains(raw, []byte("account")) || bytes.Contains(raw, []byte("operator")) {
		t.Errorf("clients see whose nodes they are: %s", raw)
	}
	if len(nodes.Data) != 2 {
		t.Fatalf("%+v", nodes)
	}
	for _, d := range nodes.Data {
		switch d.ID {
		case v.Key.Address().Hex():
			if !d.Connected || !d.Routable || d.Heartbeat.Slots != 4 {
				t.Errorf("%+v", d)
			}
		case away.Key.Address().Hex():
			if d.Connected || d.Routable || d.Reason != "not connected" {
				t.Errorf("%+v", d)
			}
		default:
			t.Errorf("%+v", d)
		}
	}
	if r := n.get("/metrics"); r.status != http.StatusNotFound { // they are for the operator
		t.Errorf("metrics: %d %s", r.status, r.body)
	}
	if r := n.get("/healthz"); r.status != 200 || string(r.body) != "ok\n" {
		t.Errorf("healthz: %d %s", r.status, r.body)
	}
}

func TestNoNodeAtAll(t *testing.T) {
	t.Parallel() // it waits more than it works
	n := setUp(t, nil)
	n.tweak = func(c *network.Config) { c.NodeWait = time.Second }
	n.serve()
	r := n.answer(n.ask(chat))
	if r.status != 503 || r.code() != "no_node" || r.header.Get("Retry-After") == "" {
		t.Fatalf("%d %s", r.status, r.body)
	}
}

// A client whose job all nodes have refused is told so in time. One whose job a node
// has accepted waits for it, though the node refuses it afterwards.
func TestNoNodeTakesIt(t *testing.T) {
	t.Parallel()
	n := setUp(t, nil)
	n.tweak = func(c *network.Config) { c.NodeWait = time.Second }
	n.serve()
	s := n.node().Ready(t)
	refuse := func(j *wire.Job, code wire.Code) { s.Send(&wire.Refuse{Job: j.ID, Code: code}) }
	drain := func(on bool) {
		h := s.Node.Heartbeat()
		h.Draining = on
		s.Send(h)
	}
	ch := n.ask(chat)
	refuse(nodetest.Expect[*wire.Job](s), wire.CodeDraining)
	drain(true)
	if r := n.answer(ch); r.status != 503 || r.code() != "no_node" || r.header.Get("Retry-After") == "" {
		t.Errorf("%d %s", r.status, r.body)
	}
	// By a node that says all the while that it takes jobs.
	drain(false)
	n.until("it gets jobs", func() bool { return n.metric(`resultity_nodes{state="routable"}`) == 1 })
	ch = n.ask(chat)
	for range 5 {
		refuse(nodetest.Expect[*wire.Job](s), wire.CodeNotReady)
		drain(false)
	}
	if r := n.answer(ch); r.status != 503 || r.code() != "unavailable" || r.header.Get("Retry-After") == "" {
		t.Errorf("%d %s", r.status, r.body)
	}
	// By one that has accepted it.
	ch = n.ask(chat)
	j := s.Take()
	refuse(j, wire.CodeDraining)
	drain(true)
	n.until("it gets none", func() bool { return n.metric(`resultity_nodes{state="routable"}`) == 0 })
	if r := n.answer(n.ask(chat)); r.status != 503 || r.code() != "no_node" {
		t.Errorf("%d %s", r.status, r.body)
	}
	select {
	case r := <-ch:
		t.Fatalf("%d %s", r.status, r.body)
	default:
	}
	s.Finish(j, "hello")
	if r := n.answer(ch); r.status != 200 || !strings.Contains(string(r.body), "hello") {
		t.Errorf("%d %s", r.status, r.body)
	}
}

func TestQueueFull(t *testing.T) {
	n := setUp(t, func(c *snapshot.Config) { c.Runtime.Settings.Slots = 1 })
	n.tweak = func(c *network.Config) { c.MaxQueued = 1 }
	n.serve()
	s := n.node().Ready(t)
	first := n.ask(chat)
	j := s.Take()
	second := n.ask(chat)
	n.until("the second one waits", func() bool { return n.metric(`resultity_jobs{state="queued"}`) == 1 })
	r := n.answer(n.ask(chat))
	t.Logf("expected: 429 queue_full; got: %d %s, again after %s s", r.status, r.code(), r.header.Get("Retry-After"))
	if r.status != 429 || r.code() != "queue_full" || r.header.Get("Retry-After") == "" {
		t.Fatalf("%d %s", r.status, r.body)
	}
	// The slot is free before the first result is on disk: the second job and the
	// acknowledgement come in either order.
	s.Send(s.Node.Result(t, j, nodetest.Body(j, "one"), nil))
	serveAll(t, s, 2)
	if a, b := n.answer(first), n.answer(second); a.status != 200 || b.status != 200 {
		t.Fatalf("%d, %d", a.status, b.status)
	}
}

// Slow uploads take no more memory than there is for them, and one key's leave
// room for those of another.
func TestSlowUploads(t *testing.T) {
	n := setUp(t, nil)
	n.tweak = func(c *network.Config) { c.MaxUploadBytes = 4000 }
	n.serve()
	code, other, stderr := command(t, "apikey", "create", "--dir", n.dir, "--name", "other")
	if code != 0 {
		t.Fatal(stderr)
	}
	s := n.node().Ready(t)
	begin := func(key string, length int64) (*io.PipeWriter, <-chan reply) {
		body, w := io.Pipe()
		req, err := http.NewRequest(http.MethodPost, n.url+"/v1/chat/completions", body)
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Authorization", "Bearer "+key)
		req.Header.Set("Content-Type", "application/json")
		req.ContentLength = length
		ch := make(chan reply, 1)
		go func() {
			res, err := http.DefaultClient.Do(req)
			if err != nil {
				ch <- reply{err: err}
				return
			}
			defer res.Body.Close()
			b, err := io.ReadAll(res.Body)
			ch <- reply{res.StatusCode, res.Header, b, err}
		}()
		return w, ch
	}
	var said string
	slow := chat + strings.Repeat(" ", 1900-len(chat))
	w, first := begin(n.apiKey, int64(len(slow)))
	if _, err := io.WriteString(w, slow[:10]); err != nil {
		t.Fatal(err)
	}
	full := func(r reply) bool {
		said = strconv.Itoa(r.status) + " " + r.code()
		return r.status == http.StatusTooManyRequests && r.code() == "uploads_full" && r.header.Get("Retry-After") != ""
	}
	blank := strings.Repeat(" ", len(slow)) // read to its end, it is refused for what it is
	n.until("the first one is being read", func() bool { return full(n.answer(n.ask(blank))) })
	t.Logf("a second one of the same client: expected: 429 uploads_full; got: %s", said)
	// One of unknown length counts as the largest.
	if r := n.do(t.Context(), http.MethodPost, "/v1/chat/completions", "", "Content-Type", "text/plain"); r.status != http.StatusUnsupportedMediaType {
		t.Errorf("an empty one: %d %s", r.status, r.body)
	}
	w2, second := begin(other, -1)
	if _, err := io.WriteString(w2, "{"); err != nil {
		t.Fatal(err)
	}
	if r := n.answer(second); !full(r) {
		t.Errorf("of unknown length: %d %s", r.status, r.body)
	}
	t.Logf("one of unknown length: expected: 429 uploads_full; got: %s", said)
	_ = w2.Close() // nobody reads it any more
	w3, third := begin(other, int64(len(slow)))
	for _, w := range []*io.PipeWriter{w3, w} {
		at := 0
		if w != w3 {
			at = 10
		}
		if _, err := io.WriteString(w, slow[at:]); err != nil {
			t.Fatal(err)
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
	}
	serveAll(t, s, 2)
	for _, ch := range []<-chan reply{first, third} {
		if r := n.answer(ch); r.status != http.StatusOK {
			t.Errorf("%d %s", r.status, r.body)
		}
	}
	last := n.ask(slow) // there is room again
	serveAll(t, s, 1)
	if r := n.answer(last); r.status != http.StatusOK {
		t.Errorf("afterwards: %d %s", r.status, r.body)
	}
}

// serveAll does jobs until so many results are acknowledged.
func serveAll(t *testing.T, s *nodetest.Session, results int) {
	t.Helper()
	for acks := 0; acks < results; {
		m, err := s.Receive()
		if err != nil {
			t.Fatal(err)
		}
		switch m := m.(type) {
		case *wire.Job:
			s.Send(s.Node.Result(t, m, nodetest.Body(m, "fine"), nil))
		case *wire.Ack:
			acks += len(m.Jobs)
		}
	}
}

func TestDeadline(t *testing.T) {
	t.Parallel() // it waits more than it works
	n := start(t, func(c *snapshot.Config) { c.Limits.Deadline = 5 })
	s := n.node().Ready(t)
	plain, stream := n.ask(chat), n.ask(chatStream)
	a, b := s.Take(), s.Take()
	if a.Stream {
		a, b = b, a
	}
	s.Send(&wire.Chunk{Job: b.ID, Data: []byte("data: {\"cut")})
	if r := n.answer(plain); r.status != 504 || r.code() != "deadline" || r.header.Get("Resultity-Receipt") != "" {
		t.Errorf("%d %s", r.status, r.body)
	}
	// A stream that has begun ends with an error event, set apart from what was cut.
	r := n.answer(stream)
	head, event, _ := strings.Cut(string(r.body), "\n\n")
	var v struct{ Error struct{ Code string } }
	if err := json.Unmarshal([]byte(strings.TrimPrefix(strings.TrimSpace(event), "data: ")), &v); err != nil || r.status != 200 || head != "data: {\"cut" || v.Error.Code != "deadline" {
		t.Errorf("%d %q %v", r.status, r.body, err)
	}
	for range 2 {
		nodetest.Expect[*wire.Cancel](s)
	}
}

func TestNodeFailures(t *testing.T) {
	t.Parallel() // it waits more than it works
	n := start(t, nil)
	s := n.node().Ready(t)
	for _, tc := range []struct {
		code   wire.Code
		status int
		want   string
	}{
		{wire.CodeBadRequest, 400, "bad_request"},
		{wire.CodeContext, 400, "context_length_exceeded"},
		{wire.CodeLimit, 400, "limit"},
		{wire.CodeDeadline, 504, "deadline"},
		{wire.CodeEngine, 502, "node_failed"},
	} {
		for _, body := range []string{chat, chatStream} {
			ch := n.ask(body)
			attempts := 1
			if tc.code.Retryable() {
				attempts = 5
			}
			for range attempts {
				j := s.Take()
				s.Send(&wire.Result{Job: j.ID, Code: tc.code, Message: "why"})
				nodetest.Expect[*wire.Ack](s)
			}
			r := n.answer(ch)
			t.Logf("%s, stream %t: expected: %d %s; got: %d %s", tc.code, body == chatStream, tc.status, tc.want, r.status, r.code())
			if r.status != tc.status || r.code() != tc.want {
				t.Errorf("%s: %d %s", tc.code, r.status, r.body)
			}
		}
	}
}

// A client that hangs up cancels its job.
func TestClientDisconnects(t *testing.T) {
	n := start(t, nil)
	s := n.node().Ready(t)
	for name, body := range map[string]string{"plain": chat, "stream": chatStream} {
		ctx, cancel := context.WithCancel(t.Context())
		gone := make(chan struct{})
		go func() {
			defer close(gone)
			n.do(ctx, "POST", "/v1/chat/completions", body)
		}()
		j := s.Take()
		if j.Stream {
			s.Send(&wire.Chunk{Job: j.ID, Data: []byte("data: {}\n\n")})
		}
		cancel()
		if c := nodetest.Expect[*wire.Cancel](s); c.Job != j.ID {
			t.Fatalf("%s: another job is cancelled", name)
		}
		<-gone
		s.Send(&wire.Result{Job: j.ID, Code: wire.CodeCancelled})
		nodetest.Expect[*wire.Ack](s)
		if r := n.get("/v1/receipts/" + j.ID.String()); r.status != 404 {
			t.Errorf("%s: receipt of a cancelled job: %d", name, r.status)
		}
	}
	if v := n.metric(`resultity_jobs_total{outcome="cancelled"}`); v != 2 {
		t.Errorf("cancelled: %v", v)
	}
}

// Bytes arrive as they come, not at the end.
func TestStreamIsLive(t *testing.T) {
	n := start(t, nil)
	s := n.node().Ready(t)
	type opened struct {
		res *http.Response
		err error
	}
	ch := make(chan opened, 1)
	go func() {
		req, err := http.NewRequest("POST", n.url+"/v1/chat/completions", strings.NewReader(chatStream))
		if err != nil {
			ch <- opened{err: err}
			return
		}
		req.Header.Set("Authorization", "Bearer "+n.apiKey)
		req.Header.Set("Content-Type", "application/json")
		res, err := http.DefaultClient.Do(req)
		ch <- opened{res, err}
	}()
	j := s.Take()
	body := nodetest.Body(j, "one two three")
	s.Send(&wire.Chunk{Job: j.ID, Data: body[:1]})
	o := <-ch
	if o.err != nil {
		t.Fatal(o.err)
	}
	defer o.res.Body.Close()
	if id := o.res.Header.Get("Resultity-Receipt"); id != j.ID.String() {
		t.Errorf("receipt %q at the start", id)
	}
	got := make([]byte, 1)
	for i := range body[:200] {
		if _, err := io.ReadFull(o.res.Body, got); err != nil || got[0] != body[i] {
			t.Fatalf("byte %d: %q %v", i, got, err)
		}
		s.Send(&wire.Chunk{Job: j.ID, Offset: int64(i + 1), Data: body[i+1 : i+2]})
	}
	s.Finish(j, "one two three")
	rest, err := io.ReadAll(o.res.Body)
	if err != nil || !bytes.Equal(rest, body[200:]) {
		t.Fatalf("%q %v", rest, err)
	}
}

// A node dies in the middle of a stream: another one goes on, byte for byte.
func TestStreamSurvivesItsNode(t *testing.T) {
	t.Parallel() // it waits more than it works
	n := start(t, nil)
	a := n.node().Ready(t)
	ch := n.ask(chatStream)
	j := a.Take()
	body := nodetest.Body(j, "one two three four")
	sendChunks(a, j, body, 0, 200, 20)
	b := n.node().Ready(t)
	n.until("the first bytes are there", func() bool { return n.metric("resultity_first_byte_seconds_count") == 1 })
	a.Drop()
	again := b.Take()
	if again.ID != j.ID || again.Created != j.Created || again.Seed != j.Seed {
		t.Fatalf("%+v, want %+v again", again, j)
	}
	sendChunks(b, j, body, 0, len(body), 33)
	b.Finish(j, "one two three four")
	if r := n.answer(ch); r.status != 200 || !bytes.Equal(r.body, body) {
		t.Fatalf("%d %s", r.status, r.body)
	}
	if v := n.metric(`resultity_reassignments_total{reason="session_lost"}`); v != 1 {
		t.Errorf("reassignments: %v", v)
	}
}
