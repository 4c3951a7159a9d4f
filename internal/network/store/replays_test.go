package store

import (
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/resultity/node/internal/receipt"
	"github.com/resultity/node/internal/wire"
)

func TestRequestsAreKeptWithinBounds(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	finished := func(n int) *Job {
		return &Job{Client: "c", Job: wire.Job{ID: receipt.NewJobID(), Seed: 5, Request: make([]byte, n)}}
	}
	j := finished(10)
	if err := s.KeepRequest(t.Context(), j); err != nil { // none are kept
		t.Fatal(err)
	}
	if _, err := s.Request(t.Context(), j.ID); !errors.Is(err, ErrNotFound) {
		t.Fatal(err)
	}
	limits := func(requests int64) {
		t.Helper()
		if _, err := s.SetLimits(t.Context(), Limits{Jobs: 1 << 20, Results: 1 << 20, Requests: requests}); err != nil {
			t.Fatal(err)
		}
	}
	limits(1 << 20)
	var ids []receipt.JobID
	for range 8 {
		j := finished(200 << 10) // a third more in base64
		for range 2 {            // again by a service that was killed in between
			if err := s.KeepRequest(t.Context(), j); err != nil {
				t.Fatal(err)
			}
		}
		ids = append(ids, j.ID)
	}
	large := finished(2 << 20)
	if err := s.KeepRequest(t.Context(), large); err != nil {
		t.Fatal(err)
	}
	s = reopen(t, s, dir)
	limits(1 << 20)
	for i, id := range ids {
		got, err := s.Request(t.Context(), id)
		switch {
		case i < 4 && !errors.Is(err, ErrNotFound):
			t.Errorf("%d of 8 is kept: %v", i, err)
		case i == 7 && (err != nil || got.ID != id || got.Seed != 5 || len(got.Request) != 200<<10):
			t.Errorf("the last: %+v, %v", got, err)
		}
	}
	if _, err := s.Request(t.Context(), large.ID); !errors.Is(err, ErrNotFound) {
		t.Errorf("one that is larger than all may be: %v", err)
	}
	if err := s.SetResultTTL(t.Context(), time.Hour); err != nil {
		t.Fatal(err)
	}
	if got := requestsOf(s.now.Load()).CachedInfo().Config.MaxAge; got != time.Hour {
		t.Errorf("they are kept for %v", got)
	}
	s = reopen(t, s, dir)
	limits(0)
	if _, err := s.Request(t.Context(), ids[7]); !errors.Is(err, ErrNotFound) {
		t.Errorf("it is there: %v", err)
	}
}

func TestReplaysAreKept(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	id := receipt.NewJobID()
	for i := range replayEach + 2 {
		if err := s.PutReplay(t.Context(), id, fmt.Append(nil, i)); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.PutReplay(t.Context(), receipt.NewJobID(), []byte("x")); err != nil {
		t.Fatal(err)
	}
	s = reopen(t, s, dir)
	var got []string
	if err := s.Replays(t.Context(), func(b []byte) error { got = append(got, string(b)); return nil }); err != nil {
		t.Fatal(err)
	}
	if len(got) != replayEach+1 || got[0] != "2" || got[replayEach] != "x" {
		t.Errorf("%q", got)
	}
	if err := s.PutReplay(t.Context(), id, make([]byte, maxVerdict+1)); err == nil {
		t.Error("a verdict without bounds is stored")
	}
}
