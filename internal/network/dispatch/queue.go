package dispatch

import (
	"container/list"
	"iter"
)

// queue holds the jobs that wait for a node, in a lane for each client. Lanes
// take turns; within one, first come, first served. Guarded by Dispatcher.mu.
type queue struct {
	lanes  map[string]*lane // clients that have unfinished jobs
	ring   list.List        // of the *lane that have waiting ones, the next first
	len    int              // jobs that wait
	places int              // of these, the ones that a client waits for
}

// lane is what one client has.
type lane struct {
	client string
	jobs   list.List     // of *job that wait
	turn   *list.Element // in queue.ring, or nil
	cursor *list.Element // where pump is
	places int           // jobs that wait and are waited for
	open   int           // unfinished jobs
	bytes  int64         // of their requests
}

// open makes an unfinished job known, close forgets it.
func (q *queue) open(j *job) {
	l := q.lanes[j.spec.Client]
	if l == nil {
		l = &lane{client: j.spec.Client}
		q.lanes[l.client] = l
	}
	j.lane = l
	l.open++
	l.bytes += int64(len(j.spec.Request))
}

func (q *queue) close(j *job) {
	q.remove(j)
	l := j.lane
	l.open--
	l.bytes -= int64(len(j.spec.Request))
	if l.open == 0 {
		delete(q.lanes, l.client)
	}
}

// push puts a job behind its client's others, or, when it had its turn before,
// ahead of them.
func (q *queue) push(j *job, ahead bool) {
	l := j.lane
	if ahead {
		j.place = l.jobs.PushFront(j)
	} else {
		j.place = l.jobs.PushBack(j)
	}
	if l.turn == nil {
		l.turn = q.ring.PushBack(l)
	}
	q.count(j, 1)
}

// remove takes a job out, if it is in.
func (q *queue) remove(j *job) {
	if j.place == nil {
		return
	}
	l := j.lane
	l.jobs.Remove(j.place)
	j.place = nil
	if l.jobs.Len() == 0 {
		q.ring.Remove(l.turn)
		l.turn = nil
	}
	q.count(j, -1)
}

func (q *queue) count(j *job, n int) {
	q.len += n
	if j.attached {
		q.places += n
		j.lane.places += n
	}
}

// all yields every job that waits.
func (q *queue) all() iter.Seq[*job] {
	return func(yield func(*job) bool) {
		for t := q.ring.Front(); t != nil; t = t.Next() {
			for e := t.Value.(*lane).jobs.Front(); e != nil; e = e.Next() {
				if !yield(e.Value.(*job)) {
					return
				}
			}
		}
	}
}

// match goes through the jobs that wait, client by client in turns, each job
// once, and hands each to take, until that reports that there is nothing more
// to give. taken says that take has removed the job from the queue.
func (q *queue) match(take func(*job) (taken, more bool)) {
	for t := q.ring.Front(); t != nil; t = t.Next() {
		l := t.Value.(*lane)
		l.cursor = l.jobs.Front()
	}
	for t := q.ring.Front(); t != nil; {
		l, next := t.Value.(*lane), t.Next()
		taken, more := false, true
		for l.cursor != nil && !taken && more {
			j := l.cursor.Value.(*job)
			l.cursor = l.cursor.Next()
			taken, more = take(j)
		}
		if taken && l.turn != nil { // the others are first
			q.ring.MoveToBack(t)
			if next == nil {
				next = t
			}
		}
		if !more {
			return
		}
		t = next
	}
}
