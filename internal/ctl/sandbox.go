package ctl

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/resultity/node/internal/bridge/contract"
	"github.com/resultity/node/internal/receipt"
	"github.com/resultity/node/internal/sandbox/record"
	"github.com/resultity/node/internal/wire"
)

// errOtherSandbox says that a record is not the one that a receipt names.
var errOtherSandbox = errors.New("the record of the sandbox is not the receipt's")

// belongs checks that a receipt is about a job in the sandbox of a record.
func belongs(r *receipt.Receipt, s *record.Signed) error {
	is := s.Record()
	for _, c := range []struct {
		what      string
		got, want any
	}{
		{"digest", s.Digest(), r.Measured.SandboxDigest}, {"node", is.Node, r.Node},
		{"configuration", is.Config, r.Measured.ConfigDigest}, {"image", is.Image, r.Measured.ImageDigest},
	} {
		if c.got != c.want {
			return fmt.Errorf("%w: its %s is %s, the receipt's %s", errOtherSandbox, c.what, c.got, c.want)
		}
	}
	return nil
}

func at(ms int64) string { return time.UnixMilli(ms).UTC().Format(time.RFC3339) }

// showSandbox shows what a node has found of its sandbox. What came over a network
// is printed without control characters.
func showSandbox(w *tabwriter.Writer, r *record.Record) {
	in, out := &r.Inside, &r.Outside
	line := func(name, format string, args ...any) {
		fmt.Fprintf(w, "%s\t%s\n", name, wire.Printable(fmt.Sprintf(format, args...)))
	}
	fmt.Fprintf(w, "\nSandbox\t(seen by the node from inside and from outside at %s; the same node has signed it)\n", at(r.Time))
	line("start", "%s", r.Start)
	line("checks", "%d, all passed", len(in.Checks))
	for _, c := range in.Checks {
		line("  "+c.Name, "%s", c.Got)
	}
	line("user", "%d inside, %v outside", in.UID, out.UIDs)
	line("capabilities", "%s", list(out.Capabilities))
	line("no new privileges", "%t", out.NoNewPrivs)
	line("seccomp", "mode %d", out.Seccomp)
	line("landlock", "version %d", in.Landlock)
	line("interfaces", "%s", listOf(in.Interfaces, func(i contract.Interface) string { return strings.Join(append([]string{i.Name}, i.Addresses...), " ") }))
	line("routes out", "%s", list(out.Routes))
	line("namespaces", "%s", list(slices.Sorted(maps.Values(in.Namespaces))))
	ceiling := "no ceiling"
	if out.Memory > 0 {
		ceiling = fmt.Sprintf("at most %d bytes", out.Memory)
	}
	line("cgroup", "%s", out.Cgroup)
	line("memory", "%s", ceiling)
	line("devices", "%s", listOf(in.Devices, func(d contract.Device) string { return fmt.Sprintf("%s (%d:%d)", d.Path, d.Major, d.Minor) }))
	for _, m := range in.Mounts {
		mode := "writable"
		if m.ReadOnly {
			mode = "read-only"
		}
		line("mount", "%s (%s) %s", m.Point, m.Type, mode)
	}
}

func list(names []string) string { return listOf(names, func(s string) string { return s }) }

func listOf[T any](all []T, print func(T) string) string {
	if len(all) == 0 {
		return "none"
	}
	var texts []string
	for _, v := range all {
		texts = append(texts, print(v))
	}
	return strings.Join(texts, ", ")
}
