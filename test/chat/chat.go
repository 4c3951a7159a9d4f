// Package chat asks a network's API as its clients do.
//
// The rule it keeps: an answer is one only if it is whole, says what it has to, and
// has a receipt over the very bytes that were sent and that came; and no receipt is
// that of two answers. All else is an error that says what is missing.
package chat

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
	"time"

	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/receipt"
	"github.com/resultity/node/test/model"
)

const (
	answerWithin  = 90 * time.Second // from the request to the end of its answer
	receiptWithin = 2 * time.Minute  // from there, see [Client.Receipt]

	maxAnswer = 8 << 20
)

// What is wrong with an answer that has begun.
var (
	ErrBroken = errors.New("broken off") // it ended in the middle
	ErrWrong  = errors.New("wrong answer")
)

// Refusal is an error of the API, sent in place of an answer.
type Refusal struct {
	Status     int    // of HTTP
	Code       string // the API's; empty if the body is not in the form of an error
	RetryAfter string // the header
	Body       []byte
}

func (r *Refusal) Error() string {
	return fmt.Sprintf("%d %s: %.500s", r.Status, http.StatusText(r.Status), bytes.TrimSpace(r.Body))
}

// Client has access to a network. Its methods may be called concurrently.
type Client struct {
	API    string // https://address:port
	APIKey string
	HTTP   *http.Client
}

// Open sends a request, with body as JSON; the caller reads and closes the answer's.
func (c *Client) Open(ctx context.Context, method, path string, body any) (*http.Response, error) {
	var r io.Reader
	if body != nil {
		raw, err := json.Marshal(body)
		if err != nil {
			return nil, err
		}
		r = bytes.NewReader(raw)
	}
	req, err := http.NewRequestWithContext(ctx, method, c.API+path, r)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Authorization", "Bearer "+c.APIKey)
	req.Header.Set("Content-Type", "application/json")
	return c.HTTP.Do(req)
}

// Do sends a request and returns the answer with its body read.
func (c *Client) Do(ctx context.Context, method, path string, body any) (*http.Response, []byte, error) {
	res, err := c.Open(ctx, method, path, body)
	if err != nil {
		return nil, nil, err
	}
	defer res.Body.Close() // read to its end below
	raw, err := io.ReadAll(io.LimitReader(res.Body, 32<<20))
	return res, raw, err
}

// Request is one user message to [model.Name], at temperature 0.
type Request struct {
	Prompt string
	Tokens int // at most, in the answer
	Stream bool

	Want  string       // what the answer has to say; empty takes anything
	Begun func() error // if not nil, called when the first bytes of the answer are there
}

// JSON is the body in which the request is sent.
func (r *Request) JSON() json.RawMessage {
	raw, err := json.Marshal(map[string]any{
		"model": model.Name, "stream": r.Stream, "temperature": 0, "max_tokens": r.Tokens,
		"messages": []map[string]string{{"role": "user", "content": r.Prompt}},
	})
	if err != nil {
		panic("chat: " + err.Error()) // strings and numbers always have a form
	}
	return raw
}

// Answer is an answer that has been checked, with what a client keeps to prove it.
type Answer struct {
	Request, Body []byte // as they were sent
	Header        http.Header
	Text          string
	RawReceipt    []byte
	Receipt       receipt.Signed

	// Late is whether the receipt was not there yet when the answer ended, as it has
	// to be while nothing of the network is broken.
	Late bool
}

// Ask asks once. An error is a [*Refusal], wraps [ErrBroken] or [ErrWrong], or says
// that the request was not taken at all.
func (c *Client) Ask(ctx context.Context, r Request) (*Answer, error) {
	a := &Answer{Request: r.JSON()}
	id, err := c.answer(ctx, &r, a)
	if err != nil {
		return nil, err
	}
	if a.RawReceipt, a.Receipt, a.Late, err = c.receipt(ctx, id, time.Now().Add(receiptWithin)); err != nil {
		return nil, err
	}
	if got := a.Receipt.Receipt().Measured; got.RequestHash != digest.Of(a.Request) || got.ResponseHash != digest.Of(a.Body) {
		return nil, fmt.Errorf("%w: receipt %s is for other bytes", ErrWrong, id)
	}
	return a, nil
}

