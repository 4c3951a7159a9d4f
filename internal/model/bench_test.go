package model

import (
	"crypto/sha256"
	"fmt"
	"io"
	"net/http"
	"testing"
	"time"

	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/snapshot"
)

func size(b []byte) int64 { return int64(len(b)) }

// repeated is a body of n bytes that costs nothing to make, and knows when its
// last byte was taken.
type repeated struct {
	n    int64
	b    []byte
	last *time.Time
}

func (r *repeated) Read(p []byte) (int, error) {
	if r.n == 0 {
		return 0, io.EOF
	}
	from := r.b[(size(r.b)-r.n%size(r.b))%size(r.b):] // all before it was taken
	n := copy(p, from[:min(size(from), r.n)])
	if r.n -= int64(n); r.n == 0 {
		*r.last = time.Now()
	}
	return n, nil
}

// BenchmarkEnsure fetches a file from memory. The time from its last byte to
// the verified model must not grow with the size.
func BenchmarkEnsure(b *testing.B) {
	buf := content(64 << 10)
	for _, length := range []int64{64 << 20, 1 << 30} {
		b.Run(fmt.Sprintf("%dMiB", length>>20), func(b *testing.B) {
			var last time.Time
			var d digest.Digest
			body := func() io.Reader { return &repeated{length, buf, &last} }
			d = sumOf(b, body())
			rt := roundTrip(func(*http.Request) (*http.Response, error) {
				return &http.Response{StatusCode: http.StatusOK, ContentLength: length, Header: http.Header{}, Body: io.NopCloser(body())}, nil
			})
			m := modelOf(snapshot.File{Path: "f", Size: length, SHA256: d, Sources: []string{"https://source.test/f"}})
			s := open(b, b.TempDir(), &http.Client{Transport: rt})
			var after time.Duration
			b.SetBytes(length)
			for b.Loop() {
				if _, err := s.Ensure(b.Context(), m, nil); err != nil {
					b.Fatal(err)
				}
				after += time.Since(last)
				b.StopTimer()
				if err := s.Retain(nil); err != nil {
					b.Fatal(err)
				}
				b.StartTimer()
			}
			b.ReportMetric(float64(after.Microseconds())/1000/float64(b.N), "ms-after-last-byte")
		})
	}
}

// BenchmarkVerify reads a model again that is in the page cache.
func BenchmarkVerify(b *testing.B) {
	const length = 1 << 30
	buf := content(64 << 10)
	var last time.Time
	rt := roundTrip(func(*http.Request) (*http.Response, error) {
		return &http.Response{StatusCode: http.StatusOK, ContentLength: length, Header: http.Header{}, Body: io.NopCloser(&repeated{length, buf, &last})}, nil
	})
	m := modelOf(snapshot.File{Path: "f", Size: length, SHA256: sumOf(b, &repeated{length, buf, &last}), Sources: []string{"https://source.test/f"}})
	s := open(b, b.TempDir(), &http.Client{Transport: rt})
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

func sumOf(b *testing.B, r io.Reader) digest.Digest {
	b.Helper()
	h := sha256.New()
	if _, err := io.Copy(h, r); err != nil {
		b.Fatal(err)
	}
	return digest.FromSum([sha256.Size]byte(h.Sum(nil)))
}
