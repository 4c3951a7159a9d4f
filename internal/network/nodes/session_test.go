package nodes

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"reflect"
	"runtime"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gorilla/websocket"
	"golang.org/x/time/rate"

	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/evm"
	"github.com/resultity/node/internal/network/dispatch"
	"github.com/resultity/node/internal/network/metrics"
	"github.com/resultity/node/internal/network/mirror"
	"github.com/resultity/node/internal/network/nodetest"
	"github.com/resultity/node/internal/network/store"
	"github.com/resultity/node/internal/receipt"
	"github.com/resultity/node/internal/sandbox/record"
	"github.com/resultity/node/internal/wire"
)

func TestMain(m *testing.M) {
	before := runtime.NumGoroutine()
	code := m.Run()
	for end := time.Now().Add(time.Minute); code == 0 && runtime.NumGoroutine() > before; runtime.Gosched() {
		if time.Now().After(end) {
			buf := make([]byte, 1<<20)
			_, _ = os.Stderr.Write(buf[:runtime.Stack(buf, true)])
			_, _ = os.Stderr.WriteString("goroutines were left behind\n")
			code = 1
		}
	}
	os.Exit(code)
}

// metSession is a session whose node has said hello.
func metSession(t *testing.T) *wire.Session {
	t.Helper()
	key, err := evm.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	node, own := wire.NewSecret(), wire.NewSecret()
	agreed, err := own.Agree("testnet", key.Address(), node.Public(), own.Public())
	if err != nil {
		t.Fatal(err)
	}
	hello, err := wire.NewSealer(key, agreed, wire.ToNetwork, time.Now).Seal(nil, &wire.Hello{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := wire.NewOpener(func(evm.Address) bool { return true }, agreed, wire.ToNetwork, time.Minute).Open(hello, time.Now()); err != nil {
		t.Fatal(err)
	}
	return agreed
}

// manager is one without a service around it.
func manager(t *testing.T, opt Options) *Manager {
	t.Helper()
	key, err := evm.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	c := nodetest.Config(t, key.Address())
	terms, err := dispatch.NewTerms(c, digest.Of([]byte("x")), 1, time.Now(), time.Now())
	if err != nil {
		t.Fatal(err)
	}
	m := metrics.New(func() metrics.State { return metrics.State{} })
	log := slog.New(slog.DiscardHandler)
	d := dispatch.New(nil, terms, m, log, dispatch.Options{})
	return New(nil, d, nil, nil, key, "test", m, log, opt)
}

// rig is a session with a connection under it and no service around it.
func rig(t *testing.T, opt Options) (s *session, client *websocket.Conn) {
	t.Helper()
	mgr := manager(t, opt)
	conns := make(chan *websocket.Conn, 1)
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		conn, err := mgr.upgrader.Upgrade(w, r, nil)
		if err != nil {
			t.Error(err)
		}
		conns <- conn
	}))
	t.Cleanup(srv.Close)
	client, _, err := websocket.DefaultDialer.Dial("ws"+srv.URL[4:], nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = client.Close() })
	s = newSession(mgr, evm.Address{1}, 0, metSession(t), "test")
	s.conn = <-conns
	if !mgr.add(s) {
		t.Fatal("no room")
	}
	return s, client
}

// piped is rig within a bubble, over a pipe: its clock stands still while anybody
// works, so that a busy machine does not make a session late.
func piped(t *testing.T, opt Options) (s *session, client *websocket.Conn) {
	t.Helper()
	m := manager(t, opt)
	node, network := net.Pipe()
	dialled := make(chan error, 1)
	go func() {
		d := websocket.Dialer{NetDial: func(string, string) (net.Conn, error) { return node, nil }}
		var err error
		client, _, err = d.Dial("ws://network/", nil)
		dialled <- err
	}()
	r, err := http.ReadRequest(bufio.NewReader(network))
	if err != nil {
		t.Fatal(err)
	}
	conn, err := m.upgrader.Upgrade(hijacked{conn: network}, r, nil)
	if err = errors.Join(err, <-dialled); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = client.Close() })
	s = newSession(m, evm.Address{1}, 0, metSession(t), "test")
	s.conn = conn
	if !m.add(s) {
		t.Fatal("no room")
	}
	return s, client
}

