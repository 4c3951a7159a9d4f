package agent

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/resultity/node/internal/bridge/contract"
	"github.com/resultity/node/internal/control"
	"github.com/resultity/node/internal/deploy/deploytest"
	"github.com/resultity/node/internal/image"
	"github.com/resultity/node/internal/journal"
	"github.com/resultity/node/internal/openai"
	"github.com/resultity/node/internal/podman"
	"github.com/resultity/node/internal/runtime"
	"github.com/resultity/node/internal/snapshot"
	"github.com/resultity/node/internal/support"
)

// sealed answers for the bridge's probe in a container that is sealed but for
// the targets that begin with open.
func sealed(open string) func(context.Context, ...string) ([]byte, error) {
	return func(_ context.Context, command ...string) ([]byte, error) {
		var rs []contract.Reach
		for _, target := range command[2:] {
			r := contract.Reach{Target: target, Reached: open != "" && strings.HasPrefix(target, open)}
			if !r.Reached {
				r.Error = "network is unreachable"
			}
			rs = append(rs, r)
		}
		return json.Marshal(rs)
	}
}

func intact() (bool, error) { return true, nil }

func offered(r image.Refusal, err error) func(context.Context, *snapshot.ImageTrust) (image.Refusal, error) {
	return func(context.Context, *snapshot.ImageTrust) (image.Refusal, error) { return r, err }
}

var refusal = image.Refusal{Agent: image.ErrUnsigned, Podman: podman.ErrRefused, Asked: true}

// oneTokenEngine is an engine with one way to answer.
type oneTokenEngine struct {
	res runtime.Result
	err error
}

func (e oneTokenEngine) Run(_ context.Context, _ runtime.Job, emit func([]byte) error) (runtime.Result, error) {
	if e.err == nil {
		if err := emit([]byte("data")); err != nil {
			return runtime.Result{}, err
		}
	}
	return e.res, e.err
}
func (oneTokenEngine) Close() {}

