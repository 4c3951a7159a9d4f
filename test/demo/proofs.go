package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/resultity/node/internal/chunk"
	"github.com/resultity/node/internal/control"
	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/gate"
	"github.com/resultity/node/internal/journal"
	"github.com/resultity/node/internal/snapshot"
	"github.com/resultity/node/test/model"
	"github.com/resultity/node/test/oci"
	"github.com/resultity/node/test/stack"
)

// refused publishes a configuration that a node must refuse, waits for the
// refusal, and publishes the good one again.
func (d *demo) refused(ctx context.Context, n *stack.Node, e *journal.Event, bad func(*snapshot.Config)) (why string, err error) {
	at, err := n.Cursor(ctx)
	if err != nil {
		return "", err
	}
	var good snapshot.Config
	if err := d.s.Publish(ctx, func(c *snapshot.Config) { good = *c; bad(c) }); err != nil {
		return "", err
	}
	waiting, cancel := context.WithTimeout(ctx, 3*time.Minute)
	defer cancel()
	said, err := n.WaitEvent(waiting, at, e)
	if err == nil {
		why = said[0].Error
	}
	return why, errors.Join(err, d.s.Publish(ctx, func(c *snapshot.Config) { *c = good }), d.s.WaitRoutable(ctx))
}

func (d *demo) unsignedImage(ctx context.Context) error {
	n := d.s.Nodes[0]
	img, err := oci.Single("rogue", []byte("not a program"))
	if err != nil {
		return err
	}
	pushed, err := d.s.Reg.Push(ctx, "resultity/rogue", img)
	if err != nil {
		return err
	}
	host, _, _ := strings.Cut(d.s.Image.Repository(), "/")
	ref, err := snapshot.ParseImageRef(host + "/resultity/rogue@" + pushed.DigestStr())
	if err != nil {
		return err
	}
	if err := d.step(n.Name(), "an unsigned image is refused by the agent", func() (string, error) {
		return d.refused(ctx, n, journal.ImageUnsigned, func(c *snapshot.Config) { c.Runtime.Image = ref })
	}); err != nil {
		return err
	}
	return d.step(n.Name(), "and by Podman's policy, asked directly", func() (string, error) {
		socket, err := n.PodmanSocket(ctx)
		if err != nil {
			return "", err
		}
		out, err := n.Podman(ctx, "--url", "unix://"+socket, "pull", ref.String())
		if err == nil {
			return "", errors.New("it was pulled")
		}
		if !bytes.Contains(out, []byte("ignature")) && !bytes.Contains(out, []byte("rejected")) {
			return "", fmt.Errorf("refused for another reason: %s", out)
		}
		return "refused", nil
	})
}

func (d *demo) flippedByte(ctx context.Context) error {
	n := d.s.Nodes[0]
	// Another model than the one that is there: its last byte differs. What is
	// served has one more byte flipped.
	want := model.GGUF()
	want[len(want)-1] ^= 1
	served := bytes.Clone(want)
	served[len(served)/2] ^= 1
	if err := d.s.ServeModel("flipped.gguf", served); err != nil {
		return err
	}
	return d.step(n.Name(), "a model with one flipped byte is refused", func() (string, error) {
		_, err := d.refused(ctx, n, journal.ModelRefused, func(c *snapshot.Config) {
			m := c.Models[0]
			f := m.Files[0]
			f.Sources = []string{strings.TrimSuffix(f.Sources[0], model.FileName) + "flipped.gguf"}
			f.SHA256, f.Chunks.Root = digest.Of(want), digest.FromSum(chunk.Hash(want)) // it is one chunk
			m.Name, m.Files = "flipped", []snapshot.File{f}
			c.Models = append(c.Models, m)
		})
		if err != nil {
			return "", err
		}
		out, err := n.Output(ctx, "find", n.State, "-name", digest.Of(want).Hex())
		if err == nil && len(out) > 0 {
			err = fmt.Errorf("it got its final name: %s", out)
		}
		return "and never gets its final name", err
	})
}

