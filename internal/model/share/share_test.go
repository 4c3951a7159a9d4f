package share

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/resultity/node/internal/chunk"
	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/journal"
	"github.com/resultity/node/internal/model/fetch"
	"github.com/resultity/node/internal/model/modeltest"
	"github.com/resultity/node/test/pipes"
)

// store has files by their digests, of which some are listed.
type store struct {
	dir    string
	listed map[digest.Digest]bool
}

func newStore(t *testing.T, files ...[]byte) *store {
	t.Helper()
	s := &store{t.TempDir(), map[digest.Digest]bool{}}
	for _, b := range files {
		if err := os.WriteFile(filepath.Join(s.dir, digest.Of(b).Hex()), b, 0o600); err != nil {
			t.Fatal(err)
		}
		s.listed[digest.Of(b)] = true
	}
	return s
}

func (s *store) open(d digest.Digest) (*os.File, error) {
	return os.Open(filepath.Join(s.dir, d.Hex()))
}

// serve runs a server of the store until the test ends, and returns its address.
func serve(t *testing.T, files *store, change func(*Server)) (*Server, string) {
	t.Helper()
	s := New(func(d digest.Digest) bool { return files.listed[d] }, files.open, 1<<30, slog.New(slog.DiscardHandler))
	if change != nil {
		change(s)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- s.serve(ctx, l) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		wait(t, "all connections to end", func() bool { return s.Counts().Connections == 0 })
	})
	return s, l.Addr().String()
}

func wait(t *testing.T, what string, f func() bool) {
	t.Helper()
	for began := time.Now(); !f(); time.Sleep(time.Millisecond) {
		if time.Since(began) > 2*time.Minute {
			t.Fatalf("waited for %s", what)
		}
	}
}

// TestGives: what package fetch asks of a neighbour is what it gets here.
func TestGives(t *testing.T) {
	b := modeltest.Content(9*chunk.Size + 77)
	s, address := serve(t, newStore(t, b), nil)
	list, sum, err := chunk.Read(bytes.NewReader(b))
	if err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len(b))
	var missing []int
	for i := range list.Len() {
		missing = append(missing, i)
	}
	x := fetch.New(nil, []string{"http://" + address + "/models"}, slog.New(slog.DiscardHandler))
	err = x.Fetch(t.Context(), &fetch.File{Path: "f", SHA256: sum, List: list}, missing, func(i int, c []byte) error {
		copy(got[i*chunk.Size:], c)
		return nil
	}, nil)
	if err != nil || !bytes.Equal(got, b) {
		t.Fatal(err)
	}
	if n := s.Counts(); n.Bytes < int64(len(b)) || n.Answers < 2 || n.Refused != 0 {
		t.Errorf("%+v", n)
	}
}

func TestRanges(t *testing.T) {
	b := modeltest.Content(3*piece + 5)
	_, address := serve(t, newStore(t, b), nil)
	url := "http://" + address + prefix + digest.Of(b).Hex()
	n := int64(len(b))
	for _, c := range []struct {
		ask      string
		from, to int64 // to is 0 for a refusal
	}{
		{"", 0, n}, {"bytes=0-", 0, n}, {"bytes=5-6", 5, 7}, {fmt.Sprintf("bytes=%d-%d", piece-1, 2*piece), piece - 1, 2*piece + 1}, {fmt.Sprintf("bytes=%d-", n-1), n - 1, n},
		{"bytes=7-9223372036854775807", 7, n},
		{fmt.Sprintf("bytes=%d-", n), 0, 0}, {"bytes=6-5", 0, 0}, {"bytes=-5", 0, 0}, {"bytes=0-1,3-4", 0, 0}, {"bytes=+1-2", 0, 0}, {"bytes=1--2", 0, 0},
		{"bytes=1-9223372036854775808", 0, 0}, {"bytes= 1-2", 0, 0}, {"lines=1-2", 0, 0}, {"bytes", 0, 0}, {"bytes=-", 0, 0},
	} {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
		if err != nil {
			t.Fatal(err)
		}
		want := http.StatusOK
		if c.ask != "" {
			req.Header.Set("Range", c.ask)
			want = http.StatusPartialContent
		}
		if c.to == 0 {
			want = http.StatusRequestedRangeNotSatisfiable
		}
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		switch {
		case resp.StatusCode != want || err != nil:
			t.Errorf("%q: %s, %v", c.ask, resp.Status, err)
		case c.to == 0:
		case !bytes.Equal(got, b[c.from:c.to]):
			t.Errorf("%q: %d other bytes", c.ask, len(got))
		case c.ask != "" && resp.Header.Get("Content-Range") != fmt.Sprintf("bytes %d-%d/%d", c.from, c.to-1, n):
			t.Errorf("%q: %s", c.ask, resp.Header.Get("Content-Range"))
		}
	}
	http.DefaultClient.CloseIdleConnections()
}