func TestProbes(t *testing.T) {
	token := oneTokenEngine{res: runtime.Result{Usage: openai.Usage{CompletionTokens: 1}}}
	for _, c := range []struct {
		name     string
		unsigned func(context.Context, *snapshot.ImageTrust) (image.Refusal, error)
		policy   func() (bool, error)
		exec     func(context.Context, ...string) ([]byte, error)
		engine   oneTokenEngine
		idle     bool // nothing is deployed
		probe    string
		want     control.Result
		detail   string
	}{
		{name: "all is well", probe: control.ProbeOneToken, want: control.Pass, detail: "first token after"},
		{name: "Podman lets it in", unsigned: offered(image.Refusal{Agent: image.ErrUnsigned, Asked: true}, nil), probe: control.ProbeUnsignedPodman, want: control.Fail, detail: "policy.json"},
		{name: "and keeps it", unsigned: offered(image.Refusal{Agent: image.ErrUnsigned, Asked: true}, errBroken), probe: control.ProbeUnsignedPodman, want: control.Fail, detail: "not removed"},
		{name: "Podman refuses unseen", unsigned: offered(image.Refusal{Agent: image.ErrUnsigned, Podman: podman.ErrRefused}, nil), probe: control.ProbeUnsignedPodman, want: control.NotMeasured},
		{name: "Podman fails", unsigned: offered(image.Refusal{Agent: image.ErrUnsigned, Podman: errBroken, Asked: true}, nil), probe: control.ProbeUnsignedPodman, want: control.NotMeasured, detail: "broken"},
		{name: "the agent lets it in", unsigned: offered(image.Refusal{Podman: podman.ErrRefused, Asked: true}, nil), probe: control.ProbeUnsignedAgent, want: control.Fail},
		{name: "the agent cannot ask", unsigned: offered(image.Refusal{Agent: errBroken, Podman: podman.ErrRefused, Asked: true}, nil), probe: control.ProbeUnsignedAgent, want: control.NotMeasured},
		{name: "no probe", unsigned: offered(image.Refusal{}, errBroken), probe: control.ProbeUnsignedAgent, want: control.NotMeasured, detail: "broken"},
		{name: "no probe, so nothing of Podman", unsigned: offered(image.Refusal{}, errBroken), probe: control.ProbeUnsignedPodman, want: control.NotMeasured},
		{name: "Podman's policy", probe: control.ProbeUnsignedPodman, want: control.Pass, detail: "as the agent wrote it"},
		{name: "a changed policy", policy: func() (bool, error) { return true, image.ErrPolicy }, probe: control.ProbeUnsignedPodman, want: control.Fail, detail: "policy.json"},
		{name: "a policy that cannot be read", policy: func() (bool, error) { return true, errBroken }, probe: control.ProbeUnsignedPodman, want: control.NotMeasured, detail: "broken"},
		{name: "no policy yet", policy: func() (bool, error) { return false, nil }, probe: control.ProbeUnsignedPodman, want: control.NotMeasured, detail: "no policy"},

		{name: "sealed", probe: control.ProbeSocketOut, want: control.Pass, detail: "none is open"},
		{name: "the host's loopback", exec: sealed("tcp 127.0.0.1"), probe: control.ProbeSocketOut, want: control.Fail, detail: "reached tcp 127.0.0.1"},
		{name: "an abstract socket", exec: sealed("unix @"), probe: control.ProbeSocketOut, want: control.Fail, detail: "unix @resultity-doctor-"},
		{name: "beyond", exec: sealed("udp [2001"), probe: control.ProbeSocketOut, want: control.Fail},
		{name: "no exec", exec: func(context.Context, ...string) ([]byte, error) { return nil, errBroken }, probe: control.ProbeSocketOut, want: control.NotMeasured, detail: "broken"},
		{name: "a made-up answer", exec: func(context.Context, ...string) ([]byte, error) { return []byte("[]"), nil }, probe: control.ProbeSocketOut, want: control.NotMeasured},
		{name: "an answer about something else", exec: func(_ context.Context, c ...string) ([]byte, error) {
			return json.Marshal(make([]contract.Reach, len(c)-2))
		}, probe: control.ProbeSocketOut, want: control.NotMeasured},
		{name: "no container", idle: true, probe: control.ProbeSocketOut, want: control.NotMeasured, detail: "no runtime"},

		{name: "no token", engine: oneTokenEngine{res: runtime.Result{Body: []byte("x")}}, probe: control.ProbeOneToken, want: control.Fail, detail: "without a token"},
		{name: "a broken engine", engine: oneTokenEngine{err: &runtime.EngineError{Op: "ask", Status: 500}}, probe: control.ProbeOneToken, want: control.Fail, detail: "500"},
		{name: "a busy engine", engine: oneTokenEngine{err: &runtime.EngineError{Op: "ask", Status: 503}}, probe: control.ProbeOneToken, want: control.NotMeasured, detail: "busy"},
		{name: "no engine", idle: true, probe: control.ProbeOneToken, want: control.NotMeasured, detail: "no runtime"},
	} {
		t.Run(c.name, func(t *testing.T) {
			bubble(t, func(t *testing.T, f *fixture, n *deploytest.Network) {
				if c.unsigned == nil {
					c.unsigned = offered(refusal, nil)
				}
				if c.exec == nil {
					c.exec = sealed("")
				}
				if c.policy == nil {
					c.policy = intact
				}
				f.probes.unsigned, f.probes.policy, f.probes.exec = c.unsigned, c.policy, c.exec
				f.tuf.serve(n.Publish(nil), nil)
				if c.idle {
					f.machine.Fail(deploytest.EnsureImage, &deploytest.Fault{Err: errBroken})
				}
				stop := f.run()
				pass(untilSettled)
				if c.engine.res.Body == nil && c.engine.err == nil {
					c.engine = token
				}
				f.openEngine = func(string) engine { return c.engine }
				r, err := f.Doctor(t.Context())
				f.openEngine = nil
				if err != nil {
					t.Fatal(err)
				}
				bad := 0
				for _, k := range r.Checks[len(r.Checks)-len(control.Probes):] {
					if k.Name == c.probe && (k.Result != c.want || !strings.Contains(k.Detail, c.detail)) {
						t.Errorf("%+v, want %s, %q", k, c.want, c.detail)
					}
					if k.Result == control.Fail {
						bad++
						if k.Remedy == "" {
							t.Errorf("%+v: no remedy", k)
						}
					}
				}
				if want := c.want == control.Fail; want != (bad == 1) {
					t.Errorf("%d probes failed", bad)
				}
				stop()
			})
		})
	}
}

// One doctor at a time.
func TestOneDoctor(t *testing.T) {
	bubble(t, func(t *testing.T, f *fixture, n *deploytest.Network) {
		f.tuf.serve(n.Publish(nil), nil)
		defer f.run()()
		pass(untilSettled)
		enter, leave := make(chan struct{}), make(chan struct{})
		f.probes.unsigned = func(context.Context, *snapshot.ImageTrust) (image.Refusal, error) {
			close(enter)
			<-leave
			return image.Refusal{}, errBroken
		}
		f.probes.policy, f.probes.exec = intact, sealed("")
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() {
			_, err := f.Doctor(ctx)
			done <- err
		}()
		<-enter
		if _, err := f.Doctor(ctx); !errors.Is(err, control.ErrBusy) {
			t.Errorf("%v, want %v", err, control.ErrBusy)
		}
		cancel()
		close(leave)
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Errorf("%v of a doctor whom nobody waits for", err)
		}
	})
}

