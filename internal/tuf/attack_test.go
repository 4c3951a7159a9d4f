package tuf

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"maps"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/theupdateframework/go-tuf/v2/metadata"
	"github.com/theupdateframework/go-tuf/v2/metadata/trustedmetadata"

	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/snapshot"
)

var past = time.Now().Add(-time.Minute).UTC().Truncate(time.Second)

// Whoever holds the web server and, where it says so, some keys.
func TestAttacks(t *testing.T) {
	tests := []struct {
		name   string
		attack func(t *testing.T, n *network)
		want   error
	}{
		// Roll-back. The client has seen version 2 of everything.
		{"older timestamp", func(t *testing.T, n *network) {
			n.overlay["metadata/timestamp.json"] = n.overlay["old"]
		}, ErrRollback},
		{"older snapshot, with the timestamp key", func(t *testing.T, n *network) {
			n.forge(t, forged{timestamp: func(s *metadata.TimestampType) {
				s.Meta["snapshot.json"] = describe(1, n.file(t, "metadata/1.snapshot.json"))
			}})
		}, ErrRollback},
		{"older targets, with the snapshot and timestamp keys", func(t *testing.T, n *network) {
			n.forge(t, forged{snapshot: func(s *metadata.SnapshotType) {
				s.Meta["targets.json"] = describe(1, n.file(t, "metadata/1.targets.json"))
			}})
		}, ErrRollback},
		{"an older root for the next", func(t *testing.T, n *network) {
			n.overlay["metadata/2.root.json"] = n.root(t)
		}, ErrRollback},
		{"targets taken out of the snapshot", func(t *testing.T, n *network) {
			n.forge(t, forged{snapshot: func(s *metadata.SnapshotType) {
				s.Meta["other.json"] = s.Meta["targets.json"]
				delete(s.Meta, "targets.json")
			}})
		}, nil},

		// Freeze.
		{"expired timestamp", func(t *testing.T, n *network) {
			n.forge(t, forged{timestamp: func(s *metadata.TimestampType) { s.Expires = past }})
		}, ErrExpired},
		{"expired snapshot", func(t *testing.T, n *network) {
			n.forge(t, forged{snapshot: func(s *metadata.SnapshotType) { s.Expires = past }})
		}, ErrExpired},
		{"expired targets", func(t *testing.T, n *network) {
			n.forge(t, forged{targets: func(s *metadata.TargetsType) { s.Expires = past }})
		}, ErrExpired},
		{"expired root", func(t *testing.T, n *network) {
			n.nextRoot(t, func(s *metadata.RootType) { s.Expires = past }, "root-1", "root-2")
		}, ErrExpired},

		// Mix and match.
		{"old snapshot under a new timestamp", func(t *testing.T, n *network) {
			n.forge(t, forged{})
			n.overlay["metadata/100.snapshot.json"] = n.file(t, "metadata/2.snapshot.json")
		}, nil},
		{"other snapshot of the same length", func(t *testing.T, n *network) {
			n.forge(t, forged{})
			n.overlay["metadata/100.snapshot.json"] = flip(n.overlay["metadata/100.snapshot.json"], 40)
		}, ErrMixed},
		{"other targets of the same length", func(t *testing.T, n *network) {
			n.forge(t, forged{})
			n.overlay["metadata/100.targets.json"] = flip(n.overlay["metadata/100.targets.json"], 40)
		}, ErrMixed},
		{"snapshot says another version than it has", func(t *testing.T, n *network) {
			n.forge(t, forged{snapshot: func(s *metadata.SnapshotType) { s.Meta["targets.json"].Version = 50 }})
			n.overlay["metadata/50.targets.json"] = n.overlay["metadata/100.targets.json"]
		}, ErrMixed},
		{"other configuration of the same length", func(t *testing.T, n *network) {
			n.forge(t, forged{config: config(t, 3)})
			n.overlay["targets/"+digest.Of(config(t, 3)).Hex()+".config.json"] = config(t, 4)
		}, nil},
		{"shorter configuration", func(t *testing.T, n *network) {
			n.forge(t, forged{config: config(t, 3)})
			n.overlay["targets/"+digest.Of(config(t, 3)).Hex()+".config.json"] = config(t, 3)[:100]
		}, nil},

		// Signatures.
		{"timestamp by the snapshot key", func(t *testing.T, n *network) { n.forgeWith(t, "timestamp", "snapshot") }, nil},
		{"timestamp unsigned", func(t *testing.T, n *network) { n.forgeWith(t, "timestamp") }, nil},
		{"snapshot by the timestamp key", func(t *testing.T, n *network) { n.forgeWith(t, "snapshot", "timestamp") }, nil},
		{"snapshot unsigned", func(t *testing.T, n *network) { n.forgeWith(t, "snapshot") }, nil},
		{"targets by the snapshot key", func(t *testing.T, n *network) { n.forgeWith(t, "targets", "snapshot") }, nil},
		{"targets unsigned", func(t *testing.T, n *network) { n.forgeWith(t, "targets") }, nil},
		{"root below the threshold", func(t *testing.T, n *network) { n.nextRoot(t, nil, "root-1") }, nil},
		{"root by an online key too", func(t *testing.T, n *network) { n.nextRoot(t, nil, "root-1", "targets") }, nil},
		{"root that skips a version", func(t *testing.T, n *network) {
			n.nextRoot(t, func(s *metadata.RootType) { s.Version = 3 }, "root-1", "root-2")
		}, nil},
		{"root by the next keys alone", func(t *testing.T, n *network) {
			n.nextRoot(t, func(s *metadata.RootType) {
				s.Roles["root"] = s.Roles["targets"]
			}, "targets")
		}, nil},
		{"root by the present keys alone", func(t *testing.T, n *network) {
			n.nextRoot(t, func(s *metadata.RootType) {
				s.Roles["root"] = s.Roles["targets"]
			}, "root-1", "root-2")
		}, nil},
		{"root with a threshold of nothing", func(t *testing.T, n *network) {
			n.nextRoot(t, func(s *metadata.RootType) { s.Roles["root"].Threshold = 0 }, "root-1", "root-2")
		}, nil},
		{"root without consistent snapshots", func(t *testing.T, n *network) {
			n.nextRoot(t, func(s *metadata.RootType) { s.ConsistentSnapshot = false }, "root-1", "root-2")
		}, nil},

		// Sizes that are claimed.
		{"absurd length of the snapshot", func(t *testing.T, n *network) {
			n.forge(t, forged{timestamp: func(s *metadata.TimestampType) { s.Meta["snapshot.json"].Length = 1 << 40 }})
		}, nil},
		{"negative length of the snapshot", func(t *testing.T, n *network) {
			n.forge(t, forged{timestamp: func(s *metadata.TimestampType) { s.Meta["snapshot.json"].Length = -1 }})
		}, nil},
		{"absurd length of targets", func(t *testing.T, n *network) {
			n.forge(t, forged{snapshot: func(s *metadata.SnapshotType) { s.Meta["targets.json"].Length = 1 << 40 }})
		}, nil},
		{"length one too small", func(t *testing.T, n *network) {
			n.forge(t, forged{timestamp: func(s *metadata.TimestampType) { s.Meta["snapshot.json"].Length-- }})
		}, nil},

		// Forms that make a careless reader crash.
		{"no snapshot named", func(t *testing.T, n *network) {
			n.forge(t, forged{timestamp: func(s *metadata.TimestampType) { clear(s.Meta) }})
		}, nil},
		{"null for the snapshot", func(t *testing.T, n *network) {
			n.forge(t, forged{timestamp: func(s *metadata.TimestampType) { s.Meta["snapshot.json"] = nil }})
		}, nil},
		{"null for targets", func(t *testing.T, n *network) {
			n.forge(t, forged{snapshot: func(s *metadata.SnapshotType) { s.Meta["targets.json"] = nil }})
		}, nil},
		{"null for the target", func(t *testing.T, n *network) {
			n.forge(t, forged{targets: func(s *metadata.TargetsType) { s.Targets[snapshot.Target] = nil }})
		}, nil},
		{"null for a target, unsigned and without a hash", func(t *testing.T, n *network) {
			n.forge(t, forged{snapshot: func(s *metadata.SnapshotType) {
				s.Meta["targets.json"].Hashes, s.Meta["targets.json"].Length = nil, 0
			}})
			n.overlay["metadata/100.targets.json"] = []byte(`{"signed":{"_type":"targets","targets":{"x":null}},"signatures":[]}`)
		}, nil},
		{"no target named", func(t *testing.T, n *network) {
			n.forge(t, forged{targets: func(s *metadata.TargetsType) { clear(s.Targets) }})
		}, nil},
		{"target without a SHA-256", func(t *testing.T, n *network) {
			n.forge(t, forged{targets: func(s *metadata.TargetsType) {
				info, err := metadata.TargetFile().FromBytes(snapshot.Target, config(t, 3), "sha512")
				if err != nil {
					t.Fatal(err)
				}
				s.Targets[snapshot.Target] = info
			}})
		}, nil},
		{"target with a SHA-256 that is none", func(t *testing.T, n *network) {
			n.forge(t, forged{targets: func(s *metadata.TargetsType) {
				s.Targets[snapshot.Target].Hashes["sha256"] = []byte("../../x")
			}})
		}, nil},
		{"null for a key of the root", func(t *testing.T, n *network) {
			n.nextRoot(t, func(s *metadata.RootType) { s.Keys[s.Roles["root"].KeyIDs[0]] = nil }, "root-1", "root-2")
		}, nil},
		{"null for a role of the root", func(t *testing.T, n *network) {
			n.nextRoot(t, func(s *metadata.RootType) { s.Roles["root"] = nil }, "root-1", "root-2")
		}, nil},
		{"a page of a captive portal", func(t *testing.T, n *network) {
			n.overlay["metadata/2.root.json"] = []byte("<html>")
		}, nil},
		{"nothing", func(t *testing.T, n *network) { n.overlay["metadata/timestamp.json"] = []byte{} }, nil},
		{"null", func(t *testing.T, n *network) { n.overlay["metadata/timestamp.json"] = []byte("null") }, nil},
		{"nested", func(t *testing.T, n *network) {
			n.overlay["metadata/timestamp.json"] = bytes.Repeat([]byte("["), maxTimestamp)
		}, nil},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			n := newNetwork(t)
			n.overlay["old"] = n.file(t, "metadata/timestamp.json")
			n.publish(t, 2)
			c := n.informed(t)
			tt.attack(t, n)
			want := []error{snapshot.ErrUntrusted}
			if tt.want != nil {
				want = append(want, tt.want)
			}
			refuses(t, c, want...)
			refuses(t, c, want...) // also when it tries again
			remembers(t, c, 2)
			if !strings.Contains(tt.name, "older") { // a new node cannot know
				refuses(t, n.client(t), snapshot.ErrUntrusted)
			}
			// When the attack ends, so does its effect. (A forged set was taken
			// as far as its keys reach, which new keys undo: see
			// TestRecoveryFromFastForward.)
			n.overlay = map[string][]byte{}
			n.rotate(t, "timestamp", "snapshot", "targets")
			n.publish(t, 3)
			sees(t, n.client(t), 3)
			if !strings.Contains(tt.name, "root") {
				sees(t, c, 3)
			}
		})
	}
}

