package nodes

import (
	"bufio"
	"bytes"
	"errors"
	"net"
	"net/http"
	"net/http/httptest"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gorilla/websocket"

	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/evm"
	"github.com/resultity/node/internal/wire"
)

// The first frame is as long as it may be, and not longer: its sender is not known.
func TestHelloIsBounded(t *testing.T) {
	for size, want := range map[int]error{maxHello: wire.ErrSigner, maxHello + 1: websocket.ErrReadLimit} { // of neither is anything believed
		s, client := rig(t, Options{})
		if err := client.WriteMessage(websocket.BinaryMessage, make([]byte, size)); err != nil {
			t.Fatal(err)
		}
		_, err := s.hello()
		t.Logf("a hello of %d bytes: expected: %v; got: %v", size, want, err)
		if !errors.Is(err, want) {
			t.Errorf("a hello of %d bytes: %v, want %v", size, err, want)
		}
		s.m.remove(s)
	}
}

// What waits to be sent to a node is bounded in number and in bytes.
func TestQueueIsBounded(t *testing.T) {
	text := make([]byte, maxQueueBytes)
	job := func(n int) wire.Message { return &wire.Job{Request: text[:n]} }
	for name, c := range map[string]struct {
		fits []wire.Message
		next wire.Message
	}{
		"messages":      {manyOf(maxQueue, &wire.Update{}), &wire.Update{}},
		"bytes":         {[]wire.Message{job(maxQueueBytes / 2), job(maxQueueBytes / 2), &wire.Update{}}, job(1)},
		"one large job": {[]wire.Message{job(maxQueueBytes), &wire.Update{}}, job(1)},
	} {
		t.Run(name, func(t *testing.T) {
			s, client := rig(t, Options{})
			defer s.m.remove(s)
			for _, m := range c.fits {
				s.Send(m)
			}
			if s.ended || len(s.queue) != len(c.fits) {
				t.Fatalf("%d of %d wait, ended because it is %q", len(s.queue), len(c.fits), s.why)
			}
			s.Send(c.next)
			t.Logf("one more than %d: expected: ended because it is slow; got: because it is %s (%d, %s)", len(c.fits), s.why, s.code, s.reason)
			if s.why != "slow" || s.code != websocket.ClosePolicyViolation || len(s.queue) != len(c.fits) {
				t.Fatalf("ended because it is %q, %d wait", s.why, len(s.queue))
			}
			if _, _, err := client.ReadMessage(); err == nil {
				t.Error("the connection is open")
			}
		})
	}
}

func manyOf(n int, m wire.Message) (list []wire.Message) {
	for range n {
		list = append(list, m)
	}
	return list
}

// A node that takes nothing of a message is given up in time.
func TestWriteIsBounded(t *testing.T) {
	s, _ := rig(t, Options{Ping: time.Hour})
	defer s.m.remove(s)
	_ = s.conn.Close()
	synctest.Test(t, func(t *testing.T) {
		node, network := net.Pipe()
		done := make(chan struct{})
		defer func() { _ = node.Close(); <-done }()
		go func() {
			defer close(done)
			d := websocket.Dialer{NetDial: func(string, string) (net.Conn, error) { return node, nil }}
			if _, _, err := d.Dial("ws://network/", nil); err != nil { // and reads nothing more
				t.Error(err)
			}
		}()
		r, err := http.ReadRequest(bufio.NewReader(network))
		if err != nil {
			t.Fatal(err)
		}
		if s.conn, err = new(websocket.Upgrader).Upgrade(hijacked{conn: network}, r, nil); err != nil {
			t.Fatal(err)
		}
		s.stop, s.work = make(chan struct{}), make(chan struct{}, 1) // of the bubble
		s.Send(&wire.Welcome{})
		begun := time.Now()
		s.write()
		took := time.Since(begun)
		t.Logf("expected: lost after %v; got: %s after %v", writeTimeout, s.why, took)
		if s.why != "lost" || took < writeTimeout || took > writeTimeout+lastWords {
			t.Errorf("ended for %s after %v", s.why, took)
		}
	})
}

// A session remembers so many records of its sandbox, and then asks for them again.
func TestKnownRecordsAreBounded(t *testing.T) {
	s := &session{known: map[digest.Digest]struct{}{}}
	most := 0
	for i := range 3 * maxKnown {
		d := digest.Of([]byte{byte(i), byte(i >> 8)})
		s.know(d)
		if _, ok := s.known[d]; !ok {
			t.Fatalf("record %d is not known", i)
		}
		most = max(most, len(s.known))
	}
	t.Logf("%d records: expected: at most %d are remembered; got: %d", 3*maxKnown, maxKnown, most)
	if most != maxKnown {
		t.Errorf("%d are remembered, want %d", most, maxKnown)
	}
}

