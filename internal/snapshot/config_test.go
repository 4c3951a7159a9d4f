package snapshot

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"reflect"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/resultity/node/internal/digest"
)

func golden(t testing.TB) []byte {
	t.Helper()
	raw, err := os.ReadFile("testdata/config.json")
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

// edit returns the golden configuration with the value at path (map keys and
// slice indices) replaced; the value drop removes the key.
func edit(t testing.TB, value any, path ...any) []byte {
	t.Helper()
	var doc any
	dec := json.NewDecoder(bytes.NewReader(golden(t)))
	dec.UseNumber()
	if err := dec.Decode(&doc); err != nil {
		t.Fatal(err)
	}
	at := doc
	for i, p := range path {
		last := i == len(path)-1
		switch k := p.(type) {
		case string:
			m := at.(map[string]any)
			switch {
			case last && value == drop:
				delete(m, k)
			case last:
				m[k] = value
			default:
				at = m[k]
			}
		case int:
			l := at.([]any)
			if last {
				l[k] = value
			} else {
				at = l[k]
			}
		}
	}
	raw, err := json.Marshal(doc)
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

type dropped struct{}

var drop any = dropped{}

func TestParseGolden(t *testing.T) {
	raw := golden(t)
	c, err := Parse(raw)
	if err != nil {
		t.Fatal(err)
	}
	// The file documents every field: each must be there, and printing the
	// parsed form must give the same document.
	printed, err := json.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	var got, want any
	if err := errors.Join(json.Unmarshal(printed, &got), json.Unmarshal(raw, &want)); err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("printed again:\n%s\nwant\n%s", printed, raw)
	}

	if e := c.Runtime.Engine; e != LlamaCpp {
		t.Errorf("engine %q", e)
	}
	if d := c.Network.Heartbeat.Duration(); d != 10*time.Second {
		t.Errorf("heartbeat %v", d)
	}
	if s := c.Models[0].Size(); s != 2139520 {
		t.Errorf("size %d", s)
	}
	const ref = "registry.example.net/resultity/llamacpp@sha256:2b4c6d8e0f1a3b5c7d9e1f2a4b6c8d0e2f4a6b8c0d1e3f5a7b9c1d2e4f6a8b0c"
	image := c.Runtime.Image
	if image.String() != ref || image.Repository() != "registry.example.net/resultity/llamacpp" ||
		"@"+image.Digest().String() != strings.TrimPrefix(ref, image.Repository()) {
		t.Errorf("image %s", image)
	}
}

// One bad value per field; the error must name it.
func TestParseRefuses(t *testing.T) {
	const zeros = "sha256:0000000000000000000000000000000000000000000000000000000000000000"
	model := func(files ...any) map[string]any {
		return map[string]any{"name": "m", "version": "1", "format": "gguf", "files": files}
	}
	file := func(path string) map[string]any {
		return map[string]any{"path": path, "size": 1, "sha256": digest.Of([]byte(path)).String(), "chunks": map[string]any{"root": digest.Of([]byte{1}).String()}, "sources": []string{"https://h/f"}}
	}
	many := func(n int, v any) []any {
		l := make([]any, n)
		for i := range l {
			l[i] = v
		}
		return l
	}
	key := "-----BEGIN PUBLIC KEY-----\nMFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEn1RaGFjgtOyyYBEDKxVnDFOnTNdP\nxcieAUPPs7bjVVppF/hW7H7px70HHWRTQYwgXYzla14JAAIpTj5MPylkNg==\n-----END PUBLIC KEY-----\n"
	ed25519 := "-----BEGIN PUBLIC KEY-----\nMCowBQYDK2VwAyEAGb9ECWmEzf6FQbrBZ9w7lshQhqowtrbLDFw4rXAxZuE=\n-----END PUBLIC KEY-----\n"

	tests := []struct {
		want  string // in the error
		value any
		path  []any
	}{
		{"schema is 0", 0, []any{"schema"}},
		{"schema is 0", drop, []any{"schema"}},
		{"schema is 2, this agent knows 1: upgrade the agent", 2, []any{"schema"}},
		{"schema", "1", []any{"schema"}},
		{"unknown field \"extra\"", 1, []any{"extra"}},
		{"unknown field \"extra\"", 1, []any{"runtime", "settings", "extra"}},

		{"network.name", "Testnet", []any{"network", "name"}},
		{"network.name", "test\n", []any{"network", "name"}},
		{"network.name", "", []any{"network", "name"}},
		{"network.name", strings.Repeat("n", 65), []any{"network", "name"}},
		{"network.name", 1, []any{"network", "name"}},
		{"network.chain_id", 0, []any{"network", "chain_id"}},
		{"network.chain_id", 1<<53 + 1, []any{"network", "chain_id"}},
		{"network.chain_id", -1, []any{"network", "chain_id"}},
		{"network.message_keys", []any{}, []any{"network", "message_keys"}},
		{"network.message_keys", many(17, "0x7e5f4552091a69125d5dfcb7b8c2659029395bdf"), []any{"network", "message_keys"}},
		{"network.message_keys[0]", "0x0000000000000000000000000000000000000000", []any{"network", "message_keys", 0}},
		{"network.message_keys", nil, []any{"network", "message_keys", 0}},
		{"network.message_keys[0]: address \"0x7e5f\"", "0x7e5f", []any{"network", "message_keys", 0}},
		{"network.message_keys[0]: address \"0x7E5f", "0x7E5f4552091a69125d5dfcb7b8c2659029395bdf", []any{"network", "message_keys", 0}},
		{"network.heartbeat_s", 0, []any{"network", "heartbeat_s"}},
		{"network.heartbeat_s", 3601, []any{"network", "heartbeat_s"}},
		{"network.heartbeat_s", 1.5, []any{"network", "heartbeat_s"}},
		{"network.window_s", 10, []any{"network", "window_s"}},
		{"network.window_s", 7201, []any{"network", "window_s"}},
		{"network.clock_window_s", 0, []any{"network", "clock_window_s"}},
		{"network.clock_window_s", 601, []any{"network", "clock_window_s"}},

		{"limits.request_bytes", 1, []any{"limits", "request_bytes"}},
		{"limits.response_bytes", 1, []any{"limits", "response_bytes"}},
		{"limits.tokens", 0, []any{"limits", "tokens"}},
		{"limits.tokens", 1<<20 + 1, []any{"limits", "tokens"}},
		{"limits.messages", 0, []any{"limits", "messages"}},
		{"limits.messages", 10_001, []any{"limits", "messages"}},
		{"limits.deadline_s", 0, []any{"limits", "deadline_s"}},
		{"limits.deadline_s", 86_401, []any{"limits", "deadline_s"}},
		{"limits.result_ttl_s", 59, []any{"limits", "result_ttl_s"}},
		{"limits.result_ttl_s", 30*86_400 + 1, []any{"limits", "result_ttl_s"}},

		{"logs.interval_s", drop, []any{"logs"}},
		{"logs.interval_s", 9, []any{"logs", "interval_s"}},
		{"logs.interval_s", 86_401, []any{"logs", "interval_s"}},
		{"logs.batch_bytes", 4095, []any{"logs", "batch_bytes"}},
		{"logs.batch_bytes", 256<<10 + 1, []any{"logs", "batch_bytes"}},

		{"image_trust: neither keys nor keyless", []any{}, []any{"image_trust", "keys"}},
		{"image_trust: keys[0]", "", []any{"image_trust", "keys", 0}},
		{"image_trust: keys[0]", "hello\n" + key, []any{"image_trust", "keys", 0}},
		{"image_trust: keys[0]", key + key, []any{"image_trust", "keys", 0}},
		{"image_trust: keys[0]", strings.ReplaceAll(key, "PUBLIC", "PRIVATE"), []any{"image_trust", "keys", 0}},
		{"image_trust: keys[0]", "-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n", []any{"image_trust", "keys", 0}},
		{"image_trust: keys[0]: ed25519.PublicKey: want an ECDSA key", ed25519, []any{"image_trust", "keys", 0}},
		{"image_trust: revoked[0]: want one PEM block", []any{"x"}, []any{"image_trust", "revoked"}},
		{"image_trust: revoked[0]: it is among the keys", []any{strings.TrimSuffix(key, "\n")}, []any{"image_trust", "revoked"}},
		{"image_trust: keys and keyless: podman's policy cannot ask for it", map[string]any{}, []any{"image_trust", "keyless"}},

		{"number of models", []any{}, []any{"models"}},
		{"models[1]: a second \"m\"", []any{model(file("a.gguf")), model(file("b.gguf"))}, []any{"models"}},
		{"models[0]: name", "../m", []any{"models", 0, "name"}},
		{"models[0]: version", "1 2", []any{"models", 0, "version"}},
		{"models[0]: format", "pickle", []any{"models", 0, "format"}},
		{"models[0]: number of files", []any{}, []any{"models", 0, "files"}},
		{"models[0]: files[1]: a second \"a.gguf\"", []any{file("a.gguf"), file("a.gguf")}, []any{"models", 0, "files"}},
		{"models[0]: files[0]: \"a.gguf\" is a file and a directory", []any{file("a.gguf"), file("a.gguf/b.gguf")}, []any{"models", 0, "files"}},
		{"models[0]: files[1]: \"a.gguf\" is a file and a directory", []any{file("a.gguf/b/c.gguf"), file("a.gguf")}, []any{"models", 0, "files"}},
		{"models[0]: files[0]: path", "/etc/passwd", []any{"models", 0, "files", 0, "path"}},
		{"models[0]: files[0]: path", "../m", []any{"models", 0, "files", 0, "path"}},
		{"models[0]: files[0]: path", "a/../m", []any{"models", 0, "files", 0, "path"}},
		{"models[0]: files[0]: path", "a//m", []any{"models", 0, "files", 0, "path"}},
		{"models[0]: files[0]: path", ".hidden", []any{"models", 0, "files", 0, "path"}},
		{"models[0]: files[0]: path", "a\x00", []any{"models", 0, "files", 0, "path"}},
		{"models[0]: files[0]: path", "a/b/c/d/e", []any{"models", 0, "files", 0, "path"}},
		{"models[0]: files[0]: size", 0, []any{"models", 0, "files", 0, "size"}},
		{"models[0]: files[0]: size", -1, []any{"models", 0, "files", 0, "size"}},
		{"files.size", 1e30, []any{"models", 0, "files", 0, "size"}},
		{"models[0].files[0].sha256: digest \"\"", "", []any{"models", 0, "files", 0, "sha256"}},
		{"models[0]: files[0]: sha256 is missing", drop, []any{"models", 0, "files", 0, "sha256"}},
		{"models[0].files[0].sha256: digest \"sha256:0000", zeros, []any{"models", 0, "files", 0, "sha256"}},
		{"models[0].files[0].sha256: digest \"sha256:41BF", "sha256:41BF282b6fdabec77d03e9a488e885cbd49223ed8e30919a84f22815a9d42df3", []any{"models", 0, "files", 0, "sha256"}},
		{"models[0].files[0].sha256: digest \"md5:1\"", "md5:1", []any{"models", 0, "files", 0, "sha256"}},
		{"models[0]: files[0]: number of sources", []any{}, []any{"models", 0, "files", 0, "sources"}},
		{"models[0]: files[0]: source", "http://h/f", []any{"models", 0, "files", 0, "sources", 0}},
		{"models[0]: files[0]: source", "file:///etc/passwd", []any{"models", 0, "files", 0, "sources", 0}},
		{"models[0]: files[0]: source", "https:///f", []any{"models", 0, "files", 0, "sources", 0}},
		{"models[0]: files[0]: source", "https://:443/f", []any{"models", 0, "files", 0, "sources", 0}},
		{"models[0]: files[0]: source", "https://user:pw@h/f", []any{"models", 0, "files", 0, "sources", 0}},
		{"models[0]: files[0]: source", "https://h/f#", []any{"models", 0, "files", 0, "sources", 0}},
		{"models[0]: files[0]: source", "https://h/\n", []any{"models", 0, "files", 0, "sources", 0}},

		{"models[1].files[1].chunks.root: digest", "", []any{"models", 1, "files", 1, "chunks", "root"}},
		{"chunks: root is missing", drop, []any{"models", 1, "files", 1, "chunks"}},
		{"chunks: list of chunk hashes is not the one of this root", base64.StdEncoding.EncodeToString(make([]byte, 64)), []any{"models", 1, "files", 1, "chunks", "hashes"}},
		{"chunks: list of chunk hashes is not the one of this root: it has 65", base64.StdEncoding.EncodeToString(make([]byte, 65)), []any{"models", 1, "files", 1, "chunks", "hashes"}},
		{"models[1].files[1].chunks.hashes: want base64", "AAA=\n", []any{"models", 1, "files", 1, "chunks", "hashes"}},
		{"models[1].files[1].chunks.hashes: illegal base64", "!", []any{"models", 1, "files", 1, "chunks", "hashes"}},
		{"chunks: hashes or sources are empty", "", []any{"models", 1, "files", 1, "chunks", "hashes"}},
		{"chunks: want either hashes or sources", drop, []any{"models", 1, "files", 1, "chunks", "hashes"}},
		{"chunks: want either hashes or sources", []any{"https://h/f"}, []any{"models", 1, "files", 1, "chunks", "sources"}},
		{"chunks: a file of one chunk has neither", []any{"https://h/f"}, []any{"models", 1, "files", 0, "chunks", "sources"}},
		{"chunks: hashes or sources are empty", []any{}, []any{"models", 1, "files", 2, "chunks", "sources"}},
		{"chunks: source \"oci://", []any{"oci://h/x@" + digest.Of(nil).String()}, []any{"models", 1, "files", 2, "chunks", "sources"}},
		{"models[0]: files[0]: source: image \"h/x:latest\"", "oci://h/x:latest", []any{"models", 0, "files", 0, "sources", 0}},
		{"model tiny-chat is archived", true, []any{"models", 0, "archived"}},
		{"\"model.sig\" is no file of a model of format safetensors", "x", []any{"models", 1, "signature", "file"}},
		{"\"model.sig\" is no file of a model of format safetensors: such files can run code", "config.json", []any{"models", 1, "signature", "file"}},
		{"signature: number of keys", []any{}, []any{"models", 1, "signature", "keys"}},
		{"signature: keys[0]: ed25519.PublicKey", ed25519, []any{"models", 1, "signature", "keys", 0}},
		{"signature: file \"model.sig\" is not among the files", []any{file("config.json")}, []any{"models", 1, "files"}},
		{"the parts of a split gguf file are not all here", []any{file("m-00001-of-00002.gguf")}, []any{"models", 0, "files"}},

		{"runtime: engine", "tgi", []any{"runtime", "engine"}},
		{"runtime: engine", "", []any{"runtime", "engine"}},
		{"runtime: engine vllm takes a model of format safetensors", "vllm", []any{"runtime", "engine"}},
		{"models[0]: file \"a.gguf\" is no part of a split gguf file", []any{file("a.gguf"), file("b.gguf")}, []any{"models", 0, "files"}},
		{"models[0]: files[0]: \"tiny-chat-q8_0.gguf\" is no file of a model of format safetensors", "safetensors", []any{"models", 0, "format"}},
		{"runtime: model \"other\" is not among the models", "other", []any{"runtime", "model"}},
		{"runtime: image is missing", drop, []any{"runtime", "image"}},
		{"runtime: image is missing", nil, []any{"runtime", "image"}},
		{"runtime.image: image \"registry.example.net/x:latest\"", "registry.example.net/x:latest", []any{"runtime", "image"}},
		{"runtime.devices", "nvidia.com/gpu=all", []any{"runtime", "devices"}},
		{"runtime: devices", []any{"nvidia.com/gpu=all\n"}, []any{"runtime", "devices"}},
		{"runtime: devices", []any{"/dev/kvm"}, []any{"runtime", "devices"}},
		{"runtime: number of devices", many(17, "nvidia.com/gpu=0"), []any{"runtime", "devices"}},
		{"runtime: settings.context", 0, []any{"runtime", "settings", "context"}},
		{"runtime: settings.context", 1<<24 + 1, []any{"runtime", "settings", "context"}},
		{"runtime: settings.slots", 0, []any{"runtime", "settings", "slots"}},
		{"runtime: settings.slots", 1025, []any{"runtime", "settings", "slots"}},
		{"runtime: settings.threads", -1, []any{"runtime", "settings", "threads"}},
		{"runtime: settings.threads", 1025, []any{"runtime", "settings", "threads"}},
		{"runtime: settings.gpu_layers", -1, []any{"runtime", "settings", "gpu_layers"}},
		{"runtime: settings.gpu_layers", 10_001, []any{"runtime", "settings", "gpu_layers"}},
		{"runtime: tmp_bytes", 0, []any{"runtime", "tmp_bytes"}},
		{"runtime: tmp_bytes", int64(1<<40 + 1), []any{"runtime", "tmp_bytes"}},
		{"runtime: shm_bytes", 0, []any{"runtime", "shm_bytes"}},
		{"runtime: shm_bytes", int64(1<<40 + 1), []any{"runtime", "shm_bytes"}},
		{"runtime: memory_bytes", -1, []any{"runtime", "memory_bytes"}},
		{"runtime: memory_bytes", int64(1<<50 + 1), []any{"runtime", "memory_bytes"}},
		{"runtime: device_memory_bytes", -1, []any{"runtime", "device_memory_bytes"}},
		{"runtime: device_memory_bytes is 1, want 0 to 0", 1, []any{"runtime", "device_memory_bytes"}}, // it has no devices
		{"runtime: start_timeout_s", 0, []any{"runtime", "start_timeout_s"}},
		{"runtime: start_timeout_s", 4*3600 + 1, []any{"runtime", "start_timeout_s"}},
		{"runtime: watchdog_s", 0, []any{"runtime", "watchdog_s"}},
		{"runtime: watchdog_s", 3601, []any{"runtime", "watchdog_s"}},
		{"runtime: stall_s", 0, []any{"runtime", "stall_s"}},
		{"runtime: stall_s", 3601, []any{"runtime", "stall_s"}},
		{"runtime: stop_timeout_s", 0, []any{"runtime", "stop_timeout_s"}},
		{"runtime: stop_timeout_s", 601, []any{"runtime", "stop_timeout_s"}},

		{"validation: interval_s", 9, []any{"validation", "interval_s"}},
		{"validation: interval_s", 7*24*3600 + 1, []any{"validation", "interval_s"}},
		{"validation: golden: all together may take 180 s (the sum of timeout_s), at most 179", 1799, []any{"validation", "interval_s"}},
		{"validation: golden: all together may take 2161 s (the sum of timeout_s), at most 2160: a tenth of interval_s, 21600", 2041, []any{"validation", "golden", 0, "timeout_s"}},
		{"validation: number of golden requests", []any{}, []any{"validation", "golden"}},
		{"validation: golden[0]: name", "Hello World", []any{"validation", "golden", 0, "name"}},
		{"validation: golden[1]: a second \"hello\"", "hello", []any{"validation", "golden", 1, "name"}},
		{"golden[0]: kind \"image\"", "image", []any{"validation", "golden", 0, "kind"}},
		{"golden[2]: system: a completion has no system message", "x", []any{"validation", "golden", 2, "system"}},
		{"golden[0]: bytes of prompt", "", []any{"validation", "golden", 0, "prompt"}},
		{"golden[0]: give either answers or a pattern", drop, []any{"validation", "golden", 0, "answers"}},
		{"golden[0]: give either answers or a pattern", []any{}, []any{"validation", "golden", 0, "answers"}},
		{"golden[1]: give either answers or a pattern", []any{"7"}, []any{"validation", "golden", 1, "answers"}},
		{"golden[0]: bytes of answers[0]", []any{""}, []any{"validation", "golden", 0, "answers"}},
		{"golden[0]: answers[0] is white space", []any{" \n"}, []any{"validation", "golden", 0, "answers"}},
		{"golden[0]: answers[1] is there already", []any{"a", "a"}, []any{"validation", "golden", 0, "answers"}},
		{"golden[1]: share is about answers", 50, []any{"validation", "golden", 1, "share"}},
		{"golden[2]: answers[0]: share", minShare - 1, []any{"validation", "golden", 2, "share"}},
		{"golden[2]: answers[0]: share", 100, []any{"validation", "golden", 2, "share"}},
		{"golden[2]: answers[0]: share", -1, []any{"validation", "golden", 2, "share"}},
		{"answers[0]: share: 40 percent of it are 15 bytes of", []any{"Paris is the capital of France, you know"[:37]}, []any{"validation", "golden", 2, "answers"}},
		{"answers[0]: share: 40 percent of it are 0 bytes of 0 kinds", []any{strings.Repeat(" ", 100) + "x"}, []any{"validation", "golden", 2, "answers"}},
		{"answers[0]: share: 40 percent of it are 40 bytes of 1 kinds", []any{strings.Repeat("!", 100)}, []any{"validation", "golden", 2, "answers"}},
		{"golden[0]: min_tokens is beside", 1, []any{"validation", "golden", 0, "min_tokens"}},
		{"golden[1]: min_tokens", 33, []any{"validation", "golden", 1, "min_tokens"}},
		{"golden[1]: min_tokens", -1, []any{"validation", "golden", 1, "min_tokens"}},
		{"golden[1]: pattern: ", "a)(b", []any{"validation", "golden", 1, "pattern"}},
		{"golden[1]: pattern: ", "(?=a)b", []any{"validation", "golden", 1, "pattern"}},
		{"golden[1]: pattern: it stands for", "((seven|eleven){30}){9}", []any{"validation", "golden", 1, "pattern"}},
		{"golden[1]: pattern: it matches garbage", ".*", []any{"validation", "golden", 1, "pattern"}},
		{"golden[1]: pattern: it matches garbage", "(?s).+", []any{"validation", "golden", 1, "pattern"}},
		{"golden[1]: pattern: it matches garbage", "(?s).*7.*", []any{"validation", "golden", 1, "pattern"}},
		{"golden[1]: pattern: it matches garbage", "(?s).{20,}", []any{"validation", "golden", 1, "pattern"}},
		{"golden[1]: pattern: it matches garbage", "seven|", []any{"validation", "golden", 1, "pattern"}},
		{"golden[1]: pattern: it matches garbage", `[a-z ]+`, []any{"validation", "golden", 1, "pattern"}},
		{"golden[1]: pattern: it matches garbage", `\d+`, []any{"validation", "golden", 1, "pattern"}},
		{"golden[1]: pattern: it matches garbage", `!*`, []any{"validation", "golden", 1, "pattern"}},
		{"golden[1]: pattern: it matches garbage", `(?s)(\w+\s*)+`, []any{"validation", "golden", 1, "pattern"}},
		{"golden[1]: pattern: it matches garbage", `[^G]*`, []any{"validation", "golden", 1, "pattern"}},
		{"golden[0]: tokens", 0, []any{"validation", "golden", 0, "tokens"}},
		{"golden[0]: tokens", 1025, []any{"validation", "golden", 0, "tokens"}},
		{"golden[0]: timeout_s", 0, []any{"validation", "golden", 0, "timeout_s"}},
		{"golden[0]: timeout_s", 3601, []any{"validation", "golden", 0, "timeout_s"}},
	}
	covered := map[string]bool{ // by TestKeyless
		".image_trust.keyless.email": true, ".image_trust.keyless.issuer": true, ".image_trust.keyless.trusted_root": true,
	}
	for _, tt := range tests {
		c, err := Parse(edit(t, tt.value, tt.path...))
		if c != nil || !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%v = %.60v: got %v, want %q", tt.path, tt.value, err, tt.want)
		}
		name := ""
		for _, p := range tt.path {
			if s, ok := p.(string); ok {
				name += "." + s
			}
		}
		covered[name] = true
	}
	// A field that is added later must be added here too.
	for _, f := range fields(reflect.TypeFor[Config](), "") {
		if !covered[f] {
			t.Errorf("no bad value is tried for %s", f)
		}
	}
}

