package hardware

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestProfileOfThisMachine(t *testing.T) {
	h := Profile(t.TempDir())
	if h.Arch == "" || h.CPUs < 1 || h.Memory < 1<<20 || h.Disk <= 0 || h.Kernel == "" || h.GPUs == nil {
		t.Errorf("%+v", h)
	}
}

func TestOddFilesGiveNothing(t *testing.T) {
	f := filepath.Join(t.TempDir(), "f")
	if got := memory(f); got != 0 {
		t.Errorf("missing file: %d", got)
	}
	for text, want := range map[string]int64{"MemTotal:  16 kB\n": 16 << 10, "MemTotal: -1 kB\n": 0, "MemTotal: x\n": 0, "": 0} {
		if err := os.WriteFile(f, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if got := memory(f); got != want {
			t.Errorf("%q: %d, want %d", text, got, want)
		}
	}
	if err := os.WriteFile(f, []byte(`PRETTY_NAME="`+strings.Repeat("x", 1000)), 0o600); err != nil {
		t.Fatal(err)
	}
	if got := osName(f); len(got) > 200 {
		t.Errorf("%d bytes", len(got))
	}
}
