package agent

import (
	"errors"
	"fmt"
	"syscall"
	"testing"
	"time"

	"github.com/resultity/node/internal/control"
	"github.com/resultity/node/internal/deploy"
	"github.com/resultity/node/internal/deploy/deploytest"
	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/gate"
	"github.com/resultity/node/internal/image"
	"github.com/resultity/node/internal/journal"
	"github.com/resultity/node/internal/wire"
)

// TestDamageIsMended: what a scrub finds is looked at by the agent itself. A damaged
// file fails its model, ends the runtime, and is told to the network; then it is
// fetched and validated anew.
func TestDamageIsMended(t *testing.T) {
	bubble(t, func(t *testing.T, f *fixture, n *deploytest.Network) {
		s := n.Publish(nil)
		f.tuf.serve(s, nil)
		close(f.link.up)
		defer f.run()()
		pass(time.Second)
		serving := func() (d *deploy.Deployment) {
			f.board.set(func(b *board) { d = b.active })
			return d
		}
		first := serving()
		if first == nil {
			t.Fatal("nothing runs")
		}
		file := s.Model().Files[0].SHA256
		damaged := func(d digest.Digest) {
			t.Helper()
			if err := f.Damaged(t.Context(), d); err != nil {
				t.Fatal(err)
			}
			pass(10 * time.Millisecond)
		}
		damaged(file)              // it is not, when the agent looks
		f.damaged = syscall.EMFILE // what could not be looked at is not known to be damaged
		damaged(file)
		if serving() != first || f.book.count(journal.ScrubFailed) != 1 {
			t.Error("the runtime was ended for a file that could not be opened")
		}
		f.damaged = digest.ErrMismatch
		damaged(digest.Of([]byte("of another model")))
		if serving() != first {
			t.Fatal("the runtime was ended for a file that it does not use")
		}
		last[*wire.Heartbeat](f.party)
		damaged(file)
		h := last[*wire.Heartbeat](f.party)
		if serving() == first || h == nil || h.Models[0].State != "failed" || h.Runtime.State == active {
			t.Errorf("the network heard %+v", h)
		}
		if c := f.book.count(journal.ModelDamaged); c != 2 {
			t.Errorf("%d times in the journal", c)
		}
		f.damaged = nil
		pass(time.Minute)
		if d := serving(); d == nil || d == first || f.Models()[0].State != "active" {
			t.Errorf("not mended: %+v", f.Models())
		}
		f.scrubbed = make(chan digest.Digest) // nobody looks
		if err := f.Damaged(t.Context(), file); !errors.Is(err, control.ErrRefused) {
			t.Errorf("error %v", err)
		}
	})
}

// TestImageIsLookedAt: after the start and after each scrub. An image that is damaged
// ends the runtime, is told to the network, and is replaced.
func TestImageIsLookedAt(t *testing.T) {
	bubble(t, func(t *testing.T, f *fixture, n *deploytest.Network) {
		f.tuf.serve(n.Publish(nil), nil)
		close(f.link.up)
		defer f.run()()
		pass(time.Second)
		first := f.running()
		if first == nil {
			t.Fatal("nothing runs")
		}
		scrubbed := func() {
			t.Helper()
			if err := f.Scrubbed(t.Context()); err != nil {
				t.Fatal(err)
			}
			pass(10 * time.Millisecond)
		}
		pass(imageAfter)
		if c := f.book.count(journal.ImageChecked); c != 1 {
			t.Fatalf("looked at %d times after the start", c)
		}
		if scrubbed(); f.book.count(journal.ImageChecked) != 2 {
			t.Error("not looked at after a scrub")
		}
		f.altered = syscall.EIO // Podman could not read it, or does not answer
		if scrubbed(); f.running() != first || f.book.count(journal.ScrubFailed) != 1 {
			t.Error("the runtime was ended for an image that could not be looked at")
		}
		f.altered = fmt.Errorf("x: %w", image.ErrAltered)
		f.machine.Fail(deploytest.VerifyImage, &deploytest.Fault{Err: f.altered, Times: 1}) // and once more, before it is pulled
		last[*wire.Heartbeat](f.party)
		scrubbed()
		if h := last[*wire.Heartbeat](f.party); f.running() == first || h == nil || h.Runtime.State == active || f.book.count(journal.ImageAltered) == 0 {
			t.Errorf("the network heard %+v", h)
		}
		if g := f.gate(gate.Image); g.State != gate.Closed {
			t.Errorf("%+v", g)
		}
		f.altered = nil
		pass(time.Minute)
		if d := f.running(); d == nil || d == first {
			t.Error("not replaced")
		}
	})
}
