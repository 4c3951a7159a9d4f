package durable

import (
	"errors"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

func TestRead(t *testing.T) {
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(os.WriteFile(at("full"), []byte("12345678"), 0o600))
	must(os.WriteFile(at("large"), []byte("123456789"), 0o600))
	must(os.Symlink(at("full"), at("link")))
	must(os.Mkdir(at("dir"), 0o700))
	must(syscall.Mkfifo(at("pipe"), 0o600))
	l, err := net.Listen("unix", at("socket"))
	must(err)
	defer l.Close()
	for _, c := range []struct {
		name       string
		named, own error
	}{
		{"full", nil, nil},
		{"large", ErrLarge, ErrLarge},
		{"link", nil, ErrNotFile},
		{"missing", fs.ErrNotExist, fs.ErrNotExist},
		{"dir", syscall.EISDIR, ErrNotFile},
		{"socket", syscall.ENXIO, ErrNotFile},
		{"pipe", nil, ErrNotFile}, // and nobody waits for a writer
	} {
		raw, err := ReadOwn(at(c.name), 8)
		if !errors.Is(err, c.own) || err == nil && string(raw) != "12345678" || err != nil && !strings.Contains(err.Error(), at(c.name)) {
			t.Errorf("ReadOwn(%s) = %q, %v; want %v", c.name, raw, err, c.own)
		}
		if c.name == "pipe" {
			go func() { _ = os.WriteFile(at(c.name), []byte("12345678"), 0) }()
		}
		raw, err = ReadFile(at(c.name), 8)
		if !errors.Is(err, c.named) || err == nil && string(raw) != "12345678" || err != nil && !strings.Contains(err.Error(), at(c.name)) {
			t.Errorf("ReadFile(%s) = %q, %v; want %v", c.name, raw, err, c.named)
		}
	}
	must(os.WriteFile(at("shared"), []byte("12345678"), 0o640))
	must(os.Symlink(at("shared"), at("link-to-shared")))
	for name, want := range map[string]error{
		"full": nil, "link": nil, "large": ErrLarge, "shared": ErrShared, "link-to-shared": ErrShared, "missing": fs.ErrNotExist, "dir": ErrNotFile, "pipe": ErrNotFile,
	} {
		raw, err := ReadSecret(at(name), 8)
		if !errors.Is(err, want) || err == nil && string(raw) != "12345678" || err != nil && !strings.Contains(err.Error(), at(name)) {
			t.Errorf("ReadSecret(%s) = %q, %v; want %v", name, raw, err, want)
		}
	}
	if raw, err := ReadAll(strings.NewReader("123"), 2); string(raw) != "12" || !errors.Is(err, ErrLarge) {
		t.Errorf("%q, %v", raw, err)
	}
}
