package model

import "testing"

// TestStates walks from each state through everything that can happen to a model.
// The names of its cases, "state: event", are stable.
func TestStates(t *testing.T) {
	start := map[State]Facts{
		Pending:  {},
		Inactive: {Complete: true},
		Active:   {Complete: true, Served: true},
		Failed:   {Failed: true},
		Archived: {Archived: true, Complete: true},
	}
	events := map[string]func(f *Facts){
		"fetched":       func(f *Facts) { f.Complete, f.Failed = true, false },
		"not to be had": func(f *Facts) { f.Complete, f.Served, f.Failed = false, false, true },
		"refused":       func(f *Facts) { f.Complete, f.Served, f.Failed = false, false, true },
		"validated":     func(f *Facts) { f.Served = f.Complete && !f.Archived },
		"superseded":    func(f *Facts) { f.Served = false },
		"damaged":       func(f *Facts) { f.Complete, f.Served, f.Failed = false, false, true },
		"repaired":      func(f *Facts) { f.Complete, f.Failed = true, false },
		"archived":      func(f *Facts) { f.Archived, f.Served = true, false },
		"listed again":  func(f *Facts) { f.Archived = false },
	}
	for from, to := range map[State]map[string]State{
		Pending: {
			"fetched": Inactive, "not to be had": Failed, "refused": Failed, "validated": Pending, "superseded": Pending,
			"damaged": Failed, "repaired": Inactive, "archived": Archived, "listed again": Pending,
		},
		Inactive: {
			"fetched": Inactive, "not to be had": Failed, "refused": Failed, "validated": Active, "superseded": Inactive,
			"damaged": Failed, "repaired": Inactive, "archived": Archived, "listed again": Inactive,
		},
		Active: {
			"fetched": Active, "not to be had": Failed, "refused": Failed, "validated": Active, "superseded": Inactive,
			"damaged": Failed, "repaired": Active, "archived": Archived, "listed again": Active,
		},
		Failed: {
			"fetched": Inactive, "not to be had": Failed, "refused": Failed, "validated": Failed, "superseded": Failed,
			"damaged": Failed, "repaired": Inactive, "archived": Archived, "listed again": Failed,
		},
		Archived: {
			"fetched": Archived, "not to be had": Archived, "refused": Archived, "validated": Archived, "superseded": Archived,
			"damaged": Archived, "repaired": Archived, "archived": Archived, "listed again": Inactive,
		},
	} {
		if got := start[from].State(); got != from {
			t.Errorf("%s begins as %s", from, got)
		}
		for name, happen := range events {
			t.Run(string(from)+": "+name, func(t *testing.T) {
				f := start[from]
				happen(&f)
				if got := f.State(); got != to[name] {
					t.Errorf("%s, want %s", got, to[name])
				}
			})
		}
	}
	// What is forbidden whatever the facts are.
	for n := range 16 {
		f := Facts{n&1 != 0, n&2 != 0, n&4 != 0, n&8 != 0}
		if s := f.State(); f.Archived && s != Archived || !f.Served && s == Active || f.Failed && s == Inactive || !f.Complete && s == Inactive {
			t.Errorf("%+v is %s", f, s)
		}
	}
}
