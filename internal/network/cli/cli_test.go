package cli

import (
	"bytes"
	"strings"
	"testing"
)

// A mistake on the command line has a status of its own, for every command, and
// says where to read on.
func TestUsage(t *testing.T) {
	for _, args := range []string{
		"", "serf", "init", "init --name x", "publish", "serve now", "token create 5", "apikey create", "nodes show", "nodes list all",
		"root", "root turn", "root key", "root new 5", "root sign --key x", "root sign x", "root publish", "root show", "check all",
		"order all", "order 0x12 drain", "orders --since 1h", "accounts show",
	} {
		var out, err bytes.Buffer
		dir := t.TempDir()
		full := strings.Fields(args)
		if len(full) > 1 {
			full = append(full, "--dir", dir)
		}
		if code := Main(t.Context(), full, &out, &err, "1.2.3"); code != exitUsage || !strings.Contains(err.String(), "usage: ") {
			t.Errorf("%q: %d, %s%s", args, code, &out, &err)
		}
	}
	var out, err bytes.Buffer
	if code := Main(t.Context(), []string{"--help"}, &out, &err, "1.2.3"); code != 0 || !strings.Contains(out.String(), "Exit status") {
		t.Errorf("--help: %d, %s%s", code, &out, &err)
	}
	if code := Main(t.Context(), []string{"nodes", "list", "--dir", t.TempDir()}, &out, &err, "1.2.3"); code != exitConfig {
		t.Errorf("no network: %d", code)
	}
}
