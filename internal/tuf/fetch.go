package tuf

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"time"

	"github.com/resultity/node/internal/snapshot"
)

// fetchTimeout bounds one file from the request to its last byte, so that a
// server that drips cannot hold a refresh for long.
const fetchTimeout = 30 * time.Second

// refreshTimeout bounds all files together: a chain of roots may be long. What
// was verified until then is kept, so that the next refresh goes on from there.
const refreshTimeout = 5 * time.Minute

const maxRedirects = 5

// errAbsent comes with ErrUnreachable: the server has no such file. Object stores
// say 403 where they may not say 404.
var errAbsent = errors.New("no such file")

// restrict returns a copy of client that follows a few redirects, to https.
func restrict(client *http.Client) *http.Client {
	var c http.Client
	if client != nil {
		c = *client
	}
	c.CheckRedirect = func(r *http.Request, via []*http.Request) error {
		if r.URL.Scheme != "https" || r.URL.User != nil {
			return fmt.Errorf("%w to %s://%s", ErrRedirect, r.URL.Scheme, r.URL.Host)
		}
		if len(via) > maxRedirects {
			return fmt.Errorf("%w: more than %d", ErrRedirect, maxRedirects)
		}
		return nil
	}
	return &c
}

// fetch reads a file of at most limit bytes below the base URL, and not more
// than one byte beyond.
func (c *Client) fetch(ctx context.Context, name string, limit int64) ([]byte, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, fetchTimeout, fmt.Errorf("not complete after %v", fetchTimeout))
	defer cancel()
	unreachable := func(err error) error {
		if ctx.Err() != nil {
			err = context.Cause(ctx) // says more than the error of the transport
		}
		return fmt.Errorf("%w: %s: %w", ErrUnreachable, name, err)
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, c.base.JoinPath(name).String(), nil)
	if err != nil {
		return nil, err
	}
	resp, err := c.http.Do(req)
	if errors.Is(err, ErrRedirect) {
		return nil, fmt.Errorf("%w: %s: %w", snapshot.ErrUntrusted, name, err)
	}
	if err != nil {
		return nil, unreachable(err)
	}
	defer resp.Body.Close()
	switch resp.StatusCode {
	case http.StatusOK:
	case http.StatusNotFound, http.StatusForbidden:
		return nil, unreachable(fmt.Errorf("%w (status %d)", errAbsent, resp.StatusCode))
	default:
		return nil, unreachable(fmt.Errorf("status %d", resp.StatusCode))
	}
	raw, err := io.ReadAll(io.LimitReader(resp.Body, limit+1))
	if err != nil {
		return nil, unreachable(err)
	}
	if int64(len(raw)) > limit {
		return nil, fmt.Errorf("%w: %w: %s has more than %d bytes", snapshot.ErrUntrusted, ErrTooLarge, name, limit)
	}
	return raw, nil
}
