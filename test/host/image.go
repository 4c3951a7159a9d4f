package host

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

// A Release is a Debian release that hosts run.
type Release string

const (
	Trixie Release = "trixie" // Debian 13: systemd 257, Podman 5.4
	Forky  Release = "forky"  // Debian testing: systemd 262, Podman 5.8 at the time of writing
)

// A Role names a set of packages.
type Role string

const (
	// Node is what the node's package depends on, and nothing that a
	// dependency could be forgotten behind.
	Node Role = "node"
	// Network has the tools around a network beside those of [Node]: a
	// registry, cosign, skopeo, openssl, a mail server.
	Network Role = "network"
)

// An Image is a root file system that hosts share. Its zero fields mean
// [Trixie] and [Node].
type Image struct {
	Release Release
	Role    Role
}

func (i Image) withDefaults() Image {
	if i.Release == "" {
		i.Release = Trixie
	}
	if i.Role == "" {
		i.Role = Node
	}
	return i
}

var nodePackages = []string{
	// a system that boots, with user managers
	"systemd", "systemd-sysv", "dbus", "dbus-user-session", "libpam-systemd",
	"login", "passwd", "mount", "util-linux", "procps", "iproute2",
	// what the node's package depends on
	"podman", "crun", "passt", "uidmap", "netavark", "ca-certificates",
	// for whoever looks at it
	"curl",
}

var networkPackages = []string{"docker-registry", "cosign", "skopeo", "openssl", "opensmtpd"}

// recipeVersion goes into the name of an image. Raise it when code below
// changes what comes out.
const recipeVersion = 1

// recipe returns the packages of an image and the options of mmdebstrap.
func (i Image) recipe() (packages, options []string, err error) {
	options = []string{
		"--mode=root", "--variant=apt", "--format=directory",
		`--aptopt=Acquire::Languages "none"`,
		"--dpkgopt=force-unsafe-io",
		"--dpkgopt=path-exclude=/usr/share/doc/*",
		"--dpkgopt=path-include=/usr/share/doc/*/copyright",
		"--dpkgopt=path-exclude=/usr/share/man/*",
		"--dpkgopt=path-exclude=/usr/share/locale/*",
	}
	switch i.Release {
	case Trixie:
	case Forky:
		// A mirror's index of testing may be a little old.
		options = append(options, `--aptopt=Acquire::Check-Valid-Until "false"`)
	default:
		return nil, nil, fmt.Errorf("unknown release %q: want %s or %s", i.Release, Trixie, Forky)
	}
	switch i.Role {
	case Node:
		packages = nodePackages
	case Network:
		packages = slices.Concat(nodePackages, networkPackages)
	default:
		return nil, nil, fmt.Errorf("unknown role %q: want %s or %s", i.Role, Node, Network)
	}
	return packages, options, nil
}

// imageFiles are written into every image.
var imageFiles = map[string]string{
	// Cgroup controllers may not reach the hosts, and crun refuses to start
	// a container with a limit that it cannot set.
	"etc/containers/containers.conf.d/50-test-host.conf": "[containers]\npids_limit = 0\n",
	// There is no name server. Names are in /etc/hosts.
	"etc/resolv.conf": "",
	// Every host gets its own.
	"etc/machine-id": "",
}

// imageMasks are units that have no work on a host that lives for minutes,
// or would use what is the machine's.
var imageMasks = []string{
	"apt-daily.timer", "apt-daily-upgrade.timer", "dpkg-db-backup.timer", "fstrim.timer", "e2scrub_all.timer",
	"e2scrub_reap.service", "getty.target", "console-getty.service", "systemd-pstore.service",
	"docker-registry.service", "opensmtpd.service", // their users bring their own configuration
}

// key names the image by all that it is made from.
func (i Image) key() (string, error) {
	packages, options, err := i.recipe()
	if err != nil {
		return "", err
	}
	h := sha256.New()
	fmt.Fprintln(h, recipeVersion, runtime.GOARCH, packages, options, imageFiles, imageMasks)
	return fmt.Sprintf("%s-%s-%x", i.Release, i.Role, h.Sum(nil)[:6]), nil
}

