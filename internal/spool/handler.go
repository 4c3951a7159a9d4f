package spool

import (
	"context"
	"fmt"
	"log/slog"
	"maps"

	"github.com/resultity/node/internal/journal"
	"github.com/resultity/node/internal/wire"
)

// handler takes of each record what may leave the node. Its fields are immutable;
// each With makes a new handler.
type handler struct {
	spool  *Spool
	level  slog.Level
	event  string
	fields map[string]string
	group  bool // below a group, where no field may leave
}

// Handler returns a handler that keeps records of the level, but none below info.
func (s *Spool) Handler(level slog.Level) slog.Handler {
	return &handler{spool: s, level: max(level, slog.LevelInfo)}
}

// Enabled implements [slog.Handler].
func (h *handler) Enabled(_ context.Context, l slog.Level) bool { return l >= h.level }

// Handle implements [slog.Handler]. It does not wait for the disk.
func (h *handler) Handle(_ context.Context, r slog.Record) error {
	out := &wire.LogRecord{
		Time: r.Time.UnixMilli(), Level: r.Level.String(), Event: h.event, Message: wire.CutMessage(r.Message), Fields: maps.Clone(h.fields),
	}
	r.Attrs(func(a slog.Attr) bool {
		out.Event, out.Fields = h.take(out.Event, out.Fields, a)
		return true
	})
	out.Seal()
	if out.Check() == nil { // a level that nobody has heard of
		h.spool.put(out)
	}
	return nil
}

// take adds an attribute that may leave the node.
func (h *handler) take(event string, fields map[string]string, a slog.Attr) (string, map[string]string) {
	v := a.Value.Resolve()
	if e, ok := v.Any().(*journal.Event); ok {
		return e.Name, fields
	}
	if h.group || v.Kind() == slog.KindGroup {
		return event, fields
	}
	if value, ok := wire.LogField(a.Key, fmt.Sprint(v.Any())); ok && value != "" {
		if fields == nil {
			fields = map[string]string{}
		}
		fields[a.Key] = value
	}
	return event, fields
}

// WithAttrs implements [slog.Handler].
func (h *handler) WithAttrs(attrs []slog.Attr) slog.Handler {
	n := *h
	n.fields = maps.Clone(h.fields)
	for _, a := range attrs {
		n.event, n.fields = n.take(n.event, n.fields, a)
	}
	return &n
}

// WithGroup implements [slog.Handler].
func (h *handler) WithGroup(name string) slog.Handler {
	n := *h
	n.group = n.group || name != ""
	return &n
}
