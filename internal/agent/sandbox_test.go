package agent

import (
	"context"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/resultity/node/internal/deploy/deploytest"
	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/gate"
	"github.com/resultity/node/internal/journal"
	"github.com/resultity/node/internal/sandbox"
	"github.com/resultity/node/internal/wire"
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
		g := f.gate("sandbox")
		t.Logf("expected: %s: leak0; got: %s", journal.SandboxDrifted.Name, g.Detail)
		if g.State != gate.Closed || !strings.Contains(g.Detail, "leak0") || g.Remedy == "" {
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

// sentRecords takes the records that were sent, and drops the rest.
func (p *party) sentRecords() (list []digest.Digest) {
	synctest.Wait()
	for len(p.link.sent) > 0 {
		if m, ok := (<-p.link.sent).(*wire.Sandbox); ok {
			list = append(list, m.Sandbox.Digest())
		}
	}
	return list
}

// A record is sent when it is made, with each session before the results, and until
// the network has it.
func TestRecordsAreSent(t *testing.T) {
	serving(t, func(t *testing.T, f *fixture) {
		ctx, stop := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- f.keepRecords(ctx) }()
		defer func() { stop(); <-done }()
		sent := func(when string, want ...digest.Digest) {
			t.Helper()
			if got := f.sentRecords(); !slices.Equal(got, want) {
				t.Errorf("%s: sent %v, want %v", when, got, want)
			}
		}
		waiting := func(want int) {
			t.Helper()
			if s := f.Status().Networks[0].Sandbox; s == nil || s.Record != f.inForce() || s.Waiting != want {
				t.Errorf("status %+v, want %d waiting", s, want)
			}
		}
		first := f.inForce()
		sent("made", first)
		pass(recordPatience + time.Second)
		sent("not acknowledged", first)
		waiting(1)
		f.Message(&wire.SandboxAck{Digest: digest.Of([]byte("of nothing"))})
		pass(recordPatience)
		sent("something else acknowledged", first)
		f.Message(&wire.SandboxAck{Digest: first})
		pass(10 * recordPatience)
		sent("acknowledged")
		waiting(0)

		f.Closed(errBroken)
		pass(time.Second)
		f.earn(t, f.board.snapshot())
		f.drop()
		f.Opened()
		pass(time.Second)
		var order []string
		for len(f.link.sent) > 0 {
			switch (<-f.link.sent).(type) {
			case *wire.Sandbox:
				order = append(order, "record")
			case *wire.Result:
				order = append(order, "result")
			}
		}
		if !slices.Equal(order, []string{"record", "result"}) {
			t.Errorf("a session began with %v", order)
		}

		// The next one, after an hour.
		views := f.records.Newest().Record().Views
		renew := func() {
			t.Helper()
			if err := f.inUpdates(ctx, func(u *updater, _ context.Context) error { return u.renewRecords(u.active, &views) }); err != nil {
				t.Fatal(err)
			}
		}
		f.drop()
		pass(time.Hour)
		f.Closed(errBroken)
		renew()
		if f.inForce() != first {
			t.Error("another record with nobody to read it")
		}
		f.Opened()
		f.drop()
		renew()
		next := f.inForce()
		if next == first {
			t.Fatal("no other record after an hour")
		}
		sent("renewed", next)
		f.Message(&wire.SandboxAck{Digest: first})
		synctest.Wait()
		if r := f.records.Records(); len(r) != 1 || r[0].Digest() != next {
			t.Errorf("%d records are kept", len(r))
		}
		waiting(1)
	})
}