// ask sends a request as it is, and returns the first line of the answer.
func ask(t *testing.T, address, request string) string {
	t.Helper()
	c, err := net.Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := io.WriteString(c, request); err != nil {
		t.Fatal(err)
	}
	line, _ := bufio.NewReader(c).ReadString('\n')
	return strings.TrimSpace(line)
}

func TestRefused(t *testing.T) {
	b, secret := modeltest.Content(100), []byte("not listed")
	files := newStore(t, b, secret)
	delete(files.listed, digest.Of(secret))
	gone := digest.Of([]byte("listed, and not here"))
	files.listed[gone] = true
	s, address := serve(t, files, nil)
	hex := digest.Of(b).Hex()
	get := func(path string) string { return "GET " + path + " HTTP/1.1\r\nHost: h\r\n\r\n" }
	if line := ask(t, address, get("/models/"+hex)); line != "HTTP/1.1 200 OK" {
		t.Fatal(line)
	}
	if line := ask(t, address, "GET /models/"+hex+" HTTP/1.1\r\nHost: h\r\nX: "+strings.Repeat("x", maxHead)+"\r\n\r\n"); line != "HTTP/1.1 200 OK" {
		t.Fatalf("a head of what is allowed: %s", line)
	}
	for _, c := range []struct{ request, want string }{
		{get("/models/" + digest.Of(secret).Hex()), "404"},
		{get("/models/" + gone.Hex()), "404"},
		{get("/"), "404"},
		{get("/models/"), "404"},
		{get("/models"), "404"},
		{get("/models/" + hex + "/"), "404"},
		{get("/models/" + hex + "?x=1"), "404"},
		{get("/models//" + hex), "404"},
		{get("/models/./" + hex), "404"},
		{get("/models/../models/" + hex), "404"},
		{get("/models/%2e%2e/" + hex), "404"},
		{get("/models/%" + hex), "404"},
		{get("/models/" + strings.ToUpper(hex)), "404"},
		{get("/models/" + hex + ".unverified"), "404"},
		{get("/models/" + hex + "\x00"), "400"},
		{get("http://h/models/" + hex), "404"},
		{get("/models/" + strings.Repeat("0", 64)), "404"},
		{"POST /models/" + hex + " HTTP/1.1\r\nHost: h\r\nContent-Length: 1\r\n\r\nx", "405"},
		{"HEAD /models/" + hex + " HTTP/1.1\r\nHost: h\r\n\r\n", "405"},
		{"DELETE /models/" + hex + " HTTP/1.1\r\nHost: h\r\n\r\n", "405"},
		{"CONNECT h:1 HTTP/1.1\r\nHost: h:1\r\n\r\n", "405"},
		{"GET /models/" + hex + " HTTP/1.1\r\nHost: h\r\nContent-Length: 1\r\n\r\nx", "400"},
		{"GET /models/" + hex + " HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", "400"},
		{"GET /models/" + hex + " HTTP/1.1\r\nHost: h\r\nX: " + strings.Repeat("x", 2*maxHead) + "\r\n\r\n", "431"},
		{"GET /models/" + hex + " HTTP/1.1\r\nHost: h\r\nRange: bytes=0-1\r\nRange: bytes=0-1\r\n\r\n", "416"},
		{"\x16\x03\x01\x00\x05hello\r\n\r\n", "400"},
	} {
		line := ask(t, address, c.request)
		t.Logf("%.60q: expected: %s; got: %s", c.request, c.want, line)
		if !strings.HasPrefix(line, "HTTP/1.1 "+c.want) && !strings.HasPrefix(line, "HTTP/1.0 "+c.want) {
			t.Errorf("%.80q: %q, want %s", c.request, line, c.want)
		}
	}
	if n := s.Counts(); n.Answers != 2 {
		t.Errorf("%d answers", n.Answers)
	}
}

