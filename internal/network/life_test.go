package network_test

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"log/slog"
	"math"
	"math/big"
	mrand "math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gorilla/websocket"
	"golang.org/x/sys/unix"

	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/network"
	"github.com/resultity/node/internal/network/cli"
	"github.com/resultity/node/internal/network/nodetest"
	"github.com/resultity/node/internal/network/store"
	"github.com/resultity/node/internal/publish"
	"github.com/resultity/node/internal/receipt"
	"github.com/resultity/node/internal/snapshot"
	"github.com/resultity/node/internal/wire"
)

// The service stops while a job runs: the client is told, the job is given out
// again after the start, and its result counts.
func TestRestart(t *testing.T) {
	n := start(t, nil)
	v := n.node()
	s := v.Ready(t)
	ch := n.ask(chat)
	j := s.Take()
	n.stop()
	if r := n.answer(ch); r.status != http.StatusServiceUnavailable || r.code() != "stopping" || r.header.Get("Retry-After") == "" {
		t.Fatalf("%d %s", r.status, r.body)
	}
	if code := s.Closed(); code != websocket.CloseGoingAway {
		t.Errorf("session closed with %d", code)
	}
	n.serve()
	v.URL = n.url
	s = v.Connect(t)
	s.Send(s.Node.Result(t, j, nodetest.Body(j, "secret answer"), nil))
	if a := nodetest.Expect[*wire.Ack](s); a.Jobs[0] != j.ID {
		t.Fatalf("acknowledged %v", a.Jobs)
	}
	if r := n.get("/v1/receipts/" + j.ID.String()); r.status != http.StatusOK {
		t.Fatalf("receipt: %d %s", r.status, r.body)
	}
	// Once more: it is known.
	n.stop()
	n.serve()
	v.URL = n.url
	s = v.Ready(t)
	s.Send(s.Node.Result(t, j, nodetest.Body(j, "secret answer"), nil))
	nodetest.Expect[*wire.Ack](s)
	if v := n.metric("resultity_dispatches_total"); v != 0 {
		t.Errorf("a finished job was given out %v times", v)
	}
}

// Requests that run when the service is told to stop may end.
func TestDrain(t *testing.T) {
	n := setUp(t, nil)
	n.tweak = func(c *network.Config) { c.Drain = nodetest.Patience }
	n.serve()
	s := n.node().Ready(t)
	ch := n.ask(chat)
	j := s.Take()
	stopped := make(chan struct{})
	go func() { n.stop(); close(stopped) }()
	n.until("no new connections", func() bool {
		c, err := net.Dial("tcp", strings.TrimPrefix(n.url, "http://"))
		if err == nil {
			_ = c.Close()
		}
		return err != nil
	})
	s.Finish(j, "secret answer")
	if r := n.answer(ch); r.status != http.StatusOK {
		t.Fatalf("%d %s", r.status, r.body)
	}
	<-stopped
}

// killable is the program in a process of its own.
type killable struct {
	cmd  *exec.Cmd
	once sync.Once
}

var addressPattern = regexp.MustCompile(`msg=serving .*address=(\S+) metrics=(\S+)`)

func (n *testNetwork) spawn(flags ...string) *killable {
	n.t.Helper()
	cmd := exec.Command(os.Args[0], append([]string{"serve", "--dir", n.dir, "--listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0"}, flags...)...)
	cmd.Env = append(os.Environ(), asProgram+"=1")
	out, err := cmd.StderrPipe()
	if err != nil {
		n.t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		n.t.Fatal(err)
	}
	k := &killable{cmd: cmd}
	address := make(chan []string, 1)
	go func() {
		lines := bufio.NewScanner(out)
		for lines.Scan() {
			if m := addressPattern.FindStringSubmatch(lines.Text()); m != nil {
				address <- m[1:]
			}
		}
		close(address)
	}()
	a, ok := <-address
	if !ok {
		k.kill()
		n.t.Fatal("the program ended before it served")
	}
	n.url, n.metrics = "http://"+a[0], "http://"+a[1]+"/metrics"
	return k
}

func (k *killable) kill() {
	k.once.Do(func() {
		_ = k.cmd.Process.Kill() // gone already is as good
		_ = k.cmd.Wait()         // says that it was killed
	})
}

// end stops the program as an operator does.
func (k *killable) end() {
	k.once.Do(func() {
		_ = k.cmd.Process.Signal(syscall.SIGTERM) // gone already is as good
		_ = k.cmd.Wait()                          // likewise
	})
}

