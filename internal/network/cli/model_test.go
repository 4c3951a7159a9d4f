package cli

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/resultity/node/internal/chunk"
	"github.com/resultity/node/internal/snapshot"
)

func TestModelCommand(t *testing.T) {
	dir := t.TempDir()
	big := bytes.Repeat([]byte("x"), 2*chunk.Size+1)
	for name, b := range map[string][]byte{"config.json": []byte("{}"), "w/model.safetensors": big} {
		file := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	call := func(more ...string) (*snapshot.Model, string, int) {
		t.Helper()
		var out, errs bytes.Buffer
		code := Main(t.Context(), append([]string{"model", dir, "--name", "m", "--version", "1", "--format", "safetensors"}, more...), &out, &errs, "1")
		var m snapshot.Model
		if code == 0 {
			if err := json.Unmarshal(out.Bytes(), &m); err != nil {
				t.Fatal(err)
			}
		}
		return &m, errs.String(), code
	}
	oci := "oci://h/x@sha256:" + strings.Repeat("ab", 32)
	m, errs, code := call("--source", "https://h/models/m 1", "--source", oci)
	if code != 0 || len(m.Files) != 2 || m.Check() != nil {
		t.Fatalf("%d: %s", code, errs)
	}
	f := m.Files[1]
	if f.Path != "w/model.safetensors" || f.Size != int64(len(big)) || f.Sources[0] != "https://h/models/m%201/w/model.safetensors" || f.Sources[1] != oci || len(f.Chunks.Hashes) != 3*chunk.HashSize {
		t.Errorf("%+v", f)
	}
	// Too many hashes lie beside the file.
	few := *m
	few.Files = nil
	if err := describeWithin(&few, dir, []string{"https://h/m?x=1"}, 0); err != nil {
		t.Fatal(err)
	}
	list, err := os.ReadFile(filepath.Join(dir, "w/model.safetensors"+listSuffix))
	if err != nil || !bytes.Equal(list, f.Chunks.Hashes) || few.Files[1].Chunks.Hashes != nil || few.Files[1].Chunks.Sources[0] != "https://h/m/w/model.safetensors.chunks?x=1" || few.Check() != nil {
		t.Errorf("%v %+v", err, few.Files[1].Chunks)
	}
	if m, errs, code := call("--source", "https://h"); code != 0 || len(m.Files) != 2 {
		t.Errorf("a second time: %d: %s", code, errs)
	}
	if err := os.WriteFile(filepath.Join(dir, "modeling.py"), []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, errs, code := call("--source", "https://h"); code == 0 || !strings.Contains(errs, "can run code") {
		t.Errorf("code: %d: %s", code, errs)
	}
	if err := os.Remove(filepath.Join(dir, "modeling.py")); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("config.json", filepath.Join(dir, "link.json")); err != nil {
		t.Fatal(err)
	}
	if _, errs, code := call("--source", "https://h"); code == 0 || !strings.Contains(errs, "no regular file") {
		t.Errorf("a link: %d: %s", code, errs)
	}
}