// outside returns an address that every process of the node's machine reaches,
// for as long as end is not called.
func (d *demo) outside() (address string, end func(), err error) {
	if !d.local {
		return strings.TrimPrefix(d.s.API, "https://"), func() {}, nil
	}
	// The services listen on the loopback interface, and a container has one
	// of its own. So take what this machine is called by others, if anything.
	c, err := net.Dial("udp", "192.0.2.1:9") // nothing is sent, and nobody is there
	if err != nil {
		return "192.0.2.1:9", func() {}, nil
	}
	host, _, _ := net.SplitHostPort(c.LocalAddr().String())
	ln, err := net.Listen("tcp", net.JoinHostPort(host, "0"))
	if err := errors.Join(err, c.Close()); err != nil {
		return "", nil, err
	}
	if c, err = net.Dial("tcp", ln.Addr().String()); err != nil {
		return "", nil, errors.Join(err, ln.Close())
	}
	return ln.Addr().String(), func() { c.Close(); ln.Close() }, nil
}

// insideTheContainer runs a program as a process of the container.
func (d *demo) insideTheContainer(ctx context.Context) error {
	outside, end, err := d.outside()
	if err != nil {
		return err
	}
	defer end()
	for _, n := range d.s.Nodes {
		if err := d.step(n.Name(), "inside the container nothing can be reached or written", func() (string, error) {
			out, err := d.s.Probe(ctx, n, outside)
			if err != nil {
				return "", err
			}
			if werr := os.WriteFile(filepath.Join(d.dir, n.Name()+".probe"), out, 0o644); werr != nil {
				return "", werr
			}
			return fmt.Sprintf("%d attempts, all refused", bytes.Count(out, []byte("refused "))), nil
		}); err != nil {
			return err
		}
	}
	return nil
}

func restarts(ctx context.Context, n *stack.Node) (int, error) {
	v, err := n.Property(ctx, stack.Runtime, "NRestarts")
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(v)
}

// comesBack signals the engine and waits until systemd has restarted it and the
// node gets jobs again.
func (d *demo) comesBack(ctx context.Context, n *stack.Node, signal string) (string, error) {
	before, err := restarts(ctx, n)
	if err != nil {
		return "", err
	}
	pid, err := n.SignalEngine(ctx, signal)
	if err != nil {
		return "", err
	}
	if err := n.WaitStatus(ctx, "another engine", func(s *control.Status) bool {
		now, err := n.Engine(ctx)
		return err == nil && now != "" && now != pid && s.GetsJobs()
	}); err != nil {
		return "", err
	}
	after, err := restarts(ctx, n)
	if err == nil && after <= before {
		err = fmt.Errorf("systemd counts %d restarts, before it were %d", after, before)
	}
	if err != nil {
		return "", err
	}
	_, err = d.ask(ctx, model.Prompts()[0], false, nil)
	return fmt.Sprintf("restart %d by systemd", after), err
}

func (d *demo) engineKilled(ctx context.Context) error {
	n := d.s.Nodes[0]
	return d.step(n.Name(), "the engine is killed and comes back", func() (string, error) { return d.comesBack(ctx, n, "KILL") })
}

func (d *demo) engineStopped(ctx context.Context) error {
	n := d.s.Nodes[len(d.s.Nodes)-1]
	return d.step(n.Name(), "the engine is stopped dead (SIGSTOP) and comes back", func() (string, error) { return d.comesBack(ctx, n, "STOP") })
}

// ctl runs resultityctl on the node.
func ctl(ctx context.Context, n *stack.Node, args ...string) error {
	out, err := n.Ctl(ctx, args...)
	if err != nil {
		return fmt.Errorf("resultityctl %s: %w: %s", strings.Join(args, " "), err, out)
	}
	return nil
}

// onlyOn drains every node but n, and waits until the network knows.
func (d *demo) onlyOn(ctx context.Context, n *stack.Node) error {
	for _, o := range d.s.Nodes {
		what := "drain"
		if o == n {
			what = "resume"
		}
		if err := ctl(ctx, o, what); err != nil {
			return err
		}
		if err := o.WaitStatus(ctx, "the network to know", func(s *control.Status) bool {
			last := s.Gates[len(s.Gates)-1]
			return last.Name == gate.Routable && (last.State == gate.Open) == (o == n)
		}); err != nil {
			return err
		}
	}
	return nil
}

