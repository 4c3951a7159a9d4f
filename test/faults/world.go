package faults

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/resultity/node/internal/control"
	"github.com/resultity/node/internal/snapshot"
	"github.com/resultity/node/test/bench/instant"
	"github.com/resultity/node/test/chat"
	"github.com/resultity/node/test/host"
	"github.com/resultity/node/test/stack"
)

// World is a system to break: a network with two nodes. A is the victim, B is
// there so that clients have somebody who answers. A reaches the network through
// a proxy of ours.
type World struct {
	*stack.Stack
	A, B  *stack.Node
	Load  *chat.Crowd
	Proxy *Proxy
	Site  *Site

	address string // A's node id
	program []byte // the engine
	locker  string // on A's host
}

// proxyName is what A calls the network.
const proxyName = "proxy.test"

// What clients do.
const (
	clients = 3
	pace    = 40 * time.Millisecond
	tokens  = 8 // of each answer
)

var ask = chat.Request{Prompt: "x", Tokens: tokens, Want: instant.Text(tokens)}

// New brings a world up. Progress, if not nil, is told in lines what happens.
func New(ctx context.Context, progress io.Writer) (_ *World, err error) {
	dir, err := os.MkdirTemp("", "faults-")
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	engine := filepath.Join(dir, "engine")
	if err := stack.BuildProgram(ctx, engine, "./test/faults/engine"); err != nil {
		return nil, err
	}
	program, err := os.ReadFile(engine)
	if err != nil {
		return nil, err
	}
	w := &World{program: program}
	defer func() {
		if err != nil {
			err = errors.Join(err, w.Close())
		}
	}()
	if w.Stack, err = stack.Up(ctx, stack.Options{Host: host.Options{Progress: progress}}); err != nil {
		return nil, err
	}
	// Both nodes change their configuration at once, and may be slow at it.
	if err := w.onNet(ctx, `echo 'node_wait = "30s"' >>/etc/resultity-network/network.toml; systemctl restart resultity-network`); err != nil {
		return nil, err
	}
	if err := w.waitHealth(ctx, 200); err != nil {
		return nil, err
	}
	ref, err := w.PushEngine(ctx, w.Reg, "faulty", program)
	if err != nil {
		return nil, err
	}
	if err := w.Publish(ctx, func(c *snapshot.Config) {
		c.Runtime.Image = ref
		c.Runtime.Settings.Slots = 4
		c.Limits.Deadline = 30
		c.Validation.Golden = []snapshot.Golden{{Name: "words", Prompt: "words", Answers: []string{instant.Text(tokens)}, Tokens: tokens, Timeout: 20}}
	}); err != nil {
		return nil, err
	}
	if w.Proxy, err = w.newProxy(); err != nil {
		return nil, err
	}
	if w.Site, err = w.newSite(); err != nil {
		return nil, err
	}
	for _, c := range []host.Config{{Name: "a", Release: host.Trixie}, {Name: "b", Release: host.Forky}} {
		if err := w.AddNode(ctx, c); err != nil {
			return nil, err
		}
	}
	w.A, w.B = w.Nodes[0], w.Nodes[1]
	w.locker = "/usr/local/bin/locker"
	if err := errors.Join(stack.BuildProgram(ctx, dir+"/locker", "./test/faults/locker"), w.A.CopyTo(dir+"/locker", w.locker)); err != nil {
		return nil, err
	}
	w.Site.victim.Store(w.A.Addr().String())
	if err := w.throughProxy(ctx); err != nil {
		return nil, err
	}
	if err := w.WaitRoutable(ctx); err != nil {
		return nil, fmt.Errorf("%w\n%s", err, w.A.Journal(ctx, 50))
	}
	s, err := w.A.Status(ctx)
	if err != nil {
		return nil, err
	}
	w.address = s.Node
	w.Load = w.Crowd(ctx, clients, pace, ask)
	return w, nil
}

// Close takes the world down.
func (w *World) Close() error {
	var errs []error
	if w.Load != nil {
		w.Load.Stop()
	}
	if w.Stack != nil {
		errs = append(errs, w.Stack.Close())
	}
	if w.Proxy != nil {
		errs = append(errs, w.Proxy.Close())
	}
	if w.Site != nil {
		errs = append(errs, w.Site.Close())
	}
	return errors.Join(errs...)
}

const (
	agentFile = "/etc/resultity/agent.toml"
	hostsFile = "/etc/hosts"
)

// throughProxy has A's agent reach the network by a name, which is the proxy's.
func (w *World) throughProxy(ctx context.Context) error {
	raw, err := w.A.ReadFile(agentFile)
	if err != nil {
		return err
	}
	raw = bytes.Replace(raw, []byte(w.API), []byte(w.Proxy.URL), 1)
	if !bytes.Contains(raw, []byte(proxyName)) {
		return fmt.Errorf("%s does not name %s:\n%s", agentFile, w.API, raw)
	}
	return errors.Join(w.A.WriteFile(agentFile, raw, 0o644), w.setName(true), w.A.UserCtl(ctx, "restart", w.A.Agent))
}

// setName lets A know the proxy by name, or not.
func (w *World) setName(known bool) error {
	raw, err := w.A.ReadFile(hostsFile)
	if err != nil {
		return err
	}
	var b bytes.Buffer
	for line := range bytes.Lines(raw) {
		if !bytes.Contains(line, []byte(proxyName)) {
			b.Write(line)
		}
	}
	if known {
		fmt.Fprintf(&b, "%s %s\n", w.Lab.Addr(), proxyName)
	}
	return w.A.WriteFile(hostsFile, b.Bytes(), 0o644)
}

// WaitRecovered waits until A has answered a client's request that was sent
// after now.
func (w *World) WaitRecovered(ctx context.Context) error {
	if err := w.A.WaitRoutable(ctx); err != nil {
		return err
	}
	return w.Load.WaitAnswer(ctx, w.address)
}

// Check looks at what must be true at any time when nothing is broken.
func (w *World) Check(ctx context.Context) error {
	err := w.A.WaitStatus(ctx, "an empty outbox", func(s *control.Status) bool { return s.Outbox == 0 })
	if err != nil {
		return err
	}
	s, err := w.A.Status(ctx)
	if err != nil {
		return err
	}
	if s.Node != w.address {
		return fmt.Errorf("node %s has become %s", w.address, s.Node)
	}
	return w.A.CheckModels(ctx)
}

// pause is for faults that last a while.
func pause(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
