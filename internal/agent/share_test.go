package agent

import (
	"context"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/resultity/node/internal/deploy/deploytest"
	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/model/share"
)

// TestListedFilesAreGiven: what a neighbour may have is of the newest configuration, or
// of the one that is served.
func TestListedFilesAreGiven(t *testing.T) {
	bubble(t, func(t *testing.T, f *fixture, n *deploytest.Network) {
		s := n.Publish(nil)
		first := s.Model().Files[0].SHA256
		if f.lists(first) {
			t.Error("it lists a file without a configuration")
		}
		f.tuf.serve(s, nil)
		close(f.link.up)
		defer f.run()()
		pass(time.Second)
		if !f.lists(first) || f.lists(digest.Of([]byte("of nobody"))) {
			t.Error("the first model")
		}
		f.machine.Fail(deploytest.EnsureModel, &deploytest.Fault{Err: errBroken})
		next := n.Publish(map[string]any{"models": []any{deploytest.Model(2)}})
		second := next.Model().Files[0].SHA256
		f.tuf.serve(next, nil)
		poke(f.update)
		pass(time.Minute)
		if !f.lists(first) || !f.lists(second) {
			t.Error("the one that is served, and the next one")
		}
		f.machine.Fail(deploytest.EnsureModel, nil)
		pass(10 * time.Minute)
		if f.lists(first) || !f.lists(second) {
			t.Error("after the switch")
		}
	})
}

// TestSharing gives one file, and counts it.
func TestSharing(t *testing.T) {
	l, err := net.Listen("tcp", "127.11.77.3:0") // an address that no other test takes the port of meanwhile
	if err != nil {
		t.Fatal(err)
	}
	address := l.Addr().String()
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	f := build(t, t.TempDir(), deploytest.New(t))
	defer f.Close()
	dir := t.TempDir()
	b := []byte("a file of a model")
	if err := os.WriteFile(filepath.Join(dir, digest.Of(b).Hex()), b, 0o600); err != nil {
		t.Fatal(err)
	}
	f.cfg.Models.Serve = address
	f.share = share.New(func(digest.Digest) bool { return true }, func(d digest.Digest) (*os.File, error) { return os.Open(filepath.Join(dir, d.Hex())) }, share.MinRate, slog.New(slog.DiscardHandler))
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- f.shareModels(ctx) }()
	defer func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}()
	var got []byte
	for end := time.Now().Add(patience); string(got) != string(b); {
		if time.Now().After(end) {
			t.Fatal("not given")
		}
		resp, err := http.Get("http://" + address + "/models/" + digest.Of(b).Hex())
		if err != nil {
			time.Sleep(time.Millisecond) // it does not listen yet
			continue
		}
		got, _ = io.ReadAll(resp.Body)
		resp.Body.Close()
	}
	http.DefaultClient.CloseIdleConnections()
	wants := []string{"resultity_models_given_bytes_total 17\n", "resultity_models_given_answers_total 1\n", "resultity_models_given_refused_total 0\n", "# TYPE resultity_models_given_bytes_total counter"}
	for end := time.Now().Add(patience); ; {
		w := httptest.NewRecorder()
		f.Metrics().ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/metrics", nil))
		missing := slices.DeleteFunc(slices.Clone(wants), func(want string) bool { return strings.Contains(w.Body.String(), want) })
		if len(missing) == 0 {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("no %q in %s", missing, w.Body)
		}
		time.Sleep(time.Millisecond) // bytes count when they are written, and may have been read by then
	}
}
