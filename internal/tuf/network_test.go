package tuf

import (
	"bytes"
	"crypto"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/sigstore/sigstore/pkg/signature"
	"github.com/theupdateframework/go-tuf/v2/metadata"

	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/publish"
	"github.com/resultity/node/internal/snapshot"
)

// network is a real repository behind an attacker: whoever holds the path or
// the web server. What it has in overlay it sends instead of the real file, and
// intercept may answer first. With the repository's keys, which lie in dir, a
// test can also play the thief of a key.
type network struct {
	dir       string
	overlay   map[string][]byte
	intercept func(r *http.Request, name string) *http.Response // nil goes on
	fetched   []string

	old    []byte            // the timestamp before the last
	begun  time.Time         // when the attack began
	signed map[string][]byte // roots that the holders of root keys have signed for the attacker
}

const base = "https://network.example/tuf"

func (n *network) RoundTrip(r *http.Request) (*http.Response, error) {
	if err := r.Context().Err(); err != nil {
		return nil, err
	}
	name := strings.TrimPrefix(r.URL.Path, "/tuf/")
	n.fetched = append(n.fetched, name)
	if n.intercept != nil {
		if resp := n.intercept(r, name); resp != nil {
			resp.Request = r
			return resp, nil
		}
	}
	w := httptest.NewRecorder()
	if raw, ok := n.overlay[name]; ok {
		w.Write(raw)
	} else {
		n.handler().ServeHTTP(w, r)
	}
	return w.Result(), nil
}

// handler is the honest server.
func (n *network) handler() http.Handler { return http.StripPrefix("/tuf", publish.Handler(n.dir)) }

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

// newNetwork has published version 1 of the configuration.
func newNetwork(t testing.TB) *network {
	t.Helper()
	return networkIn(t, t.TempDir())
}

// networkOf is the network that is in a directory.
func networkOf(dir string) *network {
	return &network{dir: dir, overlay: map[string][]byte{}, signed: map[string][]byte{}}
}

func networkIn(t testing.TB, dir string) *network {
	t.Helper()
	n := networkOf(dir)
	if err := publish.Init(n.dir, publish.Options{}); err != nil {
		t.Fatal(err)
	}
	n.publish(t, 1)
	return n
}

func (n *network) publish(t testing.TB, version int) {
	t.Helper()
	if err := publish.Publish(n.dir, config(t, version)); err != nil {
		t.Fatal(err)
	}
}

// rotate has new keys made for some online roles.
func (n *network) rotate(t testing.TB, renew ...string) {
	t.Helper()
	n.follow(t, publish.Change{Renew: renew}, "root-1", "root-2")
}

// follow publishes a next root, which keys sign.
func (n *network) follow(t testing.TB, c publish.Change, keys ...string) {
	t.Helper()
	p, err := publish.Propose(n.dir, c)
	if err != nil {
		t.Fatal(err)
	}
	var sigs []*publish.Signature
	for _, name := range n.keyFiles(keys...) {
		k, err := publish.OpenKey(name, nil)
		if err != nil {
			t.Fatal(err)
		}
		s, err := p.Sign(k)
		if err != nil {
			t.Fatal(err)
		}
		sigs = append(sigs, s)
	}
	if err := publish.Adopt(n.dir, p, sigs); err != nil {
		t.Fatal(err)
	}
}

