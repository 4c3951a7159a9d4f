package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"time"

	"github.com/resultity/node/internal/bridge/contract"
	"github.com/resultity/node/internal/control"
	"github.com/resultity/node/internal/deploy"
	"github.com/resultity/node/internal/image"
	"github.com/resultity/node/internal/openai"
	"github.com/resultity/node/internal/podman"
	"github.com/resultity/node/internal/quadlet"
	"github.com/resultity/node/internal/receipt"
	"github.com/resultity/node/internal/runtime"
	"github.com/resultity/node/internal/snapshot"
	"github.com/resultity/node/internal/wire"
)

// probes are the tries that doctor makes of the world.
type probes struct {
	// unsigned offers an unsigned image to the agent's check and to Podman.
	unsigned func(ctx context.Context, t *snapshot.ImageTrust) (image.Refusal, error)
	// policy compares Podman's policy with what the agent wrote; see
	// [image.Images.CheckPolicy].
	policy func() (written bool, err error)
	// exec runs a command in the runtime's container and returns its output.
	exec func(ctx context.Context, command ...string) ([]byte, error)
}

// probeTime bounds each probe.
const probeTime = 25 * time.Second

// openProbes makes probes of the real world.
func (a *Agent) openProbes() probes {
	// A connection for each probe: Podman's service may end in between.
	with := func(ctx context.Context, f func(*podman.Client) error) error {
		p, err := podman.Dial(ctx, a.cfg.Paths.Podman)
		if err != nil {
			return err
		}
		defer p.Close()
		return f(p)
	}
	return probes{
		unsigned: func(ctx context.Context, t *snapshot.ImageTrust) (r image.Refusal, err error) {
			err = with(ctx, func(p *podman.Client) error {
				r, err = image.ProbeUnsigned(ctx, p, t)
				return err
			})
			return r, err
		},
		policy: func() (bool, error) {
			if i := a.images.Load(); i != nil {
				return i.CheckPolicy()
			}
			return false, nil
		},
		exec: func(ctx context.Context, command ...string) (out []byte, err error) {
			err = with(ctx, func(p *podman.Client) error {
				out, err = p.Exec(ctx, quadlet.ContainerName, command...)
				return err
			})
			return out, err
		},
	}
}

// Doctor implements [control.Backend].
func (a *Agent) Doctor(ctx context.Context) (*control.Report, error) {
	if !a.doctoring.TryLock() {
		return nil, control.ErrBusy
	}
	defer a.doctoring.Unlock()
	r := &control.Report{Version: a.version, At: time.Now().UTC().Truncate(time.Second), Checks: control.ChecksOf(a.Status().Gates)}
	r.Checks = append(r.Checks, a.probeUnsigned(ctx)...)
	r.Checks = append(r.Checks, a.probeSocketOut(ctx), a.probeOneToken(ctx), a.probeKey())
	if ctx.Err() != nil {
		return nil, ctx.Err() // nobody reads it
	}
	a.report.Store(r)
	return r, nil
}

func notMeasured(name, format string, v ...any) control.Check {
	return control.Check{Name: name, Result: control.NotMeasured, Detail: fmt.Sprintf(format, v...)}
}

func passed(name, format string, v ...any) control.Check {
	return control.Check{Name: name, Result: control.Pass, Detail: fmt.Sprintf(format, v...)}
}

func refuted(name, remedy, format string, v ...any) control.Check {
	return control.Check{Name: name, Result: control.Fail, Detail: fmt.Sprintf(format, v...), Remedy: remedy}
}

// keyFiles are where the node's key and its counters are when resultity-signer
// holds them.
var keyFiles = []string{
	"/etc/credstore.encrypted/resultity-key", "/run/credentials/resultity-signer.service/resultity-key", "/var/lib/resultity-signer/counters",
}

// probeKey tries to read what only the signer may.
func (a *Agent) probeKey() control.Check {
	const name = control.ProbeKey
	if a.held != nil {
		return notMeasured(name, "the agent holds the key itself; resultity-signer needs root to be installed")
	}
	for _, file := range keyFiles {
		f, err := os.Open(file)
		if err == nil {
			_ = f.Close() // that it could be opened is all that counts
			return refuted(name, "sudo chmod go= "+file+" and its directory", "the agent can read %s", file)
		}
	}
	return passed(name, "the agent can read neither the key nor its counters")
}

