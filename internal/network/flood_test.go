package network_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/gorilla/websocket"

	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/snapshot"
	"github.com/resultity/node/internal/wire"
)

// What the service may hold in this test; a row's bound is made of these.
const (
	floodConnections = 500
	floodArriving    = 36 << 20 // one place for a large frame
	floodUploads     = 8 << 20
)

const floodConfig = "max_connections = %d\nmax_arriving_bytes = %d\nmax_upload_bytes = %d\nmax_queued_bytes = 8388608\n"

// Whatever strangers, nodes and clients send, leave unsaid or do not read, the heap of
// the service stays within the bounds of its configuration; and it serves others
// when they have gone. Each flood is several times as large as what may be held.
func TestMemoryUnderAFlood(t *testing.T) {
	n := setUp(t, func(c *snapshot.Config) {
		// A configuration as large as they come.
		one, parts := c.Models[0].Files[0], []snapshot.File{}
		for i := range 1024 {
			one.Path = fmt.Sprintf("tiny-%05d-of-01024.gguf", i+1)
			one.Sources = []string{"https://models.test/" + strings.Repeat("x", 200) + one.Path}
			parts = append(parts, one)
		}
		c.Models[0].Files = parts
	})
	file := filepath.Join(n.dir, "network.toml")
	if err := os.WriteFile(file, fmt.Appendf(nil, floodConfig, floodConnections, floodArriving, floodUploads), 0o600); err != nil {
		t.Fatal(err)
	}
	k := n.spawn("--config", file)
	defer k.kill()
	f := &flood{testNetwork: n}
	base := f.heap()

	for _, row := range []struct {
		name  string
		send  func()
		bound int // bytes beyond what there is without a flood
	}{
		{"connections that say nothing", f.silence, floodConnections * 24 << 10},
		{"headers without end", f.headers, floodConnections * 96 << 10},
		{"registrations that do not end", f.registrations, floodConnections * 160 << 10},
		{"requests that do not end", f.uploads, 2*floodUploads + floodConnections*32<<10},
		{"answers that nobody reads", f.deaf, floodConnections * 96 << 10},
		{"sessions without a hello", f.halfOpen, floodConnections * 64 << 10},
		{"frames that do not end", f.frames, 2 * floodArriving},
	} {
		t.Run(row.name, func(t *testing.T) {
			f.T = t
			peak := f.during(row.send)
			// As much again may be garbage that is not collected yet.
			if most := 2 * (base + row.bound); peak > most {
				t.Errorf("%d MiB, at most %d; %d without a flood", peak>>20, most>>20, base>>20)
			}
			t.Logf("expected: at most %d MiB; got: %d, and %d without a flood", 2*(base+row.bound)>>20, peak>>20, base>>20)
		})
	}

	v := n.node()
	s := v.Ready(t)
	ch := n.ask(chat)
	s.Finish(s.Take(), "secret answer")
	if r := n.answer(ch); r.status != http.StatusOK {
		t.Errorf("after the floods: %d %s", r.status, r.body)
	}
	_ = s.Conn.Close() // before the service ends
	k.end()
}

// flood is somebody with many connections.
type flood struct {
	*testNetwork
	T *testing.T

	mu    sync.Mutex // guards what follows
	conns []net.Conn
}

// heap is what the service has of memory for Go's objects and stacks, in bytes. That
// it answers is a part of the test.
func (f *flood) heap() int {
	return int(f.metric("go_memstats_heap_inuse_bytes") + f.metric("go_memstats_stack_inuse_bytes"))
}

