package publish

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/binary"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/snapshot"
	"github.com/resultity/node/internal/tuf"
)

// config returns a good configuration; each version is another.
func config(t testing.TB, version int) []byte {
	t.Helper()
	raw, err := os.ReadFile("../snapshot/testdata/config.json")
	if err != nil {
		t.Fatal(err)
	}
	old := []byte(`"deadline_s": 120`)
	if !bytes.Contains(raw, old) {
		t.Fatalf("no %s in the configuration", old)
	}
	return bytes.Replace(raw, old, fmt.Appendf(nil, `"deadline_s": %d`, 120+version), 1)
}

// direct lets a client speak with a handler directly.
type direct struct{ http.Handler }

func (d direct) RoundTrip(r *http.Request) (*http.Response, error) {
	w := httptest.NewRecorder()
	d.ServeHTTP(w, r)
	return w.Result(), nil
}

// node returns a node with an empty cache that was shipped with the first root.
func node(t testing.TB, dir string) *tuf.Client {
	t.Helper()
	root, err := os.ReadFile(filepath.Join(dir, "repository/metadata/1.root.json"))
	if err != nil {
		t.Fatal(err)
	}
	c, err := tuf.New(tuf.Config{
		Dir:    t.TempDir(),
		URL:    "https://network.example/",
		Root:   root,
		Client: &http.Client{Transport: direct{Handler(dir)}},
	})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// sees fails unless the node's refresh brings config.
func sees(t testing.TB, c *tuf.Client, config []byte) *snapshot.Snapshot {
	t.Helper()
	s, err := c.Refresh(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if s.Digest() != digest.Of(config) {
		t.Fatalf("node sees %s, want %s", s.Digest(), digest.Of(config))
	}
	return s
}

func initialised(t testing.TB, o Options) string {
	t.Helper()
	dir := t.TempDir()
	if err := Init(dir, o); err != nil {
		t.Fatal(err)
	}
	return dir
}

func published(t testing.TB, o Options) string {
	t.Helper()
	dir := initialised(t, o)
	if err := Publish(dir, config(t, 1)); err != nil {
		t.Fatal(err)
	}
	return dir
}

func rootKeys(dir string, numbers ...int) (names []string) {
	for _, n := range numbers {
		names = append(names, filepath.Join(dir, "keys", fmt.Sprintf("root-%d.pem", n)))
	}
	return names
}

// tree returns all files below dir with their content.
func tree(t testing.TB, dir string) map[string]string {
	t.Helper()
	files := map[string]string{}
	err := filepath.WalkDir(dir, func(name string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		raw, err := os.ReadFile(name)
		files[strings.TrimPrefix(name, dir+"/")] = string(raw)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return files
}

func unchanged(t testing.TB, dir string, before map[string]string) {
	t.Helper()
	after := tree(t, dir)
	for name := range after {
		if after[name] != before[name] {
			t.Errorf("%s was written", name)
		}
	}
	if len(after) != len(before) {
		t.Errorf("%d files, before %d", len(after), len(before))
	}
}

func TestPublishReachesNodes(t *testing.T) {
	dir := initialised(t, Options{})
	c := node(t, dir)
	if _, err := Refresh(dir); !errors.Is(err, ErrNothing) {
		t.Errorf("Refresh before anything was published: %v, want ErrNothing", err)
	}
	if _, err := c.Refresh(t.Context()); !errors.Is(err, tuf.ErrUnreachable) {
		t.Errorf("node before anything was published: %v, want ErrUnreachable", err)
	}
	var version int64
	for i := 1; i <= 3; i++ {
		if err := Publish(dir, config(t, i)); err != nil {
			t.Fatal(err)
		}
		if _, err := Refresh(dir); err != nil {
			t.Fatal(err)
		}
		s := sees(t, c, config(t, i))
		if s.Version() <= version {
			t.Errorf("version %d after %d", s.Version(), version)
		}
		version = s.Version()
		sees(t, node(t, dir), config(t, i)) // one that starts now
	}
}

func TestCurrent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := initialised(t, Options{})
		if s, err := Current(dir); s != nil || !errors.Is(err, ErrNothing) {
			t.Errorf("before anything was published: %v, %v, want ErrNothing", s, err)
		}
		for i := 1; i <= 2; i++ {
			if err := Publish(dir, config(t, i)); err != nil {
				t.Fatal(err)
			}
			s, err := Current(dir)
			if err != nil || s.Digest() != digest.Of(config(t, i)) {
				t.Fatalf("Current = %v, %v; want configuration %d", s, err, i)
			}
		}
		time.Sleep(DefaultLifetimes.Timestamp + time.Second)
		if s, err := Current(dir); s != nil || err == nil {
			t.Errorf("after the timestamp has expired: %v, %v", s, err)
		}
		if _, err := Refresh(dir); err != nil {
			t.Fatal(err)
		}
		if _, err := Current(dir); err != nil {
			t.Error(err)
		}
		// A configuration that was changed on disk is not what was signed.
		if err := os.WriteFile(filepath.Join(dir, "repository/targets", digest.Of(config(t, 2)).Hex()+".config.json"), config(t, 3), 0o644); err != nil {
			t.Fatal(err)
		}
		if s, err := Current(dir); s != nil || !errors.Is(err, snapshot.ErrUntrusted) {
			t.Errorf("after a change on disk: %v, %v, want ErrUntrusted", s, err)
		}
		if _, err := Refresh(dir); !errors.Is(err, snapshot.ErrUntrusted) {
			t.Errorf("Refresh after a change on disk: %v, want ErrUntrusted", err)
		}
	})
}

// A publisher that hangs holds up who publishes, for a time, and nobody who reads.
func TestPublisherHangs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := published(t, Options{})
		hanging, err := lock(dir)
		if err != nil {
			t.Fatal(err)
		}
		begun := time.Now()
		if _, err := Current(dir); err != nil {
			t.Errorf("Current: %v", err)
		}
		if _, err := Check(dir); err != nil {
			t.Errorf("Check: %v", err)
		}
		if waited := time.Since(begun); waited != 0 {
			t.Errorf("readers have waited for %v", waited)
		}
		if _, err := Refresh(dir); !errors.Is(err, syscall.EWOULDBLOCK) || !strings.Contains(err.Error(), "another process") {
			t.Errorf("Refresh: %v", err)
		}
		if waited := time.Since(begun); waited != lockTime {
			t.Errorf("Refresh has waited for %v, want %v", waited, lockTime)
		}
		go func() {
			time.Sleep(time.Second)
			hanging.unlock()
		}()
		if err := Publish(dir, config(t, 2)); err != nil {
			t.Errorf("once the other one has ended: %v", err)
		}
	})
}

