package network_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/gorilla/websocket"

	"github.com/resultity/node/internal/evm"
	"github.com/resultity/node/internal/network"
	"github.com/resultity/node/internal/network/nodetest"
	"github.com/resultity/node/internal/wire"
)

const testSpool = "0123456789abcdef0123456789abcdef"

func logRecord(n uint64, job string) wire.LogRecord {
	return wire.LogRecord{
		Position: n, Time: time.Now().UnixMilli(), Level: "INFO", Event: "job-done", Message: "job done",
		Fields: map[string]string{"job": job, "count": fmt.Sprint(n)},
	}
}

// batch makes an honest batch of a node.
func batch(t *testing.T, v *nodetest.Node, after uint64, records ...wire.LogRecord) *wire.Logs {
	t.Helper()
	p := wire.NewPacker(wire.MaxLogBatch)
	for _, r := range records {
		raw, err := json.Marshal(r)
		if err != nil {
			t.Fatal(err)
		}
		if !p.Add(raw) {
			t.Fatal("no room")
		}
	}
	l, err := wire.SealLogs(v.Key, wire.LogBatch{
		Network: "testnet", Node: v.Key.Address(), Spool: testSpool, After: after, Last: records[len(records)-1].Position, Count: uint64(len(records)),
	}, p.Data())
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func span(from, to uint64) (list []wire.LogRecord) {
	for n := from; n <= to; n++ {
		list = append(list, logRecord(n, fmt.Sprintf("%032x", n)))
	}
	return list
}

func upload(s *nodetest.Session, l *wire.Logs) uint64 {
	s.Send(l)
	a := nodetest.Expect[*wire.LogsAck](s)
	if a.Spool != testSpool {
		s.Fatalf("%+v", a)
	}
	return a.Position
}

func (n *testNetwork) logLines(args ...string) (list []network.LogLine) {
	n.t.Helper()
	code, out := n.run(append([]string{"logs", "--json"}, args...)...)
	if code != 0 {
		n.t.Fatalf("%d: %s", code, out)
	}
	for line := range strings.Lines(out) {
		var l network.LogLine
		if err := json.Unmarshal([]byte(line), &l); err != nil {
			n.t.Fatalf("%v: %s", err, line)
		}
		list = append(list, l)
	}
	return list
}

// Each record is stored once, wherever the session, the network or an
// acknowledgement is lost.
func TestLogsAreStoredOnce(t *testing.T) {
	n := start(t, nil)
	v := n.node()
	s := v.Connect(t)
	if p := upload(s, batch(t, v, 0, span(1, 10)...)); p != 10 {
		t.Fatalf("position %d", p)
	}
	// The session is cut in the middle of the frame.
	s.SendPart(batch(t, v, 10, span(11, 500)...))
	s.Drop()
	s = v.Connect(t)
	for range 3 { // the acknowledgement was lost twice
		if p := upload(s, batch(t, v, 10, span(11, 500)...)); p != 500 {
			t.Fatalf("position %d", p)
		}
	}
	n.stop()
	n.serve()
	v.URL = n.url
	s = v.Connect(t)
	// What the node sends again goes further than before.
	if p := upload(s, batch(t, v, 10, span(11, 600)...)); p != 500 {
		t.Fatalf("position %d", p)
	}
	if p := upload(s, batch(t, v, 500, span(501, 600)...)); p != 600 {
		t.Fatalf("position %d", p)
	}
	// Records that the node had to drop are a gap.
	if p := upload(s, batch(t, v, 600, span(631, 640)...)); p != 640 {
		t.Fatalf("position %d", p)
	}
	seen, dropped := map[uint64]int{}, uint64(0)
	for _, l := range n.logLines("--node", v.Key.Address().Hex()) {
		if l.Node != v.Key.Address() {
			t.Fatalf("%+v", l)
		}
		if dropped += l.Dropped; l.Dropped == 0 {
			seen[l.Position]++
		}
	}
	for p := uint64(1); p <= 640; p++ {
		if want := 1; seen[p] != want && (p <= 600 || p > 630) {
			t.Fatalf("record %d is there %d times", p, seen[p])
		}
	}
	if len(seen) != 610 || dropped != 30 {
		t.Errorf("%d records and %d dropped", len(seen), dropped)
	}
	job := fmt.Sprintf("%032x", 77)
	if l := n.logLines("--job", job); len(l) != 1 || l[0].Position != 77 || l[0].Fields["job"] != job {
		t.Errorf("of job 77: %+v", l)
	}
	if _, out := n.run("logs", "--job", job); !strings.Contains(out, "INFO job done event=job-done") || strings.Count(out, "\n") != 1 {
		t.Errorf("%s", out)
	}
	n.stop()
	if l := n.logLines("--since", "1h"); len(l) != 611 {
		t.Errorf("%d lines without a service", len(l))
	}
}

func TestLogsAreChecked(t *testing.T) {
	n := start(t, nil)
	other, err := evm.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	for name, forge := range map[string]func(*nodetest.Node) *wire.Logs{
		"text": func(v *nodetest.Node) *wire.Logs {
			r := logRecord(1, "ab")
			r.Fields["prompt"] = "secret"
			return batch(t, v, 0, r)
		},
		"an engine's words": func(v *nodetest.Node) *wire.Logs {
			r := logRecord(1, "ab")
			r.Fields["error"] = "secret"
			return batch(t, v, 0, r)
		},
		"oversize": func(v *nodetest.Node) *wire.Logs {
			l, err := wire.SealLogs(v.Key, wire.LogBatch{Network: "testnet", Node: v.Key.Address(), Spool: testSpool, Last: 1, Count: 1}, make([]byte, wire.MaxLogBatch+1))
			if err != nil {
				t.Fatal(err)
			}
			return l
		},
		"not what was signed": func(v *nodetest.Node) *wire.Logs {
			l := batch(t, v, 0, logRecord(1, "ab"))
			l.Data = bytes.Clone(l.Data)
			l.Data[len(l.Data)-1] ^= 1
			return l
		},
		"another node's": func(*nodetest.Node) *wire.Logs { return batch(t, &nodetest.Node{Key: other}, 0, logRecord(1, "ab")) },
	} {
		t.Run(name, func(t *testing.T) {
			s := n.node().Connect(t)
			before := n.metric(`resultity_frames_refused_total{reason="logs"}`)
			s.Send(forge(s.Node))
			end := s.Ended()
			t.Logf("expected: closed with %d; got: %v", websocket.ClosePolicyViolation, end)
			if end.Code != websocket.ClosePolicyViolation {
				t.Errorf("closed with %v", end)
			}
			n.until("the refusal is counted", func() bool {
				return n.metric(`resultity_frames_refused_total{reason="logs"}`) == before+1
			})
		})
	}
	if l := n.logLines(); len(l) != 0 {
		t.Errorf("%+v", l)
	}
}