// At each bound a configuration is taken, and one beyond it refused with its name. The
// other cases above break all other rules of a value.
func TestParseIsBounded(t *testing.T) {
	list := func(n int, v func(i int) any) []any {
		l := make([]any, n)
		for i := range l {
			l[i] = v(i)
		}
		return l
	}
	same := func(v any) func(int) any { return func(int) any { return v } }
	file := func(path string, more ...any) map[string]any {
		d := digest.Of([]byte(path)).String()
		f := map[string]any{"path": path, "size": 1, "sha256": d, "chunks": map[string]any{"root": d}, "sources": []string{"https://h/f"}}
		for i := 0; i < len(more); i += 2 {
			f[more[i].(string)] = more[i+1]
		}
		return f
	}
	model := func(name string, files ...any) map[string]any {
		return map[string]any{"name": name, "version": "1", "format": "gguf", "files": files}
	}
	chat := func(files ...any) map[string]any { return model("tiny-chat", files...) }
	parts := func(sources any) any {
		return map[string]any{"root": digest.Of(nil).String(), "sources": sources}
	}
	golden := func(i int, pattern any) map[string]any {
		g := map[string]any{"name": "g" + strconv.Itoa(i), "prompt": "x", "tokens": 1, "timeout_s": 1}
		if pattern == nil {
			g["answers"] = []string{"y"}
		} else {
			g["pattern"] = pattern
		}
		return g
	}
	key, other := publicKey(t), publicKey(t)
	text := func(n int) any { return strings.Repeat("p", n) }
	url := func(n int) any { return []any{"https://h/" + strings.Repeat("f", n-len("https://h/"))} }
	number := func(n int) any { return n }
	// Of n instructions: four letters, the n's, and one for each of two operations.
	repeats := func(n int) string { return fmt.Sprintf("seven{%d}", n-6) }

	for _, c := range []struct {
		bound int
		want  string // beyond it
		value func(n int) any
		path  []any
	}{
		{maxBody, "limits.request_bytes", number, []any{"limits", "request_bytes"}},
		{maxBody, "limits.response_bytes", number, []any{"limits", "response_bytes"}},
		{maxImageKeys, "image_trust: number of keys", func(n int) any { return list(n, same(key)) }, []any{"image_trust", "keys"}},
		{maxImageKey, "image_trust: keys[0]: bytes of a key", func(n int) any { return []any{key + strings.Repeat("\n", n-len(key))} }, []any{"image_trust", "keys"}},
		{maxRevoked, "image_trust: number of revoked", func(n int) any { return list(n, same(other)) }, []any{"image_trust", "revoked"}},
		{maxModels, "number of models", func(n int) any {
			return append([]any{chat(file("a.gguf"))}, list(n-1, func(i int) any { return model("m"+strconv.Itoa(i), file("a.gguf")) })...)
		}, []any{"models"}},
		{maxFiles, "models[0]: number of files", func(n int) any {
			return list(n, func(i int) any { return file(fmt.Sprintf("m-%05d-of-%05d.gguf", i+1, n)) })
		}, []any{"models", 0, "files"}},
		{maxFileBytes, "models[0]: files[0]: size", func(n int) any {
			return []any{file("a.gguf", "size", n, "chunks", parts([]string{"https://h/c"}))}
		}, []any{"models", 0, "files"}},
		{maxSources, "models[0]: files[0]: number of sources", func(n int) any { return list(n, same("https://h/f")) }, []any{"models", 0, "files", 0, "sources"}},
		{maxSources, "models[0]: files[0]: chunks: number of sources", func(n int) any {
			return []any{file("a.gguf", "size", maxFileBytes, "chunks", parts(list(n, same("https://h/f"))))}
		}, []any{"models", 0, "files"}},
		{maxURL, "models[0]: files[0]: bytes of a source", url, []any{"models", 0, "files", 0, "sources"}},
		{maxURL, "models[0]: files[0]: chunks: bytes of a source", func(n int) any {
			return []any{file("a.gguf", "size", maxFileBytes, "chunks", parts(url(n)))}
		}, []any{"models", 0, "files"}},
		{maxGolden, "validation: number of golden requests", func(n int) any { return list(n, func(i int) any { return golden(i, nil) }) }, []any{"validation", "golden"}},
		{maxPrompt, "golden[0]: bytes of prompt", text, []any{"validation", "golden", 0, "prompt"}},
		{maxPrompt, "golden[1]: bytes of system", text, []any{"validation", "golden", 1, "system"}},
		{maxAnswers, "golden[0]: number of answers", func(n int) any { return list(n, func(i int) any { return "a" + strconv.Itoa(i) }) }, []any{"validation", "golden", 0, "answers"}},
		{maxAnswer, "golden[0]: bytes of answers[1]", func(n int) any { return []any{"a", text(n)} }, []any{"validation", "golden", 0, "answers"}},
		{maxPattern, "golden[1]: bytes of pattern", text, []any{"validation", "golden", 1, "pattern"}},
		{maxProgram, "golden[1]: pattern: it stands for", func(n int) any { return repeats(n) }, []any{"validation", "golden", 1, "pattern"}},
		{maxPrograms, "pattern: it and those before it stand for", func(n int) any {
			l := list(n/maxProgram, func(i int) any { return golden(i, repeats(maxProgram)) })
			if rest := n % maxProgram; rest > 0 {
				l = append(l, golden(len(l), text(rest)))
			}
			return l
		}, []any{"validation", "golden"}},
	} {
		if _, err := Parse(edit(t, c.value(c.bound), c.path...)); err != nil {
			t.Errorf("%s: %d: %v", c.want, c.bound, err)
		}
		_, err := Parse(edit(t, c.value(c.bound+1), c.path...))
		t.Logf("%d: expected: %s; got: %v", c.bound+1, c.want, err)
		if !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%d: %v, want %q", c.bound+1, err, c.want)
		}
	}
}

