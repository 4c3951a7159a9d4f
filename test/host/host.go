package host

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// bootTime bounds a boot for which ctx sets no bound of its own.
const bootTime = 90 * time.Second

// killTime bounds how long killed processes take to be gone.
const killTime = 20 * time.Second

// ErrDown is the error of whatever needs a running host that is not running.
var ErrDown = errors.New("host is down")

// Config says what a host is.
type Config struct {
	// Name is its host name, and its name for the other hosts.
	Name string

	// Release and Role choose its root file system. The defaults are
	// [Trixie] and [Node].
	Release Release
	Role    Role
}

// A Host is a Debian system with its own systemd as PID 1, on the network of
// its lab. Its methods may be called at the same time, except Kill, Boot,
// Reboot and Down, and by several processes.
type Host struct {
	lab  *Lab
	name string
	dir  string
	addr netip.Addr

	mu     sync.Mutex    // guards reaped, briefly
	reaped chan struct{} // closed when PID 1, a child of this process, has been waited for
}

// A host's directory has these files:
//
//	host.json         a hostRecord
//	upper, work       what the host changed, over the shared root file system
//	var, home, root   these directories of the host, see plainDirs
//	merged            where PID 1 mounts all this, in its own namespace
//	notify            the socket to which systemd says that it is up
//	console.log       what PID 1 printed

// hostRecord is what other processes must know about a host.
type hostRecord struct {
	Image
	Lower string // the shared root file system
	Addr  netip.Addr
	Cut   bool
	PID   int // of PID 1, as the machine sees it, from when it is systemd; 0 when down
}

func (l *Lab) host(name string) (*Host, error) {
	if !validName.MatchString(name) || name == "machine" || name == "localhost" {
		return nil, fmt.Errorf("host name %q: want up to 40 of a-z, 0-9 and -, and not machine or localhost", name)
	}
	return &Host{lab: l, name: name, dir: filepath.Join(l.dir, "hosts", name)}, nil
}

// Up makes a host and boots it, building its root file system first if need
// be. When it returns, systemd has started everything, without a failed unit.
// On an error nothing is left of the host.
func (l *Lab) Up(ctx context.Context, c Config) (*Host, error) {
	h, err := l.host(c.Name)
	if err != nil {
		return nil, err
	}
	image := Image{Release: c.Release, Role: c.Role}.withDefaults()
	lower, err := image.ensure(ctx, l.progress)
	if err != nil {
		return nil, err
	}
	start := time.Now()
	if err := h.register(ctx, hostRecord{Image: image, Lower: lower}); err != nil {
		return nil, fmt.Errorf("make host %s: %w", h.name, err)
	}
	err = h.fill(ctx, lower)
	if err == nil {
		err = h.Boot(ctx)
	}
	if err != nil {
		return nil, errors.Join(err, h.Down(context.WithoutCancel(ctx)))
	}
	say(l.progress, "%s (%s, %s) is up after %.1f s", h.name, image.Release, image.Role, time.Since(start).Seconds())
	return h, nil
}

// register makes the host's directory, which also reserves its name, and
// gives it an address.
func (h *Host) register(ctx context.Context, r hostRecord) error {
	lock, err := lockBase(ctx)
	if err != nil {
		return err
	}
	defer lock.Close()
	lr, err := h.lab.record()
	if err != nil {
		return err
	}
	hosts, err := h.lab.Hosts()
	if err != nil {
		return err
	}
	var used []netip.Addr
	for _, other := range hosts {
		used = append(used, other.addr)
	}
	last := 2 // 1 is the machine's
	for slices.Contains(used, addr(lr.Index, last)) {
		last++
	}
	if last > 254 {
		return errors.New("the lab's network is full")
	}
	h.addr = addr(lr.Index, last)
	r.Addr = h.addr
	if err := os.Mkdir(h.dir, 0o755); err != nil {
		return err
	}
	if err := h.writeRecord(r); err != nil {
		return err
	}
	h.lab.mu.Lock()
	defer h.lab.mu.Unlock()
	h.lab.hosts[h.name] = h
	return nil
}