// The program is killed again and again under load. Every job that a node ever
// saw ends in one stored result, unless it was killed while the job was being
// written down; nothing that was answered is lost.
func TestKill(t *testing.T) {
	t.Parallel() // it waits more than it works
	n := setUp(t, nil)
	v := nodetest.New(t, "", n.raw)
	outbox := map[receipt.JobID]*wire.Job{}
	seen := map[receipt.JobID]bool{}
	var mu sync.Mutex
	answered := map[string]bool{} // receipts that clients were promised
	enrolled := false

	for round := range 8 {
		k := n.spawn()
		t.Cleanup(k.kill)
		v.URL = n.url
		if !enrolled {
			v.Enrol(t, n.file("enrolment-token"))
			enrolled = true
		}
		s := v.Connect(t)
		s.Send(v.Heartbeat())
		ctx, stop := context.WithCancel(t.Context())
		var clients sync.WaitGroup
		for range 3 {
			clients.Go(func() {
				for ctx.Err() == nil {
					r := n.do(ctx, http.MethodPost, "/v1/chat/completions", chat)
					if r.err == nil && r.status == http.StatusOK {
						mu.Lock()
						answered[r.header.Get("Resultity-Receipt")] = true
						mu.Unlock()
					}
				}
			})
		}
		last := round == 7
		if last {
			stop()
			clients.Wait()
		}
		more := 4 + mrand.IntN(8) // jobs of this round, after which it is killed at any moment
		for _, j := range outbox {
			if s.TrySend(v.Result(t, j, nodetest.Body(j, "x"), nil)) != nil {
				break
			}
		}
		for !last || len(outbox) > 0 {
			m, err := s.Receive()
			if err != nil {
				break
			}
			switch m := m.(type) {
			case *wire.Job:
				if !seen[m.ID] && !last {
					if more--; more == 0 {
						time.AfterFunc(mrand.N(150*time.Millisecond), k.kill)
					}
				}
				seen[m.ID] = true
				outbox[m.ID] = m
				_ = s.TrySend(&wire.Accept{Job: m.ID}) // a failure shows in Receive
				_ = s.TrySend(v.Result(t, m, nodetest.Body(m, "x"), nil))
			case *wire.Ack:
				for _, id := range m.Jobs {
					delete(outbox, id)
				}
			case *wire.Cancel:
				delete(seen, m.Job) // its client stopped asking in the last round
			}
		}
		stop()
		clients.Wait()
		if !last {
			k.kill()
		} else {
			unwritten := 0
			for id := range seen {
				if r := n.get("/v1/receipts/" + id.String()); r.status != http.StatusOK {
					unwritten++
				}
			}
			if unwritten > 3*7 { // one of each client at each kill
				t.Errorf("%d jobs without a receipt", unwritten)
			}
			for id := range answered {
				if r := n.get("/v1/receipts/" + id); r.status != http.StatusOK {
					t.Errorf("receipt %s was promised: %d", id, r.status)
				}
			}
			k.kill()
		}
	}
	if len(seen) < 20 || len(answered) == 0 {
		t.Errorf("only %d jobs and %d answers", len(seen), len(answered))
	}
}

// A new configuration reaches nodes and clients without a restart.
func TestPublishWhileServing(t *testing.T) {
	n := start(t, nil)
	v := n.node()
	s := v.Ready(t)
	n.config.Limits.Messages = 1
	file := filepath.Join(n.dir, "new.json")
	if err := os.WriteFile(file, nodetest.JSON(t, n.config), 0o600); err != nil {
		t.Fatal(err)
	}
	if code, _, stderr := command(t, "publish", "--dir", n.dir, "--config", file); code != 0 {
		t.Fatalf("publish: %d %s", code, stderr)
	}
	m, err := s.Receive()
	if u, ok := m.(*wire.Update); !ok || err != nil || u.Version != 2 {
		t.Fatalf("%T %+v %v", m, m, err)
	}
	if st := nodetest.Expect[*wire.Status](s); st.Routable {
		t.Fatal("routable under the old configuration")
	}
	two := `{"model":"tiny","messages":[{"role":"user","content":"a"},{"role":"user","content":"b"}]}`
	if r := n.answer(n.ask(two)); r.status != http.StatusBadRequest {
		t.Fatalf("%d %s", r.status, r.body)
	}
	v.Digest = digest.Of(nodetest.JSON(t, n.config))
	s.Send(v.Heartbeat())
	if st := nodetest.Expect[*wire.Status](s); !st.Routable {
		t.Fatalf("%+v", st)
	}
	ch := n.ask(chat)
	s.Finish(s.Take(), "fine")
	if r := n.answer(ch); r.status != http.StatusOK {
		t.Fatalf("%d %s", r.status, r.body)
	}
}