func TestInit(t *testing.T) {
	dir := published(t, Options{})
	for name := range tree(t, filepath.Join(dir, "keys")) {
		st, err := os.Stat(filepath.Join(dir, "keys", name))
		if err != nil {
			t.Fatal(err)
		}
		if st.Mode().Perm() != 0o600 {
			t.Errorf("%s has mode %v", name, st.Mode())
		}
	}
	before := tree(t, dir)
	if err := Init(dir, Options{}); !errors.Is(err, fs.ErrExist) {
		t.Errorf("second Init: %v, want ErrExist", err)
	}
	unchanged(t, dir, before)

	// Cut short before the root was written: the keys that exist are used.
	if err := os.RemoveAll(filepath.Join(dir, "repository")); err != nil {
		t.Fatal(err)
	}
	if err := Init(dir, Options{}); err != nil {
		t.Fatal(err)
	}
	for name, content := range tree(t, filepath.Join(dir, "keys")) {
		if before["keys/"+name] != content {
			t.Errorf("%s was made again", name)
		}
	}
}

func TestInitWithRootKeysElsewhere(t *testing.T) {
	usb := t.TempDir()
	keys := []string{filepath.Join(usb, "alice.pem"), filepath.Join(usb, "bob.pem")}
	dir := published(t, Options{RootKeys: keys, Threshold: 2})
	if err := os.RemoveAll(usb); err != nil {
		t.Fatal(err)
	}
	if err := Publish(dir, config(t, 2)); err != nil {
		t.Fatalf("Publish needs the root keys: %v", err)
	}
	sees(t, node(t, dir), config(t, 2))
}