// fill makes the file system of a host that has never booted.
func (h *Host) fill(ctx context.Context, lower string) error {
	cg, err := cgroupOf(h.dir).create()
	if err != nil {
		return err
	}
	defer cg.Close()
	return thread(func() error {
		for _, d := range []string{"upper/etc", "work", "merged"} {
			if err := os.MkdirAll(filepath.Join(h.dir, d), 0o755); err != nil {
				return err
			}
		}
		args := []string{"--archive", "--reflink=auto", "--target-directory", h.dir}
		for _, d := range plainDirs {
			args = append(args, filepath.Join(lower, d))
		}
		cp := exec.CommandContext(ctx, "cp", args...)
		// If we are killed, it must not go on to fill a directory that
		// somebody else removes.
		cp.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(cg.Fd())}
		if out, err := cp.CombinedOutput(); err != nil {
			return fmt.Errorf("copy %s: %w: %s", strings.Join(plainDirs, ", "), err, out)
		}
		for name, text := range map[string]string{
			"machine-id": fmt.Sprintf("%x\n", randomID()),
			"hostname":   h.name + "\n",
		} {
			if err := os.WriteFile(filepath.Join(h.dir, "upper/etc", name), []byte(text), 0o644); err != nil {
				return err
			}
		}
		return nil
	})
}

// randomID returns what systemd takes for a random id.
func randomID() []byte {
	id := make([]byte, 16)
	rand.Read(id)
	id[6], id[8] = id[6]&0x0f|0x40, id[8]&0x3f|0x80 // a UUID of version 4
	return id
}

// Boot starts a host that is down, with the file system that it had, and
// returns when systemd has started everything, without a failed unit.
func (h *Host) Boot(ctx context.Context) error {
	if _, ok := ctx.Deadline(); !ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, bootTime)
		defer cancel()
	}
	if err := h.spreadNames(ctx); err != nil { // before it runs, for itself
		return fmt.Errorf("boot %s: %w", h.name, err)
	}
	if err := h.boot(ctx); err != nil {
		return fmt.Errorf("boot %s: %w", h.name, err)
	}
	// Hosts that came while it booted may have escaped its notice.
	if err := errors.Join(h.spreadNames(ctx), h.checkUnits(ctx)); err != nil {
		return fmt.Errorf("boot %s: %w", h.name, err)
	}
	return nil
}

func (h *Host) spreadNames(ctx context.Context) error {
	lock, err := lockBase(ctx)
	if err != nil {
		return err
	}
	defer lock.Close()
	return h.lab.spreadNames()
}