// hijacked is the answer to a request on a connection of ours.
type hijacked struct {
	http.ResponseWriter
	conn net.Conn
}

func (hijacked) Header() http.Header { return http.Header{} }

func (h hijacked) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	return h.conn, bufio.NewReadWriter(bufio.NewReader(h.conn), bufio.NewWriter(h.conn)), nil
}

// A node that does not read is dropped, and nobody waits for it.
func TestSlowNode(t *testing.T) {
	for name, m := range map[string]wire.Message{
		"many":  &wire.Update{Version: 1},
		"large": &wire.Job{Request: make([]byte, 8<<20)},
	} {
		t.Run(name, func(t *testing.T) {
			s, _ := rig(t, Options{})
			done := make(chan struct{})
			go func() { s.run(); close(done) }()
			for i := 0; ; i++ {
				select {
				case <-s.stop:
				default:
					if i > 1<<20 {
						t.Fatal("nothing bounds the queue")
					}
					s.Send(m)
					continue
				}
				break
			}
			<-done
			t.Logf("expected: ended because it is slow; got: because it is %s", s.why)
			if s.why != "slow" {
				t.Errorf("ended because %s", s.why)
			}
		})
	}
}

// Acknowledgements wait a little for one another, and nothing else waits for them.
func TestAcksTogether(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &session{work: make(chan struct{}, 1)}
		a, b, c := receipt.NewJobID(), receipt.NewJobID(), receipt.NewJobID()
		for _, id := range []receipt.JobID{a, b} {
			s.Send(&wire.Ack{Jobs: []receipt.JobID{id}})
			time.Sleep(ackDelay / 3)
		}
		time.Sleep(ackDelay)
		s.Send(&wire.Ack{Jobs: []receipt.JobID{c}})
		s.Send(&wire.Update{})
		time.Sleep(2 * ackDelay)
		s.mu.Lock()
		defer s.mu.Unlock()
		want := []wire.Message{&wire.Ack{Jobs: []receipt.JobID{a, b}}, &wire.Update{}, &wire.Ack{Jobs: []receipt.JobID{c}}}
		if !reflect.DeepEqual(s.queue, want) {
			t.Errorf("queued %v, want %v", s.queue, want)
		}
	})
}

// What waits to be acknowledged when a session ends is told before its end.
func TestAcksBeforeTheEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, client := piped(t, Options{})
		done := make(chan struct{})
		go func() { s.run(); close(done) }()
		s.Send(&wire.Ack{Jobs: []receipt.JobID{receipt.NewJobID()}})
		s.end(websocket.CloseGoingAway, "going_away", "test")
		if _, frame, err := client.ReadMessage(); err != nil || !bytes.Contains(frame, []byte(`"type":"ack"`)) {
			t.Errorf("got %q, %v", frame, err)
		}
		if _, _, err := client.ReadMessage(); !websocket.IsCloseError(err, websocket.CloseGoingAway) {
			t.Errorf("then %v", err)
		}
		<-done
	})
}

// A node that reads slowly does not hold up the end of its session, nor that of the
// service.
func TestSlowNodeAtTheEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, client := piped(t, Options{})
		done := make(chan struct{})
		go func() { s.run(); close(done) }()
		read := make(chan struct{})
		go func() { // a few bytes now and then, so that no write times out
			defer close(read)
			buf := make([]byte, 64<<10)
			for {
				if _, err := client.NetConn().Read(buf); err != nil {
					return
				}
				time.Sleep(50 * time.Millisecond)
			}
		}()
		for range 3 {
			s.Send(&wire.Job{Request: make([]byte, 8<<20)})
		}
		synctest.Wait() // it writes the first one
		begin := time.Now()
		s.end(websocket.CloseGoingAway, "going_away", "test")
		<-done
		if took := time.Since(begin); took > lastWords {
			t.Errorf("it took %v", took)
		}
		<-read
	})
}

// A peer that says nothing is not waited for.
func TestSilentPeer(t *testing.T) {
	s, _ := rig(t, Options{Ping: 20 * time.Millisecond})
	if err := s.alive(); err != nil {
		t.Fatal(err)
	}
	if violation := s.blame(s.frames(nil)); violation || s.why != "timeout" {
		t.Errorf("ended because %s", s.why)
	}
	s.write()
	s.m.remove(s)
}