func TestInitRefuses(t *testing.T) {
	dir := t.TempDir()
	a, b := filepath.Join(dir, "a.pem"), filepath.Join(dir, "b.pem")
	for name, o := range map[string]Options{
		"threshold above the keys": {RootKeys: []string{a, b}, Threshold: 3},
		"negative threshold":       {RootKeys: []string{a, b}, Threshold: -1},
		"a key twice":              {RootKeys: []string{a, b, a}, Threshold: 2},
		"no root keys":             {RootKeys: []string{}},
		"no lifetime":              {Lifetimes: Lifetimes{Timestamp: -time.Hour}},
		"a lifetime under 1 s":     {Lifetimes: Lifetimes{Snapshot: time.Millisecond}},
		"a lifetime of 20 years":   {Lifetimes: Lifetimes{Root: 20 * 365 * 24 * time.Hour}},
	} {
		dir := t.TempDir()
		if err := Init(dir, o); err == nil {
			t.Errorf("%s: taken", name)
		}
		if _, err := os.Stat(filepath.Join(dir, "repository/metadata/1.root.json")); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s: a root was published: %v", name, err)
		}
	}
}

func TestPublishRefusesWhatNodesRefuse(t *testing.T) {
	dir := published(t, Options{})
	before := tree(t, dir)
	for name, raw := range map[string][]byte{
		"not JSON":       []byte("hello"),
		"unknown engine": bytes.Replace(config(t, 1), []byte("llamacpp"), []byte("tgi"), 1),
		"too large":      append(config(t, 1), bytes.Repeat([]byte(" "), snapshot.MaxSize)...),
	} {
		if err := Publish(dir, raw); !errors.Is(err, snapshot.ErrInvalid) {
			t.Errorf("%s: %v, want ErrInvalid", name, err)
		}
	}
	unchanged(t, dir, before)
	if err := Publish(t.TempDir(), config(t, 1)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no repository: %v, want ErrNotExist", err)
	}
}

func TestExpiredRootStopsPublication(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := published(t, Options{Lifetimes: Lifetimes{Root: time.Hour}})
		before := tree(t, dir)
		time.Sleep(2 * time.Hour)
		if err := Publish(dir, config(t, 2)); err == nil || !strings.Contains(err.Error(), "expired") {
			t.Errorf("Publish: %v", err)
		}
		if _, err := Refresh(dir); err == nil {
			t.Error("Refresh went on")
		}
		unchanged(t, dir, before)
		// A rotation is what helps.
		if err := rotate(dir, Rotation{SignWith: rootKeys(dir, 1, 2)}); err != nil {
			t.Fatal(err)
		}
		if err := Publish(dir, config(t, 2)); err != nil {
			t.Fatal(err)
		}
		sees(t, node(t, dir), config(t, 2))
	})
}

func TestKeysAreRefused(t *testing.T) {
	ec, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(ec)
	if err != nil {
		t.Fatal(err)
	}
	other := initialised(t, Options{})
	foreign, err := os.ReadFile(filepath.Join(other, "keys/timestamp.pem"))
	if err != nil {
		t.Fatal(err)
	}
	for name, damage := range map[string]func(file string) error{
		"readable by the group": func(f string) error { return os.Chmod(f, 0o640) },
		"readable by all":       func(f string) error { return os.Chmod(f, 0o604) },
		"writable by all":       func(f string) error { return os.Chmod(f, 0o602) },
		"missing":               os.Remove,
		"another network's":     func(f string) error { return os.WriteFile(f, foreign, 0o600) },
		"empty":                 func(f string) error { return os.WriteFile(f, nil, 0o600) },
		"garbage":               func(f string) error { return os.WriteFile(f, []byte("hello"), 0o600) },
		"two keys": func(f string) error {
			own, err := os.ReadFile(f)
			return errors.Join(err, os.WriteFile(f, append(own, own...), 0o600))
		},
		"damaged": func(f string) error {
			return os.WriteFile(f, pem.EncodeToMemory(&pem.Block{Type: pemType, Bytes: []byte{1}}), 0o600)
		},
		"of another kind": func(f string) error {
			return os.WriteFile(f, pem.EncodeToMemory(&pem.Block{Type: pemType, Bytes: der}), 0o600)
		},
	} {
		for _, role := range online {
			dir := published(t, Options{})
			file := filepath.Join(dir, "keys", role+".pem")
			if err := damage(file); err != nil {
				t.Fatal(err)
			}
			before := tree(t, dir)
			err := Publish(dir, config(t, 2))
			t.Logf("the key of %s %s: expected: refused, and nothing changed; got: %v", role, name, err)
			if err == nil || !strings.Contains(err.Error(), role+".pem") {
				t.Errorf("%s: %s: %v, want an error that names the file", name, role, err)
			}
			if raw, err2 := os.ReadFile(file); err2 == nil && len(raw) > 60 && strings.Contains(err.Error(), string(raw[40:60])) {
				t.Errorf("%s: %s: the error quotes the key: %v", name, role, err)
			}
			unchanged(t, dir, before)
		}
	}
}

