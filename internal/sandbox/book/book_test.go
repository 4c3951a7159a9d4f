package book

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"testing"

	"github.com/resultity/node/internal/bridge/contract"
	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/durable"
	"github.com/resultity/node/internal/evm"
	"github.com/resultity/node/internal/sandbox/record"
)

func newKey(t *testing.T) *evm.Key {
	t.Helper()
	k, err := evm.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func made(t *testing.T, key *evm.Key, n int64) *record.Signed {
	t.Helper()
	r := &record.Record{
		Version: record.Version, Node: key.Address(), Network: "testnet", Time: n, Start: fmt.Sprintf("%032x", n), Config: digest.Of([]byte("c")), Image: digest.Of([]byte("i")),
		Views: record.Views{Inside: contract.Sandbox{Version: contract.Version, OK: true, Checks: []contract.Check{{Name: "x", OK: true}}}},
	}
	s, err := r.Sign(key)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func open(t *testing.T, dir string, key *evm.Key) *Book {
	t.Helper()
	b, err := Open(dir, "testnet", key.Address())
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func times(b *Book) (list []int64) {
	for _, s := range b.Records() {
		list = append(list, s.Record().Time)
	}
	return list
}

func none() (map[digest.Digest]bool, error) { return nil, nil }

func put(t *testing.T, b *Book, s *record.Signed) {
	t.Helper()
	if err := b.Put(s, none); err != nil {
		t.Fatal(err)
	}
}

// A record stays until the network has it, the newest in any case, over restarts.
func TestLife(t *testing.T) {
	dir, key := t.TempDir(), newKey(t)
	b := open(t, dir, key)
	if b.Newest() != nil {
		t.Error("a record from nowhere")
	}
	one, two, three := made(t, key, 1), made(t, key, 2), made(t, key, 3)
	want := func(list ...int64) {
		t.Helper()
		for _, b := range []*Book{b, open(t, dir, key)} {
			if got := times(b); fmt.Sprint(got) != fmt.Sprint(list) {
				t.Errorf("records %v, want %v", got, list)
			}
		}
	}
	has := func(s *record.Signed) {
		t.Helper()
		if err := b.Has(s.Digest()); err != nil {
			t.Fatal(err)
		}
	}
	put(t, b, one)
	put(t, b, one)
	want(1)
	has(one)
	want(1)
	put(t, b, two) // the network has the one before
	want(2)
	put(t, b, three)
	want(2, 3)
	has(one) // nothing any more
	has(two)
	want(3)
	has(three)
	want(3)
	if b = open(t, dir, key); b.Newest().Digest() != three.Digest() {
		t.Error("the newest is another one after a restart")
	}
	put(t, b, one) // nobody has said since then that the network has the third
	if got := times(b); fmt.Sprint(got) != "[3 1]" {
		t.Errorf("records %v", got)
	}
}

func TestFull(t *testing.T) {
	dir, key := t.TempDir(), newKey(t)
	b := open(t, dir, key)
	all := map[digest.Digest]bool{}
	var first *record.Signed
	for n := range int64(Most) {
		s := made(t, key, n+1)
		if n == 0 {
			first = s
		}
		all[s.Digest()] = true
		put(t, b, s)
	}
	// What results are signed under is not given up.
	next := made(t, key, Most+1)
	if err := b.Put(next, func() (map[digest.Digest]bool, error) { return all, nil }); err == nil {
		t.Error("room was made by losing a record that a result names")
	}
	failed := errors.New("no list")
	if err := b.Put(next, func() (map[digest.Digest]bool, error) { return nil, failed }); !errors.Is(err, failed) {
		t.Errorf("%v, want %v", err, failed)
	}
	if err := b.Put(next, func() (map[digest.Digest]bool, error) { return map[digest.Digest]bool{first.Digest(): true}, nil }); err != nil {
		t.Fatal(err)
	}
	if got := times(b); len(got) != Most || got[0] != 1 || got[1] != 3 || got[Most-1] != Most+1 {
		t.Errorf("records %v", got)
	}
}

// What is not this node's record for this network goes.
func TestOthers(t *testing.T) {
	dir, key := t.TempDir(), newKey(t)
	put(t, open(t, dir, key), made(t, key, 1))
	put(t, open(t, dir, newKey(t)), made(t, newKey(t), 2))
	if got := times(open(t, dir, key)); len(got) != 0 {
		t.Errorf("records %v: each other's should have gone", got)
	}
	put(t, open(t, dir, key), made(t, key, 1))
	if err := errors.Join(os.WriteFile(filepath.Join(dir, "x.json"), []byte("{}"), 0o600), os.Mkdir(filepath.Join(dir, "y.json"), 0o700), os.WriteFile(filepath.Join(dir, "z.unverified"), nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	if got := times(open(t, dir, key)); len(got) != 1 {
		t.Errorf("records %v", got)
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != 1 {
		t.Errorf("%v (%v), want one file", entries, err)
	}
}

// A record that cannot be read now is not removed: a receipt may name it.
func TestUnreadable(t *testing.T) {
	key, dir := newKey(t), t.TempDir()
	b := open(t, dir, key)
	put(t, b, made(t, key, 1))
	put(t, b, made(t, key, 2))
	defer func() { readFile = durable.ReadOwn }()
	bad := filepath.Join(dir, name(b.Newest().Digest()))
	for _, failed := range []error{syscall.EIO, syscall.EMFILE, syscall.EACCES} {
		readFile = func(path string, most int64) ([]byte, error) {
			if path == bad {
				return nil, &fs.PathError{Op: "read", Path: path, Err: failed}
			}
			return durable.ReadOwn(path, most)
		}
		b, err := Open(dir, "testnet", key.Address())
		if failed == syscall.EIO {
			if err != nil || !slices.Equal(times(b), []int64{1}) {
				t.Errorf("%v: %v", failed, err)
			}
		} else if !errors.Is(err, failed) {
			t.Errorf("%v: %v", failed, err)
		}
		readFile = durable.ReadOwn
		if got := times(open(t, dir, key)); !slices.Equal(got, []int64{1, 2}) {
			t.Errorf("after %v: %v", failed, got)
		}
	}
}