// A large frame may take longer to arrive than silence may last.
func TestSlowLink(t *testing.T) {
	for name, c := range map[string]struct {
		each   time.Duration // between pieces
		pieces int
		why    string
	}{
		"slow":    {14 * time.Second, 10, "violation"}, // it arrives, and is refused
		"silent":  {16 * time.Second, 10, "timeout"},
		"endless": {14 * time.Second, 15, "timeout"}, // no silence is too long, and all of it is
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s, client := piped(t, Options{Ping: 5 * time.Second})
				defer s.m.remove(s)
				done := make(chan struct{})
				defer func() { _ = s.conn.Close(); <-done }()
				go func() {
					defer close(done)
					w, err := client.NextWriter(websocket.BinaryMessage)
					for range c.pieces {
						if err == nil {
							_, err = w.Write(make([]byte, 16<<10))
						}
						time.Sleep(c.each)
					}
					if err == nil {
						_ = w.Close()
					}
				}()
				s.met = true
				if err := s.alive(); err != nil {
					t.Fatal(err)
				}
				_, err := s.next(new(bytes.Buffer))
				if s.blame(err); s.why != c.why {
					t.Errorf("ended for %s (%v), want %s", s.why, err, c.why)
				}
			})
		})
	}
}

// Who connects and never says hello is there for ten seconds.
func TestNoHello(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, client := piped(t, Options{})
		defer s.m.remove(s)
		done := make(chan struct{})
		defer func() { _ = s.conn.Close(); <-done }()
		go func() {
			defer close(done)
			_, _, _ = client.ReadMessage()
		}()
		begin := time.Now()
		_, err := s.hello()
		took := time.Since(begin)
		s.blame(err)
		t.Logf("expected: timeout after %v; got: %s after %v", helloTimeout, s.why, took)
		if s.why != "timeout" || took != helloTimeout {
			t.Errorf("ended for %s after %v (%v)", s.why, took, err)
		}
	})
}

// Large frames from many nodes at once wait for one another, within a bound of
// bytes, and small ones pass.
func TestLargeFramesWait(t *testing.T) {
	for name, tc := range map[string]struct {
		size int // needs a place
		of   func(*Manager) *places
	}{
		"medium": {smallFrame + 1, func(m *Manager) *places { return m.medium }},
		"large":  {2 * mediumFrame, func(m *Manager) *places { return m.large }},
	} {
		t.Run(name, func(t *testing.T) {
			s, client := rig(t, Options{MaxArriving: 1})
			defer s.m.remove(s)
			p := tc.of(s.m)
			other, err := p.take(s) // another session's frame
			if err != nil {
				t.Fatal(err)
			}
			type read struct {
				size int
				err  error
			}
			got := make(chan read)
			buf := new(bytes.Buffer)
			go func() {
				for range 2 {
					_, err := s.next(buf)
					got <- read{buf.Len(), err}
				}
			}()
			send := func(size int) {
				if err := client.WriteMessage(websocket.BinaryMessage, make([]byte, size)); err != nil {
					t.Error(err)
				}
			}
			send(smallFrame - 1)
			if r := <-got; r.size != smallFrame-1 {
				t.Fatalf("%d bytes, %v", r.size, r.err)
			}
			go send(tc.size)
			for end := time.Now().Add(nodetest.Patience); ; {
				p.mu.Lock()
				waiting := p.waiting.Len()
				p.mu.Unlock()
				if waiting == 1 {
					t.Logf("expected: one of %d bytes waits and is not read; got: %d waits, %d read", tc.size, waiting, len(got))
					break
				}
				if time.Now().After(end) {
					t.Fatal("it does not wait")
				}
				time.Sleep(time.Millisecond) // between two looks
			}
			p.leave(other)
			if r := <-got; r.size != tc.size || s.among != p || p.free != 0 || !s.stay.whole.Load() {
				t.Fatalf("%d bytes, %v", r.size, r.err)
			}
			s.leavePlace()
			s.leavePlace()
			if s.m.medium.free != 1 || s.m.large.free != 1 {
				t.Error("its places are not given back")
			}
			if _, err := p.take(s); err != nil {
				t.Fatal(err)
			}
			s.end(websocket.CloseGoingAway, "test", "test")
			if err := s.takePlace(p); err != errOver || p.waiting.Len() != 0 {
				t.Errorf("at the end of the session: %v", err)
			}
		})
	}
}

