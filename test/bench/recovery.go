package main

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/resultity/node/test/faults"
)

// recovery breaks one thing after the other in a world of its own.
func recovery(ctx context.Context, b *bench, t *table) (err error) {
	w, err := faults.New(ctx, os.Stderr)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, w.Close()) }()
	rounds := b.scale(3, 1)
	for _, f := range faults.Faults {
		if f.Slow && b.quick {
			continue
		}
		var took []float64
		for range rounds {
			o, err := w.Run(ctx, f)
			if err != nil {
				return fmt.Errorf("%s: %w", f.Name, err)
			}
			took = append(took, o.Recovery.Seconds())
		}
		t.add(f.Name, "s", took)
	}
	return nil
}
