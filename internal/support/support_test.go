package support

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/resultity/node/internal/durable"
)

// A secret is found in each form, wherever it stands in something longer.
func TestWriteRefusesSecrets(t *testing.T) {
	for _, secret := range []string{"abcd", "hunter2", "correct horse battery staple", "\x00\xff\xfe\x80\x81\x82\x83\x84"} {
		for before := range 4 {
			for after := range 4 {
				long := []byte(strings.Repeat("<", before) + secret + strings.Repeat(">", after))
				for _, text := range []string{string(long), hex.EncodeToString(long), strings.ToUpper(hex.EncodeToString(long)), base64.StdEncoding.EncodeToString(long), base64.RawURLEncoding.EncodeToString(long)} {
					var a Archive
					a.Add("harmless", []byte("nothing"))
					a.Add("leak", []byte("it says: "+text+" ..."))
					var b bytes.Buffer
					err := a.Write(&b, time.Now(), [][]byte{[]byte("another secret"), []byte(secret + "\n")})
					if len(secret) == 4 && !errors.Is(err, ErrSecret) && !strings.Contains(text, secret) && !strings.Contains(strings.ToLower(text), hex.EncodeToString([]byte(secret))) {
						continue // four bytes leave too few characters of their own in base64
					}
					if before+after == 0 {
						t.Logf("%.40q: expected: %v, and no byte; got: %v, and %d bytes", text, ErrSecret, err, b.Len())
					}
					if !errors.Is(err, ErrSecret) || !strings.Contains(err.Error(), "leak") || b.Len() > 0 {
						t.Errorf("%q in %q: %v, %d bytes", secret, text, err, b.Len())
					}
				}
			}
		}
	}
	var a Archive
	a.Add("harmless", []byte("nothing"))
	if err := a.Write(new(bytes.Buffer), time.Now(), [][]byte{[]byte("secret"), nil, []byte("\n")}); err != nil {
		t.Error(err)
	}
}

func TestBounds(t *testing.T) {
	var a Archive
	for range maxFiles + 10 {
		a.Add("f", bytes.Repeat([]byte("x"), MaxFile+1))
	}
	if a.total > maxTotal || len(a.files) > maxFiles {
		t.Errorf("%d bytes in %d files", a.total, len(a.files))
	}
	if f := a.files[0]; len(f.data) != MaxFile || !bytes.HasSuffix(f.data, []byte("(cut here)\n")) {
		t.Errorf("%d bytes", len(f.data))
	}
}

func TestConfigKeepsWhatIsKnown(t *testing.T) {
	got := string(Config([]byte(`
[network.testnet]
priority = 3
url = "https://network.example:8443"
root = "relative/secret"
[network."odd key"]
x = "y"
[log]
level = 3
upload = "off"
[runtime]
memory_max = "24G"
devices = ["nvidia.com/gpu=0", "amd.com/gpu=*"]
[paths]
state = ["/a", "secret"]
[more]
password = "p"
`)))
	want := []string{`network.testnet.priority = 3`, `network.testnet.url = "https://network.example:8443"`, "# network.testnet.root: not of the form", "# a key of an odd form", "# log.level: not of the form", `log.upload = "off"`, `runtime.memory_max = "24G"`,
		`runtime.devices = ["nvidia.com/gpu=0", "amd.com/gpu=*"]`, "# paths.state: not of the form", "# more.password: an unknown key"}
	for _, w := range want {
		if !strings.Contains(got, w) {
			t.Errorf("no %q in\n%s", w, got)
		}
	}
	if strings.Count(got, "\n") != len(want) {
		t.Errorf("too much:\n%s", got)
	}
}

// What stands in place of a file is not followed, waited for or read beyond its bound.
// A file with a secret that cannot be read ends it: nothing could be looked for.
func TestRead(t *testing.T) {
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(os.WriteFile(at("key.json"), []byte(`{"crypto":{"ciphertext":"aabbccdd"}}`), 0o600))
	must(os.WriteFile(at("full"), make([]byte, maxSecret), 0o600))
	must(os.WriteFile(at("large"), make([]byte, maxSecret+1), 0o600))
	must(os.Symlink(at("full"), at("link")))
	must(os.Symlink(os.DevNull, at("device")))
	must(syscall.Mkfifo(at("pipe"), 0o600)) // to which nobody ever writes
	for _, c := range []struct {
		name       string
		named, own error
	}{
		{"full", nil, nil},
		{"large", durable.ErrLarge, durable.ErrLarge},
		{"link", nil, durable.ErrNotFile},
		{"device", durable.ErrNotFile, durable.ErrNotFile},
		{"pipe", durable.ErrNotFile, durable.ErrNotFile},
		{".", durable.ErrNotFile, durable.ErrNotFile},
		{"none", nil, nil},
	} {
		_, named := Secrets([]string{at(c.name)}, nil)
		_, own := Secrets(nil, []string{at(c.name)})
		t.Logf("%s in place of a secret: expected: %v, %v; got: %v, %v", c.name, c.named, c.own, named, own)
		if !errors.Is(named, c.named) || !errors.Is(own, c.own) || (named == nil) != (c.named == nil) || own != nil && !strings.Contains(own.Error(), at(c.name)) {
			t.Errorf("%s: %v and %v, want %v and %v", c.name, named, own, c.named, c.own)
		}
	}
	if s, err := Secrets([]string{"", at("none")}, []string{at("key.json")}); err != nil || len(s) != 3 || string(s[1]) != "aabbccdd" || string(s[2]) != "\xaa\xbb\xcc\xdd" {
		t.Errorf("%q, %v", s, err)
	}
}

// The account names unit files to root. It is shown none that it could not read.
func TestUnitsOfTheAccount(t *testing.T) {
	dir, me := t.TempDir(), os.Getuid()
	if err := errors.Join(os.Chmod(filepath.Dir(dir), 0o755), os.Mkdir(filepath.Join(dir, "closed"), 0o700)); err != nil { // the former is the test's alone, too
		t.Fatal(err)
	}
	at := func(name string) string { return filepath.Join(dir, name) }
	for name, mode := range map[string]os.FileMode{"own.service": 0o600, "open.service": 0o644, "closed/open.service": 0o644} {
		if err := os.WriteFile(at(name), []byte("[Unit]\nDescription=it is "+name+"\n"), mode); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(at(name), at("link-to-"+strings.ReplaceAll(name, "/", "-"))); err != nil {
			t.Fatal(err)
		}
	}
	for account, shown := range map[int]string{me: "own.service link-to-own.service open.service link-to-open.service closed/open.service link-to-closed-open.service", me + 1: "open.service link-to-open.service"} {
		for _, name := range []string{"own.service", "link-to-own.service", "open.service", "link-to-open.service", "closed/open.service", "link-to-closed-open.service"} {
			var a Archive
			a.Units("u", []string{at(name)}, account)
			got, want := strings.Contains(string(a.files[0].data), "it is"), slices.Contains(strings.Fields(shown), name)
			t.Logf("%s for uid %+d: expected: shown %v; got: %v, %q", name, account-me, want, got, a.files[0].data)
			if got != want || !want && string(a.files[0].data) != errNotShown.Error()+"\n" {
				t.Errorf("%s for uid %d: %q", name, account, a.files[0].data)
			}
		}
	}
}
