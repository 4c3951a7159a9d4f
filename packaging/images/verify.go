package images

import (
	"archive/tar"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"path"
	"slices"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// Verify reads the image back and returns all that is wrong with it, nil if
// nothing is. It takes no part of [Assemble]'s word: what it promises of the
// image, it sees in the image's own bytes.
//
//   - There is one manifest, one configuration and one uncompressed layer, of
//     the OCI media types.
//   - The layer holds directories, regular files and symbolic links, each once,
//     sorted, below a directory that came before it, owned by root, all of one
//     time, without extended headers.
//   - No file is setuid or setgid. Nobody but root may write to any, save to the
//     sticky directories for temporary files.
//   - Every link leads to something in the image, without going above its root.
//   - The files with a right to be executed are the recipe's programs and the
//     loaders that they name, all of them ELF: so no shell and no interpreter.
//   - Each ELF file finds its loader and its libraries in the image.
//   - The places for the models, the socket and the bridge are there and empty;
//     the entry point is a program; the user is [User].
func Verify(r Recipe, img v1.Image) error {
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }

	m, err := img.Manifest()
	if err != nil {
		return err
	}
	cf, err := img.ConfigFile()
	if err != nil {
		return err
	}
	layers, err := img.Layers()
	if err != nil {
		return err
	}
	if m.MediaType != types.OCIManifestSchema1 || m.Config.MediaType != types.OCIConfigJSON {
		bad("media types %s and %s are not OCI's", m.MediaType, m.Config.MediaType)
	}
	if len(layers) != 1 || len(m.Layers) != 1 {
		return errors.Join(append(errs, fmt.Errorf("%d layers, want one", len(layers)))...)
	}
	if m.Layers[0].MediaType != types.OCIUncompressedLayer {
		bad("layer is %s, want it uncompressed", m.Layers[0].MediaType)
	}
	b, err := layers[0].Uncompressed()
	if err != nil {
		return err
	}
	defer b.Close()
	t, err := readLayer(b, bad)
	if err != nil {
		return fmt.Errorf("layer: %w", err)
	}
	t.checkLinks(bad)
	t.checkPrograms(r, bad)
	t.checkPlaces(bad)

	if cf.Config.User != User {
		bad("user is %q, want %s", cf.Config.User, User)
	}
	if !slices.Equal(cf.Config.Entrypoint, r.Entrypoint) || len(cf.Config.Cmd) > 0 {
		bad("entry point is %q %q, want %q", cf.Config.Entrypoint, cf.Config.Cmd, r.Entrypoint)
	}
	if len(r.Entrypoint) > 0 {
		if _, e, err := t.file(r.Entrypoint[0]); err != nil {
			bad("entry point: %w", err)
		} else if e.mode&0o111 == 0 {
			bad("entry point %s may not be executed", r.Entrypoint[0])
		}
	}
	return errors.Join(errs...)
}

// readLayer reads a layer and checks each header of it.
func readLayer(r io.Reader, bad func(string, ...any)) (tree, error) {
	t := make(tree)
	left := int64(maxPackages)
	var last string
	var at int64
	for tr := tar.NewReader(r); ; {
		h, err := tr.Next()
		if err == io.EOF {
			return t, nil
		}
		if err != nil {
			return nil, err
		}
		name := "/" + strings.TrimSuffix(h.Name, "/")
		if name == "/" || path.Clean(name) != name {
			bad("bad name %q in the layer", h.Name)
			continue
		}
		if name <= last {
			bad("%s comes after %s", name, last)
		}
		if up := t[path.Dir(name)]; path.Dir(name) != "/" && (up == nil || !up.mode.IsDir()) {
			bad("%s comes before the directory that it is in", name)
		}
		if last == "" {
			at = h.ModTime.Unix()
		}
		last = name
		if h.ModTime.Unix() != at {
			bad("%s has a time of its own", name)
		}
		if h.Uid != 0 || h.Gid != 0 || h.Uname != "" || h.Gname != "" {
			bad("%s belongs to %d:%d %q:%q, want root without a name", name, h.Uid, h.Gid, h.Uname, h.Gname)
		}
		if len(h.PAXRecords) > 0 || h.Format != tar.FormatUSTAR {
			bad("%s has extended headers", name)
		}
		e := &entry{mode: h.FileInfo().Mode(), link: h.Linkname}
		if h.Mode&0o6000 != 0 {
			bad("%s is setuid or setgid", name)
		}
		if h.Mode&0o022 != 0 && e.mode.Type() != fs.ModeSymlink && e.mode != fs.ModeDir|fs.ModeSticky|0o777 {
			bad("%s can be written by others than root: %v", name, e.mode)
		}
		switch h.Typeflag {
		case tar.TypeDir, tar.TypeSymlink:
		case tar.TypeReg:
			if left -= h.Size; left < 0 {
				return nil, fmt.Errorf("more than %d bytes", int64(maxPackages))
			}
			e.data = make([]byte, h.Size)
			if _, err := io.ReadFull(tr, e.data); err != nil {
				return nil, fmt.Errorf("%s: %w", name, err)
			}
		default:
			bad("%s is a %q, not a directory, file or link", name, h.Typeflag)
			continue
		}
		t[name] = e
	}
}

// checkLinks follows every link.
func (t tree) checkLinks(bad func(string, ...any)) {
	for _, p := range slices.Sorted(maps.Keys(t)) {
		e := t[p]
		if e.mode.Type() != fs.ModeSymlink {
			continue
		}
		if climbs(p, e.link) {
			bad("link %s to %s leads out of the image", p, e.link)
		}
		if _, err := t.walk(p, nil); err != nil {
			bad("link %s to %s: %w", p, e.link, err)
		}
	}
}

// checkPrograms looks at everything that can be executed or loaded.
func (t tree) checkPrograms(r Recipe, bad func(string, ...any)) {
	loaders := make(map[string]bool)
	for _, p := range slices.Sorted(maps.Keys(t)) {
		if !t[p].mode.IsRegular() {
			continue
		}
		loader, _, err := t.requires(p)
		if err != nil {
			bad("%w", err)
		}
		if loader != "" {
			if real, _, err := t.file(loader); err == nil {
				loaders[real] = true
			}
		}
	}
	for _, p := range slices.Sorted(maps.Keys(t)) {
		e := t[p]
		if !e.mode.IsRegular() || e.mode&0o111 == 0 || loaders[p] {
			continue
		}
		named := slices.ContainsFunc(r.Programs, func(pat string) bool {
			ok, err := path.Match(pat, p)
			return ok && err == nil
		})
		switch {
		case !named:
			bad("%s may be executed, which the recipe does not say", p)
		case !isELF(e.data):
			bad("program %s is not ELF", p)
		}
	}
}

// checkPlaces looks for what the unit mounts over.
func (t tree) checkPlaces(bad func(string, ...any)) {
	for _, dir := range []string{ModelsDir, SocketDir} {
		if e := t[dir]; e == nil || !e.mode.IsDir() {
			bad("no directory %s", dir)
		}
		for p := range t {
			if strings.HasPrefix(p, dir+"/") {
				bad("%s is not empty: %s", dir, p)
			}
		}
	}
	if e := t[BridgeFile]; e == nil || !e.mode.IsRegular() || len(e.data) > 0 {
		bad("no empty file %s", BridgeFile)
	}
}
