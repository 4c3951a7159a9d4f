package nodes

import (
	"bytes"
	"errors"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"runtime"
	"testing"
	"time"

	"github.com/gorilla/websocket"
	"golang.org/x/time/rate"

	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/evm"
	"github.com/resultity/node/internal/network/dispatch"
	"github.com/resultity/node/internal/network/metrics"
	"github.com/resultity/node/internal/network/nodetest"
	"github.com/resultity/node/internal/wire"
)

func TestMain(m *testing.M) {
	before := runtime.NumGoroutine()
	code := m.Run()
	for end := time.Now().Add(10 * time.Second); code == 0 && runtime.NumGoroutine() > before; runtime.Gosched() {
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

// rig is a session with a connection under it and no service around it.
func rig(t *testing.T, opt Options) (s *session, client *websocket.Conn) {
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
	mgr := New(nil, d, key, "test", m, log, opt)
	conns := make(chan *websocket.Conn, 1)
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		conn, err := mgr.upgrader.Upgrade(w, r, nil)
		if err != nil {
			t.Error(err)
		}
		conns <- conn
	}))
	t.Cleanup(srv.Close)
	client, _, err = websocket.DefaultDialer.Dial("ws"+srv.URL[4:], nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = client.Close() })
	s = newSession(mgr, evm.Address{1}, metSession(t), "test")
	s.conn = <-conns
	if !mgr.add(s) {
		t.Fatal("no room")
	}
	return s, client
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
			if s.why != "slow" {
				t.Errorf("ended because %s", s.why)
			}
		})
	}
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
	s, client := rig(t, Options{Ping: 50 * time.Millisecond})
	s.met = true
	if err := s.alive(); err != nil {
		t.Fatal(err)
	}
	go func() {
		w, err := client.NextWriter(websocket.BinaryMessage)
		for range 10 {
			if err == nil {
				_, err = w.Write(make([]byte, 64<<10))
			}
			time.Sleep(30 * time.Millisecond) // this is the slow link
		}
		if err == nil {
			err = w.Close()
		}
		if err != nil {
			t.Error(err)
		}
	}()
	if _, err := s.next(new(bytes.Buffer)); !errors.Is(err, wire.ErrSigner) {
		t.Errorf("got %v, want the frame to arrive and to be refused", err)
	}
	s.end(websocket.CloseNormalClosure, "test", "")
	s.write()
	s.m.remove(s)
}

// A large message arrives whole.
func TestFragments(t *testing.T) {
	s, client := rig(t, Options{})
	want := bytes.Repeat([]byte("0123456789"), 20_000)
	done := make(chan error, 1)
	go func() { done <- s.writeFrame(want) }()
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

func TestStrayMessagesAreSlowedDown(t *testing.T) {
	s, _ := rig(t, Options{})
	s.stray = rate.NewLimiter(rate.Every(time.Hour), 2)
	for range 2 {
		if err := s.pause(); err != nil {
			t.Fatal(err)
		}
	}
	done := make(chan struct{})
	go func() { _ = s.pause(); close(done) }()
	select {
	case <-done:
		t.Fatal("not slowed down")
	case <-time.After(20 * time.Millisecond):
	}
	s.end(websocket.CloseNormalClosure, "test", "")
	<-done
	s.write()
	s.m.remove(s)
}

func TestSessionsAreBounded(t *testing.T) {
	s, _ := rig(t, Options{MaxSessions: 1})
	if s.m.add(newSession(s.m, evm.Address{2}, metSession(t), "test")) {
		t.Error("one more than allowed")
	}
	s.m.remove(s)
	other := newSession(s.m, evm.Address{2}, metSession(t), "test")
	if !s.m.add(other) {
		t.Error("no room after one has gone")
	}
	s.m.remove(other)
	_ = s.conn.Close()
}
