package cli

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/resultity/node/internal/durable"
	"github.com/resultity/node/internal/receipt"
)

// The file with a client's request is as large as a request may be, and not larger.
func TestRequestIsBounded(t *testing.T) {
	dir := t.TempDir()
	name := filepath.Join(dir, "request.json")
	for over := range 2 {
		if err := os.WriteFile(name, make([]byte, maxRequest+over), 0o600); err != nil {
			t.Fatal(err)
		}
		var out, errs bytes.Buffer
		code := Main(t.Context(), []string{"jobs", "replay", receipt.NewJobID().String(), "--dir", dir, "--request", name}, &out, &errs, "1")
		refused := strings.Contains(errs.String(), durable.ErrLarge.Error())
		t.Logf("%d bytes: expected: refused: %v; got: %d %s", maxRequest+over, over > 0, code, &errs)
		if refused != (over > 0) || code == 0 || over > 0 && !strings.Contains(errs.String(), name) {
			t.Errorf("%d bytes: %d %s", maxRequest+over, code, &errs)
		}
	}
}
