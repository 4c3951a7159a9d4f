package network_test

import (
	"fmt"
	"net/http"
	"strings"
	"sync"
	"testing"

	"github.com/gorilla/websocket"

	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/evm"
	"github.com/resultity/node/internal/network/nodetest"
	"github.com/resultity/node/internal/receipt"
	"github.com/resultity/node/internal/wire"
)

// misspelt is a message of a type, properly tagged, around any JSON.
type misspelt struct {
	wire.Message
	data string
}

func (m misspelt) MarshalJSON() ([]byte, error) { return []byte(m.data), nil }

// lie is what a hostile node says in a session in which it has a plain job of its own
// to do, and what becomes of it.
type lie struct {
	say    func(t *testing.T, s *nodetest.Session, j *wire.Job) wire.Message
	reason string // for which it is refused; "" if it is taken, and does no harm
}

// lies are by the type of the message; a type has to have one at least.
var lies = map[wire.Type]map[string]lie{
	"hello": {"a second time": {func(_ *testing.T, s *nodetest.Session, _ *wire.Job) wire.Message {
		return &wire.Hello{Agent: "x", Count: 1 << 50}
	}, "order"}},
	"heartbeat": {
		"too many models":   {beat(func(b *wire.Heartbeat) { b.Models = make([]wire.ModelState, 257) }), "malformed"},
		"too many GPUs":     {beat(func(b *wire.Heartbeat) { b.Hardware.GPUs = make([]string, 257) }), "malformed"},
		"negative slots":    {beat(func(b *wire.Heartbeat) { b.Slots = -1 }), "malformed"},
		"a million slots":   {beat(func(b *wire.Heartbeat) { b.Slots = 1 << 20 }), "malformed"},
		"negative busy":     {beat(func(b *wire.Heartbeat) { b.Busy = -1 }), "malformed"},
		"a million busy":    {beat(func(b *wire.Heartbeat) { b.Busy = 1 << 20 }), "malformed"},
		"a class of none":   {beat(func(b *wire.Heartbeat) { b.Class = new(wire.Class) }), "malformed"},
		"a class of quotes": {beat(func(b *wire.Heartbeat) { b.Class = classOf(`a"b`) }), "malformed"},
		"a class of texts":  {beat(func(b *wire.Heartbeat) { b.Class = classOf(strings.Repeat("x", 1000)) }), "malformed"},
		"long texts": {beat(func(b *wire.Heartbeat) {
			b.Runtime.State, b.Hardware.OS = strings.Repeat("x", 1<<20), strings.Repeat("\x1b[2J", 1<<16)
		}), ""},
	},
	"accept": {"of a job that it has not": {func(*testing.T, *nodetest.Session, *wire.Job) wire.Message {
		return &wire.Accept{Job: receipt.NewJobID()}
	}, ""}},
	"refuse": {
		"of a job that it has not": {func(*testing.T, *nodetest.Session, *wire.Job) wire.Message {
			return &wire.Refuse{Job: receipt.NewJobID(), Code: wire.CodeBadRequest}
		}, ""},
		"without a code that there is": {func(_ *testing.T, _ *nodetest.Session, j *wire.Job) wire.Message {
			return &wire.Refuse{Job: j.ID, Code: "nonsense", Message: strings.Repeat("x", 1<<20)}
		}, ""},
		"that the request is bad": {func(_ *testing.T, _ *nodetest.Session, j *wire.Job) wire.Message {
			return &wire.Refuse{Job: j.ID, Code: wire.CodeBadRequest, Message: "secret words"}
		}, ""},
	},
	"chunk": {
		"of a job that is no stream": {func(_ *testing.T, _ *nodetest.Session, j *wire.Job) wire.Message {
			return &wire.Chunk{Job: j.ID, Data: []byte("x")}
		}, "invalid"},
		"of a job that it has not": {func(*testing.T, *nodetest.Session, *wire.Job) wire.Message {
			return &wire.Chunk{Job: receipt.NewJobID(), Offset: 1 << 62, Data: []byte("x")}
		}, ""},
	},
	"result": {
		"of a job that it has not": {func(t *testing.T, s *nodetest.Session, j *wire.Job) wire.Message {
			other := *j
			other.ID = receipt.NewJobID()
			return s.Node.Result(t, &other, nodetest.Body(&other, "secret answer"), nil)
		}, ""},
		"too long":           {result(func(r *wire.Result) { r.Response = make([]byte, 1<<20+1) }), "invalid"},
		"without a receipt":  {result(func(r *wire.Result) { r.Receipt = nil }), "invalid"},
		"another response":   {result(func(r *wire.Result) { r.Response = append(r.Response, ' ') }), "invalid"},
		"failed, with words": {result(func(r *wire.Result) { r.Code, r.Message = wire.CodeEngine, strings.Repeat("x", 1<<20) }), "malformed"},
		"another's receipt": {func(t *testing.T, s *nodetest.Session, j *wire.Job) wire.Message {
			return nodetest.New(t, s.Node.URL, nodetest.JSON(t, s.Node.Config)).Result(t, j, nodetest.Body(j, "secret answer"), nil)
		}, "invalid"},
		"another model": {func(t *testing.T, s *nodetest.Session, j *wire.Job) wire.Message {
			return s.Node.Result(t, j, nodetest.Body(j, "secret answer"), func(r *receipt.Receipt) { r.Measured.ModelDigest = digest.Of([]byte("x")) })
		}, "invalid"},
	},
	"bye": {"before it has done its job": {func(*testing.T, *nodetest.Session, *wire.Job) wire.Message {
		return &wire.Bye{Reason: strings.Repeat("\n", 1<<20)}
	}, "bye"}},
	"orderdone": {
		"of no order":              {done(wire.OrderDone{ID: wire.NewOrderID(), Outcome: wire.OutcomeOK}), ""},
		"an outcome that is none":  {done(wire.OrderDone{ID: wire.NewOrderID(), Outcome: "nonsense"}), "malformed"},
		"a message that is a tome": {done(wire.OrderDone{ID: wire.NewOrderID(), Outcome: wire.OutcomeFailed, Message: strings.Repeat("x", wire.MaxOrderMessage+1)}), "malformed"},
	},
	"logs": {
		"of another node": {func(t *testing.T, s *nodetest.Session, _ *wire.Job) wire.Message {
			return batch(t, nodetest.New(t, s.Node.URL, nodetest.JSON(t, s.Node.Config)), 0, logRecord(1, "ab"))
		}, "logs"},
		"with a prompt": {func(t *testing.T, s *nodetest.Session, _ *wire.Job) wire.Message {
			r := logRecord(1, "ab")
			r.Fields["prompt"] = "x"
			return batch(t, s.Node, 0, r)
		}, "logs"},
	},
	"leaves": {
		"a gap": {func(*testing.T, *nodetest.Session, *wire.Job) wire.Message {
			return &wire.Leaves{From: 1 << 40, Leaves: []evm.Hash{{1}}}
		}, "receiptlog"},
		"too many": {func(*testing.T, *nodetest.Session, *wire.Job) wire.Message {
			return &wire.Leaves{Leaves: make([]evm.Hash, wire.MaxLeaves+1)}
		}, "malformed"},
	},
	"sandbox": {"of another node": {func(t *testing.T, s *nodetest.Session, _ *wire.Job) wire.Message {
		return &wire.Sandbox{Sandbox: nodetest.New(t, s.Node.URL, nodetest.JSON(t, s.Node.Config)).Record(t, nil)}
	}, "sandbox"}},
}