// answer has the request answered, and returns what its receipt is called.
func (c *Client) answer(ctx context.Context, r *Request, a *Answer) (id string, err error) {
	ctx, cancel := context.WithTimeout(ctx, answerWithin)
	defer cancel()
	res, err := c.Open(ctx, http.MethodPost, "/v1/chat/completions", json.RawMessage(a.Request))
	if err != nil {
		return "", err
	}
	defer res.Body.Close() // read to its end below
	body := bufio.NewReader(io.LimitReader(res.Body, maxAnswer))
	if r.Begun != nil && res.StatusCode == http.StatusOK {
		if _, err := body.Peek(1); err != nil {
			return "", fmt.Errorf("%w: %w", ErrBroken, err)
		}
		if err := r.Begun(); err != nil {
			return "", err
		}
	}
	a.Body, err = io.ReadAll(body)
	a.Header = res.Header
	switch {
	case res.StatusCode != http.StatusOK:
		var e struct {
			Error struct{ Code string }
		}
		_ = json.Unmarshal(a.Body, &e) // then it has no code
		return "", &Refusal{Status: res.StatusCode, Code: e.Error.Code, RetryAfter: res.Header.Get("Retry-After"), Body: a.Body}
	case err != nil:
		return "", fmt.Errorf("%w: %w", ErrBroken, err)
	}
	if a.Text, err = Text(a.Body, r.Stream); err != nil {
		return "", err
	}
	if r.Want != "" && a.Text != r.Want {
		return "", fmt.Errorf("%w: %.500q, want %.500q", ErrWrong, a.Text, r.Want)
	}
	return res.Header.Get("Resultity-Receipt"), nil
}

// Text takes the assistant's words out of the body of an answer. An error wraps
// [ErrBroken] or [ErrWrong].
func Text(body []byte, stream bool) (string, error) {
	var v struct {
		Choices []struct{ Message, Delta struct{ Content string } }
	}
	if !stream {
		if err := json.Unmarshal(body, &v); err != nil || len(v.Choices) != 1 {
			return "", fmt.Errorf("%w: %d choices, %v: %.300s", ErrWrong, len(v.Choices), err, body)
		}
		return v.Choices[0].Message.Content, nil
	}
	var text strings.Builder
	for line := range bytes.Lines(body) {
		data, ok := bytes.CutPrefix(bytes.TrimSpace(line), []byte("data: "))
		if string(data) == "[DONE]" {
			return text.String(), nil
		}
		if !ok {
			continue
		}
		v.Choices = nil
		if err := json.Unmarshal(data, &v); err != nil {
			return "", fmt.Errorf("%w: event %.200q: %w", ErrWrong, data, err)
		}
		for _, c := range v.Choices {
			text.WriteString(c.Delta.Content)
		}
	}
	return "", fmt.Errorf("%w: the stream has no end: %.300s", ErrBroken, body[max(0, len(body)-300):])
}

// Receipt returns the receipt of an answer, as it came and as it was verified. It has
// to be there even if the network was killed when the answer had just ended: then the
// network may be down now, or may have to hear of it from the node once more. So it
// is asked for again for a while; then the answer was wrong.
func (c *Client) Receipt(ctx context.Context, id string) (raw []byte, signed receipt.Signed, err error) {
	raw, signed, _, err = c.receipt(ctx, id, time.Now().Add(receiptWithin))
	return raw, signed, err
}

// receipt is [Client.Receipt] that ends its tries then, and says whether the first
// one did not have it.
func (c *Client) receipt(ctx context.Context, id string, end time.Time) (raw []byte, signed receipt.Signed, late bool, err error) {
	for ; ; late = true {
		res, raw, err := c.Do(ctx, http.MethodGet, "/v1/receipts/"+id, nil)
		if err == nil && res.StatusCode == http.StatusOK {
			if signed, err = receipt.Verify(raw); err == nil && signed.Receipt().Job.String() != id {
				err = fmt.Errorf("it is for job %s", signed.Receipt().Job)
			}
			if err != nil {
				err = fmt.Errorf("%w: receipt %q: %w", ErrWrong, id, err)
			}
			return raw, signed, late, err
		}
		if err == nil {
			err = fmt.Errorf("%s: %.300s", res.Status, raw)
		}
		if time.Now().After(end) {
			return nil, signed, late, fmt.Errorf("%w: no receipt %q: %w", ErrWrong, id, err)
		}
		if pause(ctx, 50*time.Millisecond) != nil {
			return nil, signed, late, fmt.Errorf("receipt %q: %w: %w", id, ctx.Err(), err)
		}
	}
}

func pause(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}
