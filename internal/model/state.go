package model

// State is what a model is to a node, as heartbeats and status show it.
type State string

// The states of a model that the configuration lists. One that it does not list has
// none: it is removed.
const (
	Pending  State = "pending"  // not complete on disk
	Active   State = "active"   // complete, and the runtime that is validated serves it
	Inactive State = "inactive" // complete, and not served
	Failed   State = "failed"   // could not be had, is refused, or was found damaged; it is tried again
	Archived State = "archived" // kept if it is here; neither fetched nor served
)

// Facts decide a model's state. Nothing remembers a state: it is looked at anew each
// time, so that it cannot be another one than that of the disk and the runtime.
type Facts struct {
	Archived bool // by the configuration
	Complete bool // all of it is verified on disk
	Served   bool // by a runtime that has been validated with it
	Failed   bool // the last attempt to have it ended so, and none has succeeded since
}

// State returns the state. What is archived is served by nobody, whatever else is
// so; what is served is as good as it was when it was validated, until it is found
// damaged, which ends its service first.
func (f Facts) State() State {
	switch {
	case f.Archived:
		return Archived
	case f.Served:
		return Active
	case f.Failed:
		return Failed
	case f.Complete:
		return Inactive
	}
	return Pending
}