func TestSettingsAreChecked(t *testing.T) {
	for _, bad := range []string{"", "{", `{"root_s":0,"targets_s":1,"snapshot_s":1,"timestamp_s":1}`} {
		dir := published(t, Options{})
		if err := os.WriteFile(filepath.Join(dir, "publish.json"), []byte(bad), 0o644); err != nil {
			t.Fatal(err)
		}
		if err := Publish(dir, config(t, 2)); err == nil || !strings.Contains(err.Error(), "publish.json") {
			t.Errorf("%q: %v, want an error that names the file", bad, err)
		}
	}
}

// A network that publishes nothing new, for the lifetime of its root.
func TestRefreshKeepsTheRepositoryValid(t *testing.T) {
	for _, tt := range []struct {
		name    string
		offline bool
		days    int
	}{
		{"all keys at hand", false, 24},
		{"targets key offline", true, 6},
	} {
		synctest.Test(t, func(t *testing.T) {
			const day = 24 * time.Hour
			dir := published(t, Options{Lifetimes: Lifetimes{Root: 24 * day, Targets: 6 * day, Snapshot: 2 * day}})
			if tt.offline {
				if err := os.Remove(filepath.Join(dir, "keys/targets.pem")); err != nil {
					t.Fatal(err)
				}
			}
			c := node(t, dir)
			start := time.Now()
			var e Expiries
			for time.Since(start) < time.Duration(tt.days)*day {
				var err error
				if e, err = Refresh(dir); err != nil {
					t.Fatalf("%s: after %v: %v", tt.name, time.Since(start), err)
				}
				for role, at := range map[string]time.Time{"root": e.Root, "targets": e.Targets, "snapshot": e.Snapshot, "timestamp": e.Timestamp} {
					if !at.After(time.Now()) {
						t.Fatalf("%s: %s expired at %v", tt.name, role, at)
					}
				}
				first := slices.MinFunc([]time.Time{e.Root, e.Targets, e.Snapshot, e.Timestamp}, time.Time.Compare)
				if s := sees(t, c, config(t, 1)); !s.Expires().Equal(first) {
					t.Fatalf("%s: node says %v, want %v", tt.name, s.Expires(), first)
				}
				time.Sleep(12 * time.Hour)
			}
			// Now the operator is needed, as was announced.
			want := e.Root
			if tt.offline {
				want = e.Targets
			}
			if d := time.Until(want); d > time.Hour {
				t.Errorf("%s: %v left, want none", tt.name, d)
			}
			time.Sleep(time.Hour)
			if _, err := Refresh(dir); err == nil {
				t.Errorf("%s: signed for an expired repository", tt.name)
			}
		})
	}
}

// moved records which files get their final name below dirs, in order.
func moved(t *testing.T, dirs ...string) (stop func() []string) {
	t.Helper()
	fd, err := syscall.InotifyInit1(syscall.IN_CLOEXEC | syscall.IN_NONBLOCK)
	if err != nil {
		t.Fatal(err)
	}
	for _, dir := range dirs {
		if _, err := syscall.InotifyAddWatch(fd, dir, syscall.IN_MOVED_TO); err != nil {
			t.Fatal(err)
		}
	}
	return func() (names []string) {
		defer syscall.Close(fd)
		buf := make([]byte, 64<<10)
		n, err := syscall.Read(fd, buf)
		if err != nil {
			t.Fatal(err)
		}
		for b := buf[:n]; len(b) > 0; {
			size := binary.NativeEndian.Uint32(b[12:16])
			names = append(names, string(bytes.TrimRight(b[16:16+size], "\x00")))
			b = b[16+size:]
		}
		return names
	}
}

