package wire

import (
	"bytes"
	"encoding/json"
	"errors"
	"reflect"
	"strings"
	"testing"

	"github.com/resultity/node/internal/bridge/contract"
	"github.com/resultity/node/internal/determinism"
	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/evm"
	"github.com/resultity/node/internal/receipt"
	"github.com/resultity/node/internal/receiptlog"
	"github.com/resultity/node/internal/sandbox/record"
)

// full is a message of each type in which every field says something, so that
// each can be spoiled; some types have two.
func full(t *testing.T) []Message {
	t.Helper()
	key := newKey(t)
	log, head, leaves := grown(t, 7)
	d, id := digest.Of([]byte("d")), receipt.NewJobID()
	o, err := SealOrder(key, &Directive{ID: NewOrderID(), Network: "testnet", Node: key.Address(), Kind: OrderDrain, Reason: "well", Issued: 1, Expires: 2})
	if err != nil {
		t.Fatal(err)
	}
	batch, data := pack(t, MaxLogBatch, logRecord(1, nil))
	logs, err := SealLogs(key, *batch, data)
	if err != nil {
		t.Fatal(err)
	}
	look := &record.Record{
		Version: record.Version, Node: key.Address(), Network: "testnet", Time: 1, Start: strings.Repeat("a", 32), Config: d, Image: d,
		Views: record.Views{Inside: contract.Sandbox{Version: contract.Version, OK: true, Checks: []contract.Check{{Name: "x", OK: true}}}},
	}
	sandbox, err := look.Sign(key)
	if err != nil {
		t.Fatal(err)
	}
	all := []Message{
		&Hello{Agent: "v1", Config: d, Count: 3}, &Welcome{Session: "s", Server: "v1"}, &Status{Routable: true, Reason: "r"},
		&Heartbeat{
			Config: d, Models: []ModelState{{Name: "m", Version: "1", Digest: d, State: "active"}}, Runtime: RuntimeState{State: "active", Engine: "e", Image: d, Restarts: 1},
			Hardware: Hardware{Arch: "amd64", CPUs: 2, Memory: 3, Disk: 4, GPUs: []string{"g"}, OS: "o", Kernel: "k", Podman: "p", Systemd: "s"},
			Slots:    2, Busy: 1, Outbox: 1, Draining: true, Failed: &Failed{Config: d, Step: "unit", Reason: "r", Final: true},
			Class: &Class{Digest: d, Hardware: determinism.Hardware{Arch: "amd64", CPU: "c", CPUs: 2, Features: []string{"f"}, GPUs: []string{"g"}, Driver: "d"}, Fingerprint: d},
			Head:  head,
		},
		&Job{ID: id, Model: "m", Kind: KindChat, Stream: true, Request: []byte("hi"), Seed: 1, Created: 2, Deadline: 3, Config: d},
		&Accept{Job: id}, &Refuse{Job: id, Code: CodeBusy, Message: "m"}, &Chunk{Job: id, Offset: 1, Data: []byte("hi")},
		newResult(t, 10), &Result{Job: id, Code: CodeEngine, Message: "m"},
		&Ack{Jobs: []receipt.JobID{id}}, &Cancel{Job: id, Reason: "r"}, &Update{Version: 2}, &Bye{Reason: "r"},
		o, &OrderDone{ID: o.ID, Outcome: OutcomeOK, Message: "m"}, &OrderAck{ID: o.ID},
		logs, &LogsAck{Spool: strings.Repeat("ab", 16), Position: 1}, &Bound{Account: "a", Method: MethodToken, Since: 1},
		&Leaves{From: 7, Leaves: leaves, Edge: log.Hashes()}, &LeavesAck{Size: 7, Head: head, Edge: log.Hashes()},
		&Sandbox{Sandbox: sandbox}, &SandboxAck{Digest: d},
	}
	have := map[Type]bool{}
	for _, m := range all {
		have[m.Type()] = true
	}
	for typ := range messages {
		if !have[typ] {
			t.Errorf("there is no %s to spoil", typ)
		}
	}
	return all
}

// A span is a value of a JSON text, or a member of an object with its name.
type span struct{ begin, end int }

