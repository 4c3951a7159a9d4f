package agent

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"github.com/resultity/node/internal/control"
	"github.com/resultity/node/internal/deploy"
	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/failpoint"
	"github.com/resultity/node/internal/journal"
	"github.com/resultity/node/internal/receipt"
	"github.com/resultity/node/internal/sandbox"
	"github.com/resultity/node/internal/sandbox/book"
	"github.com/resultity/node/internal/sandbox/record"
	"github.com/resultity/node/internal/session"
	"github.com/resultity/node/internal/wire"
)

// This file is about the record of the runtime's sandbox: one for each network,
// made before the runtime is given its first job and renewed while it runs, which
// each receipt names. And about looking again: what was sealed may not stay so.

const (
	// renewAfter is how old a record may become while there is a network to read it.
	renewAfter = time.Hour

	// mayFail is how many looks in a row may fail for another reason than what they
	// found. A container that was taken over would rather not be looked at.
	mayFail = 3

	// recordPatience is how long the network may take to store a record, before it is
	// sent again.
	recordPatience = 30 * time.Second
)

// openRecords opens the records for the network.
func (m *membership) openRecords(dir string) (err error) {
	m.records, err = book.Open(filepath.Join(dir, "sandbox"), m.net.Name, m.key.Address())
	if err != nil {
		return inDir("paths.state", err)
	}
	return nil
}

// attest makes sure that there is a record of what was seen of dep, on disk and on
// its way. The record of an agent before this one goes on, if nothing has changed.
func (m *membership) attest(dep *deploy.Deployment, views *record.Views) error {
	now := failpoint.Now()
	if last := m.records.Newest(); last != nil && last.Record().Start == dep.Start() {
		r := last.Record()
		if err := deploy.Drift(&r.Views, views); err != nil {
			return err
		}
		age := now.Sub(time.UnixMilli(r.Time))
		if r.Config == dep.Snapshot().Digest() && (age >= 0 && age < renewAfter || !m.connected()) {
			return nil
		}
	}
	s, err := m.key.Sandbox(&record.Record{
		Version: record.Version, Node: m.key.Address(), Network: m.net.Name, Time: now.UnixMilli(), Start: dep.Start(),
		Config: dep.Snapshot().Digest(), Image: dep.Image(), Views: *views,
	})
	if err == nil {
		err = m.records.Put(s, m.inReceipts)
	}
	if err != nil {
		return fmt.Errorf("%w: %w", deploy.ErrUnrecorded, err)
	}
	m.log.Info("sandbox recorded", journal.SandboxRecorded.Attr(), "digest", s.Digest())
	m.sendRecords([]*record.Signed{s})
	return nil
}

func (m *membership) connected() (is bool) {
	m.board.set(func(b *board) { is = b.connected })
	return is
}

// inReceipts are the records that results name which the network has not got. What a
// result that cannot be read has named is of no use to it any more.
func (m *membership) inReceipts() (map[digest.Digest]bool, error) {
	named := map[digest.Digest]bool{}
	_, err := m.store.Outbox(0, func(_ uint64, r *wire.Result) error {
		if r.Receipt != nil {
			s := r.Receipt.Receipt()
			named[s.Measured.SandboxDigest] = true
		}
		return nil
	})
	return named, err
}

// inForce is the record that a job which begins now names.
func (m *membership) inForce() digest.Digest {
	if s := m.records.Newest(); s != nil {
		return s.Digest()
	}
	return receipt.Unknown // no job begins without one
}

// sendRecords sends records, before results that name them.
func (m *membership) sendRecords(list []*record.Signed) {
	for _, s := range list {
		if err := m.session.Send(&wire.Sandbox{Sandbox: s}); err != nil {
			if !errors.Is(err, session.ErrNotConnected) {
				m.log.Warn("record of the sandbox not sent; it is sent again", "error", err)
			}
			return
		}
	}
}

// recordStored takes the network's word without waiting. One that finds no room is
// asked for again.
func (m *membership) recordStored(ack *wire.SandboxAck) {
	select {
	case m.recordAcks <- ack.Digest:
	default:
	}
}

