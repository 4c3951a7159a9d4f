package agent

import (
	"context"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"sync"
	"syscall"
	"time"

	"github.com/resultity/node/internal/deploy"
	"github.com/resultity/node/internal/gate"
	"github.com/resultity/node/internal/preflight"
	"github.com/resultity/node/internal/signer"
)

// Of the look at the machine.
const (
	lookAtMost = 3 * time.Second  // one look takes; who asks for the status waits that long
	lookFresh  = 2 * time.Second  // within which a look is not repeated
	lookAgain  = 10 * time.Minute // when nobody asks; Podman's service may sleep in between
	watchEvery = 10 * time.Second // the agent looks at what it knows by itself
)

// sightings is what was seen of the gates, and since when they are closed.
type sightings struct {
	looking sync.Mutex // held during a look at the machine
	mu      sync.Mutex // guards what follows; held only to copy values
	machine []gate.Gate
	at      time.Time
	closed  map[[2]string]time.Time // by network and name
}

// note remembers since when gates are closed and writes it into them.
func (s *sightings) note(gs []gate.Gate, now time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed == nil {
		s.closed = map[[2]string]time.Time{}
	}
	for i := range gs {
		g := &gs[i]
		if g.State != gate.Closed {
			delete(s.closed, [2]string{g.Network, g.Name})
			continue
		}
		if _, known := s.closed[[2]string{g.Network, g.Name}]; !known {
			s.closed[[2]string{g.Network, g.Name}] = now.Truncate(time.Second)
		}
		g.Since = new(s.closed[[2]string{g.Network, g.Name}])
	}
}

// machineGates returns what look saw, which is looked at again when that was
// longer ago than fresh.
func (s *sightings) machineGates(look func(context.Context) []gate.Gate, fresh time.Duration) []gate.Gate {
	if look == nil {
		return nil
	}
	s.looking.Lock()
	defer s.looking.Unlock()
	s.mu.Lock()
	last, at := s.machine, s.at
	s.mu.Unlock()
	if last != nil && time.Since(at) < fresh {
		return last
	}
	ctx, cancel := context.WithTimeout(context.Background(), lookAtMost)
	defer cancel()
	last = look(ctx)
	s.mu.Lock()
	s.machine, s.at = last, time.Now()
	s.mu.Unlock()
	return last
}

// gates walks from the machine to the network's own word.
func (a *Agent) gates() []gate.Gate { return a.lookAtGates(lookFresh) }

// watchGates looks at the gates when nobody asks, so that status can say since
// when one is closed.
func (a *Agent) watchGates(ctx context.Context) error {
	tick := time.NewTicker(watchEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
			a.lookAtGates(lookAgain)
		}
	}
}

func (a *Agent) lookAtGates(fresh time.Duration) []gate.Gate {
	now := time.Now()
	gs := append([]gate.Gate(nil), a.seen.machineGates(a.machine, fresh)...)
	if a.machine != nil {
		gs = append(gs, gate.Gate{Name: gate.Agent, State: gate.Open, Detail: "runs, " + a.version})
	}
	id := preflight.Identity(filepath.Join(a.cfg.Paths.State, "identity"))
	if id.State != gate.Closed { // else it was loosened since the start, which would have refused it
		id = gate.Gate{Name: gate.Identity, State: gate.Open, Detail: "node " + a.key.Address().Hex() + ", " + a.holder()}
	}
	gs = append(gs, id)
	for _, m := range a.members {
		gs = append(gs, m.board.gates(m.drains(m.worker.Status()), now)...)
	}
	for _, r := range a.refused {
		gs = append(gs, gate.Gate{Name: gate.Registration, Network: r.network, Detail: "this network could not be joined: " + r.err.Error(), Remedy: "mend what the detail names, and restart the agent"})
	}
	a.seen.note(gs, now)
	return gs
}

// holder says who has the key.
func (a *Agent) holder() string {
	switch {
	case a.held == nil:
		return "key held by resultity-signer"
	case a.cfg.Identity.Signer == "" && syscall.Access(signer.SocketPath, accessWrite) == nil:
		return "key in the agent, although resultity-signer is here: sudo resultity-signer migrate"
	}
	return "key in the agent"
}

// lookAround asks preflight about this machine.
func (a *Agent) lookAround(ctx context.Context) []gate.Gate { return a.surroundings().Gates(ctx) }

// surroundings describes the machine, as far as the agent knows it.
func (a *Agent) surroundings() *preflight.Machine {
	m := &preflight.Machine{
		Root: "/", Account: os.Getenv("USER"), UID: os.Getuid(), Socket: a.cfg.Paths.Podman, State: a.cfg.Paths.State,
		Running: true, Window: 30 * time.Second,
	}
	// An account that is in no file, such as a directory service's, is named by
	// the service manager alone.
	if u, err := user.LookupId(strconv.Itoa(m.UID)); err == nil {
		m.Account = u.Username
	}
	for i, n := range a.members {
		m.Need = max(m.Need, n.board.missing())
		window := 30 * time.Second
		if s := n.board.snapshot(); s != nil && s.Config().Network.ClockWindow > 0 {
			window = s.Config().Network.ClockWindow.Duration()
		}
		var off *time.Duration
		if n.ahead != nil {
			off = n.ahead()
		}
		if i == 0 || off != nil && off.Abs() > window { // the first, or one that is too far from it
			m.Window, m.Offset = window, off
		}
	}
	return m
}

// missing returns the bytes of the snapshot's models that are not here yet, once
// the model store has said how much is.
func (b *board) missing() (n int64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.snap == nil || b.step != deploy.StepModel {
		return 0
	}
	for i := range b.snap.Config().Models {
		m := &b.snap.Config().Models[i]
		n += max(0, m.Size()-b.models[m.Digest()])
	}
	return n
}