// While others wait, who is slow goes, the slowest first; who has sent all, or as much
// as may be expected, stays. As long as nobody waits there is no haste.
func TestSlowFramesGiveWay(t *testing.T) {
	const n = 3
	why := func(s *session) string { // it ended; "" for not
		s.mu.Lock()
		defer s.mu.Unlock()
		return s.why
	}
	s, _ := rig(t, Options{})
	defer s.m.remove(s)
	synctest.Test(t, func(t *testing.T) {
		p := newPlaces(n)
		var sessions [n]*session
		var stays [n]*stay
		for i := range n {
			sessions[i] = &session{stop: make(chan struct{})}
			var err error
			if stays[i], err = p.take(sessions[i]); err != nil {
				t.Fatal(err)
			}
		}
		stays[0].read.Store(1)
		stays[2].whole.Store(true)
		time.Sleep(time.Hour)
		stays[1].read.Store((2*3600 + 60) * (256 << 10))
		given := make(chan *stay, 2)
		for range 2 {
			go func() {
				stay, err := p.take(&session{stop: make(chan struct{}), conn: s.conn})
				if err != nil {
					t.Error(err)
				}
				given <- stay
			}()
		}
		time.Sleep(p.look + 1)
		for i, want := range []string{"late", "", ""} {
			got := why(sessions[i])
			t.Logf("%s: expected: %q; got: %q", []string{"a frame that stands still", "one that is fast enough", "one that is complete"}[i], want, got)
			if got != want {
				t.Errorf("session %d is ended: %q", i, got)
			}
		}
		p.leave(stays[0])
		(<-given).whole.Store(true)
		time.Sleep(time.Hour) // the other one sends nothing more, and is near what it has to be
		synctest.Wait()
		if why(sessions[1]) != "" {
			t.Error("ended though it was fast enough")
		}
		time.Sleep(time.Hour)
		synctest.Wait()
		if a, b := why(sessions[1]), why(sessions[2]); a != "late" || b != "" {
			t.Errorf("ended are %q and %q", a, b)
		}
		p.leave(stays[1])
		<-given
	})
}

// A large message arrives whole.
func TestFragments(t *testing.T) {
	s, client := rig(t, Options{})
	want := bytes.Repeat([]byte("0123456789"), 20_000)
	done := make(chan error, 1)
	go func() { done <- s.writeFrame(want, writeTimeout) }()
	_, got, err := client.ReadMessage()
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("%d bytes, want %d; %v", len(got), len(want), err)
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
	s.end(websocket.CloseNormalClosure, "test", "")
	s.write()
	s.m.remove(s)
}