func beat(change func(*wire.Heartbeat)) func(*testing.T, *nodetest.Session, *wire.Job) wire.Message {
	return func(_ *testing.T, s *nodetest.Session, _ *wire.Job) wire.Message {
		b := s.Node.Heartbeat()
		change(b)
		return b
	}
}

func classOf(cpu string) *wire.Class {
	c := &wire.Class{Digest: digest.Of([]byte("x"))}
	c.Hardware.CPU = cpu
	return c
}

func result(change func(*wire.Result)) func(*testing.T, *nodetest.Session, *wire.Job) wire.Message {
	return func(t *testing.T, s *nodetest.Session, j *wire.Job) wire.Message {
		r := s.Node.Result(t, j, nodetest.Body(j, "secret answer"), nil)
		change(r)
		return r
	}
}

func done(d wire.OrderDone) func(*testing.T, *nodetest.Session, *wire.Job) wire.Message {
	return func(*testing.T, *nodetest.Session, *wire.Job) wire.Message { return &d }
}

// misspellings of a message of any type, each of which a careless parser would take.
var misspellings = map[string]string{
	"an unknown field": `{"nobody knows":1}`,
	"a number":         `{"job":1,"id":1,"config":1,"sandbox":1,"body":1,"reason":1,"from":"x","count":-1}`,
	"deep":             `{"x":` + strings.Repeat("[", 5000) + strings.Repeat("]", 5000) + `}`,
}

