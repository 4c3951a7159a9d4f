package host

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// A fabric is the network of a lab: a network namespace that holds a bridge,
// to which each host and, for a reachable lab, the machine have a port. It is
// named by the file on which the namespace is mounted, since a mount keeps it
// alive while no process is in it.
type fabric string

// network is set aside for tests between network devices (RFC 2544); no
// machine should have a real address in it. Labs have /24 parts of it.
var network = netip.MustParsePrefix("198.18.0.0/15")

// maxLabs is how many labs there can be at a time.
const maxLabs = 256

// addr returns an address of lab index.
func addr(index, host int) netip.Addr {
	a := network.Addr().As4()
	a[2], a[3] = byte(index), byte(host)
	return netip.AddrFrom4(a)
}

// mac returns a hardware address that goes with the address, so that the
// others' neighbour tables stay right when a host boots again.
func mac(a netip.Addr) string {
	b := a.As4()
	return net.HardwareAddr{0x02, 0x00, b[0], b[1], b[2], b[3]}.String()
}

// port is the name of a host's port on the bridge.
func port(a netip.Addr) string { return fmt.Sprintf("port%d", a.As4()[3]) }

// machineLink is the name of the machine's interface in the lab. No lab in
// whichever directory has the same.
func (f fabric) machineLink() string {
	return fmt.Sprintf("lab%x", sha256.Sum256([]byte(f)))[:len("lab")+12]
}

// freeIndex returns an index that no lab in directory labs has, and under
// which the machine has no address, in case somebody else uses another
// directory. The caller holds the base lock.
func freeIndex(labs string) (int, error) {
	used := map[int]bool{}
	entries, err := os.ReadDir(labs)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return 0, err
	}
	for _, e := range entries {
		var r labRecord
		if err := readRecord(filepath.Join(labs, e.Name(), "lab.json"), &r); err == nil {
			used[r.Index] = true
		}
	}
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		return 0, err
	}
	for _, a := range addrs {
		if p, err := netip.ParsePrefix(a.String()); err == nil && network.Contains(p.Addr()) {
			used[int(p.Addr().As4()[2])] = true
		}
	}
	// Whoever uses another directory starts elsewhere, so that the two hardly
	// ever want the same at the same moment.
	start := int(sha256.Sum256([]byte(labs))[0])
	for n := range maxLabs {
		i := (start + n) % maxLabs
		if !used[i] {
			return i, nil
		}
	}
	return 0, fmt.Errorf("all %d networks for labs are in use; remove labs", maxLabs)
}

// create makes the namespace with the bridge.
func (f fabric) create(ctx context.Context, r labRecord) error {
	if err := os.WriteFile(string(f), nil, 0o600); err != nil {
		return err
	}
	return thread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("new network namespace: %w", err)
		}
		if err := unix.Mount("/proc/thread-self/ns/net", string(f), "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("keep network namespace: %w", err)
		}
		// The bridge only passes frames; it takes no part itself.
		if err := os.WriteFile("/proc/sys/net/ipv6/conf/all/disable_ipv6", []byte("1"), 0); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		if err := ip(ctx,
			"link set lo up",
			"link add bridge type bridge stp_state 0 forward_delay 0 mcast_snooping 0",
			"link set bridge up",
		); err != nil {
			return err
		}
		if !r.Reachable {
			return nil
		}
		name, a := f.machineLink(), addr(r.Index, 1)
		if err := ip(ctx,
			fmt.Sprintf("link add machine type veth peer name %s address %s netns %d", name, mac(a), os.Getpid()),
			"link set machine master bridge up",
		); err != nil {
			return err
		}
		if err := leave(); err != nil {
			return err
		}
		if err := ip(ctx,
			fmt.Sprintf("link set %s addrgenmode none", name),
			fmt.Sprintf("address add %s/24 dev %s", a, name),
			fmt.Sprintf("link set %s up", name),
		); err != nil {
			return err
		}
		return neverUnreachable(name)
	})
}

// do runs f on a thread in the namespace.
func (f fabric) do(fn func() error) error {
	ns, err := os.Open(string(f))
	if err != nil {
		return fmt.Errorf("open the lab's network: %w", err)
	}
	defer ns.Close()
	return thread(func() error {
		if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("enter the lab's network: %w", err)
		}
		return fn()
	})
}

