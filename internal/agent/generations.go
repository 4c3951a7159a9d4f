package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/resultity/node/internal/control"
	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/generation"
	"github.com/resultity/node/internal/journal"
	"github.com/resultity/node/internal/wire"
)

// wordPatience is how long the operator's word waits for the update loop; whoever
// gives it waits a little longer.
const wordPatience = 8 * time.Second

// steer has the update loop do what the operator says.
func (a *Agent) steer(ctx context.Context, do func(*updater) error) error {
	ctx, cancel := context.WithTimeout(ctx, wordPatience)
	defer cancel()
	err := a.inUpdates(ctx, func(u *updater, _ context.Context) error { return do(u) })
	if errors.Is(err, context.DeadlineExceeded) {
		return fmt.Errorf("%w: a switch is under way: look at resultityctl generations, and try again", control.ErrRefused)
	}
	return err
}

// Rollback implements [control.Backend].
func (a *Agent) Rollback(ctx context.Context, n int) error {
	return a.steer(ctx, func(u *updater) error { return u.rollback(n) })
}

// Forward implements [control.Backend].
func (a *Agent) Forward(ctx context.Context) error { return a.steer(ctx, (*updater).forward) }

// forward writes down that the operator follows the networks again. What they ask
// for comes with the next look.
func (u *updater) forward() error {
	if err := u.gens.Forward(digest.Digest{}); err != nil {
		return err
	}
	for _, m := range u.members {
		newest := m.board.snapshot()
		if newest == nil {
			continue
		}
		if err := u.gens.Forward(newest.Digest()); err != nil {
			return err
		}
		u.standing[m].newest = digest.Digest{} // as if it were new
		m.board.retry(newest)
	}
	u.log.Info("following the network's configuration again", journal.GenerationUnpin.Attr())
	return nil
}

// rollback writes down that the operator goes back to generation n; 0 is the one
// before.
func (u *updater) rollback(n int) error {
	v := u.gens.View()
	if n == 0 {
		n = v.Previous
	}
	lead := u.led
	if m := u.named(v.AsideOf); m != nil {
		lead = m
	}
	g, cur := v.Get(n), v.Get(v.Current)
	switch {
	case n == 0:
		return fmt.Errorf("%w: there is no healthy generation before the current one", control.ErrRefused)
	case g == nil:
		return fmt.Errorf("%w: no generation %d is kept", control.ErrRefused, n)
	case n == v.Current && v.Order == 0:
		return fmt.Errorf("%w: generation %d is current already", control.ErrRefused, n)
	case g.State != generation.Healthy:
		return fmt.Errorf("%w: generation %d is %s: only one that was healthy can be gone back to", control.ErrRefused, n, g.State)
	case cur != nil && n != v.Current && g.Config == cur.Config:
		return fmt.Errorf("%w: generation %d has the configuration of the current one, whose unit is rendered for this machine as it is now", control.ErrRefused, n)
	case lead == nil || lead.board.snapshot() == nil:
		return fmt.Errorf("%w: no configuration is known yet", control.ErrRefused)
	}
	if err := u.gens.Rollback(n, lead.net.Name, lead.board.snapshot().Digest()); err != nil {
		return err
	}
	for _, st := range u.standing {
		st.again, st.fetch = backoff{}, backoff{}
	}
	u.log.Warn("going back as the operator asked", journal.GenerationPinned.Attr(), "generation", n, "version", g.Version)
	return nil
}

// maxReported bounds a reason that is told to the network, in bytes.
const maxReported = 256

// failed implements machine.
func (a *Agent) failed(config digest.Digest) *wire.Failed {
	v := a.gens.View()
	g := v.Find(config)
	if g == nil || g.State != generation.Dead && g.State != generation.Failed {
		return nil
	}
	return &wire.Failed{Config: g.Config, Step: g.Step, Reason: strings.ToValidUTF8(g.Reason[:min(len(g.Reason), maxReported)], ""), Final: g.State == generation.Dead}
}

// Generations implements [control.Backend].
func (a *Agent) Generations() control.Generations {
	v := a.gens.View()
	out := control.Generations{Current: v.Current, Previous: v.Previous, Order: v.Order, PutAside: v.Aside.String(), PutAsideOf: v.AsideOf, Generations: []control.Generation{}}
	for i := range v.Generations {
		out.Generations = append(out.Generations, describe(&v.Generations[i]))
	}
	return out
}

func describe(g *generation.Generation) control.Generation {
	c := control.Generation{
		Number: g.Number, Network: g.Network, State: string(g.State), Since: g.Since, Created: g.Created, Version: g.Version, Config: g.Config.String(),
		Engine: g.Engine, Image: g.Image, Unit: g.Unit.String(), Step: g.Step, Reason: g.Reason, Machine: g.Machine,
		Models: []control.GenerationModel{},
	}
	for _, m := range g.Models {
		c.Models = append(c.Models, control.GenerationModel{Name: m.Name, Version: m.Version, Digest: m.Digest.String()})
	}
	for _, p := range g.Phases {
		c.Phases = append(c.Phases, control.Phase(p))
	}
	return c
}

// Generation implements [control.Backend].
func (a *Agent) Generation(n int) (control.Generation, error) {
	v := a.gens.View()
	if n == 0 {
		n = v.Current
	}
	g := v.Get(n)
	if g == nil {
		return control.Generation{}, fmt.Errorf("%w: no generation %d is kept", control.ErrRefused, n)
	}
	c := describe(g)
	proof, unit, err := a.gens.Load(n)
	if err != nil {
		return c, err
	}
	s, err := a.openProof(g.Network, proof)
	if err != nil {
		return c, err
	}
	c.UnitText = string(unit)
	c.Snapshot, err = json.Marshal(s.Config())
	return c, err
}
