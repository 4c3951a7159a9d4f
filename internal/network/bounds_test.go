package network

import (
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
	"testing"
	"time"

	"github.com/resultity/node/internal/durable"
	"github.com/resultity/node/internal/evm"
	"github.com/resultity/node/internal/network/nodetest"
	"github.com/resultity/node/internal/network/orders"
	"github.com/resultity/node/internal/network/store"
	"github.com/resultity/node/internal/publish"
	"github.com/resultity/node/internal/receipt"
	"github.com/resultity/node/internal/wire"
)

// home makes a network that is published.
func home(t *testing.T) (dir string) {
	t.Helper()
	dir, err := os.MkdirTemp("", "rn") // whose sockets have short names
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	key, _, err := Init(t.Context(), dir, InitOptions{
		Name: "testnet", ChainID: 1, TokenUses: 1, Publish: publish.Options{RootKeys: []string{filepath.Join(dir, "keys/root.pem")}},
	}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	if err := Publish(dir, nodetest.JSON(t, nodetest.Config(t, key))); err != nil {
		t.Fatal(err)
	}
	return dir
}

// The operator's socket and the one for metrics have so many connections, and a
// command as many bytes, as they may have; who is refused is told what to do, and comes
// in when somebody has gone.
func TestServiceIsBounded(t *testing.T) {
	cfg := Defaults()
	cfg.Dir, cfg.Listen, cfg.MetricsListen, cfg.Drain = home(t), "127.0.0.1:0", "127.0.0.1:0", 0
	ready := make(chan net.Addr, 1)
	cfg.Ready = func(_, metrics net.Addr) { ready <- metrics }
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- Run(ctx, cfg, slog.New(slog.DiscardHandler)) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	metrics := <-ready

	t.Run("connections", func(t *testing.T) {
		fresh := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
		for name, c := range map[string]struct {
			network, address string
			most             int
			ask              func() error
		}{
			"metrics": {"tcp", metrics.String(), maxWatchers, func() error {
				res, err := fresh.Get("http://" + metrics.String() + "/metrics")
				if err == nil {
					_ = res.Body.Close() // the status is enough
				}
				return err
			}},
			"commands": {"unix", adminSocket(cfg.Dir), maxCommands, func() error {
				// As dialAdmin does, which has looked whether somebody listens before.
				a := &adminClient{http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
					return new(net.Dialer).DialContext(ctx, "unix", adminSocket(cfg.Dir))
				}}}}
				_, err := a.Nodes(t.Context())
				return err
			}},
		} {
			var open []net.Conn
			for range c.most {
				conn, err := net.Dial(c.network, c.address)
				if err != nil {
					t.Fatal(err)
				}
				open = append(open, conn)
			}
			err := c.ask() // each is taken in its turn
			t.Logf("%s beside %d others: expected: closed at once; got: %v", name, len(open), err)
			if err == nil || name == "commands" && !strings.Contains(err.Error(), "other commands") {
				t.Errorf("%s: beside %d others: %v", name, len(open), err)
			}
			last := open[len(open)-1]
			if _, err := io.WriteString(last, "GET / HTTP/1.1\r\nHost: x\r\n\r\n"); err != nil {
				t.Error(err)
			}
			if _, err := last.Read(make([]byte, 1)); err != nil {
				t.Errorf("%s: number %d was closed: %v", name, len(open), err)
			}
			_ = open[0].Close() // nothing was said on it
			for end := time.Now().Add(nodetest.Patience); c.ask() != nil; {
				if time.Now().After(end) {
					t.Fatalf("%s: no room when one has gone", name)
				}
			}
			for _, conn := range open {
				_ = conn.Close() // likewise
			}
		}
	})

	t.Run("bytes", func(t *testing.T) {
		c, err := dialAdmin(cfg.Dir)
		if c == nil || err != nil {
			t.Fatal(c, err)
		}
		defer c.Close()
		for name, most := range map[string]int{"/orders/wait": maxCommand, "/jobs/" + receipt.NewJobID().String() + "/replay": maxReplayQuery} {
			for over := range 2 {
				body := strings.Repeat(" ", most+over-2) + "{}"
				res, err := c.http.Post("http://admin"+name, "application/json", strings.NewReader(body))
				if err != nil {
					t.Fatal(err)
				}
				said, err := io.ReadAll(res.Body)
				_ = res.Body.Close() // it has been read
				refused := strings.Contains(string(said), "the command has more than")
				if over > 0 {
					t.Logf("%.12s of %d bytes: expected: refused; got: %.100s", name, len(body), said)
				}
				if err != nil || refused != (over > 0) {
					t.Errorf("%s of %d bytes: %s, %v", name, len(body), said, err)
				}
			}
		}
		// Whoever has ordered something of each node of a large network may wait for all.
		ids := make([]wire.OrderID, 100_000)
		if err := c.WaitOrders(t.Context(), ids); err != nil {
			t.Errorf("wait for %d orders: %v", len(ids), err)
		}
		if _, err := c.IssueOrders(t.Context(), &evm.Address{1}, orders.What{Kind: wire.OrderDrain, Reason: strings.Repeat("x", maxCommand), Life: time.Minute}); err == nil || !strings.Contains(err.Error(), "at once") {
			t.Errorf("a long order: %v", err)
		}
		// The service's answer is not believed to be short.
		most := maxAdminReply
		defer func() { maxAdminReply = most }()
		maxAdminReply = 10
		_, err = c.CreateAPIKey(t.Context(), "name")
		t.Logf("an answer of more than %d bytes: expected: refused; got: %v", maxAdminReply, err)
		if err == nil || !strings.Contains(err.Error(), "more than 10 bytes") {
			t.Errorf("a long answer: %v", err)
		}
	})
}

// A command waits for a service that starts, or for another command, and not for ever.
func TestCommandsWaitInVain(t *testing.T) {
	dir := home(t)
	s, err := store.Open(t.Context(), filepath.Join(dir, "store"), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	most := adminWait
	defer func() { adminWait = most }()
	adminWait = 3 * adminRetry
	begun := time.Now()
	_, err = OpenAdmin(t.Context(), dir, slog.New(slog.DiscardHandler))
	took := time.Since(begun)
	t.Logf("expected: %v after %v; got: %v after %v", store.ErrLocked, adminWait, err, took)
	if !errors.Is(err, store.ErrLocked) || took < adminWait {
		t.Errorf("%v after %v", err, took)
	}
}

func TestConfigFileIsBounded(t *testing.T) {
	name := filepath.Join(t.TempDir(), "network.toml")
	for size, want := range map[int]error{maxConfigFile: nil, maxConfigFile + 1: durable.ErrLarge} {
		if err := os.WriteFile(name, fmt.Appendf(nil, "#%s\n", strings.Repeat("x", size-2)), 0o600); err != nil {
			t.Fatal(err)
		}
		c := Defaults()
		err := c.ReadFile(name)
		t.Logf("%d bytes: expected: %v; got: %v", size, want, err)
		if !errors.Is(err, want) || want != nil && (!errors.Is(err, ErrConfig) || !strings.Contains(err.Error(), name)) {
			t.Errorf("%d bytes: %v, want %v", size, err, want)
		}
	}
}
