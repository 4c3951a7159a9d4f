package tuf

import (
	"bytes"
	"encoding/json"
	"errors"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"testing"

	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/snapshot"
)

func readFile(t testing.TB, name string) []byte {
	t.Helper()
	raw, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

func writeFile(t testing.TB, name string, raw []byte) {
	t.Helper()
	if err := os.WriteFile(name, raw, 0o600); err != nil {
		t.Fatal(err)
	}
}

// distrusts fails unless Last refuses what is on disk.
func distrusts(t testing.TB, c *Client, what string, args ...any) error {
	t.Helper()
	s, err := c.Last()
	if s != nil || !errors.Is(err, snapshot.ErrUntrusted) || errors.Is(err, fs.ErrNotExist) {
		t.Fatalf(what+": Last = %v, %v, want ErrUntrusted", append(args, s, err)...)
	}
	return err
}

func TestDamagedCacheIsRefused(t *testing.T) {
	n := newNetwork(t)
	n.rotate(t)
	c := n.informed(t)
	raw := readFile(t, c.file)
	refusals := 0
	for i := range raw {
		for name, bad := range map[string][]byte{"flipped": flip(raw, i), "and the rest missing": raw[:i]} {
			if i%1000 == 7 { // the rest without the disk, which takes its time
				writeFile(t, c.file, bad)
				distrusts(t, c, "byte %d %s", i, name)
				refusals++
			} else if st, err := parseState(bad); err == nil {
				t.Fatalf("byte %d %s: got %+v", i, name, st)
			} else {
				refusals++
			}
		}
	}
	t.Logf("a byte flipped, or the rest missing: expected: %d refusals; got: %d", 2*len(raw), refusals)
	writeFile(t, c.file, append(bytes.Clone(raw), ' '))
	distrusts(t, c, "a byte more")
	writeFile(t, c.file, append(bytes.Clone(raw), make([]byte, maxState)...))
	distrusts(t, c, "far too large")

	// The network repairs it.
	sees(t, c, 1)
	if !bytes.Equal(readFile(t, c.file)[:7], raw[:7]) {
		t.Error("the cache was not written anew")
	}
}

// tamper changes the state as somebody would who knows its form.
func tamper(t testing.TB, c *Client, change func(*state)) {
	t.Helper()
	st, err := readState(c.file)
	if err != nil {
		t.Fatal(err)
	}
	change(st)
	if err := c.save(st); err != nil {
		t.Fatal(err)
	}
}

// The digest at its head keeps nobody from writing another state; signatures do.
func TestForgedCacheIsRefused(t *testing.T) {
	n := newNetwork(t)
	n.rotate(t)
	c := n.informed(t)
	good := readFile(t, c.file)
	for name, part := range map[string]func(*state) *[]byte{
		"root":      func(s *state) *[]byte { return &s.Roots[1] },
		"timestamp": func(s *state) *[]byte { return &s.Last.Timestamp },
		"snapshot":  func(s *state) *[]byte { return &s.Last.Snapshot },
		"targets":   func(s *state) *[]byte { return &s.Last.Targets },
		"config":    func(s *state) *[]byte { return &s.Last.Config },
	} {
		st, err := parseState(good)
		if err != nil {
			t.Fatal(err)
		}
		p, refusals := part(st), 0
		for i, raw := 0, *p; i < len(raw); i += 13 {
			*p = flip(raw, i)
			if s, err := st.Last.open(st.Roots); s != nil || !errors.Is(err, snapshot.ErrUntrusted) {
				t.Fatalf("%s, byte %d flipped: got %v, %v, want ErrUntrusted", name, i, s, err)
			}
			refusals++
		}
		writeFile(t, c.file, good)
		tamper(t, c, func(s *state) { *part(s) = nil })
		t.Logf("no %s, or flipped: expected: %v; got: %d flips refused, and %v", name, snapshot.ErrUntrusted, refusals, distrusts(t, c, "no %s", name))
		sees(t, c, 1)
	}

	other := newNetwork(t)
	theirs, err := readState(other.informed(t).file)
	if err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(*state){
		"another network's set":        func(s *state) { s.Last = theirs.Last },
		"another network's root":       func(s *state) { s.Roots[0] = theirs.Roots[0] },
		"another network's roots":      func(s *state) { s.Roots = theirs.Roots; s.Last.Root = 0 },
		"no roots":                     func(s *state) { s.Roots = nil },
		"too many roots":               func(s *state) { s.Roots = append(s.Roots, make([][]byte, maxRoots)...) },
		"a root before the first":      func(s *state) { s.Last.Root = -1 },
		"a root after the last":        func(s *state) { s.Last.Root = 2 },
		"a time after it had expired":  func(s *state) { s.Last.At = s.Last.At.AddDate(1, 0, 0) },
		"a configuration not verified": func(s *state) { s.Last.Config = config(t, 2) },
	} {
		writeFile(t, c.file, good)
		tamper(t, c, change)
		t.Logf("%s: expected: %v; got: %v", name, snapshot.ErrUntrusted, distrusts(t, c, "%s", name))
		sees(t, c, 1)
	}
}

// What is kept for comparison only is dropped when it is worth nothing, and
// does not keep the client from following.
func TestForgedMemoryDoesNoHarm(t *testing.T) {
	n := newNetwork(t)
	c := n.informed(t)
	good := readFile(t, c.file)
	garbage := []byte(`{"signed":{"_type":"timestamp","meta":{"snapshot.json":null}},"signatures":[]}`)
	for name, change := range map[string]func(*state){
		"timestamp": func(s *state) { s.Timestamp = garbage },
		"snapshot":  func(s *state) { s.Snapshot = garbage },
		"targets":   func(s *state) { s.Targets = garbage },
		"roles":     func(s *state) { s.Timestamp, s.Snapshot, s.Targets = s.Targets, s.Timestamp, s.Snapshot },
		"nothing":   func(s *state) { *s = state{Roots: s.Roots} },
	} {
		t.Run(name, func(t *testing.T) {
			writeFile(t, c.file, good)
			tamper(t, c, change)
			sees(t, c, 1)
			t.Logf("expected: the same configuration; got: version %d of it", remembers(t, c, 1).Version())
		})
	}
}

// Two networks in one directory know nothing of each other.
func TestOtherNetworkBeginsAnew(t *testing.T) {
	a, b := newNetwork(t), newNetwork(t)
	b.publish(t, 2)
	inA := a.informed(t)
	inB := b.clientAt(t, inA.dir, b.root(t))
	if _, err := inB.Last(); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("Last after a move to another network: %v, want ErrNotExist", err)
	}
	sees(t, inB, 2)
	remembers(t, a.clientAt(t, inA.dir, a.root(t)), 1) // and back
	// Somebody copies the one over the other.
	writeFile(t, inB.file, readFile(t, inA.file))
	distrusts(t, inB, "another network's cache")
	sees(t, inB, 2)
}

