package tuf

import (
	"context"
	"errors"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/theupdateframework/go-tuf/v2/metadata"

	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/publish"
	"github.com/resultity/node/internal/snapshot"
)

// sees fails unless a refresh brings this version of the configuration, and the
// disk has it then.
func sees(t testing.TB, c *Client, version int) {
	t.Helper()
	s, err := c.Refresh(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if want := digest.Of(config(t, version)); s.Digest() != want {
		t.Fatalf("Refresh = %s, want %s", s.Digest(), want)
	}
	l := remembers(t, c, version)
	if l.Version() != s.Version() || !l.Expires().Equal(s.Expires()) {
		t.Fatalf("Last has version %d until %v, want %d until %v", l.Version(), l.Expires(), s.Version(), s.Expires())
	}
}

// remembers fails unless this version is the last good one.
func remembers(t testing.TB, c *Client, version int) *snapshot.Snapshot {
	t.Helper()
	s, err := c.Last()
	if err != nil {
		t.Fatal(err)
	}
	if want := digest.Of(config(t, version)); s.Digest() != want {
		t.Fatalf("Last = %s, want %s", s.Digest(), want)
	}
	return s
}

// refuses fails unless a refresh fails with all of want, and the last good
// configuration, if there is one, stays.
func refuses(t testing.TB, c *Client, want ...error) error {
	t.Helper()
	before, err := c.Last()
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	s, refusal := c.Refresh(t.Context())
	if s != nil || refusal == nil {
		t.Fatalf("Refresh = %v, %v; want %v", s, refusal, want)
	}
	for _, w := range want {
		if !errors.Is(refusal, w) {
			t.Fatalf("Refresh: %v; want %v", refusal, w)
		}
	}
	// What a caller does depends on exactly one of these.
	kinds, reasons := 0, 0
	for _, k := range []error{ErrUnreachable, snapshot.ErrUntrusted, snapshot.ErrInvalid} {
		if errors.Is(refusal, k) {
			kinds++
		}
	}
	for _, e := range events {
		if e.is != ErrUnreachable && e.is != snapshot.ErrInvalid && errors.Is(refusal, e.is) {
			reasons++
		}
	}
	if kinds != 1 || errors.Is(refusal, snapshot.ErrUntrusted) != (reasons == 1) {
		t.Fatalf("%v is of %d kinds, for %d reasons", refusal, kinds, reasons)
	}
	after, err := c.Last()
	if before == nil && !errors.Is(err, fs.ErrNotExist) || before != nil && (err != nil || after.Digest() != before.Digest()) {
		t.Fatalf("after a refused refresh, Last = %v, %v", after, err)
	}
	return refusal
}

func TestFollow(t *testing.T) {
	n := newNetwork(t)
	c := n.client(t)
	if _, err := c.Last(); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("Last before the first refresh: %v, want ErrNotExist", err)
	}
	if _, err := c.Trust(); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("Trust before the first refresh: %v, want ErrNotExist", err)
	}
	sees(t, c, 1)
	want := []string{"metadata/2.root.json", "metadata/timestamp.json", "metadata/1.snapshot.json", "metadata/1.targets.json",
		"targets/" + digest.Of(config(t, 1)).Hex() + ".config.json"}
	if !slices.Equal(n.fetched, want) {
		t.Errorf("fetched %q, want %q", n.fetched, want)
	}

	trust, err := c.Trust()
	if err != nil || len(trust.Roots) != 1 || trust.Roots[0].Version != 1 || trust.Timestamp.Version != 1 || trust.Snapshot.Version != 1 || trust.Targets.Version != 1 ||
		trust.Last.IsZero() || trust.Targets.Expires.Before(trust.Last) {
		t.Errorf("Trust = %+v, %v", trust, err)
	}

	// When nothing is new, only what can tell is fetched, and nothing written.
	n.fetched = nil
	before := modTime(t, c)
	sees(t, c, 1)
	if want := want[:2]; !slices.Equal(n.fetched, want) {
		t.Errorf("fetched %q, want %q", n.fetched, want)
	}
	if after := modTime(t, c); !after.Equal(before) {
		t.Error("the cache was written although nothing was new")
	}

	n.publish(t, 2)
	sees(t, c, 2)
	n.rotate(t)
	n.rotate(t, "timestamp", "snapshot", "targets")
	n.publish(t, 3)
	sees(t, c, 3)
	// A process that starts now knows the same, without the network.
	n.intercept = func(*http.Request, string) *http.Response { return &http.Response{StatusCode: 500, Body: http.NoBody} }
	again := n.clientAt(t, c.dir, n.root(t))
	remembers(t, again, 3)
	refuses(t, again, ErrUnreachable)
}

