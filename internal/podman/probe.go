package podman

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/containers/podman/v5/pkg/api/handlers"
	"github.com/containers/podman/v5/pkg/bindings/containers"
	"github.com/containers/podman/v5/pkg/bindings/images"

	"github.com/resultity/node/internal/snapshot"
)

// Offer has Podman pull an image like [Client.Pull], from a registry of this
// machine's own whose certificate nobody knows. What it is for is the policy in
// force: an image that it lets in is stored, and the caller's to remove.
func (c *Client) Offer(ctx context.Context, ref snapshot.ImageRef) error {
	opts := new(images.PullOptions).WithProgressWriter(io.Discard).WithPolicy("always").WithSkipTLSVerify(true)
	if _, err := images.Pull(c.with(ctx), ref.String(), opts); err != nil {
		return c.explain("pull "+ref.String(), err)
	}
	return ctx.Err() // a stream that was cut looks like one that ended
}

// maxOutput bounds what a command in a container may print, in bytes.
const maxOutput = 64 << 10

var errOutput = fmt.Errorf("it printed more than %d bytes", maxOutput)

// output is what a command prints, up to the bound. It has no other methods of a buffer,
// by which more would get in.
type output struct{ b bytes.Buffer }

func (o *output) Write(p []byte) (int, error) {
	if o.b.Len()+len(p) > maxOutput {
		return 0, errOutput
	}
	return o.b.Write(p)
}

// Exec runs a command in a running container, as its user and in its sandbox,
// and returns what it prints on stdout. An exit code other than 0 is an error.
func (c *Client) Exec(ctx context.Context, container string, command ...string) ([]byte, error) {
	what := "execute in " + container
	config := new(handlers.ExecCreateConfig)
	config.Cmd, config.AttachStdout, config.AttachStderr = command, true, true
	id, err := containers.ExecCreate(c.with(ctx), container, config)
	if err != nil {
		return nil, c.explain(what, err)
	}
	var out, said output
	type streams = containers.ExecStartAndAttachOptions
	done := make(chan error, 1)
	// The binding reads without a context.
	go func() {
		var stdout, stderr io.Writer = &out, &said
		done <- containers.ExecStartAndAttach(c.with(ctx), id, (&streams{OutputStream: &stdout, ErrorStream: &stderr}).WithAttachOutput(true).WithAttachError(true))
	}()
	select {
	case err = <-done:
	case <-ctx.Done():
		return nil, c.explain(what, ctx.Err())
	}
	if err != nil {
		return nil, c.explain(what, err)
	}
	state, err := containers.ExecInspect(c.with(ctx), id, nil)
	if err != nil {
		return nil, c.explain(what, err)
	}
	if state.ExitCode != 0 {
		return nil, c.explain(what, fmt.Errorf("exit status %d: %.200q", state.ExitCode, said.b.String()))
	}
	if out.b.Len() == 0 {
		return nil, c.explain(what, errors.New("it printed nothing"))
	}
	return out.b.Bytes(), nil
}
