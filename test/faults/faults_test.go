package faults

import (
	"os"
	"strings"
	"testing"
	"time"
)

// TestFaults breaks one thing after the other; the slow ones are left to
// "make soak".
func TestFaults(t *testing.T) {
	w, err := New(t.Context(), os.Stderr)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := w.Close(); err != nil {
			t.Error(err)
		}
	}()
	for _, f := range Faults {
		if f.Slow {
			continue
		}
		t.Run(strings.ReplaceAll(f.Name, " ", "_"), func(t *testing.T) {
			o, err := w.Run(t.Context(), f)
			if err != nil {
				t.Errorf("%v\n--- journal of the node\n%s", err, w.A.Journal(t.Context(), 60))
			}
			t.Logf("broken for %v, recovery in %v; clients: %s", o.Broken.Round(time.Millisecond), o.Recovery.Round(time.Millisecond), &o.Clients)
		})
	}
}
