package wire

import (
	"encoding/json"
	"errors"
	"reflect"
	"strings"
	"testing"

	"github.com/resultity/node/internal/evm"
	"github.com/resultity/node/internal/receiptlog"
)

// grown is a log with a signed head.
func grown(t testing.TB, n int) (*receiptlog.Log, *receiptlog.SignedHead, []evm.Hash) {
	t.Helper()
	key := newKey(t)
	l := receiptlog.New()
	var leaves []evm.Hash
	for i := range n {
		leaf := receiptlog.Leaf(evm.Keccak([]byte{byte(i)}))
		l.Append(leaf, nil)
		leaves = append(leaves, leaf)
	}
	h := receiptlog.Head{Node: key.Address(), Network: "testnet", Size: l.Size(), Root: l.Root(), Time: 1}
	s, err := h.Sign(31337, key)
	if err != nil {
		t.Fatal(err)
	}
	return l, s, leaves
}

func TestReceiptLogMessages(t *testing.T) {
	log, head, leaves := grown(t, 7)
	edge := log.Hashes()
	longest := make([]evm.Hash, MaxLeaves)
	changed := func(f func(*receiptlog.SignedHead)) *receiptlog.SignedHead {
		h := *head
		f(&h)
		return &h
	}
	for _, c := range []struct {
		name string
		m    Message
		good bool
	}{
		{"leaves", &Leaves{From: 3, Leaves: leaves}, true},
		{"most leaves", &Leaves{Leaves: longest}, true},
		{"leaves behind an edge", &Leaves{From: 7, Leaves: leaves, Edge: edge}, true},
		{"the last leaves", &Leaves{From: receiptlog.MaxSize - 7, Leaves: leaves}, true},
		{"no leaves", &Leaves{From: 3}, false},
		{"too many leaves", &Leaves{Leaves: append(longest, evm.Hash{})}, false},
		{"leaves behind the end", &Leaves{From: receiptlog.MaxSize - 6, Leaves: leaves}, false},
		{"leaves from nowhere", &Leaves{From: 1<<64 - 1, Leaves: leaves}, false},
		{"the edge of another size", &Leaves{From: 8, Leaves: leaves, Edge: edge}, false},
		{"an edge before all", &Leaves{Leaves: leaves, Edge: edge}, false},

		{"an empty log", &LeavesAck{}, true},
		{"a log", &LeavesAck{Size: 7, Head: head, Edge: edge}, true},
		{"a log without a head", &LeavesAck{Size: 7, Edge: edge}, false},
		{"a log without an edge", &LeavesAck{Size: 7, Head: head}, false},
		{"an empty log with a head", &LeavesAck{Head: head}, false},
		{"the head of another size", &LeavesAck{Size: 11, Head: head, Edge: edge}, false},
		{"an edge too long", &LeavesAck{Size: 7, Head: head, Edge: append(edge, evm.Hash{})}, false},
		{"a log of which more was lost", &LeavesAck{Lost: head}, true},
		{"a log of which less was lost", &LeavesAck{Size: 7, Head: head, Edge: edge, Lost: head}, false},
		{"a lost head of no network", &LeavesAck{Lost: changed(func(h *receiptlog.SignedHead) { h.Network = "" })}, false},
		{"a log that began anew", &LeavesAck{Reset: &receiptlog.SignedReset{Reset: receiptlog.Reset{Era: 1}}}, true},
		{"a head of another era", &LeavesAck{Size: 7, Head: head, Edge: edge, Reset: &receiptlog.SignedReset{Reset: receiptlog.Reset{Era: 1}}}, false},
		{"leaves again", &Leaves{From: 512, Leaves: longest[:256], Again: true}, true},
		{"leaves that are not there again", &Leaves{From: 512, Again: true}, true},
		{"a part of leaves again", &Leaves{From: 512, Leaves: longest[:255], Again: true}, false},
		{"leaves again from anywhere", &Leaves{From: 513, Leaves: longest[:256], Again: true}, false},
		{"leaves again behind an edge", &Leaves{From: 256, Leaves: longest[:256], Edge: edge[:1], Again: true}, false},
		{"a wish for what is not there", &LeavesAck{Size: 7, Head: head, Edge: edge, Again: new(uint64)}, false},
		{"a head of no date", &Heartbeat{Head: changed(func(h *receiptlog.SignedHead) { h.Time = 1 << 60 })}, false},
		{"a head of no network", &LeavesAck{Size: 7, Head: changed(func(h *receiptlog.SignedHead) { h.Network = "\x1b[2J" }), Edge: edge}, false},

		{"a head", &Heartbeat{Models: []ModelState{}, Head: head}, true},
		{"no head", &Heartbeat{Models: []ModelState{}}, true},
		{"a head too large", &Heartbeat{Head: changed(func(h *receiptlog.SignedHead) { h.Size = receiptlog.MaxSize + 1 })}, false},
		{"a head of a long name", &Heartbeat{Head: changed(func(h *receiptlog.SignedHead) { h.Network = strings.Repeat("x", 65) })}, false},
	} {
		raw, err := json.Marshal(c.m)
		if err != nil {
			t.Fatal(err)
		}
		got, err := decode([]byte(c.m.Type()), c.m.direction(), raw)
		switch {
		case c.good && (err != nil || !reflect.DeepEqual(got, c.m)):
			t.Errorf("%s: %+v, %v", c.name, got, err)
		case !c.good && !errors.Is(err, ErrMalformed):
			t.Errorf("%s: %v, want ErrMalformed", c.name, err)
		}
	}
	for _, raw := range []string{
		`{"from":0,"leaves":["0x00"]}`, `{"from":-1,"leaves":[]}`, `{"from":0,"leaves":null}`, `{"from":0,"leaves":[""]}`,
		`{"from":0,"leaves":["0x` + strings.Repeat("0", 64) + `"],"more":1}`,
		`{"from":0,"leaves":["0x` + strings.Repeat("0", 66) + `"]}`,
	} {
		if m, err := decode([]byte("leaves"), ToNetwork, []byte(raw)); !errors.Is(err, ErrMalformed) {
			t.Errorf("%s is read as %+v, %v", raw, m, err)
		}
	}
}

// What a network says of a log is within bounds, or refused.
func FuzzLeavesAck(f *testing.F) {
	log, head, _ := grown(f, 7)
	for _, m := range []*LeavesAck{{}, {Size: 7, Head: head, Edge: log.Hashes()}} {
		raw, err := json.Marshal(m)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(raw)
	}
	f.Add([]byte(`{"size":18446744073709551615,"edge":null}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := decode([]byte("leavesack"), ToNode, b)
		if err != nil {
			if !errors.Is(err, ErrMalformed) {
				t.Fatal(err)
			}
			return
		}
		if a := m.(*LeavesAck); a.Size > 0 {
			if _, err := receiptlog.Resume(a.Size, a.Edge); err != nil || a.Head.Size != a.Size {
				t.Fatalf("%s: %v", b, err)
			}
		}
	})
}