// At each step of a publication, a node that knows the state before and a new
// one must both see the old configuration or the new one, and a publisher that
// comes after a crash there must be able to go on.
func TestCrashWhilePublishing(t *testing.T) {
	tests := []struct {
		name   string
		change func(dir string) error
		want   []string // files that get their names, in this order
	}{
		{"publish", func(dir string) error { return Publish(dir, config(t, 2)) },
			[]string{digest.Of(config(t, 2)).Hex() + ".config.json", "2.targets.json", "2.snapshot.json", "timestamp.json"}},
		{"rotate", func(dir string) error {
			return rotate(dir, Rotation{SignWith: rootKeys(dir, 1, 2), RootKeys: rootKeys(dir, 1, 2, 4), Renew: online})
		}, []string{"root-4.pem", "targets.pem.next", "snapshot.pem.next", "timestamp.pem.next", "2.targets.json", "2.snapshot.json", "timestamp.json", "2.root.json",
			"targets.pem", "snapshot.pem", "timestamp.pem"}},
	}
	for _, tt := range tests {
		dir := published(t, Options{})
		before := tree(t, dir)
		stop := moved(t, filepath.Join(dir, "repository/targets"), filepath.Join(dir, "repository/metadata"), filepath.Join(dir, "keys"))
		if err := tt.change(dir); err != nil {
			t.Fatal(err)
		}
		order := stop()
		if !slices.Equal(order, tt.want) {
			t.Errorf("%s: wrote %q, want %q", tt.name, order, tt.want)
		}
		after := tree(t, dir)

		for n := range len(order) + 1 {
			// The directory as it was when the first n names were there.
			now := maps.Clone(before)
			for _, name := range order[:n] {
				for path := range after {
					if filepath.Base(path) == name {
						now[path] = after[path]
					}
				}
				if strings.HasSuffix(name, ".pem.next") {
					now["keys/"+name] = after["keys/"+strings.TrimSuffix(name, ".next")]
				}
				delete(now, "keys/"+name+".next")
			}
			crashed := t.TempDir()
			write := func(files map[string]string) {
				t.Helper()
				for path, content := range files {
					if err := os.MkdirAll(filepath.Dir(filepath.Join(crashed, path)), 0o700); err != nil {
						t.Fatal(err)
					}
					if err := os.WriteFile(filepath.Join(crashed, path), []byte(content), 0o600); err != nil {
						t.Fatal(err)
					}
				}
			}
			write(before)
			c := node(t, crashed)
			sees(t, c, config(t, 1))
			if err := os.RemoveAll(filepath.Join(crashed, "keys")); err != nil {
				t.Fatal(err)
			}
			write(now)
			for _, c := range []*tuf.Client{c, node(t, crashed)} {
				s, err := c.Refresh(t.Context())
				if err != nil {
					t.Fatalf("%s: after %d of %q: %v", tt.name, n, order, err)
				}
				if s.Digest() != digest.Of(config(t, 1)) && s.Digest() != digest.Of(config(t, 2)) {
					t.Fatalf("%s: after %d of %q: sees %s", tt.name, n, order, s.Digest())
				}
			}
			// The next one goes on, and uses no name for two contents.
			if err := Publish(crashed, config(t, 3)); err != nil {
				t.Fatalf("%s: after %d of %q: %v", tt.name, n, order, err)
			}
			for path, content := range tree(t, crashed) {
				if old, ok := now[path]; ok && old != content && versioned.MatchString(filepath.Base(path)) {
					t.Errorf("%s: after %d of %q: %s was written again", tt.name, n, order, path)
				}
			}
			sees(t, c, config(t, 3))
			sees(t, node(t, crashed), config(t, 3))
		}
	}
}

// Nodes refresh all the while, from a running server, and are never refused.
func TestNodesReadWhileOthersPublish(t *testing.T) {
	dir := published(t, Options{})
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var nodes, publishers sync.WaitGroup
	for range 2 {
		c := node(t, dir)
		nodes.Go(func() {
			var version int64
			for ctx.Err() == nil {
				s, err := c.Refresh(context.Background())
				if err != nil {
					t.Errorf("node: %v", err)
					return
				}
				if s.Version() < version {
					t.Errorf("node: version %d after %d", s.Version(), version)
				}
				version = s.Version()
			}
		})
	}
	for _, run := range []func(n int) error{
		func(n int) error { return Publish(dir, config(t, n)) },
		func(int) error { _, err := Refresh(dir); return err },
		func(n int) error {
			return rotate(dir, Rotation{SignWith: rootKeys(dir, 1, 3), Renew: online[n%3:]})
		},
	} {
		publishers.Go(func() {
			for n := range 10 {
				if err := run(n); err != nil {
					t.Error(err)
				}
			}
		})
	}
	publishers.Wait()
	cancel()
	nodes.Wait()
}