// TestSlowReader: who takes no bytes, or sends no request, loses its place.
func TestSlowReader(t *testing.T) {
	b := modeltest.Content(64 << 20) // more than the kernel keeps for a connection
	s, address := serve(t, newStore(t, b), func(s *Server) { s.patience = 200 * time.Millisecond })
	var open []net.Conn
	for _, request := range []string{"GET /models/" + digest.Of(b).Hex() + " HTTP/1.1\r\nHost: h\r\n\r\n", "GET /models/", ""} {
		c, err := net.Dial("tcp", address)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		open = append(open, c)
		if _, err := io.WriteString(c, request); err != nil {
			t.Fatal(err)
		}
	}
	wait(t, "the first answer", func() bool { return s.Counts().Bytes > 0 })
	wait(t, "their end", func() bool { return s.Counts().Connections == 0 })
	n, err := io.Copy(io.Discard, open[0])
	t.Logf("expected: ended before %d bytes; got: ended after %d, %v", len(b), n, err)
	if n >= int64(len(b)) {
		t.Errorf("was given all of %d bytes, %v", n, err)
	}
}

// Who does nothing keeps a place for as long as it is granted, and no longer. The clock
// is the bubble's.
func TestPatience(t *testing.T) {
	b := modeltest.Content(2 * piece)
	files := newStore(t, b)
	get := "GET /models/" + digest.Of(b).Hex() + " HTTP/1.1\r\nHost: h\r\n\r\n"
	for name, c := range map[string]struct {
		says  string
		reads bool
		ends  time.Duration
	}{
		"says nothing":   {"", true, headPatience},
		"half a request": {get[:20], true, headPatience},
		"asks no more":   {get, true, idlePatience},
		"takes nothing":  {get, false, patience},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := New(func(digest.Digest) bool { return true }, files.open, 1<<30, slog.New(slog.DiscardHandler))
				srv := s.server(t.Context())
				l, served := pipes.Listen(), make(chan error, 1)
				go func() { served <- srv.Serve(l) }()
				took, _ := l.Lasts(t, c.says, c.reads)
				t.Logf("expected: ended after %v; got: after %v", c.ends, took)
				if took < c.ends || took > c.ends+time.Second {
					t.Errorf("it ended after %v, want %v", took, c.ends)
				}
				_ = srv.Close()
				<-served
			})
		})
	}
}

func TestManyConnections(t *testing.T) {
	b := modeltest.Content(10)
	s, address := serve(t, newStore(t, b), nil)
	var open []net.Conn
	for range perAddress {
		c, err := net.Dial("tcp", address)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		open = append(open, c)
	}
	wait(t, "their places", func() bool { return s.Counts().Connections == perAddress })
	c, err := net.Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	n, err := c.Read(make([]byte, 1))
	t.Logf("one more than %d: expected: closed, and counted; got: %v, %d refused", perAddress, err, s.Counts().Refused)
	if n != 0 || err == nil || s.Counts().Refused != 1 {
		t.Errorf("one more: %d, %v, %+v", n, err, s.Counts())
	}
	open[0].Close()
	wait(t, "a place", func() bool {
		return strings.HasSuffix(ask(t, address, "GET /models/"+digest.Of(b).Hex()+" HTTP/1.1\r\nHost: h\r\n\r\n"), "200 OK")
	})
}

type addr string

func (a addr) Network() string { return "tcp" }
func (a addr) String() string  { return string(a) }

// records counts what is logged.
type records struct {
	slog.Handler
	mu   sync.Mutex
	n    int
	last string // name of its event
}

func (r *records) Enabled(context.Context, slog.Level) bool { return true }
func (r *records) Handle(_ context.Context, rec slog.Record) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.n++
	rec.Attrs(func(a slog.Attr) bool {
		if e, ok := a.Value.Any().(*journal.Event); ok {
			r.last = e.Name
		}
		return true
	})
	return nil
}