// A package brings a newer root of the same network, and the network cannot be
// reached when it is first started.
func TestNewerShippedRoot(t *testing.T) {
	n := newNetwork(t)
	old := n.client(t)
	sees(t, old, 1)
	n.rotate(t, "timestamp", "snapshot", "targets")
	n.rotate(t, "timestamp")
	unseen := n.file(t, "metadata/3.root.json")
	if _, err := n.clientAt(t, old.dir, unseen).Last(); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a root that the cache has not verified: %v, want ErrNotExist", err)
	}
	sees(t, old, 1)

	for _, name := range []string{"metadata/2.root.json", "metadata/3.root.json"} {
		c := n.clientAt(t, old.dir, n.file(t, name))
		remembers(t, c, 1)
	}
	// What was seen before counts for the new one too.
	seen := n.file(t, "metadata/timestamp.json")
	n.publish(t, 2)
	sees(t, old, 2)
	c := n.clientAt(t, old.dir, n.file(t, "metadata/2.root.json"))
	n.overlay["metadata/timestamp.json"] = seen
	refuses(t, c, snapshot.ErrUntrusted, ErrRollback)
	clear(n.overlay)
	n.publish(t, 3)
	sees(t, c, 3)

	// Damaged neighbours are passed over.
	root4 := func() []byte { n.rotate(t); return n.file(t, "metadata/4.root.json") }()
	writeFile(t, old.file, []byte("hello"))
	d := n.clientAt(t, old.dir, root4)
	if _, err := d.Last(); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("Last: %v, want ErrNotExist", err)
	}
	sees(t, d, 3)
}

// The set is by a key that the newer shipped root does not list.
func TestNewerShippedRootRevokes(t *testing.T) {
	n := newNetwork(t)
	old := n.informed(t)
	if err := os.Remove(n.keyFiles("targets")[0]); err != nil { // nobody signs with both
		t.Fatal(err)
	}
	n.rotate(t, "targets")
	n.intercept = func(_ *http.Request, name string) *http.Response {
		if name == "metadata/timestamp.json" {
			return &http.Response{StatusCode: http.StatusBadGateway, Body: http.NoBody}
		}
		return nil
	}
	refuses(t, old, ErrUnreachable) // knows the second root now, and keeps its set
	remembers(t, old, 1)
	c := n.clientAt(t, old.dir, n.file(t, "metadata/2.root.json"))
	if s, err := c.Last(); !errors.Is(err, fs.ErrNotExist) || errors.Is(err, snapshot.ErrUntrusted) {
		t.Errorf("Last = %v, %v; want ErrNotExist: nothing here is an attack", s, err)
	}
	n.intercept = nil
	n.publish(t, 2)
	sees(t, c, 2)
}

func TestLeftoversAreRemoved(t *testing.T) {
	n := newNetwork(t)
	c := n.informed(t)
	raw := readFile(t, c.file)
	// As a write leaves them that was cut short.
	for i, size := range []int{0, len(raw) / 2, len(raw)} {
		writeFile(t, c.file+".tmp"+string(rune('1'+i)), raw[:size])
	}
	mine := filepath.Join(c.dir, "notes.txt")
	writeFile(t, mine, nil)
	remembers(t, c, 1)
	c = n.clientAt(t, c.dir, n.root(t))
	remembers(t, c, 1)
	left, err := os.ReadDir(c.dir)
	if err != nil || len(left) != 2 {
		t.Errorf("left: %v, %v; want the cache and the file that is not ours", left, err)
	}
}

// Nothing that stands in the file can crash the reader, and whatever is taken
// is in the form that the rest relies on.
func FuzzParseState(f *testing.F) {
	for _, body := range []string{`{"roots":["e30="]}`, `{"roots":["e30="],"last":{"root":0}}`, `{"roots":["e30="],"last":{"root":-1}}`, `{"roots":["e30="],"last":{"root":1}}`, `{"roots":[],"last":null}`, ``} {
		f.Add([]byte(body))
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		st, err := parseState(append([]byte(digest.Of(body).String()+"\n"), body...))
		if err != nil {
			return
		}
		if len(st.Roots) == 0 || st.Last != nil && (st.Last.Root < 0 || st.Last.Root >= len(st.Roots)) {
			t.Fatalf("took %+v", st)
		}
		if _, err := json.Marshal(st); err != nil {
			t.Fatal(err)
		}
	})
}
