package main

import (
	"bytes"
	"os"
	"strings"
	"testing"

	"github.com/resultity/node/internal/gate"
	"github.com/resultity/node/internal/journal"
)

func TestReadmeIsCurrent(t *testing.T) {
	got, err := os.ReadFile("../../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	want, err := fill(got)
	if err != nil || !bytes.Equal(got, want) {
		t.Fatalf("README.md is not current (%v): run go generate ./internal/journal", err)
	}
	for _, a := range gate.List {
		if !strings.Contains(string(got), "| "+a.Name+" | "+a.Asks+" | "+a.Remedy+" |") {
			t.Errorf("no gate %s", a.Name)
		}
	}
	for _, e := range []*journal.Event{journal.ConfigInvalid, journal.ClockWrong, journal.NotRoutable, journal.RuntimeLost} {
		if !strings.Contains(string(got), "`"+e.Name+"`") {
			t.Errorf("no event %s", e.Name)
		}
	}
	if strings.Contains(string(got), "`"+journal.JobDone.Name+"`") {
		t.Error("a job that is done is no trouble")
	}
}

func TestFill(t *testing.T) {
	got, err := fill([]byte("a\n" + begin + "OLD TEXT\n" + end + "b\n"))
	if err != nil || !strings.HasPrefix(string(got), "a\n"+begin) || !strings.HasSuffix(string(got), end+"b\n") || strings.Contains(string(got), "OLD TEXT") {
		t.Errorf("%s, %v", got, err)
	}
	for _, s := range []string{"", begin, end, end + begin} {
		if _, err := fill([]byte(s)); err == nil {
			t.Errorf("%q has both markers in their order", s)
		}
	}
}
