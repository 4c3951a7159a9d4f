package agent

import (
	"context"
	"errors"
	"log/slog"
	"sync"
)

// records hands what is logged to the journal, and to the spools of those
// networks that it concerns: what is a network's, by its attribute "network", to
// that one alone, the machine's own to all. So no network hears of another's jobs.
type records struct {
	journal slog.Handler
	to      *spools
	network string                            // "" for none
	more    []func(slog.Handler) slog.Handler // what was added to the journal's, for a spool's
}

// spools are the networks' handlers, by network.
type spools struct {
	mu sync.Mutex // guards what follows; held only to look and to add
	by map[string]slog.Handler
}

func (s *spools) add(network string, h slog.Handler) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.by[network] = h
}

// handlers returns those of a network, of all for "".
func (s *spools) handlers(network string) (hs []slog.Handler) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for name, h := range s.by {
		if network == "" || network == name {
			hs = append(hs, h)
		}
	}
	return hs
}

// ofNetwork is the key of a network's name in a context.
type ofNetwork struct{}

// forNetwork returns a context in which records without a network are this one's: the
// stores of models and images are the machine's, and work for one network at a time.
func forNetwork(ctx context.Context, network string) context.Context {
	return context.WithValue(ctx, ofNetwork{}, network)
}

// newRecords returns a handler before any spool is there.
func newRecords(journal slog.Handler) *records {
	return &records{journal: journal, to: &spools{by: map[string]slog.Handler{}}}
}

// Enabled implements [slog.Handler].
func (r *records) Enabled(ctx context.Context, level slog.Level) bool {
	if r.journal.Enabled(ctx, level) {
		return true
	}
	for _, h := range r.to.handlers(r.network) {
		if h.Enabled(ctx, level) {
			return true
		}
	}
	return false
}

// Handle implements [slog.Handler].
func (r *records) Handle(ctx context.Context, rec slog.Record) error {
	network := r.network
	rec.Attrs(func(a slog.Attr) bool {
		if a.Key == "network" {
			network = a.Value.String()
		}
		return true
	})
	if of, _ := ctx.Value(ofNetwork{}).(string); network == "" && of != "" {
		network, rec = of, rec.Clone()
		rec.AddAttrs(slog.String("network", of))
	}
	var errs []error
	if r.journal.Enabled(ctx, rec.Level) {
		errs = append(errs, r.journal.Handle(ctx, rec.Clone()))
	}
	for _, h := range r.to.handlers(network) {
		if !h.Enabled(ctx, rec.Level) {
			continue
		}
		for _, f := range r.more {
			h = f(h)
		}
		errs = append(errs, h.Handle(ctx, rec.Clone()))
	}
	return errors.Join(errs...)
}

// WithAttrs implements [slog.Handler].
func (r *records) WithAttrs(attrs []slog.Attr) slog.Handler {
	n := r.with(func(h slog.Handler) slog.Handler { return h.WithAttrs(attrs) })
	for _, a := range attrs {
		if a.Key == "network" {
			n.network = a.Value.String()
		}
	}
	return n
}

// WithGroup implements [slog.Handler].
func (r *records) WithGroup(name string) slog.Handler {
	return r.with(func(h slog.Handler) slog.Handler { return h.WithGroup(name) })
}

func (r *records) with(f func(slog.Handler) slog.Handler) *records {
	n := *r
	n.journal, n.more = f(r.journal), append(r.more[:len(r.more):len(r.more)], f)
	return &n
}