// Each limiter lets so many pass at once and then one at its rate, for whom it counts,
// and leaves what others may do.
func TestRates(t *testing.T) {
	source, other := Source("192.0.2.1:1"), Source("192.0.2.2:1")
	node, stray := evm.Address{1}, newStray()
	for name, c := range map[string]struct {
		allow  func(limits) bool
		others func(limits) bool // somebody else's; nil for all together
		burst  int
		every  time.Duration // for one more
	}{
		"requests of a source":        {func(l limits) bool { return l.asksOf.allow(source) }, func(l limits) bool { return l.asksOf.allow(other) }, sourceBurst, time.Second / sourceRate},
		"requests of all":             {func(l limits) bool { return l.asks.Allow() }, nil, allBurst, time.Second / allRate},
		"about bindings of a node":    {func(l limits) bool { return l.requestsOf.allow(node) }, func(l limits) bool { return l.requestsOf.allow(evm.Address{2}) }, perNodeRequests, time.Hour / perNodeRequests},
		"codes of a node":             {func(l limits) bool { return l.codesOf.allow(node) }, func(l limits) bool { return l.codesOf.allow(evm.Address{2}) }, perNodeCodes, time.Hour / perNodeCodes},
		"codes to an address":         {func(l limits) bool { return l.codesTo.allow("a@b.example") }, func(l limits) bool { return l.codesTo.allow("c@b.example") }, perAddress, time.Hour / perAddress},
		"codes of a source":           {func(l limits) bool { return l.codesSource.allow(source) }, func(l limits) bool { return l.codesSource.allow(other) }, perSource, time.Hour / perSource},
		"codes of all":                {func(l limits) bool { return l.codes.Allow() }, nil, perNetwork, time.Hour / perNetwork},
		"new nodes of a source":       {func(l limits) bool { return l.nodesOf.allow(source) }, func(l limits) bool { return l.nodesOf.allow(other) }, perSourceNodes, time.Hour / perSourceNodes},
		"new nodes of all":            {func(l limits) bool { return l.nodes.Allow() }, nil, perNetworkNodes, time.Hour / perNetworkNodes},
		"logs of a node":              {func(l limits) bool { return l.logsOf.allow(node) }, func(l limits) bool { return l.logsOf.allow(evm.Address{2}) }, logsBurst, perSecond(logsRate)},
		"leaves of a node":            {func(l limits) bool { return l.leavesOf.allow(node) }, func(l limits) bool { return l.leavesOf.allow(evm.Address{2}) }, leavesBurst, perSecond(leavesRate)},
		"records of a node":           {func(l limits) bool { return l.recordsOf.allow(node) }, func(l limits) bool { return l.recordsOf.allow(evm.Address{2}) }, recordsBurst, perSecond(recordsRate)},
		"stray messages of a session": {func(limits) bool { return stray.Allow() }, nil, strayBurst, perSecond(strayRate)},
	} {
		synctest.Test(t, func(t *testing.T) {
			l, passed := newLimits(), 0
			for c.allow(l) {
				if passed++; passed > c.burst {
					break
				}
			}
			if c.others != nil && !c.others(l) {
				t.Errorf("%s: somebody else is refused", name)
			}
			time.Sleep(c.every * 9 / 10)
			early := c.allow(l)
			time.Sleep(c.every / 5)
			t.Logf("%s: expected: %d at once; got: %d", name, c.burst, passed)
			if late := c.allow(l); passed != c.burst || early || !late {
				t.Errorf("%s: %d at once, want %d; one more before its time: %v, after it: %v", name, passed, c.burst, early, late)
			}
		})
	}
}

// perSecond is how long one takes at a rate.
func perSecond(r float64) time.Duration { return time.Duration(float64(time.Second) / r) }

// A request about a registration is as long as it may be; see also package wire.
func TestBodyIsBounded(t *testing.T) {
	s, _ := rig(t, Options{})
	s.m.remove(s)
	_ = s.conn.Close()
	for size, want := range map[int]bool{wire.MaxRegistration: true, wire.MaxRegistration + 1: false} {
		raw, err := s.m.body(httptest.NewRecorder(), httptest.NewRequest(http.MethodPost, wire.RegisterPath, bytes.NewReader(make([]byte, size))))
		t.Logf("a request of %d bytes: expected: read: %v; got: %d bytes, %v", size, want, len(raw), err)
		if (err == nil) != want {
			t.Errorf("a request of %d bytes: %v", size, err)
		}
	}
}
