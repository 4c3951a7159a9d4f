package model

import (
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/model/modeltest"
	"github.com/resultity/node/internal/snapshot"
)

// TestVerityHash compares with what fsverity-utils 1.5 prints (fsverity digest).
func TestVerityHash(t *testing.T) {
	for size, want := range map[int]string{
		0:       "3d248ca542a24fc62d1c43b916eae5016878e2533c88238480b26128a1f1af95",
		1:       "bce75948b9e7510293f8f2720412af9697c1479281323f3f220623fb8e94b557",
		4096:    "a2a808ddaced77f0b6b3068f47b14b5a1fb3fc43674993ab11b8e7e6f2d089e2",
		4097:    "18b155c0b6e054f3f7d22488ed15340e74dc161ce2d123e13eb685c3ce565f70",
		524288:  "35ce0df2a57eb54aeba7969570bac9dfadfac295ec181a03f13ac7a7da54909e", // fills one block of hashes
		524289:  "cc4f297494cf9e0b6f159db6d30a62d3fcc219fc9c0cbc2d8792bd264da4d9cb",
		5000000: "5daeb9b394f8770589dd8121e1a309d2bfd36a5874d1537ce89d72b5a6a4e2dc",
	} {
		b := bytes.Repeat([]byte("a"), size)
		for _, piece := range []int{1 << 20, 4096, 4095, 8193} {
			v := newVerityHash()
			for rest := b; len(rest) > 0; {
				n := min(piece, len(rest))
				if k, err := v.Write(rest[:n]); k != n || err != nil {
					t.Fatal(k, err)
				}
				rest = rest[n:]
			}
			if got := v.sum(); got.Hex() != want {
				t.Errorf("%d bytes, %d at once: %s, want %s", size, piece, got.Hex(), want)
			}
		}
	}
}

// kernel is a file system with fs-verity.
type kernel struct {
	t      *testing.T
	sealed map[uint64]digest.Digest // by inode
	fails  error
	spoil  bool // the disk gives other bytes back
}

func inode(f *os.File) uint64 {
	st, _ := f.Stat()
	return st.Sys().(*syscall.Stat_t).Ino
}

func (k *kernel) enable(f *os.File) error {
	if name := filepath.Base(f.Name()); len(name) != 64 {
		k.t.Errorf("%s is sealed under that name", name)
	}
	if k.fails != nil {
		return k.fails
	}
	if _, here := k.sealed[inode(f)]; here {
		return unix.EEXIST
	}
	if k.spoil {
		flip(k.t, filepath.Join(f.Name()))
	}
	v := newVerityHash()
	if _, err := io.Copy(v, f); err != nil {
		return err
	}
	k.sealed[inode(f)] = v.sum()
	return nil
}

func (k *kernel) measure(f *os.File) (digest.Digest, error) {
	if d, here := k.sealed[inode(f)]; here {
		return d, nil
	}
	return digest.Digest{}, unix.ENODATA
}

