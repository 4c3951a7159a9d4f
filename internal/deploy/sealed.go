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

	"github.com/resultity/node/internal/bridge/contract"
	"github.com/resultity/node/internal/journal"
	"github.com/resultity/node/internal/podman"
	"github.com/resultity/node/internal/quadlet"
	"github.com/resultity/node/internal/runtime"
	"github.com/resultity/node/internal/sandbox"
)

// checkSealed compares what was ordered with what there is: as Podman says, as
// the kernel says from outside, and as the bridge found it inside. The error
// names every difference.
//
// Not looked for are OCI hooks (hooks_dir in containers.conf): Podman tells
// nobody of them, and they are programs that run outside of the container, which
// whoever may write that file can run anyway. What they bring into the container
// is in the bridge's record as any other mount.
func (d *Deployer) checkSealed(ctx context.Context, p *Plan, engine Engine) error {
	ctx, cancel := context.WithTimeout(ctx, lookTimeout)
	defer cancel()
	order, err := p.unit.Order()
	if err != nil {
		return err
	}
	devices := p.snapshot.Config().Runtime.Devices
	others, err := d.Mounts(devices)
	if err != nil {
		return err
	}
	c, err := d.Containers.Container(ctx, quadlet.ContainerName)
	if err != nil {
		return err
	}
	image, _, err := d.Containers.Image(ctx, order.Image)
	if err != nil {
		return err
	}
	bad, err := d.env(ctx, order, devices, c.Env)
	if err != nil {
		return err
	}
	// Of an index, Podman names what it took from it, or the index.
	if order.Image.Digest() != c.ImageDigest {
		order.Image = order.Image.At(d.Images.Manifest(order.Image))
	}
	if bad = append(differences(order, image, c), bad...); len(bad) > 0 {
		return fmt.Errorf("%w: %s", sandbox.ErrNotSealed, strings.Join(bad, "; "))
	}
	out, err := d.Look(c.PID)
	if err != nil {
		return err
	}
	if order.Memory > 0 {
		got, err := d.Ceiling(c.PID)
		if err != nil {
			return err
		}
		if got <= 0 || got > order.Memory { // that of a slice above may be lower
			return fmt.Errorf("%w: its memory ceiling is %d bytes (0: none), want at most %d; see systemctl --user cat %s", sandbox.ErrNotSealed, got, order.Memory, quadlet.ServiceName)
		}
	}
	raw, err := engine.Sandbox(ctx)
	if errors.Is(err, runtime.ErrForeign) {
		return fmt.Errorf("%w: %w", sandbox.ErrNotSealed, err)
	}
	if err != nil {
		return err
	}
	var in contract.Sandbox
	if err := json.Unmarshal(raw, &in); err != nil {
		return fmt.Errorf("%w: the bridge's record cannot be read: %w", sandbox.ErrNotSealed, err)
	}
	mounts := make(map[string]bool)
	for _, m := range order.Mounts {
		mounts[m.Place] = m.ReadOnly
	}
	for place := range order.Tmpfs {
		mounts[place] = false
	}
	if err := sandbox.Check(out, &in, sandbox.Order{Mounts: mounts, Others: slices.Concat(others, order.Bridge.Devices)}, os.Getuid()); err != nil {
		return err
	}
	if in.Landlock == 0 && !in.Hidden {
		d.Log.Warn("the engine can fill the runtime directory: this kernel has no Landlock", journal.LandlockMissing.Attr())
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
