package deploy

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"

	"github.com/resultity/node/internal/journal"
	"github.com/resultity/node/internal/podman"
	"github.com/resultity/node/internal/quadlet"
	"github.com/resultity/node/internal/runtime"
	"github.com/resultity/node/internal/sandbox"
	"github.com/resultity/node/internal/sandbox/record"
)

// checkSealed compares what was ordered with what there is: as Podman says, as
// the kernel says from outside, and as the bridge found it inside. The error
// names every difference.
//
// Not looked for are OCI hooks (hooks_dir in containers.conf): Podman tells
// nobody of them, and they are programs that run outside of the container, which
// whoever may write that file can run anyway. What they bring into the container
// is in the bridge's record as any other mount.
func (d *Deployer) checkSealed(ctx context.Context, p *Plan, engine Engine) (*seal, error) {
	ctx, cancel := context.WithTimeout(ctx, lookTimeout)
	defer cancel()
	order, err := p.unit.Order()
	if err != nil {
		return nil, err
	}
	devices := p.snapshot.Config().Runtime.Devices
	others, err := d.Mounts(devices)
	if err != nil {
		return nil, err
	}
	c, err := d.Containers.Container(ctx, quadlet.ContainerName)
	if err != nil {
		return nil, err
	}
	image, _, err := d.Containers.Image(ctx, order.Image)
	if err != nil {
		return nil, err
	}
	bad, err := d.env(ctx, order, devices, c.Env)
	if err != nil {
		return nil, err
	}
	// Of an index, Podman names what it took from it, or the index.
	if order.Image.Digest() != c.ImageDigest {
		order.Image = order.Image.At(d.Images.Manifest(order.Image))
	}
	if bad = append(differences(order, image, c), bad...); len(bad) > 0 {
		return nil, fmt.Errorf("%w: %s", sandbox.ErrNotSealed, strings.Join(bad, "; "))
	}
	mounts := make(map[string]bool)
	for _, m := range order.Mounts {
		mounts[m.Place] = m.ReadOnly
	}
	for place := range order.Tmpfs {
		mounts[place] = false
	}
	s := &seal{pid: c.PID, memory: order.Memory, order: sandbox.Order{Mounts: mounts, Others: slices.Concat(others, order.Bridge.Devices)}}
	if s.views, err = d.look(ctx, s, engine); err != nil {
		return nil, err
	}
	if in := &s.views.Inside; in.Landlock == 0 && !in.Hidden {
		d.Log.Warn("the engine can fill the runtime directory: this kernel has no Landlock", journal.LandlockMissing.Attr())
	}
	return s, nil
}

// seal is what a container was found to be, and what it was compared with.
type seal struct {
	pid    int
	memory int64 // ceiling that was ordered, 0 for none
	order  sandbox.Order
	views  record.Views
}

// look compares what the kernel says from outside, and the bridge from inside,
// with the rules.
func (d *Deployer) look(ctx context.Context, s *seal, engine Engine) (v record.Views, err error) {
	out, err := d.Look(s.pid)
	if err != nil {
		return v, err
	}
	memory := int64(0)
	if s.memory > 0 {
		if memory, err = d.Ceiling(s.pid); err != nil {
			return v, err
		}
		if memory <= 0 || memory > s.memory { // that of a slice above may be lower
			return v, fmt.Errorf("%w: its memory ceiling is %d bytes (0: none), want at most %d; see systemctl --user cat %s", sandbox.ErrNotSealed, memory, s.memory, quadlet.ServiceName)
		}
	}
	raw, err := engine.Sandbox(ctx)
	if errors.Is(err, runtime.ErrForeign) {
		return v, fmt.Errorf("%w: %w", sandbox.ErrNotSealed, err)
	}
	if err != nil {
		return v, err
	}
	if err := json.Unmarshal(raw, &v.Inside); err != nil {
		return v, fmt.Errorf("%w: the bridge's record cannot be read: %w", sandbox.ErrNotSealed, err)
	}
	v.Outside = out.Record(memory)
	return v, sandbox.Check(out, &v.Inside, s.order, os.Getuid())
}

