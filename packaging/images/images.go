// Package images builds the container images that hold an inference engine and
// nothing else.
//
// A [Recipe] names Debian packages and the few programs wanted out of them. The
// package takes those programs, the shared libraries they need and the licences
// they came under, and writes one OCI image with one layer. No shell, package
// manager or interpreter is left in it unless a recipe names it as a program,
// and no maintainer script of a package ever runs.
//
// The rule it keeps: an image's digest is a function of the recipe and the
// package files, and of nothing else. Neither the time of the build nor the
// machine, user, directory, compressor or order of downloads shows in it. The
// annotations list every package with its version and its hash, so that anybody
// with the same files gets the same digest.
//
// No finished image gets its name before [Verify] has read it back.
package images

import (
	"bytes"
	"context"
	"crypto/sha256"
	"embed"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"syscall"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
)

// What every runtime image promises to the unit that runs it. The root is
// mounted read-only, so the places that get something mounted over them must
// be there already.
const (
	// User is the user and group that the engine runs as.
	User = "1000:1000"

	// ModelsDir is an empty directory for the model files.
	ModelsDir = "/models"

	// SocketDir is an empty directory for the engine's socket.
	SocketDir = "/run/resultity"

	// BridgeFile is an empty file for the program that starts the engine.
	BridgeFile = "/resultity-bridge"
)

// A Recipe says what one image is made of. Paths and patterns are absolute,
// and patterns are those of [path.Match].
type Recipe struct {
	// Name is the image's name: lower-case letters and digits.
	Name string

	// Title and Description are for people; they become annotations.
	Title, Description string

	// Suite is the Debian suite that the packages come from.
	Suite string

	// Packages are the packages to get, dependencies not counted.
	Packages []string

	// VersionOf is the package whose version becomes the image's.
	VersionOf string

	// Programs are patterns for the only files that may be executed, beside
	// the dynamic loader they name. Each must match.
	Programs []string

	// Plugins are patterns for shared objects that the programs load by name
	// while they run, so that nothing in the programs' headers points to
	// them. Each must match.
	Plugins []string

	// Data are patterns for other files. Each must match.
	Data []string

	// Entrypoint is the command line of the image. Its first word is one of
	// the programs.
	Entrypoint []string

	// Licences are SPDX expressions, by package. A package that is not listed
	// appears as LicenseRef-NAME; the full text is in the image either way.
	Licences map[string]string
}

// Image is a finished image in an OCI layout directory.
type Image struct {
	// Layout is the directory. Nobody may write there.
	Layout string

	// Digest is that of the image's manifest, the only one in the layout.
	Digest v1.Hash
}

// Options say where and how to build. The zero value works.
type Options struct {
	// Cache is the directory for packages and finished images; "" is
	// [CacheDir]. It is made if missing.
	Cache string

	// Refresh gets the packages anew, although some are in the cache.
	Refresh bool

	// Log gets progress; nil is none.
	Log *slog.Logger
}

// keep is how long an image or a package set that nobody asked for stays in
// the cache.
const keep = 14 * 24 * time.Hour

// source is part of what a cached image is named by: a change of the builder
// makes a new image, and no version number has to be remembered.
//
//go:embed assemble.go debian.go elf.go images.go tree.go unpack.go verify.go
var source embed.FS

// CacheDir returns the directory that is used when none is given:
// $RESULTITY_CACHE, else /var/cache/resultity-node for root, else a directory
// in the user's own cache.
func CacheDir() (string, error) {
	if dir := os.Getenv("RESULTITY_CACHE"); dir != "" {
		return filepath.Abs(dir)
	}
	if os.Geteuid() == 0 {
		return "/var/cache/resultity-node", nil
	}
	dir, err := os.UserCacheDir()
	if err != nil {
		return "", fmt.Errorf("no cache directory (set RESULTITY_CACHE): %w", err)
	}
	return filepath.Join(dir, "resultity-node"), nil
}

// Packages returns a directory with the recipe's package files, from the cache
// or newly fetched. Nobody may write there.
func Packages(ctx context.Context, r Recipe, o Options) (dir string, err error) {
	err = withCache(ctx, o, func(c cache) error {
		dir, _, err = c.packages(ctx, r)
		return err
	})
	return dir, err
}

// Build returns the recipe's image, from the cache if it is there and sound,
// else made anew. Several processes may call it at once: one builds, the others
// wait. A build that is cut short leaves nothing that a later one would take
// for an image.
func Build(ctx context.Context, r Recipe, o Options) (img Image, err error) {
	err = withCache(ctx, o, func(c cache) error {
		img, err = c.image(ctx, r)
		return err
	})
	return img, err
}

