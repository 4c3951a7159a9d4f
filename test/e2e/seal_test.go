package e2e

import (
	"bytes"
	"strings"
	"testing"

	"github.com/resultity/node/test/stack"
)

// What nothing in the container may do, it cannot, and the engine still less.
func TestNothingGetsOutOfTheContainer(t *testing.T) {
	eachNode(t, func(t *testing.T, n *stack.Node) {
		out, err := s.Probe(t.Context(), n, strings.TrimPrefix(s.API, "https://"))
		if err != nil {
			t.Fatal(err)
		}
		if c := bytes.Count(out, []byte("refused  as the engine")); c < 30 {
			t.Errorf("%d attempts as the engine:\n%s", c, out)
		}
		t.Logf("%s", out)
	})
}
