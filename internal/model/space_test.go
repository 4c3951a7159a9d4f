package model

import (
	"errors"
	"log/slog"
	"testing"

	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/snapshot"
)

// Two models that fit one by one, but not together, are not begun together.
func TestPreflightCountsWhatIsComing(t *testing.T) {
	s, err := Open(t.TempDir(), nil, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	s.margin = 0
	free, err := s.free()
	if err != nil || free < 1<<20 {
		t.Fatal("there is no room at all", free, err)
	}
	file := func(name string) snapshot.File {
		return snapshot.File{Path: name, Size: free / 5 * 3, SHA256: digest.Of([]byte(name))}
	}
	small := snapshot.File{Path: "small", Size: 1, SHA256: digest.Of([]byte("small"))}
	a, b := &snapshot.Model{Name: "a", Files: []snapshot.File{file("x"), small}}, &snapshot.Model{Name: "b", Files: []snapshot.File{file("y")}}
	again := &snapshot.Model{Name: "a, of another network", Files: []snapshot.File{file("x")}}
	fits := func(m *snapshot.Model) func() {
		t.Helper()
		done, err := s.preflight(t.Context(), m)
		if err != nil {
			t.Fatal(err)
		}
		return done
	}
	doneA := fits(a)
	var space *NoSpaceError
	if _, err := s.preflight(t.Context(), b); !errors.As(err, &space) || space.Need != b.Files[0].Size || space.Free >= space.Need {
		t.Errorf("a second one that does not fit: %v", err)
	}
	doneAgain := fits(again) // it is the same file
	doneA()
	if _, err := s.preflight(t.Context(), b); !errors.As(err, &space) {
		t.Errorf("the file is still coming: %v", err)
	}
	doneAgain()
	fits(b)()
	if len(s.coming) != 0 {
		t.Errorf("%d are coming", len(s.coming))
	}
}
