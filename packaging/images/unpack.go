package images

import (
	"archive/tar"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
)

// Unpack writes the image's files into dir, which must be there and empty, as
// the caller's own. It is for running the engine without a container.
func (i Image) Unpack(dir string) error {
	img, digest, err := open(i.Layout)
	if err != nil {
		return err
	}
	if digest != i.Digest {
		return fmt.Errorf("%s holds image %s, want %s", i.Layout, digest, i.Digest)
	}
	if err := intact(img, digest); err != nil {
		return err
	}
	layers, err := img.Layers()
	if err != nil {
		return err
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer root.Close()
	for _, l := range layers {
		r, err := l.Uncompressed()
		if err != nil {
			return err
		}
		if err := errors.Join(unpack(root, r), r.Close()); err != nil {
			return fmt.Errorf("unpacking into %s: %w", dir, err)
		}
	}
	return nil
}

// unpack writes the files of one layer. Nothing gets past root, whatever the
// names and links in the layer are.
func unpack(root *os.Root, r io.Reader) error {
	for tr := tar.NewReader(r); ; {
		h, err := tr.Next()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		name := path.Clean(h.Name)
		mode := h.FileInfo().Mode()
		switch h.Typeflag {
		case tar.TypeDir:
			err = root.Mkdir(name, 0o755)
		case tar.TypeSymlink:
			err = root.Symlink(h.Linkname, name)
		case tar.TypeReg:
			var f *os.File
			f, err = root.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
			if err == nil {
				_, cerr := io.Copy(f, tr)
				err = errors.Join(cerr, f.Close())
			}
		default:
			err = fmt.Errorf("%s: unsupported kind of file %q", name, h.Typeflag)
		}
		if err == nil && h.Typeflag != tar.TypeSymlink {
			err = root.Chmod(name, mode&(fs.ModePerm|fs.ModeSticky)) // whatever the umask
		}
		if err != nil {
			return err
		}
	}
}