// withCache calls f while this process is the only one that uses the cache.
func withCache(ctx context.Context, o Options, f func(cache) error) error {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.Cache == "" {
		dir, err := CacheDir()
		if err != nil {
			return err
		}
		o.Cache = dir
	}
	dir := filepath.Join(o.Cache, "images")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("image cache: %w", err)
	}
	unlock, err := lock(ctx, filepath.Join(dir, "lock"))
	if err != nil {
		return fmt.Errorf("image cache: %w", err)
	}
	defer unlock()
	c := cache{dir: dir, anew: o.Refresh, log: o.Log}
	if err := c.sweep(); err != nil {
		return fmt.Errorf("image cache: %w", err)
	}
	return f(c)
}

// packages returns the directory with the recipe's packages, and their sums.
func (c cache) packages(ctx context.Context, r Recipe) (dir string, sums []byte, err error) {
	dir, err = c.entry("packages-"+hash(r.Suite, r.Packages, runtime.GOARCH), c.anew,
		func(dir string) error {
			c.log.InfoContext(ctx, "getting packages", "suite", r.Suite, "packages", r.Packages)
			if err := Fetch(ctx, r, dir); err != nil {
				return err
			}
			b, err := sum(dir)
			if err != nil {
				return err
			}
			return os.WriteFile(filepath.Join(dir, sumsFile), b, 0o644)
		},
		func(dir string) error {
			want, err := os.ReadFile(filepath.Join(dir, sumsFile))
			if err != nil {
				return err
			}
			if sums, err = sum(dir); err != nil {
				return err
			}
			if !bytes.Equal(sums, want) {
				return errors.New("the packages are not those that were fetched")
			}
			return nil
		})
	if err != nil {
		return "", nil, fmt.Errorf("packages for image %s: %w", r.Name, err)
	}
	return dir, sums, nil
}

// sumsFile lists the hashes of the packages beside it, as sha256sum does.
const sumsFile = "SHA256SUMS"

// sum hashes the package files in dir.
func sum(dir string) ([]byte, error) {
	debs, err := filepath.Glob(filepath.Join(dir, "*.deb"))
	if err != nil {
		return nil, err
	}
	var out bytes.Buffer
	for _, deb := range debs {
		f, err := os.Open(deb)
		if err != nil {
			return nil, err
		}
		h, _, err := v1.SHA256(f)
		f.Close()
		if err != nil {
			return nil, err
		}
		fmt.Fprintf(&out, "%s  %s\n", h.Hex, filepath.Base(deb))
	}
	return out.Bytes(), nil
}

// image returns the recipe's image. Its place in the cache is named by all that
// it is made from, so what stands there is never replaced by anything else.
func (c cache) image(ctx context.Context, r Recipe) (Image, error) {
	debs, sums, err := c.packages(ctx, r)
	if err != nil {
		return Image{}, err
	}
	parts := []any{r, runtime.GOARCH, sums}
	src, err := source.ReadDir(".")
	if err != nil {
		return Image{}, err
	}
	for _, f := range src {
		b, err := source.ReadFile(f.Name())
		if err != nil {
			return Image{}, err
		}
		parts = append(parts, f.Name(), b)
	}
	var img Image
	img.Layout, err = c.entry(r.Name+"-"+hash(parts...), false,
		func(dir string) error {
			c.log.InfoContext(ctx, "assembling image", "image", r.Name)
			return write(ctx, r, debs, dir)
		},
		func(dir string) error {
			i, digest, err := open(dir)
			if err != nil {
				return err
			}
			img.Digest = digest
			return intact(i, digest)
		})
	if err != nil {
		return Image{}, fmt.Errorf("image %s: %w", r.Name, err)
	}
	return img, nil
}

// write makes the recipe's image out of the packages in debs and writes it into
// dir. It is an error if what then stands there does not verify.
func write(ctx context.Context, r Recipe, debs, dir string) error {
	ps, err := Load(ctx, debs)
	if err != nil {
		return err
	}
	img, err := Assemble(r, ps)
	if err != nil {
		return err
	}
	if err := writeLayout(img, dir); err != nil {
		return err
	}
	img, _, err = open(dir)
	if err != nil {
		return err
	}
	return Verify(r, img)
}

// writeLayout makes dir an OCI layout with one image.
func writeLayout(img v1.Image, dir string) error {
	p, err := layout.Write(dir, empty.Index)
	if err != nil {
		return err
	}
	return p.AppendImage(img)
}

// open returns the only image of an OCI layout and the digest that the index
// has for it.
func open(dir string) (v1.Image, v1.Hash, error) {
	idx, err := layout.ImageIndexFromPath(dir)
	if err != nil {
		return nil, v1.Hash{}, err
	}
	m, err := idx.IndexManifest()
	if err != nil {
		return nil, v1.Hash{}, err
	}
	if len(m.Manifests) != 1 {
		return nil, v1.Hash{}, fmt.Errorf("%d images in %s, want one", len(m.Manifests), dir)
	}
	digest := m.Manifests[0].Digest
	img, err := idx.Image(digest)
	return img, digest, err
}