func (d *demo) everywhere(ctx context.Context) error {
	for _, n := range d.s.Nodes {
		if err := ctl(ctx, n, "resume"); err != nil {
			return err
		}
	}
	return d.s.WaitRoutable(ctx)
}

// errTooFast says that a job was over before what was to happen to it.
var errTooFast = errors.New("the job was over before the fault; the machine is too busy for this proof")

// retried runs f again while it was too fast for the fault.
func retried(f func() (string, error)) (string, error) {
	for try := 1; ; try++ {
		note, err := f()
		if !errors.Is(err, errTooFast) || try == 10 {
			return note, err
		}
	}
}

func (d *demo) networkCut(ctx context.Context) error {
	a, b := d.s.Nodes[0], d.s.Nodes[1]
	return d.step(a.Name(), "its network is cut in the middle of a stream; the other node goes on", func() (string, error) {
		return retried(func() (string, error) {
			if err := d.onlyOn(ctx, a); err != nil {
				return "", err
			}
			got, err := d.ask(ctx, long(), true, func() error {
				return errors.Join(a.Cut(ctx), ctl(ctx, b, "resume"))
			})
			if herr := a.Heal(ctx); err == nil {
				err = herr
			}
			if err != nil {
				return "", err
			}
			if err := d.everywhere(ctx); err != nil {
				return "", err
			}
			who, err := address(ctx, b)
			if err == nil && got.Receipt.Receipt().Node.Hex() != who {
				err = errTooFast // the receipt is by the node that was cut off
			}
			return "the client saw one whole answer", err
		})
	})
}

func address(ctx context.Context, n *stack.Node) (string, error) {
	s, err := n.Status(ctx)
	if err != nil {
		return "", err
	}
	return s.Node, nil
}

func (d *demo) agentKilled(ctx context.Context) error {
	n := d.s.Nodes[0]
	return d.step(n.Name(), "the agent is killed (-9) with an unacknowledged result", func() (string, error) {
		return retried(func() (string, error) { return d.killedOnce(ctx, n) })
	})
}

func (d *demo) killedOnce(ctx context.Context, n *stack.Node) (string, error) {
	if err := d.onlyOn(ctx, n); err != nil {
		return "", err
	}
	before, err := d.s.Counted(ctx)
	if err != nil {
		return "", err
	}
	// The cut keeps the acknowledgement away for as long as it takes to kill the
	// agent after the engine has answered.
	if _, err := d.ask(ctx, long(), true, func() error { return d.killWithResult(ctx, n) }); err != nil {
		return "", errors.Join(err, n.Heal(ctx))
	}
	if err := n.WaitStatus(ctx, "an empty outbox", func(s *control.Status) bool { return s.Outbox == 0 && s.Busy == 0 && s.GetsJobs() }); err != nil {
		return "", err
	}
	after, err := d.s.Counted(ctx)
	if err == nil && after != before+1 {
		err = fmt.Errorf("the network counted %d results, want 1", after-before)
	}
	return "exactly one result", errors.Join(err, d.everywhere(ctx))
}

func (d *demo) killWithResult(ctx context.Context, n *stack.Node) error {
	if err := n.Cut(ctx); err != nil {
		return err
	}
	kept := 0
	if err := n.WaitStatus(ctx, "the engine's answer", func(s *control.Status) bool { kept = s.Outbox; return s.Busy == 0 }); err != nil {
		return err
	}
	if kept == 0 {
		return errTooFast // the acknowledgement was quicker than the cut
	}
	pid, err := n.Property(ctx, n.Agent, "MainPID")
	if err != nil {
		return err
	}
	if _, err := n.Output(ctx, "kill", "-KILL", pid); err != nil {
		return err
	}
	return n.Heal(ctx)
}
