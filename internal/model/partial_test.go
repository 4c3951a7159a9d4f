package model

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"testing"

	"github.com/resultity/node/internal/chunk"
	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/model/modeltest"
	"github.com/resultity/node/internal/snapshot"
)

// rangeOf is how chunk i of a file of this size is asked for.
func rangeOf(i, size int) string {
	return fmt.Sprintf("bytes=%d-%d", i*chunk.Size, min((i+1)*chunk.Size, size)-1)
}

// leave writes these chunks of the model's one file as an earlier process would have.
func leave(t *testing.T, s *Store, m *snapshot.Model, b []byte, chunks ...int) string {
	t.Helper()
	list, err := s.list(t.Context(), &m.Files[0])
	if err != nil {
		t.Fatal(err)
	}
	p, err := s.openPartial(t.Context(), &m.Files[0], list)
	if err != nil {
		t.Fatal(err)
	}
	defer p.close()
	for _, i := range chunks {
		off, n := list.Range(i)
		if err := p.put(i, b[off:off+int64(n)]); err != nil {
			t.Fatal(err)
		}
	}
	return filepath.Join(s.dir, p.name+unverified)
}

// TestResumeAtChunks goes on with what an earlier process has left, and asks for
// nothing else.
func TestResumeAtChunks(t *testing.T) {
	const size = 4*chunk.Size + 9
	b := content(size)
	for name, c := range map[string]struct {
		here   []int
		change func(f *os.File) error
		want   []int // chunks that are asked for
	}{
		"in order":        {[]int{0, 1}, nil, []int{2, 3, 4}},
		"with holes":      {[]int{1, 3}, nil, []int{0, 2, 4}},
		"the end":         {[]int{4}, nil, []int{0, 1, 2, 3}},
		"flipped byte":    {[]int{0, 1, 2}, func(f *os.File) error { _, err := f.WriteAt([]byte{^b[chunk.Size+5]}, chunk.Size+5); return err }, []int{1, 3, 4}},
		"torn chunk":      {[]int{0, 1}, func(f *os.File) error { return f.Truncate(chunk.Size + 4096) }, []int{1, 2, 3, 4}},
		"zeroed tail":     {[]int{0, 1}, func(f *os.File) error { _, err := f.WriteAt(make([]byte, 4096), 2*chunk.Size-4096); return err }, []int{1, 2, 3, 4}},
		"too long":        {[]int{0, 1, 2, 3, 4}, func(f *os.File) error { return f.Truncate(size + 1) }, []int{}},
		"complete":        {[]int{0, 1, 2, 3, 4}, nil, []int{}},
		"nothing of it":   {[]int{0}, func(f *os.File) error { _, err := f.WriteAt(make([]byte, size), 0); return err }, []int{0, 1, 2, 3, 4}},
		"final mode":      {[]int{0, 1}, func(f *os.File) error { return f.Chmod(0o444) }, []int{2, 3, 4}},
		"a part of chunk": {[]int{0}, func(f *os.File) error { _, err := f.WriteAt(b[chunk.Size:chunk.Size+100], chunk.Size); return err }, []int{1, 2, 3, 4}},
	} {
		t.Run(name, func(t *testing.T) {
			good := &modeltest.Good{B: b}
			srv := serve(t, good.ServeHTTP)
			m := modelOf(fileOf("f", b, srv.URL))
			s := open(t, t.TempDir(), srv)
			file := leave(t, s, m, b, c.here...)
			if c.change != nil {
				f, err := os.OpenFile(file, os.O_RDWR, 0)
				if err != nil {
					t.Fatal(err)
				}
				if err := errors.Join(c.change(f), f.Close()); err != nil {
					t.Fatal(err)
				}
			}
			dir, err := s.Ensure(t.Context(), m, nil)
			if err != nil {
				t.Fatal(err)
			}
			var want []string
			for _, i := range c.want {
				want = append(want, rangeOf(i, size))
			}
			got := good.Asked()
			slices.Sort(got)
			slices.Sort(want)
			if !slices.Equal(got, want) {
				t.Errorf("asked for %v, want %v", got, want)
			}
			if got, err := os.ReadFile(filepath.Join(dir, "f")); err != nil || !bytes.Equal(got, b) {
				t.Errorf("%d bytes, %v", len(got), err)
			}
		})
	}
}