// forgeWith puts a newer set in front whose role is signed by keys only.
func (n *network) forgeWith(t *testing.T, role string, keys ...string) {
	t.Helper()
	n.forge(t, forged{config: config(t, 3)})
	if role == "targets" {
		m, err := metadata.Targets().FromBytes(n.overlay["metadata/100.targets.json"])
		if err != nil {
			t.Fatal(err)
		}
		raw := sign(t, n, m, keys...)
		n.forge(t, forged{config: config(t, 3), snapshot: func(s *metadata.SnapshotType) { s.Meta["targets.json"] = describe(100, raw) }})
		n.overlay["metadata/100.targets.json"] = raw
		return
	}
	if role == "snapshot" {
		m, err := metadata.Snapshot().FromBytes(n.overlay["metadata/100.snapshot.json"])
		if err != nil {
			t.Fatal(err)
		}
		raw := sign(t, n, m, keys...)
		n.forge(t, forged{config: config(t, 3), timestamp: func(s *metadata.TimestampType) { s.Meta["snapshot.json"] = describe(100, raw) }})
		n.overlay["metadata/100.snapshot.json"] = raw
		return
	}
	m, err := metadata.Timestamp().FromBytes(n.overlay["metadata/timestamp.json"])
	if err != nil {
		t.Fatal(err)
	}
	n.overlay["metadata/timestamp.json"] = sign(t, n, m, keys...)
}

