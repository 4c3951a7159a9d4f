package tuf

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/durable"
	"github.com/resultity/node/internal/failpoint"
	"github.com/resultity/node/internal/snapshot"
)

// state is all that a client remembers, in one file, so that one rename
// replaces it: after a crash there is the old one or the new one. The file is a
// line with the digest of what follows, and JSON.
//
// A state is a value: its slices are replaced, never written to.
type state struct {
	Roots [][]byte `json:"roots"` // the shipped one first, each verified by the one before

	// The newest verified metadata, to refuse what is older and to save
	// fetches. Any may be missing or, after a new root, count no more.
	Timestamp []byte `json:"timestamp,omitempty"`
	Snapshot  []byte `json:"snapshot,omitempty"`
	Targets   []byte `json:"targets,omitempty"`

	Last *set `json:"last,omitempty"`
}

// set is a whole chain that was verified at one time.
type set struct {
	At        time.Time `json:"at"`   // reference time of the verification
	Root      int       `json:"root"` // index in state.Roots
	Timestamp []byte    `json:"timestamp"`
	Snapshot  []byte    `json:"snapshot"`
	Targets   []byte    `json:"targets"`
	Config    []byte    `json:"config"`
}

const suffix = ".state"

// maxState is above what the bounds of its parts add up to, in base64.
const maxState = 32 << 20

// equal reports whether a and b are the same chain, whenever it was verified.
func (a *set) equal(b *set) bool {
	return a.Root == b.Root && bytes.Equal(a.Timestamp, b.Timestamp) && bytes.Equal(a.Snapshot, b.Snapshot) &&
		bytes.Equal(a.Targets, b.Targets) && bytes.Equal(a.Config, b.Config)
}

func (a *state) equal(b *state) bool {
	return slices.EqualFunc(a.Roots, b.Roots, bytes.Equal) && bytes.Equal(a.Timestamp, b.Timestamp) &&
		bytes.Equal(a.Snapshot, b.Snapshot) && bytes.Equal(a.Targets, b.Targets) && a.Last == b.Last
}

// load reads the state. It fails with fs.ErrNotExist where there is none, and
// with snapshot.ErrUntrusted where it is damaged; what it returns has the right
// form, and is still to be verified.
//
// Where there is none, the package may have brought a newer root of the same
// network. It is the same if the newer root is one that an earlier state has
// verified itself; that state then goes on from there.
func (c *Client) load() (*state, error) {
	st, err := readState(c.file)
	if err == nil && !bytes.Equal(st.Roots[0], c.root) {
		return nil, fmt.Errorf("%w: %s begins with another root", snapshot.ErrUntrusted, c.file)
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return st, err
	}
	entries, dirErr := os.ReadDir(c.dir)
	if dirErr != nil {
		return nil, dirErr
	}
	for _, e := range entries {
		if !strings.HasSuffix(e.Name(), suffix) {
			continue
		}
		other, err := readState(filepath.Join(c.dir, e.Name()))
		if err != nil {
			continue // it is not needed
		}
		i := slices.IndexFunc(other.Roots, func(r []byte) bool { return bytes.Equal(r, c.root) })
		if i < 0 {
			continue
		}
		other.rebase(i)
		if other.Last != nil {
			if _, err := other.Last.open(other.Roots); errors.Is(err, snapshot.ErrUntrusted) {
				other.Last = nil // from before, by keys that this root does not list
			}
		}
		return other, nil
	}
	return nil, err
}

func readState(name string) (*state, error) {
	raw, err := durable.ReadOwn(name, maxState)
	if err != nil && !errors.Is(err, durable.ErrLarge) { // what is cut off, the digest misses
		return nil, err
	}
	st, err := parseState(raw)
	if err != nil {
		return nil, fmt.Errorf("%w: %s is damaged: %w", snapshot.ErrUntrusted, name, err)
	}
	return st, nil
}

func parseState(raw []byte) (*state, error) {
	line, body, ok := bytes.Cut(raw, []byte("\n"))
	if !ok {
		return nil, errors.New("cut short")
	}
	// The digest finds what signatures would not: a changed byte outside of
	// what they cover, such as white space or the time.
	d, err := digest.Parse(string(line))
	if err != nil {
		return nil, err
	}
	if err := d.Check(body); err != nil {
		return nil, err
	}
	st := new(state)
	if err := json.Unmarshal(body, st); err != nil {
		return nil, err
	}
	if n := len(st.Roots); n == 0 || n > maxRoots+1 {
		return nil, fmt.Errorf("%d roots", n)
	}
	if st.Last != nil && (st.Last.Root < 0 || st.Last.Root >= len(st.Roots)) {
		return nil, fmt.Errorf("no root %d", st.Last.Root)
	}
	return st, nil
}

// rebase makes root i the first one.
func (st *state) rebase(i int) {
	st.Roots = st.Roots[i:]
	if st.Last != nil {
		st.Last.Root = max(st.Last.Root-i, 0)
	}
}

// marshal is the inverse of parseState.
func (st *state) marshal() ([]byte, error) {
	body, err := json.Marshal(st)
	if err != nil {
		return nil, err
	}
	return append([]byte(digest.Of(body).String()+"\n"), body...), nil
}

func (c *Client) save(st *state) error {
	raw, err := st.marshal()
	if err != nil {
		return err
	}
	failpoint.Here("tuf.save.begin")
	return durable.WriteFile(c.file, raw, 0o600)
}

// sweep removes what writes that were cut short have left beside the state.
func (c *Client) sweep() error {
	entries, err := os.ReadDir(c.dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), filepath.Base(c.file)+".tmp") {
			if err := os.Remove(filepath.Join(c.dir, e.Name())); err != nil {
				return err
			}
		}
	}
	return nil
}
