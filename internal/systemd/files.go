package systemd

import (
	"context"
	"fmt"
)

// Files returns the paths of the files that make up a unit as the manager has
// read it: the unit's own, and its drop-ins. None for a unit that does not exist.
func (c *Conn) Files(ctx context.Context, unit string) ([]string, error) {
	l, err := c.conn(ctx)
	if err != nil {
		return nil, err
	}
	p, err := l.GetUnitPropertiesContext(ctx, unit)
	if err != nil {
		return nil, fmt.Errorf("ask about %s: %w", unit, err)
	}
	var files []string
	for _, f := range append([]string{get[string](p, "SourcePath"), get[string](p, "FragmentPath")}, get[[]string](p, "DropInPaths")...) {
		if f != "" {
			files = append(files, f)
		}
	}
	return files, nil
}
