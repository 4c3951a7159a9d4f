package rules

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

var (
	declared = regexp.MustCompile(`(?m)^(?:var |\t)(\w+)\s+= event\("[0-9a-f]{32}", "([a-z-]+)"`)
	refusal  = regexp.MustCompile(`-(refused|wrong)$`)
)

// An event that no program logs explains what never happens. A refusal whose event no
// test looks for may be logged as anything.
func TestEventsAreSaid(t *testing.T) {
	text, err := os.ReadFile(filepath.Join(root, "internal/journal/events.go"))
	if err != nil {
		t.Fatal(err)
	}
	var programs, tests strings.Builder
	for _, p := range list(t) {
		if strings.HasSuffix(p.ImportPath, "/internal/journal") {
			continue
		}
		files, err := filepath.Glob(filepath.Join(root, strings.TrimPrefix(p.ImportPath, module), "*.go"))
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range files {
			b, err := os.ReadFile(f)
			if err != nil {
				t.Fatal(err)
			}
			if strings.HasSuffix(f, "_test.go") || strings.Contains(p.ImportPath, "/test/") {
				tests.Write(b)
			} else {
				programs.Write(b)
			}
		}
	}
	events := declared.FindAllStringSubmatch(string(text), -1)
	if len(events) < 100 {
		t.Fatalf("only %d events; has their form changed?", len(events))
	}
	for _, e := range events {
		used := regexp.MustCompile(`\bjournal\.` + e[1] + `\b`)
		if !used.MatchString(programs.String()) {
			t.Errorf("no program logs %s", e[2])
		}
		if refusal.MatchString(e[2]) && !used.MatchString(tests.String()) && !strings.Contains(tests.String(), `"`+e[2]+`"`) {
			t.Errorf("no test looks for %s", e[2])
		}
	}
}