// Files that somebody copies into the repository are taken over too.
func TestPublishBehindTheBack(t *testing.T) {
	t.Parallel() // it waits more than it works
	n := setUp(t, nil)
	n.config.Limits.Messages = 1
	// The first time while the service starts, when it has read what was there.
	publishNow := sync.OnceFunc(func() {
		if err := publish.Publish(n.dir, nodetest.JSON(t, n.config)); err != nil {
			t.Error(err)
		}
	})
	n.logs.on = func(line []byte) {
		if bytes.Contains(line, []byte("msg=\"store: ")) {
			publishNow()
		}
	}
	n.serve()
	n.until("the new configuration is active", func() bool { return n.metric("resultity_config_version") == 2 })
	// One that does not list the service's key is not served, and said to be there.
	n.config.Network.MessageKeys[0][0] ^= 1
	if err := publish.Publish(n.dir, nodetest.JSON(t, n.config)); err != nil {
		t.Fatal(err)
	}
	n.until("the service is unwell", func() bool { return n.get("/healthz").status == http.StatusServiceUnavailable })
	n.tellsStrangersLittle()
	if v := n.metric("resultity_config_version"); v != 2 {
		t.Errorf("version %v is active", v)
	}
}

// tellsStrangersLittle looks at what a service that is unwell says of itself in public.
func (n *testNetwork) tellsStrangersLittle() {
	n.t.Helper()
	r := n.get("/healthz")
	if r.status == http.StatusServiceUnavailable && (bytes.ContainsAny(r.body, "/%") || bytes.Contains(r.body, []byte("0x")) || !bytes.Contains(r.body, []byte("log"))) {
		n.t.Errorf("%s", r.body)
	}
}