// plug gives the process behind pid, in its own network namespace, an
// interface eth0 with the address and connects it to the bridge.
func (f fabric) plug(ctx context.Context, pid, pidfd int, a netip.Addr, cut bool) error {
	master := "master bridge"
	if cut {
		master = ""
	}
	err := f.do(func() error {
		return ip(ctx,
			fmt.Sprintf("link add %s type veth peer name eth0 address %s netns %d", port(a), mac(a), pid),
			fmt.Sprintf("link set %s %s up", port(a), master),
		)
	})
	if err != nil {
		return err
	}
	return thread(func() error {
		if err := enter(pidfd, unix.CLONE_NEWNET); err != nil {
			return err
		}
		if err := ip(ctx,
			"link set lo up",
			fmt.Sprintf("address add %s/24 dev eth0", a),
			"link set eth0 up",
		); err != nil {
			return err
		}
		return neverUnreachable("eth0")
	})
}

// neverUnreachable makes a neighbour that does not answer look like a host
// from far away, behind a network that loses packets, and not like one missing
// from the same cable: ask for its hardware address for ever, and report it to
// nobody as unreachable. The interface is one of the thread's namespace.
func neverUnreachable(link string) error {
	for _, name := range []string{"mcast_solicit", "ucast_solicit"} {
		if err := os.WriteFile(filepath.Join("/proc/sys/net/ipv4/neigh", link, name), []byte("1000000"), 0); err != nil {
			return err
		}
	}
	return nil
}

// unplug removes the port of the address and with it the interface of its host.
func (f fabric) unplug(ctx context.Context, a netip.Addr) error {
	return f.do(func() error { return removeLink(ctx, port(a)) })
}

// removeLink removes an interface, if it is there, of the thread's namespace.
func removeLink(ctx context.Context, name string) error {
	if _, err := net.InterfaceByName(name); err != nil {
		return nil
	}
	err := ip(ctx, "link del "+name)
	if err != nil {
		// The kernel removes the two ends of a link with the namespace of
		// either, at a time of its own, which may have been now.
		if _, gone := net.InterfaceByName(name); gone != nil {
			return nil
		}
	}
	return err
}

// cut takes the port of the address off the bridge: frames end there, both
// ways, and neither side is told. The link itself stays up.
func (f fabric) cut(ctx context.Context, a netip.Addr) error {
	return f.do(func() error { return ip(ctx, fmt.Sprintf("link set %s nomaster", port(a))) })
}

// heal undoes cut.
func (f fabric) heal(ctx context.Context, a netip.Addr) error {
	return f.do(func() error { return ip(ctx, fmt.Sprintf("link set %s master bridge", port(a))) })
}

// remove removes whatever there is of the fabric.
func (f fabric) remove(ctx context.Context, r labRecord) error {
	// The kernel removes the interfaces of a namespace some time after it
	// lost its last user; the machine's shall be gone when we return.
	if r.Reachable {
		if err := removeLink(ctx, f.machineLink()); err != nil {
			return err
		}
	}
	for { // one mount; more if somebody mounted over it
		err := unix.Unmount(string(f), unix.MNT_DETACH)
		if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("unmount %s: %w", f, err)
		}
	}
}

// lose drops packets at random, in percent, in the network namespace of the
// calling thread.
func lose(ctx context.Context, in, out int) error {
	var b strings.Builder
	b.WriteString("table inet lose {}\ndelete table inet lose\n") // there or not, it is gone
	b.WriteString("table inet lose {\n")
	for _, c := range []struct {
		hook, link string
		percent    int
	}{{"input", "iifname", in}, {"output", "oifname", out}} {
		which := fmt.Sprintf("%s != \"lo\" numgen random mod 100 < %d", c.link, c.percent)
		if c.percent >= 100 { // nft knows that this is no comparison
			which = c.link + " != \"lo\""
		}
		fmt.Fprintf(&b, "chain %[1]s { type filter hook %[1]s priority 0; %[2]s drop; }\n", c.hook, which)
	}
	b.WriteString("}\n")
	cmd := exec.CommandContext(ctx, "nft", "-f", "-")
	cmd.Stdin = strings.NewReader(b.String())
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("nft: %w: %s", err, bytes.TrimSpace(out))
	}
	return nil
}

// ip runs commands of ip(8), in the network namespace of the calling thread.
func ip(ctx context.Context, commands ...string) error {
	cmd := exec.CommandContext(ctx, "ip", "-batch", "-")
	cmd.Stdin = strings.NewReader(strings.Join(commands, "\n") + "\n")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("ip %s: %w: %s", strings.Join(commands, "; "), err, strings.TrimSpace(string(out)))
	}
	return nil
}
