package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
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
func (a *Agent) openSpool(networkDir string) {
	if a.cfg.Log.Upload == "off" {
		return
	}
	s, err := spool.Open(filepath.Join(networkDir, "spool"))
	if err != nil {
		a.log.Error("logs are not kept for the network", journal.StorageFailed.Attr(), "error", err)
		return
	}
	a.spool = s
	a.closers = append(a.closers, s.Close)
	a.log = slog.New(slog.NewMultiHandler(a.log.Handler(), s.Handler(a.cfg.Log.SlogLevel())))
}

// uploads sends the network what the spool has gained: at the interval of the
// configuration, at a new one, when a session begins, and when it is ordered to.
func (a *Agent) uploads(ctx context.Context) error {
	if a.spool == nil {
		<-ctx.Done()
		return nil
	}
	for {
		every := uploadEvery
		if s := a.board.snapshot(); s != nil {
			every = s.Config().Logs.Interval.Duration()
		}
		timer := time.NewTimer(jittered(every))
		var ordered chan<- error
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil
		case <-a.upload:
		case <-timer.C:
		case ordered = <-a.uploadNow:
		}
		timer.Stop()
		err := a.uploadTo(ctx, a.spool.Stats().Written)
		if ordered != nil {
			ordered <- err
		}
		if err != nil && !errors.Is(err, session.ErrNotConnected) && ctx.Err() == nil {
			a.log.Warn("logs not uploaded; the next time begins where this one ended", "error", err)
		}
	}
}

// uploadTo sends batches, one at a time, until the network has everything up to
// target that is on disk.
func (a *Agent) uploadTo(ctx context.Context, target uint64) error {
	for {
		before := a.spool.Stats()
		if before.Position >= target {
			return nil
		}
		limit := uploadBytes
		if s := a.board.snapshot(); s != nil {
			limit = s.Config().Logs.BatchBytes
		}
		b, err := a.spool.Next(limit)
		if b == nil || err != nil {
			return err
		}
		l, err := a.key.Logs(wire.LogBatch{
			Network: a.cfg.Network.Name, Node: a.key.Address(), Spool: b.Spool, After: b.After, Last: b.Last, Count: b.Count,
		}, b.Data)
		if err != nil {
			return err
		}
		// One that waits to be sent already is as good.
		if err := a.session.Send(l); err != nil && !errors.Is(err, session.ErrFull) {
			return err
		}
		again, err := a.awaitAck(ctx)
		if err != nil {
			return err
		}
		after := a.spool.Stats()
		switch {
		case again:
		case after.Position == before.Position:
			return fmt.Errorf("the network has not stored what follows record %d", after.Position)
		default:
			if lost := b.Last - b.After - b.Count; lost > 0 && after.Position >= b.Last {
				a.dropped.Add(lost)
				a.log.Warn("log records were dropped before the network had them", journal.LogsDropped.Attr(), "count", lost)
			}
		}
	}
}

// awaitAck waits for the network's word about a batch. A new session is a reason
// to send it again.
func (a *Agent) awaitAck(ctx context.Context) (again bool, err error) {
	timer := time.NewTimer(ackPatience)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return false, ctx.Err()
	case <-timer.C:
		return false, errors.New("the network does not acknowledge logs")
	case <-a.upload:
		return true, nil
	case ack := <-a.logAcks:
		return false, a.spool.Ack(ack.Spool, ack.Position)
	}
}

// logsStored takes the network's word without waiting. One that finds no room is
// asked for again.
func (a *Agent) logsStored(m *wire.LogsAck) {
	select {
	case a.logAcks <- m:
	default:
	}
}

var errUploadOff = errors.New(`the node keeps no logs for the network; its operator has set log.upload = "off", or the spool cannot be opened`)

// uploadLogs has everything uploaded that was logged before.
func (a *Agent) uploadLogs(ctx context.Context) error {
	if a.spool == nil {
		return errUploadOff
	}
	done := make(chan error, 1)
	select {
	case a.uploadNow <- done:
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
func (a *Agent) logs() control.Logs {
	if a.spool == nil {
		return control.Logs{Upload: "off"}
	}
	st := a.spool.Stats()
	l := control.Logs{Upload: "on", Waiting: st.Written - st.Position, Uploaded: st.Position, Dropped: a.dropped.Load()}
	if st.Err != nil {
		l.Error = st.Err.Error()
	}
	return l
}