// file returns a real file, as it is now.
func (n *network) file(t testing.TB, name string) []byte {
	t.Helper()
	raw, err := os.ReadFile(filepath.Join(n.dir, "repository", name))
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

func (n *network) root(t testing.TB) []byte { return n.file(t, "metadata/1.root.json") }

func (n *network) keyFiles(names ...string) []string {
	for i := range names {
		names[i] = filepath.Join(n.dir, "keys", names[i]+".pem")
	}
	return names
}

// client has an empty cache in a new directory.
func (n *network) client(t testing.TB) *Client {
	t.Helper()
	return n.clientAt(t, t.TempDir(), n.root(t))
}

func (n *network) clientAt(t testing.TB, dir string, root []byte) *Client {
	t.Helper()
	c, err := New(Config{Dir: dir, URL: base, Root: root, Client: &http.Client{Transport: n}})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// informed returns a client that has seen what is published.
func (n *network) informed(t testing.TB) *Client {
	t.Helper()
	c := n.client(t)
	if _, err := c.Refresh(t.Context()); err != nil {
		t.Fatal(err)
	}
	return c
}

// sign replaces the signatures of m by those of the named keys.
func sign[T metadata.Roles](t testing.TB, n *network, m *metadata.Metadata[T], keys ...string) []byte {
	t.Helper()
	m.ClearSignatures()
	for _, name := range n.keyFiles(keys...) {
		raw, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		b, _ := pem.Decode(raw)
		priv, err := x509.ParsePKCS8PrivateKey(b.Bytes)
		if err != nil {
			t.Fatal(err)
		}
		signer, err := signature.LoadSigner(priv, crypto.Hash(0))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := m.Sign(signer); err != nil {
			t.Fatal(err)
		}
	}
	raw, err := m.ToBytes(false)
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

// describe names a file as a role above it does.
func describe(version int64, raw []byte) *metadata.MetaFiles {
	sum := digest.Of(raw).Sum()
	return &metadata.MetaFiles{Version: version, Length: int64(len(raw)), Hashes: metadata.Hashes{"sha256": sum[:]}}
}

// forged is a set that somebody with all online keys makes. Each function
// changes one part before it is signed.
type forged struct {
	timestamp func(*metadata.TimestampType)
	snapshot  func(*metadata.SnapshotType)
	targets   func(*metadata.TargetsType)
	config    []byte // instead of the published one
	version   int64  // of all three; 0 means 100
}

// forge puts the set in front of the repository.
func (n *network) forge(t testing.TB, f forged) {
	t.Helper()
	expires := time.Now().Add(24 * time.Hour).UTC()
	if f.version == 0 {
		f.version = 100
	}
	if f.config == nil {
		f.config = config(t, 1)
	}

	targets := metadata.Targets(expires)
	targets.Signed.Version = f.version
	info, err := metadata.TargetFile().FromBytes(snapshot.Target, f.config, "sha256")
	if err != nil {
		t.Fatal(err)
	}
	targets.Signed.Targets[snapshot.Target] = info
	if f.targets != nil {
		f.targets(&targets.Signed)
	}
	rawTargets := sign(t, n, targets, "targets")

	snap := metadata.Snapshot(expires)
	snap.Signed.Version = f.version
	snap.Signed.Meta["targets.json"] = describe(targets.Signed.Version, rawTargets)
	if f.snapshot != nil {
		f.snapshot(&snap.Signed)
	}
	rawSnapshot := sign(t, n, snap, "snapshot")

	timestamp := metadata.Timestamp(expires)
	timestamp.Signed.Version = f.version
	timestamp.Signed.Meta["snapshot.json"] = describe(snap.Signed.Version, rawSnapshot)
	if f.timestamp != nil {
		f.timestamp(&timestamp.Signed)
	}

	n.overlay[fmt.Sprintf("metadata/%d.targets.json", targets.Signed.Version)] = rawTargets
	n.overlay[fmt.Sprintf("metadata/%d.snapshot.json", snap.Signed.Version)] = rawSnapshot
	n.overlay["metadata/timestamp.json"] = sign(t, n, timestamp, "timestamp")
	n.overlay["targets/"+digest.Of(f.config).Hex()+"."+snapshot.Target] = f.config
}

// nextRoot puts a root that follows the newest, signed by keys, in front.
func (n *network) nextRoot(t testing.TB, change func(*metadata.RootType), keys ...string) {
	t.Helper()
	names, err := filepath.Glob(n.dir + "/repository/metadata/*.root.json")
	if err != nil {
		t.Fatal(err)
	}
	root, err := metadata.Root().FromBytes(n.file(t, fmt.Sprintf("metadata/%d.root.json", len(names))))
	if err != nil {
		t.Fatal(err)
	}
	root.Signed.Version++
	name := fmt.Sprintf("metadata/%d.root.json", root.Signed.Version)
	if change != nil {
		change(&root.Signed)
	}
	n.overlay[name] = sign(t, n, root, keys...)
}