func modTime(t *testing.T, c *Client) time.Time {
	t.Helper()
	st, err := os.Stat(c.file)
	if err != nil {
		t.Fatal(err)
	}
	return st.ModTime()
}

func TestNewRefuses(t *testing.T) {
	n := newNetwork(t)
	open := t.TempDir()
	if err := os.Chmod(open, 0o770); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	inconsistent, err := metadata.Root().FromBytes(n.root(t))
	if err != nil {
		t.Fatal(err)
	}
	inconsistent.Signed.ConsistentSnapshot = false
	unsigned, err := metadata.Root().FromBytes(n.root(t))
	if err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(*Config){
		"http":               func(c *Config) { c.URL = "http://h/" },
		"no host":            func(c *Config) { c.URL = "https:///x" },
		"no URL":             func(c *Config) { c.URL = "" },
		"a user":             func(c *Config) { c.URL = "https://u:p@h/" },
		"a query":            func(c *Config) { c.URL = "https://h/?x=1" },
		"no root":            func(c *Config) { c.Root = nil },
		"garbage for a root": func(c *Config) { c.Root = []byte("hello") },
		"null for a root":    func(c *Config) { c.Root = []byte("null") },
		"null inside a root": func(c *Config) { c.Root = []byte(`{"signed":{"_type":"root","roles":{"root":null}},"signatures":[]}`) },
		"another role":       func(c *Config) { c.Root = n.file(t, "metadata/timestamp.json") },
		"too few signatures": func(c *Config) { c.Root = sign(t, n, unsigned, "root-1") },
		"no consistent snapshots": func(c *Config) {
			c.Root = sign(t, n, inconsistent, "root-1", "root-2")
		},
		"a directory open to others": func(c *Config) { c.Dir = open },
		"a file for a directory":     func(c *Config) { c.Dir = file },
	} {
		cfg := Config{Dir: t.TempDir(), URL: base, Root: n.root(t)}
		change(&cfg)
		if c, err := New(cfg); c != nil && err == nil {
			t.Errorf("%s: taken", name)
		}
	}
}

func TestDirectoryIsPrivate(t *testing.T) {
	n := newNetwork(t)
	dir := filepath.Join(t.TempDir(), "a", "b")
	c := n.clientAt(t, dir, n.root(t))
	sees(t, c, 1)
	for name, want := range map[string]fs.FileMode{dir: 0o700, c.file: 0o600} {
		st, err := os.Stat(name)
		if err != nil || st.Mode().Perm() != want {
			t.Errorf("%s: %v, %v; want %v", name, st.Mode(), err, want)
		}
	}
}

// A node that was off while the root changed twice, all keys with it.
func TestRotatedWhileOffline(t *testing.T) {
	n := newNetwork(t)
	c := n.informed(t)
	n.rotate(t, "timestamp", "snapshot", "targets")
	n.publish(t, 2)
	n.rotate(t, "timestamp", "snapshot", "targets")
	n.publish(t, 3)
	remembers(t, c, 1)
	sees(t, c, 3)
	// The roots in between are kept: the next refresh begins after them.
	n.fetched = nil
	sees(t, c, 3)
	if n.fetched[0] != "metadata/4.root.json" {
		t.Errorf("began with %s", n.fetched[0])
	}
}