// probeUnsigned offers an image that nobody has signed to both locks.
func (a *Agent) probeUnsigned(ctx context.Context) []control.Check {
	file := filepath.Join(a.policyDir(), "policy.json")
	const own, theirs = control.ProbeUnsignedAgent, control.ProbeUnsignedPodman
	var trust *snapshot.ImageTrust
	for _, m := range a.members {
		if s := m.board.snapshot(); s != nil && (trust == nil || m.board.runs()) {
			trust = &s.Config().ImageTrust
		}
	}
	if trust == nil {
		return []control.Check{notMeasured(own, "no configuration says whose signatures count"), notMeasured(theirs, "no configuration says whose signatures count")}
	}
	ctx, cancel := context.WithTimeout(ctx, probeTime)
	defer cancel()
	r, err := a.probes.unsigned(ctx, trust)
	if err != nil && r.Agent == nil {
		return []control.Check{notMeasured(own, "%v", err), notMeasured(theirs, "%v", err)}
	}
	cs := make([]control.Check, 2)
	switch {
	case errors.Is(r.Agent, image.ErrUnsigned):
		cs[0] = passed(own, "an image that nobody has signed was refused before a pull")
	case r.Agent == nil:
		cs[0] = refuted(own, "do not use this build of the agent", "the agent found a signature of an image that nobody has signed")
	default:
		cs[0] = notMeasured(own, "%v", r.Agent)
	}
	anew := a.surroundings().Systemctl("restart", "resultity-agent.service") + ": the agent writes it anew"
	written, changed := a.probes.policy()
	switch {
	case errors.Is(changed, image.ErrPolicy) && r.Podman != nil:
		cs[1] = refuted(theirs, anew, "somebody has changed %s: %v", file, changed)
	case changed != nil && r.Podman != nil:
		cs[1] = notMeasured(theirs, "%v", changed)
	case !written && r.Podman != nil:
		cs[1] = notMeasured(theirs, "the agent has not come to an image since its start, so that it has written no policy")
	case errors.Is(r.Podman, podman.ErrRefused) && r.Asked:
		cs[1] = passed(theirs, "Podman's policy refused to pull it, and is as the agent wrote it")
	case r.Podman == nil:
		cs[1] = refuted(theirs, anew, "Podman pulled an image that nobody has signed: the policy %s has been loosened", file)
		if err != nil {
			cs[1].Detail += fmt.Sprintf("; and the image was not removed: %v", err)
		}
	default:
		cs[1] = notMeasured(theirs, "Podman did not pull it, and not for its policy: %v", r.Podman)
	}
	return cs
}

// probeSocketOut looks from inside the container for a way to listeners of the
// agent's own, which the host reaches, and to addresses beyond it.
func (a *Agent) probeSocketOut(ctx context.Context) control.Check {
	const name = control.ProbeSocketOut
	if a.runs() == nil {
		return notMeasured(name, "no runtime is active")
	}
	ctx, cancel := context.WithTimeout(ctx, probeTime)
	defer cancel()
	ears, err := a.listen(ctx)
	if err != nil {
		return notMeasured(name, "nothing to be reached could be set up: %v", err)
	}
	defer ears.close()
	targets := append(ears.targets, "udp 192.0.2.1:9", "udp [2001:db8::1]:9") // addresses kept for documentation
	raw, err := a.probes.exec(ctx, append([]string{quadlet.BridgeFile, contract.ProbeCommand}, targets...)...)
	if err != nil {
		return notMeasured(name, "the probe did not run in the container: %v", err)
	}
	var reaches []contract.Reach
	if err := json.Unmarshal(raw, &reaches); err != nil || len(reaches) != len(targets) {
		return notMeasured(name, "the probe's answer from the container cannot be read")
	}
	var out []string
	for i, r := range reaches {
		if r.Target != targets[i] || r.Error == "" && !r.Reached {
			return notMeasured(name, "the probe's answer from the container is about something else")
		}
		if r.Reached {
			out = append(out, r.Target)
		}
	}
	remedy := a.surroundings().Systemctl("cat", quadlet.ServiceName) + " shows what loosens it; remove that and restart the agent, or tell its publisher"
	switch n := ears.heard(); {
	case len(out) > 0:
		return refuted(name, remedy, "the container reached %s; %d connections came", strings.Join(out, ", "), n)
	case n > 0:
		return refuted(name, "run doctor again; if it stays so: "+remedy, "%d connections came to the probe's listeners, of which the container says nothing: they are its, or those of another program that looks for open ports", n)
	}
	return passed(name, "%d ways out of the container were tried, none is open", len(targets))
}

// ears listen where the host can hear, and a sealed container cannot be heard.
type ears struct {
	targets []string // as the bridge's probe takes them
	all     []net.Listener
	count   atomic.Int64 // connections
	own     int64        // of them the agent's own
}

func (e *ears) close() {
	for _, l := range e.all {
		_ = l.Close() // nothing to lose
	}
}