// intact reads all blobs of the image and compares them with their digests.
func intact(img v1.Image, digest v1.Hash) error {
	m, err := img.Manifest()
	if err != nil {
		return err
	}
	raw, err := img.RawManifest()
	if err != nil {
		return err
	}
	config, err := img.RawConfigFile()
	if err != nil {
		return err
	}
	layers, err := img.Layers()
	if err != nil {
		return err
	}
	blobs := []struct {
		want v1.Hash
		r    io.Reader
	}{{digest, bytes.NewReader(raw)}, {m.Config.Digest, bytes.NewReader(config)}}
	for i, l := range layers {
		r, err := l.Compressed()
		if err != nil {
			return err
		}
		defer r.Close()
		blobs = append(blobs, struct {
			want v1.Hash
			r    io.Reader
		}{m.Layers[i].Digest, r})
	}
	for _, b := range blobs {
		got, _, err := v1.SHA256(b.r)
		if err != nil {
			return err
		}
		if got != b.want {
			return fmt.Errorf("blob %s has the digest %s", b.want, got)
		}
	}
	return nil
}

// hash names a cache entry by what it is made from.
func hash(parts ...any) string {
	b, err := json.Marshal(parts)
	if err != nil {
		panic(err) // strings and bytes only
	}
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:16])
}

// cache is a directory of directories. One with a final name is whole; one
// that ends in partial is being made, or was when its maker died. The caller
// holds the lock for as long as it uses it.
type cache struct {
	dir  string
	anew bool // get packages although they are there
	log  *slog.Logger
}

const partial = ".partial"

// entry returns the directory of the given name. If check finds nothing there,
// or nothing sound, or if anew is set, it is filled by fill first. What fill
// could not finish, or check refuses, never gets the name.
func (c cache) entry(name string, anew bool, fill, check func(dir string) error) (string, error) {
	dir := filepath.Join(c.dir, name)
	if !anew {
		err := check(dir)
		if err == nil {
			now := time.Now()
			return dir, os.Chtimes(dir, now, now) // sweep goes by it
		}
		if !errors.Is(err, fs.ErrNotExist) {
			c.log.Warn("cache entry is damaged, making it anew", "entry", name, "error", err)
		}
	}
	part := dir + partial
	if err := os.Mkdir(part, 0o755); err != nil {
		return "", err
	}
	defer os.RemoveAll(part)
	if err := fill(part); err != nil {
		return "", err
	}
	if err := check(part); err != nil {
		return "", err
	}
	if err := settle(part); err != nil {
		return "", err
	}
	if err := os.RemoveAll(dir); err != nil {
		return "", err
	}
	if err := os.Rename(part, dir); err != nil {
		return "", err
	}
	d, err := os.Open(c.dir)
	if err != nil {
		return "", err
	}
	return dir, errors.Join(d.Sync(), d.Close())
}

// sweep removes what a dead build left and what was not used for long.
func (c cache) sweep() error {
	es, err := os.ReadDir(c.dir)
	if err != nil {
		return err
	}
	for _, e := range es {
		if !e.IsDir() {
			continue
		}
		fi, err := e.Info()
		if err != nil {
			return err
		}
		if filepath.Ext(e.Name()) == partial || time.Since(fi.ModTime()) > keep {
			if err := os.RemoveAll(filepath.Join(c.dir, e.Name())); err != nil {
				return err
			}
		}
	}
	return nil
}

// settle lets everybody read the files below dir and makes them survive a power
// cut.
func settle(dir string) error {
	return filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		f, err := os.Open(p)
		if err != nil {
			return err
		}
		defer f.Close()
		if !d.IsDir() {
			if err := f.Chmod(0o644); err != nil {
				return err
			}
		}
		return f.Sync()
	})
}

// lock waits until no other process holds the file's lock, or ctx ends. The
// lock ends with the process that holds it, however that ends.
func lock(ctx context.Context, name string) (unlock func(), err error) {
	f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE, 0o644)
	if err != nil {
		return nil, err
	}
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for {
		err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		if err == nil {
			return func() { f.Close() }, nil
		}
		if !errors.Is(err, syscall.EWOULDBLOCK) {
			f.Close()
			return nil, fmt.Errorf("lock %s: %w", name, err)
		}
		select {
		case <-ctx.Done():
			f.Close()
			return nil, fmt.Errorf("lock %s: %w", name, ctx.Err())
		case <-tick.C:
		}
	}
}