// fields lists the JSON paths of all fields below t that hold no struct.
func fields(t reflect.Type, at string) []string {
	for t.Kind() == reflect.Slice || t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	var l []string
	if t.Kind() == reflect.Struct {
		for f := range t.Fields() {
			if name, _, _ := strings.Cut(f.Tag.Get("json"), ","); name != "" {
				l = append(l, fields(f.Type, at+"."+name)...)
			}
		}
	}
	if l == nil {
		l = []string{at}
	}
	return l
}

// The bytes themselves, whatever they mean.
func TestParseTakesOneSpelling(t *testing.T) {
	raw := string(golden(t))
	replace := func(old, new string) string {
		if !strings.Contains(raw, old) {
			t.Fatalf("no %s in the golden file", old)
		}
		return strings.Replace(raw, old, new, 1)
	}
	tests := []struct{ name, raw, want string }{
		{"empty", "", "unexpected end"},
		{"null", "null", "schema is 0"},
		{"list", "[]", "array"},
		{"cut short", raw[:len(raw)/2], "unexpected end"},
		{"something follows", raw + "{}", "after top-level value"},
		{"too large", raw + strings.Repeat(" ", MaxSize), "at most 1048576"},
		{"not UTF-8", replace("What is", "What\xffis"), "UTF-8"},
		{"a field twice", replace(`"slots": 4`, `"slots": 4, "slots": 5`), "runtime.settings.slots is given twice"},
		{"a field twice in a list", replace(`"size": 2139520`, `"size": 1, "size": 2139520`), "models[0].files[0].size is given twice"},
		{"the schema twice", replace(`"schema": 1`, `"schema": 2, "schema": 1`), "schema is given twice"},
		{"a field twice by case", replace(`"slots": 4`, `"slots": 4, "Slots": 5`), `unknown field "runtime.settings.Slots"`},
		{"other case", replace(`"network"`, `"Network"`), `unknown field "Network"`},
		{"folding", replace(`"slots"`, "\"\u017flots\""), "unknown field"},
		{"nested", replace(`"schema": 1`, `"schema": 1, "x": `+strings.Repeat("[", 9000)+strings.Repeat("]", 9000)), "deeper than any field"},
		{"nested a level too deep", replace(`"schema": 1`, `"schema": 1, "x": `+strings.Repeat("[", maxDepth+1)+strings.Repeat("]", maxDepth+1)), "deeper than any field"},
		{"nested as deep as can be", replace(`"schema": 1`, `"schema": 1, "x": `+strings.Repeat("[", maxDepth)+strings.Repeat("]", maxDepth)), `unknown field "x"`},
		{"nested without end", strings.Repeat("[", MaxSize), "max depth"},
	}
	for _, tt := range tests {
		c, err := Parse([]byte(tt.raw))
		if c != nil || !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: got %v, want %q", tt.name, err, tt.want)
		}
	}
}