// Prepare builds the root file systems that the cache does not have, at the
// same time, after [Setup]. That takes about half a minute and needs the Debian
// archive; everything after it runs without. Callers in several processes share
// the work. Progress, if not nil, is told in lines what happens.
func Prepare(ctx context.Context, progress io.Writer, images ...Image) error {
	if err := Setup(ctx, progress); err != nil {
		return err
	}
	if progress != nil {
		progress = &serial{w: progress}
	}
	var builds errgroup.Group
	for _, i := range images {
		builds.Go(func() error {
			_, err := i.ensure(ctx, progress)
			return err
		})
	}
	return builds.Wait()
}

// serial makes a Writer that several goroutines may write to.
type serial struct {
	mu sync.Mutex // held for a write to w
	w  io.Writer
}

func (s *serial) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.w.Write(p)
}

// ensure returns the directory of the image, which is whole.
func (i Image) ensure(ctx context.Context, progress io.Writer) (string, error) {
	i = i.withDefaults()
	key, err := i.key()
	if err != nil {
		return "", err
	}
	base, err := baseDir()
	if err != nil {
		return "", err
	}
	dir := filepath.Join(base, "roots", key)
	if _, err := os.Stat(dir); err == nil {
		now := time.Now()
		return dir, os.Chtimes(dir+".lock", now, now) // for prune
	}
	if err := Setup(ctx, progress); err != nil {
		return "", err
	}
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		return "", err
	}
	lock, err := lockFile(ctx, dir+".lock", func() {
		say(progress, "waiting for another process to build root file system %s", key)
	})
	if err != nil {
		return "", err
	}
	defer lock.Close()
	if _, err := os.Stat(dir); err == nil { // somebody else built it
		return dir, nil
	}
	start := time.Now()
	say(progress, "building root file system %s, once (about half a minute)", key)
	if err := i.build(ctx, lock, dir, progress); err != nil {
		return "", fmt.Errorf("build root file system %s: %w", key, err)
	}
	say(progress, "built root file system %s in %.1f s", key, time.Since(start).Seconds())
	return dir, prune(ctx, filepath.Dir(dir), progress)
}

// keepUnused is how long an image stays that nobody has asked for.
const keepUnused = 14 * 24 * time.Hour

// prune removes the images in directory roots that nobody has asked for in a
// long time and that no host stands on.
func prune(ctx context.Context, roots string, progress io.Writer) error {
	base, err := lockBase(ctx)
	if err != nil {
		return err
	}
	defer base.Close()
	used := map[string]bool{}
	records, err := filepath.Glob(filepath.Join(filepath.Dir(roots), "labs", "*", "hosts", "*", "host.json"))
	if err != nil {
		return err
	}
	for _, name := range records {
		var r hostRecord
		if err := readRecord(name, &r); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		used[r.Lower] = true
	}
	locks, err := filepath.Glob(filepath.Join(roots, "*.lock"))
	if err != nil {
		return err
	}
	for _, name := range locks {
		dir := strings.TrimSuffix(name, ".lock")
		fi, err := os.Stat(name)
		if err != nil || used[dir] || time.Since(fi.ModTime()) < keepUnused {
			continue
		}
		say(progress, "removing root file system %s, not used since %s", filepath.Base(dir), fi.ModTime().Format(time.DateOnly))
		if err := os.Rename(dir, dir+".part"); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		if err := errors.Join(os.RemoveAll(dir+".part"), os.Remove(name)); err != nil {
			return err
		}
	}
	return nil
}

