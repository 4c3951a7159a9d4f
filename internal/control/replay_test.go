package control

import (
	"context"
	"errors"
	"fmt"
	"math"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/resultity/node/internal/openai"
)

// Replay says back what it was asked.
func (n *node) Replay(ctx context.Context, q ReplayRequest) (Replay, error) {
	if n.enter != nil {
		close(n.enter)
		<-ctx.Done()
		n.mu.Lock()
		defer n.mu.Unlock()
		n.cause = context.Cause(ctx)
		close(n.leave)
		return Replay{}, n.cause
	}
	v := Replay{Job: q.Job, Network: q.Network, Model: string(q.Request) + string(q.Response) + string(q.Receipt), TookMS: q.Timeout().Milliseconds()}
	v.Comparison = openai.Comparison{Verdict: openai.Different, Difference: &openai.Difference{Part: openai.PartText, Offset: 3}}
	if q.Show {
		v.Was = "x"
	}
	return v, n.err
}

// NotReplayed passes on what it is told.
func (n *node) NotReplayed(r *ReplayRefusal) {
	if n.refused != nil {
		n.refused <- r.Code
	}
}

func TestReplay(t *testing.T) {
	n := &node{refused: make(chan ReplayCode, 16)}
	path, _ := serve(t, n)
	c := NewClient(path)
	got, err := c.Replay(t.Context(), ReplayRequest{Job: "aa", Network: "testnet", TimeoutS: 7})
	if err != nil || got.Job != "aa" || got.Network != "testnet" || got.TookMS != 7000 || got.Verdict != openai.Different || got.Difference.Offset != 3 || got.Was != "" {
		t.Errorf("%+v, %v", got, err)
	}
	got, err = c.Replay(t.Context(), ReplayRequest{Request: []byte("r\x00\xff"), Response: []byte("s"), Receipt: []byte("t"), Show: true})
	if err != nil || len(got.Model) < 5 || got.TookMS != replayTime.Milliseconds() || got.Was != "x" {
		t.Errorf("%+v, %v", got, err)
	}
	n.err = fmt.Errorf("%w: it is not kept", ErrRefused)
	if _, err := c.Replay(t.Context(), ReplayRequest{Job: "aa"}); !errors.Is(err, ErrRefused) || err.Error() != n.err.Error() {
		t.Errorf("%v, want %v", err, n.err)
	}
	n.err = nil
	for name, body := range map[string]string{"unknown": `{"x":1}`, "empty": "", "no object": `"aa"`, "huge": `{"job":"` + strings.Repeat("x", maxReplay) + `"}`} {
		if status, raw, err := c.ask(t.Context(), http.MethodPost, "replay", strings.NewReader(body)); err == nil && status != http.StatusConflict {
			t.Errorf("%s: %d %s", name, status, raw)
		}
		if got := <-n.refused; got != ReplayMalformed {
			t.Errorf("%s: the agent hears of %s", name, got)
		}
	}
	if _, err := c.Replay(t.Context(), ReplayRequest{Request: make([]byte, maxReplay)}); err == nil || !strings.Contains(err.Error(), "too large") {
		t.Errorf("too large: %v", err)
	}
}

func TestReplayTimeout(t *testing.T) {
	most := int(MaxReplayTime / time.Second)
	for asked, want := range map[int]time.Duration{-1: replayTime, 0: replayTime, 1: time.Second, most: MaxReplayTime, most + 1: MaxReplayTime, math.MaxInt: MaxReplayTime} {
		if got := (&ReplayRequest{TimeoutS: asked}).Timeout(); got != want {
			t.Errorf("%d seconds: %v, want %v", asked, got, want)
		}
	}
}

// There is one at a time, it ends in time, and with whoever asked for it.
func TestReplayEnds(t *testing.T) {
	n := &node{enter: make(chan struct{}), leave: make(chan struct{}), refused: make(chan ReplayCode, 1000)}
	path, _ := serve(t, n)
	c := NewClient(path)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		_, err := c.Replay(ctx, ReplayRequest{Job: "aa"})
		done <- err
	}()
	<-n.enter
	if _, err := c.Replay(t.Context(), ReplayRequest{Job: "bb"}); !errors.Is(err, ErrRefused) {
		t.Errorf("a second one: %v", err)
	}
	if got := <-n.refused; got != ReplayBusy {
		t.Errorf("the agent hears of %s", got)
	}
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	<-n.leave // the agent has been told
	for try := 0; ; try++ {
		n.enter, n.leave = make(chan struct{}), make(chan struct{})
		_, err := c.Replay(t.Context(), ReplayRequest{Job: "aa", TimeoutS: 1})
		if try < 6000 && errors.Is(err, ErrRefused) && strings.Contains(err.Error(), "another") {
			time.Sleep(10 * time.Millisecond) // the first one is on its way out
			continue
		}
		if !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), "within 1s") {
			t.Errorf("%v", err)
		}
		n.mu.Lock()
		defer n.mu.Unlock()
		if r, ok := errors.AsType[*ReplayRefusal](n.cause); !ok || r.Code != ReplayTimeout {
			t.Errorf("it was ended with %v", n.cause)
		}
		break
	}
}