// TestRepairFetchesWhatIsBroken: two flipped bytes cost two chunks, and the file
// that an engine may have in memory is left as it is.
func TestRepairFetchesWhatIsBroken(t *testing.T) {
	const size = 6 * chunk.Size
	b := content(size)
	good := &modeltest.Good{B: b}
	srv := serve(t, good.ServeHTTP)
	m := modelOf(fileOf("f", b, srv.URL))
	s := open(t, t.TempDir(), srv)
	dir, err := s.Ensure(t.Context(), m, nil)
	if err != nil {
		t.Fatal(err)
	}
	blob := filepath.Join(s.dir, blobs, m.Files[0].SHA256.Hex())
	if err := os.Chmod(blob, 0o600); err != nil {
		t.Fatal(err)
	}
	mapped, err := os.OpenFile(filepath.Join(dir, "f"), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer mapped.Close()
	for _, at := range []int64{chunk.Size + 1, 5*chunk.Size + 77} {
		if _, err := mapped.WriteAt([]byte{^b[at]}, at); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Verify(t.Context(), m); !errors.Is(err, digest.ErrMismatch) {
		t.Fatalf("error %v", err)
	}
	if err := s.Retain([]*snapshot.Model{m}); err != nil { // it is needed
		t.Fatal(err)
	}
	before := len(good.Asked())
	if _, err := s.Ensure(t.Context(), m, nil); err != nil {
		t.Fatal(err)
	}
	asked := good.Asked()[before:]
	slices.Sort(asked)
	if want := []string{rangeOf(5, size), rangeOf(1, size)}; !slices.Equal(asked, want) { // as text
		t.Errorf("asked for %v, want %v", asked, want)
	}
	if err := s.Verify(t.Context(), m); err != nil {
		t.Error(err)
	}
	old := make([]byte, size)
	if _, err := io.ReadFull(io.NewSectionReader(mapped, 0, size), old); err != nil || old[chunk.Size+1] != ^b[chunk.Size+1] {
		t.Errorf("the old file was written to: %v", err)
	}
	if err := s.Retain([]*snapshot.Model{m}); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(blob + quarantined); err == nil {
		t.Error("the damaged file is still there")
	}
}

// TestHashesAreKept: what is needed for a repair does not depend on the place that
// the hashes came from.
func TestHashesAreKept(t *testing.T) {
	b := content(3 * chunk.Size)
	good := &modeltest.Good{B: b}
	srv := serve(t, good.ServeHTTP)
	m := modelOf(fileOf("f", b, srv.URL))
	raw := m.Files[0].Chunks.Hashes
	lists := serve(t, (&modeltest.Good{B: raw}).ServeHTTP)
	m.Files[0].Chunks = snapshot.Chunks{Root: m.Files[0].Chunks.Root, Sources: []string{lists.URL}}
	s := open(t, t.TempDir(), srv, lists)
	if _, err := s.Ensure(t.Context(), m, nil); err != nil {
		t.Fatal(err)
	}
	lists.Close()
	blob := filepath.Join(s.dir, blobs, m.Files[0].SHA256.Hex())
	flip(t, blob)
	if err := s.Verify(t.Context(), m); !errors.Is(err, digest.ErrMismatch) {
		t.Fatalf("error %v", err)
	}
	if _, err := s.Ensure(t.Context(), m, nil); err != nil {
		t.Fatal(err)
	}
	// A list that is damaged is not believed.
	if err := os.WriteFile(blob+hashes, make([]byte, len(raw)), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := s.list(t.Context(), &m.Files[0]); err == nil {
		t.Error("took a damaged list")
	}
}

// TestChunksAndSumDisagree: a configuration whose root and SHA-256 are of two files.
func TestChunksAndSumDisagree(t *testing.T) {
	b, other := content(2*chunk.Size), content(2*chunk.Size + 1)[:2*chunk.Size]
	srv := serve(t, (&modeltest.Good{B: b}).ServeHTTP)
	m := modelOf(fileOf("f", b, srv.URL))
	m.Files[0].SHA256 = digest.Of(other)
	s := open(t, t.TempDir(), srv)
	_, err := s.Ensure(t.Context(), m, nil)
	t.Logf("expected: %v; got: %v", digest.ErrMismatch, err)
	if !errors.Is(err, digest.ErrMismatch) {
		t.Errorf("error %v", err)
	}
	if got := listing(t, s.dir); len(got) != 0 {
		t.Errorf("left: %v", got)
	}
}

// TestMarginIsLeft: the last bytes of a file system are not a model's.
func TestMarginIsLeft(t *testing.T) {
	b := content(2 * chunk.Size)
	m := modelOf(fileOf("f", b, "https://source.test"))
	s := open(t, t.TempDir())
	list, err := s.list(t.Context(), &m.Files[0])
	if err != nil {
		t.Fatal(err)
	}
	p, err := s.openPartial(t.Context(), &m.Files[0], list)
	if err != nil {
		t.Fatal(err)
	}
	defer p.close()
	s.margin = 1 << 60
	err = p.put(0, b[:chunk.Size])
	if e, ok := errors.AsType[*NoSpaceError](err); !ok || !errors.Is(err, syscall.ENOSPC) || e.Need != chunk.Size {
		t.Errorf("error %v", err)
	}
}

// TestUnhashedFileIsNotNamed: all chunks are here, and whoever stops the hashing of
// the whole leaves it without a name.
func TestUnhashedFileIsNotNamed(t *testing.T) {
	b := content(chunk.Size + 9)
	s := open(t, t.TempDir())
	m := modelOf(fileOf("f", b, "https://nobody.test/f"))
	name := leave(t, s, m, b, 0, 1)
	list, err := s.list(t.Context(), &m.Files[0])
	if err != nil {
		t.Fatal(err)
	}
	p, err := s.openPartial(t.Context(), &m.Files[0], list)
	if err != nil {
		t.Fatal(err)
	}
	defer p.close()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := p.sum(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("hashing was stopped: %v", err)
	}
	if _, err := os.Stat(name); err != nil {
		t.Errorf("what has arrived is gone: %v", err)
	}
}