// A node that keeps to the protocol's frames and lies in the messages, in each type of
// them: what it says is refused for a reason that the log and the metrics name, or does no
// harm. The job that it had is done by another node in any case, and the
// client has the right answer.
func TestHostileNode(t *testing.T) {
	n := setUp(t, nil)
	var mu sync.Mutex
	var said []string
	n.logs.on = func(line []byte) {
		mu.Lock()
		defer mu.Unlock()
		if strings.Contains(string(line), "event=node-frame-refused") {
			said = append(said, string(line))
		}
	}
	n.serve()
	other := n.node()
	cases := map[wire.Type]map[string]lie{}
	for _, m := range wire.Messages(wire.ToNetwork) {
		typ := m.Type()
		if len(lies[typ]) == 0 {
			t.Errorf("nobody lies in a %s", typ)
		}
		cases[typ] = map[string]lie{}
		for name, l := range lies[typ] {
			cases[typ][name] = l
		}
		for name, data := range misspellings {
			if typ == "bye" && name == "a number" {
				data = `{"reason":1}`
			}
			cases[typ][name] = lie{func(*testing.T, *nodetest.Session, *wire.Job) wire.Message { return misspelt{m, data} }, "malformed"}
		}
	}
	for _, m := range wire.Messages(wire.ToNode) {
		cases[m.Type()] = map[string]lie{"in the wrong direction": {func(*testing.T, *nodetest.Session, *wire.Job) wire.Message { return misspelt{m, "{}"} }, "malformed"}}
	}
	for typ := range lies {
		if cases[typ] == nil {
			t.Errorf("%s is no message", typ)
		}
	}
	for typ, all := range cases {
		for name, l := range all {
			t.Run(fmt.Sprintf("%s/%s", typ, name), func(t *testing.T) {
				mu.Lock()
				said = nil
				mu.Unlock()
				series := `resultity_frames_refused_total{reason="` + l.reason + `"}`
				before := n.metric(series)
				s := n.node().Ready(t)
				ch := n.ask(chat)
				j := s.Take()
				honest := other.Ready(t)
				s.Send(l.say(t, s, j))
				switch l.reason {
				case "":
					// It is still there, and what it says next is taken.
					id := wire.NewOrderID()
					s.Send(&wire.OrderDone{ID: id, Outcome: wire.OutcomeOK})
					for {
						m, err := s.Receive()
						if err != nil {
							t.Fatalf("the session has ended: %v", err)
						}
						if a, ok := m.(*wire.OrderAck); ok && a.ID == id {
							break
						}
					}
					t.Log("expected: taken, and no harm done; got: so")
					s.Drop() // the job is free for the other
				case "bye":
					end := s.Ended()
					if end.Code != websocket.CloseNormalClosure {
						t.Errorf("closed with %v", end)
					}
					t.Logf("expected: session ended with 1000, the job goes elsewhere; got: %v", end)
				default:
					end := s.Ended()
					if end.Code != websocket.ClosePolicyViolation || end.Text == "" {
						t.Errorf("closed with %v", end)
					}
					n.until("it is counted", func() bool { return n.metric(series) == before+1 })
					mu.Lock()
					if len(said) != 1 || !strings.Contains(said[0], "reason="+l.reason+" ") || !strings.Contains(strings.ToLower(said[0]), strings.ToLower(s.Node.Key.Address().Hex())) {
						t.Errorf("the log does not say once that it was refused for %s: %q", l.reason, said)
					}
					mu.Unlock()
					t.Logf("expected: session ended with 1008, node-frame-refused with reason %s, the job goes elsewhere; got: %v", l.reason, end)
				}
				honest.Finish(honest.Take(), "fine")
				if r := n.answer(ch); r.status != http.StatusOK || !strings.Contains(string(r.body), "fine") {
					t.Errorf("the client got %d %s", r.status, r.body)
				}
				honest.Send(&wire.Bye{})
				if code := honest.Closed(); code != websocket.CloseNormalClosure {
					t.Errorf("the honest node: closed with %d", code)
				}
			})
		}
	}
}