func flip(raw []byte, i int) []byte {
	raw = slices.Clone(raw)
	raw[i] ^= 1
	return raw
}

// Every byte of every file that is served, without the disk: what that is worth
// is another test's.
func TestFlippedBytesOnTheWay(t *testing.T) {
	n := newNetwork(t)
	n.rotate(t)
	c := n.client(t)
	st := &state{Roots: [][]byte{c.root}}
	trusted, err := chain(st.Roots, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	for _, step := range []struct {
		name string
		run  func(context.Context, *trustedmetadata.TrustedMetadata, *state) error
	}{
		{"metadata/2.root.json", c.updateRoot},
		{"metadata/timestamp.json", c.updateTimestamp},
		{"metadata/1.snapshot.json", c.updateSnapshot},
		{"metadata/1.targets.json", c.updateTargets},
		{"targets/" + digest.Of(config(t, 1)).Hex() + ".config.json", func(ctx context.Context, tm *trustedmetadata.TrustedMetadata, st *state) error {
			raw, err := c.config(ctx, tm, st)
			if err != nil {
				return err
			}
			_, err = snapshot.Open(tm, raw)
			return err
		}},
	} {
		raw := n.file(t, step.name)
		for i := range raw {
			n.overlay[step.name] = flip(raw, i)
			tm, copied := *trusted, *st
			tm.Targets = maps.Clone(trusted.Targets)
			if err := step.run(t.Context(), &tm, &copied); !errors.Is(err, snapshot.ErrUntrusted) {
				t.Fatalf("%s, byte %d (%q): %v, want ErrUntrusted", step.name, i, raw[i], err)
			}
			if !copied.equal(st) {
				t.Fatalf("%s, byte %d (%q): refused, and remembered", step.name, i, raw[i])
			}
		}
		delete(n.overlay, step.name)
		if err := step.run(t.Context(), trusted, st); err != nil {
			t.Fatal(err)
		}
	}
}

// endless is a body that never ends, and counts what was taken from it.
type endless struct{ read int64 }

func (e *endless) Read(b []byte) (int, error) {
	for i := range b {
		b[i] = ' '
	}
	e.read += int64(len(b))
	return len(b), nil
}

func (e *endless) Close() error { return nil }

func TestEndlessData(t *testing.T) {
	n := newNetwork(t)
	n.rotate(t)
	names := map[string]int64{
		"metadata/2.root.json":                                      maxRoot,
		"metadata/timestamp.json":                                   maxTimestamp,
		"metadata/1.snapshot.json":                                  int64(len(n.file(t, "metadata/1.snapshot.json"))),
		"metadata/1.targets.json":                                   int64(len(n.file(t, "metadata/1.targets.json"))),
		"targets/" + digest.Of(config(t, 1)).Hex() + ".config.json": int64(len(config(t, 1))),
	}
	for name, most := range names {
		body := new(endless)
		n.intercept = func(_ *http.Request, asked string) *http.Response {
			if asked == name {
				return &http.Response{StatusCode: 200, ContentLength: -1, Body: body}
			}
			return nil
		}
		err := refuses(t, n.client(t), snapshot.ErrUntrusted)
		if !strings.Contains(err.Error(), name) {
			t.Errorf("%s: the error does not name it: %v", name, err)
		}
		if body.read > most+1 {
			t.Errorf("%s: read %d bytes, want at most %d", name, body.read, most+1)
		}
	}
}

// What claims to be endless is not even asked for.
func TestEndlessClaims(t *testing.T) {
	for name, f := range map[string]forged{
		"snapshot.json": {timestamp: func(s *metadata.TimestampType) { s.Meta["snapshot.json"].Length = maxSnapshot + 1 }},
		"targets.json":  {snapshot: func(s *metadata.SnapshotType) { s.Meta["targets.json"].Length = maxTargets + 1 }},
		"config.json":   {targets: func(s *metadata.TargetsType) { s.Targets[snapshot.Target].Length = snapshot.MaxSize + 1 }},
	} {
		n := newNetwork(t)
		n.forge(t, f)
		c := n.client(t)
		if _, err := c.Refresh(t.Context()); err == nil {
			t.Errorf("%s: taken", name)
		}
		if last := n.fetched[len(n.fetched)-1]; strings.HasSuffix(last, name) {
			t.Errorf("%s: fetched %s", name, last)
		}
	}
}

// An endless chain of roots needs the root keys; it ends all the same.
func TestEndlessRoots(t *testing.T) {
	n := newNetwork(t)
	c := n.informed(t)
	n.intercept = func(_ *http.Request, name string) *http.Response {
		var version int64
		if _, err := fmt.Sscanf(name, "metadata/%d.root.json", &version); err != nil {
			return nil
		}
		n.nextRoot(t, func(s *metadata.RootType) { s.Version = version }, "root-1", "root-2")
		return &http.Response{StatusCode: 200, Body: io.NopCloser(bytes.NewReader(n.overlay["metadata/2.root.json"]))}
	}
	err := refuses(t, c, snapshot.ErrUntrusted)
	if !strings.Contains(err.Error(), "install a newer package") {
		t.Errorf("no remedy in: %v", err)
	}
	remembers(t, c, 1)
	remembers(t, n.clientAt(t, c.dir, n.root(t)), 1) // the roots fit the cache
}

// drip sends a byte a second for ever.
type drip struct{ r *http.Request }

func (d drip) Read(b []byte) (int, error) {
	select {
	case <-time.After(time.Second):
		b[0] = ' '
		return 1, nil
	case <-d.r.Context().Done():
		return 0, d.r.Context().Err()
	}
}

func (d drip) Close() error { return nil }

func TestSlowDrip(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNetwork(t)
		c := n.informed(t)
		n.intercept = func(r *http.Request, name string) *http.Response {
			if name == "metadata/timestamp.json" {
				return &http.Response{StatusCode: 200, ContentLength: -1, Body: drip{r}}
			}
			return nil
		}
		start := time.Now()
		err := refuses(t, c, ErrUnreachable)
		if d := time.Since(start); d != fetchTimeout {
			t.Errorf("took %v, want %v", d, fetchTimeout)
		}
		if !strings.Contains(err.Error(), "not complete after 30s") {
			t.Errorf("the error does not say why: %v", err)
		}
	})
}

