package nodes

import (
	"bytes"
	"context"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/resultity/node/internal/evm"
	"github.com/resultity/node/internal/network/store"
)

// brokenRegistry fails to change nodes while there is an error.
type brokenRegistry struct {
	registry
	err error
}

func (r *brokenRegistry) UpdateNode(context.Context, evm.Address, func(*store.Node) error) (store.Node, error) {
	return store.Node{}, r.err
}

// However many nodes come back while the disk is full, the log says it once, and
// again when it fails the next time.
func TestCountsOnAFullDisk(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var text bytes.Buffer
		r, c := &brokenRegistry{}, newCounts()
		ctx, cancel := context.WithCancel(t.Context())
		go c.keep(ctx, r, slog.New(slog.NewTextHandler(&text, nil)))
		count := uint64(0)
		for _, tt := range []struct {
			err  error
			said int
		}{{store.ErrNoRoom, 1}, {store.ErrNoRoom, 1}, {nil, 1}, {store.ErrNoRoom, 2}, {store.ErrNotFound, 2}} {
			r.err = tt.err
			count++
			for n := byte(1); n <= 3; n++ {
				if err := c.take(evm.Address{n}, count, 0); err != nil {
					t.Fatal(err)
				}
			}
			time.Sleep(10 * pace)
			synctest.Wait()
			if said := strings.Count(text.String(), "not written down"); said != tt.said {
				t.Errorf("%v: said %d times, want %d", tt.err, said, tt.said)
			}
		}
		cancel()
	})
}