func TestParseImageRefRefuses(t *testing.T) {
	const d = "@sha256:2b4c6d8e0f1a3b5c7d9e1f2a4b6c8d0e2f4a6b8c0d1e3f5a7b9c1d2e4f6a8b0c"
	for _, s := range []string{
		"", "h/x", d, "x" + d, "h/x:tag" + d, "h/X" + d, "H/x" + d, "h//x" + d, "h/x/" + d, "/x" + d, "h/../x" + d, "h/x\n" + d,
		"https://h/x" + d, "-h/x" + d, "h:/x" + d, "h:123456/x" + d, "h/x$y" + d, "h/%x" + d, "h/x y" + d, "u@h/x" + d, "h/x" + d + d,
		"h/x" + strings.ToUpper(d), "h/x" + d + "\n", "h/x" + d[:20], "h/" + strings.Repeat("x", 254) + d,
	} {
		if r, err := ParseImageRef(s); err == nil {
			t.Errorf("took %q as %s", s, r)
		}
	}
	for _, s := range []string{"h/x" + d, "localhost:5000/a/b-c/d_e.f" + d} {
		if r, err := ParseImageRef(s); err != nil || r.String() != s {
			t.Errorf("%q: got %s, %v", s, r, err)
		}
	}
}

// Whatever is taken must be taken again in the form that it prints, and mean
// the same; nothing may crash.
func FuzzParse(f *testing.F) {
	f.Add(golden(f))
	f.Add([]byte(`{"schema":1,"network":{"name":null}}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		c, err := Parse(raw)
		if err != nil {
			if c != nil || !errors.Is(err, ErrInvalid) {
				t.Fatalf("Parse = %v, %v", c, err)
			}
			return
		}
		printed, err := json.Marshal(c)
		if err != nil {
			t.Fatal(err)
		}
		again, err := Parse(printed)
		if len(printed) > MaxSize {
			return // escapes can make it longer
		}
		if err != nil || !reflect.DeepEqual(again, c) {
			t.Fatalf("Parse(print) = %+v, %v\nwant %+v", again, err, c)
		}
	})
}
