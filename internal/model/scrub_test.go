package model

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/resultity/node/internal/chunk"
	"github.com/resultity/node/internal/digest"
)

func TestScrub(t *testing.T) {
	dir := t.TempDir()
	if _, err := Scrub(t.Context(), dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no store: %v", err)
	}
	if err := os.Mkdir(filepath.Join(dir, blobs), 0o700); err != nil {
		t.Fatal(err)
	}
	write := func(name string, b []byte) string {
		file := filepath.Join(dir, blobs, name)
		if err := os.WriteFile(file, b, 0o600); err != nil {
			t.Fatal(err)
		}
		return file
	}
	a, b := content(chunk.Size+4097), content(3)
	file := write(digest.Of(a).Hex(), a)
	write(digest.Of(b).Hex(), b)
	write(digest.Of([]byte("1")).Hex()+unverified, b)
	write(digest.Of([]byte("2")).Hex()+quarantined, b)
	write(digest.Of([]byte("3")).Hex()+hashes, b)
	s, err := Scrub(t.Context(), dir)
	if err != nil || s.Files != 2 || s.Bytes != int64(len(a)+len(b)) || s.Damaged != nil {
		t.Fatalf("%+v, %v", s, err)
	}
	flip(t, file)
	if s, err = Scrub(t.Context(), dir); err != nil || !slices.Equal(s.Damaged, []digest.Digest{digest.Of(a)}) || s.Files != 2 {
		t.Errorf("a flipped byte: %+v, %v", s, err)
	}
	if err := os.Truncate(file, 5); err != nil {
		t.Fatal(err)
	}
	if s, err = Scrub(t.Context(), dir); err != nil || len(s.Damaged) != 1 {
		t.Errorf("cut short: %+v, %v", s, err)
	}
	// What a name of ours leads to elsewhere is not read.
	if err := errors.Join(os.Remove(file), os.Symlink("/dev/zero", file)); err != nil {
		t.Fatal(err)
	}
	if _, err = Scrub(t.Context(), dir); err == nil {
		t.Error("followed a link")
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err = Scrub(ctx, dir); !errors.Is(err, context.Canceled) && err == nil {
		t.Errorf("cancelled: %v", err)
	}
}

// strict is a file that is not read past the page cache any more at some place.
type strict struct {
	b        []byte
	until    int
	at       int
	buffered bool
}

func (s *strict) Read(p []byte) (int, error) {
	if !s.buffered && s.at >= s.until {
		return 0, &os.PathError{Op: "read", Err: unix.EINVAL}
	}
	n := copy(p[:min(len(p), 1000)], s.b[s.at:])
	if s.at += n; n == 0 {
		return 0, io.EOF
	}
	return n, nil
}

func TestScrubReadsWhatIsNotReadPastTheCache(t *testing.T) {
	b := content(2500)
	for _, until := range []int{0, 1000, 2500} {
		s := &strict{b: b, until: until}
		var got bytes.Buffer
		n, err := copyDirect(t.Context(), &got, s, make([]byte, 4096), func() error { s.buffered = true; return nil })
		if err != nil || n != 2500 || !bytes.Equal(got.Bytes(), b) {
			t.Errorf("refused from %d on: %d bytes, %v", until, n, err)
		}
		s = &strict{b: b, until: until}
		if _, err := copyDirect(t.Context(), io.Discard, s, make([]byte, 4096), func() error { return nil }); !errors.Is(err, unix.EINVAL) {
			t.Errorf("refused for ever: %v", err)
		}
	}
}
