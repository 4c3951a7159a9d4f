package model

import (
	"context"
	"errors"
	"io/fs"
	"net/http"
	"testing"
)

func TestWarm(t *testing.T) {
	one, two := content(3<<20), content(1<<20)
	srv := serve(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/1" {
			_, _ = w.Write(one)
		} else {
			_, _ = w.Write(two)
		}
	})
	s := open(t, t.TempDir(), srv)
	m := modelOf(fileOf("1", one, srv.URL+"/1"), fileOf("2", two, srv.URL+"/2"))
	if _, err := s.Warm(t.Context(), m, 1<<40); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a model that is not here: %v", err)
	}
	if _, err := s.Ensure(t.Context(), m, nil); err != nil {
		t.Fatal(err)
	}
	for most, want := range map[int64]int64{0: 0, 1: 1, 1<<20 + 7: 1<<20 + 7, 3<<20 + 5: 3<<20 + 5, 1 << 40: 4 << 20} {
		if got, err := s.Warm(t.Context(), m, most); got != want || err != nil {
			t.Errorf("at most %d: %d, %v", most, got, err)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := s.Warm(ctx, m, 1<<40); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}
