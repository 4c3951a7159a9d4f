package bridge

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"time"

	"github.com/resultity/node/internal/bridge/contract"
	"github.com/resultity/node/internal/plainhttp"
)

// client is the bridge's own way to ask the engine.
type client struct {
	health string // URLs
	canary string
	body   []byte // of a canary
	engine *plainhttp.Transport
}

func newClient(o contract.Options) *client {
	body, err := json.Marshal(struct {
		Model       string  `json:"model"`
		Prompt      string  `json:"prompt"`
		MaxTokens   int     `json:"max_tokens"`
		Temperature float64 `json:"temperature"`
	}{o.Model, "a", 1, 0})
	if err != nil {
		panic(err) // strings and numbers
	}
	base := "http://" + o.Engine.String()
	return &client{health: base + o.Health, canary: base + "/v1/completions", body: body, engine: newTransport(o.Engine, 1)}
}

func (c *client) close() { c.engine.CloseIdleConnections() }

// Bounds of an answer to the bridge itself.
const (
	maxReply       = 1 << 20         // bytes that are read
	healthPatience = 2 * time.Second // until the next question of whether it can work
)

// ask sends a request and returns the body of a 200.
func (c *client) ask(ctx context.Context, method, url string, body []byte) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, method, url, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	if body != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	req.Header["User-Agent"] = nil // none
	resp, err := c.engine.RoundTrip(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("engine answered %d", resp.StatusCode)
	}
	reply, err := io.ReadAll(io.LimitReader(resp.Body, maxReply+1))
	if err == nil && len(reply) > maxReply {
		err = fmt.Errorf("engine answered with more than %d bytes", maxReply)
	}
	return reply, err
}

// healthy asks whether the engine says that it can work.
func (c *client) healthy(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, healthPatience)
	defer cancel()
	_, err := c.ask(ctx, http.MethodGet, c.health, nil)
	return err
}

// complete has the engine make one token, for as long as ctx lasts.
func (c *client) complete(ctx context.Context) error {
	reply, err := c.ask(ctx, http.MethodPost, c.canary, c.body)
	if err != nil {
		return err
	}
	var r struct {
		Choices []json.RawMessage `json:"choices"`
	}
	if err := json.Unmarshal(reply, &r); err != nil {
		return errors.New("engine answered a completion with something else") // not with its text
	}
	if len(r.Choices) == 0 {
		return errors.New("engine answered a completion without a choice")
	}
	return nil
}
