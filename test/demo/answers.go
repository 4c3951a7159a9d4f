package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"strings"

	"golang.org/x/sync/errgroup"

	"github.com/resultity/node/internal/control"
	"github.com/resultity/node/test/chat"
	"github.com/resultity/node/test/host"
	"github.com/resultity/node/test/model"
)

// fromNothingToActive waits for the nodes.
func (d *demo) fromNothingToActive(ctx context.Context) error {
	for _, n := range d.s.Nodes {
		if err := d.step(n.Name(), "from nothing to active", func() (string, error) {
			if err := n.WaitRoutable(ctx); err != nil {
				return "", err
			}
			out, err := n.Ctl(ctx, "identity", "--json")
			if err != nil {
				return "", err
			}
			var ids []control.Identity
			if err := json.Unmarshal(out, &ids); err != nil || len(ids) == 0 {
				return "", fmt.Errorf("%s: %w", out, err)
			}
			return ids[0].Node, nil
		}); err != nil {
			return err
		}
	}
	return nil
}

// ask sends one chat request and checks everything about its answer. begun, if
// not nil, is called when the first bytes of the answer are there.
func (d *demo) ask(ctx context.Context, p model.Prompt, stream bool, begun func() error) (*chat.Answer, error) {
	r := request(p)
	r.Stream, r.Begun = stream, begun
	return d.s.Ask(ctx, r)
}

func request(p model.Prompt) chat.Request {
	return chat.Request{Prompt: p.User, Tokens: 400, Want: p.Answer}
}

// long returns the prompt with the longest answer.
func long() model.Prompt {
	var best model.Prompt
	for _, p := range model.Prompts() {
		if len(p.Answer) > len(best.Answer) {
			best = p
		}
	}
	return best
}

// answers sends ten requests, plain and streamed, in turn and at once.
func (d *demo) answers(ctx context.Context) error {
	prompts := model.Prompts()
	at := func(i int) model.Prompt { return prompts[i%len(prompts)] }
	var first *chat.Answer
	if err := d.step("", "ask in turn, plain and streamed: 4 answers, 4 receipts", func() (string, error) {
		for i := range 4 {
			a, err := d.ask(ctx, at(i), i%2 == 1, nil)
			if err != nil {
				return "", err
			}
			if first == nil {
				first = a
			}
		}
		return fmt.Sprintf("%q", first.Text), nil
	}); err != nil {
		return err
	}
	if err := d.step("", "ask six things at once: 6 answers, 6 receipts", func() (string, error) {
		var g errgroup.Group
		for i := 4; i < 10; i++ {
			g.Go(func() error { _, err := d.ask(ctx, at(i), i%2 == 1, nil); return err })
		}
		return "", g.Wait()
	}); err != nil {
		return err
	}
	if err := d.write("answer.json", bytes.TrimSpace(first.Body)); err != nil {
		return err
	}
	if err := d.write("receipt.json", first.RawReceipt); err != nil {
		return err
	}
	return d.step(d.s.Nodes[0].Name(), "check the receipt with resultityctl, offline", func() (string, error) {
		n := d.s.Nodes[0]
		// In a network namespace of its own, which has nothing.
		offline := []string{"unshare", "--net"}
		if d.local {
			offline = []string{"podman", "unshare", "unshare", "--net"}
		}
		var out bytes.Buffer
		if err := n.Exec(ctx, host.Cmd{
			Args: append(offline, n.CtlArgs("verify", "-")...), Stdin: bytes.NewReader(first.RawReceipt), Stdout: &out, Stderr: &out,
		}); err != nil {
			return "", fmt.Errorf("%w: %s", err, out.Bytes())
		}
		line, _, _ := strings.Cut(out.String(), "\n")
		return strings.Join(strings.Fields(line), " "), nil
	})
}