// Errors of looks at a runtime that was sealed.
var (
	// ErrDrifted says that the sandbox has changed since the runtime's start. It
	// comes with [sandbox.ErrNotSealed].
	ErrDrifted = errors.New("the sandbox has changed under the runtime")

	// ErrEnded says that the start of the runtime which was to be looked at is over.
	ErrEnded = errors.New("that start of the runtime is over")

	// ErrUnrecorded says that the record of a sandbox could not be signed or
	// written down. Without one there are no receipts.
	ErrUnrecorded = errors.New("the sandbox could not be recorded")
)

// Inspect looks at a deployment's sandbox again, from both sides. One that is
// not as the rules say, or not as it was at first, is [ErrDrifted]. Podman is not
// asked: what it says of a container does not change, and it sleeps when nobody
// asks. May be called beside everything else.
func (d *Deployer) Inspect(ctx context.Context, dep *Deployment) (record.Views, error) {
	ctx, cancel := context.WithTimeout(ctx, lookTimeout)
	defer cancel()
	if err := d.goesOn(ctx, dep); err != nil {
		return record.Views{}, err
	}
	engine := d.Engine(dep.socket)
	defer engine.Close()
	v, err := d.look(ctx, dep.seal, engine)
	if err == nil {
		err = Drift(&dep.seal.views, &v)
	}
	if gone := d.goesOn(ctx, dep); gone != nil {
		return v, gone // and whose state this was nobody knows
	}
	if errors.Is(err, sandbox.ErrNotSealed) && !errors.Is(err, ErrDrifted) {
		err = fmt.Errorf("%w: %w", ErrDrifted, err)
	}
	return v, err
}

// goesOn fails if the start of the runtime that dep is of is over.
func (d *Deployer) goesOn(ctx context.Context, dep *Deployment) error {
	state, err := d.Units.State(ctx, quadlet.ServiceName)
	if err == nil && !dep.Current(state) {
		err = ErrEnded
	}
	return err
}

// Drift compares two looks at one start of a runtime.
func Drift(was, is *record.Views) error {
	if list := record.Drift(was, is); len(list) > 0 {
		return fmt.Errorf("%w: %w: %s", ErrDrifted, sandbox.ErrNotSealed, strings.Join(list, "; "))
	}
	return nil
}

// differences compares what Podman says of the container with what was ordered.
// The account's containers.conf can add to each container without a trace in its
// command line.
func differences(o quadlet.Order, image string, c podman.ContainerState) (bad []string) {
	differ := func(what string, got, want any) {
		if g, w := fmt.Sprint(got), fmt.Sprint(want); g != w {
			bad = append(bad, fmt.Sprintf("podman: %s is %.300s, want %.300s", what, g, w))
		}
	}
	differ("image", c.ImageDigest, o.Image.Digest())
	differ("image id", c.ImageID, image)
	differ("privileged", c.Privileged, false)
	differ("read-only root", c.ReadOnly, true)
	differ("network", c.Network, "none")
	differ("user", c.User, o.User)
	if !slices.Equal(c.Command, o.Command) {
		bad = append(bad, fmt.Sprintf("podman: it runs %.1000q, want %.1000q", c.Command, o.Command))
	}
	differ("capabilities", c.Capabilities, []string{})
	differ("security options", c.Security, []string{"no-new-privileges"})
	differ("extra hosts", c.Hosts, []string{})
	for _, ns := range slices.Sorted(maps.Keys(c.Namespaces)) {
		// A container that others of the account could join, Podman calls
		// shareable. The default mapping of users has no name.
		if mode := c.Namespaces[ns]; mode != "private" && !(ns == "ipc" && mode == "shareable") && !(ns == "user" && mode == "") {
			bad = append(bad, fmt.Sprintf("podman: %s namespace is %q, want a private one", ns, mode))
		}
	}
	for _, dev := range c.Devices {
		if !slices.Contains(o.Bridge.Devices, dev) {
			bad = append(bad, fmt.Sprintf("podman: device %s, which nobody ordered", dev))
		}
	}
	bad = append(bad, mountDifferences(o.Mounts, c.Mounts)...)
	return append(bad, tmpfsDifferences(o.Tmpfs, c.Tmpfs)...)
}