// boot starts PID 1 and returns when it says that it is up.
func (h *Host) boot(ctx context.Context) error {
	r, err := h.record()
	if err != nil {
		return err
	}
	if pidfd, err := h.open(); err == nil {
		unix.Close(pidfd)
		return errors.New("host is up already")
	} else if !errors.Is(err, ErrDown) {
		return err
	}
	if err := h.Kill(ctx); err != nil { // what the last boot has left
		return err
	}
	cg, err := cgroupOf(h.dir).create()
	if err != nil {
		return err
	}
	defer cg.Close()
	ready, err := h.listen()
	if err != nil {
		return fmt.Errorf("listen for systemd: %w", err)
	}
	defer ready.Close()
	console, err := os.OpenFile(filepath.Join(h.dir, "console.log"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	defer console.Close()
	planR, planW, err := os.Pipe()
	if err != nil {
		return err
	}
	defer planR.Close()
	defer planW.Close()
	errR, errW, err := os.Pipe()
	if err != nil {
		return err
	}
	defer errR.Close()
	defer errW.Close()

	pidfd := -1
	cmd := &exec.Cmd{
		Path:       "/proc/self/exe",
		Args:       []string{initName},
		Env:        []string{},
		Dir:        "/",
		Stdout:     console,
		Stderr:     console,
		ExtraFiles: []*os.File{initPlanFD - 3: planR, initErrorFD - 3: errW},
		SysProcAttr: &syscall.SysProcAttr{
			Cloneflags: everyNamespace, // except of cgroups, see becomeInit
			Setsid:     true,           // an interrupt at our terminal is not for the host
			PidFD:      &pidfd, UseCgroupFD: true, CgroupFD: int(cg.Fd()),
		},
	}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start PID 1: %w", err)
	}
	defer unix.Close(pidfd)
	reaped := make(chan struct{})
	h.mu.Lock()
	h.reaped = reaped
	h.mu.Unlock()
	go func() { // ends with the host, and Down waits for it
		_ = cmd.Wait() // how PID 1 ends is of no interest, that it does is
		_ = ready.SetReadDeadline(time.Unix(1, 0))
		close(reaped)
	}()
	planR.Close()
	errW.Close()
	if err := h.lab.fabric().plug(ctx, cmd.Process.Pid, pidfd, r.Addr, r.Cut); err != nil {
		return errors.Join(fmt.Errorf("connect network: %w", err), h.Kill(context.WithoutCancel(ctx)))
	}
	id := randomID()
	err = json.NewEncoder(planW).Encode(plan{
		Hostname: h.name,
		Lower:    r.Lower,
		Dir:      h.dir,
		BootID:   fmt.Sprintf("%x-%x-%x-%x-%x\n", id[:4], id[4:6], id[6:8], id[8:10], id[10:]),
	})
	planW.Close()
	if err == nil {
		var said []byte
		if said, err = io.ReadAll(errR); len(said) > 0 {
			err = errors.New(string(said))
		}
	}
	if err != nil {
		return errors.Join(fmt.Errorf("prepare PID 1: %w", err), h.Kill(context.WithoutCancel(ctx)))
	}
	if err := h.update(ctx, func(r *hostRecord) { r.PID = cmd.Process.Pid }); err != nil {
		return err
	}
	return h.awaitReady(ctx, ready)
}

// listen makes the socket to which systemd reports that it has started.
func (h *Host) listen() (*net.UnixConn, error) {
	if err := os.Remove(filepath.Join(h.dir, "notify")); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	dir, err := os.Open(h.dir)
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	// The name of a socket is limited to 107 bytes, that of a directory not.
	name := fmt.Sprintf("/proc/self/fd/%d/notify", dir.Fd())
	return net.ListenUnixgram("unixgram", &net.UnixAddr{Net: "unixgram", Name: name})
}

// awaitReady waits for systemd to say that everything has started.
func (h *Host) awaitReady(ctx context.Context, ready *net.UnixConn) error {
	stop := context.AfterFunc(ctx, func() { _ = ready.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	buf := make([]byte, 4096)
	for {
		n, err := ready.Read(buf)
		switch {
		case err == nil:
			if slices.Contains(strings.Split(string(buf[:n]), "\n"), "READY=1") {
				return nil
			}
		case ctx.Err() != nil:
			jobs, _ := h.Output(context.WithoutCancel(ctx), "systemctl", "list-jobs", "--no-pager")
			return fmt.Errorf("systemd has not finished: %w; its jobs:\n%s", ctx.Err(), jobs)
		case errors.Is(err, os.ErrDeadlineExceeded):
			console, _ := os.ReadFile(filepath.Join(h.dir, "console.log"))
			return fmt.Errorf("PID 1 has ended; it printed:\n%s", console[max(0, len(console)-4096):])
		default:
			return fmt.Errorf("wait for systemd: %w", err)
		}
	}
}

// checkUnits fails when a unit has failed, and says why.
func (h *Host) checkUnits(ctx context.Context) error {
	out, err := h.Output(ctx, "systemctl", "list-units", "--failed", "--plain", "--no-legend", "--no-pager")
	if err != nil {
		return err
	}
	if len(bytes.TrimSpace(out)) == 0 {
		return nil
	}
	args := []string{"systemctl", "status", "--no-pager", "--full", "--"}
	for line := range strings.Lines(string(out)) {
		args = append(args, strings.Fields(line)[0])
	}
	status, _ := h.Output(ctx, args...) // exits 3: they failed
	return fmt.Errorf("units failed:\n%s", status)
}

// Kill ends the host as a power cut would: nothing in it gets to act. Boot
// starts it again. A host that is down stays so.
func (h *Host) Kill(ctx context.Context) error {
	if err := stopHost(ctx, h.dir, h.addr); err != nil {
		return fmt.Errorf("kill %s: %w", h.name, err)
	}
	h.waitReaped()
	return h.update(ctx, func(r *hostRecord) { r.PID = 0 })
}

// stopHost ends whatever runs of the host in directory dir, and returns when
// it is gone with its cgroup and its network.
func stopHost(ctx context.Context, dir string, a netip.Addr) error {
	ctx, cancel := context.WithTimeout(ctx, killTime)
	defer cancel()
	cg := cgroupOf(dir)
	if err := cg.kill(ctx); err != nil {
		return err
	}
	if err := cg.remove(); err != nil {
		return err
	}
	return fabric(filepath.Join(dir, "../../net")).unplug(ctx, a)
}

// Reboot shuts the host down in order, as poweroff does, and boots it again.
func (h *Host) Reboot(ctx context.Context) error {
	pidfd, err := h.open()
	if err != nil {
		return err
	}
	defer unix.Close(pidfd)
	const poweroff = 34 + 4 // SIGRTMIN+4, see systemd(1)
	if err := unix.PidfdSendSignal(pidfd, poweroff, nil, 0); err != nil {
		return fmt.Errorf("shut %s down: %w", h.name, err)
	}
	if err := cgroupOf(h.dir).wait(ctx); err != nil {
		return fmt.Errorf("shut %s down: %w", h.name, err)
	}
	return h.Boot(ctx)
}

// Down removes the host. Nothing is left of it.
func (h *Host) Down(ctx context.Context) error {
	lock, err := lockBase(ctx)
	if err != nil {
		return err
	}
	defer lock.Close()
	if err := removeHost(ctx, h.dir); err != nil {
		return fmt.Errorf("take %s down: %w", h.name, err)
	}
	h.waitReaped()
	h.lab.mu.Lock()
	delete(h.lab.hosts, h.name)
	h.lab.mu.Unlock()
	return h.lab.spreadNames()
}

// removeHost removes whatever there is of a host in directory dir, in
// whichever state. The caller holds the base lock. It may be repeated.
func removeHost(ctx context.Context, dir string) error {
	var r hostRecord
	err := readRecord(filepath.Join(dir, "host.json"), &r)
	if err == nil {
		err = stopHost(ctx, dir, r.Addr)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) { // without a record nothing ran yet
		return err
	}
	return os.RemoveAll(dir)
}

// waitReaped returns when PID 1, if this process started it, has been waited for.
func (h *Host) waitReaped() {
	h.mu.Lock()
	reaped := h.reaped
	h.mu.Unlock()
	if reaped != nil {
		<-reaped
	}
}

// Cut takes the host off the network: from now on packets vanish, in both
// directions, and nobody is told. It stays so over a boot, until Heal.
func (h *Host) Cut(ctx context.Context) error { return h.setCut(ctx, true) }

// Heal undoes Cut.
func (h *Host) Heal(ctx context.Context) error { return h.setCut(ctx, false) }

func (h *Host) setCut(ctx context.Context, cut bool) error {
	r, err := h.record()
	if err != nil {
		return err
	}
	if err := h.update(ctx, func(r *hostRecord) { r.Cut = cut }); err != nil {
		return err
	}
	if r.PID == 0 {
		return nil // boot heeds it
	}
	if cut {
		return h.lab.fabric().cut(ctx, r.Addr)
	}
	return h.lab.fabric().heal(ctx, r.Addr)
}

// Lose makes the network lose so many of a hundred packets that the host gets,
// and of those that it sends, until it is called with zeros or the host boots.
func (h *Host) Lose(ctx context.Context, in, out int) error {
	pidfd, err := h.open()
	if err != nil {
		return err
	}
	defer unix.Close(pidfd)
	return thread(func() error {
		if err := enter(pidfd, unix.CLONE_NEWNET); err != nil {
			return err
		}
		return lose(ctx, in, out)
	})
}

// Name returns the host's name.
func (h *Host) Name() string { return h.name }

// Addr returns the host's address, which it has for life.
func (h *Host) Addr() netip.Addr { return h.addr }

// A Status is what a look at a host shows.
type Status struct {
	Image
	PID int // of its PID 1, as the machine sees it; 0 when down
	Cut bool
}

// Status looks at the host.
func (h *Host) Status() (Status, error) {
	r, err := h.record()
	if err != nil {
		return Status{}, err
	}
	s := Status{Image: r.Image, PID: r.PID, Cut: r.Cut}
	if pidfd, err := h.open(); err == nil {
		unix.Close(pidfd)
	} else {
		s.PID = 0
	}
	return s, nil
}

func (h *Host) record() (r hostRecord, err error) {
	err = readRecord(filepath.Join(h.dir, "host.json"), &r)
	return r, err
}

func (h *Host) writeRecord(r hostRecord) error {
	return writeRecord(filepath.Join(h.dir, "host.json"), r)
}

// update changes the record.
func (h *Host) update(ctx context.Context, f func(*hostRecord)) error {
	lock, err := lockBase(ctx)
	if err != nil {
		return err
	}
	defer lock.Close()
	r, err := h.record()
	if err != nil {
		return err
	}
	f(&r)
	return h.writeRecord(r)
}

// open returns a handle of the host's PID 1, or ErrDown.
func (h *Host) open() (pidfd int, err error) {
	r, err := h.record()
	if err != nil {
		return -1, err
	}
	if r.PID == 0 {
		return -1, fmt.Errorf("%s: %w", h.name, ErrDown)
	}
	pidfd, err = unix.PidfdOpen(r.PID, 0)
	if errors.Is(err, unix.ESRCH) {
		return -1, fmt.Errorf("%s: %w", h.name, ErrDown)
	} else if err != nil {
		return -1, fmt.Errorf("open PID 1 of %s: %w", h.name, err)
	}
	// The process may be another one that got the number since, or may have
	// ended without its parent having noticed.
	fds := []unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}
	if n, err := unix.Poll(fds, 0); err != nil || n > 0 || !cgroupOf(h.dir).holds(r.PID) {
		unix.Close(pidfd)
		return -1, fmt.Errorf("%s: %w", h.name, ErrDown)
	}
	return pidfd, nil
}
