package host

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"
	"unicode"

	"golang.org/x/sys/unix"
)

// Options say how a lab is made.
type Options struct {
	// Name of the lab among those on the machine. Empty takes the program's
	// name and process id.
	Name string

	// Keep leaves the lab running when this process ends; it stays until
	// [Lab.Close] or a GC of all. Otherwise the lab belongs to this process,
	// and any later GC removes it once the process is gone.
	Keep bool

	// Reachable gives the machine an interface in the lab with the address
	// [Lab.Addr], so that it can reach the hosts and they it. Otherwise
	// nothing of the lab can be seen on the machine's interfaces.
	Reachable bool

	// Progress, if not nil, is told in lines what happens.
	Progress io.Writer
}

// A Lab is a network of its own with hosts on it. Hosts reach each other by
// name, and nothing else. Its methods may be called at the same time.
type Lab struct {
	name     string
	dir      string
	addr     netip.Addr // of the machine
	progress io.Writer
	owner    *os.File // locked while this process owns the lab; nil otherwise

	mu    sync.Mutex // guards hosts, briefly
	hosts map[string]*Host
}

// labRecord is what other processes must know about a lab.
type labRecord struct {
	Index     int // the third byte of its addresses
	Reachable bool
	Keep      bool
	Names     map[string]netip.Addr // more names than those of its hosts
}

var validName = regexp.MustCompile(`^[a-z0-9][a-z0-9-]{0,39}$`)

// labDir returns the directory of a lab, which need not exist.
func labDir(name string) (string, error) {
	if !validName.MatchString(name) {
		return "", fmt.Errorf("lab name %q: want up to 40 of a-z, 0-9 and -", name)
	}
	base, err := baseDir()
	if err != nil {
		return "", err
	}
	return filepath.Join(base, "labs", name), nil
}

// Create makes a lab without hosts, after removing the labs of processes that
// died. If the name is taken, the error is fs.ErrExist.
func Create(ctx context.Context, o Options) (*Lab, error) {
	if err := Setup(ctx, o.Progress); err != nil {
		return nil, err
	}
	if o.Name == "" {
		prog := regexp.MustCompile(`[^a-z0-9-]+`).ReplaceAllString(strings.ToLower(filepath.Base(os.Args[0])), "-")
		o.Name = fmt.Sprintf("%.20s-%d", strings.Trim(prog, "-"), os.Getpid())
	}
	dir, err := labDir(o.Name)
	if err != nil {
		return nil, err
	}
	if _, err := GC(ctx, false); err != nil {
		return nil, err
	}
	lock, err := lockBase(ctx)
	if err != nil {
		return nil, err
	}
	defer lock.Close()
	index, err := freeIndex(filepath.Dir(dir))
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		return nil, err
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		return nil, fmt.Errorf("make lab: %w", err)
	}
	l := &Lab{name: o.Name, dir: dir, addr: addr(index, 1), progress: o.Progress, hosts: map[string]*Host{}}
	if err := l.setUp(ctx, labRecord{Index: index, Reachable: o.Reachable, Keep: o.Keep}); err != nil {
		return nil, errors.Join(err, removeLab(context.WithoutCancel(ctx), dir))
	}
	return l, nil
}

func (l *Lab) setUp(ctx context.Context, r labRecord) error {
	if !r.Keep {
		var err error
		if l.owner, err = lockFile(ctx, filepath.Join(l.dir, "owner"), nil); err != nil {
			return err
		}
	}
	if err := os.Mkdir(filepath.Join(l.dir, "hosts"), 0o700); err != nil {
		return err
	}
	if err := writeRecord(filepath.Join(l.dir, "lab.json"), r); err != nil {
		return err
	}
	return l.fabric().create(ctx, r)
}

// Open returns a lab that exists, made by whichever process. It belongs to
// that process still. Progress may be nil.
func Open(name string, progress io.Writer) (*Lab, error) {
	dir, err := labDir(name)
	if err != nil {
		return nil, err
	}
	l := &Lab{name: name, dir: dir, progress: progress, hosts: map[string]*Host{}}
	r, err := l.record()
	if err != nil {
		return nil, fmt.Errorf("open lab %s: %w", name, err)
	}
	l.addr = addr(r.Index, 1)
	return l, nil
}

// Name returns the name of the lab.
func (l *Lab) Name() string { return l.name }

// Addr returns the machine's own address in the lab, which it has if the lab
// is reachable. Hosts know it by the name "machine".
func (l *Lab) Addr() netip.Addr { return l.addr }

func (l *Lab) record() (r labRecord, err error) {
	err = readRecord(filepath.Join(l.dir, "lab.json"), &r)
	return r, err
}

func (l *Lab) fabric() fabric { return fabric(filepath.Join(l.dir, "net")) }

// Host returns a host of the lab by its name.
func (l *Lab) Host(name string) (*Host, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if h := l.hosts[name]; h != nil {
		return h, nil
	}
	h, err := l.host(name)
	if err != nil {
		return nil, err
	}
	r, err := h.record()
	if err != nil {
		return nil, fmt.Errorf("host %s in lab %s: %w", name, l.name, err)
	}
	h.addr = r.Addr
	l.hosts[name] = h
	return h, nil
}

