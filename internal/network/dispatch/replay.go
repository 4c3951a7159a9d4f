package dispatch

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/evm"
	"github.com/resultity/node/internal/network/store"
	"github.com/resultity/node/internal/receipt"
	"github.com/resultity/node/internal/wire"
)

// Replay is a job that is given out once more, to one node of a class, so that its
// answers can be compared. To the node it is a job like any other: it has an id of
// its own, and its result is stored. To the network it is nobody's: it is not
// written down, is not counted among the jobs, and no client waits for it.
type Replay struct {
	Kind    wire.Kind
	Model   string
	Stream  bool
	Request []byte // which must not change any more
	Seed    *uint32
	Class   digest.Digest // determinism class of the node
	First   evm.Address   // the node that answered first: another one is asked
	Account string        // of that node: one of another account is asked, if there is one
	Asked   []evm.Address // who is not to be asked again
	Node    *evm.Address  // the one that is to be asked, also the first; nil for any
}

// Second is a node that was given a replay.
type Second struct {
	Node    evm.Address
	Account string
}

// replayer is the lane of replays. No API key is named so.
const replayer = "(replay)"

var notThere = &Failure{Outcome: NoNode, Message: "the node that was to answer is not ready any more"}

// SubmitReplay gives a replay to a node, and returns which. The error is a
// [*Failure].
func (d *Dispatcher) SubmitReplay(r Replay) (*Ticket, Second, error) {
	now := time.Now()
	seed := rand.Uint32()
	if r.Seed != nil {
		seed = *r.Seed
	}
	rec := &store.Job{Client: replayer, Job: wire.Job{
		ID: receipt.NewJobID(), Model: r.Model, Kind: r.Kind, Stream: r.Stream, Request: r.Request, Seed: seed, Created: now.Unix(),
	}}
	hash := digest.Of(r.Request)

	d.mu.Lock()
	defer d.mu.Unlock()
	n, why := d.replayNode(&r)
	if why != "" {
		return nil, Second{}, &Failure{Outcome: NoNode, Message: why}
	}
	if f := d.refuse(replayer, int64(len(r.Request)), now); f != nil {
		return nil, Second{}, f
	}
	rec.Config = d.terms.Digest
	rec.Deadline = now.Add(d.terms.Config.Limits.Deadline.Duration()).UnixMilli()
	j := newJob(rec, hash, d.terms, now)
	j.only, j.attached = n, true
	j.record = unwritten // nothing is lost with it
	close(j.lost)
	d.add(j)
	d.queue.push(j, false)
	d.pump()
	d.arm(j)
	return &Ticket{d: d, j: j}, Second{n.addr, n.account}, nil
}

// replayNode chooses the least busy node that may answer, of another account than the
// first one's where there is such, or says why there is none.
func (d *Dispatcher) replayNode(r *Replay) (*node, string) {
	if r.Node != nil {
		switch n := d.nodes[*r.Node]; {
		case n == nil || n.member == nil:
			return nil, fmt.Sprintf("node %s is not connected", *r.Node)
		case !n.inClass(r.Class):
			return nil, fmt.Sprintf("node %s is not of class %s, as the one that answered first: its answer could rightly be another one", *r.Node, r.Class)
		case !n.routable:
			return nil, fmt.Sprintf("node %s gets no jobs: %s", *r.Node, d.assess(n, time.Now()))
		default:
			return n, ""
		}
	}
	var best *node
	for _, n := range d.nodes {
		if n.addr == r.First || !n.routable || !n.inClass(r.Class) || slices.Contains(r.Asked, n.addr) {
			continue
		}
		own := func(n *node) bool { return r.Account != "" && n.account == r.Account }
		switch {
		case best == nil, own(best) && !own(n):
			best = n
		case own(n) && !own(best):
		case (nodeHeap{n, best}).Less(0, 1):
			best = n
		}
	}
	if best == nil {
		return nil, fmt.Sprintf("no other node of class %s is ready: resultity-network nodes shows the classes, and --node names a node, also the first one", r.Class)
	}
	return best, ""
}

func (n *node) inClass(class digest.Digest) bool { return n.class() == class }

// class is the determinism class that the node names, [receipt.Unknown] for none.
func (n *node) class() digest.Digest {
	if n.beat == nil || n.beat.Class == nil {
		return receipt.Unknown
	}
	return n.beat.Class.Digest
}

// keepRequest keeps a job whose result is stored, for replays. Nothing rests on it.
func (d *Dispatcher) keepRequest(ctx context.Context, rec *store.Job) {
	if err := d.store.KeepRequest(ctx, rec); err != nil && d.store.Accepting() == nil { // else it has been said why
		d.log.Warn("request is not kept for a replay", "job", rec.ID, "error", err)
	}
}
