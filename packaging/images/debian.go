package images

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// maxPackages is how many bytes all files of a package set may have together.
const maxPackages = 4 << 30

// A Package is a Debian package, read into memory.
type Package struct {
	// Name, Version and Arch are what the package says of itself.
	Name, Version, Arch string

	// SHA256 is the hash of the package file.
	SHA256 [sha256.Size]byte

	control []byte // the whole control paragraph
	files   tree
}

// Setup installs what [Fetch] calls, if it is missing and the caller is root;
// anybody else is told what to install.
func Setup(ctx context.Context) error {
	if _, err := exec.LookPath("dpkg-deb"); err != nil {
		return fmt.Errorf("images are built from Debian packages, on Debian or with its dpkg package: %w", err)
	}
	if os.Geteuid() != 0 {
		// Without root, mmdebstrap works in a user namespace.
		if _, err := exec.LookPath("newuidmap"); err != nil {
			return fmt.Errorf("images are built in a user namespace: install the package uidmap: %w", err)
		}
	}
	if _, err := exec.LookPath("mmdebstrap"); err == nil {
		return nil
	}
	if os.Geteuid() != 0 {
		return errors.New("mmdebstrap is missing: install the package of that name")
	}
	for _, args := range [][]string{
		{"update"},
		{"install", "-y", "--no-install-recommends", "mmdebstrap"},
	} {
		cmd := exec.CommandContext(ctx, "apt-get", append([]string{"-q", "-o", "DPkg::Lock::Timeout=300"}, args...)...)
		cmd.Env = append(os.Environ(), "DEBIAN_FRONTEND=noninteractive")
		if _, err := output(cmd); err != nil {
			return fmt.Errorf("installing mmdebstrap: %w", err)
		}
	}
	return nil
}

// Fetch downloads the recipe's packages and all that they depend on into dir,
// from the mirror that mmdebstrap takes by itself. Apt checks them against the
// archive's signature; nothing in them is run.
func Fetch(ctx context.Context, r Recipe, dir string) error {
	if err := Setup(ctx); err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, "mmdebstrap",
		// Resolve and download, then stop: no package is unpacked.
		"--variant=extract", "--format=null", "--skip=extract",
		"--include="+strings.Join(r.Packages, ","),
		// A mirror may be a frozen copy, older than its index allows. The
		// signature is checked all the same.
		`--aptopt=Acquire::Check-Valid-Until "false"`,
		"--aptopt=Acquire::Retries 3",
		// The hook runs in dir, whose name may hold anything.
		"--extract-hook=copy-out /var/cache/apt/archives .",
		r.Suite, "-")
	cmd.Dir = dir
	// It has a directory of its own to remove when it is told to end.
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = 20 * time.Second
	if _, err := output(cmd); err != nil {
		return fmt.Errorf("fetching packages of %s: %w", r.Suite, err)
	}
	arch := filepath.Join(dir, "archives")
	debs, err := filepath.Glob(filepath.Join(arch, "*.deb"))
	if err != nil {
		return err
	}
	if len(debs) == 0 {
		return fmt.Errorf("mmdebstrap brought no packages of %s", r.Suite)
	}
	for _, deb := range debs {
		if err := os.Rename(deb, filepath.Join(dir, filepath.Base(deb))); err != nil {
			return err
		}
	}
	return os.RemoveAll(arch)
}

// Load reads all package files in dir, in the order of their names.
func Load(ctx context.Context, dir string) ([]*Package, error) {
	debs, err := filepath.Glob(filepath.Join(dir, "*.deb"))
	if err != nil {
		return nil, err
	}
	var ps []*Package
	left := int64(maxPackages)
	for _, deb := range debs {
		p, err := load(ctx, deb, &left)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", filepath.Base(deb), err)
		}
		ps = append(ps, p)
	}
	if len(ps) == 0 {
		return nil, fmt.Errorf("no package files in %s", dir)
	}
	return ps, nil
}

// load reads one package file and takes the size of its content off left.
func load(ctx context.Context, deb string, left *int64) (*Package, error) {
	f, err := os.Open(deb)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return nil, err
	}
	p := &Package{}
	h.Sum(p.SHA256[:0])
	if p.control, err = output(exec.CommandContext(ctx, "dpkg-deb", "--field", deb)); err != nil {
		return nil, err
	}
	for line := range strings.Lines(string(p.control)) {
		k, v, _ := strings.Cut(line, ":")
		v = strings.TrimSpace(v)
		switch k {
		case "Package":
			p.Name = v
		case "Version":
			p.Version = v
		case "Architecture":
			p.Arch = v
		}
	}
	if p.Name == "" || p.Version == "" || p.Arch == "" {
		return nil, errors.New("no name, version or architecture in the control file")
	}

	cmd := exec.CommandContext(ctx, "dpkg-deb", "--fsys-tarfile", deb)
	var stderr tail
	cmd.Stderr = &stderr
	pipe, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	p.files, err = readTar(pipe, p.Name, left)
	if err != nil {
		cmd.Process.Kill()
	}
	if werr := cmd.Wait(); err == nil && werr != nil {
		err = fmt.Errorf("dpkg-deb: %w: %s", werr, stderr.b)
	}
	return p, err
}

// readTar reads a package's files into a tree.
func readTar(r io.Reader, owner string, left *int64) (tree, error) {
	t := make(tree)
	for tr := tar.NewReader(r); ; {
		h, err := tr.Next()
		if err == io.EOF {
			_, err := io.Copy(io.Discard, r) // padding, else its writer gets EPIPE
			return t, err
		}
		if err != nil {
			return nil, err
		}
		name := path.Join("/", h.Name)
		if name == "/" {
			continue
		}
		e := &entry{
			mode:  h.FileInfo().Mode() & (fs.ModeType | fs.ModePerm | fs.ModeSetuid | fs.ModeSetgid | fs.ModeSticky),
			mtime: h.ModTime,
			owner: owner,
		}
		switch h.Typeflag {
		case tar.TypeDir:
		case tar.TypeReg:
			if *left -= h.Size; *left < 0 {
				return nil, fmt.Errorf("packages have more than %d bytes", int64(maxPackages))
			}
			e.data = make([]byte, h.Size)
			if _, err := io.ReadFull(tr, e.data); err != nil {
				return nil, fmt.Errorf("%s: %w", name, err)
			}
		case tar.TypeSymlink:
			e.link = h.Linkname
		case tar.TypeLink:
			old := t[path.Join("/", h.Linkname)]
			if old == nil || !old.mode.IsRegular() {
				return nil, fmt.Errorf("%s: hard link to %s, which is not a file before it", name, h.Linkname)
			}
			e = old
		default:
			return nil, fmt.Errorf("%s: unsupported kind of file %q", name, h.Typeflag)
		}
		t[name] = e
	}
}

// output runs a command without input and returns what it printed, or an
// error with the end of what it complained about.
func output(cmd *exec.Cmd) ([]byte, error) {
	var stdout bytes.Buffer
	var stderr tail
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return nil, fmt.Errorf("%s: %w: %s", filepath.Base(cmd.Path), err, bytes.TrimSpace(stderr.b))
	}
	return stdout.Bytes(), nil
}

// tail is a writer that keeps the last 4 KiB.
type tail struct{ b []byte }

func (t *tail) Write(p []byte) (int, error) {
	t.b = append(t.b, p...)
	if n := len(t.b) - 4096; n > 0 {
		t.b = append(t.b[:0], t.b[n:]...)
	}
	return len(p), nil
}