// A server that says nothing, and a caller that ends.
func TestCancel(t *testing.T) {
	n := newNetwork(t)
	asked := make(chan struct{})
	server := httptest.NewTLSServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		close(asked)
		<-r.Context().Done()
	}))
	defer server.Close()
	c, err := New(Config{Dir: t.TempDir(), URL: server.URL, Root: n.root(t), Client: server.Client()})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	cause := errors.New("shutting down")
	go func() {
		<-asked
		cancel(cause)
	}()
	if _, err := c.Refresh(ctx); !errors.Is(err, ErrUnreachable) || !errors.Is(err, cause) {
		t.Errorf("Refresh: %v, want %v", err, cause)
	}
}

func TestReach(t *testing.T) {
	status := func(code int) *http.Response { return &http.Response{StatusCode: code, Body: http.NoBody} }
	redirect := func(to string) *http.Response {
		r := status(http.StatusFound)
		r.Header = http.Header{"Location": {to}}
		return r
	}
	tests := []struct {
		name   string
		file   string
		answer func(name string) *http.Response
		want   error // nil: all is well
	}{
		{"no next root", "root.json", func(string) *http.Response { return status(404) }, nil},
		{"no next root at an object store", "root.json", func(string) *http.Response { return status(403) }, nil},
		{"root: out of order", "root.json", func(string) *http.Response { return status(500) }, ErrUnreachable},
		{"root: unauthorized", "root.json", func(string) *http.Response { return status(401) }, ErrUnreachable},
		{"root: no content", "root.json", func(string) *http.Response { return status(204) }, ErrUnreachable},
		{"no timestamp", "timestamp.json", func(string) *http.Response { return status(404) }, ErrUnreachable},
		{"no snapshot", "snapshot.json", func(string) *http.Response { return status(404) }, ErrUnreachable},
		{"no targets", "targets.json", func(string) *http.Response { return status(404) }, ErrUnreachable},
		{"no configuration", "config.json", func(string) *http.Response { return status(404) }, ErrUnreachable},
		{"cut short", "config.json", func(string) *http.Response {
			r := status(200)
			r.Body = io.NopCloser(io.MultiReader(strings.NewReader("{"), broken{}))
			return r
		}, ErrUnreachable},
		{"moved", "timestamp.json", func(name string) *http.Response {
			return redirect("https://elsewhere.example/tuf/" + name + "?moved")
		}, nil},
		{"redirect to http", "timestamp.json", func(name string) *http.Response {
			return redirect("http://network.example/tuf/" + name + "?moved")
		}, snapshot.ErrUntrusted},
		{"redirect to a file", "timestamp.json", func(string) *http.Response { return redirect("file:///etc/passwd") }, snapshot.ErrUntrusted},
		{"redirect with a password", "timestamp.json", func(name string) *http.Response {
			return redirect("https://a:b@network.example/tuf/" + name + "?moved")
		}, snapshot.ErrUntrusted},
		{"redirect in a circle", "timestamp.json", func(name string) *http.Response { return redirect("/tuf/" + name) }, snapshot.ErrUntrusted},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			n := newNetwork(t)
			n.intercept = func(r *http.Request, name string) *http.Response {
				if strings.HasSuffix(name, tt.file) && r.URL.RawQuery == "" {
					return tt.answer(name)
				}
				return nil
			}
			c := n.client(t)
			if tt.want == nil {
				sees(t, c, 1)
				return
			}
			refuses(t, c, tt.want)
			if len(n.fetched) > 5+maxRedirects {
				t.Errorf("fetched %q", n.fetched)
			}
			n.intercept = nil
			sees(t, c, 1)
		})
	}
}

type broken struct{}

func (broken) Read([]byte) (int, error) { return 0, io.ErrUnexpectedEOF }

// A server that cannot show who it is.
func TestTLSIsChecked(t *testing.T) {
	n := newNetwork(t)
	server := httptest.NewUnstartedServer(http.NotFoundHandler())
	server.Config.ErrorLog = log.New(io.Discard, "", 0)
	server.StartTLS()
	defer server.Close()
	c, err := New(Config{Dir: t.TempDir(), URL: server.URL, Root: n.root(t)})
	if err != nil {
		t.Fatal(err)
	}
	refuses(t, c, ErrUnreachable)
}
