package work

import (
	"testing"
	"time"
)

func TestTallyForgetsAfterADay(t *testing.T) {
	var c tally
	begin := time.Unix(1_000_000_000, 0)
	for i := range 30 { // an hour each
		c.count(begin.Add(time.Duration(i)*time.Hour), i%3 == 0)
	}
	last := begin.Add(29 * time.Hour)
	if e := c.lastDay(last); e != (Ended{16, 8, last}) {
		t.Errorf("%+v", e)
	}
	if e := c.lastDay(last.Add(23 * time.Hour)); e != (Ended{1, 0, last}) {
		t.Errorf("after 23 h: %+v", e)
	}
	if e := c.lastDay(last.Add(48 * time.Hour)); e != (Ended{0, 0, last}) {
		t.Errorf("after two days: %+v", e)
	}
}