// A root is kept as soon as it is verified, whatever comes after, so that keys
// that it revokes are never trusted again.
func TestRevokedKeysStayRevoked(t *testing.T) {
	n := newNetwork(t)
	c := n.informed(t)
	n.forge(t, forged{config: config(t, 2)}) // with the present keys
	stolen := n.overlay
	n.overlay = map[string][]byte{}
	n.rotate(t, "timestamp")
	n.intercept = func(_ *http.Request, name string) *http.Response {
		if name == "metadata/timestamp.json" {
			return &http.Response{StatusCode: http.StatusBadGateway, Body: http.NoBody}
		}
		return nil
	}
	refuses(t, c, ErrUnreachable)
	remembers(t, c, 1) // with the root of its time

	n.overlay = stolen
	n.intercept = func(_ *http.Request, name string) *http.Response {
		if strings.HasSuffix(name, "root.json") {
			return &http.Response{StatusCode: http.StatusNotFound, Body: http.NoBody}
		}
		return nil
	}
	err := refuses(t, c, ErrUnsigned)
	t.Logf("expected: %v; got: %v", ErrUnsigned, err)
	n.intercept, n.overlay = nil, map[string][]byte{}
	n.publish(t, 3)
	sees(t, c, 3)
}

// The timestamp was signed anew, and nothing else: the one before is older still.
func TestOlderTimestampOfTheSameSnapshot(t *testing.T) {
	n := newNetwork(t)
	old := n.file(t, "metadata/timestamp.json")
	if _, err := publish.Refresh(n.dir); err != nil {
		t.Fatal(err)
	}
	c := n.informed(t)
	n.overlay["metadata/timestamp.json"] = old
	t.Logf("expected: %v; got: %v", ErrRollback, refuses(t, c, snapshot.ErrUntrusted, ErrRollback))
}

// A newer timestamp names another snapshot of a version that is known: what it
// names counts, not what is at hand.
func TestSnapshotIsTheOneThatTheTimestampNames(t *testing.T) {
	n := newNetwork(t)
	c := n.informed(t)
	n.forge(t, forged{version: 1, config: config(t, 2), timestamp: func(s *metadata.TimestampType) { s.Version = 2 }})
	sees(t, c, 2)
}

func TestSameVersionTwiceKeepsTheFirst(t *testing.T) {
	n := newNetwork(t)
	c := n.informed(t)
	n.forge(t, forged{version: 1, config: config(t, 2)})
	sees(t, c, 1)
}

// A configuration that is properly signed and cannot be used.
func TestUnusableConfiguration(t *testing.T) {
	replace := func(old, new string) []byte {
		raw := string(config(t, 2))
		if !strings.Contains(raw, old) {
			t.Fatalf("no %s", old)
		}
		return []byte(strings.Replace(raw, old, new, 1))
	}
	for name, f := range map[string]forged{
		"unknown engine": {config: replace(`"llamacpp"`, `"tgi"`)},
		"absurd size":    {config: replace(`"size": 2139520`, `"size": 9007199254740993`)},
		"unknown field":  {config: replace(`"slots"`, `"sluts"`)},
		"later schema":   {config: replace(`"schema": 1`, `"schema": 2`)},
		"not JSON":       {config: []byte("hello")},
		"empty":          {config: []byte{}},
		"too large":      {config: append(config(t, 2), make([]byte, snapshot.MaxSize)...)},
		"negative length": {config: config(t, 2), targets: func(s *metadata.TargetsType) {
			s.Targets[snapshot.Target].Length = -1
		}},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNetwork(t)
			c := n.informed(t)
			seen := n.file(t, "metadata/timestamp.json")
			n.forge(t, f)
			refuses(t, c, snapshot.ErrInvalid)
			remembers(t, c, 1)
			remembers(t, n.clientAt(t, c.dir, n.root(t)), 1)
			refuses(t, c, snapshot.ErrInvalid) // and again, until it changes
			refuses(t, n.client(t), snapshot.ErrInvalid)

			// It counts against roll-back all the same.
			good := n.overlay["metadata/timestamp.json"]
			n.overlay["metadata/timestamp.json"] = seen
			refuses(t, c, snapshot.ErrUntrusted, ErrRollback)
			n.overlay["metadata/timestamp.json"] = good

			n.forge(t, forged{version: 101, config: config(t, 3)})
			sees(t, c, 3)
		})
	}
}

