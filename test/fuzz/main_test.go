package main

import "testing"

func TestBudget(t *testing.T) {
	for text, ok := range map[string]bool{"5m": true, "2000x": true, "0x": false, "x": false, "-1s": false, "2000": false, "": false} {
		var b budget
		if err := b.Set(text); (err == nil) != ok || ok && string(b) != text {
			t.Errorf("%q: %q, %v", text, b, err)
		}
	}
}

func TestEndIsNoFinding(t *testing.T) {
	for text, want := range map[string]bool{
		"fuzz: elapsed: 21s\n--- FAIL: FuzzX (21.04s)\n    context deadline exceeded\nFAIL\nexit status 1\n":                     true,
		"--- FAIL: FuzzX (1.04s)\n    --- FAIL: FuzzX (0.00s)\n        x_test.go:1: context deadline exceeded\n    \nFAIL\n":     false,
		"--- FAIL: FuzzX (9s)\n    fuzzing process hung or terminated unexpectedly: EOF\n    Failing input written to a\nFAIL\n": false,
	} {
		if got := ended.MatchString(text); got != want {
			t.Errorf("%v of %q", got, text)
		}
	}
	if at := last(found, "    Failing input written to testdata/fuzz/FuzzX/ab\n    To re-run:", ""); at != "testdata/fuzz/FuzzX/ab" {
		t.Errorf("found in %q", at)
	}
}
