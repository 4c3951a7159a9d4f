package deploy

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"

	"github.com/resultity/node/internal/bridge/contract"
	"github.com/resultity/node/internal/quadlet"
	"github.com/resultity/node/internal/runtime"
	"github.com/resultity/node/internal/sandbox"
)

// checkSealed compares the inside view, the outside view and the image.
func (d *Deployer) checkSealed(ctx context.Context, p *Plan, engine Engine) error {
	ctx, cancel := context.WithTimeout(ctx, lookTimeout)
	defer cancel()
	c, err := d.Containers.Container(ctx, quadlet.ContainerName)
	if err != nil {
		return err
	}
	if want := p.snapshot.Config().Runtime.Image.Digest(); c.ImageDigest != want {
		return fmt.Errorf("%w: it runs image %s, not %s", sandbox.ErrNotSealed, c.ImageDigest, want)
	}
	out, err := d.Look(c.PID)
	if err != nil {
		return err
	}
	raw, err := engine.Sandbox(ctx)
	if errors.Is(err, runtime.ErrForeign) {
		return fmt.Errorf("%w: %w", sandbox.ErrNotSealed, err)
	}
	if err != nil {
		return err
	}
	var in contract.Sandbox
	if err := json.Unmarshal(raw, &in); err != nil {
		return fmt.Errorf("%w: the bridge's record cannot be read: %w", sandbox.ErrNotSealed, err)
	}
	return sandbox.Check(out, &in, os.Getuid())
}
