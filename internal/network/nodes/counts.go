package nodes

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/resultity/node/internal/evm"
	"github.com/resultity/node/internal/failpoint"
	"github.com/resultity/node/internal/network/store"
)

// counts finds out when a node's key is held twice: the count in its hellos must
// rise. What was seen is known here at once and written down a little later, one
// node at a time, so that thousands who come back together do not wait for the
// disk, nor jobs for them. What a crash loses delays a discovery, no more.
type counts struct {
	wake chan struct{} // capacity 1: there is something to write down

	mu    sync.Mutex // guards what follows, for the length of a map operation
	seen  map[evm.Address]uint64
	dirty map[evm.Address]mark
}

// mark is what is to be written down about a node.
type mark struct {
	hello  uint64
	cloned time.Time // zero for not
}

func newCounts() *counts {
	return &counts{wake: make(chan struct{}, 1), seen: map[evm.Address]uint64{}, dirty: map[evm.Address]mark{}}
}

// take fails with errCloned unless count is higher than all before. counted is
// the highest by the registry.
func (c *counts) take(node evm.Address, count, counted uint64) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	before := max(counted, c.seen[node])
	m := c.dirty[node]
	risen := count > before
	if risen {
		c.seen[node], m.hello = count, count
	} else {
		m.cloned = time.Now()
	}
	c.dirty[node] = m
	select {
	case c.wake <- struct{}{}:
	default:
	}
	if !risen {
		return fmt.Errorf("%w: hello %d after %d", errCloned, count, before)
	}
	return nil
}

// pace is the least time between two writes, so that jobs find room between them.
const pace = 10 * time.Millisecond

// keep writes down what was seen, until ctx ends. When that fails it says so once:
// thousands of nodes may come back while the disk is full.
func (c *counts) keep(ctx context.Context, r registry, log *slog.Logger) {
	failing := false
	for {
		select {
		case <-ctx.Done():
			return
		case <-c.wake:
		}
		for node, m := range c.drain() {
			failpoint.Here("nodes.count.begin")
			_, err := r.UpdateNode(ctx, node, func(n *store.Node) error {
				n.Hello = max(n.Hello, m.hello)
				if !m.cloned.IsZero() {
					n.Cloned = m.cloned.UnixMilli()
				}
				return nil
			})
			switch {
			case err == nil:
				failing = false
			case !failing && ctx.Err() == nil && !errors.Is(err, store.ErrNotFound):
				failing = true
				log.Warn("counts of nodes' hellos are not written down; their next ones say them again", "node", node, "error", err)
			}
			select {
			case <-ctx.Done():
				return
			case <-time.After(pace):
			}
		}
	}
}

// drain empties dirty.
func (c *counts) drain() map[evm.Address]mark {
	c.mu.Lock()
	defer c.mu.Unlock()
	d := c.dirty
	c.dirty = map[evm.Address]mark{}
	return d
}