// heard returns how many connections came that were not the agent's own.
func (e *ears) heard() int64 { return e.count.Load() - e.own }

// listen opens listeners and shows that they can be reached from here: what
// nobody can reach would prove nothing.
func (a *Agent) listen(ctx context.Context) (_ *ears, err error) {
	e := new(ears)
	defer func() {
		if err != nil {
			e.close()
		}
	}()
	nonce := receipt.NewJobID()
	where := []struct{ network, address string }{{"tcp", "127.0.0.1:0"}, {"unix", "@resultity-doctor-" + nonce.String()}}
	if host := a.outgoing(); host != "" {
		where = append(where, struct{ network, address string }{"tcp", net.JoinHostPort(host, "0")})
	}
	for _, w := range where {
		l, err := new(net.ListenConfig).Listen(ctx, w.network, w.address)
		if err != nil {
			return e, err
		}
		e.all = append(e.all, l)
		heard := make(chan struct{}, 1)
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return // closed
				}
				e.count.Add(1)
				_ = c.Close() // that it came is all
				select {
				case heard <- struct{}{}:
				default:
				}
			}
		}()
		e.targets = append(e.targets, w.network+" "+l.Addr().String())
		c, err := new(net.Dialer).DialContext(ctx, w.network, l.Addr().String())
		if err != nil {
			return e, err
		}
		_ = c.Close() // likewise
		e.own++
		select {
		case <-heard:
		case <-ctx.Done():
			return e, ctx.Err()
		}
	}
	return e, nil
}

// outgoing is the address by which this machine reaches the network, "" when it
// has none. Connecting a datagram socket asks for the way and sends nothing.
func (a *Agent) outgoing() string {
	u, err := url.Parse(a.cfg.Networks[0].URL)
	if err != nil {
		return ""
	}
	host := u.Hostname()
	if net.ParseIP(host) == nil {
		host = "192.0.2.1"
	}
	c, err := net.Dial("udp", net.JoinHostPort(host, "9"))
	if err != nil {
		return ""
	}
	defer c.Close() // nothing was sent
	addr, ok := c.LocalAddr().(*net.UDPAddr)
	if !ok || addr.IP.IsLoopback() {
		return ""
	}
	return addr.IP.String()
}

// oneToken is a request for one token.
const oneToken = `{"model":%q,"messages":[{"role":"user","content":"Hello"}],"temperature":0,"max_tokens":1,"stream":true}`

// probeOneToken has the engine produce one token, and takes the time until it
// came.
func (a *Agent) probeOneToken(ctx context.Context) control.Check {
	const name = control.ProbeOneToken
	var socket, model string
	if dep := a.runs(); dep != nil {
		socket, model = dep.Socket(), dep.Snapshot().Config().Runtime.Model
	}
	if socket == "" {
		return notMeasured(name, "no runtime is active")
	}
	ctx, cancel := context.WithTimeout(ctx, probeTime)
	defer cancel()
	body := fmt.Appendf(nil, oneToken, model)
	req, err := openai.Parse(wire.KindChat, body, openai.Limits{RequestBytes: int64(len(body)), Tokens: 1, Messages: 1})
	if err != nil {
		return notMeasured(name, "%v", err)
	}
	e := a.openEngine(socket)
	defer e.Close()
	begin := time.Now()
	var first time.Duration
	res, err := e.Run(ctx, runtime.Job{ID: receipt.NewJobID(), Request: req, Model: model, Created: begin.Unix(), Tokens: 1, ResponseBytes: 1 << 20}, func([]byte) error {
		if first == 0 {
			first = time.Since(begin)
		}
		return nil
	})
	const remedy = "sudo journalctl _SYSTEMD_USER_UNIT=resultity-runtime.service has the engine's own words"
	busy, ok := errors.AsType[*runtime.EngineError](err)
	switch {
	case ok && busy.Status == 503:
		return notMeasured(name, "the engine is busy with jobs")
	case err != nil:
		return refuted(name, remedy, "%v", err)
	case res.Usage.CompletionTokens < 1:
		return refuted(name, remedy, "the engine answered without a token")
	}
	c := passed(name, "first token after %v, whole answer after %v", first.Round(time.Millisecond), time.Since(begin).Round(time.Millisecond))
	c.MS = max(1, first.Milliseconds())
	return c
}

// runs reports whether a deployment is active.
func (b *board) runs() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.active != nil
}

// deployment returns what is active, or nil.
func (b *board) deployment() *deploy.Deployment {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.active
}

// runs returns a deployment that is active, or nil.
func (a *Agent) runs() *deploy.Deployment {
	for _, m := range a.members {
		if dep := m.board.deployment(); dep != nil {
			return dep
		}
	}
	return nil
}
