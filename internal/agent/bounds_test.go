package agent

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"testing/synctest"
	"time"
	"unicode/utf8"

	"github.com/resultity/node/internal/config"
	"github.com/resultity/node/internal/control"
	"github.com/resultity/node/internal/deploy/deploytest"
	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/durable"
	"github.com/resultity/node/internal/gate"
	"github.com/resultity/node/internal/generation"
	"github.com/resultity/node/internal/journal"
	"github.com/resultity/node/internal/session"
	"github.com/resultity/node/internal/wire"
)

// Whoever does not answer is waited for, and not for ever.
func TestWaitsEnd(t *testing.T) {
	for name, c := range map[string]struct {
		most time.Duration
		wait func(f *fixture, n *deploytest.Network) error
		want string
	}{
		"a network for a registration": {registerTimeout, func(f *fixture, n *deploytest.Network) error {
			f.enrol = func(ctx context.Context, _ session.Registration) (*wire.Registered, error) {
				<-ctx.Done()
				return nil, ctx.Err()
			}
			_, err := f.registerNow(f.t.Context(), n.Publish(nil))
			return err
		}, context.DeadlineExceeded.Error()},
		"the update loop for the operator's word": {wordPatience, func(f *fixture, _ *deploytest.Network) error {
			err := f.Rollback(f.t.Context(), 0)
			if !errors.Is(err, control.ErrRefused) {
				f.t.Error(err)
			}
			return err
		}, "a switch is under way"},
		"a network for the logs": {ackPatience, func(f *fixture, _ *deploytest.Network) error {
			f.openSpool(f.dir)
			return f.awaitAck(f.t.Context(), 0)
		}, "does not acknowledge"},
		"the machine for a look": {lookAtMost, func(f *fixture, _ *deploytest.Network) (err error) {
			f.seen.machineGates(func(ctx context.Context) []gate.Gate {
				<-ctx.Done()
				err = ctx.Err()
				return nil
			}, 0)
			return err
		}, context.DeadlineExceeded.Error()},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T, f *fixture, n *deploytest.Network) {
				f.t = t
				begin := time.Now()
				err := c.wait(f, n)
				took := time.Since(begin)
				t.Logf("expected: the end after %v; got: %v after %v", c.most, err, took)
				if took != c.most || err == nil || !strings.Contains(err.Error(), c.want) {
					t.Errorf("%v after %v, want %q after %v", err, took, c.want, c.most)
				}
				if err := f.Close(); err != nil {
					t.Error(err)
				}
			})
		})
	}
}

// A job that does not end holds the agent's stop up for so long, and systemd waits
// longer than that.
func TestStopEnds(t *testing.T) {
	serving(t, func(t *testing.T, f *fixture) {
		j := job(f.board.snapshot())
		j.Deadline = time.Now().Add(2 * stopPatience).UnixMilli()
		f.Message(j)
		synctest.Wait()
		if len(f.engine.asked) == 0 {
			t.Fatalf("no job runs\n%s", f.book)
		}
		<-f.engine.asked
		begin := time.Now()
		f.finish(t.Context())
		if took := time.Since(begin); took != stopPatience || !strings.Contains(f.book.String(), "cut short") {
			t.Errorf("it took %v, want %v\n%s", took, stopPatience, f.book)
		}
		f.engine.answer <- struct{}{}
		synctest.Wait()
	})
	unit, err := os.ReadFile("../../units/resultity-agent.service")
	if err != nil {
		t.Fatal(err)
	}
	m := regexp.MustCompile(`(?m)^TimeoutStopSec=([0-9]+)$`).FindSubmatch(unit)
	if m == nil {
		t.Fatal("the unit does not say how long a stop may take")
	}
	if most, err := time.ParseDuration(string(m[1]) + "s"); err != nil || most < stopPatience+10*time.Second {
		t.Errorf("the unit's stop takes %v, the agent's %v (%v)", most, stopPatience, err)
	}
}

