package agent

import (
	"context"
	"strings"
	"testing"
	"time"

	"github.com/resultity/node/internal/deploy/deploytest"
	"github.com/resultity/node/internal/gate"
	"github.com/resultity/node/internal/journal"
	"github.com/resultity/node/internal/sandbox"
)

// A sandbox that has changed takes the node out of service at the next look, and
// the next start of the runtime has a record of its own.
func TestSandboxDrifts(t *testing.T) {
	serving(t, func(t *testing.T, f *fixture) {
		ctx, stop := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- f.watchSandbox(ctx) }() // in no other test, where it would be calls that nobody ordered
		defer func() { stop(); <-done }()
		s := f.board.snapshot()
		first := f.records.Newest()
		if first == nil || f.inForce() != first.Digest() || first.Record().Config != s.Digest() {
			t.Fatalf("record %+v", first)
		}
		pass(10 * time.Minute)
		if f.records.Newest().Digest() != first.Digest() || f.book.count(journal.SandboxDrifted) != 0 {
			t.Fatalf("nothing has changed:\n%s", f.book)
		}
		_, before := f.machine.Now()
		f.machine.Do(func(m *deploytest.Locked) {
			m.Outside(func(o *sandbox.Outside) { o.Interfaces = append(o.Interfaces, "leak0") })
		})
		pass(61 * time.Second)
		f.serves(nil) // and the start after it is not sealed either
		if g := f.gate("sandbox"); g.State != gate.Closed || !strings.Contains(g.Detail, "leak0") || g.Remedy == "" {
			t.Errorf("%+v", g)
		}
		if f.book.count(journal.SandboxDrifted) != 1 {
			t.Errorf("not said:\n%s", f.book)
		}
		f.machine.Do(func(m *deploytest.Locked) {
			m.Outside(func(o *sandbox.Outside) { o.Interfaces = []string{"lo"} })
		})
		pass(10 * time.Minute)
		f.serves(s)
		if _, now := f.machine.Now(); now == before || f.records.Newest().Record().Start == first.Record().Start {
			t.Errorf("%d starts, and %d before", now, before)
		}
	})
}
