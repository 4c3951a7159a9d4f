// Package journal owns how the programs log: a slog handler that writes
// structured records to the systemd journal, or text to stderr where there is
// none, and the list of events that operators can look up.
//
// The rule it keeps: a record has a constant message, and its facts are
// fields. No prompt and no output text is ever a field.
package journal

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"strconv"
	"strings"

	"github.com/coreos/go-systemd/v22/journal"
)

// FieldPrefix begins the name of every field of ours in the journal.
const FieldPrefix = "RESULTITY_"

// New returns a logger for a program whose stderr is w. When w is connected to
// the journal, records go there with their fields; otherwise they are lines of
// text. Safe for concurrent use.
func New(w io.Writer, level slog.Level) *slog.Logger { return newLogger(w, level, false) }

// NewWithFacts is New for a program whose records are about many: the message has the
// fields, too, so that journalctl shows who each is about.
func NewWithFacts(w io.Writer, level slog.Level) *slog.Logger { return newLogger(w, level, true) }

func newLogger(w io.Writer, level slog.Level, facts bool) *slog.Logger {
	if ok, err := journal.StderrIsJournalStream(); err == nil && ok && w == io.Writer(os.Stderr) {
		return slog.New(&handler{level: level, send: journal.Send, facts: facts})
	}
	return slog.New(Text(w, level))
}

// Text returns the handler for people: one line a record, with the event's
// name instead of its id.
func Text(w io.Writer, level slog.Level) slog.Handler {
	return slog.NewTextHandler(w, &slog.HandlerOptions{
		Level: level,
		ReplaceAttr: func(groups []string, a slog.Attr) slog.Attr {
			if e, ok := a.Value.Any().(*Event); ok && len(groups) == 0 {
				return slog.String("event", e.Name)
			}
			return a
		},
	})
}

// handler sends records to the journal's socket. Its fields are immutable; each
// With makes a new handler.
type handler struct {
	level  slog.Level
	send   func(message string, priority journal.Priority, fields map[string]string) error
	facts  bool // the message has the fields, too
	fields []field
	prefix string // of open groups
}

type field struct{ name, value string }

// fact is the field in a message, "" for what is not for people.
func (f field) fact() string {
	name, ok := strings.CutPrefix(f.name, FieldPrefix)
	if !ok {
		return ""
	}
	value := f.value
	if value == "" || strings.ContainsFunc(value, func(r rune) bool { return r == ' ' || r == '"' || !strconv.IsPrint(r) }) {
		value = strconv.Quote(value)
	}
	return " " + strings.ToLower(name) + "=" + value
}

// Enabled implements [slog.Handler].
func (h *handler) Enabled(_ context.Context, l slog.Level) bool { return l >= h.level }

// Handle implements [slog.Handler]. The message gets the error, since it is all
// that journalctl shows of a record.
func (h *handler) Handle(_ context.Context, r slog.Record) error {
	fields := make(map[string]string, len(h.fields)+r.NumAttrs())
	for _, f := range h.fields {
		fields[f.name] = f.value
	}
	message, facts := r.Message, ""
	for _, f := range h.fields {
		facts += f.fact()
	}
	r.Attrs(func(a slog.Attr) bool {
		if a.Key == "error" {
			message += ": " + a.Value.String()
		}
		for _, f := range flatten(h.prefix, a) {
			fields[f.name] = f.value
			if a.Key != "error" {
				facts += f.fact()
			}
		}
		return true
	})
	if h.facts {
		message += facts
	}
	return h.send(message, priority(r.Level), fields)
}

// WithAttrs implements [slog.Handler].
func (h *handler) WithAttrs(attrs []slog.Attr) slog.Handler {
	n := *h
	n.fields = append([]field(nil), h.fields...)
	for _, a := range attrs {
		n.fields = append(n.fields, flatten(h.prefix, a)...)
	}
	return &n
}

// WithGroup implements [slog.Handler].
func (h *handler) WithGroup(name string) slog.Handler {
	if name == "" {
		return h
	}
	n := *h
	n.prefix += name + "_"
	return &n
}

// flatten turns an attribute into journal fields. The journal takes names of
// upper-case letters, digits and underscores, and silently drops a record's
// other fields, so that names are mapped here and not left to it.
func flatten(prefix string, a slog.Attr) []field {
	v := a.Value.Resolve()
	if e, ok := v.Any().(*Event); ok {
		return []field{{"MESSAGE_ID", e.ID}, {FieldPrefix + "EVENT", e.Name}}
	}
	if v.Kind() == slog.KindGroup {
		if a.Key != "" {
			prefix += a.Key + "_"
		}
		var fs []field
		for _, g := range v.Group() {
			fs = append(fs, flatten(prefix, g)...)
		}
		return fs
	}
	if a.Key == "" {
		return nil
	}
	return []field{{FieldPrefix + fieldName(prefix+a.Key), fmt.Sprint(v.Any())}}
}

func fieldName(s string) string {
	return strings.Map(func(r rune) rune {
		switch {
		case r >= 'a' && r <= 'z':
			return r - 'a' + 'A'
		case r >= 'A' && r <= 'Z', r >= '0' && r <= '9', r == '_':
			return r
		}
		return '_'
	}, s)
}

func priority(l slog.Level) journal.Priority {
	switch {
	case l >= slog.LevelError:
		return journal.PriErr
	case l >= slog.LevelWarn:
		return journal.PriWarning
	case l >= slog.LevelInfo:
		return journal.PriInfo
	}
	return journal.PriDebug
}