func TestFloodsAreSlowedDown(t *testing.T) {
	leaf := uint64(0)
	key, err := evm.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	node := &nodetest.Node{Key: key, Config: nodetest.Config(t, evm.Address{1}), Digest: digest.Of([]byte("x"))}
	for name, flood := range map[string]func(*session, *wire.Logs){
		"leaves of no result": func(s *session, _ *wire.Logs) {
			if _, err := s.leaves(&wire.Leaves{From: leaf, Leaves: []evm.Hash{{1}}}); err != nil {
				t.Errorf("leaves: %v", err)
			}
			leaf++
		},
		"stray": func(s *session, _ *wire.Logs) { s.pause(s.stray, 1) },
		"logs": func(s *session, bad *wire.Logs) {
			if err := s.logs(bad); !errors.Is(err, wire.ErrLogs) {
				t.Errorf("logs: %v", err)
			}
		},
		"records": func(s *session, _ *wire.Logs) {
			if err := s.sandbox(node.Record(t, nil)); err != nil {
				t.Errorf("record: %v", err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			s, _ := rig(t, Options{})
			s.node, s.m.registry = key.Address(), noRecords{}
			bad, err := wire.SealLogs(key, wire.LogBatch{
				Network: s.m.dispatch.Terms().Config.Network.Name, Node: s.node, Spool: strings.Repeat("0", 32), Last: 1, Count: 1,
			}, []byte("no gzip"))
			if err != nil {
				t.Fatal(err)
			}
			s.stray = rate.NewLimiter(rate.Every(time.Hour), 2)
			s.m.limits.logsOf = newLimiters[evm.Address](rate.Every(time.Hour), 2)
			s.m.limits.leavesOf = newLimiters[evm.Address](rate.Every(time.Hour), 2)
			s.m.limits.recordsOf = newLimiters[evm.Address](rate.Every(time.Hour), 2)
			logs := mirror.New(noLogs{}, nil, nil, s.m.metrics, s.log, nil)
			if s.copy, _, err = logs.Join(t.Context(), s.node, func(*wire.LeavesAck) {}, nil); err != nil {
				t.Fatal(err)
			}
			for range 2 {
				flood(s, bad)
			}
			done := make(chan struct{})
			began := time.Now()
			go func() { flood(s, bad); close(done) }()
			select {
			case <-done:
				t.Fatal("not slowed down")
			case <-time.After(20 * time.Millisecond):
			}
			t.Logf("expected: not handled yet after 20ms; got: not after %v", time.Since(began).Round(time.Millisecond))
			s.end(websocket.CloseNormalClosure, "test", "")
			<-done
			s.write()
			s.m.remove(s)
		})
	}
}

// noRecords keeps no record of a sandbox, and is asked for nothing else.
type noRecords struct{ registry }

func (noRecords) PutSandbox(context.Context, *record.Signed) error { return nil }

// noLogs has no receipt log of any node.
type noLogs struct{}

func (noLogs) ReceiptLog(context.Context, evm.Address) (*store.ReceiptLog, error) {
	return nil, store.ErrNotFound
}
func (noLogs) PutReceiptLog(context.Context, evm.Address, *store.ReceiptLog, []store.Tile) error {
	return errors.New("nothing is kept")
}
func (noLogs) ResetReceiptLog(context.Context, evm.Address, *store.ReceiptLog, *store.ReceiptLog) error {
	return errors.New("nothing is kept")
}
func (noLogs) MendTile(context.Context, evm.Address, uint64, store.Tile, time.Time) error {
	return errors.New("nothing is kept")
}
func (noLogs) EndedReceiptLog(context.Context, evm.Address, uint64) (*store.ReceiptLog, error) {
	return nil, store.ErrNotFound
}
func (noLogs) Tile(context.Context, evm.Address, uint64, int, uint64) ([]byte, time.Time, error) {
	return nil, time.Time{}, store.ErrNotFound
}

// Leaves of receipts that the network has seen are not slowed down.
func TestOwedLeavesAreFast(t *testing.T) {
	s, _ := rig(t, Options{})
	s.m.limits.leavesOf = newLimiters[evm.Address](rate.Every(time.Hour), 1)
	logs := mirror.New(noLogs{}, nil, nil, s.m.metrics, s.log, nil)
	var err error
	if s.copy, _, err = logs.Join(t.Context(), s.node, func(*wire.LeavesAck) {}, nil); err != nil {
		t.Fatal(err)
	}
	key, err := evm.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	d := digest.Of(nil)
	signed, err := (&receipt.Receipt{
		Job: receipt.NewJobID(), Node: key.Address(),
		Measured: receipt.Measured{ConfigDigest: d, ImageDigest: d, ModelDigest: d, SandboxDigest: d, RequestHash: d, ResponseHash: d},
		Claimed:  receipt.Claimed{ClassDigest: d},
	}).Sign(1, key)
	if err != nil {
		t.Fatal(err)
	}
	for i := range uint64(8) {
		s.owe(&signed)
		if news, err := s.leaves(&wire.Leaves{From: i, Leaves: []evm.Hash{{1}}}); !news || err != nil {
			t.Fatal(news, err)
		}
	}
	s.m.remove(s)
}

// Nodes have places of their own; those who wait to say hello take none.
func TestSessionsAreBounded(t *testing.T) {
	s, _ := rig(t, Options{MaxSessions: 1})
	s.m.remove(s)
	_ = s.conn.Close()
	agreed := metSession(t)
	of := func(node byte) *session {
		return newSession(s.m, evm.Address{node}, 0, agreed, fmt.Sprintf("192.0.2.%d:1", node))
	}
	var waiting []*session
	for i := range byte(9) {
		waiting = append(waiting, of(i))
		if !s.m.add(waiting[i]) {
			t.Fatalf("no room for number %d to wait", i)
		}
	}
	if err := s.m.replace(waiting[0]); err != nil {
		t.Fatal(err)
	}
	err := s.m.replace(waiting[1])
	t.Logf("a second node where there is room for one: expected: %v; got: %v, ended because it is %s", errNoPlace, err, waiting[1].why)
	if !errors.Is(err, errNoPlace) || waiting[1].why != "full" || waiting[1].code != websocket.CloseTryAgainLater {
		t.Errorf("a second node: %v, ended because %q", err, waiting[1].why)
	}
	if s.m.add(of(10)) {
		t.Error("one more than allowed")
	}
	again := of(0)
	if !s.m.add(again) {
		t.Fatal("no room for the node's next session")
	}
	if err := s.m.replace(again); err != nil || waiting[0].why != "replaced" {
		t.Errorf("the node's next session: %v; the first ended because %q", err, waiting[0].why)
	}
	for _, w := range append(waiting, again) {
		s.m.remove(w)
	}
	next := of(10)
	if !s.m.add(next) || s.m.replace(next) != nil {
		t.Error("no room after all have gone")
	}
	s.m.remove(next)
	if s.m.waiting.Len() != 0 || len(s.m.waitsOf) != 0 || len(s.m.current) != 0 || len(s.m.sessions) != 0 {
		t.Error("something is left")
	}
}

// Who waits longest goes when the room is full: first of the source that fills
// it, then of all.
func TestWaitingRoom(t *testing.T) {
	s, _ := rig(t, Options{MaxWaiting: 64})
	s.m.remove(s)
	_ = s.conn.Close()
	agreed := metSession(t)
	var all []*session
	wait := func(from string) *session {
		t.Helper()
		v := newSession(s.m, evm.Address{1}, 0, agreed, from)
		if !s.m.add(v) {
			t.Fatal("no room")
		}
		all = append(all, v)
		return v
	}
	ended := func(v *session) bool {
		select {
		case <-v.stop:
			return true
		default:
			return false
		}
	}
	bystander := wait("198.51.100.1:1")
	for range 1000 {
		wait("192.0.2.1:1")
	}
	if ended(bystander) {
		t.Error("a flood from elsewhere has thrown somebody out")
	}
	n := s.m.waitsOf[Source("192.0.2.1:1")]
	t.Logf("1000 of one source: expected: 4 wait; got: %d", n)
	if n != 4 {
		t.Errorf("%d of one source wait, want 4", n)
	}
	for i, v := range all[1:] {
		if ended(v) != (i < 996) || ended(v) && (v.why != "crowded" || v.code != websocket.CloseTryAgainLater) {
			t.Fatalf("number %d of the flood: ended %v because %q", i, ended(v), v.why)
		}
	}
	// It is too late for one that had to go.
	if err := s.m.replace(all[1]); !errors.Is(err, errNoPlace) || s.m.current[all[1].node] != nil {
		t.Errorf("replace = %v, want errNoPlace", err)
	}
	// Many sources fill the room together, and a node that comes then says hello.
	for i := range 1000 {
		wait(fmt.Sprintf("[2001:db8:0:%x::1]:1", i))
	}
	t.Logf("1000 sources: expected: 64 wait; got: %d", s.m.waiting.Len())
	if s.m.waiting.Len() != 64 || !ended(bystander) {
		t.Errorf("%d wait, want 64, without the oldest", s.m.waiting.Len())
	}
	node := wait("198.51.100.1:1")
	if err := s.m.replace(node); err != nil {
		t.Error(err)
	}
	for _, v := range all {
		s.m.remove(v)
	}
}

func TestSource(t *testing.T) {
	for _, same := range [][]string{
		{"192.0.2.1:1", "192.0.2.1:2", "[::ffff:192.0.2.1]:3"},
		{"192.0.2.2:1"},
		{"[2001:db8::1]:1", "[2001:db8::ffff:1:2:3]:2"},
		{"[2001:db8:0:1::1]:1"},
		{"[fe80::1%eth0]:1", "[fe80::2%eth1]:1"},
		{"", "@", "nonsense"},
	} {
		for _, a := range same {
			got, want := Source(a), Source(same[0])
			t.Logf("%q: expected: %v; got: %v", a, want, got)
			if got != want {
				t.Errorf("Source(%q) = %v, want %v", a, got, want)
			}
		}
	}
	if Source("192.0.2.1:1") == Source("192.0.2.2:1") || Source("[2001:db8::1]:1") == Source("[2001:db8:0:1::1]:1") {
		t.Error("different sources are one")
	}
}

// One that floods is refused, and nobody else; all together have a bound, too.
func TestRegistrationsAreBounded(t *testing.T) {
	s, _ := rig(t, Options{})
	s.m.remove(s)
	_ = s.conn.Close()
	register := func(from string) int {
		r := httptest.NewRequest(http.MethodPost, wire.RegisterPath, strings.NewReader("not one"))
		r.RemoteAddr = from
		w := httptest.NewRecorder()
		s.m.ServeRegister(w, r)
		if w.Code == http.StatusTooManyRequests && w.Header().Get("Retry-After") == "" {
			t.Error("it does not say when to try again")
		}
		return w.Code
	}
	s.m.limits.asksOf = newLimiters[netip.Prefix](0.001, 10)
	s.m.limits.asks = rate.NewLimiter(0.001, 15)
	for i := range 100 {
		want := http.StatusBadRequest
		if i >= 10 {
			want = http.StatusTooManyRequests
		}
		got := register("[2001:db8::" + fmt.Sprint(i) + "]:1")
		if i == 10 {
			t.Logf("the eleventh of a network: expected: %d; got: %d", want, got)
		}
		if got != want {
			t.Fatalf("registration %d: %d, want %d", i, got, want)
		}
	}
	for i := range 10 {
		want := http.StatusBadRequest
		if i >= 5 {
			want = http.StatusTooManyRequests
		}
		got := register(fmt.Sprintf("192.0.2.%d:1", i))
		if i == 5 {
			t.Logf("the sixteenth of all: expected: %d; got: %d", want, got)
		}
		if got != want {
			t.Fatalf("registration of another, number %d: %d, want %d", i, got, want)
		}
	}
}

// Each node of a fleet behind one address registers and is bound: three requests.
// One that goes on leaves room for others.
func TestFleetBehindOneAddress(t *testing.T) {
	l := newLimits()
	fleet, other := Source("192.0.2.1:1"), Source("192.0.2.2:1")
	ask := func(from netip.Prefix) bool { return l.asksOf.allow(from) && l.asks.Allow() }
	for i := range 3 * 400 {
		if !ask(fleet) {
			t.Fatalf("request %d is refused", i)
		}
	}
	for range 10_000 {
		ask(fleet)
	}
	for i := range 3 * 100 {
		if !ask(other) {
			t.Fatalf("request %d of another is refused", i)
		}
	}
}

// Sources are forgotten when there are too many, but not while they are heard of.
func TestLimitersAreBounded(t *testing.T) {
	l := newLimiters[netip.Prefix](0.001, 1)
	loud := Source("192.0.2.1:1")
	if !l.allow(loud) {
		t.Fatal("the first is refused")
	}
	most := 0
	for i := range 10 * maxKeys {
		if !l.allow(Source(fmt.Sprintf("[2001:db8:%x:%x::]:1", i>>16, i&0xffff))) {
			t.Fatal("a new source is refused")
		}
		n := len(l.young) + len(l.old)
		most = max(most, n)
		if n > 2*maxKeys {
			t.Fatalf("%d sources are remembered", n)
		}
		if i%1000 == 0 && l.allow(loud) {
			t.Fatalf("forgotten after %d others", i)
		}
	}
	t.Logf("%d sources: expected: at most %d remembered; got: %d", 10*maxKeys, 2*maxKeys, most)
}