// Secrets are planted wherever an operator could have put them. None may be in
// the archive, in any form; what is harmless is.
func TestBundleHoldsNoSecret(t *testing.T) {
	bubble(t, func(t *testing.T, f *fixture, n *deploytest.Network) {
		f.openSpool(f.cfg.Paths.State)
		f.tuf.serve(n.Publish(nil), nil)
		defer f.run()()
		pass(untilSettled)
		dir := f.cfg.Paths.State
		secrets := map[string]string{
			"passphrase": "correct horse battery staple", "own": "5f2d0c9be6a14d7788aa", "token": "rt_0123456789abcdefghij", "apikey": "sk-ABCDEFGHIJKLMNOP",
			"ciphertext": "00112233445566778899aabbccddeeff", "environment": "hunter2hunter2", "prompt": "What is the capital of Atlantis?",
		}
		write := func(name, text string) string {
			t.Helper()
			name = filepath.Join(dir, name)
			if err := os.MkdirAll(filepath.Dir(name), 0o700); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
			return name
		}
		write("identity/passphrase", secrets["own"]+"\n")
		write("identity/key.json", `{"crypto":{"ciphertext":"`+secrets["ciphertext"]+`"}}`)
		token := write("token", secrets["token"]+"\n")
		f.cfg.Identity.Passphrase = write("pass", secrets["passphrase"])
		f.configFile = write("agent.toml", "# "+secrets["token"]+"\n[network.testnet]\nurl = \"https://user:"+secrets["apikey"]+"@x.example\"\nenrolment_token = \""+token+"\"\n[log]\nlevel = \""+secrets["environment"]+"\"\n")
		write("agent.toml.d/10.toml", "[network.testnet]\napi_key = \""+secrets["apikey"]+"\"\n[identity]\npassphrase = \""+secrets["passphrase"]+"\"\n")
		write("agent.toml.d/20.toml", "not toml "+secrets["passphrase"])
		unit := write("x.service", "[Service]\n# "+secrets["token"]+"\nType=notify\nEnvironment=KEY="+secrets["environment"]+"\nExecStart=/usr/bin/x --key \\\n  Type="+secrets["apikey"]+"\nSetCredential=a:"+secrets["own"]+"\nX-Prompt="+secrets["prompt"]+"\n")
		f.unitFiles = func(context.Context, string) ([]string, error) {
			return []string{unit, filepath.Join(dir, "gone.conf")}, nil
		}

		f.Agent.log.Info("runtime active", journal.RuntimeActive.Attr(), "model", "tiny", "prompt", secrets["prompt"], "path", secrets["passphrase"])
		if err := f.spool.Close(); err != nil { // all of it is on disk
			t.Error(err)
		}
		raw, err := f.Bundle(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		files := untar(t, raw)
		key, err := hex.DecodeString(f.held.Hex())
		if err != nil || len(key) != 32 {
			t.Fatal(len(key), err)
		}
		secrets["key"] = string(key)
		for name, text := range files {
			for what, secret := range secrets {
				for _, form := range []string{secret, hex.EncodeToString([]byte(secret)), strings.ToUpper(hex.EncodeToString([]byte(secret))),
					base64.StdEncoding.EncodeToString([]byte(secret)), base64.RawURLEncoding.EncodeToString([]byte(secret))} {
					if strings.Contains(text, form) {
						t.Errorf("%s has the %s", name, what)
					}
				}
			}
		}
		for name, want := range map[string]string{
			"status.json": `"testnet"`, "versions.json": "1.2.3", "networks/testnet/configuration.json": `"active": 1`, "models.json": "active",
			"networks/testnet/tuf.json": `"version": 7`, "networks/testnet/log.jsonl": `"event":"runtime-active"`,
			"config/agent.toml": `network.testnet.enrolment_token = "`, "config/10.toml": "network.testnet.api_key: an unknown key", "config/20.toml": "not TOML",
			"units/resultity-agent.service/0-x.service": "Type=notify\n# Environment: its value was left out\n# ExecStart: its value was left out",
			"units/resultity-agent.service/1.error":     "no such file",
		} {
			if !strings.Contains(files["resultity-support/"+name], want) {
				t.Errorf("%s: %q, want %q", name, files["resultity-support/"+name], want)
			}
		}

		// What slips through the lists, in any form, is found at the end.
		for i, form := range []string{secrets["token"], hex.EncodeToString(key), "x" + base64.StdEncoding.EncodeToString([]byte("pad"+string(key)+"pad"))} {
			f.board.set(func(b *board) { b.snapErr = fmt.Errorf("cannot: %s", form) })
			if raw, err := f.Bundle(t.Context()); !errors.Is(err, support.ErrSecret) || len(raw) > 0 {
				t.Errorf("%d: %d bytes, %v", i, len(raw), err)
			} else if !strings.Contains(err.Error(), "status.json") || strings.Contains(err.Error(), form) {
				t.Errorf("%d: %v", i, err)
			}
		}
	})
}

func untar(t *testing.T, raw []byte) map[string]string {
	t.Helper()
	z, err := gzip.NewReader(bytes.NewReader(raw))
	if err != nil {
		t.Fatal(err)
	}
	files := map[string]string{}
	for r := tar.NewReader(z); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return files
		}
		var text []byte
		if err == nil {
			text, err = io.ReadAll(r)
		}
		if err != nil || h.Mode != 0o600 {
			t.Fatal(err, h)
		}
		files[h.Name] = string(text)
	}
}
