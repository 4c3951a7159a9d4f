package work

import "time"

// Ended says which jobs ended, all since the worker was made.
type Ended struct {
	Done   int // in the last day with an answer
	Failed int // in the last day without one
	Last   time.Time
}

// Ended counts the jobs whose results were stored.
func (w *Worker) Ended() Ended {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.tally.lastDay(w.cfg.Now())
}

// tally counts the jobs of the last 24 hours, by the hour.
type tally struct {
	hours [24]hour
	last  time.Time
}

type hour struct {
	at           int64 // Unix time in hours; what the others count is older
	done, failed int
}

// count notes the end of a job.
func (t *tally) count(now time.Time, failed bool) {
	at := now.Unix() / 3600
	h := &t.hours[((at%24)+24)%24]
	if h.at != at {
		*h = hour{at: at}
	}
	if failed {
		h.failed++
	} else {
		h.done++
	}
	t.last = now
}

// lastDay adds up this hour and the 23 before it.
func (t *tally) lastDay(now time.Time) Ended {
	e := Ended{Last: t.last}
	at := now.Unix() / 3600
	for _, h := range t.hours {
		if h.at > at-24 && h.at <= at {
			e.Done += h.done
			e.Failed += h.failed
		}
	}
	return e
}