// Hosts returns the hosts of the lab, sorted by name.
func (l *Lab) Hosts() ([]*Host, error) {
	entries, err := os.ReadDir(filepath.Join(l.dir, "hosts"))
	if err != nil {
		return nil, err
	}
	var hosts []*Host
	for _, e := range entries {
		h, err := l.Host(e.Name())
		if errors.Is(err, fs.ErrNotExist) { // comes or goes at this moment
			continue
		} else if err != nil {
			return nil, err
		}
		hosts = append(hosts, h)
	}
	return hosts, nil
}

// AddName makes the name stand for the address on all hosts of the lab, now
// and later.
func (l *Lab) AddName(ctx context.Context, name string, a netip.Addr) error {
	if name == "" || strings.ContainsFunc(name, unicode.IsSpace) {
		return fmt.Errorf("name %q: want one word", name)
	}
	lock, err := lockBase(ctx)
	if err != nil {
		return err
	}
	defer lock.Close()
	r, err := l.record()
	if err != nil {
		return err
	}
	if r.Names == nil {
		r.Names = map[string]netip.Addr{}
	}
	r.Names[name] = a
	if err := writeRecord(filepath.Join(l.dir, "lab.json"), r); err != nil {
		return err
	}
	return l.spreadNames()
}

// spreadNames writes /etc/hosts on all hosts. The caller holds the base lock.
func (l *Lab) spreadNames() error {
	r, err := l.record()
	if err != nil {
		return err
	}
	hosts, err := l.Hosts()
	if err != nil {
		return err
	}
	var b strings.Builder
	b.WriteString("127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n")
	if r.Reachable {
		fmt.Fprintf(&b, "%s\tmachine\n", l.addr)
	}
	for _, h := range hosts {
		fmt.Fprintf(&b, "%s\t%s\n", h.addr, h.name)
	}
	for _, name := range slices.Sorted(maps.Keys(r.Names)) {
		fmt.Fprintf(&b, "%s\t%s\n", r.Names[name], name)
	}
	for _, h := range hosts {
		if err := h.setNames([]byte(b.String())); err != nil {
			return fmt.Errorf("tell %s the names: %w", h.name, err)
		}
	}
	return nil
}

// Close takes all hosts down and removes the lab. Nothing is left of it.
func (l *Lab) Close() error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	lock, err := lockBase(ctx)
	if err != nil {
		return err
	}
	defer lock.Close()
	err = removeLab(ctx, l.dir)
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, h := range l.hosts {
		h.waitReaped()
	}
	if l.owner != nil {
		err = errors.Join(err, l.owner.Close())
		l.owner = nil
	}
	return err
}

// removeLab removes whatever there is of a lab in directory dir, in whichever
// state. The caller holds the base lock. It may be repeated.
func removeLab(ctx context.Context, dir string) error {
	entries, err := os.ReadDir(filepath.Join(dir, "hosts"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	for _, e := range entries {
		if err := removeHost(ctx, filepath.Join(dir, "hosts", e.Name())); err != nil {
			return err
		}
	}
	var r labRecord
	if err := readRecord(filepath.Join(dir, "lab.json"), &r); err == nil {
		if err := fabric(filepath.Join(dir, "net")).remove(ctx, r); err != nil {
			return err
		}
	} else if !errors.Is(err, fs.ErrNotExist) { // then nothing was made yet
		return err
	}
	return os.RemoveAll(dir)
}

// GC removes labs whose owner is dead; with all, also those that were to be
// kept, but never one that a living process owns. It returns their names.
func GC(ctx context.Context, all bool) (removed []string, err error) {
	lock, err := lockBase(ctx)
	if err != nil {
		return nil, err
	}
	defer lock.Close()
	base, err := baseDir()
	if err != nil {
		return nil, err
	}
	entries, err := os.ReadDir(filepath.Join(base, "labs"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	for _, e := range entries {
		dir := filepath.Join(base, "labs", e.Name())
		if !all && kept(dir) || owned(dir) {
			continue
		}
		if err := removeLab(ctx, dir); err != nil {
			return removed, fmt.Errorf("remove lab %s: %w", e.Name(), err)
		}
		removed = append(removed, e.Name())
	}
	return removed, nil
}

// kept reports whether the lab is to outlive the process that made it.
func kept(dir string) bool {
	var r labRecord
	return readRecord(filepath.Join(dir, "lab.json"), &r) == nil && r.Keep
}

// owned reports whether the lab's owner lives. The kernel releases the lock
// with the process, however it ends; no process id can deceive us.
func owned(dir string) bool {
	f, err := os.Open(filepath.Join(dir, "owner"))
	if err != nil {
		return false
	}
	defer f.Close()
	return errors.Is(unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB), unix.EWOULDBLOCK)
}

// Labs returns the names of all labs.
func Labs() ([]string, error) {
	base, err := baseDir()
	if err != nil {
		return nil, err
	}
	entries, err := os.ReadDir(filepath.Join(base, "labs"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names, nil
}

// cgroupOf names the cgroup of a host by its directory, which no other has.
func cgroupOf(hostDir string) cgroup {
	return cgroup(fmt.Sprintf("resultity-host-%x", sha256.Sum256([]byte(hostDir)))[:len("resultity-host-")+16])
}