func TestSeal(t *testing.T) {
	b := content(1<<20 + 5)
	srv := serve(t, (&modeltest.Good{B: b}).ServeHTTP)
	m := modelOf(fileOf("a", b, srv.URL))
	v := newVerityHash()
	_, _ = v.Write(b) // never fails
	want := v.sum().Hex()
	replace := func(t *testing.T, blob string, b []byte) {
		t.Helper()
		if err := errors.Join(os.WriteFile(blob+".new", b, 0o600), os.Rename(blob+".new", blob)); err != nil {
			t.Fatal(err)
		}
	}
	for name, test := range map[string]func(t *testing.T, s *Store, k *kernel, blob string){
		"whole": func(t *testing.T, s *Store, k *kernel, blob string) {
			flip(t, blob) // which the kernel would find, and nobody else looks
			if _, err := s.Ensure(t.Context(), m, nil); err != nil {
				t.Error(err)
			}
		},
		"other file, same bytes": func(t *testing.T, s *Store, k *kernel, blob string) {
			replace(t, blob, b)
			if _, err := s.Ensure(t.Context(), m, nil); err != nil || !s.Have(m) {
				t.Error(err)
			}
			if _, err := os.Lstat(blob + sealed); err == nil {
				t.Error("it is still said to be sealed")
			}
			if _, err := os.Lstat(blob + quarantined); err == nil {
				t.Error("it was taken for damaged")
			}
		},
		"other file, other bytes": func(t *testing.T, s *Store, k *kernel, blob string) {
			other := bytes.Clone(b)
			other[7]++
			replace(t, blob, other)
			if _, err := s.Ensure(t.Context(), m, nil); err != nil || !s.Have(m) {
				t.Error(err)
			}
			if got, err := os.ReadFile(blob); err != nil || !bytes.Equal(got, b) {
				t.Errorf("not mended: %v", err)
			}
			if raw, err := os.ReadFile(blob + sealed); err != nil || string(raw) != want {
				t.Errorf("not sealed again: %q, %v", raw, err)
			}
		},
		"a note that is none": func(t *testing.T, s *Store, k *kernel, blob string) {
			if err := os.WriteFile(blob+sealed, []byte(want[:10]), 0o600); err != nil {
				t.Fatal(err)
			}
			if _, err := s.Ensure(t.Context(), m, nil); err != nil || !s.Have(m) {
				t.Error(err)
			}
		},
		"removed": func(t *testing.T, s *Store, k *kernel, blob string) {
			if err := s.Retain([]*snapshot.Model{m}); err != nil || len(listing(t, s.dir)) != 3 {
				t.Errorf("%v: %q", err, listing(t, s.dir))
			}
			if err := s.Retain(nil); err != nil || len(listing(t, s.dir)) != 0 {
				t.Errorf("%v: %q", err, listing(t, s.dir))
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			s, k := open(t, t.TempDir(), srv), &kernel{t: t, sealed: map[uint64]digest.Digest{}}
			s.seals = k
			if _, err := s.Ensure(t.Context(), m, nil); err != nil {
				t.Fatal(err)
			}
			blob := filepath.Join(s.dir, blobs, digest.Of(b).Hex())
			if raw, err := os.ReadFile(blob + sealed); err != nil || string(raw) != want || len(k.sealed) != 1 {
				t.Fatalf("sealed as %q, %v", raw, err)
			}
			test(t, s, k, blob)
		})
	}
}

// TestNotSealed: a model is used all the same where it cannot be sealed, unless the disk
// is to blame.
func TestNotSealed(t *testing.T) {
	b := content(100_000)
	srv := serve(t, (&modeltest.Good{B: b}).ServeHTTP)
	m := modelOf(fileOf("a", b, srv.URL))
	for _, err := range []error{unix.ENOSPC, unix.EOPNOTSUPP, unix.ETXTBSY, unix.EPERM, unix.EIO} {
		s := open(t, t.TempDir(), srv)
		s.seals = &kernel{t: t, sealed: map[uint64]digest.Digest{}, fails: err}
		if _, failed := s.Ensure(t.Context(), m, nil); failed != nil {
			t.Errorf("%v: %v", err, failed)
		}
		if got := strings.Join(listing(t, s.dir), " "); strings.Contains(got, sealed) {
			t.Errorf("%v: %s", err, got)
		}
	}
	s, k := open(t, t.TempDir(), srv), &kernel{t: t, sealed: map[uint64]digest.Digest{}, spoil: true}
	s.seals = k
	if _, err := s.Ensure(t.Context(), m, nil); !errors.Is(err, digest.ErrMismatch) || s.Have(m) {
		t.Errorf("a disk that gives other bytes back: %v", err)
	}
	k.spoil = false
	if _, err := s.Ensure(t.Context(), m, nil); err != nil {
		t.Error(err)
	}
}

// TestKernelSeals asks the kernel itself, where this file system can do it.
func TestKernelSeals(t *testing.T) {
	b := content(3<<20 + 5)
	srv := serve(t, (&modeltest.Good{B: b}).ServeHTTP)
	m := modelOf(fileOf("a", b, srv.URL))
	s := open(t, t.TempDir(), srv)
	if _, err := s.Ensure(t.Context(), m, nil); err != nil {
		t.Fatal(err)
	}
	f, err := s.Open(digest.Of(b))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	got, err := s.seals.measure(f)
	if errors.Is(err, unix.ENOTTY) || errors.Is(err, unix.EOPNOTSUPP) {
		t.Logf("not run: this file system has no fs-verity (%v)", err)
		return
	}
	v := newVerityHash()
	_, _ = v.Write(b) // never fails
	if err != nil || got != v.sum() {
		t.Errorf("%s, %v, want %s", got, err, v.sum())
	}
	if err := os.Chmod(f.Name(), 0o600); err != nil {
		t.Fatal(err)
	}
	if w, err := os.OpenFile(f.Name(), os.O_WRONLY, 0); err == nil {
		w.Close()
		t.Error("a sealed file can be written to")
	}
}