func TestStrangers(t *testing.T) {
	log := new(records)
	s := New(nil, nil, MinRate, slog.New(log))
	for _, a := range []string{"203.0.113.7:1", "100.64.0.1:1", "[2001:db8::1]:1", "[::ffff:203.0.113.7]:1", "0.0.0.0:1", "[::]:1", "224.0.0.1:1", "@", ""} {
		_, ok := s.admit(addr(a))
		t.Logf("%q: expected: not answered; got: %s", a, map[bool]string{true: "answered", false: "not answered"}[ok])
		if ok {
			t.Errorf("%s is answered", a)
		}
	}
	if log.n != 1 || log.last != journal.ModelShareCrowded.Name {
		t.Errorf("%d records of a flood, the last is %s", log.n, log.last)
	}
	taken := 0
	for i := range 300 { // a machine has a whole network of IPv6 addresses
		if _, ok := s.admit(addr(fmt.Sprintf("[fd00:1:2:3::%x]:1", i))); ok {
			taken++
		}
	}
	t.Logf("300 of one network of IPv6: expected: %d answered; got: %d answered", perAddress, taken)
	if taken != perAddress {
		t.Errorf("%d connections of one network", taken)
	}
	for i := range 300 {
		for _, a := range []string{"10.1.%d.1:1", "[fe80::%d%%eth0]:1", "[::ffff:192.168.%d.1]:2"} {
			if i > 255 {
				continue
			}
			if _, ok := s.admit(addr(fmt.Sprintf(a, i))); ok {
				taken++
			}
		}
	}
	t.Logf("from everywhere: expected: %d answered; got: %d answered", connections, taken)
	if taken != connections {
		t.Errorf("%d connections in all", taken)
	}
}

// TestRate: all together get no more than the bound.
func TestRate(t *testing.T) {
	b := modeltest.Content(2 << 20)
	files := newStore(t, b)
	s := New(func(digest.Digest) bool { return true }, files.open, 4<<20, slog.New(slog.DiscardHandler))
	_, address := serve(t, files, func(o *Server) { o.limiter = s.limiter })
	began := time.Now()
	var wg sync.WaitGroup
	for range 2 {
		wg.Go(func() {
			resp, err := http.Get("http://" + address + prefix + digest.Of(b).Hex())
			if err != nil {
				t.Error(err)
				return
			}
			defer resp.Body.Close()
			if n, err := io.Copy(io.Discard, resp.Body); n != int64(len(b)) || err != nil {
				t.Errorf("%d bytes, %v", n, err)
			}
		})
	}
	wg.Wait()
	// 4 MiB, less the half that may come at once.
	if d := time.Since(began); d < 800*time.Millisecond {
		t.Errorf("took %v", d)
	}
	http.DefaultClient.CloseIdleConnections()
}

// TestRunWaitsForItsAddress: it is tried again where it cannot listen.
func TestRunWaitsForItsAddress(t *testing.T) {
	defer func(r []time.Duration) { retries = r }(retries)
	retries = []time.Duration{time.Millisecond}
	b := modeltest.Content(10)
	files, log := newStore(t, b), new(records)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := New(func(digest.Digest) bool { return true }, files.open, MinRate, slog.New(log))
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- s.Run(ctx, l.Addr().String()) }()
	logged := func() (int, string) {
		log.mu.Lock()
		defer log.mu.Unlock()
		return log.n, log.last
	}
	wait(t, "a word", func() bool { n, _ := logged(); return n >= 1 })
	if _, last := logged(); last != journal.ModelShareFailed.Name { // it waits now
		t.Errorf("the word is %s", last)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	wait(t, "another", func() bool { _, last := logged(); return last != journal.ModelShareFailed.Name })
	if line := ask(t, l.Addr().String(), "GET /models/"+digest.Of(b).Hex()+" HTTP/1.1\r\nHost: h\r\n\r\n"); !strings.HasSuffix(line, "200 OK") {
		t.Error(line)
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if _, err := net.Dial("tcp", l.Addr().String()); err == nil {
		t.Error("it still listens")
	}
	if err := s.Run(ctx, "203.0.113.7:1"); err != nil && !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}