// during returns the most that heap is while send sends, and until all of it has
// arrived. Then it closes the connections.
func (f *flood) during(send func()) (peak int) {
	done := make(chan struct{})
	go func() { defer close(done); send() }()
	for settled := 0; settled < 10; {
		peak = max(peak, f.heap())
		select {
		case <-done:
			settled++ // what was sent last may be in the kernel's buffers
		default:
		}
		time.Sleep(20 * time.Millisecond) // between two looks
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, c := range f.conns {
		_ = c.Close() // the service may have
	}
	f.conns = nil
	return peak
}

// each calls do with n connections, some at once. What do sends may be refused.
func (f *flood) each(n int, do func(net.Conn)) {
	d := net.Dialer{Control: func(_, _ string, raw syscall.RawConn) error {
		var err error
		return errors.Join(raw.Control(func(fd uintptr) { err = syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_RCVBUF, 4096) }), err)
	}}
	var wg sync.WaitGroup
	room := make(chan struct{}, 32)
	for range n {
		room <- struct{}{}
		c, err := d.DialContext(f.T.Context(), "tcp", strings.TrimPrefix(f.url, "http://"))
		if err != nil {
			f.T.Error(err)
			return
		}
		f.mu.Lock()
		f.conns = append(f.conns, c)
		f.mu.Unlock()
		wg.Go(func() {
			_ = c.SetWriteDeadline(time.Now().Add(3 * time.Second)) // fails on a closed connection only
			do(c)
			<-room
		})
	}
	wg.Wait()
}

// send sends until the service takes no more of it.
func send(c net.Conn, head string, body []byte) {
	if _, err := c.Write([]byte(head)); err == nil {
		_, _ = c.Write(body) // refused is as good
	}
}

func (f *flood) silence() { f.each(10*floodConnections, func(net.Conn) {}) }

func (f *flood) headers() {
	long := bytes.Repeat([]byte("X-Padding: "+strings.Repeat("x", 1000)+"\r\n"), 1000)
	f.each(floodConnections-20, func(c net.Conn) { send(c, "GET /v1/models HTTP/1.1\r\nHost: x\r\n", long) })
}

func (f *flood) registrations() {
	head := "POST " + wire.RegisterPath + " HTTP/1.1\r\nHost: x\r\nContent-Length: 10000000\r\n\r\n"
	f.each(floodConnections-20, func(c net.Conn) { send(c, head, make([]byte, 1<<20)) })
}

func (f *flood) uploads() {
	head := "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nAuthorization: Bearer " + f.apiKey + "\r\nContent-Length: 1000000\r\n\r\n"
	f.each(floodConnections-20, func(c net.Conn) { send(c, head, bytes.Repeat([]byte(" "), 900_000)) })
}

func (f *flood) deaf() {
	get := "GET /tuf/targets/" + digest.Of(f.raw).Hex() + ".config.json HTTP/1.1\r\nHost: x\r\n\r\n"
	f.each(floodConnections-20, func(c net.Conn) { send(c, get, []byte(strings.Repeat(get, 8))) })
}

func (f *flood) halfOpen() {
	v := f.node()
	f.each(floodConnections-20, func(c net.Conn) {
		own := wire.NewSecret()
		var head strings.Builder
		fmt.Fprintf(&head, "GET %s HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Protocol: %s\r\n", wire.SessionPath, wire.Subprotocol)
		_ = v.Headers(own).Write(&head) // a Builder takes all
		// The first frame claims to be of 12 KiB and stays short of it.
		send(c, head.String()+"\r\n", append([]byte{0x82, 0xfe, 0x30, 0, 0, 0, 0, 0}, make([]byte, 8<<10)...))
	})
}

func (f *flood) frames() {
	var wg sync.WaitGroup
	for range 24 {
		s := f.node().Connect(f.T)
		f.mu.Lock()
		f.conns = append(f.conns, s.Conn.NetConn())
		f.mu.Unlock()
		wg.Go(func() {
			_ = s.Conn.SetWriteDeadline(time.Now().Add(3 * time.Second)) // fails on a closed connection only
			if w, err := s.Conn.NextWriter(websocket.BinaryMessage); err == nil {
				_, _ = io.Copy(w, io.LimitReader(zeros{}, 20<<20)) // most of it waits
			}
		})
	}
	wg.Wait()
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }
