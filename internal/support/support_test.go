package support

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
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

// A file with a secret that cannot be read ends it: nothing could be looked for.
func TestSecretsMustBeReadable(t *testing.T) {
	if _, err := Secrets([]string{t.TempDir()}); err == nil {
		t.Error("a directory was read as a secret")
	}
	// One that nobody ever writes to.
	pipe := filepath.Join(t.TempDir(), "pipe")
	if err := syscall.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Secrets([]string{pipe}); err == nil {
		t.Error("a pipe was read as a secret")
	}
	if s, err := Secrets([]string{"", filepath.Join(t.TempDir(), "none")}); err != nil || len(s) != 0 {
		t.Errorf("%q, %v", s, err)
	}
	name := filepath.Join(t.TempDir(), "key.json")
	if err := os.WriteFile(name, []byte(`{"crypto":{"ciphertext":"aabbccdd"}}`), 0o600); err != nil {
		t.Fatal(err)
	}
	if s, err := Secrets([]string{name}); err != nil || len(s) != 3 || string(s[1]) != "aabbccdd" || string(s[2]) != "\xaa\xbb\xcc\xdd" {
		t.Errorf("%q, %v", s, err)
	}
}
