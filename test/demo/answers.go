package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"

	"golang.org/x/sync/errgroup"

	"github.com/resultity/node/internal/control"
	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/receipt"
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

// answer is a response that has been checked: the model's text, and a receipt
// over exactly the bytes sent and got.
type answer struct {
	body, receipt []byte
	text          string
	signed        receipt.Signed
}

func request(p model.Prompt, stream bool) map[string]any {
	return map[string]any{
		"model": model.Name, "stream": stream, "temperature": 0, "max_tokens": 400,
		"messages": []map[string]string{{"role": "user", "content": p.User}},
	}
}

// ask sends one chat request and checks everything about its answer. begun, if
// not nil, is called when the first bytes of a streamed answer are there.
func (d *demo) ask(ctx context.Context, p model.Prompt, stream bool, begun func() error) (*answer, error) {
	raw, err := json.Marshal(request(p, stream))
	if err != nil {
		return nil, err
	}
	res, err := d.s.Open(ctx, http.MethodPost, "/v1/chat/completions", json.RawMessage(raw))
	if err != nil {
		return nil, err
	}
	defer res.Body.Close() // read to its end below
	body := bufio.NewReader(io.LimitReader(res.Body, 8<<20))
	if begun != nil {
		if _, err := body.Peek(1); err != nil {
			return nil, err
		}
		if err := begun(); err != nil {
			return nil, err
		}
	}
	a := &answer{}
	if a.body, err = io.ReadAll(body); err != nil {
		return nil, err
	}
	if res.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("%s: %.500s", res.Status, a.body)
	}
	if a.text, err = text(a.body, stream); err != nil {
		return nil, err
	}
	if a.text != p.Answer {
		return nil, fmt.Errorf("%q: answered %q, the model's answer is %q", p.User, a.text, p.Answer)
	}
	id := res.Header.Get("Resultity-Receipt")
	rres, rbody, err := d.s.Do(ctx, http.MethodGet, "/v1/receipts/"+id, nil)
	if err != nil {
		return nil, err
	}
	if rres.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("receipt %s: %s: %.300s", id, rres.Status, rbody)
	}
	a.receipt = rbody
	if a.signed, err = receipt.Verify(rbody); err != nil {
		return nil, err
	}
	r := a.signed.Receipt()
	switch {
	case r.Job.String() != id:
		return nil, fmt.Errorf("receipt is for job %s, not %s", r.Job, id)
	case r.Measured.RequestHash != digest.Of(raw):
		return nil, errors.New("the receipt is for another request")
	case r.Measured.ResponseHash != digest.Of(a.body):
		return nil, errors.New("the receipt is for another response")
	}
	return a, nil
}

// text takes the assistant's words out of a response body.
func text(body []byte, stream bool) (string, error) {
	type choice struct {
		Message struct{ Content string } `json:"message"`
		Delta   struct{ Content string } `json:"delta"`
	}
	var v struct{ Choices []choice }
	if !stream {
		if err := json.Unmarshal(body, &v); err != nil {
			return "", err
		}
		if len(v.Choices) != 1 {
			return "", fmt.Errorf("%d choices: %.300s", len(v.Choices), body)
		}
		return v.Choices[0].Message.Content, nil
	}
	var b strings.Builder
	done := false
	for line := range bytes.Lines(body) {
		data, ok := bytes.CutPrefix(bytes.TrimSpace(line), []byte("data: "))
		if !ok {
			continue
		}
		if string(data) == "[DONE]" {
			done = true
			continue
		}
		v.Choices = nil
		if err := json.Unmarshal(data, &v); err != nil {
			return "", fmt.Errorf("event %.200q: %w", data, err)
		}
		for _, c := range v.Choices {
			b.WriteString(c.Delta.Content)
		}
	}
	if !done {
		return b.String(), errors.New("the stream ended without [DONE]")
	}
	return b.String(), nil
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
	var first *answer
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
		return fmt.Sprintf("%q", first.text), nil
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
	if err := d.write("answer.json", bytes.TrimSpace(first.body)); err != nil {
		return err
	}
	if err := d.write("receipt.json", first.receipt); err != nil {
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
			Args: append(offline, n.CtlArgs("verify", "-")...), Stdin: bytes.NewReader(first.receipt), Stdout: &out, Stderr: &out,
		}); err != nil {
			return "", fmt.Errorf("%w: %s", err, out.Bytes())
		}
		line, _, _ := strings.Cut(out.String(), "\n")
		return strings.Join(strings.Fields(line), " "), nil
	})
}
