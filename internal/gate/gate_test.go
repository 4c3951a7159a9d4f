package gate

import (
	"encoding/json"
	"testing"
)

func TestOrderAndFirstClosed(t *testing.T) {
	gs := []Gate{{Name: "later"}, {Name: Routable}, {Name: Session, State: Open}, {Name: Clock, State: Unknown}, {Name: Account, State: Open}}
	Order(gs)
	for i, want := range []string{Account, Clock, Session, Routable, "later"} {
		if gs[i].Name != want {
			t.Errorf("gate %d is %s, want %s", i, gs[i].Name, want)
		}
	}
	if g := FirstClosed(gs); g == nil || g.Name != Routable {
		t.Errorf("first closed is %+v: what is unknown is not closed", g)
	}
	if g := FirstClosed(gs[:3]); g != nil {
		t.Errorf("%+v is closed", g)
	}
}

func TestStatesAreWords(t *testing.T) {
	for s, want := range map[State]string{Closed: `"closed"`, Open: `"open"`, Unknown: `"unknown"`} {
		raw, err := json.Marshal(s)
		if err != nil || string(raw) != want {
			t.Errorf("%s, %v; want %s", raw, err, want)
		}
		var back State
		if err := json.Unmarshal(raw, &back); err != nil || back != s {
			t.Errorf("%v, %v; want %v", back, err, s)
		}
	}
	var s State
	if json.Unmarshal([]byte(`"ajar"`), &s) == nil || json.Unmarshal([]byte(`true`), &s) == nil {
		t.Error("what is no state was taken for one")
	}
}
