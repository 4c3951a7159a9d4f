// Package host boots Debian machines in namespaces: real systemd as PID 1, user
// managers, the journal, rootless Podman with Quadlet, and a network between
// them that can be cut. It is for tests and the demo, needs root, and leaves
// nothing behind on the machine but its cache of root file systems.
//
//	lab, err := host.Create(ctx, host.Options{Reachable: true, Progress: os.Stderr})
//	defer lab.Close()
//	n1, err := lab.Up(ctx, host.Config{Name: "n1", Release: host.Forky})
//	out, err := n1.OutputAs(ctx, "resultity", "systemctl", "--user", "is-system-running")
//
// # A lab
//
// A [Lab] is a network namespace of its own with a bridge, and hosts on it. The
// namespace is kept by a mount in the lab's directory; nothing of it shows on
// the machine's interfaces, unless the lab is to be reachable: then the machine
// has one interface in it. Any number of labs exist side by side, in one
// process or many. Hosts have static addresses, know each other by /etc/hosts,
// and reach nothing else.
//
// The rule for all state is that it can be found again: a lab's directory says
// what was made for it, each thing is written down before it is made, and
// every removal may be repeated. The process that owns a lab holds a lock on a
// file in there. The kernel drops it with the process, in whatever way that
// ends, so [GC] knows the dead without a process id. What runs on a host is in
// one cgroup, whose name follows from the directory, and is killed by it.
// So no number that was recycled in the meantime can hit a stranger.
//
// # A host
//
// A [Host] is an overlay over a root file system from the cache, which is made
// with mmdebstrap from Debian's packages once per release and [Role]. A program
// that uses this package starts itself again as PID 1 of the new namespaces,
// see becomeInit, mounts what a host sees, and becomes /sbin/init; systemd
// reports readiness as any service does, through NOTIFY_SOCKET. That takes
// under a second. The following is not obvious, and each part of it is needed:
//
//   - /var, /home and /root are directories beside the overlay. Rootless Podman
//     stacks overlays of its own, and an overlay cannot be the upper layer of
//     another.
//   - The cgroup namespace is made by the process inside its cgroup, since the
//     namespace's root is wherever its maker is. Elsewhere systemd would find
//     itself in the machine's tree.
//   - Controllers reach a host only where the machine has them in the cgroup2
//     tree, so tests must not count on limits. Without the one for pids,
//     crun refuses to start a container that has such a limit, which is the
//     default; containers.conf says that none has.
//   - /proc/sys is read-only but for its net, and /sys is: the kernel's settings
//     and devices are the machine's, and systemd leaves alone what it cannot
//     write. The kernel lets the user namespaces of rootless containers mount
//     /proc only if they see one that nothing covers; /run/host/proc is for
//     that.
//   - Capabilities for what has no namespace, such as the clock and modules,
//     are dropped for good. A host that means harm can still do some: it is
//     root on the machine's kernel.
//   - Mounts are made shared at the end. Podman needs them to propagate.
//   - /dev is a tmpfs with few nodes and its own devpts. There is no console,
//     no kernel log and no udev.
//   - Each boot has its own boot id, bound over the kernel's, as the journal
//     tells boots apart by it.
//   - Neighbours are looked for without end. On one bridge a host that was cut
//     off would be reported as unreachable after three seconds; across
//     the internet, where the real ones are, packets just vanish.
//
// # Commands and files
//
// [Host.Exec] moves a thread of this process into the host's namespaces and
// starts the command from there, so arguments, exit status, signals and pipes
// are those of a child; it takes a few milliseconds. Files are
// read and written from such a thread, too, and not through /proc/PID/root, where
// an absolute symbolic link of the host would lead to the machine's files.
package host
