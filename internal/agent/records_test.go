package agent

import (
	"bytes"
	"log/slog"
	"regexp"
	"strings"
	"testing"
)

// What is a network's goes to the journal and to that network alone; the machine's
// own goes to all.
func TestRecordsGoToTheirNetwork(t *testing.T) {
	var journal, a, b bytes.Buffer
	r := newRecords(slog.NewTextHandler(&journal, nil))
	machine := slog.New(r)
	ofA := machine.With("network", "a").With("x", 1)
	r.to.add("a", slog.NewTextHandler(&a, nil))
	r.to.add("b", slog.NewTextHandler(&b, nil))
	machine.Info("machine")
	ofA.WithGroup("g").Info("one", "job", "secret")
	machine.Info("second", "network", "b")
	machine.WarnContext(forNetwork(t.Context(), "a"), "store")
	ofA.InfoContext(forNetwork(t.Context(), "b"), "own")
	machine.Debug("nothing")
	for name, c := range map[string]struct {
		buf        *bytes.Buffer
		has, lacks string
	}{
		"journal": {&journal, "msg=machine one second store own", "nothing"}, "a": {&a, "msg=machine one g.job=secret level=WARN own", "second"}, "b": {&b, "msg=machine second", "one job nothing store own"},
	} {
		text := c.buf.String()
		t.Logf("%s: expected: %q and not %q; got: %q", name, c.has, c.lacks, regexp.MustCompile(`msg="?\w+`).FindAllString(text, -1))
		for _, w := range strings.Fields(c.has) {
			if strings.Count(text, w) != 1 {
				t.Errorf("%s: %q is not there once:\n%s", name, w, text)
			}
		}
		for _, w := range strings.Fields(c.lacks) {
			if strings.Contains(text, w) {
				t.Errorf("%s has %q:\n%s", name, w, text)
			}
		}
	}
}
