package agent

import (
	"sync"
	"time"

	"github.com/resultity/node/internal/deploy"
	"github.com/resultity/node/internal/generation"
	"github.com/resultity/node/internal/snapshot"
	"github.com/resultity/node/internal/systemd"
	"github.com/resultity/node/internal/work"
)

// Phases of a switch, beside those of [deploy.Deployer.Apply].
const (
	phaseStage = "stage" // fetch and verify, while the old one serves
	phaseWarm  = "warm"  // read the model into memory, while the old one serves
	phaseDrain = "drain" // no new jobs; those that run end
	phaseAdmit = "admit" // jobs again
)

// phases measures one phase after the other. It is used by one goroutine.
type phases struct {
	done  []generation.Phase
	tell  func(generation.Phase) // each, when it has ended; may be nil
	name  string                 // of the one under way; "" for none
	start time.Time
}

func newPhases() *phases { return &phases{} }

// begin ends the phase under way and begins another.
func (p *phases) begin(name string) {
	p.end()
	p.name, p.start = name, time.Now()
}

// end ends the phase under way and returns all.
func (p *phases) end() []generation.Phase {
	if p.name != "" {
		f := generation.Phase{Name: p.name, TookMS: time.Since(p.start).Milliseconds()}
		p.done, p.name = append(p.done, f), ""
		if p.tell != nil {
			p.tell(f)
		}
	}
	return p.done
}

// door is between jobs and the runtime. The update loop opens it for the start
// of the unit that it has validated; whoever sees another start shuts it at once.
type door struct {
	mu     sync.Mutex // guards what follows, also while the worker is told
	dep    *deploy.Deployment
	active *work.Active
	isShut bool
	alarms int    // checks that have shut it
	doubt  string // why dep's engine is suspect; "" when it is not
}

// open lets jobs to a validated deployment; nil for none.
func (d *door) open(w *work.Worker, dep *deploy.Deployment, active *work.Active) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.dep, d.active, d.isShut, d.doubt = dep, active, false, ""
	w.SetActive(active)
}

// shut ends the admission of jobs.
func (d *door) shut(w *work.Worker) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.isShut = true
	w.SetActive(nil)
}

// alarm returns what tells [door.reopen] of a check that comes after this call.
func (d *door) alarm() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.alarms
}

// reopen undoes shut, and a check that was of an older state: the caller has seen
// the right start of the unit after it got since from alarm.
func (d *door) reopen(w *work.Worker, since int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.alarms == since && d.isShut && d.active != nil && d.doubt == "" {
		d.isShut = false
		w.SetActive(d.active)
	}
}

// check shuts the door if the unit is not in the start that was validated.
func (d *door) check(w *work.Worker, unit systemd.State) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.dep != nil && !d.dep.Current(unit) {
		d.isShut = true
		d.alarms++
		w.SetActive(nil)
	}
}

// suspect shuts the door to an engine that fails job after job.
func (d *door) suspect(w *work.Worker, active *work.Active, why string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.active == active {
		d.isShut, d.doubt = true, why
		w.SetActive(nil)
	}
}

// serves returns the configuration that jobs are let to, or nil.
func (d *door) serves() *snapshot.Snapshot {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.dep == nil {
		return nil
	}
	return d.dep.Snapshot()
}

// serving returns the deployment that the door is of, or nil.
func (d *door) serving() *deploy.Deployment {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.dep
}

// doubted returns why the engine is suspect, "" when it is not.
func (d *door) doubted() string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.doubt
}
