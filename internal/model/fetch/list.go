package fetch

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"

	"github.com/resultity/node/internal/chunk"
	"github.com/resultity/node/internal/snapshot"
)

// List returns the hashes of f's chunks: from the configuration, or from where that
// says. They are what the root names, whoever brought them. The sources are asked
// in turn, ever less often; the errors of all are wrapped.
func (x *Fetcher) List(ctx context.Context, f *snapshot.File) (*chunk.List, error) {
	if f.Chunks.Hashes != nil || chunk.Count(f.Size) == 1 {
		return chunk.Parse(f.Chunks.Hashes, f.Size, f.Chunks.Root)
	}
	sources := make([]*source, len(f.Chunks.Sources))
	for i, s := range f.Chunks.Sources {
		sources[i] = &source{name: place(s), url: s, client: x.world}
	}
	for turn := 0; ; turn++ {
		var errs []error
		again := false
		for _, s := range sources {
			if !s.out {
				l, err := x.list(ctx, s.url, f)
				if err == nil {
					return l, nil
				}
				if ctx.Err() != nil {
					return nil, ctx.Err()
				}
				s.note(err)
				_, s.out = errors.AsType[permanentError](err)
				again = again || !s.out
			}
			errs = append(errs, fmt.Errorf("%s: %w", s.name, errors.Join(s.errs...)))
		}
		if !again || turn >= len(x.Pace.Delays) {
			return nil, fmt.Errorf("no source has brought the hashes of its chunks: %w", errors.Join(errs...))
		}
		if err := sleep(ctx, jittered(x.Pace.Delays[turn])); err != nil {
			return nil, err
		}
	}
}

func (x *Fetcher) list(ctx context.Context, address string, f *snapshot.File) (*chunk.List, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	l := newLine(x.Pace, func() { cancel(ErrStalled) })
	defer l.close()
	why := func(err error) error {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		return classify(err)
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, address, nil)
	if err != nil {
		return nil, permanentError{err}
	}
	req.Header.Set("User-Agent", "resultity-node")
	var resp *http.Response
	l.wait(func() int {
		resp, err = x.world.Do(req)
		return 0
	})
	if err != nil {
		return nil, why(err)
	}
	defer resp.Body.Close() // what was not read is not wanted
	if resp.StatusCode != http.StatusOK {
		return nil, refusal(resp)
	}
	most := int64(chunk.Count(f.Size)) * chunk.HashSize
	raw, err := io.ReadAll(io.LimitReader(&lineReader{line: l, r: resp.Body}, most+1))
	if err != nil {
		return nil, why(err)
	}
	list, err := chunk.Parse(raw, f.Size, f.Chunks.Root)
	if err != nil {
		return nil, permanentError{err}
	}
	return list, nil
}