// Orders that nobody has the time to write down are dropped, as if they were lost on the
// way, and take no more room than is set aside.
func TestInboxIsBounded(t *testing.T) {
	f := build(t, t.TempDir(), deploytest.New(t))
	for range maxInbox + 2 {
		f.post(&wire.OrderAck{})
	}
	dropped := f.book.count(journal.OrderRefused)
	t.Logf("%d orders: expected: 2 dropped; got: %d", maxInbox+2, dropped)
	if dropped != 2 || len(f.inbox) != maxInbox {
		t.Errorf("%d are dropped and %d wait, want 2 and %d", dropped, len(f.inbox), maxInbox)
	}
	for range maxScrubbed {
		if err := f.Damaged(t.Context(), digest.Of(nil)); err != nil {
			t.Error(err)
		}
	}
	err := f.Damaged(t.Context(), digest.Of(nil))
	t.Logf("%d damaged files: expected: %v; got: %v", maxScrubbed+1, control.ErrRefused, err)
	if !errors.Is(err, control.ErrRefused) {
		t.Error(err)
	}
	if err := f.Close(); err != nil {
		t.Error(err)
	}
}

// Orders that take time do not pile up.
func TestLongOrdersAreBounded(t *testing.T) {
	serving(t, func(t *testing.T, f *fixture) {
		f.Message(job(f.board.snapshot())) // for the end of which a restart waits
		synctest.Wait()
		<-f.engine.asked
		kind := wire.OrderRestart
		for i := range maxLong {
			if d := f.obey(f.order(networkKey, kind)); d != nil {
				t.Fatalf("order %d: %+v", i, d)
			}
			kind = wire.OrderRevalidate // which waits for the restart
		}
		d := f.obey(f.order(networkKey, kind))
		if d == nil || d.Outcome != wire.OutcomeFailed || !strings.Contains(d.Message, fmt.Sprintf("%d other orders", maxLong)) {
			t.Errorf("one more: %+v", d)
		} else {
			t.Logf("order %d: expected: %s; got: %s: %s", maxLong+1, wire.OutcomeFailed, d.Outcome, d.Message)
		}
		f.engine.answer <- struct{}{}
		pass(time.Minute)
		f.mustObey(wire.OrderRevalidate)
	})
}

// Why a configuration does not work is told in so many bytes of whole characters.
func TestReportedReasonIsBounded(t *testing.T) {
	f := build(t, t.TempDir(), deploytest.New(t))
	config := digest.Of([]byte("c"))
	n, err := f.gens.Add(generation.Content{Network: "testnet", Config: config, Proof: []byte("p"), Unit: []byte("u")})
	if err == nil {
		err = f.gens.Begin(n)
	}
	if err == nil {
		_, err = f.gens.Fail(n, "start", "x"+strings.Repeat("é", maxReported/2), false, nil)
	}
	if err != nil {
		t.Fatal(err)
	}
	if w := f.failed(config); w == nil || len(w.Reason) != maxReported-1 || !utf8.ValidString(w.Reason) {
		t.Errorf("%+v", w)
	}
	if err := f.Close(); err != nil {
		t.Error(err)
	}
}

// What the operator names, or what stands in place of a note, is not read to its end.
func TestNamedFilesAreBounded(t *testing.T) {
	file := filepath.Join(t.TempDir(), "f")
	n := &config.Network{Name: "testnet", Root: file, CA: file}
	for over := range int64(2) {
		if err := errors.Join(os.WriteFile(file, nil, 0o600), os.Truncate(file, maxNamed+over)); err != nil {
			t.Fatal(err)
		}
		_, root := readRoot(n)
		_, ca := addCA(x509.NewCertPool(), n)
		for name, err := range map[string]error{"root": root, "ca": ca} {
			if errors.Is(err, durable.ErrLarge) != (over > 0) || err != nil && !strings.Contains(err.Error(), "network.testnet."+name) {
				t.Errorf("%s of %d bytes: %v", name, maxNamed+over, err)
			}
		}
	}
	f := build(t, t.TempDir(), deploytest.New(t))
	if err := f.Drain(); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(f.drainFile(), maxDrain+1); err != nil {
		t.Fatal(err)
	}
	f.drained.Store(nil)
	f.recallDrain()
	if since := f.drained.Load(); since == nil || !since.IsZero() || !strings.Contains(f.book.String(), "too large") {
		t.Errorf("drained since %v\n%s", since, f.book)
	}
	if err := f.Close(); err != nil {
		t.Error(err)
	}
}