// build makes dir, under the lock. What is under that name is whole.
func (i Image) build(ctx context.Context, lock *os.File, dir string, progress io.Writer) error {
	packages, options, err := i.recipe()
	if err != nil {
		return err
	}
	part := dir + ".part"
	if err := os.RemoveAll(part); err != nil {
		return err
	}
	// The namespaces take with them whatever mmdebstrap has mounted and
	// started, also when it or we are killed.
	args := slices.Concat([]string{"--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "mmdebstrap"},
		options, []string{"--include=" + strings.Join(packages, ","), string(i.Release), part})
	if m := os.Getenv(EnvMirror); m != "" {
		args = append(args, m)
	}
	err = thread(func() error { // Pdeathsig means the death of the thread
		cmd := exec.CommandContext(ctx, "unshare", args...)
		cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: unix.SIGKILL}
		cmd.ExtraFiles = []*os.File{lock} // nobody builds while it lives, even without us
		if err := runTelling(cmd, filepath.Base(dir), progress); err != nil {
			return err
		}
		return finishImage(part)
	})
	if err != nil {
		return errors.Join(err, os.RemoveAll(part))
	}
	return os.Rename(part, dir)
}

// finishImage makes a Debian system one of ours.
func finishImage(dir string) error {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer root.Close()
	for name, text := range imageFiles {
		if err := root.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			return err
		}
		if err := root.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		if err := root.WriteFile(name, []byte(text), 0o644); err != nil {
			return err
		}
	}
	for _, unit := range imageMasks {
		if err := root.Symlink("/dev/null", filepath.Join("etc/systemd/system", unit)); err != nil {
			return err
		}
	}
	return nil
}

// Setup installs with apt-get what this package needs of the machine and does
// not find there. It needs root.
func Setup(ctx context.Context, progress io.Writer) error {
	if os.Geteuid() != 0 {
		return errors.New("test hosts need root")
	}
	missing := missingPackages()
	if len(missing) == 0 {
		return nil
	}
	say(progress, "installing %s", strings.Join(missing, " "))
	for _, args := range [][]string{{"update"}, slices.Concat([]string{"install", "--yes", "--no-install-recommends"}, missing)} {
		// Others on the machine may be installing, too.
		cmd := exec.CommandContext(ctx, "apt-get", slices.Concat([]string{"-o", "DPkg::Lock::Timeout=600", "-q"}, args)...)
		cmd.Env = append(os.Environ(), "DEBIAN_FRONTEND=noninteractive")
		if err := runTelling(cmd, "apt-get", progress); err != nil {
			return fmt.Errorf("install %s: %w", strings.Join(missing, " "), err)
		}
	}
	if still := missingPackages(); len(still) > 0 {
		return fmt.Errorf("installed %s, but what we need of it is not there; check PATH", strings.Join(still, " "))
	}
	return nil
}

// missingPackages returns the packages that the machine lacks, sorted.
func missingPackages() []string {
	var missing []string
	for tool, pkg := range map[string]string{"mmdebstrap": "mmdebstrap", "ip": "iproute2", "unshare": "util-linux", "nft": "nftables", "cp": "coreutils"} {
		if _, err := exec.LookPath(tool); err != nil {
			missing = append(missing, pkg)
		}
	}
	if _, err := os.Stat("/usr/share/keyrings/debian-archive-keyring.gpg"); err != nil {
		missing = append(missing, "debian-archive-keyring") // Debian has it, its children may not
	}
	slices.Sort(missing)
	return missing
}

// say writes one line of progress.
func say(progress io.Writer, format string, args ...any) {
	if progress != nil {
		fmt.Fprintf(progress, "host: "+format+"\n", args...)
	}
}

// runTelling runs cmd, passes its lines on as progress of what it makes, and
// puts the last ones into the error.
func runTelling(cmd *exec.Cmd, what string, progress io.Writer) error {
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	defer r.Close()
	cmd.Stdout, cmd.Stderr = w, w
	cmd.WaitDelay = 10 * time.Second
	err = cmd.Start()
	w.Close()
	if err != nil {
		return err
	}
	var last [][]byte
	lines := bufio.NewScanner(r)
	for lines.Scan() {
		say(progress, "%s: %s", what, lines.Text())
		last = append(last, bytes.Clone(lines.Bytes()))
		last = last[max(0, len(last)-10):]
	}
	_, _ = io.Copy(io.Discard, r) // a line too long for the scanner must not block the command
	if err := cmd.Wait(); err != nil {
		return fmt.Errorf("%s: %w\n%s", filepath.Base(cmd.Path), err, bytes.Join(last, []byte("\n")))
	}
	return nil
}