// spans finds them in a text without white space.
func spans(t *testing.T, b []byte) (values, members []span) {
	at := 0
	var value func()
	value = func() {
		begin := at
		switch b[at] {
		case '{', '[':
			object := b[at] == '{'
			for at++; b[at] != '}' && b[at] != ']'; {
				first := at
				if b[at] == ',' {
					at++
				}
				if object {
					value() // the name
					at++    // the colon
				}
				value()
				if object {
					members = append(members, span{first, at})
				}
			}
			at++
		case '"':
			for at++; b[at] != '"'; at++ {
				if b[at] == '\\' {
					at++
				}
			}
			at++
		default:
			for at < len(b) && !bytes.ContainsRune([]byte(",]}:"), rune(b[at])) {
				at++
			}
		}
		values = append(values, span{begin, at})
	}
	value()
	if at != len(b) {
		t.Fatalf("%s was read up to byte %d", b, at)
	}
	return values, members
}

// Whatever stands in the place of any value of any message, it is taken as what
// it says, or its sender is to blame for it.
func TestEverySpoiltFieldIsTheSendersFault(t *testing.T) {
	instead := []string{
		"", "null", "true", "0", "-1", "1.5", "1e400", "65537", "9223372036854775808", "18446744073709551616", `""`, `"x"`, `"AA=="`, `"\u0000"`, "\"\xff\"", `"` + strings.Repeat("x", 5000) + `"`,
		`"00000000000000000000000000000000"`, `"0x` + strings.Repeat("0", 64) + `"`, `"sha256:` + strings.Repeat("0", 64) + `"`,
		"[]", "[null]", "{}", `{"x":1}`, strings.Repeat("[", 11_000),
	}
	for _, m := range full(t) {
		typ, dir := []byte(m.Type()), m.direction()
		raw, err := encode(nil, m)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := decode(typ, dir, raw); err != nil || !reflect.DeepEqual(got, m) {
			t.Errorf("%s: %+v, %v", typ, got, err)
			continue
		}
		try := func(s span, instead string) {
			spoilt := append(append(bytes.Clone(raw[:s.begin]), instead...), raw[s.end:]...)
			got, err := decode(typ, dir, spoilt)
			switch {
			case err != nil && !errors.Is(err, ErrMalformed):
				t.Errorf("%s with %.80q for %s: %v, want ErrMalformed", typ, instead, raw[s.begin:s.end], err)
			case err != nil && len(err.Error()) > 1000:
				t.Errorf("%s with %.80q for %s: an error of %d bytes", typ, instead, raw[s.begin:s.end], len(err.Error()))
			case err != nil:
			default:
				if where, ok := nobodys(reflect.ValueOf(got)); ok {
					t.Errorf("%s with %.80q for %s: taken with no job in %s", typ, instead, raw[s.begin:s.end], where)
				}
				again, err := encode(nil, got)
				if err != nil {
					t.Errorf("%s with %.80q for %s: taken, and cannot be said again: %v", typ, instead, raw[s.begin:s.end], err)
				} else if twice, err := decode(typ, dir, again); err != nil {
					t.Errorf("%s with %.80q for %s: taken as %s, and then not: %v", typ, instead, raw[s.begin:s.end], again, err)
				} else if b, err := encode(nil, twice); err != nil || !bytes.Equal(b, again) {
					t.Errorf("%s with %.80q for %s: taken as %s, and then as %s, %v", typ, instead, raw[s.begin:s.end], again, b, err)
				}
			}
		}
		values, members := spans(t, raw)
		for _, s := range values {
			for _, i := range instead {
				try(s, i)
			}
		}
		for _, s := range members {
			try(s, "")
		}
	}
}

// nobodys finds a job's id that names none.
func nobodys(v reflect.Value) (where string, found bool) {
	switch {
	case v.Type() == reflect.TypeFor[receipt.JobID]():
		return "", v.IsZero()
	case v.Kind() == reflect.Pointer && !v.IsNil():
		return nobodys(v.Elem())
	case v.Kind() == reflect.Struct:
		for i := range v.NumField() {
			if where, found := nobodys(v.Field(i)); found {
				return "." + v.Type().Field(i).Name + where, true
			}
		}
	case v.Kind() == reflect.Slice:
		for i := range v.Len() {
			if where, found := nobodys(v.Index(i)); found {
				return "[]" + where, true
			}
		}
	}
	return "", false
}