// keepRecords forgets records that the network has stored, and sends again what it
// says nothing of.
func (m *membership) keepRecords(ctx context.Context) error {
	again := time.NewTicker(recordPatience)
	defer again.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case d := <-m.recordAcks:
			if err := m.records.Has(d); err != nil {
				m.log.Warn("a record of the sandbox stays although the network has it", journal.StorageFailed.Attr(), "error", err)
			}
		case <-again.C:
			m.sendRecords(m.records.Pending())
		}
	}
}

// recorded is what status says of it.
func (m *membership) recorded() *control.Sandbox {
	s := m.records.Newest()
	if s == nil {
		return nil
	}
	c := &control.Sandbox{Record: s.Digest(), Made: time.UnixMilli(s.Record().Time).UTC(), Waiting: len(m.records.Pending())}
	m.board.set(func(b *board) { c.Looked = b.looked })
	return c
}

// watchSandbox looks at the runtime's sandbox while it runs.
func (a *Agent) watchSandbox(ctx context.Context) error {
	tick := time.NewTicker(a.cfg.Runtime.Look())
	defer tick.Stop()
	var of string // which start of the runtime failed are about
	failed := 0
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		var dep *deploy.Deployment
		var d deployer
		err := a.inUpdates(ctx, func(u *updater, _ context.Context) error {
			dep, d = u.active, u.deployer
			return nil
		})
		if err != nil || dep == nil {
			continue // ctx has ended, or nothing runs
		}
		if dep.Start() != of {
			of, failed = dep.Start(), 0
		}
		views, err := d.Inspect(ctx, dep)
		switch {
		case ctx.Err() != nil, errors.Is(err, deploy.ErrEnded):
			continue
		case err == nil:
			failed = 0
			err = a.inUpdates(ctx, func(u *updater, _ context.Context) error { return u.renewRecords(dep, &views) })
			if err == nil {
				continue
			}
		default:
			failed++
		}
		if !errors.Is(err, sandbox.ErrNotSealed) && failed < mayFail {
			if ctx.Err() == nil {
				attrs := []any{"error", err}
				if errors.Is(err, deploy.ErrUnrecorded) {
					attrs = append(attrs, journal.SandboxUnrecorded.Attr())
				}
				a.log.Warn("the sandbox could not be looked at, or not recorded; it is tried again", attrs...)
			}
			continue
		}
		for _, m := range a.members {
			m.door.shut(m.worker) // before the update loop comes to it
		}
		_ = a.inUpdates(ctx, func(u *updater, ctx context.Context) error { return u.drifted(ctx, dep, err) }) // it reports what is wrong
	}
}

// renewRecords has the networks that take part in dep told of a look.
func (u *updater) renewRecords(dep *deploy.Deployment, views *record.Views) (err error) {
	if u.active != dep {
		return nil
	}
	for _, m := range u.members {
		mine := m.door.serving()
		if mine == nil || mine.Start() != dep.Start() {
			continue
		}
		m.board.set(func(b *board) { b.looked = time.Now().UTC() })
		err = errors.Join(err, m.attest(mine, views))
	}
	return err
}

// drifted ends a runtime whose sandbox is not what it was. Its jobs are not waited
// for: who is in there could answer them. It is started anew, and left alone for longer
// each time if that does not help.
func (u *updater) drifted(ctx context.Context, dep *deploy.Deployment, why error) error {
	if u.active != dep {
		return nil
	}
	if time.Since(u.admitted) > doubtWindow {
		u.drifts = 0
	}
	u.drifts++
	if !errors.Is(why, deploy.ErrDrifted) {
		why = fmt.Errorf("%w: it cannot be looked at: %w", deploy.ErrDrifted, why)
	}
	err := u.discard(ctx, dep, &deploy.Error{Step: deploy.StepSandbox, Err: why})
	if u.drifts > 2 {
		u.build = backoff{try: u.drifts - 3}
		u.build.failedOn(rarely)
	}
	return err
}
