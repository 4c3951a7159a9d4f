package deploy_test

import (
	"errors"
	"slices"
	"testing"

	"github.com/resultity/node/internal/deploy"
	. "github.com/resultity/node/internal/deploy/deploytest"
	"github.com/resultity/node/internal/digest"
)

func classOf(d *deploy.Deployment) digest.Digest {
	c, _ := d.Class()
	return c
}

// Another network's plan has a part in what runs if its unit is the very same and
// its own validation passes; whatever comes of it, the runtime goes on.
func TestShare(t *testing.T) {
	m := New(t)
	d := m.Deployer()
	one := NewNetwork(t).Publish(nil)
	dep := up(t, d, one)
	n := NewNetwork(t)
	same := n.Publish(map[string]any{"network.name": "other", "limits.tokens": 50})
	other := n.Publish(map[string]any{"runtime.settings.slots": 1})
	if !deploy.Shareable(one, same) || deploy.Shareable(one, other) {
		t.Fatal("what could be shared, and what not, is not told")
	}
	p, err := d.Stage(t.Context(), same)
	if err != nil {
		t.Fatal(err)
	}
	q, err := d.Stage(t.Context(), other)
	if err != nil {
		t.Fatal(err)
	}
	m.Calls()
	shared, err := d.Share(t.Context(), dep, p)
	state, _ := m.Now()
	if err != nil || shared.Snapshot() != same || !shared.Current(state) || shared.Socket() != dep.Socket() || classOf(shared) != classOf(dep) {
		t.Errorf("%+v, %v", shared, err)
	}
	if calls := m.Calls(); Count(calls, Golden) != len(same.Config().Validation.Golden) || slices.Contains(calls, Start) || slices.Contains(calls, Install) {
		t.Errorf("calls %q", calls)
	}
	if _, err := d.Share(t.Context(), dep, q); !errors.Is(err, deploy.ErrOtherUnit) {
		t.Errorf("another unit: %v", err)
	}
	m.Fail(Golden, &Fault{Err: errBroken})
	if _, err := d.Share(t.Context(), dep, p); step(err) != deploy.StepValidate {
		t.Errorf("a wrong answer: %v", err)
	}
	if calls := m.Calls(); slices.Contains(calls, Stop) || slices.Contains(calls, Start) {
		t.Errorf("the runtime was touched: %q", calls)
	}
}