// What the protocol bounds is refused where it enters.
func TestOutOfBounds(t *testing.T) {
	signed := newResult(t, 10).Receipt
	nobody := receipt.JobID{}
	zeroSig := func(s statement) statement { s.Signature = evm.Signature{}; return s }
	for _, m := range full(t) {
		var bad []Message
		switch m := m.(type) {
		case *Heartbeat:
			for _, change := range []func(*Heartbeat){
				func(h *Heartbeat) { h.Models = make([]ModelState, maxListed+1) }, func(h *Heartbeat) { h.Hardware.GPUs = make([]string, maxListed+1) },
				func(h *Heartbeat) { h.Slots = -1 }, func(h *Heartbeat) { h.Slots = maxSlots + 1 }, func(h *Heartbeat) { h.Busy = -1 }, func(h *Heartbeat) { h.Busy = maxSlots + 1 },
				func(h *Heartbeat) { h.Class = &Class{Hardware: h.Class.Hardware} },
				func(h *Heartbeat) { h.Class = &Class{Digest: h.Config} },
				func(h *Heartbeat) {
					h.Class = &Class{Digest: h.Config, Hardware: determinism.Hardware{Arch: "amd64", CPU: "\x1b[2J"}}
				},
				func(h *Heartbeat) {
					h.Class = &Class{Digest: h.Config, Hardware: determinism.Hardware{Arch: "amd64", GPUs: make([]string, 65)}}
				},
				func(h *Heartbeat) { h.Head = &receiptlog.SignedHead{} },
			} {
				h := *m
				change(&h)
				bad = append(bad, &h)
			}
		case *Job:
			j := *m
			j.ID = nobody
			bad = append(bad, &j)
		case *Accept:
			bad = append(bad, &Accept{})
		case *Refuse:
			bad = append(bad, &Refuse{Code: m.Code})
		case *Chunk:
			bad = append(bad, &Chunk{Data: m.Data})
		case *Result:
			bad = append(bad, &Result{Code: m.Code, Response: m.Response}, &Result{Job: m.Job, Code: CodeEngine, Response: []byte("x")},
				&Result{Job: m.Job, Code: CodeEngine, Receipt: signed}, &Result{Job: m.Job, Message: "m", Response: []byte("x"), Receipt: signed})
		case *Ack:
			bad = append(bad, &Ack{Jobs: append(m.Jobs, nobody)})
		case *Cancel:
			bad = append(bad, &Cancel{Reason: m.Reason})
		case *OrderDone:
			bad = append(bad, &OrderDone{ID: m.ID}, &OrderDone{ID: m.ID, Outcome: "perhaps"}, &OrderDone{ID: m.ID, Outcome: OutcomeOK, Message: "a\nb"},
				&OrderDone{ID: m.ID, Outcome: OutcomeOK, Message: strings.Repeat("x", MaxOrderMessage+1)})
		case *Sandbox:
			bad = append(bad, &Sandbox{})
		case *Leaves:
			bad = append(bad, &Leaves{From: m.From, Edge: m.Edge}, &Leaves{From: 1, Leaves: m.Leaves, Edge: m.Edge})
		case *LeavesAck:
			bad = append(bad, &LeavesAck{Size: m.Size}, &LeavesAck{Head: m.Head})
		case *Logs: // looked at when it is opened
			if _, _, err := (&Logs{zeroSig(m.statement), m.Data}).Open(); !errors.Is(err, ErrMalformed) {
				t.Errorf("logs with a signature that nobody makes: %v", err)
			}
		case *Order:
			if _, _, err := (&Order{m.ID, zeroSig(m.statement)}).Open(); !errors.Is(err, ErrMalformed) {
				t.Errorf("an order with a signature that nobody makes: %v", err)
			}
		}
		for _, m := range bad {
			raw, err := json.Marshal(m)
			if r, ok := m.(*Result); ok {
				raw, err = r.AppendJSON(nil)
			}
			if err != nil {
				t.Fatal(err)
			}
			if got, err := decode([]byte(m.Type()), m.direction(), raw); !errors.Is(err, ErrMalformed) {
				t.Errorf("%s %.300s: %+v, %v", m.Type(), raw, got, err)
			}
		}
	}
}
