package model

import (
	"crypto/sha256"
	"fmt"
	"io"
	"net/http"
	"testing"

	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/model/fetch"
	"github.com/resultity/node/internal/model/modeltest"
	"github.com/resultity/node/internal/snapshot"
)

// repeated is one block without end.
type repeated []byte

func (r repeated) ReadAt(b []byte, off int64) (n int, err error) {
	for n < len(b) {
		n += copy(b[n:], r[(off+int64(n))%int64(len(r)):])
	}
	return n, nil
}

// RoundTrip serves ranges of it in memory.
type inMemory struct {
	content io.ReaderAt
	size    int64
}

func (m inMemory) RoundTrip(req *http.Request) (*http.Response, error) {
	resp := &http.Response{StatusCode: http.StatusOK, Header: http.Header{}, Request: req}
	from, to := int64(0), m.size-1
	if r := req.Header.Get("Range"); r != "" {
		if _, err := fmt.Sscanf(r, "bytes=%d-%d", &from, &to); err != nil {
			return nil, err
		}
		resp.StatusCode = http.StatusPartialContent
		resp.Header.Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", from, to, m.size))
	}
	resp.ContentLength = to + 1 - from
	resp.Body = io.NopCloser(io.NewSectionReader(m.content, from, to+1-from))
	return resp, nil
}

// benchModel is a model of one file of so many bytes, and a store that can have it.
func benchModel(b *testing.B, length int64) (*Store, *snapshot.Model) {
	content := repeated(modeltest.Content(64 << 10))
	f, err := snapshot.NewFile("f", io.NewSectionReader(content, 0, length), "https://source.test/f")
	if err != nil {
		b.Fatal(err)
	}
	s := open(b, b.TempDir())
	s.fetcher = fetch.New(inMemory{content, length}, nil, s.log)
	return s, modelOf(f)
}

// BenchmarkEnsure fetches a file from memory.
func BenchmarkEnsure(b *testing.B) {
	for _, length := range []int64{64 << 20, 1 << 30} {
		b.Run(fmt.Sprintf("%dMiB", length>>20), func(b *testing.B) {
			s, m := benchModel(b, length)
			b.SetBytes(length)
			for b.Loop() {
				if _, err := s.Ensure(b.Context(), m, nil); err != nil {
					b.Fatal(err)
				}
				b.StopTimer()
				if err := s.Retain(nil); err != nil {
					b.Fatal(err)
				}
				b.StartTimer()
			}
		})
	}
}

// BenchmarkVerify reads a model again that is in the page cache.
func BenchmarkVerify(b *testing.B) {
	const length = 1 << 30
	s, m := benchModel(b, length)
	if _, err := s.Ensure(b.Context(), m, nil); err != nil {
		b.Fatal(err)
	}
	b.SetBytes(length)
	for b.Loop() {
		if err := s.Verify(b.Context(), m); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkPlain is the limit of the one before: the hash alone.
func BenchmarkPlain(b *testing.B) {
	const length = 1 << 30
	content := repeated(modeltest.Content(1 << 20))
	b.SetBytes(length)
	for b.Loop() {
		h := sha256.New()
		if _, err := io.Copy(h, io.NewSectionReader(content, 0, length)); err != nil {
			b.Fatal(err)
		}
		_ = digest.FromSum([sha256.Size]byte(h.Sum(nil)))
	}
}
