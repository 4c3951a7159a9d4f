package session

import (
	"bytes"
	"io"
	"net/http"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/gorilla/websocket"

	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/receipt"
	"github.com/resultity/node/internal/wire"
)

// Whatever a network sends, and however much of it, the node holds a bounded part.
// Each flood is several times that, unless the node ends it before.
func TestMemoryUnderAFlood(t *testing.T) {
	const much = 256 << 20
	padding := []byte("X-Padding: " + strings.Repeat("x", 16<<10) + "\r\n")
	hand := func(head string) func(http.ResponseWriter, *http.Request) bool {
		return func(w http.ResponseWriter, _ *http.Request) bool {
			conn, _, err := w.(http.Hijacker).Hijack()
			if err != nil {
				t.Error(err)
				return true
			}
			defer conn.Close()
			_, err = io.WriteString(conn, head)
			for n := 0; err == nil && n < much; n += len(padding) {
				_, err = conn.Write(padding)
			}
			return true
		}
	}
	for _, c := range []struct {
		name   string
		reply  func(http.ResponseWriter, *http.Request) bool
		script func(*peer)
		most   uint64 // bytes
	}{
		{name: "a head without end", reply: hand("HTTP/1.1 101 Switching Protocols\r\n"), most: 8 << 20},
		{name: "a refusal without end", reply: hand("HTTP/1.1 503 Service Unavailable\r\n\r\n"), most: 8 << 20},
		{name: "a first frame without end", most: 8 << 20, script: func(p *peer) { endless(p.conn, much) }},
		{name: "a frame without end", most: 4 * wire.MaxFrame, script: func(p *peer) {
			p.welcome()
			endless(p.conn, much)
		}},
		{name: "large messages", most: 8 * wire.MaxFrame, script: func(p *peer) {
			p.welcome()
			frame := make([]byte, 0, wire.MaxFrame)
			job := &wire.Job{ID: receipt.NewJobID(), Config: digest.Of(nil), Model: "m", Kind: wire.KindChat, Request: bytes.Repeat([]byte(" "), 8<<20), Created: 1, Deadline: 1}
			for range 12 {
				var err error
				if frame, err = p.sealer.Seal(frame[:0], job); err != nil {
					p.t.Error(err)
				}
				p.write(frame)
			}
		}},
		{name: "pings", most: 16 << 20, script: func(p *peer) {
			p.welcome()
			payload := make([]byte, 125)
			end := time.Now().Add(time.Second)
			for time.Now().Before(end) && p.conn.WriteControl(websocket.PingMessage, payload, end) == nil {
			}
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			n := newNetwork(t, func(p *peer) {
				_ = p.conn.SetWriteDeadline(time.Now().Add(longest)) // fails on a closed connection only
				c.script(p)
			})
			n.reply = c.reply
			h := &idler{closed: make(chan error, 1)}
			before := heap()
			cfg := config(n)
			cfg.Delays = []time.Duration{time.Hour}
			s := New(cfg, h)
			s.patience.act = time.Hour
			stop := run(t, s)
			var ended error
			peak, end := before, time.Now().Add(longest)
			for over := false; !over; {
				select {
				case err := <-h.closed:
					over = true
					ended = err
				case <-time.After(5 * time.Millisecond): // between two looks
				}
				peak = max(peak, heap())
				if time.Now().After(end) {
					t.Fatal("the session does not end")
				}
			}
			stop()
			if grown := peak - before; grown > c.most {
				t.Errorf("%d MiB, at most %d", grown>>20, c.most>>20)
			} else {
				t.Logf("expected: at most %d MiB; got: %d MiB in %d messages, and %v", c.most>>20, grown>>20, h.messages.Load(), ended)
			}
		})
	}
}

// longest is for what takes long where others are busy.
const longest = 10 * time.Minute

func endless(c *websocket.Conn, much int) {
	w, err := c.NextWriter(websocket.BinaryMessage)
	if err != nil {
		return
	}
	part := make([]byte, 64<<10)
	for n := 0; err == nil && n < much; n += len(part) {
		_, err = w.Write(part)
	}
}

// idler is a handler that is busy with each message for a moment.
type idler struct {
	messages atomic.Int64
	closed   chan error
}

func (*idler) Opened() {}

func (h *idler) Message(wire.Message) {
	h.messages.Add(1)
	time.Sleep(10 * time.Millisecond) // as a disk may take
}

func (h *idler) Closed(err error) {
	select {
	case h.closed <- err:
	default:
	}
}

// heap is what this process has of memory for objects and stacks, in bytes.
func heap() uint64 {
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapInuse + m.StackInuse
}