// Somebody publishes elsewhere and copies the files, the timestamp first: once all
// of them are there they are taken over, whatever was wrong before.
func TestPublishInPieces(t *testing.T) {
	t.Parallel() // it waits more than it works
	n := start(t, nil)
	elsewhere := t.TempDir()
	for _, part := range []string{"keys", "repository"} {
		if err := os.CopyFS(filepath.Join(elsewhere, part), os.DirFS(filepath.Join(n.dir, part))); err != nil {
			t.Fatal(err)
		}
	}
	keys, err := filepath.Glob(filepath.Join(elsewhere, "keys", "*"))
	for _, key := range keys {
		err = errors.Join(err, os.Chmod(key, 0o600))
	}
	if err != nil {
		t.Fatal(err)
	}
	raw, err := os.ReadFile(filepath.Join(n.dir, "publish.json"))
	if err == nil {
		err = os.WriteFile(filepath.Join(elsewhere, "publish.json"), raw, 0o600)
	}
	n.config.Limits.Messages = 1
	if err := errors.Join(err, publish.Publish(elsewhere, nodetest.JSON(t, n.config))); err != nil {
		t.Fatal(err)
	}
	copied := func(name string) {
		raw, err := os.ReadFile(filepath.Join(elsewhere, "repository", name))
		if err == nil {
			err = os.WriteFile(filepath.Join(n.dir, "repository", name), raw, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	copied("metadata/timestamp.json")
	n.until("the service is unwell", func() bool { return n.get("/healthz").status == http.StatusServiceUnavailable })
	n.tellsStrangersLittle()
	for _, dir := range []string{"targets", "metadata"} {
		files, err := os.ReadDir(filepath.Join(elsewhere, "repository", dir))
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range files {
			if f.Name() != "timestamp.json" {
				copied(dir + "/" + f.Name())
			}
		}
	}
	n.until("the new configuration is active", func() bool {
		return n.metric("resultity_config_version") == 2 && n.get("/healthz").status == http.StatusOK
	})
}

// A publisher that hangs does not hold up who looks at the service.
func TestPublisherHangs(t *testing.T) {
	n := start(t, nil)
	lock, err := os.OpenFile(filepath.Join(n.dir, "lock"), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close() // nothing was written
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	if v := n.metric(`resultity_metadata_expires_seconds{role="root"}`); v < float64(time.Now().Unix()) {
		t.Errorf("the root expires at %v", v)
	}
	if r := n.get("/healthz"); r.status != http.StatusOK {
		t.Errorf("health: %d %s", r.status, r.body)
	}
}

// The timestamp is renewed before nodes would refuse it.
func TestTimestampIsRenewed(t *testing.T) {
	n := setUp(t, nil)
	before, err := publish.Current(n.dir)
	if err != nil {
		t.Fatal(err)
	}
	n.serve()
	after, err := publish.Current(n.dir)
	if err != nil {
		t.Fatal(err)
	}
	if after.Expires().Before(before.Expires()) || after.Digest() != before.Digest() {
		t.Errorf("expires %v, was %v", after.Expires(), before.Expires())
	}
	if r := n.get("/tuf/metadata/timestamp.json"); r.status != http.StatusOK {
		t.Errorf("timestamp: %d", r.status)
	}
	if r := n.get("/tuf/keys/timestamp.pem"); r.status != http.StatusNotFound {
		t.Errorf("a key: %d", r.status)
	}
}

// command runs the program's command line in this process.
func command(t testing.TB, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	code = cli.Main(t.Context(), args, &out, &errs, "test")
	return code, strings.TrimSpace(out.String()), strings.TrimSpace(errs.String())
}

func TestAdmin(t *testing.T) {
	for _, running := range []bool{true, false} {
		n := setUp(t, nil)
		if running {
			n.serve()
			if st, err := os.Stat(filepath.Join(n.dir, "admin.sock")); err != nil || st.Mode().Perm() != 0o600 {
				t.Fatalf("admin socket: %v %v", st, err)
			}
		}
		code, key, stderr := command(t, "apikey", "create", "--dir", n.dir, "--name", "alice")
		if code != 0 || !strings.HasPrefix(key, "rk-") {
			t.Fatalf("%d %q %q", code, key, stderr)
		}
		code, token, stderr := command(t, "token", "create", "--dir", n.dir, "--uses", "1", "--account", "bob", "--expires", "1h")
		if code != 0 || !strings.HasPrefix(token, "rt-") {
			t.Fatalf("%d %q %q", code, token, stderr)
		}
		for _, args := range [][]string{
			{"token", "create", "--dir", n.dir, "--uses", "0"},
			{"token", "create", "--dir", n.dir, "--uses", "1001"},
			{"token", "create", "--dir", n.dir, "--expires", "-1h"},
			{"apikey", "create", "--dir", n.dir, "--name", ""},
			{"apikey", "revoke", "--dir", n.dir, "--name", "nobody"},
		} {
			if code, out, _ := command(t, args...); code != 1 || out != "" {
				t.Errorf("%v: %d %q", args, code, out)
			}
		}
		if !running {
			n.serve()
		}
		first := n.apiKey
		n.apiKey = key
		if r := n.get("/v1/models"); r.status != http.StatusOK {
			t.Errorf("new key: %d", r.status)
		}
		v := nodetest.New(t, n.url, n.raw)
		if status, reply, err := v.Register(t.Context(), v.Registration(token), v.Key); err != nil || status != http.StatusOK || reply.Account != "bob" {
			t.Errorf("new token: %d %+v %v", status, reply, err)
		}
		if code, out, stderr := command(t, "apikey", "revoke", "--dir", n.dir, "--name", "alice"); code != 0 || out != "revoked 1" {
			t.Errorf("%d %q %q", code, out, stderr)
		}
		if r := n.get("/v1/models"); r.status != http.StatusUnauthorized {
			t.Errorf("revoked key: %d", r.status)
		}
		n.apiKey = first
		if r := n.get("/v1/models"); r.status != http.StatusOK {
			t.Errorf("first key: %d", r.status)
		}
		n.stop()
		if _, err := os.Stat(filepath.Join(n.dir, "admin.sock")); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("admin socket is left: %v", err)
		}
	}
}

// A service that starts has its store before its socket: commands wait for that.
func TestAdminWaitsForAStart(t *testing.T) {
	dir := shortDir(t)
	if err := os.WriteFile(filepath.Join(dir, "publish.json"), []byte("{}"), 0o600); err != nil {
		t.Fatal(err)
	}
	s, err := store.Open(t.Context(), filepath.Join(dir, "store"), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	l, err := net.Listen("unix", filepath.Join(dir, "other.sock"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	synctest.Test(t, func(t *testing.T) {
		if _, err := network.OpenAdmin(t.Context(), dir, slog.New(slog.DiscardHandler)); !errors.Is(err, store.ErrLocked) {
			t.Fatal(err)
		}
		opened := make(chan error)
		go func() {
			a, err := network.OpenAdmin(t.Context(), dir, slog.New(slog.DiscardHandler))
			if err == nil {
				a.Close()
			}
			opened <- err
		}()
		synctest.Wait() // it has found the store locked
		if err := os.Rename(filepath.Join(dir, "other.sock"), filepath.Join(dir, "admin.sock")); err != nil {
			t.Fatal(err)
		}
		if err := <-opened; err != nil {
			t.Fatal(err)
		}
	})
}

// Secrets are nowhere in the store or the log in the clear.
func TestSecretsAreHashed(t *testing.T) {
	n := start(t, nil)
	n.node()
	n.stop()
	for _, name := range []string{"api-key", "enrolment-token"} {
		secret := n.file(name)
		if st, err := os.Stat(filepath.Join(n.dir, name)); err != nil || st.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v %v", name, st.Mode(), err)
		}
		if bytes.Contains(n.logs.w.Bytes(), []byte(secret)) {
			t.Errorf("%s is in the log", name)
		}
		files, found := 0, 0
		err := filepath.WalkDir(filepath.Join(n.dir, "store"), func(path string, d os.DirEntry, err error) error {
			if err != nil || !d.Type().IsRegular() {
				return err
			}
			b, err := os.ReadFile(path)
			files, found = files+1, found+bytes.Count(b, []byte(secret))
			if bytes.Contains(b, []byte(secret)) {
				t.Errorf("%s is in %s", name, path)
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("%s: expected: in no file of the store; got: %d times in %d files", name, found, files)
	}
}

func TestConfigErrors(t *testing.T) {
	n := setUp(t, nil)
	empty := shortDir(t)
	file := func(text string) string {
		name := filepath.Join(t.TempDir(), "network.toml")
		if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return name
	}
	unpublished := shortDir(t)
	if code, _, stderr := command(t, "init", "--dir", unpublished, "--name", "x", "--chain-id", "1"); code != 0 {
		t.Fatal(stderr)
	}
	for _, tc := range []struct {
		want string
		args []string
	}{
		{"dir: " + empty + " holds no network", []string{"serve", "--dir", empty}},
		{"no configuration has been published", []string{"serve", "--dir", unpublished}},
		{"listen: \"8443\": want host:port", []string{"serve", "--dir", n.dir, "--listen", "8443"}},
		{"metrics_listen: \"9464\": want host:port", []string{"serve", "--dir", n.dir, "--metrics-listen", "9464"}},
		{"tls_cert: :0 can be reached from other machines", []string{"serve", "--dir", n.dir, "--listen", ":0"}},
		{"tls_key: tls_cert and tls_key go together", []string{"serve", "--dir", n.dir, "--tls-cert", "x"}},
		{"tls_cert: stat /nowhere", []string{"serve", "--dir", n.dir, "--tls-cert", "/nowhere", "--tls-key", "/nowhere"}},
		{"log_level: \"loud\"", []string{"serve", "--dir", n.dir, "--log-level", "loud"}},
		{"no such file", []string{"serve", "--config", "/nowhere.toml"}},
		{"lisen: unknown key; known are dir, listen", []string{"serve", "--config", file(`lisen = ":1"`)}},
		{"max_queued: want a whole number, got many", []string{"serve", "--config", file(`max_queued = "many"`)}},
		{"trusted_proxies: want a list of texts", []string{"serve", "--config", file(`trusted_proxies = "10.0.0.0/8"`)}},
		{"trusted_proxies: \"10.0.0.1\": want a network", []string{"serve", "--dir", n.dir, "--config", file(`trusted_proxies = ["10.0.0.1"]`)}},
		{"max_queued: is 0", []string{"serve", "--dir", n.dir, "--config", file(`max_queued = 0`)}},
		{"key_share: is 101", []string{"serve", "--dir", n.dir, "--config", file(`key_share = 101`)}},
		{"node_wait: is 0s", []string{"serve", "--dir", n.dir, "--config", file(`node_wait = "0s"`)}},
		{"drain: want a duration in quotes", []string{"serve", "--config", file(`drain = 10`)}},
		{"drain: want a duration", []string{"serve", "--config", file(`drain = "soon"`)}},
		{"dir: want a text in quotes", []string{"serve", "--config", file(`dir = 1`)}},
		{"holds a network already", []string{"init", "--dir", n.dir, "--name", "x", "--chain-id", "1"}},
		{"sha256", []string{"publish", "--dir", unpublished, "--config", filepath.Join(unpublished, "config.json")}},
		{"config: open /nowhere", []string{"publish", "--dir", n.dir, "--config", "/nowhere"}},
		{"holds no network", []string{"token", "create", "--dir", empty}},
	} {
		code, _, stderr := command(t, tc.args...)
		if code != 78 || !strings.Contains(stderr, tc.want) {
			t.Errorf("%v: %d %q, want 78 and %q", tc.args, code, stderr, tc.want)
		}
	}
	if code, _, _ := command(t, "serve", "--nonsense"); code != 64 {
		t.Errorf("unknown flag: %d", code)
	}
	if code, out, _ := command(t, "version"); code != 0 || out != "resultity-network test" {
		t.Errorf("version: %d %q", code, out)
	}
}

// Publishing what this service could not serve is refused.
func TestPublishRefused(t *testing.T) {
	n := setUp(t, nil)
	for want, change := range map[string]func(*snapshot.Config){
		"network.message_keys": func(c *snapshot.Config) { c.Network.MessageKeys[0][0] ^= 1 },
		"network.name":         func(c *snapshot.Config) { c.Network.Name = "other" },
		"network.chain_id":     func(c *snapshot.Config) { c.Network.ChainID++ },
	} {
		c := nodetest.Config(t, n.key)
		change(c)
		if err := network.Publish(n.dir, nodetest.JSON(t, c)); !errors.Is(err, network.ErrConfig) || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", want, err)
		}
	}
}

// The service runs without a key that could configure a node, and says so when
// it could read one; who publishes brings it.
func TestKeysElsewhere(t *testing.T) {
	n := setUp(t, nil)
	away := t.TempDir()
	n.serve()
	n.stop()
	const warning = "root and targets keys are within reach"
	t.Logf("serve beside the keys: expected: %s; got: it is said %d times", warning, strings.Count(n.logs.w.String(), warning))
	if got := n.logs.w.String(); !strings.Contains(got, warning) || !strings.Contains(got, "targets.pem") || !strings.Contains(got, "root.pem") {
		t.Error("no warning, or not of all keys")
	}
	for _, name := range []string{"root.pem", "targets.pem"} {
		if err := os.Rename(filepath.Join(n.dir, "keys", name), filepath.Join(away, name)); err != nil {
			t.Fatal(err)
		}
	}
	n.logs.w.Reset()
	n.serve()
	s := n.node().Ready(t)
	ch := n.ask(chat)
	s.Finish(s.Take(), "fine")
	if r := n.answer(ch); r.status != http.StatusOK {
		t.Fatalf("%d %s", r.status, r.body)
	}
	n.config.Limits.Messages = 1
	file := filepath.Join(n.dir, "new.json")
	if err := os.WriteFile(file, nodetest.JSON(t, n.config), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		key  []string
		want string // "" when it is published
	}{
		{nil, "no such file"},
		{[]string{"--key", filepath.Join(away, "root.pem")}, "is none that root 1 names"},
		{[]string{"--key", filepath.Join(away, "targets.pem")}, ""},
	} {
		code, _, stderr := command(t, append([]string{"publish", "--dir", n.dir, "--config", file}, tc.key...)...)
		t.Logf("publish %s: expected: %s; got: status %d %s", filepath.Base(strings.Join(tc.key, " ")), cmp.Or(tc.want, "it is published"), code, strings.TrimSpace(stderr))
		if (code == 0) != (tc.want == "") || !strings.Contains(stderr, tc.want) {
			t.Errorf("%v: %d %s", tc.key, code, stderr)
		}
	}
	if v := n.metric("resultity_config_version"); v != 2 {
		t.Errorf("version %v is active", v)
	}
	n.stop()
	if strings.Contains(n.logs.w.String(), warning) {
		t.Error("a warning without a key")
	}
}

// Media for keys that are not there are told of before anything is made.
func TestInitWithoutMedia(t *testing.T) {
	for _, flag := range []string{"--root-key", "--targets-key"} {
		dir := shortDir(t)
		missing := filepath.Join(dir, "media", "key.pem")
		code, _, stderr := command(t, "init", "--dir", filepath.Join(dir, "net"), "--name", "x", "--chain-id", "1", flag, missing)
		if code != 78 || !strings.Contains(stderr, filepath.Dir(missing)+" is not a directory") {
			t.Errorf("%s: %d %s", flag, code, stderr)
		}
		if left, err := os.ReadDir(filepath.Join(dir, "net")); err != nil || len(left) != 1 || left[0].Name() != "keys" {
			t.Errorf("%s: left are %v %v", flag, left, err)
		}
	}
}

// A network can be made with the keys elsewhere from the beginning.
func TestInitWithKeysElsewhere(t *testing.T) {
	dir, away := shortDir(t), t.TempDir()
	code, out, stderr := command(t, "init", "--dir", dir, "--name", "x", "--chain-id", "1",
		"--root-key", filepath.Join(away, "root.pem"), "--targets-key", filepath.Join(away, "targets.pem"))
	if code != 0 || strings.Contains(out, "Keep these") {
		t.Fatalf("%d %s %s", code, out, stderr)
	}
	if exposed, err := publish.Exposed(dir); err != nil || len(exposed) != 0 {
		t.Fatalf("exposed are %v: %v", exposed, err)
	}
}

// The operator is told well before something runs out that only people can renew.
func TestExpiryIsAnnounced(t *testing.T) {
	n := setUp(t, nil)
	for _, life := range []struct {
		root string // in seconds
		due  bool
	}{{"31536000", false}, {"315360000", true}} { // one of a year has a year left
		settings := regexp.MustCompile(`"root_s": \d+`).ReplaceAllString(n.file("publish.json"), `"root_s": `+life.root)
		if err := os.WriteFile(filepath.Join(n.dir, "publish.json"), []byte(settings), 0o644); err != nil {
			t.Fatal(err)
		}
		n.serve()
		for role, days := range map[string]float64{"root": 365, "targets": 90, "snapshot": 7, "timestamp": 1} {
			left := n.metric(`resultity_metadata_expires_seconds{role="`+role+`"}`) - float64(time.Now().Unix())
			if math.Abs(left/86400-days) > 0.01 {
				t.Errorf("%s: %v days are left by the metric, want %v", role, left/86400, days)
			}
		}
		n.stop()
		if said := strings.Contains(n.logs.w.String(), "metadata runs out"); said != life.due {
			t.Errorf("the log says that something runs out: %v, want %v", said, life.due)
		}
		code, out, stderr := command(t, "check", "--dir", n.dir)
		if (code == 2) != life.due || (code == 0) == life.due || strings.Contains(out, "resultity-network root new") != life.due || strings.Count(out, "version 1") < 2 {
			t.Errorf("check: %d %s %s", code, out, stderr)
		}
	}
	if err := os.Truncate(filepath.Join(n.dir, "repository/metadata/1.targets.json"), 100); err != nil {
		t.Fatal(err)
	}
	if code, _, stderr := command(t, "check", "--dir", n.dir); code != 1 {
		t.Errorf("check of a damaged repository: %d %s", code, stderr)
	}
}

func TestMessageKey(t *testing.T) {
	n := setUp(t, nil)
	key := filepath.Join(n.dir, "keys", "message.key")
	serve := func() string {
		_, _, stderr := command(t, "serve", "--dir", n.dir, "--listen", "127.0.0.1:0")
		return stderr
	}
	if err := os.Chmod(key, 0o640); err != nil {
		t.Fatal(err)
	}
	if got := serve(); !strings.Contains(got, "must be a file of mode 0600") {
		t.Errorf("readable by the group: %q", got)
	}
	secret := n.file("keys/message.key")
	if err := os.WriteFile(key, []byte(secret[:60]), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(key, 0o600); err != nil {
		t.Fatal(err)
	}
	if got := serve(); !strings.Contains(got, "64 hexadecimal digits") || strings.Contains(got, secret[:20]) {
		t.Errorf("cut short: %q", got)
	}
	if err := os.WriteFile(key, []byte(strings.Repeat("1", 64)), 0o600); err != nil {
		t.Fatal(err)
	}
	if got := serve(); !strings.Contains(got, "message_keys of the published configuration does not list") {
		t.Errorf("another key: %q", got)
	}
}

// One directory, one service.
func TestOneServiceOnly(t *testing.T) {
	n := start(t, nil)
	cfg := network.Defaults()
	cfg.Dir, cfg.Listen = n.dir, "127.0.0.1:0"
	if err := network.Run(t.Context(), cfg, slog.New(slog.DiscardHandler)); err == nil || !strings.Contains(err.Error(), "another process has the store open") {
		t.Fatalf("got %v", err)
	}
	if r := n.get("/healthz"); r.status != http.StatusOK {
		t.Errorf("the first one: %d %s", r.status, r.body)
	}
}

// A port that somebody else has is no wrong configuration: it may be free at the
// next start.
func TestPortInUse(t *testing.T) {
	n := setUp(t, nil)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	_, port, _ := net.SplitHostPort(l.Addr().String())
	code, _, stderr := command(t, "serve", "--dir", n.dir, "--listen", l.Addr().String())
	if code != 1 || !strings.Contains(stderr, "ss -ltnp 'sport = :"+port+"'") {
		t.Errorf("%d %s", code, stderr)
	}
	code, _, stderr = command(t, "serve", "--dir", n.dir, "--listen", "127.0.0.1:0", "--metrics-listen", l.Addr().String())
	if code != 1 || !strings.Contains(stderr, "or set metrics_listen") {
		t.Errorf("%d %s", code, stderr)
	}
	if code, _, stderr := command(t, "serve", "--dir", n.dir, "--listen", "localhost:nothing"); code != 78 {
		t.Errorf("%d %s", code, stderr)
	}
}

// certificate writes a self-signed pair and returns it.
func certificate(t testing.TB, certFile, keyFile string) *x509.Certificate {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	serial, err := rand.Int(rand.Reader, big.NewInt(1<<62))
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{SerialNumber: serial, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, IsCA: true, BasicConstraintsValid: true}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &k.PublicKey, k)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		t.Fatal(err)
	}
	for name, b := range map[string]*pem.Block{keyFile: {Type: "PRIVATE KEY", Bytes: keyDER}, certFile: {Type: "CERTIFICATE", Bytes: der}} {
		if err := os.WriteFile(name, pem.EncodeToMemory(b), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestTLS(t *testing.T) {
	n := setUp(t, nil)
	certFile, keyFile := filepath.Join(n.dir, "cert.pem"), filepath.Join(n.dir, "key.pem")
	cert := certificate(t, certFile, keyFile)
	n.tweak = func(c *network.Config) { c.TLSCert, c.TLSKey = certFile, keyFile }
	n.serve()
	address := strings.TrimPrefix(n.url, "http://")
	pool := x509.NewCertPool()
	pool.AddCert(cert)
	trust := &tls.Config{RootCAs: pool}

	old := trust.Clone()
	old.MaxVersion = tls.VersionTLS12
	if c, err := tls.Dial("tcp", address, old); err == nil {
		_ = c.Close()
		t.Error("TLS 1.2 is taken")
	}
	v := nodetest.New(t, "https://"+address, n.raw)
	v.TLS = trust
	v.Enrol(t, n.file("enrolment-token"))
	s := v.Ready(t)

	transport := &http.Transport{TLSClientConfig: trust, ForceAttemptHTTP2: true}
	defer transport.CloseIdleConnections()
	client := http.Client{Transport: transport}
	got := make(chan *http.Response, 1)
	go func() {
		req, _ := http.NewRequest(http.MethodPost, "https://"+address+"/v1/chat/completions", strings.NewReader(chat))
		req.Header.Set("Authorization", "Bearer "+n.apiKey)
		req.Header.Set("Content-Type", "application/json")
		res, err := client.Do(req)
		if err != nil {
			t.Error(err)
		}
		got <- res
	}()
	s.Finish(s.Take(), "fine")
	if res := <-got; res != nil {
		if res.ProtoMajor != 2 || res.StatusCode != http.StatusOK {
			t.Errorf("%s %s", res.Proto, res.Status)
		}
		_ = res.Body.Close()
	}

	// A renewed certificate is used without a restart.
	renewed := certificate(t, certFile, keyFile)
	n.until("the new certificate", func() bool {
		c, err := tls.Dial("tcp", address, &tls.Config{InsecureSkipVerify: true})
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		return c.ConnectionState().PeerCertificates[0].Equal(renewed)
	})
}

// The example file documents every key, with its default.
func TestExampleFile(t *testing.T) {
	var c network.Config
	if err := c.ReadFile("network.toml"); err != nil {
		t.Fatal(err)
	}
	if d := network.Defaults(); !reflect.DeepEqual(c, d) {
		t.Errorf("example %+v, defaults %+v", c, d)
	}
}

// The disk takes no writes for a while: clients and the operator are told, what
// was answered is kept, and when it takes them again all goes on by itself, in the
// same sessions.
func TestDiskTakesNoWrites(t *testing.T) {
	t.Parallel() // it waits more than it works
	n := setUp(t, nil)
	k := n.spawn()
	t.Cleanup(k.kill)
	disk := func(limit uint64) {
		t.Helper()
		if err := unix.Prlimit(k.cmd.Process.Pid, unix.RLIMIT_FSIZE, &unix.Rlimit{Cur: limit, Max: unix.RLIM_INFINITY}, nil); err != nil {
			t.Fatal(err)
		}
	}
	s := n.node().Ready(t)
	first := n.ask(chat)
	j := s.Take()
	n.until("the job is written down", func() bool { return n.metric(`resultity_store_seconds_count{op="job"}`) == 1 })
	disk(1)
	s.Send(s.Node.Result(t, j, nodetest.Body(j, "secret answer"), nil))
	if r := n.answer(first); r.status != http.StatusOK { // its record is enough
		t.Fatalf("%d %s", r.status, r.body)
	}
	if r := n.get("/v1/receipts/" + j.ID.String()); r.status != http.StatusOK {
		t.Errorf("receipt of an answer whose result is not stored: %d", r.status)
	}
	n.until("the service says that it is unwell", func() bool {
		r := n.get("/healthz")
		return r.status == http.StatusServiceUnavailable && bytes.Contains(r.body, []byte("cannot write"))
	})
	n.tellsStrangersLittle()
	if v := n.metric("resultity_store_accepting"); v != 0 {
		t.Errorf("the metric says %v", v)
	}
	if r := n.answer(n.ask(chat)); r.status != http.StatusServiceUnavailable || r.code() != "storage" || r.header.Get("Retry-After") == "" {
		t.Errorf("a request: %d %v %s", r.status, r.header, r.body)
	}
	disk(unix.RLIM_INFINITY)
	if a := nodetest.Expect[*wire.Ack](s); a.Jobs[0] != j.ID {
		t.Errorf("acknowledged %v", a.Jobs)
	}
	n.until("it is well", func() bool { return n.get("/healthz").status == http.StatusOK })
	if accepting, reopened := n.metric("resultity_store_accepting"), n.metric("resultity_store_reopened_total"); accepting != 1 || reopened < 1 {
		t.Errorf("metrics: accepting %v, reopened %v", accepting, reopened)
	}
	second := n.ask(chat)
	s.Finish(s.Take(), "secret answer")
	if r := n.answer(second); r.status != http.StatusOK {
		t.Errorf("a request: %d %s", r.status, r.body)
	}
	// What is said to be stored is.
	k.kill()
	n.serve()
	if r := n.get("/v1/receipts/" + j.ID.String()); r.status != http.StatusOK {
		t.Errorf("receipt: %d", r.status)
	}
}