// The clock of the machine is wrong.
func TestClock(t *testing.T) {
	n := newNetwork(t)
	c := n.informed(t)
	start := time.Now()
	now := start
	c.now = func() time.Time { return now }

	for name, at := range map[string]time.Time{
		"timestamp": start.Add(25 * time.Hour),
		"all":       start.AddDate(30, 0, 0),
	} {
		now = at
		err := refuses(t, c, snapshot.ErrUntrusted, ErrExpired)
		if !strings.Contains(err.Error(), "clock") {
			t.Errorf("%s: the error does not speak of the clock: %v", name, err)
		}
	}
	// Set back by a year: what is valid now is valid still, and what expired
	// before the last good refresh is expired.
	now = start.AddDate(-1, 0, 0)
	n.publish(t, 2)
	sees(t, c, 2)
	n.forge(t, forged{timestamp: func(s *metadata.TimestampType) { s.Expires = start.Add(-time.Hour).UTC() }})
	refuses(t, c, snapshot.ErrUntrusted, ErrExpired)
}

func TestRefreshWaitsForTheOther(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNetwork(t)
		c := n.client(t)
		leave := make(chan struct{})
		n.intercept = func(*http.Request, string) *http.Response {
			<-leave
			return nil
		}
		done := make(chan error)
		refresh := func(ctx context.Context) {
			_, err := c.Refresh(ctx)
			done <- err
		}
		ctx, cancel := context.WithCancelCause(t.Context())
		go refresh(t.Context())
		synctest.Wait()
		go refresh(t.Context())
		go refresh(ctx)
		synctest.Wait()
		if len(n.fetched) != 1 {
			t.Errorf("fetched %q: two refreshes at once", n.fetched)
		}
		// One waits no longer than its context, and Last not at all.
		cause := errors.New("shutting down")
		cancel(cause)
		if err := <-done; !errors.Is(err, cause) || !errors.Is(err, ErrUnreachable) {
			t.Errorf("Refresh with a context that ended: %v, want %v", err, cause)
		}
		if _, err := c.Last(); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("Last: %v, want ErrNotExist", err)
		}
		close(leave)
		if err := errors.Join(<-done, <-done); err != nil {
			t.Error(err)
		}
		remembers(t, c, 1)
	})
}

// What is verified but cannot be kept is not handed out: it would be forgotten
// by the next start, and an older one taken instead.
func TestDiskFails(t *testing.T) {
	n := newNetwork(t)
	c := n.client(t)
	if err := os.RemoveAll(c.dir); err != nil {
		t.Fatal(err)
	}
	s, err := c.Refresh(t.Context())
	if s != nil || !errors.Is(err, fs.ErrNotExist) || errors.Is(err, snapshot.ErrUntrusted) || errors.Is(err, ErrUnreachable) {
		t.Errorf("Refresh = %v, %v; want the error of the disk", s, err)
	}
	// A cache that cannot be read is not taken for one that is not there.
	if err := os.MkdirAll(c.file, 0o700); err != nil {
		t.Fatal(err)
	}
	for name, run := range map[string]func() (*snapshot.Snapshot, error){
		"Last":    c.Last,
		"Refresh": func() (*snapshot.Snapshot, error) { return c.Refresh(t.Context()) },
	} {
		if s, err := run(); s != nil || err == nil || errors.Is(err, fs.ErrNotExist) || errors.Is(err, snapshot.ErrUntrusted) {
			t.Errorf("%s = %v, %v; want the error of the disk", name, s, err)
		}
	}
}
