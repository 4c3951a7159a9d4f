package agent

import (
	"context"
	"errors"
	"path/filepath"
	"time"

	"github.com/resultity/node/internal/control"
	"github.com/resultity/node/internal/journal"
	"github.com/resultity/node/internal/session"
	"github.com/resultity/node/internal/spool"
	"github.com/resultity/node/internal/wire"
)

const (
	ackPatience = 30 * time.Second // for the network to store a batch
	uploadEvery = 15 * time.Minute // before there is a configuration
	uploadBytes = 64 << 10         // likewise
)

// openSpool has everything that is logged from now on kept for the network too,
// unless the operator does not want that. A spool that cannot be had is no reason
// not to run.
func (m *membership) openSpool(networkDir string) {
	if m.keeps.Upload == "off" {
		return
	}
	s, err := spool.Open(filepath.Join(networkDir, "spool"))
	if err != nil {
		m.log.Error("logs are not kept for the network", journal.StorageFailed.Attr(), "error", err)
		return
	}
	m.spool = s
	m.closers = append(m.closers, s.Close)
	m.spools.add(m.net.Name, s.Handler(m.keeps.SlogLevel()))
}

// uploads sends the network what the spool has gained: at the interval of the
// configuration, at a new one, when a session begins, and when it is ordered to.
func (m *membership) uploads(ctx context.Context) error {
	if m.spool == nil {
		<-ctx.Done()
		return nil
	}
	for {
		every := uploadEvery
		if s := m.board.snapshot(); s != nil {
			every = s.Config().Logs.Interval.Duration()
		}
		timer := time.NewTimer(jittered(every))
		var ordered chan<- error
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil
		case <-m.upload:
		case <-timer.C:
		case ordered = <-m.uploadNow:
		}
		timer.Stop()
		err := m.uploadTo(ctx, m.spool.Stats().Written)
		if ordered != nil {
			ordered <- err
		}
		if err != nil && !errors.Is(err, session.ErrNotConnected) && ctx.Err() == nil {
			m.log.Warn("logs not uploaded; the next time begins where this one ended", "error", err)
		}
	}
}

// uploadTo sends batches, one at a time, until the network has everything up to
// target that is on disk.
func (m *membership) uploadTo(ctx context.Context, target uint64) error {
	for {
		before := m.spool.Stats()
		if before.Position >= target {
			return nil
		}
		limit := uploadBytes
		if s := m.board.snapshot(); s != nil {
			limit = s.Config().Logs.BatchBytes
		}
		b, err := m.spool.Next(limit)
		if b == nil || err != nil {
			return err
		}
		l, err := m.key.Logs(wire.LogBatch{
			Network: m.net.Name, Node: m.key.Address(), Spool: b.Spool, After: b.After, Last: b.Last, Count: b.Count,
		}, b.Data)
		if err != nil {
			return err
		}
		// One that waits to be sent already is as good.
		if err := m.session.Send(l); err != nil && !errors.Is(err, session.ErrFull) {
			return err
		}
		if err := m.awaitAck(ctx, before.Position); err != nil {
			return err
		}
		if lost := b.Last - b.After - b.Count; lost > 0 && m.spool.Stats().Position >= b.Last {
			m.dropped.Add(lost)
			m.log.Warn("log records were dropped before the network had them", journal.LogsDropped.Attr(), "count", lost)
		}
	}
}

// awaitAck waits until the network has stored more than up to a position. It also
// returns for what is a reason to send the batch again: a new session, or a new
// configuration, which may have another bound. The network stores such a batch once
// and acknowledges it twice, so that a word which changes nothing means nothing.
func (m *membership) awaitAck(ctx context.Context, position uint64) error {
	timer := time.NewTimer(ackPatience)
	defer timer.Stop()
	for m.spool.Stats().Position <= position {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-timer.C:
			return errors.New("the network does not acknowledge logs")
		case <-m.upload:
			return nil
		case ack := <-m.logAcks:
			if err := m.spool.Ack(ack.Spool, ack.Position); err != nil {
				return err
			}
		}
	}
	return nil
}

// logsStored takes the network's word without waiting. One that finds no room is
// asked for again.
func (m *membership) logsStored(ack *wire.LogsAck) {
	select {
	case m.logAcks <- ack:
	default:
	}
}

var errUploadOff = errors.New(`the node keeps no logs for the network; its operator has set log.upload = "off", or the spool cannot be opened`)

// uploadLogs has everything uploaded that was logged before.
func (m *membership) uploadLogs(ctx context.Context) error {
	if m.spool == nil {
		return errUploadOff
	}
	done := make(chan error, 1)
	select {
	case m.uploadNow <- done:
	case <-ctx.Done():
		return ctx.Err()
	}
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// logs is what status shows of the upload.
func (m *membership) logs() control.Logs {
	if m.spool == nil {
		return control.Logs{Upload: "off"}
	}
	st := m.spool.Stats()
	l := control.Logs{Upload: "on", Waiting: st.Written - st.Position, Uploaded: st.Position, Dropped: m.dropped.Load()}
	if st.Err != nil {
		l.Error = st.Err.Error()
	}
	return l
}