func mountDifferences(want []quadlet.Mount, got []podman.Mount) (bad []string) {
	missing := slices.Clone(want)
	for _, m := range got {
		i := slices.IndexFunc(missing, func(w quadlet.Mount) bool { return w.Place == m.Destination })
		if i < 0 {
			bad = append(bad, fmt.Sprintf("podman: %s %s is mounted at %s, which nobody ordered", m.Type, m.Source, m.Destination))
			continue
		}
		w := missing[i]
		missing = slices.Delete(missing, i, i+1)
		options := without(m.Options, "bind", "rbind", "private", "rprivate")
		if m.Type != "bind" || m.Source != w.Source || m.Writable == w.ReadOnly || !same(options, w.Options) {
			bad = append(bad, fmt.Sprintf("podman: %s has %s %s (writable: %t, %s), want %s (writable: %t, %s)",
				w.Place, m.Type, m.Source, m.Writable, strings.Join(options, ","), w.Source, !w.ReadOnly, strings.Join(w.Options, ",")))
		}
	}
	for _, w := range missing {
		bad = append(bad, fmt.Sprintf("podman: nothing is mounted at %s, want %s", w.Place, w.Source))
	}
	return bad
}

func tmpfsDifferences(want, got map[string][]string) (bad []string) {
	for _, place := range slices.Sorted(maps.Keys(got)) {
		w, ok := want[place]
		if options := without(got[place], "private", "rprivate", "tmpcopyup"); !ok || !same(options, w) {
			bad = append(bad, fmt.Sprintf("podman: tmpfs at %s with %s, want %s", place, strings.Join(options, ","), strings.Join(w, ",")))
		}
	}
	for _, place := range slices.Sorted(maps.Keys(want)) {
		if got[place] == nil {
			bad = append(bad, fmt.Sprintf("podman: no tmpfs at %s", place))
		}
	}
	return bad
}

// env compares the container's variables with those of the order. The image is
// signed, and its variables are how its programs are found; devices may bring
// variables along, also in the place of the image's; the rest is Podman's own.
//
// Values may be anybody's secrets, as env_host in containers.conf brings in all
// of the account's: only names are told.
func (d *Deployer) env(ctx context.Context, o quadlet.Order, devices, got []string) (bad []string, err error) {
	image, err := d.Containers.ImageEnv(ctx, o.Image)
	if err != nil {
		return nil, err
	}
	brought, err := d.Env(devices)
	if err != nil {
		return nil, err
	}
	own, devs, must := variables(podmans), variables(brought), variables(slices.Concat(image, o.Env))
	for name, value := range variables(got) {
		w, ok := must[name]
		if !ok {
			w, ok = own[name]
		}
		d, dok := devs[name]
		switch {
		case dok && d == value: // those of devices come last
		case !ok && !dok:
			bad = append(bad, fmt.Sprintf("podman: variable %.100s, which nobody ordered", name))
		case !ok || w != value && w != "":
			bad = append(bad, fmt.Sprintf("podman: variable %.100s has another value than was ordered", name))
		}
		delete(must, name)
	}
	for name := range must {
		bad = append(bad, fmt.Sprintf("podman: variable %.100s is missing", name))
	}
	slices.Sort(bad)
	return bad, nil
}

// podmans are the variables that Podman makes by itself where nobody sets them;
// those without a value have any.
var podmans = []string{
	"container=podman", "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "TERM=xterm",
	"NOTIFY_SOCKET=/run/notify/notify.sock", "HOME", "HOSTNAME",
}

// variables sorts NAME=value by name; the last one of a name counts.
func variables(env []string) map[string]string {
	m := make(map[string]string, len(env))
	for _, v := range env {
		name, value, _ := strings.Cut(v, "=")
		m[name] = value
	}
	return m
}

// without leaves out the options that Podman adds by itself and that give
// nothing away.
func without(options []string, own ...string) []string {
	return slices.DeleteFunc(slices.Clone(options), func(o string) bool { return slices.Contains(own, o) })
}

// same compares options in any order.
func same(a, b []string) bool {
	return slices.Equal(slices.Sorted(slices.Values(a)), slices.Sorted(slices.Values(b)))
}
